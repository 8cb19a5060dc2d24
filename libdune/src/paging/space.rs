// SPDX-License-Identifier: MIT OR Apache-2.0

//! A guest address space: one tree of tables, and the TLB.
//!
//! # Safety
//!
//! MOV CR3 and INVLPG fault outside CPL0; they are only executed after reading CS. A changed page table can take
//! memory away from compiled code: that is what it is for, and the functions that can do it say so.

use core::arch::asm;
use core::marker::PhantomData;

use super::memory::recycle::with_slots;
use super::memory::Memory;
use super::tree::Mapping;
use super::tree::Tree;
use super::PagingError;
use super::Permissions;
use crate::addr::Gpa;
use crate::addr::Gva;
use crate::addr::Hva;
use crate::addr::PAGE_BYTES;

/// Above this many pages it is cheaper to flush all.
const FLUSH_ALL_PAGES: u64 = 64;

/// Whether the caller runs at CPL0, which a Linux process does in Dune mode only.
pub(crate) fn is_cpl0() -> bool {
    let selector: u16;
    // SAFETY: Reads CS.
    unsafe { asm!("mov {0:x}, cs", out(reg) selector, options(nomem, nostack, preserves_flags)) };
    selector & 3 == 0
}

pub(crate) fn read_cr3() -> u64 {
    let value: u64;
    // SAFETY: The callers are at CPL0.
    unsafe { asm!("mov {}, cr3", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

unsafe fn write_cr3(value: u64) {
    // SAFETY: The caller is at CPL0 and the table maps what runs.
    unsafe { asm!("mov cr3, {}", in(reg) value, options(nostack, preserves_flags)) };
}

/// Flushes one page from the TLB. Does nothing outside Dune mode.
pub fn flush_page(gva: Gva) {
    if is_cpl0() {
        // SAFETY: At CPL0; forgetting a translation changes nothing else.
        unsafe { asm!("invlpg [{}]", in(reg) gva.as_u64(), options(nostack, preserves_flags)) };
    }
}

/// Flushes all pages from the TLB. Does nothing outside Dune mode.
pub fn flush_all() {
    if is_cpl0() {
        // SAFETY: At CPL0, and the same table stays loaded.
        unsafe { write_cr3(read_cr3()) };
    }
}

/// What the TLB may still hold after a change: flush it, or say that it does not matter.
#[must_use = "the TLB may still hold the old translation: call flush() or ignore()"]
#[derive(Debug)]
pub struct Flush {
    start: Gva,
    pages: u64,
}

impl Flush {
    /// Flushes the changed pages.
    pub fn flush(self) {
        if self.pages > FLUSH_ALL_PAGES {
            flush_all();
        } else {
            for page in 0..self.pages {
                if let Some(gva) = self.start.checked_add(page * PAGE_BYTES) {
                    flush_page(gva);
                }
            }
        }
    }

    /// Leaves the TLB as it is: the change only added access, or the table is not loaded.
    pub fn ignore(self) {}
}

/// A page table of the Dune thread.
///
/// Lives at most as long as the Dune mode that it was made in.
pub struct AddressSpace<'d> {
    memory: *const Memory,
    root: Gpa,
    owned: bool,
    _dune: PhantomData<&'d Memory>,
}

impl<'d> AddressSpace<'d> {
    /// The space with this root.
    ///
    /// # Safety
    ///
    /// `root` must be the root of a tree in `memory`, both alive for `'d`.
    pub(crate) unsafe fn borrowed(memory: &'d Memory, root: Gpa) -> Self {
        Self {
            memory,
            root,
            owned: false,
            _dune: PhantomData,
        }
    }

    fn tree(&self) -> Tree<'d, Memory> {
        // SAFETY: Alive for 'd.
        let frames = unsafe { &*self.memory };
        Tree {
            frames,
            root: self.root,
        }
    }

    /// Does something that may need slots.
    fn change<T>(&self, operation: impl Fn(Tree<'d, Memory>) -> Result<T, PagingError>) -> Result<T, PagingError> {
        with_slots(self.tree().frames, || operation(self.tree()))
    }

    /// GPA of the top table: what CR3 holds while the space is loaded.
    pub fn root(&self) -> Gpa {
        self.root
    }

    /// What an address is mapped to; `None` where nothing is, also in a GiB that was not used yet.
    pub fn look_up(&self, gva: Gva) -> Option<Mapping> {
        self.tree().look_up(gva)
    }

    /// The HVA of what is mapped at an address.
    pub fn hva(&self, gva: Gva) -> Option<Hva> {
        let mapping = self.look_up(gva)?;
        // SAFETY: Alive for 'd.
        unsafe { &*self.memory }.hva(mapping.gpa)
    }

    /// Gives whole pages other permissions. Pages with [`Permissions::NONE`] keep what they are mapped to.
    ///
    /// # Errors
    ///
    /// See [`PagingError`]; pages before the one that failed are changed.
    pub fn protect(&self, start: Gva, bytes: u64, permissions: Permissions) -> Result<Flush, PagingError> {
        self.change(|tree| tree.protect(start, bytes, permissions))
            .map(|()| flush(start, bytes))
    }

    /// Maps whole pages to the memory of the process at `to`.
    ///
    /// # Errors
    ///
    /// See [`PagingError`]; pages before the one that failed are changed.
    pub fn map(&self, start: Gva, bytes: u64, to: Hva, permissions: Permissions) -> Result<Flush, PagingError> {
        self.change(|tree| tree.map(start, bytes, to, permissions))
            .map(|()| flush(start, bytes))
    }

    /// Takes whole pages out of the table. The process still has what lies there.
    ///
    /// # Errors
    ///
    /// See [`PagingError`]; pages before the one that failed are changed.
    pub fn unmap(&self, start: Gva, bytes: u64) -> Result<Flush, PagingError> {
        self.change(|tree| tree.unmap(start, bytes))
            .map(|()| flush(start, bytes))
    }

    /// Lets CPL3 use whole pages too, or no longer.
    ///
    /// # Errors
    ///
    /// See [`PagingError`]; pages before the one that failed are changed.
    pub fn set_user(&self, start: Gva, bytes: u64, user: bool) -> Result<Flush, PagingError> {
        self.change(|tree| tree.set_user(start, bytes, user))
            .map(|()| flush(start, bytes))
    }

    /// Clears the accessed and dirty bits of whole pages, which are mapped by 4 KiB leaves from then on.
    ///
    /// # Errors
    ///
    /// See [`PagingError`]; pages before the one that failed are changed.
    pub fn clear_accessed_dirty(&self, start: Gva, bytes: u64) -> Result<Flush, PagingError> {
        self.change(|tree| tree.clear_accessed_dirty(start, bytes))
            .map(|()| flush(start, bytes))
    }

    /// A space with tables of its own that maps the same.
    ///
    /// # Errors
    ///
    /// [`PagingError::OutOfMemory`] and what getting more memory can give.
    pub fn duplicate(&self) -> Result<AddressSpace<'d>, PagingError> {
        let tree = self.change(|tree| tree.duplicate())?;
        Ok(Self {
            memory: self.memory,
            root: tree.root,
            owned: true,
            _dune: PhantomData,
        })
    }

    /// Whether CR3 holds this space.
    pub fn is_loaded(&self) -> bool {
        is_cpl0() && read_cr3() & !(PAGE_BYTES - 1) == self.root.as_u64()
    }

    /// Makes the CPU use this space. Does nothing outside Dune mode.
    ///
    /// # Safety
    ///
    /// The space must map the code that runs, its stack, libdune and what libdune keeps for the thread, as the
    /// default space and its duplicates do unless that was taken out.
    pub unsafe fn load(&self) {
        if is_cpl0() {
            // SAFETY: At CPL0; the rest is the caller's.
            unsafe { write_cr3(self.root.as_u64()) };
        }
    }
}

impl Drop for AddressSpace<'_> {
    /// Gives the tables of a duplicate back, unless the CPU uses them.
    fn drop(&mut self) {
        if self.owned && !self.is_loaded() {
            let tree = self.tree();
            let _using = tree.frames.begin();
            tree.free();
        }
    }
}

fn flush(start: Gva, bytes: u64) -> Flush {
    Flush {
        start,
        pages: bytes / PAGE_BYTES,
    }
}
