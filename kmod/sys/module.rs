// SPDX-License-Identifier: GPL-2.0

//! This module's parameters, and the coming and going of others (linux/module.h).

use super::bindings;
use core::cell::UnsafeCell;
use core::ffi::c_void;
use core::ffi::CStr;
use core::mem::zeroed;
use kernel::error::to_result;
use kernel::ffi::c_int;
use kernel::ffi::c_ulong;
use kernel::prelude::*;

/// The name of KVM's module for VMX.
pub(crate) const KVM_INTEL: &CStr = c"kvm_intel";

/// `gpa_bits=`: 0 = the CPU's.
pub(crate) fn param_gpa_bits() -> u32 {
    // SAFETY: Read-only after loading (mode 0444).
    unsafe { bindings::dune_param_gpa_bits }
}

/// `max_vcpus=`.
pub(crate) fn param_max_vcpus() -> u32 {
    // SAFETY: As above.
    unsafe { bindings::dune_param_max_vcpus }
}

/// `user_spaces=`.
pub(crate) fn param_user_spaces() -> u32 {
    // SAFETY: A word, which root may write at any time.
    unsafe { (&raw const bindings::dune_param_user_spaces).read_volatile() }
}

/// `user_vcpus=`.
pub(crate) fn param_user_vcpus() -> u32 {
    // SAFETY: As above.
    unsafe { (&raw const bindings::dune_param_user_vcpus).read_volatile() }
}

/// Whether kvm_intel is part of the kernel image.
pub(crate) fn kvm_intel_is_builtin() -> bool {
    // SAFETY: A constant of the build.
    unsafe { bindings::dune_kvm_intel_builtin() }
}

/// `kvm_helper=`.
pub(crate) fn param_kvm_helper() -> &'static CStr {
    // SAFETY: A string, read-only after loading (mode 0444).
    unsafe { CStr::from_ptr(bindings::dune_param_kvm_helper.cast_const().cast()) }
}

/// Whether another module is in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Presence {
    Absent,
    /// Its init function has not ended.
    Coming,
    Live,
}

/// Whether a module of that name is in the kernel.
pub(crate) fn presence(name: &CStr) -> Presence {
    // SAFETY: A C string.
    match unsafe { bindings::dune_module_state(name.as_ptr().cast()) } as u32 {
        bindings::DUNE_MODULE_ABSENT => Presence::Absent,
        bindings::DUNE_MODULE_COMING => Presence::Coming,
        _ => Presence::Live,
    }
}

/// What happens to another module.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// It is about to run its init function; an error keeps it out.
    Coming,
    /// Its init function succeeded.
    Live,
    /// It has gone, or failed to load.
    Going,
}

/// Told of every module that comes or goes; may sleep.
pub(crate) trait Watch {
    fn changed(name: &CStr, change: Change) -> Result;
}

/// A registered [`Watch`].
pub(crate) struct Watcher(KBox<UnsafeCell<bindings::notifier_block>>);

// SAFETY: Belongs to the kernel while it is registered.
unsafe impl Send for Watcher {}
// SAFETY: As above.
unsafe impl Sync for Watcher {}

impl Watcher {
    pub(crate) fn register<W: Watch>() -> Result<Self> {
        // SAFETY: All bytes zero is a value of this C structure.
        let mut block: bindings::notifier_block = unsafe { zeroed() };
        block.notifier_call = Some(call::<W>);
        let block = KBox::new(UnsafeCell::new(block), GFP_KERNEL)?;
        // SAFETY: The box does not move and lives until it is unregistered.
        to_result(unsafe { bindings::register_module_notifier(block.get()) })?;
        Ok(Self(block))
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // SAFETY: Registered in `register`.
        unsafe { bindings::unregister_module_notifier(self.0.get()) };
    }
}

unsafe extern "C" fn call<W: Watch>(
    _block: *mut bindings::notifier_block,
    action: c_ulong,
    module: *mut c_void,
) -> c_int {
    // SAFETY: The argument of a module notifier is the module, alive during the call; its name ends in NUL.
    let name = unsafe { CStr::from_ptr(bindings::dune_module_name(module.cast()).cast()) };
    let change = match action as bindings::module_state {
        bindings::module_state_MODULE_STATE_COMING => Change::Coming,
        bindings::module_state_MODULE_STATE_LIVE => Change::Live,
        bindings::module_state_MODULE_STATE_GOING => Change::Going,
        _ => return bindings::NOTIFY_DONE as c_int,
    };
    match W::changed(name, change) {
        Ok(()) => bindings::NOTIFY_OK as c_int,
        // notifier_from_errno()
        Err(e) => bindings::NOTIFY_STOP_MASK as c_int | (bindings::NOTIFY_OK as c_int - e.to_errno()),
    }
}
