// SPDX-License-Identifier: MIT OR Apache-2.0

//! One entry of a page table (SDM, "4-Level Paging and 5-Level Paging").

use core::fmt;
use core::ops::BitOr;

use x86_64::structures::paging::PageTableFlags;

use crate::addr::Gpa;

const PRESENT: u64 = PageTableFlags::PRESENT.bits();
const WRITABLE: u64 = PageTableFlags::WRITABLE.bits();
const USER: u64 = PageTableFlags::USER_ACCESSIBLE.bits();
const ACCESSED: u64 = PageTableFlags::ACCESSED.bits();
const DIRTY: u64 = PageTableFlags::DIRTY.bits();
const LARGE: u64 = PageTableFlags::HUGE_PAGE.bits();
/// Software bit: a leaf whose permissions were taken away; its address is kept.
const HELD: u64 = 1 << 9;
/// Software bit: unmapped on purpose; not to be filled in on a page fault.
const GONE: u64 = 1 << 10;
/// Software bit: nothing decided about it yet, in a table that a whole GiB was split into.
const OPEN: u64 = 1 << 11;
/// Software bit of a leaf: somebody else maps the frame too, and a write gets a copy. The CPU's write bit is clear.
const SHARED: u64 = 1 << 52;
/// Software bit of a leaf: it counts as a user of a frame of a pool.
const OWNED: u64 = 1 << 53;
/// Software bit of a shared leaf: writing is allowed, to a copy.
const COPY: u64 = 1 << 54;
/// Software bit of a large leaf that the program made: it stays whole until the program says otherwise.
pub const WHOLE: u64 = 1 << 58;
const KEY_SHIFT: u32 = 59;
const KEY: u64 = 0xf << KEY_SHIFT;
const NO_EXECUTE: u64 = PageTableFlags::NO_EXECUTE.bits();
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// What a page may be used for. A present page can always be read.
///
/// # Examples
///
/// ```
/// use libdune::Permissions;
///
/// let code = Permissions::USER | Permissions::EXECUTE;
/// assert!(code.contains(Permissions::READ) && !code.contains(Permissions::WRITE));
/// assert_eq!(format!("{code:?}"), "r-xu");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Permissions(u8);

impl Permissions {
    /// No access: a page fault with error code P = 0. The page's address is kept.
    pub const NONE: Self = Self(0);
    /// Reading.
    pub const READ: Self = Self(1);
    /// Reading and writing.
    pub const WRITE: Self = Self(1 | 2);
    /// Reading and executing.
    pub const EXECUTE: Self = Self(1 | 4);
    /// Reading, and also from CPL3.
    pub const USER: Self = Self(1 | 8);
    /// What the default page table gives: all, from CPL0 only.
    pub const ALL: Self = Self(1 | 2 | 4);

    /// Whether all of `other` is allowed.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    const fn bits(self) -> u64 {
        if self.0 == 0 {
            return HELD;
        }
        let mut bits = PRESENT;
        if self.0 & 2 != 0 {
            bits |= WRITABLE;
        }
        if self.0 & 4 == 0 {
            bits |= NO_EXECUTE;
        }
        if self.0 & 8 != 0 {
            bits |= USER;
        }
        bits
    }
}

impl BitOr for Permissions {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Debug for Permissions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letters = [(1, "r"), (2, "w"), (4, "x"), (8, "u")];
        for (bit, letter) in letters {
            f.write_str(if self.0 & bit != 0 { letter } else { "-" })?;
        }
        Ok(())
    }
}

/// An entry at any level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry(pub u64);

/// What an entry stands for; the level decides what a present entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Nothing decided about it yet.
    Empty,
    /// Unmapped on purpose.
    Gone,
    /// Refers to a table.
    Table,
    /// Maps a page, perhaps with no permission at all.
    Leaf,
}

impl Entry {
    /// In the two upper levels. Below, what is 0 was written by a program that edits entries: nothing is mapped there.
    #[cfg(test)]
    pub const EMPTY: Self = Self(0);
    /// Nothing decided about it yet, at any level.
    pub const OPEN: Self = Self(OPEN);
    pub const GONE: Self = Self(GONE);

    /// An entry that refers to a table; it restricts nothing.
    pub const fn table(table: Gpa) -> Self {
        Self(table.as_u64() | PRESENT | WRITABLE | USER | ACCESSED)
    }

    /// An entry of `level` that maps a page. Accessed and dirty are set: nobody asked the CPU to track them.
    pub const fn leaf(page: Gpa, level: u32, permissions: Permissions) -> Self {
        let large = if level > 1 { LARGE } else { 0 };
        Self(page.as_u64() | permissions.bits() | large | ACCESSED | DIRTY)
    }

