// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory for a system call whose caller names it by addresses of a page table.
//!
//! # Safety
//!
//! What the caller named is copied by the one instruction that a page fault is expected at (`cpl3::copy`).

use core::fmt;

use crate::addr::Gva;
use crate::addr::PAGE_BYTES;
use crate::cpl3;
use crate::paging::is_cpl0;
use crate::paging::AddressSpace;
use crate::paging::Permissions;
use crate::trap::Thread;

/// A range of addresses of the loaded page table, as Linux can use it: where the memory is in the process if that is in one
/// piece, else in a buffer.
///
/// Linux knows nothing of the guest's page tables. A hook, or who serves a [`UserExit`](crate::user::UserExit), bounces each
/// pointer of a call that it passes on:
///
/// ```no_run
/// use libdune::hook::{Hooks, SystemCall, Verdict};
/// use libdune::{Dune, Permissions, Thread};
///
/// fn write(call: &mut SystemCall, thread: &Thread<'_>) -> Verdict {
///     if call.number() as i64 != libc::SYS_write {
///         return Verdict::Allow;
///     }
///     let mut buffer = [0; 4096];
///     let bytes = (call.argument(2) as usize).min(buffer.len());
///     match thread.bounce(call.argument(1), bytes, Permissions::READ, &mut buffer) {
///         // SAFETY: Linux reads what the page table means by the caller's pointer.
///         Ok(bounce) => Verdict::Answer(unsafe {
///             libc::syscall(libc::SYS_write, call.argument(0), bounce.address(), bytes)
///         }),
///         Err(_) => Verdict::deny(libc::EFAULT),
///     }
/// }
///
/// let dune = Dune::enter()?;
/// dune.thread().set_hooks(Hooks { before: Some(write), after: None });
/// println!("by way of a bounce");
/// # Ok::<(), libdune::Error>(())
/// ```
pub struct Bounce<'t> {
    thread: &'t Thread<'t>,
    start: u64,
    bytes: usize,
    address: u64,
    is_copied: bool,
}

impl fmt::Debug for Bounce<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Bounce({:#x} + {:#x} at {:#x})",
            self.start, self.bytes, self.address
        )
    }
}

/// A range cannot be given to Linux.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BounceError {
    /// The page table does not allow that access; EFAULT is the answer.
    #[error("the page table does not allow the access at {0:#x}")]
    NotAllowed(u64),
    /// The memory is not in one piece, and the buffer is too small for it.
    #[error("{bytes} bytes need a buffer, which has {room}")]
    NoRoom {
        /// Length of the range.
        bytes: usize,
        /// Length of the buffer.
        room: usize,
    },
    /// The buffer itself is not where Linux sees it.
    #[error("the buffer at {0:#x} is mapped to other memory than the process has there")]
    BufferElsewhere(u64),
    /// The calling thread is not in Dune mode.
    #[error("the thread is not in Dune mode")]
    OutsideDuneMode,
}

impl Thread<'_> {
    /// Makes `bytes` bytes at `start` of the loaded page table usable by Linux, for a call that reads them, or writes them
    /// where `access` has [`Permissions::WRITE`]. What comes from CPL3 also needs [`Permissions::USER`].
    ///
    /// Bytes are copied to `buffer` where they lie in pieces, or where a write is to get a copy of the page; what Linux wrote
    /// there comes back by [`Bounce::finish`]. Allocates nothing.
    ///
    /// # Errors
    ///
    /// See [`BounceError`].
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use libdune::hook::{Bounce, BounceError};
    /// use libdune::{Dune, Permissions};
    ///
    /// let dune = Dune::enter()?;
    /// let thread = dune.thread();
    /// let (bytes, mut buffer) = ([7u8; 100], [0; 100]);
    /// let start = bytes.as_ptr() as u64;
    /// let bounce: Bounce<'_> = thread.bounce(start, 100, Permissions::READ, &mut buffer)?;
    /// // Where Linux sees it, too.
    /// assert!(!bounce.is_copied() && bounce.address() == start);
    /// let not_canonical = 1 << 63;
    /// let error = thread.bounce(not_canonical, 1, Permissions::READ, &mut buffer).err();
    /// assert_eq!(error, Some(BounceError::NotAllowed(not_canonical)));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn bounce<'t>(
        &'t self,
        start: u64,
        bytes: usize,
        access: Permissions,
        buffer: &'t mut [u8],
    ) -> Result<Bounce<'t>, BounceError> {
        if !is_cpl0() {
            return Err(BounceError::OutsideDuneMode);
        }
        // SAFETY: Nobody loads another table before this returns.
        let space = unsafe { self.loaded_space() };
        let place = Place::of(&space, start, bytes, access)?;
        if let Place::OnePiece(address) = place {
            return Ok(Bounce {
                thread: self,
                start,
                bytes,
                address,
                is_copied: false,
            });
        }
        if bytes > buffer.len() {
            let room = buffer.len();
            return Err(BounceError::NoRoom { bytes, room });
        }
        let address = buffer.as_mut_ptr() as u64;
        match Place::of(&space, address, bytes, Permissions::WRITE) {
            Ok(Place::OnePiece(found)) if found == address => {}
            _ => return Err(BounceError::BufferElsewhere(address)),
        }
        // SAFETY: The buffer is the caller's, and long enough; a fault on the other side ends the copy.
        match unsafe { cpl3::copy(address, start, bytes, false, self.block()) } {
            0 => Ok(Bounce {
                thread: self,
                start,
                bytes,
                address,
                is_copied: true,
            }),
            left => Err(BounceError::NotAllowed(start + (bytes - left) as u64)),
        }
    }
}

