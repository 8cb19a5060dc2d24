// SPDX-License-Identifier: MIT OR Apache-2.0
//! System calls from Dune mode.

use std::arch::asm;
use std::arch::global_asm;
use std::fs;
use std::io;
use std::io::Read;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use libdune::Dune;
use libdune::Outcome;
use libdune::Thread;
use libdune::TrapFrame;
use libdune::Vector;

use crate::framework::Test;
use crate::support::count_signal;
use crate::support::enter;
use crate::support::exits;
use crate::support::set_plain_handler;
use crate::support::set_timer;
use crate::support::spawn;
use crate::support::EXIT_VMCALL;
use crate::support::SIGNALS;

pub const TESTS: &[Test] = &[
    Test::asserting("registers_survive_syscall", registers_survive_syscall),
    Test::asserting(
        "red_zone_survives_fault_and_syscall",
        red_zone_survives_fault_and_syscall,
    ),
    Test::asserting("fpu_avx_and_mxcsr_survive", fpu_avx_and_mxcsr_survive),
    Test::asserting("syscall_results_are_linux_own", syscall_results_are_linux_own),
    Test::asserting("six_arguments_arrive", six_arguments_arrive),
    Test::asserting("device_fd_is_hidden", device_fd_is_hidden),
    Test::asserting("exec_from_dune_mode", exec_from_dune_mode),
    Test::asserting("exit_from_dune_mode", exit_from_dune_mode),
    Test::asserting("signal_handlers_run", signal_handlers_run),
    Test::asserting("blocked_call_is_interrupted", blocked_call_is_interrupted),
];

// Patterns in all registers that a system call keeps, around SYSCALL; returns how many differ behind it.
global_asm!(
    ".pushsection .text.dune_test_syscall, \"ax\", @progbits",
    ".globl dune_test_syscall_registers",
    // rdi: number; rsi: pattern. Returns mismatches in eax, result in rdx.
    "dune_test_syscall_registers:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov rax, rdi",
    "mov rbx, rsi",
    "lea rbp, [rbx + 1]",
    "lea r12, [rbx + 2]",
    "lea r13, [rbx + 3]",
    "lea r14, [rbx + 4]",
    "lea r15, [rbx + 5]",
    "lea rdi, [rbx + 6]",
    "lea rsi, [rbx + 7]",
    "lea rdx, [rbx + 8]",
    "lea r8, [rbx + 9]",
    "lea r9, [rbx + 10]",
    "lea r10, [rbx + 11]",
    "stc",
    "mov [rsp - 8], rbx",
    "mov [rsp - 72], r12",
    "mov [rsp - 128], r15",
    "syscall",
    "2:",
    // CF is as it was, RCX the address behind the call.
    "setnc r11b",
    "push rax",
    "movzx eax, r11b",
    "lea r11, [rip + 2b]",
    "cmp rcx, r11",
    "setne cl",
    "movzx ecx, cl",
    "add eax, ecx",
    ".macro dune_test_compare register, offset",
    "lea r11, [rbx + \\offset]",
    "xor ecx, ecx",
    "cmp \\register, r11",
    "setne cl",
    "add eax, ecx",
    ".endm",
    "dune_test_compare rbp, 1",
    "dune_test_compare r12, 2",
    "dune_test_compare r13, 3",
    "dune_test_compare r14, 4",
    "dune_test_compare r15, 5",
    "dune_test_compare rdi, 6",
    "dune_test_compare rsi, 7",
    "dune_test_compare rdx, 8",
    "dune_test_compare r8, 9",
    "dune_test_compare r9, 10",
    "dune_test_compare r10, 11",
    // The red zone; our own push took the word at -8.
    "dune_test_compare [rsp-64], 2",
    "dune_test_compare [rsp-120], 5",
    "pop rdx",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    ".popsection",
);

#[repr(C)]
struct Survived {
    mismatches: u64,
    result: u64,
}

extern "C" {
    fn dune_test_syscall_registers(number: i64, pattern: u64) -> Survived;
}

