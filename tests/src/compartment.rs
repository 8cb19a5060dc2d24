// SPDX-License-Identifier: MIT OR Apache-2.0

//! Compartments: what a closure in one sees, what becomes of its mistakes, and what stays whole.

use std::arch::asm;
use std::hint::black_box;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::Arc;
use std::sync::Barrier;

use libdune::compartment::Compartment;
use libdune::compartment::Ended;
use libdune::compartment::Fault;
use libdune::compartment::Pages;
use libdune::hook::Hooks;
use libdune::hook::SystemCall;
use libdune::hook::Verdict;
use libdune::Dune;
use libdune::Outcome;
use libdune::Permissions;
use libdune::Thread;
use libdune::TrapFrame;
use libdune::Vector;

use crate::framework::Test;
use crate::support::assert_no_exits;
use crate::support::enter;
use crate::support::PAGE;

pub const TESTS: &[Test] = &[
    Test::asserting("compartment_uses_what_it_was_given", compartment_uses_what_it_was_given),
    Test::asserting(
        "compartment_does_not_see_the_program",
        compartment_does_not_see_the_program,
    ),
    Test::asserting("mistakes_end_a_compartment_only", mistakes_end_a_compartment_only),
    Test::asserting("compartments_are_apart", compartments_are_apart),
    Test::asserting(
        "compartment_leaves_its_thread_whole",
        compartment_leaves_its_thread_whole,
    ),
    Test::asserting(
        "handlers_and_hooks_come_before_a_compartments_end",
        handlers_and_hooks_come_before_a_compartments_end,
    ),
];

const STACK: usize = 16 << 10;

fn compartment(dune: &Dune) -> Compartment {
    Compartment::new(&dune.thread(), STACK).unwrap()
}

/// Calls a closure that has nothing to be dropped.
fn run<T>(dune: &Dune, compartment: &mut Compartment, closure: impl FnOnce() -> T) -> Result<T, Ended> {
    // SAFETY: the tests' closures compute, or fault; tables map memory where it is.
    unsafe { compartment.run(&dune.thread(), closure) }
}

#[track_caller]
fn fault<T: std::fmt::Debug>(result: Result<T, Ended>) -> Fault {
    match result {
        Err(Ended::Fault(fault)) => fault,
        other => panic!("no fault: {other:?}"),
    }
}

fn read(address: u64) -> u64 {
    // SAFETY: memory of the test, or a fault that ends a compartment.
    unsafe { (address as *const u64).read_volatile() }
}

fn write(address: u64, value: u64) {
    // SAFETY: as above.
    unsafe { (address as *mut u64).write_volatile(value) }
}

fn compartment_uses_what_it_was_given() {
    let dune = enter();
    let mut compartment = compartment(&dune);
    let (mut question, mut answer) = (Pages::new(PAGE).unwrap(), Pages::new(3 * PAGE).unwrap());
    for (index, byte) in question.iter_mut().enumerate() {
        *byte = index as u8;
    }
    compartment.give(&question, Permissions::READ).unwrap();
    compartment.give(&answer, Permissions::WRITE).unwrap();
    let (from, to): (&[u8], &mut [u8]) = (&question, &mut answer);
    // By memcpy, which looks at libc's static data.
    let (sum, address) = run(&dune, &mut compartment, move || {
        to[PAGE - 7..2 * PAGE - 7].copy_from_slice(from);
        let here = 0u8;
        (
            from.iter().map(|byte| u64::from(*byte)).sum::<u64>(),
            &raw const here as u64,
        )
    })
    .unwrap();
    assert_eq!(sum, 16 * 255 * 128);
    assert_eq!(answer[PAGE - 7..2 * PAGE - 7], question[..]);
    let here = 0u8;
    assert!(
        address.abs_diff(&raw const here as u64) > STACK as u64,
        "on the caller's stack"
    );
    // A result that is larger than registers, and captures that are moved.
    let big = [7u64; 100];
    assert_eq!(
        run(&dune, &mut compartment, move || big.map(|n| n + 1)).unwrap(),
        [8; 100]
    );
    // No exit: only CR3 changes.
    assert_no_exits(&dune, || {
        let sum = run(&dune, &mut compartment, move || black_box(20) + 22).unwrap();
        assert_eq!(sum, 42);
    });
    // A reader only, and what was taken back is gone.
    let address = question.address();
    let refused = fault(run(&dune, &mut compartment, move || write(address, 1)));
    assert_eq!(
        (refused.vector, refused.address, refused.error_code),
        (Vector::PF, address, 3)
    );
    compartment.take(&question).unwrap();
    let refused = fault(run(&dune, &mut compartment, move || read(address)));
    assert_eq!((refused.address, refused.error_code), (address, 0));
    // Another one has been given the same, and not the first one's stack.
    let mut other = compartment.duplicate().unwrap();
    let last = answer.address() + 3 * PAGE as u64 - 8;
    run(&dune, &mut other, move || write(last, 11)).unwrap();
    assert_eq!(run(&dune, &mut compartment, move || read(last)).unwrap(), 11);
    let stack = run(&dune, &mut compartment, move || {
        let here = 0u64;
        &raw const here as u64
    })
    .unwrap();
    assert_eq!(fault(run(&dune, &mut other, move || read(stack))).address, stack);
    // Half a page cannot be given.
    assert!(compartment.give(&answer[..100], Permissions::READ).is_err());
    assert!(compartment.give(&answer[8..8 + PAGE], Permissions::READ).is_err());
    drop(other);
    drop(compartment);
    dune.leave();
}

