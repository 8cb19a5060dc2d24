// SPDX-License-Identifier: MIT OR Apache-2.0

//! The program's signal handlers, in Dune mode.
//!
//! # Life of a signal
//!
//! 1. Linux runs `signal::dune_host_signal` on the host stack. It keeps signal, siginfo and mask, leaves all signals
//!    blocked and has RUN come back at once.
//! 2. The slow path reads the vCPU's state and puts Linux' own signal frame on the program's stack, or its alternate
//!    one: a real ucontext, with FPU state. The vCPU goes on at the handler; the mask becomes the handler's. Now the
//!    next signal may come, and its frame goes on top.
//! 3. rt_sigreturn takes registers, FPU state, alternate stack and mask back from the frame. A handler that jumps out
//!    (siglongjmp) needs no rt_sigreturn.
//!
//! A call that was not made yet, or that Linux wants to be made again, is undone: the vCPU goes back to its SYSCALL. The
//! result of one that was made, EINTR too, goes to the program first.
//!
//! A vCPU on its way from an interrupt stack to a handler stack cannot take a frame there: the trap entry is asked to
//! come here with its frame instead (`Block::signal`).
//!
//! An exception that no handler of the guest took is a signal too, where the program has a handler for it.
//!
//! # Safety
//!
//! Called by the slow path, with all signals blocked where one is pending. The program's memory is written where a
//! native access was possible a moment ago.

use core::mem::offset_of;
use core::sync::atomic::Ordering::Relaxed;

use dune_abi::Gprs;
use dune_abi::Sregs;
use dune_abi::DIRTY_RIP;
use dune_abi::DIRTY_SREGS;
use x86_64::structures::idt::PageFaultErrorCode;

use super::compat;
use super::context::HostContext;
use super::context::State;
use super::report;
use super::signal;
use super::slow::set_result;
use super::slow::Action;
use super::special::sync;
use super::touch;
use super::touch::BadAddress;
use super::touch::Refusal;
use crate::abi::IOPL_CPL0;
use crate::abi::PAGE_FAULT_HOST_REFUSED;
use crate::cpl3;
use crate::cpl3::Place;
use crate::hook;
use crate::hook::Settled;
use crate::layout;
use crate::percpu;
use crate::percpu::SIGNAL_WAITS;
use crate::sys;
use crate::sys::AltStack;
use crate::sys::SigAction;
use crate::sys::SigInfo;
use crate::trap;
use crate::trap::Fatal;
use crate::trap::TrapFrame;
use crate::trap::Vector;

/// A signal that waits for the program's handler.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Pending {
    /// 0 if there is none.
    pub signal: i32,
    pub info: SigInfo,
    /// The mask that was interrupted.
    pub mask: u64,
}

/// Linux' `struct ucontext` (arch/x86/include/asm/ucontext.h).
#[repr(C)]
#[derive(Clone, Copy)]
struct UContext {
    flags: u64,
    link: u64,
    stack: AltStack,
    registers: MContext,
    mask: u64,
}

/// Linux' `struct sigcontext`.
#[repr(C)]
#[derive(Clone, Copy)]
struct MContext {
    r8: u64,
    r9: u64,
    r10: u64,
    r11: u64,
    r12: u64,
    r13: u64,
    r14: u64,
    r15: u64,
    rdi: u64,
    rsi: u64,
    rbp: u64,
    rbx: u64,
    rdx: u64,
    rax: u64,
    rcx: u64,
    rsp: u64,
    rip: u64,
    rflags: u64,
    cs: u16,
    gs: u16,
    fs: u16,
    ss: u16,
    error_code: u64,
    vector: u64,
    old_mask: u64,
    cr2: u64,
    fpu: u64,
    reserved: [u64; 8],
}

/// Linux' `struct rt_sigframe`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Frame {
    restorer: u64,
    ucontext: UContext,
    info: SigInfo,
}

const _: () = assert!(offset_of!(Frame, info) == 8 + 304 && size_of::<Frame>() == 8 + 304 + 128);

/// Bits of `UContext::flags`: FPU state with XSAVE, SS is valid and to be restored.
const UC_FP_XSTATE: u64 = 1;
const UC_SIGCONTEXT_SS: u64 = 2;
const UC_STRICT_RESTORE_SS: u64 = 4;