/// Makes a call with all registers and the red zone full; fails the test where one changed.
pub fn call_keeping_registers(number: i64, pattern: u64) -> u64 {
    // SAFETY: the numbers given make calls without effect.
    let survived = unsafe { dune_test_syscall_registers(number, pattern) };
    assert_eq!(
        survived.mismatches as u32, 0,
        "registers changed by call {number}, pattern {pattern:#x}"
    );
    survived.result
}

fn registers_survive_syscall() {
    let pid = u64::from(std::process::id());
    // The test itself is right: a native call keeps them, too.
    assert_eq!(call_keeping_registers(libc::SYS_getpid, 0x1122_3344_5566_7788), pid);
    let dune = enter();
    for round in 0..200u64 {
        let pattern = round.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        assert_eq!(call_keeping_registers(libc::SYS_getpid, pattern), pid);
        // A number that no kernel has, and one with rubbish in the upper half.
        assert_eq!(call_keeping_registers(9999, pattern) as i64, -i64::from(libc::ENOSYS));
        assert_eq!(call_keeping_registers(libc::SYS_getpid | 0x7777 << 32, pattern), pid);
    }
    dune.leave();
}

static FAULTS: AtomicU64 = AtomicU64::new(0);

/// Skips UD2 after having used a good deal of stack.
fn skip_ud2(frame: &mut TrapFrame, _: &Thread<'_>) -> Outcome {
    let mut waste = [0u64; 512];
    for (index, word) in std::hint::black_box(&mut waste).iter_mut().enumerate() {
        *word = index as u64;
    }
    FAULTS.fetch_add(std::hint::black_box(&waste)[1], Relaxed);
    frame.rip += 2;
    Outcome::Resume
}

fn red_zone_survives_fault_and_syscall() {
    let dune = enter();
    dune.set_exception_handler(Vector::UD, skip_ud2);
    for round in 0..100u64 {
        let result: u64;
        // SAFETY: below RSP is nothing of the compiler's inside an asm block without `nostack`; all 16 words of the
        // red zone are written, then a fault and a call come, then they are compared.
        unsafe {
            asm!(
                "mov rcx, 16",
                "lea rdi, [rsp - 128]",
                "2:",
                "lea rax, [{seed} + rcx]",
                "mov [rdi + rcx * 8 - 8], rax",
                "dec rcx",
                "jnz 2b",
                "ud2",
                "mov eax, 39",
                "syscall",
                "ud2",
                "xor edx, edx",
                "mov rcx, 16",
                "lea rdi, [rsp - 128]",
                "3:",
                "lea rax, [{seed} + rcx]",
                "cmp [rdi + rcx * 8 - 8], rax",
                "je 4f",
                "inc rdx",
                "4:",
                "dec rcx",
                "jnz 3b",
                seed = in(reg) round << 40,
                out("rax") _,
                out("rcx") _,
                out("rdx") result,
                out("rdi") _,
                out("r11") _,
            );
        }
        assert_eq!(result, 0, "words of the red zone that changed in round {round}");
    }
    assert_eq!(FAULTS.load(Relaxed), 200);
    dune.leave();
}

#[repr(C, align(32))]
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Ymm(pub [[u64; 4]; 16]);

impl Ymm {
    /// Word by word.
    pub fn of_words(value: impl Fn(usize) -> u64) -> Self {
        Self(core::array::from_fn(|register| {
            core::array::from_fn(|word| value(register * 4 + word))
        }))
    }
}

/// Assembly: UD2 where the operand `disturb` is 0, sched_yield(2) where it is 1, else a write to that address.
macro_rules! disturbance {
    () => {
        "cmp {disturb}, 1
         jb 2f
         ja 4f
         mov eax, 24
         syscall
         jmp 3f
         4:
         mov byte ptr [{disturb}], 1
         jmp 3f
         2:
         ud2
         3:"
    };
}

