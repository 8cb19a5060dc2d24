// SPDX-License-Identifier: MIT OR Apache-2.0

//! docs/guest-policy.md, row by row: what each instruction gives at CPL0 and at CPL3 of a guest that chose all its state,
//! and that the host's CPU is afterwards what it was. That page names the test of each row.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use dune_abi::RunPage;

use crate::framework::Need;
use crate::framework::Outcome;
use crate::framework::Suite;
use crate::framework::Test;
use crate::framework::User;
use crate::helpers;
use crate::raw::Ended;
use crate::raw::Errno;
use crate::raw::RawGuest;
use crate::raw::KERNEL_CS;
use crate::raw::RFLAGS_IOPL3;
use crate::raw::TRAP;
use crate::raw::USER_CS;
use crate::support::spawn;
use crate::support::Shared;

pub const TESTS: &[Test] = &[
    Test::asserting("port_io_faults_whatever_the_guest_allows_itself", port_io_faults),
    Test::asserting("control_registers_obey_the_policy", control_registers_obey_the_policy),
    Test::asserting("msrs_obey_the_policy", msrs_obey_the_policy).timeout_s(60),
    Test::asserting("vmx_instructions_are_undefined", vmx_instructions_are_undefined),
    Test::asserting(
        "instructions_beyond_the_guest_fault",
        instructions_beyond_the_guest_fault,
    ),
    Test::asserting(
        "emulated_instructions_obey_privilege",
        emulated_instructions_obey_privilege,
    ),
    Test::asserting("the_guests_own_instructions_run", the_guests_own_instructions_run),
    Test::asserting("every_vector_reaches_the_guest", every_vector_reaches_the_guest),
    Test::asserting(
        "hostile_descriptor_tables_stay_inside",
        hostile_descriptor_tables_stay_inside,
    ),
    Test::asserting("alignment_check_storm_can_be_ended", || {
        storm_can_be_ended(17, ALIGNMENT_STORM)
    }),
    Test::new(
        "guest_with_interrupts_off_can_be_ended",
        guest_with_interrupts_off_can_be_ended,
    )
    .suite(Suite::Native),
    Test::asserting("halting_guest_can_be_ended", halting_guest_can_be_ended),
    Test::asserting("debug_storm_can_be_ended", || storm_can_be_ended(1, DEBUG_STORM)),
    Test::asserting(
        "blocking_ends_with_an_emulated_instruction",
        blocking_ends_with_an_emulated_instruction,
    ),
    Test::asserting("selectors_are_refused_not_lost", selectors_are_refused_not_lost),
    Test::new("ldt_survives_an_exit", ldt_survives_an_exit),
    Test::new("port_permission_survives_an_exit", port_permission_survives_an_exit).run_as(User::Root),
    Test::asserting("debug_registers_survive_an_exit", debug_registers_survive_an_exit),
    Test::asserting(
        "host_state_survives_a_hostile_guest",
        host_state_survives_a_hostile_guest,
    )
    .needs(&[Need::Path(HOST_STATE)]),
];

/// `mov eax, 0x1234; vmcall`.
const HEALTHY: &[u8] = &[0xb8, 0x34, 0x12, 0, 0, 0x0f, 0x01, 0xc1];
/// `int 0x99`: how code at either CPL says that it came to its end.
const INT_DONE: &[u8] = &[0xcd, 0x99];
const DONE: u64 = 0x99;

const DB: u64 = 1;
const UD: u64 = 6;
const GP: u64 = 13;

/// The host's state as the module's debug knob shows it.
pub const HOST_STATE: &str = "/sys/module/dune/parameters/host_state";

/// What [`host_state`] has on every CPU.
const NAMES: [&str; 19] = [
    "CR0",
    "CR4",
    "CR8",
    "DR7",
    "GDTR",
    "IDTR",
    "LDTR",
    "TR",
    "CS",
    "SS",
    "EFER",
    "STAR",
    "LSTAR",
    "CSTAR",
    "FMASK",
    "GS_BASE",
    "KERNEL_GS_BASE",
    "PAT",
    "APIC_BASE",
];

/// By name: every register of the host's CPU that a guest must not change.
pub fn host_state() -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(HOST_STATE).unwrap();
    let lines = text.lines().filter_map(|line| line.split_once(' '));
    let state: BTreeMap<String, String> = lines
        .map(|(name, value)| (name.to_string(), value.to_string()))
        .collect();
    // The module leaves out what the CPU has not.
    const XSAVES: u32 = 1 << 3;
    let more = [
        (helpers::has_xsave(), "XCR0"),
        (helpers::xsave_features() & XSAVES != 0, "XSS"),
    ];
    let more = more.into_iter().filter_map(|(has, name)| has.then_some(name));
    for name in NAMES.into_iter().chain(more) {
        assert!(state.contains_key(name), "{name}: {state:?}");
    }
    state
}

/// What may come of an instruction: one of these vectors; [`DONE`]: it ran.
type Wanted = &'static [u64];

struct Case {
    name: &'static str,
    code: &'static [u8],
    cpl0: Wanted,
    cpl3: Wanted,
}

const fn case(name: &'static str, code: &'static [u8], cpl0: Wanted, cpl3: Wanted) -> Case {
    Case { name, code, cpl0, cpl3 }
}

/// Runs `code` and then `int 0x99`; the vector that it ends with.
#[track_caller]
fn vector_of(guest: &mut RawGuest, name: &str, code: &[u8], user: Option<u64>, edit: impl FnOnce(&mut RunPage)) -> u64 {
    let mut all = code.to_vec();
    all.extend_from_slice(INT_DONE);
    guest.set_code(&all);
    let data = match user {
        None => {
            guest.reset();
            guest.data()
        }
        Some(rflags) => {
            guest.reset_user(rflags);
            guest.user(guest.data())
        }
    };
    guest.edit(|page| {
        page.gprs.rdi = data;
        page.gprs.rsi = data;
        edit(page);
    });
    match guest.run() {
        Ended::Call(number) if (TRAP..TRAP + 256).contains(&number) => number - TRAP,
        other => panic!("{name}: {other:x?}"),
    }
}

