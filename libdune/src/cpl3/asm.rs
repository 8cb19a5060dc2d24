// SPDX-License-Identifier: MIT OR Apache-2.0

//! The way to CPL3 and back.
//!
//! # Life of a visit
//!
//! 1. `dune_user_enter` keeps what belongs to CPL0 on the caller's stack and puts the address of that into the thread's
//!    slot: from here on SYSCALL and traps from CPL3 come back to it.
//! 2. The *way in*: extended state, FS and GS base, general registers of the [`Frame`] are loaded; IRETQ. Nothing of CPL3
//!    is lost before that, so whoever interrupts here goes back to the start (`dune_user_aborted`).
//! 3. CPL3 runs. SYSCALL comes to `dune_user_syscall` on CPL0's stack, all else through the trap entry to
//!    `dune_user_trapped`. Both fill the frame in.
//! 4. The *way out*, `dune_user_out`: extended state and segment bases are exchanged. Whoever interrupts here waits until
//!    the end (`Block::signal`), since a handler of the program must find its FS base.
//! 5. It returns to the caller of `dune_user_enter`.
//!
//! Steps 1, 2 and 4 are there four times, by whether the CPU has XSAVE and FSGSBASE; the block says which ([`Ways`]).
//!
//! # Safety
//!
//! Assembly. Stack at the slot's RSP, from there upwards: frame, block, FS base, GS base, the slot's RSP before, RBX, RBP,
//! return address. R12 to R15 are not kept. RBX: block, RDI: frame.
//!
//! What CPL3 chose is never used as an address, and RFLAGS are CPL0's own before anything else happens.

use core::arch::global_asm;
use core::mem::offset_of;

use super::syscall::Slot;
use super::Frame;
use super::Taken;
use super::UserRegisters;
use super::EVENT_INTERRUPTED;
use super::EVENT_SYSCALL;
use super::FLAGS_CPL0;
use crate::abi::CALL_SELF;
use crate::percpu;
use crate::percpu::Block;

extern "C" {
    fn dune_user_enter_fxsave_msr();
    fn dune_user_enter_fxsave_fsgsbase();
    fn dune_user_enter_xsave_msr();
    fn dune_user_enter_xsave_fsgsbase();
    fn dune_user_in();
    fn dune_user_in_fxsave_msr();
    fn dune_user_in_fxsave_fsgsbase();
    fn dune_user_in_xsave_msr();
    fn dune_user_in_xsave_fsgsbase();
    fn dune_user_in_end();
    fn dune_user_out_begin();
    fn dune_user_unwaited();
    fn dune_user_unwaited_end();
    fn dune_user_taken();
    fn dune_user_aborted();
    fn dune_user_out_end();
}

/// The routines of steps 1 and 2 for the thread's CPU, of which the first gets RDI: frame, RSI: block; and which of step 4.
///
/// That one is not jumped to by its address: the registers are CPL3's choice still, and CPL3 may have taught the CPU where
/// indirect branches go.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ways {
    enter: u64,
    way_in: u64,
    way_out: WayOut,
}

#[repr(u32)]
#[derive(Clone, Copy, Debug)]
enum WayOut {
    XsaveFsgsbase = 0,
    FxsaveFsgsbase = 1,
    XsaveMsr = 2,
    FxsaveMsr = 3,
}

macro_rules! ways {
    ($enter:ident, $way_in:ident, $way_out:ident) => {
        Self {
            enter: $enter as *const () as u64,
            way_in: $way_in as *const () as u64,
            way_out: WayOut::$way_out,
        }
    };
}

impl Ways {
    pub fn new(has_xsave: bool, has_fsgsbase: bool) -> Self {
        match (has_xsave, has_fsgsbase) {
            (false, false) => ways!(dune_user_enter_fxsave_msr, dune_user_in_fxsave_msr, FxsaveMsr),
            (false, true) => ways!(
                dune_user_enter_fxsave_fsgsbase,
                dune_user_in_fxsave_fsgsbase,
                FxsaveFsgsbase
            ),
            (true, false) => ways!(dune_user_enter_xsave_msr, dune_user_in_xsave_msr, XsaveMsr),
            (true, true) => ways!(
                dune_user_enter_xsave_fsgsbase,
                dune_user_in_xsave_fsgsbase,
                XsaveFsgsbase
            ),
        }
    }
}

/// Start and end of the assembly.
pub(super) fn code() -> (u64, u64) {
    (
        dune_user_enter_fxsave_msr as *const () as u64,
        dune_user_out_end as *const () as u64,
    )
}

