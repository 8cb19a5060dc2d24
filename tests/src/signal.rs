// SPDX-License-Identifier: MIT OR Apache-2.0

//! Signals: the program's handlers run in Dune mode, and everything around them is as Linux has it.

use std::arch::asm;
use std::io;
use std::sync::atomic::AtomicI32;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;
use std::time::Instant;

use libdune::Dune;
use libdune::Vector;

use crate::framework::Test;
use crate::support::compute;
use crate::support::enter;
use crate::support::install_signal_probe;
use crate::support::load;
use crate::support::queue_signal;
use crate::support::set_handler;
use crate::support::set_timer;
use crate::support::spawn;
use crate::support::spawn_spinning;
use crate::support::step_over;
use crate::support::stepped_over;
use crate::support::timer;
use crate::support::Map;
use crate::support::Shared;
use crate::support::PAGE;

pub const TESTS: &[Test] = &[
    Test::asserting("handlers_run_in_dune_mode", handlers_run_in_dune_mode),
    Test::asserting("handler_sees_and_changes_registers", handler_sees_and_changes_registers),
    Test::asserting("red_zone_and_fpu_survive_signals", red_zone_and_fpu_survive_signals),
    Test::asserting("masks_and_nesting_are_linux_own", masks_and_nesting_are_linux_own),
    Test::asserting("alternate_stack_is_used", alternate_stack_is_used),
    Test::asserting("stack_overflow_is_told_by_std", stack_overflow_is_told_by_std),
    Test::asserting("handler_may_jump_out", handler_may_jump_out),
    Test::asserting("no_signal_is_lost_before_a_call", no_signal_is_lost_before_a_call),
    Test::asserting(
        "signals_in_the_middle_of_exceptions",
        signals_in_the_middle_of_exceptions,
    ),
    Test::asserting("signals_during_enter_and_leave", signals_during_enter_and_leave),
    Test::asserting(
        "faults_become_signals_with_true_siginfo",
        faults_become_signals_with_true_siginfo,
    ),
    Test::asserting("fault_handler_may_mend_and_return", fault_handler_may_mend_and_return),
    Test::asserting("stop_and_continue", stop_and_continue),
    Test::asserting(
        "default_action_ends_a_spinning_guest",
        default_action_ends_a_spinning_guest,
    ),
    Test::asserting("ignored_signals_do_not_disturb", ignored_signals_do_not_disturb),
    Test::asserting("actions_are_the_programs_own", actions_are_the_programs_own),
    Test::asserting("signals_between_threads", signals_between_threads),
    Test::asserting(
        "children_outside_have_the_programs_handlers",
        children_outside_have_the_programs_handlers,
    ),
    Test::asserting("queued_signals_all_arrive", queued_signals_all_arrive).timeout_s(60),
    Test::asserting(
        "actions_hold_while_threads_come_and_go",
        actions_hold_while_threads_come_and_go,
    )
    .timeout_s(60),
    Test::asserting("ordinary_threads_take_signals_too", ordinary_threads_take_signals_too),
    Test::asserting("sigchld_sigwait_and_signalfd", sigchld_sigwait_and_signalfd),
    Test::asserting("virtual_timer_counts_the_guest", virtual_timer_counts_the_guest),
    Test::asserting("signals_in_children", signals_in_children),
];

static COUNT: AtomicU64 = AtomicU64::new(0);
static OUTSIDE: AtomicU64 = AtomicU64::new(0);
static LAST_CODE: AtomicI32 = AtomicI32::new(0);
static LAST_ADDRESS: AtomicU64 = AtomicU64::new(0);
static LAST_RIP: AtomicU64 = AtomicU64::new(0);
static LAST_SIGNAL: AtomicI32 = AtomicI32::new(0);

fn reset() {
    for word in [&COUNT, &OUTSIDE, &LAST_ADDRESS, &LAST_RIP] {
        word.store(0, SeqCst);
    }
    LAST_CODE.store(0, SeqCst);
    LAST_SIGNAL.store(0, SeqCst);
}

/// Notes everything, and spoils the FPU state.
extern "C" fn note(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::ucontext_t) {
    if !Dune::is_active() {
        OUTSIDE.fetch_add(1, Relaxed);
    }
    // SAFETY: Linux' or libdune's arguments.
    unsafe {
        LAST_SIGNAL.store(signal, Relaxed);
        LAST_CODE.store((*info).si_code, Relaxed);
        LAST_ADDRESS.store((*info).si_addr() as u64, Relaxed);
        LAST_RIP.store((*context).uc_mcontext.gregs[libc::REG_RIP as usize] as u64, Relaxed);
        asm!(
            "pcmpeqd xmm0, xmm0", "pcmpeqd xmm6, xmm6", "pcmpeqd xmm13, xmm13", "fninit",
            out("xmm0") _, out("xmm6") _, out("xmm13") _,
        );
    }
    COUNT.fetch_add(1, SeqCst);
}

