// SPDX-License-Identifier: MIT OR Apache-2.0

//! Seeing inside: what a space tells of itself in fdinfo and debugfs, what a failed entry leaves there, tracepoints.

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::Ordering::SeqCst;

use libdune::Dune;

use crate::framework::Need;
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
    Test::asserting("tracepoints_tell_of_exits", tracepoints_tell_of_exits)
        .run_as(User::Root)
        .needs(&[Need::Path("/sys/kernel/tracing/events/dune")]),
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

/// An instance of tracefs, with the module's tracepoints on; removed when dropped.
pub struct Trace(String);

impl Trace {
    pub fn start() -> Self {
        let trace = Self(format!("/sys/kernel/tracing/instances/dune-{}", std::process::id()));
        fs::create_dir(&trace.0).unwrap();
        trace.set(true);
        trace
    }

    pub fn set(&self, on: bool) {
        fs::write(format!("{}/events/dune/enable", self.0), if on { "1" } else { "0" }).unwrap();
    }

    /// What this thread's events so far say, by the name of their tracepoint.
    pub fn events(&self, name: &str) -> Vec<String> {
        let whose = format!("-{} ", std::process::id());
        let text = fs::read_to_string(format!("{}/trace", self.0)).unwrap();
        let what = format!(": {name}: ");
        text.lines()
            .filter(|line| line.contains(&whose))
            .filter_map(|line| Some(line.split_once(&what)?.1.to_string()))
            .collect()
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let _ = fs::write(format!("{}/events/dune/enable", self.0), "0");
        let _ = fs::remove_dir(&self.0);
    }
}

/// tracefs shows each exit of a guest, each EPT violation with what became of it, invalidations, entries that failed; nothing
/// once nobody listens.
fn tracepoints_tell_of_exits() {
    /// `cpuid; mov al, [rdi]; mov eax, 0x4242; vmcall`.
    const CODE: &[u8] = &[0x0f, 0xa2, 0x8a, 0x07, 0xb8, 0x42, 0x42, 0, 0, 0x0f, 0x01, 0xc1];
    // The first GiB is never a slot.
    const NO_SLOT: u64 = 0x1234_5000;
    let mut guest = RawGuest::alone(CODE);
    let space = fdinfo("self", guest.device.fd)["space"];
    let of_space = format!("space {space} ");
    let trace = Trace::start();
    let data = guest.data();
    let run = |guest: &mut RawGuest, address: u64| {
        guest.reset();
        guest.edit(|page| page.gprs.rdi = address);
        guest.run()
    };
    assert_eq!(run(&mut guest, data), Ended::Call(0x4242));

    // Exits by reason: as many as the vCPU counted.
    let exits = trace.events("dune_exit");
    let counters = guest.run_page().counters;
    let count = |reason: &str| {
        exits
            .iter()
            .filter(|line| line.contains(&format!(" reason {reason} ")))
            .count() as u64
    };
    println!("{}", exits.join("\n"));
    assert_eq!(exits.len() as u64, counters.exits.iter().sum::<u64>());
    for (reason, number) in [
        ("VMCALL", EXIT_VMCALL),
        ("CPUID", 10),
        ("EPT_VIOLATION", EXIT_EPT_VIOLATION),
    ] {
        assert_eq!(count(reason), counters.exits[number], "{reason}");
        assert!(counters.exits[number] > 0, "{reason}");
    }
    let vmcall = format!(
        "space {space} reason VMCALL rip {:#x} cpl 0 qualification 0x0 rax 0x4242",
        guest.code() + CODE.len() as u64 - 3
    );
    assert_eq!(exits.last(), Some(&vmcall));

    // EPT violations: each once, with what became of it.
    let violations = trace.events("dune_ept_violation");
    println!("{}", violations.join("\n"));
    assert_eq!(violations.len() as u64, counters.exits[EXIT_EPT_VIOLATION]);
    assert!(violations.iter().all(|line| line.starts_with(&of_space)));
    let mapped = violations
        .iter()
        .filter(|line| line.contains("outcome mapped-4k"))
        .count() as u64;
    assert_eq!(mapped, counters.ept_4k);

    // Invalidations: of a page that is mapped, and of one that is not any more.
    let invalidations = trace.events("dune_invalidate").len();
    for _ in 0..2 {
        // SAFETY: a page of the guest's data, which nothing here needs.
        assert_eq!(
            unsafe { libc::madvise(data as *mut libc::c_void, PAGE, libc::MADV_DONTNEED) },
            0
        );
    }
    let range = format!("space {space} hva {data:#x}-{:#x} ", data + PAGE as u64);
    let expected = [format!("{range}flushed"), format!("{range}nothing-mapped")];
    assert_eq!(trace.events("dune_invalidate")[invalidations..], expected);

    // A GPA without a slot, and an entry that fails.
    let odd = guest.map_odd(NO_SLOT);
    assert_eq!(run(&mut guest, odd).exit().kind, dune_abi::EXIT_NO_SLOT);
    let last = trace.events("dune_ept_violation").pop().unwrap();
    let expected = format!(
        "space {space} gpa {:#x} gva {odd:#x} hva 0x0 access r outcome no-slot type none",
        NO_SLOT
    );
    assert_eq!(last, expected);
    guest.reset();
    guest.edit(|page| page.rflags |= 1 << 17);
    assert_eq!(guest.run().exit().kind, dune_abi::EXIT_FAIL_ENTRY);
    let failed = [format!(
        "space {space} reason 0x80000021 qualification 0x0 instruction-error 0"
    )];
    assert_eq!(trace.events("dune_entry_failed"), failed);
    let last = trace.events("dune_exit").pop().unwrap();
    assert!(last.contains(" reason INVALID_STATE (entry failed) "), "{last}");

    // Nobody listens: nothing comes.
    trace.set(false);
    let before = trace.events("dune_exit").len();
    assert_eq!(run(&mut guest, data), Ended::Call(0x4242));
    assert_eq!(trace.events("dune_exit").len(), before);
    assert_eq!(trace.events("dune_ept_violation").pop().unwrap(), expected);
}
