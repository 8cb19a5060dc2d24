// SPDX-License-Identifier: MIT OR Apache-2.0

//! Linux system calls without libc: no errno, no TLS, no cancellation point.
//!
//! # Safety
//!
//! SYSCALL outside of Dune mode; VMCALL at CPL0, which the program's hooks do not see.
//! The wrappers are safe where no argument can make Linux break memory safety, and `unsafe` where one can.

use core::arch::asm;
use core::cell::UnsafeCell;
use core::sync::atomic::AtomicBool;
use core::sync::atomic::AtomicPtr;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::Ordering::Acquire;
use core::sync::atomic::Ordering::Relaxed;
use core::sync::atomic::Ordering::Release;

/// A Linux error number, positive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Errno(pub i32);

/// The TSC.
#[inline]
#[allow(unused_unsafe)]
pub(crate) fn ticks() -> u64 {
    // SAFETY: Reads a counter; where PR_SET_TSC forbids it, that is a signal.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Makes `bytes`, a multiple of 8, at `address` zero.
///
/// # Safety
///
/// They must be writable, and nobody else's.
pub(crate) unsafe fn clear_words(address: u64, bytes: usize) {
    debug_assert!(bytes % 8 == 0);
    // SAFETY: The caller's.
    unsafe {
        core::arch::asm!("rep stosq", inout("rcx") bytes / 8 => _, inout("rdi") address => _, in("rax") 0u64,
             options(nostack, preserves_flags));
    }
}

/// Makes a system call and returns what Linux leaves in RAX.
///
/// # Safety
///
/// As the system call asks.
#[inline(always)]
pub(crate) unsafe fn raw(number: i64, args: [u64; 6]) -> i64 {
    let result;
    // SAFETY: The caller's; the clobbers are those of SYSCALL.
    unsafe {
        asm!(
            "mov ecx, cs",
            "test cl, 3",
            "jnz 2f",
            "vmcall",
            "jmp 3f",
            "2:",
            "syscall",
            "3:",
            inlateout("rax") number => result,
            in("rdi") args[0],
            in("rsi") args[1],
            in("rdx") args[2],
            in("r10") args[3],
            in("r8") args[4],
            in("r9") args[5],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// Makes a private call to the host loop, without arguments.
///
/// # Safety
///
/// The thread must be in Dune mode, and `number` must be a call that comes back.
pub(crate) unsafe fn vmcall(number: u32) -> u64 {
    let result;
    // SAFETY: The caller's.
    unsafe { asm!("vmcall", inlateout("rax") u64::from(number) => result, options(nostack)) };
    result
}

pub(crate) fn check(result: i64) -> Result<u64, Errno> {
    if (-4095..0).contains(&result) {
        Err(Errno(-result as i32))
    } else {
        Ok(result as u64)
    }
}

/// Whether a thread may have a seccomp filter: then requests of the device go by read, which filters that let a thread live
/// allow. Of this process and what it forks, as the filter.
static BY_READ: AtomicBool = AtomicBool::new(false);

/// Requests of the device go by read from now on.
pub(crate) fn request_by_read() {
    BY_READ.store(true, Relaxed);
}

/// System call and arguments for request `number` of the device.
pub(crate) fn request_call(number: u32, argument: u64) -> (i64, [u64; 2]) {
    if BY_READ.load(Relaxed) {
        (libc::SYS_read, [argument, dune_abi::read_size(number)])
    } else {
        (libc::SYS_ioctl, [number.into(), argument])
    }
}

/// A request of the device with a number or a pointer, made again where a signal interrupted it.
///
/// # Safety
///
/// `argument` must be what the request `number` asks for.
pub(crate) unsafe fn request(fd: i32, number: u32, argument: u64) -> Result<u64, Errno> {
    let (call, [second, third]) = request_call(number, argument);
    loop {
        // SAFETY: The caller's.
        match check(unsafe { raw(call, [fd as u64, second, third, 0, 0, 0]) }) {
            Err(Errno(libc::EINTR)) => {}
            result => return result,
        }
    }
}

/// `mmap` at an address of Linux' choice.
///
/// # Safety
///
/// `fd` and `offset` must be what the file behind `fd` asks for; -1 and 0 for anonymous memory.
pub(crate) unsafe fn mmap(bytes: usize, protection: i32, flags: i32, fd: i32, offset: u64) -> Result<u64, Errno> {
    debug_assert!(flags & libc::MAP_FIXED == 0);
    // SAFETY: Without MAP_FIXED nothing that exists is replaced; the rest is the caller's.
    check(unsafe {
        raw(
            libc::SYS_mmap,
            [
                0,
                bytes as u64,
                protection as u64,
                flags as u64,
                fd as i64 as u64,
                offset,
            ],
        )
    })
}

/// `munmap`.
///
/// # Safety
///
/// Nothing may use the memory afterwards.
pub(crate) unsafe fn munmap(address: u64, bytes: usize) -> Result<(), Errno> {
    // SAFETY: The caller's.
    check(unsafe { raw(libc::SYS_munmap, [address, bytes as u64, 0, 0, 0, 0]) }).map(drop)
}

/// `mprotect`.
///
/// # Safety
///
/// Nothing may rely on the access that is taken away.
pub(crate) unsafe fn mprotect(address: u64, bytes: usize, protection: i32) -> Result<(), Errno> {
    // SAFETY: The caller's.
    check(unsafe { raw(libc::SYS_mprotect, [address, bytes as u64, protection as u64, 0, 0, 0]) }).map(drop)
}

/// Throws the contents of private anonymous memory away: it reads as zero from now on.
///
/// # Safety
///
/// Nobody may count on them.
pub(crate) unsafe fn forget(address: u64, bytes: usize) -> Result<(), Errno> {
    const ADVICE: u64 = libc::MADV_DONTNEED as u64;
    // SAFETY: The caller's.
    check(unsafe { raw(libc::SYS_madvise, [address, bytes as u64, ADVICE, 0, 0, 0]) }).map(drop)
}

/// `madvise` with an advice that keeps the contents in this process (MADV_WIPEONFORK, MADV_NOHUGEPAGE).
pub(crate) fn madvise(address: u64, bytes: usize, advice: i32) -> Result<(), Errno> {
    debug_assert!(advice == libc::MADV_WIPEONFORK || advice == libc::MADV_NOHUGEPAGE);
    // SAFETY: Neither advice changes what this process sees.
    check(unsafe { raw(libc::SYS_madvise, [address, bytes as u64, advice as u64, 0, 0, 0]) }).map(drop)
}

/// Makes `new` mean what `old` means, close-on-exec, in place of what it meant before.
pub(crate) fn replace_fd(old: i32, new: i32) -> Result<(), Errno> {
    // SAFETY: fds are numbers; the callers own `new`.
    let result = unsafe {
        raw(
            libc::SYS_dup3,
            [old as u64, new as u64, libc::O_CLOEXEC as u64, 0, 0, 0],
        )
    };
    check(result).map(drop)
}

/// Lets another thread run.
pub(crate) fn yield_now() {
    // SAFETY: Has no arguments.
    let _ = unsafe { raw(libc::SYS_sched_yield, [0; 6]) };
}

/// `close`.
pub(crate) fn close(fd: i32) {
    // SAFETY: Closing is memory-safe; the callers own the fd.
    let _ = unsafe { raw(libc::SYS_close, [fd as u64, 0, 0, 0, 0, 0]) };
}

/// `write`; returns the bytes written, 0 on any error.
pub(crate) fn write(fd: i32, bytes: &[u8]) -> usize {
    // SAFETY: Linux reads from a live slice.
    let done = unsafe {
        raw(
            libc::SYS_write,
            [fd as u64, bytes.as_ptr() as u64, bytes.len() as u64, 0, 0, 0],
        )
    };
    usize::try_from(done).unwrap_or(0)
}

/// Runs `f` with all signals blocked.
pub(crate) fn with_signals_blocked<R>(f: impl FnOnce() -> R) -> R {
    let mask = sigprocmask(libc::SIG_BLOCK, u64::MAX);
    let result = f();
    sigprocmask(libc::SIG_SETMASK, mask);
    result
}

/// Number of the calling process.
pub(crate) fn getpid() -> u32 {
    // SAFETY: Has no arguments.
    unsafe { raw(libc::SYS_getpid, [0; 6]) as u32 }
}

/// Number of the calling thread.
pub(crate) fn gettid() -> u32 {
    // SAFETY: Has no arguments.
    unsafe { raw(libc::SYS_gettid, [0; 6]) as u32 }
}

const ARCH_SET_GS: u64 = 0x1001;
const ARCH_SET_FS: u64 = 0x1002;
const ARCH_GET_FS: u64 = 0x1003;
const ARCH_GET_GS: u64 = 0x1004;

/// FS base and GS base of the calling thread, as Linux has them.
pub(crate) fn segment_bases() -> Result<(u64, u64), Errno> {
    let (mut fs, mut gs) = (0u64, 0u64);
    // SAFETY: Linux writes one u64 each.
    unsafe {
        check(raw(libc::SYS_arch_prctl, [ARCH_GET_FS, &raw mut fs as u64, 0, 0, 0, 0]))?;
        check(raw(libc::SYS_arch_prctl, [ARCH_GET_GS, &raw mut gs as u64, 0, 0, 0, 0]))?;
    }
    Ok((fs, gs))
}

/// Sets FS base and GS base of the calling thread.
///
/// # Safety
///
/// Compiled code finds its TLS through FS.
pub(crate) unsafe fn set_segment_bases(fs: u64, gs: u64) {
    // SAFETY: The caller's; a bad address gives an error and changes nothing.
    unsafe {
        let _ = raw(libc::SYS_arch_prctl, [ARCH_SET_FS, fs, 0, 0, 0, 0]);
        let _ = raw(libc::SYS_arch_prctl, [ARCH_SET_GS, gs, 0, 0, 0, 0]);
    }
}

/// Linux' `struct sigaction` (not libc's).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SigAction {
    pub handler: u64,
    pub flags: u64,
    pub restorer: u64,
    pub mask: u64,
}

/// Highest number of a signal.
pub(crate) const SIGNALS: i32 = 64;

/// What the program wants done on each signal, shared by the threads that share their actions in Linux.
///
/// All of them have one lock, [`ACTIONS_LOCK`], held for a few instructions. All signals are blocked in its users, so that a
/// handler can be one.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Actions {
    actions: UnsafeCell<[SigAction; SIGNALS as usize]>,
}

// SAFETY: The cell is used under the lock.
unsafe impl Sync for Actions {}

/// Where the lock of all actions is: in memory that a child of fork finds zeroed, as the thread that holds the lock in the
/// maker is not in the child. Null as long as no thread was ever in Dune mode.
pub(crate) static ACTIONS_LOCK: AtomicPtr<AtomicU32> = AtomicPtr::new(core::ptr::null_mut());

impl Actions {
    /// The default for each.
    pub const fn new() -> Self {
        Self {
            actions: UnsafeCell::new([SigAction::DEFAULT; SIGNALS as usize]),
        }
    }

    fn with<R>(&self, f: impl FnOnce(&mut [SigAction; SIGNALS as usize]) -> R) -> R {
        static BEFORE: AtomicU32 = AtomicU32::new(0);
        // SAFETY: Null, or never unmapped.
        let lock = unsafe { ACTIONS_LOCK.load(Acquire).as_ref() }.unwrap_or(&BEFORE);
        while lock.compare_exchange(0, 1, Acquire, Relaxed).is_err() {
            yield_now();
        }
        // SAFETY: Under the lock.
        let result = f(unsafe { &mut *self.actions.get() });
        lock.store(0, Release);
        result
    }

    /// The action for a signal from 1 to [`SIGNALS`].
    pub fn get(&self, signal: i32) -> SigAction {
        self.with(|actions| actions[signal as usize - 1])
    }

    /// Changes the action and returns the old one.
    pub fn replace(&self, signal: i32, new: SigAction) -> SigAction {
        self.with(|actions| core::mem::replace(&mut actions[signal as usize - 1], new))
    }

    /// Makes the actions those of `other`.
    pub fn copy_from(&self, other: &Self) {
        let actions = other.with(|actions| *actions);
        self.with(|own| *own = actions);
    }
}

/// Linux' SA_RESTORER, which libc does not have on every target.
pub(crate) const SA_RESTORER: u64 = 0x0400_0000;

impl SigAction {
    /// SIG_DFL.
    pub const DEFAULT: Self = Self {
        handler: 0,
        flags: 0,
        restorer: 0,
        mask: 0,
    };
    pub const DEFAULT_HANDLER: u64 = libc::SIG_DFL as u64;
    pub const IGNORE: u64 = libc::SIG_IGN as u64;

    pub const ONSTACK: u64 = libc::SA_ONSTACK as u64;
    pub const NODEFER: u64 = libc::SA_NODEFER as u64;
    pub const RESETHAND: u64 = libc::SA_RESETHAND as u32 as u64;

    /// Whether the program has a function for it.
    pub fn is_handler(&self) -> bool {
        self.handler != Self::DEFAULT_HANDLER && self.handler != Self::IGNORE
    }

    /// The mask while that runs.
    pub fn mask_during(&self, signal: i32, interrupted: u64) -> u64 {
        let own = if self.flags & Self::NODEFER == 0 {
            signal_bit(signal)
        } else {
            0
        };
        interrupted | self.mask | own
    }
}

/// Linux' `siginfo_t`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct SigInfo([u64; 16]);

impl SigInfo {
    /// si_code.
    pub fn code(&self) -> i32 {
        self.0[1] as i32
    }

    /// What Linux says of a call that it dispatches; `rip` is behind it.
    pub fn of_dispatch(rip: u64, number: i32, architecture: u32) -> Self {
        const SYS_USER_DISPATCH: u64 = 2;
        let mut words = [0; 16];
        words[0] = libc::SIGSYS as u64;
        words[1] = SYS_USER_DISPATCH;
        words[2] = rip;
        words[3] = u64::from(architecture) << 32 | u64::from(number as u32);
        Self(words)
    }

    /// What Linux says of an exception.
    pub fn of_fault(signal: i32, code: i32, address: u64) -> Self {
        let mut words = [0; 16];
        words[0] = signal as u64;
        words[1] = u64::from(code as u32);
        words[2] = address;
        Self(words)
    }
}

/// Sends the calling thread a signal that it has already got, as it came.
pub(crate) fn queue_to_self(signal: i32, info: &SigInfo) {
    // SAFETY: Linux reads one siginfo.
    let _ = unsafe {
        raw(
            libc::SYS_rt_tgsigqueueinfo,
            [
                getpid().into(),
                gettid().into(),
                signal as u64,
                core::ptr::from_ref(info) as u64,
                0,
                0,
            ],
        )
    };
}

/// `sigaltstack`; returns the old stack.
///
/// # Safety
///
/// The memory must be the program's signal stack.
pub(crate) unsafe fn sigaltstack(new: Option<&AltStack>) -> Result<AltStack, Errno> {
    let mut old = AltStack::DISABLED;
    let new = new.map_or(core::ptr::null(), core::ptr::from_ref);
    // SAFETY: Linux reads and writes one structure each; the rest is the caller's.
    check(unsafe { raw(libc::SYS_sigaltstack, [new as u64, &raw mut old as u64, 0, 0, 0, 0]) })?;
    Ok(old)
}

/// Linux' `stack_t`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AltStack {
    pub start: u64,
    pub flags: i32,
    pub reserved: i32,
    pub bytes: u64,
}

impl AltStack {
    /// SS_AUTODISARM.
    pub const AUTODISARM: i32 = 1 << 31;

    /// None.
    pub const DISABLED: Self = Self {
        start: 0,
        flags: libc::SS_DISABLE,
        reserved: 0,
        bytes: 0,
    };

    pub fn is_enabled(&self) -> bool {
        self.flags & libc::SS_DISABLE == 0
    }

    /// Whether a stack pointer is on it.
    pub fn holds(&self, rsp: u64) -> bool {
        self.is_enabled() && rsp > self.start && rsp - self.start <= self.bytes
    }
}

/// `rt_sigaction`; returns the old action.
///
/// # Safety
///
/// The handler of `new` must be a signal handler and its restorer must make `rt_sigreturn`.
pub(crate) unsafe fn sigaction(signal: i32, new: Option<&SigAction>) -> Result<SigAction, Errno> {
    let mut old = SigAction::default();
    let new = new.map_or(core::ptr::null(), |action| action as *const SigAction);
    // SAFETY: Linux reads one structure and writes one; the rest is the caller's.
    check(unsafe {
        raw(
            libc::SYS_rt_sigaction,
            [signal as u64, new as u64, &raw mut old as u64, 8, 0, 0],
        )
    })?;
    Ok(old)
}

/// Bit of a signal in Linux' signal mask.
pub(crate) const fn signal_bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// `rt_sigprocmask`; returns the old mask.
pub(crate) fn sigprocmask(how: i32, set: u64) -> u64 {
    let mut old = 0u64;
    // SAFETY: Linux reads and writes one u64 each.
    let _ = unsafe {
        raw(
            libc::SYS_rt_sigprocmask,
            [how as u64, &raw const set as u64, &raw mut old as u64, 8, 0, 0],
        )
    };
    old
}

/// Ends the process as if it had got `signal` with its default action.
pub(crate) fn die_by(signal: i32) -> ! {
    let default = SigAction::default();
    // SAFETY: SIG_DFL needs no handler; nothing returns to the program.
    unsafe {
        let _ = sigaction(signal, Some(&default));
        sigprocmask(libc::SIG_UNBLOCK, signal_bit(signal));
        let _ = raw(
            libc::SYS_tgkill,
            [getpid() as u64, gettid() as u64, signal as u64, 0, 0, 0],
        );
        loop {
            let _ = raw(libc::SYS_exit_group, [128 + signal as u64, 0, 0, 0, 0, 0]);
        }
    }
}
