// SPDX-License-Identifier: MIT OR Apache-2.0

//! Fuzzer of guest state: registers, control registers, segments, descriptor tables, page tables, events, and
//! instructions at CPL0 and CPL3, most of them those that a guest must not have.
//!
//! A case starts from a state that enters, spoils none, one or a few things that a VM entry checks, and runs some
//! instructions. The guest has a GiB of its own, so nothing that it writes is this program's.

use std::arch::asm;
use std::sync::atomic::Ordering::Relaxed;

use dune_abi::RunPage;
use dune_abi::Segment;

use crate::framework::Suite;
use crate::framework::Test;
use crate::fuzz;
use crate::fuzz::Random;
use crate::fuzz::Tally;
use crate::helpers;
use crate::raw::Errno;
use crate::raw::RawGuest;
use crate::raw::KERNEL_CS;
use crate::raw::RFLAGS_IOPL3;
use crate::raw::TABLE_PAGES;
use crate::raw::TRAP;
use crate::raw::UNUSABLE;

pub const TESTS: &[Test] = &[
    Test::asserting("fuzz_guest", || fuzz_guest(SHORT)).timeout_s(120),
    Test::asserting("fuzz_guest_100000", || fuzz_guest(100_000))
        .suite(Suite::Long)
        .timeout_s(3600),
];

/// About 20 s of emulated time.
const SHORT: u64 = 4000;

/// Microseconds between signals; the second one ends a case.
const TICK_US: i64 = 3000;

type Spoil = fn(&mut RunPage, &mut Random);

