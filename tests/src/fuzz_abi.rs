// SPDX-License-Identifier: MIT OR Apache-2.0

//! Fuzzer of the ABI: calls with arguments that are right, nearly right and wrong, by ioctl(2) and by read(2), in any order,
//! by the owner, another thread, another process, on files that were inherited; mappings of run pages, and rubbish in them.
//!
//! Every errno that comes back must be one that docs/abi.md has for that call, and each that the document says is to be seen
//! here is.

use std::mem::ManuallyDrop;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::OnceLock;

use dune_abi::CreateVcpu;
use dune_abi::Info;
use dune_abi::MapSlot;
use dune_abi::RunPage;
use dune_abi::UnusedSlot;

use crate::abi_document;
use crate::abi_document::Answer;
use crate::framework::Suite;
use crate::framework::Test;
use crate::fuzz;
use crate::fuzz::Random;
use crate::fuzz::Tally;
use crate::raw::Device;
use crate::raw::Errno;
use crate::support::count_signal;
use crate::support::set_plain_handler;
use crate::support::set_timer;
use crate::support::Map;
use crate::support::GIB;
use crate::support::PAGE;
use crate::support::SIGNALS;

pub const TESTS: &[Test] = &[
    Test::asserting(FUZZER, || fuzz_abi(SHORT)).timeout_s(120),
    Test::asserting("fuzz_abi_100000", || fuzz_abi(100_000))
        .suite(Suite::Long)
        .timeout_s(3600),
];

/// How docs/abi.md names this fuzzer.
const FUZZER: &str = "fuzz_abi";

/// Some 20 s of guest time.
const SHORT: u64 = 27_000;

/// A call.
struct Call {
    name: &'static str,
    /// Where docs/abi.md has what it may answer besides success.
    documented: &'static [&'static str],
    /// 0: not by a request.
    request: u32,
}

const fn plain(name: &'static [&'static str; 1], request: u32) -> Call {
    Call {
        name: name[0],
        documented: name,
        request,
    }
}

const CALLS: &[Call] = &[
    plain(&["open"], 0),
    plain(&["DUNE_GET_INFO"], dune_abi::DUNE_GET_INFO),
    plain(&["DUNE_CREATE_VCPU"], dune_abi::DUNE_CREATE_VCPU),
    plain(&["DUNE_DESTROY_VCPU"], dune_abi::DUNE_DESTROY_VCPU),
    plain(&["DUNE_RUN"], dune_abi::DUNE_RUN),
    plain(&["DUNE_SYNC"], dune_abi::DUNE_SYNC),
    plain(&["DUNE_MAP_SLOT"], dune_abi::DUNE_MAP_SLOT),
    plain(&["DUNE_NEW_SPACE"], dune_abi::DUNE_NEW_SPACE),
    plain(&["mmap"], 0),
    plain(&["ioctl"], 0),
    plain(&["DUNE_UNUSED_SLOT"], dune_abi::DUNE_UNUSED_SLOT),
    plain(&["DUNE_UNMAP_SLOT"], dune_abi::DUNE_UNMAP_SLOT),
    plain(&["DUNE_FLUSH"], dune_abi::DUNE_FLUSH),
    plain(&["DUNE_KVM_LEND"], dune_abi::DUNE_KVM_LEND),
    plain(&["read"], 0),
    Call {
        name: "DUNE_RUN by read",
        documented: &["DUNE_RUN", "read"],
        request: 0,
    },
];
const OPEN: usize = 0;
const GET_INFO: usize = 1;
const CREATE: usize = 2;
const DESTROY: usize = 3;
const RUN: usize = 4;
const SYNC: usize = 5;
const MAP_SLOT: usize = 6;
const NEW_SPACE: usize = 7;
const MMAP: usize = 8;
const OTHER: usize = 9;
const UNUSED_SLOT: usize = 10;
const UNMAP_SLOT: usize = 11;
const FLUSH: usize = 12;
const KVM_LEND: usize = 13;
const READ: usize = 14;
const RUN_BY_READ: usize = 15;

/// These nobody here can make succeed.
const REFUSED: [usize; 2] = [OTHER, KVM_LEND];

