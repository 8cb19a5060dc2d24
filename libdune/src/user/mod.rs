// SPDX-License-Identifier: MIT OR Apache-2.0

//! Code at CPL3: run it, take what it asks for, look at its memory.
//!
//! A [`UserContext`] is the registers of some code. [`UserContext::run`] executes it at CPL3 of the calling thread, in the
//! page table that is loaded, until it makes a system call, faults, or its time is over; then the caller, at CPL0, decides.
//! No system call of CPL3 reaches Linux by itself, and none of its exceptions a handler or a signal of the program.
//!
//! What CPL3 can reach are the pages that the loaded page table gives to it ([`Permissions::USER`]), and nothing else:
//! everything in the default page table is CPL0's. Give it pages that hold nothing of the host program's. Where the CPU has
//! SMEP, CPL0 cannot execute such pages; where it has SMAP, CPL0 can only access them through a [`UserSlice`].
//!
//! ```no_run
//! use libdune::user::{UserContext, UserExit};
//! use libdune::{Dune, Gva, Permissions};
//!
//! # let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
//! # let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
//! # let page = unsafe { libc::mmap(core::ptr::null_mut(), 4096, protection, flags, -1, 0) };
//! // mov eax, 2; syscall; mov edi, eax; mov eax, 60; syscall; hlt
//! let code = *b"\xb8\x02\0\0\0\x0f\x05\x89\xc7\xb8\x3c\0\0\0\x0f\x05\xf4";
//! // SAFETY: A page of the program's own.
//! unsafe { page.cast::<[u8; 17]>().write(code) };
//!
//! let dune = Dune::enter()?;
//! let start = Gva::new(page as u64).ok_or("not canonical")?;
//! let for_cpl3 = Permissions::USER | Permissions::EXECUTE;
//! dune.address_space().protect(start, 4096, for_cpl3)?.flush();
//!
//! let mut plugin = UserContext::new(&dune.thread());
//! plugin.registers_mut().rip = start.as_u64();
//! let status = loop {
//!     match plugin.run_for(&dune.thread(), 1_000_000_000) {
//!         UserExit::Syscall => {
//!             let (number, arguments) = plugin.system_call();
//!             if number == libc::SYS_exit as u64 {
//!                 break arguments[0] as i32;
//!             }
//!             plugin.set_result(-i64::from(libc::EPERM) as u64);
//!         }
//!         exit => return Err(format!("{exit:?}").into()),
//!     }
//! };
//! assert_eq!(status, -libc::EPERM);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Safety
//!
//! What CPL3 leaves in its registers is never followed here. What of them could make IRETQ or WRFSBASE fault at CPL0 is
//! looked at before.
//!
//! [`Permissions::USER`]: crate::Permissions::USER

mod context;
mod slice;

pub use crate::cpl3::UserRegisters;
pub use context::PageFault;
pub use context::UserContext;
pub use context::UserExit;
pub use slice::UserFault;
pub use slice::UserSlice;
