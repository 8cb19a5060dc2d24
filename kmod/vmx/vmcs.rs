// SPDX-License-Identifier: GPL-2.0

//! The VMCS: one that we own ([`Vmcs`]), and one that is loaded on this CPU ([`CurrentVmcs`]).
//!
//! A VMCS may be cached by the one CPU it is *active* on. It moves by a VMCLEAR there, which only that CPU can do: in an
//! interrupt, or when it goes offline. Everything that concerns a VMCS active on CPU X happens on X with interrupts off.
//!
//! Which VMCS is *current* is ours alone to say where this module owns VMX: there it stays current until another one is
//! loaded. Where VMX is borrowed KVM believes that the VMCS it loaded last is current whenever interrupts are on, so a
//! window ends by loading that one again ([`CurrentVmcs::end`]). Nothing is to be put back when none was current, or one of
//! ours: KVM loads its own before it uses it.

use super::ops;
use super::percpu;
use super::percpu::PerCpu;
use crate::arch::cr::cr4;
use crate::arch::vmcs_field::Field;
use crate::arch::vmcs_field::ReadWrite;
use crate::counters;
use crate::counters::Counted;
use crate::sys::cpu;
use crate::sys::cpu::IrqOff;
use crate::sys::cpu::PreemptGuard;
use crate::sys::lock::SpinLock;
use crate::sys::mem::Page;
use crate::sys::regs;
use core::ffi::c_void;
use core::marker::PhantomData;
use core::ptr::null_mut;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::AtomicUsize;
use core::sync::atomic::Ordering::Relaxed;
use core::sync::atomic::Ordering::SeqCst;
use kernel::prelude::*;

const NO_CPU: usize = usize::MAX;

/// `struct dune_entry` of vmenter.h.
#[repr(C)]
pub(crate) struct Entry {
    /// What HOST_RSP holds.
    pub(crate) host_rsp: AtomicU64,
    /// Not 0: entered since it was last cleared, so the next entry is a VMRESUME.
    pub(crate) launched: AtomicU64,
    /// When RCU was told of an entry, in ticks of Linux.
    pub(crate) noted: AtomicU64,
}

/// An owned VMCS region, in the list of all.
///
/// # Invariants
///
/// `cpu` is the CPU where it is active. It changes only on that CPU, or from `NO_CPU` to the CPU that loads it, with
/// interrupts off. The `KBox` it lives in does not move, and `links` is protected by the lock of [`ALL`].
pub(crate) struct Vmcs {
    page: Page,
    hpa: u64,
    cpu: AtomicUsize,
    pub(crate) entry: Entry,
    prev: *mut Vmcs,
    next: *mut Vmcs,
    /// In the list: not yet where its own allocation failed.
    listed: bool,
    _counted: Counted,
}

// SAFETY: The links are used under the lock of `ALL`, the rest as the invariants say.
unsafe impl Send for Vmcs {}
// SAFETY: As above.
unsafe impl Sync for Vmcs {}

struct Head(*mut Vmcs);
// SAFETY: Used under the lock.
unsafe impl Send for Head {}

/// Every VMCS of the module, so that a CPU that goes offline finds those active on it.
static ALL: SpinLock<Head> = SpinLock::new(Head(null_mut()));

/// To be called once, before any VMCS is made.
pub(crate) fn init() {
    // SAFETY: A static, and nobody uses it yet.
    unsafe { ALL.init(crate::sys::lock::Class::Global) };
}

/// How [`Vmcs::load`] went.
pub(crate) enum Loaded<'a> {
    /// It is current; `moved`: it was active on another CPU before, or on none.
    Here { vmcs: CurrentVmcs<'a>, moved: bool },
    /// It is active elsewhere: [`Vmcs::clear_elsewhere`] with interrupts on, then again.
    Elsewhere,
    /// VMX is not usable on this CPU.
    Unusable,
}

