// SPDX-License-Identifier: GPL-2.0

//! Filling the EPT on a violation, and emptying it when Linux says so.
//!
//! The retry protocol is KVM's (virt/kvm/kvm_main.c, "mmu_invalidate_seq"): read the sequence count, walk the host's page
//! table without a lock, then, under the lock, install only if no invalidation of the range is going on and none has ended
//! since the count was read. docs/architecture.md, "Life of an EPT violation".

use super::at_once::AtOnce;
use super::host_walk;
use super::host_walk::Format;
use super::invalidate::Translations;
use super::tree::Install;
use super::tree::PageCache;
use super::tree::Tree;
use crate::arch::addr::Gpa;
use crate::arch::addr::Hva;
use crate::arch::addr::Level;
use crate::arch::ept::EptEntry;
use crate::arch::ept::MemType;
use crate::arch::host_pte::HostLeaf;
use crate::arch::slots;
use crate::arch::slots::AssignError;
use crate::arch::slots::SlotTable;
use crate::sys::cpu::IrqOff;
use crate::sys::lock::Class;
use crate::sys::lock::SpinLock;
use crate::sys::mem::Pile;
use crate::sys::mem::ZeroedSlice;
use crate::sys::mm::FaultIn;
use crate::sys::mm::Mm;
use crate::sys::thread;
use crate::sys::thread::Pending;
use core::ops::Range;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Acquire;
use core::sync::atomic::Ordering::Relaxed;
use core::sync::atomic::Ordering::Release;
use kernel::prelude::*;

/// What the CPUs of this machine let an EPT do.
#[derive(Clone, Copy)]
pub(crate) struct Traits {
    pub(crate) accessed_dirty: bool,
    pub(crate) page_2m: bool,
    /// Executable 2 MiB leaves are safe on this CPU.
    pub(crate) execute_2m: bool,
    pub(crate) format: Format,
}

/// A guest's access to memory.
#[derive(Clone, Copy)]
pub(crate) struct Access {
    pub(crate) write: bool,
    pub(crate) execute: bool,
}

impl Access {
    /// Bits that an EPT leaf must have for it.
    fn wanted(self) -> u64 {
        EptEntry::READ | if self.write { EptEntry::WRITE } else { 0 } | if self.execute { EptEntry::EXECUTE } else { 0 }
    }
}

/// What became of an EPT violation.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The EPT allows the access now.
    Mapped(Mapped),
    /// Somebody else wants the CPU, or the range is being invalidated: enter again and see.
    TryAgain,
    /// A native access has to settle it.
    Touch(Hva),
    /// The process may not execute there.
    Refused(Hva),
    /// No slot is there.
    NoSlot,
}

/// What was installed, for the counters.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mapped(u64);

/// One word, so that it is returned in a register.
impl Mapped {
    const LARGE: u64 = 1 << 62;
    /// Where the leaf's memory type stands; as an exclusive or with write-back's, so that 0 is the usual one.
    const TYPE_SHIFT: u32 = 59;
    const TYPE: u64 = 7 << Self::TYPE_SHIFT;
    const USUAL: u64 = MemType::Wb as u64;

    /// `leaf`, of `level`, was installed; `around`: neighbours that came along, below 2^59.
    #[inline(always)]
    pub(super) fn new(level: Level, leaf: EptEntry, around: u64) -> Self {
        let large = if level == Level::Page2M { Self::LARGE } else { 0 };
        let mem_type = (leaf.as_u64() & EptEntry::MEM_TYPE_MASK) >> EptEntry::MEM_TYPE_SHIFT;
        Self(around | large | (mem_type ^ Self::USUAL) << Self::TYPE_SHIFT)
    }

    /// A leaf of 2 MiB.
    pub(crate) fn is_large(self) -> bool {
        self.0 & Self::LARGE != 0
    }

    /// Another memory type than write-back.
    pub(crate) fn is_io(self) -> bool {
        self.0 & Self::TYPE != 0
    }

    /// The leaf's memory type, as the SDM numbers it.
    pub(crate) fn mem_type(self) -> u32 {
        (((self.0 & Self::TYPE) >> Self::TYPE_SHIFT) ^ Self::USUAL) as u32
    }

