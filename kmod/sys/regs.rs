// SPDX-License-Identifier: GPL-2.0

//! State of the host's CPU that VMX switches or that must be put back (asm/processor.h, asm/desc.h, asm/msr.h).

use super::bindings;
use super::cpu::IrqOff;
use super::heavy::heavy_asm;
use crate::arch::msr;
use core::arch::asm;
use kernel::prelude::*;

/// Operand of SGDT, LGDT and SIDT.
#[repr(C, packed)]
#[derive(Clone, Copy, Default)]
pub(crate) struct TableRegister {
    pub(crate) limit: u16,
    pub(crate) base: u64,
}

pub(crate) fn sgdt() -> TableRegister {
    let mut t = TableRegister::default();
    // SAFETY: Stores 10 bytes.
    unsafe { asm!("sgdt [{}]", in(reg) &mut t, options(nostack, preserves_flags)) };
    t
}

pub(crate) fn sidt() -> TableRegister {
    let mut t = TableRegister::default();
    // SAFETY: Stores 10 bytes.
    unsafe { asm!("sidt [{}]", in(reg) &mut t, options(nostack, preserves_flags)) };
    t
}

/// Puts the GDT's limit back, which a VM exit sets to 0xffff.
///
/// # Safety
///
/// `t` must be what [`sgdt`] gave on this CPU.
pub(crate) unsafe fn lgdt(t: &TableRegister, _: &IrqOff) {
    // SAFETY: By the caller this is the table that Linux has there.
    unsafe { heavy_asm!(LOAD, "lgdt [{}]", in(reg) t, options(nostack, preserves_flags, readonly)) };
}

/// Selector of the LDT; 0: none.
pub(crate) fn sldt(_: &IrqOff) -> u16 {
    let selector: u32;
    // SAFETY: Reads a register.
    unsafe { asm!("sldt {:e}", out(reg) selector, options(nomem, nostack, preserves_flags)) };
    selector as u16
}

/// Puts the LDT back, which a VM exit makes null.
///
/// # Safety
///
/// `selector` must be what [`sldt`] gave on this CPU, and the GDT what it was then.
pub(crate) unsafe fn lldt(selector: u16, _: &IrqOff) {
    // SAFETY: By the caller the descriptor is there.
    unsafe { heavy_asm!(LOAD, "lldt {:x}", in(reg) selector, options(nostack, preserves_flags)) };
}

/// The selectors of DS, ES, FS and GS, ORed: 0 when the thread uses none, as 64-bit programs do.
#[inline]
pub(crate) fn data_selectors() -> u32 {
    let all: u32;
    // SAFETY: Reads segment registers.
    unsafe {
        asm!("mov {all:e}, ds", "mov {one:e}, es", "or {all:e}, {one:e}", "mov {one:e}, fs", "or {all:e}, {one:e}",
             "mov {one:e}, gs", "or {all:e}, {one:e}",
             all = out(reg) all, one = out(reg) _, options(nomem, nostack));
    }
    all
}

pub(crate) fn cr0() -> u64 {
    // SAFETY: Reads a register.
    unsafe { bindings::dune_read_cr0() as u64 }
}

/// CR3 as it is now; stays so while interrupts are off.
#[inline(always)]
pub(crate) fn cr3(_: &IrqOff) -> u64 {
    let value;
    // SAFETY: Reads a register.
    unsafe { asm!("mov {}, cr3", out(reg) value, options(nostack, preserves_flags)) };
    value
}

/// The TSC, as user space reads it too.
pub(crate) fn ticks() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: Reads a counter.
    unsafe { asm!("rdtsc", out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags)) };
    u64::from(high) << 32 | u64::from(low)
}

#[inline(always)]
pub(crate) fn cr4() -> u64 {
    let value;
    // SAFETY: Reads a register.
    unsafe { asm!("mov {}, cr4", out(reg) value, options(nostack, preserves_flags)) };
    value
}

/// Sets CR4.VMXE, and Linux' shadow of it, on this CPU.
pub(crate) fn set_cr4_vmxe() {
    // SAFETY: The bit has no effect by itself.
    unsafe { bindings::dune_cr4_set_vmxe() };
}

/// Clears CR4.VMXE. VMX must be off.
pub(crate) fn clear_cr4_vmxe() {
    // SAFETY: As above.
    unsafe { bindings::dune_cr4_clear_vmxe() };
}

