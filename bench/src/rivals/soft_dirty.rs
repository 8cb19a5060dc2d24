// SPDX-License-Identifier: MIT OR Apache-2.0

//! Soft-dirty bits: Linux notes writes in the pagemap, and forgets all of a process' at once.

use std::fs;
use std::fs::File;
use std::io::Write;

use crate::measure::timed;
use crate::measure::System;
use crate::pagemap::Pagemap;
use crate::pages::Memory;
use crate::pages::PAGE;

const PAGES: usize = 1000;
const ROUNDS: usize = 20;
const SOFT_DIRTY: u64 = 1 << 55;

/// The price of a first write, and that of asking for 1,000 pages and starting anew.
pub fn measure(linux: &System<'_>) {
    let system = linux.named("soft-dirty");
    if !system.wants(&["dirty_scan", "dirty_write"]) {
        return;
    }
    let files = (
        Pagemap::open(),
        fs::OpenOptions::new().write(true).open("/proc/self/clear_refs"),
    );
    let (Some(pagemap), Ok(mut clear)) = files else { return };
    let memory = Memory::new(PAGES * PAGE).small().populated();
    let mut words = vec![0; PAGES];
    let mut count = |memory: &Memory| {
        assert!(pagemap.read(memory, &mut words), "the pagemap of the range");
        words.iter().filter(|word| **word & SOFT_DIRTY != 0).count()
    };
    memory.write(0, 1);
    if !start_anew(&mut clear) {
        return;
    }
    let before = count(&memory);
    memory.write(0, 2);
    if (before, count(&memory)) != (0, 1) {
        println!("no rows of soft-dirty: this kernel has none (CONFIG_MEM_SOFT_DIRTY)");
        return;
    }
    start_anew(&mut clear);
    system.once("dirty_write", PAGES, |i| timed(|| memory.write(i * PAGE, 3)));
    system.repeated("dirty_scan", ROUNDS, |round| {
        (0..PAGES).for_each(|i| memory.write(i * PAGE, round as u8));
        let mut found = (0, false);
        let ticks = timed(|| found = (count(&memory), start_anew(&mut clear)));
        assert_eq!(found, (PAGES, true), "pages found written");
        ticks
    });
}

fn start_anew(clear: &mut File) -> bool {
    clear.write_all(b"4").is_ok()
}
