// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory in pages of its own.
//!
//! # Safety
//!
//! The mapping is private, of the process, and lives as long as its owner.

use core::ops::Deref;
use core::ops::DerefMut;
use std::io;

use crate::addr::PAGE_BYTES;
use crate::sys;
use crate::sys::Errno;

/// Memory of the process, zeroed at first, in whole pages that hold nothing else: what a compartment can be given.
///
/// # Examples
///
/// ```
/// use libdune::compartment::Pages;
///
/// let mut pages = Pages::new(100)?;
/// assert_eq!(pages.len(), 4096);
/// pages[7] = 1;
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct Pages {
    start: *mut u8,
    bytes: usize,
}

// SAFETY: Memory that only its owner has.
unsafe impl Send for Pages {}
// SAFETY: As above; what is shared is only read.
unsafe impl Sync for Pages {}

impl Pages {
    /// Pages for so many bytes, at least one.
    ///
    /// # Errors
    ///
    /// What mmap says.
    pub fn new(bytes: usize) -> io::Result<Self> {
        let page = PAGE_BYTES as usize;
        let bytes = bytes
            .max(1)
            .checked_next_multiple_of(page)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: A fresh mapping.
        let start = unsafe { sys::mmap(bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        let start = start.map_err(|Errno(errno)| io::Error::from_raw_os_error(errno))?;
        Ok(Self {
            start: start as *mut u8,
            bytes,
        })
    }

    /// Address of the first byte.
    pub fn address(&self) -> u64 {
        self.start as u64
    }
}

impl Deref for Pages {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: Mapped as long as this, and zeroed or written.
        unsafe { core::slice::from_raw_parts(self.start, self.bytes) }
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: As above; nobody else's.
        unsafe { core::slice::from_raw_parts_mut(self.start, self.bytes) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: Mapped in `new`, and nobody refers to it any more.
        let _ = unsafe { sys::munmap(self.start as u64, self.bytes) };
    }
}
