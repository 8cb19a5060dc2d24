// SPDX-License-Identifier: MIT OR Apache-2.0

//! What a miss of the TLB costs: entries of page tables that the CPU reads then, from the sizes of the leaves that are
//! there.
//!
//! The guest's leaves are looked up in the page table that is loaded, Linux' own are told by its pagemap. Those of the EPT
//! are told by the module's counters, which count each that is installed: the first touch of the benchmark's memory must
//! install as many of 2 MiB as it has, or none; and as no others of 2 MiB ever were installed in the space, the guest's
//! page tables have leaves of 4 KiB there.

use std::cell::Cell;

use dune_examples::cr3;
use libdune::Dune;
use libdune::Gva;
use libdune::Permissions;
use linux_raw_sys::general;

use crate::measure::is_emulated;
use crate::measure::timed;
use crate::measure::System;
use crate::pagemap::pages_of;
use crate::pagemap::Pagemap;
use crate::pagemap::NO_PAGES;
use crate::pages::Memory;
use crate::pages::PAGE;

pub const LARGE: usize = 2 << 20;
/// What such rows count.
pub const REFERENCES: &str = "table references";

/// Pages of the chase, as in the published benchmark; an emulator, which has no time to tell, need not have so many.
const PAGES: usize = 1 << 16;
const PAGES_EMULATED: usize = 1 << 11;
/// Levels of the guest's page tables, and of the EPT.
const LEVELS: u64 = 4;

/// How a piece of memory is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Translation {
    /// By Linux' page table.
    One { levels: u64, leaf_bytes: u64 },
    /// By the guest's page table, and by the EPT: what the leaf maps, and the guest's tables.
    Two {
        guest_leaf_bytes: u64,
        ept_leaf_bytes: u64,
        tables_leaf_bytes: u64,
    },
}

impl Translation {
    /// Entries that the CPU reads for an address of which neither a TLB nor a paging-structure cache knows anything.
    pub fn references(self) -> u64 {
        match self {
            Self::One { levels, leaf_bytes } => entries(levels, leaf_bytes),
            Self::Two {
                guest_leaf_bytes,
                ept_leaf_bytes,
                tables_leaf_bytes,
            } => {
                // Each of the guest's entries lies at a GPA, which is translated first; so is the GPA that comes out.
                let guest = entries(LEVELS, guest_leaf_bytes);
                guest * (entries(LEVELS, tables_leaf_bytes) + 1) + entries(LEVELS, ept_leaf_bytes)
            }
        }
    }

    /// Bytes that an entry of the TLB can cover: the smaller leaf's.
    pub fn reach(self) -> u64 {
        match self {
            Self::One { leaf_bytes, .. } => leaf_bytes,
            Self::Two {
                guest_leaf_bytes,
                ept_leaf_bytes,
                ..
            } => guest_leaf_bytes.min(ept_leaf_bytes),
        }
    }
}

/// Entries from the top table down to a leaf; each level spares nine bits of the address.
fn entries(levels: u64, leaf_bytes: u64) -> u64 {
    levels - u64::from((leaf_bytes / PAGE as u64).ilog2()) / 9
}

/// Finds out how memory is translated; one for a stay in Dune mode.
#[derive(Default)]
pub struct Translations {
    /// EPT leaves of 2 MiB that map memory that was asked about.
    large: Cell<u64>,
}

impl Translations {
    /// How a range is translated, none of which was touched before by the guest. Its pages are all there, of one kind, and
    /// it begins and ends at a multiple of 2 MiB.
    pub fn of_fresh(
        &self,
        system: &System<'_>,
        memory: &Memory,
        range: core::ops::Range<usize>,
    ) -> Option<Translation> {
        let told = match system.dune {
            None => native(memory, range),
            Some(dune) => self.in_dune_mode(dune, memory, range),
        };
        told.map_err(|why| println!("no row that counts table references: {why}"))
            .ok()
    }

