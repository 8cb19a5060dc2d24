// SPDX-License-Identifier: MIT OR Apache-2.0

//! The contract between `dune.ko` and user space, defined once.
//!
//! This file is compiled twice: in the crate `dune-abi` for user space and as a module of `dune.ko`.
//! It uses `core` only and holds no code beyond constant arithmetic. docs/abi.md says what each call
//! does, which errno it can give and what to do about it.
//!
//! Terms are the SDM's: GPA guest-physical, HVA host-virtual, GLA guest-linear address.

use core::mem::offset_of;
use core::mem::size_of;

/// Version of this contract; [`Info::abi_version`] must equal it.
pub const ABI_VERSION: u32 = 3;

/// Path of the device node.
pub const DEVICE_PATH: &str = "/dev/dune";

/// Bytes in a page, and alignment of everything that is mapped.
pub const PAGE_BYTES: usize = 4096;

/// Bytes of one vCPU's run page; a vCPU's run page is at `mmap` offset `vcpu * RUN_PAGE_BYTES`.
pub const RUN_PAGE_BYTES: usize = PAGE_BYTES;

/// Bytes of one GPA slot (1 GiB): slots are handed out and placed at multiples of this.
pub const SLOT_BYTES: u64 = 1 << 30;

const IOC_MAGIC: u32 = 0xd5;
const IOC_NONE: u32 = 0;
const IOC_READ_WRITE: u32 = 3;

/// Linux' `_IOC()` (include/uapi/asm-generic/ioctl.h).
const fn ioc(dir: u32, nr: u32, size: usize) -> u32 {
    (dir << 30) | ((size as u32) << 16) | (IOC_MAGIC << 8) | nr
}

/// Fills an [`Info`]; argument: pointer to it.
pub const DUNE_GET_INFO: u32 = ioc(IOC_READ_WRITE, 0, size_of::<Info>());
/// Makes a vCPU owned by the calling thread; argument: pointer to a [`CreateVcpu`].
pub const DUNE_CREATE_VCPU: u32 = ioc(IOC_READ_WRITE, 1, size_of::<CreateVcpu>());
/// Destroys a vCPU of the calling thread; argument: its number.
pub const DUNE_DESTROY_VCPU: u32 = ioc(IOC_NONE, 2, 0);
/// Runs a vCPU of the calling thread until something is for user space; argument: its number.
pub const DUNE_RUN: u32 = ioc(IOC_NONE, 3, 0);
/// Writes the whole guest state of a vCPU of the calling thread into its run page; argument: its number.
pub const DUNE_SYNC: u32 = ioc(IOC_NONE, 4, 0);
/// Gives the GPA slot of a 1 GiB of this process' address space; argument: pointer to a [`MapSlot`].
pub const DUNE_MAP_SLOT: u32 = ioc(IOC_READ_WRITE, 5, size_of::<MapSlot>());
/// Makes a space for the calling process from an inherited fd; returns the new fd (close-on-exec).
pub const DUNE_NEW_SPACE: u32 = ioc(IOC_NONE, 6, 0);

/// Finds a slot whose 1 GiB has no mapping in the process; argument: pointer to an [`UnusedSlot`].
pub const DUNE_UNUSED_SLOT: u32 = ioc(IOC_READ_WRITE, 7, size_of::<UnusedSlot>());
/// Gives back the slot of a 1 GiB that has no mapping in the process; argument: any address in it.
pub const DUNE_UNMAP_SLOT: u32 = ioc(IOC_NONE, 8, 0);
/// Makes every vCPU of the process forget what it cached of page tables, before it runs another instruction; no argument.
pub const DUNE_FLUSH: u32 = ioc(IOC_NONE, 9, 0);
/// Gives the module a virtual machine of KVM; argument: its fd. Only on the standard input of the program that the module
/// starts to make one (its parameter `kvm_helper`).
pub const DUNE_KVM_LEND: u32 = ioc(IOC_NONE, 32, 0);

/// What makes `read(2)` do the same as the ioctl `request`, for threads whose seccomp filter allows no ioctl: this as the
/// size, the request's argument as the buffer.
pub const fn read_size(request: u32) -> u64 {
    request as u64 & 0xff
}

