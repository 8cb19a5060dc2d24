// SPDX-License-Identifier: GPL-2.0

//! The vCPU and its run loop. What an exit means is in `exit/`; how to enter is in `vmx/`.
//!
//! The VMCS is touched only in *windows* with interrupts off, in which it is current. Between two windows the thread may
//! be preempted, moved to another CPU or sleep; what the next window is to write waits in [`Vcpu::next`].

mod rseq;
mod run_page;
mod shortcut;
mod state;
mod window;

use self::run_page::AGAIN;
use self::shortcut::Waiting;
use self::window::Window;
use crate::abi;
use crate::arch::exit::InterruptionInfo;
use crate::counters;
use crate::counters::Counted;
use crate::exit;
use crate::exit::Flow;
use crate::limits::Charge;
use crate::space::Space;
use crate::sys::chardev::wants_user_work;
use crate::sys::chardev::Caller;
use crate::sys::mem::Page;
use crate::sys::mm::Mm;
use crate::sys::regs;
use crate::sys::thread;
use crate::sys::thread::Pending;
use crate::sys::thread::Task;
use crate::sys::thread::TaskId;
use crate::vmx::guest_state::Cr4Policy;
use crate::vmx::host_state::HostState;
use crate::vmx::owner;
use crate::vmx::vmcs::Vmcs;
use crate::vmx::vpid::Vpid;
use core::ptr::NonNull;
use core::sync::atomic::Ordering::Relaxed;
use kernel::prelude::*;

/// An event for the guest's IDT.
#[derive(Clone, Copy)]
pub(crate) struct Injection {
    pub(crate) info: InterruptionInfo,
    pub(crate) error_code: u32,
    pub(crate) instruction_len: u32,
}

/// What the next window writes before it enters.
#[derive(Clone, Copy, Default)]
struct Next {
    /// Something of the rest is there.
    any: bool,
    rip: Option<u64>,
    injection: Option<Injection>,
    /// PKRU, where code at CPL3 had it ([`Vcpu::put_pkru_away`]).
    pkru: Option<u32>,
    /// ENTRY_INTERRUPTION_INFO may be valid in the VMCS although nothing is to be injected (an entry failed).
    clear_injection: bool,
}

/// System calls by which a thread can have perf program the PMU of the CPU it is on: ioctl, prctl, perf_event_open.
const PMU_CALLS: [u64; 3] = [16, 157, 298];

/// State that user space gave in `Sregs` and that is in no VMCS field.
#[derive(Clone, Copy, Default)]
struct Soft {
    lstar: u64,
    syscall_vmcall: u64,
    efer: u64,
}

/// A vCPU. Used by its owner only (see [`Space::with_vcpu`]), but for [`Vcpu::is_abandoned`].
pub(crate) struct Vcpu {
    pub(crate) owner: Task,
    /// The one that has it.
    space: NonNull<Space>,
    waiting: Waiting,
    vmcs: KBox<Vmcs>,
    run: Page,
    _vpid: Vpid,
    vpid: u16,
    invept_single: bool,
    invvpid_single: bool,
    eptp: u64,
    msr_bitmap_hpa: u64,
    host: HostState,
    host_lstar: u64,
    cr4: Cr4Policy,
    soft: Soft,
    next: Next,
    /// [`Task::switches`] and [`IrqOff::counted_interrupts`] when the guest's restartable sequence was last aborted for them.
    rseq_aborted_at: (u64, u64),
    /// RUN went through user mode for the extended state, and no guest was entered since.
    went_for_fpu: bool,
    /// Other code of the host ran since the last entry than that which settles simple exits.
    pub(crate) host_ran: bool,
    /// The VMCS has its constant part.
    is_set_up: bool,
    _charge: Charge,
    /// For [`counters::SYSCALLS`].
    syscalls: usize,
    _counted: Counted,
}

