// SPDX-License-Identifier: MIT OR Apache-2.0

//! userfaultfd: a missing page filled by another thread or by a SIGBUS handler, a write-protected one, and writes that
//! are only noted (WP_ASYNC) and collected by PAGEMAP_SCAN.

use core::sync::atomic::AtomicI32;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::AtomicUsize;
use core::sync::atomic::Ordering::Relaxed;
use std::thread;

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

use crate::measure::timed;
use crate::measure::System;
use crate::pagemap::pages_of;
use crate::pagemap::Pagemap;
use crate::pagemap::NO_PAGES;
use crate::pages::Memory;
use crate::pages::PAGE;

const PAGES: usize = 200;
/// Pages of a scan.
const SCANNED: usize = 1000;

struct Uffd(i32);

impl Uffd {
    fn new(features: u32) -> Option<Self> {
        // SAFETY: A fresh fd; the structure is as Linux has it.
        unsafe {
            let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) as i32;
            if fd < 0 {
                return None;
            }
            let uffd = Self(fd);
            let mut api = uffdio_api {
                api: general::UFFD_API.into(),
                features: features.into(),
                ioctls: 0,
            };
            (libc::ioctl(fd, UFFDIO_API.into(), &raw mut api) == 0).then_some(uffd)
        }
    }

    fn register(&self, memory: &Memory, bytes: usize, mode: u32) {
        let mut ask = uffdio_register {
            range: uffdio_range {
                start: memory.start() as u64,
                len: bytes as u64,
            },
            mode: mode.into(),
            ioctls: 0,
        };
        // SAFETY: The structure is as Linux has it; the memory is ours.
        assert_eq!(unsafe { libc::ioctl(self.0, UFFDIO_REGISTER.into(), &raw mut ask) }, 0);
    }

    fn protect(&self, start: u64, bytes: usize, on: bool) {
        let mut ask = uffdio_writeprotect {
            range: uffdio_range {
                start,
                len: bytes as u64,
            },
            mode: on.into(),
        };
        // SAFETY: As above.
        assert_eq!(
            unsafe { libc::ioctl(self.0, UFFDIO_WRITEPROTECT.into(), &raw mut ask) },
            0
        );
    }

    /// Handles `count` faults in another thread.
    fn serve(&self, count: usize, handle: impl Fn(i32, u64) + Send + 'static) -> thread::JoinHandle<()> {
        let fd = self.0;
        thread::spawn(move || {
            for _ in 0..count {
                // SAFETY: A message into a structure of its size; all that was asked for are page faults.
                let address = unsafe {
                    let mut message: uffd_msg = core::mem::zeroed();
                    let bytes = size_of::<uffd_msg>();
                    assert_eq!(libc::read(fd, (&raw mut message).cast(), bytes), bytes as isize);
                    message.arg.pagefault.address
                };
                handle(fd, address & !(PAGE as u64 - 1));
            }
        })
    }
}

impl Drop for Uffd {
    fn drop(&mut self) {
        // SAFETY: Ours.
        unsafe { libc::close(self.0) };
    }
}

/// Fills a page with sevens.
fn fill(fd: i32, page: u64) -> bool {
    static SEVENS: [u8; PAGE] = [7; PAGE];
    let mut ask = uffdio_copy {
        dst: page,
        src: SEVENS.as_ptr() as u64,
        len: PAGE as u64,
        mode: 0,
        copy: 0,
    };
    // SAFETY: The structure is as Linux has it.
    unsafe { libc::ioctl(fd, UFFDIO_COPY.into(), &raw mut ask) == 0 }
}

pub fn measure(linux: &System<'_>) {
    if linux.wants(&["page_fault"]) {
        missing(&linux.named("userfaultfd"));
        sigbus(&linux.named("userfaultfd SIGBUS"));
    }
    if linux.wants(&["trap_fix"]) {
        write_protected(&linux.named("userfaultfd"));
    }
    if linux.wants(&["dirty_scan", "dirty_write"]) {
        noted(&linux.named("userfaultfd WP_ASYNC"));
    }
}

