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
use core::sync::atomic::Ordering::SeqCst;
use kernel::prelude::*;

/// The state of one EPT's translations over all CPUs.
pub(crate) struct Translations {
    /// Starts at 1, so that a CPU that never flushed (0) does on its first entry: the root's page may have been another
    /// EPT's before.
    generation: AtomicU64,
    /// By CPU: the generation that its last INVEPT saw. Only that CPU writes it.
    flushed: ZeroedSlice<AtomicU64>,
    /// A bit per CPU that is in the guest.
    in_guest: ZeroedSlice<AtomicU64>,
}

impl Translations {
    /// ENOMEM.
    pub(crate) fn new() -> Result<Self> {
        let cpus = cpu::nr_cpu_ids();
        Ok(Self {
            generation: AtomicU64::new(1),
            flushed: ZeroedSlice::new(cpus)?,
            in_guest: ZeroedSlice::new(cpus.div_ceil(64))?,
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
        for (i, word) in self.in_guest.iter().enumerate() {
            let mut bits = word.load(SeqCst);
            while bits != 0 {
                let cpu = i * 64 + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                cpu::kick(cpu);
            }
        }
    }

    /// Publishes that this CPU is about to be in the guest; true: INVEPT first.
    pub(crate) fn enter(&self, irq: &IrqOff) -> bool {
        let cpu = irq.cpu();
        self.in_guest[cpu / 64].fetch_or(1 << (cpu % 64), SeqCst);
        let generation = self.generation.load(SeqCst);
        if self.flushed[cpu].load(Relaxed) == generation {
            return false;
        }
        self.flushed[cpu].store(generation, Relaxed);
        true
    }

    /// The flush that [`Translations::enter`] asked for failed: it is still to be done.
    pub(crate) fn forget(&self, irq: &IrqOff) {
        self.flushed[irq.cpu()].store(0, Relaxed);
    }

    /// This CPU is out of the guest.
    pub(crate) fn leave(&self, irq: &IrqOff) {
        let cpu = irq.cpu();
        self.in_guest[cpu / 64].fetch_and(!(1 << (cpu % 64)), SeqCst);
    }
}
