// SPDX-License-Identifier: MIT OR Apache-2.0

//! Frames that belong to no mapping of the program: what page tables map copies to.
//!
//! ```text
//! POOL  +0        Header
//!       +USERS    users of each frame, u32 each
//!       +NEXT     number of the next frame in the list that a frame is on, u32 each
//!       +FRAMES   frames; memory is taken as they are used
//! ```
//!
//! # Safety
//!
//! A pool is one GiB of its own, aligned to it, so that the header is found from any frame. It is unmapped when its last
//! handle and the last page table that has it are gone. A page fault can need a frame anywhere, also in the middle of
//! this code: nothing here waits or allocates.

use core::sync::atomic::AtomicU32;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::AcqRel;
use core::sync::atomic::Ordering::Acquire;
use core::sync::atomic::Ordering::Relaxed;

use super::tree::Retired;
use super::PagingError;
use crate::addr::Hva;
use crate::addr::PAGE_BYTES;
use crate::sys;

/// Bytes of a pool, and its alignment.
const POOL_BYTES: u64 = dune_abi::SLOT_BYTES;
const USERS: u64 = 0x1000;
const NEXT: u64 = USERS + ALL_FRAMES * 4;
const FRAMES: u64 = (NEXT + ALL_FRAMES * 4).next_multiple_of(PAGE_BYTES);
/// Frames that the pool would have if all of it were frames: numbers are counted from its start.
const ALL_FRAMES: u64 = POOL_BYTES / PAGE_BYTES;

/// Start of a pool.
///
/// # Invariants
///
/// Frames below `fresh` were given out before. The lower half of `free` is the number of the first frame of the list of
/// free ones, 0 at its end; the upper half counts its changes. A frame on a list has no user.
#[repr(C)]
pub(crate) struct Header {
    /// Handles of the program, and page tables.
    holders: AtomicU32,
    /// Number of the first frame that never was used.
    fresh: AtomicU64,
    free: AtomicU64,
}

/// Memory of the process for page tables to map copies to: [`AddressSpace::copy_on_write`] takes frames from it.
///
/// One GiB of addresses, of which memory is taken as frames are used, and never given back to Linux before the pool is
/// dropped and no page table uses it any more. Clones are the same pool.
///
/// [`AddressSpace::copy_on_write`]: crate::AddressSpace::copy_on_write
///
/// # Examples
///
/// ```
/// let pool = libdune::FramePool::new()?;
/// let frame = pool.allocate()?;
/// assert!(frame.is_aligned(4096) && frame > pool.start());
/// // SAFETY: No page table ever mapped it.
/// unsafe { pool.free(frame) };
/// assert_eq!(pool.used(), 0);
/// # Ok::<(), libdune::PagingError>(())
/// ```
#[derive(Debug)]
pub struct FramePool {
    header: *const Header,
}

// SAFETY: Everything in the pool's bookkeeping is atomic.
unsafe impl Send for FramePool {}
// SAFETY: As above.
unsafe impl Sync for FramePool {}

impl FramePool {
    /// Reserves the addresses of a pool.
    ///
    /// # Errors
    ///
    /// [`PagingError::OutOfMemory`] where Linux refuses.
    pub fn new() -> Result<Self, PagingError> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: Fresh memory; what is given back is part of it and nobody has seen it.
        let start = unsafe {
            let reserved = sys::mmap(2 * POOL_BYTES as usize, protection, flags, -1, 0)
                .map_err(|errno| PagingError::OutOfMemory(errno.0))?;
            let start = reserved.next_multiple_of(POOL_BYTES);
            let rest = reserved + POOL_BYTES - start;
            if start > reserved {
                let _ = sys::munmap(reserved, (start - reserved) as usize);
            }
            if rest > 0 {
                let _ = sys::munmap(start + POOL_BYTES, rest as usize);
            }
            // A copy is of 4 KiB: a huge page would be zeroed for it. An old kernel may refuse.
            let _ = sys::madvise(start, POOL_BYTES as usize, libc::MADV_NOHUGEPAGE);
            start
        };
        let header = start as *const Header;
        // SAFETY: Fresh, zeroed memory. INVARIANT: No frame was given out.
        unsafe {
            (*header).holders.store(1, Relaxed);
            (*header).fresh.store(FRAMES / PAGE_BYTES, Relaxed);
        }
        Ok(Self { header })
    }

    /// Where the pool's GiB is: a multiple of 1 GiB.
    pub fn start(&self) -> Hva {
        Hva::new(self.header as u64).unwrap_or_default()
    }

    /// A frame of 4 KiB for the program's own use, zeroed: what [`AddressSpace::map`](crate::AddressSpace::map) can map.
    ///
    /// # Errors
    ///
    /// [`PagingError::OutOfFrames`] where all 261,631 are in use.
    pub fn allocate(&self) -> Result<Hva, PagingError> {
        let frame = self.header().take()?;
        // SAFETY: Nobody else's.
        unsafe { (frame.as_u64() as *mut u8).write_bytes(0, PAGE_BYTES as usize) };
        Ok(frame)
    }

    /// Gives a frame back.
    ///
    /// # Safety
    ///
    /// It must come from [`FramePool::allocate`] of this pool, and no page table may map it, nor a TLB have it, any more.
    pub unsafe fn free(&self, frame: Hva) {
        self.header().release(frame);
    }

    /// Number of the frames that are in use, by the program or by page tables.
    pub fn used(&self) -> u64 {
        let header = self.header();
        let first = FRAMES / PAGE_BYTES;
        let end = header.fresh.load(Relaxed).min(ALL_FRAMES);
        (first..end)
            .filter(|number| header.users(*number).load(Relaxed) != 0)
            .count() as u64
    }

    pub(super) fn header(&self) -> &Header {
        // SAFETY: Alive as long as it has a holder.
        unsafe { &*self.header }
    }

    /// The same pool, for a page table to hold.
    pub(super) fn hold(&self) -> *const Header {
        self.header().holders.fetch_add(1, Relaxed);
        self.header
    }
}

