// SPDX-License-Identifier: GPL-2.0

//! Copies from and to user space (linux/uaccess.h).

use super::bindings;
use core::mem::size_of;
use core::mem::MaybeUninit;
use kernel::prelude::*;

/// Types without padding or invalid values, that may be copied as bytes.
///
/// # Safety
///
/// Every byte pattern must be a value, and there must be no padding.
pub(crate) unsafe trait Plain: Copy {}

/// Reads a `T` at `user`. EFAULT.
pub(crate) fn read<T: Plain>(user: u64) -> Result<T> {
    let mut v = MaybeUninit::<T>::uninit();
    // SAFETY: `v` has room; the copy checks the user's address.
    let left = unsafe { bindings::dune_copy_from_user(v.as_mut_ptr().cast(), user as *const _, size_of::<T>() as _) };
    if left != 0 {
        return Err(EFAULT);
    }
    // SAFETY: All bytes were written, and every pattern is a value.
    Ok(unsafe { v.assume_init() })
}

/// The same where nobody may wait, with interrupts off, say: EFAULT also for memory that is not there at the moment.
pub(crate) fn read_now<T: Plain>(user: u64) -> Result<T> {
    let mut v = MaybeUninit::<T>::uninit();
    // SAFETY: As above.
    let left =
        unsafe { bindings::dune_copy_from_user_now(v.as_mut_ptr().cast(), user as *const _, size_of::<T>() as _) };
    if left != 0 {
        return Err(EFAULT);
    }
    // SAFETY: As above.
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