/// Answer of [`DUNE_GET_INFO`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Info {
    /// In: `size_of::<Info>()`. Out: unchanged.
    pub size: u32,
    /// Out: [`ABI_VERSION`] of the module.
    pub abi_version: u32,
    /// Out: `CAP_*` bits.
    pub capabilities: u64,
    /// Out: width of a GPA in bits; `1 << (gpa_bits - 30)` slots exist, slot 0 is never handed out.
    pub gpa_bits: u32,
    /// Out: most vCPUs that one space may have.
    pub max_vcpus: u32,
    /// Out: CR0 bits that the guest may change without an exit.
    pub cr0_guest_owned: u64,
    /// Out: CR4 bits that the guest may have set, and change without an exit.
    pub cr4_guest_owned: u64,
    /// Out: CR0 with which a vCPU starts.
    pub cr0: u64,
    /// Out: CR4 with which a vCPU starts, as the guest reads it.
    pub cr4: u64,
    /// Out: EFER with which a vCPU starts (the host's).
    pub efer: u64,
    /// Out: slots that can still be handed out in this space.
    pub slots_free: u32,
    /// Out: vCPUs that exist in this space.
    pub vcpus: u32,
}

/// [`Info::capabilities`]: EPT keeps accessed and dirty bits.
pub const CAP_EPT_AD: u64 = 1 << 0;
/// [`Info::capabilities`]: EPT has 2 MiB leaves.
pub const CAP_EPT_2M: u64 = 1 << 1;
/// [`Info::capabilities`]: EPT has 1 GiB leaves.
pub const CAP_EPT_1G: u64 = 1 << 2;
/// [`Info::capabilities`]: the guest's own page tables may use 1 GiB leaves.
pub const CAP_GUEST_1G: u64 = 1 << 3;
/// [`Info::capabilities`]: the module counts VMREAD, VMWRITE and MSR accesses (`Counters`).
pub const CAP_COUNT_OPS: u64 = 1 << 4;

/// Argument of [`DUNE_CREATE_VCPU`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CreateVcpu {
    /// In: `size_of::<CreateVcpu>()`.
    pub size: u32,
    /// In: must be 0.
    pub flags: u32,
    /// Out: the vCPU's number in this space.
    pub vcpu: u32,
    /// Out: 0.
    pub reserved: u32,
    /// Out: `mmap` offset of the run page, in bytes.
    pub run_offset: u64,
    /// Out: bytes to map there.
    pub run_bytes: u64,
}

/// Argument of [`DUNE_MAP_SLOT`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MapSlot {
    /// In: `size_of::<MapSlot>()`.
    pub size: u32,
    /// In: 0 or [`MAP_SLOT_AT`].
    pub flags: u32,
    /// In: any address in the wanted 1 GiB of the process; below 2^47.
    pub hva: u64,
    /// In, with [`MAP_SLOT_AT`]: the GPA to give. Out: GPA of the first byte of that 1 GiB. The same answer each time it is
    /// asked.
    pub gpa: u64,
}

/// [`MapSlot::flags`]: give the slot at `gpa`, or EEXIST. For the child of a fork, whose page tables are copies of its
/// parent's.
pub const MAP_SLOT_AT: u32 = 1;

/// Argument of [`DUNE_UNUSED_SLOT`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UnusedSlot {
    /// In: `size_of::<UnusedSlot>()`.
    pub size: u32,
    /// In: must be 0.
    pub flags: u32,
    /// In: the search starts behind the slot of this GPA; 0: at the first. Out: GPA of the first byte of the slot.
    pub gpa: u64,
    /// Out: first address of the 1 GiB that the slot belongs to.
    pub hva: u64,
}

/// General-purpose registers, in the order of their numbers in machine code.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // Each name is the SDM's.
pub struct Gprs {
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rbx: u64,
    /// Lives in the VMCS; here after [`DUNE_SYNC`] or a full exit, read on [`DIRTY_RIP`].
    pub rsp: u64,
    pub rbp: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
}

/// A segment register as the VMCS holds it (SDM, "Guest Register State").
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u32,
    /// VMX access rights; bit 16 = unusable.
    pub access_rights: u32,
    /// Selector.
    pub selector: u16,
    /// 0.
    pub reserved: [u16; 3],
}

/// System registers of the guest.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // Each name is the SDM's.
pub struct Sregs {
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub es: Segment,
    pub cs: Segment,
    pub ss: Segment,
    pub ds: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr_base: u64,
    pub idtr_base: u64,
    pub gdtr_limit: u32,
    pub idtr_limit: u32,
    /// IA32_LSTAR in the guest: where SYSCALL goes.
    pub lstar: u64,
    /// Address of the VMCALL that stands for a SYSCALL: a VMCALL there goes on at RCX with RFLAGS from R11, as
    /// SYSRET would; a VMCALL elsewhere goes on behind itself. 0: none.
    pub syscall_vmcall: u64,
}

/// Event to deliver at the next entry (SDM, "VM-Entry Controls for Event Injection").
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// VM-entry interruption-information: bits 7:0 vector, 10:8 type, 11 error code valid, 31 valid.
    pub info: u32,
    /// Error code, where `info` says that there is one.
    pub error_code: u32,
    /// Bytes of the instruction, for software interrupts and exceptions.
    pub instruction_len: u32,
    /// 0.
    pub reserved: u32,
}

