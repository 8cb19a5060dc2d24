// SPDX-License-Identifier: GPL-2.0

//! Guest state between the run page and the VMCS.
//!
//! All of it is user space's choice. What the CPU checks on VM entry (SDM, "Checks on the Guest State Area") is left to
//! the CPU; checked here is what it would accept and what would reach beyond this guest.

use super::vmcs::CurrentVmcs;
use crate::abi::Segment;
use crate::abi::Sregs;
use crate::arch::addr::Gva;
use crate::arch::controls::VmxCapabilities;
use crate::arch::cr::cr4;
use crate::arch::cr::CR0_GUEST_OWNED;
use crate::arch::cr::CR4_GUEST_WHITELIST;
use crate::arch::vmcs_field::control;
use crate::arch::vmcs_field::guest;
use crate::sys::regs;
use kernel::prelude::*;

/// CR4 bits that a guest may have set: those it owns, and those it must have as the host has them.
#[derive(Clone, Copy)]
pub(crate) struct Cr4Policy {
    /// Changed by the guest without an exit.
    pub(crate) owned: u64,
    /// Also allowed in `Sregs::cr4`.
    allowed: u64,
    /// Set in any case, and hidden from the guest where it did not set them: VMXE, and MCE, without which a machine check
    /// would shut the CPU down.
    forced: u64,
}

impl Cr4Policy {
    pub(crate) fn new(capabilities: &VmxCapabilities) -> Self {
        let host = regs::cr4();
        let mut owned = CR4_GUEST_WHITELIST & capabilities.cr4_fixed1;
        // Without PKE Linux does not switch PKRU between threads.
        if host & cr4::PKE == 0 {
            owned &= !cr4::PKE;
        }
        let as_host = host & (cr4::PAE | cr4::PSE | cr4::MCE | cr4::OSXSAVE);
        Self {
            owned,
            allowed: owned | as_host,
            forced: cr4::VMXE | (host & cr4::MCE) | capabilities.cr4_fixed0,
        }
    }

    /// CR4 with which a vCPU starts: the host's, without what protects a kernel from user mode.
    pub(crate) fn initial(&self) -> u64 {
        regs::cr4() & self.allowed & !(cr4::SMEP | cr4::SMAP | cr4::PCIDE | cr4::TSD | cr4::UMIP | cr4::PKE)
    }
}

/// Checks what the CPU would not. EINVAL.
pub(crate) fn check(sregs: &Sregs, policy: &Cr4Policy) -> Result {
    // The module writes these itself: a bad value would fault in the host.
    if Gva::new(sregs.lstar).is_none() || sregs.cr4 & !policy.allowed != 0 {
        return Err(EINVAL);
    }
    Ok(())
}

macro_rules! for_each_segment {
    ($macro:ident) => {
        $macro!(es, ES_SELECTOR, ES_BASE, ES_LIMIT, ES_ACCESS_RIGHTS);
        $macro!(cs, CS_SELECTOR, CS_BASE, CS_LIMIT, CS_ACCESS_RIGHTS);
        $macro!(ss, SS_SELECTOR, SS_BASE, SS_LIMIT, SS_ACCESS_RIGHTS);
        $macro!(ds, DS_SELECTOR, DS_BASE, DS_LIMIT, DS_ACCESS_RIGHTS);
        $macro!(fs, FS_SELECTOR, FS_BASE, FS_LIMIT, FS_ACCESS_RIGHTS);
        $macro!(gs, GS_SELECTOR, GS_BASE, GS_LIMIT, GS_ACCESS_RIGHTS);
        $macro!(ldtr, LDTR_SELECTOR, LDTR_BASE, LDTR_LIMIT, LDTR_ACCESS_RIGHTS);
        $macro!(tr, TR_SELECTOR, TR_BASE, TR_LIMIT, TR_ACCESS_RIGHTS);
    };
}

/// Writes `sregs`, which passed [`check`].
pub(crate) fn write(vmcs: &mut CurrentVmcs<'_>, sregs: &Sregs, policy: &Cr4Policy) {
    vmcs.write(guest::CR0, sregs.cr0);
    vmcs.write(control::CR0_READ_SHADOW, sregs.cr0);
    vmcs.write(control::CR0_GUEST_HOST_MASK, !CR0_GUEST_OWNED);
    vmcs.write(guest::CR3, sregs.cr3);
    vmcs.write(guest::CR4, sregs.cr4 | policy.forced);
    vmcs.write(control::CR4_READ_SHADOW, sregs.cr4);
    vmcs.write(control::CR4_GUEST_HOST_MASK, !policy.owned);
    vmcs.write(guest::EFER, sregs.efer);
    macro_rules! write_segment {
        ($name:ident, $selector:ident, $base:ident, $limit:ident, $rights:ident) => {
            vmcs.write(guest::$selector, sregs.$name.selector.into());
            vmcs.write(guest::$base, sregs.$name.base);
            vmcs.write(guest::$limit, sregs.$name.limit.into());
            vmcs.write(guest::$rights, sregs.$name.access_rights.into());
        };
    }
    for_each_segment!(write_segment);
    vmcs.write(guest::GDTR_BASE, sregs.gdtr_base);
    vmcs.write(guest::GDTR_LIMIT, sregs.gdtr_limit.into());
    vmcs.write(guest::IDTR_BASE, sregs.idtr_base);
    vmcs.write(guest::IDTR_LIMIT, sregs.idtr_limit.into());
    // A new state starts without what the old one was in the middle of.
    vmcs.write(guest::INTERRUPTIBILITY_STATE, 0);
    vmcs.write(guest::PENDING_DEBUG_EXCEPTIONS, 0);
    vmcs.write(guest::ACTIVITY_STATE, 0);
}

/// Reads the state back; `lstar` and `syscall_vmcall` are the vCPU's and stay as in `sregs`.
pub(crate) fn read(vmcs: &mut CurrentVmcs<'_>, sregs: &mut Sregs) {
    let owned_cr0 = vmcs.read(guest::CR0) & CR0_GUEST_OWNED;
    sregs.cr0 = vmcs.read(control::CR0_READ_SHADOW) & !CR0_GUEST_OWNED | owned_cr0;
    sregs.cr3 = vmcs.read(guest::CR3);
    let mask = vmcs.read(control::CR4_GUEST_HOST_MASK);
    let owned_cr4 = vmcs.read(guest::CR4) & !mask;
    sregs.cr4 = vmcs.read(control::CR4_READ_SHADOW) & mask | owned_cr4;
    sregs.efer = vmcs.read(guest::EFER);
    macro_rules! read_segment {
        ($name:ident, $selector:ident, $base:ident, $limit:ident, $rights:ident) => {
            sregs.$name = Segment {
                selector: vmcs.read(guest::$selector) as u16,
                base: vmcs.read(guest::$base),
                limit: vmcs.read(guest::$limit) as u32,
                access_rights: vmcs.read(guest::$rights) as u32,
                reserved: [0; 3],
            };
        };
    }
    for_each_segment!(read_segment);
    sregs.gdtr_base = vmcs.read(guest::GDTR_BASE);
    sregs.gdtr_limit = vmcs.read(guest::GDTR_LIMIT) as u32;
    sregs.idtr_base = vmcs.read(guest::IDTR_BASE);
    sregs.idtr_limit = vmcs.read(guest::IDTR_LIMIT) as u32;
}
