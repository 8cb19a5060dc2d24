// SPDX-License-Identifier: MIT OR Apache-2.0

//! Walking and changing a tree of tables, over any source of table pages.

use core::cell::Cell;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::AcqRel;
use core::sync::atomic::Ordering::Relaxed;

use super::entry::leaf_bytes;
use super::entry::Entry;
use super::entry::Kind;
use super::used::Used;
use super::PagingError;
use super::Permissions;
use crate::addr::Gpa;
use crate::addr::Gva;
use crate::addr::Hva;
use crate::addr::PAGE_BYTES;
use crate::addr::USER_END;

/// Entries that are looked at together at first: most are no more than what they say.
const GROUP: usize = 8;

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
    /// What memory of the process may be used for that is filled in.
    fn fill_permissions(&self, _hva: Hva) -> Permissions {
        Permissions::ALL
    }
    /// Counts one more entry that owns a frame of a pool; false where nobody owns it any more.
    fn keep(&self, frame: Gpa) -> bool;
    /// One less: at once, where no CPU can have a translation to it.
    fn release(&self, frame: Gpa);
    /// One less, as soon as `retired` is flushed.
    fn retire(&self, frame: Gpa, retired: &Retired);
}

/// Frames that go back to their pool when the TLBs are flushed: the head of a list that the pool links.
#[derive(Debug, Default)]
pub(crate) struct Retired(pub Cell<u64>);

impl Retired {
    pub fn is_empty(&self) -> bool {
        self.0.get() == 0
    }
}

/// What an address is mapped to.
///
/// # Examples
///
/// ```no_run
/// # #[repr(align(4096))]
/// # struct Page([u8; 4096]);
/// use libdune::paging::Mapping;
/// use libdune::{Dune, Gva};
///
/// let page = Box::new(Page([7; 4096]));
/// let dune = Dune::enter()?;
/// let start = Gva::of(&raw const *page).ok_or("not canonical")?;
/// // Touched, so that it is mapped.
/// assert_eq!(std::hint::black_box(&page).0[0], 7);
/// let mapping: Mapping = dune.address_space().look_up(start).ok_or("not mapped")?;
/// assert!(mapping.accessed && !mapping.copied_on_write && mapping.key == 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
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
    /// The first write gets a copy of the page.
    pub copied_on_write: bool,
    /// Protection key of a page that CPL3 may use, 0 to 15.
    pub key: u8,
}

impl Mapping {
    fn new(entry: Entry, level: u32, gva: Gva) -> Option<Self> {
        if entry.kind(level) != Kind::Leaf {
            return None;
        }
        let bytes = leaf_bytes(level);
        Some(Self {
            gpa: Gpa::new((entry.address() & !(bytes - 1)) + (gva.as_u64() & (bytes - 1)))?,
            page_bytes: bytes,
            permissions: entry.permissions(),
            accessed: entry.is_accessed(),
            dirty: entry.is_dirty(),
            copied_on_write: entry.is_copied_on_write(),
            key: entry.key(),
        })
    }
}

/// The entry that decides about an address.
#[derive(Clone, Copy)]
pub(super) struct Found<'f> {
    pub level: u32,
    pub slot: &'f AtomicU64,
    /// What it held when that was decided. Other threads, and handlers, may change it at any time: who acts on this value has
    /// to exchange it for the new one.
    pub entry: Entry,
}

