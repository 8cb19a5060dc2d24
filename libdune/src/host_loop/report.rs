// SPDX-License-Identifier: MIT OR Apache-2.0

//! The last words of a thread that cannot go on: one line to standard error, then SIGSEGV.

use core::fmt;
use core::fmt::Write;
use core::sync::atomic::AtomicUsize;
use core::sync::atomic::Ordering::Relaxed;

use dune_abi::RunPage;

use super::context::HostContext;
use crate::abi;
use crate::sys;
use crate::trap::Fatal;
use crate::trap::TrapFrame;

/// Registers of a thread that cannot go on, and why.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct LastWords {
    /// How the vCPU came back, `EXIT_*` of docs/abi.md; `None`: an exception that nobody took, or a failed RUN.
    pub exit: Option<u32>,
    /// Basic exit reason or vector; 0 where RUN failed.
    pub reason: u32,
    /// Number of the vCPU.
    pub vcpu: u32,
    /// RIP where it cannot go on.
    pub rip: u64,
    /// RSP there.
    pub rsp: u64,
    /// RFLAGS there.
    pub rflags: u64,
    /// CR3 there.
    pub cr3: u64,
}

/// What to call then: a `fn(&LastWords)`, or 0.
static LAST_WORDS: AtomicUsize = AtomicUsize::new(0);

pub(crate) fn set_last_words(f: fn(&LastWords)) {
    LAST_WORDS.store(f as usize, Relaxed);
}

/// Calls it, once.
fn last_words(words: &LastWords) {
    let f = LAST_WORDS.swap(0, Relaxed);
    if f != 0 {
        // SAFETY: Only `set_last_words` stores, and only functions of this type.
        let f = unsafe { core::mem::transmute::<usize, fn(&LastWords)>(f) };
        f(words);
    }
}

/// A line on the stack; what does not fit is cut off.
struct Line {
    bytes: [u8; 1024],
    used: usize,
}

impl Line {
    fn new() -> Self {
        Self {
            bytes: [0; 1024],
            used: 0,
        }
    }

    fn print(&mut self) {
        self.used = self.used.min(self.bytes.len() - 1);
        self.bytes[self.used] = b'\n';
        let mut rest = &self.bytes[..=self.used];
        while !rest.is_empty() {
            let done = sys::write(libc::STDERR_FILENO, rest);
            if done == 0 {
                break;
            }
            rest = &rest[done..];
        }
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = self.bytes.len() - self.used;
        let taken = text.len().min(room);
        self.bytes[self.used..self.used + taken].copy_from_slice(&text.as_bytes()[..taken]);
        self.used += taken;
        Ok(())
    }
}

/// The thread, as a report names it.
struct Who<'c>(&'c HostContext);

impl fmt::Display for Who<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAME_BYTES: usize = 16;
        write!(f, "vCPU {}, thread {}", self.0.vcpu, self.0.tid)?;
        if self.0.is_strict {
            // Linux kills who asks.
            return Ok(());
        }
        let mut name = [0u8; NAME_BYTES];
        let arguments = [libc::PR_GET_NAME as u64, name.as_mut_ptr() as u64, 0, 0, 0, 0];
        // SAFETY: Linux writes the name, which ends with 0, into the bytes.
        let answer = unsafe { sys::raw(libc::SYS_prctl, arguments) };
        let end = name.iter().position(|byte| *byte == 0).unwrap_or(NAME_BYTES);
        match (answer, core::str::from_utf8(&name[..end])) {
            (0, Ok(name)) => write!(f, " \"{name}\""),
            _ => Ok(()),
        }
    }
}

/// Name of an exit kind.
pub(crate) fn kind_name(kind: u32) -> &'static str {
    match kind {
        abi::EXIT_SYSCALL => "EXIT_SYSCALL",
        abi::EXIT_TOUCH => "EXIT_TOUCH",
        abi::EXIT_REFUSED => "EXIT_REFUSED",
        abi::EXIT_NO_SLOT => "EXIT_NO_SLOT",
        abi::EXIT_FAIL_ENTRY => "EXIT_FAIL_ENTRY",
        abi::EXIT_TRIPLE_FAULT => "EXIT_TRIPLE_FAULT",
        abi::EXIT_UNHANDLED => "EXIT_UNHANDLED",
        abi::EXIT_AGAIN => "EXIT_AGAIN",
        _ => "unknown exit",
    }
}

