// SPDX-License-Identifier: MIT OR Apache-2.0
//! Command line of the emulated machine; see `vm/README.md`.

use std::io::Write;
use std::path::Path;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use anyhow::Context;
use anyhow::Result;
use clap::Args;
use clap::Parser;
use clap::Subcommand;
use dune_vm::bench;
use dune_vm::bench::Results;
use dune_vm::heavy;
use dune_vm::host;
use dune_vm::image::Initramfs;
use dune_vm::machine;
use dune_vm::machine::Job;
use dune_vm::machine::Machine;
use dune_vm::matrix;
use dune_vm::paths;
use dune_vm::programs;
use dune_vm::suite;
use dune_vm::suite::Options;
use dune_vm::verdict;

/// Exit status for a machine that misbehaved, whatever its program said.
const STATUS_MACHINE: u8 = 99;

#[derive(Parser)]
#[command(name = "dune-vm", about = "Runs programs in an emulated machine with VT-x")]
struct Cli {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Boot, run a command, bring its output and exit status back.
    Boot(BootArgs),
    /// Host tests, checks and the matrix of machines.
    Test {
        /// The full matrix and the long suites.
        #[arg(long)]
        long: bool,
        /// Only the machines whose name holds this, those of the full matrix too.
        #[arg(long = "row")]
        rows: Vec<String>,
        /// Only the machines of the reference kernel, with the newest packaged kernel instead.
        #[arg(long)]
        newest: bool,
        /// How many machines run at a time.
        #[arg(long, default_value_t = 2)]
        jobs: usize,
    },
    /// What the operations cost: a table, target/bench/results.json (results-part.json with --only) and report.html.
    Bench {
        /// Only rows whose name holds this.
        #[arg(long)]
        only: Option<String>,
        /// The first machine only, no long rows, no report: what `make test` compares. Writes results-quick.json.
        #[arg(long)]
        quick: bool,
        /// What libdune is there for, beside Linux' own ways to it: a table of its own, target/bench/library.json.
        #[arg(long = "lib", conflicts_with = "quick")]
        library: bool,
    },
    /// Print the ratios of two results.json; the new one is the last run's unless given. Status 1 where one of Dune's figures grew.
    BenchCompare {
        old: PathBuf,
        new: Option<PathBuf>,
        /// Status 1 where any figure differs: by one below 10,000, by more than 1 % above.
        #[arg(long)]
        same: bool,
    },
    /// Fill the tables of figures in README.md and docs/performance.md from a results.json, the last run's unless given.
    BenchTables { results: Option<PathBuf> },
    /// Whether a dune.ko built with DUNE_COUNT_OPS=y counts every heavy operation that its disassembly has.
    HeavySites { module: PathBuf },
    /// The part of `test` that runs on this machine itself, where it can run Dune.
    Native {
        /// Another command that runs tests, as shell code.
        #[arg(default_value = suite::NATIVE)]
        command: String,
    },
    /// List the machines of the matrix.
    Rows,
    /// What docs/tests.md names beside what ran ok in the last whole runs that are here. Status 1 where something never did.
    Results,
    /// Boot into an interactive root shell on this terminal.
    Shell(MachineArgs),
}

#[derive(Args)]
struct MachineArgs {
    /// Kernel: test, debug, bench, pkeys or newest.
    #[arg(long, default_value = "test")]
    kernel: String,
    /// CPU model of Bochs.
    #[arg(long, default_value = "corei7_haswell_4770")]
    cpu_model: String,
    /// Number of CPUs.
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// Memory in MiB.
    #[arg(long, default_value_t = 1024)]
    memory: u32,
    /// Instructions per second of guest time.
    #[arg(long)]
    ips: Option<u32>,
    /// Module parameter gpa_bits.
    #[arg(long)]
    gpa_bits: Option<u32>,
    /// Module parameter, NAME=VALUE.
    #[arg(long = "parameter")]
    parameters: Vec<String>,
    /// Do not insert dune.ko.
    #[arg(long)]
    no_load: bool,
    /// Another dune.ko than the one scripts/module builds.
    #[arg(long)]
    module: Option<PathBuf>,
    /// More kernel arguments.
    #[arg(long, default_value = "")]
    append: String,
    /// A host file or program to take along: HOST or HOST:GUEST. Programs bring
    /// their libraries. Without GUEST it goes to /usr/bin.
    #[arg(long = "file")]
    files: Vec<String>,
    /// Take the distribution's programs along that the long tests run: bash, python3, gcc, gdb, java ...
    #[arg(long)]
    programs: bool,
}