fn handlers_run_in_dune_mode() {
    reset();
    set_handler(libc::SIGUSR1, note, 0, &[]);
    let dune = enter();
    // Set before and after entering.
    set_handler(libc::SIGUSR2, note, 0, &[]);
    for (round, signal) in [libc::SIGUSR1, libc::SIGUSR2].into_iter().cycle().take(40).enumerate() {
        // SAFETY: a signal to ourselves.
        unsafe { libc::raise(signal) };
        assert_eq!(COUNT.load(SeqCst), round as u64 + 1);
        assert_eq!(LAST_SIGNAL.load(Relaxed), signal);
        assert_eq!(LAST_CODE.load(Relaxed), libc::SI_TKILL);
    }
    assert_eq!(OUTSIDE.load(Relaxed), 0, "a handler ran outside Dune mode");
    assert!(Dune::is_active());
    dune.leave();
    // SAFETY: a signal to ourselves.
    unsafe { libc::raise(libc::SIGUSR2) };
    assert_eq!((COUNT.load(SeqCst), OUTSIDE.load(Relaxed)), (41, 1));
}

extern "C" fn set_rax(_: i32, _: *mut libc::siginfo_t, context: *mut libc::ucontext_t) {
    // SAFETY: libdune's ucontext.
    unsafe {
        let registers = &mut (*context).uc_mcontext.gregs;
        registers[libc::REG_RAX as usize] = registers[libc::REG_R15 as usize] + 1;
        LAST_RIP.store(registers[libc::REG_RIP as usize] as u64, Relaxed);
    }
}

fn handler_sees_and_changes_registers() {
    let dune = enter();
    set_handler(libc::SIGALRM, set_rax, 0, &[]);
    for round in 0..5u64 {
        timer(libc::ITIMER_REAL, 5000);
        let (rax, r14, r15, start, end): (u64, u64, u64, u64, u64);
        // SAFETY: spins until the handler changes RAX; R14 and R15 are not touched.
        unsafe {
            asm!(
                "lea {start}, [rip + 2f]",
                "lea {end}, [rip + 3f]",
                "2:",
                "cmp rax, rcx",
                "je 2b",
                "3:",
                start = out(reg) start,
                end = out(reg) end,
                inlateout("rax") 0u64 => rax,
                in("rcx") 0u64,
                inlateout("r14") round ^ 0x1234_5678_9abc_def0 => r14,
                inlateout("r15") round << 32 | 0x77 => r15,
            );
        }
        timer(libc::ITIMER_REAL, 0);
        assert_eq!(rax, (round << 32 | 0x77) + 1);
        assert_eq!(r14, round ^ 0x1234_5678_9abc_def0);
        assert_eq!(r15, round << 32 | 0x77);
        let rip = LAST_RIP.load(Relaxed);
        assert!(
            (start..end).contains(&rip),
            "{start:#x}..{end:#x} does not hold {rip:#x}"
        );
    }
    dune.leave();
}

fn red_zone_and_fpu_survive_signals() {
    reset();
    let dune = enter();
    set_handler(libc::SIGALRM, note, 0, &[]);
    timer(libc::ITIMER_REAL, 2500);
    let mut rounds = 0u64;
    while COUNT.load(SeqCst) < 60 {
        let bad: u64;
        // SAFETY: uses the red zone, which the compiler leaves alone: this asm pushes nothing and says nothing of it.
        unsafe {
            asm!(
                "mov r8, 0x0123456789abcdef",
                "movq xmm0, r8",
                "movq xmm6, r8",
                "movq xmm13, r8",
                "fldpi",
                "xor {bad:e}, {bad:e}",
                "mov ecx, 20000",
                "2:",
                "mov [rsp - 8], rcx",
                "mov [rsp - 64], r8",
                "mov [rsp - 128], r8",
                "movq r9, xmm0",
                "cmp r9, r8",
                "jne 3f",
                "movq r9, xmm6",
                "cmp r9, r8",
                "jne 3f",
                "movq r9, xmm13",
                "cmp r9, r8",
                "jne 3f",
                "cmp [rsp - 64], r8",
                "jne 3f",
                "cmp [rsp - 128], r8",
                "jne 3f",
                "cmp [rsp - 8], rcx",
                "jne 3f",
                "dec ecx",
                "jnz 2b",
                "fldpi",
                "fucomip st, st(1)",
                "jne 3f",
                "jp 3f",
                "jmp 4f",
                "3:",
                "mov {bad:e}, 1",
                "4:",
                "fninit",
                bad = out(reg) bad,
                out("rcx") _, out("r8") _, out("r9") _,
                out("xmm0") _, out("xmm6") _, out("xmm13") _,
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
            );
        }
        assert_eq!(bad, 0, "round {rounds}, after {} signals", COUNT.load(SeqCst));
        rounds += 1;
    }
    timer(libc::ITIMER_REAL, 0);
    assert_eq!(OUTSIDE.load(Relaxed), 0);
    dune.leave();
}

static ORDER: [AtomicI32; 16] = [const { AtomicI32::new(0) }; 16];
static NEXT: AtomicU64 = AtomicU64::new(0);

fn happened(what: i32) {
    ORDER[NEXT.fetch_add(1, SeqCst) as usize].store(what, SeqCst);
}

fn events() -> Vec<i32> {
    let count = NEXT.swap(0, SeqCst) as usize;
    ORDER[..count].iter().map(|event| event.load(SeqCst)).collect()
}

extern "C" fn raise_two(_: i32, _: *mut libc::siginfo_t, _: *mut libc::ucontext_t) {
    happened(1);
    // SAFETY: a signal to ourselves.
    unsafe { libc::raise(libc::SIGUSR2) };
    happened(2);
}