    /// Neighbours that came along.
    pub(crate) fn around(self) -> u64 {
        self.0 & !(Self::LARGE | Self::TYPE)
    }

    /// A leaf of 4 KiB of write-back memory, and [`Self::around`].
    pub(crate) fn is_plain(self) -> bool {
        self.0 & (Self::LARGE | Self::TYPE) == 0
    }
}

/// What a fault did on its way, for the counters.
#[derive(Default)]
pub(crate) struct Effort {
    pub(crate) mm_faults: u64,
    pub(crate) retries: u64,
}

/// Protected by the space's lock.
pub(super) struct Locked {
    /// None: the address space is gone, and nothing is installed any more.
    pub(super) tree: Option<Tree>,
    pub(super) slots: SlotTable<ZeroedSlice<u32>>,
    /// Invalidations that have begun and not ended.
    pub(super) invalidating: usize,
    /// What they cover, together.
    range: Range<u64>,
}

/// A space's EPT with its slots.
pub(crate) struct Ept {
    pub(super) lock: SpinLock<Locked>,
    /// Counts ended invalidations; written under the lock.
    sequence: AtomicU64,
    pub(crate) translations: Translations,
    pub(super) traits: Traits,
    root: u64,
}

impl Ept {
    /// An empty EPT for GPAs of `gpa_bits` bits, which the caller has checked. Not usable before [`Ept::init`]. ENOMEM.
    pub(crate) fn new(gpa_bits: u32, traits: Traits) -> Result<Self> {
        let tree = Tree::new()?;
        let storage = ZeroedSlice::new(slots::words_for(slots::MIN_CAPACITY))?;
        let root = crate::arch::ept::eptp(tree.root(), traits.accessed_dirty);
        let slots = SlotTable::new(storage, gpa_bits).ok_or(EINVAL)?;
        Ok(Self {
            lock: SpinLock::new(Locked {
                tree: Some(tree),
                slots,
                invalidating: 0,
                range: 0..0,
            }),
            sequence: AtomicU64::new(0),
            translations: Translations::new()?,
            traits,
            root,
        })
    }

    /// # Safety
    ///
    /// As [`SpinLock::init`].
    pub(crate) unsafe fn init(&self) {
        // SAFETY: By the caller.
        unsafe { self.lock.init(Class::Space) };
    }

    /// The EPT pointer for a VMCS.
    pub(crate) fn eptp(&self) -> u64 {
        self.root
    }

    /// Invalidations by Linux, and slots given back, that have ended.
    pub(crate) fn invalidations(&self) -> u64 {
        self.sequence.load(Relaxed)
    }

    pub(crate) fn slots_free(&self) -> u32 {
        self.lock.lock().slots.free()
    }

    /// The GPA of `hva`, giving its GiB a slot if it has none. ENOSPC, ENOMEM.
    pub(crate) fn map_slot(&self, hva: Hva, wanted: Option<Gpa>) -> Result<Gpa> {
        let mut spare: Option<ZeroedSlice<u32>> = None;
        loop {
            let mut locked = self.lock.lock();
            if let Some(storage) = spare.take() {
                // Somebody else may have grown it meanwhile: then it refuses, and gives the storage back. Either way what
                // is left over is freed after the lock is.
                let left_over = locked.slots.grow(storage);
                drop(locked);
                drop(left_over);
                locked = self.lock.lock();
            }
            let given = match wanted {
                None => locked.slots.assign(hva),
                Some(gpa) => locked.slots.assign_at(hva, gpa).map(|()| gpa),
            };
            let needed = match given {
                Ok(gpa) => return Ok(gpa),
                Err(AssignError::OutOfSlots) => return Err(ENOSPC),
                Err(AssignError::Taken) => return Err(EEXIST),
                Err(AssignError::NoSuchSlot) => return Err(EINVAL),
                Err(AssignError::NeedStorage { words }) => words,
            };
            drop(locked);
            spare = Some(ZeroedSlice::new(needed)?);
        }
    }

