// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the basic operations cost: ticks, VM exits, and heavy operations (VMREAD, VMWRITE, RDMSR, WRMSR).
//!
//! Every number is the median over single operations, so interrupts do not show; ticks less the median of measuring
//! nothing. Heavy operations are there only where the module was built to count them (`DUNE_COUNT_OPS=y`), which costs
//! ticks: `make bench` runs once with and once without.

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
        let linux = native
            .iter()
            .find(|other| other.name == row.name)
            .map_or("-".into(), |row| row.ticks.to_string());
        print!("{:<44} {linux:>8} {:>8} {:>6}", row.name, row.ticks, row.exits);
        if counted {
            let [vmreads, vmwrites, rdmsrs, wrmsrs] = row.heavy;
            println!(" {vmreads:>7} {vmwrites:>8} {rdmsrs:>6} {wrmsrs:>6}");
        } else {
            println!(" {:>7} {:>8} {:>6} {:>6}", "-", "-", "-", "-");
        }
    }
}

/// What one operation costs: medians.
struct Row {
    name: &'static str,
    ticks: u64,
    exits: u64,
    heavy: [u64; 4],
}

/// How often an operation that can be repeated is done before it counts.
const WARM_UP: usize = 16;

/// Measures an operation that is the same each time.
fn measure_repeated(
    dune: Option<&Dune>,
    name: &'static str,
    count: usize,
    mut action: impl FnMut(usize) -> u64,
) -> Row {
    for i in 0..WARM_UP {
        action(i);
    }
    measure(dune, name, count, action)
}

/// Measures `action` for each of `0..count`; it gives its ticks.
fn measure(dune: Option<&Dune>, name: &'static str, count: usize, mut action: impl FnMut(usize) -> u64) -> Row {
    let mut columns: [Vec<u64>; 6] = core::array::from_fn(|_| vec![0; count]);
    for i in 0..count {
        let before = dune.map(Dune::counters);
        columns[0][i] = action(i);
        if let (Some(before), Some(dune)) = (before, dune) {
            for (column, n) in columns[1..].iter_mut().zip(done(&before, &dune.counters())) {
                column[i] = n;
            }
        }
    }
    let [ticks, exits, heavy @ ..] = columns.map(|mut column| median(&mut column));
    Row {
        name,
        ticks: ticks.saturating_sub(empty()),
        exits,
        heavy,
    }
}

