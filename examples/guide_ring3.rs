// SPDX-License-Identifier: MIT OR Apache-2.0

//! Code that is not trusted, at CPL3: its system calls and its faults come to the program.

use core::arch::global_asm;
use std::error::Error;
use std::io;
use std::ptr;

use libdune::user::UserContext;
use libdune::user::UserExit;
use libdune::user::UserSlice;
use libdune::Dune;
use libdune::Gva;
use libdune::Permissions;
use libdune::Thread;

const PAGE: usize = 4096;

// ANCHOR: code
// What is not trusted. It runs at whatever address it is copied to.
global_asm!(
    "guide_ring3_start:",
    "mov eax, 1", // write(1, text, 14)
    "mov edi, 1",
    "lea rsi, [rip + 2f]",
    "mov edx, 14",
    "syscall",
    "mov eax, 39", // getpid()
    "syscall",
    "mov [rbx], rax", // and a store to an address that the host chose
    "2: .ascii \"hello at CPL3\\n\"",
    "guide_ring3_end:",
);
// ANCHOR_END: code

extern "C" {
    static guide_ring3_start: u8;
    static guide_ring3_end: u8;
}

// ANCHOR: page
/// A page of its own for the code, which CPL3 may read and execute.
fn page_for_cpl3(thread: &Thread<'_>) -> Result<u64, Box<dyn Error>> {
    // SAFETY: A new mapping, and the code between its labels, which is shorter.
    let page = unsafe {
        let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let page = libc::mmap(ptr::null_mut(), PAGE, protection, flags, -1, 0);
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error().into());
        }
        let code = &raw const guide_ring3_start;
        let bytes = &raw const guide_ring3_end as usize - code as usize;
        ptr::copy_nonoverlapping(code, page.cast(), bytes);
        page as u64
    };
    let gva = Gva::new(page).ok_or("not canonical")?;
    thread
        .address_space()
        .protect(gva, PAGE as u64, Permissions::USER | Permissions::EXECUTE)?
        .flush();
    Ok(page)
}
// ANCHOR_END: page

// ANCHOR: run
/// Runs it, and answers its system calls, until it does something else.
fn run(thread: &Thread<'_>, context: &mut UserContext) -> UserExit {
    loop {
        match context.run_for(thread, 1_000_000_000) {
            UserExit::Syscall => {
                let (number, arguments) = context.system_call();
                let result = answer(thread, number as i64, &arguments);
                context.set_result(result as u64);
            }
            exit => return exit,
        }
    }
}

/// The policy. Linux sees none of these calls.
fn answer(thread: &Thread<'_>, number: i64, arguments: &[u64; 6]) -> i64 {
    match number {
        libc::SYS_getpid => 1,
        libc::SYS_write if arguments[2] <= 100 => {
            // Checked against the page table, then copied once: CPL3 cannot change it in between.
            match UserSlice::readable(thread, arguments[1], arguments[2] as usize).and_then(|text| text.to_vec()) {
                Ok(text) => {
                    print!("CPL3 says: {}", String::from_utf8_lossy(&text));
                    text.len() as i64
                }
                Err(_) => -i64::from(libc::EFAULT),
            }
        }
        _ => -i64::from(libc::EPERM),
    }
}
// ANCHOR_END: run

fn main() -> Result<(), Box<dyn Error>> {
    // ANCHOR: main
    let dune = Dune::enter()?;
    let thread = dune.thread();
    let secret = Box::new(42u64);

    let mut context = UserContext::new(&thread);
    context.registers_mut().rip = page_for_cpl3(&thread)?;
    context.registers_mut().rbx = &raw const *secret as u64;
    let exit = run(&thread, &mut context);

    println!("getpid() was {} there", context.registers().rax);
    println!("it ended by {exit:?}");
    println!("the secret is {secret}");
    // ANCHOR_END: main
    let address = &raw const *secret as u64;
    dune.leave();
    match exit {
        UserExit::PageFault(fault) if fault.address == address && fault.is_write() && *secret == 42 => Ok(()),
        _ => Err("not what was expected".into()),
    }
}