impl Found<'_> {
    pub fn kind(&self) -> Kind {
        self.entry.kind(self.level)
    }

    /// Bytes from `at`, for which it was found, to the end of what it decides about.
    pub fn bytes_from(&self, at: Gva) -> u64 {
        let bytes = leaf_bytes(self.level);
        bytes - at.as_u64() % bytes
    }
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
        self.table(Gpa::truncated(entry.address()))
    }

    /// The entry that decides about `gva`: the first one on the way that refers to no table.
    pub(super) fn find(&self, gva: Gva) -> Result<Found<'f>, PagingError> {
        self.find_down_to(1, gva)
    }

    /// As `find`, but not below `lowest`, where it may refer to a table.
    pub(super) fn find_down_to(&self, lowest: u32, gva: Gva) -> Result<Found<'f>, PagingError> {
        let mut level = 4;
        let mut table = self.table(self.root)?;
        loop {
            let slot = &table.0[gva.index(level)];
            let entry = Entry(slot.load(Relaxed));
            if level == lowest || entry.kind(level) != Kind::Table {
                return Ok(Found { level, slot, entry });
            }
            table = self.table_of(entry)?;
            level -= 1;
        }
    }

    /// What `gva` is mapped to, with `Permissions::NONE` where the page is kept but not accessible.
    pub fn look_up(&self, gva: Gva) -> Option<Mapping> {
        let found = self.find(gva).ok()?;
        Mapping::new(found.entry, found.level, gva)
    }

    /// The first page at or behind `start` and before `start` + `bytes`: where it begins, or `start` inside it.
    pub fn next(&self, start: Gva, bytes: u64) -> Option<(Gva, Mapping)> {
        let mut done = 0;
        while done < bytes {
            let at = start.checked_add(done)?;
            let found = self.find(at).ok()?;
            if let Some(mapping) = Mapping::new(found.entry, found.level, at) {
                return Some((at, mapping));
            }
            done += found.bytes_from(at);
        }
        None
    }

    /// Replaces the gap or leaf that was found by a table that means the same. Where it is something else by now it stays, and
    /// the caller looks again.
    pub(super) fn split(&self, found: Found<'_>) -> Result<(), PagingError> {
        debug_assert!(found.kind() != Kind::Table);
        self.replace_by_table(found, |table| {
            if found.entry.0 != 0 || found.level == 3 {
                for (index, piece) in table.0.iter().enumerate() {
                    piece.store(found.entry.piece(found.level, index as u64).0, Relaxed);
                }
            }
        })
    }

    /// The same with a table that `fill` makes of an empty one.
    fn replace_by_table(&self, found: Found<'_>, fill: impl FnOnce(&Table)) -> Result<(), PagingError> {
        let gpa = self.frames.allocate()?;
        fill(self.table(gpa)?);
        let new = Entry::table(gpa);
        if found
            .slot
            .compare_exchange(found.entry.0, new.0, AcqRel, Relaxed)
            .is_err()
        {
            self.frames.free(gpa);
        }
        Ok(())
    }

    /// Whether the CPU finds a page at `gva`; `None`: nothing decided about it yet.
    pub fn has_page(&self, gva: Gva) -> Option<bool> {
        let found = self.find(gva).ok()?;
        (found.kind() != Kind::Empty).then(|| found.entry.is_present())
    }

    /// Replaces what was found to map nothing on purpose by a table of the same.
    pub(super) fn open(&self, found: Found<'_>) -> Result<(), PagingError> {
        debug_assert!(found.kind() == Kind::Gone);
        self.replace_by_table(found, |table| {
            if found.level > 3 {
                for piece in &table.0 {
                    piece.store(Entry::GONE.0, Relaxed);
                }
            }
        })
    }

    /// Maps the GiB of `gva` to itself if nothing decided about it yet; says whether there is a leaf now, be it another
    /// thread's, which was first.
    pub fn fill(&self, gva: Gva) -> Result<bool, PagingError> {
        let Some(hva) = gva.identity() else {
            return Ok(false);
        };
        let start = hva.align_down(leaf_bytes(3));
        loop {
            let found = self.find_down_to(3, gva)?;
            match found.kind() {
                Kind::Empty => {}
                Kind::Table => return self.fill_below(gva, hva),
                Kind::Leaf => return Ok(true),
                Kind::Gone => return Ok(false),
            }
            if found.level > 3 {
                self.split(found)?;
                continue;
            }
            let page = self.frames.gpa(start)?;
            let whole = Entry::leaf(page, 3, self.frames.fill_permissions(start));
            // Where another thread was first it stays as that one made it.
            if self.frames.has_1g() {
                let _ = found.slot.compare_exchange(found.entry.0, whole.0, AcqRel, Relaxed);
            } else {
                // A 1 GiB leaf that this CPU cannot have, taken to pieces that it can.
                self.replace_by_table(found, |table| {
                    for (index, piece) in table.0.iter().enumerate() {
                        piece.store(whole.piece(3, index as u64).0, Relaxed);
                    }
                })?;
            }
            return Ok(true);
        }
    }

    /// The same where a table decides about the GiB, of which parts were emptied when its slot was given back.
    fn fill_below(&self, gva: Gva, hva: Hva) -> Result<bool, PagingError> {
        let found = self.find(gva)?;
        match found.kind() {
            Kind::Empty if found.level <= 2 => {}
            kind => return Ok(kind == Kind::Leaf),
        }
        let page = self.frames.gpa(hva.align_down(leaf_bytes(found.level)))?;
        let leaf = Entry::leaf(page, found.level, self.frames.fill_permissions(hva));
        let _ = found.slot.compare_exchange(found.entry.0, leaf.0, Relaxed, Relaxed);
        Ok(true)
    }

    /// Replaces every leaf of the range by what `change` makes of it, splitting those that reach beyond it.
    ///
    /// Memory of the process that was not used yet is filled in first, so that the range is what it looks like.
    fn change(
        &self,
        start: Gva,
        bytes: u64,
        retired: &Retired,
        change: impl Fn(Entry) -> Entry,
    ) -> Result<(), PagingError> {
        self.change_all(start, bytes, retired, Unusual::Nothing, &change, &change)
    }

    /// The same, with something unusual about it. `change_plain` is `change` for plain leaves.
    #[inline]
    fn change_all(
        &self,
        start: Gva,
        bytes: u64,
        retired: &Retired,
        unusual: Unusual,
        change_plain: impl Fn(Entry) -> Entry,
        change: impl Fn(Entry) -> Entry,
    ) -> Result<(), PagingError> {
        let mut done = 0;
        while done < bytes {
            let at = start
                .checked_add(done)
                .ok_or(PagingError::OutOfRange { start, bytes })?;
            let found = self.find(at)?;
            let level = found.level;
            match found.kind() {
                Kind::Leaf => {}
                Kind::Empty if self.fill(at)? => continue,
                Kind::Gone if unusual == Unusual::SkipGone => {
                    done += found.bytes_from(at);
                    continue;
                }
                _ => return Err(PagingError::NotMapped(at)),
            }
            let size = leaf_bytes(level);
            if !at.is_aligned(size) || bytes - done < size || (level > 1 && unusual == Unusual::SplitAll) {
                self.split(found)?;
                continue;
            }
            let most = (bytes - done) / size;
            let slots = self.rest_of_table(found.slot, at.index(level));
            let slots = &slots[..slots.len().min(most as usize)];
            let plain = if level == 1 {
                change_plain_slots(slots, &change_plain)
            } else {
                0
            };
            done += (plain as u64 + self.change_slots(&slots[plain..], level, retired, &change)) * size;
        }
        Ok(())
    }

    /// Replaces entries up to the first that is no leaf, or that the CPU or another thread changes meanwhile: it is to be
    /// looked at again. Returns how many.
    fn change_slots(
        &self,
        slots: &[AtomicU64],
        level: u32,
        retired: &Retired,
        change: &impl Fn(Entry) -> Entry,
    ) -> u64 {
        let mut count = 0;
        for slot in slots {
            let entry = Entry(slot.load(Relaxed));
            let changed = change(entry);
            if entry.kind(level) != Kind::Leaf || slot.compare_exchange(entry.0, changed.0, AcqRel, Relaxed).is_err() {
                break;
            }
            if entry.is_owner() {
                self.retire(entry, changed, retired);
            }
            count += 1;
        }
        count
    }

    /// The entries of a table from `slot`, which is number `index`, to its end.
    pub(super) fn rest_of_table(&self, slot: &'f AtomicU64, index: usize) -> &'f [AtomicU64] {
        // SAFETY: The callers have them from `find`: entry `index` of a table of 512.
        unsafe { core::slice::from_raw_parts(slot, 512 - index) }
    }

    /// Gives the pages of the range other permissions.
    pub fn protect(&self, start: Gva, bytes: u64, permissions: Permissions) -> Result<(), PagingError> {
        check_range(start, bytes)?;
        self.change_all(
            start,
            bytes,
            &Retired::default(),
            Unusual::Nothing,
            |plain| plain.with_plain_permissions(permissions),
            |entry| entry.with_permissions(permissions),
        )
    }

    /// Gives the pages of the range to CPL3 too, or takes them away.
    pub fn set_user(&self, start: Gva, bytes: u64, user: bool) -> Result<(), PagingError> {
        check_range(start, bytes)?;
        self.change(start, bytes, &Retired::default(), |entry| entry.with_user(user))
    }

    /// Gives the pages of the range a protection key.
    pub fn set_key(&self, start: Gva, bytes: u64, key: u8) -> Result<(), PagingError> {
        check_range(start, bytes)?;
        self.change(start, bytes, &Retired::default(), |entry| entry.with_key(key))
    }

    /// From now on the first write to a page of the range gets a copy.
    pub fn share(&self, start: Gva, bytes: u64) -> Result<(), PagingError> {
        check_range(start, bytes)?;
        self.change(start, bytes, &Retired::default(), |entry| entry.with_sharing())
    }

    #[cold]
    fn retire(&self, old: Entry, new: Entry, retired: &Retired) {
        if old.is_owner() && !(new.is_owner() && new.address() == old.address()) {
            if let Some(frame) = Gpa::new(old.address()) {
                self.frames.retire(frame, retired);
            }
        }
    }

    /// Clears accessed and dirty of the pages of the range, after splitting them to 4 KiB.
    pub fn clear_accessed_dirty(&self, start: Gva, bytes: u64) -> Result<(), PagingError> {
        check_range(start, bytes)?;
        let clear = Entry::with_accessed_dirty_clear;
        self.change_all(start, bytes, &Retired::default(), Unusual::SplitAll, clear, clear)
    }

    /// Takes the range out of the table. What lies there in the process stays as it is.
    pub fn unmap(&self, start: Gva, bytes: u64, retired: &Retired) -> Result<(), PagingError> {
        check_range(start, bytes)?;
        self.change_all(
            start,
            bytes,
            retired,
            Unusual::SkipGone,
            |_| Entry::GONE,
            |_| Entry::GONE,
        )
    }

    /// Maps the range to the memory of the process at `to`, whatever was there before, by the largest leaves that its
    /// alignment and the tables that there are allow.
    pub fn map(
        &self,
        start: Gva,
        bytes: u64,
        to: Hva,
        permissions: Permissions,
        retired: &Retired,
    ) -> Result<(), PagingError> {
        check_range(start, bytes)?;
        if !to.is_aligned(PAGE_BYTES) {
            return Err(PagingError::Unaligned { start, bytes });
        }
        let mut done = 0;
        while done < bytes {
            let out_of_range = PagingError::OutOfRange { start, bytes };
            let at = start.checked_add(done).ok_or(out_of_range)?;
            let page = self.frames.gpa(to.checked_add(done).ok_or(out_of_range)?)?;
            let found = self.find(at)?;
            let level = found.level;
            let size = leaf_bytes(level);
            let fits = level <= self.largest() && at.is_aligned(size) && page.is_aligned(size) && bytes - done >= size;
            if !fits {
                if found.kind() != Kind::Empty || !self.fill(at)? {
                    self.split(found)?;
                }
                continue;
            }
            // Memory in one GiB of the process is in one piece in GPA space, too.
            let end = bytes.min(done + leaf_bytes(3) - page.as_u64() % leaf_bytes(3));
            let most = ((end - done) / size) as usize;
            let slots = self.rest_of_table(found.slot, at.index(level));
            let leaf = Entry::leaf(page, level, permissions);
            done += size * self.map_slots(&slots[..slots.len().min(most)], level, leaf, retired);
        }
        Ok(())
    }

    /// Puts `leaf`, and those of the memory behind its page, into entries up to the first that refers to a table, or that the CPU or
    /// another thread changes meanwhile. Returns how many.
    #[inline(never)]
    fn map_slots(&self, slots: &[AtomicU64], level: u32, leaf: Entry, retired: &Retired) -> u64 {
        let size = leaf_bytes(level);
        let mut entry = leaf;
        let mut count = 0;
        for slot in slots {
            let old = Entry(slot.load(Relaxed));
            if level > 1 && old.kind(level) == Kind::Table {
                break;
            }
            if slot.compare_exchange(old.0, entry.0, AcqRel, Relaxed).is_err() {
                break;
            }
            if old.is_owner() {
                self.retire(old, entry, retired);
            }
            entry.0 += size;
            count += 1;
        }
        count
    }

    /// Highest level that may have leaves.
    fn largest(&self) -> u32 {
        if self.frames.has_1g() {
            3
        } else {
            2
        }
    }

    /// Replaces the table of `level` that `at` lies in by one leaf, if it maps what a leaf of `level` + 1 can.
    ///
    /// The CPU may go on using the table until it is flushed; `Merged` is what is to be done then.
    pub fn merge(&self, at: Gva, level: u32) -> Result<Option<Merged<'f>>, PagingError> {
        if level >= self.largest() {
            return Ok(None);
        }
        let found = self.find_down_to(level + 1, at)?;
        let (slot, old) = (found.slot, found.entry);
        if found.level != level + 1 || found.kind() != Kind::Table {
            return Ok(None);
        }
        let table = self.table_of(old)?;
        let pieces = table.0.iter().map(|piece| Entry(piece.load(Relaxed)));
        let Some(whole) = Entry::whole(pieces, level) else {
            return Ok(None);
        };
        if slot.compare_exchange(old.0, whole.0, AcqRel, Relaxed).is_err() {
            return Ok(None);
        }
        let gpa = Gpa::new(old.address()).ok_or(PagingError::Corrupt(old.address()))?;
        Ok(Some(Merged { slot, table, gpa }))
    }

    /// Gives the table of a merged leaf back, with no CPU using it any more.
    pub fn finish_merge(&self, merged: &Merged<'_>) {
        let used = merged.table.0.iter().fold(0, |used, piece| used | piece.load(Relaxed));
        // What the CPU noted in the table until the flush.
        merged.slot.fetch_or(used & Used::Both.mask(), AcqRel);
        self.frames.free(merged.gpa);
    }

    /// Makes every GiB of the lower half that nothing decided about yet one that is unmapped on purpose.
    pub fn seal(&self) -> Result<(), PagingError> {
        self.seal_table(self.root, 4)
    }

    fn seal_table(&self, gpa: Gpa, level: u32) -> Result<(), PagingError> {
        let entries = if level == 4 { 256 } else { 512 };
        for slot in &self.table(gpa)?.0[..entries] {
            let entry = Entry(slot.load(Relaxed));
            match entry.kind(level) {
                Kind::Empty => {
                    let _ = slot.compare_exchange(entry.0, Entry::GONE.0, AcqRel, Relaxed);
                }
                Kind::Table => {
                    let below = Gpa::new(entry.address()).ok_or(PagingError::Corrupt(entry.address()))?;
                    self.seal_table(below, level - 1)?;
                }
                Kind::Leaf | Kind::Gone => {}
            }
        }
        Ok(())
    }

    /// A tree of its own tables that maps the same. What goes to `retired` is this tree's to flush.
    pub fn duplicate(&self, retired: &Retired) -> Result<Self, PagingError> {
        Ok(Self {
            frames: self.frames,
            root: self.duplicate_table(self.root, 4, retired)?,
        })
    }

    fn duplicate_table(&self, from: Gpa, level: u32, retired: &Retired) -> Result<Gpa, PagingError> {
        let copy = self.frames.allocate()?;
        let source = self.table(from)?;
        let target = self.table(copy)?;
        let groups = source.0.chunks_exact(GROUP).zip(target.0.chunks_exact(GROUP));
        for (group, new) in groups {
            let entries: [Entry; GROUP] = core::array::from_fn(|index| Entry(group[index].load(Relaxed)));
            if Entry::are_by_themselves(&entries, level) {
                for (entry, new) in entries.iter().zip(new) {
                    new.store(entry.0, Relaxed);
                }
            } else if let Err(error) = self.duplicate_group(group, new, level, retired) {
                self.free_table(copy, level);
                return Err(error);
            }
        }
        Ok(copy)
    }

    /// Copies entries one by one, with what they refer to.
    fn duplicate_group(
        &self,
        group: &[AtomicU64],
        target: &[AtomicU64],
        level: u32,
        retired: &Retired,
    ) -> Result<(), PagingError> {
        for (slot, new) in group.iter().zip(target) {
            let entry = Entry(slot.load(Relaxed));
            if entry.kind(level) == Kind::Table {
                let below = Gpa::new(entry.address()).ok_or(PagingError::Corrupt(entry.address()))?;
                new.store(
                    Entry::table(self.duplicate_table(below, level - 1, retired)?).0,
                    Relaxed,
                );
            } else {
                new.store(self.keep(slot, entry, retired).0, Relaxed);
            }
        }
        Ok(())
    }

    /// Gives all tables back. The tree must not be used afterwards, by the CPU or by us.
    pub fn free(&self) {
        self.free_table(self.root, 4);
    }

    pub(super) fn free_table(&self, gpa: Gpa, level: u32) {
        if let Some(table) = self.frames.table(gpa) {
            for group in table.0.chunks_exact(GROUP) {
                let entries: [Entry; GROUP] = core::array::from_fn(|index| Entry(group[index].load(Relaxed)));
                if Entry::are_by_themselves(&entries, level) {
                    continue;
                }
                for entry in entries {
                    if entry.kind(level) == Kind::Table {
                        if let Some(below) = Gpa::new(entry.address()) {
                            self.free_table(below, level - 1);
                        }
                    } else if let (true, Some(frame)) = (entry.is_owner(), Gpa::new(entry.address())) {
                        self.frames.release(frame);
                    }
                }
            }
        }
        self.frames.free(gpa);
    }
}

/// Replaces entries up to the first that is not plain; how many. A few instructions each.
#[inline]
fn change_plain_slots(slots: &[AtomicU64], change: &impl Fn(Entry) -> Entry) -> usize {
    for (index, slot) in slots.iter().enumerate() {
        let entry = Entry(slot.load(Relaxed));
        let is_done = entry.is_plain() && slot.compare_exchange(entry.0, change(entry).0, AcqRel, Relaxed).is_ok();
        if !is_done {
            return index;
        }
    }
    slots.len()
}

/// What a change does otherwise than most.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Unusual {
    Nothing,
    /// It passes over what is unmapped already.
    SkipGone,
    /// It leaves only leaves of 4 KiB.
    SplitAll,
}

/// A table that a leaf took the place of.
pub(crate) struct Merged<'f> {
    slot: &'f AtomicU64,
    table: &'f Table,
    gpa: Gpa,
}

/// Checks that a range is whole pages inside one half of the address space.
pub(super) fn check_range(start: Gva, bytes: u64) -> Result<(), PagingError> {
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

#[cfg(test)]
#[path = "tree_model.rs"]
mod model;

#[cfg(test)]
#[path = "tree_threads.rs"]
mod threads;
