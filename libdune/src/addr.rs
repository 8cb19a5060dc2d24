// SPDX-License-Identifier: MIT OR Apache-2.0

//! Addresses that cannot hold a bad value, one type per address space.

use core::fmt;

/// Bytes in the smallest page.
pub const PAGE_BYTES: u64 = dune_abi::PAGE_BYTES as u64;

/// First address behind the part of the address space that Linux gives to user space.
pub(crate) const USER_END: u64 = 1 << 47;
/// First address of the upper half.
pub(crate) const UPPER_HALF: u64 = !(USER_END - 1);

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// The address as a number.
            pub const fn as_u64(self) -> u64 {
                self.0
            }

            /// The address rounded down to a multiple of `bytes`, which must be a power of two.
            #[must_use]
            pub const fn align_down(self, bytes: u64) -> Self {
                Self(self.0 & !(bytes - 1))
            }

            /// Whether the address is a multiple of `bytes`, which must be a power of two.
            pub const fn is_aligned(self, bytes: u64) -> bool {
                self.0 & (bytes - 1) == 0
            }

            /// The address `bytes` further on, if there is one.
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(sum) => Self::new(sum),
                    None => None,
                }
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address! {
    /// Guest-virtual address; canonical.
    ///
    /// # Examples
    ///
    /// ```
    /// use libdune::Gva;
    ///
    /// let gva = Gva::new(0x7fff_1234_5678).ok_or("not canonical")?;
    /// assert_eq!(gva.align_down(4096).as_u64(), 0x7fff_1234_5000);
    /// assert_eq!(Gva::new(0x8000_0000_0000), None);
    ///
    /// let word = 1u64;
    /// assert_eq!(Gva::of(&word).map(Gva::as_u64), Some(&raw const word as u64));
    /// # Ok::<(), &str>(())
    /// ```
    Gva
}
address! {
    /// Guest-physical address; below 2^48.
    ///
    /// # Examples
    ///
    /// ```
    /// assert_eq!(libdune::Gpa::new(1 << 48), None);
    /// ```
    Gpa
}
address! {
    /// Host-virtual address of this process; below 2^47.
    ///
    /// # Examples
    ///
    /// ```
    /// use libdune::{Gva, Hva};
    ///
    /// assert_eq!(Hva::new(1 << 47), None);
    /// // Where the default page table maps an address to.
    /// assert_eq!(Gva::new(0x1000).and_then(Gva::identity), Hva::new(0x1000));
    /// ```
    Hva
}

impl Gva {
    /// The address, if it is canonical (bits 63:47 alike).
    pub const fn new(address: u64) -> Option<Self> {
        let high = address >> 47;
        if high == 0 || high == 0x1_ffff {
            Some(Self(address))
        } else {
            None
        }
    }

    /// The address of a byte of this program.
    pub fn of<T: ?Sized>(pointer: *const T) -> Option<Self> {
        Self::new(pointer.cast::<u8>() as u64)
    }

    /// The HVA of the same number: what the default page table maps it to.
    pub const fn identity(self) -> Option<Hva> {
        Hva::new(self.0)
    }

    /// The next canonical address: behind the last of the lower half that is the first of the upper one.
    ///
    /// # Examples
    ///
    /// ```
    /// use libdune::Gva;
    ///
    /// let next = |address| Gva::new(address).and_then(Gva::successor).map(Gva::as_u64);
    /// assert_eq!(next(0xfff), Some(0x1000));
    /// assert_eq!(next(0x7fff_ffff_ffff), Some(0xffff_8000_0000_0000));
    /// assert_eq!(next(u64::MAX), None);
    /// ```
    pub const fn successor(self) -> Option<Self> {
        match self.0.checked_add(1) {
            Some(USER_END) => Some(Self(UPPER_HALF)),
            Some(next) => Some(Self(next)),
            None => None,
        }
    }

    /// The address `bytes` further on, which the caller knows to be in the same half.
    pub(crate) const fn within_half(self, bytes: u64) -> Self {
        debug_assert!(Self::new(self.0.wrapping_add(bytes)).is_some());
        Self(self.0.wrapping_add(bytes))
    }

