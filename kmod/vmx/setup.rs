// SPDX-License-Identifier: GPL-2.0

//! What is written into a VMCS once: controls, MSR bitmap, guest state that is not the guest's. The policy table is
//! docs/guest-policy.md; the words themselves are negotiated in `arch::controls`.

use super::host_state::HostState;
use super::vmcs::CurrentVmcs;
use crate::arch::controls::exception;
use crate::arch::controls::VmxCapabilities;
use crate::arch::msr;
use crate::arch::vmcs_field::control;
use crate::arch::vmcs_field::guest;
use crate::sys::cpu;
use crate::sys::mem::Page;
use kernel::prelude::*;

/// The MSR bitmap that all guests share: every access exits but to the bases of FS and GS.
pub(crate) struct MsrBitmap(Page);

impl MsrBitmap {
    /// ENOMEM.
    pub(crate) fn new() -> Result<Self> {
        const READ_HIGH: usize = 1024;
        const WRITE_HIGH: usize = 3072;
        const HIGH_BASE: u32 = 0xc000_0000;
        let page = Page::new()?;
        // SAFETY: The page is ours, 4096 bytes.
        let bytes = unsafe { core::slice::from_raw_parts_mut(page.as_ptr(), 4096) };
        bytes.fill(0xff);
        for number in [msr::IA32_FS_BASE, msr::IA32_GS_BASE] {
            let index = (number - HIGH_BASE) as usize;
            bytes[READ_HIGH + index / 8] &= !(1 << (index % 8));
            bytes[WRITE_HIGH + index / 8] &= !(1 << (index % 8));
        }
        Ok(Self(page))
    }

    pub(crate) fn hpa(&self) -> u64 {
        self.0.hpa()
    }
}

/// Writes all that stays as it is for the life of the VMCS.
pub(crate) fn write(
    vmcs: &mut CurrentVmcs<'_>,
    capabilities: &VmxCapabilities,
    msr_bitmap_hpa: u64,
    eptp: u64,
    vpid: u16,
    exit_rip: u64,
) {
    vmcs.write(control::PIN_BASED, capabilities.pin.into());
    vmcs.write(control::PRIMARY, capabilities.primary.into());
    let mut secondary = capabilities.secondary;
    if vpid == 0 {
        secondary &= !crate::arch::controls::secondary::ENABLE_VPID;
    } else {
        vmcs.write(control::VPID, vpid.into());
    }
    vmcs.write(control::SECONDARY, secondary.into());
    vmcs.write(control::EXIT, capabilities.exit.into());
    vmcs.write(control::ENTRY, capabilities.entry.into());
    let exceptions = exception::ALWAYS | if cpu::has_xfd() { exception::NM } else { 0 };
    vmcs.write(control::EXCEPTION_BITMAP, exceptions.into());
    vmcs.write(control::PAGE_FAULT_ERROR_CODE_MASK, 0);
    vmcs.write(control::PAGE_FAULT_ERROR_CODE_MATCH, 0);
    vmcs.write(control::CR3_TARGET_COUNT, 0);
    vmcs.write(control::EXIT_MSR_STORE_COUNT, 0);
    vmcs.write(control::EXIT_MSR_LOAD_COUNT, 0);
    vmcs.write(control::ENTRY_MSR_LOAD_COUNT, 0);
    vmcs.write(control::ENTRY_INTERRUPTION_INFO, 0);
    vmcs.write(control::MSR_BITMAP, msr_bitmap_hpa);
    vmcs.write(control::EPT_POINTER, eptp);
    if capabilities.has_encls_exiting() {
        vmcs.write(control::ENCLS_EXITING_BITMAP, !0);
    }

    vmcs.write(guest::VMCS_LINK_POINTER, !0);
    vmcs.write(guest::DR7, 0x400);
    vmcs.write(guest::DEBUGCTL, 0);
    vmcs.write(guest::SYSENTER_CS, 0);
    vmcs.write(guest::SYSENTER_ESP, 0);
    vmcs.write(guest::SYSENTER_EIP, 0);

    HostState::write_constant(vmcs, exit_rip);
}
