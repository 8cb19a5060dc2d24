// SPDX-License-Identifier: MIT OR Apache-2.0

//! Handlers that serve one piece of the program only, and so may do what the program may.
//!
//! # Life
//!
//! 1. [`Thread::with_exception_handler`] keeps a [`Scope`] on its caller's stack, and puts its address into the block; the one
//!    that was there is the next one out.
//! 2. An exception of the thread comes to `dispatch`, which asks [`handle`] before the plain handlers. Only exceptions of code
//!    that runs on the stack on which the scope was opened are its: a plain handler, or a hook, that came in between has another.
//! 3. While its handler runs a scope is busy: what happens in there goes to the next one out, then to the plain handlers.
//! 4. The scope closes when the piece is over, by a panic too. Where an exception ends a compartment, `escape.rs` puts back
//!    what was open before it.

use core::cell::Cell;
use core::marker::PhantomData;
use core::ptr;
use core::sync::atomic::Ordering::Relaxed;

use super::dispatch::forbid_plain;
use super::dispatch::update_plain;
use super::dispatch::Outcome;
use super::dispatch::Thread;
use super::frame::TrapFrame;
use super::frame::Vector;
use crate::layout;
use crate::percpu::Block;

/// An open scope.
pub(crate) struct Scope {
    vector: Vector,
    /// [`stack_of`] who opened it.
    stack: u64,
    call: unsafe fn(*mut (), &mut TrapFrame, &Thread<'_>) -> Outcome,
    handler: *mut (),
    is_busy: Cell<bool>,
    /// The one around it.
    outer: *const Scope,
}

/// Which of its stacks an address is on: the program's, whichever that is, a handler's, or another one of libdune's.
fn stack_of(block: &Block, rsp: u64) -> u64 {
    const PROGRAM: u64 = u64::MAX;
    let offset = rsp.wrapping_sub(ptr::from_ref(block) as u64);
    if offset >= layout::AREA_BYTES as u64 {
        PROGRAM
    } else if offset < layout::HANDLERS as u64 {
        0
    } else {
        offset >> layout::HANDLER_SHIFT
    }
}

/// Closes a scope.
struct Open<'s, 'b> {
    block: &'b Block,
    scope: &'s Scope,
}

impl<'s, 'b> Open<'s, 'b> {
    fn new(block: &'b Block, scope: &'s Scope) -> Self {
        block.scope.store(ptr::from_ref(scope).cast_mut(), Relaxed);
        forbid_plain(block);
        fence();
        Self { block, scope }
    }
}

impl Drop for Open<'_, '_> {
    fn drop(&mut self) {
        fence();
        self.block.scope.store(self.scope.outer.cast_mut(), Relaxed);
        update_plain(self.block);
    }
}

/// The handler may run between any two instructions of the piece: nothing may be kept in registers over its ends.
#[inline(always)]
fn fence() {
    // SAFETY: No instruction.
    unsafe { core::arch::asm!("", options(nostack, preserves_flags)) };
}

impl Thread<'_> {
    /// Calls `body`, and `handler` for each exception with this vector that its code causes at CPL0, on this thread: before
    /// the handlers of [`Thread::set_exception_handler`], which come where it answers [`Outcome::Unhandled`].
    ///
    /// `handler` may do what any code may, allocate and take locks for instance, since `body` says where it can be called: in
    /// `body`, and what that calls. If exceptions are to be expected while code in there holds a lock, the allocator's for
    /// instance, `handler` must not want that lock. It must not unwind. What happens while it runs, it is not called for.
    ///
    /// A compartment that `body` runs is not its code, nor are handlers of other exceptions and hooks. A signal handler
    /// that interrupts it is.
    ///
    /// # Examples
    ///
    /// A write barrier that keeps a list of what was written:
    ///
    /// ```no_run
    /// use libdune::{Dune, Gva, Outcome, Permissions, Vector};
    ///
    /// # #[repr(align(4096))]
    /// # struct Heap([u8; 16 * 4096]);
    /// let mut heap = Box::new(Heap([0; 16 * 4096]));
    /// let dune = Dune::enter()?;
    /// let start = Gva::of(&raw const *heap).ok_or("not canonical")?;
    /// dune.address_space().protect(start, 16 * 4096, Permissions::READ)?.flush();
    ///
    /// let mut written = Vec::new();
    /// dune.thread().with_exception_handler(
    ///     Vector::PF,
    ///     |frame, thread| {
    ///         let Some(page) = Gva::new(frame.cr2 & !4095) else {
    ///             return Outcome::Unhandled;
    ///         };
    ///         written.push(page);
    ///         match thread.address_space().protect(page, 4096, Permissions::READ | Permissions::WRITE) {
    ///             Ok(flush) => flush.flush(),
    ///             Err(_) => return Outcome::Unhandled,
    ///         }
    ///         Outcome::Resume
    ///     },
    ///     || {
    ///         let bytes = heap.0.as_mut_ptr();
    ///         for offset in [5000, 5001, 9000] {
    ///             // SAFETY: In the heap.
    ///             unsafe { bytes.add(offset).write_volatile(1) };
    ///         }
    ///     },
    /// );
    /// assert_eq!(written.len(), 2);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn with_exception_handler<H, R>(&self, vector: Vector, mut handler: H, body: impl FnOnce() -> R) -> R
    where
        H: FnMut(&mut TrapFrame, &Thread<'_>) -> Outcome,
    {
        let block = self.block();
        let here = 0u8;
        let scope = Scope {
            vector,
            stack: stack_of(block, &raw const here as u64),
            call: call::<H>,
            handler: (&raw mut handler).cast(),
            is_busy: Cell::new(false),
            outer: block.scope.load(Relaxed),
        };
        let _open = Open::new(block, &scope);
        body()
    }

    /// The x87, SSE and further registers of the code that `frame` interrupted, which it goes on with. `None` where `frame`
    /// is not what this thread's handler was called with, but a copy.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use libdune::{Dune, Outcome, Thread, TrapFrame, Vector};
    ///
    /// /// Has UD2 mean: XMM0 is doubled.
    /// fn invalid_opcode(frame: &mut TrapFrame, thread: &Thread<'_>) -> Outcome {
    ///     frame.rip += 2;
    ///     let Some(mut state) = thread.extended_state(frame) else {
    ///         return Outcome::Unhandled;
    ///     };
    ///     let value = f64::from_bits(state.xmm(0) as u64);
    ///     state.set_xmm(0, (value * 2.0).to_bits().into());
    ///     Outcome::Resume
    /// }
    ///
    /// let dune = Dune::enter()?;
    /// dune.set_exception_handler(Vector::UD, invalid_opcode);
    /// let mut value = 21.0f64;
    /// unsafe { core::arch::asm!("ud2", inout("xmm0") value) };
    /// assert_eq!(value, 42.0);
    /// # Ok::<(), libdune::Error>(())
    /// ```
    pub fn extended_state<'f>(&self, frame: &'f mut TrapFrame) -> Option<ExtendedState<'f>> {
        let block = self.block();
        // As `stub.rs` places it: the state ends where the handler's stack does, the frame is right below.
        let stack = layout::HANDLERS as u64 + ((frame.level() as u64 + 1) << layout::HANDLER_SHIFT);
        let state = ptr::from_ref(block) as u64 + stack - block.fpu_bytes;
        let is_original = ptr::from_mut(frame) as u64 + size_of::<TrapFrame>() as u64 == state;
        is_original.then_some(ExtendedState {
            area: state as *mut u8,
            bytes: block.fpu_bytes as usize,
            has_xsave: block.has_xsave != 0,
            _frame: PhantomData,
        })
    }
}

