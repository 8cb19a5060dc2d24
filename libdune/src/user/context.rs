// SPDX-License-Identifier: MIT OR Apache-2.0

//! Registers of code at CPL3, and running it.
//!
//! # Safety
//!
//! See the module above. The state areas are boxed: they stay where they are while the context moves.

use core::fmt;

use x86_64::structures::idt::PageFaultErrorCode;

use crate::abi::PAGE_FAULT_HOST_REFUSED;
use crate::cpl3;
use crate::cpl3::Frame;
use crate::cpl3::UserRegisters;
use crate::paging::is_cpl0;
use crate::percpu;
use crate::sys;
use crate::trap::Thread;
use crate::trap::Vector;

/// Why CPL3 does not run any more. Its registers are in the context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum UserExit {
    /// SYSCALL: see [`UserContext::system_call`]. RIP is behind it; RCX holds RIP and R11 RFLAGS.
    Syscall,
    /// INT 0x80, the 32-bit system call. RIP is behind it.
    Int80,
    /// An exception but a page fault; INT n of a vector that CPL3 may not raise is #GP. RIP is where the CPU says: behind
    /// INT3, INTO, INT1 and a single step, else at the instruction.
    Exception {
        /// Which.
        vector: Vector,
        /// The CPU's error code, 0 where there is none.
        error_code: u64,
    },
    /// A page fault; RIP is at the instruction.
    PageFault(PageFault),
    /// The ticks of [`UserContext::run_for`] are over. RIP is anywhere: running it again goes on.
    Timeout,
    /// The calling thread is not in Dune mode (any more): nothing ran.
    OutsideDuneMode,
}

/// An access of CPL3 that the page table, or the process' own, does not allow.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PageFault {
    /// The linear address. Not necessarily canonical memory of the process.
    pub address: u64,
    /// The CPU's error code (SDM, "Interrupt 14: Page-Fault Exception"), with libdune's bit 14. [`PageFault::code`]
    /// spells it out.
    pub error_code: u64,
}

impl PageFault {
    /// The page is there, but not for this access.
    pub fn is_present(&self) -> bool {
        self.code().contains(PageFaultErrorCode::PROTECTION_VIOLATION)
    }

    /// It was a write.
    pub fn is_write(&self) -> bool {
        self.code().contains(PageFaultErrorCode::CAUSED_BY_WRITE)
    }

    /// It was an instruction fetch.
    pub fn is_execute(&self) -> bool {
        self.code().contains(PageFaultErrorCode::INSTRUCTION_FETCH)
    }

    /// The process has no such memory or not with that access: the guest's page table is not the cause.
    pub fn host_refused(&self) -> bool {
        self.error_code & PAGE_FAULT_HOST_REFUSED != 0
    }
}

impl fmt::Debug for PageFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let access = match (self.is_execute(), self.is_write()) {
            (true, _) => "execute",
            (_, true) => "write",
            _ => "read",
        };
        let cause = match (self.host_refused(), self.is_present()) {
            (true, _) => "not the process'",
            (_, true) => "not allowed",
            _ => "not mapped",
        };
        write!(f, "PageFault({access} at {:#x}, {cause})", self.address)
    }
}

/// RFLAGS that CPL3 may have: CF PF AF ZF SF TF DF OF NT RF AC ID. IF is always set, IOPL never.
const USER_RFLAGS: u64 = 0x25_4dd5;
/// IF, and the bit that is always 1.
const USER_RFLAGS_SET: u64 = 0x202;

/// Selector of the 32-bit code segment.
const USER_CS_32: u64 = 0x23;

/// What XSAVE wants aligned.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([u8; 64]);

/// Some code at CPL3: its registers, segment bases and extended state (x87, SSE, AVX, …), which are its own.
///
/// It belongs to no thread: any Dune thread may run it, one at a time. Dropping it forgets the code's state. The
/// [module](crate::user) has an example that runs something; this one is about what comes back:
///
/// ```no_run
/// use libdune::user::{UserContext, UserExit};
/// use libdune::x86_64::structures::idt::PageFaultErrorCode;
/// use libdune::Dune;
///
/// let dune = Dune::enter()?;
/// let mut context = UserContext::new(&dune.thread());
/// // CPL3 may not use this page: it has this program's code.
/// context.registers_mut().rip = Dune::is_active as usize as u64;
/// match context.run(&dune.thread()) {
///     UserExit::PageFault(fault) => {
///         assert_eq!(fault.address, context.registers().rip);
///         assert!(fault.is_execute() && fault.is_present() && !fault.host_refused());
///         assert!(!fault.is_write());
///         assert!(fault.code().contains(PageFaultErrorCode::INSTRUCTION_FETCH));
///     }
///     exit => return Err(format!("{exit:?}").into()),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct UserContext {
    frame: Frame,
    /// Extended state of CPL3, and CPL0's while CPL3 runs.
    _states: Box<[Line]>,
}

