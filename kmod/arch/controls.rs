// SPDX-License-Identifier: GPL-2.0

//! VM-execution, VM-exit and VM-entry controls: what the module asks for and what a CPU can give.
//!
//! The five words are data ([`PIN`] … [`ENTRY`]); [`adjust`] fits one to the CPU's capability MSR, and
//! [`VmxCapabilities::from_msrs`] does it for all and checks what else the module needs. docs/guest-policy.md has the
//! reason of each row. A control that is in no row stays 0, the setting that exits or faults or that is off.

use core::fmt;

use super::msr;

/// Pin-based VM-execution controls (SDM, "Pin-Based VM-Execution Controls").
pub mod pin {
    pub const EXTERNAL_INTERRUPT_EXITING: u32 = 1 << 0;
    pub const NMI_EXITING: u32 = 1 << 3;
    pub const VIRTUAL_NMIS: u32 = 1 << 5;
    pub const PREEMPTION_TIMER: u32 = 1 << 6;
    pub const POSTED_INTERRUPTS: u32 = 1 << 7;
    /// Bits that are 1 on every CPU unless a TRUE capability MSR says otherwise.
    pub const DEFAULT1: u32 = 0x0000_0016;
}

/// Primary processor-based VM-execution controls.
pub mod primary {
    pub const INTERRUPT_WINDOW_EXITING: u32 = 1 << 2;
    pub const USE_TSC_OFFSETTING: u32 = 1 << 3;
    pub const HLT_EXITING: u32 = 1 << 7;
    pub const INVLPG_EXITING: u32 = 1 << 9;
    pub const MWAIT_EXITING: u32 = 1 << 10;
    pub const RDPMC_EXITING: u32 = 1 << 11;
    pub const RDTSC_EXITING: u32 = 1 << 12;
    pub const CR3_LOAD_EXITING: u32 = 1 << 15;
    pub const CR3_STORE_EXITING: u32 = 1 << 16;
    pub const ACTIVATE_TERTIARY: u32 = 1 << 17;
    pub const CR8_LOAD_EXITING: u32 = 1 << 19;
    pub const CR8_STORE_EXITING: u32 = 1 << 20;
    pub const TPR_SHADOW: u32 = 1 << 21;
    pub const NMI_WINDOW_EXITING: u32 = 1 << 22;
    pub const MOV_DR_EXITING: u32 = 1 << 23;
    pub const UNCONDITIONAL_IO_EXITING: u32 = 1 << 24;
    pub const USE_IO_BITMAPS: u32 = 1 << 25;
    pub const MONITOR_TRAP_FLAG: u32 = 1 << 27;
    pub const USE_MSR_BITMAPS: u32 = 1 << 28;
    pub const MONITOR_EXITING: u32 = 1 << 29;
    pub const PAUSE_EXITING: u32 = 1 << 30;
    pub const ACTIVATE_SECONDARY: u32 = 1 << 31;
    /// As [`super::pin::DEFAULT1`].
    pub const DEFAULT1: u32 = 0x0401_e172;
}

/// Secondary processor-based VM-execution controls.
pub mod secondary {
    pub const VIRTUALIZE_APIC_ACCESSES: u32 = 1 << 0;
    pub const ENABLE_EPT: u32 = 1 << 1;
    pub const DESCRIPTOR_TABLE_EXITING: u32 = 1 << 2;
    pub const ENABLE_RDTSCP: u32 = 1 << 3;
    pub const VIRTUALIZE_X2APIC_MODE: u32 = 1 << 4;
    pub const ENABLE_VPID: u32 = 1 << 5;
    pub const WBINVD_EXITING: u32 = 1 << 6;
    pub const UNRESTRICTED_GUEST: u32 = 1 << 7;
    pub const APIC_REGISTER_VIRTUALIZATION: u32 = 1 << 8;
    pub const VIRTUAL_INTERRUPT_DELIVERY: u32 = 1 << 9;
    pub const PAUSE_LOOP_EXITING: u32 = 1 << 10;
    pub const RDRAND_EXITING: u32 = 1 << 11;
    pub const ENABLE_INVPCID: u32 = 1 << 12;
    pub const ENABLE_VM_FUNCTIONS: u32 = 1 << 13;
    pub const VMCS_SHADOWING: u32 = 1 << 14;
    pub const ENCLS_EXITING: u32 = 1 << 15;
    pub const RDSEED_EXITING: u32 = 1 << 16;
    pub const ENABLE_PML: u32 = 1 << 17;
    pub const EPT_VIOLATION_VE: u32 = 1 << 18;
    pub const CONCEAL_VMX_FROM_PT: u32 = 1 << 19;
    pub const ENABLE_XSAVES: u32 = 1 << 20;
    pub const PASID_TRANSLATION: u32 = 1 << 21;
    pub const MODE_BASED_EXECUTE: u32 = 1 << 22;
    pub const SUB_PAGE_WRITE: u32 = 1 << 23;
    pub const PT_USES_GPA: u32 = 1 << 24;
    pub const USE_TSC_SCALING: u32 = 1 << 25;
    pub const ENABLE_USER_WAIT_AND_PAUSE: u32 = 1 << 26;
    pub const ENABLE_PCONFIG: u32 = 1 << 27;
    pub const ENCLV_EXITING: u32 = 1 << 28;
    pub const BUS_LOCK_DETECTION: u32 = 1 << 30;
    pub const INSTRUCTION_TIMEOUT: u32 = 1 << 31;
    /// No control of this word is 1 unless asked for.
    pub const DEFAULT1: u32 = 0;
}