/// # Safety
///
/// `handler` must be a live `H` that nobody else uses.
unsafe fn call<H>(handler: *mut (), frame: &mut TrapFrame, thread: &Thread<'_>) -> Outcome
where
    H: FnMut(&mut TrapFrame, &Thread<'_>) -> Outcome,
{
    // SAFETY: The caller's.
    unsafe { (*handler.cast::<H>())(frame, thread) }
}

/// Has the innermost open scope handle an exception that is its.
pub(super) fn handle(frame: &mut TrapFrame, block: &Block) -> Outcome {
    let mut at: *const Scope = block.scope.load(Relaxed);
    if frame.is_cpl3() {
        return Outcome::Unhandled;
    }
    let stack = stack_of(block, frame.rsp);
    // SAFETY: Each is on the stack of a call that has not returned, of this thread.
    while let Some(scope) = unsafe { at.as_ref() } {
        at = scope.outer;
        if scope.vector != frame.vector() || scope.stack != stack || scope.is_busy.get() {
            continue;
        }
        scope.is_busy.set(true);
        // SAFETY: The block lives as long as the thread is in Dune mode. The handler is as alive as its scope, and not busy.
        let outcome = unsafe { (scope.call)(scope.handler, frame, &Thread::new(block)) };
        scope.is_busy.set(false);
        if outcome == Outcome::Resume {
            return outcome;
        }
    }
    Outcome::Unhandled
}

/// Extended state of interrupted code (SDM, "Managing State Using the XSAVE Feature Set"); changes are what it goes on with.
///
/// # Examples
///
/// ```no_run
/// use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
///
/// use libdune::{Dune, ExtendedState, Outcome, Thread, TrapFrame, Vector};
///
/// static MXCSR: AtomicU32 = AtomicU32::new(0);
///
/// static XSTATE_BV: AtomicU64 = AtomicU64::new(0);
///
/// fn invalid_opcode(frame: &mut TrapFrame, thread: &Thread<'_>) -> Outcome {
///     let Some(state) = thread.extended_state(frame) else {
///         return Outcome::Unhandled;
///     };
///     note(&state);
///     frame.rip += 2;
///     Outcome::Resume
/// }
///
/// fn note(state: &ExtendedState<'_>) {
///     MXCSR.store(state.mxcsr(), Ordering::Relaxed);
///     // XSAVE's header is behind the 512 bytes that FXSAVE has, too.
///     if let (true, Some(Ok(word))) = (state.has_xsave(), state.as_bytes().get(512..520).map(TryInto::try_into)) {
///         XSTATE_BV.store(u64::from_le_bytes(word), Ordering::Relaxed);
///     }
/// }
///
/// let dune = Dune::enter()?;
/// dune.set_exception_handler(Vector::UD, invalid_opcode);
/// unsafe { core::arch::asm!("ud2") };
/// // All exceptions masked, as every program starts.
/// assert_eq!(MXCSR.load(Ordering::Relaxed) & 0x1f80, 0x1f80);
/// # Ok::<(), libdune::Error>(())
/// ```
pub struct ExtendedState<'f> {
    area: *mut u8,
    bytes: usize,
    has_xsave: bool,
    _frame: PhantomData<&'f mut TrapFrame>,
}

impl ExtendedState<'_> {
    const MXCSR: usize = 24;
    const XMM: usize = 160;
    const XSTATE_BV: usize = 512;
    const SSE: u64 = 1 << 1;

    /// All of it: as XSAVE writes it, in standard format, or FXSAVE where the CPU, or Linux, has no XSAVE.
    pub fn as_bytes(&self) -> &[u8] {
        // SAFETY: As long, and nobody writes it while it is borrowed.
        unsafe { core::slice::from_raw_parts(self.area, self.bytes) }
    }

    /// Whether [`ExtendedState::as_bytes`] has a header and what is behind it.
    pub fn has_xsave(&self) -> bool {
        self.has_xsave
    }

    /// MXCSR.
    pub fn mxcsr(&self) -> u32 {
        // SAFETY: In the part that both formats have.
        unsafe { self.area.add(Self::MXCSR).cast::<u32>().read() }
    }

    /// The register XMM`index`.
    ///
    /// # Panics
    ///
    /// There are 16.
    pub fn xmm(&self, index: usize) -> u128 {
        if self.has_xsave && self.components() & Self::SSE == 0 {
            assert!(index < 16);
            return 0;
        }
        // SAFETY: In the part that both formats have.
        unsafe { self.register(index).read() }
    }

    /// Changes the register XMM`index`; what is above it of YMM`index` stays.
    ///
    /// # Panics
    ///
    /// There are 16.
    pub fn set_xmm(&mut self, index: usize, value: u128) {
        if self.has_xsave && self.components() & Self::SSE == 0 {
            // Until now all were 0, whatever stands here.
            for other in 0..16 {
                // SAFETY: As below.
                unsafe { self.register(other).write(0) };
            }
            let components = self.components() | Self::SSE;
            // SAFETY: XSAVE has a header.
            unsafe { self.area.add(Self::XSTATE_BV).cast::<u64>().write(components) };
        }
        // SAFETY: In the part that both formats have; any value is one.
        unsafe { self.register(index).write(value) };
    }

    fn register(&self, index: usize) -> *mut u128 {
        assert!(index < 16);
        // SAFETY: Within the area, which is aligned to 64 bytes.
        unsafe { self.area.add(Self::XMM + 16 * index).cast() }
    }

    /// Those that are not in their initial state.
    fn components(&self) -> u64 {
        // SAFETY: XSAVE has a header.
        unsafe { self.area.add(Self::XSTATE_BV).cast::<u64>().read() }
    }
}