#[track_caller]
fn check_with(guest: &mut RawGuest, case: &Case, edit: impl Fn(&mut RunPage)) {
    let got = vector_of(guest, case.name, case.code, None, &edit);
    assert!(case.cpl0.contains(&got), "{} at CPL0: vector {got}", case.name);
    for rflags in [2, RFLAGS_IOPL3] {
        let got = vector_of(guest, case.name, case.code, Some(rflags), &edit);
        assert!(
            case.cpl3.contains(&got),
            "{} at CPL3, RFLAGS {rflags:#x}: vector {got}",
            case.name
        );
    }
}

#[track_caller]
fn check_all(cases: &[Case]) {
    let mut guest = RawGuest::new(HEALTHY);
    for case in cases {
        check_with(&mut guest, case, |_| {});
    }
    assert_healthy(&mut guest);
}

#[track_caller]
fn assert_healthy(guest: &mut RawGuest) {
    guest.set_code(HEALTHY);
    guest.reset();
    assert_eq!(guest.run(), Ended::Call(0x1234));
}

/// IOPL 3 at CPL3, and a TSS whose permission bitmap allows every port: the CPU would let it through.
fn port_io_faults() {
    const CASES: &[Case] = &[
        case("in al, dx", &[0xec], &[GP], &[GP]),
        case("in eax, dx", &[0xed], &[GP], &[GP]),
        case("out dx, al", &[0xee], &[GP], &[GP]),
        case("out dx, eax", &[0xef], &[GP], &[GP]),
        case("in al, 0x80", &[0xe4, 0x80], &[GP], &[GP]),
        case("out 0x80, al", &[0xe6, 0x80], &[GP], &[GP]),
        case("insb", &[0x6c], &[GP], &[GP]),
        case("rep insd", &[0xf3, 0x6d], &[GP], &[GP]),
        case("outsb", &[0x6e], &[GP], &[GP]),
        case("rep outsd", &[0xf3, 0x6f], &[GP], &[GP]),
    ];
    let mut guest = RawGuest::new(HEALTHY);
    for permissive in [false, true] {
        for case in CASES {
            // 0x64: the reset line of the keyboard controller; 0xcf9: that of the chipset.
            for port in [0x64, 0xcf9] {
                check_with(&mut guest, case, |page| {
                    page.gprs.rdx = port;
                    page.gprs.rax = 0xfe;
                    page.gprs.rcx = 1;
                    if permissive {
                        // The bitmap's offset is in the TSS' last word, behind it is zero: all allowed.
                        page.sregs.tr.limit = 0x1fff;
                    }
                });
            }
        }
        guest.set_io_bitmap(0x68);
    }
    assert_healthy(&mut guest);
}

const CR0_NAMES: [(u64, &str); 7] = [
    (1 << 3, "TS"),
    (1 << 16, "WP"),
    (1 << 1, "MP"),
    (1 << 2, "EM"),
    (1 << 5, "NE"),
    (1 << 18, "AM"),
    (1 << 30, "CD"),
];

fn control_registers_obey_the_policy() {
    let mut guest = RawGuest::new(HEALTHY);
    let (info, cr3) = (guest.info, guest.sregs(false).cr3);
    // mov cr0, rax
    let to_cr0: &[u8] = &[0x0f, 0x22, 0xc0];
    for (bit, name) in CR0_NAMES {
        let got = vector_of(&mut guest, name, to_cr0, None, |page| {
            page.gprs.rax = page.sregs.cr0 ^ bit
        });
        let wanted = if info.cr0_guest_owned & bit != 0 { DONE } else { GP };
        assert_eq!(got, wanted, "CR0.{name}");
    }
    assert_eq!(info.cr0_guest_owned, 1 << 3 | 1 << 16);
    // mov cr4, rax: every bit there is.
    let to_cr4: &[u8] = &[0x0f, 0x22, 0xe0];
    let whitelist = 0x0077_1f8c_u64 & !(1 << 12) & !(1 << 18) & !(1 << 11) | 1 << 11;
    assert_eq!(info.cr4_guest_owned & !whitelist, 0, "{:#x}", info.cr4_guest_owned);
    for bit in 0..64 {
        let got = vector_of(&mut guest, "mov cr4", to_cr4, None, |page| {
            // PCIDE wants a CR3 without a PCID, which this one is.
            page.gprs.rax = page.sregs.cr4 ^ 1 << bit;
        });
        let wanted = if info.cr4_guest_owned >> bit & 1 != 0 { DONE } else { GP };
        assert_eq!(got, wanted, "CR4 bit {bit}");
    }
    // VMXE cannot be seen, and MCE is as the guest set it.
    let mut code = vec![0x0f, 0x20, 0xe0]; // mov rax, cr4
    code.extend_from_slice(&[0x0f, 0x01, 0xc1]);
    guest.set_code(&code);
    guest.reset();
    assert_eq!(guest.run(), Ended::Call(info.cr4 & 0xffff_ffff));
    assert_eq!(info.cr4 >> 13 & 1, 0, "VMXE");

    let cases = &[
        case("mov rax, cr0", &[0x0f, 0x20, 0xc0], &[DONE], &[GP]),
        case("mov rax, cr2", &[0x0f, 0x20, 0xd0], &[DONE], &[GP]),
        case("mov cr2, rax", &[0x0f, 0x22, 0xd0], &[DONE], &[GP]),
        case("mov rax, cr3", &[0x0f, 0x20, 0xd8], &[DONE], &[GP]),
        case("mov rax, cr4", &[0x0f, 0x20, 0xe0], &[DONE], &[GP]),
        case("mov rax, cr8", &[0x44, 0x0f, 0x20, 0xc0], &[GP], &[GP]),
        case("mov cr8, rax", &[0x44, 0x0f, 0x22, 0xc0], &[GP], &[GP]),
        case("mov rax, cr1", &[0x0f, 0x20, 0xc8], &[UD], &[UD]),
        case("clts", &[0x0f, 0x06], &[DONE], &[GP]),
        case("smsw eax", &[0x0f, 0x01, 0xe0], &[DONE], &[DONE]),
        // Sets MP, EM and TS: EM is not the guest's.
        case("lmsw", &[0xb8, 0x0f, 0, 0, 0, 0x0f, 0x01, 0xf0], &[GP], &[GP]),
        case("mov dr7, rax", &[0x0f, 0x23, 0xf8], &[GP], &[GP]),
        case("mov rax, dr7", &[0x0f, 0x21, 0xf8], &[GP], &[GP]),
        case("mov dr0, rax", &[0x0f, 0x23, 0xc0], &[GP], &[GP]),
        case("mov rax, dr6", &[0x0f, 0x21, 0xf0], &[GP], &[GP]),
    ];
    for case in cases {
        check_with(&mut guest, case, |page| page.gprs.rax = 0xf);
    }
    let load = case("mov cr3, rax", &[0x0f, 0x22, 0xd8], &[DONE], &[GP]);
    check_with(&mut guest, &load, |page| page.gprs.rax = cr3);
    assert_healthy(&mut guest);
}

