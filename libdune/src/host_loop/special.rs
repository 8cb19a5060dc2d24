// SPDX-License-Identifier: MIT OR Apache-2.0

//! The system calls that cannot be forwarded as they are.
//!
//! | Call | Why |
//! |---|---|
//! | clone, clone3, fork, vfork | the child goes on outside Dune mode, natively, at the guest's return address |
//! | arch_prctl (FS, GS) | the guest's segment bases follow |
//! | rt_sigaction (SIGSEGV, SIGBUS) | the host loop has them; the program's actions are kept and given back |
//! | rt_sigreturn | there is no signal frame to return from: handlers run natively, on the host stack |
//! | close, close_range, dup2, dup3 | the device's fd is hidden |
//! | exit | what libdune keeps for the thread goes with it |
//! | VMCALLs of libdune's own | leaving, reports |

use dune_abi::Gprs;
use dune_abi::RunPage;
use dune_abi::DIRTY_SREGS;
use dune_abi::DUNE_SYNC;

use super::context::HostContext;
use super::context::Registers;
use super::context::REGISTERS_BYTES;
use super::report;
use super::signal;
use super::slow::leave;
use super::slow::set_result;
use super::slow::Action;
use super::touch;
use crate::abi::CALL_FATAL;
use crate::abi::CALL_LEAVE;
use crate::abi::CALL_NATIVE;
use crate::abi::PRIVATE_CALLS;
use crate::sys;
use crate::sys::SigAction;
use crate::trap::TrapFrame;

const CALLS: [i64; 12] = [
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_arch_prctl,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigreturn,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_exit,
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
    if number >= u64::from(PRIVATE_CALLS) || number & X32 != 0 {
        return private(context, number, &gprs);
    }
    match number as i64 {
        libc::SYS_clone | libc::SYS_clone3 | libc::SYS_fork | libc::SYS_vfork => {
            clone(context, number as i64, &gprs).unwrap_or_else(|errno| fail(context.run, errno))
        }
        libc::SYS_arch_prctl => arch_prctl(context, &gprs).unwrap_or_else(|errno| fail(context.run, errno)),
        libc::SYS_rt_sigaction => sigaction(context, &gprs).unwrap_or_else(|errno| fail(context.run, errno)),
        libc::SYS_rt_sigreturn => fail(context.run, libc::ENOSYS),
        libc::SYS_close if gprs.rdi as u32 == context.fd as u32 => fail(context.run, libc::EBADF),
        libc::SYS_close_range => close_range(context, &gprs),
        libc::SYS_dup2 | libc::SYS_dup3 => {
            if gprs.rdi as u32 == context.fd as u32 {
                fail(context.run, libc::EBADF)
            } else if gprs.rsi as u32 == context.fd as u32 {
                fail(context.run, libc::EBUSY)
            } else {
                Action::Forward
            }
        }
        libc::SYS_exit => exit(context, &gprs),
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
            let rflags = gprs.rdx;
            let bases = sync(context).ok().map(|run| (run.sregs.fs.base, run.sregs.gs.base));
            context.registers = Registers::new(gprs, gprs.rdi, gprs.rsi, rflags);
            context.registers.rax = 0;
            leave(context);
            carry_bases(bases);
            Action::Native
        }
        Ok(CALL_NATIVE) => match touch::read::<TrapFrame>(gprs.rdi) {
            Ok(frame) => {
                let bases = sync(context).ok().map(|run| (run.sregs.fs.base, run.sregs.gs.base));
                context.registers = Registers::of_frame(&frame);
                leave(context);
                carry_bases(bases);
                Action::Native
            }
            Err(_) => fail(context.run, libc::EFAULT),
        },
        Ok(CALL_FATAL) => {
            let frame = touch::read::<TrapFrame>(gprs.rdi).ok();
            // SAFETY: The block lives as long as the context.
            let reason = unsafe { (*context.block).fatal.load(core::sync::atomic::Ordering::Relaxed) };
            report::die_of_exception(context, reason, frame.as_ref())
        }
        _ => fail(context.run, libc::ENOSYS),
    }
}

