// SPDX-License-Identifier: MIT OR Apache-2.0

//! Compartments: parts of a program that see what they were given, and whose mistakes are errors of their caller's.
//!
//! A [`Compartment`] has a page table and a stack. [`Compartment::run`] calls a closure on that stack, with that page table
//! in CR3: code and constants are there, the closure's own captures, and the memory that was [given](Compartment::give).
//! The heap, the program's static data, thread-local storage, other stacks are not, in the sense of the CPU: touching
//! them is a page fault. Whatever exception it causes that no handler of the program takes ends the closure, not the
//! process, and is an [`Ended::Fault`] for who called it. [`Compartment::spawn`] does the same in a new thread.
//!
//! ```no_run
//! use libdune::compartment::{Compartment, Ended, Pages};
//! use libdune::{Dune, Permissions};
//!
//! let dune = Dune::enter()?;
//! let secret = Box::new(42u64);
//! let mut request = Pages::new(4096)?;
//! request[..5].copy_from_slice(b"hello");
//!
//! let mut compartment = Compartment::new(&dune.thread(), 64 << 10)?;
//! compartment.give(&request, Permissions::READ)?;
//! // SAFETY: The closures have nothing that must be dropped, and the table maps memory where it is.
//! unsafe {
//!     let text: &[u8] = &request;
//!     let letters = compartment.run(&dune.thread(), move || text.iter().filter(|b| b.is_ascii_lowercase()).count())?;
//!     assert_eq!(letters, 5);
//!     let place = &raw const *secret;
//!     let stolen = compartment.run(&dune.thread(), move || *place);
//!     assert!(matches!(stolen, Err(Ended::Fault(fault)) if fault.address == place as u64));
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What it is good for
//!
//! It contains mistakes: reading beyond a buffer, following a pointer that an attacker could change, running out of stack.
//! What runs is at CPL0 and could write CR3, or libdune's own memory, which is mapped: code that an attacker brings along
//! belongs at CPL3 ([`user`](crate::user)). System calls work in a compartment, and see all of the process: a
//! [hook](crate::hook) refuses them.
//!
//! # What a closure can do
//!
//! It should be a `move` closure: a variable that it captures by reference is on the caller's stack, which is not there.
//!
//! Compute, and use what its captures refer to where that was given. Not: allocate, panic (it ends with a fault, since
//! the panic cannot be told), use thread-local storage, or, in short, most of std that is not core. Of the functions of libc
//! those that only read static data work, memcpy among them; in a statically linked program that data is the program's,
//! and has to be given.
//!
//! The program's signal handlers run in the middle of it, with the same page table: block signals that have one, or leave
//! them to other threads.
//!
//! # Safety
//!
//! The closure is moved to the compartment's stack and its result taken from there. A closure that ended by an exception
//! is as one that never goes on.

mod code;
mod pages;

use core::any::Any;
use core::fmt;
use core::mem;
use core::mem::ManuallyDrop;
use core::mem::MaybeUninit;
use std::io;
use std::panic;
use std::panic::AssertUnwindSafe;
use std::thread::JoinHandle;

use crate::addr::Gva;
use crate::addr::PAGE_BYTES;
use crate::paging;
use crate::paging::is_cpl0;
use crate::paging::AddressSpace;
use crate::paging::PageTable;
use crate::paging::PagingError;
use crate::paging::Permissions;
use crate::percpu::Block;
use crate::trap::escape;
use crate::trap::Thread;
use crate::trap::Vector;
use crate::user::PageFault;

pub use pages::Pages;

/// Least stack that a closure gets beside its captures and its result.
const LEAST_STACK: u64 = 2048;

/// Why a compartment could not be made.
///
/// # Examples
///
/// ```no_run
/// use libdune::compartment::{Compartment, CompartmentError};
/// use libdune::{Dune, PagingError};
///
/// let dune = Dune::enter()?;
/// match Compartment::new(&dune.thread(), 64 << 10) {
///     Ok(compartment) => drop(compartment),
///     Err(CompartmentError::Paging(PagingError::OutOfTables)) => println!("try again when other compartments are gone"),
///     Err(error) => return Err(error.into()),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompartmentError {
    /// The page table.
    #[error("the compartment's page table: {0}")]
    Paging(#[from] PagingError),
    /// The memory for its stack.
    #[error("the compartment's stack: {0}")]
    Stack(io::Error),
}

