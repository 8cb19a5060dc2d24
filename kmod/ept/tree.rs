// SPDX-License-Identifier: GPL-2.0

//! The paging structures themselves: install, zap, age. Everything here is under the space's lock.
//!
//! A table that a zap or a large leaf takes out of the tree is handed to the caller, who frees it after the flush: a CPU
//! that walks with a stale paging-structure cache walks tables that exist.

use crate::arch::addr::Gpa;
use crate::arch::addr::Hpa;
use crate::arch::addr::Level;
use crate::arch::ept::EptEntry;
use crate::counters;
use crate::sys::mem;
use crate::sys::mem::Page;
use crate::sys::mem::Pile;
use core::ops::Range;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;
use kernel::prelude::*;

pub(super) const ENTRIES: usize = 512;

/// Tables that one installation can need: one of each level below the root.
const MOST_TABLES: usize = 3;

/// Pages allocated before the lock is taken.
pub(crate) struct PageCache([Option<Page>; MOST_TABLES]);

impl PageCache {
    pub(crate) const fn new() -> Self {
        Self([const { None }; MOST_TABLES])
    }

    /// Makes it full; may sleep. ENOMEM.
    pub(crate) fn fill(&mut self) -> Result {
        for slot in &mut self.0 {
            if slot.is_none() {
                *slot = Some(Page::new()?);
            }
        }
        Ok(())
    }

    fn take(&mut self) -> Option<Page> {
        self.0.iter_mut().find_map(Option::take)
    }
}

/// A tree of four levels.
///
/// # Invariants
///
/// Every present entry that is not a leaf refers to a table that this tree owns, and no other does.
pub(crate) struct Tree {
    root: Page,
}

impl Tree {
    /// An empty tree. ENOMEM.
    pub(crate) fn new() -> Result<Self> {
        let root = Page::new()?;
        counters::EPT_PAGES.fetch_add(1, Relaxed);
        Ok(Self { root })
    }

    pub(crate) fn root(&self) -> Hpa {
        // A page of RAM.
        Hpa::new(self.root.hpa()).unwrap_or(Hpa::new(0).unwrap())
    }

    fn root_table(&self) -> &[AtomicU64; ENTRIES] {
        // SAFETY: A page is a table; the CPU reads it, and writes accessed and dirty bits, atomically.
        unsafe { &*self.root.as_ptr().cast() }
    }

    /// The table that a present non-leaf entry refers to.
    fn table(&self, entry: EptEntry) -> &[AtomicU64; ENTRIES] {
        // SAFETY: By the invariant it is a table of this tree, which lives as long.
        unsafe { &*mem::phys_to_virt(entry.hpa().as_u64()).cast() }
    }

    /// Installs a leaf; its neighbours stay. A table in its place is taken out; a larger leaf over it stays.
    pub(crate) fn install(&mut self, gpa: Gpa, leaf: EptEntry, level: Level, pages: &mut PageCache) -> Install {
        let mut table = self.root_table();
        for at in Level::DOWN {
            let slot = &table[at.index(gpa.as_u64())];
            let entry = EptEntry::from_raw(slot.load(Relaxed));
            if at == level {
                if entry.is_present() && !entry.is_leaf(at) {
                    // Leaves are of 2 MiB at most, so the table holds 4 KiB leaves and no further tables.
                    debug_assert!(at == Level::Page2M);
                    slot.store(leaf.as_u64(), Relaxed);
                    counters::EPT_PAGES.fetch_sub(1, Relaxed);
                    // SAFETY: By the invariant the table is ours; the entry that referred to it is gone.
                    return Install::ReplacedTable(unsafe { Page::from_hpa(entry.hpa().as_u64()) });
                }
                if entry.is_present() && entry.covers(leaf) {
                    return Install::Present;
                }
                slot.store(leaf.as_u64(), Relaxed);
                // An entry that allows more needs no flush: the violation itself dropped what the CPU had cached of the
                // old one, and another CPU that still has it comes here by a violation of its own (SDM, "Operations
                // that Invalidate Cached Mappings").
                return if entry.is_present() && !leaf.covers(entry) {
                    Install::Replaced
                } else {
                    Install::Installed
                };
            }
            if !entry.is_present() {
                let Some(page) = pages.take() else {
                    return Install::NeedPages;
                };
                counters::EPT_PAGES.fetch_add(1, Relaxed);
                // INVARIANT: A fresh, zeroed table that only this entry refers to.
                let new = EptEntry::table(Hpa::new(page.into_hpa()).unwrap_or(self.root()));
                slot.store(new.as_u64(), Relaxed);
                table = self.table(new);
            } else if entry.is_leaf(at) {
                return Install::Blocked;
            } else {
                table = self.table(entry);
            }
        }
        Install::Blocked
    }

