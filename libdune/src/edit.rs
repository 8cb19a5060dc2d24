// SPDX-License-Identifier: MIT OR Apache-2.0

//! For programs that edit page tables entry by entry, in the manner of the first Dune: what the C ABI (`libdune-c`) is
//! made of. Rust programs have [`PageTable`] and [`Dune`](crate::Dune) instead.
//!
//! ```no_run
//! # #[repr(align(4096))]
//! # struct Page([u8; 4096]);
//! use std::sync::atomic::Ordering::Relaxed;
//!
//! use libdune::edit::{Missing, Shared};
//! use libdune::{Dune, Gva};
//!
//! let shared = Shared::keep(&Dune::builder())?;
//! let page = Box::new(Page([7; 4096]));
//! let dune = Dune::enter()?;
//! let start = Gva::of(&raw const *page).ok_or("not canonical")?;
//! let space = shared.address_space();
//! let entry = space.with_entry(start, 1, Missing::Tell, |entry| entry.word.load(Relaxed))?;
//! // The entry of 4 KiB that the CPU uses: present, at the page's GPA.
//! let hva = start.identity().ok_or("no address of a process")?;
//! assert_eq!(entry & 1, 1);
//! assert_eq!(entry & 0xf_ffff_f000, shared.gpa(hva)?.as_u64());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Safety
//!
//! [`Shared`] stays for the life of the process, so what it hands out does. What entries say is the program's business:
//! memory is only reached through them by the CPU.

use core::mem;

use crate::entry::build_process;
use crate::entry::Builder;
use crate::error::Result;
use crate::host_loop;
use crate::paging::tables::DEFAULT;
use crate::paging::tlb::own_area;
use crate::percpu::Block;
use crate::process;
use crate::process::Process;
use crate::AddressSpace;
use crate::Gpa;
use crate::Hva;
use crate::PageTable;
use crate::PagingError;
use crate::Thread;

pub use crate::host_loop::LastWords;
pub use crate::paging::edit::Missing;
pub use crate::paging::edit::RawEntry;
pub use crate::paging::edit::WHOLE;

/// What the Dune threads of the process share, made before the first one enters and kept for good.
#[derive(Clone, Copy, Debug)]
pub struct Shared {
    process: *const Process,
}

// SAFETY: What it leads to is atomic, or does not change.
unsafe impl Send for Shared {}
// SAFETY: As above.
unsafe impl Sync for Shared {}

impl Shared {
    /// Makes it, or finds it. A child of a process that was outside Dune mode has to make its own.
    ///
    /// # Errors
    ///
    /// See [`Error`](crate::Error).
    pub fn keep(options: &Builder) -> Result<Self> {
        if let Some(found) = Self::find() {
            return Ok(found);
        }
        let process = process::join(|arena| build_process(arena, options))?;
        // SAFETY: Counted in above, for good.
        unsafe { (*process).keep() };
        Ok(Self { process })
    }

    /// The one that was made in this process.
    pub fn find() -> Option<Self> {
        let process = process::find()?;
        // SAFETY: Where it was kept it stays, and where not it is looked at and forgotten: the arena stays as long as a Dune
        // thread, and a program that has the C ABI keeps its own first.
        unsafe { (*process).is_kept() }.then_some(Self { process })
    }

