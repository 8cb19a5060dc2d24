// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the host loop knows: lives in the arena, found by RBP.

use core::sync::atomic::AtomicU32;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;

use dune_abi::Gprs;
use dune_abi::RunPage;
use dune_abi::Sregs;
use dune_abi::DUNE_RUN;

use super::signal;
use super::upcall::Pending;
use crate::dispatch::Settings;
use crate::layout;
use crate::percpu::Block;
use crate::process::Process;
use crate::sys;
use crate::sys::Actions;
use crate::sys::AltStack;
use crate::trap::TrapFrame;

/// Registers to go on with outside Dune mode, in the order in which they are popped.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Registers {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub rdx: u64,
    pub rcx: u64,
    pub rax: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

/// Bytes of [`Registers`] on a stack.
pub(crate) const REGISTERS_BYTES: u64 = size_of::<Registers>() as u64;

/// Linux' selectors for 64-bit user space.
const USER_CS: u64 = 0x33;
const USER_DS: u64 = 0x2b;

/// RFLAGS bits that user space has: no IOPL, VM, RF, NT.
const USER_RFLAGS: u64 = 0x0024_0fd5 & !0x3000 | 2;

impl Registers {
    /// The general registers of the run page, at a place in the program.
    pub fn new(gprs: &dune_abi::Gprs, rip: u64, rsp: u64, rflags: u64) -> Self {
        Self {
            r15: gprs.r15,
            r14: gprs.r14,
            r13: gprs.r13,
            r12: gprs.r12,
            r11: gprs.r11,
            r10: gprs.r10,
            r9: gprs.r9,
            r8: gprs.r8,
            rdi: gprs.rdi,
            rsi: gprs.rsi,
            rbp: gprs.rbp,
            rbx: gprs.rbx,
            rdx: gprs.rdx,
            rcx: gprs.rcx,
            rax: gprs.rax,
            rip,
            cs: USER_CS,
            rflags: rflags & USER_RFLAGS | 0x202,
            rsp,
            ss: USER_DS,
        }
    }

    /// The registers of an exception.
    pub fn of_frame(frame: &TrapFrame) -> Self {
        Self {
            r15: frame.r15,
            r14: frame.r14,
            r13: frame.r13,
            r12: frame.r12,
            r11: frame.r11,
            r10: frame.r10,
            r9: frame.r9,
            r8: frame.r8,
            rdi: frame.rdi,
            rsi: frame.rsi,
            rbp: frame.rbp,
            rbx: frame.rbx,
            rdx: frame.rdx,
            rcx: frame.rcx,
            rax: frame.rax,
            rip: frame.rip,
            cs: USER_CS,
            rflags: frame.rflags & USER_RFLAGS | 0x202,
            rsp: frame.rsp,
            ss: USER_DS,
        }
    }
}

/// What was touched last, to find a vCPU that does not get on.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Touched {
    pub rip: u64,
    pub hva: u64,
    pub access: u32,
}

/// What a Dune thread is to the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Role {
    /// A thread of the process, or the first of a child of fork.
    Thread = 0,
    /// A process of its own that shares the memory (clone with CLONE_VM).
    SharesMemory = 1,
    /// The same, with its maker waiting for it (vfork, posix_spawn): the maker cleans up.
    Vfork = 2,
}

/// How a thread ends: what it runs on is given back, and nothing needs a stack from then on.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct End {
    /// exit or exit_group, and its argument.
    pub number: u64,
    pub status: u64,
    /// munmap or madvise, and its arguments.
    pub release: u64,
    pub start: u64,
    pub bytes: u64,
    pub advice: u64,
    /// The word of the area's mark, and what it is ANDed with; null if there is no area any more.
    pub mark: *const AtomicU64,
    pub mask: u64,
}

/// A vCPU's state: what a run page says of it, without the page.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct State {
    pub gprs: Gprs,
    pub rip: u64,
    pub rflags: u64,
    pub cr2: u64,
    pub sregs: Sregs,
}

impl State {
    /// What the page says now.
    ///
    /// # Safety
    ///
    /// The page must be alive, and RUN not under way.
    pub unsafe fn read(run: *const RunPage) -> Self {
        // SAFETY: The caller's.
        unsafe {
            Self {
                gprs: (&raw const (*run).gprs).read_volatile(),
                rip: (&raw const (*run).rip).read_volatile(),
                rflags: (&raw const (*run).rflags).read_volatile(),
                cr2: (&raw const (*run).cr2).read_volatile(),
                sregs: (&raw const (*run).sregs).read_volatile(),
            }
        }
    }
}

