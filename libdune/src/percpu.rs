// SPDX-License-Identifier: MIT OR Apache-2.0

//! The per-thread block: descriptor tables, and what assembly finds by masking RSP.

use core::cell::UnsafeCell;
use core::ptr;
use core::sync::atomic::AtomicPtr;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::AtomicUsize;
use core::sync::atomic::Ordering::Relaxed;

use dune_abi::Info;
use dune_abi::RunPage;
use dune_abi::Segment;
use dune_abi::Sregs;

use crate::cpl3;
use crate::device::Vcpu;
use crate::hook;
use crate::layout;
use crate::paging;
use crate::paging::Here;
use crate::process;
use crate::process::Process;
use crate::trap;

/// Selectors in Linux' order: STAR stays the host's.
pub(crate) const KERNEL_CS: u16 = 0x10;
pub(crate) const KERNEL_DS: u16 = 0x18;
pub(crate) const TSS: u16 = 0x40;
pub(crate) const USER_DS: u16 = 0x2b;
pub(crate) const USER_CS: u16 = 0x33;

/// VMX access rights (SDM, "Guest Register State").
const CODE_64: u32 = 0xa09b;
const DATA: u32 = 0xc093;
const DPL3: u32 = 3 << 5;

/// A flat segment.
pub(crate) fn flat(selector: u16, access_rights: u32, base: u64) -> Segment {
    Segment {
        base,
        limit: u32::MAX,
        access_rights,
        selector,
        ..Segment::default()
    }
}

/// A flat data segment with a base, as FS and GS are.
pub(crate) fn based(base: u64) -> Segment {
    flat(0, DATA, base)
}

/// The same system registers, at CPL0.
pub(crate) fn at_cpl0(sregs: Sregs) -> Sregs {
    Sregs {
        cs: flat(KERNEL_CS, CODE_64, 0),
        ss: flat(KERNEL_DS, DATA, 0),
        ..sregs
    }
}

/// The same system registers, at CPL3.
pub(crate) fn at_cpl3(sregs: Sregs) -> Sregs {
    Sregs {
        cs: flat(USER_CS, CODE_64 | DPL3, 0),
        ss: flat(USER_DS, DATA | DPL3, 0),
        ..sregs
    }
}

const CR4_UMIP: u64 = 1 << 11;
const CR4_FSGSBASE: u64 = 1 << 16;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;

/// What of CR4 protects CPL0 from CPL3.
pub(crate) const PROTECTION: u64 = CR4_SMEP | CR4_SMAP;

/// CR4 with which Dune threads start: what protects CPL0 from CPL3 is on where the CPU has it.
pub(crate) fn cr4(info: &Info) -> u64 {
    const WANTED: u64 = CR4_UMIP | CR4_SMEP | CR4_SMAP | process::CR4_PCIDE | process::CR4_PKE;
    info.cr4 | info.cr4_guest_owned & WANTED
}

/// Last byte of a 64-bit TSS (SDM, "TSS Descriptor in 64-bit mode").
pub(crate) const TSS_LIMIT: u32 = 0x67;

/// Flat segments, accessed, in Linux' order: null, KERNEL32_CS, KERNEL_CS, KERNEL_DS, USER32_CS, USER_DS, USER_CS.
const SEGMENTS: [u64; 7] = [
    0,
    0x00cf_9b00_0000_ffff,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_fb00_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
];

/// Entries of the GDT: the segments, a free one, the TSS' two.
pub(crate) const GDT_ENTRIES: usize = 10;

/// Vectors that INT n may raise at CPL3.
const FROM_CPL3: [usize; 3] = [3, 4, 0x80];

/// Global descriptor table.
#[repr(C, align(16))]
pub(crate) struct Gdt(pub [u64; GDT_ENTRIES]);

/// Interrupt descriptor table; an entry is two words.
#[repr(C, align(16))]
pub(crate) struct Idt(pub [[u64; 2]; 256]);

/// 64-bit task-state segment, in words of 4 bytes because its fields are not aligned to 8.
#[repr(C, align(16))]
pub(crate) struct Tss(pub [u32; 26]);

