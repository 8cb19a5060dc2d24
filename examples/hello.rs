// SPDX-License-Identifier: MIT OR Apache-2.0

//! Enters Dune mode, looks around, divides by zero, catches it and goes on.

use core::arch::asm;

use dune_examples::cpl;
use dune_examples::cr3;
use dune_examples::die;
use dune_examples::exit_lines;
use dune_examples::rip;
use libdune::Dune;
use libdune::Outcome;
use libdune::Thread;
use libdune::TrapFrame;
use libdune::Vector;

// ANCHOR: handler
/// Bytes of the `div ecx` below.
const DIV_BYTES: u64 = 2;

/// What the handler makes the quotient.
const QUOTIENT: u32 = 42;

fn divide_error(frame: &mut TrapFrame, _thread: &Thread<'_>) -> Outcome {
    frame.rax = u64::from(QUOTIENT);
    frame.rip += DIV_BYTES;
    Outcome::Resume
}
// ANCHOR_END: handler

// ANCHOR: divide
fn divide(dividend: u32, divisor: u32) -> u32 {
    let quotient;
    // SAFETY: A divisor of 0 goes to the handler, which sets the quotient.
    unsafe {
        asm!("div ecx", in("ecx") divisor, inout("eax") dividend => quotient, inout("edx") 0 => _, options(nostack));
    }
    quotient
}
// ANCHOR_END: divide

fn main() {
    // ANCHOR: main
    println!("outside: pid {} at CPL {}", std::process::id(), cpl());
    let dune = Dune::enter().unwrap_or_else(|error| die(&error));
    println!("inside:  pid {} at CPL {}", std::process::id(), cpl());
    println!("RIP {:#x}, CR3 {:#x}", rip(), cr3().unwrap_or(0));

    dune.set_exception_handler(Vector::DE, divide_error);
    println!("84 / 2 = {}", divide(84, 2));
    let quotient = divide(84, 0);
    println!("84 / 0 = {quotient}, said the #DE handler");

    println!("VM exits so far:");
    for line in exit_lines(&dune.counters()) {
        println!("{line}");
    }
    dune.leave();
    println!("outside: pid {} at CPL {}", std::process::id(), cpl());
    // ANCHOR_END: main
    if quotient != QUOTIENT || cpl() != 3 {
        std::process::exit(1);
    }
}