fn missing(system: &System<'_>) {
    let Some(uffd) = Uffd::new(0) else { return };
    let memory = Memory::new(PAGES * PAGE).small();
    uffd.register(&memory, PAGES * PAGE, general::UFFDIO_REGISTER_MODE_MISSING);
    let server = uffd.serve(PAGES, |fd, page| assert!(fill(fd, page)));
    system.once("page_fault", PAGES, |i| timed(|| memory.write(i * PAGE, 1)));
    assert!((0..PAGES).all(|i| memory.read(i * PAGE + 1) == 7));
    server.join().expect("all faults were handled");
}

static SIGBUS_FD: AtomicI32 = AtomicI32::new(-1);
static SIGBUS_COUNT: AtomicUsize = AtomicUsize::new(0);

extern "C" fn on_sigbus(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    SIGBUS_COUNT.fetch_add(1, Relaxed);
    // SAFETY: Linux' own siginfo.
    let address = unsafe { (*info).si_addr() } as u64;
    if !fill(SIGBUS_FD.load(Relaxed), address & !(PAGE as u64 - 1)) {
        // SAFETY: Ends the process.
        unsafe { libc::abort() };
    }
}

fn sigbus(system: &System<'_>) {
    let Some(uffd) = Uffd::new(general::UFFD_FEATURE_SIGBUS) else {
        return;
    };
    SIGBUS_FD.store(uffd.0, Relaxed);
    // SAFETY: A handler of the right type.
    unsafe {
        let mut action: libc::sigaction = core::mem::zeroed();
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        assert_eq!(libc::sigaction(libc::SIGBUS, &action, core::ptr::null_mut()), 0);
    }
    let memory = Memory::new(PAGES * PAGE).small();
    uffd.register(&memory, PAGES * PAGE, general::UFFDIO_REGISTER_MODE_MISSING);
    system.once("page_fault", PAGES, |i| timed(|| memory.write(i * PAGE, 1)));
    assert_eq!(SIGBUS_COUNT.load(Relaxed), PAGES);
    // SAFETY: The default again.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}

fn write_protected(system: &System<'_>) {
    let Some(uffd) = Uffd::new(0) else { return };
    let memory = Memory::new(PAGES * PAGE).small().populated();
    uffd.register(&memory, PAGES * PAGE, general::UFFDIO_REGISTER_MODE_WP);
    uffd.protect(memory.start() as u64, PAGES * PAGE, true);
    let fd = uffd.0;
    let server = uffd.serve(PAGES, move |_, page| {
        let again = core::mem::ManuallyDrop::new(Uffd(fd));
        again.protect(page, PAGE, false);
    });
    system.once("trap_fix", PAGES, |i| timed(|| memory.write(i * PAGE, i as u8)));
    assert!((0..PAGES).all(|i| memory.read(i * PAGE) == i as u8));
    server.join().expect("all faults were handled");
}

/// Linux notes the writes; the price of a write, and that of asking for 1,000 pages.
fn noted(system: &System<'_>) {
    let Some(uffd) = Uffd::new(general::UFFD_FEATURE_WP_ASYNC | general::UFFD_FEATURE_WP_UNPOPULATED) else {
        return;
    };
    let memory = Memory::new(SCANNED * PAGE).small().populated();
    uffd.register(&memory, SCANNED * PAGE, general::UFFDIO_REGISTER_MODE_WP);
    uffd.protect(memory.start() as u64, SCANNED * PAGE, true);
    system.once("dirty_write", PAGES, |i| timed(|| memory.write(i * PAGE, 1)));
    let Some(pagemap) = Pagemap::open() else { return };
    let seen = AtomicU64::new(0);
    let mut regions = [NO_PAGES; 8];
    system.once("dirty_scan", 20, |_| {
        (0..SCANNED).for_each(|i| memory.write(i * PAGE, 2));
        let mut found = 0;
        let flags = general::PM_SCAN_WP_MATCHING | general::PM_SCAN_CHECK_WPASYNC;
        let (range, written) = (0..SCANNED * PAGE, general::PAGE_IS_WRITTEN);
        let ticks = timed(|| found = pagemap.scan(&memory, range, flags, written, written, &mut regions));
        assert_eq!(found, 1, "one region was written");
        seen.fetch_add(pages_of(&regions[0]), Relaxed);
        ticks
    });
    if system.wants(&["dirty_scan"]) {
        assert_eq!(seen.load(Relaxed), 20 * SCANNED as u64);
    }
}
