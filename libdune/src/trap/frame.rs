// SPDX-License-Identifier: MIT OR Apache-2.0

//! What a handler sees of the interrupted program.

use core::fmt;

use dune_abi::Gprs;

use crate::abi::PAGE_FAULT_HOST_REFUSED;

/// Assembly: pops R15 … RAX, as [`TrapFrame`] and `Registers` have them.
macro_rules! pop_registers {
    () => {
        "pop r15; pop r14; pop r13; pop r12; pop r11; pop r10; pop r9; pop r8; \
         pop rdi; pop rsi; pop rbp; pop rbx; pop rdx; pop rcx; pop rax"
    };
}
pub(crate) use pop_registers;

/// Registers of the interrupted program. Changes are what it goes on with.
///
/// ```text
/// low   level cr2 r15 … rax   pushed by the stub
///       vector error          pushed by the stub and the CPU
/// high  rip cs rflags rsp ss  what IRETQ takes
/// ```
///
/// # Examples
///
/// ```no_run
/// use libdune::{Dune, Outcome, Thread, TrapFrame, Vector};
///
/// /// Has UD2 mean: its vector in RAX.
/// fn invalid_opcode(frame: &mut TrapFrame, _: &Thread<'_>) -> Outcome {
///     // Not for untrusted code, nor inside another handler.
///     if frame.is_cpl3() || frame.level() > 0 {
///         return Outcome::Unhandled;
///     }
///     frame.rax = u64::from(frame.vector().0);
///     frame.rip += 2;
///     Outcome::Resume
/// }
///
/// let dune = Dune::enter()?;
/// dune.set_exception_handler(Vector::UD, invalid_opcode);
/// let answer: u64;
/// unsafe { core::arch::asm!("ud2", out("rax") answer) };
/// assert_eq!(answer, 6);
/// # Ok::<(), libdune::Error>(())
/// ```
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrapFrame {
    /// Handlers that this one interrupted.
    pub(crate) level: u64,
    /// CR2 as it was when the exception came: the address of a page fault.
    pub cr2: u64,
    /// R15.
    pub r15: u64,
    /// R14.
    pub r14: u64,
    /// R13.
    pub r13: u64,
    /// R12.
    pub r12: u64,
    /// R11.
    pub r11: u64,
    /// R10.
    pub r10: u64,
    /// R9.
    pub r9: u64,
    /// R8.
    pub r8: u64,
    /// RDI.
    pub rdi: u64,
    /// RSI.
    pub rsi: u64,
    /// RBP.
    pub rbp: u64,
    /// RBX.
    pub rbx: u64,
    /// RDX.
    pub rdx: u64,
    /// RCX.
    pub rcx: u64,
    /// RAX.
    pub rax: u64,
    pub(crate) vector: u64,
    /// Error code of the exception, 0 where it has none (SDM, "Error Code"; of page faults "Interrupt 14", and
    /// [`TrapFrame::page_fault_code`]).
    pub error_code: u64,
    /// RIP: of a fault the instruction itself, of a trap the one behind. What is left here must be canonical.
    pub rip: u64,
    /// Selector of CS; its lowest two bits are the CPL.
    pub cs: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// RSP. Below it there may be 128 bytes in use, the red zone.
    pub rsp: u64,
    /// Selector of SS.
    pub ss: u64,
}

impl TrapFrame {
    /// The general-purpose registers.
    pub(crate) fn gprs(&self) -> Gprs {
        Gprs {
            rax: self.rax,
            rcx: self.rcx,
            rdx: self.rdx,
            rbx: self.rbx,
            rsp: self.rsp,
            rbp: self.rbp,
            rsi: self.rsi,
            rdi: self.rdi,
            r8: self.r8,
            r9: self.r9,
            r10: self.r10,
            r11: self.r11,
            r12: self.r12,
            r13: self.r13,
            r14: self.r14,
            r15: self.r15,
        }
    }

    /// The exception.
    pub fn vector(&self) -> Vector {
        Vector(self.vector as u8)
    }

    /// How many handlers this one interrupted, 0 to 7.
    pub fn level(&self) -> usize {
        self.level as usize
    }

    /// Whether the interrupted code ran at CPL3.
    pub fn is_cpl3(&self) -> bool {
        self.cs & 3 == 3
    }

    /// Page fault: the process itself has no such access there, the guest's page table is not the cause.
    pub fn host_refused(&self) -> bool {
        self.vector() == Vector::PF && self.error_code & PAGE_FAULT_HOST_REFUSED != 0
    }
}

/// Number of an exception or interrupt, with the SDM's mnemonics.
///
/// # Examples
///
/// ```
/// use libdune::Vector;
///
/// assert_eq!(Vector::PF, Vector(14));
/// assert_eq!(Vector::PF.to_string(), "#PF (page fault) 14");
/// assert_eq!(Vector::PF.name(), "#PF (page fault)");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vector(pub u8);

macro_rules! vectors {
    ($($name:ident $number:literal $text:literal,)*) => {
        impl Vector {
            $(#[doc = $text]
            pub const $name: Self = Self($number);)*

            /// The SDM's mnemonic and name, or "vector".
            pub const fn name(self) -> &'static str {
                match self.0 {
                    $($number => concat!("#", stringify!($name), " (", $text, ")"),)*
                    _ => "vector",
                }
            }
        }
    };
}

vectors! {
    DE 0 "divide error",
    DB 1 "debug exception",
    NMI 2 "non-maskable interrupt",
    BP 3 "breakpoint",
    OF 4 "overflow",
    BR 5 "bound range exceeded",
    UD 6 "invalid opcode",
    NM 7 "device not available",
    DF 8 "double fault",
    TS 10 "invalid TSS",
    NP 11 "segment not present",
    SS 12 "stack-segment fault",
    GP 13 "general protection",
    PF 14 "page fault",
    MF 16 "x87 floating-point error",
    AC 17 "alignment check",
    MC 18 "machine check",
    XM 19 "SIMD floating-point exception",
    VE 20 "virtualization exception",
    CP 21 "control protection exception",
}

impl fmt::Debug for Vector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name(), self.0)
    }
}

impl fmt::Display for Vector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_sdms() {
        assert_eq!(Vector::PF.to_string(), "#PF (page fault) 14");
        assert_eq!(Vector(0x80).to_string(), "vector 128");
    }

    #[test]
    fn the_frame_ends_in_what_iretq_takes() {
        assert_eq!(size_of::<TrapFrame>(), 24 * 8);
        assert_eq!(core::mem::offset_of!(TrapFrame, rip), 19 * 8);
        assert_eq!(core::mem::offset_of!(TrapFrame, ss), 23 * 8);
    }
}
