// SPDX-License-Identifier: GPL-2.0

//! CPUs, preemption and interrupts (linux/smp.h, linux/preempt.h, linux/irqflags.h).

use super::bindings;
use core::borrow::Borrow;
use core::ffi::c_void;
use core::marker::PhantomData;
use core::mem::ManuallyDrop;

/// Token: preemption is off while it lives, so the thread stays on [`PreemptGuard::cpu`].
pub(crate) struct PreemptGuard {
    // Not Send: belongs to the thread that made it.
    _not_send: PhantomData<*mut ()>,
}

impl PreemptGuard {
    pub(crate) fn new() -> Self {
        // SAFETY: May be called from any context; undone in `drop`.
        unsafe { bindings::dune_preempt_disable() };
        Self { _not_send: PhantomData }
    }

    /// The CPU this thread is on and stays on.
    pub(crate) fn cpu(&self) -> usize {
        cpu_hint()
    }
}

impl Drop for PreemptGuard {
    fn drop(&mut self) {
        // SAFETY: Undoes the call in `new`.
        unsafe { bindings::dune_preempt_enable() };
    }
}

/// Token: interrupts are off on this CPU while it lives.
///
/// Made only where they were on before, so dropping it turns them on.
pub(crate) struct IrqOff {
    here: bindings::dune_here,
    _not_send: PhantomData<*mut ()>,
}

impl IrqOff {
    /// Turns interrupts off. To be called with interrupts on.
    pub(crate) fn new() -> Self {
        // SAFETY: Undone in `drop`.
        let here = unsafe { bindings::dune_irq_disable() };
        Self {
            here,
            _not_send: PhantomData,
        }
    }

    /// The CPU this thread is on and stays on.
    #[inline]
    pub(crate) fn cpu(&self) -> usize {
        self.here.cpu as usize
    }

    /// Changes, on one CPU, whenever an interrupt or NMI came in which Linux may have programmed the PMU. As of when
    /// interrupts were turned off; below 2^32.
    #[inline]
    pub(crate) fn interrupts(&self) -> u64 {
        self.here.interrupts as u64
    }

    /// Whether the kernel counts them: otherwise [`Self::interrupts`] is another number each time.
    pub(crate) const COUNTS_INTERRUPTS: bool = bindings::DUNE_INTERRUPTS_ARE_COUNTED != 0;

    /// The same as [`Self::interrupts`], or 0 always where the kernel counts none.
    pub(crate) fn counted_interrupts(&self) -> u64 {
        if Self::COUNTS_INTERRUPTS {
            self.interrupts()
        } else {
            0
        }
    }

    /// Turns interrupts on behind an exit that was no interrupt's: after `regs::restore_tss_limit_and_dr7` and
    /// `thread::guest_timing_exit`, which are in it.
    #[inline]
    pub(crate) fn end_window(self) {
        core::mem::forget(self);
        // SAFETY: `new` was called with interrupts on; the rest as there.
        unsafe { bindings::dune_window_end() };
    }
}

impl Drop for IrqOff {
    fn drop(&mut self) {
        // SAFETY: `new` was called with interrupts on.
        unsafe { bindings::dune_irq_enable() };
    }
}

/// Interrupts that are off on this CPU, and are not turned on when this is dropped.
pub(crate) struct IrqLeftOff(ManuallyDrop<IrqOff>);

impl IrqLeftOff {
    /// # Safety
    ///
    /// Interrupts must be off, and stay so while it lives; `here` is of this CPU.
    pub(super) unsafe fn new(here: bindings::dune_here) -> Self {
        Self(ManuallyDrop::new(IrqOff {
            here,
            _not_send: PhantomData,
        }))
    }

    /// As [`IrqOff::end_window`], but that interrupts stay off.
    #[inline]
    pub(crate) fn end_window(self) {
        // SAFETY: Interrupts are off.
        unsafe { bindings::dune_window_end_off() };
    }
}

impl Borrow<IrqOff> for IrqLeftOff {
    #[inline(always)]
    fn borrow(&self) -> &IrqOff {
        &self.0
    }
}

/// The CPU this thread is on, which may change at any time unless a guard is held.
pub(crate) fn cpu_hint() -> usize {
    // SAFETY: Reads a per-CPU variable.
    unsafe { bindings::dune_cpu() as usize }
}

/// One more than the highest CPU number that can ever come up.
pub(crate) fn nr_cpu_ids() -> usize {
    // SAFETY: Reads a constant of the boot.
    unsafe { bindings::dune_nr_cpu_ids() as usize }
}

