// SPDX-License-Identifier: GPL-2.0

//! Negotiation of controls: arithmetic on all bit patterns, then whole CPUs.

use dune_arch::controls::adjust;
use dune_arch::controls::entry;
use dune_arch::controls::exit;
use dune_arch::controls::pin;
use dune_arch::controls::primary;
use dune_arch::controls::secondary;
use dune_arch::controls::AdjustError;
use dune_arch::controls::EptFeature;
use dune_arch::controls::Missing;
use dune_arch::controls::RawMsrs;
use dune_arch::controls::VmxCapabilities;
use dune_arch::controls::Wanted;
use dune_arch::controls::Word;
use dune_arch::controls::ENTRY;
use dune_arch::controls::EXIT;
use dune_arch::controls::PIN;
use dune_arch::controls::PRIMARY;
use dune_arch::controls::SECONDARY;
use dune_arch::msr;
use proptest::prelude::*;
use std::collections::HashMap;

fn cap(must: u32, may: u32) -> u64 {
    u64::from(may) << 32 | u64::from(must)
}

/// One bit, all 32 combinations of (required, optional, tolerated, must, may): the rule written out a second way.
#[test]
fn adjust_of_one_bit_is_exactly_the_rule() {
    for case in 0..32u32 {
        let [required, optional, tolerated, must, may] = [0, 1, 2, 3, 4].map(|at| case >> at & 1);
        let wanted = Wanted {
            required,
            optional,
            tolerated,
        };
        let expected = match (required, optional, tolerated, must, may) {
            (1, _, _, _, 0) => Err(AdjustError::Missing(1)),
            (_, _, _, 1, 0) => Err(AdjustError::Unwanted(1)),
            (1, _, _, _, 1) => Ok(1),
            (0, 1, _, _, 1) => Ok(1),
            (0, 0, 1, 1, 1) => Ok(1),
            (0, 0, 0, 1, 1) => Err(AdjustError::Unwanted(1)),
            (0, _, _, 0, _) => Ok(0),
            _ => unreachable!(),
        };
        assert_eq!(adjust(wanted, cap(must, may)), expected, "{case:#b}");
    }
}

proptest! {
    #[test]
    fn adjust_obeys_the_cpu(required: u32, optional: u32, tolerated: u32, must: u32, may: u32) {
        let wanted = Wanted { required, optional, tolerated };
        match adjust(wanted, cap(must, may)) {
            Ok(word) => {
                prop_assert_eq!(word & must, must);
                prop_assert_eq!(word & !may, 0);
                prop_assert_eq!(word & required, required);
                prop_assert_eq!(word & optional, optional & may);
                prop_assert_eq!(word & !(required | optional | tolerated), 0);
            }
            Err(AdjustError::Missing(bits)) => {
                prop_assert_ne!(bits, 0);
                prop_assert_eq!(bits, required & !may);
            }
            Err(AdjustError::Unwanted(bits)) => {
                prop_assert_ne!(bits, 0);
                prop_assert_eq!(bits & !must, 0);
            }
        }
    }

    #[test]
    fn adjust_succeeds_where_it_can(required: u32, optional: u32, tolerated: u32, extra: u32) {
        let wanted = Wanted { required, optional, tolerated };
        let must = (required | optional | tolerated) & extra;
        let may = must | required | extra;
        prop_assert!(adjust(wanted, cap(must, may)).is_ok());
    }
}

