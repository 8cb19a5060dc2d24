// SPDX-License-Identifier: GPL-2.0

//! Host state in the VMCS, and what a VM exit leaves wrong (SDM, "Loading Host State").
//!
//! CR3, CR4 and the FS base are compared on every entry with interrupts off (a context switch may change any of them);
//! what belongs to a CPU is written when the vCPU comes to another one.
//!
//! IA32_DEBUGCTL and IA32_PEBS_ENABLE are perf's and ptrace's. While either is not 0 both are read on every entry; else only
//! where they may have changed: when the thread was switched out, when an interrupt of the kinds in which perf programs the
//! PMU came to this CPU, or after a system call by which a thread programs it itself ([`HostState::forget_pmu`]). What is
//! missed otherwise (a write through /dev/cpu/N/msr by the thread itself) is 0 again after the next exit, as a VM exit makes
//! it; nothing is ever written back that was not read right before the entry.

use super::vmcs::CurrentVmcs;
use crate::arch::msr;
use crate::arch::vmcs_field::host;
use crate::sys::cpu;
use crate::sys::cpu::IrqOff;
use crate::sys::regs;
use crate::sys::regs::TableRegister;
use crate::sys::thread::Task;

/// Linux' selectors (asm/segment.h).
const KERNEL_CS: u64 = 0x10;
const KERNEL_DS: u64 = 0x18;
const TSS: u64 = 0x40;

/// What the host-state area of one VMCS holds, to spare VMWRITEs.
pub(crate) struct HostState {
    cr3: u64,
    cr4: u64,
    fs_base: u64,
    gdt: TableRegister,
    /// Without FSGSBASE Linux does not look at what user mode's GS base is in the CPU: it must stay what Linux wrote,
    /// although a guest's SWAPGS changes it.
    keeps_gs_base: bool,
    has_fsgsbase: bool,
    kernel_gs_base: u64,
    /// What a VM exit clears, as it was before the entry: the LDT's selector, and IA32_DEBUGCTL (LBR, BTS, single-stepping
    /// of branches), which perf and ptrace change at any time.
    ldt: u16,
    debugctl: u64,
    has_debugctl: bool,
    /// PEBS writes its records through linear addresses, which in a guest are the guest's: off there.
    pebs: u64,
    has_pebs: bool,
    /// When these two were read: [`Task::switches`] and [`IrqOff::interrupts`], which is never all ones.
    pmu_read_at: (u64, u64),
    /// More is to be put back after an exit than the GDT's limit.
    is_unusual: bool,
}

impl HostState {
    pub(crate) fn new() -> Self {
        // Values that no CPU has: the first comparison writes.
        Self {
            cr3: !0,
            cr4: !0,
            fs_base: !0,
            gdt: TableRegister { limit: 0, base: 0 },
            keeps_gs_base: !cpu::has_fsgsbase() && !cfg!(dune_mutate_swapgs),
            has_fsgsbase: cpu::has_fsgsbase(),
            kernel_gs_base: 0,
            ldt: 0,
            debugctl: 0,
            pebs: 0,
            has_pebs: regs::has_pebs(),
            has_debugctl: regs::read_msr(msr::IA32_DEBUGCTL).is_ok(),
            pmu_read_at: (0, !0),
            is_unusual: false,
        }
    }

    /// Whether nothing was written for this CPU yet.
    pub(crate) fn is_new(&self) -> bool {
        self.gdt.base == 0
    }

    /// Writes what never changes. `exit_rip`: where a VM exit goes.
    pub(crate) fn write_constant(vmcs: &mut CurrentVmcs<'_>, exit_rip: u64) {
        vmcs.write(host::CR0, regs::cr0());
        vmcs.write(host::CS_SELECTOR, KERNEL_CS);
        vmcs.write(host::SS_SELECTOR, KERNEL_DS);
        vmcs.write(host::DS_SELECTOR, 0);
        vmcs.write(host::ES_SELECTOR, 0);
        vmcs.write(host::FS_SELECTOR, 0);
        vmcs.write(host::GS_SELECTOR, 0);
        vmcs.write(host::TR_SELECTOR, TSS);
        vmcs.write(host::IDTR_BASE, regs::sidt().base);
        vmcs.write(host::RIP, exit_rip);
        // Present on every 64-bit CPU.
        vmcs.write(host::EFER, regs::read_msr(msr::IA32_EFER).unwrap_or(0));
        vmcs.write(host::SYSENTER_CS, regs::read_msr(msr::IA32_SYSENTER_CS).unwrap_or(0));
        vmcs.write(host::SYSENTER_EIP, regs::read_msr(msr::IA32_SYSENTER_EIP).unwrap_or(0));
    }

