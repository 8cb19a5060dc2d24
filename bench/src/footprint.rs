// SPDX-License-Identifier: MIT OR Apache-2.0

//! What Dune mode takes of the machine's memory: per process, per vCPU, and for ever.
//!
//! The same program is started with and without entering, and waits. Its own memory (Pss) and Linux' page tables for it
//! are in /proc, the pages of the EPT and of VMCSs in the module's counters. What those do not count, small objects of
//! the kernel, shows in the machine's free memory where many such processes wait at a time.

use std::fs;
use std::io::BufRead;
use std::io::BufReader;
use std::io::Read;
use std::io::Write;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::sync::Barrier;
use std::thread;

use libdune::Dune;

use crate::measure::is_emulated;
use crate::measure::System;
use crate::tasks::end_of_child;

/// First argument of a program that waits; then whether it enters (1) or not (0), and how many threads it has beside the
/// first.
pub const WAIT: &str = "do-wait";

const BYTES: &str = "bytes";
const PAGE: i64 = 4096;
/// Threads beside the first, where the memory of a vCPU is asked for.
const THREADS: usize = 16;
/// Processes that wait at a time, where the machine's free memory tells what they take.
const TOGETHER: usize = 32;
/// Processes that come and go one after the other.
const COME_AND_GO: usize = 1000;
/// How often, until nothing is left of them.
const TRIES: usize = 5;
/// That fill Linux' caches before.
const WARM_UP: usize = 100;

/// What a started copy of this program does.
pub fn wait(arguments: &[String]) -> bool {
    let [enters, threads] = arguments else { return false };
    let (enters, threads) = (enters == "1", threads.parse().unwrap_or(0));
    let _dune = match enters.then(Dune::enter) {
        Some(Err(_)) => return false,
        Some(Ok(dune)) => Some(dune),
        None => None,
    };
    let barrier = Barrier::new(threads + 1);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                assert_eq!(dune_examples::cpl() == 0, enters);
                barrier.wait();
                barrier.wait();
            });
        }
        barrier.wait();
        let is_told = std::io::stdout().write_all(b"ready\n").is_ok();
        let mut rest = Vec::new();
        let is_over = std::io::stdin().read_to_end(&mut rest).is_ok();
        barrier.wait();
        is_told && is_over
    })
}

/// A started copy that waits until this is dropped.
struct Waiting(Child);

