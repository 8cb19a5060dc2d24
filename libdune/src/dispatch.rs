// SPDX-License-Identifier: MIT OR Apache-2.0

//! Syscall user dispatch as Linux has it for a thread outside Dune mode: read before the thread enters, put back when it leaves.
//!
//! Linux tells the settings to a tracer only (PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG), so a short-lived process that shares the
//! memory stops the thread and asks. That is done only where SIGSYS has a handler: without one a dispatched call ends the
//! process, in Dune mode or not.
//!
//! # Safety
//!
//! The process that asks runs on a stack of its own, beside the thread's TLS: it uses neither that nor errno.

use core::ffi::c_int;
use core::ffi::c_void;

use crate::error::Error;
use crate::error::Result;
use crate::sys;
use crate::sys::Errno;

/// PR_SYS_DISPATCH_OFF, PR_SYS_DISPATCH_EXCLUSIVE_ON, PR_SYS_DISPATCH_INCLUSIVE_ON (Linux 6.17).
pub(crate) const OFF: u64 = 0;
pub(crate) const ON: u64 = 1;
const INCLUSIVE_ON: u64 = 2;

pub(crate) const PR_SET_SYSCALL_USER_DISPATCH: i32 = 59;
const PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: u64 = 0x4211;
const PR_SET_PTRACER: u64 = 0x5961_6d61;
const PR_SET_PTRACER_ANY: u64 = u64::MAX;

/// The arguments of the prctl, as Linux' `struct ptrace_sud_config` has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Settings {
    pub mode: u64,
    /// Address of the byte that says whether calls are dispatched; 0: they are.
    pub selector: u64,
    /// Those from the region `offset`, `bytes` never are.
    pub offset: u64,
    pub bytes: u64,
}

impl Settings {
    pub const OFF: Self = Self {
        mode: OFF,
        selector: 0,
        offset: 0,
        bytes: 0,
    };

    pub fn is_on(&self) -> bool {
        self.mode != OFF
    }

    /// What holds after a prctl with these arguments, which Linux accepts. Linux keeps a region whose calls alone are dispatched
    /// as all the rest of memory, and tells it so; `None`: a mode that is newer than this.
    pub fn accepted(self) -> Option<Self> {
        match self.mode {
            OFF | ON => Some(self),
            INCLUSIVE_ON => Some(Self {
                mode: ON,
                offset: self.offset.wrapping_add(self.bytes),
                bytes: self.bytes.wrapping_neg(),
                ..self
            }),
            _ => None,
        }
    }

    /// Arguments by which Linux gets there.
    fn request(self) -> Self {
        if self.mode == ON && self.offset != 0 && self.offset.wrapping_add(self.bytes) <= self.offset {
            Self {
                mode: INCLUSIVE_ON,
                offset: self.offset.wrapping_add(self.bytes),
                bytes: self.bytes.wrapping_neg(),
                ..self
            }
        } else {
            self
        }
    }

    /// Has Linux use them for the calling thread.
    pub fn give_to_linux(&self) -> core::result::Result<(), Errno> {
        self.request().ask_linux()
    }

    /// Whether Linux, which has none now, accepts a prctl with these arguments; it still has none then. Its selector is not looked at.
    pub fn are_accepted(self) -> core::result::Result<(), Errno> {
        /// Looked at last.
        const NOT_THE_USERS: u64 = 1 << 63;
        if self.mode == OFF {
            return self.ask_linux();
        }
        let selector = NOT_THE_USERS;
        match (Self { selector, ..self }).ask_linux() {
            Err(Errno(libc::EFAULT)) => Ok(()),
            other => other,
        }
    }

    fn ask_linux(&self) -> core::result::Result<(), Errno> {
        let args = [
            PR_SET_SYSCALL_USER_DISPATCH as u64,
            self.mode,
            self.offset,
            self.bytes,
            self.selector,
            0,
        ];
        // SAFETY: What the program asked Linux for, or nothing at all.
        sys::check(unsafe { sys::raw(libc::SYS_prctl, args) }).map(drop)
    }
}

struct Question {
    thread: u64,
    answer: core::result::Result<Settings, Errno>,
}