/// Calls `f(arg)` in an interrupt on `cpu` and waits until it has returned; does nothing if `cpu` is offline.
///
/// # Safety
///
/// `f(arg)` must be sound to call there, with interrupts off. The caller must have interrupts on.
pub(crate) unsafe fn call_on(cpu: usize, f: unsafe extern "C" fn(*mut c_void), arg: *mut c_void) {
    // SAFETY: By the caller.
    unsafe { bindings::dune_call_on(cpu as u32, Some(f), arg) };
}

/// For interrupts that are all that is wanted.
unsafe extern "C" fn nothing(_: *mut c_void) {}

/// Does nothing, on another CPU: the interrupt itself is what makes a guest exit.
pub(crate) fn kick(cpu: usize) {
    // SAFETY: `nothing` is sound anywhere.
    unsafe { call_on(cpu, nothing, core::ptr::null_mut()) };
}

/// Has an interrupt come to this CPU as soon as they are on.
pub(crate) fn interrupt_soon(_: &IrqOff) {
    // SAFETY: Queues a work that does nothing.
    unsafe { bindings::dune_interrupt_soon() };
}

/// When this returns each CPU has had interrupts on since it was called. With interrupts on.
pub(crate) fn wait_for_interrupts() {
    // SAFETY: `nothing` is sound anywhere.
    unsafe { bindings::dune_on_each_cpu(Some(nothing)) };
}

/// Whether executable huge EPT leaves can make this CPU raise a machine check (iTLB multihit).
pub(crate) fn has_itlb_multihit() -> bool {
    // SAFETY: Reads a constant of the boot.
    unsafe { bindings::dune_cpu_has_itlb_multihit() }
}

/// Whether the CPU can have features whose state it lacks (IA32_XFD), and says so by #NM.
pub(crate) fn has_xfd() -> bool {
    // SAFETY: Reads a constant of the boot.
    unsafe { bindings::dune_cpu_has_xfd() }
}

/// Forgets why an extended feature raised #NM in a guest, or Linux would take it for the reason of its next #NM.
pub(crate) fn clear_xfd_error(_: &IrqOff) {
    // SAFETY: Writes an MSR that Linux has 0 there outside its #NM handler.
    unsafe { bindings::dune_xfd_err_clear() };
}

/// Keeps what one guest trained of the branch predictors from the next, where the kernel does so for virtual machines.
pub(crate) fn branch_prediction_barrier(_: &IrqOff) {
    // SAFETY: Drops predictions, no more.
    unsafe { bindings::dune_ibpb() };
}

/// Whether entries may empty the L1 data cache.
#[inline(always)]
pub(crate) fn flushes_l1d() -> bool {
    // SAFETY: Set while no guest runs.
    unsafe { bindings::dune_l1d_flushes }
}

/// Has entries empty the L1 data cache, where guests could read it (L1TF).
pub(crate) struct L1tf(());

impl L1tf {
    /// EPERM where that is not enough: a sibling thread could read it while the guest runs; ENOMEM.
    pub(crate) fn start() -> kernel::error::Result<Self> {
        // SAFETY: May sleep; undone in `drop`.
        kernel::error::to_result(unsafe { bindings::dune_l1tf_start() })?;
        Ok(Self(()))
    }

    pub(crate) fn flushes(&self) -> bool {
        flushes_l1d()
    }
}

impl Drop for L1tf {
    fn drop(&mut self) {
        // SAFETY: No guest runs any more.
        unsafe { bindings::dune_l1tf_stop() };
    }
}

/// `index` where it is below `len`, else 0, also where the CPU speculates past a comparison of the two.
#[inline]
pub(crate) fn index_nospec(index: usize, len: usize) -> usize {
    let mut mask = index;
    // SAFETY: Arithmetic: CMP borrows where index < len, SBB makes all ones of it.
    unsafe {
        core::arch::asm!(
            "cmp {mask}, {len}",
            "sbb {mask}, {mask}",
            mask = inout(reg) mask,
            len = in(reg) len,
            options(pure, nomem, nostack),
        );
    }
    index & mask
}

/// Whether the host takes its events through FRED.
pub(crate) fn has_fred() -> bool {
    // SAFETY: Reads a constant of the boot.
    unsafe { bindings::dune_cpu_has_fred() }
}

/// Whether Linux lets user mode set its segment bases itself, and so reads them from the CPU at a context switch.
pub(crate) fn has_fsgsbase() -> bool {
    // SAFETY: Reads a constant of the boot.
    unsafe { bindings::dune_cpu_has_fsgsbase() }
}

/// Whether the CPU and Linux have ENQCMD.
pub(crate) fn has_enqcmd() -> bool {
    // SAFETY: Reads a constant of the boot.
    unsafe { bindings::dune_cpu_has_enqcmd() }
}
