// SPDX-License-Identifier: MIT OR Apache-2.0

//! From SYSCALL at CPL0 to a hook, and back or on to Linux.
//!
//! # Life of a system call with hooks
//!
//! 1. The stub (`cpl3::syscall`) finds [`Frame::mode`] on, keeps RSP in the frame and comes here with RSP at that word: what
//!    is pushed is the frame's `call`, RIP and RFLAGS. Nothing is pushed on the program's stack.
//! 2. The hook stack of the area, mode "inside", FPU state kept, `before` in Rust.
//! 3. *Answered*: FPU state and registers back from the frame, to RIP. No exit.
//! 4. *Forwarded*: the same, but to the VMCALL that stands for SYSCALL: Linux' answer goes to RIP, as without hooks.
//! 5. *Watched*, because of a hook behind it or rewritten arguments: VMCALL at `dune_hook_vmcall`, on the hook stack, then
//!    `after`, then 3.
//!
//! From 2 to the end the thread's own SYSCALLs go by, and signals wait (`super::settle`): they are looked for before 3, 4 and
//! the VMCALL of 5. A signal that interrupts that call, or that comes behind the look, has the hooks forgotten: the program
//! is at its SYSCALL again, or behind it with the result.
//!
//! # Safety
//!
//! Assembly. RDI: the frame, [RSP] too. Clobbers what SYSCALL does.

use core::arch::global_asm;
use core::mem::offset_of;

use super::dune_hook_after;
use super::dune_hook_allowed;
use super::dune_hook_before;
use super::Frame;
use super::SystemCall;
use super::MODE_INSIDE;
use super::MODE_ON;
use super::WATCH;
use crate::abi::CALL_SIGNAL;
use crate::abi::IOPL_CPL0;
use crate::percpu;
use crate::percpu::Block;

extern "C" {
    fn dune_hook_begin();
    fn dune_hook_fxsave();
    fn dune_hook_fxsave_answered();
    fn dune_hook_fxsave_answer();
    fn dune_hook_fxsave_answer_end();
    fn dune_hook_fxsave_forwarded();
    fn dune_hook_fxsave_watched();
    fn dune_hook_fxsave_watched_end();
    fn dune_hook_xsave();
    fn dune_hook_xsave_answered();
    fn dune_hook_xsave_answer();
    fn dune_hook_xsave_answer_end();
    fn dune_hook_xsave_forwarded();
    fn dune_hook_xsave_watched();
    fn dune_hook_xsave_watched_end();
    fn dune_hook_forward();
    fn dune_hook_call();
    fn dune_hook_vmcall();
    fn dune_syscall_vmcall();
}

/// Where the stub goes.
pub(crate) fn entry(has_xsave: bool) -> u64 {
    if has_xsave {
        dune_hook_xsave as *const () as u64
    } else {
        dune_hook_fxsave as *const () as u64
    }
}

/// The VMCALL that stands for SYSCALL.
pub(crate) fn syscall_vmcall() -> u64 {
    dune_syscall_vmcall as *const () as u64
}

/// Parts of the assembly, seen by who has a signal for the thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// It will look for signals.
    Before,
    /// It has looked, or is about to, and the FPU state is not the program's yet: it is to look again, at this address.
    Looked(u64),
    /// Only registers are to be loaded; RAX is the result.
    Answer,
    /// The same, and then the call is made; or it is about to be made, or was interrupted, on the hook stack.
    Call,
}

/// Whether `rip` is behind the VMCALL of a watched call.
pub(super) fn is_behind_watched_call(rip: u64) -> bool {
    const VMCALL_BYTES: u64 = 3;
    rip == dune_hook_vmcall as *const () as u64 + VMCALL_BYTES
}

