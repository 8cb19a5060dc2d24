// SPDX-License-Identifier: MIT OR Apache-2.0
//! YMM registers, upper halves included: CPL3's over all that interrupts it, and CPL0's around hooks and handlers. XMM where
//! the CPU has no AVX.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::Ordering::SeqCst;

use libdune::hook::Hooks;
use libdune::hook::Verdict;
use libdune::user::UserExit;
use libdune::user::UserSlice;
use libdune::Gva;
use libdune::Outcome;
use libdune::Permissions;
use libdune::Thread;
use libdune::Vector;

use crate::framework::Test;
use crate::support::enter;
use crate::support::set_plain_handler;
use crate::support::timer;
use crate::support::Map;
use crate::support::PAGE;
use crate::syscall::spoil;
use crate::syscall::through_registers;
use crate::syscall::Ymm;
use crate::user::code;
use crate::user::Sandbox;
use crate::user::DATA;
use crate::user::PLENTY;

pub const TESTS: &[Test] = &[
    Test::asserting("ymm_of_cpl3_stay_over_exits", ymm_of_cpl3_stay_over_exits),
    Test::asserting(
        "ymm_of_cpl3_stay_over_signals_and_timeouts",
        ymm_of_cpl3_stay_over_signals_and_timeouts,
    ),
    Test::asserting("ymm_of_cpl0_stay_around_visits", ymm_of_cpl0_stay_around_visits),
    Test::asserting("ymm_stay_around_hooks", ymm_stay_around_hooks),
    Test::asserting("ymm_stay_around_handlers", ymm_stay_around_handlers),
];

// RDI: registers to load; RSI: where they are stored before and behind; R8: how often to turn around.
code! {
    with_ymm: ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15" "vmovups [rsi + 32 * \\n], ymm\\n" ".endr"
        "syscall"
        ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15" "vmovups ymm\\n, [rdi + 32 * \\n]" ".endr"
        "2:" "dec r8" "jnz 2b"
        "syscall" "ud2" "int3" "mov byte ptr [r9], 1" "mov byte ptr [r10], 1" "int 0x80"
        ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15" "vmovups [rsi + 32 * \\n], ymm\\n" ".endr"
        "syscall" "hlt";
    with_xmm: ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15" "movups [rsi + 32 * \\n], xmm\\n" ".endr"
        "syscall"
        ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15" "movups xmm\\n, [rdi + 32 * \\n]" ".endr"
        "2:" "dec r8" "jnz 2b"
        "syscall" "ud2" "int3" "mov byte ptr [r9], 1" "mov byte ptr [r10], 1" "int 0x80"
        ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15" "movups [rsi + 32 * \\n], xmm\\n" ".endr"
        "syscall" "hlt";
}

fn has_avx() -> bool {
    std::arch::is_x86_feature_detected!("avx")
}

/// Each word another value; without AVX what a register has not is 0.
fn pattern(seed: u64) -> Ymm {
    Ymm::of_words(|word| {
        if has_avx() || word % 4 < 2 {
            seed.wrapping_mul(0x0101_0101_0101_0101) ^ (word as u64 + 1)
        } else {
            0
        }
    })
}

fn bytes(ymm: &Ymm) -> Vec<u8> {
    ymm.0.iter().flatten().flat_map(|word| word.to_le_bytes()).collect()
}

/// Code that has these registers.
struct User {
    sandbox: Sandbox,
    registers: Ymm,
}

impl User {
    const LEFT: u64 = 2048;

    /// It has told how it began.
    #[track_caller]
    fn start(thread: &Thread<'_>, seed: u64, turns: u64) -> Self {
        let code = if has_avx() { with_ymm() } else { with_xmm() };
        let mut user = Self {
            sandbox: Sandbox::new(thread, code),
            registers: pattern(seed),
        };
        let data = user.sandbox.page(DATA);
        let slice = UserSlice::writable(thread, data, PAGE).unwrap();
        slice.write(&bytes(&user.registers)).unwrap();
        let r = user.sandbox.context.registers_mut();
        (r.rdi, r.rsi, r.r8) = (data, data + Self::LEFT, turns);
        // A page of the host's, and nothing at all.
        (r.r9, r.r10) = (data + PAGE as u64, 16);
        assert_eq!(user.sandbox.run(thread), UserExit::Syscall);
        assert_eq!(
            user.left(thread),
            bytes(&Ymm([[0; 4]; 16])),
            "CPL3 begins with the host's"
        );
        user
    }

