// SPDX-License-Identifier: MIT OR Apache-2.0

//! What CPUs cache of page tables: forgetting it, here and on other CPUs, and going from table to table.
//!
//! # Safety
//!
//! MOV CR3, INVLPG and SGDT fault or mean something else outside CPL0; they are only executed after reading CS. Forgetting a
//! translation changes nothing that a program can rely on.

use core::arch::asm;
use core::fmt;
use core::marker::PhantomData;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;

use dune_abi::DUNE_FLUSH;

use super::pool;
use super::protocol;
use super::protocol::Here;
use super::tables::Name;
use super::tree::Retired;
use crate::addr::Gva;
use crate::addr::PAGE_BYTES;
use crate::layout;
use crate::process::Process;
use crate::sys;

/// Above this many pages it is cheaper to flush all.
pub(super) const FLUSH_ALL_PAGES: u64 = 64;

/// Whether the caller runs at CPL0, which a Linux process does in Dune mode only.
#[inline]
pub(crate) fn is_cpl0() -> bool {
    let selector: u16;
    // SAFETY: Reads CS.
    unsafe { asm!("mov {0:x}, cs", out(reg) selector, options(nomem, nostack, preserves_flags)) };
    selector & 3 == 0
}

#[inline]
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

/// GPA of the top table that CR3 holds.
#[inline]
pub(crate) fn loaded_root() -> u64 {
    read_cr3() & !(PAGE_BYTES - 1)
}

/// Forgets what the TLB has of one page of the loaded table. Does nothing outside Dune mode.
#[inline]
pub(crate) fn flush_page(gva: Gva) {
    if is_cpl0() {
        // SAFETY: At CPL0.
        unsafe { invlpg(gva) };
    }
}

#[inline]
unsafe fn invlpg(gva: Gva) {
    // SAFETY: The caller is at CPL0; forgetting a translation changes nothing else.
    unsafe { asm!("invlpg [{}]", in(reg) gva.as_u64(), options(nostack, preserves_flags)) };
}

/// Forgets what the TLB has of the loaded table. Does nothing outside Dune mode.
pub(crate) fn flush_all() {
    if is_cpl0() {
        // SAFETY: At CPL0, and the same table stays loaded.
        unsafe { write_cr3(read_cr3()) };
    }
}

/// The area of the calling thread, if it is in Dune mode: where its GDT is.
pub(crate) fn own_area(process: &Process) -> Option<u64> {
    #[repr(C, packed(2))]
    struct Pointer {
        limit: u16,
        base: u64,
    }
    if !is_cpl0() {
        return None;
    }
    let mut gdt = Pointer { limit: 0, base: 0 };
    // SAFETY: Writes ten bytes.
    unsafe { asm!("sgdt [{}]", in(reg) &raw mut gdt, options(nostack, preserves_flags)) };
    process.area_of(gdt.base)
}

/// The generations that the thread of an area flushed its TLB for.
///
/// # Safety
///
/// `area` must be a Dune thread's, alive for `'a`.
unsafe fn seen<'a>(area: u64, number: u16) -> &'a AtomicU64 {
    let index = usize::from(number) % layout::TABLE_COUNT;
    // SAFETY: The caller's; in bounds.
    unsafe { &*((area + layout::SEEN as u64) as *const AtomicU64).add(index) }
}

/// Has every Dune thread that may use old translations of these pages forget them, before this returns.
#[inline(never)]
pub(super) fn shoot_down(process: &Process, name: Name, start: Gva, pages: u64) {
    let number = name.number();
    let generation = number.map(|number| &process.tables().get(number).generation);
    let raised = generation.map(protocol::raise);
    let area = own_area(process);
    if area.is_some() && loaded_root() == name.root(&process.memory).as_u64() {
        flush_here(start, pages);
        if let (Some(area), Some(number), Some(raised)) = (area, number, raised) {
            // SAFETY: The calling thread's.
            let seen = unsafe { seen(area, number) };
            // Up to date before, and so it is now. A handler in between has raised it itself, or left it behind.
            if seen.load(Relaxed) == raised - 1 {
                seen.store(raised, Relaxed);
            }
        }
    }
    if process.others_use(number, area) {
        // SAFETY: The request has no argument.
        let _ = unsafe { sys::request(process.fd, DUNE_FLUSH, 0) };
    }
}

fn flush_here(start: Gva, pages: u64) {
    if pages > FLUSH_ALL_PAGES {
        flush_all();
    } else {
        for page in 0..pages {
            if let Some(gva) = start.checked_add(page * PAGE_BYTES) {
                flush_page(gva);
            }
        }
    }
}

