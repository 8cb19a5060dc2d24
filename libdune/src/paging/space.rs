// SPDX-License-Identifier: MIT OR Apache-2.0

//! Guest address spaces: trees of tables that a CPU can have loaded, and the TLBs.
//!
//! # Safety
//!
//! MOV CR3, INVLPG and SGDT fault or mean something else outside CPL0; they are only executed after reading CS. A changed
//! page table can take memory away from compiled code: that is what it is for, and the functions that can do it say so.

use core::arch::asm;
use core::fmt;
use core::marker::PhantomData;
use core::ops::Deref;
use core::ptr;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::AcqRel;
use core::sync::atomic::Ordering::Relaxed;

use dune_abi::DUNE_FLUSH;

use super::memory::recycle::with_slots;
use super::memory::Memory;
use super::pool;
use super::pool::FramePool;
use super::protocol;
use super::protocol::Here;
use super::tables::Tables;
use super::tree::Frames;
use super::tree::Mapping;
use super::tree::Merged;
use super::tree::Retired;
use super::tree::Tree;
use super::tree::Unshared;
use super::tree::Used;
use super::PagingError;
use super::Permissions;
use crate::addr::Gpa;
use crate::addr::Gva;
use crate::addr::Hva;
use crate::addr::PAGE_BYTES;
use crate::entry;
use crate::layout;
use crate::process;
use crate::process::Process;
use crate::sys;

/// Above this many pages it is cheaper to flush all.
const FLUSH_ALL_PAGES: u64 = 64;
/// Tables that one flush gives back.
const MERGED_AT_ONCE: usize = 64;

/// Whether the caller runs at CPL0, which a Linux process does in Dune mode only.
pub(crate) fn is_cpl0() -> bool {
    let selector: u16;
    // SAFETY: Reads CS.
    unsafe { asm!("mov {0:x}, cs", out(reg) selector, options(nomem, nostack, preserves_flags)) };
    selector & 3 == 0
}

