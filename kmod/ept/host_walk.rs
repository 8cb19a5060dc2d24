// SPDX-License-Identifier: GPL-2.0

//! Reads the process' own page table. With interrupts off its tables cannot be freed: Linux frees one only after an
//! interrupt on, or an RCU grace period of, every CPU that could be walking (mm/gup.c, "lockless_pages_from_mm").

use super::tree::ENTRIES;
use crate::arch::addr::Hva;
use crate::arch::addr::Level;
use crate::arch::cr::cr4;
use crate::arch::host_pte::HostLeaf;
use crate::arch::host_pte::HostPte;
use crate::arch::host_pte::LeafMaker;
use crate::arch::host_pte::Step;
use crate::arch::host_pte::Walk;
use crate::sys::cpu::IrqOff;
use crate::sys::mem;
use crate::sys::mm::Mm;
use crate::sys::regs;
use core::mem::MaybeUninit;
use core::ptr::addr_of_mut;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;

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

/// EPT leaves for the neighbours of a page of 4 KiB: of the 16 pages that lie around it, in the same table.
pub(crate) struct Around {
    /// Initialised once `is_read`.
    leaves: [MaybeUninit<u64>; Self::PAGES],
    is_read: bool,
}

impl Around {
    /// As many as Linux maps around a fault in a file.
    const PAGES: usize = 16;
    pub(crate) const BYTES: u64 = Self::PAGES as u64 * Level::Page4K.bytes();

    pub(crate) fn new() -> Self {
        let mut this = MaybeUninit::<Self>::uninit();
        // Field by field: for the whole structure the compiler makes a memset.
        // SAFETY: The other field needs no initialisation.
        unsafe {
            addr_of_mut!((*this.as_mut_ptr()).is_read).write(false);
            this.assume_init()
        }
    }

    pub(crate) fn clear(&mut self) {
        self.is_read = false;
    }

    /// By page, 0 where nothing is to be mapped; empty where nothing was read.
    pub(crate) fn leaves(&self) -> &[u64] {
        if !self.is_read {
            return &[];
        }
        // SAFETY: All were written before `is_read` was set.
        unsafe { core::slice::from_raw_parts(self.leaves.as_ptr().cast(), Self::PAGES) }
    }

    /// Reads the entries around the one for `hva` in `table`; `walk` got there.
    ///
    /// # Safety
    ///
    /// `table` must be a table of 512 entries that is not freed meanwhile.
    #[inline(never)]
    unsafe fn read(&mut self, table: *const u64, hva: Hva, walk: Walk, pat: u64) {
        let maker = LeafMaker::new(walk, pat);
        let first = Level::Page4K.index(hva.as_u64()) & !(Self::PAGES - 1);
        for (i, leaf) in self.leaves.iter_mut().enumerate() {
            // SAFETY: By the caller.
            leaf.write(maker.make(HostPte::new(unsafe { table.add(first + i).read_volatile() })));
        }
        self.is_read = true;
    }
}

/// A leaf, and where it was found.
pub(crate) struct Found {
    pub(crate) leaf: HostLeaf,
    /// The entry, in the table where it stands.
    table: *const u64,
    index: usize,
    entry: HostPte,
    /// How far the walk had got.
    above: Walk,
}

impl Found {
    /// Puts leaves of 4 KiB for the neighbours of this one, which is of 4 KiB, where `table`, the EPT's for the same 2 MiB, has
    /// nothing. Gives how many. Interrupts are off since it was found.
    #[inline(never)]
    pub(crate) fn install_around(&self, table: &[AtomicU64; ENTRIES], format: Format) -> u64 {
        let maker = LeafMaker::new(self.above, format.pat);
        let like = maker.like(self.entry);
        let first = self.index & !(Around::PAGES - 1);
        let Some(slots) = table.get(first..).and_then(|slots| slots.first_chunk::<{ Around::PAGES }>()) else {
            return 0;
        };
        // SAFETY: A table of 512 entries, of which `first` and the following are some.
        let entries = unsafe { &*self.table.add(first).cast::<[AtomicU64; Around::PAGES]>() };
        let mut installed = 0u64;
        // One by one, since the compiler makes four times as many instructions of a loop.
        macro_rules! install {
            ($($i:literal)*) => {
                $(
                    let entry = HostPte::new(entries[$i].load(Relaxed));
                    let leaf = match like.make(entry) {
                        Some(leaf) => leaf,
                        None => unlike(maker, entry),
                    };
                    if slots[$i].load(Relaxed) == 0 {
                        slots[$i].store(leaf, Relaxed);
                        installed = installed.wrapping_add((leaf != 0).into());
                    }
                )*
            };
        }
        install!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
        installed
    }
}

#[cold]
#[inline(never)]
fn unlike(maker: LeafMaker, entry: HostPte) -> u64 {
    maker.make(entry)
}

/// The leaf that maps `hva` for user mode, as it is now. The caller must be a thread of the process, and interrupts stay off
/// while the answer is used.
#[inline(always)]
pub(crate) fn find(mm: Mm, hva: Hva, format: Format, _: &IrqOff) -> Option<Found> {
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
        let index = level.index(hva.as_u64());
        // SAFETY: A table of 512 entries that, with interrupts off, is not freed. Linux writes entries atomically.
        let entry = HostPte::new(unsafe { table.add(index).read_volatile() });
        let above = walk;
        match walk.step(entry, level, format.pat) {
            Step::Absent => return None,
            Step::Leaf(leaf) => {
                return Some(Found {
                    leaf,
                    table,
                    index,
                    entry,
                    above,
                })
            }
            Step::Table(hpa) => table = mem::phys_to_virt(hpa.as_u64()).cast(),
        }
    }
    None
}

/// The leaf that maps `hva` for user mode, as it is now; if it is of 4 KiB, with what is wanted around it. The caller must
/// be a thread of the process.
pub(crate) fn walk(mm: Mm, hva: Hva, format: Format, around: Option<&mut Around>, irq: &IrqOff) -> Option<HostLeaf> {
    let found = find(mm, hva, format, irq)?;
    if let (Level::Page4K, Some(around)) = (found.leaf.level, around) {
        // SAFETY: The table in which the entry was found, and interrupts are off.
        unsafe { around.read(found.table, hva, found.above, format.pat) };
    }
    Some(found.leaf)
}
