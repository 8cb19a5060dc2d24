// SPDX-License-Identifier: MIT OR Apache-2.0
//! Exceptions taken in Dune mode.

use std::arch::asm;
use std::arch::global_asm;
use std::ptr;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use libdune::Dune;
use libdune::Gva;
use libdune::Outcome;
use libdune::Permissions;
use libdune::Thread;
use libdune::TrapFrame;
use libdune::Vector;

use crate::framework::Test;
use crate::support::assert_no_exits;
use crate::support::enter;
use crate::support::exits;
use crate::support::install_probe;
use crate::support::load;
use crate::support::probe_faults;
use crate::support::set_plain_handler;
use crate::support::spawn;
use crate::support::store;
use crate::support::Map;
use crate::support::PAGE;

pub const TESTS: &[Test] = &[
    Test::asserting("divide_error_handled", divide_error_handled),
    Test::asserting("page_fault_handled_without_vm_exit", page_fault_handled_without_vm_exit),
    Test::asserting("registers_survive_fault", registers_survive_fault),
    Test::asserting("nested_page_fault_three_deep", nested_page_fault_three_deep),
    Test::asserting("nesting_limit_is_reported", nesting_limit_is_reported),
    Test::asserting("fault_with_unmapped_program_stack", fault_with_unmapped_program_stack),
    Test::asserting("handler_may_make_system_calls", handler_may_make_system_calls),
    Test::asserting("handler_may_leave_by_a_jump", handler_may_leave_by_a_jump),
    Test::asserting(
        "unclaimed_exception_becomes_its_signal",
        unclaimed_exception_becomes_its_signal,
    ),
    Test::asserting("each_vector_reaches_its_handler", each_vector_reaches_its_handler),
    Test::asserting(
        "divide_error_inside_page_fault_handler",
        divide_error_inside_page_fault_handler,
    ),
    Test::asserting(
        "fault_inside_malloc_with_plain_handler_does_not_deadlock",
        fault_inside_malloc_with_plain_handler_does_not_deadlock,
    ),
    Test::asserting("unclaimed_int3_is_sigtrap", unclaimed_int3_is_sigtrap),
];

static COUNT: AtomicU64 = AtomicU64::new(0);

fn gva(address: usize) -> Gva {
    Gva::new(address as u64).unwrap()
}

/// `div` with 0, 2 bytes; what the handler puts into RAX is the quotient.
fn divide_by_zero() -> u64 {
    let quotient: u64;
    // SAFETY: the tests install a handler that goes on behind the instruction.
    unsafe { asm!("xor edx, edx", "div {0:e}", in(reg) 0, inout("rax") 7u64 => quotient, out("rdx") _) };
    quotient
}

/// Length of `div r32`; with a register above R7 it has a prefix.
fn div_bytes(rip: u64) -> u64 {
    // SAFETY: RIP is at an instruction of this program.
    let first = unsafe { (rip as *const u8).read_volatile() };
    if first & 0xf0 == 0x40 {
        3
    } else {
        2
    }
}

fn skip_div(frame: &mut TrapFrame, _: &Thread<'_>) -> Outcome {
    COUNT.fetch_add(1, Relaxed);
    frame.rip += div_bytes(frame.rip);
    frame.rax = 4711;
    Outcome::Resume
}

fn divide_error_handled() {
    let dune = enter();
    dune.set_exception_handler(Vector::DE, skip_div);
    let before = dune.counters();
    for _ in 0..100 {
        assert_eq!(divide_by_zero(), 4711);
    }
    let after = dune.counters();
    assert_eq!(COUNT.load(Relaxed), 100);
    // The first may bring memory in.
    assert!(
        exits(&before, &after) < 20,
        "{} exits for 100 exceptions",
        exits(&before, &after)
    );
    assert_no_exits(&dune, || assert_eq!(divide_by_zero(), 4711));
    dune.leave();
}