    fn process(&self) -> &'static Process {
        // SAFETY: Kept for good.
        unsafe { &*self.process }
    }

    /// The default page table.
    pub fn address_space(&self) -> AddressSpace<'static> {
        // SAFETY: The process has it for good.
        unsafe { AddressSpace::borrowed(self.process, DEFAULT) }
    }

    /// The page table with this top table, or with it at this GPA.
    pub fn table_at(&self, root: u64) -> Option<AddressSpace<'static>> {
        let memory = &self.process().memory;
        let gpa = memory.table_gpa(root).or_else(|| Gpa::new(root))?;
        let number = self.process().tables().find(gpa)?;
        // SAFETY: It has a user now; who gives a table back uses it no more.
        Some(unsafe { AddressSpace::borrowed(self.process, number) })
    }

    /// Gives back a page table of [`AddressSpace::duplicate`] whose handle was forgotten. The default one stays.
    ///
    /// # Safety
    ///
    /// It must not be used any more, nor given back twice. A thread that has it loaded may go on.
    pub unsafe fn give_back(&self, table: AddressSpace<'static>) {
        if let Some(number) = table.number().filter(|number| *number != DEFAULT) {
            // SAFETY: The handle's count is the forgotten one's.
            drop(unsafe { PageTable::remembered(table, number) });
        }
    }

    /// The calling thread, where it is in Dune mode. Costs no exit.
    ///
    /// # Safety
    ///
    /// It must not be used any more when the thread has left Dune mode.
    pub unsafe fn thread(&self) -> Option<Thread<'static>> {
        let area = own_area(self.process())?;
        // SAFETY: The block of the thread's area; it stays as long as the thread is in Dune mode, which is the caller's.
        Some(unsafe { Thread::new(area as *const Block) })
    }

    /// Where memory of the process is in GPA space.
    ///
    /// # Errors
    ///
    /// See [`PagingError`].
    pub fn gpa(&self, hva: Hva) -> core::result::Result<Gpa, PagingError> {
        self.process().memory.gpa_of(hva)
    }

    /// What memory of the process is at a GPA.
    pub fn hva(&self, gpa: Gpa) -> Option<Hva> {
        self.process().memory.hva(gpa)
    }

    /// Has a GiB of the process, that was not used yet, be at a GPA of the caller's choice.
    ///
    /// # Errors
    ///
    /// [`PagingError::MapSlot`] where that GPA or GiB is taken, or the GPA beyond what the CPU has.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use libdune::edit::Shared;
    /// use libdune::{Dune, Gpa, Hva};
    ///
    /// let shared = Shared::keep(&Dune::builder())?;
    /// let dune = Dune::enter()?;
    /// // A whole GiB that nobody used.
    /// let (protection, flags) = (libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
    /// // SAFETY: A new mapping.
    /// let start = unsafe { libc::mmap(core::ptr::null_mut(), 2 << 30, protection, flags, -1, 0) };
    /// assert_ne!(start, libc::MAP_FAILED);
    /// let hva = Hva::new((start as u64).next_multiple_of(1 << 30)).ok_or("no address of a process")?;
    /// // The last slot that there is.
    /// let gpa = Gpa::new((1 << dune.info().gpa_bits) - (1 << 30)).ok_or("no GPA")?;
    /// shared.claim(hva, gpa)?;
    /// assert_eq!(shared.gpa(hva)?, gpa);
    /// assert_eq!(shared.hva(gpa), Some(hva));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn claim(&self, hva: Hva, gpa: Gpa) -> core::result::Result<(), PagingError> {
        self.process().memory.claim(hva, gpa)
    }

    /// Calls `f` before a thread that cannot go on ends the process, outside Dune mode and on a stack of libdune's.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use libdune::edit::{LastWords, Shared};
    /// use libdune::Dune;
    ///
    /// fn last_words(words: &LastWords) {
    ///     eprintln!("vCPU {} ends at {:#x}, its page table at {:#x}", words.vcpu, words.rip, words.cr3);
    /// }
    ///
    /// Shared::keep(&Dune::builder())?.set_last_words(last_words);
    /// # Ok::<(), libdune::Error>(())
    /// ```
    pub fn set_last_words(&self, f: fn(&LastWords)) {
        host_loop::set_last_words(f);
    }
}

/// Forgets the handle of a page table, which stays until [`Shared::give_back`].
///
/// # Examples
///
/// ```no_run
/// use libdune::edit::{forget, Shared};
/// use libdune::Dune;
///
/// let shared = Shared::keep(&Dune::builder())?;
/// assert!(Shared::find().is_some());
/// let dune = Dune::enter()?;
/// let table = forget(dune.address_space().duplicate()?);
/// // Any number that says which table it is will do, for a program in C for one.
/// let number = table.root_table() as u64;
/// let found = shared.table_at(number).ok_or("no table")?;
/// assert_eq!(found.root(), table.root());
/// // SAFETY: Nobody uses it any more.
/// unsafe { shared.give_back(found) };
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn forget(table: PageTable) -> AddressSpace<'static> {
    let space = table.borrowed();
    mem::forget(table);
    space
}
