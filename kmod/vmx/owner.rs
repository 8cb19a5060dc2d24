// SPDX-License-Identifier: GPL-2.0

//! Who owns VMX on this machine (design D6).
//!
//! Without kvm_intel this module turns VMX on, on every CPU, and off again. With kvm_intel in the kernel it leaves VMX
//! alone, and no space can be made until borrow mode comes. When kvm_intel is about to load, VMX is given up if no space
//! exists; else kvm_intel is kept out with EBUSY.

use super::capability;
use super::ops;
use super::percpu;
use super::vmcs::Vmcs;
use crate::arch::controls::VmxCapabilities;
use crate::arch::cr::cr4;
use crate::sys::cpu;
use crate::sys::cpu::IrqOff;
use crate::sys::cpuhp::Cpuhp;
use crate::sys::lock::OwnerMutex;
use crate::sys::mem::Page;
use crate::sys::module;
use crate::sys::module::Change;
use crate::sys::regs;
use core::cell::UnsafeCell;
use core::ffi::CStr;
use core::sync::atomic::Ordering::Relaxed;
use kernel::ffi::c_int;
use kernel::ffi::c_uint;
use kernel::prelude::*;

const KVM_INTEL: &CStr = c"kvm_intel";

/// State under the [`OwnerMutex`].
struct State {
    /// Set once at load.
    capabilities: Option<VmxCapabilities>,
    /// While we own VMX.
    online: Option<Online>,
    /// Spaces that use VMX now.
    spaces: usize,
    /// The log has had the line about KVM since it last came.
    told: bool,
}

struct Global(UnsafeCell<State>);
// SAFETY: Used under the `OwnerMutex` only.
unsafe impl Sync for Global {}

static STATE: Global = Global(UnsafeCell::new(State {
    capabilities: None,
    online: None,
    spaces: 0,
    told: false,
}));

fn with<R>(f: impl FnOnce(&mut State) -> R) -> R {
    let _guard = OwnerMutex::lock();
    // SAFETY: The mutex is held.
    f(unsafe { &mut *STATE.0.get() })
}

/// VMX is on, on every online CPU; dropping turns it off.
struct Online {
    _cpuhp: Cpuhp,
    _emergency: Emergency,
}

impl Online {
    fn new() -> Result<Self> {
        // Field order is teardown order: VMX goes off before the callback that would do so in a crash.
        let emergency = Emergency::register();
        Ok(Self {
            _cpuhp: Cpuhp::register(cpu_up, cpu_down)?,
            _emergency: emergency,
        })
    }
}

/// Turns VMX off on all CPUs when the machine reboots or crashes with it on, so that INIT is not blocked.
struct Emergency;

impl Emergency {
    fn register() -> Self {
        // SAFETY: The function is one of this module, and unregistered before the module goes.
        unsafe { crate::sys::bindings::dune_vmx_emergency_register(Some(emergency_off)) };
        Self
    }
}

impl Drop for Emergency {
    fn drop(&mut self) {
        // SAFETY: Registered in `register`.
        unsafe { crate::sys::bindings::dune_vmx_emergency_unregister(Some(emergency_off)) };
    }
}

/// Called by the kernel on each CPU, in an NMI or with interrupts off, when the machine goes down.
unsafe extern "C" fn emergency_off() {
    if regs::cr4() & cr4::VMXE != 0 {
        // SAFETY: The machine goes down: no VMCS is wanted any more.
        let _ = unsafe { ops::vmxoff() };
        regs::clear_cr4_vmxe();
    }
}

unsafe extern "C" fn cpu_up(cpu: c_uint) -> c_int {
    match turn_on(cpu as usize) {
        Ok(()) => 0,
        Err(e) => e.to_errno(),
    }
}

unsafe extern "C" fn cpu_down(cpu: c_uint) -> c_int {
    turn_off(cpu as usize);
    0
}

