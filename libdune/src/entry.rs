// SPDX-License-Identifier: MIT OR Apache-2.0

//! Entering and leaving Dune mode.
//!
//! # Life of an entry
//!
//! 1. The first Dune thread of the process opens the device, reserves the arena (`process`, `layout`), takes SIGSEGV
//!    and SIGBUS (`host_loop/signal`) and builds a page table with leaves for what the first instructions and the first
//!    exception need; every other GiB follows when it is used (`paging`, `trap`). Nothing here grows with the address
//!    space.
//! 2. Each takes an area of the arena, builds its block there: GDT, TSS, IDT (`percpu`), and makes a vCPU (`device`).
//! 3. `enter_guest` puts the caller's registers into the run page, goes over to the host stack and runs the loop.
//! 4. The vCPU starts where `enter_guest` was called, at CPL0, as if it had returned 0.
//!
//! # Safety
//!
//! Area, run page and fd outlive the vCPU: `leave` destroys it before they go. What the first instructions at CPL0
//! touch is mapped before they run.

use core::arch::x86_64::__cpuid;
use core::arch::x86_64::__cpuid_count;
use core::mem;
use core::ptr;
use core::sync::atomic::Ordering::Relaxed;

use dune_abi::Counters;
use dune_abi::Info;
use dune_abi::RunPage;
use dune_abi::Segment;
use dune_abi::Sregs;
use dune_abi::DIRTY_RIP;
use dune_abi::DIRTY_SREGS;

use crate::addr::Gva;
use crate::device;
use crate::device::Device;
use crate::device::Vcpu;
use crate::dispatch;
use crate::dispatch::Settings;
use crate::error::Error;
use crate::error::Result;
use crate::hook;
use crate::host_loop;
use crate::host_loop::HostContext;
use crate::layout;
use crate::paging;
use crate::paging::is_cpl0;
use crate::paging::tables::DEFAULT;
use crate::paging::AddressSpace;
use crate::paging::PageTable;
use crate::paging::PagingError;
use crate::percpu;
use crate::percpu::Block;
use crate::percpu::Gdt;
use crate::percpu::Idt;
use crate::process;
use crate::process::Fpu;
use crate::process::Process;
use crate::sys;
use crate::sys::AltStack;
use crate::sys::Errno;
use crate::trap;
use crate::trap::Handler;
use crate::trap::Thread;
use crate::trap::Vector;

/// Memory around libdune's code and data that is mapped before the first exception: it and what it calls.
const SURROUNDINGS: u64 = 128 << 20;

/// Options for entering Dune mode. Those of the thread that enters first count for the whole process.
///
/// # Examples
///
/// ```no_run
/// use libdune::{Builder, Dune};
///
/// let options: Builder = Dune::builder().threads(false).children(false);
/// // The default: CPL0 does not use CPL3's pages by accident.
/// let dune = options.protection_from_cpl3(true).enter()?;
/// let inside = std::thread::spawn(Dune::is_active).join();
/// assert_eq!(inside.ok(), Some(false));
/// assert!(Dune::is_active());
/// // SAFETY: The child ends at once, and the status is the caller's.
/// unsafe {
///     let child = libc::fork();
///     if child == 0 {
///         libc::_exit(i32::from(Dune::is_active()));
///     }
///     let mut status = 1;
///     assert_eq!(libc::waitpid(child, &mut status, 0), child);
///     assert_eq!(status, 0);
/// }
/// # Ok::<(), libdune::Error>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Builder {
    threads: bool,
    children: bool,
    protection: bool,
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            threads: true,
            children: true,
            protection: true,
        }
    }
}

impl Builder {
    /// Whether threads that are made in Dune mode (std::thread, pthreads, clone) are in Dune mode from their first
    /// instruction; they are unless this says otherwise.
    pub fn threads(mut self, in_dune_mode: bool) -> Self {
        self.threads = in_dune_mode;
        self
    }

    /// The same for children: fork, vfork, posix_spawn. A program that a child executes starts outside Dune mode.
    pub fn children(mut self, in_dune_mode: bool) -> Self {
        self.children = in_dune_mode;
        self
    }

    /// Whether CPL0 is kept from executing pages that CPL3 may use (SMEP) and from touching them by accident (SMAP), where
    /// the CPU can; it is unless this says otherwise.
    pub fn protection_from_cpl3(mut self, is_on: bool) -> Self {
        self.protection = is_on;
        self
    }

