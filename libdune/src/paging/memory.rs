// SPDX-License-Identifier: MIT OR Apache-2.0

//! Table pages from the arena, and the slots that the module hands out.
//!
//! # Safety
//!
//! Raw pointers into the arena, which lives until the thread has left Dune mode. Everything is used by one thread
//! only, but re-entered by its trap handlers: a page is taken off its list before it is touched.

use core::sync::atomic::AtomicU32;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;

use dune_abi::MapSlot;
use dune_abi::DUNE_MAP_SLOT;

use super::tree::Frames;
use super::tree::Table;
use super::PagingError;
use crate::addr::Gpa;
use crate::addr::Hva;
use crate::layout;
use crate::sys;

const PAGE: u64 = layout::PAGE as u64;

/// Where page tables live and what is where in GPA space.
///
/// # Invariants
///
/// `forward` has `GIBS` and `reverse` has `SLOTS` entries, alive as long as this. `next .. end` is unused memory of
/// the pool, zeroed; `end .. limit` is reserved for it. All of it lies in one GiB, which every tree maps before it is
/// used: filling that in needs a page itself. `free` heads a list of pages linked through their first word.
#[repr(C)]
pub(crate) struct Memory {
    fd: i32,
    has_1g: bool,
    forward: *const AtomicU32,
    reverse: *const AtomicU32,
    next: AtomicU64,
    end: AtomicU64,
    free: AtomicU64,
    limit: u64,
    /// Start of the arena: what a table's HVA must lie behind.
    start: u64,
    /// HVA less GPA of the arena, wrapping: every table lies in it.
    arena_offset: AtomicU64,
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
            end: AtomicU64::new(arena + (layout::POOL + layout::POOL_STEP) as u64),
            free: AtomicU64::new(0),
            limit: arena + layout::ARENA_BYTES as u64,
            start: arena,
            arena_offset: AtomicU64::new(0),
        }
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

    fn take_free(&self) -> Option<u64> {
        let page = self.free.load(Relaxed);
        if page == 0 {
            return None;
        }
        // SAFETY: Pages on the list are unused and mapped; the first word links them.
        let next = unsafe { (page as *const u64).read() };
        self.free.store(next, Relaxed);
        // SAFETY: The page is off the list now and nobody else's.
        unsafe { (page as *mut [u8; layout::PAGE]).write_bytes(0, 1) };
        Some(page)
    }

    fn grow(&self) -> Result<(), PagingError> {
        let end = self.end.load(Relaxed);
        if end >= self.limit {
            return Err(PagingError::OutOfMemory(libc::ENOMEM));
        }
        // SAFETY: The arena's own reserve, which nothing uses yet.
        unsafe { sys::mprotect(end, layout::POOL_STEP, libc::PROT_READ | libc::PROT_WRITE) }
            .map_err(|errno| PagingError::OutOfMemory(errno.0))?;
        self.end.store(end + layout::POOL_STEP as u64, Relaxed);
        Ok(())
    }
}

// SAFETY: A page leaves the list or the pool before it is given out, and `hva` undoes `gpa`.
unsafe impl Frames for Memory {
    fn allocate(&self) -> Result<Gpa, PagingError> {
        let page = match self.take_free() {
            Some(page) => page,
            None => {
                if self.next.load(Relaxed) >= self.end.load(Relaxed) {
                    self.grow()?;
                }
                self.next.fetch_add(PAGE, Relaxed)
            }
        };
        let gpa = self.gpa(Hva::new(page).ok_or(PagingError::Corrupt(page))?)?;
        // INVARIANT: One GiB, one slot: the same number each time.
        self.arena_offset.store(page.wrapping_sub(gpa.as_u64()), Relaxed);
        Ok(gpa)
    }

    fn free(&self, table: Gpa) {
        if let Some(page) = self.table(table) {
            // The caller's page, unused from now on.
            page.0[0].store(self.free.load(Relaxed), Relaxed);
            self.free.store(page as *const Table as u64, Relaxed);
        }
    }

    fn table(&self, gpa: Gpa) -> Option<&Table> {
        let hva = gpa
            .align_down(PAGE)
            .as_u64()
            .wrapping_add(self.arena_offset.load(Relaxed));
        // SAFETY: GPAs of tables come from `allocate`: a page of the pool that holds only atomic entries. Whatever
        // else an entry was made to hold, memory of the pool it is.
        (hva >= self.start + layout::POOL as u64 && hva < self.end.load(Relaxed))
            .then(|| unsafe { &*(hva as *const Table) })
    }

    fn gpa(&self, hva: Hva) -> Result<Gpa, PagingError> {
        let offset = hva.as_u64() & 0x3fff_ffff;
        let known = self.forward(hva.gib()).load(Relaxed);
        if known != 0 {
            return Gpa::new((u64::from(known) << 30) | offset).ok_or(PagingError::Corrupt(u64::from(known)));
        }
        let mut ask = MapSlot {
            size: size_of::<MapSlot>() as u32,
            flags: 0,
            hva: hva.gib() << 30,
            gpa: 0,
        };
        // SAFETY: The request takes a pointer to this structure.
        match unsafe { sys::ioctl(self.fd, DUNE_MAP_SLOT, &raw mut ask as u64) } {
            Ok(_) => {}
            Err(sys::Errno(libc::ENOSPC)) => return Err(PagingError::OutOfSlots(hva)),
            Err(errno) => return Err(PagingError::MapSlot { hva, errno: errno.0 }),
        }
        let slot = ask.gpa >> 30;
        let reverse = self.reverse(slot).ok_or(PagingError::Corrupt(ask.gpa))?;
        reverse.store(hva.gib() as u32 + 1, Relaxed);
        self.forward(hva.gib()).store(slot as u32, Relaxed);
        Gpa::new((slot << 30) | offset).ok_or(PagingError::Corrupt(ask.gpa))
    }

    fn has_1g(&self) -> bool {
        self.has_1g
    }
}
