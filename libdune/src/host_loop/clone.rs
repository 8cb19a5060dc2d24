// SPDX-License-Identifier: MIT OR Apache-2.0

//! fork, vfork, clone, clone3: what a Dune thread makes is in Dune mode too.
//!
//! # Life of a child
//!
//! 1. The maker's state is read from the vCPU into a snapshot: what the child goes on with, but RAX = 0, its stack
//!    pointer and its TLS.
//! 2. A child that shares the memory (a thread, a child of vfork) gets an area of its own: block, exception stacks,
//!    host stack. The call names that host stack; the program's stack is in the snapshot. A child of fork has the
//!    maker's area, copied.
//! 3. All signals are blocked, and the loop makes the call (`Action::Clone`).
//! 4. The child finds its context from RSP, makes its vCPU and runs the snapshot. A child of fork first makes its own
//!    space from the inherited fd, with its slots where the copied page tables have them.
//! 5. Both go back to the program's signal mask. Behind a vfork the maker gives the child's area back: the child has
//!    executed another program or ended, and uses its memory no more.
//!
//! Where the program wants it so (`Builder`), or no area is left, the child goes on outside Dune mode, at the guest's
//! return address, popping its registers from where its RSP points.

use core::sync::atomic::Ordering::AcqRel;
use core::sync::atomic::Ordering::Relaxed;

use dune_abi::Gprs;
use dune_abi::DIRTY_RIP;
use dune_abi::DIRTY_SREGS;
use dune_abi::DUNE_NEW_SPACE;

use super::context::HostContext;
use super::context::Registers;
use super::context::Role;
use super::context::State;
use super::context::REGISTERS_BYTES;
use super::signal;
use super::slow::set_result;
use super::slow::Action;
use super::special::sync;
use super::touch;
use super::upcall;
use crate::device;
use crate::dispatch::Settings;
use crate::hook;
use crate::layout;
use crate::paging;
use crate::percpu::Block;
use crate::process;
use crate::sys;
use crate::sys::Errno;

/// Offsets into `struct clone_args`, in words.
const CLONE_ARGS_FLAGS: usize = 0;
const CLONE_ARGS_STACK: usize = 5;
const CLONE_ARGS_STACK_SIZE: usize = 6;
const CLONE_ARGS_TLS: usize = 7;
/// Size of the first version of `struct clone_args`.
const CLONE_ARGS_SIZE_VER0: u64 = 64;

const CLONE_VM: u64 = libc::CLONE_VM as u64;
const CLONE_VFORK: u64 = libc::CLONE_VFORK as u64;
const CLONE_THREAD: u64 = libc::CLONE_THREAD as u64;
const CLONE_SETTLS: u64 = libc::CLONE_SETTLS as u64;
const CLONE_SIGHAND: u64 = libc::CLONE_SIGHAND as u64;

/// The call as the program makes it.
struct Request {
    number: i64,
    flags: u64,
    /// RSP of the child; 0: the maker's.
    stack: u64,
    tls: u64,
}

impl Request {
    /// Reads number and arguments, and puts them where the loop makes the call from.
    fn read(context: &mut HostContext, number: i64, gprs: &Gprs) -> Result<Self, i32> {
        context.call = [number as u64, gprs.rdi, gprs.rsi, gprs.rdx, gprs.r10, gprs.r8, gprs.r9];
        let request = match number {
            libc::SYS_clone => Self {
                number,
                flags: gprs.rdi & 0xffff_ffff,
                stack: gprs.rsi,
                tls: gprs.r8,
            },
            libc::SYS_clone3 => {
                let args = read_clone_args(context, gprs)?;
                let (stack, size) = (args[CLONE_ARGS_STACK], args[CLONE_ARGS_STACK_SIZE]);
                if (stack == 0) != (size == 0) {
                    return Err(libc::EINVAL);
                }
                Self {
                    number,
                    flags: args[CLONE_ARGS_FLAGS],
                    stack: stack.wrapping_add(size),
                    tls: args[CLONE_ARGS_TLS],
                }
            }
            _ => Self {
                number,
                flags: if number == libc::SYS_vfork {
                    CLONE_VM | CLONE_VFORK
                } else {
                    0
                },
                stack: 0,
                tls: 0,
            },
        };
        Ok(request)
    }

    fn shares_memory(&self) -> bool {
        self.flags & CLONE_VM != 0
    }
}

/// Copies the program's `struct clone_args` to where the call will take it from.
fn read_clone_args<'a>(context: &'a mut HostContext, gprs: &Gprs) -> Result<&'a [u64; 32], i32> {
    let bytes = gprs.rsi;
    if bytes > size_of_val(&context.clone_args) as u64 {
        return Err(libc::E2BIG);
    }
    if bytes < CLONE_ARGS_SIZE_VER0 || bytes % 8 != 0 {
        return Err(libc::EINVAL);
    }
    context.clone_args = [0; 32];
    let words = &mut context.clone_args[..(bytes / 8) as usize];
    touch::read_words(gprs.rdi, words).map_err(|_| libc::EFAULT)?;
    context.call[1] = context.clone_args.as_ptr() as u64;
    Ok(&context.clone_args)
}

