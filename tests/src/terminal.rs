// SPDX-License-Identifier: MIT OR Apache-2.0

//! Job control on a terminal: a Dune process is stopped, continued, interrupted and hung up on as any job is.

use std::fs::File;
use std::io::Read;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::fd::FromRawFd;
use std::ptr;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::Duration;

use libdune::Dune;
use libdune::Thread;

use crate::framework::Test;
use crate::support::count_signal;
use crate::support::enter;
use crate::support::eventually;
use crate::support::set_plain_handler;
use crate::support::spawn;
use crate::support::Shared;
use crate::support::SIGNALS;
use crate::user::Growing;

pub const TESTS: &[Test] = &[
    Test::asserting("background_job_is_stopped_at_the_terminal", background_job_is_stopped),
    Test::asserting("control_z_stops_a_dune_job", control_z_stops_a_dune_job).timeout_s(60),
    Test::asserting("control_z_may_be_handled", control_z_may_be_handled),
    Test::asserting("control_c_ends_a_dune_job", control_c_ends_a_dune_job).timeout_s(60),
    Test::asserting("hangup_ends_a_dune_job", hangup_ends_a_dune_job).timeout_s(60),
];

/// What the line discipline makes signals of.
const CONTROL_C: u8 = 0x03;
const CONTROL_Z: u8 = 0x1a;
const CONTROL_BACKSLASH: u8 = 0x1c;

/// Words that a job shares with its shell.
mod word {
    /// 1: the job is where it is to be.
    pub const THERE: usize = 0;
    /// Grows while it spins.
    pub const PROGRESS: usize = 1;
    /// Not 0: it is to end.
    pub const RELEASE: usize = 2;
    /// What the job has to say.
    pub const ANSWER: usize = 3;
}

/// The session's leader has the controlling terminal, as a shell.
struct Shell {
    master: Option<File>,
    terminal: File,
    shared: Shared,
    /// A job that has read goes on until it is killed.
    stays: bool,
}

impl Shell {
    /// Makes the calling process the leader of a session with a new terminal.
    fn new() -> Self {
        let (mut master, mut terminal) = (-1, -1);
        // SAFETY: fds and signals of this process, which was made for this.
        unsafe {
            // A test that is killed leaves nobody behind.
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            assert!(libc::setsid() > 0);
            let none = ptr::null_mut();
            assert_eq!(
                libc::openpty(&mut master, &mut terminal, none, ptr::null(), ptr::null()),
                0
            );
            assert_eq!(libc::ioctl(terminal, libc::TIOCSCTTY, 0), 0);
            // As a shell: it gives the terminal to others while it is in the background itself.
            libc::signal(libc::SIGTTOU, libc::SIG_IGN);
            libc::signal(libc::SIGHUP, libc::SIG_IGN);
            Self {
                master: Some(File::from_raw_fd(master)),
                terminal: File::from_raw_fd(terminal),
                shared: Shared::new(),
                stays: false,
            }
        }
    }

    fn load(&self, word: usize) -> u64 {
        self.shared.word(word).load(SeqCst)
    }

    /// Starts a job in a process group of its own, in Dune mode or natively.
    fn start(&self, inside: bool, body: impl FnOnce(&Self)) -> Job<'_> {
        for word in 0..4 {
            self.shared.word(word).store(0, SeqCst);
        }
        // SAFETY: the child runs the body and ends.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0);
        if pid == 0 {
            // SAFETY: signals, group and fds of the child's own.
            unsafe {
                if !self.stays {
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                }
                libc::setpgid(0, 0);
                for signal in [libc::SIGTTOU, libc::SIGHUP] {
                    libc::signal(signal, libc::SIG_DFL);
                }
                libc::close(self.master.as_ref().unwrap().as_raw_fd());
            }
            let dune = inside.then(enter);
            body(self);
            assert_eq!(Dune::is_active(), inside);
            drop(dune);
            // SAFETY: ends the child.
            unsafe { libc::_exit(0) };
        }
        // SAFETY: our own child. Both do it, so that it is done for both.
        unsafe { libc::setpgid(pid, pid) };
        Job { pid, shell: self }
    }

    /// Types on the terminal's keyboard.
    fn types(&self, keys: &[u8]) {
        self.master.as_ref().unwrap().write_all(keys).unwrap();
    }

    /// Reads from the terminal, as a job does; the number of bytes, or a negative errno.
    fn reads(&self) -> i64 {
        let mut line = [0; 16];
        match (&self.terminal).read(&mut line) {
            Ok(bytes) => bytes as i64,
            Err(error) => -i64::from(error.raw_os_error().unwrap()),
        }
    }

    fn answers(&self, answer: i64) {
        self.shared.word(word::ANSWER).store(answer as u64, SeqCst);
    }

    fn is_there(&self) {
        self.shared.word(word::THERE).store(1, SeqCst);
    }

    /// A job's: until it is released, at CPL0 or natively.
    fn spin(&self) {
        self.is_there();
        while self.load(word::RELEASE) == 0 {
            self.shared.word(word::PROGRESS).fetch_add(1, SeqCst);
        }
    }
}

