// SPDX-License-Identifier: MIT OR Apache-2.0

//! To and from the types of the `x86_64` crate, for programs that have them.
//!
//! What it has words for, libdune says in them: the bits of page-fault error codes, entries and RFLAGS. Addresses have
//! types of their own here, because three kinds of them are to be kept apart.

use x86_64::registers::rflags::RFlags;
use x86_64::structures::idt::ExceptionVector;
use x86_64::structures::idt::InvalidExceptionVectorNumber;
use x86_64::structures::idt::PageFaultErrorCode;
use x86_64::structures::paging::PageTableFlags;
use x86_64::PhysAddr;
use x86_64::VirtAddr;

use crate::addr::Gpa;
use crate::addr::Gva;
use crate::addr::Hva;
use crate::addr::PAGE_BYTES;
use crate::edit::RawEntry;
use crate::paging::Mapping;
use crate::paging::Permissions;
use crate::trap::TrapFrame;
use crate::trap::Vector;
use crate::user::PageFault;

/// An address of the `x86_64` crate that there is no address of libdune's kind for.
///
/// # Examples
///
/// ```
/// use libdune::x86_64::VirtAddr;
/// use libdune::{AddressError, Hva};
///
/// let error: Option<AddressError> = Hva::try_from(VirtAddr::new(0xffff_8000_0000_0000)).err();
/// // User space ends before the other half.
/// assert_eq!(error.map(|error| error.end), Some(1 << 47));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{address:#x} is no {kind}: those end at {end:#x}")]
pub struct AddressError {
    /// The address.
    pub address: u64,
    /// What it should have been.
    pub kind: &'static str,
    /// First address behind those.
    pub end: u64,
}

impl From<VirtAddr> for Gva {
    fn from(address: VirtAddr) -> Self {
        // Both are canonical at 48 bits.
        Self::new(address.as_u64()).unwrap_or_default()
    }
}

impl From<Gva> for VirtAddr {
    fn from(gva: Gva) -> Self {
        Self::new_truncate(gva.as_u64())
    }
}

impl TryFrom<VirtAddr> for Hva {
    type Error = AddressError;

    /// The address, if Linux gives it to user space.
    fn try_from(address: VirtAddr) -> Result<Self, AddressError> {
        let address = address.as_u64();
        Self::new(address).ok_or(AddressError {
            address,
            kind: "address of the process",
            end: 1 << 47,
        })
    }
}

impl From<Hva> for VirtAddr {
    fn from(hva: Hva) -> Self {
        Self::new_truncate(hva.as_u64())
    }
}

impl TryFrom<PhysAddr> for Gpa {
    type Error = AddressError;

    /// The address, if it is below 2^48.
    fn try_from(address: PhysAddr) -> Result<Self, AddressError> {
        let address = address.as_u64();
        Self::new(address).ok_or(AddressError {
            address,
            kind: "guest-physical address",
            end: 1 << 48,
        })
    }
}

impl From<Gpa> for PhysAddr {
    fn from(gpa: Gpa) -> Self {
        Self::new_truncate(gpa.as_u64())
    }
}

impl From<ExceptionVector> for Vector {
    fn from(vector: ExceptionVector) -> Self {
        Self(vector as u8)
    }
}

impl TryFrom<Vector> for ExceptionVector {
    type Error = InvalidExceptionVectorNumber;

    /// The exception, if the number is one's.
    fn try_from(vector: Vector) -> Result<Self, InvalidExceptionVectorNumber> {
        Self::try_from(vector.0)
    }
}

impl From<Permissions> for PageTableFlags {
    /// The bits of a leaf with these permissions; none for [`Permissions::NONE`].
    fn from(permissions: Permissions) -> Self {
        if permissions == Permissions::NONE {
            return Self::empty();
        }
        let mut flags = Self::PRESENT;
        flags.set(Self::WRITABLE, permissions.contains(Permissions::WRITE));
        flags.set(Self::USER_ACCESSIBLE, permissions.contains(Permissions::USER));
        flags.set(Self::NO_EXECUTE, !permissions.contains(Permissions::EXECUTE));
        flags
    }
}

impl From<PageTableFlags> for Permissions {
    /// What a leaf with these bits allows; [`Permissions::NONE`] where it is not present.
    fn from(flags: PageTableFlags) -> Self {
        if !flags.contains(PageTableFlags::PRESENT) {
            return Self::NONE;
        }
        let mut permissions = Self::READ;
        for (is_allowed, what) in [
            (flags.contains(PageTableFlags::WRITABLE), Self::WRITE),
            (!flags.contains(PageTableFlags::NO_EXECUTE), Self::EXECUTE),
            (flags.contains(PageTableFlags::USER_ACCESSIBLE), Self::USER),
        ] {
            if is_allowed {
                permissions = permissions | what;
            }
        }
        permissions
    }
}

impl Mapping {
    /// What it may be used for, and was, as bits of an entry.
    pub fn flags(&self) -> PageTableFlags {
        let mut flags = PageTableFlags::from(self.permissions);
        flags.set(PageTableFlags::ACCESSED, self.accessed);
        flags.set(PageTableFlags::DIRTY, self.dirty);
        flags.set(PageTableFlags::HUGE_PAGE, self.page_bytes > PAGE_BYTES);
        flags
    }
}

impl RawEntry<'_> {
    /// The entry's bits as they are now, without its address.
    pub fn flags(&self) -> PageTableFlags {
        PageTableFlags::from_bits_truncate(self.word.load(core::sync::atomic::Ordering::Relaxed))
    }
}

