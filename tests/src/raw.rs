// SPDX-License-Identifier: MIT OR Apache-2.0

//! A guest made by hand, straight on `/dev/dune`: for what libdune never does.
//!
//! [`RawGuest`] is a vCPU with a page table, GDT, TSS and IDT in a few pages of this process. Code is machine code in
//! bytes. Each vector's handler is `mov eax, TRAP + vector; vmcall`, so a fault in the guest comes back as
//! [`Ended::Call`] with that number, its frame on the guest's stack.
//!
//! ```text
//!   GVA = HVA            the GiB of the arena, supervisor
//!   USER_WINDOW + …      the same GiB again, user
//!   ODD_WINDOW           2 MiB at whatever GPA a test wants
//! ```

use std::arch::asm;
use std::ffi::CString;
use std::io;
use std::ops::Range;
use std::ptr;

use dune_abi::CreateVcpu;
use dune_abi::Exit;
use dune_abi::Info;
use dune_abi::MapSlot;
use dune_abi::RunPage;
use dune_abi::Segment;
use dune_abi::Sregs;

use crate::support::Map;

/// Number that a VMCALL of the trap stub of vector 0 has.
pub const TRAP: u64 = 0x7a00;

/// Where the arena's GiB appears a second time, with the user bit.
pub const USER_WINDOW: u64 = 0x55 << 39;
/// Where [`RawGuest::map_odd`] maps.
pub const ODD_WINDOW: u64 = USER_WINDOW + dune_abi::SLOT_BYTES;

/// Linux' selectors, which STAR needs; RPL included.
pub const KERNEL_CS: u16 = 0x10;
pub const KERNEL_SS: u16 = 0x18;
pub const USER_CS: u16 = 0x33;
pub const USER_SS: u16 = 0x2b;
const TSS: u16 = 0x40;

pub const UNUSABLE: u32 = 1 << 16;

/// IOPL 3: code at CPL0 runs so, and user code with it could use ports if the module let it.
pub const RFLAGS_IOPL3: u64 = 0x3002;

const PAGE: usize = 4096;
const ARENA_BYTES: usize = 64 * PAGE;

// Pages of the arena.
const PML4: usize = 0;
const PDPT: usize = 1;
const PD: usize = 2;
const PDPT_WINDOWS: usize = 3;
const PD_USER: usize = 4;
const PD_ODD: usize = 5;
const TABLES: usize = 6;
const IDT: usize = 7;
const STUBS: usize = 8;
/// Pages of tables and stubs, from the first on.
pub const TABLE_PAGES: usize = 9;
const STACK_TOP: usize = 20;
const TRAP_STACK_TOP: usize = 24;
const CODE: usize = 24;
const DATA: usize = 32;

/// Errno of a failed call.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

impl std::fmt::Debug for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", io::Error::from_raw_os_error(self.0))
    }
}

fn last_errno() -> Errno {
    Errno(io::Error::last_os_error().raw_os_error().unwrap_or(0))
}

/// An open `/dev/dune`.
#[derive(Debug)]
pub struct Device {
    pub fd: i32,
}

impl Device {
    /// Asks again where Linux gave up the locks of the process for work or a signal that was due.
    pub fn open() -> Result<Self, Errno> {
        loop {
            match Self::open_as(libc::O_RDWR) {
                Err(Errno(libc::EINTR)) => continue,
                answer => return answer,
            }
        }
    }

    /// For reading, writing or both, asked once.
    pub fn open_as(access: i32) -> Result<Self, Errno> {
        let path = CString::new(dune_abi::DEVICE_PATH).unwrap();
        // SAFETY: `path` is a C string.
        let fd = unsafe { libc::open(path.as_ptr(), access | libc::O_CLOEXEC) };
        if fd < 0 {
            return Err(last_errno());
        }
        Ok(Self { fd })
    }

