// SPDX-License-Identifier: MIT OR Apache-2.0
//! Entering and leaving Dune mode.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::fs;
use std::io::BufRead;
use std::io::BufReader;
use std::io::Write;
use std::time::Instant;

use libdune::Dune;
use libdune::Error;
use libdune::Vector;

use crate::framework::Test;
use crate::framework::User;
use crate::helpers;
use crate::support::compute;
use crate::support::cs;
use crate::support::enter;
use crate::support::rdtsc;
use crate::support::spawn;
use crate::support::step_over;
use crate::support::stepped_over;
use crate::support::Map;
use crate::support::Shared;
use crate::support::EXIT_VMCALL;
use crate::support::GIB;
use crate::support::PAGE;

pub const TESTS: &[Test] = &[
    Test::asserting("hello_enters_and_leaves", hello_enters_and_leaves),
    Test::asserting("enter_and_leave_many_times", enter_and_leave_many_times),
    Test::asserting("libstd_runs_in_dune_mode", libstd_runs_in_dune_mode),
    Test::asserting("pie_and_aslr", pie_and_aslr),
    Test::asserting("stack_astride_a_slot_edge", stack_astride_a_slot_edge),
    Test::asserting(
        "enter_cost_is_independent_of_mappings",
        enter_cost_is_independent_of_mappings,
    ),
    Test::asserting("two_processes_at_once", two_processes_at_once),
    Test::asserting("hello_prints_what_it_sees", hello_prints_what_it_sees),
    Test::asserting("second_enter_is_a_typed_error", second_enter_is_a_typed_error),
    Test::asserting("outsider_is_told_the_group", outsider_is_told_the_group).run_as(User::Outsider),
    Test::asserting("panic_unwinds_in_dune_mode", panic_unwinds_in_dune_mode),
];

fn hello_enters_and_leaves() {
    let pid = std::process::id();
    assert_eq!(cs() & 3, 3);
    assert!(!Dune::is_active());
    let dune = enter();
    let inside = (cs(), std::process::id(), dune.counters());
    dune.leave();
    assert_eq!(cs() & 3, 3);
    assert!(!Dune::is_active());
    assert_eq!(inside.0, 0x10, "the kernel's code segment, CPL0");
    assert_eq!(inside.1, pid);
    assert!(inside.2.exits[EXIT_VMCALL] >= 1, "getpid is a VMCALL");
    assert!(inside.2.entries > inside.2.exits[EXIT_VMCALL]);
}

fn enter_and_leave_many_times() {
    let mut kept = Vec::new();
    for round in 0..60u64 {
        let dune = enter();
        kept.push(format!("{round} {}", cs()));
        if round % 2 == 0 {
            dune.leave();
        } else {
            drop(dune);
        }
        assert!(!Dune::is_active());
    }
    assert_eq!(kept[59], "59 16");
}

thread_local! {
    static LOCAL: std::cell::RefCell<Vec<u32>> = const { std::cell::RefCell::new(Vec::new()) };
}

