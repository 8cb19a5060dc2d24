// SPDX-License-Identifier: MIT OR Apache-2.0

//! The loop itself, the way into it and the ways out.
//!
//! # Safety
//!
//! Assembly. RBX: run page, RBP: `HostContext`, R12D: exit kind (set by the module), R13D: fd, R14: vCPU, R15: special
//! table. All are callee-saved, so Rust called from here keeps them; the slow path may change what they stand for.

use core::arch::global_asm;
use core::mem::offset_of;
use core::ops::Range;

use dune_abi::Gprs;
use dune_abi::RunPage;

use super::context::End;
use super::context::HostContext;
use super::context::Registers;
use super::slow::dune_host_slow;
use super::slow::Action;
use super::slow::CLONED;
use super::slow::IS_CHILD;
use super::slow::SIGNALLED;
use crate::abi::CALL_LEAVE;
use crate::abi::IOPL_CPL0;
use crate::layout;
use crate::trap::pop_registers;

// The context is for our own assembly, which reads it by the offsets of its fields.
#[allow(improper_ctypes)]
extern "C" {
    /// Starts the vCPU behind this call. Returns 0 at CPL0, or outside Dune mode what the first RUN failed with.
    #[link_name = "dune_enter_guest"]
    pub(crate) fn enter_guest(context: *mut HostContext) -> i64;
    /// Leaves Dune mode; returns outside of it.
    #[link_name = "dune_leave_guest"]
    pub(crate) fn leave_guest();

    fn dune_run_behind();
    fn dune_forward_syscall();
    fn dune_forward_behind();
    fn dune_signalled();
    fn dune_decided();
    fn dune_decided_end();
}

/// Where RUN comes back.
pub(super) fn run_behind() -> u64 {
    dune_run_behind as *const () as u64
}

/// The instruction that makes the program's system call.
pub(super) fn forward_syscall() -> u64 {
    dune_forward_syscall as *const () as u64
}

/// The instruction behind it.
pub(crate) fn forward_behind() -> u64 {
    dune_forward_behind as *const () as u64
}

/// Where to go on instead of making it, when a signal came.
pub(super) fn signalled() -> u64 {
    dune_signalled as *const () as u64
}

/// From the look for a signal that came while the slow path decided to make a call, to the jump to that call.
pub(super) fn decided() -> Range<u64> {
    dune_decided as *const () as u64..dune_decided_end as *const () as u64
}

const END: usize = offset_of!(HostContext, end);

