// SPDX-License-Identifier: MIT OR Apache-2.0
//! Code at CPL3: what it can do, and what it cannot do to CPL0.

use std::arch::asm;
use std::cell::Cell;
use std::sync::atomic::AtomicI32;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;

use libdune::user::PageFault;
use libdune::user::UserContext;
use libdune::user::UserExit;
use libdune::user::UserFault;
use libdune::user::UserSlice;
use libdune::FramePool;
use libdune::Gva;
use libdune::Hva;
use libdune::Outcome;
use libdune::Permissions;
use libdune::Thread;
use libdune::TrapFrame;
use libdune::Vector;

use crate::framework::Need;
use crate::framework::Test;
use crate::support::assert_no_exits;
use crate::support::cs;
use crate::support::enter;
use crate::support::install_probe;
use crate::support::load;
use crate::support::set_plain_handler;
use crate::support::set_timer;
use crate::support::spawn;
use crate::support::timer;
use crate::support::Map;
use crate::support::PAGE;

pub const TESTS: &[Test] = &[
    Test::asserting(
        "system_call_of_cpl3_comes_to_the_host",
        system_call_of_cpl3_comes_to_the_host,
    ),
    Test::asserting("cpl3_faults_come_to_the_host", cpl3_faults_come_to_the_host),
    Test::asserting("cpl3_sees_only_its_pages", cpl3_sees_only_its_pages),
    Test::asserting(
        "privileged_instructions_fault_at_cpl3",
        privileged_instructions_fault_at_cpl3,
    ),
    Test::asserting("flags_of_cpl3_stay_there", flags_of_cpl3_stay_there),
    Test::asserting(
        "cpl3_that_nobody_waits_for_stays_in_dune_mode",
        cpl3_that_nobody_waits_for_stays_in_dune_mode,
    ),
    Test::asserting("token_that_is_lent_keeps_dune_mode", token_that_is_lent_keeps_dune_mode),
    Test::asserting("stack_of_cpl3_does_not_matter", stack_of_cpl3_does_not_matter),
    Test::asserting("mov_ss_blocks_nothing_at_cpl0", mov_ss_blocks_nothing_at_cpl0),
    Test::asserting(
        "rip_that_is_not_canonical_is_an_exception",
        rip_that_is_not_canonical_is_an_exception,
    ),
    Test::asserting("segment_bases_are_kept_apart", segment_bases_are_kept_apart),
    Test::asserting("extended_state_is_kept_apart", extended_state_is_kept_apart),
    Test::asserting("cpl3_runs_32_bit_code", cpl3_runs_32_bit_code),
    Test::asserting("cpl3_cannot_keep_the_cpu", cpl3_cannot_keep_the_cpu),
    Test::asserting("handlers_take_exceptions_of_cpl3", handlers_take_exceptions_of_cpl3),
    Test::asserting(
        "cpl3_comes_out_into_a_page_that_was_copied",
        cpl3_comes_out_into_a_page_that_was_copied,
    ),
    Test::asserting(
        "signals_are_delivered_while_at_cpl3",
        signals_are_delivered_while_at_cpl3,
    )
    .timeout_s(60),
    Test::asserting(
        "signal_handler_may_jump_out_of_cpl3",
        signal_handler_may_jump_out_of_cpl3,
    ),
    Test::asserting("visits_to_cpl3_nest", visits_to_cpl3_nest),
    Test::asserting("threads_visit_cpl3_at_once", threads_visit_cpl3_at_once),
    Test::asserting("child_of_fork_visits_cpl3", child_of_fork_visits_cpl3),
    Test::asserting(
        "user_slice_copies_what_cpl3_may_access",
        user_slice_copies_what_cpl3_may_access,
    ),
    Test::asserting("cpl0_may_step_over_a_system_call", cpl0_may_step_over_a_system_call),
    Test::asserting(
        "cpl0_does_not_execute_pages_of_cpl3",
        cpl0_does_not_execute_pages_of_cpl3,
    )
    .needs(&[Need::CpuFlag("smep")]),
    Test::asserting(
        "cpl0_accesses_cpl3_by_user_slice_only",
        cpl0_accesses_cpl3_by_user_slice_only,
    )
    .needs(&[Need::CpuFlag("smap")]),
];

/// Machine code as a constant: what the assembler makes of it.
macro_rules! code {
    ($($name:ident: $($line:literal)*;)*) => {$(
        fn $name() -> &'static [u8] {
            extern "C" {
                #[link_name = concat!("dune_test_user_", stringify!($name))]
                static START: u8;
                #[link_name = concat!("dune_test_user_", stringify!($name), "_end")]
                static END: u8;
            }
            // SAFETY: both are labels of one section, in this order.
            unsafe {
                let (start, end) = (&raw const START, &raw const END);
                std::slice::from_raw_parts(start, end as usize - start as usize)
            }
        }
        std::arch::global_asm!(
            ".pushsection .rodata.dune_test_user, \"a\", @progbits",
            concat!(".globl dune_test_user_", stringify!($name)),
            concat!("dune_test_user_", stringify!($name), ":"),
            $($line,)*
            concat!(".globl dune_test_user_", stringify!($name), "_end"),
            concat!("dune_test_user_", stringify!($name), "_end:"),
            ".popsection",
        );
    )*};
}
pub(crate) use code;

code! {
    calls: "mov eax, 39" "syscall" "mov ebx, eax" "syscall" "int 0x80" "ud2";
    // RDI: what to do with flags: they are ORed into RFLAGS, then comes the way out that RSI has.
    flags: "pushfq" "or [rsp], rdi" "cmp rsi, 1" "je 3f" "cmp rsi, 2" "je 4f"
        "popfq" "syscall" "hlt"
        "3:" "popfq" "int 0x80" "hlt"
        "4:" "popfq" "ud2" "hlt";
    spin: "2:" "inc rax" "jmp 2b";
    spin_on_cpuid: "2:" "xor eax, eax" "cpuid" "inc r8" "jmp 2b";
    // Every register has a value that CPL0 checks; then a loop of system calls.
    call_loop: "2:" "inc r15" "syscall" "jmp 2b";
    load_word: "mov rax, [rdi]" "syscall";
    store_word: "mov [rdi], rax" "syscall";
    jump: "jmp rdi";
    bad_stack: "mov rsp, rdi" "syscall" "push rax" "hlt";
    bad_stack_trap: "mov rsp, rdi" "ud2" "hlt";
    mov_ss_syscall: "mov eax, ss" "mov ss, eax" "syscall" "hlt";
    mov_ss_int3: "mov eax, ss" "mov ss, eax" "int3" "hlt";
    mov_ss_int80: "mov eax, ss" "mov ss, eax" "int 0x80" "hlt";
    mov_ss_ud2: "mov eax, ss" "mov ss, eax" "ud2";
    mov_ss_step: "pushfq" "or dword ptr [rsp], 0x100" "mov eax, ss" "popfq" "mov ss, eax" "syscall" "nop" "hlt";
    selectors: "mov eax, 0x2b" "mov ds, eax" "mov es, eax" "mov fs, eax" "mov gs, eax" "syscall" "xor eax, eax"
        "mov fs, eax" "mov gs, eax" "syscall";
    bases: "mov rax, fs:[0]" "mov rbx, gs:[0]" "syscall";
    write_bases: "mov rax, 0x1111000" "wrfsbase rax" "mov rax, 0x2222000" "wrgsbase rax" "syscall"
        "rdfsbase rbx" "rdgsbase rdx" "syscall";
    extended: "movq rax, xmm0" "movq rbx, xmm7" "movq rsi, xmm15" "stmxcsr [rsp - 8]" "mov edx, [rsp - 8]" "syscall"
        "mov rax, 0x5555" "movq xmm0, rax" "movq xmm7, rax" "movq xmm15, rax" "mov dword ptr [rsp - 8], 0"
        "ldmxcsr [rsp - 8]" "mov word ptr [rsp - 8], 0" "fldcw [rsp - 8]" "fld1" "fld1" "fld1" "fld1" "fld1" "fld1"
        "fld1" "fld1" "fld1" "xor eax, eax" "syscall"
        "movq rax, xmm0" "stmxcsr [rsp - 8]" "mov edx, [rsp - 8]" "syscall";
    // Sets all there is to be unmasked, with an exception of the x87 unit pending.
    fpu_pending: "mov word ptr [rsp - 8], 0x300" "fldcw [rsp - 8]" "fld1" "fldz" "fdivp" "syscall";
    // RETFQ to the 32-bit segment behind this, and back.
    to_32: "lea rax, [rip + 2f]" "mov dword ptr [rsp - 16], eax" "mov dword ptr [rsp - 12], 0x23" "lea rsp, [rsp - 16]"
        "retf" "2:" ".byte 0xb8, 0x39, 0x30, 0, 0" "int 0x80" ".byte 0x40" "int 0x80";
}

