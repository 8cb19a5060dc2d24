// SPDX-License-Identifier: MIT OR Apache-2.0

//! Threads and processes that a Dune thread makes: they are in Dune mode, and are what Linux says they are.

use std::collections::HashSet;
use std::io::Read;
use std::io::Write;
use std::process::Command;
use std::process::Stdio;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::mpsc;
use std::sync::Arc;
use std::sync::Barrier;
use std::sync::Mutex;

use libdune::Dune;
use libdune::Gva;
use libdune::Outcome;
use libdune::Permissions;
use libdune::Thread;
use libdune::TrapFrame;
use libdune::Vector;

use crate::framework::Suite;
use crate::framework::Test;
use crate::framework::User;
use crate::support::compute;
use crate::support::enter;
use crate::support::eventually;
use crate::support::spawn;
use crate::support::Knob;
use crate::support::Map;
use crate::support::Shared;
use crate::support::EXIT_EPT_VIOLATION;
use crate::support::EXIT_VMCALL;
use crate::support::PAGE;

pub const TESTS: &[Test] = &[
    Test::asserting("threads_are_in_dune_mode", threads_are_in_dune_mode),
    Test::asserting(
        "threads_have_exception_stacks_of_their_own",
        threads_have_exception_stacks_of_their_own,
    ),
    Test::asserting("hundred_threads_at_once", hundred_threads_at_once),
    // Some 10 s of the guest's time.
    Test {
        suite: Suite::Long,
        timeout_s: 120,
        ..Test::asserting("five_hundred_threads_at_once", five_hundred_threads_at_once)
    },
    Test::asserting(
        "last_thread_waits_for_those_that_end",
        last_thread_waits_for_those_that_end,
    ),
    Test::asserting(
        "thread_local_storage_is_the_threads_own",
        thread_local_storage_is_the_threads_own,
    ),
    Test::asserting(
        "threads_end_and_their_areas_come_again",
        threads_end_and_their_areas_come_again,
    ),
    Test::asserting(
        "dune_and_ordinary_threads_share_locks",
        dune_and_ordinary_threads_share_locks,
    ),
    Test::asserting("threads_may_stay_outside", threads_may_stay_outside),
    Test::asserting("two_threads_enter_by_themselves", two_threads_enter_by_themselves),
    Test::asserting("main_thread_may_end_first", main_thread_may_end_first),
    Test::asserting("exit_group_ends_all_threads", exit_group_ends_all_threads),
    Test::asserting("fork_goes_on_in_dune_mode", fork_goes_on_in_dune_mode),
    Test::asserting("fork_copies_on_write_both_ways", fork_copies_on_write_both_ways),
    Test::asserting(
        "fork_keeps_page_tables_and_handlers",
        fork_keeps_page_tables_and_handlers,
    ),
    Test::asserting("fork_of_a_thread", fork_of_a_thread),
    Test::asserting("forks_ten_deep", forks_ten_deep),
    Test::asserting("fork_while_threads_run", fork_while_threads_run),
    // Root, for the knob.
    Test::asserting("fork_while_page_tables_grow", fork_while_page_tables_grow).run_as(User::Root),
    Test::asserting("children_may_stay_outside", children_may_stay_outside),
    Test::asserting("vfork_shares_memory_until_exec", vfork_shares_memory_until_exec),
    Test::asserting("vfork_leaves_nothing_behind", vfork_leaves_nothing_behind),
    Test {
        suite: Suite::Long,
        timeout_s: 120,
        ..Test::asserting(
            "vfork_leaves_nothing_behind_600_times",
            vfork_leaves_nothing_behind_600_times,
        )
    },
    Test::asserting("commands_run_and_are_waited_for", commands_run_and_are_waited_for),
    Test::asserting("exec_starts_outside_dune_mode", exec_starts_outside_dune_mode),
    Test::asserting("failed_exec_goes_on", failed_exec_goes_on),
    Test::asserting(
        "daemon_closes_all_and_drops_privileges",
        daemon_closes_all_and_drops_privileges,
    ),
    Test::asserting(
        "daemon_in_a_chroot_gives_up_its_ids",
        daemon_in_a_chroot_gives_up_its_ids,
    )
    .run_as(User::Root),
    Test::asserting("clone_with_shared_memory_only", clone_with_shared_memory_only),
];