extern "C" fn second(_: i32, _: *mut libc::siginfo_t, _: *mut libc::ucontext_t) {
    happened(10);
}

extern "C" fn recurse(_: i32, _: *mut libc::siginfo_t, _: *mut libc::ucontext_t) {
    let depth = COUNT.fetch_add(1, SeqCst);
    happened(20 + depth as i32);
    if depth < 3 {
        // SAFETY: a signal to ourselves.
        unsafe { libc::raise(libc::SIGUSR1) };
    }
    happened(30 + depth as i32);
}

fn blocked(signal: i32) -> bool {
    // SAFETY: asks for the mask.
    unsafe {
        let mut mask: libc::sigset_t = std::mem::zeroed();
        libc::sigprocmask(libc::SIG_BLOCK, std::ptr::null(), &mut mask);
        libc::sigismember(&mask, signal) == 1
    }
}

fn masks_and_nesting_are_linux_own() {
    reset();
    let dune = enter();
    let raise = |signal| {
        // SAFETY: a signal to ourselves.
        unsafe { libc::raise(signal) }
    };
    set_handler(libc::SIGUSR2, second, 0, &[]);
    set_handler(libc::SIGUSR1, raise_two, 0, &[]);
    raise(libc::SIGUSR1);
    assert_eq!(events(), [1, 10, 2], "nested");
    set_handler(libc::SIGUSR1, raise_two, 0, &[libc::SIGUSR2]);
    raise(libc::SIGUSR1);
    assert_eq!(events(), [1, 2, 10], "masked by sa_mask");
    assert!(
        !blocked(libc::SIGUSR1) && !blocked(libc::SIGUSR2),
        "the mask comes back"
    );

    set_handler(libc::SIGUSR1, recurse, libc::SA_NODEFER, &[]);
    raise(libc::SIGUSR1);
    assert_eq!(events(), [20, 21, 22, 23, 33, 32, 31, 30], "SA_NODEFER");
    reset();
    set_handler(libc::SIGUSR1, recurse, 0, &[]);
    raise(libc::SIGUSR1);
    assert_eq!(events(), [20, 30, 21, 31, 22, 32, 23, 33], "without it");

    set_handler(libc::SIGUSR2, second, libc::SA_RESETHAND, &[]);
    raise(libc::SIGUSR2);
    assert_eq!(events(), [10]);
    // SAFETY: asks for the action.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(libc::SIGUSR2, std::ptr::null(), &mut action);
        assert_eq!(action.sa_sigaction, libc::SIG_DFL, "SA_RESETHAND");

        // Blocked by the program: comes when it is unblocked, real-time signals in order and all of them.
        let mut mask: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&mut mask, libc::SIGRTMIN());
        libc::sigprocmask(libc::SIG_BLOCK, &mask, std::ptr::null_mut());
        set_handler(libc::SIGRTMIN(), second, 0, &[]);
        for _ in 0..3 {
            raise(libc::SIGRTMIN());
        }
        assert_eq!(events(), []);
        let mut pending: libc::sigset_t = std::mem::zeroed();
        libc::sigpending(&mut pending);
        assert_eq!(libc::sigismember(&pending, libc::SIGRTMIN()), 1);
        libc::sigprocmask(libc::SIG_UNBLOCK, &mask, std::ptr::null_mut());
        assert_eq!(events(), [10, 10, 10]);
    }
    dune.leave();
}

static STACK_SEEN: AtomicU64 = AtomicU64::new(0);
static EPERM_SEEN: AtomicI32 = AtomicI32::new(0);

extern "C" fn on_stack(_: i32, _: *mut libc::siginfo_t, context: *mut libc::ucontext_t) {
    let here = 0u8;
    STACK_SEEN.store(&raw const here as u64, Relaxed);
    // SAFETY: asks for the stack, and tries to take it away.
    unsafe {
        let mut now: libc::stack_t = std::mem::zeroed();
        libc::sigaltstack(std::ptr::null(), &mut now);
        if now.ss_flags & libc::SS_ONSTACK != 0 && (*context).uc_stack.ss_sp == now.ss_sp {
            let disabled = libc::stack_t {
                ss_flags: libc::SS_DISABLE,
                ..now
            };
            if libc::sigaltstack(&disabled, std::ptr::null_mut()) == -1 {
                EPERM_SEEN.store(io::Error::last_os_error().raw_os_error().unwrap_or(0), Relaxed);
            }
        }
    }
}