impl Clone for FramePool {
    fn clone(&self) -> Self {
        Self { header: self.hold() }
    }
}

impl Drop for FramePool {
    fn drop(&mut self) {
        // SAFETY: The handle's own count.
        unsafe { Header::let_go(self.header) };
    }
}

impl Header {
    /// The pool that a frame belongs to.
    ///
    /// # Safety
    ///
    /// `frame` must be one of a pool that is alive for `'a`.
    pub unsafe fn of<'a>(frame: Hva) -> &'a Self {
        // SAFETY: The caller's.
        unsafe { &*(frame.align_down(POOL_BYTES).as_u64() as *const Self) }
    }

    /// Counts a holder out; the last one unmaps.
    ///
    /// # Safety
    ///
    /// `this` must be alive and the caller's count one of it.
    pub unsafe fn let_go(this: *const Self) {
        // SAFETY: The caller's; nobody uses the pool when its count is 0.
        unsafe {
            if (*this).holders.fetch_sub(1, AcqRel) == 1 {
                let _ = sys::munmap(this as u64, POOL_BYTES as usize);
            }
        }
    }

    /// Counts one more holder.
    pub fn hold(&self) {
        self.holders.fetch_add(1, Relaxed);
    }

    fn start(&self) -> u64 {
        core::ptr::from_ref(self) as u64
    }

    fn word(&self, array: u64, number: u64) -> &AtomicU32 {
        debug_assert!(number < ALL_FRAMES);
        // SAFETY: Both arrays have an entry per frame; `number` comes from an address in the pool or from a list.
        unsafe { &*((self.start() + array + (number & (ALL_FRAMES - 1)) * 4) as *const AtomicU32) }
    }

    fn users(&self, number: u64) -> &AtomicU32 {
        self.word(USERS, number)
    }

    fn next(&self, number: u64) -> &AtomicU32 {
        self.word(NEXT, number)
    }

    fn number(&self, frame: Hva) -> u64 {
        (frame.as_u64() & (POOL_BYTES - 1)) / PAGE_BYTES
    }

    /// A frame with one user, of any contents.
    pub fn take(&self) -> Result<Hva, PagingError> {
        let number = match self.take_free() {
            Some(number) => number,
            None => {
                let number = self.fresh.fetch_add(1, Relaxed);
                if number >= ALL_FRAMES {
                    self.fresh.store(ALL_FRAMES, Relaxed);
                    return Err(PagingError::OutOfFrames);
                }
                number
            }
        };
        self.users(number).store(1, Relaxed);
        Hva::new(self.start() + number * PAGE_BYTES).ok_or(PagingError::OutOfFrames)
    }

    fn take_free(&self) -> Option<u64> {
        let mut head = self.free.load(Acquire);
        loop {
            let number = u64::from(head as u32);
            if number == 0 {
                return None;
            }
            // Another thread may have taken it meanwhile: then the exchange fails, because each one that succeeds
            // changes the upper half.
            let next = self.next(number).load(Relaxed);
            let new = (head >> 32).wrapping_add(1) << 32 | u64::from(next);
            match self.free.compare_exchange(head, new, AcqRel, Acquire) {
                Ok(_) => return Some(number),
                Err(now) => head = now,
            }
        }
    }