fn page_fault_handled_without_vm_exit() {
    let map = Map::new(4 * PAGE);
    map.write(PAGE, 1);
    let dune = enter();
    install_probe(&dune);
    let space = dune.address_space();
    let page = map.page(1);
    space
        .protect(gva(page), PAGE as u64, Permissions::READ)
        .unwrap()
        .flush();
    // Bring everything in.
    assert_eq!(load(page), Ok(1));
    assert!(store(page, 2).is_err());

    let faults = probe_faults();
    assert_no_exits(&dune, || {
        for _ in 0..1000 {
            let fault = store(page, 2).unwrap_err();
            // Present, write.
            assert_eq!((fault.error_code, fault.host_refused), (3, false));
            assert_eq!(fault.address, page as u64);
            assert_eq!(load(page), Ok(1));
        }
    });
    assert_eq!(probe_faults() - faults, 3000);

    // Nothing of it is Linux' business: outside, the page is writable.
    space
        .protect(gva(page), PAGE as u64, Permissions::WRITE)
        .unwrap()
        .flush();
    assert_eq!(store(page, 3), Ok(()));
    space
        .protect(gva(page), PAGE as u64, Permissions::NONE)
        .unwrap()
        .flush();
    let fault = load(page).unwrap_err();
    assert_eq!((fault.error_code & 7, fault.host_refused), (0, false), "{fault:x?}");
    dune.leave();
    assert_eq!(map.read(PAGE), 3);
}

// All registers get a pattern, then an exception comes (`div` by zero, 2 bytes), then they are stored.
global_asm!(
    ".pushsection .text.dune_test_registers, \"ax\", @progbits",
    ".globl dune_test_fault_registers",
    // rdi: [u64; 17], in and out: rax rcx rdx rbx rbp rsi rdi r8 … r15, rflags, rsp (out only)
    "dune_test_fault_registers:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "push rdi",
    "mov rcx, [rdi + 8]",
    "mov rbx, [rdi + 24]",
    "mov rbp, [rdi + 32]",
    "mov rsi, [rdi + 40]",
    "mov r8, [rdi + 56]",
    "mov r9, [rdi + 64]",
    "mov r10, [rdi + 72]",
    "mov r11, [rdi + 80]",
    "mov r12, [rdi + 88]",
    "mov r13, [rdi + 96]",
    "mov r14, [rdi + 104]",
    "mov r15, [rdi + 112]",
    "push qword ptr [rdi + 120]",
    "mov rax, [rdi]",
    "mov rdx, [rdi + 16]",
    "mov rdi, [rdi + 48]",
    "popfq",
    // The red zone, all of it.
    "mov qword ptr [rsp - 8], rbx",
    "mov qword ptr [rsp - 64], rbp",
    "mov qword ptr [rsp - 128], r15",
    ".globl dune_test_fault_registers_at",
    "dune_test_fault_registers_at:",
    "ud2",
    "pushfq",
    "push rdi",
    "mov rdi, [rsp + 16]",
    "mov [rdi], rax",
    "mov [rdi + 8], rcx",
    "mov [rdi + 16], rdx",
    "mov [rdi + 24], rbx",
    "mov [rdi + 32], rbp",
    "mov [rdi + 40], rsi",
    "mov [rdi + 56], r8",
    "mov [rdi + 64], r9",
    "mov [rdi + 72], r10",
    "mov [rdi + 80], r11",
    "mov [rdi + 88], r12",
    "mov [rdi + 96], r13",
    "mov [rdi + 104], r14",
    "mov [rdi + 112], r15",
    "pop qword ptr [rdi + 48]",
    "pop qword ptr [rdi + 120]",
    // -8 was overwritten by our own push; the rest of the red zone must be whole.
    "xor eax, eax",
    "cmp [rsp - 64], rbp",
    "jne 2f",
    "cmp [rsp - 128], r15",
    "jne 2f",
    "inc eax",
    "2:",
    "add rsp, 8",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    ".popsection",
);

extern "C" {
    fn dune_test_fault_registers(registers: *mut u64) -> u32;
    static dune_test_fault_registers_at: u8;
}

/// Skips UD2, having used every register and the FPU itself.
fn skip_ud2(frame: &mut TrapFrame, _: &Thread<'_>) -> Outcome {
    // SAFETY: the address of code.
    let expected = unsafe { ptr::from_ref(&dune_test_fault_registers_at) } as u64;
    if frame.rip != expected {
        return Outcome::Unhandled;
    }
    let mut sum = frame.rip as f64;
    for round in 0..100 {
        sum = (sum + f64::from(round)).sqrt();
    }
    std::hint::black_box(sum);
    COUNT.fetch_add(1, Relaxed);
    frame.rip += 2;
    Outcome::Resume
}

