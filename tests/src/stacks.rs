// SPDX-License-Identifier: MIT OR Apache-2.0
//! Handlers and hooks that overflow the stacks they have of libdune.

use std::hint::black_box;
use std::sync::atomic::AtomicPtr;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::Ordering::SeqCst;

use libdune::hook::Hooks;
use libdune::hook::SystemCall;
use libdune::hook::Verdict;
use libdune::Gva;
use libdune::Outcome;
use libdune::Permissions;
use libdune::Thread;
use libdune::TrapFrame;
use libdune::Vector;

use crate::framework::Test;
use crate::support::count_signal;
use crate::support::enter;
use crate::support::set_plain_handler;
use crate::support::spawn;
use crate::support::Ended;
use crate::support::Map;
use crate::support::Shared;
use crate::support::PAGE;

pub const TESTS: &[Test] = &[
    Test::asserting(
        "overflow_of_a_handler_stack_is_reported",
        overflow_of_a_handler_stack_is_reported,
    ),
    Test::asserting(
        "overflow_of_a_hook_stack_is_reported",
        overflow_of_a_hook_stack_is_reported,
    ),
];

/// The words of [`Shared`] that the parent sees: where the overflow began, and how far it came.
static WORDS: AtomicPtr<[AtomicU64; 2]> = AtomicPtr::new(std::ptr::null_mut());

const NAME: &str = "deep-in-there";
/// What both kinds of stacks have at least.
const STACK: u64 = 32 << 10;

fn word(index: usize) -> &'static AtomicU64 {
    // SAFETY: The children's parent keeps its words until they have ended.
    unsafe { &(*WORDS.load(Relaxed))[index] }
}

/// Notes each step, and never comes back.
#[allow(unconditional_recursion)]
#[inline(never)]
fn deeper(level: u64) -> u64 {
    let here = [level; 64];
    let address = black_box(&here).as_ptr() as u64;
    word(0).fetch_max(address, Relaxed);
    word(1).store(address, SeqCst);
    deeper(level + 1) + black_box(here[0])
}

fn plain(_: &mut TrapFrame, _: &Thread<'_>) -> Outcome {
    deeper(0);
    Outcome::Resume
}

fn divides(frame: &mut TrapFrame, _: &Thread<'_>) -> Outcome {
    // SAFETY: Another handler takes it.
    unsafe { std::arch::asm!("ud2") };
    frame.rip += 2;
    Outcome::Resume
}

fn invalid_opcode() {
    // SAFETY: A handler takes it.
    unsafe { std::arch::asm!("ud2") };
}