    pub const fn kind(self, level: u32) -> Kind {
        if self.0 & PRESENT != 0 {
            if level == 1 || (level < 4 && self.0 & LARGE != 0) {
                Kind::Leaf
            } else {
                Kind::Table
            }
        } else if self.0 & HELD != 0 {
            Kind::Leaf
        } else if self.0 & OPEN != 0 || (self.0 == 0 && level > 2) {
            Kind::Empty
        } else {
            Kind::Gone
        }
    }

    /// The GPA that the entry refers to, without the bits that an offset into its page would have.
    pub const fn address(self) -> u64 {
        self.0 & ADDRESS
    }

    pub const fn is_present(self) -> bool {
        self.0 & PRESENT != 0
    }

    /// Whether it is more than a mark of libdune's that nothing is there.
    pub const fn holds(self) -> bool {
        self.0 & !(GONE | OPEN) != 0
    }

    /// Whether the address means something: not so in an empty entry, nor in what is no entry at all.
    pub const fn refers(self) -> bool {
        self.0 & (PRESENT | HELD) != 0
    }

    pub const fn permissions(self) -> Permissions {
        if self.0 & PRESENT == 0 {
            return Permissions::NONE;
        }
        let mut bits = 1;
        if self.0 & WRITABLE != 0 || self.is_copied_on_write() {
            bits |= 2;
        }
        if self.0 & NO_EXECUTE == 0 {
            bits |= 4;
        }
        if self.0 & USER != 0 {
            bits |= 8;
        }
        Permissions(bits)
    }

    pub const fn is_accessed(self) -> bool {
        self.0 & ACCESSED != 0
    }

    pub const fn is_dirty(self) -> bool {
        self.0 & DIRTY != 0
    }

    /// The same leaf with other permissions. A shared one stays so.
    #[inline]
    pub const fn with_permissions(self, permissions: Permissions) -> Self {
        self.with_plain_permissions(permissions).with_write_bits()
    }

    /// The same of a [plain](Self::is_plain) leaf.
    #[inline]
    pub const fn with_plain_permissions(self, permissions: Permissions) -> Self {
        let kept = self.0 & !(PRESENT | WRITABLE | USER | HELD | COPY | NO_EXECUTE);
        Self(kept | permissions.bits())
    }

    /// Whether this entry of a lowest table maps a page with some permission, of which a write gets no copy, and which is in
    /// no pool.
    #[inline]
    pub const fn is_plain(self) -> bool {
        self.0 & (PRESENT | SHARED | OWNED) == PRESENT
    }

    /// Of a shared leaf: turns the CPU's write bit into the software's.
    const fn with_write_bits(self) -> Self {
        if self.0 & SHARED != 0 && self.0 & WRITABLE != 0 {
            Self(self.0 & !WRITABLE | COPY)
        } else {
            self
        }
    }

    /// The same leaf, of which a write gets a copy.
    pub const fn with_sharing(self) -> Self {
        Self(self.0 | SHARED).with_write_bits()
    }

    /// The same leaf after sharing ended: its frame is nobody else's.
    pub const fn without_sharing(self) -> Self {
        let write = if self.0 & COPY != 0 { WRITABLE } else { 0 };
        Self(self.0 & !(SHARED | COPY) | write)
    }

    /// The same 4 KiB leaf for a frame of its own, written to.
    pub const fn with_own_frame(self, frame: Gpa) -> Self {
        let flags = self.without_sharing().0 & !ADDRESS;
        Self(flags | frame.as_u64() | OWNED | ACCESSED | DIRTY)
    }

    /// Whether a write is allowed and gets a copy.
    pub const fn is_copied_on_write(self) -> bool {
        self.0 & (SHARED | COPY) == SHARED | COPY
    }

    /// Whether it counts as a user of a frame of a pool.
    pub const fn is_owner(self) -> bool {
        self.refers() && self.0 & OWNED != 0
    }

    /// Whether no entry of these, in a table of `level`, is a table or owns a frame. False also where the level has large pages.
    #[inline]
    pub fn are_by_themselves(entries: &[Self], level: u32) -> bool {
        let refers = if level == 1 { OWNED } else { OWNED | PRESENT };
        entries.iter().fold(0, |all, entry| all | entry.0) & refers == 0
    }

    /// Protection key, 0 to 15.
    pub const fn key(self) -> u8 {
        ((self.0 & KEY) >> KEY_SHIFT) as u8
    }

