// SPDX-License-Identifier: MIT OR Apache-2.0
//! `report.html`: a table and a bar chart for each bench, in one file.

use std::fmt::Write;

use anyhow::Result;
use plotters::prelude::*;

use super::results::Results;
use super::results::Row;

const WIDTH: u32 = 760;
const BAR: u32 = 26;
/// Room for the names of the systems.
const NAMES: u32 = 260;

/// The whole page.
pub fn report(results: &Results) -> Result<String> {
    let mut page = String::from(
        "<!doctype html><meta charset=\"utf-8\"><title>Dune in Rust: benchmarks</title>\n<style>\
         body{font:15px/1.4 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}\
         table{border-collapse:collapse;font-size:14px}td,th{padding:.15em .7em;text-align:right;border-bottom:1px solid #ddd}\
         td:nth-child(-n+3),th:nth-child(-n+3),.why{text-align:left}\
         .met{background:#d8f0d8}.missed{background:#f6dcdc}.recorded{color:#777}</style>\n<h1>Dune in Rust: benchmarks</h1>\n",
    );
    let environment = &results.environment;
    writeln!(
        page,
        "<p>{}; {}; kernel {} ({}); {}; {}. Medians of single operations. Instructions of the emulated machine are path \
         length, not latency: a VM entry or a WRMSR counts as one.</p>",
        results.unit,
        environment.cpu_model,
        environment.kernel,
        environment.kernel_arguments,
        environment.rustc,
        environment.gcc
    )?;
    for machine in &results.other_machines {
        writeln!(
            page,
            "<p>Rows of {}: kernel {} ({}).</p>",
            machine.cpu_model, machine.kernel, machine.kernel_arguments
        )?;
    }
    table(&mut page, results)?;
    for column in columns(results) {
        if !column.is_empty() {
            writeln!(page, "<h2>{column}</h2>")?;
        }
        for bench in benches(results) {
            let rows: Vec<&Row> = results
                .rows
                .iter()
                .filter(|row| row.bench == bench && row.column == column)
                .collect();
            if !rows.is_empty() {
                page += &chart(bench, &rows)?;
            }
        }
    }
    Ok(page)
}

fn table(page: &mut String, results: &Results) -> Result<()> {
    *page += "<table><tr><th>bench<th>system<th>unit<th>median<th>mean<th>max<th>n<th>VM exits<th>VM entries<th>VMREAD<th>VMWRITE<th>RDMSR\
              <th>WRMSR<th>VMPTRLD …<th>INVEPT …<th>loads of CR …<th>CLI, STI<th>IPIs<th>target<th>then<th>why it is missed, and what to try next</tr>\n";
    for row in &results.rows {
        let class = match (row.met, row.recorded) {
            (_, true) => "recorded",
            (Some(true), _) => "met",
            (Some(false), _) => "missed",
            (None, _) => "",
        };
        let limit = |most: Option<u64>| most.map_or("–".to_string(), |most| format!("≤ {most}"));
        let number = |value: Option<u64>| value.map_or("–".to_string(), |value| value.to_string());
        let system = if row.column.is_empty() {
            row.system.clone()
        } else {
            format!("{} ({})", row.system, row.column)
        };
        let heavy = |field: fn(&super::results::Heavy) -> u64| number(row.heavy.as_ref().map(field));
        writeln!(
            page,
            "<tr class=\"{class}\"><td>{}<td>{system}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}\
             <td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td class=\"why\">{}</tr>",
            row.bench,
            short(&row.unit),
            row.value,
            row.mean,
            row.max,
            row.n,
            number(row.vm_exits),
            heavy(|heavy| heavy.entry),
            heavy(|heavy| heavy.vmread),
            heavy(|heavy| heavy.vmwrite),
            heavy(|heavy| heavy.rdmsr),
            heavy(|heavy| heavy.wrmsr),
            heavy(|heavy| heavy.vmptrld),
            heavy(|heavy| heavy.invalidation),
            heavy(|heavy| heavy.load),
            heavy(|heavy| heavy.interrupt_flag),
            heavy(|heavy| heavy.ipi),
            limit(row.target),
            limit(row.next_target),
            row.reason.as_deref().unwrap_or("")
        )?;
    }
    *page += "</table>\n";
    Ok(())
}

/// In the order in which they were measured.
fn benches(results: &Results) -> Vec<&str> {
    distinct(results.rows.iter().map(|row| row.bench.as_str()))
}

fn columns(results: &Results) -> Vec<&str> {
    distinct(results.rows.iter().map(|row| row.column.as_str()))
}

/// Each name once, where it came first.
pub fn distinct<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut seen = Vec::new();
    for name in names {
        if !seen.contains(&name) {
            seen.push(name);
        }
    }
    seen
}

/// A unit without its explanation.
fn short(unit: &str) -> &str {
    unit.split(" (").next().unwrap_or(unit)
}

/// Horizontal bars, one a system, on a linear scale from 0.
fn chart(bench: &str, rows: &[&Row]) -> Result<String> {
    let unit = rows.first().map_or("", |row| short(&row.unit));
    let height = 40 + BAR * rows.len() as u32;
    let most = rows.iter().map(|row| row.value).max().unwrap_or(1).max(1);
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        let bar_room = f64::from(WIDTH - NAMES - 110);
        area.draw(&Text::new(format!("{bench} ({unit})"), (4, 6), ("sans-serif", 18)))?;
        for (index, row) in rows.iter().enumerate() {
            let top = 34 + (BAR * index as u32) as i32;
            let end = NAMES as i32 + (row.value as f64 / most as f64 * bar_room).max(1.0) as i32;
            let color = match (row.met, row.recorded) {
                (_, true) => RGBColor(190, 190, 190),
                (Some(true), _) => RGBColor(70, 150, 70),
                (Some(false), _) => RGBColor(200, 90, 80),
                (None, _) => RGBColor(90, 120, 180),
            };
            area.draw(&Text::new(row.system.clone(), (4, top + 3), ("sans-serif", 14)))?;
            area.draw(&Rectangle::new(
                [(NAMES as i32, top), (end, top + BAR as i32 - 6)],
                color.filled(),
            ))?;
            area.draw(&Text::new(
                row.value.to_string(),
                (end + 6, top + 3),
                ("sans-serif", 14),
            ))?;
        }
        area.present()?;
    }
    Ok(svg + "\n")
}
