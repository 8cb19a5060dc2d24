// SPDX-License-Identifier: GPL-2.0

//! Tracepoints (linux/tracepoint.h). Where the kernel has none, nothing of this is left.
//!
//! Rust reaches no static key of 6.12, so what nobody listens to costs a test of a word.

use super::bindings;

pub(crate) use super::bindings::dune_traced_exit as TracedExit;
pub(crate) use super::bindings::dune_traced_violation as TracedViolation;

/// A tracepoint.
#[derive(Clone, Copy)]
#[repr(u32)]
pub(crate) enum Event {
    Exit = bindings::DUNE_TRACE_EXIT,
    EptViolation = bindings::DUNE_TRACE_EPT_VIOLATION,
    Invalidate = bindings::DUNE_TRACE_INVALIDATE,
    EntryFailed = bindings::DUNE_TRACE_ENTRY_FAILED,
}

/// What became of an EPT violation.
#[derive(Clone, Copy)]
#[repr(u32)]
pub(crate) enum Outcome {
    Mapped4K = bindings::DUNE_TRACED_MAPPED_4K,
    Mapped2M = bindings::DUNE_TRACED_MAPPED_2M,
    Again = bindings::DUNE_TRACED_AGAIN,
    Touch = bindings::DUNE_TRACED_TOUCH,
    Refused = bindings::DUNE_TRACED_REFUSED,
    NoSlot = bindings::DUNE_TRACED_NO_SLOT,
}

/// Nothing was mapped, that had a memory type.
pub(crate) const NO_TYPE: u32 = bindings::DUNE_TRACED_NO_TYPE;

/// Whether somebody listens.
#[inline(always)]
pub(crate) fn is_on(event: Event) -> bool {
    // SAFETY: A word; it changes when somebody begins to listen, and a moment late is soon enough.
    cfg!(CONFIG_TRACEPOINTS) && unsafe { (&raw const bindings::dune_traced).read_volatile() } & event as u32 != 0
}

/// A VM exit; also with interrupts off.
pub(crate) fn exit(space: u64, exit: &TracedExit) {
    // SAFETY: Reads the structure.
    unsafe { bindings::dune_trace_exit(space, exit) };
}

/// What became of an EPT violation; also with interrupts off.
pub(crate) fn ept_violation(space: u64, violation: &TracedViolation) {
    // SAFETY: Reads the structure.
    unsafe { bindings::dune_trace_ept_violation(space, violation) };
}

/// What the EPT had from `start` to `end` is gone; `flushed`: it had something.
pub(crate) fn invalidate(space: u64, start: u64, end: u64, flushed: bool) {
    // SAFETY: Numbers.
    unsafe { bindings::dune_trace_invalidate(space, start, end, flushed) };
}

/// An entry that failed; also with interrupts off.
pub(crate) fn entry_failed(space: u64, reason: u32, qualification: u64, instruction_error: u32) {
    // SAFETY: Numbers.
    unsafe { bindings::dune_trace_entry_failed(space, reason, qualification, instruction_error) };
}