/// Whether CPL0 at `rip` is on the way in.
pub(crate) fn is_way_in(rip: u64) -> bool {
    (dune_user_in as *const () as u64..dune_user_in_end as *const () as u64).contains(&rip)
}

/// Whether CPL0 at `rip` is on the way out.
pub(crate) fn is_way_out(rip: u64) -> bool {
    (dune_user_out_begin as *const () as u64..dune_user_out_end as *const () as u64).contains(&rip)
}

/// Whether CPL0 at `rip` answers a SYSCALL of CPL3's, if nobody waits for one.
pub(crate) fn is_unwaited(rip: u64) -> bool {
    (dune_user_unwaited as *const () as u64..dune_user_unwaited_end as *const () as u64).contains(&rip)
}

/// Where the way out begins when CPL3's registers are in the block. RBX: block, RSP: the slot's.
pub(super) fn taken() -> u64 {
    dune_user_taken as *const () as u64
}

/// Where it begins when CPL3 was not reached. RBX: block, RSP: the slot's.
pub(super) fn aborted() -> u64 {
    dune_user_aborted as *const () as u64
}

const MSR_FS_BASE: u32 = 0xc000_0100;
const MSR_GS_BASE: u32 = 0xc000_0101;

global_asm!(
    ".pushsection .text.dune_user, \"ax\", @progbits",
    ".balign 16",
    // 1.
    ".macro dune_user_enter name, xsave, fsgsbase",
    ".hidden \\name",
    ".globl \\name",
    "\\name:",
    "push rbp",
    "push rbx",
    "mov rbx, rsi",
    "mov rbp, [rbx + {slot}]",
    "push qword ptr [rbp + {slot_rsp}]",
    ".if \\fsgsbase",
    "rdgsbase rax",
    "push rax",
    "rdfsbase rax",
    "push rax",
    ".else",
    "mov ecx, {msr_gs_base}",
    "rdmsr",
    "shl rdx, 32",
    "add rax, rdx",
    "push rax",
    "mov ecx, {msr_fs_base}",
    "rdmsr",
    "shl rdx, 32",
    "add rax, rdx",
    "push rax",
    ".endif",
    "push rbx",
    "push rdi",
    "mov rcx, [rdi + {host_fpu}]",
    ".if \\xsave",
    "mov eax, {host_fpu_mask}",
    "xor edx, edx",
    "xsave64 [rcx]",
    ".else",
    "fxsave64 [rcx]",
    ".endif",
    ".endm",
    "dune_user_enter dune_user_enter_fxsave_msr, 0, 0",
    "jmp 42f",
    "dune_user_enter dune_user_enter_fxsave_fsgsbase, 0, 1",
    "jmp 42f",
    "dune_user_enter dune_user_enter_xsave_msr, 1, 0",
    "jmp 42f",
    "dune_user_enter dune_user_enter_xsave_fsgsbase, 1, 1",
    "42:",
    // From here on the thread waits for CPL3, and on the way in there are no handlers to jump out of.
    "mov [rbp + {slot_rsp}], rsp",
    ".hidden dune_user_in",
    ".globl dune_user_in",
    "dune_user_in:",
    "jmp qword ptr [rbx + {way_in}]",
    // 2.
    ".macro dune_user_in name, xsave, fsgsbase",
    ".hidden \\name",
    ".globl \\name",
    "\\name:",
    "mov rcx, [rdi + {fpu}]",
    ".if \\xsave",
    "mov eax, -1",
    "mov edx, eax",
    "xrstor64 [rcx]",
    ".else",
    "fxrstor64 [rcx]",
    ".endif",
    ".if \\fsgsbase",
    "mov rax, [rdi + {fs_base}]",
    "wrfsbase rax",
    "mov rax, [rdi + {gs_base}]",
    "wrgsbase rax",
    ".else",
    "mov ecx, {msr_fs_base}",
    "mov eax, [rdi + {fs_base}]",
    "mov edx, [rdi + {fs_base} + 4]",
    "wrmsr",
    "mov ecx, {msr_gs_base}",
    "mov eax, [rdi + {gs_base}]",
    "mov edx, [rdi + {gs_base} + 4]",
    "wrmsr",
    ".endif",
    "push {user_ds}",
    "push qword ptr [rdi + {rsp}]",
    "push qword ptr [rdi + {rflags}]",
    "push qword ptr [rdi + {cs}]",
    "push qword ptr [rdi + {rip}]",
    "mov rax, [rdi + {rax}]",
    "mov rcx, [rdi + {rcx}]",
    "mov rdx, [rdi + {rdx}]",
    "mov rbx, [rdi + {rbx}]",
    "mov rbp, [rdi + {rbp}]",
    "mov rsi, [rdi + {rsi}]",
    "mov r8, [rdi + {r8}]",
    "mov r9, [rdi + {r9}]",
    "mov r10, [rdi + {r10}]",
    "mov r11, [rdi + {r11}]",
    "mov r12, [rdi + {r12}]",
    "mov r13, [rdi + {r13}]",
    "mov r14, [rdi + {r14}]",
    "mov r15, [rdi + {r15}]",
    "mov rdi, [rdi + {rdi}]",
    "iretq",
    ".endm",
    "dune_user_in dune_user_in_fxsave_msr, 0, 0",
    "dune_user_in dune_user_in_fxsave_fsgsbase, 0, 1",
    "dune_user_in dune_user_in_xsave_msr, 1, 0",
    "dune_user_in dune_user_in_xsave_fsgsbase, 1, 1",
    ".hidden dune_user_in_end",
    ".globl dune_user_in_end",
    "dune_user_in_end:",
    ".balign 16",
    ".hidden dune_user_out_begin",
    ".globl dune_user_out_begin",
    "dune_user_out_begin:",
    // An exception or INT n of CPL3: on the IST stack, RDX: what the trap entry pushed there, RAX: CR2, RCX: the slot's
    // RSP, RDI: frame, RBX: block.
    ".balign 16",
    ".hidden dune_user_trapped",
    ".globl dune_user_trapped",
    "dune_user_trapped:",
    "mov [rdi + {cr2}], rax",
    "mov [rdi + {rbp}], rbp",
    "mov [rdi + {rsi}], rsi",
    "mov [rdi + {r8}], r8",
    "mov [rdi + {r9}], r9",
    "mov [rdi + {r10}], r10",
    "mov [rdi + {r11}], r11",
    "mov [rdi + {r12}], r12",
    "mov [rdi + {r13}], r13",
    "mov [rdi + {r14}], r14",
    "mov [rdi + {r15}], r15",
    "mov rax, [rdx]",
    "mov [rdi + {rdi}], rax",
    "mov rax, [rdx + 8]",
    "mov [rdi + {rdx}], rax",
    "mov rax, [rdx + 16]",
    "mov [rdi + {rcx}], rax",
    "mov rax, [rdx + 24]",
    "mov [rdi + {rbx}], rax",
    "mov rax, [rdx + 32]",
    "mov [rdi + {rax}], rax",
    "mov rax, [rdx + 40]",
    "mov [rdi + {event}], rax",
    "mov rax, [rdx + 48]",
    "mov [rdi + {error_code}], rax",
    "mov rax, [rdx + 56]",
    "mov [rdi + {rip}], rax",
    "mov rax, [rdx + 64]",
    "mov [rdi + {cs}], rax",
    "mov rax, [rdx + 72]",
    "mov [rdi + {rflags}], rax",
    "mov rax, [rdx + 80]",
    "mov [rdi + {rsp}], rax",
    "mov rsp, rcx",
    "jmp 48f",
    // The host loop had CPL3 come out: RAX to RFLAGS, which are the frame's first words, and CS are in the block.
    ".hidden dune_user_taken",
    ".globl dune_user_taken",
    "dune_user_taken:",
    "lea rsi, [rbx + {taken}]",
    "mov rdi, [rsp]",
    "mov ecx, {taken_words}",
    "rep movsq",
    "mov rdi, [rsp]",
    "mov rax, [rbx + {taken_cs}]",
    "mov [rdi + {cs}], rax",
    "mov qword ptr [rdi + {event}], {event_interrupted}",
    "jmp 59f",
    // The way in was interrupted: nothing of CPL3's is in the registers that is not in the frame.
    ".hidden dune_user_aborted",
    ".globl dune_user_aborted",
    "dune_user_aborted:",
    "mov rdi, [rsp]",
    "mov qword ptr [rdi + {event}], {event_interrupted}",
    "mov rcx, [rdi + {host_fpu}]",
    "cmp qword ptr [rbx + {has_xsave}], 0",
    "je 51f",
    "mov eax, -1",
    "mov edx, eax",
    "xrstor64 [rcx]",
    "jmp 52f",
    "51:",
    "fxrstor64 [rcx]",
    "52:",
    "cmp dword ptr [rbx + {has_fsgsbase}], 0",
    "je 54f",
    "mov rax, [rsp + {kept_fs_base}]",
    "wrfsbase rax",
    "mov rax, [rsp + {kept_gs_base}]",
    "wrgsbase rax",
    "jmp 55f",
    "54:",
    "mov ecx, {msr_fs_base}",
    "mov eax, [rsp + {kept_fs_base}]",
    "mov edx, [rsp + {kept_fs_base} + 4]",
    "wrmsr",
    "mov ecx, {msr_gs_base}",
    "mov eax, [rsp + {kept_gs_base}]",
    "mov edx, [rsp + {kept_gs_base} + 4]",
    "wrmsr",
    "jmp 55f",
    // SYSCALL from CPL3 while nobody waits for it: the program went there by itself. ENOSYS. (SYSRET: behind a SYSCALL at the end
    // of the canonical addresses it faults here, which ends the process with a report.)
    ".hidden dune_user_unwaited",
    ".globl dune_user_unwaited",
    "dune_user_unwaited:",
    "47:",
    "pop rax",
    "mov rsp, [rsp + 8]",
    "mov rsp, [rsp + {slot_user_rsp}]",
    "mov rax, -{enosys}",
    "sysretq",
    // SYSCALL from CPL3: the registers are CPL3's but RSP, which is the slot's. RFLAGS are what FMASK left.
    ".balign 16",
    ".hidden dune_user_syscall",
    ".globl dune_user_syscall",
    "dune_user_syscall:",
    "push rax",
    "mov rax, [rsp + 8]",
    "test rax, rax",
    "jz 47b",
    ".hidden dune_user_unwaited_end",
    ".globl dune_user_unwaited_end",
    "dune_user_unwaited_end:",
    "mov [rax + {rcx}], rcx",
    "mov [rax + {rip}], rcx",
    "mov [rax + {rdx}], rdx",
    "mov [rax + {rbx}], rbx",
    "mov [rax + {rbp}], rbp",
    "mov [rax + {rsi}], rsi",
    "mov [rax + {rdi}], rdi",
    "mov [rax + {r8}], r8",
    "mov [rax + {r9}], r9",
    "mov [rax + {r10}], r10",
    "mov [rax + {r11}], r11",
    "mov [rax + {rflags}], r11",
    "mov [rax + {r12}], r12",
    "mov [rax + {r13}], r13",
    "mov [rax + {r14}], r14",
    "mov [rax + {r15}], r15",
    "mov rdi, rax",
    "pop qword ptr [rdi + {rax}]",
    "mov rbx, [rsp + 8]",
    "mov rcx, [rbx + {slot}]",
    "mov rcx, [rcx + {slot_user_rsp}]",
    "mov [rdi + {rsp}], rcx",
    "mov dword ptr [rdi + {cs}], {user_cs}",
    "mov dword ptr [rdi + {event}], {event_syscall}",
    // RDI: frame, RBX: block, RSP: the slot's.
    "48:",
    "push {flags}",
    "popfq",
    "59:",
    // 4.
    "cmp dword ptr [rbx + {way_out}], {fxsave_fsgsbase}",
    "je 60f",
    "ja 61f",
    ".macro dune_user_out xsave, fsgsbase",
    ".if \\fsgsbase",
    "rdfsbase rax",
    "mov [rdi + {fs_base}], rax",
    "rdgsbase rax",
    "mov [rdi + {gs_base}], rax",
    ".else",
    "mov ecx, {msr_fs_base}",
    "rdmsr",
    "mov [rdi + {fs_base}], eax",
    "mov [rdi + {fs_base} + 4], edx",
    "mov ecx, {msr_gs_base}",
    "rdmsr",
    "mov [rdi + {gs_base}], eax",
    "mov [rdi + {gs_base} + 4], edx",
    ".endif",
    "mov rcx, [rdi + {fpu}]",
    ".if \\xsave",
    "mov eax, -1",
    "mov edx, eax",
    "xsave64 [rcx]",
    "mov rcx, [rdi + {host_fpu}]",
    "xrstor64 [rcx]",
    ".else",
    "fxsave64 [rcx]",
    "mov rcx, [rdi + {host_fpu}]",
    "fxrstor64 [rcx]",
    ".endif",
    ".if \\fsgsbase",
    "mov rax, [rsp + {kept_fs_base}]",
    "wrfsbase rax",
    "mov rax, [rsp + {kept_gs_base}]",
    "wrgsbase rax",
    ".else",
    "mov ecx, {msr_fs_base}",
    "mov eax, [rsp + {kept_fs_base}]",
    "mov edx, [rsp + {kept_fs_base} + 4]",
    "wrmsr",
    "mov ecx, {msr_gs_base}",
    "mov eax, [rsp + {kept_gs_base}]",
    "mov edx, [rsp + {kept_gs_base} + 4]",
    "wrmsr",
    ".endif",
    ".endm",
    "dune_user_out 1, 1",
    "jmp 55f",
    "61:",
    "cmp dword ptr [rbx + {way_out}], {xsave_msr}",
    "jne 62f",
    "dune_user_out 1, 0",
    "jmp 55f",
    "62:",
    "dune_user_out 0, 0",
    "jmp 55f",
    "60:",
    "dune_user_out 0, 1",
    "55:",
    "add rsp, {kept_bytes}",
    "mov rcx, [rbx + {slot}]",
    "pop qword ptr [rcx + {slot_rsp}]",
    ".hidden dune_user_out_end",
    ".globl dune_user_out_end",
    "dune_user_out_end:",
    // A signal that waited is delivered before this call, or another one.
    "cmp dword ptr [rbx + {signal}], 0",
    "jne 56f",
    "57:",
    "pop rbx",
    "pop rbp",
    "ret",
    "56:",
    "mov dword ptr [rbx + {signal}], 0",
    "mov eax, {call_self}",
    "vmcall",
    "jmp 57b",
    ".popsection",
    slot = const offset_of!(Block, user_slot),
    taken = const offset_of!(Block, user_taken),
    taken_words = const offset_of!(UserRegisters, fs_base) / 8,
    taken_cs = const offset_of!(Block, user_taken) + offset_of!(Taken, cs),
    has_fsgsbase = const offset_of!(Block, has_fsgsbase),
    has_xsave = const offset_of!(Block, has_xsave),
    signal = const offset_of!(Block, signal),
    way_in = const offset_of!(Block, user_ways) + offset_of!(Ways, way_in),
    way_out = const offset_of!(Block, user_ways) + offset_of!(Ways, way_out),
    fxsave_fsgsbase = const WayOut::FxsaveFsgsbase as u32,
    xsave_msr = const WayOut::XsaveMsr as u32,
    // Above the slot's RSP: frame, block, FS base, GS base.
    kept_fs_base = const 16,
    kept_gs_base = const 24,
    kept_bytes = const 32,
    slot_rsp = const offset_of!(Slot, rsp),
    slot_user_rsp = const offset_of!(Slot, user_rsp),
    user_ds = const percpu::USER_DS,
    user_cs = const percpu::USER_CS,
    flags = const FLAGS_CPL0,
    // x87 and SSE, for their control words, and PKRU: all else is the callee's to lose.
    host_fpu_mask = const 1 | 2 | 1 << 9,
    event_syscall = const EVENT_SYSCALL,
    event_interrupted = const EVENT_INTERRUPTED,
    call_self = const CALL_SELF,
    enosys = const libc::ENOSYS,
    msr_fs_base = const MSR_FS_BASE,
    msr_gs_base = const MSR_GS_BASE,
    fpu = const offset_of!(Frame, fpu),
    host_fpu = const offset_of!(Frame, host_fpu),
    event = const offset_of!(Frame, event),
    error_code = const offset_of!(Frame, error_code),
    cr2 = const offset_of!(Frame, cr2),
    cs = const offset_of!(Frame, cs),
    rip = const offset_of!(Frame, registers.rip),
    rsp = const offset_of!(Frame, registers.rsp),
    rflags = const offset_of!(Frame, registers.rflags),
    fs_base = const offset_of!(Frame, registers.fs_base),
    gs_base = const offset_of!(Frame, registers.gs_base),
    rax = const offset_of!(Frame, registers.rax),
    rcx = const offset_of!(Frame, registers.rcx),
    rdx = const offset_of!(Frame, registers.rdx),
    rbx = const offset_of!(Frame, registers.rbx),
    rbp = const offset_of!(Frame, registers.rbp),
    rsi = const offset_of!(Frame, registers.rsi),
    rdi = const offset_of!(Frame, registers.rdi),
    r8 = const offset_of!(Frame, registers.r8),
    r9 = const offset_of!(Frame, registers.r9),
    r10 = const offset_of!(Frame, registers.r10),
    r11 = const offset_of!(Frame, registers.r11),
    r12 = const offset_of!(Frame, registers.r12),
    r13 = const offset_of!(Frame, registers.r13),
    r14 = const offset_of!(Frame, registers.r14),
    r15 = const offset_of!(Frame, registers.r15),
);

// What `dune_user_taken` copies is in the same place in both, and all but the segment bases.
const _: () = assert!(offset_of!(Frame, registers) == 0 && offset_of!(Taken, registers) == 0);
const _: () = assert!(size_of::<UserRegisters>() - offset_of!(UserRegisters, fs_base) == 16);