/// Makes the calling thread, whose area this is, use a table.
///
/// # Safety
///
/// The thread must be at CPL0, and the table must have a user and map what runs.
#[inline(always)]
pub(crate) unsafe fn switch(process: &Process, area: u64, here: &Here, number: u16) {
    let tables = process.tables();
    let record = tables.get(number);
    tables.hold(number);
    // SAFETY: The calling thread's area; the rest is the caller's.
    let before = unsafe {
        here.switch(number, &record.generation, seen(area, number), |keep| {
            write_cr3(record.cr3(number, process.has_pcid, keep));
        })
    };
    if let Some(before) = before {
        tables.let_go(before);
    }
}

/// What TLBs may still hold after a change: flush it, or say that it does not matter.
///
/// Where it is dropped otherwise, frames of a pool that the change took out stay in use for good.
///
/// # Examples
///
/// ```no_run
/// # #[repr(align(4096))]
/// # struct Page([u8; 4096]);
/// use libdune::paging::Flush;
/// use libdune::{Dune, Gva, Permissions};
///
/// let page = Box::new(Page([0; 4096]));
/// let dune = Dune::enter()?;
/// let (space, start) = (dune.address_space(), Gva::of(&raw const *page).ok_or("not canonical")?);
/// // Threads may have the page as writable in their TLBs.
/// let flush: Flush<'_> = space.protect(start, 4096, Permissions::READ)?;
/// flush.flush();
/// // No other thread has used it since: this one need only look after itself.
/// space.protect(start, 4096, Permissions::NONE)?.flush_local();
/// // Who has it as read-only takes a page fault at worst.
/// space.protect(start, 4096, Permissions::ALL)?.ignore();
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "TLBs may still hold the old translation: call flush() or ignore()"]
pub struct Flush<'t> {
    process: *const Process,
    name: Name,
    start: Gva,
    pages: u64,
    /// Head of the list of [`Retired`].
    retired: u64,
    _table: PhantomData<&'t ()>,
}

impl fmt::Debug for Flush<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Flush({} + {} pages of {:?})", self.start, self.pages, self.name)
    }
}

impl Flush<'_> {
    /// `retired` are frames that the change took out.
    ///
    /// # Safety
    ///
    /// The table with this name must be alive, with its process, as long as this.
    #[inline]
    pub(super) unsafe fn new(process: *const Process, name: Name, start: Gva, pages: u64, retired: Retired) -> Self {
        Self {
            process,
            name,
            start,
            pages,
            retired: retired.0.get(),
            _table: PhantomData,
        }
    }

    /// Has the calling thread and every other Dune thread that may use old translations of the changed pages forget them,
    /// before this returns.
    ///
    /// Costs a system call where another thread has the table in CR3, else INVLPG per page, or MOV CR3 above 64 pages.
    #[inline(always)]
    pub fn flush(self) {
        // SAFETY: Alive as long as the table.
        let process = unsafe { &*self.process };
        if self.pages == 1
            && is_cpl0()
            && process.is_single()
            && loaded_root() == self.name.root(&process.memory).as_u64()
        {
            // Nobody else has translations of it, and this thread is up to date for its generation, or will flush then.
            // SAFETY: At CPL0.
            unsafe { invlpg(self.start) };
        } else {
            shoot_down(process, self.name, self.start, self.pages);
        }
        self.release();
    }

    /// The same for the calling thread only: no other has used the pages, or each flushes for itself.
    pub fn flush_local(self) {
        // SAFETY: Alive as long as the table.
        let process = unsafe { &*self.process };
        if is_cpl0() && loaded_root() == self.name.root(&process.memory).as_u64() {
            flush_here(self.start, self.pages);
        } else if let (Some(area), Some(number)) = (own_area(process), self.name.number()) {
            // The CPU may keep translations of a table that is not loaded: this thread goes to it as to one that it never had.
            // SAFETY: The calling thread's.
            unsafe { seen(area, number) }.store(protocol::NEVER, Relaxed);
        }
        self.release();
    }

    /// Leaves TLBs as they are: the change only added access, or no thread used the pages.
    #[inline]
    pub fn ignore(self) {
        self.release();
    }

    #[inline]
    fn release(self) {
        if self.retired != 0 {
            release(self.retired);
        }
    }
}

#[cold]
#[inline(never)]
fn release(retired: u64) {
    // SAFETY: The callers' table, whose pool it is, is alive; the flush is done, or the caller says that none is needed.
    unsafe { pool::Header::release_retired(&Retired(retired.into())) };
}
