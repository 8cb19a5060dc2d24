// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory that is no RAM to Linux: a PCI BAR, frames mapped by `remap_pfn_range`; that the EPT has its memory type; pages of
//! 1 GiB.

use std::arch::asm;
use std::fs;
use std::fs::File;
use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::path::PathBuf;

use crate::framework::Need;
use crate::framework::Suite;
use crate::framework::Test;
use crate::framework::User;
use crate::seeing::Trace;
use crate::support::assert_refused;
use crate::support::enter;
use crate::support::install_probe;
use crate::support::load;
use crate::support::spawn;
use crate::support::Map;
use crate::support::PAGE;

const TRACEPOINTS: Need = Need::Path("/sys/kernel/tracing/events/dune");
const FRAMES: &str = "/sys/kernel/debug/dune/frames";
const GIB: usize = 1 << 30;

pub const TESTS: &[Test] = &[
    Test::asserting(
        "ept_maps_remapped_frames_with_their_type",
        ept_maps_remapped_frames_with_their_type,
    )
    .run_as(User::Root)
    .needs(&[TRACEPOINTS, Need::Path(FRAMES)]),
    Test::asserting("ept_maps_a_pci_bar", ept_maps_a_pci_bar)
        .run_as(User::Root)
        .needs(&[TRACEPOINTS]),
    // On a machine of its own, with more memory.
    Test::asserting("ept_maps_hugetlb_of_1g", ept_maps_hugetlb_of_1g)
        .run_as(User::Root)
        .suite(Suite::Harness),
];