/// What each of [`CALLS`] may answer, by docs/abi.md.
fn documented(call: usize) -> &'static [Answer] {
    static ANSWERS: OnceLock<Vec<Vec<Answer>>> = OnceLock::new();
    let all = ANSWERS.get_or_init(|| {
        let answers = abi_document::answers();
        let of = |call: &Call| {
            let mine = answers.iter().filter(|answer| call.documented.contains(&answer.call));
            let mut mine: Vec<Answer> = mine.copied().collect();
            mine.sort_by_key(|answer| answer.errno);
            mine.dedup_by_key(|answer| answer.errno);
            assert!(mine.len() < ANSWERS_OF_A_CALL, "{}: {}", call.name, mine.len());
            mine
        };
        CALLS.iter().map(of).collect()
    });
    &all[call]
}

/// Words of the tally that a call has: its successes first, then its errnos as [`documented`] orders them.
const ANSWERS_OF_A_CALL: usize = 16;

const fn word(call: usize, answer: usize) -> usize {
    8 + call * ANSWERS_OF_A_CALL + answer
}

fn fuzz_abi(cases: u64) {
    for call in abi_document::calls() {
        let is_made = CALLS.iter().any(|made| made.documented.contains(&call));
        assert!(is_made, "docs/abi.md has {call}, which is not called here");
    }
    let shared = fuzz::run(cases, batch);
    let at = |call, answer| shared.word(word(call, answer)).load(Relaxed);
    let mut missing = Vec::new();
    for (call, Call { name, .. }) in CALLS.iter().enumerate() {
        let mut each = Vec::new();
        for (index, answer) in documented(call).iter().enumerate() {
            match at(call, index + 1) {
                0 if answer.test == Some(FUZZER) => missing.push(format!("{name} never gave {}", answer.name)),
                0 => {}
                count => each.push(format!("{} {count}", answer.name)),
            }
        }
        if at(call, 0) == 0 && !REFUSED.contains(&call) {
            missing.push(format!("{name} never succeeded"));
        }
        println!("report: {name}: {} ok, {}", at(call, 0), each.join(", "));
    }
    if fuzz::cases(cases) >= SHORT {
        assert!(missing.is_empty(), "docs/abi.md: {}", missing.join("; "));
    }
}

/// A file, the vCPUs that were made in it, run pages that were mapped.
struct File {
    device: Device,
    vcpus: Vec<u32>,
    pages: Vec<Map>,
    /// Inherited, or another process' now.
    foreign: bool,
}

fn note<T>(tally: &Tally<'_>, call: usize, answer: Result<T, Errno>) -> Option<T> {
    match answer {
        Ok(value) => {
            tally.add(word(call, 0), 1);
            Some(value)
        }
        Err(errno) => {
            let name = CALLS[call].name;
            let place = documented(call).iter().position(|answer| answer.errno == errno.0);
            let place = place.unwrap_or_else(|| panic!("{name} answered {errno:?}, which docs/abi.md does not have"));
            let answer = documented(call)[place];
            assert!(answer.test.is_some(), "docs/abi.md says that nobody can see {answer:?}");
            tally.add(word(call, place + 1), 1);
            None
        }
    }
}

/// Makes a call that is a request, but RUN, now and then by read(2).
fn make(file: &File, call: usize, argument: usize, random: &mut Random, tally: &Tally<'_>) -> Option<i32> {
    let request = CALLS[call].request;
    if !random.percent(15) {
        return note(tally, call, file.device.call(request, argument));
    }
    let answer = file.device.call_by_read(request, argument);
    match answer {
        Ok(_) => tally.add(word(READ, 0), 1),
        // What Linux says of the buffer before the module sees it.
        Err(errno) if !documented(call).iter().any(|answer| answer.errno == errno.0) => {
            return note(tally, READ, answer);
        }
        Err(_) => {}
    }
    note(tally, call, answer)
}

/// RUN, by one call or the other; whether it succeeded.
fn run(device: &Device, vcpu: usize, random: &mut Random, tally: &Tally<'_>) -> bool {
    let answer = if random.percent(30) {
        note(tally, RUN_BY_READ, device.run_by_read(vcpu))
    } else {
        note(tally, RUN, device.run(vcpu))
    };
    answer.is_some()
}

fn batch(random: &mut Random, tally: &Tally<'_>, cases: u64) {
    let mut file = fresh(tally);
    for case in 0..cases {
        if case % 250 == 249 {
            // The old space goes first, or it would be this one again.
            drop(file);
            file = fresh(tally);
        }
        match random.below(100) {
            0 => in_child(|| calls_of_a_child(&mut file, random, tally)),
            1 => in_thread(&mut file, random, tally),
            2 => without_files(&file, tally),
            3 => with_a_selector(&file, random, tally),
            4 => in_child(|| interrupted(&file, random, tally)),
            _ => one(&mut file, random, tally),
        }
    }
    // What has no end by chance.
    while note(tally, CREATE, file.device.create_vcpu().map(drop)).is_some() {}
    for gib in 0..1 << 14 {
        if note(tally, MAP_SLOT, file.device.map_slot(gib << 30).map(drop)).is_none() {
            break;
        }
    }
}