/// State of the host loop of one Dune thread. Lives in its area, at `layout::HOST`.
#[repr(C)]
pub(crate) struct HostContext {
    pub run: *mut RunPage,
    pub block: *const Block,
    pub process: *const Process,
    /// Top of the host stack.
    pub stack_top: u64,
    pub fd: u64,
    pub vcpu: u64,
    /// How RUN is called: ioctl, or read once the thread may have a seccomp filter.
    pub run_call: u64,
    pub run_arguments: [u64; 2],
    /// Seccomp's strict mode may be on.
    pub is_strict: bool,
    /// 1: XSAVE, 0: FXSAVE.
    pub has_xsave: u64,
    /// Where the slow path saves the FPU state; aligned to 64.
    pub fpu: u64,
    /// Number and arguments of a call that assembly makes: RAX, RDI, RSI, RDX, R10, R8, R9.
    pub call: [u64; 7],
    pub end: End,
    /// What to go on with outside Dune mode, or in a child.
    pub registers: Registers,
    /// Copy of a `struct clone_args`.
    pub clone_args: [u64; 32],
    /// The flags of the clone that is under way.
    pub clone_flags: u64,
    /// Context of the child that is being made, if it shares the memory.
    pub child: *mut HostContext,
    /// Signal mask of the program, and of the child, while a child is being made with all signals blocked.
    pub mask: Option<u64>,
    pub tid: u32,
    pub role: Role,
    /// The vCPU is gone.
    pub left: bool,
    /// The program's actions: the process', or `own_actions`.
    pub actions: *const Actions,
    /// Where the thread does not share them.
    pub own_actions: Actions,
    /// A signal on its way to the program's handler.
    pub pending: Pending,
    /// The program's alternate signal stack.
    pub alt_stack: AltStack,
    pub touched: Touched,
    pub touched_entries: u64,
    pub touched_times: u32,
    /// Nonzero: a signal came since the slow path looked for one. The call that it decides to make must not wait.
    pub late: AtomicU32,
    /// Nonzero: the system call of this number needs the slow path. The process' or, with dispatch on, all.
    pub table: *const u8,
    /// The program's syscall user dispatch.
    pub dispatch: Settings,
}

const _: () = assert!(size_of::<HostContext>() <= layout::SNAPSHOT - layout::HOST);

/// A byte of libdune's static data.
static ANCHOR: u8 = 1;

impl HostContext {
    /// Writes the context of a fresh area, for a thread whose vCPU is yet to be made.
    ///
    /// # Safety
    ///
    /// `area` must be a fresh area of `process` with its block in place.
    pub unsafe fn write(area: u64, process: *const Process) -> *mut Self {
        let context = (area + layout::HOST as u64) as *mut Self;
        // SAFETY: The area's zeroed memory is a valid context, but for what is written here.
        unsafe {
            let shared = &*process;
            (*context).block = area as *const Block;
            (*context).process = process;
            (*context).stack_top = area + layout::HOST_STACK_TOP as u64;
            (*context).fd = shared.fd as u64;
            (*context).has_xsave = shared.fpu.has_xsave.into();
            (*context).fpu = area + layout::FPU as u64;
            (*context).actions = &raw const signal::ACTIONS;
            (*context).alt_stack = AltStack::DISABLED;
            (*context).late = AtomicU32::new(0);
            (*context).set_dispatch(Settings::OFF);
        }
        context
    }

    /// What the Dune threads of this process share.
    pub fn process<'a>(&self) -> &'a Process {
        // SAFETY: The thread of this context is counted in it.
        unsafe { &*self.process }
    }

    /// The program's actions for signals, as this thread has them.
    pub fn actions(&self) -> &Actions {
        // SAFETY: A static or our own.
        unsafe { &*self.actions }
    }

    pub fn set_vcpu(&mut self, vcpu: u32) {
        self.vcpu = vcpu.into();
        self.choose_run_call();
    }

    /// Whether the thread was asked to come for a signal when it can.
    pub fn is_asked(&self) -> bool {
        // SAFETY: The block lives as long as the context.
        unsafe { (*self.block).signal.load(Relaxed) != 0 }
    }

    /// RUN goes as all requests of the device go.
    pub fn choose_run_call(&mut self) {
        let (call, arguments) = sys::request_call(DUNE_RUN, self.vcpu);
        self.run_call = call as u64;
        self.run_arguments = arguments;
    }

    /// Start of the area that this lies in.
    pub fn area(&self) -> u64 {
        self.block as u64
    }

    /// Registers of a child that is being made.
    pub fn snapshot(&self) -> *mut State {
        (self.area() + layout::SNAPSHOT as u64) as *mut State
    }

    /// Address in libdune's static data, which lies beside its other data.
    pub fn anchor() -> *const () {
        (&raw const ANCHOR).cast()
    }
}

#[cfg(test)]
mod tests {
    use core::mem::offset_of;

    use dune_abi::read_size;
    use dune_abi::Counters;
    use dune_abi::RunPage;
    use dune_abi::DUNE_SYNC;

    use super::HostContext;
    use crate::layout;

    /// gdb/dune.py cannot ask the compiler.
    #[test]
    fn the_script_for_gdb_knows_the_layout() {
        let script = include_str!("../../gdb/dune.py");
        for (name, value) in [
            ("AREA_BYTES", layout::AREA_BYTES),
            ("HOST", layout::HOST),
            ("HOST_STACK_TOP", layout::HOST_STACK_TOP),
            ("CONTEXT_RUN", offset_of!(HostContext, run)),
            ("CONTEXT_BLOCK", offset_of!(HostContext, block)),
            ("CONTEXT_STACK_TOP", offset_of!(HostContext, stack_top)),
            ("CONTEXT_FD", offset_of!(HostContext, fd)),
            ("CONTEXT_VCPU", offset_of!(HostContext, vcpu)),
            ("RUN_RIP", offset_of!(RunPage, rip)),
            ("RUN_RFLAGS", offset_of!(RunPage, rflags)),
            (
                "RUN_ENTRIES",
                offset_of!(RunPage, counters) + offset_of!(Counters, entries),
            ),
            ("SYNC_BY_READ", read_size(DUNE_SYNC) as usize),
        ] {
            let line = |line: &str| line == format!("{name} = {value}") || line == format!("{name} = {value:#x}");
            assert!(script.lines().any(line), "{name} is {value} = {value:#x}");
        }
    }
}
