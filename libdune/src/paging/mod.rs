// SPDX-License-Identifier: MIT OR Apache-2.0

//! The guest's own page tables.
//!
//! The default table maps every GVA to the HVA of the same number, one leaf per 1 GiB (2 MiB where the CPU has no
//! 1 GiB leaves), put in when the GiB is first used. The EPT below it lets through what the process may access, so
//! a leaf that covers more than is mapped does no harm. Protecting a part splits a leaf down to 4 KiB.
//!
//! Everything here takes `&self` and may be used in a trap handler that interrupted it: entries change atomically,
//! one at a time.

mod copy;
pub(crate) mod edit;
mod entry;
mod owned;
mod pool;
mod protocol;
mod share;
mod space;
mod tree;
mod used;

pub(crate) mod memory;
pub(crate) mod tables;
pub(crate) mod tlb;

/// Atomics of the protocol: loom's, where it is tested.
mod sync {
    pub use core::sync::atomic::fence;
    pub use core::sync::atomic::AtomicU32;
    pub use core::sync::atomic::AtomicU64;
    pub use core::sync::atomic::Ordering;
}

pub use entry::Permissions;
pub use owned::LoadedSpace;
pub use owned::PageTable;
pub use pool::FramePool;
pub use space::AddressSpace;
pub use space::UsedPage;
pub use tlb::Flush;
pub use tree::Mapping;
pub use used::Used;

pub(crate) use copy::has_copies;
pub(crate) use copy::settle_write;
pub(crate) use owned::forget_thread;
pub(crate) use owned::start_thread;
pub(crate) use protocol::Here;
pub(crate) use tlb::flush_all;
pub(crate) use tlb::flush_page;
pub(crate) use tlb::is_cpl0;
pub(crate) use tlb::loaded_root;
pub(crate) use tlb::switch;

use crate::addr::Gpa;
use crate::addr::Gva;
use crate::addr::Hva;

/// The word of a lowest leaf at GPA 0.
#[cfg(test)]
pub(crate) fn leaf_bits(permissions: Permissions) -> u64 {
    entry::Entry::leaf(Gpa::default(), 1, permissions).0
}

/// Starts an empty tree of tables and returns its root.
pub(crate) fn new_root(memory: &memory::Memory) -> Result<Gpa, PagingError> {
    tree::Tree::new(memory).map(|tree| tree.root)
}

/// Gives back a tree that was never used.
pub(crate) fn free(memory: &memory::Memory, root: Gpa) {
    tree::Tree { frames: memory, root }.free();
}

/// Maps the GiB of `gva` to itself in the tree at `root`, if nothing decided about it yet. Says whether the CPU may find a
/// page there now: where several threads fault at once, one of them fills in and the others have nothing left to do.
pub(crate) fn fill(memory: &memory::Memory, root: Gpa, gva: Gva) -> Result<bool, PagingError> {
    let tree = tree::Tree { frames: memory, root };
    // This is on the way of every page fault.
    let has_page = || {
        let _using = memory.begin();
        tree.has_page(gva)
    };
    if let Some(present) = has_page() {
        return Ok(present);
    }
    Ok(memory::recycle::with_slots(memory, || tree.fill(gva))? && has_page() != Some(false))
}

/// Why a page table could not be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PagingError {
    /// The module has no GPA slot left for the GiB of this address.
    #[error("no GPA slot is left for the 1 GiB at {0}: the process uses more 1 GiB pieces than the CPU's (or gpa_bits=) GPA width has slots; unmap some or use fewer")]
    OutOfSlots(Hva),
    /// The module refused to say where this address is.
    #[error("DUNE_MAP_SLOT for {hva} failed with errno {errno}")]
    MapSlot {
        /// The address asked for.
        hva: Hva,
        /// Linux' error number.
        errno: i32,
    },
    /// No memory for a page-table page.
    #[error("no memory for another page-table page: mprotect failed with errno {0}, or the 508 MiB that page tables may use are used up")]
    OutOfMemory(i32),
    /// The range is not a whole number of pages at a page's start.
    #[error("{start} + {bytes:#x} bytes are not whole pages")]
    Unaligned {
        /// Start of the range.
        start: Gva,
        /// Its length.
        bytes: u64,
    },
    /// The range leaves the half of the address space that it begins in.
    #[error("{start} + {bytes:#x} bytes leave the canonical addresses")]
    OutOfRange {
        /// Start of the range.
        start: Gva,
        /// Its length.
        bytes: u64,
    },
    /// The range has an address that was never mapped, or was unmapped.
    #[error("nothing is mapped at {0}")]
    NotMapped(Gva),
    /// All page tables that a process can have are in use.
    #[error(
        "this process has all {} page tables that it can have: drop some",
        crate::layout::TABLE_COUNT
    )]
    OutOfTables,
    /// A pool has no frame left.
    #[error("all frames of the pool are in use: give some back, or drop page tables that have copies")]
    OutOfFrames,
    /// The table has copies from another pool.
    #[error("the page table has another pool: use that one")]
    OtherPool,
    /// The table is not one that libdune made.
    #[error("the page table in CR3 is none of libdune's")]
    Foreign,
    /// There are no protection keys.
    #[error("no protection keys: the CPU has none (`pku` in /proc/cpuinfo), or Linux does not use them (`ospke`)")]
    NoProtectionKeys,
    /// Protection keys are 0 to 15.
    #[error("protection key {0} is above 15")]
    NoSuchKey(u8),
    /// Another change of page tables does not end.
    #[error(
        "a change of a page table that was interrupted does not end: do not merge in a handler that interrupted one"
    )]
    Busy,
    /// A table lies at a GPA that is in no slot.
    #[error("the page table refers to GPA {0:#x}, which is in no slot")]
    Corrupt(u64),
}
