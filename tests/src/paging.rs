// SPDX-License-Identifier: MIT OR Apache-2.0
//! Page tables of the program's own: several at once, what CPUs cache of them, copies, what the CPU notes.

use std::arch::asm;
use std::collections::BTreeSet;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::Barrier;

use libdune::edit::Missing;
use libdune::edit::RawEntry;
use libdune::edit::Shared;
use libdune::edit::WHOLE;
use libdune::paging::Used;
use libdune::Dune;
use libdune::FramePool;
use libdune::Gva;
use libdune::Hva;
use libdune::PageTable;
use libdune::Permissions;
use libdune::Thread;

use crate::framework::Need;
use crate::framework::Suite;
use crate::framework::Test;
use crate::helpers::cpu_has;
use crate::helpers::pin_to_cpu;
use crate::support::assert_no_exits;
use crate::support::compute;
use crate::support::enter;
use crate::support::eventually;
use crate::support::install_probe;
use crate::support::load;
use crate::support::store;
use crate::support::Map;
use crate::support::GIB;
use crate::support::PAGE;

pub const TESTS: &[Test] = &[
    Test::asserting(
        "page_tables_map_the_same_address_apart",
        page_tables_map_the_same_address_apart,
    ),
    Test::asserting("page_tables_switch_without_an_exit", page_tables_switch_without_an_exit),
    Test::asserting("page_tables_come_and_go", page_tables_come_and_go),
    Test::asserting("page_tables_run_out", page_tables_run_out)
        .suite(Suite::Long)
        .timeout_s(60),
    Test::asserting("missing_flush_is_noticed", missing_flush_is_noticed),
    Test::asserting("other_threads_are_shot_down", other_threads_are_shot_down)
        .needs(&[Need::Cpus(2)])
        .timeout_s(60),
    Test::asserting("changed_table_is_flushed_on_return", changed_table_is_flushed_on_return),
    Test::asserting("switch_keeps_translations", switch_keeps_translations).suite(Suite::Native),
    Test::asserting("threads_share_a_page_table", threads_share_a_page_table),
    Test::asserting("threads_use_a_gib_at_once", threads_use_a_gib_at_once),
    Test::asserting("page_table_outlives_its_handle", page_table_outlives_its_handle),
    Test::asserting("copy_on_write_keeps_writes_apart", copy_on_write_keeps_writes_apart),
    Test::asserting("snapshot_keeps_what_was_there", snapshot_keeps_what_was_there),
    Test::asserting("loaded_space_keeps_its_table", loaded_space_keeps_its_table),
    Test::asserting("snapshot_is_apart_from_writers", snapshot_is_apart_from_writers),
    Test::asserting("copied_frames_come_back", copied_frames_come_back),
    Test::asserting("dirty_scan_names_what_was_written", dirty_scan_names_what_was_written),
    Test::asserting("large_pages_split_and_merge", large_pages_split_and_merge),
    Test::asserting("pages_of_1g_split_and_merge", pages_of_1g_split_and_merge),
    Test::asserting("leaf_is_put_in_place_of_tables", leaf_is_put_in_place_of_tables),
    Test::asserting("frames_of_a_pool_are_mapped", frames_of_a_pool_are_mapped),
    Test::asserting("sealed_table_fills_nothing_in", sealed_table_fills_nothing_in),
    Test::asserting("page_table_outlives_dune_mode", page_table_outlives_dune_mode),
    Test::asserting("permissions_outlive_munmap", permissions_outlive_munmap),
];

const BYTES: u64 = PAGE as u64;
const LARGE: usize = 2 << 20;
/// A GVA that the process does not have.
const ELSEWHERE: usize = 0xffff_9000_0000_0000;
/// Where Linux maps nothing by itself.
const UNUSED: usize = 0x2000_0000_0000;
const CR4_PCIDE: u64 = 1 << 17;

fn gva(address: usize) -> Gva {
    Gva::new(address as u64).unwrap()
}

fn hva(address: usize) -> Hva {
    Hva::new(address as u64).unwrap()
}

/// CR3 and CR4 of the calling thread, at CPL0.
fn control_registers() -> (u64, u64) {
    let (cr3, cr4): (u64, u64);
    // SAFETY: both may be read at CPL0.
    unsafe { asm!("mov {}, cr3", "mov {}, cr4", out(reg) cr3, out(reg) cr4, options(nomem, nostack)) };
    (cr3, cr4)
}

fn page_tables_map_the_same_address_apart() {
    const TABLES: usize = 8;
    let map = Map::new((TABLES + 1) * PAGE);
    let dune = enter();
    install_probe(&dune);
    let first = dune.address_space();
    let (cr3, cr4) = control_registers();
    assert_eq!(cr3, first.root().as_u64());
    let tables: Vec<PageTable> = (0..TABLES)
        .map(|index| {
            map.write(index * PAGE, 100 + index as u64);
            let table = if index % 2 == 0 {
                dune.new_page_table()
            } else {
                first.duplicate()
            };
            let table = table.unwrap();
            table
                .map(gva(ELSEWHERE), BYTES, hva(map.page(index)), Permissions::WRITE)
                .unwrap()
                .ignore();
            table
        })
        .collect();
    let mut seen = BTreeSet::new();
    for round in 0..3 {
        for (index, table) in tables.iter().enumerate() {
            // SAFETY: maps what the default table does.
            unsafe { dune.load(table) };
            assert!(table.is_loaded() && !first.is_loaded());
            let (cr3, _) = control_registers();
            assert_eq!(cr3 & !0xfff, table.root().as_u64());
            seen.insert(cr3 & 0xfff);
            let expected = 100 + index as u64 + 1000 * round;
            assert_eq!(load(ELSEWHERE), Ok(expected));
            assert_eq!(store(ELSEWHERE, expected + 1000), Ok(()));
            // The process' memory is the same in all.
            assert_eq!(map.read(index * PAGE), expected + 1000);
            assert_ne!(std::process::id(), 0);
        }
    }
    // SAFETY: the table that the thread started with.
    unsafe { dune.load(&first) };
    assert!(load(ELSEWHERE).is_err());
    // Each table has a PCID of its own where there are any.
    assert_eq!(cr4 & CR4_PCIDE != 0, cpu_has("pcid"));
    let expected = if cr4 & CR4_PCIDE != 0 { TABLES } else { 1 };
    assert_eq!(seen.len(), expected, "{seen:?}");
    drop(tables);
    dune.leave();
}

