// SPDX-License-Identifier: MIT OR Apache-2.0

//! CPL3 inside Dune mode, below its API (`user`): SYSCALL's entry points, the way in and the way out.
//!
//! # Safety
//!
//! What CPL3 left in the registers is data here, never an address that is followed. The places in the assembly at which
//! the segment bases, the extended state or RSP are CPL3's while CPL0 runs are known ([`Place`]): no handler of the program
//! is started there.

mod asm;
mod copy;
mod syscall;

use core::arch::asm;
use core::mem::offset_of;
use core::sync::atomic::Ordering::Relaxed;

use crate::abi::IOPL_CPL0;
use crate::host_loop::State;
use crate::percpu;
use crate::percpu::Block;

pub(crate) use asm::Ways;
pub(crate) use copy::copy;
pub(crate) use copy::recovery;
pub(crate) use syscall::entry;
pub(crate) use syscall::is_hooked_stub;
pub(crate) use syscall::slot;
pub(crate) use syscall::slots;
pub(crate) use syscall::Slot;
pub(crate) use syscall::STUBS_BYTES as SYSCALL_STUBS_BYTES;

/// Registers of code at CPL3.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // Each name is the SDM's.
pub struct UserRegisters {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rbp: u64,
    pub rsp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
    pub fs_base: u64,
    pub gs_base: u64,
}

/// What assembly loads CPL3 from, and stores it to.
#[repr(C)]
pub(crate) struct Frame {
    pub registers: UserRegisters,
    /// Selector of the code segment: 64-bit or 32-bit.
    pub cs: u64,
    /// A vector, or `EVENT_*`.
    pub event: u64,
    pub error_code: u64,
    pub cr2: u64,
    /// Extended state of CPL3; XSAVE's standard form, aligned to 64.
    pub fpu: *mut u8,
    /// What of CPL0's must survive.
    pub host_fpu: *mut u8,
}

/// [`Frame::event`]: SYSCALL.
pub(crate) const EVENT_SYSCALL: u32 = 256;
/// [`Frame::event`]: the host loop wants CPL0 to run.
pub(crate) const EVENT_INTERRUPTED: u32 = 257;

/// RFLAGS with which CPL0 begins: IF, IOPL 3, and nothing of CPL3's.
pub(crate) const FLAGS_CPL0: u64 = 0x202 | IOPL_CPL0;

/// Words at the slot's RSP while nobody is at CPL3: no frame. The first is scratch, the last the slot.
pub(crate) type Idle = [u64; 3];

/// Runs CPL3 from the frame until something comes back, and fills it in.
///
/// # Safety
///
/// At CPL0, in a handler's or the program's own code. `block` is the calling thread's. RIP, FS and GS base of the frame are
/// canonical, RFLAGS and CS such as CPL3 may have, the extended state such as XRSTOR takes. Frame and states stay where they
/// are, mapped and writable in the loaded page table.
pub(crate) unsafe fn enter(frame: *mut Frame, block: *const Block) {
    // SAFETY: The caller's. The routine keeps RBX, RBP and RSP.
    unsafe {
        asm!(
            "call qword ptr [rsi + {enter}]",
            enter = const offset_of!(Block, user_ways),
            inout("rdi") frame => _,
            inout("rsi") block => _,
            out("r12") _,
            out("r13") _,
            out("r14") _,
            out("r15") _,
            clobber_abi("sysv64"),
        );
    }
}

/// Where a vCPU is, seen by who wants to interrupt it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the program or libdune, with the program's segment bases.
    Program,
    /// At CPL3, or on the way in: [`interrupt`] makes it come out.
    User,
    /// On the way out: it looks at `Block::signal` in a moment.
    WayOut,
    /// At CPL3, or called from there, with nobody who waits: registers, stack and segment bases are of CPL3's choice.
    Unwaited,
}

/// See [`Place`]. `block` is the vCPU's.
pub(crate) fn place(state: &State, block: &Block) -> Place {
    let is_cpl3 = state.sregs.cs.selector & 3 != 0;
    let is_called_by_cpl3 = is_called_by_cpl3(state.rip, state.gprs.r11);
    if waiting(block).is_none() {
        if is_cpl3 || is_called_by_cpl3 || asm::is_unwaited(state.rip) {
            Place::Unwaited
        } else {
            Place::Program
        }
    } else if is_cpl3 || asm::is_way_in(state.rip) {
        Place::User
    } else if asm::is_way_out(state.rip) || is_called_by_cpl3 {
        Place::WayOut
    } else {
        Place::Program
    }
}

/// Whether CPL0 at `rip` has registers that are not the program's. `r11` tells who called, in a stub.
pub(crate) fn is_crossing(rip: u64, r11: u64) -> bool {
    asm::is_way_in(rip) || asm::is_way_out(rip) || is_called_by_cpl3(rip, r11)
}

/// Start and end of all code that [`is_crossing`] and [`recovery`] may be about.
pub(crate) fn code() -> (u64, u64) {
    [asm::code(), copy::code(), syscall::code()]
        .into_iter()
        .fold((u64::MAX, 0), |all, code| (all.0.min(code.0), all.1.max(code.1)))
}

fn is_called_by_cpl3(rip: u64, r11: u64) -> bool {
    syscall::is_stub(rip) && r11 & IOPL_CPL0 == 0
}

/// The slot's RSP while the thread is in [`enter`].
fn waiting(block: &Block) -> Option<u64> {
    let rsp = block.slot().rsp.load(Relaxed);
    (rsp != idle_rsp(block)).then_some(rsp)
}

/// The slot's RSP while nobody waits for CPL3.
pub(crate) fn idle_rsp(block: &Block) -> u64 {
    &raw const block.user_idle[1] as u64
}

/// What the host loop leaves in the block for the way out to put into the frame, which may be elsewhere in the process
/// than at the address of the same number: only the page table that the vCPU has tells, and a write may have to copy the page.
#[repr(C)]
#[derive(Debug, Default)]
pub(crate) struct Taken {
    /// RAX to RFLAGS; the segment bases follow on the way out.
    registers: UserRegisters,
    cs: u64,
}

/// Changes the state of a vCPU at [`Place::User`] so that it comes out with [`EVENT_INTERRUPTED`].
///
/// # Safety
///
/// `block` is that of the vCPU, which does not run.
pub(crate) unsafe fn interrupt(state: &mut State, block: &Block) {
    let Some(rsp) = waiting(block) else {
        return;
    };
    let rip = core::mem::replace(&mut state.rip, asm::aborted());
    if state.sregs.cs.selector & 3 != 0 {
        let g = &state.gprs;
        let taken = Taken {
            registers: UserRegisters {
                rax: g.rax,
                rbx: g.rbx,
                rcx: g.rcx,
                rdx: g.rdx,
                rsi: g.rsi,
                rdi: g.rdi,
                rbp: g.rbp,
                rsp: g.rsp,
                r8: g.r8,
                r9: g.r9,
                r10: g.r10,
                r11: g.r11,
                r12: g.r12,
                r13: g.r13,
                r14: g.r14,
                r15: g.r15,
                rip,
                rflags: state.rflags,
                ..Default::default()
            },
            cs: state.sregs.cs.selector.into(),
        };
        // SAFETY: Nobody else uses it: the way out has begun before the vCPU is at CPL3 again.
        unsafe { block.user_taken.get().write(taken) };
        state.rip = asm::taken();
    }
    state.rflags = FLAGS_CPL0;
    state.gprs.rsp = rsp;
    state.gprs.rbx = core::ptr::from_ref(block) as u64;
    state.sregs = percpu::at_cpl0(state.sregs);
}