/// What a VM entry checks of the state that user space may choose (SDM, "Checking and Loading Guest State" and "Checks on
/// VM-Entry Control Fields"), by name; each spoils it so that this check fails, or may.
const CHECKS: &[(&str, Spoil)] = &[
    ("CR0 fixed bits", |page, random| {
        page.sregs.cr0 ^= *random.pick(&[1, 1 << 5, 1 << 31])
    }),
    ("CR0 reserved bits", |page, random| {
        page.sregs.cr0 |= 1 << (32 + random.below(32))
    }),
    ("CR4 fixed bits with IA-32e mode", |page, _| page.sregs.cr4 &= !(1 << 5)),
    ("CR3 reserved bits", |page, random| {
        page.sregs.cr3 |= 1 << (52 + random.below(11))
    }),
    ("EFER reserved bits", |page, random| {
        page.sregs.efer ^= 1 << *random.pick(&[1u64, 2, 7, 9, 16, 40, 63])
    }),
    ("EFER.LMA and IA-32e mode", |page, _| page.sregs.efer &= !(1 << 10)),
    ("EFER.LME and CR0.PG", |page, _| page.sregs.efer &= !(1 << 8)),
    ("RFLAGS reserved bits", |page, random| {
        page.rflags ^= 1 << *random.pick(&[1u64, 3, 5, 15, 22, 31, 32, 63])
    }),
    ("RFLAGS.VM with IA-32e mode", |page, _| page.rflags |= 1 << 17),
    ("CS type", |page, random| {
        set_rights(&mut page.sregs.cs, 0xf, *random.pick(&[0, 1, 2, 4, 8, 10, 12]))
    }),
    ("CS S", |page, _| page.sregs.cs.access_rights &= !(1 << 4)),
    ("CS DPL", |page, _| page.sregs.cs.access_rights ^= 1 << 5),
    ("CS present", |page, _| page.sregs.cs.access_rights &= !(1 << 7)),
    ("CS D and L", |page, _| page.sregs.cs.access_rights |= 1 << 14),
    ("CS reserved rights", |page, random| {
        page.sregs.cs.access_rights |= 1 << *random.pick(&[8u64, 9, 10, 11, 17, 31])
    }),
    ("CS granularity", |page, _| page.sregs.cs.limit &= !1),
    ("CS base", |page, random| {
        page.sregs.cs.base = 1 << (32 + random.below(32))
    }),
    ("SS type", |page, random| {
        set_rights(&mut page.sregs.ss, 0xf, *random.pick(&[0, 1, 2, 5, 9, 11]))
    }),
    ("SS S", |page, _| page.sregs.ss.access_rights &= !(1 << 4)),
    ("SS DPL", |page, _| page.sregs.ss.access_rights ^= 3 << 5),
    ("SS present", |page, _| page.sregs.ss.access_rights &= !(1 << 7)),
    ("SS reserved rights", |page, random| {
        page.sregs.ss.access_rights |= 1 << *random.pick(&[8u64, 9, 10, 11, 17, 31])
    }),
    ("SS granularity", |page, _| page.sregs.ss.limit &= !1),
    ("SS base", |page, random| {
        page.sregs.ss.base = 1 << (32 + random.below(32))
    }),
    ("DS type", |page, random| {
        data(&mut page.sregs.ds, *random.pick(&[0x90, 0x92, 0x98, 0x99]))
    }),
    ("DS S", |page, _| data(&mut page.sregs.ds, 0x83)),
    ("ES present", |page, _| data(&mut page.sregs.es, 0x13)),
    ("ES DPL and RPL", |page, _| {
        data(&mut page.sregs.es, 0x93);
        page.sregs.es.selector = 3;
    }),
    ("ES base", |page, random| {
        data(&mut page.sregs.es, 0xf3);
        page.sregs.es.base = 1 << (32 + random.below(32));
    }),
    ("FS reserved rights", |page, random| {
        data(&mut page.sregs.fs, 0xf3 | 1 << (8 + random.below(4)))
    }),
    ("FS base canonical", |page, _| page.sregs.fs.base = 1 << 63),
    ("GS base canonical", |page, _| page.sregs.gs.base = 1 << 47),
    ("GS granularity", |page, _| {
        data(&mut page.sregs.gs, 0x80f3);
        page.sregs.gs.limit = 0x1000;
    }),
    ("LDTR type", |page, random| {
        system(&mut page.sregs.ldtr, *random.pick(&[0x80, 0x81, 0x83, 0x89, 0x8b]))
    }),
    ("LDTR S", |page, _| system(&mut page.sregs.ldtr, 0x92)),
    ("LDTR present", |page, _| system(&mut page.sregs.ldtr, 0x02)),
    ("LDTR in the LDT", |page, _| {
        system(&mut page.sregs.ldtr, 0x82);
        page.sregs.ldtr.selector = 4;
    }),
    ("LDTR base canonical", |page, _| {
        system(&mut page.sregs.ldtr, 0x82);
        page.sregs.ldtr.base = 1 << 63;
    }),
    ("LDTR reserved rights", |page, random| {
        system(&mut page.sregs.ldtr, 0x82 | 1 << (8 + random.below(4)))
    }),
    ("LDTR granularity", |page, _| {
        system(&mut page.sregs.ldtr, 0x8082);
        page.sregs.ldtr.limit = 0x1000;
    }),
    ("TR type", |page, random| {
        set_rights(&mut page.sregs.tr, 0xf, *random.pick(&[0, 1, 2, 3, 9, 12, 15]))
    }),
    ("TR S", |page, _| page.sregs.tr.access_rights |= 1 << 4),
    ("TR present", |page, _| page.sregs.tr.access_rights &= !(1 << 7)),
    ("TR usable", |page, _| page.sregs.tr.access_rights |= UNUSABLE),
    ("TR in the LDT", |page, _| page.sregs.tr.selector |= 4),
    ("TR base canonical", |page, random| {
        page.sregs.tr.base = *random.pick(&[1 << 47, 1 << 63])
    }),
    ("TR reserved rights", |page, random| {
        page.sregs.tr.access_rights |= 1 << *random.pick(&[8u64, 11, 17, 31])
    }),
    ("TR granularity", |page, _| {
        page.sregs.tr.access_rights |= 1 << 15;
        page.sregs.tr.limit = 0x67;
    }),
    ("GDTR base canonical", |page, _| page.sregs.gdtr_base = 1 << 63),
    ("GDTR limit", |page, random| {
        page.sregs.gdtr_limit = 1 << (16 + random.below(16))
    }),
    ("IDTR base canonical", |page, _| page.sregs.idtr_base = 1 << 47),
    ("IDTR limit", |page, random| {
        page.sregs.idtr_limit = 1 << (16 + random.below(16))
    }),
    ("RIP canonical", |page, _| page.rip = 1 << 63),
    ("RIP of 32 bits without CS.L", |page, _| {
        page.sregs.cs.access_rights &= !(1 << 13);
        page.rip |= 1 << 40;
    }),
    ("length of an injecting instruction", |page, random| {
        page.event = dune_abi::Event {
            info: *random.pick(&[0x8000_0480, 0x8000_0603, 0x8000_0501]),
            instruction_len: *random.pick(&[16, 31, u32::MAX]),
            ..Default::default()
        };
        page.dirty |= dune_abi::DIRTY_EVENT;
    }),
    ("reserved bits of an error code", |page, random| {
        page.event = dune_abi::Event {
            info: 0x8000_0b0e,
            error_code: 1 << (16 + random.below(16)),
            ..Default::default()
        };
        page.dirty |= dune_abi::DIRTY_EVENT;
    }),
];

