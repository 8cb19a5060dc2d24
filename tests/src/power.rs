// SPDX-License-Identifier: MIT OR Apache-2.0
//! CPUs that go and come, a machine that sleeps, while guests run.

use std::arch::global_asm;
use std::fs;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;
use std::time::Instant;

use crate::framework::Need;
use crate::framework::Suite;
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
    // They end the machine: rows of their own.
    test("next_kernel_finds_vmx_off", next_kernel_finds_vmx_off, &[]).suite(Suite::Harness),
    test(
        "next_kernel_finds_vmx_off_beside_kvm",
        next_kernel_finds_vmx_off_beside_kvm,
        &[KVM_INTEL],
    )
    .suite(Suite::Harness),
    test("crash_kernel_finds_vmx_off", crash_kernel_finds_vmx_off, &[]).suite(Suite::Harness),
    test(
        "crash_kernel_finds_vmx_off_beside_kvm",
        crash_kernel_finds_vmx_off_beside_kvm,
        &[KVM_INTEL],
    )
    .suite(Suite::Harness),
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

// The "kernel" that kexec starts, or a crash, in 64-bit mode with everything mapped to itself. Linux cleared CR4.VMXE on the way, which
// faults while VMX is on: that it runs at all shows that VMX was off. It writes a result to the second serial port, where the
// others go, a failed one, because a row of the matrix demands faults by name, and ends the machine by a triple fault.
global_asm!(
    ".pushsection .rodata.dune_test_kexec, \"a\", @progbits",
    ".globl dune_test_kexec, dune_test_kexec_end",
    "dune_test_kexec:",
    "cld",
    "lea rsi, [rip + 5f]",
    "2: mov edx, 0x2fd",
    "3: in al, dx",
    "test al, 0x20",
    "jz 3b",
    "mov edx, 0x2f8",
    "lodsb",
    "out dx, al",
    "cmp byte ptr [rsi], 0",
    "jne 2b",
    "mov edx, 0x2fd",
    "4: in al, dx",
    "test al, 0x40",
    "jz 4b",
    "lidt [rip + 6f]",
    "ud2",
    "5: .asciz \"\\nnot ok 1 the_next_kernel_runs\\n\"",
    "6: .quad 0, 0",
    "dune_test_kexec_end:",
    ".popsection",
);

extern "C" {
    static dune_test_kexec: u8;
    static dune_test_kexec_end: u8;
}

/// Gives Linux that kernel, to be started from `destination`.
fn load_next_kernel(destination: usize, flags: usize) {
    const ARCH_X86_64: usize = 62 << 16;
    const PAGE: usize = 4096;
    let start = &raw const dune_test_kexec;
    // buf, bufsz, mem, memsz (linux/kexec.h)
    let segment = [
        start as usize,
        &raw const dune_test_kexec_end as usize - start as usize,
        destination,
        PAGE,
    ];
    // SAFETY: the segment is our code, copied by the call.
    let loaded = unsafe {
        libc::syscall(
            libc::SYS_kexec_load,
            destination,
            1,
            segment.as_ptr(),
            ARCH_X86_64 | flags,
        )
    };
    assert_eq!(loaded, 0, "kexec_load: {}", std::io::Error::last_os_error());
}

/// Has Linux start another kernel, as `kexec -e` does, while guests run.
fn start_next_kernel() -> ! {
    const DESTINATION: usize = 32 << 20;
    let guests = Guests::start(&[0, 0]);
    load_next_kernel(DESTINATION, 0);
    guests.wait_for_more();
    // SAFETY: the machine is the test's own.
    unsafe { libc::reboot(libc::LINUX_REBOOT_CMD_KEXEC) };
    panic!("reboot: {}", std::io::Error::last_os_error());
}

/// Has Linux crash while guests run on every CPU, with a kernel for that case in the memory that `crashkernel=` keeps free.
fn crash() -> ! {
    const ON_CRASH: usize = 1;
    let regions = fs::read_to_string("/proc/iomem").unwrap();
    let region = regions
        .lines()
        .find_map(|line| line.trim().strip_suffix(" : Crash kernel"));
    let start = region
        .expect("no crashkernel= on the kernel's command line")
        .split('-')
        .next()
        .unwrap();
    let cpus: Vec<usize> = (0..crate::helpers::online_cpus()).collect();
    let guests = Guests::start(&cpus);
    load_next_kernel(usize::from_str_radix(start, 16).unwrap(), ON_CRASH);
    // The log of the crash is on the console; the harness would stop the machine at it.
    fs::write("/proc/sys/kernel/printk", "0").unwrap();
    guests.wait_for_more();
    fs::write("/proc/sysrq-trigger", "c").unwrap();
    panic!("the machine did not crash");
}

fn crash_kernel_finds_vmx_off() {
    crash();
}

fn crash_kernel_finds_vmx_off_beside_kvm() {
    beside_kvm(|| crash());
}

fn next_kernel_finds_vmx_off() {
    start_next_kernel();
}

fn next_kernel_finds_vmx_off_beside_kvm() {
    beside_kvm(|| start_next_kernel());
}

/// Ends the machine while there is a KVM guest that has run.
fn beside_kvm(end: impl FnOnce()) {
    let _kvm = Kvm::load();
    let mut guest = KvmGuest::new(500);
    guest.run();
    end();
}
