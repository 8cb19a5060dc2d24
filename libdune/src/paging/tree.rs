// SPDX-License-Identifier: MIT OR Apache-2.0

//! Walking and changing a tree of tables, over any source of table pages.

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::AcqRel;
use core::sync::atomic::Ordering::Relaxed;

use super::entry::leaf_bytes;
use super::entry::Entry;
use super::entry::Kind;
use super::PagingError;
use super::Permissions;
use crate::addr::Gpa;
use crate::addr::Gva;
use crate::addr::Hva;
use crate::addr::PAGE_BYTES;
use crate::addr::USER_END;

/// One page of entries.
#[repr(C, align(4096))]
pub(crate) struct Table(pub [AtomicU64; 512]);

/// Where table pages come from and where memory is in GPA space.
///
/// # Safety
///
/// `allocate` gives a zeroed page that is used for nothing else until `free`, and `table` finds it by its GPA.
pub(crate) unsafe trait Frames {
    /// A zeroed page for a table.
    fn allocate(&self) -> Result<Gpa, PagingError>;
    /// Gives back a page that no entry refers to any more.
    fn free(&self, table: Gpa);
    /// The table at a GPA.
    fn table(&self, gpa: Gpa) -> Option<&Table>;
    /// The GPA of a byte of the process.
    fn gpa(&self, hva: Hva) -> Result<Gpa, PagingError>;
    /// Whether leaves of 1 GiB may be used.
    fn has_1g(&self) -> bool;
}

/// What an address is mapped to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// GPA of the address itself.
    pub gpa: Gpa,
    /// Bytes of the page: 4 KiB, 2 MiB or 1 GiB.
    pub page_bytes: u64,
    /// What it may be used for.
    pub permissions: Permissions,
    /// The CPU used the page since this was cleared.
    pub accessed: bool,
    /// The CPU wrote to the page since this was cleared.
    pub dirty: bool,
}

/// A tree of tables and where its pages come from.
#[derive(Clone, Copy)]
pub(crate) struct Tree<'f, F> {
    pub frames: &'f F,
    pub root: Gpa,
}

impl<'f, F: Frames> Tree<'f, F> {
    /// An empty tree.
    pub fn new(frames: &'f F) -> Result<Self, PagingError> {
        Ok(Self {
            frames,
            root: frames.allocate()?,
        })
    }

