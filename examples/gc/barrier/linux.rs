// SPDX-License-Identifier: MIT OR Apache-2.0

//! Linux' own ways: mprotect and SIGSEGV, userfaultfd with a thread that handles the writes, userfaultfd that only notes
//! them (WP_ASYNC) with PAGEMAP_SCAN.

use std::mem;
use std::os::fd::AsRawFd;
use std::os::fd::FromRawFd;
use std::os::fd::OwnedFd;
use std::thread::JoinHandle;

use linux_raw_sys::general;
use linux_raw_sys::general::page_region;
use linux_raw_sys::general::pm_scan_arg;
use linux_raw_sys::general::uffd_msg;
use linux_raw_sys::general::uffdio_api;
use linux_raw_sys::general::uffdio_range;
use linux_raw_sys::general::uffdio_register;
use linux_raw_sys::general::uffdio_writeprotect;
use linux_raw_sys::ioctl::UFFDIO_API;
use linux_raw_sys::ioctl::UFFDIO_REGISTER;
use linux_raw_sys::ioctl::UFFDIO_WRITEPROTECT;

use super::Barrier;
use super::BarrierError;
use super::Notes;
use crate::heap::Memory;
use crate::heap::PAGE;

/// Pages without write permission, and a signal handler.
pub struct Mprotect {
    notes: Notes,
    start: usize,
    bytes: usize,
    before: libc::sigaction,
}

impl Mprotect {
    pub fn new(memory: &Memory) -> Result<Self, BarrierError> {
        let notes = Notes::new(memory.address(), memory.pages);
        // SAFETY: A handler of the right type.
        let before = unsafe {
            let mut action: libc::sigaction = mem::zeroed();
            let mut before: libc::sigaction = mem::zeroed();
            action.sa_sigaction = note_write as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            if libc::sigaction(libc::SIGSEGV, &raw const action, &raw mut before) != 0 {
                return Err(BarrierError::last("sigaction"));
            }
            before
        };
        let barrier = Self {
            notes,
            start: memory.address(),
            bytes: memory.bytes(),
            before,
        };
        mprotect(barrier.start, barrier.bytes, libc::PROT_READ)?;
        Ok(barrier)
    }
}

fn mprotect(start: usize, bytes: usize, protection: i32) -> Result<(), BarrierError> {
    // SAFETY: Pages of the heap.
    match unsafe { libc::mprotect(start as *mut libc::c_void, bytes, protection) } {
        0 => Ok(()),
        _ => Err(BarrierError::last("mprotect")),
    }
}

extern "C" fn note_write(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: Linux' own siginfo.
    let address = unsafe { (*info).si_addr() } as usize;
    let page = Notes::note(address);
    if page.is_none_or(|page| mprotect(page, PAGE, libc::PROT_READ | libc::PROT_WRITE).is_err()) {
        // SAFETY: The fault comes again, and ends the process.
        unsafe { libc::signal(libc::SIGSEGV, libc::SIG_DFL) };
    }
}

impl Barrier for Mprotect {
    fn take_written(&mut self, pages: &mut Vec<usize>) -> Result<(), BarrierError> {
        self.notes.take(pages);
        mprotect(self.start, self.bytes, libc::PROT_READ)
    }
}

impl Drop for Mprotect {
    fn drop(&mut self) {
        let _ = mprotect(self.start, self.bytes, libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: The action that was there.
        unsafe { libc::sigaction(libc::SIGSEGV, &raw const self.before, std::ptr::null_mut()) };
    }
}

/// Not among the crate's numbers: `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;

/// A userfaultfd that has all of the heap write-protected, and the page behind it.
struct Uffd {
    fd: OwnedFd,
    start: u64,
    bytes: u64,
}

impl Uffd {
    fn new(memory: &Memory, features: u32) -> Result<Self, BarrierError> {
        // SAFETY: A fresh fd; the structures are as Linux has them; the memory is the heap's.
        unsafe {
            let fd = libc::syscall(
                libc::SYS_userfaultfd,
                // What an ordinary user may have.
                libc::O_CLOEXEC | general::UFFD_USER_MODE_ONLY as i32,
            ) as i32;
            if fd < 0 {
                return Err(BarrierError::last("userfaultfd"));
            }
            let uffd = Self {
                fd: OwnedFd::from_raw_fd(fd),
                start: memory.address() as u64,
                bytes: (memory.bytes() + PAGE) as u64,
            };
            let mut api = uffdio_api {
                api: general::UFFD_API.into(),
                features: features.into(),
                ioctls: 0,
            };
            if libc::ioctl(fd, UFFDIO_API.into(), &raw mut api) != 0 {
                return Err(BarrierError::last("UFFDIO_API"));
            }
            let mut register = uffdio_register {
                range: uffdio_range {
                    start: uffd.start,
                    len: uffd.bytes,
                },
                mode: general::UFFDIO_REGISTER_MODE_WP.into(),
                ioctls: 0,
            };
            if libc::ioctl(fd, UFFDIO_REGISTER.into(), &raw mut register) != 0 {
                return Err(BarrierError::last("UFFDIO_REGISTER"));
            }
            uffd.protect(uffd.start, uffd.bytes, true)?;
            Ok(uffd)
        }
    }

