// SPDX-License-Identifier: GPL-2.0

//! Entries of the page table that Linux keeps for the process, decoded for the walk that fills the EPT.
//!
//! Only what x86-64 Linux puts there is decoded; whoever walks reads each entry once and confirms by the notifier's
//! sequence count that nothing changed (docs/architecture.md, "Life of an EPT violation").

use super::addr::Hpa;
use super::addr::Level;
use super::ept::EptEntry;
use super::ept::EptPerms;
use super::ept::MemType;

/// One entry of the process' page table, at any level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct HostPte(u64);

impl HostPte {
    const PRESENT: u64 = 1 << 0;
    const WRITABLE: u64 = 1 << 1;
    const USER: u64 = 1 << 2;
    const WRITE_THROUGH: u64 = 1 << 3;
    const CACHE_DISABLE: u64 = 1 << 4;
    const DIRTY: u64 = 1 << 6;
    /// PSE above 4 KiB; the PAT bit in a 4 KiB entry.
    const PSE: u64 = 1 << 7;
    const PAT_4K: u64 = 1 << 7;
    /// Linux' `_PAGE_SPECIAL`.
    const SPECIAL: u64 = 1 << 9;
    const PAT_LARGE: u64 = 1 << 12;
    const NO_EXECUTE: u64 = 1 << 63;
    const ADDRESS_MASK: u64 = 0x000f_ffff_ffff_f000;

    /// Of what memory holds.
    pub const fn new(raw: u64) -> Self {
        Self(raw)
    }

    /// What memory holds.
    pub const fn as_u64(self) -> u64 {
        self.0
    }

    const fn has(self, mask: u64) -> bool {
        self.0 & mask != 0
    }

    /// The CPU would use it. An entry of PROT_NONE (bit 8 without bit 0), of swap or of migration is not present.
    pub const fn is_present(self) -> bool {
        self.has(Self::PRESENT)
    }

    pub const fn is_writable(self) -> bool {
        self.has(Self::WRITABLE)
    }

    pub const fn is_user(self) -> bool {
        self.has(Self::USER)
    }

    pub const fn is_dirty(self) -> bool {
        self.has(Self::DIRTY)
    }

    pub const fn is_no_execute(self) -> bool {
        self.has(Self::NO_EXECUTE)
    }

    /// Linux' mark for pages that it does not count by `struct page`: PFNMAP, and the shared zero page as well.
    pub const fn is_special(self) -> bool {
        self.has(Self::SPECIAL)
    }

    /// Whether this, in a table of `level`, maps a page.
    pub const fn is_leaf(self, level: Level) -> bool {
        match level {
            Level::Page4K => true,
            Level::Page2M | Level::Page1G => self.has(Self::PSE),
            Level::P512G => false,
        }
    }

    /// The page, when this is a leaf of `level`: the bits below its size are flags (PAT) or zero.
    #[inline(always)]
    pub const fn leaf_hpa(self, level: Level) -> Hpa {
        self.hpa().align_down(level.bytes())
    }

    /// The table that this points to.
    pub const fn table_hpa(self) -> Hpa {
        self.hpa()
    }

    const fn hpa(self) -> Hpa {
        match Hpa::new(self.0 & Self::ADDRESS_MASK) {
            Some(hpa) => hpa,
            // The mask leaves nothing above bit 51.
            None => HPA_ZERO,
        }
    }

    /// Which of the eight fields of IA32_PAT gives the memory type, when this is a leaf of `level`.
    #[inline(always)]
    pub const fn pat_index(self, level: Level) -> u32 {
        let pat = match level {
            Level::Page4K => Self::PAT_4K,
            _ => Self::PAT_LARGE,
        };
        (self.has(pat) as u32) << 2 | (self.has(Self::CACHE_DISABLE) as u32) << 1 | self.has(Self::WRITE_THROUGH) as u32
    }
}

const HPA_ZERO: Hpa = match Hpa::new(0) {
    Some(hpa) => hpa,
    None => panic!(),
};

/// Memory type in field `index` (below 8) of an IA32_PAT value; UC- is UC, since EPT has no MTRR to yield to.
///
/// A reserved encoding, which WRMSR refuses, is UC.
#[inline(always)]
pub const fn pat_mem_type(pat: u64, index: u32) -> MemType {
    match MemType::from_raw(pat >> ((index & 7) * 8) & 7) {
        Some(mem_type) => mem_type,
        None => MemType::Uc,
    }
}

/// What the process' page table says about one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostLeaf {
    /// Start of the page, aligned to its size.
    pub hpa: Hpa,
    pub level: Level,
    /// The process may write it.
    pub writable: bool,
    /// … and Linux knows already that it did: only such a page may be mapped writable, for then nobody has to tell
    /// Linux later that it became dirty.
    pub writable_and_dirty: bool,
    pub executable: bool,
    pub mem_type: MemType,
    /// [`HostPte::is_special`].
    pub special: bool,
}

impl HostLeaf {
    /// What EPT may allow at this page.
    pub const fn perms(&self) -> EptPerms {
        EptPerms {
            write: self.writable_and_dirty,
            execute: self.executable,
        }
    }

    /// The 4 KiB, 2 MiB or 1 GiB piece of this page that holds the same offset as `hva`, at most as large as the page.
    ///
    /// For mapping less than the host's leaf covers; `level` above the leaf's gives the leaf itself.
    #[inline(always)]
    pub fn piece(&self, hva: super::addr::Hva, level: Level) -> Self {
        if level >= self.level {
            return *self;
        }
        let inside = hva.offset_in(self.level) & !(level.bytes() - 1);
        Self {
            // An address in a page of RAM or a BAR: the sum stays below 2^52.
            hpa: self.hpa.checked_add(inside).unwrap_or(self.hpa),
            level,
            ..*self
        }
    }
}

