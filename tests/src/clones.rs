// SPDX-License-Identifier: MIT OR Apache-2.0

//! The clone, clone3, fork and vfork that C libraries and runtimes other than glibc make, with their very flags, stacks and
//! ways to end, each by a bare SYSCALL from Dune mode.

use std::arch::asm;
use std::arch::global_asm;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;

use libdune::Dune;

use crate::framework::Test;
use crate::support::cs;
use crate::support::enter;
use crate::support::Map;

pub const TESTS: &[Test] = &[
    Test::asserting("clones_of_musl_are_in_dune_mode", clones_of_musl_are_in_dune_mode),
    Test::asserting("clones_of_go_are_in_dune_mode", clones_of_go_are_in_dune_mode),
];

// clone(flags, stack, parent_tid, child_tid, tls). The child pops function, argument, and a mapping that it unmaps before it ends:
// its own stack, as threads of musl do that nobody waits for.
global_asm!(
    ".pushsection .text.dune_test_raw_clone, \"ax\", @progbits",
    "dune_test_raw_clone:",
    "mov r10, rcx",
    "mov eax, 56",
    "syscall",
    "test eax, eax",
    "jz 2f",
    "ret",
    "2: xor ebp, ebp",
    "pop rax",
    "pop rdi",
    "call rax",
    "mov ebx, eax",
    "pop rdi",
    "pop rsi",
    "test rsi, rsi",
    "jz 3f",
    "mov eax, 11",
    "syscall",
    "3: mov edi, ebx",
    "mov eax, 60",
    "syscall",
    "ud2",
    ".popsection",
);

extern "C" {
    fn dune_test_raw_clone(
        flags: libc::c_int,
        stack: *mut u64,
        parent_tid: *const AtomicU32,
        child_tid: *const AtomicU32,
        tls: *const u64,
    ) -> i64;
}

const STACK: usize = 64 << 10;
const THREAD: libc::c_int = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM;

/// What a child writes. Each word is there before it says that it is done.
#[derive(Default)]
struct Seen {
    cs: AtomicU64,
    fs: AtomicU64,
    tid: AtomicU64,
    done: AtomicU64,
    /// The child sets its TLS to that itself.
    wants_fs: AtomicU64,
}

/// A call without memory of ours, and without errno: the child may have no TLS that libc knows.
fn call(number: libc::c_long, first: u64, second: u64) -> u64 {
    let result;
    // SAFETY: by the callers, no memory of ours is named.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as u64 => result,
            in("rdi") first,
            in("rsi") second,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    result
}

/// The first word behind FS.
fn fs_word() -> u64 {
    let word;
    // SAFETY: every TLS block here has its own address there.
    unsafe { asm!("mov {}, fs:[0]", out(reg) word, options(nostack, readonly)) };
    word
}

extern "C" fn child(seen: &Seen) -> i32 {
    const ARCH_SET_FS: u64 = 0x1002;
    let wants_fs = seen.wants_fs.load(SeqCst);
    if wants_fs != 0 {
        call(libc::SYS_arch_prctl, ARCH_SET_FS, wants_fs);
    }
    seen.cs.store(cs().into(), SeqCst);
    seen.fs.store(fs_word(), SeqCst);
    seen.tid.store(call(libc::SYS_gettid, 0, 0), SeqCst);
    seen.done.store(1, SeqCst);
    7
}

/// The stack of a child that runs [`child`]; `unmaps`: it unmaps it when it ends.
fn prepare(stack: *mut u8, seen: &Seen, unmaps: bool) -> *mut u64 {
    let words = [
        child as *const () as u64,
        seen as *const Seen as u64,
        stack as u64,
        if unmaps { STACK as u64 } else { 0 },
    ];
    // SAFETY: at the end of a mapping of that size, which is the child's alone.
    unsafe {
        let top = stack.add(STACK - size_of_val(&words)).cast::<[u64; 4]>();
        top.write(words);
        top.cast()
    }
}

/// A TLS block: its own address first.
fn tls_block() -> Box<[u64; 64]> {
    let mut block = Box::new([0; 64]);
    block[0] = block.as_ptr() as u64;
    block
}

fn wait_for(pid: i64) -> i32 {
    let mut status = -1;
    // SAFETY: our own child.
    assert_eq!(i64::from(unsafe { libc::waitpid(pid as i32, &mut status, 0) }), pid);
    assert!(libc::WIFEXITED(status), "{status:#x}");
    libc::WEXITSTATUS(status)
}

#[track_caller]
fn assert_in_dune_mode(seen: &Seen, tid: i64) {
    assert_eq!(seen.cs.load(SeqCst) & 3, 0, "the child is not at CPL0");
    assert_eq!(seen.tid.load(SeqCst) as i64, tid);
    assert!(Dune::is_active());
}