impl Waiting {
    fn start(enters: bool, threads: usize) -> Self {
        let mut child = Command::new("/proc/self/exe")
            .args([WAIT, if enters { "1" } else { "0" }, &threads.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let mut line = String::new();
        let output = child.stdout.as_mut().expect("a pipe");
        BufReader::new(output).read_line(&mut line).expect("a line");
        assert_eq!(line, "ready\n", "the program waits");
        Self(child)
    }

    /// KiB of its own: its part of the memory that it maps, and the page tables for it.
    fn own_kib(&self) -> [i64; 2] {
        let pid = self.0.id();
        let pss = line_of(&format!("/proc/{pid}/smaps_rollup"), "Pss:");
        [pss, line_of(&format!("/proc/{pid}/status"), "VmPTE:")]
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        assert!(self.0.wait().expect("a child").success());
    }
}

/// The number of a line of a file of /proc.
fn line_of(path: &str, name: &str) -> i64 {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok())
        .unwrap_or_else(|| panic!("{path} has no {name}"))
}

/// What the module has now, in its counters' order; `None` without debugfs.
fn module_counters() -> Option<[i64; 4]> {
    let read = |name| {
        let text = fs::read_to_string(format!("/sys/kernel/debug/dune/{name}")).ok()?;
        text.trim().parse().ok()
    };
    Some([read("spaces")?, read("vcpus")?, read("vmcs_pages")?, read("ept_pages")?])
}

/// Free pages, with those that CPUs keep for themselves.
fn free_bytes() -> i64 {
    let text = fs::read_to_string("/proc/zoneinfo").unwrap_or_default();
    let kept = text.lines().filter_map(|line| line.trim().strip_prefix("count:"));
    let kept: i64 = kept.filter_map(|count| count.trim().parse::<i64>().ok()).sum();
    1024 * line_of("/proc/meminfo", "MemFree:") + PAGE * kept
}

/// Of one system: natively only what is left behind.
pub fn measure(system: &System<'_>) {
    let enters = system.name != "linux";
    if enters && system.wants(&["memory_process", "memory_vcpu"]) {
        waiting(system);
    }
    if system.selection.quick {
        return;
    }
    if enters && system.wants(&["memory_process_free"]) {
        let [without, with] = [false, true].map(together);
        system.tell("memory_process_free", BYTES, rounded(with - without), TOGETHER);
    }
    if system.wants(&["memory_left"]) {
        system.tell("memory_left", BYTES, left_by(enters), COME_AND_GO);
    }
}

fn rounded(bytes: i64) -> u64 {
    bytes.max(0) as u64
}

/// Of a process that waits, with one vCPU and with many.
fn waiting(system: &System<'_>) {
    let Some(nothing) = module_counters() else {
        println!("no row of memory: no debugfs here");
        return;
    };
    let bytes = |enters, threads| {
        let waiting = Waiting::start(enters, threads);
        let counters = module_counters().expect("as before");
        let [spaces, vcpus, vmcs_pages, ept_pages] = core::array::from_fn(|i| counters[i] - nothing[i]);
        let expected = if enters { [1, threads as i64 + 1] } else { [0, 0] };
        assert_eq!([spaces, vcpus], expected, "spaces, vCPUs");
        assert!(vmcs_pages >= vcpus && ept_pages >= 4 * spaces, "pages of the module");
        let [pss, tables] = waiting.own_kib();
        println!(
            "{}, {threads} threads more: Pss {pss} KiB, page tables {tables} KiB, {vmcs_pages} pages of VMCSs, {ept_pages} of the EPT",
            if enters { "in Dune mode" } else { "natively" }
        );
        1024 * (pss + tables) + PAGE * (vmcs_pages + ept_pages)
    };
    let of_process = bytes(true, 0) - bytes(false, 0);
    let of_threads = bytes(true, THREADS) - bytes(false, THREADS) - of_process;
    assert_eq!(module_counters(), Some(nothing), "nothing is left of them");
    system.tell("memory_process", BYTES, rounded(of_process), 1);
    system.tell("memory_vcpu", BYTES, rounded(of_threads) / THREADS as u64, THREADS);
}

/// Bytes of the machine that a waiting process takes.
fn together(enters: bool) -> i64 {
    // Caches fill up first.
    drop(Waiting::start(enters, 0));
    let before = free_bytes();
    let waiting: Vec<Waiting> = (0..TOGETHER).map(|_| Waiting::start(enters, 0)).collect();
    let taken = before - free_bytes();
    drop(waiting);
    taken / TOGETHER as i64
}

/// Bytes of the machine that each of many processes leaves behind.
fn left_by(enters: bool) -> u64 {
    let run = |count| {
        for _ in 0..count {
            // SAFETY: The child enters, or not, and ends.
            let pid = unsafe { libc::fork() };
            assert!(pid >= 0, "fork");
            if pid == 0 {
                let is_well = match enters.then(Dune::enter) {
                    None => dune_examples::cpl() == 3,
                    Some(Ok(_dune)) => dune_examples::cpl() == 0,
                    Some(Err(_)) => false,
                };
                // SAFETY: Ends the child, in Dune mode or not.
                unsafe { libc::_exit(i32::from(!is_well)) };
            }
            assert_eq!(end_of_child(pid), 0);
        }
    };
    run(WARM_UP);
    let counters = module_counters();
    // What is lost is lost each time; what Linux' own caches grow by (natively, too: half a MiB) is not.
    let mut left = i64::MAX;
    for _ in 0..TRIES {
        let before = free_bytes();
        run(COME_AND_GO);
        left = left.min(before - free_bytes());
        if left <= 0 {
            break;
        }
    }
    assert_eq!(module_counters(), counters, "nothing is left of them");
    if is_emulated() {
        assert!(left < COME_AND_GO as i64 * 100, "{left} bytes are gone");
    }
    rounded(left) / COME_AND_GO as u64
}
