// SPDX-License-Identifier: MIT OR Apache-2.0

//! Handlers of a piece of the program, and what of the interrupted code they may change besides the frame.

use std::arch::asm;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::panic;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use libdune::compartment::Compartment;
use libdune::compartment::Ended;
use libdune::Dune;
use libdune::Gva;
use libdune::Outcome;
use libdune::Permissions;
use libdune::Thread;
use libdune::TrapFrame;
use libdune::Vector;

use crate::framework::Test;
use crate::support::enter;
use crate::support::Map;
use crate::support::PAGE;

pub const TESTS: &[Test] = &[
    Test::asserting("scoped_handler_may_allocate", scoped_handler_may_allocate),
    Test::asserting("scopes_nest_and_close", scopes_nest_and_close),
    Test::asserting("handler_changes_extended_state", handler_changes_extended_state),
];

/// Calls of plain handlers.
static PLAIN: AtomicU64 = AtomicU64::new(0);

fn protect(dune: &Dune, map: &Map, permissions: Permissions) {
    let start = Gva::new(map.address() as u64).unwrap();
    let space = dune.address_space();
    space.protect(start, map.bytes as u64, permissions).unwrap().flush();
}

/// Gives the page of a fault back.
fn give_back(frame: &TrapFrame, thread: &Thread<'_>) -> Outcome {
    let Some(page) = Gva::new(frame.cr2).filter(|_| !frame.host_refused()) else {
        return Outcome::Unhandled;
    };
    let space = thread.address_space();
    match space.protect(page.align_down(PAGE as u64), PAGE as u64, Permissions::ALL) {
        Ok(flush) => flush.flush(),
        Err(_) => return Outcome::Unhandled,
    }
    Outcome::Resume
}

/// A handler that keeps what it saw in collections; the plain one serves what is outside.
fn scoped_handler_may_allocate() {
    const PAGES: usize = 200;
    let map = Map::new(PAGES * PAGE);
    let dune = enter();
    dune.set_exception_handler(Vector::PF, |frame, thread| {
        PLAIN.fetch_add(1, Relaxed);
        give_back(frame, thread)
    });
    for round in 0..3 {
        protect(&dune, &map, Permissions::READ);
        let mut seen = BTreeMap::new();
        let sum = dune.thread().with_exception_handler(
            Vector::PF,
            |frame, thread| {
                seen.insert(frame.cr2, format!("write to {:#x} by {:#x}", frame.cr2, frame.rip));
                give_back(frame, thread)
            },
            || {
                let mut sum = 0;
                for page in (0..PAGES).step_by(2) {
                    map.write(page * PAGE + 8 * round, page as u64);
                    // Written already.
                    map.write(page * PAGE + 8, page as u64);
                    sum += page;
                }
                sum
            },
        );
        assert_eq!(sum, (0..PAGES).step_by(2).sum());
        let wanted: Vec<u64> = (0..PAGES)
            .step_by(2)
            .map(|page| (map.page(page) + 8 * round) as u64)
            .collect();
        assert_eq!(seen.keys().copied().collect::<Vec<u64>>(), wanted);
        assert!(seen.values().all(|text| text.starts_with("write to 0x")));
        // Outside: the plain handler, by the short way again.
        assert_eq!(PLAIN.load(Relaxed), round as u64);
        map.write(PAGE, 1);
        assert_eq!(PLAIN.load(Relaxed), round as u64 + 1);
    }
    dune.leave();
}

/// `div` with 0; what the handler puts into RAX.
fn divide() -> u64 {
    let quotient: u64;
    // SAFETY: there is a handler that goes on behind the two bytes.
    unsafe { asm!("xor edx, edx", "div ecx", inout("rax") 7u64 => quotient, in("ecx") 0, out("edx") _) };
    quotient
}

fn answer(frame: &mut TrapFrame, value: u64) -> Outcome {
    frame.rip += 2;
    frame.rax = value;
    Outcome::Resume
}

