// SPDX-License-Identifier: MIT OR Apache-2.0

//! Native accesses that may fail: for the guest's sake, and to arguments of system calls.
//!
//! # Safety
//!
//! Each access is one instruction at a known address. Where Linux answers it with SIGSEGV or SIGBUS, the handler in
//! `signal` goes on at `dune_touch_failed` with the [`Refusal`] in RCX, which the function returns.

use core::arch::global_asm;

use crate::sys;

extern "C" {
    fn dune_touch_read(address: u64, mask: *mut u64) -> u64;
    fn dune_touch_write(address: u64, mask: *mut u64) -> u64;
    fn dune_touch_read_at();
    fn dune_touch_write_at();
    fn dune_touch_failed();
}

// rt_sigprocmask(SIG_UNBLOCK, SIGNALS, mask), and at once the access: a signal that comes in between blocks all others
// while it waits for its handler, and a fault of a blocked signal is the end. It finds RIP at the access.
global_asm!(
    ".pushsection .text.dune_host, \"ax\", @progbits",
    ".macro dune_touch name, access:vararg",
    ".balign 16",
    ".hidden \\name",
    ".globl \\name",
    "\\name:",
    "mov r9, rdi",
    "mov rdx, rsi",
    "mov edi, {unblock}",
    "lea rsi, [rip + 2f]",
    "mov r10d, 8",
    "mov eax, {sigprocmask}",
    "syscall",
    ".hidden \\name\\()_at",
    ".globl \\name\\()_at",
    "\\name\\()_at:",
    "\\access",
    "xor eax, eax",
    "ret",
    ".endm",
    "dune_touch dune_touch_read, mov al, [r9]",
    // Makes the page writable in the process and changes nothing, whoever else writes to it.
    "dune_touch dune_touch_write, lock or byte ptr [r9], 0",
    ".hidden dune_touch_failed",
    ".globl dune_touch_failed",
    "dune_touch_failed:",
    "mov rax, rcx",
    "ret",
    ".balign 8",
    "2:",
    ".quad {signals}",
    ".purgem dune_touch",
    ".popsection",
    unblock = const libc::SIG_UNBLOCK,
    sigprocmask = const libc::SYS_rt_sigprocmask,
    signals = const SIGNALS,
);

/// A native access that Linux refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub signal: i32,
    pub code: i32,
}

impl Refusal {
    /// A signal came before Linux had an answer.
    pub const INTERRUPTED: Self = Self { signal: 0, code: 1 };

    /// Never 0.
    pub fn pack(self) -> u64 {
        u64::from(self.signal as u32) << 32 | u64::from(self.code as u32)
    }

    fn unpack(packed: u64) -> Result<(), Self> {
        match packed {
            0 => Ok(()),
            _ => Err(Self {
                signal: (packed >> 32) as i32,
                code: packed as i32,
            }),
        }
    }
}

/// Where to go on when the instruction at `rip` got a signal.
pub(super) fn recovery(rip: u64) -> Option<u64> {
    let known = rip == dune_touch_read_at as *const () as u64 || rip == dune_touch_write_at as *const () as u64;
    known.then_some(dune_touch_failed as *const () as u64)
}

pub(super) const SIGNALS: u64 = sys::signal_bit(libc::SIGSEGV) | sys::signal_bit(libc::SIGBUS);

/// Reads or writes the byte at `address`, if Linux allows it.
///
/// A signal that the program blocks would kill the process here, so it is unblocked meanwhile.
pub(super) fn touch(address: u64, write: bool) -> Result<(), Refusal> {
    let mut mask = 0;
    // SAFETY: A fault comes back as a refusal; reading, or writing what is there, changes nothing.
    let refusal = unsafe {
        if write {
            dune_touch_write(address, &mut mask)
        } else {
            dune_touch_read(address, &mut mask)
        }
    };
    if mask & SIGNALS != 0 {
        sys::sigprocmask(libc::SIG_SETMASK, mask);
    }
    Refusal::unpack(refusal)
}

/// The program gave an address that it cannot access itself.
#[derive(Debug)]
pub(super) struct BadAddress;

fn touch_range(address: u64, bytes: usize, write: bool) -> Result<(), BadAddress> {
    let last = address.checked_add(bytes as u64 - 1).ok_or(BadAddress)?;
    if last >= crate::addr::USER_END {
        return Err(BadAddress);
    }
    let mut at = address;
    while at <= last {
        match touch(at, write) {
            Ok(()) => {}
            // From now on all signals are blocked.
            Err(Refusal::INTERRUPTED) => continue,
            Err(_) => return Err(BadAddress),
        }
        at = (at | 0xfff) + 1;
    }
    Ok(())
}

/// Whether the program could read a range a moment ago.
pub(super) fn readable(address: u64, bytes: usize) -> Result<(), BadAddress> {
    touch_range(address, bytes, false)
}

/// Whether the program could write a range a moment ago.
pub(super) fn writable(address: u64, bytes: usize) -> Result<(), BadAddress> {
    touch_range(address, bytes, true)
}

/// Copies a plain structure from the program.
pub(super) fn read<T: Copy>(address: u64) -> Result<T, BadAddress> {
    touch_range(address, size_of::<T>(), false)?;
    // SAFETY: Readable a moment ago. The callers use types for which every bit pattern is valid. Another thread that
    // unmaps it now gets the SIGSEGV that it asks for.
    Ok(unsafe { (address as *const T).read_unaligned() })
}

/// Copies words from the program.
pub(super) fn read_words(address: u64, words: &mut [u64]) -> Result<(), BadAddress> {
    readable(address, size_of_val(words))?;
    for (index, word) in words.iter_mut().enumerate() {
        // SAFETY: As in `read`.
        *word = unsafe { (address as *const u64).add(index).read_unaligned() };
    }
    Ok(())
}

/// Copies a plain structure to the program.
pub(super) fn write<T: Copy>(address: u64, value: &T) -> Result<(), BadAddress> {
    touch_range(address, size_of::<T>(), true)?;
    // SAFETY: As in `read`.
    unsafe { (address as *mut T).write_unaligned(*value) };
    Ok(())
}
