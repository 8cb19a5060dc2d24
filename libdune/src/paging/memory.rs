// SPDX-License-Identifier: MIT OR Apache-2.0

//! Table pages from the arena, and the slots that the module hands out.
//!
//! # Safety
//!
//! Raw pointers into the arena, which lives as long as a Dune thread of the process. All threads and their trap handlers
//! use it at once: a page is taken off its list before it is touched.

pub(super) mod recycle;

use core::sync::atomic::AtomicBool;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::AcqRel;
use core::sync::atomic::Ordering::Acquire;
use core::sync::atomic::Ordering::Relaxed;

use dune_abi::MapSlot;
use dune_abi::DUNE_MAP_SLOT;
use dune_abi::MAP_SLOT_AT;

use super::pool::Header;
use super::tree::Frames;
use super::tree::Retired;
use super::tree::Table;
use super::PagingError;
use super::Permissions;
use crate::addr::Gpa;
use crate::addr::Gva;
use crate::addr::Hva;
use crate::layout;
use crate::sys;

const PAGE: u64 = layout::PAGE as u64;

/// Where page tables live and what is where in GPA space.
///
/// Used by all Dune threads at once, and by trap entry in the middle of itself: there is no lock but while slots are
/// given back (`recycle`).
///
/// # Invariants
///
/// `forward` has `GIBS` and `reverse` has `SLOTS` entries, alive as long as this. `next .. end()` is unused memory of
/// the pool, zeroed; `end() .. limit` is reserved for it. All of it lies in one GiB, which every tree maps before it is
/// used: filling that in needs a page itself. The lower half of `free` is the number + 1 of the first page of a list
/// linked through their first words, counted from `start`; the upper half counts its changes.
#[repr(C)]
pub(crate) struct Memory {
    fd: i32,
    has_1g: bool,
    forward: *const AtomicU32,
    reverse: *const AtomicU32,
    next: AtomicU64,
    /// Start of the pool.
    pool: u64,
    /// Bytes of it that are accessible.
    pool_bytes: AtomicU64,
    /// Its GPA, once something was allocated.
    pool_gpa: AtomicU64,
    free: AtomicU64,
    /// Behind the last slot that was ever handed out.
    slots_end: AtomicU32,
    /// See `recycle`.
    users: AtomicU32,
    limit: u64,
    /// Start of the arena.
    start: u64,
    /// CPL3 may use what is filled in, but for the arena.
    fills_for_user: AtomicBool,
}

impl Memory {
    /// Starts with the pool and the tables of a fresh arena.
    ///
    /// # Safety
    ///
    /// `arena` must be a zeroed arena that outlives this, and `fd` the device.
    pub unsafe fn new(fd: i32, has_1g: bool, arena: u64) -> Self {
        // INVARIANT: The arena is laid out so.
        Self {
            fd,
            has_1g,
            forward: (arena + layout::FORWARD as u64) as *const AtomicU32,
            reverse: (arena + layout::REVERSE as u64) as *const AtomicU32,
            next: AtomicU64::new(arena + layout::POOL as u64),
            pool: arena + layout::POOL as u64,
            pool_bytes: AtomicU64::new(layout::POOL_STEP as u64),
            pool_gpa: AtomicU64::new(0),
            free: AtomicU64::new(0),
            slots_end: AtomicU32::new(0),
            users: AtomicU32::new(0),
            limit: arena + layout::ARENA_BYTES as u64,
            start: arena,
            fills_for_user: AtomicBool::new(false),
        }
    }

    /// From now on CPL3 may use what is filled in.
    pub fn fill_for_user(&self) {
        self.fills_for_user.store(true, Relaxed);
    }

    /// Has a GiB of the process, that has no slot yet, be in the slot at `gpa`.
    pub fn claim(&self, hva: Hva, gpa: Gpa) -> Result<(), PagingError> {
        let start = match self.ask(hva.gib() << 30, Some(gpa.as_u64())) {
            Ok(start) => start,
            Err(errno) => return Err(PagingError::MapSlot { hva, errno: errno.0 }),
        };
        self.enter(hva, start)
    }

    /// Notes which slot a GiB has.
    fn enter(&self, hva: Hva, start: u64) -> Result<(), PagingError> {
        let slot = start >> 30;
        let reverse = self.reverse(slot).ok_or(PagingError::Corrupt(start))?;
        self.slots_end.fetch_max(slot as u32 + 1, Relaxed);
        reverse.store(hva.gib() as u32 + 1, Relaxed);
        self.forward(hva.gib()).store(slot as u32, Relaxed);
        Ok(())
    }

