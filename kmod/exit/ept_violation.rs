// SPDX-License-Identifier: GPL-2.0

//! EPT violations: memory that the EPT does not have yet, or that the process may not use so.

use super::ExitInfo;
use super::Flow;
use crate::abi;
use crate::abi::Counters;
use crate::arch::addr::Gpa;
use crate::arch::addr::Hva;
use crate::arch::exit::EptViolation;
use crate::ept::fault::Access;
use crate::ept::fault::Effort;
use crate::ept::fault::Fault;
use crate::space::Space;
use crate::vcpu::Vcpu;
use core::mem::offset_of;
use kernel::prelude::*;

pub(super) fn handle(vcpu: &mut Vcpu, space: &Space, info: &ExitInfo) -> Result<Flow> {
    let violation = EptViolation::new(info.qualification);
    let Some(gpa) = Gpa::new(info.gpa) else {
        return Ok(report(info, violation, abi::EXIT_NO_SLOT, None));
    };
    let access = Access {
        write: violation.write(),
        execute: violation.execute(),
    };
    let mut effort = Effort::default();
    vcpu.host_ran = true;
    let fault = space.ept.fault(space.mm, gpa, access, &mut effort);
    vcpu.count(offset_of!(Counters, mm_faults), effort.mm_faults);
    vcpu.count(offset_of!(Counters, retries), effort.retries);
    match fault? {
        Fault::Mapped(mapped) => {
            let size = if mapped.large {
                offset_of!(Counters, ept_2m)
            } else {
                offset_of!(Counters, ept_4k)
            };
            vcpu.count(size, 1);
            vcpu.count(offset_of!(Counters, ept_around), mapped.around);
            vcpu.count(offset_of!(Counters, ept_io), mapped.io.into());
        }
        Fault::TryAgain => {}
        Fault::Touch(hva) => return Ok(report(info, violation, abi::EXIT_TOUCH, Some(hva))),
        Fault::Refused(hva) => return Ok(report(info, violation, abi::EXIT_REFUSED, Some(hva))),
        Fault::NoSlot => return Ok(report(info, violation, abi::EXIT_NO_SLOT, None)),
    }
    Ok(Flow::Resume)
}

fn report(info: &ExitInfo, violation: EptViolation, kind: u32, hva: Option<Hva>) -> Flow {
    let mut exit = info.report(kind);
    exit.hva = hva.map_or(0, Hva::as_u64);
    exit.access = if violation.write() {
        abi::ACCESS_WRITE
    } else if violation.execute() {
        abi::ACCESS_EXECUTE
    } else {
        abi::ACCESS_READ
    };
    if violation.gla_valid() {
        exit.flags |= abi::FLAG_GLA_VALID;
    }
    if violation.paging_structure() {
        exit.flags |= abi::FLAG_PAGING_STRUCTURE;
    }
    Flow::User(exit)
}
