// SPDX-License-Identifier: GPL-2.0

//! Address spaces, VMAs, faults and notifiers (linux/mm.h, linux/mmu_notifier.h).

use super::bindings;
use super::mem::Page;
use core::cell::UnsafeCell;
use core::mem::zeroed;
use core::ops::Range;
use core::ptr::NonNull;
use core::sync::atomic::AtomicUsize;
use kernel::error::to_result;
use kernel::ffi::c_int;
use kernel::ffi::c_ulong;
use kernel::prelude::*;

/// An `mm_struct` that a notifier of ours keeps allocated; compared by address.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mm(NonNull<bindings::mm_struct>);

// SAFETY: Only an address; each use says what it needs.
unsafe impl Send for Mm {}
// SAFETY: As above.
unsafe impl Sync for Mm {}

impl Mm {
    /// The calling process' address space; `None` in a kernel thread.
    pub(crate) fn current() -> Option<Self> {
        // SAFETY: Reads a field of the current task.
        NonNull::new(unsafe { bindings::dune_current_mm() }).map(Self)
    }

    #[inline(always)]
    pub(super) fn from_raw(mm: *mut bindings::mm_struct) -> Option<Self> {
        NonNull::new(mm).map(Self)
    }

    pub(super) fn as_ptr(self) -> *const bindings::mm_struct {
        self.0.as_ptr()
    }

    /// For tables of address spaces.
    pub(crate) fn hash(self) -> usize {
        // Structures of some KiB in slabs: the low bits say little.
        (self.0.as_ptr() as usize).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40
    }

    pub(crate) fn is_current(self) -> bool {
        Self::current() == Some(self)
    }

    /// Top of the page table. The caller must be a thread of this process for it to stay.
    pub(crate) fn pgd(self) -> *const u64 {
        // SAFETY: The structure is allocated.
        unsafe { bindings::dune_mm_pgd(self.0.as_ptr()) }.cast()
    }

    /// Calls `f` while nobody else maps or unmaps anything in this process, or registers a notifier. EINTR for a signal
    /// that ends the process.
    pub(crate) fn with_write_lock<R>(self, f: impl FnOnce() -> Result<R>) -> Result<R> {
        // SAFETY: The structure is allocated, and the caller is a thread of the process.
        to_result(unsafe { bindings::dune_mmap_write_lock(self.0.as_ptr()) })?;
        let result = f();
        // SAFETY: Locked above.
        unsafe { bindings::dune_mmap_write_unlock(self.0.as_ptr()) };
        result
    }

    /// Calls `f` while nobody maps anything in this process; tells it whether anything is mapped in the range. The caller
    /// is a thread of the process. EINTR for a signal that ends it.
    pub(crate) fn with_mappings<R>(self, range: Range<u64>, f: impl FnOnce(bool) -> R) -> Result<R> {
        // SAFETY: As above; the VMA is looked at under the lock.
        let is_mapped = unsafe {
            to_result(bindings::dune_mmap_read_lock(self.0.as_ptr()))?;
            let vma = bindings::find_vma(self.0.as_ptr(), range.start as c_ulong);
            !vma.is_null() && (bindings::dune_vma_start(vma) as u64) < range.end
        };
        let result = f(is_mapped);
        // SAFETY: Locked above.
        unsafe { bindings::dune_mmap_read_unlock(self.0.as_ptr()) };
        Ok(result)
    }

    /// Lets Linux settle a fault of the calling process, if it can without waiting for anything.
    pub(crate) fn fault_in(self, hva: u64, write: bool, execute: bool) -> FaultIn {
        let mm = self.0.as_ptr();
        // SAFETY: The caller is a thread of this process (checked by `is_current` at each ioctl), so the mm is in use.
        // The VMA is used under the lock, which is released unless `handle_mm_fault` did.
        unsafe {
            if !bindings::dune_mmap_read_trylock(mm) {
                return FaultIn::NotNow;
            }
            let vma = bindings::dune_vma_at(mm, hva as c_ulong);
            let result = if vma.is_null() || bindings::dune_vma_is_userfaultfd(vma) {
                FaultIn::NotNow
            } else if execute && !bindings::dune_vma_is_executable(vma) {
                FaultIn::NotExecutable
            } else if !bindings::dune_vma_has_access(vma, write) {
                FaultIn::NotNow
            } else {
                match bindings::dune_handle_mm_fault(vma, hva as c_ulong, write, execute) as u32 {
                    bindings::DUNE_FAULT_DONE => FaultIn::Done,
                    bindings::DUNE_FAULT_DONE_UNLOCKED => return FaultIn::Done,
                    _ => FaultIn::NotNow,
                }
            };
            bindings::dune_mmap_read_unlock(mm);
            result
        }
    }
}