    /// Turns the calling thread into a Dune thread: it goes on behind this call at CPL0 of VMX non-root mode, on the
    /// same stack, with the same memory, TLS and FPU state.
    ///
    /// # Errors
    ///
    /// See [`Error`]; the thread then is as it was before.
    pub fn enter(self) -> Result<Dune> {
        enter(&self)
    }
}

/// The calling thread's Dune mode. Dropping it leaves Dune mode.
///
/// A thread falls out of Dune mode early when an exception that no handler takes is given to Linux as a signal:
/// [`Dune::is_active`] says so, and all methods are harmless then.
///
/// It is the token for what only a thread in Dune mode can do: neither `Send` nor `Sync`, and what it lends
/// ([`Dune::thread`], [`Dune::address_space`]) ends with it.
///
/// # Examples
///
/// ```no_run
/// use libdune::{Dune, Outcome, Vector};
///
/// let dune = Dune::enter()?;
/// // Skips INT3, which is behind the frame's RIP already.
/// dune.set_exception_handler(Vector::BP, |_, _| Outcome::Resume);
/// unsafe { core::arch::asm!("int3") };
///
/// let before = dune.counters();
/// dune.set_exception_handler(Vector::UD, |frame, _| {
///     frame.rip += 2; // UD2
///     Outcome::Resume
/// });
/// unsafe { core::arch::asm!("ud2") };
/// // No exception left Dune mode (basic exit reason 0).
/// assert_eq!(dune.counters().exits[0], before.exits[0]);
/// assert!(dune.clear_exception_handler(Vector::UD).is_some());
/// assert!(dune.vcpu() < dune.info().max_vcpus);
///
/// dune.leave();
/// assert!(!Dune::is_active());
/// # Ok::<(), libdune::Error>(())
/// ```
#[derive(Debug)]
pub struct Dune {
    /// Also what keeps it from being `Send` and `Sync`.
    context: *mut HostContext,
    /// The process' in whose memory `context` lies.
    process: *const Process,
    info: Info,
}

impl Dune {
    /// Enters Dune mode with default options. See [`Builder::enter`].
    ///
    /// # Errors
    ///
    /// See [`Error`]; the thread then is as it was before.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// let dune = libdune::Dune::enter()?;
    /// println!("at CPL0: {}", libdune::Dune::is_active());
    /// dune.leave();
    /// # Ok::<(), libdune::Error>(())
    /// ```
    pub fn enter() -> Result<Self> {
        Self::builder().enter()
    }

    /// Options for entering.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Whether the calling thread is in Dune mode. Right everywhere: in other threads, in children, in signal handlers. It
    /// reads CS and costs a few instructions.
    pub fn is_active() -> bool {
        is_cpl0()
    }

    /// Leaves Dune mode: the thread goes on behind this call as an ordinary thread.
    pub fn leave(self) {}

    /// Number of the vCPU among those of this process, from 0.
    pub fn vcpu(&self) -> u32 {
        self.thread().vcpu()
    }

    /// What the module said about itself when the process entered Dune mode.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// What the vCPU did so far: exits by basic exit reason, and more. Reading it costs no exit. All 0 outside Dune mode.
    pub fn counters(&self) -> Counters {
        if is_cpl0() {
            self.thread().counters()
        } else {
            // SAFETY: Plain numbers.
            unsafe { mem::zeroed() }
        }
    }

    /// The default page table of the process, with which its first Dune thread started.
    pub fn address_space(&self) -> AddressSpace<'_> {
        self.thread().address_space()
    }

    /// A page table of the program's own: see [`Thread::new_page_table`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn new_page_table(&self) -> core::result::Result<PageTable, PagingError> {
        self.thread().new_page_table()
    }

    /// Makes the calling thread use a page table: see [`Thread::load`].
    ///
    /// # Safety
    ///
    /// As there.
    #[inline(always)]
    pub unsafe fn load(&self, table: &AddressSpace<'_>) {
        // SAFETY: The caller's.
        unsafe { self.thread().load(table) };
    }

    /// Calls `handler` for exceptions of this thread with this vector from now on, and returns the one before: see
    /// [`Thread::set_exception_handler`].
    pub fn set_exception_handler(&self, vector: Vector, handler: Handler) -> Option<Handler> {
        self.thread().set_exception_handler(vector, handler)
    }

    /// Goes back to the default for this vector, and returns the handler: see [`Thread::clear_exception_handler`].
    pub fn clear_exception_handler(&self, vector: Vector) -> Option<Handler> {
        self.thread().clear_exception_handler(vector)
    }

    /// The calling thread as a handler sees it: what a function needs that does something privileged.
    pub fn thread(&self) -> Thread<'_> {
        // SAFETY: The block lives as long as this.
        unsafe { Thread::new((*self.context).block) }
    }
}

