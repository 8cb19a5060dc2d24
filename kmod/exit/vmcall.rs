// SPDX-License-Identifier: GPL-2.0

//! VMCALL at CPL0: a Linux system call (design D4).

use crate::abi::RunPage;
use crate::arch::cr::rflags;
use crate::arch::vmcs_field::guest;
use crate::vmx::vmcs::CurrentVmcs;
use core::ptr::addr_of;

/// Bytes of VMCALL.
const VMCALL_LEN: u64 = 3;

/// Moves the guest behind its call: behind the VMCALL, or, where that one stands for a SYSCALL, to where SYSRET would go
/// (SDM, "SYSRET": RFLAGS := (R11 & 3C7FD7H) | 2). A RIP that is not canonical fails the next entry.
#[inline]
pub(crate) fn advance(vmcs: &mut CurrentVmcs<'_>, syscall_vmcall: u64, run: *mut RunPage) {
    const SYSRET_MASK: u64 = rflags::DEFINED & !(rflags::RF | rflags::VM);
    const _: () = assert!(SYSRET_MASK | 2 == 0x3c_7fd7 | 2);

    let rip = vmcs.read(guest::RIP);
    if rip == syscall_vmcall {
        // SAFETY: The run page is there; each field is read once.
        let (rcx, r11) = unsafe {
            (
                addr_of!((*run).gprs.rcx).read_volatile(),
                addr_of!((*run).gprs.r11).read_volatile(),
            )
        };
        vmcs.write(guest::RIP, rcx);
        vmcs.write(guest::RFLAGS, r11 & SYSRET_MASK | rflags::FIXED_1);
        // Nothing is blocked behind a SYSCALL. Where something was, a VMCALL came there otherwise; these flags would then
        // fail the next entry (SDM, "Checks on Guest Non-Register State").
        if r11 & (rflags::IF | rflags::TF) != rflags::IF {
            vmcs.write(guest::INTERRUPTIBILITY_STATE, 0);
        }
    } else {
        vmcs.write(guest::RIP, rip.wrapping_add(VMCALL_LEN));
        vmcs.write(guest::INTERRUPTIBILITY_STATE, 0);
    }
}
