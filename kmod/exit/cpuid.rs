// SPDX-License-Identifier: GPL-2.0

//! CPUID: the host's values, without what the guest cannot use; XSETBV: only the host's value.

use super::skip;
use super::skip_at_once;
use super::ExitInfo;
use super::Flow;
use crate::abi;
use crate::arch::exit::vector;
use crate::sys::regs;
use crate::vcpu::Vcpu;
use crate::vmx::vmcs::CurrentVmcs;

/// Leaf by which code can tell that it is in Dune mode: EAX is the highest leaf, the signature follows.
const HYPERVISOR_LEAF: u32 = 0x4000_0000;
/// EAX: [`abi::ABI_VERSION`].
const HYPERVISOR_VERSION_LEAF: u32 = 0x4000_0001;
/// "DuneDuneDune" in EBX, ECX, EDX.
const SIGNATURE: u32 = u32::from_le_bytes(*b"Dune");

/// Answers it in the window of the exit. The thread must not be one in which CPUID faults.
#[inline(always)]
pub(super) fn settle(vcpu: &Vcpu, vmcs: &mut CurrentVmcs<'_>) {
    execute(vcpu);
    skip_at_once(vmcs);
}

/// What was not settled there.
pub(super) fn handle(vcpu: &mut Vcpu, info: &ExitInfo) -> Flow {
    // arch_prctl(ARCH_SET_CPUID, 0): a fault, at CPL0 too.
    if vcpu.owner.cpuid_faults() {
        vcpu.inject_exception(vector::GP, Some(0));
        return Flow::Resume;
    }
    execute(vcpu);
    skip(vcpu, info)
}

/// Has the answer in the guest's registers.
#[inline(always)]
fn execute(vcpu: &Vcpu) {
    let (leaf, subleaf) = vcpu.cpuid_operands();
    vcpu.set_cpuid_answer(answer(leaf, subleaf));
}

fn answer(leaf: u32, subleaf: u32) -> [u32; 4] {
    if (HYPERVISOR_LEAF..=0x4fff_ffff).contains(&leaf) {
        return match leaf {
            HYPERVISOR_LEAF => [HYPERVISOR_VERSION_LEAF, SIGNATURE, SIGNATURE, SIGNATURE],
            HYPERVISOR_VERSION_LEAF => [abi::ABI_VERSION, 0, 0, 0],
            _ => [0; 4],
        };
    }
    let [mut a, mut b, mut c, mut d] = regs::cpuid(leaf, subleaf);
    match (leaf, subleaf) {
        (1, _) => {
            // MONITOR, VMX, SMX; the hypervisor bit is set.
            c &= !(1 << 3 | 1 << 5 | 1 << 6);
            c |= 1 << 31;
        }
        (7, 0) => {
            // SGX.
            b &= !(1 << 2);
            // WAITPKG, SHSTK, ENQCMD, SGX_LC, PKS.
            c &= !(1 << 5 | 1 << 7 | 1 << 29 | 1 << 30 | 1 << 31);
            // UINTR, PCONFIG, IBT.
            d &= !(1 << 5 | 1 << 18 | 1 << 20);
        }
        // FRED, LAM.
        (7, 1) => a &= !(1 << 17 | 1 << 26),
        // Performance counters: RDPMC is refused.
        (0xa, _) => [a, b, c, d] = [0; 4],
        // XSAVES and XRSTORS.
        (0xd, 1) => a &= !(1 << 3),
        // SGX.
        (0x12, _) => [a, b, c, d] = [0; 4],
        _ => {}
    }
    [a, b, c, d]
}

/// XCR0 is the thread's and Linux': only what it is already may be written.
pub(super) fn handle_xsetbv(vcpu: &mut Vcpu, info: &ExitInfo) -> Flow {
    let gprs = vcpu.gprs();
    let value = gprs.rdx << 32 | gprs.rax & 0xffff_ffff;
    if info.cpl == 0 && gprs.rcx as u32 == 0 && value == regs::xcr0() {
        return skip(vcpu, info);
    }
    vcpu.inject_exception(vector::GP, Some(0));
    Flow::Resume
}