/// VM-exit controls.
pub mod exit {
    pub const SAVE_DEBUG_CONTROLS: u32 = 1 << 2;
    pub const HOST_ADDRESS_SPACE_SIZE: u32 = 1 << 9;
    pub const LOAD_PERF_GLOBAL_CTRL: u32 = 1 << 12;
    pub const ACKNOWLEDGE_INTERRUPT: u32 = 1 << 15;
    pub const SAVE_PAT: u32 = 1 << 18;
    pub const LOAD_PAT: u32 = 1 << 19;
    pub const SAVE_EFER: u32 = 1 << 20;
    pub const LOAD_EFER: u32 = 1 << 21;
    pub const SAVE_PREEMPTION_TIMER: u32 = 1 << 22;
    pub const CLEAR_BNDCFGS: u32 = 1 << 23;
    pub const CONCEAL_VMX_FROM_PT: u32 = 1 << 24;
    pub const CLEAR_RTIT_CTL: u32 = 1 << 25;
    pub const CLEAR_LBR_CTL: u32 = 1 << 26;
    pub const LOAD_CET: u32 = 1 << 28;
    pub const LOAD_PKRS: u32 = 1 << 29;
    pub const SAVE_PERF_GLOBAL_CTRL: u32 = 1 << 30;
    pub const ACTIVATE_SECONDARY: u32 = 1 << 31;
    /// As [`super::pin::DEFAULT1`].
    pub const DEFAULT1: u32 = 0x0003_6dff;
}

/// VM-entry controls.
pub mod entry {
    pub const LOAD_DEBUG_CONTROLS: u32 = 1 << 2;
    pub const IA32E_MODE_GUEST: u32 = 1 << 9;
    pub const ENTRY_TO_SMM: u32 = 1 << 10;
    pub const DEACTIVATE_DUAL_MONITOR: u32 = 1 << 11;
    pub const LOAD_PERF_GLOBAL_CTRL: u32 = 1 << 13;
    pub const LOAD_PAT: u32 = 1 << 14;
    pub const LOAD_EFER: u32 = 1 << 15;
    pub const LOAD_BNDCFGS: u32 = 1 << 16;
    pub const CONCEAL_VMX_FROM_PT: u32 = 1 << 17;
    pub const LOAD_RTIT_CTL: u32 = 1 << 18;
    pub const LOAD_CET: u32 = 1 << 20;
    pub const LOAD_LBR_CTL: u32 = 1 << 21;
    pub const LOAD_PKRS: u32 = 1 << 22;
    /// As [`super::pin::DEFAULT1`].
    pub const DEFAULT1: u32 = 0x0000_11ff;
}

/// Bits of the exception bitmap: a set bit makes that exception exit.
pub mod exception {
    pub const DB: u32 = 1 << 1;
    pub const BP: u32 = 1 << 3;
    pub const UD: u32 = 1 << 6;
    pub const NM: u32 = 1 << 7;
    pub const DF: u32 = 1 << 8;
    pub const GP: u32 = 1 << 13;
    pub const PF: u32 = 1 << 14;
    pub const AC: u32 = 1 << 17;
    pub const MC: u32 = 1 << 18;
    /// Always intercepted. A guest-chosen IDT can make a CPU deliver #AC or #DB for ever, deaf to interrupts
    /// (CVE-2015-5307, CVE-2015-8104); a machine check is the host's.
    pub const ALWAYS: u32 = DB | AC | MC;
}