/// Some pages of CPL3: code, then stack, then data.
pub struct Sandbox {
    map: Map,
    pub context: UserContext,
}

const CODE: usize = 0;
pub const STACK: usize = 1;
pub const DATA: usize = 2;
/// Stays the host's.
const SECRET: usize = 3;
pub const PAGES: usize = 4;

/// Pages where code at CPL3 grows a word until it is released; the children of their process share them.
pub struct Growing(Map);

code! {
    // A word at RDI grows until the one behind it is set.
    grow: "2:" "inc qword ptr [rdi]" "cmp qword ptr [rdi + 8], 0" "je 2b" "syscall" "hlt";
}

impl Growing {
    pub fn new() -> Self {
        let all = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        Self(Map::shared(PAGES * PAGE, all))
    }

    fn words(&self) -> &[AtomicU64; 2] {
        // SAFETY: Inside the mapping; all of it is read and written whole.
        unsafe { &*(self.0.page(DATA) as *const [AtomicU64; 2]) }
    }

    pub fn progress(&self) -> u64 {
        self.words()[0].load(SeqCst)
    }

    pub fn release(&self) {
        self.words()[1].store(1, SeqCst);
    }

    /// Begins with a word of 0, calls `ready`, and is back when somebody has released the code.
    pub fn run(&self, thread: &Thread<'_>, ready: impl FnOnce()) {
        // CPL3 may not use it yet, so this CPL may, with SMAP too.
        give(thread, self.words().as_ptr() as u64, 1, Permissions::ALL);
        for word in self.words() {
            word.store(0, SeqCst);
        }
        let mut sandbox = Sandbox::on(thread, Map::owning(self.0.start, PAGES * PAGE), grow());
        sandbox.context.registers_mut().rdi = self.words().as_ptr() as u64;
        ready();
        assert_eq!(sandbox.context.run_for(thread, PLENTY), UserExit::Syscall);
    }
}

/// Ticks that code may have in tests that do not expect it to use them up.
pub const PLENTY: u64 = 2_000_000_000;

/// Says what code at CPL3 may do with pages.
pub fn give(thread: &Thread<'_>, address: u64, pages: usize, permissions: Permissions) {
    let start = Gva::new(address).unwrap();
    let space = thread.address_space();
    space
        .protect(start, (pages * PAGE) as u64, permissions)
        .unwrap()
        .flush();
}

/// Bits of a page fault's error code.
pub mod error_code {
    pub const PRESENT: u64 = 1;
    pub const WRITE: u64 = 2;
    pub const USER: u64 = 4;
    pub const FETCH: u64 = 16;
    pub const KEY: u64 = 32;
}

impl Sandbox {
    pub fn new(thread: &Thread<'_>, code: &[u8]) -> Self {
        let map = Map::at(0, PAGES * PAGE, libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC, 0);
        Self::on(thread, map, code)
    }

    pub fn on(thread: &Thread<'_>, map: Map, code: &[u8]) -> Self {
        // The page table still has what it was told about memory that was here before: a sandbox of before `leave`.
        let give_page = |page, permissions| give(thread, map.page(page) as u64, 1, permissions);
        give(thread, map.page(0) as u64, PAGES, Permissions::ALL);
        // SAFETY: our own pages.
        unsafe {
            map.start.write_bytes(0xf4, PAGE);
            map.start.copy_from_nonoverlapping(code.as_ptr(), code.len());
        }
        for page in 1..PAGES {
            map.write(page * PAGE, 0x77);
        }
        give_page(CODE, Permissions::USER | Permissions::EXECUTE);
        give_page(STACK, Permissions::USER | Permissions::WRITE);
        give_page(DATA, Permissions::USER | Permissions::WRITE);
        let mut sandbox = Self {
            context: UserContext::new(thread),
            map,
        };
        sandbox.restart();
        sandbox
    }

    pub fn page(&self, page: usize) -> u64 {
        self.map.page(page) as u64
    }

    pub fn restart(&mut self) {
        self.context.registers_mut().rip = self.page(CODE);
        self.context.registers_mut().rsp = self.page(STACK) + PAGE as u64;
        self.context.registers_mut().rflags = 0;
    }

    /// Goes on; checks that CPL0 is as it should be behind it.
    #[track_caller]
    pub fn run(&mut self, thread: &Thread<'_>) -> UserExit {
        let exit = self.context.run_for(thread, PLENTY);
        check_cpl0();
        exit
    }
}

impl Drop for Sandbox {
    /// Takes the pages back: what CPL3 may access, CPL0 with SMAP may not, and the stack of a thread may be mapped there next.
    fn drop(&mut self) {
        let start = self.map.page(0) as u64;
        Thread::with_current(|thread| give(thread, start, PAGES, Permissions::ALL));
    }
}

/// Writes to memory of CPL3.
#[track_caller]
fn poke(thread: &Thread<'_>, address: u64, bytes: &[u8]) {
    let slice = UserSlice::writable(thread, address, bytes.len()).unwrap();
    slice.write(bytes).unwrap();
}

/// CPL, and the flags that code at CPL0 relies on.
#[track_caller]
fn check_cpl0() {
    const TF: u64 = 1 << 8;
    const IF: u64 = 1 << 9;
    const DF: u64 = 1 << 10;
    const IOPL: u64 = 3 << 12;
    const NT: u64 = 1 << 14;
    const AC: u64 = 1 << 18;
    let flags: u64;
    // SAFETY: reads RFLAGS.
    unsafe { asm!("pushfq", "pop {}", out(reg) flags) };
    assert_eq!(cs() & 3, 0, "the host is not at CPL0");
    assert_eq!(flags & (TF | IF | DF | IOPL | NT | AC), IF | IOPL, "{flags:#x}");
}

const fn exception(vector: Vector, error_code: u64) -> UserExit {
    UserExit::Exception { vector, error_code }
}

const UNDEFINED: UserExit = exception(Vector::UD, 0);
const PROTECTION: UserExit = exception(Vector::GP, 0);

fn system_call_of_cpl3_comes_to_the_host() {
    let dune = enter();
    let thread = dune.thread();
    let mut sandbox = Sandbox::new(&thread, calls());
    let code = sandbox.page(CODE);
    let r = sandbox.context.registers_mut();
    (r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9) = (1, 2, 3, 4, 5, 6);
    (r.rbx, r.rbp, r.r12, r.r13, r.r14, r.r15) = (11, 12, 13, 14, 15, 16);
    let before = *r;
    assert_eq!(sandbox.run(&thread), UserExit::Syscall);
    assert_eq!(sandbox.context.system_call(), (39, [1, 2, 3, 4, 5, 6]));
    let after = *sandbox.context.registers();
    assert_eq!(after.rip, code + 7);
    assert_eq!((after.rcx, after.r11), (after.rip, after.rflags));
    let expected = libdune::user::UserRegisters {
        rax: 39,
        rip: code + 7,
        rcx: code + 7,
        r11: 0x202,
        rflags: 0x202,
        ..before
    };
    assert_eq!(after, expected);

    sandbox.context.set_result(4711);
    assert_eq!(sandbox.run(&thread), UserExit::Syscall);
    assert_eq!(sandbox.context.registers().rbx, 4711);
    assert_eq!(sandbox.run(&thread), UserExit::Int80);
    assert_eq!(sandbox.context.registers().rip, code + 13);
    assert_eq!(sandbox.run(&thread), UNDEFINED);
    assert_eq!(sandbox.context.registers().rip, code + 13);
    assert_eq!(sandbox.run(&thread), UNDEFINED, "again");

    let mut again = || {
        sandbox.context.registers_mut().rip = code + 5;
        assert_eq!(sandbox.context.run(&thread), UserExit::Syscall);
    };
    assert_no_exits(&dune, || (0..10).for_each(|_| again()));
    let start = ticks();
    (0..1000).for_each(|_| again());
    println!(
        "report: call intercepted and answered: {} ticks",
        (ticks() - start) / 1000
    );
    let start = ticks();
    for _ in 0..1000 {
        again();
        // SAFETY: getpid.
        let pid = unsafe { libc::syscall(libc::SYS_getpid) };
        assert!(pid > 0);
    }
    println!(
        "report: the same, passed on (getpid): {} ticks",
        (ticks() - start) / 1000
    );
    drop(sandbox);
    dune.leave();
}

