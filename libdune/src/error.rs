// SPDX-License-Identifier: MIT OR Apache-2.0

//! Why a thread could not enter Dune mode, and what to do about it.

use crate::paging::PagingError;
use crate::sys::Errno;

/// Result of what can fail with an [`Error`].
///
/// # Examples
///
/// ```no_run
/// fn number_inside() -> libdune::Result<u32> {
///     let dune = libdune::Dune::enter()?;
///     Ok(dune.vcpu())
/// }
///
/// assert!(number_inside().is_ok());
/// ```
pub type Result<T> = core::result::Result<T, Error>;

/// Why a thread could not enter Dune mode. The message says what to do.
///
/// # Examples
///
/// ```no_run
/// use libdune::{Dune, Error};
///
/// let dune = match Dune::enter() {
///     Ok(dune) => Some(dune),
///     Err(error @ (Error::NotLoaded | Error::NoVtx)) => {
///         eprintln!("{error}; going on without");
///         None
///     }
///     Err(error) => return Err(error),
/// };
/// if let Some(dune) = &dune {
///     // A thread enters once.
///     assert!(matches!(Dune::enter(), Err(Error::AlreadyInside)));
/// }
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no device node.
    #[error("/dev/dune does not exist: the module dune.ko is not loaded; load it as root with `make load` or `modprobe dune`")]
    NotLoaded,
    /// There is no device node, and the CPU has no VT-x.
    #[error("/dev/dune does not exist, and this CPU has no VT-x (no `vmx` in /proc/cpuinfo): use an Intel CPU, or a virtual machine with nested virtualization, and enable VT-x in the firmware")]
    NoVtx,
    /// The caller may not open the device.
    #[error("no permission for /dev/dune: it belongs to the group `{group}`; add yourself to it with `usermod -aG {group} $USER` and log in again")]
    NoPermission {
        /// The group that may.
        group: String,
    },
    /// KVM uses VMX on this machine, and it cannot be shared.
    #[error("{step}: EBUSY: KVM has VMX on this machine and the module could not share it: `dmesg | grep dune` says why (the helper program comes with `make install`), or stop the virtual machines and unload KVM (`modprobe -r kvm_intel`)")]
    Busy {
        /// What was tried.
        step: &'static str,
    },
    /// The module cannot run guests on this CPU.
    #[error("{step}: ENODEV: the CPU or its firmware does not let the module run guests; `dmesg | grep dune` says what is missing")]
    NoDevice {
        /// What was tried.
        step: &'static str,
    },
    /// Module and library are of different versions.
    #[error("the module speaks ABI version {module}, this library version {library}: install both from the same release and load the module again")]
    AbiMismatch {
        /// The module's version.
        module: u32,
        /// The library's version.
        library: u32,
    },
    /// No vCPU is left.
    #[error("this process has all {max} Dune threads that it can have (module parameter max_vcpus; libdune has room for 510): let one leave Dune mode")]
    OutOfVcpus {
        /// Most that one process may have.
        max: u32,
    },
    /// The user has as much of Dune as one user may have.
    #[error("{step}: EAGAIN: the user has all the Dune processes or threads that one user may have (module parameters user_spaces, user_vcpus): end some")]
    UserLimit {
        /// What was tried.
        step: &'static str,
    },
    /// No memory.
    #[error("{step}: not enough memory: free some, or raise the limit of the memory cgroup or RLIMIT_AS")]
    OutOfMemory {
        /// What was tried.
        step: &'static str,
    },
    /// The page table could not be built.
    #[error("cannot build the guest's page table: {0}")]
    Paging(#[from] PagingError),
    /// The calling thread is in Dune mode.
    #[error("this thread is in Dune mode already: use the `Dune` it has")]
    AlreadyInside,
    /// The thread may have syscall user dispatch on, which the program would lose, and Linux does not say.
    #[error("this thread may have syscall user dispatch on (SIGSYS has a handler), and Linux does not tell (PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: errno {errno}; 1: it is traced already, or may not be): set that handler and dispatch behind enter")]
    UnknownDispatch {
        /// Linux' error number.
        errno: i32,
    },
    /// The CPU refused to enter the guest.
    #[error("the CPU refused the first entry into the guest (reason {reason:#x}, qualification {qualification:#x}, VM-instruction error {instruction_error}): please report this with the CPU model and `dmesg | grep dune`")]
    EntryFailed {
        /// Basic exit reason, bit 31 set for a VM-entry failure.
        reason: u32,
        /// Exit qualification.
        qualification: u64,
        /// VM-instruction error, or 0.
        instruction_error: u32,
    },
    /// A system call failed in a way that has no error of its own.
    #[error("{step} failed with errno {errno}: see docs/abi.md")]
    System {
        /// What was tried.
        step: &'static str,
        /// Linux' error number.
        errno: i32,
    },
}