/// FS base of the current thread's user mode, where Linux uses FSGSBASE: in the register.
///
/// # Safety
///
/// Linux must (`cpu::has_fsgsbase`).
#[inline(always)]
pub(crate) unsafe fn live_fs_base() -> u64 {
    let value;
    // SAFETY: By the caller the CPU has the instruction, and CR4 allows it.
    unsafe { asm!("rdfsbase {}", out(reg) value, options(nostack, preserves_flags)) };
    value
}

/// The same where Linux does not: only system calls change it, which note it.
pub(crate) fn noted_fs_base() -> u64 {
    // SAFETY: Reads the current task.
    unsafe { bindings::dune_fs_base() as u64 }
}

/// This CPU's GS base in the kernel.
pub(crate) fn percpu_base(_: &IrqOff) -> u64 {
    // SAFETY: Reads an MSR that every 64-bit CPU has.
    unsafe { bindings::dune_percpu_base() as u64 }
}

/// This CPU's TSS.
pub(crate) fn tss_base(_: &IrqOff) -> u64 {
    // SAFETY: Address arithmetic.
    unsafe { bindings::dune_tss_base() as u64 }
}

/// A VM exit left TR's limit at 0x67, and DR7 clear: has Linux put the first back where a thread uses port I/O, and puts
/// back the second where breakpoints are in use.
#[inline(always)]
pub(crate) fn restore_tss_limit_and_dr7(_: &IrqOff) {
    // SAFETY: Interrupts are off. What Linux has in DR7 is in `cpu_dr7`.
    unsafe { bindings::dune_after_exit() };
}

/// Reads IA32_DEBUGCTL.
///
/// # Safety
///
/// The CPU must have it.
pub(crate) unsafe fn debugctl(_: &IrqOff) -> u64 {
    // SAFETY: By the caller the MSR is there.
    unsafe { read_present_msr(msr::IA32_DEBUGCTL) }
}

