// SPDX-License-Identifier: MIT OR Apache-2.0

//! Seeing inside: what a space tells of itself in fdinfo and debugfs.

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::Ordering::SeqCst;

use libdune::Dune;

use crate::framework::Test;
use crate::framework::User;
use crate::support::enter;
use crate::support::spawn;
use crate::support::Map;
use crate::support::Shared;
use crate::support::EXIT_EPT_VIOLATION;
use crate::support::EXIT_VMCALL;
use crate::support::PAGE;
use crate::syscall::device_fds;

pub const TESTS: &[Test] = &[
    Test::asserting("fdinfo_counts_what_a_space_did", fdinfo_counts_what_a_space_did),
    Test::asserting("debugfs_lists_the_spaces", debugfs_lists_the_spaces).run_as(User::Root),
];

/// The module's lines in a process' fdinfo.
fn fdinfo(pid: &str, fd: i32) -> BTreeMap<String, u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).unwrap();
    text.lines()
        .filter_map(|line| line.strip_prefix("dune-")?.split_once(":\t"))
        .map(|(name, value)| (name.to_string(), value.parse().unwrap()))
        .collect()
}

fn fdinfo_counts_what_a_space_did() {
    const CALLS: u64 = 500;
    let dune = enter();
    let fd = device_fds()[0];
    let own = |index: usize| dune.counters().exits[index];
    let (calls, faults) = (own(EXIT_VMCALL), own(EXIT_EPT_VIOLATION));
    let told = fdinfo("self", fd);
    assert!((calls..=own(EXIT_VMCALL)).contains(&told["exits-18"]), "{told:?}");
    assert!(
        (faults..=own(EXIT_EPT_VIOLATION)).contains(&told["exits-48"]),
        "{told:?}"
    );
    assert_eq!(told["vcpus"], 1);
    assert!(
        told["entries"] >= told["exits-18"] && told["ept-4k"] + told["ept-2m"] > 0,
        "{told:?}"
    );
    assert!(told["slots-free"] > 0 && told["space"] > 0);
    // What a thread did that is gone stays.
    let counted = std::thread::spawn(|| {
        assert!(Dune::is_active());
        for _ in 0..CALLS {
            // SAFETY: a call without arguments.
            unsafe { libc::syscall(libc::SYS_getppid) };
        }
    });
    counted.join().unwrap();
    let after = fdinfo("self", fd);
    assert_eq!(after["vcpus"], 1, "{after:?}");
    let ours = own(EXIT_VMCALL) - calls;
    assert!(after["exits-18"] - told["exits-18"] >= CALLS, "{after:?}");
    assert!(
        after["exits-18"] - told["exits-18"] < CALLS + ours + 200,
        "{after:?} and {ours} of our own"
    );
    // Invalidations and flushes.
    let map = Map::new(16 * PAGE);
    for round in 0..20u64 {
        map.write(0, round);
        map.advise(0, PAGE, libc::MADV_DONTNEED);
    }
    let last = fdinfo("self", fd);
    assert!(last["invalidations"] >= after["invalidations"] + 20, "{last:?}");
    assert!(last["flushes"] >= after["flushes"] + 20, "{last:?}");
    assert!(last["exits-48"] >= after["exits-48"] + 10, "{last:?}");
    dune.leave();
}

fn debugfs_lists_the_spaces() {
    const LIST: &str = "/sys/kernel/debug/dune/list";
    let of = |pid: i32| -> Option<Vec<u64>> {
        let text = fs::read_to_string(LIST).unwrap();
        let mut lines = text.lines();
        assert_eq!(lines.next(), Some("space pid vcpus slots-free invalidations flushes"));
        lines
            .map(|line| line.split_whitespace().map(|word| word.parse().unwrap()).collect())
            .find(|numbers: &Vec<u64>| numbers[1] == pid as u64)
    };
    let shared = Shared::new();
    let children: Vec<_> = (0..3)
        .map(|_| {
            spawn(|| {
                let _dune = enter();
                let fd = device_fds()[0];
                shared.word(1).store(fd as u64, SeqCst);
                shared.word(0).fetch_add(1, SeqCst);
                loop {
                    std::hint::spin_loop();
                }
            })
        })
        .collect();
    while shared.word(0).load(SeqCst) < 3 {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let fd = shared.word(1).load(SeqCst) as i32;
    for child in &children {
        let numbers = of(child.pid).expect("it is not listed");
        assert_eq!(numbers.len(), 6);
        let told = fdinfo(&child.pid.to_string(), fd);
        assert_eq!(
            (numbers[0], numbers[2], numbers[3]),
            (told["space"], 1, told["slots-free"])
        );
    }
    let pids: Vec<i32> = children.iter().map(|child| child.pid).collect();
    drop(children);
    assert!(pids.iter().all(|pid| of(*pid).is_none()), "who is gone is listed");
}