#[derive(Args)]
struct BootArgs {
    #[command(flatten)]
    machine: MachineArgs,
    /// Who runs the command: root, tester (in the group dune) or outsider.
    #[arg(long, default_value = "root")]
    user: String,
    /// Seconds after which the machine is stopped.
    #[arg(long, default_value_t = 120)]
    timeout: u64,
    /// Run on this machine itself where it can, in the emulator where not.
    #[arg(long)]
    native: bool,
    /// Show the kernel's console and log also when all went well.
    #[arg(long, short)]
    verbose: bool,
    /// The command; a single argument is shell code.
    #[arg(required = true, trailing_var_arg = true)]
    command: Vec<String>,
}

fn main() -> ExitCode {
    let result = match Cli::parse().action {
        Action::Boot(arguments) => boot(&arguments),
        Action::Shell(arguments) => shell(&arguments),
        Action::Test {
            long,
            rows,
            newest,
            jobs,
        } => test(&Options {
            long,
            rows,
            newest,
            jobs,
        }),
        Action::Bench { only, quick, library } => bench::run(&bench::Options { only, quick, library }).map(|_| 0),
        Action::BenchTables { results } => bench_tables(results),
        Action::BenchCompare { old, new, same } => bench_compare(&old, new, same),
        Action::HeavySites { module } => heavy_sites(&module),
        Action::Native { command } => native(&command),
        Action::Results => results(),
        Action::Rows => {
            for row in matrix::rows(true) {
                println!(
                    "{:34} {:6?} {:5} {:26} {} CPU(s) {}",
                    row.name, row.when, row.kernel, row.cpu_model, row.cpus, row.command
                );
            }
            Ok(0)
        }
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("dune-vm: {error:#}");
            ExitCode::from(STATUS_MACHINE)
        }
    }
}

fn boot(arguments: &BootArgs) -> Result<u8> {
    let command = shell_code(&arguments.command);
    if arguments.native {
        match host::why_not_native() {
            None => {
                eprintln!("dune-vm: on this machine itself");
                let parameters = module_parameters(&arguments.machine);
                let module = if parameters.is_some() {
                    host::Module::Plain
                } else {
                    host::Module::None
                };
                let mut files = host::files(&module)?;
                add_what_was_asked(&mut files, &arguments.machine)?;
                let status = host::run(files, &command, &arguments.user, parameters.as_deref())?;
                return Ok(status as u8);
            }
            Some(reason) => {
                eprintln!("dune-vm: in the emulated machine, because {reason}");
            }
        }
    }
    let (machine, files) = prepare(&arguments.machine)?;
    let job = Job {
        command,
        user: arguments.user.clone(),
        timeout: Duration::from_secs(arguments.timeout),
    };
    let outcome = machine::run(&machine, files, &job, &mut |line| {
        // A closed pipe is no reason to lose the machine's verdict.
        let _ = writeln!(std::io::stdout(), "{line}");
    })?;
    let problems = verdict::problems(&outcome);
    if arguments.verbose || !problems.is_empty() {
        eprint!("--- console\n{}\n", outcome.console);
        eprint!("--- kernel log\n{}---\n", outcome.kernel_log);
        eprintln!("dune-vm: {}", outcome.times);
    }
    for problem in &problems {
        eprintln!("dune-vm: {problem}");
    }
    eprintln!(
        "dune-vm: {} with {} CPU(s), kernel {}: {:.1} s",
        machine.cpu_model,
        machine.cpus,
        arguments.machine.kernel,
        outcome.elapsed.as_secs_f64()
    );
    if !problems.is_empty() {
        return Ok(STATUS_MACHINE);
    }
    Ok(outcome.status.unwrap_or(i32::from(STATUS_MACHINE)) as u8)
}

fn test(options: &Options) -> Result<u8> {
    Ok(status(&suite::run(options)?))
}

fn native(command: &str) -> Result<u8> {
    if let Some(reason) = host::why_not_native() {
        bail!("not on this machine itself, because {reason}");
    }
    Ok(status(&suite::native(command)?))
}

