// SPDX-License-Identifier: MIT OR Apache-2.0

//! Giving slots back: when they run out, those of GiBs in which the process has nothing mapped any more.
//!
//! # Protocol
//!
//! 1. Everything that puts addresses of slots into page tables does so between [`Memory::begin`] and the end of what
//!    that returns. Whoever recycles waits until nobody is in between, and keeps others out.
//! 2. The module names slots whose GiB has no mapping ([`DUNE_UNUSED_SLOT`]).
//! 3. They are forgotten here, and every entry of every page table that refers to them becomes empty.
//! 4. [`DUNE_UNMAP_SLOT`] takes each back, unless the process has mapped something there meanwhile: then it is
//!    remembered again. The module flushes all CPUs before the slot can be given to another GiB, and no page table leads
//!    to it any more, so no thread can mistake one for the other.
//!
//! # Safety
//!
//! The pool holds pages that are tables or free. An entry of a free page is none of ours: it names no slot but 0.

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::AcqRel;
use core::sync::atomic::Ordering::Acquire;
use core::sync::atomic::Ordering::Relaxed;
use core::sync::atomic::Ordering::Release;

use dune_abi::UnusedSlot;
use dune_abi::DUNE_UNMAP_SLOT;
use dune_abi::DUNE_UNUSED_SLOT;

use super::Memory;
use super::PAGE;
use crate::layout;
use crate::paging::entry::Entry;
use crate::paging::PagingError;
use crate::sys;

/// Somebody recycles; the other bits of `Memory::users` count who uses slots.
const RECYCLING: u32 = 1 << 31;
/// Slots that are given back at once.
const AT_ONCE: usize = 32;
/// How often an operation is tried again: it may need more slots than there are.
const ATTEMPTS: u32 = 64;
/// How often others get the CPU before a thread that left its operation by a jump is given up.
const PATIENCE: u32 = 100_000;

/// Calls `operation`, again where it had no slot and some could be given back.
pub(in crate::paging) fn with_slots<T>(
    memory: &Memory,
    operation: impl Fn() -> Result<T, PagingError>,
) -> Result<T, PagingError> {
    let mut attempt = 0;
    loop {
        let result = {
            let _using = memory.begin();
            operation()
        };
        attempt += 1;
        match result {
            Err(PagingError::OutOfSlots(_)) if attempt < ATTEMPTS && memory.recycle() => {}
            result => return result,
        }
    }
}

/// Slots stay whose they are while this lives.
pub(in crate::paging) struct Using<'m>(&'m Memory);

impl Drop for Using<'_> {
    #[inline]
    fn drop(&mut self) {
        self.0.users.fetch_sub(1, Release);
    }
}

/// A slot that is to be given back.
#[derive(Clone, Copy, Default)]
struct Victim {
    slot: u64,
    gib: u64,
}

fn wait() {
    // SAFETY: Changes nothing but who runs.
    unsafe { sys::raw(libc::SYS_sched_yield, [0; 6]) };
}

