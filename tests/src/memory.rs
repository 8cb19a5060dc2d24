// SPDX-License-Identifier: MIT OR Apache-2.0
//! EPT and guest page tables follow the process' memory.

use std::fs;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;
use std::time::Instant;

use libdune::abi::Counters;
use libdune::Dune;
use libdune::Gva;
use libdune::Hva;
use libdune::Permissions;

use crate::framework::Need;
use crate::framework::Outcome;
use crate::framework::Suite;
use crate::framework::Test;
use crate::framework::User;
use crate::helpers::pin_to_cpu;
use crate::support::assert_no_exits;
use crate::support::assert_refused;
use crate::support::enter;
use crate::support::execute;
use crate::support::install_probe;
use crate::support::load;
use crate::support::spawn;
use crate::support::store;
use crate::support::Knob;
use crate::support::Map;
use crate::support::EXIT_EPT_VIOLATION;
use crate::support::GIB;
use crate::support::PAGE;

pub const TESTS: &[Test] = &[
    Test::asserting("ept_follows_munmap", ept_follows_munmap),
    Test::asserting("ept_follows_mprotect", ept_follows_mprotect),
    Test::asserting("ept_follows_madvise_dontneed", ept_follows_madvise_dontneed),
    Test::asserting("ept_follows_fork_and_copy_on_write", ept_follows_fork_and_copy_on_write),
    Test::asserting("ept_follows_a_growing_stack", ept_follows_a_growing_stack),
    Test::asserting("ept_follows_files", ept_follows_files),
    Test::asserting("ept_keeps_neighbours_on_munmap", ept_keeps_neighbours_on_munmap),
    Test::asserting("sealed_mapping_stays", sealed_mapping_stays),
    Test::asserting("retry_closes_the_race", retry_closes_the_race)
        .run_as(User::Root)
        .timeout_s(60),
    Test::asserting(
        "violations_settled_at_once_lose_no_race",
        violations_settled_at_once_lose_no_race,
    )
    .suite(Suite::Long)
    .run_as(User::Root)
    .needs(&[Need::Cpus(2)])
    .timeout_s(60),
    Test::asserting(
        "running_guest_loses_its_translations",
        running_guest_loses_its_translations,
    )
    .needs(&[Need::Cpus(2)]),
    Test::asserting(
        "second_invalidation_waits_for_the_flush",
        second_invalidation_waits_for_the_flush,
    )
    .run_as(User::Root)
    .needs(&[Need::Cpus(2)])
    .timeout_s(60),
    Test::new("thp_mapped_as_2m", thp_mapped_as_2m),
    Test::asserting("vdso_clock_gettime_works", vdso_clock_gettime_works),
    Test::asserting("brk_past_4g", brk_past_4g),
    Test::asserting("gigabytes_of_mmap", gigabytes_of_mmap).timeout_s(60),
    Test::asserting("out_of_slots_is_reported", out_of_slots_is_reported).timeout_s(60),
    Test::asserting(
        "own_page_table_maps_pages_elsewhere",
        own_page_table_maps_pages_elsewhere,
    ),
    Test::asserting("second_address_space_is_apart", second_address_space_is_apart),
    Test::asserting("memory_is_the_same_in_and_out", memory_is_the_same_in_and_out),
];

/// Error-code bits of a page fault.
const WRITE: u32 = 2;
const FETCH: u32 = 16;

fn gva(address: usize) -> Gva {
    Gva::new(address as u64).unwrap()
}

fn ept_follows_munmap() {
    let map = Map::new(64 * PAGE);
    let dune = enter();
    install_probe(&dune);
    for page in 0..64 {
        assert_eq!(store(map.page(page), page as u64), Ok(()));
    }
    for round in 0..8 {
        let page = 3 + round * 7;
        let invept = dune.counters().invept;
        map.unmap(page * PAGE, PAGE);
        // Not a stale translation, for reading or writing.
        let fault = assert_refused(load(map.page(page)), map.page(page));
        // No TLB may still have it; with `DUNE_MUTATE=invept` this is red.
        assert!(
            dune.counters().invept > invept,
            "no INVEPT for a page that was taken away"
        );
        // Nothing there: P clear, as Linux reports SEGV_MAPERR.
        assert_eq!(fault.error_code & 1, 0, "{fault:x?}");
        let fault = assert_refused(store(map.page(page), 1), map.page(page));
        assert_eq!(fault.error_code & (1 | WRITE), WRITE, "{fault:x?}");
        // Neighbours are there still.
        assert_eq!(load(map.page(page - 1)), Ok(page as u64 - 1));
        assert_eq!(load(map.page(page + 1)), Ok(page as u64 + 1));
        // New memory at the same place is new.
        let again = Map::at(map.page(page), PAGE, libc::PROT_READ | libc::PROT_WRITE, 0);
        assert_eq!(load(map.page(page)), Ok(0));
        assert_eq!(store(map.page(page), 1000), Ok(()));
        assert_eq!(again.read(0), 1000);
        drop(again);
        assert_refused(load(map.page(page)), map.page(page));
    }
    dune.leave();
}