impl Vcpu {
    /// A vCPU of the calling thread, for `space`, which ends it before it ends itself. ENOMEM.
    pub(crate) fn new(space: &Space, charge: Charge) -> Result<KBox<Self>> {
        let capabilities = &space.capabilities;
        let vpid = if capabilities.has_vpid() {
            Vpid::new()
        } else {
            Vpid::none()
        };
        let vcpu = KBox::new(
            Self {
                owner: Task::current(),
                space: NonNull::from(space),
                waiting: Waiting::default(),
                vmcs: Vmcs::new(capabilities.revision_id)?,
                run: Page::new()?,
                vpid: vpid.number(),
                _vpid: vpid,
                invept_single: capabilities.ept.invept_single(),
                invvpid_single: capabilities.ept.invvpid_single(),
                eptp: space.ept.eptp(),
                msr_bitmap_hpa: space.msr_bitmap.hpa(),
                host: HostState::new(),
                // Linux' own: a window puts it back before interrupts come on.
                host_lstar: space.host_lstar,
                cr4: space.cr4,
                soft: Soft::default(),
                next: Next::default(),
                // Of no thread yet.
                rseq_aborted_at: (!0, 0),
                went_for_fpu: false,
                host_ran: true,
                is_set_up: false,
                _charge: charge,
                syscalls: 0,
                _counted: Counted::new(&counters::VCPUS),
            },
            GFP_KERNEL_ACCOUNT,
        )?;
        counters::VCPUS_MADE.fetch_add(1, Relaxed);
        Ok(vcpu)
    }

    pub(crate) fn owner(&self) -> TaskId {
        self.owner.id()
    }

    /// Whether its owner will not run it again: it ends, or executes another program than the one with `mm`.
    pub(crate) fn is_abandoned(&self, mm: Mm) -> bool {
        self.owner.is_exiting() || !self.owner.has_mm(mm)
    }

    /// The next entry goes on at `rip`.
    pub(crate) fn resume_at(&mut self, rip: u64) {
        self.next.rip = Some(rip);
        self.next.any = true;
    }

    /// The next entry delivers that exception.
    pub(crate) fn inject_exception(&mut self, vector: u8, error_code: Option<u32>) {
        self.inject(Injection {
            info: InterruptionInfo::hardware_exception(vector, error_code),
            error_code: error_code.unwrap_or(0),
            instruction_len: 0,
        });
    }

    /// The next entry delivers that event.
    pub(crate) fn inject(&mut self, injection: Injection) {
        self.next.injection = Some(injection);
        self.next.any = true;
    }

    /// The last entry failed: what it was to deliver may still stand in the VMCS.
    pub(crate) fn drop_injection(&mut self) {
        self.next.injection = None;
        self.next.clear_injection = true;
        self.next.any = true;
    }

    /// Whether an exit may be settled in its window: nobody wants anything of the thread, and CPUID does not fault.
    #[inline(always)]
    pub(crate) fn may_settle(&self) -> bool {
        !self.owner.has_work_or_cpuid_faults() && !self.is_interrupt_requested() && !self.is_time_over()
    }

    /// Address of the VMCALL that stands for a SYSCALL.
    #[inline(always)]
    pub(crate) fn syscall_vmcall(&self) -> u64 {
        self.soft.syscall_vmcall
    }

    pub(crate) fn lstar(&self) -> u64 {
        self.soft.lstar
    }

    /// `value` must be canonical.
    pub(crate) fn set_lstar(&mut self, value: u64) {
        self.soft.lstar = value;
    }

    pub(crate) fn efer(&self) -> u64 {
        self.soft.efer
    }

