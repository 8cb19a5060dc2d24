// SPDX-License-Identifier: MIT OR Apache-2.0

//! The system calls that cannot be forwarded as they are.
//!
//! | Call | Why |
//! |---|---|
//! | clone, clone3, fork, vfork | see `clone` |
//! | arch_prctl (FS, GS) | the guest's segment bases follow |
//! | rt_sigaction | the program's actions are kept, Linux has the host loop's handler (`signal`) |
//! | rt_sigreturn, sigaltstack | of handlers in Dune mode (`upcall`) |
//! | seccomp, prctl (PR_SET_SECCOMP) | from then on RUN goes by read |
//! | prctl (PR_SET_SYSCALL_USER_DISPATCH) | emulated, and then each call (`dispatch`) |
//! | tgkill to itself, of a signal whose default is a core dump | made outside Dune mode, for good |
//! | close, close_range, dup2, dup3 | the device's fd is hidden |
//! | exit, exit_group | what libdune keeps for the thread goes with it |
//! | VMCALLs of libdune's own | leaving, reports, the thread's own address |

use core::sync::atomic::compiler_fence;
use core::sync::atomic::Ordering::Acquire;
use core::sync::atomic::Ordering::Relaxed;
use core::sync::atomic::Ordering::SeqCst;

use dune_abi::Gprs;
use dune_abi::RunPage;
use dune_abi::DIRTY_SREGS;
use dune_abi::DUNE_SYNC;

use super::clone;
use super::context::End;
use super::context::HostContext;
use super::context::Registers;
use super::context::Role;
use super::context::State;
use super::dispatch;
use super::report;
use super::signal;
use super::slow;
use super::slow::leave;
use super::slow::set_result;
use super::slow::Action;
use super::touch;
use super::upcall;
use crate::abi::CALL_EXCEPTION;
use crate::abi::CALL_FATAL;
use crate::abi::CALL_LEAVE;
use crate::abi::CALL_SELF;
use crate::abi::CALL_SIGNAL;
use crate::abi::PRIVATE_CALLS;
use crate::abi::PRIVATE_CALLS_END;
use crate::entry;
use crate::layout;
use crate::paging;
use crate::process;
use crate::sys;
use crate::sys::SigAction;
use crate::trap::TrapFrame;