    fn forward(&self, gib: u64) -> &AtomicU32 {
        assert!(gib < layout::GIBS as u64);
        // SAFETY: In bounds by the type invariant.
        unsafe { &*self.forward.add(gib as usize) }
    }

    fn reverse(&self, slot: u64) -> Option<&AtomicU32> {
        // SAFETY: In bounds by the type invariant.
        (slot < layout::SLOTS as u64).then(|| unsafe { &*self.reverse.add(slot as usize) })
    }

    /// The HVA of a byte at a GPA in a known slot.
    pub fn hva(&self, gpa: Gpa) -> Option<Hva> {
        match self.reverse(gpa.as_u64() >> 30)?.load(Relaxed) {
            0 => None,
            gib => Hva::new((u64::from(gib - 1) << 30) | (gpa.as_u64() & 0x3fff_ffff)),
        }
    }

    /// Start of the arena.
    #[inline]
    pub fn start(&self) -> u64 {
        self.start
    }

    /// The GPA of a table of the arena, by its address.
    pub fn table_gpa(&self, address: u64) -> Option<Gpa> {
        let offset = address.wrapping_sub(self.pool);
        let is_table = offset < self.pool_bytes.load(Relaxed);
        is_table
            .then(|| Gpa::new(self.pool_gpa.load(Relaxed).wrapping_add(offset)))
            .flatten()
    }

    /// The GPA of a byte of the process, which gets a slot if it has none.
    pub fn gpa_of(&self, hva: Hva) -> Result<Gpa, PagingError> {
        recycle::with_slots(self, || self.gpa(hva))
    }

    /// End of what of the pool is accessible.
    fn end(&self) -> u64 {
        self.pool + self.pool_bytes.load(Acquire)
    }

    /// Number of the page of the pool that this entry of a table is in.
    pub(super) fn page_of(&self, entry: &AtomicU64) -> u64 {
        (core::ptr::from_ref(entry) as u64).wrapping_sub(self.pool) / PAGE
    }

    /// The entry for `gva` in a table whose entries map 4 KiB.
    ///
    /// # Safety
    ///
    /// `page` must be the number of a page of the pool that is in use as such a table, and stays so for the borrow.
    #[inline]
    pub(super) unsafe fn entry_in(&self, page: u64, gva: Gva) -> &AtomicU64 {
        // SAFETY: The caller's.
        unsafe { &(*((self.pool + page * PAGE) as *const Table)).0[gva.index(1)] }
    }

    /// Calls `f` with the pool of a frame that a table owns.
    fn with_pool<R>(&self, frame: Gpa, f: impl FnOnce(&Header, Hva) -> R) -> Option<R> {
        let frame = self.hva(frame)?;
        // SAFETY: Only frames of a table's pool are entered as owned, and the table holds its pool.
        Some(f(unsafe { Header::of(frame) }, frame))
    }

    fn take_free(&self) -> Option<u64> {
        let mut head = self.free.load(Acquire);
        loop {
            let number = head as u32;
            if number == 0 {
                return None;
            }
            let page = self.start + u64::from(number - 1) * PAGE;
            // SAFETY: A page of the pool. Another thread may have taken it meanwhile: then the exchange fails, because
            // each one that succeeds changes the upper half.
            let next = unsafe { (*(page as *const AtomicU64)).load(Relaxed) };
            let new = (head >> 32).wrapping_add(1) << 32 | u64::from(next as u32);
            match self.free.compare_exchange(head, new, AcqRel, Acquire) {
                Ok(_) => {
                    // SAFETY: The page is off the list now and nobody else's.
                    unsafe { (page as *mut [u8; layout::PAGE]).write_bytes(0, 1) };
                    return Some(page);
                }
                Err(now) => head = now,
            }
        }
    }

