// SPDX-License-Identifier: MIT OR Apache-2.0

//! The one instruction of CPL0 that accesses memory of CPL3.
//!
//! # Safety
//!
//! Assembly. With SMAP, RFLAGS.AC is set for that instruction only; a page fault there that nobody settles goes on behind
//! it, with the number of bytes that are left in RCX.

use core::arch::global_asm;

use crate::percpu::Block;

extern "C" {
    fn dune_user_copy(to: u64, from: u64, bytes: usize, has_smap: u64, is_write: u64) -> usize;
    fn dune_user_copy_instruction();
    fn dune_user_copy_behind();
}

/// Copies bytes, to CPL3's memory or from it; how many it could not.
///
/// # Safety
///
/// At CPL0. The caller's side is valid memory; the other side holds no object of the program.
pub(crate) unsafe fn copy(to: u64, from: u64, bytes: usize, is_write: bool, block: &Block) -> usize {
    // SAFETY: The caller's.
    unsafe { dune_user_copy(to, from, bytes, block.has_smap.into(), is_write.into()) }
}

/// Start and end of the assembly that a page fault can go on in.
pub(super) fn code() -> (u64, u64) {
    (
        dune_user_copy_instruction as *const () as u64,
        dune_user_copy_behind as *const () as u64,
    )
}

/// Where a page fault at `rip` goes on, if it is the copy's, and CPL3's side of it that faulted: the other side is the
/// program's memory, like any.
pub(crate) fn recovery(rip: u64, is_write: bool, r9: u64) -> Option<u64> {
    (rip == dune_user_copy_instruction as *const () as u64 && is_write == (r9 != 0))
        .then_some(dune_user_copy_behind as *const () as u64)
}

global_asm!(
    ".pushsection .text.dune_user, \"ax\", @progbits",
    ".balign 16",
    ".hidden dune_user_copy",
    ".globl dune_user_copy",
    "dune_user_copy:",
    "mov r9, r8",
    "mov r8, rcx",
    "mov rcx, rdx",
    "test r8d, r8d",
    "jz 60f",
    "stac",
    "60:",
    ".hidden dune_user_copy_instruction",
    ".globl dune_user_copy_instruction",
    "dune_user_copy_instruction:",
    "rep movsb",
    ".hidden dune_user_copy_behind",
    ".globl dune_user_copy_behind",
    "dune_user_copy_behind:",
    "test r8d, r8d",
    "jz 61f",
    "clac",
    "61:",
    "mov rax, rcx",
    "ret",
    ".popsection",
);
