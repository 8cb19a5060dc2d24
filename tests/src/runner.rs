// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs each test in a process, user and process group of its own, and reports.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::io::Read;
use std::os::fd::FromRawFd;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::os::unix::process::ExitStatusExt;
use std::panic;
use std::process::Child;
use std::process::Command;
use std::process::ExitCode;
use std::process::ExitStatus;
use std::process::Stdio;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use crate::framework::Body;
use crate::framework::Outcome;
use crate::framework::Test;
use crate::framework::User;
use crate::helpers;
use crate::support::within;

/// Exit statuses of `exec`. Success is not 0, so that a program that ends
/// before its test has said so is not taken for a passed one.
const PASSED: u8 = 100;
const FAILED: u8 = 101;
const SKIPPED: u8 = 102;

/// The line by which `exec` gives the reason of a skip.
const SKIP_PREFIX: &str = "skipped: ";

/// Lines of a passed test that are shown: what it covered.
pub const REPORT_PREFIX: &str = "report: ";

/// Lines of a failed test's output that are shown.
const SHOWN_LINES: usize = 60;

/// Runs the chosen tests, among which those `named` have to be; the exit status is 0 when none failed.
pub fn run_all(tests: &[&'static Test], named: &[String], is_chosen: impl Fn(&Test) -> bool) -> ExitCode {
    if !helpers::is_root() {
        eprintln!("dune-tests: run needs root, to become each test's user");
        return ExitCode::from(2);
    }
    let chosen: Vec<&Test> = tests.iter().copied().filter(|test| is_chosen(test)).collect();
    for name in named {
        if !chosen.iter().any(|test| test.name == name) {
            eprintln!("dune-tests: there is no test {name}");
            return ExitCode::from(2);
        }
    }
    if helpers::module_is_loaded() && helpers::module_counters().is_err() {
        eprintln!("dune-tests: what the module has in use cannot be read: debugfs is not at /sys/kernel/debug, or locked down");
        return ExitCode::from(2);
    }
    println!("KTAP version 1");
    println!("1..{}", chosen.len());
    let mut failed = 0;
    for (index, test) in chosen.iter().enumerate() {
        let number = index + 1;
        let started = Instant::now();
        let (outcome, output) = match test.needs.iter().find_map(|need| need.unmet()) {
            Some(reason) => (Outcome::Skip(reason), String::new()),
            None => {
                let before = in_use();
                let (outcome, output) = run_one(test);
                match outcome {
                    Outcome::Pass => (nothing_left(&before), output),
                    other => (other, output),
                }
            }
        };
        let milliseconds = started.elapsed().as_millis();
        match outcome {
            Outcome::Pass => {
                for line in output.lines().filter_map(|line| line.strip_prefix(REPORT_PREFIX)) {
                    println!("# {}: {line}", test.name);
                }
                println!("ok {number} {} # {milliseconds} ms", test.name);
            }
            Outcome::Skip(reason) => println!("ok {number} {} # SKIP {reason}", test.name),
            Outcome::Fail(message) => {
                failed += 1;
                let lines: Vec<&str> = output.lines().collect();
                for line in &lines[lines.len().saturating_sub(SHOWN_LINES)..] {
                    println!("# {line}");
                }
                println!("# {}: {message}", test.name);
                println!("not ok {number} {} # {milliseconds} ms", test.name);
            }
        }
        // Missing results are how the harness' own test makes them go missing.
        if std::env::var_os("DUNE_TESTS_STOP_AFTER").is_some_and(|n| n.to_str() == Some(&number.to_string())) {
            return ExitCode::SUCCESS;
        }
    }
    println!("# dune-tests end {}", std::env::var("dune_token").unwrap_or_default());
    ExitCode::from(u8::from(failed != 0))
}

/// What the module says is in use; nothing where it is not loaded.
fn in_use() -> BTreeMap<String, u64> {
    helpers::module_counters().unwrap_or_default()
}

/// Whether the module has no more in use than before the test, soon behind its end.
fn nothing_left(before: &BTreeMap<String, u64>) -> Outcome {
    let left = || {
        let mut left = in_use();
        left.retain(|name, count| *count > before.get(name).copied().unwrap_or(0));
        left
    };
    if within(Duration::from_secs(2), || left().is_empty()) {
        Outcome::Pass
    } else {
        Outcome::Fail(format!("left over in the module: {:?}", left()))
    }
}

/// Runs one test in this process and tells the outcome by the exit status.
pub fn exec(tests: &[&'static Test], name: &str) -> ExitCode {
    let Some(test) = tests.iter().find(|test| test.name == name) else {
        eprintln!("dune-tests: there is no test {name}");
        return ExitCode::from(2);
    };
    let body = test.body;
    let result = panic::catch_unwind(move || match body {
        Body::Tells(run) => run(),
        Body::Asserts(run) => {
            run();
            Outcome::Pass
        }
    });
    match result {
        Ok(Outcome::Pass) => ExitCode::from(PASSED),
        Ok(Outcome::Fail(message)) => {
            println!("failed: {message}");
            ExitCode::from(FAILED)
        }
        Ok(Outcome::Skip(reason)) => {
            println!("{SKIP_PREFIX}{reason}");
            ExitCode::from(SKIPPED)
        }
        // The panic's message is already in the output.
        Err(_) => ExitCode::from(FAILED),
    }
}

fn run_one(test: &Test) -> (Outcome, String) {
    let (child, mut reader) = match spawn(test) {
        Ok(pair) => pair,
        Err(error) => return (Outcome::Fail(format!("cannot be started: {error}")), String::new()),
    };
    let group = child.id() as i32;
    let (sender, receiver) = mpsc::channel();
    let waiter = thread::spawn(move || {
        let mut child = child;
        let _ = sender.send(child.wait());
    });
    let collector = thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = reader.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    });
    let limit_s = test.limit_s();
    let waited = receiver.recv_timeout(Duration::from_secs(limit_s));
    // Whatever the test left behind goes with it.
    // SAFETY: kill touches no memory; the group is the child's own.
    unsafe { libc::kill(-group, libc::SIGKILL) };
    if waited.is_err() && receiver.recv_timeout(Duration::from_secs(5)).is_err() {
        // SIGKILL does not end it: the machine is not worth going on with.
        println!("# {}: survives SIGKILL", test.name);
        println!("Bail out! a process cannot be killed");
        std::process::exit(3);
    }
    let _ = waiter.join();
    let output = collector.join().unwrap_or_default();
    let outcome = match waited {
        Err(_) => Outcome::Fail(format!("killed after {limit_s} s")),
        Ok(Err(error)) => Outcome::Fail(format!("cannot be waited for: {error}")),
        Ok(Ok(status)) => judge(status, &output),
    };
    (outcome, output)
}