fn set_rights(segment: &mut Segment, mask: u32, to: u32) {
    segment.access_rights = segment.access_rights & !mask | to;
}

fn data(segment: &mut Segment, rights: u32) {
    *segment = Segment {
        limit: 0xf_ffff,
        access_rights: rights,
        ..Segment::default()
    };
}

fn system(segment: &mut Segment, rights: u32) {
    *segment = Segment {
        limit: 0xfff,
        access_rights: rights,
        ..Segment::default()
    };
}

/// Instructions by their bytes. RDI, RSI, RAX, RCX, RDX hold what [`fill_registers`] put there.
#[rustfmt::skip]
const INSTRUCTIONS: &[&[u8]] = &[
    // Ports, control and debug registers.
    &[0xec], &[0xef], &[0xe6, 0x80], &[0x6c], &[0xf3, 0x6f],
    &[0x0f, 0x22, 0xc0], &[0x0f, 0x22, 0xd0], &[0x0f, 0x22, 0xd8], &[0x0f, 0x22, 0xe0], &[0x44, 0x0f, 0x22, 0xc0],
    &[0x0f, 0x20, 0xc0], &[0x0f, 0x20, 0xd8], &[0x0f, 0x20, 0xe0], &[0x44, 0x0f, 0x20, 0xc0],
    &[0x0f, 0x06], &[0x0f, 0x01, 0xf0], &[0x0f, 0x01, 0xe0],
    &[0x0f, 0x23, 0xc0], &[0x0f, 0x23, 0xf0], &[0x0f, 0x23, 0xf8], &[0x0f, 0x21, 0xf8],
    // MSRs, counters, extended state.
    &[0x0f, 0x30], &[0x0f, 0x32], &[0xb9, 0x82, 0, 0, 0xc0, 0x0f, 0x30], &[0xb9, 0x02, 0x01, 0, 0xc0, 0x0f, 0x30],
    &[0xb9, 0x00, 0x01, 0, 0xc0, 0x0f, 0x30], &[0xb9, 0xa0, 0x0d, 0, 0, 0x0f, 0x30], &[0xb9, 0x08, 0x08, 0, 0, 0x0f, 0x30],
    &[0x0f, 0x33], &[0x0f, 0x31], &[0x0f, 0x01, 0xf9], &[0x0f, 0x01, 0xd0], &[0x0f, 0x01, 0xd1],
    &[0x48, 0x0f, 0xc7, 0x2f], &[0x48, 0x0f, 0xc7, 0x1f], &[0x48, 0x0f, 0xae, 0x2f], &[0x48, 0x0f, 0xae, 0x27],
    &[0x0f, 0xae, 0x17], &[0x0f, 0x77], &[0xdb, 0xe3], &[0xd9, 0xc0],
    // VMX, SMX, SGX, and what else reaches beyond a guest.
    &[0xf3, 0x0f, 0xc7, 0x37], &[0x0f, 0x01, 0xc1], &[0x0f, 0x01, 0xc2], &[0x0f, 0x01, 0xc3], &[0x0f, 0x01, 0xc4],
    &[0x0f, 0xc7, 0x37], &[0x0f, 0xc7, 0x3f], &[0x66, 0x0f, 0xc7, 0x37], &[0x0f, 0x78, 0xc0], &[0x0f, 0x79, 0xc0],
    &[0x66, 0x0f, 0x38, 0x80, 0x07], &[0x66, 0x0f, 0x38, 0x81, 0x07], &[0x66, 0x0f, 0x38, 0x82, 0x07], &[0x0f, 0x01, 0xd4],
    &[0x0f, 0x37], &[0x0f, 0xaa], &[0x0f, 0x01, 0xcf], &[0x0f, 0x01, 0xc0], &[0x0f, 0x01, 0xd7], &[0x0f, 0x01, 0xc5],
    &[0x0f, 0x01, 0xc8], &[0x0f, 0x01, 0xc9], &[0xf3, 0x0f, 0xae, 0xf7], &[0xf2, 0x0f, 0xae, 0xf0], &[0x66, 0x0f, 0xae, 0xf0],
    &[0xf2, 0x0f, 0x38, 0xf8, 0x07], &[0xf3, 0x0f, 0x38, 0xf8, 0x07], &[0x66, 0x0f, 0x01, 0xcf], &[0x0f, 0x01, 0xef],
    // Caches, halting, identity.
    &[0x0f, 0x08], &[0x0f, 0x09], &[0xf4], &[0x0f, 0xa2], &[0xf3, 0x90], &[0x0f, 0x01, 0x3f], &[0x0f, 0xae, 0x3f],
    // Flags, interrupts, exceptions.
    &[0xfb], &[0x9c], &[0x9c, 0x81, 0x0c, 0x24, 0, 1, 4, 0, 0x9d],
    &[0xcc], &[0xf1], &[0xcd, 0x01], &[0xcd, 0x02], &[0xcd, 0x08], &[0xcd, 0x0e], &[0xcd, 0x12], &[0xcd, 0x80], &[0xcd, 0xff],
    &[0x0f, 0x0b], &[0x31, 0xc9, 0xf7, 0xf1], &[0x0f, 0x34], &[0x0f, 0x35],
    // Segments and tables.
    &[0x8e, 0xd0], &[0x8e, 0xd8], &[0x8e, 0xe0], &[0x8e, 0xe8], &[0x0f, 0x01, 0xf8],
    &[0x0f, 0x01, 0x17], &[0x0f, 0x01, 0x1f], &[0x0f, 0x01, 0x07], &[0x0f, 0x01, 0x0f],
    &[0x0f, 0x00, 0xd0], &[0x0f, 0x00, 0xd8], &[0x0f, 0x00, 0xc0], &[0x0f, 0x00, 0xc8], &[0x48, 0xff, 0x2f], &[0x48, 0xcb],
    &[0xf3, 0x48, 0x0f, 0xae, 0xd7], &[0xf3, 0x48, 0x0f, 0xae, 0xdf], &[0x0f, 0x00, 0x1f],
    // Memory and control flow.
    &[0x48, 0x89, 0x07], &[0x48, 0x8b, 0x07], &[0x8b, 0x47, 0x01], &[0x48, 0x87, 0x07], &[0xf0, 0x48, 0x0f, 0xc1, 0x07],
    &[0xf3, 0xaa], &[0xf3, 0x48, 0xa5], &[0x50], &[0x58], &[0xff, 0xe0], &[0xff, 0xd7], &[0xeb, 0xfe], &[0x48, 0x89, 0xc4],
    &[0xc7, 0xf8, 0, 0, 0, 0], &[0x0f, 0x01, 0xca], &[0x0f, 0x01, 0xcb], &[0x0f, 0xc7, 0xf0], &[0x90],
];

