// SPDX-License-Identifier: GPL-2.0

//! What this module has on each CPU: a VMXON region, by what right it may use VMX, and which VMCS is current.

use crate::sys::cpu;
use crate::sys::mem::Page;
use core::cell::UnsafeCell;
use core::sync::atomic::AtomicPtr;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::AtomicU8;
use core::sync::atomic::AtomicUsize;
use core::sync::atomic::Ordering;
use kernel::prelude::*;

/// No VMCS is current, or not one of ours.
pub(crate) const NO_VMCS: u64 = !0;

/// [`PerCpu::access`]: VMX may not be used here.
pub(crate) const NO_ACCESS: u8 = 0;
/// VMX is on here by us, and nobody else uses it.
pub(crate) const OWNED: u8 = 1;
/// VMX is on here by KVM, whose current VMCS is to be put back.
pub(crate) const BORROWED: u8 = 2;

/// One CPU's part. On a cache line of its own.
#[repr(align(64))]
pub(crate) struct PerCpu {
    /// One of the above. Written on this CPU with interrupts off; read there likewise.
    pub(crate) access: AtomicU8,
    /// Host-physical address of our VMCS that is current here (where VMX is borrowed: that was, before KVM's was put back);
    /// written and read as above.
    pub(crate) current: AtomicU64,
    /// Number of the space whose guest ran here last; written and read as above.
    pub(crate) last_space: AtomicU64,
    /// In a window, where VMX is borrowed: the VMCS that was current before, if it is KVM's. Else [`NO_VMCS`].
    pub(crate) previous: AtomicU64,
    /// The VMXON region while VMX is on. Only the CPU's hotplug callbacks use it, one at a time.
    pub(crate) vmxon_region: UnsafeCell<Option<Page>>,
}

// SAFETY: Atomics, and a cell that is used as said.
unsafe impl Sync for PerCpu {}
// SAFETY: As above.
unsafe impl Send for PerCpu {}

static TABLE: AtomicPtr<PerCpu> = AtomicPtr::new(core::ptr::null_mut());
/// Its length: the number of CPUs that can ever be.
static CPUS: AtomicUsize = AtomicUsize::new(0);

/// Owns the table of all CPUs; one exists while the module is loaded.
pub(crate) struct Table(KVec<PerCpu>);

impl Table {
    /// Makes the table and publishes it. ENOMEM.
    pub(crate) fn publish() -> Result<Self> {
        let mut table = KVec::with_capacity(cpu::nr_cpu_ids(), GFP_KERNEL)?;
        for _ in 0..cpu::nr_cpu_ids() {
            table.push(
                PerCpu {
                    access: AtomicU8::new(NO_ACCESS),
                    current: AtomicU64::new(NO_VMCS),
                    last_space: AtomicU64::new(0),
                    previous: AtomicU64::new(NO_VMCS),
                    vmxon_region: UnsafeCell::new(None),
                },
                GFP_KERNEL,
            )?;
        }
        CPUS.store(table.len(), Ordering::Relaxed);
        TABLE.store(table.as_mut_ptr(), Ordering::Release);
        Ok(Self(table))
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        TABLE.store(core::ptr::null_mut(), Ordering::Release);
        let _ = &self.0;
    }
}

/// The part of CPU `cpu`.
pub(crate) fn of(cpu: usize) -> &'static PerCpu {
    assert!(cpu < CPUS.load(Ordering::Relaxed));
    // SAFETY: The table has an entry per possible CPU and is there as long as anything of the module runs.
    unsafe { &*TABLE.load(Ordering::Relaxed).add(cpu) }
}