fn registers_survive_fault() {
    let dune = enter();
    dune.set_exception_handler(Vector::UD, skip_ud2);
    for round in 0..50u64 {
        let mut registers = [0u64; 16];
        for (index, register) in registers.iter_mut().enumerate() {
            *register = (0x0101_0101_0101_0101 * (index as u64 + 1)) ^ (round << 32);
        }
        // CF PF AF ZF SF OF by turns, IOPL as it is at CPL0.
        registers[15] = 0x3002 | [0, 0x8d5, 0x40, 0x801][round as usize % 4];
        let mut after = registers;
        // SAFETY: the array is what the function wants.
        let red_zone_is_whole = unsafe { dune_test_fault_registers(after.as_mut_ptr()) };
        // IF is of no consequence; RF is cleared by the CPU.
        assert_eq!(after[15] & 0x3cd5, registers[15] & 0x3cd5, "flags");
        assert_eq!(after[..15], registers[..15], "round {round}");
        assert_eq!(red_zone_is_whole, 1, "red zone");
    }
    assert_eq!(COUNT.load(Relaxed), 50);
    dune.leave();
}

static PAGES: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];
static DEPTH: AtomicU64 = AtomicU64::new(0);
static DEEPEST: AtomicU64 = AtomicU64::new(0);

/// Unprotects the page that faulted, after having touched the next protected one: its handler runs inside this one.
fn nesting_handler(frame: &mut TrapFrame, thread: &Thread<'_>) -> Outcome {
    let depth = DEPTH.fetch_add(1, Relaxed) as usize;
    DEEPEST.fetch_max(depth as u64 + 1, Relaxed);
    assert_eq!(frame.level(), depth);
    if depth < 2 {
        let next = PAGES[depth + 1].load(Relaxed) as *mut u64;
        // SAFETY: a page of the test's own.
        unsafe { next.write_volatile(100 + depth as u64) };
    }
    let page = Gva::new(frame.cr2 & !(PAGE as u64 - 1)).unwrap();
    let space = thread.address_space();
    let Ok(flush) = space.protect(page, PAGE as u64, Permissions::WRITE) else {
        return Outcome::Unhandled;
    };
    flush.flush();
    DEPTH.fetch_sub(1, Relaxed);
    Outcome::Resume
}

fn nested_page_fault_three_deep() {
    let map = Map::new(16 * PAGE);
    for page in 0..16 {
        map.write(page * PAGE, 1);
    }
    let dune = enter();
    dune.set_exception_handler(Vector::PF, nesting_handler);
    for (index, page) in PAGES.iter().enumerate() {
        page.store(map.page(2 * index + 1) as u64, Relaxed);
        let page = gva(map.page(2 * index + 1));
        dune.address_space()
            .protect(page, PAGE as u64, Permissions::READ)
            .unwrap()
            .flush();
    }
    map.write(PAGE, 99);
    assert_eq!(DEEPEST.load(Relaxed), 3);
    assert_eq!(DEPTH.load(Relaxed), 0);
    assert_eq!((map.read(PAGE), map.read(3 * PAGE), map.read(5 * PAGE)), (99, 100, 101));
    dune.leave();
}

fn faults_for_ever(frame: &mut TrapFrame, _: &Thread<'_>) -> Outcome {
    // SAFETY: not safe at all: the same fault again, inside the handler.
    unsafe { (frame.cr2 as *mut u64).write_volatile(1) };
    Outcome::Resume
}

fn nesting_limit_is_reported() {
    let ended = spawn(|| {
        let map = Map::new(PAGE);
        map.write(0, 1);
        let dune = enter();
        // SAFETY: A name of less than 16 bytes.
        unsafe { libc::prctl(libc::PR_SET_NAME, c"deep-handler".as_ptr()) };
        dune.set_exception_handler(Vector::PF, faults_for_ever);
        let page = gva(map.page(0));
        dune.address_space()
            .protect(page, PAGE as u64, Permissions::READ)
            .unwrap()
            .flush();
        map.write(0, 2);
        unreachable!("the write went through");
    })
    .wait();
    assert_eq!(ended.signal(), Some(libc::SIGSEGV), "{ended:?}");
    let line = ended.output.lines().find(|line| line.starts_with("dune: fatal:"));
    let line = line.unwrap_or_else(|| panic!("no report: {ended:?}"));
    assert!(line.contains("nested deeper than the 8 handler stacks"), "{line}");
    for part in ["#PF (page fault) 14", "RIP 0x", "thread ", " \"deep-handler\""] {
        assert!(line.contains(part), "{part}: {line}");
    }
}

