// SPDX-License-Identifier: GPL-2.0

//! Reads the process' own page table. With interrupts off its tables cannot be freed: Linux frees one only after an
//! interrupt on, or an RCU grace period of, every CPU that could be walking (mm/gup.c, "lockless_pages_from_mm").

use crate::arch::addr::Hva;
use crate::arch::addr::Level;
use crate::arch::cr::cr4;
use crate::arch::host_pte::HostLeaf;
use crate::arch::host_pte::HostPte;
use crate::arch::host_pte::Step;
use crate::arch::host_pte::Walk;
use crate::sys::cpu::IrqOff;
use crate::sys::mem;
use crate::sys::mm::Mm;
use crate::sys::regs;

/// How this machine's page tables are to be read; the same for all processes.
#[derive(Clone, Copy)]
pub(crate) struct Format {
    pat: u64,
    five_levels: bool,
}

impl Format {
    pub(crate) fn of_this_cpu() -> Self {
        Self {
            // Linux without PAT uses the reset value.
            pat: regs::read_msr(crate::arch::msr::IA32_PAT).unwrap_or(0x0007_0406_0007_0406),
            five_levels: regs::cr4() & cr4::LA57 != 0,
        }
    }
}

/// The leaf that maps `hva` for user mode, as it is now. The caller must be a thread of the process.
pub(crate) fn walk(mm: Mm, hva: Hva, format: Format, _: &IrqOff) -> Option<HostLeaf> {
    let mut table = mm.pgd();
    if format.five_levels {
        // User addresses below 2^47 all lie below the first entry of the top level.
        // SAFETY: The top table exists while the process has a thread.
        let entry = HostPte::new(unsafe { table.read_volatile() });
        if !entry.is_present() {
            return None;
        }
        table = mem::phys_to_virt(entry.table_hpa().as_u64()).cast();
    }
    let mut walk = Walk::START;
    for level in Level::DOWN {
        // SAFETY: A table of 512 entries that, with interrupts off, is not freed. Linux writes entries atomically.
        let entry = HostPte::new(unsafe { table.add(level.index(hva.as_u64())).read_volatile() });
        match walk.step(entry, level, format.pat) {
            Step::Absent => return None,
            Step::Leaf(leaf) => return Some(leaf),
            Step::Table(hpa) => table = mem::phys_to_virt(hpa.as_u64()).cast(),
        }
    }
    None
}
