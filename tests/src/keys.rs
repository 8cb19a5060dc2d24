// SPDX-License-Identifier: MIT OR Apache-2.0
//! Protection keys: those of page tables in Dune mode, and Linux' own.

use std::arch::asm;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering::Relaxed;

use libdune::paging::PagingError;
use libdune::user::PageFault;
use libdune::user::UserExit;
use libdune::user::UserSlice;
use libdune::Gva;
use libdune::Permissions;
use libdune::Thread;

use crate::framework::Need;
use crate::framework::Suite;
use crate::framework::Test;
use crate::helpers;
use crate::helpers::pin_to_cpu;
use crate::support::count_signal;
use crate::support::enter;
use crate::support::set_handler;
use crate::support::set_plain_handler;
use crate::support::spawn;
use crate::support::timer;
use crate::support::Child;
use crate::support::Map;
use crate::support::PAGE;
use crate::support::SIGNALS;
use crate::user::code;
use crate::user::error_code;
use crate::user::give;
use crate::user::Sandbox;
use crate::user::DATA;
use crate::user::PLENTY;
use crate::user::STACK;

/// What a CPU with protection keys has, once Linux uses them.
const NEEDS: &[Need] = &[Need::CpuFlag("ospke")];

/// Of the suite `long`: only one machine of it has keys.
pub const TESTS: &[Test] = &[
    Test::asserting("protection_keys_bind_cpl3_and_cpl0", protection_keys_bind_cpl3_and_cpl0)
        .suite(Suite::Long)
        .needs(NEEDS),
    Test::asserting("protection_keys_are_kept_apart", protection_keys_are_kept_apart)
        .suite(Suite::Long)
        .needs(NEEDS),
    Test::asserting(
        "cpl3_that_gives_up_all_keys_ends_nobody",
        cpl3_that_gives_up_all_keys_ends_nobody,
    )
    .suite(Suite::Long)
    .timeout_s(60)
    .needs(NEEDS),
    Test::asserting(
        "keys_of_the_process_bind_its_system_calls",
        keys_of_the_process_bind_its_system_calls,
    )
    .suite(Suite::Long)
    .needs(NEEDS),
];

code! {
    // PKRU becomes EDI; then a word at RSI is read, or written where EDX says so.
    access_with_keys: "mov r8d, edx" "mov eax, edi" "xor ecx, ecx" "xor edx, edx" "wrpkru" "test r8d, r8d" "jnz 2f"
        "mov rax, [rsi]" "syscall" "hlt" "2:" "mov [rsi], rax" "syscall" "hlt";
    tell_keys: "xor ecx, ecx" "rdpkru" "syscall" "hlt";
    // PKRU becomes EDI, for good.
    spin_with_keys: "mov eax, edi" "xor ecx, ecx" "xor edx, edx" "wrpkru" "xor eax, eax" "2:" "inc rax" "jmp 2b";
}

/// All keys without any access. Bochs 2.7 would apply what is only write-protected by key 0 to the kernel's own pages.
const NOTHING: u32 = 0x5555_5555;
/// The key of the tests' pages in tables of Dune mode.
const KEY: u8 = 5;

/// PKRU that refuses a key: all accesses, or writes.
const fn no_access(key: u8) -> u32 {
    1 << (2 * key)
}

const fn no_write(key: u8) -> u32 {
    2 << (2 * key)
}

fn pkru() -> u32 {
    let pkru;
    // SAFETY: The CPU has keys, and Linux uses them: CR4.PKE is set.
    unsafe { asm!("rdpkru", out("eax") pkru, in("ecx") 0, out("edx") _) };
    pkru
}

/// # Safety
///
/// The thread goes without what `pkru` refuses.
unsafe fn set_pkru(pkru: u32) {
    // SAFETY: As in `pkru`.
    unsafe { asm!("wrpkru", in("eax") pkru, in("ecx") 0, in("edx") 0) };
}

fn set_key(thread: &Thread<'_>, address: u64, key: u8) {
    let start = Gva::new(address).unwrap();
    let space = thread.address_space();
    space.set_protection_key(start, PAGE as u64, key).unwrap().flush();
}

