// SPDX-License-Identifier: MIT OR Apache-2.0

//! Page tables that the program owns, and who else keeps them.
//!
//! # Safety
//!
//! A handle counts as a user of its table and of the process, so both are alive as long as it.

use core::ops::Deref;

use super::protocol::Here;
use super::tables::Tables;
use super::tlb::is_cpl0;
use super::AddressSpace;
use super::PagingError;
use crate::addr::Gpa;
use crate::entry;
use crate::process;
use crate::process::Process;

/// A page table of its own, made by [`AddressSpace::duplicate`], [`AddressSpace::snapshot`] or
/// [`Thread::new_page_table`](crate::Thread::new_page_table).
///
/// What an [`AddressSpace`] can do it can; any thread may have it, also one outside Dune mode. Its tables are given back
/// when it is dropped and no thread has it in CR3 any more. While there is one the process keeps what it has for Dune
/// threads, also when the last of those has left.
///
/// # Examples
///
/// ```no_run
/// use libdune::{Dune, PageTable};
///
/// let dune = Dune::enter()?;
/// let table: PageTable = dune.address_space().duplicate()?;
/// // Each thread has its own CR3, and starts with its maker's.
/// let is_loaded = std::thread::scope(|scope| {
///     let thread = scope.spawn(|| {
///         // SAFETY: It maps what the default table does.
///         libdune::Thread::with_current(|thread| unsafe { thread.load(&table) });
///         table.is_loaded()
///     });
///     thread.join()
/// });
/// assert_eq!(is_loaded.ok(), Some(true));
/// assert!(!table.is_loaded() && dune.address_space().is_loaded());
/// # Ok::<(), libdune::Error>(())
/// ```
#[derive(Debug)]
pub struct PageTable {
    space: AddressSpace<'static>,
    number: u16,
}

// SAFETY: All changes of tables are atomic, and what belongs to one thread is only used where that is the calling one.
unsafe impl Send for PageTable {}
// SAFETY: As above.
unsafe impl Sync for PageTable {}

impl PageTable {
    /// # Safety
    ///
    /// `process` must be alive, and `tree` give the root of a tree that nobody else frees.
    pub(crate) unsafe fn new(
        process: *const Process,
        tree: impl FnOnce() -> Result<Gpa, PagingError>,
    ) -> Result<Self, PagingError> {
        // SAFETY: The caller's.
        let number = unsafe { (*process).tables() }.add(tree)?;
        // SAFETY: The table has the user that `add` counts, and the process the handle's.
        unsafe {
            (*process).add_handle();
            Ok(Self {
                space: AddressSpace::borrowed(process, number),
                number,
            })
        }
    }
}

impl PageTable {
    /// The handle that was forgotten.
    ///
    /// # Safety
    ///
    /// There must be one of this table, which has this number.
    pub(crate) unsafe fn remembered(space: AddressSpace<'static>, number: u16) -> Self {
        Self { space, number }
    }

    /// The table, as long as someone has it.
    pub(crate) fn borrowed(&self) -> AddressSpace<'static> {
        // SAFETY: As this one was made. The caller sees to it that there is a handle.
        unsafe { AddressSpace::borrowed(self.space.process_pointer(), self.number) }
    }

    pub(crate) fn own_number(&self) -> u16 {
        self.number
    }
}

impl Deref for PageTable {
    type Target = AddressSpace<'static>;

    fn deref(&self) -> &Self::Target {
        &self.space
    }
}

impl Drop for PageTable {
    fn drop(&mut self) {
        let process = self.space.process_pointer();
        if process::find() != Some(process) {
            // A child of fork that was outside Dune mode: the memory is a copy that nobody uses.
            return;
        }
        // SAFETY: The handle's own count of the table, and then of the process.
        unsafe {
            (*process).tables().let_go(self.number);
            if is_cpl0() {
                // Never the last: the calling thread is counted too.
                (*process).drop_handle();
            } else {
                (*process).forget_handle();
                entry::leave_process(process);
            }
        }
    }
}

/// The page table that a thread had in CR3, given by [`Thread::current_address_space`](crate::Thread::current_address_space).
///
/// What an [`AddressSpace`] can do it can. The table's memory is not given back as long as there is one, as by a
/// [`PageTable`].
#[derive(Debug)]
pub struct LoadedSpace<'d> {
    space: AddressSpace<'d>,
    /// The table's number, unless it is none of libdune's.
    held: Option<u16>,
}

impl<'d> LoadedSpace<'d> {
    /// # Safety
    ///
    /// `space` must have a user now, and its process live for 'd.
    pub(crate) unsafe fn new(space: AddressSpace<'d>) -> Self {
        let held = space.number();
        if let Some(number) = held {
            space.process().tables().hold(number);
        }
        Self { space, held }
    }
}

impl<'d> Deref for LoadedSpace<'d> {
    type Target = AddressSpace<'d>;

    fn deref(&self) -> &Self::Target {
        &self.space
    }
}

impl Drop for LoadedSpace<'_> {
    fn drop(&mut self) {
        if let Some(number) = self.held {
            self.space.process().tables().let_go(number);
        }
    }
}

/// Counts a thread that runs no guest code any more out of the table that it had.
pub(crate) fn forget_thread(process: &Process, here: &Here) {
    if let Some(number) = here.leave() {
        process.tables().let_go(number);
    }
}

/// Has a thread that is being made start with a table.
pub(crate) fn start_thread(process: &Process, number: u16) -> Here {
    Tables::new(&process.memory).hold(number);
    Here::new(Some(number))
}
