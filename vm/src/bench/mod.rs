// SPDX-License-Identifier: MIT OR Apache-2.0
//! `make bench`: runs dune-bench on the machines to be compared, prints its rows as a table while they come, and writes
//! `results.json` and `report.html`.

mod chart;
mod compare;
mod library;
mod results;
mod tables;
mod targets;

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::bail;
use anyhow::Context;
use anyhow::Result;

use crate::host;
use crate::image::Initramfs;
use crate::machine;
use crate::machine::Job;
use crate::machine::Machine;
use crate::paths;
use crate::verdict;

pub use compare::against_baseline;
pub use compare::compare;
pub use results::Results;
pub use tables::fill;

use results::Environment;
use results::Line;

/// Starts the lines of dune-bench that are for us.
const MARK: &str = "@bench ";
/// Bochs' name of a CPU and what its kernel is told: figures are for a kernel at fixed addresses, without mitigations and
/// without XSAVE, as the recorded figures of other systems are.
const PLAIN: (&str, &str, &str) = ("bench", "corei7_skylake_x", "nokaslr norandmaps noxsave");
/// With what a distribution's kernel has: XSAVE, mitigations. Nothing is put at random, so that two runs are the same.
const USUAL: (&str, &str, &str) = (
    "test",
    "corei7_haswell_4770",
    "nokaslr norandmaps randomize_kstack_offset=off",
);
/// Memory of a machine on which the short rows run.
const SHORT_MIB: u32 = 1024;
/// The same for all rows: one of them drops a GiB.
const LONG_MIB: u32 = 2048;
const TIMEOUT: Duration = Duration::from_secs(1200);

/// What a quick run writes, in target/bench.
pub const QUICK: &str = "results-quick.json";

/// What to measure.
pub struct Options {
    /// Part of the names of the rows.
    pub only: Option<String>,
    /// One machine, without the rows that take many seconds: what `make test` compares.
    pub quick: bool,
    /// What libdune is there for, and Linux' own ways to it, on one machine.
    pub library: bool,
}

/// Measures and writes the results.
pub fn run(options: &Options) -> Result<Results> {
    paths::small_program()?;
    let mut results = if host::why_not_native().is_none() {
        native(options)?
    } else {
        emulated(options)?
    };
    if results.rows.is_empty() {
        bail!("nothing was measured: no row's name holds what was asked for");
    }
    targets::judge(&mut results.rows);
    let directory = paths::target_dir().join("bench");
    fs::create_dir_all(&directory)?;
    let json = directory.join(if options.library {
        "library.json"
    } else if options.quick {
        QUICK
    } else if options.only.is_some() {
        "results-part.json"
    } else {
        "results.json"
    });
    fs::write(&json, serde_json::to_string_pretty(&results)? + "\n")?;
    println!("wrote {}", json.display());
    if options.library {
        let missing = library::print(&results);
        if !missing.is_empty() {
            bail!("rows are missing: {}", missing.join(", "));
        }
    }
    if !options.is_short() {
        let report = directory.join("report.html");
        fs::write(&report, chart::report(&results)?)?;
        println!("wrote {}", report.display());
    }
    Ok(results)
}

impl Options {
    fn is_short(&self) -> bool {
        self.quick || self.library
    }

    /// What runs where heavy operations are counted.
    fn counting_command(&self) -> String {
        let only = self
            .only
            .as_ref()
            .map_or(String::new(), |only| format!(" --only '{only}'"));
        format!("dune-bench --quick --system dune,dune-borrow{only}")
    }

    /// What runs on the first machine.
    fn command(&self) -> String {
        let mut arguments = String::new();
        if let Some(only) = &self.only {
            arguments += &format!(" --only '{only}'");
        }
        if self.is_short() {
            arguments += " --quick";
        }
        if self.library {
            library::command(&arguments)
        } else {
            "dune-bench".to_string() + &arguments
        }
    }
}

fn native(options: &Options) -> Result<Results> {
    let host::Captured { status, output, .. } = host::capture(&options.command(), &host::Module::Plain)?;
    let mut results = Results::new(Environment::native()?);
    print_head();
    for line in output.lines() {
        take(&mut results, line, "")?;
    }
    if status != 0 {
        bail!("dune-bench ended with status {status}:\n{output}");
    }
    Ok(results)
}

