// SPDX-License-Identifier: GPL-2.0

//! The vCPU and its run loop. What an exit means is in `exit/`; how to enter is in `vmx/`.
//!
//! The VMCS is touched only in *windows* with interrupts off, in which it is current. Between two windows the thread may
//! be preempted, moved to another CPU or sleep; what the next window is to write waits in [`Vcpu::next`].

use crate::abi;
use crate::abi::RunPage;
use crate::arch::controls::exception;
use crate::arch::exit::InterruptionInfo;
use crate::arch::vmcs_field::control;
use crate::arch::vmcs_field::exit_info;
use crate::arch::vmcs_field::guest;
use crate::counters;
use crate::exit;
use crate::exit::ExitInfo;
use crate::exit::Flow;
use crate::space::Space;
use crate::sys::cpu::IrqOff;
use crate::sys::mem::Page;
use crate::sys::regs;
use crate::sys::thread;
use crate::sys::thread::Pending;
use crate::sys::thread::Task;
use crate::sys::thread::TaskId;
use crate::vmx::enter;
use crate::vmx::enter::Entered;
use crate::vmx::guest_state;
use crate::vmx::guest_state::Cr4Policy;
use crate::vmx::host_state::HostState;
use crate::vmx::ops;
use crate::vmx::setup;
use crate::vmx::vmcs::CurrentVmcs;
use crate::vmx::vmcs::Loaded;
use crate::vmx::vmcs::Vmcs;
use crate::vmx::vpid::Vpid;
use core::mem::offset_of;
use core::mem::size_of;
use core::ptr::addr_of;
use core::ptr::addr_of_mut;
use core::sync::atomic::Ordering::Relaxed;
use kernel::prelude::*;

/// IA32_LSTAR as Linux has it, to be put back after each exit.
fn host_lstar() -> u64 {
    regs::read_msr(crate::arch::msr::IA32_LSTAR).unwrap_or(0)
}

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
    rip: Option<u64>,
    injection: Option<Injection>,
    /// ENTRY_INTERRUPTION_INFO may be valid in the VMCS although nothing is to be injected (an entry failed).
    clear_injection: bool,
}

/// State that user space gave in `Sregs` and that is in no VMCS field.
#[derive(Clone, Copy, Default)]
struct Soft {
    lstar: u64,
    syscall_vmcall: u64,
    efer: u64,
}

/// A vCPU. Used by its owner only (see [`Space::with_vcpu`]), but for [`Vcpu::owner_is_exiting`].
pub(crate) struct Vcpu {
    owner: Task,
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
    /// The VMCS has its constant part.
    is_set_up: bool,
}

/// Nothing for user space but to come back.
const AGAIN: abi::Exit = abi::Exit {
    kind: abi::EXIT_AGAIN,
    reason: 0,
    qualification: 0,
    gpa: 0,
    gla: 0,
    hva: 0,
    access: 0,
    flags: 0,
    instruction_len: 0,
    interruption_info: 0,
    interruption_error_code: 0,
    instruction_error: 0,
};

/// How a window with an entry ended.
enum Window {
    /// The guest ran and exited.
    Exited(ExitInfo),
    /// The entry failed before anything of the guest ran.
    Failed { instruction_error: u32 },
    /// VMX is not usable on this CPU now.
    Unusable,
    /// Something came up: look at `pending` again.
    Retry,
    /// The FPU state can only be loaded on the way through user mode.
    UserMode,
}

