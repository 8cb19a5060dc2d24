// SPDX-License-Identifier: GPL-2.0

//! Heavy operations, counted and marked where they are (`heavy.h`); nothing without `DUNE_COUNT_OPS=y`.

use super::bindings;

/// Kinds of heavy operations: `DUNE_HEAVY_*` of the bindings.
#[cfg(dune_count_ops)]
const KINDS: usize = bindings::DUNE_HEAVY_KINDS as usize;

/// `asm!` with an instruction of that kind.
#[cfg(dune_count_ops)]
macro_rules! heavy_asm {
    (VMREAD, $($rest:tt)*) => { $crate::sys::heavy::marked_asm!(0, $($rest)*) };
    (VMWRITE, $($rest:tt)*) => { $crate::sys::heavy::marked_asm!(1, $($rest)*) };
    (VMPTRLD, $($rest:tt)*) => { $crate::sys::heavy::marked_asm!(2, $($rest)*) };
    (INVALIDATION, $($rest:tt)*) => { $crate::sys::heavy::marked_asm!(3, $($rest)*) };
    (RDMSR, $($rest:tt)*) => { $crate::sys::heavy::marked_asm!(4, $($rest)*) };
    (WRMSR, $($rest:tt)*) => { $crate::sys::heavy::marked_asm!(5, $($rest)*) };
    (LOAD, $($rest:tt)*) => { $crate::sys::heavy::marked_asm!(6, $($rest)*) };
}

/// The same, by the number of the kind.
#[cfg(dune_count_ops)]
macro_rules! marked_asm {
    ($number:literal, $($rest:tt)*) => {{
        $crate::sys::heavy::count($number);
        core::arch::asm!(
            concat!("77:\n.pushsection .dune_heavy, \"\"\n.quad 77b\n.byte ", $number, "\n.popsection"),
            $($rest)*
        )
    }};
}

/// `asm!` with an instruction of that kind.
#[cfg(not(dune_count_ops))]
macro_rules! heavy_asm {
    ($kind:ident, $($rest:tt)*) => { core::arch::asm!($($rest)*) };
}

pub(crate) use heavy_asm;
#[cfg(dune_count_ops)]
pub(crate) use marked_asm;

#[cfg(dune_count_ops)]
pub(crate) fn count(kind: usize) {
    // SAFETY: A word of the array; the machine that counts has one CPU.
    unsafe {
        let word = (&raw mut bindings::dune_heavy).cast::<u64>().add(kind);
        word.write_volatile(word.read_volatile() + 1);
    }
}

/// What was counted since the last time this was called, by kind.
#[cfg(dune_count_ops)]
pub(crate) fn take() -> [u64; KINDS] {
    // SAFETY: As above.
    unsafe {
        let words = (&raw mut bindings::dune_heavy).cast::<[u64; KINDS]>();
        let counted = words.read_volatile();
        words.write_volatile([0; KINDS]);
        counted
    }
}

/// `DUNE_HEAVY_*`, in the order of `heavy.h`.
pub(crate) const NUMBERS: [usize; 11] = [
    bindings::DUNE_HEAVY_VMREAD as usize,
    bindings::DUNE_HEAVY_VMWRITE as usize,
    bindings::DUNE_HEAVY_VMPTRLD as usize,
    bindings::DUNE_HEAVY_INVALIDATION as usize,
    bindings::DUNE_HEAVY_RDMSR as usize,
    bindings::DUNE_HEAVY_WRMSR as usize,
    bindings::DUNE_HEAVY_LOAD as usize,
    bindings::DUNE_HEAVY_INTERRUPT_FLAG as usize,
    bindings::DUNE_HEAVY_IPI as usize,
    bindings::DUNE_HEAVY_ENTRY as usize,
    bindings::DUNE_HEAVY_KINDS as usize,
];