    /// Settles an EPT violation at `gpa`; may sleep. `absent`: where [`Ept::fault_at_once`] found no page that allows the
    /// access. The caller is a thread of the process. ENOMEM.
    // Apart from the run loop, whose other exits it would slow down.
    #[inline(never)]
    pub(crate) fn fault(
        &self,
        mm: Mm,
        gpa: Gpa,
        absent: Option<Hva>,
        access: Access,
        effort: &mut Effort,
    ) -> Result<Fault> {
        if let Some(hva) = absent {
            match mm.fault_in(hva.as_u64(), access.write, access.execute) {
                FaultIn::Done => effort.mm_faults += 1,
                FaultIn::NotNow => return Ok(Fault::Touch(hva)),
                FaultIn::NotExecutable => return Ok(Fault::Refused(hva)),
            }
            // Linux has just looked around itself, where that makes sense.
            if let AtOnce::Mapped(mapped) = self.fault_at_once(mm, gpa, access.wanted(), false, &IrqOff::new()) {
                return Ok(Fault::Mapped(mapped));
            }
        }
        self.fault_slowly(mm, gpa, access, effort)
    }

    #[inline(never)]
    fn fault_slowly(&self, mm: Mm, gpa: Gpa, access: Access, effort: &mut Effort) -> Result<Fault> {
        let mut pages = PageCache::new();
        // Linux may take a page away again before we look: after some rounds let the host loop try.
        let mut rounds = 0;
        loop {
            // Before the slot is looked up, which may go meanwhile, too.
            let mut sequence = self.sequence.load(Acquire);
            let Some(hva) = self.lock.lock().slots.hva_of(gpa) else {
                return Ok(Fault::NoSlot);
            };
            crate::sys::knob_slot_delay();
            if cfg!(dune_mutate_slot) {
                sequence = self.sequence.load(Acquire);
            }
            let leaf = host_walk::walk(mm, hva, self.traits.format, &IrqOff::new());
            let Some(leaf) = leaf.filter(|leaf| allows(leaf, access)) else {
                rounds += 1;
                if rounds > 4 {
                    return Ok(Fault::Touch(hva));
                }
                match mm.fault_in(hva.as_u64(), access.write, access.execute) {
                    FaultIn::Done => effort.mm_faults += 1,
                    FaultIn::NotNow => return Ok(Fault::Touch(hva)),
                    FaultIn::NotExecutable => return Ok(Fault::Refused(hva)),
                }
                continue;
            };
            crate::sys::knob_fault_delay();
            match self.install(gpa, hva, leaf, sequence, &mut pages) {
                Installed::Done(mapped) => return Ok(Fault::Mapped(mapped)),
                Installed::NeedPages => pages.fill()?,
                Installed::Raced => {
                    effort.retries += 1;
                    match thread::pending() {
                        Pending::Nothing => core::hint::spin_loop(),
                        _ => return Ok(Fault::TryAgain),
                    }
                }
                Installed::Dead => return Ok(Fault::Touch(hva)),
            }
        }
    }