    /// The same leaf with this protection key, of which the lower four bits count.
    pub const fn with_key(self, key: u8) -> Self {
        Self(self.0 & !KEY | (key as u64) << KEY_SHIFT & KEY)
    }

    /// The leaf of `level` + 1 that these 512 entries of `level` are the pieces of, with `accessed` and `dirty` of any.
    pub fn whole(pieces: impl Iterator<Item = Self>, level: u32) -> Option<Self> {
        let mut pieces = pieces.enumerate();
        let (_, first) = pieces.next()?;
        if first.kind(level) != Kind::Leaf || first.0 & OWNED != 0 || first.address() % leaf_bytes(level + 1) != 0 {
            return None;
        }
        let mut used = first.0 & (ACCESSED | DIRTY);
        for (index, piece) in pieces {
            used |= piece.0 & (ACCESSED | DIRTY);
            let expected = first.0 + index as u64 * leaf_bytes(level);
            if (piece.0 ^ expected) & !(ACCESSED | DIRTY) != 0 {
                return None;
            }
        }
        Some(Self(first.0 | used | LARGE))
    }

    /// The bits that the CPU sets, as they are in an entry.
    pub const fn used_mask(accessed: bool, dirty: bool) -> u64 {
        (if accessed { ACCESSED } else { 0 }) | (if dirty { DIRTY } else { 0 })
    }

    /// The same leaf for CPL3 too, or for CPL0 only. A leaf without permissions stays so.
    pub const fn with_user(self, user: bool) -> Self {
        if self.0 & PRESENT != 0 && user {
            Self(self.0 | USER)
        } else {
            Self(self.0 & !USER)
        }
    }

    /// The same leaf with accessed and dirty cleared.
    pub const fn with_accessed_dirty_clear(self) -> Self {
        Self(self.0 & !(ACCESSED | DIRTY))
    }

    /// Entry number `index` of the table that replaces this leaf (or gap) of `level`.
    pub const fn piece(self, level: u32, index: u64) -> Self {
        match self.kind(level) {
            Kind::Leaf => {
                let flags = self.0 & !(ADDRESS | LARGE | WHOLE);
                let large = if level - 1 > 1 { LARGE | self.0 & WHOLE } else { 0 };
                Self((self.address() + index * leaf_bytes(level - 1)) | flags | large)
            }
            _ if self.0 == 0 && level == 3 => Self::OPEN,
            _ => self,
        }
    }
}

