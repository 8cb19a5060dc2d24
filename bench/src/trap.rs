// SPDX-License-Identifier: MIT OR Apache-2.0

//! Protected pages and the faults on them: trap, Appel and Li's two patterns, as in the published benchmarks.
//!
//! Linux: mprotect and a SIGSEGV handler. Dune: the program's own page table and its own #PF handler.

use core::sync::atomic::AtomicU64;
use core::sync::atomic::AtomicUsize;
use core::sync::atomic::Ordering::Relaxed;

use dune_examples::ticks;
use libdune::Dune;
use libdune::Gva;
use libdune::Outcome;
use libdune::Permissions;
use libdune::Thread;
use libdune::TrapFrame;
use libdune::Vector;

use crate::measure::timed;
use crate::measure::System;
use crate::pages::Memory;
use crate::pages::PAGE;

const PAGES: usize = 100;
const ROUNDS: usize = 20;

static ENTERED: AtomicU64 = AtomicU64::new(0);
/// Start of the next page for a handler to protect, 0: none.
static PROTECT: AtomicUsize = AtomicUsize::new(0);
static TRAPS: AtomicUsize = AtomicUsize::new(0);

/// What the handler does.
#[derive(Clone, Copy)]
enum How {
    /// Takes the time, and makes the page writable.
    Timed,
    /// Makes the page writable.
    Unprotect,
    /// The same, and protects another.
    Exchange,
}

/// What protects pages.
trait Pager {
    /// Has faults handled in a way.
    fn handle(&self, how: How);
    fn protect(&self, memory: &Memory, offset: usize, bytes: usize);
    fn unprotect(&self, memory: &Memory, offset: usize, bytes: usize);
}

pub fn measure(system: &System<'_>) {
    if !system.wants(&["trap", "trap_fix", "appel1", "appel2"]) {
        return;
    }
    match system.dune {
        Some(dune) => {
            let before = dune.set_exception_handler(Vector::PF, unprotect);
            all(system, &OwnTable(dune));
            match before {
                Some(before) => dune.set_exception_handler(Vector::PF, before),
                None => dune.clear_exception_handler(Vector::PF),
            };
        }
        None => {
            let old = handle_segv();
            all(system, &Mprotect);
            // SAFETY: The action that was there.
            unsafe { libc::sigaction(libc::SIGSEGV, &old, core::ptr::null_mut()) };
        }
    }
}

fn all(system: &System<'_>, pager: &dyn Pager) {
    let memory = Memory::new(PAGES * PAGE).small().populated();
    PROTECT.store(0, Relaxed);
    pager.handle(How::Timed);
    // Another byte each time: it is there afterwards, and one handler ran for it.
    let fault = |i: usize| {
        let (page, byte) = (i % PAGES, (i / PAGES) as u8 + 1);
        pager.protect(&memory, page * PAGE, PAGE);
        let address = memory.at(page * PAGE);
        let before = (TRAPS.load(Relaxed), memory.read(page * PAGE));
        let start = ticks();
        // SAFETY: In the mapping; a handler makes it writable.
        unsafe { address.write_volatile(byte) };
        let whole = ticks() - start;
        assert_eq!(TRAPS.load(Relaxed) - before.0, 1, "traps of one store");
        assert_eq!(memory.read(page * PAGE), byte, "what was stored where {} was", before.1);
        (ENTERED.load(Relaxed) - start, whole)
    };
    system.repeated("trap", 1000, |i| fault(i).0);
    system.repeated("trap_fix", 1000, |i| fault(i).1);
    let all_are = |byte: u8| {
        assert!(
            (0..PAGES).all(|page| memory.read(page * PAGE) == byte),
            "bytes that were stored"
        );
    };
    pager.handle(How::Exchange);
    // PROT1, TRAP, UNPROT: each handler makes its page writable and protects another one.
    let protect_all = || pager.protect(&memory, 0, PAGES * PAGE);
    system.once_after("appel1", ROUNDS, protect_all, |round| {
        let byte = round as u8 + 100;
        let before = TRAPS.load(Relaxed);
        let ticks = timed(|| {
            for page in 0..PAGES {
                // The one before it, which is writable by now; the first protects the last.
                let other = memory.at((page + PAGES - 1) % PAGES * PAGE);
                PROTECT.store(other as usize, Relaxed);
                memory.write(page * PAGE, byte);
            }
        });
        PROTECT.store(0, Relaxed);
        assert_eq!(TRAPS.load(Relaxed) - before, PAGES);
        all_are(byte);
        ticks
    });
    pager.unprotect(&memory, 0, PAGES * PAGE);
    pager.handle(How::Unprotect);
    // PROTN, TRAP, UNPROT.
    system.once("appel2", ROUNDS, |round| {
        let byte = round as u8 + 200;
        let before = TRAPS.load(Relaxed);
        let ticks = timed(|| {
            pager.protect(&memory, 0, PAGES * PAGE);
            (0..PAGES).for_each(|page| memory.write(page * PAGE, byte));
        });
        assert_eq!(TRAPS.load(Relaxed) - before, PAGES);
        all_are(byte);
        ticks
    });
}

