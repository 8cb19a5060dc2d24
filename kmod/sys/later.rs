// SPDX-License-Identifier: GPL-2.0

//! Something to be done later, in a thread of Linux' own (linux/workqueue.h).

use super::bindings;

/// What is done. One type of it only: there is one such work.
pub(crate) trait Later {
    const MS: u32;
    /// May sleep.
    fn run();
}

/// Has it done in [`Later::MS`], or when it was to be done anyway.
pub(crate) fn later<T: Later>() {
    unsafe extern "C" fn run<T: Later>() {
        T::run();
    }
    // SAFETY: A function of this module, whose unloading cancels it.
    unsafe { bindings::dune_later(Some(run::<T>), T::MS) };
}

/// It will not be done, and is not being done when this returns. May sleep.
pub(crate) fn cancel() {
    // SAFETY: Waits, no more.
    unsafe { bindings::dune_later_cancel() };
}
