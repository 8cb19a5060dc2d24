// SPDX-License-Identifier: GPL-2.0

//! The VMX instructions; no other file has their opcodes (but vmenter.S, for VMLAUNCH and VMRESUME).
//!
//! Each has an exception-table entry: when somebody else turned VMX off, it fails and does not oops. The status flags
//! are captured in the same block as the instruction (SDM, "VMX Instruction Reference", "Conventions").

use crate::sys::heavy::heavy_asm;

/// An exception-table entry from label `$from` to label `$to` (asm/extable.h; type 1 = EX_TYPE_DEFAULT).
macro_rules! extable {
    ($from:literal, $to:literal) => {
        concat!(
            ".pushsection __ex_table, \"a\"\n.balign 4\n.long ",
            $from,
            " - .\n.long ",
            $to,
            " - .\n.long 1\n.popsection"
        )
    };
}

/// A VMX instruction did not succeed: VMfail, or a fault because VMX is off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct VmxFailed;

/// One instruction with a 64-bit memory operand.
macro_rules! memory_instruction {
    ($(#[$doc:meta])* $name:ident, $mnemonic:literal) => {
        $(#[$doc])*
        pub(crate) unsafe fn $name(hpa: u64) -> Result<(), VmxFailed> {
            let mut failed: u64 = 0;
            // SAFETY: By the caller; a fault ends at label 3.
            unsafe {
                heavy_asm!(
                    VMPTRLD,
                    concat!("2: ", $mnemonic, " qword ptr [{hpa}]"),
                    "ja 4f",
                    "3: mov {failed:e}, 1",
                    "4:",
                    extable!("2b", "3b"),
                    hpa = in(reg) &hpa,
                    failed = inout(reg) failed,
                );
            }
            if failed == 0 { Ok(()) } else { Err(VmxFailed) }
        }
    };
}

memory_instruction!(
    /// Enters VMX operation on this CPU with the VMXON region at `hpa`.
    ///
    /// # Safety
    ///
    /// The region must be a page with the revision id, not used otherwise until VMXOFF; CR4.VMXE must be set, and the
    /// thread must stay on this CPU.
    vmxon, "vmxon"
);
memory_instruction!(
    /// Makes the VMCS at `hpa` current on this CPU.
    ///
    /// # Safety
    ///
    /// It must be a VMCS region with the revision id that is active on no other CPU, and interrupts must be off.
    vmptrld, "vmptrld"
);
memory_instruction!(
    /// Writes the VMCS at `hpa` back to memory and makes it inactive and clear.
    ///
    /// # Safety
    ///
    /// It must be a VMCS region that is active on no other CPU, and interrupts must be off.
    vmclear, "vmclear"
);

/// The VMCS that is current on this CPU; all ones: none.
///
/// # Safety
///
/// Interrupts must be off.
pub(crate) unsafe fn vmptrst() -> Result<u64, VmxFailed> {
    let mut hpa: u64 = !0;
    let mut failed: u64 = 0;
    // SAFETY: Stores 8 bytes; a fault ends at label 3.
    unsafe {
        heavy_asm!(
            VMPTRLD,
            "2: vmptrst qword ptr [{hpa}]",
            "ja 4f",
            "3: mov {failed:e}, 1",
            "4:",
            extable!("2b", "3b"),
            hpa = in(reg) &mut hpa,
            failed = inout(reg) failed,
        );
    }
    if failed == 0 {
        Ok(hpa)
    } else {
        Err(VmxFailed)
    }
}

/// Leaves VMX operation on this CPU.
///
/// # Safety
///
/// No VMCS may be active here that is still wanted, and the thread must stay on this CPU.
pub(crate) unsafe fn vmxoff() -> Result<(), VmxFailed> {
    let mut failed: u64 = 0;
    // SAFETY: By the caller; a fault ends at label 3.
    unsafe {
        heavy_asm!(
            VMPTRLD,
            "2: vmxoff",
            "ja 4f",
            "3: mov {failed:e}, 1",
            "4:",
            extable!("2b", "3b"),
            failed = inout(reg) failed,
        );
    }
    if failed == 0 {
        Ok(())
    } else {
        Err(VmxFailed)
    }
}

/// Reads a field of the current VMCS. On failure gives 0 and sets `failed`.
///
/// # Safety
///
/// Interrupts must be off and a VMCS of ours current.
#[inline(always)]
pub(crate) unsafe fn vmread(encoding: u32, failed: &mut u64) -> u64 {
    let value: u64;
    // SAFETY: By the caller; a fault ends at label 3.
    unsafe {
        heavy_asm!(
            VMREAD,
            "2: vmread {value}, {encoding}",
            "ja 4f",
            "3: mov {failed:e}, 1",
            "xor {value:e}, {value:e}",
            "4:",
            extable!("2b", "3b"),
            encoding = in(reg) u64::from(encoding),
            value = out(reg) value,
            failed = inout(reg) *failed,
            options(nostack),
        );
    }
    value
}

/// Writes a field of the current VMCS. On failure sets `failed`.
///
/// # Safety
///
/// Interrupts must be off and a VMCS of ours current; the value must be harmless to the host (host-state fields,
/// controls and addresses are the module's own; guest state is what hardware checks).
#[inline(always)]
pub(crate) unsafe fn vmwrite(encoding: u32, value: u64, failed: &mut u64) {
    // SAFETY: By the caller; a fault ends at label 3.
    unsafe {
        heavy_asm!(
            VMWRITE,
            "2: vmwrite {encoding}, {value}",
            "ja 4f",
            "3: mov {failed:e}, 1",
            "4:",
            extable!("2b", "3b"),
            encoding = in(reg) u64::from(encoding),
            value = in(reg) value,
            failed = inout(reg) *failed,
            options(nostack),
        );
    }
}

/// Operand of INVEPT and INVVPID.
#[repr(C, align(16))]
struct Descriptor([u64; 2]);

const SINGLE_CONTEXT: u64 = 1;
const ALL_CONTEXT: u64 = 2;

macro_rules! invalidate {
    ($(#[$doc:meta])* $name:ident, $mnemonic:literal) => {
        $(#[$doc])*
        pub(crate) unsafe fn $name(context: Option<u64>) -> Result<(), VmxFailed> {
            let kind = if context.is_some() { SINGLE_CONTEXT } else { ALL_CONTEXT };
            let descriptor = Descriptor([context.unwrap_or(0), 0]);
            let mut failed: u64 = 0;
            // SAFETY: By the caller; a fault ends at label 3.
            unsafe {
                heavy_asm!(
                    INVALIDATION,
                    concat!("2: ", $mnemonic, " {kind}, xmmword ptr [{descriptor}]"),
                    "ja 4f",
                    "3: mov {failed:e}, 1",
                    "4:",
                    extable!("2b", "3b"),
                    kind = in(reg) kind,
                    descriptor = in(reg) &descriptor,
                    failed = inout(reg) failed,
                );
            }
            if failed == 0 { Ok(()) } else { Err(VmxFailed) }
        }
    };
}

invalidate!(
    /// Drops what this CPU cached from the EPT with that pointer; `None`: from all.
    ///
    /// # Safety
    ///
    /// VMX must be on and the CPU must have that type; interrupts must be off.
    invept, "invept"
);
invalidate!(
    /// Drops what this CPU cached for that VPID; `None`: for all.
    ///
    /// # Safety
    ///
    /// As [`invept`].
    invvpid, "invvpid"
);