impl Drop for Dune {
    fn drop(&mut self) {
        if is_cpl0() {
            // SAFETY: In Dune mode the context, the block and the process are there.
            let (block, process) = unsafe { (&*(*self.context).block, &*self.process) };
            let here = 0u8;
            if block.is_lent() || process.area_of(&raw const here as u64).is_some() {
                // What has the token, or the stack that this runs on, would be left without its memory.
                eprintln!("dune: fatal: a thread leaves Dune mode in a handler or in Thread::with_current");
                std::process::abort();
            }
            // SAFETY: In Dune mode by libdune's loop; behind this the thread is outside.
            unsafe { host_loop::leave_guest() };
        } else if process::find() != Some(self.process) {
            // A child outside Dune mode: the memory is a copy that nobody uses.
            return;
        }
        // SAFETY: The process of this token is here, so the context is alive. The thread is outside Dune mode and not on
        // a stack of the area.
        unsafe {
            let context = &mut *self.context;
            if context.tid != sys::gettid() {
                // A child outside Dune mode that shares the memory with its maker: everything stays.
                return;
            }
            if !context.left {
                // A native signal handler jumped out of the host loop: the vCPU still is there.
                let _ = sys::request(context.fd as i32, dune_abi::DUNE_DESTROY_VCPU, context.vcpu);
            }
            let _ = sys::munmap(context.run as u64, dune_abi::RUN_PAGE_BYTES);
            drop(Area {
                process: self.process,
                start: context.area(),
            });
        }
    }
}

/// An area of a thread that is counted in.
struct Area {
    process: *const Process,
    start: u64,
}

impl Area {
    /// Counts the calling thread in and takes an area.
    fn new(options: &Builder) -> Result<Self> {
        let process = process::join(|arena| build_process(arena, options))?;
        // SAFETY: Counted in.
        match unsafe { (*process).take_area() } {
            Ok(start) => Ok(Self { process, start }),
            Err(errno) => {
                // SAFETY: Counted in above.
                unsafe { leave_process(process) };
                Err(match errno.0 {
                    libc::ENOSPC => Error::OutOfVcpus {
                        max: layout::AREA_COUNT as u32,
                    },
                    errno => Error::at("mprotect of the thread's memory", errno),
                })
            }
        }
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: The area's thread is outside Dune mode, and counted in.
        unsafe {
            paging::forget_thread(&*self.process, &(*(self.start as *const Block)).here);
            (*self.process).give_area(self.start);
            leave_process(self.process);
        }
    }
}

/// Counts the calling thread out.
///
/// # Safety
///
/// It must be counted in, and use nothing of the arena.
pub(crate) unsafe fn leave_process(process: *const Process) {
    // SAFETY: The caller's; the last one unmaps.
    unsafe {
        let start = (*process).start;
        if process::part(process, None, give_back) {
            let _ = sys::munmap(start, layout::ARENA_BYTES);
        }
    }
}

/// Gives back what the process had for its Dune threads, but for the arena.
pub(crate) fn give_back(process: &Process) {
    host_loop::restore_signals();
    sys::close(process.fd);
}

