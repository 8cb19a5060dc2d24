// SPDX-License-Identifier: MIT OR Apache-2.0

//! The page tables of a process: a record of each, found by number. The number is the PCID, too.
//!
//! # Safety
//!
//! Records lie in the arena, zeroed at first. A record's tables are freed when its last user is gone: handles, threads
//! that have it in CR3, and the process for the default table.

use core::ptr;
use core::sync::atomic::AtomicPtr;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::AcqRel;
use core::sync::atomic::Ordering::Acquire;
use core::sync::atomic::Ordering::Relaxed;
use core::sync::atomic::Ordering::Release;

use super::memory::Memory;
use super::pool;
use super::tree::Tree;
use super::PagingError;
use crate::addr::Gpa;
use crate::addr::Gva;
use crate::layout;

/// Number of the default table.
pub(crate) const DEFAULT: u16 = 0;

/// CR3: keep what the TLB has of the new PCID (SDM, "Operations that Invalidate TLBs and Paging-Structure Caches").
const KEEP: u64 = 1 << 63;

/// One page table.
///
/// # Invariants
///
/// `users` is not 0 from before `root` is published until the tables are freed. `generation` never goes back, whoever has
/// the record.
#[repr(C, align(64))]
pub(crate) struct Record {
    /// GPA of the top table; 0 where the record is free.
    root: AtomicU64,
    pub generation: AtomicU64,
    users: AtomicU32,
    /// 1: the program may replace tables by itself. Then none is remembered.
    is_by_hand: AtomicU32,
    /// The pool that copies come from; null if there is none.
    pool: AtomicPtr<pool::Header>,
    /// Where tables are whose entries map 4 KiB, of 2 MiB that were changed lately: the address of the 2 MiB, and in its lower
    /// bits the number of the table's page. Used and written by who keeps slots from being recycled (`recycle`);
    /// `NOWHERE` if there is none.
    lately: [AtomicU64; LATELY],
}

const LATELY: usize = 4;
/// Not a canonical address.
const NOWHERE: u64 = 1 << 63;
/// Bits of an address inside 2 MiB.
const LARGE_SHIFT: u32 = 21;

const _: () = assert!(layout::ARENA_BYTES / layout::PAGE <= 1 << LARGE_SHIFT);

const fn lately_index(gva: Gva) -> usize {
    (gva.as_u64() >> LARGE_SHIFT) as usize % LATELY
}

const _: () = assert!(size_of::<Record>() == layout::TABLE_BYTES);

/// Which table: the number of a record, or the root of a tree that has none.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Name(u64);

impl Name {
    #[inline]
    pub const fn of(number: u16) -> Self {
        Self(number as u64)
    }

    /// A tree without a record. No table lies in the first pages of GPA space, which are told from numbers so.
    pub fn foreign(root: Gpa) -> Self {
        Self(root.as_u64().max(layout::TABLE_COUNT as u64))
    }

    #[inline]
    pub fn number(self) -> Option<u16> {
        (self.0 < layout::TABLE_COUNT as u64).then_some(self.0 as u16)
    }

    #[inline]
    pub fn root(self, memory: &Memory) -> Gpa {
        match self.number() {
            Some(number) => Tables(memory).get(number).root(),
            None => Gpa::known(self.0),
        }
    }
}

/// Taken, but without a root yet.
const RESERVED: u64 = 1;

/// The records of a process.
#[derive(Clone, Copy)]
pub(crate) struct Tables<'m>(&'m Memory);

impl<'m> Tables<'m> {
    #[inline]
    pub fn new(memory: &'m Memory) -> Self {
        Self(memory)
    }

