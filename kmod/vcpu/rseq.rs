// SPDX-License-Identifier: GPL-2.0

//! Restartable sequences (include/uapi/linux/rseq.h).
//!
//! Linux compares the thread's RIP with its critical section whenever the thread goes to user mode after it was
//! preempted, migrated or signalled. It sees the host loop's RIP, never the guest's, and forgets the section. So what it
//! would do is done here, before that: a guest inside its section goes on at the section's abort address.

use super::Vcpu;
use crate::arch::vmcs_field::guest;
use crate::sys::thread;
use crate::sys::user;
use crate::sys::user::Plain;
use kernel::prelude::*;

/// Linux' `struct rseq_cs`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Section {
    version: u32,
    flags: u32,
    start: u64,
    bytes: u64,
    abort: u64,
}

// SAFETY: Integers, no padding.
unsafe impl Plain for Section {}
// SAFETY: As above.
unsafe impl Plain for u64 {}
// SAFETY: As above.
unsafe impl Plain for u32 {}

impl Vcpu {
    /// Aborts the guest's critical section if it is in one. May sleep.
    ///
    /// What the guest wrote there may be anything: then it is left to Linux, which ends a process for it.
    pub(super) fn abort_rseq(&mut self) {
        if cfg!(dune_mutate_rseq) {
            return;
        }
        if let Some(rseq) = thread::rseq() {
            if let Ok(address) = user::read(rseq.section) {
                let _ = self.abort_section(&rseq, address);
            }
        }
    }

    /// The same, of the section that the guest was in when `rseq_cs` was still `address`.
    pub(super) fn abort_rseq_section(&mut self, address: u64) {
        if cfg!(dune_mutate_rseq) {
            return;
        }
        if let Some(rseq) = thread::rseq() {
            let _ = self.abort_section(&rseq, address);
        }
    }

    fn abort_section(&mut self, rseq: &thread::Rseq, address: u64) -> Result {
        if address == 0 || !self.is_set_up {
            return Ok(());
        }
        let section: Section = user::read(address)?;
        let rip = match self.next.rip {
            Some(rip) => rip,
            None => {
                let mut rip = 0;
                self.with_vmcs(|vmcs, _| rip = vmcs.read(guest::RIP))?;
                rip
            }
        };
        if section.version != 0 || rip.wrapping_sub(section.start) >= section.bytes {
            return Ok(());
        }
        let signature: u32 = user::read(section.abort.wrapping_sub(4))?;
        if signature == rseq.signature {
            self.resume_at(section.abort);
            // What was to be delivered where the guest was is void: the instruction is not made.
            self.next.injection = None;
            user::write(rseq.section, &0u64)?;
        }
        Ok(())
    }
}
