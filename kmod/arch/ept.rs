// SPDX-License-Identifier: GPL-2.0

//! Entries of EPT paging structures and the EPT pointer (SDM, "The Extended Page Table Mechanism (EPT)").

use core::fmt;

use super::addr::Hpa;
use super::addr::Level;

/// Memory types as EPT and the PAT encode them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum MemType {
    Uc = 0,
    Wc = 1,
    Wt = 4,
    Wp = 5,
    Wb = 6,
}

impl MemType {
    /// The type of an encoding that EPT accepts; 2, 3 and 7 are none.
    pub const fn from_raw(raw: u64) -> Option<Self> {
        match raw {
            0 => Some(Self::Uc),
            1 => Some(Self::Wc),
            4 => Some(Self::Wt),
            5 => Some(Self::Wp),
            6 => Some(Self::Wb),
            _ => None,
        }
    }
}

/// What an EPT leaf allows. Reading is always among it: write-only is a misconfiguration and execute-only optional.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EptPerms {
    pub write: bool,
    pub execute: bool,
}

impl EptPerms {
    /// Read only.
    pub const READ: Self = Self {
        write: false,
        execute: false,
    };
    /// All.
    pub const ALL: Self = Self {
        write: true,
        execute: true,
    };
}

/// An entry of an EPT paging structure.
///
/// ```text
///  63 … 52  51 ………………… 12   9  8   7    6    5:3   2  1  0
/// | ignored | address      | D  A | leaf IPAT type | X  W  R |
/// ```
///
/// A, D, type and IPAT have their meaning in leaves (A in tables, too); a 4 KiB entry is a leaf whatever bit 7 says.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct EptEntry(u64);

impl EptEntry {
    /// Maps nothing.
    pub const EMPTY: Self = Self(0);

    pub const READ: u64 = 1 << 0;
    pub const WRITE: u64 = 1 << 1;
    pub const EXECUTE: u64 = 1 << 2;
    pub const MEM_TYPE_SHIFT: u32 = 3;
    pub const MEM_TYPE_MASK: u64 = 7 << Self::MEM_TYPE_SHIFT;
    pub const IGNORE_PAT: u64 = 1 << 6;
    pub const LEAF: u64 = 1 << 7;
    pub const ACCESSED: u64 = 1 << 8;
    pub const DIRTY: u64 = 1 << 9;
    /// Bits 51:12.
    pub const ADDRESS_MASK: u64 = 0x000f_ffff_ffff_f000;

    const RWX: u64 = Self::READ | Self::WRITE | Self::EXECUTE;

    /// An entry that points to a table; what the table's leaves allow decides.
    pub const fn table(table: Hpa) -> Self {
        Self((table.as_u64() & Self::ADDRESS_MASK) | Self::RWX)
    }

    /// An entry that maps a page of `level`.
    ///
    /// Bits of `page` below the page's size are dropped. RAM (`MemType::Wb`) ignores the guest's PAT: the guest may
    /// not choose a type that the host does not use for the same page. Other types do the same, for the same reason.
    pub const fn leaf(page: Hpa, level: Level, perms: EptPerms, mem_type: MemType) -> Self {
        let mut raw = page.align_down(level.bytes()).as_u64();
        raw |= Self::READ | Self::IGNORE_PAT | ((mem_type as u64) << Self::MEM_TYPE_SHIFT);
        if perms.write {
            raw |= Self::WRITE;
        }
        if perms.execute {
            raw |= Self::EXECUTE;
        }
        if !matches!(level, Level::Page4K) {
            raw |= Self::LEAF;
        }
        Self(raw)
    }

    /// The entry that is stored as `raw`.
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// What is stored in memory.
    pub const fn as_u64(self) -> u64 {
        self.0
    }

    /// Whether the CPU looks at the rest of the entry: any of R, W, X.
    pub const fn is_present(self) -> bool {
        self.0 & Self::RWX != 0
    }

    /// Whether this, in a table of `level`, maps a page.
    pub const fn is_leaf(self, level: Level) -> bool {
        self.is_present()
            && match level {
                Level::Page4K => true,
                Level::Page2M | Level::Page1G => self.0 & Self::LEAF != 0,
                Level::P512G => false,
            }
    }

    /// Whether this is what [`Self::table`] makes, in a table of a level above [`Level::Page4K`].
    #[inline(always)]
    pub const fn is_table(self) -> bool {
        self.0 & (Self::RWX | Self::LEAF) == Self::RWX
    }

    /// The page or the table.
    pub const fn hpa(self) -> Hpa {
        match Hpa::new(self.0 & Self::ADDRESS_MASK) {
            Some(hpa) => hpa,
            // The mask leaves nothing above bit 51.
            None => HPA_ZERO,
        }
    }

    /// What it allows; an execute-only entry, which we never make, counts as readable.
    pub const fn perms(self) -> EptPerms {
        EptPerms {
            write: self.is_writable(),
            execute: self.0 & Self::EXECUTE != 0,
        }
    }

    /// Memory type of a leaf; none where the encoding is a misconfiguration.
    pub const fn mem_type(self) -> Option<MemType> {
        MemType::from_raw((self.0 & Self::MEM_TYPE_MASK) >> Self::MEM_TYPE_SHIFT)
    }

    pub const fn is_writable(self) -> bool {
        self.0 & Self::WRITE != 0
    }

    /// The CPU used it since the bit was cleared; always false without EPT A/D.
    pub const fn is_accessed(self) -> bool {
        self.0 & Self::ACCESSED != 0
    }

    pub const fn is_dirty(self) -> bool {
        self.0 & Self::DIRTY != 0
    }

    /// The entry with its accessed bit clear. TLBs may hold the old one until INVEPT.
    #[must_use]
    pub const fn clear_accessed(self) -> Self {
        Self(self.0 & !Self::ACCESSED)
    }

    /// The entry without write permission. TLBs may hold the old one until INVEPT.
    #[must_use]
    pub const fn write_protect(self) -> Self {
        Self(self.0 & !Self::WRITE)
    }

    /// Whether everything that `other` allows at the same page is allowed here, so that `other` need not replace it.
    pub const fn covers(self, other: Self) -> bool {
        let fixed = Self::ADDRESS_MASK | Self::MEM_TYPE_MASK | Self::IGNORE_PAT | Self::LEAF;
        self.0 & fixed == other.0 & fixed && other.0 & Self::RWX & !self.0 == 0
    }
}

const HPA_ZERO: Hpa = match Hpa::new(0) {
    Some(hpa) => hpa,
    None => panic!(),
};

impl fmt::Debug for EptEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let flag = |bit, letter| if self.0 & bit != 0 { letter } else { '-' };
        write!(
            f,
            "EptEntry({:#x} {}{}{}{}{}{})",
            self.0 & Self::ADDRESS_MASK,
            flag(Self::READ, 'r'),
            flag(Self::WRITE, 'w'),
            flag(Self::EXECUTE, 'x'),
            flag(Self::LEAF, 'l'),
            flag(Self::ACCESSED, 'a'),
            flag(Self::DIRTY, 'd'),
        )
    }
}

/// The EPT pointer of a 4-level tree at `root`, with write-back paging structures.
///
/// `accessed_dirty` must be off where `EptCapabilities::accessed_dirty` is false, else the VM entry fails.
pub const fn eptp(root: Hpa, accessed_dirty: bool) -> u64 {
    const WALK_LENGTH_MINUS_1: u64 = 3;
    (root.as_u64() & EptEntry::ADDRESS_MASK)
        | MemType::Wb as u64
        | WALK_LENGTH_MINUS_1 << 3
        | (accessed_dirty as u64) << 6
}