pub(crate) fn read_cr3() -> u64 {
    let value: u64;
    // SAFETY: The callers are at CPL0.
    unsafe { asm!("mov {}, cr3", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

unsafe fn write_cr3(value: u64) {
    // SAFETY: The caller is at CPL0 and the table maps what runs.
    unsafe { asm!("mov cr3, {}", in(reg) value, options(nostack, preserves_flags)) };
}

/// GPA of the top table that CR3 holds.
pub(crate) fn loaded_root() -> u64 {
    read_cr3() & !(PAGE_BYTES - 1)
}

/// Forgets what the TLB has of one page of the loaded table. Does nothing outside Dune mode.
pub(crate) fn flush_page(gva: Gva) {
    if is_cpl0() {
        // SAFETY: At CPL0; forgetting a translation changes nothing else.
        unsafe { asm!("invlpg [{}]", in(reg) gva.as_u64(), options(nostack, preserves_flags)) };
    }
}

/// Forgets what the TLB has of the loaded table. Does nothing outside Dune mode.
pub(crate) fn flush_all() {
    if is_cpl0() {
        // SAFETY: At CPL0, and the same table stays loaded.
        unsafe { write_cr3(read_cr3()) };
    }
}

/// The area of the calling thread, if it is in Dune mode: where its GDT is.
fn own_area(process: &Process) -> Option<u64> {
    #[repr(C, packed(2))]
    struct Pointer {
        limit: u16,
        base: u64,
    }
    if !is_cpl0() {
        return None;
    }
    let mut gdt = Pointer { limit: 0, base: 0 };
    // SAFETY: Writes ten bytes.
    unsafe { asm!("sgdt [{}]", in(reg) &raw mut gdt, options(nostack, preserves_flags)) };
    process.area_of(gdt.base)
}

/// The generations that the thread of an area flushed its TLB for.
///
/// # Safety
///
/// `area` must be a Dune thread's, alive for `'a`.
unsafe fn seen<'a>(area: u64, number: u16) -> &'a AtomicU64 {
    let index = usize::from(number) % layout::TABLE_COUNT;
    // SAFETY: The caller's; in bounds.
    unsafe { &*((area + layout::SEEN as u64) as *const AtomicU64).add(index) }
}

/// Has every Dune thread that may use old translations of these pages forget them, before this returns.
fn shoot_down(process: &Process, number: Option<u16>, root: Gpa, start: Gva, pages: u64) {
    let generation = number.map(|number| &process.tables().get(number).generation);
    let raised = generation.map(protocol::raise);
    let area = own_area(process);
    if area.is_some() && loaded_root() == root.as_u64() {
        flush_here(start, pages);
        if let (Some(area), Some(number), Some(raised)) = (area, number, raised) {
            // SAFETY: The calling thread's.
            let seen = unsafe { seen(area, number) };
            // Up to date before, and so it is now.
            let _ = seen.compare_exchange(raised - 1, raised, AcqRel, Relaxed);
        }
    }
    if process.others_use(number, area) {
        // SAFETY: The request has no argument.
        let _ = unsafe { sys::request(process.fd, DUNE_FLUSH, 0) };
    }
}

fn flush_here(start: Gva, pages: u64) {
    if pages > FLUSH_ALL_PAGES {
        flush_all();
    } else {
        for page in 0..pages {
            if let Some(gva) = start.checked_add(page * PAGE_BYTES) {
                flush_page(gva);
            }
        }
    }
}

/// Makes the calling thread, whose area this is, use a table.
///
/// # Safety
///
/// The thread must be at CPL0, and the table must have a user and map what runs.
pub(crate) unsafe fn switch(process: &Process, area: u64, here: &Here, number: u16) {
    let tables = process.tables();
    let record = tables.get(number);
    tables.hold(number);
    // SAFETY: The calling thread's area; the rest is the caller's.
    let before = unsafe {
        here.switch(number, &record.generation, seen(area, number), |keep| {
            write_cr3(record.cr3(number, process.has_pcid, keep));
        })
    };
    if let Some(before) = before {
        tables.let_go(before);
    }
}

/// Settles a write that the loaded table forbids to the CPU, not to the program: the page gets a copy, or another thread
/// was quicker. False where it is none of that.
pub(crate) fn settle_write(process: &Process, here: &Here, gva: Gva, from_user: bool) -> Result<bool, PagingError> {
    let Some(number) = here.number() else {
        return Ok(false);
    };
    let record = process.tables().get(number);
    let root = record.root();
    let Some(pool) = record.pool() else {
        return Ok(false);
    };
    if loaded_root() != root.as_u64() {
        return Ok(false);
    }
    let frames = &process.memory;
    let tree = Tree { frames, root };
    let page = gva.align_down(PAGE_BYTES);
    let is_last = |frame| frames.hva(frame).is_some_and(|frame| pool.is_last(frame));
    let copy = || {
        let frame = pool.take()?;
        // SAFETY: The loaded table lets CPL0 read the page, and maps the pool; nobody else has the frame.
        unsafe { copy_page(page, frame) };
        frames.gpa(frame).inspect_err(|_| pool.release(frame))
    };
    match with_slots(frames, || tree.unshare(page, is_last, copy))? {
        Unshared::NotShared => {
            let allows = tree.look_up(page).is_some_and(|mapping| {
                mapping.permissions.contains(Permissions::WRITE)
                    && mapping.permissions.contains(Permissions::USER) == from_user
            });
            if allows {
                flush_page(page);
            }
            Ok(allows)
        }
        Unshared::Alone => {
            flush_page(page);
            Ok(true)
        }
        Unshared::Copied { released } => {
            shoot_down(process, Some(number), root, page, 1);
            if let Some(frame) = released.and_then(|frame| frames.hva(frame)) {
                pool.release(frame);
            }
            Ok(true)
        }
    }
}

/// Copies a page, also where CPL3 may use it and SMAP keeps CPL0 off.
///
/// # Safety
///
/// `from` must be readable at CPL0, and `to` writable and nobody else's.
unsafe fn copy_page(from: Gva, to: Hva) {
    const SMAP: u64 = 1 << 21;
    let cr4: u64;
    // SAFETY: At CPL0, in a trap handler; the rest is the caller's. AC goes back with the frame.
    unsafe {
        asm!("mov {}, cr4", out(reg) cr4, options(nomem, nostack, preserves_flags));
        if cr4 & SMAP != 0 {
            asm!("stac", options(nomem, nostack));
        }
        asm!(
            "rep movsq",
            inout("rcx") PAGE_BYTES / 8 => _,
            inout("rsi") from.as_u64() => _,
            inout("rdi") to.as_u64() => _,
            options(nostack, preserves_flags),
        );
        if cr4 & SMAP != 0 {
            asm!("clac", options(nomem, nostack));
        }
    }
}

/// What TLBs may still hold after a change: flush it, or say that it does not matter.
///
/// Where it is dropped otherwise, frames of a pool that the change took out stay in use for good.
#[must_use = "TLBs may still hold the old translation: call flush() or ignore()"]
pub struct Flush<'t> {
    process: *const Process,
    number: Option<u16>,
    root: Gpa,
    start: Gva,
    pages: u64,
    retired: Retired,
    _table: PhantomData<&'t ()>,
}

impl fmt::Debug for Flush<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Flush({} + {} pages of {})", self.start, self.pages, self.root)
    }
}

