// SPDX-License-Identifier: MIT OR Apache-2.0

//! Hooks before and after the system calls that a Dune thread makes at CPL0.
//!
//! A hook [before](Hooks::before) a call sees number and arguments, and lets it go, changes it, or answers it: without an
//! exit, Linux never hears of it. A hook [after](Hooks::after) it sees and changes what Linux answered. Hooks are a
//! thread's ([`Thread::set_hooks`]) or the process' ([`Thread::set_process_hooks`]); the thread's is asked first, and told
//! last.
//!
//! ```no_run
//! use libdune::hook::{Hooks, SystemCall, Verdict};
//! use libdune::{Dune, Thread};
//!
//! fn no_files(call: &mut SystemCall, _: &Thread<'_>) -> Verdict {
//!     match call.number() as i64 {
//!         libc::SYS_openat | libc::SYS_open => Verdict::deny(libc::EACCES),
//!         libc::SYS_getppid => Verdict::Answer(1),
//!         _ => Verdict::Allow,
//!     }
//! }
//!
//! let dune = Dune::enter()?;
//! dune.thread().set_hooks(Hooks {
//!     before: Some(no_files),
//!     after: None,
//! });
//! assert!(std::fs::File::open("/etc/passwd").is_err());
//! assert_eq!(std::os::unix::process::parent_id(), 1);
//! # Ok::<(), libdune::Error>(())
//! ```
//!
//! # What a hook may do
//!
//! It runs in the middle of the caller, which may be the allocator or hold any lock, so it may do what a signal handler may
//! do (signal-safety(7)), and must not unwind or jump out. It has a stack of its own of 32 KiB. The system calls that it
//! makes go by all hooks, and so do those of the exception handlers that it causes. Signals wait until it returns; a call
//! that a signal came before, or that Linux restarts, comes to the hooks again, as the program made it. What it does not
//! change of the caller's registers stays, x87, SSE and AVX state included.
//!
//! # What comes to a hook
//!
//! Every SYSCALL at CPL0, but not a VMCALL of the program's, not `int 0x80`, and not what libdune itself needs to do. CPL3's
//! are [`UserExit`](crate::user::UserExit)s. At CPL0 nothing is protected from the program: hooks are for programs that do
//! not work against them. For code that may, there is CPL3.
//!
//! No hook comes after clone, clone3, fork, vfork, exit, exit_group, rt_sigreturn, sigaltstack and tgkill, nor after what a
//! hook answered. Rewritten arguments of those stay in the caller's registers; of all others they do not.
//!
//! Threads and children that a thread makes in Dune mode start with its hooks.
//!
//! # Safety
//!
//! The frame of a call is the thread's, and changed by one at a time: assembly, then the hook, then assembly.

mod asm;
mod bounce;

use core::cell::UnsafeCell;
use core::fmt;
use core::mem;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::AtomicUsize;
use core::sync::atomic::Ordering::Relaxed;
use core::sync::atomic::Ordering::SeqCst;

use crate::cpl3;
use crate::host_loop::State;
use crate::percpu::Block;
use crate::process::Process;
use crate::trap::Thread;

pub use bounce::Bounce;
pub use bounce::BounceError;

pub(crate) use asm::entry;
pub(crate) use asm::syscall_vmcall;

/// What a hook decides about a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Verdict {
    /// It is made, with number and arguments as the hook left them, unless another hook decides otherwise.
    Allow,
    /// It is not made: the caller gets this in RAX.
    Answer(i64),
}

impl Verdict {
    /// Answers with an error number, such as `libc::EPERM`.
    pub const fn deny(errno: i32) -> Self {
        Self::Answer(-(errno as i64))
    }
}