fn page_tables_switch_without_an_exit() {
    let dune = enter();
    let first = dune.address_space();
    let second = first.duplicate().unwrap();
    assert_no_exits(&dune, || {
        for _ in 0..100 {
            // SAFETY: they map the same.
            unsafe {
                dune.load(&second);
                dune.load(&first);
            }
        }
    });
    drop(second);
    dune.leave();
}

fn page_tables_come_and_go() {
    let map = Map::new(2 * PAGE);
    map.write(0, 5);
    let dune = enter();
    install_probe(&dune);
    let first = dune.address_space();
    // A number that comes again has nothing left of the table before.
    for round in 0..200u64 {
        let table = dune.new_page_table().unwrap();
        let page = gva(ELSEWHERE);
        if round % 2 == 0 {
            table
                .map(page, BYTES, hva(map.page(0)), Permissions::READ)
                .unwrap()
                .ignore();
        }
        if round % 50 < 2 {
            // SAFETY: maps what the default table does.
            unsafe { dune.load(&table) };
            assert_eq!(load(ELSEWHERE).ok(), (round % 2 == 0).then_some(5), "round {round}");
            // SAFETY: the table that the thread started with.
            unsafe { dune.load(&first) };
        }
    }
    dune.leave();
}

fn page_tables_run_out() {
    let dune = enter();
    let many: Vec<PageTable> = std::iter::from_fn(|| dune.new_page_table().ok()).take(4096).collect();
    assert_eq!(many.len(), 4095);
    assert!(matches!(dune.new_page_table(), Err(libdune::PagingError::OutOfTables)));
    drop(many);
    dune.new_page_table().unwrap();
    dune.leave();
}

