// SPDX-License-Identifier: MIT OR Apache-2.0

//! dune_vm_*: page tables by their top table, ranges of pages, entries that the program edits.
//!
//! # Safety
//!
//! Entries are changed as atomics, also those whose address a program has: the CPU and other threads use them at once.

use core::ffi::c_int;
use core::ffi::c_void;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::AcqRel;
use core::sync::atomic::Ordering::Acquire;
use core::sync::atomic::Ordering::Relaxed;

use libdune::edit::forget;
use libdune::edit::Missing;
use libdune::edit::RawEntry;
use libdune::edit::WHOLE;
use libdune::AddressSpace;
use libdune::Gpa;
use libdune::Gva;
use libdune::Hva;
use libdune::PagingError;

use crate::entry::shared;
use crate::page;
use crate::page::dune_pa2page;
use crate::page::dune_page2pa;
use crate::page::dune_page_alloc;
use crate::page::dune_page_get;
use crate::page::dune_page_isfrompool;
use crate::page::dune_page_put;
use crate::page::PAGE;

/// An entry of a page table, as the CPU reads it.
pub type ptent_t = u64;
/// A guest-physical address: what entries hold.
pub type physaddr_t = u64;

pub(crate) const PTE_P: u64 = 1 << 0;
pub(crate) const PTE_W: u64 = 1 << 1;
const PTE_U: u64 = 1 << 2;
const PTE_PCD: u64 = 1 << 4;
const PTE_A: u64 = 1 << 5;
const PTE_D: u64 = 1 << 6;
const PTE_PS: u64 = 1 << 7;
pub(crate) const PTE_COW: u64 = 1 << 9;
const PTE_USR1: u64 = 1 << 55;
const PTE_USR2: u64 = 1 << 56;
const PTE_NX: u64 = 1 << 63;
pub(crate) const PTE_ADDR: u64 = 0x000f_ffff_ffff_f000;

const PERM_R: c_int = 1;
const PERM_W: c_int = 2;
const PERM_X: c_int = 4;
const PERM_U: c_int = 8;
const PERM_UC: c_int = 0x10;
const PERM_COW: c_int = 0x20;
const PERM_BIG: c_int = 0x100;
const PERM_BIG_1GB: c_int = 0x200;
const PERM_USR1: c_int = 0x1000;
const PERM_USR2: c_int = 0x2000;

const CREATE_NONE: c_int = 0;
const CREATE_BIG: c_int = 2;
const CREATE_BIG_1GB: c_int = 3;

/// Pages of the pool that are given back behind one flush.
const AT_ONCE: usize = 64;

/// The bits of an entry that permissions mean.
fn pte_bits(perm: c_int) -> u64 {
    let bit = |flag: c_int, bit: u64| if perm & flag != 0 { bit } else { 0 };
    let no = |flag: c_int, bit: u64| if perm & flag == 0 { bit } else { 0 };
    bit(PERM_R | PERM_W | PERM_X, PTE_P)
        | if perm & PERM_COW == 0 {
            bit(PERM_W, PTE_W)
        } else {
            PTE_COW
        }
        | bit(PERM_U, PTE_U)
        | bit(PERM_UC, PTE_PCD)
        | bit(PERM_USR1, PTE_USR1)
        | bit(PERM_USR2, PTE_USR2)
        | no(PERM_X, PTE_NX)
}

fn errno(error: PagingError) -> c_int {
    match error {
        PagingError::OutOfSlots(_) | PagingError::OutOfMemory(_) | PagingError::OutOfTables => -libc::ENOMEM,
        PagingError::NotMapped(_) => -libc::ENOENT,
        PagingError::Busy => -libc::EBUSY,
        _ => -libc::EINVAL,
    }
}

/// The table with this top table.
pub(crate) fn table(root: *mut ptent_t) -> Result<AddressSpace<'static>, c_int> {
    let shared = shared().map_err(|errno| -errno)?;
    shared.table_at(root as u64).ok_or(-libc::EINVAL)
}

/// Whole pages that hold a range: the first and how many bytes.
fn pages(va: *mut c_void, len: libc::size_t) -> Result<(Gva, u64), c_int> {
    let start = va as u64 & !(PAGE - 1);
    let end = (va as u64).checked_add(len as u64).ok_or(-libc::EINVAL)?;
    let bytes = end.checked_next_multiple_of(PAGE).ok_or(-libc::EINVAL)? - start;
    let gva = Gva::new(start).ok_or(-libc::EINVAL)?;
    if bytes != 0 && gva.checked_add(bytes - 1).is_none() {
        return Err(-libc::EINVAL);
    }
    Ok((gva, bytes))
}