/// What the module wants of one word of controls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Without these it does not run.
    pub required: u32,
    /// Set where the CPU has them.
    pub optional: u32,
    /// Not asked for, but harmless where the CPU insists on 1: reserved bits of the default1 class.
    pub tolerated: u32,
}

/// External interrupts and NMIs are the host's.
pub const PIN: Wanted = Wanted {
    required: pin::EXTERNAL_INTERRUPT_EXITING | pin::NMI_EXITING,
    optional: 0,
    tolerated: pin::DEFAULT1,
};

/// Every instruction that is refused or emulated exits; CR3, INVLPG and RDTSC are the guest's.
pub const PRIMARY: Wanted = Wanted {
    required: primary::HLT_EXITING
        | primary::MWAIT_EXITING
        | primary::MONITOR_EXITING
        | primary::RDPMC_EXITING
        | primary::UNCONDITIONAL_IO_EXITING
        | primary::MOV_DR_EXITING
        | primary::CR8_LOAD_EXITING
        | primary::CR8_STORE_EXITING
        | primary::USE_MSR_BITMAPS
        | primary::ACTIVATE_SECONDARY,
    optional: 0,
    tolerated: primary::DEFAULT1 & !(primary::CR3_LOAD_EXITING | primary::CR3_STORE_EXITING),
};

/// EPT is what Dune is made of; the rest spares flushes or refuses an instruction that the CPU has.
pub const SECONDARY: Wanted = Wanted {
    required: secondary::ENABLE_EPT,
    optional: secondary::ENABLE_VPID
        | secondary::ENABLE_RDTSCP
        | secondary::ENABLE_INVPCID
        | secondary::WBINVD_EXITING
        | secondary::ENCLS_EXITING,
    tolerated: secondary::DEFAULT1,
};

/// Back into a 64-bit host; an external interrupt stays pending for STI to take.
pub const EXIT: Wanted = Wanted {
    required: exit::HOST_ADDRESS_SPACE_SIZE | exit::SAVE_EFER | exit::LOAD_EFER,
    optional: 0,
    tolerated: exit::DEFAULT1,
};

/// Into a 64-bit guest with its own DR7, DEBUGCTL and EFER.
pub const ENTRY: Wanted = Wanted {
    required: entry::IA32E_MODE_GUEST | entry::LOAD_EFER | entry::LOAD_DEBUG_CONTROLS,
    optional: 0,
    tolerated: entry::DEFAULT1,
};

/// Why a CPU cannot give the wanted word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdjustError {
    /// These required bits may not be 1.
    Missing(u32),
    /// These bits must be 1 and are neither asked for nor tolerated.
    Unwanted(u32),
}

/// Fits a word of controls to its capability MSR.
///
/// `capability` has the bits that must be 1 in its low half (allowed 0-settings) and those that may be 1 in its
/// high half (allowed 1-settings): SDM, "VM-Execution Controls" in "VMX Capability Reporting Facility". The result
/// has every bit of the former and none outside the latter.
///
/// # Errors
///
/// The bits in the way; a missing one is reported before an unwanted one.
pub const fn adjust(wanted: Wanted, capability: u64) -> Result<u32, AdjustError> {
    let must = capability as u32;
    let may = (capability >> 32) as u32;

    let missing = wanted.required & !may;
    if missing != 0 {
        return Err(AdjustError::Missing(missing));
    }
    // A bit that must be 1 and may not be is a CPU (or hypervisor) contradicting itself.
    let asked = wanted.required | wanted.optional | wanted.tolerated;
    let unwanted = must & (!asked | !may);
    if unwanted != 0 {
        return Err(AdjustError::Unwanted(unwanted));
    }
    Ok(wanted.required | (wanted.optional & may) | must)
}

/// One of the five words of controls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    Pin,
    Primary,
    Secondary,
    Exit,
    Entry,
}

