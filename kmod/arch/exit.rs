// SPDX-License-Identifier: GPL-2.0

//! Reasons of VM exits, their qualifications and the events that they carry.

use core::fmt;

use super::ept::EptEntry;

macro_rules! exit_reasons {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $text:literal;)*) => {
        /// Basic exit reason (SDM, appendix "VMX Basic Exit Reasons").
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum ExitReason {
            $($(#[$doc])* $name,)*
            /// A number that the table does not have.
            Unknown(u16),
        }

        impl ExitReason {
            /// All that have a name.
            pub const KNOWN: &'static [Self] = &[$(Self::$name,)*];

            /// Of the VMCS field: bits 15:0; the flags above do not matter.
            pub const fn from_raw(raw: u32) -> Self {
                match raw as u16 {
                    $($number => Self::$name,)*
                    other => Self::Unknown(other),
                }
            }

            /// The SDM's number.
            pub const fn number(self) -> u16 {
                match self {
                    $(Self::$name => $number,)*
                    Self::Unknown(number) => number,
                }
            }

            /// The SDM's name.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                    Self::Unknown(_) => "unknown exit reason",
                }
            }
        }
    };
}

exit_reasons! {
    ExceptionOrNmi = 0, "exception or NMI";
    ExternalInterrupt = 1, "external interrupt";
    TripleFault = 2, "triple fault";
    InitSignal = 3, "INIT signal";
    StartupIpi = 4, "start-up IPI";
    IoSmi = 5, "I/O SMI";
    OtherSmi = 6, "other SMI";
    InterruptWindow = 7, "interrupt window";
    NmiWindow = 8, "NMI window";
    TaskSwitch = 9, "task switch";
    Cpuid = 10, "CPUID";
    Getsec = 11, "GETSEC";
    Hlt = 12, "HLT";
    Invd = 13, "INVD";
    Invlpg = 14, "INVLPG";
    Rdpmc = 15, "RDPMC";
    Rdtsc = 16, "RDTSC";
    Rsm = 17, "RSM";
    Vmcall = 18, "VMCALL";
    Vmclear = 19, "VMCLEAR";
    Vmlaunch = 20, "VMLAUNCH";
    Vmptrld = 21, "VMPTRLD";
    Vmptrst = 22, "VMPTRST";
    Vmread = 23, "VMREAD";
    Vmresume = 24, "VMRESUME";
    Vmwrite = 25, "VMWRITE";
    Vmxoff = 26, "VMXOFF";
    Vmxon = 27, "VMXON";
    CrAccess = 28, "control-register access";
    MovDr = 29, "MOV DR";
    IoInstruction = 30, "I/O instruction";
    Rdmsr = 31, "RDMSR";
    Wrmsr = 32, "WRMSR";
    EntryInvalidGuestState = 33, "VM-entry failure due to invalid guest state";
    EntryMsrLoading = 34, "VM-entry failure due to MSR loading";
    Mwait = 36, "MWAIT";
    MonitorTrapFlag = 37, "monitor trap flag";
    Monitor = 39, "MONITOR";
    Pause = 40, "PAUSE";
    EntryMachineCheck = 41, "VM-entry failure due to machine-check event";
    TprBelowThreshold = 43, "TPR below threshold";
    ApicAccess = 44, "APIC access";
    VirtualizedEoi = 45, "virtualized EOI";
    GdtrOrIdtrAccess = 46, "access to GDTR or IDTR";
    LdtrOrTrAccess = 47, "access to LDTR or TR";
    EptViolation = 48, "EPT violation";
    EptMisconfiguration = 49, "EPT misconfiguration";
    Invept = 50, "INVEPT";
    Rdtscp = 51, "RDTSCP";
    PreemptionTimer = 52, "VMX-preemption timer expired";
    Invvpid = 53, "INVVPID";
    Wbinvd = 54, "WBINVD or WBNOINVD";
    Xsetbv = 55, "XSETBV";
    ApicWrite = 56, "APIC write";
    Rdrand = 57, "RDRAND";
    Invpcid = 58, "INVPCID";
    Vmfunc = 59, "VMFUNC";
    Encls = 60, "ENCLS";
    Rdseed = 61, "RDSEED";
    PageModificationLogFull = 62, "page-modification log full";
    Xsaves = 63, "XSAVES";
    Xrstors = 64, "XRSTORS";
    Pconfig = 65, "PCONFIG";
    SppEvent = 66, "SPP-related event";
    Umwait = 67, "UMWAIT";
    Tpause = 68, "TPAUSE";
    Loadiwkey = 69, "LOADIWKEY";
    Enclv = 70, "ENCLV";
    EnqcmdPasid = 72, "ENQCMD PASID translation failure";
    EnqcmdsPasid = 73, "ENQCMDS PASID translation failure";
    BusLock = 74, "bus lock";
    InstructionTimeout = 75, "instruction timeout";
    Seamcall = 76, "SEAMCALL";
    Tdcall = 77, "TDCALL";
    RdmsrList = 78, "RDMSRLIST";
    WrmsrList = 79, "WRMSRLIST";
}