/// A walk of the process' page table, as far as it got.
///
/// Write and user permission of the upper levels are ANDed; their NX bit is not looked at, because page-table
/// isolation sets NX in the top level of every process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walk {
    /// Of the bits that count, those that all entries had.
    all: u64,
}

/// EPT leaves of 4 KiB for the entries of one table, as [`Walk::step`] and [`HostLeaf::perms`] would have them, faster.
///
/// [`Walk::step`]: Walk::step
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeafMaker {
    user: bool,
    writable: bool,
    pat: u64,
    /// Without its address: a leaf of the memory type of PAT field 0.
    plain: u64,
}

/// As [`LeafMaker`], for entries that differ from one in nothing but their address and what EPT leaves do not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LikeOne {
    entry: u64,
    /// The leaf of that one.
    leaf: u64,
}

impl LikeOne {
    /// The leaf for an entry; `None` where that differs in more than the page.
    #[inline(always)]
    pub const fn make(&self, entry: HostPte) -> Option<u64> {
        let difference = entry.0 ^ self.entry;
        if difference & LeafMaker::LOOKED_AT == 0 {
            Some(self.leaf ^ (difference & HostPte::ADDRESS_MASK))
        } else {
            None
        }
    }
}

impl LeafMaker {
    /// What [`LeafMaker::make`] looks at, besides the address.
    const LOOKED_AT: u64 = HostPte::PRESENT
        | HostPte::USER
        | HostPte::WRITABLE
        | HostPte::DIRTY
        | HostPte::PAT_4K
        | HostPte::CACHE_DISABLE
        | HostPte::WRITE_THROUGH
        | HostPte::NO_EXECUTE;

    /// For entries of the table like `entry`, of which [`LeafMaker::make`] makes `leaf`.
    #[inline(always)]
    pub const fn like(&self, entry: HostPte, leaf: EptEntry) -> LikeOne {
        LikeOne {
            entry: entry.0,
            leaf: leaf.as_u64(),
        }
    }

    /// A leaf without its address, of the memory type of PAT field 0.
    pub const fn plain_for(pat: u64) -> u64 {
        EptEntry::leaf(HPA_ZERO, Level::Page4K, EptPerms::READ, pat_mem_type(pat, 0)).as_u64()
    }

    /// For the table that `walk` got to; `plain` is that for `pat`.
    #[inline(always)]
    pub const fn of(walk: Walk, pat: u64, plain: u64) -> Self {
        Self {
            user: walk.is_user(),
            writable: walk.is_writable(),
            pat,
            plain,
        }
    }

    /// For the table that `walk` got to.
    pub const fn new(walk: Walk, pat: u64) -> Self {
        Self::of(walk, pat, Self::plain_for(pat))
    }

    /// The leaf for an entry; 0 where there is none.
    #[inline(always)]
    pub const fn make(&self, entry: HostPte) -> u64 {
        const CACHING: u64 = HostPte::PAT_4K | HostPte::CACHE_DISABLE | HostPte::WRITE_THROUGH;
        const NEEDED: u64 = HostPte::PRESENT | HostPte::USER;
        const WRITE: u64 = HostPte::WRITABLE | HostPte::DIRTY;
        if entry.0 & NEEDED != NEEDED || !self.user {
            return 0;
        }
        let mut leaf = self.plain | (entry.0 & HostPte::ADDRESS_MASK);
        if entry.has(CACHING) {
            let mem_type = pat_mem_type(self.pat, entry.pat_index(Level::Page4K)) as u64;
            leaf = leaf & !EptEntry::MEM_TYPE_MASK | mem_type << EptEntry::MEM_TYPE_SHIFT;
        }
        if entry.0 & WRITE == WRITE && self.writable {
            leaf |= EptEntry::WRITE;
        }
        if !entry.has(HostPte::NO_EXECUTE) {
            leaf |= EptEntry::EXECUTE;
        }
        leaf
    }
}

/// What one entry says to a walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The process has nothing here that user mode may touch.
    Absent,
    /// Go on in this table, one level down.
    Table(Hpa),
    /// The page.
    Leaf(HostLeaf),
}

impl Walk {
    /// At the root.
    pub const START: Self = Self {
        all: HostPte::WRITABLE | HostPte::USER,
    };

    const fn is_writable(self) -> bool {
        self.all & HostPte::WRITABLE != 0
    }

    const fn is_user(self) -> bool {
        self.all & HostPte::USER != 0
    }

    /// Takes the entry read at `level`; `pat` is this CPU's IA32_PAT.
    #[inline(always)]
    pub const fn step(&mut self, entry: HostPte, level: Level, pat: u64) -> Step {
        if !entry.is_present() {
            return Step::Absent;
        }
        self.all &= entry.0;
        if !self.is_user() {
            return Step::Absent;
        }
        if !entry.is_leaf(level) {
            return Step::Table(entry.table_hpa());
        }
        Step::Leaf(HostLeaf {
            hpa: entry.leaf_hpa(level),
            level,
            writable: self.is_writable(),
            writable_and_dirty: self.is_writable() && entry.is_dirty(),
            executable: !entry.is_no_execute(),
            mem_type: pat_mem_type(pat, entry.pat_index(level)),
            special: entry.is_special(),
        })
    }
}
