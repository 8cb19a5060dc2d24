// SPDX-License-Identifier: GPL-2.0

//! The current thread (linux/sched.h, linux/entry-common.h, asm/ptrace.h).

use super::bindings;
use super::cpu::IrqOff;
use super::mm::Mm;
use super::user_return;
use core::mem::MaybeUninit;
use core::ptr::NonNull;

/// Address of a task, to be compared only; null is none.
pub(crate) type TaskId = *mut core::ffi::c_void;

/// Number of the calling process, as the first pid namespace has it.
pub(crate) fn current_pid() -> u32 {
    // SAFETY: Reads the current task.
    unsafe { bindings::dune_current_pid() as u32 }
}

/// The current task's.
pub(crate) fn current_id() -> TaskId {
    // SAFETY: Reads a per-CPU variable.
    unsafe { bindings::dune_current().cast() }
}

/// The calling thread, and its address space.
#[inline(always)]
pub(crate) fn caller() -> (TaskId, Option<Mm>) {
    // SAFETY: Reads the current task.
    let caller = unsafe { bindings::dune_caller() };
    (caller.task.cast(), Mm::from_raw(caller.mm))
}

/// A reference to a task.
pub(crate) struct Task {
    task: NonNull<bindings::task_struct>,
    words: bindings::dune_task_words,
}

// SAFETY: Reference-counted.
unsafe impl Send for Task {}
// SAFETY: Only flags are read, atomically.
unsafe impl Sync for Task {}

impl Task {
    pub(crate) fn current() -> Self {
        let mut words = MaybeUninit::uninit();
        // SAFETY: There is always a current task; the reference is given back in `drop`. All of the words are set.
        unsafe {
            let task = NonNull::new_unchecked(bindings::dune_get_current());
            bindings::dune_task_words(task.as_ptr(), words.as_mut_ptr());
            Self {
                task,
                words: words.assume_init(),
            }
        }
    }

    /// Puts `exit_kind` into R12 of its system call's caller, and the arguments of a call to make into its registers. For the
    /// current task, in a system call.
    #[inline(always)]
    pub(crate) fn set_user_result(&self, exit_kind: u32, forward: Option<Forward>) {
        // SAFETY: The current thread is in a system call, so its registers are there and nobody else uses them.
        let regs = unsafe { &mut *self.words.regs };
        Self::set_result(regs, exit_kind, forward);
    }

    #[inline(always)]
    fn set_result(regs: &mut bindings::pt_regs, exit_kind: u32, forward: Option<Forward>) {
        regs.r12 = exit_kind as _;
        if let Some(Forward {
            args: [di, si, dx, r10, r8, r9],
        }) = forward
        {
            regs.di = di as _;
            regs.si = si as _;
            regs.dx = dx as _;
            regs.r10 = r10 as _;
            regs.r8 = r8 as _;
            regs.r9 = r9 as _;
        }
    }

    /// Where it goes on in user mode. For the current task, in a system call.
    #[inline(always)]
    pub(crate) fn user_rip(&self) -> u64 {
        // SAFETY: As above.
        unsafe { (*self.words.regs).ip as u64 }
    }

    /// RAX in user mode, if the next instruction there is at `rip`. For the current task, on its way to user mode.
    #[inline(always)]
    pub(crate) fn user_rax_at(&self, rip: u64) -> Option<u64> {
        // SAFETY: As above, until the thread is in user mode.
        let regs = unsafe { &*self.words.regs };
        (regs.ip as u64 == rip).then_some(regs.ax as u64)
    }

    /// Sets RAX in user mode. As above.
    #[inline(always)]
    pub(crate) fn set_user_rax(&self, rax: u64) {
        // SAFETY: As above.
        unsafe { (*self.words.regs).ax = rax as _ };
    }

