// SPDX-License-Identifier: MIT OR Apache-2.0

//! A process per request, a compartment per request, a compartment used again, a thread with a compartment per request.

use std::io;
use std::io::Write;
use std::mem;
use std::net::TcpStream;

use libdune::compartment::Compartment;
use libdune::compartment::Ended;
use libdune::compartment::Pages;
use libdune::hook::Hooks;
use libdune::hook::SystemCall;
use libdune::hook::Verdict;
use libdune::Permissions;
use libdune::Thread;

use crate::http;
use crate::http::Answer;
use crate::http::ANSWER_BYTES;
use crate::http::REQUEST_BYTES;
use crate::server::at;
use crate::server::refuse;
use crate::server::ServerError;
use crate::server::Way;

/// Stack of a compartment.
const STACK_BYTES: usize = 16 << 10;

/// A child that has a copy of everything.
pub struct Fork<'s> {
    pub site: &'s [u8],
}

impl Way for Fork<'_> {
    fn answer(&mut self, request: &[u8], stream: &mut TcpStream) -> Result<(), ServerError> {
        // SAFETY: The child, of a process with one thread, answers and ends.
        let child = unsafe { libc::fork() };
        match child {
            -1 => Err(at("fork")(io::Error::last_os_error())),
            0 => {
                // std's handler would tell of a stack that is used up.
                // SAFETY: The default action.
                unsafe { libc::signal(libc::SIGSEGV, libc::SIG_DFL) };
                let mut buffer = [0; ANSWER_BYTES];
                let answer = http::serve(request, self.site, &mut buffer);
                let written = stream.write_all(&buffer[..answer.bytes]);
                // SAFETY: Ends the child, without what is its parent's to do.
                unsafe { libc::_exit(i32::from(written.is_err())) }
            }
            child => {
                let mut status = 0;
                // SAFETY: Our child, and a word for its status.
                if unsafe { libc::waitpid(child, &raw mut status, 0) } != child {
                    return Err(at("waitpid")(io::Error::last_os_error()));
                }
                if status == 0 {
                    return Ok(());
                }
                refuse(stream)
            }
        }
    }
}

/// System calls are the server's: while another page table than its own is loaded there are none.
fn server_only(_: &mut SystemCall, thread: &Thread<'_>) -> Verdict {
    if thread.address_space().is_loaded() {
        Verdict::Allow
    } else {
        Verdict::deny(libc::EPERM)
    }
}

/// Has system calls of compartments refused, in this thread and those that it makes.
pub fn refuse_system_calls(thread: &Thread<'_>) {
    thread.set_hooks(Hooks {
        before: Some(server_only),
        after: None,
    });
}

/// A compartment that was given the site, and nothing of any request: others are made from it.
pub fn template(thread: &Thread<'_>, site: &Pages) -> Result<Compartment, ServerError> {
    let template = Compartment::new(thread, STACK_BYTES)?;
    template.give(site, Permissions::READ)?;
    Ok(template)
}

/// A compartment with a request in it, and room for the answer.
struct Visit {
    // First: what was given goes after who was given it.
    compartment: Compartment,
    /// One page for the request, which the handler may read, then the answer.
    pages: Pages,
}

/// Where in its pages the answer is.
const ANSWER: usize = 4096;

const _: () = assert!(REQUEST_BYTES <= ANSWER);

impl Visit {
    fn new(template: &Compartment) -> Result<Self, ServerError> {
        let compartment = template.duplicate()?;
        let pages = Pages::new(ANSWER + ANSWER_BYTES).map_err(at("mmap"))?;
        compartment.give(&pages[..ANSWER], Permissions::READ)?;
        compartment.give(&pages[ANSWER..], Permissions::WRITE)?;
        Ok(Self { compartment, pages })
    }

    /// Puts the request where the handler finds it; that, and the room for the answer.
    ///
    /// # Safety
    ///
    /// Not to be used when this is gone, nor while its pages are used otherwise.
    unsafe fn start(&mut self, request: &[u8]) -> (&'static [u8], &'static mut [u8]) {
        self.pages[..request.len()].copy_from_slice(request);
        let (first, answer) = self.pages.split_at_mut(ANSWER);
        // SAFETY: The caller's.
        unsafe {
            (
                std::slice::from_raw_parts(first.as_ptr(), request.len()),
                std::slice::from_raw_parts_mut(answer.as_mut_ptr(), answer.len()),
            )
        }
    }

    fn run(&mut self, thread: &Thread<'_>, request: &[u8], site: &[u8]) -> Result<Answer, Ended> {
        // SAFETY: Used by the handler only, which has nothing that must be dropped; memory is where it is.
        unsafe {
            let (request, answer) = self.start(request);
            self.compartment.run(thread, move || http::serve(request, site, answer))
        }
    }

    /// Sends what the handler wrote; what it says of it is not believed.
    fn send(&self, result: Result<Answer, Ended>, stream: &mut TcpStream) -> Result<(), ServerError> {
        let written = &self.pages[ANSWER..];
        match result {
            Ok(answer) => stream
                .write_all(&written[..answer.bytes.min(written.len())])
                .map_err(at("answering")),
            Err(Ended::Fault(_)) => refuse(stream),
            Err(ended) => Err(ended.into()),
        }
    }

    /// Leaves nothing of one request for the next.
    fn wipe(&mut self) {
        self.pages.fill(0);
        self.compartment.wipe_stack();
    }
}

/// One that is made for each request.
pub struct Fresh<'t> {
    pub thread: &'t Thread<'t>,
    pub template: &'t Compartment,
    pub site: &'t Pages,
}

impl Way for Fresh<'_> {
    fn answer(&mut self, request: &[u8], stream: &mut TcpStream) -> Result<(), ServerError> {
        let mut visit = Visit::new(self.template)?;
        let result = visit.run(self.thread, request, self.site);
        visit.send(result, stream)
    }
}

/// One that is wiped after each request.
pub struct Again<'t> {
    thread: &'t Thread<'t>,
    site: &'t Pages,
    visit: Visit,
}

impl<'t> Again<'t> {
    pub fn new(thread: &'t Thread<'t>, template: &Compartment, site: &'t Pages) -> Result<Self, ServerError> {
        let visit = Visit::new(template)?;
        Ok(Self { thread, site, visit })
    }
}

impl Way for Again<'_> {
    fn answer(&mut self, request: &[u8], stream: &mut TcpStream) -> Result<(), ServerError> {
        let result = self.visit.run(self.thread, request, self.site);
        self.visit.send(result, stream)?;
        self.visit.wipe();
        Ok(())
    }
}

/// A thread for each request, with a compartment made for it.
pub struct Threads<'t> {
    pub template: &'t Compartment,
    pub site: &'t [u8],
}

impl Way for Threads<'_> {
    fn answer(&mut self, request: &[u8], stream: &mut TcpStream) -> Result<(), ServerError> {
        let mut visit = Visit::new(self.template)?;
        // SAFETY: The thread is waited for, with the visit's pages and the site still there; nobody else uses the pages
        // meanwhile. The handler has nothing to be dropped.
        let spawned = unsafe {
            let (request, answer) = visit.start(request);
            let site = mem::transmute::<&[u8], &'static [u8]>(self.site);
            visit.compartment.spawn(move || http::serve(request, site, answer))
        };
        let (compartment, result) = spawned
            .map_err(at("making a thread"))?
            .join()
            .map_err(|_| ServerError::Thread)?;
        let visit = Visit {
            compartment,
            pages: visit.pages,
        };
        visit.send(result, stream)
    }
}