/// Answer of [`Mm::fault_in`].
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum FaultIn {
    /// The page table has the page now, or had it.
    Done,
    /// A native access must do it: it has to wait, or to grow a stack, or is refused.
    NotNow,
    /// The VMA does not allow execution.
    NotExecutable,
}

/// A VMA that is being mapped.
pub(crate) struct Vma(*mut bindings::vm_area_struct);

impl Vma {
    /// # Safety
    ///
    /// To be used only in `file_operations::mmap`, with its argument.
    pub(crate) unsafe fn from_raw(vma: *mut bindings::vm_area_struct) -> Self {
        Self(vma)
    }

    /// Offset in the file, in pages.
    pub(crate) fn page_offset(&self) -> u64 {
        // SAFETY: By `from_raw` the VMA is ours.
        unsafe { bindings::dune_vma_pgoff(self.0) as u64 }
    }

    pub(crate) fn bytes(&self) -> u64 {
        // SAFETY: As above.
        unsafe { bindings::dune_vma_bytes(self.0) as u64 }
    }

    pub(crate) fn is_shared(&self) -> bool {
        // SAFETY: As above.
        unsafe { bindings::dune_vma_is_shared(self.0) }
    }

    /// Maps `page` there; not inherited over fork, not in core dumps. The mapping holds a reference to the page.
    pub(crate) fn insert_run_page(&self, page: &Page) -> Result {
        // SAFETY: As above; the VMA has one page, as the caller checked.
        to_result(unsafe {
            bindings::dune_vma_set_run_page_flags(self.0);
            bindings::dune_vma_insert_page(self.0, page.struct_page())
        })
    }
}

/// What an address space tells its notifier, and how the notifier ends. None of these may sleep but where it says so; a page-table lock may be held in the `young` ones.
pub(crate) trait NotifierOps: Sync {
    /// The address space is going away: drop all mappings, for good.
    fn release(&self);
    /// Drop all mappings of the range, and install none in it until [`NotifierOps::invalidate_end`].
    /// `may_sleep`: it may let others run meanwhile.
    fn invalidate_start(&self, range: Range<u64>, may_sleep: bool);
    fn invalidate_end(&self, range: Range<u64>);
    /// Whether the range was accessed through us; `clear`: forget it; `flush`: and do so at once.
    fn young(&self, range: Range<u64>, clear: bool, flush: bool) -> bool;
    /// No callback runs any more, nor will one. Called with bottom halves off: nothing here may sleep.
    ///
    /// # Safety
    ///
    /// `this` is what was given to [`Notifier::put`], and nobody uses it any more.
    unsafe fn free(this: *mut Self);
}

/// A notifier of the calling process' address space, embedded in `T` as its first field.
///
/// # Invariants
///
/// From [`Notifier::register`] on the `mm_struct` stays allocated, until `NotifierOps::free` was called.
#[repr(C)]
pub(crate) struct Notifier {
    // First, so that its address is the notifier's.
    raw: UnsafeCell<bindings::mmu_notifier>,
    ops: UnsafeCell<bindings::mmu_notifier_ops>,
}

// SAFETY: The raw part belongs to the kernel while it is registered.
unsafe impl Sync for Notifier {}
// SAFETY: As above.
unsafe impl Send for Notifier {}

impl Notifier {
    pub(crate) fn new() -> Self {
        // SAFETY: All bytes zero is a value of these C structures.
        unsafe {
            Self {
                raw: zeroed(),
                ops: zeroed(),
            }
        }
    }

    /// Registers for `mm`, the calling process', whose lock for writing is held. ENOMEM, EINTR.
    ///
    /// # Safety
    ///
    /// `this` must be the first field of a `T` that neither moves nor goes before [`NotifierOps::free`] is called.
    pub(crate) unsafe fn register<T: NotifierOps>(this: *mut Notifier, mm: Mm) -> Result {
        // SAFETY: By the caller, `this` is valid and nobody else uses it yet.
        unsafe {
            let ops = &mut *(*this).ops.get();
            ops.release = Some(release::<T>);
            ops.clear_flush_young = Some(clear_flush_young::<T, _>);
            ops.clear_young = Some(clear_young::<T, _>);
            ops.test_young = Some(test_young::<T, _>);
            ops.invalidate_range_start = Some(invalidate_range_start::<T>);
            ops.invalidate_range_end = Some(invalidate_range_end::<T>);
            ops.free_notifier = Some(free::<T>);
            (*(*this).raw.get()).ops = ops;
            // INVARIANT: Registering takes a reference to the `mm_struct`.
            to_result(bindings::__mmu_notifier_register((*this).raw.get(), mm.0.as_ptr()))
        }
    }

