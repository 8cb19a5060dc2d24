// SPDX-License-Identifier: GPL-2.0

//! Who owns VMX on this machine (design D6).
//!
//! ```text
//!               own                             borrow
//!   kvm_intel   not in the kernel               loaded or built in
//!   VMX is on   from load to unload, by us      while a space exists, and a second, by KVM: we hold a virtual machine of it
//!   VMCS        ours is current all the time    ours is current in windows only, KVM's is put back (vmcs.rs)
//! ```
//!
//! A module notifier tells when kvm_intel comes or goes. When it is about to load, VMX goes off on every CPU; spaces that
//! exist stay, and the next RUN of each borrows. It cannot go while a space exists, and for a second more, because the virtual
//! machine that we hold keeps it; when it has gone VMX is turned on again.

use super::capability;
use super::ops;
use super::percpu;
use super::vmcs::Vmcs;
use crate::abi;
use crate::arch::controls::VmxCapabilities;
use crate::arch::cr::cr4;
use crate::sys;
use crate::sys::cpu;
use crate::sys::cpu::IrqOff;
use crate::sys::cpuhp::Cpuhp;
use crate::sys::kvm::VmFile;
use crate::sys::later;
use crate::sys::later::later;
use crate::sys::later::Later;
use crate::sys::lock::OwnerMutex;
use crate::sys::mem::Page;
use crate::sys::module;
use crate::sys::module::Change;
use crate::sys::module::Presence;
use crate::sys::module::KVM_INTEL;
use crate::sys::power::Power;
use crate::sys::power::PowerHooks;
use crate::sys::regs;
use crate::sys::thread;
use crate::sys::user_return;
use core::cell::UnsafeCell;
use core::ffi::CStr;
use core::sync::atomic::AtomicBool;
use core::sync::atomic::Ordering::Relaxed;
use kernel::ffi::c_int;
use kernel::ffi::c_uint;
use kernel::prelude::*;

/// State under the [`OwnerMutex`].
struct State {
    /// Set once at load.
    machine: Option<Machine>,
    kvm: Presence,
    /// While we own VMX: only where kvm_intel is absent.
    owned: Option<Owned>,
    /// While we borrow it: only where kvm_intel is live and a space exists, or existed a second ago.
    borrowed: Option<Borrowed>,
    /// Spaces that use VMX now.
    spaces: usize,
    /// The log has had the line about why KVM's VMX cannot be borrowed since kvm_intel last came.
    told: bool,
}

/// What was found at load.
#[derive(Clone, Copy)]
struct Machine {
    capabilities: VmxCapabilities,
    host_lstar: u64,
}

struct Global(UnsafeCell<State>);
// SAFETY: Used under the `OwnerMutex` only.
unsafe impl Sync for Global {}

static STATE: Global = Global(UnsafeCell::new(State {
    machine: None,
    kvm: Presence::Absent,
    owned: None,
    borrowed: None,
    spaces: 0,
    told: false,
}));

fn with<R>(f: impl FnOnce(&mut State) -> R) -> R {
    let _guard = OwnerMutex::lock();
    // SAFETY: The mutex is held.
    f(unsafe { &mut *STATE.0.get() })
}

impl State {
    /// Makes VMX usable, or sees that it is.
    ///
    /// # Errors
    ///
    /// EAGAIN while kvm_intel is loading; EBUSY, and once a log line, where KVM has VMX and it cannot be borrowed; ENODEV
    /// where VMX cannot be turned on; ENOMEM.
    fn acquire(&mut self) -> Result {
        match self.kvm {
            Presence::Coming => Err(EAGAIN),
            Presence::Absent if self.owned.is_some() => Ok(()),
            Presence::Absent => {
                if !sys::may_own_vmx() {
                    if !core::mem::replace(&mut self.told, true) {
                        pr_err!("this kernel lets nobody but KVM turn VMX on: load kvm_intel (modprobe kvm_intel)\n");
                    }
                    return Err(ENODEV);
                }
                self.owned = Some(Owned::new()?);
                Ok(())
            }
            Presence::Live if self.borrowed.is_some() => Ok(()),
            Presence::Live => {
                self.borrowed = Some(Borrowed::new(&mut self.told)?);
                Ok(())
            }
        }
    }
}

/// VMX is on by us, on every online CPU; dropping turns it off.
struct Owned {
    // Field order is teardown order: VMX goes off before the callback that would do so in a crash.
    _power: PowerHooks,
    _cpuhp: Cpuhp,
    _emergency: Emergency,
}

impl Owned {
    fn new() -> Result<Self> {
        let emergency = Emergency::register();
        Ok(Self {
            _cpuhp: Cpuhp::register(own_cpu, disown_cpu)?,
            _power: PowerHooks::register::<OwnedPower>(),
            _emergency: emergency,
        })
    }
}

