// SPDX-License-Identifier: MIT OR Apache-2.0
//! What tests share: programs, counters, CPUs, the module.
#![allow(dead_code)]

use std::arch::x86_64::__cpuid_count;
use std::arch::x86_64::CpuidResult;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;

/// What a program left behind.
#[derive(Debug)]
pub struct Ended {
    /// Exit status, or 128 + the signal that ended it.
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
}

/// Runs a program of this project or any other to its end. Programs of this
/// project are looked for beside this one first.
pub fn run_program(program: &str, arguments: &[&str]) -> io::Result<Ended> {
    use std::os::unix::process::ExitStatusExt;
    let beside = std::env::current_exe()?.with_file_name(program);
    let path = if beside.is_file() { beside } else { program.into() };
    let output = Command::new(path).args(arguments).output()?;
    let status = output
        .status
        .code()
        .unwrap_or_else(|| 128 + output.status.signal().unwrap_or(0));
    Ok(Ended {
        status,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// Runs a program as another user; only root can.
pub fn run_as(user: &str, command: &str) -> io::Result<Ended> {
    run_program("su", &["-s", "/bin/sh", user, "-c", command])
}

/// The module's global counters: the files of its debugfs directory that hold a number. Only root can.
pub fn module_counters() -> io::Result<BTreeMap<String, u64>> {
    let mut counters = BTreeMap::new();
    for entry in fs::read_dir("/sys/kernel/debug/dune")? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let Ok(text) = fs::read_to_string(entry.path()) else {
            continue;
        };
        if let Ok(value) = text.trim().parse() {
            counters.insert(name, value);
        }
    }
    Ok(counters)
}

/// Binds the calling thread to one CPU.
pub fn pin_to_cpu(cpu: usize) -> io::Result<()> {
    bind_to_cpu(0, cpu)
}

/// Binds a thread of any process, 0: the calling one, to one CPU.
pub fn bind_to_cpu(thread: i32, cpu: usize) -> io::Result<()> {
    // SAFETY: cpu_set_t is plain data, all zeroes is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: CPU_SET checks its index against the size of the set.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: the kernel reads as many bytes as the set has.
    let result = unsafe { libc::sched_setaffinity(thread, std::mem::size_of_val(&set), &set) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Number of CPUs that are on.
pub fn online_cpus() -> usize {
    // SAFETY: sysconf touches no memory of ours.
    let count = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
    usize::try_from(count).unwrap_or(1)
}

/// Whether the first CPU has a flag in /proc/cpuinfo ("flags" or "vmx flags").
pub fn cpu_has(flag: &str) -> bool {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    text.lines()
        .take_while(|line| !line.is_empty())
        .filter(|line| line.starts_with("flags") || line.starts_with("vmx flags"))
        .any(|line| line.split_whitespace().any(|word| word == flag))
}

/// What the CPU says of itself, which need not be what Linux says of it. Causes a VM exit in Dune mode.
#[allow(unused_unsafe)] // CPUID became safe after Rust 1.85.
pub fn cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    // SAFETY: every 64-bit CPU has CPUID.
    unsafe { __cpuid_count(leaf, subleaf) }
}

/// Whether the CPU has XSAVE, XCR0 with it.
pub fn has_xsave() -> bool {
    const XSAVE: u32 = 1 << 26;
    cpuid(1, 0).ecx & XSAVE != 0
}

/// What there is of XSAVE (SDM, "CPUID": leaf 0DH, subleaf 1, EAX).
pub fn xsave_features() -> u32 {
    if has_xsave() {
        cpuid(0xd, 1).eax
    } else {
        0
    }
}

/// Whether this is the emulated machine of `vm/`.
pub fn is_emulated() -> bool {
    fs::read_to_string("/proc/cmdline").is_ok_and(|text| text.contains("dune_token="))
}

pub fn is_root() -> bool {
    // SAFETY: geteuid cannot fail and touches nothing.
    unsafe { libc::geteuid() == 0 }
}

/// User and group of a name in /etc/passwd.
pub fn user_id(name: &str) -> Option<(u32, u32)> {
    let text = fs::read_to_string("/etc/passwd").ok()?;
    let line = text.lines().find(|line| line.split(':').next() == Some(name))?;
    let mut fields = line.split(':').skip(2);
    let uid = fields.next()?.parse().ok()?;
    let gid = fields.next()?.parse().ok()?;
    Some((uid, gid))
}

/// Whether dune.ko is in the kernel.
pub fn module_is_loaded() -> bool {
    Path::new("/sys/module/dune").is_dir()
}

/// Where dune.ko is in the emulated machine.
pub const MODULE: &str = "/lib/modules/dune.ko";

/// Inserts the module by `dune-load`, which also gives the node to the group.
pub fn load_module(parameters: &[&str]) -> io::Result<Ended> {
    run_program("dune-load", parameters)
}

/// Removes the module by `dune-unload`.
pub fn unload_module() -> io::Result<Ended> {
    run_program("dune-unload", &[])
}

/// The kernel's log. Only root can.
pub fn kernel_log() -> io::Result<String> {
    Ok(run_program("dmesg", &[])?.stdout)
}
