// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the figures are to be, and what was recorded of the original Dune.
//!
//! All that is a time is in instructions of the emulated machine; on a real CPU no time is judged.

use super::results::Row;

/// bench, the most it may be in Dune mode.
const TARGETS: &[(&str, u64)] = &[
    ("bare_exit", 180),
    ("getpid", 700),
    ("page_fault", 3_200),
    ("ept_violation", 500),
    ("mmap_munmap_64m", 15_000),
    ("trap", 51),
    ("trap_fix", 140),
    ("appel1", 20_000),
    ("appel2", 13_000),
    ("intercept", 60),
    ("intercept_cpl3", 100),
    ("ptrace_getpid", 800),
    ("thread", 70_000),
    ("fork", 300_000),
    ("process", 480_000),
    ("memory_process", 512 << 10),
    ("memory_left", 64),
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
        row.target = TARGETS
            .iter()
            .find(|(bench, _)| *bench == row.bench)
            .map(|(_, most)| *most);
        row.met = row.target.map(|most| row.value <= most);
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
            max: *value,
            n: 0,
            vm_exits: None,
            heavy: None,
            column: String::new(),
            target: None,
            met: None,
            recorded: true,
            unit,
        });
    }
}

/// Of a real CPU, for which no figures are known.
fn is_real_time(row: &Row) -> bool {
    row.unit == "TSC cycles"
}
