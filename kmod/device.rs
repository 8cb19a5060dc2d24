// SPDX-License-Identifier: GPL-2.0

//! The ioctls: decode, check, hand on. docs/abi.md is the reference.

use crate::abi;
use crate::space::Space;
use crate::sys::chardev;
use crate::sys::chardev::Caller;
use crate::sys::chardev::FileOps;
use crate::sys::mm::Vma;
use crate::sys::seq::Seq;
use crate::sys::user;
use crate::sys::user::Plain;
use core::mem::size_of;
use core::ptr::NonNull;
use kernel::prelude::*;

// SAFETY: Integers only, and no padding: abi.rs asserts the sizes.
unsafe impl Plain for abi::Info {}
// SAFETY: As above.
unsafe impl Plain for abi::CreateVcpu {}
// SAFETY: As above.
unsafe impl Plain for abi::MapSlot {}
// SAFETY: As above.
unsafe impl Plain for abi::UnusedSlot {}

impl FileOps for Space {
    fn open() -> Result<NonNull<Self>> {
        crate::sys::knob_open_delay();
        Space::get()
    }

    unsafe fn release(this: NonNull<Self>) {
        // SAFETY: By the caller.
        unsafe { Space::put(this) };
    }

    fn show(&self, to: &Seq) {
        self.show(to);
    }

    const HOT: u32 = abi::DUNE_RUN;

    #[inline(never)]
    fn hot(&self, arg: u64, caller: Caller) -> isize {
        match self.with_own_vcpu(arg, |vcpu| vcpu.run(self, caller)) {
            Ok(answer) => answer as isize,
            Err(e) => caller.fail::<Self>(arg, e),
        }
    }

    fn ioctl(&self, cmd: u32, arg: u64) -> Result<u64> {
        match cmd {
            abi::DUNE_NEW_SPACE => return Ok(chardev::new_fd::<Space>()? as u64),
            abi::DUNE_GET_INFO
            | abi::DUNE_CREATE_VCPU
            | abi::DUNE_DESTROY_VCPU
            | abi::DUNE_SYNC
            | abi::DUNE_MAP_SLOT
            | abi::DUNE_UNUSED_SLOT
            | abi::DUNE_UNMAP_SLOT
            | abi::DUNE_FLUSH => {}
            _ => return Err(ENOTTY),
        }
        self.check_mm()?;
        match cmd {
            abi::DUNE_GET_INFO => {
                let ask: abi::Info = user::read(arg)?;
                if ask.size as usize != size_of::<abi::Info>() {
                    return Err(EINVAL);
                }
                user::write(arg, &self.info())?;
            }
            abi::DUNE_CREATE_VCPU => {
                let mut ask: abi::CreateVcpu = user::read(arg)?;
                if ask.size as usize != size_of::<abi::CreateVcpu>() || ask.flags != 0 {
                    return Err(EINVAL);
                }
                ask.vcpu = self.create_vcpu()?;
                ask.reserved = 0;
                ask.run_offset = u64::from(ask.vcpu) * abi::RUN_PAGE_BYTES as u64;
                ask.run_bytes = abi::RUN_PAGE_BYTES as u64;
                if let Err(e) = user::write(arg, &ask) {
                    self.destroy_vcpu(ask.vcpu.into())?;
                    return Err(e);
                }
            }
            abi::DUNE_DESTROY_VCPU => self.destroy_vcpu(arg)?,
            abi::DUNE_UNUSED_SLOT => {
                let mut ask: abi::UnusedSlot = user::read(arg)?;
                if ask.size as usize != size_of::<abi::UnusedSlot>() || ask.flags != 0 {
                    return Err(EINVAL);
                }
                (ask.gpa, ask.hva) = self.unused_slot(ask.gpa)?;
                user::write(arg, &ask)?;
            }
            abi::DUNE_UNMAP_SLOT => self.unmap_slot(arg)?,
            // INVEPT drops what was made with the EPT, and that is every translation of a guest's own tables.
            abi::DUNE_FLUSH => self.ept.translations.invalidate(),
            abi::DUNE_SYNC => self.with_vcpu(arg, |vcpu| vcpu.sync())?,
            _ => {
                let mut ask: abi::MapSlot = user::read(arg)?;
                if ask.size as usize != size_of::<abi::MapSlot>() || ask.flags & !abi::MAP_SLOT_AT != 0 {
                    return Err(EINVAL);
                }
                let wanted = (ask.flags & abi::MAP_SLOT_AT != 0).then_some(ask.gpa);
                ask.gpa = self.map_slot(ask.hva, wanted)?;
                user::write(arg, &ask)?;
            }
        }
        Ok(0)
    }

    fn request_of(count: u64) -> Result<u32> {
        const REQUESTS: [u32; 10] = [
            abi::DUNE_RUN,
            abi::DUNE_GET_INFO,
            abi::DUNE_CREATE_VCPU,
            abi::DUNE_DESTROY_VCPU,
            abi::DUNE_SYNC,
            abi::DUNE_MAP_SLOT,
            abi::DUNE_NEW_SPACE,
            abi::DUNE_UNUSED_SLOT,
            abi::DUNE_UNMAP_SLOT,
            abi::DUNE_FLUSH,
        ];
        let mut all = REQUESTS.into_iter();
        all.find(|request| abi::read_size(*request) == count).ok_or(EINVAL)
    }

    fn mmap(&self, vma: &Vma) -> Result {
        self.check_mm()?;
        if vma.bytes() != abi::RUN_PAGE_BYTES as u64 || !vma.is_shared() {
            return Err(EINVAL);
        }
        self.with_vcpu(vma.page_offset(), |vcpu| vma.insert_run_page(vcpu.run_page()))
    }
}

impl Space {
    /// EXDEV in a process other than the one that opened the device.
    fn check_mm(&self) -> Result {
        if self.mm.is_current() {
            Ok(())
        } else {
            Err(EXDEV)
        }
    }
}
