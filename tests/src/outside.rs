// SPDX-License-Identifier: MIT OR Apache-2.0

//! What governs and watches a process from outside: seccomp, ptrace, and what they see of a Dune thread.

use std::io;
use std::sync::atomic::AtomicI32;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;
use std::time::Instant;

use libdune::Dune;

use crate::framework::Test;
use crate::support::count_signal;
use crate::support::enter;
use crate::support::rdtsc;
use crate::support::set_handler;
use crate::support::spawn;
use crate::support::Shared;
use crate::support::SIGNALS;
use crate::syscall::through_registers;
use crate::syscall::Ymm;

pub const TESTS: &[Test] = &[
    Test::asserting("seccomp_filter_is_obeyed", seccomp_filter_is_obeyed),
    Test::asserting("seccomp_filter_without_ioctl", seccomp_filter_without_ioctl),
    Test::asserting("seccomp_trap_reaches_the_handler", seccomp_trap_reaches_the_handler),
    Test::asserting("seccomp_kill_kills", seccomp_kill_kills),
    Test::asserting("seccomp_strict_mode", seccomp_strict_mode),
    Test::asserting("tracer_sees_each_call_twice", tracer_sees_each_call_twice),
    Test::asserting("tracer_may_change_a_result", tracer_may_change_a_result),
    Test::asserting("tracer_leaves_the_fpu_state_alone", tracer_leaves_the_fpu_state_alone),
    Test::asserting("abort_is_seen_where_it_was_called", abort_is_seen_where_it_was_called),
    Test::asserting(
        "tsc_is_the_guests_own_until_it_leaves",
        tsc_is_the_guests_own_until_it_leaves,
    ),
    Test::asserting(
        "breakpoint_stops_at_the_guests_instruction",
        breakpoint_stops_at_the_guests_instruction,
    ),
];

const LOAD_NUMBER: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const JUMP_IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

/// Installs a filter that answers these calls so, and allows all others.
fn filter(answers: &[(libc::c_long, u32)]) {
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut program = vec![step(LOAD_NUMBER, 0, 0, 0)];
    for (number, answer) in answers {
        program.push(step(JUMP_IF_EQUAL, 0, 1, *number as u32));
        program.push(step(RETURN, 0, 0, *answer));
    }
    program.push(step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW));
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the program lives during the call.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let result = libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program);
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
    }
}

fn errno() -> Option<i32> {
    io::Error::last_os_error().raw_os_error()
}

/// The filter counts for forwarded calls, set in Dune mode or before it.
fn seccomp_filter_is_obeyed() {
    for before_entering in [false, true] {
        spawn(|| {
            let answers = [(libc::SYS_getppid, libc::SECCOMP_RET_ERRNO | libc::EXDEV as u32)];
            if before_entering {
                filter(&answers);
            }
            let _dune = enter();
            if !before_entering {
                filter(&answers);
            }
            for _ in 0..10 {
                // SAFETY: a call without arguments.
                assert_eq!(unsafe { libc::syscall(libc::SYS_getppid) }, -1);
                assert_eq!(errno(), Some(libc::EXDEV));
            }
            assert!(Dune::is_active());
            // Children have it too.
            let child = spawn(|| {
                assert!(Dune::is_active());
                // SAFETY: a call without arguments.
                assert_eq!(unsafe { libc::syscall(libc::SYS_getppid) }, -1);
                assert_eq!(errno(), Some(libc::EXDEV));
            });
            child.wait().assert_success();
        })
        .wait()
        .assert_success();
    }
}

/// A filter that forbids ioctl leaves a thread that runs alive: RUN goes by read.
fn seccomp_filter_without_ioctl() {
    spawn(|| {
        let dune = enter();
        // SAFETY: the handler only counts.
        unsafe { libc::signal(libc::SIGUSR1, count_signal as *const () as libc::sighandler_t) };
        filter(&[(libc::SYS_ioctl, libc::SECCOMP_RET_KILL_PROCESS)]);
        let before = dune.counters().entries;
        for _ in 0..100 {
            assert!(std::process::id() > 1);
        }
        assert!(dune.counters().entries >= before + 100);
        // Signals and faults work too.
        // SAFETY: a signal to ourselves.
        unsafe { libc::raise(libc::SIGUSR1) };
        assert_eq!(SIGNALS.load(SeqCst), 1);
        let fresh = vec![7u8; 1 << 20];
        assert!(fresh.iter().all(|byte| *byte == 7));
        // So do threads, children, and leaving.
        for _ in 0..3 {
            std::thread::spawn(|| assert!(Dune::is_active())).join().unwrap();
        }
        spawn(|| assert!(Dune::is_active())).wait().assert_success();
        assert!(Dune::is_active());
        dune.leave();
    })
    .wait()
    .assert_success();
}

