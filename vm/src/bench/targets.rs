// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the figures are to be, and what was recorded of the original Dune.
//!
//! All that is a time is in instructions of the emulated machine; on a real CPU no time is judged.

use super::results::Heavy;
use super::results::Row;

/// What a figure of Dune mode is to be.
struct Target {
    bench: &'static str,
    /// The most that it may be, and what it is to be after that.
    most: u64,
    then: Option<u64>,
    /// The most heavy operations, where those were named.
    heavy: Option<Heavy>,
    /// Why it is more, and what to try next.
    if_missed: &'static str,
}

const fn target(bench: &'static str, most: u64, then: Option<u64>, if_missed: &'static str) -> Target {
    Target {
        bench,
        most,
        then,
        heavy: None,
        if_missed,
    }
}

const NONE: Heavy = Heavy {
    vmread: 0,
    vmwrite: 0,
    vmptrld: 0,
    invalidation: 0,
    rdmsr: 0,
    wrmsr: 0,
    load: 0,
    interrupt_flag: 0,
    ipi: 0,
    entry: 0,
};

const TARGETS: &[Target] = &[
    Target {
        heavy: Some(Heavy {
            vmread: 4,
            vmwrite: 3,
            rdmsr: 1,
            wrmsr: 1,
            ..NONE
        }),
        ..target("bare_exit", 180, Some(120), "")
    },
    Target {
        heavy: Some(Heavy {
            vmread: 4,
            vmwrite: 3,
            rdmsr: 0,
            wrmsr: 2,
            ..NONE
        }),
        ..target(
            "getpid",
            700,
            Some(450),
            "two system calls of Linux' own alone are 464, registers and their clearing 83. Next: enter again from the \
             user-return notifier, without a second system call, some 250 less",
        )
    },
    target(
        "page_fault",
        3_200,
        Some(2_611),
        "Linux' fault is 2,417 of it. Next: its fault handling within the exit",
    ),
    target(
        "ept_violation",
        500,
        Some(300),
        "of 625 about 210 are the 15 neighbours that come along, so that pages in turn cost 52 each. Next: neighbours that are all \
         alike in 9 instructions each, not 14; the lock without the preemption count",
    ),
    target("mmap_munmap_64m", 15_000, Some(12_500), ""),
    target("trap", 51, Some(40), ""),
    target("trap_fix", 140, Some(110), ""),
    target(
        "appel1",
        20_000,
        Some(11_840),
        "met where no interrupt of the clock falls into the loop, each of which is some 1,040. Next: a trap that pushes onto the \
         handler's stack at once (IST1 moved while a handler runs)",
    ),
    target(
        "appel2",
        13_000,
        Some(7_665),
        "130 for each page with its share of the loops, of which the trap is 131 by itself. Next: as appel1",
    ),
    target("intercept", 60, None, ""),
    target(
        "intercept_cpl3",
        100,
        Some(60),
        "some 105 are registers, segment bases and FPU control in and out, each once; 40 the deadline, the reason and the \
         caller's loop. Next: a way in for a context that has not changed, which loads only what the kernel side changed",
    ),
    target(
        "ptrace_getpid",
        800,
        Some(550),
        "the forwarded call is 902 of it. Next: as getpid",
    ),
    target(
        "thread",
        70_000,
        Some(45_000),
        "Linux' own is 51,000 on this kernel, 25,446 where the target was set. Next: vCPUs and mapped run pages that are kept \
         for the next thread, some 17,000 less",
    ),
    target(
        "fork",
        300_000,
        Some(220_000),
        "Linux' own is 196,000 on this kernel, 134,027 where the target was set. Of the rest most is Linux copying and removing \
         more mappings, and waiting for early timers. Next: guard pages that only the guest's page table has",
    ),
    target(
        "process",
        480_000,
        Some(400_000),
        "Linux' own is 893,000 on this kernel, of a small program that is linked dynamically, 332,525 where the target was set. \
         Dune's share is 570,000: entering for the first time, and an end in Dune mode. Next: as fork",
    ),
    target("memory_process", 512 << 10, Some(256 << 10), ""),
    target("memory_left", 64, None, ""),
];