/// How [`Vmcs::borrow`] went; as [`Loaded`].
enum Borrowed {
    Here,
    Elsewhere,
    Unusable,
}

impl Vmcs {
    /// A clear VMCS with that revision id. ENOMEM.
    pub(crate) fn new(revision_id: u32) -> Result<KBox<Self>> {
        let page = Page::new()?;
        // SAFETY: The page is ours and nobody else's.
        unsafe { page.as_ptr().cast::<u32>().write(revision_id) };
        let hpa = page.hpa();
        let mut vmcs = KBox::new(
            Self {
                page,
                hpa,
                cpu: AtomicUsize::new(NO_CPU),
                entry: Entry {
                    host_rsp: AtomicU64::new(!0),
                    launched: AtomicU64::new(0),
                    noted: AtomicU64::new(0),
                },
                prev: null_mut(),
                next: null_mut(),
                listed: false,
                _counted: Counted::new(&counters::VMCS_PAGES),
            },
            GFP_KERNEL_ACCOUNT,
        )?;
        let raw: *mut Vmcs = &mut *vmcs;
        let mut all = ALL.lock_irqsave();
        // SAFETY: The list's elements are alive: each takes itself out when it is dropped. The box does not move its
        // contents.
        unsafe {
            (*raw).listed = true;
            (*raw).next = all.0;
            if !all.0.is_null() {
                (*all.0).prev = raw;
            }
        }
        all.0 = raw;
        drop(all);
        Ok(vmcs)
    }

