// SPDX-License-Identifier: MIT OR Apache-2.0

//! Who may still use an old translation of a page table: the part of the protocol that is about memory order.
//!
//! docs/architecture.md, "Life of a change of a page table", has the whole. In short: a table has a *generation*, a thread
//! says which table it has or goes to, and for each table which generation its TLB is not older than.
//!
//! - Who changed a table raises the generation and then looks who has the table. Those are interrupted, and flush.
//! - A thread that goes to a table first says so and then looks at the generation. If it flushed for that one it keeps
//!   what the TLB has.
//!
//! Both write first, then read, with a full fence in between: one of them sees the other.
//!
//! This file is compiled twice: here, and with loom's atomics in `tests/shootdown_model.rs`.

use super::sync::fence;
use super::sync::AtomicU32;
use super::sync::AtomicU64;
use super::sync::Ordering::AcqRel;
use super::sync::Ordering::Acquire;
use super::sync::Ordering::Relaxed;
use super::sync::Ordering::Release;
use super::sync::Ordering::SeqCst;

/// Which table a thread has.
///
/// Written by that thread only, but also by its trap handlers, in the middle of each other.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Here {
    /// Number + 1 of the table that CR3 holds, 0 if none; the upper half counts the changes.
    here: AtomicU64,
    /// Number + 1 of the table that it goes to.
    going: AtomicU32,
}

const fn name(number: u16) -> u32 {
    number as u32 + 1
}

impl Here {
    /// A thread that has `number` from the start, with an empty TLB; `None`: no table.
    pub fn new(number: Option<u16>) -> Self {
        let name = number.map_or(0, name);
        Self {
            here: AtomicU64::new(name.into()),
            going: AtomicU32::new(name),
        }
    }

    /// The table that CR3 holds.
    pub fn number(&self) -> Option<u16> {
        (self.here.load(Relaxed) as u32)
            .checked_sub(1)
            .map(|number| number as u16)
    }

    /// The thread is gone, or will run no guest code any more; returns what it had.
    pub fn leave(&self) -> Option<u16> {
        self.going.store(0, Relaxed);
        (self.here.swap(0, AcqRel) as u32)
            .checked_sub(1)
            .map(|number| number as u16)
    }

    /// Whether the thread may use translations of `number`; to be asked after [`raise`].
    pub fn may_use(&self, number: u16) -> bool {
        // In this order: see `switch`.
        self.going.load(Acquire) == name(number) || self.here.load(Acquire) as u32 == name(number)
    }

    /// Makes the calling thread, whose this is, use `number`. `load` writes CR3; it keeps the table's translations in the
    /// TLB if its argument is true. `seen` is the generation that the thread flushed the table for.
    ///
    /// Returns the table before.
    #[inline(always)]
    pub fn switch(
        &self,
        number: u16,
        generation: &AtomicU64,
        seen: &AtomicU64,
        mut load: impl FnMut(bool),
    ) -> Option<u16> {
        loop {
            let before = self.here.load(Relaxed);
            // Release: who sees this also sees the `here` before it. Else a thread that came and goes again could be
            // missed: `here` read before it came, `going` after it has set out.
            self.going.store(name(number), Release);
            fence(SeqCst);
            // Acquire: with this generation come the entries that it is about.
            let current = generation.load(Acquire);
            load(seen.load(Relaxed) == current);
            seen.store(current, Relaxed);
            let after = (before >> 32).wrapping_add(1) << 32 | u64::from(name(number));
            // A handler that went to another table in between is undone.
            if self.here.compare_exchange(before, after, AcqRel, Relaxed).is_ok() {
                return (before as u32).checked_sub(1).map(|number| number as u16);
            }
        }
    }
}

/// What a thread saw of a table of which it knows nothing: no generation, so that it flushes.
pub(crate) const NEVER: u64 = u64::MAX;

/// Says that a table was changed. Whoever has it afterwards ([`Here::may_use`]) is to be interrupted.
///
/// Returns the new generation.
pub(crate) fn raise(generation: &AtomicU64) -> u64 {
    let raised = generation.fetch_add(1, AcqRel) + 1;
    fence(SeqCst);
    raised
}
