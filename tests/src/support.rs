// SPDX-License-Identifier: MIT OR Apache-2.0

//! What behaviour tests share: memory to play with, accesses that may fault, children, exits.

use std::arch::global_asm;
use std::cell::Cell;
use std::fs;
use std::io;
use std::io::Read;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::fd::FromRawFd;
use std::ptr;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;
use std::time::Instant;

use libdune::abi::Counters;
use libdune::Dune;
use libdune::Outcome;
use libdune::Thread;
use libdune::TrapFrame;
use libdune::Vector;

use crate::helpers::bind_to_cpu;

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Bytes of a slot.
pub const GIB: usize = 1 << 30;

/// Basic exit reasons.
pub const EXIT_INTERRUPT: usize = 1;
pub const EXIT_VMCALL: usize = 18;
pub const EXIT_EPT_VIOLATION: usize = 48;

/// Enters Dune mode or fails the test with what the error says.
#[track_caller]
pub fn enter() -> Dune {
    let dune = Dune::enter().unwrap_or_else(|error| panic!("enter: {error}"));
    assert!(Dune::is_active(), "not at CPL0 behind enter()");
    dune
}

/// CS of the caller.
pub fn cs() -> u16 {
    let cs: u16;
    // SAFETY: reads a register.
    unsafe { std::arch::asm!("mov {0:x}, cs", out(reg) cs, options(nomem, nostack, preserves_flags)) };
    cs
}

/// Exceptions that [`step_over`] handled in this thread.
pub fn stepped_over() -> u64 {
    STEPPED_OVER.with(Cell::get)
}

thread_local! {
    static STEPPED_OVER: Cell<u64> = const { Cell::new(0) };
}

/// A handler that goes on behind an instruction of 2 bytes, UD2 for one.
pub fn step_over(frame: &mut TrapFrame, _: &Thread<'_>) -> Outcome {
    STEPPED_OVER.with(|count| count.set(count.get() + 1));
    frame.rip += 2;
    Outcome::Resume
}

/// Exits between two readings that the program caused: interrupts come whenever they come.
pub fn exits(before: &Counters, after: &Counters) -> u64 {
    by_reason(before, after).iter().map(|(_, count)| count).sum()
}

/// The same as (basic exit reason, count), for messages.
pub fn by_reason(before: &Counters, after: &Counters) -> Vec<(usize, u64)> {
    (0..before.exits.len())
        .filter(|reason| *reason != EXIT_INTERRUPT)
        .map(|reason| (reason, after.exits[reason] - before.exits[reason]))
        .filter(|(_, count)| *count != 0)
        .collect()
}

/// Runs `body` three times, the first two to bring memory in, and fails the test if the last caused an exit.
#[track_caller]
pub fn assert_no_exits(dune: &Dune, mut body: impl FnMut()) {
    let mut seen = Vec::new();
    for _ in 0..3 {
        let before = dune.counters();
        body();
        let after = dune.counters();
        seen = by_reason(&before, &after);
    }
    assert_eq!(seen, [], "(exit reason, count)");
}

/// Anonymous memory; unmapped when dropped.
#[derive(Debug)]
pub struct Map {
    pub start: *mut u8,
    pub bytes: usize,
}

impl Map {
    /// Private, readable and writable memory.
    pub fn new(bytes: usize) -> Self {
        Self::at(0, bytes, libc::PROT_READ | libc::PROT_WRITE, 0)
    }

    /// The same with more choice; `address` 0 is anywhere, else exactly there.
    pub fn at(address: usize, bytes: usize, protection: i32, flags: i32) -> Self {
        let fixed = if address == 0 { 0 } else { libc::MAP_FIXED_NOREPLACE };
        Self::anonymous(address, bytes, protection, libc::MAP_PRIVATE | fixed | flags)
    }

    /// Memory that children share.
    pub fn shared(bytes: usize, protection: i32) -> Self {
        Self::anonymous(0, bytes, protection, libc::MAP_SHARED)
    }

