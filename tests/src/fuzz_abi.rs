// SPDX-License-Identifier: MIT OR Apache-2.0

//! Fuzzer of the ABI: calls with arguments that are right, nearly right and wrong, in any order, by the owner, another
//! thread, another process, on files that were inherited; mappings of run pages, and rubbish in them.
//!
//! Every errno that comes back must be one that docs/abi.md has for that call.

use std::mem::ManuallyDrop;
use std::sync::atomic::Ordering::Relaxed;

use dune_abi::CreateVcpu;
use dune_abi::Info;
use dune_abi::MapSlot;
use dune_abi::RunPage;
use dune_abi::UnusedSlot;

use crate::framework::Suite;
use crate::framework::Test;
use crate::fuzz;
use crate::fuzz::Random;
use crate::fuzz::Tally;
use crate::raw::Device;
use crate::raw::Errno;
use crate::support::Map;

pub const TESTS: &[Test] = &[
    Test::asserting("fuzz_abi", || fuzz_abi(SHORT)).timeout_s(120),
    Test::asserting("fuzz_abi_100000", || fuzz_abi(100_000))
        .suite(Suite::Long)
        .timeout_s(3600),
];

/// About 20 s of emulated time.
const SHORT: u64 = 16_000;

/// Calls, each with what it may answer besides success.
const CALLS: &[(&str, &[i32])] = &[
    ("open", &[libc::EMFILE, libc::ENOMEM, libc::EAGAIN]),
    ("GET_INFO", &[libc::EXDEV, libc::EINVAL, libc::EFAULT]),
    (
        "CREATE_VCPU",
        &[
            libc::EXDEV,
            libc::EINVAL,
            libc::EFAULT,
            libc::ENXIO,
            libc::ENOSPC,
            libc::ENOMEM,
        ],
    ),
    ("DESTROY_VCPU", &[libc::EXDEV, libc::ENOENT, libc::EPERM]),
    (
        "RUN",
        &[
            libc::EXDEV,
            libc::ENOENT,
            libc::EPERM,
            libc::EINTR,
            libc::EINVAL,
            libc::ENOMEM,
            libc::ENXIO,
        ],
    ),
    ("SYNC", &[libc::EXDEV, libc::ENOENT, libc::EPERM]),
    (
        "MAP_SLOT",
        &[
            libc::EXDEV,
            libc::EINVAL,
            libc::EFAULT,
            libc::ENOSPC,
            libc::EEXIST,
            libc::ENOMEM,
        ],
    ),
    ("NEW_SPACE", &[libc::EMFILE, libc::ENOMEM, libc::EAGAIN]),
    (
        "mmap",
        &[
            libc::EXDEV,
            libc::EINVAL,
            libc::ENOENT,
            libc::EPERM,
            libc::ENOMEM,
            libc::EOVERFLOW,
            libc::EACCES,
        ],
    ),
    ("other ioctl", &[libc::ENOTTY]),
    (
        "UNUSED_SLOT",
        &[libc::EXDEV, libc::EINVAL, libc::EFAULT, libc::ENOENT, libc::EINTR],
    ),
    (
        "UNMAP_SLOT",
        &[libc::EXDEV, libc::EINVAL, libc::ENOENT, libc::EBUSY, libc::EINTR],
    ),
    ("FLUSH", &[libc::EXDEV]),
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

/// Errnos that a fuzzer can bring about; the tests named in docs/abi.md's rows bring about the rest (EACCES, EBUSY, ENODEV
/// need another user or KVM; ENOMEM fault injection).
const SEEN: &[(usize, i32)] = &[
    (OPEN, libc::EMFILE),
    (GET_INFO, libc::EXDEV),
    (GET_INFO, libc::EINVAL),
    (GET_INFO, libc::EFAULT),
    (CREATE, libc::EXDEV),
    (CREATE, libc::EINVAL),
    (CREATE, libc::EFAULT),
    (CREATE, libc::ENXIO),
    (CREATE, libc::ENOSPC),
    (DESTROY, libc::EXDEV),
    (DESTROY, libc::ENOENT),
    (DESTROY, libc::EPERM),
    (RUN, libc::EXDEV),
    (RUN, libc::ENOENT),
    (RUN, libc::EPERM),
    (RUN, libc::EINTR),
    (RUN, libc::EINVAL),
    (RUN, libc::ENXIO),
    (SYNC, libc::EXDEV),
    (SYNC, libc::ENOENT),
    (SYNC, libc::EPERM),
    (MAP_SLOT, libc::EXDEV),
    (MAP_SLOT, libc::EINVAL),
    (MAP_SLOT, libc::EFAULT),
    (MAP_SLOT, libc::ENOSPC),
    (MAP_SLOT, libc::EEXIST),
    (NEW_SPACE, libc::EMFILE),
    (MMAP, libc::EXDEV),
    (MMAP, libc::EINVAL),
    (MMAP, libc::ENOENT),
    (MMAP, libc::EPERM),
    (OTHER, libc::ENOTTY),
    (UNUSED_SLOT, libc::EXDEV),
    (UNUSED_SLOT, libc::EINVAL),
    (UNUSED_SLOT, libc::EFAULT),
    (UNUSED_SLOT, libc::ENOENT),
    (UNMAP_SLOT, libc::EXDEV),
    (UNMAP_SLOT, libc::EINVAL),
    (UNMAP_SLOT, libc::ENOENT),
    (UNMAP_SLOT, libc::EBUSY),
    (FLUSH, libc::EXDEV),
];

/// Word of the tally for a call's answer: its successes first, then its errnos in the table's order.
const fn word(call: usize, answer: usize) -> usize {
    8 + call * 16 + answer
}

fn fuzz_abi(cases: u64) {
    let shared = fuzz::run(cases, batch);
    let at = |call, answer| shared.word(word(call, answer)).load(Relaxed);
    for (call, (name, errnos)) in CALLS.iter().enumerate() {
        let each: Vec<_> = errnos
            .iter()
            .enumerate()
            .filter(|(index, _)| at(call, index + 1) != 0)
            .map(|(index, errno)| format!("{:?} {}", Errno(*errno), at(call, index + 1)))
            .collect();
        println!("report: {name}: {} ok, {}", at(call, 0), each.join(", "));
    }
    if cases >= SHORT {
        for (call, errno) in SEEN {
            let (name, errnos) = CALLS[*call];
            let index = errnos.iter().position(|other| other == errno).unwrap();
            assert_ne!(at(*call, index + 1), 0, "{name} never gave {:?}", Errno(*errno));
        }
        for (call, (name, _)) in CALLS.iter().enumerate().filter(|(call, _)| *call != OTHER) {
            assert_ne!(at(call, 0), 0, "{name} never succeeded");
        }
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
    let (name, errnos) = CALLS[call];
    match answer {
        Ok(value) => {
            tally.add(word(call, 0), 1);
            Some(value)
        }
        Err(errno) => {
            let index = errnos.iter().position(|other| *other == errno.0);
            let index = index.unwrap_or_else(|| panic!("{name} answered {errno:?}, which docs/abi.md does not have"));
            tally.add(word(call, index + 1), 1);
            None
        }
    }
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
            0 => in_child(&mut file, random, tally),
            1 => in_thread(&mut file, random, tally),
            2 => without_files(&file, tally),
            3 => with_a_selector(&file, random, tally),
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

/// A place for an argument: right, at the end of memory, read-only, unaligned, or nowhere.
fn pointer(good: usize, random: &mut Random) -> usize {
    match random.below(20) {
        0 => 0,
        1 => random.odd() as usize | 1 << 63,
        2 => usize::MAX - 3,
        3 => CALLS.as_ptr() as usize,
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
            note(tally, GET_INFO, file.device.call(dune_abi::DUNE_GET_INFO, to));
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
            if note(tally, CREATE, file.device.call(dune_abi::DUNE_CREATE_VCPU, to)).is_some() {
                assert_eq!(
                    create.run_offset,
                    u64::from(create.vcpu) * dune_abi::RUN_PAGE_BYTES as u64
                );
                file.vcpus.push(create.vcpu);
            }
        }
        2 => {
            let vcpu = vcpu(file, random);
            let answer = file.device.call(dune_abi::DUNE_DESTROY_VCPU, vcpu);
            if note(tally, DESTROY, answer).is_some() {
                file.vcpus.retain(|other| *other as usize != vcpu);
            }
        }
        3..=5 => {
            let vcpu = vcpu(file, random);
            if let Some(page) = file.pages.last() {
                scribble(page, random);
            }
            note(tally, RUN, file.device.run(vcpu));
        }
        6 => {
            note(tally, SYNC, file.device.call(dune_abi::DUNE_SYNC, vcpu(file, random)));
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
                    CALLS.as_ptr() as u64
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
            note(tally, MAP_SLOT, file.device.call(dune_abi::DUNE_MAP_SLOT, to));
        }
        9..=10 => {
            let offset = if random.percent(80) {
                (vcpu(file, random) as u64).wrapping_mul(4096)
            } else {
                random.odd()
            };
            let bytes = if random.percent(80) {
                4096
            } else {
                1 + random.below(5 * 4096) as usize
            };
            let protection = *random.pick(&[3, 3, 3, 1, 0, 7]);
            let flags = *random.pick(&[libc::MAP_SHARED, libc::MAP_SHARED, libc::MAP_SHARED, libc::MAP_PRIVATE]);
            // SAFETY: a new mapping; nothing of ours is replaced.
            let address = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    bytes,
                    protection,
                    flags,
                    file.device.fd,
                    (offset & !0xfff) as i64,
                )
            };
            let answer = if address == libc::MAP_FAILED {
                Err(Errno(std::io::Error::last_os_error().raw_os_error().unwrap()))
            } else {
                Ok(Map::owning(address.cast(), bytes))
            };
            if let Some(map) = note(tally, MMAP, answer) {
                if protection & 3 == 3 && bytes == 4096 {
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
            let known = [
                dune_abi::DUNE_GET_INFO,
                dune_abi::DUNE_CREATE_VCPU,
                dune_abi::DUNE_DESTROY_VCPU,
                dune_abi::DUNE_RUN,
                dune_abi::DUNE_SYNC,
                dune_abi::DUNE_MAP_SLOT,
                dune_abi::DUNE_NEW_SPACE,
                dune_abi::DUNE_UNUSED_SLOT,
                dune_abi::DUNE_UNMAP_SLOT,
                dune_abi::DUNE_FLUSH,
                dune_abi::DUNE_KVM_LEND,
            ];
            if !known.contains(&request) {
                note(tally, OTHER, file.device.call(request, random.odd() as usize));
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
            note(tally, UNUSED_SLOT, file.device.call(dune_abi::DUNE_UNUSED_SLOT, to));
        }
        13 if random.percent(20) => {
            let argument = random.odd() as usize;
            note(tally, FLUSH, file.device.call(dune_abi::DUNE_FLUSH, argument));
        }
        13 => {
            let hva = match random.below(10) {
                0 => random.odd() as usize,
                1 => CALLS.as_ptr() as usize,
                _ => (random.below(40) << 30) as usize,
            };
            note(tally, UNMAP_SLOT, file.device.call(dune_abi::DUNE_UNMAP_SLOT, hva));
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
    match random.below(4) {
        0 => {
            for index in 0..63 {
                page.write(index * 8, random.odd());
            }
        }
        1 => page.write(8 * random.below(63) as usize, random.odd()),
        // SAFETY: the run page of a vCPU, mapped for reading and writing.
        2 => unsafe { (&raw mut (*run).interrupt_request).write_volatile(random.below(2) as u32) },
        // SAFETY: as above.
        _ => unsafe { (&raw mut (*run).dirty).write_volatile(random.below(9) as u32) },
    }
}

fn borrow(file: &File) -> ManuallyDrop<Device> {
    ManuallyDrop::new(Device { fd: file.device.fd })
}

/// Some calls of another process on the same file, which it inherited; and on one of its own.
fn in_child(file: &mut File, random: &mut Random, tally: &Tally<'_>) {
    // SAFETY: the child only makes calls, and ends.
    match unsafe { libc::fork() } {
        -1 => panic!("fork: {}", std::io::Error::last_os_error()),
        0 => {
            let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                file.foreign = true;
                file.pages.clear();
                for _ in 0..20 {
                    one(file, random, tally);
                }
                let own = note(tally, NEW_SPACE, file.device.call(dune_abi::DUNE_NEW_SPACE, 0));
                let mut own = File {
                    device: Device { fd: own.unwrap() },
                    vcpus: Vec::new(),
                    pages: Vec::new(),
                    foreign: false,
                };
                for _ in 0..20 {
                    one(&mut own, random, tally);
                }
            }))
            .is_err();
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

/// Calls of another thread about vCPUs that are not its own.
fn in_thread(file: &mut File, random: &mut Random, tally: &Tally<'_>) {
    let (device, vcpus) = (borrow(file), file.vcpus.clone());
    let seed = random.next();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = Random::new(seed);
            for vcpu in vcpus {
                match random.below(4) {
                    0 => drop(note(tally, RUN, device.run(vcpu as usize))),
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
    let (run, create) = (file.device.run(vcpu), file.device.create_vcpu());
    set(0);
    assert!(note(tally, RUN, run).is_none());
    assert!(note(tally, CREATE, create).is_none());
}
