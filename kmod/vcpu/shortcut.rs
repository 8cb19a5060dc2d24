// SPDX-License-Identifier: GPL-2.0

//! The way back into the guest without a RUN (docs/architecture.md, "The shortcut").
//!
//! Behind a system call that RUN handed to the host loop, Linux calls the vCPU once more, when the thread is about to go to
//! user mode. If it would go on behind that call, and nothing else is to be done there than to put its result into the run page
//! and RUN, both are done here. Interrupts are off all along. An exit that RUN would have to look at waits for it: the thread
//! goes on behind the call, as if that had come back only now.

use super::window::Window;
use super::Vcpu;
use crate::abi;
use crate::exit;
use crate::exit::ExitInfo;
use crate::exit::Flow;
use crate::space::Space;
use crate::sys::cpu::IrqLeftOff;
use crate::sys::cpu::IrqOff;
use crate::sys::mm::Mm;
use crate::sys::regs;
use crate::sys::regs::FpuLoan;
use crate::sys::thread;
use crate::sys::user;
use crate::sys::user_return;
use crate::sys::user_return::GoesToUserMode;
use core::ptr::addr_of;
use kernel::prelude::*;

/// What of a vCPU waits for its thread.
#[derive(Default)]
pub(super) struct Waiting {
    /// A system call was handed to the host loop, and no RUN began since.
    for_call: bool,
    /// Where RUN was made from: the instruction behind it.
    run_behind: u64,
    /// An exit for the next RUN.
    exit: Option<ExitInfo>,
    /// The guest's restartable section when it came: Linux forgets it on the way through user mode.
    section: u64,
    /// For [`counters::SHORTCUTS`].
    shortcuts: usize,
}

impl Vcpu {
    /// A system call was handed to the host loop: the thread is waited for. In the window.
    #[inline(always)]
    pub(super) fn wait_for_call(&mut self, irq: &IrqOff) {
        self.waiting.for_call = true;
        self.waiting.run_behind = self.owner.user_rip();
        // SAFETY: `go_to_user_mode` uses the vCPU only for its thread, which makes no RUN then; `stop_waiting` comes before
        // the vCPU's end.
        unsafe { user_return::wait::<Self>(self, irq) };
    }

    /// RUN begins: what came by the shortcut and is not settled yet. `Some`: what RUN returns.
    #[inline(always)]
    pub(super) fn settle_waiting(&mut self, space: &Space) -> Option<Result<u64>> {
        self.waiting.for_call = false;
        match self.waiting.exit.take() {
            None => None,
            Some(info) => self.settle_exit(space, &info),
        }
    }

    #[cold]
    fn settle_exit(&mut self, space: &Space, info: &ExitInfo) -> Option<Result<u64>> {
        let flow = exit::handle(self, space, info);
        // Whatever Linux did with the thread meanwhile, it did not see the section.
        let section = core::mem::take(&mut self.waiting.section);
        if section != 0 {
            self.abort_rseq_section(section);
        }
        match flow {
            Ok(Flow::Resume) => None,
            Ok(Flow::User(exit)) => Some(self.sync().map(|()| self.finish(&exit))),
            Err(e) => Some(Err(e)),
        }
    }

    /// It is about to end: no CPU begins to use it from here on. Whether its thread may be on its way to user mode, with interrupts
    /// off, and use it still: not where the caller is that thread, or that is past user mode of `mm`.
    pub(crate) fn stop_waiting(&mut self, mm: Mm) -> bool {
        user_return::forget::<Self>(self);
        self.owner.id() != thread::current_id() && !self.is_abandoned(mm)
    }

    /// For the counters, at its end.
    pub(super) fn shortcuts(&self) -> usize {
        self.waiting.shortcuts
    }

    /// Whether the next RUN would enter the guest as things are, but for the thread's flags.
    fn would_run(&self) -> bool {
        // SAFETY: The run page is there.
        let dirty = unsafe { addr_of!((*self.run_ptr()).dirty).read_volatile() };
        dirty == 0 && !self.is_interrupt_requested() && !self.is_time_over() && regs::data_selectors() == 0
    }

    /// The guest exited for something that RUN is to look at. As long as this CPU counts as in the guest: what its guest has used
    /// just now is there until then.
    #[cold]
    pub(super) fn keep_section(&mut self) {
        if cfg!(dune_mutate_section) {
            return;
        }
        self.waiting.section = thread::rseq().map_or(0, |rseq| user::read_now(rseq.section).unwrap_or(0));
    }
}

impl GoesToUserMode for Vcpu {
    fn go_to_user_mode(&mut self, irq: IrqLeftOff) {
        // SAFETY: The run page is there.
        let behind = unsafe { addr_of!((*self.run_ptr()).forward_behind).read_volatile() };
        if !self.waiting.for_call {
            return;
        }
        let Some(result) = self.owner.user_rax_at(behind).filter(|_| behind != 0) else {
            return;
        };
        if !self.would_run() {
            return;
        }
        self.waiting.for_call = false;
        self.set_rax(result);
        self.host_ran = true;
        // SAFETY: The space has this vCPU, and ends its vCPUs before it ends.
        let space = unsafe { self.space.as_ref() };
        match self.window(space, irq, FpuLoan::none()) {
            Window::Syscall => {
                let forward = self.forwarded();
                let behind_run = self.waiting.run_behind;
                self.owner
                    .return_to_user(behind_run, forward.number, abi::EXIT_SYSCALL, forward.call);
                self.waiting.for_call = true;
                self.waiting.shortcuts = self.waiting.shortcuts.wrapping_add(1);
            }
            Window::Exited(info) => self.waiting.exit = Some(info),
            Window::Failed { .. } => self.drop_injection(),
            // RUN finds out again.
            _ => {}
        }
        if !self.waiting.for_call {
            // Behind the call the host loop puts it into the run page, where an exit may have put another.
            self.owner.set_user_rax(self.gprs().rax);
        }
    }
}
