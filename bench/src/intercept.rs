// SPDX-License-Identifier: MIT OR Apache-2.0

//! System calls that the program answers itself, or passes on: a hook at CPL0, and code at CPL3.

use core::arch::global_asm;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;

use dune_examples::ticks;
use libdune::hook::Hooks;
use libdune::hook::SystemCall;
use libdune::hook::Verdict;
use libdune::user::UserContext;
use libdune::user::UserExit;
use libdune::Dune;
use libdune::Gva;
use libdune::Permissions;
use libdune::Thread;

use crate::calls;
use crate::measure::timed;
use crate::measure::System;
use crate::pages::Memory;
use crate::pages::PAGE;

const CALLS: usize = 1000;
const ANSWER: u64 = 4711;

pub fn measure(system: &System<'_>) {
    let Some(dune) = system.dune else { return };
    if system.wants(&["intercept", "getpid_hooked"]) {
        at_cpl0(system, dune);
    }
    if system.wants(&["intercept_cpl3", "ptrace_getpid"]) {
        at_cpl3(system, dune);
    }
}

fn answer_getppid(call: &mut SystemCall, _: &Thread<'_>) -> Verdict {
    if call.number() == libc::SYS_getppid as u64 {
        return Verdict::Answer(ANSWER as i64);
    }
    Verdict::Allow
}

static HOOKED: AtomicU64 = AtomicU64::new(0);

/// Lets all calls go, and counts them.
fn count_and_allow(_: &mut SystemCall, _: &Thread<'_>) -> Verdict {
    HOOKED.store(HOOKED.load(Relaxed) + 1, Relaxed);
    Verdict::Allow
}

fn at_cpl0(system: &System<'_>, dune: &Dune) {
    let parent = calls::call(libc::SYS_getppid);
    dune.thread().set_hooks(Hooks {
        before: Some(answer_getppid),
        after: None,
    });
    system.repeated("intercept", CALLS, |_| {
        let mut answer = 0;
        let ticks = timed(|| answer = calls::call(libc::SYS_getppid));
        assert_eq!(answer, ANSWER);
        ticks
    });
    dune.thread().set_hooks(Hooks {
        before: Some(count_and_allow),
        after: None,
    });
    let pid = u64::from(std::process::id());
    system.repeated("getpid_hooked", CALLS, |_| {
        let before = HOOKED.load(Relaxed);
        let mut answer = 0;
        let ticks = timed(|| answer = calls::getpid());
        assert_eq!(
            (HOOKED.load(Relaxed) - before, answer),
            (1, pid),
            "hooks of a call, Linux' answer"
        );
        ticks
    });
    dune.thread().set_hooks(Hooks::default());
    assert_eq!(calls::call(libc::SYS_getppid), parent, "Linux' own answer again");
}

extern "C" {
    static dune_bench_calls: u8;
    static dune_bench_calls_end: u8;
}

// A loop of calls; counts them.
global_asm!(
    ".pushsection .rodata.dune_bench_calls, \"a\", @progbits",
    ".globl dune_bench_calls",
    "dune_bench_calls:",
    "syscall",
    "inc r15",
    "jmp dune_bench_calls",
    ".globl dune_bench_calls_end",
    "dune_bench_calls_end:",
    ".popsection",
);

fn at_cpl3(system: &System<'_>, dune: &Dune) {
    let memory = Memory::new(PAGE).small();
    let start = Gva::of(memory.at(0)).expect("a program's address is canonical");
    let space = dune.address_space();
    let give = |permissions| {
        let given = space.protect(start, PAGE as u64, permissions);
        given.expect("the page is the program's").flush();
    };
    // SAFETY: Labels of one section; the page is the program's. Linux' protection must allow what CPL3 executes.
    unsafe {
        let code = &raw const dune_bench_calls;
        let bytes = &raw const dune_bench_calls_end as usize - code as usize;
        memory.at(0).copy_from_nonoverlapping(code, bytes);
    }
    memory.protect(0, PAGE, libc::PROT_READ | libc::PROT_EXEC);
    give(Permissions::USER | Permissions::EXECUTE);

    let thread = dune.thread();
    let mut context = UserContext::new(&thread);
    context.registers_mut().rip = start.as_u64();
    context.registers_mut().rax = libc::SYS_getpid as u64;
    assert_eq!(context.run(&thread), UserExit::Syscall);
    let mut answered = 0;
    system.repeated("intercept_cpl3", CALLS, |_| {
        answered += 1;
        context.set_result(libc::SYS_getpid as u64);
        let start = ticks();
        let exit = context.run(&thread);
        let ticks = ticks() - start;
        assert_eq!(exit, UserExit::Syscall);
        ticks
    });
    let pid = u64::from(std::process::id());
    system.repeated("ptrace_getpid", CALLS, |_| {
        answered += 1;
        context.set_result(libc::SYS_getpid as u64);
        let start = ticks();
        let exit = context.run(&thread);
        let (number, _) = context.system_call();
        let result = calls::call(number as libc::c_long);
        context.set_result(result);
        let ticks = ticks() - start;
        assert_eq!((exit, result), (UserExit::Syscall, pid));
        ticks
    });
    assert_eq!(context.registers().r15, answered, "CPL3 made the calls");
    give(Permissions::ALL);
}
