// SPDX-License-Identifier: GPL-2.0

//! Who may still use old translations: generations of the TLB, and which CPUs are in the guest.
//!
//! A zap raises the generation and interrupts every CPU that is in the guest; a CPU that enters publishes that it is in
//! the guest and then compares the generation with the one it flushed last. Both sides write first and read after, so
//! either the zap sees the CPU or the CPU sees the zap.

use crate::sys::cpu;
use crate::sys::cpu::IrqOff;
use crate::sys::mem::ZeroedSlice;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;
use core::sync::atomic::Ordering::Release;
use core::sync::atomic::Ordering::SeqCst;
use kernel::prelude::*;

/// The state of one EPT's translations over all CPUs.
pub(crate) struct Translations {
    /// Starts at 1, so that a CPU that never flushed (0) does on its first entry: the root's page may have been another
    /// EPT's before.
    generation: AtomicU64,
    /// By CPU: twice the generation that its last INVEPT saw, and [`IN_GUEST`]. Only that CPU writes it.
    cpus: ZeroedSlice<AtomicU64>,
}

/// The CPU is in the guest, or about to be.
const IN_GUEST: u64 = 1;

impl Translations {
    /// ENOMEM.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            generation: AtomicU64::new(1),
            cpus: ZeroedSlice::new(cpu::nr_cpu_ids())?,
        })
    }

    /// How often every CPU was made to flush.
    pub(crate) fn flushes(&self) -> u64 {
        self.generation.load(Relaxed) - 1
    }

    /// Makes every CPU flush before it uses a translation of this EPT again; returns when none is in the guest with an
    /// old one. With interrupts on.
    pub(crate) fn invalidate(&self) {
        if cfg!(dune_mutate_invept) {
            return;
        }
        self.generation.fetch_add(1, SeqCst);
        for (cpu, state) in self.cpus.iter().enumerate() {
            if state.load(SeqCst) & IN_GUEST != 0 {
                cpu::kick(cpu);
            }
        }
    }

    /// Publishes that this CPU is about to be in the guest; true: INVEPT first.
    #[inline(always)]
    pub(crate) fn enter(&self, irq: &IrqOff) -> bool {
        let state = &self.cpus[irq.cpu()];
        let flushed = state.load(Relaxed);
        state.swap(flushed | IN_GUEST, SeqCst);
        let generation = self.generation.load(SeqCst).wrapping_mul(2);
        if flushed == generation {
            return false;
        }
        state.store(generation | IN_GUEST, Relaxed);
        true
    }

    /// The flush that [`Translations::enter`] asked for failed: it is still to be done. This CPU is not in the guest.
    pub(crate) fn forget(&self, irq: &IrqOff) {
        self.cpus[irq.cpu()].store(0, Release);
    }

    /// This CPU is out of the guest.
    #[inline(always)]
    pub(crate) fn leave(&self, irq: &IrqOff) {
        let state = &self.cpus[irq.cpu()];
        state.store(state.load(Relaxed) & !IN_GUEST, Release);
    }
}
