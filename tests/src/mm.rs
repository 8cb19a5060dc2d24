// SPDX-License-Identifier: MIT OR Apache-2.0

//! What Linux does to the memory of a process, while that is in Dune mode: each thing that its memory management has a
//! name for.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::fd::FromRawFd;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::ptr;
use std::sync::atomic::Ordering::SeqCst;

use libdune::Dune;
use linux_raw_sys::general;
use linux_raw_sys::general::uffd_msg;
use linux_raw_sys::general::uffdio_api;
use linux_raw_sys::general::uffdio_copy;
use linux_raw_sys::general::uffdio_range;
use linux_raw_sys::general::uffdio_register;
use linux_raw_sys::general::uffdio_writeprotect;
use linux_raw_sys::ioctl::UFFDIO_API;
use linux_raw_sys::ioctl::UFFDIO_COPY;
use linux_raw_sys::ioctl::UFFDIO_REGISTER;
use linux_raw_sys::ioctl::UFFDIO_WRITEPROTECT;

use crate::framework::Need;
use crate::framework::Outcome;
use crate::framework::Test;
use crate::framework::User;
use crate::support::assert_refused;
use crate::support::enter;
use crate::support::eventually;
use crate::support::install_probe;
use crate::support::load;
use crate::support::restartable;
use crate::support::rseq_area;
use crate::support::set_affinity;
use crate::support::spawn;
use crate::support::store;
use crate::support::Cgroup;
use crate::support::Map;
use crate::support::Shared;
use crate::support::PAGE;

const LARGE: usize = 2 << 20;
const PAGEMAP: &str = "/proc/self/pagemap";
const PAGE_IDLE: &str = "/sys/kernel/mm/page_idle/bitmap";

pub const TESTS: &[Test] = &[
    Test::asserting("ept_follows_mremap", ept_follows_mremap),
    Test::asserting("ept_follows_mlock", ept_follows_mlock),
    Test::asserting("ept_follows_madvise_free", ept_follows_madvise_free).run_as(User::Root),
    Test::asserting("ept_follows_collapse_and_split", ept_follows_collapse_and_split).run_as(User::Root),
    Test::asserting("ept_follows_memfd_truncation", ept_follows_memfd_truncation),
    Test::new("ept_maps_memfd_secret", ept_maps_memfd_secret),
    Test::new("ept_maps_hugetlb", ept_maps_hugetlb).run_as(User::Root),
    Test::asserting("ept_follows_swap", ept_follows_swap)
        .run_as(User::Root)
        .needs(&[Need::Path("/sys/block/zram0")]),
    Test::asserting("idle_pages_are_told_from_used_ones", idle_pages_are_told_from_used_ones)
        .run_as(User::Root)
        .needs(&[Need::Path(PAGE_IDLE)]),
    Test::asserting("reclaim_takes_what_is_not_used", reclaim_takes_what_is_not_used)
        .run_as(User::Root)
        .timeout_s(60)
        .needs(&[
            Need::Path("/sys/block/zram0"),
            Need::Path("/sys/fs/cgroup/cgroup.controllers"),
        ]),
    Test::asserting("written_pages_are_told_from_others", written_pages_are_told_from_others),
    Test::asserting("ept_follows_ksm", ept_follows_ksm)
        .run_as(User::Root)
        .timeout_s(60)
        .needs(&[Need::Path("/sys/kernel/mm/ksm/run")]),
    Test::asserting("ept_follows_migration", ept_follows_migration).run_as(User::Root),
    Test::asserting("ept_follows_compaction", ept_follows_compaction)
        .run_as(User::Root)
        .needs(&[Need::Path("/proc/sys/vm/compact_memory")]),
    Test::asserting("writes_from_outside_are_seen", writes_from_outside_are_seen),
    Test::asserting("userfaultfd_serves_a_dune_thread", userfaultfd_serves_a_dune_thread),
    Test::asserting(
        "rseq_sections_that_wait_for_a_page_are_aborted",
        rseq_sections_that_wait_for_a_page_are_aborted,
    )
    .run_as(User::Root)
    .needs(&[Need::Cpus(2)]),
    Test::asserting("ept_pages_are_charged", ept_pages_are_charged)
        .run_as(User::Root)
        .needs(&[Need::Path("/sys/fs/cgroup/cgroup.controllers")]),
    Test::asserting(
        "oom_of_a_cgroup_ends_a_dune_process",
        oom_of_a_cgroup_ends_a_dune_process,
    )
    .run_as(User::Root)
    .needs(&[Need::Path("/sys/fs/cgroup/cgroup.controllers")]),
    Test::asserting("neighbours_come_along", neighbours_come_along),
];

/// /proc/self/pagemap's word for a page.
fn pagemap(address: usize) -> u64 {
    pagemap_of(address, 1)[0]
}

