// SPDX-License-Identifier: MIT OR Apache-2.0

//! What Linux tells of the pages of a range: /proc/self/pagemap and its PAGEMAP_SCAN (include/uapi/linux/fs.h).

use crate::pages::Memory;
use crate::pages::PAGE;

pub const IS_WRITTEN: u64 = 1 << 1;
pub const IS_PRESENT: u64 = 1 << 3;
pub const IS_HUGE: u64 = 1 << 6;

/// Write-protects, and so forgets as written, what is told.
pub const WP_MATCHING: u64 = 1;
/// Only where userfaultfd notes writes.
pub const CHECK_WPASYNC: u64 = 2;

const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;

#[repr(C)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// Pages that are alike.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Region {
    start: u64,
    end: u64,
    pub categories: u64,
}

impl Region {
    pub fn pages(&self) -> u64 {
        (self.end - self.start) / PAGE as u64
    }
}

pub struct Pagemap(i32);

impl Pagemap {
    /// None where Linux has none, or does not let us.
    pub fn open() -> Option<Self> {
        // SAFETY: A file of the process' own.
        let fd = unsafe { libc::open(c"/proc/self/pagemap".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
        (fd >= 0).then_some(Self(fd))
    }

    /// Regions of pages that are all of `wanted`, and which of `told` they are; how many, or less than 0: not to be had.
    pub fn scan(
        &self,
        memory: &Memory,
        range: core::ops::Range<usize>,
        flags: u64,
        wanted: u64,
        told: u64,
        regions: &mut [Region],
    ) -> i32 {
        let start = memory.start() as u64;
        let mut ask = Scan {
            size: size_of::<Scan>() as u64,
            flags,
            start: start + range.start as u64,
            end: start + range.end as u64,
            walk_end: 0,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            max_pages: 0,
            category_inverted: 0,
            category_mask: wanted,
            category_anyof_mask: 0,
            return_mask: told,
        };
        // SAFETY: The structure is as Linux has it; the regions are where it says.
        unsafe { libc::ioctl(self.0, PAGEMAP_SCAN, &raw mut ask) }
    }

    /// The words of pages from the memory's first on. Whether Linux gave them all.
    pub fn read(&self, memory: &Memory, words: &mut [u64]) -> bool {
        let bytes = size_of_val(words);
        let offset = memory.start() as usize / PAGE * size_of::<u64>();
        // SAFETY: Into the words.
        let read = unsafe { libc::pread(self.0, words.as_mut_ptr().cast(), bytes, offset as libc::off_t) };
        read == bytes as isize
    }
}

impl Drop for Pagemap {
    fn drop(&mut self) {
        // SAFETY: Ours.
        unsafe { libc::close(self.0) };
    }
}