/// Which part `rip` is in.
pub(super) fn part(rip: u64) -> Option<Part> {
    type Label = unsafe extern "C" fn();
    let at = |label: Label| label as *const () as u64;
    let within = |start: Label, end: Label| (at(start)..at(end)).contains(&rip);
    let looks: [(Label, Label); 6] = [
        (dune_hook_fxsave_answered, dune_hook_fxsave_answer),
        (dune_hook_fxsave_forwarded, dune_hook_fxsave_watched),
        (dune_hook_fxsave_watched, dune_hook_fxsave_watched_end),
        (dune_hook_xsave_answered, dune_hook_xsave_answer),
        (dune_hook_xsave_forwarded, dune_hook_xsave_watched),
        (dune_hook_xsave_watched, dune_hook_xsave_watched_end),
    ];
    if within(dune_hook_fxsave_answer, dune_hook_fxsave_answer_end)
        || within(dune_hook_xsave_answer, dune_hook_xsave_answer_end)
    {
        Some(Part::Answer)
    } else if within(dune_hook_forward, dune_syscall_vmcall)
        || within(dune_hook_call, dune_hook_vmcall)
        || rip == at(dune_hook_vmcall)
    {
        Some(Part::Call)
    } else if within(dune_hook_begin, dune_syscall_vmcall) {
        let look = looks.into_iter().find(|(start, end)| within(*start, *end));
        Some(look.map_or(Part::Before, |(start, _)| Part::Looked(at(start))))
    } else {
        None
    }
}

