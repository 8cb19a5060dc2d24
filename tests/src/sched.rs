// SPDX-License-Identifier: MIT OR Apache-2.0
//! Preemption, migration, signals, other processes.

use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;
use std::time::Instant;

use libdune::Dune;

use crate::framework::Need;
use crate::framework::Test;
use crate::helpers::pin_to_cpu;
use crate::support::compute;
use crate::support::enter;
use crate::support::for_each_rseq;
use crate::support::restartable;
use crate::support::set_affinity;
use crate::support::spawn;
use crate::support::unregister_rseq;
use crate::support::Shared;
use crate::support::EXIT_INTERRUPT;
use crate::support::EXIT_VMCALL;

pub const TESTS: &[Test] = &[
    Test::asserting("rseq_sections_are_aborted", rseq_sections_are_aborted),
    Test::asserting("fences_abort_rseq_sections", fences_abort_rseq_sections).needs(&[Need::Cpus(2)]),
    Test::asserting(
        "registers_without_rseq_survive_moves",
        registers_without_rseq_survive_moves,
    )
    .needs(&[Need::Cpus(2)]),
    Test::asserting("sigkill_ends_guest_loop_at_once", sigkill_ends_guest_loop_at_once),
    Test::asserting("stopped_guest_goes_on", stopped_guest_goes_on),
    Test::asserting("migrates_between_cpus", migrates_between_cpus)
        .needs(&[Need::Cpus(2)])
        .timeout_s(60),
    Test::asserting("preempted_by_busy_neighbour", preempted_by_busy_neighbour).timeout_s(60),
    Test::asserting("guest_time_is_user_time", guest_time_is_user_time),
];

/// Turns of a restartable sequence that takes some 4 M instructions.
const SECTION_TURNS: u32 = 2_000_000;

/// A loop without a system call, an exception or an exit of its own.
fn spin_for_ever() -> ! {
    loop {
        std::hint::spin_loop();
    }
}

fn sigkill_ends_guest_loop_at_once() {
    for signal in [libc::SIGKILL, libc::SIGTERM, libc::SIGKILL] {
        let shared = Shared::new();
        let child = spawn(|| {
            let _dune = enter();
            shared.word(0).store(1, SeqCst);
            spin_for_ever();
        });
        while shared.word(0).load(SeqCst) == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        // Well inside the loop.
        std::thread::sleep(Duration::from_millis(20));
        let start = Instant::now();
        child.kill(signal);
        let ended = child.wait();
        let elapsed = start.elapsed();
        assert_eq!(ended.signal(), Some(signal), "{ended:?}");
        assert!(elapsed < Duration::from_millis(300), "{elapsed:?} until it was gone");
    }
}

