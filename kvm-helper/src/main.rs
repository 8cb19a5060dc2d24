// SPDX-License-Identifier: MIT OR Apache-2.0
//! Makes a virtual machine of KVM, gives it to dune.ko, ends.
//!
//! dune.ko starts this program, as root, when kvm_intel is in the kernel and the first process opens `/dev/dune`
//! (docs/architecture.md, "Who owns VMX"). The virtual machine has no memory and no CPU and never runs: as long as it exists
//! KVM keeps VMX on. Standard input is a file of the module that takes one ioctl. Started by hand it does nothing.
//!
//! Exit status: 0, or the number of the step that failed; the module's line in the log has it.

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::process::ExitCode;

/// `KVM_CREATE_VM` (linux/kvm.h).
const KVM_CREATE_VM: libc::Ioctl = 0xae01;

fn main() -> ExitCode {
    let Ok(kvm) = OpenOptions::new().read(true).write(true).open("/dev/kvm") else {
        return ExitCode::from(1);
    };
    // SAFETY: both calls take a number; what they return are numbers.
    unsafe {
        let vm = libc::ioctl(kvm.as_raw_fd(), KVM_CREATE_VM, 0);
        if vm < 0 {
            return ExitCode::from(2);
        }
        if libc::ioctl(libc::STDIN_FILENO, dune_abi::DUNE_KVM_LEND as libc::Ioctl, vm) != 0 {
            return ExitCode::from(3);
        }
    }
    ExitCode::SUCCESS
}
