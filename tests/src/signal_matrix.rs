// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a signal does (its action) wherever it finds a thread in Dune mode (the place): each pair, with a child that is there.

use std::arch::asm;
use std::fs;
use std::io;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use libdune::Dune;
use libdune::Outcome;
use libdune::Thread;
use libdune::TrapFrame;
use libdune::Vector;
use linux_raw_sys::general;

use crate::framework::Test;
use crate::helpers;
use crate::mm::Userfaultfd;
use crate::support::enter;
use crate::support::eventually;
use crate::support::set_plain_handler;
use crate::support::spawn;
use crate::support::Child;
use crate::support::Map;
use crate::support::Shared;
use crate::support::PAGE;
use crate::user::Growing;

pub const TESTS: &[Test] = &[Test::asserting(
    "every_action_of_a_signal_everywhere",
    every_action_of_a_signal_everywhere,
)
.timeout_s(120)];

/// Where the signal finds the thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Cpl0,
    Cpl3,
    /// Blocked in a forwarded call.
    Call,
    /// Blocked in an access that the host loop makes for the guest.
    HostLoop,
    /// In a handler that may allocate.
    Handler,
    /// In a plain one.
    TrapStack,
    Enter,
    Leave,
}

const PLACES: [Place; 8] = [
    Place::Cpl0,
    Place::Cpl3,
    Place::Call,
    Place::HostLoop,
    Place::Handler,
    Place::TrapStack,
    Place::Enter,
    Place::Leave,
];

/// What becomes of the signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    /// A handler, without SA_RESTART: a call ends with EINTR.
    Interrupt,
    /// A handler, with SA_RESTART.
    Restart,
    Ignore,
    /// SIGTERM's.
    Default,
    /// SIGKILL.
    Kill,
    /// SIGSTOP, then SIGCONT.
    Stop,
}

const ACTIONS: [Action; 6] = [
    Action::Interrupt,
    Action::Restart,
    Action::Ignore,
    Action::Default,
    Action::Kill,
    Action::Stop,
];

/// Words that the child and its parent share.
mod word {
    /// What the child is about: one of `phase`.
    pub const PHASE: usize = 0;
    /// Grows while the child spins where it is to be.
    pub const PROGRESS: usize = 1;
    /// Not 0: the child is to come out and end.
    pub const RELEASE: usize = 2;
    /// Handlers that ran.
    pub const HANDLED: usize = 3;
    /// Of them, those that ran outside Dune mode.
    pub const OUTSIDE: usize = 4;
    /// What a blocked call came to: bytes, or a negative errno.
    pub const ANSWER: usize = 5;
    /// Handlers by the phase that they found: as many words as there are phases.
    pub const HANDLED_IN: usize = 8;
    /// How many words are used.
    pub const COUNT: usize = 16;
}

mod phase {
    pub const THERE: u64 = 1;
    pub const ENTERING: u64 = 2;
    pub const LEAVING: u64 = 3;
    pub const BETWEEN: u64 = 4;
}

fn shared() -> &'static Shared {
    static SHARED: OnceLock<Shared> = OnceLock::new();
    SHARED.get_or_init(Shared::new)
}

fn load(word: usize) -> u64 {
    shared().word(word).load(SeqCst)
}

fn store(word: usize, value: u64) {
    shared().word(word).store(value, SeqCst);
}

fn grow_by_one(word: usize) {
    shared().word(word).fetch_add(1, SeqCst);
}

extern "C" fn note(_: i32) {
    grow_by_one(word::HANDLED);
    grow_by_one(word::HANDLED_IN + load(word::PHASE) as usize);
    if !Dune::is_active() {
        grow_by_one(word::OUTSIDE);
    }
}

/// Without a system call.
fn spin(relax: fn()) {
    while load(word::RELEASE) == 0 {
        grow_by_one(word::PROGRESS);
        relax();
    }
}

/// Exits. Handlers run with RFLAGS.IF clear, and Bochs 2.7 keeps interrupts from who is entered so until it exits itself.
fn exit() {
    std::hint::black_box(helpers::cpuid(0, 0));
}

fn spin_in_handler(frame: &mut TrapFrame, _: &Thread<'_>) -> Outcome {
    spin(exit);
    frame.rip += 2;
    Outcome::Resume
}

fn undefined() {
    // SAFETY: The handlers skip it.
    unsafe { asm!("ud2") };
}