/// The words are consistent: a control is in one class, and none of the forbidden ones is in any.
#[test]
fn wanted_words_do_not_ask_for_what_the_policy_forbids() {
    for (wanted, forbidden) in [
        (PIN, pin::VIRTUAL_NMIS | pin::PREEMPTION_TIMER | pin::POSTED_INTERRUPTS),
        (
            PRIMARY,
            primary::CR3_LOAD_EXITING
                | primary::CR3_STORE_EXITING
                | primary::INVLPG_EXITING
                | primary::RDTSC_EXITING
                | primary::TPR_SHADOW
                | primary::USE_IO_BITMAPS
                | primary::USE_TSC_OFFSETTING
                | primary::PAUSE_EXITING
                | primary::INTERRUPT_WINDOW_EXITING
                | primary::NMI_WINDOW_EXITING
                | primary::MONITOR_TRAP_FLAG
                | primary::ACTIVATE_TERTIARY,
        ),
        (
            SECONDARY,
            secondary::UNRESTRICTED_GUEST
                | secondary::ENABLE_XSAVES
                | secondary::ENABLE_VM_FUNCTIONS
                | secondary::ENABLE_PML
                | secondary::ENABLE_USER_WAIT_AND_PAUSE
                | secondary::PASID_TRANSLATION
                | secondary::DESCRIPTOR_TABLE_EXITING
                | secondary::ENABLE_PCONFIG
                | secondary::VMCS_SHADOWING
                | secondary::EPT_VIOLATION_VE
                | secondary::VIRTUALIZE_APIC_ACCESSES
                | secondary::VIRTUALIZE_X2APIC_MODE,
        ),
        (
            EXIT,
            exit::ACKNOWLEDGE_INTERRUPT | exit::SAVE_PAT | exit::LOAD_PAT | exit::LOAD_PERF_GLOBAL_CTRL,
        ),
        (
            ENTRY,
            entry::LOAD_PAT | entry::ENTRY_TO_SMM | entry::DEACTIVATE_DUAL_MONITOR | entry::LOAD_PERF_GLOBAL_CTRL,
        ),
    ] {
        assert_eq!(wanted.required & wanted.optional, 0);
        assert_eq!((wanted.required | wanted.optional | wanted.tolerated) & forbidden, 0);
    }
}

const EPT_ALL: u64 = 1 << 0 | 1 << 6 | 1 << 14 | 1 << 16 | 1 << 17 | 1 << 20 | 1 << 21 | 1 << 25 | 1 << 26;
const VPID_ALL: u64 = 1 << 32 | 0xf << 40;

/// A CPU that has it all, as a modern one says it: TRUE MSRs with CR3 exiting optional.
fn modern() -> HashMap<u32, u64> {
    let true_primary = primary::DEFAULT1 & !(primary::CR3_LOAD_EXITING | primary::CR3_STORE_EXITING);
    HashMap::from([
        (msr::IA32_FEATURE_CONTROL, 5),
        // Revision 0x12, 1024 bytes, write-back, INS/OUTS information, TRUE MSRs.
        (msr::IA32_VMX_BASIC, 1 << 55 | 1 << 54 | 6 << 50 | 1024 << 32 | 0x12),
        (msr::IA32_VMX_PINBASED_CTLS, cap(pin::DEFAULT1, !0)),
        (msr::IA32_VMX_PROCBASED_CTLS, cap(primary::DEFAULT1, !0)),
        (msr::IA32_VMX_EXIT_CTLS, cap(exit::DEFAULT1, !0)),
        (msr::IA32_VMX_ENTRY_CTLS, cap(entry::DEFAULT1, !0)),
        (msr::IA32_VMX_TRUE_PINBASED_CTLS, cap(pin::DEFAULT1, !0)),
        (msr::IA32_VMX_TRUE_PROCBASED_CTLS, cap(true_primary, !0)),
        (msr::IA32_VMX_TRUE_EXIT_CTLS, cap(exit::DEFAULT1 & !4, !0)),
        (msr::IA32_VMX_TRUE_ENTRY_CTLS, cap(entry::DEFAULT1 & !4, !0)),
        (msr::IA32_VMX_MISC, 0x4004_01e0),
        (msr::IA32_VMX_CR0_FIXED0, 0x8000_0021),
        (msr::IA32_VMX_CR0_FIXED1, 0xffff_ffff),
        (msr::IA32_VMX_CR4_FIXED0, 0x2000),
        (msr::IA32_VMX_CR4_FIXED1, 0x0037_67ff),
        (msr::IA32_VMX_PROCBASED_CTLS2, cap(0, !0)),
        (msr::IA32_VMX_EPT_VPID_CAP, EPT_ALL | VPID_ALL),
    ])
}