/// VMX is on by KVM, on every online CPU, and stays so; dropping ends that.
struct Borrowed {
    // Field order is teardown order: no CPU uses KVM's VMX when the virtual machine goes.
    _power: PowerHooks,
    _cpuhp: Cpuhp,
    _vm: VmFile,
}

impl Borrowed {
    fn new(told: &mut bool) -> Result<Self> {
        let mut tell = |why: core::fmt::Arguments<'_>| {
            if !core::mem::replace(told, true) {
                pr_err!("kvm_intel has VMX and cannot share it: {}\n", why);
            }
            EBUSY
        };
        if capability::has_enlightened_vmcs() {
            return Err(tell(format_args!(
                "this is a guest of Hyper-V with enlightened VMCSs; unload it (modprobe -r kvm_intel)"
            )));
        }
        let vm = VmFile::make::<{ abi::DUNE_KVM_LEND }>().map_err(|why| {
            tell(format_args!(
                "the program {:?} is to make a virtual machine that keeps VMX on, and {why}; install it (make install), or \
                 unload kvm_intel (modprobe -r kvm_intel)",
                module::param_kvm_helper()
            ))
        })?;
        let cpuhp = Cpuhp::register(borrow_cpu, give_back_cpu)
            .map_err(|e| tell(format_args!("error {} on one of the CPUs", e.to_errno())))?;
        Ok(Self {
            _cpuhp: cpuhp,
            // After KVM's own, which it registered with its first virtual machine at the latest: so ours come before KVM
            // turns VMX off.
            _power: PowerHooks::register::<BorrowedPower>(),
            _vm: vm,
        })
    }
}

/// Turns VMX off on all CPUs when the machine reboots or crashes with it on, so that INIT is not blocked. KVM has its own.
struct Emergency;

impl Emergency {
    fn register() -> Self {
        // SAFETY: The function is one of this module, and unregistered before the module goes.
        unsafe { sys::bindings::dune_vmx_emergency_register(Some(emergency_off)) };
        Self
    }
}