impl Flush<'_> {
    /// Has the calling thread and every other Dune thread that may use old translations of the changed pages forget them,
    /// before this returns.
    ///
    /// Costs a system call where another thread has the table in CR3, else INVLPG per page, or MOV CR3 above 64 pages.
    pub fn flush(self) {
        // SAFETY: Alive as long as the table.
        shoot_down(
            unsafe { &*self.process },
            self.number,
            self.root,
            self.start,
            self.pages,
        );
        self.release();
    }

    /// The same for the calling thread only: no other has used the pages, or each flushes for itself.
    pub fn flush_local(self) {
        if is_cpl0() && loaded_root() == self.root.as_u64() {
            flush_here(self.start, self.pages);
        }
        self.release();
    }

    /// Leaves TLBs as they are: the change only added access, or no thread used the pages.
    pub fn ignore(self) {
        self.release();
    }

    fn release(&self) {
        // SAFETY: The table, whose pool it is, is alive; the flush is done, or the caller says that none is needed.
        unsafe { pool::Header::release_retired(&self.retired) };
    }
}

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
/// it. Ranges are whole pages of 4 KiB within one half of the canonical addresses. Any thread may change a table at any
/// time, also from a trap handler: entries change one by one, each at once.
pub struct AddressSpace<'d> {
    process: *const Process,
    number: Option<u16>,
    root: Gpa,
    _dune: PhantomData<&'d ()>,
}

impl fmt::Debug for AddressSpace<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AddressSpace({})", self.root)
    }
}

impl<'d> AddressSpace<'d> {
    /// The space with this number.
    ///
    /// # Safety
    ///
    /// It must have a user, and the arena be alive, for `'d`.
    pub(crate) unsafe fn borrowed(process: *const Process, number: u16) -> Self {
        // SAFETY: The caller's.
        let root = unsafe { (*process).tables().get(number).root() };
        Self {
            process,
            number: Some(number),
            root,
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
            number: None,
            root,
            _dune: PhantomData,
        }
    }

    fn process(&self) -> &Process {
        // SAFETY: Alive for 'd.
        unsafe { &*self.process }
    }

