// SPDX-License-Identifier: GPL-2.0

//! Module-wide counters, shown in debugfs (`/sys/kernel/debug/dune/`). All are 0 when no process uses the device, but for
//! those in `since_load/`, which only grow.

use crate::sys::debugfs::Dir;
use core::sync::atomic::AtomicUsize;
use core::sync::atomic::Ordering::Relaxed;

/// Spaces that exist.
pub(crate) static SPACES: AtomicUsize = AtomicUsize::new(0);
/// vCPUs that exist.
pub(crate) static VCPUS: AtomicUsize = AtomicUsize::new(0);
/// VMCS regions, each a page.
pub(crate) static VMCS_PAGES: AtomicUsize = AtomicUsize::new(0);
/// Pages of EPT paging structures.
pub(crate) static EPT_PAGES: AtomicUsize = AtomicUsize::new(0);

/// vCPUs that were made since the module was loaded.
pub(crate) static VCPUS_MADE: AtomicUsize = AtomicUsize::new(0);
/// System calls that vCPUs which are gone had handed to the host loop.
pub(crate) static SYSCALLS: AtomicUsize = AtomicUsize::new(0);
/// Those of them that came without a RUN, behind another.
pub(crate) static SHORTCUTS: AtomicUsize = AtomicUsize::new(0);

/// One of what a counter counts. Holding it as a field counts right in every path, also where a half-made owner is dropped.
pub(crate) struct Counted(&'static AtomicUsize);

impl Counted {
    pub(crate) fn new(counter: &'static AtomicUsize) -> Self {
        counter.fetch_add(1, Relaxed);
        Self(counter)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// Shows them; the inner directory first, because it goes first.
pub(crate) fn show() -> (Dir, Dir) {
    let dir = Dir::new(c"dune", None);
    dir.add(c"spaces", &SPACES);
    dir.add(c"vcpus", &VCPUS);
    dir.add(c"vmcs_pages", &VMCS_PAGES);
    dir.add(c"ept_pages", &EPT_PAGES);
    let since_load = Dir::new(c"since_load", Some(&dir));
    since_load.add(c"vcpus", &VCPUS_MADE);
    since_load.add(c"syscalls", &SYSCALLS);
    since_load.add(c"shortcuts", &SHORTCUTS);
    (since_load, dir)
}