    /// Makes it current on this CPU, until [`CurrentVmcs::end`].
    #[inline(always)]
    pub(crate) fn load<'a>(&self, irq: &'a IrqOff) -> Loaded<'a> {
        let here = irq.cpu();
        let percpu = percpu::of(here);
        let active = self.cpu.load(Relaxed);
        let mut state = FINE;
        if percpu.access.load(Relaxed) != percpu::OWNED {
            match self.borrow(active, irq) {
                Borrowed::Here => state = LENT,
                Borrowed::Elsewhere => return Loaded::Elsewhere,
                Borrowed::Unusable => return Loaded::Unusable,
            }
        } else {
            if active != here {
                if active != NO_CPU {
                    return Loaded::Elsewhere;
                }
                if !self.activate(irq) {
                    return Loaded::Unusable;
                }
            }
            if percpu.current.load(Relaxed) != self.hpa {
                if !self.make_current(irq) {
                    return Loaded::Unusable;
                }
                percpu.current.store(self.hpa, Relaxed);
            }
        }
        Loaded::Here {
            vmcs: CurrentVmcs {
                percpu,
                state,
                _irq: PhantomData,
            },
            moved: active != here,
        }
    }

    /// [`Vmcs::load`] where VMX is not ours: KVM's, or nobody's. `active`: where it is active.
    #[cold]
    #[inline(never)]
    fn borrow(&self, active: usize, irq: &IrqOff) -> Borrowed {
        let here = irq.cpu();
        let percpu = percpu::of(here);
        // KVM may have lost VMX too: the machine goes down.
        if percpu.access.load(Relaxed) != percpu::BORROWED || regs::cr4() & cr4::VMXE == 0 {
            return Borrowed::Unusable;
        }
        if active != here && active != NO_CPU {
            return Borrowed::Elsewhere;
        }
        // SAFETY: Interrupts are off.
        let Ok(found) = (unsafe { ops::vmptrst() }) else {
            return Borrowed::Unusable;
        };
        if active != here && !self.activate(irq) {
            return Borrowed::Unusable;
        }
        if found != self.hpa && !self.make_current(irq) {
            return Borrowed::Unusable;
        }
        let is_ours = found == self.hpa || found == percpu.current.load(Relaxed);
        if is_ours {
            percpu.previous.store(percpu::NO_VMCS, Relaxed);
        } else {
            percpu.previous.store(found, Relaxed);
            // A guest of KVM may have run here since: no space was the last.
            percpu.last_space.store(0, Relaxed);
        }
        percpu.current.store(self.hpa, Relaxed);
        Borrowed::Here
    }

    /// Makes it active on this CPU; it is active nowhere. False: VMX is off.
    fn activate(&self, irq: &IrqOff) -> bool {
        // Only VMCLEAR makes a region's launch state clear (SDM, "Initializing a VMCS").
        // SAFETY: A VMCS of ours, active nowhere; interrupts are off.
        if unsafe { ops::vmclear(self.hpa) }.is_err() {
            return false;
        }
        // INVARIANT: It was active nowhere, and becomes so here.
        self.cpu.store(irq.cpu(), Relaxed);
        true
    }

    /// VMPTRLD; it is active on this CPU. False: VMX is off, and with it what this CPU had of the VMCS.
    fn make_current(&self, _: &IrqOff) -> bool {
        // SAFETY: A VMCS of ours, active here; interrupts are off.
        if unsafe { ops::vmptrld(self.hpa) }.is_err() {
            self.entry.launched.store(0, Relaxed);
            // INVARIANT: On the CPU where it was active. Whoever loads it next writes that CPU's host state into it.
            self.cpu.store(NO_CPU, SeqCst);
            return false;
        }
        true
    }

    /// If it is active on another CPU, has that CPU clear it. With interrupts on; may wait for the other CPU.
    #[inline]
    pub(crate) fn clear_elsewhere(&self) {
        // Nearly always: it is where it was. If the thread moves now, `load` says so.
        let active = self.cpu.load(Relaxed);
        if active == NO_CPU || active == cpu::cpu_hint() {
            return;
        }
        let preempt = PreemptGuard::new();
        let active = self.cpu.load(Relaxed);
        if active != NO_CPU && active != preempt.cpu() {
            self.clear_on(active);
        }
    }

    fn clear_on(&self, cpu: usize) {
        unsafe extern "C" fn clear(vmcs: *mut c_void) {
            // SAFETY: The caller waits, so the VMCS is alive; interrupts are off.
            unsafe { (*vmcs.cast::<Vmcs>()).clear_here() };
        }
        let this: *const Vmcs = self;
        // SAFETY: `clear` is sound with interrupts off on any CPU; the call is waited for.
        unsafe { cpu::call_on(cpu, clear, this.cast_mut().cast()) };
    }

    /// Clears it if it is active on this CPU.
    ///
    /// # Safety
    ///
    /// Interrupts must be off.
    unsafe fn clear_here(&self) {
        let here = cpu::cpu_hint();
        if self.cpu.load(Relaxed) != here {
            return;
        }
        // SAFETY: Active here, interrupts off. Where VMX is off by now there is nothing left to write back.
        let _ = unsafe { ops::vmclear(self.hpa) };
        let current = &percpu::of(here).current;
        if current.load(Relaxed) == self.hpa {
            current.store(percpu::NO_VMCS, Relaxed);
        }
        self.entry.launched.store(0, Relaxed);
        // INVARIANT: On the CPU where it was active. Last, since another CPU may load it from here on.
        self.cpu.store(NO_CPU, SeqCst);
    }

    /// Clears every VMCS that is active on this CPU, which is about to turn VMX off.
    ///
    /// # Safety
    ///
    /// Interrupts must be off.
    pub(crate) unsafe fn clear_all_here() {
        let all = ALL.lock_irqsave();
        let mut p = all.0;
        while !p.is_null() {
            // SAFETY: In the list, so alive while its lock is held; interrupts are off.
            unsafe {
                (*p).clear_here();
                p = (*p).next;
            }
        }
    }
}

