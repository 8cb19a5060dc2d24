// SPDX-License-Identifier: GPL-2.0

//! EPT violations that are settled in the window of their exit, interrupts off: the process has the page, and neither a table
//! nor a flush is needed. `fault.rs` does the rest.
//!
//! The CPU still counts as in the guest, and whoever holds the lock may wait for it (`Translations::invalidate`): so the lock
//! is taken only where it is free. The process' page table is read under it, while no invalidation goes on; one that comes
//! finds what was installed. That makes the sequence count, which tells who walked before an invalidation ended, unneeded.

use super::fault::allows;
use super::fault::Access;
use super::fault::Ept;
use super::fault::Mapped;
use super::host_walk;
use super::host_walk::Format;
use super::host_walk::Lowest;
use super::tree;
use super::tree::Tree;
use super::tree::ENTRIES;
use crate::arch::addr::Gpa;
use crate::arch::addr::Hva;
use crate::arch::addr::Level;
use crate::arch::ept::EptEntry;
use crate::arch::host_pte::HostPte;
use crate::arch::host_pte::LeafMaker;
use crate::arch::host_pte::LikeOne;
use crate::sys::cpu::IrqOff;
use crate::sys::mm::Mm;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;

/// What became of one.
#[derive(Clone, Copy)]
pub(crate) enum AtOnce {
    /// The EPT allows the access now.
    Mapped(Mapped),
    /// The process' page table does not allow it, as it is.
    Absent(Hva),
    /// Somebody is in the way, or more is needed.
    Later,
}

/// Pages that come along: as many as Linux maps around a fault in a file.
const AROUND: usize = 16;

impl Ept {
    /// Settles an EPT violation at `gpa`. `wanted`: bits that the leaf must have; `around`: neighbours that are there come
    /// along. The caller is a thread of the process.
    #[inline(never)]
    pub(crate) fn fault_at_once(&self, mm: Mm, gpa: Gpa, wanted: u64, around: bool, irq: &IrqOff) -> AtOnce {
        if crate::sys::knob_slow_faults() {
            return AtOnce::Later;
        }
        let Some(guard) = self.lock.try_lock() else {
            return AtOnce::Later;
        };
        if guard.invalidating != 0 && !cfg!(dune_mutate_retry) {
            return AtOnce::Later;
        }
        let (Some(hva), Some(tree)) = (guard.slots.hva_of(gpa), &guard.tree) else {
            return AtOnce::Later;
        };
        let (from, walk) = match host_walk::lowest(mm, hva, self.traits.format, irq) {
            Lowest::Absent => return AtOnce::Absent(hva),
            Lowest::Large => return self.large_at_once(tree, mm, hva, gpa, wanted, irq),
            Lowest::Table(from, walk) => (from, walk),
        };
        let maker = self.traits.format.maker(walk);
        let index = Level::Page4K.index(hva.as_u64());
        let entry = HostPte::new(from[index].load(Relaxed));
        let leaf = EptEntry::from_raw(maker.make(entry));
        // A walk may be reported as no access at all.
        let wanted = wanted | EptEntry::READ;
        if wanted & !leaf.as_u64() != 0 {
            return AtOnce::Absent(hva);
        }
        let Some(to) = tree.table_at(gpa, Level::Page4K) else {
            return AtOnce::Later;
        };
        // Where accessed bits tell what was used of them.
        let chunks = if around && self.traits.accessed_dirty {
            chunk(from, index).zip(chunk(to, index))
        } else {
            None
        };
        let around = match chunks {
            // The first of its neighbourhood.
            Some((from, to)) if is_empty(to) => install_all(from, to, maker, maker.like(entry, leaf)),
            _ if !tree::set_at_once(&to[index], leaf, Level::Page4K) => return AtOnce::Later,
            Some((from, to)) => install_missing(from, to, maker),
            None => 0,
        };
        AtOnce::Mapped(Mapped::new(Level::Page4K, leaf, around))
    }