global_asm!(
    ".pushsection .text.dune_syscall, \"ax\", @progbits",
    ".balign 16",
    ".hidden dune_hook_begin",
    ".globl dune_hook_begin",
    "dune_hook_begin:",
    ".macro dune_hook_part name",
    ".hidden \\name",
    ".globl \\name",
    "\\name:",
    ".endm",
    ".macro dune_hook_load load, all",
    ".if \\all",
    "mov eax, -1",
    "mov edx, eax",
    ".endif",
    "\\load [rsp + 16]",
    ".endm",
    // The arguments, and RIP.
    ".macro dune_hook_pop",
    "pop rdi",
    "pop rsi",
    "pop rdx",
    "pop r10",
    "pop r8",
    "pop r9",
    "pop rcx",
    ".endm",
    // Looks for a signal; if there is none the FPU state is the program's again.
    ".macro dune_hook_look load, all, other",
    "mov rcx, [rdi + {block}]",
    "cmp dword ptr [rcx + {signal}], 0",
    "jne \\other",
    "dune_hook_load \\load, \\all",
    ".endm",
    ".macro dune_hook name, save, load, all",
    ".balign 16, 0xcc",
    "dune_hook_part \\name",
    "push r11",
    "push rcx",
    "push r9",
    "push r8",
    "push r10",
    "push rdx",
    "push rsi",
    "push rdi",
    "push rax",
    "mov rdi, rsp",
    "mov rsp, [rdi + {stack}]",
    // And nothing is rewritten.
    "mov qword ptr [rdi + {mode}], {inside}",
    "push {flags}",
    "popfq",
    "push rdi",
    ".if \\all",
    "mov eax, -1",
    "mov edx, eax",
    ".endif",
    "\\save [rsp + 16]",
    "mov rsi, [rdi + {block}]",
    "call {before}",
    // RAX: the kind of verdict, RDX: the answer.
    "mov rdi, [rsp]",
    "test eax, eax",
    "jz 74f",
    "mov rax, rdx",
    "73:",
    ".if \\all",
    "mov [rdi + {result}], rax",
    ".endif",
    "dune_hook_part \\name\\()_answered",
    "dune_hook_look \\load, \\all, 70f",
    ".if \\all",
    "mov rax, [rdi + {result}]",
    ".endif",
    "dune_hook_part \\name\\()_answer",
    "mov dword ptr [rdi + {mode}], {on}",
    "lea rsp, [rdi + {call} + 8]",
    "dune_hook_pop",
    "popfq",
    "pop rsp",
    "jmp rcx",
    "dune_hook_part \\name\\()_answer_end",
    "74:",
    "mov rsi, [rdi + {block}]",
    "call {allowed}",
    "mov rdi, [rsp]",
    "cmp eax, {watch}",
    "je \\name\\()_watched",
    "dune_hook_part \\name\\()_forwarded",
    "dune_hook_look \\load, \\all, 71f",
    "jmp dune_hook_forward",
    "dune_hook_part \\name\\()_watched",
    "dune_hook_look \\load, \\all, 71f",
    "jmp dune_hook_call",
    "dune_hook_part \\name\\()_watched_end",
    // Behind a watched call.
    "\\name\\()_behind:",
    ".if \\all",
    "mov eax, -1",
    "mov edx, eax",
    ".endif",
    "\\save [rsp + 16]",
    "mov rsi, [rdi + {block}]",
    "call {after}",
    "mov rdi, [rsp]",
    "jmp 73b",
    // A signal waits: it gets a frame of the program behind its call, with the result, or at its call.
    "70:",
    ".if \\all",
    "mov rax, [rdi + {result}]",
    ".endif",
    "mov r8, [rdi + {rip}]",
    "jmp 72f",
    "71:",
    "mov r8, [rdi + {rip}]",
    "sub r8, {syscall_bytes}",
    "mov rax, [rdi + {call}]",
    "72:",
    "mov rsi, rax",
    "dune_hook_load \\load, \\all",
    "jmp 79f",
    ".endm",
    "dune_hook dune_hook_fxsave, fxsave64, fxrstor64, 0",
    "dune_hook dune_hook_xsave, xsave64, xrstor64, 1",
    // RSI: RAX, R8: RIP of the frame that the signal gets.
    "79:",
    "mov rdx, [rdi + {block}]",
    "mov dword ptr [rdx + {signal}], 0",
    "mov dword ptr [rdi + {mode}], {on}",
    "push {kernel_ds}",
    "push qword ptr [rdi + {caller_rsp}]",
    "push qword ptr [rdi + {rflags}]",
    "push {kernel_cs}",
    "push r8",
    "push 0",
    "push 0",
    "push rsi",
    "push qword ptr [rdi + {rip}]",
    "push qword ptr [rdi + {call} + 24]",
    "push rbx",
    "push rbp",
    "push qword ptr [rdi + {call} + 16]",
    "push qword ptr [rdi + {call} + 8]",
    "push qword ptr [rdi + {call} + 40]",
    "push qword ptr [rdi + {call} + 48]",
    "push qword ptr [rdi + {call} + 32]",
    "push qword ptr [rdi + {rflags}]",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "push 0",
    "push 0",
    "mov rdi, rsp",
    "mov eax, {call_signal}",
    "vmcall",
    "ud2",
    // A watched call.
    ".hidden dune_hook_call",
    ".globl dune_hook_call",
    "dune_hook_call:",
    "mov rax, [rdi + {now}]",
    "mov rsi, [rdi + {now} + 16]",
    "mov rdx, [rdi + {now} + 24]",
    "mov r10, [rdi + {now} + 32]",
    "mov r8, [rdi + {now} + 40]",
    "mov r9, [rdi + {now} + 48]",
    "mov rdi, [rdi + {now} + 8]",
    ".hidden dune_hook_vmcall",
    ".globl dune_hook_vmcall",
    "dune_hook_vmcall:",
    "vmcall",
    "mov rdi, [rsp]",
    "mov [rdi + {result}], rax",
    "mov rcx, [rdi + {block}]",
    "cmp qword ptr [rcx + {has_xsave}], 0",
    "je dune_hook_fxsave_behind",
    "jmp dune_hook_xsave_behind",
    ".hidden dune_hook_forward",
    ".globl dune_hook_forward",
    "dune_hook_forward:",
    "mov dword ptr [rdi + {mode}], {on}",
    "lea rsp, [rdi + {call}]",
    "pop rax",
    "dune_hook_pop",
    "pop r11",
    "pop rsp",
    // The VMCALL that the module knows: it goes on at RCX with RFLAGS = R11.
    ".hidden dune_syscall_vmcall",
    ".globl dune_syscall_vmcall",
    "dune_syscall_vmcall:",
    "vmcall",
    "ud2",
    ".popsection",
    syscall_bytes = const super::SYSCALL_BYTES,
    watch = const WATCH,
    on = const MODE_ON,
    inside = const MODE_INSIDE,
    flags = const 0x202 | IOPL_CPL0,
    kernel_cs = const percpu::KERNEL_CS,
    kernel_ds = const percpu::KERNEL_DS,
    call_signal = const CALL_SIGNAL,
    call = const offset_of!(Frame, call),
    rip = const offset_of!(Frame, rip),
    rflags = const offset_of!(Frame, rflags),
    caller_rsp = const offset_of!(Frame, caller_rsp),
    mode = const offset_of!(Frame, mode),
    stack = const offset_of!(Frame, stack),
    block = const offset_of!(Frame, block),
    result = const offset_of!(Frame, result),
    now = const offset_of!(Frame, now),
    signal = const offset_of!(Block, signal),
    has_xsave = const offset_of!(Block, has_xsave),
    before = sym dune_hook_before,
    allowed = sym dune_hook_allowed,
    after = sym dune_hook_after,
);