/// Why there is no result.
///
/// # Examples
///
/// ```no_run
/// use libdune::compartment::{Compartment, Ended};
/// use libdune::Dune;
///
/// let dune = Dune::enter()?;
/// let mut compartment = Compartment::new(&dune.thread(), 64 << 10)?;
/// let large = [7u8; 128 << 10];
/// // SAFETY: There is nothing to drop.
/// let ended = unsafe { compartment.run(&dune.thread(), move || large[0]) };
/// assert!(matches!(ended, Err(Ended::StackTooSmall { needed }) if needed >= 128 << 10));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Ended {
    /// An exception that no handler took.
    #[error("{0}")]
    Fault(Fault),
    /// A panic that got through, because the compartment was given what that takes.
    #[error("the closure panicked")]
    Panicked(Box<dyn Any + Send>),
    /// The closure's captures or its result leave nothing of the stack: it was not called.
    #[error("captures and result of {needed} bytes leave less than {LEAST_STACK} bytes of the compartment's stack: make it larger")]
    StackTooSmall {
        /// What they need.
        needed: usize,
    },
    /// The thread is not in Dune mode, or has a page table that libdune did not make: the closure was not called.
    #[error("the calling thread is not in Dune mode, or has a page table that libdune did not load")]
    NotInDuneMode,
    /// The thread is in a compartment already: the closure was not called.
    #[error("the calling thread is in a compartment already")]
    Inside,
}

impl fmt::Debug for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fault(fault) => fmt::Debug::fmt(fault, f),
            ended => fmt::Display::fmt(ended, f),
        }
    }
}

/// The exception that ended a closure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Which.
    pub vector: Vector,
    /// The CPU's error code, 0 where there is none; bit 14: the process itself has no such memory.
    pub error_code: u64,
    /// The address of a page fault, else 0.
    pub address: u64,
    /// Where the closure was.
    pub rip: u64,
}

impl Fault {
    /// What the access was, if it was a page fault.
    pub fn page_fault(&self) -> Option<PageFault> {
        (self.vector == Vector::PF).then_some(PageFault {
            address: self.address,
            error_code: self.error_code,
        })
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.page_fault() {
            Some(fault) => write!(f, "{fault:?}")?,
            None => write!(f, "{}", self.vector)?,
        }
        write!(f, " of the code at {:#x}", self.rip)
    }
}

/// A page table with code and constants, a stack, and what it was given.
///
/// Making one reads the list of loaded objects; [`duplicate`](Self::duplicate) is the quick way to another. Dropping it
/// gives table and stack back. Each may be used by any Dune thread, one at a time.
#[derive(Debug)]
pub struct Compartment {
    table: PageTable,
    stack: Pages,
}

impl Compartment {
    /// A compartment that was given nothing yet, with a stack of so many bytes, rounded up to 4 KiB.
    ///
    /// # Errors
    ///
    /// See [`CompartmentError`].
    pub fn new(thread: &Thread<'_>, stack_bytes: usize) -> Result<Self, CompartmentError> {
        let stack = Pages::new(stack_bytes).map_err(CompartmentError::Stack)?;
        let process = thread.block().process();
        let arena = Gva::new(process.start).ok_or(PagingError::Foreign)?;
        // SAFETY: The process is alive, and the tree fresh.
        let table = unsafe {
            PageTable::new(process, || {
                let root = paging::new_root(&process.memory)?;
                paging::fill(&process.memory, root, arena).inspect_err(|_| paging::free(&process.memory, root))?;
                Ok(root)
            })
        }?;
        table.seal()?;
        code::map(&table)?;
        let compartment = Self { table, stack };
        compartment.give(&compartment.stack, Permissions::WRITE)?;
        Ok(compartment)
    }

    /// Another one that was given the same, with a stack of its own as large.
    ///
    /// # Errors
    ///
    /// See [`CompartmentError`].
    pub fn duplicate(&self) -> Result<Self, CompartmentError> {
        let stack = Pages::new(self.stack.len()).map_err(CompartmentError::Stack)?;
        let table = self.table.duplicate()?;
        let compartment = Self { table, stack };
        compartment.take(&self.stack)?;
        compartment.give(&compartment.stack, Permissions::WRITE)?;
        Ok(compartment)
    }