/// Users of pages of the pool that lose one when the TLBs are flushed.
struct Leaving {
    list: [u64; AT_ONCE],
    used: usize,
}

impl Leaving {
    fn new() -> Self {
        Self {
            list: [0; AT_ONCE],
            used: 0,
        }
    }

    /// What an entry held that is changed: its page, if it counts as a user of one.
    fn add(&mut self, old: u64) {
        let pa = old & PTE_ADDR;
        if old & PTE_PS == 0 && dune_page_isfrompool(pa) {
            self.list[self.used] = pa;
            self.used += 1;
        }
    }

    fn is_full(&self) -> bool {
        self.used == AT_ONCE
    }

    /// Flushes, and gives up what left.
    fn finish(&mut self, space: &AddressSpace<'_>, start: Gva, bytes: u64) {
        space.flush(start, bytes);
        for pa in &self.list[..self.used] {
            // SAFETY: No page table of the range, nor TLB, leads there any more.
            unsafe { dune_page_put(dune_pa2page(*pa)) };
        }
        self.used = 0;
    }
}

/// Whether an entry counts as a user of a page of the pool.
fn owned_page(entry: &RawEntry<'_>, value: u64) -> Option<u64> {
    let pa = value & PTE_ADDR;
    (entry.level == 1 && dune_page_isfrompool(pa)).then_some(pa)
}

/// Gives a page other permissions and keeps what it is mapped to, and what the CPU noted.
fn protect_entry(word: &AtomicU64, bits: u64) {
    let mut old = word.load(Relaxed);
    while old & (PTE_ADDR | PTE_P) != 0 {
        let new = old & (PTE_ADDR | PTE_A | PTE_D | PTE_PS | WHOLE) | bits;
        match word.compare_exchange(old, new, AcqRel, Relaxed) {
            Ok(_) => return,
            Err(now) => old = now,
        }
    }
}

/// Gives the pages of a range other permissions, by 4 KiB where they were not mapped with PERM_BIG. Pages that are mapped
/// to nothing are passed over. A large page that the range has a part of is split. With PERM_NONE a page keeps what it is mapped to.
///
/// 0, -EINVAL, -ENOMEM.
#[no_mangle]
pub unsafe extern "C" fn dune_vm_mprotect(
    root: *mut ptent_t,
    va: *mut c_void,
    len: libc::size_t,
    perm: c_int,
) -> c_int {
    let change = || -> Result<(), c_int> {
        let (space, (start, bytes)) = (table(root)?, pages(va, len)?);
        let result = each_entry(&space, start, bytes, |entry| protect_entry(entry.word, pte_bits(perm)));
        space.flush(start, bytes);
        result
    };
    change().err().unwrap_or(0)
}

