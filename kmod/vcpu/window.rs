// SPDX-License-Identifier: GPL-2.0

//! Windows: the VMCS current, interrupts off.

use super::Vcpu;
use crate::abi;
use crate::arch::controls::exception;
use crate::arch::controls::VmxCapabilities;
use crate::arch::exit::vector;
use crate::arch::exit::ENTRY_FAILURE;
use crate::arch::vmcs_field::control;
use crate::arch::vmcs_field::exit_info;
use crate::arch::vmcs_field::guest;
use crate::exit;
use crate::exit::Exit;
use crate::exit::ExitInfo;
use crate::space::Space;
use crate::sys::cpu;
use crate::sys::cpu::IrqLeftOff;
use crate::sys::cpu::IrqOff;
use crate::sys::cpu::PreemptGuard;
use crate::sys::heavy;
use crate::sys::regs;
use crate::sys::regs::FpuLoan;
use crate::sys::regs::UserState;
use crate::sys::thread;
use crate::sys::thread::Pending;
use crate::sys::trace;
use crate::vmx::dump;
use crate::vmx::enter;
use crate::vmx::enter::Entered;
use crate::vmx::host_state::HostState;
use crate::vmx::ops;
use crate::vmx::owner;
use crate::vmx::vmcs::CurrentVmcs;
use crate::vmx::vmcs::Loaded;
use core::borrow::Borrow;
use core::mem::offset_of;
use core::sync::atomic::Ordering::Relaxed;
use kernel::prelude::*;

/// Exits that are settled in one window: between two of them interrupts come on, whatever the guest does. (A CPU exits for
/// an interrupt that waits; so this is for emulated ones and for whoever else holds interrupts up.)
const MOST_TURNS: u32 = 32;

/// How a window with an entry ended.
pub(super) enum Window {
    /// The guest ran and exited.
    Exited(ExitInfo),
    /// The guest ran and made a system call; it is behind it.
    Syscall,
    /// The entry failed before anything of the guest ran.
    Failed { instruction_error: u32 },
    /// VMX is not usable on this CPU now.
    Unusable,
    /// Something came up: look at `pending`.
    Retry,
    /// The thread was switched out, or a fence came: the guest's restartable sequence is to be aborted.
    Switched,
    /// The VMCS is active on another CPU.
    Elsewhere,
    /// The FPU state can only be loaded, the MSRs of a KVM guest only be put away, or `struct rseq` only be brought up to date,
    /// on the way through user mode.
    UserMode,
}

/// The interrupts that are off in a window with an entry.
pub(super) trait Interrupts: Borrow<IrqOff> {
    /// Whether they come on when the window ends: in RUN. Else the thread is on its way to user mode.
    const COME_ON: bool;

    /// Ends the window behind a system call, with what `restore_tss_limit_and_dr7` and `guest_timing_exit` do.
    fn end_window(self);
}

impl Interrupts for IrqOff {
    const COME_ON: bool = true;

    #[inline(always)]
    fn end_window(self) {
        IrqOff::end_window(self);
    }
}

impl Interrupts for IrqLeftOff {
    const COME_ON: bool = false;

    #[inline(always)]
    fn end_window(self) {
        IrqLeftOff::end_window(self);
    }
}