const CALLS: [i64; 17] = [
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_arch_prctl,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_seccomp,
    libc::SYS_tgkill,
    libc::SYS_prctl,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Bit that selects the x32 ABI: nothing of that kind can be told apart here, and next to no kernel has it.
const X32: u64 = 0x4000_0000;

/// Marks the calls of this file in the loop's table.
pub(crate) fn fill_table(table: &mut [u8; 512]) {
    for call in CALLS {
        table[call as usize] = 1;
    }
}

/// Handles system call `number`, whose arguments are in the run page.
pub(super) fn handle(context: &mut HostContext, number: u64) -> Action {
    // SAFETY: The run page is alive; RUN is not under way.
    let gprs = unsafe { (&raw const (*context.run).gprs).read_volatile() };
    let is_private = number == u64::from(CALL_FATAL) || number == u64::from(CALL_SIGNAL);
    // What comes from here on is seen where the call is made.
    context.late.store(0, Relaxed);
    compiler_fence(SeqCst);
    // Where it was asked to wait the call is a hook's.
    if context.pending.signal != 0 && !is_private && !context.is_asked() {
        return upcall::take_before_call(context);
    }
    let is_ours = (PRIVATE_CALLS.into()..PRIVATE_CALLS_END.into()).contains(&number);
    if !is_ours && context.is_dispatching() {
        if let Some(action) = dispatch::catch(context) {
            return action;
        }
    }
    if number >= u64::from(PRIVATE_CALLS) || number & X32 != 0 {
        return private(context, number, &gprs);
    }
    decide(context, number as i64, &gprs)
}

/// Handles a system call that has a number here; the others are Linux'.
pub(super) fn decide(context: &mut HostContext, number: i64, gprs: &Gprs) -> Action {
    match number {
        libc::SYS_clone | libc::SYS_clone3 | libc::SYS_fork | libc::SYS_vfork => {
            clone::handle(context, number, gprs).unwrap_or_else(|errno| fail(context.run, errno))
        }
        libc::SYS_arch_prctl => arch_prctl(context, gprs).unwrap_or_else(|errno| fail(context.run, errno)),
        libc::SYS_rt_sigaction => sigaction(context, gprs).unwrap_or_else(|errno| fail(context.run, errno)),
        libc::SYS_tgkill => tgkill(context, gprs).unwrap_or(Action::Forward),
        libc::SYS_seccomp => seccomp(context, gprs),
        libc::SYS_prctl => prctl(context, gprs),
        libc::SYS_rt_sigreturn => upcall::sigreturn(context),
        libc::SYS_sigaltstack => upcall::sigaltstack(context, gprs).unwrap_or_else(|errno| fail(context.run, errno)),
        libc::SYS_close if gprs.rdi as u32 == context.fd as u32 => fail(context.run, libc::EBADF),
        libc::SYS_close_range => close_range(context, gprs),
        libc::SYS_dup2 | libc::SYS_dup3 => {
            if gprs.rdi as u32 == context.fd as u32 {
                fail(context.run, libc::EBADF)
            } else if gprs.rsi as u32 == context.fd as u32 {
                fail(context.run, libc::EBUSY)
            } else {
                Action::Forward
            }
        }
        libc::SYS_exit | libc::SYS_exit_group => exit(context, number, gprs),
        _ => Action::Forward,
    }
}

fn fail(run: *mut RunPage, errno: i32) -> Action {
    set_result(run, -i64::from(errno));
    Action::Run
}

fn private(context: &mut HostContext, number: u64, gprs: &Gprs) -> Action {
    match u32::try_from(number) {
        Ok(CALL_LEAVE) => {
            let gprs = *gprs;
            leave_with(context, |_| {
                let mut registers = Registers::new(&gprs, gprs.rdi, gprs.rsi, gprs.rdx);
                registers.rax = 0;
                registers
            })
        }
        Ok(CALL_SIGNAL) => match touch::read::<TrapFrame>(gprs.rdi) {
            Ok(frame) => upcall::take_at_frame(context, &frame),
            Err(_) => fail(context.run, libc::EFAULT),
        },
        Ok(CALL_EXCEPTION) => match touch::read::<TrapFrame>(gprs.rdi) {
            Ok(frame) => upcall::exception(context, frame)
                .unwrap_or_else(|reason| report::die_of_exception(context, reason as u32, Some(&frame))),
            Err(_) => fail(context.run, libc::EFAULT),
        },
        Ok(CALL_FATAL) => {
            let frame = touch::read::<TrapFrame>(gprs.rdi).ok();
            // SAFETY: The block lives as long as the context.
            let reason = unsafe { (*context.block).fatal.load(Relaxed) };
            report::die_of_exception(context, reason, frame.as_ref())
        }
        Ok(CALL_SELF) => {
            set_result(context.run, context.block as i64);
            Action::Run
        }
        _ => fail(context.run, libc::ENOSYS),
    }
}

/// Leaves Dune mode and goes on with the registers that `registers` gives.
pub(super) fn leave_with(context: &mut HostContext, registers: impl FnOnce(&HostContext) -> Registers) -> Action {
    let mask = sys::sigprocmask(libc::SIG_BLOCK, u64::MAX);
    if context.pending.signal != 0 {
        return upcall::take_before_call(context);
    }
    let bases = sync(context).ok().map(|run| (run.sregs.fs.base, run.sregs.gs.base));
    context.registers = registers(context);
    leave(context);
    if context.alt_stack.is_enabled() {
        // SAFETY: The program's own.
        let _ = unsafe { sys::sigaltstack(Some(&context.alt_stack)) };
    }
    carry_bases(bases);
    sys::sigprocmask(libc::SIG_SETMASK, mask);
    if context.is_dispatching() {
        // From here on each call is the program's.
        let _ = context.dispatch.give_to_linux();
    }
    Action::Native
}

/// exit, exit_group: nothing of its Dune mode is left for the threads that live on.
fn exit(context: &mut HostContext, number: i64, gprs: &Gprs) -> Action {
    if context.is_strict {
        // It may do nothing but end. The module reaps the vCPU; the area stays with the process.
        return Action::Forward;
    }
    match context.role {
        // The process ends, with all that it has. The last Dune thread gives its space back before: Linux waits for a
        // grace period where an address space ends that still has a notifier.
        Role::Thread if number == libc::SYS_exit_group && context.process().threads.load(Acquire) > 1 => {
            return Action::Forward;
        }
        Role::Vfork => {
            slow::destroy(context);
            return Action::Forward;
        }
        Role::Thread | Role::SharesMemory => {}
    }
    sys::sigprocmask(libc::SIG_SETMASK, u64::MAX);
    slow::destroy(context);
    let process = context.process();
    // SAFETY: The block is alive.
    paging::forget_thread(process, unsafe { &(*context.block).here });
    context.end = End {
        number: number as u64,
        status: gprs.rdi,
        release: libc::SYS_munmap as u64,
        start: process.start,
        bytes: layout::ARENA_BYTES as u64,
        advice: 0,
        mark: core::ptr::null(),
        mask: 0,
    };
    // SAFETY: Counted in; from here on only its own area is used, and the process until its bit is clear.
    let is_last = unsafe { process::part(context.process, Some(context.area()), entry::give_back) };
    let run = context.run as u64;
    if is_last || !process.stays_warm(context.area()) {
        // SAFETY: The vCPU is gone and the program never sees its run page again.
        let _ = unsafe { sys::munmap(run, dune_abi::RUN_PAGE_BYTES) };
    }
    if !is_last {
        let area = context.area();
        let (mark, mask) = process.mark(area);
        if process.stays_warm(area) {
            context.end.start = run;
            context.end.bytes = dune_abi::RUN_PAGE_BYTES as u64;
        } else {
            context.end.release = libc::SYS_madvise as u64;
            context.end.start = area;
            context.end.bytes = layout::AREA_BYTES as u64;
            context.end.advice = libc::MADV_DONTNEED as u64;
        }
        context.end.mark = mark;
        context.end.mask = mask;
    }
    Action::End
}

/// Gives the thread the segment bases that the guest had, where WRFSBASE changed them.
fn carry_bases(bases: Option<(u64, u64)>) {
    if let (Some(guest), Ok(host)) = (bases, sys::segment_bases()) {
        if guest != host {
            // SAFETY: The bases that the program gave itself.
            unsafe { sys::set_segment_bases(guest.0, guest.1) };
        }
    }
}

/// The whole state of the guest.
pub(super) fn sync(context: &HostContext) -> Result<State, i32> {
    // SAFETY: The vCPU is this thread's; the run page is alive.
    unsafe {
        sys::request(context.fd as i32, DUNE_SYNC, context.vcpu).map_err(|errno| errno.0)?;
        Ok(State::read(context.run))
    }
}

const ARCH_SET_GS: u64 = 0x1001;
const ARCH_SET_FS: u64 = 0x1002;
const ARCH_GET_FS: u64 = 0x1003;
const ARCH_GET_GS: u64 = 0x1004;

fn arch_prctl(context: &mut HostContext, gprs: &Gprs) -> Result<Action, i32> {
    let code = gprs.rdi & 0xffff_ffff;
    match code {
        ARCH_SET_FS | ARCH_SET_GS => {
            // SAFETY: The program asks for it; host loop and slow path use no TLS.
            let result = unsafe { sys::raw(libc::SYS_arch_prctl, [code, gprs.rsi, 0, 0, 0, 0]) };
            if result == 0 {
                let mut sregs = sync(context)?.sregs;
                let segment = if code == ARCH_SET_FS {
                    &mut sregs.fs
                } else {
                    &mut sregs.gs
                };
                segment.base = gprs.rsi;
                // SAFETY: The run page is alive; RUN is not under way.
                unsafe {
                    let run = context.run;
                    (&raw mut (*run).sregs).write_volatile(sregs);
                    let dirty = (&raw const (*run).dirty).read_volatile();
                    (&raw mut (*run).dirty).write_volatile(dirty | DIRTY_SREGS);
                }
            }
            set_result(context.run, result);
            Ok(Action::Run)
        }
        ARCH_GET_FS | ARCH_GET_GS => {
            let sregs = sync(context)?.sregs;
            let base = if code == ARCH_GET_FS {
                sregs.fs.base
            } else {
                sregs.gs.base
            };
            touch::write(gprs.rsi, &base).map_err(|_| libc::EFAULT)?;
            set_result(context.run, 0);
            Ok(Action::Run)
        }
        _ => Ok(Action::Forward),
    }
}

/// rt_sigaction: the program's handlers run in Dune mode, so Linux gets ours.
fn sigaction(context: &mut HostContext, gprs: &Gprs) -> Result<Action, i32> {
    const MASK_BYTES: u64 = 8;
    let signal = gprs.rdi as i32;
    if !signal::is_ours(signal) || gprs.r10 != MASK_BYTES {
        return Ok(Action::Forward);
    }
    let new = match gprs.rsi {
        0 => None,
        address => Some(touch::read::<SigAction>(address).map_err(|_| libc::EFAULT)?),
    };
    let mask = sys::sigprocmask(libc::SIG_BLOCK, u64::MAX);
    if context.pending.signal != 0 {
        return Ok(upcall::take_before_call(context));
    }
    let old = signal::set_action(context.actions(), signal, new);
    sys::sigprocmask(libc::SIG_SETMASK, mask);
    let old = old.map_err(|errno| errno.0)?;
    if gprs.rdx != 0 {
        touch::write(gprs.rdx, &old).map_err(|_| libc::EFAULT)?;
    }
    set_result(context.run, 0);
    Ok(Action::Run)
}

/// tgkill: abort() and raise() of a signal that ends the process with a core dump. The thread leaves Dune mode first and
/// makes the call there, so that the core names the function that made it.
fn tgkill(context: &mut HostContext, gprs: &Gprs) -> Option<Action> {
    const WITH_CORE: [i32; 8] = [
        libc::SIGABRT,
        libc::SIGQUIT,
        libc::SIGILL,
        libc::SIGTRAP,
        libc::SIGFPE,
        libc::SIGSYS,
        libc::SIGSEGV,
        libc::SIGBUS,
    ];
    let signal = gprs.rdx as i32;
    if gprs.rsi as u32 != context.tid || !WITH_CORE.contains(&signal) {
        return None;
    }
    let action = sys::with_signals_blocked(|| context.actions().get(signal));
    if action.handler != SigAction::DEFAULT_HANDLER {
        return None;
    }
    let state = sync(context).ok()?;
    let rip = upcall::call_start(&state)?;
    let registers = Registers::new(&state.gprs, rip, state.gprs.rsp, state.rflags);
    Some(leave_with(context, |_| registers))
}

/// seccomp: the filter sees the host loop's calls too. It may forbid ioctl, so RUN goes by read before it stands.
///
/// A filter for all threads (TSYNC) must allow the others' ioctl: they are not asked.
fn seccomp(context: &mut HostContext, gprs: &Gprs) -> Action {
    const ACTIONS: [u64; 2] = [
        libc::SECCOMP_SET_MODE_STRICT as u64,
        libc::SECCOMP_SET_MODE_FILTER as u64,
    ];
    if ACTIONS.contains(&(gprs.rdi & 0xffff_ffff)) {
        sys::request_by_read();
        context.choose_run_call();
        context.is_strict |= gprs.rdi as u32 == libc::SECCOMP_SET_MODE_STRICT;
    }
    Action::Forward
}

/// prctl: seccomp's older door, and syscall user dispatch.
fn prctl(context: &mut HostContext, gprs: &Gprs) -> Action {
    match gprs.rdi as i32 {
        libc::PR_SET_SECCOMP => {
            sys::request_by_read();
            context.choose_run_call();
            context.is_strict |= gprs.rsi == u64::from(libc::SECCOMP_MODE_STRICT);
            Action::Forward
        }
        crate::dispatch::PR_SET_SYSCALL_USER_DISPATCH => dispatch::set(context, gprs),
        _ => Action::Forward,
    }
}

/// close_range around the device's fd.
fn close_range(context: &HostContext, gprs: &Gprs) -> Action {
    let (first, last, flags) = (gprs.rdi & 0xffff_ffff, gprs.rsi & 0xffff_ffff, gprs.rdx);
    let fd = context.fd;
    if !(first..=last).contains(&fd) {
        return Action::Forward;
    }
    // SAFETY: The program asks for it.
    let close = |first: u64, last: u64| unsafe { sys::raw(libc::SYS_close_range, [first, last, flags, 0, 0, 0]) };
    const KNOWN_FLAGS: u64 = (libc::CLOSE_RANGE_UNSHARE | libc::CLOSE_RANGE_CLOEXEC) as u64;
    if flags & !KNOWN_FLAGS != 0 {
        return fail(context.run, libc::EINVAL);
    }
    let mut result = if last > fd { close(fd + 1, last) } else { 0 };
    if result == 0 && first < fd {
        result = close(first, fd - 1);
    }
    set_result(context.run, result);
    Action::Run
}