/// What parent and child have beside the words.
struct Between {
    growing: Growing,
    /// A blocked call reads what is written to the other end.
    ends: (UnixStream, UnixStream),
}

impl Between {
    fn new() -> Self {
        Self {
            growing: Growing::new(),
            ends: UnixStream::pair().unwrap(),
        }
    }

    fn progress(&self, place: Place) -> u64 {
        match place {
            Place::Cpl3 => self.growing.progress(),
            _ => load(word::PROGRESS),
        }
    }

    fn release(&self, place: Place) {
        store(word::RELEASE, 1);
        match place {
            Place::Cpl3 => self.growing.release(),
            Place::Call => (&self.ends.1).write_all(b"x").unwrap(),
            _ => {}
        }
    }

    /// The child's part: is there until it is released.
    fn stay(&self, place: Place) {
        let page = Map::new(PAGE);
        let server = (place == Place::HostLoop).then(|| serve_when_released(&page));
        if matches!(place, Place::Enter | Place::Leave) {
            return enter_and_leave();
        }
        let dune = enter();
        store(word::PHASE, phase::THERE);
        match place {
            Place::Cpl0 => spin(std::hint::spin_loop),
            Place::Cpl3 => self.growing.run(&dune.thread(), || {}),
            Place::Call => {
                let mut byte = 0u8;
                // SAFETY: One byte of our own.
                let read = unsafe { libc::read(self.ends.0.as_raw_fd(), (&raw mut byte).cast(), 1) };
                let errno = io::Error::last_os_error().raw_os_error().unwrap_or(0);
                let answer = if read < 0 { -i64::from(errno) } else { read as i64 };
                store(word::ANSWER, answer as u64);
            }
            Place::HostLoop => assert_eq!(page.read(8), page.address() as u64),
            Place::Handler => {
                dune.thread()
                    .with_exception_handler(Vector::UD, spin_in_handler, undefined);
            }
            Place::TrapStack => {
                dune.set_exception_handler(Vector::UD, spin_in_handler);
                undefined();
            }
            Place::Enter | Place::Leave => unreachable!(),
        }
        assert!(Dune::is_active());
        dune.leave();
        if let Some(server) = server {
            server.join().unwrap();
        }
    }
}

/// Provides the page when the child is released: by a thread that takes no signals. In the host loop only: a fault in the kernel
/// is refused.
fn serve_when_released(page: &Map) -> thread::JoinHandle<()> {
    let uffd = Userfaultfd::with_flags(general::UFFD_USER_MODE_ONLY, 0);
    uffd.register(page, general::UFFDIO_REGISTER_MODE_MISSING);
    // SAFETY: Sets of signals of our own.
    unsafe {
        let (mut all, mut old) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_BLOCK, &all, &mut old);
        let server = thread::spawn(move || {
            let (address, _) = uffd.next_fault();
            while load(word::RELEASE) == 0 {
                thread::sleep(Duration::from_millis(1));
            }
            uffd.fill(address, 0);
        });
        libc::pthread_sigmask(libc::SIG_SETMASK, &old, std::ptr::null_mut());
        server
    }
}

/// Does nothing else, so that a signal finds it at one or the other.
fn enter_and_leave() {
    while load(word::RELEASE) == 0 {
        store(word::PHASE, phase::ENTERING);
        let dune = enter();
        store(word::PHASE, phase::LEAVING);
        dune.leave();
        store(word::PHASE, phase::BETWEEN);
        grow_by_one(word::PROGRESS);
    }
}

/// Whether the process waits for something, interruptibly.
fn sleeps(child: &Child) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", child.pid)).unwrap();
    stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('S'))
}

fn is_there(between: &Between, place: Place, child: &Child) -> bool {
    match place {
        Place::Call | Place::HostLoop => load(word::PHASE) == phase::THERE && sleeps(child),
        Place::Enter => load(word::PROGRESS) > 0 && load(word::PHASE) == phase::ENTERING,
        Place::Leave => load(word::PROGRESS) > 0 && load(word::PHASE) == phase::LEAVING,
        Place::Cpl0 | Place::Cpl3 | Place::Handler | Place::TrapStack => {
            let before = between.progress(place);
            before > 0 && eventually(|| between.progress(place) > before + 10)
        }
    }
}