impl Vcpu {
    /// Calls `f` with the VMCS current, in a window without an entry. ENODEV when VMX was taken away.
    pub(super) fn with_vmcs(&mut self, f: impl FnOnce(&mut CurrentVmcs<'_>, &VmxCapabilities)) -> Result {
        let capabilities = owner::capabilities().ok_or(ENODEV)?;
        // A CPU that goes offline sends the thread elsewhere, and KVM comes or goes in a moment: it does not take many turns.
        for _ in 0..10_000 {
            self.vmcs.clear_elsewhere();
            let irq = IrqOff::new();
            match self.vmcs.load(&irq) {
                Loaded::Here { mut vmcs, moved } => {
                    f(&mut vmcs, &capabilities);
                    if moved {
                        // The next entry has this CPU's state to write, and to flush.
                        self.host = HostState::new();
                    }
                    return if vmcs.end(&irq) { Ok(()) } else { Err(EIO) };
                }
                Loaded::Elsewhere => continue,
                Loaded::Unusable => {}
            };
            drop(irq);
            owner::regain()?;
            thread::yield_now();
        }
        Err(ENODEV)
    }

    /// One window of RUN: load, enter, exit, read why.
    #[inline(always)]
    pub(super) fn enter_once(&mut self, space: &Space) -> Window {
        let irq = IrqOff::new();
        // Dropped before `irq`.
        let mut fpu = FpuLoan::none();
        if self.owner.has_work(&irq) {
            match self.work_before_entry(&irq) {
                Ok(loan) => fpu = loan,
                Err(window) => return window,
            }
        }
        self.window(space, irq, fpu)
    }

    /// The window of a thread that is fit to enter.
    #[inline(always)]
    pub(super) fn window<I: Interrupts>(&mut self, space: &Space, interrupts: I, fpu: FpuLoan) -> Window {
        // Parameters are dropped from the last to the first: `fpu` with interrupts off.
        let irq: &IrqOff = interrupts.borrow();
        let (mut vmcs, moved) = match self.vmcs.load(irq) {
            Loaded::Here { vmcs, moved } => (vmcs, moved),
            Loaded::Elsewhere => return Window::Elsewhere,
            Loaded::Unusable => return Window::Unusable,
        };
        let moved = moved || self.host.is_new();
        self.host.refresh(&mut vmcs, moved, &self.owner, irq);
        if self.next.any {
            self.write_next(&mut vmcs);
        }

        // From here on an invalidation interrupts this CPU.
        let stale = space.ept.translations.enter(irq);
        if (stale && !self.flush_ept()) || (moved && !self.flush_vpid()) {
            // Never with translations that could not be flushed.
            space.ept.translations.forget(irq);
            self.host = HostState::new();
            vmcs.end(irq);
            self.put_pkru_away();
            return Window::Unusable;
        }
        let last_space = &vmcs.percpu().last_space;
        if last_space.load(Relaxed) != space.number {
            last_space.store(space.number, Relaxed);
            cpu::branch_prediction_barrier(irq);
        }
        // It is Linux' own now, beside KVM too (`load_user_state`).
        // SAFETY: Canonical, as `check` and `set_lstar` want; Linux' is put back below, before interrupts come on.
        unsafe { regs::write_lstar(self.soft.lstar, irq) };
        self.host.quiet(irq);
        thread::guest_timing_enter(irq);
        let mut turns = MOST_TURNS;
        let info = loop {
            // SAFETY: `setup` was written before the first entry (`take_dirty`), the host state is fresh, the FPU loaded.
            let entered = unsafe { enter::enter(self.run_ptr(), &self.vmcs.entry, &mut self.host_ran, irq) };
            if entered != Entered::Exit {
                self.leave_guest(space, irq);
                self.put_pkru_away();
                thread::guest_timing_exit(irq);
                let instruction_error = match entered {
                    Entered::FailValid => {
                        let error = vmcs.read(exit_info::INSTRUCTION_ERROR) as u32;
                        dump::record(&mut vmcs.apart(), space.number, false);
                        if trace::is_on(trace::Event::EntryFailed) {
                            trace::entry_failed(space.number, 0, 0, error);
                        }
                        error
                    }
                    _ => {
                        vmcs.end(irq);
                        return Window::Unusable;
                    }
                };
                vmcs.end(irq);
                return Window::Failed { instruction_error };
            }
            let raw_reason = exit::read_reason(&mut vmcs);
            turns -= 1;
            match exit::look(self, space, raw_reason, turns != 0, &mut vmcs, irq) {
                Exit::Settled => {}
                Exit::Other(info) => break info,
                // The end of the window for this one is apart, and short.
                Exit::Syscall => {
                    self.leave_guest(space, irq);
                    self.host.restore_after_exit(irq);
                    if I::COME_ON {
                        self.wait_for_call(irq);
                    }
                    let is_fine = vmcs.end(irq);
                    drop(fpu);
                    interrupts.end_window();
                    return if is_fine { Window::Syscall } else { Window::Unusable };
                }
            }
        };
        if !I::COME_ON {
            self.keep_section();
        }
        self.leave_guest(space, irq);
        self.host.restore_after_exit(irq);
        regs::restore_tss_limit_and_dr7(irq);
        if info.cpl == 3 {
            self.put_pkru_away();
        }
        if info.is_nmi() {
            enter::handle_nmi(irq);
        } else if info.is_machine_check() {
            enter::handle_machine_check(irq);
            if !I::COME_ON {
                // What it left the thread to do on its way to user mode comes too late without.
                cpu::interrupt_soon(irq);
            }
        } else if info.is_device_not_available() {
            cpu::clear_xfd_error(irq);
        }
        // Before interrupts come on, below.
        if !vmcs.end(irq) {
            // Somebody else uses VMX.
            thread::guest_timing_exit(irq);
            return Window::Unusable;
        }
        if info.is_external_interrupt() && I::COME_ON {
            if !IrqOff::COUNTS_INTERRUPTS {
                self.rseq_aborted_at.0 = !0;
            }
            thread::note_quiescent(irq);
            thread::note_rseq_interrupted(irq);
            // Taken now, while the time still counts as the guest's: the tick must find it so.
            let _stay = PreemptGuard::new();
            drop(fpu);
            drop(interrupts);
            let irq = IrqOff::new();
            thread::guest_timing_exit(&irq);
            drop(irq);
        } else {
            thread::guest_timing_exit(irq);
        }
        Window::Exited(info)
    }

    /// Makes the thread fit to enter a guest; `Err`: what keeps it out.
    #[cold]
    fn work_before_entry(&mut self, irq: &IrqOff) -> Result<FpuLoan, Window> {
        if thread::pending() != Pending::Nothing {
            return Err(Window::Retry);
        }
        if thread::rseq_is_due() {
            if !thread::rseq_is_true(irq) {
                return Err(Window::UserMode);
            }
            // Linux' flag stays up until the next way through user mode. It was raised anew where the thread was switched out
            // or an interrupt came: membarrier's fence is one.
            let now = (self.owner.switches(), irq.counted_interrupts());
            if self.rseq_aborted_at != now {
                self.rseq_aborted_at = now;
                return Err(Window::Switched);
            }
        }
        let loan = match regs::load_user_state(irq) {
            UserState::Loaded => FpuLoan::none(),
            // Linux loads it on a way through user mode, once. Where a tracer stops the thread when RUN begins it is in memory
            // again: then it is lent.
            UserState::ExtendedInMemory if self.went_for_fpu => FpuLoan::new(irq),
            UserState::ExtendedInMemory => {
                self.went_for_fpu = true;
                return Err(Window::UserMode);
            }
            UserState::Elsewhere => return Err(Window::UserMode),
        };
        self.went_for_fpu = false;
        Ok(loan)
    }

    /// This CPU is the host's again, but for what a VM exit left wrong.
    #[inline(always)]
    fn leave_guest(&self, space: &Space, irq: &IrqOff) {
        if !cfg!(dune_mutate_lstar) {
            // SAFETY: Linux' own value.
            unsafe { regs::write_lstar(self.host_lstar, irq) };
        }
        self.host.unquiet(irq);
        space.ept.translations.leave(irq);
    }

    /// PKRU of code at CPL3 waits for the next entry. It may refuse all there is; what it refused while the guest is out, Linux
    /// and the host loop could not access (`struct rseq`, the stack), and that would end the process.
    ///
    /// What code at CPL0 refuses itself is refused Linux, too, as natively.
    #[cold]
    fn put_pkru_away(&mut self) {
        let pkru = regs::pkru();
        if pkru != 0 {
            regs::write_pkru(0);
            self.next.pkru = Some(pkru);
            self.next.any = true;
        }
    }

    /// Writes what earlier exits, or user space, left for this entry.
    fn write_next(&mut self, vmcs: &mut CurrentVmcs<'_>) {
        self.next.any = false;
        if let Some(pkru) = self.next.pkru.take() {
            regs::write_pkru(pkru);
        }
        if let Some(rip) = self.next.rip.take() {
            let rip = exit::next_rip(vmcs, rip);
            vmcs.write(guest::RIP, rip);
            // Behind an emulated instruction nothing is blocked any more by the STI or MOV SS before it. (Blocking by SMI,
            // by NMI and in enclaves is never a guest's here.)
            vmcs.write(guest::INTERRUPTIBILITY_STATE, 0);
        }
        if let Some(injection) = self.next.injection.take() {
            if injection.info.vector() == vector::DB {
                // Delivery ends what STI or MOV SS blocks. With TF set the exit has left nothing that says a #DB is pending,
                // and beside the blocking that fails the entry (SDM 3C 27.3.1.5).
                vmcs.write(guest::INTERRUPTIBILITY_STATE, 0);
            }
            vmcs.write(control::ENTRY_INTERRUPTION_INFO, injection.info.as_u32().into());
            if injection.info.has_error_code() {
                vmcs.write(control::ENTRY_EXCEPTION_ERROR_CODE, injection.error_code.into());
            }
            if injection.info.is_software() {
                vmcs.write(control::ENTRY_INSTRUCTION_LENGTH, injection.instruction_len.into());
            }
        } else if self.next.clear_injection {
            vmcs.write(control::ENTRY_INTERRUPTION_INFO, 0);
        }
        self.next.clear_injection = false;
    }

    fn flush_ept(&self) -> bool {
        self.count(offset_of!(abi::Counters, invept), 1);
        // SAFETY: VMX is on, the type is one the CPU has, interrupts are off.
        unsafe { ops::invept(self.invept_single.then_some(self.eptp)) }.is_ok()
    }

    fn flush_vpid(&self) -> bool {
        if self.vpid == 0 {
            return true;
        }
        self.count(offset_of!(abi::Counters, invvpid), 1);
        self.count(offset_of!(abi::Counters, migrations), 1);
        // SAFETY: As above.
        unsafe { ops::invvpid(self.invvpid_single.then_some(self.vpid.into())) }.is_ok()
    }

    /// Notes an exit in the run page, and that the VMCS is launched.
    #[inline(always)]
    pub(crate) fn count_exit(&self, raw_reason: u32) {
        let reason = (raw_reason as u16 as usize).min(abi::EXIT_REASONS - 1);
        self.count(offset_of!(abi::Counters, exits) + 8 * reason, 1);
        if raw_reason & ENTRY_FAILURE == 0 {
            self.count(offset_of!(abi::Counters, entries), 1);
            self.vmcs.entry.launched.store(1, Relaxed);
        }
        #[cfg(dune_count_ops)]
        for (kind, counted) in heavy::take().into_iter().enumerate() {
            self.count(offset_of!(abi::Counters, heavy) + 8 * kind, counted);
        }
    }
}

// Windows rely on these exits, however the guest sets its IDT.
const _: () = assert!(exception::ALWAYS & exception::MC != 0);

// What is counted by the numbers of `heavy.h` is told by those of the ABI.
const _: () = {
    let told = [
        abi::HEAVY_VMREAD,
        abi::HEAVY_VMWRITE,
        abi::HEAVY_VMPTRLD,
        abi::HEAVY_INVALIDATION,
        abi::HEAVY_RDMSR,
        abi::HEAVY_WRMSR,
        abi::HEAVY_LOAD,
        abi::HEAVY_INTERRUPT_FLAG,
        abi::HEAVY_IPI,
        abi::HEAVY_ENTRY,
        abi::HEAVY_KINDS,
    ];
    let mut kind = 0;
    while kind < told.len() {
        assert!(told[kind] == heavy::NUMBERS[kind]);
        kind += 1;
    }
};
