// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who owns VMX: this module, or kvm_intel, from which it borrows; in either order of loading, and while both run.

use std::fs;
use std::path::Path;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;
use std::time::Instant;

use libdune::Dune;

use crate::framework::Need;
use crate::framework::Suite;
use crate::framework::Test;
use crate::framework::User;
use crate::helpers;
use crate::helpers::pin_to_cpu;
use crate::kvm_guest::KvmGuest;
use crate::raw::Ended;
use crate::raw::RawGuest;
use crate::support::compute;
use crate::support::enter;
use crate::support::rdtsc;
use crate::support::spawn;
use crate::support::unregister_rseq;
use crate::support::Child;
use crate::support::Shared;

const MODULES: &str = "/lib/modules";
const NEEDS: &[Need] = &[Need::Path("/lib/modules/kvm-intel.ko"), Need::CpuFlag("rdtscp")];
const OWN_FIRST: &[Need] = &[NEEDS[0], NEEDS[1], Need::OwnVmx];

const fn test(name: &'static str, run: fn()) -> Test {
    Test::asserting(name, run)
        .run_as(User::Root)
        .needs(NEEDS)
        .timeout_s(120)
}

pub const TESTS: &[Test] = &[
    test("dune_borrows_vmx_from_kvm", dune_borrows_vmx_from_kvm),
    test("dune_loads_beside_kvm", dune_loads_beside_kvm),
    test("kvm_comes_and_goes_while_dune_runs", kvm_comes_and_goes_while_dune_runs).needs(OWN_FIRST),
    test("kvm_and_dune_alternate", kvm_and_dune_alternate),
    test("kvm_and_dune_alternate_a_million_times", kvm_and_dune_alternate_long)
        .suite(Suite::Long)
        .timeout_s(3000),
    test("kvm_guest_keeps_its_msrs", || kvm_guest_keeps_its_msrs(false)),
    test("kvm_guest_keeps_its_msrs_beside_shortcuts", || {
        kvm_guest_keeps_its_msrs(true)
    }),
    test("kvm_helper_missing_is_told", kvm_helper_missing_is_told),
    test("borrowing_costs_little", borrowing_costs_little).needs(OWN_FIRST),
];

/// `mov eax, 0x1234; vmcall`.
const HEALTHY: &[u8] = &[0xb8, 0x34, 0x12, 0, 0, 0x0f, 0x01, 0xc1];

/// Whether KVM has the CPUs' VMX.
pub fn is_loaded() -> bool {
    Path::new("/sys/module/kvm_intel").exists()
}

/// kvm.ko with what it needs, and kvm_intel where asked for; taken out again at the end, if it was not there before.
pub struct Kvm {
    was_there: bool,
}

impl Kvm {
    /// All but kvm_intel.
    pub fn prepare() -> Self {
        let kvm = Self { was_there: is_loaded() };
        for name in ["irqbypass", "kvm"] {
            if !Path::new("/sys/module").join(name).exists() {
                assert_eq!(insmod(name), 0, "insmod {name}");
            }
        }
        kvm
    }

    /// With kvm_intel.
    pub fn load() -> Self {
        let kvm = Self::prepare();
        if !kvm.was_there {
            assert_eq!(insmod("kvm-intel"), 0, "insmod kvm-intel");
        }
        kvm
    }

    /// Takes kvm_intel out, as soon as nobody uses it: VMX is Dune's own then. Not where KVM was there from the start.
    fn leave_vmx(&self) {
        if !self.was_there {
            remove_soon("kvm_intel");
        }
    }
}

impl Drop for Kvm {
    fn drop(&mut self) {
        for name in ["kvm_intel", "kvm", "irqbypass"] {
            if !self.was_there && Path::new("/sys/module").join(name).exists() {
                remove_soon(name);
            }
        }
    }
}

fn insmod(name: &str) -> i32 {
    helpers::run_program("insmod", &[&format!("{MODULES}/{name}.ko")])
        .unwrap()
        .status
}

fn rmmod(name: &str) -> i32 {
    helpers::run_program("rmmod", &[name]).unwrap().status
}

