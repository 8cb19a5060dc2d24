// SPDX-License-Identifier: MIT OR Apache-2.0
//! The emulated machine of this project.
//!
//! [`image`] packs an initramfs and an ISO, [`machine`] boots it in Bochs and
//! collects what the guest sends, [`verdict`] and [`ktap`] judge it, [`matrix`]
//! is the table of machines that `make test` goes through.

pub mod bench;
pub mod elf;
pub mod heavy;
pub mod host;
pub mod image;
pub mod ktap;
pub mod machine;
pub mod matrix;
pub mod paths;
pub mod programs;
pub mod results;
pub mod suite;
pub mod verdict;
