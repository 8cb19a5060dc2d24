// SPDX-License-Identifier: MIT OR Apache-2.0

//! What a forwarded system call costs, beside the same call outside Dune mode.

use core::arch::asm;

use clap::Parser;
use dune_examples::die;
use dune_examples::own_exits;
use dune_examples::unit;
use dune_examples::Times;
use libdune::Dune;

/// Measures getpid in and out of Dune mode.
#[derive(Parser)]
struct Options {
    /// How often each is measured.
    #[arg(long, default_value_t = 10_000)]
    calls: u64,
}

fn getpid_by_syscall() -> u32 {
    let result: u64;
    // SAFETY: getpid has no arguments.
    unsafe {
        asm!("syscall", inout("rax") libc::SYS_getpid as u64 => result, out("rcx") _, out("r11") _, options(nostack));
    }
    result as u32
}

/// A system call without the stub: only in Dune mode.
fn getpid_by_vmcall() -> u32 {
    let result: u64;
    // SAFETY: getpid has no arguments; RCX and R11 are clobbered as by SYSCALL.
    unsafe {
        asm!("vmcall", inout("rax") libc::SYS_getpid as u64 => result, out("rcx") _, out("r11") _, options(nostack));
    }
    result as u32
}

fn main() {
    let options = Options::parse();
    let pid = std::process::id();
    let unit = unit();
    println!("getpid, {} times each, in {unit}:", options.calls);

    let check = |found: u32| assert_eq!(found, pid, "getpid gave another number");
    let native = Times::of(options.calls, || check(getpid_by_syscall()));
    println!("  native syscall        {native}");

    let dune = Dune::enter().unwrap_or_else(|error| die(&error));
    for (name, call) in [
        ("Dune mode, SYSCALL  ", getpid_by_syscall as fn() -> u32),
        ("Dune mode, VMCALL   ", getpid_by_vmcall),
    ] {
        // Exits are counted over bare calls: measuring makes none, printing does.
        let before = dune.counters();
        for _ in 0..options.calls {
            check(call());
        }
        let after = dune.counters();
        let times = Times::of(options.calls, || check(call()));
        let exits = own_exits(&before, &after) as f64 / options.calls.max(1) as f64;
        println!("  {name}  {times}  exits per call {exits:.3}");
    }
    dune.leave();
}