fn alternate_stack_is_used() {
    const BYTES: usize = 32 << 10;
    let map = Map::new(BYTES);
    let range = map.start as u64..map.start as u64 + BYTES as u64;
    let stack = libc::stack_t {
        ss_sp: map.start.cast(),
        ss_flags: 0,
        ss_size: BYTES,
    };
    // SAFETY: the stack is ours and lives until it is disabled.
    unsafe {
        let mut before: libc::stack_t = std::mem::zeroed();
        let dune = enter();
        assert_eq!(libc::sigaltstack(&stack, &mut before), 0);
        set_handler(libc::SIGUSR1, on_stack, libc::SA_ONSTACK, &[]);
        libc::raise(libc::SIGUSR1);
        assert!(range.contains(&STACK_SEEN.load(Relaxed)), "not on the alternate stack");
        assert_eq!(EPERM_SEEN.load(Relaxed), libc::EPERM);
        set_handler(libc::SIGUSR1, on_stack, 0, &[]);
        libc::raise(libc::SIGUSR1);
        assert!(
            !range.contains(&STACK_SEEN.load(Relaxed)),
            "SA_ONSTACK was not asked for"
        );
        let small = libc::stack_t { ss_size: 100, ..stack };
        assert_eq!(libc::sigaltstack(&small, std::ptr::null_mut()), -1);
        assert_eq!(io::Error::last_os_error().raw_os_error(), Some(libc::ENOMEM));
        dune.leave();
        // The stack goes along.
        set_handler(libc::SIGUSR1, on_stack, libc::SA_ONSTACK, &[]);
        libc::raise(libc::SIGUSR1);
        assert!(range.contains(&STACK_SEEN.load(Relaxed)), "outside Dune mode");
        let dune = enter();
        libc::raise(libc::SIGUSR1);
        assert!(range.contains(&STACK_SEEN.load(Relaxed)), "inside again");
        assert_eq!(libc::sigaltstack(&before, std::ptr::null_mut()), 0);
        dune.leave();
    }
}

fn stack_overflow_is_told_by_std() {
    #[allow(unconditional_recursion)]
    fn deeper(level: u64) -> u64 {
        let here = [level; 64];
        std::hint::black_box(&here);
        deeper(level + 1) + std::hint::black_box(here[0])
    }
    let ended = spawn(|| {
        let _dune = enter();
        let _ = std::thread::Builder::new()
            .name("too-deep".into())
            .stack_size(256 << 10)
            .spawn(|| deeper(0))
            .unwrap()
            .join();
    })
    .wait();
    assert_eq!(ended.signal(), Some(libc::SIGABRT), "{ended:?}");
    assert!(
        ended.output.contains("too-deep") && ended.output.contains("overflowed its stack"),
        "{}",
        ended.output
    );
}

static JUMP: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];

extern "C" fn jump_out(_: i32, _: *mut libc::siginfo_t, _: *mut libc::ucontext_t) {
    if JUMP[0].load(SeqCst) == 0 {
        // Too early, there is no place to jump to.
        set_timer(libc::ITIMER_REAL, 2000, 0);
        return;
    }
    COUNT.fetch_add(1, SeqCst);
    // SAFETY: to the place that was noted, whose frame is alive; as siglongjmp does it.
    unsafe {
        let mut mask: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut mask);
        libc::sigprocmask(libc::SIG_SETMASK, &mask, std::ptr::null_mut());
        asm!(
            "mov rsp, {rsp}",
            "mov rbp, {rbp}",
            "jmp {rip}",
            rip = in(reg) JUMP[0].load(SeqCst),
            rsp = in(reg) JUMP[1].load(SeqCst),
            rbp = in(reg) JUMP[2].load(SeqCst),
            options(noreturn),
        );
    }
}

fn handler_may_jump_out() {
    reset();
    let dune = enter();
    set_handler(libc::SIGALRM, jump_out, 0, &[]);
    for round in 1..=50u64 {
        JUMP[0].store(0, SeqCst);
        set_timer(libc::ITIMER_REAL, 1000 + round as i64 * 7, 0);
        // SAFETY: spins until the handler jumps behind the loop; everything is clobbered by then.
        unsafe {
            asm!(
                "push rbx",
                "lea rax, [rsp + 8]",
                "mov [{jump} + 8], rax",
                "mov [{jump} + 16], rbp",
                "lea rax, [rip + 3f]",
                "mov [{jump}], rax",
                "2:",
                "pause",
                "jmp 2b",
                "3:",
                "mov rbx, [rsp - 8]",
                jump = in(reg) JUMP.as_ptr(),
                out("rax") _,
                clobber_abi("C"),
                out("r12") _, out("r13") _, out("r14") _, out("r15") _,
            );
        }
        assert_eq!(COUNT.load(SeqCst), round);
        assert!(!blocked(libc::SIGALRM));
    }
    assert!(Dune::is_active());
    dune.leave();
}

fn no_signal_is_lost_before_a_call() {
    reset();
    let dune = enter();
    set_handler(libc::SIGALRM, note, 0, &[]);
    // SAFETY: masks and a wait of our own.
    unsafe {
        let mut mask: libc::sigset_t = std::mem::zeroed();
        let mut empty: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut empty);
        libc::sigemptyset(&mut mask);
        libc::sigaddset(&mut mask, libc::SIGALRM);
        libc::sigprocmask(libc::SIG_BLOCK, &mask, std::ptr::null_mut());
        for round in 1..=300u64 {
            // The interval saves the test from hanging where one is lost: the time tells.
            set_timer(libc::ITIMER_REAL, 1 + (round as i64 * 37) % 400, 100_000);
            assert_eq!(libc::sigsuspend(&empty), -1);
            assert_eq!(io::Error::last_os_error().raw_os_error(), Some(libc::EINTR));
            assert!(COUNT.load(SeqCst) >= round, "round {round}");
        }
        timer(libc::ITIMER_REAL, 0);
        libc::sigprocmask(libc::SIG_UNBLOCK, &mask, std::ptr::null_mut());
    }
    // A read that never ends by itself: the handler runs each time, and the call is interrupted or goes on.
    let mut pipe = [0; 2];
    // SAFETY: two fds into an array of two; a read of our own.
    unsafe {
        assert_eq!(libc::pipe(pipe.as_mut_ptr()), 0);
        for round in 0..100i64 {
            let before = COUNT.load(SeqCst);
            set_timer(libc::ITIMER_REAL, 100 + round * 11 % 300, 100_000);
            let mut byte = 0u8;
            let result = libc::read(pipe[0], (&raw mut byte).cast(), 1);
            timer(libc::ITIMER_REAL, 0);
            assert_eq!(result, -1);
            assert_eq!(io::Error::last_os_error().raw_os_error(), Some(libc::EINTR));
            assert!(COUNT.load(SeqCst) > before, "interrupted, and no handler ran");
        }
    }
    assert_eq!(OUTSIDE.load(Relaxed), 0);
    dune.leave();
}

