// SPDX-License-Identifier: MIT OR Apache-2.0

//! What happens to an exception: fill in a page-table leaf, call a handler, or the default.
//!
//! # Safety
//!
//! Called by the stub with pointers into the block of this thread. Allocates nothing, takes no lock, uses no TLS: it
//! can interrupt the program anywhere.

use core::marker::PhantomData;
use core::ptr;
use core::sync::atomic::Ordering::Relaxed;
use core::sync::atomic::Ordering::SeqCst;

use x86_64::structures::idt::PageFaultErrorCode;

use super::escape;
use super::frame::TrapFrame;
use super::frame::Vector;
use super::scope;
use super::stub;
use crate::abi::Counters;
use crate::abi::CALL_EXCEPTION;
use crate::abi::CALL_FATAL;
use crate::abi::CALL_SELF;
use crate::abi::CALL_SIGNAL;
use crate::abi::IOPL_CPL0;
use crate::abi::PAGE_FAULT_HOST_REFUSED;
use crate::addr::Gpa;
use crate::addr::Gva;
use crate::addr::PAGE_BYTES;
use crate::addr::USER_END;
use crate::cpl3;
use crate::layout;
use crate::paging::fill;
use crate::paging::flush_all;
use crate::paging::flush_page;
use crate::paging::free;
use crate::paging::has_copies;
use crate::paging::is_cpl0;
use crate::paging::loaded_root;
use crate::paging::new_root;
use crate::paging::settle_write;
use crate::paging::switch;
use crate::paging::tables::DEFAULT;
use crate::paging::AddressSpace;
use crate::paging::LoadedSpace;
use crate::paging::PageTable;
use crate::paging::PagingError;
use crate::percpu::Block;
use crate::sys;

/// Level codes by which the stub says that there is no way on.
pub(super) const LEVEL_TOO_DEEP: u32 = 100;
pub(super) const LEVEL_WINDOW: u32 = 101;
pub(super) const LEVEL_DOUBLE_FAULT: u32 = 102;

/// A function of libdune whose surroundings the page table must map before the first exception.
pub(crate) const ANCHOR: *const () = dune_trap_dispatch as *const ();

/// What a [`Handler`] made of an exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Outcome {
    /// The program goes on with the registers of the frame.
    Resume,
    /// Not this handler's: do as if there were none.
    Unhandled,
}

/// A handler, called at CPL0 on a stack of its own, with exceptions possible inside it.
///
/// It can interrupt the program anywhere, also inside the allocator or while it holds a lock, so it may do what a
/// signal handler may do (signal-safety(7)): no allocation, no lock that the program can hold
/// ([`Thread::with_exception_handler`] is for handlers that want more). System calls are possible. It may change any register in the frame. It must not unwind.
///
/// It is a function, and no closure that holds anything: there is no `Vec` for it to push to. What it tells the program goes
/// through atomics. That it calls no function that allocates no type can say; where a fault came from inside the allocator,
/// such a handler would wait for a lock that its own thread holds.
///
/// # Examples
///
/// ```no_run
/// use std::sync::atomic::{AtomicU64, Ordering};
///
/// use libdune::trap::Handler;
/// use libdune::{Dune, Gva, Outcome, Permissions, Thread, TrapFrame, Vector};
///
/// static LAST: AtomicU64 = AtomicU64::new(0);
///
/// /// Notes where a page fault was, and lets the program go on.
/// fn page_fault(frame: &mut TrapFrame, thread: &Thread<'_>) -> Outcome {
///     let Some(page) = Gva::new(frame.cr2).filter(|_| !frame.host_refused()) else {
///         return Outcome::Unhandled;
///     };
///     LAST.store(frame.cr2, Ordering::Relaxed);
///     let space = thread.address_space();
///     match space.protect(page.align_down(4096), 4096, Permissions::ALL) {
///         Ok(flush) => flush.ignore(), // what was not present is in no TLB
///         Err(_) => return Outcome::Unhandled,
///     }
///     Outcome::Resume
/// }
///
/// # #[repr(align(4096))]
/// # struct Page([u8; 4096]);
/// let mut page = Box::new(Page([0; 4096]));
/// let dune = Dune::enter()?;
/// let before: Option<Handler> = dune.set_exception_handler(Vector::PF, page_fault);
/// assert!(before.is_none());
/// let start = Gva::of(&raw const *page).ok_or("not canonical")?;
/// dune.address_space().protect(start, 4096, Permissions::NONE)?.flush();
/// let byte = &raw mut page.0[100];
/// unsafe { byte.write_volatile(1) };
/// assert_eq!(LAST.load(Ordering::Relaxed), byte as u64);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub type Handler = fn(&mut TrapFrame, &Thread<'_>) -> Outcome;

