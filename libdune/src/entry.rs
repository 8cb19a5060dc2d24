// SPDX-License-Identifier: MIT OR Apache-2.0

//! Entering and leaving Dune mode.
//!
//! # Life of an entry
//!
//! 1. Open the device, make a vCPU, map its run page (`device`).
//! 2. Reserve the arena (`arena`, `layout`) and build the block: GDT, TSS, IDT, tables (`percpu`).
//! 3. Build a page table with leaves for what the first instructions and the first exception need; every other GiB
//!    follows when it is used (`paging`, `trap`). Nothing here grows with the address space.
//! 4. Take SIGSEGV and SIGBUS (`host_loop/signal`), fill in the system registers.
//! 5. `enter_guest` puts the caller's registers into the run page, goes over to the host stack and runs the loop.
//! 6. The vCPU starts where `enter_guest` was called, at CPL0, as if it had returned 0.
//!
//! # Safety
//!
//! The arena, the run page and the fd outlive the vCPU: `leave` destroys it before they go. What the first
//! instructions at CPL0 touch is mapped before they run.

use core::arch::x86_64::__cpuid;
use core::arch::x86_64::__cpuid_count;
use core::marker::PhantomData;
use core::mem;
use core::ptr;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::AtomicUsize;
use core::sync::atomic::Ordering::Relaxed;

use dune_abi::Counters;
use dune_abi::Info;
use dune_abi::RunPage;
use dune_abi::Segment;
use dune_abi::Sregs;
use dune_abi::CAP_GUEST_1G;
use dune_abi::DIRTY_RIP;
use dune_abi::DIRTY_SREGS;

use crate::addr::Gpa;
use crate::addr::Gva;
use crate::arena::Arena;
use crate::device::Device;
use crate::device::Vcpu;
use crate::error::Error;
use crate::error::Result;
use crate::host_loop;
use crate::host_loop::HostContext;
use crate::layout;
use crate::owner::Owner;
use crate::owner::Taken;
use crate::paging;
use crate::paging::is_cpl0;
use crate::paging::memory::Memory;
use crate::paging::AddressSpace;
use crate::percpu;
use crate::percpu::Block;
use crate::percpu::Gdt;
use crate::percpu::Idt;
use crate::percpu::Tss;
use crate::sys;
use crate::syscall;
use crate::trap;
use crate::trap::Handler;
use crate::trap::Thread;
use crate::trap::Vector;

/// Memory around libdune's code and data that is mapped before the first exception: it and what it calls.
const SURROUNDINGS: u64 = 128 << 20;

/// Options for entering Dune mode.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Builder {}

impl Builder {
    /// Turns the calling thread into a Dune thread: it goes on behind this call at CPL0 of VMX non-root mode, on the
    /// same stack, with the same memory, TLS and FPU state.
    ///
    /// # Errors
    ///
    /// See [`Error`]; the thread then is as it was before.
    pub fn enter(self) -> Result<Dune> {
        enter()
    }
}

/// The calling thread's Dune mode. Dropping it leaves Dune mode.
///
/// A thread falls out of Dune mode early when an exception that no handler takes is given to Linux as a signal, and
/// a child of fork never is in it: [`Dune::is_active`] says so, and all methods are harmless then.
#[derive(Debug)]
pub struct Dune {
    parts: mem::ManuallyDrop<Parts>,
    owner: Owner,
    _not_send: PhantomData<*mut ()>,
}

/// What Dune mode consists of, in the order in which it is taken down.
struct Parts {
    vcpu: Vcpu,
    context: *mut HostContext,
    block: *const Block,
    arena: Arena,
    device: Device,
}

impl core::fmt::Debug for Parts {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Parts")
            .field("vcpu", &self.vcpu.number)
            .finish_non_exhaustive()
    }
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

    /// Whether the calling thread is in Dune mode.
    pub fn is_active() -> bool {
        is_cpl0()
    }

    /// Leaves Dune mode: the thread goes on behind this call as an ordinary thread.
    pub fn leave(self) {}

    /// Number of the vCPU among those of this process.
    pub fn vcpu(&self) -> u32 {
        self.parts.vcpu.number
    }

    /// What the module said about itself.
    pub fn info(&self) -> &Info {
        &self.parts.device.info
    }

    /// What the vCPU did so far; reading it costs no exit. All 0 outside Dune mode.
    pub fn counters(&self) -> Counters {
        if is_cpl0() {
            self.thread().counters()
        } else {
            // SAFETY: Plain numbers.
            unsafe { mem::zeroed() }
        }
    }

    /// The page table that the thread started with.
    pub fn address_space(&self) -> AddressSpace<'_> {
        self.thread().address_space()
    }

    /// Calls `handler` for exceptions with this vector from now on, and returns the one before.
    ///
    /// See [`Handler`] for what it may do. The page faults by which libdune fills in the page table do not come to it.
    pub fn set_exception_handler(&self, vector: Vector, handler: Handler) -> Option<Handler> {
        self.replace_handler(vector, handler as usize)
    }

    /// Goes back to the default for exceptions with this vector.
    pub fn clear_exception_handler(&self, vector: Vector) -> Option<Handler> {
        self.replace_handler(vector, 0)
    }

    fn replace_handler(&self, vector: Vector, new: usize) -> Option<Handler> {
        // SAFETY: The block lives as long as this.
        let old = unsafe { &(*self.parts.block).handlers[usize::from(vector.0)] }.swap(new, Relaxed);
        // SAFETY: Only functions of this type are stored.
        (old != 0).then(|| unsafe { mem::transmute::<usize, Handler>(old) })
    }

    fn thread(&self) -> Thread<'_> {
        // SAFETY: The block lives as long as this.
        unsafe { Thread::new(self.parts.block) }
    }
}