fn signals_in_the_middle_of_exceptions() {
    reset();
    let dune = enter();
    dune.set_exception_handler(Vector::UD, step_over);
    set_handler(libc::SIGALRM, note, 0, &[]);
    timer(libc::ITIMER_REAL, 1511);
    let mut expected = 0u64;
    let mut value = 1u64;
    let started = Instant::now();
    while COUNT.load(SeqCst) < 300 {
        assert!(
            started.elapsed() < Duration::from_secs(5),
            "{} signals in {expected} exceptions",
            COUNT.load(SeqCst)
        );
        for _ in 0..50 {
            let before = value;
            // SAFETY: the handler skips it.
            unsafe {
                asm!(
                    "mov [rsp - 16], {before}",
                    "ud2",
                    "mov {value}, [rsp - 16]",
                    "add {value}, 1",
                    before = in(reg) before,
                    value = out(reg) value,
                );
            }
            assert_eq!(value, before + 1);
            expected += 1;
        }
    }
    timer(libc::ITIMER_REAL, 0);
    assert_eq!(stepped_over(), expected);
    assert_eq!(OUTSIDE.load(Relaxed), 0);
    assert!(Dune::is_active());
    dune.leave();
}

fn signals_during_enter_and_leave() {
    reset();
    set_handler(libc::SIGALRM, note, 0, &[]);
    timer(libc::ITIMER_REAL, 4999);
    let started = Instant::now();
    let mut rounds = 0;
    while rounds < 60 {
        let dune = enter();
        std::hint::black_box(compute(100));
        dune.leave();
        assert!(!Dune::is_active());
        rounds += 1;
        assert!(started.elapsed() < Duration::from_secs(15), "{rounds} rounds");
    }
    timer(libc::ITIMER_REAL, 0);
    println!(
        "{} signals, {} of them outside",
        COUNT.load(SeqCst),
        OUTSIDE.load(Relaxed)
    );
    assert!(COUNT.load(SeqCst) > 20);
}

/// Notes, and makes the faulting page accessible, or skips the instruction of two bytes.
extern "C" fn mend(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::ucontext_t) {
    note(signal, info, context);
    // SAFETY: the test's own page or instruction.
    unsafe {
        let page = LAST_ADDRESS.load(Relaxed) as usize & !(PAGE - 1);
        let is_page = matches!(signal, libc::SIGSEGV | libc::SIGBUS) && page != 0;
        if is_page {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
            let mapped = libc::mmap(
                page as *mut libc::c_void,
                PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                -1,
                0,
            );
            if mapped == libc::MAP_FAILED {
                libc::abort();
            }
        } else if signal != libc::SIGTRAP {
            (*context).uc_mcontext.gregs[libc::REG_RIP as usize] += 2;
        }
    }
}

