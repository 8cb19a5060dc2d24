// SPDX-License-Identifier: MIT OR Apache-2.0

//! Hooks of system calls made at CPL0.

use std::arch::asm;
use std::fs;
use std::io::ErrorKind;
use std::sync::atomic::AtomicI64;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

use libdune::hook::BounceError;
use libdune::hook::Hooks;
use libdune::hook::SystemCall;
use libdune::hook::Verdict;
use libdune::Gva;
use libdune::Hva;
use libdune::Outcome;
use libdune::Permissions;
use libdune::Thread;
use libdune::TrapFrame;
use libdune::Vector;

use crate::framework::Suite;
use crate::framework::Test;
use crate::support::assert_no_exits;
use crate::support::enter;
use crate::support::set_plain_handler;
use crate::support::spawn;
use crate::support::timer;
use crate::support::Map;
use crate::support::PAGE;
use crate::syscall::call_keeping_registers;

pub const TESTS: &[Test] = &[
    Test::asserting("hook_answers_without_an_exit", hook_answers_without_an_exit),
    Test::asserting("hook_denies_with_an_errno", hook_denies_with_an_errno),
    Test::asserting("hook_rewrites_a_call", hook_rewrites_a_call),
    Test::asserting("hook_sees_and_changes_results", hook_sees_and_changes_results),
    Test::asserting("hook_leaves_registers_alone", hook_leaves_registers_alone),
    Test::asserting("hook_may_make_calls", hook_may_make_calls),
    Test::asserting("hooks_are_inherited", hooks_are_inherited),
    Test::asserting("process_hooks_reach_all_threads", process_hooks_reach_all_threads),
    Test::asserting("signals_and_hooks_mix", signals_and_hooks_mix),
    Test::asserting("signals_at_any_point_of_a_hook", signals_at_any_point_of_a_hook)
        .suite(Suite::Long)
        .timeout_s(120),
    Test::asserting("interrupted_call_of_a_hook", interrupted_call_of_a_hook),
    Test::asserting("hook_may_fault", hook_may_fault),
    Test::asserting(
        "unhandled_fault_in_a_hook_is_reported",
        unhandled_fault_in_a_hook_is_reported,
    ),
    Test::asserting("libdune_goes_by_hooks", libdune_goes_by_hooks),
    Test::asserting("pointers_are_translated_or_bounced", pointers_are_translated_or_bounced),
];

const ANSWER: i64 = 4711;

static ASKED: AtomicU64 = AtomicU64::new(0);
static TOLD: AtomicU64 = AtomicU64::new(0);

fn call(number: i64, arguments: [u64; 6]) -> i64 {
    let [a, b, c, d, e, f] = arguments;
    let result;
    // SAFETY: the tests make calls that do no harm.
    unsafe {
        asm!(
            "syscall",
            inout("rax") number => result,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e, in("r9") f,
            out("rcx") _, out("r11") _,
        );
    }
    result
}

fn getppid() -> i64 {
    call(libc::SYS_getppid, [0; 6])
}

fn getpid() -> i64 {
    call(libc::SYS_getpid, [0; 6])
}

fn before(hook: libdune::hook::Before) -> Hooks {
    Hooks {
        before: Some(hook),
        after: None,
    }
}

fn answer_getppid(call: &mut SystemCall, _: &Thread<'_>) -> Verdict {
    ASKED.fetch_add(1, Relaxed);
    match call.number() as i64 {
        libc::SYS_getppid => Verdict::Answer(ANSWER),
        _ => Verdict::Allow,
    }
}

