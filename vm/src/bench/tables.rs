// SPDX-License-Identifier: MIT OR Apache-2.0
//! The tables of figures in the documents, filled from `results.json`.
//!
//! A comment `<!-- figures … -->` holds a table's lines, with `{BENCH SYSTEM}` for a figure, `{BENCH SYSTEM CPU-MODEL}` for one
//! of another machine, `{exits BENCH}` for Dune's exits of one operation, and a line `{rows}` for a line of each bench. What
//! these become stands below it, up to `<!-- end of figures -->`.

use anyhow::bail;
use anyhow::Context;
use anyhow::Result;

use super::chart::distinct;
use super::results::Results;
use super::results::Row;
use super::targets::ORIGINAL;

const START: &str = "<!-- figures\n";
const TEMPLATE_END: &str = "-->\n";
const END: &str = "<!-- end of figures -->\n";

/// The document with its tables filled anew.
pub fn fill(document: &str, results: &Results) -> Result<String> {
    let mut filled = String::new();
    let mut rest = document;
    while let Some((before, table)) = rest.split_once(START) {
        let (template, old) = table.split_once(TEMPLATE_END).context("a template has no end")?;
        let (_, after) = old.split_once(END).context("a table has no end")?;
        let new = table_of(template, results)?;
        filled += &[before, START, template, TEMPLATE_END, "\n", &new, "\n", END].concat();
        rest = after;
    }
    Ok(filled + rest)
}

fn table_of(template: &str, results: &Results) -> Result<String> {
    let mut table = Vec::new();
    for line in template.lines() {
        if line == "{rows}" {
            let benches = distinct(results.rows.iter().map(|row| row.bench.as_str()));
            table.extend(benches.into_iter().map(|bench| line_of(bench, results)));
        } else {
            table.push(with_figures(line, results)?);
        }
    }
    Ok(table.join("\n") + "\n")
}

/// A line with a figure in place of each `{…}`.
fn with_figures(line: &str, results: &Results) -> Result<String> {
    let mut filled = String::new();
    let mut rest = line;
    while let Some((before, name)) = rest.split_once('{') {
        let (name, after) = name.split_once('}').with_context(|| format!("no }} in {line}"))?;
        filled += before;
        filled += &figure(name, results)?;
        rest = after;
    }
    Ok(filled + rest)
}

fn figure(name: &str, results: &Results) -> Result<String> {
    let (bench, system) = name.split_once(' ').with_context(|| format!("no system in {name}"))?;
    let found = if bench == "exits" {
        results.find(system, "dune").and_then(|row| row.vm_exits)
    } else {
        let (system, column) = match system.rsplit_once(' ') {
            Some((system, model)) if results.other_machines.iter().any(|it| it.cpu_model == model) => (system, model),
            _ => (system, ""),
        };
        value(results, bench, system, column)
    };
    match found {
        Some(value) => Ok(grouped(value)),
        None => bail!("the results have no {name}"),
    }
}

fn value(results: &Results, bench: &str, system: &str, column: &str) -> Option<u64> {
    let is_it = |row: &&Row| (row.bench.as_str(), row.system.as_str(), row.column.as_str()) == (bench, system, column);
    results.rows.iter().find(is_it).map(|row| row.value)
}

/// Bench, Linux, other ways, KVM, original, Dune, borrowed VMX, heavy, target, second machine's Linux and Dune.
fn line_of(bench: &str, results: &Results) -> String {
    const COLUMNS: [&str; 5] = ["linux", "kvm", ORIGINAL, "dune", "dune-borrow"];
    let second = results.other_machines.first().map(|it| it.cpu_model.as_str());
    let cell = |system: &str, column: &str| value(results, bench, system, column).map_or(String::new(), grouped);
    let there = |system: &str| second.map_or(String::new(), |model| cell(system, model));
    let rows = || {
        results
            .rows
            .iter()
            .filter(|row| row.bench == bench && row.column.is_empty())
    };
    let others: Vec<String> = rows()
        .filter(|row| !COLUMNS.contains(&row.system.as_str()))
        .map(|row| format!("{} {}", row.system, grouped(row.value)))
        .collect();
    let dune = results.find(bench, "dune");
    let heavy = dune.and_then(|row| Some((row.vm_exits?, row.heavy?)));
    let heavy = heavy.map_or(String::new(), |(exits, heavy)| {
        format!(
            "{}; {}/{}; {}/{}",
            grouped(exits),
            grouped(heavy.vmread),
            grouped(heavy.vmwrite),
            grouped(heavy.rdmsr),
            grouped(heavy.wrmsr)
        )
    });
    let target = dune.and_then(|row| Some((row.target?, row.met)));
    let target = target.map_or(String::new(), |(most, met)| {
        let word = match met {
            Some(true) => "met",
            Some(false) => "**missed**",
            None => "not counted",
        };
        format!("≤ {} {word}", grouped(most))
    });
    let unit = rows().next().map_or("", |row| row.unit.as_str());
    let name = if unit == results.unit {
        bench.to_string()
    } else {
        format!("{bench} ({unit})")
    };
    let cells = [
        name,
        cell("linux", ""),
        others.join(", "),
        cell("kvm", ""),
        cell(ORIGINAL, ""),
        cell("dune", ""),
        cell("dune-borrow", ""),
        heavy,
        target,
        there("linux"),
        there("dune"),
    ];
    format!("| {} |", cells.join(" | "))
}

/// With a comma between thousands.
fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCUMENT: &str =
        "a\n<!-- figures\n| What | Dune |\n|---|---|\n| call | {getpid dune}, {exits getpid} exit |\n-->\n\n\
                            old\n\n<!-- end of figures -->\nb\n<!-- figures\n{rows}\n-->\n<!-- end of figures -->\n";

    fn results() -> Results {
        let environment = serde_json::json!({
            "kernel": "", "kernel_arguments": "", "cpu_model": "", "rustc": "", "gcc": "",
        });
        let mut results = Results::new(serde_json::from_value(environment).unwrap());
        for (bench, system, value) in [
            ("getpid", "linux", 223),
            ("getpid", "dune", 1904),
            ("getpid", "tracer", 9),
        ] {
            let line = serde_json::json!({
                "bench": bench, "system": system, "value": value, "mean": 0, "max": 0, "n": 1, "vm_exits": 1, "heavy": null,
            });
            results.push(serde_json::from_value(line).unwrap(), "");
        }
        results
    }

    #[test]
    fn tables_are_filled() {
        let filled = fill(DOCUMENT, &results()).unwrap();
        assert!(
            filled.contains("-->\n\n| What | Dune |\n|---|---|\n| call | 1,904, 1 exit |\n\n<!-- end"),
            "{filled}"
        );
        assert!(
            filled.contains("| getpid | 223 | tracer 9 |  |  | 1,904 |  |  |  |  |  |"),
            "{filled}"
        );
        assert!(!filled.contains("old"));
    }

    #[test]
    fn filling_again_changes_nothing() {
        let filled = fill(DOCUMENT, &results()).unwrap();
        assert_eq!(fill(&filled, &results()).unwrap(), filled);
        assert_eq!(fill("no table\n", &results()).unwrap(), "no table\n");
    }

    #[test]
    fn what_was_not_measured_is_told() {
        let document = "<!-- figures\n{trap dune}\n-->\n<!-- end of figures -->\n";
        let error = fill(document, &results()).unwrap_err();
        assert!(error.to_string().contains("trap dune"), "{error}");
    }
}