impl Memory {
    /// Waits until nobody recycles.
    #[inline]
    pub(in crate::paging) fn begin(&self) -> Using<'_> {
        if self.users.fetch_add(1, Acquire) & RECYCLING != 0 {
            self.begin_later();
        }
        Using(self)
    }

    /// The same where somebody does. That one only waits for the count to be 0, and is not disturbed by one that is taken
    /// back.
    #[cold]
    #[inline(never)]
    fn begin_later(&self) {
        loop {
            self.users.fetch_sub(1, Release);
            while self.users.load(Relaxed) & RECYCLING != 0 {
                wait();
            }
            if self.users.fetch_add(1, Acquire) & RECYCLING == 0 {
                return;
            }
        }
    }

    /// Gives slots back; says whether any is free now that was not.
    pub(in crate::paging) fn recycle(&self) -> bool {
        // A handler of this thread that needs a slot in the middle of it would wait for ever.
        let mask = sys::sigprocmask(libc::SIG_BLOCK, !0);
        let result = self.recycle_undisturbed();
        sys::sigprocmask(libc::SIG_SETMASK, mask);
        result
    }

    fn recycle_undisturbed(&self) -> bool {
        if self.users.fetch_or(RECYCLING, AcqRel) & RECYCLING != 0 {
            // Another thread is at it; what it finds is enough for both, or there is nothing.
            while self.users.load(Acquire) & RECYCLING != 0 {
                wait();
            }
            return true;
        }
        self.alone(|| self.give_back()).is_some_and(|given_back| given_back > 0)
    }

    /// Calls `f` when nobody uses slots any more, and then lets others go on; `None` where somebody does not end. The
    /// caller has set `RECYCLING`.
    fn alone<R>(&self, f: impl FnOnce() -> R) -> Option<R> {
        let mut patience = PATIENCE;
        while self.users.load(Acquire) != RECYCLING && patience > 0 {
            patience -= 1;
            wait();
        }
        let result = (patience > 0).then(f);
        self.users.fetch_and(!RECYCLING, Release);
        result
    }

    /// Calls `f` while nobody else walks or changes a page table; `None` where somebody does not end.
    pub(in crate::paging) fn exclusively<R>(&self, f: impl FnOnce() -> R) -> Option<R> {
        let mask = sys::sigprocmask(libc::SIG_BLOCK, !0);
        let mut patience = PATIENCE;
        while self.users.fetch_or(RECYCLING, AcqRel) & RECYCLING != 0 && patience > 0 {
            patience -= 1;
            wait();
        }
        let result = if patience > 0 { self.alone(f) } else { None };
        sys::sigprocmask(libc::SIG_SETMASK, mask);
        result
    }

    fn give_back(&self) -> usize {
        let mut victims = [Victim::default(); AT_ONCE];
        let count = self.find_victims(&mut victims);
        let victims = &victims[..count];
        for victim in victims {
            self.forget(victim);
        }
        let slots = Slots::of(victims);
        self.empty_entries(|slot| slots.has(slot));
        let mut given_back = 0;
        for victim in victims {
            // SAFETY: No page table leads there any more.
            match unsafe { sys::request(self.fd, DUNE_UNMAP_SLOT, victim.gib << 30) } {
                Ok(_) => given_back += 1,
                // It has a mapping again.
                Err(_) => self.remember(victim),
            }
        }
        given_back
    }

    fn find_victims(&self, victims: &mut [Victim; AT_ONCE]) -> usize {
        let mut count = 0;
        let mut ask = UnusedSlot {
            size: size_of::<UnusedSlot>() as u32,
            ..UnusedSlot::default()
        };
        while count < AT_ONCE {
            // SAFETY: The request takes a pointer to this structure.
            if unsafe { sys::request(self.fd, DUNE_UNUSED_SLOT, &raw mut ask as u64) }.is_err() {
                break;
            }
            let victim = Victim {
                slot: ask.gpa >> 30,
                gib: ask.hva >> 30,
            };
            // Not what somebody else asked the module for.
            let ours = u64::from(self.forward(victim.gib).load(Relaxed)) == victim.slot;
            if ours && victim.slot < Slots::MOST as u64 {
                victims[count] = victim;
                count += 1;
            }
        }
        count
    }

    fn forget(&self, victim: &Victim) {
        self.forward(victim.gib).store(0, Relaxed);
        if let Some(reverse) = self.reverse(victim.slot) {
            reverse.store(0, Relaxed);
        }
    }

    fn remember(&self, victim: &Victim) {
        if let Some(reverse) = self.reverse(victim.slot) {
            reverse.store(victim.gib as u32 + 1, Relaxed);
        }
        self.forward(victim.gib).store(victim.slot as u32, Relaxed);
    }

    /// In the child of a fork, where nobody else is: what others of the parent's threads were about is over.
    pub(super) fn forget_other_users(&self) {
        if self.users.swap(0, AcqRel) & RECYCLING != 0 {
            // Slots may be forgotten whose entries are still there.
            self.empty_entries(|slot| {
                slot != 0 && self.reverse(slot).is_some_and(|reverse| reverse.load(Relaxed) == 0)
            });
        }
    }

    /// Empties every entry of every table that refers to one of these slots.
    fn empty_entries(&self, is_wanted: impl Fn(u64) -> bool) {
        let end = self.next.load(Acquire).min(self.end());
        let mut at = self.start + layout::POOL as u64;
        while at < end {
            // SAFETY: Accessible memory of the pool: tables of entries, or free pages.
            let table = unsafe { &*(at as *const [AtomicU64; 512]) };
            for slot in table {
                let mut entry = slot.load(Relaxed);
                // Tables lie in the arena's slot, which has a mapping: what refers to another is a leaf of some level.
                if Entry(entry).refers() && is_wanted(Entry(entry).address() >> 30) {
                    // The CPU may set accessed and dirty bits in between.
                    while let Err(now) = slot.compare_exchange(entry, Entry::OPEN.0, AcqRel, Relaxed) {
                        entry = now;
                    }
                }
            }
            at += PAGE;
        }
    }
}

/// A set of slots, as quick to ask as an entry is to read.
struct Slots([u64; Self::MOST / 64]);

impl Slots {
    /// The module never has more.
    const MOST: usize = 1 << 14;

    fn of(victims: &[Victim]) -> Self {
        let mut slots = Self([0; Self::MOST / 64]);
        for victim in victims {
            slots.0[victim.slot as usize / 64] |= 1 << (victim.slot % 64);
        }
        slots
    }

    fn has(&self, slot: u64) -> bool {
        self.0
            .get(slot as usize / 64)
            .is_some_and(|word| word >> (slot % 64) & 1 != 0)
    }
}
