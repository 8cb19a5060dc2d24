// SPDX-License-Identifier: MIT OR Apache-2.0

//! The device: opening it, and what can be asked of it before there is a guest.
//!
//! # Safety
//!
//! ioctls get pointers to the structures that they are defined for; the run page is mapped until the vCPU is gone.

use std::ffi::CString;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::fd::FromRawFd;
use std::os::fd::IntoRawFd;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;

use dune_abi::CreateVcpu;
use dune_abi::Info;
use dune_abi::RunPage;
use dune_abi::ABI_VERSION;
use dune_abi::DEVICE_PATH;
use dune_abi::DUNE_CREATE_VCPU;
use dune_abi::DUNE_DESTROY_VCPU;
use dune_abi::DUNE_GET_INFO;

use crate::error::Error;
use crate::error::Result;
use crate::host_loop::forward_behind;
use crate::sys;
use crate::sys::Errno;

/// Lowest number that the fd is moved to, where the limit allows it: out of the way of programs that count on low ones.
const HIGH_FD: u64 = 1000;

/// An address space of the module, bound to this process.
pub(crate) struct Device {
    fd: OwnedFd,
    pub info: Info,
}

impl Device {
    /// Opens the device and checks its version.
    pub fn open() -> Result<Self> {
        const STEP: &str = "open /dev/dune";
        let path = CString::new(DEVICE_PATH).unwrap_or_default();
        // Linux gives up the locks of the whole process for a signal that is pending, when a new space is nearly made. Beside
        // KVM that has begun with a program, which takes longer than some timers.
        let mask = sys::sigprocmask(libc::SIG_BLOCK, u64::MAX);
        // One that cannot be blocked.
        let opened = loop {
            // SAFETY: A terminated string.
            let fd = unsafe { libc::open(path.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
            if fd >= 0 {
                break Ok(fd);
            }
            let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
            if errno != libc::EINTR {
                break Err(open_error(STEP, errno));
            }
        };
        sys::sigprocmask(libc::SIG_SETMASK, mask);
        let fd = opened?;
        // SAFETY: Just opened.
        let fd = high(unsafe { OwnedFd::from_raw_fd(fd) });
        let mut info = Info {
            size: size_of::<Info>() as u32,
            ..Info::default()
        };
        // SAFETY: The request takes a pointer to this structure.
        unsafe { sys::request(fd.as_raw_fd(), DUNE_GET_INFO, &raw mut info as u64) }
            .map_err(|errno| Error::at("DUNE_GET_INFO", errno.0))?;
        if info.abi_version != ABI_VERSION {
            return Err(Error::AbiMismatch {
                module: info.abi_version,
                library: ABI_VERSION,
            });
        }
        Ok(Self { fd, info })
    }

    pub fn fd(&self) -> i32 {
        self.fd.as_raw_fd()
    }

    /// Gives the fd to the caller.
    pub fn into_fd(self) -> i32 {
        self.fd.into_raw_fd()
    }
}

/// A vCPU and its run page, as just made.
pub(crate) struct Vcpu {
    pub number: u32,
    pub run: *mut RunPage,
}

/// Makes a vCPU of the calling thread and maps its run page, which no child of fork gets.
pub(crate) fn create_vcpu(fd: i32) -> core::result::Result<Vcpu, Errno> {
    let mut create = CreateVcpu {
        size: size_of::<CreateVcpu>() as u32,
        ..CreateVcpu::default()
    };
    // SAFETY: The request takes a pointer to this structure.
    unsafe { sys::request(fd, DUNE_CREATE_VCPU, &raw mut create as u64) }?;
    let bytes = create.run_bytes as usize;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: Offset and size are the module's own.
    let mapped = match unsafe { sys::mmap(bytes, protection, libc::MAP_SHARED, fd, create.run_offset) } {
        Ok(run) if bytes == size_of::<RunPage>() => Ok(run as *mut RunPage),
        Ok(_) => Err(Errno(libc::EINVAL)),
        Err(errno) => Err(errno),
    };
    match mapped {
        Ok(run) => {
            // SAFETY: The page was just mapped; nobody else uses the vCPU.
            unsafe { (&raw mut (*run).forward_behind).write_volatile(forward_behind()) };
            Ok(Vcpu {
                number: create.vcpu,
                run,
            })
        }
        Err(errno) => {
            // SAFETY: The vCPU is ours and nothing runs on it.
            let _ = unsafe { sys::request(fd, DUNE_DESTROY_VCPU, u64::from(create.vcpu)) };
            Err(errno)
        }
    }
}

/// Moves the fd to a high number, below the limit.
fn high(fd: OwnedFd) -> OwnedFd {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: Writes one structure.
    let known = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } == 0;
    let lowest = if known {
        HIGH_FD.min(limit.rlim_cur.saturating_sub(8))
    } else {
        3
    };
    // SAFETY: Duplicates an fd of ours.
    let new = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, lowest as libc::c_int) };
    if new < 0 {
        return fd;
    }
    // SAFETY: Just made.
    unsafe { OwnedFd::from_raw_fd(new) }
}

fn open_error(step: &'static str, errno: i32) -> Error {
    match errno {
        libc::ENOENT | libc::ENXIO if cpu_has_vtx() => Error::NotLoaded,
        libc::ENOENT | libc::ENXIO => Error::NoVtx,
        libc::EACCES | libc::EPERM => Error::NoPermission { group: device_group() },
        errno => Error::at_new(step, errno),
    }
}

/// Whether the CPU says that it has VT-x; where nobody knows, it is taken to have it.
fn cpu_has_vtx() -> bool {
    let Ok(text) = fs::read_to_string("/proc/cpuinfo") else {
        return true;
    };
    let mut flags = text.lines().filter(|line| line.starts_with("flags")).peekable();
    flags.peek().is_none() || flags.any(|line| line.split_ascii_whitespace().any(|flag| flag == "vmx"))
}

/// Name of the group that the device node belongs to, or its number.
fn device_group() -> String {
    let Ok(node) = fs::metadata(DEVICE_PATH) else {
        return "dune".into();
    };
    let gid = node.gid();
    let name = fs::read_to_string("/etc/group").ok().and_then(|text| {
        text.lines().find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            (fields.nth(1)?.parse() == Ok(gid)).then(|| name.to_owned())
        })
    });
    name.unwrap_or_else(|| gid.to_string())
}
