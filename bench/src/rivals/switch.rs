// SPDX-License-Identifier: MIT OR Apache-2.0

//! Two processes that take turns on one CPU: what two page tables of one program come instead of.

use crate::measure::timed;
use crate::measure::System;
use crate::tasks::end_of_child;

const TURNS: usize = 500;

/// A byte to another process and one back: two switches.
pub fn measure(linux: &System<'_>) {
    let system = linux.named("two processes, pipes");
    if !system.wants(&["table_switch_and_back"]) {
        return;
    }
    // SAFETY: A set of CPUs is plain data.
    let all = unsafe {
        let mut all: libc::cpu_set_t = core::mem::zeroed();
        let bytes = size_of::<libc::cpu_set_t>();
        assert_eq!(libc::sched_getaffinity(0, bytes, &mut all), 0);
        all
    };
    on_one_cpu();
    let (mut there, mut back) = ([0; 2], [0; 2]);
    // SAFETY: The child only reads and writes, and ends with the pipe.
    let pid = unsafe {
        assert_eq!((libc::pipe(there.as_mut_ptr()), libc::pipe(back.as_mut_ptr())), (0, 0));
        libc::fork()
    };
    assert!(pid >= 0, "fork");
    if pid == 0 {
        close(&[there[1], back[0]]);
        while let Some(byte) = read(there[0]) {
            write(back[1], byte.wrapping_add(1));
        }
        // SAFETY: Ends the child.
        unsafe { libc::_exit(0) };
    }
    close(&[there[0], back[1]]);
    system.repeated("table_switch_and_back", TURNS, |turn| {
        let mut answer = None;
        let ticks = timed(|| {
            write(there[1], turn as u8);
            answer = read(back[0]);
        });
        assert_eq!(
            answer,
            Some((turn as u8).wrapping_add(1)),
            "the other process was there"
        );
        ticks
    });
    close(&[there[1], back[0]]);
    assert_eq!(end_of_child(pid), 0);
    set_cpus(&all);
}

fn set_cpus(cpus: &libc::cpu_set_t) {
    // SAFETY: A set of that size.
    assert_eq!(
        unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), cpus) },
        0
    );
}

/// This thread, and its children from now on, stay where it is.
fn on_one_cpu() {
    // SAFETY: A set of CPUs is plain data; the CPU is one that there is.
    let one = unsafe {
        let mut one: libc::cpu_set_t = core::mem::zeroed();
        libc::CPU_SET(libc::sched_getcpu() as usize, &mut one);
        one
    };
    set_cpus(&one);
}

fn close(fds: &[i32]) {
    for fd in fds {
        // SAFETY: Ours.
        unsafe { libc::close(*fd) };
    }
}

#[inline(always)]
fn write(fd: i32, byte: u8) {
    // SAFETY: One byte of ours.
    assert_eq!(unsafe { libc::write(fd, (&raw const byte).cast(), 1) }, 1);
}

/// None at the end.
#[inline(always)]
fn read(fd: i32) -> Option<u8> {
    let mut byte = 0u8;
    // SAFETY: Into one byte of ours.
    let read = unsafe { libc::read(fd, (&raw mut byte).cast(), 1) };
    (read == 1).then_some(byte)
}