/// A page of a file, shared, far from all others: whose neighbours come along is no matter here.
fn map_page(file: &File, offset: usize) -> Map {
    const APART: usize = 2 << 20;
    // Where Linux has room.
    let reserved = Map::at(0, 2 * APART, libc::PROT_NONE, libc::MAP_NORESERVE);
    let address = reserved.address().next_multiple_of(APART);
    // SAFETY: in place of a part of a mapping that nobody uses.
    let start = unsafe {
        libc::mmap(
            address as *mut libc::c_void,
            PAGE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_FIXED,
            file.as_raw_fd(),
            offset as libc::off_t,
        )
    };
    assert_ne!(start, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
    // What is around stays as it is.
    std::mem::forget(reserved);
    Map::owning(start.cast(), PAGE)
}

/// The memory types that EPT leaves got at an address since the trace began; it must be off, since reading it is system calls.
fn types_at(trace: &Trace, address: usize) -> Vec<String> {
    let place = format!(" gva {address:#x} ");
    trace
        .events("dune_ept_violation")
        .iter()
        .filter(|line| line.contains(&place) && line.contains(" outcome mapped-4k"))
        .map(|line| line.rsplit(' ').next().unwrap().to_string())
        .collect()
}

fn open(path: &Path) -> File {
    let file = OpenOptions::new().read(true).write(true).open(path);
    file.unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Frames that a driver maps: write-back, write-combining and uncached ones, each so in Dune mode too.
fn ept_maps_remapped_frames_with_their_type() {
    let file = open(Path::new(FRAMES));
    let maps = [0, 1, 2].map(|frame| map_page(&file, frame * PAGE));
    for (frame, map) in maps.iter().enumerate() {
        map.write(0, 100 + frame as u64);
    }
    let dune = enter();
    install_probe(&dune);
    let trace = Trace::start();
    for (frame, map) in maps.iter().enumerate() {
        assert_eq!(map.read(0), 100 + frame as u64);
        map.write(8, 200 + frame as u64);
        assert_eq!(map.read(8), 200 + frame as u64);
    }
    trace.set(false);
    for (map, wanted) in maps.iter().zip(["wb", "wc", "uc"]) {
        let types = types_at(&trace, map.address());
        assert!(
            !types.is_empty() && types.iter().all(|found| found == wanted),
            "{wanted}: {types:?}"
        );
    }
    drop(trace);
    // A child has the same frames, in Dune mode as outside.
    spawn(|| {
        assert_eq!(maps[1].read(8), 201);
        maps[1].write(16, 301);
    })
    .wait()
    .assert_success();
    assert_eq!(maps[1].read(16), 301);
    let gone = maps[2].address();
    maps[2].unmap(0, PAGE);
    assert_refused(load(gone), gone);
    dune.leave();
    assert_eq!([maps[0].read(8), maps[1].read(8)], [200, 201]);
}

/// The emulated machine's graphics card, in a mode in which its memory is at its BAR; as it was when dropped.
struct Graphics(PathBuf);

impl Graphics {
    const PORTS: (u64, u64) = (0x1ce, 3);
    const WIDTH: u16 = 1;
    const HEIGHT: u16 = 2;
    const DEPTH: u16 = 3;
    const ENABLE: u16 = 4;
    /// On, memory in one piece.
    const ON: u16 = 0x41;

    /// The first PCI device whose first BAR may be write-combining.
    fn new() -> Self {
        let devices = fs::read_dir("/sys/bus/pci/devices").unwrap();
        let device = devices
            .map(|entry| entry.unwrap().path())
            .find(|path| path.join("resource0_wc").exists())
            .expect("no PCI device has a prefetchable BAR");
        let class = fs::read_to_string(device.join("class")).unwrap();
        assert_eq!(class.trim(), "0x030000", "not a graphics card: {}", device.display());
        // SAFETY: the machine is the test's own.
        assert_eq!(unsafe { libc::ioperm(Self::PORTS.0, Self::PORTS.1, 1) }, 0);
        let graphics = Self(device);
        for (index, value) in [
            (Self::ENABLE, 0),
            (Self::WIDTH, 640),
            (Self::HEIGHT, 480),
            (Self::DEPTH, 8),
            (Self::ENABLE, Self::ON),
        ] {
            graphics.set(index, value);
        }
        graphics
    }

    /// Sets one of the card's registers (Bochs' VBE_DISPI).
    fn set(&self, index: u16, value: u16) {
        // SAFETY: ports of a card that nobody else uses.
        unsafe {
            asm!("out dx, ax", in("dx") Self::PORTS.0 as u16, in("ax") index, options(nostack, preserves_flags));
            asm!("out dx, ax", in("dx") Self::PORTS.0 as u16 + 1, in("ax") value, options(nostack, preserves_flags));
        }
    }
}

impl Drop for Graphics {
    fn drop(&mut self) {
        self.set(Self::ENABLE, 0);
    }
}

/// Two pages of a BAR, uncached and write-combining: what is written natively is read in Dune mode, and the other way round.
fn ept_maps_a_pci_bar() {
    const PLACE: usize = 16 * PAGE;
    let graphics = Graphics::new();
    let resource = |name: &str| open(&graphics.0.join(name));
    // Not the same page: Linux gives a page one memory type at a time.
    let uncached = map_page(&resource("resource0"), PLACE);
    let combining = map_page(&resource("resource0_wc"), PLACE + PAGE);
    uncached.write(0, 0x1122_3344);
    combining.write(0, 0x5566_7788);
    assert_eq!(uncached.read(0), 0x1122_3344, "the card's memory is not there");
    let dune = enter();
    install_probe(&dune);
    let before = dune.counters().ept_io;
    let trace = Trace::start();
    assert_eq!([uncached.read(0), combining.read(0)], [0x1122_3344, 0x5566_7788]);
    uncached.write(8, 42);
    combining.write(8, 43);
    assert_eq!([uncached.read(8), combining.read(8)], [42, 43]);
    trace.set(false);
    for (map, wanted) in [(&uncached, "uc"), (&combining, "wc")] {
        let types = types_at(&trace, map.address());
        assert!(
            !types.is_empty() && types.iter().all(|found| found == wanted),
            "{wanted}: {types:?}"
        );
    }
    drop(trace);
    assert!(dune.counters().ept_io >= before + 2);
    let gone = combining.address();
    combining.unmap(0, PAGE);
    assert_refused(load(gone), gone);
    dune.leave();
    let again = map_page(&resource("resource0"), PLACE + PAGE);
    assert_eq!([uncached.read(8), again.read(8)], [42, 43]);
}

/// A page of 1 GiB: by leaves of 2 MiB where the CPU has them, gone when it is unmapped.
fn ept_maps_hugetlb_of_1g() {
    const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages";
    fs::write(POOL, "1").unwrap();
    assert_eq!(fs::read_to_string(POOL).unwrap().trim(), "1", "no GiB in one piece");
    // SAFETY: a new mapping.
    let start = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            GIB,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_1GB,
            -1,
            0,
        )
    };
    assert_ne!(start, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
    const LARGE: usize = 2 << 20;
    const PIECES: usize = 16;
    let map = Map::owning(start.cast(), GIB);
    let dune = enter();
    install_probe(&dune);
    let place = |piece: usize| piece * (GIB / PIECES) + piece * PAGE;
    let before = dune.counters();
    for piece in 0..PIECES {
        map.write(place(piece), piece as u64 + 1);
        // In the same 2 MiB, at its end.
        map.write(place(piece) / LARGE * LARGE + LARGE - 8, piece as u64 + 101);
    }
    let after = dune.counters();
    if dune.info().capabilities & libdune::abi::CAP_EPT_2M != 0 {
        assert!(
            after.ept_2m - before.ept_2m >= PIECES as u64,
            "not mapped by leaves of 2 MiB"
        );
        assert!(
            after.ept_4k - before.ept_4k < PIECES as u64,
            "mapped by leaves of 4 KiB"
        );
    }
    let address = map.address();
    dune.leave();
    for piece in 0..PIECES {
        assert_eq!(map.read(place(piece)), piece as u64 + 1);
        map.write(place(piece) + 8, 7);
    }
    let dune = enter();
    install_probe(&dune);
    assert!((0..PIECES).all(|piece| map.read(place(piece) + 8) == 7));
    map.unmap(0, GIB);
    for piece in 0..PIECES {
        assert_refused(load(address + place(piece)), address + place(piece));
    }
    dune.leave();
}
