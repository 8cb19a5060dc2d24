// SPDX-License-Identifier: MIT OR Apache-2.0

//! The guest's own page tables.
//!
//! The default table maps every GVA to the HVA of the same number, one leaf per 1 GiB (2 MiB where the CPU has no
//! 1 GiB leaves), put in when the GiB is first used. The EPT below it lets through what the process may access, so
//! a leaf that covers more than is mapped does no harm. Protecting a part splits a leaf down to 4 KiB.
//!
//! Everything here takes `&self` and may be used in a trap handler that interrupted it: entries change atomically,
//! one at a time.

mod entry;
mod space;
mod tree;

pub(crate) mod memory;

pub use entry::Permissions;
pub use space::flush_all;
pub use space::flush_page;
pub use space::AddressSpace;
pub use space::Flush;
pub use tree::Mapping;

pub(crate) use space::is_cpl0;
pub(crate) use space::read_cr3;

use crate::addr::Gpa;
use crate::addr::Gva;
use crate::addr::Hva;

/// Starts an empty tree of tables and returns its root.
pub(crate) fn new_root(memory: &memory::Memory) -> Result<Gpa, PagingError> {
    tree::Tree::new(memory).map(|tree| tree.root)
}

/// Maps the GiB of `gva` to itself in the tree at `root`, if nothing decided about it yet; says whether it did.
pub(crate) fn fill(memory: &memory::Memory, root: Gpa, gva: Gva) -> Result<bool, PagingError> {
    let tree = tree::Tree { frames: memory, root };
    // This is on the way of every page fault.
    if tree.is_decided(gva) {
        return Ok(false);
    }
    memory::recycle::with_slots(memory, || tree.fill(gva))
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
    /// A table lies at a GPA that is in no slot.
    #[error("the page table refers to GPA {0:#x}, which is in no slot")]
    Corrupt(u64),
}