    fn anonymous(address: usize, bytes: usize, protection: i32, flags: i32) -> Self {
        // SAFETY: a new mapping that replaces nothing.
        let start = unsafe {
            libc::mmap(
                address as *mut libc::c_void,
                bytes,
                protection,
                libc::MAP_ANONYMOUS | flags,
                -1,
                0,
            )
        };
        assert_ne!(
            start,
            libc::MAP_FAILED,
            "mmap of {bytes:#x} bytes at {address:#x}: {}",
            io::Error::last_os_error()
        );
        Self {
            start: start.cast(),
            bytes,
        }
    }

    /// Private, readable and writable memory exactly there, if nothing is there yet.
    pub fn try_at(address: usize, bytes: usize) -> Option<Self> {
        // SAFETY: a new mapping that replaces nothing.
        let start = unsafe {
            libc::mmap(
                address as *mut libc::c_void,
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
                -1,
                0,
            )
        };
        (start != libc::MAP_FAILED).then_some(Self {
            start: start.cast(),
            bytes,
        })
    }

    /// Takes over a mapping that the caller made.
    pub fn owning(start: *mut u8, bytes: usize) -> Self {
        Self { start, bytes }
    }

    /// Gives the mapping up to the caller.
    pub fn into_start(self) -> *mut u8 {
        std::mem::ManuallyDrop::new(self).start
    }

    pub fn address(&self) -> usize {
        self.start as usize
    }

    /// Address of page `index`.
    pub fn page(&self, index: usize) -> usize {
        assert!(index * PAGE < self.bytes);
        self.address() + index * PAGE
    }

    /// Unmaps part of it.
    pub fn unmap(&self, offset: usize, bytes: usize) {
        assert!(offset + bytes <= self.bytes);
        // SAFETY: the tests use what is gone only by accesses that may fault.
        let result = unsafe { libc::munmap(self.start.add(offset).cast(), bytes) };
        assert_eq!(result, 0, "munmap: {}", io::Error::last_os_error());
    }

    pub fn protect(&self, offset: usize, bytes: usize, protection: i32) {
        assert!(offset + bytes <= self.bytes);
        // SAFETY: as above.
        let result = unsafe { libc::mprotect(self.start.add(offset).cast(), bytes, protection) };
        assert_eq!(result, 0, "mprotect: {}", io::Error::last_os_error());
    }

    pub fn advise(&self, offset: usize, bytes: usize, advice: i32) {
        assert!(offset + bytes <= self.bytes);
        // SAFETY: as above.
        let result = unsafe { libc::madvise(self.start.add(offset).cast(), bytes, advice) };
        assert_eq!(result, 0, "madvise({advice}): {}", io::Error::last_os_error());
    }

    /// Reads a word.
    pub fn read(&self, offset: usize) -> u64 {
        assert!(offset + 8 <= self.bytes);
        // SAFETY: inside the mapping.
        unsafe { self.start.add(offset).cast::<u64>().read_volatile() }
    }

    /// Writes a word.
    pub fn write(&self, offset: usize, value: u64) {
        assert!(offset + 8 <= self.bytes);
        // SAFETY: inside the mapping.
        unsafe { self.start.add(offset).cast::<u64>().write_volatile(value) };
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours; parts that are gone already do not matter.
        unsafe { libc::munmap(self.start.cast(), self.bytes) };
    }
}

// Accesses whose fault is an answer: RAX = what was read, RDX = 0, or with a fault 1 << 32 | error code.
global_asm!(
    ".pushsection .text.dune_test_probe, \"ax\", @progbits",
    ".globl dune_test_load",
    "dune_test_load:",
    "xor edx, edx",
    "xor eax, eax",
    ".globl dune_test_load_at",
    "dune_test_load_at:",
    "mov rax, [rdi]",
    ".globl dune_test_end",
    "dune_test_end:",
    "ret",
    ".globl dune_test_store",
    "dune_test_store:",
    "xor edx, edx",
    ".globl dune_test_store_at",
    "dune_test_store_at:",
    "mov [rdi], rsi",
    "ret",
    ".globl dune_test_execute",
    "dune_test_execute:",
    "xor edx, edx",
    "call rdi",
    ".globl dune_test_execute_end",
    "dune_test_execute_end:",
    "ret",
    ".popsection",
);