    /// [`abi::DUNE_RUN`]: runs until something is for user space. Gives what the caller finds in RAX.
    ///
    /// # Errors
    ///
    /// ENXIO where the thread has selectors in DS, ES, FS or GS; EINTR for a signal, `interrupt_request` or `deadline`; EINVAL for what the run page must not ask; ENOMEM; ENODEV when VMX was
    /// taken away.
    #[inline(always)]
    pub(crate) fn run(&mut self, space: &Space, caller: Caller) -> Result<u64> {
        // A VM exit would load null there.
        if regs::data_selectors() != 0 {
            return Err(ENXIO);
        }
        if let Some(answer) = self.settle_waiting(space) {
            return answer;
        }
        self.take_dirty()?;
        self.host_ran = true;
        loop {
            if self.is_interrupt_requested() || self.is_time_over() {
                // Linux would not find the guest's section on the way to user mode.
                self.abort_rseq();
                return Err(EINTR);
            }
            let flow = match self.enter_once(space) {
                Window::Syscall => {
                    let forward = self.forwarded();
                    self.owner.set_user_result(abi::EXIT_SYSCALL, Some(forward.call));
                    return Ok(forward.number);
                }
                Window::Exited(info) => match exit::handle(self, space, &info) {
                    Ok(flow) => flow,
                    Err(e) => {
                        // It may have slept, and Linux would not find the guest's section on the way to user mode.
                        self.abort_rseq();
                        return Err(e);
                    }
                },
                Window::Failed { instruction_error } => {
                    self.drop_injection();
                    Flow::User(abi::Exit {
                        kind: abi::EXIT_FAIL_ENTRY,
                        instruction_error,
                        ..Default::default()
                    })
                }
                // A CPU that goes offline, and the scheduler is about to move this thread; or kvm_intel came.
                Window::Unusable => {
                    owner::regain()?;
                    return Ok(self.go_through_user_mode());
                }
                Window::UserMode => return Ok(self.go_through_user_mode()),
                Window::Switched => {
                    self.abort_rseq();
                    continue;
                }
                Window::Retry => match self.settle_pending(caller) {
                    Ok(()) => continue,
                    Err(answer) => return answer,
                },
                Window::Elsewhere => {
                    self.vmcs.clear_elsewhere();
                    continue;
                }
            };
            match flow {
                Flow::Resume => {}
                Flow::User(exit) => {
                    if exit.kind == abi::EXIT_TOUCH {
                        // The access that the caller makes may sleep.
                        self.abort_rseq();
                    }
                    self.sync()?;
                    return Ok(self.finish(&exit));
                }
            }
        }
    }
}

impl Vcpu {
    /// What RUN returns for a guest that goes on behind the host loop's next RUN.
    #[cold]
    fn go_through_user_mode(&mut self) -> u64 {
        self.abort_rseq();
        self.finish(&AGAIN)
    }

    /// Does what Linux wants of the thread before a guest runs. `Err`: what RUN returns instead.
    #[cold]
    fn settle_pending(&mut self, caller: Caller) -> Result<(), Result<u64>> {
        match thread::pending() {
            Pending::Nothing => {}
            Pending::Reschedule => {
                self.host_ran = true;
                thread::reschedule();
            }
            Pending::Signal => {
                self.abort_rseq();
                return Err(Err(EINTR));
            }
            // Done in RUN, not by a way to user mode: a tracer stops the thread when RUN begins, and each such stop leaves new
            // work, so that the guest would never run. But by the caller, who holds nothing of the vCPU: it may be anything.
            Pending::UserWork => {
                self.abort_rseq();
                if caller.worked() {
                    return Err(Ok(self.finish(&AGAIN)));
                }
                return Err(Err(wants_user_work()));
            }
        }
        Ok(())
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        // SAFETY: The space ends its vCPUs before it ends.
        let mm = unsafe { self.space.as_ref() }.mm;
        // Where that is not so, `Space::put` has waited.
        self.stop_waiting(mm);
        counters::SHORTCUTS.fetch_add(self.shortcuts(), Relaxed);
        counters::SYSCALLS.fetch_add(self.syscalls, Relaxed);
        if cfg!(dune_mutate_leak) {
            core::mem::forget(Page::new());
        }
    }
}