impl Drop for Emergency {
    fn drop(&mut self) {
        // SAFETY: Registered in `register`.
        unsafe { sys::bindings::dune_vmx_emergency_unregister(Some(emergency_off)) };
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

/// What machine sleep is to VMX that we own.
struct OwnedPower;

impl Power for OwnedPower {
    unsafe fn suspend() {
        // SAFETY: By the caller.
        unsafe { vmx_off_here() };
    }

    unsafe fn resume() {
        // SAFETY: By the caller; the region is there since the CPU came up.
        if unsafe { vmx_on_here() }.is_err() {
            pr_err!("VMX could not be turned on again after suspend\n");
        }
    }

    unsafe fn shutdown_cpu() {
        // SAFETY: By the caller.
        unsafe { vmx_off_here() };
    }
}

/// What machine sleep is to VMX that we borrow.
struct BorrowedPower;

impl Power for BorrowedPower {
    unsafe fn suspend() {
        // SAFETY: By the caller. KVM turns VMX off next.
        unsafe { stop_here() };
    }

    unsafe fn resume() {
        // KVM has it on again; `load` looks.
        percpu::of(cpu::cpu_hint()).access.store(percpu::BORROWED, Relaxed);
    }

    unsafe fn shutdown_cpu() {
        // SAFETY: As in `suspend`.
        unsafe { stop_here() };
    }
}

unsafe extern "C" fn own_cpu(cpu: c_uint) -> c_int {
    match turn_on(cpu as usize) {
        Ok(()) => 0,
        Err(e) => e.to_errno(),
    }
}

unsafe extern "C" fn disown_cpu(cpu: c_uint) -> c_int {
    {
        let irq = IrqOff::new();
        // SAFETY: Interrupts are off.
        unsafe { vmx_off_here() };
        // Nothing enters here any more, so nothing waits anew.
        user_return::stop(&irq);
    }
    // SAFETY: Hotplug callbacks of one CPU do not run at once; VMX is off, so the region is free.
    unsafe { *percpu::of(cpu as usize).vmxon_region.get() = None };
    0
}

unsafe extern "C" fn borrow_cpu(cpu: c_uint) -> c_int {
    if let Err(e) = check(cpu as usize) {
        return e.to_errno();
    }
    let _irq = IrqOff::new();
    if regs::cr4() & cr4::VMXE == 0 {
        pr_err!("CPU {}: KVM has not turned VMX on (CR4.VMXE is clear)\n", cpu);
        return ENODEV.to_errno();
    }
    let percpu = percpu::of(cpu as usize);
    percpu.current.store(percpu::NO_VMCS, Relaxed);
    percpu.access.store(percpu::BORROWED, Relaxed);
    0
}

unsafe extern "C" fn give_back_cpu(_cpu: c_uint) -> c_int {
    let irq = IrqOff::new();
    // SAFETY: Interrupts are off.
    unsafe { stop_here() };
    // As above.
    user_return::stop(&irq);
    0
}

/// This CPU must have the capabilities that were negotiated at load.
fn check(cpu: usize) -> Result<VmxCapabilities> {
    // SAFETY: Set before the callbacks were registered and not changed while they are.
    let expected = unsafe { (*STATE.0.get()).machine }.ok_or(ENODEV)?.capabilities;
    match capability::read() {
        Ok(found) if found == expected => Ok(expected),
        Ok(_) => {
            pr_err!("CPU {}: its VMX capabilities differ from those of the first\n", cpu);
            Err(ENODEV)
        }
        Err(missing) => {
            // The kernel formats what core does, not what others are.
            pr_err!("CPU {}: {}\n", cpu, format_args!("{missing}"));
            Err(ENODEV)
        }
    }
}

/// Whoever opens the device may have it tried again: the log is told once.
static TOLD_OF_ANOTHER: AtomicBool = AtomicBool::new(false);

fn turn_on(cpu: usize) -> Result {
    let expected = check(cpu)?;
    let region = Page::new()?;
    // SAFETY: The page is ours.
    unsafe { region.as_ptr().cast::<u32>().write(expected.revision_id) };
    // SAFETY: Hotplug callbacks of one CPU do not run at once.
    let place = unsafe { &mut *percpu::of(cpu).vmxon_region.get() };
    *place = Some(region);
    let _irq = IrqOff::new();
    let on = if regs::cr4() & cr4::VMXE != 0 {
        if !TOLD_OF_ANOTHER.swap(true, Relaxed) {
            pr_err!("CPU {}: VMX is in use by another hypervisor (CR4.VMXE is set)\n", cpu);
        }
        Err(EBUSY)
    } else {
        // SAFETY: Interrupts are off, and the region is there.
        unsafe { vmx_on_here() }.inspect_err(|_| pr_err!("CPU {}: VMXON failed\n", cpu))
    };
    drop(_irq);
    on.inspect_err(|_| *place = None)
}

/// VMXON on this CPU, with the region in its place.
///
/// # Safety
///
/// Interrupts must be off, and VMX too.
unsafe fn vmx_on_here() -> Result {
    let percpu = percpu::of(cpu::cpu_hint());
    // SAFETY: Only the CPU's own callbacks use it, one at a time.
    let region = unsafe { (*percpu.vmxon_region.get()).as_ref() }.ok_or(ENODEV)?;
    // SAFETY: As in `check`.
    let capabilities = unsafe { (*STATE.0.get()).machine }.ok_or(ENODEV)?.capabilities;
    sys::pt_vmx(true);
    regs::set_cr4_vmxe();
    // SAFETY: The region has the revision id and stays until VMXOFF; CR4.VMXE is set; by the caller the thread stays here.
    if unsafe { ops::vmxon(region.hpa()) }.is_err() {
        regs::clear_cr4_vmxe();
        sys::pt_vmx(false);
        return Err(EIO);
    }
    // Nothing that an earlier owner of VMX left in the TLBs may be taken for ours.
    // SAFETY: VMX is on; the capability was checked.
    unsafe {
        if capabilities.ept.invept_all() {
            let _ = ops::invept(None);
        }
        if capabilities.ept.invvpid_all() {
            let _ = ops::invvpid(None);
        }
    }
    percpu.current.store(percpu::NO_VMCS, Relaxed);
    percpu.access.store(percpu::OWNED, Relaxed);
    Ok(())
}

/// VMXOFF on this CPU, where it was on by us.
///
/// # Safety
///
/// Interrupts must be off.
unsafe fn vmx_off_here() {
    if percpu::of(cpu::cpu_hint()).access.load(Relaxed) != percpu::OWNED {
        return;
    }
    // SAFETY: By the caller; no VMCS is active here when VMX goes off.
    unsafe {
        stop_here();
        let _ = ops::vmxoff();
    }
    regs::clear_cr4_vmxe();
    sys::pt_vmx(false);
}

/// Nothing of this module uses VMX on this CPU from here on, and no VMCS of it is active here.
///
/// # Safety
///
/// Interrupts must be off.
unsafe fn stop_here() {
    let percpu = percpu::of(cpu::cpu_hint());
    // Tasks may still run here until the CPU is really down: they see this with interrupts off before they enter.
    percpu.access.store(percpu::NO_ACCESS, Relaxed);
    // SAFETY: By the caller.
    unsafe { Vmcs::clear_all_here() };
    percpu.current.store(percpu::NO_VMCS, Relaxed);
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
        pr_err!("{}\n", format_args!("{missing}"));
        ENODEV
    })?;
    let host_lstar = host_lstar()?;
    with(|state| {
        state.machine = Some(Machine {
            capabilities,
            host_lstar,
        });
        // The notifier may have been told already.
        if state.kvm == Presence::Absent {
            state.kvm = if module::kvm_intel_is_builtin() {
                Presence::Live
            } else {
                module::presence(KVM_INTEL)
            };
        }
        if state.kvm == Presence::Absent && sys::may_own_vmx() {
            state.acquire()?;
        }
        Ok(())
    })
}

