// SPDX-License-Identifier: GPL-2.0

//! The EPT of a space: a copy of the leaf entries of the process' own page table (design D2).

pub(crate) mod tree;

pub(crate) mod host_walk;

pub(crate) mod at_once;
pub(crate) mod fault;

pub(crate) mod invalidate;
