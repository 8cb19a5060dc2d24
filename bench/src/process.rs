// SPDX-License-Identifier: MIT OR Apache-2.0

//! Threads, children, programs, signals; entering and leaving.

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;
use std::process::Command;
use std::time::Duration;

use libdune::Dune;

use crate::measure::timed;
use crate::measure::System;
use crate::pages::Memory;
use crate::pages::PAGE;

/// A small program that ends at once; with an argument it enters before.
const NOTHING: &str = "dune-nothing";

/// Until RCU has given back what the end of a thread left to it, the kernel's stack first of all: without it the next one
/// costs 8,000 instructions more, and whether it comes in time is a matter of the clock's phase.
const REST: Duration = Duration::from_millis(20);

/// A page in use beside the place where Linux maps next. What a thread maps there has page tables for company, as in a
/// program that has done something before; where a layout happens to give it tables of its own, which are made and given
/// back each time, a thread costs 10,000 instructions more.
fn neighbour() -> Memory {
    let page = Memory::new(PAGE);
    page.write(0, 1);
    page
}

pub fn measure(system: &System<'_>) {
    let is_dune = system.dune.is_some();
    let settle = || std::thread::sleep(REST);
    system.repeated_after("fork", 30, settle, |_| timed(|| fork_and_wait(is_dune)));
    let mut neighbours = Vec::new();
    let settle = || {
        std::thread::sleep(REST);
        neighbours.push(neighbour());
    };
    system.repeated_after("thread", 50, settle, |_| {
        let mut is_active = !is_dune;
        let ticks = timed(|| is_active = std::thread::spawn(Dune::is_active).join().expect("the thread ends"));
        assert_eq!(is_active, is_dune, "the thread is in Dune mode");
        ticks
    });
    signal(system);
}

/// The child's status is 0 if it is in Dune mode as is wanted.
fn fork_and_wait(is_dune: bool) {
    // SAFETY: The child ends at once.
    unsafe {
        let pid = libc::fork();
        assert!(pid >= 0, "fork");
        if pid == 0 {
            libc::_exit(i32::from(Dune::is_active() != is_dune));
        }
        assert_eq!(end_of_child(pid), 0);
    }
}

/// Waits for a child; its wait status.
pub fn end_of_child(pid: libc::pid_t) -> i32 {
    let mut status = 1;
    // SAFETY: Into a word of ours.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    status
}

static SIGNALS: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(_: i32) {
    SIGNALS.fetch_add(1, Relaxed);
}

fn signal(system: &System<'_>) {
    // SAFETY: The handler only counts.
    unsafe {
        let old = libc::signal(libc::SIGUSR1, count as *const () as libc::sighandler_t);
        let before = SIGNALS.load(Relaxed);
        let mut sent = 0;
        system.repeated("signal", 500, |_| {
            sent += 1;
            timed(|| libc::raise(libc::SIGUSR1))
        });
        assert_eq!(SIGNALS.load(Relaxed) - before, sent);
        libc::signal(libc::SIGUSR1, old);
    }
}

/// What a program costs that does nothing, and one that enters Dune mode; and entering and leaving again and again.
pub fn measure_programs(linux: &System<'_>, dune: &System<'_>) {
    let program = std::env::current_exe().map(|own| own.with_file_name(NOTHING));
    let program = program.expect("the path of this program is known");
    let run = |arguments: &[&str]| {
        let status = Command::new(&program).args(arguments).status();
        assert!(status.expect("the program starts").success(), "{NOTHING} {arguments:?}");
    };
    linux.repeated("process", 10, |_| timed(|| run(&[])));
    dune.repeated("process", 10, |_| timed(|| run(&["enter"])));
    if dune.wants(&["enter", "leave"]) {
        let (mut enter, mut leave) = (Vec::new(), Vec::new());
        for _ in 0..30 {
            let mut inside = None;
            enter.push(timed(|| inside = Some(Dune::enter().expect("entering"))));
            assert!(Dune::is_active());
            leave.push(timed(|| drop(inside)));
            assert!(!Dune::is_active());
        }
        dune.given("enter", &mut enter);
        dune.given("leave", &mut leave);
    }
}
