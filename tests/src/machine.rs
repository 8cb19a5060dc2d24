// SPDX-License-Identifier: MIT OR Apache-2.0
//! Machines that cannot run Dune say so, in one sentence.

use crate::check;
use crate::check_ok;
use crate::framework::Outcome;
use crate::framework::Suite;
use crate::framework::Test;
use crate::framework::User;
use crate::helpers;

pub const TESTS: &[Test] = &[
    Test::new("unfit_cpu_is_refused_in_one_sentence", unfit_cpu_is_refused)
        .suite(Suite::NoVmx)
        .run_as(User::Root),
    Test::new("program_without_the_module_says_what_to_do", program_says_what_to_do).suite(Suite::NoVmx),
];

/// Inserting the module fails with ENODEV and leaves one line in the log that
/// names what the CPU lacks.
fn unfit_cpu_is_refused() -> Outcome {
    let ended = check_ok!(helpers::load_module(&[]));
    check!(ended.status != 0, "the module was inserted: {ended:?}");
    check!(ended.stderr.contains("No such device"), "not ENODEV: {ended:?}");
    let log = check_ok!(helpers::kernel_log());
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("dune:")).collect();
    let lacks = if !helpers::cpu_has("vmx") { "VT-x" } else { "EPT" };
    check!(
        lines.iter().any(|line| line.contains(lacks)),
        "no line of the module names {lacks}: {lines:?}"
    );
    Outcome::Pass
}

fn program_says_what_to_do() -> Outcome {
    let ended = check_ok!(helpers::run_program("hello", &[]));
    check!(ended.status != 0, "hello ran: {ended:?}");
    let says = format!("{}{}", ended.stdout, ended.stderr);
    let expected = if helpers::cpu_has("vmx") { "module" } else { "VT-x" };
    check!(says.contains(expected), "hello does not name {expected}: {says}");
    check!(!says.contains("panicked"), "hello panicked: {says}");
    Outcome::Pass
}