fn pagemap_of(address: usize, pages: usize) -> Vec<u64> {
    let file = fs::File::open(PAGEMAP).unwrap();
    let mut bytes = vec![0; pages * 8];
    file.read_exact_at(&mut bytes, (address / PAGE * 8) as u64).unwrap();
    let words = bytes.chunks_exact(8);
    words.map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
}

const WRITE_PROTECTED: u64 = 1 << 57;
const SWAPPED: u64 = 1 << 62;
const PRESENT: u64 = 1 << 63;

const FRAME: u64 = (1 << 55) - 1;

fn frame(address: usize) -> u64 {
    pagemap(address) & FRAME
}

fn advise(map: &Map, offset: usize, bytes: usize, advice: i32) -> io::Result<()> {
    // SAFETY: memory of the test; what may be lost is expected to be.
    match unsafe { libc::madvise(map.start.add(offset).cast(), bytes, advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A mapping whose start is aligned to 2 MiB, in one that is larger.
fn aligned(pages: usize) -> (Map, usize) {
    let map = Map::new(pages * PAGE + LARGE);
    let first = map.address().next_multiple_of(LARGE) - map.address();
    (map, first)
}

fn map_file(file: &impl AsRawFd, bytes: usize, flags: i32) -> Option<Map> {
    // SAFETY: a new mapping.
    let start = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            file.as_raw_fd(),
            0,
        )
    };
    (start != libc::MAP_FAILED).then(|| Map::owning(start.cast(), bytes))
}

fn ept_follows_mremap() {
    let dune = enter();
    install_probe(&dune);
    for pages in [4usize, 600] {
        let map = Map::new(pages * PAGE);
        for page in 0..pages {
            map.write(page * PAGE, page as u64 + 1);
        }
        let old = map.into_start();
        let target = Map::new(2 * pages * PAGE).into_start();
        // SAFETY: moves our memory over a mapping of ours, twice as large.
        let moved = unsafe {
            libc::mremap(
                old.cast(),
                pages * PAGE,
                2 * pages * PAGE,
                libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
                target,
            )
        };
        assert_eq!(moved, target.cast());
        let map = Map::owning(target, 2 * pages * PAGE);
        assert_refused(load(old as usize), old as usize);
        assert_refused(store(old as usize + PAGE, 1), old as usize + PAGE);
        for page in 0..pages {
            assert_eq!(load(map.page(page)), Ok(page as u64 + 1));
        }
        assert_eq!(load(map.page(pages)), Ok(0));
        // SAFETY: shrinks it.
        unsafe { libc::mremap(target.cast(), map.bytes, PAGE, 0) };
        assert_eq!(load(map.page(0)), Ok(1));
        assert_refused(load(map.page(1)), map.page(1));
    }
    dune.leave();
}

fn ept_follows_mlock() {
    let map = Map::new(16 * PAGE);
    map.write(0, 1);
    let dune = enter();
    install_probe(&dune);
    // SAFETY: locks memory of ours, as much as the limit of an ordinary user lets.
    assert_eq!(unsafe { libc::mlock(map.start.cast(), 8 * PAGE) }, 0);
    for page in 0..16 {
        assert_eq!(store(map.page(page), 3), Ok(()));
    }
    // SAFETY: as above.
    assert_eq!(unsafe { libc::munlock(map.start.cast(), 8 * PAGE) }, 0);
    assert_eq!(load(map.page(7)), Ok(3));
    dune.leave();
}

/// Pages that were given up are the old ones if they are written in time, else new ones; never something between.
fn ept_follows_madvise_free() {
    let map = Map::new(64 * PAGE);
    advise(&map, 0, map.bytes, libc::MADV_NOHUGEPAGE).unwrap();
    let dune = enter();
    for page in 0..64 {
        map.write(page * PAGE, 100 + page as u64);
    }
    advise(&map, 0, map.bytes, libc::MADV_FREE).unwrap();
    // Half of them is written again: Linux must notice, or it throws away what was written.
    for page in 0..32 {
        map.write(page * PAGE + 8, 200 + page as u64);
    }
    advise(&map, 0, map.bytes, libc::MADV_PAGEOUT).unwrap();
    for page in 0..32 {
        assert_eq!(map.read(page * PAGE + 8), 200 + page as u64, "page {page} was lost");
        assert_eq!(
            map.read(page * PAGE),
            100 + page as u64,
            "page {page} lost its old half"
        );
    }
    for page in 32..64 {
        let seen = map.read(page * PAGE);
        assert!(seen == 0 || seen == 100 + page as u64, "page {page} shows {seen}");
    }
    dune.leave();
}

fn ept_follows_collapse_and_split() {
    const MADV_COLLAPSE: i32 = 25;
    let (map, first) = aligned(2 * LARGE / PAGE);
    advise(&map, 0, map.bytes, libc::MADV_NOHUGEPAGE).unwrap();
    let dune = enter();
    for page in 0..512 {
        map.write(first + page * PAGE, page as u64);
    }
    advise(&map, 0, map.bytes, libc::MADV_HUGEPAGE).unwrap();
    for round in 0..3u64 {
        advise(&map, first, LARGE, MADV_COLLAPSE).unwrap();
        let before = dune.counters();
        for page in 0..512 {
            assert_eq!(map.read(first + page * PAGE), page as u64 + round);
            map.write(first + page * PAGE, page as u64 + round + 1);
        }
        let after = dune.counters();
        if dune.info().capabilities & libdune::abi::CAP_EPT_2M != 0 {
            assert!(after.ept_2m > before.ept_2m, "no leaf of 2 MiB after the collapse");
        }
        // Linux takes it to pieces: all of it, where it can be told to.
        let _ = fs::write("/sys/kernel/debug/split_huge_pages", "1");
        map.protect(first + 5 * PAGE, PAGE, libc::PROT_READ);
        let before = dune.counters();
        for page in 0..512 {
            assert_eq!(map.read(first + page * PAGE), page as u64 + round + 1);
        }
        let after = dune.counters();
        assert!(after.ept_4k > before.ept_4k, "no leaf of 4 KiB after the split");
        assert_eq!(after.ept_2m, before.ept_2m, "a leaf of 2 MiB after the split");
        map.protect(first + 5 * PAGE, PAGE, libc::PROT_READ | libc::PROT_WRITE);
    }
    dune.leave();
}

fn memfd(name: &std::ffi::CStr) -> OwnedFd {
    // SAFETY: a new fd.
    unsafe {
        let fd = libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        OwnedFd::from_raw_fd(fd)
    }
}

fn ept_follows_memfd_truncation() {
    let fd = memfd(c"dune-test");
    let file = fs::File::from(fd);
    file.set_len(8 * PAGE as u64).unwrap();
    let first = map_file(&file, 8 * PAGE, libc::MAP_SHARED).unwrap();
    let second = map_file(&file, 8 * PAGE, libc::MAP_SHARED).unwrap();
    let dune = enter();
    install_probe(&dune);
    for page in 0..8 {
        assert_eq!(store(first.page(page), page as u64 + 1), Ok(()));
        assert_eq!(load(second.page(page)), Ok(page as u64 + 1));
    }
    file.set_len(3 * PAGE as u64).unwrap();
    assert_eq!(load(first.page(2)), Ok(3));
    assert_refused(load(first.page(3)), first.page(3));
    assert_refused(store(second.page(7), 1), second.page(7));
    file.set_len(8 * PAGE as u64).unwrap();
    assert_eq!(load(first.page(3)), Ok(0));
    // A hole in the middle.
    // SAFETY: our own file.
    let punched = unsafe {
        libc::fallocate(
            file.as_raw_fd(),
            libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            PAGE as i64,
            PAGE as i64,
        )
    };
    assert_eq!(punched, 0);
    assert_eq!(
        (load(first.page(0)), load(first.page(1)), load(second.page(2))),
        (Ok(1), Ok(0), Ok(3))
    );
    dune.leave();
}

fn ept_maps_memfd_secret() -> Outcome {
    // SAFETY: a new fd.
    let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, 0) };
    if fd < 0 {
        return Outcome::Skip(format!("memfd_secret: {}", io::Error::last_os_error()));
    }
    // SAFETY: just made.
    let file = fs::File::from(unsafe { OwnedFd::from_raw_fd(fd as i32) });
    file.set_len(4 * PAGE as u64).unwrap();
    let map = map_file(&file, 4 * PAGE, libc::MAP_SHARED).unwrap();
    map.write(0, 1);
    let dune = enter();
    assert_eq!(map.read(0), 1);
    for page in 0..4 {
        map.write(page * PAGE, page as u64 + 10);
    }
    dune.leave();
    assert!((0..4).all(|page| map.read(page * PAGE) == page as u64 + 10));
    Outcome::Pass
}