/// What ended RUN.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exit {
    /// `EXIT_*`.
    pub kind: u32,
    /// Basic exit reason (SDM, appendix "VMX Basic Exit Reasons"); bit 31: VM-entry failure.
    pub reason: u32,
    /// Exit qualification (SDM, "Exit Qualification").
    pub qualification: u64,
    /// Guest-physical address of an EPT violation.
    pub gpa: u64,
    /// Guest-linear address; valid where [`FLAG_GLA_VALID`].
    pub gla: u64,
    /// [`EXIT_TOUCH`] and [`EXIT_REFUSED`]: the HVA that the access was for.
    pub hva: u64,
    /// `ACCESS_*` bits.
    pub access: u32,
    /// `FLAG_*` bits.
    pub flags: u32,
    /// Bytes of the instruction that caused the exit.
    pub instruction_len: u32,
    /// VM-exit interruption-information, or IDT-vectoring information where [`FLAG_EVENT_DELIVERY`].
    pub interruption_info: u32,
    /// Error code, where that says that there is one.
    pub interruption_error_code: u32,
    /// VM-instruction error (SDM, "VM-Instruction Error Numbers") of [`EXIT_FAIL_ENTRY`]; else 0.
    pub instruction_error: u32,
}

/// VMCALL at CPL0: make the Linux system call whose number and arguments RUN left in the registers.
pub const EXIT_SYSCALL: u32 = 0;
/// The process' page table has nothing at `hva` that allows `access`: access it natively and RUN again.
pub const EXIT_TOUCH: u32 = 1;
/// The process may not execute at `hva`; nothing to touch.
pub const EXIT_REFUSED: u32 = 2;
/// The guest used `gpa`, which lies in no slot.
pub const EXIT_NO_SLOT: u32 = 3;
/// The VM entry failed; `reason` and `qualification`, or `instruction_error`, say why.
pub const EXIT_FAIL_ENTRY: u32 = 4;
/// The guest met a fault while it delivered a double fault.
pub const EXIT_TRIPLE_FAULT: u32 = 5;
/// An exit that neither the module nor the ABI knows a treatment for.
pub const EXIT_UNHANDLED: u32 = 6;
/// Nothing for user space: go through user mode once and RUN again.
pub const EXIT_AGAIN: u32 = 7;

/// [`Exit::access`]: a read.
pub const ACCESS_READ: u32 = 1;
/// [`Exit::access`]: a write.
pub const ACCESS_WRITE: u32 = 2;
/// [`Exit::access`]: an instruction fetch.
pub const ACCESS_EXECUTE: u32 = 4;

/// [`Exit::gla`] is valid.
pub const FLAG_GLA_VALID: u32 = 1;
/// The access was to a guest paging structure, not to the final address.
pub const FLAG_PAGING_STRUCTURE: u32 = 2;
/// The access was made while an event was being delivered through the guest's IDT.
pub const FLAG_EVENT_DELIVERY: u32 = 4;

/// [`RunPage::dirty`]: take `gprs.rsp`, `rip` and `rflags`. An event whose delivery was interrupted is dropped.
pub const DIRTY_RIP: u32 = 1;
/// [`RunPage::dirty`]: take `sregs`.
pub const DIRTY_SREGS: u32 = 2;
/// [`RunPage::dirty`]: deliver `event`; replaces an event that was interrupted.
pub const DIRTY_EVENT: u32 = 4;
/// All known bits of [`RunPage::dirty`]; others give EINVAL.
pub const DIRTY_ALL: u32 = DIRTY_RIP | DIRTY_SREGS | DIRTY_EVENT;

/// Number of basic exit reasons that are counted one by one; larger ones share the last counter.
pub const EXIT_REASONS: usize = 80;

/// What this vCPU did since it was made. Written by the module, never read by it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counters {
    /// VM exits by basic reason.
    pub exits: [u64; EXIT_REASONS],
    /// VM entries that succeeded.
    pub entries: u64,
    /// EPT leaves of 4 KiB installed.
    pub ept_4k: u64,
    /// EPT leaves of 2 MiB installed.
    pub ept_2m: u64,
    /// EPT violations settled by `handle_mm_fault` in the exit.
    pub mm_faults: u64,
    /// Times the retry check refused to install a leaf.
    pub retries: u64,
    /// INVEPTs executed.
    pub invept: u64,
    /// INVVPIDs executed.
    pub invvpid: u64,
    /// Times the vCPU was loaded on another CPU than before.
    pub migrations: u64,
    /// EPT leaves installed beside those that were asked for.
    pub ept_around: u64,
    /// EPT leaves installed with another memory type than write-back.
    pub ept_io: u64,
    /// Heavy operations of the machine up to this vCPU's last exit, as far as they were not another's already; by `HEAVY_*`,
    /// only with [`CAP_COUNT_OPS`].
    pub heavy: [u64; HEAVY_KINDS],
}

