// SPDX-License-Identifier: GPL-2.0

//! Reads the process' own page table. With interrupts off its tables cannot be freed: Linux frees one only after an
//! interrupt on, or an RCU grace period of, every CPU that could be walking (mm/gup.c, "lockless_pages_from_mm").

use super::tree::ENTRIES;
use crate::arch::addr::Hpa;
use crate::arch::addr::Hva;
use crate::arch::addr::Level;
use crate::arch::cr::cr4;
use crate::arch::host_pte::HostLeaf;
use crate::arch::host_pte::HostPte;
use crate::arch::host_pte::LeafMaker;
use crate::arch::host_pte::Step;
pub(super) use crate::arch::host_pte::Walk;
use crate::sys::cpu::IrqOff;
use crate::sys::mem;
use crate::sys::mm::Mm;
use crate::sys::regs;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;

/// How this machine's page tables are to be read; the same for all processes.
#[derive(Clone, Copy)]
pub(crate) struct Format {
    pub(super) pat: u64,
    /// [`LeafMaker::plain_for`] that.
    pub(super) plain: u64,
    five_levels: bool,
}

impl Format {
    pub(crate) fn of_this_cpu() -> Self {
        // Linux without PAT uses the reset value.
        let pat = regs::read_msr(crate::arch::msr::IA32_PAT).unwrap_or(0x0007_0406_0007_0406);
        Self {
            pat,
            plain: LeafMaker::plain_for(pat),
            five_levels: regs::cr4() & cr4::LA57 != 0,
        }
    }
}

/// A table of the process; Linux writes entries atomically.
type Table = [AtomicU64; ENTRIES];

/// The table that an entry refers to.
///
/// # Safety
///
/// The entry must have been read from the process' page table since interrupts were turned off.
#[inline(always)]
unsafe fn table<'a>(hpa: Hpa, _: &'a IrqOff) -> &'a Table {
    // SAFETY: A table of 512 entries that, with interrupts off, is not freed.
    unsafe { &*mem::phys_to_virt(hpa.as_u64()).cast() }
}

/// The table whose entries cover 512 GiB.
#[inline(always)]
fn top<'a>(mm: Mm, format: Format, irq: &'a IrqOff) -> Option<&'a Table> {
    // SAFETY: The top table exists while the process has a thread, which the caller is.
    let top: &Table = unsafe { &*mm.pgd().cast() };
    if !format.five_levels {
        return Some(top);
    }
    // User addresses below 2^47 all lie below the first entry of the top level.
    let entry = HostPte::new(top[0].load(Relaxed));
    // SAFETY: Just read.
    entry.is_present().then(|| unsafe { table(entry.table_hpa(), irq) })
}

/// Where a walk down to tables of 4 KiB entries got.
pub(crate) enum Lowest<'a> {
    /// The process has nothing there.
    Absent,
    /// A larger leaf is there.
    Large,
    /// The table, and the walk so far.
    Table(&'a Table, Walk),
}

/// The table whose entry for `hva` is of 4 KiB. The caller must be a thread of the process.
#[inline(always)]
pub(crate) fn lowest<'a>(mm: Mm, hva: Hva, format: Format, irq: &'a IrqOff) -> Lowest<'a> {
    let Some(mut at) = top(mm, format, irq) else {
        return Lowest::Absent;
    };
    let mut walk = Walk::START;
    for level in [Level::P512G, Level::Page1G, Level::Page2M] {
        let entry = HostPte::new(at[level.index(hva.as_u64())].load(Relaxed));
        match walk.step(entry, level, format.pat) {
            Step::Absent => return Lowest::Absent,
            Step::Leaf(_) => return Lowest::Large,
            // SAFETY: Just read.
            Step::Table(hpa) => at = unsafe { table(hpa, irq) },
        }
    }
    Lowest::Table(at, walk)
}

/// The leaf that maps `hva` for user mode, as it is now. The caller must be a thread of the process.
pub(crate) fn walk(mm: Mm, hva: Hva, format: Format, irq: &IrqOff) -> Option<HostLeaf> {
    let mut at = top(mm, format, irq)?;
    let mut walk = Walk::START;
    for level in Level::DOWN {
        let entry = HostPte::new(at[level.index(hva.as_u64())].load(Relaxed));
        match walk.step(entry, level, format.pat) {
            Step::Absent => return None,
            Step::Leaf(leaf) => return Some(leaf),
            // SAFETY: Just read.
            Step::Table(hpa) => at = unsafe { table(hpa, irq) },
        }
    }
    None
}
