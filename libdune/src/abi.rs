// SPDX-License-Identifier: MIT OR Apache-2.0

//! The contract with `dune.ko`, and the numbers that libdune's own VMCALLs use.

pub use dune_abi::*;

/// First number that no Linux system call has: a VMCALL with one of these never reaches Linux.
pub(crate) const PRIVATE_CALLS: u32 = 0x4455_4e00;

/// Leave Dune mode. RDI: RIP, RSI: RSP, RDX: RFLAGS to go on with.
pub(crate) const CALL_LEAVE: u32 = PRIVATE_CALLS;

/// An exception that no handler took: its signal, or out of Dune mode with its registers. RDI: the trap frame.
pub(crate) const CALL_EXCEPTION: u32 = PRIVATE_CALLS + 1;

/// Report and end the process. RDI: the frame; the reason is in the per-thread block.
pub(crate) const CALL_FATAL: u32 = PRIVATE_CALLS + 2;

/// Answer with the address of the calling thread's block.
pub(crate) const CALL_SELF: u32 = PRIVATE_CALLS + 3;

/// A signal came while the trap entry was on an interrupt stack: deliver it now. RDI: the trap frame.
pub(crate) const CALL_SIGNAL: u32 = PRIVATE_CALLS + 4;

/// Behind the last of them.
pub(crate) const PRIVATE_CALLS_END: u32 = PRIVATE_CALLS + 5;

/// Software bit of a page fault's error code: the host refused the access, the guest's page table is not the cause.
///
/// No CPU sets it (SDM, "Interrupt 14: Page-Fault Exception"), and a VM entry may inject it.
pub const PAGE_FAULT_HOST_REFUSED: u64 = 1 << 14;

/// RFLAGS.IOPL as the guest's CPL0 has it; CPL3 has 0. See `syscall`.
pub(crate) const IOPL_CPL0: u64 = 3 << 12;
