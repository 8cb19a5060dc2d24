// SPDX-License-Identifier: MIT OR Apache-2.0

//! Threads in and out of Dune mode do to shared memory, to each other and to their processes whatever Linux offers, at
//! random, and compare what they see with a model of it all along.
//!
//! `DUNE_TORTURE_SEED` and `DUNE_TORTURE_SECONDS`, of guest time, change what a run does. One seed gives the same processes; what their
//! threads do to each other depends on the scheduler too.

mod region;

use std::process::Command;
use std::process::Stdio;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicI32;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::Barrier;
use std::sync::Mutex;
use std::time::Duration;
use std::time::Instant;

use libdune::Dune;

use crate::framework::Suite;
use crate::framework::Test;
use crate::framework::User;
use crate::fuzz::setting;
use crate::fuzz::Random;
use crate::helpers;
use crate::mm::Swap;
use crate::module::assert_nothing_in_use;
use crate::support::compute;
use crate::support::install_signal_probe;
use crate::support::probe_faults;
use crate::support::queue_signal;
use crate::support::set_plain_handler;
use crate::support::spawn;
use crate::support::timer;
use crate::support::Knob;
use crate::support::Shared;
use region::Region;

pub const TESTS: &[Test] = &[
    // About a minute of the host's time where the machine is emulated.
    Test::asserting("torture", || torture(8))
        .suite(Suite::Torture)
        .run_as(User::Root)
        .timeout_s(60),
    Test::asserting("torture_at_length", || torture(60))
        .suite(Suite::Long)
        .run_as(User::Root)
        .timeout_s(400),
];

const REGIONS: usize = 8;

/// Words of the memory that the processes share with the one that looks on.
const ACTIONS: usize = 0;
const FAULTS: usize = 1;
const SIGNALS: usize = 2;
const FORKS: usize = 3;
const PROGRAMS: usize = 4;
const VISITS: usize = 5;
const NAMES: [&str; 6] = [
    "actions",
    "faults",
    "signals",
    "forks",
    "programs",
    "visits to Dune mode",
];

/// Runs processes one after the other for so long; some are killed in the middle.
fn torture(seconds: u64) {
    let seed = setting("DUNE_TORTURE_SEED", 1);
    let seconds = setting("DUNE_TORTURE_SECONDS", seconds);
    let mut random = Random::new(seed);
    let _swap = Swap::on();
    let sums = Shared::new();
    let begin = Instant::now();
    let (mut processes, mut killed) = (0, 0);
    while begin.elapsed() < Duration::from_secs(seconds) {
        let _knob = random
            .percent(30)
            .then(|| Knob::set("fault_delay_us", random.below(40) as u32));
        // Many short lives: where a process begins, its threads make their page tables at once.
        let life = if random.percent(60) {
            100 + random.below(400)
        } else {
            500 + random.below(2500)
        };
        let seed = random.next();
        let child = spawn(|| process(seed, Duration::from_millis(life), &sums));
        processes += 1;
        if random.percent(30) {
            std::thread::sleep(Duration::from_millis(random.below(life)));
            child.kill(libc::SIGKILL);
            let ended = child.wait();
            assert_eq!(ended.signal(), Some(libc::SIGKILL), "process {processes}: {ended:#x?}");
            killed += 1;
        } else {
            let ended = child.wait();
            let good = libc::WIFEXITED(ended.status) && libc::WEXITSTATUS(ended.status) == 0;
            assert!(good, "process {processes} (of seed {seed:#x}): {ended:#x?}");
        }
    }
    let sums: Vec<String> = NAMES
        .iter()
        .enumerate()
        .map(|(word, name)| format!("{} {name}", sums.word(word).load(Relaxed)))
        .collect();
    println!(
        "report: seed {seed}: {processes} processes, {killed} of them killed; {}",
        sums.join(", ")
    );
    assert_nothing_in_use();
}

struct World<'a> {
    regions: Vec<Mutex<Region>>,
    /// The threads' numbers, for signals.
    threads: Vec<AtomicI32>,
    end: Instant,
    /// All threads have sent their last signal.
    quiet: Barrier,
    sums: &'a Shared,
}