/// The refused ones, by class; every other number is refused as well, of which here are the edges.
const REFUSED_MSRS: &[u32] = &[
    // Time and machine.
    0x10,
    0x17,
    0x1b,
    0x3a,
    0x3b,
    0x79,
    0x8b,
    0xce,
    0xe7,
    0xe8,
    0x198,
    0x199,
    0x19a,
    0x1a0,
    0x1a4,
    0x1b0,
    0x6e0,
    0x770,
    // Speculation: control, barriers, what the CPU says of itself.
    0x33,
    0x48,
    0x49,
    0xcf,
    0x10a,
    0x10b,
    0x122,
    0x123,
    0x1c4,
    0x1c5,
    // Debugging, tracing, performance monitoring.
    0x1c8,
    0x1c9,
    0x1d9,
    0x1db,
    0x345,
    0x186,
    0x38d,
    0x38f,
    0x390,
    0x3f1,
    0x3f2,
    0x4c1,
    0x560,
    0x570,
    0x600,
    0x680,
    0xc1,
    // Machine checks, memory types.
    0x179,
    0x17a,
    0x400,
    0x200,
    0x250,
    0x277,
    0x2ff,
    // System calls and segments that are not the guest's.
    0x174,
    0x175,
    0x176,
    0xc000_0083,
    0xc000_0102,
    // Virtualization, SGX, user MSRs, uncore.
    0x480,
    0x48b,
    0x48d,
    0x492,
    0x8c,
    0x9b,
    0xd90,
    0xd93,
    0xda0,
    0x6a0,
    0x6a2,
    0x6a4,
    0x6e1,
    0x985,
    0x1b1,
    0x0e1,
    // x2APIC.
    0x802,
    0x808,
    0x80b,
    0x830,
    0x83f,
    // Edges of the bitmap's ranges, and beyond.
    0x0,
    0x1fff,
    0x2000,
    0x4000_0000,
    0xbfff_ffff,
    0xc000_0000,
    0xc000_1fff,
    0xc000_2000,
    0xffff_ffff,
];

fn msrs_obey_the_policy() {
    const READ: &[u8] = &[0x0f, 0x32];
    const WRITE: &[u8] = &[0x0f, 0x30];
    let mut guest = RawGuest::new(HEALTHY);
    for &number in REFUSED_MSRS {
        for (what, code) in [("rdmsr", READ), ("wrmsr", WRITE)] {
            for user in [None, Some(RFLAGS_IOPL3)] {
                let got = vector_of(&mut guest, what, code, user, |page| {
                    page.gprs.rcx = number.into();
                    page.gprs.rax = 0;
                    page.gprs.rdx = 0;
                });
                assert_eq!(got, GP, "{what} {number:#x}, user {user:?}");
            }
        }
    }
    // (number, may be written)
    let mut allowed = vec![
        (0xc000_0080u32, false),
        (0xc000_0081, false),
        (0xc000_0082, true),
        (0xc000_0084, false),
        (0xc000_0100, true),
        (0xc000_0101, true),
    ];
    if helpers::cpu_has("rdtscp") {
        allowed.push((0xc000_0103, false));
    }
    for (number, writable) in allowed {
        let set = |page: &mut RunPage| {
            page.gprs.rcx = number.into();
            page.gprs.rax = 0x1000;
        };
        assert_eq!(
            vector_of(&mut guest, "rdmsr", READ, None, set),
            DONE,
            "rdmsr {number:#x}"
        );
        let wanted = if writable { DONE } else { GP };
        assert_eq!(
            vector_of(&mut guest, "wrmsr", WRITE, None, set),
            wanted,
            "wrmsr {number:#x}"
        );
        if writable {
            // Not canonical.
            let got = vector_of(&mut guest, "wrmsr", WRITE, None, |page| {
                page.gprs.rcx = number.into();
                page.gprs.rdx = 0x8000_0000;
            });
            assert_eq!(got, GP, "wrmsr {number:#x} of what is not canonical");
        }
        for code in [READ, WRITE] {
            assert_eq!(
                vector_of(&mut guest, "msr", code, Some(RFLAGS_IOPL3), set),
                GP,
                "{number:#x} at CPL3"
            );
        }
    }
    assert_healthy(&mut guest);
}

fn vmx_instructions_are_undefined() {
    check_all(&[
        case("vmxon", &[0xf3, 0x0f, 0xc7, 0x37], &[UD], &[UD]),
        case("vmxoff", &[0x0f, 0x01, 0xc4], &[UD], &[UD]),
        case("vmlaunch", &[0x0f, 0x01, 0xc2], &[UD], &[UD]),
        case("vmresume", &[0x0f, 0x01, 0xc3], &[UD], &[UD]),
        case("vmptrld", &[0x0f, 0xc7, 0x37], &[UD], &[UD]),
        case("vmptrst", &[0x0f, 0xc7, 0x3f], &[UD], &[UD]),
        case("vmclear", &[0x66, 0x0f, 0xc7, 0x37], &[UD], &[UD]),
        case("vmread", &[0x0f, 0x78, 0xc0], &[UD], &[UD]),
        case("vmwrite", &[0x0f, 0x79, 0xc0], &[UD], &[UD]),
        case("invept", &[0x66, 0x0f, 0x38, 0x80, 0x07], &[UD], &[UD]),
        case("invvpid", &[0x66, 0x0f, 0x38, 0x81, 0x07], &[UD], &[UD]),
        case("vmfunc", &[0x0f, 0x01, 0xd4], &[UD], &[UD]),
        case("getsec", &[0x0f, 0x37], &[UD], &[UD]),
        case("rsm", &[0x0f, 0xaa], &[UD], &[UD]),
        case("seamcall", &[0x66, 0x0f, 0x01, 0xcf], &[UD], &[UD]),
    ]);
}

