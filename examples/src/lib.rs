// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the examples share: reading registers, and measuring.

use core::arch::asm;
use core::arch::x86_64::_rdtsc;
use std::fmt;

use libdune::abi::Counters;

/// Current privilege level: 0 in Dune mode, 3 in an ordinary process.
pub fn cpl() -> u16 {
    let selector: u16;
    // SAFETY: Reads CS.
    unsafe { asm!("mov {0:x}, cs", out(reg) selector, options(nomem, nostack, preserves_flags)) };
    selector & 3
}

/// Address of the instruction that reads it.
pub fn rip() -> u64 {
    let address: u64;
    // SAFETY: Computes an address.
    unsafe { asm!("lea {}, [rip]", out(reg) address, options(nomem, nostack, preserves_flags)) };
    address
}

/// The page-table root, `None` outside Dune mode, where reading it is not allowed.
pub fn cr3() -> Option<u64> {
    (cpl() == 0).then(|| {
        let value: u64;
        // SAFETY: At CPL0.
        unsafe { asm!("mov {}, cr3", out(reg) value, options(nomem, nostack, preserves_flags)) };
        value
    })
}

/// Time-stamp counter.
#[inline(always)]
pub fn ticks() -> u64 {
    // SAFETY: Linux lets programs read it, and so does Dune mode.
    unsafe { _rdtsc() }
}

/// What one tick of the time-stamp counter is here.
///
/// The emulator counts one per instruction: a run of no-ops then takes as many ticks as there are (Bochs 3 counts by the trace,
/// of up to 32). A real CPU does several in one.
pub fn unit() -> &'static str {
    const NOPS: u64 = 4096;
    // One copy: each of several would have pages of its own, and meet a page fault there.
    #[inline(never)]
    fn run() -> u64 {
        let start = ticks();
        // SAFETY: Does nothing.
        unsafe { asm!(".rept 4096", "nop", ".endr", options(nomem, nostack, preserves_flags)) };
        ticks() - start
    }
    // So many: the emulated clock comes in every one of some runs in a row at times.
    let fastest = (0..64).map(|_| run()).min().unwrap_or(0);
    if (NOPS - 64..NOPS + 64).contains(&fastest) {
        "instructions (emulated machine)"
    } else {
        "TSC cycles"
    }
}

/// The middle one of some figures, 0 of none.
pub fn median(values: &mut [u64]) -> u64 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
}

/// Prints figures as a row for `make bench-lib`, which collects such lines. Names have nothing that JSON would quote.
pub fn print_row(bench: &str, system: &str, values: &[u64]) {
    let mut sorted = values.to_vec();
    let (value, n) = (median(&mut sorted), values.len());
    let mean = values.iter().sum::<u64>() / n.max(1) as u64;
    let max = values.iter().copied().max().unwrap_or(0);
    println!(r#"@bench {{"bench":"{bench}","system":"{system}","value":{value},"mean":{mean},"max":{max},"n":{n}}}"#);
}

/// Times of the same thing done again and again.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    total: u64,
    min: u64,
    count: u64,
}

impl Times {
    /// Does it `count` times, after a few times that do not count.
    pub fn of(count: u64, mut action: impl FnMut()) -> Self {
        const WARM_UP: u64 = 16;
        for _ in 0..WARM_UP {
            action();
        }
        let mut times = Self {
            total: 0,
            min: u64::MAX,
            count,
        };
        let bare = Self::empty();
        for _ in 0..count {
            let start = ticks();
            action();
            let taken = (ticks() - start).saturating_sub(bare);
            times.total += taken;
            times.min = times.min.min(taken);
        }
        times
    }

    /// Ticks that measuring nothing takes.
    fn empty() -> u64 {
        (0..16)
            .map(|_| {
                let start = ticks();
                ticks() - start
            })
            .min()
            .unwrap_or(0)
    }

    /// Ticks per time, on average.
    pub fn mean(&self) -> u64 {
        self.total / self.count.max(1)
    }

    /// Ticks of the fastest time.
    pub fn min(&self) -> u64 {
        self.min
    }
}

impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "mean {:>7}  min {:>7}", self.mean(), self.min())
    }
}

/// Basic exit reason "external interrupt": not the program's doing.
const EXTERNAL_INTERRUPT: usize = 1;

/// Names of the exit reasons that programs here meet (SDM, "VMX Basic Exit Reasons").
fn reason_name(reason: usize) -> &'static str {
    match reason {
        0 => "exception or NMI",
        EXTERNAL_INTERRUPT => "external interrupt",
        10 => "CPUID",
        18 => "VMCALL",
        28 => "control-register access",
        48 => "EPT violation",
        49 => "EPT misconfiguration",
        _ => "other",
    }
}

/// Exits between two readings of the counters, without those that interrupts from outside caused.
pub fn own_exits(before: &Counters, after: &Counters) -> u64 {
    exits_by_reason(before, after)
        .filter(|(reason, _)| *reason != EXTERNAL_INTERRUPT)
        .map(|(_, exits)| exits)
        .sum()
}

/// Exits between two readings of the counters by reason, where there were any.
pub fn exits_by_reason<'a>(before: &'a Counters, after: &'a Counters) -> impl Iterator<Item = (usize, u64)> + 'a {
    let pairs = before.exits.iter().zip(&after.exits);
    pairs
        .map(|(before, after)| after - before)
        .enumerate()
        .filter(|(_, exits)| *exits != 0)
}

/// The counters that are not 0, a line each.
pub fn exit_lines(counters: &Counters) -> impl Iterator<Item = String> + '_ {
    let used = counters.exits.iter().enumerate().filter(|(_, exits)| **exits != 0);
    used.map(|(reason, exits)| format!("  {exits:>6}  {} ({reason})", reason_name(reason)))
}

/// Prints why Dune mode could not be entered, and ends the program.
pub fn die(error: &libdune::Error) -> ! {
    eprintln!("dune: {error}");
    std::process::exit(1)
}