fn stopped_guest_goes_on() {
    let shared = Shared::new();
    let child = spawn(|| {
        let dune = enter();
        while shared.word(1).load(SeqCst) == 0 {
            shared.word(0).fetch_add(1, SeqCst);
        }
        assert!(Dune::is_active());
        dune.leave();
    });
    while shared.word(0).load(SeqCst) < 1000 {
        std::thread::sleep(Duration::from_millis(1));
    }
    for _ in 0..3 {
        child.kill(libc::SIGSTOP);
        std::thread::sleep(Duration::from_millis(30));
        let stopped = shared.word(0).load(SeqCst);
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(shared.word(0).load(SeqCst), stopped, "it runs although it is stopped");
        child.kill(libc::SIGCONT);
        let start = Instant::now();
        while shared.word(0).load(SeqCst) == stopped {
            assert!(start.elapsed() < Duration::from_secs(5), "it does not go on");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    shared.word(1).store(1, SeqCst);
    child.wait().assert_success();
}

fn migrates_between_cpus() {
    const MOVES: usize = 60;
    static DONE: AtomicBool = AtomicBool::new(false);
    let expected = compute(20_000);
    // SAFETY: no arguments.
    let thread = unsafe { libc::syscall(libc::SYS_gettid) } as i32;
    let mut memory = vec![0u64; 1 << 16];
    let mover = std::thread::spawn(move || {
        for number in 0..MOVES {
            set_affinity(thread, number % 2);
            std::thread::sleep(Duration::from_millis(4));
        }
        DONE.store(true, SeqCst);
    });
    let dune = enter();
    let before = dune.counters();
    let mut rounds = 0u64;
    while !DONE.load(SeqCst) {
        assert_eq!(compute(20_000), expected, "round {rounds}");
        for word in &mut memory {
            *word += 1;
        }
        rounds += 1;
    }
    let after = dune.counters();
    assert!(memory.iter().all(|word| *word == rounds));
    assert!(Dune::is_active());
    // Behind the moves calls and exceptions still work.
    assert_ne!(std::process::id(), 0);
    dune.leave();
    mover.join().unwrap();
    let moved = after.migrations - before.migrations;
    println!("{moved} migrations, {rounds} rounds");
    assert!(moved >= MOVES as u64 / 2, "{moved} migrations for {MOVES} moves");
    assert_eq!(
        after.exits[EXIT_VMCALL], before.exits[EXIT_VMCALL],
        "the loop makes no calls"
    );
}

fn preempted_by_busy_neighbour() {
    let shared = Shared::new();
    pin_to_cpu(0).unwrap();
    let expected = compute(20_000);
    // Neighbours that count: one native, one in Dune mode with the same page tables' numbers and FPU registers full.
    let native = spawn(|| {
        while shared.word(0).load(SeqCst) == 0 {
            std::hint::black_box(compute(1000));
            shared.word(1).fetch_add(1, SeqCst);
        }
    });
    let dune_neighbour = spawn(|| {
        let dune = enter();
        while shared.word(0).load(SeqCst) == 0 {
            std::hint::black_box(compute(1000));
            shared.word(2).fetch_add(1, SeqCst);
        }
        dune.leave();
    });
    let start = Instant::now();
    let dune = enter();
    let before = dune.counters();
    let mut rounds = 0;
    while start.elapsed() < Duration::from_millis(600) {
        assert_eq!(compute(20_000), expected, "round {rounds}");
        rounds += 1;
    }
    let after = dune.counters();
    dune.leave();
    shared.word(0).store(1, SeqCst);
    native.wait().assert_success();
    dune_neighbour.wait().assert_success();
    let (one, two) = (shared.word(1).load(SeqCst), shared.word(2).load(SeqCst));
    println!("{rounds} rounds here, {one} and {two} of the neighbours");
    assert!(
        rounds > 0 && one > 10 && two > 10,
        "{rounds} rounds, neighbours {one} and {two}"
    );
    assert!(
        after.exits[EXIT_INTERRUPT] > before.exits[EXIT_INTERRUPT],
        "no interrupt came"
    );
}

fn guest_time_is_user_time() {
    let usage = || {
        // SAFETY: rusage is plain data that the call fills in.
        let usage: libc::rusage = unsafe {
            let mut usage = std::mem::zeroed();
            assert_eq!(libc::getrusage(libc::RUSAGE_THREAD, &mut usage), 0);
            usage
        };
        let microseconds = |time: libc::timeval| time.tv_sec * 1_000_000 + time.tv_usec;
        (microseconds(usage.ru_utime), microseconds(usage.ru_stime))
    };
    let dune = enter();
    let (user, system) = usage();
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(500) {
        std::hint::black_box(compute(5000));
    }
    let (user, system) = (usage().0 - user, usage().1 - system);
    dune.leave();
    println!("{user} µs of user time, {system} µs of system time");
    assert!(user > 300_000, "{user} µs of user time for 500 ms of computing");
    assert!(
        user > 9 * system,
        "{system} µs of system time beside {user} µs of user time"
    );
}

/// Each of membarrier's fences aborts the section that the thread is in, not only the first since it was switched.
fn fences_abort_rseq_sections() {
    for_each_rseq(|area| fences_abort_sections(area, || ()));
}

/// `before` is done right before each section.
pub fn fences_abort_sections(area: u64, before: fn()) {
    const FENCES: u64 = 12;
    const FENCE: i32 = 1 << 7;
    const REGISTER: i32 = 1 << 8;
    fn membarrier(command: i32) {
        // SAFETY: no memory is named.
        let result = unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) };
        assert_eq!(result, 0, "membarrier: {}", std::io::Error::last_os_error());
    }
    let (begun, fenced) = (AtomicU64::new(0), AtomicU64::new(0));
    membarrier(REGISTER);
    set_affinity(0, 0);
    let dune = enter();
    let mut aborted = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            set_affinity(0, 1);
            for round in 1..=FENCES {
                while begun.load(SeqCst) != round {
                    std::hint::spin_loop();
                }
                // Well inside the section.
                let start = Instant::now();
                while start.elapsed() < Duration::from_millis(3) {}
                membarrier(FENCE);
                fenced.store(round, SeqCst);
            }
        });
        for round in 1..=FENCES {
            begun.store(round, SeqCst);
            before();
            aborted += u64::from(restartable(area, SECTION_TURNS, &0));
            while fenced.load(SeqCst) != round {
                std::hint::spin_loop();
            }
        }
    });
    assert!(Dune::is_active());
    assert_eq!(aborted, FENCES, "sections that were aborted");
    dune.leave();
}

