// SPDX-License-Identifier: MIT OR Apache-2.0

//! Signals as Linux delivers them: on the host stack of a Dune thread, or to an ordinary thread.
//!
//! While a process has a Dune thread, Linux has [`dune_host_signal`] for every signal that the program handles, with
//! all signals blocked, and for SIGSEGV and SIGBUS, which the host loop's own accesses can raise. The program's actions
//! are kept in [`ACTIONS`]. For a Dune thread the handler only takes note: `upcall` has the program's handler run in
//! Dune mode. For an ordinary thread it calls the program's handler.
//!
//! # Safety
//!
//! The handler runs on whatever stack was interrupted and touches no errno and no TLS. A Dune thread is known by its
//! host stack, which lies in the arena. Its context is its own: nothing else runs on the thread meanwhile.

use core::arch::global_asm;
use core::sync::atomic::Ordering::Relaxed;

use super::asm;
use super::compat;
use super::context::HostContext;
use super::slow::Action;
use super::touch;
use super::touch::Refusal;
use crate::layout;
use crate::process;
use crate::sys;
use crate::sys::Actions;
use crate::sys::Errno;
use crate::sys::SigAction;
use crate::sys::SigInfo;

/// The program's actions for the signals that libdune takes, of all threads that have none of their own.
pub(crate) static ACTIONS: Actions = Actions::new();

/// The signals that an access can give: libdune has them whatever the program wants.
const OWN: [i32; 2] = [libc::SIGSEGV, libc::SIGBUS];

/// Flags of the program's that Linux has to know.
const PASSED_FLAGS: u64 = (libc::SA_NOCLDSTOP | libc::SA_NOCLDWAIT | libc::SA_RESTART) as u64;

extern "C" {
    fn dune_host_sigreturn();
}

global_asm!(
    ".pushsection .text.dune_host, \"ax\", @progbits",
    ".balign 16",
    ".hidden dune_host_sigreturn",
    ".globl dune_host_sigreturn",
    "dune_host_sigreturn:",
    "mov eax, {sigreturn}",
    "syscall",
    "ud2",
    ".popsection",
    sigreturn = const libc::SYS_rt_sigreturn,
);

fn handler_address() -> u64 {
    dune_host_signal as *const () as u64
}

/// Whether nobody can have an action for it.
fn has_no_action(signal: i32) -> bool {
    signal == libc::SIGKILL || signal == libc::SIGSTOP
}

/// What Linux is to do where the program wants `action`.
///
/// On the alternate stack where there is one: an ordinary thread's. A Dune thread's is libdune's to keep (`upcall`).
fn host_action(signal: i32, action: &SigAction) -> SigAction {
    if !action.is_handler() && !OWN.contains(&signal) {
        return *action;
    }
    SigAction {
        handler: handler_address(),
        flags: (libc::SA_SIGINFO | libc::SA_ONSTACK) as u64 | sys::SA_RESTORER | action.flags & PASSED_FLAGS,
        restorer: dune_host_sigreturn as *const () as u64,
        mask: u64::MAX,
    }
}

/// Takes over what the program handles, and keeps the program's actions.
pub(crate) fn install() -> Result<(), Errno> {
    sys::with_signals_blocked(|| install_blocked(&ACTIONS))
}

fn install_blocked(actions: &Actions) -> Result<(), Errno> {
    for signal in 1..=sys::SIGNALS {
        if has_no_action(signal) {
            continue;
        }
        // SAFETY: A handler and a restorer as Linux wants them. The action is noted before it can be asked for.
        unsafe {
            let now = sys::sigaction(signal, None)?;
            if now.handler != handler_address() {
                actions.replace(signal, now);
                let ours = host_action(signal, &now);
                if ours != now {
                    sys::sigaction(signal, Some(&ours))?;
                }
            }
        }
    }
    Ok(())
}

/// Whether the program handles a signal itself.
pub(crate) fn has_handler(signal: i32) -> bool {
    sys::with_signals_blocked(|| ACTIONS.get(signal).is_handler())
}

/// Gives the program its actions back, unless it has set others behind our back.
pub(crate) fn restore() {
    restore_from(&ACTIONS);
}

/// The same, for a thread that may have actions of its own.
pub(super) fn restore_from(actions: &Actions) {
    sys::with_signals_blocked(|| restore_blocked(actions));
}

fn restore_blocked(actions: &Actions) {
    for signal in 1..=sys::SIGNALS {
        let action = actions.get(signal);
        if has_no_action(signal) || !(action.is_handler() || OWN.contains(&signal)) {
            continue;
        }
        // SAFETY: Actions that the program had, or asked for.
        unsafe {
            if sys::sigaction(signal, None).is_ok_and(|now| now.handler == handler_address()) {
                let _ = sys::sigaction(signal, Some(&action));
            }
        }
    }
}