/// What a child printed that did this in a thread in Dune mode.
#[track_caller]
fn report(shared: &Shared, overflow: fn(&Thread<'_>)) -> (Ended, String) {
    shared.word(0).store(0, SeqCst);
    let ended = spawn(|| {
        WORDS.store(std::ptr::from_ref(shared.word(0)).cast_mut().cast(), Relaxed);
        // Nobody may think that he can go on.
        set_plain_handler(libc::SIGSEGV, count_signal, 0);
        let _dune = enter();
        let thread = std::thread::Builder::new().name(NAME.into());
        let thread = thread.spawn(move || Thread::with_current(overflow));
        unreachable!("the thread came back: {:?}", thread.unwrap().join());
    })
    .wait();
    assert_eq!(ended.signal(), Some(libc::SIGSEGV), "{ended:?}");
    let mut lines = ended.output.lines().filter(|line| line.starts_with("dune: fatal:"));
    let line = lines
        .next()
        .unwrap_or_else(|| panic!("no report: {ended:?}"))
        .to_string();
    assert_eq!(lines.count(), 0, "{ended:?}");
    (ended, line)
}

/// The report names stack and thread, and was made at the first write below the stack.
#[track_caller]
fn check(shared: &Shared, text: &str, overflow: fn(&Thread<'_>)) {
    let (ended, line) = report(shared, overflow);
    assert!(line.contains(text), "{line}");
    assert!(line.contains(&format!(" \"{NAME}\"")), "{line}");
    assert!(line.contains("#PF (page fault) 14"), "{line}");
    let address = line.split("address 0x").nth(1).and_then(|rest| rest.split(',').next());
    let address = u64::from_str_radix(address.unwrap_or(""), 16).unwrap_or_else(|_| panic!("no address: {line}"));
    let (first, last) = (shared.word(0).load(SeqCst), shared.word(1).load(SeqCst));
    // A step is less than a page: whatever is below the guard page was not written to.
    assert!(address < last && last - address < PAGE as u64, "{last:#x}: {line}");
    assert!(first - address > STACK - 2 * PAGE as u64, "{first:#x}: {line}");
    assert!(ended.output.lines().count() == 1, "{ended:?}");
}

fn overflow_of_a_handler_stack_is_reported() {
    const TEXT: &str = "an exception handler overflowed its stack";
    let shared = Shared::new();
    check(&shared, TEXT, |thread| {
        thread.set_exception_handler(Vector::UD, plain);
        invalid_opcode();
    });
    // One that would be asked about its own overflow.
    check(&shared, TEXT, |thread| {
        thread.set_exception_handler(Vector::PF, plain);
        let map = Map::new(PAGE);
        map.write(0, 1);
        let start = Gva::new(map.page(0) as u64).unwrap();
        let space = thread.address_space();
        space.protect(start, PAGE as u64, Permissions::READ).unwrap().flush();
        map.write(0, 2);
    });
    // A handler in a handler: the next stack.
    check(&shared, TEXT, |thread| {
        thread.set_exception_handler(Vector::UD, plain);
        thread.set_exception_handler(Vector::BP, divides);
        // SAFETY: A handler takes it.
        unsafe { std::arch::asm!("int3") };
    });
    // The last one that there is.
    check(&shared, TEXT, |thread| {
        static NESTED: AtomicU64 = AtomicU64::new(0);
        thread.set_exception_handler(Vector::UD, |_, _| {
            if NESTED.fetch_add(1, Relaxed) == 7 {
                deeper(0);
            }
            invalid_opcode();
            Outcome::Resume
        });
        invalid_opcode();
    });
    check(&shared, TEXT, |thread| {
        thread.with_exception_handler(
            Vector::UD,
            |_, _| {
                deeper(0);
                Outcome::Resume
            },
            invalid_opcode,
        );
    });
}

fn getppid() {
    // SAFETY: A call without arguments.
    unsafe { libc::syscall(libc::SYS_getppid) };
}

fn before(call: &mut SystemCall, _: &Thread<'_>) -> Verdict {
    if call.number() == libc::SYS_getppid as u64 {
        deeper(0);
    }
    Verdict::Allow
}

fn after(call: &SystemCall, result: i64, _: &Thread<'_>) -> i64 {
    if call.number() == libc::SYS_getppid as u64 {
        deeper(0);
    }
    result
}

fn overflow_of_a_hook_stack_is_reported() {
    const TEXT: &str = "a hook of system calls overflowed its stack";
    let shared = Shared::new();
    check(&shared, TEXT, |thread| {
        // Its handler of page faults is not asked.
        thread.set_exception_handler(Vector::PF, |frame, _| {
            eprintln!("asked about {:#x}", frame.cr2);
            Outcome::Unhandled
        });
        thread.set_hooks(Hooks {
            before: Some(before),
            after: None,
        });
        getppid();
    });
    check(&shared, TEXT, |thread| {
        thread.set_hooks(Hooks {
            before: None,
            after: Some(after),
        });
        getppid();
    });
    // The hook of a handler's call.
    check(&shared, TEXT, |thread| {
        thread.set_exception_handler(Vector::UD, |_, thread| {
            thread.set_hooks(Hooks {
                before: Some(before),
                after: None,
            });
            getppid();
            Outcome::Resume
        });
        invalid_opcode();
    });
}