impl Drop for Dune {
    fn drop(&mut self) {
        if is_cpl0() {
            // SAFETY: In Dune mode by libdune's loop; behind this the thread is outside.
            unsafe { host_loop::leave_guest() };
        } else if !self.owner.is_callers() {
            // A child, which has no vCPU and may share our memory with its parent: everything stays.
            return;
        }
        // SAFETY: Taken once; the thread is outside Dune mode and not on a stack of the arena.
        let parts = unsafe { mem::ManuallyDrop::take(&mut self.parts) };
        // SAFETY: The context lives in the arena.
        let left = unsafe { (*parts.context).left };
        if left {
            parts.vcpu.unmap();
        } else {
            // A native signal handler jumped out of the host loop: the vCPU still is there.
            // SAFETY: The context of `install_signals`.
            unsafe { host_loop::restore_signals(parts.context) };
            drop(parts.vcpu);
        }
        drop(parts.arena);
        drop(parts.device);
        self.owner.release();
    }
}

/// Claims Dune mode for the calling thread.
fn claim() -> Result<Claim> {
    if is_cpl0() {
        return Err(Error::AlreadyInside);
    }
    match Owner::claim() {
        Ok(owner) => Ok(Claim(owner)),
        Err(Taken::ByCaller) => Err(Error::AlreadyInside),
        Err(Taken::ByThread(tid)) => Err(Error::SecondThread { tid }),
    }
}

/// Gives the claim back where entering fails.
struct Claim(Owner);

impl Drop for Claim {
    fn drop(&mut self) {
        self.0.release();
    }
}

fn enter() -> Result<Dune> {
    let claim = claim()?;
    let device = Device::open()?;
    let vcpu = device.create_vcpu()?;
    let arena = Arena::new().map_err(|errno| Error::at("mmap of the thread's memory", errno.0))?;
    let fpu = Fpu::ask();
    let block = build_block(&arena, &device, &vcpu, &fpu)?;
    // SAFETY: Built a moment ago, in the arena.
    let sregs = sregs(&device.info, unsafe { &*block })?;
    // SAFETY: The run page is mapped and nothing runs.
    unsafe {
        (&raw mut (*vcpu.run).sregs).write_volatile(sregs);
        (&raw mut (*vcpu.run).dirty).write_volatile(DIRTY_RIP | DIRTY_SREGS);
    }
    let context = build_context(&arena, &device, &vcpu, &fpu, block, claim.0);
    // SAFETY: The context lives in the arena until `restore_signals`.
    unsafe { host_loop::install_signals(context) }.map_err(|errno| Error::at("rt_sigaction", errno.0))?;
    // SAFETY: Everything that the loop and the first instructions of the guest need is there.
    let result = unsafe { host_loop::enter_guest(context) };
    if result != 0 {
        // SAFETY: The context given to `install_signals`.
        unsafe { host_loop::restore_signals(context) };
        return Err(first_run_error(result, vcpu.run));
    }
    // From here on at CPL0.
    let owner = claim.0;
    mem::forget(claim);
    let parts = Parts {
        vcpu,
        context,
        block,
        arena,
        device,
    };
    Ok(Dune {
        parts: mem::ManuallyDrop::new(parts),
        owner,
        _not_send: PhantomData,
    })
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

/// How the FPU state is saved.
struct Fpu {
    has_xsave: bool,
    bytes: u64,
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
        }
    }
}

/// Room for the FPU state in the host context's part of the arena, and on a handler stack.
const FPU_OFFSET: usize = size_of::<HostContext>().next_multiple_of(64);