    /// Lets it use whole pages of the process, where they are, as `permissions` say. Take them back before they are given
    /// back to Linux: what is mapped there afterwards it could use too.
    ///
    /// # Errors
    ///
    /// [`PagingError::Unaligned`] for memory that is not whole pages, such as [`Pages`] are; else see [`PagingError`].
    pub fn give(&self, memory: &[u8], permissions: Permissions) -> Result<(), PagingError> {
        let (start, bytes) = range(memory)?;
        let to = start.identity().ok_or(PagingError::NotMapped(start))?;
        self.table.map(start, bytes, to, permissions)?.flush();
        Ok(())
    }

    /// Takes pages away that it was given.
    ///
    /// # Errors
    ///
    /// As [`Compartment::give`].
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use libdune::compartment::{Compartment, Ended, Pages};
    /// use libdune::{Dune, Permissions};
    ///
    /// let dune = Dune::enter()?;
    /// let thread = dune.thread();
    /// let page = Pages::new(4096)?;
    /// let first = page.address() as *const u8;
    /// let mut compartment = Compartment::new(&thread, 64 << 10)?;
    /// compartment.give(&page, Permissions::READ)?;
    /// // SAFETY: There is nothing to drop, and the page is the program's.
    /// let read = unsafe { compartment.run(&thread, move || first.read_volatile()) };
    /// assert!(matches!(read, Ok(0)));
    /// compartment.take(&page)?;
    /// // SAFETY: As above.
    /// let ended = unsafe { compartment.run(&thread, move || first.read_volatile()) };
    /// let Err(Ended::Fault(fault)) = ended else {
    ///     return Err("another end".into());
    /// };
    /// assert!(fault.page_fault().is_some_and(|fault| !fault.is_present() && !fault.is_write()));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn take(&self, memory: &[u8]) -> Result<(), PagingError> {
        let (start, bytes) = range(memory)?;
        self.table.unmap(start, bytes)?.flush();
        Ok(())
    }

    /// Forgets what closures left on the stack, so that the next one finds nothing of theirs.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use libdune::compartment::Compartment;
    /// use libdune::Dune;
    ///
    /// let dune = Dune::enter()?;
    /// let mut compartment = Compartment::new(&dune.thread(), 64 << 10)?;
    /// for request in [[1u8; 100], [2; 100]] {
    ///     // SAFETY: There is nothing to drop.
    ///     let sum = unsafe { compartment.run(&dune.thread(), move || request.iter().map(|byte| u32::from(*byte)).sum::<u32>()) };
    ///     assert_eq!(sum?, u32::from(request[0]) * 100);
    ///     compartment.wipe_stack();
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn wipe_stack(&mut self) {
        self.stack.fill(0);
    }

    /// Its page table.
    pub fn address_space(&self) -> &AddressSpace<'static> {
        &self.table
    }

    /// Calls a closure in the compartment, in the calling thread.
    ///
    /// # Errors
    ///
    /// See [`Ended`].
    ///
    /// # Safety
    ///
    /// - Where the page table was changed by [`Compartment::address_space`], it must map libdune, the code that runs, and
    ///   addresses that the closure takes to be memory of its own to that memory.
    /// - A fault ends the closure where it is: no destructor of what it has on the stack is run, its captures are forgotten,
    ///   and the stack is used again by the next one. Nothing may depend on those destructors for safety, as scoped threads
    ///   and pinned values do.
    /// - It must not leave by a jump, nor make a child that shares its stack.
    pub unsafe fn run<F, T>(&mut self, thread: &Thread<'_>, closure: F) -> Result<T, Ended>
    where
        F: FnOnce() -> T,
    {
        let block = thread.block();
        if block.waiting.is_active() {
            return Err(Ended::Inside);
        }
        let home = match block.here.number() {
            Some(number) if is_cpl0() && thread.current_address_space().number() == Some(number) => number,
            _ => return Err(Ended::NotInDuneMode),
        };
        let start = self.stack.address();
        let align = mem::align_of::<Visit<F, T>>().max(16) as u64;
        let needed = mem::size_of::<Visit<F, T>>();
        let place = (start + self.stack.len() as u64)
            .checked_sub(needed as u64)
            .map(|place| place & !(align - 1))
            .filter(|place| *place >= start + LEAST_STACK)
            .ok_or(Ended::StackTooSmall { needed })?;
        let visit = place as *mut Visit<F, T>;
        // The thread goes to another table, and comes back.
        let tables = block.process().tables();
        tables.hold(home);
        // SAFETY: On the compartment's stack, which nobody uses: aligned, large enough, mapped in both tables. The rest is the
        // caller's, and what `call` does.
        let result = unsafe {
            visit.write(Visit {
                block,
                table: self.table.own_number(),
                home,
                closure: ManuallyDrop::new(closure),
                result: MaybeUninit::uninit(),
            });
            match escape::run(block, home, place, call::<F, T>, visit.cast()) {
                Ok(()) => (*visit).result.assume_init_read().map_err(Ended::Panicked),
                Err(escaped) => Err(Ended::Fault(Fault {
                    vector: escaped.vector,
                    error_code: escaped.error_code,
                    address: if escaped.vector == Vector::PF {
                        escaped.address
                    } else {
                        0
                    },
                    rip: escaped.rip,
                })),
            }
        };
        tables.let_go(home);
        result
    }

    /// Calls a closure in the compartment, in a new thread: joining that gives the compartment back, with what came of it.
    ///
    /// The thread is one of std's, which starts and ends as any; between, it has the compartment's page table. It has the
    /// caller's exception handlers and hooks.
    ///
    /// # Errors
    ///
    /// What making a thread can give.
    ///
    /// # Safety
    ///
    /// As [`Compartment::run`].
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use libdune::compartment::Compartment;
    /// use libdune::Dune;
    ///
    /// let dune = Dune::enter()?;
    /// let compartment = Compartment::new(&dune.thread(), 64 << 10)?;
    /// // SAFETY: There is nothing to drop.
    /// let thread = unsafe { compartment.spawn(|| 6 * 7) }?;
    /// let (_compartment, answer) = thread.join().map_err(|_| "the thread panicked")?;
    /// assert_eq!(answer?, 42);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub unsafe fn spawn<F, T>(mut self, closure: F) -> io::Result<JoinHandle<(Self, Result<T, Ended>)>>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        std::thread::Builder::new().spawn(move || {
            // SAFETY: The caller's.
            let result = Thread::with_current(|thread| unsafe { self.run(thread, closure) });
            (self, result.unwrap_or(Err(Ended::NotInDuneMode)))
        })
    }
}