/// Has the loop make the call that is in the run page.
pub(super) fn handle(context: &mut HostContext, number: i64, gprs: &Gprs) -> Result<Action, i32> {
    let mask = sys::sigprocmask(libc::SIG_BLOCK, u64::MAX);
    if context.pending.signal != 0 {
        if context.is_asked() {
            // By a hook, which the signal waits for.
            sys::sigprocmask(libc::SIG_SETMASK, mask);
            return Err(libc::EAGAIN);
        }
        return Ok(upcall::take_before_call(context));
    }
    let prepared = prepare(context, number, gprs, mask);
    if !matches!(prepared, Ok(Action::Clone)) {
        sys::sigprocmask(libc::SIG_SETMASK, mask);
    }
    prepared
}

/// The same, with all signals blocked; `mask` is the program's.
fn prepare(context: &mut HostContext, number: i64, gprs: &Gprs, mask: u64) -> Result<Action, i32> {
    let request = Request::read(context, number, gprs)?;
    let mut state = sync(context)?;
    // The module has moved the guest behind its call: RIP and RFLAGS are where the child goes on.
    state.gprs.rax = 0;
    let process = context.process();
    let inherits = if request.flags & CLONE_THREAD != 0 {
        process.inherit_threads.load(Relaxed)
    } else {
        process.inherit_children.load(Relaxed)
    };
    context.child = core::ptr::null_mut();
    context.clone_flags = request.flags;
    if inherits && request.shares_memory() {
        // Without an area the child is what it can be: outside Dune mode.
        if let Ok(area) = process.take_area() {
            process.threads.fetch_add(1, AcqRel);
            share(context, &request, state, area);
            context.mask = Some(mask);
            // SAFETY: The child's context, which nobody uses before the call.
            unsafe { (*context.child).mask = Some(mask) };
            return Ok(Action::Clone);
        }
    } else if inherits {
        copy(context, &request, state);
        context.mask = Some(mask);
        return Ok(Action::Clone);
    }
    outside(context, &request, &state)
}

/// What the program's arguments say about the child's registers.
fn adapt(state: &mut State, request: &Request) {
    if request.stack != 0 {
        state.gprs.rsp = request.stack;
    }
    if request.flags & CLONE_SETTLS != 0 {
        state.sregs.fs.base = request.tls;
    }
}

/// A child with an area of its own.
fn share(context: &mut HostContext, request: &Request, mut state: State, area: u64) {
    adapt(&mut state, request);
    // SAFETY: A fresh area; what is built in it nobody uses before the call.
    let child = unsafe {
        let maker = &*context.block;
        let table = maker.here.number().unwrap_or(paging::tables::DEFAULT);
        let block = Block::write(area, context.process, table, Some(maker));
        if state.sregs.gdtr_base == (*context.block).gdt_address() {
            state.sregs.gdtr_base = (*block).gdt_address();
        }
        if state.sregs.idtr_base == (*context.block).idt_address() {
            state.sregs.idtr_base = (*block).idt_address();
        }
        if state.sregs.tr.base == (*context.block).tss_address() {
            state.sregs.tr.base = (*block).tss_address();
        }
        if state.sregs.lstar == (*context.block).syscall_entry() {
            state.sregs.lstar = (*block).syscall_entry();
            state.sregs.syscall_vmcall = hook::syscall_vmcall();
        }
        let child = HostContext::write(area, context.process);
        (*child).role = match request.flags {
            flags if flags & CLONE_THREAD != 0 => Role::Thread,
            flags if flags & CLONE_VFORK != 0 => Role::Vfork,
            _ => Role::SharesMemory,
        };
        // A child has its maker's filter.
        (*child).is_strict = context.is_strict;
        (*child).actions = context.actions;
        // Linux keeps it for a child of vfork only.
        if (*child).role == Role::Vfork {
            (*child).alt_stack = context.alt_stack;
        }
        if request.flags & CLONE_SIGHAND == 0 {
            (*child).own_actions.copy_from(context.actions());
            (*child).actions = &raw const (*child).own_actions;
        }
        (*child).snapshot().write(state);
        child
    };
    context.child = child;
    let stack = area + layout::HOST_STACK as u64;
    let top = area + layout::HOST_STACK_TOP as u64;
    match request.number {
        libc::SYS_clone3 => {
            context.clone_args[CLONE_ARGS_STACK] = stack;
            context.clone_args[CLONE_ARGS_STACK_SIZE] = top - stack;
        }
        libc::SYS_clone => context.call[2] = top,
        // vfork has no argument for the stack.
        _ => {
            let flags = request.flags | libc::SIGCHLD as u64;
            context.call = [libc::SYS_clone as u64, flags, top, 0, 0, 0, 0];
        }
    }
}

