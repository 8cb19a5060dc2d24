// SPDX-License-Identifier: MIT OR Apache-2.0
//! Loading and unloading the module.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::os::fd::AsRawFd;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use crate::check;
use crate::check_eq;
use crate::check_ok;
use crate::framework::Need;
use crate::framework::Outcome;
use crate::framework::Suite;
use crate::framework::Test;
use crate::framework::User;
use crate::helpers;
use crate::raw::Ended;
use crate::raw::RawGuest;
use crate::support::enter;
use crate::support::eventually;
use crate::support::spawn;
use crate::support::spawn_spinning;
use crate::support::Knob;
use crate::support::Shared;

pub const TESTS: &[Test] = &[
    Test::new("module_unloads_and_loads_again", module_unloads_and_loads).run_as(User::Root),
    Test::asserting("unload_while_running_is_busy", unload_while_running_is_busy).run_as(User::Root),
    Test::asserting("double_insmod_is_refused", double_insmod_is_refused).run_as(User::Root),
    Test::asserting("wrong_parameters_are_refused", wrong_parameters_are_refused).run_as(User::Root),
    Test::asserting("load_unload_100_times", load_unload_100_times)
        .run_as(User::Root)
        .suite(Suite::Long)
        .timeout_s(240),
    Test::asserting("counters_are_zero_after_each_end", counters_are_zero_after_each_end).run_as(User::Root),
    Test::asserting("no_leak_after_100_runs", no_leak_after_100_runs)
        .run_as(User::Root)
        .needs(&[Need::NoKmemleak])
        .timeout_s(60),
    Test::asserting("no_leak_after_1000_runs", no_leak_after_1000_runs)
        .run_as(User::Root)
        .suite(Suite::Long)
        .needs(&[Need::NoKmemleak])
        .timeout_s(600),
    Test::asserting("opening_holds_up_nobody", opening_holds_up_nobody)
        .run_as(User::Root)
        .needs(&[Need::Path("/sys/module/dune/parameters/open_delay_ms")]),
    Test::asserting("max_vcpus_is_obeyed", max_vcpus_is_obeyed)
        .run_as(User::Root)
        .suite(Suite::Short),
    Test::asserting("out_of_vcpus_is_told", out_of_vcpus_is_told).run_as(User::Root),
];

/// `mov eax, 0x1234; vmcall`.
const HEALTHY: &[u8] = &[0xb8, 0x34, 0x12, 0, 0, 0x0f, 0x01, 0xc1];

fn module_unloads_and_loads() -> Outcome {
    check!(helpers::module_is_loaded());
    let _again = Reload::keep();
    let ended = check_ok!(helpers::unload_module());
    check_eq!(ended.status, 0);
    check!(!helpers::module_is_loaded());
    let ended = check_ok!(helpers::load_module(&[]));
    check!(ended.status == 0, "{ended:?}");
    check!(helpers::module_is_loaded());
    Outcome::Pass
}

/// Puts the module back as it was, with the parameters it had, whatever a test did.
struct Reload(Vec<String>);

impl Reload {
    fn keep() -> Self {
        let parameters = ["gpa_bits", "max_vcpus"].into_iter().filter_map(|name| {
            let value = fs::read_to_string(format!("/sys/module/dune/parameters/{name}")).ok()?;
            Some(format!("{name}={}", value.trim()))
        });
        Self(parameters.collect())
    }

    fn load(&self) {
        let parameters: Vec<&str> = self.0.iter().map(String::as_str).collect();
        let ended = helpers::load_module(&parameters).unwrap();
        assert_eq!(ended.status, 0, "{ended:?}");
    }
}

impl Drop for Reload {
    fn drop(&mut self) {
        if helpers::module_is_loaded() {
            let _ = helpers::unload_module();
        }
        self.load();
    }
}

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// insmod; the errno.
fn insert(parameters: &str) -> Result<(), i32> {
    let file = fs::File::open(helpers::MODULE).unwrap();
    let parameters = CString::new(parameters).unwrap();
    // SAFETY: an open file and a C string.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), parameters.as_ptr(), 0) };
    if result == 0 {
        Ok(())
    } else {
        Err(errno())
    }
}

/// rmmod without waiting; the errno.
fn remove() -> Result<(), i32> {
    // SAFETY: a C string.
    let result = unsafe { libc::syscall(libc::SYS_delete_module, c"dune".as_ptr(), libc::O_NONBLOCK) };
    if result == 0 {
        Ok(())
    } else {
        Err(errno())
    }
}

