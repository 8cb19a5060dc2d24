// SPDX-License-Identifier: MIT OR Apache-2.0

//! System calls that go back into the guest without a RUN (docs/architecture.md, "The shortcut").

use std::arch::asm;
use std::arch::global_asm;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::mpsc;
use std::time::Duration;
use std::time::Instant;

use libdune::Dune;

use crate::framework::Need;
use crate::framework::Test;
use crate::framework::User;
use crate::module::assert_nothing_in_use;
use crate::programs::total;
use crate::raw::Ended;
use crate::raw::RawGuest;
use crate::sched::fences_abort_sections;
use crate::support::count_signal;
use crate::support::enter;
use crate::support::for_each_rseq;
use crate::support::install_signal_probe;
use crate::support::load;
use crate::support::set_affinity;
use crate::support::set_plain_handler;
use crate::support::spawn;
use crate::support::timer;
use crate::support::Map;
use crate::support::PAGE;
use crate::support::SIGNALS;

pub const TESTS: &[Test] = &[
    Test::asserting("calls_come_back_by_the_shortcut", calls_come_back_by_the_shortcut).run_as(User::Root),
    Test::asserting(
        "exits_behind_a_shortcut_are_settled",
        exits_behind_a_shortcut_are_settled,
    ),
    Test::asserting("signals_come_between_shortcuts", signals_come_between_shortcuts),
    Test::asserting("sections_behind_a_shortcut_are_aborted", || {
        for_each_rseq(|area| fences_abort_sections(area, call))
    })
    .needs(&[Need::Cpus(2)]),
    Test::asserting(
        "calls_may_be_said_to_come_back_anywhere",
        calls_may_be_said_to_come_back_anywhere,
    ),
    Test::asserting("vcpu_may_end_in_the_call", vcpu_may_end_in_the_call),
    Test::asserting(
        "device_may_be_closed_beside_a_shortcut",
        device_may_be_closed_beside_a_shortcut,
    )
    .run_as(User::Root)
    .needs(&[Need::Cpus(2)]),
];

/// A system call that no library answers by itself.
fn call() {
    // SAFETY: no arguments.
    unsafe { libc::syscall(libc::SYS_getppid) };
}

/// All but a few, which an interrupt ended or whose thread was moved, go the short way.
fn calls_come_back_by_the_shortcut() {
    const CALLS: u64 = 2000;
    let before = [total("syscalls"), total("shortcuts")];
    let parent = std::process::id() as i32;
    spawn(|| {
        let dune = enter();
        for _ in 0..CALLS {
            // SAFETY: no arguments.
            assert_eq!(unsafe { libc::getppid() }, parent);
            // SAFETY: no such file.
            assert_eq!(unsafe { libc::close(-1) }, -1);
        }
        dune.leave();
    })
    .wait()
    .assert_success();
    let [calls, shortcuts] = [total("syscalls") - before[0], total("shortcuts") - before[1]];
    println!("{calls} calls, {shortcuts} of them by the shortcut");
    assert!(calls >= 2 * CALLS);
    assert!(shortcuts * 10 >= calls * 9, "{shortcuts} of {calls}");
}

/// What the guest does first behind a call is an exit that RUN settles: nothing of its registers is lost.
fn exits_behind_a_shortcut_are_settled() {
    const PAGES: usize = 200;
    install_signal_probe();
    let memory = Map::new(PAGES * PAGE);
    let hole = Map::new(PAGE);
    hole.protect(0, PAGE, libc::PROT_NONE);
    let parent = unsafe { libc::getppid() } as u64;
    let dune = enter();
    for page in 0..PAGES {
        let (mut rax, mut low) = (libc::SYS_getppid as u64, page as u64);
        let sum: u64;
        // SAFETY: A call without arguments, and a store to memory of ours that was not there before.
        unsafe {
            asm!(
                "syscall",
                "mov [{to}], rax",
                "lea {sum}, [rax + {low}]",
                sum = lateout(reg) sum,
                low = inout(reg) low,
                to = in(reg) memory.address() + page * PAGE,
                inout("rax") rax,
                lateout("rcx") _,
                lateout("r11") _,
            );
        }
        assert_eq!((rax, low, sum), (parent, page as u64, parent + page as u64));
        // SAFETY: just written.
        assert_eq!(
            unsafe { ((memory.address() + page * PAGE) as *const u64).read_volatile() },
            parent
        );
        call();
        assert!(load(hole.address()).is_err(), "an access that the host refuses");
    }
    assert!(Dune::is_active());
    dune.leave();
}

