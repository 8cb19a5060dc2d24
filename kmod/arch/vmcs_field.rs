// SPDX-License-Identifier: GPL-2.0

//! The fields of a VMCS, by area, with their width and access in the type.
//!
//! One table, [`for_each_vmcs_field!`], makes the constants, the names for dumps and the build-time comparison with
//! the kernel's `enum vmcs_field` ([`assert_vmcs_fields!`]). The width and the area that an encoding states
//! (SDM, "Structure of VMCS Component Encoding") are asserted against the row that holds it.
//!
//! The kernel's `…_HIGH` names (encoding + 1, the upper half of a 64-bit field for a 32-bit host) have no row.

use core::marker::PhantomData;

/// Width of a 16-bit field.
#[derive(Clone, Copy, Debug)]
pub struct U16;
/// Width of a 32-bit field.
#[derive(Clone, Copy, Debug)]
pub struct U32;
/// Width of a 64-bit field.
#[derive(Clone, Copy, Debug)]
pub struct U64;
/// Natural width: 64 bits on the CPUs that we run on.
#[derive(Clone, Copy, Debug)]
pub struct Natural;

/// Width of a field, as a type.
pub trait Width {
    /// Bits 14:13 of the encoding.
    const ENCODED: u32;
    /// Bits that hold a value.
    const BITS: u32;
}

impl Width for U16 {
    const ENCODED: u32 = 0;
    const BITS: u32 = 16;
}
impl Width for U64 {
    const ENCODED: u32 = 1;
    const BITS: u32 = 64;
}
impl Width for U32 {
    const ENCODED: u32 = 2;
    const BITS: u32 = 32;
}
impl Width for Natural {
    const ENCODED: u32 = 3;
    const BITS: u32 = 64;
}

/// A field that VMWRITE may write.
#[derive(Clone, Copy, Debug)]
pub struct ReadWrite;
/// A VM-exit information field: only the CPU writes it.
#[derive(Clone, Copy, Debug)]
pub struct ReadOnly;

/// A VMCS field of width `W` with access `A`.
#[derive(Clone, Copy, Debug)]
pub struct Field<W, A> {
    encoding: u32,
    kind: PhantomData<(W, A)>,
}

impl<W, A> Field<W, A> {
    /// The number that VMREAD and VMWRITE take.
    pub const fn encoding(self) -> u32 {
        self.encoding
    }
}

impl<W: Width, A> Field<W, A> {
    /// For the table only: fails the build where the encoding states another width or area than its row.
    const fn new(encoding: u32, area: u32) -> Self {
        assert!((encoding >> 13) & 3 == W::ENCODED);
        assert!((encoding >> 10) & 3 == area);
        // Bit 0 is the access type (1 = high half), bit 12 and bits 31:15 are reserved.
        assert!(encoding & 0xffff_9001 == 0);
        Self {
            encoding,
            kind: PhantomData,
        }
    }

    /// Bits of the field's value.
    pub const fn bits(self) -> u32 {
        W::BITS
    }
}