    /// Any call with any argument; not [`dune_abi::DUNE_RUN`], which changes registers.
    pub fn call(&self, request: u32, argument: usize) -> Result<i32, Errno> {
        // SAFETY: the kernel checks what it is given; the tests give it rubbish on purpose, and pointers only to
        // structures that live through the call or to nothing.
        let answer = unsafe { libc::syscall(libc::SYS_ioctl, self.fd, request as usize, argument) };
        if answer < 0 {
            return Err(last_errno());
        }
        Ok(answer as i32)
    }

    /// The same by read(2), for which the argument is a buffer.
    pub fn call_by_read(&self, request: u32, argument: usize) -> Result<i32, Errno> {
        self.read(argument, dune_abi::read_size(request))
    }

    /// Any read(2) but the one that is RUN.
    pub fn read(&self, buffer: usize, bytes: u64) -> Result<i32, Errno> {
        // SAFETY: as in `call`.
        let answer = unsafe { libc::syscall(libc::SYS_read, self.fd, buffer, bytes) };
        if answer < 0 {
            return Err(last_errno());
        }
        Ok(answer as i32)
    }

    pub fn info(&self) -> Result<Info, Errno> {
        let mut info = Info {
            size: size_of::<Info>() as u32,
            ..Info::default()
        };
        self.call(dune_abi::DUNE_GET_INFO, &raw mut info as usize)?;
        Ok(info)
    }

    pub fn create_vcpu(&self) -> Result<CreateVcpu, Errno> {
        let mut create = CreateVcpu {
            size: size_of::<CreateVcpu>() as u32,
            ..CreateVcpu::default()
        };
        self.call(dune_abi::DUNE_CREATE_VCPU, &raw mut create as usize)?;
        Ok(create)
    }

    /// GPA of the GiB of `hva`.
    pub fn map_slot(&self, hva: u64) -> Result<u64, Errno> {
        let mut slot = MapSlot {
            size: size_of::<MapSlot>() as u32,
            hva,
            ..MapSlot::default()
        };
        self.call(dune_abi::DUNE_MAP_SLOT, &raw mut slot as usize)?;
        Ok(slot.gpa)
    }

    pub fn map_run_page(&self, create: &CreateVcpu) -> Result<*mut RunPage, Errno> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let bytes = create.run_bytes as usize;
        let address = self.map(create.run_offset, bytes, protection, libc::MAP_SHARED)?;
        Ok(address.cast())
    }

    /// Any mmap(2).
    pub fn map(&self, offset: u64, bytes: usize, protection: i32, flags: i32) -> Result<*mut u8, Errno> {
        // SAFETY: a new mapping; nothing of ours is replaced.
        let address = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                protection,
                flags,
                self.fd,
                offset as libc::off_t,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(last_errno());
        }
        Ok(address.cast())
    }

    /// RUN as it is: errno, or the kind of exit that the module put into R12.
    pub fn run(&self, vcpu: usize) -> Result<RunAnswer, Errno> {
        self.run_by(libc::SYS_ioctl, u64::from(dune_abi::DUNE_RUN), vcpu as u64)
    }

    /// RUN by read(2).
    pub fn run_by_read(&self, vcpu: usize) -> Result<RunAnswer, Errno> {
        self.run_by(libc::SYS_read, vcpu as u64, dune_abi::read_size(dune_abi::DUNE_RUN))
    }

    /// A call that is RUN, by its number and its arguments behind the file.
    fn run_by(&self, call: libc::c_long, second: u64, third: u64) -> Result<RunAnswer, Errno> {
        let mut rax = call as u64;
        let mut rdi = self.fd as u64;
        let mut rsi = second;
        let mut rdx = third;
        let (r10, r8, r9): (u64, u64, u64);
        let mut r12 = 0xffff_ffffu64;
        // SAFETY: RUN changes exactly these registers, and memory as the guest's code does.
        unsafe {
            asm!(
                "syscall",
                inlateout("rax") rax,
                inlateout("rdi") rdi,
                inlateout("rsi") rsi,
                inlateout("rdx") rdx,
                inlateout("r10") 0u64 => r10,
                inlateout("r8") 0u64 => r8,
                inlateout("r9") 0u64 => r9,
                inlateout("r12") r12,
                lateout("rcx") _,
                lateout("r11") _,
                // The FPU state is one for both.
                clobber_abi("C"),
            );
        }
        if r12 as u32 == u32::MAX {
            return Err(Errno(-(rax as i64) as i32));
        }
        Ok(RunAnswer {
            kind: r12 as u32,
            rax,
            arguments: [rdi, rsi, rdx, r10, r8, r9],
        })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: the fd is ours.
        unsafe { libc::close(self.fd) };
    }
}

