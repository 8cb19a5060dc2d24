// SPDX-License-Identifier: MIT OR Apache-2.0

//! VMX root, CPL3: runs the vCPU and does for it what only a Linux process can do.
//!
//! # Life of a system call
//!
//! 1. The program's SYSCALL goes to the LSTAR stub (`syscall`), whose VMCALL exits.
//! 2. RUN returns to `dune_run_behind` with R12D = EXIT_SYSCALL (0) and number and arguments in the registers of the
//!    system call that comes next.
//! 3. The special table says whether the call needs Rust (`special`); else SYSCALL, here and now, for the kernel to
//!    treat as it treats every system call of this thread.
//! 4. The result goes to the guest's RAX in the run page, RUN goes on behind the program's SYSCALL.
//!
//! The loop has a stack of its own and uses no TLS, no errno and no FPU register; the slow path saves the FPU state
//! around its Rust code. Known places are exported as symbols: `dune_run_syscall`, `dune_run_behind`,
//! `dune_forward_syscall`, `dune_forward_behind`.

mod asm;
mod clone;
mod compat;
mod context;
mod dispatch;
mod report;
mod signal;
mod slow;
mod special;
mod touch;
mod upcall;

pub(crate) use asm::enter_guest;
pub(crate) use asm::forward_behind;
pub(crate) use asm::leave_guest;
pub(crate) use context::HostContext;
pub(crate) use context::State;
pub(crate) use report::set_last_words;
pub use report::LastWords;
pub(crate) use signal::has_handler;
pub(crate) use signal::install as install_signals;
pub(crate) use signal::restore as restore_signals;
pub(crate) use slow::FAILED_ENTRY;
pub(crate) use special::fill_table as fill_special_table;
