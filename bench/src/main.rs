// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the basic operations cost: ticks, VM exits, and heavy operations (VMREAD, VMWRITE, RDMSR, WRMSR).
//!
//! Ticks are the median of single measurements, so interrupts do not show, less the median of an empty one. The counts are
//! means over all repetitions without exits that came from outside; heavy operations only where the module was built to
//! count them (`make -C $KDIR M=$PWD DUNE_COUNT_OPS=y`), which costs ticks: `make bench` runs once with and once without.

use core::arch::asm;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;

use dune_examples::ticks;
use dune_examples::unit;
use libdune::abi::Counters;
use libdune::abi::CAP_COUNT_OPS;
use libdune::Dune;
use libdune::Gva;
use libdune::Outcome;
use libdune::Permissions;
use libdune::Thread;
use libdune::TrapFrame;
use libdune::Vector;

const PAGE: usize = 4096;
/// Repetitions of a call.
const CALLS: usize = 10_000;
/// Pages of a test of memory.
const PAGES: usize = 1000;

/// Exits that the machine causes, not the program (SDM, appendix "VMX Basic Exit Reasons").
const EXTERNAL_INTERRUPT: usize = 1;

fn main() {
    let unit = unit();
    let native = measure_all(None);
    let dune = match Dune::enter() {
        Ok(dune) => dune,
        Err(error) => {
            eprintln!("dune-bench: {error}");
            std::process::exit(1);
        }
    };
    let counted = dune.info().capabilities & CAP_COUNT_OPS != 0;
    let inside = measure_all(Some(&dune));
    dune.leave();

    println!("median {unit} of one; per operation: VM exits and heavy operations");
    println!(
        "{:<44} {:>8} {:>8} {:>6} {:>7} {:>8} {:>6} {:>6}",
        "operation", "Linux", "Dune", "exits", "VMREAD", "VMWRITE", "RDMSR", "WRMSR"
    );
    for row in &inside {
        let linux = native.iter().find(|other| other.name == row.name).map_or("-".into(), |row| row.ticks.to_string());
        print!("{:<44} {linux:>8} {:>8} {:>6.2}", row.name, row.ticks, row.exits);
        if counted {
            let [vmreads, vmwrites, rdmsrs, wrmsrs] = row.heavy;
            println!(" {vmreads:>7.2} {vmwrites:>8.2} {rdmsrs:>6.2} {wrmsrs:>6.2}");
        } else {
            println!(" {:>7} {:>8} {:>6} {:>6}", "-", "-", "-", "-");
        }
    }
}

/// What one operation costs.
struct Row {
    name: &'static str,
    ticks: u64,
    exits: f64,
    heavy: [f64; 4],
}

/// Measures `action` once per element of `0..count`, after `count / 10` times that do not count.
fn measure(dune: Option<&Dune>, name: &'static str, count: usize, mut action: impl FnMut(usize) -> u64) -> Row {
    let mut times = vec![0u64; count];
    let before = dune.map(Dune::counters);
    for (i, time) in times.iter_mut().enumerate() {
        *time = action(i);
    }
    let after = dune.map(Dune::counters);
    let ticks = median(&mut times).saturating_sub(empty());
    let (exits, heavy) = match (before, after) {
        (Some(before), Some(after)) => per_operation(&before, &after, count),
        _ => (0.0, [0.0; 4]),
    };
    Row { name, ticks, exits, heavy }
}

/// Exits and heavy operations of one of `count` operations. An exit from outside takes its own heavy operations along, so
/// those are a hair too many in a mean; the table shows two digits.
fn per_operation(before: &Counters, after: &Counters, count: usize) -> (f64, [f64; 4]) {
    let mean = |n: u64| n as f64 / count as f64;
    let exits: u64 = (0..before.exits.len())
        .filter(|&reason| reason != EXTERNAL_INTERRUPT)
        .map(|reason| after.exits[reason] - before.exits[reason])
        .sum();
    let heavy = [
        after.vmreads - before.vmreads,
        after.vmwrites - before.vmwrites,
        after.rdmsrs - before.rdmsrs,
        after.wrmsrs - before.wrmsrs,
    ];
    (mean(exits), heavy.map(mean))
}

fn median(times: &mut [u64]) -> u64 {
    times.sort_unstable();
    times[times.len() / 2]
}

/// What measuring nothing costs.
fn empty() -> u64 {
    let mut times = [0; 201];
    for time in &mut times {
        let start = ticks();
        *time = ticks() - start;
    }
    median(&mut times)
}

