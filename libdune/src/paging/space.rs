// SPDX-License-Identifier: MIT OR Apache-2.0

//! Guest address spaces: trees of tables that a CPU can have loaded.
//!
//! # Safety
//!
//! A space borrows its table, and the memory that it is in. A changed page table can take memory away from compiled code:
//! that is what it is for.

use core::fmt;
use core::marker::PhantomData;
use core::ptr;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::AcqRel;
use core::sync::atomic::Ordering::Relaxed;

use super::entry::Entry;
use super::memory::recycle::with_slots;
use super::memory::recycle::Using;
use super::memory::Memory;
use super::owned::PageTable;
use super::pool::FramePool;
use super::tables::Name;
use super::tables::Record;
use super::tlb::is_cpl0;
use super::tlb::loaded_root;
use super::tlb::shoot_down;
use super::tlb::Flush;
use super::tlb::FLUSH_ALL_PAGES;
use super::tree::Mapping;
use super::tree::Merged;
use super::tree::Retired;
use super::tree::Tree;
use super::used::Batch;
use super::used::Used;
use super::PagingError;
use super::Permissions;
use crate::addr::Gpa;
use crate::addr::Gva;
use crate::addr::Hva;
use crate::addr::PAGE_BYTES;
use crate::process::Process;

/// Tables that one flush gives back.
const MERGED_AT_ONCE: usize = 64;

/// A page of a range that the CPU used: see [`AddressSpace::take_used`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsedPage {
    /// Where the page begins.
    pub start: Gva,
    /// Bytes of the page: 4 KiB, 2 MiB or 1 GiB.
    pub bytes: u64,
    /// It was written to.
    pub is_dirty: bool,
}

/// A page table of the process.
///
/// Borrowed from a Dune thread ([`Dune::address_space`](crate::Dune::address_space)), or from the [`PageTable`] that owns
/// it. Any thread may change a table at any time, also from a trap handler: entries change one by one, each at once. Nothing
/// here allocates.
///
/// Ranges are whole pages of 4 KiB within one half of the canonical addresses: `start` and `bytes` are multiples of 4096.
///
/// # Errors of changes
///
/// [`PagingError::Unaligned`] and [`PagingError::OutOfRange`], for a range that is none: nothing is changed then.
/// [`PagingError::NotMapped`] at a page that is mapped to nothing, where the change needs one that is, and
/// [`PagingError::OutOfMemory`], [`PagingError::OutOfSlots`], [`PagingError::MapSlot`] where a table or a GiB of the process
/// has to be brought in: pages before the one that failed are changed then, and flushed.
///
/// # Examples
///
/// ```no_run
/// # #[repr(align(4096))]
/// # struct Page([u8; 4096]);
/// use libdune::{AddressSpace, Dune, Gva, Permissions};
///
/// let pages: Vec<Page> = (0..4).map(|_| Page([7; 4096])).collect();
/// let dune = Dune::enter()?;
/// let space: AddressSpace<'_> = dune.address_space();
/// let start = Gva::of(pages.as_ptr()).ok_or("not canonical")?;
///
/// space.protect(start, 4 * 4096, Permissions::READ)?.flush();
/// let mapping = space.look_up(start).ok_or("not mapped")?;
/// assert_eq!((mapping.permissions, mapping.page_bytes), (Permissions::READ, 4096));
/// assert_eq!(space.hva(start), start.identity());
/// assert_eq!(space.translate(start, Permissions::WRITE), None);
///
/// let mut visited = 0;
/// space.walk(start, 4 * 4096, |_, mapping| visited += mapping.page_bytes);
/// assert_eq!(visited, 4 * 4096);
///
/// space.protect(start, 4 * 4096, Permissions::ALL)?.ignore();
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct AddressSpace<'d> {
    process: *const Process,
    name: Name,
    _dune: PhantomData<&'d ()>,
}

impl fmt::Debug for AddressSpace<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AddressSpace({})", self.root())
    }
}

impl<'d> AddressSpace<'d> {
    /// The space with this number.
    ///
    /// # Safety
    ///
    /// It must have a user, and the arena be alive, for `'d`.
    #[inline]
    pub(crate) unsafe fn borrowed(process: *const Process, number: u16) -> Self {
        Self {
            process,
            name: Name::of(number),
            _dune: PhantomData,
        }
    }