const ECX_VMX: u32 = 1 << 5;

fn negotiate(cpu: &HashMap<u32, u64>) -> Result<VmxCapabilities, Missing> {
    let raw = RawMsrs::read(ECX_VMX, |number| cpu.get(&number).copied())?;
    VmxCapabilities::from_msrs(&raw)
}

/// `cpu` without these bits in the allowed 1-settings of a capability MSR.
fn forbid(cpu: &mut HashMap<u32, u64>, number: u32, bits: u32) {
    *cpu.get_mut(&number).unwrap() &= !cap(0, bits);
}

#[test]
fn modern_cpu_gets_the_words_of_the_policy() {
    let capabilities = negotiate(&modern()).unwrap();
    assert_eq!(capabilities.revision_id, 0x12);
    assert_eq!(capabilities.region_bytes, 1024);
    assert!(!capabilities.physical_32bit);
    assert_eq!(capabilities.pin, 0x16 | 0x9);
    assert_eq!(
        capabilities.primary,
        (primary::DEFAULT1 & !0x1_8000)
            | 0x80
            | 0x400
            | 0x800
            | 0x18_0000
            | 0x80_0000
            | 0x100_0000
            | 0x1000_0000
            | 0x2000_0000
            | 0x8000_0000
    );
    assert_eq!(capabilities.primary & 0x1_8000, 0, "CR3 exits");
    assert_eq!(capabilities.secondary, 0x2 | 0x8 | 0x20 | 0x40 | 0x1000 | 0x8000);
    assert_eq!(capabilities.exit, (exit::DEFAULT1 & !4) | 0x200 | 0x30_0000);
    assert_eq!(capabilities.entry, (entry::DEFAULT1 & !4) | 0x200 | 0x8000 | 4);
    assert!(capabilities.has_vpid() && capabilities.has_rdtscp() && capabilities.has_invpcid());
    assert!(capabilities.ept.page_2m() && capabilities.ept.page_1g() && capabilities.ept.accessed_dirty());
    assert!(capabilities.ept.execute_only() && capabilities.ept.invept_single());
    assert!(capabilities.ept.invvpid_individual() && capabilities.ept.invvpid_single_retaining_globals());
    assert_eq!(capabilities.fix_cr0(1 << 40), 0x8000_0021);
    assert_eq!(capabilities.fix_cr4(1 << 32 | 0x20), 0x2020);
}

#[test]
fn poor_cpu_with_ept_works_without_the_optional_things() {
    // As corei5_lynnfield_750: no unrestricted guest, no A/D, no INVPCID, no WBINVD exiting, no 1 GiB leaves.
    let mut cpu = modern();
    cpu.insert(msr::IA32_VMX_PROCBASED_CTLS2, cap(0, 0x2f));
    cpu.insert(
        msr::IA32_VMX_EPT_VPID_CAP,
        (EPT_ALL & !(1 << 21 | 1 << 17 | 1)) | VPID_ALL,
    );
    let capabilities = negotiate(&cpu).unwrap();
    assert_eq!(capabilities.secondary, 0x2 | 0x8 | 0x20);
    assert!(!capabilities.ept.accessed_dirty() && !capabilities.ept.page_1g());
    assert!(!capabilities.has_invpcid());
    assert!(!capabilities.has_encls_exiting());
}