/// How often of 40 times a page could still be read after it was protected.
fn stale_reads(flush: impl Fn(libdune::paging::Flush<'_>)) -> usize {
    let map = Map::new(PAGE);
    map.write(0, 1);
    let dune = enter();
    install_probe(&dune);
    let space = dune.address_space();
    let page = gva(map.page(0));
    let stale = (0..40)
        .filter(|_| {
            space.protect(page, BYTES, Permissions::ALL).unwrap().flush();
            assert_eq!(load(map.page(0)), Ok(1));
            flush(space.protect(page, BYTES, Permissions::NONE).unwrap());
            load(map.page(0)).is_ok()
        })
        .count();
    space.protect(page, BYTES, Permissions::ALL).unwrap().flush();
    dune.leave();
    stale
}

fn missing_flush_is_noticed() {
    assert_eq!(stale_reads(|flush| flush.flush()), 0);
    assert_eq!(stale_reads(|flush| flush.flush_local()), 0);
    assert_ne!(
        stale_reads(|flush| flush.ignore()),
        0,
        "this CPU caches nothing: the test cannot fail"
    );
}

static ROUND: AtomicU64 = AtomicU64::new(0);
static READS: AtomicU64 = AtomicU64::new(0);
static FLUSHED: AtomicU64 = AtomicU64::new(0);
static STALE: AtomicU64 = AtomicU64::new(0);

/// In how many of 20 rounds another CPU could read a page after it was protected and flushed.
fn stale_elsewhere(flush: impl Fn(libdune::paging::Flush<'_>)) -> u64 {
    const ROUNDS: u64 = 20;
    for counter in [&ROUND, &READS, &FLUSHED, &STALE] {
        counter.store(0, SeqCst);
    }
    let map = Map::new(PAGE);
    let dune = enter();
    install_probe(&dune);
    let address = map.page(0);
    let reader = std::thread::spawn(move || {
        pin_to_cpu(1).unwrap();
        for round in 1..=ROUNDS {
            while ROUND.load(SeqCst) != round {
                std::hint::spin_loop();
            }
            loop {
                // Before the read: what is read after the flush is stale.
                let is_flushed = FLUSHED.load(SeqCst) == round;
                match load(address) {
                    Err(_) => break,
                    Ok(_) if is_flushed => {
                        STALE.fetch_add(1, SeqCst);
                        break;
                    }
                    Ok(_) => READS.fetch_add(1, SeqCst),
                };
            }
            ROUND.store(u64::MAX, SeqCst);
        }
    });
    pin_to_cpu(0).unwrap();
    let space = dune.address_space();
    let page = gva(address);
    for round in 1..=ROUNDS {
        space.protect(page, BYTES, Permissions::ALL).unwrap().flush();
        READS.store(0, SeqCst);
        ROUND.store(round, SeqCst);
        while READS.load(SeqCst) < 50 {
            std::hint::spin_loop();
        }
        flush(space.protect(page, BYTES, Permissions::NONE).unwrap());
        FLUSHED.store(round, SeqCst);
        while ROUND.load(SeqCst) != u64::MAX {
            std::hint::spin_loop();
        }
    }
    reader.join().unwrap();
    space.protect(page, BYTES, Permissions::ALL).unwrap().flush();
    dune.leave();
    STALE.load(SeqCst)
}

fn other_threads_are_shot_down() {
    assert_eq!(stale_elsewhere(|flush| flush.flush()), 0);
    assert_ne!(
        stale_elsewhere(|flush| flush.flush_local()),
        0,
        "nobody sees a missing shootdown: the test cannot fail"
    );
}

fn changed_table_is_flushed_on_return() {
    let map = Map::new(2 * PAGE);
    map.write(0, 1);
    map.write(PAGE, 2);
    let dune = enter();
    install_probe(&dune);
    let first = dune.address_space();
    let second = first.duplicate().unwrap();
    for round in 0..20 {
        let (old, new) = (round % 2, (round + 1) % 2);
        second
            .map(gva(ELSEWHERE), BYTES, hva(map.page(old)), Permissions::READ)
            .unwrap()
            .flush();
        // SAFETY: a duplicate.
        unsafe { dune.load(&second) };
        assert_eq!(load(ELSEWHERE), Ok(old as u64 + 1));
        // SAFETY: the table that the thread started with.
        unsafe { dune.load(&first) };
        // Not loaded: nothing to be flushed now, but when it is loaded again.
        second
            .map(gva(ELSEWHERE), BYTES, hva(map.page(new)), Permissions::READ)
            .unwrap()
            .flush();
        // SAFETY: as above.
        unsafe { dune.load(&second) };
        assert_eq!(load(ELSEWHERE), Ok(new as u64 + 1));
        // SAFETY: as above.
        unsafe { dune.load(&first) };
    }
    drop(second);
    dune.leave();
}

/// With PCIDs; the emulated CPU has them and forgets all the same.
fn switch_keeps_translations() {
    let map = Map::new(PAGE);
    map.write(0, 1);
    let dune = enter();
    install_probe(&dune);
    let first = dune.address_space();
    let second = first.duplicate().unwrap();
    let page = gva(map.page(0));
    let kept = (0..40)
        .filter(|_| {
            first.protect(page, BYTES, Permissions::ALL).unwrap().flush();
            assert_eq!(load(map.page(0)), Ok(1));
            // What is left out here shows what the TLB kept.
            first.protect(page, BYTES, Permissions::NONE).unwrap().ignore();
            // SAFETY: a duplicate, and the table that the thread started with.
            unsafe {
                dune.load(&second);
                dune.load(&first);
            }
            load(map.page(0)).is_ok()
        })
        .count();
    first.protect(page, BYTES, Permissions::ALL).unwrap().flush();
    drop(second);
    dune.leave();
    assert_ne!(kept, 0, "a switch forgot what the TLB had");
}

fn threads_share_a_page_table() {
    const THREADS: usize = 3;
    let map = Map::new(64 * PAGE);
    let dune = enter();
    install_probe(&dune);
    let table = dune.new_page_table().unwrap();
    let start = Barrier::new(THREADS);
    std::thread::scope(|scope| {
        for index in 0..THREADS {
            let (table, start, pages) = (&table, &start, map.address());
            scope.spawn(move || {
                Thread::with_current(|thread| {
                    // SAFETY: maps what the default table does.
                    unsafe { thread.load(table) };
                    start.wait();
                    for round in 0..50usize {
                        // Neighbouring pages of one table page, each thread its own.
                        let page = (round * THREADS + index) % 60;
                        let at = ELSEWHERE + (page * THREADS + index) * PAGE;
                        table
                            .map(gva(at), BYTES, hva(pages + page * PAGE), Permissions::WRITE)
                            .unwrap()
                            .flush();
                        assert_eq!(store(at, round as u64), Ok(()));
                        table.unmap(gva(at), BYTES).unwrap().flush();
                        assert!(load(at).is_err());
                    }
                    // SAFETY: the table that the thread started with.
                    unsafe { thread.load(&thread.address_space()) };
                })
                .unwrap();
            });
        }
    });
    drop(table);
    dune.leave();
}

/// One of them fills in the page table; the fault of the other must not be taken for the program's.
fn threads_use_a_gib_at_once() {
    const GIBS: usize = 24;
    let maps: Vec<_> = (0..GIBS)
        .map(|gib| Map::try_at(UNUSED + gib * GIB, PAGE).unwrap())
        .collect();
    let pages: Vec<_> = maps.iter().map(Map::address).collect();
    let dune = enter();
    let turn = AtomicUsize::new(0);
    let touch_all = |late: usize| {
        for (gib, page) in pages.iter().enumerate() {
            // Both are here, and go on within a few instructions of each other.
            turn.fetch_add(1, SeqCst);
            while turn.load(SeqCst) < 2 * (gib + 1) {
                std::hint::spin_loop();
            }
            std::hint::black_box(compute((late * gib) as u64 % 8));
            // SAFETY: this test's memory, which nobody writes.
            assert_eq!(unsafe { (*page as *const u64).read_volatile() }, 0);
        }
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(|| touch_all(0));
        touch_all(1);
        other.join().unwrap();
    });
    dune.leave();
}

fn page_table_outlives_its_handle() {
    let map = Map::new(PAGE);
    map.write(0, 7);
    let dune = enter();
    install_probe(&dune);
    let first = dune.address_space();
    let table = dune.new_page_table().unwrap();
    table
        .map(gva(ELSEWHERE), BYTES, hva(map.page(0)), Permissions::READ)
        .unwrap()
        .ignore();
    // SAFETY: maps what the default table does.
    unsafe { dune.load(&table) };
    drop(table);
    // What would reuse its pages.
    let other = dune.new_page_table().unwrap();
    assert_eq!(load(ELSEWHERE), Ok(7));
    // A thread starts with its maker's table, and keeps it too.
    let (told, tell) = (Barrier::new(2), Barrier::new(2));
    std::thread::scope(|scope| {
        let child = scope.spawn(|| {
            assert_eq!(load(ELSEWHERE), Ok(7));
            told.wait();
            tell.wait();
            let tables: Vec<PageTable> =
                Thread::with_current(|thread| (0..8).map(|_| thread.new_page_table().unwrap()).collect()).unwrap();
            assert_eq!(load(ELSEWHERE), Ok(7));
            drop(tables);
        });
        told.wait();
        // SAFETY: the table that the thread started with.
        unsafe { dune.load(&first) };
        assert!(load(ELSEWHERE).is_err());
        tell.wait();
        child.join().unwrap();
    });
    drop(other);
    dune.leave();
}

fn copy_on_write_keeps_writes_apart() {
    const PAGES: usize = 8;
    let map = Map::new(PAGES * PAGE);
    for page in 0..PAGES {
        map.write(page * PAGE, page as u64);
    }
    let dune = enter();
    install_probe(&dune);
    let pool = FramePool::new().unwrap();
    let first = dune.address_space();
    let second = first.duplicate().unwrap();
    second
        .copy_on_write(gva(map.page(0)), (PAGES * PAGE) as u64, &pool)
        .unwrap()
        .ignore();
    // Nothing is copied before it is written to, and what the process writes is seen.
    assert_eq!(pool.used(), 0);
    map.write(PAGE, 11);
    // SAFETY: a duplicate.
    unsafe { dune.load(&second) };
    assert_eq!(load(map.page(1)), Ok(11));
    assert_eq!(store(map.page(1) + 8, 99), Ok(()));
    assert_eq!(store(map.page(3), 33), Ok(()));
    assert_eq!(load(map.page(1)), Ok(11));
    assert_eq!(load(map.page(1) + 8), Ok(99));
    assert_eq!(load(map.page(3)), Ok(33));
    assert_eq!(pool.used(), 2);
    let moved = second.look_up(gva(map.page(3))).unwrap();
    assert!(!moved.copied_on_write && moved.permissions.contains(Permissions::WRITE));
    assert!(second.look_up(gva(map.page(4))).unwrap().copied_on_write);
    // A page that may only be read stays so.
    second
        .protect(gva(map.page(5)), BYTES, Permissions::READ)
        .unwrap()
        .flush();
    assert_eq!(store(map.page(5), 1).unwrap_err().error_code & 3, 3);
    // SAFETY: the table that the thread started with.
    unsafe { dune.load(&first) };
    for page in 0..PAGES {
        let expected = if page == 1 { 11 } else { page as u64 };
        assert_eq!(map.read(page * PAGE), expected);
        assert_eq!(map.read(page * PAGE + 8), 0);
    }
    // Back there: the copies are still there, and what has none shows the process' memory.
    map.write(3 * PAGE, 1000);
    map.write(4 * PAGE, 2000);
    // SAFETY: a duplicate.
    unsafe { dune.load(&second) };
    assert_eq!((load(map.page(3)), load(map.page(4))), (Ok(33), Ok(2000)));
    // SAFETY: the table that the thread started with.
    unsafe { dune.load(&first) };
    drop(second);
    assert_eq!(pool.used(), 0);
    dune.leave();
}

fn snapshot_keeps_what_was_there() {
    const PAGES: usize = 6;
    let map = Map::new(PAGES * PAGE);
    let dune = enter();
    install_probe(&dune);
    let pool = FramePool::new().unwrap();
    let first = dune.address_space();
    // Not the default table: what it copies Linux does not see.
    let work = first.duplicate().unwrap();
    // SAFETY: a duplicate.
    unsafe { dune.load(&work) };
    let write_all = |value: u64| {
        for page in 0..PAGES {
            assert_eq!(store(map.page(page), value + page as u64), Ok(()));
        }
    };
    let assert_all = |value: u64| {
        for page in 0..PAGES {
            assert_eq!(load(map.page(page)), Ok(value + page as u64), "page {page}");
        }
    };
    write_all(100);
    let old = work.snapshot(gva(map.page(0)), (PAGES * PAGE) as u64, &pool).unwrap();
    write_all(200);
    let middle = work.snapshot(gva(map.page(0)), (PAGES * PAGE) as u64, &pool).unwrap();
    write_all(300);
    assert_all(300);
    for (table, value) in [(&old, 100), (&middle, 200), (&work, 300), (&old, 100)] {
        // SAFETY: duplicates.
        unsafe { dune.load(table) };
        assert_all(value);
    }
    // A snapshot can be written to as well.
    write_all(400);
    for (table, value) in [(&middle, 200), (&work, 300), (&old, 400)] {
        // SAFETY: duplicates.
        unsafe { dune.load(table) };
        assert_all(value);
    }
    // SAFETY: the table that the thread started with.
    unsafe { dune.load(&first) };
    assert_all(100);
    drop(middle);
    drop(work);
    drop(old);
    assert_eq!(pool.used(), 0);
    dune.leave();
}

/// What another thread writes while the snapshot is made is in it or not; nothing of what it writes later is.
fn snapshot_is_apart_from_writers() {
    const PAGES: usize = 8;
    const ROUNDS: usize = 40;
    let map = Map::new(PAGES * PAGE);
    let dune = enter();
    let pool = FramePool::new().unwrap();
    let first = dune.address_space();
    let work = first.duplicate().unwrap();
    // SAFETY: a duplicate.
    unsafe { dune.load(&work) };
    let stop = AtomicBool::new(false);
    let start = map.page(0);
    // SAFETY: our own pages, in every table.
    let word = |page: usize| unsafe { AtomicU64::from_ptr((start + page * PAGE) as *mut u64) };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Relaxed) {
                for page in 0..PAGES {
                    word(page).fetch_add(1, Relaxed);
                }
            }
        });
        let all = || -> Vec<u64> { (0..PAGES).map(|page| word(page).load(Relaxed)).collect() };
        for round in 0..ROUNDS {
            let kept = work.snapshot(gva(map.page(0)), (PAGES * PAGE) as u64, &pool).unwrap();
            // SAFETY: a duplicate.
            unsafe { dune.load(&kept) };
            let then = all();
            // SAFETY: a duplicate.
            unsafe { dune.load(&work) };
            let now = all();
            // The writer goes on.
            while (0..PAGES).any(|page| word(page).load(Relaxed) < now[page] + 3) {
                std::thread::yield_now();
            }
            // SAFETY: a duplicate.
            unsafe { dune.load(&kept) };
            assert_eq!(all(), then, "round {round}");
            // SAFETY: a duplicate.
            unsafe { dune.load(&work) };
        }
        stop.store(true, Relaxed);
    });
    // SAFETY: the table that the thread started with.
    unsafe { dune.load(&first) };
    drop(work);
    // The writer's thread has the table until it is gone.
    assert!(eventually(|| pool.used() == 0));
    dune.leave();
}