/// The Dune thread as a handler sees it: the token for what only a thread in Dune mode can do.
///
/// [`Dune::thread`](crate::Dune::thread) lends it, handlers and hooks get it, and [`Thread::with_current`] finds it.
///
/// # Examples
///
/// ```no_run
/// use libdune::{Dune, Gva, LoadedSpace, Thread, Vector};
///
/// /// Somewhere deep in a library that knows nothing of who entered.
/// fn forget_translations() -> bool {
///     Thread::with_current(|thread| thread.flush_all()).is_some()
/// }
///
/// assert!(!forget_translations());
/// let dune = Dune::enter()?;
/// assert!(forget_translations());
///
/// let thread = dune.thread();
/// assert_eq!(thread.vcpu(), dune.vcpu());
/// assert_eq!(thread.clear_exception_handler(Vector::UD), None);
/// // The page table in CR3, kept as long as this.
/// let space: LoadedSpace<'_> = thread.current_address_space();
/// assert!(space.is_loaded());
/// // SAFETY: No other table is loaded meanwhile.
/// assert_eq!(unsafe { thread.loaded_space() }.root(), space.root());
/// // One page of it.
/// let place = 0u8;
/// if let Some(page) = Gva::of(&raw const place) {
///     thread.flush_page(page);
/// }
/// # Ok::<(), libdune::Error>(())
/// ```
#[repr(transparent)]
pub struct Thread<'a> {
    block: *const Block,
    /// Not `Send`, nor `Sync`, because of the pointer.
    _block: PhantomData<&'a ()>,
}

impl<'a> Thread<'a> {
    /// # Safety
    ///
    /// `block` must be alive for `'a`.
    pub(crate) unsafe fn new(block: *const Block) -> Self {
        Self {
            block,
            _block: PhantomData,
        }
    }

