// SPDX-License-Identifier: MIT OR Apache-2.0

//! First touches, mappings, invalidations.

use libdune::Dune;
use linux_raw_sys::general::PAGE_IS_HUGE;

use crate::measure::timed;
use crate::measure::System;
use crate::pagemap::pages_of;
use crate::pagemap::Pagemap;
use crate::pagemap::NO_PAGES;
use crate::pages::Memory;
use crate::pages::PAGE;

/// SDM, appendix C.
const EXIT_EPT_VIOLATION: usize = 48;

/// Pages of a test.
const PAGES: usize = 1000;
/// Times that all pages are touched in turn.
const TURNS: usize = 9;
/// Pages that the module maps at once where they are there.
const AROUND: usize = 16;
const LARGE: usize = 2 << 20;
const LARGE_PAGES: usize = 16;

pub fn measure(system: &System<'_>) {
    page_fault(system);
    page_fault_thp(system);
    if let Some(dune) = system.dune {
        ept_violation(system, dune);
        ept_violation_2m(system, dune);
    }
    mmap_munmap(system);
    for (bench, pages, count) in [
        ("invalidate_1", 1, 200),
        ("invalidate_512", 512, 20),
        ("invalidate_16384", 16384, 5),
    ] {
        invalidate(system, bench, pages, count);
    }
    if !system.selection.quick {
        // A GiB, which takes half a minute to be written: once. The machine needs twice that.
        invalidate(system, "invalidate_262144", 262_144, 1);
    }
}

/// Nobody has the page: Linux makes it. The pages are written in turn, as the published benchmark does.
fn page_fault(system: &System<'_>) {
    let memory = Memory::new(PAGES * PAGE).small();
    system.once("page_fault", PAGES, |i| timed(|| memory.write(i * PAGE, i as u8)));
    assert!((0..PAGES).all(|i| !system.wants(&["page_fault"]) || memory.read(i * PAGE) == i as u8));
}

/// The same for 2 MiB at once.
fn page_fault_thp(system: &System<'_>) {
    let memory = Memory::new((LARGE_PAGES + 1) * LARGE).large();
    let start = memory.first_multiple_of(LARGE);
    system.once("page_fault_thp", LARGE_PAGES, |i| {
        timed(|| memory.write(start + i * LARGE, i as u8 + 1))
    });
    if system.wants(&["page_fault_thp"]) {
        assert_large(&memory, start);
        assert!((0..LARGE_PAGES).all(|i| memory.read(start + i * LARGE) == i as u8 + 1));
    }
}

/// Linux has huge pages there.
fn assert_large(memory: &Memory, start: usize) {
    let pagemap = Pagemap::open().expect("/proc/self/pagemap");
    let mut regions = [NO_PAGES; 4];
    let range = start..start + LARGE_PAGES * LARGE;
    let found = pagemap.scan(memory, range, 0, PAGE_IS_HUGE, PAGE_IS_HUGE, &mut regions);
    assert!(found >= 0, "PAGEMAP_SCAN: {}", std::io::Error::last_os_error());
    let pages: u64 = regions[..found as usize].iter().map(pages_of).sum();
    assert_eq!(
        pages as usize,
        LARGE_PAGES * LARGE / PAGE,
        "pages that are part of huge ones"
    );
}

/// The process has the page, the EPT has not.
fn ept_violation(system: &System<'_>, dune: &Dune) {
    let memory = Memory::new(PAGES * AROUND * PAGE).small().populated();
    let before = dune.counters();
    system.once("ept_violation", PAGES, |i| timed(|| memory.write(i * AROUND * PAGE, 1)));
    if system.wants(&["ept_violation"]) {
        let after = dune.counters();
        let exits = after.exits[EXIT_EPT_VIOLATION] - before.exits[EXIT_EPT_VIOLATION];
        assert!(exits >= PAGES as u64, "{exits} EPT violations");
        assert!((0..PAGES).all(|i| memory.read(i * AROUND * PAGE) == 1));
    }
    if system.wants(&["ept_violation_in_turn"]) {
        let mut averages: [u64; TURNS] = core::array::from_fn(|turn| in_turn(dune, turn as u8 + 1));
        system.given("ept_violation_in_turn", &mut averages);
    }
}

/// The average of pages that are written one after the other; the neighbours that come along are not asked for again.
fn in_turn(dune: &Dune, byte: u8) -> u64 {
    let memory = Memory::new(PAGES * PAGE).small().populated();
    let before = dune.counters();
    let ticks = timed(|| (0..PAGES).for_each(|i| memory.write(i * PAGE, byte)));
    let after = dune.counters();
    let leaves = (after.ept_4k + after.ept_around) - (before.ept_4k + before.ept_around);
    let exits = after.exits[EXIT_EPT_VIOLATION] - before.exits[EXIT_EPT_VIOLATION];
    assert!(leaves >= PAGES as u64, "{leaves} leaves of 4 KiB");
    assert!(
        (PAGES / AROUND) as u64 <= exits && exits <= (PAGES / AROUND + 2 * AROUND) as u64,
        "{exits} EPT violations"
    );
    assert!(
        (0..PAGES).all(|i| memory.read(i * PAGE) == byte),
        "bytes that were written"
    );
    ticks / PAGES as u64
}

fn ept_violation_2m(system: &System<'_>, dune: &Dune) {
    let memory = Memory::new((LARGE_PAGES + 1) * LARGE).large().populated();
    let start = memory.first_multiple_of(LARGE);
    let before = dune.counters().ept_2m;
    system.once("ept_violation_2m", LARGE_PAGES, |i| {
        timed(|| memory.write(start + i * LARGE, 1))
    });
    if system.wants(&["ept_violation_2m"]) {
        let leaves = dune.counters().ept_2m - before;
        assert!(leaves >= LARGE_PAGES as u64, "{leaves} leaves of 2 MiB");
        assert!((0..LARGE_PAGES).all(|i| memory.read(start + i * LARGE) == 1));
    }
}

/// What is mapped is memory, and is gone afterwards.
fn mmap_munmap(system: &System<'_>) {
    const BYTES: usize = 64 << 20;
    let is_there = |memory: *mut u8| {
        let mut told = 0u8;
        // SAFETY: Into a byte of ours.
        unsafe { libc::mincore(memory.cast(), PAGE, &mut told) == 0 }
    };
    let memory = Memory::new(BYTES);
    let (first, last) = (memory.start(), memory.at(BYTES - PAGE));
    memory.write(BYTES - 1, 7);
    assert!(memory.read(BYTES - 1) == 7 && is_there(first) && is_there(last));
    drop(memory);
    assert!(!is_there(first) && !is_there(last));
    system.repeated("mmap_munmap_64m", 100, |_| timed(|| drop(Memory::new(BYTES))));
}

/// Pages that the guest has written go from the process.
fn invalidate(system: &System<'_>, bench: &'static str, pages: usize, count: usize) {
    if !system.wants(&[bench]) {
        return;
    }
    let memory = Memory::new(pages * PAGE).small();
    let (mut rounds, mut dropped) = (0u8, 0);
    let write = || {
        rounds += 1;
        // The last round's, too, was gone.
        assert_eq!(memory.read(0), 0, "the page is a new one");
        (0..pages).for_each(|i| memory.write(i * PAGE, rounds));
    };
    system.once_after(bench, count, write, |_| {
        dropped += 1;
        timed(|| memory.drop_pages())
    });
    assert!(
        [0, pages / 2, pages - 1]
            .iter()
            .all(|page| memory.read(page * PAGE) == 0),
        "the pages are new ones"
    );
    assert_eq!(dropped, count);
}