fn ept_maps_hugetlb() -> Outcome {
    const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
    if fs::write(POOL, "4").is_err() || fs::read_to_string(POOL).unwrap().trim() != "4" {
        return Outcome::Skip("no huge pages can be reserved".into());
    }
    // SAFETY: a new mapping.
    let start = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            3 * LARGE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB,
            -1,
            0,
        )
    };
    assert_ne!(start, libc::MAP_FAILED);
    let map = Map::owning(start.cast(), 3 * LARGE);
    map.write(0, 1);
    let dune = enter();
    install_probe(&dune);
    let before = dune.counters();
    for large in 0..3 {
        for offset in (0..LARGE).step_by(16 * PAGE) {
            map.write(large * LARGE + offset, offset as u64 + 1);
        }
    }
    let after = dune.counters();
    if dune.info().capabilities & libdune::abi::CAP_EPT_2M != 0 {
        assert!(after.ept_2m - before.ept_2m >= 3, "not mapped by leaves of 2 MiB");
    }
    // Copied for a child, which sees the old.
    let shared = Shared::new();
    let child = spawn(|| {
        assert!(eventually(|| shared.word(0).load(SeqCst) == 1));
        assert_eq!((map.read(0), map.read(16 * PAGE)), (1, 16 * PAGE as u64 + 1));
    });
    map.write(0, 77);
    shared.word(0).store(1, SeqCst);
    child.wait().assert_success();
    assert_eq!((map.read(0), map.read(16 * PAGE)), (77, 16 * PAGE as u64 + 1));
    map.unmap(LARGE, LARGE);
    assert_refused(load(map.address() + LARGE), map.address() + LARGE);
    assert_eq!(map.read(2 * LARGE), 1);
    dune.leave();
    assert_eq!(map.read(2 * LARGE + 16 * PAGE), 16 * PAGE as u64 + 1);
    drop(map);
    let _ = fs::write(POOL, "0");
    Outcome::Pass
}