impl Word {
    /// The SDM's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pin => "pin-based VM-execution control",
            Self::Primary => "primary processor-based VM-execution control",
            Self::Secondary => "secondary processor-based VM-execution control",
            Self::Exit => "VM-exit control",
            Self::Entry => "VM-entry control",
        }
    }

    /// The SDM's name of a bit that the module asks for or refuses; empty for others.
    pub const fn bit_name(self, bit: u32) -> &'static str {
        match (self, bit) {
            (Self::Pin, 0) => "external-interrupt exiting",
            (Self::Pin, 3) => "NMI exiting",
            (Self::Primary, 7) => "HLT exiting",
            (Self::Primary, 9) => "INVLPG exiting",
            (Self::Primary, 10) => "MWAIT exiting",
            (Self::Primary, 11) => "RDPMC exiting",
            (Self::Primary, 12) => "RDTSC exiting",
            (Self::Primary, 15) => "CR3-load exiting",
            (Self::Primary, 16) => "CR3-store exiting",
            (Self::Primary, 19) => "CR8-load exiting",
            (Self::Primary, 20) => "CR8-store exiting",
            (Self::Primary, 21) => "use TPR shadow",
            (Self::Primary, 23) => "MOV-DR exiting",
            (Self::Primary, 24) => "unconditional I/O exiting",
            (Self::Primary, 28) => "use MSR bitmaps",
            (Self::Primary, 29) => "MONITOR exiting",
            (Self::Primary, 31) => "activate secondary controls",
            (Self::Secondary, 1) => "enable EPT",
            (Self::Exit, 9) => "host address-space size",
            (Self::Exit, 15) => "acknowledge interrupt on exit",
            (Self::Exit, 20) => "save IA32_EFER",
            (Self::Exit, 21) => "load IA32_EFER",
            (Self::Entry, 2) => "load debug controls",
            (Self::Entry, 9) => "IA-32e mode guest",
            (Self::Entry, 15) => "load IA32_EFER",
            _ => "",
        }
    }
}

/// A property of EPT that the module cannot do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EptFeature {
    PageWalk4,
    WriteBack,
    Invept,
}

impl EptFeature {
    /// The SDM's words for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::PageWalk4 => "a page-walk length of 4",
            Self::WriteBack => "write-back paging structures",
            Self::Invept => "INVEPT with the single-context or all-context type",
        }
    }
}

/// Why the module cannot run on this CPU; `Display` says it in one sentence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Missing {
    /// CPUID.1:ECX.VMX is 0.
    NoVmx,
    /// IA32_FEATURE_CONTROL is locked without VMXON outside SMX.
    DisabledByFirmware,
    /// IA32_FEATURE_CONTROL is not locked: VMXON would fault.
    NotEnabled,
    /// An MSR that VMX implies cannot be read.
    NoMsr(u32),
    /// Primary control "activate secondary controls" cannot be 1.
    NoSecondary,
    /// Secondary control "enable EPT" cannot be 1.
    NoEpt,
    /// IA32_VMX_EPT_VPID_CAP lacks something.
    NoEptFeature(EptFeature),
    /// IA32_VMX_BASIC bit 55 is 0.
    NoTrueControls,
    /// The VMCS region is larger than a page or not write-back.
    OddRegion,
    /// A control that the module needs cannot be 1.
    RequiredControl { word: Word, bit: u32 },
    /// A control that the module must have off cannot be 0.
    UnwantedControl { word: Word, bit: u32 },
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NoVmx => f.write_str("this CPU has no VMX (CPUID.1:ECX.VMX is 0)"),
            Self::DisabledByFirmware => f.write_str(
                "VMX is switched off by the firmware (IA32_FEATURE_CONTROL is locked without VMXON outside SMX): \
                 enable virtualization in its setup",
            ),
            Self::NotEnabled => f.write_str(
                "VMX is not enabled (IA32_FEATURE_CONTROL is not locked): the kernel enables it when built with KVM_INTEL",
            ),
            Self::NoMsr(number) => write!(f, "this CPU says it has VMX, but MSR {number:#x} cannot be read"),
            Self::NoSecondary => f.write_str(
                "this CPU lacks secondary processor-based VM-execution controls (\"activate secondary controls\")",
            ),
            Self::NoEpt => f.write_str("this CPU lacks EPT (secondary control \"enable EPT\")"),
            Self::NoEptFeature(feature) => write!(
                f,
                "this CPU's EPT lacks {} (IA32_VMX_EPT_VPID_CAP)",
                feature.name()
            ),
            Self::NoTrueControls => f.write_str(
                "this CPU cannot leave CR3 to the guest (no TRUE capability MSRs: IA32_VMX_BASIC bit 55 is 0)",
            ),
            Self::OddRegion => f.write_str(
                "this CPU wants VMCS regions that are larger than 4096 bytes or not write-back (IA32_VMX_BASIC)",
            ),
            Self::RequiredControl { word, bit } => write!(
                f,
                "this CPU lacks the {} \"{}\" (bit {bit})",
                word.name(),
                word.bit_name(bit)
            ),
            Self::UnwantedControl { word, bit } => write!(
                f,
                "this CPU cannot switch off the {} \"{}\" (bit {bit})",
                word.name(),
                word.bit_name(bit)
            ),
        }
    }
}

