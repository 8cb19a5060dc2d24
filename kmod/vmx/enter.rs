// SPDX-License-Identifier: GPL-2.0

//! One VM entry and its exit: the caller of vmenter.S.

use super::vmcs::Entry;
use crate::abi;
use crate::sys::bindings;
use crate::sys::cpu;
use crate::sys::cpu::IrqOff;
use crate::sys::thread;
use core::mem::offset_of;
use core::sync::atomic::Ordering::Relaxed;

// vmenter.h says the same as abi.rs.
const _: () = {
    use abi::Gprs;
    use abi::RunPage;
    let gprs = offset_of!(RunPage, gprs);
    assert!(bindings::DUNE_RUN_RAX as usize == gprs + offset_of!(Gprs, rax));
    assert!(bindings::DUNE_RUN_RCX as usize == gprs + offset_of!(Gprs, rcx));
    assert!(bindings::DUNE_RUN_RDX as usize == gprs + offset_of!(Gprs, rdx));
    assert!(bindings::DUNE_RUN_RBX as usize == gprs + offset_of!(Gprs, rbx));
    assert!(bindings::DUNE_RUN_RBP as usize == gprs + offset_of!(Gprs, rbp));
    assert!(bindings::DUNE_RUN_RSI as usize == gprs + offset_of!(Gprs, rsi));
    assert!(bindings::DUNE_RUN_RDI as usize == gprs + offset_of!(Gprs, rdi));
    assert!(bindings::DUNE_RUN_R8 as usize == gprs + offset_of!(Gprs, r8));
    assert!(bindings::DUNE_RUN_R9 as usize == gprs + offset_of!(Gprs, r9));
    assert!(bindings::DUNE_RUN_R10 as usize == gprs + offset_of!(Gprs, r10));
    assert!(bindings::DUNE_RUN_R11 as usize == gprs + offset_of!(Gprs, r11));
    assert!(bindings::DUNE_RUN_R12 as usize == gprs + offset_of!(Gprs, r12));
    assert!(bindings::DUNE_RUN_R13 as usize == gprs + offset_of!(Gprs, r13));
    assert!(bindings::DUNE_RUN_R14 as usize == gprs + offset_of!(Gprs, r14));
    assert!(bindings::DUNE_RUN_R15 as usize == gprs + offset_of!(Gprs, r15));
    assert!(bindings::DUNE_RUN_CR2 as usize == offset_of!(RunPage, cr2));
    assert!(bindings::DUNE_ENTRY_HOST_RSP as usize == offset_of!(Entry, host_rsp));
    assert!(bindings::DUNE_ENTRY_LAUNCHED as usize == offset_of!(Entry, launched));
    assert!(core::mem::size_of::<bindings::dune_entry>() == core::mem::size_of::<Entry>());
    assert!(bindings::DUNE_VMCS_HOST_RSP == crate::arch::vmcs_field::host::RSP.encoding());
};

/// How an entry ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entered {
    /// With an exit reason in the VMCS; it may be that of a failed entry.
    Exit,
    /// VMfailValid: `exit_info::INSTRUCTION_ERROR` says why.
    FailValid,
    /// VMfailInvalid, or the instruction faulted: no VMCS is current, or VMX is off.
    NoVmx,
}

/// Where a VM exit goes.
pub(crate) fn exit_rip() -> u64 {
    (&raw const bindings::dune_vmexit) as u64
}

/// Enters the guest with the registers of `run`, and stores them there on its exit.
///
/// `host_ran`: other code of the host ran since the last entry than that which settles simple exits. Where a guest could
/// read the L1 data cache, it is emptied then, and this cleared.
///
/// # Safety
///
/// A VMCS made by `setup` with `entry`'s values must be current, its host state up to date, the thread's FPU state loaded.
/// `run` must point to a run page. The caller runs what has to follow an exit before interrupts come on.
#[inline]
pub(crate) unsafe fn enter(run: *mut abi::RunPage, entry: &Entry, host_ran: &mut bool, _: &IrqOff) -> Entered {
    let entry_ptr: *mut bindings::dune_entry = (&raw const *entry).cast_mut().cast();
    let result = if entry.noted.load(Relaxed) == thread::tick() && !cpu::flushes_l1d() {
        // SAFETY: By the caller.
        unsafe { bindings::dune_guest_enter(run.cast(), entry_ptr) }
    } else {
        let host_ran = core::mem::take(host_ran);
        // SAFETY: By the caller.
        unsafe { bindings::dune_guest_enter_slowly(run.cast(), entry_ptr, host_ran) }
    };
    match result as u32 {
        bindings::DUNE_ENTER_EXIT => Entered::Exit,
        bindings::DUNE_ENTER_FAIL_VALID => Entered::FailValid,
        _ => Entered::NoVmx,
    }
}

/// Runs the host's NMI handler for an NMI that ended the guest.
pub(crate) fn handle_nmi(_: &IrqOff) {
    // SAFETY: Called right after the exit with interrupts off; the IDT entry is the host's.
    unsafe { bindings::dune_nmi() };
}

/// Gives a machine check that ended the guest to Linux.
pub(crate) fn handle_machine_check(_: &IrqOff) {
    // SAFETY: Called right after the exit with interrupts off.
    unsafe { bindings::dune_machine_check() };
}