impl From<Errno> for Error {
    /// Of the memory that the Dune threads of a process share.
    fn from(errno: Errno) -> Self {
        Self::at("mmap of the process' memory", errno.0)
    }
}

impl Error {
    /// What an error number means at a step that has no better to say.
    pub(crate) fn at(step: &'static str, errno: i32) -> Self {
        match errno {
            libc::EBUSY => Self::Busy { step },
            libc::ENODEV | libc::EOPNOTSUPP => Self::NoDevice { step },
            libc::ENOMEM => Self::OutOfMemory { step },
            _ => Self::System { step, errno },
        }
    }

    /// As [`Error::at`], where the step makes a space or a vCPU.
    pub(crate) fn at_new(step: &'static str, errno: i32) -> Self {
        match errno {
            libc::EAGAIN => Self::UserLimit { step },
            errno => Self::at(step, errno),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The messages as docs and scripts of users may know them.
    #[test]
    fn each_error_says_this() {
        let step = "open /dev/dune";
        let group = "dune".to_string();
        let entry_failed = Error::EntryFailed {
            reason: 0x8000_0021,
            qualification: 2,
            instruction_error: 0,
        };
        for (error, text) in [
            (Error::NotLoaded, "/dev/dune does not exist: the module dune.ko is not loaded; load it as root with `make load` or `modprobe dune`"),
            (Error::NoVtx, "/dev/dune does not exist, and this CPU has no VT-x (no `vmx` in /proc/cpuinfo): use an Intel CPU, or a virtual machine with nested virtualization, and enable VT-x in the firmware"),
            (Error::NoPermission { group }, "no permission for /dev/dune: it belongs to the group `dune`; add yourself to it with `usermod -aG dune $USER` and log in again"),
            (Error::at(step, libc::EBUSY), "open /dev/dune: EBUSY: KVM has VMX on this machine and the module could not share it: `dmesg | grep dune` says why (the helper program comes with `make install`), or stop the virtual machines and unload KVM (`modprobe -r kvm_intel`)"),
            (Error::at(step, libc::ENODEV), "open /dev/dune: ENODEV: the CPU or its firmware does not let the module run guests; `dmesg | grep dune` says what is missing"),
            (Error::AbiMismatch { module: 1, library: 2 }, "the module speaks ABI version 1, this library version 2: install both from the same release and load the module again"),
            (Error::OutOfVcpus { max: 3 }, "this process has all 3 Dune threads that it can have (module parameter max_vcpus; libdune has room for 510): let one leave Dune mode"),
            (Error::at_new(step, libc::EAGAIN), "open /dev/dune: EAGAIN: the user has all the Dune processes or threads that one user may have (module parameters user_spaces, user_vcpus): end some"),
            (Error::at(step, libc::ENOMEM), "open /dev/dune: not enough memory: free some, or raise the limit of the memory cgroup or RLIMIT_AS"),
            (PagingError::OutOfFrames.into(), "cannot build the guest's page table: all frames of the pool are in use: give some back, or drop page tables that have copies"),
            (Error::AlreadyInside, "this thread is in Dune mode already: use the `Dune` it has"),
            (Error::UnknownDispatch { errno: 1 }, "this thread may have syscall user dispatch on (SIGSYS has a handler), and Linux does not tell (PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: errno 1; 1: it is traced already, or may not be): set that handler and dispatch behind enter"),
            (entry_failed, "the CPU refused the first entry into the guest (reason 0x80000021, qualification 0x2, VM-instruction error 0): please report this with the CPU model and `dmesg | grep dune`"),
            (Error::at(step, libc::EPERM), "open /dev/dune failed with errno 1: see docs/abi.md"),
        ] {
            assert_eq!(error.to_string(), text);
        }
    }
}