fn wait_for(child: &Child, options: i32) -> i32 {
    let mut status = 0;
    // SAFETY: our own child.
    assert_eq!(unsafe { libc::waitpid(child.pid, &mut status, options) }, child.pid);
    status
}

/// Whether the signal found the child there.
fn one_cell(place: Place, action: Action) -> bool {
    let wanted = match place {
        Place::Enter => phase::ENTERING,
        Place::Leave => phase::LEAVING,
        _ => phase::THERE,
    };
    (0..word::COUNT).for_each(|word| store(word, 0));
    let between = Between::new();
    match action {
        Action::Interrupt => set_plain_handler(libc::SIGUSR1, note, 0),
        Action::Restart => set_plain_handler(libc::SIGUSR1, note, libc::SA_RESTART),
        // SAFETY: An action of Linux'.
        _ => unsafe {
            libc::signal(libc::SIGUSR1, libc::SIG_IGN);
        },
    }
    let child = spawn(|| between.stay(place));
    assert!(eventually(|| is_there(&between, place, &child)), "not there");
    match action {
        Action::Interrupt | Action::Restart => {
            // A handler that is to find a phase may have to be called more than once.
            let handled = || load(word::HANDLED_IN + wanted as usize) > 0;
            match place {
                Place::Enter | Place::Leave => assert!(
                    eventually(|| {
                        child.kill(libc::SIGUSR1);
                        thread::sleep(Duration::from_micros(700));
                        handled()
                    }),
                    "no handler ran there"
                ),
                // At once: nothing is let go before.
                Place::Cpl0 | Place::Cpl3 | Place::Call => {
                    child.kill(libc::SIGUSR1);
                    assert!(eventually(handled), "no handler ran");
                }
                // What holds the thread may hold the handler, too.
                Place::HostLoop | Place::Handler | Place::TrapStack => child.kill(libc::SIGUSR1),
            }
            let interrupted = (place, action) == (Place::Call, Action::Interrupt);
            if !interrupted {
                assert!(eventually(|| is_there(&between, place, &child)), "does not go on");
                between.release(place);
            }
            child.wait().assert_success();
            assert!(handled(), "no handler ran at all");
            if !matches!(place, Place::Enter | Place::Leave) {
                assert_eq!((load(word::HANDLED), load(word::OUTSIDE)), (1, 0));
            }
            if place == Place::Call {
                let wanted = if interrupted { -i64::from(libc::EINTR) } else { 1 };
                assert_eq!(load(word::ANSWER) as i64, wanted);
            }
            true
        }
        Action::Ignore => {
            for _ in 0..3 {
                child.kill(libc::SIGUSR1);
                thread::sleep(Duration::from_millis(2));
                assert!(eventually(|| is_there(&between, place, &child)), "does not go on");
            }
            between.release(place);
            child.wait().assert_success();
            assert_eq!(load(word::HANDLED), 0);
            // Nothing tells where an ignored signal found it: it was there just before.
            true
        }
        Action::Default => {
            child.kill(libc::SIGTERM);
            assert_eq!(child.wait().signal(), Some(libc::SIGTERM));
            load(word::PHASE) == wanted
        }
        Action::Kill => {
            child.kill(libc::SIGKILL);
            assert_eq!(child.wait().signal(), Some(libc::SIGKILL));
            load(word::PHASE) == wanted
        }
        Action::Stop => {
            child.kill(libc::SIGSTOP);
            assert!(libc::WIFSTOPPED(wait_for(&child, libc::WUNTRACED)));
            let before = between.progress(place);
            thread::sleep(Duration::from_millis(3));
            assert_eq!(between.progress(place), before, "not stopped");
            let was_there = load(word::PHASE) == wanted;
            child.kill(libc::SIGCONT);
            assert!(libc::WIFCONTINUED(wait_for(&child, libc::WCONTINUED)));
            assert!(eventually(|| is_there(&between, place, &child)), "does not go on");
            between.release(place);
            child.wait().assert_success();
            if place == Place::Call {
                assert_eq!(load(word::ANSWER), 1);
            }
            was_there
        }
    }
}

fn every_action_of_a_signal_everywhere() {
    for place in PLACES {
        for action in ACTIONS {
            println!("{place:?}, {action:?}");
            // The child goes in and out of some places while the signal is on its way.
            let found = (0..20).any(|_| one_cell(place, action));
            assert!(found, "no signal found the child there");
        }
    }
}
