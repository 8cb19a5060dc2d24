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
        if !tree::set_at_once(&to[index], leaf, Level::Page4K) {
            return AtOnce::Later;
        }
        // Where accessed bits tell what was used of them.
        let around = if around && self.traits.accessed_dirty {
            install_around(from, to, index & !(AROUND - 1), maker, maker.like(entry, leaf))
        } else {
            0
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

/// Puts leaves of 4 KiB for [`AROUND`] entries of `from` from `first` on, where `to`, the EPT's table for the same 2 MiB, has
/// nothing. Gives how many. Needs no flush.
#[inline(always)]
fn install_around(
    from: &[AtomicU64; ENTRIES],
    to: &[AtomicU64; ENTRIES],
    first: usize,
    maker: LeafMaker,
    like: LikeOne,
) -> u64 {
    let (Some(from), Some(to)) = (chunk(from, first), chunk(to, first)) else {
        return 0;
    };
    let mut installed = 0u64;
    // One by one, since the compiler makes four times as many instructions of a loop.
    macro_rules! install {
        ($($i:literal)*) => {
            $(
                match like.make(HostPte::new(from[$i].load(Relaxed))) {
                    Ok(leaf) => {
                        if to[$i].load(Relaxed) == 0 {
                            to[$i].store(leaf, Relaxed);
                            installed = installed.wrapping_add(1);
                        }
                    }
                    Err(entry) => installed = installed.wrapping_add(install_unlike(&to[$i], &maker, entry)),
                }
            )*
        };
    }
    install!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
    installed
}

#[inline(always)]
fn chunk(table: &[AtomicU64; ENTRIES], first: usize) -> Option<&[AtomicU64; AROUND]> {
    table.get(first..)?.first_chunk()
}

#[cold]
#[inline(never)]
fn install_unlike(to: &AtomicU64, maker: &LeafMaker, entry: HostPte) -> u64 {
    let leaf = maker.make(entry);
    if leaf == 0 || to.load(Relaxed) != 0 {
        return 0;
    }
    to.store(leaf, Relaxed);
    1
}