impl Drop for Vmcs {
    fn drop(&mut self) {
        if !self.listed {
            return;
        }
        loop {
            let active = self.cpu.load(SeqCst);
            if active == NO_CPU {
                break;
            }
            self.clear_on(active);
        }
        let this: *mut Vmcs = self;
        let mut all = ALL.lock_irqsave();
        // SAFETY: The neighbours are in the list, so alive.
        unsafe {
            if self.prev.is_null() {
                debug_assert!(core::ptr::eq(all.0, this));
                all.0 = self.next;
            } else {
                (*self.prev).next = self.next;
            }
            if !self.next.is_null() {
                (*self.next).prev = self.prev;
            }
        }
        drop(all);
        let _ = &self.page;
    }
}

/// [`CurrentVmcs::state`]: VMX is ours, and all is well.
const FINE: u64 = 0;
/// An access failed; the instructions in `ops` set it.
const FAILED: u64 = 1;
/// VMX is borrowed, and all is well.
const LENT: u64 = 2;

/// A VMCS of ours that is current on this CPU; interrupts stay off while it lives. Whoever loaded it calls
/// [`CurrentVmcs::end`] on every path.
#[must_use]
pub(crate) struct CurrentVmcs<'a> {
    /// Of this CPU.
    percpu: &'static PerCpu,
    /// One of the above: a single comparison tells the common case, at the end of a window.
    state: u64,
    _irq: PhantomData<&'a IrqOff>,
}

impl CurrentVmcs<'_> {
    /// What the module has on this CPU.
    #[inline(always)]
    pub(crate) fn percpu(&self) -> &'static PerCpu {
        self.percpu
    }

    #[inline(always)]
    pub(crate) fn read<W, A>(&mut self, field: Field<W, A>) -> u64 {
        // SAFETY: By the type interrupts are off and a VMCS of ours is current.
        unsafe { ops::vmread(field.encoding(), &mut self.state) }
    }

    /// The same VMCS for a call apart from the window's own code: whatever is called with the window's would keep that out
    /// of registers. Not to be ended; a failed access is not noted.
    #[inline(always)]
    pub(crate) fn apart(&self) -> CurrentVmcs<'_> {
        CurrentVmcs {
            percpu: self.percpu,
            state: FINE,
            _irq: PhantomData,
        }
    }

    /// The field with that encoding; `None` where this CPU has none. Then the VMCS' VM-instruction error is overwritten.
    pub(crate) fn read_if_there(&mut self, encoding: u32) -> Option<u64> {
        let mut failed = 0;
        // SAFETY: As above.
        let value = unsafe { ops::vmread(encoding, &mut failed) };
        (failed == 0).then_some(value)
    }

    #[inline(always)]
    pub(crate) fn write<W>(&mut self, field: Field<W, ReadWrite>, value: u64) {
        // SAFETY: As above; only `setup`, `host_state` and `guest_state` write other than guest registers.
        unsafe { ops::vmwrite(field.encoding(), value, &mut self.state) };
    }

    /// Ends the window for VMX: puts back what was current before, where VMX is borrowed. False when an access failed since
    /// it was loaded.
    #[inline(always)]
    pub(crate) fn end(self, irq: &IrqOff) -> bool {
        // One comparison where VMX is ours and all is well: nothing is to be put back there.
        self.state == FINE || end_otherwise(self.state, irq)
    }
}

#[cold]
#[inline(never)]
fn end_otherwise(state: u64, irq: &IrqOff) -> bool {
    let percpu = percpu::of(irq.cpu());
    if percpu.access.load(Relaxed) == percpu::BORROWED {
        let previous = percpu.previous.load(Relaxed);
        if previous != percpu::NO_VMCS {
            // SAFETY: It was current here when the window began, so it is active here, and KVM clears or frees it only in
            // an interrupt on this CPU; those are off since. Where it fails VMX has gone, and the VMCS with it.
            let _ = unsafe { ops::vmptrld(previous) };
            // KVM does this where another VMCS than before is loaded, and will not see that ours was.
            cpu::branch_prediction_barrier(irq);
        }
    }
    state != FAILED
}