fn vcpus_of_this_process(dune: &Dune) -> u32 {
    let _ = dune;
    let mut info = dune_abi::Info {
        size: size_of::<dune_abi::Info>() as u32,
        ..dune_abi::Info::default()
    };
    let fd = (3..2000)
        // SAFETY: asks the device; other files say ENOTTY or EBADF.
        .find(|fd| unsafe { libc::ioctl(*fd, u64::from(dune_abi::DUNE_GET_INFO), &mut info) } == 0);
    assert!(fd.is_some(), "no fd of the device");
    info.vcpus
}

fn threads_are_in_dune_mode() {
    let dune = enter();
    let here = dune.vcpu();
    let pid = std::process::id();
    let (vcpu, entries, result) = std::thread::spawn(move || {
        assert!(Dune::is_active(), "a thread is not at CPL0");
        assert_eq!(std::process::id(), pid);
        let text = std::fs::read_to_string("/proc/thread-self/comm").unwrap();
        assert!(!text.is_empty());
        Thread::with_current(|thread| (thread.vcpu(), thread.counters().entries, compute(10_000))).unwrap()
    })
    .join()
    .unwrap();
    assert_ne!(vcpu, here);
    assert!(entries > 3, "{entries} entries");
    assert!(Dune::is_active());
    dune.leave();
    assert_eq!(result, compute(10_000));
    // Outside Dune mode threads are what they always are.
    assert!(!std::thread::spawn(Dune::is_active).join().unwrap());
}

static FAULTS: AtomicUsize = AtomicUsize::new(0);

/// Skips UD2, after a while in which other threads are in here too, and a fault of its own.
fn slow_skip(frame: &mut TrapFrame, _: &Thread<'_>) -> Outcome {
    FAULTS.fetch_add(1, Relaxed);
    std::hint::black_box(compute(200));
    frame.rip += 2;
    Outcome::Resume
}

fn ud2(tag: u64) -> u64 {
    let out: u64;
    // SAFETY: the handler skips it; all registers come back.
    unsafe { std::arch::asm!("ud2", inlateout("rax") tag => out) };
    out
}

fn threads_have_exception_stacks_of_their_own() {
    const THREADS: usize = 8;
    let dune = enter();
    dune.set_exception_handler(Vector::UD, slow_skip);
    FAULTS.store(0, Relaxed);
    let barrier = Arc::new(Barrier::new(THREADS));
    let threads: Vec<_> = (0..THREADS as u64)
        .map(|tag| {
            let barrier = barrier.clone();
            std::thread::spawn(move || {
                barrier.wait();
                for round in 0..200 {
                    assert_eq!(ud2(tag << 32 | round), tag << 32 | round);
                }
                assert!(Dune::is_active());
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    assert_eq!(FAULTS.load(Relaxed), THREADS * 200);
    dune.leave();
}

/// A thread that was joined may still be on its way out of its area when the last one unmaps them all.
fn last_thread_waits_for_those_that_end() {
    for _ in 0..50 {
        let dune = enter();
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| std::hint::black_box(compute(10)));
            }
        });
        dune.leave();
    }
}

fn hundred_threads_at_once() {
    const THREADS: usize = 100;
    let dune = enter();
    let barrier = Arc::new(Barrier::new(THREADS + 1));
    let sum = Arc::new(AtomicU64::new(0));
    let threads: Vec<_> = (0..THREADS as u64)
        .map(|number| {
            let (barrier, sum) = (barrier.clone(), sum.clone());
            std::thread::Builder::new()
                .stack_size(64 << 10)
                .spawn(move || {
                    barrier.wait();
                    assert!(Dune::is_active());
                    let text = vec![number as u8; 5000];
                    sum.fetch_add(text.iter().map(|byte| u64::from(*byte)).sum::<u64>(), Relaxed);
                    barrier.wait();
                })
                .unwrap()
        })
        .collect();
    barrier.wait();
    let vcpus = vcpus_of_this_process(&dune);
    assert_eq!(vcpus, THREADS as u32 + 1);
    barrier.wait();
    for thread in threads {
        thread.join().unwrap();
    }
    assert_eq!(sum.load(Relaxed), (0..100).sum::<u64>() * 5000);
    dune.leave();
}

