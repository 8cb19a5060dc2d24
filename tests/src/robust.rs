// SPDX-License-Identifier: MIT OR Apache-2.0

//! Whatever a program hands to the module or does in its guest: the documented answer, and the next guest runs.

use std::sync::atomic::Ordering::SeqCst;

use dune_abi::CreateVcpu;
use dune_abi::Info;
use dune_abi::MapSlot;
use dune_abi::RunPage;
use libdune::Dune;
use libdune::Error;
use libdune::PagingError;

use crate::framework::Need;
use crate::framework::Suite;
use crate::framework::Test;
use crate::framework::User;
use crate::helpers;
use crate::helpers::pin_to_cpu;
use crate::raw::Device;
use crate::raw::Ended;
use crate::raw::Errno;
use crate::raw::RawGuest;
use crate::raw::RFLAGS_IOPL3;
use crate::raw::TRAP;
use crate::raw::USER_CS;
use crate::support::enter;
use crate::support::spawn;
use crate::support::Map;
use crate::support::Shared;
use crate::support::GIB;
use crate::support::PAGE;

pub const TESTS: &[Test] = &[
    Test::asserting("raw_guest_runs", raw_guest_runs),
    Test::asserting("run_leaves_the_call_in_registers", run_leaves_the_call_in_registers),
    Test::asserting("vm_entry_failure_is_reported", vm_entry_failure_is_reported),
    Test::asserting("state_beyond_the_policy_is_refused", state_beyond_the_policy_is_refused),
    Test::asserting("event_is_delivered", event_is_delivered),
    Test::asserting("triple_fault_is_reported", triple_fault_is_reported),
    Test::asserting("vmcall_at_cpl3_is_refused", vmcall_at_cpl3_is_refused),
    Test::asserting("mov_cr8_and_port_io_are_refused", mov_cr8_and_port_io_are_refused),
    Test::asserting("refused_instructions_fault", refused_instructions_fault),
    Test::asserting("emulated_instructions_go_on", emulated_instructions_go_on),
    Test::asserting("swapgs_stays_in_the_guest", swapgs_stays_in_the_guest),
    Test::asserting("gpa_outside_every_slot_is_reported", gpa_outside_every_slot_is_reported),
    Test::asserting("bad_cr3_faults_in_the_guest", bad_cr3_faults_in_the_guest),
    Test::asserting("bad_calls_are_refused", bad_calls_are_refused),
    Test::asserting("fd_of_another_process_is_refused", fd_of_another_process_is_refused),
    Test::asserting("bad_maps_are_refused", bad_maps_are_refused),
    Test::asserting("out_of_vcpus", out_of_vcpus),
    Test::asserting("out_of_slots", out_of_slots),
    Test::asserting("every_allocation_may_fail", every_allocation_may_fail)
        .run_as(User::Root)
        .suite(Suite::Debug)
        .needs(&[Need::Path("/proc/self/fail-nth")])
        .timeout_s(120),
    Test::asserting("each_call_may_find_no_memory", each_call_may_find_no_memory)
        .run_as(User::Root)
        .suite(Suite::Long)
        .needs(&[Need::Path("/proc/self/fail-nth")])
        .timeout_s(600),
    Test::asserting("every_allocation_inside_may_fail", every_allocation_inside_may_fail)
        .run_as(User::Root)
        .suite(Suite::Long)
        .needs(&[Need::Path("/proc/self/fail-nth")])
        .timeout_s(600),
    Test::asserting("every_allocation_of_enter_may_fail", every_allocation_of_enter_may_fail)
        .run_as(User::Root)
        .suite(Suite::Long)
        .needs(&[Need::Path("/proc/self/fail-nth")])
        .timeout_s(600),
];

/// `mov eax, 0x1234; vmcall`: what a healthy guest does.
const HEALTHY: &[u8] = &[0xb8, 0x34, 0x12, 0, 0, 0x0f, 0x01, 0xc1];
const VMCALL: &[u8] = &[0x0f, 0x01, 0xc1];
const UD2: &[u8] = &[0x0f, 0x0b];
/// `mov al, [rdi]; vmcall`.
const LOAD: &[u8] = &[0x8a, 0x07, 0x0f, 0x01, 0xc1];
/// `mov [rdi], al; vmcall`.
const STORE: &[u8] = &[0x88, 0x07, 0x0f, 0x01, 0xc1];

const INVALID_GUEST_STATE: u32 = 1 << 31 | 33;
const EPT_VIOLATION: u32 = 48;

const UD: u64 = 6;
const GP: u64 = 13;
const PF: u64 = 14;

/// The guest does what it should, whatever went wrong before.
#[track_caller]
fn assert_healthy(guest: &mut RawGuest) {
    guest.set_code(HEALTHY);
    guest.reset();
    assert_eq!(guest.run(), Ended::Call(0x1234));
}

/// A raw guest runs, its registers go in and come out, and it goes on behind its VMCALL.
pub fn raw_guest_runs() {
    // mov rax, rdi; add rax, rsi; vmcall; mov rdi, rax; mov eax, 7; vmcall
    let code = [
        0x48, 0x89, 0xf8, 0x48, 0x01, 0xf0, 0x0f, 0x01, 0xc1, 0x48, 0x89, 0xc7, 0xb8, 7, 0, 0, 0, 0x0f, 0x01, 0xc1,
    ];
    let mut guest = RawGuest::new(&code);
    guest.edit(|page| {
        page.gprs.rdi = 40;
        page.gprs.rsi = 2;
        page.gprs.rbx = 0x1111_2222_3333_4444;
        page.gprs.rbp = 0x5555;
        page.gprs.r15 = !0;
    });
    assert_eq!(guest.run(), Ended::Call(42));
    let page = guest.run_page();
    assert_eq!(
        (page.gprs.rbx, page.gprs.rbp, page.gprs.r15),
        (0x1111_2222_3333_4444, 0x5555, !0)
    );
    guest.edit(|page| page.gprs.rax = 99);
    assert_eq!(guest.run(), Ended::Call(7));
    let page = guest.run_page();
    assert_eq!(page.gprs.rdi, 99);
    assert_eq!(page.counters.exits[18], 2);
    guest.sync();
    let page = guest.run_page();
    assert_eq!(page.rip, guest.code() + code.len() as u64);
    assert_eq!(page.rflags & 0x3000, 0x3000);
    assert_eq!(page.sregs.cs, guest.sregs(false).cs);
    assert_eq!(page.sregs.cr3, guest.sregs(false).cr3);
}

