// SPDX-License-Identifier: MIT OR Apache-2.0

//! Running code on a stack of its own, such that an exception that nobody takes ends that code and not the process.
//!
//! # Life
//!
//! 1. [`run`] keeps on its caller's stack what belongs to the caller, and puts the address of that into the block.
//! 2. The code runs on the other stack. It may load another page table, in which the caller's stack is not mapped.
//! 3. It returns: back to the caller's stack.
//! 4. Or it causes an exception at CPL0, outside handlers and hooks, which no handler takes: [`leave`] notes which, loads
//!    the page table that [`Waiting::table`] names, and has the trap entry go on behind [`run`]. The other stack stays as it
//!    is: its frames are never left, and no destructor of them is run.
//!
//! # Safety
//!
//! Assembly. Stack at `rsp` of [`Waiting`], from there upwards: MXCSR and x87 control word, R15, R14, R13, R12, RBX, RBP,
//! return address. RBX: the address of `rsp`.

use core::arch::global_asm;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;

use super::frame::TrapFrame;
use super::frame::Vector;
use crate::cpl3::FLAGS_CPL0;
use crate::hook;
use crate::paging::switch;
use crate::percpu::Block;

/// Who waits for code that may end by an exception, and what it ended by. Of one thread, which alone uses it.
#[repr(C)]
pub(crate) struct Waiting {
    /// RSP of who waits; 0 if nobody does.
    rsp: AtomicU64,
    /// Number of the page table to go back to.
    table: AtomicU32,
    vector: AtomicU32,
    error_code: AtomicU64,
    address: AtomicU64,
    rip: AtomicU64,
}

/// An exception that ended something.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Escaped {
    pub vector: Vector,
    pub error_code: u64,
    /// CR2, for a page fault.
    pub address: u64,
    pub rip: u64,
}

impl Waiting {
    /// Whether anybody waits.
    pub fn is_active(&self) -> bool {
        self.rsp.load(Relaxed) != 0
    }
}

extern "C" {
    fn dune_escape_run(argument: *mut (), body: unsafe extern "C" fn(*mut ()), top: u64, rsp: *const AtomicU64) -> u64;
    fn dune_escape_out();
}

/// Calls `body` on the stack that ends at `top`. `table` is the page table that the thread has.
///
/// # Safety
///
/// The thread of `block` must be the calling one, at CPL0, with nobody waiting yet, and `top` the aligned end of a stack that nobody uses, mapped in
/// the loaded page table and in those that `body` loads. `body` must not unwind, and have the loaded page table be the one
/// from before when it returns. After an `Err` nothing may rely on its frames.
pub(crate) unsafe fn run(
    block: &Block,
    table: u16,
    top: u64,
    body: unsafe extern "C" fn(*mut ()),
    argument: *mut (),
) -> Result<(), Escaped> {
    let waiting = &block.waiting;
    waiting.table.store(table.into(), Relaxed);
    // Handlers whose scope is around it are not mapped for it; those that it opens go with its frames.
    let scope = block.scope.swap(core::ptr::null_mut(), Relaxed);
    super::forbid_plain(block);
    // SAFETY: The caller's.
    let escaped = unsafe { dune_escape_run(argument, body, top, &raw const waiting.rsp) } != 0;
    block.scope.store(scope, Relaxed);
    super::update_plain(block);
    if !escaped {
        return Ok(());
    }
    Err(Escaped {
        vector: Vector(waiting.vector.load(Relaxed) as u8),
        error_code: waiting.error_code.load(Relaxed),
        address: waiting.address.load(Relaxed),
        rip: waiting.rip.load(Relaxed),
    })
}

/// Has the frame of an exception that nobody took go on behind [`run`], if someone waits there.
pub(super) fn leave(frame: &mut TrapFrame, block: &Block) -> bool {
    let waiting = &block.waiting;
    let rsp = waiting.rsp.load(Relaxed);
    if rsp == 0 || frame.level() != 0 || frame.is_cpl3() || hook::is_inside(block) {
        return false;
    }
    waiting.vector.store(frame.vector().0.into(), Relaxed);
    waiting.error_code.store(frame.error_code, Relaxed);
    waiting.address.store(frame.cr2, Relaxed);
    waiting.rip.store(frame.rip, Relaxed);
    // SAFETY: At CPL0, on a handler stack, which every table maps; the table is the one that who waits had.
    unsafe {
        switch(
            block.process(),
            core::ptr::from_ref(block) as u64,
            &block.here,
            waiting.table.load(Relaxed) as u16,
        );
    }
    frame.rip = dune_escape_out as *const () as u64;
    frame.rsp = rsp;
    frame.rbx = &raw const waiting.rsp as u64;
    frame.rflags = FLAGS_CPL0;
    true
}

global_asm!(
    ".pushsection .text.dune_escape, \"ax\", @progbits",
    ".balign 16",
    ".hidden dune_escape_run",
    ".globl dune_escape_run",
    "dune_escape_run:",
    "push rbp",
    "push rbx",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "sub rsp, 8",
    "stmxcsr [rsp]",
    "fnstcw [rsp + 4]",
    "mov rbx, rcx",
    "mov [rbx], rsp",
    "mov rsp, rdx",
    "call rsi",
    "mov rsp, [rbx]",
    "xor eax, eax",
    "jmp 2f",
    // Registers are whatever they were at the exception, but for RSP and RBX.
    ".hidden dune_escape_out",
    ".globl dune_escape_out",
    "dune_escape_out:",
    "fninit",
    "mov eax, 1",
    "2:",
    "fldcw [rsp + 4]",
    "ldmxcsr [rsp]",
    "add rsp, 8",
    "mov qword ptr [rbx], 0",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbx",
    "pop rbp",
    "ret",
    ".popsection",
);
