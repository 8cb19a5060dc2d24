// SPDX-License-Identifier: GPL-2.0

//! EPT violations: memory that the EPT does not have yet, or that the process may not use so.

use super::ExitInfo;
use super::Flow;
use crate::abi;
use crate::abi::Counters;
use crate::arch::addr::Gpa;
use crate::arch::addr::Hva;
use crate::arch::exit::EptViolation;
use crate::arch::exit::InterruptionInfo;
use crate::arch::vmcs_field::exit_info;
use crate::ept::at_once::AtOnce;
use crate::ept::fault::Access;
use crate::ept::fault::Effort;
use crate::ept::fault::Fault;
use crate::ept::fault::Mapped;
use crate::space::Space;
use crate::sys::cpu::IrqOff;
use crate::sys::trace;
use crate::vcpu::Vcpu;
use crate::vmx::vmcs::CurrentVmcs;
use core::mem::offset_of;
use kernel::prelude::*;

/// Settles one in the window of the exit, where the process has the page and nobody is in the way. Else [`handle`] does.
#[inline(always)]
pub(super) fn settle(vcpu: &mut Vcpu, space: &Space, vmcs: &mut CurrentVmcs<'_>, irq: &IrqOff) -> AtOnce {
    let interrupted = InterruptionInfo::new(vmcs.read(exit_info::IDT_VECTORING_INFO) as u32);
    let violation = EptViolation::new(vmcs.read(exit_info::QUALIFICATION));
    let gpa = Gpa::new(vmcs.read(exit_info::GUEST_PHYSICAL_ADDRESS));
    let (false, Some(gpa)) = (interrupted.is_valid(), gpa) else {
        return AtOnce::Later;
    };
    let answer = space.ept.fault_at_once(space.mm, gpa, violation.wanted(), true, irq);
    if let AtOnce::Mapped(mapped) = answer {
        vcpu.host_ran = true;
        count(vcpu, mapped);
        if trace::is_on(trace::Event::EptViolation) {
            let gva = vmcs.read(exit_info::GUEST_LINEAR_ADDRESS);
            tell(space, violation, gpa.as_u64(), gva, Fault::Mapped(mapped));
        }
    }
    answer
}

/// Tells who listens what became of a violation.
#[cold]
#[inline(never)]
fn tell(space: &Space, violation: EptViolation, gpa: u64, gva: u64, fault: Fault) {
    let (outcome, hva) = match fault {
        Fault::Mapped(mapped) if mapped.is_large() => (trace::Outcome::Mapped2M, None),
        Fault::Mapped(_) => (trace::Outcome::Mapped4K, None),
        Fault::TryAgain => (trace::Outcome::Again, None),
        Fault::Touch(hva) => (trace::Outcome::Touch, Some(hva)),
        Fault::Refused(hva) => (trace::Outcome::Refused, Some(hva)),
        Fault::NoSlot => (trace::Outcome::NoSlot, None),
    };
    let mem_type = match fault {
        Fault::Mapped(mapped) => mapped.mem_type(),
        _ => trace::NO_TYPE,
    };
    let access = violation.read() as u32 | (violation.write() as u32) << 1 | (violation.execute() as u32) << 2;
    let violation = trace::TracedViolation {
        gpa,
        gva: if violation.gla_valid() { gva } else { 0 },
        hva: hva.map_or(0, Hva::as_u64),
        access,
        outcome: outcome as u32,
        mem_type,
    };
    trace::ept_violation(space.number, &violation);
}

fn access(violation: EptViolation) -> Access {
    Access {
        write: violation.write(),
        execute: violation.execute(),
    }
}

#[inline(always)]
fn count(vcpu: &Vcpu, mapped: Mapped) {
    if mapped.is_plain() {
        vcpu.count(offset_of!(Counters, ept_4k), 1);
        vcpu.count(offset_of!(Counters, ept_around), mapped.around());
    } else {
        count_other(vcpu, mapped);
    }
}

#[cold]
fn count_other(vcpu: &Vcpu, mapped: Mapped) {
    let size = if mapped.is_large() {
        offset_of!(Counters, ept_2m)
    } else {
        offset_of!(Counters, ept_4k)
    };
    vcpu.count(size, 1);
    vcpu.count(offset_of!(Counters, ept_around), mapped.around());
    vcpu.count(offset_of!(Counters, ept_io), mapped.is_io().into());
}

pub(super) fn handle(vcpu: &mut Vcpu, space: &Space, info: &ExitInfo) -> Result<Flow> {
    let violation = EptViolation::new(info.qualification);
    let Some(gpa) = Gpa::new(info.gpa) else {
        return Ok(report(info, violation, abi::EXIT_NO_SLOT, None));
    };
    let mut effort = Effort::default();
    vcpu.host_ran = true;
    let fault = space
        .ept
        .fault(space.mm, gpa, info.absent, access(violation), &mut effort);
    vcpu.count(offset_of!(Counters, mm_faults), effort.mm_faults);
    vcpu.count(offset_of!(Counters, retries), effort.retries);
    let fault = fault?;
    if trace::is_on(trace::Event::EptViolation) {
        tell(space, violation, info.gpa, info.gla, fault);
    }
    match fault {
        Fault::Mapped(mapped) => count(vcpu, mapped),
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