/// The MSRs by which a CPU tells what its VMX can do, as read.
///
/// One that the CPU does not have is 0. [`RawMsrs::read`] knows which exist.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawMsrs {
    pub feature_control: u64,
    pub basic: u64,
    /// IA32_VMX_TRUE_PINBASED_CTLS where `basic` says it exists, else IA32_VMX_PINBASED_CTLS; so the next three.
    pub pin: u64,
    pub primary: u64,
    pub exit: u64,
    pub entry: u64,
    pub secondary: u64,
    pub ept_vpid_cap: u64,
    pub misc: u64,
    pub cr0_fixed0: u64,
    pub cr0_fixed1: u64,
    pub cr4_fixed0: u64,
    pub cr4_fixed1: u64,
}

const CPUID_1_ECX_VMX: u32 = 1 << 5;
const FEATURE_CONTROL_LOCKED: u64 = 1 << 0;
const FEATURE_CONTROL_VMXON_OUTSIDE_SMX: u64 = 1 << 2;
const BASIC_TRUE_CONTROLS: u64 = 1 << 55;

impl RawMsrs {
    /// Reads them on this CPU, each only where the CPU has it.
    ///
    /// `cpuid_1_ecx` is ECX of CPUID leaf 1; `rdmsr` gives `None` where the read faults.
    ///
    /// # Errors
    ///
    /// `NoVmx`, the two of IA32_FEATURE_CONTROL, and `NoMsr` for one that VMX implies and that does not read.
    pub fn read(cpuid_1_ecx: u32, mut rdmsr: impl FnMut(u32) -> Option<u64>) -> Result<Self, Missing> {
        if cpuid_1_ecx & CPUID_1_ECX_VMX == 0 {
            return Err(Missing::NoVmx);
        }
        let mut read = |number| rdmsr(number).ok_or(Missing::NoMsr(number));

        let feature_control = read(msr::IA32_FEATURE_CONTROL)?;
        check_feature_control(feature_control)?;

        let basic = read(msr::IA32_VMX_BASIC)?;
        let [pin, primary, exit, entry] = if basic & BASIC_TRUE_CONTROLS != 0 {
            [
                msr::IA32_VMX_TRUE_PINBASED_CTLS,
                msr::IA32_VMX_TRUE_PROCBASED_CTLS,
                msr::IA32_VMX_TRUE_EXIT_CTLS,
                msr::IA32_VMX_TRUE_ENTRY_CTLS,
            ]
        } else {
            [
                msr::IA32_VMX_PINBASED_CTLS,
                msr::IA32_VMX_PROCBASED_CTLS,
                msr::IA32_VMX_EXIT_CTLS,
                msr::IA32_VMX_ENTRY_CTLS,
            ]
        };
        let primary = read(primary)?;
        let secondary = if may_be_1(primary, primary::ACTIVATE_SECONDARY) {
            read(msr::IA32_VMX_PROCBASED_CTLS2)?
        } else {
            0
        };
        let ept_or_vpid = secondary::ENABLE_EPT | secondary::ENABLE_VPID;
        let ept_vpid_cap = if may_be_1(secondary, ept_or_vpid) {
            read(msr::IA32_VMX_EPT_VPID_CAP)?
        } else {
            0
        };
        Ok(Self {
            feature_control,
            basic,
            pin: read(pin)?,
            primary,
            exit: read(exit)?,
            entry: read(entry)?,
            secondary,
            ept_vpid_cap,
            misc: read(msr::IA32_VMX_MISC)?,
            cr0_fixed0: read(msr::IA32_VMX_CR0_FIXED0)?,
            cr0_fixed1: read(msr::IA32_VMX_CR0_FIXED1)?,
            cr4_fixed0: read(msr::IA32_VMX_CR4_FIXED0)?,
            cr4_fixed1: read(msr::IA32_VMX_CR4_FIXED1)?,
        })
    }
}