    /// As [`Self::set_user_result`], with what the system call returns and where it returns to, an address of before. As above.
    #[inline(always)]
    pub(crate) fn return_to_user(&self, rip: u64, rax: u64, exit_kind: u32, forward: Forward) {
        // SAFETY: As above.
        let regs = unsafe { &mut *self.words.regs };
        Self::set_result(regs, exit_kind, Some(forward));
        regs.ax = rax as _;
        regs.ip = rip as _;
        // As SYSRET wants it.
        regs.cx = rip as _;
    }

    #[inline(always)]
    fn flags(&self) -> u64 {
        // SAFETY: A word of the task, which is allocated.
        unsafe { self.words.flags.read_volatile() as u64 }
    }

    /// Whether it is not to enter a guest as it is: [`pending`] or `regs::load_user_state` tells why. For the current task.
    #[inline(always)]
    pub(crate) fn has_work(&self, irq: &IrqOff) -> bool {
        // SAFETY: Constants.
        let (all, user_return) = unsafe { (bindings::dune_flags_before_entry, bindings::dune_flag_user_return) };
        let work = self.flags() & all as u64;
        work != 0 && (work != user_return as u64 || !user_return::is_ours(irq))
    }

    /// In a window: [`Self::has_work`] by now, or CPUID faults in it.
    #[inline(always)]
    pub(crate) fn has_work_or_cpuid_faults(&self) -> bool {
        // SAFETY: Constants.
        self.flags() & unsafe { bindings::dune_flags_before_settling } as u64 != 0
    }

    /// Whether CPUID faults in it (arch_prctl(ARCH_CPUID_GET)).
    #[inline(always)]
    pub(crate) fn cpuid_faults(&self) -> bool {
        // SAFETY: A constant.
        self.flags() & unsafe { bindings::dune_flag_cpuid_faults } as u64 != 0
    }

    /// Changes whenever it is switched out. For the current task.
    #[inline(always)]
    pub(crate) fn switches(&self) -> u64 {
        // SAFETY: Words of the task, which is allocated.
        unsafe { (self.words.nvcsw.read_volatile() as u64).wrapping_add(self.words.nivcsw.read_volatile() as u64) }
    }

    /// Stands for the task; not another's as long as this reference is held.
    pub(crate) fn id(&self) -> TaskId {
        self.task.as_ptr().cast()
    }

    /// Whether it is past the point where it could run user code again.
    pub(crate) fn is_exiting(&self) -> bool {
        // SAFETY: The task is allocated.
        unsafe { bindings::dune_task_is_exiting(self.task.as_ptr()) }
    }

    /// Whether it runs in the address space `mm` now: not so after it executed another program.
    pub(crate) fn has_mm(&self, mm: Mm) -> bool {
        // SAFETY: The task is allocated; the pointers are compared only.
        unsafe { bindings::dune_task_has_mm(self.task.as_ptr(), mm.as_ptr()) }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        // SAFETY: Taken in `current`.
        unsafe { bindings::dune_put_task(self.task.as_ptr()) };
    }
}

/// A system call to be made by the instruction behind the current one.
pub(crate) struct Forward {
    pub(crate) args: [u64; 6],
}

/// What Linux wants of this thread before it goes on in user mode, or in a guest.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pending {
    Nothing,
    /// Somebody else should run.
    Reschedule,
    /// A signal.
    Signal,
    /// Work that is done on the way to user mode.
    UserWork,
}

#[inline]
pub(crate) fn pending() -> Pending {
    // SAFETY: Each reads flags of the current thread.
    unsafe {
        if !bindings::dune_work_pending() {
            Pending::Nothing
        } else if bindings::dune_signal_pending() {
            Pending::Signal
        } else if bindings::dune_user_work_pending() {
            Pending::UserWork
        } else {
            Pending::Reschedule
        }
    }
}

/// Whether the thread was switched out since it was last in user mode, where Linux tells that apart from [`pending`].
#[inline]
pub(crate) fn rseq_is_due() -> bool {
    // SAFETY: Reads a flag of the current thread.
    unsafe { bindings::dune_rseq_is_due() }
}