/// What RUN left in the registers of its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunAnswer {
    pub kind: u32,
    pub rax: u64,
    /// RDI RSI RDX R10 R8 R9.
    pub arguments: [u64; 6],
}

/// How a guest came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// A VMCALL at CPL0 with this number in RAX.
    Call(u64),
    /// Any other exit that is the caller's.
    Exit(Exit),
}

impl Ended {
    /// The exit; fails the test where the guest made a call.
    #[track_caller]
    pub fn exit(self) -> Exit {
        match self {
            Self::Exit(exit) => exit,
            Self::Call(number) => panic!("the guest made call {number:#x} where an exit was expected"),
        }
    }
}

/// A guest of one vCPU.
pub struct RawGuest {
    pub device: Device,
    pub info: Info,
    pub vcpu: usize,
    run: *mut RunPage,
    arena: *mut u8,
    /// GPA of the GiB that holds the arena.
    pub slot: u64,
    /// More memory that RUN may ask to touch.
    also: Range<u64>,
}

impl RawGuest {
    /// A guest at CPL0 that is about to execute `code`.
    pub fn new(code: &[u8]) -> Self {
        Self::try_new(code).unwrap_or_else(|errno| panic!("making a raw guest: {errno:?}"))
    }

    pub fn try_new(code: &[u8]) -> Result<Self, Errno> {
        Self::try_with(code, map_arena)
    }

    /// A guest whose GiB has nothing else of this process: whatever it writes stays its own.
    pub fn alone(code: &[u8]) -> Self {
        Self::try_with(code, map_lonely_arena).unwrap_or_else(|errno| panic!("making a raw guest: {errno:?}"))
    }

    fn try_with(code: &[u8], map_arena: fn() -> Result<*mut u8, Errno>) -> Result<Self, Errno> {
        let device = Device::open()?;
        let info = device.info()?;
        let create = device.create_vcpu()?;
        // Unmapped again where a later step fails: a mapped run page keeps the space.
        let arena = Map::owning(map_arena()?, ARENA_BYTES);
        let run = Map::owning(device.map_run_page(&create)?.cast(), dune_abi::RUN_PAGE_BYTES);
        let slot = device.map_slot(arena.address() as u64)?;
        let (arena, run) = (arena.into_start(), run.into_start().cast());
        let mut guest = Self {
            device,
            info,
            vcpu: create.vcpu as usize,
            run,
            arena,
            slot,
            also: 0..0,
        };
        guest.build_tables();
        guest.set_code(code);
        guest.reset();
        Ok(guest)
    }

    /// A copy of the page tables, descriptor tables and trap stubs.
    pub fn tables(&self) -> Vec<u64> {
        // SAFETY: inside the arena, which is ours.
        unsafe { std::slice::from_raw_parts(self.page(0), TABLE_PAGES * PAGE / 8).to_vec() }
    }

    /// Puts back what [`Self::tables`] gave.
    pub fn restore_tables(&mut self, tables: &[u64]) {
        assert_eq!(tables.len(), TABLE_PAGES * PAGE / 8);
        // SAFETY: inside the arena, which is ours.
        unsafe { ptr::copy_nonoverlapping(tables.as_ptr(), self.page(0), tables.len()) };
    }