    fn in_dune_mode(
        &self,
        dune: &Dune,
        memory: &Memory,
        range: core::ops::Range<usize>,
    ) -> Result<Translation, String> {
        let before = dune.counters();
        if before.ept_2m != self.large.get() {
            return Err(format!(
                "{} EPT leaves of 2 MiB are of unknown use",
                before.ept_2m - self.large.get()
            ));
        }
        range.clone().step_by(PAGE).for_each(|offset| memory.write(offset, 0));
        let after = dune.counters();
        let large = after.ept_2m - before.ept_2m;
        let small = after.ept_4k + after.ept_around - before.ept_4k - before.ept_around;
        let ept_leaf_bytes = if large == (range.len() / LARGE) as u64 {
            LARGE
        } else if large == 0 && small >= (range.len() / PAGE) as u64 {
            PAGE
        } else {
            return Err(format!(
                "{large} leaves of 2 MiB and {small} of 4 KiB for {} bytes",
                range.len()
            ));
        };
        self.large.set(after.ept_2m);
        Ok(Translation::Two {
            guest_leaf_bytes: guest_leaf_bytes(dune, memory, range)?,
            ept_leaf_bytes: ept_leaf_bytes as u64,
            tables_leaf_bytes: PAGE as u64,
        })
    }
}

/// The same memory with the guest's leaves as they are now.
pub fn again(
    dune: &Dune,
    memory: &Memory,
    range: core::ops::Range<usize>,
    known: Translation,
) -> Result<Translation, String> {
    let mut now = known;
    if let Translation::Two {
        guest_leaf_bytes: bytes,
        ..
    } = &mut now
    {
        *bytes = guest_leaf_bytes(dune, memory, range)?;
    }
    Ok(now)
}

/// The size of all leaves of a range in the page table that is loaded.
fn guest_leaf_bytes(dune: &Dune, memory: &Memory, range: core::ops::Range<usize>) -> Result<u64, String> {
    const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
    let space = dune.address_space();
    if cr3().map(|cr3| cr3 & ADDRESS) != Some(space.root().as_u64()) {
        return Err("another page table is loaded".to_string());
    }
    let start = Gva::of(memory.at(range.start)).ok_or("not canonical")?;
    let mut sizes = Vec::new();
    let mut covered = 0;
    space.walk(start, range.len() as u64, |at, mapping| {
        let end = (at.as_u64() & !(mapping.page_bytes - 1)) + mapping.page_bytes;
        covered += end.min(start.as_u64() + range.len() as u64) - at.as_u64();
        if !sizes.contains(&mapping.page_bytes) {
            sizes.push(mapping.page_bytes);
        }
    });
    match sizes[..] {
        [size] if covered == range.len() as u64 => Ok(size),
        _ => Err(format!("guest's leaves of {sizes:?} bytes, {covered} bytes mapped")),
    }
}

/// Linux' own page table.
fn native(memory: &Memory, range: core::ops::Range<usize>) -> Result<Translation, String> {
    let pagemap = Pagemap::open().ok_or("no pagemap")?;
    let mut regions = [NO_PAGES; 2];
    let pages = (range.len() / PAGE) as u64;
    let told = general::PAGE_IS_PRESENT | general::PAGE_IS_HUGE;
    let found = pagemap.scan(memory, range, 0, general::PAGE_IS_PRESENT, told, &mut regions);
    if found != 1 || pages_of(&regions[0]) != pages {
        return Err(format!("the pages are not there, or not alike: {found} {regions:?}"));
    }
    let is_large = regions[0].categories & u64::from(general::PAGE_IS_HUGE) != 0;
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").map_err(|error| error.to_string())?;
    Ok(Translation::One {
        // Linux hides the flag where it does not use it.
        levels: if cpuinfo.contains(" la57") { 5 } else { 4 },
        leaf_bytes: if is_large { LARGE } else { PAGE } as u64,
    })
}

pub fn measure(system: &System<'_>, translations: &Translations) {
    for (bench, is_large, split) in [
        ("page_walk", false, "dune, guest leaves of 4 KiB"),
        ("page_walk_2m", true, "dune, guest leaves of 2 MiB"),
    ] {
        if system.wants(&[bench, TIME]) {
            walk(system, translations, bench, is_large, split);
        }
    }
}

/// Ticks of a walk, on a CPU that takes time for it.
const TIME: &str = "page_walk_time";