    /// Index into the table of `level` (1 … 4).
    pub(crate) const fn index(self, level: u32) -> usize {
        (self.0 >> (12 + 9 * (level - 1)) & 0x1ff) as usize
    }
}

impl Gpa {
    /// The address, which the caller knows to be below 2^48.
    pub(crate) const fn known(address: u64) -> Self {
        debug_assert!(Self::new(address).is_some());
        Self(address)
    }

    /// The address that the lower 48 bits are.
    pub(crate) const fn truncated(address: u64) -> Self {
        Self(address & ((1 << 48) - 1))
    }

    /// The address, if it is below 2^48.
    pub const fn new(address: u64) -> Option<Self> {
        if address >> 48 == 0 {
            Some(Self(address))
        } else {
            None
        }
    }
}

impl Hva {
    /// The address, if Linux gives it to user space.
    pub const fn new(address: u64) -> Option<Self> {
        if address < USER_END {
            Some(Self(address))
        } else {
            None
        }
    }

    /// Number of the 1 GiB that the address lies in.
    pub(crate) const fn gib(self) -> u64 {
        self.0 >> 30
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_canonical_gva() {
        assert!(Gva::new(0x7fff_ffff_ffff).is_some());
        assert!(Gva::new(0x8000_0000_0000).is_none());
        assert!(Gva::new(0xffff_7fff_ffff_ffff).is_none());
        assert!(Gva::new(0xffff_8000_0000_0000).is_some());
        assert_eq!(Gva::new(0x7fff_ffff_f000).unwrap().checked_add(0x1000), None);
        assert_eq!(Gva::new(u64::MAX).unwrap().checked_add(1), None);
    }

    #[test]
    fn only_user_hva() {
        assert!(Hva::new((1 << 47) - 1).is_some());
        assert!(Hva::new(1 << 47).is_none());
        assert_eq!(Gva::new(u64::MAX).unwrap().identity(), None);
    }

    #[test]
    fn index_takes_nine_bits_per_level() {
        let gva = Gva::new(0x7f80_4020_1000).unwrap();
        assert_eq!([4, 3, 2, 1].map(|level| gva.index(level)), [255, 1, 1, 1]);
    }

    /// Every index at every level, with all others 0 and all others 511.
    #[test]
    fn index_is_exhaustive() {
        for level in 1..=4u32 {
            let shift = 12 + 9 * (level - 1);
            for index in 0..512u64 {
                for others in [0u64, 0x0000_ffff_ffff_ffff] {
                    let low = others & !(0x1ff << shift) | index << shift;
                    let address = if low >> 47 & 1 != 0 { low | 0xffff << 48 } else { low };
                    let gva = Gva::new(address).unwrap();
                    assert_eq!(gva.index(level), index as usize);
                    for other in (1..=4).filter(|other| *other != level) {
                        assert_eq!(gva.index(other), if others == 0 { 0 } else { 511 });
                    }
                    let back = (1..=4).fold(0, |sum, level| {
                        sum | (gva.index(level) as u64) << (12 + 9 * (level - 1))
                    });
                    assert_eq!(back, low & 0x0000_ffff_ffff_f000);
                }
            }
        }
    }

    #[test]
    fn no_sum_leaves_its_half() {
        let edges = [0, 1, 0x7fff_ffff_ffff, 0xffff_8000_0000_0000, u64::MAX];
        for start in edges {
            for bytes in [
                0,
                1,
                0xfff,
                1 << 30,
                1 << 47,
                u64::MAX - 0xffff_8000_0000_0000,
                u64::MAX,
            ] {
                let sum = Gva::new(start).unwrap().checked_add(bytes);
                let expected = start
                    .checked_add(bytes)
                    .filter(|sum| (sum >> 47) == 0 || (sum >> 47) == 0x1_ffff);
                assert_eq!(sum.map(Gva::as_u64), expected, "{start:#x} + {bytes:#x}");
            }
        }
    }
}