#[repr(C)]
#[derive(Clone, Copy)]
struct Probed {
    value: u64,
    fault: u64,
}

extern "C" {
    fn dune_test_load(address: usize) -> Probed;
    fn dune_test_store(address: usize, value: u64) -> Probed;
    fn dune_test_execute(address: usize) -> Probed;
    static dune_test_load_at: u8;
    static dune_test_store_at: u8;
    static dune_test_end: u8;
    static dune_test_execute_end: u8;
}

/// A page fault as the handler saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    pub error_code: u32,
    pub address: u64,
    /// The process itself has no such access.
    pub host_refused: bool,
}

static LAST_ADDRESS: AtomicU64 = AtomicU64::new(0);
static FAULTS: AtomicU64 = AtomicU64::new(0);

const WAS_FAULT: u64 = 1 << 32;
const HOST_REFUSED: u64 = 1 << 33;

/// Faults that the handlers of [`install_probe`] and [`install_signal_probe`] took.
pub fn probe_faults() -> u64 {
    FAULTS.load(Relaxed)
}

/// Takes the page faults of [`load`], [`store`] and [`execute`].
pub fn install_probe(dune: &Dune) {
    dune.set_exception_handler(Vector::PF, probe_handler);
}

/// The handler of [`install_probe`], for handlers that add to it.
pub fn probe_handler(frame: &mut TrapFrame, _: &Thread<'_>) -> Outcome {
    let at = |symbol: &u8| ptr::from_ref(symbol) as u64;
    // SAFETY: addresses of code; nothing is read there.
    let (load_at, store_at, end, execute_end) = unsafe {
        (
            at(&dune_test_load_at),
            at(&dune_test_store_at),
            at(&dune_test_end),
            at(&dune_test_execute_end),
        )
    };
    if frame.rip == load_at || frame.rip == store_at {
        frame.rip = end;
    } else if frame.rip == frame.cr2 {
        // The call into what cannot be executed: back to behind it.
        frame.rip = execute_end;
        frame.rsp += 8;
    } else {
        return Outcome::Unhandled;
    }
    LAST_ADDRESS.store(frame.cr2, Relaxed);
    FAULTS.fetch_add(1, Relaxed);
    frame.rdx = WAS_FAULT | u64::from(frame.host_refused()) << 33 | frame.error_code & 0xffff_ffff;
    Outcome::Resume
}

/// Takes the faults of [`load`] and [`store`] by signal handlers, which threads in and out of Dune mode share; the error
/// code is the signal's number and its code. Any other fault is the end.
pub fn install_signal_probe() {
    extern "C" fn handler(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::ucontext_t) {
        let at = |symbol: &u8| ptr::from_ref(symbol) as i64;
        // SAFETY: the kernel passes both, or libdune as the kernel would; addresses of code, at which nothing is read.
        let (registers, address, ours) = unsafe {
            let registers = &mut (*context).uc_mcontext.gregs;
            let ours = [at(&dune_test_load_at), at(&dune_test_store_at)].contains(&registers[libc::REG_RIP as usize]);
            (registers, (*info).si_addr() as u64, ours)
        };
        if !ours || registers[libc::REG_RDI as usize] as u64 != address {
            let mut text = [0u8; 160];
            let mut rest = &mut text[..];
            let _ = writeln!(
                rest,
                "signal {signal} for {address:#x} at RIP {:#x}, RDI {:#x}, RSP {:#x}",
                registers[libc::REG_RIP as usize],
                registers[libc::REG_RDI as usize],
                registers[libc::REG_RSP as usize]
            );
            let length = 160 - rest.len();
            // SAFETY: our own text; the fault comes again, and ends the process.
            unsafe {
                libc::write(2, text.as_ptr().cast(), length);
                libc::signal(signal, libc::SIG_DFL);
            }
            return;
        }
        FAULTS.fetch_add(1, Relaxed);
        // SAFETY: as above.
        let code = unsafe { (*info).si_code } & 0xff;
        registers[libc::REG_RDX as usize] = WAS_FAULT as i64 | i64::from(signal << 8 | code);
        // SAFETY: as above.
        registers[libc::REG_RIP as usize] = at(unsafe { &dune_test_end });
    }
    for signal in [libc::SIGSEGV, libc::SIGBUS] {
        set_handler(signal, handler, libc::SA_ONSTACK | libc::SA_NODEFER, &[]);
    }
}