static SAVED_RSP: AtomicU64 = AtomicU64::new(0);

fn restore_stack(frame: &mut TrapFrame, _: &Thread<'_>) -> Outcome {
    COUNT.fetch_add(1, Relaxed);
    frame.rsp = SAVED_RSP.load(Relaxed);
    frame.rip += 2;
    Outcome::Resume
}

fn fault_with_unmapped_program_stack() {
    let dune = enter();
    dune.set_exception_handler(Vector::UD, restore_stack);
    let gone = {
        let map = Map::new(16 * PAGE);
        map.page(8)
    };
    for bad in [gone, 0, 8, 0x7fff_ffff_fff8, 0x8000_0000_0000, usize::MAX - 7, 1 << 62] {
        // SAFETY: the handler puts RSP back before anything uses it.
        unsafe {
            asm!(
                "mov [{saved}], rsp",
                "mov rsp, {bad}",
                "ud2",
                saved = in(reg) SAVED_RSP.as_ptr(),
                bad = in(reg) bad,
            );
        }
    }
    assert_eq!(COUNT.load(Relaxed), 7);
    dune.leave();
}

fn calling_handler(frame: &mut TrapFrame, _: &Thread<'_>) -> Outcome {
    // SAFETY: no arguments.
    let pid = unsafe { libc::syscall(libc::SYS_getpid) };
    COUNT.store(pid as u64, Relaxed);
    frame.rip += div_bytes(frame.rip);
    frame.rax = 1;
    Outcome::Resume
}

fn handler_may_make_system_calls() {
    let pid = std::process::id();
    let dune = enter();
    dune.set_exception_handler(Vector::DE, calling_handler);
    for _ in 0..20 {
        COUNT.store(0, Relaxed);
        assert_eq!(divide_by_zero(), 1);
        assert_eq!(COUNT.load(Relaxed), u64::from(pid));
    }
    dune.leave();
}

static JUMP_TO: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];

/// Leaves the handler for good: no IRET, the handler's stack is abandoned.
fn jumping_handler(_: &mut TrapFrame, _: &Thread<'_>) -> Outcome {
    COUNT.fetch_add(1, Relaxed);
    let (rip, rsp) = (JUMP_TO[0].load(Relaxed), JUMP_TO[1].load(Relaxed));
    // SAFETY: the place where the test stored both.
    unsafe { asm!("mov rsp, {rsp}", "jmp {rip}", rsp = in(reg) rsp, rip = in(reg) rip, options(noreturn)) }
}

fn handler_may_leave_by_a_jump() {
    let dune = enter();
    dune.set_exception_handler(Vector::UD, jumping_handler);
    // More often than there are handler stacks.
    for _ in 0..100 {
        // SAFETY: the handler comes back to label 2 with this RSP; all registers may have changed.
        unsafe {
            asm!(
                "push rbx",
                "push rbp",
                "lea rax, [rip + 2f]",
                "mov [rcx], rax",
                "mov [rcx + 8], rsp",
                "ud2",
                "2:",
                "pop rbp",
                "pop rbx",
                inout("rcx") JUMP_TO.as_ptr() => _,
                out("rax") _,
                out("rdx") _,
                out("rsi") _,
                out("rdi") _,
                out("r12") _,
                out("r13") _,
                out("r14") _,
                out("r15") _,
                clobber_abi("sysv64"),
            );
        }
    }
    assert_eq!(COUNT.load(Relaxed), 100);
    // And the levels below still work.
    dune.set_exception_handler(Vector::DE, skip_div);
    assert_eq!(divide_by_zero(), 4711);
    dune.leave();
}

fn unclaimed_exception_becomes_its_signal() {
    type Body = fn();
    let cases: [(&str, i32, Body); 4] = [
        ("division by zero", libc::SIGFPE, || {
            divide_by_zero();
        }),
        // SAFETY: dies of it.
        ("ud2", libc::SIGILL, || unsafe { asm!("ud2") }),
        // SAFETY: dies of it.
        ("unmapped memory", libc::SIGSEGV, || unsafe {
            (0x10_0000_0000 as *const u8).read_volatile();
        }),
        ("null", libc::SIGSEGV, || {
            // SAFETY: dies of it.
            unsafe { asm!("mov al, [{}]", in(reg) 0x10u64, out("al") _) }
        }),
    ];
    for (name, signal, body) in cases {
        let ended = spawn(|| {
            let dune = enter();
            body();
            dune.leave();
        })
        .wait();
        assert_eq!(ended.signal(), Some(signal), "{name}: {ended:?}");
        assert!(!ended.output.contains("dune: fatal"), "{name}: {ended:?}");
    }
}