/// Calls `$callback!` with the whole table of fields, behind the tokens given.
///
/// A row is `NAME, width, encoding, name in the kernel's bindings` (`-` where Linux 6.12 has none).
#[macro_export]
macro_rules! for_each_vmcs_field {
    ($callback:path $(, $argument:tt)*) => {
        $callback! {
            $($argument)*

            /// Control fields: what the CPU does in the guest, on entry and on exit.
            control, ReadWrite, 0 {
                VPID, U16, 0x0000, vmcs_field_VIRTUAL_PROCESSOR_ID;
                POSTED_INTERRUPT_NOTIFICATION_VECTOR, U16, 0x0002, vmcs_field_POSTED_INTR_NV;
                EPTP_INDEX, U16, 0x0004, -;
                HLAT_PREFIX_SIZE, U16, 0x0006, -;
                LAST_PID_POINTER_INDEX, U16, 0x0008, vmcs_field_LAST_PID_POINTER_INDEX;
                IO_BITMAP_A, U64, 0x2000, vmcs_field_IO_BITMAP_A;
                IO_BITMAP_B, U64, 0x2002, vmcs_field_IO_BITMAP_B;
                MSR_BITMAP, U64, 0x2004, vmcs_field_MSR_BITMAP;
                EXIT_MSR_STORE_ADDRESS, U64, 0x2006, vmcs_field_VM_EXIT_MSR_STORE_ADDR;
                EXIT_MSR_LOAD_ADDRESS, U64, 0x2008, vmcs_field_VM_EXIT_MSR_LOAD_ADDR;
                ENTRY_MSR_LOAD_ADDRESS, U64, 0x200a, vmcs_field_VM_ENTRY_MSR_LOAD_ADDR;
                EXECUTIVE_VMCS_POINTER, U64, 0x200c, -;
                PML_ADDRESS, U64, 0x200e, vmcs_field_PML_ADDRESS;
                TSC_OFFSET, U64, 0x2010, vmcs_field_TSC_OFFSET;
                VIRTUAL_APIC_ADDRESS, U64, 0x2012, vmcs_field_VIRTUAL_APIC_PAGE_ADDR;
                APIC_ACCESS_ADDRESS, U64, 0x2014, vmcs_field_APIC_ACCESS_ADDR;
                POSTED_INTERRUPT_DESCRIPTOR_ADDRESS, U64, 0x2016, vmcs_field_POSTED_INTR_DESC_ADDR;
                VM_FUNCTION_CONTROLS, U64, 0x2018, vmcs_field_VM_FUNCTION_CONTROL;
                EPT_POINTER, U64, 0x201a, vmcs_field_EPT_POINTER;
                EOI_EXIT_BITMAP_0, U64, 0x201c, vmcs_field_EOI_EXIT_BITMAP0;
                EOI_EXIT_BITMAP_1, U64, 0x201e, vmcs_field_EOI_EXIT_BITMAP1;
                EOI_EXIT_BITMAP_2, U64, 0x2020, vmcs_field_EOI_EXIT_BITMAP2;
                EOI_EXIT_BITMAP_3, U64, 0x2022, vmcs_field_EOI_EXIT_BITMAP3;
                EPTP_LIST_ADDRESS, U64, 0x2024, vmcs_field_EPTP_LIST_ADDRESS;
                VMREAD_BITMAP, U64, 0x2026, vmcs_field_VMREAD_BITMAP;
                VMWRITE_BITMAP, U64, 0x2028, vmcs_field_VMWRITE_BITMAP;
                VE_INFORMATION_ADDRESS, U64, 0x202a, vmcs_field_VE_INFORMATION_ADDRESS;
                XSS_EXITING_BITMAP, U64, 0x202c, vmcs_field_XSS_EXIT_BITMAP;
                ENCLS_EXITING_BITMAP, U64, 0x202e, vmcs_field_ENCLS_EXITING_BITMAP;
                SPP_TABLE_POINTER, U64, 0x2030, -;
                TSC_MULTIPLIER, U64, 0x2032, vmcs_field_TSC_MULTIPLIER;
                TERTIARY, U64, 0x2034, vmcs_field_TERTIARY_VM_EXEC_CONTROL;
                ENCLV_EXITING_BITMAP, U64, 0x2036, -;
                PID_POINTER_TABLE, U64, 0x2042, vmcs_field_PID_POINTER_TABLE;
                PIN_BASED, U32, 0x4000, vmcs_field_PIN_BASED_VM_EXEC_CONTROL;
                PRIMARY, U32, 0x4002, vmcs_field_CPU_BASED_VM_EXEC_CONTROL;
                EXCEPTION_BITMAP, U32, 0x4004, vmcs_field_EXCEPTION_BITMAP;
                PAGE_FAULT_ERROR_CODE_MASK, U32, 0x4006, vmcs_field_PAGE_FAULT_ERROR_CODE_MASK;
                PAGE_FAULT_ERROR_CODE_MATCH, U32, 0x4008, vmcs_field_PAGE_FAULT_ERROR_CODE_MATCH;
                CR3_TARGET_COUNT, U32, 0x400a, vmcs_field_CR3_TARGET_COUNT;
                EXIT, U32, 0x400c, vmcs_field_VM_EXIT_CONTROLS;
                EXIT_MSR_STORE_COUNT, U32, 0x400e, vmcs_field_VM_EXIT_MSR_STORE_COUNT;
                EXIT_MSR_LOAD_COUNT, U32, 0x4010, vmcs_field_VM_EXIT_MSR_LOAD_COUNT;
                ENTRY, U32, 0x4012, vmcs_field_VM_ENTRY_CONTROLS;
                ENTRY_MSR_LOAD_COUNT, U32, 0x4014, vmcs_field_VM_ENTRY_MSR_LOAD_COUNT;
                ENTRY_INTERRUPTION_INFO, U32, 0x4016, vmcs_field_VM_ENTRY_INTR_INFO_FIELD;
                ENTRY_EXCEPTION_ERROR_CODE, U32, 0x4018, vmcs_field_VM_ENTRY_EXCEPTION_ERROR_CODE;
                ENTRY_INSTRUCTION_LENGTH, U32, 0x401a, vmcs_field_VM_ENTRY_INSTRUCTION_LEN;
                TPR_THRESHOLD, U32, 0x401c, vmcs_field_TPR_THRESHOLD;
                SECONDARY, U32, 0x401e, vmcs_field_SECONDARY_VM_EXEC_CONTROL;
                PLE_GAP, U32, 0x4020, vmcs_field_PLE_GAP;
                PLE_WINDOW, U32, 0x4022, vmcs_field_PLE_WINDOW;
                NOTIFY_WINDOW, U32, 0x4024, vmcs_field_NOTIFY_WINDOW;
                CR0_GUEST_HOST_MASK, Natural, 0x6000, vmcs_field_CR0_GUEST_HOST_MASK;
                CR4_GUEST_HOST_MASK, Natural, 0x6002, vmcs_field_CR4_GUEST_HOST_MASK;
                CR0_READ_SHADOW, Natural, 0x6004, vmcs_field_CR0_READ_SHADOW;
                CR4_READ_SHADOW, Natural, 0x6006, vmcs_field_CR4_READ_SHADOW;
                CR3_TARGET_VALUE_0, Natural, 0x6008, vmcs_field_CR3_TARGET_VALUE0;
                CR3_TARGET_VALUE_1, Natural, 0x600a, vmcs_field_CR3_TARGET_VALUE1;
                CR3_TARGET_VALUE_2, Natural, 0x600c, vmcs_field_CR3_TARGET_VALUE2;
                CR3_TARGET_VALUE_3, Natural, 0x600e, vmcs_field_CR3_TARGET_VALUE3;
            }

            /// VM-exit information fields: why the last exit came.
            exit_info, ReadOnly, 1 {
                GUEST_PHYSICAL_ADDRESS, U64, 0x2400, vmcs_field_GUEST_PHYSICAL_ADDRESS;
                INSTRUCTION_ERROR, U32, 0x4400, vmcs_field_VM_INSTRUCTION_ERROR;
                REASON, U32, 0x4402, vmcs_field_VM_EXIT_REASON;
                INTERRUPTION_INFO, U32, 0x4404, vmcs_field_VM_EXIT_INTR_INFO;
                INTERRUPTION_ERROR_CODE, U32, 0x4406, vmcs_field_VM_EXIT_INTR_ERROR_CODE;
                IDT_VECTORING_INFO, U32, 0x4408, vmcs_field_IDT_VECTORING_INFO_FIELD;
                IDT_VECTORING_ERROR_CODE, U32, 0x440a, vmcs_field_IDT_VECTORING_ERROR_CODE;
                INSTRUCTION_LENGTH, U32, 0x440c, vmcs_field_VM_EXIT_INSTRUCTION_LEN;
                INSTRUCTION_INFO, U32, 0x440e, vmcs_field_VMX_INSTRUCTION_INFO;
                QUALIFICATION, Natural, 0x6400, vmcs_field_EXIT_QUALIFICATION;
                IO_RCX, Natural, 0x6402, -;
                IO_RSI, Natural, 0x6404, -;
                IO_RDI, Natural, 0x6406, -;
                IO_RIP, Natural, 0x6408, -;
                GUEST_LINEAR_ADDRESS, Natural, 0x640a, vmcs_field_GUEST_LINEAR_ADDRESS;
            }

            /// Guest-state area: loaded on entry, stored on exit.
            guest, ReadWrite, 2 {
                ES_SELECTOR, U16, 0x0800, vmcs_field_GUEST_ES_SELECTOR;
                CS_SELECTOR, U16, 0x0802, vmcs_field_GUEST_CS_SELECTOR;
                SS_SELECTOR, U16, 0x0804, vmcs_field_GUEST_SS_SELECTOR;
                DS_SELECTOR, U16, 0x0806, vmcs_field_GUEST_DS_SELECTOR;
                FS_SELECTOR, U16, 0x0808, vmcs_field_GUEST_FS_SELECTOR;
                GS_SELECTOR, U16, 0x080a, vmcs_field_GUEST_GS_SELECTOR;
                LDTR_SELECTOR, U16, 0x080c, vmcs_field_GUEST_LDTR_SELECTOR;
                TR_SELECTOR, U16, 0x080e, vmcs_field_GUEST_TR_SELECTOR;
                INTERRUPT_STATUS, U16, 0x0810, vmcs_field_GUEST_INTR_STATUS;
                PML_INDEX, U16, 0x0812, vmcs_field_GUEST_PML_INDEX;
                VMCS_LINK_POINTER, U64, 0x2800, vmcs_field_VMCS_LINK_POINTER;
                DEBUGCTL, U64, 0x2802, vmcs_field_GUEST_IA32_DEBUGCTL;
                PAT, U64, 0x2804, vmcs_field_GUEST_IA32_PAT;
                EFER, U64, 0x2806, vmcs_field_GUEST_IA32_EFER;
                PERF_GLOBAL_CTRL, U64, 0x2808, vmcs_field_GUEST_IA32_PERF_GLOBAL_CTRL;
                PDPTE_0, U64, 0x280a, vmcs_field_GUEST_PDPTR0;
                PDPTE_1, U64, 0x280c, vmcs_field_GUEST_PDPTR1;
                PDPTE_2, U64, 0x280e, vmcs_field_GUEST_PDPTR2;
                PDPTE_3, U64, 0x2810, vmcs_field_GUEST_PDPTR3;
                BNDCFGS, U64, 0x2812, vmcs_field_GUEST_BNDCFGS;
                RTIT_CTL, U64, 0x2814, vmcs_field_GUEST_IA32_RTIT_CTL;
                LBR_CTL, U64, 0x2816, -;
                PKRS, U64, 0x2818, -;
                ES_LIMIT, U32, 0x4800, vmcs_field_GUEST_ES_LIMIT;
                CS_LIMIT, U32, 0x4802, vmcs_field_GUEST_CS_LIMIT;
                SS_LIMIT, U32, 0x4804, vmcs_field_GUEST_SS_LIMIT;
                DS_LIMIT, U32, 0x4806, vmcs_field_GUEST_DS_LIMIT;
                FS_LIMIT, U32, 0x4808, vmcs_field_GUEST_FS_LIMIT;
                GS_LIMIT, U32, 0x480a, vmcs_field_GUEST_GS_LIMIT;
                LDTR_LIMIT, U32, 0x480c, vmcs_field_GUEST_LDTR_LIMIT;
                TR_LIMIT, U32, 0x480e, vmcs_field_GUEST_TR_LIMIT;
                GDTR_LIMIT, U32, 0x4810, vmcs_field_GUEST_GDTR_LIMIT;
                IDTR_LIMIT, U32, 0x4812, vmcs_field_GUEST_IDTR_LIMIT;
                ES_ACCESS_RIGHTS, U32, 0x4814, vmcs_field_GUEST_ES_AR_BYTES;
                CS_ACCESS_RIGHTS, U32, 0x4816, vmcs_field_GUEST_CS_AR_BYTES;
                SS_ACCESS_RIGHTS, U32, 0x4818, vmcs_field_GUEST_SS_AR_BYTES;
                DS_ACCESS_RIGHTS, U32, 0x481a, vmcs_field_GUEST_DS_AR_BYTES;
                FS_ACCESS_RIGHTS, U32, 0x481c, vmcs_field_GUEST_FS_AR_BYTES;
                GS_ACCESS_RIGHTS, U32, 0x481e, vmcs_field_GUEST_GS_AR_BYTES;
                LDTR_ACCESS_RIGHTS, U32, 0x4820, vmcs_field_GUEST_LDTR_AR_BYTES;
                TR_ACCESS_RIGHTS, U32, 0x4822, vmcs_field_GUEST_TR_AR_BYTES;
                INTERRUPTIBILITY_STATE, U32, 0x4824, vmcs_field_GUEST_INTERRUPTIBILITY_INFO;
                ACTIVITY_STATE, U32, 0x4826, vmcs_field_GUEST_ACTIVITY_STATE;
                SMBASE, U32, 0x4828, -;
                SYSENTER_CS, U32, 0x482a, vmcs_field_GUEST_SYSENTER_CS;
                PREEMPTION_TIMER_VALUE, U32, 0x482e, vmcs_field_VMX_PREEMPTION_TIMER_VALUE;
                CR0, Natural, 0x6800, vmcs_field_GUEST_CR0;
                CR3, Natural, 0x6802, vmcs_field_GUEST_CR3;
                CR4, Natural, 0x6804, vmcs_field_GUEST_CR4;
                ES_BASE, Natural, 0x6806, vmcs_field_GUEST_ES_BASE;
                CS_BASE, Natural, 0x6808, vmcs_field_GUEST_CS_BASE;
                SS_BASE, Natural, 0x680a, vmcs_field_GUEST_SS_BASE;
                DS_BASE, Natural, 0x680c, vmcs_field_GUEST_DS_BASE;
                FS_BASE, Natural, 0x680e, vmcs_field_GUEST_FS_BASE;
                GS_BASE, Natural, 0x6810, vmcs_field_GUEST_GS_BASE;
                LDTR_BASE, Natural, 0x6812, vmcs_field_GUEST_LDTR_BASE;
                TR_BASE, Natural, 0x6814, vmcs_field_GUEST_TR_BASE;
                GDTR_BASE, Natural, 0x6816, vmcs_field_GUEST_GDTR_BASE;
                IDTR_BASE, Natural, 0x6818, vmcs_field_GUEST_IDTR_BASE;
                DR7, Natural, 0x681a, vmcs_field_GUEST_DR7;
                RSP, Natural, 0x681c, vmcs_field_GUEST_RSP;
                RIP, Natural, 0x681e, vmcs_field_GUEST_RIP;
                RFLAGS, Natural, 0x6820, vmcs_field_GUEST_RFLAGS;
                PENDING_DEBUG_EXCEPTIONS, Natural, 0x6822, vmcs_field_GUEST_PENDING_DBG_EXCEPTIONS;
                SYSENTER_ESP, Natural, 0x6824, vmcs_field_GUEST_SYSENTER_ESP;
                SYSENTER_EIP, Natural, 0x6826, vmcs_field_GUEST_SYSENTER_EIP;
                S_CET, Natural, 0x6828, -;
                SSP, Natural, 0x682a, -;
                INTERRUPT_SSP_TABLE_ADDR, Natural, 0x682c, -;
            }

            /// Host-state area: loaded on exit.
            host, ReadWrite, 3 {
                ES_SELECTOR, U16, 0x0c00, vmcs_field_HOST_ES_SELECTOR;
                CS_SELECTOR, U16, 0x0c02, vmcs_field_HOST_CS_SELECTOR;
                SS_SELECTOR, U16, 0x0c04, vmcs_field_HOST_SS_SELECTOR;
                DS_SELECTOR, U16, 0x0c06, vmcs_field_HOST_DS_SELECTOR;
                FS_SELECTOR, U16, 0x0c08, vmcs_field_HOST_FS_SELECTOR;
                GS_SELECTOR, U16, 0x0c0a, vmcs_field_HOST_GS_SELECTOR;
                TR_SELECTOR, U16, 0x0c0c, vmcs_field_HOST_TR_SELECTOR;
                PAT, U64, 0x2c00, vmcs_field_HOST_IA32_PAT;
                EFER, U64, 0x2c02, vmcs_field_HOST_IA32_EFER;
                PERF_GLOBAL_CTRL, U64, 0x2c04, vmcs_field_HOST_IA32_PERF_GLOBAL_CTRL;
                PKRS, U64, 0x2c06, -;
                SYSENTER_CS, U32, 0x4c00, vmcs_field_HOST_IA32_SYSENTER_CS;
                CR0, Natural, 0x6c00, vmcs_field_HOST_CR0;
                CR3, Natural, 0x6c02, vmcs_field_HOST_CR3;
                CR4, Natural, 0x6c04, vmcs_field_HOST_CR4;
                FS_BASE, Natural, 0x6c06, vmcs_field_HOST_FS_BASE;
                GS_BASE, Natural, 0x6c08, vmcs_field_HOST_GS_BASE;
                TR_BASE, Natural, 0x6c0a, vmcs_field_HOST_TR_BASE;
                GDTR_BASE, Natural, 0x6c0c, vmcs_field_HOST_GDTR_BASE;
                IDTR_BASE, Natural, 0x6c0e, vmcs_field_HOST_IDTR_BASE;
                SYSENTER_ESP, Natural, 0x6c10, vmcs_field_HOST_IA32_SYSENTER_ESP;
                SYSENTER_EIP, Natural, 0x6c12, vmcs_field_HOST_IA32_SYSENTER_EIP;
                RSP, Natural, 0x6c14, vmcs_field_HOST_RSP;
                RIP, Natural, 0x6c16, vmcs_field_HOST_RIP;
                S_CET, Natural, 0x6c18, -;
                SSP, Natural, 0x6c1a, -;
                INTERRUPT_SSP_TABLE_ADDR, Natural, 0x6c1c, -;
            }
        }
    };
}

