// SPDX-License-Identifier: MIT OR Apache-2.0

//! `int 0x80` from Dune mode: the i386 call, where the kernel has those, else SIGSEGV.

use std::arch::asm;
use std::ptr;
use std::sync::atomic::AtomicI32;
use std::sync::atomic::Ordering::SeqCst;

use libdune::Dune;

use crate::framework::Test;
use crate::support::enter;
use crate::support::set_handler;
use crate::support::spawn;
use crate::support::Shared;

pub const TESTS: &[Test] = &[
    Test::asserting("int_0x80_is_what_it_is_natively", int_0x80_is_what_it_is_natively),
    Test::asserting("int_0x80_keeps_registers", int_0x80_keeps_registers),
    Test::asserting("int_0x80_waits_and_is_interrupted", int_0x80_waits_and_is_interrupted),
    Test::asserting(
        "int_0x80_may_not_harm_the_host_loop",
        int_0x80_may_not_harm_the_host_loop,
    ),
    Test::asserting("int_0x80_ends_thread_and_process", int_0x80_ends_thread_and_process),
    Test::asserting("int_0x80_with_sigsegv_blocked", int_0x80_with_sigsegv_blocked),
];

/// i386 numbers.
const EXIT: u32 = 1;
const FORK: u32 = 2;
const READ: u32 = 3;
const WRITE: u32 = 4;
const CLOSE: u32 = 6;
const GETPID: u32 = 20;
const PAUSE: u32 = 29;
const DUP2: u32 = 63;
const GETPPID: u32 = 64;
const PRCTL: u32 = 172;
const SIGALTSTACK: u32 = 186;
const RT_SIGACTION: u32 = 174;
const EXIT_GROUP: u32 = 252;

