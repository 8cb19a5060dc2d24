// SPDX-License-Identifier: MIT OR Apache-2.0

//! Where SYSCALL goes in Dune mode: one stub per area, LSTAR is the thread's own.
//!
//! A stub pushes nothing (the caller's red zone lies below RSP) and needs no register to tell who called: R11 holds the
//! caller's RFLAGS, and libdune runs CPL0 with IOPL 3, CPL3 with IOPL 0, which nothing at CPL3 can change. From CPL0 it
//! makes the VMCALL that the module knows by its address: that one goes on at RCX with RFLAGS = R11, so nothing behind it
//! is executed.
//!
//! From CPL3 it finds the thread without a free register, and without SWAPGS, by being the thread's: the two words of its
//! area in [`SLOTS`], addressed from RIP, take the caller's RSP and give the one that belongs to CPL0 (`super::asm`).

use core::arch::global_asm;
use core::sync::atomic::AtomicU64;

use crate::layout;

/// Bytes between two stubs.
const STUB_BYTES: u64 = 32;

/// Bytes of all stubs.
pub(crate) const STUBS_BYTES: u64 = layout::AREA_COUNT as u64 * STUB_BYTES;

/// For each area: RSP of CPL3 as of its last SYSCALL, and RSP at CPL0 for it.
#[repr(C)]
pub(crate) struct Slot {
    pub user_rsp: AtomicU64,
    pub rsp: AtomicU64,
}

static SLOTS: [Slot; layout::AREA_COUNT] = [const {
    Slot {
        user_rsp: AtomicU64::new(0),
        rsp: AtomicU64::new(0),
    }
}; layout::AREA_COUNT];

extern "C" {
    fn dune_syscall_stubs();
    fn dune_syscall_vmcall();
    fn dune_syscall_end();
}

/// The slot of an area.
pub(crate) fn slot(area: usize) -> &'static Slot {
    &SLOTS[area]
}

/// LSTAR of the thread that has this area.
pub(crate) fn entry(area: usize) -> u64 {
    dune_syscall_stubs as *const () as u64 + area as u64 * STUB_BYTES
}

/// Address of the VMCALL that stands for SYSCALL in the stub at `entry`.
pub(crate) fn vmcall(entry: u64) -> u64 {
    entry + (dune_syscall_vmcall as *const () as u64 - dune_syscall_stubs as *const () as u64)
}

/// Start and end of the stubs.
pub(super) fn code() -> (u64, u64) {
    (
        dune_syscall_stubs as *const () as u64,
        dune_syscall_end as *const () as u64,
    )
}

/// Whether `rip` is in a stub.
pub(crate) fn is_stub(rip: u64) -> bool {
    let (start, end) = code();
    (start..end).contains(&rip)
}

global_asm!(
    ".pushsection .text.dune_syscall, \"ax\", @progbits",
    ".balign {stub}",
    ".hidden dune_syscall_stubs",
    ".globl dune_syscall_stubs",
    "dune_syscall_stubs:",
    ".set dune_area, 0",
    ".rept {areas}",
    ".balign {stub}, 0xcc",
    "bt r11d, {iopl_bit}",
    "jnc 2f",
    ".ifeq dune_area",
    ".hidden dune_syscall_vmcall",
    ".globl dune_syscall_vmcall",
    "dune_syscall_vmcall:",
    ".endif",
    "vmcall",
    "ud2",
    "2:",
    "mov [rip + {slots} + {slot} * dune_area], rsp",
    "mov rsp, [rip + {slots} + {slot} * dune_area + 8]",
    "jmp dune_user_syscall",
    ".set dune_area, dune_area + 1",
    ".endr",
    ".balign {stub}, 0xcc",
    ".hidden dune_syscall_end",
    ".globl dune_syscall_end",
    "dune_syscall_end:",
    ".popsection",
    stub = const STUB_BYTES,
    areas = const layout::AREA_COUNT,
    slot = const size_of::<Slot>(),
    slots = sym SLOTS,
    iopl_bit = const crate::abi::IOPL_CPL0.trailing_zeros(),
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stub_has_its_vmcall_and_its_slot() {
        const VMCALL: [u8; 3] = [0x0f, 0x01, 0xc1];
        const STORE_RSP: [u8; 3] = [0x48, 0x89, 0x25];
        const LOAD_RSP: [u8; 3] = [0x48, 0x8b, 0x25];
        for area in 0..layout::AREA_COUNT {
            let call = vmcall(entry(area));
            // SAFETY: Reads libdune's own code.
            let bytes = unsafe { (call as *const [u8; 24]).read() };
            assert_eq!(bytes[..3], VMCALL);
            let target = |at: usize| {
                let displacement = i32::from_le_bytes(bytes[at + 3..at + 7].try_into().unwrap());
                (call + at as u64 + 7).wrapping_add_signed(displacement.into())
            };
            assert_eq!(bytes[5..8], STORE_RSP);
            assert_eq!(target(5), &raw const slot(area).user_rsp as u64);
            assert_eq!(bytes[12..15], LOAD_RSP);
            assert_eq!(target(12), &raw const slot(area).rsp as u64);
        }
        assert_eq!(entry(layout::AREA_COUNT), dune_syscall_end as *const () as u64);
        assert!(is_stub(entry(5)) && !is_stub(entry(layout::AREA_COUNT)));
    }
}