static STATIC: AtomicU64 = AtomicU64::new(5);

fn compartment_does_not_see_the_program() {
    let dune = enter();
    let mut compartment = compartment(&dune);
    let heap = Box::new(0x5ec7u64);
    let local = 0x5ec8u64;
    let thread_pointer: u64;
    // SAFETY: the first word of what FS points to is its own address.
    unsafe { asm!("mov {}, fs:[0]", out(reg) thread_pointer, options(nostack, readonly)) };
    let other = Pages::new(PAGE).unwrap();
    let places = [
        ("heap", &raw const *heap as u64),
        ("stack", &raw const local as u64),
        ("static data", STATIC.as_ptr() as u64),
        ("thread-local storage", thread_pointer),
        ("other pages", other.address()),
    ];
    for (name, place) in places {
        let place = place & !7;
        let before = read(place);
        let refused = fault(run(&dune, &mut compartment, move || read(place)));
        assert_eq!(
            (refused.vector, refused.address, refused.error_code),
            (Vector::PF, place, 0),
            "{name}"
        );
        assert!(!refused.page_fault().unwrap().is_write());
        let refused = fault(run(&dune, &mut compartment, move || write(place, 1)));
        assert_eq!((refused.address, refused.error_code), (place, 2), "{name}");
        assert_eq!(read(place), before, "{name}");
    }
    // Code is there, and not to be changed.
    let code = run as fn(&Dune, &mut Compartment, fn() -> u64) -> Result<u64, Ended> as usize as u64 & !7;
    let before = read(code);
    assert_eq!(run(&dune, &mut compartment, move || read(code)).unwrap(), before);
    assert_eq!(
        fault(run(&dune, &mut compartment, move || write(code, 0))).error_code,
        3
    );
    // Memory that Linux maps later is not filled in.
    let late = Pages::new(PAGE).unwrap();
    let place = late.address();
    assert_eq!(fault(run(&dune, &mut compartment, move || read(place))).address, place);
    assert_eq!((*heap, local, STATIC.load(SeqCst)), (0x5ec7, 0x5ec8, 5));
    dune.leave();
}

/// Uses 1 KiB of stack per level; the compiler must not flatten it.
#[inline(never)]
fn descend(depth: u64) -> u64 {
    let mut part = [depth; 128];
    black_box(&mut part);
    if depth == 0 {
        return 0;
    }
    descend(depth - 1) + black_box(&part)[127]
}

fn mistakes_end_a_compartment_only() {
    let dune = enter();
    let mut compartment = compartment(&dune);
    let divisor = black_box(0u32);
    for round in 0..20 {
        let divided = fault(run(&dune, &mut compartment, move || {
            let quotient: u32;
            // SAFETY: a divide error ends the compartment.
            unsafe {
                asm!("div ecx", in("ecx") divisor, inout("eax") 84 => quotient, inout("edx") 0 => _, options(nostack))
            };
            quotient
        }));
        assert_eq!(
            (divided.vector, divided.error_code, divided.address),
            (Vector::DE, 0, 0),
            "round {round}"
        );
        // SAFETY: an invalid opcode ends the compartment.
        let undefined = fault(run(&dune, &mut compartment, move || unsafe {
            asm!("ud2", options(nostack))
        }));
        assert_eq!(undefined.vector, Vector::UD);
        let odd = fault(run(&dune, &mut compartment, move || read(black_box(1 << 62))));
        assert_eq!(odd.vector, Vector::GP);
        // Nothing at CPL0 is refused to who has no stack: the trap entry does not need one.
        let overflow = fault(run(&dune, &mut compartment, move || descend(black_box(1000))));
        assert_eq!(overflow.vector, Vector::PF);
        assert!(overflow.to_string().contains("write"), "{overflow}");
        // A jump to nowhere: the process has no such page either.
        // SAFETY: it faults at once.
        let nowhere = fault(run(&dune, &mut compartment, move || unsafe {
            std::mem::transmute::<usize, extern "C" fn()>(black_box(0x1234_5000))();
        }));
        assert_eq!((nowhere.rip, nowhere.address), (0x1234_5000, 0x1234_5000));
        // A panic needs what is not there.
        let empty: &[u8] = black_box(&[]);
        assert_eq!(
            fault(run(&dune, &mut compartment, move || empty[black_box(3)])).vector,
            Vector::PF
        );
        assert_eq!(run(&dune, &mut compartment, move || descend(8)).unwrap(), 36);
    }
    // Captures that leave no stack are told, not tried.
    let big = [0u8; STACK];
    let refused = run(&dune, &mut compartment, move || big[black_box(5)]);
    assert!(
        matches!(refused, Err(Ended::StackTooSmall { needed }) if needed > STACK),
        "{refused:?}"
    );
    assert!(Dune::is_active());
    assert_eq!(String::from_utf8(vec![b'a'; 3]).unwrap(), "aaa");
    dune.leave();
    // Nor does anything run outside Dune mode.
    let dune = enter();
    let mut compartment = Compartment::new(&dune.thread(), STACK).unwrap();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            Thread::with_current(|thread| {
                // SAFETY: it computes.
                unsafe { compartment.run(thread, || 3).unwrap() }
            })
        });
        assert_eq!(thread.join().unwrap(), Some(3));
    });
    drop(compartment);
    dune.leave();
}