impl Bounce<'_> {
    /// What Linux is to be given.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Whether it is the buffer.
    pub fn is_copied(&self) -> bool {
        self.is_copied
    }

    /// Brings the first `written` bytes, which Linux wrote, to where the caller named them.
    ///
    /// # Errors
    ///
    /// [`BounceError::NotAllowed`] where the page table does not allow it any more, and for more bytes than there are.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use std::io::Read;
    ///
    /// use libdune::hook::{Hooks, SystemCall, Verdict};
    /// use libdune::{Dune, Permissions, Thread};
    ///
    /// /// read(2) of at most 512 bytes, for callers whose memory is elsewhere than Linux looks for it.
    /// fn read(call: &mut SystemCall, thread: &Thread<'_>) -> Verdict {
    ///     let [fd, start, bytes, ..] = call.arguments();
    ///     if call.number() as i64 != libc::SYS_read {
    ///         return Verdict::Allow;
    ///     }
    ///     let mut buffer = [0; 512];
    ///     let bytes = bytes.min(512) as usize;
    ///     let Ok(bounce) = thread.bounce(start, bytes, Permissions::WRITE, &mut buffer) else {
    ///         return Verdict::deny(libc::EFAULT);
    ///     };
    ///     // SAFETY: Linux writes to memory that the caller named, or to the buffer.
    ///     let written = unsafe { libc::syscall(libc::SYS_read, fd, bounce.address(), bytes) };
    ///     match written {
    ///         0.. if bounce.finish(written as usize).is_ok() => Verdict::Answer(written),
    ///         0.. => Verdict::deny(libc::EFAULT),
    ///         _ => Verdict::deny(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)),
    ///     }
    /// }
    ///
    /// let dune = Dune::enter()?;
    /// dune.thread().set_hooks(Hooks { before: Some(read), after: None });
    /// let mut name = [0; 5];
    /// std::fs::File::open("/proc/version")?.read_exact(&mut name)?;
    /// assert_eq!(&name, b"Linux");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn finish(self, written: usize) -> Result<(), BounceError> {
        if written > self.bytes {
            return Err(BounceError::NotAllowed(self.start.saturating_add(self.bytes as u64)));
        }
        if !self.is_copied {
            return Ok(());
        }
        if !is_cpl0() {
            return Err(BounceError::OutsideDuneMode);
        }
        // SAFETY: As in `bounce`.
        match unsafe { cpl3::copy(self.start, self.address, written, true, self.thread.block()) } {
            0 => Ok(()),
            left => Err(BounceError::NotAllowed(self.start + (written - left) as u64)),
        }
    }
}

/// Where the memory of a range is in the process.
enum Place {
    OnePiece(u64),
    Pieces,
}

impl Place {
    fn of(space: &AddressSpace<'_>, start: u64, bytes: usize, access: Permissions) -> Result<Self, BounceError> {
        let end = start.checked_add(bytes as u64).ok_or(BounceError::NotAllowed(start))?;
        let mut first = None;
        let mut is_one = true;
        let mut at = start;
        while at < end {
            let not_allowed = BounceError::NotAllowed(at);
            let gva = Gva::new(at).ok_or(not_allowed)?;
            let hva = space.translate(gva, access).ok_or(not_allowed)?.as_u64();
            let is_copied = space.look_up(gva).is_some_and(|mapping| mapping.copied_on_write);
            let base = *first.get_or_insert(hva);
            is_one &= hva.wrapping_sub(base) == at - start;
            is_one &= !(is_copied && access.contains(Permissions::WRITE));
            at = (at & !(PAGE_BYTES - 1)) + PAGE_BYTES;
        }
        Ok(if is_one {
            Self::OnePiece(first.unwrap_or(start))
        } else {
            Self::Pieces
        })
    }
}