fn ticks() -> u64 {
    // SAFETY: reads a counter.
    unsafe { std::arch::x86_64::_rdtsc() }
}

fn cpl3_faults_come_to_the_host() {
    let dune = enter();
    let thread = dune.thread();
    // No handler of the host's is asked.
    dune.set_exception_handler(Vector::PF, |frame, _| {
        assert!(!frame.is_cpl3());
        Outcome::Unhandled
    });
    let cases: [(&[u8], UserExit, u64); 7] = [
        (&[0x31, 0xc9, 0xf7, 0xf1], exception(Vector::DE, 0), 2), // xor ecx, ecx; div ecx
        (&[0xcc], exception(Vector::BP, 0), 1),
        (&[0xf1], exception(Vector::DB, 0), 1),
        (&[0x0f, 0x0b], UNDEFINED, 0),
        (&[0xcd, 0x0e], exception(Vector::GP, 14 << 3 | 2), 0), // int 14
        (&[0xcd, 0x20], exception(Vector::GP, 0x20 << 3 | 2), 0),
        (&[0xcd, 0x08], exception(Vector::GP, 8 << 3 | 2), 0),
    ];
    for (code, wanted, length) in cases {
        let mut sandbox = Sandbox::new(&thread, code);
        assert_eq!(sandbox.run(&thread), wanted, "{code:x?}");
        assert_eq!(
            sandbox.context.registers().rip,
            sandbox.page(CODE) + length,
            "{code:x?}"
        );
    }
    // Memory that the process does not have.
    let mut sandbox = Sandbox::new(&thread, load_word());
    let gone = Map::new(PAGE);
    let address = gone.start as u64;
    let space = dune.address_space();
    space
        .protect(Gva::new(address).unwrap(), PAGE as u64, Permissions::USER)
        .unwrap()
        .flush();
    drop(gone);
    sandbox.context.registers_mut().rdi = address + 8;
    match sandbox.run(&thread) {
        UserExit::PageFault(fault) => {
            assert!(fault.host_refused() && !fault.is_write(), "{fault:?}");
            assert_eq!(fault.address, address + 8);
        }
        exit => panic!("{exit:?}"),
    }
    drop((space, sandbox));
    dune.leave();
}

fn cpl3_sees_only_its_pages() {
    use error_code::*;
    let dune = enter();
    let thread = dune.thread();
    let secret = Box::new(0x5ec7e7u64);
    let on_stack = 1u64;
    let mut sandbox = Sandbox::new(&thread, load_word());
    let victims = [
        &raw const *secret as u64,
        &raw const on_stack as u64,
        sandbox.page(SECRET),
        cpl3_sees_only_its_pages as *const () as u64,
        // What libdune keeps: the exception handlers' block.
        Thread::with_current(|_| 0).map_or(0, |_| idt_base()),
    ];
    let fault = |address, error_code| UserExit::PageFault(PageFault { address, error_code });
    for victim in victims {
        sandbox.restart();
        sandbox.context.registers_mut().rdi = victim;
        assert_eq!(sandbox.run(&thread), fault(victim, PRESENT | USER));
        assert_ne!(sandbox.context.registers().rax, *secret);
    }
    // Not there at all; the vsyscall page, which libdune emulates for the program; the other half.
    for victim in [0, 8, 0xffff_ffff_ff60_0000, 0xffff_8000_0000_0000] {
        sandbox.restart();
        sandbox.context.registers_mut().rdi = victim;
        match sandbox.run(&thread) {
            UserExit::PageFault(fault) => assert_eq!(fault.address, victim, "{fault:?}"),
            exit => panic!("{exit:?} for {victim:#x}"),
        }
    }
    sandbox.restart();
    sandbox.context.registers_mut().rdi = 1 << 62;
    assert_eq!(sandbox.run(&thread), PROTECTION);
    sandbox.restart();
    sandbox.context.registers_mut().rdi = sandbox.page(DATA);
    assert_eq!(sandbox.run(&thread), UserExit::Syscall);
    assert_eq!(sandbox.context.registers().rax & 0xff, 0x77);

    let mut sandbox = Sandbox::new(&thread, store_word());
    for victim in victims.into_iter().chain([sandbox.page(CODE)]) {
        sandbox.restart();
        sandbox.context.registers_mut().rdi = victim;
        assert_eq!(sandbox.run(&thread), fault(victim, PRESENT | WRITE | USER));
    }
    assert_eq!((*secret, on_stack), (0x5ec7e7, 1));

    let mut sandbox = Sandbox::new(&thread, jump());
    for victim in [
        cpl3_sees_only_its_pages as *const () as u64,
        sandbox.page(DATA),
        sandbox.page(SECRET),
    ] {
        sandbox.restart();
        sandbox.context.registers_mut().rdi = victim;
        assert_eq!(sandbox.run(&thread), fault(victim, PRESENT | USER | FETCH));
        assert_eq!(sandbox.context.registers().rip, victim);
    }
    // A call into the vsyscall page would have CPL0 make it with CPL3's pointer.
    sandbox.restart();
    sandbox.context.registers_mut().rdi = 0xffff_ffff_ff60_0000;
    match sandbox.run(&thread) {
        UserExit::PageFault(fault) => assert!(fault.is_execute(), "{fault:?}"),
        exit => panic!("{exit:?}"),
    }
    drop(sandbox);
    dune.leave();
}

fn idt_base() -> u64 {
    let mut table = [0u8; 10];
    // SAFETY: stores 10 bytes.
    unsafe { asm!("sidt [{}]", in(reg) table.as_mut_ptr()) };
    u64::from_le_bytes(table[2..].try_into().unwrap())
}

