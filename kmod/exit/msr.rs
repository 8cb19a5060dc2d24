// SPDX-License-Identifier: GPL-2.0

//! RDMSR and WRMSR of what the MSR bitmap does not leave to the guest.

use super::skip;
use super::ExitInfo;
use super::Flow;
use crate::arch::addr::Gva;
use crate::arch::exit::vector;
use crate::arch::msr;
use crate::sys::regs;
use crate::vcpu::Vcpu;
use kernel::prelude::*;

pub(super) fn handle_read(vcpu: &mut Vcpu, info: &ExitInfo) -> Flow {
    let mut gprs = vcpu.gprs();
    let number = gprs.rcx as u32;
    let value = match number {
        msr::IA32_LSTAR => Some(vcpu.lstar()),
        msr::IA32_EFER => Some(vcpu.efer()),
        // The host's, which the guest runs with.
        msr::IA32_STAR | msr::IA32_FMASK | msr::IA32_TSC_AUX => match regs::linux_msr(number) {
            // Once more, behind the way through user mode that the next entry takes.
            Err(error) if error == EAGAIN => return Flow::Resume,
            value => value.ok(),
        },
        _ => None,
    };
    let Some(value) = value else { return refuse(vcpu) };
    gprs.rax = value & 0xffff_ffff;
    gprs.rdx = value >> 32;
    vcpu.set_gprs(&gprs);
    skip(vcpu, info)
}

pub(super) fn handle_write(vcpu: &mut Vcpu, info: &ExitInfo) -> Flow {
    let gprs = vcpu.gprs();
    let value = gprs.rdx << 32 | gprs.rax & 0xffff_ffff;
    if gprs.rcx as u32 == msr::IA32_LSTAR && Gva::new(value).is_some() {
        vcpu.set_lstar(value);
        return skip(vcpu, info);
    }
    refuse(vcpu)
}

fn refuse(vcpu: &mut Vcpu) -> Flow {
    vcpu.inject_exception(vector::GP, Some(0));
    Flow::Resume
}