/// Decides about a call that is about to be made.
pub type Before = fn(&mut SystemCall, &Thread<'_>) -> Verdict;

/// Sees what Linux answered to a call, a result or a negative error number, and says what the caller gets.
///
/// # Examples
///
/// ```no_run
/// use std::sync::atomic::{AtomicU64, Ordering};
///
/// use libdune::hook::{After, Hooks};
/// use libdune::Dune;
///
/// static WRITTEN: AtomicU64 = AtomicU64::new(0);
///
/// /// Counts the bytes that the thread writes.
/// const COUNT: After = |call, result, _| {
///     if call.number() as i64 == libc::SYS_write && result > 0 {
///         WRITTEN.fetch_add(result as u64, Ordering::Relaxed);
///     }
///     result
/// };
///
/// let dune = Dune::enter()?;
/// dune.thread().set_hooks(Hooks { before: None, after: Some(COUNT) });
/// eprintln!("hello");
/// assert_eq!(WRITTEN.load(Ordering::Relaxed), 6);
/// # Ok::<(), libdune::Error>(())
/// ```
pub type After = fn(&SystemCall, i64, &Thread<'_>) -> i64;

/// Hooks of a thread or of the process.
///
/// # Examples
///
/// ```no_run
/// use std::sync::atomic::{AtomicU64, Ordering};
///
/// use libdune::hook::Hooks;
/// use libdune::Dune;
///
/// static FAILED: AtomicU64 = AtomicU64::new(0);
///
/// let dune = Dune::enter()?;
/// let before = dune.thread().set_process_hooks(Hooks {
///     after: Some(|_, result, _| {
///         FAILED.fetch_add(u64::from((-4095..0).contains(&result)), Ordering::Relaxed);
///         result
///     }),
///     ..Hooks::default()
/// });
/// assert!(std::thread::spawn(|| std::fs::read("/nowhere")).join().is_ok());
/// dune.thread().set_process_hooks(before);
/// assert!(FAILED.load(Ordering::Relaxed) > 0);
/// # Ok::<(), libdune::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Hooks {
    /// Asked before each call.
    pub before: Option<Before>,
    /// Told after each call that was made.
    pub after: Option<After>,
}

/// A system call on its way.
///
/// # Examples
///
/// ```no_run
/// use libdune::hook::{Hooks, SystemCall, Verdict};
/// use libdune::{Dune, Thread};
///
/// /// Has `write` to standard error go to standard output.
/// fn redirect(call: &mut SystemCall, _: &Thread<'_>) -> Verdict {
///     if call.number() as i64 == libc::SYS_write && call.argument(0) == 2 {
///         call.set_argument(0, 1);
///     }
///     Verdict::Allow
/// }
///
/// let dune = Dune::enter()?;
/// dune.thread().set_hooks(Hooks { before: Some(redirect), after: None });
/// eprintln!("on standard output");
/// # Ok::<(), libdune::Error>(())
/// ```
#[repr(transparent)]
pub struct SystemCall(Frame);

impl SystemCall {
    /// Its number.
    #[inline]
    pub fn number(&self) -> u64 {
        self.word(0)
    }

    /// Its arguments: RDI, RSI, RDX, R10, R8, R9.
    #[inline]
    pub fn arguments(&self) -> [u64; 6] {
        core::array::from_fn(|index| self.word(index + 1))
    }

    /// One of them, from 0.
    ///
    /// # Panics
    ///
    /// Above 5.
    #[inline]
    pub fn argument(&self, index: usize) -> u64 {
        assert!(index < 6);
        self.word(index + 1)
    }

    /// Has another call made in its place.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use std::sync::atomic::{AtomicU64, Ordering};
    ///
    /// use libdune::hook::{Before, Hooks, SystemCall, Verdict};
    /// use libdune::{Dune, Thread};
    ///
    /// static FROM: AtomicU64 = AtomicU64::new(0);
    ///
    /// /// Threads are told the number of their process.
    /// fn one_number(call: &mut SystemCall, _: &Thread<'_>) -> Verdict {
    ///     if call.number() as i64 == libc::SYS_gettid {
    ///         FROM.store(call.return_address(), Ordering::Relaxed);
    ///         call.set_number(libc::SYS_getpid as u64);
    ///     }
    ///     Verdict::Allow
    /// }
    ///
    /// const ONE_NUMBER: Before = one_number;
    /// let dune = Dune::enter()?;
    /// let hooks = dune.thread().set_process_hooks(Hooks { before: Some(ONE_NUMBER), after: None });
    /// // SAFETY: A call without arguments.
    /// let number = std::thread::spawn(|| unsafe { libc::syscall(libc::SYS_gettid) }).join();
    /// dune.thread().set_process_hooks(hooks);
    /// assert_eq!(number.ok(), Some(i64::from(std::process::id())));
    /// assert_ne!(FROM.load(Ordering::Relaxed), 0);
    /// # Ok::<(), libdune::Error>(())
    /// ```
    pub fn set_number(&mut self, number: u64) {
        self.rewrite()[0] = number;
    }

    /// Has it made with another argument, from 0.
    ///
    /// # Panics
    ///
    /// Above 5.
    pub fn set_argument(&mut self, index: usize, value: u64) {
        assert!(index < 6);
        self.rewrite()[index + 1] = value;
    }

    /// Where the program goes on: behind its SYSCALL.
    pub fn return_address(&self) -> u64 {
        self.0.rip
    }

    #[inline]
    fn word(&self, index: usize) -> u64 {
        if self.0.is_rewritten == 0 {
            self.0.call[index]
        } else {
            self.0.now[index]
        }
    }

    fn rewrite(&mut self) -> &mut [u64; 7] {
        let frame = &mut self.0;
        if frame.is_rewritten == 0 {
            frame.now = frame.call;
            frame.is_rewritten = 1;
        }
        &mut frame.now
    }
}

impl fmt::Debug for SystemCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SystemCall")
            .field("number", &self.number())
            .field("arguments", &self.arguments())
            .finish()
    }
}

