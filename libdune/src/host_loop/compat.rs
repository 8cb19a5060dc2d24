// SPDX-License-Identifier: MIT OR Apache-2.0

//! `int 0x80` at CPL0 that no handler of the program took: the i386 system call, where the kernel has those.
//!
//! The program's instruction is executed natively with the program's registers, so that Linux does what it does for any
//! 64-bit program: arguments cut to 32 bits, a filter that sees the other architecture, a restart. Without IA32_EMULATION
//! it faults there, and the program gets the SIGSEGV.
//!
//! # Safety
//!
//! One instruction at a known address, as in `touch`. A signal that comes before it, or that Linux wants it restarted
//! for, goes first: the handler in `signal` goes on at `dune_int80_failed`, as for an access that was interrupted.

use core::arch::global_asm;
use core::mem::offset_of;
use core::sync::atomic::AtomicBool;
use core::sync::atomic::Ordering::Relaxed;

use dune_abi::Gprs;

use super::context::HostContext;
use super::dispatch;
use super::slow::Action;
use super::special;
use super::touch::Refusal;
use super::touch::SIGNALS;
use super::upcall;
use crate::sys;
use crate::trap::TrapFrame;

/// The gate of i386 system calls.
pub(super) const GATE: u8 = 0x80;

/// `int 0x80` is `cd 80`.
const INT80_BYTES: u64 = 2;

/// Numbers of i386 calls (arch/x86/entry/syscalls/syscall_32.tbl).
mod number {
    pub const EXIT: u32 = 1;
    pub const FORK: u32 = 2;
    pub const CLOSE: u32 = 6;
    pub const GETPID: u32 = 20;
    pub const SIGNAL: u32 = 48;
    pub const DUP2: u32 = 63;
    pub const SIGACTION: u32 = 67;
    pub const SIGRETURN: u32 = 119;
    pub const CLONE: u32 = 120;
    pub const PRCTL: u32 = 172;
    pub const RT_SIGRETURN: u32 = 173;
    pub const RT_SIGACTION: u32 = 174;
    pub const SIGALTSTACK: u32 = 186;
    pub const VFORK: u32 = 190;
    pub const SET_THREAD_AREA: u32 = 243;
    pub const EXIT_GROUP: u32 = 252;
    pub const DUP3: u32 = 330;
    pub const SECCOMP: u32 = 354;
    pub const CLONE3: u32 = 435;
    pub const CLOSE_RANGE: u32 = 436;
}

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Linux makes it.
    Native,
    /// As this 64-bit call, whose arguments are the same.
    As(i64),
    /// ENOSYS: it would change the host loop's stack, signals or descriptors, for code of 32 bits that is not there.
    Refused,
}

fn kind(call: u32) -> Kind {
    match call {
        number::EXIT => Kind::As(libc::SYS_exit),
        number::EXIT_GROUP => Kind::As(libc::SYS_exit_group),
        number::CLOSE => Kind::As(libc::SYS_close),
        number::CLOSE_RANGE => Kind::As(libc::SYS_close_range),
        number::DUP2 => Kind::As(libc::SYS_dup2),
        number::DUP3 => Kind::As(libc::SYS_dup3),
        number::PRCTL => Kind::As(libc::SYS_prctl),
        number::SECCOMP => Kind::As(libc::SYS_seccomp),
        number::FORK
        | number::VFORK
        | number::CLONE
        | number::CLONE3
        | number::SIGNAL
        | number::SIGACTION
        | number::RT_SIGACTION
        | number::SIGRETURN
        | number::RT_SIGRETURN
        | number::SIGALTSTACK
        | number::SET_THREAD_AREA => Kind::Refused,
        _ => Kind::Native,
    }
}

extern "C" {
    /// Makes the call in `gprs` and stores what RAX becomes there. Returns 0, or a packed [`Refusal`].
    fn dune_int80(gprs: *mut Gprs, pending: *const i32) -> u64;
    fn dune_int80_check();
    fn dune_int80_at();
    fn dune_int80_failed();
}