fn privileged_instructions_fault_at_cpl3() {
    let dune = enter();
    let thread = dune.thread();
    let cases: &[(&str, &[u8], UserExit)] = &[
        ("vmcall", b"\x0f\x01\xc1", UNDEFINED),
        ("vmlaunch", b"\x0f\x01\xc2", UNDEFINED),
        ("vmxoff", b"\x0f\x01\xc4", UNDEFINED),
        ("hlt", b"\xf4", PROTECTION),
        ("cli", b"\xfa", PROTECTION),
        ("sti", b"\xfb", PROTECTION),
        ("in al, 0x80", b"\xe4\x80", PROTECTION),
        ("out 0x80, al", b"\xe6\x80", PROTECTION),
        ("clts", b"\x0f\x06", PROTECTION),
        ("invd", b"\x0f\x08", PROTECTION),
        ("wbinvd", b"\x0f\x09", PROTECTION),
        ("mov rax, cr0", b"\x0f\x20\xc0", PROTECTION),
        ("mov rax, cr3", b"\x0f\x20\xd8", PROTECTION),
        ("mov cr3, rax", b"\x0f\x22\xd8", PROTECTION),
        ("mov cr4, rax", b"\x0f\x22\xe0", PROTECTION),
        ("mov rax, dr7", b"\x0f\x21\xf8", PROTECTION),
        ("mov dr0, rax", b"\x0f\x23\xc0", PROTECTION),
        ("lgdt [rsp - 16]", b"\x0f\x01\x54\x24\xf0", PROTECTION),
        ("lidt [rsp - 16]", b"\x0f\x01\x5c\x24\xf0", PROTECTION),
        ("lldt ax", b"\x0f\x00\xd0", PROTECTION),
        ("ltr ax", b"\x0f\x00\xd8", PROTECTION),
        ("lmsw ax", b"\x0f\x01\xf0", PROTECTION),
        ("invlpg [rsp]", b"\x0f\x01\x3c\x24", PROTECTION),
        ("swapgs", b"\x0f\x01\xf8", PROTECTION),
        ("rdmsr", b"\xb9\x82\0\0\xc0\x0f\x32", PROTECTION),
        ("wrmsr", b"\xb9\x82\0\0\xc0\x0f\x30", PROTECTION),
        ("sysretq", b"\x48\x0f\x07", PROTECTION),
        ("sysexit", b"\x0f\x35", PROTECTION),
        ("sysenter", b"\x0f\x34", PROTECTION),
        ("xsetbv", b"\x31\xc9\x0f\x01\xd1", PROTECTION),
    ];
    for (name, code, wanted) in cases {
        let mut sandbox = Sandbox::new(&thread, code);
        let exit = sandbox.run(&thread);
        let is_refused = exit == *wanted || exit == UNDEFINED;
        assert!(is_refused, "{name}: {exit:?}");
    }
    // Selectors of CPL0, by IRETQ and far return: push 0x18; push rsp; push 0x3202; push 0x10; push rdi; iretq.
    let far: [(&str, &[u8]); 3] = [
        ("iretq", b"\x6a\x18\x54\x68\x02\x32\0\0\x6a\x10\x57\x48\xcf"),
        ("retfq", b"\x6a\x10\x57\x48\xcb"),
        ("mov ss", b"\xb8\x18\0\0\0\x8e\xd0"),
    ];
    for (name, code) in far {
        let mut sandbox = Sandbox::new(&thread, code);
        sandbox.context.registers_mut().rdi = sandbox.page(CODE);
        let exit = sandbox.run(&thread);
        assert!(
            matches!(exit, UserExit::Exception { vector: Vector::GP, error_code } if error_code & !7 == 0x10 || error_code & !7 == 0x18),
            "{name}: {exit:?}"
        );
    }
    // IOPL cannot be had.
    let mut sandbox = Sandbox::new(&thread, flags());
    sandbox.context.registers_mut().rdi = 0x3000;
    assert_eq!(sandbox.run(&thread), UserExit::Syscall);
    assert_eq!(sandbox.context.registers().rflags & 0x3000, 0);
    sandbox.restart();
    sandbox.context.registers_mut().rflags = !0;
    sandbox.context.registers_mut().rflags &= !0x100;
    sandbox.context.registers_mut().rdi = 0;
    assert_eq!(sandbox.run(&thread), UserExit::Syscall);
    assert_eq!(sandbox.context.registers().rflags & 0x3000, 0);
    drop(sandbox);
    dune.leave();
}

fn flags_of_cpl3_stay_there() {
    const TF: u64 = 1 << 8;
    const DF: u64 = 1 << 10;
    const IOPL: u64 = 3 << 12;
    const NT: u64 = 1 << 14;
    const AC: u64 = 1 << 18;
    let dune = enter();
    let thread = dune.thread();
    let mut sandbox = Sandbox::new(&thread, flags());
    let ways = [UserExit::Syscall, UserExit::Int80, UNDEFINED];
    for bits in [0, DF, IOPL, NT, AC, DF | IOPL | NT | AC, 0xcd5] {
        for (way, wanted) in ways.into_iter().enumerate() {
            sandbox.restart();
            sandbox.context.registers_mut().rdi = bits;
            sandbox.context.registers_mut().rsi = way as u64;
            assert_eq!(sandbox.run(&thread), wanted, "{bits:#x}");
            let left = sandbox.context.registers().rflags;
            assert_eq!(left & (DF | NT | AC | IOPL), bits & (DF | NT | AC), "{left:#x}");
            // And from the start.
            sandbox.restart();
            sandbox.context.registers_mut().rflags = bits;
            sandbox.context.registers_mut().rdi = 0;
            assert_eq!(sandbox.run(&thread), wanted, "{bits:#x}");
        }
    }
    // Each single step comes, and none at CPL0.
    for (way, wanted) in ways.into_iter().enumerate() {
        sandbox.restart();
        sandbox.context.registers_mut().rflags = TF;
        sandbox.context.registers_mut().rdi = TF;
        sandbox.context.registers_mut().rsi = way as u64;
        let mut steps = 0;
        let last = loop {
            match sandbox.run(&thread) {
                UserExit::Exception { vector: Vector::DB, .. } => steps += 1,
                exit => break exit,
            }
            assert!(steps < 100);
        };
        assert_eq!(last, wanted);
        assert!((5..=9).contains(&steps), "{steps} steps");
        assert_ne!(sandbox.context.registers().rflags & TF, 0);
    }
    drop(sandbox);
    dune.leave();
}

fn stack_of_cpl3_does_not_matter() {
    let dune = enter();
    let thread = dune.thread();
    let local = [0x5a5a_5a5a_5a5a_5a5au64; 64];
    let heap = vec![0x5a5a_5a5au32; 1024];
    let idt = idt_base();
    let stacks = [
        0,
        8,
        &raw const local as u64 + 256,
        heap.as_ptr() as u64 + 2048,
        // Inside libdune's area: interrupt stack, handler stacks, block.
        idt,
        (idt & !0xf_ffff) + 0xf000,
        (idt & !0xf_ffff) + 0x9_8000,
        (idt & !0xf_ffff) + 0xf_f000,
        (idt & !0xf_ffff) + 64,
        0x7fff_ffff_f000,
        1 << 47,
        1 << 63,
        u64::MAX,
        0xffff_8000_0000_0000,
    ];
    let host_before = heap.clone();
    for stack in stacks {
        let mut sandbox = Sandbox::new(&thread, bad_stack());
        sandbox.context.registers_mut().rdi = stack;
        assert_eq!(sandbox.run(&thread), UserExit::Syscall, "{stack:#x}");
        assert_eq!(sandbox.context.registers().rsp, stack);
        // PUSH there: not its memory.
        match sandbox.run(&thread) {
            UserExit::PageFault(fault) => assert!(fault.is_write(), "{fault:?}"),
            UserExit::Exception { vector, .. } => assert!(vector == Vector::SS || vector == Vector::GP, "{stack:#x}"),
            exit => panic!("{exit:?} for {stack:#x}"),
        }
        let mut sandbox = Sandbox::new(&thread, bad_stack_trap());
        sandbox.context.registers_mut().rdi = stack;
        assert_eq!(sandbox.run(&thread), UNDEFINED, "{stack:#x}");
        assert_eq!(sandbox.context.registers().rsp, stack);
    }
    assert_eq!(heap, host_before);
    assert_eq!(local, [0x5a5a_5a5a_5a5a_5a5au64; 64]);
    dune.leave();
}

fn mov_ss_blocks_nothing_at_cpl0() {
    let dune = enter();
    let thread = dune.thread();
    let cases = [
        (mov_ss_syscall(), UserExit::Syscall),
        (mov_ss_int3(), exception(Vector::BP, 0)),
        (mov_ss_int80(), UserExit::Int80),
        (mov_ss_ud2(), UNDEFINED),
    ];
    for (code, wanted) in cases {
        for step in [0, 0x100] {
            let mut sandbox = Sandbox::new(&thread, code);
            sandbox.context.registers_mut().rflags = step;
            let mut exit = sandbox.run(&thread);
            for _ in 0..4 {
                if exit == exception(Vector::DB, 0) {
                    exit = sandbox.run(&thread);
                }
            }
            assert_eq!(exit, wanted, "TF {step:#x}");
        }
    }
    let mut sandbox = Sandbox::new(&thread, mov_ss_step());
    let mut exit = sandbox.run(&thread);
    for _ in 0..4 {
        if exit == exception(Vector::DB, 0) {
            exit = sandbox.run(&thread);
        }
    }
    assert_eq!(exit, UserExit::Syscall);
    drop(sandbox);
    dune.leave();
}