fn enter(options: &Builder) -> Result<Dune> {
    if is_cpl0() {
        return Err(Error::AlreadyInside);
    }
    let area = Area::new(options)?;
    // SAFETY: Counted in by `area`.
    let shared = unsafe { &*area.process };
    // Whoever took it from us meanwhile: a program that set an action while no thread was in Dune mode.
    host_loop::install_signals().map_err(|errno| Error::at("rt_sigaction", errno.0))?;
    let dispatch = if host_loop::has_handler(libc::SIGSYS) {
        dispatch::of_this_thread()?
    } else {
        Settings::OFF
    };
    // SAFETY: A fresh area.
    let (block, context) = unsafe {
        (
            Block::write(area.start, area.process, DEFAULT, None),
            HostContext::write(area.start, area.process),
        )
    };
    // SAFETY: Built a moment ago.
    let sregs = sregs(shared, unsafe { &*block })?;
    let here = 0u8;
    let stack = &raw const here as u64;
    for address in [stack, stack.saturating_sub(1 << 20)] {
        premap(shared, address)?;
    }
    let vcpu = FirstVcpu::new(shared)?;
    premap(shared, vcpu.0.run as u64)?;
    // SAFETY: The run page is mapped and nothing runs; block and context are ours.
    unsafe {
        (&raw mut (*vcpu.0.run).sregs).write_volatile(sregs);
        (&raw mut (*vcpu.0.run).dirty).write_volatile(DIRTY_RIP | DIRTY_SREGS);
        Block::set_vcpu(block, &vcpu.0);
        (*context).run = vcpu.0.run;
        (*context).set_vcpu(vcpu.0.number);
        (*context).tid = sys::gettid();
        (*context).set_dispatch(dispatch);
    }
    if dispatch.is_on() {
        Settings::OFF
            .give_to_linux()
            .map_err(|errno| Error::at("prctl(PR_SET_SYSCALL_USER_DISPATCH)", errno.0))?;
    }
    // SAFETY: The alternate stack is given back when the thread leaves; the loop must not run on it. Everything that the
    // loop and the first instructions of the guest need is there.
    let result = unsafe {
        let alternate = sys::sigaltstack(None).unwrap_or(AltStack::DISABLED);
        if alternate.is_enabled() && sys::sigaltstack(Some(&AltStack::DISABLED)).is_ok() {
            (*context).alt_stack = alternate;
        }
        host_loop::enter_guest(context)
    };
    if result != 0 {
        // SAFETY: What was taken away above.
        unsafe {
            if (*context).alt_stack.is_enabled() {
                let _ = sys::sigaltstack(Some(&(*context).alt_stack));
            }
        }
        if dispatch.is_on() {
            let _ = dispatch.give_to_linux();
        }
        return Err(first_run_error(result, vcpu.0.run));
    }
    // From here on at CPL0.
    mem::forget(vcpu);
    let process = area.process;
    mem::forget(area);
    Ok(Dune {
        context,
        process,
        info: shared.info,
    })
}

/// The vCPU until it runs.
struct FirstVcpu(Vcpu, i32);

impl FirstVcpu {
    fn new(process: &Process) -> Result<Self> {
        match device::create_vcpu(process.fd) {
            Ok(vcpu) => Ok(Self(vcpu, process.fd)),
            Err(Errno(libc::ENOSPC)) => Err(Error::OutOfVcpus {
                max: process.info.max_vcpus,
            }),
            Err(errno) => Err(Error::at_new("DUNE_CREATE_VCPU", errno.0)),
        }
    }
}

impl Drop for FirstVcpu {
    fn drop(&mut self) {
        // SAFETY: The vCPU is this thread's and does not run; the page is not used any more.
        unsafe {
            let _ = sys::request(self.1, dune_abi::DUNE_DESTROY_VCPU, u64::from(self.0.number));
            let _ = sys::munmap(self.0.run as u64, dune_abi::RUN_PAGE_BYTES);
        }
    }
}

fn first_run_error(result: i64, run: *const RunPage) -> Error {
    if result == host_loop::FAILED_ENTRY {
        // SAFETY: The run page is mapped.
        let exit = unsafe { (&raw const (*run).exit).read_volatile() };
        Error::EntryFailed {
            reason: exit.reason,
            qualification: exit.qualification,
            instruction_error: exit.instruction_error,
        }
    } else {
        Error::at("DUNE_RUN", -result as i32)
    }
}

impl Fpu {
    /// Asks the CPU (SDM, "CPUID": leaf 01H bit OSXSAVE, leaf 0DH).
    #[allow(unused_unsafe)] // CPUID became safe after Rust 1.85.
    fn ask() -> Self {
        const OSXSAVE: u32 = 1 << 27;
        const FXSAVE_BYTES: u64 = 512;
        // SAFETY: Every 64-bit CPU has CPUID.
        let has_xsave = unsafe { __cpuid(1) }.ecx & OSXSAVE != 0;
        let bytes = if has_xsave {
            // SAFETY: A CPU with XSAVE has leaf 0DH.
            u64::from(unsafe { __cpuid_count(0xd, 0) }.ebx)
        } else {
            FXSAVE_BYTES
        };
        Self {
            has_xsave,
            bytes: bytes.next_multiple_of(64),
            xcr0: if has_xsave { xcr0() } else { 0 },
        }
    }
}