    fn table(&self, gpa: Gpa) -> Result<&'f Table, PagingError> {
        self.frames.table(gpa).ok_or(PagingError::Corrupt(gpa.as_u64()))
    }

    fn table_of(&self, entry: Entry) -> Result<&'f Table, PagingError> {
        let gpa = Gpa::new(entry.address()).ok_or(PagingError::Corrupt(entry.address()))?;
        self.table(gpa)
    }

    /// The entry that decides about `gva`, and its level: the first one on the way that refers to no table.
    fn find(&self, gva: Gva) -> Result<(u32, &'f AtomicU64), PagingError> {
        self.find_down_to(1, gva)
    }

    /// As `find`, but not below `lowest`.
    fn find_down_to(&self, lowest: u32, gva: Gva) -> Result<(u32, &'f AtomicU64), PagingError> {
        let mut level = 4;
        let mut table = self.table(self.root)?;
        loop {
            let slot = &table.0[gva.index(level)];
            let entry = Entry(slot.load(Relaxed));
            if level == lowest || entry.kind(level) != Kind::Table {
                return Ok((level, slot));
            }
            table = self.table_of(entry)?;
            level -= 1;
        }
    }

    /// What `gva` is mapped to, with `Permissions::NONE` where the page is kept but not accessible.
    pub fn look_up(&self, gva: Gva) -> Option<Mapping> {
        let (level, slot) = self.find(gva).ok()?;
        let entry = Entry(slot.load(Relaxed));
        if entry.kind(level) != Kind::Leaf {
            return None;
        }
        let bytes = leaf_bytes(level);
        Some(Mapping {
            gpa: Gpa::new((entry.address() & !(bytes - 1)) + (gva.as_u64() & (bytes - 1)))?,
            page_bytes: bytes,
            permissions: entry.permissions(),
            accessed: entry.is_accessed(),
            dirty: entry.is_dirty(),
        })
    }

    /// Replaces the gap or leaf in `slot` by a table that means the same.
    fn split(&self, level: u32, slot: &AtomicU64) -> Result<(), PagingError> {
        let old = Entry(slot.load(Relaxed));
        let gpa = self.frames.allocate()?;
        let table = self.table(gpa)?;
        if old != Entry::EMPTY {
            for (index, piece) in table.0.iter().enumerate() {
                piece.store(old.piece(level, index as u64).0, Relaxed);
            }
        }
        // A page fault of ours may have filled the entry in between: then it stays as it is and the caller looks again.
        if slot
            .compare_exchange(old.0, Entry::table(gpa).0, AcqRel, Relaxed)
            .is_err()
        {
            self.frames.free(gpa);
        }
        Ok(())
    }

    /// Whether [`Tree::fill`] has nothing to do for `gva`.
    pub fn is_decided(&self, gva: Gva) -> bool {
        self.find(gva)
            .is_ok_and(|(level, slot)| Entry(slot.load(Relaxed)).kind(level) != Kind::Empty)
    }

    /// Maps the GiB of `gva` to itself if nothing decided about it yet; says whether it changed anything.
    pub fn fill(&self, gva: Gva) -> Result<bool, PagingError> {
        let Some(hva) = gva.identity() else {
            return Ok(false);
        };
        let start = hva.align_down(leaf_bytes(3));
        loop {
            let (level, slot) = self.find_down_to(3, gva)?;
            match Entry(slot.load(Relaxed)).kind(level) {
                Kind::Empty => {}
                Kind::Table => return self.fill_below(gva, hva),
                Kind::Leaf | Kind::Gone => return Ok(false),
            }
            if level > 3 {
                self.split(level, slot)?;
                continue;
            }
            let page = self.frames.gpa(start)?;
            let entry = if self.frames.has_1g() {
                Entry::leaf(page, 3, Permissions::ALL)
            } else {
                let gpa = self.frames.allocate()?;
                let table = self.table(gpa)?;
                // A 1 GiB leaf that this CPU cannot have, taken to pieces that it can.
                let whole = Entry::leaf(page, 3, Permissions::ALL);
                for (index, piece) in table.0.iter().enumerate() {
                    piece.store(whole.piece(3, index as u64).0, Relaxed);
                }
                Entry::table(gpa)
            };
            if slot.compare_exchange(Entry::EMPTY.0, entry.0, AcqRel, Relaxed).is_err() && entry.kind(3) == Kind::Table
            {
                // Another thread was first.
                if let Some(table) = Gpa::new(entry.address()) {
                    self.frames.free(table);
                }
            }
            return Ok(true);
        }
    }

    /// The same where a table decides about the GiB, of which parts were emptied when its slot was given back.
    fn fill_below(&self, gva: Gva, hva: Hva) -> Result<bool, PagingError> {
        let (level, slot) = self.find(gva)?;
        if level > 2 || Entry(slot.load(Relaxed)).kind(level) != Kind::Empty {
            return Ok(false);
        }
        let page = self.frames.gpa(hva.align_down(leaf_bytes(level)))?;
        let leaf = Entry::leaf(page, level, Permissions::ALL);
        let _ = slot.compare_exchange(Entry::EMPTY.0, leaf.0, Relaxed, Relaxed);
        Ok(true)
    }

    /// Replaces every leaf of the range by what `change` makes of it, splitting those that reach beyond it.
    ///
    /// Memory of the process that was not used yet is filled in first, so that the range is what it looks like.
    fn change(&self, start: Gva, bytes: u64, change: impl Fn(Entry, u32) -> Entry) -> Result<(), PagingError> {
        let mut done = 0;
        while done < bytes {
            let at = start
                .checked_add(done)
                .ok_or(PagingError::OutOfRange { start, bytes })?;
            let (level, slot) = self.find(at)?;
            let entry = Entry(slot.load(Relaxed));
            if entry.kind(level) != Kind::Leaf {
                if entry.kind(level) == Kind::Empty && self.fill(at)? {
                    continue;
                }
                return Err(PagingError::NotMapped(at));
            }
            let size = leaf_bytes(level);
            if at.is_aligned(size) && bytes - done >= size {
                // Where the CPU set a bit, or another thread was first, it is looked at again.
                let changed = change(entry, level).0;
                if slot.compare_exchange(entry.0, changed, AcqRel, Relaxed).is_ok() {
                    done += size;
                }
            } else {
                self.split(level, slot)?;
            }
        }
        Ok(())
    }

    /// Gives the pages of the range other permissions.
    pub fn protect(&self, start: Gva, bytes: u64, permissions: Permissions) -> Result<(), PagingError> {
        check_range(start, bytes)?;
        self.change(start, bytes, |entry, _| entry.with_permissions(permissions))
    }

    /// Gives the pages of the range to CPL3 too, or takes them away.
    pub fn set_user(&self, start: Gva, bytes: u64, user: bool) -> Result<(), PagingError> {
        check_range(start, bytes)?;
        self.change(start, bytes, |entry, _| entry.with_user(user))
    }

    /// Clears accessed and dirty of the pages of the range, after splitting them to 4 KiB.
    pub fn clear_accessed_dirty(&self, start: Gva, bytes: u64) -> Result<(), PagingError> {
        check_range(start, bytes)?;
        for page in 0..bytes / PAGE_BYTES {
            let at = start
                .checked_add(page * PAGE_BYTES)
                .ok_or(PagingError::OutOfRange { start, bytes })?;
            self.change(at, PAGE_BYTES, |entry, _| entry.with_accessed_dirty_clear())?;
        }
        Ok(())
    }

    /// Takes the range out of the table. What lies there in the process stays as it is.
    pub fn unmap(&self, start: Gva, bytes: u64) -> Result<(), PagingError> {
        check_range(start, bytes)?;
        self.change(start, bytes, |_, _| Entry::GONE)
    }

    /// Maps the range to the memory of the process at `to`, in pages of 4 KiB, whatever was there before.
    pub fn map(&self, start: Gva, bytes: u64, to: Hva, permissions: Permissions) -> Result<(), PagingError> {
        check_range(start, bytes)?;
        if !to.is_aligned(PAGE_BYTES) {
            return Err(PagingError::Unaligned { start, bytes });
        }
        let mut done = 0;
        while done < bytes {
            let out_of_range = PagingError::OutOfRange { start, bytes };
            let at = start.checked_add(done).ok_or(out_of_range)?;
            let page = self.frames.gpa(to.checked_add(done).ok_or(out_of_range)?)?;
            let (level, slot) = self.find(at)?;
            if level == 1 {
                slot.store(Entry::leaf(page, 1, permissions).0, Relaxed);
                done += PAGE_BYTES;
            } else if Entry(slot.load(Relaxed)).kind(level) != Kind::Empty || !self.fill(at)? {
                self.split(level, slot)?;
            }
        }
        Ok(())
    }

    /// A tree of its own tables that maps the same.
    pub fn duplicate(&self) -> Result<Self, PagingError> {
        Ok(Self {
            frames: self.frames,
            root: self.duplicate_table(self.root, 4)?,
        })
    }

    fn duplicate_table(&self, from: Gpa, level: u32) -> Result<Gpa, PagingError> {
        let copy = self.frames.allocate()?;
        let source = self.table(from)?;
        let target = self.table(copy)?;
        for (slot, new) in source.0.iter().zip(&target.0) {
            let entry = Entry(slot.load(Relaxed));
            if entry.kind(level) == Kind::Table {
                let below = Gpa::new(entry.address()).ok_or(PagingError::Corrupt(entry.address()))?;
                match self.duplicate_table(below, level - 1) {
                    Ok(table) => new.store(Entry::table(table).0, Relaxed),
                    Err(error) => {
                        self.free_table(copy, level);
                        return Err(error);
                    }
                }
            } else {
                new.store(entry.0, Relaxed);
            }
        }
        Ok(copy)
    }

    /// Gives all tables back. The tree must not be used afterwards, by the CPU or by us.
    pub fn free(&self) {
        self.free_table(self.root, 4);
    }

    fn free_table(&self, gpa: Gpa, level: u32) {
        if let Some(table) = self.frames.table(gpa) {
            for slot in &table.0 {
                let entry = Entry(slot.load(Relaxed));
                if entry.kind(level) == Kind::Table {
                    if let Some(below) = Gpa::new(entry.address()) {
                        self.free_table(below, level - 1);
                    }
                }
            }
        }
        self.frames.free(gpa);
    }
}

/// Checks that a range is whole pages inside one half of the address space.
fn check_range(start: Gva, bytes: u64) -> Result<(), PagingError> {
    if !start.is_aligned(PAGE_BYTES) || bytes % PAGE_BYTES != 0 {
        return Err(PagingError::Unaligned { start, bytes });
    }
    if bytes != 0 {
        let last = start
            .checked_add(bytes - 1)
            .ok_or(PagingError::OutOfRange { start, bytes })?;
        if (last.as_u64() < USER_END) != (start.as_u64() < USER_END) {
            return Err(PagingError::OutOfRange { start, bytes });
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "tree_tests.rs"]
mod tests;