fn rip_that_is_not_canonical_is_an_exception() {
    let dune = enter();
    let thread = dune.thread();
    let mut sandbox = Sandbox::new(&thread, calls());
    for rip in [1 << 47, 1 << 63, 0xffff_7fff_ffff_ffff, 1 << 48] {
        sandbox.context.registers_mut().rip = rip;
        assert_eq!(sandbox.run(&thread), PROTECTION);
        assert_eq!(sandbox.context.registers().rip, rip);
    }
    for base in [1 << 47, 1 << 63] {
        sandbox.restart();
        sandbox.context.registers_mut().fs_base = base;
        assert_eq!(sandbox.run(&thread), PROTECTION);
        sandbox.context.registers_mut().fs_base = 0;
        sandbox.context.registers_mut().gs_base = base;
        assert_eq!(sandbox.run(&thread), PROTECTION);
        sandbox.context.registers_mut().gs_base = 0;
    }
    // The upper half is canonical: it is just not there.
    sandbox.context.registers_mut().rip = 0xffff_8000_0000_0000;
    assert!(matches!(sandbox.run(&thread), UserExit::PageFault(_)));

    // SYSCALL as the last instruction below the hole: RCX is behind it, where no RIP can be.
    let last = Gva::new(0x7fff_ffff_f000).unwrap();
    let hva = Hva::new(sandbox.page(DATA)).unwrap();
    poke(&thread, sandbox.page(DATA) + PAGE as u64 - 2, b"\x0f\x05");
    let space = dune.address_space();
    space
        .map(last, PAGE as u64, hva, Permissions::USER | Permissions::EXECUTE)
        .unwrap()
        .flush();
    sandbox.restart();
    sandbox.context.registers_mut().rip = (1 << 47) - 2;
    assert_eq!(sandbox.run(&thread), UserExit::Syscall);
    assert_eq!(sandbox.context.registers().rip, 1 << 47);
    assert_eq!(sandbox.run(&thread), PROTECTION);
    space.unmap(last, PAGE as u64).unwrap().flush();
    drop((space, sandbox));
    dune.leave();
}

thread_local! {
    static LOCAL: Cell<u64> = const { Cell::new(0) };
}

fn segment_bases_are_kept_apart() {
    let dune = enter();
    let thread = dune.thread();
    LOCAL.set(1);
    let mut sandbox = Sandbox::new(&thread, bases());
    let data = sandbox.page(DATA);
    poke(&thread, data, &[0x11]);
    sandbox.context.registers_mut().fs_base = data;
    sandbox.context.registers_mut().gs_base = data + 8;
    assert_eq!(sandbox.run(&thread), UserExit::Syscall);
    assert_eq!(sandbox.context.registers().rax & 0xff, 0x11);
    LOCAL.set(LOCAL.get() + 1);

    // Bad ones are CPL3's trouble.
    sandbox.restart();
    sandbox.context.registers_mut().fs_base = 0x1000;
    assert!(matches!(sandbox.run(&thread), UserExit::PageFault(fault) if fault.address == 0x1000));
    LOCAL.set(LOCAL.get() + 1);

    let mut sandbox = Sandbox::new(&thread, selectors());
    sandbox.context.registers_mut().fs_base = data;
    for _ in 0..2 {
        assert_eq!(sandbox.run(&thread), UserExit::Syscall);
        let r = sandbox.context.registers();
        assert_eq!((r.fs_base, r.gs_base), (0, 0));
        LOCAL.set(LOCAL.get() + 1);
    }
    if crate::helpers::cpu_has("fsgsbase") {
        let mut sandbox = Sandbox::new(&thread, write_bases());
        assert_eq!(sandbox.run(&thread), UserExit::Syscall);
        let r = sandbox.context.registers();
        assert_eq!((r.fs_base, r.gs_base), (0x111_1000, 0x222_2000));
        LOCAL.set(LOCAL.get() + 1);
        assert_eq!(sandbox.run(&thread), UserExit::Syscall);
        let r = sandbox.context.registers();
        assert_eq!((r.rbx, r.rdx), (0x111_1000, 0x222_2000));
    } else {
        LOCAL.set(LOCAL.get() + 1);
    }
    assert_eq!(LOCAL.get(), 6);
    drop(sandbox);
    dune.leave();
    assert_eq!(LOCAL.get(), 6);
}

fn extended_state_is_kept_apart() {
    const MXCSR_INIT: u64 = 0x1f80;
    let dune = enter();
    let thread = dune.thread();
    let mut sandbox = Sandbox::new(&thread, extended());
    let secret = 0x5ec7_e75e_c7e7u64;
    // SAFETY: loads registers, and declares them.
    unsafe {
        asm!("movq xmm0, {0}", "movq xmm7, {0}", "movq xmm15, {0}", in(reg) secret, out("xmm0") _, out("xmm7") _, out("xmm15") _)
    };
    assert_eq!(sandbox.run(&thread), UserExit::Syscall);
    let r = *sandbox.context.registers();
    assert_eq!((r.rax, r.rbx, r.rsi, r.rdx), (0, 0, 0, MXCSR_INIT));
    let (mxcsr, control) = control_words();
    assert_eq!(sandbox.run(&thread), UserExit::Syscall);
    assert_eq!(control_words(), (mxcsr, control));
    // The x87 stack is empty again, and computes.
    let mut result = 0f64;
    // SAFETY: leaves the x87 stack as it was.
    unsafe {
        asm!("fld1", "fld1", "faddp", "fstp qword ptr [{}]", in(reg) &mut result, out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _, out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _);
    }
    assert_eq!(result, 2.0);
    assert_eq!(sandbox.run(&thread), UserExit::Syscall);
    let r = *sandbox.context.registers();
    assert_eq!((r.rax, r.rdx), (0x5555, 0), "CPL3 finds its own again");

    // An x87 exception that waits for the next x87 instruction: not the host's.
    let mut sandbox = Sandbox::new(&thread, fpu_pending());
    for _ in 0..3 {
        assert_eq!(sandbox.run(&thread), UserExit::Syscall);
        assert_eq!(control_words(), (mxcsr, control));
        // SAFETY: waits for exceptions of the x87 unit.
        unsafe { asm!("fwait") };
        sandbox.restart();
        sandbox.context = UserContext::new(&thread);
        sandbox.restart();
    }
    drop(sandbox);
    dune.leave();
}

fn control_words() -> (u32, u16) {
    let mut mxcsr = 0u32;
    let mut control = 0u16;
    // SAFETY: stores two words.
    unsafe { asm!("stmxcsr [{}]", "fnstcw [{}]", in(reg) &mut mxcsr, in(reg) &mut control) };
    (mxcsr & !0x3f, control)
}

fn cpl3_runs_32_bit_code() {
    let dune = enter();
    let thread = dune.thread();
    // Below 4 GiB: its stack pointer has 32 bits there.
    let low = (0x1000_0000..0x7000_0000)
        .step_by(0x100_0000)
        .find_map(|address| Map::try_at(address, PAGES * PAGE))
        .unwrap();
    // SAFETY: our own pages.
    let result = unsafe {
        libc::mprotect(
            low.start.cast(),
            low.bytes,
            libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
        )
    };
    assert_eq!(result, 0);
    let mut sandbox = Sandbox::on(&thread, low, to_32());
    assert_eq!(sandbox.run(&thread), UserExit::Int80);
    assert!(sandbox.context.is_32bit());
    assert_eq!(sandbox.context.registers().rax, 12345);
    // INC EAX in 32-bit mode; a prefix in 64-bit mode.
    assert_eq!(sandbox.run(&thread), UserExit::Int80);
    assert_eq!(sandbox.context.registers().rax, 12346);
    sandbox.context.set_32bit(false);
    sandbox.context.registers_mut().rip -= 5;
    assert_eq!(sandbox.run(&thread), UserExit::Int80);
    drop(sandbox);
    dune.leave();
}