/// Reports an exit without a way on, and ends the process.
pub(super) fn die_of_exit(context: &HostContext, run: &RunPage, what: &str) -> ! {
    let mut line = Line::new();
    let exit = &run.exit;
    let _ = write!(
        line,
        "dune: fatal: {what}: {} (reason {:#x}, qualification {:#x}, gpa {:#x}, gla {:#x}, hva {:#x}, access {:#x}, flags {:#x}, interruption {:#x}, instruction error {}), RIP {:#x}, RSP {:#x}, CR3 {:#x}, {}",
        kind_name(exit.kind),
        exit.reason,
        exit.qualification,
        exit.gpa,
        exit.gla,
        exit.hva,
        exit.access,
        exit.flags,
        exit.interruption_info,
        exit.instruction_error,
        run.rip,
        run.gprs.rsp,
        run.sregs.cr3,
        Who(context),
    );
    line.print();
    last_words(&LastWords {
        exit: Some(exit.kind),
        reason: exit.reason,
        vcpu: context.vcpu as u32,
        rip: run.rip,
        rsp: run.gprs.rsp,
        rflags: run.rflags,
        cr3: run.sregs.cr3,
    });
    sys::die_by(libc::SIGSEGV)
}

/// Reports that RUN itself failed, and ends the process.
pub(super) fn die_of_run(context: &HostContext, errno: i64) -> ! {
    let mut line = Line::new();
    let why = match errno as i32 {
        libc::ENODEV => "VMX was taken away from the module, `dmesg | grep dune` says why",
        _ => "the run page or the device was damaged",
    };
    let _ = write!(
        line,
        "dune: fatal: DUNE_RUN failed with errno {errno}: {why}, {}",
        Who(context)
    );
    line.print();
    last_words(&LastWords {
        exit: None,
        reason: 0,
        vcpu: context.vcpu as u32,
        rip: 0,
        rsp: 0,
        rflags: 0,
        cr3: 0,
    });
    sys::die_by(libc::SIGSEGV)
}

/// Reports a signal frame that cannot be written or read, and ends the process, as Linux does.
pub(super) fn die_of_frame(context: &HostContext, what: &str, signal: i32, rip: u64, rsp: u64) -> ! {
    let mut line = Line::new();
    let _ = write!(
        line,
        "dune: fatal: {what}: signal {signal}, RIP {rip:#x}, RSP {rsp:#x}, alternate stack {:#x} + {:#x}, {}",
        context.alt_stack.start,
        context.alt_stack.bytes,
        Who(context)
    );
    line.print();
    sys::die_by(libc::SIGSEGV)
}

/// Reports an exception without a way on, and ends the process.
pub(super) fn die_of_exception(context: &HostContext, reason: u32, frame: Option<&TrapFrame>) -> ! {
    let mut line = Line::new();
    let text = Fatal::from_raw(reason).map_or("unknown reason", Fatal::text);
    let _ = write!(line, "dune: fatal: {text}: ");
    if let Some(frame) = frame {
        let _ = write!(
            line,
            "{}, error code {:#x}, address {:#x}, RIP {:#x}, CS {:#x}, RSP {:#x}, RFLAGS {:#x}, ",
            frame.vector(),
            frame.error_code,
            frame.cr2,
            frame.rip,
            frame.cs,
            frame.rsp,
            frame.rflags,
        );
    }
    let _ = write!(line, "{}", Who(context));
    line.print();
    last_words(&LastWords {
        exit: None,
        reason: frame.map_or(0, |frame| frame.vector().0.into()),
        vcpu: context.vcpu as u32,
        rip: frame.map_or(0, |frame| frame.rip),
        rsp: frame.map_or(0, |frame| frame.rsp),
        rflags: frame.map_or(0, |frame| frame.rflags),
        cr3: 0,
    });
    sys::die_by(libc::SIGSEGV)
}
