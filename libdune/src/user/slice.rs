// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory that CPL3 names.

use core::fmt;

use crate::addr::Gva;
use crate::addr::PAGE_BYTES;
use crate::cpl3;
use crate::paging::is_cpl0;
use crate::paging::Permissions;
use crate::trap::Thread;

/// A range of addresses that CPL3 may access itself, checked once.
///
/// CPL0 copies from and to it, once for each byte: what was copied is the host's, and CPL3 cannot change it between check
/// and use. The range is checked against the page table that was loaded; who changes that table, or loads another one,
/// throws the slice away first.
///
/// # Examples
///
/// ```no_run
/// # #[repr(align(4096))]
/// # struct Page([u8; 4096]);
/// use libdune::user::{UserFault, UserSlice};
/// use libdune::{Dune, Gva, Permissions};
///
/// let page = Box::new(Page([b'x'; 4096]));
/// let dune = Dune::enter()?;
/// let start = Gva::of(&raw const *page).ok_or("not canonical")?;
/// let thread = dune.thread();
/// // It is the program's: what CPL3 names must be CPL3's.
/// assert!(UserSlice::readable(&thread, start.as_u64(), 5).is_err());
///
/// let shared = Permissions::USER | Permissions::WRITE;
/// dune.address_space().protect(start, 4096, shared)?.flush();
/// let slice = UserSlice::writable(&thread, start.as_u64(), 5)?;
/// slice.write(b"hello")?;
/// assert_eq!(slice.to_vec()?, b"hello");
/// assert!(!slice.is_empty() && slice.len() == 5);
/// // The next page is not CPL3's.
/// let fault: Option<UserFault> = UserSlice::readable(&thread, start.as_u64() + 4090, 7).err();
/// assert!(fault.is_some_and(|fault| !fault.is_write && fault.address == start.as_u64() + 4096));
/// # dune.address_space().protect(start, 4096, Permissions::ALL)?.flush();
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy)]
pub struct UserSlice<'t> {
    start: u64,
    bytes: usize,
    is_writable: bool,
    thread: &'t Thread<'t>,
}

impl fmt::Debug for UserSlice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UserSlice({:#x} + {:#x})", self.start, self.bytes)
    }
}

/// CPL3 named memory that it may not access.
#[derive(Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("CPL3 may not {} {address:#x}", if *.is_write { "write at" } else { "read at" })]
pub struct UserFault {
    /// First address that it may not access so.
    pub address: u64,
    /// Whether it was to be written.
    pub is_write: bool,
}

impl fmt::Debug for UserFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl<'t> UserSlice<'t> {
    /// The `bytes` bytes at `start`, for [`UserSlice::read`] only.
    ///
    /// # Errors
    ///
    /// [`UserFault`] where CPL3 may not read all of it, and outside Dune mode.
    pub fn readable(thread: &'t Thread<'t>, start: u64, bytes: usize) -> Result<Self, UserFault> {
        Self::new(thread, start, bytes, false)
    }

    /// The `bytes` bytes at `start`, for [`UserSlice::write`] too.
    ///
    /// # Errors
    ///
    /// [`UserFault`] where CPL3 may not write all of it, and outside Dune mode.
    pub fn writable(thread: &'t Thread<'t>, start: u64, bytes: usize) -> Result<Self, UserFault> {
        Self::new(thread, start, bytes, true)
    }

    fn new(thread: &'t Thread<'t>, start: u64, bytes: usize, is_writable: bool) -> Result<Self, UserFault> {
        let fault = |address| UserFault {
            address,
            is_write: is_writable,
        };
        if !is_cpl0() {
            return Err(fault(start));
        }
        let end = start.checked_add(bytes as u64).ok_or(fault(start))?;
        // SAFETY: Nobody loads another table before this returns.
        let space = unsafe { thread.loaded_space() };
        let wanted = if is_writable {
            Permissions::USER | Permissions::WRITE
        } else {
            Permissions::USER
        };
        let mut page = start & !(PAGE_BYTES - 1);
        while page < end {
            let allowed = Gva::new(page)
                .and_then(|gva| space.look_up(gva))
                .is_some_and(|mapping| mapping.permissions.contains(wanted));
            if !allowed && bytes != 0 {
                return Err(fault(page.max(start)));
            }
            page = page.checked_add(PAGE_BYTES).ok_or(fault(page))?;
        }
        Ok(Self {
            start,
            bytes,
            is_writable,
            thread,
        })
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether it has no byte.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Copies from the start of the slice, as many bytes as `to` has.
    ///
    /// # Errors
    ///
    /// [`UserFault`] where `to` is longer than the slice, or the memory went away meanwhile; what `to` holds then is not
    /// told.
    pub fn read(&self, to: &mut [u8]) -> Result<(), UserFault> {
        self.copy(to.as_mut_ptr() as u64, self.start, to.len(), false)
    }

    /// A copy of all of it.
    ///
    /// # Errors
    ///
    /// [`UserFault`] where the memory went away meanwhile.
    pub fn to_vec(&self) -> Result<Vec<u8>, UserFault> {
        let mut bytes = vec![0; self.bytes];
        self.read(&mut bytes)?;
        Ok(bytes)
    }

    /// Copies to the start of the slice.
    ///
    /// # Errors
    ///
    /// [`UserFault`] where `from` is longer than the slice, the slice is not writable, or the memory went away meanwhile.
    pub fn write(&self, from: &[u8]) -> Result<(), UserFault> {
        if !self.is_writable {
            return Err(UserFault {
                address: self.start,
                is_write: true,
            });
        }
        self.copy(self.start, from.as_ptr() as u64, from.len(), true)
    }

    fn copy(&self, to: u64, from: u64, bytes: usize, is_write: bool) -> Result<(), UserFault> {
        let fault = |offset: usize| UserFault {
            address: self.start + offset as u64,
            is_write,
        };
        if bytes > self.bytes || !is_cpl0() {
            return Err(fault(self.bytes));
        }
        // SAFETY: One side is the caller's slice. The other is CPL3's memory, in which the host has no objects; a fault in
        // it ends the copy.
        match unsafe { cpl3::copy(to, from, bytes, is_write, self.thread.block()) } {
            0 => Ok(()),
            left => Err(fault(bytes - left)),
        }
    }
}