/// RUN leaves a call's number and arguments in the registers of its caller.
pub fn run_leaves_the_call_in_registers() {
    let mut guest = RawGuest::new(VMCALL);
    guest.edit(|page| {
        page.gprs.rax = 0xffff_ffff_0000_0027;
        page.gprs.rdi = 1 << 40;
        page.gprs.rsi = 2;
        page.gprs.rdx = 3;
        page.gprs.r10 = 4;
        page.gprs.r8 = 5;
        page.gprs.r9 = !0;
    });
    let answer = loop {
        match guest.device.run(guest.vcpu) {
            Ok(answer) if answer.kind == dune_abi::EXIT_SYSCALL => break answer,
            Ok(answer) => assert!(
                matches!(answer.kind, dune_abi::EXIT_AGAIN | dune_abi::EXIT_TOUCH),
                "{answer:?}"
            ),
            Err(errno) => assert_eq!(errno, Errno(libc::EINTR)),
        }
    };
    // Linux takes the low half of RAX alone; so does RUN.
    assert_eq!(answer.rax, 0x27);
    assert_eq!(answer.arguments, [1 << 40, 2, 3, 4, 5, !0]);
}

/// Every kind of impossible state gives `EXIT_FAIL_ENTRY` with the SDM's reason, and a good state then runs.
pub fn vm_entry_failure_is_reported() {
    type Spoil = fn(&mut RunPage);
    let cases: &[(&str, Spoil)] = &[
        ("RFLAGS bit 1 clear", |page| page.rflags = 0x3000),
        ("RFLAGS.VM", |page| page.rflags |= 1 << 17),
        ("RFLAGS reserved bit", |page| page.rflags |= 1 << 22),
        ("CR0.PE clear", |page| page.sregs.cr0 &= !1),
        ("CR0.PG clear", |page| page.sregs.cr0 &= !(1 << 31)),
        ("CR0.NE clear", |page| page.sregs.cr0 &= !(1 << 5)),
        ("CR0 reserved bit", |page| page.sregs.cr0 |= 1 << 40),
        ("CR3 beyond the physical width", |page| page.sregs.cr3 |= 1 << 52),
        ("CR3 not canonical", |page| page.sregs.cr3 |= 1 << 62),
        ("CR4.PAE clear", |page| page.sregs.cr4 &= !(1 << 5)),
        ("EFER reserved bit", |page| page.sregs.efer |= 1 << 1),
        ("EFER.LMA clear", |page| page.sregs.efer &= !(1 << 10)),
        ("EFER.LME clear", |page| page.sregs.efer &= !(1 << 8)),
        ("CS with L and D", |page| page.sregs.cs.access_rights |= 1 << 14),
        ("CS a system segment", |page| page.sregs.cs.access_rights &= !(1 << 4)),
        ("CS not present", |page| page.sregs.cs.access_rights &= !(1 << 7)),
        ("SS with DPL 3 under CPL 0", |page| {
            page.sregs.ss.access_rights |= 3 << 5
        }),
        ("TR not busy", |page| page.sregs.tr.access_rights = 0x89),
        ("TR unusable", |page| page.sregs.tr.access_rights |= 1 << 16),
        ("TR in the LDT", |page| page.sregs.tr.selector |= 4),
        ("TR base not canonical", |page| page.sregs.tr.base = 1 << 63),
        ("FS base not canonical", |page| page.sregs.fs.base = 1 << 63),
        ("GDTR base not canonical", |page| page.sregs.gdtr_base = 1 << 63),
        ("GDTR limit above 16 bits", |page| page.sregs.gdtr_limit = 1 << 16),
        ("IDTR base not canonical", |page| page.sregs.idtr_base = 1 << 63),
        ("IDTR limit above 16 bits", |page| page.sregs.idtr_limit = 1 << 16),
    ];
    let mut guest = RawGuest::new(HEALTHY);
    let mut ran = 0;
    for (name, spoil) in cases {
        guest.reset();
        guest.edit(spoil);
        let entries = guest.run_page().counters.entries;
        let exit = match guest.run() {
            Ended::Exit(exit) => exit,
            Ended::Call(number) => {
                println!("{name}: the guest ran, and made call {number:#x}");
                ran += 1;
                continue;
            }
        };
        assert_eq!(exit.kind, dune_abi::EXIT_FAIL_ENTRY, "{name}: {exit:?}");
        assert_eq!(exit.reason, INVALID_GUEST_STATE, "{name}");
        assert_eq!(exit.qualification, 0, "{name}");
        assert_eq!(exit.instruction_error, 0, "{name}");
        assert_eq!(
            guest.run_page().counters.entries,
            entries,
            "{name}: counted as an entry"
        );
        // The bad state stays: RUN without a new one fails again, the same way. The first case meets a VMCS that was
        // never launched.
        let again = guest.run().exit();
        assert_eq!((again.kind, again.reason), (exit.kind, exit.reason), "{name}, again");
        assert_healthy(&mut guest);
    }
    assert_eq!(ran, 0, "impossible states that ran");

    // The SDM wants a failed entry here as well; Bochs enters and raises #GP at the fetch.
    guest.reset();
    guest.edit(|page| page.rip = 1 << 63);
    match guest.run() {
        Ended::Exit(exit) => assert_eq!(
            (exit.kind, exit.reason),
            (dune_abi::EXIT_FAIL_ENTRY, INVALID_GUEST_STATE)
        ),
        Ended::Call(number) => assert_eq!(number, TRAP + GP),
    }
    assert_healthy(&mut guest);
}