    /// Changes a word of the tables.
    pub fn flip_table_bit(&mut self, page: usize, index: usize, bit: u32) {
        assert!(page < TABLE_PAGES && index < PAGE / 8);
        // SAFETY: inside the arena, which is ours.
        unsafe { *self.page(page).add(index) ^= 1 << bit };
    }

    /// Does natively what an exit asks for, if it is the arena's; else false.
    pub fn settle(&self, exit: &Exit) -> bool {
        let owns = self.owns(exit.hva);
        if owns {
            touch(exit);
        }
        owns
    }

    fn page(&self, number: usize) -> *mut u64 {
        // SAFETY: every page number here is below the arena's 64.
        unsafe { self.arena.add(number * PAGE).cast() }
    }

    fn write(&mut self, page: usize, index: usize, value: u64) {
        assert!(index < PAGE / 8);
        // SAFETY: inside the page.
        unsafe { self.page(page).add(index).write_volatile(value) };
    }

    /// HVA, and GVA, of a page.
    pub fn hva(&self, page: usize) -> u64 {
        self.page(page) as u64
    }

    /// GPA of an address of the arena.
    pub fn gpa(&self, hva: u64) -> u64 {
        self.slot + hva % dune_abi::SLOT_BYTES
    }

    /// The same byte in the user window.
    pub fn user(&self, hva: u64) -> u64 {
        USER_WINDOW + hva % dune_abi::SLOT_BYTES
    }

    /// Where the code starts.
    pub fn code(&self) -> u64 {
        self.hva(CODE)
    }

    /// A page and more of memory for tests.
    pub fn data(&self) -> u64 {
        self.hva(DATA)
    }

    fn build_tables(&mut self) {
        // Present, writable, accessed, dirty; user in tables, the leaf decides.
        const TABLE: u64 = 0x67;
        const LEAF: u64 = 0xe3;
        const USER: u64 = 4;

        let arena = self.arena as u64;
        let table = |guest: &Self, page| guest.gpa(guest.hva(page)) | TABLE;
        let (pdpt, pd) = (table(self, PDPT), table(self, PD));
        let (windows, user, odd) = (table(self, PDPT_WINDOWS), table(self, PD_USER), table(self, PD_ODD));
        self.write(PML4, (arena >> 39) as usize & 511, pdpt);
        self.write(PDPT, (arena >> 30) as usize & 511, pd);
        self.write(PML4, (USER_WINDOW >> 39) as usize & 511, windows);
        self.write(PDPT_WINDOWS, 0, user);
        self.write(PDPT_WINDOWS, 1, odd);
        for index in 0..512 {
            let page = self.slot + ((index as u64) << 21);
            self.write(PD, index, page | LEAF);
            self.write(PD_USER, index, page | LEAF | USER);
        }

        // GDT as Linux orders it, then the TSS.
        let tss = self.hva(TABLES) + 128;
        let gdt = [
            0,
            0x00cf_9b00_0000_ffff,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00cf_fb00_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
            0,
            0x67 | (tss & 0xff_ffff) << 16 | 0x8b << 40 | (tss >> 24 & 0xff) << 56,
            tss >> 32,
        ];
        for (index, descriptor) in gdt.into_iter().enumerate() {
            self.write(TABLES, index, descriptor);
        }
        let trap_stack = self.hva(TRAP_STACK_TOP);
        // RSP0 is at byte 4 of the TSS, IST1 at 36: both unaligned.
        for offset in [4, 36] {
            // SAFETY: inside the page of tables.
            unsafe {
                self.page(TABLES)
                    .cast::<u8>()
                    .add(128 + offset)
                    .cast::<u64>()
                    .write_unaligned(trap_stack);
            }
        }

        for vector in 0..256u64 {
            let stub = self.hva(STUBS) + vector * 16;
            let number = TRAP + vector;
            // mov eax, number; vmcall; hlt; jmp to the hlt.
            let code = number << 8 | 0xb8 | 0x01_0f << 40 | 0xc1 << 56;
            self.write(STUBS, vector as usize * 2, code);
            self.write(STUBS, vector as usize * 2 + 1, 0xfd_eb_f4);
            let gate = stub & 0xffff
                | u64::from(KERNEL_CS) << 16
                // IST1, present, DPL 3, interrupt gate.
                | 1 << 32
                | 0xee << 40
                | (stub >> 16 & 0xffff) << 48;
            self.write(IDT, vector as usize * 2, gate);
            self.write(IDT, vector as usize * 2 + 1, stub >> 32);
        }
    }

