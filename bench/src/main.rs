// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the operations of Dune cost, beside Linux' own ways and KVM's to the same end.
//!
//! Started as root it measures all systems, one after the other: Linux, Dune with VMX of its own, then KVM, and Dune with
//! VMX borrowed from it. Rows go to standard output for `dune-vm bench`, which makes the table and the report.

mod calls;
mod compute;
mod footprint;
mod intercept;
mod kvm;
mod memory;
mod pagemap;
mod process;
mod rivals;
mod tables;
mod trap;
mod walk;

use std::path::Path;
use std::process::Command;
use std::process::ExitCode;

use clap::Parser;
use dune_bench::counting;
use dune_bench::measure;
use dune_bench::pages;
use dune_bench::tasks;
use libdune::Dune;

use crate::measure::Selection;
use crate::measure::System;
use crate::walk::Translations;

/// With VMX of the module's own.
const DUNE: &str = "dune";

#[derive(Parser)]
#[command(
    name = "dune-bench",
    about = "What the operations of Dune cost, beside Linux' and KVM's"
)]
struct Cli {
    /// Only rows whose name holds this.
    #[arg(long)]
    only: Option<String>,
    /// Only the rows of these names.
    #[arg(long, value_delimiter = ',')]
    rows: Vec<String>,
    /// Only these: linux, dune, kvm, dune-borrow.
    #[arg(long, value_delimiter = ',')]
    system: Vec<String>,
    /// No rows that take many seconds.
    #[arg(long)]
    quick: bool,
    /// What a started copy of this program does, and how.
    #[arg(hide = true)]
    errand: Vec<String>,
}

impl Cli {
    fn selection(&self) -> Selection {
        Selection {
            only: self.only.clone(),
            rows: self.rows.clone(),
            quick: self.quick,
        }
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.errand.split_first().map(|(first, rest)| (first.as_str(), rest)) {
        None => {}
        Some((footprint::WAIT, arguments)) => return ExitCode::from(u8::from(!footprint::wait(arguments))),
        Some((other, _)) => {
            eprintln!("dune-bench: {other}?");
            return ExitCode::FAILURE;
        }
    }
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dune-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<(), String> {
    println!("{}unit {}", measure::MARK, dune_examples::unit());
    let is_wanted = |name: &str| cli.system.is_empty() || cli.system.iter().any(|wanted| wanted == name);
    let system = |name| System {
        name,
        dune: None,
        selection: cli.selection(),
        is_counting: false,
    };
    if is_wanted("linux") {
        let linux = system("linux");
        calls::measure(&linux);
        memory::measure(&linux);
        trap::measure(&linux);
        tables::measure(&linux);
        process::measure(&linux);
        process::measure_programs(&linux);
        process::measure_small(&linux);
        footprint::measure(&linux);
        rivals::measure(&linux);
        walk::measure(&linux, &Translations::default());
        compute::measure(&linux, &Translations::default());
    }
    if is_wanted(DUNE) {
        outside(DUNE, cli)?;
        translating(cli)?;
        inside(DUNE, cli)?;
    }
    let modules = Path::new("/lib/modules");
    if is_wanted("kvm") || is_wanted("dune-borrow") {
        if !modules.join("kvm-intel.ko").exists() && !Path::new("/dev/kvm").exists() {
            println!("no kvm_intel here: no rows of KVM, none of borrowed VMX");
            return Ok(());
        }
        for module in ["irqbypass", "kvm", "kvm-intel"] {
            let file = modules.join(format!("{module}.ko"));
            if file.exists() && !Path::new("/sys/module").join(module.replace('-', "_")).exists() {
                let status = Command::new("insmod").arg(&file).status().map_err(|e| e.to_string())?;
                if !status.success() {
                    return Err(format!("insmod {}: {status}", file.display()));
                }
            }
        }
        if is_wanted("kvm") {
            kvm::measure(&system("kvm")).map_err(|error| format!("KVM: {error}"))?;
        }
        if is_wanted("dune-borrow") {
            outside("dune-borrow", cli)?;
            inside("dune-borrow", cli)?;
        }
    }
    Ok(())
}

/// The rows about translating addresses, in a stay of their own: nothing else may have large leaves.
fn translating(cli: &Cli) -> Result<(), String> {
    let dune = Dune::enter().map_err(|error| error.to_string())?;
    let system = System {
        name: DUNE,
        dune: Some(&dune),
        selection: cli.selection(),
        is_counting: counting::is_on(&dune),
    };
    let translations = Translations::default();
    walk::measure(&system, &translations);
    compute::measure(&system, &translations);
    dune.leave();
    Ok(())
}

/// The rows of a thread that is not, or not always, in Dune mode.
fn outside(name: &'static str, cli: &Cli) -> Result<(), String> {
    let dune = Dune::enter().map_err(|error| error.to_string())?;
    let is_counting = counting::is_on(&dune);
    dune.leave();
    let system = System {
        name,
        dune: None,
        selection: cli.selection(),
        is_counting,
    };
    process::measure_small(&system);
    process::enter_and_leave(&system);
    if !is_counting {
        process::measure_programs(&system);
        footprint::measure(&system);
    }
    Ok(())
}

/// The rows of a thread in Dune mode.
fn inside(name: &'static str, cli: &Cli) -> Result<(), String> {
    calls::look_at_cpu();
    let dune = Dune::enter().map_err(|error| error.to_string())?;
    let system = System {
        name,
        dune: Some(&dune),
        selection: cli.selection(),
        is_counting: counting::is_on(&dune),
    };
    calls::measure(&system);
    memory::measure(&system);
    trap::measure(&system);
    tables::measure(&system);
    intercept::measure(&system);
    process::measure(&system);
    dune.leave();
    Ok(())
}