    fn tree(&self) -> Tree<'_, Memory> {
        Tree {
            frames: &self.process().memory,
            root: self.root,
        }
    }

    /// Does something that may need slots, and that TLBs have to hear of.
    fn change(
        &self,
        start: Gva,
        bytes: u64,
        operation: impl Fn(Tree<'_, Memory>, &Retired) -> Result<(), PagingError>,
    ) -> Result<Flush<'_>, PagingError> {
        let flush = Flush {
            process: self.process,
            number: self.number,
            root: self.root,
            start,
            pages: bytes / PAGE_BYTES,
            retired: Retired::default(),
            _table: PhantomData,
        };
        match with_slots(&self.process().memory, || operation(self.tree(), &flush.retired)) {
            Ok(()) => Ok(flush),
            Err(error) => {
                // Pages before the one that failed are changed.
                flush.flush();
                Err(error)
            }
        }
    }

    /// GPA of the top table.
    pub fn root(&self) -> Gpa {
        self.root
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
    /// # Errors
    ///
    /// See [`PagingError`]; pages before the one that failed are changed.
    pub fn protect(&self, start: Gva, bytes: u64, permissions: Permissions) -> Result<Flush<'_>, PagingError> {
        self.change(start, bytes, |tree, _| tree.protect(start, bytes, permissions))
    }

    /// Maps whole pages to the memory of the process at `to`: by leaves of 2 MiB and 1 GiB where both addresses are
    /// multiples of that and nothing smaller was mapped there before.
    ///
    /// # Errors
    ///
    /// See [`PagingError`]; pages before the one that failed are changed.
    pub fn map(&self, start: Gva, bytes: u64, to: Hva, permissions: Permissions) -> Result<Flush<'_>, PagingError> {
        self.change(start, bytes, |tree, retired| {
            tree.map(start, bytes, to, permissions, retired)
        })
    }

    /// Takes whole pages out of the table. The process still has what lies there.
    ///
    /// # Errors
    ///
    /// See [`PagingError`]; pages before the one that failed are changed.
    pub fn unmap(&self, start: Gva, bytes: u64) -> Result<Flush<'_>, PagingError> {
        self.change(start, bytes, |tree, retired| tree.unmap(start, bytes, retired))
    }

    /// Lets CPL3 use whole pages too, or no longer.
    ///
    /// # Errors
    ///
    /// See [`PagingError`]; pages before the one that failed are changed.
    pub fn set_user(&self, start: Gva, bytes: u64, user: bool) -> Result<Flush<'_>, PagingError> {
        self.change(start, bytes, |tree, _| tree.set_user(start, bytes, user))
    }

    /// Gives whole pages a protection key. It binds where CPL3 may use the page: PKRU then says what may be done with it,
    /// at CPL0 too.
    ///
    /// # Errors
    ///
    /// [`PagingError::NoProtectionKeys`] where the CPU or Linux has none, [`PagingError::NoSuchKey`] above 15, else see
    /// [`PagingError`]; pages before the one that failed are changed.
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
    /// See [`PagingError`]; pages before the one that failed are changed.
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
    /// # Errors
    ///
    /// See [`PagingError`].
    pub fn take_used(
        &self,
        start: Gva,
        bytes: u64,
        used: Used,
        mut visit: impl FnMut(UsedPage),
    ) -> Result<Flush<'_>, PagingError> {
        self.for_each_used(start, bytes, used, true, &mut visit)?;
        self.change(start, bytes, |_, _| Ok(()))
    }

    /// The same without clearing anything: nothing is to be flushed.
    ///
    /// # Errors
    ///
    /// See [`PagingError`].
    pub fn read_used(
        &self,
        start: Gva,
        bytes: u64,
        used: Used,
        mut visit: impl FnMut(UsedPage),
    ) -> Result<(), PagingError> {
        self.for_each_used(start, bytes, used, false, &mut visit)
    }

    fn for_each_used(
        &self,
        start: Gva,
        bytes: u64,
        used: Used,
        clear: bool,
        visit: &mut dyn FnMut(UsedPage),
    ) -> Result<(), PagingError> {
        super::tree::check_range(start, bytes)?;
        let mut done = 0;
        loop {
            let batch = {
                let _using = self.process().memory.begin();
                self.tree().take_used(start, bytes, done, used, clear)?
            };
            let Some(batch) = batch else { return Ok(()) };
            for (word, bits) in batch.used.iter().enumerate() {
                let mut left = *bits;
                while left != 0 {
                    let bit = left.trailing_zeros();
                    left &= left - 1;
                    let offset = (word as u64 * 64 + u64::from(bit)) * batch.page_bytes;
                    visit(UsedPage {
                        start: batch.start.checked_add(offset).unwrap_or(start),
                        bytes: batch.page_bytes,
                        is_dirty: batch.dirty[word] >> bit & 1 != 0,
                    });
                }
            }
            done = batch.done;
        }
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
    /// [`PagingError::OtherPool`], else see [`PagingError`]; pages before the one that failed are changed.
    pub fn copy_on_write(&self, start: Gva, bytes: u64, pool: &FramePool) -> Result<Flush<'_>, PagingError> {
        let number = self.number.ok_or(PagingError::Foreign)?;
        let gib = Gva::new(pool.start().as_u64()).ok_or(PagingError::Foreign)?;
        self.process().tables().get(number).set_pool(pool.header())?;
        self.change(start, bytes, |tree, _| {
            tree.fill(gib)?;
            tree.share(start, bytes)
        })
    }

    /// Maps by a leaf of 2 MiB or 1 GiB what 512 smaller ones of a range map alike to memory in one piece, and gives
    /// their tables back. Returns how many tables those were. Flushes by itself, and keeps other changes of page tables
    /// waiting meanwhile.
    ///
    /// # Errors
    ///
    /// [`PagingError::Busy`] where a change that was interrupted (by the calling handler, for one) does not end.
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
            shoot_down(self.process(), self.number, self.root, start, FLUSH_ALL_PAGES + 1);
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
        // SAFETY: The process is alive; the tree is a fresh copy.
        unsafe {
            PageTable::new(self.process, || {
                with_slots(&self.process().memory, || self.tree().duplicate().map(|tree| tree.root))
            })
        }
        .and_then(|table| {
            if let Some(pool) = self
                .number
                .and_then(|number| self.process().tables().get(number).pool())
            {
                self.process().tables().get(table.number).set_pool(pool)?;
            }
            Ok(table)
        })
    }

    /// A table that maps what this one does, with a range copied on write in both: what is written through one of them is
    /// not seen through the other. Flushes by itself. See [`AddressSpace::copy_on_write`] for what Linux sees.
    ///
    /// # Errors
    ///
    /// As [`AddressSpace::copy_on_write`] and [`AddressSpace::duplicate`].
    pub fn snapshot(&self, start: Gva, bytes: u64, pool: &FramePool) -> Result<PageTable, PagingError> {
        self.copy_on_write(start, bytes, pool)?.flush();
        self.duplicate()
    }

    /// Whether CR3 holds this space.
    pub fn is_loaded(&self) -> bool {
        is_cpl0() && loaded_root() == self.root.as_u64()
    }

    pub(crate) fn number(&self) -> Option<u16> {
        self.number
    }

    pub(crate) fn is_of(&self, process: *const Process) -> bool {
        ptr::eq(self.process, process)
    }
}

