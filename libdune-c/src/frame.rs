// SPDX-License-Identifier: MIT OR Apache-2.0

//! `struct dune_tf` and what it is made from: trap frames, registers of CPL3, contexts of signals.

use libdune::abi::PAGE_FAULT_HOST_REFUSED;
use libdune::user::UserContext;
use libdune::TrapFrame;

use crate::out::STDOUT;

/// Registers of interrupted code. What a handler leaves here is loaded.
#[repr(C, packed)]
#[derive(Clone, Copy, Default)]
pub struct dune_tf {
    pub rdi: u64,
    pub rsi: u64,
    pub rdx: u64,
    /// Of a system call: its fourth argument.
    pub rcx: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub rbx: u64,
    pub rbp: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    /// Number of a system call, then its result.
    pub rax: u64,
    /// Error code of an exception.
    pub err: u32,
    pub pad1: u32,
    pub rip: u64,
    pub cs: u16,
    pub pad2: [u16; 3],
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u16,
    pub pad3: [u16; 3],
}

const _: () = assert!(size_of::<dune_tf>() == 168);

pub(crate) const GD_KT: u16 = 0x10;
pub(crate) const GD_KD: u16 = 0x18;
pub(crate) const GD_UD: u16 = 0x28 | 3;
pub(crate) const GD_UT: u16 = 0x30 | 3;
/// 32-bit code.
const GD_UT_32: u16 = 0x20;

/// IF, IOPL 3 and the bit that is always 1: what code at CPL0 needs for its system calls.
pub(crate) const FLAGS_CPL0: u64 = 0x3202;
const IOPL: u64 = 0x3000;

impl dune_tf {
    pub fn is_cpl3(&self) -> bool {
        self.cs & 3 == 3
    }

    /// Of an exception at CPL0.
    pub fn of_trap(frame: &TrapFrame) -> Self {
        Self {
            rdi: frame.rdi,
            rsi: frame.rsi,
            rdx: frame.rdx,
            rcx: frame.rcx,
            r8: frame.r8,
            r9: frame.r9,
            r10: frame.r10,
            r11: frame.r11,
            rbx: frame.rbx,
            rbp: frame.rbp,
            r12: frame.r12,
            r13: frame.r13,
            r14: frame.r14,
            r15: frame.r15,
            rax: frame.rax,
            err: (frame.error_code & !PAGE_FAULT_HOST_REFUSED) as u32,
            rip: frame.rip,
            cs: frame.cs as u16,
            rflags: frame.rflags,
            rsp: frame.rsp,
            ss: frame.ss as u16,
            ..Self::default()
        }
    }

    /// What an exception goes on with.
    pub fn store(&self, frame: &mut TrapFrame) {
        frame.rdi = self.rdi;
        frame.rsi = self.rsi;
        frame.rdx = self.rdx;
        frame.rcx = self.rcx;
        frame.r8 = self.r8;
        frame.r9 = self.r9;
        frame.r10 = self.r10;
        frame.r11 = self.r11;
        frame.rbx = self.rbx;
        frame.rbp = self.rbp;
        frame.r12 = self.r12;
        frame.r13 = self.r13;
        frame.r14 = self.r14;
        frame.r15 = self.r15;
        frame.rax = self.rax;
        frame.rip = self.rip;
        frame.rsp = self.rsp;
        frame.cs = self.cs.into();
        frame.ss = self.ss.into();
        frame.rflags = if self.is_cpl3() {
            self.rflags & !IOPL
        } else {
            self.rflags | FLAGS_CPL0
        };
    }

    /// Of code at CPL3 that came out.
    pub fn of_user(context: &UserContext, error_code: u32) -> Self {
        let r = context.registers();
        Self {
            rdi: r.rdi,
            rsi: r.rsi,
            rdx: r.rdx,
            rcx: r.rcx,
            r8: r.r8,
            r9: r.r9,
            r10: r.r10,
            r11: r.r11,
            rbx: r.rbx,
            rbp: r.rbp,
            r12: r.r12,
            r13: r.r13,
            r14: r.r14,
            r15: r.r15,
            rax: r.rax,
            err: error_code & !PAGE_FAULT_HOST_REFUSED as u32,
            rip: r.rip,
            cs: if context.is_32bit() { GD_UT_32 | 3 } else { GD_UT },
            rflags: r.rflags,
            rsp: r.rsp,
            ss: GD_UD,
            ..Self::default()
        }
    }

    /// Gives it CPL3's selectors, those of 32-bit code where it has them.
    pub fn make_cpl3(&mut self) {
        self.cs = if self.cs & !3 == GD_UT_32 { GD_UT_32 | 3 } else { GD_UT };
        self.ss = GD_UD;
    }

    /// What CPL3 goes on with. Selectors are CPL3's whatever the frame says; FS and GS base stay.
    pub fn load(&self, context: &mut UserContext) {
        context.set_32bit(self.cs & !3 == GD_UT_32);
        let r = context.registers_mut();
        r.rdi = self.rdi;
        r.rsi = self.rsi;
        r.rdx = self.rdx;
        r.rcx = self.rcx;
        r.r8 = self.r8;
        r.r9 = self.r9;
        r.r10 = self.r10;
        r.r11 = self.r11;
        r.rbx = self.rbx;
        r.rbp = self.rbp;
        r.r12 = self.r12;
        r.r13 = self.r13;
        r.r14 = self.r14;
        r.r15 = self.r15;
        r.rax = self.rax;
        r.rip = self.rip;
        r.rsp = self.rsp;
        r.rflags = self.rflags;
    }
}

/// Prints the registers of a frame.
#[no_mangle]
pub unsafe extern "C" fn dune_dump_trap_frame(tf: *mut dune_tf) {
    // SAFETY: The caller's frame.
    let tf = unsafe { tf.read_unaligned() };
    let (err, cs, ss) = (tf.err, tf.cs, tf.ss);
    let words = [
        [("RAX", tf.rax), ("RBX", tf.rbx), ("RCX", tf.rcx)],
        [("RDX", tf.rdx), ("RSI", tf.rsi), ("RDI", tf.rdi)],
        [("RBP", tf.rbp), ("RSP", tf.rsp), ("R8 ", tf.r8)],
        [("R9 ", tf.r9), ("R10", tf.r10), ("R11", tf.r11)],
        [("R12", tf.r12), ("R13", tf.r13), ("R14", tf.r14)],
        [("R15", tf.r15), ("RIP", tf.rip), ("FLG", tf.rflags)],
    ];
    STDOUT.print(format_args!(
        "dune: trap frame: CS {cs:#06x}  SS {ss:#06x}  error code {err:#x}\n"
    ));
    for [a, b, c] in words {
        STDOUT.print(format_args!(
            "dune: {} {:#018x}  {} {:#018x}  {} {:#018x}\n",
            a.0, a.1, b.0, b.1, c.0, c.1
        ));
    }
}
