// SPDX-License-Identifier: MIT OR Apache-2.0

//! Runs the calling thread of a Linux process in VMX non-root mode, at CPL0, and keeps it a Linux process.
//!
//! [`Dune::enter`] turns the calling thread into a Dune thread. It goes on behind the call, on the same stack, with
//! the same memory; system calls, std and libc work as before. But it is the kernel of its own small machine: it
//! takes its own exceptions ([`Dune::set_exception_handler`]) and owns its page table ([`Dune::address_space`]),
//! with no exit to the host.
//!
//! ```no_run
//! # // ANCHOR: first
//! use libdune::{Dune, Outcome, Vector};
//!
//! fn main() -> Result<(), libdune::Error> {
//!     let dune = Dune::enter()?;                       // CPL0 from here on
//!     dune.set_exception_handler(Vector::DE, |frame, _| {
//!         frame.rip += 2;                              // skip the DIV: no signal, no VM exit
//!         Outcome::Resume
//!     });
//!     unsafe { core::arch::asm!("div ecx", in("ecx") 0, out("eax") _, out("edx") _) };
//!     println!("pid {} at CPL0: {}", std::process::id(), Dune::is_active());
//!     dune.leave();                                    // CPL3 again
//!     Ok(())
//! }
//! # // ANCHOR_END: first
//! ```
//!
//! # What it does not do
//!
//! - An exception for which there is neither a handler nor a signal handler is given to Linux from outside Dune mode.
#![deny(unsafe_op_in_unsafe_fn)]
#![deny(clippy::undocumented_unsafe_blocks)]
#![warn(missing_docs)]
#![warn(clippy::missing_errors_doc)]
#![warn(clippy::missing_panics_doc)]
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

pub mod error;

pub mod abi;
mod addr;
mod layout;
mod sys;

mod dispatch;

mod device;

pub mod paging;

mod process;

mod percpu;
pub mod trap;

mod cpl3;

pub mod hook;

mod host_loop;

mod entry;

pub mod edit;
pub mod user;

pub mod compartment;

mod interop;

pub use addr::Gpa;
pub use addr::Gva;
pub use addr::Hva;
pub use entry::Builder;
pub use entry::Dune;
pub use error::Error;
pub use error::Result;
pub use interop::AddressError;
pub use paging::AddressSpace;
pub use paging::FramePool;
pub use paging::LoadedSpace;
pub use paging::PageTable;
pub use paging::PagingError;
pub use paging::Permissions;
pub use trap::ExtendedState;
pub use trap::Outcome;
pub use trap::Thread;
pub use trap::TrapFrame;
pub use trap::Vector;
/// Its types are used for bits that it has words for.
pub use x86_64;