/// Offsets in the FPU state (SDM, "XSAVE Area"; Linux' `struct _fpx_sw_bytes`).
const MXCSR: usize = 24;
const MXCSR_MASK: usize = 28;
const SOFTWARE: usize = 464;
const HEADER: usize = 512;
const HEADER_BYTES: usize = 64;
const FXSAVE_BYTES: usize = 512;
const MAGIC1: u32 = 0x4650_5853;
const MAGIC2: u32 = 0x4650_5845;
const MXCSR_INIT: u32 = 0x1f80;

const RED_ZONE: u64 = 128;

const TF: u64 = 1 << 8;
const IF: u64 = 1 << 9;
const DF: u64 = 1 << 10;
const RF: u64 = 1 << 16;
const AC: u64 = 1 << 18;
/// Flags that a handler may change in what it returns to: CF, PF, AF, ZF, SF, TF, DF, OF, RF, AC.
const CHANGEABLE: u64 = 0x08d5 | TF | DF | RF | AC;

/// Where the program was.
struct Point {
    gprs: Gprs,
    rip: u64,
    rflags: u64,
    is_cpl3: bool,
    error_code: u64,
    vector: u64,
    cr2: u64,
}

impl Point {
    fn of_vcpu(state: &State) -> Self {
        Self {
            gprs: state.gprs,
            rip: state.rip,
            rflags: state.rflags,
            is_cpl3: state.sregs.cs.selector & 3 == 3,
            error_code: 0,
            vector: 0,
            cr2: 0,
        }
    }

    fn of_frame(frame: &TrapFrame) -> Self {
        Self {
            gprs: frame.gprs(),
            rip: frame.rip,
            rflags: frame.rflags,
            is_cpl3: frame.is_cpl3(),
            error_code: frame.error_code & !PAGE_FAULT_HOST_REFUSED,
            vector: frame.vector().0.into(),
            cr2: frame.cr2,
        }
    }
}

/// RUN came back because of a signal.
pub(super) fn take(context: &mut HostContext) -> Action {
    match sync(context) {
        Ok(state) => take_at(context, &state),
        Err(errno) => report::die_of_run(context, errno.into()),
    }
}

/// Delivers what is pending to a vCPU in this state, or asks the trap entry for it, or who waits for CPL3.
fn take_at(context: &mut HostContext, state: &State) -> Action {
    // SAFETY: The block lives as long as the context; nothing else writes the word while the vCPU does not run.
    let block = unsafe { &*context.block };
    let asked = &block.signal;
    let mut state = *state;
    if hook::settle(&mut state, block) == Settled::Inside {
        asked.store(SIGNAL_WAITS, Relaxed);
        clear_interrupt_request(context);
        // RIP may have been moved back to a call, or to where the hook's assembly looks for signals.
        write_place(context, &state.gprs, state.rip, state.rflags);
        return Action::Run;
    }
    let state = &state;
    let place = cpl3::place(state, block);
    if place == Place::Unwaited {
        // No handler starts like that.
        report::die_of_exception(context, Fatal::Unwaited as u32, None);
    }
    if place != Place::Program || trap::is_entry(state.rip) && state.sregs.cs.selector & 3 == 0 {
        asked.store(SIGNAL_WAITS, Relaxed);
        clear_interrupt_request(context);
        come_out(context, state, place);
        return Action::Run;
    }
    asked.store(0, Relaxed);
    let pending = core::mem::replace(&mut context.pending.signal, 0);
    let (info, mask) = (context.pending.info, context.pending.mask);
    deliver(context, pending, &info, mask, &Point::of_vcpu(state), state.sregs)
}

/// Has a vCPU that is at CPL3 go on in who waits for it.
fn come_out(context: &HostContext, state: &State, place: Place) {
    if place == Place::User {
        let mut state = *state;
        // SAFETY: The block of the context's vCPU, which does not run.
        unsafe { cpl3::interrupt(&mut state, &*context.block) };
        write_place(context, &state.gprs, state.rip, state.rflags);
        write_sregs(context, &state.sregs);
    }
}