static LAST_VECTOR: AtomicU64 = AtomicU64::new(0);

fn noting_handler(frame: &mut TrapFrame, _: &Thread<'_>) -> Outcome {
    LAST_VECTOR.store(u64::from(frame.vector().0) << 32 | frame.error_code, Relaxed);
    // Traps are behind their instruction already; the faults here are all 2 bytes long.
    if matches!(frame.vector(), Vector::UD | Vector::GP | Vector::DE) {
        frame.rip += 2;
    }
    Outcome::Resume
}

fn each_vector_reaches_its_handler() {
    let dune = enter();
    for vector in [
        Vector::DE,
        Vector::BP,
        Vector::UD,
        Vector::GP,
        Vector(0x80),
        Vector(0xff),
    ] {
        assert!(dune.set_exception_handler(vector, noting_handler).is_none());
    }
    macro_rules! raises {
        ($vector:expr, $error:expr, $($code:literal),+) => {
            LAST_VECTOR.store(0, Relaxed);
            // SAFETY: the handler goes on behind it.
            unsafe { asm!($($code),+, out("rax") _, out("rcx") _, out("rdx") _) };
            assert_eq!(LAST_VECTOR.load(Relaxed), u64::from($vector.0) << 32 | $error, $($code),+);
        };
    }
    raises!(Vector::BP, 0, "int3");
    raises!(Vector::UD, 0, "ud2");
    raises!(Vector(0x80), 0, "int 0x80");
    raises!(Vector(0xff), 0, "int 0xff");
    // Refused by the module: RDMSR of IA32_APIC_BASE, RDPMC.
    LAST_VECTOR.store(0, Relaxed);
    // SAFETY: as above.
    unsafe { asm!("rdmsr", in("ecx") 0x1b, out("eax") _, out("edx") _) };
    assert_eq!(LAST_VECTOR.load(Relaxed), 13 << 32);
    assert!(dune.clear_exception_handler(Vector::BP).is_some());
    dune.leave();
    assert!(!Dune::is_active());
}

fn divides_by_zero(frame: &mut TrapFrame, thread: &Thread<'_>) -> Outcome {
    assert_eq!(divide_by_zero(), 4711);
    gives_the_page_back(frame, thread)
}

fn divide_error_inside_page_fault_handler() {
    let map = Map::new(PAGE);
    map.write(0, 1);
    let dune = enter();
    dune.set_exception_handler(Vector::PF, divides_by_zero);
    dune.set_exception_handler(Vector::DE, |frame, thread| {
        DEEPEST.store(frame.level() as u64, Relaxed);
        skip_div(frame, thread)
    });
    for round in 0..100 {
        let page = gva(map.page(0));
        dune.address_space()
            .protect(page, PAGE as u64, Permissions::NONE)
            .unwrap()
            .flush();
        map.write(0, round);
        assert_eq!(map.read(0), round);
        assert_eq!(COUNT.load(Relaxed), round + 1);
    }
    assert_eq!(DEEPEST.load(Relaxed), 1);
    dune.leave();
}

/// Faults that came, and those that came in malloc and what it calls.
static FAULTS: AtomicU64 = AtomicU64::new(0);
static FAULTS_IN_MALLOC: AtomicU64 = AtomicU64::new(0);

/// A plain handler: atomics and the page table.
fn gives_the_page_back(frame: &mut TrapFrame, thread: &Thread<'_>) -> Outcome {
    const SURROUNDINGS: u64 = 1 << 16;
    let Some(page) = Gva::new(frame.cr2).filter(|_| !frame.host_refused()) else {
        return Outcome::Unhandled;
    };
    FAULTS.fetch_add(1, Relaxed);
    if frame.rip.abs_diff(libc::malloc as *const () as u64) < SURROUNDINGS {
        FAULTS_IN_MALLOC.fetch_add(1, Relaxed);
    }
    let space = thread.address_space();
    let result = space.protect(page.align_down(PAGE as u64), PAGE as u64, Permissions::ALL);
    result.map_or(Outcome::Unhandled, |flush| {
        flush.ignore();
        Outcome::Resume
    })
}