/// No hooks.
pub(crate) const MODE_OFF: u32 = 0;
/// SYSCALL goes to hooks.
pub(crate) const MODE_ON: u32 = 1;
/// The thread is in a hook, or in a call that one watches.
pub(crate) const MODE_INSIDE: u32 = 2;

/// Bytes of SYSCALL.
const SYSCALL_BYTES: u64 = 2;

/// What assembly keeps of a call. Pushed from `caller_rsp` down.
#[repr(C)]
pub(crate) struct Frame {
    /// RAX, RDI, RSI, RDX, R10, R8, R9 of the caller.
    call: [u64; 7],
    rip: u64,
    rflags: u64,
    pub caller_rsp: u64,
    /// A `MODE_*`.
    pub mode: AtomicU32,
    /// Hooks have changed `now`. The assembly writes it together with `mode`.
    is_rewritten: u32,
    /// Whom to ask: the only hook, or `ask_all`.
    ask: AtomicUsize,
    /// Where the hook stack begins.
    stack: u64,
    block: *const Block,
    /// The assembly's way in.
    pub entry: u64,
    result: i64,
    /// The call as hooks changed it.
    now: [u64; 7],
}

const _: () = {
    assert!(mem::offset_of!(Frame, is_rewritten) == mem::offset_of!(Frame, mode) + 4);
    assert!(mem::offset_of!(Frame, mode) % 8 == 0);
};

/// A frame in static memory.
#[repr(transparent)]
pub(crate) struct Cell(pub UnsafeCell<Frame>);

// SAFETY: Used by its thread only, but for `mode`, which is atomic.
unsafe impl Sync for Cell {}

impl Cell {
    pub const fn new() -> Self {
        Self(UnsafeCell::new(Frame {
            call: [0; 7],
            rip: 0,
            rflags: 0,
            caller_rsp: 0,
            mode: AtomicU32::new(MODE_OFF),
            is_rewritten: 0,
            ask: AtomicUsize::new(0),
            stack: 0,
            block: core::ptr::null(),
            entry: 0,
            result: 0,
            now: [0; 7],
        }))
    }

    /// The mode of a thread that may be another's.
    fn mode(&self) -> &AtomicU32 {
        // SAFETY: Only this atomic field is borrowed.
        unsafe { &(*self.0.get()).mode }
    }

    /// Whom it asks.
    fn ask(&self) -> &AtomicUsize {
        // SAFETY: As above.
        unsafe { &(*self.0.get()).ask }
    }
}

/// Hooks as they are stored.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Pair {
    before: AtomicUsize,
    after: AtomicUsize,
}

impl Pair {
    pub const fn new() -> Self {
        Self {
            before: AtomicUsize::new(0),
            after: AtomicUsize::new(0),
        }
    }

    #[inline]
    fn before(&self) -> Option<Before> {
        // SAFETY: Only functions of this type are stored; 0 is none.
        unsafe { mem::transmute::<usize, Option<Before>>(self.before.load(Relaxed)) }
    }

    #[inline]
    fn after(&self) -> Option<After> {
        // SAFETY: As above.
        unsafe { mem::transmute::<usize, Option<After>>(self.after.load(Relaxed)) }
    }

    fn get(&self) -> Hooks {
        Hooks {
            before: self.before(),
            after: self.after(),
        }
    }

