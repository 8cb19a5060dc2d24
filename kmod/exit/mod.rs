// SPDX-License-Identifier: GPL-2.0

//! What each VM exit means. One handler per file; each says what to do next, never an errno but ENOMEM.
//!
//! docs/guest-policy.md has a row for every reason.

mod cpuid;
mod ept_violation;
mod event;
mod msr;
mod refused;
mod vmcall;

use crate::abi;
use crate::arch::addr::Hva;
use crate::arch::exit::EventKind;
use crate::arch::exit::ExitReason;
use crate::arch::exit::InterruptionInfo;
use crate::arch::exit::ENTRY_FAILURE;
use crate::arch::segment;
use crate::arch::vmcs_field::exit_info;
use crate::arch::vmcs_field::guest;
use crate::ept::at_once::AtOnce;
use crate::space::Space;
use crate::sys::cpu::IrqOff;
use crate::sys::thread;
use crate::sys::trace;
use crate::vcpu::Vcpu;
use crate::vmx::dump;
use crate::vmx::vmcs::CurrentVmcs;
use kernel::prelude::*;

/// What RUN does after an exit.
#[allow(clippy::large_enum_variant)]
pub(crate) enum Flow {
    /// Enter again.
    Resume,
    /// Hand this to user space.
    User(abi::Exit),
}

/// Why and where the guest exited: what was read with interrupts off, by what the reason needs.
#[derive(Clone, Copy, Default)]
pub(crate) struct ExitInfo {
    /// As the VMCS has it: basic reason and the flag of a failed entry.
    raw_reason: u32,
    pub(crate) rip: u64,
    pub(crate) instruction_len: u32,
    pub(crate) qualification: u64,
    pub(crate) gpa: u64,
    pub(crate) gla: u64,
    interruption: u32,
    pub(crate) interruption_error_code: u32,
    idt_vectoring: u32,
    pub(crate) idt_vectoring_error_code: u32,
    pub(crate) cpl: u32,
    /// Of an EPT violation: where the process' page table was seen not to allow the access.
    absent: Option<Hva>,
}

/// An exit, as its window finds it.
#[allow(clippy::large_enum_variant)]
pub(crate) enum Exit {
    /// The guest can go on at once.
    Settled,
    /// A VMCALL at CPL0, which RUN hands to user space; the guest's RIP is behind it already.
    Syscall,
    Other(ExitInfo),
}

/// Why the guest exited, as the VMCS has it.
#[inline(always)]
pub(crate) fn read_reason(vmcs: &mut CurrentVmcs<'_>) -> u32 {
    vmcs.read(exit_info::REASON) as u32
}

/// Looks at an exit in its window, and settles what can be settled without interrupts, which is what comes often.
///
/// Little of the host is as it should be yet: LSTAR is the guest's, the limits of GDT and TSS are those of a VM exit, DR7,
/// DEBUGCTL and the LDT are clear. Nothing here needs them. This CPU counts as in the guest (`Translations`): whoever holds
/// the EPT's lock may wait for it, so nobody waits for that lock here.
#[inline(always)]
pub(crate) fn look(
    vcpu: &mut Vcpu,
    space: &Space,
    raw_reason: u32,
    may_settle: bool,
    vmcs: &mut CurrentVmcs<'_>,
    irq: &IrqOff,
) -> Exit {
    const VMCALL: u32 = ExitReason::Vmcall.number() as u32;
    const CPUID: u32 = ExitReason::Cpuid.number() as u32;
    const EPT_VIOLATION: u32 = ExitReason::EptViolation.number() as u32;

    if trace::is_on(trace::Event::Exit) {
        trace_exit(vcpu, space, raw_reason, &mut vmcs.apart());
    }
    let mut absent = None;
    if raw_reason == CPUID {
        if may_settle && vcpu.may_settle() {
            cpuid::settle(vcpu, vmcs);
            vcpu.count_exit(CPUID);
            return Exit::Settled;
        }
    } else if raw_reason == EPT_VIOLATION && may_settle && vcpu.may_settle() {
        match ept_violation::settle(vcpu, space, vmcs, irq) {
            AtOnce::Mapped(_) => {
                vcpu.count_exit(EPT_VIOLATION);
                return Exit::Settled;
            }
            AtOnce::Absent(hva) => absent = Some(hva),
            AtOnce::Later => {}
        }
    }
    let cpl = segment::dpl(vmcs.read(guest::SS_ACCESS_RIGHTS) as u32);
    if raw_reason == VMCALL && cpl == 0 {
        vmcall::advance(vmcs, vcpu.syscall_vmcall(), vcpu.run_ptr());
        vcpu.count_exit(VMCALL);
        return Exit::Syscall;
    }
    let mut info = ExitInfo::read(vmcs, raw_reason, cpl);
    info.absent = absent;
    if info.is_entry_failure() {
        dump::record(&mut vmcs.apart(), space.number, true);
        if trace::is_on(trace::Event::EntryFailed) {
            trace::entry_failed(space.number, raw_reason, info.qualification, 0);
        }
    }
    vcpu.count_exit(raw_reason);
    Exit::Other(info)
}

