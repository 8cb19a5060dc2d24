// SPDX-License-Identifier: GPL-2.0

//! VMX: its instructions, who owns it on each CPU, and the VMCS. SDM volume 3, part "Virtual-Machine Extensions".

pub(crate) mod ops;

pub(crate) mod capability;

pub(crate) mod percpu;

pub(crate) mod vmcs;

pub(crate) mod dump;

pub(crate) mod vpid;

pub(crate) mod owner;

pub(crate) mod host_state;

pub(crate) mod guest_state;

pub(crate) mod setup;

pub(crate) mod enter;

crate::assert_vmcs_fields!(crate::sys::bindings);
