// SPDX-License-Identifier: MIT OR Apache-2.0

//! Threads in and out of Dune mode do to shared memory, to each other and to their processes whatever Linux offers, at
//! random, and compare what they see with a model of it all along.
//!
//! `DUNE_TORTURE_SEED` and `DUNE_TORTURE_SECONDS`, of guest time, change what a run does. One seed gives the same processes; what
//! their threads do to each other depends on the scheduler too. A run of full length has done each thing that it can do at
//! least once, in Dune mode and out of it.

mod region;

use std::ffi::CString;
use std::process::Command;
use std::process::ExitCode;
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
use crate::syscall::device_fds;
use region::Region;

pub const TESTS: &[Test] = &[
    // About a minute of the host's time where the machine is emulated.
    Test::asserting("torture", || torture(8))
        .suite(Suite::Torture)
        .run_as(User::Root)
        .timeout_s(60)
        .lasts(SECONDS),
    Test::asserting("torture_at_length", || torture(60))
        .suite(Suite::Long)
        .run_as(User::Root)
        .timeout_s(400)
        .lasts(SECONDS),
];

/// How long a run lasts, where that is not the test's own choice.
const SECONDS: &str = "DUNE_TORTURE_SECONDS";

const REGIONS: usize = 8;

/// Words of the memory that the processes share with the one that looks on.
const ACTIONS: usize = 0;
const FAULTS: usize = 1;
const SIGNALS: usize = 2;
const VISITS: usize = 3;
const FAILURES: usize = 4;
const NAMES: [&str; 4] = ["actions", "faults", "signals", "visits to Dune mode"];
/// Two for each of [`kinds`]: done out of Dune mode, and in it.
const KINDS: usize = 16;

/// What threads do besides what is done to a region.
const MIGRATE: &str = "sched_setaffinity";
const SIGNAL: &str = "signal";
const COMPUTE: &str = "two sums";
const PROGRAM: &str = "program";
const THREAD: &str = "thread";
const TOUCH: &str = "touch";
const EXECUTE: &str = "execve";
/// fork, by how the child ends.
const FORKS: [&str; 3] = ["child with SIGTERM", "child with SIGKILL", "child"];

/// All that a run has to have done.
fn kinds() -> impl Iterator<Item = &'static str> {
    [MIGRATE, SIGNAL, COMPUTE, PROGRAM, THREAD, TOUCH, EXECUTE]
        .into_iter()
        .chain(FORKS)
        .chain(region::acts())
}

/// How often that was done.
fn times<'a>(sums: &'a Shared, kind: &str, in_dune: bool) -> &'a AtomicU64 {
    let number = kinds().position(|other| other == kind).expect("a kind");
    sums.word(KINDS + 2 * number + usize::from(in_dune))
}

/// What was never done yet in a mode.
fn missing(sums: &Shared) -> Vec<String> {
    let modes = [(false, "out of"), (true, "in")];
    let all = kinds().flat_map(|kind| modes.map(|(in_dune, mode)| (kind, in_dune, mode)));
    all.filter(|(kind, in_dune, _)| times(sums, kind, *in_dune).load(Relaxed) == 0)
        .map(|(kind, _, mode)| format!("{kind} {mode} Dune mode"))
        .collect()
}

/// So many times its length a run goes on at most until each thing was done in both modes.
const LONGER: u64 = 2;

/// With what the program ends that a thread executes.
const EXECUTED: u8 = 43;

/// Runs processes one after the other for so long; some are killed in the middle, of some a thread executes a program.
fn torture(length: u64) {
    let seed = setting("DUNE_TORTURE_SEED", 1);
    let seconds = setting(SECONDS, length);
    let mut random = Random::new(seed);
    let _swap = Swap::on();
    let sums = Shared::new();
    let begin = Instant::now();
    let (mut processes, mut killed) = (0, 0);
    // What seldom succeeds gets more time.
    let lasts = |seconds| begin.elapsed() < Duration::from_secs(seconds);
    let longer = seconds + LONGER * length;
    while lasts(seconds) || seconds >= length && lasts(longer) && !missing(&sums).is_empty() {
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
        // The first ones of each kind, in and out of Dune mode, whatever the seed.
        let executor = match processes {
            0 => Some(0),
            1 => Some(ORDINARY),
            2 => None,
            _ => random.percent(25).then(|| random.below(MODES.len() as u64) as usize),
        };
        let child = spawn(|| process(seed, Duration::from_millis(life), executor, &sums));
        processes += 1;
        let kill = executor.is_none() && (processes == 3 || random.percent(40));
        if kill {
            std::thread::sleep(Duration::from_millis(random.below(life)));
            child.kill(libc::SIGKILL);
        }
        let ended = child.wait();
        let good = if kill {
            killed += 1;
            ended.signal() == Some(libc::SIGKILL)
        } else {
            let expected = executor.map_or(0, |_| i32::from(EXECUTED));
            libc::WIFEXITED(ended.status) && libc::WEXITSTATUS(ended.status) == expected
        };
        // Who is killed, or executes, may have failed before.
        let failures = sums.word(FAILURES).load(SeqCst);
        assert!(
            good && failures == 0,
            "process {processes} (of seed {seed:#x}, killed: {kill}, executor: {executor:?}): {ended:#x?}"
        );
    }
    let texts: Vec<String> = NAMES
        .iter()
        .enumerate()
        .map(|(word, name)| format!("{} {name}", sums.word(word).load(Relaxed)))
        .collect();
    println!(
        "report: seed {seed}: {processes} processes, {killed} of them killed; {}",
        texts.join(", ")
    );
    let texts: Vec<String> = kinds()
        .map(|kind| {
            let [outside, inside] = [false, true].map(|mode| times(&sums, kind, mode).load(Relaxed));
            format!("{kind} {outside}, {inside}")
        })
        .collect();
    println!("report: out of Dune mode, in it: {}", texts.join("; "));
    assert_nothing_in_use();
    if seconds >= length {
        let missing = missing(&sums);
        assert!(missing.is_empty(), "never done: {}", missing.join(", "));
        assert_ne!(killed, 0, "no process was killed");
    }
}