fn emulated(options: &Options) -> Result<Results> {
    let (kernel, cpu_model, append) = PLAIN;
    let module = paths::module(kernel, None)?;
    let mut results = Results::new(Environment::emulated(kernel, cpu_model, append)?);
    println!("{cpu_model}, kernel {kernel}, {append}");
    print_head();
    let all = |results: &mut Results, line: &str| take(results, line, "");
    let memory_mib = if options.is_short() { SHORT_MIB } else { LONG_MIB };
    boot(&PLAIN, memory_mib, &module, &options.command(), &mut results, &all)?;
    if options.library {
        return Ok(results);
    }
    println!("the same, module with counters of heavy operations (counting costs instructions: they do not count)");
    let counting = paths::module(kernel, Some("DUNE_COUNT_OPS=y"))?;
    let mut counted = Results::new(results.environment.clone());
    let silent = |results: &mut Results, line: &str| collect(results, line, "").map(|_| ());
    boot(
        &PLAIN,
        SHORT_MIB,
        &counting,
        &options.counting_command(),
        &mut counted,
        &silent,
    )?;
    results.take_counted(&counted);
    if options.quick {
        return Ok(results);
    }
    let (kernel, cpu_model, append) = USUAL;
    results
        .other_machines
        .push(Environment::emulated(kernel, cpu_model, append)?);
    println!("{cpu_model}, kernel {kernel}: XSAVE, mitigations");
    print_head();
    let module = paths::module(kernel, None)?;
    let usual = |results: &mut Results, line: &str| take(results, line, cpu_model);
    boot(&USUAL, LONG_MIB, &module, &options.command(), &mut results, &usual)?;
    Ok(results)
}

/// Boots and gives each line to `line` as it comes.
fn boot(
    (kernel, cpu_model, append): &(&str, &'static str, &str),
    memory_mib: u32,
    module: &std::path::Path,
    command: &str,
    results: &mut Results,
    line: &dyn Fn(&mut Results, &str) -> Result<()>,
) -> Result<()> {
    let kernel_tree = paths::kernel_tree(kernel)?;
    let mut files = Initramfs::base(&kernel_tree)?;
    files.add_built(Some(module))?;
    let machine = Machine {
        kernel_tree,
        cpu_model: cpu_model.to_string(),
        cpus: 1,
        memory_mib,
        ips: machine::default_ips(PLAIN.0),
        append: append.to_string(),
        module_parameters: Some(Vec::new()),
        repeatable: true,
    };
    let job = Job {
        command: command.to_string(),
        user: "root".to_string(),
        timeout: TIMEOUT,
    };
    let mut failed = None;
    let outcome = machine::run(&machine, files, &job, &mut |text| {
        if let Err(error) = line(results, text) {
            failed.get_or_insert(error);
        }
    })?;
    let problems = verdict::problems(&outcome);
    if !problems.is_empty() || outcome.status != Some(0) {
        bail!(
            "dune-bench ended with status {:?}: {}\n{}\n{}",
            outcome.status,
            problems.join("; "),
            outcome.output,
            outcome.kernel_log
        );
    }
    match failed {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

fn print_head() {
    println!(
        "{:<24} {:<24} {:>12} {:>12} {:>12} {:>6} {:>8}",
        "bench", "system", "median", "mean", "max", "n", "VM exits"
    );
}

/// Collects a line and prints its row.
fn take(results: &mut Results, line: &str, column: &str) -> Result<()> {
    if collect(results, line, column)? {
        let row = &results.rows[results.rows.len() - 1];
        let exits = row.vm_exits.map_or("-".to_string(), |exits| exits.to_string());
        println!(
            "{:<24} {:<24} {:>12} {:>12} {:>12} {:>6} {:>8}",
            row.bench, row.system, row.value, row.mean, row.max, row.n, exits
        );
    } else if !line.starts_with(MARK) {
        println!("{line}");
    }
    Ok(())
}

/// Whether the line was a row, which is now the last one.
fn collect(results: &mut Results, line: &str, column: &str) -> Result<bool> {
    let Some(text) = line.strip_prefix(MARK) else {
        return Ok(false);
    };
    if let Some(unit) = text.strip_prefix("unit ") {
        results.unit = unit.to_string();
        return Ok(false);
    }
    let line: Line = serde_json::from_str(text).with_context(|| format!("not a row: {text}"))?;
    results.push(line, column);
    Ok(true)
}

/// Compares a short run with the committed figures: what `make test` does.
pub fn check_baseline() -> Result<bool> {
    let path = paths::root().join("bench/baseline.json");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let baseline: Results = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
    let results = run(&Options {
        only: None,
        quick: true,
        library: false,
    })?;
    Ok(against_baseline(&baseline, &results))
}

/// First line of what a program says to `--version`.
fn version(program: &str) -> String {
    Command::new(program)
        .arg("--version")
        .output()
        .ok()
        .and_then(|output| {
            String::from_utf8_lossy(&output.stdout)
                .lines()
                .next()
                .map(str::to_string)
        })
        .unwrap_or_else(|| "unknown".to_string())
}