    #[inline]
    pub(crate) fn block(&self) -> &'a Block {
        // SAFETY: Alive for 'a.
        unsafe { &*self.block }
    }

    /// The default page table of the process, with which its first Dune thread started.
    #[inline]
    pub fn address_space(&self) -> AddressSpace<'a> {
        // SAFETY: The process has it as long as a Dune thread.
        unsafe { AddressSpace::borrowed(self.block().process, DEFAULT) }
    }

    /// The page table that CR3 holds. It stays as long as this, also where another one is loaded meanwhile.
    pub fn current_address_space(&self) -> LoadedSpace<'a> {
        // SAFETY: The thread has it now, and the process lives as long as a Dune thread.
        unsafe { LoadedSpace::new(self.loaded_space()) }
    }

    /// The same, counted by nobody: two atomic operations less.
    ///
    /// # Safety
    ///
    /// Not to be used when another table may have been loaded.
    pub unsafe fn loaded_space(&self) -> AddressSpace<'a> {
        let block = self.block();
        let number = block.here.number().unwrap_or(DEFAULT);
        let root = block.process().tables().get(number).root();
        let loaded = if is_cpl0() { loaded_root() } else { root.as_u64() };
        // SAFETY: What is loaded is a tree in the process' memory, and the thread is one of its users.
        unsafe {
            match Gpa::new(loaded) {
                Some(loaded) if loaded != root => AddressSpace::foreign(block.process, loaded),
                _ => AddressSpace::borrowed(block.process, number),
            }
        }
    }

    /// A page table that maps what the default one did at first: every GVA to the HVA of the same number, filled in as
    /// GiBs are used, with what libdune and the calling thread's stack need filled in already. To have nothing else
    /// mapped by itself, [`AddressSpace::seal`] it.
    ///
    /// # Errors
    ///
    /// [`PagingError::OutOfTables`] where the process has 4,096, [`PagingError::OutOfMemory`],
    /// [`PagingError::OutOfSlots`], [`PagingError::MapSlot`].
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # #[repr(align(4096))]
    /// # struct Page([u8; 4096]);
    /// use libdune::{Dune, Gva, Hva, Permissions};
    ///
    /// let (page, other) = (Box::new(Page([1; 4096])), Box::new(Page([2; 4096])));
    /// let dune = Dune::enter()?;
    /// let table = dune.new_page_table()?;
    /// let start = Gva::of(&raw const *page).ok_or("not canonical")?;
    /// let to = Hva::new(&raw const *other as u64).ok_or("no address of a process")?;
    /// table.map(start, 4096, to, Permissions::READ)?.ignore();
    ///
    /// let byte = &raw const page.0[0];
    /// // SAFETY: The table maps all that the default one does, but for the page that is read here.
    /// unsafe {
    ///     dune.load(&table);
    ///     assert_eq!(byte.read_volatile(), 2);
    ///     dune.load(&dune.address_space());
    ///     assert_eq!(byte.read_volatile(), 1);
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn new_page_table(&self) -> Result<PageTable, PagingError> {
        let block = self.block();
        let process = block.process();
        let here = 0u8;
        let stack = &raw const here as u64;
        // SAFETY: The process is alive, and the tree fresh.
        unsafe {
            PageTable::new(block.process, || {
                let root = new_root(&process.memory)?;
                let own = [stack, stack.saturating_sub(1 << 20), block.run as u64];
                for address in process.essential.into_iter().chain(own) {
                    if let Some(gva) = Gva::new(address) {
                        fill(&process.memory, root, gva).inspect_err(|_| free(&process.memory, root))?;
                    }
                }
                Ok(root)
            })
        }
    }

    /// Makes the calling thread use a page table. Threads that it makes from then on start with it. Where the CPU has
    /// PCIDs the TLB keeps what it has of both tables. Does nothing outside Dune mode.
    ///
    /// # Safety
    ///
    /// The table must be one of this process, not of the one that it was forked from outside Dune mode. It must map the
    /// code that runs, its stack, libdune and what libdune keeps for the thread, as the default table and its duplicates
    /// do unless that was taken out.
    #[inline(always)]
    pub unsafe fn load(&self, table: &AddressSpace<'_>) {
        let block = self.block();
        debug_assert!(table.is_of(block.process), "a page table of another process");
        if let (true, Some(number)) = (is_cpl0(), table.number()) {
            // SAFETY: At CPL0; the borrow keeps the table; the rest is the caller's.
            unsafe { switch(block.process(), self.block as u64, &block.here, number) };
        }
    }

    /// Forgets what the calling thread's TLB has of one page of the loaded table. [`Flush`](crate::paging::Flush) is what
    /// changes need; this is for entries that the program writes itself.
    pub fn flush_page(&self, gva: Gva) {
        flush_page(gva);
    }

    /// Forgets what the calling thread's TLB has of the loaded table.
    pub fn flush_all(&self) {
        flush_all();
    }

    /// Calls `f` with the calling thread as a Dune thread; `None`, without calling it, outside Dune mode. Costs one exit.
    ///
    /// The thread must not leave Dune mode meanwhile: `Dune::leave` in `f` ends the process with a report.
    pub fn with_current<R>(f: impl FnOnce(&Thread<'_>) -> R) -> Option<R> {
        // SAFETY: The host loop answers with the block of this thread, which lives as long as it is in Dune mode. A
        // private call has no other effect.
        is_cpl0().then(|| unsafe {
            let thread = Self::new(sys::vmcall(CALL_SELF) as *const Block);
            let _lent = thread.block().lend();
            f(&thread)
        })
    }

    /// Number of the vCPU among those of this process, from 0.
    pub fn vcpu(&self) -> u32 {
        self.block().vcpu.load(Relaxed)
    }

    /// Calls `handler` for exceptions of this thread with this vector from now on, and returns the one before.
    ///
    /// Threads and children that it makes start with its handlers. See [`Handler`] for what one may do. The page faults
    /// by which libdune fills in the page table do not come to it.
    pub fn set_exception_handler(&self, vector: Vector, handler: Handler) -> Option<Handler> {
        self.replace_handler(vector, handler as usize)
    }

    /// Goes back to the default for exceptions of this thread with this vector, and returns the handler.
    pub fn clear_exception_handler(&self, vector: Vector) -> Option<Handler> {
        self.replace_handler(vector, 0)
    }

    fn replace_handler(&self, vector: Vector, new: usize) -> Option<Handler> {
        let is_page_fault = vector == Vector::PF;
        if is_page_fault && new == 0 {
            forbid_plain(self.block());
        }
        let old = self.block().handlers[usize::from(vector.0)].swap(new, Relaxed);
        if is_page_fault {
            update_plain(self.block());
        }
        // SAFETY: Only functions of this type are stored.
        (old != 0).then(|| unsafe { core::mem::transmute::<usize, Handler>(old) })
    }

    /// What the vCPU did so far: exits by basic exit reason, and more. Reading it costs no exit.
    pub fn counters(&self) -> Counters {
        // SAFETY: The run page is mapped as long as the block lives; the module may write it at any time.
        unsafe { (&raw const (*self.block().run).counters).read_volatile() }
    }
}

