// SPDX-License-Identifier: MIT OR Apache-2.0

//! What all Dune threads of a process share, and where the process finds it.
//!
//! # Life
//!
//! The first thread that enters Dune mode opens the device, reserves the arena and builds the default page table; the
//! last one that leaves, or ends, gives all of it back. A child of fork has a copy of the arena and a registry that is
//! empty: the child of a Dune thread puts itself in (`host_loop/clone.rs`), any other child starts anew if it ever
//! enters.
//!
//! # Safety
//!
//! The arena is alive as long as a thread is counted in `Process::threads`. Only what is atomic changes while more
//! than one thread can see it.

use core::mem::offset_of;
use core::ptr;
use core::sync::atomic::AtomicBool;
use core::sync::atomic::AtomicPtr;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::AcqRel;
use core::sync::atomic::Ordering::Acquire;
use core::sync::atomic::Ordering::Relaxed;
use core::sync::atomic::Ordering::Release;
use core::sync::atomic::Ordering::SeqCst;

use dune_abi::Info;

use crate::hook;
use crate::host_loop::HostContext;
use crate::layout;
use crate::paging;
use crate::paging::memory::Memory;
use crate::paging::tables::Tables;
use crate::percpu;
use crate::percpu::Block;
use crate::percpu::Idt;
use crate::sys;
use crate::sys::Errno;
use crate::trap;

/// How the FPU state is saved.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Fpu {
    /// XSAVE, else FXSAVE.
    pub has_xsave: bool,
    /// Bytes that are written, rounded up to 64.
    pub bytes: u64,
    /// The features that are saved.
    pub xcr0: u64,
}

/// What is at the start of the arena.
#[repr(C)]
pub(crate) struct Process {
    /// Nonzero: the system call of this number needs the host loop's slow path.
    pub special: [u8; 512],
    /// Address of the arena.
    pub start: u64,
    /// Threads that hold an area, and handles of page tables.
    pub threads: AtomicU32,
    /// Threads made in Dune mode are in Dune mode.
    pub inherit_threads: AtomicBool,
    /// Children made in Dune mode are in Dune mode.
    pub inherit_children: AtomicBool,
    /// The device.
    pub fd: i32,
    pub fpu: Fpu,
    pub info: Info,
    pub memory: Memory,
    /// Some page table has, or had, pages that are copied on write.
    pub has_copies: AtomicBool,
    /// Hooks of all threads' system calls.
    pub hooks: hook::Pair,
    /// Handles of page tables, each of which counts in `threads` too.
    handles: AtomicU32,
    /// One of the handles is no page table, and stays.
    kept: AtomicBool,
    /// CR4.PCIDE is set in the guest: page tables have PCIDs.
    pub has_pcid: bool,
    /// CR4.PKE is set in the guest.
    pub has_keys: bool,
    /// Addresses in the GiBs that every page table must map.
    pub essential: [u64; ESSENTIAL],
    /// CR4 with which its threads start.
    pub cr4: u64,
    /// Behind the last area that ever was in use.
    areas_end: AtomicU32,
    /// Areas in use, by bits.
    used: [AtomicU64; WORDS],
    /// Areas whose memory is accessible and whose guards are in place.
    ready: [AtomicU64; WORDS],
}

/// Addresses of `Process::essential`.
pub(crate) const ESSENTIAL: usize = 16;

/// CR4 (SDM, "Control Registers").
pub(crate) const CR4_PCIDE: u64 = 1 << 17;
pub(crate) const CR4_PKE: u64 = 1 << 22;

const WORDS: usize = layout::AREA_COUNT.div_ceil(64);

const _: () = assert!(size_of::<Process>() <= layout::FORWARD);

/// A page that a child of fork finds empty.
#[repr(C)]
struct Registry {
    /// Thread that holds the lock; 0 if none.
    lock: AtomicU32,
    /// Of [`sys::Actions`].
    actions_lock: AtomicU32,
    process: AtomicPtr<Process>,
}

