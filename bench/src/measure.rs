// SPDX-License-Identifier: MIT OR Apache-2.0

//! Ticks, VM exits and heavy operations of one operation, and the rows that they become.
//!
//! Every time is the median over single operations, less the median of measuring nothing; mean, least and maximum stand beside
//! it. What was done in an operation (exits, heavy operations) is the least. Heavy operations are there only where the module was built to count them
//! (`DUNE_COUNT_OPS=y`), which costs ticks: `make bench` runs once with and once without.

use dune_examples::ticks;
use libdune::abi::HEAVY_KINDS;
use libdune::Dune;
use serde::Serialize;

use crate::counting;
use crate::counting::Done;
use crate::counting::NOTHING;

/// Starts the lines that `dune-vm bench` collects.
pub const MARK: &str = "@bench ";

/// One figure of the report.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub bench: &'static str,
    pub system: String,
    /// Of what `value` counts; `None`: ticks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unit: Option<&'static str>,
    /// Of one operation: the median.
    pub value: u64,
    pub mean: u64,
    pub min: u64,
    pub max: u64,
    pub n: usize,
    /// VM exits of one operation, where a vCPU says it.
    pub vm_exits: Option<u64>,
    /// How many of them were interrupts, which the operation did not make.
    pub interrupts: Option<u64>,
    /// Operations that cost hundreds of cycles on a CPU and one instruction in the emulator, by `HEAVY_*`.
    pub heavy: Option<[u64; HEAVY_KINDS]>,
}

/// Which rows are measured.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Only those whose name holds this.
    pub only: Option<String>,
    /// Only those of these names; none: all.
    pub rows: Vec<String>,
    /// None that takes many seconds.
    pub quick: bool,
}

impl Selection {
    fn takes(&self, bench: &str) -> bool {
        (self.rows.is_empty() || self.rows.iter().any(|row| row == bench))
            && self.only.as_deref().is_none_or(|only| bench.contains(only))
    }
}

/// One system under measurement.
pub struct System<'d> {
    pub name: &'static str,
    pub dune: Option<&'d Dune>,
    pub selection: Selection,
    /// Whether heavy operations are counted, and figures of time none.
    pub is_counting: bool,
}

/// How often an operation that can be repeated is done before it counts.
const WARM_UP: usize = 16;

/// How often it is done at most where heavy operations are counted.
const COUNTED: usize = 2000;