/// What may clear IF. Bochs 2.7 masks interrupts in a guest that a VM entry finds with IF = 0, against the SDM ("External-
/// interrupt exiting"): a guest that then computes for ever takes the emulated machine with it. So not there.
const CLEAR_IF: &[&[u8]] = &[
    &[0xfa],
    &[0x9d],
    &[0x50, 0x9d],
    &[0x48, 0xcf],
    &[0xcf],
    &[0x0f, 0x05],
    &[0x48, 0x0f, 0x07],
];

/// Random bytes may be any of those, so they are left out where IF matters.
fn interrupts_may_be_off() -> bool {
    !helpers::is_emulated()
}

/// IF.
const IF: u64 = 1 << 9;

/// Words of the tally.
mod word {
    pub const CASES: usize = 0;
    pub const ENTERED: usize = 1;
    pub const CALLS: usize = 2;
    pub const TIMEOUTS: usize = 3;
    pub const EINVAL: usize = 4;
    pub const USER: usize = 5;
    /// By `EXIT_*`.
    pub const KINDS: usize = 8;
    /// By vector of the trap stub.
    pub const TRAPS: usize = 20;
    /// By check: failed alone.
    pub const CHECKS: usize = 60;
    /// By basic exit reason.
    pub const EXITS: usize = 200;
    /// By VM-instruction error.
    pub const ERRORS: usize = 300;
}