fn ept_follows_mprotect() {
    let map = Map::new(4 * PAGE);
    let page = map.page(1);
    let dune = enter();
    install_probe(&dune);
    assert_eq!(store(page, 5), Ok(()));
    for _ in 0..20 {
        map.protect(PAGE, PAGE, libc::PROT_READ);
        assert_eq!(load(page), Ok(5));
        let fault = assert_refused(store(page, 6), page);
        // Something is there: P, as Linux reports SEGV_ACCERR.
        assert_eq!(fault.error_code & (1 | WRITE), 1 | WRITE, "{fault:x?}");
        assert_eq!(load(page), Ok(5));

        map.protect(PAGE, PAGE, libc::PROT_NONE);
        assert_refused(load(page), page);
        assert_refused(store(page, 6), page);

        map.protect(PAGE, PAGE, libc::PROT_READ | libc::PROT_WRITE);
        assert_eq!(load(page), Ok(5));
        assert_eq!(store(page, 5), Ok(()));
    }

    // Execution: `ret`.
    map.write(2 * PAGE, 0xc3);
    let code = map.page(2);
    let fault = assert_refused(execute(code), code);
    assert_eq!(fault.error_code & FETCH, FETCH, "{fault:x?}");
    map.protect(2 * PAGE, PAGE, libc::PROT_READ | libc::PROT_EXEC);
    assert_eq!(execute(code), Ok(()));
    map.protect(2 * PAGE, PAGE, libc::PROT_READ);
    assert_refused(execute(code), code);
    assert_eq!(load(code).map(|word| word & 0xff), Ok(0xc3));
    dune.leave();
}

fn ept_follows_madvise_dontneed() {
    let map = Map::new(32 * PAGE);
    let dune = enter();
    install_probe(&dune);
    for round in 1..=10u64 {
        for page in 0..32 {
            assert_eq!(store(map.page(page), round * 100 + page as u64), Ok(()));
        }
        map.advise(8 * PAGE, 16 * PAGE, libc::MADV_DONTNEED);
        for page in 0..32 {
            let expected = if (8..24).contains(&page) {
                0
            } else {
                round * 100 + page as u64
            };
            assert_eq!(load(map.page(page)), Ok(expected), "round {round}, page {page}");
        }
    }
    dune.leave();
    assert_eq!(map.read(8 * PAGE), 0);
}

fn ept_follows_fork_and_copy_on_write() {
    let map = Map::new(8 * PAGE);
    for page in 0..8 {
        map.write(page * PAGE, 7);
    }
    let dune = enter();
    for page in 0..8 {
        map.write(page * PAGE, 8);
    }
    for round in 0..5 {
        let mut pipe = [0; 2];
        // SAFETY: two fds into an array of two; the child only reads its memory and ends.
        let pid = unsafe {
            assert_eq!(libc::pipe(pipe.as_mut_ptr()), 0);
            libc::fork()
        };
        assert!(pid >= 0);
        if pid == 0 {
            let mut byte = 0u8;
            // SAFETY: waits until the parent has written to its pages; ends.
            unsafe {
                libc::read(pipe[0], (&raw mut byte).cast(), 1);
                let clean = (0..8).all(|page| map.read(page * PAGE) == 8 + round);
                libc::_exit(if clean { 0 } else { 1 });
            }
        }
        // The pages are shared now: our writes must not reach the child's.
        for page in 0..8 {
            map.write(page * PAGE, 9 + round);
        }
        let mut status = 0;
        // SAFETY: our own pipe and child.
        unsafe {
            libc::write(pipe[1], c"x".as_ptr().cast(), 1);
            assert_eq!(libc::waitpid(pid, &mut status, 0), pid);
            libc::close(pipe[0]);
            libc::close(pipe[1]);
        }
        assert_eq!(status, 0, "the child saw the parent's writes, round {round}");
    }
    dune.leave();
}