const _: () = assert!(offset_of!(Frame, call) == 0 && size_of::<SystemCall>() == size_of::<Frame>());

#[cfg(test)]
mod tests {
    use super::*;

    /// Each byte of the assembly belongs to what the documentation of [`Part`] says.
    #[test]
    fn parts_are_in_order() {
        let at = |label: unsafe extern "C" fn()| label as *const () as u64;
        for (entry, answered, answer, answer_end, forwarded, watched, end) in [
            (
                dune_hook_fxsave as unsafe extern "C" fn(),
                dune_hook_fxsave_answered as unsafe extern "C" fn(),
                dune_hook_fxsave_answer as unsafe extern "C" fn(),
                dune_hook_fxsave_answer_end as unsafe extern "C" fn(),
                dune_hook_fxsave_forwarded as unsafe extern "C" fn(),
                dune_hook_fxsave_watched as unsafe extern "C" fn(),
                dune_hook_fxsave_watched_end as unsafe extern "C" fn(),
            ),
            (
                dune_hook_xsave,
                dune_hook_xsave_answered,
                dune_hook_xsave_answer,
                dune_hook_xsave_answer_end,
                dune_hook_xsave_forwarded,
                dune_hook_xsave_watched,
                dune_hook_xsave_watched_end,
            ),
        ] {
            let labels = [entry, answered, answer, answer_end, forwarded, watched, end].map(at);
            assert!(labels.is_sorted(), "{labels:x?}");
            assert_eq!(part(labels[0]), Some(Part::Before));
            for rip in labels[1]..labels[2] {
                assert_eq!(part(rip), Some(Part::Looked(labels[1])));
            }
            for rip in labels[2]..labels[3] {
                assert_eq!(part(rip), Some(Part::Answer));
            }
            assert_eq!(part(labels[3]), Some(Part::Before));
            assert_eq!(part(labels[5] - 1), Some(Part::Looked(labels[4])));
            assert_eq!(part(labels[6] - 1), Some(Part::Looked(labels[5])));
            assert_eq!(part(labels[6]), Some(Part::Before));
        }
        assert_eq!(part(at(dune_hook_call) - 1), Some(Part::Before));
        assert_eq!(part(at(dune_hook_call)), Some(Part::Call));
        assert_eq!(part(at(dune_hook_vmcall)), Some(Part::Call));
        assert_eq!(part(at(dune_hook_vmcall) + 1), Some(Part::Before));
        assert_eq!(part(at(dune_hook_forward) - 1), Some(Part::Before));
        assert_eq!(part(syscall_vmcall() - 1), Some(Part::Call));
        assert_eq!(part(syscall_vmcall()), None);
        assert_eq!(part(at(dune_hook_begin) - 1), None);
    }
}