/// Start and bytes of whole pages.
fn range(memory: &[u8]) -> Result<(Gva, u64), PagingError> {
    let bytes = memory.len() as u64;
    match Gva::of(memory.as_ptr()) {
        Some(start) if start.is_aligned(PAGE_BYTES) && bytes % PAGE_BYTES == 0 => Ok((start, bytes)),
        start => Err(PagingError::Unaligned {
            start: start.unwrap_or_default(),
            bytes,
        }),
    }
}

/// What lies at the top of the stack while a closure runs.
struct Visit<F, T> {
    block: *const Block,
    /// Numbers of the compartment's page table and of that from before.
    table: u16,
    home: u16,
    closure: ManuallyDrop<F>,
    result: MaybeUninit<std::thread::Result<T>>,
}

/// On the compartment's stack.
unsafe extern "C" fn call<F: FnOnce() -> T, T>(visit: *mut ()) {
    let visit = visit.cast::<Visit<F, T>>();
    // SAFETY: `run` wrote it, for this call alone. It lies on a stack that both tables map, and both map this code. Both
    // have a user: the compartment, and `run`.
    unsafe {
        let (block, area) = (&*(*visit).block, (*visit).block as u64);
        paging::switch(block.process(), area, &block.here, (*visit).table);
        let closure = ManuallyDrop::take(&mut (*visit).closure);
        let result = panic::catch_unwind(AssertUnwindSafe(closure));
        (*visit).result.write(result);
        // Unless it left Dune mode by itself.
        if is_cpl0() {
            paging::switch(block.process(), area, &block.here, (*visit).home);
        }
    }
}