impl System<'_> {
    fn is_wanted(&self, bench: &str) -> bool {
        self.selection.takes(bench)
    }

    /// Measures what is the same each time, after a few times that do not count. `action` gives its ticks.
    pub fn repeated(&self, bench: &'static str, count: usize, action: impl FnMut(usize) -> u64) {
        self.repeated_after(bench, count, || (), action);
    }

    /// The same; `before_each` is not measured.
    pub fn repeated_after(
        &self,
        bench: &'static str,
        count: usize,
        before_each: impl FnMut(),
        action: impl FnMut(usize) -> u64,
    ) {
        self.repeated_with(bench, count, before_each, action, || NOTHING);
    }

    /// The same; `others`, which is not measured, tells what others than this thread did, where that is counted.
    pub fn repeated_with(
        &self,
        bench: &'static str,
        count: usize,
        mut before_each: impl FnMut(),
        mut action: impl FnMut(usize) -> u64,
        mut others: impl FnMut() -> Done,
    ) {
        if self.is_wanted(bench) {
            for i in 0..WARM_UP {
                before_each();
                action(i);
                if self.is_counting {
                    others();
                }
            }
            let count = if self.is_counting { count.min(COUNTED) } else { count };
            self.once_with(bench, count, before_each, action, others);
        }
    }

    /// Measures `action` for each of `0..count`; it gives its ticks.
    pub fn once(&self, bench: &'static str, count: usize, action: impl FnMut(usize) -> u64) {
        self.once_after(bench, count, || (), action);
    }

    /// The same; `before_each` is not measured.
    pub fn once_after(
        &self,
        bench: &'static str,
        count: usize,
        before_each: impl FnMut(),
        action: impl FnMut(usize) -> u64,
    ) {
        self.once_with(bench, count, before_each, action, || NOTHING);
    }

    fn once_with(
        &self,
        bench: &'static str,
        count: usize,
        mut before_each: impl FnMut(),
        mut action: impl FnMut(usize) -> u64,
        mut others: impl FnMut() -> Done,
    ) {
        if !self.is_wanted(bench) {
            return;
        }
        let empty = empty();
        let mut ticks = Vec::with_capacity(count);
        let mut done = Vec::with_capacity(count);
        let counted = || self.dune.map_or(NOTHING, |dune| counting::all(&dune.counters()));
        let own = match self.dune {
            Some(dune) if self.is_counting => counting::own_share(dune),
            _ => NOTHING,
        };
        for i in 0..count {
            before_each();
            self.take_counts();
            let before = counted();
            ticks.push(action(i).saturating_sub(empty));
            self.take_counts();
            let own_done = counting::more(&before, &counted());
            let by_others = if self.is_counting { others() } else { NOTHING };
            done.push(counting::sum(&counting::more(&own, &own_done), &by_others));
        }
        let mut row = row(bench, self.name, &mut ticks);
        if self.dune.is_some() || self.is_counting {
            row.set_done(&done, self.is_counting);
        }
        emit(&row);
    }

    /// Where heavy operations are counted: this thread's vCPU takes what was done up to here.
    fn take_counts(&self) {
        if self.is_counting && self.dune.is_some() {
            counting::exit_once();
        }
    }

    /// A way of another kind to do the same, with a name of its own.
    pub fn named(&self, name: &'static str) -> Self {
        Self {
            name,
            dune: self.dune,
            selection: self.selection.clone(),
            is_counting: self.is_counting,
        }
    }

    /// Tells ticks that were measured elsewhere.
    pub fn given(&self, bench: &'static str, ticks: &mut [u64]) {
        if self.is_wanted(bench) {
            emit(&row(bench, self.name, ticks));
        }
    }

    /// The same, with what was done, where that was counted.
    pub fn given_with(&self, bench: &'static str, ticks: &mut [u64], done: &[Done]) {
        if self.is_wanted(bench) {
            let mut row = row(bench, self.name, ticks);
            if !done.is_empty() {
                row.set_done(done, true);
            }
            emit(&row);
        }
    }

    /// Tells something else than ticks, that was found out `n` times.
    pub fn tell(&self, bench: &'static str, unit: &'static str, value: u64, n: usize) {
        if self.is_wanted(bench) {
            let mut row = row(bench, self.name, &mut [value]);
            (row.unit, row.n) = (Some(unit), n);
            emit(&row);
        }
    }

    /// Whether the rest of a family need be done at all.
    pub fn wants(&self, benches: &[&str]) -> bool {
        benches.iter().any(|bench| self.is_wanted(bench))
    }
}

impl Row {
    fn set_done(&mut self, done: &[Done], is_counted: bool) {
        let [exits, interrupts, heavy @ ..] = counting::least(done);
        (self.vm_exits, self.interrupts) = (Some(exits), Some(interrupts));
        self.heavy = is_counted.then_some(heavy);
    }
}

fn row(bench: &'static str, system: &str, ticks: &mut [u64]) -> Row {
    Row {
        bench,
        system: system.to_string(),
        unit: None,
        value: median(ticks),
        mean: ticks.iter().sum::<u64>() / ticks.len() as u64,
        min: ticks.iter().copied().min().unwrap_or(0),
        max: ticks.iter().copied().max().unwrap_or(0),
        n: ticks.len(),
        vm_exits: None,
        interrupts: None,
        heavy: None,
    }
}

fn emit(row: &Row) {
    let json = serde_json::to_string(row).expect("a row is plain data");
    println!("{MARK}{json}");
}

fn median(values: &mut [u64]) -> u64 {
    values.sort_unstable();
    values[values.len() / 2]
}

/// What measuring nothing costs.
fn empty() -> u64 {
    let mut times: Vec<u64> = (0..201).map(|_| timed(|| ())).collect();
    median(&mut times)
}

/// Whether a tick is an instruction of the emulated machine, which repeats to the digit.
pub fn is_emulated() -> bool {
    dune_examples::unit().starts_with("instructions")
}

#[inline(always)]
pub fn timed<T>(action: impl FnOnce() -> T) -> u64 {
    let start = ticks();
    core::hint::black_box(action());
    ticks() - start
}