#[inline(never)]
fn use_stack(depth: usize) -> usize {
    let mut page = [depth; 512];
    std::hint::black_box(&mut page);
    if depth == 0 {
        0
    } else {
        use_stack(depth - 1) + usize::from(std::hint::black_box(&page)[511] == depth)
    }
}

fn ept_follows_a_growing_stack() {
    // The main thread's stack grows on demand; 6 MiB of its 8 were never touched.
    let dune = enter();
    assert_eq!(use_stack(1200), 1200);
    dune.leave();
}

fn ept_follows_files() {
    let path = format!("/tmp/dune-file-{}", std::process::id());
    fs::write(&path, vec![1u8; 4 * PAGE]).unwrap();
    let file = fs::File::options().read(true).write(true).open(&path).unwrap();
    let map_file = |flags| {
        use std::os::fd::AsRawFd;
        // SAFETY: a new mapping.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4 * PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                file.as_raw_fd(),
                0,
            )
        };
        assert_ne!(start, libc::MAP_FAILED);
        Map {
            start: start.cast(),
            bytes: 4 * PAGE,
        }
    };
    let (shared, private) = (map_file(libc::MAP_SHARED), map_file(libc::MAP_PRIVATE));
    let dune = enter();
    install_probe(&dune);
    assert_eq!(load(private.page(1)), Ok(0x0101_0101_0101_0101));
    assert_eq!(store(shared.page(1), 42), Ok(()));
    // What write(2) puts there is seen, as the private page is not ours yet.
    assert_eq!(load(private.page(1)), Ok(42));
    assert_eq!(store(private.page(1), 43), Ok(()));
    assert_eq!((load(shared.page(1)), load(private.page(1))), (Ok(42), Ok(43)));
    let bytes = fs::read(&path).unwrap();
    assert_eq!(bytes[PAGE], 42);
    // Beyond the end of a file that was cut off: refused.
    file.set_len(PAGE as u64).unwrap();
    assert_refused(load(shared.page(2)), shared.page(2));
    assert_refused(store(shared.page(3), 1), shared.page(3));
    assert_eq!(load(shared.page(0)), Ok(0x0101_0101_0101_0101));
    dune.leave();
    fs::remove_file(&path).unwrap();
}