/// Swap on zram, for as long as this lives.
pub struct Swap;

impl Swap {
    const NODE: &std::ffi::CStr = c"/dev/zram0";

    pub fn on() -> Self {
        fs::write("/sys/block/zram0/reset", "1").unwrap();
        fs::write("/sys/block/zram0/disksize", "32M").unwrap();
        let made = crate::helpers::run_program("mkswap", &["/dev/zram0"]).unwrap();
        assert_eq!(made.status, 0, "{made:?}");
        // SAFETY: a path.
        let result = unsafe { libc::swapon(Self::NODE.as_ptr(), 0) };
        assert_eq!(result, 0, "swapon: {}", io::Error::last_os_error());
        Self
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        // SAFETY: a path.
        unsafe { libc::swapoff(Self::NODE.as_ptr()) };
        let _ = fs::write("/sys/block/zram0/reset", "1");
    }
}

fn ept_follows_swap() {
    const PAGES: usize = 128;
    let _swap = Swap::on();
    let map = Map::new(PAGES * PAGE);
    advise(&map, 0, map.bytes, libc::MADV_NOHUGEPAGE).unwrap();
    let dune = enter();
    let mut swapped = 0;
    for round in 0..4u64 {
        for page in 0..PAGES {
            map.write(page * PAGE, round * 1000 + page as u64);
        }
        advise(&map, 0, map.bytes, libc::MADV_PAGEOUT).unwrap();
        swapped += (0..PAGES)
            .filter(|page| pagemap(map.page(*page)) & SWAPPED != 0)
            .count();
        for page in 0..PAGES {
            assert_eq!(map.read(page * PAGE), round * 1000 + page as u64, "round {round}");
        }
        // Read only: the copy in the swap stays good, what is written next must not be lost.
        advise(&map, 0, map.bytes, libc::MADV_PAGEOUT).unwrap();
        for page in (0..PAGES).step_by(2) {
            let old = map.read(page * PAGE);
            map.write(page * PAGE + 16, old + 1);
        }
        advise(&map, 0, map.bytes, libc::MADV_PAGEOUT).unwrap();
        for page in (0..PAGES).step_by(2) {
            assert_eq!(map.read(page * PAGE + 16), round * 1000 + page as u64 + 1);
        }
    }
    dune.leave();
    println!("{swapped} pages seen in the swap");
    assert!(swapped > PAGES, "{swapped} pages went to the swap: nothing was tested");
}

/// What a cgroup gives up is what was not used in Dune mode lately, and comes back as it was.
fn reclaim_takes_what_is_not_used() {
    const PAGES: usize = 1024;
    const RECLAIMED: &str = "1M";
    let _swap = Swap::on();
    let cgroup = Cgroup::new("memory", "reclaim");
    let child = spawn(|| {
        cgroup.write("cgroup.procs", "0");
        let map = Map::new((PAGES + 1) * PAGE);
        advise(&map, 0, map.bytes, libc::MADV_NOHUGEPAGE).unwrap();
        let dune = enter();
        for page in 0..PAGES {
            map.write(page * PAGE, page as u64);
        }
        let is_hot = |page: &usize| page / 16 % 4 == 0;
        let (mut hot, mut cold) = (0, 0);
        for _ in 0..4 {
            map.write(PAGES * PAGE, 1);
            // It may find less.
            let _ = fs::write(cgroup.file("memory.reclaim"), RECLAIMED);
            let swapped = |page: &usize| pagemap(map.page(*page)) & SWAPPED != 0;
            hot += (0..PAGES).filter(is_hot).filter(swapped).count();
            cold += (0..PAGES).filter(|page| !is_hot(page)).filter(swapped).count();
            // With a flush: while the TLB has a page, its uses are hidden.
            advise(&map, PAGES * PAGE, PAGE, libc::MADV_DONTNEED).unwrap();
            for page in (0..PAGES).filter(is_hot) {
                assert_eq!(map.read(page * PAGE), page as u64);
            }
        }
        println!("report: seen in the swap: {hot} times pages in use, {cold} times others");
        for page in 0..PAGES {
            assert_eq!(map.read(page * PAGE), page as u64);
        }
        dune.leave();
        assert!(cold > PAGES / 4, "nothing was reclaimed");
        // A quarter is in use: without the accessed state of the EPT as many of them would go.
        assert!(hot * 3 < cold / 2, "{hot} pages in use went, of others {cold}");
    });
    let ended = child.wait();
    print!("{}", ended.output);
    ended.assert_success();
}

