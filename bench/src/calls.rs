// SPDX-License-Identifier: MIT OR Apache-2.0

//! System calls and bare exits, with the checks that nothing is answered behind Linux' back.

use core::arch::asm;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc;
use std::thread;

use libdune::Dune;

use crate::measure::timed;
use crate::measure::System;
use crate::tasks::end_of_child;

/// Repetitions of a call.
const CALLS: usize = 10_000;

pub fn measure(system: &System<'_>) {
    if system.wants(&["getpid", "getpid_vmcall"]) {
        check_filter();
        check_child();
        check_tracer();
        check_notified();
        check_count();
    }
    system.repeated("getpid", CALLS, |_| timed(getpid));
    if system.dune.is_some() {
        system.repeated("getpid_vmcall", CALLS, |_| timed(getpid_by_vmcall));
        bare_exit(system);
        assert_eq!(getpid_by_vmcall(), u64::from(std::process::id()));
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

/// The highest leaf of CPUID, which exits in Dune mode.
#[inline(always)]
pub fn cpuid() -> u32 {
    let highest;
    // SAFETY: RBX, which the compiler keeps for itself, is saved.
    unsafe {
        asm!("mov {0}, rbx", "cpuid", "mov rbx, {0}", out(reg) _, inout("eax") 0 => highest, inout("ecx") 0 => _,
             out("edx") _, options(nomem, nostack, preserves_flags));
    }
    highest
}

/// What CPUID says outside Dune mode.
static HIGHEST_LEAF: AtomicU32 = AtomicU32::new(0);

/// To be called outside Dune mode, before what is measured inside.
pub fn look_at_cpu() {
    assert!(!Dune::is_active());
    HIGHEST_LEAF.store(cpuid(), Relaxed);
}

/// Each CPUID is one exit for CPUID, with the CPU's answer.
fn bare_exit(system: &System<'_>) {
    /// Basic exit reason (SDM vol. 3, appendix C).
    const CPUID: usize = 10;
    let Some(dune) = system.dune else { return };
    let expected = HIGHEST_LEAF.load(Relaxed);
    assert_ne!(expected, 0, "what CPUID says natively");
    let exits = || dune.counters().exits[CPUID];
    let (before, mut made) = (exits(), 0);
    system.repeated("bare_exit", CALLS, |_| {
        made += 1;
        let mut answer = 0;
        let ticks = timed(|| answer = cpuid());
        assert_eq!(answer, expected, "CPUID's highest leaf");
        ticks
    });
    assert_eq!(exits() - before, made, "exits of CPUID");
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

/// A tracer sees each call twice, as it enters and as it leaves Linux.
fn check_tracer() {
    const CALLS: usize = 16;
    let (mut seen, mut answers) = (0, 0);
    // SAFETY: The child only makes calls; what is read of it is a structure of its registers.
    unsafe {
        let pid = libc::fork();
        assert!(pid >= 0, "fork");
        if pid == 0 {
            libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
            libc::raise(libc::SIGSTOP);
            (0..CALLS).for_each(|_| {
                getpid();
            });
            libc::_exit(0);
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(pid, &mut status, 0), pid);
        let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_EXITKILL;
        assert_eq!(libc::ptrace(libc::PTRACE_SETOPTIONS, pid, 0, options), 0);
        while libc::WIFSTOPPED(status) {
            assert_eq!(libc::ptrace(libc::PTRACE_SYSCALL, pid, 0, 0), 0);
            assert_eq!(libc::waitpid(pid, &mut status, 0), pid);
            if libc::WIFSTOPPED(status) && libc::WSTOPSIG(status) == libc::SIGTRAP | 0x80 {
                let mut registers: libc::user_regs_struct = core::mem::zeroed();
                assert_eq!(libc::ptrace(libc::PTRACE_GETREGS, pid, 0, &raw mut registers), 0);
                if registers.orig_rax == libc::SYS_getpid as u64 {
                    seen += 1;
                    answers += usize::from(registers.rax == pid as u64);
                }
            }
        }
        assert_eq!(status, 0, "the traced child's end");
    }
    assert_eq!(
        (seen, answers),
        (2 * CALLS, CALLS),
        "stops at, and answers of, traced calls"
    );
}

/// Linux counts the calls itself: each is told to a listener of seccomp's, no more and no fewer, and goes on.
fn check_notified() {
    const CALLS: u64 = 100;
    let (send, receive) = mpsc::channel();
    let pid = u64::from(std::process::id());
    let caller = thread::spawn(move || {
        let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
        let listener = filter(libc::SYS_getpid, libc::SECCOMP_RET_USER_NOTIF, flags);
        assert!(listener >= 0, "a listener of seccomp's");
        send.send(listener as i32).expect("the other thread waits");
        (0..CALLS).filter(|_| getpid() == pid).count() as u64
    });
    let listener = receive.recv().expect("the thread tells its listener");
    let mut told = 0;
    loop {
        let mut poll = libc::pollfd {
            fd: listener,
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: Structures of Linux' own; the fd is the listener.
        unsafe {
            assert_eq!(libc::poll(&mut poll, 1, -1), 1);
            if poll.revents & libc::POLLIN == 0 {
                // Nobody has the filter any more.
                break;
            }
            let mut ask: libc::seccomp_notif = core::mem::zeroed();
            assert_eq!(libc::ioctl(listener, NOTIF_RECV, &raw mut ask), 0);
            told += u64::from(ask.data.nr == libc::SYS_getpid as i32);
            let mut answer: libc::seccomp_notif_resp = core::mem::zeroed();
            answer.id = ask.id;
            answer.flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32;
            assert_eq!(libc::ioctl(listener, NOTIF_SEND, &raw mut answer), 0);
        }
    }
    let answered = caller.join().expect("the calls were let go on");
    // SAFETY: Ours.
    unsafe { libc::close(listener) };
    assert_eq!(
        (told, answered),
        (CALLS, CALLS),
        "calls that Linux told of, and their answers"
    );
}

/// `SECCOMP_IOCTL_NOTIF_RECV` and `..._SEND` (linux/seccomp.h).
pub const NOTIF_RECV: libc::c_ulong = 0xc050_2100;
pub const NOTIF_SEND: libc::c_ulong = 0xc018_2101;

/// Linux' own count of the calls, where the kernel has tracepoints for them.
fn check_count() {
    const CALLS: u64 = 100;
    const TRACEPOINT: u32 = 2;
    /// The first version of `struct perf_event_attr` (linux/perf_event.h): type, size, config, and no more.
    #[repr(C)]
    struct Attributes {
        kind: u32,
        size: u32,
        config: u64,
        rest: [u64; 6],
    }
    let id = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"]
        .iter()
        .find_map(|root| std::fs::read_to_string(format!("{root}/events/syscalls/sys_enter_getpid/id")).ok());
    let Some(config) = id.and_then(|text| text.trim().parse().ok()) else {
        return;
    };
    let attributes = Attributes {
        kind: TRACEPOINT,
        size: size_of::<Attributes>() as u32,
        config,
        rest: [0; 6],
    };
    // SAFETY: Counts calls of this thread on any CPU; the fd is our own.
    unsafe {
        let fd = libc::syscall(libc::SYS_perf_event_open, &raw const attributes, 0, -1, -1, 0) as i32;
        assert!(fd >= 0, "perf_event_open: {}", std::io::Error::last_os_error());
        (0..CALLS).for_each(|_| {
            getpid();
        });
        let mut count = 0u64;
        assert_eq!(libc::read(fd, (&raw mut count).cast(), 8), 8);
        assert_eq!(count, CALLS, "calls that Linux counted");
        libc::close(fd);
    }
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