/// What mseal forbids it forbids a Dune thread, sealed before it entered or in Dune mode; the memory stays as it is.
fn sealed_mapping_stays() {
    let attempts = |is_sealed: bool, inside: bool| {
        let map = Map::new(4 * PAGE);
        map.write(PAGE, 7);
        let seal = || {
            const SYS_MSEAL: i64 = 462;
            // SAFETY: memory of our own.
            let result = unsafe { libc::syscall(SYS_MSEAL, map.start, map.bytes, 0) };
            assert_eq!(result, 0, "mseal: {}", std::io::Error::last_os_error());
        };
        if is_sealed && !inside {
            seal();
        }
        let dune = inside.then(enter);
        if is_sealed && inside {
            seal();
        }
        let page = map.page(1) as u64;
        let bytes = PAGE as u64;
        let flags = (libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        let errno = |number: i64, arguments: [u64; 4]| {
            let [a, b, c, d] = arguments;
            // SAFETY: memory of our own; where it may go nothing uses it.
            let result = unsafe { libc::syscall(number, a, b, c, d, -1, 0) };
            if result == -1 {
                std::io::Error::last_os_error().raw_os_error()
            } else {
                None
            }
        };
        let seen = [
            errno(libc::SYS_mprotect, [page, bytes, libc::PROT_NONE as u64, 0]),
            errno(libc::SYS_mmap, [page, bytes, libc::PROT_READ as u64, flags]),
            errno(libc::SYS_munmap, [page, bytes, 0, 0]),
        ];
        if is_sealed {
            assert_eq!(map.read(PAGE), 7);
            map.write(PAGE, 8);
            assert_eq!(map.read(PAGE), 8);
        }
        drop(dune);
        seen
    };
    assert_eq!(attempts(false, true), [None; 3]);
    assert_eq!(attempts(true, false), [Some(libc::EPERM); 3]);
    assert_eq!(attempts(true, true), [Some(libc::EPERM); 3]);
}

fn ept_keeps_neighbours_on_munmap() {
    // 1 GiB, a page touched in each 512 KiB: 2,048 leaves in 512 tables.
    const STEP: usize = 512 << 10;
    let map = Map::at(0, GIB, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_NORESERVE);
    map.advise(0, GIB, libc::MADV_NOHUGEPAGE);
    let dune = enter();
    for offset in (0..GIB).step_by(STEP) {
        map.write(offset, offset as u64);
    }
    let before = dune.counters();
    for offset in (0..GIB).step_by(STEP) {
        assert_eq!(map.read(offset), offset as u64);
    }
    let settled = dune.counters();
    assert!(
        settled.exits[EXIT_EPT_VIOLATION] - before.exits[EXIT_EPT_VIOLATION] < 10,
        "the second round has no violations"
    );
    let gone = GIB / 2;
    map.unmap(gone, PAGE);
    let before = dune.counters();
    for offset in (0..GIB).step_by(STEP).filter(|offset| *offset != gone) {
        assert_eq!(map.read(offset), offset as u64);
    }
    let violations = dune.counters().exits[EXIT_EPT_VIOLATION] - before.exits[EXIT_EPT_VIOLATION];
    let pages = (GIB / STEP) as u64;
    println!("{violations} violations for {pages} pages");
    assert!(
        violations <= pages / 100,
        "{violations} of {pages} entries were lost with one page"
    );
    dune.leave();
}

/// Pages are thrown away and filled anew by another thread, again and again; whoever reads them in Dune mode must never
/// see what was there before. Without the retry check an EPT violation that races the invalidation installs the old
/// page: with `DUNE_MUTATE=retry` this test is red.
fn retry_closes_the_race() {
    // Between reading the process' page table and installing what was read.
    let delay = Knob::set("fault_delay_us", 400);
    let counters = race_with_invalidations();
    if delay.is_some() && crate::helpers::online_cpus() > 1 {
        assert!(
            counters.retries > 0,
            "no violation raced an invalidation: nothing was tested"
        );
    }
}

/// The same where violations are settled in the window of their exit: those look whether an invalidation goes on, under the
/// lock. With `DUNE_MUTATE=retry` they do not, and this test is red, too.
fn violations_settled_at_once_lose_no_race() {
    // Between emptying the EPT and the emptying of the process' page table.
    let _delay = Knob::set("invalidate_delay_us", 100);
    race_with_invalidations();
}

fn race_with_invalidations() -> Counters {
    static GENERATION: AtomicU64 = AtomicU64::new(1);
    static STOP: AtomicBool = AtomicBool::new(false);
    const PAGES: usize = 4;
    /// What page `page` holds in a generation: a frame that went to another page is told apart, too.
    fn word(generation: u64, page: usize) -> u64 {
        generation * PAGES as u64 + page as u64
    }
    let map = Map::new(PAGES * PAGE);
    map.advise(0, PAGES * PAGE, libc::MADV_NOHUGEPAGE);
    for page in 0..PAGES {
        map.write(page * PAGE, word(1, page));
    }
    let (start, bytes) = (map.address(), map.bytes);
    let dune = enter();
    let writer = std::thread::spawn(move || {
        let mut random = 1u64;
        let other = Map::new(8 * PAGE);
        while !STOP.load(Relaxed) {
            let next = GENERATION.load(SeqCst) + 1;
            // SAFETY: the map outlives this thread, which is joined.
            unsafe {
                libc::madvise(start as *mut libc::c_void, bytes, libc::MADV_DONTNEED);
                // The freed frames go to other memory first.
                other.advise(0, 8 * PAGE, libc::MADV_DONTNEED);
                for page in 0..8 {
                    other.write(page * PAGE, u64::MAX);
                }
                for page in 0..PAGES {
                    ((start + page * PAGE) as *mut u64).write_volatile(word(next, page));
                }
            }
            GENERATION.store(next, SeqCst);
            // For a while it stays so: up to 1.5 ms, or violations would never be settled.
            random = random
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            let pause = std::time::Duration::from_micros((random >> 33) % 1500);
            let published = std::time::Instant::now();
            while published.elapsed() < pause {
                std::hint::spin_loop();
            }
        }
    });
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(2);
    let (mut reads, mut zeroes, mut stale) = (0u64, 0u64, None);
    while stale.is_none() && std::time::Instant::now() < deadline {
        for page in 0..PAGES {
            let before = GENERATION.load(SeqCst);
            let seen = map.read(page * PAGE);
            reads += 1;
            if seen == 0 {
                // Between the throwing away and the filling.
                zeroes += 1;
            } else if seen < word(before, 0) || seen % PAGES as u64 != page as u64 || seen == u64::MAX {
                stale = Some((page, seen, before));
            }
        }
    }
    STOP.store(true, SeqCst);
    let counters = dune.counters();
    dune.leave();
    writer.join().unwrap();
    let generations = GENERATION.load(SeqCst);
    println!(
        "{reads} reads, {zeroes} between, {generations} generations, {} retries",
        counters.retries
    );
    if let Some((page, seen, before)) = stale {
        panic!("page {page} shows {seen:#x} after generation {before} was complete");
    }
    assert!(generations > 20, "only {generations} generations: nothing was tested");
    assert!(counters.exits[EXIT_EPT_VIOLATION] > 20);
    counters
}

/// Two threads take the same page away at the same time, while a third is in the guest: the second finds nothing left to
/// zap, but may not return, and let Linux free the page, before the guest's CPU has dropped its translation. Bochs drops
/// all at each exit, so the guest's count of INVEPTs tells: with `DUNE_MUTATE=flush` this test is red.
fn second_invalidation_waits_for_the_flush() {
    static STOP: AtomicBool = AtomicBool::new(false);
    /// Rounds that were asked for, in which the guest has touched the page, in which the first thread takes it away, and
    /// in which the second has.
    static ASKED: AtomicU64 = AtomicU64::new(0);
    static TOUCHED: AtomicU64 = AtomicU64::new(0);
    static FIRST: AtomicU64 = AtomicU64::new(0);
    static SECOND: AtomicU64 = AtomicU64::new(0);
    /// What the guest says of itself, again and again.
    static TICK: AtomicU64 = AtomicU64::new(0);
    static FLUSHES: AtomicU64 = AtomicU64::new(0);
    /// FLUSHES before the page is taken away.
    static BEFORE: AtomicU64 = AtomicU64::new(0);
    const ROUNDS: u64 = 8;
    const DELAY: Duration = Duration::from_millis(20);
    /// Looks seldom: on the guest's CPU each look costs the guest some 100 µs of emulated time.
    fn wait_for(word: &AtomicU64, value: u64) {
        while word.load(SeqCst) < value {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    let map = Map::new(2 * PAGE);
    map.advise(0, 2 * PAGE, libc::MADV_NOHUGEPAGE);
    let start = map.address();
    let take_away = move || {
        // SAFETY: the map outlives both threads, which are joined; nobody depends on what is in it.
        assert_eq!(
            unsafe { libc::madvise(start as *mut libc::c_void, PAGE, libc::MADV_DONTNEED) },
            0
        );
    };
    let first = std::thread::spawn(move || {
        pin_to_cpu(1).unwrap();
        for round in 1..=ROUNDS {
            ASKED.store(round, SeqCst);
            wait_for(&TOUCHED, round);
            BEFORE.store(FLUSHES.load(SeqCst), SeqCst);
            FIRST.store(round, SeqCst);
            take_away();
            wait_for(&SECOND, round);
        }
    });
    // On the guest's CPU, so that it need not wait for the first thread to be preempted.
    let second = std::thread::spawn(move || {
        pin_to_cpu(0).unwrap();
        let (mut waited, mut unflushed) = (0, 0);
        for round in 1..=ROUNDS {
            wait_for(&FIRST, round);
            // Let it zap.
            std::thread::sleep(Duration::from_millis(1));
            let before = Instant::now();
            take_away();
            waited += u64::from(before.elapsed() > DELAY / 4);
            // The guest goes on, by an entry behind our return.
            let tick = TICK.load(SeqCst);
            wait_for(&TICK, tick + 2);
            unflushed += u64::from(FLUSHES.load(SeqCst) == BEFORE.load(SeqCst));
            SECOND.store(round, SeqCst);
        }
        STOP.store(true, SeqCst);
        (waited, unflushed)
    });
    pin_to_cpu(0).unwrap();
    let dune = enter();
    // Only now, and only as long as the guest answers: entering and leaving flush, too.
    let delay = Knob::set("flush_delay_us", DELAY.as_micros() as u32);
    let mut touched = 0;
    while !STOP.load(SeqCst) {
        let asked = ASKED.load(SeqCst);
        let touch = asked != touched;
        if touch {
            map.write(0, asked);
            touched = asked;
        }
        FLUSHES.store(dune.counters().invept, SeqCst);
        TICK.fetch_add(1, SeqCst);
        if touch {
            TOUCHED.store(asked, SeqCst);
        }
    }
    let is_delayed = delay.is_some();
    drop(delay);
    dune.leave();
    first.join().unwrap();
    let (waited, unflushed) = second.join().unwrap();
    println!("{waited} of {ROUNDS} second invalidations waited, {unflushed} returned before the flush");
    assert_eq!(
        unflushed, 0,
        "invalidations that returned before the guest's CPU had flushed"
    );
    if is_delayed {
        assert!(waited > 0, "no two invalidations met: nothing was tested");
    }
}

/// Another CPU takes the permission to write away while the guest writes and never exits: once mprotect has returned,
/// no write arrives any more. (Bochs drops all translations at each VM exit, and Linux' own TLB shootdown makes the guest
/// exit: there only [`ept_follows_munmap`]'s look at the counter shows a missing INVEPT. On VT-x this test does.)
fn running_guest_loses_its_translations() {
    static STOP: AtomicBool = AtomicBool::new(false);
    const ROUNDS: usize = 40;
    pin_to_cpu(0).unwrap();
    let map = Map::new(2 * PAGE);
    map.write(0, 0);
    let (start, bytes) = (map.address(), map.bytes);
    let changer = std::thread::spawn(move || {
        pin_to_cpu(1).unwrap();
        let word = start as *const u64;
        // SAFETY: the map outlives this thread, which is joined; the page is readable all the time.
        let read = || unsafe { word.read_volatile() };
        let protect = |protection| {
            // SAFETY: as above.
            assert_eq!(
                unsafe { libc::mprotect(start as *mut libc::c_void, bytes, protection) },
                0
            );
        };
        let mut late = 0;
        for _ in 0..ROUNDS {
            // The guest is at it.
            let first = read();
            while read() < first + 100 {
                std::hint::spin_loop();
            }
            protect(libc::PROT_READ);
            let after = read();
            let pause = std::time::Instant::now();
            while pause.elapsed() < std::time::Duration::from_micros(300) {
                std::hint::spin_loop();
            }
            late += u32::from(read() != after);
            protect(libc::PROT_READ | libc::PROT_WRITE);
        }
        STOP.store(true, SeqCst);
        late
    });
    let dune = enter();
    install_probe(&dune);
    let (mut number, mut refused) = (0u64, 0u64);
    while !STOP.load(Relaxed) {
        number += 1;
        if store(start, number).is_err() {
            refused += 1;
        }
    }
    dune.leave();
    let late = changer.join().unwrap();
    println!("{number} writes, {refused} refused");
    assert_eq!(
        late, 0,
        "rounds of {ROUNDS} in which a write arrived after mprotect had returned"
    );
    assert!(
        refused >= ROUNDS as u64 / 2,
        "{refused} writes were refused: nothing was tested"
    );
}

fn thp_mapped_as_2m() -> Outcome {
    const LARGE: usize = 2 << 20;
    const SETTING: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
    match fs::read_to_string(SETTING) {
        Ok(setting) if setting.contains("[never]") => return Outcome::Skip(format!("{SETTING} is {setting:?}")),
        Err(error) => return Outcome::Skip(format!("{SETTING}: {error}")),
        Ok(_) => {}
    }
    let map = Map::new(10 * LARGE);
    map.advise(0, 10 * LARGE, libc::MADV_HUGEPAGE);
    let first = map.address().next_multiple_of(LARGE) - map.address();
    let dune = enter();
    if dune.info().capabilities & libdune::abi::CAP_EPT_2M == 0 {
        return Outcome::Skip("the CPU has no 2 MiB leaves in EPT".into());
    }
    let before = dune.counters();
    for large in 0..8 {
        map.write(first + large * LARGE, 1);
    }
    let native = fs::read_to_string("/proc/self/smaps").unwrap();
    let huge: u64 = native
        .lines()
        .filter_map(|line| line.strip_prefix("AnonHugePages:"))
        .filter_map(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
        .sum();
    assert!(huge >= 8 * 2048, "Linux made {huge} KiB of huge pages");
    let between = dune.counters();
    assert!(
        between.ept_2m - before.ept_2m >= 8,
        "{} leaves of 2 MiB",
        between.ept_2m - before.ept_2m
    );
    // All of them is there now.
    for offset in (0..8 * LARGE).step_by(PAGE) {
        map.write(first + offset, 2);
    }
    let after = dune.counters();
    let violations = after.exits[EXIT_EPT_VIOLATION] - between.exits[EXIT_EPT_VIOLATION];
    assert!(violations < 5, "{violations} violations inside huge pages");

    // One page taken out of a huge one: the rest stays what it was.
    map.unmap(first + LARGE + PAGE, PAGE);
    install_probe(&dune);
    assert_refused(
        load(map.address() + first + LARGE + PAGE),
        map.address() + first + LARGE + PAGE,
    );
    for page in (0..512).filter(|page| *page != 1) {
        assert_eq!(load(map.address() + first + LARGE + page * PAGE), Ok(2));
    }
    dune.leave();
    Outcome::Pass
}

fn vdso_clock_gettime_works() {
    let now = || {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: writes the structure.
        assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) }, 0);
        time.tv_sec * 1_000_000_000 + time.tv_nsec
    };
    let outside = now();
    let dune = enter();
    let first = now();
    assert!(first >= outside);
    let mut last = first;
    assert_no_exits(&dune, || {
        for _ in 0..3000 {
            let next = now();
            assert!(next >= last);
            last = next;
        }
    });
    assert!(last > first);
    dune.leave();
    assert!(now() >= last);
}

fn brk_past_4g() {
    const STEP: usize = 64 << 20;
    const STEPS: usize = 80;
    let dune = enter();
    // SAFETY: glibc copes with a break that others move; nothing is given back to it.
    unsafe {
        let start = libc::sbrk(0) as usize;
        for step in 0..STEPS {
            let got = libc::sbrk(STEP as isize);
            assert_ne!(got as isize, -1, "step {step}: {}", std::io::Error::last_os_error());
        }
        let end = libc::sbrk(0) as usize;
        assert!(end - start >= 5 << 30);
        for at in [start, start + (1 << 32), start + (1 << 32) + 8, end - 8] {
            let word = (at & !7) as *mut u64;
            word.write_volatile(at as u64);
            assert_eq!(word.read_volatile(), at as u64);
        }
        // The allocator goes on above.
        let block = vec![7u8; 1 << 20];
        assert_eq!(block[99_999], 7);
        assert_eq!(libc::brk(start as *mut libc::c_void), 0);
    }
    dune.leave();
}

fn gigabytes_of_mmap() {
    // 300 GiB of address space; as many GiBs of it as have slots are used, less what the program itself uses.
    const GIBS: usize = 300;
    let map = Map::at(
        0,
        (GIBS + 1) * GIB,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_NORESERVE,
    );
    let first = map.address().next_multiple_of(GIB) - map.address();
    let dune = enter();
    let most = dune.info().slots_free as usize - 20;
    let step = GIBS.div_ceil(most.min(GIBS));
    let used: Vec<usize> = (0..GIBS).step_by(step).collect();
    println!(
        "{} slots, two pages in each of {} GiB",
        dune.info().slots_free,
        used.len()
    );
    for &gib in &used {
        map.write(first + gib * GIB + 8 * gib, gib as u64 + 1);
        map.write(first + (gib + 1) * GIB - 8, gib as u64);
    }
    for &gib in &used {
        assert_eq!(map.read(first + gib * GIB + 8 * gib), gib as u64 + 1);
        assert_eq!(map.read(first + (gib + 1) * GIB - 8), gib as u64);
    }
    // A word astride the edge of two slots.
    let edge = (map.address() + first + GIB - 4) as *mut u64;
    // SAFETY: inside the mapping.
    unsafe {
        edge.write_unaligned(0x1122_3344_5566_7788);
        assert_eq!(edge.read_unaligned(), 0x1122_3344_5566_7788);
    }
    dune.leave();
    assert!(used
        .iter()
        .skip(2)
        .all(|gib| map.read(first + gib * GIB + 8 * gib) == *gib as u64 + 1));
}

/// More GiBs than there are slots, all of them mapped: a report that names the address, and SIGSEGV. The next program runs.
fn out_of_slots_is_reported() {
    let ended = spawn(|| {
        let dune = enter();
        let slots = dune.info().slots_free as usize;
        let map = Map::at(
            20_000 * GIB,
            (slots + 32) * GIB,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_NORESERVE,
        );
        for gib in 0..slots + 32 {
            map.write(gib * GIB, 1);
        }
        unreachable!("{} GiBs in {slots} slots", slots + 32);
    })
    .wait();
    assert_eq!(ended.signal(), Some(libc::SIGSEGV), "{ended:?}");
    let line = ended.output.lines().find(|line| line.starts_with("dune: fatal:"));
    let line = line.unwrap_or_else(|| panic!("no report: {ended:?}"));
    assert!(
        line.contains("no GPA slot is left for the 1 GiB at this address"),
        "{line}"
    );
    assert!(line.contains("address 0x"), "{line}");
    enter().leave();
}

fn own_page_table_maps_pages_elsewhere() {
    let map = Map::new(8 * PAGE);
    map.write(2 * PAGE, 0x2222);
    map.write(3 * PAGE, 0x3333);
    // A GVA that the process does not have: the upper half.
    let elsewhere = 0xffff_9000_0000_0000usize;
    let dune = enter();
    install_probe(&dune);
    let space = dune.address_space();
    let hva = |page| Hva::new(map.page(page) as u64).unwrap();
    let page = PAGE as u64;
    space
        .map(gva(elsewhere), page, hva(2), Permissions::WRITE)
        .unwrap()
        .flush();
    assert_eq!(load(elsewhere), Ok(0x2222));
    assert_eq!(store(elsewhere, 0x4444), Ok(()));
    assert_eq!(map.read(2 * PAGE), 0x4444);
    space
        .map(gva(elsewhere), page, hva(3), Permissions::READ)
        .unwrap()
        .flush();
    assert_eq!(load(elsewhere), Ok(0x3333));
    let fault = store(elsewhere, 1).unwrap_err();
    assert_eq!((fault.error_code & 3, fault.host_refused), (3, false));
    space.unmap(gva(elsewhere), page).unwrap().flush();
    let fault = load(elsewhere).unwrap_err();
    assert_eq!(
        (fault.error_code & 1, fault.host_refused, fault.address),
        (0, false, elsewhere as u64)
    );
    // No execution without the permission.
    map.write(4 * PAGE, 0xc3);
    map.protect(4 * PAGE, PAGE, libc::PROT_READ | libc::PROT_EXEC);
    space
        .map(gva(elsewhere), page, hva(4), Permissions::EXECUTE)
        .unwrap()
        .flush();
    assert_eq!(execute(elsewhere), Ok(()));
    space.protect(gva(elsewhere), page, Permissions::READ).unwrap().flush();
    let fault = execute(elsewhere).unwrap_err();
    assert_eq!(
        (fault.error_code & FETCH, fault.host_refused),
        (FETCH, false),
        "{fault:x?}"
    );
    dune.leave();
}

fn second_address_space_is_apart() {
    let map = Map::new(4 * PAGE);
    map.write(PAGE, 1);
    let dune = enter();
    install_probe(&dune);
    let first = dune.address_space();
    let second = first.duplicate().unwrap();
    assert_ne!(first.root(), second.root());
    let page = gva(map.page(1));
    second.protect(page, PAGE as u64, Permissions::READ).unwrap().ignore();
    assert!(first.is_loaded() && !second.is_loaded());
    assert_eq!(store(map.page(1), 2), Ok(()));
    for round in 0..20 {
        // SAFETY: a duplicate with one page of ours read-only.
        unsafe { dune.load(&second) };
        assert!(second.is_loaded());
        let fault = store(map.page(1), 99).unwrap_err();
        assert_eq!((fault.error_code & 3, fault.host_refused), (3, false));
        assert_eq!(load(map.page(1)), Ok(round + 2));
        // A system call from here works as well.
        assert_ne!(std::process::id(), 0);
        // SAFETY: the table that the thread started with.
        unsafe { dune.load(&first) };
        assert_eq!(store(map.page(1), round + 3), Ok(()));
    }
    drop(second);
    assert_eq!(load(map.page(1)), Ok(22));
    dune.leave();
}

fn memory_is_the_same_in_and_out() {
    let mut list: Vec<Box<u64>> = (0..1000).map(Box::new).collect();
    let map = Map::new(256 * PAGE);
    for round in 0..10u64 {
        let dune = enter();
        for (index, word) in list.iter_mut().enumerate() {
            assert_eq!(**word, index as u64 + 3 * round);
            **word += 1;
        }
        for page in 0..256 {
            assert_eq!(map.read(page * PAGE), round);
            map.write(page * PAGE, round + 1);
        }
        list.push(Box::new(list.len() as u64 + 3 * round + 1));
        dune.leave();
        assert!(!Dune::is_active());
        list.iter_mut().for_each(|word| **word += 2);
    }
    assert_eq!(list.len(), 1010);
}