static REGISTRY: AtomicPtr<Registry> = AtomicPtr::new(ptr::null_mut());

/// The registry, made on first use and never unmapped.
fn registry() -> Result<&'static Registry, Errno> {
    let mut found = REGISTRY.load(Acquire);
    if found.is_null() {
        const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: Fresh memory.
        let page = unsafe { sys::mmap(layout::PAGE, READ_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)? };
        let wiped = sys::madvise(page, layout::PAGE, libc::MADV_WIPEONFORK);
        let new = page as *mut Registry;
        let published = wiped.and_then(|()| {
            REGISTRY
                .compare_exchange(ptr::null_mut(), new, AcqRel, Acquire)
                .map_err(|other| {
                    found = other;
                    Errno(0)
                })
        });
        match published {
            Ok(_) => {
                // SAFETY: Our own page, zeroed and never unmapped from now on.
                sys::ACTIONS_LOCK.store(unsafe { &raw mut (*new).actions_lock }, Release);
                found = new;
            }
            Err(errno) => {
                // SAFETY: Nobody has seen the page.
                let _ = unsafe { sys::munmap(page, layout::PAGE) };
                if errno != Errno(0) {
                    return Err(errno);
                }
            }
        }
    }
    // SAFETY: Published above, zeroed or written by us, never unmapped.
    Ok(unsafe { &*found })
}

