// SPDX-License-Identifier: MIT OR Apache-2.0

//! Page tables whose entries the program reads and writes itself: what the C ABI is made of.
//!
//! A present entry is what the CPU takes it for. Others belong to the program, but for bits 9 to 11, which libdune's own
//! API uses: an entry without them that is not present is a page fault for the program's handler, whatever else it holds.
//!
//! # Safety
//!
//! Pointers to entries are into the arena: valid as long as the process keeps it ([`Shared`](crate::edit::Shared)) and the
//! table has its table pages. Entries are lent between [`Memory::begin`] and the end of what that returns, when no table page
//! is given back ([`Memory::exclusively`]). They are only used as atomics here.

use core::cell::Cell;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::AcqRel;
use core::sync::atomic::Ordering::Relaxed;

use super::entry::leaf_bytes;
use super::entry::Entry;
use super::entry::Kind;
pub use super::entry::WHOLE;
use super::fill;
use super::memory::recycle::with_slots;
use super::memory::Memory;
use super::tlb::shoot_down;
use super::tree::Frames;
use super::tree::Tree;
use super::AddressSpace;
use super::PagingError;
use crate::addr::Gpa;
use crate::addr::Gva;
use crate::addr::PAGE_BYTES;
use crate::addr::UPPER_HALF;
use crate::addr::USER_END;
use crate::sys;

/// An entry of a page table.
///
/// # Examples
///
/// ```no_run
/// # #[repr(align(4096))]
/// # struct Page([u8; 4096]);
/// use libdune::edit::{Missing, RawEntry, Shared};
/// use libdune::{Dune, Gva};
///
/// let page = Box::new(Page([7; 4096]));
/// let shared = Shared::keep(&Dune::builder())?;
/// let dune = Dune::enter()?;
/// let start = Gva::of(&raw const *page).ok_or("not canonical")?;
/// let space = shared.address_space();
/// let kept = |entry: RawEntry<'_>| (entry.level, entry.bytes());
/// assert_eq!(space.with_entry(start, 1, Missing::Make, kept)?, (1, 4096));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct RawEntry<'t> {
    /// 1: of a 4 KiB page, 2: 2 MiB, 3: 1 GiB, 4: 512 GiB.
    pub level: u32,
    /// Where it is.
    pub word: &'t AtomicU64,
}

impl RawEntry<'_> {
    /// Bytes that it decides about.
    pub fn bytes(&self) -> u64 {
        leaf_bytes(self.level)
    }
}

/// What [`AddressSpace::with_entry`] does where there is no entry of the level yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// [`PagingError::NotMapped`].
    Tell,
    /// Makes the tables for one.
    Make,
}