/// What a thread says of its page table stays true when it has another one, and nobody else has it.
fn loaded_space_keeps_its_table() {
    let map = Map::new(PAGE);
    map.write(0, 7);
    let dune = enter();
    let pool = FramePool::new().unwrap();
    let first = dune.address_space();
    let table = first.duplicate().unwrap();
    table.copy_on_write(gva(map.page(0)), BYTES, &pool).unwrap().ignore();
    // SAFETY: A duplicate, then the table that the thread started with.
    let space = unsafe {
        dune.load(&table);
        map.write(0, 8);
        let space = dune.thread().current_address_space();
        dune.load(&first);
        space
    };
    drop(table);
    assert_eq!(pool.used(), 1);
    let there = space.look_up(gva(map.page(0))).unwrap();
    assert_ne!(there.gpa, first.look_up(gva(map.page(0))).unwrap().gpa);
    drop(space);
    assert_eq!(pool.used(), 0);
    assert_eq!(map.read(0), 7);
    dune.leave();
}

fn copied_frames_come_back() {
    const PAGES: usize = 4;
    let map = Map::new(PAGES * PAGE);
    let dune = enter();
    install_probe(&dune);
    let pool = FramePool::new().unwrap();
    let first = dune.address_space();
    let work = first.duplicate().unwrap();
    // SAFETY: a duplicate.
    unsafe { dune.load(&work) };
    let range = (gva(map.page(0)), (PAGES * PAGE) as u64);
    for round in 0..100 {
        let kept = work.snapshot(range.0, range.1, &pool).unwrap();
        for page in 0..PAGES {
            assert_eq!(store(map.page(page), round), Ok(()));
        }
        assert!(
            pool.used() <= 2 * PAGES as u64,
            "{} frames after {round} rounds",
            pool.used()
        );
        drop(kept);
        assert_eq!(pool.used(), PAGES as u64);
        // Nobody has the frame any more: the write needs no copy.
        assert_eq!(store(map.page(1), round), Ok(()));
        assert_eq!(pool.used(), PAGES as u64);
    }
    work.unmap(gva(map.page(0)), BYTES).unwrap().flush();
    assert_eq!(pool.used(), PAGES as u64 - 1);
    work.map(gva(map.page(1)), BYTES, hva(map.page(1)), Permissions::ALL)
        .unwrap()
        .flush();
    assert_eq!(pool.used(), PAGES as u64 - 2);
    // SAFETY: the table that the thread started with.
    unsafe { dune.load(&first) };
    drop(work);
    assert_eq!(pool.used(), 0);
    dune.leave();
}

