// SPDX-License-Identifier: MIT OR Apache-2.0

//! SIGSEGV and SIGBUS of the host loop's own accesses; all others are the program's.
//!
//! # Safety
//!
//! The handler runs on whatever stack was interrupted and touches no errno and no TLS. A Dune thread is known by its
//! host stack, which lies in the arena.

use core::arch::global_asm;

use super::context::HostContext;
use super::touch;
use super::touch::Refusal;
use crate::layout;
use crate::process;
use crate::sys;
use crate::sys::Actions;
use crate::sys::Errno;
use crate::sys::SigAction;

/// The signals that an access can give.
pub(super) const SIGNALS: [i32; 2] = [libc::SIGSEGV, libc::SIGBUS];

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

/// Takes the two signals over, and keeps the program's actions.
pub(crate) fn install(actions: &Actions) -> Result<(), Errno> {
    for signal in SIGNALS {
        // SAFETY: A handler and a restorer as Linux wants them. The action is noted before it can be asked for.
        unsafe {
            let now = sys::sigaction(signal, None)?;
            if now.handler != handler_address() {
                actions.replace(signal, now);
                sys::sigaction(signal, Some(&action()))?;
            }
        }
    }
    Ok(())
}

/// Gives the program its actions back, unless it has set others behind our back.
pub(crate) fn restore(actions: &Actions) {
    for signal in SIGNALS {
        // SAFETY: Actions that the program had, or asked for.
        unsafe {
            if sys::sigaction(signal, None).is_ok_and(|now| now.handler == handler_address()) {
                let _ = sys::sigaction(signal, Some(&actions.get(signal)));
            }
        }
    }
}

/// The context of the calling thread, if it runs on its host stack.
fn context_at(rsp: u64) -> Option<*mut HostContext> {
    // SAFETY: Compared only, unless RSP lies in it: then the calling thread is counted in it.
    let area = unsafe { (*process::find()?).area_of(rsp) }?;
    Some((area + layout::HOST as u64) as *mut HostContext)
}

unsafe extern "C" fn dune_host_signal(signal: i32, info: *mut libc::siginfo_t, ucontext: *mut libc::ucontext_t) {
    // SAFETY: Linux passes a siginfo and a ucontext; a context that RSP leads to is the calling thread's.
    unsafe {
        let registers = &mut (*ucontext).uc_mcontext.gregs;
        if let Some(recovery) = touch::recovery(registers[libc::REG_RIP as usize] as u64) {
            if (*info).si_code > 0 {
                let refusal = Refusal {
                    signal,
                    code: (*info).si_code,
                };
                registers[libc::REG_RCX as usize] = refusal.pack() as i64;
                registers[libc::REG_RIP as usize] = recovery as i64;
                return;
            }
        }
        let context = context_at(registers[libc::REG_RSP as usize] as u64);
        let actions = match (context, process::find()) {
            (Some(context), _) => Some((*context).actions),
            (None, Some(process)) => Some(&raw const (*process).actions),
            (None, None) => None,
        };
        let action = actions.map_or(SigAction::default(), |actions| (*actions).get(signal));
        pass_on(signal, info, ucontext, action);
        if let (Some(_), Some(actions)) = (context, actions) {
            take_again(signal, &*actions);
        }
    }
}

/// The program's handler runs outside Dune mode: an action that it set took ours away.
unsafe fn take_again(signal: i32, actions: &Actions) {
    // SAFETY: A handler and a restorer as Linux wants them.
    unsafe {
        if let Ok(now) = sys::sigaction(signal, None) {
            if now.handler != handler_address() && now.handler != 0 {
                actions.replace(signal, now);
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
        let actions = Actions::default();
        install(&actions).unwrap();
        assert_eq!(SIGNALS.map(|signal| actions.get(signal)), before);
        // The second thread that enters changes nothing.
        install(&actions).unwrap();
        assert_eq!(SIGNALS.map(|signal| actions.get(signal)), before);

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

        restore(&actions);
        for (signal, action) in SIGNALS.into_iter().zip(before) {
            // SAFETY: Asks only.
            assert_eq!(unsafe { sys::sigaction(signal, None) }, Ok(action));
        }
    }
}
