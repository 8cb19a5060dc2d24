// SPDX-License-Identifier: MIT OR Apache-2.0

//! What Linux tells of the pages of a range: /proc/self/pagemap and its PAGEMAP_SCAN.

use linux_raw_sys::general::page_region;
use linux_raw_sys::general::pm_scan_arg;

use crate::pages::Memory;
use crate::pages::PAGE;

/// Not among the crate's numbers: `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;

pub const NO_PAGES: page_region = page_region {
    start: 0,
    end: 0,
    categories: 0,
};

pub fn pages_of(region: &page_region) -> u64 {
    (region.end - region.start) / PAGE as u64
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
        flags: u32,
        wanted: u32,
        told: u32,
        regions: &mut [page_region],
    ) -> i32 {
        let start = memory.start() as u64;
        let mut ask = pm_scan_arg {
            size: size_of::<pm_scan_arg>() as u64,
            flags: flags.into(),
            start: start + range.start as u64,
            end: start + range.end as u64,
            walk_end: 0,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            max_pages: 0,
            category_inverted: 0,
            category_mask: wanted.into(),
            category_anyof_mask: 0,
            return_mask: told.into(),
        };
        // SAFETY: The structure is as Linux has it; the regions are where it says.
        unsafe { libc::ioctl(self.0, PAGEMAP_SCAN, &raw mut ask) }
    }

    /// The number of the frame at an address; `None`: none is there, or we may not know.
    pub fn frame(&self, address: usize) -> Option<u64> {
        const PRESENT: u64 = 1 << 63;
        const FRAME: u64 = (1 << 55) - 1;
        let mut word = 0u64;
        let offset = address / PAGE * size_of::<u64>();
        // SAFETY: Into the word.
        let read = unsafe { libc::pread(self.0, (&raw mut word).cast(), 8, offset as libc::off_t) };
        (read == 8 && word & PRESENT != 0 && word & FRAME != 0).then_some(word & FRAME)
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