/// See [`Block::signal`]; else that is 0.
pub(crate) const SIGNAL_WAITS: u32 = 2;

/// What is at the start of the block.
#[repr(C)]
pub(crate) struct Block {
    /// The block itself: so it begins as a `trap::Thread` does.
    pub own: *const Block,
    /// Bytes that XSAVE writes, rounded up to 64.
    pub fpu_bytes: u64,
    /// 1: XSAVE, 0: FXSAVE.
    pub has_xsave: u64,
    /// Where frames of exceptions begin that interrupt no handler.
    pub first_top: u64,
    /// Where code begins that page faults do not go straight from to a handler.
    pub inner_start: u64,
    /// Last byte of it, counted from there. Without a handler for page faults, or where there is more to look at before it is
    /// called than `trap::stub` does: all of memory.
    pub inner_last: AtomicU64,
    /// As long as it does not.
    pub inner_bytes: u64,
    /// [`SIGNAL_WAITS`]: a signal waits for the trap entry to be done with its interrupt stack.
    pub signal: AtomicU32,
    /// Why CALL_FATAL was made: a `trap::Fatal`.
    pub fatal: AtomicU32,
    /// A report is under way.
    pub reporting: AtomicU32,
    /// 1: CR4.FSGSBASE is set.
    pub has_fsgsbase: u32,
    /// 1: CR4.SMAP is set.
    pub has_smap: u32,
    /// The detail of a report.
    pub fatal_detail: AtomicU64,
    /// Where SYSCALL from CPL3 finds CPL0's stack.
    pub user_slot: *const cpl3::Slot,
    /// The ways to CPL3 and back, of this CPU.
    pub user_ways: cpl3::Ways,
    /// What it finds there while nobody waits for CPL3.
    pub user_idle: cpl3::Idle,
    /// CPL3's registers, from the host loop to the way out.
    pub user_taken: UnsafeCell<cpl3::Taken>,
    pub run: *mut RunPage,
    /// Number of the vCPU.
    pub vcpu: AtomicU32,
    pub process: *const Process,
    /// The page table that the thread has.
    pub here: Here,
    /// Who waits for code that may end by an exception.
    pub waiting: trap::escape::Waiting,
    /// The innermost scope of exception handlers that the thread has open, or null.
    pub scope: AtomicPtr<trap::Scope>,
    /// Hooks of the thread's system calls.
    pub hooks: hook::Pair,
    /// Calls of [`Thread::with_current`](crate::Thread::with_current) under way.
    pub lent: AtomicU32,
    /// Handlers by vector, `trap::Handler` or 0.
    pub handlers: [AtomicUsize; 256],
    pub gdt: Gdt,
    pub tss: Tss,
    pub idt: Idt,
}

const _: () = assert!(size_of::<Block>() <= layout::IST - layout::PAGE);

/// A token of the thread is in somebody's hands, until this is dropped.
pub(crate) struct Lent<'b>(&'b Block);

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        self.0.lent.fetch_sub(1, Relaxed);
    }
}