/// RUN came back because the time is over that CPL3 may use.
pub(super) fn end_visit(context: &mut HostContext) -> Action {
    match sync(context) {
        Ok(state) => {
            // SAFETY: The block lives as long as the context.
            let place = cpl3::place(&state, unsafe { &*context.block });
            come_out(context, &state, place);
            Action::Run
        }
        Err(errno) => report::die_of_run(context, errno.into()),
    }
}

/// The trap entry comes with its frame, as asked.
pub(super) fn take_at_frame(context: &mut HostContext, frame: &TrapFrame) -> Action {
    let pending = core::mem::replace(&mut context.pending.signal, 0);
    if pending == 0 {
        return go_on(context, frame);
    }
    if frame.is_cpl3() {
        report::die_of_exception(context, Fatal::Unwaited as u32, Some(frame));
    }
    let (info, mask) = (context.pending.info, context.pending.mask);
    match sync(context) {
        Ok(state) => deliver(context, pending, &info, mask, &Point::of_frame(frame), state.sregs),
        Err(errno) => report::die_of_run(context, errno.into()),
    }
}

/// The instruction that made the call which the vCPU is behind; none where the code is not where Linux has it.
pub(super) fn call_start(state: &State) -> Option<u64> {
    const SYSCALL: [u8; 2] = [0x0f, 0x05];
    const VMCALL: [u8; 3] = [0x0f, 0x01, 0xc1];
    let start = |bytes: u64| state.rip.wrapping_sub(bytes);
    if state.gprs.rcx == state.rip && touch::read(start(2)).is_ok_and(|code: [u8; 2]| code == SYSCALL) {
        Some(start(2))
    } else if touch::read(start(3)).is_ok_and(|code: [u8; 3]| code == VMCALL) {
        Some(start(3))
    } else {
        None
    }
}

/// As `take`, before a system call: the vCPU goes back to it.
pub(super) fn take_before_call(context: &mut HostContext) -> Action {
    let mut state = match sync(context) {
        Ok(state) => state,
        Err(errno) => report::die_of_run(context, errno.into()),
    };
    match call_start(&state) {
        Some(rip) => state.rip = rip,
        // The code is not where Linux has it: the call is not made, as if it had been interrupted at once.
        None => state.gprs.rax = -i64::from(libc::EINTR) as u64,
    }
    take_at(context, &state)
}

fn clear_interrupt_request(context: &HostContext) {
    // SAFETY: The run page is alive.
    unsafe { (&raw mut (*context.run).interrupt_request).write_volatile(0) };
}

/// Has the next RUN take these.
fn write_place(context: &HostContext, gprs: &Gprs, rip: u64, rflags: u64) {
    // SAFETY: The run page is alive; RUN is not under way.
    unsafe {
        let run = context.run;
        (&raw mut (*run).gprs).write_volatile(*gprs);
        (&raw mut (*run).rip).write_volatile(rip);
        (&raw mut (*run).rflags).write_volatile(rflags);
        let dirty = (&raw const (*run).dirty).read_volatile();
        (&raw mut (*run).dirty).write_volatile(dirty | DIRTY_RIP);
    }
}

fn write_sregs(context: &HostContext, sregs: &Sregs) {
    // SAFETY: As in `write_place`.
    unsafe {
        let run = context.run;
        (&raw mut (*run).sregs).write_volatile(*sregs);
        let dirty = (&raw const (*run).dirty).read_volatile();
        (&raw mut (*run).dirty).write_volatile(dirty | DIRTY_SREGS);
    }
}

/// The program goes on where an exception interrupted it.
pub(super) fn go_on(context: &mut HostContext, frame: &TrapFrame) -> Action {
    write_place(context, &frame.gprs(), frame.rip, frame.rflags);
    if frame.is_cpl3() {
        if let Ok(state) = sync(context) {
            write_sregs(context, &percpu::at_cpl3(state.sregs));
            write_place(context, &frame.gprs(), frame.rip, frame.rflags);
        }
    }
    Action::Run
}

/// Has the vCPU, which is in this state, go on in the program's handler of SIGSYS. With all signals blocked; `mask` is the
/// program's.
pub(super) fn dispatch(context: &mut HostContext, info: &SigInfo, mask: u64, state: &State) -> Action {
    deliver(context, libc::SIGSYS, info, mask, &Point::of_vcpu(state), state.sregs)
}

