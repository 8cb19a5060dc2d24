// SPDX-License-Identifier: MIT OR Apache-2.0

//! First touches, mappings, invalidations.

use crate::measure::timed;
use crate::measure::System;
use crate::pages::Memory;
use crate::pages::PAGE;

/// Pages of a test.
const PAGES: usize = 1000;
/// Pages that the module maps at once where they are there.
const AROUND: usize = 16;
const LARGE: usize = 2 << 20;
const LARGE_PAGES: usize = 16;

pub fn measure(system: &System<'_>) {
    page_fault(system);
    page_fault_thp(system);
    if system.dune.is_some() {
        ept_violation(system);
        ept_violation_2m(system);
    }
    system.repeated("mmap_munmap_64m", 100, |_| timed(|| drop(Memory::new(64 << 20))));
    for (bench, pages, count) in [
        ("invalidate_1", 1, 200),
        ("invalidate_512", 512, 20),
        ("invalidate_16384", 16384, 5),
    ] {
        invalidate(system, bench, pages, count);
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
        timed(|| memory.write(start + i * LARGE, 1))
    });
}

/// The process has the page, the EPT has not.
fn ept_violation(system: &System<'_>) {
    let memory = Memory::new(PAGES * AROUND * PAGE).small().populated();
    system.once("ept_violation", PAGES, |i| timed(|| memory.write(i * AROUND * PAGE, 1)));
    let memory = Memory::new(PAGES * PAGE).small().populated();
    let mut average = [timed(|| (0..PAGES).for_each(|i| memory.write(i * PAGE, 1))) / PAGES as u64];
    system.given("ept_violation_in_turn", &mut average);
}

fn ept_violation_2m(system: &System<'_>) {
    let memory = Memory::new((LARGE_PAGES + 1) * LARGE).large().populated();
    let start = memory.first_multiple_of(LARGE);
    system.once("ept_violation_2m", LARGE_PAGES, |i| {
        timed(|| memory.write(start + i * LARGE, 1))
    });
}

/// Pages that the guest has written go from the process.
fn invalidate(system: &System<'_>, bench: &'static str, pages: usize, count: usize) {
    if !system.wants(&[bench]) {
        return;
    }
    let memory = Memory::new(pages * PAGE).small();
    system.once(bench, count, |round| {
        (0..pages).for_each(|i| memory.write(i * PAGE, round as u8 + 1));
        let ticks = timed(|| memory.drop_pages());
        assert_eq!(memory.read(0), 0, "the page is a new one");
        ticks
    });
}
