// SPDX-License-Identifier: MIT OR Apache-2.0

//! Threads, children, programs, signals; entering and leaving. The same of a small program, as the targets are set, is in
//! `small.rs`.

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;
use std::process::Command;

use libdune::Dune;

use crate::counting;
use crate::counting::RunPage;
use crate::counting::Taker;
use crate::measure::timed;
use crate::measure::System;
use crate::tasks::end_of_child;
use crate::tasks::neighbour;
use crate::tasks::rest;

/// A small program that ends at once; with an argument it enters before.
const NOTHING: &str = "dune-nothing";
/// A small one that is linked statically, and measures by itself.
const SMALL: &str = "dune-small";
/// Times that a thread enters and leaves.
const TIMES: usize = 30;

pub fn measure(system: &System<'_>) {
    let is_dune = system.dune.is_some();
    system.repeated_after("fork_dynamic", 30, rest, |_| timed(|| fork_and_wait(is_dune)));
    let mut neighbours = Vec::new();
    let settle = || {
        rest();
        neighbours.push(neighbour());
    };
    system.repeated_after("thread_std", 50, settle, |_| {
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

/// What a program costs that does nothing, and one that enters Dune mode.
pub fn measure_programs(system: &System<'_>) {
    let program = std::env::current_exe().map(|own| own.with_file_name(NOTHING));
    let program = program.expect("the path of this program is known");
    let arguments: &[&str] = if system.name == "linux" { &[] } else { &["enter"] };
    system.repeated("process_dynamic", 10, |_| {
        timed(|| {
            let status = Command::new(&program).args(arguments).status();
            assert!(status.expect("the program starts").success(), "{NOTHING} {arguments:?}");
        })
    });
}

/// The rows of the small program, which prints them.
pub fn measure_small(system: &System<'_>) {
    let rows = ["process", "fork", "thread"];
    let rows = rows.into_iter().filter(|row| system.wants(&[*row]));
    let rows: Vec<&str> = rows.collect();
    if rows.is_empty() {
        return;
    }
    let program = std::env::current_exe().map(|own| own.with_file_name(SMALL));
    let program = program.expect("the path of this program is known");
    let status = Command::new(&program).arg(system.name).args(&rows).status();
    assert!(status.expect("scripts/small builds it").success(), "{SMALL}");
}

/// Entering and leaving again and again.
pub fn enter_and_leave(system: &System<'_>) {
    if !system.wants(&["enter", "leave"]) {
        return;
    }
    let (mut enter, mut leave) = (Vec::new(), Vec::new());
    // Where VMX is borrowed, the first process in Dune mode sees to it, and the last: with another one beside it the heavy
    // operations of this one would not be those that its figure is of.
    let is_counted = system.is_counting && system.name == "dune";
    let mut counted = is_counted.then(|| (Taker::start(), Vec::new(), Vec::new()));
    for _ in 0..TIMES {
        if let Some((taker, ..)) = &mut counted {
            taker.take();
        }
        let mut inside = None;
        enter.push(timed(|| inside = Some(Dune::enter().expect("entering"))));
        assert!(Dune::is_active());
        let page = counted.as_mut().and_then(|(_, entered, _)| {
            let dune = inside.as_ref()?;
            entered.push(counting::all(&dune.counters()));
            let page = RunPage::of(dune, counting::device());
            counting::exit_once();
            let before = page.done();
            Some((before, page))
        });
        leave.push(timed(|| drop(inside)));
        assert!(!Dune::is_active());
        if let (Some((taker, _, left)), Some((before, page))) = (&mut counted, page) {
            left.push(counting::sum(&taker.take(), &counting::more(&before, &page.done())));
        }
    }
    let (entered, left) = counted.map_or_else(Default::default, |(_, entered, left)| (entered, left));
    system.given_with("enter", &mut enter, &entered);
    system.given_with("leave", &mut leave, &left);
}
