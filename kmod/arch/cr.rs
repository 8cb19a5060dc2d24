// SPDX-License-Identifier: GPL-2.0

//! Bits of control registers and RFLAGS, and who owns them.

/// CR0.
#[allow(missing_docs)] // Each name is the SDM's.
pub mod cr0 {
    pub const PE: u64 = 1 << 0;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
}

/// CR4.
#[allow(missing_docs)] // Each name is the SDM's.
pub mod cr4 {
    pub const VME: u64 = 1 << 0;
    pub const PVI: u64 = 1 << 1;
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const LA57: u64 = 1 << 12;
    pub const VMXE: u64 = 1 << 13;
    pub const SMXE: u64 = 1 << 14;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const KL: u64 = 1 << 19;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
    pub const PKE: u64 = 1 << 22;
    pub const CET: u64 = 1 << 23;
    pub const PKS: u64 = 1 << 24;
    pub const UINTR: u64 = 1 << 25;
    pub const LASS: u64 = 1 << 27;
    pub const LAM_SUP: u64 = 1 << 28;
    pub const FRED: u64 = 1 << 32;
}

/// RFLAGS.
#[allow(missing_docs)] // Each name is the SDM's.
pub mod rflags {
    pub const CF: u64 = 1 << 0;
    /// Reads as 1.
    pub const FIXED_1: u64 = 1 << 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// Bits that exist; a VM entry with another one set fails.
    pub const DEFINED: u64 =
        CF | FIXED_1 | PF | AF | ZF | SF | TF | IF | DF | OF | IOPL | NT | RF | VM | AC | VIF | VIP | ID;
}

/// CR0 bits that the guest changes without an exit: WP for its own page tables, TS for lazy FPU schemes.
///
/// AM stays the host's: with it the guest could turn its own alignment checks on, but #AC is intercepted anyway, and
/// nobody has asked for it. MP, EM and NE belong to the thread's FPU state, which is the host's thread's.
pub const CR0_GUEST_OWNED: u64 = cr0::TS | cr0::WP;

/// CR4 bits that the guest may own; of these, those that the host has on (or that are harmless) in fact.
///
/// Whatever is not here stays as the host set it: VMXE, OSXSAVE (XCR0 is the host's), MCE, LA57, CET, FRED ….
pub const CR4_GUEST_WHITELIST: u64 = cr4::TSD
    | cr4::DE
    | cr4::PGE
    | cr4::PCE
    | cr4::OSFXSR
    | cr4::OSXMMEXCPT
    | cr4::FSGSBASE
    | cr4::UMIP
    | cr4::SMEP
    | cr4::SMAP
    | cr4::PCIDE
    | cr4::PKE;