/// Loads 16 registers, makes the disturbance, stores them. `avx` false: the XMM halves only.
#[inline(never)]
pub fn through_registers(input: &Ymm, avx: bool, disturb: u64) -> Ymm {
    // Clear what is to be stored, so that only the registers can bring it back.
    let mut output = Ymm([[0; 4]; 16]);
    if !avx {
        for (output, input) in output.0.iter_mut().zip(&input.0) {
            output[2..].copy_from_slice(&input[2..]);
        }
    }
    macro_rules! through {
        ($move:literal, $prefix:literal) => {
            // SAFETY: loads and stores stay inside the two arrays; the call has no effect.
            unsafe {
                asm!(
                    ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
                    concat!($move, " ", $prefix, "\\n, [{input} + 32 * \\n]"),
                    ".endr",
                    disturbance!(),
                    ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
                    concat!($move, " [{output} + 32 * \\n], ", $prefix, "\\n"),
                    ".endr",
                    input = in(reg) input,
                    output = in(reg) &mut output,
                    disturb = in(reg) disturb,
                    out("rax") _, out("rcx") _, out("r11") _,
                    out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
                    out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                    out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                )
            }
        };
    }
    if avx {
        through!("vmovups", "ymm");
    } else {
        through!("movups", "xmm");
    }
    output
}

/// Fills the x87 stack, makes the disturbance, empties the stack: what was pushed last comes first.
#[inline(never)]
fn through_x87(input: &[f64; 8], disturb: u64) -> [f64; 8] {
    let mut output = [0.0; 8];
    // SAFETY: as above; the x87 stack is empty before, by the ABI, and behind.
    unsafe {
        asm!(
            ".irp n, 0, 1, 2, 3, 4, 5, 6, 7",
            "fld qword ptr [{input} + 8 * \\n]",
            ".endr",
            disturbance!(),
            ".irp n, 0, 1, 2, 3, 4, 5, 6, 7",
            "fstp qword ptr [{output} + 8 * \\n]",
            ".endr",
            input = in(reg) input,
            output = in(reg) &mut output,
            disturb = in(reg) disturb,
            out("rax") _, out("rcx") _, out("r11") _,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
        );
    }
    output
}

fn mxcsr() -> u32 {
    let mut value = 0u32;
    // SAFETY: stores 4 bytes.
    unsafe { asm!("stmxcsr [{}]", in(reg) &mut value) };
    value
}

fn set_mxcsr(value: u32) {
    // SAFETY: rounding and masks only; put back at the end of the test.
    unsafe { asm!("ldmxcsr [{}]", in(reg) &value) };
}

fn x87_control() -> u16 {
    let mut value = 0u16;
    // SAFETY: stores 2 bytes.
    unsafe { asm!("fnstcw [{}]", in(reg) &mut value) };
    value
}

/// A handler that spoils all of it.
fn spoil_fpu(frame: &mut TrapFrame, _: &Thread<'_>) -> Outcome {
    spoil();
    frame.rip += 2;
    Outcome::Resume
}

/// Changes all of the FPU state that a function may change, and MXCSR.
#[inline(never)]
pub fn spoil() {
    // SAFETY: registers that a function may change; what it may not is what the stub has to put back.
    unsafe {
        if std::arch::is_x86_feature_detected!("avx") {
            asm!("vzeroall");
        }
        asm!(
            ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
            "pcmpeqd xmm\\n, xmm\\n",
            ".endr",
            "fninit",
            "fldpi",
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
            out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
        );
    }
    set_mxcsr(0x1f80);
}

