// SPDX-License-Identifier: MIT OR Apache-2.0

//! System calls and bare exits, with the checks that nothing is answered behind Linux' back.

use core::arch::asm;

use crate::measure::timed;
use crate::measure::System;
use crate::process::end_of_child;

/// Repetitions of a call.
const CALLS: usize = 10_000;

pub fn measure(system: &System<'_>) {
    if system.wants(&["getpid", "getpid_vmcall"]) {
        check_filter();
        check_child();
    }
    system.repeated("getpid", CALLS, |_| timed(getpid));
    if system.dune.is_some() {
        system.repeated("getpid_vmcall", CALLS, |_| timed(getpid_by_vmcall));
        system.repeated("bare_exit", CALLS, |_| timed(cpuid));
    }
    assert_eq!(getpid(), u64::from(std::process::id()));
}

#[inline(always)]
pub fn getpid() -> u64 {
    call(libc::SYS_getpid)
}

#[inline(always)]
pub fn call(number: libc::c_long) -> u64 {
    let result;
    // SAFETY: Calls without arguments that change nothing but RAX, RCX and R11.
    unsafe { asm!("syscall", inout("rax") number => result, out("rcx") _, out("r11") _, options(nostack)) };
    result
}

#[inline(always)]
fn getpid_by_vmcall() -> u64 {
    let result;
    // SAFETY: At CPL0 of Dune mode: a system call, which changes nothing but RAX.
    unsafe { asm!("vmcall", inout("rax") libc::SYS_getpid => result, options(nostack)) };
    result
}

#[inline(always)]
fn cpuid() {
    // SAFETY: RBX, which the compiler keeps for itself, is saved.
    unsafe {
        asm!("mov {0}, rbx", "cpuid", "mov rbx, {0}", out(reg) _, inout("eax") 0 => _, inout("ecx") 0 => _, out("edx") _,
             options(nomem, nostack, preserves_flags));
    }
}

/// Runs `body` in a child; it must come to its end.
fn in_child(what: &str, body: impl FnOnce()) {
    // SAFETY: The child only makes calls and ends.
    unsafe {
        let pid = libc::fork();
        assert!(pid >= 0, "fork");
        if pid == 0 {
            body();
            libc::_exit(0);
        }
        assert_eq!(end_of_child(pid), 0, "{what}");
    }
}

fn require(condition: bool) {
    if !condition {
        // SAFETY: Ends the child.
        unsafe { libc::_exit(1) };
    }
}

/// A seccomp filter decides about calls as they are made here.
fn check_filter() {
    in_child("a seccomp filter's errno is not seen", || {
        const ANSWER: u32 = libc::EXDEV as u32;
        filter(libc::SYS_getppid, libc::SECCOMP_RET_ERRNO | ANSWER, 0);
        require(call(libc::SYS_getppid) as i64 == -i64::from(ANSWER));
    });
}

/// The answer is right in a child: it is not remembered.
fn check_child() {
    let parent = getpid();
    in_child("getpid in a child", || {
        require(getpid() != parent && call(libc::SYS_getppid) == parent);
    });
}

/// Installs a filter for one call, and returns what seccomp does.
pub fn filter(call: libc::c_long, answer: u32, flags: libc::c_ulong) -> libc::c_long {
    const LOAD: u16 = 0x20;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    let op = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut program = [
        op(LOAD, 0, 0, 0),
        op(JUMP_IF_EQUAL, 0, 1, call as u32),
        op(RETURN, 0, 0, answer),
        op(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: A filter for this thread and its children.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    }
}