/// Nearly as many as there are areas, all alive: each makes a call, and touches a page that nobody else has.
fn five_hundred_threads_at_once() {
    const THREADS: usize = 500;
    let dune = enter();
    let barrier = Barrier::new(THREADS + 1);
    let mut vcpus = 0;
    let seen = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS as u64)
            .map(|number| {
                let barrier = &barrier;
                std::thread::Builder::new()
                    .stack_size(64 << 10)
                    .spawn_scoped(scope, move || {
                        let page = Map::new(PAGE);
                        page.write(8, number);
                        // SAFETY: a call without arguments.
                        let tid = unsafe { libc::syscall(libc::SYS_gettid) };
                        barrier.wait();
                        // All are there now, and go on when the first thread has looked.
                        barrier.wait();
                        assert_eq!(page.read(8), number);
                        let (vcpu, counters) =
                            Thread::with_current(|thread| (thread.vcpu(), thread.counters())).unwrap();
                        assert!(counters.exits[EXIT_EPT_VIOLATION] > 0 && counters.exits[EXIT_VMCALL] > 2);
                        (tid, vcpu)
                    })
                    .unwrap()
            })
            .collect();
        barrier.wait();
        vcpus = vcpus_of_this_process(&dune);
        barrier.wait();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect::<Vec<_>>()
    });
    let tids: HashSet<_> = seen.iter().map(|(tid, _)| tid).collect();
    let numbers: HashSet<_> = seen.iter().map(|(_, vcpu)| vcpu).collect();
    assert_eq!((tids.len(), numbers.len()), (THREADS, THREADS));
    assert_eq!(vcpus, THREADS as u32 + 1);
    assert!(eventually(|| vcpus_of_this_process(&dune) == 1));
    dune.leave();
}

thread_local! {
    static LOCAL: std::cell::RefCell<Vec<u64>> = const { std::cell::RefCell::new(Vec::new()) };
}

fn thread_local_storage_is_the_threads_own() {
    let dune = enter();
    LOCAL.with_borrow_mut(|local| local.push(7));
    let threads: Vec<_> = (0..4u64)
        .map(|number| {
            std::thread::spawn(move || {
                for value in 0..1000 {
                    LOCAL.with_borrow_mut(|local| local.push(value * number));
                    if value % 100 == 0 {
                        std::thread::yield_now();
                    }
                }
                LOCAL.with_borrow(|local| local.iter().sum::<u64>())
            })
        })
        .collect();
    for (number, thread) in threads.into_iter().enumerate() {
        assert_eq!(thread.join().unwrap(), 499_500 * number as u64);
    }
    LOCAL.with_borrow(|local| assert_eq!(*local, [7]));
    dune.leave();
}

fn threads_end_and_their_areas_come_again() {
    let dune = enter();
    // More than there are areas, so that one that is not given back shows.
    for round in 0..600u64 {
        let got = std::thread::spawn(move || if Dune::is_active() { round } else { u64::MAX })
            .join()
            .unwrap();
        assert_eq!(got, round, "outside Dune mode");
    }
    assert_eq!(vcpus_of_this_process(&dune), 1);
    dune.leave();
}