fn signals_come_between_shortcuts() {
    set_plain_handler(libc::SIGALRM, count_signal, libc::SA_RESTART);
    let dune = enter();
    // SAFETY: no arguments.
    let parent = unsafe { libc::getppid() };
    timer(libc::ITIMER_REAL, 1500);
    let (start, mut calls) = (Instant::now(), 0);
    while start.elapsed() < Duration::from_millis(500) {
        // SAFETY: no arguments.
        assert_eq!(unsafe { libc::getppid() }, parent, "after {calls} calls");
        calls += 1;
    }
    timer(libc::ITIMER_REAL, 0);
    let signals = SIGNALS.load(SeqCst);
    println!("{calls} calls, {signals} signals");
    assert!(calls > 100 && signals > 20, "{calls} calls, {signals} signals");
    dune.leave();
}

extern "C" {
    /// RUNs the guest; then, so often, makes a system call, and RUN again. What is left of the times, and the last RUN's RAX.
    ///
    /// RDI: file. RSI: request. RDX: its argument. RCX: the call, RAX, RDI, RSI, RDX. R8: times.
    #[link_name = "dune_test_run_and_call"]
    fn run_and_call(file: u64, request: u64, argument: u64, call: *const [u64; 4], times: u64) -> Left;
    /// Where RUN comes back, and the call, in there.
    static dune_test_run_behind: u8;
    static dune_test_call_behind: u8;
}

global_asm!(
    ".globl dune_test_run_and_call",
    "dune_test_run_and_call:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov r13, rdi",
    "mov r14, rsi",
    "mov r15, rdx",
    "mov rbp, rcx",
    "mov rbx, r8",
    "2:",
    "mov r12d, -1",
    "mov eax, {ioctl}",
    "mov rdi, r13",
    "mov rsi, r14",
    "mov rdx, r15",
    "syscall",
    ".globl dune_test_run_behind",
    "dune_test_run_behind:",
    // By the shortcut also from there.
    "test r12d, r12d",
    "jnz 5f",
    "sub rbx, 1",
    "jc 5f",
    "mov rax, [rbp]",
    "mov rdi, [rbp + 8]",
    "mov rsi, [rbp + 16]",
    "mov rdx, [rbp + 24]",
    "syscall",
    ".globl dune_test_call_behind",
    "dune_test_call_behind:",
    "jmp 2b",
    "5:",
    "mov rdx, rbx",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    ioctl = const libc::SYS_ioctl,
);

/// RAX and RDX of [`run_and_call`].
#[repr(C)]
struct Left {
    answer: i64,
    times: u64,
}

/// As [`run_and_call`], until RUN fails or the calls are over. The errno, and how many calls were made.
fn run_until_refused(guest: &mut RawGuest, call: [u64; 4], times: u64) -> (i32, u64) {
    come_back_behind_the_call(guest);
    run_and_call_on(guest, call, times)
}

fn come_back_behind_the_call(guest: &mut RawGuest) {
    let behind = &raw const dune_test_call_behind as u64;
    guest.edit(|page| page.forward_behind = behind);
}