// SAFETY: The pointers are to the boxed states, which belong to it.
unsafe impl Send for UserContext {}

impl UserContext {
    /// All registers 0, the extended state initial.
    pub fn new(thread: &Thread<'_>) -> Self {
        const MXCSR: usize = 24;
        let bytes = thread.block().fpu_bytes as usize;
        let mut states = vec![Line([0; 64]); 2 * bytes / 64].into_boxed_slice();
        let start = states.as_mut_ptr().cast::<u8>();
        // SAFETY: Inside the two areas; any bytes are a value.
        let (fpu, host_fpu) = unsafe {
            start.cast::<u16>().write(0x037f);
            start.add(MXCSR).cast::<u32>().write(0x1f80);
            (start, start.add(bytes))
        };
        Self {
            frame: Frame {
                registers: UserRegisters::default(),
                cs: percpu::USER_CS.into(),
                event: 0,
                error_code: 0,
                cr2: 0,
                fpu,
                host_fpu,
            },
            _states: states,
        }
    }

    /// The registers with which CPL3 goes on, and which it left.
    pub fn registers(&self) -> &UserRegisters {
        &self.frame.registers
    }

    /// The same, to be changed. Bits of RFLAGS that CPL3 cannot have are ignored.
    pub fn registers_mut(&mut self) -> &mut UserRegisters {
        &mut self.frame.registers
    }

    /// Whether the code runs in 32-bit mode; it may go there and back by itself.
    pub fn is_32bit(&self) -> bool {
        self.frame.cs == USER_CS_32
    }

    /// Has it go on in 32-bit mode, or in 64-bit mode, as a new context does.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use libdune::user::{UserContext, UserExit, UserRegisters};
    /// use libdune::{Dune, Gva, Permissions};
    ///
    /// # let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
    /// # let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT;
    /// # let page = unsafe { libc::mmap(core::ptr::null_mut(), 4096, protection, flags, -1, 0) };
    /// # assert_ne!(page, libc::MAP_FAILED);
    /// // mov eax, 20; int 0x80
    /// // SAFETY: `page` is a page of the program's own, below 4 GiB.
    /// unsafe { page.cast::<[u8; 7]>().write(*b"\xb8\x14\0\0\0\xcd\x80") };
    ///
    /// let dune = Dune::enter()?;
    /// let start = Gva::new(page as u64).ok_or("not canonical")?;
    /// let for_cpl3 = Permissions::USER | Permissions::EXECUTE;
    /// dune.address_space().protect(start, 4096, for_cpl3)?.flush();
    ///
    /// let mut plugin = UserContext::new(&dune.thread());
    /// plugin.set_32bit(true);
    /// plugin.registers_mut().rip = start.as_u64();
    /// match plugin.run(&dune.thread()) {
    ///     UserExit::Int80 => {
    ///         let registers: &UserRegisters = plugin.registers();
    ///         assert!(plugin.is_32bit() && registers.rax == 20);
    ///     }
    ///     exit => return Err(format!("{exit:?}").into()),
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn set_32bit(&mut self, is_32bit: bool) {
        self.frame.cs = if is_32bit { USER_CS_32 } else { percpu::USER_CS.into() };
    }

    /// Number and arguments of the system call that SYSCALL asked for.
    pub fn system_call(&self) -> (u64, [u64; 6]) {
        let r = self.registers();
        (r.rax, [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9])
    }

    /// What CPL3 finds in RAX when it goes on.
    pub fn set_result(&mut self, result: u64) {
        self.frame.registers.rax = result;
    }

    /// Runs the code until it needs the caller. It may keep the CPU for ever; signals are delivered meanwhile, at CPL0.
    ///
    /// This and the stack of the caller must be mapped for CPL0 in the loaded page table.
    #[inline]
    pub fn run(&mut self, thread: &Thread<'_>) -> UserExit {
        if !is_cpl0() {
            return UserExit::OutsideDuneMode;
        }
        self.visit(thread, None)
    }

