// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who owns VMX: this module or kvm_intel, in either order of loading.

use std::fs;
use std::path::Path;
use std::time::Duration;
use std::time::Instant;

use crate::framework::Need;
use crate::framework::Test;
use crate::framework::User;
use crate::helpers;
use crate::raw::Ended;
use crate::raw::RawGuest;

const MODULES: &str = "/lib/modules";
const NEEDS: &[Need] = &[Need::Path("/lib/modules/kvm-intel.ko")];

pub const TESTS: &[Test] = &[
    Test::asserting("kvm_gets_vmx_when_no_space_exists", kvm_gets_vmx_when_no_space_exists)
        .run_as(User::Root)
        .needs(NEEDS),
    Test::asserting(
        "kvm_is_kept_out_while_a_space_exists",
        kvm_is_kept_out_while_a_space_exists,
    )
    .run_as(User::Root)
    .needs(NEEDS),
    Test::asserting("kvm_loaded_first_makes_open_busy", kvm_loaded_first_makes_open_busy)
        .run_as(User::Root)
        .needs(NEEDS),
];

/// `mov eax, 0x1234; vmcall`.
const HEALTHY: &[u8] = &[0xb8, 0x34, 0x12, 0, 0, 0x0f, 0x01, 0xc1];

/// kvm.ko with what it needs, and kvm_intel where asked for; taken out again at the end.
struct Kvm;

impl Kvm {
    fn prepare() -> Self {
        let kvm = Self;
        for name in ["irqbypass", "kvm"] {
            if !Path::new("/sys/module").join(name).exists() {
                assert_eq!(insmod(name), 0, "insmod {name}");
            }
        }
        kvm
    }
}

impl Drop for Kvm {
    fn drop(&mut self) {
        for name in ["kvm_intel", "kvm", "irqbypass"] {
            if Path::new("/sys/module").join(name).exists() {
                rmmod(name);
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

/// How often the log has the line about KVM having VMX.
fn remedies_in_log() -> usize {
    helpers::kernel_log().unwrap().matches("rmmod kvm_intel").count()
}

/// VMX comes back a moment after kvm_intel has gone.
fn wait_for_dune() {
    let deadline = Instant::now() + Duration::from_secs(5);
    while open_errno().is_some() {
        assert!(Instant::now() < deadline, "open still fails: {:?}", open_errno());
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub fn kvm_gets_vmx_when_no_space_exists() {
    assert!(dune_works());
    let kvm = Kvm::prepare();
    assert_eq!(insmod("kvm-intel"), 0, "an idle dune.ko keeps nobody out");
    let before = remedies_in_log();
    for _ in 0..3 {
        assert_eq!(open_errno(), Some(libc::EBUSY));
    }
    assert_eq!(remedies_in_log(), before + 1, "one line, not one per open");
    assert_eq!(rmmod("kvm_intel"), 0);
    wait_for_dune();
    assert!(dune_works(), "VMX is ours again");
    drop(kvm);
    assert!(dune_works());
}

pub fn kvm_is_kept_out_while_a_space_exists() {
    let _kvm = Kvm::prepare();
    let mut guest = RawGuest::new(HEALTHY);
    assert_ne!(insmod("kvm-intel"), 0, "kvm_intel took VMX away from a running process");
    assert!(!Path::new("/sys/module/kvm_intel").exists());
    assert!(matches!(guest.run(), Ended::Call(0x1234)), "the process goes on");
    drop(guest);
    assert_eq!(insmod("kvm-intel"), 0, "no process is left");
    assert_eq!(open_errno(), Some(libc::EBUSY));
    assert_eq!(rmmod("kvm_intel"), 0);
    wait_for_dune();
}

pub fn kvm_loaded_first_makes_open_busy() {
    let _kvm = Kvm::prepare();
    assert_eq!(helpers::unload_module().unwrap().status, 0);
    assert_eq!(insmod("kvm-intel"), 0);
    let loaded = helpers::load_module(&[]).unwrap();
    assert_eq!(loaded.status, 0, "{loaded:?}");
    assert_eq!(open_errno(), Some(libc::EBUSY));
    // And away again, beside KVM.
    assert_eq!(helpers::unload_module().unwrap().status, 0);
    let loaded = helpers::load_module(&[]).unwrap();
    assert_eq!(loaded.status, 0, "{loaded:?}");
    assert_eq!(rmmod("kvm_intel"), 0);
    wait_for_dune();
    assert!(dune_works());
}