/// All sixteen registers (their lower halves where the CPU has no AVX), the x87 stack, and both control words.
fn fpu_avx_and_mxcsr_survive() {
    let avx = std::arch::is_x86_feature_detected!("avx");
    println!("avx: {avx}");
    let mut input = Ymm::of_words(|word| 0x0101_0101_0101_0101 * (word as u64 + 1));
    let mut x87: [f64; 8] = std::array::from_fn(|register| 1.0 / (register as f64 + 3.0));
    let (old_mxcsr, control) = (mxcsr(), 0x0a7fu16);
    // Round towards zero, flush to zero; x87: round up, double precision.
    set_mxcsr(0x1f80 | 3 << 13 | 1 << 15);
    // SAFETY: rounding and precision only.
    unsafe { asm!("fldcw [{}]", in(reg) &control) };

    let dune = enter();
    dune.set_exception_handler(Vector::UD, spoil_fpu);
    for round in 0..100u64 {
        for (disturb, what) in [(1, "a system call"), (0, "an exception")] {
            assert_eq!(
                through_registers(&input, avx, disturb),
                input,
                "around {what}, round {round}"
            );
            let mut popped = through_x87(&x87, disturb);
            popped.reverse();
            assert_eq!(popped, x87, "x87 around {what}, round {round}");
        }
        assert_eq!(mxcsr() & 0xffc0, 0x1f80 | 3 << 13 | 1 << 15, "MXCSR, round {round}");
        assert_eq!(x87_control(), control, "x87 control word, round {round}");
        for register in &mut input.0 {
            register[round as usize % 4] = register[round as usize % 4].rotate_left(1);
        }
        x87.rotate_left(1);
    }
    dune.leave();
    assert_eq!(x87_control(), control, "x87 control word outside");
    assert_eq!(mxcsr() & 0xffc0, 0x1f80 | 3 << 13 | 1 << 15, "MXCSR outside");
    set_mxcsr(old_mxcsr);
    // SAFETY: the word that the ABI says.
    unsafe { asm!("fldcw [{}]", in(reg) &0x037fu16) };
}

fn syscall_results_are_linux_own() {
    let path = format!("/tmp/dune-test-{}", std::process::id());
    let dune = enter();
    let before = dune.counters();
    let errno = |result: i64| {
        assert_eq!(result, -1);
        io::Error::last_os_error().raw_os_error().unwrap()
    };
    // SAFETY: calls with bad arguments on purpose.
    unsafe {
        assert_eq!(errno(libc::close(-1).into()), libc::EBADF);
        assert_eq!(
            errno(libc::syscall(libc::SYS_read, 0, usize::MAX - 4096, -1)),
            libc::EFAULT
        );
        assert_eq!(errno(libc::syscall(99_999)), libc::ENOSYS);
        assert_eq!(errno(libc::kill(i32::MAX, 0).into()), libc::ESRCH);
    }
    assert!(dune.counters().exits[EXIT_VMCALL] - before.exits[EXIT_VMCALL] >= 4);

    let text = "the same in and out\n".repeat(10_000);
    fs::write(&path, &text).unwrap();
    let inside = fs::read_to_string(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), text.len() as u64);
    assert_eq!(fs::read("/nowhere").unwrap_err().kind(), io::ErrorKind::NotFound);
    dune.leave();
    assert!(inside == text);
    assert!(fs::read_to_string(&path).unwrap() == text);
    fs::remove_file(&path).unwrap();
}

fn six_arguments_arrive() {
    let dune = enter();
    // mmap uses all six: a file of two pages, its second one, privately.
    let path = format!("/tmp/dune-test-{}", std::process::id());
    let mut file = fs::File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)
        .unwrap();
    file.write_all(&[1; 4096]).unwrap();
    file.write_all(&[2; 4096]).unwrap();
    // SAFETY: a new mapping, read inside its bounds.
    unsafe {
        let page = libc::mmap(
            std::ptr::null_mut(),
            4096,
            libc::PROT_READ,
            libc::MAP_PRIVATE,
            file.as_raw_fd(),
            4096,
        );
        assert_ne!(page, libc::MAP_FAILED);
        assert_eq!(page.cast::<[u8; 4096]>().read(), [2; 4096]);
        libc::munmap(page, 4096);
    }
    dune.leave();
    fs::remove_file(&path).unwrap();
}

/// Every fd of the process that is the device.
pub fn device_fds() -> Vec<i32> {
    let mut fds = Vec::new();
    for entry in fs::read_dir("/proc/self/fd").unwrap().flatten() {
        if fs::read_link(entry.path()).is_ok_and(|target| target.ends_with("dev/dune")) {
            fds.push(entry.file_name().to_str().unwrap().parse().unwrap());
        }
    }
    fds
}