/// [`Counters::heavy`]: VMREAD.
pub const HEAVY_VMREAD: usize = 0;
/// [`Counters::heavy`]: VMWRITE.
pub const HEAVY_VMWRITE: usize = 1;
/// [`Counters::heavy`]: VMPTRLD, VMPTRST, VMCLEAR, VMXON, VMXOFF.
pub const HEAVY_VMPTRLD: usize = 2;
/// [`Counters::heavy`]: INVEPT, INVVPID.
pub const HEAVY_INVALIDATION: usize = 3;
/// [`Counters::heavy`]: RDMSR.
pub const HEAVY_RDMSR: usize = 4;
/// [`Counters::heavy`]: WRMSR.
pub const HEAVY_WRMSR: usize = 5;
/// [`Counters::heavy`]: MOV to a control or debug register, LGDT, LLDT, LTR.
pub const HEAVY_LOAD: usize = 6;
/// [`Counters::heavy`]: CLI, STI.
pub const HEAVY_INTERRUPT_FLAG: usize = 7;
/// [`Counters::heavy`]: calls by which Linux interrupts other CPUs.
pub const HEAVY_IPI: usize = 8;
/// [`Counters::heavy`]: VMLAUNCH, VMRESUME; also those that fail.
pub const HEAVY_ENTRY: usize = 9;
/// Kinds of heavy operations.
pub const HEAVY_KINDS: usize = 10;

/// The page that a vCPU shares with its owner. User space may write it at any time: the module reads each field
/// once and checks what it read.
#[repr(C, align(4096))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunPage {
    /// Loaded on each entry and stored on each exit, all but `rsp`.
    pub gprs: Gprs,
    /// As `gprs.rsp`: valid after [`DUNE_SYNC`] or an exit other than [`EXIT_SYSCALL`].
    pub rip: u64,
    /// As `rip`.
    pub rflags: u64,
    /// Loaded on each entry and stored on each exit.
    pub cr2: u64,
    /// `DIRTY_*`: what RUN is to take from this page; RUN clears it.
    pub dirty: u32,
    /// Nonzero: RUN returns EINTR at once.
    pub interrupt_request: u32,
    /// In: what to deliver, with [`DIRTY_EVENT`].
    pub event: Event,
    /// Out: what ended RUN.
    pub exit: Exit,
    /// In, with [`DIRTY_SREGS`]; out after [`DUNE_SYNC`] or an exit other than [`EXIT_SYSCALL`].
    pub sregs: Sregs,
    /// Out: what the vCPU did so far, at any time.
    pub counters: Counters,
    /// Nonzero: RUN returns EINTR once the TSC, as user space reads it, is not below this: at the next interrupt or other
    /// exit that user space does not see.
    pub deadline: u64,
    /// In, read at any time: address of the instruction behind the system call that the caller of RUN makes when RUN gave it
    /// one. Nonzero: it puts that call's result into `gprs.rax` there, and calls RUN as before; so when the call comes back to
    /// there the module may do both at once, and have the thread go on behind RUN with the guest's next call.
    pub forward_behind: u64,
}

// The layout is ABI: nothing moves without a new ABI_VERSION.
const _: () = {
    assert!(size_of::<RunPage>() == RUN_PAGE_BYTES);
    assert!(offset_of!(RunPage, gprs) == 0);
    assert!(size_of::<Gprs>() == 128);
    assert!(offset_of!(RunPage, rip) == 128);
    assert!(offset_of!(RunPage, rflags) == 136);
    assert!(offset_of!(RunPage, cr2) == 144);
    assert!(offset_of!(RunPage, dirty) == 152);
    assert!(offset_of!(RunPage, interrupt_request) == 156);
    assert!(offset_of!(RunPage, event) == 160);
    assert!(offset_of!(RunPage, exit) == 176);
    assert!(size_of::<Exit>() == 64);
    assert!(offset_of!(RunPage, sregs) == 240);
    assert!(size_of::<Segment>() == 24);
    assert!(size_of::<Sregs>() == 264);
    assert!(offset_of!(RunPage, counters) == 504);
    assert!(offset_of!(RunPage, deadline) == 1304);
    assert!(offset_of!(RunPage, forward_behind) == 1312);
    assert!(size_of::<Counters>() == 8 * (EXIT_REASONS + 10 + HEAVY_KINDS));
    assert!(size_of::<Info>() == 72);
    assert!(size_of::<CreateVcpu>() == 32);
    assert!(size_of::<MapSlot>() == 24);
    assert!(size_of::<UnusedSlot>() == 24);
};
