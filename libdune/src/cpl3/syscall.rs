// SPDX-License-Identifier: MIT OR Apache-2.0

//! Where SYSCALL goes in Dune mode: one stub per area, LSTAR is the thread's own.
//!
//! A stub pushes nothing (the caller's red zone lies below RSP) and needs no register to tell who called: R11 holds the
//! caller's RFLAGS, and libdune runs CPL0 with IOPL 3, CPL3 with IOPL 0, which nothing at CPL3 can change. From CPL0 it
//! goes to the VMCALL that the module knows by its address: that one goes on at RCX with RFLAGS = R11, so nothing behind it
//! is executed. Where the thread has hooks it goes to those first (`hook`), with RSP in the slot's frame.
//!
//! From CPL3 it finds the thread without a free register, and without SWAPGS, by being the thread's: the two words of its
//! area in [`SLOTS`], addressed from RIP, take the caller's RSP and give the one that belongs to CPL0 (`super::asm`).

use core::arch::global_asm;
use core::mem::offset_of;
use core::sync::atomic::AtomicU64;

use crate::hook;
use crate::layout;

/// Bytes between two stubs.
const STUB_BYTES: u64 = 64;

/// Bytes of all stubs.
pub(crate) const STUBS_BYTES: u64 = layout::AREA_COUNT as u64 * STUB_BYTES;

/// For each area: RSP of CPL3 as of its last SYSCALL, and RSP at CPL0 for it; the frame of calls that go to hooks.
#[repr(C, align(64))]
pub(crate) struct Slot {
    pub user_rsp: AtomicU64,
    pub rsp: AtomicU64,
    pub hook: hook::Cell,
}

/// All of them, in pages of their own: every page table must map them, and nothing that is the program's with them.
#[repr(C, align(4096))]
struct Slots([Slot; layout::AREA_COUNT]);

static SLOTS: Slots = Slots(
    [const {
        Slot {
            user_rsp: AtomicU64::new(0),
            rsp: AtomicU64::new(0),
            hook: hook::Cell::new(),
        }
    }; layout::AREA_COUNT],
);

extern "C" {
    fn dune_syscall_stubs();
    fn dune_syscall_hooked();
    fn dune_syscall_from_cpl3();
    fn dune_syscall_end();
}

/// The slot of an area.
pub(crate) fn slot(area: usize) -> &'static Slot {
    &SLOTS.0[area]
}

/// Where they are: address and bytes, whole pages.
pub(crate) fn slots() -> (u64, u64) {
    (&raw const SLOTS as u64, size_of::<Slots>() as u64)
}

/// LSTAR of the thread that has this area.
pub(crate) fn entry(area: usize) -> u64 {
    dune_syscall_stubs as *const () as u64 + area as u64 * STUB_BYTES
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

/// Whether `rip` is in a stub on the way to a hook.
pub(crate) fn is_hooked_stub(rip: u64) -> bool {
    let (start, _) = code();
    let hooked = dune_syscall_hooked as *const () as u64..dune_syscall_from_cpl3 as *const () as u64;
    is_stub(rip) && hooked.contains(&(start + (rip - start) % STUB_BYTES))
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
    "cmp dword ptr [rip + {slots} + {slot} * dune_area + {mode}], {on}",
    "jne dune_syscall_vmcall",
    ".ifeq dune_area",
    ".hidden dune_syscall_hooked",
    ".globl dune_syscall_hooked",
    "dune_syscall_hooked:",
    ".endif",
    "mov [rip + {slots} + {slot} * dune_area + {caller_rsp}], rsp",
    "lea rsp, [rip + {slots} + {slot} * dune_area + {caller_rsp}]",
    "jmp qword ptr [rip + {slots} + {slot} * dune_area + {entry}]",
    "2:",
    ".ifeq dune_area",
    ".hidden dune_syscall_from_cpl3",
    ".globl dune_syscall_from_cpl3",
    "dune_syscall_from_cpl3:",
    ".endif",
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
    on = const hook::MODE_ON,
    mode = const offset_of!(Slot, hook) + offset_of!(hook::Frame, mode),
    caller_rsp = const offset_of!(Slot, hook) + offset_of!(hook::Frame, caller_rsp),
    entry = const offset_of!(Slot, hook) + offset_of!(hook::Frame, entry),
    iopl_bit = const crate::abi::IOPL_CPL0.trailing_zeros(),
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stub_has_its_slot() {
        const STORE_RSP: [u8; 3] = [0x48, 0x89, 0x25];
        const LOAD_RSP: [u8; 3] = [0x48, 0x8b, 0x25];
        for area in 0..layout::AREA_COUNT {
            let start = entry(area) + (dune_syscall_from_cpl3 as *const () as u64 - entry(0));
            // SAFETY: Reads libdune's own code.
            let bytes = unsafe { (start as *const [u8; 24]).read() };
            let target = |at: usize| {
                let displacement = i32::from_le_bytes(bytes[at + 3..at + 7].try_into().unwrap());
                (start + at as u64 + 7).wrapping_add_signed(displacement.into())
            };
            assert_eq!(bytes[..3], STORE_RSP);
            assert_eq!(target(0), &raw const slot(area).user_rsp as u64);
            assert_eq!(bytes[7..10], LOAD_RSP);
            assert_eq!(target(7), &raw const slot(area).rsp as u64);
            assert!(!is_hooked_stub(start) && is_hooked_stub(start - 1) && !is_hooked_stub(entry(area)));
        }
        assert_eq!(entry(layout::AREA_COUNT), dune_syscall_end as *const () as u64);
        assert!(is_stub(entry(5)) && !is_stub(entry(layout::AREA_COUNT)));
    }
}