/// Idle page tracking: who marks pages idle and looks again is told truly which were used in Dune mode.
fn idle_pages_are_told_from_used_ones() {
    const PAGES: usize = 256;
    let map = Map::new((PAGES + 1) * PAGE);
    advise(&map, 0, map.bytes, libc::MADV_NOHUGEPAGE).unwrap();
    let bitmap = fs::File::options().read(true).write(true).open(PAGE_IDLE).unwrap();
    let word_of = |address: usize| (frame(address) / 64 * 8, frame(address) % 64);
    let dune = enter();
    for page in 0..PAGES {
        map.write(page * PAGE, 1);
    }
    // Pages that wait for a place on Linux' lists are never idle: this waits for them.
    fs::write("/proc/sys/vm/compact_memory", "1").unwrap();
    for round in 0..3 {
        map.write(PAGES * PAGE, 1);
        for page in 0..PAGES {
            let (offset, bit) = word_of(map.page(page));
            bitmap.write_at(&(1u64 << bit).to_le_bytes(), offset).unwrap();
        }
        // Who marks pages does not flush; while the TLB has a page, its uses are hidden, natively too. This one is gone with a flush.
        advise(&map, PAGES * PAGE, PAGE, libc::MADV_DONTNEED).unwrap();
        let used = |page: usize| page % 32 == round;
        for page in (0..PAGES).filter(|page| used(*page)) {
            map.read(page * PAGE);
        }
        let (mut missed, mut invented) = (0, 0);
        for page in 0..PAGES {
            let (offset, bit) = word_of(map.page(page));
            let mut word = [0; 8];
            bitmap.read_exact_at(&mut word, offset).unwrap();
            let idle = u64::from_le_bytes(word) >> bit & 1 != 0;
            missed += u32::from(idle && used(page));
            invented += u32::from(!idle && !used(page));
        }
        let report = format!("round {round}: {missed} used pages look idle, {invented} idle ones used");
        println!("{report}");
        assert!((missed, invented) == (0, 0), "{report}");
    }
    dune.leave();
}

/// Writes in Dune mode reach those who track them: by asynchronous write-protection, which pagemap shows.
fn written_pages_are_told_from_others() {
    const PAGES: usize = 64;
    let map = Map::new(PAGES * PAGE);
    advise(&map, 0, map.bytes, libc::MADV_NOHUGEPAGE).unwrap();
    let dune = enter();
    for page in 0..PAGES {
        map.write(page * PAGE, 1);
    }
    let uffd = Userfaultfd::new(general::UFFD_FEATURE_WP_ASYNC | general::UFFD_FEATURE_PAGEFAULT_FLAG_WP);
    uffd.register(&map, general::UFFDIO_REGISTER_MODE_WP);
    for round in 0..4 {
        uffd.protect(map.address() as u64, map.bytes, true);
        for page in 0..PAGES {
            map.read(page * PAGE);
            if page % 8 == round {
                map.write(page * PAGE, 2);
            }
        }
        for page in 0..PAGES {
            let written = pagemap(map.page(page)) & WRITE_PROTECTED == 0;
            assert_eq!(written, page % 8 == round, "page {page}, round {round}");
        }
    }
    dune.leave();
}