/// The settings of the calling thread, which is outside Dune mode. Costs a process.
pub(crate) fn of_this_thread() -> Result<Settings> {
    let mut answer = sys::with_signals_blocked(ask);
    if answer.is_err_and(|errno| errno.0 == libc::EPERM) && allow_tracing(PR_SET_PTRACER_ANY) {
        // Yama lets nobody but parents trace.
        answer = sys::with_signals_blocked(ask);
        allow_tracing(0);
    }
    answer.or_else(|errno| {
        let any = Settings {
            mode: ON,
            ..Settings::OFF
        };
        match any.are_accepted() {
            // Linux has nothing of the kind.
            Err(Errno(libc::EINVAL)) => Ok(Settings::OFF),
            _ => Err(Error::UnknownDispatch { errno: errno.0 }),
        }
    })
}

fn allow_tracing(by: u64) -> bool {
    // SAFETY: No memory is named.
    unsafe { sys::raw(libc::SYS_prctl, [PR_SET_PTRACER, by, 0, 0, 0, 0]) == 0 }
}

/// Has another process ask, with all signals blocked.
fn ask() -> core::result::Result<Settings, Errno> {
    const STACK_BYTES: usize = 0x4000;
    const WALL: u64 = libc::__WALL as u64;
    let mut question = Question {
        thread: sys::gettid().into(),
        answer: Err(Errno(libc::ECHILD)),
    };
    let mut stack = vec![0u128; STACK_BYTES / size_of::<u128>()];
    // SAFETY: The child's stack and the question live until it has ended, which is waited for.
    unsafe {
        let top = stack.as_mut_ptr_range().end;
        let flags = libc::CLONE_VM | libc::CLONE_UNTRACED;
        let child = libc::clone(answer, top.cast(), flags, (&raw mut question).cast());
        if child < 0 {
            let error = std::io::Error::last_os_error();
            return Err(Errno(error.raw_os_error().unwrap_or(libc::EAGAIN)));
        }
        let eintr = -i64::from(libc::EINTR);
        while sys::raw(libc::SYS_wait4, [child as u64, 0, WALL, 0, 0, 0]) == eintr {}
    }
    question.answer
}

/// In the process that asks: as strace attaches and detaches.
extern "C" fn answer(question: *mut c_void) -> c_int {
    // SAFETY: The asking thread waits for us, so the question is ours.
    let question = unsafe { &mut *question.cast::<Question>() };
    let thread = question.thread;
    let ptrace = |request: u64, address: u64, data: u64| {
        // SAFETY: The thread is stopped or waits; data is memory of the question.
        sys::check(unsafe { sys::raw(libc::SYS_ptrace, [request, thread, address, data, 0, 0]) })
    };
    if let Err(errno) = ptrace(libc::PTRACE_SEIZE.into(), 0, 0) {
        question.answer = Err(errno);
        return 0;
    }
    let _ = ptrace(libc::PTRACE_INTERRUPT.into(), 0, 0);
    // SAFETY: Waits for the stop and writes nothing.
    unsafe { sys::raw(libc::SYS_wait4, [thread, 0, libc::__WALL as u64, 0, 0, 0]) };
    let bytes = size_of::<Settings>() as u64;
    let mut settings = Settings::OFF;
    question.answer =
        ptrace(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, bytes, &raw mut settings as u64).map(|_| settings);
    let _ = ptrace(libc::PTRACE_DETACH.into(), 0, 0);
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    const REGION: Settings = Settings {
        mode: INCLUSIVE_ON,
        selector: 0,
        offset: 0x1000,
        bytes: 0x10,
    };

    #[test]
    fn region_of_its_own_is_all_but_the_rest() {
        for region in [REGION, Settings { offset: 0, ..REGION }] {
            let kept = region.accepted().unwrap();
            assert_eq!((kept.mode, kept.offset), (ON, region.offset + region.bytes));
            let is_let_through = |rip: u64| rip.wrapping_sub(kept.offset) < kept.bytes;
            for (rip, expected) in [
                (region.offset, false),
                (region.offset + 0xf, false),
                (region.offset + 0x10, true),
                (u64::MAX, true),
            ] {
                assert_eq!(is_let_through(rip), expected, "{rip:#x}");
            }
            assert_eq!(kept.request(), region);
        }
    }

    #[test]
    fn other_settings_are_kept_as_they_are() {
        let all = Settings {
            mode: ON,
            ..Settings::OFF
        };
        let but_a_region = Settings { mode: ON, ..REGION };
        for settings in [Settings::OFF, all, but_a_region] {
            assert_eq!(settings.accepted(), Some(settings));
            assert_eq!(settings.request(), settings);
        }
        assert_eq!(Settings { mode: 3, ..REGION }.accepted(), None);
    }
}
