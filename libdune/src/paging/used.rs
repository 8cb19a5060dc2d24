// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the CPU notes in page tables: accessed and dirty bits, read and cleared table by table.

use core::sync::atomic::AtomicU64;
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

/// Entries that are looked at together at first: most are clear.
const GROUP: usize = 8;

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

impl Batch {
    #[inline(always)]
    fn note(&mut self, index: usize, is_dirty: bool) {
        self.used[index / 64] |= 1 << (index % 64);
        self.dirty[index / 64] |= u64::from(is_dirty) << (index % 64);
    }

    /// Notes a page of 4 KiB if its entry has one of the bits in `mask`, and clears them if `clear`. Only leaves have them.
    #[inline(always)]
    fn note_small(&mut self, index: usize, slot: &AtomicU64, mask: u64, clear: bool) {
        let mut entry = Entry(slot.load(Relaxed));
        if entry.0 & mask == 0 {
            return;
        }
        if clear {
            if entry.0 & mask == mask {
                // Nothing that the CPU can set meanwhile would be lost.
                slot.fetch_and(!mask, AcqRel);
            } else {
                entry = Entry(slot.fetch_and(!mask, AcqRel));
            }
        }
        self.note(index, entry.is_dirty());
    }

    /// The same of a larger page.
    fn note_large(&mut self, index: usize, slot: &AtomicU64, level: u32, mask: u64, clear: bool) {
        let mut entry = Entry(slot.load(Relaxed));
        if entry.0 & mask == 0 {
            return;
        }
        if clear {
            entry = Entry(slot.fetch_and(!mask, AcqRel));
        }
        if entry.kind(level) == Kind::Leaf {
            self.note(index, entry.is_dirty());
        } else if clear {
            // Replaced in between by a table, whose entries look used: it says so too.
            slot.fetch_or(entry.0 & mask, AcqRel);
        }
    }
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
            let found = self.find(at)?;
            let level = found.level;
            if level > 3 || found.kind() != Kind::Leaf {
                done += found.bytes_from(at);
                continue;
            }
            let size = leaf_bytes(level);
            let first = at.index(level);
            let end = (first as u64 + (bytes - done + at.as_u64() % size).div_ceil(size)).min(512) as usize;
            let mut batch = Batch {
                start: at.align_down(size),
                page_bytes: size,
                used: [0; 8],
                dirty: [0; 8],
                done: done + (end - first) as u64 * size - at.as_u64() % size,
            };
            let slots = &self.rest_of_table(found.slot, first)[..end - first];
            let mask = used.mask();
            if level == 1 {
                let groups = slots.chunks_exact(GROUP);
                let rest = groups.remainder();
                let mut index = 0;
                for group in groups {
                    // Most are clear.
                    if group.iter().fold(0, |all, slot| all | slot.load(Relaxed)) & mask != 0 {
                        for (bit, slot) in group.iter().enumerate() {
                            batch.note_small(index + bit, slot, mask, clear);
                        }
                    }
                    index += GROUP;
                }
                for (bit, slot) in rest.iter().enumerate() {
                    batch.note_small(index + bit, slot, mask, clear);
                }
                return Ok(Some(batch));
            }
            for (index, slot) in slots.iter().enumerate() {
                let entry = Entry(slot.load(Relaxed));
                if entry.kind(level) == Kind::Table {
                    // The next batch is of that table.
                    batch.done = done + index as u64 * size - (at.as_u64() % size).min(index as u64 * size);
                    break;
                }
                batch.note_large(index, slot, level, mask, clear);
            }
            return Ok(Some(batch));
        }
        Ok(None)
    }
}