fn ept_follows_ksm() {
    const PAGES: usize = 32;
    let shared = || {
        fs::read_to_string("/sys/kernel/mm/ksm/pages_sharing")
            .unwrap()
            .trim()
            .parse::<u64>()
            .unwrap()
    };
    let map = Map::new(PAGES * PAGE);
    let dune = enter();
    for page in 0..PAGES {
        for word in 0..512 {
            map.write(page * PAGE + word * 8, 0x6b73_6d00 + word as u64);
        }
    }
    advise(&map, 0, map.bytes, libc::MADV_MERGEABLE).unwrap();
    fs::write("/sys/kernel/mm/ksm/sleep_millisecs", "1").unwrap();
    fs::write("/sys/kernel/mm/ksm/pages_to_scan", "1000").unwrap();
    fs::write("/sys/kernel/mm/ksm/run", "1").unwrap();
    let started = std::time::Instant::now();
    while shared() < 16 && started.elapsed().as_secs() < 30 {
        // Reading all along.
        assert!((0..PAGES).all(|page| map.read(page * PAGE + 8) == 0x6b73_6d01));
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let merged = shared();
    // Each written page is one's own again.
    for page in 0..PAGES {
        map.write(page * PAGE, page as u64);
    }
    for page in 0..PAGES {
        assert_eq!(map.read(page * PAGE), page as u64);
        assert_eq!(map.read(page * PAGE + 16), 0x6b73_6d02);
    }
    fs::write("/sys/kernel/mm/ksm/run", "2").unwrap();
    dune.leave();
    println!("{merged} pages shared");
    assert!(merged >= 16, "{merged} pages were merged: nothing was tested");
}

/// Soft offlining moves a page to another frame.
fn ept_follows_migration() {
    const MADV_SOFT_OFFLINE: i32 = 101;
    let map = Map::new(64 * PAGE);
    advise(&map, 0, map.bytes, libc::MADV_NOHUGEPAGE).unwrap();
    let dune = enter();
    for page in 0..64 {
        map.write(page * PAGE, page as u64 + 1);
    }
    for page in [3usize, 4, 40] {
        let before = frame(map.page(page));
        assert!(before != 0 && pagemap(map.page(page)) & PRESENT != 0);
        advise(&map, page * PAGE, PAGE, MADV_SOFT_OFFLINE).unwrap();
        assert_eq!(map.read(page * PAGE), page as u64 + 1);
        assert_ne!(frame(map.page(page)), before, "the page was not moved");
        map.write(page * PAGE, 77);
        assert_eq!(
            (map.read(page * PAGE), map.read((page + 1) * PAGE)),
            (77, page as u64 + 2)
        );
        map.write(page * PAGE, page as u64 + 1);
    }
    dune.leave();
    assert!((0..64).all(|page| map.read(page * PAGE) == page as u64 + 1));
}

/// Compaction takes pages from the low end of the memory and puts them into what is free at its high end, but for
/// blocks that are free as a whole. So of many pages some are kept, everywhere, and all others given back.
fn ept_follows_compaction() {
    // After a long run the free places may fill up with pages from further below. What a try leaves behind is in the way then.
    const TRIES: usize = 5;
    let mut maps = Vec::new();
    let moved = (0..TRIES).find_map(|_| {
        let (map, moved) = compact();
        maps.push(map);
        (moved != 0).then_some(moved)
    });
    println!("report: {moved:?} pages moved, {} tries", maps.len());
    assert!(moved.is_some(), "compaction moved nothing of {TRIES} maps");
}

/// Lets Linux compact memory under a map of which some pages are in use, and counts those that were moved.
fn compact() -> (Map, usize) {
    const PAGES: usize = 24 * 1024;
    const EACH: usize = 16;
    let map = Map::new(PAGES * PAGE);
    advise(&map, 0, map.bytes, libc::MADV_NOHUGEPAGE).unwrap();
    for page in 0..PAGES {
        map.write(page * PAGE, page as u64);
    }
    let words = pagemap_of(map.address(), PAGES);
    let mut pages: Vec<usize> = (0..PAGES).collect();
    pages.sort_unstable_by_key(|page| words[*page] & FRAME);
    let mut kept: Vec<usize> = pages.into_iter().step_by(EACH).collect();
    kept.sort_unstable();
    let mut next = 0;
    for page in kept.iter().copied().chain([PAGES]) {
        if next < page {
            advise(&map, next * PAGE, (page - next) * PAGE, libc::MADV_DONTNEED).unwrap();
        }
        next = page + 1;
    }
    let dune = enter();
    let frames: Vec<u64> = kept.iter().map(|page| frame(map.page(*page))).collect();
    for round in 0..2u64 {
        fs::write("/proc/sys/vm/compact_memory", "1").unwrap();
        for page in kept.iter().copied() {
            assert_eq!(map.read(page * PAGE), page as u64 + round);
            map.write(page * PAGE, page as u64 + round + 1);
        }
    }
    let moved = kept
        .iter()
        .zip(&frames)
        .filter(|(page, before)| frame(map.page(**page)) != **before)
        .count();
    dune.leave();
    (map, moved)
}

fn writes_from_outside_are_seen() {
    let map = Map::new(4 * PAGE);
    let dune = libdune::Dune::builder().children(false).enter().unwrap();
    for page in 0..4 {
        map.write(page * PAGE, 1);
    }
    map.protect(2 * PAGE, PAGE, libc::PROT_READ);
    let parent = std::process::id();
    // SAFETY: lets any process of this user write here.
    unsafe { libc::prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY) };
    let address = map.address();
    spawn(|| {
        let value = 42u64;
        let local = libc::iovec {
            iov_base: (&raw const value).cast_mut().cast(),
            iov_len: 8,
        };
        for page in [0usize, 3] {
            let remote = libc::iovec {
                iov_base: (address + page * PAGE) as *mut libc::c_void,
                iov_len: 8,
            };
            // SAFETY: reads our word; the parent's memory is its own.
            let written = unsafe { libc::process_vm_writev(parent as i32, &local, 1, &remote, 1, 0) };
            assert_eq!(written, 8, "{}", io::Error::last_os_error());
        }
        let memory = fs::File::options()
            .write(true)
            .open(format!("/proc/{parent}/mem"))
            .unwrap();
        for page in [1usize, 2] {
            // Also what is read-only: a private copy, as a debugger makes it.
            memory
                .write_all_at(&43u64.to_le_bytes(), (address + page * PAGE) as u64)
                .unwrap();
        }
    })
    .wait()
    .assert_success();
    assert_eq!([0, 1, 2, 3].map(|page| map.read(page * PAGE)), [42, 43, 43, 42]);
    dune.leave();
}