fn fuzz_guest(cases: u64) {
    let shared = fuzz::run(cases, batch);
    let at = |index: usize| shared.word(index).load(Relaxed);
    let histogram = |first: usize, count: usize| {
        let each = (0..count).filter(|i| at(first + i) != 0);
        each.map(|i| format!("{i}: {}", at(first + i)))
            .collect::<Vec<_>>()
            .join(", ")
    };
    let (cases, entered) = (at(word::CASES), at(word::ENTERED));
    println!(
        "report: {entered} of {cases} states entered, {} at CPL3",
        at(word::USER)
    );
    println!(
        "report: {} calls, {} ended by the clock, {} EINVAL",
        at(word::CALLS),
        at(word::TIMEOUTS),
        at(word::EINVAL)
    );
    println!("report: RUN's kinds: {}", histogram(word::KINDS, 12));
    println!("report: exceptions seen by the guest: {}", histogram(word::TRAPS, 32));
    println!(
        "report: exit reasons: {}",
        histogram(word::EXITS, dune_abi::EXIT_REASONS)
    );
    println!("report: VM-instruction errors: {}", histogram(word::ERRORS, 40));
    let (failed, never): (Vec<_>, Vec<_>) = (0..CHECKS.len()).partition(|i| at(word::CHECKS + i) != 0);
    println!(
        "report: {} of {} checks of a VM entry failed",
        failed.len(),
        CHECKS.len()
    );
    for index in &never {
        println!("report: never failed: {}", CHECKS[*index].0);
    }
    if cases >= SHORT {
        assert!(
            failed.len() * 10 >= CHECKS.len() * 9,
            "{} of {} checks",
            failed.len(),
            CHECKS.len()
        );
        assert!(entered * 10 >= cases * 3, "{entered} of {cases} states entered");
        for reason in [0, 2, 10, 12, 18, 28, 29, 30, 31, 32, 33, 48] {
            assert_ne!(at(word::EXITS + reason), 0, "exit reason {reason} was never seen");
        }
    }
}

fn batch(random: &mut Random, tally: &Tally<'_>, cases: u64) {
    // Before the clock: a signal interrupts making a space.
    let mut guest = RawGuest::alone(&[]);
    let interrupts_may_be_off = interrupts_may_be_off();
    if !interrupts_may_be_off {
        // Trap gates: IF stays as it is.
        (0..=255).for_each(|vector| guest.set_gate(vector, KERNEL_CS, 0xef));
    }
    let tables = guest.tables();
    // SAFETY: a timer that raises SIGALRM, and a handler that does nothing.
    unsafe {
        extern "C" fn nothing(_: i32) {}
        libc::signal(libc::SIGALRM, nothing as extern "C" fn(i32) as libc::sighandler_t);
        let every = libc::timeval {
            tv_sec: 0,
            tv_usec: TICK_US,
        };
        let timer = libc::itimerval {
            it_interval: every,
            it_value: every,
        };
        libc::setitimer(libc::ITIMER_REAL, &timer, std::ptr::null_mut());
    }
    for _ in 0..cases {
        let before = guest.run_page().counters;
        // Numbers of its own, so that what came before does not matter to it.
        case(
            &mut Random::new(random.next()),
            tally,
            &mut guest,
            interrupts_may_be_off,
        );
        let after = guest.run_page().counters;
        tally.add(word::CASES, 1);
        tally.add(word::ENTERED, u64::from(after.entries != before.entries));
        for reason in 0..dune_abi::EXIT_REASONS {
            tally.add(word::EXITS + reason, after.exits[reason] - before.exits[reason]);
        }
        guest.restore_tables(&tables);
    }
}