fn unload_while_running_is_busy() {
    let shared = Shared::new();
    let child = spawn_spinning(&shared);
    for _ in 0..5 {
        assert_eq!(remove(), Err(libc::EWOULDBLOCK), "rmmod while a guest runs");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(helpers::module_is_loaded());
    shared.word(1).store(1, SeqCst);
    child.wait().assert_success();
    assert_eq!(shared.word(0).load(SeqCst), 2);

    // The fd alone keeps it, too.
    let file = fs::File::options().read(true).write(true).open("/dev/dune").unwrap();
    assert_eq!(remove(), Err(libc::EWOULDBLOCK), "rmmod while the device is open");
    drop(file);
    let again = Reload::keep();
    assert_eq!(remove(), Ok(()));
    assert!(!helpers::module_is_loaded());
    drop(again);
}

fn double_insmod_is_refused() {
    assert_eq!(insert(""), Err(libc::EEXIST));
    assert!(helpers::module_is_loaded());
    enter().leave();
}

fn wrong_parameters_are_refused() {
    let again = Reload::keep();
    remove().unwrap();
    for (parameters, line) in [
        ("gpa_bits=31", "gpa_bits=31 is not in 32..=48"),
        ("gpa_bits=49", "gpa_bits=49 is not in 32..=48"),
        ("max_vcpus=0", "max_vcpus=0 is not in 1..=4096"),
        ("max_vcpus=4097", "max_vcpus=4097 is not in 1..=4096"),
    ] {
        assert_eq!(insert(parameters), Err(libc::EINVAL), "{parameters}");
        let log = helpers::kernel_log().unwrap();
        assert!(
            log.lines().any(|text| text.contains("dune:") && text.contains(line)),
            "no line `{line}`"
        );
        assert!(!helpers::module_is_loaded());
    }
    drop(again);
    enter().leave();
}

/// Sum of all global counters.
fn in_use() -> BTreeMap<String, u64> {
    let counters = helpers::module_counters().unwrap();
    for name in ["spaces", "vcpus", "vmcs_pages", "ept_pages"] {
        assert!(counters.contains_key(name), "no counter {name}: {counters:?}");
    }
    counters
}

#[track_caller]
pub fn assert_nothing_in_use() {
    // What an exiting task still held goes a moment after it was waited for.
    let is_empty = || in_use().values().all(|value| *value == 0);
    assert!(eventually(is_empty), "left over: {:?}", in_use());
}

fn load_unload_100_times() {
    let again = Reload::keep();
    for round in 0..100 {
        remove().unwrap_or_else(|errno| panic!("rmmod in round {round}: errno {errno}"));
        insert("").unwrap_or_else(|errno| panic!("insmod in round {round}: errno {errno}"));
        if round % 10 == 0 {
            let mut guest = RawGuest::new(HEALTHY);
            assert_eq!(guest.run(), Ended::Call(0x1234), "round {round}");
        }
    }
    drop(again);
    enter().leave();
}

fn counters_are_zero_after_each_end() {
    assert_nothing_in_use();
    {
        let mut guest = RawGuest::new(HEALTHY);
        assert_eq!(guest.run(), Ended::Call(0x1234));
        let used = in_use();
        assert_eq!(
            (used["spaces"], used["vcpus"], used["vmcs_pages"]),
            (1, 1, 1),
            "{used:?}"
        );
        assert!(used["ept_pages"] >= 4, "{used:?}");
    }
    assert_nothing_in_use();
    type Body = fn();
    let ends: [(&str, Body); 6] = [
        ("leave", || enter().leave()),
        ("exit inside", || {
            let _dune = enter();
            // SAFETY: ends the child.
            unsafe { libc::_exit(0) }
        }),
        ("fatal signal", || {
            let _dune = enter();
            // SAFETY: ends the child.
            unsafe { libc::abort() }
        }),
        ("SIGKILL", || {
            let _dune = enter();
            // SAFETY: ends the child.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        }),
        ("exec", || {
            let _dune = enter();
            let arguments = [c"true".as_ptr(), std::ptr::null()];
            // SAFETY: a null-terminated list of C strings.
            unsafe { libc::execv(c"/bin/true".as_ptr(), arguments.as_ptr()) };
        }),
        ("raw guest left as it is", || {
            let guest = RawGuest::new(HEALTHY);
            std::mem::forget(guest);
        }),
    ];
    for (name, body) in ends {
        println!("{name}");
        spawn(body).wait();
        assert_nothing_in_use();
    }
}

/// Kilobytes of a line of /proc/meminfo.
fn meminfo(name: &str) -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Kilobytes that are free but kept by a CPU for itself, which MemFree leaves out.
fn free_per_cpu() -> u64 {
    let text = fs::read_to_string("/proc/zoneinfo").unwrap();
    let pages = text.lines().filter_map(|line| line.trim().strip_prefix("count:"));
    pages.map(|count| 4 * count.trim().parse::<u64>().unwrap()).sum()
}

/// Enters `runs` times in as many processes, which leave Dune mode or end in it; fails the test where the kernel keeps
/// half a page per run, or 900 bytes of slab or vmalloc, each time that it is tried. What is lost is lost each time;
/// what others took meanwhile is not.
fn runs_leave_nothing(runs: usize, times: usize, leaves: bool) {
    let run = |count: usize| {
        for _ in 0..count {
            let child = spawn(|| {
                let dune = enter();
                let memory = vec![1u8; 128 << 10];
                assert_eq!(std::hint::black_box(&memory)[4096], 1);
                if leaves {
                    dune.leave();
                }
            });
            child.wait().assert_success();
        }
        assert_nothing_in_use();
    };
    let used = || {
        let free = meminfo("MemFree:") + free_per_cpu();
        [meminfo("MemTotal:") - free, meminfo("Slab:"), meminfo("VmallocUsed:")]
    };
    let allowed = [2048, 900, 900].map(|bytes_per_run| runs as u64 * bytes_per_run / 1024);
    // Caches fill up first.
    run(runs.min(50));
    for _ in 0..times {
        let before = used();
        run(runs);
        let after = used();
        println!(
            "kB of memory, slab, vmalloc: {before:?} before {runs} runs, {after:?} after, {allowed:?} more allowed"
        );
        if (0..allowed.len()).all(|kind| after[kind] < before[kind] + allowed[kind]) {
            return;
        }
    }
    panic!("more and more is in use");
}

fn no_leak_after_100_runs() {
    runs_leave_nothing(100, 3, true);
    runs_leave_nothing(100, 3, false);
}

fn no_leak_after_1000_runs() {
    runs_leave_nothing(500, 2, true);
    runs_leave_nothing(500, 2, false);
}

fn max_vcpus_is_obeyed() {
    let again = Reload::keep();
    remove().unwrap();
    insert("max_vcpus=3").unwrap();
    let device = crate::raw::Device::open().unwrap();
    assert_eq!(device.info().unwrap().max_vcpus, 3);
    for _ in 0..3 {
        device.create_vcpu().unwrap();
    }
    assert_eq!(device.create_vcpu().unwrap_err(), crate::raw::Errno(libc::ENOSPC));
    drop(device);
    drop(again);
}

/// What libdune says where the process has all its vCPUs; who was refused enters when another has left.
fn out_of_vcpus_is_told() {
    let again = Reload::keep();
    remove().unwrap();
    insert("max_vcpus=1").unwrap();
    spawn(|| {
        let (go, wait) = std::sync::mpsc::channel();
        let (tell, hear) = std::sync::mpsc::channel();
        let second = std::thread::spawn(move || {
            for () in wait {
                let entered = libdune::Dune::enter().map(libdune::Dune::leave);
                tell.send(entered.map_err(|error| error.to_string())).unwrap();
            }
        });
        let dune = enter();
        go.send(()).unwrap();
        let refused = hear.recv().unwrap();
        dune.leave();
        go.send(()).unwrap();
        assert_eq!(hear.recv().unwrap(), Ok(()));
        drop(go);
        second.join().unwrap();
        let text =
            "this process has all 1 Dune threads that it can have (module parameter max_vcpus; libdune has room for \
                    510): let one leave Dune mode";
        assert_eq!(refused, Err(text.to_string()));
    })
    .wait()
    .assert_success();
    drop(again);
}

/// Opening the device may wait for the opener's mmap_lock, long. Misc devices are opened one at a time on the whole
/// machine; ours is none, so that nobody waits with it.
fn opening_holds_up_nobody() {
    static BEGUN: AtomicBool = AtomicBool::new(false);
    static ENDED: AtomicBool = AtomicBool::new(false);
    let knob = Knob::set("open_delay_ms", 1000).unwrap();
    let slow = std::thread::spawn(|| {
        BEGUN.store(true, SeqCst);
        let device = crate::raw::Device::open();
        ENDED.store(true, SeqCst);
        device.map(drop)
    });
    while !BEGUN.load(SeqCst) {
        std::thread::yield_now();
    }
    std::thread::sleep(Duration::from_millis(50));
    // Whatever misc devices this kernel has.
    let mut opened = Vec::new();
    for path in ["/dev/loop-control", "/dev/userfaultfd", "/dev/cpu_dma_latency"] {
        if fs::File::open(path).is_ok() {
            opened.push(path);
        }
    }
    assert!(!ENDED.load(SeqCst), "{opened:?} were opened after the device only");
    assert!(!opened.is_empty(), "this kernel has no misc device to open");
    // It can be opened itself as well.
    drop(knob);
    drop(crate::raw::Device::open().unwrap());
    assert!(!ENDED.load(SeqCst), "one open of the device waited for another");
    slow.join().unwrap().unwrap();
}
