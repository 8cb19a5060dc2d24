// SPDX-License-Identifier: GPL-2.0

//! Copies from and to user space (linux/uaccess.h).

use super::bindings;
use core::ffi::c_void;
use core::mem::size_of;
use core::mem::MaybeUninit;
use kernel::ffi::c_ulong;
use kernel::prelude::*;

/// Types without padding or invalid values, that may be copied as bytes.
///
/// # Safety
///
/// Every byte pattern must be a value, and there must be no padding.
pub(crate) unsafe trait Plain: Copy {}

/// Reads a `T` at `user`. EFAULT.
pub(crate) fn read<T: Plain>(user: u64) -> Result<T> {
    // SAFETY: The copy checks the user's address.
    read_by(user, |to, from, bytes| unsafe {
        bindings::dune_copy_from_user(to, from, bytes)
    })
}

/// The same where nobody may wait, with interrupts off, say: EFAULT also for memory that is not there at the moment.
pub(crate) fn read_now<T: Plain>(user: u64) -> Result<T> {
    // SAFETY: As above.
    read_by(user, |to, from, bytes| unsafe {
        bindings::dune_copy_from_user_now(to, from, bytes)
    })
}

/// Reads a `T` by a copy that tells how many bytes it left.
#[inline(always)]
fn read_by<T: Plain>(user: u64, copy: impl FnOnce(*mut c_void, *const c_void, c_ulong) -> c_ulong) -> Result<T> {
    let mut v = MaybeUninit::<T>::uninit();
    // `v` has room.
    if copy(v.as_mut_ptr().cast(), user as *const _, size_of::<T>() as _) != 0 {
        return Err(EFAULT);
    }
    // SAFETY: All bytes were written, and every pattern is a value.
    Ok(unsafe { v.assume_init() })
}

/// Writes `v` to `user`. EFAULT.
pub(crate) fn write<T: Plain>(user: u64, v: &T) -> Result {
    // SAFETY: `v` has no padding that could leak; the copy checks the user's address.
    let left = unsafe { bindings::dune_copy_to_user(user as *mut _, (v as *const T).cast(), size_of::<T>() as _) };
    if left != 0 {
        return Err(EFAULT);
    }
    Ok(())
}