/// No page fault goes straight to a handler any more.
pub(crate) fn forbid_plain(block: &Block) {
    block.inner_last.store(u64::MAX, SeqCst);
}

/// Says whether plain page faults of the thread go straight to its handler: one is there, no scope is open, no page of the
/// process is copied on write, and nobody waits for what the handler does not take.
pub(crate) fn update_plain(block: &Block) {
    if block.handlers[usize::from(Vector::PF.0)].load(Relaxed) == 0
        || block.waiting.is_active()
        || !block.scope.load(Relaxed).is_null()
    {
        forbid_plain(block);
        return;
    }
    block.inner_last.store(block.inner_bytes, SeqCst);
    // Either this sees that there are copies, or who makes the first one sees what was stored.
    if block.process().has_copies.load(SeqCst) {
        forbid_plain(block);
    }
}

/// Why a thread cannot go on; stored in the block for the host loop's report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Fatal {
    TooDeep = 1,
    Window = 2,
    DoubleFault = 3,
    PageTable = 4,
    OutOfSlots = 5,
    OutOfMemory = 6,
    Vector = 7,
    HandlerFault = 8,
    Unwaited = 9,
    HandlerStack = 10,
    HookStack = 11,
}

impl Fatal {
    pub fn from_raw(raw: u32) -> Option<Self> {
        [
            Self::TooDeep,
            Self::Window,
            Self::DoubleFault,
            Self::PageTable,
            Self::OutOfSlots,
            Self::OutOfMemory,
            Self::Vector,
            Self::HandlerFault,
            Self::Unwaited,
            Self::HandlerStack,
            Self::HookStack,
        ]
        .into_iter()
        .find(|fatal| *fatal as u32 == raw)
    }

    /// What happened and what to do, in one sentence.
    pub fn text(self) -> &'static str {
        match self {
            Self::TooDeep => "exceptions nested deeper than the 8 handler stacks: a handler must not cause the exception that it handles",
            Self::Window => "exception in libdune's own entry code or on its interrupt stack: the loaded page table must map libdune's memory, and a handler's frame must hold a canonical RIP and valid selectors",
            Self::DoubleFault => "double fault: the IDT, GDT or interrupt stack was damaged or unmapped",
            Self::PageTable => "page fault that only the guest's own page table caused, and no handler took it: set a #PF handler or give the page its permissions back",
            Self::OutOfSlots => "no GPA slot is left for the 1 GiB at this address: the process uses more 1 GiB pieces than the GPA width has slots",
            Self::OutOfMemory => "no memory for a page-table page, or no frame for the copy of a page",
            Self::Vector => "no handler for this vector, and Linux has no signal for it",
            Self::HandlerFault => "exception inside a handler, and no handler took it",
            Self::Unwaited => "a signal, or an exception that no handler took, at CPL3 that no UserContext runs: nothing outside Dune mode keeps that code apart",
            Self::HandlerStack => "an exception handler overflowed its stack of 60 KiB",
            Self::HookStack => "a hook of system calls overflowed its stack of 32 KiB",
        }
    }
}