    /// The gate of `vector`: its code segment, its type byte; to the same stub on IST 1.
    pub fn set_gate(&mut self, vector: u8, selector: u16, kind: u8) {
        let stub = self.hva(STUBS) + u64::from(vector) * 16;
        self.set_gate_to(vector, selector, kind, stub);
    }

    /// The same, to any address.
    pub fn set_gate_to(&mut self, vector: u8, selector: u16, kind: u8, to: u64) {
        let gate =
            to & 0xffff | u64::from(selector) << 16 | 1 << 32 | u64::from(kind) << 40 | (to >> 16 & 0xffff) << 48;
        self.write(IDT, usize::from(vector) * 2, gate);
        self.write(IDT, usize::from(vector) * 2 + 1, to >> 32);
    }

    /// Where the stack of IST 1 begins.
    pub fn set_ist1(&mut self, top: u64) {
        // SAFETY: inside the page of tables.
        unsafe {
            self.page(TABLES)
                .cast::<u8>()
                .add(128 + 36)
                .cast::<u64>()
                .write_unaligned(top)
        };
    }

    /// Where in the TSS the I/O permission bitmap begins.
    pub fn set_io_bitmap(&mut self, offset: u16) {
        // SAFETY: inside the page of tables.
        unsafe {
            self.page(TABLES)
                .cast::<u8>()
                .add(128 + 102)
                .cast::<u16>()
                .write_unaligned(offset)
        };
    }

    /// Replaces the code.
    pub fn set_code(&mut self, code: &[u8]) {
        assert!(code.len() <= (DATA - CODE) * PAGE);
        // SAFETY: fits, as just checked.
        unsafe { ptr::copy_nonoverlapping(code.as_ptr(), self.page(CODE).cast(), code.len()) };
    }

    /// State for CPL0 at the start of the code, to be taken by the next RUN.
    pub fn reset(&mut self) {
        let sregs = self.sregs(false);
        let mut page = self.run_page();
        page.gprs = dune_abi::Gprs::default();
        page.gprs.rsp = self.hva(STACK_TOP);
        page.rip = self.code();
        page.rflags = RFLAGS_IOPL3;
        page.sregs = sregs;
        page.dirty = dune_abi::DIRTY_RIP | dune_abi::DIRTY_SREGS;
        self.set_run_page(page);
    }

    /// State for CPL3 at the start of the code, seen through the user window.
    pub fn reset_user(&mut self, rflags: u64) {
        self.reset();
        let mut page = self.run_page();
        page.sregs = self.sregs(true);
        page.rip = self.user(self.code());
        page.gprs.rsp = self.user(self.hva(STACK_TOP));
        page.rflags = rflags;
        self.set_run_page(page);
    }