global_asm!(
    ".pushsection .text.dune_host, \"ax\", @progbits",
    ".balign 16",
    ".hidden dune_int80",
    ".globl dune_int80",
    "dune_int80:",
    "push rbx",
    "push rbp",
    "push rdi",
    // From here to the instruction a signal is told by `recovery`.
    ".hidden dune_int80_check",
    ".globl dune_int80_check",
    "dune_int80_check:",
    "mov ecx, {interrupted}",
    "cmp dword ptr [rsi], 0",
    "jne dune_int80_failed",
    "mov rax, [rdi + {rax}]",
    "mov rbx, [rdi + {rbx}]",
    "mov rcx, [rdi + {rcx}]",
    "mov rdx, [rdi + {rdx}]",
    "mov rsi, [rdi + {rsi}]",
    "mov rbp, [rdi + {rbp}]",
    "mov rdi, [rdi + {rdi}]",
    ".hidden dune_int80_at",
    ".globl dune_int80_at",
    "dune_int80_at:",
    "int 0x80",
    "mov rdi, [rsp]",
    "mov [rdi + {rax}], rax",
    "xor ecx, ecx",
    ".hidden dune_int80_failed",
    ".globl dune_int80_failed",
    "dune_int80_failed:",
    "mov rax, rcx",
    "pop rdi",
    "pop rbp",
    "pop rbx",
    "ret",
    ".popsection",
    interrupted = const Refusal::INTERRUPTED.code,
    rax = const offset_of!(Gprs, rax),
    rbx = const offset_of!(Gprs, rbx),
    rcx = const offset_of!(Gprs, rcx),
    rdx = const offset_of!(Gprs, rdx),
    rsi = const offset_of!(Gprs, rsi),
    rdi = const offset_of!(Gprs, rdi),
    rbp = const offset_of!(Gprs, rbp),
);

/// Where to go on when a signal came at `rip`.
pub(super) fn recovery(rip: u64) -> Option<u64> {
    let before = dune_int80_check as *const () as u64..=dune_int80_at as *const () as u64;
    before.contains(&rip).then_some(dune_int80_failed as *const () as u64)
}

/// Whether the kernel makes such calls, once that was seen.
static IS_KNOWN: AtomicBool = AtomicBool::new(false);

/// Makes the call of an `int 0x80` that `frame` is behind. `None` where Linux has none, or the gate was reached otherwise.
pub(super) fn handle(context: &mut HostContext, frame: &TrapFrame) -> Option<Action> {
    if frame.is_cpl3() {
        return None;
    }
    if context.is_dispatching() && is_there(context) {
        if let Some(action) = dispatch::catch_int80(context, frame) {
            return Some(action);
        }
    }
    let mut after = *frame;
    after.rip = frame.rip.wrapping_sub(INT80_BYTES);
    match call(context, frame.gprs()) {
        Done::Result(rax) => {
            after.rax = rax;
            after.rip = frame.rip;
            Some(upcall::go_on(context, &after))
        }
        // The handler runs, then the instruction again.
        Done::Interrupted => Some(upcall::take_at_frame(context, &after)),
        Done::Action(action) => Some(action),
        Done::Faulted => None,
    }
}

enum Done {
    Result(u64),
    Interrupted,
    Action(Action),
    Faulted,
}

fn call(context: &mut HostContext, mut gprs: Gprs) -> Done {
    let call = gprs.rax as u32;
    if kind(call) != Kind::Native && !is_there(context) {
        return Done::Faulted;
    }
    match kind(call) {
        Kind::Refused => return Done::Result(-i64::from(libc::ENOSYS) as u64),
        Kind::As(number) => {
            if let Some(done) = as_64(context, number, &gprs) {
                return done;
            }
        }
        Kind::Native => {}
    }
    native(context, &mut gprs)
}