fn hook_answers_without_an_exit() {
    let true_pid = getpid();
    let true_parent = getppid();
    let dune = enter();
    assert_eq!(getppid(), true_parent);
    let old = dune.thread().set_hooks(before(answer_getppid));
    assert!(old.before.is_none() && old.after.is_none());
    assert_no_exits(&dune, || {
        for _ in 0..100 {
            assert_eq!(getppid(), ANSWER);
        }
    });
    // What is allowed is Linux', and all of libstd goes through the hook.
    let asked = ASKED.load(Relaxed);
    assert_eq!(getpid(), true_pid);
    assert_eq!(ASKED.load(Relaxed) - asked, 1);
    assert!(fs::read_to_string("/proc/self/stat")
        .unwrap()
        .starts_with(&true_pid.to_string()));
    assert!(ASKED.load(Relaxed) - asked > 3);
    // VMCALL of the program's goes by.
    let asked = ASKED.load(Relaxed);
    let parent: i64;
    // SAFETY: a system call without arguments.
    unsafe { asm!("vmcall", inout("rax") libc::SYS_getppid => parent) };
    assert_eq!((parent, ASKED.load(Relaxed)), (true_parent, asked));
    let old = dune.thread().set_hooks(Hooks::default());
    assert_eq!(
        old.before.map(|hook| hook as usize),
        Some(answer_getppid as *const () as usize)
    );
    assert_eq!(getppid(), true_parent);
    assert_eq!(ASKED.load(Relaxed), asked);
    dune.thread().set_hooks(before(answer_getppid));
    assert_eq!(getppid(), ANSWER);
    dune.leave();
    assert_eq!(getppid(), true_parent);
}

fn deny_files(call: &mut SystemCall, _: &Thread<'_>) -> Verdict {
    match call.number() as i64 {
        libc::SYS_openat | libc::SYS_open => Verdict::deny(libc::EACCES),
        _ => Verdict::Allow,
    }
}

fn hook_denies_with_an_errno() {
    let dune = enter();
    dune.thread().set_hooks(before(deny_files));
    let denied = fs::File::open("/proc/self/stat");
    dune.thread().set_hooks(Hooks::default());
    let allowed = fs::File::open("/proc/self/stat");
    dune.leave();
    assert_eq!(denied.unwrap_err().kind(), ErrorKind::PermissionDenied);
    assert!(allowed.is_ok());
}

const NO_CALL: i64 = 9999;

/// A number that Linux does not have becomes umask with the sum of the arguments; getppid's becomes getpid.
fn rewrite(call: &mut SystemCall, _: &Thread<'_>) -> Verdict {
    match call.number() as i64 {
        NO_CALL => {
            let sum = call.arguments().iter().sum();
            assert_eq!(call.argument(5), 6);
            call.set_number(libc::SYS_umask as u64);
            call.set_argument(0, sum);
            assert_eq!(
                (call.number() as i64, call.argument(0), call.argument(1)),
                (libc::SYS_umask, sum, 2)
            );
        }
        libc::SYS_getppid => call.set_number(libc::SYS_getpid as u64),
        _ => {}
    }
    Verdict::Allow
}

fn hook_rewrites_a_call() {
    let pid = getpid();
    let dune = enter();
    dune.thread().set_hooks(before(rewrite));
    assert_eq!(getppid(), pid);
    call(libc::SYS_umask, [0o22, 0, 0, 0, 0, 0]);
    assert_eq!(call(NO_CALL, [1, 2, 3, 4, 5, 6]), 0o22);
    dune.thread().set_hooks(Hooks::default());
    assert_eq!(call(libc::SYS_umask, [0o22, 0, 0, 0, 0, 0]), 21);
    assert_eq!(call(NO_CALL, [1, 2, 3, 4, 5, 6]), -i64::from(libc::ENOSYS));
    dune.leave();
}

static LAST_RESULT: AtomicI64 = AtomicI64::new(0);

fn add_one(call: &SystemCall, result: i64, _: &Thread<'_>) -> i64 {
    TOLD.fetch_add(1, Relaxed);
    if call.number() as i64 == libc::SYS_getpid {
        LAST_RESULT.store(result, Relaxed);
        return result + 1;
    }
    result
}

fn times_two(call: &SystemCall, result: i64, _: &Thread<'_>) -> i64 {
    if call.number() as i64 == libc::SYS_getpid {
        return result * 2;
    }
    result
}