/// The same, wherever the run page says that calls come back.
fn run_and_call_on(guest: &RawGuest, call: [u64; 4], times: u64) -> (i32, u64) {
    let (file, request) = (guest.device.fd as u64, u64::from(dune_abi::DUNE_RUN));
    let mut left = times;
    loop {
        // SAFETY: The guest is at CPL0 in memory of its own and does nothing but VMCALL.
        let answer = unsafe { run_and_call(file, request, guest.vcpu as u64, &call, left) };
        if answer.answer < 0 || answer.times == u64::MAX {
            return (-answer.answer as i32, times.wrapping_sub(answer.times));
        }
        // EXIT_AGAIN.
        left = answer.times;
    }
}

/// VMCALL for ever.
const CALLS: &[u8] = &[0x0f, 0x01, 0xc1, 0xeb, 0xfb];

/// `forward_behind` is user space's to choose: nowhere, in the kernel, no address at all, behind RUN itself.
fn calls_may_be_said_to_come_back_anywhere() {
    const TIMES: u64 = 300;
    let [run, call] = [&raw const dune_test_run_behind, &raw const dune_test_call_behind].map(|at| at as u64);
    let mut guest = RawGuest::new(CALLS);
    guest.run();
    for behind in [
        0,
        1,
        call - 2,
        call + 1,
        run,
        1 << 47,
        0xffff_8000_0000_0000,
        u64::MAX,
        call,
    ] {
        guest.edit(|page| page.forward_behind = behind);
        let (errno, calls) = run_and_call_on(&guest, [libc::SYS_getppid as u64, 0, 0, 0], TIMES);
        assert!(errno <= 0, "RUN failed by errno {errno}, {behind:#x}");
        // The last RUN has no call.
        assert_eq!(calls, TIMES + 1, "{behind:#x}");
        assert!(matches!(guest.run(), Ended::Call(_)), "{behind:#x}");
    }
}

/// The call that comes back is the one that destroys the vCPU: nothing of it is used any more.
fn vcpu_may_end_in_the_call() {
    for _ in 0..50 {
        let mut guest = RawGuest::new(CALLS);
        guest.run();
        let destroy = u64::from(dune_abi::DUNE_DESTROY_VCPU);
        let call = [
            libc::SYS_ioctl as u64,
            guest.device.fd as u64,
            destroy,
            guest.vcpu as u64,
        ];
        let (errno, calls) = run_until_refused(&mut guest, call, 100);
        assert_eq!((errno, calls), (libc::ENOENT, 1), "RUN of a vCPU that is gone");
    }
}

/// Another thread gives back the last reference to the space while this one comes back from its calls.
fn device_may_be_closed_beside_a_shortcut() {
    const ROUNDS: u32 = 60;
    const ENOUGH: u64 = 1 << 40;
    let mut all = 0;
    for round in 0..ROUNDS {
        let (sender, receiver) = mpsc::channel();
        all += std::thread::scope(|scope| {
            let runner = scope.spawn(move || {
                set_affinity(0, 1);
                // A vCPU is its maker's.
                let mut guest = RawGuest::new(CALLS);
                guest.run();
                // The last that looks into the run page: the other thread takes it away.
                come_back_behind_the_call(&mut guest);
                sender.send((guest.device.fd, guest.run_pointer() as usize)).unwrap();
                let (errno, calls) = run_and_call_on(&guest, [libc::SYS_getppid as u64, 0, 0, 0], ENOUGH);
                assert_eq!(errno, libc::EBADF, "RUN of a file that is closed");
                // Nothing of it is left but memory.
                std::mem::forget(guest);
                calls
            });
            set_affinity(0, 0);
            let (file, run) = receiver.recv().unwrap();
            std::thread::sleep(Duration::from_micros(300 + u64::from(round * 37)));
            // SAFETY: The runner looks at neither from here on; a closed file is an error that it expects.
            unsafe {
                libc::munmap(run as *mut libc::c_void, dune_abi::RUN_PAGE_BYTES);
                libc::close(file);
            }
            runner.join().unwrap()
        });
    }
    println!("{all} calls");
    assert!(all > u64::from(ROUNDS), "{all} calls");
    assert_nothing_in_use();
}
