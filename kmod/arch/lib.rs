// SPDX-License-Identifier: GPL-2.0

//! `kmod/arch` as a crate of its own, for `cargo test` on the host.
//!
//! The kernel build does not use this file: it takes `mod.rs` straight into `dune.ko`.

#![no_std]
#![forbid(unsafe_code)]

#[path = "mod.rs"]
mod arch;

pub use arch::*;
