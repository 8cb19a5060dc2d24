// SPDX-License-Identifier: MIT OR Apache-2.0

//! Exceptions in Dune mode: taken at CPL0 through the guest's IDT, with no VM exit.
//!
//! # Life of an exception
//!
//! 1. The CPU pushes onto the IST stack (the red zone of what was interrupted stays whole) and enters a stub
//!    (`stub.rs`), which finds the block by masking RSP.
//! 2. The stub takes the nesting level from the *interrupted* RSP: inside handler stack k means level k + 1. No
//!    counter: a handler that never returns leaves nothing behind.
//! 3. It builds a [`TrapFrame`] on that level's stack and goes over to it: the IST stack is free again.
//! 4. FPU state is saved above the frame, `dispatch` fills in page-table leaves that were never used, or calls the handler.
//!    A handler that the interrupted piece of the program opened a scope for goes first (`scope.rs`).
//! 5. FPU state and registers are loaded from the frame, IRETQ. Where no handler took it and the thread runs a compartment,
//!    that ends (`escape.rs`).
//!
//! A page fault that can only be the handler's (`stub.rs` says which) goes to it without 2 and without `dispatch`.

mod dispatch;
pub(crate) mod escape;
mod frame;
mod scope;
mod stub;

pub use dispatch::Handler;
pub use dispatch::Outcome;
pub use dispatch::Thread;
pub use frame::TrapFrame;
pub use frame::Vector;
pub use scope::ExtendedState;

pub(crate) use dispatch::forbid_plain;
pub(crate) use dispatch::prepare_native;
pub(crate) use dispatch::update_plain;
pub(crate) use dispatch::Fatal;
pub(crate) use dispatch::ANCHOR;
pub(crate) use frame::pop_registers;
pub(crate) use scope::Scope;
pub(crate) use stub::is_entry;
pub(crate) use stub::page_fault as page_fault_entry;
pub(crate) use stub::stubs;
pub(crate) use stub::STUB_BYTES;
