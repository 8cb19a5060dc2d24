// SPDX-License-Identifier: MIT OR Apache-2.0

//! `LD_PRELOAD=libdune_preload.so PROGRAM`: Dune mode before main, for a dynamic program that knows nothing of it.
//!
//! The program's first thread enters Dune mode when the library is initialized, which the loader does before it
//! initializes the program. Threads and children follow by themselves. A program that they execute starts outside Dune
//! mode and enters again, because the environment goes along.
//!
//! Where Dune mode cannot be entered one line on standard error says why and the program runs as always; with
//! `DUNE_PRELOAD=must` it ends with status 125 instead.
//!
//! # Safety
//!
//! The loader calls the one function of `.init_array` once, on the first thread.

use std::io::Write;

use libdune::Dune;

/// Exit status where Dune mode was demanded and could not be entered, as `env` and `timeout` have it.
const FAILED: i32 = 125;

#[used]
#[link_section = ".init_array"]
static INITIALIZE: extern "C" fn() = initialize;

extern "C" fn initialize() {
    match Dune::enter() {
        // For good: the process ends in Dune mode.
        Ok(dune) => std::mem::forget(dune),
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "libdune_preload: {error}");
            if std::env::var_os("DUNE_PRELOAD").is_some_and(|value| value == "must") {
                std::process::exit(FAILED);
            }
        }
    }
}