fn fresh(tally: &Tally<'_>) -> File {
    File {
        device: note(tally, OPEN, Device::open()).expect("the device opens"),
        vcpus: Vec::new(),
        pages: Vec::new(),
        foreign: false,
    }
}

fn vcpu(file: &File, random: &mut Random) -> usize {
    if file.vcpus.is_empty() || random.percent(15) {
        random.odd() as usize
    } else {
        *random.pick(&file.vcpus) as usize
    }
}

/// Memory of the program that is not for writing.
static READ_ONLY: [u64; 8] = [!0; 8];

/// A place for an argument: right, at the end of memory, read-only, unaligned, or nowhere.
fn pointer(good: usize, random: &mut Random) -> usize {
    match random.below(20) {
        0 => 0,
        1 => random.odd() as usize | 1 << 63,
        2 => usize::MAX - 3,
        3 => READ_ONLY.as_ptr() as usize,
        _ => good,
    }
}

fn one(file: &mut File, random: &mut Random, tally: &Tally<'_>) {
    match random.below(15) {
        0 => {
            let mut info = Info {
                size: if random.percent(70) {
                    size_of::<Info>() as u32
                } else {
                    random.odd() as u32
                },
                ..Info::default()
            };
            let to = pointer(&raw mut info as usize, random);
            make(file, GET_INFO, to, random, tally);
        }
        1 => {
            let mut create = CreateVcpu {
                size: if random.percent(80) {
                    size_of::<CreateVcpu>() as u32
                } else {
                    random.odd() as u32
                },
                flags: if random.percent(80) { 0 } else { random.odd() as u32 },
                vcpu: random.odd() as u32,
                ..CreateVcpu::default()
            };
            let to = pointer(&raw mut create as usize, random);
            if make(file, CREATE, to, random, tally).is_some() {
                assert_eq!(
                    create.run_offset,
                    u64::from(create.vcpu) * dune_abi::RUN_PAGE_BYTES as u64
                );
                file.vcpus.push(create.vcpu);
            }
        }
        2 => {
            let vcpu = vcpu(file, random);
            if make(file, DESTROY, vcpu, random, tally).is_some() {
                file.vcpus.retain(|other| *other as usize != vcpu);
            }
        }
        3..=5 => {
            let vcpu = vcpu(file, random);
            if let Some(page) = file.pages.last() {
                scribble(page, random);
            }
            run(&file.device, vcpu, random, tally);
        }
        6 => {
            let vcpu = vcpu(file, random);
            make(file, SYNC, vcpu, random, tally);
        }
        7..=8 => {
            let mut slot = MapSlot {
                size: if random.percent(85) {
                    size_of::<MapSlot>() as u32
                } else {
                    random.odd() as u32
                },
                flags: *random.pick(&[0, 0, dune_abi::MAP_SLOT_AT, dune_abi::MAP_SLOT_AT, 2, u32::MAX]),
                hva: if random.percent(5) {
                    READ_ONLY.as_ptr() as u64
                } else {
                    random.below(40) << 30
                } | random.odd() >> 34
                    | if random.percent(5) { 1 << 47 } else { 0 },
                gpa: if random.percent(80) {
                    random.below(40) << 30
                } else {
                    random.odd()
                },
            };
            let to = pointer(&raw mut slot as usize, random);
            make(file, MAP_SLOT, to, random, tally);
        }
        9..=10 => {
            let offset = if random.percent(80) {
                (vcpu(file, random) as u64).wrapping_mul(4096)
            } else {
                random.odd()
            };
            let bytes = match random.below(100) {
                0..80 => PAGE,
                80..97 => 1 + random.below(5 * PAGE as u64) as usize,
                // More than there is.
                _ => 1 << 47,
            };
            let protection = *random.pick(&[3, 3, 3, 1, 0, 7]);
            let flags = *random.pick(&[libc::MAP_SHARED, libc::MAP_SHARED, libc::MAP_SHARED, libc::MAP_PRIVATE]);
            let read_only = random.percent(3).then(|| Device::open_as(libc::O_RDONLY).unwrap());
            let device = read_only.as_ref().unwrap_or(&file.device);
            let answer = device.map(offset & !0xfff, bytes, protection, flags);
            let answer = answer.map(|address| Map::owning(address, bytes));
            if let Some(map) = note(tally, MMAP, answer) {
                if protection & 3 == 3 && bytes == PAGE {
                    file.pages.push(map);
                }
                if file.pages.len() > 8 {
                    file.pages.remove(0);
                }
            }
        }
        11 => {
            // Any number but those of the device, and of what Linux answers for every file.
            let request = 0xd500 | random.next() as u32 & 0xffff_00ff;
            if !CALLS.iter().any(|call| call.request == request) {
                note(tally, OTHER, file.device.call(request, random.odd() as usize));
            }
            let any = random.odd();
            let lent = *random.pick(&[0, 1, file.device.fd as u64, any]);
            let answer = file.device.call(dune_abi::DUNE_KVM_LEND, lent as usize);
            note(tally, KVM_LEND, answer);
            // Any size that is no request's.
            let bytes = random.odd();
            if !CALLS
                .iter()
                .any(|call| call.request != 0 && dune_abi::read_size(call.request) == bytes)
            {
                note(tally, READ, file.device.read(random.odd() as usize, bytes));
            }
        }
        12 => {
            let mut slot = UnusedSlot {
                size: if random.percent(85) {
                    size_of::<UnusedSlot>() as u32
                } else {
                    random.odd() as u32
                },
                gpa: if random.percent(80) {
                    random.below(40) << 30
                } else {
                    random.odd()
                },
                ..UnusedSlot::default()
            };
            let to = pointer(&raw mut slot as usize, random);
            make(file, UNUSED_SLOT, to, random, tally);
        }
        13 if random.percent(20) => {
            let argument = random.odd() as usize;
            make(file, FLUSH, argument, random, tally);
        }
        13 => {
            let hva = match random.below(10) {
                0 => random.odd() as usize,
                1 => READ_ONLY.as_ptr() as usize,
                _ => (random.below(40) << 30) as usize,
            };
            make(file, UNMAP_SLOT, hva, random, tally);
        }
        _ => {
            if let Some(page) = file.pages.pop() {
                match random.below(3) {
                    0 => page.protect(0, page.bytes, libc::PROT_READ),
                    1 => page.advise(0, page.bytes, libc::MADV_DONTNEED),
                    _ => {}
                }
            }
            if !file.foreign {
                assert_eq!(file.device.info().unwrap().vcpus as usize, file.vcpus.len());
            }
        }
    }
}