fn scopes_nest_and_close() {
    let dune = enter();
    let thread = dune.thread();
    dune.set_exception_handler(Vector::DE, |frame, _| {
        PLAIN.fetch_add(1, Relaxed);
        answer(frame, 100)
    });
    // An exception of a plain handler is no business of the scope that it interrupted.
    dune.set_exception_handler(Vector::UD, |frame, _| {
        frame.rip += 2;
        frame.rax = divide();
        Outcome::Resume
    });
    let (outer, inner) = (Cell::new(0), Cell::new(0));
    let declines = Cell::new(false);
    thread.with_exception_handler(
        Vector::DE,
        |frame, _| {
            outer.set(outer.get() + 1);
            answer(frame, 200)
        },
        || {
            assert_eq!(divide(), 200);
            thread.with_exception_handler(
                Vector::DE,
                |frame, _| {
                    inner.set(inner.get() + 1);
                    if declines.get() {
                        return Outcome::Unhandled;
                    }
                    // In here it is busy; and this code does not run on the stack of the piece.
                    let plain = divide();
                    answer(frame, 300 + plain)
                },
                || {
                    assert_eq!(divide(), 400);
                    let answered: u64;
                    // SAFETY: the handler goes on behind it.
                    unsafe { asm!("ud2", out("rax") answered) };
                    assert_eq!(answered, 100);
                    declines.set(true);
                    assert_eq!(divide(), 200);
                    declines.set(false);
                },
            );
            assert_eq!(divide(), 200);
            // A scope that a panic closes.
            let panicked = panic::catch_unwind(AssertUnwindSafe(|| {
                thread.with_exception_handler(
                    Vector::DE,
                    |frame, _| answer(frame, 500),
                    || -> u64 {
                        assert_eq!(divide(), 500);
                        panic!("on purpose")
                    },
                )
            }));
            assert!(panicked.is_err());
            assert_eq!(divide(), 200);
        },
    );
    assert_eq!((outer.get(), inner.get()), (4, 2));
    assert_eq!(PLAIN.load(Relaxed), 2);
    assert_eq!(divide(), 100);

    // A compartment is not the piece's code, and what it opens goes with it.
    dune.clear_exception_handler(Vector::DE);
    let mut compartment = Compartment::new(&thread, 16 << 10).unwrap();
    thread.with_exception_handler(
        Vector::DE,
        |frame, _| answer(frame, 600),
        || {
            assert_eq!(divide(), 600);
            // SAFETY: the closure has nothing to be dropped.
            let ended = unsafe { compartment.run(&thread, divide) };
            let Err(Ended::Fault(fault)) = ended else {
                panic!("{ended:?}");
            };
            assert_eq!(fault.vector, Vector::DE);
            assert_eq!(divide(), 600);
        },
    );
    dune.leave();
}

/// A handler sees and changes XMM registers; what it leaves alone stays.
fn handler_changes_extended_state() {
    static COPIES: AtomicU64 = AtomicU64::new(0);
    let dune = enter();
    dune.set_exception_handler(Vector::UD, |frame, thread| {
        frame.rip += 2;
        let mut copy = *frame;
        COPIES.fetch_add(thread.extended_state(&mut copy).is_some().into(), Relaxed);
        let Some(mut state) = thread.extended_state(frame) else {
            return Outcome::Unhandled;
        };
        let sum = (0..16).fold(0, |sum: u128, index| sum.wrapping_add(state.xmm(index)));
        state.set_xmm(3, sum);
        Outcome::Resume
    });
    for round in 0..10u64 {
        let mut values = [[0u64; 2]; 16];
        for (index, value) in values.iter_mut().enumerate() {
            *value = [(round << 32) + index as u64, 1 << index];
        }
        let before = values;
        // SAFETY: the handler goes on behind UD2; all registers that are used are named.
        unsafe {
            asm!(
                "movdqu xmm0, [{v}]", "movdqu xmm1, [{v} + 16]", "movdqu xmm2, [{v} + 32]", "movdqu xmm3, [{v} + 48]",
                "movdqu xmm4, [{v} + 64]", "movdqu xmm5, [{v} + 80]", "movdqu xmm6, [{v} + 96]",
                "movdqu xmm7, [{v} + 112]", "movdqu xmm8, [{v} + 128]", "movdqu xmm9, [{v} + 144]",
                "movdqu xmm10, [{v} + 160]", "movdqu xmm11, [{v} + 176]", "movdqu xmm12, [{v} + 192]",
                "movdqu xmm13, [{v} + 208]", "movdqu xmm14, [{v} + 224]", "movdqu xmm15, [{v} + 240]",
                "ud2",
                "movdqu [{v} + 48], xmm3", "movdqu [{v} + 112], xmm7", "movdqu [{v} + 240], xmm15",
                v = in(reg) values.as_mut_ptr(),
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
                out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            );
        }
        let number = |value: [u64; 2]| u128::from(value[0]) | u128::from(value[1]) << 64;
        let sum = before.iter().fold(0u128, |sum, value| sum.wrapping_add(number(*value)));
        assert_eq!(number(values[3]), sum);
        assert_eq!([values[7], values[15]], [before[7], before[15]]);
    }
    assert_eq!(COPIES.load(Relaxed), 0, "a copy of a frame is taken for one");
    dune.leave();
}