fn measure_all(dune: Option<&Dune>) -> Vec<Row> {
    let mut rows = vec![measure(dune, "getpid by SYSCALL", CALLS, |_| timed(syscall_getpid))];
    if let Some(dune) = dune {
        rows.push(measure(Some(dune), "getpid by VMCALL", CALLS, |_| timed(vmcall_getpid)));
        rows.push(measure(Some(dune), "exit settled in the module (CPUID)", CALLS, |_| timed(cpuid)));
        rows.push(user_fault(dune));
    }
    rows.push(present_pages(dune));
    rows.push(absent_pages(dune));
    rows
}

#[inline(always)]
fn timed(action: impl FnOnce()) -> u64 {
    let start = ticks();
    action();
    ticks() - start
}

#[inline(always)]
fn syscall_getpid() {
    // SAFETY: getpid changes nothing but RAX, RCX and R11.
    unsafe { asm!("syscall", inout("eax") libc::SYS_getpid as i32 => _, out("rcx") _, out("r11") _, options(nostack)) };
}

#[inline(always)]
fn vmcall_getpid() {
    // SAFETY: At CPL0 of Dune mode: a system call, which changes nothing but RAX.
    unsafe { asm!("vmcall", inout("eax") libc::SYS_getpid as i32 => _, options(nostack)) };
}

#[inline(always)]
fn cpuid() {
    // SAFETY: RBX, which the compiler keeps for itself, is saved.
    unsafe {
        asm!("mov {0}, rbx", "cpuid", "mov rbx, {0}", out(reg) _, inout("eax") 0 => _, inout("ecx") 0 => _, out("edx") _,
             options(nomem, nostack, preserves_flags));
    }
}

/// Private memory of the program, without huge pages.
struct Memory(*mut u8);

impl Memory {
    fn new(populated: bool) -> Self {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | if populated { libc::MAP_POPULATE } else { 0 };
        let bytes = PAGES * PAGE;
        // SAFETY: A fresh mapping.
        let start = unsafe {
            let plain = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let start = libc::mmap(core::ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, plain, -1, 0);
            assert!(start != libc::MAP_FAILED, "mmap");
            assert!(libc::madvise(start, bytes, libc::MADV_NOHUGEPAGE) == 0, "madvise");
            if flags & libc::MAP_POPULATE != 0 {
                assert!(libc::madvise(start, bytes, libc::MADV_POPULATE_WRITE) == 0, "madvise");
            }
            start
        };
        Self(start.cast())
    }

    fn page(&self, i: usize) -> *mut u8 {
        assert!(i < PAGES);
        // SAFETY: In the mapping.
        unsafe { self.0.add(i * PAGE) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: Mapped in `new`.
        unsafe { libc::munmap(self.0.cast(), PAGES * PAGE) };
    }
}

fn write_pages(dune: Option<&Dune>, name: &'static str, populated: bool) -> Row {
    let memory = Memory::new(populated);
    measure(dune, name, PAGES, |i| {
        let page = memory.page(i);
        // SAFETY: In the mapping, writable.
        timed(|| unsafe { page.write_volatile(1) })
    })
}

/// The process has the page, the EPT has not.
fn present_pages(dune: Option<&Dune>) -> Row {
    write_pages(dune, "EPT violation, page present in the process", true)
}

/// Nobody has the page: Linux makes it.
fn absent_pages(dune: Option<&Dune>) -> Row {
    write_pages(dune, "first write to an anonymous 4 KiB page", false)
}

static ENTERED: AtomicU64 = AtomicU64::new(0);

fn page_fault(frame: &mut TrapFrame, thread: &Thread<'_>) -> Outcome {
    ENTERED.store(ticks(), Relaxed);
    let Some(gva) = Gva::new(frame.cr2) else { return Outcome::Unhandled };
    match thread.address_space().protect(gva.align_down(PAGE as u64), PAGE as u64, Permissions::ALL) {
        Ok(flush) => flush.ignore(),
        Err(_) => return Outcome::Unhandled,
    }
    Outcome::Resume
}

/// The program protects a page in its own page table and takes the fault.
fn user_fault(dune: &Dune) -> Row {
    let memory = Memory::new(true);
    let page = memory.page(0);
    let before = dune.set_exception_handler(Vector::PF, page_fault);
    let space = dune.address_space();
    let start = Gva::of(page).expect("a program's address is canonical");
    let row = measure(Some(dune), "page fault handled by the program", PAGES, |i| {
        space.protect(start, PAGE as u64, Permissions::NONE).expect("the page can be protected").flush();
        // SAFETY: In the mapping; the handler makes it accessible.
        timed(|| unsafe { page.write_volatile(i as u8) })
    });
    match before {
        Some(before) => dune.set_exception_handler(Vector::PF, before),
        None => dune.clear_exception_handler(Vector::PF),
    };
    row
}