/// A bit of everything; what it returns depends on nothing but its argument.
fn exercise_std(path: &str) -> String {
    let mut out = String::new();
    // Allocation, hashing, sorting, formatting, floating point.
    let mut words: HashMap<String, Vec<usize>> = HashMap::new();
    for index in 0..5_000usize {
        words
            .entry(format!("word{}", index * 7919 % 997))
            .or_default()
            .push(index);
    }
    let sorted: BTreeMap<_, _> = words
        .iter()
        .map(|(word, places)| (word, places.iter().sum::<usize>()))
        .collect();
    out += &format!("{} {:?}\n", words.len(), sorted.iter().nth(500));
    let mut numbers: Vec<f64> = (0..5000).map(|n| f64::from(n).sin()).collect();
    numbers.sort_by(f64::total_cmp);
    out += &format!("{:.6} {:.6}\n", numbers[0], numbers.iter().sum::<f64>());
    // Files.
    {
        let mut file = fs::File::create(path).unwrap();
        for line in 0..2000 {
            writeln!(file, "line {line}").unwrap();
        }
    }
    let lines = BufReader::new(fs::File::open(path).unwrap()).lines();
    out += &format!("{}\n", lines.map(|line| line.unwrap().len()).sum::<usize>());
    out += &format!("{:?}\n", fs::metadata(path).unwrap().len());
    fs::remove_file(path).unwrap();
    // Thread-local data, big and small blocks, a panic that is caught, the environment.
    LOCAL.with_borrow_mut(|local| local.extend(0..1000));
    out += &format!("{}\n", LOCAL.with_borrow(|local| local.iter().sum::<u32>()));
    let blocks: Vec<Box<[u8]>> = (0..21).map(|shift| vec![shift as u8; 1 << shift].into()).collect();
    out += &format!(
        "{}\n",
        blocks
            .iter()
            .map(|block| usize::from(block[block.len() / 2]))
            .sum::<usize>()
    );
    out += &format!("{:?}\n", std::env::var("DUNE_NO_SUCH_VARIABLE"));
    LOCAL.with_borrow_mut(Vec::clear);
    out
}

fn libstd_runs_in_dune_mode() {
    let path = format!("/tmp/dune-std-{}", std::process::id());
    let outside = exercise_std(&path);
    let start = Instant::now();
    let dune = enter();
    let inside = exercise_std(&path);
    let sleep = Instant::now();
    std::thread::sleep(std::time::Duration::from_millis(5));
    assert!(sleep.elapsed().as_millis() >= 5);
    let printed = format!("{:?}", start.elapsed());
    println!("inside for {printed}");
    assert!(Dune::is_active());
    dune.leave();
    assert_eq!(inside, outside);
}

fn panic_unwinds_in_dune_mode() {
    let dune = enter();
    let result = std::panic::catch_unwind(|| {
        let guard = [1, 2, 3];
        panic!("on purpose: {}", guard.len());
    });
    let message = result.unwrap_err();
    assert_eq!(
        message.downcast_ref::<String>().map(String::as_str),
        Some("on purpose: 3")
    );
    assert!(Dune::is_active());
    dune.leave();
}

/// Value behind a word in a program's output.
fn field<'t>(text: &'t str, word: &str) -> Option<&'t str> {
    let rest = &text[text.to_lowercase().find(word)? + word.len()..];
    rest.split_whitespace().next()
}

fn hello_prints_what_it_sees() {
    let ended = helpers::run_program("hello", &[]).unwrap();
    assert_eq!((ended.status, ended.stderr.as_str()), (0, ""), "{ended:?}");
    let pid = field(&ended.stdout, "pid").unwrap_or_default();
    assert!(pid.parse::<u32>().is_ok_and(|pid| pid > 1), "{ended:?}");
    for line in [
        format!("outside: pid {pid} at CPL 3"),
        format!("inside:  pid {pid} at CPL 0"),
        "84 / 2 = 42".into(),
        "84 / 0 = 42, said the #DE handler".into(),
    ] {
        assert!(
            ended.stdout.lines().any(|said| said == line),
            "no line `{line}`: {ended:?}"
        );
    }
    assert_eq!(
        ended.stdout.lines().last(),
        Some(format!("outside: pid {pid} at CPL 3").as_str())
    );
    let number = |word| {
        let hex = field(&ended.stdout, word)?.trim_end_matches(',').strip_prefix("0x")?;
        u64::from_str_radix(hex, 16).ok()
    };
    // Of this PIE's, and a page table in the module's slots.
    assert!(number("rip").is_some_and(|rip| rip > 0x5000_0000_0000), "{ended:?}");
    assert!(number("cr3").is_some_and(|cr3| cr3 >= 1 << 30), "{ended:?}");
    let calls = ended.stdout.lines().find(|line| line.ends_with("VMCALL (18)"));
    let calls = calls.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    assert!(calls.is_some_and(|calls| calls > 0), "{ended:?}");
}