/// Bytes of an arena of glibc that are taken away.
const ARENA_BYTES: u64 = 8 * PAGE as u64;

/// Where the calling thread's arena of glibc begins: with its lock and its lists.
fn own_malloc_arena() -> u64 {
    const HEAP_BYTES: u64 = 64 << 20;
    // A small block may be one that the thread's maker had.
    let block = vec![0u8; 5000];
    let start = block.as_ptr() as u64 & !(HEAP_BYTES - 1);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let holds_it = |line: &str| {
        let (range, rest) = line.split_once(' ').unwrap();
        let (low, high) = range.split_once('-').unwrap();
        let [low, high] = [low, high].map(|text| u64::from_str_radix(text, 16).unwrap());
        low <= start && start + ARENA_BYTES <= high && rest.starts_with("rw")
    };
    assert!(maps.lines().any(holds_it), "{start:#x} is no arena");
    start
}

/// Threads allocate and free, while the beginning of each one's arena is taken away again and again: most faults come with
/// the arena's lock held.
fn fault_inside_malloc_with_plain_handler_does_not_deadlock() {
    const THREADS: usize = 4;
    const ROUNDS: u64 = 40;
    let arenas = [const { AtomicU64::new(0) }; THREADS];
    /// Also where something fails: the threads would go on.
    struct Done<'a>(&'a AtomicBool);
    impl Drop for Done<'_> {
        fn drop(&mut self) {
            self.0.store(true, Relaxed);
        }
    }
    let is_done = AtomicBool::new(false);
    let dune = enter();
    dune.set_exception_handler(Vector::PF, gives_the_page_back);
    let space = dune.address_space();
    std::thread::scope(|scope| {
        let _done = Done(&is_done);
        let mut threads = Vec::new();
        for arena in &arenas {
            threads.push(scope.spawn(|| {
                arena.store(own_malloc_arena(), Relaxed);
                let mut round = 0usize;
                while !is_done.load(Relaxed) {
                    let blocks: Vec<Vec<u8>> = (0..8)
                        .map(|index| vec![round as u8; 100 + (round * 97 + index * 1201) % 20_000])
                        .collect();
                    for block in &blocks {
                        assert_eq!((block[0], block[block.len() - 1]), (round as u8, round as u8));
                    }
                    round += 1;
                    std::thread::yield_now();
                }
            }));
        }
        let wait_while = |is_so: &dyn Fn() -> bool| {
            while is_so() {
                assert!(!threads.iter().any(|thread| thread.is_finished()), "a thread ended");
                std::thread::yield_now();
            }
        };
        wait_while(&|| arenas.iter().any(|arena| arena.load(Relaxed) == 0));
        for _ in 0..ROUNDS {
            let before = FAULTS.load(Relaxed);
            for arena in &arenas {
                let start = gva(arena.load(Relaxed) as usize);
                space.protect(start, ARENA_BYTES, Permissions::NONE).unwrap().flush();
            }
            wait_while(&|| FAULTS.load(Relaxed) == before);
        }
    });
    let (faults, in_malloc) = (FAULTS.load(Relaxed), FAULTS_IN_MALLOC.load(Relaxed));
    assert!(in_malloc >= ROUNDS / 4, "{in_malloc} of {faults} faults in malloc");
    dune.leave();
}

/// Without a handler it is what it always is: the program's own handler, behind the instruction, or the end.
fn unclaimed_int3_is_sigtrap() {
    extern "C" fn count(_: i32) {
        COUNT.fetch_add(1, Relaxed);
    }
    // SAFETY: the second dies of it.
    let int3 = || unsafe { asm!("int3") };
    let ended = spawn(|| {
        let dune = enter();
        set_plain_handler(libc::SIGTRAP, count, 0);
        int3();
        assert_eq!(COUNT.load(Relaxed), 1);
        assert!(Dune::is_active());
        set_plain_handler(libc::SIGTRAP, count, libc::SA_RESETHAND);
        int3();
        assert_eq!(COUNT.load(Relaxed), 2);
        int3();
        dune.leave();
    })
    .wait();
    assert_eq!(ended.signal(), Some(libc::SIGTRAP), "{ended:?}");
    assert!(!ended.output.contains("dune: fatal"), "{ended:?}");
}