    fn set(&self, hooks: Hooks) {
        self.before.store(hooks.before.map_or(0, |hook| hook as usize), SeqCst);
        self.after.store(hooks.after.map_or(0, |hook| hook as usize), SeqCst);
    }

    fn is_empty(&self) -> bool {
        self.before.load(SeqCst) == 0 && self.after.load(SeqCst) == 0
    }
}

impl Thread<'_> {
    /// Has the calling thread's system calls come to hooks from now on, and returns those before. See
    /// [`hook`](crate::hook).
    pub fn set_hooks(&self, hooks: Hooks) -> Hooks {
        let block = self.block();
        let before = block.hooks.get();
        block.hooks.set(hooks);
        update(block, block.process());
        before
    }

    /// Has the system calls of all Dune threads of the process, also of those to come, come to hooks, and returns those
    /// before.
    pub fn set_process_hooks(&self, hooks: Hooks) -> Hooks {
        let process = self.block().process();
        let before = process.hooks.get();
        process.hooks.set(hooks);
        process.for_each_block(|block| update(block, process));
        before
    }
}

/// Has SYSCALL of a thread go to hooks where there are any. In a hook it does not, until that returns.
fn update(block: &Block, process: &Process) {
    if block.user_slot.is_null() {
        // No block yet, or no more: whoever makes it one does this.
        return;
    }
    let cell = &block.slot().hook;
    let only = match [&block.hooks, &process.hooks].map(Pair::before) {
        [Some(hook), None] | [None, Some(hook)] => hook,
        _ => ask_all,
    };
    cell.ask().store(only as usize, SeqCst);
    let mode = cell.mode();
    let (from, to) = if block.hooks.is_empty() && process.hooks.is_empty() {
        (MODE_ON, MODE_OFF)
    } else {
        (MODE_OFF, MODE_ON)
    };
    let _ = mode.compare_exchange(from, to, SeqCst, SeqCst);
}

/// Makes the frame of a new thread, with its maker's hooks.
///
/// # Safety
///
/// The block must be complete, and its thread must not run yet.
pub(crate) unsafe fn start(block: &Block, stack: u64, maker: Option<&Pair>) {
    let frame = block.slot().hook.0.get();
    if let Some(maker) = maker {
        block.hooks.set(maker.get());
    }
    // SAFETY: The caller's. The mode may be seen by others: it is written before hooks are looked for.
    unsafe {
        (*frame).mode.store(MODE_OFF, SeqCst);
        (*frame).stack = stack;
        (*frame).block = block;
        (*frame).entry = entry(block.has_xsave != 0);
    }
    update(block, block.process());
}

/// Asks the thread's hook, then the process'.
fn ask_all(call: &mut SystemCall, thread: &Thread<'_>) -> Verdict {
    let block = thread.block();
    for pair in [&block.hooks, &block.process().hooks] {
        if let Some(before) = pair.before() {
            let verdict = before(call, thread);
            if verdict != Verdict::Allow {
                return verdict;
            }
        }
    }
    Verdict::Allow
}

