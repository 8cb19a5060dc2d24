// SPDX-License-Identifier: MIT OR Apache-2.0

//! Seeing inside: what a space tells of itself in fdinfo and debugfs, what a failed entry leaves there.

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::Ordering::SeqCst;

use libdune::Dune;

use crate::framework::Test;
use crate::framework::User;
use crate::helpers;
use crate::raw::Ended;
use crate::raw::RawGuest;
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
    Test::asserting("vmcs_of_a_failed_entry_is_shown", vmcs_of_a_failed_entry_is_shown).run_as(User::Root),
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

const LAST_FAILED_ENTRY: &str = "/sys/kernel/debug/dune/last_failed_entry";

/// The lines of [`LAST_FAILED_ENTRY`], `name value`.
fn last_failed_entry() -> BTreeMap<String, String> {
    let text = fs::read_to_string(LAST_FAILED_ENTRY).unwrap();
    let lines: BTreeMap<String, String> = text
        .lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(name, value)| (name.to_string(), value.trim_end().to_string()))
        .collect();
    assert_eq!(
        lines.len(),
        text.lines().count(),
        "a name that comes twice, or a line without value: {text}"
    );
    lines
}

/// After a failed entry root finds whose it was and every field of its VMCS there, by the SDM's names; the log has nothing of it.
fn vmcs_of_a_failed_entry_is_shown() {
    use std::os::unix::fs::PermissionsExt;

    const VMCALL: &[u8] = &[0x0f, 0x01, 0xc1];
    const TR_NOT_BUSY: u32 = 0x89;
    let failures = |lines: &BTreeMap<String, String>| lines["failures"].parse::<u64>().unwrap();
    let before = failures(&last_failed_entry());
    let log = helpers::kernel_log().unwrap();
    let mut guest = RawGuest::new(VMCALL);
    guest.edit(|page| {
        page.gprs.rdi = 1;
        page.sregs.tr.access_rights = TR_NOT_BUSY;
        page.sregs.tr.base = 0x1234_5678_9000;
    });
    let exit = guest.run().exit();
    assert_eq!(exit.kind, dune_abi::EXIT_FAIL_ENTRY);
    let lines = last_failed_entry();
    assert_eq!(failures(&lines), before + 1);
    assert_eq!(lines["pid"], std::process::id().to_string());
    assert_eq!(lines["failed"], "VM-entry failure due to invalid guest state");
    let field = |name: &str| {
        let digits = lines
            .get(name)
            .unwrap_or_else(|| panic!("{name} is not there: {lines:?}"));
        u64::from_str_radix(digits.strip_prefix("0x").unwrap(), 16).unwrap()
    };
    assert_eq!(field("guest::TR_ACCESS_RIGHTS"), TR_NOT_BUSY.into());
    assert_eq!(field("guest::TR_BASE"), 0x1234_5678_9000);
    assert_eq!(field("guest::RIP"), guest.code());
    assert_eq!(field("guest::CR3"), guest.sregs(false).cr3);
    assert_eq!(field("exit_info::REASON"), exit.reason.into());
    assert_eq!(field("exit_info::QUALIFICATION"), exit.qualification);
    // What the module keeps to itself: the controls, and that the host's part is whole.
    assert_eq!(field("control::EPT_POINTER") & 0x3f, 0x1e);
    assert_eq!(field("host::CS_SELECTOR"), 0x10);
    for half in ["host::RIP", "host::RSP", "host::GS_BASE", "host::IDTR_BASE"] {
        assert_eq!(field(half) >> 47, 0x1ffff, "{half}");
    }
    assert!(lines.len() > 100, "{} lines", lines.len());
    // Who may not know where the kernel lies sees the rest only; who is not root, nothing.
    let mode = |path: &str| fs::metadata(path).unwrap().permissions().mode();
    assert_eq!(mode(LAST_FAILED_ENTRY) & 0o777, 0o400);
    assert_eq!(mode("/sys/kernel/debug") & 0o077, 0);
    spawn(|| {
        drop_capability(CAP_SYSLOG);
        let lines = last_failed_entry();
        assert!(
            lines.contains_key("guest::RIP") && lines.keys().all(|name| !name.starts_with("host::")),
            "{lines:?}"
        );
    })
    .wait()
    .assert_success();
    // The guest is as good as before, and again nothing in the log.
    guest.reset();
    assert!(matches!(guest.run(), Ended::Call(_)));
    assert_eq!(failures(&last_failed_entry()), before + 1);
    let log_after = helpers::kernel_log().unwrap();
    assert!(log_after.len() == log.len(), "{}", &log_after[log.len()..]);
}

const CAP_SYSLOG: u32 = 34;

/// Takes a capability from this process.
fn drop_capability(number: u32) {
    const VERSION_3: u32 = 0x2008_0522;
    let mut header = [VERSION_3, 0];
    // Effective, permitted, inheritable, of the first 32 and of the others.
    let mut sets = [[0u32; 3]; 2];
    // SAFETY: the structures that the calls expect; they change this process' capabilities only.
    unsafe {
        assert_eq!(
            libc::syscall(libc::SYS_capget, header.as_mut_ptr(), sets.as_mut_ptr()),
            0
        );
        for set in &mut sets[number as usize / 32] {
            *set &= !(1 << (number % 32));
        }
        assert_eq!(libc::syscall(libc::SYS_capset, header.as_mut_ptr(), sets.as_ptr()), 0);
    }
}