/// The same for an `int 0x80`.
pub(super) fn dispatch_frame(context: &mut HostContext, info: &SigInfo, mask: u64, frame: &TrapFrame) -> Action {
    let state = sync(context).unwrap_or_else(|errno| report::die_of_run(context, errno.into()));
    let mut at = Point::of_frame(frame);
    (at.error_code, at.vector, at.cr2) = (0, 0, 0);
    deliver(context, libc::SIGSYS, info, mask, &at, state.sregs)
}

/// Has the vCPU go on in the program's handler. `sregs` are the vCPU's.
fn deliver(context: &mut HostContext, signal: i32, info: &SigInfo, mask: u64, at: &Point, sregs: Sregs) -> Action {
    clear_interrupt_request(context);
    let action = context.actions().get(signal);
    if !action.is_handler() {
        // The program changed it meanwhile.
        if action.handler != SigAction::IGNORE {
            sys::queue_to_self(signal, info);
        }
        write_place(context, &at.gprs, at.rip, at.rflags);
        sys::sigprocmask(libc::SIG_SETMASK, mask);
        return Action::Run;
    }
    if action.flags & SigAction::RESETHAND != 0 {
        let _ = signal::set_action(context.actions(), signal, Some(SigAction::DEFAULT));
    }
    let Ok(frame) = push_frame(context, info, mask, at, &action) else {
        let what = "no room for a signal's frame on the program's stack";
        report::die_of_frame(context, what, signal, at.rip, at.gprs.rsp);
    };
    let gprs = Gprs {
        rax: 0,
        rdi: signal as u64,
        rsi: frame + offset_of!(Frame, info) as u64,
        rdx: frame + offset_of!(Frame, ucontext) as u64,
        rsp: frame,
        ..at.gprs
    };
    let rflags = at.rflags & !(TF | DF | RF | AC) | IF | IOPL_CPL0;
    write_place(context, &gprs, action.handler, rflags);
    if sregs.cs.selector & 3 != 0 {
        write_sregs(context, &percpu::at_cpl0(sregs));
    }
    sys::sigprocmask(libc::SIG_SETMASK, action.mask_during(signal, mask));
    Action::Run
}

/// Writes the frame; its address.
fn push_frame(
    context: &mut HostContext,
    info: &SigInfo,
    mask: u64,
    at: &Point,
    action: &SigAction,
) -> Result<u64, BadAddress> {
    let fpu_bytes = context.process().fpu.bytes;
    let mut sp = if at.is_cpl3 {
        // What runs at CPL3 is not trusted with the frame. The top of the stack is the trap entry's own.
        context.area() + (layout::HANDLERS + layout::HANDLER_BYTES) as u64 - fpu_bytes
    } else {
        at.gprs.rsp.wrapping_sub(RED_ZONE)
    };
    let alternate = context.alt_stack;
    let was_on_it = alternate.holds(at.gprs.rsp);
    if action.flags & SigAction::ONSTACK != 0 && alternate.is_enabled() && !was_on_it {
        sp = alternate.start.wrapping_add(alternate.bytes);
    }
    let extended = context.has_xsave != 0;
    let fpu = (sp.wrapping_sub(fpu_bytes + 8)) & !63;
    // Aligned as if the handler had been called.
    let frame = (fpu.wrapping_sub(size_of::<Frame>() as u64) & !15).wrapping_sub(8);
    if was_on_it && frame < alternate.start {
        return Err(BadAddress);
    }
    touch::writable(frame, (sp - frame) as usize)?;
    let user = (percpu::USER_CS, percpu::USER_DS);
    let (cs, ss) = if at.is_cpl3 {
        user
    } else {
        (percpu::KERNEL_CS, percpu::KERNEL_DS)
    };
    let g = &at.gprs;
    let content = Frame {
        restorer: action.restorer,
        ucontext: UContext {
            flags: UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS | if extended { UC_FP_XSTATE } else { 0 },
            link: 0,
            stack: alternate,
            registers: MContext {
                r8: g.r8,
                r9: g.r9,
                r10: g.r10,
                r11: g.r11,
                r12: g.r12,
                r13: g.r13,
                r14: g.r14,
                r15: g.r15,
                rdi: g.rdi,
                rsi: g.rsi,
                rbp: g.rbp,
                rbx: g.rbx,
                rdx: g.rdx,
                rax: g.rax,
                rcx: g.rcx,
                rsp: g.rsp,
                rip: at.rip,
                rflags: at.rflags & !IOPL_CPL0,
                cs,
                gs: 0,
                fs: 0,
                ss,
                error_code: at.error_code,
                vector: at.vector,
                old_mask: mask,
                cr2: at.cr2,
                fpu,
                reserved: [0; 8],
            },
            mask,
        },
        info: *info,
    };
    // SAFETY: Writable a moment ago; the FPU state in the context is the program's, saved by the loop.
    unsafe {
        (frame as *mut Frame).write_unaligned(content);
        let saved = context.fpu as *mut u8;
        core::ptr::copy_nonoverlapping(saved, fpu as *mut u8, fpu_bytes as usize);
        let software = (fpu as *mut u8).add(SOFTWARE).cast::<u32>();
        software.write_bytes(0, 12);
        if extended {
            software.write_unaligned(MAGIC1);
            software.add(1).write_unaligned(fpu_bytes as u32 + 4);
            software
                .add(2)
                .cast::<u64>()
                .write_unaligned(context.process().fpu.xcr0);
            software.add(4).write_unaligned(fpu_bytes as u32);
            (fpu as *mut u8)
                .add(fpu_bytes as usize)
                .cast::<u32>()
                .write_unaligned(MAGIC2);
        }
        init_fpu(saved, extended);
    }
    if alternate.flags & AltStack::AUTODISARM != 0 {
        context.alt_stack = AltStack::DISABLED;
    }
    Ok(frame)
}

