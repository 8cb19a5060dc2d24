// SPDX-License-Identifier: MIT OR Apache-2.0
//! CPUs that go and come, a machine that sleeps, while guests run.

use std::fs;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;
use std::time::Instant;

use crate::framework::Need;
use crate::framework::Test;
use crate::framework::User;
use crate::helpers::pin_to_cpu;
use crate::kvm::Kvm;
use crate::kvm_guest::KvmGuest;
use crate::support::compute;
use crate::support::enter;
use crate::support::spawn;
use crate::support::Child;
use crate::support::Knob;
use crate::support::Shared;

const fn test(name: &'static str, run: fn(), needs: &'static [Need]) -> Test {
    Test::asserting(name, run)
        .run_as(User::Root)
        .needs(needs)
        .timeout_s(120)
}

const CPU1: &str = "/sys/devices/system/cpu/cpu1/online";
const KVM_INTEL: Need = Need::Path("/lib/modules/kvm-intel.ko");

pub const TESTS: &[Test] = &[
    test(
        "cpu_goes_and_comes_under_guests",
        cpu_goes_and_comes_under_guests,
        &[Need::Path(CPU1)],
    ),
    test(
        "cpu_goes_and_comes_under_guests_beside_kvm",
        cpu_goes_and_comes_under_guests_beside_kvm,
        &[Need::Path(CPU1), KVM_INTEL],
    ),
    test(
        "machine_sleeps_under_a_guest",
        machine_sleeps_under_a_guest,
        &[Need::Path("/sys/power/state")],
    ),
    test(
        "machine_sleeps_under_a_guest_beside_kvm",
        machine_sleeps_under_a_guest_beside_kvm,
        &[Need::Path("/sys/power/state"), KVM_INTEL],
    ),
];

/// Processes that loop in Dune mode, most without a call, one per CPU more than there are; they check what they compute.
struct Guests {
    shared: Shared,
    children: Vec<Child>,
}

impl Guests {
    fn start(cpus: &[usize]) -> Self {
        let shared = Shared::new();
        let children = cpus
            .iter()
            .enumerate()
            .map(|(number, cpu)| {
                spawn(|| {
                    pin_to_cpu(*cpu).unwrap();
                    let expected = compute(2000);
                    let dune = enter();
                    let mut rounds = 0;
                    while shared.word(0).load(SeqCst) == 0 {
                        assert_eq!(compute(2000), expected, "round {rounds}");
                        if number % 2 == 1 {
                            assert_ne!(std::process::id(), 0);
                        }
                        rounds += 1;
                        shared.word(1 + number).store(rounds, SeqCst);
                    }
                    dune.leave();
                })
            })
            .collect();
        let guests = Self { shared, children };
        guests.wait_for_more();
        guests
    }

    /// Waits until each has gone on.
    fn wait_for_more(&self) {
        let word = |number| self.shared.word(1 + number).load(SeqCst);
        let before: Vec<u64> = (0..self.children.len()).map(word).collect();
        let deadline = Instant::now() + Duration::from_secs(30);
        for (number, before) in before.into_iter().enumerate() {
            while word(number) < before + 2 {
                assert!(Instant::now() < deadline, "guest {number} does not go on");
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }

    fn finish(self) {
        self.shared.word(0).store(1, SeqCst);
        for child in self.children {
            child.wait().assert_success();
        }
    }
}

fn set_cpu1(on: bool) {
    fs::write(CPU1, if on { "1" } else { "0" }).unwrap_or_else(|error| panic!("CPU 1 to {on}: {error}"));
}

/// CPU 1 goes and comes; the guests that were there move, and are put there again.
fn hotplug(times: usize, mut meanwhile: impl FnMut()) {
    let guests = Guests::start(&[0, 1, 1]);
    for time in 0..times {
        set_cpu1(false);
        meanwhile();
        guests.wait_for_more();
        set_cpu1(true);
        for child in &guests.children[1..] {
            let status = crate::helpers::run_program("taskset", &["-p", "2", &child.pid.to_string()]).unwrap();
            assert_eq!(status.status, 0, "{status:?}");
        }
        meanwhile();
        guests.wait_for_more();
        println!("{time}: ok");
    }
    guests.finish();
}

fn cpu_goes_and_comes_under_guests() {
    hotplug(5, || {});
}

fn cpu_goes_and_comes_under_guests_beside_kvm() {
    let _kvm = Kvm::load();
    let mut guest = KvmGuest::new(500);
    hotplug(5, || guest.run());
    guest.finish();
}

/// Suspends to memory and wakes at once: the knob stands for the firmware.
fn sleep_and_wake(times: usize, mut meanwhile: impl FnMut()) {
    let Some(_knob) = Knob::set("deep_sleep", 1) else {
        panic!("the module of this kernel has no knob for sleep");
    };
    fs::write("/sys/power/mem_sleep", "deep").expect("deep sleep");
    let guests = Guests::start(&[0, 0]);
    for _ in 0..times {
        fs::write("/sys/power/state", "mem").expect("suspend");
        meanwhile();
        guests.wait_for_more();
    }
    guests.finish();
}

fn machine_sleeps_under_a_guest() {
    sleep_and_wake(2, || {});
}

fn machine_sleeps_under_a_guest_beside_kvm() {
    let _kvm = Kvm::load();
    let mut guest = KvmGuest::new(500);
    sleep_and_wake(2, || guest.run());
    guest.finish();
}
