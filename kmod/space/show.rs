// SPDX-License-Identifier: GPL-2.0

//! What a space tells of itself: in `/proc/PID/fdinfo/FD` of its files, and a line in debugfs.
//!
//! The counts come from run pages, which user space can write: they say what a process that does not lie did.

use super::Space;
use super::REGISTRY;
use crate::abi;
use crate::abi::Counters;
use crate::sys::debugfs::Show;
use crate::sys::seq::Seq;
use crate::vcpu::Vcpu;
use core::ffi::CStr;
use core::mem::offset_of;
use core::mem::size_of;
use core::sync::atomic::Ordering::Relaxed;

/// Number of counters of a vCPU.
pub(super) const COUNTERS: usize = size_of::<Counters>() / 8;

/// Those with a name, by their place.
const NAMED: [(&CStr, usize); 10] = [
    (c"entries", offset_of!(Counters, entries) / 8),
    (c"ept-4k", offset_of!(Counters, ept_4k) / 8),
    (c"ept-2m", offset_of!(Counters, ept_2m) / 8),
    (c"ept-around", offset_of!(Counters, ept_around) / 8),
    (c"ept-io", offset_of!(Counters, ept_io) / 8),
    (c"mm-faults", offset_of!(Counters, mm_faults) / 8),
    (c"retries", offset_of!(Counters, retries) / 8),
    (c"invept", offset_of!(Counters, invept) / 8),
    (c"invvpid", offset_of!(Counters, invvpid) / 8),
    (c"migrations", offset_of!(Counters, migrations) / 8),
];

impl Space {
    /// Keeps what a vCPU counted, which is about to go.
    pub(super) fn count_past(&self, vcpu: &Vcpu) {
        for (index, sum) in self.past.iter().enumerate() {
            sum.fetch_add(vcpu.counter(index), Relaxed);
        }
    }

    /// The counters of all vCPUs that it has and had; how many it has. Takes the lock of its vCPUs.
    fn counters(&self) -> ([u64; COUNTERS], u32) {
        let places = self.vcpus.lock();
        let mut sums = [0u64; COUNTERS];
        for (sum, past) in sums.iter_mut().zip(self.past.iter()) {
            *sum = past.load(Relaxed);
        }
        for place in self.places.iter() {
            let vcpu = place.vcpu.load(Relaxed);
            if vcpu.is_null() {
                continue;
            }
            for (index, sum) in sums.iter_mut().enumerate() {
                // SAFETY: Under the lock what stands in a place is alive.
                *sum = sum.wrapping_add(unsafe { (*vcpu).counter(index) });
            }
        }
        (sums, places.count)
    }

    /// The lines of fdinfo.
    pub(crate) fn show(&self, to: &Seq) {
        let (sums, vcpus) = self.counters();
        to.named(c"space", self.number);
        to.named(c"vcpus", vcpus.into());
        to.named(c"slots-free", self.ept.slots_free().into());
        to.named(c"invalidations", self.ept.invalidations());
        to.named(c"flushes", self.ept.translations.flushes());
        for (name, index) in NAMED {
            to.named(name, sums[index]);
        }
        for (reason, count) in sums[..abi::EXIT_REASONS].iter().enumerate() {
            if *count != 0 {
                to.exits(reason as u32, *count);
            }
        }
    }
}

/// The file of debugfs with a line for each space.
pub(crate) struct List;

impl Show for List {
    fn show(to: &Seq) {
        to.text(c"space pid vcpus slots-free invalidations flushes\n");
        let registry = REGISTRY.lock();
        for first in registry.0 {
            let mut at = first;
            while !at.is_null() {
                // SAFETY: By the registry's invariant it is alive, and the lock is held.
                let space = unsafe { &*at };
                let vcpus = space.vcpus.lock().count;
                for number in [
                    space.number,
                    space.pid.into(),
                    vcpus.into(),
                    space.ept.slots_free().into(),
                    space.ept.invalidations(),
                    space.ept.translations.flushes(),
                ] {
                    to.number(number);
                }
                to.text(c"\n");
                // SAFETY: The lock is held.
                at = unsafe { *space.next.get() };
            }
        }
    }
}