/// Bit 31 of the exit reason: the entry failed after the checks of controls and host state; nothing of the guest ran.
pub const ENTRY_FAILURE: u32 = 1 << 31;

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name(), self.number())
    }
}

/// Qualification of an EPT violation (SDM, "Exit Qualification for EPT Violations").
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct EptViolation(u64);

impl EptViolation {
    /// Of the VMCS field.
    pub const fn new(qualification: u64) -> Self {
        Self(qualification)
    }

    const fn has(self, bit: u32) -> bool {
        self.0 >> bit & 1 != 0
    }

    /// The access was a data read. With EPT A/D a page walk is reported as a read and a write.
    pub const fn read(self) -> bool {
        self.has(0)
    }

    /// The access was a data write.
    pub const fn write(self) -> bool {
        self.has(1)
    }

    /// The access was an instruction fetch.
    pub const fn execute(self) -> bool {
        self.has(2)
    }

    /// What an EPT leaf must allow for the access: the bits are those of an entry.
    #[inline(always)]
    pub const fn wanted(self) -> u64 {
        const _: () = assert!(EptEntry::READ == 1 && EptEntry::WRITE == 2 && EptEntry::EXECUTE == 4);
        self.0 & (EptEntry::READ | EptEntry::WRITE | EptEntry::EXECUTE)
    }

    /// The EPT entries allow reading the GPA.
    pub const fn entry_readable(self) -> bool {
        self.has(3)
    }

    /// The EPT entries allow writing the GPA.
    pub const fn entry_writable(self) -> bool {
        self.has(4)
    }

    /// The EPT entries allow executing at the GPA.
    pub const fn entry_executable(self) -> bool {
        self.has(5)
    }

    /// The EPT maps the GPA in some way: the violation is one of permission.
    pub const fn entry_present(self) -> bool {
        self.0 >> 3 & 7 != 0
    }

    /// The guest-linear address field is valid.
    pub const fn gla_valid(self) -> bool {
        self.has(7)
    }

    /// The GPA is what the linear address translates to; else (with a valid linear address) it is that of a
    /// paging-structure entry. Undefined unless [`Self::gla_valid`].
    pub const fn final_translation(self) -> bool {
        self.has(8)
    }

    /// The access was to a paging structure of the guest.
    pub const fn paging_structure(self) -> bool {
        self.gla_valid() && !self.final_translation()
    }

    /// IRET had unblocked NMIs before it faulted: they must be blocked again when it is run again. Valid only when
    /// the exit was not in the middle of an event's delivery.
    pub const fn nmi_unblocked_by_iret(self) -> bool {
        self.has(12)
    }
}

