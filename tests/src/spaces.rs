// SPDX-License-Identifier: MIT OR Apache-2.0

//! Spaces and slots: one space per process, limits of users, slots that come back.

use std::collections::VecDeque;
use std::fs;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use libdune::Dune;
use libdune::Gva;
use libdune::Permissions;

use crate::framework::Test;
use crate::framework::User;
use crate::helpers::module_counters;
use crate::helpers::user_id;
use crate::raw::Device;
use crate::raw::Ended;
use crate::raw::Errno;
use crate::raw::RawGuest;
use crate::support::enter;
use crate::support::install_probe;
use crate::support::load;
use crate::support::spawn;
use crate::support::store;
use crate::support::Knob;
use crate::support::Map;
use crate::support::Shared;
use crate::support::GIB;
use crate::support::PAGE;

pub const TESTS: &[Test] = &[
    Test::asserting("second_open_gives_the_same_space", second_open_gives_the_same_space).run_as(User::Root),
    Test::asserting(
        "inherited_fd_does_not_keep_others_out",
        inherited_fd_does_not_keep_others_out,
    ),
    Test::asserting(
        "many_threads_open_and_close_at_once",
        many_threads_open_and_close_at_once,
    )
    .run_as(User::Root),
    Test::asserting("spaces_of_a_user_are_limited", spaces_of_a_user_are_limited).run_as(User::Root),
    Test::asserting("vcpus_of_a_user_are_limited", vcpus_of_a_user_are_limited).run_as(User::Root),
    Test::asserting(
        "slot_comes_back_without_a_mapping_only",
        slot_comes_back_without_a_mapping_only,
    ),
    Test::asserting("given_back_slot_shows_nothing_old", given_back_slot_shows_nothing_old),
    Test::asserting(
        "violations_of_a_slot_given_back_lose_no_race",
        violations_of_a_slot_given_back_lose_no_race,
    )
    .run_as(User::Root),
    Test::asserting("slots_are_recycled", slots_are_recycled).timeout_s(60),
    Test::asserting("recycled_gib_starts_anew", recycled_gib_starts_anew).timeout_s(60),
];

fn unused_slot(device: &Device, after: u64) -> Result<(u64, u64), Errno> {
    let mut ask = dune_abi::UnusedSlot {
        size: size_of::<dune_abi::UnusedSlot>() as u32,
        gpa: after,
        ..Default::default()
    };
    device.call(dune_abi::DUNE_UNUSED_SLOT, &raw mut ask as usize)?;
    Ok((ask.gpa, ask.hva))
}

fn unmap_slot(device: &Device, hva: usize) -> Result<i32, Errno> {
    device.call(dune_abi::DUNE_UNMAP_SLOT, hva)
}

fn spaces() -> u64 {
    module_counters().unwrap()["spaces"]
}

/// A GiB of address space of its own, one page of it used.
fn gib_at(number: usize) -> Map {
    Map::at(
        number * GIB,
        GIB,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_NORESERVE,
    )
}

fn second_open_gives_the_same_space() {
    let before = spaces();
    let first = Device::open().unwrap();
    let second = Device::open().unwrap();
    let third = Device {
        fd: first.call(dune_abi::DUNE_NEW_SPACE, 0).unwrap(),
    };
    assert_eq!(spaces(), before + 1);
    let gpa = first.map_slot(77 << 30).unwrap();
    let vcpu = first.create_vcpu().unwrap().vcpu;
    drop(first);
    // It stays as long as a file of it does.
    assert_eq!(second.map_slot(77 << 30), Ok(gpa));
    assert_eq!(third.info().unwrap().vcpus, 1);
    assert_eq!(third.call(dune_abi::DUNE_DESTROY_VCPU, vcpu as usize), Ok(0));
    drop((second, third));
    assert_eq!(spaces(), before);
    // The next one is new.
    let next = Device::open().unwrap();
    let info = next.info().unwrap();
    assert_eq!(info.slots_free, (1u32 << (info.gpa_bits - 30).min(14)) - 1);
}

/// A child that keeps its parent's fd hinders neither itself nor the parent.
fn inherited_fd_does_not_keep_others_out() {
    let shared = Shared::new();
    // An ordinary child, which has a copy of everything and enters by itself.
    let dune = Dune::builder().children(false).enter().unwrap();
    let child = spawn(|| {
        // The space is another process'; Dune mode is one's own.
        while shared.word(0).load(SeqCst) == 0 {
            std::thread::yield_now();
        }
        let dune = enter();
        dune.leave();
        shared.word(1).store(1, SeqCst);
        while shared.word(0).load(SeqCst) != 2 {
            std::thread::yield_now();
        }
    });
    dune.leave();
    for _ in 0..3 {
        enter().leave();
    }
    shared.word(0).store(1, SeqCst);
    while shared.word(1).load(SeqCst) == 0 {
        std::thread::yield_now();
    }
    enter().leave();
    shared.word(0).store(2, SeqCst);
    child.wait().assert_success();
}