/// A child with a copy of everything.
fn copy(context: &mut HostContext, request: &Request, mut state: State) {
    adapt(&mut state, request);
    // SAFETY: Our own page, which nobody else uses.
    unsafe { context.snapshot().write(state) };
    match request.number {
        libc::SYS_clone3 => {
            context.clone_args[CLONE_ARGS_STACK] = 0;
            context.clone_args[CLONE_ARGS_STACK_SIZE] = 0;
        }
        libc::SYS_clone => context.call[2] = 0,
        _ => {}
    }
}

/// A child outside Dune mode.
fn outside(context: &mut HostContext, request: &Request, state: &State) -> Result<Action, i32> {
    let mut registers = Registers::new(&state.gprs, state.rip, state.gprs.rsp, state.rflags);
    if request.stack != 0 {
        registers.rsp = request.stack;
        let lower = request.stack.checked_sub(REGISTERS_BYTES).ok_or(libc::EINVAL)?;
        touch::write(lower, &registers).map_err(|_| libc::EFAULT)?;
        if request.number == libc::SYS_clone {
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
    Ok(Action::CloneOutside)
}

/// In the maker, behind the call.
pub(super) fn made(context: &mut HostContext, result: i64) -> Action {
    let child = core::mem::replace(&mut context.child, core::ptr::null_mut());
    if !child.is_null() && (result < 0 || context.clone_flags & CLONE_VFORK != 0) {
        // SAFETY: There is no child, or it executed another program, or it ended: nobody uses its area.
        unsafe { discard(child) };
    }
    set_result(context.run, result);
    unblock_signals(context);
    Action::Run
}

/// Gives back what was made for a child that is no more.
unsafe fn discard(child: *mut HostContext) {
    // SAFETY: The caller's. The module reaps the vCPU, if there was one; its run page goes here.
    unsafe {
        let process = (*child).process();
        if !(*child).run.is_null() {
            let _ = sys::munmap((*child).run as u64, dune_abi::RUN_PAGE_BYTES);
        }
        paging::forget_thread(process, &(*(*child).block).here);
        process.give_area((*child).area());
        // Never the last: the maker is counted too.
        process.threads.fetch_sub(1, AcqRel);
    }
}

fn unblock_signals(context: &mut HostContext) {
    if let Some(mask) = context.mask.take() {
        sys::sigprocmask(libc::SIG_SETMASK, mask);
    }
}

/// In the child: makes its vCPU. Where that fails it goes on outside Dune mode.
pub(super) fn begin(context: &mut HostContext) -> Action {
    context.tid = sys::gettid();
    // Linux switches it off in every child.
    context.set_dispatch(Settings::OFF);
    let is_fork = context.clone_flags & CLONE_VM == 0 && !context.run.is_null();
    let begun = if is_fork { begin_fork(context) } else { Ok(()) }.and_then(|()| make_vcpu(context));
    let action = match begun {
        Ok(()) => Action::Run,
        Err(_) => {
            if is_fork {
                signal::restore_from(context.actions());
            }
            context.left = true;
            // SAFETY: Our own page.
            let state = unsafe { context.snapshot().read() };
            context.registers = Registers::new(&state.gprs, state.rip, state.gprs.rsp, state.rflags);
            Action::Native
        }
    };
    unblock_signals(context);
    action
}

/// A process of its own, with a copy of its maker's memory and its fds.
fn begin_fork(context: &mut HostContext) -> Result<(), Errno> {
    context.role = Role::Thread;
    context.child = core::ptr::null_mut();
    let process = context.process();
    if context.actions != &raw const signal::ACTIONS {
        signal::ACTIONS.copy_from(&context.own_actions);
        context.actions = &raw const signal::ACTIONS;
    }
    process::adopt(process, context.area())?;
    // SAFETY: The request has no argument; the fd is the maker's, which allows just this here.
    let fd = unsafe { sys::request(process.fd, DUNE_NEW_SPACE, 0) }? as i32;
    let replaced = sys::replace_fd(fd, process.fd);
    sys::close(fd);
    replaced?;
    process.memory.claim_slots()
}

/// Makes the vCPU of the snapshot.
fn make_vcpu(context: &mut HostContext) -> Result<(), Errno> {
    let vcpu = device::create_vcpu(context.process().fd)?;
    // SAFETY: The snapshot is ours. The run page is fresh, and nothing runs yet. The block is this thread's.
    unsafe {
        let snapshot = context.snapshot();
        let run = vcpu.run;
        (&raw mut (*run).gprs).write_volatile((*snapshot).gprs);
        (&raw mut (*run).rip).write_volatile((*snapshot).rip);
        (&raw mut (*run).rflags).write_volatile((*snapshot).rflags);
        (&raw mut (*run).cr2).write_volatile((*snapshot).cr2);
        (&raw mut (*run).sregs).write_volatile((*snapshot).sregs);
        (&raw mut (*run).dirty).write_volatile(DIRTY_RIP | DIRTY_SREGS);
        context.run = run;
        context.set_vcpu(vcpu.number);
        Block::set_vcpu(context.block.cast_mut(), &vcpu);
    }
    Ok(())
}
