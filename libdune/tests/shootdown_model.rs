// SPDX-License-Identifier: MIT OR Apache-2.0

//! The shootdown of page tables under loom: every order in which a thread that goes from table to table, and one that
//! changes a table, can see what the other writes.
//!
//! `protocol.rs` is libdune's own source, here with loom's atomics.

#[allow(dead_code)]
#[path = "../src/paging/protocol.rs"]
mod protocol;

mod sync {
    pub use loom::sync::atomic::fence;
    pub use loom::sync::atomic::AtomicU32;
    pub use loom::sync::atomic::AtomicU64;
    pub use loom::sync::atomic::Ordering;
}

use std::sync::Arc;

use loom::sync::Mutex;
use loom::thread;

use protocol::raise;
use protocol::Here;
use sync::AtomicU64;
use sync::Ordering::Acquire;
use sync::Ordering::Relaxed;
use sync::Ordering::Release;

/// Two tables of one entry each; the entry of table 0 is changed from 0 to 1.
struct Machine {
    entries: [AtomicU64; 2],
    generations: [AtomicU64; 2],
    here: Here,
    /// What the CPU of the thread has cached, by table. The lock is what an interrupt is to a CPU: in between instructions.
    tlb: Mutex<[Option<u64>; 2]>,
    flushed: AtomicU64,
}

impl Machine {
    fn new(start: u16) -> Self {
        Self {
            entries: [AtomicU64::new(0), AtomicU64::new(0)],
            generations: [AtomicU64::new(1), AtomicU64::new(1)],
            here: Here::new(Some(start)),
            tlb: Mutex::new([None; 2]),
            flushed: AtomicU64::new(0),
        }
    }

    /// An access by the thread, with `table` in CR3.
    fn access(&self, table: usize) -> u64 {
        let mut tlb = self.tlb.lock().unwrap();
        *tlb[table].get_or_insert_with(|| self.entries[table].load(Acquire))
    }

    /// The same, checked: what was flushed before must not be seen.
    fn check(&self) {
        let is_flushed = self.flushed.load(Acquire) == 1;
        let value = self.access(0);
        assert!(!is_flushed || value == 1, "stale");
    }

    fn load(&self, table: u16, seen: &[AtomicU64; 2]) {
        let index = usize::from(table);
        self.here.switch(table, &self.generations[index], &seen[index], |keep| {
            if !keep {
                self.tlb.lock().unwrap()[index] = None;
            }
        });
    }

    fn kick(&self) {
        *self.tlb.lock().unwrap() = [None; 2];
    }

    fn change_and_flush(&self) {
        self.entries[0].store(1, Release);
        raise(&self.generations[0]);
        if self.here.may_use(0) {
            self.kick();
        }
        self.flushed.store(1, Release);
    }
}

/// A thread that starts with one table and goes through others, checking where it has table 0.
fn run(start: u16, way: &'static [u16], flush: fn(&Machine)) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(move || {
        let machine = Arc::new(Machine::new(start));
        let flusher = {
            let machine = machine.clone();
            thread::spawn(move || flush(&machine))
        };
        // It has flushed for what was before.
        let seen = [AtomicU64::new(1), AtomicU64::new(1)];
        if start == 0 {
            machine.check();
        }
        for table in way {
            machine.load(*table, &seen);
            if *table == 0 {
                machine.check();
            }
        }
        flusher.join().unwrap();
    });
}

#[test]
fn thread_that_stays_is_interrupted() {
    run(0, &[0], Machine::change_and_flush);
}

#[test]
fn thread_that_comes_flushes_or_is_seen() {
    run(1, &[0], Machine::change_and_flush);
}

#[test]
fn thread_that_comes_back_flushes_or_is_seen() {
    run(0, &[1, 0], Machine::change_and_flush);
}

/// [`libdune::paging::Flush::flush_local`] of a table that the thread has not loaded.
#[test]
fn what_the_thread_never_saw_is_flushed() {
    loom::model(|| {
        let machine = Machine::new(1);
        let seen = [AtomicU64::new(0), AtomicU64::new(0)];
        for table in [0, 1] {
            machine.load(table, &seen);
            machine.access(table.into());
        }
        machine.entries[0].store(1, Release);
        seen[0].store(protocol::NEVER, Relaxed);
        machine.load(0, &seen);
        assert_eq!(machine.access(0), 1);
        // Once.
        machine.load(1, &seen);
        machine.load(0, &seen);
        assert_eq!(seen[0].load(Relaxed), machine.generations[0].load(Relaxed));
    });
}

#[test]
fn thread_that_comes_goes_and_comes_is_not_missed() {
    run(1, &[0, 1, 0], Machine::change_and_flush);
}

/// The model can fail: without the generation nobody knows when to flush.
#[test]
#[should_panic(expected = "stale")]
fn model_notices_a_missing_generation() {
    run(0, &[1, 0], |machine| {
        machine.entries[0].store(1, Release);
        if machine.here.may_use(0) {
            machine.kick();
        }
        machine.flushed.store(1, Release);
    });
}

/// Nor may it look before it says so.
#[test]
#[should_panic(expected = "stale")]
fn model_notices_the_wrong_order() {
    run(0, &[1, 0], |machine| {
        machine.entries[0].store(1, Release);
        let uses = machine.here.may_use(0);
        raise(&machine.generations[0]);
        if uses {
            machine.kick();
        }
        machine.flushed.store(1, Release);
    });
}

/// Nor without the full fence.
#[test]
#[should_panic(expected = "stale")]
fn model_notices_a_missing_fence() {
    run(0, &[1, 0], |machine| {
        machine.entries[0].store(1, Release);
        machine.generations[0].fetch_add(1, Relaxed);
        if machine.here.may_use(0) {
            machine.kick();
        }
        machine.flushed.store(1, Release);
    });
}
