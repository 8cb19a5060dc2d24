// SPDX-License-Identifier: MIT OR Apache-2.0

//! dune_init, dune_enter, and what is kept for the process.
//!
//! # Safety
//!
//! The program's on_dune_exit is found by its name, and has the type that the header says.

use core::ffi::c_int;
use core::mem;
use core::ptr;
use core::sync::atomic::AtomicBool;
use core::sync::atomic::AtomicPtr;
use core::sync::atomic::Ordering::Acquire;
use core::sync::atomic::Ordering::Relaxed;
use core::sync::atomic::Ordering::Release;

use libdune::edit::LastWords;
use libdune::edit::Shared;
use libdune::Dune;
use libdune::Error;

use crate::page;
use crate::trap;
use crate::vm::ptent_t;

/// dune_init was called: with map_full.
static INITIALIZED: AtomicBool = AtomicBool::new(false);
static MAP_FULL: AtomicBool = AtomicBool::new(false);

/// Top table of the default page table; the process' threads start with it.
#[no_mangle]
pub static pgroot: AtomicPtr<ptent_t> = AtomicPtr::new(ptr::null_mut());

/// Why a thread ends that cannot go on; see `on_dune_exit`.
#[repr(C)]
pub struct dune_config {
    /// `DUNE_RET_*`
    pub ret: i64,
    /// Basic exit reason or vector.
    pub status: i64,
    pub vcpu: u64,
    pub rip: u64,
    pub rsp: u64,
    pub rflags: u64,
    pub cr3: u64,
}

const DUNE_RET_EPT_VIOLATION: i64 = 2;
const DUNE_RET_INTERRUPT: i64 = 3;
const DUNE_RET_UNHANDLED_VMEXIT: i64 = 5;
const DUNE_RET_NOENTER: i64 = 6;

/// What is shared, or EINVAL before dune_init.
pub(crate) fn shared() -> Result<Shared, c_int> {
    Shared::find().ok_or(libc::EINVAL)
}

fn errno(error: &Error) -> c_int {
    match error {
        Error::NotLoaded | Error::NoVtx => libc::ENOENT,
        Error::NoPermission { .. } => libc::EACCES,
        Error::Busy { .. } => libc::EBUSY,
        Error::NoDevice { .. } => libc::ENODEV,
        Error::AbiMismatch { .. } => libc::EPROTO,
        Error::OutOfVcpus { .. } => libc::ENOSPC,
        Error::UserLimit { .. } => libc::EAGAIN,
        Error::OutOfMemory { .. } | Error::Paging(_) => libc::ENOMEM,
        Error::AlreadyInside => libc::EBUSY,
        Error::EntryFailed { .. } => libc::EIO,
        Error::UnknownDispatch { errno } => *errno,
        Error::System { errno, .. } => *errno,
        _ => libc::EINVAL,
    }
}

/// Says what to do about an error, as its number cannot.
fn tell(error: &Error) -> c_int {
    crate::out::STDERR.print(format_args!("dune: {error}\n"));
    -errno(error)
}

/// Prepares the process for Dune mode: the device, the default page table, the page pool. Once per process; again does
/// nothing. With `map_full` code at CPL3 may use all memory of the process until page tables say otherwise; without, only
/// what they give to it (PERM_U).
///
/// 0, or a negative errno, with a line on standard error that says what to do.
#[no_mangle]
pub extern "C" fn dune_init(map_full: bool) -> c_int {
    if INITIALIZED.load(Acquire) {
        return 0;
    }
    if Dune::is_active() {
        // By another libdune: under libdune_preload.so, for one.
        return tell(&Error::AlreadyInside);
    }
    MAP_FULL.store(map_full, Relaxed);
    match prepare() {
        Ok(()) => {
            INITIALIZED.store(true, Release);
            0
        }
        Err(error) => tell(&error),
    }
}

/// Makes what the process shares; also in a child that came from outside Dune mode.
fn prepare() -> Result<(), Error> {
    let is_new = Shared::find().is_none();
    // Programs for the first Dune run code of their own pages at CPL3, and read its memory at CPL0.
    let shared = Shared::keep(&Dune::builder().protection_from_cpl3(false))?;
    let space = shared.address_space();
    if is_new {
        shared.set_last_words(last_words);
        let pool = page::prepare(&shared)?;
        if MAP_FULL.load(Relaxed) {
            space.give_to_user(&[pool])?;
        }
    }
    pgroot.store(space.root_table(), Release);
    Ok(())
}

/// Puts the calling thread into Dune mode, where it is not yet. Threads and children made in Dune mode are there already.
///
/// 0, or a negative errno, with a line on standard error that says what to do.
#[no_mangle]
pub extern "C" fn dune_enter() -> c_int {
    if !INITIALIZED.load(Acquire) {
        return -libc::EINVAL;
    }
    if Dune::is_active() {
        return 0;
    }
    let entered = prepare().and_then(|()| Dune::enter());
    match entered {
        Ok(dune) => {
            trap::install(&dune.thread());
            // For good: the API has no way out.
            mem::forget(dune);
            0
        }
        Err(error) => tell(&error),
    }
}

core::arch::global_asm!(
    ".weak on_dune_exit",
    ".pushsection .text.dune_c_exit, \"ax\", @progbits",
    ".hidden dune_c_on_exit",
    ".globl dune_c_on_exit",
    // The program's on_dune_exit, or 0.
    "dune_c_on_exit:",
    "mov rax, [rip + on_dune_exit@GOTPCREL]",
    "ret",
    ".popsection",
);

extern "C" {
    fn dune_c_on_exit() -> Option<unsafe extern "C" fn(*mut dune_config)>;
}

fn last_words(words: &LastWords) {
    let ret = match words.exit {
        Some(libdune::abi::EXIT_TOUCH | libdune::abi::EXIT_REFUSED | libdune::abi::EXIT_NO_SLOT) => {
            DUNE_RET_EPT_VIOLATION
        }
        Some(libdune::abi::EXIT_FAIL_ENTRY) => DUNE_RET_NOENTER,
        Some(_) => DUNE_RET_UNHANDLED_VMEXIT,
        None => DUNE_RET_INTERRUPT,
    };
    let mut config = dune_config {
        ret,
        status: words.reason.into(),
        vcpu: words.vcpu.into(),
        rip: words.rip,
        rsp: words.rsp,
        rflags: words.rflags,
        cr3: words.cr3,
    };
    // SAFETY: The program's function of this name has this type.
    unsafe {
        if let Some(f) = dune_c_on_exit() {
            f(&raw mut config);
        }
    }
}
