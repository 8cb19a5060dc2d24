// SPDX-License-Identifier: MIT OR Apache-2.0

//! Other ways of Linux to the same ends: intercepting a system call, catching a touch of memory, changing page tables.

mod soft_dirty;
mod switch;
mod uffd;

use core::sync::atomic::AtomicU64;
use core::sync::atomic::AtomicU8;
use core::sync::atomic::Ordering::Relaxed;
use core::sync::atomic::Ordering::SeqCst;
use std::sync::mpsc;
use std::thread;

use dune_examples::ticks;

use crate::calls;
use crate::measure::timed;
use crate::measure::System;

const CALLS: usize = 500;

pub fn measure(linux: &System<'_>) {
    if linux.wants(&["ptrace_getpid", "intercept"]) {
        traced(&linux.named("ptrace SYSCALL"), libc::PTRACE_SYSCALL, 2);
        traced(&linux.named("ptrace SYSEMU"), libc::PTRACE_SYSEMU, 1);
        notified(&linux.named("seccomp notification"));
        dispatched(&linux.named("user dispatch"));
    }
    uffd::measure(linux);
    soft_dirty::measure(linux);
    switch::measure(linux);
}

/// A child calls getpid for ever; the tracer lets it stop `stops` times for each.
fn traced(system: &System<'_>, request: libc::c_uint, stops: usize) {
    // SAFETY: The child only makes calls and is killed at the end.
    unsafe {
        let pid = libc::fork();
        assert!(pid >= 0, "fork");
        if pid == 0 {
            libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
            libc::raise(libc::SIGSTOP);
            loop {
                calls::getpid();
            }
        }
        let wait = || {
            let mut status = 0;
            assert_eq!(libc::waitpid(pid, &mut status, 0), pid);
            assert!(libc::WIFSTOPPED(status), "{status:#x}");
            libc::WSTOPSIG(status)
        };
        assert_eq!(wait(), libc::SIGSTOP);
        let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_EXITKILL;
        assert_eq!(libc::ptrace(libc::PTRACE_SETOPTIONS, pid, 0, options), 0);
        let step = || {
            assert_eq!(libc::ptrace(request, pid, 0, 0), 0);
            assert_eq!(wait(), libc::SIGTRAP | 0x80);
        };
        // The first stop may be that of the raise() itself.
        (0..4).for_each(|_| step());
        system.repeated("ptrace_getpid", CALLS, |_| timed(|| (0..stops).for_each(|_| step())));
        libc::kill(pid, libc::SIGKILL);
        libc::waitpid(pid, core::ptr::null_mut(), 0);
    }
}

/// One thread calls getppid, another is asked and answers.
fn notified(system: &System<'_>) {
    const TOTAL: usize = CALLS + 16;
    const ANSWER: i64 = 4711;
    let (send, receive) = mpsc::channel();
    let caller = thread::spawn(move || {
        let listener = calls::filter(
            libc::SYS_getppid,
            libc::SECCOMP_RET_USER_NOTIF,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
        );
        assert!(listener >= 0, "a listener of seccomp's");
        send.send(listener as i32).expect("the other thread waits");
        let mut times: Vec<u64> = (0..TOTAL)
            .map(|_| {
                let start = ticks();
                let answer = calls::call(libc::SYS_getppid);
                let ticks = ticks() - start;
                assert_eq!(answer as i64, ANSWER);
                ticks
            })
            .collect();
        times.split_off(TOTAL - CALLS)
    });
    let listener = receive.recv().expect("the thread tells its listener");
    for _ in 0..TOTAL {
        // SAFETY: Structures of Linux' own; the fd is the listener.
        unsafe {
            let mut ask: libc::seccomp_notif = core::mem::zeroed();
            assert_eq!(libc::ioctl(listener, calls::NOTIF_RECV, &raw mut ask), 0);
            let mut answer: libc::seccomp_notif_resp = core::mem::zeroed();
            answer.id = ask.id;
            answer.val = ANSWER;
            assert_eq!(libc::ioctl(listener, calls::NOTIF_SEND, &raw mut answer), 0);
        }
    }
    let mut times = caller.join().expect("the calls were answered");
    system.given("intercept", &mut times);
    // SAFETY: Ours.
    unsafe { libc::close(listener) };
}

static SELECTOR: AtomicU8 = AtomicU8::new(0);
static CAUGHT: AtomicU64 = AtomicU64::new(0);
const ALLOW: u8 = 0;
const BLOCK: u8 = 1;
const DISPATCHED: u64 = 4242;

extern "C" fn on_sigsys(_: i32, _: *mut libc::siginfo_t, context: *mut libc::ucontext_t) {
    SELECTOR.store(ALLOW, SeqCst);
    CAUGHT.fetch_add(1, Relaxed);
    // SAFETY: Linux' own frame.
    unsafe { (*context).uc_mcontext.gregs[libc::REG_RAX as usize] = DISPATCHED as i64 };
}

/// Each call becomes a signal.
fn dispatched(system: &System<'_>) {
    const PR_SET_SYSCALL_USER_DISPATCH: libc::c_int = 59;
    // SAFETY: A handler of the right type; the selector lives for ever.
    unsafe {
        let mut action: libc::sigaction = core::mem::zeroed();
        action.sa_sigaction = on_sigsys as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        let mut old: libc::sigaction = core::mem::zeroed();
        assert_eq!(libc::sigaction(libc::SIGSYS, &action, &mut old), 0);
        if libc::prctl(PR_SET_SYSCALL_USER_DISPATCH, 1, 0, 0, SELECTOR.as_ptr()) != 0 {
            return;
        }
        let before = CAUGHT.load(Relaxed);
        let mut made = 0;
        system.repeated("intercept", CALLS, |_| {
            made += 1;
            SELECTOR.store(BLOCK, SeqCst);
            let mut answer = 0;
            let ticks = timed(|| answer = calls::getpid());
            assert_eq!(answer, DISPATCHED);
            ticks
        });
        assert_eq!(CAUGHT.load(Relaxed) - before, made);
        assert_eq!(libc::prctl(PR_SET_SYSCALL_USER_DISPATCH, 0, 0, 0, 0), 0);
        // `enter` asks Linux about threads of programs that have such a handler.
        assert_eq!(libc::sigaction(libc::SIGSYS, &old, core::ptr::null_mut()), 0);
    }
}