fn protection_keys_bind_cpl3_and_cpl0() {
    let dune = enter();
    let thread = dune.thread();
    let mut sandbox = Sandbox::new(&thread, access_with_keys());
    let data = sandbox.page(DATA);
    set_key(&thread, data, KEY);
    let space = thread.address_space();
    assert_eq!(space.look_up(Gva::new(data).unwrap()).unwrap().key, KEY);
    let too_large = space.set_protection_key(Gva::new(data).unwrap(), PAGE as u64, 16).err();
    assert!(matches!(too_large, Some(PagingError::NoSuchKey(16))));

    let before = pkru();
    let refused = |bits| {
        UserExit::PageFault(PageFault {
            address: data,
            error_code: error_code::PRESENT | error_code::USER | error_code::KEY | bits,
        })
    };
    for (pkru_of_cpl3, read, write) in [
        (0, UserExit::Syscall, UserExit::Syscall),
        (no_access(KEY), refused(0), refused(error_code::WRITE)),
        (no_write(KEY), UserExit::Syscall, refused(error_code::WRITE)),
        (
            no_access(KEY + 1) | no_write(KEY + 2),
            UserExit::Syscall,
            UserExit::Syscall,
        ),
    ] {
        for (is_write, wanted) in [(0, read), (1, write)] {
            sandbox.restart();
            let registers = sandbox.context.registers_mut();
            (registers.rdi, registers.rsi, registers.rdx) = (pkru_of_cpl3.into(), data, is_write);
            assert_eq!(sandbox.run(&thread), wanted, "{pkru_of_cpl3:#x}, write {is_write}");
            assert_eq!(pkru(), before);
        }
    }

    // CPL0 on its own account: Linux begins a thread without any key but 0. (Bochs 2.7 minds only what may not be written there.)
    let slice = UserSlice::writable(&thread, data, 8).unwrap();
    assert_ne!(before & no_access(KEY), 0, "{before:#x}");
    // SAFETY: the slice's page is the only one with that key.
    unsafe { set_pkru(before & !(3 << (2 * KEY)) | no_write(KEY)) };
    slice.to_vec().unwrap();
    let fault = slice.write(&[1; 8]).unwrap_err();
    assert_eq!((fault.address, fault.is_write), (data, true));
    // SAFETY: refuses less than before.
    unsafe { set_pkru(before & !(3 << (2 * KEY))) };
    slice.write(&[1; 8]).unwrap();
    // SAFETY: as it was.
    unsafe { set_pkru(before) };
    set_key(&thread, data, 0);
    slice.write(&[2; 8]).unwrap();
    drop(sandbox);
    dune.leave();
}

/// PKRU of CPL0 and of each context: over system calls, exits, signals and other threads on the CPU.
fn protection_keys_are_kept_apart() {
    const OWN: u32 = 0x5555_5500;
    pin_to_cpu(0).unwrap();
    let other = std::thread::spawn(|| {
        let end = std::time::Instant::now() + std::time::Duration::from_millis(200);
        while std::time::Instant::now() < end {
            // SAFETY: refuses keys that nothing has.
            unsafe { set_pkru(0x5555_4444) };
            std::hint::spin_loop();
            assert_eq!(pkru(), 0x5555_4444);
        }
    });
    set_plain_handler(libc::SIGALRM, count_signal, libc::SA_RESTART);
    let dune = enter();
    let thread = dune.thread();
    let mut telling = Sandbox::new(&thread, tell_keys());
    let mut spinning = Sandbox::new(&thread, spin_with_keys());
    spinning.context.registers_mut().rdi = no_write(9).into();
    // SAFETY: refuses keys that nothing has.
    unsafe { set_pkru(OWN) };
    timer(libc::ITIMER_REAL, 1000);
    for _ in 0..20 {
        assert_eq!(spinning.context.run_for(&thread, 500_000), UserExit::Timeout);
        assert_eq!(pkru(), OWN);
        // A context begins with all keys.
        telling.restart();
        assert_eq!(telling.run(&thread), UserExit::Syscall);
        assert_eq!((telling.context.registers().rax, pkru()), (0, OWN));
        // SAFETY: gives the CPU to the other thread.
        unsafe { libc::sched_yield() };
        std::hint::black_box(helpers::cpuid(0, 0));
        assert_eq!(pkru(), OWN);
    }
    timer(libc::ITIMER_REAL, 0);
    assert!(SIGNALS.load(Relaxed) > 0);
    // What the spinning one set is still there.
    spinning.context.registers_mut().rip = telling.page(0);
    assert_eq!(spinning.run(&thread), UserExit::Syscall);
    assert_eq!(spinning.context.registers().rax as u32, no_write(9));
    drop((telling, spinning));
    dune.leave();
    other.join().unwrap();
}

