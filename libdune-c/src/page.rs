// SPDX-License-Identifier: MIT OR Apache-2.0

//! The page pool: frames whose address is one and the same in the process, in GPA space and in the default page table.
//!
//! # Safety
//!
//! The pool is one GiB that is never unmapped, with a `struct page` per frame beside it. The links of free pages form a
//! list; a page that was taken off it is its taker's. The list's head has a count of its changes, so that a page that
//! came back in between is noticed.

use core::ffi::c_int;
use core::ptr;
use core::sync::atomic::AtomicI32;
use core::sync::atomic::AtomicPtr;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::AcqRel;
use core::sync::atomic::Ordering::Acquire;
use core::sync::atomic::Ordering::Relaxed;
use core::sync::atomic::Ordering::Release;

use libdune::edit::Shared;
use libdune::Error;
use libdune::Gpa;
use libdune::Gva;
use libdune::Hva;
use libdune::PagingError;

use crate::out::STDOUT;
use crate::vm::physaddr_t;

pub(crate) const PAGE: u64 = 4096;
pub(crate) const GIB: u64 = 1 << 30;
const PAGES: u64 = GIB / PAGE;
/// Bytes of memory that is taken at once, so that the first use of each page costs no fault of its own.
const STEP: u64 = 2 << 20;

/// A page of the pool.
#[repr(C)]
pub struct page {
    /// Of lists that the page is on: the owner's, or the pool's.
    pub link: AtomicPtr<page>,
    /// Users: who called dune_page_alloc or dune_page_get, and entries of page tables that dune_vm_* made.
    pub r#ref: AtomicU64,
}

/// A `struct page` for each page of the pool, in order; set by dune_init.
#[no_mangle]
pub static pages: AtomicPtr<page> = AtomicPtr::new(ptr::null_mut());

/// Number of pages in the pool.
#[no_mangle]
pub static num_pages: AtomicI32 = AtomicI32::new(0);

/// Physical address of the first page.
#[no_mangle]
pub static dune_page_base: AtomicU64 = AtomicU64::new(0);

/// Number of the first page that never was used.
static FRESH: AtomicU64 = AtomicU64::new(0);
/// Number + 1 of the first free page; the upper half counts the changes.
static FREE: AtomicU64 = AtomicU64::new(0);

/// Makes the pool, or finds it a place in a new process' GPA space: the GVA of its GiB.
pub(crate) fn prepare(shared: &Shared) -> Result<Gva, Error> {
    let mut base = dune_page_base.load(Acquire);
    if base == 0 {
        base = make(shared)?;
    } else {
        claim(shared, base)?;
    }
    let gva = Gva::new(base).ok_or(PagingError::Corrupt(base))?;
    shared.address_space().fill(gva)?;
    Ok(gva)
}

fn claim(shared: &Shared, base: u64) -> Result<(), PagingError> {
    let corrupt = PagingError::Corrupt(base);
    let hva = Hva::new(base).ok_or(corrupt)?;
    shared.claim(hva, Gpa::new(base).ok_or(corrupt)?)
}

/// Looks for a GiB that is free in the process and in GPA space. CPUs have 36 bits or more: 64 GiB.
fn make(shared: &Shared) -> Result<u64, Error> {
    let mut last = None;
    for gib in (8..64).rev() {
        let at = |protection| reserve(gib * GIB, GIB as usize, protection, libc::MAP_FIXED_NOREPLACE);
        // Executable, where page tables say so: programs put code into pages of the pool. A policy may forbid that.
        let Some(base) = at(READ_WRITE | libc::PROT_EXEC).or_else(|| at(READ_WRITE)) else {
            continue;
        };
        match claim(shared, base) {
            Ok(()) => return publish(base),
            Err(error) => last = Some(error),
        }
        // SAFETY: Mapped a moment ago.
        unsafe { libc::munmap(base as *mut _, GIB as usize) };
    }
    Err(last.unwrap_or(PagingError::OutOfMemory(libc::ENOMEM)).into())
}

fn publish(base: u64) -> Result<u64, Error> {
    let bytes = PAGES as usize * size_of::<page>();
    let array = reserve(0, bytes, READ_WRITE, 0).ok_or(PagingError::OutOfMemory(libc::ENOMEM))?;
    pages.store(array as *mut page, Release);
    num_pages.store(PAGES as i32, Release);
    dune_page_base.store(base, Release);
    Ok(base)
}

const READ_WRITE: c_int = libc::PROT_READ | libc::PROT_WRITE;

fn reserve(address: u64, bytes: usize, protection: c_int, flags: c_int) -> Option<u64> {
    // SAFETY: New memory, that replaces nothing.
    let got = unsafe {
        libc::mmap(
            address as *mut _,
            bytes,
            protection,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | flags,
            -1,
            0,
        )
    };
    if got == libc::MAP_FAILED {
        return None;
    }
    if address != 0 && got as u64 != address {
        // A kernel that does not know the flag.
        // SAFETY: Mapped a moment ago.
        unsafe { libc::munmap(got, bytes) };
        return None;
    }
    Some(got as u64)
}

/// The page with this number.
fn at(number: u64) -> *mut page {
    pages.load(Acquire).wrapping_add(number as usize)
}

