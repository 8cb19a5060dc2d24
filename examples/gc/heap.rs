// SPDX-License-Identifier: MIT OR Apache-2.0

//! Cells of one size, and a mark-sweep collector for them with sticky marks.
//!
//! What survived a collection stays marked: it is *old*. A minor collection marks from the roots and from the old cells
//! that lie in pages written to since the last one, and frees those of the new cells that it did not reach. Which pages
//! those are the write barrier says. A full collection, when room gets scarce, forgets all marks.
//!
//! Marks, free cells and new ones are kept beside the heap: the collector never writes to it.
//!
//! # Safety
//!
//! The heap is memory that is accessed by raw pointers, whose cell was found to be in bounds and in use before.

use std::io;
use std::ptr;

use dune_examples::ticks;

use crate::barrier::Barrier;
use crate::barrier::BarrierError;

pub const PAGE: usize = 4096;
const CELL_BYTES: usize = 64;
const CELLS_PER_PAGE: usize = PAGE / CELL_BYTES;
/// References of a cell.
pub const REFS: usize = 8;
/// Roots of the program.
pub const ROOTS: usize = 4;

/// A reference to a cell, or to none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ref(u32);

impl Ref {
    pub const NONE: Self = Self(0);

    pub fn is_none(self) -> bool {
        self == Self::NONE
    }

    fn index(self) -> usize {
        self.0 as usize - 1
    }
}

/// A cell as it lies in memory.
#[repr(C, align(64))]
struct Cell {
    refs: [Ref; REFS],
    key: u64,
    value: u64,
}

const _: () = assert!(size_of::<Cell>() == CELL_BYTES);

