// SPDX-License-Identifier: MIT OR Apache-2.0
//! Two runs beside each other.

use super::results::Results;
use super::results::Row;

/// Below so many a figure must be the same to the digit.
const EXACT_BELOW: u64 = 10_000;
/// What a row's least and its median may grow on the same kernel and compilers: the machine is repeatable.
const PERCENT: f64 = 3.0;

/// Rows of time that may grow more, and why.
struct Exception {
    rows: &'static [&'static str],
    percent: f64,
    /// Printed where a row makes use of it.
    why: &'static str,
}

const BY_LAYOUT: Exception = Exception {
    rows: &["thread", "thread_std", "mmap_munmap_64m"],
    percent: 15.0,
    why: "whether what is mapped needs page tables of its own goes by the layout of the program, natively, too (seen: 4 to 12 %)",
};

/// Rows in which tasks take turns: each turn loads a vCPU anew, and how many there are is a matter of the clock, too. So much
/// may their heavy operations grow, in percent; one INVEPT more is always fine (seen: 5 and 6 in two places of the same tree).
const IN_TURNS: (&[&str], f64) = (
    &[
        "fork",
        "fork_dynamic",
        "thread",
        "thread_std",
        "process",
        "enter",
        "leave",
    ],
    15.0,
);

const INVALIDATION: &str = "INVEPT, INVVPID";

/// What each interrupt of the clock adds to a kind of heavy operations at most.
const TICK_HEAVY: u64 = 12;
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
            } else if is_same && growth > PERCENT && before.unit != "bytes" {
                println!(
                    "{} ({}): {} +{growth:.1} %, which may be: {}",
                    after.bench, after.system, figure.name, BY_LAYOUT.why
                );
            }
        }
    }
    for (before, after) in pairs(old, new).filter(|(_, row)| is_same && is_judged(row)) {
        for what in heavier(before, after) {
            worse += 1;
            println!("not ok {} ({}): {what}", after.bench, after.system);
        }
    }
    if !is_same {
        println!("not the baseline's kernel and compilers: the ratios to Linux' own figures were compared");
    }
    if worse > 0 || !is_same {
        println!(
            "bench/baseline.json is refreshed by: target/release/dune-vm bench --quick && \
             cp target/bench/results-quick.json bench/baseline.json"
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
    if before.unit == "bytes" {
        vec![figure("memory", before.value, after.value, BYTES_PERCENT)]
    } else if old.environment == new.environment {
        let limit = if BY_LAYOUT.rows.contains(&before.bench.as_str()) {
            BY_LAYOUT.percent
        } else {
            PERCENT
        };
        vec![
            figure("least", before.min, after.min, limit),
            figure("median", before.value, after.value, limit),
        ]
    } else {
        let linux = [before.bench.as_str(), LINUX_ANYWAY].into_iter().find_map(|bench| {
            let figure = |results: &Results| Some(results.find(bench, "linux")?.value.max(1) as f64);
            Some((figure(old)?, figure(new)?))
        });
        let (old_linux, new_linux) = linux.unwrap_or((1.0, 1.0));
        let mut ratio = figure("median", before.value, after.value, RATIO_PERCENT);
        // As if Linux had not changed.
        ratio.after *= old_linux / new_linux;
        vec![ratio]
    }
}

fn interrupts_more(before: Option<u64>, after: Option<u64>) -> u64 {
    after.unwrap_or(0).saturating_sub(before.unwrap_or(0))
}

/// What of a row's exits and heavy operations grew; on the same kernel and compilers. A kind of which there are many, for
/// each page of many, say, may grow as time may.
fn heavier(before: &Row, after: &Row) -> Vec<String> {
    let Some(old) = before.heavy else { return Vec::new() };
    let Some(new) = after.heavy else {
        return vec!["its heavy operations were not counted; the baseline has them".to_string()];
    };
    let more = interrupts_more(before.counted_interrupts, after.counted_interrupts);
    let (rows, of_turns) = IN_TURNS;
    let is_in_turns = rows.contains(&after.bench.as_str());
    let may_grow = |name: &str, old: u64| {
        if is_in_turns {
            ((old as f64 * of_turns / 100.0) as u64).max(u64::from(name == INVALIDATION))
        } else {
            (old as f64 * PERCENT / 100.0) as u64
        }
    };
    let exits = |row: &Row| {
        row.vm_exits
            .unwrap_or(0)
            .saturating_sub(row.counted_interrupts.unwrap_or(0))
    };
    let mut kinds = vec![("VM exits that no interrupt made", exits(before), exits(after))];
    let pairs = old.kinds().into_iter().zip(new.kinds());
    kinds.extend(pairs.map(|((name, old), (_, new))| (name, old, new)));
    kinds
        .into_iter()
        .filter(|(name, old, new)| *new > old + may_grow(name, *old) + more * TICK_HEAVY)
        .map(|(name, old, new)| format!("{name}: {new} where the baseline has {old}"))
        .collect()
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
            kernel_rustc: String::new(),
            gcc: String::new(),
        });
        for (bench, system, value) in figures {
            let line = format!(
                r#"{{"bench":"{bench}","system":"{system}","value":{value},"mean":1,"min":{value},"max":1,"n":1000,"vm_exits":null,"heavy":null}}"#
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
    fn the_least_is_judged_too() {
        let with = |least, median| one("invalidate_1", median, |row| row.min = least);
        let old = with(4000, 4100);
        assert!(against_baseline(&old, &with(4120, 4200)));
        assert!(!against_baseline(&old, &with(4121, 4200)));
        assert!(!against_baseline(&old, &with(4000, 4300)));
    }

    #[test]
    fn long_rows_are_no_exception() {
        let old = results("a", &[("unmap_1000", "dune", 20_000)]);
        let with = |value| results("a", &[("unmap_1000", "dune", value)]);
        assert!(against_baseline(&old, &with(20_600)));
        assert!(!against_baseline(&old, &with(20_601)));
    }

    #[test]
    fn page_tables_of_a_thread_go_by_the_layout() {
        let old = results("a", &[("thread", "dune", 60_000)]);
        let with = |value| results("a", &[("thread", "dune", value)]);
        assert!(against_baseline(&old, &with(69_000)));
        assert!(!against_baseline(&old, &with(69_100)));
    }

    #[test]
    fn heavy_operations_may_not_grow() {
        let with = |exits, kind: &str, n: u64, interrupts| {
            one("getpid", 900, |row| {
                let mut heavy =
                    serde_json::json!({"vmread": 3, "vmwrite": 2, "rdmsr": 0, "wrmsr": 2, "load": 1, "entry": 1});
                heavy[kind] = n.into();
                row.heavy = Some(serde_json::from_value(heavy).unwrap());
                (row.vm_exits, row.counted_interrupts) = (Some(exits), Some(interrupts));
            })
        };
        let old = with(1, "vmread", 3, 0);
        assert!(against_baseline(&old, &old));
        for kind in [
            "vmread",
            "vmwrite",
            "vmptrld",
            "invalidation",
            "rdmsr",
            "wrmsr",
            "load",
            "interrupt_flag",
            "ipi",
            "entry",
        ] {
            assert!(!against_baseline(&old, &with(1, kind, 4, 0)), "more {kind}");
        }
        assert!(!against_baseline(&old, &with(2, "vmread", 3, 0)), "one exit more");
        assert!(against_baseline(&old, &with(2, "vmread", 10, 1)), "an interrupt's");
        let uncounted = one("getpid", 900, |_| ());
        assert!(!against_baseline(&old, &uncounted));
        assert!(against_baseline(&uncounted, &old), "nothing to compare with");
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