fn cpl3_cannot_keep_the_cpu() {
    const TICKS: u64 = 20_000_000;
    let dune = enter();
    let thread = dune.thread();
    let mut sandbox = Sandbox::new(&thread, spin());
    let mut last = 0;
    for _ in 0..3 {
        let start = ticks();
        assert_eq!(sandbox.context.run_for(&thread, TICKS), UserExit::Timeout);
        check_cpl0();
        let took = ticks() - start;
        assert!(took >= TICKS, "{took}");
        println!("report: {TICKS} ticks became {took}");
        let now = sandbox.context.registers().rax;
        assert!(now > last + 1000, "{now} after {last}");
        last = now;
    }
    // Nothing of it stays.
    assert_eq!(sandbox.context.run_for(&thread, 0), UserExit::Timeout);
    assert_eq!(sandbox.context.registers().rax, last);
    // SAFETY: reads the process' id.
    assert!(unsafe { libc::getpid() } > 0);

    // One that exits all the time, so that interrupts come in the host.
    let mut sandbox = Sandbox::new(&thread, spin_on_cpuid());
    assert_eq!(sandbox.context.run_for(&thread, TICKS), UserExit::Timeout);
    assert!(sandbox.context.registers().r8 > 100);
    // And one that makes system calls.
    let mut sandbox = Sandbox::new(&thread, call_loop());
    let start = ticks();
    while ticks() - start < TICKS {
        assert_eq!(sandbox.context.run_for(&thread, PLENTY), UserExit::Syscall);
    }
    drop(sandbox);
    dune.leave();
}

/// The host loop sees the process' memory, not the page table: what it has to say to a visit must not go to the address
/// of the same number.
fn cpl3_comes_out_into_a_page_that_was_copied() {
    const TICKS: u64 = 5_000_000;
    let dune = enter();
    let thread = dune.thread();
    let mut sandbox = Sandbox::new(&thread, spin());
    let context = std::mem::replace(&mut sandbox.context, UserContext::new(&thread));
    let pool = FramePool::new().unwrap();
    let first = dune.address_space();
    let work = first.duplicate().unwrap();
    // SAFETY: a duplicate.
    unsafe { dune.load(&work) };
    let page = Map::new(PAGE);
    let place = page.page(0) as *mut UserContext;
    // SAFETY: a page of our own.
    unsafe { place.write(context) };
    let kept = work
        .snapshot(Gva::new(place as u64).unwrap(), PAGE as u64, &pool)
        .unwrap();
    // SAFETY: just written; nobody else has it.
    let context = unsafe { &mut *place };
    let mut last = 0;
    for _ in 0..3 {
        assert_eq!(context.run_for(&thread, TICKS), UserExit::Timeout);
        let now = context.registers().rax;
        assert!(now > last + 1000, "{now} after {last}");
        last = now;
    }
    assert_eq!(pool.used(), 1);
    // SAFETY: a duplicate; in it the context is what it was.
    unsafe {
        dune.load(&kept);
        assert_eq!((*place).registers().rax, 0);
        place.drop_in_place();
        dune.load(&first);
    }
    drop((work, kept, sandbox));
    assert_eq!(pool.used(), 0);
    dune.leave();
}

static SIGNALS: AtomicU64 = AtomicU64::new(0);

extern "C" fn count_signal(_: i32) {
    SIGNALS.fetch_add(1, Relaxed);
    LOCAL.set(LOCAL.get() + 1);
    check_cpl0();
    // What it leaves in registers must not reach CPL3.
    // SAFETY: declared.
    unsafe { asm!("movq xmm3, {0}", in(reg) !0u64, out("xmm3") _) };
}

fn signals_are_delivered_while_at_cpl3() {
    let dune = enter();
    let thread = dune.thread();
    set_plain_handler(libc::SIGALRM, count_signal, 0);
    LOCAL.set(0);
    let mut sandbox = Sandbox::new(&thread, spin());
    sandbox.context.registers_mut().fs_base = sandbox.page(DATA);
    timer(libc::ITIMER_REAL, 5000);
    let mut runs = 0;
    while SIGNALS.load(Relaxed) < 10 {
        assert_eq!(sandbox.context.run_for(&thread, 5_000_000), UserExit::Timeout);
        runs += 1;
    }
    println!("report: 10 signals in {runs} visits");
    // Without a deadline, too: the handler runs, CPL3 goes on.
    assert_eq!(sandbox.context.registers().fs_base, sandbox.page(DATA));

    // At any point of the way in and out.
    timer(libc::ITIMER_REAL, 0);
    let mut sandbox = Sandbox::new(&thread, call_loop());
    let data = sandbox.page(DATA);
    let r = sandbox.context.registers_mut();
    (r.rbx, r.rbp, r.rdx, r.rsi, r.rdi) = (1, 2, 3, 4, 5);
    (r.r8, r.r9, r.r10, r.r12, r.r13, r.r14) = (8, 9, 10, 12, 13, 14);
    (r.fs_base, r.gs_base) = (data, data + 8);
    let mut wanted = *r;
    let before = SIGNALS.load(Relaxed);
    let mut calls = 0u64;
    let mut seen = before - 1;
    while SIGNALS.load(Relaxed) < before + 200 {
        // One at a time: signals that come faster than they can be handled leave no time for calls.
        if SIGNALS.load(Relaxed) != seen {
            seen = SIGNALS.load(Relaxed);
            set_timer(libc::ITIMER_REAL, 300 + (seen as i64 * 37) % 150, 0);
        }
        calls += 1;
        assert_eq!(sandbox.context.run(&thread), UserExit::Syscall);
        wanted.r15 = calls;
        let r = sandbox.context.registers();
        (wanted.rip, wanted.rcx, wanted.r11, wanted.rflags, wanted.rax) = (r.rip, r.rip, r.r11, r.r11, r.rax);
        assert_eq!(*r, wanted);
        LOCAL.set(LOCAL.get());
    }
    timer(libc::ITIMER_REAL, 0);
    println!("report: {} signals in {calls} calls", SIGNALS.load(Relaxed) - before);
    assert_eq!(LOCAL.get(), SIGNALS.load(Relaxed));
    drop(sandbox);
    dune.leave();
}

static JUMP: AtomicU64 = AtomicU64::new(0);

extern "C" {
    #[link_name = "__sigsetjmp"]
    fn sigsetjmp(buffer: *mut u64, save: i32) -> i32;
    fn siglongjmp(buffer: *mut u64, value: i32) -> !;
}

extern "C" fn jump_out(_: i32) {
    // SAFETY: the frame that set it is still there.
    unsafe { siglongjmp(JUMP.load(Relaxed) as *mut u64, 1) };
}

fn signal_handler_may_jump_out_of_cpl3() {
    let dune = enter();
    let thread = dune.thread();
    set_plain_handler(libc::SIGALRM, jump_out, 0);
    let mut buffer = Box::new([0u64; 64]);
    JUMP.store(buffer.as_mut_ptr() as u64, Relaxed);
    static ROUNDS: AtomicI32 = AtomicI32::new(0);
    let sandbox = Box::leak(Box::new(Sandbox::new(&thread, spin())));
    // SAFETY: what is used behind it lives in statics and boxes.
    unsafe { sigsetjmp(buffer.as_mut_ptr(), 1) };
    check_cpl0();
    if ROUNDS.fetch_add(1, Relaxed) < 5 {
        timer(libc::ITIMER_REAL, 2000);
        let exit = sandbox.context.run(&thread);
        panic!("{exit:?}");
    }
    timer(libc::ITIMER_REAL, 0);
    let mut other = Sandbox::new(&thread, calls());
    assert_eq!(other.run(&thread), UserExit::Syscall);
    drop(other);
    dune.leave();
}

static INNER: AtomicU64 = AtomicU64::new(0);

fn visit_inside() {
    Thread::with_current(|thread| {
        let mut inner = Sandbox::new(thread, calls());
        assert_eq!(inner.run(thread), UserExit::Syscall);
        assert_eq!(inner.run(thread), UserExit::Syscall);
    });
    INNER.fetch_add(1, Relaxed);
}

extern "C" fn visit_in_signal_handler(_: i32) {
    visit_inside();
}

fn visit_in_exception_handler(frame: &mut TrapFrame, _: &Thread<'_>) -> Outcome {
    visit_inside();
    frame.rip += 2;
    Outcome::Resume
}

