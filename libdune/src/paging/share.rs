// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pages of which a write gets a copy, and who counts as a user of a frame.

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::AcqRel;
use core::sync::atomic::Ordering::Relaxed;

use super::entry::Entry;
use super::entry::Kind;
use super::tree::Frames;
use super::tree::Retired;
use super::tree::Tree;
use super::PagingError;
use crate::addr::Gpa;
use crate::addr::Gva;

/// What came of a write to a page that may be shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unshared {
    /// The page is not one of which a write gets a copy.
    NotShared,
    /// The frame was nobody else's any more: it may be written to.
    Alone,
    /// A copy is mapped now; the frame of a pool that was mapped before, if it was one, is to be released when no CPU has
    /// it any more.
    Copied { released: Option<Gpa> },
}

impl<F: Frames> Tree<'_, F> {
    /// Settles a write to a shared page: what it maps is copied by `copy`, which gives the copy's frame.
    ///
    /// `is_last` says whether an owned frame has no other user. Returns whether the write can be done now, and the frame
    /// that is not mapped any more.
    pub fn unshare(
        &self,
        gva: Gva,
        is_last: impl Fn(Gpa) -> bool,
        copy: impl Fn() -> Result<Gpa, PagingError>,
    ) -> Result<Unshared, PagingError> {
        loop {
            let found = self.find(gva)?;
            let (slot, entry) = (found.slot, found.entry);
            if found.kind() != Kind::Leaf || !entry.is_copied_on_write() {
                return Ok(Unshared::NotShared);
            }
            if found.level > 1 {
                self.split(found)?;
                continue;
            }
            let old = Gpa::new(entry.address()).ok_or(PagingError::Corrupt(entry.address()))?;
            if entry.is_owner() && is_last(old) {
                let alone = entry.without_sharing();
                if slot.compare_exchange(entry.0, alone.0, AcqRel, Relaxed).is_ok() {
                    return Ok(Unshared::Alone);
                }
                continue;
            }
            let frame = copy()?;
            let own = entry.with_own_frame(frame);
            if slot.compare_exchange(entry.0, own.0, AcqRel, Relaxed).is_ok() {
                return Ok(Unshared::Copied {
                    released: entry.is_owner().then_some(old),
                });
            }
            // Nobody has seen the copy.
            self.frames.release(frame);
        }
    }

    /// What an entry that is no table holds now, its frame counted once more. A frame that another thread takes out of the
    /// table meanwhile may go to `retired`: that thread may not have flushed yet.
    pub(super) fn keep(&self, slot: &AtomicU64, mut entry: Entry, retired: &Retired) -> Entry {
        while entry.is_owner() {
            let Some(frame) = Gpa::new(entry.address()) else { break };
            let kept = self.frames.keep(frame);
            let now = Entry(slot.load(Relaxed));
            if kept && now.is_owner() && now.address() == entry.address() {
                return now;
            }
            if kept {
                self.frames.retire(frame, retired);
            }
            entry = now;
        }
        entry
    }
}
