// SPDX-License-Identifier: MIT OR Apache-2.0

//! Barriers in Dune mode: the dirty bits of the program's own page table, or its protection and a #PF handler.

use libdune::paging::Used;
use libdune::AddressSpace;
use libdune::Dune;
use libdune::Gva;
use libdune::Outcome;
use libdune::PagingError;
use libdune::Permissions;
use libdune::Thread;
use libdune::TrapFrame;
use libdune::Vector;

use super::Barrier;
use super::BarrierError;
use super::Notes;
use crate::heap::Memory;
use crate::heap::PAGE;

fn start(memory: &Memory) -> Result<Gva, BarrierError> {
    Ok(Gva::new(memory.address() as u64).ok_or(PagingError::Foreign)?)
}

/// The bit that the CPU sets in the page table's entry at the first write: read and cleared.
pub struct DirtyBits<'d> {
    space: AddressSpace<'d>,
    start: Gva,
    bytes: u64,
}

impl<'d> DirtyBits<'d> {
    pub fn new(dune: &'d Dune, memory: &Memory) -> Result<Self, BarrierError> {
        let (space, start, bytes) = (dune.address_space(), start(memory)?, memory.bytes() as u64);
        // From here on by pages of 4 KiB.
        space.clear_accessed_dirty(start, bytes)?.flush();
        Ok(Self { space, start, bytes })
    }
}

impl Barrier for DirtyBits<'_> {
    fn take_written(&mut self, pages: &mut Vec<usize>) -> Result<(), BarrierError> {
        let start = self.start.as_u64();
        let name = |page: libdune::paging::UsedPage| pages.push((page.start.as_u64() - start) as usize / PAGE);
        // The pages are looked at only behind the flush: what is written before it need not be named again.
        self.space.take_used(self.start, self.bytes, Used::Dirty, name)?.flush();
        Ok(())
    }
}

/// Pages without write permission, and a handler of page faults.
pub struct Protection<'d> {
    dune: &'d Dune,
    notes: Notes,
    start: Gva,
    bytes: u64,
}

impl<'d> Protection<'d> {
    pub fn new(dune: &'d Dune, memory: &Memory) -> Result<Self, BarrierError> {
        let barrier = Self {
            dune,
            notes: Notes::new(memory.address(), memory.pages),
            start: start(memory)?,
            bytes: memory.bytes() as u64,
        };
        dune.set_exception_handler(Vector::PF, note_write);
        barrier.protect(Permissions::READ)?;
        Ok(barrier)
    }

    fn protect(&self, permissions: Permissions) -> Result<(), BarrierError> {
        self.dune
            .address_space()
            .protect(self.start, self.bytes, permissions)?
            .flush();
        Ok(())
    }
}

fn note_write(frame: &mut TrapFrame, thread: &Thread<'_>) -> Outcome {
    let page = Notes::note(frame.cr2 as usize).and_then(|page| Gva::new(page as u64));
    let Some(page) = page.filter(|_| !frame.host_refused()) else {
        return Outcome::Unhandled;
    };
    match thread.address_space().protect(page, PAGE as u64, Permissions::ALL) {
        // More access: a stale translation only faults again.
        Ok(flush) => flush.ignore(),
        Err(_) => return Outcome::Unhandled,
    }
    Outcome::Resume
}

impl Barrier for Protection<'_> {
    fn take_written(&mut self, pages: &mut Vec<usize>) -> Result<(), BarrierError> {
        self.notes.take(pages);
        self.protect(Permissions::READ)
    }
}

impl Drop for Protection<'_> {
    fn drop(&mut self) {
        let _ = self.protect(Permissions::ALL);
        self.dune.clear_exception_handler(Vector::PF);
    }
}