static TRAPPED: AtomicI32 = AtomicI32::new(0);

extern "C" fn on_sigsys(_: i32, info: *mut libc::siginfo_t, context: *mut libc::ucontext_t) {
    const SYS_SECCOMP: i32 = 1;
    // SAFETY: libdune's arguments; si_syscall lies behind si_call_addr.
    unsafe {
        if (*info).si_code == SYS_SECCOMP && Dune::is_active() {
            TRAPPED.store(info.cast::<i32>().add(6).read(), SeqCst);
        }
        (*context).uc_mcontext.gregs[libc::REG_RAX as usize] = 4242;
    }
}

fn seccomp_trap_reaches_the_handler() {
    spawn(|| {
        let _dune = enter();
        set_handler(libc::SIGSYS, on_sigsys, 0, &[]);
        // SAFETY: a filter of our own, and a plain call.
        unsafe {
            filter(&[(libc::SYS_getppid, libc::SECCOMP_RET_TRAP)]);
            assert_eq!(libc::syscall(libc::SYS_getppid), 4242);
        }
        assert_eq!(i64::from(TRAPPED.load(SeqCst)), libc::SYS_getppid);
        assert!(Dune::is_active());
    })
    .wait()
    .assert_success();
}

fn seccomp_kill_kills() {
    let ended = spawn(|| {
        let _dune = enter();
        filter(&[(libc::SYS_getppid, libc::SECCOMP_RET_KILL_PROCESS)]);
        // SAFETY: a call without arguments.
        unsafe { libc::syscall(libc::SYS_getppid) };
    })
    .wait();
    assert_eq!(ended.signal(), Some(libc::SIGSYS), "{ended:?}");
}

fn seccomp_strict_mode() {
    let mut pipe = [0; 2];
    // SAFETY: two fds into an array of two.
    assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
    let child = spawn(|| {
        let _dune = enter();
        // SAFETY: plain calls; in strict mode read, write and exit are left.
        unsafe {
            assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_STRICT, 0, 0, 0), 0);
            let mut byte = 0u8;
            libc::read(pipe[0], (&raw mut byte).cast(), 1);
            byte += 1;
            libc::write(1, (&raw const byte).cast(), 1);
            libc::syscall(libc::SYS_exit, 0);
        }
    });
    // SAFETY: one byte.
    assert_eq!(unsafe { libc::write(pipe[1], c"a".as_ptr().cast(), 1) }, 1);
    let ended = child.wait();
    ended.assert_success();
    assert_eq!(ended.output, "b");
    let ended = spawn(|| {
        let _dune = enter();
        // SAFETY: a call that strict mode does not allow.
        unsafe {
            libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_STRICT, 0, 0, 0);
            libc::syscall(libc::SYS_getppid);
        }
    })
    .wait();
    assert_eq!(ended.signal(), Some(libc::SIGKILL), "{ended:?}");
}

/// A child that enters Dune mode, lets itself be traced, and ends with 0 where `body` says so. Its number.
fn traced_child(body: impl FnOnce() -> bool) -> i32 {
    // SAFETY: the child only makes plain calls and ends.
    unsafe {
        let pid = libc::fork();
        assert!(pid >= 0);
        if pid == 0 {
            let _dune = enter();
            libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
            let is_good = body();
            libc::_exit(i32::from(!is_good));
        }
        pid
    }
}

/// Waits until a traced child stops by that signal.
#[track_caller]
fn wait_for_stop(pid: i32, signal: i32) {
    let mut status = 0;
    // SAFETY: our own child.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    assert!(
        libc::WIFSTOPPED(status) && libc::WSTOPSIG(status) == signal,
        "{status:#x}"
    );
}

/// A traced child that stops, and makes `calls` calls of getppid.
fn traced(shared: &Shared, calls: u64) -> i32 {
    traced_at_calls(|| {
        for index in 0..calls {
            // SAFETY: a plain call.
            let result = unsafe { libc::syscall(libc::SYS_getppid) };
            shared.word(index as usize).store(result as u64, SeqCst);
        }
    })
}