/// rmmod; the last file of a virtual machine is closed a moment after the process that held it has ended.
fn remove_soon(name: &str) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while rmmod(name) != 0 {
        if Instant::now() > deadline {
            assert!(std::thread::panicking(), "rmmod {name} does not succeed");
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn dune_works() -> bool {
    let mut guest = RawGuest::new(HEALTHY);
    matches!(guest.run(), Ended::Call(0x1234))
}

fn open_errno() -> Option<i32> {
    fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(dune_abi::DEVICE_PATH)
        .err()
        .and_then(|error| error.raw_os_error())
}

/// A process that is in Dune mode until `stop` is 1, checks itself, and counts in `rounds`.
fn busy_dune<'a>(stop: &'a std::sync::atomic::AtomicU64, rounds: &'a std::sync::atomic::AtomicU64) -> Child {
    spawn(|| {
        let expected = compute(50);
        let pid = std::process::id();
        let mut memory = vec![0u64; 4096];
        let dune = enter();
        let mut round = 0u64;
        while stop.load(SeqCst) == 0 {
            check_dune(round, pid, expected, &mut memory);
            round += 1;
            rounds.store(round, SeqCst);
        }
        assert!(Dune::is_active());
        dune.leave();
    })
}

/// Registers, memory, SYSCALL in Dune mode.
fn check_dune(round: u64, pid: u32, expected: u64, memory: &mut [u64]) {
    assert_eq!(compute(50), expected, "round {round}");
    let place = round as usize % memory.len();
    assert_eq!(memory[place], round / memory.len() as u64, "memory in round {round}");
    memory[place] += 1;
    assert_eq!(std::process::id(), pid, "a system call in round {round}");
    check_tsc_aux();
}

fn check_tsc_aux() {
    let mut aux = 0;
    // SAFETY: the tests need RDTSCP.
    unsafe { core::arch::x86_64::__rdtscp(&mut aux) };
    assert!(aux & 0xfff < 64, "TSC_AUX, where Linux has the CPU's number: {aux:#x}");
}

/// Waits until `word` has grown by `by`.
fn wait_for_more(word: &std::sync::atomic::AtomicU64, by: u64, what: &str) {
    let start = word.load(SeqCst);
    let deadline = Instant::now() + Duration::from_secs(60);
    while word.load(SeqCst) < start + by {
        assert!(Instant::now() < deadline, "{what} does not go on");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn dune_borrows_vmx_from_kvm() {
    assert!(dune_works());
    let kvm = Kvm::load();
    assert!(dune_works(), "beside kvm_intel");
    for _ in 0..3 {
        let guest = RawGuest::new(HEALTHY);
        assert_ne!(rmmod("kvm_intel"), 0, "kvm_intel went from under a space");
        drop(guest);
    }
    let mut guest = KvmGuest::new(100);
    guest.run();
    assert!(dune_works(), "beside a guest of KVM");
    guest.run();
    guest.finish();
    kvm.leave_vmx();
    assert!(dune_works(), "VMX is ours again");
    drop(kvm);
    assert!(dune_works());
}

fn dune_loads_beside_kvm() {
    assert_eq!(helpers::unload_module().unwrap().status, 0);
    let kvm = Kvm::load();
    let mut guest = KvmGuest::new(100);
    guest.run();
    for _ in 0..3 {
        let loaded = helpers::load_module(&[]).unwrap();
        assert_eq!(loaded.status, 0, "{loaded:?}");
        assert!(dune_works());
        guest.run();
        assert_eq!(helpers::unload_module().unwrap().status, 0);
        guest.run();
    }
    guest.finish();
    // KVM goes, and VMX is the module's own.
    let loaded = helpers::load_module(&[]).unwrap();
    assert_eq!(loaded.status, 0, "{loaded:?}");
    assert!(dune_works());
    kvm.leave_vmx();
    assert!(dune_works());
}

fn kvm_comes_and_goes_while_dune_runs() {
    let shared = Shared::new();
    let kvm = Kvm::prepare();
    for turn in 0..3 {
        shared.word(0).store(0, SeqCst);
        let dune = busy_dune(shared.word(0), shared.word(1));
        let other = busy_dune(shared.word(0), shared.word(2));
        wait_for_more(shared.word(1), 20, "Dune, own");
        wait_for_more(shared.word(2), 20, "the other Dune, own");
        assert_eq!(insmod("kvm-intel"), 0, "turn {turn}");
        wait_for_more(shared.word(1), 20, "Dune, borrowing");
        wait_for_more(shared.word(2), 20, "the other Dune, borrowing");
        let mut guest = KvmGuest::new(1000);
        for _ in 0..10 {
            guest.run();
        }
        guest.finish();
        wait_for_more(shared.word(1), 20, "Dune, beside a guest of KVM");
        assert_ne!(rmmod("kvm_intel"), 0, "kvm_intel went from under a process");
        shared.word(0).store(1, SeqCst);
        dune.wait().assert_success();
        other.wait().assert_success();
        remove_soon("kvm_intel");
        assert!(dune_works(), "own again");
    }
    drop(kvm);
}

/// Takes turns on one CPU, `alternations` in all; each side checks itself in each turn.
fn alternate(alternations: u64) {
    let shared = Shared::new();
    let (turns, last) = (shared.word(0), shared.word(1));
    pin_to_cpu(0).unwrap();
    let _kvm = Kvm::load();
    let take_turn = |me: u64| {
        if last.swap(me, SeqCst) != me {
            turns.fetch_add(1, SeqCst);
        }
        // SAFETY: no arguments.
        unsafe { libc::sched_yield() };
    };
    let dune = spawn(|| {
        let expected = compute(50);
        let pid = std::process::id();
        let mut memory = vec![0u64; 4096];
        let dune = enter();
        let mut round = 0;
        while turns.load(SeqCst) < alternations {
            check_dune(round, pid, expected, &mut memory);
            round += 1;
            take_turn(1);
        }
        dune.leave();
    });
    let mut guest = KvmGuest::new(3);
    while turns.load(SeqCst) < alternations {
        guest.run();
        take_turn(2);
    }
    dune.wait().assert_success();
    let rounds = guest.finish();
    println!(
        "{} alternations, {rounds} rounds of the guest of KVM",
        turns.load(SeqCst)
    );
}

fn kvm_and_dune_alternate() {
    alternate(20_000);
}

fn kvm_and_dune_alternate_long() {
    alternate(1_000_000);
}

/// Neither side yields: each is preempted wherever it is, KVM with its guest's MSRs in the CPU, Dune in RUN. With
/// `DUNE_MUTATE=user_return` this is red.
fn kvm_guest_keeps_its_msrs(calls: bool) {
    let shared = Shared::new();
    pin_to_cpu(0).unwrap();
    let _kvm = Kvm::load();
    let dune = spawn(|| {
        unregister_rseq();
        let dune = enter();
        // Without system calls what ends RUN is not this loop; with them each comes back by the shortcut where it may.
        while shared.word(0).load(SeqCst) == 0 {
            if calls {
                // SAFETY: no arguments.
                unsafe { libc::syscall(libc::SYS_getppid) };
            }
            check_tsc_aux();
            shared.word(1).fetch_add(1, SeqCst);
        }
        dune.leave();
    });
    let start = Instant::now();
    let mut guest = KvmGuest::new(20_000);
    let mut switches = 0;
    let mut seen = 0;
    while switches < 30 {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "{switches} times did both go on"
        );
        guest.run();
        let now = shared.word(1).load(SeqCst);
        if now != seen {
            seen = now;
            switches += 1;
        }
    }
    shared.word(0).store(1, SeqCst);
    dune.wait().assert_success();
    println!("{} rounds of KVM, {seen} of Dune", guest.finish());
}

fn kvm_helper_missing_is_told() {
    let kvm = Kvm::load();
    for (helper, told) in [
        ("/no/such", "it cannot be started"),
        ("/bin/false", "it failed: wait status 0x100"),
    ] {
        assert_eq!(helpers::unload_module().unwrap().status, 0);
        let loaded = helpers::load_module(&[&format!("kvm_helper={helper}")]).unwrap();
        assert_eq!(loaded.status, 0, "{loaded:?}");
        let count = || helpers::kernel_log().unwrap().matches(told).count();
        let before = count();
        for _ in 0..3 {
            assert_eq!(open_errno(), Some(libc::EBUSY));
        }
        assert_eq!(count(), before + 1, "one line, not one per open");
        let error = Dune::enter().expect_err("entered without VMX").to_string();
        assert!(
            error.contains("dmesg") && error.contains("modprobe -r kvm_intel"),
            "{error}"
        );
    }
    // The remedy that the line names.
    kvm.leave_vmx();
    assert_eq!(open_errno(), kvm.was_there.then_some(libc::EBUSY));
    assert_eq!(helpers::unload_module().unwrap().status, 0);
    assert_eq!(helpers::load_module(&[]).unwrap().status, 0);
    assert!(dune_works());
}

/// What an exit that the module settles costs: owned, borrowed, and borrowed while a virtual machine of KVM lives on that CPU.
fn borrowing_costs_little() {
    pin_to_cpu(0).unwrap();
    let shared = Shared::new();
    let measure = |word: usize| {
        spawn(|| {
            let dune = enter();
            let mut least = u64::MAX;
            for _ in 0..2000 {
                let start = rdtsc();
                std::hint::black_box(helpers::cpuid(0, 0));
                least = least.min(rdtsc() - start);
            }
            dune.leave();
            shared.word(word).store(least, SeqCst);
        })
        .wait()
        .assert_success();
        shared.word(word).load(SeqCst)
    };
    let own = measure(0);
    let _kvm = Kvm::load();
    let borrowed = measure(1);
    let mut guest = KvmGuest::new(10);
    guest.run();
    let beside = measure(2);
    guest.run();
    guest.finish();
    println!("report: CPUID: {own} owned, {borrowed} borrowed, {beside} beside a virtual machine of KVM (RDTSC)");
    // An exit that the run loop settles does not ask whose VMX it is.
    for (other, what) in [(borrowed, "borrowed"), (beside, "beside a virtual machine")] {
        assert!(other * 10 <= own * 11, "{own}, {what} {other}");
    }
}