/// A thread of which Linux keeps no struct rseq (musl's, say) is moved between CPUs while it computes in its SSE registers:
/// none of them goes back to what a CPU had of it before.
fn registers_without_rseq_survive_moves() {
    const ROUNDS: u64 = 200;
    const STEPS: u64 = 20_000;
    let stop = AtomicBool::new(false);
    // SAFETY: no arguments.
    let tid = unsafe { libc::syscall(libc::SYS_gettid) } as i32;
    unregister_rseq();
    let dune = enter();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Nobody else uses the registers of CPU 0.
            set_affinity(0, 1);
            for cpu in [0, 1].into_iter().cycle() {
                if stop.load(SeqCst) {
                    return;
                }
                set_affinity(tid, cpu);
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        let mut sum = 0u64;
        for round in 0..ROUNDS {
            // SAFETY: computes in registers.
            unsafe {
                std::arch::asm!(
                    "movq xmm14, {sum}",
                    "movq xmm15, {one}",
                    "2:",
                    "paddq xmm14, xmm15",
                    "dec rcx",
                    "jnz 2b",
                    "movq {sum}, xmm14",
                    sum = inout(reg) sum,
                    one = in(reg) 1u64,
                    inout("rcx") STEPS => _,
                    out("xmm14") _,
                    out("xmm15") _,
                    options(nomem, nostack),
                );
            }
            assert_eq!(sum, (round + 1) * STEPS, "round {round}");
        }
        stop.store(true, SeqCst);
    });
    assert!(Dune::is_active());
    dune.leave();
}

/// A critical section in which the thread is preempted goes on at its abort address, in Dune mode as outside.
fn rseq_sections_are_aborted() {
    for_each_rseq(preempted_sections_are_aborted);
}

fn preempted_sections_are_aborted(area: u64) {
    set_affinity(0, 0);
    let neighbour = spawn(|| loop {
        std::hint::spin_loop();
    });
    let dune = enter();
    let aborted = (0..60).filter(|_| restartable(area, SECTION_TURNS, &0)).count();
    println!("{aborted} of 60 sections were aborted");
    assert!(aborted > 0);
    assert!(Dune::is_active());
    // Without a neighbour, and not signalled, sections end.
    drop(neighbour);
    let whole = (0..20).filter(|_| !restartable(area, SECTION_TURNS, &0)).count();
    assert!(whole > 0, "every section was aborted");
    dune.leave();
}