/// What would reach beyond the guest is refused by RUN itself, before the CPU sees it.
pub fn state_beyond_the_policy_is_refused() {
    type Spoil = fn(&mut RunPage);
    let cases: &[(&str, Spoil)] = &[
        ("CR4.VMXE", |page| page.sregs.cr4 |= 1 << 13),
        ("CR4.SMXE", |page| page.sregs.cr4 |= 1 << 14),
        ("CR4.LA57", |page| page.sregs.cr4 |= 1 << 12),
        ("CR4.FRED", |page| page.sregs.cr4 |= 1 << 32),
        ("LSTAR not canonical", |page| page.sregs.lstar = 1 << 63),
        ("unknown dirty bit", |page| page.dirty |= 8),
    ];
    let mut guest = RawGuest::new(HEALTHY);
    for (name, spoil) in cases {
        guest.reset();
        guest.edit(spoil);
        assert_eq!(guest.try_run(), Err(Errno(libc::EINVAL)), "{name}");
        assert_healthy(&mut guest);
    }

    // Events that no CPU would raise so, or that are the host's to raise.
    for (name, info) in [
        ("external interrupt", 0x8000_0020),
        ("NMI", 0x8000_0202),
        ("reserved kind", 0x8000_0100),
        ("other event", 0x8000_0700),
        ("exception 32", 0x8000_0320),
        ("#UD with an error code", 0x8000_0b06),
        ("#PF without", 0x8000_030e),
        ("reserved bit", 0x8000_130d),
    ] {
        guest.reset();
        guest.edit(|page| {
            page.event.info = info;
            page.dirty |= dune_abi::DIRTY_EVENT;
        });
        assert_eq!(guest.try_run(), Err(Errno(libc::EINVAL)), "{name}");
        assert_healthy(&mut guest);
    }
}

/// An event given with RUN reaches the guest's handler, with its error code and CR2.
pub fn event_is_delivered() {
    let mut guest = RawGuest::new(HEALTHY);
    guest.edit(|page| {
        page.event = dune_abi::Event {
            info: 0x8000_0b0e,
            error_code: 0x4007,
            ..Default::default()
        };
        page.cr2 = 0xdead_b000;
        page.dirty |= dune_abi::DIRTY_EVENT;
    });
    let frame = guest.expect_trap(PF);
    assert_eq!(frame.error_code, Some(0x4007));
    assert_eq!((frame.rip, frame.rflags & 0x3000), (guest.code(), 0x3000));
    assert_eq!(guest.run_page().cr2, 0xdead_b000);
    assert_eq!(guest.run_page().dirty, 0);
    assert_healthy(&mut guest);
}

pub fn triple_fault_is_reported() {
    let mut guest = RawGuest::new(UD2);
    for _ in 0..3 {
        guest.set_code(UD2);
        guest.reset();
        guest.edit(|page| page.sregs.idtr_limit = 0);
        let exit = guest.run().exit();
        assert_eq!((exit.kind, exit.reason), (dune_abi::EXIT_TRIPLE_FAULT, 2), "{exit:?}");
        let page = guest.run_page();
        assert_eq!(page.rip, guest.code(), "the whole state is there");
        assert_healthy(&mut guest);
    }
    assert_eq!(guest.run_page().counters.exits[2], 3);
}

/// The wall between plugin and program: a VMCALL at CPL3 is an undefined instruction, whatever IOPL says.
pub fn vmcall_at_cpl3_is_refused() {
    let mut guest = RawGuest::new(VMCALL);
    for rflags in [2, RFLAGS_IOPL3] {
        guest.set_code(VMCALL);
        guest.reset_user(rflags);
        guest.edit(|page| page.gprs.rax = libc::SYS_getpid as u64);
        let frame = guest.expect_trap(UD);
        assert_eq!(frame.cs, u64::from(USER_CS));
        assert_eq!(frame.rip, guest.user(guest.code()), "a fault, not a trap");
        assert_healthy(&mut guest);
    }
}

/// Instructions that reach beyond the guest fault at CPL0; nothing of the host changes.
pub fn mov_cr8_and_port_io_are_refused() {
    let cases: &[(&str, &[u8])] = &[
        ("mov cr8, rax", &[0x44, 0x0f, 0x22, 0xc0]),
        ("mov rax, cr8", &[0x44, 0x0f, 0x20, 0xc0]),
        ("in al, dx", &[0xec]),
        ("out dx, al", &[0xee]),
        ("in eax, 0x80", &[0xe5, 0x80]),
        ("out 0x80, al", &[0xe6, 0x80]),
        ("outsb", &[0x6e]),
        ("insb", &[0x6c]),
        ("rep outsb", &[0xf3, 0x6e]),
    ];
    let mut guest = RawGuest::new(HEALTHY);
    for (name, code) in cases {
        guest.set_code(code);
        guest.reset();
        let data = guest.data();
        guest.edit(|page| {
            // 0x64: the reset line of the keyboard controller.
            page.gprs.rdx = 0x64;
            page.gprs.rax = 0xfe;
            page.gprs.rcx = 1;
            page.gprs.rsi = data;
            page.gprs.rdi = data;
        });
        assert_eq!(guest.run(), Ended::Call(TRAP + GP), "{name}");
        let frame = guest.frame(true);
        assert_eq!((frame.error_code, frame.rip), (Some(0), guest.code()), "{name}");
        assert_healthy(&mut guest);
    }
    // The same from CPL3 with IOPL 3.
    guest.set_code(&[0xee]);
    guest.reset_user(RFLAGS_IOPL3);
    let frame = guest.expect_trap(GP);
    assert_eq!((frame.error_code, frame.cs), (Some(0), u64::from(USER_CS)));
}