    /// Brings the area up to date for an entry on this CPU.
    #[inline(always)]
    pub(crate) fn refresh(&mut self, vmcs: &mut CurrentVmcs<'_>, moved: bool, thread: &Task, irq: &IrqOff) {
        if moved {
            self.gdt = regs::sgdt();
            vmcs.write(host::GDTR_BASE, self.gdt.base);
            vmcs.write(host::TR_BASE, regs::tss_base(irq));
            vmcs.write(host::GS_BASE, regs::percpu_base(irq));
            vmcs.write(host::SYSENTER_ESP, regs::read_msr(msr::IA32_SYSENTER_ESP).unwrap_or(0));
        }
        let (switches, interrupts) = (thread.switches(), irq.interrupts());
        let ldt = regs::sldt(irq);
        if (switches ^ self.pmu_read_at.0) | (interrupts ^ self.pmu_read_at.1) | u64::from(ldt) != 0 || self.is_unusual
        {
            self.pmu_read_at = (switches, interrupts);
            self.read_unusual(ldt, irq);
        }
        let cr3 = regs::cr3(irq);
        if cr3 != self.cr3 {
            self.cr3 = cr3;
            vmcs.write(host::CR3, cr3);
        }
        let cr4 = regs::cr4();
        if cr4 != self.cr4 {
            self.cr4 = cr4;
            vmcs.write(host::CR4, cr4);
        }
        let fs_base = if self.has_fsgsbase {
            // SAFETY: As just checked.
            unsafe { regs::live_fs_base() }
        } else {
            regs::noted_fs_base()
        };
        if fs_base != self.fs_base {
            self.fs_base = fs_base;
            vmcs.write(host::FS_BASE, fs_base);
        }
    }

    #[cold]
    fn read_unusual(&mut self, ldt: u16, irq: &IrqOff) {
        self.ldt = ldt;
        if self.keeps_gs_base {
            self.kernel_gs_base = regs::kernel_gs_base(irq);
        }
        if self.has_debugctl {
            // SAFETY: As just checked.
            self.debugctl = unsafe { regs::debugctl(irq) };
        }
        if self.has_pebs {
            // SAFETY: As just checked.
            self.pebs = unsafe { regs::pebs_enable(irq) };
        }
        self.is_unusual = self.keeps_gs_base || self.ldt != 0 || self.debugctl | self.pebs != 0;
    }

    /// The thread may program the PMU itself before the next entry.
    #[inline(always)]
    pub(crate) fn forget_pmu(&mut self) {
        self.pmu_read_at.1 = !0;
    }

    /// Right before an entry, of which [`Self::unquiet`] follows in any case.
    #[inline(always)]
    pub(crate) fn quiet(&self, irq: &IrqOff) {
        if self.is_unusual && self.pebs != 0 {
            // SAFETY: Undone by `unquiet`.
            unsafe { regs::set_pebs_enable(0, irq) };
        }
    }

    /// Right after it, whether it succeeded or not.
    #[inline(always)]
    pub(crate) fn unquiet(&self, irq: &IrqOff) {
        if self.is_unusual && self.pebs != 0 {
            // SAFETY: What `refresh` read on this CPU; interrupts were off since.
            unsafe { regs::set_pebs_enable(self.pebs, irq) };
        }
    }

    /// Puts back what a VM exit does not load from the host-state area, but for TR's limit and DR7.
    #[inline(always)]
    pub(crate) fn restore_after_exit(&self, irq: &IrqOff) {
        // SAFETY: What `refresh` read on this CPU; interrupts were off since.
        unsafe { regs::lgdt(&self.gdt, irq) };
        if self.is_unusual {
            self.restore_unusual(irq);
        }
    }

    #[cold]
    fn restore_unusual(&self, irq: &IrqOff) {
        if self.ldt != 0 {
            // SAFETY: As above, and after the GDT is back.
            unsafe { regs::lldt(self.ldt, irq) };
        }
        if self.debugctl != 0 {
            // SAFETY: As above.
            unsafe { regs::restore_debugctl(self.debugctl, irq) };
        }
        if self.keeps_gs_base {
            // SAFETY: As above.
            unsafe { regs::restore_kernel_gs_base(self.kernel_gs_base, irq) };
        }
    }
}