fn pie_and_aslr() {
    let setting = fs::read_to_string("/proc/sys/kernel/randomize_va_space").unwrap();
    assert_eq!(setting.trim(), "2", "ASLR is on in this machine");
    let here = pie_and_aslr as *const () as u64;
    assert!(here > 0x5000_0000_0000, "this program is no PIE: {here:#x}");
    let mut places = std::collections::HashSet::new();
    for _ in 0..8 {
        let ended = helpers::run_program("hello", &[]).unwrap();
        assert_eq!(ended.status, 0, "{ended:?}");
        let rip = field(&ended.stdout, "rip")
            .unwrap_or_else(|| panic!("no RIP: {ended:?}"))
            .to_string();
        places.insert(rip);
    }
    assert!(places.len() >= 6, "the same places again and again: {places:?}");
}

/// An exception whose frame the handler gets on the stack as it is here.
fn take_exception() {
    // SAFETY: `step_over` goes on behind it.
    unsafe { std::arch::asm!("ud2") };
}

extern "C" fn on_odd_stack(depth: *mut libc::c_void) -> *mut libc::c_void {
    /// Uses 4 KiB of stack per level; the compiler must not flatten it.
    #[inline(never)]
    fn descend(depth: usize) -> u64 {
        let mut page = [depth as u64; 400];
        std::hint::black_box(&mut page);
        take_exception();
        if depth == 0 {
            return u64::from(std::process::id());
        }
        descend(depth - 1) + std::hint::black_box(&page)[399]
    }
    let dune = enter();
    dune.set_exception_handler(Vector::UD, step_over);
    let sum = descend(depth as usize);
    dune.leave();
    assert_eq!(stepped_over(), depth as u64 + 1);
    sum as *mut libc::c_void
}

/// Runs a thread on a stack whose middle is at `edge`, deep enough to cross it.
fn run_across(edge: usize) {
    const HALF: usize = 2 << 20;
    const DEPTH: usize = 700;
    let map = Map::at(edge - HALF, 2 * HALF, libc::PROT_READ | libc::PROT_WRITE, 0);
    let mut result = std::ptr::null_mut();
    // SAFETY: the stack is ours and outlives the thread, which is joined.
    unsafe {
        let mut attributes: libc::pthread_attr_t = std::mem::zeroed();
        libc::pthread_attr_init(&mut attributes);
        // What of the stack lies above the edge is used up after some 1 MiB: 250 levels.
        let bytes = HALF + (1 << 20);
        assert_eq!(libc::pthread_attr_setstack(&mut attributes, map.start.cast(), bytes), 0);
        let mut thread = 0;
        let depth = DEPTH as *mut libc::c_void;
        assert_eq!(libc::pthread_create(&mut thread, &attributes, on_odd_stack, depth), 0);
        assert_eq!(libc::pthread_join(thread, &mut result), 0);
    }
    let expected = u64::from(std::process::id()) + (1..=DEPTH as u64).sum::<u64>();
    assert_eq!(result as u64, expected, "edge {edge:#x}");
}

fn stack_astride_a_slot_edge() {
    for gib in [100, 101, 5000, 0x1_4000] {
        run_across(gib * GIB);
    }
    // The edge at each place relative to the top of the stack, as ASLR puts it once in thousands of starts.
    for offset in (0..4096).step_by(256) {
        let map = Map::at(200 * GIB - (1 << 20), 2 << 20, libc::PROT_READ | libc::PROT_WRITE, 0);
        let top = 200 * GIB + offset;
        let entered: u64;
        // SAFETY: switches to our own stack for one call and back.
        unsafe {
            std::arch::asm!(
                "mov r12, rsp",
                "mov rsp, {top}",
                "call {call}",
                "mov rsp, r12",
                top = in(reg) top,
                call = sym enter_once,
                out("rax") entered,
                out("r12") _,
                clobber_abi("C"),
            );
        }
        assert_eq!(entered, 1, "offset {offset:#x}");
        drop(map);
    }
}