fn turn_on(cpu: usize) -> Result {
    // SAFETY: Set before the callbacks were registered and not changed while they are.
    let expected = unsafe { (*STATE.0.get()).capabilities }.ok_or(ENODEV)?;
    match capability::read() {
        Ok(found) if found == expected => {}
        Ok(_) => {
            pr_err!("CPU {} has other VMX capabilities than the first\n", cpu);
            return Err(ENODEV);
        }
        Err(missing) => {
            pr_err!("CPU {}: {}\n", cpu, missing);
            return Err(ENODEV);
        }
    }
    let region = Page::new()?;
    // SAFETY: The page is ours.
    unsafe { region.as_ptr().cast::<u32>().write(expected.revision_id) };
    let _irq = IrqOff::new();
    if regs::cr4() & cr4::VMXE != 0 {
        pr_err!("CPU {}: VMX is in use by another hypervisor (CR4.VMXE is set)\n", cpu);
        return Err(EBUSY);
    }
    crate::sys::pt_vmx(true);
    regs::set_cr4_vmxe();
    // SAFETY: The region has the revision id and is kept below; CR4.VMXE is set; hotplug callbacks run on their CPU.
    if unsafe { ops::vmxon(region.hpa()) }.is_err() {
        regs::clear_cr4_vmxe();
        crate::sys::pt_vmx(false);
        pr_err!("CPU {}: VMXON failed\n", cpu);
        return Err(EIO);
    }
    // Nothing that an earlier owner of VMX left in the TLBs may be taken for ours.
    // SAFETY: VMX is on; the capability was checked.
    unsafe {
        if expected.ept.invept_all() {
            let _ = ops::invept(None);
        }
        if expected.ept.invvpid_all() {
            let _ = ops::invvpid(None);
        }
    }
    let percpu = percpu::of(cpu);
    // SAFETY: Hotplug callbacks of one CPU do not run at once.
    unsafe { *percpu.vmxon_region.get() = Some(region) };
    percpu.current.store(percpu::NO_VMCS, Relaxed);
    percpu.usable.store(true, Relaxed);
    Ok(())
}

fn turn_off(cpu: usize) {
    let percpu = percpu::of(cpu);
    {
        let _irq = IrqOff::new();
        // Tasks may still run here until the CPU is really down: they see this with interrupts off before they enter.
        percpu.usable.store(false, Relaxed);
        // SAFETY: Interrupts are off.
        unsafe { Vmcs::clear_all_here() };
        percpu.current.store(percpu::NO_VMCS, Relaxed);
        // SAFETY: No VMCS is active here any more.
        let _ = unsafe { ops::vmxoff() };
        regs::clear_cr4_vmxe();
        crate::sys::pt_vmx(false);
    }
    // SAFETY: Hotplug callbacks of one CPU do not run at once; VMX is off, so the region is free.
    unsafe { *percpu.vmxon_region.get() = None };
}

/// Reads the capabilities and, without KVM, turns VMX on. At module load.
///
/// # Errors
///
/// ENODEV with one log line that says what the CPU lacks; EBUSY where another hypervisor has VMX; ENOMEM.
pub(crate) fn start() -> Result {
    if cpu::has_fred() {
        pr_err!("this machine takes its events through FRED, which was never tried: boot with fred=off\n");
        return Err(ENODEV);
    }
    if cpu::has_enqcmd() {
        pr_err!("this CPU has ENQCMD, which a guest could use with any PASID: not handled yet\n");
        return Err(ENODEV);
    }
    let capabilities = capability::read().map_err(|missing| {
        pr_err!("{}\n", missing);
        ENODEV
    })?;
    with(|state| {
        state.capabilities = Some(capabilities);
        if !kvm_is_here() {
            state.online = Some(Online::new()?);
        }
        Ok(())
    })
}

/// Turns VMX off. At module unload, when no space is left.
pub(crate) fn stop() {
    with(|state| state.online = None);
}

fn kvm_is_here() -> bool {
    module::kvm_intel_is_builtin() || module::is_loaded(KVM_INTEL)
}

/// What was negotiated at load; `None` before.
pub(crate) fn capabilities() -> Option<VmxCapabilities> {
    // SAFETY: Set once, in `start`, before the device exists; read-only after.
    unsafe { (*STATE.0.get()).capabilities }
}

/// Right to use VMX, held by each space.
pub(crate) struct Use {
    pub(crate) capabilities: VmxCapabilities,
}

impl Use {
    /// EBUSY, and once a log line, while KVM has VMX.
    pub(crate) fn new() -> Result<Self> {
        with(|state| {
            let capabilities = state.capabilities.ok_or(ENODEV)?;
            if state.online.is_none() {
                if !state.told {
                    state.told = true;
                    pr_warn!("kvm_intel has VMX: unload it (rmmod kvm_intel) to use Dune; sharing with KVM is not there yet\n");
                }
                return Err(EBUSY);
            }
            state.spaces += 1;
            Ok(Self { capabilities })
        })
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        with(|state| state.spaces -= 1);
    }
}

/// Watches kvm_intel come and go.
pub(crate) struct KvmWatch;

impl module::Watch for KvmWatch {
    fn changed(name: &CStr, change: Change) -> Result {
        if name != KVM_INTEL {
            return Ok(());
        }
        with(|state| match change {
            Change::Coming if state.spaces > 0 => {
                pr_warn!("kvm_intel kept out: {} Dune processes are running\n", state.spaces);
                Err(EBUSY)
            }
            Change::Coming => {
                state.online = None;
                state.told = false;
                Ok(())
            }
            Change::Going => {
                if state.online.is_none() && state.capabilities.is_some() {
                    match Online::new() {
                        Ok(online) => state.online = Some(online),
                        Err(e) => pr_err!("VMX could not be taken back from kvm_intel: error {}\n", e.to_errno()),
                    }
                }
                Ok(())
            }
        })
    }
}