fn hook_sees_and_changes_results() {
    let pid = getpid();
    let dune = enter();
    dune.thread().set_hooks(Hooks {
        before: Some(answer_getppid),
        after: Some(add_one),
    });
    assert_eq!(getpid(), pid + 1);
    assert_eq!(LAST_RESULT.load(Relaxed), pid);
    // What a hook answered was not made.
    let told = TOLD.load(Relaxed);
    assert_eq!(getppid(), ANSWER);
    assert_eq!(TOLD.load(Relaxed), told);
    assert_eq!(call(NO_CALL, [0; 6]), -i64::from(libc::ENOSYS));
    assert_eq!(TOLD.load(Relaxed), told + 1);
    // The thread's is told last.
    dune.thread().set_process_hooks(Hooks {
        before: None,
        after: Some(times_two),
    });
    assert_eq!(getpid(), 2 * pid + 1);
    dune.thread().set_process_hooks(Hooks::default());
    assert_eq!(getpid(), pid + 1);
    // A whole program's worth of calls, threads among them.
    let sum = std::thread::spawn(|| fs::read_to_string("/proc/self/maps").unwrap().len())
        .join()
        .unwrap();
    assert!(sum > 0);
    dune.thread().set_hooks(Hooks::default());
    dune.leave();
}

/// Changes everything that compiled code may.
fn clobber() {
    // SAFETY: what is declared.
    unsafe {
        asm!(
            "mov rdi, -1", "mov rsi, -1", "mov rdx, -1", "mov rcx, -1", "mov r8, -1", "mov r9, -1", "mov r10, -1", "mov r11, -1",
            "pcmpeqd xmm0, xmm0", "pcmpeqd xmm1, xmm1", "pcmpeqd xmm7, xmm7", "pcmpeqd xmm15, xmm15",
            "std", "cld", "stc",
            out("rdi") _, out("rsi") _, out("rdx") _, out("rcx") _, out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            out("xmm0") _, out("xmm1") _, out("xmm7") _, out("xmm15") _,
        );
    }
}

fn clobber_before(call: &mut SystemCall, _: &Thread<'_>) -> Verdict {
    clobber();
    match call.number() as i64 {
        libc::SYS_getppid => Verdict::Answer(ANSWER),
        _ => Verdict::Allow,
    }
}

fn clobber_after(_: &SystemCall, result: i64, _: &Thread<'_>) -> i64 {
    clobber();
    result
}

/// Makes a call with registers, vector registers and the red zone full; how many of the vector registers changed.
fn changed_by(number: i64) -> (i64, u64) {
    const SEED: u64 = 0x1234_5678_9abc_def0;
    let result = call_keeping_registers(number, SEED) as i64;
    let changed: u64;
    // SAFETY: a call without effect, and what is declared.
    unsafe {
        asm!(
            "movq xmm0, {seed}", "movq xmm1, {seed}", "movq xmm7, {seed}", "movq xmm15, {seed}",
            "syscall",
            "xor edi, edi",
            "movq rsi, xmm0", "xor rsi, {seed}", "or rdi, rsi",
            "movq rsi, xmm1", "xor rsi, {seed}", "or rdi, rsi",
            "movq rsi, xmm7", "xor rsi, {seed}", "or rdi, rsi",
            "movq rsi, xmm15", "xor rsi, {seed}", "or rdi, rsi",
            seed = in(reg) SEED,
            inout("rax") number => _,
            out("rdi") changed,
            out("rsi") _, out("rcx") _, out("r11") _,
            out("xmm0") _, out("xmm1") _, out("xmm7") _, out("xmm15") _,
        );
    }
    (result, changed)
}

fn hook_leaves_registers_alone() {
    let pid = getpid();
    assert_eq!(changed_by(libc::SYS_getpid), (pid, 0), "the test itself");
    let dune = enter();
    assert_eq!(changed_by(libc::SYS_getpid), (pid, 0));
    dune.thread().set_hooks(before(clobber_before));
    assert_eq!(changed_by(libc::SYS_getpid), (pid, 0), "forwarded");
    assert_eq!(changed_by(libc::SYS_getppid), (ANSWER, 0), "answered");
    dune.thread().set_hooks(Hooks {
        before: Some(clobber_before),
        after: Some(clobber_after),
    });
    assert_eq!(changed_by(libc::SYS_getpid), (pid, 0), "watched");
    dune.leave();
}

fn calling(call: &mut SystemCall, _: &Thread<'_>) -> Verdict {
    ASKED.fetch_add(1, Relaxed);
    match call.number() as i64 {
        libc::SYS_getppid => Verdict::Answer(getppid() + getpid()),
        _ => Verdict::Allow,
    }
}