    /// Ends it without waiting: callbacks may run until `NotifierOps::free` is called.
    ///
    /// # Safety
    ///
    /// It must be registered, and `put` not have been called.
    pub(crate) unsafe fn put(&self) {
        // SAFETY: By the caller.
        unsafe { bindings::mmu_notifier_put(self.raw.get()) };
    }
}

/// Waits until as many as were `put` were freed, which `count`, of those that are not, tells. For a module that goes away.
pub(crate) fn wait_for_frees(count: &AtomicUsize) {
    // SAFETY: May sleep; the counter is a word.
    unsafe {
        bindings::mmu_notifier_synchronize();
        bindings::dune_wait_until_zero(count.as_ptr().cast());
    }
}

/// # Safety
///
/// `n` must be the notifier that [`Notifier::register::<T>`] registered.
unsafe fn owner<'a, T>(n: *mut bindings::mmu_notifier) -> &'a T {
    // SAFETY: `raw` is the first field of `Notifier`, which is the first field of `T`.
    unsafe { &*n.cast::<T>() }
}

unsafe extern "C" fn release<T: NotifierOps>(n: *mut bindings::mmu_notifier, _mm: *mut bindings::mm_struct) {
    // SAFETY: Called for a notifier registered for `T`.
    unsafe { owner::<T>(n) }.release();
}

unsafe extern "C" fn free<T: NotifierOps>(n: *mut bindings::mmu_notifier) {
    // SAFETY: As above, and no callback runs any more.
    unsafe { T::free(n.cast()) };
}

/// The type of an answer: `int` before 7.0, `bool` since.
trait Young {
    fn from(is_young: bool) -> Self;
}

impl Young for bool {
    fn from(is_young: bool) -> Self {
        is_young
    }
}

impl Young for c_int {
    fn from(is_young: bool) -> Self {
        is_young as c_int
    }
}

unsafe extern "C" fn clear_flush_young<T: NotifierOps, R: Young>(
    n: *mut bindings::mmu_notifier,
    _mm: *mut bindings::mm_struct,
    start: c_ulong,
    end: c_ulong,
) -> R {
    // SAFETY: As above.
    R::from(unsafe { owner::<T>(n) }.young(start as u64..end as u64, true, true))
}

unsafe extern "C" fn clear_young<T: NotifierOps, R: Young>(
    n: *mut bindings::mmu_notifier,
    _mm: *mut bindings::mm_struct,
    start: c_ulong,
    end: c_ulong,
) -> R {
    // SAFETY: As above.
    R::from(unsafe { owner::<T>(n) }.young(start as u64..end as u64, true, false))
}

unsafe extern "C" fn test_young<T: NotifierOps, R: Young>(
    n: *mut bindings::mmu_notifier,
    _mm: *mut bindings::mm_struct,
    address: c_ulong,
) -> R {
    let start = address as u64;
    // SAFETY: As above.
    R::from(unsafe { owner::<T>(n) }.young(start..start + 1, false, false))
}

unsafe extern "C" fn invalidate_range_start<T: NotifierOps>(
    n: *mut bindings::mmu_notifier,
    range: *const bindings::mmu_notifier_range,
) -> c_int {
    // SAFETY: As above; the range lives during the call.
    let (this, range) = unsafe { (owner::<T>(n), &*range) };
    this.invalidate_start(
        range.start as u64..range.end as u64,
        range.flags & bindings::MMU_NOTIFIER_RANGE_BLOCKABLE != 0,
    );
    0
}

unsafe extern "C" fn invalidate_range_end<T: NotifierOps>(
    n: *mut bindings::mmu_notifier,
    range: *const bindings::mmu_notifier_range,
) {
    // SAFETY: As above.
    let (this, range) = unsafe { (owner::<T>(n), &*range) };
    this.invalidate_end(range.start as u64..range.end as u64);
}
