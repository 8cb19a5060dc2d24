// SPDX-License-Identifier: MIT OR Apache-2.0

//! Hooks before and after the system calls of the program itself.

use std::error::Error;
use std::fs;
use std::os::unix::process::parent_id;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use libdune::hook::Hooks;
use libdune::hook::SystemCall;
use libdune::hook::Verdict;
use libdune::Dune;
use libdune::Thread;

// ANCHOR: hooks
static READ: AtomicU64 = AtomicU64::new(0);

/// Asked before each call: let it go, change it, or answer it in place.
fn before(call: &mut SystemCall, _thread: &Thread<'_>) -> Verdict {
    match call.number() as i64 {
        libc::SYS_getppid => Verdict::Answer(1),
        libc::SYS_unlink | libc::SYS_unlinkat => Verdict::deny(libc::EROFS),
        libc::SYS_read if call.argument(2) > 16 => {
            call.set_argument(2, 16);
            Verdict::Allow
        }
        _ => Verdict::Allow,
    }
}

/// Told what Linux answered, and says what the caller gets.
fn after(call: &SystemCall, result: i64, _thread: &Thread<'_>) -> i64 {
    if call.number() as i64 == libc::SYS_read && result > 0 {
        READ.fetch_add(result as u64, Relaxed);
    }
    result
}
// ANCHOR_END: hooks

fn main() -> Result<(), Box<dyn Error>> {
    // ANCHOR: main
    let dune = Dune::enter()?;
    dune.thread().set_hooks(Hooks {
        before: Some(before),
        after: Some(after),
    });

    println!("the parent is {}", parent_id());
    let denied = fs::remove_file("/proc/self/comm").unwrap_err();
    println!("removing a file: {denied}");
    let text = fs::read("/proc/self/status")?;
    println!("a file of {} bytes came in pieces of 16 or less", text.len());
    // ANCHOR_END: main

    let exits = |dune: &Dune| dune.counters().exits[VMCALL];
    let before = exits(&dune);
    let _ = parent_id();
    let after = exits(&dune);
    dune.thread().set_hooks(Hooks::default());
    dune.leave();
    let is_denied = denied.raw_os_error() == Some(libc::EROFS);
    if !is_denied || after != before || READ.load(Relaxed) < text.len() as u64 {
        return Err("not what was expected".into());
    }
    Ok(())
}

/// Basic exit reason of VMCALL (SDM, "VMX Basic Exit Reasons").
const VMCALL: usize = 18;