    /// Runs the code for at most `ticks` of the TSC from now on, as time goes by, whether the thread has the CPU or not.
    ///
    /// It ends at the first interrupt of the CPU after that: with a tick of 250 Hz, up to 4 ms later.
    pub fn run_for(&mut self, thread: &Thread<'_>, ticks: u64) -> UserExit {
        if !is_cpl0() {
            return UserExit::OutsideDuneMode;
        }
        let deadline = sys::ticks().saturating_add(ticks);
        // SAFETY: The run page is mapped as long as the block lives. Who was interrupted on its way to CPL3 by what runs this
        // has its own deadline there.
        unsafe {
            let word = &raw mut (*thread.block().run).deadline;
            let outer = word.read_volatile();
            let exit = self.visit(thread, Some(deadline));
            word.write_volatile(outer);
            exit
        }
    }

    /// The callers are at CPL0.
    #[inline]
    fn visit(&mut self, thread: &Thread<'_>, deadline: Option<u64>) -> UserExit {
        if !self.may_enter() {
            return NOT_CANONICAL;
        }
        loop {
            let r = &mut self.frame.registers;
            r.rflags = r.rflags & USER_RFLAGS | USER_RFLAGS_SET;
            if let Some(deadline) = deadline {
                if sys::ticks() >= deadline {
                    return UserExit::Timeout;
                }
                // SAFETY: The run page is mapped as long as the block lives.
                unsafe { (&raw mut (*thread.block().run).deadline).write_volatile(deadline) };
            }
            // SAFETY: At CPL0; the block is the thread's, which is the calling one because it cannot be sent. What the frame
            // must hold was seen to above.
            unsafe { cpl3::enter(&raw mut self.frame, thread.block()) };
            if self.frame.event == u64::from(cpl3::EVENT_SYSCALL) {
                return UserExit::Syscall;
            }
            if self.frame.event != u64::from(cpl3::EVENT_INTERRUPTED) {
                return self.exception();
            }
            // What was interrupted may have been emulated, at the end of what can be.
            if !self.may_enter() || self.is_32bit() && self.frame.registers.rip >> 32 != 0 {
                return NOT_CANONICAL;
            }
        }
    }

    /// Whether the way to CPL3 takes these addresses.
    #[inline(always)]
    fn may_enter(&self) -> bool {
        let r = &self.frame.registers;
        (r.rip | r.fs_base | r.gs_base) >> 47 == 0 || [r.rip, r.fs_base, r.gs_base].into_iter().all(is_canonical)
    }

    fn exception(&self) -> UserExit {
        const INT_80: u8 = 0x80;
        match Vector(self.frame.event as u8) {
            Vector(INT_80) => UserExit::Int80,
            Vector::PF => UserExit::PageFault(PageFault {
                address: self.frame.cr2,
                error_code: self.frame.error_code,
            }),
            vector => UserExit::Exception {
                vector,
                error_code: self.frame.error_code,
            },
        }
    }
}

/// What the CPU gives at CPL3 for an address that is not canonical.
const NOT_CANONICAL: UserExit = UserExit::Exception {
    vector: Vector::GP,
    error_code: 0,
};

fn is_canonical(address: u64) -> bool {
    ((address << 16) as i64 >> 16) as u64 == address
}

impl fmt::Debug for UserContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UserContext")
            .field("registers", self.registers())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_addresses_are_told_apart() {
        for address in [0, 0x7fff_ffff_ffff, 0xffff_8000_0000_0000, u64::MAX] {
            assert!(is_canonical(address), "{address:#x}");
        }
        for address in [0x8000_0000_0000, 0xffff_7fff_ffff_ffff, 1 << 63, 1 << 48] {
            assert!(!is_canonical(address), "{address:#x}");
        }
    }

    #[test]
    fn page_faults_speak() {
        let fault = |error_code| PageFault {
            address: 0x1000,
            error_code,
        };
        assert_eq!(format!("{:?}", fault(7)), "PageFault(write at 0x1000, not allowed)");
        assert_eq!(format!("{:?}", fault(0x14)), "PageFault(execute at 0x1000, not mapped)");
        assert_eq!(
            format!("{:?}", fault(0x4004)),
            "PageFault(read at 0x1000, not the process')"
        );
    }
}