/// Two at once, in threads of their own, each after the other's memory: neither gets it.
fn compartments_are_apart() {
    let dune = enter();
    let template = compartment(&dune);
    let pages: [Pages; 2] = std::array::from_fn(|_| Pages::new(PAGE).unwrap());
    let addresses = [0, 1].map(|index: usize| pages[index].address());
    let common = Arc::new((Barrier::new(2), AtomicU64::new(0)));
    let threads = [0, 1].map(|index: usize| {
        let compartment = template.duplicate().unwrap();
        compartment.give(&pages[index], Permissions::WRITE).unwrap();
        let (own, other) = (addresses[index], addresses[1 - index]);
        let common = common.clone();
        std::thread::spawn(move || {
            let mut compartment = compartment;
            for round in 0..50u64 {
                // Both are inside at the same time, as far as there are CPUs.
                common.0.wait();
                Thread::with_current(|thread| {
                    let value = round << 8 | index as u64;
                    // SAFETY: they compute, or fault.
                    let (mine, others) = unsafe {
                        (
                            compartment.run(thread, move || {
                                write(own, value);
                                read(own)
                            }),
                            compartment.run(thread, move || read(other)),
                        )
                    };
                    assert_eq!(mine.unwrap(), value);
                    assert_eq!(fault(others).address, other);
                })
                .expect("threads are in Dune mode");
                common.1.fetch_add(1, SeqCst);
            }
            assert!(Dune::is_active());
        })
    });
    for thread in threads {
        thread.join().unwrap();
    }
    assert_eq!(common.1.load(SeqCst), 100);
    assert_eq!((pages[0][0], pages[1][0]), (0, 1));
    // The same by spawn, which gives the compartment back.
    let mut compartment = template.duplicate().unwrap();
    compartment.give(&pages[0], Permissions::WRITE).unwrap();
    let own = addresses[0];
    for round in 0..4 {
        // SAFETY: they compute, or fault.
        let thread = unsafe {
            compartment.spawn(move || {
                write(own, round);
                read(own + if round == 3 { PAGE as u64 } else { 0 })
            })
        };
        let (back, result) = thread.unwrap().join().unwrap();
        compartment = back;
        assert_eq!(read(own), round);
        if round == 3 {
            assert_eq!(fault(result).address, own + PAGE as u64);
        } else {
            assert_eq!(result.unwrap(), round);
        }
    }
    drop((compartment, template));
    dune.leave();
}

fn mxcsr() -> u32 {
    let mut value = 0u32;
    // SAFETY: writes four bytes.
    unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut value, options(nostack)) };
    value
}