    fn left(&self, thread: &Thread<'_>) -> Vec<u8> {
        let slice = UserSlice::readable(thread, self.sandbox.page(DATA) + Self::LEFT, 512).unwrap();
        slice.to_vec().unwrap()
    }

    /// The host's own registers stay over the run, too.
    #[track_caller]
    fn run(&mut self, thread: &Thread<'_>) -> UserExit {
        let exit = self.sandbox.run(thread);
        disturb_own();
        exit
    }

    /// Runs what is left.
    #[track_caller]
    fn finish(mut self, thread: &Thread<'_>) {
        assert_eq!(self.run(thread), UserExit::Syscall);
        self.finish_behind_call(thread);
    }

    #[track_caller]
    fn finish_behind_call(&mut self, thread: &Thread<'_>) {
        let mut exception = |vector, bytes| match self.run(thread) {
            UserExit::Exception { vector: seen, .. } if seen == vector => {
                self.sandbox.context.registers_mut().rip += bytes;
            }
            exit => panic!("{exit:?} where {vector} was expected"),
        };
        exception(Vector::UD, 2);
        exception(Vector::BP, 0);
        for (refused, bytes) in [(false, 4), (false, 4)] {
            match self.run(thread) {
                UserExit::PageFault(fault) => assert_eq!(fault.host_refused(), refused, "{fault:?}"),
                exit => panic!("{exit:?} where a page fault was expected"),
            }
            self.sandbox.context.registers_mut().rip += bytes;
        }
        assert_eq!(self.run(thread), UserExit::Int80);
        assert_eq!(self.run(thread), UserExit::Syscall);
        assert_eq!(self.left(thread), bytes(&self.registers));
    }
}

/// Writes to all registers that a function may write to.
#[inline(never)]
fn disturb_own() {
    let other = pattern(0xee);
    assert_eq!(through_registers(&other, has_avx(), 1), other);
}

fn ymm_of_cpl3_stay_over_exits() {
    println!("avx: {}", has_avx());
    let dune = enter();
    let thread = dune.thread();
    for seed in 1..20 {
        User::start(&thread, seed, 1).finish(&thread);
    }
    // Two of them in turns.
    let mut first = User::start(&thread, 33, 1);
    let second = User::start(&thread, 44, 1);
    assert_eq!(first.run(&thread), UserExit::Syscall);
    second.finish(&thread);
    first.finish_behind_call(&thread);
    dune.leave();
}

static HANDLED: AtomicU64 = AtomicU64::new(0);

extern "C" fn spoiling_handler(_: i32) {
    spoil();
    HANDLED.fetch_add(1, SeqCst);
}

fn ymm_of_cpl3_stay_over_signals_and_timeouts() {
    const TURNS: u64 = 3_000_000;
    // Long enough for a signal, or the way to CPL3 and back, to be over before the next on the kernel `debug` too.
    const PERIOD_US: i64 = 3000;
    const DEADLINE: u64 = PLENTY / 4000;
    set_plain_handler(libc::SIGALRM, spoiling_handler, libc::SA_RESTART);
    let dune = enter();
    let thread = dune.thread();
    // Signals come while it turns around.
    let user = User::start(&thread, 5, TURNS);
    timer(libc::ITIMER_REAL, PERIOD_US);
    let before = HANDLED.load(SeqCst);
    user.finish(&thread);
    assert!(HANDLED.load(SeqCst) > before + 3, "{before}");
    // The same with a deadline, and the host's own work in between.
    let mut user = User::start(&thread, 6, TURNS);
    let mut timeouts = 0;
    loop {
        match user.sandbox.context.run_for(&thread, DEADLINE) {
            UserExit::Timeout => timeouts += 1,
            UserExit::Syscall => break,
            exit => panic!("{exit:?}"),
        }
        disturb_own();
    }
    assert!(timeouts > 1, "{timeouts}");
    user.finish_behind_call(&thread);
    timer(libc::ITIMER_REAL, 0);
    dune.leave();
}

/// A handler that runs code at CPL3, which has registers of its own.
fn ymm_of_cpl0_stay_around_visits() {
    let dune = enter();
    let thread = dune.thread();
    let user = std::cell::RefCell::new(User::start(&thread, 7, 1));
    let input = pattern(0x5e);
    thread.with_exception_handler(
        Vector::UD,
        |frame, thread| {
            let mut user = user.borrow_mut();
            assert_eq!(user.sandbox.context.run(thread), UserExit::Syscall);
            frame.rip += 2;
            Outcome::Resume
        },
        || assert_eq!(through_registers(&input, has_avx(), 0), input),
    );
    user.into_inner().finish_behind_call(&thread);
    dune.leave();
}

