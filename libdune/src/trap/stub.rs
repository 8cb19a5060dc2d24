// SPDX-License-Identifier: MIT OR Apache-2.0

//! The 256 entry points of the IDT, and the way off the IST stack and back.
//!
//! Page faults have an entry of their own, one with XSAVE and one without, for what collectors and the like live on: a
//! write at CPL0 to a page that is there, in the program's own code, no handler interrupted, with a handler for it. It does
//! nothing but build the frame and save the FPU state; all else goes the way of the other vectors.
//!
//! # Safety
//!
//! Assembly. Between `dune_trap_stubs` and `dune_trap_end` it touches only the block, which every page table maps; a
//! fault in there is found by `dispatch` and reported. It clobbers nothing: all registers and the whole FPU state
//! come back from the frame and the save area.

use core::arch::global_asm;
use core::mem::offset_of;

use super::dispatch::dune_trap_dispatch;
use super::dispatch::dune_trap_plain;
use super::dispatch::dune_trap_signalled;
use super::dispatch::Outcome;
use super::dispatch::LEVEL_DOUBLE_FAULT;
use super::dispatch::LEVEL_TOO_DEEP;
use super::dispatch::LEVEL_WINDOW;
use super::frame::pop_registers;
use super::frame::TrapFrame;
use super::frame::Vector;
use crate::abi::CALL_EXCEPTION;
use crate::abi::IOPL_CPL0;
use crate::cpl3;
use crate::cpl3::Slot;
use crate::hook;
use crate::layout;
use crate::percpu::Block;
use crate::percpu::SIGNAL_WAITS;

/// Error code of a write at CPL0 to a page that is there.
const PRESENT_WRITE: u32 = 3;
const PAGE_FAULT: u8 = Vector::PF.0;

/// Distance of the stubs.
pub(crate) const STUB_BYTES: u64 = 16;

extern "C" {
    fn dune_trap_stubs();
    fn dune_trap_handler_part();
    fn dune_trap_page_fault_fxsave();
    fn dune_trap_page_fault_fxsave_other_part();
    fn dune_trap_page_fault_fxsave_handler_part();
    fn dune_trap_page_fault_xsave();
    fn dune_trap_page_fault_xsave_other_part();
    fn dune_trap_page_fault_xsave_handler_part();
    fn dune_trap_end();
}

/// Addresses of the first stub and of the end of the assembly.
pub(crate) fn stubs() -> (u64, u64) {
    (dune_trap_stubs as *const () as u64, dune_trap_end as *const () as u64)
}

/// Entry point of page faults.
pub(crate) fn page_fault(has_xsave: bool) -> u64 {
    if has_xsave {
        dune_trap_page_fault_xsave as *const () as u64
    } else {
        dune_trap_page_fault_fxsave as *const () as u64
    }
}

/// Whether code at `rip` may still need what is on an interrupt stack.
pub(crate) fn is_entry(rip: u64) -> bool {
    [
        (dune_trap_stubs as *const (), dune_trap_handler_part as *const ()),
        (
            dune_trap_page_fault_fxsave_other_part as *const (),
            dune_trap_page_fault_fxsave_handler_part as *const (),
        ),
        (
            dune_trap_page_fault_xsave_other_part as *const (),
            dune_trap_page_fault_xsave_handler_part as *const (),
        ),
    ]
    .into_iter()
    .any(|(start, end)| (start as u64..end as u64).contains(&rip))
}

// The plain way looks at both with one OR.
const _: () = assert!(
    Outcome::Resume as u8 == 0 && SIGNAL_WAITS as u8 & Outcome::Unhandled as u8 == 0 && SIGNAL_WAITS as u8 != 0
);