/// The registry's lock. Held by code outside Dune mode only, and never while the program's code runs.
struct Locked(&'static Registry);

impl Locked {
    fn new(registry: &'static Registry) -> Self {
        let me = sys::gettid();
        while registry.lock.compare_exchange(0, me, Acquire, Relaxed).is_err() {
            sys::yield_now();
        }
        Self(registry)
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        self.0.lock.store(0, Release);
    }
}

/// What Dune threads of this process share; none where there is no Dune thread.
///
/// To be used by a thread that is counted, or for comparison.
pub(crate) fn find() -> Option<*const Process> {
    let registry = REGISTRY.load(Acquire);
    if registry.is_null() {
        return None;
    }
    // SAFETY: Never unmapped.
    let process = unsafe { (*registry).process.load(Acquire) };
    (!process.is_null()).then_some(process.cast_const())
}

/// Counts the calling thread in, after `make` where it is the first.
///
/// `make` gets a fresh arena and fills in its `Process`; where it fails the arena is gone again.
pub(crate) fn join<E: From<Errno>>(make: impl FnOnce(u64) -> Result<(), E>) -> Result<*const Process, E> {
    let locked = Locked::new(registry()?);
    let mut process = locked.0.process.load(Acquire);
    if process.is_null() {
        let start = reserve()?;
        if let Err(error) = make(start) {
            // SAFETY: Nobody else has seen it.
            let _ = unsafe { sys::munmap(start, layout::ARENA_BYTES) };
            return Err(error);
        }
        process = start as *mut Process;
        locked.0.process.store(process, Release);
    }
    // SAFETY: Alive while in the registry, whose lock is held.
    unsafe { (*process).threads.fetch_add(1, AcqRel) };
    Ok(process)
}

/// Counts a thread out. Where it was the last one `end` is called, and the caller has to unmap the arena.
///
/// A thread that ends is counted out while it still runs on its area, whose bit it clears as the very last: so the last
/// one waits until no area but its own is in use. (Where that takes too long, for one that never gets the CPU, the arena
/// stays.)
///
/// # Safety
///
/// The thread must have been counted in, and use nothing of the arena any more but its own area.
pub(crate) unsafe fn part(process: *const Process, own_area: Option<u64>, end: impl FnOnce(&Process)) -> bool {
    let Ok(registry) = registry() else {
        return false;
    };
    let _locked = Locked::new(registry);
    // SAFETY: The caller is counted, so it is alive.
    let shared = unsafe { &*process };
    if shared.threads.fetch_sub(1, AcqRel) != 1 {
        return false;
    }
    let _ = registry
        .process
        .compare_exchange(process.cast_mut(), ptr::null_mut(), AcqRel, Acquire);
    end(shared);
    shared.wait_for_areas(own_area)
}

/// Calls `f` if the calling thread, which is counted in, is the only one; none comes in meanwhile.
pub(crate) fn if_alone(process: &Process, f: impl FnOnce()) {
    let Ok(registry) = registry() else {
        return;
    };
    let _locked = Locked::new(registry);
    if process.threads.load(Acquire) == 1 {
        f();
    }
}

/// In the child of a fork by a Dune thread: its copy of the arena is what it has, and the calling thread is alone.
pub(crate) fn adopt(process: &Process, own_area: u64) -> Result<(), Errno> {
    process.threads.store(1 + process.handles.load(Relaxed), Release);
    let own = process.index(own_area);
    for (index, word) in process.used.iter().enumerate() {
        let keep = if index == own / 64 { 1 << (own % 64) } else { 0 };
        let mut gone = word.swap(keep, AcqRel) & !keep;
        while gone != 0 {
            let area = process.area(index * 64 + gone.trailing_zeros() as usize);
            if process.is_ready(area) {
                // SAFETY: Accessible, and a block or zeroes.
                paging::forget_thread(process, unsafe { &(*(area as *const Block)).here });
            }
            // SAFETY: The copy of the area of a thread that this process does not have.
            let _ = unsafe { sys::forget(area, layout::AREA_BYTES) };
            gone &= gone - 1;
        }
    }
    registry()?.process.store(ptr::from_ref(process).cast_mut(), Release);
    Ok(())
}

/// Reserves an arena and makes what is needed at once accessible.
fn reserve() -> Result<u64, Errno> {
    let bytes = layout::ARENA_BYTES as u64;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: Fresh memory; what is given back or protected is part of it and nobody has seen it.
    unsafe {
        let got = sys::mmap(2 * bytes as usize, libc::PROT_NONE, flags, -1, 0)?;
        let start = got.next_multiple_of(bytes);
        if start > got {
            sys::munmap(got, (start - got) as usize)?;
        }
        let rest = got + 2 * bytes - (start + bytes);
        if rest > 0 {
            sys::munmap(start + bytes, rest as usize)?;
        }
        // A few pages of it are used: huge ones would be zeroed at the first touch. An old kernel may refuse.
        let _ = sys::madvise(start, bytes as usize, libc::MADV_NOHUGEPAGE);
        let accessible = libc::PROT_READ | libc::PROT_WRITE;
        sys::mprotect(start, layout::AREAS, accessible)?;
        sys::mprotect(start + layout::POOL as u64, layout::POOL_STEP, accessible)?;
        Ok(start)
    }
}

impl Process {
    /// Writes the start of a fresh arena.
    ///
    /// # Safety
    ///
    /// `start` must be a fresh arena, and `fd` the device.
    pub unsafe fn write(start: u64, fd: i32, info: Info, fpu: Fpu, special: [u8; 512]) -> *mut Self {
        let process = start as *mut Self;
        let has_1g = info.capabilities & dune_abi::CAP_GUEST_1G != 0;
        // SAFETY: The caller's.
        unsafe {
            process.write(Self {
                special,
                start,
                threads: AtomicU32::new(0),
                inherit_threads: AtomicBool::new(true),
                inherit_children: AtomicBool::new(true),
                fd,
                fpu,
                cr4: percpu::cr4(&info),
                info,
                memory: Memory::new(fd, has_1g, start),
                has_copies: AtomicBool::new(false),
                hooks: hook::Pair::new(),
                handles: AtomicU32::new(0),
                kept: AtomicBool::new(false),
                has_pcid: info.cr4_guest_owned & CR4_PCIDE != 0,
                has_keys: info.cr4_guest_owned & CR4_PKE != 0,
                essential: [start; ESSENTIAL],
                areas_end: AtomicU32::new(0),
                used: [const { AtomicU64::new(0) }; WORDS],
                ready: [const { AtomicU64::new(0) }; WORDS],
            });
        }
        process
    }

    /// The page tables.
    #[inline]
    pub fn tables(&self) -> Tables<'_> {
        Tables::new(&self.memory)
    }

    /// Counts a handle of a page table in.
    pub fn add_handle(&self) {
        self.handles.fetch_add(1, Relaxed);
        self.threads.fetch_add(1, AcqRel);
    }

    /// Turns the caller's part in `threads` into one that stays.
    pub fn keep(&self) {
        self.handles.fetch_add(1, Relaxed);
        self.kept.store(true, Release);
    }

    /// Whether somebody has it stay.
    pub fn is_kept(&self) -> bool {
        self.kept.load(Acquire)
    }

    /// Counts a handle out, with a Dune thread still there.
    pub fn drop_handle(&self) {
        self.handles.fetch_sub(1, Relaxed);
        self.threads.fetch_sub(1, AcqRel);
    }

    /// Counts a handle out, but for its part in `threads`.
    pub fn forget_handle(&self) {
        self.handles.fetch_sub(1, Relaxed);
    }

    /// Whether a Dune thread other than that of `own` may use a page table; without a number: any.
    pub fn others_use(&self, number: Option<u16>, own: Option<u64>) -> bool {
        let words = (self.areas_end.load(Acquire) as usize).div_ceil(64);
        for (word, (used, ready)) in self.used.iter().zip(&self.ready).enumerate().take(words) {
            let mut areas = used.load(Acquire) & ready.load(Acquire);
            while areas != 0 {
                let area = self.area(word * 64 + areas.trailing_zeros() as usize);
                areas &= areas - 1;
                if Some(area) == own {
                    continue;
                }
                // SAFETY: Accessible; a block, or zeroes where there is none yet or no more.
                let here = unsafe { &(*(area as *const Block)).here };
                if number.is_none_or(|number| here.may_use(number)) {
                    return true;
                }
            }
        }
        false
    }

    /// Pages are going to be copied on write: no page fault goes straight to a handler any more.
    pub fn expect_copies(&self) {
        self.has_copies.store(true, SeqCst);
        self.for_each_block(trap::forbid_plain);
    }

    /// Calls `f` with the block of each thread, and perhaps with one that is no thread's any more, or not yet.
    pub fn for_each_block(&self, f: impl Fn(&Block)) {
        let words = (self.areas_end.load(Acquire) as usize).div_ceil(64);
        for (word, ready) in self.ready.iter().enumerate().take(words) {
            let mut areas = ready.load(Acquire);
            while areas != 0 {
                let area = self.area(word * 64 + areas.trailing_zeros() as usize);
                areas &= areas - 1;
                // SAFETY: Accessible; a block, or zeroes where there is none yet or no more.
                f(unsafe { &*(area as *const Block) });
            }
        }
    }

    /// Whether there is one Dune thread at most. Asked by a Dune thread it means: no other, and who becomes one later
    /// starts with an empty TLB, and sees in page tables what the caller has exchanged before.
    #[inline]
    pub fn is_single(&self) -> bool {
        // An exchange is a full fence on this architecture.
        let used = self.used[0].load(SeqCst);
        self.areas_end.load(SeqCst) <= 64 && used & used.wrapping_sub(1) == 0
    }

    fn is_ready(&self, area: u64) -> bool {
        let index = self.index(area);
        self.ready[index / 64].load(Acquire) >> (index % 64) & 1 != 0
    }

    fn area(&self, index: usize) -> u64 {
        self.start + (layout::AREAS + index * layout::AREA_BYTES) as u64
    }

    /// Number of an area.
    pub fn index(&self, area: u64) -> usize {
        (area - self.start) as usize / layout::AREA_BYTES - layout::AREAS / layout::AREA_BYTES
    }

    /// Whether an address lies in an area; the area's start.
    pub fn area_of(&self, address: u64) -> Option<u64> {
        let first = self.start + layout::AREAS as u64;
        let last = self.area(layout::AREA_COUNT);
        (first..last)
            .contains(&address)
            .then_some(address & !(layout::AREA_BYTES as u64 - 1))
    }

    /// Takes an area, zeroed, for a thread. ENOSPC where all are in use.
    pub fn take_area(&self) -> Result<u64, Errno> {
        for (word_index, word) in self.used.iter().enumerate() {
            let mut seen = word.load(Relaxed);
            while seen != u64::MAX {
                let bit = seen.trailing_ones() as usize;
                let index = word_index * 64 + bit;
                if index >= layout::AREA_COUNT {
                    break;
                }
                match word.compare_exchange(seen, seen | 1 << bit, AcqRel, Relaxed) {
                    Ok(_) => {
                        return self.make_ready(index).inspect_err(|_| {
                            word.fetch_and(!(1 << bit), AcqRel);
                        });
                    }
                    Err(now) => seen = now,
                }
            }
        }
        Err(Errno(libc::ENOSPC))
    }

    /// Whether an area keeps its memory between two threads: so many stay, that making threads again and again costs no
    /// page faults, and no more, that a burst of them leaves little behind.
    pub fn stays_warm(&self, area: u64) -> bool {
        self.index(area) < layout::WARM_AREAS
    }

    fn make_ready(&self, index: usize) -> Result<u64, Errno> {
        let area = self.area(index);
        self.areas_end.fetch_max(index as u32 + 1, AcqRel);
        let (word, mask) = (&self.ready[index / 64], 1 << (index % 64));
        if word.load(Acquire) & mask == 0 {
            // SAFETY: The area is the caller's, and never was anybody's.
            unsafe {
                sys::mprotect(area, layout::AREA_BYTES, libc::PROT_READ | libc::PROT_WRITE)?;
                for guard in layout::GUARDS {
                    sys::mprotect(area + guard as u64, layout::PAGE, libc::PROT_NONE)?;
                }
            }
            word.fetch_or(mask, AcqRel);
        } else if self.stays_warm(area) {
            // Stacks and images are written before they are read. What the last thread had seen of page tables holds for
            // the empty TLB of the next one.
            // The IDT, the last of a block, is written anew as a whole.
            const _: () = assert!(offset_of!(Block, idt) + size_of::<Idt>() == size_of::<Block>());
            // SAFETY: The area is the caller's, accessible, and nothing refers to it.
            unsafe {
                sys::clear_words(area, offset_of!(Block, idt));
                sys::clear_words(area + layout::HOST as u64, size_of::<HostContext>());
            }
        }
        Ok(area)
    }

    /// Gives an area back; its contents are nobody's.
    ///
    /// # Safety
    ///
    /// Nothing may use it any more.
    pub unsafe fn give_area(&self, area: u64) {
        if !self.stays_warm(area) {
            // SAFETY: The caller's.
            let _ = unsafe { sys::forget(area, layout::AREA_BYTES) };
        }
        let (word, mask) = self.mark(area);
        word.fetch_and(mask, AcqRel);
    }

    /// Waits until no area but `own` is in use; whether that came.
    fn wait_for_areas(&self, own: Option<u64>) -> bool {
        const TRIES: u32 = 1 << 16;
        let own = own.map(|area| self.index(area));
        self.used.iter().enumerate().all(|(number, word)| {
            let ours = own
                .filter(|index| index / 64 == number)
                .map_or(0, |index| 1 << (index % 64));
            (0..TRIES).any(|_| {
                let free = word.load(Acquire) & !ours == 0;
                if !free {
                    sys::yield_now();
                }
                free
            })
        })
    }

    /// The word of the area's mark and what to AND it with to take the mark away.
    pub fn mark(&self, area: u64) -> (&AtomicU64, u64) {
        let index = self.index(area);
        (&self.used[index / 64], !(1 << (index % 64)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process structure without a device.
    fn make(start: u64) -> Result<(), Errno> {
        let fpu = Fpu {
            has_xsave: false,
            bytes: 512,
            xcr0: 0,
        };
        // SAFETY: A fresh arena; nothing here uses the fd.
        unsafe { Process::write(start, -1, Info::default(), fpu, [0; 512]) };
        Ok(())
    }

    fn access(address: u64) -> Option<String> {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let line = maps.lines().find(|line| {
            let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
            let number = |text| u64::from_str_radix(text, 16).unwrap();
            (number(start)..number(end)).contains(&address)
        });
        line.map(|line| line.split(' ').nth(1).unwrap().to_owned())
    }

    /// One test for all of it: the registry is the process'.
    #[test]
    fn threads_share_it_and_the_last_one_ends_it() {
        assert_eq!(find(), None);
        assert_eq!(join(|_| Err(Errno(7))), Err(Errno(7)));
        assert_eq!(find(), None);
        let process = join(make).unwrap();
        assert_eq!(
            join(|_| -> Result<(), Errno> { panic!("made already") }).unwrap(),
            process
        );
        assert_eq!(find(), Some(process));
        // SAFETY: Counted in twice.
        let shared = unsafe { &*process };
        assert_eq!(shared.start % layout::ARENA_BYTES as u64, 0);

        let areas: Vec<u64> = (0..layout::AREA_COUNT).map(|_| shared.take_area().unwrap()).collect();
        assert_eq!(shared.take_area(), Err(Errno(libc::ENOSPC)));
        let first = areas[0];
        assert_eq!(first % layout::AREA_BYTES as u64, 0);
        for guard in layout::GUARDS {
            assert_eq!(access(first + guard as u64).as_deref(), Some("---p"), "{guard:#x}");
        }
        for top in [
            layout::IST_TOP,
            layout::DOUBLE_TOP,
            layout::REPORT_TOP,
            layout::HOST_STACK_TOP,
        ] {
            assert_eq!(access(first + top as u64 - 8).as_deref(), Some("rw-p"), "{top:#x}");
        }
        assert_eq!(access(shared.start + layout::POOL as u64).as_deref(), Some("rw-p"));
        assert_eq!(shared.area_of(first + 5), Some(first));
        assert_eq!(shared.area_of(shared.start + 5), None);
        assert_eq!(shared.area_of(shared.start + layout::POOL as u64), None);
        // An area that is given back comes again, empty.
        let middle = areas[100];
        // SAFETY: The test's own area.
        unsafe {
            (middle as *mut u64).write(7);
            shared.give_area(middle);
            assert_eq!(shared.take_area(), Ok(middle));
            assert_eq!((middle as *const u64).read(), 0);
        }

        // SAFETY: Counted in, and the last one unmaps.
        unsafe {
            assert!(!part(process, None, |_| panic!("not the last")));
            let start = shared.start;
            // The last one waits for the areas of others.
            assert!(!shared.wait_for_areas(None));
            areas[1..].iter().for_each(|area| shared.give_area(*area));
            assert!(shared.wait_for_areas(Some(areas[0])));
            shared.give_area(areas[0]);
            let mut ended = false;
            assert!(part(process, None, |_| ended = true));
            assert!(ended);
            sys::munmap(start, layout::ARENA_BYTES).unwrap();
        }
        assert_eq!(find(), None);

        // A child finds nothing of its parent's.
        let process = join(make).unwrap();
        // SAFETY: The child only looks and ends.
        unsafe {
            let child = libc::fork();
            if child == 0 {
                libc::_exit(i32::from(find().is_some()));
            }
            let mut status = -1;
            libc::waitpid(child, &mut status, 0);
            assert_eq!(status, 0);
            let start = (*process).start;
            assert!(part(process, None, |_| {}));
            sys::munmap(start, layout::ARENA_BYTES).unwrap();
        }
    }
}