impl fmt::Debug for EptViolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let flag = |is, letter| if is { letter } else { '-' };
        write!(
            f,
            "EptViolation({:#x} {}{}{} entry {}{}{}{})",
            self.0,
            flag(self.read(), 'r'),
            flag(self.write(), 'w'),
            flag(self.execute(), 'x'),
            flag(self.entry_readable(), 'r'),
            flag(self.entry_writable(), 'w'),
            flag(self.entry_executable(), 'x'),
            if self.paging_structure() { " walk" } else { "" },
        )
    }
}

/// Number of a general-purpose register in machine code: 0 RAX, 1 RCX, 2 RDX, 3 RBX, 4 RSP … 15 R15.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gpr(u8);

impl Gpr {
    /// Of the low four bits.
    pub const fn new(number: u64) -> Self {
        Self((number & 15) as u8)
    }

    /// Below 16.
    pub const fn number(self) -> u8 {
        self.0
    }

    /// RSP lives in the VMCS, not in the registers that the exit stub saved.
    pub const fn is_rsp(self) -> bool {
        self.0 == 4
    }
}

/// Qualification of a control-register access (SDM, "Exit Qualification for Control-Register Accesses").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrAccess {
    /// MOV to the control register of this number.
    Write {
        cr: u8,
        from: Gpr,
    },
    /// MOV from the control register of this number.
    Read {
        cr: u8,
        to: Gpr,
    },
    Clts,
    /// LMSW with this source; `memory` when it came from memory.
    Lmsw {
        source: u16,
        memory: bool,
    },
}

impl CrAccess {
    /// Of the VMCS field.
    pub const fn decode(qualification: u64) -> Self {
        let cr = (qualification & 15) as u8;
        let register = Gpr::new(qualification >> 8);
        match qualification >> 4 & 3 {
            0 => Self::Write { cr, from: register },
            1 => Self::Read { cr, to: register },
            2 => Self::Clts,
            _ => Self::Lmsw {
                source: (qualification >> 16) as u16,
                memory: qualification >> 6 & 1 != 0,
            },
        }
    }
}

/// Kinds of events (bits 10:8 of interruption information).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum EventKind {
    ExternalInterrupt = 0,
    Reserved = 1,
    Nmi = 2,
    HardwareException = 3,
    SoftwareInterrupt = 4,
    /// INT1.
    PrivilegedSoftwareException = 5,
    /// INT3, INTO.
    SoftwareException = 6,
    Other = 7,
}

/// Vectors of exceptions.
#[allow(missing_docs)] // Each name is the SDM's mnemonic.
pub mod vector {
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const MC: u8 = 18;
    pub const XM: u8 = 19;
    pub const VE: u8 = 20;
    pub const CP: u8 = 21;
}

/// Interruption information: of an exit, of IDT vectoring, or of an event to inject on entry.
///
/// ```text
///   31     30:13    12        11            10:8  7:0
/// | valid | 0 | NMI unblock* | error code? | kind | vector |      * exits only; must be 0 on entry
/// ```
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct InterruptionInfo(u32);

impl InterruptionInfo {
    const ERROR_CODE: u32 = 1 << 11;
    const NMI_UNBLOCKED: u32 = 1 << 12;
    const VALID: u32 = 1 << 31;
    /// All bits that an entry may have set.
    const DEFINED_ON_ENTRY: u32 = Self::VALID | Self::ERROR_CODE | 0x7ff;

    /// No event.
    pub const NONE: Self = Self(0);

    /// Of a VMCS field.
    pub const fn new(raw: u32) -> Self {
        Self(raw)
    }

    /// An exception as the CPU would raise it. An error code itself goes into its own VMCS field; here is only that
    /// there is one.
    pub const fn hardware_exception(vector: u8, error_code: Option<u32>) -> Self {
        Self::event(EventKind::HardwareException, vector, error_code.is_some())
    }

