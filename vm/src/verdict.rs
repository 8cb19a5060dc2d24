// SPDX-License-Identifier: MIT OR Apache-2.0
//! Decides whether a run of a machine was clean.

use crate::machine::End;
use crate::machine::Outcome;

/// Text that no clean kernel log has.
const BAD_SIGNS: &[&str] = &[
    "BUG:",
    "WARNING:",
    "Oops",
    "KASAN",
    "UBSAN",
    "possible circular locking",
    "possible recursive locking",
    "inconsistent lock state",
    "possible irq lock inversion",
    "suspicious RCU",
    "bad unlock balance",
    "held lock freed",
    "lock held when returning to user space",
    "invalid context",
    "scheduling while atomic",
    "blocked for more than",
    "soft lockup",
    "hard LOCKUP",
    "new suspected memory leaks",
    "unreferenced object",
    "general protection fault",
    "unable to handle",
    "Call Trace",
    "Kernel panic",
    "ODEBUG",
    "refcount_t",
    "Out of memory: Killed",
    "Bad page state",
    "Bad rss-counter",
    "unchecked MSR access",
    "unexpectedly returned",
];

/// Warnings of the kernel about the emulated machine at boot, before anything
/// of ours runs, by the function that warns. The whole report is overlooked.
const HARMLESS_REPORTS: &[&str] = &[
    // Bochs says 8 cores in CPUID leaf 4 whatever the number of CPUs.
    // The function is parse_legacy, or the one it is inlined into.
    "at arch/x86/kernel/cpu/topology_common.c:57 parse_",
];

/// Lines that hold a bad sign and mean nothing bad.
const HARMLESS: &[&str] = &[
    // Announcements of the debug kernel at boot.
    "KernelAddressSanitizer initialized",
    "kasan: ",
    // The suite says which of its own lines provoke something; see tests/README.md.
];

/// Returns the lines of a kernel log that no clean run has.
pub fn bad_lines(log: &str) -> Vec<String> {
    let mut overlooked = false;
    let mut bad = Vec::new();
    for line in log.lines() {
        // A memory cgroup that is full is reported as a kernel in trouble is; a full machine says so behind the report.
        if HARMLESS_REPORTS.iter().any(|sign| line.contains(sign)) || line.contains("invoked oom-killer") {
            overlooked = true;
        }
        if !overlooked && is_bad(line) {
            bad.push(line.trim().to_string());
        }
        if line.contains("---[ end trace") || line.contains("oom-kill:constraint=") {
            overlooked = false;
        }
    }
    bad
}

fn is_bad(line: &str) -> bool {
    if HARMLESS.iter().any(|sign| line.contains(sign)) {
        return false;
    }
    // What Linux says of a program that a fault killed: "traps: NAME[PID] general protection fault ip:… sp:… error:…".
    if line.contains("traps: ") && line.contains(" ip:") && line.contains(" sp:") {
        return false;
    }
    let stall = line.contains("rcu: INFO:") && line.contains("stall") || line.contains("self-detected stall");
    stall || BAD_SIGNS.iter().any(|sign| line.contains(sign))
}

/// Returns all that is wrong with a run besides its program's exit status;
/// empty for a clean one.
pub fn problems(outcome: &Outcome) -> Vec<String> {
    let mut problems = Vec::new();
    match outcome.end {
        End::Complete => {}
        End::Panic => problems.push("the guest's kernel panicked".to_string()),
        End::TimedOut => problems.push(format!("the machine was stopped after {} s", outcome.elapsed.as_secs())),
        End::EmulatorStopped => problems.push(format!("the emulator stopped: {}", last_lines(&outcome.emulator, 3))),
    }
    if outcome.end == End::Complete {
        if outcome.status.is_none() {
            problems.push("the program's status did not come back".to_string());
        }
        if let Some(status) = outcome.unload {
            if status != 0 {
                problems.push(format!("the module could not be removed (status {status})"));
            }
        }
        if !outcome.kernel_log.contains("Linux version") {
            problems.push("the kernel's log did not come back whole".to_string());
        }
    }
    let mut lines = bad_lines(&outcome.console);
    lines.extend(bad_lines(&outcome.kernel_log));
    lines.dedup();
    for line in lines.iter().take(20) {
        problems.push(format!("in the kernel's log: {line}"));
    }
    problems
}