fn many_threads_open_and_close_at_once() {
    let before = spaces();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            scope.spawn(move || {
                for round in 0..50 {
                    let device = Device::open().unwrap();
                    // Few enough for the narrowest space.
                    let hva = thread << 34 | (round % 8) << 30;
                    let gpa = device.map_slot(hva).unwrap();
                    assert_eq!(device.map_slot(hva), Ok(gpa));
                    let vcpu = device.create_vcpu().unwrap();
                    device.call(dune_abi::DUNE_DESTROY_VCPU, vcpu.vcpu as usize).unwrap();
                }
            });
        }
    });
    assert_eq!(spaces(), before);
}

/// A parameter of the module with another value; the old one comes back when dropped.
struct Parameter {
    path: String,
    old: String,
}

impl Parameter {
    fn set(name: &str, value: u32) -> Self {
        let path = format!("/sys/module/dune/parameters/{name}");
        let old = fs::read_to_string(&path).unwrap();
        fs::write(&path, value.to_string()).unwrap();
        Self { path, old }
    }
}

impl Drop for Parameter {
    fn drop(&mut self) {
        let _ = fs::write(&self.path, self.old.trim());
    }
}

/// Goes on as an ordinary user.
fn become_tester() {
    let (uid, gid) = user_id("tester").unwrap();
    // SAFETY: changes who this process is. The node's group is kept.
    unsafe {
        assert_eq!(libc::setresgid(gid, gid, gid), 0);
        assert_eq!(libc::setresuid(uid, uid, uid), 0);
    }
}

fn spaces_of_a_user_are_limited() {
    const MOST: usize = 3;
    let _limit = Parameter::set("user_spaces", MOST as u32);
    let shared = Shared::new();
    let device = Device::open().unwrap();
    let child = |number: usize| {
        let (shared, device) = (&shared, &device);
        spawn(move || {
            become_tester();
            // An inherited file is enough, whoever may open the node.
            let answer = device.call(dune_abi::DUNE_NEW_SPACE, 0);
            shared
                .word(number)
                .store(answer.map_or_else(|errno| errno.0 as u64, |_| 1000), SeqCst);
            while shared.word(511).load(SeqCst) == 0 {
                std::thread::yield_now();
            }
        })
    };
    let wait = |number: usize| loop {
        match shared.word(number).load(SeqCst) {
            0 => std::thread::yield_now(),
            answer => return answer,
        }
    };
    let children: Vec<_> = (0..=MOST)
        .map(|number| {
            let child = child(number);
            let expected = if number < MOST { 1000 } else { libc::EAGAIN as u64 };
            assert_eq!(wait(number), expected, "space {number}");
            child
        })
        .collect();
    // Another user has a limit of its own, and root none.
    shared.word(511).store(1, SeqCst);
    for child in children {
        child.wait().assert_success();
    }
    let last = child(100);
    assert_eq!(wait(100), 1000, "what ended is counted no more");
    last.wait().assert_success();
}

fn vcpus_of_a_user_are_limited() {
    const MOST: u32 = 5;
    let _limit = Parameter::set("user_vcpus", MOST);
    spawn(|| {
        let device = Device::open().unwrap();
        // Root may exceed it.
        for _ in 0..=MOST {
            device.create_vcpu().unwrap();
        }
        become_tester();
        let device = Device {
            fd: device.call(dune_abi::DUNE_NEW_SPACE, 0).unwrap(),
        };
        let mut made = Vec::new();
        for _ in 0..MOST {
            made.push(device.create_vcpu().unwrap().vcpu);
        }
        assert_eq!(device.create_vcpu().unwrap_err(), Errno(libc::EAGAIN));
        device.call(dune_abi::DUNE_DESTROY_VCPU, made[0] as usize).unwrap();
        // One of a thread that died is reaped to make room.
        let fd = device.fd;
        let thread = std::thread::spawn(move || {
            let device = std::mem::ManuallyDrop::new(Device { fd });
            device.create_vcpu().unwrap();
        });
        // Waits until the kernel knows that it ends.
        thread.join().unwrap();
        device.create_vcpu().unwrap();
        assert_eq!(device.create_vcpu().unwrap_err(), Errno(libc::EAGAIN));
    })
    .wait()
    .assert_success();
}