fn device_fd_is_hidden() {
    let dune = enter();
    let fds = device_fds();
    assert_eq!(fds.len(), 1, "{fds:?}");
    let fd = fds[0];
    assert!(fd > 2);
    // SAFETY: the fds are ours.
    unsafe {
        assert_eq!(libc::close(fd), -1);
        assert_eq!(io::Error::last_os_error().raw_os_error(), Some(libc::EBADF));
        assert!(libc::dup2(0, fd) == -1, "dup2 over the device");
        assert_eq!(libc::syscall(libc::SYS_close_range, 100, u32::MAX, 0), 0);
    }
    assert_eq!(device_fds(), fds, "the device is still open");
    assert_eq!(std::process::id(), call_keeping_registers(libc::SYS_getpid, 7) as u32);
    dune.leave();
    assert_eq!(device_fds(), [], "leave closes it");
}

fn exec_from_dune_mode() {
    let ended = spawn(|| {
        let _dune = enter();
        let arguments = [c"echo".as_ptr(), c"executed".as_ptr(), std::ptr::null()];
        // SAFETY: a null-terminated list of C strings.
        unsafe { libc::execv(c"/bin/echo".as_ptr(), arguments.as_ptr()) };
        panic!("execv came back: {}", io::Error::last_os_error());
    })
    .wait();
    ended.assert_success();
    assert_eq!(ended.output, "executed\n");
}

fn exit_from_dune_mode() {
    let ended = spawn(|| {
        let _dune = enter();
        // SAFETY: ends the process, without leaving Dune mode first.
        unsafe { libc::_exit(37) };
    })
    .wait();
    assert!(
        libc::WIFEXITED(ended.status) && libc::WEXITSTATUS(ended.status) == 37,
        "{ended:?}"
    );
}

/// One SIGALRM, 20 ms from now.
fn alarm_in_20_ms() {
    set_timer(libc::ITIMER_REAL, 20_000, 0);
}

fn signal_handlers_run() {
    let dune = enter();
    set_plain_handler(libc::SIGUSR1, count_signal, 0);
    for round in 1..=50 {
        // SAFETY: a signal to ourselves.
        unsafe { libc::raise(libc::SIGUSR1) };
        assert_eq!(SIGNALS.load(Relaxed), round);
        assert!(Dune::is_active());
    }
    // One that comes while the program computes and makes no call.
    set_plain_handler(libc::SIGALRM, count_signal, 0);
    alarm_in_20_ms();
    let before = dune.counters();
    while SIGNALS.load(Relaxed) == 50 {
        std::hint::spin_loop();
    }
    // The handler's rt_sigreturn, and nothing else.
    assert_eq!(
        dune.counters().exits[EXIT_VMCALL],
        before.exits[EXIT_VMCALL] + 1,
        "calls were made"
    );
    assert!(exits(&before, &dune.counters()) < 10);
    assert!(Dune::is_active());
    dune.leave();
}

fn blocked_call_is_interrupted() {
    let dune = enter();
    set_plain_handler(libc::SIGALRM, count_signal, 0);
    let mut pipe = [0; 2];
    // SAFETY: two fds into an array of two, then a timer and a read of our own.
    unsafe {
        assert_eq!(libc::pipe(pipe.as_mut_ptr()), 0);
        alarm_in_20_ms();
        let mut byte = 0u8;
        let result = libc::read(pipe[0], (&raw mut byte).cast(), 1);
        assert_eq!(result, -1);
        assert_eq!(io::Error::last_os_error().raw_os_error(), Some(libc::EINTR));
        assert_eq!(SIGNALS.load(Relaxed), 1);

        // With SA_RESTART the call goes on: the byte comes from a child later.
        set_plain_handler(libc::SIGALRM, count_signal, libc::SA_RESTART);
        alarm_in_20_ms();
        let child = spawn(|| {
            std::thread::sleep(std::time::Duration::from_millis(80));
            libc::write(pipe[1], c"x".as_ptr().cast(), 1);
        });
        let result = libc::read(pipe[0], (&raw mut byte).cast(), 1);
        assert_eq!((result, byte), (1, b'x'));
        assert_eq!(SIGNALS.load(Relaxed), 2);
        child.wait().assert_success();
        let mut rest = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(rest.read(&mut [0]).unwrap(), 0);
    }
    dune.leave();
}
