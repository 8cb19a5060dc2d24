// SPDX-License-Identifier: MIT OR Apache-2.0

//! Page tables of the program's own: changes of 1,000 pages of 4 KiB, scans for what was written, switches, copies.

use std::collections::HashSet;

use libdune::paging::Used;
use libdune::AddressSpace;
use libdune::Dune;
use libdune::FramePool;
use libdune::Gva;
use libdune::Hva;
use libdune::Permissions;

use crate::measure::timed;
use crate::measure::System;
use crate::pagemap::Pagemap;
use crate::pages::Memory;
use crate::pages::PAGE;
use crate::tasks::end_of_child;

const PAGES: usize = 1000;
const ROUNDS: usize = 50;
/// One page in this many is written before a sparse scan.
const SPARSE: usize = 10;
/// A GVA that the process does not have.
const ELSEWHERE: u64 = 0xffff_9000_0000_0000;

pub fn measure(system: &System<'_>) {
    let memory = Memory::new(PAGES * PAGE).small().populated();
    match system.dune {
        Some(dune) => own(system, dune, &memory),
        None => {
            copy_on_write(system, &memory);
            let protect = |protection| memory.protect(0, PAGES * PAGE, protection);
            system.repeated("protect_1000", ROUNDS, |_| {
                protect(libc::PROT_READ | libc::PROT_WRITE);
                timed(|| protect(libc::PROT_READ))
            });
            if system.wants(&["protect_1000"]) {
                // SAFETY: Linux writes a byte there, or finds that it may not.
                let answer = unsafe { libc::getrandom(memory.at((PAGES - 1) * PAGE).cast(), 1, 0) };
                assert_eq!(answer, -1, "a page that was protected is written to");
            }
        }
    }
}

/// Linux' own: a child of fork shares the pages, and its parent writes to them.
fn copy_on_write(system: &System<'_>, memory: &Memory) {
    if !system.wants(&["copy_on_write"]) {
        return;
    }
    let pagemap = Pagemap::open().expect("/proc/self/pagemap");
    let frames = || -> HashSet<u64> {
        let frame = |i| pagemap.frame(memory.at(i * PAGE) as usize).expect("a frame");
        (0..PAGES).map(frame).collect()
    };
    (0..PAGES).for_each(|i| memory.write(i * PAGE, 1));
    let before = frames();
    let mut end = [0; 2];
    // SAFETY: The child waits for the end of the pipe, looks at its pages, and ends.
    let pid = unsafe {
        assert_eq!(libc::pipe(end.as_mut_ptr()), 0);
        let pid = libc::fork();
        if pid == 0 {
            libc::close(end[1]);
            libc::read(end[0], [0u8; 1].as_mut_ptr().cast(), 1);
            libc::_exit(i32::from(!(0..PAGES).all(|i| memory.read(i * PAGE) == 1)));
        }
        pid
    };
    assert!(pid >= 0, "fork");
    system.once("copy_on_write", PAGES, |i| timed(|| memory.write(i * PAGE, 2)));
    let both = before.union(&frames()).count();
    assert_eq!(both, 2 * PAGES, "each page and each copy has a frame of its own");
    assert!((0..PAGES).all(|i| memory.read(i * PAGE) == 2), "bytes of the copies");
    // SAFETY: Ours.
    unsafe { (libc::close(end[1]), libc::close(end[0])) };
    assert_eq!(end_of_child(pid), 0, "the child has the originals");
}