fn slot_comes_back_without_a_mapping_only() {
    let device = Device::open().unwrap();
    let map = gib_at(30_000);
    let free = device.info().unwrap().slots_free;
    let gpa = device.map_slot(map.address() as u64).unwrap();
    let empty = device.map_slot(30_001 << 30).unwrap();
    assert_ne!(gpa, empty);
    assert_eq!(device.info().unwrap().slots_free, free - 2);
    // Only the GiB with nothing in it is named.
    assert_eq!(unused_slot(&device, 0), Ok((empty, 30_001 << 30)));
    assert_eq!(unused_slot(&device, empty), Err(Errno(libc::ENOENT)));
    assert_eq!(unmap_slot(&device, map.address() + 5), Err(Errno(libc::EBUSY)));
    // One page is enough, also the last of the GiB.
    map.unmap(0, GIB - PAGE);
    assert_eq!(unmap_slot(&device, map.address()), Err(Errno(libc::EBUSY)));
    map.unmap(GIB - PAGE, PAGE);
    assert_eq!(unused_slot(&device, 0).map(|(slot, _)| slot), Ok(gpa.min(empty)));
    assert_eq!(unmap_slot(&device, map.address() + GIB - 1), Ok(0));
    assert_eq!(unmap_slot(&device, map.address()), Err(Errno(libc::ENOENT)));
    assert_eq!(unmap_slot(&device, 30_001 << 30), Ok(0));
    assert_eq!(unused_slot(&device, 0), Err(Errno(libc::ENOENT)));
    assert_eq!(device.info().unwrap().slots_free, free);
    // What cannot be.
    assert_eq!(unmap_slot(&device, 1 << 47), Err(Errno(libc::EINVAL)));
    assert_eq!(unused_slot(&device, 1 << 48), Err(Errno(libc::EINVAL)));
    for (size, flags) in [(0, 0), (23, 0), (24, 1)] {
        let mut ask = dune_abi::UnusedSlot {
            size,
            flags,
            ..Default::default()
        };
        assert_eq!(
            device.call(dune_abi::DUNE_UNUSED_SLOT, &raw mut ask as usize),
            Err(Errno(libc::EINVAL))
        );
    }
    assert_eq!(device.call(dune_abi::DUNE_UNUSED_SLOT, 8), Err(Errno(libc::EFAULT)));
}

/// A guest that keeps using the GPA of a slot that was given back gets a report, and never the memory that was there.
fn given_back_slot_shows_nothing_old() {
    // mov rax, [rdi]; vmcall
    let mut guest = RawGuest::new(&[0x48, 0x8b, 0x07, 0x0f, 0x01, 0xc1]);
    let old = gib_at(30_000);
    old.write(0, 0x01d);
    let gpa = guest.device.map_slot(old.address() as u64).unwrap();
    let address = guest.map_odd(gpa);
    let read = |guest: &mut RawGuest| {
        guest.reset();
        guest.edit(|page| page.gprs.rdi = address);
        guest.run()
    };
    assert_eq!(read(&mut guest), Ended::Call(0x01d));
    let hva = old.address();
    drop(old);
    assert_eq!(unmap_slot(&guest.device, hva), Ok(0));
    assert_eq!(read(&mut guest).exit().kind, dune_abi::EXIT_NO_SLOT);
    // Another GiB gets the slot.
    let new = gib_at(31_000);
    new.write(0, 0x4e3);
    let mut ask = dune_abi::MapSlot {
        size: size_of::<dune_abi::MapSlot>() as u32,
        flags: dune_abi::MAP_SLOT_AT,
        hva: new.address() as u64,
        gpa,
    };
    guest
        .device
        .call(dune_abi::DUNE_MAP_SLOT, &raw mut ask as usize)
        .unwrap();
    assert_eq!(read(&mut guest), Ended::Call(0x4e3));
}