/// Tells who listens of an exit, in its window.
#[cold]
#[inline(never)]
fn trace_exit(vcpu: &Vcpu, space: &Space, raw_reason: u32, vmcs: &mut CurrentVmcs<'_>) {
    let exit = trace::TracedExit {
        reason: raw_reason,
        cpl: segment::dpl(vmcs.read(guest::SS_ACCESS_RIGHTS) as u32),
        rip: vmcs.read(guest::RIP),
        qualification: vmcs.read(exit_info::QUALIFICATION),
        rax: vcpu.gprs().rax,
    };
    trace::exit(space.number, &exit);
}

impl ExitInfo {
    fn read(vmcs: &mut CurrentVmcs<'_>, raw_reason: u32, cpl: u32) -> Self {
        let mut info = Self {
            raw_reason,
            cpl,
            ..Default::default()
        };
        info.rip = vmcs.read(guest::RIP);
        info.qualification = vmcs.read(exit_info::QUALIFICATION);
        if info.is_entry_failure() {
            return info;
        }
        info.instruction_len = vmcs.read(exit_info::INSTRUCTION_LENGTH) as u32;
        info.idt_vectoring = vmcs.read(exit_info::IDT_VECTORING_INFO) as u32;
        info.idt_vectoring_error_code = vmcs.read(exit_info::IDT_VECTORING_ERROR_CODE) as u32;
        if info.is(ExitReason::ExceptionOrNmi) {
            info.interruption = vmcs.read(exit_info::INTERRUPTION_INFO) as u32;
            info.interruption_error_code = vmcs.read(exit_info::INTERRUPTION_ERROR_CODE) as u32;
        } else if info.is(ExitReason::EptViolation) || info.is(ExitReason::EptMisconfiguration) {
            info.gpa = vmcs.read(exit_info::GUEST_PHYSICAL_ADDRESS);
            info.gla = vmcs.read(exit_info::GUEST_LINEAR_ADDRESS);
        }
        info
    }

    /// Compares numbers: the decoding of `reason` is a long chain where the compiler may not use jump tables.
    #[inline(always)]
    fn is(&self, reason: ExitReason) -> bool {
        self.basic_reason() == reason.number()
    }

    pub(crate) fn reason(&self) -> ExitReason {
        ExitReason::from_raw(self.raw_reason)
    }

    /// The basic exit reason's number.
    fn basic_reason(&self) -> u16 {
        self.raw_reason as u16
    }

    pub(crate) fn is_entry_failure(&self) -> bool {
        self.raw_reason & ENTRY_FAILURE != 0
    }

    pub(crate) fn interruption(&self) -> InterruptionInfo {
        InterruptionInfo::new(self.interruption)
    }

    /// The event whose delivery the exit interrupted, to be delivered again.
    pub(crate) fn interrupted_event(&self) -> Option<InterruptionInfo> {
        crate::arch::exit::reinject(self.idt_vectoring)
    }

    pub(crate) fn is_external_interrupt(&self) -> bool {
        self.is(ExitReason::ExternalInterrupt)
    }

    pub(crate) fn is_nmi(&self) -> bool {
        self.is(ExitReason::ExceptionOrNmi)
            && self.interruption().is_valid()
            && self.interruption().kind() == EventKind::Nmi
    }

    pub(crate) fn is_machine_check(&self) -> bool {
        self.is(ExitReason::EntryMachineCheck)
            || self.is(ExitReason::ExceptionOrNmi) && self.interruption().is_exception(crate::arch::exit::vector::MC)
    }

