// SPDX-License-Identifier: MIT OR Apache-2.0

//! Children, threads and programs as the targets were set: by a small program that is linked statically
//! (`scripts/small`), whose own memory and mappings cost next to nothing, in the terms of C: fork and waitpid, pthread_create
//! and pthread_join of a function that does nothing, posix_spawn and waitpid.
//!
//! Without an argument, or with `enter`, it is the program of the row `process`: it does nothing, or enters Dune mode, and
//! ends. With `enter` and the number of a file it tells there what its vCPU counted.
#![no_main]

use core::ffi::c_char;
use core::ffi::c_int;
use core::ffi::c_void;
use core::ffi::CStr;
use core::ptr;
use std::ffi::CString;
use std::sync::Mutex;

use dune_bench::counting;
use dune_bench::counting::Done;
use dune_bench::counting::RunPage;
use dune_bench::counting::Told;
use dune_bench::counting::COLUMNS;
use dune_bench::counting::NOTHING;
use dune_bench::measure::timed;
use dune_bench::measure::Selection;
use dune_bench::measure::System;
use dune_bench::tasks::end_of_child;
use dune_bench::tasks::neighbour;
use dune_bench::tasks::rest;
use libdune::Dune;

const CHILDREN: usize = 30;
const THREADS: usize = 50;
const PROGRAMS: usize = 20;

/// libc's entry, without what std does before a `main` of its own. The status is 0 if all went well.
#[no_mangle]
extern "C" fn main(count: c_int, arguments: *const *const c_char) -> c_int {
    // SAFETY: So many strings, which live as long as the program.
    let argument = |i: usize| unsafe { CStr::from_ptr(*arguments.add(i)) };
    match count {
        1 => c_int::from(Dune::is_active()),
        _ if argument(1) == c"enter" => enter((count > 2).then(|| number(argument(2)))),
        _ => {
            let words = (1..count as usize).map(|i| argument(i).to_string_lossy().into_owned());
            measure(&words.collect::<Vec<_>>())
        }
    }
}

fn number(text: &CStr) -> i32 {
    let number = text.to_str().ok().and_then(|text| text.parse().ok());
    number.expect("the number of a file")
}

/// Enters, and ends in Dune mode.
fn enter(teller: Option<i32>) -> c_int {
    let Ok(dune) = Dune::enter() else { return 2 };
    let status = c_int::from(!Dune::is_active());
    if let Some(fd) = teller {
        let done = counting::to_the_end(&dune);
        // SAFETY: Numbers to a file that was made for them.
        let written = unsafe { libc::pwrite(fd, ptr::from_ref(&done).cast(), size_of::<Done>(), 0) };
        assert_eq!(written, size_of::<Done>() as isize);
        // SAFETY: Ends the process, in Dune mode.
        unsafe { libc::_exit(status) };
    }
    core::mem::forget(dune);
    status
}

/// `[SYSTEM, ROW...]`: prints those rows.
fn measure(words: &[String]) -> c_int {
    let Some((name, rows)) = words.split_first() else {
        return 1;
    };
    let Some(name) = ["linux", "dune", "dune-borrow"].into_iter().find(|known| known == name) else {
        eprintln!("dune-small: {name}?");
        return 1;
    };
    let mut system = System {
        name,
        dune: None,
        selection: Selection {
            rows: rows.to_vec(),
            ..Selection::default()
        },
        is_counting: false,
    };
    if name == "linux" {
        process(&system);
        fork(&system);
        thread(&system);
        return 0;
    }
    let dune = Dune::enter().expect("entering");
    system.is_counting = counting::is_on(&dune);
    dune.leave();
    process(&system);
    let dune = Dune::enter().expect("entering");
    system.dune = Some(&dune);
    fork(&system);
    thread(&system);
    0
}