fn calling_after(_: &SystemCall, result: i64, _: &Thread<'_>) -> i64 {
    TOLD.fetch_add(1, Relaxed);
    getpid();
    result
}

fn hook_may_make_calls() {
    let sum = getppid() + getpid();
    let dune = enter();
    dune.thread().set_hooks(Hooks {
        before: Some(calling),
        after: Some(calling_after),
    });
    let (asked, told) = (ASKED.load(Relaxed), TOLD.load(Relaxed));
    assert_eq!(getppid(), sum);
    assert_eq!(call(NO_CALL, [0; 6]), -i64::from(libc::ENOSYS));
    assert_eq!((ASKED.load(Relaxed) - asked, TOLD.load(Relaxed) - told), (2, 1));
    dune.leave();
}

fn hooks_are_inherited() {
    let dune = enter();
    let parent = getppid();
    dune.thread().set_hooks(before(answer_getppid));
    assert_eq!(std::thread::spawn(getppid).join().unwrap(), ANSWER);
    // SAFETY: the child only makes calls.
    let status = unsafe {
        let pid = libc::fork();
        if pid == 0 {
            libc::_exit(i32::from(getppid() != ANSWER));
        }
        let mut status = -1;
        libc::waitpid(pid, &mut status, 0);
        status
    };
    assert_eq!(status, 0);
    assert_eq!(getppid(), ANSWER);
    // Taken away, for those that follow.
    dune.thread().set_hooks(Hooks::default());
    assert_eq!(std::thread::spawn(getppid).join().unwrap(), parent);
    dune.leave();
    // Nor do they come back with another thread in the same place.
    let dune = enter();
    assert_eq!(getppid(), parent);
    dune.leave();
}

fn process_hooks_reach_all_threads() {
    static STEP: AtomicUsize = AtomicUsize::new(0);
    let wait_for = |step| {
        while STEP.load(Relaxed) < step {
            std::thread::yield_now();
        }
    };
    let dune = enter();
    let parent = getppid();
    let thread = std::thread::spawn(move || {
        let first = getppid();
        STEP.store(1, Relaxed);
        wait_for(2);
        let second = getppid();
        STEP.store(3, Relaxed);
        wait_for(4);
        [first, second, getppid()]
    });
    wait_for(1);
    dune.thread().set_process_hooks(before(answer_getppid));
    let late = std::thread::spawn(getppid).join().unwrap();
    STEP.store(2, Relaxed);
    wait_for(3);
    assert_eq!(getppid(), ANSWER);
    dune.thread().set_process_hooks(Hooks::default());
    STEP.store(4, Relaxed);
    assert_eq!(thread.join().unwrap(), [parent, ANSWER, parent]);
    assert_eq!(late, ANSWER);
    assert_eq!(getppid(), parent);
    dune.leave();
}

static TICKS: AtomicU64 = AtomicU64::new(0);
static WRONG: AtomicU64 = AtomicU64::new(0);

extern "C" fn on_tick(_: i32) {
    TICKS.fetch_add(1, Relaxed);
    // The handler's calls are hooked like any.
    if getppid() != ANSWER || changed_by(libc::SYS_getppid) != (ANSWER, 0) {
        WRONG.fetch_add(1, Relaxed);
    }
}

fn signals_and_hooks_mix() {
    mix_signals_and_hooks(30);
}

fn signals_at_any_point_of_a_hook() {
    mix_signals_and_hooks(2000);
}

/// Calls that are answered, forwarded and watched, with so many signals for each way.
fn mix_signals_and_hooks(signals: u64) {
    let pid = getpid();
    // SAFETY: the handler counts and makes calls.
    unsafe { libc::signal(libc::SIGALRM, on_tick as *const () as libc::sighandler_t) };
    let dune = enter();
    let after: [Option<libdune::hook::After>; 2] = [None, Some(clobber_after)];
    for after in after {
        dune.thread().set_hooks(Hooks {
            before: Some(clobber_before),
            after,
        });
        let until = TICKS.load(Relaxed) + signals;
        timer(libc::ITIMER_REAL, 2500);
        let mut rounds = 0;
        while TICKS.load(Relaxed) < until {
            assert_eq!(changed_by(libc::SYS_getpid), (pid, 0));
            assert_eq!(changed_by(libc::SYS_getppid), (ANSWER, 0));
            rounds += 1;
        }
        timer(libc::ITIMER_REAL, 0);
        assert!(rounds > 10);
    }
    dune.thread().set_hooks(Hooks::default());
    dune.leave();
    assert_eq!(WRONG.load(Relaxed), 0);
}