global_asm!(
    ".pushsection .text.dune_trap, \"ax\", @progbits",
    ".balign 16",
    ".hidden dune_trap_stubs",
    ".globl dune_trap_stubs",
    "dune_trap_stubs:",
    ".set dune_vector, 0",
    ".rept 256",
    ".balign 16, 0xcc",
    // #DF #TS #NP #SS #GP #PF #AC #CP #VC #SX have an error code.
    ".if (dune_vector == 8) || ((dune_vector >= 10) && (dune_vector <= 14)) || (dune_vector == 17) \
        || (dune_vector == 21) || (dune_vector == 29) || (dune_vector == 30)",
    ".else",
    "push 0",
    ".endif",
    "push dune_vector",
    "jmp 20f",
    ".set dune_vector, dune_vector + 1",
    ".endr",
    ".balign 16, 0xcc",
    // On the IST stack: vector, error code, RIP, CS, RFLAGS, RSP, SS. CR2 is read before anything else can fault.
    "20:",
    "push rax",
    "push rbx",
    "push rcx",
    "push rdx",
    "push rdi",
    "mov rax, cr2",
    "cld",
    "mov rdx, rsp",
    "mov rbx, rsp",
    "and rbx, -{block}",
    // RDX: what is on the IST stack: rdi 0, rdx 8, rcx 16, rbx 24, rax 32, vector 40, error 48, rip 56, cs 64,
    // rflags 72, rsp 80, ss 88.
    "cmp dword ptr [rdx + 40], 8",
    "je 24f",
    "cmp dword ptr [rdx + 40], 1",
    "je 35f",
    "36:",
    "xor ecx, ecx",
    "test byte ptr [rdx + 64], 3",
    "jnz 33f",
    "mov rdi, [rdx + 80]",
    "sub rdi, rbx",
    "cmp rdi, {block}",
    "jae 21f",
    "sub rdi, {handlers}",
    "jb 38f",
    "shr rdi, {handler_shift}",
    "lea ecx, [rdi + 1]",
    "cmp ecx, {levels}",
    "jae 22f",
    "21:",
    "lea rdi, [rcx + 1]",
    "shl rdi, {handler_shift}",
    "lea rdi, [rdi + rbx + {handlers}]",
    "jmp 25f",
    // #DB behind a SYSCALL of CPL3 that had TF set, where the CPU raises one although FMASK cleared it: RSP is CPL3's still.
    "35:",
    "lea rcx, [rip + dune_syscall_stubs]",
    "mov rdi, [rdx + 56]",
    "sub rdi, rcx",
    "cmp rdi, {syscall_stubs}",
    "jae 36b",
    "test r11d, {iopl}",
    "jnz 36b",
    "pop rdi",
    "pop rdx",
    "pop rcx",
    "pop rbx",
    "pop rax",
    "add rsp, 16",
    "iretq",
    // From CPL3: to who waits for it, if someone does.
    "33:",
    "mov rcx, [rbx + {slot}]",
    "mov rcx, [rcx + {slot_rsp}]",
    "mov rdi, [rcx]",
    "test rdi, rdi",
    "jnz dune_user_trapped",
    "xor ecx, ecx",
    "jmp 21b",
    "22:",
    "mov ecx, {too_deep}",
    "jmp 26f",
    // In a hook: the level is that of who made the call.
    "38:",
    "add rdi, {handlers} - {hook_stack}",
    "cmp rdi, {hook_bytes}",
    "jae 23f",
    "mov rdi, [rbx + {slot}]",
    "mov rdi, [rdi + {slot_caller}]",
    "sub rdi, rbx",
    "cmp rdi, {block}",
    "jae 21b",
    "sub rdi, {handlers}",
    "jb 23f",
    "shr rdi, {handler_shift}",
    "lea ecx, [rdi + 1]",
    "cmp ecx, {levels}",
    "jb 21b",
    "jmp 22b",
    "23:",
    "mov ecx, {window}",
    "jmp 26f",
    "24:",
    "mov ecx, {double_fault}",
    "26:",
    "lea rdi, [rbx + {report}]",
    // RDI: top of the new stack, RCX: level. The FPU state lies at the top, above the frame.
    "25:",
    "sub rdi, [rbx + {fpu_bytes}]",
    "mov rsp, rdi",
    "push qword ptr [rdx + 88]",
    "push qword ptr [rdx + 80]",
    "push qword ptr [rdx + 72]",
    "push qword ptr [rdx + 64]",
    "push qword ptr [rdx + 56]",
    "push qword ptr [rdx + 48]",
    "push qword ptr [rdx + 40]",
    "push qword ptr [rdx + 32]",
    "push qword ptr [rdx + 16]",
    "push qword ptr [rdx + 8]",
    "push qword ptr [rdx + 24]",
    "push rbp",
    "push rsi",
    "push qword ptr [rdx]",
    "push r8",
    "push r9",
    "push r10",
    "push r11",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "push rax",
    "push rcx",
    // The IST stack is free from here on. Compiled code at CPL0 needs its IOPL for SYSCALL.
    "test byte ptr [rdx + 64], 3",
    "jz 27f",
    "pushfq",
    "or dword ptr [rsp], {iopl}",
    "popfq",
    "27:",
    "cmp qword ptr [rbx + {has_xsave}], 0",
    "je 28f",
    // XRSTOR wants what XSAVE does not write of the header to be zero: nothing else is ever written there.
    "mov eax, -1",
    "mov edx, eax",
    "xsave64 [rsp + {frame_bytes}]",
    "jmp 29f",
    "28:",
    "fxsave64 [rsp + {frame_bytes}]",
    "29:",
    ".hidden dune_trap_handler_part",
    ".globl dune_trap_handler_part",
    "dune_trap_handler_part:",
    "mov rdi, rsp",
    "mov rsi, rbx",
    "call {dispatch}",
    // EAX: 0, or the number of a private call; RSP: the frame.
    "37:",
    "mov r12d, eax",
    "cmp qword ptr [rbx + {has_xsave}], 0",
    "je 30f",
    "mov eax, -1",
    "mov edx, eax",
    "xrstor64 [rsp + {frame_bytes}]",
    "jmp 31f",
    "30:",
    "fxrstor64 [rsp + {frame_bytes}]",
    "31:",
    "test r12d, r12d",
    "jnz 32f",
    "add rsp, 16",
    pop_registers!(),
    "add rsp, 16",
    "iretq",
    // A private VMCALL that does not come back; RDI: the frame.
    "32:",
    "mov eax, r12d",
    "mov rdi, rsp",
    "vmcall",
    "ud2",
    // A plain page fault. On the IST stack: rbx 0, rax 8, error 16, rip 24, cs 32, rflags 40, rsp 48, ss 56.
    ".macro dune_page_fault name, save, load, all",
    ".hidden \\name\\()_other_part",
    ".globl \\name\\()_other_part",
    "\\name\\()_other_part:",
    // Not plain: in front of the entry, so that it belongs to what needs the IST stack.
    "62:",
    "pop rbx",
    "pop rax",
    "push {page_fault}",
    "jmp 20b",
    ".balign 16, 0xcc",
    ".hidden \\name",
    ".globl \\name",
    "\\name:",
    "push rax",
    "push rbx",
    "mov rbx, rsp",
    "and rbx, -{block}",
    "cmp dword ptr [rsp + 16], {present_write}",
    "jne 62b",
    "mov rax, [rsp + 48]",
    "sub rax, rbx",
    "cmp rax, {block}",
    "jb 62b",
    "mov rax, [rsp + 24]",
    "sub rax, [rbx + {inner_start}]",
    "cmp rax, [rbx + {inner_last}]",
    "jbe 62b",
    "mov rax, rsp",
    "mov rsp, [rbx + {first_top}]",
    "push qword ptr [rax + 56]",
    "push qword ptr [rax + 48]",
    "push qword ptr [rax + 40]",
    "push qword ptr [rax + 32]",
    "push qword ptr [rax + 24]",
    "push {present_write}",
    "push {page_fault}",
    "push qword ptr [rax + 8]",
    "push rcx",
    "push rdx",
    "push qword ptr [rax]",
    "push rbp",
    "push rsi",
    "push rdi",
    "push r8",
    "push r9",
    "push r10",
    "push r11",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov rax, cr2",
    "push rax",
    "push 0",
    "cld",
    ".if \\all",
    "mov eax, -1",
    "mov edx, eax",
    ".endif",
    "\\save [rsp + {frame_bytes}]",
    "mov rdi, rsp",
    "mov rsi, rbx",
    ".hidden \\name\\()_handler_part",
    ".globl \\name\\()_handler_part",
    "\\name\\()_handler_part:",
    "call {handler}",
    "or al, [rbx + {signal}]",
    "jnz 63f",
    "test byte ptr [rsp + {cs}], 3",
    "jnz 65f",
    "66:",
    ".if \\all",
    "mov eax, -1",
    "mov edx, eax",
    ".endif",
    "\\load [rsp + {frame_bytes}]",
    "add rsp, 16",
    pop_registers!(),
    "add rsp, 16",
    "iretq",
    ".endm",
    // Its other ways, off the IST stack: not the handler's; a signal waits; the handler goes on at CPL3, as IOPL 0 tells.
    ".macro dune_page_fault_else",
    "63:",
    "test al, {unhandled}",
    "jz 64f",
    "mov eax, {exception}",
    "jmp 37b",
    "64:",
    "test byte ptr [rsp + {cs}], 3",
    "jz 67f",
    "and qword ptr [rsp + {rflags}], {not_iopl}",
    "67:",
    "mov rdi, rsp",
    "mov rsi, rbx",
    "call {signalled}",
    "jmp 37b",
    "65:",
    "and qword ptr [rsp + {rflags}], {not_iopl}",
    "jmp 66b",
    ".endm",
    "dune_page_fault dune_trap_page_fault_fxsave, fxsave64, fxrstor64, 0",
    "dune_page_fault_else",
    "dune_page_fault dune_trap_page_fault_xsave, xsave64, xrstor64, 1",
    "dune_page_fault_else",
    ".hidden dune_trap_end",
    ".globl dune_trap_end",
    "dune_trap_end:",
    ".popsection",
    block = const layout::AREA_BYTES,
    handlers = const layout::HANDLERS,
    handler_shift = const layout::HANDLER_SHIFT,
    levels = const layout::LEVELS,
    report = const layout::REPORT_TOP,
    too_deep = const LEVEL_TOO_DEEP,
    window = const LEVEL_WINDOW,
    double_fault = const LEVEL_DOUBLE_FAULT,
    iopl = const IOPL_CPL0,
    not_iopl = const !(IOPL_CPL0 as i32),
    cs = const offset_of!(TrapFrame, cs),
    rflags = const offset_of!(TrapFrame, rflags),
    syscall_stubs = const cpl3::SYSCALL_STUBS_BYTES,
    slot = const offset_of!(Block, user_slot),
    slot_caller = const offset_of!(Slot, hook) + offset_of!(hook::Frame, caller_rsp),
    hook_stack = const layout::HOOK_STACK,
    hook_bytes = const layout::HOOK_TOP - layout::HOOK_STACK,
    slot_rsp = const offset_of!(Slot, rsp),
    fpu_bytes = const offset_of!(Block, fpu_bytes),
    has_xsave = const offset_of!(Block, has_xsave),
    frame_bytes = const size_of::<TrapFrame>(),
    first_top = const offset_of!(Block, first_top),
    inner_start = const offset_of!(Block, inner_start),
    inner_last = const offset_of!(Block, inner_last),
    signal = const offset_of!(Block, signal),
    present_write = const PRESENT_WRITE,
    page_fault = const PAGE_FAULT,
    unhandled = const Outcome::Unhandled as u8,
    exception = const CALL_EXCEPTION,
    dispatch = sym dune_trap_dispatch,
    handler = sym dune_trap_plain,
    signalled = sym dune_trap_signalled,
);