/// What wait said of a job.
#[derive(Debug, PartialEq, Eq)]
enum Change {
    Stopped(i32),
    Continued,
    Killed(i32),
    Exited(i32),
}

struct Job<'a> {
    pid: i32,
    shell: &'a Shell,
}

impl Job<'_> {
    /// Waits for the next change.
    fn wait(&self) -> Change {
        let mut status = 0;
        // SAFETY: our own child.
        let waited = unsafe { libc::waitpid(self.pid, &mut status, libc::WUNTRACED | libc::WCONTINUED) };
        assert_eq!(waited, self.pid);
        if libc::WIFSTOPPED(status) {
            Change::Stopped(libc::WSTOPSIG(status))
        } else if libc::WIFCONTINUED(status) {
            Change::Continued
        } else if libc::WIFSIGNALED(status) {
            Change::Killed(libc::WTERMSIG(status))
        } else {
            Change::Exited(libc::WEXITSTATUS(status))
        }
    }

    fn to_foreground(&self) {
        // SAFETY: the shell's own terminal.
        assert_eq!(unsafe { libc::tcsetpgrp(self.shell.terminal.as_raw_fd(), self.pid) }, 0);
    }

    fn send_continue(&self) {
        // SAFETY: our own child's group.
        assert_eq!(unsafe { libc::kill(-self.pid, libc::SIGCONT) }, 0);
    }

    /// Continues the job; waits until that is told.
    fn go_on(&self) {
        self.send_continue();
        assert_eq!(self.wait(), Change::Continued);
    }

    fn wait_until_there(&self) {
        assert!(eventually(|| self.shell.load(word::THERE) != 0), "the job is not there");
    }

    /// Whether it is stopped, or sleeps, or runs: a letter.
    fn state(&self) -> char {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap();
        stat.rsplit(") ").next().and_then(|rest| rest.chars().next()).unwrap()
    }
}

/// Runs `body` natively and in Dune mode, each in a session of its own; what natively is true first shows that the test is right.
fn in_sessions(body: impl Fn(&Shell, bool)) {
    for inside in [false, true] {
        println!("in Dune mode: {inside}");
        spawn(|| body(&Shell::new(), inside)).wait().assert_success();
    }
}

/// SIGTTIN for a read, SIGTTOU for a change of the settings; EIO where that is ignored. `fg` has them go on.
fn background_job_is_stopped() {
    in_sessions(|shell, inside| {
        let job = shell.start(inside, |shell| shell.answers(shell.reads()));
        assert_eq!(job.wait(), Change::Stopped(libc::SIGTTIN));
        assert_eq!(job.state(), 'T');
        // Continued in the background it is stopped again, perhaps before anybody sees that it went on.
        job.send_continue();
        let change = job.wait();
        assert!(
            change == Change::Stopped(libc::SIGTTIN)
                || change == Change::Continued && job.wait() == Change::Stopped(libc::SIGTTIN)
        );
        job.to_foreground();
        job.go_on();
        shell.types(b"line\n");
        assert_eq!(job.wait(), Change::Exited(0));
        assert_eq!(shell.load(word::ANSWER), 5);

        let job = shell.start(inside, |shell| {
            let fd = shell.terminal.as_raw_fd();
            // SAFETY: settings of the terminal, as they are.
            shell.answers(i64::from(unsafe {
                let mut settings = std::mem::zeroed();
                libc::tcgetattr(fd, &mut settings) + libc::tcsetattr(fd, libc::TCSANOW, &settings)
            }));
        });
        assert_eq!(job.wait(), Change::Stopped(libc::SIGTTOU));
        job.to_foreground();
        job.go_on();
        assert_eq!(job.wait(), Change::Exited(0));
        assert_eq!(shell.load(word::ANSWER), 0);

        let job = shell.start(inside, |shell| {
            // SAFETY: no handler.
            unsafe { libc::signal(libc::SIGTTIN, libc::SIG_IGN) };
            shell.answers(shell.reads());
        });
        assert_eq!(job.wait(), Change::Exited(0));
        assert_eq!(shell.load(word::ANSWER) as i64, -i64::from(libc::EIO));
    });
}

/// Where a key finds the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// At CPL0, or natively.
    Spins,
    Cpl3,
    Reads,
}

/// A job in the foreground that is there.
fn job_at<'a>(shell: &'a Shell, inside: bool, place: Place, growing: &Growing) -> Job<'a> {
    let job = shell.start(inside, |shell| {
        // SAFETY: takes part in what the shell does; told by the word.
        while unsafe { libc::tcgetpgrp(shell.terminal.as_raw_fd()) != libc::getpgrp() } {
            thread::yield_now();
        }
        match place {
            Place::Spins => {
                shell.spin();
                shell.answers(SIGNALS.load(SeqCst) as i64);
            }
            Place::Reads => {
                shell.is_there();
                shell.answers(shell.reads());
                if shell.stays {
                    shell.spin();
                }
            }
            Place::Cpl3 => Thread::with_current(|thread| growing.run(thread, || shell.is_there())).unwrap(),
        }
    });
    job.to_foreground();
    job.wait_until_there();
    assert!(eventually(|| match place {
        Place::Reads => job.state() == 'S',
        _ => progress(shell, place, growing) > 10,
    }));
    job
}