/// A guest's SWAPGS leaves its GS base in the CPU. Where Linux does not use FSGSBASE it does not look there, so that the
/// next process would have it: with `DUNE_MUTATE=swapgs` this test is red on such a CPU.
pub fn swapgs_stays_in_the_guest() {
    const STRAY: usize = 64;
    /// The second word where GS has base 0, the third where it has the guest's.
    fn is_mine() -> bool {
        let words = [[0u64; 8], [1; 8], [2; 8]];
        let word: u64;
        // SAFETY: reads one of the words, by whatever base GS has of those that this test gives.
        unsafe { std::arch::asm!("mov {}, gs:[{}]", out(reg) word, in(reg) &words[1], options(readonly, nostack)) };
        word == 1
    }
    assert!(is_mine(), "GS has a base of its own here");
    pin_to_cpu(0).unwrap();
    let shared = Shared::new();
    let neighbour = spawn(|| {
        while shared.word(0).load(SeqCst) == 0 {
            assert!(is_mine(), "the neighbour has the guest's GS base");
            std::thread::yield_now();
        }
    });
    // swapgs; mov eax, 0x1234; vmcall
    let mut guest = RawGuest::new(&[0x0f, 0x01, 0xf8, 0xb8, 0x34, 0x12, 0, 0, 0x0f, 0x01, 0xc1]);
    let mut strays = 0;
    for _ in 0..100 {
        guest.reset();
        guest.edit(|page| page.sregs.gs.base = STRAY as u64);
        assert_eq!(guest.run(), Ended::Call(0x1234));
        strays += u32::from(!is_mine());
        std::thread::yield_now();
    }
    shared.word(0).store(1, SeqCst);
    neighbour.wait().assert_success();
    println!("the guest's GS base was the thread's own {strays} times");
    if !crate::helpers::cpu_has("fsgsbase") {
        assert_eq!(strays, 0, "RUNs that left the guest's GS base behind");
    }
}

/// The rest of the refused instructions, each by the fault that docs/guest-policy.md names.
pub fn refused_instructions_fault() {
    let cases: &[(&str, u64, &[u8])] = &[
        ("rdmsr of IA32_APIC_BASE", GP, &[0xb9, 0x1b, 0, 0, 0, 0x0f, 0x32]),
        ("wrmsr of IA32_EFER", GP, &[0xb9, 0x80, 0, 0, 0xc0, 0x0f, 0x30]),
        ("rdmsr of an MSR in no range", GP, &[0xb9, 0, 0, 0, 0x40, 0x0f, 0x32]),
        ("mov dr7, rax", GP, &[0x0f, 0x23, 0xf8]),
        ("invd", GP, &[0x0f, 0x08]),
        ("rdpmc", GP, &[0x0f, 0x33]),
        (
            "xsetbv of an unknown XCR",
            if std::arch::is_x86_feature_detected!("xsave") {
                GP
            } else {
                UD
            },
            &[0xb9, 9, 0, 0, 0, 0x0f, 0x01, 0xd1],
        ),
        ("monitor", UD, &[0x0f, 0x01, 0xc8]),
        ("mwait", UD, &[0x0f, 0x01, 0xc9]),
        ("vmxon", UD, &[0xf3, 0x0f, 0xc7, 0x37]),
        ("vmxoff", UD, &[0x0f, 0x01, 0xc4]),
        ("vmlaunch", UD, &[0x0f, 0x01, 0xc2]),
        ("vmresume", UD, &[0x0f, 0x01, 0xc3]),
        ("vmptrld", UD, &[0x0f, 0xc7, 0x37]),
        ("vmptrst", UD, &[0x0f, 0xc7, 0x3f]),
        ("vmclear", UD, &[0x66, 0x0f, 0xc7, 0x37]),
        ("vmread", UD, &[0x0f, 0x78, 0xc0]),
        ("vmwrite", UD, &[0x0f, 0x79, 0xc0]),
        ("invept", UD, &[0x66, 0x0f, 0x38, 0x80, 0x07]),
        ("invvpid", UD, &[0x66, 0x0f, 0x38, 0x81, 0x07]),
        ("vmfunc", UD, &[0x0f, 0x01, 0xd4]),
        ("xsaves", UD, &[0x48, 0x0f, 0xc7, 0x2f]),
        ("xrstors", UD, &[0x48, 0x0f, 0xc7, 0x1f]),
        ("rsm", UD, &[0x0f, 0xaa]),
    ];
    let mut guest = RawGuest::new(HEALTHY);
    for (name, vector, code) in cases {
        guest.set_code(code);
        guest.reset();
        let data = guest.data();
        guest.edit(|page| page.gprs.rdi = data);
        assert_eq!(guest.run(), Ended::Call(TRAP + vector), "{name}");
        let frame = guest.frame(*vector == GP);
        assert!(frame.rip - guest.code() <= 5, "{name}: {frame:x?}");
        assert_healthy(&mut guest);
    }
}

/// What is emulated rather than refused: the guest goes on behind it.
pub fn emulated_instructions_go_on() {
    let cases: &[(&str, &[u8], usize)] = &[("hlt", &[0xf4], 12), ("wbinvd", &[0x0f, 0x09], 54)];
    let mut guest = RawGuest::new(HEALTHY);
    for (name, instruction, _) in cases {
        let mut code = instruction.to_vec();
        code.extend_from_slice(HEALTHY);
        guest.set_code(&code);
        guest.reset();
        assert_eq!(guest.run(), Ended::Call(0x1234), "{name}");
    }

    // cpuid; vmcall, leaf 1: VMX hidden, hypervisor shown; leaf 0: the host's vendor.
    guest.set_code(&[0x0f, 0xa2, 0x0f, 0x01, 0xc1]);
    for leaf in [0, 1] {
        guest.reset();
        guest.edit(|page| {
            page.gprs.rax = leaf;
            page.gprs.rcx = 0;
        });
        assert!(matches!(guest.run(), Ended::Call(_)));
        let got = guest.run_page().gprs;
        let host = helpers::cpuid(leaf as u32, 0);
        if leaf == 0 {
            assert_eq!(got.rbx, u64::from(host.ebx));
            assert_eq!(got.rdx, u64::from(host.edx));
            assert_eq!(got.rcx, u64::from(host.ecx));
        } else {
            assert_eq!(got.rax, u64::from(host.eax), "family and model");
            assert_eq!(got.rcx >> 5 & 1, 0, "VMX is hidden");
            assert_eq!(got.rcx >> 31, 1, "a hypervisor is shown");
        }
    }
}