/// What a handler starts with: the state that the CPU calls initial.
unsafe fn init_fpu(state: *mut u8, extended: bool) {
    // SAFETY: The save area of the context.
    unsafe {
        let mask = state.add(MXCSR_MASK).cast::<u32>().read();
        state.write_bytes(0, FXSAVE_BYTES);
        // Control word of the x87 unit; the tag word is 0 in this form where all registers are empty.
        state.cast::<u16>().write(0x037f);
        state.add(MXCSR).cast::<u32>().write(MXCSR_INIT);
        state.add(MXCSR_MASK).cast::<u32>().write(mask);
        if extended {
            state.add(HEADER).write_bytes(0, HEADER_BYTES);
        }
    }
}

/// rt_sigreturn: RSP points behind the restorer's address.
pub(super) fn sigreturn(context: &mut HostContext) -> Action {
    // From here to the frame's mask no signal may come: there is room for one.
    sys::sigprocmask(libc::SIG_BLOCK, u64::MAX);
    if context.pending.signal != 0 {
        return take_before_call(context);
    }
    let state = match sync(context) {
        Ok(state) => state,
        Err(errno) => report::die_of_run(context, errno.into()),
    };
    let bad = |context: &HostContext| {
        let what = "rt_sigreturn finds no frame of a signal";
        report::die_of_frame(context, what, 0, state.rip, state.gprs.rsp)
    };
    let Ok(ucontext) = touch::read::<UContext>(state.gprs.rsp) else {
        bad(context)
    };
    let from = &ucontext.registers;
    if take_fpu(context, from.fpu).is_err() {
        bad(context)
    }
    let to_cpl3 = from.cs & 3 == 3;
    let gprs = Gprs {
        rax: from.rax,
        rcx: from.rcx,
        rdx: from.rdx,
        rbx: from.rbx,
        rsp: from.rsp,
        rbp: from.rbp,
        rsi: from.rsi,
        rdi: from.rdi,
        r8: from.r8,
        r9: from.r9,
        r10: from.r10,
        r11: from.r11,
        r12: from.r12,
        r13: from.r13,
        r14: from.r14,
        r15: from.r15,
    };
    const ALWAYS_ONE: u64 = 2;
    let level = if to_cpl3 { 0 } else { IOPL_CPL0 };
    write_place(
        context,
        &gprs,
        from.rip,
        from.rflags & CHANGEABLE | ALWAYS_ONE | IF | level,
    );
    if to_cpl3 {
        write_sregs(context, &percpu::at_cpl3(state.sregs));
    }
    // As Linux: a stack that cannot be one is left out.
    let _ = check_stack(&ucontext.stack).map(|stack| context.alt_stack = stack);
    sys::sigprocmask(libc::SIG_SETMASK, ucontext.mask);
    Action::Run
}

