// SPDX-License-Identifier: MIT OR Apache-2.0

//! The program of the benchmark's row `process_dynamic`: it ends at once; with an argument it enters Dune mode before.
#![no_main]

use core::ffi::c_char;
use core::ffi::c_int;

use libdune::Dune;

/// libc's entry, without what std does before a `main` of its own. The status is 0 if all went well.
#[no_mangle]
extern "C" fn main(count: c_int, _arguments: *const *const c_char) -> c_int {
    if count < 2 {
        return 0;
    }
    // It ends in Dune mode.
    match Dune::enter() {
        Ok(dune) => {
            let is_active = Dune::is_active();
            core::mem::forget(dune);
            c_int::from(!is_active)
        }
        Err(_) => 2,
    }
}