/// Exits and heavy operations between two readings.
fn done(before: &Counters, after: &Counters) -> [u64; 5] {
    let exits = |counters: &Counters| counters.exits.iter().sum::<u64>();
    [
        exits(after) - exits(before),
        after.vmreads - before.vmreads,
        after.vmwrites - before.vmwrites,
        after.rdmsrs - before.rdmsrs,
        after.wrmsrs - before.wrmsrs,
    ]
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
    let mut rows = vec![measure_repeated(dune, "getpid by SYSCALL", CALLS, |_| {
        timed(syscall_getpid)
    })];
    if let Some(dune) = dune {
        rows.push(measure_repeated(Some(dune), "getpid by VMCALL", CALLS, |_| {
            timed(vmcall_getpid)
        }));
        rows.push(measure_repeated(
            Some(dune),
            "exit settled in the module (CPUID)",
            CALLS,
            |_| timed(cpuid),
        ));
        rows.push(user_fault(dune));
    }
    rows.push(present_pages(dune));
    rows.push(present_page_by_page(dune));
    rows.push(absent_pages(dune));
    rows.push(untouched_memory(dune));
    rows.push(written_memory(dune));
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
struct Memory(*mut u8, usize);

impl Memory {
    fn new(populated: bool, pages: usize) -> Self {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | if populated { libc::MAP_POPULATE } else { 0 };
        let bytes = pages * PAGE;
        // SAFETY: A fresh mapping.
        let start = unsafe {
            let plain = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let start = libc::mmap(
                core::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                plain,
                -1,
                0,
            );
            assert!(start != libc::MAP_FAILED, "mmap");
            assert!(libc::madvise(start, bytes, libc::MADV_NOHUGEPAGE) == 0, "madvise");
            if flags & libc::MAP_POPULATE != 0 {
                assert!(libc::madvise(start, bytes, libc::MADV_POPULATE_WRITE) == 0, "madvise");
            }
            start
        };
        Self(start.cast(), pages)
    }

    fn page(&self, i: usize) -> *mut u8 {
        assert!(i < self.1);
        // SAFETY: In the mapping.
        unsafe { self.0.add(i * PAGE) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: Mapped in `new`.
        unsafe { libc::munmap(self.0.cast(), self.1 * PAGE) };
    }
}

/// Pages that the module maps at once where they are there.
const AROUND: usize = 16;

fn write_pages(dune: Option<&Dune>, name: &'static str, populated: bool, step: usize) -> Row {
    let memory = Memory::new(populated, PAGES * step);
    measure(dune, name, PAGES, |i| {
        let page = memory.page(i * step);
        // SAFETY: In the mapping, writable.
        timed(|| unsafe { page.write_volatile(1) })
    })
}

/// The process has the page, the EPT has not.
fn present_pages(dune: Option<&Dune>) -> Row {
    write_pages(dune, "EPT violation, page present in the process", true, AROUND)
}

/// The same from one page to the next: the average, not the median.
fn present_page_by_page(dune: Option<&Dune>) -> Row {
    let memory = Memory::new(true, PAGES);
    let before = dune.map(Dune::counters);
    let start = ticks();
    for i in 0..PAGES {
        // SAFETY: In the mapping, writable.
        unsafe { memory.page(i).write_volatile(1) };
    }
    let ticks = (ticks() - start) / PAGES as u64;
    if let (Some(dune), Some(before)) = (dune, before) {
        let [exits, ..] = done(&before, &dune.counters());
        println!("{exits} exits for {PAGES} pages that were there, one after the other");
    }
    Row {
        name: "… page by page, average",
        ticks,
        exits: 0,
        heavy: [0; 4],
    }
}

const LARGE_PAGES: usize = (64 << 20) / PAGE;

/// Address space that comes and goes unused.
fn untouched_memory(dune: Option<&Dune>) -> Row {
    measure_repeated(dune, "mmap and munmap of 64 MiB, untouched", 100, |_| {
        let start = ticks();
        drop(Memory::new(false, LARGE_PAGES));
        ticks() - start
    })
}

/// Memory of which every page was written goes.
fn written_memory(dune: Option<&Dune>) -> Row {
    measure(dune, "munmap of 64 MiB, written", 5, |_| {
        let memory = Memory::new(true, LARGE_PAGES);
        for i in 0..LARGE_PAGES {
            // SAFETY: In the mapping, writable.
            unsafe { memory.page(i).write_volatile(1) };
        }
        let start = ticks();
        drop(memory);
        ticks() - start
    })
}

/// Nobody has the page: Linux makes it.
fn absent_pages(dune: Option<&Dune>) -> Row {
    write_pages(dune, "first write to an anonymous 4 KiB page", false, 1)
}

static ENTERED: AtomicU64 = AtomicU64::new(0);

fn page_fault(frame: &mut TrapFrame, thread: &Thread<'_>) -> Outcome {
    ENTERED.store(ticks(), Relaxed);
    let Some(gva) = Gva::new(frame.cr2) else {
        return Outcome::Unhandled;
    };
    match thread
        .address_space()
        .protect(gva.align_down(PAGE as u64), PAGE as u64, Permissions::ALL)
    {
        Ok(flush) => flush.ignore(),
        Err(_) => return Outcome::Unhandled,
    }
    Outcome::Resume
}

/// The program protects a page in its own page table and takes the fault.
fn user_fault(dune: &Dune) -> Row {
    let memory = Memory::new(true, 1);
    let page = memory.page(0);
    let before = dune.set_exception_handler(Vector::PF, page_fault);
    let space = dune.address_space();
    let start = Gva::of(page).expect("a program's address is canonical");
    let row = measure_repeated(Some(dune), "page fault handled by the program", PAGES, |i| {
        space
            .protect(start, PAGE as u64, Permissions::NONE)
            .expect("the page can be protected")
            .flush();
        // SAFETY: In the mapping; the handler makes it accessible.
        timed(|| unsafe { page.write_volatile(i as u8) })
    });
    match before {
        Some(before) => dune.set_exception_handler(Vector::PF, before),
        None => dune.clear_exception_handler(Vector::PF),
    };
    row
}
