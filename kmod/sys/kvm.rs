// SPDX-License-Identifier: GPL-2.0

//! A virtual machine of KVM that keeps VMX on, and the helper program that makes it (linux/umh.h, linux/file.h).
//!
//! Only a process can make one: KVM registers a notifier on the mm of the process that asks, for as long as the machine
//! lives. So a program is started for it, as root and outside of every container, whose mm dies at once. Its standard input
//! is a file of ours that takes one ioctl, `LEND`.

use super::bindings;
use super::module;
use core::cell::UnsafeCell;
use core::ffi::CStr;
use core::mem::zeroed;
use core::ptr::null_mut;
use core::ptr::NonNull;
use core::sync::atomic::AtomicPtr;
use core::sync::atomic::Ordering::SeqCst;
use kernel::error::to_result;
use kernel::ffi::c_int;
use kernel::ffi::c_long;
use kernel::ffi::c_uint;
use kernel::ffi::c_ulong;
use kernel::prelude::*;

/// A file of a virtual machine of KVM. While it is held KVM keeps VMX on, and kvm_intel cannot be unloaded.
pub(crate) struct VmFile(NonNull<bindings::file>);

// SAFETY: A counted reference.
unsafe impl Send for VmFile {}

/// Why there is none.
pub(crate) enum NoVm {
    /// The program cannot be started.
    NotStarted(Error),
    /// It ended without one, with that wait status.
    Ended(i32),
}

/// What the helper has handed over and nobody has taken yet; [`CLOSED`] unless somebody waits for it.
static HANDED: AtomicPtr<bindings::file> = AtomicPtr::new(CLOSED);
/// No file has this address.
const CLOSED: *mut bindings::file = core::ptr::without_provenance_mut(1);

struct Fops(UnsafeCell<bindings::file_operations>);

// SAFETY: Written under the owner mutex, always with the same, before the helper that uses it is started.
unsafe impl Sync for Fops {}

static FOPS: Fops = Fops(UnsafeCell::new(
    // SAFETY: All of its fields are pointers, optional functions or integers.
    unsafe { zeroed() },
));

impl VmFile {
    /// Starts the helper and waits until it has ended. May sleep; one call at a time (the owner mutex).
    pub(crate) fn make<const LEND: u32>() -> Result<Self, NoVm> {
        // SAFETY: Nobody else writes it, and no helper runs that could read it.
        unsafe {
            (*FOPS.0.get()).owner = bindings::dune_this_module();
            (*FOPS.0.get()).unlocked_ioctl = Some(lend::<LEND>);
        }
        HANDED.store(null_mut(), SeqCst);
        // SAFETY: The parameter lives as long as the module; the call returns when the helper has ended.
        let status = unsafe { bindings::dune_umh_run(module::param_kvm_helper().as_ptr().cast(), Some(give_stdin)) };
        match NonNull::new(HANDED.swap(CLOSED, SeqCst)) {
            Some(file) => Ok(Self(file)),
            None => Err(match to_result(status.min(0)) {
                Err(e) => NoVm::NotStarted(e),
                Ok(()) => NoVm::Ended(status),
            }),
        }
    }
}

impl Drop for VmFile {
    fn drop(&mut self) {
        // SAFETY: The reference is ours.
        unsafe { bindings::fput(self.0.as_ptr()) };
    }
}

/// In the helper's process, before it executes the program.
unsafe extern "C" fn give_stdin(_info: *mut bindings::subprocess_info, _new: *mut bindings::cred) -> c_int {
    const O_RDWR: c_int = 0o2;
    // SAFETY: The table lives as long as the module, which the caller of `make` keeps alive while the helper runs.
    let fd = unsafe { bindings::anon_inode_getfd(c"[dune-kvm]".as_ptr().cast(), FOPS.0.get(), null_mut(), O_RDWR) };
    match fd {
        0 => 0,
        e @ ..0 => e,
        // A new process of the kernel has no files.
        _ => EBADF.to_errno(),
    }
}

unsafe extern "C" fn lend<const LEND: u32>(_file: *mut bindings::file, cmd: c_uint, fd: c_ulong) -> c_long {
    let answer = if cmd == LEND { take(fd as c_uint) } else { Err(ENOTTY) };
    match answer {
        Ok(()) => 0,
        Err(e) => e.to_errno() as c_long,
    }
}

fn take(fd: c_uint) -> Result {
    // SAFETY: Looks the number up in the caller's table.
    let Some(file) = NonNull::new(unsafe { bindings::fget(fd) }).map(VmFile) else {
        return Err(EBADF);
    };
    // SAFETY: The file is held.
    let owner = unsafe { bindings::dune_file_module(file.0.as_ptr()) };
    let is_kvm = if owner.is_null() {
        module::kvm_intel_is_builtin()
    } else {
        // SAFETY: The file keeps its module; names end in NUL.
        unsafe { CStr::from_ptr(bindings::dune_module_name(owner).cast()) == module::KVM_INTEL }
    };
    if !is_kvm {
        return Err(EINVAL);
    }
    HANDED
        .compare_exchange(null_mut(), file.0.as_ptr(), SeqCst, SeqCst)
        .map_err(|_| EBUSY)?;
    // Whoever waits has the reference now.
    core::mem::forget(file);
    Ok(())
}

/// For the log: what went wrong.
impl core::fmt::Display for NoVm {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::NotStarted(e) => write!(f, "it cannot be started: error {}", e.to_errno()),
            Self::Ended(status) => write!(f, "it failed: wait status {status:#x}"),
        }
    }
}