fn number(pg: *const page) -> u64 {
    (pg as u64).wrapping_sub(pages.load(Acquire) as u64) / size_of::<page>() as u64
}

fn take_free() -> Option<u64> {
    let mut head = FREE.load(Acquire);
    loop {
        let index = (head as u32).checked_sub(1)?;
        // SAFETY: A page of the array. Another thread may have taken it meanwhile: then the exchange fails.
        let next = unsafe { (*at(index.into())).link.load(Relaxed) };
        let next = if next.is_null() { 0 } else { number(next) + 1 };
        let new = (head >> 32).wrapping_add(1) << 32 | next & 0xffff_ffff;
        match FREE.compare_exchange(head, new, AcqRel, Acquire) {
            Ok(_) => return Some(index.into()),
            Err(now) => head = now,
        }
    }
}

fn take_fresh() -> Option<u64> {
    let index = FRESH.fetch_add(1, Relaxed);
    if index >= num_pages.load(Acquire) as u64 {
        FRESH.store(num_pages.load(Acquire) as u64, Relaxed);
        return None;
    }
    let address = dune_page_base.load(Acquire) + index * PAGE;
    if address % STEP == 0 {
        // An advice: where it is not taken, each page comes when it is used.
        // SAFETY: The pool's own memory.
        unsafe { libc::madvise(address as *mut _, STEP as usize, libc::MADV_HUGEPAGE) };
    }
    Some(index)
}

/// A page of the pool, zeroed, with one user; NULL where all are in use.
#[no_mangle]
pub extern "C" fn dune_page_alloc() -> *mut page {
    let (index, is_used) = match take_free() {
        Some(index) => (index, true),
        None => match take_fresh() {
            Some(index) => (index, false),
            None => return ptr::null_mut(),
        },
    };
    let pg = at(index);
    // SAFETY: The page is the caller's from here on.
    unsafe {
        if is_used {
            let memory = dune_page_base.load(Acquire) + index * PAGE;
            (memory as *mut u8).write_bytes(0, PAGE as usize);
        }
        (*pg).link.store(ptr::null_mut(), Relaxed);
        (*pg).r#ref.store(1, Release);
    }
    pg
}

/// Gives a page back, whoever uses it; what counts users is dune_page_put.
#[no_mangle]
pub unsafe extern "C" fn dune_page_free(pg: *mut page) {
    if !is_page(pg) {
        return;
    }
    let index = number(pg);
    let mut head = FREE.load(Relaxed);
    loop {
        let next = (head as u32)
            .checked_sub(1)
            .map_or(ptr::null_mut(), |next| at(next.into()));
        // SAFETY: The caller gives the page up.
        unsafe {
            (*pg).r#ref.store(0, Relaxed);
            (*pg).link.store(next, Relaxed);
        }
        let new = (head >> 32).wrapping_add(1) << 32 | (index + 1);
        match FREE.compare_exchange(head, new, AcqRel, Relaxed) {
            Ok(_) => return,
            Err(now) => head = now,
        }
    }
}

/// One more user of a page; returns the page.
#[no_mangle]
pub unsafe extern "C" fn dune_page_get(pg: *mut page) -> *mut page {
    if is_page(pg) {
        // SAFETY: A page of the array.
        unsafe { (*pg).r#ref.fetch_add(1, AcqRel) };
    }
    pg
}

/// One user less; the last one frees the page.
#[no_mangle]
pub unsafe extern "C" fn dune_page_put(pg: *mut page) {
    // SAFETY: A page of the array; without users it is given up.
    unsafe {
        if is_page(pg) && (*pg).r#ref.fetch_sub(1, AcqRel) == 1 {
            dune_page_free(pg);
        }
    }
}

/// Prints how many pages are in use and free.
#[no_mangle]
pub extern "C" fn dune_page_stats() {
    let all = num_pages.load(Acquire) as u64;
    let fresh = FRESH.load(Relaxed).min(all);
    // SAFETY: Pages of the array.
    let used = (0..fresh)
        .filter(|index| unsafe { (*at(*index)).r#ref.load(Relaxed) } != 0)
        .count() as u64;
    STDOUT.print(format_args!("dune: pages: {used} in use, {} free\n", all - used));
}

/// The page at a physical address of the pool.
#[no_mangle]
pub extern "C" fn dune_pa2page(pa: physaddr_t) -> *mut page {
    at(pa.wrapping_sub(dune_page_base.load(Acquire)) / PAGE)
}

/// The physical address of a page; also its address in the process and in the default page table.
#[no_mangle]
pub extern "C" fn dune_page2pa(pg: *mut page) -> physaddr_t {
    dune_page_base.load(Acquire).wrapping_add(number(pg) * PAGE)
}

/// Whether a physical address is in the pool.
#[no_mangle]
pub extern "C" fn dune_page_isfrompool(pa: physaddr_t) -> bool {
    let base = dune_page_base.load(Acquire);
    base != 0 && (base..base + GIB).contains(&pa)
}

fn is_page(pg: *const page) -> bool {
    !pages.load(Acquire).is_null() && number(pg) < PAGES
}

/// Users of the page at a physical address of the pool.
pub(crate) fn users(pa: physaddr_t) -> u64 {
    // SAFETY: The callers looked whether it is in the pool.
    unsafe { (*dune_pa2page(pa)).r#ref.load(Acquire) }
}