    #[inline]
    pub fn get(self, number: u16) -> &'m Record {
        let index = usize::from(number) % layout::TABLE_COUNT;
        let address = self.0.start() + (layout::TABLES + index * layout::TABLE_BYTES) as u64;
        // SAFETY: In bounds, in the arena, which lives as long as `Memory`; all fields are atomic.
        unsafe { &*(address as *const Record) }
    }

    /// Takes a record for a tree, with one user.
    pub fn add(self, tree: impl FnOnce() -> Result<Gpa, PagingError>) -> Result<u16, PagingError> {
        for number in 0..layout::TABLE_COUNT as u16 {
            let record = self.get(number);
            if record.root.load(Relaxed) != 0 || record.root.compare_exchange(0, RESERVED, Acquire, Relaxed).is_err() {
                continue;
            }
            return match tree() {
                Ok(root) => {
                    record.is_by_hand.store(0, Relaxed);
                    record.forget_tables();
                    // What threads have flushed for is of the table before.
                    record.generation.fetch_add(1, AcqRel);
                    record.users.store(1, Relaxed);
                    record.root.store(root.as_u64(), Release);
                    Ok(number)
                }
                Err(error) => {
                    record.root.store(0, Release);
                    Err(error)
                }
            };
        }
        Err(PagingError::OutOfTables)
    }

    /// The table with this root.
    pub fn find(self, root: Gpa) -> Option<u16> {
        let is_it = |number: &u16| self.get(*number).root.load(Acquire) == root.as_u64();
        (root.as_u64() > RESERVED)
            .then(|| (0..layout::TABLE_COUNT as u16).find(is_it))
            .flatten()
    }

    /// Counts one more user of a table that has one.
    #[inline]
    pub fn hold(self, number: u16) {
        self.get(number).users.fetch_add(1, Relaxed);
    }

    /// Counts a user out; the last one frees the tables.
    #[inline]
    pub fn let_go(self, number: u16) {
        if self.get(number).users.fetch_sub(1, AcqRel) == 1 {
            self.free(number);
        }
    }

    /// Frees the tables, which have no user.
    #[cold]
    #[inline(never)]
    fn free(self, number: u16) {
        let record = self.get(number);
        {
            let tree = Tree {
                frames: self.0,
                root: record.root(),
            };
            let _using = self.0.begin();
            tree.free();
        }
        let pool = record.pool.swap(ptr::null_mut(), AcqRel);
        if !pool.is_null() {
            // SAFETY: The record's own count; none of its entries is left.
            unsafe { pool::Header::let_go(pool) };
        }
        record.root.store(0, Release);
    }
}

impl Record {
    #[inline]
    pub fn root(&self) -> Gpa {
        Gpa::known(self.root.load(Relaxed))
    }

    /// The number of the page of the pool that is the table with the entry for `gva`, if that was
    /// [remembered](Self::remember). It stays so as long as nobody gives tables back.
    #[inline]
    pub fn table_page(&self, gva: Gva) -> Option<u64> {
        let found = self.lately[lately_index(gva)].load(Acquire);
        ((found ^ gva.as_u64()) >> LARGE_SHIFT == 0).then_some(found & ((1 << LARGE_SHIFT) - 1))
    }

    /// Remembers where an entry for 4 KiB is.
    pub fn remember(&self, memory: &Memory, gva: Gva, entry: &AtomicU64) {
        if self.is_by_hand.load(Relaxed) != 0 {
            return;
        }
        let start = gva.align_down(1 << LARGE_SHIFT).as_u64();
        self.lately[lately_index(gva)].store(start | memory.page_of(entry), Release);
    }

    /// The program has what it needs to replace tables by itself.
    pub fn edit_by_hand(&self) {
        if self.is_by_hand.swap(1, Relaxed) == 0 {
            self.forget_tables();
        }
    }

    /// Forgets what was remembered: nobody uses it meanwhile, and tables are about to be given back.
    pub fn forget_tables(&self) {
        for word in &self.lately {
            word.store(NOWHERE, Relaxed);
        }
    }

    /// The pool that copies come from.
    pub fn pool(&self) -> Option<&pool::Header> {
        // SAFETY: Held by the record as long as it has it.
        unsafe { self.pool.load(Acquire).as_ref() }
    }

    /// Gives the table a pool, if it has none. `hold` counts the table in.
    pub fn set_pool(&self, pool: *const pool::Header) -> Result<(), PagingError> {
        if ptr::eq(self.pool.load(Acquire), pool) {
            return Ok(());
        }
        // SAFETY: The caller's pool is alive.
        unsafe { (*pool).hold() };
        match self
            .pool
            .compare_exchange(ptr::null_mut(), pool.cast_mut(), AcqRel, Acquire)
        {
            Ok(_) => Ok(()),
            Err(other) => {
                // SAFETY: The count taken above.
                unsafe { pool::Header::let_go(pool) };
                if ptr::eq(other, pool) {
                    Ok(())
                } else {
                    Err(PagingError::OtherPool)
                }
            }
        }
    }

    /// What CR3 gets: with PCIDs the table's number, and whether the TLB keeps what it has of it.
    pub fn cr3(&self, number: u16, has_pcid: bool, keep: bool) -> u64 {
        cr3(self.root(), number, has_pcid, keep)
    }
}

fn cr3(root: Gpa, number: u16, has_pcid: bool, keep: bool) -> u64 {
    if has_pcid {
        root.as_u64() | u64::from(number) | if keep { KEEP } else { 0 }
    } else {
        root.as_u64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cr3_has_the_number_and_the_keep_bit_only_with_pcids() {
        let root = Gpa::new(0x12_3456_7000).unwrap();
        for number in 0..layout::TABLE_COUNT as u16 {
            assert_eq!(cr3(root, number, false, true), root.as_u64());
            assert_eq!(cr3(root, number, true, false), root.as_u64() + u64::from(number));
            let kept = cr3(root, number, true, true);
            assert_eq!(kept >> 63, 1);
            assert_eq!(kept & 0xfff, u64::from(number));
            assert_eq!(kept & !(1 << 63) & !0xfff, root.as_u64());
        }
    }
}
