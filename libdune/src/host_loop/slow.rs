// SPDX-License-Identifier: MIT OR Apache-2.0

//! Everything that RUN can come back with but a plain system call.
//!
//! # Safety
//!
//! Called by the loop on the host stack, with the context of this thread. The module writes the run page only while
//! it runs; user space may write it at any time, so it is read through the raw pointer. Allocates nothing, uses no
//! TLS and no errno.

use dune_abi::Event;
use dune_abi::Exit;
use dune_abi::RunPage;
use dune_abi::ACCESS_EXECUTE;
use dune_abi::ACCESS_WRITE;
use dune_abi::DIRTY_EVENT;
use dune_abi::EXIT_AGAIN;
use dune_abi::EXIT_FAIL_ENTRY;
use dune_abi::EXIT_REFUSED;
use dune_abi::EXIT_SYSCALL;
use dune_abi::EXIT_TOUCH;
use dune_abi::FLAG_EVENT_DELIVERY;
use dune_abi::FLAG_GLA_VALID;
use dune_abi::FLAG_PAGING_STRUCTURE;

use super::clone;
use super::context::HostContext;
use super::context::Registers;
use super::context::Touched;
use super::report;
use super::signal;
use super::special;
use super::touch;
use super::touch::Refusal;
use super::upcall;
use crate::abi::PAGE_FAULT_HOST_REFUSED;
use crate::process;
use crate::sys;

/// What the loop does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Action {
    /// Run the vCPU.
    Run = 0,
    /// Make the system call that is in the run page's registers, then run.
    Forward = 1,
    /// Go on with `HostContext::registers` outside Dune mode.
    Native = 2,
    /// Make the system call in `HostContext::call`, and come back; a child goes on with its `Registers` outside Dune
    /// mode.
    CloneOutside = 3,
    /// End the thread as `HostContext::end` says, which takes its stack away.
    End = 4,
    /// Make the system call in `HostContext::call`, and come back twice.
    Clone = 5,
}

/// R12D where a signal came before a system call was made.
pub(super) const SIGNALLED: u32 = u32::MAX - 3;

/// R12D behind `Action::Clone` and `Action::CloneOutside`: RAX is what the call returned to the maker.
pub(super) const CLONED: u32 = u32::MAX - 1;

/// R12D behind `Action::Clone` in the child.
pub(super) const IS_CHILD: u32 = u32::MAX - 2;

/// What `enter_guest` returns where the module could not enter the guest at all; the run page says why.
pub(crate) const FAILED_ENTRY: i64 = -4096;

/// R12D as the loop sets it before RUN: RUN failed, RAX is the error.
const NO_EXIT: u32 = u32::MAX;

/// The same access may be asked for this often in a row before it counts as no progress.
const MOST_TOUCHES: u32 = 1000;

/// Type "hardware exception", error code valid, valid (SDM, "VM-Entry Controls for Event Injection").
const INJECT_PAGE_FAULT: u32 = 14 | 3 << 8 | 1 << 11 | 1 << 31;

/// Decides about what RUN came back with. `rax` is its result: an error, or the number of a system call.
pub(super) unsafe extern "C" fn dune_host_slow(context: *mut HostContext, rax: i64, kind: u32) -> u32 {
    // SAFETY: The loop passes the context of this thread, which nobody else uses meanwhile.
    let context = unsafe { &mut *context };
    let action = match kind {
        NO_EXIT => run_failed(context, rax),
        EXIT_SYSCALL => special::handle(context, rax as u64),
        EXIT_TOUCH => touched(context),
        EXIT_REFUSED => {
            let exit = read_exit(context);
            refused(context, &exit, true)
        }
        EXIT_AGAIN => Action::Run,
        SIGNALLED => upcall::take_before_call(context),
        CLONED => clone::made(context, rax),
        IS_CHILD => clone::begin(context),
        EXIT_FAIL_ENTRY if entries(context) == 0 => give_up(context, FAILED_ENTRY),
        _ => die(context, "the guest cannot go on"),
    };
    action as u32
}

fn run_failed(context: &mut HostContext, rax: i64) -> Action {
    let errno = -rax;
    if errno == libc::EINTR as i64 {
        let is_time_over = is_time_over(context);
        if context.pending.signal != 0 {
            upcall::take(context)
        } else if is_time_over {
            upcall::end_visit(context)
        } else {
            Action::Run
        }
    } else if entries(context) == 0 {
        give_up(context, rax)
    } else if errno == libc::ENOMEM as i64 {
        // An access of the guest's found no memory. Linux, too, has it made again: the kernel frees some, or ends a process.
        Action::Run
    } else {
        report::die_of_run(context, errno)
    }
}

/// The first RUN failed: `enter_guest` returns `result` outside Dune mode.
fn give_up(context: &mut HostContext, result: i64) -> Action {
    let mask = sys::sigprocmask(libc::SIG_BLOCK, u64::MAX);
    // SAFETY: The run page is alive.
    let run = unsafe { context.run.read_volatile() };
    context.registers = Registers::new(&run.gprs, run.rip, run.gprs.rsp, run.rflags);
    context.registers.rax = result as u64;
    context.left = true;
    let pending = core::mem::replace(&mut context.pending.signal, 0);
    if pending == 0 {
        sys::sigprocmask(libc::SIG_SETMASK, mask);
    } else {
        sys::queue_to_self(pending, &context.pending.info);
        sys::sigprocmask(libc::SIG_SETMASK, context.pending.mask);
    }
    Action::Native
}

