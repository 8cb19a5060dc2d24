// SPDX-License-Identifier: GPL-2.0

//! Instructions that a guest may not use: the fault that the CPU would raise. Everything else is for user space to report.

use super::ExitInfo;
use super::Flow;
use crate::abi;
use crate::arch::exit::vector;
use crate::arch::exit::ExitReason;
use crate::vcpu::Vcpu;

pub(super) fn handle(vcpu: &mut Vcpu, info: &ExitInfo, reason: ExitReason) -> Flow {
    use ExitReason as R;

    match reason {
        // As where the instruction, or the mode it needs, does not exist. VMCALL comes here at CPL3 only.
        R::Vmcall
        | R::Vmclear
        | R::Vmlaunch
        | R::Vmptrld
        | R::Vmptrst
        | R::Vmread
        | R::Vmresume
        | R::Vmwrite
        | R::Vmxoff
        | R::Vmxon
        | R::Invept
        | R::Invvpid
        | R::Vmfunc
        | R::Getsec
        | R::Rsm
        | R::Mwait
        | R::Monitor
        | R::Encls
        | R::Enclv
        | R::Xsaves
        | R::Xrstors
        | R::Pconfig
        | R::Umwait
        | R::Tpause
        | R::Loadiwkey
        | R::Seamcall
        | R::Tdcall => vcpu.inject_exception(vector::UD, None),
        // As where the privilege is missing.
        R::CrAccess
        | R::MovDr
        | R::IoInstruction
        | R::Rdpmc
        | R::Invd
        | R::GdtrOrIdtrAccess
        | R::LdtrOrTrAccess
        | R::EnqcmdPasid
        | R::EnqcmdsPasid
        | R::RdmsrList
        | R::WrmsrList => vcpu.inject_exception(vector::GP, Some(0)),
        _ => return Flow::User(info.report(abi::EXIT_UNHANDLED)),
    }
    Flow::Resume
}