    /// The table whose entries are of `level`, where `gpa` has one.
    #[inline(always)]
    pub(crate) fn table_at(&self, gpa: Gpa, level: Level) -> Option<&[AtomicU64; ENTRIES]> {
        let mut table = self.root_table();
        for at in Level::DOWN {
            if at == level {
                return Some(table);
            }
            let entry = EptEntry::from_raw(table[at.index(gpa.as_u64())].load(Relaxed));
            if !entry.is_table() {
                return None;
            }
            table = self.table(entry);
        }
        None
    }

    /// The leaf that translates `gpa`.
    pub(crate) fn lookup(&self, gpa: Gpa) -> Option<(EptEntry, Level)> {
        let mut table = self.root_table();
        for level in Level::DOWN {
            let entry = EptEntry::from_raw(table[level.index(gpa.as_u64())].load(Relaxed));
            if !entry.is_present() {
                return None;
            }
            if entry.is_leaf(level) {
                return Some((entry, level));
            }
            table = self.table(entry);
        }
        None
    }

    /// Clears every leaf that touches the range, and takes out tables of which all is in it; says whether there was
    /// anything. The caller flushes, and frees the tables only then.
    pub(crate) fn zap(&mut self, range: Range<u64>, tables: &mut Pile) -> bool {
        self.zap_table(self.root_table(), Level::P512G, range, tables)
    }

    fn zap_table(&self, table: &[AtomicU64; ENTRIES], level: Level, range: Range<u64>, tables: &mut Pile) -> bool {
        if level == Level::Page4K {
            return Self::zap_leaves(table, range);
        }
        let mut found = false;
        let mut at = range.start;
        while at < range.end {
            let start = at & !(level.bytes() - 1);
            let next = start.saturating_add(level.bytes());
            let slot = &table[level.index(at)];
            let entry = EptEntry::from_raw(slot.load(Relaxed));
            if entry.is_present() {
                if entry.is_leaf(level) {
                    slot.store(0, Relaxed);
                    found = true;
                } else if let Some(below) = level.below() {
                    if start >= range.start && next <= range.end {
                        slot.store(0, Relaxed);
                        self.take_out(entry, level, tables);
                        found = true;
                    } else {
                        found |= self.zap_table(self.table(entry), below, at..next.min(range.end), tables);
                    }
                }
            }
            at = next;
        }
        found
    }

    /// The same in a table of leaves of 4 KiB, which covers the range.
    fn zap_leaves(table: &[AtomicU64; ENTRIES], range: Range<u64>) -> bool {
        if range.is_empty() {
            return false;
        }
        let first = Level::Page4K.index(range.start);
        let last = Level::Page4K.index(range.end - 1);
        let mut found = false;
        for slot in table.get(first..=last).unwrap_or(&[]) {
            if slot.load(Relaxed) != 0 {
                slot.store(0, Relaxed);
                found = true;
            }
        }
        found
    }

