// SPDX-License-Identifier: GPL-2.0

//! Arithmetic and tables of the x86-64 architecture that the module stands on.
//!
//! `core` only: no unsafe, no allocation, no kernel. The directory is compiled twice, into `dune.ko` and, by
//! `lib.rs`, as the crate `dune-arch` whose tests run on the host; so it names its own items by `super::`.
//!
//! Sections that comments cite are those of the Intel 64 and IA-32 Architectures Software Developer's Manual (SDM).

// Tables are complete where the hardware's are, whether or not the module uses every row.
#![allow(dead_code)]
// `pub` here is for the crate `dune-arch`; in `dune.ko` nothing is visible outside.
#![allow(unreachable_pub)]

pub mod addr;
pub mod controls;
pub mod cr;
pub mod ept;
pub mod exit;
pub mod host_pte;
pub mod msr;
pub mod segment;
pub mod slots;
pub mod vmcs_field;