/// A page table of its own, made by [`AddressSpace::duplicate`], [`AddressSpace::snapshot`] or
/// [`Thread::new_page_table`](crate::Thread::new_page_table).
///
/// What an [`AddressSpace`] can do it can; any thread may have it, also one outside Dune mode. Its tables are given back
/// when it is dropped and no thread has it in CR3 any more. While there is one the process keeps what it has for Dune
/// threads, also when the last of those has left.
#[derive(Debug)]
pub struct PageTable {
    space: AddressSpace<'static>,
    number: u16,
}

// SAFETY: All changes of tables are atomic, and what belongs to one thread is only used where that is the calling one.
unsafe impl Send for PageTable {}
// SAFETY: As above.
unsafe impl Sync for PageTable {}

impl PageTable {
    /// # Safety
    ///
    /// `process` must be alive, and `tree` give the root of a tree that nobody else frees.
    pub(crate) unsafe fn new(
        process: *const Process,
        tree: impl FnOnce() -> Result<Gpa, PagingError>,
    ) -> Result<Self, PagingError> {
        // SAFETY: The caller's.
        let number = unsafe { (*process).tables() }.add(tree)?;
        // SAFETY: The table has the user that `add` counts, and the process the handle's.
        unsafe {
            (*process).add_handle();
            Ok(Self {
                space: AddressSpace::borrowed(process, number),
                number,
            })
        }
    }
}

impl Deref for PageTable {
    type Target = AddressSpace<'static>;

    fn deref(&self) -> &Self::Target {
        &self.space
    }
}

impl Drop for PageTable {
    fn drop(&mut self) {
        let process = self.space.process;
        if !is_cpl0() && process::find() != Some(process) {
            // A child of fork outside Dune mode: the memory is a copy that nobody uses.
            return;
        }
        // SAFETY: The handle's own count of the table, and then of the process.
        unsafe {
            (*process).tables().let_go(self.number);
            if is_cpl0() {
                // Never the last: the calling thread is counted too.
                (*process).drop_handle();
            } else {
                (*process).forget_handle();
                entry::leave_process(process);
            }
        }
    }
}

/// Counts a thread that runs no guest code any more out of the table that it had.
pub(crate) fn forget_thread(process: &Process, here: &Here) {
    if let Some(number) = here.leave() {
        process.tables().let_go(number);
    }
}

/// Has a thread that is being made start with a table.
pub(crate) fn start_thread(process: &Process, number: u16) -> Here {
    Tables::new(&process.memory).hold(number);
    Here::new(Some(number))
}