    /// The space that CR3 holds, though libdune did not load it.
    ///
    /// # Safety
    ///
    /// `root` must be the root of a tree in the process' memory, both alive for `'d`.
    pub(crate) unsafe fn foreign(process: *const Process, root: Gpa) -> Self {
        Self {
            process,
            name: Name::foreign(root),
            _dune: PhantomData,
        }
    }

    #[inline]
    pub(super) fn process(&self) -> &Process {
        // SAFETY: Alive for 'd.
        unsafe { &*self.process }
    }

    fn tree(&self) -> Tree<'_, Memory> {
        Tree {
            frames: &self.process().memory,
            root: self.root(),
        }
    }

    /// Does something that may need slots, and that TLBs have to hear of.
    fn change(
        &self,
        start: Gva,
        bytes: u64,
        operation: impl Fn(Tree<'_, Memory>, &Retired) -> Result<(), PagingError>,
    ) -> Result<Flush<'_>, PagingError> {
        let retired = Retired::default();
        let result = with_slots(&self.process().memory, || operation(self.tree(), &retired));
        let flush = self.to_be_flushed(start, bytes, retired);
        match result {
            Ok(()) => Ok(flush),
            Err(error) => {
                // Pages before the one that failed are changed.
                flush.flush();
                Err(error)
            }
        }
    }

    #[inline]
    fn to_be_flushed(&self, start: Gva, bytes: u64, retired: Retired) -> Flush<'_> {
        // SAFETY: The table is this one, and borrowed as long as the flush.
        unsafe { Flush::new(self.process, self.name, start, bytes / PAGE_BYTES, retired) }
    }

    /// Has one page of 4 KiB changed that is mapped by a plain leaf. False where it is not so simple, or another thread was
    /// quicker.
    #[inline(always)]
    fn change_page(&self, page: Gva, change: impl FnOnce(Entry) -> Entry) -> bool {
        let Some(number) = self.number() else {
            return false;
        };
        let process = self.process();
        let record = process.tables().get(number);
        let using = process.memory.begin();
        let slot = match record.table_page(page) {
            // SAFETY: The table is borrowed, and nobody gives tables or slots back meanwhile.
            Some(table) => unsafe { process.memory.entry_in(table, page) },
            None => match remember(self.again(), record, page) {
                Some(slot) => slot,
                None => return false,
            },
        };
        let entry = Entry(slot.load(Relaxed));
        let is_done = entry.is_plain() && slot.compare_exchange(entry.0, change(entry).0, AcqRel, Relaxed).is_ok();
        if !is_done {
            // Out of line, so that the usual way does not keep the answer while it ends.
            end(using);
            return false;
        }
        true
    }

    /// The same space, for as long as this is borrowed.
    #[inline(always)]
    fn again(&self) -> AddressSpace<'_> {
        AddressSpace {
            process: self.process,
            name: self.name,
            _dune: PhantomData,
        }
    }

    /// GPA of the top table.
    #[inline]
    pub fn root(&self) -> Gpa {
        self.name.root(&self.process().memory)
    }

    /// What an address is mapped to; `None` where nothing is, also in a GiB that was not used yet.
    pub fn look_up(&self, gva: Gva) -> Option<Mapping> {
        let _using = self.process().memory.begin();
        self.tree().look_up(gva)
    }

    /// The HVA of what is mapped at an address.
    pub fn hva(&self, gva: Gva) -> Option<Hva> {
        self.process().memory.hva(self.look_up(gva)?.gpa)
    }

    /// The HVA of what is mapped at an address, if all of `access` is allowed there.
    pub fn translate(&self, gva: Gva, access: Permissions) -> Option<Hva> {
        let mapping = self.look_up(gva)?;
        let is_allowed = mapping.permissions != Permissions::NONE && mapping.permissions.contains(access);
        is_allowed.then(|| self.process().memory.hva(mapping.gpa))?
    }

    /// Calls `visit` for each page in a range that something is mapped to, in order: with its address (the range's start,
    /// where that is in the middle of a page) and what it is mapped to. `visit` may change the table.
    pub fn walk(&self, start: Gva, bytes: u64, mut visit: impl FnMut(Gva, Mapping)) {
        let mut done = 0;
        while done < bytes {
            let next = {
                let _using = self.process().memory.begin();
                start
                    .checked_add(done)
                    .and_then(|at| self.tree().next(at, bytes - done))
            };
            let Some((at, mapping)) = next else { return };
            visit(at, mapping);
            done = at
                .align_down(mapping.page_bytes)
                .as_u64()
                .wrapping_add(mapping.page_bytes)
                .wrapping_sub(start.as_u64());
        }
    }

    /// Gives whole pages other permissions. Pages with [`Permissions::NONE`] keep what they are mapped to.
    ///
    /// They are the address's: munmap does not take them back, and what Linux maps there next, the stack of a new thread
    /// too, has them. Give [`Permissions::ALL`] back before.
    ///
    /// # Errors
    ///
    /// Those [of changes](AddressSpace#errors-of-changes).
    // So that what a handler changes stays in registers: all else is out of line.
    #[inline(always)]
    pub fn protect(&self, start: Gva, bytes: u64, permissions: Permissions) -> Result<Flush<'_>, PagingError> {
        // A page by itself is what handlers of page faults change.
        if bytes == PAGE_BYTES
            && start.is_aligned(PAGE_BYTES)
            && self.change_page(start, |entry| entry.with_plain_permissions(permissions))
        {
            return Ok(self.to_be_flushed(start, PAGE_BYTES, Retired::default()));
        }
        protect_range(self.again(), start, bytes, permissions)?;
        Ok(self.to_be_flushed(start, bytes, Retired::default()))
    }

    /// Maps whole pages to the memory of the process at `to`: by leaves of 2 MiB and 1 GiB where both addresses are
    /// multiples of that and nothing smaller was mapped there before.
    ///
    /// # Errors
    ///
    /// Those [of changes](AddressSpace#errors-of-changes).
    pub fn map(&self, start: Gva, bytes: u64, to: Hva, permissions: Permissions) -> Result<Flush<'_>, PagingError> {
        self.change(start, bytes, |tree, retired| {
            tree.map(start, bytes, to, permissions, retired)
        })
    }

    /// Takes whole pages out of the table. The process still has what lies there. They are not filled in again: a touch is a
    /// page fault for the handler.
    ///
    /// # Errors
    ///
    /// Those [of changes](AddressSpace#errors-of-changes).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # #[repr(align(4096))]
    /// # struct Page([u8; 4096]);
    /// use libdune::{Dune, Gva};
    ///
    /// let mut page = Box::new(Page([7; 4096]));
    /// let dune = Dune::enter()?;
    /// let start = Gva::of(&raw const *page).ok_or("not canonical")?;
    /// // Touched, so that it is mapped.
    /// std::hint::black_box(&mut page).0[0] = 8;
    /// let table = dune.address_space().duplicate()?;
    /// table.unmap(start, 4096)?.flush();
    /// assert_eq!(table.look_up(start), None);
    /// // The other table has it still.
    /// assert_ne!(table.root(), dune.address_space().root());
    /// assert!(dune.address_space().look_up(start).is_some());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn unmap(&self, start: Gva, bytes: u64) -> Result<Flush<'_>, PagingError> {
        self.change(start, bytes, |tree, retired| tree.unmap(start, bytes, retired))
    }

    /// Lets CPL3 use whole pages too, or no longer.
    ///
    /// # Errors
    ///
    /// Those [of changes](AddressSpace#errors-of-changes).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # #[repr(align(4096))]
    /// # struct Page([u8; 4096]);
    /// use libdune::{Dune, Gva, Permissions};
    ///
    /// let page = Box::new(Page([7; 4096]));
    /// let dune = Dune::enter()?;
    /// let start = Gva::of(&raw const *page).ok_or("not canonical")?;
    /// let table = dune.address_space().duplicate()?;
    /// table.set_user(start, 4096, true)?.flush();
    /// let mapping = table.look_up(start).ok_or("not mapped")?;
    /// assert!(mapping.permissions.contains(Permissions::USER));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn set_user(&self, start: Gva, bytes: u64, user: bool) -> Result<Flush<'_>, PagingError> {
        self.change(start, bytes, |tree, _| tree.set_user(start, bytes, user))
    }

    /// Gives whole pages a protection key. It binds where CPL3 may use the page: PKRU then says what may be done with it.
    /// Code at CPL3 sets its own PKRU by WRPKRU and begins with all keys. At CPL0 the thread's counts, in which Linux leaves key
    /// 0 only: [`UserSlice`](crate::user::UserSlice) is refused pages with another one until it is changed.
    ///
    /// # Errors
    ///
    /// [`PagingError::NoProtectionKeys`] where the CPU or Linux has none, [`PagingError::NoSuchKey`] above 15, else
    /// those [of changes](AddressSpace#errors-of-changes).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # #[repr(align(4096))]
    /// # struct Page([u8; 4096]);
    /// use libdune::{Dune, Gva, PagingError};
    ///
    /// let page = Box::new(Page([7; 4096]));
    /// let dune = Dune::enter()?;
    /// let start = Gva::of(&raw const *page).ok_or("not canonical")?;
    /// let table = dune.address_space().duplicate()?;
    /// match table.set_protection_key(start, 4096, 1) {
    ///     Ok(flush) => flush.flush(),
    ///     Err(PagingError::NoProtectionKeys) => println!("this CPU has none"),
    ///     Err(error) => return Err(error.into()),
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn set_protection_key(&self, start: Gva, bytes: u64, key: u8) -> Result<Flush<'_>, PagingError> {
        if !self.process().has_keys {
            return Err(PagingError::NoProtectionKeys);
        }
        if key > 15 {
            return Err(PagingError::NoSuchKey(key));
        }
        self.change(start, bytes, |tree, _| tree.set_key(start, bytes, key))
    }

    /// Clears the accessed and dirty bits of whole pages, which are mapped by 4 KiB leaves from then on.
    ///
    /// # Errors
    ///
    /// Those [of changes](AddressSpace#errors-of-changes).
    pub fn clear_accessed_dirty(&self, start: Gva, bytes: u64) -> Result<Flush<'_>, PagingError> {
        self.change(start, bytes, |tree, _| tree.clear_accessed_dirty(start, bytes))
    }

    /// Calls `visit` for each page of a range that the CPU used, or wrote to, since this was asked last, and clears the
    /// bits that say so. Bits start as set. Large pages are not split: [`AddressSpace::clear_accessed_dirty`] does that,
    /// once, where a page is to mean 4 KiB.
    ///
    /// What is written before the flush need not be noted again: read pages that were named after the flush. A few
    /// instructions per page.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # #[repr(align(4096))]
    /// # struct Page([u8; 4096]);
    /// use libdune::paging::Used;
    /// use libdune::{Dune, Gva};
    ///
    /// let mut pages: Vec<Page> = (0..100).map(|_| Page([0; 4096])).collect();
    /// let dune = Dune::enter()?;
    /// let (space, start) = (dune.address_space(), Gva::of(pages.as_ptr()).ok_or("not canonical")?);
    /// space.clear_accessed_dirty(start, 100 * 4096)?.flush();
    ///
    /// unsafe { (&raw mut pages[42].0[0]).write_volatile(1) };
    ///
    /// let mut written = Vec::new();
    /// space.take_used(start, 100 * 4096, Used::Dirty, |page| written.push(page.start))?.flush();
    /// assert_eq!(written, [start.checked_add(42 * 4096).ok_or("too far")?]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those [of changes](AddressSpace#errors-of-changes), but pages that are mapped to nothing are passed over.
    pub fn take_used(
        &self,
        start: Gva,
        bytes: u64,
        used: Used,
        visit: impl FnMut(UsedPage),
    ) -> Result<Flush<'_>, PagingError> {
        self.for_each_used(start, bytes, used, true, visit)?;
        self.change(start, bytes, |_, _| Ok(()))
    }

    /// The same without clearing anything: nothing is to be flushed.
    ///
    /// # Errors
    ///
    /// Those [of changes](AddressSpace#errors-of-changes), but pages that are mapped to nothing are passed over.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # #[repr(align(4096))]
    /// # struct Page([u8; 4096]);
    /// use libdune::paging::{Used, UsedPage};
    /// use libdune::{Dune, Gva};
    ///
    /// let mut pages: Vec<Page> = (0..8).map(|_| Page([0; 4096])).collect();
    /// let dune = Dune::enter()?;
    /// let (space, start) = (dune.address_space(), Gva::of(pages.as_ptr()).ok_or("not canonical")?);
    /// space.clear_accessed_dirty(start, 8 * 4096)?.flush();
    ///
    /// std::hint::black_box(&mut pages)[5].0[0] = 1;
    ///
    /// // Again and again the same.
    /// for _ in 0..2 {
    ///     let mut used: Vec<UsedPage> = Vec::new();
    ///     space.read_used(start, 8 * 4096, Used::Dirty, |page| used.push(page))?;
    ///     assert_eq!(used.len(), 1);
    ///     assert!(used[0].is_dirty);
    ///     assert_eq!(Some(used[0].start), start.checked_add(5 * 4096));
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn read_used(
        &self,
        start: Gva,
        bytes: u64,
        used: Used,
        visit: impl FnMut(UsedPage),
    ) -> Result<(), PagingError> {
        self.for_each_used(start, bytes, used, false, visit)
    }

    /// What there is to tell of one table behind `done`.
    #[inline(never)]
    fn take_batch(
        &self,
        start: Gva,
        bytes: u64,
        done: u64,
        used: Used,
        clear: bool,
    ) -> Result<Option<Batch>, PagingError> {
        let _using = self.process().memory.begin();
        self.tree().take_used(start, bytes, done, used, clear)
    }

    fn for_each_used(
        &self,
        start: Gva,
        bytes: u64,
        used: Used,
        clear: bool,
        mut visit: impl FnMut(UsedPage),
    ) -> Result<(), PagingError> {
        super::tree::check_range(start, bytes)?;
        let mut done = 0;
        while let Some(batch) = self.take_batch(start, bytes, done, used, clear)? {
            for (word, (bits, dirty)) in batch.used.iter().zip(&batch.dirty).enumerate() {
                let mut left = *bits;
                while left != 0 {
                    let bit = left.trailing_zeros();
                    left &= left - 1;
                    let offset = (word as u64 * 64 + u64::from(bit)) * batch.page_bytes;
                    visit(UsedPage {
                        start: batch.start.within_half(offset),
                        bytes: batch.page_bytes,
                        is_dirty: dirty >> bit & 1 != 0,
                    });
                }
            }
            done = batch.done;
        }
        Ok(())
    }

    /// From now on the first write to each page of a range gets a copy of it, from `pool`: a write through this table is
    /// seen through this table only. What others write to pages that have no copy yet is seen here.
    ///
    /// System calls know nothing of it: Linux uses the memory at the HVA of the same number. A table has one pool, which
    /// it keeps mapped, and which stays as long as it; where the pool is used up a write is an exception that no handler
    /// is asked about.
    ///
    /// # Errors
    ///
    /// [`PagingError::OtherPool`], [`PagingError::Foreign`] of a table that libdune did not load, else those
    /// [of changes](AddressSpace#errors-of-changes).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # #[repr(align(4096))]
    /// # struct Page([u8; 4096]);
    /// use libdune::{Dune, FramePool, Gva};
    ///
    /// let mut page = Box::new(Page([7; 4096]));
    /// let dune = Dune::enter()?;
    /// let start = Gva::of(&raw const *page).ok_or("not canonical")?;
    /// let pool = FramePool::new()?;
    /// let table = dune.address_space().duplicate()?;
    /// table.copy_on_write(start, 4096, &pool)?.flush();
    ///
    /// let byte = &raw mut page.0[0];
    /// // SAFETY: The table maps what the default one does, but for the copy.
    /// unsafe {
    ///     dune.load(&table);
    ///     byte.write_volatile(8);
    ///     dune.load(&dune.address_space());
    ///     assert_eq!(byte.read_volatile(), 7);
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn copy_on_write(&self, start: Gva, bytes: u64, pool: &FramePool) -> Result<Flush<'_>, PagingError> {
        let number = self.number().ok_or(PagingError::Foreign)?;
        self.process().expect_copies();
        let gib = Gva::new(pool.start().as_u64()).ok_or(PagingError::Foreign)?;
        self.process().tables().get(number).set_pool(pool.header())?;
        self.change(start, bytes, |tree, _| {
            tree.fill(gib)?;
            tree.share(start, bytes)
        })
    }

    /// Gives pages their large leaves back: maps by one of 2 MiB or 1 GiB what 512 smaller ones of a range map alike to memory in one piece, and gives
    /// their tables back. Returns how many tables those were. Flushes by itself, and keeps other changes of page tables
    /// waiting meanwhile.
    ///
    /// # Errors
    ///
    /// [`PagingError::Busy`] where a change that was interrupted (by the calling handler, for one) does not end, else those
    /// [of changes](AddressSpace#errors-of-changes).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use libdune::{Dune, Gva, Permissions};
    ///
    /// const LARGE: u64 = 2 << 20;
    /// let memory = vec![7u8; 3 * LARGE as usize];
    /// let dune = Dune::enter()?;
    /// let space = dune.address_space();
    /// let start = Gva::of(memory.as_ptr()).and_then(|start| start.checked_add(LARGE)).ok_or("not canonical")?;
    /// let start = start.align_down(LARGE);
    /// // Two tables more: leaves of 2 MiB, and of 4 KiB.
    /// space.protect(start, 4096, Permissions::READ)?.flush();
    /// space.protect(start, 4096, Permissions::ALL)?.flush();
    /// assert_eq!(space.look_up(start).map(|mapping| mapping.page_bytes), Some(4096));
    /// assert_eq!(space.merge(start, LARGE)?, 1);
    /// assert_eq!(space.look_up(start).map(|mapping| mapping.page_bytes), Some(LARGE));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn merge(&self, start: Gva, bytes: u64) -> Result<u64, PagingError> {
        super::tree::check_range(start, bytes)?;
        self.process()
            .memory
            .exclusively(|| {
                let mut count = 0;
                for level in 1..=2 {
                    count += self.merge_level(start, bytes, level)?;
                }
                Ok(count)
            })
            .unwrap_or(Err(PagingError::Busy))
    }

    fn merge_level(&self, start: Gva, bytes: u64, level: u32) -> Result<u64, PagingError> {
        let size = super::entry::leaf_bytes(level + 1);
        let tree = self.tree();
        let mut merged: [Option<Merged<'_>>; MERGED_AT_ONCE] = [const { None }; MERGED_AT_ONCE];
        let (mut filled, mut count) = (0, 0);
        let finish = |merged: &mut [Option<Merged<'_>>]| {
            // All that is mapped may be cached.
            shoot_down(self.process(), self.name, start, FLUSH_ALL_PAGES + 1);
            if let Some(number) = self.number() {
                self.process().tables().get(number).forget_tables();
            }
            for merged in merged.iter_mut().filter_map(Option::take) {
                tree.finish_merge(&merged);
            }
        };
        let first = start.as_u64().next_multiple_of(size).wrapping_sub(start.as_u64());
        let mut done = first;
        while done.checked_add(size).is_some_and(|end| end <= bytes) {
            let at = start
                .checked_add(done)
                .ok_or(PagingError::OutOfRange { start, bytes })?;
            if let Some(table) = tree.merge(at, level)? {
                merged[filled] = Some(table);
                filled += 1;
                count += 1;
            }
            if filled == MERGED_AT_ONCE {
                finish(&mut merged);
                filled = 0;
            }
            done += size;
        }
        if filled > 0 {
            finish(&mut merged[..filled]);
        }
        Ok(count)
    }

    /// From now on libdune does not fill GiBs in when they are used first: what is not mapped yet in the lower half
    /// counts as unmapped.
    ///
    /// # Errors
    ///
    /// [`PagingError::Corrupt`].
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use libdune::{Dune, Gva};
    ///
    /// let dune = Dune::enter()?;
    /// let (table, sealed) = (dune.new_page_table()?, dune.new_page_table()?);
    /// sealed.seal()?;
    /// // A whole GiB that nobody used.
    /// let (protection, flags) = (libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
    /// // SAFETY: A new mapping.
    /// let start = unsafe { libc::mmap(core::ptr::null_mut(), 2 << 30, protection, flags, -1, 0) };
    /// assert_ne!(start, libc::MAP_FAILED);
    /// let start = Gva::new((start as u64).next_multiple_of(1 << 30)).ok_or("not canonical")?;
    /// assert!(table.fill(start)? && !sealed.fill(start)?);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn seal(&self) -> Result<(), PagingError> {
        let _using = self.process().memory.begin();
        self.tree().seal()
    }

    /// A table of its own that maps the same.
    ///
    /// Pages of which this table has a copy of its own ([`AddressSpace::copy_on_write`]) are the same memory in both; to
    /// part them say `copy_on_write` of both.
    ///
    /// # Errors
    ///
    /// [`PagingError::OutOfTables`], [`PagingError::OutOfMemory`] and what getting more memory can give.
    pub fn duplicate(&self) -> Result<PageTable, PagingError> {
        let retired = Retired::default();
        // SAFETY: The process is alive; the tree is a fresh copy.
        let table = unsafe {
            PageTable::new(self.process, || {
                with_slots(&self.process().memory, || {
                    self.tree().duplicate(&retired).map(|tree| tree.root)
                })
            })
        };
        if let (false, Some(start)) = (retired.is_empty(), Gva::new(0)) {
            // SAFETY: Alive as long as this handle.
            unsafe { Flush::new(self.process, self.name, start, FLUSH_ALL_PAGES + 1, retired) }.flush();
        }
        table.and_then(|table| {
            if let Some(pool) = self
                .number()
                .and_then(|number| self.process().tables().get(number).pool())
            {
                self.process().tables().get(table.own_number()).set_pool(pool)?;
            }
            Ok(table)
        })
    }

    /// A table that maps what this one does, with a range copied on write in both: what is written through one of them, once
    /// this has returned, is not seen through the other. Flushes by itself. What other threads write meanwhile may be in it. See [`AddressSpace::copy_on_write`] for what Linux sees.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # #[repr(align(4096))]
    /// # struct Page([u8; 4096]);
    /// use libdune::{Dune, FramePool, Gva};
    ///
    /// let mut page = Box::new(Page([1; 4096]));
    /// let dune = Dune::enter()?;
    /// let pool = FramePool::new()?;
    /// let start = Gva::of(&raw const *page).ok_or("not canonical")?;
    /// let snapshot = dune.address_space().snapshot(start, 4096, &pool)?;
    ///
    /// let byte = &raw mut page.0[0];
    /// // SAFETY: The snapshot maps what the default table does.
    /// unsafe {
    ///     byte.write_volatile(2);
    ///     dune.load(&snapshot);
    ///     assert_eq!(byte.read_volatile(), 1);
    ///     dune.load(&dune.address_space());
    ///     assert_eq!(byte.read_volatile(), 2);
    /// }
    /// assert_eq!(pool.used(), 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`AddressSpace::copy_on_write`] and [`AddressSpace::duplicate`].
    pub fn snapshot(&self, start: Gva, bytes: u64, pool: &FramePool) -> Result<PageTable, PagingError> {
        let copy = self.duplicate()?;
        // The copy is nobody's yet. What other threads write until the flush is done may be seen through both, and is memory
        // of both then: from there on each has its own.
        copy.copy_on_write(start, bytes, pool)?.ignore();
        self.copy_on_write(start, bytes, pool)?.flush();
        Ok(copy)
    }

    /// Whether CR3 holds this space.
    pub fn is_loaded(&self) -> bool {
        is_cpl0() && loaded_root() == self.root().as_u64()
    }

    pub(super) fn name(&self) -> Name {
        self.name
    }

    pub(super) fn process_pointer(&self) -> *const Process {
        self.process
    }

    #[inline]
    pub(crate) fn number(&self) -> Option<u16> {
        self.name.number()
    }

    pub(crate) fn is_of(&self, process: *const Process) -> bool {
        ptr::eq(self.process, process)
    }
}

/// Finds the entry of a page that is mapped by 4 KiB, and remembers where the table is.
#[cold]
#[inline(never)]
fn remember<'d>(space: AddressSpace<'d>, record: &Record, page: Gva) -> Option<&'d AtomicU64> {
    // SAFETY: Alive for 'd.
    let memory = unsafe { &(*space.process).memory };
    let tree = Tree {
        frames: memory,
        root: record.root(),
    };
    let found = tree.find(page).ok()?;
    (found.level == 1).then(|| {
        record.remember(memory, page, found.slot);
        found.slot
    })
}

/// What is retired is nothing.
#[inline(never)]
fn protect_range(space: AddressSpace<'_>, start: Gva, bytes: u64, permissions: Permissions) -> Result<(), PagingError> {
    space
        .change(start, bytes, |tree, _| tree.protect(start, bytes, permissions))
        .map(Flush::ignore)
}

#[cold]
#[inline(never)]
fn end(using: Using<'_>) {
    drop(using);
}