extern "C" fn only_count(_: i32) {
    TICKS.fetch_add(1, Relaxed);
}

static READS: AtomicU64 = AtomicU64::new(0);
static EINTRS: AtomicU64 = AtomicU64::new(0);

fn count_reads(call: &mut SystemCall, _: &Thread<'_>) -> Verdict {
    if call.number() as i64 == libc::SYS_read {
        READS.fetch_add(1, Relaxed);
    }
    Verdict::Allow
}

fn count_eintrs(_: &SystemCall, result: i64, _: &Thread<'_>) -> i64 {
    if result == -i64::from(libc::EINTR) {
        EINTRS.fetch_add(1, Relaxed);
    }
    result
}

/// A call that waits, watched by a hook, is interrupted or restarted as without one.
fn interrupted_call_of_a_hook() {
    let mut ends = [0; 2];
    // SAFETY: a pipe.
    unsafe {
        assert_eq!(libc::pipe(ends.as_mut_ptr()), 0);
    }
    set_plain_handler(libc::SIGALRM, only_count, 0);
    let mut byte = 0u8;
    let mut read = || call(libc::SYS_read, [ends[0] as u64, &raw mut byte as u64, 1, 0, 0, 0]);
    let dune = enter();
    for after in [None, Some(count_eintrs as libdune::hook::After)] {
        dune.thread().set_hooks(Hooks {
            before: Some(count_reads),
            after,
        });
        let (ticks, eintrs) = (TICKS.load(Relaxed), EINTRS.load(Relaxed));
        timer(libc::ITIMER_REAL, 2000);
        let interrupted = read();
        timer(libc::ITIMER_REAL, 0);
        assert_eq!(interrupted, -i64::from(libc::EINTR));
        assert!(TICKS.load(Relaxed) > ticks);
        assert_eq!(EINTRS.load(Relaxed) - eintrs, u64::from(after.is_some()));
    }
    // With SA_RESTART it goes on until there is something, and the hook sees it again each time.
    set_plain_handler(libc::SIGALRM, only_count, libc::SA_RESTART);
    let (ticks, reads, eintrs) = (TICKS.load(Relaxed), READS.load(Relaxed), EINTRS.load(Relaxed));
    let writer = std::thread::spawn(move || {
        while TICKS.load(Relaxed) < ticks + 3 {
            std::thread::yield_now();
        }
        call(libc::SYS_write, [ends[1] as u64, c"x".as_ptr() as u64, 1, 0, 0, 0])
    });
    timer(libc::ITIMER_REAL, 2000);
    let got = read();
    timer(libc::ITIMER_REAL, 0);
    assert_eq!((got, byte), (1, b'x'));
    assert_eq!(writer.join().unwrap(), 1);
    assert!(READS.load(Relaxed) > reads + 1, "restarted");
    assert_eq!(EINTRS.load(Relaxed), eintrs);
    dune.thread().set_hooks(Hooks::default());
    dune.leave();
}

static TARGET: AtomicUsize = AtomicUsize::new(0);

fn store_to_target(call: &mut SystemCall, _: &Thread<'_>) -> Verdict {
    if call.number() as i64 == libc::SYS_getppid {
        // SAFETY: the test's page; a handler makes it writable.
        unsafe { (TARGET.load(Relaxed) as *mut u64).write_volatile(5) };
        return Verdict::Answer(ANSWER);
    }
    Verdict::Allow
}

fn unprotect(frame: &mut TrapFrame, thread: &Thread<'_>) -> Outcome {
    let page = Gva::new(frame.cr2 & !(PAGE as u64 - 1)).unwrap();
    match thread.address_space().protect(page, PAGE as u64, Permissions::ALL) {
        Ok(flush) => flush.flush(),
        Err(_) => return Outcome::Unhandled,
    }
    ASKED.fetch_add(1, Relaxed);
    Outcome::Resume
}