/// Prints the sum; the exit status that goes with it.
fn status(sum: &suite::Sum) -> u8 {
    println!("{}", sum.line());
    u8::from(sum.failed != 0 || sum.passed == 0)
}

/// Figures of a run; the last one's where none is named.
fn figures(path: Option<PathBuf>) -> Result<Results> {
    let path = path.unwrap_or_else(|| paths::target_dir().join("bench/results.json"));
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).with_context(|| path.display().to_string())
}

fn bench_tables(results: Option<PathBuf>) -> Result<u8> {
    let results = figures(results)?;
    for name in ["README.md", "docs/performance.md"] {
        let path = paths::root().join(name);
        let old = std::fs::read_to_string(&path).with_context(|| name.to_string())?;
        let new = bench::fill(&old, &results).with_context(|| name.to_string())?;
        println!("{name}: {}", if new == old { "as it was" } else { "filled anew" });
        std::fs::write(&path, new).with_context(|| name.to_string())?;
    }
    Ok(0)
}

fn bench_compare(old: &Path, new: Option<PathBuf>, same: bool) -> Result<u8> {
    let (old, new) = (figures(Some(old.to_path_buf()))?, figures(new)?);
    let differing = bench::compare(&old, &new);
    if same {
        println!("{differing} figures differ");
        return Ok(u8::from(differing != 0));
    }
    Ok(u8::from(!bench::against_baseline(&old, &new)))
}

fn results() -> Result<u8> {
    let (lines, is_well) = dune_vm::results::tell()?;
    lines.iter().for_each(|line| println!("{line}"));
    Ok(u8::from(!is_well))
}

fn heavy_sites(module: &Path) -> Result<u8> {
    let (places, wrong) = heavy::look(module)?;
    wrong.iter().for_each(|place| println!("{place}"));
    println!("{places} heavy operations; not counted in {} functions", wrong.len());
    Ok(u8::from(!wrong.is_empty()))
}

fn shell(arguments: &MachineArgs) -> Result<u8> {
    let (machine, files) = prepare(arguments)?;
    machine::shell(&machine, files)?;
    Ok(0)
}

fn module_parameters(arguments: &MachineArgs) -> Option<Vec<String>> {
    if arguments.no_load {
        return None;
    }
    let mut parameters = arguments.parameters.clone();
    if let Some(bits) = arguments.gpa_bits {
        parameters.push(format!("gpa_bits={bits}"));
    }
    Some(parameters)
}

fn prepare(arguments: &MachineArgs) -> Result<(Machine, Initramfs)> {
    let kernel_tree = paths::kernel_tree(&arguments.kernel)?;
    let mut files = Initramfs::base(&kernel_tree)?;
    let module = match &arguments.module {
        Some(path) => Some(path.clone()),
        None if !paths::has_module() => None,
        None if arguments.no_load => match paths::module(&arguments.kernel, None) {
            Ok(path) => Some(path),
            Err(error) => {
                eprintln!("dune-vm: going on without a module: {error:#}");
                None
            }
        },
        None => Some(paths::module(&arguments.kernel, None)?),
    };
    files.add_built(module.as_deref())?;
    add_what_was_asked(&mut files, arguments)?;
    let machine = Machine {
        kernel_tree,
        cpu_model: arguments.cpu_model.clone(),
        cpus: arguments.cpus,
        memory_mib: arguments.memory,
        ips: arguments.ips.unwrap_or_else(|| machine::default_ips(&arguments.kernel)),
        append: format!("{} {}", machine::arguments_of(&arguments.kernel), arguments.append),
        module_parameters: if module.is_some() {
            module_parameters(arguments)
        } else {
            None
        },
        repeatable: false,
    };
    Ok((machine, files))
}

fn add_what_was_asked(files: &mut Initramfs, arguments: &MachineArgs) -> Result<()> {
    for entry in &arguments.files {
        files.take_along(entry).with_context(|| format!("--file {entry}"))?;
    }
    if arguments.programs {
        programs::add(files, true)?;
    }
    Ok(())
}

/// One argument is shell code as it stands; several are quoted.
fn shell_code(words: &[String]) -> String {
    match words {
        [code] => code.clone(),
        _ => words
            .iter()
            .map(|word| format!("'{}'", word.replace('\'', "'\\''")))
            .collect::<Vec<_>>()
            .join(" "),
    }
}