fn clones_of_musl_are_in_dune_mode() {
    // Without a meaning since Linux 2.6; musl sets it.
    const CLONE_DETACHED: libc::c_int = 0x40_0000;
    let dune = enter();
    for round in 0..5 {
        // pthread_create, and the end of a detached thread.
        let seen = Seen::default();
        let stack = Map::new(STACK).into_start();
        let tls = tls_block();
        let (parent_tid, child_tid) = (AtomicU32::new(0), AtomicU32::new(1));
        let flags =
            THREAD | CLONE_DETACHED | libc::CLONE_SETTLS | libc::CLONE_PARENT_SETTID | libc::CLONE_CHILD_CLEARTID;
        // SAFETY: stack, TLS and words are the child's until its tid is cleared.
        let tid = unsafe {
            dune_test_raw_clone(
                flags,
                prepare(stack, &seen, true),
                &parent_tid,
                &child_tid,
                tls.as_ptr(),
            )
        };
        assert!(tid > 0, "{tid}");
        assert_eq!(i64::from(parent_tid.load(SeqCst)), tid);
        while child_tid.load(SeqCst) != 0 {
            // SAFETY: our own word.
            unsafe { libc::syscall(libc::SYS_futex, &raw const child_tid, libc::FUTEX_WAIT, 1, 0) };
        }
        assert_in_dune_mode(&seen, tid);
        assert_eq!(seen.fs.load(SeqCst), tls[0], "round {round}");
        // Its stack has gone: the address is free.
        drop(Map::at(stack as usize, STACK, libc::PROT_READ, 0));

        // posix_spawn: on a stack in the maker's frame, which waits.
        let seen = Seen::default();
        let stack = Map::new(STACK);
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        let none = std::ptr::null();
        // SAFETY: as above, until it ends.
        let pid = unsafe { dune_test_raw_clone(flags, prepare(stack.start, &seen, false), none, none, none.cast()) };
        assert!(pid > 0, "{pid}");
        assert_eq!(seen.done.load(SeqCst), 1, "the maker did not wait");
        assert_eq!(wait_for(pid), 7);
        assert_in_dune_mode(&seen, pid);

        // fork, and vfork as its own call.
        // SAFETY: the child ends at once.
        let pid = unsafe { libc::syscall(libc::SYS_fork) };
        if pid == 0 {
            call(libc::SYS_exit_group, 20 + u64::from(cs() & 3), 0);
        }
        assert_eq!(wait_for(pid), 20);
        assert_eq!(wait_for(ends_at_once(libc::SYS_vfork as u64, [0; 5])), 30);
    }
    assert!(Dune::is_active());
    dune.leave();
}

/// A call that makes a child on the maker's own stack, which it does not use: it ends with 30 and its privilege level.
fn ends_at_once(number: u64, arguments: [u64; 5]) -> i64 {
    let pid: i64;
    // SAFETY: the child uses nothing but registers.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "mov edi, cs",
            "and edi, 3",
            "add edi, 30",
            "mov eax, 231",
            "syscall",
            "ud2",
            "2:",
            inlateout("rax") number => pid,
            inlateout("rdi") arguments[0] => _,
            in("rsi") arguments[1],
            in("rdx") arguments[2],
            in("r10") arguments[3],
            in("r8") arguments[4],
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    assert!(pid > 0, "{pid}");
    pid
}

fn clones_of_go_are_in_dune_mode() {
    let dune = enter();
    let none = std::ptr::null();
    for round in 0..5 {
        // A thread of the runtime: its TLS by the call, or by itself, which is older.
        for by_call in [false, true] {
            let seen = Seen::default();
            let stack = Map::new(STACK);
            let tls = tls_block();
            let mut flags = THREAD;
            if by_call {
                flags |= libc::CLONE_SETTLS;
            } else {
                seen.wants_fs.store(tls[0], SeqCst);
            }
            // SAFETY: stack, TLS and words are the child's until it has gone.
            let tid =
                unsafe { dune_test_raw_clone(flags, prepare(stack.start, &seen, false), none, none, tls.as_ptr()) };
            assert!(tid > 0, "{tid}");
            while std::fs::exists(format!("/proc/self/task/{tid}")).unwrap() {
                std::thread::yield_now();
            }
            assert_eq!(seen.done.load(SeqCst), 1);
            assert_in_dune_mode(&seen, tid);
            assert_eq!(seen.fs.load(SeqCst), tls[0], "round {round}, by the call: {by_call}");
        }

        // os/exec: the child is on the maker's stack; by clone, with a pidfd, and by clone3.
        let mut pidfd = -1i32;
        let flags = (libc::CLONE_VM | libc::CLONE_VFORK) as u64;
        let exits = libc::SIGCHLD as u64;
        assert_eq!(
            wait_for(ends_at_once(libc::SYS_clone as u64, [flags | exits, 0, 0, 0, 0])),
            30
        );
        let wants = flags | exits | libc::CLONE_PIDFD as u64;
        let pid = ends_at_once(libc::SYS_clone as u64, [wants, 0, &raw mut pidfd as u64, 0, 0]);
        assert_eq!(wait_for(pid), 30);
        assert!(pidfd > 2, "{pidfd}");
        // SAFETY: the fd is ours.
        assert_eq!(unsafe { libc::close(pidfd) }, 0);
        // flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls (linux/sched.h)
        let arguments = [flags, 0, 0, 0, exits, 0, 0, 0];
        let pid = ends_at_once(
            libc::SYS_clone3 as u64,
            [arguments.as_ptr() as u64, size_of_val(&arguments) as u64, 0, 0, 0],
        );
        assert_eq!(wait_for(pid), 30);
    }
    assert!(Dune::is_active());
    dune.leave();
}