fn faults_become_signals_with_true_siginfo() {
    let dune = enter();
    for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP] {
        set_handler(signal, mend, 0, &[]);
    }
    let seen = |what: &str, signal: i32, code: i32, address: Option<u64>| {
        assert_eq!(COUNT.load(SeqCst), 1, "{what}: handlers that ran");
        assert_eq!(LAST_SIGNAL.load(Relaxed), signal, "{what}");
        assert_eq!(LAST_CODE.load(Relaxed), code, "{what}: si_code");
        if let Some(address) = address {
            assert_eq!(LAST_ADDRESS.load(Relaxed), address, "{what}: si_addr");
        }
        assert_eq!(OUTSIDE.load(Relaxed), 0, "{what}: outside Dune mode");
        assert!(Dune::is_active(), "{what}");
        reset();
    };
    reset();
    let map = Map::new(8 * PAGE);
    let at = |page: usize| (map.start as u64) + (page * PAGE) as u64 + 0x123;
    const SEGV_MAPERR: i32 = 1;
    const SEGV_ACCERR: i32 = 2;
    const BUS_ADRERR: i32 = 2;
    // SAFETY: the test's own pages; each fault is mended.
    unsafe {
        libc::munmap(map.start.add(PAGE).cast(), PAGE);
        (at(1) as *mut u8).write_volatile(1);
        seen("unmapped", libc::SIGSEGV, SEGV_MAPERR, Some(at(1)));

        libc::mprotect(map.start.add(2 * PAGE).cast(), PAGE, libc::PROT_READ);
        (at(2) as *mut u8).write_volatile(1);
        seen("read-only", libc::SIGSEGV, SEGV_ACCERR, Some(at(2)));

        libc::mprotect(map.start.add(3 * PAGE).cast(), PAGE, libc::PROT_NONE);
        let _ = (at(3) as *const u8).read_volatile();
        seen("no access", libc::SIGSEGV, SEGV_ACCERR, Some(at(3)));

        let file = libc::memfd_create(c"empty".as_ptr(), 0);
        let fixed = libc::MAP_SHARED | libc::MAP_FIXED;
        libc::mmap(map.start.add(4 * PAGE).cast(), PAGE, libc::PROT_READ, fixed, file, 0);
        let _ = (at(4) as *const u8).read_volatile();
        seen("behind the end of the file", libc::SIGBUS, BUS_ADRERR, Some(at(4)));

        asm!("xor edx, edx", "xor ecx, ecx", "mov eax, 1", "div ecx", out("rax") _, out("rcx") _, out("rdx") _);
        seen("division by zero", libc::SIGFPE, 1, None);
        asm!("ud2");
        seen("ud2", libc::SIGILL, 2, None);
        asm!("int3");
        seen("int3", libc::SIGTRAP, 0x80, None);
        for interrupt in [0u64, 1] {
            asm!("test {0}, {0}", "jnz 2f", "int 88", "jmp 3f", "2:", "int 0xff", "3:", in(reg) interrupt);
            seen("int n", libc::SIGSEGV, 0x80, Some(0));
        }
    }
    dune.leave();
}

fn fault_handler_may_mend_and_return() {
    const PAGES: usize = 64;
    reset();
    let map = Map::new(PAGES * PAGE);
    let dune = enter();
    set_handler(libc::SIGSEGV, mend, 0, &[]);
    // SAFETY: the test's own pages.
    unsafe {
        libc::mprotect(map.start.cast(), PAGES * PAGE, libc::PROT_NONE);
        for page in 0..PAGES {
            map.start.add(page * PAGE).write_volatile(page as u8);
        }
        for page in 0..PAGES {
            assert_eq!(map.start.add(page * PAGE).read_volatile(), page as u8);
        }
    }
    assert_eq!(COUNT.load(SeqCst), PAGES as u64);
    assert_eq!(OUTSIDE.load(Relaxed), 0);
    assert!(Dune::is_active());
    dune.leave();
}

fn stop_and_continue() {
    let shared = Shared::new();
    let child = spawn(|| {
        let _dune = enter();
        loop {
            shared.word(0).fetch_add(1, SeqCst);
        }
    });
    let moves = || {
        let before = shared.word(0).load(SeqCst);
        std::thread::sleep(Duration::from_millis(10));
        shared.word(0).load(SeqCst) != before
    };
    let child = child.until(|| shared.word(0).load(SeqCst) != 0);
    for _ in 0..3 {
        child.kill(libc::SIGSTOP);
        let mut status = 0;
        // SAFETY: our own child.
        unsafe { libc::waitpid(child.pid, &mut status, libc::WUNTRACED) };
        assert!(libc::WIFSTOPPED(status), "{status:#x}");
        assert!(!moves(), "runs while it is stopped");
        child.kill(libc::SIGCONT);
        assert!(moves(), "stands still after SIGCONT");
    }
    child.kill(libc::SIGKILL);
    assert_eq!(child.wait().signal(), Some(libc::SIGKILL));
}

fn default_action_ends_a_spinning_guest() {
    for signal in [libc::SIGTERM, libc::SIGALRM, libc::SIGQUIT, libc::SIGRTMIN()] {
        println!("signal {signal}");
        let child = spawn_spinning(&Shared::new());
        child.kill(signal);
        assert_eq!(child.wait_soon().signal(), Some(signal));
    }
}

fn ignored_signals_do_not_disturb() {
    let dune = enter();
    // SAFETY: plain calls of our own.
    unsafe {
        libc::signal(libc::SIGUSR1, libc::SIG_IGN);
        let mut pipe = [0; 2];
        assert_eq!(libc::pipe(pipe.as_mut_ptr()), 0);
        let pid = libc::getpid();
        let child = spawn(|| {
            for _ in 0..5 {
                libc::kill(pid, libc::SIGUSR1);
                std::thread::sleep(Duration::from_millis(2));
            }
            libc::write(pipe[1], c"x".as_ptr().cast(), 1);
        });
        let mut byte = 0u8;
        assert_eq!(libc::read(pipe[0], (&raw mut byte).cast(), 1), 1);
        child.wait().assert_success();
    }
    dune.leave();
}

