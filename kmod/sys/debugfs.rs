// SPDX-License-Identifier: GPL-2.0

//! Numbers in debugfs (linux/debugfs.h). Absent debugfs is no error.

use super::bindings;
use super::seq::Seq;
use core::ffi::c_void;
use core::ptr::NonNull;
use core::sync::atomic::AtomicUsize;

/// A directory of read-only numbers; removed when dropped.
pub(crate) struct Dir(*mut c_void);

// SAFETY: debugfs does its own locking.
unsafe impl Send for Dir {}
// SAFETY: As above.
unsafe impl Sync for Dir {}

impl Dir {
    /// A directory in `parent`, or at the top.
    pub(crate) fn new(name: &core::ffi::CStr, parent: Option<&Dir>) -> Self {
        let parent = parent.map_or(core::ptr::null_mut(), |parent| parent.0);
        // SAFETY: The name is a C string. An error pointer is accepted by all other functions of debugfs.
        Self(unsafe { bindings::dune_debugfs_create_dir(name.as_ptr().cast(), parent) })
    }

    /// Adds the file `name` that shows `value` in decimal.
    pub(crate) fn add(&self, name: &core::ffi::CStr, value: &'static AtomicUsize) {
        // SAFETY: `value` is static and as large as an unsigned long; debugfs only reads it (mode 0444).
        unsafe { bindings::dune_debugfs_create_ulong(name.as_ptr().cast(), self.0, value.as_ptr().cast()) };
    }

    /// Adds the file `name`, for root, that `T` writes.
    pub(crate) fn add_text<T: Show>(&self, name: &core::ffi::CStr) {
        // SAFETY: The function lives as long as the module, and the file is gone before.
        unsafe { bindings::dune_debugfs_create_text(name.as_ptr().cast(), self.0, Some(show::<T>)) };
    }

    /// Adds what the tests map; only in builds with `DUNE_DEBUG_KNOBS=y`.
    pub(crate) fn add_knobs(&self) {
        #[cfg(dune_debug_knobs)]
        // SAFETY: The file is gone before the module is.
        unsafe {
            bindings::dune_knob_frames(self.0)
        };
    }
}

/// What a file of text shows.
pub(crate) trait Show {
    /// Writes it; may not sleep.
    fn show(to: &Seq);
}

unsafe extern "C" fn show<T: Show>(file: *mut bindings::seq_file) -> core::ffi::c_int {
    if let Some(file) = NonNull::new(file) {
        // SAFETY: Open during the call.
        T::show(&unsafe { Seq::from_raw(file) });
    }
    0
}

impl Drop for Dir {
    fn drop(&mut self) {
        // SAFETY: Made in `new`, removed once.
        unsafe { bindings::dune_debugfs_remove(self.0) };
    }
}