impl Block {
    pub fn lend(&self) -> Lent<'_> {
        self.lent.fetch_add(1, Relaxed);
        Lent(self)
    }

    pub fn is_lent(&self) -> bool {
        self.lent.load(Relaxed) != 0
    }

    /// Writes the block of a fresh area, for a thread that starts with page table `table`. `maker` is the thread that
    /// made this one.
    ///
    /// # Safety
    ///
    /// `area` must be a fresh area of `process`.
    pub unsafe fn write(area: u64, process: *const Process, table: u16, maker: Option<&Self>) -> *mut Self {
        let block = area as *mut Self;
        // SAFETY: The caller's; the area is zeroed but for the IDT, which is a value of every field, and nobody else sees it.
        unsafe {
            let fpu = (*process).fpu;
            (*block).own = block;
            (*block).fpu_bytes = fpu.bytes;
            (*block).first_top = area + (layout::HANDLERS + layout::HANDLER_BYTES) as u64 - fpu.bytes;
            let (start, end) = inner_code();
            (*block).inner_start = start;
            (*block).inner_bytes = end - start;
            (*block).has_xsave = fpu.has_xsave.into();
            (*block).process = process;
            (&raw mut (*block).here).write(paging::start_thread(&*process, table));
            let has_fsgsbase = (*process).cr4 & CR4_FSGSBASE != 0;
            (*block).has_fsgsbase = has_fsgsbase.into();
            (*block).user_ways = cpl3::Ways::new(fpu.has_xsave, has_fsgsbase);
            (*block).has_smap = ((*process).cr4 & CR4_SMAP != 0).into();
            let slot = cpl3::slot((*process).index(area));
            (*block).user_slot = slot;
            (*block).user_idle[2] = ptr::from_ref(slot) as u64;
            slot.rsp.store(cpl3::idle_rsp(&*block), Relaxed);
            if let Some(maker) = maker {
                for (new, old) in (*block).handlers.iter().zip(&maker.handlers) {
                    new.store(old.load(Relaxed), Relaxed);
                }
            }
            (&raw mut (*block).gdt).write(Gdt::new(&raw const (*block).tss as u64));
            (&raw mut (*block).tss).write(Tss::new(
                area + layout::IST_TOP as u64,
                area + layout::DOUBLE_TOP as u64,
            ));
            Idt::write(
                &raw mut (*block).idt,
                trap::stubs().0,
                trap::page_fault_entry(fpu.has_xsave),
            );
            trap::update_plain(&*block);
            // One word below is the assembly's own, and keeps the stack aligned.
            let stack = area + layout::HOOK_TOP as u64 - fpu.bytes - 8;
            hook::start(&*block, stack, maker.map(|maker| &maker.hooks));
        }
        block
    }

    /// Says which vCPU the thread has.
    ///
    /// # Safety
    ///
    /// The block must be the calling thread's, and the thread outside Dune mode.
    pub unsafe fn set_vcpu(block: *mut Self, vcpu: &Vcpu) {
        // SAFETY: The caller's.
        unsafe {
            (*block).run = vcpu.run;
            (*block).vcpu.store(vcpu.number, Relaxed);
        }
    }

    pub fn gdt_address(&self) -> u64 {
        &raw const self.gdt as u64
    }

    pub fn idt_address(&self) -> u64 {
        &raw const self.idt as u64
    }

    pub fn tss_address(&self) -> u64 {
        &raw const self.tss as u64
    }

    /// LSTAR of the thread.
    pub fn syscall_entry(&self) -> u64 {
        cpl3::entry(self.process().index(ptr::from_ref(self) as u64))
    }

    pub fn slot(&self) -> &'static cpl3::Slot {
        // SAFETY: Written by `write`.
        unsafe { &*self.user_slot }
    }

    /// What the Dune threads of this process share.
    pub fn process(&self) -> &Process {
        // SAFETY: The thread of this block is counted in it.
        unsafe { &*self.process }
    }
}

/// The trap entry and the ways to CPL3, with whatever the linker put between them.
fn inner_code() -> (u64, u64) {
    [trap::stubs(), cpl3::code()]
        .into_iter()
        .fold((u64::MAX, 0), |all, code| (all.0.min(code.0), all.1.max(code.1)))
}

impl Gdt {
    /// The table with a busy TSS at `tss`.
    pub fn new(tss: u64) -> Self {
        let mut entries = [0; GDT_ENTRIES];
        entries[..SEGMENTS.len()].copy_from_slice(&SEGMENTS);
        let limit = u64::from(TSS_LIMIT);
        // Present, busy 64-bit TSS.
        entries[8] = limit | (tss & 0xff_ffff) << 16 | 0x8b << 40 | (tss >> 24 & 0xff) << 56;
        entries[9] = tss >> 32;
        Self(entries)
    }
}

impl Tss {
    /// A TSS with two interrupt stacks and no I/O bitmap.
    pub fn new(ist1: u64, ist2: u64) -> Self {
        let mut words = [0; 26];
        let mut set = |index: usize, value: u64| {
            words[index] = value as u32;
            words[index + 1] = (value >> 32) as u32;
        };
        // RSP0 is not used, every gate names an IST; IST1 is at byte 36.
        set(1, ist1);
        set(9, ist1);
        set(11, ist2);
        words[25] = (TSS_LIMIT + 1) << 16;
        Self(words)
    }
}