fn dirty_scan_names_what_was_written() {
    const PAGES: usize = 600;
    let map = Map::new(PAGES * PAGE);
    for page in 0..PAGES {
        map.write(page * PAGE, 1);
    }
    let dune = enter();
    install_probe(&dune);
    let space = dune.address_space();
    let (start, bytes) = (gva(map.page(0)), (PAGES * PAGE) as u64);
    let page_of = |at: Gva| (at.as_u64() - start.as_u64()) as usize / PAGE;
    let take = |used| {
        let mut pages = BTreeSet::new();
        let mut dirty = BTreeSet::new();
        space
            .take_used(start, bytes, used, |page| {
                assert_eq!(page.bytes, BYTES);
                assert!(pages.insert(page_of(page.start)));
                if page.is_dirty {
                    dirty.insert(page_of(page.start));
                }
            })
            .unwrap()
            .flush();
        (pages, dirty)
    };
    space.clear_accessed_dirty(start, bytes).unwrap().flush();
    assert_eq!(take(Used::Both).0.len(), 0);
    for round in 0..4 {
        let written: BTreeSet<usize> = (0..PAGES).filter(|page| page * 7 % 13 == round).collect();
        let read: BTreeSet<usize> = (0..PAGES).filter(|page| page * 7 % 13 == round + 4).collect();
        for page in &written {
            map.write(page * PAGE, 2);
        }
        for page in &read {
            map.read(page * PAGE);
        }
        let mut seen = 0;
        space.read_used(start, bytes, Used::Dirty, |_| seen += 1).unwrap();
        assert_eq!(seen, written.len());
        let (used, dirty) = take(Used::Both);
        assert_eq!(dirty, written, "round {round}");
        assert_eq!(used, &written | &read, "round {round}");
        assert_eq!(take(Used::Both).0.len(), 0);
    }
    // Without the flush the CPU does not note a second write, if it has not dropped the translation by itself: one page of
    // many shares its place in the TLB with what the scan touches.
    let mut missed = 0;
    for page in (0..PAGES).step_by(29) {
        map.write(page * PAGE, 3);
        space.take_used(start, bytes, Used::Dirty, |_| {}).unwrap().ignore();
        map.write(page * PAGE, 4);
        let (_, dirty) = take(Used::Dirty);
        missed += usize::from(!dirty.contains(&page));
    }
    assert_ne!(missed, 0, "nobody sees a missing flush: the test cannot fail");
    dune.leave();
}

