// SPDX-License-Identifier: MIT OR Apache-2.0

//! Where SYSCALL goes in Dune mode.
//!
//! The stub pushes nothing (the caller's red zone lies below RSP) and needs no register: R11 holds the caller's
//! RFLAGS, and libdune runs CPL0 with IOPL 3, CPL3 with IOPL 0. From CPL0 it makes the VMCALL that the module knows
//! by its address: that one goes on at RCX with RFLAGS = R11, so nothing behind it is executed.
//!
//! From CPL3 it answers ENOSYS: CPL3 has no way to Linux but through a handler, and there is no API for one yet.
//! That way does not touch the caller's stack either.

use core::arch::global_asm;

use crate::abi::IOPL_CPL0;

extern "C" {
    fn dune_syscall_entry();
    fn dune_syscall_vmcall();
}

/// Address for LSTAR.
pub(crate) fn entry() -> u64 {
    dune_syscall_entry as *const () as u64
}

/// Address of the VMCALL that stands for SYSCALL.
pub(crate) fn vmcall() -> u64 {
    dune_syscall_vmcall as *const () as u64
}

global_asm!(
    ".pushsection .text.dune_syscall, \"ax\", @progbits",
    ".balign 16",
    ".hidden dune_syscall_entry",
    ".globl dune_syscall_entry",
    "dune_syscall_entry:",
    "test r11d, {iopl}",
    "jz 2f",
    ".hidden dune_syscall_vmcall",
    ".globl dune_syscall_vmcall",
    "dune_syscall_vmcall:",
    "vmcall",
    "ud2",
    "2:",
    "mov rax, -{enosys}",
    "sysretq",
    ".popsection",
    iopl = const IOPL_CPL0,
    enosys = const libc::ENOSYS,
);