/// Rubbish, or nearly right values, into a run page.
fn scribble(page: &Map, random: &mut Random) {
    let run = page.start.cast::<RunPage>();
    match random.below(6) {
        0 => {
            for index in 0..63 {
                page.write(index * 8, random.odd());
            }
        }
        1 => page.write(8 * random.below(63) as usize, random.odd()),
        // SAFETY: the run page of a vCPU, mapped for reading and writing.
        2 => unsafe { (&raw mut (*run).interrupt_request).write_volatile(random.below(2) as u32) },
        // SAFETY: as above.
        3 => unsafe { (&raw mut (*run).deadline).write_volatile(random.odd()) },
        // SAFETY: as above.
        4 => unsafe { (&raw mut (*run).forward_behind).write_volatile(random.odd()) },
        // SAFETY: as above.
        _ => unsafe { (&raw mut (*run).dirty).write_volatile(random.below(9) as u32) },
    }
}

fn borrow(file: &File) -> ManuallyDrop<Device> {
    ManuallyDrop::new(Device { fd: file.device.fd })
}

/// Runs `body` in a child, which must come to its end.
fn in_child(body: impl FnOnce()) {
    // SAFETY: the child only makes calls, and ends.
    match unsafe { libc::fork() } {
        -1 => panic!("fork: {}", std::io::Error::last_os_error()),
        0 => {
            let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).is_err();
            // SAFETY: ends the child without running what is the parent's.
            unsafe { libc::_exit(failed.into()) }
        }
        child => {
            let mut status = 0;
            // SAFETY: our child.
            assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
            assert_eq!(status, 0, "the child failed (wait status {status:#x})");
        }
    }
}

/// A child makes some calls on the file that it inherited, and on one of its own.
fn calls_of_a_child(file: &mut File, random: &mut Random, tally: &Tally<'_>) {
    file.foreign = true;
    file.pages.clear();
    for _ in 0..20 {
        one(file, random, tally);
    }
    let own = loop {
        // Linux gives the locks up for work that is due, too.
        if let Some(own) = make(file, NEW_SPACE, 0, random, tally) {
            break own;
        }
    };
    let mut own = File {
        device: Device { fd: own },
        vcpus: Vec::new(),
        pages: Vec::new(),
        foreign: false,
    };
    for _ in 0..20 {
        one(&mut own, random, tally);
    }
}