    fn install(&self, gpa: Gpa, hva: Hva, leaf: HostLeaf, sequence: u64, pages: &mut PageCache) -> Installed {
        let whole = self.level_for(&leaf);
        let mut tables = Pile::new();
        let mut guard = self.lock.lock();
        let locked = &mut *guard;
        let bytes = whole.bytes();
        let start = hva.align_down(bytes).as_u64();
        if !cfg!(dune_mutate_retry) && self.has_raced(locked, start..start + bytes, sequence) {
            return Installed::Raced;
        }
        // The slot may have gone to another GiB: no invalidation of this one would find the leaf.
        if !cfg!(dune_mutate_slot) && locked.slots.hva_of(gpa) != Some(hva) {
            return Installed::Raced;
        }
        let Some(tree) = &mut locked.tree else {
            return Installed::Dead;
        };
        let piece = leaf.piece(hva, whole);
        let entry = EptEntry::leaf(piece.hpa, whole, piece.perms(), piece.mem_type);
        let result = tree.install(gpa, entry, whole, pages);
        let mapped = Mapped::new(whole, entry, 0);
        if matches!(result, Install::Blocked) {
            // A larger leaf than the host has: its notifier will have zapped it, but do not depend on that.
            let start = gpa.align_down(Level::Page2M.bytes()).as_u64();
            tree.zap(start..start + Level::Page2M.bytes(), &mut tables);
        }
        // A flush comes before the lock goes: else another invalidation that finds nothing left to zap would return, and
        // let Linux free a page that some CPU can still reach.
        match result {
            Install::Installed | Install::Present => Installed::Done(mapped),
            Install::Replaced => {
                self.translations.invalidate();
                Installed::Done(mapped)
            }
            Install::ReplacedTable(table) => {
                self.translations.invalidate();
                drop(guard);
                // Only now: no CPU walks it any more.
                drop(table);
                Installed::Done(mapped)
            }
            Install::Blocked => {
                self.translations.invalidate();
                drop(guard);
                drop(tables);
                Installed::Raced
            }
            Install::NeedPages => Installed::NeedPages,
        }
    }

    /// Size of the EPT leaf for a host leaf: never larger than the host's.
    pub(super) fn level_for(&self, leaf: &HostLeaf) -> Level {
        let large = leaf.level != Level::Page4K
            && self.traits.page_2m
            && leaf.mem_type == MemType::Wb
            && (self.traits.execute_2m || !leaf.executable);
        if large {
            Level::Page2M
        } else {
            Level::Page4K
        }
    }

    fn has_raced(&self, locked: &Locked, range: Range<u64>, sequence: u64) -> bool {
        let going_on = locked.invalidating > 0 && locked.range.start < range.end && range.start < locked.range.end;
        going_on || self.sequence.load(Acquire) != sequence
    }

    /// An invalidation of `range` begins: nothing of it stays, nothing comes until it ends. `may_sleep`: between slots.
    /// Says whether there was anything.
    pub(crate) fn invalidate_start(&self, range: Range<u64>, may_sleep: bool) -> bool {
        let mut locked = self.lock.lock();
        locked.invalidating += 1;
        locked.range = if locked.invalidating == 1 {
            range.clone()
        } else {
            locked.range.start.min(range.start)..locked.range.end.max(range.end)
        };
        drop(locked);
        let found = self.zap(&range, may_sleep);
        crate::sys::knob_invalidate_delay();
        found
    }

    /// Zaps and flushes the range, slot by slot, so that the lock is not held for longer than one slot takes. Says whether
    /// there was anything.
    fn zap(&self, range: &Range<u64>, may_sleep: bool) -> bool {
        /// A range of more GiBs is taken by the slots that there are.
        const FEW: u64 = 4;
        let first = range.start / crate::abi::SLOT_BYTES;
        let last = range.end.saturating_sub(1) / crate::abi::SLOT_BYTES;
        let by_gib = last.saturating_sub(first) < FEW;
        // A slot that comes now has nothing installed in the range, one that goes was emptied.
        let mut at = if by_gib { first } else { 1 };
        let mut any = false;
        loop {
            let mut tables = Pile::new();
            let mut guard = self.lock.lock();
            let locked = &mut *guard;
            let slot = if by_gib {
                if at > last {
                    return any;
                }
                Hva::new(at * crate::abi::SLOT_BYTES).and_then(|hva| Some((hva, locked.slots.lookup(hva)?)))
            } else {
                if at >= locked.slots.end().into() {
                    return any;
                }
                Gpa::new(at * crate::abi::SLOT_BYTES).and_then(|gpa| Some((locked.slots.hva_of(gpa)?, gpa)))
            };
            let found = match (slot, &mut locked.tree) {
                (Some((hva, gpa)), Some(tree)) => {
                    let (hva, gpa) = (hva.as_u64(), gpa.as_u64());
                    let start = range.start.max(hva);
                    let end = range.end.min(hva + crate::abi::SLOT_BYTES);
                    start < end && tree.zap(gpa + (start - hva)..gpa + (end - hva), &mut tables)
                }
                _ => false,
            };
            any |= found;
            if found {
                if cfg!(dune_mutate_flush) {
                    drop(guard);
                    crate::sys::knob_flush_delay();
                    self.translations.invalidate();
                } else {
                    // Before the lock goes: see `install`.
                    crate::sys::knob_flush_delay();
                    self.translations.invalidate();
                    drop(guard);
                }
            } else {
                drop(guard);
            }
            drop(tables);
            at += 1;
            if may_sleep {
                thread::reschedule();
            }
        }
    }