fn large_pages_split_and_merge() {
    let map = Map::new(3 * LARGE);
    let start = map.address().next_multiple_of(LARGE);
    for page in 0..512 {
        map.write(start - map.address() + page * PAGE, page as u64);
    }
    let dune = enter();
    install_probe(&dune);
    let space = dune.address_space();
    let large = LARGE as u64;
    space
        .map(gva(ELSEWHERE), large, hva(start), Permissions::WRITE)
        .unwrap()
        .flush();
    let page_bytes = |offset: usize| space.look_up(gva(ELSEWHERE + offset)).unwrap().page_bytes;
    let assert_reads = || {
        for page in (0..512).step_by(17) {
            assert_eq!(load(ELSEWHERE + page * PAGE), Ok(page as u64));
        }
    };
    assert_eq!(page_bytes(0), large);
    assert_reads();
    for round in 0..5 {
        let at = ELSEWHERE + 100 * PAGE;
        space.protect(gva(at), BYTES, Permissions::READ).unwrap().flush();
        assert_eq!(page_bytes(0), BYTES);
        assert_eq!(store(at, 1).unwrap_err().error_code & 3, 3);
        assert_eq!(store(at + PAGE, 101), Ok(()));
        assert_reads();
        // Not alike: they stay apart.
        assert_eq!(space.merge(gva(ELSEWHERE), large), Ok(0));
        space.protect(gva(at), BYTES, Permissions::WRITE).unwrap().flush();
        space.clear_accessed_dirty(gva(ELSEWHERE), large).unwrap().flush();
        if round % 2 == 0 {
            assert_eq!(store(at, 100), Ok(()));
        }
        assert_eq!(space.merge(gva(ELSEWHERE), large), Ok(1));
        assert_eq!(page_bytes(100 * PAGE), large);
        assert_eq!(space.look_up(gva(ELSEWHERE)).unwrap().dirty, round % 2 == 0);
        assert_eq!(store(at, 100), Ok(()));
        assert!(space.look_up(gva(ELSEWHERE)).unwrap().dirty);
        assert_reads();
    }
    space.unmap(gva(ELSEWHERE), large).unwrap().flush();
    assert!(load(ELSEWHERE).is_err());
    dune.leave();
}

/// A whole GiB of the process, with three words in it: at its start, in the middle and at its end.
fn sparse_gib() -> (Map, usize, [usize; 3]) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let map = Map::at(0, 2 * GIB, libc::PROT_READ | libc::PROT_WRITE, flags);
    let start = map.address().next_multiple_of(GIB);
    let offsets = [0, GIB / 2 + 8, GIB - 8];
    for offset in offsets {
        map.write(start - map.address() + offset, offset as u64);
    }
    (map, start, offsets)
}

