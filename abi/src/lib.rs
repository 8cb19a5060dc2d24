// SPDX-License-Identifier: MIT OR Apache-2.0

//! The contract between `dune.ko` and user space, as a crate; `dune.ko` compiles the same `abi.rs` as a module.
#![no_std]
#![warn(missing_docs)]

mod abi;

pub use abi::*;
