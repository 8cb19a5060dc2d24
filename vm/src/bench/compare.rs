// SPDX-License-Identifier: MIT OR Apache-2.0
//! Two runs beside each other.

use super::results::Results;
use super::results::Row;

/// Below so many a figure must be the same to the digit.
const EXACT_BELOW: u64 = 10_000;
/// What the least of a row may grow on the same kernel and compilers, and what its median. Linux' allocator has two ways that
/// take turns (invalidate_1: 2,622 and 3,159 instructions natively, about as often), and a median between them is either.
const LEAST_PERCENT: f64 = 3.0;
const MEDIAN_PERCENT: f64 = 15.0;
/// Instructions of an interrupt of the clock that comes while a guest runs, and from which value on one may come in the
/// median: 10,000 instructions are 0.2 ms of the emulated machine, its tick 4 ms, a measured loop is often in step with it.
const TICK_COSTS: u64 = 1500;
const TICK_MATTERS_FROM: u64 = 10_000;
/// What is so long that the clock's interrupts come in each, and how many is a matter of their phase, which a path in the
/// binary changes: the row, and what it may grow (docs/performance.md, "What a fork costs").
const CLOCK_IN_EACH: (&str, f64) = ("fork", 15.0);
/// What memory may grow: a process' part of pages that others map too, and its page tables, go with the layout (seen:
/// 160 to 233 KB a process).
const BYTES_PERCENT: f64 = 50.0;
/// What the ratio to Linux' own figure of the same run may grow elsewhere.
const RATIO_PERCENT: f64 = 15.0;

fn pairs<'a>(old: &'a Results, new: &'a Results) -> impl Iterator<Item = (&'a Row, &'a Row)> {
    new.rows.iter().filter(|row| !row.recorded).filter_map(|row| {
        let same =
            |other: &&Row| (&other.bench, &other.system, &other.column) == (&row.bench, &row.system, &row.column);
        Some((old.rows.iter().find(same)?, row))
    })
}

/// Prints the ratios of two runs. How many figures differ, or are in one of them only.
pub fn compare(old: &Results, new: &Results) -> usize {
    println!(
        "{:<24} {:<24} {:<20} {:>12} {:>12} {:>8}",
        "bench", "system", "machine", "old", "new", "new/old"
    );
    let measured = |results: &Results| results.rows.iter().filter(|row| !row.recorded).count();
    let both = pairs(old, new).count();
    let mut differing = measured(old) + measured(new) - 2 * both;
    for (before, after) in pairs(old, new) {
        let ratio = after.value as f64 / before.value.max(1) as f64;
        let changed = if before.value < EXACT_BELOW {
            before.value != after.value
        } else {
            (ratio - 1.0).abs() > 0.01
        };
        differing += usize::from(changed);
        println!(
            "{:<24} {:<24} {:<20} {:>12} {:>12} {:>8.3}{}",
            after.bench,
            after.system,
            after.column,
            before.value,
            after.value,
            ratio,
            if changed { " *" } else { "" }
        );
    }
    if old.environment != new.environment {
        println!(
            "not made with the same: {:?} and {:?}",
            old.environment, new.environment
        );
    }
    differing
}

/// What stands for Linux where a row has none of its own.
const LINUX_ANYWAY: &str = "getpid";

/// Says which of Dune's figures grew, or are gone; whether none did.
pub fn against_baseline(old: &Results, new: &Results) -> bool {
    let is_same = old.environment == new.environment;
    let is_judged = |row: &Row| row.system.starts_with("dune");
    let mut worse = 0;
    // Elsewhere there may be no KVM.
    for gone in old.rows.iter().filter(|row| is_same && is_judged(row)) {
        let is_it = |row: &Row| (&row.bench, &row.system, &row.column) == (&gone.bench, &gone.system, &gone.column);
        if !new.rows.iter().any(is_it) {
            worse += 1;
            println!(
                "not ok {} ({}): not measured; the baseline has it",
                gone.bench, gone.system
            );
        }
    }
    for (before, after) in pairs(old, new).filter(|(_, row)| is_judged(row)) {
        for figure in figures(old, new, before, after) {
            let growth = percent(figure.before, figure.after);
            // Rounding is no growth.
            if growth > figure.limit + 1e-6 {
                worse += 1;
                println!(
                    "not ok {} ({}): {} {:.0} where the baseline has {:.0}: +{growth:.1} %, limit {:.1} %",
                    after.bench, after.system, figure.name, figure.after, figure.before, figure.limit
                );
            }
        }
    }
    if !is_same {
        println!("not the baseline's kernel and compilers: the ratios to Linux' own figures were compared");
    }
    if worse > 0 || !is_same {
        println!(
            "bench/baseline.json is refreshed by: target/release/dune-vm bench --quick && \
             cp target/bench/results.json bench/baseline.json"
        );
    }
    worse == 0
}

/// One of a row's figures beside the baseline's, and what it may grow in percent.
struct Figure {
    name: &'static str,
    before: f64,
    after: f64,
    limit: f64,
}