/// Whether any of `bits` may be 1 by a capability MSR.
const fn may_be_1(capability: u64, bits: u32) -> bool {
    (capability >> 32) as u32 & bits != 0
}

/// Whether VMXON outside SMX is allowed by this value of IA32_FEATURE_CONTROL.
///
/// # Errors
///
/// `NotEnabled` or `DisabledByFirmware`.
pub const fn check_feature_control(value: u64) -> Result<(), Missing> {
    if value & FEATURE_CONTROL_LOCKED == 0 {
        Err(Missing::NotEnabled)
    } else if value & FEATURE_CONTROL_VMXON_OUTSIDE_SMX == 0 {
        Err(Missing::DisabledByFirmware)
    } else {
        Ok(())
    }
}

/// What EPT and VPID of a CPU can do (IA32_VMX_EPT_VPID_CAP).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EptCapabilities(u64);

impl EptCapabilities {
    /// Of a value of the MSR.
    pub const fn new(ept_vpid_cap: u64) -> Self {
        Self(ept_vpid_cap)
    }

    const fn has(self, bit: u32) -> bool {
        self.0 >> bit & 1 != 0
    }

    /// Entries may allow execution alone.
    pub const fn execute_only(self) -> bool {
        self.has(0)
    }

    /// Walks of 4 levels.
    pub const fn page_walk_4(self) -> bool {
        self.has(6)
    }

    /// EPT paging structures may be write-back.
    pub const fn write_back(self) -> bool {
        self.has(14)
    }

    /// 2 MiB leaves.
    pub const fn page_2m(self) -> bool {
        self.has(16)
    }

    /// 1 GiB leaves.
    pub const fn page_1g(self) -> bool {
        self.has(17)
    }

    /// Accessed and dirty bits.
    pub const fn accessed_dirty(self) -> bool {
        self.has(21)
    }

    /// INVEPT of one EPT pointer.
    pub const fn invept_single(self) -> bool {
        self.has(20) && self.has(25)
    }

    /// INVEPT of all.
    pub const fn invept_all(self) -> bool {
        self.has(20) && self.has(26)
    }

    /// INVVPID of one address.
    pub const fn invvpid_individual(self) -> bool {
        self.has(32) && self.has(40)
    }

    /// INVVPID of one VPID.
    pub const fn invvpid_single(self) -> bool {
        self.has(32) && self.has(41)
    }

    /// INVVPID of all VPIDs.
    pub const fn invvpid_all(self) -> bool {
        self.has(32) && self.has(42)
    }

    /// INVVPID of one VPID but for global translations.
    pub const fn invvpid_single_retaining_globals(self) -> bool {
        self.has(32) && self.has(43)
    }
}

/// What the module uses of this CPU's VMX. Made once, never changed; equal on all CPUs or the module refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmxCapabilities {
    /// First 31 bits of a VMXON or VMCS region.
    pub revision_id: u32,
    /// Bytes of such a region, at most 4096.
    pub region_bytes: u32,
    /// The CPU takes only 32-bit physical addresses for its VMX structures.
    pub physical_32bit: bool,
    /// Word for `control::PIN_BASED`.
    pub pin: u32,
    /// Word for `control::PRIMARY`.
    pub primary: u32,
    /// Word for `control::SECONDARY`.
    pub secondary: u32,
    /// Word for `control::EXIT`.
    pub exit: u32,
    /// Word for `control::ENTRY`.
    pub entry: u32,
    /// EPT and VPID.
    pub ept: EptCapabilities,
    /// CR0 bits that must be 1 in VMX operation.
    pub cr0_fixed0: u64,
    /// CR0 bits that may be 1.
    pub cr0_fixed1: u64,
    /// CR4 bits that must be 1.
    pub cr4_fixed0: u64,
    /// CR4 bits that may be 1.
    pub cr4_fixed1: u64,
    /// IA32_VMX_MISC.
    pub misc: u64,
}