struct World<'a> {
    regions: Vec<Mutex<Region>>,
    /// The threads' numbers, for signals.
    threads: Vec<AtomicI32>,
    end: Instant,
    /// Who executes a program, if anybody does, and when.
    executor: Option<(usize, Instant)>,
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
const ORDINARY: usize = 3;

static SENT: AtomicU64 = AtomicU64::new(0);
static RECEIVED: AtomicU64 = AtomicU64::new(0);
static FAILED: AtomicBool = AtomicBool::new(false);

extern "C" fn count(_: i32) {
    RECEIVED.fetch_add(1, SeqCst);
}

extern "C" fn tick(_: i32) {}

fn process(seed: u64, life: Duration, executor: Option<usize>, sums: &Shared) {
    let mut random = Random::new(seed);
    install_signal_probe();
    for (signal, handler) in [
        (libc::SIGRTMIN() + 1, count as extern "C" fn(i32)),
        (libc::SIGALRM, tick),
    ] {
        set_plain_handler(signal, handler, libc::SA_RESTART | libc::SA_ONSTACK);
    }
    let begin = Instant::now();
    let at = begin + Duration::from_millis(random.below(life.as_millis() as u64));
    let world = World {
        regions: (0..REGIONS)
            .map(|number| Mutex::new(Region::new(number, &mut random).unwrap()))
            .collect(),
        threads: MODES.iter().map(|_| AtomicI32::new(0)).collect(),
        end: begin + life,
        executor: executor.map(|thread| (thread, at)),
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
    let executes = world.executor.filter(|(thread, _)| *thread == number);
    let end = executes.map_or(world.end, |(_, at)| at);
    while Instant::now() < end && !FAILED.load(Relaxed) {
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
        let kind = choose(world, dune.is_some(), &mut random);
        match one_thing(world, kind, &mut random) {
            Ok(true) => {
                times(world.sums, kind, dune.is_some()).fetch_add(1, Relaxed);
            }
            Ok(false) => {}
            Err(error) => {
                FAILED.store(true, Relaxed);
                world.sums.word(FAILURES).fetch_add(1, SeqCst);
                eprintln!("thread {number}, in Dune mode: {}: {kind}: {error}", dune.is_some());
                // The others may wait for what this one holds.
                std::process::exit(102);
            }
        }
        world.sums.word(ACTIONS).fetch_add(1, Relaxed);
    }
    if executes.is_some() {
        execute(world, dune.is_some());
    }
    world.quiet.wait();
    // Whatever was sent is delivered at the end of a system call.
    std::thread::sleep(Duration::from_millis(1));
    world.threads[number].store(0, SeqCst);
}

/// What to do next: now and then what nobody in this mode has done yet.
fn choose(world: &World<'_>, in_dune: bool, random: &mut Random) -> &'static str {
    if random.percent(20) {
        let is_new = |kind: &&'static str| times(world.sums, kind, in_dune).load(Relaxed) == 0;
        let new: Vec<&str> = kinds().filter(|kind| *kind != EXECUTE).filter(is_new).collect();
        if !new.is_empty() {
            return random.pick::<&str>(&new);
        }
    }
    match random.below(64) {
        0..4 => MIGRATE,
        4..12 => SIGNAL,
        12..14 => COMPUTE,
        14..16 => FORKS[random.below(4).min(2) as usize],
        16 => PROGRAM,
        17 => THREAD,
        18..26 => TOUCH,
        _ => region::some_act(random),
    }
}

/// Does it; false where there was nothing to do it to.
fn one_thing(world: &World<'_>, kind: &str, random: &mut Random) -> Result<bool, String> {
    match kind {
        MIGRATE => Ok(migrate(random)),
        SIGNAL => Ok(signal(world, random)),
        COMPUTE => {
            let number = random.next();
            if compute(number % 3000) != std::hint::black_box(compute(number % 3000)) {
                return Err("two sums of the same numbers differ".to_string());
            }
            Ok(true)
        }
        PROGRAM => run_program().map(|()| true),
        THREAD => with_region(world, random, short_thread),
        // Whoever has it.
        TOUCH => region::touch(random.below(REGIONS as u64) as usize, random),
        _ => with_region(world, random, |region, random| {
            match FORKS.iter().position(|fork| *fork == kind) {
                Some(end) => fork(region, end, random),
                None => region.act(kind, random),
            }
        }),
    }
}

/// Does something with a region that nobody else has just now.
fn with_region(
    world: &World<'_>,
    random: &mut Random,
    body: impl FnOnce(&mut Region, &mut Random) -> Result<bool, String>,
) -> Result<bool, String> {
    match random.pick(&world.regions).try_lock() {
        Ok(mut region) => body(&mut region, random),
        Err(_) => Ok(false),
    }
}

fn migrate(random: &mut Random) -> bool {
    let cpus = helpers::online_cpus();
    // SAFETY: a set of our own for the calling thread.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        let only = random.below(cpus as u64 + 1) as usize;
        (0..cpus)
            .filter(|cpu| only == cpus || *cpu == only)
            .for_each(|cpu| libc::CPU_SET(cpu, &mut set));
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set) == 0
    }
}