/// Asks. A hook must not unwind, so this is not plain "C": it is one jump.
unsafe extern "C-unwind" fn dune_hook_before(call: *mut SystemCall, block: *const Block) -> Verdict {
    // SAFETY: The assembly passes the thread's own frame, and its block, which begins as a `Thread`. Only functions of
    // this type are stored, before there are hooks.
    unsafe {
        let before = mem::transmute::<usize, Before>((*call).0.ask.load(Relaxed));
        before(&mut *call, &*block.cast::<Thread<'_>>())
    }
}

/// What becomes of a call that is allowed: it is made, and perhaps watched.
const FORWARD: u32 = 1;
const WATCH: u32 = 2;

/// Says which.
unsafe extern "C" fn dune_hook_allowed(call: *mut SystemCall, block: *const Block) -> u32 {
    // SAFETY: As in `dune_hook_before`.
    let (call, block) = unsafe { (&mut *call, &*block) };
    let is_watched = block.hooks.after().is_some() || block.process().hooks.after().is_some();
    if call.0.is_rewritten == 0 && !is_watched {
        return FORWARD;
    }
    let now = *call.rewrite();
    if is_unwatched(call.number() as i64) {
        call.0.call = now;
        return FORWARD;
    }
    WATCH
}

/// Calls that do not come back, or elsewhere, or twice, or that depend on RSP.
fn is_unwatched(number: i64) -> bool {
    matches!(
        number,
        libc::SYS_clone
            | libc::SYS_clone3
            | libc::SYS_fork
            | libc::SYS_vfork
            | libc::SYS_exit
            | libc::SYS_exit_group
            | libc::SYS_rt_sigreturn
            | libc::SYS_sigaltstack
            | libc::SYS_tgkill
    )
}

/// Tells the hooks; the result is in the frame.
unsafe extern "C-unwind" fn dune_hook_after(call: *const SystemCall, block: *const Block) -> i64 {
    // SAFETY: As in `dune_hook_before`.
    let (call, block, thread) = unsafe { (&*call, &*block, &*block.cast::<Thread<'_>>()) };
    let mut result = call.0.result;
    for pair in [&block.process().hooks, &block.hooks] {
        if let Some(after) = pair.after() {
            result = after(call, result, thread);
        }
    }
    result
}

/// What is to be done about a signal for a vCPU in a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Settled {
    /// It is in none, or `state` was changed so that it is in none any more.
    Outside,
    /// It will look for signals, at `state`'s RIP.
    Inside,
}

/// Has a vCPU in this state that is in a hook's assembly, where it can, be behind the call, or at it again.
pub(crate) fn settle(state: &mut State, block: &Block) -> Settled {
    if state.sregs.cs.selector & 3 != 0 {
        return Settled::Outside;
    }
    let cell = &block.slot().hook;
    // SAFETY: The vCPU does not run, and is the only one that uses its frame.
    let frame = unsafe { &mut *cell.0.get() };
    match asm::part(state.rip) {
        Some(asm::Part::Before) => Settled::Inside,
        Some(asm::Part::Looked(look)) => {
            state.rip = look;
            Settled::Inside
        }
        Some(asm::Part::Answer) => {
            frame.go_on(state, state.gprs.rax, 0);
            Settled::Outside
        }
        Some(asm::Part::Call) => {
            frame.go_on(state, frame.call[0], SYSCALL_BYTES);
            Settled::Outside
        }
        None if cpl3::is_hooked_stub(state.rip) || frame.is_inside() => Settled::Inside,
        None => Settled::Outside,
    }
}

/// The program's state behind the SYSCALL that a vCPU in this state makes: as it is, or, where a hook watches the call, as it
/// was. `None` for a VMCALL, and for a call of a hook's own.
pub(crate) fn behind_syscall(state: &State, block: &Block) -> Option<State> {
    // SAFETY: The vCPU does not run, and is the only one that uses its frame.
    let frame = unsafe { &*block.slot().hook.0.get() };
    let mut state = *state;
    if asm::is_behind_watched_call(state.rip) {
        frame.restore(&mut state, frame.call[0], 0);
        Some(state)
    } else {
        (state.gprs.rcx == state.rip && !frame.is_inside()).then_some(state)
    }
}

/// Has the thread be in no hook any more: it goes on as [`behind_syscall`] says.
pub(crate) fn forget(block: &Block) {
    let _ = block
        .slot()
        .hook
        .mode()
        .compare_exchange(MODE_INSIDE, MODE_ON, Relaxed, Relaxed);
}

/// Whether the thread of a block is in a hook, or in a call that one watches.
pub(crate) fn is_inside(block: &Block) -> bool {
    block.slot().hook.mode().load(Relaxed) == MODE_INSIDE
}

impl Frame {
    fn is_inside(&self) -> bool {
        self.mode.load(Relaxed) == MODE_INSIDE
    }

    /// The caller's registers, with this RAX, `before` bytes before where it goes on.
    fn go_on(&mut self, state: &mut State, rax: u64, before: u64) {
        self.restore(state, rax, before);
        self.mode.store(MODE_ON, Relaxed);
    }

    fn restore(&self, state: &mut State, rax: u64, before: u64) {
        let [_, rdi, rsi, rdx, r10, r8, r9] = self.call;
        let gprs = &mut state.gprs;
        (gprs.rax, gprs.rdi, gprs.rsi, gprs.rdx) = (rax, rdi, rsi, rdx);
        (gprs.r10, gprs.r8, gprs.r9) = (r10, r8, r9);
        (gprs.rcx, gprs.r11, gprs.rsp) = (self.rip, self.rflags, self.caller_rsp);
        state.rip = self.rip.wrapping_sub(before);
        state.rflags = self.rflags;
    }
}