fn compartment_leaves_its_thread_whole() {
    let dune = enter();
    let mut outer = compartment(&dune);
    let mut inner = outer.duplicate().unwrap();
    let page = Pages::new(PAGE).unwrap();
    let root = dune.thread().current_address_space().root();
    let before = mxcsr();
    let place = page.address();
    let ruined = fault(run(&dune, &mut outer, move || {
        let other = 0x7f80u32;
        // SAFETY: what it does to the registers ends with the compartment.
        unsafe {
            asm!(
                "ldmxcsr [{other}]",
                "fld1",
                "fld1",
                "std",
                "mov rbx, 1",
                "mov rbp, 1",
                "mov r12, 1",
                "mov r13, 1",
                "mov r14, 1",
                "mov r15, 1",
                "mov rax, [{place}]",
                other = in(reg) &raw const other,
                place = in(reg) place,
                options(noreturn),
            );
        }
    }));
    assert_eq!(ruined.address, place);
    assert_eq!(mxcsr(), before);
    assert_eq!(dune.thread().current_address_space().root(), root);
    // The x87 stack is empty again: eight numbers fit.
    let mut status = 0u16;
    // SAFETY: eight pushes, the status, eight pops; DF would be set by STD only.
    unsafe {
        asm!(
            ".rept 8", "fld1", ".endr", "fnstsw [{status}]", ".rept 8", "fstp st(0)", ".endr",
            status = in(reg) &raw mut status,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
        );
    }
    assert_eq!(status & 0x41, 0, "x87 stack fault: {status:#x}");
    // None inside another.
    let thread = dune.thread();
    // SAFETY: it only asks; the inner one is not called.
    let nested = unsafe { outer.run(&thread, || matches!(inner.run(&thread, || 1), Err(Ended::Inside))) };
    assert_eq!(
        fault(nested).vector,
        Vector::PF,
        "the program's stack is not there, where the inner one is"
    );
    let mut inner_inside = Some(inner);
    // SAFETY: as above; it is moved in and forgotten there.
    let nested = unsafe {
        let inner = inner_inside.take();
        outer.run(&thread, move || {
            let mut inner = std::mem::ManuallyDrop::new(inner);
            Thread::with_current(|thread| {
                inner
                    .as_mut()
                    .map(|inner| matches!(inner.run(thread, || 1), Err(Ended::Inside)))
            })
        })
    };
    assert_eq!(nested.unwrap(), Some(Some(true)));
    // And the thread is an ordinary one again: an exception that nobody takes is its own.
    assert_eq!(fault(run(&dune, &mut outer, move || read(place))).address, place);
    drop(outer);
    dune.leave();
}

fn handlers_and_hooks_come_before_a_compartments_end() {
    fn skip(frame: &mut TrapFrame, _: &Thread<'_>) -> Outcome {
        const UD2_BYTES: u64 = 2;
        if frame.rax != 77 {
            return Outcome::Unhandled;
        }
        frame.rip += UD2_BYTES;
        frame.rax = 78;
        Outcome::Resume
    }
    fn none_of_mine(_: &mut TrapFrame, _: &Thread<'_>) -> Outcome {
        Outcome::Unhandled
    }
    fn refuse(call: &mut SystemCall, thread: &Thread<'_>) -> Verdict {
        if thread.address_space().is_loaded() || call.number() == libc::SYS_getuid as u64 {
            Verdict::Allow
        } else {
            Verdict::deny(libc::EPERM)
        }
    }
    fn try_rax(mut rax: u64) -> u64 {
        // SAFETY: the handler passes over it, or it ends the compartment.
        unsafe { asm!("ud2", inout("rax") rax, options(nostack)) };
        rax
    }
    fn call(number: i64) -> i64 {
        let result: i64;
        // SAFETY: calls without arguments.
        unsafe { asm!("syscall", inout("rax") number => result, out("rcx") _, out("r11") _, options(nostack)) };
        result
    }
    let dune = enter();
    let mut compartment = compartment(&dune);
    dune.set_exception_handler(Vector::UD, skip);
    dune.set_exception_handler(Vector::PF, none_of_mine);
    assert_eq!(run(&dune, &mut compartment, move || try_rax(77)).unwrap(), 78);
    assert_eq!(
        fault(run(&dune, &mut compartment, move || try_rax(76))).vector,
        Vector::UD
    );
    // A write to a page that is there, which else goes straight to the handler.
    let page = Pages::new(PAGE).unwrap();
    let place = page.address();
    compartment.give(&page, Permissions::READ).unwrap();
    assert_eq!(
        fault(run(&dune, &mut compartment, move || write(place, 1))).error_code,
        3
    );
    // System calls work, and hooks refuse them.
    let pid = i64::from(std::process::id());
    assert_eq!(
        run(&dune, &mut compartment, move || call(libc::SYS_getpid)).unwrap(),
        pid
    );
    let before = dune.thread().set_hooks(Hooks {
        before: Some(refuse),
        after: None,
    });
    assert_eq!(
        run(&dune, &mut compartment, move || call(libc::SYS_getpid)).unwrap(),
        -i64::from(libc::EPERM)
    );
    assert!(run(&dune, &mut compartment, move || call(libc::SYS_getuid)).unwrap() >= 0);
    assert_eq!(call(libc::SYS_getpid), pid);
    dune.thread().set_hooks(before);
    drop(compartment);
    dune.leave();
}