impl Idt {
    /// Writes interrupt gates to the stubs at `stubs`, #PF's to `page_fault`: all on IST 1, #DF on IST 2; #BP, #OF and 32-bit
    /// system calls also from CPL3. In place: a copy of 4 KiB is what making a thread would cost besides.
    ///
    /// # Safety
    ///
    /// `idt` must be writable, and nobody else's.
    pub unsafe fn write(idt: *mut Self, stubs: u64, page_fault: u64) {
        const GATE: u64 = (KERNEL_CS as u64) << 16 | 1 << 32 | 0x8e << 40;
        const DPL3: u64 = 3 << 45;
        let to = |target: u64| [GATE | target & 0xffff | (target & 0xffff_0000) << 32, target >> 32];
        // SAFETY: The caller's.
        let gates = unsafe { &mut (*idt).0 };
        let mut target = stubs;
        for gate in gates.iter_mut() {
            *gate = to(target);
            target += trap::STUB_BYTES;
        }
        for vector in FROM_CPL3 {
            gates[vector][0] |= DPL3;
        }
        gates[usize::from(trap::Vector::PF.0)] = to(page_fault);
        gates[DOUBLE_FAULT][0] ^= (1 ^ 2) << 32;
    }
}

/// Vector of #DF.
const DOUBLE_FAULT: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tss_descriptor_holds_the_address() {
        let base = 0x7f12_3456_7890;
        let gdt = Gdt::new(base);
        let low = gdt.0[8];
        let found = (low >> 16 & 0xff_ffff) | (low >> 56) << 24 | gdt.0[9] << 32;
        assert_eq!(found, base);
        assert_eq!(low & 0xffff, 0x67);
        assert_eq!(low >> 40 & 0xff, 0x8b);
    }

    #[test]
    fn segments_are_accessed_and_in_linux_order() {
        let gdt = Gdt::new(0);
        for segment in &gdt.0[1..7] {
            assert_eq!(segment >> 40 & 1, 1);
        }
        assert_eq!(gdt.0[usize::from(KERNEL_CS) / 8] >> 53 & 1, 1, "KERNEL_CS is 64-bit");
        assert_eq!(gdt.0[6] >> 45 & 3, 3, "USER_CS has DPL 3");
    }

    #[test]
    fn tss_holds_the_stacks_where_the_cpu_looks() {
        let tss = Tss::new(0x1122_3344_5566_7780, 0x99aa_bbcc_ddee_ff00);
        // SAFETY: Plain words.
        let bytes: [u8; 104] = unsafe { core::mem::transmute(tss.0) };
        assert_eq!(bytes[36..44], 0x1122_3344_5566_7780u64.to_le_bytes());
        assert_eq!(bytes[44..52], 0x99aa_bbcc_ddee_ff00u64.to_le_bytes());
        assert_eq!(bytes[102..104], 104u16.to_le_bytes());
    }

    #[test]
    fn gates_lead_to_their_stubs() {
        let stubs = 0x7fff_dead_b000;
        let page_fault = stubs + 0x1234;
        let mut idt = Idt([[0x5555; 2]; 256]);
        // SAFETY: Our own.
        unsafe { Idt::write(&mut idt, stubs, page_fault) };
        for (vector, gate) in idt.0.iter().enumerate() {
            let target = gate[0] & 0xffff | gate[0] >> 48 << 16 | gate[1] << 32;
            let expected = if vector == 14 {
                page_fault
            } else {
                stubs + 16 * vector as u64
            };
            assert_eq!(target, expected);
            assert_eq!(gate[0] >> 32 & 7, if vector == 8 { 2 } else { 1 });
            assert_eq!(gate[0] >> 40 & 0x9f, 0x8e);
            assert_eq!(gate[0] >> 16 & 0xffff, 0x10);
            let dpl = if [3, 4, 128].contains(&vector) { 3 } else { 0 };
            assert_eq!(gate[0] >> 45 & 3, dpl);
            assert_eq!((gate[0] >> 35 & 0x1f, gate[1] >> 32), (0, 0), "reserved");
        }
    }
}