/// The last `count` lines of a text, in one line.
pub fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join(" / ")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::bad_lines;
    use super::problems;
    use crate::machine::End;
    use crate::machine::Outcome;

    fn clean() -> Outcome {
        Outcome {
            end: End::Complete,
            token: String::new(),
            status: Some(0),
            unload: Some(0),
            output: String::new(),
            console: String::new(),
            kernel_log: "[    0.000000] Linux version 6.12\n".into(),
            emulator: String::new(),
            times: String::new(),
            elapsed: Duration::from_secs(4),
        }
    }

    #[test]
    fn a_clean_run_has_no_problems() {
        assert_eq!(problems(&clean()), Vec::<String>::new());
    }

    #[test]
    fn each_bad_sign_is_seen() {
        for line in [
            "BUG: kernel NULL pointer dereference, address: 0",
            "WARNING: CPU: 0 PID: 1 at kernel/panic.c:1",
            "Oops: 0000 [#1] PREEMPT SMP",
            "BUG: KASAN: slab-out-of-bounds in dune",
            "WARNING: possible circular locking dependency detected",
            "WARNING: inconsistent lock state",
            "WARNING: suspicious RCU usage",
            "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
            "kmemleak: 3 new suspected memory leaks (see /sys/kernel/debug/kmemleak)",
            "unreferenced object 0xffff888000000000 (size 64):",
            "general protection fault, probably for non-canonical address",
            "Call Trace:",
        ] {
            let mut outcome = clean();
            outcome.console = format!("[    1.0] {line}\n");
            assert_eq!(problems(&outcome).len(), 1, "{line}");
        }
    }

    #[test]
    fn ordinary_lines_are_not_bad() {
        let log = "Linux version 6.12\nkasan: KernelAddressSanitizer initialized\n\
                   rcu: Preemptible hierarchical RCU implementation.\ndune: loaded\n\
                   traps: dune-tests[84] general protection fault ip:55f2d8f4d603 sp:7fff32f06d30 error:402 in x[a7603]\n";
        assert_eq!(bad_lines(log), Vec::<String>::new());
    }

    #[test]
    fn only_the_known_report_of_the_boot_is_overlooked() {
        let log = "WARNING: CPU: 0 PID: 0 at arch/x86/kernel/cpu/topology_common.c:57 parse_legacy+0xb3/0xc0\n\
                   Call Trace:\n---[ end trace 0000000000000000 ]---\nWARNING: CPU: 0 at mm/gup.c:1\n";
        assert_eq!(bad_lines(log), vec!["WARNING: CPU: 0 at mm/gup.c:1"]);
    }

    #[test]
    fn a_full_cgroup_is_no_full_machine() {
        let log = "dune-tests invoked oom-killer: gfp_mask=0xcc0\nCall Trace:\noom-kill:constraint=CONSTRAINT_MEMCG\n\
                   Memory cgroup out of memory: Killed process 1\nOut of memory: Killed process 2\nCall Trace:\n";
        assert_eq!(bad_lines(log), vec!["Out of memory: Killed process 2", "Call Trace:"]);
    }

    #[test]
    fn whatever_did_not_come_back_is_a_problem() {
        for end in [End::Panic, End::TimedOut, End::EmulatorStopped] {
            let outcome = Outcome { end, ..clean() };
            assert_eq!(problems(&outcome).len(), 1, "{end:?}");
        }
        let outcome = Outcome {
            status: None,
            ..clean()
        };
        assert_eq!(problems(&outcome).len(), 1);
        let outcome = Outcome {
            unload: Some(1),
            ..clean()
        };
        assert_eq!(problems(&outcome).len(), 1);
        let outcome = Outcome {
            kernel_log: String::new(),
            ..clean()
        };
        assert_eq!(problems(&outcome).len(), 1);
    }
}