impl Vcpu {
    /// A vCPU of the calling thread. ENOMEM.
    pub(crate) fn new(space: &Space) -> Result<KBox<Self>> {
        let capabilities = &space.usage.capabilities;
        let vpid = if capabilities.has_vpid() {
            Vpid::new()
        } else {
            Vpid::none()
        };
        let vcpu = KBox::new(
            Self {
                owner: Task::current(),
                vmcs: Vmcs::new(capabilities.revision_id)?,
                run: Page::new()?,
                vpid: vpid.number(),
                _vpid: vpid,
                invept_single: capabilities.ept.invept_single(),
                invvpid_single: capabilities.ept.invvpid_single(),
                eptp: space.ept.eptp(),
                msr_bitmap_hpa: space.msr_bitmap.hpa(),
                host: HostState::new(),
                host_lstar: host_lstar(),
                cr4: space.cr4,
                soft: Soft::default(),
                next: Next::default(),
                is_set_up: false,
            },
            GFP_KERNEL,
        )?;
        counters::VCPUS.fetch_add(1, Relaxed);
        Ok(vcpu)
    }

    pub(crate) fn owner(&self) -> TaskId {
        self.owner.id()
    }

    pub(crate) fn owner_is_exiting(&self) -> bool {
        self.owner.is_exiting()
    }

    pub(crate) fn run_page(&self) -> &Page {
        &self.run
    }

    /// The run page. User space writes it at any time: every access is one volatile read or write of a field.
    pub(crate) fn run_ptr(&self) -> *mut RunPage {
        self.run.as_ptr().cast()
    }

    /// One of the guest's general-purpose registers, as of the last exit.
    pub(crate) fn gprs(&self) -> abi::Gprs {
        // SAFETY: The page is there; any bytes are a value.
        unsafe { addr_of!((*self.run_ptr()).gprs).read_volatile() }
    }

    /// Changes registers of the guest.
    pub(crate) fn set_gprs(&self, gprs: &abi::Gprs) {
        // SAFETY: As above.
        unsafe { addr_of_mut!((*self.run_ptr()).gprs).write_volatile(*gprs) };
    }

    /// Adds to the counter of the run page at that offset in [`abi::Counters`].
    #[inline]
    pub(crate) fn count(&self, offset: usize, n: u64) {
        assert!(offset % 8 == 0 && offset < size_of::<abi::Counters>());
        // SAFETY: The page is there, and the counter inside. What user space writes there is its own loss.
        unsafe {
            let p = addr_of_mut!((*self.run_ptr()).counters).cast::<u64>().add(offset / 8);
            p.write_volatile(p.read_volatile().wrapping_add(n));
        }
    }

    /// The next entry goes on at `rip`.
    pub(crate) fn resume_at(&mut self, rip: u64) {
        self.next.rip = Some(rip);
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
    }

