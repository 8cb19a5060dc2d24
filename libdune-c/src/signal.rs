// SPDX-License-Identifier: MIT OR Apache-2.0

//! Signals: Linux', delivered in Dune mode by libdune; here with a `struct dune_tf` of what they interrupted.
//!
//! # Safety
//!
//! The table holds functions of the program; the context is Linux' own, which rt_sigreturn loads.

use core::ffi::c_int;
use core::ffi::c_void;
use core::mem;
use core::ptr;
use core::sync::atomic::AtomicUsize;
use core::sync::atomic::Ordering::Acquire;
use core::sync::atomic::Ordering::Release;

use libdune::Dune;

use crate::frame::dune_tf;
use crate::frame::GD_KD;
use crate::frame::GD_UD;
use crate::trap::dune_intr_cb;

/// A handler of a signal, as signal(2) has it.
pub type sighandler_t = Option<unsafe extern "C" fn(c_int)>;

const SIGNALS: usize = 65;

static HANDLERS: [AtomicUsize; SIGNALS] = [const { AtomicUsize::new(0) }; SIGNALS];

/// Calls `cb` for a signal, in Dune mode, with the registers that it interrupted; what `cb` leaves there is loaded.
///
/// 0, or a negative errno.
#[no_mangle]
pub unsafe extern "C" fn dune_register_signal_handler(signum: c_int, cb: dune_intr_cb) -> c_int {
    let (Some(slot), Some(cb)) = (usize::try_from(signum).ok().and_then(|signum| HANDLERS.get(signum)), cb) else {
        return -libc::EINVAL;
    };
    let before = slot.swap(cb as usize, Release);
    // SAFETY: A structure of plain values.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = handle as unsafe extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
    // SAFETY: The handler is of the type that SA_SIGINFO says.
    if unsafe { libc::sigaction(signum, &action, ptr::null_mut()) } != 0 {
        slot.store(before, Release);
        return -std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL);
    }
    0
}

/// signal(2): the handler runs in Dune mode. The handler before, or SIG_ERR.
#[no_mangle]
pub unsafe extern "C" fn dune_signal(sig: c_int, cb: sighandler_t) -> sighandler_t {
    let new = cb.map_or(libc::SIG_DFL, |cb| cb as usize);
    // SAFETY: The caller's; a function, or one of the numbers that are none and that C passes as one.
    unsafe { mem::transmute::<usize, sighandler_t>(libc::signal(sig, new)) }
}

unsafe extern "C" fn handle(signum: c_int, _: *mut libc::siginfo_t, context: *mut c_void) {
    let handler = HANDLERS[signum as usize % SIGNALS].load(Acquire);
    if handler == 0 {
        return;
    }
    // SAFETY: Linux' context; the handler is the program's.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let mut tf = of_signal(registers);
        mem::transmute::<usize, unsafe extern "C" fn(*mut dune_tf)>(handler)(&raw mut tf);
        store(&tf, registers);
    }
}

type Registers = [i64; 23];

fn of_signal(registers: &Registers) -> dune_tf {
    let get = |index: c_int| registers[index as usize] as u64;
    dune_tf {
        rdi: get(libc::REG_RDI),
        rsi: get(libc::REG_RSI),
        rdx: get(libc::REG_RDX),
        rcx: get(libc::REG_RCX),
        r8: get(libc::REG_R8),
        r9: get(libc::REG_R9),
        r10: get(libc::REG_R10),
        r11: get(libc::REG_R11),
        rbx: get(libc::REG_RBX),
        rbp: get(libc::REG_RBP),
        r12: get(libc::REG_R12),
        r13: get(libc::REG_R13),
        r14: get(libc::REG_R14),
        r15: get(libc::REG_R15),
        rax: get(libc::REG_RAX),
        err: get(libc::REG_ERR) as u32,
        rip: get(libc::REG_RIP),
        cs: get(libc::REG_CSGSFS) as u16,
        rflags: get(libc::REG_EFL),
        rsp: get(libc::REG_RSP),
        ss: if Dune::is_active() { GD_KD } else { GD_UD },
        ..dune_tf::default()
    }
}

fn store(tf: &dune_tf, registers: &mut Registers) {
    for (index, value) in [
        (libc::REG_RDI, tf.rdi),
        (libc::REG_RSI, tf.rsi),
        (libc::REG_RDX, tf.rdx),
        (libc::REG_RCX, tf.rcx),
        (libc::REG_R8, tf.r8),
        (libc::REG_R9, tf.r9),
        (libc::REG_R10, tf.r10),
        (libc::REG_R11, tf.r11),
        (libc::REG_RBX, tf.rbx),
        (libc::REG_RBP, tf.rbp),
        (libc::REG_R12, tf.r12),
        (libc::REG_R13, tf.r13),
        (libc::REG_R14, tf.r14),
        (libc::REG_R15, tf.r15),
        (libc::REG_RAX, tf.rax),
        (libc::REG_RIP, tf.rip),
        (libc::REG_EFL, tf.rflags),
        (libc::REG_RSP, tf.rsp),
    ] {
        registers[index as usize] = value as i64;
    }
}