/// exit of the thread: nothing of its Dune mode is left for the threads that live on.
fn exit(context: &mut HostContext, gprs: &Gprs) -> Action {
    let (run, fd) = (context.run as u64, context.fd as i32);
    sys::sigprocmask(libc::SIG_SETMASK, u64::MAX);
    leave(context);
    // SAFETY: The vCPU is gone and the program never sees its run page again.
    let _ = unsafe { sys::munmap(run, dune_abi::RUN_PAGE_BYTES) };
    sys::close(fd);
    context.owner.release();
    context.call[0] = gprs.rdi;
    Action::Exit
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
fn sync(context: &HostContext) -> Result<RunPage, i32> {
    // SAFETY: The vCPU is this thread's; the run page is alive.
    unsafe {
        sys::ioctl(context.fd as i32, DUNE_SYNC, context.vcpu).map_err(|errno| errno.0)?;
        Ok(context.run.read_volatile())
    }
}

/// Offsets into `struct clone_args`, in words.
const CLONE_ARGS_STACK: usize = 5;
const CLONE_ARGS_STACK_SIZE: usize = 6;
/// Size of the first version of `struct clone_args`.
const CLONE_ARGS_SIZE_VER0: u64 = 64;

/// fork, vfork, clone, clone3. The child pops its registers from where its RSP points and never sees Dune mode.
fn clone(context: &mut HostContext, number: i64, gprs: &Gprs) -> Result<Action, i32> {
    let run = sync(context)?;
    // The module has moved the guest behind its call: RIP and RFLAGS are where it goes on.
    let mut registers = Registers::new(gprs, run.rip, run.gprs.rsp, run.rflags);
    registers.rax = 0;
    context.call = [number as u64, gprs.rdi, gprs.rsi, gprs.rdx, gprs.r10, gprs.r8, gprs.r9];
    let top = match number {
        libc::SYS_clone => gprs.rsi,
        libc::SYS_clone3 => {
            let bytes = gprs.rsi;
            if bytes > size_of_val(&context.clone_args) as u64 {
                return Err(libc::E2BIG);
            }
            if bytes < CLONE_ARGS_SIZE_VER0 || bytes % 8 != 0 {
                return Err(libc::EINVAL);
            }
            context.clone_args = [0; 32];
            for index in 0..bytes / 8 {
                let word = gprs.rdi.checked_add(index * 8).ok_or(libc::EFAULT)?;
                context.clone_args[index as usize] = touch::read(word).map_err(|_| libc::EFAULT)?;
            }
            context.call[1] = context.clone_args.as_ptr() as u64;
            let stack = context.clone_args[CLONE_ARGS_STACK];
            stack.wrapping_add(context.clone_args[CLONE_ARGS_STACK_SIZE])
        }
        _ => 0,
    };
    if top != 0 {
        registers.rsp = top;
        let lower = top.checked_sub(REGISTERS_BYTES).ok_or(libc::EINVAL)?;
        touch::write(lower, &registers).map_err(|_| libc::EFAULT)?;
        if number == libc::SYS_clone {
            context.call[2] = lower;
        } else {
            let size = &mut context.clone_args[CLONE_ARGS_STACK_SIZE];
            *size = size
                .checked_sub(REGISTERS_BYTES)
                .filter(|size| *size != 0)
                .ok_or(libc::EINVAL)?;
        }
    }
    context.registers = registers;
    Ok(Action::Twice)
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

/// rt_sigaction: what the program does to SIGSEGV and SIGBUS is kept for the time after Dune mode.
fn sigaction(context: &mut HostContext, gprs: &Gprs) -> Result<Action, i32> {
    let Some(index) = signal::SIGNALS
        .iter()
        .position(|signal| *signal as u64 == gprs.rdi & 0xffff_ffff)
    else {
        return Ok(Action::Forward);
    };
    if gprs.r10 != 8 {
        return Err(libc::EINVAL);
    }
    let old = context.actions[index];
    let new = match gprs.rsi {
        0 => None,
        address => Some(touch::read::<SigAction>(address).map_err(|_| libc::EFAULT)?),
    };
    if gprs.rdx != 0 {
        touch::write(gprs.rdx, &old).map_err(|_| libc::EFAULT)?;
    }
    if let Some(new) = new {
        context.actions[index] = new;
    }
    set_result(context.run, 0);
    Ok(Action::Run)
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
