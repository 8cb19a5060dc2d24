// SPDX-License-Identifier: MIT OR Apache-2.0

//! SIGSEGV and SIGBUS of the host loop's own accesses; all others are the program's.
//!
//! # Safety
//!
//! The handler runs on whatever stack was interrupted, touches no errno and no TLS. It trusts `HOST`, which points
//! to the context of the Dune thread from `install` to `restore`.

use core::arch::global_asm;
use core::ptr;
use core::sync::atomic::AtomicPtr;
use core::sync::atomic::Ordering::AcqRel;
use core::sync::atomic::Ordering::Acquire;
use core::sync::atomic::Ordering::Release;

use super::context::HostContext;
use super::context::Refusal;
use super::touch;
use crate::sys;
use crate::sys::Errno;
use crate::sys::SigAction;

/// The signals that an access can give, in the order of `HostContext::actions`.
pub(super) const SIGNALS: [i32; 2] = [libc::SIGSEGV, libc::SIGBUS];

static HOST: AtomicPtr<HostContext> = AtomicPtr::new(ptr::null_mut());

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

/// What libdune sets for the two signals.
fn action() -> SigAction {
    SigAction {
        handler: handler_address(),
        flags: libc::SA_SIGINFO as u64 | sys::SA_RESTORER,
        restorer: dune_host_sigreturn as *const () as u64,
        mask: u64::MAX,
    }
}

/// Takes the two signals over and keeps the program's actions in the context.
///
/// # Safety
///
/// `context` must stay alive until `restore`, or the process ends.
pub(crate) unsafe fn install(context: *mut HostContext) -> Result<(), Errno> {
    let before = HOST.swap(context, AcqRel);
    let ours = action();
    for (index, signal) in SIGNALS.into_iter().enumerate() {
        // SAFETY: A handler and a restorer as Linux wants them. The action is noted before it can be asked for.
        unsafe {
            let now = sys::sigaction(signal, None)?;
            (*context).actions[index] = if now.handler != ours.handler {
                now
            } else if before.is_null() {
                SigAction::default()
            } else {
                // Left over from a thread that ended in Dune mode, or from the parent of this process.
                (*before).actions[index]
            };
            sys::sigaction(signal, Some(&ours))?;
        }
    }
    Ok(())
}

/// Gives the program its actions back, unless it has set others behind our back.
///
/// # Safety
///
/// `context` is the one given to `install`.
pub(crate) unsafe fn restore(context: *mut HostContext) {
    for (index, signal) in SIGNALS.into_iter().enumerate() {
        // SAFETY: Actions that the program had, or asked for.
        unsafe {
            if sys::sigaction(signal, None).is_ok_and(|now| now.handler == handler_address()) {
                let _ = sys::sigaction(signal, Some(&(*context).actions[index]));
            }
        }
    }
    HOST.store(ptr::null_mut(), Release);
}

unsafe extern "C" fn dune_host_signal(signal: i32, info: *mut libc::siginfo_t, ucontext: *mut libc::ucontext_t) {
    let context = HOST.load(Acquire);
    // SAFETY: Linux passes a siginfo and a ucontext; the context is alive while it is in HOST.
    unsafe {
        let rip = &mut (*ucontext).uc_mcontext.gregs[libc::REG_RIP as usize];
        if let Some(recovery) = touch::recovery(*rip as u64) {
            if (*info).si_code > 0 && !context.is_null() {
                (*context).refusal = Refusal {
                    signal,
                    code: (*info).si_code,
                };
                *rip = recovery as i64;
                return;
            }
        }
        let action = if context.is_null() {
            SigAction::default()
        } else {
            (*context).actions[usize::from(signal == libc::SIGBUS)]
        };
        pass_on(signal, info, ucontext, action);
        if HOST.load(Acquire) == context && !context.is_null() {
            take_again(signal, context);
        }
    }
}