/// The child is in Dune mode as its parent is, and ends.
fn fork(system: &System<'_>) {
    let is_dune = system.dune.is_some();
    let told = Told::new();
    let teller = system.dune.filter(|_| system.is_counting);
    let child = || {
        // SAFETY: The child only looks, tells, and ends.
        unsafe {
            let pid = libc::fork();
            if pid == 0 {
                let is_right = Dune::is_active() == is_dune;
                if let Some(dune) = teller {
                    told.tell(counting::to_the_end(dune));
                }
                libc::_exit(c_int::from(!is_right));
            }
            pid
        }
    };
    system.repeated_with(
        "fork",
        CHILDREN,
        rest,
        |_| {
            let mut status = 1;
            let ticks = timed(|| status = end_of_child(child()));
            assert_eq!(status, 0, "the child is in Dune mode: {is_dune}");
            ticks
        },
        || told.get(),
    );
}

/// The run page of a thread that is gone.
static LAST: Mutex<Option<RunPage>> = Mutex::new(None);

/// Does nothing but to say where it runs.
extern "C" fn nothing(_: *mut c_void) -> *mut c_void {
    usize::from(Dune::is_active()) as *mut c_void
}

/// The same, and leaves its run page, given the device's number.
extern "C" fn counted(device: *mut c_void) -> *mut c_void {
    *LAST.lock().expect("nobody panics with it") = Some(RunPage::map(device as usize as i32));
    nothing(ptr::null_mut())
}

fn thread(system: &System<'_>) {
    let is_dune = system.dune.is_some();
    let is_told = is_dune && system.is_counting;
    let (start, argument): (extern "C" fn(*mut c_void) -> *mut c_void, _) = if is_told {
        (counted, counting::device() as usize as *mut c_void)
    } else {
        (nothing, ptr::null_mut())
    };
    let mut neighbours = Vec::new();
    system.repeated_with(
        "thread",
        THREADS,
        || {
            rest();
            neighbours.push(neighbour());
        },
        |_| {
            let mut answer = ptr::null_mut();
            // SAFETY: A function of the right type; what it answers goes into a word of ours.
            let ticks = timed(|| unsafe {
                let mut thread = 0;
                assert_eq!(libc::pthread_create(&mut thread, ptr::null(), start, argument), 0);
                assert_eq!(libc::pthread_join(thread, &mut answer), 0);
            });
            assert_eq!(answer as usize, usize::from(is_dune), "the thread is in Dune mode");
            ticks
        },
        || {
            let page = LAST.lock().expect("nobody panics with it").take();
            page.map_or(NOTHING, |page| page.done())
        },
    );
}

/// This program, started by one that is not in Dune mode.
fn process(system: &System<'_>) {
    let own = std::env::current_exe().expect("the path of this program is known");
    let program = CString::new(own.into_os_string().into_encoded_bytes()).expect("a path has no 0");
    // SAFETY: A fresh file, for the numbers.
    let file = unsafe { libc::memfd_create(c"counted".as_ptr(), 0) };
    assert!(file >= 0, "memfd_create");
    let mut words = vec![program.clone()];
    if system.name != "linux" {
        words.push(c"enter".into());
        if system.is_counting {
            words.push(CString::new(file.to_string()).expect("digits"));
        }
    }
    let mut arguments: Vec<*mut c_char> = words.iter().map(|word| word.as_ptr().cast_mut()).collect();
    arguments.push(ptr::null_mut());
    let environment = [ptr::null_mut()];
    let spawn = || {
        let mut pid = 0;
        // SAFETY: Lists of strings that end with a null.
        let result = unsafe {
            libc::posix_spawn(
                &mut pid,
                program.as_ptr(),
                ptr::null(),
                ptr::null(),
                arguments.as_ptr(),
                environment.as_ptr(),
            )
        };
        assert_eq!(result, 0, "posix_spawn");
        pid
    };
    system.repeated_with(
        "process",
        PROGRAMS,
        rest,
        |_| {
            let mut status = 1;
            let ticks = timed(|| status = end_of_child(spawn()));
            assert_eq!(status, 0, "what the program says");
            ticks
        },
        || {
            let mut done = [0; COLUMNS];
            let bytes = size_of::<Done>();
            // SAFETY: Into the numbers.
            let read = unsafe { libc::pread(file, done.as_mut_ptr().cast(), bytes, 0) };
            assert_eq!(read, bytes as isize, "the program told what it counted");
            done
        },
    );
    // SAFETY: Ours.
    unsafe { libc::close(file) };
}