/// A child has a signal in the middle of calls that end with EINTR then.
fn interrupted(file: &File, random: &mut Random, tally: &Tally<'_>) {
    const SLOTS: usize = 50;
    const FIRST: usize = 0x5000 * GIB;
    set_plain_handler(libc::SIGALRM, count_signal, 0);
    // Each makes the child's space, which goes again.
    set_timer(libc::ITIMER_REAL, 20 + random.below(2000) as i64, 0);
    drop(note(tally, OPEN, Device::open_as(libc::O_RDWR)));
    set_timer(libc::ITIMER_REAL, 20 + random.below(2000) as i64, 0);
    let made = make(file, NEW_SPACE, 0, random, tally);
    set_timer(libc::ITIMER_REAL, 0, 0);
    drop(made.map(|fd| Device { fd }));

    let device = Device::open().unwrap();
    let mapped: Vec<Map> = (0..SLOTS)
        .map(|gib| Map::at(FIRST + gib * GIB, PAGE, libc::PROT_NONE, libc::MAP_NORESERVE))
        .collect();
    for map in &mapped {
        note(tally, MAP_SLOT, device.map_slot(map.address() as u64));
    }
    let before = SIGNALS.load(SeqCst);
    set_timer(libc::ITIMER_REAL, 50 + random.below(500) as i64, 0);
    while SIGNALS.load(SeqCst) == before {
        let mut slot = UnusedSlot {
            size: size_of::<UnusedSlot>() as u32,
            ..UnusedSlot::default()
        };
        let answer = device.call(dune_abi::DUNE_UNUSED_SLOT, &raw mut slot as usize);
        note(tally, UNUSED_SLOT, answer);
    }
}

/// Calls of another thread about vCPUs that are not its own.
fn in_thread(file: &mut File, random: &mut Random, tally: &Tally<'_>) {
    let (device, vcpus) = (borrow(file), file.vcpus.clone());
    let seed = random.next();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = Random::new(seed);
            for vcpu in vcpus {
                match random.below(4) {
                    0 => assert!(
                        !run(&device, vcpu as usize, &mut random, tally),
                        "another thread's vCPU"
                    ),
                    1 => drop(note(tally, SYNC, device.call(dune_abi::DUNE_SYNC, vcpu as usize))),
                    2 => {
                        let create = CreateVcpu {
                            run_offset: u64::from(vcpu) * 4096,
                            run_bytes: 4096,
                            ..CreateVcpu::default()
                        };
                        let _ = note(tally, MMAP, device.map_run_page(&create));
                    }
                    _ => {
                        let answer = device.call(dune_abi::DUNE_DESTROY_VCPU, vcpu as usize);
                        assert!(note(tally, DESTROY, answer).is_none(), "another thread's vCPU");
                    }
                }
            }
        });
    });
}

/// Calls that make a file where there is no room for one.
fn without_files(file: &File, tally: &Tally<'_>) {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: plain system calls on a structure of ours.
    unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit);
        let none = libc::rlimit { rlim_cur: 0, ..limit };
        libc::setrlimit(libc::RLIMIT_NOFILE, &none);
    }
    let opened = note(tally, OPEN, Device::open().map(drop));
    let made = note(tally, NEW_SPACE, file.device.call(dune_abi::DUNE_NEW_SPACE, 0));
    // SAFETY: as above.
    unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) };
    assert!(opened.is_none() && made.is_none());
}

/// RUN and CREATE_VCPU with a selector in ES.
fn with_a_selector(file: &File, random: &mut Random, tally: &Tally<'_>) {
    let set = |value: u16| {
        // SAFETY: data selectors have no meaning in 64-bit code.
        unsafe { std::arch::asm!("mov es, {0:x}", in(reg) value, options(nostack, preserves_flags)) };
    };
    let vcpu = vcpu(file, random);
    set(0x2b);
    let by_ioctl = file.device.run(vcpu);
    let by_read = file.device.run_by_read(vcpu);
    let create = file.device.create_vcpu();
    set(0);
    assert!(note(tally, RUN, by_ioctl).is_none());
    assert!(note(tally, RUN_BY_READ, by_read).is_none());
    assert!(note(tally, CREATE, create).is_none());
}