pub struct Userfaultfd(OwnedFd);

impl Userfaultfd {
    /// For faults of user mode only, as an ordinary user may have it.
    fn new(features: u32) -> Self {
        Self::with_flags(general::UFFD_USER_MODE_ONLY, features)
    }

    pub fn with_flags(flags: u32, features: u32) -> Self {
        let flags = libc::O_CLOEXEC | flags as i32;
        // SAFETY: a new fd.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) } as i32;
        assert!(fd >= 0, "userfaultfd: {}", io::Error::last_os_error());
        // SAFETY: just made.
        let uffd = Self(unsafe { OwnedFd::from_raw_fd(fd) });
        let mut api = uffdio_api {
            api: general::UFFD_API.into(),
            features: features.into(),
            ioctls: 0,
        };
        uffd.request(UFFDIO_API, (&raw mut api).cast());
        uffd
    }

    fn request(&self, request: u32, argument: *mut libc::c_void) {
        // SAFETY: the callers pass a structure of the size that the request names.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), request.into(), argument) };
        assert_eq!(result, 0, "{request:#x}: {}", io::Error::last_os_error());
    }

    pub fn register(&self, map: &Map, mode: u32) {
        let mut register = uffdio_register {
            range: uffdio_range {
                start: map.address() as u64,
                len: map.bytes as u64,
            },
            mode: mode.into(),
            ioctls: 0,
        };
        self.request(UFFDIO_REGISTER, (&raw mut register).cast());
    }

    /// Waits for a page fault: the page's address, and whether it is a write to a protected page.
    pub fn next_fault(&self) -> (u64, bool) {
        let bytes = size_of::<uffd_msg>();
        // SAFETY: one message, all zeroes are one; all that was asked for are page faults.
        let fault = unsafe {
            let mut message: uffd_msg = core::mem::zeroed();
            let fd = self.0.as_raw_fd();
            assert_eq!(libc::read(fd, (&raw mut message).cast(), bytes), bytes as isize);
            message.arg.pagefault
        };
        let protected = fault.flags & u64::from(general::UFFD_PAGEFAULT_FLAG_WP) != 0;
        (fault.address & !0xfff, protected)
    }

    /// Puts a page there that is full of its address.
    pub fn fill(&self, address: u64, mode: u32) {
        let page = [address; PAGE / 8];
        let mut copy = uffdio_copy {
            dst: address,
            src: page.as_ptr() as u64,
            len: PAGE as u64,
            mode: mode.into(),
            copy: 0,
        };
        self.request(UFFDIO_COPY, (&raw mut copy).cast());
    }

    /// Protects `bytes` from `start` against writes, or no longer.
    fn protect(&self, start: u64, bytes: usize, on: bool) {
        let mut change = uffdio_writeprotect {
            range: uffdio_range {
                start,
                len: bytes as u64,
            },
            mode: on.into(),
        };
        self.request(UFFDIO_WRITEPROTECT, (&raw mut change).cast());
    }
}

/// Missing pages are filled, and writes to protected ones let through, by a thread that is told of each.
fn userfaultfd_serves_a_dune_thread() {
    const PAGES: usize = 32;
    let uffd = Userfaultfd::new(general::UFFD_FEATURE_PAGEFAULT_FLAG_WP);
    let map = Map::new(PAGES * PAGE);
    uffd.register(
        &map,
        general::UFFDIO_REGISTER_MODE_MISSING | general::UFFDIO_REGISTER_MODE_WP,
    );
    let server = std::thread::spawn(move || {
        let (mut missing, mut protected) = (0u32, 0u32);
        while protected < PAGES as u32 {
            let (address, is_protected) = uffd.next_fault();
            if is_protected {
                protected += 1;
                uffd.protect(address, PAGE, false);
            } else {
                missing += 1;
                uffd.fill(address, general::UFFDIO_COPY_MODE_WP);
            }
        }
        (missing, protected)
    });
    let dune = enter();
    for page in 0..PAGES {
        assert_eq!(
            map.read(page * PAGE + 8),
            map.page(page) as u64,
            "not what was filled in"
        );
    }
    for page in 0..PAGES {
        map.write(page * PAGE, page as u64);
        assert_eq!(map.read(page * PAGE), page as u64);
    }
    dune.leave();
    assert_eq!(server.join().unwrap(), (PAGES as u32, PAGES as u32));
}