    /// Puts the table that `entry`, of `level`, refers to, and all below it, on the pile. The entry is gone already; a
    /// CPU may walk the tables until the flush.
    fn take_out(&self, entry: EptEntry, level: Level, tables: &mut Pile) {
        match level.below() {
            None | Some(Level::Page4K) => {}
            Some(below) => {
                for slot in self.table(entry) {
                    let entry = EptEntry::from_raw(slot.load(Relaxed));
                    if entry.is_present() && !entry.is_leaf(below) {
                        self.take_out(entry, below, tables);
                    }
                }
            }
        }
        counters::EPT_PAGES.fetch_sub(1, Relaxed);
        // SAFETY: By the invariant the table is ours, and only `entry` referred to it.
        tables.push(unsafe { Page::from_hpa(entry.hpa().as_u64()) });
    }

    /// Whether any leaf that touches the range is marked accessed; `clear` unmarks them.
    pub(crate) fn is_young(&mut self, range: Range<u64>, clear: bool) -> bool {
        let mut young = false;
        self.for_each_leaf(range, |slot, entry| {
            if entry.is_accessed() {
                young = true;
                if clear {
                    slot.fetch_and(!EptEntry::ACCESSED, Relaxed);
                }
            }
        });
        young
    }

    /// Calls `f` for every leaf that touches the range.
    fn for_each_leaf(&self, range: Range<u64>, mut f: impl FnMut(&AtomicU64, EptEntry)) {
        self.visit(self.root_table(), Level::P512G, range, &mut f);
    }

    fn visit(
        &self,
        table: &[AtomicU64; ENTRIES],
        level: Level,
        range: Range<u64>,
        f: &mut impl FnMut(&AtomicU64, EptEntry),
    ) {
        let mut at = range.start;
        while at < range.end {
            let next = (at & !(level.bytes() - 1)).saturating_add(level.bytes());
            let slot = &table[level.index(at)];
            let entry = EptEntry::from_raw(slot.load(Relaxed));
            if entry.is_present() {
                if entry.is_leaf(level) {
                    f(slot, entry);
                } else if let Some(below) = level.below() {
                    self.visit(self.table(entry), below, at..next.min(range.end), f);
                }
            }
            at = next;
        }
    }

    /// Frees the tables below `entry`, and itself.
    fn free(&self, entry: EptEntry, level: Level) {
        if let Some(below) = level.below() {
            crate::sys::thread::reschedule();
            for slot in self.table(entry) {
                let entry = EptEntry::from_raw(slot.load(Relaxed));
                if entry.is_present() && !entry.is_leaf(level) {
                    self.free(entry, below);
                }
            }
        }
        // SAFETY: By the invariant the table is ours, and only `entry` refers to it.
        drop(unsafe { Page::from_hpa(entry.hpa().as_u64()) });
        counters::EPT_PAGES.fetch_sub(1, Relaxed);
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        for slot in self.root_table() {
            let entry = EptEntry::from_raw(slot.load(Relaxed));
            if entry.is_present() {
                self.free(entry, Level::Page1G);
            }
        }
        counters::EPT_PAGES.fetch_sub(1, Relaxed);
    }
}

/// Has `slot`, in a table of `level`, allow what `leaf` does, where that needs no flush; see [`Tree::install`]. False: it does.
#[inline(always)]
pub(crate) fn set_at_once(slot: &AtomicU64, leaf: EptEntry, level: Level) -> bool {
    let old = EptEntry::from_raw(slot.load(Relaxed));
    if old.is_present() {
        if old.covers(leaf) {
            return true;
        }
        if !old.is_leaf(level) || !leaf.covers(old) {
            return false;
        }
    }
    slot.store(leaf.as_u64(), Relaxed);
    true
}

/// Answer of [`Tree::install`].
#[must_use]
pub(crate) enum Install {
    Installed,
    /// A table was in its place: the caller flushes, then drops it.
    ReplacedTable(Page),
    /// Another page was there, or one with other permissions: the caller flushes.
    Replaced,
    /// It was there already.
    Present,
    /// A larger leaf covers the place.
    Blocked,
    /// [`PageCache::fill`] and again.
    NeedPages,
}