fn die(context: &HostContext, what: &str) -> ! {
    // SAFETY: The run page is alive.
    let run = unsafe { context.run.read_volatile() };
    report::die_of_exit(context, &run, what)
}

fn entries(context: &HostContext) -> u64 {
    // SAFETY: The run page is alive.
    unsafe { (&raw const (*context.run).counters.entries).read_volatile() }
}

fn read_exit(context: &HostContext) -> Exit {
    // SAFETY: The run page is alive.
    unsafe { (&raw const (*context.run).exit).read_volatile() }
}

/// Whether the deadline of the run page is set and over. It is put off a little then: RUN would not get anywhere, and code
/// that is not at CPL3 any more, or not yet, must not be at it without one.
fn is_time_over(context: &HostContext) -> bool {
    const LITTLE: u64 = 200_000;
    // SAFETY: The run page is alive; RUN is not under way.
    unsafe {
        let deadline = &raw mut (*context.run).deadline;
        let is_set = deadline.read_volatile() != 0;
        let now = if is_set { sys::ticks() } else { 0 };
        let is_over = is_set && now >= deadline.read_volatile();
        if is_over {
            deadline.write_volatile(now.saturating_add(LITTLE));
        }
        is_over
    }
}

fn rip(context: &HostContext) -> u64 {
    // SAFETY: The run page is alive.
    unsafe { (&raw const (*context.run).rip).read_volatile() }
}

/// The process' page table allows no such access yet: make it natively, and Linux does what it does for any access.
fn touched(context: &mut HostContext) -> Action {
    let exit = read_exit(context);
    if let Err(refusal) = touch::touch(exit.hva, exit.access & ACCESS_WRITE != 0) {
        if refusal == Refusal::INTERRUPTED {
            return Action::Run;
        }
        let may_be_protected = refusal.signal == libc::SIGSEGV && refusal.code == SEGV_ACCERR;
        return refused(context, &exit, may_be_protected);
    }
    // Linux allows it. The module must find it now: the same again and again, with nothing else in between, is an
    // access that it will never be able to give.
    let now = Touched {
        rip: rip(context),
        hva: exit.hva,
        access: exit.access,
    };
    let entries = entries(context);
    let again = now == context.touched && entries.wrapping_sub(context.touched_entries) <= 2;
    context.touched_times = if again { context.touched_times + 1 } else { 0 };
    context.touched = now;
    context.touched_entries = entries;
    if context.touched_times > MOST_TOUCHES {
        die(
            context,
            "Linux allows an access that the module cannot give to the guest",
        );
    }
    Action::Run
}

const SEGV_ACCERR: i32 = 2;

/// The host refuses an access: the guest gets a page fault that says so.
fn refused(context: &mut HostContext, exit: &Exit, is_mapped: bool) -> Action {
    if exit.flags & FLAG_EVENT_DELIVERY != 0 {
        die(
            context,
            "the host refuses an access of the delivery of an event (stack, IDT, GDT or TSS)",
        );
    }
    if exit.flags & FLAG_PAGING_STRUCTURE != 0 {
        die(
            context,
            "the host refuses an access to a page of the guest's page table",
        );
    }
    if exit.flags & FLAG_GLA_VALID == 0 {
        die(
            context,
            "the host refuses an access and the CPU does not say to which linear address",
        );
    }
    // SAFETY: The run page is alive; RUN is not under way.
    let is_cpl3 = unsafe { (&raw const (*context.run).sregs.ss.access_rights).read_volatile() } >> 5 & 3 == 3;
    let error_code = u64::from(is_mapped)
        | u64::from(exit.access & ACCESS_WRITE != 0) << 1
        | u64::from(is_cpl3) << 2
        | u64::from(exit.access & ACCESS_EXECUTE != 0) << 4
        | PAGE_FAULT_HOST_REFUSED;
    let event = Event {
        info: INJECT_PAGE_FAULT,
        error_code: error_code as u32,
        instruction_len: 0,
        reserved: 0,
    };
    // SAFETY: As above.
    unsafe {
        let run = context.run;
        (&raw mut (*run).cr2).write_volatile(exit.gla);
        (&raw mut (*run).event).write_volatile(event);
        let dirty = (&raw const (*run).dirty).read_volatile();
        (&raw mut (*run).dirty).write_volatile(dirty | DIRTY_EVENT);
    }
    Action::Run
}

/// Ends Dune mode for this thread: destroys the vCPU, and gives the program its signals back if it was the last.
pub(super) fn leave(context: &mut HostContext) {
    destroy(context);
    process::if_alone(context.process(), || signal::restore_from(context.actions()));
}

/// Destroys the vCPU. Its run page stays mapped, nothing runs on it any more.
pub(super) fn destroy(context: &mut HostContext) {
    // SAFETY: The vCPU is this thread's.
    let _ = unsafe { sys::request(context.fd as i32, dune_abi::DUNE_DESTROY_VCPU, context.vcpu) };
    context.left = true;
}

/// Sets the guest's RAX.
pub(super) fn set_result(run: *mut RunPage, result: i64) {
    // SAFETY: The run page is alive; RUN is not under way.
    unsafe { (&raw mut (*run).gprs.rax).write_volatile(result as u64) };
}