fn result(probed: Probed) -> Result<u64, Fault> {
    if probed.fault & WAS_FAULT == 0 {
        return Ok(probed.value);
    }
    Err(Fault {
        error_code: probed.fault as u32,
        address: LAST_ADDRESS.load(Relaxed),
        host_refused: probed.fault & HOST_REFUSED != 0,
    })
}

/// Reads a word; the fault if that is not possible.
pub fn load(address: usize) -> Result<u64, Fault> {
    // SAFETY: reading has no effect; a fault is answered by the handler.
    result(unsafe { dune_test_load(address) })
}

/// Writes a word, to memory of the test's own; the fault if that is not possible.
pub fn store(address: usize, value: u64) -> Result<(), Fault> {
    // SAFETY: the tests pass addresses of their own mappings, gone or not.
    result(unsafe { dune_test_store(address, value) }).map(drop)
}

/// Calls a function that does nothing but return; the fault if that is not possible.
pub fn execute(address: usize) -> Result<(), Fault> {
    // SAFETY: the tests put a `ret` there or make it impossible to execute.
    result(unsafe { dune_test_execute(address) }).map(drop)
}

/// Asserts that an access fails because the process may not do it, at that very address.
#[track_caller]
pub fn assert_refused<T: std::fmt::Debug>(result: Result<T, Fault>, address: usize) -> Fault {
    match result {
        Err(fault) => {
            assert!(fault.host_refused, "not by the host: {fault:x?}");
            assert_eq!(fault.address, address as u64, "{fault:x?}");
            fault
        }
        Ok(value) => panic!("the access to {address:#x} went through: {value:x?}"),
    }
}

/// A handler that is told what happened and where.
pub type SigHandler = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::ucontext_t);

/// Sets a handler, during which the signals of `masked` are blocked too; the action before.
pub fn set_handler(signal: i32, handler: SigHandler, flags: i32, masked: &[i32]) -> libc::sigaction {
    set_action(signal, handler as *const () as usize, flags | libc::SA_SIGINFO, masked)
}

/// Sets a handler that is told the signal only.
pub fn set_plain_handler(signal: i32, handler: extern "C" fn(i32), flags: i32) {
    set_action(signal, handler as *const () as usize, flags, &[]);
}

fn set_action(signal: i32, handler: usize, flags: i32, masked: &[i32]) -> libc::sigaction {
    // SAFETY: a handler of the type that the flags say.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        let mut old: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler;
        action.sa_flags = flags;
        for signal in masked {
            libc::sigaddset(&mut action.sa_mask, *signal);
        }
        assert_eq!(libc::sigaction(signal, &action, &mut old), 0);
        old
    }
}

/// An interval timer's first signal and those after it; 0 for both stops it. By a call past libc.
pub fn set_timer(which: libc::c_int, first_us: i64, interval_us: i64) {
    let time = |us: i64| libc::timeval {
        tv_sec: us / 1_000_000,
        tv_usec: us % 1_000_000,
    };
    let timer = libc::itimerval {
        it_interval: time(interval_us),
        it_value: time(first_us),
    };
    // SAFETY: a timer of our own.
    let result = unsafe { libc::syscall(libc::SYS_setitimer, which, &raw const timer, 0) };
    assert_eq!(result, 0);
}