/// The original C Dune, ported to Linux 6.12, measured once in this emulator with kernel `bench`: bench, instructions.
const RECORDED: &[(&str, u64)] = &[
    ("bare_exit", 197),
    ("getpid", 303),
    ("page_fault", 4_102),
    ("ept_violation", 871),
    ("mmap_munmap_64m", 1_321_219),
    ("trap", 51),
    ("trap_fix", 140),
    ("appel1", 23_680),
    ("appel2", 15_331),
    ("intercept_cpl3", 100),
    ("ptrace_getpid", 404),
    ("thread", 187_865),
    ("fork", 53_449_250),
    ("process", 1_091_676),
    ("memory_process", 141_000_000),
    ("memory_left", 5_000),
];

pub const ORIGINAL: &str = "original C Dune (recorded)";

/// Sets `target` and `met`, and adds the recorded rows, where the unit is that of the figures.
pub fn judge(rows: &mut Vec<Row>) {
    for row in rows
        .iter_mut()
        .filter(|row| row.system == "dune" && row.column.is_empty() && !is_real_time(row))
    {
        let Some(target) = TARGETS.iter().find(|target| target.bench == row.bench) else {
            continue;
        };
        let is_light = match (row.heavy, target.heavy) {
            (Some(heavy), Some(most)) => heavy.is_within(&most),
            // Not counted in this run, or nothing asked.
            _ => true,
        };
        let met = row.value <= target.most && is_light;
        row.target = Some(target.most);
        row.next_target = target.then;
        row.met = Some(met);
        row.reason = (!met).then(|| target.if_missed.to_string());
    }
    for (bench, value) in RECORDED {
        let measured = rows.iter().find(|row| row.bench == *bench && !is_real_time(row));
        let Some(unit) = measured.map(|row| row.unit.clone()) else {
            continue;
        };
        rows.push(Row {
            bench: bench.to_string(),
            system: ORIGINAL.to_string(),
            value: *value,
            mean: *value,
            min: *value,
            max: *value,
            n: 0,
            vm_exits: None,
            interrupts: None,
            heavy: None,
            column: String::new(),
            target: None,
            next_target: None,
            met: None,
            reason: None,
            recorded: true,
            unit,
        });
    }
}

/// Of a real CPU, for which no figures are known.
fn is_real_time(row: &Row) -> bool {
    row.unit == "TSC cycles"
}

#[cfg(test)]
mod tests {
    use dune_abi::HEAVY_KINDS;
    use dune_abi::HEAVY_RDMSR;
    use dune_abi::HEAVY_VMREAD;
    use dune_abi::HEAVY_VMWRITE;
    use dune_abi::HEAVY_WRMSR;

    use super::super::results::Line;
    use super::super::results::Results;
    use super::*;

    fn judged(bench: &str, value: u64, heavy: Option<[u64; HEAVY_KINDS]>) -> Row {
        let environment = serde_json::from_value(serde_json::json!({
            "kernel": "", "kernel_arguments": "", "cpu_model": "", "rustc": "", "gcc": "",
        }));
        let mut results = Results::new(environment.unwrap());
        let line: Line = serde_json::from_value(serde_json::json!({
            "bench": bench, "system": "dune", "value": value, "mean": value, "max": value, "n": 1, "heavy": heavy,
        }))
        .unwrap();
        results.push(line, "");
        judge(&mut results.rows);
        results.rows.swap_remove(0)
    }

    #[test]
    fn missed_rows_say_why() {
        let missed = judged("getpid", 701, None);
        assert_eq!(
            (missed.met, missed.target, missed.next_target),
            (Some(false), Some(700), Some(450))
        );
        assert!(missed.reason.unwrap().contains("Next: "));
        let met = judged("getpid", 700, None);
        assert_eq!((met.met, met.reason), (Some(true), None));
    }

    #[test]
    fn heavy_operations_count_too() {
        let heavy = |rdmsr| {
            let mut counted = [0; HEAVY_KINDS];
            for (kind, n) in [
                (HEAVY_VMREAD, 4),
                (HEAVY_VMWRITE, 3),
                (HEAVY_RDMSR, rdmsr),
                (HEAVY_WRMSR, 2),
            ] {
                counted[kind] = n;
            }
            counted
        };
        assert_eq!(judged("getpid", 1, Some(heavy(0))).met, Some(true));
        assert_eq!(judged("getpid", 1, Some(heavy(1))).met, Some(false));
    }
}