    /// It ends: what was walked before may not be installed any more.
    pub(crate) fn invalidate_end(&self) {
        let mut locked = self.lock.lock();
        self.sequence.fetch_add(1, Release);
        locked.invalidating -= 1;
    }

    /// Whether the range, of a page or few, was accessed by a guest since that was last cleared.
    pub(crate) fn young(&self, range: Range<u64>, clear: bool, flush: bool) -> bool {
        let mut tables = Pile::new();
        let mut guard = self.lock.lock();
        let locked = &mut *guard;
        let Some(tree) = &mut locked.tree else {
            return false;
        };
        let mut young = false;
        let mut at = range.start;
        while at < range.end {
            let next = ((at / crate::abi::SLOT_BYTES) + 1) * crate::abi::SLOT_BYTES;
            if let Some(gpa) = Hva::new(at).and_then(|hva| locked.slots.lookup(hva)) {
                let gpas = gpa.as_u64()..gpa.as_u64() + (range.end.min(next) - at);
                young |= if self.traits.accessed_dirty {
                    tree.is_young(gpas, clear)
                } else if clear {
                    // Without accessed bits an entry that is there was used since it was last taken away: take it away.
                    tree.zap(gpas, &mut tables)
                } else {
                    tree.lookup(gpa).is_some()
                };
            }
            at = next;
        }
        // Before the lock goes: see `install`. An entry that was taken away is flushed in any case.
        if young && clear && (flush || !self.traits.accessed_dirty) {
            self.translations.invalidate();
        }
        drop(guard);
        drop(tables);
        young
    }

    /// The first slot behind that of `after` in which something may be mapped: its GPA and HVA.
    pub(crate) fn slot_behind(&self, after: Gpa) -> Option<(Gpa, Hva)> {
        let locked = self.lock.lock();
        let first = after.as_u64() / crate::abi::SLOT_BYTES + 1;
        (first..locked.slots.end().into()).find_map(|slot| {
            let gpa = Gpa::new(slot * crate::abi::SLOT_BYTES)?;
            Some((gpa, locked.slots.hva_of(gpa)?))
        })
    }

    /// Takes the slot of `hva`'s GiB back; says whether it had one. The caller sees to it that nothing is mapped there in
    /// the process, and nothing will be meanwhile.
    pub(crate) fn unmap_slot(&self, hva: Hva) -> bool {
        let mut tables = Pile::new();
        let mut guard = self.lock.lock();
        let locked = &mut *guard;
        let Some(gpa) = locked.slots.release(hva) else {
            return false;
        };
        // A fault that found the slot before and has not installed its leaf yet must not do so now.
        self.sequence.fetch_add(1, Release);
        if let Some(tree) = &mut locked.tree {
            tree.zap(gpa.as_u64()..gpa.as_u64() + crate::abi::SLOT_BYTES, &mut tables);
        }
        // Also where nothing was mapped: the guest's translations of its own tables go, too (docs/abi.md).
        self.translations.invalidate();
        drop(guard);
        true
    }

    /// The address space goes away, and no vCPU will run any more: drop everything for good. May sleep.
    pub(crate) fn kill(&self) {
        let tree = self.lock.lock().tree.take();
        self.translations.invalidate();
        // The lock is free: this takes a while.
        drop(tree);
    }
}

enum Installed {
    Done(Mapped),
    NeedPages,
    Raced,
    Dead,
}

#[inline(always)]
pub(super) fn allows(leaf: &HostLeaf, access: Access) -> bool {
    (!access.write || leaf.writable_and_dirty) && (!access.execute || leaf.executable)
}