/// Takes FPU state from a frame. What the CPU would refuse is cleared, so that loading it cannot fail.
fn take_fpu(context: &mut HostContext, from: u64) -> Result<(), BadAddress> {
    let extended = context.has_xsave != 0;
    let state = context.fpu as *mut u8;
    // SAFETY: The save area of the context; what is copied was readable a moment ago.
    unsafe {
        let mask = match state.add(MXCSR_MASK).cast::<u32>().read() {
            0 => 0xffbf,
            mask => mask,
        };
        if from == 0 {
            init_fpu(state, extended);
            return Ok(());
        }
        touch::readable(from, FXSAVE_BYTES)?;
        let software = (from as *const u8).add(SOFTWARE).cast::<u32>();
        let bytes = context.process().fpu.bytes;
        let is_extended = extended
            && software.read_unaligned() == MAGIC1
            && u64::from(software.add(4).read_unaligned()) == bytes
            && touch::readable(from, bytes as usize).is_ok();
        let copied = if is_extended { bytes as usize } else { FXSAVE_BYTES };
        core::ptr::copy_nonoverlapping(from as *const u8, state, copied);
        let mxcsr = state.add(MXCSR).cast::<u32>();
        mxcsr.write(mxcsr.read() & mask);
        if extended {
            let header = state.add(HEADER).cast::<u64>();
            let features = if is_extended {
                header.read() & context.process().fpu.xcr0
            } else {
                3
            };
            state.add(HEADER).write_bytes(0, HEADER_BYTES);
            header.write(features);
        }
    }
    Ok(())
}

fn check_stack(stack: &AltStack) -> Result<AltStack, i32> {
    const LEAST: u64 = libc::MINSIGSTKSZ as u64;
    match stack.flags & !AltStack::AUTODISARM {
        libc::SS_DISABLE => Ok(AltStack::DISABLED),
        0 | libc::SS_ONSTACK if stack.bytes < LEAST => Err(libc::ENOMEM),
        0 | libc::SS_ONSTACK => Ok(AltStack {
            flags: stack.flags & AltStack::AUTODISARM,
            reserved: 0,
            ..*stack
        }),
        _ => Err(libc::EINVAL),
    }
}

/// sigaltstack: the program's is kept here, Linux has none for a Dune thread.
pub(super) fn sigaltstack(context: &mut HostContext, gprs: &Gprs) -> Result<Action, i32> {
    let mut old = context.alt_stack;
    // The module is asked for RSP only where it matters.
    let is_on_it = old.is_enabled() && old.flags & AltStack::AUTODISARM == 0 && old.holds(sync(context)?.gprs.rsp);
    if is_on_it {
        old.flags |= libc::SS_ONSTACK;
    }
    if gprs.rdi != 0 {
        let new = touch::read::<AltStack>(gprs.rdi).map_err(|_| libc::EFAULT)?;
        if is_on_it {
            return Err(libc::EPERM);
        }
        context.alt_stack = check_stack(&new)?;
    }
    if gprs.rsi != 0 {
        touch::write(gprs.rsi, &old).map_err(|_| libc::EFAULT)?;
    }
    set_result(context.run, 0);
    Ok(Action::Run)
}