/// Linux' own LSTAR. The loading thread was in user mode a moment ago, so it is in the CPU, unless a thread of KVM came
/// between.
fn host_lstar() -> Result<u64> {
    for _ in 0..1000 {
        match regs::linux_msr(crate::arch::msr::IA32_LSTAR) {
            Err(e) if e == EAGAIN => thread::sleep_ms(1),
            other => return other,
        }
    }
    pr_err!("KVM guests leave no moment to read Linux' own LSTAR: stop one and load again\n");
    Err(EBUSY)
}

/// Turns VMX off. At module unload, when no space is left.
pub(crate) fn stop() {
    // Without a space nobody asks for it again.
    later::cancel();
    with(|state| {
        state.owned = None;
        state.borrowed = None;
    });
}

/// What was negotiated at load; `None` before.
pub(crate) fn capabilities() -> Option<VmxCapabilities> {
    // SAFETY: Set once, in `start`, before the device exists; read-only after.
    unsafe { (*STATE.0.get()).machine }.map(|machine| machine.capabilities)
}

/// How often, a millisecond each, the end of kvm_intel's loading is waited for.
const LOADING_MS: usize = 10_000;

/// Right to use VMX, held by each space.
pub(crate) struct Use {
    pub(crate) capabilities: VmxCapabilities,
    /// Linux' own.
    pub(crate) host_lstar: u64,
}

impl Use {
    /// As [`State::acquire`]; waits while kvm_intel loads.
    pub(crate) fn new() -> Result<Self> {
        for _ in 0..LOADING_MS {
            let answer = with(|state| {
                state.acquire()?;
                let machine = state.machine.ok_or(ENODEV)?;
                state.spaces += 1;
                Ok(Self {
                    capabilities: machine.capabilities,
                    host_lstar: machine.host_lstar,
                })
            });
            match answer {
                Err(e) if e == EAGAIN => {}
                other => return other,
            }
            if thread::is_signal_pending() {
                return Err(EINTR);
            }
            thread::sleep_ms(1);
        }
        Err(EBUSY)
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        with(|state| {
            state.spaces -= 1;
            if state.spaces == 0 && state.borrowed.is_some() {
                later::<GiveBack>();
            }
        });
    }
}

/// Gives back VMX that is borrowed and not used, so that kvm_intel can be unloaded. To borrow it and to give it back takes long,
/// and one process often follows another.
struct GiveBack;

impl Later for GiveBack {
    const MS: u32 = 1000;

    fn run() {
        with(|state| {
            if state.spaces == 0 {
                state.borrowed = None;
            }
        });
    }
}

/// For a space that found VMX unusable on its CPU: gets it back where kvm_intel came meanwhile.
///
/// # Errors
///
/// ENODEV when it cannot be had any more. Fine where there is nothing to do but to try again: the CPU goes offline, or
/// kvm_intel is loading.
#[cold]
#[inline(never)]
pub(crate) fn regain() -> Result {
    match with(State::acquire) {
        Err(e) if e == EAGAIN => {
            thread::sleep_ms(1);
            Ok(())
        }
        other => other.map_err(|_| ENODEV),
    }
}

/// Watches kvm_intel come and go.
pub(crate) struct KvmWatch;

impl module::Watch for KvmWatch {
    fn changed(name: &CStr, change: Change) -> Result {
        if name != KVM_INTEL {
            return Ok(());
        }
        TOLD_OF_ANOTHER.store(false, Relaxed);
        with(|state| {
            match change {
                Change::Coming => {
                    // It looks whether VMX is on, and has a callback of its own for crashes.
                    state.owned = None;
                    state.kvm = Presence::Coming;
                    state.told = false;
                }
                Change::Live => state.kvm = Presence::Live,
                Change::Going => {
                    state.borrowed = None;
                    state.kvm = Presence::Absent;
                    if state.machine.is_some() && sys::may_own_vmx() {
                        if let Err(e) = state.acquire() {
                            pr_err!("VMX could not be taken back from kvm_intel: error {}\n", e.to_errno());
                        }
                    }
                }
            }
            Ok(())
        })
    }
}