/// A traced child that stops and goes on with `body`.
fn traced_at_calls(body: impl FnOnce()) -> i32 {
    let pid = traced_child(|| {
        // SAFETY: stops the child.
        unsafe { libc::raise(libc::SIGSTOP) };
        body();
        Dune::is_active()
    });
    wait_for_stop(pid, libc::SIGSTOP);
    // SAFETY: our own child.
    unsafe {
        assert_eq!(
            libc::ptrace(libc::PTRACE_SETOPTIONS, pid, 0, libc::PTRACE_O_TRACESYSGOOD),
            0
        );
    }
    pid
}

/// Lets it go on to its end; calls `stop` with the call's number, whether it returns, at each stop.
fn trace(pid: i32, mut stop: impl FnMut(i64, bool)) -> i32 {
    let mut entered = false;
    // SAFETY: our own traced child; plain registers.
    unsafe {
        loop {
            assert_eq!(libc::ptrace(libc::PTRACE_SYSCALL, pid, 0, 0), 0);
            let mut status = 0;
            assert_eq!(libc::waitpid(pid, &mut status, 0), pid);
            if !libc::WIFSTOPPED(status) {
                return status;
            }
            if libc::WSTOPSIG(status) == libc::SIGTRAP | 0x80 {
                let mut registers: libc::user_regs_struct = std::mem::zeroed();
                assert_eq!(libc::ptrace(libc::PTRACE_GETREGS, pid, 0, &raw mut registers), 0);
                entered = !entered;
                stop(registers.orig_rax as i64, !entered);
            }
        }
    }
}

fn tracer_sees_each_call_twice() {
    const CALLS: u64 = 10;
    let shared = Shared::new();
    let pid = traced(&shared, CALLS);
    let (mut enters, mut exits) = (0, 0);
    let status = trace(pid, |number, returns| {
        if number == libc::SYS_getppid {
            *if returns { &mut exits } else { &mut enters } += 1;
        }
    });
    assert_eq!((enters, exits), (CALLS, CALLS));
    assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "{status:#x}");
    for index in 0..CALLS as usize {
        assert_eq!(shared.word(index).load(Relaxed), u64::from(std::process::id()));
    }
}

fn tracer_may_change_a_result() {
    let shared = Shared::new();
    let pid = traced(&shared, 3);
    let mut seen = 0;
    let status = trace(pid, |number, returns| {
        if number == libc::SYS_getppid && returns {
            seen += 1;
            // SAFETY: our own traced child.
            unsafe {
                let mut registers: libc::user_regs_struct = std::mem::zeroed();
                libc::ptrace(libc::PTRACE_GETREGS, pid, 0, &raw mut registers);
                registers.rax = 1_000_000 + seen;
                libc::ptrace(libc::PTRACE_SETREGS, pid, 0, &raw const registers);
            }
        }
    });
    assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "{status:#x}");
    for index in 0..3 {
        assert_eq!(shared.word(index).load(Relaxed), 1_000_001 + index as u64);
    }
}

/// Each stop takes the thread's extended state out of the CPU, right before a guest is entered.
fn tracer_leaves_the_fpu_state_alone() {
    let shared = Shared::new();
    let pid = traced_at_calls(|| {
        let avx = std::arch::is_x86_feature_detected!("avx");
        let mut input = Ymm::of_words(|word| 0x0101_0101_0101_0101 * (word as u64 + 1));
        for round in 0..30 {
            assert_eq!(through_registers(&input, avx, 1), input, "round {round}");
            input.0[0][0] = input.0[0][0].rotate_left(1);
            shared.word(0).fetch_add(1, SeqCst);
        }
    });
    // The tracer uses those registers, too.
    let status = trace(pid, |_, _| {
        let other = Ymm::of_words(|_| !0);
        std::hint::black_box(through_registers(&other, false, 1));
    });
    assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "{status:#x}");
    assert_eq!(shared.word(0).load(SeqCst), 30);
}

/// What a core dump would show: the registers at the moment of death are the program's, not the host loop's.
fn abort_is_seen_where_it_was_called() {
    let shared = Shared::new();
    let pid = traced_child(|| {
        let here = 0u8;
        shared.word(0).store(&raw const here as u64, SeqCst);
        // SAFETY: ends the child.
        unsafe { libc::abort() }
    });
    wait_for_stop(pid, libc::SIGABRT);
    let mut status = 0;
    // SAFETY: our own traced child; plain registers.
    unsafe {
        let mut registers: libc::user_regs_struct = std::mem::zeroed();
        assert_eq!(libc::ptrace(libc::PTRACE_GETREGS, pid, 0, &raw mut registers), 0);
        let stack = shared.word(0).load(SeqCst);
        assert!(
            stack.abs_diff(registers.rsp) < 1 << 20,
            "RSP {:#x}, a local was at {stack:#x}",
            registers.rsp
        );
        libc::ptrace(libc::PTRACE_CONT, pid, 0, libc::SIGABRT);
        assert_eq!(libc::waitpid(pid, &mut status, 0), pid);
        assert!(
            libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGABRT,
            "{status:#x}"
        );
    }
}