fn progress(shell: &Shell, place: Place, growing: &Growing) -> u64 {
    match place {
        Place::Cpl3 => growing.progress(),
        _ => shell.load(word::PROGRESS),
    }
}

fn places(inside: bool) -> &'static [Place] {
    if inside {
        &[Place::Spins, Place::Reads, Place::Cpl3]
    } else {
        &[Place::Spins, Place::Reads]
    }
}

fn control_z_stops_a_dune_job() {
    in_sessions(|shell, inside| {
        for place in places(inside) {
            println!("{place:?}");
            let growing = Growing::new();
            let job = job_at(shell, inside, *place, &growing);
            for _ in 0..2 {
                shell.types(&[CONTROL_Z]);
                assert_eq!(job.wait(), Change::Stopped(libc::SIGTSTP));
                let before = progress(shell, *place, &growing);
                thread::sleep(Duration::from_millis(3));
                assert_eq!((job.state(), progress(shell, *place, &growing)), ('T', before));
                job.go_on();
                match place {
                    Place::Reads => assert!(eventually(|| job.state() == 'S')),
                    _ => assert!(eventually(|| progress(shell, *place, &growing) > before + 10)),
                }
            }
            match place {
                Place::Spins => shell.shared.word(word::RELEASE).store(1, SeqCst),
                Place::Reads => shell.types(b"x\n"),
                Place::Cpl3 => growing.release(),
            }
            assert_eq!(job.wait(), Change::Exited(0));
            if *place == Place::Reads {
                assert_eq!(shell.load(word::ANSWER), 2);
            }
        }
    });
}

extern "C" fn stop_in_handler(_: i32) {
    count_signal(libc::SIGTSTP);
    // As editors do: put the screen in order, stop, and go on.
    // SAFETY: signals of this process.
    unsafe {
        libc::signal(libc::SIGTSTP, libc::SIG_DFL);
        let mut mask = std::mem::zeroed();
        libc::sigaddset(&mut mask, libc::SIGTSTP);
        libc::raise(libc::SIGTSTP);
        libc::sigprocmask(libc::SIG_UNBLOCK, &mask, ptr::null_mut());
    }
    set_plain_handler(libc::SIGTSTP, stop_in_handler, 0);
}

/// A job that stops itself in its handler, and is told when it goes on.
fn control_z_may_be_handled() {
    const STOPS: u64 = 3;
    in_sessions(|shell, inside| {
        set_plain_handler(libc::SIGTSTP, stop_in_handler, 0);
        set_plain_handler(libc::SIGCONT, count_signal, 0);
        let growing = Growing::new();
        let job = job_at(shell, inside, Place::Spins, &growing);
        for _ in 0..STOPS {
            shell.types(&[CONTROL_Z]);
            assert_eq!(job.wait(), Change::Stopped(libc::SIGTSTP));
            let before = shell.load(word::PROGRESS);
            job.go_on();
            // Behind the handler, which is set again.
            assert!(eventually(|| shell.load(word::PROGRESS) > before));
        }
        shell.shared.word(word::RELEASE).store(1, SeqCst);
        assert_eq!(job.wait(), Change::Exited(0));
        assert_eq!(shell.load(word::ANSWER), 2 * STOPS);
    });
}

fn control_c_ends_a_dune_job() {
    in_sessions(|shell, inside| {
        for place in places(inside) {
            for (key, signal) in [(CONTROL_C, libc::SIGINT), (CONTROL_BACKSLASH, libc::SIGQUIT)] {
                println!("{place:?}, signal {signal}");
                let job = job_at(shell, inside, *place, &Growing::new());
                shell.types(&[key]);
                assert_eq!(job.wait(), Change::Killed(signal));
            }
        }
    });
}

/// The terminal is gone: that ends the shell, and the end of a session's leader its foreground job.
fn hangup_ends_a_dune_job() {
    // SAFETY: the job's parent will be dead.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }, 0);
    for inside in [false, true] {
        for place in places(inside) {
            println!("{place:?}, in Dune mode: {inside}");
            let shared = Shared::new();
            let shell = spawn(|| {
                let mut shell = Shell::new();
                shell.stays = true;
                let growing = Growing::new();
                let pid = job_at(&shell, inside, *place, &growing).pid;
                shared.word(0).store(pid as u64, SeqCst);
                // SAFETY: no handler.
                unsafe { libc::signal(libc::SIGHUP, libc::SIG_DFL) };
                shell.master = None;
                thread::sleep(Duration::from_secs(5));
            });
            // Both are dead: they have the other end of its output.
            assert_eq!(shell.wait().signal(), Some(libc::SIGHUP));
            let mut status = 0;
            let pid = shared.word(0).load(SeqCst) as i32;
            // SAFETY: our grandchild, whose parent is dead.
            assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
            assert!(
                libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGHUP,
                "{status:#x}"
            );
        }
    }
}