impl VmxCapabilities {
    /// Negotiates all of it.
    ///
    /// # Errors
    ///
    /// The first thing that the CPU lacks, the more telling first: EPT before TRUE capability MSRs before a control.
    pub const fn from_msrs(raw: &RawMsrs) -> Result<Self, Missing> {
        if let Err(missing) = check_feature_control(raw.feature_control) {
            return Err(missing);
        }
        if !may_be_1(raw.primary, primary::ACTIVATE_SECONDARY) {
            return Err(Missing::NoSecondary);
        }
        if !may_be_1(raw.secondary, secondary::ENABLE_EPT) {
            return Err(Missing::NoEpt);
        }
        let ept = EptCapabilities::new(raw.ept_vpid_cap);
        if !ept.page_walk_4() {
            return Err(Missing::NoEptFeature(EptFeature::PageWalk4));
        }
        if !ept.write_back() {
            return Err(Missing::NoEptFeature(EptFeature::WriteBack));
        }
        if !ept.invept_single() && !ept.invept_all() {
            return Err(Missing::NoEptFeature(EptFeature::Invept));
        }
        if raw.basic & BASIC_TRUE_CONTROLS == 0 {
            return Err(Missing::NoTrueControls);
        }
        let region_bytes = (raw.basic >> 32) as u32 & 0x1fff;
        let memory_type = (raw.basic >> 50) as u32 & 0xf;
        if region_bytes > 4096 || memory_type != 6 {
            return Err(Missing::OddRegion);
        }

        // Without an INVVPID that drops a whole VPID, tagged translations could not be flushed: leave the tag off.
        let vpid_usable = ept.invvpid_single() || ept.invvpid_all();
        let wanted_secondary = if vpid_usable {
            SECONDARY
        } else {
            Wanted {
                optional: SECONDARY.optional & !secondary::ENABLE_VPID,
                ..SECONDARY
            }
        };

        // `?` is not for const fn yet.
        macro_rules! negotiate {
            ($word:expr, $wanted:expr, $capability:expr) => {
                match adjust($wanted, $capability) {
                    Ok(bits) => bits,
                    Err(AdjustError::Missing(bits)) => {
                        return Err(Missing::RequiredControl {
                            word: $word,
                            bit: bits.trailing_zeros(),
                        })
                    }
                    Err(AdjustError::Unwanted(bits)) => {
                        return Err(Missing::UnwantedControl {
                            word: $word,
                            bit: bits.trailing_zeros(),
                        })
                    }
                }
            };
        }
        Ok(Self {
            revision_id: raw.basic as u32 & 0x7fff_ffff,
            region_bytes,
            physical_32bit: raw.basic >> 48 & 1 != 0,
            pin: negotiate!(Word::Pin, PIN, raw.pin),
            primary: negotiate!(Word::Primary, PRIMARY, raw.primary),
            secondary: negotiate!(Word::Secondary, wanted_secondary, raw.secondary),
            exit: negotiate!(Word::Exit, EXIT, raw.exit),
            entry: negotiate!(Word::Entry, ENTRY, raw.entry),
            ept,
            cr0_fixed0: raw.cr0_fixed0,
            cr0_fixed1: raw.cr0_fixed1,
            cr4_fixed0: raw.cr4_fixed0,
            cr4_fixed1: raw.cr4_fixed1,
            misc: raw.misc,
        })
    }

    /// Translations are tagged with a VPID.
    pub const fn has_vpid(&self) -> bool {
        self.secondary & secondary::ENABLE_VPID != 0
    }

    /// The guest may use RDTSCP and RDPID.
    pub const fn has_rdtscp(&self) -> bool {
        self.secondary & secondary::ENABLE_RDTSCP != 0
    }

    /// The guest may use INVPCID.
    pub const fn has_invpcid(&self) -> bool {
        self.secondary & secondary::ENABLE_INVPCID != 0
    }

    /// ENCLS exits, as `control::ENCLS_EXITING_BITMAP` says; without it that field does not exist.
    pub const fn has_encls_exiting(&self) -> bool {
        self.secondary & secondary::ENCLS_EXITING != 0
    }

    /// `value` with the bits that VMX operation fixes in CR0.
    pub const fn fix_cr0(&self, value: u64) -> u64 {
        (value | self.cr0_fixed0) & self.cr0_fixed1
    }

    /// `value` with the bits that VMX operation fixes in CR4 (VMXE among them).
    pub const fn fix_cr4(&self, value: u64) -> u64 {
        (value | self.cr4_fixed0) & self.cr4_fixed1
    }
}