/// Mapped at once, split where a page or 2 MiB of it differ, and merged again, level by level. A CPU without pages of 1 GiB has
/// 512 leaves of 2 MiB.
fn pages_of_1g_split_and_merge() {
    let (map, start, offsets) = sparse_gib();
    let dune = enter();
    install_probe(&dune);
    let space = dune.address_space();
    let largest = if space.largest_leaf() == 3 { GIB } else { LARGE } as u64;
    assert_eq!(largest == GIB as u64, cpu_has("pdpe1gb"));
    let all = GIB as u64;
    space
        .map(gva(ELSEWHERE), all, hva(start), Permissions::WRITE)
        .unwrap()
        .flush();
    let page_bytes = |offset: usize| space.look_up(gva(ELSEWHERE + offset)).unwrap().page_bytes;
    let assert_all = |bytes| assert_eq!([0, GIB / 2, GIB - PAGE].map(page_bytes), [bytes; 3]);
    let assert_reads = || {
        for offset in offsets {
            assert_eq!(load(ELSEWHERE + offset), Ok(offset as u64));
        }
    };
    assert_all(largest);
    assert_reads();
    for round in 0..2u64 {
        // A page by itself: its 2 MiB are split, and what is around them stays of 2 MiB.
        let page = offsets[1] - offsets[1] % PAGE;
        let at = gva(ELSEWHERE + page);
        space.protect(at, BYTES, Permissions::READ).unwrap().flush();
        assert_eq!(
            (page_bytes(page), page_bytes(page + PAGE), page_bytes(page + LARGE)),
            (BYTES, BYTES, LARGE as u64)
        );
        assert_eq!(store(ELSEWHERE + page, 1).unwrap_err().error_code & 3, 3);
        assert_eq!(store(ELSEWHERE + page + PAGE, round), Ok(()));
        assert_eq!(load(start + page + PAGE), Ok(round));
        assert_reads();
        // Not alike: nothing of that page's becomes one.
        assert_eq!(space.merge(gva(ELSEWHERE), all), Ok(0));
        space.protect(at, BYTES, Permissions::WRITE).unwrap().flush();
        // 512 of 4 KiB; then 512 of 2 MiB.
        let merged = if largest == GIB as u64 { 2 } else { 1 };
        assert_eq!(space.merge(gva(ELSEWHERE), all), Ok(merged));
        assert_all(largest);
        assert_eq!(store(ELSEWHERE + page, 7), Ok(()));
        assert_eq!(load(start + page), Ok(7));
        assert_reads();
    }
    // 2 MiB out of the middle.
    let large = ELSEWHERE + 5 * LARGE;
    space.unmap(gva(large), LARGE as u64).unwrap().flush();
    assert!(load(large).is_err() && load(large + LARGE - 8).is_err());
    assert_eq!((load(large - 8), load(large + LARGE)), (Ok(0), Ok(0)));
    assert_eq!(space.merge(gva(ELSEWHERE), all), Ok(0));
    assert_reads();
    space.unmap(gva(ELSEWHERE), all).unwrap().flush();
    assert!(offsets.iter().all(|offset| load(ELSEWHERE + offset).is_err()));
    dune.leave();
    drop(map);
}

/// By a program that edits entries itself: a leaf goes where tables were, on both levels, while others look at entries
/// there; and into a larger leaf of its own.
fn leaf_is_put_in_place_of_tables() {
    const LEAF: u64 = 1 | 1 << 1 | 1 << 7 | WHOLE;
    const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
    const ROUNDS: u64 = 200;
    let (map, start, offsets) = sparse_gib();
    let shared = Shared::keep(&Dune::builder()).unwrap();
    let dune = enter();
    install_probe(&dune);
    let space = dune.address_space();
    let gpa = shared.gpa(hva(start)).unwrap().as_u64();
    let at = gva(ELSEWHERE);
    space
        .map(at, GIB as u64, hva(start), Permissions::WRITE)
        .unwrap()
        .flush();
    let stop = AtomicBool::new(false);
    let looked = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let space = shared.address_space();
            while !stop.load(Relaxed) {
                // An entry of 4 KiB in a table that comes and goes, but not while it is lent; what is not there is made.
                let page = |entry: RawEntry<'_>| {
                    let before = entry.word.load(Relaxed);
                    for _ in 0..3 {
                        std::thread::yield_now();
                    }
                    (before & ADDRESS, entry.word.load(Relaxed) & ADDRESS)
                };
                assert_eq!(space.with_entry(at, 1, Missing::Make, page), Ok((gpa, gpa)));
                looked.fetch_add(1, Relaxed);
            }
        });
        for round in 0..ROUNDS {
            // Two tables more.
            space.protect(at, BYTES, Permissions::READ).unwrap().flush();
            assert!(store(ELSEWHERE, 1).is_err());
            assert_eq!(space.replace_table(at, 2, gpa | LEAF & !WHOLE), Ok(0), "round {round}");
            assert_eq!(store(ELSEWHERE, 0), Ok(()));
            if round % 8 == 0 {
                std::thread::yield_now();
            }
        }
        assert!(eventually(|| looked.load(Relaxed) > 0));
        stop.store(true, Relaxed);
    });
    if space.largest_leaf() == 3 {
        assert_eq!(space.replace_table(at, 3, gpa | LEAF), Ok(0));
        assert_eq!(space.look_up(at).unwrap().page_bytes, GIB as u64);
        assert!(offsets
            .iter()
            .all(|offset| load(ELSEWHERE + offset) == Ok(*offset as u64)));
        // 2 MiB of it are other memory: where the third word is.
        let second = offsets[1] / LARGE * LARGE;
        let third = (GIB - LARGE) as u64;
        let put = space.replace_table(gva(ELSEWHERE + second), 2, (gpa + third) | LEAF);
        assert_eq!(put.map(|old| old & 1), Ok(1));
        space.flush(at, GIB as u64);
        assert_eq!(load(ELSEWHERE + second + LARGE - 8), Ok(offsets[2] as u64));
        assert_eq!(load(ELSEWHERE), Ok(0));
        assert_eq!(load(ELSEWHERE + offsets[2]), Ok(offsets[2] as u64));
    }
    space.unmap(at, GIB as u64).unwrap().flush();
    dune.leave();
    drop(map);
}

