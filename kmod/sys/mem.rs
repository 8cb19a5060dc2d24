// SPDX-License-Identifier: GPL-2.0

//! Pages and zeroed memory, charged to the memory cgroup of the caller (linux/gfp.h, linux/slab.h).

use super::bindings;
use core::ops::Deref;
use core::ops::DerefMut;
use core::ptr::NonNull;
use core::sync::atomic::AtomicUsize;
use core::sync::atomic::Ordering::Relaxed;
use kernel::prelude::*;

/// An owned, zeroed page of 4 KiB.
pub(crate) struct Page(NonNull<u8>);

// SAFETY: Plain memory.
unsafe impl Send for Page {}
// SAFETY: Only raw pointers are given out.
unsafe impl Sync for Page {}

impl Page {
    /// Allocates; may sleep. ENOMEM.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: May be called wherever sleeping is allowed.
        let addr = unsafe { bindings::dune_get_zeroed_page() } as *mut u8;
        NonNull::new(addr).map(Self).ok_or(ENOMEM)
    }

    /// The page's first byte, through the kernel's linear mapping.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.0.as_ptr()
    }

    /// Host-physical address.
    pub(crate) fn hpa(&self) -> u64 {
        // SAFETY: The page is in the linear mapping.
        unsafe { bindings::dune_virt_to_phys(self.0.as_ptr().cast()) }
    }

    pub(crate) fn struct_page(&self) -> *mut bindings::page {
        // SAFETY: As above.
        unsafe { bindings::dune_virt_to_page(self.0.as_ptr().cast()) }
    }

    /// Gives the page up without freeing it; [`Page::from_hpa`] takes it back.
    pub(crate) fn into_hpa(self) -> u64 {
        let hpa = self.hpa();
        core::mem::forget(self);
        hpa
    }

    /// Takes back a page given up by [`Page::into_hpa`].
    ///
    /// # Safety
    ///
    /// `hpa` must come from `into_hpa`, and be taken back once.
    pub(crate) unsafe fn from_hpa(hpa: u64) -> Self {
        // SAFETY: By the caller the page exists, so it has an address that is not null.
        Self(unsafe { NonNull::new_unchecked(phys_to_virt(hpa)) })
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: Owned. If it is mapped in user space too, the mapping holds a reference of its own.
        unsafe { bindings::dune_free_page(self.0.as_ptr() as _) };
    }
}

/// Pages that are to be freed together, later: a list that needs no memory of its own.
pub(crate) struct Pile(Option<NonNull<u8>>);

// SAFETY: Owns its pages.
unsafe impl Send for Pile {}

impl Pile {
    pub(crate) const fn new() -> Self {
        Self(None)
    }

    /// The page's contents stay as they are: a CPU may still be reading them.
    pub(crate) fn push(&mut self, page: Page) {
        let link = self.0.map_or(0, |next| next.as_ptr() as usize);
        // SAFETY: The page is ours, and so is the link of its `struct page`.
        unsafe { bindings::dune_page_set_link(page.0.as_ptr() as _, link as _) };
        self.0 = Some(page.0);
        core::mem::forget(page);
    }

    pub(crate) fn pop(&mut self) -> Option<Page> {
        let page = self.0?;
        // SAFETY: On the list, so its link was set in `push`.
        let next = unsafe {
            let next = bindings::dune_page_link(page.as_ptr() as _) as *mut u8;
            bindings::dune_page_set_link(page.as_ptr() as _, 0);
            next
        };
        self.0 = NonNull::new(next);
        Some(Page(page))
    }
}

impl Drop for Pile {
    fn drop(&mut self) {
        while self.pop().is_some() {}
    }
}

/// Where the kernel's linear mapping begins.
static LINEAR_MAPPING: AtomicUsize = AtomicUsize::new(0);

/// To be called once, before any page is used.
pub(crate) fn init() {
    // SAFETY: Address arithmetic only.
    LINEAR_MAPPING.store(unsafe { bindings::dune_phys_to_virt(0) } as usize, Relaxed);
}

/// Where the kernel's linear mapping has `hpa`.
#[inline(always)]
pub(crate) fn phys_to_virt(hpa: u64) -> *mut u8 {
    LINEAR_MAPPING.load(Relaxed).wrapping_add(hpa as usize) as *mut u8
}

/// An owned, zeroed slice of memory, of up to some MiB.
pub(crate) struct ZeroedSlice<T> {
    ptr: NonNull<T>,
    len: usize,
}

/// Types for which all bytes zero is a value.
///
/// # Safety
///
/// It must be one.
pub(crate) unsafe trait Zeroed {}
// SAFETY: Zero is a value of each.
unsafe impl Zeroed for u32 {}
// SAFETY: As above.
unsafe impl Zeroed for core::sync::atomic::AtomicU64 {}

// SAFETY: Owns its elements.
unsafe impl<T: Send> Send for ZeroedSlice<T> {}
// SAFETY: As above.
unsafe impl<T: Sync> Sync for ZeroedSlice<T> {}

impl<T: Zeroed> ZeroedSlice<T> {
    /// Allocates `len` elements; may sleep. ENOMEM.
    pub(crate) fn new(len: usize) -> Result<Self> {
        if len == 0 {
            return Ok(Self {
                ptr: NonNull::dangling(),
                len,
            });
        }
        let bytes = len.checked_mul(core::mem::size_of::<T>()).ok_or(ENOMEM)?;
        // SAFETY: May be called wherever sleeping is allowed.
        let ptr = unsafe { bindings::dune_kvzalloc(bytes) };
        Ok(Self {
            ptr: NonNull::new(ptr.cast()).ok_or(ENOMEM)?,
            len,
        })
    }
}

impl<T> Deref for ZeroedSlice<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: Owned, of this length, and zero is a value of `T`.
        unsafe { core::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for ZeroedSlice<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: As above, and borrowed exclusively.
        unsafe { core::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl<T> AsRef<[T]> for ZeroedSlice<T> {
    fn as_ref(&self) -> &[T] {
        self
    }
}

impl<T> AsMut<[T]> for ZeroedSlice<T> {
    fn as_mut(&mut self) -> &mut [T] {
        self
    }
}

impl<T> Drop for ZeroedSlice<T> {
    fn drop(&mut self) {
        if self.len != 0 {
            // SAFETY: Allocated in `new`.
            unsafe { bindings::dune_kvfree(self.ptr.as_ptr().cast()) };
        }
    }
}
