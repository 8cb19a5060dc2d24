// SPDX-License-Identifier: MIT OR Apache-2.0

//! Utilities: printing from anywhere, ending, mmap and signal under the names of the API.
//!
//! # Safety
//!
//! A `va_list` is what its format says; passing one passes a pointer (psABI, "Variable Argument Lists").

use core::ffi::c_char;
use core::ffi::c_int;
use core::ffi::c_void;

use crate::out::STDOUT;

/// Bytes that one dune_printf can print.
const PRINTED: usize = 1024;

extern "C" {
    fn vsnprintf(buffer: *mut c_char, size: usize, format: *const c_char, arguments: *mut c_void) -> c_int;
}

/// dune_printf with a `va_list`: up to 1,023 bytes to standard output, at once, from handlers too. How many were written.
#[no_mangle]
pub unsafe extern "C" fn dune_vprintf(fmt: *const c_char, arguments: *mut c_void) -> c_int {
    let mut buffer = [0u8; PRINTED];
    // SAFETY: The buffer's own size; the rest is the caller's.
    let wanted = unsafe { vsnprintf(buffer.as_mut_ptr().cast(), PRINTED, fmt, arguments) };
    if wanted < 0 {
        return wanted;
    }
    STDOUT.bytes(&buffer[..(wanted as usize).min(PRINTED - 1)]) as c_int
}

/// Ends the process with status 1, at once.
#[no_mangle]
pub extern "C" fn dune_die() {
    // SAFETY: Ends the process without running anything of it.
    unsafe { libc::_exit(libc::EXIT_FAILURE) }
}

/// mmap.
#[no_mangle]
pub unsafe extern "C" fn dune_mmap(
    addr: *mut c_void,
    length: libc::size_t,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: libc::off_t,
) -> *mut c_void {
    // SAFETY: The caller's.
    unsafe { libc::mmap(addr, length, prot, flags, fd, offset) }
}