/// Reads an MSR.
///
/// # Safety
///
/// The CPU must have it.
unsafe fn read_present_msr(number: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: By the caller the MSR is there.
    unsafe {
        heavy_asm!(RDMSR, "rdmsr", in("ecx") number, out("eax") low, out("edx") high,
             options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Puts IA32_DEBUGCTL back, which a VM exit clears.
///
/// # Safety
///
/// `v` must be what [`debugctl`] gave in the same window.
pub(crate) unsafe fn restore_debugctl(v: u64, _: &IrqOff) {
    // SAFETY: By the caller it was the host's.
    unsafe { write_msr(msr::IA32_DEBUGCTL, v) };
}

/// Reads IA32_PEBS_ENABLE.
///
/// # Safety
///
/// The CPU must have it.
pub(crate) unsafe fn pebs_enable(_: &IrqOff) -> u64 {
    // SAFETY: By the caller the MSR is there.
    unsafe { read_present_msr(msr::IA32_PEBS_ENABLE) }
}

/// Switches PEBS off (0) or back to what [`pebs_enable`] gave in the same window.
///
/// # Safety
///
/// `v` must be one of these, and the latter the last before interrupts come on.
pub(crate) unsafe fn set_pebs_enable(v: u64, _: &IrqOff) {
    // SAFETY: By the caller.
    unsafe { write_msr(msr::IA32_PEBS_ENABLE, v) };
}

/// Whether the CPU has PEBS.
pub(crate) fn has_pebs() -> bool {
    // SAFETY: Reads a constant of the boot.
    unsafe { bindings::dune_cpu_has_pebs() }
}

/// Reads an MSR that may not exist. EIO.
pub(crate) fn read_msr(msr: u32) -> Result<u64> {
    let mut v = 0;
    // SAFETY: Faults are caught.
    kernel::error::to_result(unsafe { bindings::dune_rdmsr_safe(msr, &mut v) })?;
    Ok(v)
}

/// Writes an MSR.
///
/// # Safety
///
/// The CPU must have it and take `v`, which may not stay in force for the host unless it was the host's.
unsafe fn write_msr(number: u32, v: u64) {
    // SAFETY: By the caller.
    unsafe {
        heavy_asm!(WRMSR, "wrmsr", in("ecx") number, in("eax") v as u32, in("edx") (v >> 32) as u32, options(nostack, preserves_flags));
    }
}

/// Writes IA32_LSTAR.
///
/// # Safety
///
/// `v` must be canonical, and Linux' value must be back before interrupts come on.
pub(crate) unsafe fn write_lstar(v: u64, _: &IrqOff) {
    // SAFETY: By the caller.
    unsafe { write_msr(msr::IA32_LSTAR, v) };
}

/// The GS base of user mode while the kernel runs.
pub(crate) fn kernel_gs_base(_: &IrqOff) -> u64 {
    read_msr(msr::IA32_KERNEL_GS_BASE).unwrap_or(0)
}

/// Puts back what [`kernel_gs_base`] gave.
///
/// # Safety
///
/// `v` must come from there, in the same window.
pub(crate) unsafe fn restore_kernel_gs_base(v: u64, _: &IrqOff) {
    // SAFETY: By the caller it was the host's.
    unsafe { write_msr(msr::IA32_KERNEL_GS_BASE, v) };
}

/// XCR0; 0 without XSAVE.
pub(crate) fn xcr0() -> u64 {
    // SAFETY: Checks for the instruction first.
    unsafe { bindings::dune_xcr0() }
}

/// CPUID of this CPU: EAX, EBX, ECX, EDX.
#[inline(always)]
pub(crate) fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let (a, b, c, d): (u32, u64, u32, u32);
    // SAFETY: Reads constants of the CPU; RBX, which the compiler keeps for itself, is saved.
    unsafe {
        asm!("mov {b}, rbx", "cpuid", "xchg {b}, rbx", b = out(reg) b,
             inout("eax") leaf => a, inout("ecx") subleaf => c, out("edx") d, options(nomem, nostack, preserves_flags));
    }
    [a, b as u32, c, d]
}

/// Whether the CPU has what it has when this thread is in user mode.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum UserState {
    Loaded,
    /// But for the extended state, which is in memory.
    ExtendedInMemory,
    /// Only the way through user mode can.
    Elsewhere,
}

/// Has in the CPU what it has when this thread is in user mode: the thread's FPU state, and Linux' own LSTAR, STAR, FMASK
/// and TSC_AUX, as far as that can be done here.
///
/// A thread of KVM that is preempted leaves its guest's values in these MSRs. They stay until some thread goes to user mode,
/// and the thread that runs now has the flag that says so.
pub(crate) fn load_user_state(_: &IrqOff) -> UserState {
    // SAFETY: Interrupts are off, and the caller is in an ioctl of the current thread.
    match unsafe { bindings::dune_user_state_load() } {
        bindings::DUNE_USER_STATE_LOADED => UserState::Loaded,
        bindings::DUNE_USER_STATE_IN_MEMORY => UserState::ExtendedInMemory,
        _ if cfg!(dune_mutate_user_return) => UserState::Loaded,
        _ => UserState::Elsewhere,
    }
}

/// PKRU: which protection keys refuse the current thread what. 0, nothing, where Linux uses no keys.
pub(crate) fn pkru() -> u32 {
    // SAFETY: Reads a register of the thread's.
    unsafe { bindings::dune_pkru() }
}

/// Sets [`pkru`], where Linux uses keys.
pub(crate) fn write_pkru(pkru: u32) {
    // SAFETY: A register that user mode may set as it likes; whoever accesses its memory minds faults.
    unsafe { bindings::dune_pkru_write(pkru) };
}

/// While it lives the CPU has the current thread's extended state, which Linux goes on to have in memory.
pub(crate) struct FpuLoan {
    /// `None`: nothing is lent. Else what IA32_XFD was.
    xfd: Option<u64>,
}

impl FpuLoan {
    /// Whether there is such a thing with this kernel: where not, it costs nothing.
    const EXISTS: bool = bindings::DUNE_FPU_IS_LENT != 0;

    #[inline(always)]
    pub(crate) fn none() -> Self {
        Self { xfd: None }
    }

    /// Of a thread that is at [`UserState::ExtendedInMemory`]. To be dropped before interrupts come on.
    #[cold]
    pub(crate) fn new(_: &IrqOff) -> Self {
        Self {
            // SAFETY: Interrupts are off; undone in `drop`.
            xfd: Self::EXISTS.then(|| unsafe { bindings::dune_fpu_lend() }),
        }
    }
}

impl Drop for FpuLoan {
    #[inline(always)]
    fn drop(&mut self) {
        if let (true, Some(xfd)) = (Self::EXISTS, self.xfd) {
            // SAFETY: Undoes `new`; interrupts are still off.
            unsafe { bindings::dune_fpu_give_back(xfd) };
        }
    }
}

/// An MSR with which Linux' SYSCALL or RDTSCP works, as Linux has it. EAGAIN while a KVM guest's may be in the CPU, which a way
/// through user mode changes. EIO where the CPU has no such MSR.
pub(crate) fn linux_msr(number: u32) -> Result<u64> {
    let _irq = IrqOff::new();
    // SAFETY: Reads flags of the current thread.
    if unsafe { bindings::dune_user_return_pending() } {
        return Err(EAGAIN);
    }
    read_msr(number)
}