/// Calls `visit` for each entry of a range that there is: of 4 KiB, or large where the program mapped it so and the range
/// has all of it.
fn each_entry(
    space: &AddressSpace<'_>,
    start: Gva,
    bytes: u64,
    mut visit: impl FnMut(RawEntry<'_>),
) -> Result<(), c_int> {
    let mut done = 0;
    while done < bytes {
        let at = start.checked_add(done).ok_or(-libc::EINVAL)?;
        let step = space.with_entry(at, 1, Missing::Tell, |entry| {
            let is_whole = at.align_down(entry.bytes()) == at && bytes - done >= entry.bytes();
            if !is_whole {
                return 0;
            }
            visit(entry);
            entry.bytes()
        });
        match step {
            Ok(0) => space.split(at).map_err(errno)?,
            Ok(step) => done += step,
            Err(PagingError::NotMapped(_)) => done += space.gap(at),
            Err(error) => return Err(errno(error)),
        }
    }
    Ok(())
}

/// Maps a range to physical memory: what dune_va_to_pa gives, or an address of the process that is no such. PERM_BIG and
/// PERM_BIG_1GB allow large pages where both addresses are multiples of their size.
///
/// 0, -EINVAL, -ENOMEM.
#[no_mangle]
pub unsafe extern "C" fn dune_vm_map_phys(
    root: *mut ptent_t,
    va: *mut c_void,
    len: libc::size_t,
    pa: *mut c_void,
    perm: c_int,
) -> c_int {
    let map = || -> Result<(), c_int> {
        let (space, (start, bytes)) = (table(root)?, pages(va, len)?);
        let mut leaving = Leaving::new();
        let mut result = Ok(());
        let mut done = 0;
        while done < bytes && result.is_ok() {
            let step = map_piece(&space, start, bytes, done, pa as u64 & !(PAGE - 1), perm, &mut leaving);
            if leaving.is_full() {
                leaving.finish(&space, start, bytes);
            }
            match step {
                Ok(step) => done += step,
                Err(error) => result = Err(error),
            }
        }
        leaving.finish(&space, start, bytes);
        result
    };
    map().err().unwrap_or(0)
}

/// Maps the page at `start` + `done`; how large it is.
fn map_piece(
    space: &AddressSpace<'_>,
    start: Gva,
    bytes: u64,
    done: u64,
    pa: u64,
    perm: c_int,
    leaving: &mut Leaving,
) -> Result<u64, c_int> {
    let at = start.checked_add(done).ok_or(-libc::EINVAL)?;
    let to = physical(pa.checked_add(done).ok_or(-libc::EINVAL)?)?;
    let levels = [
        (PERM_BIG_1GB, 3, 1 << 30),
        (PERM_BIG | PERM_BIG_1GB, 2, 2 << 20),
        (!0, 1, PAGE),
    ];
    for (flag, level, size) in levels {
        let is_one = level == 1 || perm & flag != 0 && level <= space.largest_leaf();
        if !is_one || at.as_u64() % size != 0 || to % size != 0 || bytes - done < size {
            continue;
        }
        let large = if level > 1 { PTE_PS | WHOLE } else { 0 };
        let value = to | pte_bits(perm) | large;
        if level > 1 {
            empty(space, at, size, leaving);
            space.replace_table(at, level, value).map_err(errno)?;
        } else {
            set_small_entry(space, at, value, leaving)?;
        }
        return Ok(size);
    }
    Err(-libc::EINVAL)
}

/// Sets the 4 KiB entry of an address, also inside a large page of the program's own, which is split.
fn set_small_entry(space: &AddressSpace<'_>, at: Gva, value: u64, leaving: &mut Leaving) -> Result<(), c_int> {
    if leaving.is_full() {
        leaving.finish(space, at, PAGE);
    }
    loop {
        let set = |entry: RawEntry<'_>| {
            if entry.level > 1 {
                return false;
            }
            leaving.add(entry.word.swap(value, AcqRel));
            true
        };
        if space.with_entry(at, 1, Missing::Make, set).map_err(errno)? {
            return Ok(());
        }
        space.split(at).map_err(errno)?;
    }
}

/// The GPA that a physical address of the API means.
fn physical(pa: u64) -> Result<u64, c_int> {
    let shared = shared().map_err(|errno| -errno)?;
    let is_known = |gpa: &Gpa| shared.hva(*gpa).is_some();
    if let Some(gpa) = Gpa::new(pa).filter(is_known) {
        return Ok(gpa.as_u64());
    }
    let hva = Hva::new(pa).ok_or(-libc::EINVAL)?;
    shared.gpa(hva).map(Gpa::as_u64).map_err(errno)
}

/// Takes pages of the pool out of a range, whose entries go in a moment.
fn empty(space: &AddressSpace<'_>, start: Gva, bytes: u64, leaving: &mut Leaving) {
    let Some(last) = start.checked_add(bytes - 1) else {
        return;
    };
    space.for_each_entry(start, last, |_, entry| {
        if owned_page(&entry, entry.word.load(Acquire)).is_some() {
            leaving.add(entry.word.swap(0, AcqRel));
            if leaving.is_full() {
                leaving.finish(space, start, bytes);
            }
        }
        true
    });
}

/// Maps a range to fresh pages of the pool, zeroed, each with one user.
///
/// 0, -EINVAL, -ENOMEM.
#[no_mangle]
pub unsafe extern "C" fn dune_vm_map_pages(
    root: *mut ptent_t,
    va: *mut c_void,
    len: libc::size_t,
    perm: c_int,
) -> c_int {
    let map = || -> Result<(), c_int> {
        let (space, (start, bytes)) = (table(root)?, pages(va, len)?);
        let mut leaving = Leaving::new();
        let mut result = Ok(());
        for index in 0..bytes / PAGE {
            let mapped = start.checked_add(index * PAGE).ok_or(-libc::EINVAL).and_then(|at| {
                let pg = dune_page_alloc();
                if pg.is_null() {
                    return Err(-libc::ENOMEM);
                }
                let value = dune_page2pa(pg) | pte_bits(perm);
                // SAFETY: Nobody has seen it.
                set_small_entry(&space, at, value, &mut leaving).inspect_err(|_| unsafe { dune_page_put(pg) })
            });
            if mapped.is_err() {
                result = mapped;
                break;
            }
        }
        leaving.finish(&space, start, bytes);
        result
    };
    map().err().unwrap_or(0)
}

