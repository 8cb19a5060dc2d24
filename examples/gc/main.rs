// SPDX-License-Identifier: MIT OR Apache-2.0

//! A generational mark-sweep collector whose write barrier is the dirty bit of the program's own page table, beside the
//! same collector with other barriers: Dune's protection and #PF handler, mprotect and SIGSEGV, userfaultfd, PAGEMAP_SCAN.
//!
//! The program itself has no barrier code at all: `heap.rs` writes references as any program does. What old objects were
//! written to between two collections the page tables know; `barrier/` has the ways to ask. A linked list, a hash map and
//! a tree (`work.rs`) are changed, the same way under each barrier, and compared with a model: an object that a barrier
//! forgot would be freed with references to it left (`--barrier none` shows that).

mod barrier;
mod heap;
mod work;

use std::process::ExitCode;

use clap::Parser;
use clap::ValueEnum;
use dune_examples::die;
use dune_examples::median;
use dune_examples::print_row;
use dune_examples::ticks;
use dune_examples::unit;
use libdune::Dune;

use crate::barrier::linux;
use crate::barrier::own;
use crate::barrier::Barrier;
use crate::barrier::BarrierError;
use crate::barrier::Forgetful;
use crate::heap::GcError;
use crate::heap::Heap;
use crate::heap::Memory;
use crate::heap::PAGE;
use crate::work::Numbers;
use crate::work::Work;

/// Measures a garbage collector with different write barriers.
#[derive(Parser)]
struct Options {
    /// Size of the heap.
    #[arg(long, default_value_t = 2048, value_name = "KIB")]
    heap: usize,
    /// Live objects of 64 bytes, two at least.
    #[arg(long, default_value_t = 12_000)]
    live: usize,
    /// How often something is changed.
    #[arg(long, default_value_t = 6000)]
    operations: usize,
    /// New objects between two collections.
    #[arg(long, default_value_t = 256)]
    nursery: usize,
    /// Only this barrier.
    #[arg(long)]
    barrier: Option<Kind>,
    /// Rows for `make bench-lib`, instead of the table.
    #[arg(long)]
    rows: bool,
}

/// The write barriers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Linux: pages without write permission, a handler of SIGSEGV.
    Mprotect,
    /// Linux: userfaultfd, a thread that handles the writes.
    Userfaultfd,
    /// Linux: userfaultfd that only notes writes, and PAGEMAP_SCAN.
    PagemapScan,
    /// Dune: the dirty bits of the own page table.
    DirtyBits,
    /// Dune: pages without write permission in the own page table, a handler of #PF.
    Protection,
    /// None at all, to see that the checks notice.
    None,
}

/// All but the last, those outside Dune mode first.
const KINDS: [Kind; 5] = [
    Kind::Mprotect,
    Kind::Userfaultfd,
    Kind::PagemapScan,
    Kind::DirtyBits,
    Kind::Protection,
];

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Mprotect => "Linux: mprotect + SIGSEGV",
            Self::Userfaultfd => "Linux: userfaultfd",
            Self::PagemapScan => "Linux: PAGEMAP_SCAN",
            Self::DirtyBits => "Dune: dirty bits",
            Self::Protection => "Dune: protect + #PF",
            Self::None => "none",
        }
    }

    fn is_own(self) -> bool {
        matches!(self, Self::DirtyBits | Self::Protection)
    }

    fn make<'d>(self, dune: Option<&'d Dune>, memory: &Memory) -> Result<Box<dyn Barrier + 'd>, BarrierError> {
        Ok(match (self, dune) {
            (Self::Mprotect, _) => Box::new(linux::Mprotect::new(memory)?),
            (Self::Userfaultfd, _) => Box::new(linux::Userfaultfd::new(memory)?),
            (Self::PagemapScan, _) => Box::new(linux::PagemapScan::new(memory)?),
            (Self::DirtyBits, Some(dune)) => Box::new(own::DirtyBits::new(dune, memory)?),
            (Self::Protection, Some(dune)) => Box::new(own::Protection::new(dune, memory)?),
            (Self::DirtyBits | Self::Protection | Self::None, _) => Box::new(Forgetful),
        })
    }
}

/// What a workload came to under a barrier.
struct Outcome {
    kind: Kind,
    work: &'static str,
    /// What stands for the contents at the end.
    contents: u64,
    /// Ticks of all changes, collections included.
    taken: u64,
    changes: usize,
    times: heap::Times,
}