fn own(system: &System<'_>, dune: &Dune, memory: &Memory) {
    let start = Gva::of(memory.at(0)).expect("a program's address is canonical");
    let (bytes, page) = ((PAGES * PAGE) as u64, PAGE as u64);
    let elsewhere = Gva::new(ELSEWHERE).expect("canonical");
    let to = start.identity().expect("the program's");
    let space = dune.address_space();

    let protect = |permissions| space.protect(start, bytes, permissions).expect("protect");
    protect(Permissions::ALL).flush();
    // By pages of 4 KiB, as everything below.
    space.clear_accessed_dirty(start, bytes).expect("split").flush();
    system.repeated_after(
        "protect_1000",
        ROUNDS,
        || protect(Permissions::ALL).flush(),
        |_| timed(|| protect(Permissions::READ).flush()),
    );
    if system.wants(&["protect_1000"]) {
        let last = start.checked_add(bytes - page).expect("canonical");
        assert_eq!(space.translate(last, Permissions::WRITE), None, "protected");
        assert!(space.translate(last, Permissions::READ).is_some());
    }
    protect(Permissions::ALL).flush();
    space.take_used(start, bytes, Used::Both, |_| {}).expect("scan").flush();

    let map = || {
        space
            .map(elsewhere, bytes, to, Permissions::WRITE)
            .expect("map")
            .ignore()
    };
    // Never by 2 MiB: what was there was smaller.
    space
        .map(elsewhere, page, to, Permissions::WRITE)
        .expect("map")
        .ignore();
    let unmap = || space.unmap(elsewhere, bytes).expect("unmap").flush();
    map();
    let last = elsewhere.checked_add(bytes - page).expect("canonical");
    system.repeated_after("map_1000", ROUNDS, unmap, |round| {
        let ticks = timed(map);
        memory.write((PAGES - 1) * PAGE, round as u8);
        // SAFETY: Mapped to memory of ours.
        assert_eq!(unsafe { (last.as_u64() as *const u8).read_volatile() }, round as u8);
        ticks
    });
    system.repeated_after("unmap_1000", ROUNDS, map, |_| {
        let ticks = timed(unmap);
        assert_eq!(space.translate(last, Permissions::READ), None, "unmapped");
        ticks
    });

    // As Linux' own way: all pages were written.
    for (bench, written) in [
        ("dirty_scan", PAGES),
        ("dirty_scan_sparse", PAGES / SPARSE),
        ("dirty_scan_clean", 0),
    ] {
        system.repeated(bench, ROUNDS, |round| {
            (0..written).for_each(|i| memory.write(i * (PAGES / written) * PAGE, round as u8));
            let mut found = 0;
            let ticks = timed(|| {
                let visit = |_| found += 1;
                space.take_used(start, bytes, Used::Dirty, visit).expect("scan").flush();
            });
            assert_eq!(found, written, "pages found written");
            ticks
        });
    }
    if system.wants(&["dirty_write"]) {
        let dirty = || {
            let mut found = 0;
            let visit = |_| found += 1;
            space.take_used(start, bytes, Used::Dirty, visit).expect("scan").flush();
            found
        };
        dirty();
        assert_eq!(dirty(), 0, "pages written of themselves");
        system.once("dirty_write", PAGES, |i| timed(|| memory.write(i * PAGE, 200)));
        assert_eq!(dirty(), PAGES, "dirty bits");
        assert!(
            (0..PAGES).all(|i| memory.read(i * PAGE) == 200),
            "bytes that were written"
        );
    }

    let second = space.duplicate().expect("a second page table");
    load(dune, &second);
    load(dune, &space);
    system.repeated("table_switch_and_back", 1000, |_| {
        // SAFETY: They map the same.
        timed(|| unsafe {
            dune.load(&second);
            dune.load(&space);
        })
    });
    if system.wants(&["copy_on_write"]) {
        let pool = FramePool::new().expect("a pool");
        (0..PAGES).for_each(|i| memory.write(i * PAGE, 1));
        second.copy_on_write(start, bytes, &pool).expect("share").ignore();
        load(dune, &second);
        system.once("copy_on_write", PAGES, |i| timed(|| memory.write(i * PAGE, 2)));
        assert!((0..PAGES).all(|i| memory.read(i * PAGE) == 2), "bytes of the copies");
        // Where each page is for Linux, by the two tables.
        let frames = |space: &AddressSpace<'_>| -> Vec<u64> {
            let pagemap = Pagemap::open().expect("/proc/self/pagemap");
            let pages = (0..bytes).step_by(PAGE);
            let places = pages.map(|offset| space.translate(start.checked_add(offset)?, Permissions::READ));
            let frame = |place: Option<Hva>| pagemap.frame(place?.as_u64() as usize);
            places.map(|place| frame(place).expect("a frame")).collect()
        };
        let copies = frames(&second);
        load(dune, &space);
        assert!((0..PAGES).all(|i| memory.read(i * PAGE) == 1), "bytes of the originals");
        let both: HashSet<u64> = copies.into_iter().chain(frames(&space)).collect();
        assert_eq!(both.len(), 2 * PAGES, "each page and each copy has a frame of its own");
        assert_eq!(pool.used(), PAGES as u64);
    }
}

/// Loads a table that maps the same. Apart, so that what is measured is compiled as where it is used once.
#[inline(never)]
fn load(dune: &Dune, table: &AddressSpace<'_>) {
    // SAFETY: The caller's.
    unsafe { dune.load(table) };
    assert!(table.is_loaded());
}