#[test]
fn vpid_is_left_off_where_it_could_not_be_flushed() {
    for invvpid in [0, 1 << 32, 1 << 32 | 1 << 40, 3 << 41] {
        let mut cpu = modern();
        cpu.insert(msr::IA32_VMX_EPT_VPID_CAP, EPT_ALL | invvpid);
        assert!(!negotiate(&cpu).unwrap().has_vpid(), "{invvpid:#x}");
    }
    for invvpid in [1 << 32 | 1 << 41, 1 << 32 | 1 << 42] {
        let mut cpu = modern();
        cpu.insert(msr::IA32_VMX_EPT_VPID_CAP, EPT_ALL | invvpid);
        assert!(negotiate(&cpu).unwrap().has_vpid(), "{invvpid:#x}");
    }
}

#[test]
fn what_is_missing_is_said_by_its_name_in_the_sdm() {
    assert_eq!(
        RawMsrs::read(!ECX_VMX, |_| panic!("no MSR exists"))
            .unwrap_err()
            .to_string(),
        "this CPU has no VMX (CPUID.1:ECX.VMX is 0)"
    );

    type Change = fn(&mut HashMap<u32, u64>);
    let cases: &[(Change, Missing, &str)] = &[
        (
            |cpu| *cpu.get_mut(&msr::IA32_FEATURE_CONTROL).unwrap() = 1,
            Missing::DisabledByFirmware,
            "VMX is switched off by the firmware (IA32_FEATURE_CONTROL is locked without VMXON outside SMX): \
             enable virtualization in its setup",
        ),
        (
            |cpu| *cpu.get_mut(&msr::IA32_FEATURE_CONTROL).unwrap() = 4,
            Missing::NotEnabled,
            "VMX is not enabled (IA32_FEATURE_CONTROL is not locked): the kernel enables it when built with KVM_INTEL",
        ),
        (
            |cpu| assert!(cpu.remove(&msr::IA32_VMX_MISC).is_some()),
            Missing::NoMsr(0x485),
            "this CPU says it has VMX, but MSR 0x485 cannot be read",
        ),
        (
            |cpu| forbid(cpu, msr::IA32_VMX_TRUE_PROCBASED_CTLS, 1 << 31),
            Missing::NoSecondary,
            "this CPU lacks secondary processor-based VM-execution controls (\"activate secondary controls\")",
        ),
        (
            |cpu| forbid(cpu, msr::IA32_VMX_PROCBASED_CTLS2, 2),
            Missing::NoEpt,
            "this CPU lacks EPT (secondary control \"enable EPT\")",
        ),
        (
            |cpu| *cpu.get_mut(&msr::IA32_VMX_EPT_VPID_CAP).unwrap() &= !(1 << 6),
            Missing::NoEptFeature(EptFeature::PageWalk4),
            "this CPU's EPT lacks a page-walk length of 4 (IA32_VMX_EPT_VPID_CAP)",
        ),
        (
            |cpu| *cpu.get_mut(&msr::IA32_VMX_EPT_VPID_CAP).unwrap() &= !(1 << 14),
            Missing::NoEptFeature(EptFeature::WriteBack),
            "this CPU's EPT lacks write-back paging structures (IA32_VMX_EPT_VPID_CAP)",
        ),
        (
            |cpu| *cpu.get_mut(&msr::IA32_VMX_EPT_VPID_CAP).unwrap() &= !(3 << 25),
            Missing::NoEptFeature(EptFeature::Invept),
            "this CPU's EPT lacks INVEPT with the single-context or all-context type (IA32_VMX_EPT_VPID_CAP)",
        ),
        (
            |cpu| *cpu.get_mut(&msr::IA32_VMX_BASIC).unwrap() &= !(1 << 55),
            Missing::NoTrueControls,
            "this CPU cannot leave CR3 to the guest (no TRUE capability MSRs: IA32_VMX_BASIC bit 55 is 0)",
        ),
        (
            |cpu| *cpu.get_mut(&msr::IA32_VMX_BASIC).unwrap() &= !(0xf << 50),
            Missing::OddRegion,
            "this CPU wants VMCS regions that are larger than 4096 bytes or not write-back (IA32_VMX_BASIC)",
        ),
        (
            |cpu| forbid(cpu, msr::IA32_VMX_TRUE_PROCBASED_CTLS, 1 << 28),
            Missing::RequiredControl {
                word: Word::Primary,
                bit: 28,
            },
            "this CPU lacks the primary processor-based VM-execution control \"use MSR bitmaps\" (bit 28)",
        ),
        (
            |cpu| *cpu.get_mut(&msr::IA32_VMX_TRUE_PROCBASED_CTLS).unwrap() |= 1 << 15,
            Missing::UnwantedControl {
                word: Word::Primary,
                bit: 15,
            },
            "this CPU cannot switch off the primary processor-based VM-execution control \"CR3-load exiting\" (bit 15)",
        ),
        (
            |cpu| forbid(cpu, msr::IA32_VMX_TRUE_ENTRY_CTLS, 1 << 15),
            Missing::RequiredControl {
                word: Word::Entry,
                bit: 15,
            },
            "this CPU lacks the VM-entry control \"load IA32_EFER\" (bit 15)",
        ),
    ];
    for (change, missing, text) in cases {
        let mut cpu = modern();
        change(&mut cpu);
        let got = negotiate(&cpu).unwrap_err();
        assert_eq!(got, *missing);
        assert_eq!(got.to_string(), *text);
    }
}