    /// An event of any kind.
    pub const fn event(kind: EventKind, vector: u8, error_code: bool) -> Self {
        let error_code = if error_code { Self::ERROR_CODE } else { 0 };
        Self(Self::VALID | error_code | (kind as u32) << 8 | vector as u32)
    }

    pub const fn as_u32(self) -> u32 {
        self.0
    }

    /// The field holds an event.
    pub const fn is_valid(self) -> bool {
        self.0 & Self::VALID != 0
    }

    pub const fn vector(self) -> u8 {
        self.0 as u8
    }

    pub const fn kind(self) -> EventKind {
        match self.0 >> 8 & 7 {
            0 => EventKind::ExternalInterrupt,
            1 => EventKind::Reserved,
            2 => EventKind::Nmi,
            3 => EventKind::HardwareException,
            4 => EventKind::SoftwareInterrupt,
            5 => EventKind::PrivilegedSoftwareException,
            6 => EventKind::SoftwareException,
            _ => EventKind::Other,
        }
    }

    /// The error-code field belongs to it.
    pub const fn has_error_code(self) -> bool {
        self.0 & Self::ERROR_CODE != 0
    }

    /// IRET had unblocked NMIs before it faulted (exits only).
    pub const fn nmi_unblocked_by_iret(self) -> bool {
        self.0 & Self::NMI_UNBLOCKED != 0
    }

    /// An instruction raised it: injecting it needs the instruction's length.
    pub const fn is_software(self) -> bool {
        matches!(
            self.kind(),
            EventKind::SoftwareInterrupt | EventKind::PrivilegedSoftwareException | EventKind::SoftwareException
        )
    }

    /// Valid, and an exception of hardware with this vector.
    pub const fn is_exception(self, vector: u8) -> bool {
        self.is_valid() && matches!(self.kind(), EventKind::HardwareException) && self.vector() == vector
    }

    /// Whether a VM entry takes it (SDM, "Checks on VM-Entry Control Fields"): user space may ask for such an event
    /// only. External interrupts and NMIs are the host's and are refused here.
    pub const fn is_injectable_by_user(self) -> bool {
        if self.0 & !Self::DEFINED_ON_ENTRY != 0 || !self.is_valid() {
            return false;
        }
        match self.kind() {
            EventKind::HardwareException => {
                self.vector() < 32
                    && self.vector() != vector::NMI
                    && self.has_error_code() == exception_has_error_code(self.vector())
            }
            EventKind::SoftwareInterrupt => !self.has_error_code(),
            EventKind::PrivilegedSoftwareException => self.vector() == vector::DB && !self.has_error_code(),
            EventKind::SoftwareException => matches!(self.vector(), vector::BP | vector::OF) && !self.has_error_code(),
            EventKind::ExternalInterrupt | EventKind::Reserved | EventKind::Nmi | EventKind::Other => false,
        }
    }
}

impl fmt::Debug for InterruptionInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.is_valid() {
            return f.write_str("InterruptionInfo(none)");
        }
        write!(
            f,
            "InterruptionInfo({:?} {}{})",
            self.kind(),
            self.vector(),
            if self.has_error_code() { " with error code" } else { "" }
        )
    }
}

/// Whether the CPU pushes an error code for this exception.
pub const fn exception_has_error_code(vector: u8) -> bool {
    matches!(
        vector,
        vector::DF | vector::TS | vector::NP | vector::SS | vector::GP | vector::PF | vector::AC | vector::CP
    )
}

/// The event to inject on the next entry because an exit cut its delivery short; none if none was.
///
/// `idt_vectoring` is the IDT-vectoring information field. Bit 12 is undefined there and bits 30:13 reserved; an entry
/// checks that they are 0.
pub const fn reinject(idt_vectoring: u32) -> Option<InterruptionInfo> {
    let info = InterruptionInfo(idt_vectoring & InterruptionInfo::DEFINED_ON_ENTRY);
    if info.is_valid() {
        Some(info)
    } else {
        None
    }
}