    fn put_free(&self, page: &Table) {
        let number = (page as *const Table as u64 - self.start) / PAGE + 1;
        let mut head = self.free.load(Relaxed);
        loop {
            page.0[0].store(u64::from(head as u32), Relaxed);
            let new = (head >> 32).wrapping_add(1) << 32 | number;
            match self.free.compare_exchange(head, new, AcqRel, Relaxed) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    /// A page that never was used.
    fn take_new(&self) -> Result<u64, PagingError> {
        let page = self.next.fetch_add(PAGE, Relaxed);
        loop {
            let end = self.end();
            if page < end {
                return Ok(page);
            }
            if end >= self.limit {
                // Nobody can have it: it stays counted.
                self.next.store(self.limit, Relaxed);
                return Err(PagingError::OutOfMemory(libc::ENOMEM));
            }
            // Several threads may come here at once: the same twice does no harm.
            // SAFETY: The arena's own reserve.
            unsafe { sys::mprotect(end, layout::POOL_STEP, libc::PROT_READ | libc::PROT_WRITE) }
                .map_err(|errno| PagingError::OutOfMemory(errno.0))?;
            let bytes = end - self.pool;
            let _ = self
                .pool_bytes
                .compare_exchange(bytes, bytes + layout::POOL_STEP as u64, AcqRel, Relaxed);
        }
    }

    /// In the child of a fork: has the slots of its fresh space be where the page tables of its parent have them.
    pub fn claim_slots(&self) -> Result<(), sys::Errno> {
        self.forget_other_users();
        for slot in 0..u64::from(self.slots_end.load(Relaxed)) {
            let gib = self.reverse(slot).map_or(0, |gib| gib.load(Relaxed));
            if gib != 0 {
                self.ask((u64::from(gib) - 1) << 30, Some(slot << 30))?;
            }
        }
        Ok(())
    }

    fn ask(&self, hva: u64, wanted: Option<u64>) -> Result<u64, sys::Errno> {
        let mut ask = MapSlot {
            size: size_of::<MapSlot>() as u32,
            flags: if wanted.is_some() { MAP_SLOT_AT } else { 0 },
            hva,
            gpa: wanted.unwrap_or(0),
        };
        // SAFETY: The request takes a pointer to this structure.
        unsafe { sys::request(self.fd, DUNE_MAP_SLOT, &raw mut ask as u64) }.map(|_| ask.gpa)
    }
}

// SAFETY: A page leaves the list or the pool before it is given out, and `hva` undoes `gpa`.
unsafe impl Frames for Memory {
    fn allocate(&self) -> Result<Gpa, PagingError> {
        let page = match self.take_free() {
            Some(page) => page,
            None => self.take_new()?,
        };
        let gpa = self.gpa(Hva::new(page).ok_or(PagingError::Corrupt(page))?)?;
        // INVARIANT: One GiB, one slot: the same number each time.
        self.pool_gpa
            .store(gpa.as_u64().wrapping_sub(page - self.pool), Relaxed);
        Ok(gpa)
    }

    fn free(&self, table: Gpa) {
        if let Some(page) = self.table(table) {
            // The caller's page, unused from now on.
            self.put_free(page);
        }
    }

    #[inline]
    fn table(&self, gpa: Gpa) -> Option<&Table> {
        let offset = gpa.align_down(PAGE).as_u64().wrapping_sub(self.pool_gpa.load(Relaxed));
        // SAFETY: GPAs of tables come from `allocate`: a page of the pool that holds only atomic entries. Whatever
        // else an entry was made to hold, memory of the pool it is.
        (offset < self.pool_bytes.load(Relaxed)).then(|| unsafe { &*((self.pool + offset) as *const Table) })
    }

    fn gpa(&self, hva: Hva) -> Result<Gpa, PagingError> {
        let offset = hva.as_u64() & 0x3fff_ffff;
        let known = self.forward(hva.gib()).load(Relaxed);
        if known != 0 {
            return Gpa::new((u64::from(known) << 30) | offset).ok_or(PagingError::Corrupt(u64::from(known)));
        }
        let start = match self.ask(hva.gib() << 30, None) {
            Ok(start) => start,
            Err(sys::Errno(libc::ENOSPC)) => return Err(PagingError::OutOfSlots(hva)),
            Err(errno) => return Err(PagingError::MapSlot { hva, errno: errno.0 }),
        };
        self.enter(hva, start)?;
        Gpa::new(start | offset).ok_or(PagingError::Corrupt(start))
    }

    fn has_1g(&self) -> bool {
        self.has_1g
    }

    fn fill_permissions(&self, hva: Hva) -> Permissions {
        let is_arena = hva.gib() == self.start >> 30;
        if self.fills_for_user.load(Relaxed) && !is_arena {
            Permissions::ALL | Permissions::USER
        } else {
            Permissions::ALL
        }
    }

    fn keep(&self, frame: Gpa) -> bool {
        self.with_pool(frame, |pool, frame| pool.keep(frame)).unwrap_or(false)
    }

    fn release(&self, frame: Gpa) {
        self.with_pool(frame, |pool, frame| pool.release(frame));
    }

    fn retire(&self, frame: Gpa, retired: &Retired) {
        self.with_pool(frame, |pool, frame| pool.retire(frame, retired));
    }
}