/// What is judged of a row.
fn figures(old: &Results, new: &Results, before: &Row, after: &Row) -> Vec<Figure> {
    let figure = |name, before: u64, after: u64, limit| Figure {
        name,
        before: before as f64,
        after: after as f64,
        limit,
    };
    let more = interrupts_percent(before, after);
    if before.unit == "bytes" {
        vec![figure("memory", before.value, after.value, BYTES_PERCENT)]
    } else if old.environment == new.environment {
        let (row, percent) = CLOCK_IN_EACH;
        let [least, median] = if before.bench == row {
            [percent; 2]
        } else {
            [LEAST_PERCENT, MEDIAN_PERCENT].map(|percent| percent + more)
        };
        vec![
            figure("least", before.min, after.min, least),
            figure("median", before.value, after.value, median),
        ]
    } else {
        let linux = [before.bench.as_str(), LINUX_ANYWAY].into_iter().find_map(|bench| {
            let figure = |results: &Results| Some(results.find(bench, "linux")?.value.max(1) as f64);
            Some((figure(old)?, figure(new)?))
        });
        let (old_linux, new_linux) = linux.unwrap_or((1.0, 1.0));
        let mut ratio = figure("median", before.value, after.value, RATIO_PERCENT + more);
        // As if Linux had not changed.
        ratio.after *= old_linux / new_linux;
        vec![ratio]
    }
}

/// What interrupts add, in percent: those that came more often than in the baseline's run, and one that is told of nowhere
/// where an operation takes a good part of a tick. The emulated machine's timer is early at times, is set again for the
/// rest, and is early again: some thousand instructions apart, for as long as a row takes.
fn interrupts_percent(before: &Row, after: &Row) -> f64 {
    let more = match (before.interrupts, after.interrupts) {
        (Some(before), Some(after)) => after.saturating_sub(before),
        _ => 0,
    };
    let more = more.max(u64::from(before.value >= TICK_MATTERS_FROM));
    percent(
        before.value.max(1) as f64,
        (before.value.max(1) + more * TICK_COSTS) as f64,
    )
}

fn percent(old: f64, new: f64) -> f64 {
    (new / old - 1.0) * 100.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::results::Environment;

    fn results(kernel: &str, figures: &[(&str, &str, u64)]) -> Results {
        let mut results = Results::new(Environment {
            kernel: kernel.to_string(),
            kernel_arguments: String::new(),
            cpu_model: String::new(),
            rustc: String::new(),
            gcc: String::new(),
        });
        for (bench, system, value) in figures {
            let line = format!(
                r#"{{"bench":"{bench}","system":"{system}","value":{value},"mean":1,"min":{value},"max":1,"n":1,"vm_exits":null,"heavy":null}}"#
            );
            results.push(serde_json::from_str(&line).unwrap(), "");
        }
        results
    }

    /// One row of Dune's, changed.
    fn one(bench: &str, value: u64, change: impl FnOnce(&mut Row)) -> Results {
        let mut results = results("a", &[(bench, "dune", value)]);
        change(&mut results.rows[0]);
        results
    }

    #[test]
    fn three_percent_on_the_same_kernel() {
        let old = results("a", &[("getpid", "linux", 200), ("getpid", "dune", 1000)]);
        let with = |value| results("a", &[("getpid", "linux", 999), ("getpid", "dune", value)]);
        assert!(against_baseline(&old, &with(1030)));
        assert!(!against_baseline(&old, &with(1031)));
    }

    #[test]
    fn of_two_ways_in_turns_the_least_is_judged() {
        let with = |least, median| one("invalidate_1", median, |row| row.min = least);
        let old = with(4208, 4232);
        assert!(against_baseline(&old, &with(4208, 4790)));
        assert!(!against_baseline(&old, &with(4350, 4350)));
        assert!(!against_baseline(&old, &with(4208, 4900)));
    }

    #[test]
    fn long_rows_may_meet_the_clock() {
        let old = results("a", &[("unmap_1000", "dune", 20_000)]);
        let with = |value| results("a", &[("unmap_1000", "dune", value)]);
        assert!(against_baseline(&old, &with(22_000)));
        assert!(!against_baseline(&old, &with(22_200)));
    }

    #[test]
    fn a_fork_meets_the_clock_more_or_less_often() {
        let old = results("a", &[("fork", "dune", 870_000)]);
        let with = |value| results("a", &[("fork", "dune", value)]);
        assert!(against_baseline(&old, &with(945_000)));
        assert!(!against_baseline(&old, &with(1_010_000)));
    }

    #[test]
    fn interrupts_are_no_growth() {
        let with = |value, exits, interrupts| {
            one("scan", value, |row| {
                (row.vm_exits, row.interrupts) = (Some(exits), Some(interrupts));
            })
        };
        let old = with(4000, 0, 0);
        assert!(against_baseline(&old, &with(6100, 2, 2)));
        assert!(!against_baseline(&old, &with(7200, 2, 2)));
        assert!(!against_baseline(&old, &with(6100, 2, 0)));
    }

    #[test]
    fn ratios_elsewhere() {
        let old = results("a", &[("getpid", "linux", 200), ("getpid", "dune", 1000)]);
        let with = |linux, dune| results("b", &[("getpid", "linux", linux), ("getpid", "dune", dune)]);
        assert!(against_baseline(&old, &with(400, 2200)));
        assert!(!against_baseline(&old, &with(200, 1151)));
    }

    #[test]
    fn rows_that_linux_has_not_are_judged_elsewhere_too() {
        let old = results("a", &[("getpid", "linux", 200), ("bare_exit", "dune", 200)]);
        let with = |linux, dune| results("b", &[("getpid", "linux", linux), ("bare_exit", "dune", dune)]);
        assert!(against_baseline(&old, &with(400, 440)));
        assert!(!against_baseline(&old, &with(200, 231)));
    }

    #[test]
    fn rows_do_not_vanish() {
        let old = results("a", &[("getpid", "dune", 1000), ("trap", "dune", 50)]);
        assert!(!against_baseline(&old, &results("a", &[("getpid", "dune", 1000)])));
    }
}
