// SPDX-License-Identifier: GPL-2.0

//! CPU hotplug callbacks (linux/cpuhotplug.h).

use super::bindings;
use kernel::error::to_result;
use kernel::ffi::c_int;
use kernel::ffi::c_uint;
use kernel::prelude::*;

/// A registered pair of callbacks; dropping calls `down` on every CPU and unregisters.
pub(crate) struct Cpuhp {
    state: c_int,
}

impl Cpuhp {
    /// Calls `up` on every online CPU now and on each that comes later. The first error is undone and returned.
    pub(crate) fn register(
        up: unsafe extern "C" fn(c_uint) -> c_int,
        down: unsafe extern "C" fn(c_uint) -> c_int,
    ) -> Result<Self> {
        // Behind KVM's state: a CPU that comes has KVM's VMX when `up` is called, and one that goes has it until `down` is
        // through.
        // SAFETY: The callbacks are functions of this module, which outlives the registration.
        let state = unsafe { bindings::dune_cpuhp_setup(c"dune:online".as_ptr().cast(), Some(up), Some(down)) };
        to_result(state.min(0))?;
        Ok(Self { state })
    }
}

impl Drop for Cpuhp {
    fn drop(&mut self) {
        // SAFETY: `state` was registered and is removed once.
        unsafe { bindings::dune_cpuhp_remove(self.state) };
    }
}