/// Memory that only page tables give a meaning: frames of a pool, at addresses of the program's choice.
fn frames_of_a_pool_are_mapped() {
    const FRAMES: usize = 8;
    let dune = enter();
    install_probe(&dune);
    let pool = FramePool::new().unwrap();
    let first = dune.address_space();
    let second = first.duplicate().unwrap();
    let frames: Vec<Hva> = (0..FRAMES).map(|_| pool.allocate().unwrap()).collect();
    assert_eq!(pool.used(), FRAMES as u64);
    let page = |index: usize| ELSEWHERE + index * PAGE;
    for (index, frame) in frames.iter().enumerate() {
        // In the other order in the second table.
        first
            .map(gva(page(index)), BYTES, *frame, Permissions::WRITE)
            .unwrap()
            .flush();
        let mirrored = gva(page(FRAMES - 1 - index));
        second.map(mirrored, BYTES, *frame, Permissions::READ).unwrap().flush();
        assert_eq!(load(page(index)), Ok(0));
        assert_eq!(store(page(index), 40 + index as u64), Ok(()));
        assert_eq!(load(frame.as_u64() as usize), Ok(40 + index as u64));
        assert_eq!(first.hva(gva(page(index))), Some(*frame));
    }
    // SAFETY: a duplicate, then the table that the thread started with.
    let (words, refused) = unsafe {
        dune.load(&second);
        let words: Vec<_> = (0..FRAMES).map(|index| load(page(index))).collect();
        let refused = store(page(0), 1).is_err();
        dune.load(&first);
        (words, refused)
    };
    assert!(refused);
    assert_eq!(
        words,
        (0..FRAMES).map(|index| Ok(47 - index as u64)).collect::<Vec<_>>()
    );
    drop(second);
    first.unmap(gva(page(0)), (FRAMES * PAGE) as u64).unwrap().flush();
    for frame in frames {
        // SAFETY: Mapped nowhere any more, and flushed.
        unsafe { pool.free(frame) };
    }
    assert_eq!(pool.used(), 0);
    // The next one is clean again.
    let frame = pool.allocate().unwrap();
    assert_eq!(load(frame.as_u64() as usize), Ok(0));
    // SAFETY: Never mapped.
    unsafe { pool.free(frame) };
    dune.leave();
}

/// They are the address's until they are given back: what Linux maps there next has them.
fn permissions_outlive_munmap() {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // So that the GiB is not forgotten as a whole.
    let neighbour = Map::at(UNUSED + PAGE, PAGE, protection, 0);
    neighbour.write(0, 1);
    let dune = enter();
    install_probe(&dune);
    let space = dune.address_space();
    let protect = |permissions| space.protect(gva(UNUSED), BYTES, permissions).unwrap().flush();
    let read_only = |map: &Map| {
        let fault = store(map.address(), 2).expect_err("a store to a page without WRITE");
        assert_eq!((fault.error_code, fault.address), (3, UNUSED as u64));
    };
    let map = Map::at(UNUSED, PAGE, protection, 0);
    map.write(0, 1);
    protect(Permissions::READ);
    read_only(&map);
    drop(map);
    let map = Map::at(UNUSED, PAGE, protection, 0);
    assert_eq!(load(map.address()), Ok(0));
    read_only(&map);
    protect(Permissions::ALL);
    drop(map);
    let map = Map::at(UNUSED, PAGE, protection, 0);
    assert_eq!(store(map.address(), 2), Ok(()));
    drop((map, neighbour));
    dune.leave();
}

fn sealed_table_fills_nothing_in() {
    // A GiB that nothing else is in, and far from what a fresh table has around libdune's code.
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let map = Map::at(0, 3 << 30, libc::PROT_READ | libc::PROT_WRITE, flags);
    let offset = map.address().next_multiple_of(1 << 30) - map.address();
    map.write(offset, 3);
    let dune = enter();
    install_probe(&dune);
    let first = dune.address_space();
    let open = dune.new_page_table().unwrap();
    let sealed = dune.new_page_table().unwrap();
    sealed.seal().unwrap();
    // SAFETY: they map what the default table does for code and stack.
    unsafe { dune.load(&open) };
    let in_open = load(map.address() + offset);
    // SAFETY: as above.
    unsafe { dune.load(&sealed) };
    let in_sealed = load(map.address() + offset);
    sealed
        .map(
            gva(map.address() + offset),
            BYTES,
            hva(map.address() + offset),
            Permissions::READ,
        )
        .unwrap()
        .flush();
    let mapped = load(map.address() + offset);
    // SAFETY: the table that the thread started with.
    unsafe { dune.load(&first) };
    assert_eq!(in_open, Ok(3));
    let fault = in_sealed.unwrap_err();
    assert_eq!((fault.error_code & 1, fault.host_refused), (0, false));
    assert_eq!(mapped, Ok(3));
    drop((open, sealed));
    dune.leave();
}

fn page_table_outlives_dune_mode() {
    let map = Map::new(PAGE);
    map.write(0, 9);
    let dune = enter();
    let table = dune.address_space().duplicate().unwrap();
    table
        .map(gva(ELSEWHERE), BYTES, hva(map.page(0)), Permissions::READ)
        .unwrap()
        .ignore();
    dune.leave();
    // An ordinary thread can change it, and a Dune thread of later have it.
    assert_eq!(
        table.translate(gva(ELSEWHERE), Permissions::READ),
        Some(hva(map.page(0)))
    );
    assert_eq!(table.translate(gva(ELSEWHERE), Permissions::WRITE), None);
    table
        .protect(gva(ELSEWHERE), BYTES, Permissions::WRITE)
        .unwrap()
        .flush();
    let dune = enter();
    install_probe(&dune);
    // SAFETY: a duplicate of what the default table was.
    unsafe { dune.load(&table) };
    assert_eq!(store(ELSEWHERE, 10), Ok(()));
    // SAFETY: the default table.
    unsafe { dune.load(&dune.address_space()) };
    dune.leave();
    assert_eq!(map.read(0), 10);
    drop(table);
    // Everything is gone: entering starts anew.
    enter().leave();
}