fn judge(status: ExitStatus, output: &str) -> Outcome {
    match (status.code().map(|code| code as u8), status.signal()) {
        (Some(PASSED), _) => Outcome::Pass,
        (Some(SKIPPED), _) => {
            let reason = output.lines().rev().find_map(|line| line.strip_prefix(SKIP_PREFIX));
            Outcome::Skip(reason.unwrap_or("no reason given").to_string())
        }
        (Some(FAILED), _) => {
            let message = output.lines().rev().find_map(|line| line.strip_prefix("failed: "));
            Outcome::Fail(message.unwrap_or("panicked").to_string())
        }
        (Some(code), _) => Outcome::Fail(format!("ended with status {code} before its result")),
        (None, signal) => Outcome::Fail(format!("killed by signal {}", signal.unwrap_or(0))),
    }
}

/// A pipe that no other program inherits by accident.
fn pipe() -> io::Result<(File, OwnedFd)> {
    let mut ends = [0; 2];
    // SAFETY: the call writes two descriptors into an array of two.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both descriptors are new and owned by nobody else.
    Ok(unsafe { (File::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) })
}

/// Starts `dune-tests exec NAME` as the test's user; returns what it writes.
fn spawn(test: &Test) -> io::Result<(Child, File)> {
    let (reader, writer) = pipe()?;
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["exec", test.name])
        .stdin(Stdio::null())
        .stderr(writer.try_clone()?)
        .stdout(writer)
        .process_group(0)
        .current_dir("/tmp");
    let name = CString::new(test.run_as.name()).map_err(io::Error::other)?;
    let identity = match test.run_as {
        User::Root => None,
        user => Some(
            helpers::user_id(user.name())
                .ok_or_else(|| io::Error::other(format!("there is no user {}", user.name())))?,
        ),
    };
    // SAFETY: only system calls between fork and exec; initgroups reads
    // /etc/group, and this process has no other thread that could hold its lock.
    unsafe {
        command.pre_exec(move || {
            let none = libc::rlimit {
                rlim_cur: 0,
                rlim_max: 0,
            };
            let mut failed = libc::setrlimit(libc::RLIMIT_CORE, &none) != 0;
            if let Some((uid, gid)) = identity {
                failed |= libc::initgroups(name.as_ptr(), gid) != 0;
                failed |= libc::setgid(gid) != 0;
                failed |= libc::setuid(uid) != 0;
            }
            if failed {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let child = command.spawn()?;
    // Drops the writer's copies in this process, or the reader never ends.
    drop(command);
    Ok((child, reader))
}
