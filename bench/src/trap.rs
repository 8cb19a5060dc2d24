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

/// What protects pages.
trait Pager {
    fn protect(&self, memory: &Memory, offset: usize, bytes: usize);
    fn unprotect(&self, memory: &Memory, offset: usize, bytes: usize);
}

pub fn measure(system: &System<'_>) {
    if !system.wants(&["trap", "trap_fix", "appel1", "appel2"]) {
        return;
    }
    match system.dune {
        Some(dune) => {
            let before = dune.set_exception_handler(Vector::PF, on_page_fault);
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
    let fault = |page: usize| {
        pager.protect(&memory, page * PAGE, PAGE);
        let start = ticks();
        memory.write(page * PAGE, 1);
        let whole = ticks() - start;
        (ENTERED.load(Relaxed) - start, whole)
    };
    system.repeated("trap", 1000, |i| fault(i % PAGES).0);
    system.repeated("trap_fix", 1000, |i| fault(i % PAGES).1);
    // PROT1, TRAP, UNPROT: each handler makes its page writable and protects another one.
    system.once("appel1", ROUNDS, |_| {
        pager.protect(&memory, 0, PAGES * PAGE);
        let before = TRAPS.load(Relaxed);
        let ticks = timed(|| {
            for page in 0..PAGES {
                // The one before it, which is writable by now; the first protects the last.
                let other = memory.at((page + PAGES - 1) % PAGES * PAGE);
                PROTECT.store(other as usize, Relaxed);
                memory.write(page * PAGE, 1);
            }
        });
        PROTECT.store(0, Relaxed);
        assert_eq!(TRAPS.load(Relaxed) - before, PAGES);
        pager.unprotect(&memory, 0, PAGES * PAGE);
        ticks
    });
    // PROTN, TRAP, UNPROT.
    system.once("appel2", ROUNDS, |_| {
        let before = TRAPS.load(Relaxed);
        let ticks = timed(|| {
            pager.protect(&memory, 0, PAGES * PAGE);
            (0..PAGES).for_each(|page| memory.write(page * PAGE, 1));
        });
        assert_eq!(TRAPS.load(Relaxed) - before, PAGES);
        ticks
    });
}

struct Mprotect;

impl Pager for Mprotect {
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
    fn protect(&self, memory: &Memory, offset: usize, bytes: usize) {
        self.set(memory, offset, bytes, Permissions::READ);
    }

    fn unprotect(&self, memory: &Memory, offset: usize, bytes: usize) {
        self.set(memory, offset, bytes, Permissions::ALL);
    }
}

fn on_page_fault(frame: &mut TrapFrame, thread: &Thread<'_>) -> Outcome {
    ENTERED.store(ticks(), Relaxed);
    TRAPS.fetch_add(1, Relaxed);
    let space = thread.address_space();
    let Some(gva) = Gva::new(frame.cr2) else {
        return Outcome::Unhandled;
    };
    match space.protect(gva.align_down(PAGE as u64), PAGE as u64, Permissions::ALL) {
        // More access: a stale translation only faults, and Linux' own way does not flush either.
        Ok(flush) => flush.ignore(),
        Err(_) => return Outcome::Unhandled,
    }
    match Gva::new(PROTECT.load(Relaxed) as u64) {
        Some(other) if other.as_u64() != 0 => match space.protect(other, PAGE as u64, Permissions::READ) {
            Ok(flush) => flush.flush(),
            Err(_) => return Outcome::Unhandled,
        },
        _ => {}
    }
    Outcome::Resume
}