/// What can go wrong. The second is what a write barrier that forgets a write leads to.
#[derive(Debug, thiserror::Error)]
pub enum GcError {
    #[error("the heap is full of live cells: give it more")]
    Full,
    #[error("cell {0} is used after it was freed")]
    Dangling(u32),
    #[error("{0}: the live graph differs from the model: {1}")]
    Differs(&'static str, String),
    #[error("mmap of the heap: {0}")]
    Memory(io::Error),
    #[error(transparent)]
    Barrier(#[from] BarrierError),
}

/// Memory of the process, by pages of 4 KiB, all there, and one page behind it that nobody uses.
pub struct Memory {
    start: *mut u8,
    pub pages: usize,
}

impl Memory {
    pub fn new(pages: usize) -> Result<Self, GcError> {
        let bytes = (pages + 1) * PAGE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: A fresh mapping, and advice about it.
        unsafe {
            let start = libc::mmap(ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            if start == libc::MAP_FAILED {
                return Err(GcError::Memory(io::Error::last_os_error()));
            }
            let memory = Self {
                start: start.cast(),
                pages,
            };
            for advice in [libc::MADV_NOHUGEPAGE, libc::MADV_POPULATE_WRITE] {
                if libc::madvise(start, bytes, advice) != 0 {
                    return Err(GcError::Memory(io::Error::last_os_error()));
                }
            }
            Ok(memory)
        }
    }

    pub fn address(&self) -> usize {
        self.start as usize
    }

    pub fn bytes(&self) -> usize {
        self.pages * PAGE
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: Mapped in `new`, and nobody refers to it any more.
        unsafe { libc::munmap(self.start.cast(), (self.pages + 1) * PAGE) };
    }
}

/// A bit per cell.
struct Bits(Vec<u64>);

impl Bits {
    fn new(count: usize) -> Self {
        Self(vec![0; count.div_ceil(64)])
    }

    fn get(&self, index: usize) -> bool {
        self.0[index / 64] >> (index % 64) & 1 != 0
    }

    fn set(&mut self, index: usize, value: bool) {
        let bit = 1 << (index % 64);
        if value {
            self.0[index / 64] |= bit;
        } else {
            self.0[index / 64] &= !bit;
        }
    }
}

/// What the collections took.
#[derive(Default)]
pub struct Times {
    /// Ticks of each minor collection, and of what of it was asking the barrier.
    pub minor: Vec<u64>,
    pub asking: Vec<u64>,
    /// Pages that the barrier named.
    pub pages: Vec<u64>,
    /// Ticks of each full collection.
    pub full: Vec<u64>,
}

/// The heap with its collector.
pub struct Heap<'b> {
    // First: it may still use the memory when it goes.
    barrier: Box<dyn Barrier + 'b>,
    memory: Memory,
    pub roots: [Ref; ROOTS],
    marks: Bits,
    in_use: Bits,
    free: Vec<u32>,
    /// Cells that were allocated since the last collection.
    new: Vec<u32>,
    nursery: usize,
    /// To be marked; named pages. Kept, so that a collection allocates nothing.
    work: Vec<Ref>,
    pages: Vec<usize>,
    pub times: Times,
}

impl<'b> Heap<'b> {
    /// A heap in `memory` that is collected each time `nursery` cells were allocated.
    pub fn new(memory: Memory, barrier: Box<dyn Barrier + 'b>, nursery: usize) -> Self {
        let cells = memory.pages * CELLS_PER_PAGE;
        Self {
            marks: Bits::new(cells),
            in_use: Bits::new(cells),
            free: (1..=cells as u32).rev().collect(),
            new: Vec::with_capacity(cells),
            nursery,
            work: Vec::with_capacity(cells),
            pages: Vec::with_capacity(memory.pages),
            roots: [Ref::NONE; ROOTS],
            times: Times::default(),
            memory,
            barrier,
        }
    }

    fn cell(&self, at: Ref) -> Result<*mut Cell, GcError> {
        let is_cell = !at.is_none() && at.index() < self.memory.pages * CELLS_PER_PAGE;
        if !is_cell || !self.in_use.get(at.index()) {
            return Err(GcError::Dangling(at.0));
        }
        // SAFETY: In bounds.
        Ok(unsafe { self.memory.start.cast::<Cell>().add(at.index()) })
    }

    /// A new cell. It lives while a root leads to it at each [`Heap::pause`].
    pub fn allocate(&mut self, key: u64, value: u64) -> Result<Ref, GcError> {
        let at = Ref(self.free.pop().ok_or(GcError::Full)?);
        self.in_use.set(at.index(), true);
        self.new.push(at.0);
        let refs = [Ref::NONE; REFS];
        // SAFETY: A cell that nobody has.
        unsafe { self.cell(at)?.write(Cell { refs, key, value }) };
        Ok(at)
    }

    pub fn get(&self, at: Ref, index: usize) -> Result<Ref, GcError> {
        // SAFETY: A cell in use.
        Ok(unsafe { (*self.cell(at)?).refs[index] })
    }

    /// Writes a reference. There is no barrier here: that is the page table's business.
    pub fn set(&mut self, at: Ref, index: usize, to: Ref) -> Result<(), GcError> {
        // SAFETY: As above; volatile, because others learn of it by the page.
        unsafe { (&raw mut (*self.cell(at)?).refs[index]).write_volatile(to) };
        Ok(())
    }

    pub fn key(&self, at: Ref) -> Result<u64, GcError> {
        // SAFETY: As above.
        Ok(unsafe { (*self.cell(at)?).key })
    }

    pub fn value(&self, at: Ref) -> Result<u64, GcError> {
        // SAFETY: As above.
        Ok(unsafe { (*self.cell(at)?).value })
    }

    pub fn set_entry(&mut self, at: Ref, key: u64, value: u64) -> Result<(), GcError> {
        let cell = self.cell(at)?;
        // SAFETY: As above.
        unsafe {
            (&raw mut (*cell).key).write_volatile(key);
            (&raw mut (*cell).value).write_volatile(value);
        }
        Ok(())
    }

    /// Where the program can be interrupted: everything that it still needs can be reached from the roots.
    pub fn pause(&mut self) -> Result<(), GcError> {
        if self.new.len() < self.nursery {
            return Ok(());
        }
        let start = ticks();
        let is_full = self.free.len() < 2 * self.nursery;
        self.collect(is_full)?;
        let taken = ticks() - start;
        if is_full {
            self.times.full.push(taken);
        } else {
            self.times.minor.push(taken);
        }
        if self.free.len() < 2 * self.nursery && is_full {
            return Err(GcError::Full);
        }
        Ok(())
    }

    fn collect(&mut self, is_full: bool) -> Result<(), GcError> {
        let start = ticks();
        self.pages.clear();
        self.barrier.take_written(&mut self.pages)?;
        if is_full {
            self.marks.0.fill(0);
        } else {
            self.times.asking.push(ticks() - start);
            self.times.pages.push(self.pages.len() as u64);
            self.remember()?;
        }
        self.work.extend(self.roots.iter().filter(|root| !root.is_none()));
        while let Some(at) = self.work.pop() {
            if !self.marks.get(at.index()) {
                self.marks.set(at.index(), true);
                self.push_references(at)?;
            }
        }
        if is_full {
            let cells = self.memory.pages * CELLS_PER_PAGE;
            (0..cells).for_each(|index| self.sweep(index));
        } else {
            let new = std::mem::take(&mut self.new);
            new.iter().for_each(|at| self.sweep(Ref(*at).index()));
            self.new = new;
        }
        self.new.clear();
        Ok(())
    }

    /// What old cells in named pages refer to is to be marked.
    fn remember(&mut self) -> Result<(), GcError> {
        let pages = std::mem::take(&mut self.pages);
        for page in &pages {
            for index in page * CELLS_PER_PAGE..(page + 1) * CELLS_PER_PAGE {
                if self.marks.get(index) {
                    self.push_references(Ref(index as u32 + 1))?;
                }
            }
        }
        self.pages = pages;
        Ok(())
    }

    fn push_references(&mut self, at: Ref) -> Result<(), GcError> {
        for index in 0..REFS {
            let to = self.get(at, index)?;
            if !to.is_none() && !self.marks.get(to.index()) {
                self.work.push(to);
            }
        }
        Ok(())
    }

    fn sweep(&mut self, index: usize) {
        if self.in_use.get(index) && !self.marks.get(index) {
            self.in_use.set(index, false);
            self.free.push(index as u32 + 1);
        }
    }

    /// Cells that are in use, garbage among them.
    #[cfg(test)]
    fn used(&self) -> usize {
        self.memory.pages * CELLS_PER_PAGE - self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names every page, or none.
    struct Fixed(usize);

    impl Barrier for Fixed {
        fn take_written(&mut self, pages: &mut Vec<usize>) -> Result<(), BarrierError> {
            pages.extend(0..self.0);
            Ok(())
        }
    }

    fn heap(named: usize) -> Heap<'static> {
        Heap::new(Memory::new(2).unwrap(), Box::new(Fixed(named)), 8)
    }

    /// A root whose first reference is a chain of new cells.
    fn chain(heap: &mut Heap<'_>, cells: usize) {
        let old = heap.roots[0];
        for key in 0..cells {
            let cell = heap.allocate(key as u64, 0).unwrap();
            let before = heap.get(old, 0).unwrap();
            heap.set(cell, 0, before).unwrap();
            heap.set(old, 0, cell).unwrap();
        }
    }

    #[test]
    fn garbage_goes_and_what_is_reached_stays() {
        let mut heap = heap(2);
        heap.roots[0] = heap.allocate(1, 2).unwrap();
        heap.collect(false).unwrap();
        chain(&mut heap, 10);
        for _ in 0..5 {
            heap.allocate(9, 9).unwrap();
        }
        heap.collect(false).unwrap();
        assert_eq!(heap.used(), 11);
        let root = heap.roots[0];
        heap.set(root, 0, Ref::NONE).unwrap();
        heap.collect(false).unwrap();
        assert_eq!(heap.used(), 11, "old garbage stays");
        heap.collect(true).unwrap();
        assert_eq!(heap.used(), 1);
        assert_eq!((heap.key(root).unwrap(), heap.value(root).unwrap()), (1, 2));
    }

    #[test]
    fn a_barrier_that_forgets_is_noticed() {
        let mut heap = heap(0);
        heap.roots[0] = heap.allocate(1, 2).unwrap();
        heap.collect(false).unwrap();
        chain(&mut heap, 3);
        heap.collect(false).unwrap();
        let first = heap.get(heap.roots[0], 0).unwrap();
        assert!(matches!(heap.key(first), Err(GcError::Dangling(_))));
    }

    #[test]
    fn a_full_heap_is_told() {
        let mut heap = heap(2);
        heap.roots[0] = heap.allocate(1, 2).unwrap();
        let mut result = Ok(());
        for _ in 0..100 {
            chain(&mut heap, 4);
            result = heap.pause();
            if result.is_err() {
                break;
            }
        }
        assert!(matches!(result, Err(GcError::Full)));
    }
}
