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

/// Inserting the module fails with ENODEV and leaves a line in the log that says
/// what the CPU lacks.
fn unfit_cpu_is_refused() -> Outcome {
    let ended = check_ok!(helpers::load_module(&[]));
    check!(ended.status != 0, "the module was inserted: {ended:?}");
    check!(ended.stderr.contains("No such device"), "not ENODEV: {ended:?}");
    let expected = if helpers::cpu_has("vmx") {
        "dune: this CPU lacks EPT (secondary control \"enable EPT\")"
    } else {
        "dune: this CPU has no VMX (CPUID.1:ECX.VMX is 0)"
    };
    let log = check_ok!(helpers::kernel_log());
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("dune: ")).collect();
    check!(
        lines.iter().any(|line| line.ends_with(expected)),
        "{expected:?} is not in {lines:?}"
    );
    check!(!helpers::module_is_loaded());
    Outcome::Pass
}

/// A program is told what to do about it.
fn program_says_what_to_do() -> Outcome {
    let ended = check_ok!(helpers::run_program("hello", &[]));
    check!(ended.status != 0, "hello ran: {ended:?}");
    let expected = if helpers::cpu_has("vmx") {
        "/dev/dune does not exist: the module dune.ko is not loaded; load it as root with `make load` or `modprobe dune`"
    } else {
        "/dev/dune does not exist, and this CPU has no VT-x (no `vmx` in /proc/cpuinfo): use an Intel CPU, or a virtual \
         machine with nested virtualization, and enable VT-x in the firmware"
    };
    check!(
        ended.stderr.contains(expected),
        "{expected:?} is not in {:?}",
        ended.stderr
    );
    Outcome::Pass
}