/// The calls that `special` treats. `None`: Linux is to make it.
fn as_64(context: &mut HostContext, number: i64, gprs: &Gprs) -> Option<Done> {
    let low = |register: u64| register & 0xffff_ffff;
    let same = Gprs {
        rdi: low(gprs.rbx),
        rsi: low(gprs.rcx),
        rdx: low(gprs.rdx),
        r10: low(gprs.rsi),
        r8: low(gprs.rdi),
        r9: low(gprs.rbp),
        ..*gprs
    };
    // In strict mode there is no rt_sigprocmask; all that is left of these calls there is exit.
    let mask = (!context.is_strict).then(|| sys::sigprocmask(libc::SIG_BLOCK, u64::MAX));
    if mask.is_some() && context.pending.signal != 0 {
        return Some(Done::Interrupted);
    }
    let action = special::decide(context, number, &same);
    if let (Some(mask), Action::Run | Action::Forward) = (mask, action) {
        sys::sigprocmask(libc::SIG_SETMASK, mask);
    }
    match action {
        Action::Forward => None,
        // SAFETY: The run page is alive; RUN is not under way.
        Action::Run => Some(Done::Result(unsafe {
            (&raw const (*context.run).gprs.rax).read_volatile()
        })),
        other => Some(Done::Action(other)),
    }
}

/// Whether the kernel has the gate: asked by a call that changes nothing.
fn is_there(context: &mut HostContext) -> bool {
    IS_KNOWN.load(Relaxed) || !matches!(native(context, &mut getpid()), Done::Faulted)
}

fn getpid() -> Gprs {
    Gprs {
        rax: number::GETPID.into(),
        ..Gprs::default()
    }
}

fn native(context: &mut HostContext, gprs: &mut Gprs) -> Done {
    if !IS_KNOWN.load(Relaxed) && !context.is_strict && sys::sigprocmask(libc::SIG_BLOCK, 0) & SIGNALS != 0 {
        match try_out(context) {
            Done::Result(_) => {}
            other => return other,
        }
    }
    raw(context, gprs)
}

/// Makes a harmless call while the program blocks the signal that its refusal would be, which would end the process. Once
/// the answer is known nothing needs to be unblocked: a call may wait, and signals come meanwhile.
fn try_out(context: &mut HostContext) -> Done {
    let mask = sys::sigprocmask(libc::SIG_BLOCK, u64::MAX);
    if context.pending.signal != 0 {
        return Done::Interrupted;
    }
    sys::sigprocmask(libc::SIG_SETMASK, mask & !SIGNALS);
    let done = raw(context, &mut getpid());
    sys::sigprocmask(libc::SIG_BLOCK, u64::MAX);
    if context.pending.signal != 0 {
        context.pending.mask |= mask & SIGNALS;
        return Done::Interrupted;
    }
    sys::sigprocmask(libc::SIG_SETMASK, mask);
    done
}

fn raw(context: &HostContext, gprs: &mut Gprs) -> Done {
    // SAFETY: The program's call with the program's arguments; none that returns twice or takes the stack away.
    match unsafe { dune_int80(gprs, &raw const context.pending.signal) } {
        0 => {
            IS_KNOWN.store(true, Relaxed);
            Done::Result(gprs.rax)
        }
        packed if packed == Refusal::INTERRUPTED.pack() => Done::Interrupted,
        _ => Done::Faulted,
    }
}

#[cfg(test)]
mod tests {
    use super::kind;
    use super::number;
    use super::Kind;

    #[test]
    fn what_makes_a_task_or_takes_a_handler_is_refused() {
        for call in [number::FORK, number::CLONE3, number::RT_SIGACTION, number::SIGALTSTACK] {
            assert_eq!(kind(call), Kind::Refused);
        }
        assert_eq!(kind(number::EXIT), Kind::As(libc::SYS_exit));
        assert_eq!(kind(number::GETPID), Kind::Native);
    }
}
