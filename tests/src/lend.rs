// SPDX-License-Identifier: MIT OR Apache-2.0

//! `DUNE_KVM_LEND`, which only the module's helper program can call: here a helper of our own, which calls it with rubbish
//! first. And VMX that KVM took, where the helper lends nothing.

use std::fmt::Write;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::parent_id;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use kvm_ioctls::Kvm as KvmDevice;

use crate::framework::Need;
use crate::framework::Test;
use crate::framework::User;
use crate::fuzz::Random;
use crate::helpers;
use crate::kvm::Kvm;
use crate::raw::Device;
use crate::raw::Ended;
use crate::raw::Errno;
use crate::raw::RawGuest;
use crate::support::within;

pub const TESTS: &[Test] = &[
    Test::asserting("helper_may_lend_a_machine_of_kvm_only", helper_may_lend)
        .run_as(User::Root)
        .needs(&[KVM])
        .timeout_s(60),
    Test::asserting("vmx_that_kvm_took_away_is_told", vmx_taken_away)
        .run_as(User::Root)
        .needs(&[KVM, Need::OwnVmx])
        .timeout_s(60),
];

const KVM: Need = Need::Path("/lib/modules/kvm-intel.ko");

/// `mov eax, 0x1234; vmcall`.
const HEALTHY: &[u8] = &[0xb8, 0x34, 0x12, 0, 0, 0x0f, 0x01, 0xc1];

/// The helper, and what it leaves: a line for what was wrong, and one for each of its two processes.
const HELPER: &str = "/tmp/lending-helper";
const REPORT: &str = "/tmp/lending-report";

/// Numbers that are tried in place of a file.
const TRIES: usize = 1000;

/// The module, with another helper. A process that the last one left, which has a file of the module, may be about to end.
fn reload(helper: &[&str]) {
    let unload = || helpers::unload_module().unwrap().status == 0;
    assert!(within(Duration::from_secs(10), unload), "the module is in use");
    let loaded = helpers::load_module(helper).unwrap();
    assert_eq!(loaded.status, 0, "{loaded:?}");
}

fn helper_may_lend() {
    let kvm = Kvm::load();
    let program = std::env::current_exe().unwrap();
    fs::write(HELPER, format!("#!/bin/sh\nexec {} lend\n", program.display())).unwrap();
    fs::set_permissions(HELPER, fs::Permissions::from_mode(0o755)).unwrap();
    reload(&[&format!("kvm_helper={HELPER}")]);
    let report = || fs::read_to_string(REPORT).unwrap_or_default();
    let answer = RawGuest::try_new(HEALTHY).map(|mut guest| guest.run());
    let told = within(Duration::from_secs(10), || report().contains("behind its parent: "));
    let report = report();
    println!("{report}");
    assert_eq!(answer, Ok(Ended::Call(0x1234)), "with the machine that was lent");
    assert!(told, "no word of the child");
    assert!(!report.contains("wrong"), "{report}");
    assert!(
        report.contains(&format!("{TRIES} numbers: ")),
        "the helper came to its end"
    );
    reload(&[]);
    drop(kvm);
    for file in [HELPER, REPORT] {
        fs::remove_file(file).unwrap();
    }
}

/// What an errno should have been, if it is not.
fn judge(report: &mut String, what: &str, answer: Result<i32, Errno>, expected: i32) {
    if answer != Err(Errno(expected)) {
        writeln!(report, "wrong: {what}: {answer:?}").expect("a string");
    }
}

/// The helper itself: its standard input is the module's file.
pub fn help() -> ExitCode {
    // Not to be closed: who started this program looks at nothing but its end.
    let module = std::mem::ManuallyDrop::new(Device { fd: 0 });
    let lend = |fd: u64| module.call(dune_abi::DUNE_KVM_LEND, fd as usize);
    let mut report = String::new();
    let mut random = Random::new(crate::fuzz::setting("DUNE_FUZZ_SEED", 1));
    let mut open = 0;
    for _ in 0..TRIES {
        let fd = if random.percent(10) {
            random.below(4)
        } else {
            random.odd()
        };
        // SAFETY: asks whether the number, of which 32 bits count, is a file's.
        let is_open = unsafe { libc::fcntl(fd as i32, libc::F_GETFD) } >= 0;
        open += usize::from(is_open);
        let expected = if is_open { libc::EINVAL } else { libc::EBADF };
        judge(&mut report, &format!("file {fd:#x}"), lend(fd), expected);
    }
    for request in [
        dune_abi::DUNE_GET_INFO,
        dune_abi::DUNE_NEW_SPACE,
        dune_abi::DUNE_FLUSH,
        random.next() as u32,
    ] {
        let answer = module.call(request, random.odd() as usize);
        judge(&mut report, &format!("request {request:#x}"), answer, libc::ENOTTY);
    }
    writeln!(report, "{TRIES} numbers: {open} of open files").expect("a string");
    let Ok(vm) = KvmDevice::new().and_then(|kvm| kvm.create_vm()) else {
        return ExitCode::from(2);
    };
    let vm = vm.as_raw_fd() as u64;
    if let Err(errno) = lend(vm) {
        writeln!(report, "wrong: a machine of KVM: {errno:?}").expect("a string");
    }
    judge(&mut report, "a second machine", lend(vm), libc::EBUSY);
    let parent = std::process::id();
    // SAFETY: the child makes calls, writes a file and ends.
    if unsafe { libc::fork() } != 0 {
        return ExitCode::SUCCESS;
    }
    // Its parent ends, and the module goes on.
    while parent_id() == parent {
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(Duration::from_millis(20));
    judge(&mut report, "a machine that nobody waits for", lend(vm), libc::EBUSY);
    report.push_str("behind its parent: done\n");
    ExitCode::from(u8::from(fs::write(REPORT, report).is_err()))
}

/// RUN and SYNC say so, and go on when KVM is gone.
fn vmx_taken_away() {
    reload(&["kvm_helper=/bin/false"]);
    let mut guest = RawGuest::new(HEALTHY);
    assert_eq!(guest.run(), Ended::Call(0x1234));
    let kvm = Kvm::load();
    guest.reset();
    for _ in 0..3 {
        assert_eq!(guest.try_run(), Err(Errno(libc::ENODEV)));
        let synced = guest.device.call(dune_abi::DUNE_SYNC, guest.vcpu);
        assert_eq!(synced, Err(Errno(libc::ENODEV)));
    }
    // VMX is the module's again, and takes over what it was asked meanwhile.
    drop(kvm);
    assert!(!Path::new("/sys/module/kvm_intel").exists());
    assert_ne!(guest.run_page().dirty, 0);
    assert_eq!(guest.run(), Ended::Call(0x1234));
    guest.sync();
    assert_eq!(guest.run_page().rip, guest.code() + HEALTHY.len() as u64);
    drop(guest);
    reload(&[]);
}