fn build_block(arena: &Arena, device: &Device, vcpu: &Vcpu, fpu: &Fpu) -> Result<*const Block> {
    if fpu.bytes as usize > layout::HOST_GUARD - layout::HOST - FPU_OFFSET || fpu.bytes > 0x8000 {
        return Err(Error::at("room for the FPU state", libc::ENOMEM));
    }
    let block = arena.at(0) as *mut Block;
    let has_1g = device.info.capabilities & CAP_GUEST_1G != 0;
    // SAFETY: A fresh arena, that lives as long as what is built here; fields are written in place.
    let block = unsafe {
        let mut special = [0; 512];
        host_loop::fill_special_table(&mut special);
        let tss = &raw const (*block).tss as u64;
        block.write(Block {
            special,
            fpu_bytes: fpu.bytes,
            has_xsave: u64::from(fpu.has_xsave),
            fatal: AtomicU32::new(0),
            reporting: AtomicU32::new(0),
            fatal_detail: AtomicU64::new(0),
            run: vcpu.run,
            memory: Memory::new(device.fd(), has_1g, arena.at(0)),
            root: Gpa::default(),
            handlers: [const { AtomicUsize::new(0) }; 256],
            gdt: Gdt::new(tss),
            tss: Tss::new(arena.at(layout::IST_TOP), arena.at(layout::DOUBLE_TOP)),
            idt: Idt::new(trap::stubs().0),
        });
        (*block).root = paging::new_root(&(*block).memory)?;
        &*block
    };
    let here = 0u8;
    let stack = &raw const here as u64;
    for address in [arena.at(0), vcpu.run as u64, stack, stack.saturating_sub(1 << 20)] {
        premap(block, address)?;
    }
    // What trap entry and handlers run on: libdune's code and data, and what the compiler calls behind our back.
    let memory_functions: [*const (); 3] = [
        libc::memcpy as *const (),
        libc::memset as *const (),
        libc::memmove as *const (),
    ];
    let anchors = [trap::ANCHOR, trap::stubs().0 as *const (), HostContext::anchor()];
    for anchor in anchors.into_iter().chain(memory_functions) {
        premap(block, (anchor as u64).saturating_sub(SURROUNDINGS))?;
        premap(block, (anchor as u64).saturating_add(SURROUNDINGS))?;
    }
    Ok(block)
}

fn premap(block: &Block, address: u64) -> Result<()> {
    if let Some(gva) = Gva::new(address) {
        paging::fill(&block.memory, block.root, gva)?;
    }
    Ok(())
}

fn build_context(
    arena: &Arena,
    device: &Device,
    vcpu: &Vcpu,
    fpu: &Fpu,
    block: *const Block,
    owner: Owner,
) -> *mut HostContext {
    let context = arena.at(layout::HOST) as *mut HostContext;
    // SAFETY: The arena's zeroed memory is a valid context; each field is written once.
    unsafe {
        (*context).run = vcpu.run;
        (*context).block = block;
        (*context).stack_top = arena.at(layout::HOST_STACK_TOP);
        (*context).fd = device.fd() as u64;
        (*context).vcpu = u64::from(vcpu.number);
        (*context).has_xsave = u64::from(fpu.has_xsave);
        (*context).fpu = arena.at(layout::HOST + FPU_OFFSET);
        (*context).tid = sys::gettid();
        (*context).owner = owner;
    }
    context
}

/// VMX access rights (SDM, "Guest Register State").
const CODE_64: u32 = 0xa09b;
const DATA: u32 = 0xc093;
const TSS_BUSY: u32 = 0x8b;
const UNUSABLE: u32 = 1 << 16;

fn sregs(info: &Info, block: &Block) -> Result<Sregs> {
    let (fs, gs) = sys::segment_bases().map_err(|errno| Error::at("arch_prctl", errno.0))?;
    let flat = |selector, access_rights, base| Segment {
        base,
        limit: u32::MAX,
        access_rights,
        selector,
        ..Segment::default()
    };
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
    Ok(Sregs {
        cr0: info.cr0,
        cr3: block.root.as_u64(),
        cr4: info.cr4,
        efer: info.efer,
        es: unusable,
        cs: flat(percpu::KERNEL_CS, CODE_64, 0),
        ss: flat(percpu::KERNEL_DS, DATA, 0),
        ds: unusable,
        fs: flat(0, DATA, fs),
        gs: flat(0, DATA, gs),
        ldtr: unusable,
        tr: tss,
        gdtr_base: ptr::from_ref(&block.gdt) as u64,
        idtr_base: ptr::from_ref(&block.idt) as u64,
        gdtr_limit: size_of::<Gdt>() as u32 - 1,
        idtr_limit: size_of::<Idt>() as u32 - 1,
        lstar: syscall::entry(),
        syscall_vmcall: syscall::vmcall(),
    })
}