/// rt_sigaction, with all signals blocked; the old action.
pub(super) fn set_action(actions: &Actions, signal: i32, new: Option<SigAction>) -> Result<SigAction, Errno> {
    let Some(new) = new else {
        return Ok(actions.get(signal));
    };
    let old = actions.replace(signal, new);
    // SAFETY: The program's, or ours.
    match unsafe { sys::sigaction(signal, Some(&host_action(signal, &new))) } {
        Ok(_) => Ok(old),
        Err(errno) => {
            actions.replace(signal, old);
            Err(errno)
        }
    }
}

/// Whether a Dune thread's rt_sigaction for the signal is ours.
pub(super) fn is_ours(signal: i32) -> bool {
    (1..=sys::SIGNALS).contains(&signal) && !has_no_action(signal)
}

/// The context of the calling thread, if it runs on its host stack.
fn context_at(rsp: u64) -> Option<*mut HostContext> {
    // SAFETY: Compared only, unless RSP lies in it: then the calling thread is counted in it.
    let area = unsafe { (*process::find()?).area_of(rsp) }?;
    Some((area + layout::HOST as u64) as *mut HostContext)
}

/// Where to go on when an instruction of the host loop's that may fail got a signal.
fn recovery(rip: u64) -> Option<u64> {
    touch::recovery(rip).or_else(|| compat::recovery(rip))
}

unsafe extern "C" fn dune_host_signal(signal: i32, info: *mut SigInfo, ucontext: *mut libc::ucontext_t) {
    // SAFETY: Linux passes a siginfo and a ucontext; a context that RSP leads to is the calling thread's.
    unsafe {
        let registers = &mut (*ucontext).uc_mcontext.gregs;
        if let Some(recovery) = recovery(registers[libc::REG_RIP as usize] as u64) {
            if (*info).code() > 0 && OWN.contains(&signal) {
                let refusal = Refusal {
                    signal,
                    code: (*info).code(),
                };
                registers[libc::REG_RCX as usize] = refusal.pack() as i64;
                registers[libc::REG_RIP as usize] = recovery as i64;
                return;
            }
        }
        let context = context_at(registers[libc::REG_RSP as usize] as u64);
        match context {
            Some(context) if !(*context).left => {
                note(&mut *context, signal, info, ucontext);
                let registers = &mut (*ucontext).uc_mcontext.gregs;
                // A wait for memory (userfaultfd) ends, as it does for an ordinary thread; an i386 call is made later.
                let rip = registers[libc::REG_RIP as usize] as u64;
                if let Some(recovery) = recovery(rip) {
                    if touch::recovery(rip).is_some() {
                        // Unblocked for the access only.
                        let mask = *(registers[libc::REG_RDX as usize] as *const u64);
                        (*context).pending.mask |= mask & touch::SIGNALS;
                    }
                    registers[libc::REG_RCX as usize] = Refusal::INTERRUPTED.pack() as i64;
                    registers[libc::REG_RIP as usize] = recovery as i64;
                }
            }
            Some(context) => pass_on(signal, info, ucontext, &*(*context).actions),
            None if process::find().is_some() => pass_on(signal, info, ucontext, &ACTIONS),
            // The last Dune thread left in this moment, or an ordinary thread forked this process, which has none: what
            // Linux does without us is right.
            None => {
                restore();
                if !((*info).code() > 0 && OWN.contains(&signal)) {
                    sys::queue_to_self(signal, &*info);
                }
                // Else the instruction is executed again.
            }
        }
    }
}

/// Keeps the signal for the program's handler in Dune mode. Until that runs no other one comes.
unsafe fn note(context: &mut HostContext, signal: i32, info: *const SigInfo, ucontext: *mut libc::ucontext_t) {
    // SAFETY: Linux' siginfo and ucontext; the first word of the mask is all that Linux has.
    unsafe {
        let mask = (&raw mut (*ucontext).uc_sigmask).cast::<u64>();
        let is_first = context.pending.signal == 0;
        if is_first {
            context.pending.signal = signal;
            context.pending.info = *info;
            context.pending.mask = *mask;
            context.late.store(1, Relaxed);
        } else {
            // Whoever let it come while another one waits here: Linux keeps it.
            sys::queue_to_self(signal, &*info);
        }
        *mask = u64::MAX;
        (&raw mut (*context.run).interrupt_request).write_volatile(1);
        // A call that was not made yet, or is to be made again: the handler goes first.
        let registers = &mut (*ucontext).uc_mcontext.gregs;
        let rip = registers[libc::REG_RIP as usize] as u64;
        let r12d = registers[libc::REG_R12 as usize] as u32;
        let is_at_call =
            (rip == asm::forward_syscall() || asm::decided().contains(&rip)) && r12d == Action::Forward as u32;
        let is_before_call =
            (asm::run_behind()..=asm::forward_syscall()).contains(&rip) && r12d == dune_abi::EXIT_SYSCALL;
        if is_at_call || is_before_call {
            registers[libc::REG_RIP as usize] = asm::signalled() as i64;
        }
    }
}

