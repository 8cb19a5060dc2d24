// SPDX-License-Identifier: MIT OR Apache-2.0

//! libdune for C: the API of the first Dune, on top of the crate `libdune`.
//!
//! Programs include `libdune/dune.h`, which cbindgen makes from the public items here (`cbindgen.toml`); macros and
//! inline functions are in the headers beside it, by hand. docs/c-abi.md says how each function behaves, and where that
//! differs from what the first Dune did.
//!
//! # Safety
//!
//! Every function trusts its caller as C does: pointers lead to what their types say, for as long as the function runs,
//! callbacks do not unwind. Nothing here waits for a lock that an interrupted thread could hold, because handlers call it.
#![deny(unsafe_op_in_unsafe_fn)]
#![deny(clippy::undocumented_unsafe_blocks)]
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
// The names are C's; what callers owe is C's convention, above.
#![allow(non_camel_case_types, non_upper_case_globals, clippy::missing_safety_doc)]

mod out;

mod entry;
mod page;
mod tlb;
mod vm;
mod walk;

mod frame;
mod signal;
mod trap;
mod user;

mod elf;
mod procmap;
mod util;