/// One that queues: none may be lost.
fn signal(world: &World<'_>, random: &mut Random) -> bool {
    let thread = random.pick(&world.threads).load(SeqCst);
    if thread == 0 {
        return false;
    }
    SENT.fetch_add(1, SeqCst);
    // It lives until all have stopped sending. There may be too many already.
    let queued = queue_signal(thread, libc::SIGRTMIN() + 1).is_ok();
    if !queued {
        SENT.fetch_sub(1, SeqCst);
    }
    queued
}

/// A child that looks at the region, changes it and ends as [`FORKS`] says.
fn fork(region: &mut Region, end: usize, random: &mut Random) -> Result<bool, String> {
    let seed = random.next();
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
    region.check_all().map(|()| true)
}

fn run_program() -> Result<(), String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let status = Command::new(program).arg("list").stdout(Stdio::null()).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        other => Err(format!("a program: {other:?}")),
    }
}

/// A thread of the caller's mode looks at the region and changes it.
fn short_thread(region: &mut Region, random: &mut Random) -> Result<bool, String> {
    let active = Dune::is_active();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            if Dune::is_active() != active {
                return Err("a thread is not in the mode of its maker".to_string());
            }
            region.write_some(random)?;
            region.check_all().map(|()| true)
        });
        thread.join().unwrap_or_else(|_| Err("a thread panicked".to_string()))
    })
}

/// The other threads end wherever they are, this one becomes the process.
fn execute(world: &World<'_>, in_dune: bool) -> ! {
    // What was sent would end the new program, which has no handlers.
    for signal in [libc::SIGRTMIN() + 1, libc::SIGALRM] {
        // SAFETY: no handler.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    let pid = CString::new(std::process::id().to_string()).expect("digits");
    let arguments = [
        c"dune-tests".as_ptr(),
        c"after-exec".as_ptr(),
        pid.as_ptr(),
        std::ptr::null(),
    ];
    times(world.sums, EXECUTE, in_dune).fetch_add(1, Relaxed);
    // SAFETY: strings, and an array that ends with null.
    unsafe { libc::execv(c"/proc/self/exe".as_ptr(), arguments.as_ptr()) };
    world.sums.word(FAILURES).fetch_add(1, SeqCst);
    panic!("execve: {}", std::io::Error::last_os_error());
}

/// What [`execute`] starts: it is the process `pid`, alone, out of Dune mode, with nothing of the device, and can enter.
pub fn after_exec(pid: u32) -> ExitCode {
    assert!(!Dune::is_active(), "a new program is in Dune mode");
    // SAFETY: asks for a number.
    let thread = unsafe { libc::gettid() } as u32;
    assert_eq!(
        (std::process::id(), thread),
        (pid, pid),
        "the first thread of the process"
    );
    let threads = std::fs::read_dir("/proc/self/task").expect("tasks").count();
    assert_eq!(threads, 1, "threads of the old program");
    assert_eq!(device_fds(), [], "files of the device");
    let expected = compute(1000);
    let dune = Dune::enter().expect("entering");
    assert_eq!(compute(1000), expected);
    assert_eq!(std::process::id(), pid);
    dune.leave();
    ExitCode::from(EXECUTED)
}
