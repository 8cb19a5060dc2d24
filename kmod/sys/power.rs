// SPDX-License-Identifier: GPL-2.0

//! Suspend, resume and shutdown of the machine (linux/syscore_ops.h).

use super::bindings;
use core::ffi::c_void;
use kernel::ffi::c_int;

/// What is to be done, last, when the machine goes to sleep or down. Who registered last is asked first, and resumed last.
pub(crate) trait Power {
    /// On the one CPU that is left, with interrupts off.
    ///
    /// # Safety
    ///
    /// So it must be called.
    unsafe fn suspend();
    /// As above.
    ///
    /// # Safety
    ///
    /// As above, and after `suspend`.
    unsafe fn resume();
    /// On every CPU, with interrupts off: the machine reboots, or another kernel is started.
    ///
    /// # Safety
    ///
    /// So it must be called.
    unsafe fn shutdown_cpu();
}

/// The registered [`Power`]; one at a time.
pub(crate) struct PowerHooks(());

impl PowerHooks {
    pub(crate) fn register<P: Power>() -> Self {
        unsafe extern "C" fn suspend<P: Power>() -> c_int {
            // SAFETY: That is how the kernel calls it.
            unsafe { P::suspend() };
            0
        }
        unsafe extern "C" fn resume<P: Power>() {
            // SAFETY: As above.
            unsafe { P::resume() };
        }
        unsafe extern "C" fn shutdown<P: Power>() {
            unsafe extern "C" fn here<P: Power>(_: *mut c_void) {
                // SAFETY: In an interrupt, or with interrupts off as there.
                unsafe { P::shutdown_cpu() };
            }
            // SAFETY: Shutdown comes with interrupts on.
            unsafe { bindings::dune_on_each_cpu(Some(here::<P>)) };
        }
        // SAFETY: Functions of this module, unregistered before it goes.
        unsafe { bindings::dune_power_register(Some(suspend::<P>), Some(resume::<P>), Some(shutdown::<P>)) };
        Self(())
    }
}

impl Drop for PowerHooks {
    fn drop(&mut self) {
        // SAFETY: Registered in `register`.
        unsafe { bindings::dune_power_unregister() };
    }
}
