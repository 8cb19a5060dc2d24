// SPDX-License-Identifier: GPL-2.0

//! Exit reasons, qualifications and events.

use dune_arch::exit::exception_has_error_code;
use dune_arch::exit::reinject;
use dune_arch::exit::vector;
use dune_arch::exit::CrAccess;
use dune_arch::exit::EptViolation;
use dune_arch::exit::EventKind;
use dune_arch::exit::ExitReason;
use dune_arch::exit::Gpr;
use dune_arch::exit::InterruptionInfo;
use dune_arch::exit::ENTRY_FAILURE;
use dune_arch::msr;
use dune_arch::segment;
use proptest::prelude::*;

#[test]
fn every_reason_round_trips_and_flags_do_not_matter() {
    for number in 0..=u16::MAX {
        let reason = ExitReason::from_raw(u32::from(number));
        assert_eq!(reason.number(), number);
        assert_eq!(
            ExitReason::from_raw(u32::from(number) | ENTRY_FAILURE | 1 << 27),
            reason
        );
        let known = ExitReason::KNOWN.contains(&reason);
        assert_eq!(!known, reason == ExitReason::Unknown(number));
        assert_eq!(!known, reason.name() == "unknown exit reason");
    }
    assert_eq!(ExitReason::KNOWN.len(), 76);
    assert_eq!(ExitReason::EptViolation.number(), 48);
    assert_eq!(ExitReason::Vmcall.number(), 18);
    assert_eq!(ExitReason::from_raw(0x8000_0021), ExitReason::EntryInvalidGuestState);
    assert_eq!(ExitReason::from_raw(35), ExitReason::Unknown(35));
    assert_eq!(ExitReason::Xsetbv.to_string(), "XSETBV (55)");
}

#[test]
fn ept_violation_bits_one_by_one() {
    type Getter = fn(EptViolation) -> bool;
    let getters: [(u32, Getter); 9] = [
        (0, EptViolation::read),
        (1, EptViolation::write),
        (2, EptViolation::execute),
        (3, EptViolation::entry_readable),
        (4, EptViolation::entry_writable),
        (5, EptViolation::entry_executable),
        (7, EptViolation::gla_valid),
        (8, EptViolation::final_translation),
        (12, EptViolation::nmi_unblocked_by_iret),
    ];
    for (bit, getter) in getters {
        assert!(getter(EptViolation::new(1 << bit)), "{bit}");
        assert!(!getter(EptViolation::new(!(1 << bit))), "{bit}");
    }
    assert!(EptViolation::new(0x81).paging_structure());
    assert!(!EptViolation::new(0x181).paging_structure());
    assert!(!EptViolation::new(0x01).paging_structure());
    assert!(EptViolation::new(1 << 5).entry_present() && !EptViolation::new(7).entry_present());
}

#[test]
fn cr_access_decodes_each_kind() {
    assert_eq!(
        CrAccess::decode(0x0f03),
        CrAccess::Write {
            cr: 3,
            from: Gpr::new(15)
        }
    );
    assert_eq!(CrAccess::decode(0x0418), CrAccess::Read { cr: 8, to: Gpr::new(4) });
    assert!(Gpr::new(4).is_rsp() && !Gpr::new(5).is_rsp());
    assert_eq!(CrAccess::decode(0x20), CrAccess::Clts);
    assert_eq!(
        CrAccess::decode(0xabcd_0070),
        CrAccess::Lmsw {
            source: 0xabcd,
            memory: true
        }
    );
}

#[test]
fn events_are_encoded_as_the_sdm_says() {
    assert_eq!(
        InterruptionInfo::hardware_exception(vector::PF, Some(2)).as_u32(),
        0x8000_0b0e
    );
    assert_eq!(
        InterruptionInfo::hardware_exception(vector::UD, None).as_u32(),
        0x8000_0306
    );
    assert_eq!(
        InterruptionInfo::event(EventKind::SoftwareException, vector::BP, false).as_u32(),
        0x8000_0603
    );
    let fault = InterruptionInfo::hardware_exception(vector::GP, Some(0));
    assert!(fault.is_exception(vector::GP) && !fault.is_exception(vector::PF) && !fault.is_software());
    assert!(!InterruptionInfo::NONE.is_valid());
}