/// Takes the pages of a range out of the table; pages of the pool lose a user. What the process has there stays.
#[no_mangle]
pub unsafe extern "C" fn dune_vm_unmap(root: *mut ptent_t, va: *mut c_void, len: libc::size_t) {
    let (Ok(space), Ok((start, bytes))) = (table(root), pages(va, len)) else {
        return;
    };
    let mut leaving = Leaving::new();
    let _ = each_entry(&space, start, bytes, |entry| {
        let old = entry.word.swap(0, AcqRel);
        if entry.level == 1 {
            leaving.add(old);
        }
        if leaving.is_full() {
            leaving.finish(&space, start, bytes);
        }
    });
    leaving.finish(&space, start, bytes);
}

/// The entry for an address, to be read and changed. CREATE_NONE: the entry of 4 KiB, -ENOENT where there is no table for
/// it; large pages that the program did not ask for are split. The others make what is missing: CREATE_NORMAL down to
/// 4 KiB, CREATE_BIG to 2 MiB, CREATE_BIG_1GB to 1 GiB; -EEXIST where a table of smaller pages is there. A large page that
/// the program mapped is its own entry.
///
/// 0, -EINVAL, -ENOENT, -EEXIST, -ENOMEM.
#[no_mangle]
pub unsafe extern "C" fn dune_vm_lookup(
    root: *mut ptent_t,
    va: *mut c_void,
    create: c_int,
    pte_out: *mut *mut ptent_t,
) -> c_int {
    let look_up = || -> Result<*mut ptent_t, c_int> {
        let space = table(root)?;
        let at = Gva::new(va as u64 & !(PAGE - 1)).ok_or(-libc::EINVAL)?;
        let (level, missing) = match create {
            CREATE_NONE => (1, Missing::Tell),
            CREATE_BIG => (2, Missing::Make),
            CREATE_BIG_1GB => (3, Missing::Make),
            _ => (1, Missing::Make),
        };
        let look = |entry: RawEntry<'_>| (entry.level, entry.word.load(Acquire), entry.word.as_ptr());
        let (level, value, pte) = space.with_entry(at, level, missing, look).map_err(errno)?;
        if level > 1 && value & (PTE_P | PTE_PS) == PTE_P {
            return Err(-libc::EEXIST);
        }
        Ok(pte)
    };
    match look_up() {
        Ok(pte) => {
            // SAFETY: The caller's pointer.
            unsafe { pte_out.write(pte) };
            0
        }
        Err(error) => error,
    }
}

/// Maps a page of the pool, which gets a user more.
///
/// 0, -EINVAL, -ENOMEM.
#[no_mangle]
pub unsafe extern "C" fn dune_vm_insert_page(
    root: *mut ptent_t,
    va: *mut c_void,
    pg: *mut page::page,
    perm: c_int,
) -> c_int {
    let insert = || -> Result<(), c_int> {
        let (space, (start, _)) = (table(root)?, pages(va, 1)?);
        let pa = dune_page2pa(pg);
        if !dune_page_isfrompool(pa) {
            return Err(-libc::EINVAL);
        }
        let mut leaving = Leaving::new();
        // SAFETY: A page of the pool, which loses the user again where it is not mapped.
        unsafe { dune_page_get(pg) };
        let set = set_small_entry(&space, start, pa | pte_bits(perm), &mut leaving);
        // SAFETY: As above.
        set.inspect_err(|_| unsafe { dune_page_put(pg) })?;
        leaving.finish(&space, start, PAGE);
        Ok(())
    };
    insert().err().unwrap_or(0)
}

/// The page of the pool that an address is mapped to; NULL where it is none. It gets no user more.
#[no_mangle]
pub unsafe extern "C" fn dune_vm_lookup_page(root: *mut ptent_t, va: *mut c_void) -> *mut page::page {
    let look_up = || -> Option<u64> {
        let at = Gva::new(va as u64 & !(PAGE - 1))?;
        let space = table(root).ok()?;
        let page = |entry: RawEntry<'_>| owned_page(&entry, entry.word.load(Acquire));
        space.with_entry(at, 1, Missing::Tell, page).ok()?
    };
    look_up().map_or(core::ptr::null_mut(), |pa| dune_pa2page(pa))
}