fn instructions_beyond_the_guest_fault() {
    check_all(&[
        case("monitor", &[0x0f, 0x01, 0xc8], &[UD], &[UD]),
        case("mwait", &[0x0f, 0x01, 0xc9], &[UD], &[UD]),
        case("umonitor", &[0xf3, 0x0f, 0xae, 0xf7], &[UD], &[UD]),
        case("umwait", &[0xf2, 0x0f, 0xae, 0xf0], &[UD], &[UD]),
        case("tpause", &[0x66, 0x0f, 0xae, 0xf0], &[UD], &[UD]),
        // SGX. ENCLU has no exit; no process' EPT maps an enclave executable.
        case("encls", &[0x0f, 0x01, 0xcf], &[UD], &[UD, GP]),
        case("enclv", &[0x0f, 0x01, 0xc0], &[UD], &[UD, GP]),
        case("enclu", &[0x0f, 0x01, 0xd7], &[UD, GP], &[UD, GP]),
        case("pconfig", &[0x0f, 0x01, 0xc5], &[UD], &[UD, GP]),
        // Bochs looks at the CPL first.
        case("xsaves", &[0x48, 0x0f, 0xc7, 0x2f], &[UD], &[UD, GP]),
        case("xrstors", &[0x48, 0x0f, 0xc7, 0x1f], &[UD], &[UD, GP]),
        case("enqcmd", &[0xf2, 0x0f, 0x38, 0xf8, 0x07], &[UD, GP], &[UD, GP]),
        case("enqcmds", &[0xf3, 0x0f, 0x38, 0xf8, 0x07], &[UD, GP], &[UD, GP]),
        case("loadiwkey", &[0xf3, 0x0f, 0x38, 0xdc, 0xc1], &[UD], &[UD, GP]),
        case("senduipi", &[0xf3, 0x0f, 0xc7, 0xf0], &[UD], &[UD]),
        case("rdpmc", &[0x0f, 0x33], &[GP], &[GP]),
        case("invd", &[0x0f, 0x08], &[GP], &[GP]),
        case("rdmsrlist", &[0xf2, 0x0f, 0x01, 0xc6], &[UD, GP], &[UD, GP]),
        case("wrmsrlist", &[0xf3, 0x0f, 0x01, 0xc6], &[UD, GP], &[UD, GP]),
        case("into the void", &[0xce], &[UD], &[UD]),
    ]);
    // With CR4.PCE of its own, RDPMC is refused as well.
    let mut guest = RawGuest::new(HEALTHY);
    if guest.info.cr4_guest_owned >> 8 & 1 != 0 {
        let rdpmc = case("rdpmc with CR4.PCE", &[0x0f, 0x33], &[GP], &[GP]);
        check_with(&mut guest, &rdpmc, |page| page.sregs.cr4 |= 1 << 8);
    }
    assert_healthy(&mut guest);
}

fn emulated_instructions_obey_privilege() {
    check_all(&[
        case("hlt", &[0xf4], &[DONE], &[GP]),
        case("wbinvd", &[0x0f, 0x09], &[DONE], &[GP]),
        case("cpuid", &[0x0f, 0xa2], &[DONE], &[DONE]),
        case("pause", &[0xf3, 0x90], &[DONE], &[DONE]),
    ]);
    let mut guest = RawGuest::new(HEALTHY);
    // Every leaf and subleaf that could name something refused.
    guest.set_code(&[0x0f, 0xa2, 0x0f, 0x01, 0xc1]);
    let mut cpuid = |leaf: u32, subleaf: u32| {
        guest.reset();
        guest.edit(|page| {
            page.gprs.rax = leaf.into();
            page.gprs.rcx = subleaf.into();
        });
        assert!(matches!(guest.run(), Ended::Call(_)));
        let gprs = guest.run_page().gprs;
        [gprs.rax as u32, gprs.rbx as u32, gprs.rcx as u32, gprs.rdx as u32]
    };
    let [most, ..] = cpuid(0, 0);
    assert_eq!(cpuid(1, 0)[2] & (1 << 3 | 1 << 5 | 1 << 6), 0, "MONITOR, VMX, SMX");
    if most >= 7 {
        let [_, b, c, d] = cpuid(7, 0);
        assert_eq!(b & 1 << 2, 0, "SGX");
        assert_eq!(
            c & (1 << 5 | 1 << 7 | 1 << 29 | 1 << 30 | 1 << 31),
            0,
            "WAITPKG, SHSTK, ENQCMD, SGX_LC, PKS"
        );
        assert_eq!(d & (1 << 5 | 1 << 18 | 1 << 20), 0, "UINTR, PCONFIG, IBT");
    }
    if most >= 0xd {
        assert_eq!(cpuid(0xd, 1)[0] & 1 << 3, 0, "XSAVES");
    }
    if most >= 0xa {
        assert_eq!(cpuid(0xa, 0), [0; 4], "performance counters");
    }
    assert_eq!(
        cpuid(0x4000_0000, 0),
        [0x4000_0001, 0x656e_7544, 0x656e_7544, 0x656e_7544]
    );
    assert_eq!(cpuid(0x4fff_ffff, 0), [0; 4]);

    // XSETBV: the host's value only. xgetbv; [change]; xsetbv, with ECX = 0.
    if std::arch::is_x86_feature_detected!("xsave") {
        let same = case("xsetbv, same", &[0x0f, 0x01, 0xd0, 0x0f, 0x01, 0xd1], &[DONE], &[GP]);
        check_with(&mut guest, &same, |page| page.gprs.rcx = 0);
        // xor eax, 4 (AVX); and edx: bit 62.
        let avx = case(
            "xsetbv, AVX changed",
            &[0x0f, 0x01, 0xd0, 0x83, 0xf0, 0x04, 0x0f, 0x01, 0xd1],
            &[GP],
            &[GP],
        );
        check_with(&mut guest, &avx, |page| page.gprs.rcx = 0);
        let high = case(
            "xsetbv, high bits",
            &[0x0f, 0x01, 0xd0, 0xba, 0, 0, 0, 0x40, 0x0f, 0x01, 0xd1],
            &[GP],
            &[GP],
        );
        check_with(&mut guest, &high, |page| page.gprs.rcx = 0);
        for xcr in [1, 2, u64::from(u32::MAX)] {
            let other = case("xsetbv, another XCR", &[0x0f, 0x01, 0xd1], &[GP], &[GP]);
            check_with(&mut guest, &other, |page| page.gprs.rcx = xcr);
        }
    }
    assert_healthy(&mut guest);
}

