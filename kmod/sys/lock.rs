// SPDX-License-Identifier: GPL-2.0

//! Spinlocks (linux/spinlock.h), each kind its own lockdep class, and the one mutex of VMX ownership.
//!
//! Lock order: owner mutex, then a space's `vcpus`, then a space's `ept`, then the global list of VMCSs. Alone: the
//! registries of spaces and of users.

use super::bindings;
use core::cell::UnsafeCell;
use core::mem::MaybeUninit;
use core::ops::Deref;
use core::ops::DerefMut;

/// Which lock: decides the lockdep class.
#[derive(Clone, Copy)]
pub(crate) enum Class {
    /// EPT and slots of a space.
    Space,
    /// vCPUs of a space.
    Vcpus,
    /// Module-wide state.
    Global,
    /// Who has how much, and which space is whose.
    Registry,
}

/// Room for a `spinlock_t` of any configuration (lockdep's is 64 bytes); checked in `init`.
#[repr(C, align(8))]
struct Raw([MaybeUninit<u8>; 128]);

/// A spinlock around `T`. Must be initialised by [`SpinLock::init`] at its final address before its first use.
pub(crate) struct SpinLock<T> {
    raw: UnsafeCell<Raw>,
    data: UnsafeCell<T>,
}

// SAFETY: The lock gives one thread at a time access to `data`.
unsafe impl<T: Send> Sync for SpinLock<T> {}
// SAFETY: Sending the lock sends the data.
unsafe impl<T: Send> Send for SpinLock<T> {}

impl<T> SpinLock<T> {
    /// A lock that is not yet usable: call [`SpinLock::init`] where it stays.
    pub(crate) const fn new(data: T) -> Self {
        Self {
            raw: UnsafeCell::new(Raw([MaybeUninit::zeroed(); 128])),
            data: UnsafeCell::new(data),
        }
    }

    /// Makes the lock usable.
    ///
    /// # Safety
    ///
    /// The lock must not move afterwards, and nobody else may use it during the call.
    pub(crate) unsafe fn init(&self, class: Class) {
        // SAFETY: `raw` is large enough, as checked, and by the caller nobody else uses it.
        unsafe {
            assert!(bindings::dune_spinlock_bytes() as usize <= core::mem::size_of::<Raw>());
            let raw = self.raw.get().cast();
            match class {
                Class::Space => bindings::dune_space_lock_init(raw),
                Class::Vcpus => bindings::dune_vcpus_lock_init(raw),
                Class::Global => bindings::dune_global_lock_init(raw),
                Class::Registry => bindings::dune_registry_lock_init(raw),
            }
        }
    }

    /// Takes the lock; preemption is off while the guard lives.
    pub(crate) fn lock(&self) -> Guard<'_, T> {
        // SAFETY: Initialised at this address, by the type's contract.
        unsafe { bindings::dune_spin_lock(self.raw.get().cast()) };
        Guard {
            lock: self,
            flags: None,
        }
    }

    /// Takes the lock if nobody has it; also with interrupts off.
    pub(crate) fn try_lock(&self) -> Option<Guard<'_, T>> {
        // SAFETY: As in `lock`.
        unsafe { bindings::dune_spin_trylock(self.raw.get().cast()) }.then(|| Guard {
            lock: self,
            flags: None,
        })
    }

    /// Takes the lock with interrupts off; for locks that are taken in interrupts or with interrupts off.
    pub(crate) fn lock_irqsave(&self) -> Guard<'_, T> {
        // SAFETY: As in `lock`.
        let flags = unsafe { bindings::dune_spin_lock_irqsave(self.raw.get().cast()) };
        Guard {
            lock: self,
            flags: Some(flags),
        }
    }
}

/// Access to the data of a [`SpinLock`]; dropping releases it.
pub(crate) struct Guard<'a, T> {
    lock: &'a SpinLock<T>,
    flags: Option<usize>,
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: The lock is held.
        unsafe { &*self.lock.data.get() }
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: The lock is held.
        unsafe { &mut *self.lock.data.get() }
    }
}

impl<T> Drop for Guard<'_, T> {
    #[inline(always)]
    fn drop(&mut self) {
        let raw = self.lock.raw.get().cast();
        // SAFETY: The lock is held and was taken in the matching way.
        unsafe {
            match self.flags {
                None => bindings::dune_spin_unlock(raw),
                Some(flags) => bindings::dune_spin_unlock_irqrestore(raw, flags as _),
            }
        }
    }
}

/// Guard of the mutex that serialises who owns VMX on this machine; may sleep.
pub(crate) struct OwnerMutex(());

impl OwnerMutex {
    pub(crate) fn lock() -> Self {
        // SAFETY: A static mutex; called where sleeping is allowed.
        unsafe { bindings::dune_owner_mutex_lock() };
        Self(())
    }
}

impl Drop for OwnerMutex {
    fn drop(&mut self) {
        // SAFETY: Taken in `lock`.
        unsafe { bindings::dune_owner_mutex_unlock() };
    }
}
