// SPDX-License-Identifier: MIT OR Apache-2.0

//! Write barriers made of page tables: the program's own, and what Linux offers.

pub mod linux;
pub mod own;

use std::io;
use std::sync::atomic::AtomicPtr;
use std::sync::atomic::AtomicU8;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Acquire;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::Ordering::Release;

use libdune::PagingError;

use crate::heap::PAGE;

/// Why a barrier could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum BarrierError {
    #[error("{step}: {error}")]
    Linux { step: &'static str, error: io::Error },
    #[error(transparent)]
    Paging(#[from] PagingError),
}

impl BarrierError {
    /// What errno says about a step.
    pub fn last(step: &'static str) -> Self {
        Self::Linux {
            step,
            error: io::Error::last_os_error(),
        }
    }
}

/// Says which pages of the heap were written to.
pub trait Barrier {
    /// Adds the numbers of the pages that were written to since this was asked last (or it was made), and starts anew.
    fn take_written(&mut self, pages: &mut Vec<usize>) -> Result<(), BarrierError>;
}

/// Names no page: what the checks are for.
pub struct Forgetful;

impl Barrier for Forgetful {
    fn take_written(&mut self, _: &mut Vec<usize>) -> Result<(), BarrierError> {
        Ok(())
    }
}

/// Pages that a handler noted: it runs in the middle of anything, so all of it is static. One heap at a time.
static NOTES: AtomicPtr<AtomicU8> = AtomicPtr::new(std::ptr::null_mut());
static START: AtomicUsize = AtomicUsize::new(0);
static COUNT: AtomicUsize = AtomicUsize::new(0);

/// The notes, as long as they are needed.
struct Notes(Box<[AtomicU8]>);

impl Notes {
    fn new(start: usize, pages: usize) -> Self {
        let notes = Self((0..pages).map(|_| AtomicU8::new(0)).collect());
        START.store(start, Relaxed);
        COUNT.store(pages, Relaxed);
        NOTES.store(notes.0.as_ptr().cast_mut(), Release);
        notes
    }

    /// Notes a write; gives the address of the page if it is one of the heap's.
    fn note(address: usize) -> Option<usize> {
        let notes = NOTES.load(Acquire);
        let start = START.load(Relaxed);
        let index = address.checked_sub(start)? / PAGE;
        if notes.is_null() || index >= COUNT.load(Relaxed) {
            return None;
        }
        // SAFETY: Notes are there as long as the pointer is, one per page.
        unsafe { (*notes.add(index)).store(1, Relaxed) };
        Some(start + index * PAGE)
    }

    fn take(&self, pages: &mut Vec<usize>) {
        for (page, note) in self.0.iter().enumerate() {
            if note.load(Relaxed) != 0 {
                note.store(0, Relaxed);
                pages.push(page);
            }
        }
    }
}

impl Drop for Notes {
    fn drop(&mut self) {
        NOTES.store(std::ptr::null_mut(), Release);
    }
}