/// Whether the thread's `struct rseq` names the CPU that it is on.
#[inline]
pub(crate) fn rseq_is_true(_irq: &IrqOff) -> bool {
    // SAFETY: Words of the current thread, which stays on this CPU.
    unsafe { bindings::dune_rseq_is_true() }
}

/// The thread's registration for restartable sequences.
pub(crate) struct Rseq {
    /// Address of the `rseq_cs` field in the thread's `struct rseq`.
    pub(crate) section: u64,
    pub(crate) signature: u32,
}

/// `None` where it has none.
pub(crate) fn rseq() -> Option<Rseq> {
    const RSEQ_CS: u64 = 8;
    let mut signature = 0;
    // SAFETY: Reads the current task; the address is for user-space copies only.
    match unsafe { bindings::dune_rseq(&mut signature) } {
        0 => None,
        area => Some(Rseq {
            section: area.wrapping_add(RSEQ_CS),
            signature,
        }),
    }
}

/// Does what can be done of [`Pending::UserWork`] without going to user mode, all but live patches and uprobes; may sleep.
/// Whether a signal came is for [`pending`] to tell.
pub(crate) fn do_user_work() {
    // SAFETY: Called with interrupts and preemption on.
    unsafe { bindings::dune_do_user_work() };
}

/// Lets somebody else run if somebody should; may sleep.
pub(crate) fn reschedule() {
    // SAFETY: Called with interrupts and preemption on.
    unsafe { bindings::dune_cond_resched() };
}

/// Lets others run before this thread goes on; may sleep.
pub(crate) fn yield_now() {
    // SAFETY: Called with interrupts and preemption on.
    unsafe { bindings::dune_yield() };
}

/// Whether a signal is pending.
pub(crate) fn is_signal_pending() -> bool {
    // SAFETY: Reads flags of the current thread.
    unsafe { bindings::dune_signal_pending() }
}

/// Sleeps so long, or less where a signal comes.
pub(crate) fn sleep_ms(ms: u32) {
    // SAFETY: Called where sleeping is allowed.
    unsafe { bindings::dune_sleep_ms(ms) };
}

/// The user whom the current thread's resources are charged to: its own, or the one who made its user namespace.
pub(crate) fn charged_user() -> u32 {
    // SAFETY: Reads the current thread's credentials.
    unsafe { bindings::dune_charged_uid() }
}

/// Whether the current thread may exceed the limits of users (CAP_SYS_RESOURCE).
pub(crate) fn may_exceed_limits() -> bool {
    // SAFETY: Asks about the current thread.
    unsafe { bindings::dune_may_exceed() }
}

/// Account the time from here on as the guest's, that is, as user time.
pub(crate) fn guest_timing_enter(_: &super::cpu::IrqOff) {
    // SAFETY: Interrupts are off.
    unsafe { bindings::dune_guest_timing_enter() };
}

/// Ticks of Linux since it started.
#[inline(always)]
pub(crate) fn tick() -> u64 {
    // SAFETY: A counter that is there for everybody to read.
    unsafe { (&raw const bindings::jiffies).read_volatile() as u64 }
}

/// Tells RCU that a guest ran until now, in which nothing of the kernel's was in use: for an exit that an interrupt made.
pub(crate) fn note_quiescent(_: &super::cpu::IrqOff) {
    // SAFETY: Interrupts are off, and no RCU read lock is held.
    unsafe { bindings::dune_rcu_note() };
}

/// Tells Linux that an interrupt took the thread out of the guest, as one takes it out of user mode: a restartable sequence of
/// version 2 is aborted for such only.
pub(crate) fn note_rseq_interrupted(_: &super::cpu::IrqOff) {
    // SAFETY: Interrupts are off.
    unsafe { bindings::dune_rseq_note_irq() };
}

pub(crate) fn guest_timing_exit(_: &super::cpu::IrqOff) {
    // SAFETY: Interrupts are off.
    unsafe { bindings::dune_guest_timing_exit() };
}
