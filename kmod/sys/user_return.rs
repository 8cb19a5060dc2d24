// SPDX-License-Identifier: GPL-2.0

//! The last moment before a thread goes to user mode (linux/user-return-notifier.h).

use super::bindings;
use super::cpu::IrqLeftOff;
use super::cpu::IrqOff;
use core::ffi::c_void;

/// What is done then.
pub(crate) trait GoesToUserMode {
    /// `irq`: interrupts are off, and stay so until the thread is in user mode.
    fn go_to_user_mode(&mut self, irq: IrqLeftOff);
}

/// Has [`GoesToUserMode::go_to_user_mode`] called when the current thread goes to user mode on this CPU, each time, until another
/// thread does so before. Only where the thread has no work left, no notifier but this is there, and it goes to 64-bit code without
/// a trap behind the next instruction.
///
/// # Safety
///
/// Whenever the current thread goes to user mode, `waiting` may be used; [`forget`] comes before its end.
pub(crate) unsafe fn wait<T: GoesToUserMode>(waiting: *mut T, _: &IrqOff) {
    unsafe extern "C" fn go_on<T: GoesToUserMode>(waiting: *mut c_void, here: bindings::dune_here) {
        // SAFETY: By the caller of `wait`. Linux calls notifiers with interrupts off.
        unsafe { (*waiting.cast::<T>()).go_to_user_mode(IrqLeftOff::new(here)) };
    }
    // SAFETY: By the caller; interrupts are off.
    unsafe { bindings::dune_user_return_wait(waiting.cast(), Some(go_on::<T>)) };
}

/// It is not called for `waiting` from here on. A call may be under way, if the thread is on its way to user mode.
pub(crate) fn forget<T>(waiting: *mut T) {
    // SAFETY: Compares addresses.
    unsafe { bindings::dune_user_return_forget(waiting.cast()) };
}

/// No such call is made on this CPU until the next [`wait`]. Only in a thread: not in an interrupt.
pub(crate) fn stop(_: &IrqOff) {
    // SAFETY: Interrupts are off.
    unsafe { bindings::dune_user_return_stop() };
}

/// Whether nobody else than this module waits for this moment on this CPU.
#[inline]
pub(crate) fn is_ours(_: &IrqOff) -> bool {
    // SAFETY: Interrupts are off.
    unsafe { bindings::dune_user_return_is_ours() }
}