/// Bytes that an entry of `level` (1 … 4) covers.
pub(super) const fn leaf_bytes(level: u32) -> u64 {
    1 << (12 + 9 * (level - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every_permission() -> impl Iterator<Item = Permissions> {
        (0..16).filter(|bits| *bits == 0 || bits & 1 != 0).map(Permissions)
    }

    #[test]
    fn permissions_round_trip_at_every_level() {
        let page = Gpa::new(0x40_0000_0000).unwrap();
        for level in 1..=3 {
            for permissions in every_permission() {
                let entry = Entry::leaf(page, level, permissions);
                assert_eq!(entry.permissions(), permissions);
                assert_eq!(entry.kind(level), Kind::Leaf);
                assert_eq!(entry.address(), page.as_u64());
                for other in every_permission() {
                    let changed = entry.with_permissions(other);
                    assert_eq!(changed.permissions(), other);
                    assert_eq!(changed, Entry::leaf(page, level, other));
                }
            }
        }
    }

    #[test]
    fn pieces_cover_the_leaf_with_its_permissions() {
        let page = Gpa::new(0x8000_0000).unwrap();
        for level in 2..=3 {
            for permissions in every_permission() {
                let entry = Entry::leaf(page, level, permissions);
                for index in 0..512 {
                    let piece = entry.piece(level, index);
                    assert_eq!(piece.kind(level - 1), Kind::Leaf);
                    assert_eq!(piece.permissions(), permissions);
                    assert_eq!(piece.address(), page.as_u64() + index * leaf_bytes(level - 1));
                }
            }
        }
    }

    #[test]
    fn gaps_stay_gaps_in_pieces() {
        assert_eq!(Entry::GONE.piece(3, 5).kind(2), Kind::Gone);
        for level in [4, 3] {
            let piece = Entry::EMPTY.piece(level, 5);
            assert_eq!(piece.kind(level - 1), Kind::Empty);
        }
        assert_eq!(Entry::EMPTY.piece(3, 5).piece(2, 7).kind(1), Kind::Empty);
        assert_eq!(Entry::OPEN.piece(3, 5).piece(2, 7).kind(1), Kind::Empty);
    }

    #[test]
    fn what_a_program_cleared_is_not_filled_in() {
        let leaf = Entry::leaf(Gpa::new(0x1000).unwrap(), 1, Permissions::WRITE);
        for level in [1, 2] {
            assert_eq!(Entry(0).kind(level), Kind::Gone);
            assert_eq!(Entry(leaf.0 & !PRESENT).kind(level), Kind::Gone);
        }
        for level in [3, 4] {
            assert_eq!(Entry(0).kind(level), Kind::Empty);
            assert_eq!(Entry(leaf.0 & !PRESENT).kind(level), Kind::Gone);
        }
    }

    #[test]
    fn user_bit_never_makes_a_held_leaf_present() {
        let held = Entry::leaf(Gpa::new(0x1000).unwrap(), 1, Permissions::NONE);
        assert_eq!(held.with_user(true).permissions(), Permissions::NONE);
        let user = Entry::leaf(Gpa::new(0x1000).unwrap(), 1, Permissions::ALL).with_user(true);
        assert!(user.permissions().contains(Permissions::USER));
        assert!(!user.with_user(false).permissions().contains(Permissions::USER));
    }

    #[test]
    fn whole_undoes_piece_at_every_level() {
        let page = Gpa::new(0x8000_0000).unwrap();
        for level in 2..=3 {
            for permissions in every_permission() {
                for change in [
                    |entry: Entry| entry,
                    Entry::with_sharing,
                    |entry: Entry| entry.with_key(9),
                ] {
                    let entry = change(Entry::leaf(page, level, permissions));
                    let pieces = || (0..512).map(|index| entry.piece(level, index));
                    assert_eq!(Entry::whole(pieces(), level - 1), Some(Entry(entry.0 | LARGE)));
                    let clean = pieces().map(Entry::with_accessed_dirty_clear);
                    let whole = Entry::whole(clean, level - 1).unwrap();
                    assert!(!whole.is_accessed() && !whole.is_dirty());
                }
            }
        }
    }

    /// Every bit of every piece but accessed and dirty, one at a time.
    #[test]
    fn whole_wants_all_pieces_alike() {
        let entry = Entry::leaf(Gpa::new(0x8000_0000).unwrap(), 2, Permissions::WRITE).with_accessed_dirty_clear();
        let mut pieces: Vec<Entry> = (0..512).map(|index| entry.piece(2, index)).collect();
        for index in 0..512 {
            for bit in 0..64 {
                pieces[index].0 ^= 1 << bit;
                let whole = Entry::whole(pieces.iter().copied(), 1);
                if (1u64 << bit) & (ACCESSED | DIRTY) != 0 {
                    assert_eq!(whole.unwrap().0, entry.0 | 1 << bit);
                } else {
                    assert_eq!(whole, None, "piece {index}, bit {bit}");
                }
                pieces[index].0 ^= 1 << bit;
            }
        }
        // Alike, but where no large page can begin.
        let shifted = (1..=512).map(|index| Entry(entry.piece(2, 0).0 + index * PAGE));
        assert_eq!(Entry::whole(shifted, 1), None);
    }

    const PAGE: u64 = 4096;

    #[test]
    fn a_shared_leaf_is_never_writable_for_the_cpu() {
        for level in 1..=3 {
            for first in every_permission() {
                for second in every_permission() {
                    let page = Gpa::new(0x4000_0000).unwrap();
                    let shared = Entry::leaf(page, level, first).with_sharing();
                    assert_eq!(shared.permissions(), first);
                    let changed = shared.with_permissions(second);
                    assert_eq!(changed.permissions(), second);
                    assert_eq!(changed.0 & WRITABLE, 0);
                    assert_eq!(changed.is_copied_on_write(), second.contains(Permissions::WRITE));
                    assert_eq!(changed.without_sharing(), Entry::leaf(page, level, second));
                    let own = changed.with_own_frame(Gpa::new(0x7000).unwrap());
                    assert_eq!(own.permissions(), second);
                    assert!(!own.is_copied_on_write());
                    assert_eq!(own.is_owner(), second != Permissions::NONE || own.refers());
                }
            }
        }
    }

    #[test]
    fn keys_round_trip_and_touch_nothing_else() {
        let entry = Entry::leaf(Gpa::new(0x4000_0000).unwrap(), 1, Permissions::ALL);
        for key in 0..16 {
            let keyed = entry.with_key(key);
            assert_eq!(keyed.key(), key);
            assert_eq!(keyed.address(), entry.address());
            assert_eq!(keyed.permissions(), entry.permissions());
            assert_eq!(keyed.with_key(0), entry);
        }
    }
}
