// SPDX-License-Identifier: MIT OR Apache-2.0

//! What it takes to make something that answers, and to wait for its end: an sthread, which is a thread with a page table of
//! its own, beside a process and an ordinary thread of the same program.

use std::io;

use dune_examples::ticks;
use libdune::compartment::Compartment;
use libdune::Thread;

use crate::server::at;
use crate::server::ServerError;

/// What each of them does.
const ANSWER: i32 = 42;

/// What comes first and does not count: it finds nothing in caches.
const WARM_UP: usize = 2;

/// Ticks that one kind took, each time.
pub struct Made {
    pub name: &'static str,
    pub ticks: Vec<u64>,
}

fn measure(
    name: &'static str,
    times: usize,
    mut make: impl FnMut() -> Result<i32, ServerError>,
) -> Result<Made, ServerError> {
    let mut all = Vec::with_capacity(times + WARM_UP);
    for _ in 0..times + WARM_UP {
        let start = ticks();
        let answer = make()?;
        all.push(ticks() - start);
        if answer != ANSWER {
            return Err(ServerError::Made { name, answer });
        }
    }
    let ticks = all.split_off(WARM_UP);
    Ok(Made { name, ticks })
}

/// A child, while the process is an ordinary one with one thread.
pub fn processes(times: usize) -> Result<Made, ServerError> {
    measure("process (fork)", times, process)
}

/// Linux' own threads, outside Dune mode. What malloc keeps for them would make a child dearer: they come last.
pub fn threads(times: usize) -> Result<Made, ServerError> {
    measure("thread", times, thread)
}

/// Copies of a compartment.
pub fn compartments(thread: &Thread<'_>, template: &Compartment, times: usize) -> Result<[Made; 2], ServerError> {
    Ok([
        measure("sthread", times, || sthread(template))?,
        measure("compartment", times, || {
            // SAFETY: There is nothing to drop.
            let answer = unsafe { template.duplicate()?.run(thread, || ANSWER) };
            Ok(answer?)
        })?,
    ])
}

fn process() -> Result<i32, ServerError> {
    // SAFETY: The child, of a process with one thread, ends at once.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: As above.
        unsafe { libc::_exit(ANSWER) }
    }
    let mut status = 0;
    // SAFETY: Our child, if there is one, and a word for its status.
    if child < 0 || unsafe { libc::waitpid(child, &raw mut status, 0) } != child {
        return Err(at("fork")(io::Error::last_os_error()));
    }
    Ok(if libc::WIFEXITED(status) {
        libc::WEXITSTATUS(status)
    } else {
        -1
    })
}

fn thread() -> Result<i32, ServerError> {
    let thread = std::thread::Builder::new().spawn(|| ANSWER);
    let thread = thread.map_err(at("making a thread"))?;
    thread.join().map_err(|_| ServerError::Thread)
}

fn sthread(template: &Compartment) -> Result<i32, ServerError> {
    // SAFETY: There is nothing to drop.
    let spawned = unsafe { template.duplicate()?.spawn(|| ANSWER) };
    let joined = spawned.map_err(at("making a thread"))?.join();
    let (_compartment, answer) = joined.map_err(|_| ServerError::Thread)?;
    Ok(answer?)
}