fn run(kind: Kind, dune: Option<&Dune>, options: &Options, work: &mut dyn Work) -> Result<Outcome, GcError> {
    let memory = Memory::new((options.heap << 10) / PAGE)?;
    let barrier = kind.make(dune, &memory)?;
    let mut heap = Heap::new(memory, barrier, options.nursery);
    let mut numbers = Numbers::new();
    for _ in 0..options.live.max(2) {
        work.grow(&mut heap, &mut numbers)?;
        heap.pause()?;
    }
    work::check(work, &heap)?;
    heap.times = heap::Times::default();
    let start = ticks();
    for _ in 0..options.operations {
        work.step(&mut heap, &mut numbers)?;
        heap.pause()?;
    }
    let taken = ticks() - start;
    let contents = work::check(work, &heap)?;
    Ok(Outcome {
        kind,
        work: work.name(),
        contents,
        taken,
        changes: options.operations,
        times: heap.times,
    })
}

/// All workloads under a barrier.
fn run_all(kind: Kind, dune: Option<&Dune>, options: &Options) -> Result<Vec<Outcome>, GcError> {
    let mut works: [Box<dyn Work>; 3] = [
        Box::new(work::List::default()),
        Box::new(work::Map::default()),
        Box::new(work::Tree::default()),
    ];
    works
        .iter_mut()
        .map(|work| run(kind, dune, options, work.as_mut()))
        .collect()
}

fn print(outcomes: &mut [Outcome]) {
    println!(
        "{:<12} {:<26} {:>10} {:>10} {:>10} {:>6} {:>10} {:>11}  contents",
        "", "write barrier", "pause", "max", "asking", "pages", "full, max", "changes/M"
    );
    let works: Vec<&'static str> = outcomes.iter().map(|outcome| outcome.work).collect();
    let mut seen = Vec::new();
    for work in works {
        if seen.contains(&work) {
            continue;
        }
        seen.push(work);
        for outcome in outcomes.iter_mut().filter(|outcome| outcome.work == work) {
            let times = &mut outcome.times;
            let most = |times: &[u64]| times.iter().copied().max().unwrap_or(0);
            let (minor_max, full_max) = (most(&times.minor), most(&times.full));
            println!(
                "{work:<12} {:<26} {:>10} {minor_max:>10} {:>10} {:>6} {full_max:>10} {:>11.1}  {:016x}",
                outcome.kind.name(),
                median(&mut times.minor),
                median(&mut times.asking),
                median(&mut times.pages),
                outcome.changes as f64 * 1e6 / outcome.taken.max(1) as f64,
                outcome.contents,
            );
        }
    }
}

fn print_rows(outcomes: &[Outcome]) {
    for Outcome { kind, work, times, .. } in outcomes {
        print_row(&format!("gc_pause {work}"), kind.name(), &times.minor);
        print_row(&format!("gc_asking {work}"), kind.name(), &times.asking);
    }
    for outcome in outcomes {
        let change = outcome.taken / outcome.changes.max(1) as u64;
        print_row(&format!("gc_change {}", outcome.work), outcome.kind.name(), &[change]);
    }
}

/// Whether each workload came to the same under all barriers.
fn are_alike(outcomes: &[Outcome]) -> bool {
    outcomes.iter().all(|one| {
        let mut same = outcomes.iter().filter(|other| other.work == one.work);
        same.all(|other| other.contents == one.contents)
    })
}

fn main() -> ExitCode {
    let options = Options::parse();
    let wanted = |kind: &Kind| options.barrier.is_none_or(|only| only == *kind);
    let kinds: Vec<Kind> = KINDS.into_iter().chain(options.barrier).filter(wanted).collect();
    let mut outcomes = Vec::new();
    let mut is_well = true;
    let mut dune = None;
    for (index, kind) in kinds.iter().enumerate() {
        if kinds[..index].contains(kind) {
            continue;
        }
        if kind.is_own() && dune.is_none() {
            dune = Some(Dune::enter().unwrap_or_else(|error| die(&error)));
        }
        match run_all(*kind, dune.as_ref(), &options) {
            Ok(new) => outcomes.extend(new),
            // Linux has it, or has it not: a kernel without userfaultfd, or a limit.
            Err(GcError::Barrier(error)) if !kind.is_own() => println!("{}: not here: {error}", kind.name()),
            Err(error) => {
                eprintln!("gc: {}: {error}", kind.name());
                is_well = false;
            }
        }
    }
    if let Some(dune) = dune {
        dune.leave();
    }
    println!(
        "{} objects in {} KiB, {} changes, a collection per {} new objects; ticks are {}:",
        options.live,
        options.heap,
        options.operations,
        options.nursery,
        unit()
    );
    if options.rows {
        print_rows(&outcomes);
    } else {
        print(&mut outcomes);
    }
    if !are_alike(&outcomes) {
        eprintln!("gc: the barriers came to different contents");
        is_well = false;
    }
    if is_well && !outcomes.is_empty() {
        println!("each compared with its model: alike");
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
