// SPDX-License-Identifier: MIT OR Apache-2.0

//! What rows of threads and children need around what is measured.

use std::time::Duration;

use crate::pages::Memory;
use crate::pages::PAGE;

/// Waits until RCU has given back what the end of a thread left to it, the kernel's stack first of all: without it the next one
/// costs 8,000 instructions more, and whether it comes in time is a matter of the clock's phase.
pub fn rest() {
    std::thread::sleep(Duration::from_millis(20));
}

/// A page in use beside the place where Linux maps next. What a thread maps there has page tables for company, as in a
/// program that has done something before; where a layout happens to give it tables of its own, which are made and given
/// back each time, a thread costs 10,000 instructions more.
pub fn neighbour() -> Memory {
    let page = Memory::new(PAGE);
    page.write(0, 1);
    page
}

/// Waits for a child; its wait status.
pub fn end_of_child(pid: libc::pid_t) -> i32 {
    let mut status = 1;
    // SAFETY: Into a word of ours.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    status
}