extern "C" fn enter_once() -> u64 {
    let dune = enter();
    dune.set_exception_handler(Vector::UD, step_over);
    let inside = Dune::is_active();
    // A call, some stack use and an exception while inside.
    let name = format!("{}", std::process::id());
    let before = stepped_over();
    take_exception();
    let taken = stepped_over() - before;
    dune.leave();
    u64::from(inside && !name.is_empty() && taken == 1)
}

/// The cheapest of some entries, in TSC ticks.
fn enter_ticks() -> u64 {
    (0..5)
        .map(|_| {
            let start = rdtsc();
            let dune = enter();
            let ticks = rdtsc() - start;
            dune.leave();
            ticks
        })
        .min()
        .unwrap()
}

fn enter_cost_is_independent_of_mappings() {
    enter_ticks();
    let few = enter_ticks();
    let reserved = Map::at(0, 64 * GIB, libc::PROT_NONE, libc::MAP_NORESERVE);
    let used = Map::new(128 << 20);
    for offset in (0..used.bytes).step_by(PAGE) {
        used.write(offset, 1);
    }
    let much = enter_ticks();
    println!("{few} ticks with little memory, {much} with 64 GiB reserved and 128 MiB in use");
    assert!(much < few + few / 10, "{few} ticks became {much}");
    if std::path::Path::new("/proc/sys/kernel/prove_locking").exists() {
        // What follows would measure lockdep, with thousands of locks held.
        return;
    }

    // Mappings, 3,000 that cannot be merged: registering for notifications makes Linux take a lock in each
    // (mm_take_all_locks), some hundred instructions; libdune and the module add nothing.
    let maps: Vec<Map> = (0..1000)
        .map(|number| {
            let map = Map::new(3 * PAGE);
            map.protect(PAGE, PAGE, libc::PROT_READ);
            map.write(0, number);
            map
        })
        .collect();
    let many = enter_ticks();
    println!(
        "{many} with 3,000 more mappings: {} per mapping",
        many.saturating_sub(much) / 3000
    );
    assert!(many < much + 3000 * 600, "{much} ticks became {many}");
    drop((reserved, used, maps));
}

fn two_processes_at_once() {
    let shared = Shared::new();
    let body = |number: usize| {
        let shared = &shared;
        move || {
            let dune = enter();
            shared.word(number).store(1, std::sync::atomic::Ordering::SeqCst);
            // Both are inside before either computes.
            while shared.word(1 - number).load(std::sync::atomic::Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
            let mut mine = vec![number as u64 + 1; 1 << 18];
            for round in 0..20u64 {
                for word in &mut mine {
                    *word = word.wrapping_mul(31).wrapping_add(round);
                }
            }
            assert_eq!(
                compute(50_000),
                shared.word(8).load(std::sync::atomic::Ordering::SeqCst)
            );
            let mut expected = number as u64 + 1;
            for round in 0..20u64 {
                expected = expected.wrapping_mul(31).wrapping_add(round);
            }
            assert!(mine.iter().all(|word| *word == expected), "memory of the other process");
            assert!(Dune::is_active());
            dune.leave();
        }
    };
    shared
        .word(8)
        .store(compute(50_000), std::sync::atomic::Ordering::SeqCst);
    let (one, two) = (spawn(body(0)), spawn(body(1)));
    one.wait().assert_success();
    two.wait().assert_success();
}

fn second_enter_is_a_typed_error() {
    let dune = enter();
    match Dune::enter() {
        Err(Error::AlreadyInside) => {}
        other => panic!("{other:?}"),
    }
    assert!(Dune::is_active());
    dune.leave();
    enter().leave();
}

fn outsider_is_told_the_group() {
    match Dune::enter() {
        Err(error @ Error::NoPermission { .. }) => {
            let text = error.to_string();
            assert!(
                text.contains("group `dune`") && text.contains("usermod -aG dune"),
                "{text}"
            );
        }
        other => panic!("{other:?}"),
    }
    assert!(!Dune::is_active());
}