/// XCR0 of the process (SDM, "CPUID": leaf 0DH says what it may be at most; XGETBV says what it is).
fn xcr0() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: The CPU has OSXSAVE.
    unsafe {
        core::arch::asm!(
            "xgetbv",
            in("ecx") 0,
            out("eax") low,
            out("edx") high,
            options(nomem, nostack, preserves_flags),
        );
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Opens the device and fills a fresh arena in.
pub(crate) fn build_process(arena: u64, options: &Builder) -> Result<()> {
    let device = Device::open()?;
    let fpu = Fpu::ask();
    if fpu.bytes > layout::FPU_MAX as u64 {
        return Err(Error::at("room for the FPU state", libc::ENOMEM));
    }
    let mut special = [0; 512];
    host_loop::fill_special_table(&mut special);
    // SAFETY: A fresh arena, that lives as long as what is built here.
    let process = unsafe {
        let process = Process::write(arena, device.fd(), device.info, fpu, special);
        if !options.protection {
            (*process).cr4 &= !percpu::PROTECTION;
        }
        let number = (*process).tables().add(|| paging::new_root(&(*process).memory))?;
        debug_assert_eq!(number, DEFAULT);
        (*process).essential = essential(arena);
        &*process
    };
    process.inherit_threads.store(options.threads, Relaxed);
    process.inherit_children.store(options.children, Relaxed);
    for address in process.essential {
        premap(process, address)?;
    }
    device.into_fd();
    Ok(())
}

/// What trap entry and handlers run on: the arena, libdune's code and data, and what the compiler calls behind our back.
fn essential(arena: u64) -> [u64; process::ESSENTIAL] {
    let anchors: [*const (); 6] = [
        trap::ANCHOR,
        trap::stubs().0 as *const (),
        HostContext::anchor(),
        libc::memcpy as *const (),
        libc::memset as *const (),
        libc::memmove as *const (),
    ];
    let mut essential = [arena; process::ESSENTIAL];
    for (pair, anchor) in essential[1..].chunks_exact_mut(2).zip(anchors) {
        pair[0] = (anchor as u64).saturating_sub(SURROUNDINGS);
        pair[1] = (anchor as u64).saturating_add(SURROUNDINGS);
    }
    essential
}

fn premap(process: &Process, address: u64) -> Result<()> {
    let root = process.tables().get(DEFAULT).root();
    if let Some(gva) = Gva::new(address) {
        paging::fill(&process.memory, root, gva)?;
    }
    Ok(())
}

/// VMX access rights (SDM, "Guest Register State").
const TSS_BUSY: u32 = 0x8b;
const UNUSABLE: u32 = 1 << 16;

fn sregs(process: &Process, block: &Block) -> Result<Sregs> {
    let info = &process.info;
    let (fs, gs) = sys::segment_bases().map_err(|errno| Error::at("arch_prctl", errno.0))?;
    let unusable = Segment {
        access_rights: UNUSABLE,
        ..Segment::default()
    };
    let tss = Segment {
        base: ptr::from_ref(&block.tss) as u64,
        limit: percpu::TSS_LIMIT,
        access_rights: TSS_BUSY,
        selector: percpu::TSS,
        ..Segment::default()
    };
    Ok(percpu::at_cpl0(Sregs {
        cr0: info.cr0,
        cr3: process.tables().get(DEFAULT).cr3(DEFAULT, process.has_pcid, false),
        cr4: process.cr4,
        efer: info.efer,
        es: unusable,
        ds: unusable,
        fs: percpu::based(fs),
        gs: percpu::based(gs),
        ldtr: unusable,
        tr: tss,
        gdtr_base: ptr::from_ref(&block.gdt) as u64,
        idtr_base: ptr::from_ref(&block.idt) as u64,
        gdtr_limit: size_of::<Gdt>() as u32 - 1,
        idtr_limit: size_of::<Idt>() as u32 - 1,
        lstar: block.syscall_entry(),
        syscall_vmcall: hook::syscall_vmcall(),
        ..Sregs::default()
    }))
}