/// GPAs that no slot has: each kind of access is a RUN result with the very address.
pub fn gpa_outside_every_slot_is_reported() {
    let mut guest = RawGuest::new(LOAD);
    let last_slot = (1u64 << guest.info.gpa_bits) - dune_abi::SLOT_BYTES;
    for gpa in [0, 0x1000, 0x1234_5678, last_slot, last_slot + dune_abi::SLOT_BYTES - 1] {
        for (code, access) in [(LOAD, dune_abi::ACCESS_READ), (STORE, dune_abi::ACCESS_WRITE)] {
            let gva = guest.map_odd(gpa);
            guest.set_code(code);
            guest.reset();
            guest.edit(|page| page.gprs.rdi = gva);
            let exit = guest.run().exit();
            assert_eq!(
                (exit.kind, exit.reason),
                (dune_abi::EXIT_NO_SLOT, EPT_VIOLATION),
                "{exit:x?}"
            );
            assert_eq!((exit.gpa, exit.gla), (gpa, gva), "{exit:x?}");
            assert_eq!(exit.access, access, "{exit:x?}");
            assert_eq!(exit.flags, dune_abi::FLAG_GLA_VALID);
        }
    }

    // Code there.
    let gva = guest.map_odd(0x5000);
    guest.reset();
    guest.edit(|page| page.rip = gva);
    let exit = guest.run().exit();
    assert_eq!(
        (exit.kind, exit.gpa, exit.access),
        (dune_abi::EXIT_NO_SLOT, 0x5000, dune_abi::ACCESS_EXECUTE)
    );

    // A page table there.
    guest.reset();
    guest.edit(|page| page.sregs.cr3 = 0x7000);
    let index = guest.code() >> 39 & 511;
    let exit = guest.run().exit();
    assert_eq!(
        (exit.kind, exit.gpa),
        (dune_abi::EXIT_NO_SLOT, 0x7000 + index * 8),
        "{exit:x?}"
    );
    assert_eq!(exit.flags, dune_abi::FLAG_GLA_VALID | dune_abi::FLAG_PAGING_STRUCTURE);

    // An IDT there, while an exception is being delivered.
    guest.set_code(UD2);
    guest.reset();
    let gva = guest.map_odd(0x9000);
    guest.edit(|page| page.sregs.idtr_base = gva);
    let exit = guest.run().exit();
    assert_eq!(
        (exit.kind, exit.gpa),
        (dune_abi::EXIT_NO_SLOT, 0x9000 + UD * 16),
        "{exit:x?}"
    );
    assert_eq!(exit.flags, dune_abi::FLAG_GLA_VALID | dune_abi::FLAG_EVENT_DELIVERY);
    assert_eq!(exit.interruption_info & 0x8000_07ff, 0x8000_0306);
    assert_healthy(&mut guest);
}

/// A CR3 that cannot be: a fault in the guest when it loads it itself.
pub fn bad_cr3_faults_in_the_guest() {
    // mov cr3, rax; vmcall
    let mut guest = RawGuest::new(&[0x0f, 0x22, 0xd8, 0x0f, 0x01, 0xc1]);
    for bad in [1u64 << 52, 1 << 62, 1 << 63] {
        guest.reset();
        guest.edit(|page| page.gprs.rax = page.sregs.cr3 | bad);
        let frame = guest.expect_trap(GP);
        assert_eq!((frame.error_code, frame.rip), (Some(0), guest.code()), "{bad:#x}");
    }
    assert_healthy(&mut guest);
}

/// The errno of each wrong call; docs/abi.md has the same table.
pub fn bad_calls_are_refused() {
    let device = Device::open().unwrap();
    let bad_pointer = 0xffff_8000_0000_0000usize;

    for request in [
        0,
        dune_abi::DUNE_NEW_SPACE + 1,
        dune_abi::DUNE_RUN | 1 << 30,
        dune_abi::DUNE_GET_INFO + (8 << 16),
        0x5401,
        u32::MAX,
    ] {
        assert_eq!(device.call(request, 0), Err(Errno(libc::ENOTTY)), "{request:#x}");
    }
    for request in [
        dune_abi::DUNE_GET_INFO,
        dune_abi::DUNE_CREATE_VCPU,
        dune_abi::DUNE_MAP_SLOT,
    ] {
        for pointer in [0, 1, bad_pointer, usize::MAX - 3] {
            assert_eq!(
                device.call(request, pointer),
                Err(Errno(libc::EFAULT)),
                "{request:#x} {pointer:#x}"
            );
        }
    }

    for size in [0, size_of::<Info>() as u32 - 1, size_of::<Info>() as u32 + 1, u32::MAX] {
        let mut info = Info {
            size,
            ..Info::default()
        };
        let answer = device.call(dune_abi::DUNE_GET_INFO, &raw mut info as usize);
        assert_eq!(answer, Err(Errno(libc::EINVAL)), "Info of {size} bytes");
    }
    let good = CreateVcpu {
        size: size_of::<CreateVcpu>() as u32,
        ..CreateVcpu::default()
    };
    for bad in [
        CreateVcpu { size: 0, ..good },
        CreateVcpu {
            size: good.size + 8,
            ..good
        },
        CreateVcpu { flags: 1, ..good },
        CreateVcpu { flags: 1 << 31, ..good },
    ] {
        let mut argument = bad;
        let answer = device.call(dune_abi::DUNE_CREATE_VCPU, &raw mut argument as usize);
        assert_eq!(answer, Err(Errno(libc::EINVAL)), "{bad:?}");
        assert_eq!(argument, bad, "nothing is written by a refused call");
    }
    let good = MapSlot {
        size: size_of::<MapSlot>() as u32,
        hva: &raw const device as u64,
        ..MapSlot::default()
    };
    for bad in [
        MapSlot { size: 0, ..good },
        MapSlot { flags: 2, ..good },
        MapSlot { hva: 1 << 47, ..good },
        MapSlot { hva: 1 << 63, ..good },
        MapSlot { hva: u64::MAX, ..good },
    ] {
        let mut argument = bad;
        let answer = device.call(dune_abi::DUNE_MAP_SLOT, &raw mut argument as usize);
        assert_eq!(answer, Err(Errno(libc::EINVAL)), "{bad:?}");
    }
    assert_eq!(device.info().unwrap().vcpus, 0, "a refused call made a vCPU");

    // vCPUs that do not exist.
    for vcpu in [0, 1, 0x7fff_ffff, u32::MAX as usize, 1 << 32, usize::MAX] {
        for request in [dune_abi::DUNE_DESTROY_VCPU, dune_abi::DUNE_SYNC] {
            assert_eq!(
                device.call(request, vcpu),
                Err(Errno(libc::ENOENT)),
                "{request:#x} {vcpu:#x}"
            );
        }
        assert_eq!(device.run(vcpu).unwrap_err(), Errno(libc::ENOENT), "RUN {vcpu:#x}");
    }

    // A vCPU is its owner's.
    let mut guest = RawGuest::new(HEALTHY);
    let (fd, vcpu) = (guest.device.fd, guest.vcpu);
    std::thread::spawn(move || {
        let other = std::mem::ManuallyDrop::new(Device { fd });
        assert_eq!(
            other.run(vcpu).unwrap_err(),
            Errno(libc::EPERM),
            "RUN by another thread"
        );
        for request in [dune_abi::DUNE_DESTROY_VCPU, dune_abi::DUNE_SYNC] {
            assert_eq!(
                other.call(request, vcpu),
                Err(Errno(libc::EPERM)),
                "{request:#x} by another thread"
            );
        }
    })
    .join()
    .unwrap();

    // After fork the space is the parent's; the child may make its own from the fd, and nothing else.
    spawn(|| refused_to_others(&std::mem::ManuallyDrop::new(Device { fd }), vcpu))
        .wait()
        .assert_success();

    assert_eq!(guest.run(), Ended::Call(0x1234), "the guest is as it was");
    let vcpu = guest.vcpu;
    assert_eq!(guest.device.call(dune_abi::DUNE_DESTROY_VCPU, vcpu), Ok(0));
    assert_eq!(
        guest.device.run(vcpu).unwrap_err(),
        Errno(libc::ENOENT),
        "RUN of a destroyed vCPU"
    );
}