/// Makes a hooked call that faults, in a handler.
fn call_in_handler(frame: &mut TrapFrame, _: &Thread<'_>) -> Outcome {
    let mark = std::hint::black_box([0x55u64; 64]);
    LAST_RESULT.store(getppid(), Relaxed);
    assert_eq!(std::hint::black_box(mark), [0x55; 64]);
    frame.rip += 2;
    Outcome::Resume
}

fn hook_may_fault() {
    let map = Map::new(2 * PAGE);
    map.write(0, 1);
    map.write(PAGE, 1);
    let dune = enter();
    dune.set_exception_handler(Vector::PF, unprotect);
    dune.set_exception_handler(Vector::UD, call_in_handler);
    dune.thread().set_hooks(before(store_to_target));
    let protect = |page: usize| {
        let start = Gva::new(map.page(page) as u64).unwrap();
        let space = dune.address_space();
        space.protect(start, PAGE as u64, Permissions::READ).unwrap().flush();
        TARGET.store(map.page(page), Relaxed);
    };
    let faults = ASKED.load(Relaxed);
    protect(0);
    assert_eq!(getppid(), ANSWER);
    assert_eq!((map.read(0), ASKED.load(Relaxed) - faults), (5, 1));
    // The frame and the stack of the handler that makes the call stay whole.
    protect(1);
    let (changed, after): (u64, u64);
    // SAFETY: the handler goes on behind it.
    unsafe {
        asm!("mov r12, 77", "ud2", "mov {0}, r12", "mov {1}, r12", out(reg) changed, out(reg) after, out("r12") _)
    };
    assert_eq!((changed, after), (77, 77));
    assert_eq!((LAST_RESULT.load(Relaxed), map.read(PAGE)), (ANSWER, 5));
    assert_eq!(ASKED.load(Relaxed) - faults, 2);
    dune.leave();
}

fn unhandled_fault_in_a_hook_is_reported() {
    let ended = spawn(|| {
        let dune = enter();
        // SAFETY: the handler is never called.
        unsafe { libc::signal(libc::SIGSEGV, only_count as *const () as libc::sighandler_t) };
        dune.thread().set_hooks(before(store_to_target));
        TARGET.store(8, Relaxed);
        getppid();
        unreachable!("the write went through");
    })
    .wait();
    assert_eq!(ended.signal(), Some(libc::SIGSEGV), "{ended:?}");
    let report = "dune: fatal: exception inside a handler, and no handler took it: #PF";
    assert!(ended.output.contains(report), "{ended:?}");
}

fn deny_all(call: &mut SystemCall, _: &Thread<'_>) -> Verdict {
    ASKED.fetch_add(1, Relaxed);
    match call.number() as i64 {
        libc::SYS_sched_yield => Verdict::Allow,
        _ => Verdict::deny(libc::EPERM),
    }
}

/// What libdune needs of Linux it gets: slots, page-table pages, flushes of other threads.
fn libdune_goes_by_hooks() {
    static DONE: AtomicUsize = AtomicUsize::new(0);
    const ELSEWHERE: u64 = 0xffff_a000_0000_0000;
    let map = Map::new(4 * PAGE);
    map.write(0, 1);
    let dune = enter();
    let other = std::thread::spawn(|| {
        while DONE.load(Relaxed) == 0 {
            std::hint::spin_loop();
        }
    });
    let space = dune.address_space();
    let to = Hva::new(map.address() as u64).unwrap();
    dune.thread().set_hooks(before(deny_all));
    let asked = ASKED.load(Relaxed);
    let denied = getpid();
    for gib in 0..8 {
        let start = Gva::new(ELSEWHERE + (gib << 30)).unwrap();
        space
            .map(start, 4 * PAGE as u64, to, Permissions::WRITE)
            .unwrap()
            .flush();
        space.unmap(start, 4 * PAGE as u64).unwrap().flush();
    }
    let made = ASKED.load(Relaxed) - asked;
    dune.thread().set_hooks(Hooks::default());
    DONE.store(1, Relaxed);
    other.join().unwrap();
    assert_eq!(denied, -i64::from(libc::EPERM));
    assert_eq!(made, 1, "libdune's own calls came to the hook");
    dune.leave();
}