fn actions_are_the_programs_own() {
    set_handler(libc::SIGUSR1, note, libc::SA_RESTART, &[libc::SIGHUP]);
    let dune = enter();
    let old = set_handler(libc::SIGUSR1, mend, 0, &[]);
    assert_eq!(
        old.sa_sigaction, note as *const () as usize,
        "what was set before entering"
    );
    assert_eq!(old.sa_flags & libc::SA_RESTART, libc::SA_RESTART);
    // SAFETY: asks a set.
    assert_eq!(unsafe { libc::sigismember(&old.sa_mask, libc::SIGHUP) }, 1);
    let old = set_handler(libc::SIGUSR1, note, 0, &[]);
    assert_eq!(old.sa_sigaction, mend as *const () as usize);
    // SAFETY: bad arguments on purpose.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        for signal in [libc::SIGKILL, libc::SIGSTOP, 0, 65] {
            assert_eq!(libc::sigaction(signal, &action, std::ptr::null_mut()), -1);
            assert_eq!(
                io::Error::last_os_error().raw_os_error(),
                Some(libc::EINVAL),
                "{signal}"
            );
        }
        assert_eq!(libc::sigaction(libc::SIGKILL, std::ptr::null(), &mut action), 0);
    }
    dune.leave();
    let old = set_handler(libc::SIGUSR1, mend, 0, &[]);
    assert_eq!(old.sa_sigaction, note as *const () as usize, "after leaving");
}

fn signals_between_threads() {
    reset();
    let dune = enter();
    set_handler(libc::SIGUSR1, note, 0, &[]);
    const THREADS: usize = 4;
    let stop = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let handles: Vec<libc::pthread_t> = (0..THREADS)
            .map(|_| {
                let (sender, receiver) = std::sync::mpsc::channel();
                let stop = &stop;
                scope.spawn(move || {
                    // SAFETY: asks for the thread's own handle.
                    sender.send(unsafe { libc::pthread_self() }).unwrap();
                    let mut sum = 0u64;
                    while stop.load(Relaxed) == 0 {
                        sum = sum.wrapping_add(compute(500));
                        let text = vec![sum as u8; 300];
                        assert!(text.iter().all(|byte| *byte == sum as u8));
                    }
                    assert!(Dune::is_active());
                });
                receiver.recv().unwrap()
            })
            .collect();
        for round in 0..100 {
            // SAFETY: the threads run until `stop`.
            assert_eq!(
                unsafe { libc::pthread_kill(handles[round % THREADS], libc::SIGUSR1) },
                0
            );
            if round % 8 == 0 {
                std::thread::sleep(Duration::from_micros(300));
            }
        }
        let started = Instant::now();
        while COUNT.load(SeqCst) < THREADS as u64 && started.elapsed() < Duration::from_secs(5) {
            std::thread::yield_now();
        }
        stop.store(1, SeqCst);
    });
    assert!(COUNT.load(SeqCst) >= THREADS as u64);
    assert_eq!(OUTSIDE.load(Relaxed), 0);
    dune.leave();
}

/// A thread that leaves as the last one gives the program its actions back; one that enters at this moment needs libdune's.
fn actions_hold_while_threads_come_and_go() {
    const ROUNDS: usize = 60;
    install_signal_probe();
    let hole = Map::new(PAGE);
    hole.protect(0, PAGE, libc::PROT_NONE);
    let address = hole.address();
    let visit = |pause: u64| {
        for round in 0..ROUNDS as u64 {
            let dune = enter();
            assert!(load(address).is_err());
            std::hint::black_box(compute(round * pause % 40));
            assert!(load(address).is_err());
            dune.leave();
            assert!(load(address).is_err());
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| visit(7));
        scope.spawn(|| visit(11));
    });
}

/// Signals that queue come as often as they were sent, also where one comes at the end of another one's handler.
fn queued_signals_all_arrive() {
    const ROUNDS: u64 = 1400;
    reset();
    let signals = [libc::SIGRTMIN() + 1, libc::SIGRTMIN() + 2];
    for signal in signals {
        set_handler(signal, note, libc::SA_RESTART, &[]);
    }
    let stop = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let (sender, receiver) = std::sync::mpsc::channel();
        let stop = &stop;
        let target = scope.spawn(move || {
            let dune = enter();
            // SAFETY: asks for a number.
            sender.send(unsafe { libc::gettid() }).unwrap();
            while stop.load(SeqCst) == 0 {
                std::hint::black_box(compute(20));
            }
            // SAFETY: whatever is still to come is there when this call returns.
            unsafe { libc::usleep(1000) };
            dune.leave();
        });
        let thread = receiver.recv().unwrap();
        for round in 0..ROUNDS {
            queue_signal(thread, signals[usize::from(round % 7 == 0)]).unwrap();
            // The first is always waiting, the second comes at any moment of the first one's handling.
            if round % 7 == 6 {
                std::hint::black_box(compute(round * 13 % 190));
            }
        }
        stop.store(1, SeqCst);
        target.join().unwrap();
    });
    assert_eq!(COUNT.load(SeqCst), ROUNDS);
}

fn ordinary_threads_take_signals_too() {
    reset();
    let (sender, receiver) = std::sync::mpsc::channel();
    let stop = std::sync::Arc::new(AtomicU64::new(0));
    let stopped = stop.clone();
    let ordinary = std::thread::spawn(move || {
        // SAFETY: asks for the thread's own handle.
        sender.send(unsafe { libc::pthread_self() }).unwrap();
        while stopped.load(Relaxed) == 0 {
            std::hint::spin_loop();
        }
        Dune::is_active()
    });
    let handle = receiver.recv().unwrap();
    let dune = enter();
    set_handler(libc::SIGUSR1, note, 0, &[]);
    for round in 1..=20 {
        // SAFETY: the thread runs until `stop`.
        unsafe { libc::pthread_kill(handle, libc::SIGUSR1) };
        while COUNT.load(SeqCst) < round {
            std::thread::yield_now();
        }
    }
    assert_eq!(OUTSIDE.load(Relaxed), 20);
    stop.store(1, SeqCst);
    assert!(!ordinary.join().unwrap());
    dune.leave();
}