/// Where threads are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Dune,
    Ordinary,
    /// Now here, now there.
    Visitor,
}

const MODES: [Mode; 5] = [Mode::Dune, Mode::Dune, Mode::Dune, Mode::Ordinary, Mode::Visitor];

static SENT: AtomicU64 = AtomicU64::new(0);
static RECEIVED: AtomicU64 = AtomicU64::new(0);
static FAILED: AtomicBool = AtomicBool::new(false);

extern "C" fn count(_: i32) {
    RECEIVED.fetch_add(1, SeqCst);
}

extern "C" fn tick(_: i32) {}

fn process(seed: u64, life: Duration, sums: &Shared) {
    let mut random = Random::new(seed);
    install_signal_probe();
    for (signal, handler) in [
        (libc::SIGRTMIN() + 1, count as extern "C" fn(i32)),
        (libc::SIGALRM, tick),
    ] {
        set_plain_handler(signal, handler, libc::SA_RESTART | libc::SA_ONSTACK);
    }
    let world = World {
        regions: (0..REGIONS)
            .map(|number| Mutex::new(Region::new(number, &mut random).unwrap()))
            .collect(),
        threads: MODES.iter().map(|_| AtomicI32::new(0)).collect(),
        end: Instant::now() + life,
        quiet: Barrier::new(MODES.len()),
        sums,
    };
    if random.percent(50) {
        timer(libc::ITIMER_REAL, 3000 + random.below(5000) as i64);
    }
    std::thread::scope(|scope| {
        let threads: Vec<_> = MODES
            .into_iter()
            .enumerate()
            .map(|(number, mode)| {
                let (seed, world) = (random.next(), &world);
                scope.spawn(move || work(world, number, mode, seed))
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
    });
    for region in &world.regions {
        region.lock().unwrap().check_all().unwrap();
    }
    assert_eq!(SENT.load(SeqCst), RECEIVED.load(SeqCst), "signals sent and received");
    sums.word(FAULTS).fetch_add(probe_faults(), Relaxed);
    sums.word(SIGNALS).fetch_add(SENT.load(Relaxed), Relaxed);
}

fn work(world: &World<'_>, number: usize, mode: Mode, seed: u64) {
    let mut random = Random::new(seed);
    // SAFETY: asks for a number.
    world.threads[number].store(unsafe { libc::gettid() }, SeqCst);
    let mut dune = (mode == Mode::Dune).then(|| Dune::enter().unwrap());
    while Instant::now() < world.end && !FAILED.load(Relaxed) {
        if mode == Mode::Visitor && random.percent(20) {
            dune = match dune.take() {
                Some(inside) => {
                    inside.leave();
                    None
                }
                None => {
                    world.sums.word(VISITS).fetch_add(1, Relaxed);
                    Some(Dune::enter().unwrap())
                }
            };
        }
        assert_eq!(Dune::is_active(), dune.is_some(), "where the thread is");
        if let Err(error) = one_thing(world, &mut random) {
            FAILED.store(true, Relaxed);
            eprintln!("thread {number}, in Dune mode: {}: {error}", dune.is_some());
            // The others may wait for what this one holds.
            std::process::exit(102);
        }
        world.sums.word(ACTIONS).fetch_add(1, Relaxed);
    }
    world.quiet.wait();
    // Whatever was sent is delivered at the end of a system call.
    std::thread::sleep(Duration::from_millis(1));
    world.threads[number].store(0, SeqCst);
}

fn one_thing(world: &World<'_>, random: &mut Random) -> Result<(), String> {
    match random.below(64) {
        0..4 => migrate(random),
        4..12 => signal(world, random),
        12..14 => {
            let number = random.next();
            if compute(number % 3000) != std::hint::black_box(compute(number % 3000)) {
                return Err("two sums of the same numbers differ".to_string());
            }
        }
        14..16 => return with_region(world, random, |region, random| fork(world, region, random)),
        16 => return run_program(world),
        17 => return with_region(world, random, short_thread),
        _ => return with_region(world, random, |region, random| region.act(random).map(drop)),
    }
    Ok(())
}

/// Does something with a region that nobody else has just now.
fn with_region(
    world: &World<'_>,
    random: &mut Random,
    body: impl FnOnce(&mut Region, &mut Random) -> Result<(), String>,
) -> Result<(), String> {
    match random.pick(&world.regions).try_lock() {
        Ok(mut region) => body(&mut region, random),
        Err(_) => Ok(()),
    }
}

fn migrate(random: &mut Random) {
    let cpus = helpers::online_cpus();
    // SAFETY: a set of our own for the calling thread.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        let only = random.below(cpus as u64 + 1) as usize;
        (0..cpus)
            .filter(|cpu| only == cpus || *cpu == only)
            .for_each(|cpu| libc::CPU_SET(cpu, &mut set));
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
    }
}

/// One that queues: none may be lost.
fn signal(world: &World<'_>, random: &mut Random) {
    let thread = random.pick(&world.threads).load(SeqCst);
    if thread == 0 {
        return;
    }
    SENT.fetch_add(1, SeqCst);
    // It lives until all have stopped sending. There may be too many already.
    if queue_signal(thread, libc::SIGRTMIN() + 1).is_err() {
        SENT.fetch_sub(1, SeqCst);
    }
}

/// A child that looks at the region, changes it and ends in one way or another.
fn fork(world: &World<'_>, region: &mut Region, random: &mut Random) -> Result<(), String> {
    let (seed, end) = (random.next(), random.below(4));
    let was_active = Dune::is_active();
    let parent = std::process::id();
    // SAFETY: the child uses this region, of which it has the lock, and ends without running what is the parent's.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // One that is killed may not leave behind what nobody knows.
        let visited = if end == 1 {
            region.check_all()
        } else {
            region.visit_as_child(seed)
        };
        let result = visited.and_then(|()| {
            let same = Dune::is_active() == was_active;
            same.then_some(())
                .ok_or_else(|| "a child is not in the mode of its parent".to_string())
        });
        if let Err(error) = &result {
            // SAFETY: our own text. The lock of stderr may be somebody's who is not here.
            unsafe { libc::write(2, error.as_ptr().cast(), error.len()) };
        }
        // SAFETY: ends the child; or waits for the signal that ends it.
        unsafe {
            match end {
                0 if result.is_ok() => {
                    libc::raise(libc::SIGTERM);
                }
                1 if result.is_ok() => {
                    // Its parent may be killed before it kills.
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                    while std::os::unix::process::parent_id() == parent {
                        std::hint::black_box(compute(100));
                    }
                }
                _ => {}
            }
            libc::_exit(if result.is_ok() { 42 } else { 1 });
        }
    }
    if child < 0 {
        return Err(format!("fork: {}", std::io::Error::last_os_error()));
    }
    world.sums.word(FORKS).fetch_add(1, Relaxed);
    let expected = match end {
        0 => libc::SIGTERM,
        1 => libc::SIGKILL,
        _ => 42 << 8,
    };
    if end == 1 {
        std::thread::sleep(Duration::from_micros(random.below(2000)));
        // SAFETY: our own child.
        unsafe { libc::kill(child, libc::SIGKILL) };
    }
    let mut status = 0;
    // SAFETY: our own child.
    while unsafe { libc::waitpid(child, &mut status, 0) } < 0 {}
    if status != expected {
        return Err(format!("a child ended with {status:#x} instead of {expected:#x}"));
    }
    if end != 1 {
        region.after_child(seed);
    }
    region.check_all()
}

fn run_program(world: &World<'_>) -> Result<(), String> {
    world.sums.word(PROGRAMS).fetch_add(1, Relaxed);
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let status = Command::new(program).arg("list").stdout(Stdio::null()).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        other => Err(format!("a program: {other:?}")),
    }
}

/// A thread of the caller's mode looks at the region and changes it.
fn short_thread(region: &mut Region, random: &mut Random) -> Result<(), String> {
    let active = Dune::is_active();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            if Dune::is_active() != active {
                return Err("a thread is not in the mode of its maker".to_string());
            }
            region.write_some(random)?;
            region.check_all()
        });
        thread.join().unwrap_or_else(|_| Err("a thread panicked".to_string()))
    })
}