/// A page table of its own that maps the same; pages of the pool get a user more. NULL where there is no memory, or the
/// process has 4,096 page tables.
#[no_mangle]
pub unsafe extern "C" fn dune_vm_clone(root: *mut ptent_t) -> *mut ptent_t {
    let Ok(space) = table(root) else {
        return core::ptr::null_mut();
    };
    let Ok(copy) = space.duplicate() else {
        return core::ptr::null_mut();
    };
    let copy = forget(copy);
    for_all(&copy, |entry| {
        if let Some(pa) = owned_page(&entry, entry.word.load(Acquire)) {
            // SAFETY: A page of the pool.
            unsafe { dune_page_get(dune_pa2page(pa)) };
        }
    });
    copy.root_table()
}

/// Gives a page table of dune_vm_clone back; pages of the pool lose a user. Not pgroot, which stays.
#[no_mangle]
pub unsafe extern "C" fn dune_vm_free(root: *mut ptent_t) {
    let (Ok(space), Ok(shared)) = (table(root), shared()) else {
        return;
    };
    if space.root() == shared.address_space().root() {
        return;
    }
    let start = Gva::default();
    let mut leaving = Leaving::new();
    for_all(&space, |entry| {
        if owned_page(&entry, entry.word.load(Acquire)).is_some() {
            leaving.add(entry.word.swap(0, AcqRel));
            if leaving.is_full() {
                leaving.finish(&space, start, u64::MAX);
            }
        }
    });
    leaving.finish(&space, start, u64::MAX);
    // SAFETY: The program gives it up.
    unsafe { shared.give_back(space) };
}

/// All entries that hold something.
fn for_all(space: &AddressSpace<'_>, mut visit: impl FnMut(RawEntry<'_>)) {
    if let (Some(first), Some(last)) = (Gva::new(0), Gva::new(u64::MAX)) {
        space.for_each_entry(first, last, |_, entry| {
            visit(entry);
            true
        });
    }
}

/// Settles a write to a page with PTE_COW in the loaded table: it gets a copy from the pool, or becomes writable where it
/// is a page of the pool without other users. Other faults it leaves as they are.
#[no_mangle]
pub unsafe extern "C" fn dune_vm_default_pgflt_handler(addr: usize, fec: u64) {
    const FEC_W: u64 = 2;
    let (Ok(shared), Some(at)) = (shared(), Gva::new(addr as u64 & !(PAGE - 1))) else {
        return;
    };
    // SAFETY: Not kept.
    let Some(thread) = (unsafe { shared.thread() }) else {
        return;
    };
    // SAFETY: Nothing loads another table meanwhile.
    let space = unsafe { thread.loaded_space() };
    // What is there; then something else, if it still is.
    let look = |entry: RawEntry<'_>| {
        let old = entry.word.load(Acquire);
        (entry.level == 1).then_some((old, owned_page(&entry, old)))
    };
    let replace = |old: u64, new: u64| {
        let exchange =
            |entry: RawEntry<'_>| entry.level == 1 && entry.word.compare_exchange(old, new, AcqRel, Acquire).is_ok();
        space.with_entry(at, 1, Missing::Tell, exchange).unwrap_or(false)
    };
    loop {
        let Ok(Some((old, own))) = space.with_entry(at, 1, Missing::Tell, look) else {
            return;
        };
        if fec & FEC_W == 0 || old & (PTE_P | PTE_COW) != PTE_P | PTE_COW {
            return;
        }
        let flags = old & !(PTE_ADDR | PTE_COW) | PTE_W;
        if own.is_some_and(|pa| page::users(pa) == 1) {
            if replace(old, old & PTE_ADDR | flags) {
                space.flush(at, PAGE);
                return;
            }
            continue;
        }
        let pg = dune_page_alloc();
        if pg.is_null() {
            crate::out::die(format_args!("no page for a copy on write at {addr:#x}"));
        }
        let copy = dune_page2pa(pg);
        // SAFETY: The page can be read, the entry says; the copy is ours, and every table maps the pool.
        unsafe { core::ptr::copy_nonoverlapping(at.as_u64() as *const u8, copy as *mut u8, PAGE as usize) };
        if replace(old, copy | flags) {
            space.flush(at, PAGE);
            if let Some(pa) = own {
                // SAFETY: Nobody maps it here any more.
                unsafe { dune_page_put(dune_pa2page(pa)) };
            }
            return;
        }
        // SAFETY: Nobody has seen it.
        unsafe { dune_page_put(pg) };
    }
}