global_asm!(
    ".pushsection .text.dune_host, \"ax\", @progbits",
    ".balign 16",
    ".hidden dune_enter_guest",
    ".globl dune_enter_guest",
    "dune_enter_guest:",
    "mov rax, [rdi + {run}]",
    "mov [rax + {rbx}], rbx",
    "mov [rax + {rbp}], rbp",
    "mov [rax + {r12}], r12",
    "mov [rax + {r13}], r13",
    "mov [rax + {r14}], r14",
    "mov [rax + {r15}], r15",
    "lea rcx, [rsp + 8]",
    "mov [rax + {rsp}], rcx",
    "mov rcx, [rsp]",
    "mov [rax + {rip}], rcx",
    "pushfq",
    "pop rcx",
    "or rcx, {iopl}",
    "mov [rax + {rflags}], rcx",
    "mov qword ptr [rax + {rax}], 0",
    "mov rbp, rdi",
    "mov rsp, [rbp + {stack_top}]",
    "19:",
    "mov rbx, [rbp + {run}]",
    "mov r13d, [rbp + {fd}]",
    "mov r15, [rbp + {table}]",
    // Falls through.
    ".balign 16",
    "20:",
    "mov r12d, -1",
    "mov eax, [rbp + {run_call}]",
    "mov edi, r13d",
    "mov rsi, [rbp + {run_arguments}]",
    "mov rdx, [rbp + {run_arguments} + 8]",
    ".globl dune_run_syscall",
    "dune_run_syscall:",
    "syscall",
    ".globl dune_run_behind",
    "dune_run_behind:",
    "test r12d, r12d",
    "jnz 21f",
    "cmp rax, 512",
    "jae 21f",
    "cmp byte ptr [r15 + rax], 0",
    "jne 21f",
    ".globl dune_forward_syscall",
    "dune_forward_syscall:",
    "syscall",
    ".globl dune_forward_behind",
    "dune_forward_behind:",
    "mov [rbx + {rax}], rax",
    "jmp 20b",
    ".hidden dune_signalled",
    ".globl dune_signalled",
    "dune_signalled:",
    "mov r12d, {signalled}",
    // The slow path: Rust, with the guest's FPU state saved around it.
    "21:",
    "mov rsi, rax",
    "mov rcx, [rbp + {fpu}]",
    "cmp qword ptr [rbp + {has_xsave}], 0",
    "je 22f",
    "mov rax, -1",
    "mov rdx, rax",
    "xsave64 [rcx]",
    "jmp 23f",
    "22:",
    "fxsave64 [rcx]",
    "23:",
    "cld",
    "mov rdi, rbp",
    "mov edx, r12d",
    "call {slow}",
    "mov r12d, eax",
    "mov rcx, [rbp + {fpu}]",
    "cmp qword ptr [rbp + {has_xsave}], 0",
    "je 24f",
    "mov rax, -1",
    "mov rdx, rax",
    "xrstor64 [rcx]",
    "jmp 25f",
    "24:",
    "fxrstor64 [rcx]",
    "25:",
    "cmp r12d, {action_run}",
    "je 19b",
    "cmp r12d, {action_forward}",
    "jne 26f",
    ".hidden dune_decided",
    ".globl dune_decided",
    "dune_decided:",
    "cmp dword ptr [rbp + {late}], 0",
    "jne dune_signalled",
    "mov eax, [rbx + {rax}]",
    "mov rdi, [rbx + {rdi}]",
    "mov rsi, [rbx + {rsi}]",
    "mov rdx, [rbx + {rdx}]",
    "mov r10, [rbx + {r10}]",
    "mov r8, [rbx + {r8}]",
    "mov r9, [rbx + {r9}]",
    "jmp dune_forward_syscall",
    ".hidden dune_decided_end",
    ".globl dune_decided_end",
    "dune_decided_end:",
    "26:",
    "cmp r12d, {action_clone}",
    "je 30f",
    "cmp r12d, {action_end}",
    "jne 29f",
    // The thread ends. Its stack goes first, so signals are blocked and nothing is pushed from here on.
    "mov rdi, [rbp + {end_start}]",
    "mov rsi, [rbp + {end_bytes}]",
    "mov rdx, [rbp + {end_advice}]",
    "mov rax, [rbp + {end_release}]",
    "mov r12, [rbp + {end_number}]",
    "mov r13, [rbp + {end_status}]",
    "mov r14, [rbp + {end_mark}]",
    "mov r15, [rbp + {end_mask}]",
    "syscall",
    "test r14, r14",
    "jz 31f",
    "lock and [r14], r15",
    "31:",
    "mov rdi, r13",
    "mov rax, r12",
    "syscall",
    "ud2",
    // A call that comes back twice, in Dune mode. The child has the stack that the call names, or a copy of this one:
    // either way the context is found from RSP.
    "30:",
    "mov rax, [rbp + {call}]",
    "mov rdi, [rbp + {call} + 8]",
    "mov rsi, [rbp + {call} + 16]",
    "mov rdx, [rbp + {call} + 24]",
    "mov r10, [rbp + {call} + 32]",
    "mov r8, [rbp + {call} + 40]",
    "mov r9, [rbp + {call} + 48]",
    "syscall",
    "mov rbp, rsp",
    "and rbp, -{area_bytes}",
    "mov rsp, [rbp + {host} + {stack_top}]",
    "lea rbp, [rbp + {host}]",
    "mov r12d, {cloned}",
    "test rax, rax",
    "jnz 21b",
    "mov r12d, {is_child}",
    "jmp 21b",
    // Registers go to the host stack: a signal may come in the middle.
    "29:",
    "sub rsp, {registers_bytes}",
    "lea rsi, [rbp + {registers}]",
    "mov rdi, rsp",
    "mov ecx, {registers_bytes} / 8",
    "rep movsq",
    "cmp r12d, {action_native}",
    "je 27f",
    // A call that comes back twice, the child outside Dune mode. Its RSP points to its Registers: here, or on its own
    // stack.
    "mov rax, [rbp + {call}]",
    "mov rdi, [rbp + {call} + 8]",
    "mov rsi, [rbp + {call} + 16]",
    "mov rdx, [rbp + {call} + 24]",
    "mov r10, [rbp + {call} + 32]",
    "mov r8, [rbp + {call} + 40]",
    "mov r9, [rbp + {call} + 48]",
    "syscall",
    "test rax, rax",
    "jz 27f",
    "add rsp, {registers_bytes}",
    "mov r12d, {cloned}",
    "jmp 21b",
    "27:",
    pop_registers!(),
    "iretq",
    // The program's side of leaving: the host loop goes on behind the VMCALL with these three.
    ".balign 16",
    ".hidden dune_leave_guest",
    ".globl dune_leave_guest",
    "dune_leave_guest:",
    "lea rdi, [rip + 28f]",
    "mov rsi, rsp",
    "pushfq",
    "pop rdx",
    "mov eax, {call_leave}",
    "vmcall",
    "28:",
    "ret",
    ".popsection",
    run = const offset_of!(HostContext, run),
    table = const offset_of!(HostContext, table),
    late = const offset_of!(HostContext, late),
    stack_top = const offset_of!(HostContext, stack_top),
    fd = const offset_of!(HostContext, fd),
    has_xsave = const offset_of!(HostContext, has_xsave),
    fpu = const offset_of!(HostContext, fpu),
    call = const offset_of!(HostContext, call),
    registers = const offset_of!(HostContext, registers),
    registers_bytes = const size_of::<Registers>(),
    rax = const offset_of!(RunPage, gprs) + offset_of!(Gprs, rax),
    rdx = const offset_of!(RunPage, gprs) + offset_of!(Gprs, rdx),
    rbx = const offset_of!(RunPage, gprs) + offset_of!(Gprs, rbx),
    rsp = const offset_of!(RunPage, gprs) + offset_of!(Gprs, rsp),
    rbp = const offset_of!(RunPage, gprs) + offset_of!(Gprs, rbp),
    rsi = const offset_of!(RunPage, gprs) + offset_of!(Gprs, rsi),
    rdi = const offset_of!(RunPage, gprs) + offset_of!(Gprs, rdi),
    r8 = const offset_of!(RunPage, gprs) + offset_of!(Gprs, r8),
    r9 = const offset_of!(RunPage, gprs) + offset_of!(Gprs, r9),
    r10 = const offset_of!(RunPage, gprs) + offset_of!(Gprs, r10),
    r12 = const offset_of!(RunPage, gprs) + offset_of!(Gprs, r12),
    r13 = const offset_of!(RunPage, gprs) + offset_of!(Gprs, r13),
    r14 = const offset_of!(RunPage, gprs) + offset_of!(Gprs, r14),
    r15 = const offset_of!(RunPage, gprs) + offset_of!(Gprs, r15),
    rip = const offset_of!(RunPage, rip),
    rflags = const offset_of!(RunPage, rflags),
    iopl = const IOPL_CPL0,
    run_call = const offset_of!(HostContext, run_call),
    run_arguments = const offset_of!(HostContext, run_arguments),
    call_leave = const CALL_LEAVE,
    action_run = const Action::Run as u32,
    action_forward = const Action::Forward as u32,
    action_clone = const Action::Clone as u32,
    action_end = const Action::End as u32,
    end_number = const END + offset_of!(End, number),
    end_status = const END + offset_of!(End, status),
    end_release = const END + offset_of!(End, release),
    end_start = const END + offset_of!(End, start),
    end_bytes = const END + offset_of!(End, bytes),
    end_advice = const END + offset_of!(End, advice),
    end_mark = const END + offset_of!(End, mark),
    end_mask = const END + offset_of!(End, mask),
    area_bytes = const layout::AREA_BYTES,
    host = const layout::HOST,
    signalled = const SIGNALLED,
    cloned = const CLONED,
    is_child = const IS_CHILD,
    action_native = const Action::Native as u32,
    slow = sym dune_host_slow,
);