/// What runs without an exit, and where its own privilege rules hold.
fn the_guests_own_instructions_run() {
    let mut guest = RawGuest::new(HEALTHY);
    let before = guest.run_page().counters.exits;
    let mut cases = vec![
        case("rdtsc", &[0x0f, 0x31], &[DONE], &[DONE]),
        case("invlpg [rdi]", &[0x0f, 0x01, 0x3f], &[DONE], &[GP]),
        case("sgdt [rdi]", &[0x0f, 0x01, 0x07], &[DONE], &[DONE]),
        case("sidt [rdi]", &[0x0f, 0x01, 0x0f], &[DONE], &[DONE]),
        case(
            "sgdt; lgdt [rdi]",
            &[0x0f, 0x01, 0x07, 0x0f, 0x01, 0x17],
            &[DONE],
            &[GP],
        ),
        case(
            "sidt; lidt [rdi]",
            &[0x0f, 0x01, 0x0f, 0x0f, 0x01, 0x1f],
            &[DONE],
            &[GP],
        ),
        case("sldt eax", &[0x0f, 0x00, 0xc0], &[DONE], &[DONE]),
        case("str eax", &[0x0f, 0x00, 0xc8], &[DONE], &[DONE]),
        case("lldt 0", &[0x31, 0xc0, 0x0f, 0x00, 0xd0], &[DONE], &[GP]),
        case(
            "lldt of a code segment",
            &[0xb8, 0x10, 0, 0, 0, 0x0f, 0x00, 0xd0],
            &[GP],
            &[GP],
        ),
        case(
            "ltr of a busy TSS",
            &[0xb8, 0x40, 0, 0, 0, 0x0f, 0x00, 0xd8],
            &[GP],
            &[GP],
        ),
        case("ltr of nothing", &[0x31, 0xc0, 0x0f, 0x00, 0xd8], &[GP], &[GP]),
        case("swapgs", &[0x0f, 0x01, 0xf8], &[DONE], &[GP]),
        case("sysenter", &[0x0f, 0x34], &[GP], &[GP]),
        case("sysexit", &[0x0f, 0x35], &[GP], &[GP]),
        case(
            "iretq to nothing",
            &[0x6a, 0, 0x6a, 0, 0x6a, 2, 0x6a, 0, 0x6a, 0, 0x48, 0xcf],
            &[GP],
            &[GP],
        ),
    ];
    if helpers::cpu_has("rdtscp") {
        cases.push(case("rdtscp", &[0x0f, 0x01, 0xf9], &[DONE], &[DONE]));
    }
    if helpers::cpu_has("invpcid") {
        // Type 2, all contexts, with a descriptor of zeroes.
        const INVPCID: &[u8] = &[
            0x31, 0xc0, 0x48, 0x89, 0x07, 0x48, 0x89, 0x47, 0x08, 0xb8, 2, 0, 0, 0, 0x66, 0x0f, 0x38, 0x82, 0x07,
        ];
        cases.push(case("invpcid", INVPCID, &[DONE], &[GP]));
    }
    if helpers::cpu_has("fsgsbase") {
        cases.push(case("wrfsbase rdi", &[0xf3, 0x48, 0x0f, 0xae, 0xd7], &[DONE], &[DONE]));
        cases.push(case("rdgsbase rax", &[0xf3, 0x48, 0x0f, 0xae, 0xc8], &[DONE], &[DONE]));
    }
    for case in &cases {
        check_with(&mut guest, case, |_| {});
    }
    // STI and CLI by IOPL, with no effect beyond the guest.
    for (name, code) in [("sti", [0xfbu8]), ("cli", [0xfa])] {
        assert_eq!(vector_of(&mut guest, name, &code, None, |_| {}), DONE, "{name}");
        assert_eq!(
            vector_of(&mut guest, name, &code, Some(RFLAGS_IOPL3), |_| {}),
            DONE,
            "{name}"
        );
        assert_eq!(vector_of(&mut guest, name, &code, Some(2), |_| {}), GP, "{name}");
    }
    // CR4.TSD and CR4.UMIP are the guest's.
    let owned = guest.info.cr4_guest_owned;
    let tsd = case("rdtsc with TSD", &[0x0f, 0x31], &[DONE], &[GP]);
    check_with(&mut guest, &tsd, |page| page.sregs.cr4 |= 1 << 2);
    if owned >> 11 & 1 != 0 {
        let umip = case("sidt with UMIP", &[0x0f, 0x01, 0x0f], &[DONE], &[GP]);
        check_with(&mut guest, &umip, |page| page.sregs.cr4 |= 1 << 11);
    }
    let after = guest.run_page().counters.exits;
    // GDTR or IDTR access, LDTR or TR access, RDTSC, INVLPG, RDTSCP, INVPCID: none exits.
    for reason in [46, 47, 16, 14, 51, 58] {
        assert_eq!(after[reason], before[reason], "exit reason {reason}");
    }
    assert_healthy(&mut guest);
}

/// INT n, INT3 and INT1 of every vector at either CPL; from CPL3 only through a gate that lets it.
fn every_vector_reaches_the_guest() {
    let mut guest = RawGuest::new(HEALTHY);
    for vector in 0..=255u8 {
        let code = [0xcd, vector];
        for user in [None, Some(2)] {
            guest.set_gate(vector, KERNEL_CS, 0xee);
            assert_eq!(
                vector_of(&mut guest, "int n", &code, user, |_| {}),
                vector.into(),
                "user {user:?}"
            );
        }
        if u64::from(vector) == DONE {
            continue;
        }
        // A gate of DPL 0.
        guest.set_gate(vector, KERNEL_CS, 0x8e);
        assert_eq!(vector_of(&mut guest, "int n", &code, None, |_| {}), vector.into());
        if u64::from(vector) != GP {
            assert_eq!(
                vector_of(&mut guest, "int n", &code, Some(2), |_| {}),
                GP,
                "int {vector} at CPL3"
            );
        }
        guest.set_gate(vector, KERNEL_CS, 0xee);
    }
    check_all(&[
        case("int3", &[0xcc], &[3], &[3]),
        case("int1", &[0xf1], &[DB], &[DB]),
        case("ud2", &[0x0f, 0x0b], &[UD], &[UD]),
    ]);
    // Single step: #DB behind each instruction. pushf; or dword [rsp], 0x100; popf; nop
    let step: &[u8] = &[0x9c, 0x81, 0x0c, 0x24, 0, 1, 0, 0, 0x9d, 0x90];
    for user in [None, Some(2)] {
        assert_eq!(vector_of(&mut guest, "single step", step, user, |_| {}), DB);
    }
    assert_healthy(&mut guest);
}

