// SPDX-License-Identifier: GPL-2.0

//! The run page from the module's side, and how RUN's results reach the registers of its caller.
//!
//! User space writes the page at any time: every access is one volatile read or write of a field, and what is read is
//! checked before it is used.

use super::Vcpu;
use super::PMU_CALLS;
use crate::abi;
use crate::abi::RunPage;
use crate::sys::mem::Page;
use crate::sys::regs;
use crate::sys::thread;
use core::mem::size_of;
use core::ptr::addr_of;
use core::ptr::addr_of_mut;

/// Nothing for user space but to come back.
pub(super) const AGAIN: abi::Exit = abi::Exit {
    kind: abi::EXIT_AGAIN,
    reason: 0,
    qualification: 0,
    gpa: 0,
    gla: 0,
    hva: 0,
    access: 0,
    flags: 0,
    instruction_len: 0,
    interruption_info: 0,
    interruption_error_code: 0,
    instruction_error: 0,
};

/// A system call of the guest's: its number, for RAX, and its arguments, for the registers where SYSCALL wants them.
pub(super) struct Forwarded {
    pub(super) number: u64,
    pub(super) call: thread::Forward,
}

impl Vcpu {
    pub(crate) fn run_page(&self) -> &Page {
        &self.run
    }

    #[inline(always)]
    pub(crate) fn run_ptr(&self) -> *mut RunPage {
        self.run.as_ptr().cast()
    }

    /// The guest's general-purpose registers, as of the last exit.
    pub(crate) fn gprs(&self) -> abi::Gprs {
        // SAFETY: The page is there; any bytes are a value.
        unsafe { addr_of!((*self.run_ptr()).gprs).read_volatile() }
    }

    /// Changes registers of the guest.
    pub(crate) fn set_gprs(&self, gprs: &abi::Gprs) {
        // SAFETY: As above.
        unsafe { addr_of_mut!((*self.run_ptr()).gprs).write_volatile(*gprs) };
    }

    /// What CPUID is asked for: EAX and ECX.
    #[inline(always)]
    pub(crate) fn cpuid_operands(&self) -> (u32, u32) {
        let run = self.run_ptr();
        // SAFETY: As above.
        unsafe {
            (
                addr_of!((*run).gprs.rax).read_volatile() as u32,
                addr_of!((*run).gprs.rcx).read_volatile() as u32,
            )
        }
    }

    /// What CPUID answers: EAX, EBX, ECX, EDX. It clears the upper halves.
    #[inline(always)]
    pub(crate) fn set_cpuid_answer(&self, [a, b, c, d]: [u32; 4]) {
        let run = self.run_ptr();
        // SAFETY: As above.
        unsafe {
            addr_of_mut!((*run).gprs.rax).write_volatile(a.into());
            addr_of_mut!((*run).gprs.rbx).write_volatile(b.into());
            addr_of_mut!((*run).gprs.rcx).write_volatile(c.into());
            addr_of_mut!((*run).gprs.rdx).write_volatile(d.into());
        }
    }

    /// Adds to the counter of the run page at that offset in [`abi::Counters`].
    #[inline]
    pub(crate) fn count(&self, offset: usize, n: u64) {
        assert!(offset % 8 == 0 && offset < size_of::<abi::Counters>());
        // SAFETY: The page is there, and the counter inside. What user space writes there is its own loss.
        unsafe {
            let p = addr_of_mut!((*self.run_ptr()).counters).cast::<u64>().add(offset / 8);
            p.write_volatile(p.read_volatile().wrapping_add(n));
        }
    }

    /// The counter of the run page at that place among those of [`abi::Counters`]; user space may have written there.
    pub(crate) fn counter(&self, index: usize) -> u64 {
        assert!(index < size_of::<abi::Counters>() / 8);
        // SAFETY: The page is there, and the counter inside.
        unsafe {
            addr_of!((*self.run_ptr()).counters)
                .cast::<u64>()
                .add(index)
                .read_volatile()
        }
    }

    /// Whether user space wants RUN to return at once.
    pub(super) fn is_interrupt_requested(&self) -> bool {
        // SAFETY: The page is there.
        unsafe { addr_of!((*self.run_ptr()).interrupt_request).read_volatile() != 0 }
    }

    /// Whether `deadline` is set and over.
    pub(super) fn is_time_over(&self) -> bool {
        // SAFETY: The page is there.
        let deadline = unsafe { addr_of!((*self.run_ptr()).deadline).read_volatile() };
        deadline != 0 && regs::ticks() >= deadline
    }

    /// Hands a result to user space that is no system call.
    pub(super) fn finish(&self, exit: &abi::Exit) -> u64 {
        // SAFETY: The page is there.
        unsafe { addr_of_mut!((*self.run_ptr()).exit).write_volatile(*exit) };
        self.owner.set_user_result(exit.kind, None);
        0
    }

    /// The guest's RAX.
    #[inline(always)]
    pub(super) fn set_rax(&self, rax: u64) {
        // SAFETY: The page is there.
        unsafe { addr_of_mut!((*self.run_ptr()).gprs.rax).write_volatile(rax) };
    }

    /// A system call for user space to make.
    #[inline(always)]
    pub(super) fn forwarded(&mut self) -> Forwarded {
        self.syscalls = self.syscalls.wrapping_add(1);
        let run = self.run_ptr();
        // SAFETY: The page is there; each field is read once.
        let (number, args) = unsafe {
            addr_of_mut!((*run).exit.kind).write_volatile(abi::EXIT_SYSCALL);
            (
                addr_of!((*run).gprs.rax).read_volatile(),
                [
                    addr_of!((*run).gprs.rdi).read_volatile(),
                    addr_of!((*run).gprs.rsi).read_volatile(),
                    addr_of!((*run).gprs.rdx).read_volatile(),
                    addr_of!((*run).gprs.r10).read_volatile(),
                    addr_of!((*run).gprs.r8).read_volatile(),
                    addr_of!((*run).gprs.r9).read_volatile(),
                ],
            )
        };
        // Linux takes the low 32 bits; zero-extended they are never taken for an error of ours.
        let number = number as u32 as u64;
        if PMU_CALLS.contains(&number) {
            self.host.forget_pmu();
        }
        Forwarded {
            number,
            call: thread::Forward { args },
        }
    }
}
