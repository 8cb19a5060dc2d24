// SPDX-License-Identifier: MIT OR Apache-2.0
//! Programs in C against the installed headers and library: `tests/c-compat/`, and `tests/programs/musl.c`, which
//! `scripts/c-compat` compiles.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;

use crate::check;
use crate::check_ok;
use crate::framework::Outcome;
use crate::framework::Suite;
use crate::framework::Test;
use crate::helpers;
use crate::support::within;

pub const TESTS: &[Test] = &[
    Test::new("c_program_handles_exceptions", || run(&["traps"])),
    Test::new("c_program_edits_entries_in_page_faults", || run(&["pgflt"])),
    Test::new("c_program_runs_code_at_cpl3", || run(&["ring3"])),
    Test::new("c_program_changes_page_tables", || run(&["pagetable"])),
    Test::new("c_program_uses_the_page_pool", || run(&["pool"])),
    Test::new("c_program_forks_and_makes_threads", || run(&["process"])),
    Test::new("c_program_takes_signals", || run(&["signals"])),
    Test::new("c_program_uses_helpers", || run(&["helpers"])),
    Test::new("c_program_ends_as_it_says", || run(&["ends"])),
    Test::new("c_handlers_leave_extended_state_alone", || run(&["states"])),
    Test::new("c_program_executes_what_linux_allows", || run(&["executable"])),
    Test::new("c_function_that_does_nothing_is_noticed", run_without_functions)
        .suite(Suite::Long)
        .timeout_s(120),
    Test::new("c_programs_of_an_outsider_run", run_outsiders),
    Test::new("c_programs_may_be_static", || run(&["traps-static", "ring3-static"])),
    Test::new("program_of_musl_makes_threads_and_children", || run(&["musl"])),
];

/// Where the image has them.
const DIRECTORY: &str = "/usr/libexec/dune/c-compat";

/// Programs by who had read a description of the first Dune's API, and nothing of this tree.
fn run_outsiders() -> Outcome {
    let names = check_ok!(std::fs::read_dir(DIRECTORY))
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("outsider-"));
    let mut names: Vec<String> = names.collect();
    names.sort();
    check!(names.len() > 10, "programs in {DIRECTORY}: {names:?}");
    run(&names.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Programs in which one function of the API does nothing and returns 0: each fails, or does not end.
fn run_without_functions() -> Outcome {
    const LIMIT: Duration = Duration::from_secs(5);
    let names = check_ok!(std::fs::read_dir(DIRECTORY))
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("without-"));
    let names: Vec<String> = names.collect();
    check!(names.len() > 50, "programs in {DIRECTORY}: {names:?}");
    let mut unnoticed = Vec::new();
    for name in names {
        let mut child = check_ok!(Command::new(Path::new(DIRECTORY).join(&name))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn());
        let ended = within(LIMIT, || !matches!(child.try_wait(), Ok(None)));
        if !ended {
            // SAFETY: The group of the child, which has not been waited for.
            unsafe { libc::kill(-(child.id() as i32), libc::SIGKILL) };
        }
        if check_ok!(child.wait()).success() {
            unnoticed.push(name);
        }
    }
    check!(unnoticed.is_empty(), "noticed by nothing: {unnoticed:?}");
    Outcome::Pass
}

/// Whether Linux was told to do without an XSAVEC that the CPU claims to have. Bochs' Tiger Lake: #GP from the XRSTOR of the loader
/// behind its own XSAVEC, where it resolves what a handler calls first, so all is to be resolved before.
fn is_xsavec_hidden() -> bool {
    const XSAVEC: u32 = 1 << 1;
    helpers::xsave_features() & XSAVEC != 0 && !helpers::cpu_has("xsavec")
}

/// Each checks itself, and ends with status 0.
fn run(programs: &[&str]) -> Outcome {
    for name in programs {
        let program = Path::new(DIRECTORY).join(name);
        check!(
            program.is_file(),
            "{} is missing: scripts/c-compat compiles it",
            program.display()
        );
        let mut command = Command::new(&program);
        if is_xsavec_hidden() {
            command.env("LD_BIND_NOW", "1");
        }
        let output = check_ok!(command.output());
        check!(
            output.status.success(),
            "{name}: {}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Outcome::Pass
}