    /// Counts one more user of a frame, unless it has none.
    pub fn keep(&self, frame: Hva) -> bool {
        let users = self.users(self.number(frame));
        users
            .fetch_update(AcqRel, Relaxed, |users| (users != 0).then_some(users + 1))
            .is_ok()
    }

    /// Whether a frame has one user.
    pub fn is_last(&self, frame: Hva) -> bool {
        self.users(self.number(frame)).load(Acquire) == 1
    }

    /// Counts a user out; without any the frame is free.
    pub fn release(&self, frame: Hva) {
        self.release_number(self.number(frame));
    }

    fn release_number(&self, number: u64) {
        if self.users(number).fetch_sub(1, AcqRel) != 1 {
            return;
        }
        let mut head = self.free.load(Relaxed);
        loop {
            self.next(number).store(head as u32, Relaxed);
            let new = (head >> 32).wrapping_add(1) << 32 | number;
            match self.free.compare_exchange(head, new, AcqRel, Relaxed) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    /// Puts a user of a frame off until a flush; a frame with other users loses this one at once.
    pub fn retire(&self, frame: Hva, retired: &Retired) {
        let number = self.number(frame);
        if self
            .users(number)
            .fetch_update(AcqRel, Relaxed, |users| (users > 1).then_some(users - 1))
            .is_ok()
        {
            return;
        }
        // The last one: nobody else links it.
        self.next(number)
            .store((retired.0.get() & (POOL_BYTES - 1)) as u32, Relaxed);
        retired.0.set(self.start() | number);
    }

    /// Frees what was retired.
    ///
    /// # Safety
    ///
    /// The pool of the list must be alive, and the flush done.
    pub unsafe fn release_retired(retired: &Retired) {
        let head = retired.0.take();
        if head == 0 {
            return;
        }
        // SAFETY: The caller's.
        let header = unsafe { &*((head & !(POOL_BYTES - 1)) as *const Self) };
        let mut number = head & (POOL_BYTES - 1);
        while number != 0 {
            let next = u64::from(header.next(number).load(Relaxed));
            header.release_number(number);
            number = next;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_apart_counted_and_come_again() {
        let pool = FramePool::new().unwrap();
        let frames: Vec<Hva> = (0..100).map(|_| pool.allocate().unwrap()).collect();
        assert_eq!(pool.used(), 100);
        for (index, frame) in frames.iter().enumerate() {
            assert!(frame.is_aligned(PAGE_BYTES));
            // SAFETY: The test's frame.
            unsafe {
                assert_eq!((frame.as_u64() as *const u64).read(), 0);
                (frame.as_u64() as *mut u64).write(index as u64 + 1);
            }
        }
        for (index, frame) in frames.iter().enumerate() {
            // SAFETY: As above.
            assert_eq!(unsafe { (frame.as_u64() as *const u64).read() }, index as u64 + 1);
        }
        let header = pool.header();
        assert!(header.keep(frames[7]) && !header.is_last(frames[7]));
        header.release(frames[7]);
        assert!(header.is_last(frames[7]));
        header.release(frames[7]);
        assert!(!header.keep(frames[7]));
        assert_eq!(pool.used(), 99);
        assert_eq!(pool.allocate(), Ok(frames[7]));
        // SAFETY: The test's frame, zeroed again.
        assert_eq!(unsafe { (frames[7].as_u64() as *const u64).read() }, 0);
    }

    #[test]
    fn retired_frames_wait_for_the_flush() {
        let pool = FramePool::new().unwrap();
        let header = pool.header();
        let frames: Vec<Hva> = (0..3).map(|_| pool.allocate().unwrap()).collect();
        assert!(header.keep(frames[1]));
        let retired = Retired::default();
        for frame in &frames {
            header.retire(*frame, &retired);
        }
        assert_eq!(pool.used(), 3);
        // SAFETY: The pool is alive and nothing is mapped.
        unsafe { Header::release_retired(&retired) };
        assert_eq!(pool.used(), 1);
        assert!(header.is_last(frames[1]));
    }

    #[test]
    fn threads_never_get_the_same_frame() {
        let pool = FramePool::new().unwrap();
        std::thread::scope(|scope| {
            for id in 1..=4u64 {
                let pool = pool.clone();
                scope.spawn(move || {
                    for _ in 0..20_000 {
                        let frame = pool.header().take().unwrap();
                        let word = frame.as_u64() as *mut u64;
                        // SAFETY: The frame is this thread's.
                        unsafe {
                            word.write_volatile(id);
                            std::hint::spin_loop();
                            assert_eq!(word.read_volatile(), id);
                        }
                        pool.header().release(frame);
                    }
                });
            }
        });
        assert_eq!(pool.used(), 0);
    }
}