fn pointers_are_translated_or_bounced() {
    const ELSEWHERE: u64 = 0xffff_b000_0000_0000;
    const BYTES: u64 = PAGE as u64;
    let gva = |address: u64| Gva::new(address).unwrap();
    let hva = |address: usize| Hva::new(address as u64).unwrap();
    let map = Map::new(4 * PAGE);
    map.write(0, 0x1111);
    map.write(2 * PAGE, 0x2222);
    map.write(3 * PAGE, 0x3333);
    let dune = enter();
    let space = dune.address_space();
    // Pages 2, 0, 3 of the process, in this order.
    for (index, page) in [2usize, 0, 3].into_iter().enumerate() {
        let start = gva(ELSEWHERE + index as u64 * BYTES);
        let permissions = if page == 3 {
            Permissions::READ
        } else {
            Permissions::WRITE
        };
        space
            .map(start, BYTES, hva(map.page(page)), permissions)
            .unwrap()
            .flush();
    }
    let thread = dune.thread();
    let mut buffer = vec![0u8; 2 * PAGE];
    // In one piece: where the process has it.
    let bounce = thread
        .bounce(ELSEWHERE + BYTES, 100, Permissions::WRITE, &mut [])
        .unwrap();
    assert_eq!((bounce.address(), bounce.is_copied()), (map.page(0) as u64, false));
    bounce.finish(100).unwrap();
    // Over two pages that are apart: Linux reads, and writes, a copy.
    let mut ends = [0; 2];
    // SAFETY: a pipe.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
    let last = ELSEWHERE + BYTES - 8;
    map.write(2 * PAGE + PAGE - 8, 0x4444);
    let bounce = thread.bounce(last, 16, Permissions::READ, &mut buffer).unwrap();
    assert!(bounce.is_copied());
    assert_eq!(
        call(libc::SYS_write, [ends[1] as u64, bounce.address(), 16, 0, 0, 0]),
        16
    );
    let mut words = [0u64; 2];
    assert_eq!(
        call(libc::SYS_read, [ends[0] as u64, words.as_mut_ptr() as u64, 16, 0, 0, 0]),
        16
    );
    assert_eq!(words, [0x4444, 0x1111]);
    // The pointer itself is none that Linux takes.
    let refused = call(libc::SYS_write, [ends[1] as u64, last, 16, 0, 0, 0]);
    assert_eq!(refused, -i64::from(libc::EFAULT));
    assert_eq!(
        call(
            libc::SYS_write,
            [ends[1] as u64, [7u64, 8].as_ptr() as u64, 12, 0, 0, 0]
        ),
        12
    );
    let bounce = thread.bounce(last, 16, Permissions::WRITE, &mut buffer).unwrap();
    assert_eq!(
        call(libc::SYS_read, [ends[0] as u64, bounce.address(), 16, 0, 0, 0]),
        12
    );
    bounce.finish(12).unwrap();
    assert_eq!((map.read(2 * PAGE + PAGE - 8), map.read(0)), (7, 8));
    // What may not be.
    let refused = |start, bytes, access, room| {
        let mut buffer = vec![0u8; room];
        thread.bounce(start, bytes, access, &mut buffer).unwrap_err()
    };
    let (w, r) = (Permissions::WRITE, Permissions::READ);
    let third = ELSEWHERE + 2 * BYTES;
    let not_allowed = BounceError::NotAllowed;
    assert_eq!(refused(third - 8, 16, w, PAGE), not_allowed(third));
    assert_eq!(refused(third, 1, Permissions::USER, PAGE), not_allowed(third));
    assert_eq!(refused(third + BYTES - 1, 2, r, PAGE), not_allowed(third + BYTES));
    assert_eq!(refused(u64::MAX - 3, 8, r, PAGE), not_allowed(u64::MAX - 3));
    assert_eq!(refused(last, 16, r, 15), BounceError::NoRoom { bytes: 16, room: 15 });
    let bounce = thread.bounce(last, 16, w, &mut buffer).unwrap();
    assert!(bounce.finish(17).is_err());
    dune.leave();
}