fn case(random: &mut Random, tally: &Tally<'_>, guest: &mut RawGuest, interrupts_may_be_off: bool) {
    guest.set_code(&code(random, interrupts_may_be_off));
    let user = random.percent(40);
    if user {
        tally.add(word::USER, 1);
        guest.reset_user(if random.percent(50) { 2 } else { RFLAGS_IOPL3 });
    } else {
        guest.reset();
    }
    let data = if user { guest.user(guest.data()) } else { guest.data() };
    let places = [
        data,
        data + 1,
        data + 0xffe,
        guest.code(),
        guest.user(guest.code()),
        guest.hva(0),
        guest.gpa(guest.hva(0)),
    ];
    guest.edit(|page| fill_registers(page, random, &places));

    if random.percent(25) {
        // Not the IDT and the stubs where their flags matter.
        let pages = if interrupts_may_be_off {
            TABLE_PAGES
        } else {
            TABLE_PAGES - 2
        };
        for _ in 0..=random.below(4) {
            let page = random.below(pages as u64) as usize;
            // Most words of a table are never used: aim at the first ones as well.
            let index = if random.percent(50) {
                random.below(32)
            } else {
                random.below(512)
            };
            guest.flip_table_bit(page, index as usize, random.below(64) as u32);
        }
    }
    let odd = random.percent(10);
    if odd {
        guest.edit(|page| legal_but_odd(page, random));
    }
    let spoiled = if random.percent(45) {
        1 + random.below(3).saturating_sub(1)
    } else {
        0
    };
    let mut check = None;
    for _ in 0..spoiled {
        let index = random.below(CHECKS.len() as u64) as usize;
        guest.edit(|page| CHECKS[index].1(page, random));
        check = Some(index);
    }
    if spoiled == 0 && random.percent(10) {
        guest.edit(|page| {
            page.event = dune_abi::Event {
                info: 1 << 31 | (random.next() as u32 & 0xf00) | random.below(48) as u32,
                error_code: random.next() as u32 & 0xffff,
                instruction_len: random.below(16) as u32,
                reserved: 0,
            };
            page.dirty |= dune_abi::DIRTY_EVENT;
        });
    }
    if !interrupts_may_be_off {
        guest.edit(|page| page.rflags |= IF);
    }
    for round in 0..3 {
        let ended = go(guest, tally);
        if round == 0 && ended == Some(dune_abi::EXIT_FAIL_ENTRY) {
            let exit = guest.run_page().exit;
            tally.add(word::ERRORS + exit.instruction_error.min(39) as usize, 1);
            // Some of the odd states fail by themselves, on one CPU or another.
            if let (1, false, Some(index)) = (spoiled, odd, check) {
                tally.add(word::CHECKS + index, 1);
            }
        }
        // The program of a guest goes on after a call; after all else it would be told.
        if ended != Some(dune_abi::EXIT_SYSCALL) {
            break;
        }
        if random.percent(30) {
            guest.sync();
        }
    }
    // What the guest did to the FPU is this thread's now.
    // SAFETY: the state that Linux starts with.
    unsafe { asm!("fninit", "ldmxcsr [{0}]", in(reg) &0x1f80u32) };
}