/// Linux accesses the thread's memory when it takes the CPU from it, and for a signal; the host loop has a stack.
fn cpl3_that_gives_up_all_keys_ends_nobody() {
    pin_to_cpu(0).unwrap();
    let neighbour = std::thread::spawn(|| {
        let end = std::time::Instant::now() + std::time::Duration::from_millis(500);
        while std::time::Instant::now() < end {
            std::hint::spin_loop();
        }
    });
    set_plain_handler(libc::SIGALRM, count_signal, libc::SA_RESTART);
    let dune = enter();
    let thread = dune.thread();
    let before = pkru();
    let mut sandbox = Sandbox::new(&thread, spin_with_keys());
    sandbox.context.registers_mut().rdi = NOTHING.into();
    set_key(&thread, sandbox.page(STACK), KEY);
    timer(libc::ITIMER_REAL, 1000);
    let mut last = 0;
    for _ in 0..20 {
        assert_eq!(sandbox.context.run_for(&thread, 1_000_000), UserExit::Timeout);
        assert_eq!(pkru(), before);
        let now = sandbox.context.registers().rax;
        assert!(now > last, "{now} after {last}");
        last = now;
    }
    timer(libc::ITIMER_REAL, 0);
    assert!(SIGNALS.load(Relaxed) > 0);
    neighbour.join().unwrap();

    // Memory that the process has not touched yet, by code that has its key only.
    let mut sandbox = Sandbox::new(&thread, access_with_keys());
    for _ in 0..8 {
        let fresh = Map::new(PAGE);
        let address = fresh.start as u64;
        give(&thread, address, 1, Permissions::USER);
        set_key(&thread, address, KEY);
        sandbox.restart();
        let registers = sandbox.context.registers_mut();
        (registers.rdi, registers.rsi, registers.rdx) = (u64::from(NOTHING & !no_access(KEY)), address, 0);
        assert_eq!(sandbox.context.run_for(&thread, PLENTY), UserExit::Syscall);
        assert_eq!((sandbox.context.registers().rax, pkru()), (0, before));
        set_key(&thread, address, 0);
        give(&thread, address, 1, Permissions::ALL);
    }
    drop(sandbox);
    dune.leave();
}

/// docs/guest-policy.md: EPT has no keys; but Linux looks at them where it accesses memory for the thread. (Writes: what may not
/// even be read Bochs 2.7 lets the kernel read.)
fn keys_of_the_process_bind_its_system_calls() {
    const PKEY_DISABLE_WRITE: u32 = 2;
    const SEGV_PKUERR: i32 = 4;
    extern "C" fn end_with_code(_: i32, info: *mut libc::siginfo_t, _: *mut libc::ucontext_t) {
        // SAFETY: Linux', or libdune's; the child's end.
        unsafe { libc::_exit((*info).si_code) };
    }
    // SAFETY: a key of this process.
    let key = unsafe { libc::syscall(libc::SYS_pkey_alloc, 0, PKEY_DISABLE_WRITE) };
    assert!(key > 0, "{}", io::Error::last_os_error());
    let map = Map::new(2 * PAGE);
    map.write(0, 7);
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: memory of our own.
    let result = unsafe { libc::syscall(libc::SYS_pkey_mprotect, map.start, map.bytes, access, key) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    set_handler(libc::SIGSEGV, end_with_code, 0, &[]);
    let zero = fs::File::open("/dev/zero").unwrap();
    let assert_refused = || {
        // SAFETY: writes to memory of our own, which Linux refuses.
        let result = unsafe { libc::read(zero.as_raw_fd(), map.start.cast(), 1) };
        let errno = io::Error::last_os_error().raw_os_error();
        assert_eq!((result, errno, map.read(0)), (-1, Some(libc::EFAULT), 7));
    };
    let assert_ends_with_code = |child: Child| {
        let ended = child.wait();
        assert!(libc::WIFEXITED(ended.status), "{ended:#x?}");
        assert_eq!(libc::WEXITSTATUS(ended.status), SEGV_PKUERR, "{ended:#x?}");
    };

    // Natively; in Dune mode: a page that is there may be accessed, one that Linux has to provide may not.
    assert_refused();
    let dune = enter();
    assert_refused();
    map.write(0, 7);
    assert_refused();
    dune.leave();
    assert_ends_with_code(spawn(|| map.write(0, 8)));
    assert_ends_with_code(spawn(|| {
        let dune = enter();
        map.write(PAGE, 8);
        dune.leave();
    }));
}
