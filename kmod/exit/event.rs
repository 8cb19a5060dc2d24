// SPDX-License-Identifier: GPL-2.0

//! Exceptions that exit, and events whose delivery an exit interrupted.

use super::ExitInfo;
use super::Flow;
use crate::abi;
use crate::arch::exit::vector;
use crate::arch::exit::EventKind;
use crate::arch::exit::InterruptionInfo;
use crate::vcpu::Injection;
use crate::vcpu::Vcpu;

/// Has the next entry deliver what this exit interrupted (SDM, "Information for VM Exits That Occur During Event
/// Delivery").
pub(super) fn redeliver(vcpu: &mut Vcpu, info: &ExitInfo) {
    if let Some(event) = info.interrupted_event() {
        // Interrupts and NMIs are the host's and never delivered to a guest.
        if !matches!(event.kind(), EventKind::ExternalInterrupt | EventKind::Nmi) {
            vcpu.inject(Injection {
                info: event,
                error_code: info.idt_vectoring_error_code,
                instruction_len: info.instruction_len,
            });
        }
    }
}

/// #DB and #AC go back to the guest: they exit only because a guest's IDT could make the CPU deliver them for ever. #NM
/// exits where XFD exists, because its reason (IA32_XFD_ERR) is the host's to clear. An NMI and a #MC were handled with
/// interrupts off.
pub(super) fn handle_exception(vcpu: &mut Vcpu, info: &ExitInfo) -> Flow {
    let event = info.interruption();
    if info.is_nmi() || info.is_machine_check() {
        return Flow::Resume;
    }
    match (event.kind(), event.vector()) {
        (EventKind::HardwareException, vector::AC) => {
            vcpu.inject_exception(vector::AC, Some(info.interruption_error_code));
            Flow::Resume
        }
        (EventKind::HardwareException, vector::DB) => {
            // DR6 is not told: it is the host's, and the guest cannot read it (MOV DR is refused).
            vcpu.inject_exception(vector::DB, None);
            Flow::Resume
        }
        (EventKind::HardwareException, vector::NM) => {
            // Why is cleared already, and the guest could not read it (RDMSR is refused).
            vcpu.inject_exception(vector::NM, None);
            Flow::Resume
        }
        (EventKind::PrivilegedSoftwareException, vector::DB) => {
            // INT1 (ICEBP): a trap, delivered behind the instruction.
            vcpu.inject(Injection {
                info: InterruptionInfo::event(EventKind::PrivilegedSoftwareException, vector::DB, false),
                error_code: 0,
                instruction_len: info.instruction_len,
            });
            Flow::Resume
        }
        _ => Flow::User(info.report(abi::EXIT_UNHANDLED)),
    }
}