/// PR_SET_TSC, set in Dune mode or before it: Linux keeps it for the thread, at CPL0 RDTSC reads on, and behind `leave` it is
/// SIGSEGV as without Dune.
fn tsc_is_the_guests_own_until_it_leaves() {
    let forbid = || {
        let mut now = 0;
        // SAFETY: a setting of the thread, and a word of our own.
        unsafe {
            assert_eq!(libc::prctl(libc::PR_SET_TSC, libc::PR_TSC_SIGSEGV, 0, 0, 0), 0);
            assert_eq!(libc::prctl(libc::PR_GET_TSC, &raw mut now, 0, 0, 0), 0);
        }
        assert_eq!(now, libc::PR_TSC_SIGSEGV);
    };
    for (inside, before_entering) in [(false, true), (true, false), (true, true)] {
        let shared = Shared::new();
        let ended = spawn(|| {
            if before_entering {
                forbid();
            }
            if inside {
                let dune = enter();
                if !before_entering {
                    forbid();
                }
                let first = rdtsc();
                // The clock of the vDSO reads it, too.
                let start = Instant::now();
                shared.word(0).store(rdtsc() - first, SeqCst);
                assert!(start.elapsed() > Duration::ZERO && Dune::is_active());
                dune.leave();
            }
            shared.word(1).store(1, SeqCst);
            shared.word(2).store(rdtsc(), SeqCst);
        })
        .wait();
        assert_eq!(ended.signal(), Some(libc::SIGSEGV), "{ended:?}");
        let words = [0, 1, 2].map(|word| shared.word(word).load(SeqCst));
        assert_eq!((words[0] > 0, words[1], words[2]), (inside, 1, 0));
    }
}

#[inline(never)]
extern "C" fn broken_at(value: u64) -> u64 {
    std::hint::black_box(value).wrapping_mul(7)
}

/// What a debugger does: an int3 in the code, which stops the thread there with the program's registers; the byte put back,
/// the thread goes on, outside Dune mode.
fn breakpoint_stops_at_the_guests_instruction() {
    const INT3: u64 = 0xcc;
    let address = broken_at as *const () as u64;
    let pid = traced_child(|| {
        // Executed before, so that the EPT has the page.
        let before = broken_at(1) == 7;
        // SAFETY: a signal to ourselves.
        unsafe { libc::raise(libc::SIGSTOP) };
        let inside = Dune::is_active();
        let result = broken_at(6) == 42 && broken_at(2) == 14;
        before && inside && result && !Dune::is_active()
    });
    wait_for_stop(pid, libc::SIGSTOP);
    let mut status = 0;
    // SAFETY: our own child, which lets itself be traced; its code is changed and put back.
    unsafe {
        let code = libc::ptrace(libc::PTRACE_PEEKTEXT, pid, address, 0) as u64;
        assert_eq!(
            libc::ptrace(libc::PTRACE_POKETEXT, pid, address, code & !0xff | INT3),
            0
        );
        assert_eq!(libc::ptrace(libc::PTRACE_CONT, pid, 0, 0), 0);
        wait_for_stop(pid, libc::SIGTRAP);
        let mut registers: libc::user_regs_struct = std::mem::zeroed();
        assert_eq!(libc::ptrace(libc::PTRACE_GETREGS, pid, 0, &raw mut registers), 0);
        assert_eq!((registers.rip, registers.rdi), (address + 1, 6));
        registers.rip = address;
        assert_eq!(libc::ptrace(libc::PTRACE_POKETEXT, pid, address, code), 0);
        assert_eq!(libc::ptrace(libc::PTRACE_SETREGS, pid, 0, &raw const registers), 0);
        assert_eq!(libc::ptrace(libc::PTRACE_CONT, pid, 0, 0), 0);
        assert_eq!(libc::waitpid(pid, &mut status, 0), pid);
        assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "{status:#x}");
    }
}
