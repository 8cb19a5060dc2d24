// SPDX-License-Identifier: MIT OR Apache-2.0
//! Behaviour tests of Dune: what needs `/dev/dune`. `tests/README.md` says how
//! to add one.

mod c_abi;
mod clones;
mod compartment;
mod compat;
mod core_dump;
mod device_memory;
mod documentation;
mod enter;
mod examples;
mod framework;
mod fuzz;
mod fuzz_abi;
mod fuzz_guest;
mod governed;
mod harness;
mod helpers;
mod hook;
mod isolation;
mod kvm;
mod kvm_guest;
mod machine;
mod memory;
mod mm;
mod module;
mod outside;
mod paging;
mod power;
mod process;
mod programs;
#[allow(dead_code)]
mod raw;
mod robust;
mod runner;
mod sched;
mod scope;
mod seeing;
mod signal;
mod spaces;
mod support;
mod syscall;
mod torture;
mod trap;
mod user;

use std::process::ExitCode;

use clap::Parser;
use clap::Subcommand;

use crate::framework::Suite;
use crate::framework::Test;

/// Every test, topic by topic.
const TOPICS: &[&[Test]] = &[
    harness::TESTS,
    machine::TESTS,
    enter::TESTS,
    syscall::TESTS,
    compat::TESTS,
    c_abi::TESTS,
    documentation::TESTS,
    trap::TESTS,
    scope::TESTS,
    user::TESTS,
    memory::TESTS,
    mm::TESTS,
    device_memory::TESTS,
    paging::TESTS,
    compartment::TESTS,
    examples::TESTS,
    spaces::TESTS,
    sched::TESTS,
    process::TESTS,
    clones::TESTS,
    signal::TESTS,
    core_dump::TESTS,
    outside::TESTS,
    governed::TESTS,
    programs::TESTS,
    robust::TESTS,
    isolation::TESTS,
    fuzz_guest::TESTS,
    fuzz_abi::TESTS,
    seeing::TESTS,
    module::TESTS,
    hook::TESTS,
    kvm::TESTS,
    power::TESTS,
    torture::TESTS,
];

#[derive(Parser)]
#[command(name = "dune-tests", about = "Behaviour tests of Dune")]
struct Cli {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Run tests and report in KTAP; needs root.
    Run {
        /// Suites to run: short, long, debug, no-vmx, harness.
        #[arg(long = "suite", default_value = "short")]
        suites: Vec<Suite>,
        /// These tests too, whatever their suite.
        #[arg(long = "with", value_delimiter = ',')]
        with: Vec<String>,
        /// Only these tests, whatever their suite.
        #[arg(long, value_delimiter = ',')]
        only: Vec<String>,
    },
    /// Run one test in this very process.
    Exec {
        /// Its name.
        name: String,
    },
    /// List the tests.
    List,
}

fn main() -> ExitCode {
    match Cli::parse().action {
        Action::Run { suites, with, only } => runner::run_all(&all_tests(), &suites, &with, &only),
        Action::Exec { name } => runner::exec(&all_tests(), &name),
        Action::List => {
            for test in all_tests() {
                println!("{:8} {:9} {}", test.suite.name(), test.run_as.name(), test.name);
            }
            ExitCode::SUCCESS
        }
    }
}

fn all_tests() -> Vec<&'static Test> {
    TOPICS.iter().flat_map(|topic| topic.iter()).collect()
}
