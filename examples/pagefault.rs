// SPDX-License-Identifier: MIT OR Apache-2.0

//! Protects a page in the program's own page table and catches the page fault: no exit to the host.

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;

use clap::Parser;
use dune_examples::die;
use dune_examples::exits_by_reason;
use dune_examples::own_exits;
use dune_examples::ticks;
use dune_examples::unit;
use libdune::abi::Counters;
use libdune::AddressSpace;
use libdune::Dune;
use libdune::Gva;
use libdune::Outcome;
use libdune::Permissions;
use libdune::Thread;
use libdune::TrapFrame;
use libdune::Vector;

const PAGE: u64 = 4096;

/// Measures page faults that the program handles itself.
#[derive(Parser)]
struct Options {
    /// How many faults.
    #[arg(long, default_value_t = 1000)]
    faults: u64,
}

const WARM_UP: u64 = 8;

/// One page, alone.
#[repr(C, align(4096))]
struct Page([u64; 512]);

static FAULTS: AtomicU64 = AtomicU64::new(0);
static ADDRESS: AtomicU64 = AtomicU64::new(0);
static ENTERED: AtomicU64 = AtomicU64::new(0);

// ANCHOR: handler
/// Gives the page its permissions back and lets the program try again.
fn page_fault(frame: &mut TrapFrame, thread: &Thread<'_>) -> Outcome {
    ENTERED.store(ticks(), Relaxed);
    let Some(gva) = Gva::new(frame.cr2) else {
        return Outcome::Unhandled;
    };
    if frame.host_refused() {
        return Outcome::Unhandled;
    }
    FAULTS.fetch_add(1, Relaxed);
    ADDRESS.store(frame.cr2, Relaxed);
    match thread
        .address_space()
        .protect(gva.align_down(PAGE), PAGE, Permissions::ALL)
    {
        // A leaf that was not present is not in the TLB.
        Ok(flush) => flush.ignore(),
        Err(_) => return Outcome::Unhandled,
    }
    Outcome::Resume
}
// ANCHOR_END: handler

/// What some faults took.
struct Measured {
    to_handler: u64,
    total: u64,
    min: u64,
    before: Counters,
    after: Counters,
}

/// Takes `faults` of them at `word`, in the page at `start`.
#[inline(never)]
fn measure(dune: &Dune, space: &AddressSpace<'_>, start: Gva, word: *mut u64, faults: u64) -> Measured {
    let (mut total, mut to_handler, mut min) = (0, 0, u64::MAX);
    FAULTS.store(0, Relaxed);
    let before = dune.counters();
    for round in 1..=faults {
        // ANCHOR: fault
        space
            .protect(start, PAGE, Permissions::NONE)
            .expect("the page can be protected")
            .flush();
        let begin = ticks();
        // SAFETY: The program's own page; the handler makes it accessible.
        unsafe { word.write_volatile(round) };
        // ANCHOR_END: fault
        let end = ticks();
        total += end - begin;
        to_handler += ENTERED.load(Relaxed) - begin;
        min = min.min(end - begin);
    }
    Measured {
        to_handler,
        total,
        min,
        before,
        after: dune.counters(),
    }
}

fn main() {
    let options = Options::parse();
    let unit = unit();
    let mut page = Box::new(Page([0; 512]));
    let word = &raw mut page.0[123];
    // ANCHOR: enter
    let dune = Dune::enter().unwrap_or_else(|error| die(&error));
    dune.set_exception_handler(Vector::PF, page_fault);
    let space = dune.address_space();
    let start = Gva::of(&raw const *page).expect("a program's address is canonical");
    // ANCHOR_END: enter

    // Once before: what is used for the first time, stacks and code, comes into the EPT by exits; and the leaf is split.
    measure(&dune, &space, start, word, WARM_UP);
    let Measured {
        to_handler,
        total,
        min,
        before,
        after,
    } = measure(&dune, &space, start, word, options.faults);

    let faults = FAULTS.load(Relaxed);
    println!(
        "page faults handled in Dune mode: {faults}, the last at {:#x}",
        ADDRESS.load(Relaxed)
    );
    println!(
        "VM exits meanwhile, without interrupts from outside: {}",
        own_exits(&before, &after)
    );
    for (reason, exits) in exits_by_reason(&before, &after) {
        println!("  {exits:>6}  reason {reason}");
    }
    let mean = |sum: u64| sum / options.faults.max(1);
    println!("per fault, in {unit}:");
    println!("  store -> handler                      mean {:>6}", mean(to_handler));
    println!(
        "  store -> handler, unprotect -> store  mean {:>6}  min {min:>6}",
        mean(total)
    );
    let value = page.0[123];
    dune.leave();
    let good = faults == options.faults && value == options.faults && own_exits(&before, &after) == 0;
    if !good || ADDRESS.load(Relaxed) != word as u64 {
        eprintln!("pagefault: not what was expected");
        std::process::exit(1);
    }
}