    /// The last entry failed: what it was to deliver may still stand in the VMCS.
    pub(crate) fn drop_injection(&mut self) {
        self.next.injection = None;
        self.next.clear_injection = true;
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
    /// EINTR for a signal, or `interrupt_request`; EINVAL for what the run page must not ask; ENOMEM; ENODEV when VMX was
    /// taken away.
    pub(crate) fn run(&mut self, space: &Space) -> Result<u64> {
        self.take_dirty()?;
        loop {
            match thread::pending() {
                Pending::Nothing => {}
                Pending::Reschedule => thread::reschedule(),
                Pending::Signal => return Err(EINTR),
                Pending::UserWork => return Ok(self.finish(&AGAIN)),
            }
            // SAFETY: The page is there.
            if unsafe { addr_of!((*self.run_ptr()).interrupt_request).read_volatile() } != 0 {
                return Err(EINTR);
            }
            self.vmcs.clear_elsewhere();
            let flow = match self.enter_once(space) {
                Window::Exited(info) => exit::handle(self, space, &info)?,
                Window::Failed { instruction_error } => {
                    self.drop_injection();
                    Flow::User(abi::Exit {
                        kind: abi::EXIT_FAIL_ENTRY,
                        instruction_error,
                        ..Default::default()
                    })
                }
                // A CPU that goes offline: the scheduler is about to move this thread.
                Window::Unusable | Window::UserMode => return Ok(self.finish(&AGAIN)),
                Window::Retry => Flow::Resume,
            };
            match flow {
                Flow::Resume => {}
                Flow::Syscall => return Ok(self.forward()),
                Flow::User(exit) => {
                    self.sync()?;
                    return Ok(self.finish(&exit));
                }
            }
        }
    }

    /// Hands a result to user space that is no system call.
    fn finish(&self, exit: &abi::Exit) -> u64 {
        // SAFETY: The page is there.
        unsafe { addr_of_mut!((*self.run_ptr()).exit).write_volatile(*exit) };
        thread::set_user_result(exit.kind, None);
        0
    }

    /// Hands a system call to user space: its arguments in the registers where SYSCALL wants them.
    fn forward(&self) -> u64 {
        let gprs = self.gprs();
        // SAFETY: The page is there.
        unsafe { addr_of_mut!((*self.run_ptr()).exit.kind).write_volatile(abi::EXIT_SYSCALL) };
        let args = [gprs.rdi, gprs.rsi, gprs.rdx, gprs.r10, gprs.r8, gprs.r9];
        thread::set_user_result(abi::EXIT_SYSCALL, Some(thread::Forward { args }));
        // Linux takes the low 32 bits; zero-extended they are never taken for an error of ours.
        gprs.rax as u32 as u64
    }

    /// Takes from the run page what its `dirty` says. EINVAL.
    fn take_dirty(&mut self) -> Result {
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

    /// Calls `f` with the VMCS current, in a window without an entry. ENODEV when VMX was taken away.
    fn with_vmcs(&mut self, f: impl FnOnce(&mut CurrentVmcs<'_>, &crate::arch::controls::VmxCapabilities)) -> Result {
        let capabilities = crate::vmx::owner::capabilities().ok_or(ENODEV)?;
        // A CPU that goes offline sends the thread elsewhere; it does not take many turns.
        for _ in 0..1000 {
            self.vmcs.clear_elsewhere();
            let irq = IrqOff::new();
            match self.vmcs.load(&irq) {
                Loaded::Here { mut vmcs, moved } => {
                    f(&mut vmcs, &capabilities);
                    if moved {
                        // The next entry has this CPU's state to write, and to flush.
                        self.host = HostState::new();
                    }
                    return if vmcs.has_failed() { Err(EIO) } else { Ok(()) };
                }
                Loaded::Elsewhere => {}
                Loaded::Unusable => {
                    drop(irq);
                    thread::yield_now();
                }
            }
        }
        Err(ENODEV)
    }

    /// One window: load, enter, exit, read why.
    fn enter_once(&mut self, space: &Space) -> Window {
        let irq = IrqOff::new();
        if thread::pending() != Pending::Nothing {
            return Window::Retry;
        }
        if !regs::load_fpu(&irq) {
            return Window::UserMode;
        }
        let (mut vmcs, moved) = match self.vmcs.load(&irq) {
            Loaded::Here { vmcs, moved } => (vmcs, moved),
            Loaded::Elsewhere => return Window::Retry,
            Loaded::Unusable => return Window::Unusable,
        };
        let moved = moved || self.host.is_new();
        self.host.refresh(&mut vmcs, moved, &irq);
        self.write_next(&mut vmcs);

        // From here on an invalidation interrupts this CPU.
        if space.ept.translations.enter(&irq) {
            self.flush_ept();
        }
        if moved {
            self.flush_vpid();
        }
        // SAFETY: Canonical, as `check` and `set_lstar` want; Linux' is put back below, before interrupts come on.
        unsafe { regs::write_lstar(self.soft.lstar, &irq) };
        thread::guest_timing_enter(&irq);
        // SAFETY: `setup` was written before the first entry (`take_dirty`), the host state is fresh, the FPU loaded.
        let entered = unsafe { enter::enter(self.run_ptr(), &self.vmcs.entry, &irq) };
        // SAFETY: Linux' own value.
        unsafe { regs::write_lstar(self.host_lstar, &irq) };
        space.ept.translations.leave(&irq);

        if entered != Entered::Exit {
            thread::guest_timing_exit(&irq);
            let instruction_error = match entered {
                Entered::FailValid => vmcs.read(exit_info::INSTRUCTION_ERROR) as u32,
                _ => return Window::Unusable,
            };
            return Window::Failed { instruction_error };
        }
        self.host.restore_after_exit(&irq);
        let info = ExitInfo::read(&mut vmcs, self.soft.syscall_vmcall, self.run_ptr());
        self.count_exit(&info, &vmcs);
        if !info.is_entry_failure() {
            self.vmcs.entry.launched.store(1, Relaxed);
        }
        if info.is_nmi() {
            enter::handle_nmi(&irq);
        } else if info.is_machine_check() {
            enter::handle_machine_check(&irq);
        }
        if vmcs.has_failed() {
            pr_err!("a VMREAD or VMWRITE failed: somebody else uses VMX\n");
            thread::guest_timing_exit(&irq);
            return Window::Unusable;
        }
        if info.is_external_interrupt() {
            // Taken now, while the time still counts as the guest's: the tick must find it so.
            drop(irq);
            let irq = IrqOff::new();
            thread::guest_timing_exit(&irq);
        } else {
            thread::guest_timing_exit(&irq);
        }
        Window::Exited(info)
    }

    /// Writes what earlier exits, or user space, left for this entry.
    #[inline]
    fn write_next(&mut self, vmcs: &mut CurrentVmcs<'_>) {
        if let Some(rip) = self.next.rip.take() {
            vmcs.write(guest::RIP, rip);
        }
        if let Some(injection) = self.next.injection.take() {
            vmcs.write(control::ENTRY_INTERRUPTION_INFO, injection.info.as_u32().into());
            if injection.info.has_error_code() {
                vmcs.write(control::ENTRY_EXCEPTION_ERROR_CODE, injection.error_code.into());
            }
            if injection.info.is_software() {
                vmcs.write(control::ENTRY_INSTRUCTION_LENGTH, injection.instruction_len.into());
            }
        } else if self.next.clear_injection {
            vmcs.write(control::ENTRY_INTERRUPTION_INFO, 0);
        }
        self.next.clear_injection = false;
    }

    fn flush_ept(&self) {
        // SAFETY: VMX is on, the type is one the CPU has, interrupts are off.
        let result = unsafe { ops::invept(self.invept_single.then_some(self.eptp)) };
        if result.is_err() {
            pr_err!("INVEPT failed\n");
        }
        self.count(offset_of!(abi::Counters, invept), 1);
    }

    fn flush_vpid(&self) {
        if self.vpid == 0 {
            return;
        }
        // SAFETY: As above.
        let result = unsafe { ops::invvpid(self.invvpid_single.then_some(self.vpid.into())) };
        if result.is_err() {
            pr_err!("INVVPID failed\n");
        }
        self.count(offset_of!(abi::Counters, invvpid), 1);
        self.count(offset_of!(abi::Counters, migrations), 1);
    }

    fn count_exit(&self, info: &ExitInfo, vmcs: &CurrentVmcs<'_>) {
        let reason = (info.basic_reason() as usize).min(abi::EXIT_REASONS - 1);
        self.count(offset_of!(abi::Counters, exits) + 8 * reason, 1);
        if !info.is_entry_failure() {
            self.count(offset_of!(abi::Counters, entries), 1);
        }
        if cfg!(dune_count_ops) {
            let ops = vmcs.ops;
            self.count(offset_of!(abi::Counters, vmreads), ops.vmreads);
            self.count(offset_of!(abi::Counters, vmwrites), ops.vmwrites);
            self.count(offset_of!(abi::Counters, rdmsrs), ops.rdmsrs);
            // LSTAR, in and out.
            self.count(offset_of!(abi::Counters, wrmsrs), ops.wrmsrs + 2);
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        counters::VCPUS.fetch_sub(1, Relaxed);
    }
}

// The run loop relies on these exits, however the guest sets its IDT.
const _: () = assert!(exception::ALWAYS & exception::MC != 0);
