// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the CPU notes in page tables: accessed and dirty bits, read and cleared table by table.

use core::sync::atomic::Ordering::AcqRel;
use core::sync::atomic::Ordering::Relaxed;

use super::entry::leaf_bytes;
use super::entry::Entry;
use super::entry::Kind;
use super::tree::Frames;
use super::tree::Tree;
use super::PagingError;
use crate::addr::Gva;

/// Which of the bits that the CPU sets are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Used {
    /// The page was used.
    Accessed,
    /// The page was written to.
    Dirty,
    /// Both bits.
    Both,
}

impl Used {
    pub(super) const fn mask(self) -> u64 {
        Entry::used_mask(!matches!(self, Self::Dirty), !matches!(self, Self::Accessed))
    }
}

/// Pages of one table whose bits were read.
pub(crate) struct Batch {
    /// Address of the first page.
    pub start: Gva,
    /// Bytes of each page.
    pub page_bytes: u64,
    /// A bit per page that had one of the bits that were asked for.
    pub used: [u64; 8],
    /// Of those, the ones that were dirty.
    pub dirty: [u64; 8],
    /// Bytes from the start of the range to where to go on.
    pub done: u64,
}

impl<F: Frames> Tree<'_, F> {
    /// Reads bits that the CPU set in the pages behind `start` + `done`, and clears them if `clear`: of those in one table
    /// at most. Nothing is split: a large page is one page.
    pub fn take_used(
        &self,
        start: Gva,
        bytes: u64,
        done: u64,
        used: Used,
        clear: bool,
    ) -> Result<Option<Batch>, PagingError> {
        let mut done = done;
        while done < bytes {
            let at = start
                .checked_add(done)
                .ok_or(PagingError::OutOfRange { start, bytes })?;
            let (level, slot) = self.find(at)?;
            let size = leaf_bytes(level);
            if level > 3 || Entry(slot.load(Relaxed)).kind(level) != Kind::Leaf {
                done += size - at.as_u64() % size;
                continue;
            }
            let first = at.index(level);
            let end = (first as u64 + (bytes - done + at.as_u64() % size).div_ceil(size)).min(512) as usize;
            let mut batch = Batch {
                start: at.align_down(size),
                page_bytes: size,
                used: [0; 8],
                dirty: [0; 8],
                done: done + (end - first) as u64 * size - at.as_u64() % size,
            };
            let slots = &self.rest_of_table(slot, first)[..end - first];
            let mask = used.mask();
            for (index, slot) in slots.iter().enumerate() {
                let mut entry = Entry(slot.load(Relaxed));
                if level > 1 && entry.kind(level) == Kind::Table {
                    // The next batch is of that table.
                    batch.done = done + index as u64 * size - (at.as_u64() % size).min(index as u64 * size);
                    break;
                }
                if entry.0 & mask == 0 || entry.kind(level) != Kind::Leaf {
                    continue;
                }
                if clear {
                    entry = Entry(slot.fetch_and(!mask, AcqRel));
                    if entry.kind(level) != Kind::Leaf {
                        // Replaced in between by a table, whose entries look used: it says so too.
                        slot.fetch_or(entry.0 & mask, AcqRel);
                        continue;
                    }
                }
                batch.used[index / 64] |= 1 << (index % 64);
                if entry.is_dirty() {
                    batch.dirty[index / 64] |= 1 << (index % 64);
                }
            }
            return Ok(Some(batch));
        }
        Ok(None)
    }
}