/// What another process may do with a file of ours: make a space of its own from it, and nothing else.
fn refused_to_others(other: &Device, vcpu: usize) {
    assert_eq!(other.run(vcpu).unwrap_err(), Errno(libc::EXDEV), "RUN");
    assert_eq!(
        map(other.fd, PAGE, (vcpu * PAGE) as i64, READ_WRITE, libc::MAP_SHARED),
        Err(libc::EXDEV),
        "the run page"
    );
    for request in [dune_abi::DUNE_DESTROY_VCPU, dune_abi::DUNE_SYNC] {
        assert_eq!(other.call(request, vcpu), Err(Errno(libc::EXDEV)), "{request:#x}");
    }
    assert_eq!(other.create_vcpu().unwrap_err(), Errno(libc::EXDEV));
    assert_eq!(other.map_slot(0).unwrap_err(), Errno(libc::EXDEV));
    let own = other.call(dune_abi::DUNE_NEW_SPACE, 0).expect("a space of its own");
    let own = Device { fd: own };
    assert_eq!(own.info().unwrap().vcpus, 0);
    own.create_vcpu().unwrap();
}

/// A file that a process got from another one, whose child it is not since the file is there (as over a socket).
fn fd_of_another_process_is_refused() {
    let shared = Shared::new();
    let owner = std::process::id();
    let stranger = spawn(|| {
        while shared.word(0).load(SeqCst) == 0 {
            std::thread::yield_now();
        }
        // SAFETY: makes new files.
        let fd = unsafe {
            let process = libc::syscall(libc::SYS_pidfd_open, owner, 0);
            assert!(process >= 0, "pidfd_open: {}", std::io::Error::last_os_error());
            libc::syscall(libc::SYS_pidfd_getfd, process, shared.word(0).load(SeqCst) - 1, 0)
        };
        assert!(fd >= 0, "pidfd_getfd: {}", std::io::Error::last_os_error());
        let other = Device { fd: fd as i32 };
        refused_to_others(&other, shared.word(1).load(SeqCst) as usize);
    });
    // Where Yama has a word in it, only those that a process names may take its files.
    // SAFETY: an option of this process; without Yama it is none, which does no harm.
    unsafe { libc::prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY) };
    let mut guest = RawGuest::new(HEALTHY);
    shared.word(1).store(guest.vcpu as u64, SeqCst);
    shared.word(0).store(guest.device.fd as u64 + 1, SeqCst);
    stranger.wait().assert_success();
    assert_eq!(guest.run(), Ended::Call(0x1234), "the guest is as it was");
}

/// The errno of mapping the device, which is undone.
fn map(fd: i32, bytes: usize, offset: i64, protection: i32, flags: i32) -> Result<(), i32> {
    // SAFETY: a new mapping; nothing of ours is replaced.
    let address = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, fd, offset) };
    if address == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error().raw_os_error().unwrap());
    }
    // SAFETY: just mapped.
    unsafe { libc::munmap(address, bytes) };
    Ok(())
}

const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Maps of the device that are none of a vCPU's run page, each by the errno of docs/abi.md.
pub fn bad_maps_are_refused() {
    let guest = RawGuest::new(HEALTHY);
    let fd = guest.device.fd;
    let shared = |bytes, offset| map(fd, bytes, offset, READ_WRITE, libc::MAP_SHARED);
    assert_eq!(shared(PAGE, 0), Ok(()));
    assert_eq!(shared(2 * PAGE, 0), Err(libc::EINVAL), "longer than the run page");
    assert_eq!(shared(PAGE, PAGE as i64), Err(libc::ENOENT), "no such vCPU");
    assert_eq!(shared(PAGE, 1 << 40), Err(libc::ENOENT), "far behind all vCPUs");
    assert_eq!(
        map(fd, PAGE, 0, READ_WRITE, libc::MAP_PRIVATE),
        Err(libc::EINVAL),
        "a private copy"
    );
    std::thread::scope(|scope| {
        let other = scope.spawn(|| shared(PAGE, 0)).join().unwrap();
        assert_eq!(other, Err(libc::EPERM), "another thread's");
    });
}