/// Does for an ordinary thread what the program's own action would have done.
unsafe fn pass_on(signal: i32, info: *mut SigInfo, ucontext: *mut libc::ucontext_t, actions: &Actions) {
    let action = actions.get(signal);
    // SAFETY: Linux' arguments, handed on; the address is what the program gave to sigaction.
    unsafe {
        let raised_by_fault = (*info).code() > 0 && OWN.contains(&signal);
        match action.handler {
            SigAction::IGNORE if !raised_by_fault => {}
            SigAction::DEFAULT_HANDLER | SigAction::IGNORE => {
                let _ = sys::sigaction(signal, Some(&SigAction::DEFAULT));
                if !raised_by_fault {
                    // Taken by the default when this handler has returned.
                    sys::queue_to_self(signal, &*info);
                }
                // Else the instruction is executed again and dies of its own fault.
            }
            handler => {
                if action.flags & SigAction::RESETHAND != 0 {
                    let _ = set_action(actions, signal, Some(SigAction::DEFAULT));
                }
                let interrupted = *(&raw const (*ucontext).uc_sigmask).cast::<u64>();
                sys::sigprocmask(libc::SIG_SETMASK, action.mask_during(signal, interrupted));
                let handler: extern "C" fn(i32, *mut SigInfo, *mut libc::ucontext_t) = core::mem::transmute(handler);
                handler(signal, info, ucontext);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use core::sync::atomic::AtomicI32;

    use super::*;
    use crate::host_loop::touch::touch;

    const PAGE: usize = dune_abi::PAGE_BYTES;

    static SEEN: AtomicI32 = AtomicI32::new(0);

    extern "C" fn see(signal: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        SEEN.store(signal, Relaxed);
    }

    /// One test for all of it: the actions belong to the whole process.
    #[test]
    fn refused_accesses_come_back_and_the_actions_too() {
        let now = |signal| {
            // SAFETY: Asks only.
            unsafe { sys::sigaction(signal, None) }.unwrap()
        };
        // SAFETY: The handler stores a number.
        unsafe {
            let mut action: libc::sigaction = core::mem::zeroed();
            action.sa_sigaction = see as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
            assert_eq!(libc::sigaction(libc::SIGUSR2, &action, core::ptr::null_mut()), 0);
        }
        let before = [libc::SIGSEGV, libc::SIGBUS, libc::SIGUSR2, libc::SIGTERM].map(|signal| (signal, now(signal)));
        let actions = &ACTIONS;
        install().unwrap();
        // The second thread that enters changes nothing.
        install().unwrap();
        for (signal, action) in before {
            assert_eq!(actions.get(signal), action);
        }
        assert_eq!(now(libc::SIGUSR2).handler, handler_address());
        assert_ne!(now(libc::SIGUSR2).flags & libc::SA_RESTART as u64, 0);
        assert_eq!(now(libc::SIGTERM), actions.get(libc::SIGTERM), "a default stays Linux'");

        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: Fresh memory.
        let page = unsafe { sys::mmap(PAGE, libc::PROT_READ, flags, -1, 0) }.unwrap();
        let refusal = |signal, code| Err(Refusal { signal, code });
        const SEGV_MAPERR: i32 = 1;
        const SEGV_ACCERR: i32 = 2;
        assert_eq!(touch(page, false), Ok(()));
        assert_eq!(touch(page, true), refusal(libc::SIGSEGV, SEGV_ACCERR));
        // SAFETY: The test's own page.
        unsafe { sys::mprotect(page, PAGE, libc::PROT_READ | libc::PROT_WRITE) }.unwrap();
        assert_eq!(touch(page, true), Ok(()));
        // SAFETY: The test's own page.
        unsafe { sys::munmap(page, PAGE) }.unwrap();
        assert_eq!(touch(page, false), refusal(libc::SIGSEGV, SEGV_MAPERR));

        // A blocked signal must not kill the process, and stays blocked.
        let blocked = sys::sigprocmask(libc::SIG_BLOCK, sys::signal_bit(libc::SIGSEGV));
        assert_eq!(touch(8, true), refusal(libc::SIGSEGV, SEGV_MAPERR));
        let mask = sys::sigprocmask(libc::SIG_SETMASK, blocked);
        assert_ne!(mask & sys::signal_bit(libc::SIGSEGV), 0);

        // Beyond the end of a file it is SIGBUS.
        // SAFETY: A terminated name; the file is the test's own.
        let page = unsafe {
            let file = libc::memfd_create(c"dune-test".as_ptr(), 0);
            assert!(file >= 0);
            sys::mmap(PAGE, libc::PROT_READ, libc::MAP_SHARED, file, 0).unwrap()
        };
        const BUS_ADRERR: i32 = 2;
        assert_eq!(touch(page, false), refusal(libc::SIGBUS, BUS_ADRERR));

        // No process is registered here: a signal of ours goes back to Linux, which has the program's handler again.
        restore();
        for (signal, action) in before {
            assert_eq!(now(signal), action);
        }
        // SAFETY: A signal to ourselves.
        unsafe { libc::raise(libc::SIGUSR2) };
        assert_eq!(SEEN.load(Relaxed), libc::SIGUSR2);
    }
}
