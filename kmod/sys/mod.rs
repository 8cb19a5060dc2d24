// SPDX-License-Identifier: GPL-2.0

//! What the `kernel` crate lacks, one thin wrapper per header; the only place that names bindings or a kernel version.

#[allow(clippy::all, clippy::undocumented_unsafe_blocks, dead_code, missing_docs, non_camel_case_types, non_snake_case, non_upper_case_globals)]
#[allow(unsafe_op_in_unsafe_fn, unreachable_pub, improper_ctypes, unused_imports)]
#[rustfmt::skip]
pub(crate) mod bindings {
    include!("bindings_generated.rs");
}

pub(crate) mod chardev;
pub(crate) mod cpu;
pub(crate) mod cpuhp;
pub(crate) mod debugfs;
pub(crate) mod heavy;
pub(crate) mod kvm;
pub(crate) mod later;
pub(crate) mod lock;
pub(crate) mod mem;
pub(crate) mod mm;
pub(crate) mod module;
pub(crate) mod power;
pub(crate) mod regs;
pub(crate) mod seq;
pub(crate) mod thread;
pub(crate) mod trace;
pub(crate) mod user;
pub(crate) mod user_return;

/// Tells the driver of Intel PT that VMX goes on or off on this CPU (asm/intel_pt.h).
pub(crate) fn pt_vmx(on: bool) {
    // SAFETY: Called on the CPU in question with interrupts off.
    unsafe { bindings::dune_intel_pt_vmx(on) };
}

/// Whether the kernel lets this module turn VMX on.
pub(crate) fn may_own_vmx() -> bool {
    // SAFETY: A constant of the build.
    unsafe { bindings::dune_may_own_vmx() }
}

/// Widens the window between the walk and the installation of a leaf, for the test of the retry check; only in builds
/// with `DUNE_DEBUG_KNOBS=y`.
#[inline(always)]
pub(crate) fn knob_fault_delay() {
    #[cfg(dune_debug_knobs)]
    // SAFETY: Waits.
    unsafe {
        bindings::dune_knob_fault_delay()
    };
}

/// Whether that is wanted: faults are to be settled where the window is.
#[inline(always)]
pub(crate) fn knob_slow_faults() -> bool {
    #[cfg(dune_debug_knobs)]
    // SAFETY: Reads a parameter.
    return unsafe { bindings::dune_knob_has_fault_delay() };
    #[cfg(not(dune_debug_knobs))]
    false
}

/// Widens the window between the lookup of a slot and that of the page, for the test that the slot may go meanwhile; only in
/// such builds.
#[inline(always)]
pub(crate) fn knob_slot_delay() {
    #[cfg(dune_debug_knobs)]
    // SAFETY: Waits.
    unsafe {
        bindings::dune_knob_slot_delay()
    };
}

/// Widens the window between emptying the EPT and flushing, for the test that both happen under one lock; only in such
/// builds.
#[inline(always)]
pub(crate) fn knob_flush_delay() {
    #[cfg(dune_debug_knobs)]
    // SAFETY: Waits.
    unsafe {
        bindings::dune_knob_flush_delay()
    };
}

/// Widens the window between emptying the EPT and Linux' emptying of its page table, for the test that nothing is installed in
/// between; only in such builds.
#[inline(always)]
pub(crate) fn knob_invalidate_delay() {
    #[cfg(dune_debug_knobs)]
    // SAFETY: Waits.
    unsafe {
        bindings::dune_knob_invalidate_delay()
    };
}

/// Makes opening the device slow, for the test that nobody else waits for it; may sleep; only in such builds.
#[inline(always)]
pub(crate) fn knob_open_delay() {
    #[cfg(dune_debug_knobs)]
    // SAFETY: Waits, where sleeping is allowed.
    unsafe {
        bindings::dune_knob_open_delay()
    };
}