/// Calls the handler of page faults, which is there.
///
/// Not plain "C": a handler must not unwind anyway, and so this is one jump.
pub(super) unsafe extern "C-unwind" fn dune_trap_plain(frame: *mut TrapFrame, block: *const Block) -> Outcome {
    // SAFETY: The stub passes its frame and the block, which begins with what a `Thread` is. Only the thread itself takes a
    // handler away, and only functions of this type are stored.
    unsafe {
        let handler = (*block).handlers[Vector::PF.0 as usize].load(Relaxed);
        let handler = core::mem::transmute::<usize, Handler>(handler);
        handler(&mut *frame, &*block.cast::<Thread<'_>>())
    }
}

/// A signal waits for the end of a trap. Returns as `dune_trap_dispatch`.
pub(super) unsafe extern "C" fn dune_trap_signalled(frame: *mut TrapFrame, block: *const Block) -> u32 {
    // SAFETY: The stub's.
    let (frame, block) = unsafe { (&mut *frame, &*block) };
    if block.signal.load(Relaxed) != 0 && !cpl3::is_crossing(frame.rip, frame.r11) {
        block.signal.store(0, Relaxed);
        return CALL_SIGNAL;
    }
    0
}

/// Decides about an exception. Returns 0 to go on with the frame, or the number of a private VMCALL.
pub(super) unsafe extern "C" fn dune_trap_dispatch(frame: *mut TrapFrame, block: *const Block) -> u32 {
    // SAFETY: The stub passes its frame, which nobody else uses, and the block.
    let answer = unsafe {
        let frame = &mut *frame;
        let answer = dispatch(frame, &*block);
        if frame.is_cpl3() {
            // A handler may go on at CPL3 with the flags of CPL0, by which the system-call stub knows CPL0.
            frame.rflags &= !IOPL_CPL0;
        }
        answer
    };
    match answer {
        // SAFETY: As above.
        0 => unsafe { dune_trap_signalled(frame, block) },
        call => call,
    }
}

fn dispatch(frame: &mut TrapFrame, block: &Block) -> u32 {
    let fatal = |reason: Fatal| {
        block.fatal.store(reason as u32, Relaxed);
        block.reporting.store(1, Relaxed);
        forbid_plain(block);
        CALL_FATAL
    };
    if block.reporting.load(Relaxed) != 0 {
        return CALL_FATAL;
    }
    if let Some(stack) = overflow(frame, block) {
        return fatal(stack);
    }
    match frame.level as u32 {
        LEVEL_TOO_DEEP => return fatal(Fatal::TooDeep),
        LEVEL_WINDOW => return fatal(Fatal::Window),
        LEVEL_DOUBLE_FAULT => return fatal(Fatal::DoubleFault),
        _ => {}
    }
    let (start, end) = stub::stubs();
    if (start..end).contains(&frame.rip) && !frame.is_cpl3() {
        return fatal(Fatal::Window);
    }
    if frame.vector() == Vector::PF {
        match fill_leaf(frame, block).and_then(|filled| Ok(filled || copied_on_write(frame, block)?)) {
            Ok(true) => return 0,
            Ok(false) if !frame.is_cpl3() && vsyscall(frame) => return 0,
            Ok(false) => {}
            // The access is made again, as Linux has it where a page fault finds no memory; where one of its own does, in the
            // middle of a call, that is EFAULT.
            Err(PagingError::MapSlot {
                errno: libc::ENOMEM | libc::EFAULT,
                ..
            }) => return 0,
            Err(error) => {
                let reason = match error {
                    PagingError::OutOfSlots(_) => Fatal::OutOfSlots,
                    PagingError::OutOfMemory(_) | PagingError::OutOfFrames => Fatal::OutOfMemory,
                    _ => Fatal::PageTable,
                };
                return fatal(reason);
            }
        }
    }
    if frame.vector() == Vector::PF && !frame.is_cpl3() {
        const WRITE: u64 = PageFaultErrorCode::CAUSED_BY_WRITE.bits();
        if let Some(recovery) = cpl3::recovery(frame.rip, frame.error_code & WRITE != 0, frame.r9) {
            frame.rip = recovery;
            return 0;
        }
    }
    if cpl3::is_crossing(frame.rip, frame.r11) && !frame.is_cpl3() {
        // No handler of the program's without its segment bases.
        return fatal(Fatal::Window);
    }
    if scope::handle(frame, block) == Outcome::Resume {
        return 0;
    }
    let handler = block.handlers[frame.vector as usize & 0xff].load(Relaxed);
    if handler != 0 {
        // SAFETY: Only `set_exception_handler` writes the table, and only functions of this type.
        let handler = unsafe { core::mem::transmute::<usize, Handler>(handler) };
        // SAFETY: The block lives as long as the thread is in Dune mode.
        let thread = unsafe { Thread::new(block) };
        if handler(frame, &thread) == Outcome::Resume {
            return 0;
        }
    }
    if escape::leave(frame, block) {
        return 0;
    }
    CALL_EXCEPTION
}

/// Which of libdune's stacks the program's code has overflowed: the access is to the guard page of the one that it is on. No
/// handler is asked: it would stand on the next one, and may be what overflows.
fn overflow(frame: &TrapFrame, block: &Block) -> Option<Fatal> {
    let offset = |address: u64| address.wrapping_sub(ptr::from_ref(block) as u64);
    let guard = offset(frame.cr2) & !(PAGE_BYTES - 1);
    let (stack, top) = match guard as usize {
        layout::HOOK_GUARD => (Fatal::HookStack, layout::HOOK_TOP as u64),
        at @ layout::HANDLERS..layout::AREA_BYTES if at % layout::HANDLER_BYTES == 0 => {
            (Fatal::HandlerStack, guard + layout::HANDLER_BYTES as u64)
        }
        _ => return None,
    };
    let is_on_it = (guard..=top).contains(&offset(frame.rsp));
    (frame.vector() == Vector::PF && !frame.is_cpl3() && is_on_it).then_some(stack)
}

/// Fills in the leaf of a GiB that is used for the first time.
fn fill_leaf(frame: &TrapFrame, block: &Block) -> Result<bool, PagingError> {
    const PRESENT: u64 = PageFaultErrorCode::PROTECTION_VIOLATION.bits();
    if frame.error_code & (PRESENT | PAGE_FAULT_HOST_REFUSED) != 0 || frame.cr2 >= USER_END {
        return Ok(false);
    }
    let (Some(gva), Some(root)) = (Gva::new(frame.cr2), Gpa::new(loaded_root())) else {
        return Ok(false);
    };
    match fill(&block.process().memory, root, gva) {
        // A table that the program made and loaded by itself.
        Err(PagingError::Corrupt(_)) => Ok(false),
        filled => filled,
    }
}

/// Settles a write to a page that is copied on write.
fn copied_on_write(frame: &TrapFrame, block: &Block) -> Result<bool, PagingError> {
    const PRESENT_WRITE: u64 =
        PageFaultErrorCode::PROTECTION_VIOLATION.bits() | PageFaultErrorCode::CAUSED_BY_WRITE.bits();
    const USER: u64 = PageFaultErrorCode::USER_MODE.bits();
    match Gva::new(frame.cr2) {
        Some(gva) if frame.error_code & !USER == PRESENT_WRITE && has_copies(block.process(), &block.here) => {
            settle_write(block.process(), &block.here, gva, frame.error_code & USER != 0)
        }
        _ => Ok(false),
    }
}

/// Makes the call where the program has called into the vsyscall page, which Linux emulates for ordinary processes.
fn vsyscall(frame: &mut TrapFrame) -> bool {
    const PAGE: u64 = 0xffff_ffff_ff60_0000;
    const CALLS: [i64; 3] = [libc::SYS_gettimeofday, libc::SYS_time, libc::SYS_getcpu];
    const BYTES_PER_CALL: u64 = 1024;
    let Some(offset) = frame.rip.checked_sub(PAGE) else {
        return false;
    };
    if frame.cr2 != frame.rip || offset % BYTES_PER_CALL != 0 {
        return false;
    }
    let Some(call) = CALLS.get((offset / BYTES_PER_CALL) as usize) else {
        return false;
    };
    // SAFETY: The program's call with the program's arguments, returning as its RET would. A bad stack gives an
    // exception at this level's handler stack, as a RET there would.
    unsafe {
        frame.rax = sys::raw(*call, [frame.rdi, frame.rsi, frame.rdx, 0, 0, 0]) as u64;
        frame.rip = (frame.rsp as *const u64).read_volatile();
    }
    frame.rsp += 8;
    true
}

/// Changes the frame so that Linux raises the exception's signal, from the same instruction executed outside Dune mode.
///
/// Only where the instruction would do the same there.
pub(crate) fn prepare_native(frame: &mut TrapFrame) -> Result<(), Fatal> {
    if frame.level > 0 {
        return Err(Fatal::HandlerFault);
    }
    match frame.vector() {
        // The breakpoint instructions are behind us: go back to them. An int3 of two bytes (CD 03) is not met.
        Vector::BP => frame.rip = frame.rip.wrapping_sub(1),
        Vector::PF if frame.error_code & PAGE_FAULT_HOST_REFUSED == 0 && frame.cr2 < USER_END => {
            return Err(Fatal::PageTable);
        }
        Vector::DE
        | Vector::DB
        | Vector::BR
        | Vector::UD
        | Vector::NM
        | Vector::NP
        | Vector::SS
        | Vector::GP
        | Vector::PF
        | Vector::MF
        | Vector::AC
        | Vector::XM => {}
        _ => return Err(Fatal::Vector),
    }
    Ok(())
}