/// A critical section that waits for a page, and is moved to another CPU meanwhile, goes on at its abort address. It
/// waits in the host loop where only faults of user mode are served, in RUN itself otherwise.
fn rseq_sections_that_wait_for_a_page_are_aborted() {
    const PAGES: usize = 16;
    // SAFETY: has no effect.
    let thread = unsafe { libc::gettid() };
    for flags in [general::UFFD_USER_MODE_ONLY, 0] {
        let uffd = Userfaultfd::with_flags(flags, 0);
        let map = Map::new(PAGES * PAGE);
        uffd.register(&map, general::UFFDIO_REGISTER_MODE_MISSING);
        set_affinity(thread, 0);
        let server = std::thread::spawn(move || {
            for fault in 1..=PAGES {
                let (address, _) = uffd.next_fault();
                set_affinity(thread, fault % 2);
                uffd.fill(address, 0);
            }
        });
        let dune = enter();
        let area = rseq_area();
        let aborted = |page| restartable(area, 1, ptr::with_exposed_provenance(map.page(page)));
        let waited = (0..PAGES).filter(|page| aborted(*page)).count();
        assert!(Dune::is_active());
        let again = (0..PAGES).filter(|page| aborted(*page)).count();
        dune.leave();
        server.join().unwrap();
        assert_eq!(waited, PAGES, "sections that waited, and were aborted (flags {flags})");
        assert!(
            again < PAGES / 2,
            "{again} of {PAGES} were aborted when their pages were there"
        );
    }
}

fn ept_pages_are_charged() {
    let cgroup = Cgroup::new("memory", "charged");
    spawn(|| {
        cgroup.write("cgroup.procs", "0");
        // A page in each 2 MiB of many GiBs: each needs a table of the EPT and few other things.
        let map = Map::at(0, 2 << 30, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_NORESERVE);
        advise(&map, 0, map.bytes, libc::MADV_NOHUGEPAGE).unwrap();
        for offset in (0..map.bytes).step_by(LARGE) {
            map.read(offset);
        }
        let dune = enter();
        let kernel = || cgroup.stat("memory.stat", "kernel");
        let before = kernel();
        for offset in (0..map.bytes).step_by(LARGE) {
            map.read(offset);
        }
        let tables = (map.bytes / LARGE) as u64;
        let grown = kernel().saturating_sub(before);
        println!("{grown} bytes more for {tables} tables");
        assert!(
            grown >= (tables - 100) * PAGE as u64,
            "{grown} bytes more for {tables} tables"
        );
        // And they go with the memory.
        drop(map);
        let left = kernel().saturating_sub(before);
        assert!(left < grown / 4, "{left} bytes are left of {grown}");
        dune.leave();
    })
    .wait()
    .assert_success();
}

fn oom_of_a_cgroup_ends_a_dune_process() {
    let cgroup = Cgroup::new("memory", "oom");
    cgroup.write("memory.max", "48M");
    let _ = fs::write(cgroup.file("memory.swap.max"), "0");
    let ended = spawn(|| {
        cgroup.write("cgroup.procs", "0");
        let map = Map::at(0, 1 << 30, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_NORESERVE);
        let _dune = enter();
        for offset in (0..map.bytes).step_by(PAGE) {
            map.write(offset, 1);
        }
        unreachable!("a gibibyte in a cgroup of 48 MiB");
    })
    .wait();
    assert_eq!(ended.signal(), Some(libc::SIGKILL), "{ended:?}");
    assert!(cgroup.stat("memory.events", "oom_kill") >= 1);
    enter().leave();
}

/// Pages around the one that is touched come along, and have the permissions of their own.
fn neighbours_come_along() {
    let map = Map::new(64 * PAGE);
    advise(&map, 0, map.bytes, libc::MADV_NOHUGEPAGE).unwrap();
    for page in 0..64 {
        map.write(page * PAGE, page as u64);
    }
    map.protect(20 * PAGE, PAGE, libc::PROT_READ);
    map.protect(21 * PAGE, PAGE, libc::PROT_NONE);
    advise(&map, 22 * PAGE, PAGE, libc::MADV_DONTNEED).unwrap();
    let dune = enter();
    install_probe(&dune);
    let before = dune.counters();
    for page in (0..64).filter(|page| !(20..23).contains(page)) {
        assert_eq!(load(map.page(page)), Ok(page as u64));
    }
    let after = dune.counters();
    let (asked, around) = (after.ept_4k - before.ept_4k, after.ept_around - before.ept_around);
    println!("{asked} leaves asked for, {around} came along");
    if dune.info().capabilities & libdune::abi::CAP_EPT_AD != 0 {
        assert!(around >= 40, "{around} neighbours came along");
    } else {
        assert_eq!(around, 0, "nobody could tell which are used");
    }
    assert_eq!(load(map.page(20)), Ok(20));
    assert_refused(store(map.page(20), 1), map.page(20));
    assert_refused(load(map.page(21)), map.page(21));
    assert_eq!(load(map.page(22)), Ok(0));
    assert_eq!(store(map.page(23), 1), Ok(()));
    dune.leave();
}