struct Mprotect;

impl Pager for Mprotect {
    /// One for all.
    fn handle(&self, _: How) {}

    fn protect(&self, memory: &Memory, offset: usize, bytes: usize) {
        memory.protect(offset, bytes, libc::PROT_READ);
    }

    fn unprotect(&self, memory: &Memory, offset: usize, bytes: usize) {
        memory.protect(offset, bytes, libc::PROT_READ | libc::PROT_WRITE);
    }
}

extern "C" fn on_segv(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    ENTERED.store(ticks(), Relaxed);
    TRAPS.fetch_add(1, Relaxed);
    let protect = |start: usize, protection| {
        // SAFETY: A page of the test's memory.
        unsafe { libc::mprotect(start as *mut libc::c_void, PAGE, protection) }
    };
    // SAFETY: Linux' own.
    let address = unsafe { (*info).si_addr() } as usize;
    let result = protect(address & !(PAGE - 1), libc::PROT_READ | libc::PROT_WRITE);
    let other = PROTECT.load(Relaxed);
    if result != 0 || other != 0 && protect(other, libc::PROT_READ) != 0 {
        // SAFETY: Ends the process.
        unsafe { libc::abort() };
    }
}

fn handle_segv() -> libc::sigaction {
    // SAFETY: A handler of the right type.
    unsafe {
        let mut action: libc::sigaction = core::mem::zeroed();
        let mut old: libc::sigaction = core::mem::zeroed();
        action.sa_sigaction = on_segv as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        assert_eq!(libc::sigaction(libc::SIGSEGV, &action, &mut old), 0);
        old
    }
}

struct OwnTable<'d>(&'d Dune);

impl OwnTable<'_> {
    fn set(&self, memory: &Memory, offset: usize, bytes: usize, permissions: Permissions) {
        let start = Gva::of(memory.at(offset)).expect("a program's address is canonical");
        self.0
            .address_space()
            .protect(start, bytes as u64, permissions)
            .expect("the pages are the program's")
            .flush();
    }
}

impl Pager for OwnTable<'_> {
    fn handle(&self, how: How) {
        let handler = match how {
            How::Timed => on_timed_page_fault,
            How::Unprotect => unprotect,
            How::Exchange => exchange,
        };
        self.0.set_exception_handler(Vector::PF, handler);
    }

    fn protect(&self, memory: &Memory, offset: usize, bytes: usize) {
        self.set(memory, offset, bytes, Permissions::READ);
    }

    fn unprotect(&self, memory: &Memory, offset: usize, bytes: usize) {
        self.set(memory, offset, bytes, Permissions::ALL);
    }
}

/// Takes the time before anything else, also before the compiler saves registers for what follows.
fn on_timed_page_fault(frame: &mut TrapFrame, thread: &Thread<'_>) -> Outcome {
    ENTERED.store(ticks(), Relaxed);
    unprotect(frame, thread)
}

#[inline(never)]
fn unprotect(frame: &mut TrapFrame, thread: &Thread<'_>) -> Outcome {
    TRAPS.fetch_add(1, Relaxed);
    make_writable(frame, thread)
}

/// Makes the page writable and the one before it read-only.
fn exchange(frame: &mut TrapFrame, thread: &Thread<'_>) -> Outcome {
    TRAPS.fetch_add(1, Relaxed);
    if make_writable(frame, thread) == Outcome::Unhandled {
        return Outcome::Unhandled;
    }
    let Some(other) = Gva::new(PROTECT.load(Relaxed) as u64) else {
        return Outcome::Unhandled;
    };
    match thread.address_space().protect(other, PAGE as u64, Permissions::READ) {
        Ok(flush) => flush.flush(),
        Err(_) => return Outcome::Unhandled,
    }
    Outcome::Resume
}

#[inline(always)]
fn make_writable(frame: &TrapFrame, thread: &Thread<'_>) -> Outcome {
    let Some(gva) = Gva::new(frame.cr2) else {
        return Outcome::Unhandled;
    };
    let page = gva.align_down(PAGE as u64);
    match thread.address_space().protect(page, PAGE as u64, Permissions::ALL) {
        // More access: a stale translation only faults, and Linux' own way does not flush either.
        Ok(flush) => flush.ignore(),
        Err(_) => return Outcome::Unhandled,
    }
    Outcome::Resume
}
