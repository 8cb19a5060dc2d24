// SPDX-License-Identifier: GPL-2.0

//! Addresses of the four kinds, pages and levels of page tables.

use core::fmt;

/// log2 of the bytes of a 4 KiB page.
pub const PAGE_SHIFT: u32 = 12;
/// Bytes of a 4 KiB page.
pub const PAGE_BYTES: u64 = 1 << PAGE_SHIFT;
/// Bits of an address that are the offset in its 4 KiB page.
pub const PAGE_OFFSET_MASK: u64 = PAGE_BYTES - 1;
/// Bytes of a GPA slot.
pub const GIB_BYTES: u64 = 1 << 30;
/// Entries in a table of any level, of the host's, the guest's and EPT's.
pub const TABLE_ENTRIES: usize = 512;

/// A level of a page table, named by what one entry of it covers.
///
/// The numbers are Linux' and EPT's: 1 is the table whose entries are 4 KiB pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Level {
    Page4K = 1,
    Page2M = 2,
    Page1G = 3,
    P512G = 4,
}

impl Level {
    /// All levels from the root of a 4-level table down.
    pub const DOWN: [Self; 4] = [Self::P512G, Self::Page1G, Self::Page2M, Self::Page4K];

    /// log2 of the bytes that one entry covers.
    pub const fn shift(self) -> u32 {
        PAGE_SHIFT + 9 * (self as u32 - 1)
    }

    /// Bytes that one entry covers.
    pub const fn bytes(self) -> u64 {
        1 << self.shift()
    }

    /// Index of the entry for `address` in a table of this level, below [`TABLE_ENTRIES`].
    pub const fn index(self, address: u64) -> usize {
        (address >> self.shift()) as usize & (TABLE_ENTRIES - 1)
    }

    /// The level of the table that an entry of this level may point to; none below 4 KiB.
    pub const fn below(self) -> Option<Self> {
        match self {
            Self::Page4K => None,
            Self::Page2M => Some(Self::Page4K),
            Self::Page1G => Some(Self::Page2M),
            Self::P512G => Some(Self::Page1G),
        }
    }

    /// Whether the architecture lets an entry of this level be a page.
    pub const fn can_be_leaf(self) -> bool {
        !matches!(self, Self::P512G)
    }
}

macro_rules! address {
    ($(#[$doc:meta])* $name:ident, $valid:expr) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// None where `address` is not of this kind.
            pub const fn new(address: u64) -> Option<Self> {
                let valid: kind::Kind = $valid;
                if valid.holds(address) {
                    Some(Self(address))
                } else {
                    None
                }
            }

            /// The number.
            pub const fn as_u64(self) -> u64 {
                self.0
            }

            /// Bytes from the start of the 4 KiB page.
            pub const fn page_offset(self) -> u64 {
                self.0 & PAGE_OFFSET_MASK
            }

            /// Bytes from the start of the page of `level`.
            pub const fn offset_in(self, level: Level) -> u64 {
                self.0 & (level.bytes() - 1)
            }

            /// The nearest multiple of `bytes`, a power of two, at or below this address.
            pub const fn align_down(self, bytes: u64) -> Self {
                // An address of either half stays in its half: the result keeps all bits above `bytes`.
                Self(self.0 & !(bytes.wrapping_sub(1)))
            }

            /// Whether this is a multiple of `bytes`, a power of two.
            pub const fn is_aligned(self, bytes: u64) -> bool {
                self.0 & bytes.wrapping_sub(1) == 0
            }

            /// The address `bytes` further on; none where that is not of this kind.
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(address) => Self::new(address),
                    None => None,
                }
            }

            /// Number of the 4 KiB page.
            pub const fn page_number(self) -> u64 {
                self.0 >> PAGE_SHIFT
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }
    };
}

mod kind {
    /// What makes an address one of its kind.
    #[derive(Clone, Copy)]
    pub(super) enum Kind {
        /// Below `1 << bits`.
        Below(u32),
        /// Bits 63:47 all equal.
        Canonical,
    }

    impl Kind {
        pub(super) const fn holds(self, address: u64) -> bool {
            match self {
                Self::Below(bits) => address >> bits == 0,
                Self::Canonical => ((address << 16) as i64 >> 16) as u64 == address,
            }
        }
    }
}

address! {
    /// Guest-physical address: what EPT translates. Below 2^48, the reach of a 4-level EPT.
    Gpa, kind::Kind::Below(48)
}
address! {
    /// Host-virtual address of the process: user half of a 4-level page table, below 2^47.
    Hva, kind::Kind::Below(47)
}
address! {
    /// Host-physical address. Below 2^52, the most that an entry can hold.
    Hpa, kind::Kind::Below(52)
}
address! {
    /// Guest-virtual (linear) address: canonical for 4-level paging.
    Gva, kind::Kind::Canonical
}

impl Hpa {
    /// The address of a 4 KiB page by its number; none at 2^40 or above.
    pub const fn from_page_number(number: u64) -> Option<Self> {
        if number >> (52 - PAGE_SHIFT) == 0 {
            Some(Self(number << PAGE_SHIFT))
        } else {
            None
        }
    }
}
