// SPDX-License-Identifier: MIT OR Apache-2.0
//! Behaviour tests of Dune: what needs `/dev/dune`. `tests/README.md` says how
//! to add one.

mod abi_document;
mod bounce;
mod c_abi;
mod clones;
mod compartment;
mod compat;
mod core_dump;
mod device_memory;
mod documentation;
mod enter;
mod examples;
mod extended;
mod framework;
mod fuzz;
mod fuzz_abi;
mod fuzz_guest;
mod governed;
mod harness;
mod helpers;
mod hook;
mod isolation;
mod keys;
mod kvm;
mod kvm_guest;
mod lend;
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
mod shortcut;
mod signal;
mod signal_matrix;
mod spaces;
mod stacks;
mod support;
mod syscall;
mod terminal;
mod torture;
mod trap;
mod user;
mod user_dispatch;

use std::process::ExitCode;

use clap::builder::PossibleValuesParser;
use clap::Parser;
use clap::Subcommand;

use crate::framework::Suite;
use crate::framework::Test;

/// The tests of these files, each a topic.
macro_rules! topics {
    ($($name:ident),* $(,)?) => {
        &[$((stringify!($name), $name::TESTS)),*]
    };
}

/// Every test, topic by topic.
const TOPICS: &[(&str, &[Test])] = topics![
    harness,
    machine,
    enter,
    syscall,
    shortcut,
    terminal,
    compat,
    c_abi,
    documentation,
    trap,
    scope,
    stacks,
    user,
    bounce,
    extended,
    user_dispatch,
    keys,
    memory,
    mm,
    device_memory,
    paging,
    compartment,
    examples,
    spaces,
    sched,
    process,
    clones,
    signal,
    signal_matrix,
    core_dump,
    outside,
    governed,
    programs,
    robust,
    isolation,
    fuzz_guest,
    fuzz_abi,
    seeing,
    module,
    hook,
    kvm,
    lend,
    power,
    torture,
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
        /// Of the suites, only what these files of tests/src have.
        #[arg(long = "topic", value_delimiter = ',', value_parser = PossibleValuesParser::new(TOPICS.iter().map(|topic| topic.0)))]
        topics: Vec<String>,
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
    /// What dune.ko starts in a test, in place of its helper program.
    #[command(hide = true)]
    Lend,
    /// What a thread of a tortured process executes.
    #[command(hide = true)]
    AfterExec { pid: u32 },
}

fn main() -> ExitCode {
    match Cli::parse().action {
        Action::Run {
            suites,
            with,
            topics,
            only,
        } => {
            let of_topics = |test: &Test| topics.is_empty() || topics.iter().any(|topic| has_test(topic, test));
            let is_chosen = |test: &Test| {
                if only.is_empty() {
                    suites.contains(&test.suite) && of_topics(test) || with.iter().any(|name| name == test.name)
                } else {
                    only.iter().any(|name| name == test.name)
                }
            };
            let named: Vec<String> = only.iter().chain(&with).cloned().collect();
            runner::run_all(&all_tests(), &named, is_chosen)
        }
        Action::Exec { name } => runner::exec(&all_tests(), &name),
        Action::Lend => lend::help(),
        Action::AfterExec { pid } => torture::after_exec(pid),
        Action::List => {
            for test in all_tests() {
                println!("{:8} {:9} {}", test.suite.name(), test.run_as.name(), test.name);
            }
            ExitCode::SUCCESS
        }
    }
}

fn all_tests() -> Vec<&'static Test> {
    TOPICS.iter().flat_map(|topic| topic.1).collect()
}

fn has_test(topic: &str, test: &Test) -> bool {
    let mut tests = TOPICS
        .iter()
        .filter(|(name, _)| *name == topic)
        .flat_map(|topic| topic.1);
    tests.any(|of_topic| of_topic.name == test.name)
}