/// The program's handler runs outside Dune mode: an action that it set took ours away.
unsafe fn take_again(signal: i32, context: *mut HostContext) {
    // SAFETY: The context is alive while it is in HOST.
    unsafe {
        if let Ok(now) = sys::sigaction(signal, None) {
            if now.handler != handler_address() && now.handler != 0 {
                (*context).actions[usize::from(signal == libc::SIGBUS)] = now;
                let _ = sys::sigaction(signal, Some(&action()));
            }
        }
    }
}

/// Does what the program's own action would have done.
unsafe fn pass_on(signal: i32, info: *mut libc::siginfo_t, ucontext: *mut libc::ucontext_t, action: SigAction) {
    const IGNORE: u64 = libc::SIG_IGN as u64;
    // SAFETY: Linux' arguments, handed on; the address is what the program gave to sigaction.
    unsafe {
        let raised_by_fault = (*info).si_code > 0;
        match action.handler {
            IGNORE if !raised_by_fault => {}
            0 | IGNORE => {
                let default = SigAction::default();
                let _ = sys::sigaction(signal, Some(&default));
                if !raised_by_fault {
                    sys::die_by(signal);
                }
                // The instruction is executed again and dies of its own fault.
            }
            handler => {
                let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::ucontext_t) =
                    core::mem::transmute(handler);
                handler(signal, info, ucontext);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host_loop::touch::touch;

    const PAGE: usize = dune_abi::PAGE_BYTES;

    /// One test for all of it: the actions belong to the whole process.
    #[test]
    fn refused_accesses_come_back_and_the_actions_too() {
        let before = SIGNALS.map(|signal| {
            // SAFETY: Asks only.
            unsafe { sys::sigaction(signal, None) }.unwrap()
        });
        // SAFETY: The context is plain data, valid when zeroed.
        let mut context: Box<HostContext> = unsafe { Box::new(core::mem::zeroed()) };
        let context = &raw mut *context;
        // SAFETY: The context outlives `restore` below.
        unsafe { install(context) }.unwrap();
        // SAFETY: As above; the test is the only user.
        assert_eq!(unsafe { (*context).actions }, before);

        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: Fresh memory.
        let page = unsafe { sys::mmap(PAGE, libc::PROT_READ, flags, -1, 0) }.unwrap();
        let refusal = || {
            // SAFETY: As above.
            let refusal = unsafe { (*context).refusal };
            (refusal.signal, refusal.code)
        };
        const SEGV_MAPERR: i32 = 1;
        const SEGV_ACCERR: i32 = 2;
        assert!(touch(page, false));
        assert!(!touch(page, true));
        assert_eq!(refusal(), (libc::SIGSEGV, SEGV_ACCERR));
        // SAFETY: The test's own page.
        unsafe { sys::mprotect(page, PAGE, libc::PROT_READ | libc::PROT_WRITE) }.unwrap();
        assert!(touch(page, true));
        // SAFETY: The test's own page.
        unsafe { sys::munmap(page, PAGE) }.unwrap();
        assert!(!touch(page, false));
        assert_eq!(refusal(), (libc::SIGSEGV, SEGV_MAPERR));

        // A blocked signal must not kill the process, and stays blocked.
        let blocked = sys::sigprocmask(libc::SIG_BLOCK, sys::signal_bit(libc::SIGSEGV));
        assert!(!touch(8, true));
        let mask = sys::sigprocmask(libc::SIG_SETMASK, blocked);
        assert_ne!(mask & sys::signal_bit(libc::SIGSEGV), 0);

        // Beyond the end of a file it is SIGBUS.
        // SAFETY: A terminated name; the file is the test's own.
        let page = unsafe {
            let file = libc::memfd_create(c"dune-test".as_ptr(), 0);
            assert!(file >= 0);
            sys::mmap(PAGE, libc::PROT_READ, libc::MAP_SHARED, file, 0).unwrap()
        };
        assert!(!touch(page, false));
        assert_eq!(refusal().0, libc::SIGBUS);

        // SAFETY: The context given to `install`.
        unsafe { restore(context) };
        for (signal, action) in SIGNALS.into_iter().zip(before) {
            // SAFETY: Asks only.
            assert_eq!(unsafe { sys::sigaction(signal, None) }, Ok(action));
        }
    }
}