/// RUN until something ends it; the kind, unless it was an error or the clock.
fn go(guest: &mut RawGuest, tally: &Tally<'_>) -> Option<u32> {
    let mut ticks = 0;
    for _ in 0..50 {
        match guest.device.run(guest.vcpu) {
            Err(Errno(libc::EINTR)) => {
                ticks += 1;
                if ticks == 2 {
                    tally.add(word::TIMEOUTS, 1);
                    return None;
                }
            }
            Err(Errno(libc::EINVAL)) => {
                tally.add(word::EINVAL, 1);
                return None;
            }
            Err(errno) => panic!("RUN: {errno:?}"),
            Ok(answer) => {
                assert!(answer.kind <= dune_abi::EXIT_AGAIN, "{answer:x?}");
                tally.add(word::KINDS + answer.kind as usize, 1);
                let exit = guest.run_page().exit;
                match answer.kind {
                    dune_abi::EXIT_SYSCALL => {
                        tally.add(word::CALLS, 1);
                        if (TRAP..TRAP + 32).contains(&answer.rax) {
                            tally.add(word::TRAPS + (answer.rax - TRAP) as usize, 1);
                        }
                        return Some(answer.kind);
                    }
                    dune_abi::EXIT_AGAIN => {}
                    dune_abi::EXIT_TOUCH if guest.settle(&exit) => {}
                    // What nobody knows a treatment for would be a gap in the policy.
                    dune_abi::EXIT_UNHANDLED => panic!("unhandled: {exit:x?}"),
                    kind => return Some(kind),
                }
            }
        }
    }
    None
}

/// Some instructions, then one that ends.
fn code(random: &mut Random, interrupts_may_be_off: bool) -> Vec<u8> {
    let mut code = Vec::with_capacity(64);
    for _ in 0..1 + random.below(5) {
        if interrupts_may_be_off && random.percent(5) {
            code.extend_from_slice(random.pick::<&[u8]>(CLEAR_IF));
        } else if interrupts_may_be_off && random.percent(8) {
            code.extend((0..1 + random.below(8)).map(|_| random.next() as u8));
        } else {
            code.extend_from_slice(random.pick::<&[u8]>(INSTRUCTIONS));
        }
    }
    code.extend_from_slice(&[0xcd, 0x99, 0x0f, 0x01, 0xc1, 0xf4]);
    code
}

fn fill_registers(page: &mut RunPage, random: &mut Random, places: &[u64]) {
    let mut value = || {
        if random.percent(60) {
            *random.pick(places)
        } else {
            random.odd()
        }
    };
    let gprs = &mut page.gprs;
    for register in [
        &mut gprs.rax,
        &mut gprs.rcx,
        &mut gprs.rdx,
        &mut gprs.rbx,
        &mut gprs.rbp,
        &mut gprs.rsi,
        &mut gprs.rdi,
        &mut gprs.r8,
        &mut gprs.r11,
        &mut gprs.r15,
    ] {
        *register = value();
    }
    page.cr2 = value();
    if random.percent(5) {
        page.gprs.rsp = random.odd();
    }
    if random.percent(5) {
        page.sregs.syscall_vmcall = page.rip;
    }
    if helpers::is_emulated() {
        page.gprs.r11 |= IF;
    }
    if random.percent(20) {
        page.sregs.lstar = *random.pick(places);
    }
    if random.percent(60) {
        page.gprs.rcx &= 0xfff;
    }
}

/// States that a VM entry takes, most of them on any CPU, and that no kernel would make.
fn legal_but_odd(page: &mut RunPage, random: &mut Random) {
    match random.below(10) {
        0 => page.rflags |= 1 << 8,
        1 => page.rflags |= 1 << 16 | 1 << 18,
        2 => page.rflags |= 1 << 14,
        3 => page.sregs.idtr_base = random.odd() << 16 >> 16,
        4 => page.sregs.gdtr_base = random.odd() << 17 >> 17,
        5 => page.sregs.tr.base = random.odd() << 17 >> 17,
        6 => page.sregs.idtr_limit = random.below(0x1000) as u32,
        7 => page.sregs.cr3 = random.odd() & 0xff_ffff_f000,
        // Compatibility mode.
        8 => page.sregs.cs.access_rights = page.sregs.cs.access_rights & !(1 << 13) | 1 << 14,
        _ => page.sregs.cr0 ^= *random.pick(&[1 << 3, 1 << 16, 1 << 18, 1 << 30, 3 << 29]),
    }
}