/// IDT, GDT, TSS and LDT that are wrong in every way: a fault in the guest, or a RUN result, and nothing else.
fn hostile_descriptor_tables_stay_inside() {
    type Spoil = fn(&mut RawGuest);
    let cases: &[(&str, Spoil)] = &[
        ("gate into nothing", |guest| guest.set_gate(6, 0, 0xee)),
        ("gate into a data segment", |guest| guest.set_gate(6, 0x18, 0xee)),
        ("gate into the TSS", |guest| guest.set_gate(6, 0x40, 0xee)),
        ("gate beyond the GDT", |guest| guest.set_gate(6, 0xfff8, 0xee)),
        ("gate in the LDT", |guest| guest.set_gate(6, 0x14, 0xee)),
        ("gate into CPL3", |guest| guest.set_gate(6, USER_CS, 0xee)),
        ("task gate", |guest| guest.set_gate(6, 0x40, 0xe5)),
        ("call gate", |guest| guest.set_gate(6, KERNEL_CS, 0xec)),
        ("16-bit gate", |guest| guest.set_gate(6, KERNEL_CS, 0xe6)),
        ("absent gate", |guest| guest.set_gate(6, KERNEL_CS, 0x6e)),
        ("all gates absent", |guest| {
            (0..32).for_each(|vector| guest.set_gate(vector, KERNEL_CS, 0))
        }),
        ("IDT of one byte", |guest| guest.edit(|page| page.sregs.idtr_limit = 0)),
        ("IDT at the top", |guest| {
            guest.edit(|page| page.sregs.idtr_base = !0xfff)
        }),
        ("IDT at 0", |guest| guest.edit(|page| page.sregs.idtr_base = 0)),
        ("GDT of one byte", |guest| guest.edit(|page| page.sregs.gdtr_limit = 0)),
        ("GDT at the top", |guest| {
            guest.edit(|page| page.sregs.gdtr_base = !0xfff)
        }),
        ("TSS too small for an IST", |guest| {
            guest.edit(|page| page.sregs.tr.limit = 0)
        }),
        ("TSS at the top", |guest| guest.edit(|page| page.sregs.tr.base = !0x3f)),
        ("TSS of 16 bits", |guest| {
            guest.edit(|page| page.sregs.tr.access_rights = 0x83)
        }),
        ("stack at the top", |guest| guest.edit(|page| page.gprs.rsp = !0)),
        ("stack at 0", |guest| guest.edit(|page| page.gprs.rsp = 0)),
        ("stack not canonical", |guest| {
            guest.edit(|page| page.gprs.rsp = 1 << 63)
        }),
    ];
    let mut seen = BTreeMap::new();
    for (name, spoil) in cases {
        for user in [false, true] {
            // A guest of its own: the tables of this one are lost.
            let mut guest = RawGuest::new(&[0x0f, 0x0b]);
            if user {
                guest.reset_user(RFLAGS_IOPL3);
            }
            spoil(&mut guest);
            let what = match guest.run() {
                Ended::Call(number) => format!("vector {}", number.wrapping_sub(TRAP)),
                Ended::Exit(exit) => {
                    assert!(
                        matches!(
                            exit.kind,
                            dune_abi::EXIT_TRIPLE_FAULT
                                | dune_abi::EXIT_NO_SLOT
                                | dune_abi::EXIT_FAIL_ENTRY
                                | dune_abi::EXIT_TOUCH
                        ),
                        "{name}: {exit:x?}"
                    );
                    format!("kind {}", exit.kind)
                }
            };
            println!("{name}, user {user}: {what}");
            *seen.entry(what).or_insert(0) += 1;
        }
    }
    assert!(
        seen.contains_key(&format!("kind {}", dune_abi::EXIT_TRIPLE_FAULT)),
        "{seen:?}"
    );
    assert!(seen.contains_key("vector 13"), "{seen:?}");
    assert_healthy(&mut RawGuest::new(HEALTHY));
}

/// `pushf; or dword [rsp], 0x40000; popf; mov eax, [rdi + 1]`: #AC at CPL3, and again as its own handler.
const ALIGNMENT_STORM: &[u8] = &[0x9c, 0x81, 0x0c, 0x24, 0, 0, 4, 0, 0x9d, 0x8b, 0x47, 0x01];
/// `int1`, as its own handler.
const DEBUG_STORM: &[u8] = &[0xf1];

/// CVE-2015-5307 and CVE-2015-8104: an exception whose handler raises it again, for ever, at CPL3 on a stack of its own.
/// The CPU must exit for each, so that signals are seen, SIGKILL ends it, and others run meanwhile.
fn storm_can_be_ended(vector: u8, code: &'static [u8]) {
    loop_can_be_ended(0, || {
        let mut guest = RawGuest::new(code);
        guest.reset_user(2);
        let (handler, data) = (guest.user(guest.code()), guest.user(guest.data()));
        guest.set_gate_to(vector, USER_CS, 0xee, handler);
        guest.set_ist1(guest.user(guest.data()) + 0x2000);
        guest.edit(|page| {
            // CR0.AM; the host has it on.
            page.sregs.cr0 |= 1 << 18;
            page.gprs.rdi = data;
        });
        guest
    });
}

/// HLT is an exit, not a halt: a guest that does nothing else is as good as one that computes.
fn halting_guest_can_be_ended() {
    // hlt; jmp to it
    loop_can_be_ended(12, || RawGuest::new(&[0xf4, 0xeb, 0xfd]));
}