/// `max_vcpus`: one more than a space may have is refused, and a freed one can be had again.
pub fn out_of_vcpus() {
    let device = Device::open().unwrap();
    let most = device.info().unwrap().max_vcpus;
    assert!(most > 0);
    let mut numbers = Vec::new();
    for _ in 0..most {
        numbers.push(device.create_vcpu().unwrap().vcpu);
    }
    numbers.sort();
    numbers.dedup();
    assert_eq!(numbers.len(), most as usize, "each has a number of its own");
    assert_eq!(device.create_vcpu().unwrap_err(), Errno(libc::ENOSPC));
    assert_eq!(device.info().unwrap().vcpus, most);
    device.call(dune_abi::DUNE_DESTROY_VCPU, numbers[0] as usize).unwrap();
    device.create_vcpu().unwrap();
    assert_eq!(device.create_vcpu().unwrap_err(), Errno(libc::ENOSPC));
}

/// Slots run out with ENOSPC after exactly as many as the space has; those given stay good.
pub fn out_of_slots() {
    let device = Device::open().unwrap();
    let info = device.info().unwrap();
    let all = info.slots_free;
    // The module caps its table at 2^14 slots.
    assert_eq!(all, (1u32 << (info.gpa_bits - 30).min(14)) - 1);
    let mut gpas = std::collections::HashSet::new();
    for gib in 0..u64::from(all) {
        let gpa = device.map_slot(gib << 30 | 0x123).unwrap();
        assert_eq!(gpa % dune_abi::SLOT_BYTES, 0, "the GPA of the GiB's first byte");
        assert!(gpa >= dune_abi::SLOT_BYTES, "slot 0 was handed out");
        assert!(gpa < 1 << info.gpa_bits);
        assert!(gpas.insert(gpa), "{gpa:#x} twice");
    }
    assert_eq!(device.map_slot(u64::from(all) << 30), Err(Errno(libc::ENOSPC)));
    assert_eq!(device.info().unwrap().slots_free, 0);
    let first = device.map_slot(0).unwrap();
    assert!(gpas.contains(&first), "a slot that is there is answered again");
}

/// The fault injection of this task: the n-th of its allocations fails.
struct FailNth(std::fs::File);

impl FailNth {
    fn new() -> Self {
        Self::spare_none();
        Self::of_this_thread()
    }

    fn spare_none() {
        // Allocations that may sleep, and single pages, are spared unless told otherwise.
        for (file, value) in [
            ("failslab/ignore-gfp-wait", "0"),
            ("fail_page_alloc/ignore-gfp-wait", "0"),
            ("fail_page_alloc/ignore-gfp-highmem", "0"),
            ("fail_page_alloc/min-order", "0"),
        ] {
            let path = format!("/sys/kernel/debug/{file}");
            std::fs::write(&path, value).unwrap_or_else(|error| panic!("{path}: {error}"));
        }
    }

    fn of_this_thread() -> Self {
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/proc/thread-self/fail-nth");
        Self(file.unwrap())
    }

    fn set(&self, nth: u32) {
        self.try_set(nth).expect("fail-nth");
    }

    fn try_set(&self, nth: u32) -> std::io::Result<()> {
        use std::os::unix::fs::FileExt;
        // Formatted by hand: an allocation of ours must not be the one that fails.
        let mut text = [0u8; 10];
        let mut at = text.len();
        let mut rest = nth;
        loop {
            at -= 1;
            text[at] = b'0' + (rest % 10) as u8;
            rest /= 10;
            if rest == 0 {
                break;
            }
        }
        self.0.write_all_at(&text[at..], 0)
    }

    /// Whether the failure did not come yet; from here on it does not come at all.
    fn clear(&self) -> bool {
        use std::os::unix::fs::FileExt;
        let mut text = [0u8; 16];
        let pending = match self.0.read_at(&mut text, 0) {
            Ok(read) => text[..read].trim_ascii() != b"0",
            // It hit this very read.
            Err(_) => true,
        };
        // It may hit this very write, whose text is copied in too; then it is spent, and the second one works.
        if self.try_set(0).is_err() {
            self.set(0);
        }
        pending
    }
}

/// `rcx` pages from `rdi` on are written, then comes a VMCALL.
const WRITE_PAGES: &[u8] = &[
    0xc6, 0x07, 0x01, // mov byte [rdi], 1
    0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add rdi, 4096
    0x48, 0xff, 0xc9, // dec rcx
    0x75, 0xf1, // jnz
    0xb8, 0x34, 0x12, 0, 0, 0x0f, 0x01, 0xc1,
];

/// From the first allocation to the last, over making a guest and over its first RUN with 100 page faults: each may fail,
/// and then the answer is ENOMEM (or EFAULT: copies from and to user space fail in their turn) or none at all, and the
/// same once more goes well.
fn every_allocation_may_fail() {
    let fail = FailNth::new();
    let mut refused = 0;
    let mut nth = 0;
    loop {
        nth += 1;
        fail.set(nth);
        let guest = RawGuest::try_new(HEALTHY);
        let all_done = fail.clear();
        match guest {
            Ok(mut guest) => assert_eq!(guest.run(), Ended::Call(0x1234), "allocation {nth}"),
            Err(errno) => {
                assert!(
                    matches!(errno.0, libc::ENOMEM | libc::EFAULT),
                    "allocation {nth}: {errno:?}"
                );
                refused += 1;
            }
        }
        assert_healthy(&mut RawGuest::new(HEALTHY));
        if all_done {
            break;
        }
    }
    println!("making a guest: {} allocations, {refused} of them reported", nth - 1);
    assert!(refused >= 5, "nothing was tested");

    const PAGES: usize = 100;
    refused = 0;
    nth = 0;
    loop {
        nth += 1;
        let mut guest = RawGuest::new(WRITE_PAGES);
        let memory = guest.memory_beside(PAGES * 4096);
        // Small pages, a fault for each.
        memory.advise(0, memory.bytes, libc::MADV_NOHUGEPAGE);
        guest.edit(|page| {
            page.gprs.rdi = memory.address() as u64;
            page.gprs.rcx = PAGES as u64;
        });
        fail.set(nth);
        let mut ended = guest.try_run();
        let all_done = fail.clear();
        if let Err(errno) = ended {
            assert!(
                matches!(errno.0, libc::ENOMEM | libc::EFAULT),
                "allocation {nth}: {errno:?}"
            );
            refused += 1;
            ended = guest.try_run();
        }
        assert_eq!(ended, Ok(Ended::Call(0x1234)), "allocation {nth}");
        assert!(
            (0..PAGES).all(|page| memory.read(page * 4096) & 0xff == 1),
            "allocation {nth}"
        );
        if all_done {
            break;
        }
    }
    println!(
        "{PAGES} page faults: {} allocations, {refused} of them reported",
        nth - 1
    );
    assert!(nth > 50, "nothing was tested");
}