    /// #NM, which exits only where the CPU has XFD.
    pub(crate) fn is_device_not_available(&self) -> bool {
        self.is(ExitReason::ExceptionOrNmi) && self.interruption().is_exception(crate::arch::exit::vector::NM)
    }

    /// For user space: everything that was read.
    pub(crate) fn report(&self, kind: u32) -> abi::Exit {
        let delivering = self.interrupted_event().is_some();
        abi::Exit {
            kind,
            reason: self.raw_reason,
            qualification: self.qualification,
            gpa: self.gpa,
            gla: self.gla,
            instruction_len: self.instruction_len,
            flags: if delivering { abi::FLAG_EVENT_DELIVERY } else { 0 },
            interruption_info: if delivering {
                self.idt_vectoring
            } else {
                self.interruption
            },
            interruption_error_code: if delivering {
                self.idt_vectoring_error_code
            } else {
                self.interruption_error_code
            },
            ..Default::default()
        }
    }
}

/// Decides what follows an exit, with interrupts on. ENOMEM.
pub(crate) fn handle(vcpu: &mut Vcpu, space: &Space, info: &ExitInfo) -> Result<Flow> {
    use ExitReason as R;

    if info.is_entry_failure() {
        vcpu.drop_injection();
        return Ok(Flow::User(info.report(abi::EXIT_FAIL_ENTRY)));
    }
    // An event that the exit interrupted is delivered by the next entry, unless a handler puts another in its place.
    event::redeliver(vcpu, info);
    Ok(match info.reason() {
        R::ExternalInterrupt => Flow::Resume,
        R::ExceptionOrNmi => event::handle_exception(vcpu, info),
        R::EptViolation => return ept_violation::handle(vcpu, space, info),
        R::Cpuid => cpuid::handle(vcpu, info),
        R::Hlt => {
            skip(vcpu, info);
            vcpu.host_ran = true;
            thread::yield_now();
            Flow::Resume
        }
        // The caches are the host's business, and its memory is write-back.
        R::Wbinvd => skip(vcpu, info),
        R::Rdmsr => msr::handle_read(vcpu, info),
        R::Wrmsr => msr::handle_write(vcpu, info),
        R::Xsetbv => cpuid::handle_xsetbv(vcpu, info),
        R::TripleFault => Flow::User(info.report(abi::EXIT_TRIPLE_FAULT)),
        reason => refused::handle(vcpu, info, reason),
    })
}

/// Where the guest goes on behind an instruction whose end is at `rip`: outside 64-bit mode RIP has 32 bits, and more would be a
/// failed entry. (SDM 3C 27.3.1.4.)
#[inline(always)]
pub(crate) fn next_rip(vmcs: &mut CurrentVmcs<'_>, rip: u64) -> u64 {
    /// Longest instruction, in bytes.
    const LONGEST: u32 = 15;
    // Only there can an instruction have got across 4 GiB.
    if rip as u32 >= LONGEST {
        rip
    } else {
        next_rip_at_an_edge(vmcs, rip)
    }
}

#[cold]
#[inline(never)]
fn next_rip_at_an_edge(vmcs: &mut CurrentVmcs<'_>, rip: u64) -> u64 {
    if vmcs.read(guest::CS_ACCESS_RIGHTS) as u32 & segment::rights::LONG != 0 {
        rip
    } else {
        rip & u64::from(u32::MAX)
    }
}

/// Goes on behind the instruction that exited, in the window of the exit.
#[inline(always)]
fn skip_at_once(vmcs: &mut CurrentVmcs<'_>) {
    let rip = vmcs
        .read(guest::RIP)
        .wrapping_add(vmcs.read(exit_info::INSTRUCTION_LENGTH));
    let rip = next_rip(vmcs, rip);
    vmcs.write(guest::RIP, rip);
    // As in `Vcpu::write_next`.
    vmcs.write(guest::INTERRUPTIBILITY_STATE, 0);
}

/// Goes on behind the instruction that exited.
fn skip(vcpu: &mut Vcpu, info: &ExitInfo) -> Flow {
    vcpu.resume_at(info.rip.wrapping_add(info.instruction_len.into()));
    Flow::Resume
}