impl AddressSpace<'_> {
    /// The top table.
    pub fn root_table(&self) -> *mut u64 {
        self.by_hand();
        let table = self.memory().table(self.root());
        table.map_or(core::ptr::null_mut(), |table| table.0[0].as_ptr())
    }

    /// Level of the largest leaves that the CPU has: 3 where it has pages of 1 GiB, else 2. One above it is a reserved bit to
    /// the CPU, and a page fault.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use libdune::Dune;
    ///
    /// let dune = Dune::enter()?;
    /// let largest = dune.address_space().largest_leaf();
    /// assert!(largest == 2 || largest == 3);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn largest_leaf(&self) -> u32 {
        if self.memory().has_1g() {
            3
        } else {
            2
        }
    }

    /// Maps the GiB of an address to itself, if nothing decided about it yet. Says whether the CPU may find a page there now.
    ///
    /// # Errors
    ///
    /// See [`PagingError`].
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # #[repr(align(4096))]
    /// # struct Page([u8; 4096]);
    /// use libdune::{Dune, Gva};
    ///
    /// let page = Box::new(Page([7; 4096]));
    /// let dune = Dune::enter()?;
    /// let start = Gva::of(&raw const *page).ok_or("not canonical")?;
    /// let table = dune.new_page_table()?;
    /// assert!(!table.root_table().is_null());
    /// assert!(table.fill(start)?);
    /// let mut bytes = 0;
    /// table.for_each_entry(start, start, |_, entry| {
    ///     bytes += entry.bytes();
    ///     true
    /// });
    /// // One leaf for all of the GiB, where the CPU has such.
    /// assert!(bytes >= 2 << 20);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn fill(&self, gva: Gva) -> Result<bool, PagingError> {
        fill(self.memory(), self.root(), gva)
    }

    /// Calls `f` with the entry of `level` that decides about an address; a GiB that was not used yet is filled in where the
    /// process has something at the address. Large leaves are split; one with [`WHOLE`] is the answer itself,
    /// and an entry of `level` that refers to a table is, too.
    ///
    /// No table page is given back meanwhile: `f` must not do what does that ([`AddressSpace::replace_table`],
    /// [`AddressSpace::merge`] are [`PagingError::Busy`] then), wait for others, or be left by a jump.
    ///
    /// # Errors
    ///
    /// [`PagingError::NotMapped`], and what making tables can give.
    pub fn with_entry<R>(
        &self,
        gva: Gva,
        level: u32,
        missing: Missing,
        f: impl FnOnce(RawEntry<'_>) -> R,
    ) -> Result<R, PagingError> {
        self.by_hand();
        let f = Cell::new(Some(f));
        let done = with_slots(self.memory(), || {
            let entry = self.find_entry(gva, level, missing)?;
            Ok(f.take().map(|f| f(entry)))
        })?;
        // It is tried again after errors only.
        done.ok_or(PagingError::NotMapped(gva))
    }

    /// The caller has begun.
    fn find_entry(&self, gva: Gva, level: u32, missing: Missing) -> Result<RawEntry<'_>, PagingError> {
        let tree = self.raw_tree();
        loop {
            let found = tree.find_down_to(level, gva)?;
            let raw = RawEntry {
                level: found.level,
                word: found.slot,
            };
            match found.kind() {
                Kind::Empty if is_in_process(gva) && tree.fill(gva)? => {}
                Kind::Empty if found.level == level && missing == Missing::Make => {
                    // The program's from here on: without libdune's mark.
                    let _ = raw.word.compare_exchange(found.entry.0, 0, AcqRel, Relaxed);
                    return Ok(raw);
                }
                Kind::Empty if missing == Missing::Make => tree.split(found)?,
                Kind::Empty => return Err(PagingError::NotMapped(gva)),
                _ if found.level == level || found.entry.0 & WHOLE != 0 => return Ok(raw),
                Kind::Leaf => tree.split(found)?,
                _ if missing == Missing::Tell => return Err(PagingError::NotMapped(gva)),
                _ => tree.open(found)?,
            }
        }
    }

    /// Takes the large leaf that decides about an address, if one does, to pieces of the next smaller size. Pieces of one with
    /// [`WHOLE`] have it too, where they are large.
    ///
    /// # Errors
    ///
    /// What making tables can give.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use libdune::{Dune, Gva};
    ///
    /// let memory = vec![7u8; 4096];
    /// let dune = Dune::enter()?;
    /// let start = Gva::of(memory.as_ptr()).ok_or("not canonical")?;
    /// let table = dune.address_space().duplicate()?;
    /// table.fill(start)?;
    /// let size = || table.look_up(start).map(|mapping| mapping.page_bytes);
    /// let before = size();
    /// table.split(start)?;
    /// assert!(size() < before || before == Some(4096));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn split(&self, gva: Gva) -> Result<(), PagingError> {
        with_slots(self.memory(), || {
            let tree = self.raw_tree();
            let found = tree.find(gva)?;
            if found.kind() == Kind::Leaf && found.level > 1 {
                tree.split(found)?;
            }
            Ok(())
        })
    }

    /// Bytes from an address where [`AddressSpace::with_entry`] found nothing to where there may be something again.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # #[repr(align(4096))]
    /// # struct Page([u8; 4096]);
    /// use libdune::edit::Missing;
    /// use libdune::{Dune, Gva};
    ///
    /// let page = Box::new(Page([7; 4096]));
    /// let dune = Dune::enter()?;
    /// let start = Gva::of(&raw const *page).ok_or("not canonical")?;
    /// let table = dune.address_space().duplicate()?;
    /// let large = start.align_down(2 << 20);
    /// table.unmap(large, 2 << 20)?.flush();
    /// assert!(table.with_entry(large, 1, Missing::Tell, |_| ()).is_err());
    /// assert_eq!(table.gap(large), 2 << 20);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn gap(&self, gva: Gva) -> u64 {
        let _using = self.memory().begin();
        match self.raw_tree().find(gva) {
            Ok(found) if found.kind() == Kind::Gone => found.bytes_from(gva),
            _ => PAGE_BYTES,
        }
    }

    /// Calls `visit` for each entry that is no table and holds something, for the pages of `start` to `last`, with the
    /// address where it begins. Nothing is split or filled in. `visit` may change the entry; false ends the visit. It has the
    /// limits of what [`AddressSpace::with_entry`] calls.
    pub fn for_each_entry(&self, start: Gva, last: Gva, mut visit: impl FnMut(Gva, RawEntry<'_>) -> bool) {
        self.by_hand();
        let tree = self.raw_tree();
        let mut at = start.align_down(PAGE_BYTES);
        loop {
            // For the rest of a table.
            let _using = self.memory().begin();
            let Ok(found) = tree.find(at) else { return };
            let (level, first) = (found.level, found.slot);
            let size = leaf_bytes(level);
            let mut begin = at.align_down(size);
            // The rest of the table, as far as there are no tables below it.
            for (index, word) in tree.rest_of_table(first, at.index(level)).iter().enumerate() {
                let entry = Entry(word.load(Relaxed));
                if index > 0 && entry.kind(level) == Kind::Table {
                    break;
                }
                if entry.holds() && !visit(begin, RawEntry { level, word }) {
                    return;
                }
                let Some(next) = begin.within_half(size - 1).successor().filter(|next| *next <= last) else {
                    return;
                };
                begin = next;
                if begin.as_u64() == UPPER_HALF {
                    break;
                }
            }
            at = begin;
        }
    }

    /// Puts a leaf in place of what is at `level` for an address: a table there is given back, when no CPU uses it any more.
    ///
    /// Gives what was there, 0 for a table. A larger leaf with [`WHOLE`] is split.
    ///
    /// # Errors
    ///
    /// What making tables can give; [`PagingError::Busy`] where another thread does not end what it does to a page table.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # #[repr(align(4096))]
    /// # struct Page([u8; 4096]);
    /// use libdune::edit::{Shared, WHOLE};
    /// use libdune::{Dune, Gva, Permissions};
    ///
    /// let page = Box::new(Page([7; 4096]));
    /// let shared = Shared::keep(&Dune::builder())?;
    /// let dune = Dune::enter()?;
    /// let start = Gva::of(&raw const *page).ok_or("not canonical")?;
    /// let table = dune.address_space().duplicate()?;
    /// // Splits what is mapped there down to 4 KiB.
    /// table.protect(start, 4096, Permissions::READ)?.flush();
    ///
    /// let large = start.align_down(2 << 20);
    /// let gpa = shared.gpa(large.identity().ok_or("no address of a process")?)?;
    /// // Present, writable, large.
    /// let leaf = gpa.as_u64() | 1 | 1 << 1 | 1 << 7 | WHOLE;
    /// assert_eq!(table.replace_table(large, 2, leaf)?, 0);
    /// let mapping = table.look_up(start).ok_or("not mapped")?;
    /// assert_eq!(mapping.page_bytes, 2 << 20);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn replace_table(&self, gva: Gva, level: u32, value: u64) -> Result<u64, PagingError> {
        loop {
            let there = self.with_entry(gva, level, Missing::Make, |entry| {
                if entry.level > level {
                    return There::Larger;
                }
                let is_table = |old| Entry(old).kind(level) == Kind::Table;
                let put = |old| (!is_table(old)).then_some(value);
                entry
                    .word
                    .fetch_update(AcqRel, Relaxed, put)
                    .map_or(There::Table, There::Replaced)
            })?;
            match there {
                There::Replaced(old) => return Ok(old),
                There::Larger => self.split(gva)?,
                There::Table => {}
            }
            // Nobody else is at an entry of the table then.
            let take = || self.take_table(gva, level, value);
            if self.memory().exclusively(take).unwrap_or(Err(PagingError::Busy))? {
                return Ok(0);
            }
        }
    }

    /// Puts a leaf in place of a table, if there is one; the caller is alone.
    fn take_table(&self, gva: Gva, level: u32, value: u64) -> Result<bool, PagingError> {
        let tree = self.raw_tree();
        let found = tree.find_down_to(level, gva)?;
        if found.level != level || found.kind() != Kind::Table {
            return Ok(false);
        }
        let old = Entry(found.slot.swap(value, AcqRel));
        // The CPU caches what refers to tables, too.
        self.flush(gva, u64::MAX);
        if let Some(below) = Gpa::new(old.address()) {
            tree.free_table(below, level - 1);
        }
        Ok(true)
    }

    /// Has every Dune thread that may use old translations of these pages forget them, before this returns: what a program
    /// does behind changes of entries.
    pub fn flush(&self, start: Gva, bytes: u64) {
        let pages = bytes.div_ceil(PAGE_BYTES);
        // SAFETY: Alive as long as this.
        let process = unsafe { &*self.process_pointer() };
        shoot_down(process, self.name(), start, pages);
    }

    /// Lets CPL3 use what is mapped and what will be filled in, but for the given GiBs and libdune's own.
    ///
    /// # Errors
    ///
    /// See [`PagingError`].
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # #[repr(align(4096))]
    /// # struct Page([u8; 4096]);
    /// use libdune::edit::Shared;
    /// use libdune::{Dune, Gva, Permissions};
    ///
    /// let page = Box::new(Page([7; 4096]));
    /// // CPL0 goes on with pages that CPL3 may use.
    /// let options = Dune::builder().protection_from_cpl3(false);
    /// let shared = Shared::keep(&options)?;
    /// let dune = options.enter()?;
    /// let start = Gva::of(&raw const *page).ok_or("not canonical")?;
    /// let table = dune.address_space().duplicate()?;
    /// table.fill(start)?;
    /// table.give_to_user(&[])?;
    /// let mapping = table.look_up(start).ok_or("not mapped")?;
    /// assert!(mapping.permissions.contains(Permissions::USER));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn give_to_user(&self, but: &[Gva]) -> Result<(), PagingError> {
        const GIB: u64 = 1 << 30;
        let arena = self.memory().start();
        self.memory().fill_for_user();
        let start = Gva::default();
        let mut result = Ok(());
        self.for_each_entry(start, Gva::new(USER_END - 1).unwrap_or(start), |at, entry| {
            let gib = at.align_down(GIB);
            let is_kept = gib.as_u64() == arena || but.contains(&gib);
            if !is_kept && Entry(entry.word.load(Relaxed)).kind(entry.level) == Kind::Leaf {
                result = self.raw_tree().set_user(at, entry.bytes(), true);
            }
            result.is_ok()
        });
        self.flush(start, u64::MAX);
        result
    }

    /// Entries go to the program, that may put tables of its own in.
    fn by_hand(&self) {
        // SAFETY: Alive as long as this.
        let process = unsafe { &*self.process_pointer() };
        if let Some(number) = self.number() {
            process.tables().get(number).edit_by_hand();
        }
    }

    fn memory(&self) -> &Memory {
        // SAFETY: Alive as long as the space, as the process is.
        unsafe { &(*self.process_pointer()).memory }
    }

    fn raw_tree(&self) -> Tree<'_, Memory> {
        Tree {
            frames: self.memory(),
            root: self.root(),
        }
    }
}

/// What [`AddressSpace::replace_table`] found.
enum There {
    /// A leaf of a higher level.
    Larger,
    /// What is no table, and was replaced.
    Replaced(u64),
    Table,
}

/// Whether Linux has something mapped at the address of the same number.
fn is_in_process(gva: Gva) -> bool {
    let page = gva.align_down(PAGE_BYTES);
    let mut resident = 0u8;
    let arguments = [page.as_u64(), PAGE_BYTES, &raw mut resident as u64, 0, 0, 0];
    // SAFETY: Writes one byte.
    page.identity().is_some() && unsafe { sys::raw(libc::SYS_mincore, arguments) } == 0
}
