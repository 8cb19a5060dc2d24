// SPDX-License-Identifier: MIT OR Apache-2.0

//! Page tables of the program's own: changes of 1,000 pages of 4 KiB, scans for what was written, switches, copies.

use libdune::paging::Used;
use libdune::Dune;
use libdune::FramePool;
use libdune::Gva;
use libdune::Permissions;

use crate::measure::timed;
use crate::measure::System;
use crate::pages::Memory;
use crate::pages::PAGE;

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
            let protect = |protection| memory.protect(0, PAGES * PAGE, protection);
            system.repeated("protect_1000", ROUNDS, |_| {
                protect(libc::PROT_READ | libc::PROT_WRITE);
                timed(|| protect(libc::PROT_READ))
            });
        }
    }
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
    system.repeated("protect_1000", ROUNDS, |_| {
        protect(Permissions::ALL).flush();
        timed(|| protect(Permissions::READ).flush())
    });
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
    system.repeated("map_1000", ROUNDS, |_| {
        unmap();
        timed(map)
    });
    system.repeated("unmap_1000", ROUNDS, |_| {
        map();
        timed(unmap)
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
    system.once("dirty_write", PAGES, |i| timed(|| memory.write(i * PAGE, 1)));

    let second = space.duplicate().expect("a second page table");
    system.repeated("table_switch_and_back", 1000, |_| {
        // SAFETY: They map the same.
        timed(|| unsafe {
            dune.load(&second);
            dune.load(&space);
        })
    });
    if system.wants(&["copy_on_write"]) {
        let pool = FramePool::new().expect("a pool");
        second.copy_on_write(start, bytes, &pool).expect("share").ignore();
        // SAFETY: It maps the same.
        unsafe { dune.load(&second) };
        system.once("copy_on_write", PAGES, |i| timed(|| memory.write(i * PAGE, 1)));
        // SAFETY: The table from before.
        unsafe { dune.load(&space) };
        assert_eq!(pool.used(), PAGES as u64);
    }
}
