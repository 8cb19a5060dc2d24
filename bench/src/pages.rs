// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory to measure with.

pub const PAGE: usize = 4096;

/// Private memory of the program.
pub struct Memory {
    start: *mut u8,
    bytes: usize,
}

impl Memory {
    #[inline]
    pub fn new(bytes: usize) -> Self {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: A fresh mapping.
        let start = unsafe { libc::mmap(core::ptr::null_mut(), bytes, protection, flags, -1, 0) };
        assert!(start != libc::MAP_FAILED, "mmap");
        Self {
            start: start.cast(),
            bytes,
        }
    }

    /// Without huge pages.
    pub fn small(self) -> Self {
        self.advise(libc::MADV_NOHUGEPAGE);
        self
    }

    /// With them.
    pub fn large(self) -> Self {
        self.advise(libc::MADV_HUGEPAGE);
        self
    }

    /// With all pages there.
    pub fn populated(self) -> Self {
        self.advise(libc::MADV_POPULATE_WRITE);
        self
    }

    /// Takes the pages away.
    #[inline]
    pub fn drop_pages(&self) {
        self.advise(libc::MADV_DONTNEED);
    }

    #[inline]
    fn advise(&self, advice: libc::c_int) {
        // SAFETY: A mapping of our own.
        let result = unsafe { libc::madvise(self.start.cast(), self.bytes, advice) };
        assert_eq!(result, 0, "madvise {advice}");
    }

    pub fn start(&self) -> *mut u8 {
        self.start
    }

    /// Offset of the first address that is a multiple of `bytes`.
    pub fn first_multiple_of(&self, bytes: usize) -> usize {
        (self.start as usize).next_multiple_of(bytes) - self.start as usize
    }

    #[inline(always)]
    pub fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset < self.bytes);
        // SAFETY: In the mapping.
        unsafe { self.start.add(offset) }
    }

    #[inline(always)]
    pub fn write(&self, offset: usize, value: u8) {
        // SAFETY: In the mapping, which is writable, or a handler makes it so.
        unsafe { self.at(offset).write_volatile(value) }
    }

    #[inline(always)]
    pub fn read(&self, offset: usize) -> u8 {
        // SAFETY: As above.
        unsafe { self.at(offset).read_volatile() }
    }

    /// Linux' own protection.
    pub fn protect(&self, offset: usize, bytes: usize, protection: libc::c_int) {
        // SAFETY: A mapping of our own.
        let result = unsafe { libc::mprotect(self.at(offset).cast(), bytes, protection) };
        assert_eq!(result, 0, "mprotect");
    }
}

impl Drop for Memory {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: Mapped in `new`.
        unsafe { libc::munmap(self.start.cast(), self.bytes) };
    }
}
