// SPDX-License-Identifier: GPL-2.0

//! Numbers of model-specific registers (SDM volume 4) that VMX work meets.

#![allow(missing_docs)] // Each name is the SDM's.

pub const IA32_TSC: u32 = 0x10;
pub const IA32_FEATURE_CONTROL: u32 = 0x3a;
pub const IA32_SPEC_CTRL: u32 = 0x48;
pub const IA32_PRED_CMD: u32 = 0x49;
pub const IA32_ARCH_CAPABILITIES: u32 = 0x10a;
pub const IA32_FLUSH_CMD: u32 = 0x10b;
pub const IA32_SYSENTER_CS: u32 = 0x174;
pub const IA32_SYSENTER_ESP: u32 = 0x175;
pub const IA32_SYSENTER_EIP: u32 = 0x176;
pub const IA32_XFD: u32 = 0x1c4;
pub const IA32_DEBUGCTL: u32 = 0x1d9;
pub const IA32_PAT: u32 = 0x277;
pub const IA32_PERF_GLOBAL_CTRL: u32 = 0x38f;
pub const IA32_PEBS_ENABLE: u32 = 0x3f1;

pub const IA32_VMX_BASIC: u32 = 0x480;
pub const IA32_VMX_PINBASED_CTLS: u32 = 0x481;
pub const IA32_VMX_PROCBASED_CTLS: u32 = 0x482;
pub const IA32_VMX_EXIT_CTLS: u32 = 0x483;
pub const IA32_VMX_ENTRY_CTLS: u32 = 0x484;
pub const IA32_VMX_MISC: u32 = 0x485;
pub const IA32_VMX_CR0_FIXED0: u32 = 0x486;
pub const IA32_VMX_CR0_FIXED1: u32 = 0x487;
pub const IA32_VMX_CR4_FIXED0: u32 = 0x488;
pub const IA32_VMX_CR4_FIXED1: u32 = 0x489;
pub const IA32_VMX_VMCS_ENUM: u32 = 0x48a;
pub const IA32_VMX_PROCBASED_CTLS2: u32 = 0x48b;
pub const IA32_VMX_EPT_VPID_CAP: u32 = 0x48c;
pub const IA32_VMX_TRUE_PINBASED_CTLS: u32 = 0x48d;
pub const IA32_VMX_TRUE_PROCBASED_CTLS: u32 = 0x48e;
pub const IA32_VMX_TRUE_EXIT_CTLS: u32 = 0x48f;
pub const IA32_VMX_TRUE_ENTRY_CTLS: u32 = 0x490;
pub const IA32_VMX_VMFUNC: u32 = 0x491;
pub const IA32_VMX_PROCBASED_CTLS3: u32 = 0x492;
pub const IA32_VMX_EXIT_CTLS2: u32 = 0x493;

pub const IA32_RTIT_CTL: u32 = 0x570;
pub const IA32_U_CET: u32 = 0x6a0;
pub const IA32_S_CET: u32 = 0x6a2;
pub const IA32_PKRS: u32 = 0x6e1;
pub const IA32_PASID: u32 = 0xd93;
pub const IA32_BNDCFGS: u32 = 0xd90;
pub const IA32_XSS: u32 = 0xda0;

pub const IA32_EFER: u32 = 0xc000_0080;
pub const IA32_STAR: u32 = 0xc000_0081;
pub const IA32_LSTAR: u32 = 0xc000_0082;
pub const IA32_CSTAR: u32 = 0xc000_0083;
pub const IA32_FMASK: u32 = 0xc000_0084;
pub const IA32_FS_BASE: u32 = 0xc000_0100;
pub const IA32_GS_BASE: u32 = 0xc000_0101;
pub const IA32_KERNEL_GS_BASE: u32 = 0xc000_0102;
pub const IA32_TSC_AUX: u32 = 0xc000_0103;

/// Bits of IA32_EFER.
pub mod efer {
    /// SYSCALL enabled.
    pub const SCE: u64 = 1 << 0;
    /// IA-32e mode enabled.
    pub const LME: u64 = 1 << 8;
    /// IA-32e mode active.
    pub const LMA: u64 = 1 << 10;
    /// Execute-disable enabled.
    pub const NXE: u64 = 1 << 11;
}

/// Bytes of an MSR bitmap.
pub const BITMAP_BYTES: usize = 4096;

/// Where in an MSR bitmap the bit is that makes RDMSR (`write` false) or WRMSR of `number` exit: byte and mask.
///
/// None for an MSR outside both ranges of the bitmap: those always exit.
pub const fn bitmap_bit(number: u32, write: bool) -> Option<(usize, u8)> {
    let range = match number {
        0..=0x1fff => 0,
        0xc000_0000..=0xc000_1fff => 0x400,
        _ => return None,
    };
    let index = (number & 0x1fff) as usize;
    let half = if write { 0x800 } else { 0 };
    Some((half + range + index / 8, 1 << (index % 8)))
}