    /// What a well-made guest has.
    pub fn sregs(&self, user: bool) -> Sregs {
        let unusable = Segment {
            access_rights: UNUSABLE,
            ..Segment::default()
        };
        let flat = |selector, access_rights| Segment {
            limit: u32::MAX,
            access_rights,
            selector,
            ..Segment::default()
        };
        let (cs, ss) = if user {
            (flat(USER_CS, 0xa0fb), flat(USER_SS, 0xc0f3))
        } else {
            (flat(KERNEL_CS, 0xa09b), flat(KERNEL_SS, 0xc093))
        };
        Sregs {
            cr0: self.info.cr0,
            cr3: self.gpa(self.hva(PML4)),
            cr4: self.info.cr4,
            efer: self.info.efer,
            es: unusable,
            cs,
            ss,
            ds: unusable,
            fs: unusable,
            gs: unusable,
            ldtr: unusable,
            tr: Segment {
                base: self.hva(TABLES) + 128,
                limit: 0x67,
                access_rights: 0x8b,
                selector: TSS,
                ..Segment::default()
            },
            gdtr_base: self.hva(TABLES),
            gdtr_limit: 10 * 8 - 1,
            idtr_base: self.hva(IDT),
            idtr_limit: 4095,
            lstar: 0,
            syscall_vmcall: 0,
        }
    }

    /// Unmaps the run page, which holds the file: nothing may look at it any more.
    pub fn forget_run_page(&mut self) {
        // SAFETY: Ours, and nothing points into it any more.
        unsafe { libc::munmap(self.run.cast(), dune_abi::RUN_PAGE_BYTES) };
        self.run = ptr::null_mut();
    }

    /// The run page itself.
    pub fn run_pointer(&self) -> *mut RunPage {
        self.run
    }

    /// A copy of the run page.
    pub fn run_page(&self) -> RunPage {
        // SAFETY: mapped as long as the guest lives.
        unsafe { self.run.read_volatile() }
    }

    /// Writes the run page whole.
    pub fn set_run_page(&mut self, page: RunPage) {
        // SAFETY: as above.
        unsafe { self.run.write_volatile(page) };
    }

    /// Changes the run page in place.
    pub fn edit(&mut self, change: impl FnOnce(&mut RunPage)) {
        let mut page = self.run_page();
        change(&mut page);
        self.set_run_page(page);
    }

    /// Maps 2 MiB around `gpa` and gives the GVA of that very byte.
    pub fn map_odd(&mut self, gpa: u64) -> u64 {
        const LARGE: u64 = 2 << 20;
        self.write(PD_ODD, 0, (gpa & !(LARGE - 1)) | 0xe3);
        ODD_WINDOW + gpa % LARGE
    }

    /// New memory in the arena's GiB, which the guest's page table maps; the guest may use it as well.
    pub fn memory_beside(&mut self, bytes: usize) -> Map {
        let gib = self.arena as u64 & !(dune_abi::SLOT_BYTES - 1);
        let last = gib + dune_abi::SLOT_BYTES - bytes as u64;
        let free = (gib..last)
            .step_by(2 << 20)
            .find_map(|address| Map::try_at(address as usize, bytes));
        let map = free.expect("no room in a whole GiB");
        self.also = map.address() as u64..(map.address() + bytes) as u64;
        map
    }

    /// RUN until the guest ends in some way; what Linux can settle by an access of ours is settled.
    pub fn run(&mut self) -> Ended {
        self.try_run().unwrap_or_else(|errno| panic!("RUN failed: {errno:?}"))
    }

    /// As [`Self::run`]; the errno of a RUN that failed.
    pub fn try_run(&mut self) -> Result<Ended, Errno> {
        for _ in 0..10_000 {
            let answer = match self.device.run(self.vcpu) {
                Err(Errno(libc::EINTR)) => continue,
                other => other?,
            };
            let exit = self.run_page().exit;
            assert_eq!(answer.kind, exit.kind, "R12 and the run page disagree");
            match exit.kind {
                dune_abi::EXIT_SYSCALL => return Ok(Ended::Call(answer.rax)),
                dune_abi::EXIT_AGAIN => {}
                dune_abi::EXIT_TOUCH if self.owns(exit.hva) => touch(&exit),
                _ => return Ok(Ended::Exit(exit)),
            }
        }
        panic!("10,000 RUNs and no end: {:?}", self.run_page().exit);
    }