/// A child in which no thread is in Dune mode has the handlers that the program set, and may enter.
fn children_outside_have_the_programs_handlers() {
    reset();
    fn check_child() {
        let page = Map::new(PAGE);
        page.protect(0, PAGE, libc::PROT_READ);
        // SAFETY: a signal to ourselves, and a fault that its handler mends.
        unsafe {
            libc::raise(libc::SIGUSR1);
            (page.address() as *mut u8).write_volatile(1);
            let mut now: libc::sigaction = std::mem::zeroed();
            libc::sigaction(libc::SIGUSR1, std::ptr::null(), &mut now);
            assert_eq!(now.sa_sigaction, note as *const () as usize);
        }
        assert_eq!((COUNT.load(SeqCst), OUTSIDE.load(SeqCst)), (2, 2));
        let dune = enter();
        // SAFETY: a signal to ourselves.
        unsafe { libc::raise(libc::SIGUSR1) };
        assert_eq!((COUNT.load(SeqCst), OUTSIDE.load(SeqCst)), (3, 2));
        dune.leave();
    }
    set_handler(libc::SIGUSR1, note, 0, &[]);
    set_handler(libc::SIGSEGV, mend, 0, &[]);
    let inside = std::sync::Barrier::new(2);
    let done = std::sync::Barrier::new(2);
    std::thread::scope(|scope| {
        let ordinary = scope.spawn(|| {
            inside.wait();
            spawn(check_child).wait().assert_success();
            done.wait();
        });
        let dune = enter();
        inside.wait();
        done.wait();
        dune.leave();
        ordinary.join().unwrap();
    });
    let dune = Dune::builder().children(false).enter().unwrap();
    spawn(check_child).wait().assert_success();
    dune.leave();
}

fn sigchld_sigwait_and_signalfd() {
    reset();
    let dune = enter();
    set_handler(libc::SIGCHLD, note, 0, &[]);
    // SAFETY: plain calls of our own.
    unsafe {
        let pid = libc::fork();
        if pid == 0 {
            libc::_exit(3);
        }
        while COUNT.load(SeqCst) == 0 {
            libc::sched_yield();
        }
        assert_eq!(LAST_CODE.load(Relaxed), libc::CLD_EXITED);
        let mut status = 0;
        assert_eq!(libc::waitpid(pid, &mut status, 0), pid);

        let mut mask: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&mut mask, libc::SIGUSR1);
        libc::sigaddset(&mut mask, libc::SIGUSR2);
        libc::sigprocmask(libc::SIG_BLOCK, &mask, std::ptr::null_mut());
        libc::raise(libc::SIGUSR1);
        let mut info: libc::siginfo_t = std::mem::zeroed();
        assert_eq!(libc::sigwaitinfo(&mask, &mut info), libc::SIGUSR1);
        assert_eq!(info.si_pid(), libc::getpid());
        let fd = libc::signalfd(-1, &mask, 0);
        libc::raise(libc::SIGUSR2);
        let mut event: libc::signalfd_siginfo = std::mem::zeroed();
        let bytes = size_of_val(&event);
        assert_eq!(libc::read(fd, (&raw mut event).cast(), bytes), bytes as isize);
        assert_eq!(event.ssi_signo, libc::SIGUSR2 as u32);
        libc::close(fd);
    }
    assert_eq!(COUNT.load(SeqCst), 1);
    dune.leave();
}

fn virtual_timer_counts_the_guest() {
    reset();
    let dune = enter();
    set_handler(libc::SIGVTALRM, note, 0, &[]);
    timer(libc::ITIMER_VIRTUAL, 8000);
    let started = Instant::now();
    while COUNT.load(SeqCst) < 3 {
        std::hint::black_box(compute(100));
        assert!(
            started.elapsed() < Duration::from_secs(10),
            "guest time is not the process' time"
        );
    }
    timer(libc::ITIMER_VIRTUAL, 0);
    assert_eq!(OUTSIDE.load(Relaxed), 0);
    dune.leave();
}

fn signals_in_children() {
    reset();
    let dune = enter();
    set_handler(libc::SIGUSR1, note, 0, &[]);
    // SAFETY: the child raises a signal and ends.
    unsafe {
        let pid = libc::fork();
        if pid == 0 {
            for _ in 0..5 {
                libc::raise(libc::SIGUSR1);
            }
            let fine = COUNT.load(SeqCst) == 5 && OUTSIDE.load(Relaxed) == 0 && Dune::is_active();
            libc::_exit(i32::from(!fine));
        }
        let mut status = -1;
        libc::waitpid(pid, &mut status, 0);
        assert_eq!(status, 0);
        // posix_spawn sets defaults in a child that shares the memory: the parent's stay.
        assert!(std::process::Command::new("/bin/true").status().unwrap().success());
        libc::raise(libc::SIGUSR1);
    }
    assert_eq!(COUNT.load(SeqCst), 1);
    dune.leave();
}