/// Runs `body` in child after child, with another allocation failing each time, until it says that none did. How many there are.
fn each_allocation(what: &str, body: impl Fn(&FailNth, u32) -> bool) -> u32 {
    /// The exit status of a child in which the failure did not come.
    const ALL_DONE: i32 = 3;
    FailNth::spare_none();
    for nth in 1..2000 {
        let child = spawn(|| {
            if body(&FailNth::of_this_thread(), nth) {
                // SAFETY: ends the child.
                unsafe { libc::_exit(ALL_DONE) };
            }
        });
        let ended = child.wait();
        if ended.status == ALL_DONE << 8 {
            println!("{what}: {} allocations", nth - 1);
            return nth - 1;
        }
        assert!(ended.status == 0, "{what}, allocation {nth}: {ended:#x?}");
    }
    panic!("{what}: no end of allocations");
}

/// Each call for which docs/abi.md has ENOMEM, alone: it gives it, or EFAULT where a copy from or to user space failed instead,
/// and the same once more goes well.
fn each_call_may_find_no_memory() {
    type Attempt = Box<dyn FnMut() -> Result<(), Errno>>;
    // Made in a child each time, up to the call itself.
    type Make = fn(&Device) -> Attempt;
    let calls: [(&str, Make); 5] = [
        ("open", |_| Box::new(|| Device::open_as(libc::O_RDWR).map(drop))),
        // Of the file that the child inherits.
        ("DUNE_NEW_SPACE", |inherited| {
            let inherited = Device { fd: inherited.fd };
            Box::new(move || inherited.call(dune_abi::DUNE_NEW_SPACE, 0).map(drop))
        }),
        ("DUNE_CREATE_VCPU", |_| {
            let device = Device::open().unwrap();
            Box::new(move || device.create_vcpu().map(drop))
        }),
        // The table of a new space has room for 64.
        ("DUNE_MAP_SLOT", |_| {
            let device = Device::open().unwrap();
            let map = move |gibs: std::ops::Range<u64>| {
                gibs.into_iter()
                    .try_for_each(|gib| device.map_slot(gib * GIB as u64).map(drop))
            };
            map(5000..5060).unwrap();
            Box::new(move || map(5060..5066))
        }),
        ("DUNE_RUN", |_| {
            let mut guest = RawGuest::new(WRITE_PAGES);
            let memory = guest.memory_beside(4096);
            guest.edit(|page| {
                page.gprs.rdi = memory.address() as u64;
                page.gprs.rcx = 1;
            });
            Box::new(move || {
                let ended = guest.try_run()?;
                assert_eq!((ended, memory.read(0) & 0xff), (Ended::Call(0x1234), 1));
                Ok(())
            })
        }),
    ];
    let inherited = Device::open().unwrap();
    for (name, make) in calls {
        let refused = Shared::new();
        each_allocation(name, |fail, nth| {
            let mut attempt = make(&inherited);
            fail.set(nth);
            let answer = attempt();
            let all_done = fail.clear();
            match answer {
                Ok(()) => {}
                Err(Errno(errno @ (libc::ENOMEM | libc::EFAULT))) => {
                    refused.word(usize::from(errno == libc::EFAULT)).fetch_add(1, SeqCst);
                    attempt().unwrap_or_else(|errno| panic!("{name} again: {errno:?}"));
                }
                Err(errno) => panic!("{name}, allocation {nth}: {errno:?}"),
            }
            all_done
        });
        let [no_memory, no_copy] = [0, 1].map(|word| refused.word(word).load(SeqCst));
        println!("{name}: {no_memory} times ENOMEM, {no_copy} times EFAULT");
        assert!(no_memory > 0, "{name} never found no memory");
    }
}

/// The same for `Dune::enter`: it says that memory ran out, and goes well the next time.
fn every_allocation_of_enter_may_fail() {
    let refused = Shared::new();
    let entering = each_allocation("entering", |fail, nth| {
        fail.set(nth);
        let entered = Dune::enter();
        let all_done = fail.clear();
        match entered {
            Ok(dune) => dune.leave(),
            Err(
                Error::OutOfMemory { .. }
                | Error::Paging(
                    PagingError::OutOfMemory(_)
                    | PagingError::MapSlot {
                        errno: libc::ENOMEM | libc::EFAULT,
                        ..
                    },
                )
                | Error::System {
                    errno: libc::EFAULT, ..
                },
            ) => {
                refused.word(0).fetch_add(1, SeqCst);
                enter().leave();
            }
            Err(error) => panic!("allocation {nth}: {error}"),
        }
        all_done
    });
    println!("{} times refused", refused.word(0).load(SeqCst));
    assert!(entering > 50 && refused.word(0).load(SeqCst) > 10, "nothing was tested");
}

/// Once inside, the program sees nothing of it: Linux makes an access again that found no memory. In a GiB of which nothing was
/// used: it needs a slot, too.
fn every_allocation_inside_may_fail() {
    const PAGES: usize = 20;
    let inside = each_allocation("page faults", |fail, nth| {
        let memory = Map::at(5000 * GIB, PAGES * PAGE, READ_WRITE, 0);
        let dune = enter();
        memory.advise(0, memory.bytes, libc::MADV_NOHUGEPAGE);
        fail.set(nth);
        for page in 0..PAGES {
            memory.write(page * PAGE, 1);
        }
        let all_done = fail.clear();
        assert!((0..PAGES).all(|page| memory.read(page * PAGE) == 1), "allocation {nth}");
        dune.leave();
        all_done
    });
    assert!(inside > PAGES as u32, "nothing was tested");
}