fn dune_and_ordinary_threads_share_locks() {
    let (to_ordinary, inbox) = mpsc::channel::<u64>();
    let total = Arc::new(Mutex::new(0u64));
    let shared = total.clone();
    let ordinary = std::thread::spawn(move || {
        assert!(!Dune::is_active());
        let mut seen = 0;
        for value in inbox {
            seen += 1;
            *shared.lock().unwrap() += value;
        }
        seen
    });
    let dune = enter();
    let threads: Vec<_> = (0..3u64)
        .map(|number| {
            let (total, sender) = (total.clone(), to_ordinary.clone());
            std::thread::spawn(move || {
                assert!(Dune::is_active());
                for value in 0..500 {
                    *total.lock().unwrap() += 1;
                    sender.send(value * number).unwrap();
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    drop(to_ordinary);
    assert_eq!(ordinary.join().unwrap(), 1500);
    assert_eq!(*total.lock().unwrap(), 1500 + 124_750 * 3);
    dune.leave();
}

fn threads_may_stay_outside() {
    let dune = Dune::builder().threads(false).enter().unwrap();
    assert!(Dune::is_active());
    assert!(!std::thread::spawn(Dune::is_active).join().unwrap());
    // A thread that stays outside may enter by itself.
    let inside = std::thread::spawn(|| {
        let dune = enter();
        let inside = Dune::is_active();
        dune.leave();
        inside && !Dune::is_active()
    });
    assert!(inside.join().unwrap());
    assert!(Dune::is_active());
    dune.leave();
}

fn two_threads_enter_by_themselves() {
    let barrier = Arc::new(Barrier::new(2));
    let threads: Vec<_> = (0..2u64)
        .map(|number| {
            let barrier = barrier.clone();
            std::thread::spawn(move || {
                for _ in 0..20 {
                    barrier.wait();
                    let dune = enter();
                    dune.set_exception_handler(Vector::UD, slow_skip);
                    assert_eq!(ud2(number), number);
                    dune.leave();
                    assert!(!Dune::is_active());
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

fn main_thread_may_end_first() {
    let shared = Shared::new();
    let child = spawn(|| {
        // SAFETY: the word is never unmapped in the child.
        let word: &'static AtomicU64 = unsafe { &*std::ptr::from_ref(shared.word(0)) };
        std::mem::forget(enter());
        std::thread::spawn(|| {
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert!(Dune::is_active());
            word.store(compute(1000), SeqCst);
            // SAFETY: ends the process.
            unsafe { libc::syscall(libc::SYS_exit_group, 0) };
        });
        // SAFETY: ends this thread only.
        unsafe { libc::syscall(libc::SYS_exit, 7) };
    });
    child.wait().assert_success();
    assert_eq!(shared.word(0).load(SeqCst), compute(1000));
}

fn exit_group_ends_all_threads() {
    let child = spawn(|| {
        let _dune = enter();
        for _ in 0..4 {
            std::thread::spawn(|| loop {
                std::hint::spin_loop();
            });
        }
        std::thread::spawn(|| std::process::exit(42)).join().unwrap();
    });
    let ended = child.wait();
    assert!(libc::WIFEXITED(ended.status), "{ended:?}");
    assert_eq!(libc::WEXITSTATUS(ended.status), 42);
}

/// Forks, runs `body` in the child and gives its exit status.
fn forked(body: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the child runs `body`, which allocates only where no other thread can hold the allocator, and ends.
    unsafe {
        let pid = libc::fork();
        assert!(pid >= 0);
        if pid == 0 {
            let status = body();
            libc::_exit(status);
        }
        let mut status = -1;
        assert_eq!(libc::waitpid(pid, &mut status, 0), pid);
        assert!(libc::WIFEXITED(status), "{status:#x}");
        libc::WEXITSTATUS(status)
    }
}

fn fork_goes_on_in_dune_mode() {
    let dune = enter();
    let parent = std::process::id();
    let marker = compute(5000);
    let status = forked(|| {
        if !Dune::is_active() {
            return 1;
        }
        // SAFETY: asks Linux.
        if unsafe { libc::getppid() } as u32 != parent || std::process::id() == parent {
            return 2;
        }
        if compute(5000) != marker {
            return 3;
        }
        // The vCPU is a fresh one of a space of its own.
        if dune.counters().entries > 10_000 || vcpus_of_this_process(&dune) != 1 {
            return 4;
        }
        let thread = std::thread::spawn(Dune::is_active).join();
        if !matches!(thread, Ok(true)) {
            return 5;
        }
        0
    });
    assert_eq!(status, 0);
    // The token works in the child too.
    let status = forked(|| {
        dune.set_exception_handler(Vector::UD, slow_skip);
        if ud2(9) == 9 && !Dune::is_active() {
            1
        } else {
            0
        }
    });
    assert_eq!(status, 0);
    assert!(Dune::is_active());
    dune.leave();
    // A child may leave by the token that its parent has too.
    let dune = enter();
    // SAFETY: the child ends at once.
    unsafe {
        let pid = libc::fork();
        if pid == 0 {
            dune.leave();
            libc::_exit(i32::from(Dune::is_active()));
        }
        let mut status = -1;
        libc::waitpid(pid, &mut status, 0);
        assert_eq!(status, 0);
    }
    assert!(Dune::is_active());
    dune.leave();
}

fn fork_copies_on_write_both_ways() {
    const PAGES: usize = 256;
    let map = Map::new(PAGES * PAGE);
    let shared = Shared::new();
    let dune = enter();
    let page = |index: usize| {
        // SAFETY: inside the map.
        unsafe { AtomicU64::from_ptr(map.start.add(index * PAGE).cast()) }
    };
    for index in 0..PAGES {
        page(index).store(index as u64, Relaxed);
    }
    // SAFETY: the child only works on memory and ends.
    unsafe {
        let pid = libc::fork();
        assert!(pid >= 0);
        if pid == 0 {
            for index in (0..PAGES).step_by(2) {
                page(index).store(1_000_000 + index as u64, Relaxed);
            }
            shared.word(0).store(1, SeqCst);
            while shared.word(1).load(SeqCst) == 0 {
                libc::sched_yield();
            }
            let fine = (0..PAGES).all(|index| {
                let expected = if index % 2 == 0 { 1_000_000 + index } else { index };
                page(index).load(Relaxed) == expected as u64
            });
            libc::_exit(i32::from(!fine));
        }
        for index in (1..PAGES).step_by(2) {
            page(index).store(2_000_000 + index as u64, Relaxed);
        }
        while shared.word(0).load(SeqCst) == 0 {
            libc::sched_yield();
        }
        for index in 0..PAGES {
            let expected = if index % 2 == 1 { 2_000_000 + index } else { index };
            assert_eq!(page(index).load(Relaxed), expected as u64, "page {index}");
        }
        shared.word(1).store(1, SeqCst);
        let mut status = -1;
        libc::waitpid(pid, &mut status, 0);
        assert_eq!(status, 0, "the child saw what is not its own");
    }
    dune.leave();
}

static PROTECTED: AtomicU64 = AtomicU64::new(0);

fn unprotect(frame: &mut TrapFrame, thread: &Thread<'_>) -> Outcome {
    let Some(page) = Gva::new(frame.cr2 & !0xfff) else {
        return Outcome::Unhandled;
    };
    PROTECTED.fetch_add(1, Relaxed);
    match thread
        .current_address_space()
        .protect(page, PAGE as u64, Permissions::ALL)
    {
        Ok(flush) => flush.flush(),
        Err(_) => return Outcome::Unhandled,
    }
    Outcome::Resume
}

fn fork_keeps_page_tables_and_handlers() {
    let map = Map::new(16 * PAGE);
    let dune = enter();
    dune.set_exception_handler(Vector::PF, unprotect);
    for index in 0..16 {
        // SAFETY: inside the map.
        unsafe { map.start.add(index * PAGE).write(index as u8) };
    }
    let start = Gva::new(map.start as u64).unwrap();
    dune.address_space()
        .protect(start, 16 * PAGE as u64, Permissions::NONE)
        .unwrap()
        .flush();
    PROTECTED.store(0, Relaxed);
    let touch = || {
        (0..16).all(|index| {
            // SAFETY: inside the map; the handler gives access.
            unsafe { map.start.add(index * PAGE).read_volatile() == index as u8 }
        }) && PROTECTED.load(Relaxed) == 16
    };
    assert_eq!(forked(|| i32::from(!touch())), 0, "in the child");
    assert_eq!(PROTECTED.load(Relaxed), 0, "the child's table is not its own");
    assert!(touch());
    dune.leave();
}

fn fork_of_a_thread() {
    let dune = enter();
    let status = std::thread::spawn(|| {
        forked(|| {
            let thread = std::thread::spawn(Dune::is_active).join();
            i32::from(!Dune::is_active() || !matches!(thread, Ok(true)))
        })
    })
    .join()
    .unwrap();
    assert_eq!(status, 0);
    assert!(Dune::is_active());
    dune.leave();
}

fn forks_ten_deep() {
    fn deeper(level: i32) -> i32 {
        if !Dune::is_active() {
            return 100;
        }
        if level == 0 {
            return 0;
        }
        let below = forked(|| deeper(level - 1));
        if below == 0 {
            0
        } else {
            below + 1
        }
    }
    let dune = enter();
    assert_eq!(deeper(10), 0);
    dune.leave();
}

fn fork_while_threads_run() {
    let dune = enter();
    let stop = Arc::new(AtomicU32::new(0));
    let threads: Vec<_> = (0..3)
        .map(|_| {
            let stop = stop.clone();
            std::thread::spawn(move || {
                let map = Map::new(64 * PAGE);
                let mut round = 0u8;
                while stop.load(Relaxed) == 0 {
                    round = round.wrapping_add(1);
                    for index in 0..64 {
                        // SAFETY: inside the map.
                        unsafe { map.start.add(index * PAGE).write_volatile(round) };
                    }
                    for index in 0..64 {
                        // SAFETY: inside the map.
                        assert_eq!(unsafe { map.start.add(index * PAGE).read_volatile() }, round);
                    }
                }
                Dune::is_active()
            })
        })
        .collect();
    for _ in 0..20 {
        assert_eq!(forked(|| i32::from(!Dune::is_active())), 0);
    }
    stop.store(1, Relaxed);
    for thread in threads {
        assert!(thread.join().unwrap());
    }
    dune.leave();
}

/// Linux copies the arena piece by piece, while another thread takes pages for tables and puts them into others: a child in which
/// a page is a table and free at once would give it to a second table.
fn fork_while_page_tables_grow() {
    const LARGE: usize = 2 << 20;
    const PIECES: usize = 1024;
    const IN_CHILD: usize = 16;
    let protect = |address: usize| {
        let page = Gva::new(address as u64).unwrap();
        let protected = Thread::with_current(|thread| {
            let space = thread.address_space();
            space
                .protect(page, PAGE as u64, Permissions::READ)
                .map(|flush| flush.flush())
                .is_ok()
        });
        protected == Some(true)
    };
    // A piece whose first page was protected maps itself, from a table of its own.
    let is_whole = |address: usize| {
        let page = |offset: usize| Gva::new((address + offset) as u64).unwrap();
        Thread::with_current(|thread| {
            let space = thread.address_space();
            [0, PAGE, LARGE - PAGE].into_iter().all(|offset| {
                let at = page(offset);
                let wanted = if offset == 0 {
                    Permissions::READ
                } else {
                    Permissions::ALL
                };
                space.look_up(at).map(|found| found.permissions) == Some(wanted)
                    && space.hva(at).map(|hva| hva.as_u64()) == Some(at.as_u64())
            })
        }) == Some(true)
    };
    let map = |bytes| Map::at(0, bytes, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_NORESERVE);
    let (first, second) = (map((PIECES + 1) * LARGE), map((IN_CHILD + 1) * LARGE));
    let starts = [&first, &second].map(|map| map.address().next_multiple_of(LARGE));
    let piece = |map: usize, number: usize| starts[map] + number * LARGE;
    let dune = enter();
    let _delay = Knob::set("invalidate_delay_us", 50);
    let done = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0..PIECES {
                assert!(protect(piece(0, number)), "piece {number}");
                done.store(number + 1, SeqCst);
            }
        });
        let mut forks = 0;
        while done.load(SeqCst) < PIECES || forks == 0 {
            let status = forked(|| {
                let mine = |number| piece(1, number);
                if !(0..IN_CHILD).all(|number| protect(mine(number)))
                    || !(0..IN_CHILD).all(|number| is_whole(mine(number)))
                {
                    return 1;
                }
                let done = done.load(SeqCst);
                i32::from(!(0..done).all(|number| is_whole(piece(0, number)))) * 2
            });
            assert_eq!(status, 0, "fork {forks}, {} pieces", done.load(SeqCst));
            forks += 1;
        }
        println!("report: {forks} forks");
    });
    dune.leave();
}

fn children_may_stay_outside() {
    let dune = Dune::builder().children(false).enter().unwrap();
    assert_eq!(forked(|| i32::from(Dune::is_active())), 0);
    assert!(std::thread::spawn(Dune::is_active).join().unwrap());
    let output = Command::new("echo").arg("outside").output().unwrap();
    assert_eq!(output.stdout, b"outside\n");
    dune.leave();
}

#[allow(deprecated)] // The child does what a child of vfork may do.
fn vfork_shares_memory_until_exec() {
    let dune = enter();
    let mut seen = 0u64;
    let path = c"/bin/true";
    // SAFETY: the child writes to memory that it shares with its waiting parent, and executes another program.
    let pid = unsafe {
        let pid = libc::vfork();
        if pid == 0 {
            (&raw mut seen).write_volatile(if Dune::is_active() { 1 } else { 2 });
            libc::execv(path.as_ptr(), [path.as_ptr(), std::ptr::null()].as_ptr());
            libc::_exit(99);
        }
        pid
    };
    assert!(pid > 0);
    // SAFETY: a local.
    assert_eq!(
        unsafe { (&raw const seen).read_volatile() },
        1,
        "the child was outside Dune mode"
    );
    let mut status = -1;
    // SAFETY: our own child.
    unsafe { libc::waitpid(pid, &mut status, 0) };
    assert_eq!(status, 0);
    // A child that ends without executing anything.
    // SAFETY: as above.
    unsafe {
        let pid = libc::vfork();
        if pid == 0 {
            libc::_exit(23);
        }
        libc::waitpid(pid, &mut status, 0);
    }
    assert_eq!(libc::WEXITSTATUS(status), 23);
    assert!(Dune::is_active());
    dune.leave();
}

fn vfork_leaves_nothing_behind() {
    vforks(120);
}

/// More than there are areas.
fn vfork_leaves_nothing_behind_600_times() {
    vforks(600);
}

fn vforks(times: u32) {
    let dune = enter();
    for round in 0..times {
        let status = Command::new("/bin/true").status().unwrap();
        assert!(status.success(), "round {round}");
    }
    let vcpus = vcpus_of_this_process(&dune);
    // The module looks at 8 of 512 places whenever a vCPU is made: 64 may wait for it.
    assert!(vcpus < 80, "{vcpus} vCPUs");
    assert!(std::thread::spawn(Dune::is_active).join().unwrap(), "no area is left");
    dune.leave();
}

fn commands_run_and_are_waited_for() {
    let dune = enter();
    let output = Command::new("sh").args(["-c", "echo $PPID; exit 3"]).output().unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).trim(),
        std::process::id().to_string()
    );
    let mut child = Command::new("sort")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"b\na\nc\n").unwrap();
    let mut sorted = String::new();
    child.stdout.take().unwrap().read_to_string(&mut sorted).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(sorted, "a\nb\nc\n");
    // SAFETY: a terminated string.
    let status = unsafe { libc::system(c"test \"$(echo a | tr a b)\" = b".as_ptr()) };
    assert_eq!(status, 0);
    assert_eq!(
        Command::new("/does/not/exist").status().unwrap_err().kind(),
        std::io::ErrorKind::NotFound
    );
    assert!(Dune::is_active());
    dune.leave();
}

fn exec_starts_outside_dune_mode() {
    let child = spawn(|| {
        let _dune = enter();
        std::thread::spawn(|| loop {
            std::hint::spin_loop();
        });
        let script = c"ls -l /proc/self/fd; grep -c dune /proc/self/maps; echo done";
        let arguments = [c"sh".as_ptr(), c"-c".as_ptr(), script.as_ptr(), std::ptr::null()];
        // SAFETY: terminated strings.
        unsafe { libc::execv(c"/bin/sh".as_ptr(), arguments.as_ptr()) };
    });
    let ended = child.wait();
    ended.assert_success();
    assert!(ended.output.ends_with("0\ndone\n"), "{}", ended.output);
    assert!(!ended.output.contains("dune"), "{}", ended.output);
}

fn failed_exec_goes_on() {
    let dune = enter();
    let path = c"/does/not/exist";
    for _ in 0..3 {
        // SAFETY: a terminated string, and no such program.
        let result = unsafe { libc::execv(path.as_ptr(), [path.as_ptr(), std::ptr::null()].as_ptr()) };
        assert_eq!(result, -1);
        assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::ENOENT));
        assert!(Dune::is_active());
    }
    dune.leave();
}

fn daemon_closes_all_and_drops_privileges() {
    let shared = Shared::new();
    let dune = enter();
    // SAFETY: what a daemon does at its start.
    unsafe {
        let pid = libc::fork();
        if pid == 0 {
            libc::setsid();
            for fd in 0..1024 {
                libc::close(fd);
            }
            libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0);
            libc::chdir(c"/".as_ptr());
            let inside = Dune::is_active();
            let grandchild = libc::fork();
            if grandchild == 0 {
                shared.word(0).store(if Dune::is_active() { 1 } else { 2 }, SeqCst);
                libc::_exit(0);
            }
            let mut status = -1;
            libc::waitpid(grandchild, &mut status, 0);
            libc::_exit(if inside && status == 0 { 0 } else { 1 });
        }
        let mut status = -1;
        libc::waitpid(pid, &mut status, 0);
        assert_eq!(status, 0);
    }
    assert_eq!(shared.word(0).load(SeqCst), 1);
    dune.leave();
}

/// Where there is no device and no right to open it: children and threads are in Dune mode by what the process has.
fn daemon_in_a_chroot_gives_up_its_ids() {
    const NOBODY: u32 = 65534;
    let root = std::env::temp_dir().join(format!("dune-chroot-{}", std::process::id()));
    std::fs::create_dir(&root).unwrap();
    std::fs::copy("/bin/busybox", root.join("busybox")).unwrap();
    let ended = spawn(|| {
        let dune = enter();
        let path = std::ffi::CString::new(root.to_str().unwrap()).unwrap();
        // SAFETY: what a daemon does at its start; terminated strings.
        unsafe {
            assert_eq!(libc::chroot(path.as_ptr()), 0);
            assert_eq!(libc::chdir(c"/".as_ptr()), 0);
            assert_eq!(libc::setgroups(0, std::ptr::null()), 0);
            assert_eq!(libc::setresgid(NOBODY, NOBODY, NOBODY), 0);
            assert_eq!(libc::setresuid(NOBODY, NOBODY, NOBODY), 0);
            assert_eq!(libc::setresuid(0, 0, 0), -1);
            assert_eq!(libc::open(c"/dev/dune".as_ptr(), libc::O_RDWR), -1);
            assert_eq!((libc::getuid(), libc::getegid()), (NOBODY, NOBODY));
        }
        assert!(Dune::is_active());
        let is_active = std::thread::spawn(|| {
            // SAFETY: asks for an id.
            let id = unsafe { libc::geteuid() };
            (Dune::is_active(), id)
        });
        assert_eq!(is_active.join().unwrap(), (true, NOBODY));
        spawn(|| {
            // SAFETY: asks for an id.
            assert_eq!(unsafe { libc::getuid() }, NOBODY);
            assert!(Dune::is_active());
            let of_thread = std::thread::spawn(Dune::is_active);
            assert!(of_thread.join().unwrap());
        })
        .wait()
        .assert_success();
        let status = Command::new("/busybox").args(["sh", "-c", "exit 7"]).status().unwrap();
        assert_eq!(status.code(), Some(7));
        dune.leave();
    })
    .wait();
    std::fs::remove_dir_all(&root).unwrap();
    ended.assert_success();
}

fn clone_with_shared_memory_only() {
    const STACK: usize = 64 << 10;
    extern "C" fn body(argument: *mut libc::c_void) -> i32 {
        // SAFETY: the maker's word.
        let word = unsafe { &*argument.cast::<AtomicU64>() };
        word.store(if Dune::is_active() { 1 } else { 2 }, SeqCst);
        5
    }
    let stack = Map::new(STACK);
    let dune = enter();
    for round in 0..20 {
        let word = AtomicU64::new(0);
        // SAFETY: the stack is the child's alone, and both live until it is waited for.
        unsafe {
            let pid = libc::clone(
                body,
                stack.start.add(STACK).cast(),
                libc::CLONE_VM | libc::SIGCHLD,
                (&raw const word).cast_mut().cast(),
            );
            assert!(pid > 0);
            let mut status = -1;
            assert_eq!(libc::waitpid(pid, &mut status, 0), pid);
            assert_eq!(libc::WEXITSTATUS(status), 5, "round {round}: {status:#x}");
        }
        assert_eq!(word.load(SeqCst), 1, "round {round}");
    }
    dune.leave();
}