    /// Runs and fails the test unless the guest takes exception `vector`; gives the frame that the CPU pushed.
    #[track_caller]
    pub fn expect_trap(&mut self, vector: u64) -> Frame {
        assert_eq!(self.run(), Ended::Call(TRAP + vector), "exception {vector} expected");
        self.frame(has_error_code(vector))
    }

    /// The exception frame at the guest's RSP.
    pub fn frame(&mut self, error_code: bool) -> Frame {
        self.sync();
        let rsp = self.run_page().gprs.rsp;
        let first = self.hva(0);
        assert!((first..first + ARENA_BYTES as u64 - 48).contains(&rsp), "rsp {rsp:#x}");
        // SAFETY: inside the arena.
        let words = unsafe { (rsp as *const [u64; 6]).read_volatile() };
        let (code, words) = if error_code {
            (Some(words[0]), &words[1..])
        } else {
            (None, &words[..5])
        };
        Frame {
            error_code: code,
            rip: words[0],
            cs: words[1],
            rflags: words[2],
            rsp: words[3],
        }
    }

    /// Brings the whole state into the run page.
    pub fn sync(&self) {
        self.device
            .call(dune_abi::DUNE_SYNC, self.vcpu)
            .unwrap_or_else(|errno| panic!("SYNC failed: {errno:?}"));
    }

    fn owns(&self, hva: u64) -> bool {
        let first = self.arena as u64;
        (first..first + ARENA_BYTES as u64).contains(&hva) || self.also.contains(&hva)
    }
}

impl Drop for RawGuest {
    fn drop(&mut self) {
        let _ = self.device.call(dune_abi::DUNE_DESTROY_VCPU, self.vcpu);
        // SAFETY: both mappings are ours and nothing points into them any more.
        unsafe {
            libc::munmap(self.run.cast(), dune_abi::RUN_PAGE_BYTES);
            libc::munmap(self.arena.cast(), ARENA_BYTES);
        }
    }
}

/// What the CPU pushed for an exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    pub error_code: Option<u64>,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
}

fn has_error_code(vector: u64) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21)
}

/// Does natively what the guest's access needs.
fn touch(exit: &Exit) {
    let byte = exit.hva as *mut u8;
    // SAFETY: the caller checked that the byte is the arena's, which is readable, writable and executable.
    unsafe {
        if exit.access & dune_abi::ACCESS_WRITE != 0 {
            asm!("lock or byte ptr [{}], 0", in(reg) byte);
        } else {
            byte.read_volatile();
        }
    }
}

/// Where [`RawGuest::alone`] has its arena: a GiB that neither the kernel nor libc chooses.
const LONELY: usize = 0x20 << 39;

fn map_lonely_arena() -> Result<*mut u8, Errno> {
    // SAFETY: a new mapping; nothing is replaced.
    let address = unsafe {
        libc::mmap(
            ptr::without_provenance_mut(LONELY),
            ARENA_BYTES,
            libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
            -1,
            0,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(last_errno());
    }
    Ok(address.cast())
}

/// Memory for a guest, not astride a slot edge.
fn map_arena() -> Result<*mut u8, Errno> {
    let mut strays = Vec::new();
    loop {
        // SAFETY: a new mapping; nothing of ours is replaced.
        let address = unsafe {
            libc::mmap(
                ptr::null_mut(),
                ARENA_BYTES,
                libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(last_errno());
        }
        let first = address as u64;
        if first / dune_abi::SLOT_BYTES == (first + ARENA_BYTES as u64 - 1) / dune_abi::SLOT_BYTES {
            for stray in strays {
                // SAFETY: ours, and unused.
                unsafe { libc::munmap(stray, ARENA_BYTES) };
            }
            return Ok(address.cast());
        }
        strays.push(address);
    }
}