/// The i386 call; what RAX is behind it.
fn int80(number: u32, first: u64, second: u64, third: u64) -> i64 {
    let result: i64;
    // SAFETY: the tests make calls that are harmless, or end what makes them.
    unsafe {
        asm!(
            "xchg rbx, {first}", "int 0x80", "xchg rbx, {first}",
            first = inout(reg) first => _,
            inout("rax") u64::from(number) => result,
            in("rcx") second, in("rdx") third,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    result
}

/// Memory below 4 GiB, which i386 calls can name.
fn low_page() -> *mut u8 {
    // SAFETY: a new mapping.
    let page = unsafe {
        libc::mmap(
            ptr::null_mut(),
            4096,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT,
            -1,
            0,
        )
    };
    assert_ne!(page, libc::MAP_FAILED);
    page.cast()
}

/// Whether this kernel makes i386 calls for 64-bit programs, seen natively.
fn is_there() -> bool {
    let ended = spawn(|| assert_eq!(int80(GETPID, 0, 0, 0), i64::from(std::process::id()))).wait();
    match ended.signal() {
        Some(signal) => assert_eq!(signal, libc::SIGSEGV, "{ended:?}"),
        None => ended.assert_success(),
    }
    ended.signal().is_none()
}

static SIGNAL: AtomicI32 = AtomicI32::new(0);
static CODE: AtomicI32 = AtomicI32::new(0);

extern "C" fn skip(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::ucontext_t) {
    assert!(Dune::is_active());
    SIGNAL.store(signal, SeqCst);
    // SAFETY: Linux' arguments; the instruction has two bytes.
    unsafe {
        CODE.store((*info).si_code, SeqCst);
        if signal == libc::SIGSEGV {
            (*context).uc_mcontext.gregs[libc::REG_RIP as usize] += 2;
        }
    }
}

fn int_0x80_is_what_it_is_natively() {
    const SI_KERNEL: i32 = 0x80;
    let is_there = is_there();
    println!("report: i386 calls: {is_there}");
    let dune = enter();
    set_handler(libc::SIGSEGV, skip, 0, &[]);
    let parent = std::os::unix::process::parent_id();
    if is_there {
        for _ in 0..10 {
            assert_eq!(int80(GETPID, 0, 0, 0), i64::from(std::process::id()));
            assert_eq!(int80(GETPPID, 0, 0, 0), i64::from(parent));
        }
        assert_eq!(int80(9999, 0, 0, 0), -i64::from(libc::ENOSYS));
        let mut pipe = [0; 2];
        // SAFETY: two fds; a page of our own.
        unsafe {
            assert_eq!(libc::pipe(pipe.as_mut_ptr()), 0);
            let text = low_page();
            text.copy_from(c"abc".as_ptr().cast(), 4);
            assert_eq!(int80(WRITE, pipe[1] as u64, text as u64, 4), 4);
            assert_eq!(int80(READ, pipe[0] as u64, text as u64 + 100, 100), 4);
            assert_eq!(std::slice::from_raw_parts(text.add(100), 4), b"abc\0");
            // Addresses are cut to 32 bits, as natively.
            assert_eq!(int80(WRITE, pipe[1] as u64, text as u64 | 1 << 40, 4), 4);
        }
        assert_eq!(SIGNAL.load(SeqCst), 0);
    } else {
        assert_eq!(int80(GETPID, 0, 0, 0), i64::from(GETPID));
        assert_eq!(SIGNAL.swap(0, SeqCst), libc::SIGSEGV);
        assert_eq!(CODE.load(SeqCst), SI_KERNEL);
        // Calls that the host loop would answer itself are refused just so.
        assert_eq!(int80(FORK, 0, 0, 0), i64::from(FORK));
        assert_eq!(SIGNAL.swap(0, SeqCst), libc::SIGSEGV);
    }
    assert!(Dune::is_active());
    dune.leave();
}

fn int_0x80_keeps_registers() {
    if !is_there() {
        return int_0x80_is_what_it_is_natively();
    }
    let dune = enter();
    let (mut rcx, mut rdx, mut rsi, mut rdi) = (0x1111_2222_3333u64, 0x4444u64, 0x5555_0000_0000u64, 0x6666u64);
    let (mut r12, mut r13, mut rbp) = (0x7777u64, 0x8888_9999_aaaau64, 0xbbbbu64);
    let rsp: u64;
    let result: i64;
    // SAFETY: getpid; RBP is put back.
    unsafe {
        asm!(
            "push rbp", "mov rbp, {rbp}", "mov {rsp}, rsp", "int 0x80", "sub {rsp}, rsp", "mov {rbp}, rbp", "pop rbp",
            rbp = inout(reg) rbp, rsp = out(reg) rsp,
            inout("rax") u64::from(GETPID) => result,
            inout("rcx") rcx, inout("rdx") rdx, inout("rsi") rsi, inout("rdi") rdi, inout("r12") r12, inout("r13") r13,
        );
    }
    assert_eq!(result, i64::from(std::process::id()));
    assert_eq!(
        (rcx, rdx, rsi, rdi),
        (0x1111_2222_3333, 0x4444, 0x5555_0000_0000, 0x6666)
    );
    assert_eq!((r12, r13, rbp, rsp), (0x7777, 0x8888_9999_aaaa, 0xbbbb, 0));
    assert!(Dune::is_active());
    dune.leave();
}

/// A call that waits: a handler ends it with EINTR, or it goes on behind the handler (SA_RESTART).
fn int_0x80_waits_and_is_interrupted() {
    if !is_there() {
        return int_0x80_is_what_it_is_natively();
    }
    let mut pipe = [0; 2];
    // SAFETY: two fds into an array of two.
    assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
    let shared = Shared::new();
    let child = spawn(|| {
        let _dune = enter();
        let page = low_page();
        set_handler(libc::SIGUSR1, skip, 0, &[]);
        set_handler(libc::SIGUSR2, skip, libc::SA_RESTART, &[]);
        shared.word(0).store(1, SeqCst);
        assert_eq!(int80(PAUSE, 0, 0, 0), -i64::from(libc::EINTR));
        assert_eq!(SIGNAL.swap(0, SeqCst), libc::SIGUSR1);
        shared.word(0).store(2, SeqCst);
        assert_eq!(int80(READ, pipe[0] as u64, page as u64, 1), 1);
        assert_eq!(SIGNAL.swap(0, SeqCst), libc::SIGUSR2);
        // SAFETY: our own page.
        assert_eq!(unsafe { page.read() }, b'x');
        assert!(Dune::is_active());
        shared.word(0).store(3, SeqCst);
    });
    let wait = |value: u64| {
        while shared.word(0).load(SeqCst) != value {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    };
    wait(1);
    child.kill(libc::SIGUSR1);
    wait(2);
    child.kill(libc::SIGUSR2);
    std::thread::sleep(std::time::Duration::from_millis(50));
    // SAFETY: one byte.
    assert_eq!(unsafe { libc::write(pipe[1], c"x".as_ptr().cast(), 1) }, 1);
    child.wait().assert_success();
    assert_eq!(shared.word(0).load(SeqCst), 3);
}

fn int_0x80_may_not_harm_the_host_loop() {
    if !is_there() {
        return int_0x80_is_what_it_is_natively();
    }
    const PR_SET_SYSCALL_USER_DISPATCH: u64 = 59;
    let dune = enter();
    let pid = std::process::id();
    for call in [FORK, 120, 190, 435, 48, 67, RT_SIGACTION, 119, 173, SIGALTSTACK, 243] {
        assert_eq!(int80(call, 11, 0, 0), -i64::from(libc::ENOSYS), "{call}");
        assert_eq!(std::process::id(), pid);
    }
    let fds = crate::syscall::device_fds();
    assert_eq!(int80(CLOSE, fds[0] as u64, 0, 0), -i64::from(libc::EBADF));
    assert_eq!(int80(DUP2, 0, fds[0] as u64, 0), -i64::from(libc::EBUSY));
    // close_range
    assert_eq!(int80(436, 100, u64::from(u32::MAX), 0), 0);
    assert_eq!(crate::syscall::device_fds(), fds);
    let einval = -i64::from(libc::EINVAL);
    const NO_MODE: u64 = 77;
    assert_eq!(int80(PRCTL, PR_SET_SYSCALL_USER_DISPATCH, NO_MODE, 0), einval);
    // What is harmless of the same calls is Linux' to answer.
    assert_eq!(int80(PRCTL, libc::PR_GET_DUMPABLE as u64, 0, 0), 1);
    assert_eq!(int80(CLOSE, 9999, 0, 0), -i64::from(libc::EBADF));
    // SAFETY: fd 0 is open.
    let copy = unsafe { libc::dup(0) };
    assert_eq!(int80(CLOSE, copy as u64, 0, 0), 0);
    assert!(Dune::is_active());
    dune.leave();
}

fn int_0x80_ends_thread_and_process() {
    if !is_there() {
        return int_0x80_is_what_it_is_natively();
    }
    for call in [EXIT, EXIT_GROUP] {
        let ended = spawn(|| {
            let _dune = enter();
            int80(call, 7, 0, 0);
        })
        .wait();
        assert!(
            libc::WIFEXITED(ended.status) && libc::WEXITSTATUS(ended.status) == 7,
            "{ended:?}"
        );
    }
    // A thread that ends so leaves the others alone.
    spawn(|| {
        let dune = enter();
        for _ in 0..20 {
            // SAFETY: waits for the thread that the clone makes, which only ends.
            unsafe {
                let mut thread: libc::pthread_t = 0;
                extern "C" fn end(_: *mut libc::c_void) -> *mut libc::c_void {
                    int80(EXIT, 0, 0, 0);
                    ptr::null_mut()
                }
                assert_eq!(libc::pthread_create(&mut thread, ptr::null(), end, ptr::null_mut()), 0);
                assert_eq!(libc::pthread_join(thread, ptr::null_mut()), 0);
            }
        }
        assert!(Dune::is_active());
        dune.leave();
    })
    .wait()
    .assert_success();
}

/// The refusal of a kernel without i386 calls would kill a program that blocks its signal, but only then.
fn int_0x80_with_sigsegv_blocked() {
    let is_there = is_there();
    let ended = spawn(|| {
        let _dune = enter();
        // SAFETY: a mask of our own.
        unsafe {
            let mut mask: libc::sigset_t = std::mem::zeroed();
            libc::sigaddset(&mut mask, libc::SIGSEGV);
            libc::sigprocmask(libc::SIG_BLOCK, &mask, ptr::null_mut());
            assert_eq!(int80(GETPPID, 0, 0, 0), i64::from(libc::getppid()));
            let mut now: libc::sigset_t = std::mem::zeroed();
            libc::sigprocmask(libc::SIG_BLOCK, ptr::null(), &mut now);
            assert_eq!(libc::sigismember(&now, libc::SIGSEGV), 1);
        }
        assert!(Dune::is_active());
    })
    .wait();
    if is_there {
        ended.assert_success();
    } else {
        assert_eq!(ended.signal(), Some(libc::SIGSEGV), "{ended:?}");
    }
}