fn walk(system: &System<'_>, translations: &Translations, bench: &'static str, is_large: bool, split: &'static str) {
    let pages = if is_emulated() { PAGES_EMULATED } else { PAGES };
    let (memory, range) = aligned(pages * PAGE, is_large);
    let Some(translation) = translations.of_fresh(system, &memory, range.clone()) else {
        return;
    };
    system.tell(bench, REFERENCES, translation.references(), 1);
    chase(system, &memory, range.start, pages, is_large);
    let Some(dune) = system.dune else { return };
    let start = Gva::of(memory.at(range.start)).expect("a program's address is canonical");
    let (space, bytes) = (dune.address_space(), range.len() as u64);
    if is_large {
        // A part of a larger leaf has a leaf of its own from then on.
        for permissions in [Permissions::READ, Permissions::ALL] {
            space.protect(start, bytes, permissions).expect("protect").flush();
        }
    } else {
        space.clear_accessed_dirty(start, bytes).expect("split").flush();
    }
    let system = system.named(split);
    match again(dune, &memory, range.clone(), translation) {
        Ok(translation) => system.tell(bench, REFERENCES, translation.references(), 1),
        Err(why) => println!("no row: {why}"),
    }
    chase(&system, &memory, range.start, pages, is_large);
    undo(dune, start, range.len());
}

/// Has the guest's page table map by large leaves again what it did before a range was split.
pub fn undo(dune: &Dune, start: Gva, bytes: usize) {
    const GIB: u64 = 1 << 30;
    let first = start.align_down(GIB);
    let whole = (start.as_u64() + bytes as u64 - first.as_u64()).next_multiple_of(GIB);
    dune.address_space()
        .merge(first, whole)
        .expect("nobody else changes it");
}

/// Memory that is there, and the part of it that is aligned to 2 MiB.
pub fn aligned(bytes: usize, is_large: bool) -> (Memory, core::ops::Range<usize>) {
    let memory = Memory::new(bytes + LARGE);
    let memory = if is_large { memory.large() } else { memory.small() }.populated();
    let start = memory.first_multiple_of(LARGE);
    (memory, start..start + bytes)
}

/// Goes from page to page at random; each is reached. What that takes longer than going about in one page is told where
/// ticks are time.
fn chase(system: &System<'_>, memory: &Memory, start: usize, pages: usize, is_large: bool) {
    let cells = PAGE / 64;
    let far = lap(memory, pages, |i| start + i * PAGE + i % cells * 64);
    let near = lap(memory, cells, |i| start + i * 64);
    if !is_emulated() && !is_large {
        let [far, near] = [far * 100 / pages as u64, near * 100 / cells as u64];
        let mut difference = [far.saturating_sub(near) / 100];
        system.given(TIME, &mut difference);
    }
}

/// Ticks of the second of two laps over cells in an order of no order.
fn lap(memory: &Memory, count: usize, offset: impl Fn(usize) -> usize) -> u64 {
    let mut order: Vec<usize> = (0..count).collect();
    let mut random = 1u64;
    // Sattolo's: one cycle through all.
    for i in (1..count).rev() {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        order.swap(i, (random >> 33) as usize % i);
    }
    for (i, next) in order.into_iter().enumerate() {
        let next = memory.at(offset(next)) as usize;
        // SAFETY: Aligned, in the mapping; `order` tells where each cell leads.
        unsafe { memory.at(offset(i)).cast::<usize>().write_volatile(next) };
    }
    let first = memory.at(offset(0)) as usize;
    let mut ticks = 0;
    for _ in 0..2 {
        let mut at = first;
        let mut steps = 0;
        ticks = timed(|| loop {
            // SAFETY: A cell, see above.
            at = unsafe { (at as *const usize).read_volatile() };
            steps += 1;
            if at == first || steps > count {
                break;
            }
        });
        assert_eq!(steps, count, "each page was reached");
    }
    ticks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_those_of_the_literature() {
        let two = |guest_leaf_bytes, ept_leaf_bytes| Translation::Two {
            guest_leaf_bytes,
            ept_leaf_bytes,
            tables_leaf_bytes: 4096,
        };
        let one = |levels, leaf_bytes| Translation::One { levels, leaf_bytes };
        assert_eq!(one(4, 4096).references(), 4);
        assert_eq!(one(5, 4096).references(), 5);
        assert_eq!(one(4, 2 << 20).references(), 3);
        assert_eq!(two(4096, 4096).references(), 24);
        assert_eq!(two(2 << 20, 2 << 20).references(), 18);
        assert_eq!(two(1 << 30, 4096).references(), 14);
        assert_eq!(two(1 << 30, 2 << 20).references(), 13);
        assert_eq!(two(1 << 30, 2 << 20).reach(), 2 << 20);
    }
}
