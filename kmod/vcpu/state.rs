// SPDX-License-Identifier: GPL-2.0

//! Guest state from and to the run page: what `dirty` asks for, and `DUNE_SYNC`.

use super::Injection;
use super::Soft;
use super::Vcpu;
use crate::abi;
use crate::arch::exit::InterruptionInfo;
use crate::arch::vmcs_field::guest;
use crate::vmx::enter;
use crate::vmx::guest_state;
use crate::vmx::setup;
use core::ptr::addr_of;
use core::ptr::addr_of_mut;
use kernel::prelude::*;

impl Vcpu {
    /// Takes from the run page what its `dirty` says. EINVAL.
    pub(super) fn take_dirty(&mut self) -> Result {
        let run = self.run_ptr();
        // SAFETY: The page is there; each field is read once.
        let dirty = unsafe { addr_of!((*run).dirty).read_volatile() };
        if dirty == 0 && self.is_set_up {
            return Ok(());
        }
        if dirty & !abi::DIRTY_ALL != 0 {
            return Err(EINVAL);
        }
        // SAFETY: As above; any bytes are a value of these.
        let (sregs, event, rip, rflags, rsp) = unsafe {
            (
                addr_of!((*run).sregs).read_volatile(),
                addr_of!((*run).event).read_volatile(),
                addr_of!((*run).rip).read_volatile(),
                addr_of!((*run).rflags).read_volatile(),
                addr_of!((*run).gprs.rsp).read_volatile(),
            )
        };
        if dirty & abi::DIRTY_SREGS != 0 {
            guest_state::check(&sregs, &self.cr4)?;
        }
        let event_info = InterruptionInfo::new(event.info);
        if dirty & abi::DIRTY_EVENT != 0 && !event_info.is_injectable_by_user() {
            return Err(EINVAL);
        }
        let cr4 = self.cr4;
        let set_up = !self.is_set_up;
        let exit_rip = enter::exit_rip();
        let (msr_bitmap_hpa, eptp, vpid) = (self.msr_bitmap_hpa, self.eptp, self.vpid);
        self.with_vmcs(|vmcs, space_capabilities| {
            if set_up {
                setup::write(vmcs, space_capabilities, msr_bitmap_hpa, eptp, vpid, exit_rip);
            }
            if dirty & abi::DIRTY_SREGS != 0 {
                guest_state::write(vmcs, &sregs, &cr4);
            }
            if dirty & abi::DIRTY_RIP != 0 {
                vmcs.write(guest::RIP, rip);
                vmcs.write(guest::RSP, rsp);
                vmcs.write(guest::RFLAGS, rflags);
                // Elsewhere now: without what it was in the middle of.
                vmcs.write(guest::INTERRUPTIBILITY_STATE, 0);
                vmcs.write(guest::PENDING_DEBUG_EXCEPTIONS, 0);
            }
        })?;
        self.is_set_up = true;
        if dirty & abi::DIRTY_SREGS != 0 {
            self.soft = Soft {
                lstar: sregs.lstar,
                syscall_vmcall: sregs.syscall_vmcall,
                efer: sregs.efer,
            };
        }
        if dirty & abi::DIRTY_RIP != 0 {
            // Elsewhere now: what was to go on where the guest was is void.
            self.next.rip = None;
            self.next.injection = None;
        }
        if dirty & abi::DIRTY_EVENT != 0 {
            self.inject(Injection {
                info: event_info,
                error_code: event.error_code,
                instruction_len: event.instruction_len,
            });
        }
        // SAFETY: As above.
        unsafe { addr_of_mut!((*run).dirty).write_volatile(0) };
        Ok(())
    }

    /// [`abi::DUNE_SYNC`]: writes the whole guest state into the run page. ENODEV.
    pub(crate) fn sync(&mut self) -> Result {
        if !self.is_set_up {
            return Ok(());
        }
        let mut sregs = abi::Sregs::default();
        let (mut rip, mut rsp, mut rflags) = (0, 0, 0);
        self.with_vmcs(|vmcs, _| {
            guest_state::read(vmcs, &mut sregs);
            rip = vmcs.read(guest::RIP);
            rsp = vmcs.read(guest::RSP);
            rflags = vmcs.read(guest::RFLAGS);
        })?;
        sregs.lstar = self.soft.lstar;
        sregs.syscall_vmcall = self.soft.syscall_vmcall;
        let run = self.run_ptr();
        // SAFETY: The page is there.
        unsafe {
            addr_of_mut!((*run).sregs).write_volatile(sregs);
            addr_of_mut!((*run).rip).write_volatile(self.next.rip.unwrap_or(rip));
            addr_of_mut!((*run).rflags).write_volatile(rflags);
            addr_of_mut!((*run).gprs.rsp).write_volatile(rsp);
        }
        Ok(())
    }
}