impl TrapFrame {
    /// The error code of a page fault, spelled out; `None` of other exceptions. Bit 14, which is kept, is libdune's
    /// ([`TrapFrame::host_refused`]).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use libdune::x86_64::structures::idt::PageFaultErrorCode;
    /// use libdune::{Dune, Outcome, Vector};
    ///
    /// let dune = Dune::enter()?;
    /// dune.set_exception_handler(Vector::PF, |frame, _| match frame.page_fault_code() {
    ///     Some(code) if code.contains(PageFaultErrorCode::INSTRUCTION_FETCH) => {
    ///         // A call to nowhere: back to behind it.
    ///         frame.rip = unsafe { (frame.rsp as *const u64).read() };
    ///         frame.rsp += 8;
    ///         Outcome::Resume
    ///     }
    ///     _ => Outcome::Unhandled,
    /// });
    /// // SAFETY: The handler returns in its place.
    /// unsafe {
    ///     let nowhere: extern "C" fn() = core::mem::transmute(0x1000usize);
    ///     nowhere();
    /// }
    /// # Ok::<(), libdune::Error>(())
    /// ```
    pub fn page_fault_code(&self) -> Option<PageFaultErrorCode> {
        (self.vector() == Vector::PF).then(|| PageFaultErrorCode::from_bits_retain(self.error_code))
    }

    /// RFLAGS, spelled out.
    pub fn flags(&self) -> RFlags {
        RFlags::from_bits_retain(self.rflags)
    }

    /// Has the program go on with these flags: [`RFlags::TRAP_FLAG`] has it come back after one instruction, as
    /// [`Vector::DB`].
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use std::sync::atomic::{AtomicU64, Ordering};
    ///
    /// use libdune::x86_64::registers::rflags::RFlags;
    /// use libdune::{Dune, Outcome, Vector};
    ///
    /// static STEPS: AtomicU64 = AtomicU64::new(0);
    ///
    /// let dune = Dune::enter()?;
    /// dune.set_exception_handler(Vector::BP, |frame, _| {
    ///     frame.set_flags(frame.flags() | RFlags::TRAP_FLAG);
    ///     Outcome::Resume
    /// });
    /// dune.set_exception_handler(Vector::DB, |frame, _| {
    ///     if STEPS.fetch_add(1, Ordering::Relaxed) == 2 {
    ///         frame.set_flags(frame.flags() - RFlags::TRAP_FLAG);
    ///     }
    ///     Outcome::Resume
    /// });
    /// unsafe { core::arch::asm!("int3", "nop", "nop", "nop", "nop") };
    /// assert_eq!(STEPS.load(Ordering::Relaxed), 3);
    /// # Ok::<(), libdune::Error>(())
    /// ```
    pub fn set_flags(&mut self, flags: RFlags) {
        self.rflags = flags.bits();
    }
}

impl PageFault {
    /// The error code, spelled out. Bit 14, which is kept, is libdune's ([`PageFault::host_refused`]).
    pub fn code(&self) -> PageFaultErrorCode {
        PageFaultErrorCode::from_bits_retain(self.error_code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_go_there_and_back() {
        for address in [0, 0x7fff_ffff_ffff, 0xffff_8000_0000_0000, u64::MAX] {
            let gva = Gva::new(address).unwrap();
            assert_eq!(VirtAddr::from(gva).as_u64(), address);
            assert_eq!(Gva::from(VirtAddr::new(address)), gva);
            assert_eq!(Hva::try_from(VirtAddr::new(address)).ok(), Hva::new(address));
        }
        for address in [0, (1 << 48) - 1, 1 << 48, (1 << 52) - 1] {
            let gpa = Gpa::try_from(PhysAddr::new(address));
            assert_eq!(gpa.ok(), Gpa::new(address));
            assert_eq!(
                gpa.map(PhysAddr::from).ok(),
                Gpa::new(address).map(|_| PhysAddr::new(address))
            );
        }
        let error = Gpa::try_from(PhysAddr::new(1 << 48)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "0x1000000000000 is no guest-physical address: those end at 0x1000000000000"
        );
    }

    #[test]
    fn vectors_are_the_same_numbers() {
        for number in 0..=255 {
            if let Ok(exception) = ExceptionVector::try_from(Vector(number)) {
                assert_eq!(Vector::from(exception), Vector(number));
            }
        }
        assert_eq!(Vector::from(ExceptionVector::Page), Vector::PF);
        assert!(ExceptionVector::try_from(Vector(0x80)).is_err());
    }

    #[test]
    fn permissions_are_the_bits_of_a_leaf() {
        let some = [Permissions::WRITE, Permissions::EXECUTE, Permissions::USER];
        for choice in 0..8 {
            let permissions = (0..3)
                .filter(|bit| choice >> bit & 1 != 0)
                .fold(Permissions::READ, |all, bit| all | some[bit]);
            let flags = PageTableFlags::from(permissions);
            assert_eq!(Permissions::from(flags), permissions);
            let leaf = crate::paging::leaf_bits(permissions);
            let used = PageTableFlags::ACCESSED | PageTableFlags::DIRTY;
            assert_eq!(PageTableFlags::from_bits_truncate(leaf), flags | used);
        }
        assert_eq!(PageTableFlags::from(Permissions::NONE), PageTableFlags::empty());
        assert_eq!(Permissions::from(PageTableFlags::WRITABLE), Permissions::NONE);
    }

    #[test]
    fn libdunes_bit_of_an_error_code_is_kept() {
        let fault = PageFault {
            address: 0,
            error_code: 2 | crate::abi::PAGE_FAULT_HOST_REFUSED,
        };
        assert!(fault.code().contains(PageFaultErrorCode::CAUSED_BY_WRITE));
        assert_eq!(fault.code().bits(), fault.error_code);
        assert!(fault.host_refused());
    }
}