/// Every required bit, one by one: a CPU without it is refused by a sentence that names it.
#[test]
fn each_required_control_is_refused_by_name() {
    for (wanted, word, number) in [
        (PIN, Word::Pin, msr::IA32_VMX_TRUE_PINBASED_CTLS),
        (PRIMARY, Word::Primary, msr::IA32_VMX_TRUE_PROCBASED_CTLS),
        (EXIT, Word::Exit, msr::IA32_VMX_TRUE_EXIT_CTLS),
        (ENTRY, Word::Entry, msr::IA32_VMX_TRUE_ENTRY_CTLS),
    ] {
        for bit in (0..32).filter(|bit| wanted.required >> bit & 1 != 0) {
            if (word, bit) == (Word::Primary, 31) {
                continue; // Has its own error.
            }
            let mut cpu = modern();
            forbid(&mut cpu, number, 1 << bit);
            assert_eq!(negotiate(&cpu), Err(Missing::RequiredControl { word, bit }));
            assert_ne!(word.bit_name(bit), "", "{word:?} {bit}");
        }
    }
}

#[test]
fn msrs_that_do_not_exist_are_not_read() {
    // As core2_penryn_t9600: secondary controls without EPT or VPID, no TRUE MSRs.
    let mut cpu = modern();
    cpu.insert(msr::IA32_VMX_PROCBASED_CTLS2, cap(0, 0x41));
    *cpu.get_mut(&msr::IA32_VMX_BASIC).unwrap() &= !(1 << 55);
    cpu.retain(|number, _| *number <= msr::IA32_VMX_PROCBASED_CTLS2);
    let mut seen = Vec::new();
    let raw = RawMsrs::read(ECX_VMX, |number| {
        seen.push(number);
        cpu.get(&number).copied()
    })
    .unwrap();
    assert!(seen.iter().all(|number| cpu.contains_key(number)), "{seen:x?}");
    assert_eq!(VmxCapabilities::from_msrs(&raw), Err(Missing::NoEpt));
}

#[test]
fn plain_msrs_are_not_read_where_true_ones_exist() {
    let mut cpu = modern();
    for number in [
        msr::IA32_VMX_PINBASED_CTLS,
        msr::IA32_VMX_PROCBASED_CTLS,
        msr::IA32_VMX_EXIT_CTLS,
        msr::IA32_VMX_ENTRY_CTLS,
    ] {
        cpu.remove(&number);
    }
    assert!(negotiate(&cpu).is_ok());
}