fn ymm_stay_around_hooks() {
    static ASKED: AtomicU64 = AtomicU64::new(0);
    static TOLD: AtomicU64 = AtomicU64::new(0);
    fn allow(_: &mut libdune::hook::SystemCall, _: &Thread<'_>) -> Verdict {
        spoil();
        ASKED.fetch_add(1, Relaxed);
        Verdict::Allow
    }
    fn answer(call: &mut libdune::hook::SystemCall, _: &Thread<'_>) -> Verdict {
        if call.number() != libc::SYS_sched_yield as u64 {
            return Verdict::Allow;
        }
        spoil();
        ASKED.fetch_add(1, Relaxed);
        Verdict::Answer(0)
    }
    fn tell(_: &libdune::hook::SystemCall, result: i64, _: &Thread<'_>) -> i64 {
        spoil();
        TOLD.fetch_add(1, Relaxed);
        result
    }
    let dune = enter();
    let thread = dune.thread();
    for (before, after) in [
        (Some(allow as libdune::hook::Before), None),
        (Some(answer as libdune::hook::Before), None),
        (Some(allow as libdune::hook::Before), Some(tell as libdune::hook::After)),
        (None, Some(tell as libdune::hook::After)),
    ] {
        let counts = || (ASKED.load(Relaxed), TOLD.load(Relaxed));
        let old = counts();
        thread.set_hooks(Hooks { before, after });
        for seed in 1..20 {
            let input = pattern(seed);
            let output = through_registers(&input, has_avx(), 1);
            assert_eq!(output, input);
        }
        thread.set_hooks(Hooks::default());
        let new = counts();
        assert!(before.is_none() || new.0 >= old.0 + 19, "{old:?} {new:?}");
        assert!(after.is_none() || new.1 >= old.1 + 19, "{old:?} {new:?}");
    }
    dune.leave();
}

fn ymm_stay_around_handlers() {
    static PAGE_OF: AtomicUsize = AtomicUsize::new(0);
    static FAULTS: AtomicU64 = AtomicU64::new(0);
    let map = Map::new(PAGE);
    map.write(0, 1);
    PAGE_OF.store(map.page(0), Relaxed);
    let protect = |thread: &Thread<'_>, permissions| {
        let start = Gva::new(PAGE_OF.load(Relaxed) as u64).unwrap();
        let space = thread.address_space();
        space.protect(start, PAGE as u64, permissions).unwrap().flush();
    };
    let dune = enter();
    let thread = dune.thread();
    let around = |seed, disturb| {
        let input = pattern(seed);
        assert_eq!(through_registers(&input, has_avx(), disturb), input);
    };
    // A plain handler, by the short way that page faults have.
    thread.set_exception_handler(Vector::PF, |_, thread| {
        let Some(start) = Gva::new(PAGE_OF.load(Relaxed) as u64) else {
            return Outcome::Unhandled;
        };
        match thread.address_space().protect(start, PAGE as u64, Permissions::ALL) {
            Ok(flush) => flush.flush(),
            Err(_) => return Outcome::Unhandled,
        }
        FAULTS.fetch_add(1, Relaxed);
        spoil();
        Outcome::Resume
    });
    for seed in 1..20 {
        protect(&thread, Permissions::READ);
        around(seed, map.page(0) as u64);
    }
    assert_eq!(FAULTS.load(Relaxed), 19);
    // A scoped one, of a page fault and of an invalid opcode.
    let mut scoped = 0;
    thread.with_exception_handler(
        Vector::PF,
        |_, thread| {
            protect(thread, Permissions::ALL);
            scoped += 1;
            spoil();
            Outcome::Resume
        },
        || {
            for seed in 20..40 {
                protect(&thread, Permissions::READ);
                around(seed, map.page(0) as u64);
            }
        },
    );
    assert_eq!((scoped, FAULTS.load(Relaxed)), (20, 19));
    // What a handler changes of XMM3 is what the code goes on with; what is above it of YMM3 stays.
    thread.with_exception_handler(
        Vector::UD,
        |frame, thread| {
            frame.rip += 2;
            let Some(mut state) = thread.extended_state(frame) else {
                return Outcome::Unhandled;
            };
            state.set_xmm(3, 42);
            spoil();
            Outcome::Resume
        },
        || {
            for seed in 40..60 {
                let mut expected = pattern(seed);
                let output = through_registers(&expected, has_avx(), 0);
                expected.0[3][..2].copy_from_slice(&[42, 0]);
                assert_eq!(output, expected);
            }
        },
    );
    dune.leave();
}