macro_rules! define_fields {
    ($(
        $(#[$doc:meta])*
        $area:ident, $access:ident, $number:literal {
            $($name:ident, $width:ident, $encoding:literal, $linux:tt;)*
        }
    )*) => {
        $(
            $(#[$doc])*
            #[allow(missing_docs)] // Each name is the SDM's.
            pub mod $area {
                use super::*;
                $(pub const $name: Field<$width, $access> = Field::new($encoding, $number);)*
            }
        )*

        /// Every field: encoding, area and name (`"guest"`, `"RIP"`), bits of its value, name that Linux gives it
        /// in its bindings (`"-"`: none).
        pub const FIELDS: &[(u32, &str, &str, u32, &str)] = &[
            $($((
                $area::$name.encoding(),
                stringify!($area),
                stringify!($name),
                $area::$name.bits(),
                stringify!($linux),
            ),)*)*
        ];

        /// Name of a field for a dump: `"guest::RIP"`.
        pub fn name(encoding: u32) -> Option<&'static str> {
            match encoding {
                $($($encoding => Some(concat!(stringify!($area), "::", stringify!($name))),)*)*
                _ => None,
            }
        }
    };
}

for_each_vmcs_field!(define_fields);

/// Fails the build where a row of the table differs from the kernel's `enum vmcs_field`.
///
/// `assert_vmcs_fields!(path::to::bindings)`; the module named has bindgen's constants `vmcs_field_GUEST_RIP` ….
#[macro_export]
macro_rules! assert_vmcs_fields {
    ($($bindings:ident)::+) => {
        const _: () = {
            use $($bindings)::+ as linux;
            $crate::for_each_vmcs_field!($crate::assert_vmcs_fields_rows, linux);
        };
    };
}

/// Part of [`assert_vmcs_fields!`].
#[doc(hidden)]
#[macro_export]
macro_rules! assert_vmcs_fields_rows {
    ($linux:ident $(
        $(#[$doc:meta])*
        $area:ident, $access:ident, $number:literal {
            $($name:ident, $width:ident, $encoding:literal, $field:tt;)*
        }
    )*) => {
        $($($crate::assert_vmcs_fields_row!($linux, $encoding, $field);)*)*
    };
}

/// Part of [`assert_vmcs_fields!`].
#[doc(hidden)]
#[macro_export]
macro_rules! assert_vmcs_fields_row {
    ($linux:ident, $encoding:literal, -) => {};
    ($linux:ident, $encoding:literal, $field:ident) => {
        assert!(
            $linux::$field as u32 == $encoding,
            concat!(stringify!($field), " differs from the kernel's")
        );
    };
}