/// Between the moment in which a violation finds its slot and the one in which it finds the page, the slot goes, and the
/// process maps something there: no leaf may come of it, because no invalidation would find it any more. With
/// `DUNE_MUTATE=slot` this test is red.
fn violations_of_a_slot_given_back_lose_no_race() {
    const ROUNDS: usize = 12;
    let delay = Knob::set("slot_delay_us", 3_000);
    let rounds = if delay.is_some() { ROUNDS } else { 1 };
    let mut raced = 0;
    for round in 0..rounds {
        // mov rax, [rdi]; vmcall
        let mut guest = RawGuest::new(&[0x48, 0x8b, 0x07, 0x0f, 0x01, 0xc1]);
        let address = (30_000 + round) * GIB;
        let old = gib_at(30_000 + round);
        // There, or the violation would not get to the tables that the EPT needs.
        old.write(0, 0x01d);
        let gpa = guest.device.map_slot(address as u64).unwrap();
        guest.reset();
        let odd = guest.map_odd(gpa);
        guest.edit(|page| page.gprs.rdi = odd);
        let device = std::mem::ManuallyDrop::new(Device { fd: guest.device.fd });
        let (ready, go) = std::sync::mpsc::channel();
        let old = old.into_start() as usize;
        let other = std::thread::spawn(move || {
            go.recv().unwrap();
            // Some of them in the second delay: the first is before the tables are there that the leaf needs.
            std::thread::sleep(Duration::from_millis(10 + 4 * round as u64));
            drop(Map::owning(old as *mut u8, GIB));
            assert_eq!(unmap_slot(&device, address), Ok(0));
            let new = gib_at(30_000 + round);
            new.write(0, 0x5ec);
            std::thread::sleep(Duration::from_millis(100));
            drop(new);
        });
        ready.send(()).unwrap();
        let ended = loop {
            match guest.run() {
                // The slot was there, and nothing in it any more.
                Ended::Exit(exit) if exit.kind == dune_abi::EXIT_TOUCH => {}
                other => break other,
            }
        };
        other.join().unwrap();
        let counters = guest.run_page().counters;
        raced += usize::from(counters.retries > 0);
        match ended {
            Ended::Exit(exit) => assert_eq!(exit.kind, dune_abi::EXIT_NO_SLOT, "round {round}"),
            // It was quicker than the other thread.
            Ended::Call(0x01d) => {}
            other => panic!("round {round}: the guest reads memory behind a slot that is gone: {other:x?}"),
        }
    }
    if delay.is_some() {
        assert!(raced > 0, "the slot never went meanwhile: nothing was tested");
    }
}

/// Walks through three times as many GiBs as there are slots, some of them alive at any time.
fn slots_are_recycled() {
    const ALIVE: usize = 6;
    let dune = enter();
    let slots = dune.info().slots_free as usize;
    let gibs = if slots > 4096 { 4096 } else { 3 * slots };
    let mut alive = VecDeque::new();
    for number in 0..gibs {
        let map = gib_at(20_000 + number);
        map.write(0, number as u64 + 1);
        map.write(GIB - 8, !(number as u64));
        alive.push_back((number, map));
        for (number, map) in &alive {
            assert_eq!(map.read(0), *number as u64 + 1);
            assert_eq!(map.read(GIB - 8), !(*number as u64));
        }
        if alive.len() > ALIVE {
            alive.pop_front();
        }
    }
    println!("{gibs} GiBs in {slots} slots");
    dune.leave();
    assert!(alive.iter().all(|(number, map)| map.read(0) == *number as u64 + 1));
}

/// A GiB whose slot went to others is used again: new memory, with no old translation and no old protection.
fn recycled_gib_starts_anew() {
    const HOME: usize = 20_000;
    let dune = enter();
    install_probe(&dune);
    let slots = dune.info().slots_free as usize;
    let space = dune.address_space();
    for round in 0..3 {
        let home = gib_at(HOME);
        assert_eq!(load(home.address()), Ok(0), "round {round}");
        assert_eq!(store(home.address(), 5), Ok(()));
        assert_eq!(store(home.page(1), 6), Ok(()));
        // In pieces, one of which has lost its permissions.
        let page = Gva::new(home.page(1) as u64).unwrap();
        space.protect(page, PAGE as u64, Permissions::NONE).unwrap().flush();
        assert!(!load(home.page(1)).unwrap_err().host_refused);
        assert_eq!(load(home.address()), Ok(5));
        drop(home);
        for number in 0..slots + 8 {
            let other = gib_at(HOME + 1 + number);
            other.write(0, 7);
            other.write(PAGE, 8);
            assert_eq!((other.read(0), other.read(PAGE)), (7, 8));
        }
        let other = gib_at(HOME + 1);
        other.write(0, 9);
        let home = gib_at(HOME);
        assert_eq!(load(home.page(1)), Ok(0));
        assert_eq!(store(home.page(1), 10), Ok(()));
        assert_eq!(store(home.page(2), 10), Ok(()));
        assert_eq!((home.read(PAGE), other.read(0)), (10, 9));
        assert_eq!(home.read(2 << 20), 0);
    }
    dune.leave();
}