    #[inline(never)]
    fn large_at_once(&self, tree: &Tree, mm: Mm, hva: Hva, gpa: Gpa, wanted: u64, irq: &IrqOff) -> AtOnce {
        let access = Access {
            write: wanted & EptEntry::WRITE != 0,
            execute: wanted & EptEntry::EXECUTE != 0,
        };
        let leaf = host_walk::walk(mm, hva, self.traits.format, irq);
        let Some(leaf) = leaf.filter(|leaf| allows(leaf, access)) else {
            return AtOnce::Absent(hva);
        };
        let level = self.level_for(&leaf);
        let piece = leaf.piece(hva, level);
        let entry = EptEntry::leaf(piece.hpa, level, piece.perms(), piece.mem_type);
        match tree.table_at(gpa, level) {
            Some(table) if tree::set_at_once(&table[level.index(gpa.as_u64())], entry, level) => {
                AtOnce::Mapped(Mapped::new(level, entry, 0))
            }
            _ => AtOnce::Later,
        }
    }
}

impl Format {
    fn maker(&self, walk: host_walk::Walk) -> LeafMaker {
        LeafMaker::of(walk, self.pat, self.plain)
    }
}

type Chunk = [AtomicU64; AROUND];

/// The neighbourhood of an entry.
#[inline(always)]
fn chunk(table: &[AtomicU64; ENTRIES], index: usize) -> Option<&Chunk> {
    table.get(index & !(AROUND - 1)..)?.first_chunk()
}

/// Does `$once` for each entry of a chunk: the compiler makes more instructions of a loop.
macro_rules! for_each {
    ($i:ident, $once:expr) => {
        for_each!(@ $i, $once, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (@ $i:ident, $once:expr, $($n:literal)*) => {
        $({ const $i: usize = $n; $once })*
    };
}

#[inline(always)]
fn is_empty(to: &Chunk) -> bool {
    let mut all = 0;
    for_each!(I, all |= to[I].load(Relaxed));
    all == 0
}

/// Puts leaves of 4 KiB for the entries of `from` into `to`, the EPT's chunk for the same pages, which has none. Gives how many
/// besides the one that is asked for, whose entry and leaf `like` has. Needs no flush.
#[inline(always)]
fn install_all(from: &Chunk, to: &Chunk, maker: LeafMaker, like: LikeOne) -> u64 {
    const NEIGHBOURS: u64 = AROUND as u64 - 1;
    match install_alike(from, to, like) {
        0 => NEIGHBOURS,
        unlike => NEIGHBOURS.saturating_sub(install_unlike(from, to, maker, unlike)),
    }
}

/// The same for those that differ in the page only. Gives a bit for each other. By itself, so that all that it needs is in registers.
#[inline(never)]
fn install_alike(from: &Chunk, to: &Chunk, like: LikeOne) -> u32 {
    let mut unlike = 0;
    for_each!(I, {
        match like.make(HostPte::new(from[I].load(Relaxed))) {
            Some(leaf) => to[I].store(leaf, Relaxed),
            None => unlike |= 1 << I,
        }
    });
    unlike
}

/// Puts leaves for those whose bits are set; how many there are none for.
#[cold]
#[inline(never)]
fn install_unlike(from: &Chunk, to: &Chunk, maker: LeafMaker, unlike: u32) -> u64 {
    let pairs = from.iter().zip(to).enumerate();
    pairs.fold(0u64, |absent, (index, (from, to))| {
        absent.wrapping_add(u64::from(unlike & 1 << index != 0 && !install(from, to, &maker)))
    })
}

/// Puts leaves where there are none; how many.
#[inline(never)]
fn install_missing(from: &Chunk, to: &Chunk, maker: LeafMaker) -> u64 {
    let pairs = from.iter().zip(to);
    pairs.fold(0u64, |installed, (from, to)| {
        installed.wrapping_add(u64::from(to.load(Relaxed) == 0 && install(from, to, &maker)))
    })
}

/// Puts the leaf for an entry where there is none; whether it has one.
#[inline(always)]
fn install(from: &AtomicU64, to: &AtomicU64, maker: &LeafMaker) -> bool {
    let leaf = maker.make(HostPte::new(from.load(Relaxed)));
    if leaf != 0 {
        to.store(leaf, Relaxed);
    }
    leaf != 0
}