/// The signal of an exception: number, code, address.
fn signal_of(frame: &TrapFrame) -> Option<(i32, i32, u64)> {
    const SI_KERNEL: i32 = 0x80;
    const FPE_INTDIV: i32 = 1;
    const FPE_FLTINV: i32 = 7;
    const ILL_ILLOPN: i32 = 2;
    const TRAP_TRACE: i32 = 2;
    const BUS_ADRALN: i32 = 1;
    Some(match frame.vector() {
        Vector::DE => (libc::SIGFPE, FPE_INTDIV, frame.rip),
        Vector::MF | Vector::XM => (libc::SIGFPE, FPE_FLTINV, frame.rip),
        Vector::UD => (libc::SIGILL, ILL_ILLOPN, frame.rip),
        Vector::BP => (libc::SIGTRAP, SI_KERNEL, 0),
        Vector::DB => (libc::SIGTRAP, TRAP_TRACE, frame.rip),
        Vector::GP | Vector::BR => (libc::SIGSEGV, SI_KERNEL, 0),
        Vector::NP | Vector::SS => (libc::SIGBUS, SI_KERNEL, 0),
        Vector::AC => (libc::SIGBUS, BUS_ADRALN, 0),
        _ => return None,
    })
}

/// `int n` where nobody claimed vector n: outside Dune mode the gate is not there, and the instruction itself faults.
fn refuse_gate(frame: &mut TrapFrame) {
    const EXCEPTIONS: u8 = 32;
    const INT_N_BYTES: u64 = 2;
    const IN_IDT: u64 = 1 << 1;
    let Vector(number) = frame.vector();
    if number >= EXCEPTIONS {
        frame.rip = frame.rip.wrapping_sub(INT_N_BYTES);
        frame.error_code = u64::from(number) << 3 | IN_IDT;
        frame.vector = Vector::GP.0.into();
    }
}

/// An exception that no handler of the guest took.
///
/// Where the program has a handler for its signal that runs. Else the thread leaves Dune mode, and the same instruction
/// raises the signal for Linux to treat; or, where it would not do so there, the process ends with a report.
pub(super) fn exception(context: &mut HostContext, mut frame: TrapFrame) -> Result<Action, Fatal> {
    const WRITE: u64 = PageFaultErrorCode::CAUSED_BY_WRITE.bits();
    const FETCH: u64 = PageFaultErrorCode::INSTRUCTION_FETCH.bits();
    const PRESENT: u64 = PageFaultErrorCode::PROTECTION_VIOLATION.bits();
    const SEGV_MAPERR: i32 = 1;
    const SEGV_ACCERR: i32 = 2;
    if frame.vector() == Vector(compat::GATE) {
        if let Some(action) = compat::handle(context, &frame) {
            return Ok(action);
        }
    }
    refuse_gate(&mut frame);
    // SAFETY: The block lives as long as the context.
    if hook::is_inside(unsafe { &*context.block }) {
        return Err(Fatal::HandlerFault);
    }
    let signal = if frame.vector() == Vector::PF && frame.host_refused() {
        match touch::touch(frame.cr2, frame.error_code & WRITE != 0) {
            Err(Refusal { signal, code }) => Some((signal, code, frame.cr2)),
            Ok(()) if frame.error_code & FETCH != 0 => Some((libc::SIGSEGV, SEGV_ACCERR, frame.cr2)),
            // Linux allows it by now.
            Ok(()) => return Ok(go_on(context, &frame)),
        }
    } else if frame.vector() == Vector::PF {
        let code = if frame.error_code & PRESENT != 0 {
            SEGV_ACCERR
        } else {
            SEGV_MAPERR
        };
        Some((libc::SIGSEGV, code, frame.cr2))
    } else {
        signal_of(&frame)
    };
    if frame.is_cpl3() {
        return Err(Fatal::Unwaited);
    }
    if let Some((signal, code, address)) = signal {
        let mask = sys::sigprocmask(libc::SIG_BLOCK, u64::MAX);
        if context.pending.signal != 0 {
            // One came at this moment: it goes first, and the exception comes again.
            return Ok(take_at_frame(context, &frame));
        }
        if context.actions().get(signal).is_handler() && mask & sys::signal_bit(signal) == 0 {
            let info = SigInfo::of_fault(signal, code, address);
            let state = sync(context).unwrap_or_else(|errno| report::die_of_run(context, errno.into()));
            return Ok(deliver(
                context,
                signal,
                &info,
                mask,
                &Point::of_frame(&frame),
                state.sregs,
            ));
        }
        sys::sigprocmask(libc::SIG_SETMASK, mask);
    }
    trap::prepare_native(&mut frame)?;
    Ok(super::special::leave_with(context, |_| {
        super::context::Registers::of_frame(&frame)
    }))
}
