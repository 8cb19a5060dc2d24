// SPDX-License-Identifier: MIT OR Apache-2.0

//! Page tables whose entries the program reads and writes itself: what the C ABI is made of.
//!
//! A present entry is what the CPU takes it for. Others belong to the program, but for bits 9 to 11, which libdune's own
//! API uses: an entry without them that is not present is a page fault for the program's handler, whatever else it holds.
//!
//! # Safety
//!
//! Pointers to entries are into the arena: valid as long as the process keeps it ([`Shared`](crate::edit::Shared)) and the
//! table has its table pages. Entries are only used as atomics here.

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::AcqRel;
use core::sync::atomic::Ordering::Relaxed;

use super::entry::leaf_bytes;
use super::entry::Entry;
use super::entry::Kind;
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
use crate::addr::USER_END;
use crate::sys;

/// Bit of a large leaf that the program made: it stays whole until the program says otherwise. Ignored by the CPU.
pub const WHOLE: u64 = 1 << 58;

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
/// let entry: RawEntry<'_> = space.entry(start, 1, Missing::Make)?;
/// assert_eq!((entry.level, entry.bytes()), (1, 4096));
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

/// What [`AddressSpace::entry`] does where there is no entry of the level yet.
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

    /// The entry of `level` that decides about an address; a GiB that was not used yet is filled in where the process has
    /// something at the address. Large leaves are split; one with [`WHOLE`] is the answer itself,
    /// and an entry of `level` that refers to a table is, too.
    ///
    /// # Errors
    ///
    /// [`PagingError::NotMapped`], and what making tables can give.
    pub fn entry(&self, gva: Gva, level: u32, missing: Missing) -> Result<RawEntry<'_>, PagingError> {
        self.by_hand();
        with_slots(self.memory(), || {
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
        })
    }

    /// Bytes from an address where [`AddressSpace::entry`] found nothing to where there may be something again.
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
    /// assert!(table.entry(large, 1, Missing::Tell).is_err());
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
    /// address where it begins. Nothing is split or filled in. `visit` may change the entry; false ends the visit.
    pub fn for_each_entry(&self, start: Gva, last: Gva, mut visit: impl FnMut(Gva, RawEntry<'_>) -> bool) {
        self.by_hand();
        let tree = self.raw_tree();
        let mut at = start.align_down(PAGE_BYTES);
        loop {
            let found = {
                let _using = self.memory().begin();
                tree.find(at)
            };
            let Ok(found) = found else { return };
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
                let end = begin.as_u64() | (size - 1);
                let Some(next) = end.checked_add(1).filter(|_| end < last.as_u64()) else {
                    return;
                };
                // Between the halves there is nothing.
                let Some(next) = Gva::new(next.max(if next == USER_END { HIGHER_HALF } else { 0 })) else {
                    return;
                };
                begin = next;
                if begin > last || begin.as_u64() == HIGHER_HALF {
                    break;
                }
            }
            if begin > last {
                return;
            }
            at = begin;
        }
    }

    /// Puts a leaf in place of what is at `level` for an address: a table there is given back, when no CPU uses it any more.
    ///
    /// # Errors
    ///
    /// What making tables can give.
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
        let entry = self.entry(gva, level, Missing::Make)?;
        let old = Entry(entry.word.swap(value, AcqRel));
        if old.kind(entry.level) != Kind::Table {
            return Ok(old.0);
        }
        // The CPU caches what refers to tables, too.
        self.flush(gva, u64::MAX);
        if let Some(below) = Gpa::new(old.address()) {
            let _using = self.memory().begin();
            self.raw_tree().free_table(below, entry.level - 1);
        }
        Ok(0)
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
                match self.set_user(at, entry.bytes(), true) {
                    Ok(flush) => flush.ignore(),
                    Err(error) => result = Err(error),
                }
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

/// Whether Linux has something mapped at the address of the same number.
fn is_in_process(gva: Gva) -> bool {
    let page = gva.align_down(PAGE_BYTES);
    let mut resident = 0u8;
    let arguments = [page.as_u64(), PAGE_BYTES, &raw mut resident as u64, 0, 0, 0];
    // SAFETY: Writes one byte.
    page.identity().is_some() && unsafe { sys::raw(libc::SYS_mincore, arguments) } == 0
}

/// First address of the upper half.
const HIGHER_HALF: u64 = 0xffff_8000_0000_0000;