    fn protect(&self, start: u64, len: u64, on: bool) -> Result<(), BarrierError> {
        write_protect(self.fd.as_raw_fd(), start, len, on)
    }
}

fn write_protect(fd: i32, start: u64, len: u64, on: bool) -> Result<(), BarrierError> {
    let mut ask = uffdio_writeprotect {
        range: uffdio_range { start, len },
        mode: on.into(),
    };
    // SAFETY: The structure is as Linux has it.
    match unsafe { libc::ioctl(fd, UFFDIO_WRITEPROTECT.into(), &raw mut ask) } {
        0 => Ok(()),
        _ => Err(BarrierError::last("UFFDIO_WRITEPROTECT")),
    }
}

/// A thread that is told of each first write to a page, notes it and lets it go on.
pub struct Userfaultfd {
    uffd: Uffd,
    notes: Notes,
    server: Option<JoinHandle<()>>,
}

impl Userfaultfd {
    pub fn new(memory: &Memory) -> Result<Self, BarrierError> {
        // The page behind the heap is for waking the thread up at the end.
        let notes = Notes::new(memory.address(), memory.pages + 1);
        let uffd = Uffd::new(memory, 0)?;
        let (fd, last) = (uffd.fd.as_raw_fd(), memory.address() + memory.bytes());
        let server = std::thread::spawn(move || {
            let mut message = mem::MaybeUninit::<uffd_msg>::uninit();
            loop {
                // SAFETY: A message into a structure of its size; all that was asked for are page faults.
                let address = unsafe {
                    if libc::read(fd, message.as_mut_ptr().cast(), size_of::<uffd_msg>()) <= 0 {
                        return;
                    }
                    message.assume_init_ref().arg.pagefault.address
                };
                let page = Notes::note(address as usize);
                let is_done = page.is_some_and(|page| write_protect(fd, page as u64, PAGE as u64, false).is_ok());
                if !is_done || page == Some(last) {
                    return;
                }
            }
        });
        Ok(Self {
            uffd,
            notes,
            server: Some(server),
        })
    }
}

impl Barrier for Userfaultfd {
    fn take_written(&mut self, pages: &mut Vec<usize>) -> Result<(), BarrierError> {
        self.notes.take(pages);
        self.uffd.protect(self.uffd.start, self.uffd.bytes, true)
    }
}

impl Drop for Userfaultfd {
    fn drop(&mut self) {
        let last = (self.uffd.start + self.uffd.bytes - 1) as *mut u8;
        // SAFETY: In the page behind the heap, which is mapped: the thread is told of this write, and ends.
        unsafe { last.write_volatile(1) };
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

const NO_PAGES: page_region = page_region {
    start: 0,
    end: 0,
    categories: 0,
};

/// Linux notes the first write to each page in its own page table, and is asked.
pub struct PagemapScan {
    uffd: Uffd,
    pagemap: OwnedFd,
    regions: Vec<page_region>,
}

impl PagemapScan {
    pub fn new(memory: &Memory) -> Result<Self, BarrierError> {
        let uffd = Uffd::new(
            memory,
            general::UFFD_FEATURE_WP_ASYNC | general::UFFD_FEATURE_WP_UNPOPULATED,
        )?;
        let pagemap = std::fs::File::open("/proc/self/pagemap").map_err(|error| BarrierError::Linux {
            step: "/proc/self/pagemap",
            error,
        })?;
        Ok(Self {
            uffd,
            pagemap: pagemap.into(),
            regions: vec![NO_PAGES; 256],
        })
    }
}

impl Barrier for PagemapScan {
    fn take_written(&mut self, pages: &mut Vec<usize>) -> Result<(), BarrierError> {
        let written = general::PAGE_IS_WRITTEN.into();
        let (mut start, end) = (self.uffd.start, self.uffd.start + self.uffd.bytes - PAGE as u64);
        while start < end {
            let mut ask = pm_scan_arg {
                size: size_of::<pm_scan_arg>() as u64,
                flags: (general::PM_SCAN_WP_MATCHING | general::PM_SCAN_CHECK_WPASYNC).into(),
                start,
                end,
                walk_end: 0,
                vec: self.regions.as_mut_ptr() as u64,
                vec_len: self.regions.len() as u64,
                max_pages: 0,
                category_inverted: 0,
                category_mask: written,
                category_anyof_mask: 0,
                return_mask: written,
            };
            // SAFETY: The structure is as Linux has it; the regions are where it says.
            let found = unsafe { libc::ioctl(self.pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut ask) };
            let Ok(found) = usize::try_from(found) else {
                return Err(BarrierError::last("PAGEMAP_SCAN"));
            };
            for region in &self.regions[..found] {
                let page = |address: u64| (address - self.uffd.start) as usize / PAGE;
                pages.extend(page(region.start)..page(region.end));
            }
            start = ask.walk_end;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What each names must be what was written, again and again. Linux or its settings may lack one: then it says so.
    #[test]
    fn barriers_name_what_was_written() {
        type Make = fn(&Memory) -> Result<Box<dyn Barrier>, BarrierError>;
        let makers: [Make; 3] = [
            |memory| Ok(Box::new(Mprotect::new(memory)?)),
            |memory| Ok(Box::new(Userfaultfd::new(memory)?)),
            |memory| Ok(Box::new(PagemapScan::new(memory)?)),
        ];
        for make in makers {
            let memory = Memory::new(1000).unwrap();
            let mut barrier = match make(&memory) {
                Ok(barrier) => barrier,
                Err(error) => {
                    eprintln!("not here: {error}");
                    continue;
                }
            };
            for round in 0..3 {
                let wanted: Vec<usize> = (0..1000).filter(|page| page % (3 + round) == round).collect();
                for page in &wanted {
                    // SAFETY: In the memory.
                    unsafe { ((memory.address() + page * PAGE + 8) as *mut u64).write_volatile(round as u64) };
                }
                let mut found = Vec::new();
                barrier.take_written(&mut found).unwrap();
                assert_eq!(found, wanted);
            }
            let mut found = Vec::new();
            barrier.take_written(&mut found).unwrap();
            assert_eq!(found, []);
        }
    }
}
