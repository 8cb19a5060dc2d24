// SPDX-License-Identifier: GPL-2.0

//! Segment access rights as the VMCS holds them (SDM, "Guest Register State").

/// Bits of access rights.
pub mod rights {
    /// Accessed.
    pub const ACCESSED: u32 = 1 << 0;
    /// Data: writable; code: readable.
    pub const READ_WRITE: u32 = 1 << 1;
    /// Code, not data.
    pub const CODE: u32 = 1 << 3;
    /// Code or data, not a system segment.
    pub const NOT_SYSTEM: u32 = 1 << 4;
    pub const DPL_SHIFT: u32 = 5;
    pub const PRESENT: u32 = 1 << 7;
    /// 64-bit code.
    pub const LONG: u32 = 1 << 13;
    /// 32-bit default operand size (code) or stack (SS).
    pub const DEFAULT_BIG: u32 = 1 << 14;
    /// Limit counts 4 KiB units.
    pub const GRANULARITY: u32 = 1 << 15;
    /// The register holds no segment.
    pub const UNUSABLE: u32 = 1 << 16;
}

/// Access rights of a register that holds no segment.
pub const UNUSABLE: u32 = rights::UNUSABLE;
/// A busy 64-bit TSS: the only thing that TR may hold in a 64-bit guest.
pub const TSS_64_BUSY: u32 = 0x8b;
/// An LDT.
pub const LDT: u32 = 0x82;
/// Limit of a flat segment with 4 KiB granularity.
pub const FLAT_LIMIT: u32 = u32::MAX;

/// 64-bit code at privilege level `dpl` (0 … 3): execute, read, accessed.
pub const fn code_64(dpl: u32) -> u32 {
    rights::GRANULARITY
        | rights::LONG
        | rights::PRESENT
        | (dpl & 3) << rights::DPL_SHIFT
        | rights::NOT_SYSTEM
        | rights::CODE
        | rights::READ_WRITE
        | rights::ACCESSED
}

/// A flat data or stack segment at privilege level `dpl` (0 … 3): read, write, accessed.
pub const fn data(dpl: u32) -> u32 {
    rights::GRANULARITY
        | rights::DEFAULT_BIG
        | rights::PRESENT
        | (dpl & 3) << rights::DPL_SHIFT
        | rights::NOT_SYSTEM
        | rights::READ_WRITE
        | rights::ACCESSED
}

/// 64-bit code at CPL0.
pub const CODE_64_DPL0: u32 = code_64(0);
/// 64-bit code at CPL3.
pub const CODE_64_DPL3: u32 = code_64(3);
/// Data or stack at CPL0.
pub const DATA_DPL0: u32 = data(0);
/// Data or stack at CPL3.
pub const DATA_DPL3: u32 = data(3);

/// Privilege level of a segment; of SS it is the CPL.
pub const fn dpl(access_rights: u32) -> u32 {
    access_rights >> rights::DPL_SHIFT & 3
}
