// SPDX-License-Identifier: GPL-2.0

//! The VMCS field table against the SDM's structure of an encoding and against names of Linux.

use dune_arch::vmcs_field;
use dune_arch::vmcs_field::control;
use dune_arch::vmcs_field::exit_info;
use dune_arch::vmcs_field::guest;
use dune_arch::vmcs_field::host;
use dune_arch::vmcs_field::FIELDS;
use std::collections::HashMap;
use std::collections::HashSet;

#[test]
fn every_encoding_states_the_width_and_area_of_its_row() {
    for &(encoding, area, name, bits, _) in FIELDS {
        let width = match encoding >> 13 & 3 {
            0 => 16,
            2 => 32,
            _ => 64,
        };
        assert_eq!(width, bits, "{area}::{name}");
        let stated = ["control", "exit_info", "guest", "host"][(encoding >> 10 & 3) as usize];
        assert_eq!(stated, area, "{area}::{name}");
        assert_eq!(encoding & 0xffff_9001, 0, "{area}::{name}");
    }
}

#[test]
fn no_encoding_and_no_name_twice() {
    let mut encodings = HashSet::new();
    let mut names = HashSet::new();
    for &(encoding, area, name, _, linux) in FIELDS {
        assert!(encodings.insert(encoding), "{encoding:#x}");
        assert!(names.insert((area, name)), "{area}::{name}");
        assert!(linux == "-" || names.insert(("linux", linux)), "{linux}");
    }
}

#[test]
fn landmarks_are_those_of_the_sdm() {
    assert_eq!(control::VPID.encoding(), 0x0000);
    assert_eq!(control::EPT_POINTER.encoding(), 0x201a);
    assert_eq!(control::EXCEPTION_BITMAP.encoding(), 0x4004);
    assert_eq!(exit_info::REASON.encoding(), 0x4402);
    assert_eq!(exit_info::GUEST_PHYSICAL_ADDRESS.encoding(), 0x2400);
    assert_eq!(exit_info::QUALIFICATION.encoding(), 0x6400);
    assert_eq!(guest::CS_ACCESS_RIGHTS.encoding(), 0x4816);
    assert_eq!(guest::RIP.encoding(), 0x681e);
    assert_eq!(guest::EFER.encoding(), 0x2806);
    assert_eq!(host::CR3.encoding(), 0x6c02);
    assert_eq!(host::RIP.encoding(), 0x6c16);
}

#[test]
fn names_for_dumps() {
    assert_eq!(vmcs_field::name(0x681e), Some("guest::RIP"));
    assert_eq!(vmcs_field::name(0x681f), None);
    for &(encoding, area, name, _, _) in FIELDS {
        assert_eq!(vmcs_field::name(encoding).unwrap(), format!("{area}::{name}"));
    }
}

/// A stand-in for the kernel's bindings: what 6.12's header says of a few fields, made from the table for the rest.
/// The real comparison is the module's own build; this shows that the macro compiles and names the right constants.
mod assertion {
    macro_rules! bindings {
        ($(
            $(#[$doc:meta])*
            $area:ident, $access:ident, $number:literal {
                $($name:ident, $width:ident, $encoding:literal, $field:tt;)*
            }
        )*) => {
            #[allow(non_upper_case_globals)]
            pub mod bindings {
                $($(super::binding!($field, $encoding);)*)*
            }
        };
    }
    macro_rules! binding {
        (-, $encoding:literal) => {};
        ($field:ident, $encoding:literal) => {
            pub const $field: u32 = $encoding;
        };
    }
    use binding;
    dune_arch::for_each_vmcs_field!(bindings);
    dune_arch::assert_vmcs_fields!(self::bindings);
    const _: () = assert!(bindings::vmcs_field_GUEST_RIP == 0x681e);
}

#[test]
#[ignore = "needs a kernel tree, named by DUNE_KERNEL_SOURCE; the module's own build compares through bindgen"]
fn agrees_with_the_header_of_a_kernel_tree() {
    let tree = std::env::var("DUNE_KERNEL_SOURCE").expect("DUNE_KERNEL_SOURCE names the tree");
    let header = std::fs::read_to_string(format!("{tree}/arch/x86/include/asm/vmx.h")).unwrap();
    let start = header.find("enum vmcs_field {").unwrap();
    let end = start + header[start..].find("};").unwrap();
    let mut linux = HashMap::new();
    for line in header[start..end].lines() {
        if let Some((name, value)) = line.split_once('=') {
            let value = value.trim().trim_end_matches(',').trim_start_matches("0x");
            linux.insert(name.trim(), u32::from_str_radix(value, 16).unwrap());
        }
    }
    assert!(linux.len() > 150);
    for &(encoding, area, name, _, field) in FIELDS {
        if let Some(field) = field.strip_prefix("vmcs_field_") {
            assert_eq!(linux.remove(field), Some(encoding), "{area}::{name}");
        }
    }
    linux.retain(|name, _| !name.ends_with("_HIGH"));
    assert_eq!(linux, HashMap::new(), "fields that the table lacks");
}