/// Every so many microseconds; 0 stops it.
pub fn timer(which: libc::c_int, interval_us: i64) {
    set_timer(which, interval_us, interval_us);
}

/// Sends a thread of this process a signal that queues, with a handler.
pub fn queue_signal(thread: i32, signal: i32) -> io::Result<()> {
    // SAFETY: Linux reads one siginfo.
    let result = unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        info.si_code = libc::SI_QUEUE;
        libc::syscall(libc::SYS_rt_tgsigqueueinfo, libc::getpid(), thread, signal, &info)
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// How a child ended.
#[derive(Debug)]
pub struct Ended {
    /// As waitpid gives it.
    pub status: i32,
    /// Standard output and error.
    pub output: String,
}

impl Ended {
    /// The signal that ended it.
    pub fn signal(&self) -> Option<i32> {
        libc::WIFSIGNALED(self.status).then(|| libc::WTERMSIG(self.status))
    }

    /// Fails the test unless the child exited with 0.
    #[track_caller]
    pub fn assert_success(&self) {
        assert!(
            libc::WIFEXITED(self.status) && libc::WEXITSTATUS(self.status) == 0,
            "the child failed: {self:#x?}"
        );
    }
}

/// A counter or sampler of the calling thread on any CPU: `type` of the first version of `struct perf_event_attr`
/// (linux/perf_event.h), and what follows its size.
#[track_caller]
pub fn perf_event(kind: u64, rest: [u64; 7]) -> fs::File {
    const ATTR_BYTES: u64 = 64;
    let [config, period, sample, read, flags, wakeup, breakpoint] = rest;
    let attributes = [
        kind | ATTR_BYTES << 32,
        config,
        period,
        sample,
        read,
        flags,
        wakeup,
        breakpoint,
    ];
    // SAFETY: The structure of the call; the fd is nobody else's.
    unsafe {
        let fd = libc::syscall(libc::SYS_perf_event_open, attributes.as_ptr(), 0, -1, -1, 0) as i32;
        assert!(fd >= 0, "perf_event_open: {}", std::io::Error::last_os_error());
        fs::File::from_raw_fd(fd)
    }
}

/// Waits until it holds; false if it does not for a second.
pub fn eventually(condition: impl Fn() -> bool) -> bool {
    within(Duration::from_secs(1), condition)
}

/// Waits until it holds; false if it does not for that long.
pub fn within(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while !condition() {
        if start.elapsed() > limit {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

extern "C" {
    /// glibc: where the thread's struct rseq lies, from the thread pointer.
    static __rseq_offset: isize;
    static __rseq_size: u32;
}

/// Address of the calling thread's struct rseq.
#[track_caller]
pub fn rseq_area() -> u64 {
    let thread_pointer: u64;
    // SAFETY: reads the word at the thread pointer, which holds its own address.
    unsafe { std::arch::asm!("mov {}, fs:[0]", out(reg) thread_pointer, options(nostack, readonly)) };
    // SAFETY: glibc's constants.
    let (offset, bytes) = unsafe { (__rseq_offset, __rseq_size) };
    assert!(bytes > 0, "glibc has registered no struct rseq");
    thread_pointer.wrapping_add_signed(offset as i64)
}

/// One run of a restartable sequence of the calling thread, whose struct rseq is at `area`: reads `word`, then takes
/// `turns` turns of a loop. Whether it was aborted.
pub fn restartable(area: u64, turns: u32, word: *const u64) -> bool {
    #[repr(align(32))]
    struct Section([u64; 4]);
    let mut section = Section([0; 4]);
    let aborted: u64;
    // SAFETY: struct rseq is this thread's; the section only reads what the caller says and counts down.
    unsafe {
        std::arch::asm!(
            "jmp 9f",
            ".long {signature}",
            "5:",
            "mov {aborted:e}, 1",
            "jmp 6f",
            "9:",
            "lea {scratch}, [rip + 3f]",
            "mov [{section} + 8], {scratch}",
            "lea {aborted}, [rip + 4f]",
            "sub {aborted}, {scratch}",
            "mov [{section} + 16], {aborted}",
            "lea {scratch}, [rip + 5b]",
            "mov [{section} + 24], {scratch}",
            "mov [{area} + 8], {section}",
            "3:",
            "mov {scratch}, [{word}]",
            "2:",
            "dec ecx",
            "jnz 2b",
            "4:",
            "xor {aborted:e}, {aborted:e}",
            "6:",
            "mov qword ptr [{area} + 8], 0",
            signature = const RSEQ_SIGNATURE,
            area = in(reg) area,
            section = in(reg) section.0.as_mut_ptr(),
            word = in(reg) word,
            scratch = out(reg) _,
            aborted = out(reg) aborted,
            inout("ecx") turns => _,
        );
    }
    aborted != 0
}

/// Without this a preempted thread goes through user mode anyway, because Linux has to look at its rseq area.
pub fn unregister_rseq() {
    const UNREGISTER: i32 = 1;
    // SAFETY: the call that glibc would make itself.
    let result = unsafe { libc::syscall(libc::SYS_rseq, rseq_area(), 32, UNREGISTER, RSEQ_SIGNATURE) };
    assert_eq!(result, 0, "rseq: {}", io::Error::last_os_error());
}

/// Calls `body` with the address of the calling thread's struct rseq, and once more with one of version 2, where Linux has it.
pub fn for_each_rseq(body: impl Fn(u64)) {
    body(rseq_area());
    if let Some(area) = register_rseq_2() {
        println!("version 2");
        body(area);
    }
}

/// Registers another struct rseq than glibc's for the calling thread, so long that Linux takes it for version 2: it looks
/// for a critical section only where an interrupt took the thread out of user mode, or another CPU's number is due. Its
/// address, for good; `None` where Linux has no such version.
fn register_rseq_2() -> Option<u64> {
    const AT_RSEQ_FEATURE_SIZE: u64 = 27;
    const AT_RSEQ_ALIGN: u64 = 28;
    const VERSION_1: usize = 32;
    // SAFETY: reads the auxiliary vector.
    let [size, align] = [AT_RSEQ_FEATURE_SIZE, AT_RSEQ_ALIGN].map(|kind| unsafe { libc::getauxval(kind) } as usize);
    if size <= VERSION_1 {
        return None;
    }
    unregister_rseq();
    let layout = std::alloc::Layout::from_size_align(size, align).unwrap().pad_to_align();
    // SAFETY: more than 0 bytes.
    let area = unsafe { std::alloc::alloc_zeroed(layout) };
    // SAFETY: ours for good, of the size and alignment that Linux wants.
    let result = unsafe { libc::syscall(libc::SYS_rseq, area, layout.size(), 0, RSEQ_SIGNATURE) };
    assert_eq!(result, 0, "rseq: {}", io::Error::last_os_error());
    Some(area as u64)
}

/// Linux wants it before each abort address: glibc's.
const RSEQ_SIGNATURE: u32 = 0x5305_3053;

/// Lets a thread of any process, 0: the calling one, run on one CPU only.
#[track_caller]
pub fn set_affinity(thread: i32, cpu: usize) {
    bind_to_cpu(thread, cpu).unwrap_or_else(|error| panic!("sched_setaffinity: {error}"));
}

/// A control group of the test's own, which goes when it is empty.
pub struct Cgroup(String);

impl Cgroup {
    /// With that controller.
    #[track_caller]
    pub fn new(controller: &str, name: &str) -> Self {
        fs::write("/sys/fs/cgroup/cgroup.subtree_control", format!("+{controller}")).unwrap();
        let path = format!("/sys/fs/cgroup/dune-{name}-{}", std::process::id());
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub fn file(&self, name: &str) -> String {
        format!("{}/{name}", self.0)
    }

    #[track_caller]
    pub fn write(&self, file: &str, value: &str) {
        fs::write(self.file(file), value).unwrap_or_else(|error| panic!("{file}: {error}"));
    }

    /// The number behind `name` in `file`.
    #[track_caller]
    pub fn stat(&self, file: &str, name: &str) -> u64 {
        let text = fs::read_to_string(self.file(file)).unwrap();
        let line = text.lines().find(|line| line.split(' ').next() == Some(name)).unwrap();
        line.split(' ').nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let is_gone = eventually(|| fs::remove_dir(&self.0).is_ok());
        assert!(is_gone || std::thread::panicking(), "{} stays", self.0);
    }
}

/// A child that runs `body` natively until it enters Dune mode itself. A panic in it is exit status 101.
pub fn spawn(body: impl FnOnce()) -> Child {
    let mut pipe = [0; 2];
    // SAFETY: the array has room for the two ends.
    assert_eq!(unsafe { libc::pipe2(pipe.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
    // SAFETY: the child runs `body` and ends; the tests are single-threaded here or say otherwise.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork: {}", io::Error::last_os_error());
    if pid == 0 {
        // SAFETY: plain system calls on our own fds.
        unsafe {
            libc::dup2(pipe[1], 1);
            libc::dup2(pipe[1], 2);
        }
        let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).is_err();
        // SAFETY: ends the child without running what is the parent's.
        unsafe { libc::_exit(if failed { 101 } else { 0 }) }
    }
    // SAFETY: the write end is the child's alone from here on; the read end is ours.
    let output = unsafe {
        libc::close(pipe[1]);
        fs::File::from_raw_fd(pipe[0])
    };
    Child {
        pid,
        output: Some(output),
    }
}

/// A child that runs at CPL0 until word 1 of `shared` is set, and leaves then. Word 0 is 1 when it has entered, as it has when
/// this returns, and 2 when it has left.
#[track_caller]
pub fn spawn_spinning(shared: &Shared) -> Child {
    let child = spawn(|| {
        let dune = enter();
        shared.word(0).store(1, SeqCst);
        while shared.word(1).load(SeqCst) == 0 {
            std::hint::spin_loop();
        }
        assert!(Dune::is_active());
        dune.leave();
        shared.word(0).store(2, SeqCst);
    });
    child.until(|| shared.word(0).load(SeqCst) == 1)
}

/// What a child has for a thing that takes no time.
const CHILD_LIMIT: Duration = Duration::from_secs(8);

/// A running child of [`spawn`]. Killed and reaped when dropped.
#[derive(Debug)]
pub struct Child {
    pub pid: i32,
    output: Option<fs::File>,
}

impl Child {
    pub fn kill(&self, signal: i32) {
        // SAFETY: our own child, not reaped yet.
        assert_eq!(unsafe { libc::kill(self.pid, signal) }, 0);
    }

    /// Waits until that holds. It must not end before, and has some seconds.
    #[track_caller]
    pub fn until(self, condition: impl Fn() -> bool) -> Self {
        let has_ended = || {
            // SAFETY: our own child; it stays to be waited for.
            unsafe {
                let mut info = core::mem::zeroed();
                let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
                assert_eq!(libc::waitid(libc::P_PID, self.pid as u32, &mut info, options), 0);
                info.si_pid() == self.pid
            }
        };
        within(CHILD_LIMIT, || condition() || has_ended());
        if !condition() {
            let state = self.state();
            self.kill(libc::SIGKILL);
            panic!("the child does not come to it: {state}{:#x?}", self.wait());
        }
        self
    }

    /// What Linux says of it: its state, the signals that wait and that it blocks, and where it is in the kernel.
    fn state(&self) -> String {
        let read = |name| fs::read_to_string(format!("/proc/{}/{name}", self.pid)).unwrap_or_default();
        let fields = ["State", "SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt", "CoreDumping"];
        let status = read("status");
        let told = status
            .lines()
            .filter(|line| fields.iter().any(|field| line.starts_with(field)));
        format!(
            "{}\nstat: {}stack: {}",
            told.collect::<Vec<_>>().join("\n"),
            read("stat"),
            read("stack")
        )
    }

    /// Waits for its end, which is due: it says where the child is after some seconds.
    #[track_caller]
    pub fn wait_soon(self) -> Ended {
        let mut output = libc::pollfd {
            fd: self.output.as_ref().map_or(-1, AsRawFd::as_raw_fd),
            events: libc::POLLIN,
            revents: 0,
        };
        let mut is_over = || {
            // SAFETY: one descriptor of ours.
            unsafe { libc::poll(&mut output, 1, 0) };
            output.revents & libc::POLLHUP != 0
        };
        if !within(CHILD_LIMIT, &mut is_over) {
            let state = self.state();
            self.kill(libc::SIGKILL);
            panic!("the child does not end: {state}{:#x?}", self.wait());
        }
        self.wait()
    }

    /// Waits for its end.
    pub fn wait(mut self) -> Ended {
        let mut output = Vec::new();
        if let Some(mut pipe) = self.output.take() {
            let _ = pipe.read_to_end(&mut output);
        }
        let mut status = 0;
        // SAFETY: our own child.
        let waited = unsafe { libc::waitpid(self.pid, &mut status, 0) };
        assert_eq!(waited, self.pid);
        self.pid = 0;
        Ended {
            status,
            output: String::from_utf8_lossy(&output).into_owned(),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.pid > 0 {
            let mut status = 0;
            // SAFETY: our own child, not reaped yet.
            unsafe {
                libc::kill(self.pid, libc::SIGKILL);
                libc::waitpid(self.pid, &mut status, 0);
            }
        }
    }
}

/// How often [`count_signal`] ran in this process.
pub static SIGNALS: AtomicU64 = AtomicU64::new(0);

/// A handler that does nothing else.
pub extern "C" fn count_signal(_: i32) {
    SIGNALS.fetch_add(1, SeqCst);
}

/// Words that a parent and its children share.
pub struct Shared(Map);

// SAFETY: Its words are used as atomics only.
unsafe impl Sync for Shared {}
// SAFETY: The mapping is no thread's own.
unsafe impl Send for Shared {}

impl Shared {
    pub fn new() -> Self {
        Self(Map::shared(PAGE, libc::PROT_READ | libc::PROT_WRITE))
    }

    pub fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < PAGE / 8);
        // SAFETY: inside the mapping, aligned, only used as atomics.
        unsafe { AtomicU64::from_ptr(self.0.start.cast::<u64>().add(index)) }
    }
}

/// A number that makes the module dawdle somewhere; only the test and debug kernels' modules have such knobs. Puts 0
/// back when dropped.
pub struct Knob(String);

impl Knob {
    /// Turns it; `None` where the module has it not. Only root can.
    pub fn set(name: &str, value: u32) -> Option<Self> {
        let path = format!("/sys/module/dune/parameters/{name}");
        std::fs::write(&path, value.to_string()).ok()?;
        Some(Self(path))
    }
}

impl Drop for Knob {
    fn drop(&mut self) {
        let _ = std::fs::write(&self.0, "0");
    }
}

/// The time stamp counter.
pub fn rdtsc() -> u64 {
    // SAFETY: reads a counter.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Work for the CPU with a result that is known, integer and floating point: never a system call.
pub fn compute(rounds: u64) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut sum = 1.0f64;
    for round in 0..rounds {
        hash = (hash ^ round).wrapping_mul(0x0100_0000_01b3).rotate_left(5);
        sum = (sum + round as f64).sqrt() + 0.5;
    }
    hash ^ std::hint::black_box(sum).to_bits()
}