fn visits_to_cpl3_nest() {
    let dune = enter();
    let thread = dune.thread();
    set_plain_handler(libc::SIGALRM, visit_in_signal_handler, 0);
    let mut sandbox = Sandbox::new(&thread, spin());
    timer(libc::ITIMER_REAL, 10_000);
    let mut last = 0;
    while INNER.load(Relaxed) < 5 {
        assert_eq!(sandbox.context.run_for(&thread, 10_000_000), UserExit::Timeout);
        let now = sandbox.context.registers().rax;
        assert!(now > last);
        last = now;
    }
    timer(libc::ITIMER_REAL, 0);
    // On a handler's stack.
    dune.set_exception_handler(Vector::UD, visit_in_exception_handler);
    let before = INNER.load(Relaxed);
    let kept: u64;
    // SAFETY: the handler skips the instruction.
    unsafe { asm!("ud2", inout("r12") 77u64 => kept) };
    assert_eq!((kept, INNER.load(Relaxed)), (77, before + 1));
    drop(sandbox);
    dune.leave();
}

fn threads_visit_cpl3_at_once() {
    let dune = enter();
    let threads: Vec<_> = (0..4u64)
        .map(|number| {
            thread::spawn(move || {
                Thread::with_current(|thread| {
                    LOCAL.set(number);
                    let mut sandbox = Sandbox::new(thread, call_loop());
                    sandbox.context.registers_mut().rbx = number;
                    for round in 1..=20_000 {
                        assert_eq!(sandbox.context.run(thread), UserExit::Syscall);
                        let r = sandbox.context.registers();
                        assert_eq!((r.rbx, r.r15), (number, round));
                        assert_eq!(LOCAL.get(), number);
                    }
                    let mut sandbox = Sandbox::new(thread, spin());
                    assert_eq!(sandbox.context.run_for(thread, 5_000_000), UserExit::Timeout);
                })
                .expect("not in Dune mode");
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    dune.leave();
}

fn child_of_fork_visits_cpl3() {
    let dune = enter();
    let mut sandbox = Sandbox::new(&dune.thread(), calls());
    assert_eq!(sandbox.run(&dune.thread()), UserExit::Syscall);
    // SAFETY: a child of a process with one thread.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let exit = Thread::with_current(|thread| sandbox.context.run(thread));
        let status = if exit == Some(UserExit::Syscall) && cs() & 3 == 0 {
            7
        } else {
            1
        };
        // SAFETY: ends the child.
        unsafe { libc::_exit(status) };
    }
    let mut status = 0;
    // SAFETY: our own child.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 7, "{status:#x}");
    assert_eq!(sandbox.run(&dune.thread()), UserExit::Syscall);
    drop(sandbox);
    dune.leave();
}

fn user_slice_copies_what_cpl3_may_access() {
    let dune = enter();
    let thread = dune.thread();
    let sandbox = Sandbox::new(&thread, calls());
    let (stack, data, secret) = (sandbox.page(STACK), sandbox.page(DATA), sandbox.page(SECRET));
    let slice = UserSlice::writable(&thread, data + 8, 16).unwrap();
    slice.write(b"0123456789abcdef").unwrap();
    assert_eq!(slice.to_vec().unwrap(), b"0123456789abcdef");
    check_cpl0();
    let mut part = [0; 4];
    slice.read(&mut part).unwrap();
    assert_eq!(&part, b"0123");
    assert!(slice.write(&[0; 17]).is_err());
    assert!(slice.read(&mut [0; 17]).is_err());
    assert!(UserSlice::readable(&thread, data, 16).unwrap().write(&[0; 4]).is_err());

    let fault = |address, is_write| UserFault { address, is_write };
    // Two pages that are its own; then one more byte.
    assert!(UserSlice::writable(&thread, stack, 2 * PAGE).is_ok());
    assert_eq!(
        UserSlice::readable(&thread, stack, 2 * PAGE + 1).unwrap_err(),
        fault(secret, false)
    );
    assert_eq!(
        UserSlice::writable(&thread, sandbox.page(CODE), 1).unwrap_err(),
        fault(sandbox.page(CODE), true)
    );
    assert!(UserSlice::readable(&thread, sandbox.page(CODE), PAGE).is_ok());
    assert_eq!(
        UserSlice::readable(&thread, &raw const part as u64, 4).unwrap_err(),
        fault(&raw const part as u64, false)
    );
    for (start, bytes) in [
        (u64::MAX, 2),
        (u64::MAX - 4, 5),
        (data, usize::MAX),
        (data, usize::MAX / 2),
        (1 << 63, 1),
        (0, 1),
        (0x7fff_ffff_ffff, 2),
    ] {
        assert!(
            UserSlice::readable(&thread, start, bytes).is_err(),
            "{start:#x} {bytes:#x}"
        );
    }
    assert!(UserSlice::readable(&thread, 0, 0).is_ok_and(|slice| slice.is_empty()));

    // The process' memory goes away between check and copy.
    let gone = Map::new(2 * PAGE);
    gone.write(0, 1);
    gone.write(PAGE, 1);
    let start = gone.start as u64;
    let space = dune.address_space();
    space
        .protect(
            Gva::new(start).unwrap(),
            2 * PAGE as u64,
            Permissions::USER | Permissions::WRITE,
        )
        .unwrap()
        .flush();
    let slice = UserSlice::writable(&thread, start, 2 * PAGE).unwrap();
    assert!(slice.to_vec().is_ok());
    // SAFETY: our own page.
    assert_eq!(
        unsafe { libc::mprotect((start as usize + PAGE) as *mut _, PAGE, libc::PROT_NONE) },
        0
    );
    assert_eq!(slice.to_vec().unwrap_err(), fault(start + PAGE as u64, false));
    assert_eq!(
        slice.write(&[1; 2 * PAGE]).unwrap_err(),
        fault(start + PAGE as u64, true)
    );
    check_cpl0();

    // A fault on the host's side is the host's: its handler lets it through.
    static OWN: AtomicU64 = AtomicU64::new(0);
    let own = Map::new(PAGE);
    own.write(0, 1);
    let page = Gva::new(own.start as u64).unwrap();
    space.protect(page, PAGE as u64, Permissions::READ).unwrap().flush();
    dune.set_exception_handler(Vector::PF, |frame, thread| {
        OWN.store(frame.cr2, Relaxed);
        let page = Gva::new(frame.cr2).unwrap();
        let space = thread.address_space();
        space.protect(page, PAGE as u64, Permissions::ALL).unwrap().flush();
        Outcome::Resume
    });
    let slice = UserSlice::readable(&thread, data + 8, 16).unwrap();
    // SAFETY: our own page.
    slice
        .read(unsafe { std::slice::from_raw_parts_mut(own.start, 16) })
        .unwrap();
    assert_eq!(OWN.load(Relaxed), own.start as u64);
    assert_eq!(own.read(0), u64::from_le_bytes(*b"01234567"));
    drop((space, sandbox));
    dune.leave();
}

/// A single step of CPL0 over SYSCALL is the program's, as it was without CPL3.
fn cpl0_may_step_over_a_system_call() {
    static STEPS: AtomicU64 = AtomicU64::new(0);
    let dune = enter();
    dune.set_exception_handler(Vector::DB, |_, _| {
        STEPS.fetch_add(1, Relaxed);
        Outcome::Resume
    });
    let pid: u64;
    // SAFETY: getpid, with each instruction reported to the handler.
    unsafe {
        asm!(
            "pushfq", "or dword ptr [rsp], 0x100", "popfq",
            "syscall",
            "pushfq", "and dword ptr [rsp], 0xfffffeff", "popfq",
            inout("rax") libc::SYS_getpid as u64 => pid, out("rcx") _, out("r11") _,
        )
    };
    assert_eq!(pid, std::process::id().into());
    assert!(STEPS.load(Relaxed) >= 3, "{}", STEPS.load(Relaxed));
    check_cpl0();
    dune.leave();
}

fn cpl0_does_not_execute_pages_of_cpl3() {
    let dune = enter();
    let thread = dune.thread();
    let sandbox = Sandbox::new(&thread, b"\xc3");
    static SEEN: AtomicU64 = AtomicU64::new(0);
    dune.set_exception_handler(Vector::PF, |frame, _| {
        if frame.rip != frame.cr2 {
            return Outcome::Unhandled;
        }
        SEEN.store(frame.error_code, Relaxed);
        // As the RET there would have done.
        // SAFETY: the return address.
        frame.rip = unsafe { *(frame.rsp as *const u64) };
        frame.rsp += 8;
        Outcome::Resume
    });
    // SAFETY: a function that returns; or a fault whose handler returns for it.
    unsafe {
        let function: extern "C" fn() = std::mem::transmute(sandbox.page(CODE) as usize);
        function();
    }
    assert_eq!(SEEN.load(Relaxed), 0x11, "SMEP");
    drop(sandbox);
    dune.leave();
}

fn cpl0_accesses_cpl3_by_user_slice_only() {
    let dune = enter();
    let thread = dune.thread();
    let mut sandbox = Sandbox::new(&thread, flags());
    install_probe(&dune);
    let data = sandbox.page(DATA);
    let fault = load(data as usize).unwrap_err();
    assert_eq!((fault.address, fault.error_code), (data, 1));
    // CPL3 sets AC, which is the key: it is taken away on the way out, whichever that is.
    for way in 0..3 {
        sandbox.restart();
        sandbox.context.registers_mut().rdi = 1 << 18;
        sandbox.context.registers_mut().rsi = way;
        sandbox.run(&thread);
        assert!(load(data as usize).is_err());
    }
    assert!(UserSlice::readable(&thread, data, 8).unwrap().to_vec().is_ok());
    assert!(load(data as usize).is_err());
    drop(sandbox);
    dune.leave();
}

/// A handler's frame may go to CPL3 by itself. What happens there and nobody takes ends the process: natively that code would
/// have all that the process has, `int 0x80` for one, and a signal handler would start on its stack.
fn cpl3_that_nobody_waits_for_stays_in_dune_mode() {
    static RIP: AtomicU64 = AtomicU64::new(0);
    static RSP: AtomicU64 = AtomicU64::new(0);
    fn to_cpl3(frame: &mut TrapFrame, _: &Thread<'_>) -> Outcome {
        frame.rip = RIP.load(SeqCst);
        frame.rsp = RSP.load(SeqCst);
        (frame.cs, frame.ss) = (0x33, 0x2b);
        Outcome::Resume
    }
    extern "C" fn never(_: i32) {
        std::process::exit(7);
    }
    let cases = [("calls", calls()), ("store_word", store_word()), ("spin", spin())];
    // Each signal finds some other instruction, at CPL3 or of what answers.
    let call_loops = std::iter::repeat_n(("call_loop", call_loop()), 12);
    for (name, code) in cases.into_iter().chain(call_loops) {
        let ended = spawn(|| {
            let dune = enter();
            let thread = dune.thread();
            let sandbox = Sandbox::new(&thread, code);
            RIP.store(sandbox.map.page(CODE) as u64, SeqCst);
            RSP.store(sandbox.map.page(STACK + 1) as u64, SeqCst);
            // SAFETY: The handler ends the process.
            unsafe {
                libc::signal(libc::SIGALRM, never as extern "C" fn(i32) as libc::sighandler_t);
                libc::signal(libc::SIGSEGV, never as extern "C" fn(i32) as libc::sighandler_t);
                if name == "spin" || name == "call_loop" {
                    set_timer(libc::ITIMER_REAL, 30_000, 0);
                }
            }
            dune.set_exception_handler(Vector::BP, to_cpl3);
            // SAFETY: The handler takes it; nothing comes back.
            unsafe { asm!("int3", in("rdi") 8u64) };
            unreachable!();
        })
        .wait();
        assert!(ended.output.contains("no UserContext runs"), "{name}: {ended:?}");
        assert_ne!(ended.signal(), None, "{name}: {ended:?}");
    }
}

/// Handlers take exceptions of CPL3 that they sent there themselves, page faults and others, with what CPL3 had in its
/// registers, and go on at CPL0 or again at CPL3.
fn handlers_take_exceptions_of_cpl3() {
    static SANDBOX: AtomicU64 = AtomicU64::new(0);
    static BACK: [AtomicU64; 5] = [const { AtomicU64::new(0) }; 5];
    static SEEN: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];
    /// From CPL0 to CPL3, and from there back.
    fn cross(frame: &mut TrapFrame, _: &Thread<'_>) -> Outcome {
        if frame.is_cpl3() {
            SEEN[0].fetch_add(1, SeqCst);
            SEEN[1].store(frame.rbx, SeqCst);
            let [rip, rsp, rflags, cs, ss] = BACK.each_ref().map(|word| word.load(SeqCst));
            (frame.rip, frame.rsp, frame.rflags) = (rip, rsp, rflags);
            (frame.cs, frame.ss) = (cs, ss);
            return Outcome::Resume;
        }
        let back = [frame.rip, frame.rsp, frame.rflags, frame.cs, frame.ss];
        BACK.iter()
            .zip(back)
            .for_each(|(word, value)| word.store(value, SeqCst));
        let sandbox = SANDBOX.load(SeqCst);
        (frame.rip, frame.rsp) = (sandbox, sandbox + ((STACK + 1) * PAGE) as u64);
        (frame.cs, frame.ss) = (0x33, 0x2b);
        Outcome::Resume
    }
    /// Gives CPL3 the page that it has not.
    fn give(frame: &mut TrapFrame, thread: &Thread<'_>) -> Outcome {
        if !frame.is_cpl3() {
            return Outcome::Unhandled;
        }
        SEEN[2].fetch_add(1, SeqCst);
        SEEN[3].store(frame.error_code, SeqCst);
        let page = Gva::new(frame.cr2 & !(PAGE as u64 - 1)).unwrap();
        let permissions = Permissions::USER | Permissions::WRITE;
        match thread.address_space().protect(page, PAGE as u64, permissions) {
            Ok(flush) => flush.flush(),
            Err(_) => return Outcome::Unhandled,
        }
        Outcome::Resume
    }
    const USER_WRITE: u64 = 0b111;
    let dune = enter();
    let thread = dune.thread();
    // mov [rdi], rbx; int3
    let sandbox = Sandbox::new(&thread, &[0x48, 0x89, 0x1f, 0xcc]);
    SANDBOX.store(sandbox.map.page(CODE) as u64, SeqCst);
    dune.set_exception_handler(Vector::BP, cross);
    dune.set_exception_handler(Vector::PF, give);
    let secret = sandbox.map.page(SECRET) as u64;
    for value in [0x1234u64, 0x5678] {
        // SAFETY: The handlers take it there and back; RBX is restored.
        unsafe {
            asm!("push rbx", "mov rbx, {value}", "int3", "pop rbx", value = in(reg) value, in("rdi") secret);
        }
        assert_eq!(SEEN[1].load(SeqCst), value);
        // It is CPL3's by now.
        let word = UserSlice::readable(&thread, secret, 8).unwrap().to_vec().unwrap();
        assert_eq!(word, value.to_le_bytes());
    }
    // The page was missing the first time only.
    assert_eq!(
        [0, 2, 3].map(|index: usize| SEEN[index].load(SeqCst)),
        [2, 1, USER_WRITE]
    );
    check_cpl0();
    drop(sandbox);
    dune.leave();
}

/// Who leaves Dune mode while somebody has a token, or on a handler's stack, would leave them without their memory.
fn token_that_is_lent_keeps_dune_mode() {
    let ended = spawn(|| {
        let dune = enter();
        Thread::with_current(|thread| {
            dune.leave();
            thread.vcpu()
        });
        unreachable!();
    })
    .wait();
    assert_eq!(ended.signal(), Some(libc::SIGABRT), "{ended:?}");
    assert!(ended.output.contains("leaves Dune mode in"), "{ended:?}");
    let dune = enter();
    assert_eq!(Thread::with_current(|thread| thread.vcpu()), Some(0));
    dune.leave();
}