/// CLI in a guest is nothing to the host: interrupts end it all the same.
fn guest_with_interrupts_off_can_be_ended() -> Outcome {
    if helpers::is_emulated() {
        return Outcome::Skip("Bochs 2.7 masks interrupts where a VM entry finds IF = 0".into());
    }
    // jmp to itself
    loop_can_be_ended(1, || RawGuest::new(&[0xeb, 0xfe]));
    Outcome::Pass
}

/// A guest that loops with exits of that reason: signals are seen, SIGKILL ends it, and others run meanwhile.
fn loop_can_be_ended(reason: usize, make: impl FnOnce() -> RawGuest) {
    let shared = Shared::new();
    let child = spawn(|| {
        let guest = make();
        // SAFETY: a timer that raises SIGALRM, and a handler that does nothing.
        unsafe {
            extern "C" fn nothing(_: i32) {}
            libc::signal(libc::SIGALRM, nothing as extern "C" fn(i32) as libc::sighandler_t);
            let every = libc::timeval {
                tv_sec: 0,
                tv_usec: 20_000,
            };
            let timer = libc::itimerval {
                it_interval: every,
                it_value: every,
            };
            libc::setitimer(libc::ITIMER_REAL, &timer, std::ptr::null_mut());
        }
        loop {
            match guest.device.run(guest.vcpu) {
                Err(Errno(libc::EINTR)) => {
                    shared.word(0).fetch_add(1, SeqCst);
                }
                Ok(answer) if answer.kind == dune_abi::EXIT_TOUCH => {
                    let hva = guest.run_page().exit.hva as *mut u8;
                    // SAFETY: the arena's, as RUN says; nothing of it changes.
                    unsafe { std::arch::asm!("lock or byte ptr [{}], 0", in(reg) hva) };
                }
                Ok(answer) if answer.kind == dune_abi::EXIT_AGAIN => {}
                other => panic!("{other:x?}"),
            }
            shared.word(1).store(guest.run_page().counters.exits[reason], SeqCst);
        }
    });
    let wait = |enough: &dyn Fn() -> bool| {
        for _ in 0..500 {
            if enough() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        false
    };
    let calm = wait(&|| shared.word(0).load(SeqCst) >= 5 && shared.word(1).load(SeqCst) >= 5);
    let (signals, exits) = (shared.word(0).load(SeqCst), shared.word(1).load(SeqCst));
    child.kill(libc::SIGKILL);
    let ended = child.wait();
    assert_eq!(ended.signal(), Some(libc::SIGKILL), "{ended:?}");
    assert!(calm, "{signals} signals seen in {exits} exits");
    assert_healthy(&mut RawGuest::new(HEALTHY));
}

/// STI or MOV SS right before an instruction that the module emulates: the next entry must not find the blocking beside
/// flags that contradict it.
fn blocking_ends_with_an_emulated_instruction() {
    let mut guest = RawGuest::new(HEALTHY);
    const MOV_SS: &[u8] = &[0x8c, 0xd0, 0x8e, 0xd0]; // mov eax, ss; mov ss, eax
    const STI: &[u8] = &[0xfb];
    for (name, before) in [("sti", STI), ("mov ss", MOV_SS)] {
        for (what, instruction) in [
            ("hlt", &[0xf4u8] as &[u8]),
            ("cpuid", &[0x0f, 0xa2]),
            ("wbinvd", &[0x0f, 0x09]),
            ("rdmsr", &[0x0f, 0x32]),
        ] {
            for tf in [0, 0x100] {
                let code = [before, instruction].concat();
                let got = vector_of(&mut guest, what, &code, None, |page| {
                    page.gprs.rcx = 0xc000_0080;
                    page.rflags |= tf;
                });
                let wanted: &[u64] = if tf == 0 { &[DONE] } else { &[DB] };
                assert!(wanted.contains(&got), "{name}; {what}, TF {tf:#x}: {got}");
            }
        }
        // INT1: its #DB comes by an exit, in which nothing says that TF's is pending.
        for tf in [0, 0x100] {
            let code = [before, &[0xf1u8]].concat();
            let got = vector_of(&mut guest, "int1", &code, None, |page| page.rflags |= tf);
            assert_eq!(got, DB, "{name}; int1, TF {tf:#x}");
        }
        // The VMCALL that stands for a SYSCALL goes on with flags that are not those of the STI.
        let code = [before, &[0x0f, 0x01, 0xc1]].concat();
        for r11 in [2u64, 0x202, 0x102, 0x302] {
            let mut all = code.clone();
            all.extend_from_slice(INT_DONE);
            guest.set_code(&all);
            guest.reset();
            let end = guest.code() + code.len() as u64;
            guest.edit(|page| {
                page.sregs.syscall_vmcall = end - 3;
                page.gprs.rcx = end;
                page.gprs.r11 = r11;
            });
            assert!(matches!(guest.run(), Ended::Call(_)), "{name}");
            // TF: one #DB behind the INT's handler's or the INT itself, by the SDM's rules; never a failed entry.
            match guest.run() {
                Ended::Call(number) if number == TRAP + DONE || r11 & 0x100 != 0 && number == TRAP + DB => {}
                other => panic!("{name}; vmcall with R11 {r11:#x}: {other:x?}"),
            }
        }
    }
    // Registers given anew while something is blocked: exit in the shadow, then DIRTY_RIP alone.
    guest.set_code(&[0xfb, 0x0f, 0x01, 0xc1, 0xcd, 0x99]);
    guest.reset();
    assert!(matches!(guest.run(), Ended::Call(_)));
    let code = guest.code();
    guest.edit(|page| {
        page.rip = code + 4;
        page.rflags = 2;
        page.dirty = dune_abi::DIRTY_RIP;
    });
    assert_eq!(guest.run(), Ended::Call(TRAP + DONE));
    assert_healthy(&mut guest);
}

/// Linux' selector of user data.
const HOST_USER_DS: u16 = 0x2b;

/// A VM exit would leave null in DS, ES, FS and GS: RUN refuses while one is in use, and runs when none is.
fn selectors_are_refused_not_lost() {
    let mut guest = RawGuest::new(HEALTHY);
    let set = |value: u16| {
        // SAFETY: data selectors have no meaning in 64-bit code.
        unsafe { std::arch::asm!("mov es, {0:x}", in(reg) value, options(nostack, preserves_flags)) };
    };
    let get = || {
        let value: u16;
        // SAFETY: reads a register.
        unsafe { std::arch::asm!("mov {0:x}, es", out(reg) value, options(nomem, nostack, preserves_flags)) };
        value
    };
    let before = get();
    set(HOST_USER_DS);
    let refused = guest.try_run();
    let kept = get();
    set(before);
    assert_eq!(refused, Err(Errno(libc::ENXIO)));
    assert_eq!(kept, HOST_USER_DS);
    assert_eq!(guest.run(), Ended::Call(0x1234));
}

/// A thread with an LDT of its own finds it behind a guest that ran on the same CPU.
fn ldt_survives_an_exit() -> Outcome {
    // struct user_desc: entry 0, base 0, limit 0xfffff pages, 32-bit data.
    let mut descriptor = [0u32, 0, 0xf_ffff, 0b101_0001];
    // SAFETY: the structure is as Linux has it.
    let set = unsafe { libc::syscall(libc::SYS_modify_ldt, 0x11, &raw mut descriptor, 16) };
    if set != 0 {
        let error = std::io::Error::last_os_error();
        if error.raw_os_error() == Some(libc::ENOSYS) {
            return Outcome::Skip("this kernel has no modify_ldt".into());
        }
        return Outcome::Fail(format!("modify_ldt: {error}"));
    }
    let mut guest = RawGuest::new(HEALTHY);
    for _ in 0..100 {
        guest.reset();
        assert_eq!(guest.run(), Ended::Call(0x1234));
        let loaded: u16;
        // SAFETY: selector 7 is entry 0 of the LDT; null again at once. A lost LDT ends the test by SIGSEGV.
        unsafe {
            std::arch::asm!("mov es, {0:x}", "mov {1:x}, es", "mov es, {2:x}",
                in(reg) 7u16, out(reg) loaded, in(reg) 0u16, options(nostack, preserves_flags));
        }
        assert_eq!(loaded, 7);
    }
    Outcome::Pass
}

/// A VM exit shortens the TSS: ports that ioperm gave the process are its own again afterwards.
fn port_permission_survives_an_exit() -> Outcome {
    // SAFETY: port 0x80 is the POST code's.
    if unsafe { libc::ioperm(0x80, 1, 1) } != 0 {
        let error = std::io::Error::last_os_error();
        if error.raw_os_error() == Some(libc::ENOSYS) {
            return Outcome::Skip("this kernel has no ioperm".into());
        }
        return Outcome::Fail(format!("ioperm: {error}"));
    }
    let mut guest = RawGuest::new(HEALTHY);
    for _ in 0..20 {
        guest.reset();
        assert_eq!(guest.run(), Ended::Call(0x1234));
        // SAFETY: as above; SIGSEGV where the permission is lost.
        unsafe { std::arch::asm!("out 0x80, al", in("al") 0u8, options(nomem, nostack)) };
    }
    // The guest does not have what the process has.
    assert_eq!(vector_of(&mut guest, "out", &[0xe6, 0x80], None, |_| {}), GP);
    Outcome::Pass
}

/// A hardware breakpoint of a debugger still works after the thread was in a guest, and does not fire there.
fn debug_registers_survive_an_exit() {
    static WATCHED: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    let shared = Shared::new();
    let child = spawn(|| {
        let mut guest = RawGuest::new(HEALTHY);
        // SAFETY: asks to be traced by the parent, and stops.
        unsafe {
            libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
            libc::raise(libc::SIGSTOP);
        }
        for round in 0..3 {
            guest.reset();
            assert_eq!(guest.run(), Ended::Call(0x1234));
            // The parent sees SIGTRAP for this store.
            WATCHED.store(round, SeqCst);
            shared.word(0).fetch_add(1, SeqCst);
        }
    });
    let wait = || {
        let mut status = 0;
        // SAFETY: our child.
        assert_eq!(unsafe { libc::waitpid(child.pid, &mut status, 0) }, child.pid);
        status
    };
    let status = wait();
    assert!(libc::WIFSTOPPED(status), "{status:#x}");
    let offset = |register: usize| std::mem::offset_of!(libc::user, u_debugreg) + 8 * register;
    // SAFETY: our stopped child. DR0 = the word, DR7: write of 8 bytes, local.
    unsafe {
        assert_eq!(
            libc::ptrace(libc::PTRACE_POKEUSER, child.pid, offset(0), &raw const WATCHED),
            0
        );
        assert_eq!(
            libc::ptrace(libc::PTRACE_POKEUSER, child.pid, offset(7), 0x9_0001usize),
            0
        );
    }
    let mut hits = 0;
    loop {
        // SAFETY: our stopped child.
        assert_eq!(unsafe { libc::ptrace(libc::PTRACE_CONT, child.pid, 0, 0) }, 0);
        let status = wait();
        if libc::WIFEXITED(status) {
            assert_eq!(libc::WEXITSTATUS(status), 0);
            break;
        }
        assert!(
            libc::WIFSTOPPED(status) && libc::WSTOPSIG(status) == libc::SIGTRAP,
            "{status:#x}"
        );
        hits += 1;
        assert_eq!(shared.word(0).load(SeqCst), hits - 1);
    }
    assert_eq!(hits, 3);
    // Reaped above.
    std::mem::forget(child);
}

/// Everything that this file does, at once, and the host's registers before and after.
fn host_state_survives_a_hostile_guest() {
    helpers::pin_to_cpu(0).unwrap();
    let before = host_state();
    for body in [
        port_io_faults as fn(),
        control_registers_obey_the_policy,
        vmx_instructions_are_undefined,
        instructions_beyond_the_guest_fault,
        emulated_instructions_obey_privilege,
        the_guests_own_instructions_run,
        hostile_descriptor_tables_stay_inside,
    ] {
        body();
        assert_eq!(host_state(), before);
    }
    let mut guest = RawGuest::new(HEALTHY);
    for &number in REFUSED_MSRS {
        vector_of(&mut guest, "wrmsr", &[0x0f, 0x30], None, |page| {
            page.gprs.rcx = number.into();
            page.gprs.rax = 0x5555_5555;
            page.gprs.rdx = 0x5555;
        });
    }
    assert_eq!(host_state(), before);
}
