// SPDX-License-Identifier: GPL-2.0

//! What this machine's CPUs can do, read once and checked on every CPU that comes up.

use crate::arch::controls::Missing;
use crate::arch::controls::RawMsrs;
use crate::arch::controls::VmxCapabilities;
use crate::sys::regs;

/// Reads and negotiates on this CPU. The caller must stay on it.
pub(crate) fn read() -> Result<VmxCapabilities, Missing> {
    let [_, _, ecx, _] = regs::cpuid(1, 0);
    VmxCapabilities::from_msrs(&RawMsrs::read(ecx, |msr| regs::read_msr(msr).ok())?)
}

/// Width of a host-physical address in bits (CPUID.80000008H:EAX).
pub(crate) fn max_physical_bits() -> u32 {
    match regs::cpuid(0x8000_0000, 0)[0] {
        0x8000_0008.. => regs::cpuid(0x8000_0008, 0)[0] & 0xff,
        _ => 36,
    }
}

/// Whether page tables may have 1 GiB leaves (CPUID.80000001H:EDX.Page1GB).
pub(crate) fn has_1g_pages() -> bool {
    regs::cpuid(0x8000_0001, 0)[3] & (1 << 26) != 0
}

/// Whether this is a guest of Hyper-V whose KVM has *enlightened* VMCSs: in memory of their own layout, so that VMPTRLD and
/// VMPTRST mean nothing there (Hyper-V TLFS, "Enlightened VMCS").
pub(crate) fn has_enlightened_vmcs() -> bool {
    const HYPERVISOR: u32 = 1 << 31;
    const RECOMMENDED: u32 = 1 << 14;
    if regs::cpuid(1, 0)[2] & HYPERVISOR == 0 {
        return false;
    }
    let [max, b, c, d] = regs::cpuid(0x4000_0000, 0);
    let signature = [b, c, d].map(u32::to_le_bytes);
    signature.as_flattened() == b"Microsoft Hv"
        && max >= 0x4000_0004
        && regs::cpuid(0x4000_0004, 0)[0] & RECOMMENDED != 0
}