proptest! {
    #[test]
    fn reinjection_passes_the_checks_of_an_entry(raw: u32) {
        match reinject(raw) {
            None => prop_assert_eq!(raw >> 31, 0),
            Some(info) => {
                prop_assert_eq!(raw >> 31, 1);
                prop_assert_eq!(info.as_u32() & 0x7fff_f000, 0);
                let old = InterruptionInfo::new(raw);
                prop_assert_eq!(info.vector(), old.vector());
                prop_assert_eq!(info.kind(), old.kind());
                prop_assert_eq!(info.has_error_code(), old.has_error_code());
            }
        }
    }

    #[test]
    fn only_well_formed_events_are_injectable(raw: u32) {
        let info = InterruptionInfo::new(raw);
        if info.is_injectable_by_user() {
            prop_assert!(info.is_valid());
            prop_assert_eq!(raw & 0x7fff_f000, 0);
        }
    }
}

/// All 2^12 values of the defined bits: exactly the exceptions of the CPU and the software events pass.
#[test]
fn injectable_events_are_counted() {
    let mut by_kind = [0; 8];
    for low in 0..1 << 12 {
        let info = InterruptionInfo::new(1 << 31 | low);
        if info.is_injectable_by_user() {
            by_kind[info.kind() as usize] += 1;
        }
        assert!(!InterruptionInfo::new(low).is_injectable_by_user(), "not valid");
        assert!(!InterruptionInfo::new(1 << 31 | 1 << 12 | low).is_injectable_by_user());
    }
    // 31 exceptions (32 less NMI), all 256 INT n, INT1, INT3 and INTO.
    assert_eq!(by_kind, [0, 0, 0, 31, 256, 1, 2, 0]);
    for vector in [vector::DF, vector::PF, vector::GP, vector::AC, vector::CP] {
        assert!(exception_has_error_code(vector));
    }
    for vector in [vector::DE, vector::UD, vector::MC, vector::XM, vector::VE] {
        assert!(!exception_has_error_code(vector));
    }
}

#[test]
fn segment_rights_are_those_of_a_64_bit_guest() {
    assert_eq!(segment::CODE_64_DPL0, 0xa09b);
    assert_eq!(segment::CODE_64_DPL3, 0xa0fb);
    assert_eq!(segment::DATA_DPL0, 0xc093);
    assert_eq!(segment::DATA_DPL3, 0xc0f3);
    assert_eq!(segment::UNUSABLE, 0x1_0000);
    for dpl in 0..4 {
        assert_eq!(segment::dpl(segment::code_64(dpl)), dpl);
        assert_eq!(segment::dpl(segment::data(dpl)), dpl);
        // SDM, "Checks on Guest Segment Registers": L and D are never both 1 in code, reserved bits are 0.
        assert_eq!(segment::code_64(dpl) & segment::rights::DEFAULT_BIG, 0);
        assert_eq!((segment::code_64(dpl) | segment::data(dpl)) & 0xfffe_0f00, 0);
    }
}

#[test]
fn msr_bitmap_bits_are_distinct_and_inside() {
    let mut seen = std::collections::HashSet::new();
    for number in (0..0x2000).chain(0xc000_0000..0xc000_2000) {
        for write in [false, true] {
            let (byte, mask) = msr::bitmap_bit(number, write).unwrap();
            assert!(byte < msr::BITMAP_BYTES && mask.count_ones() == 1);
            assert!(seen.insert((byte, mask)));
        }
    }
    assert_eq!(seen.len(), 8 * msr::BITMAP_BYTES);
    assert_eq!(msr::bitmap_bit(msr::IA32_LSTAR, true), Some((0xc10, 1 << 2)));
    assert_eq!(msr::bitmap_bit(0x2000, false), None);
    assert_eq!(msr::bitmap_bit(0xbfff_ffff, false), None);
    assert_eq!(msr::bitmap_bit(0xc000_2000, true), None);
}
