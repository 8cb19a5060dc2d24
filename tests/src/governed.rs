// SPDX-License-Identifier: MIT OR Apache-2.0

//! What Linux holds over any process, over one in Dune mode: io_uring, audit, limits, the freezer, namespaces, uprobes, perf.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::ptr;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Acquire;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::Ordering::Release;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;
use std::time::Instant;

use libdune::Dune;

use crate::framework::Need;
use crate::framework::Test;
use crate::framework::User;
use crate::raw::Device;
use crate::raw::RawGuest;
use crate::support::compute;
use crate::support::enter;
use crate::support::eventually;
use crate::support::perf_event;
use crate::support::rseq_area;
use crate::support::set_affinity;
use crate::support::spawn;
use crate::support::spawn_spinning;
use crate::support::Cgroup;
use crate::support::Shared;

pub const TESTS: &[Test] = &[
    Test::asserting("io_uring_reads_and_writes", io_uring_reads_and_writes),
    Test::asserting("io_uring_makes_no_requests", io_uring_makes_no_requests),
    Test::asserting(
        "io_uring_may_close_the_device_under_run",
        io_uring_may_close_the_device_under_run,
    ),
    Test::asserting(
        "io_uring_completes_under_a_spinning_guest",
        io_uring_completes_under_a_spinning_guest,
    ),
    Test::asserting("io_uring_is_polled_for_a_guest", io_uring_is_polled_for_a_guest),
    Test::asserting("no_new_privs_holds", no_new_privs_holds),
    Test::asserting("audit_records_each_call", audit_records_each_call)
        .run_as(User::Root)
        .timeout_s(40),
    Test::asserting("cpu_limit_is_obeyed", cpu_limit_is_obeyed).timeout_s(40),
    Test::asserting("cpu_clocks_count_the_guest", cpu_clocks_count_the_guest),
    Test::asserting("freezer_stops_a_spinning_guest", freezer_stops_a_spinning_guest)
        .run_as(User::Root)
        .needs(&[Need::Path("/sys/fs/cgroup/cgroup.controllers")]),
    Test::asserting("quota_throttles_a_spinning_guest", quota_throttles_a_spinning_guest)
        .run_as(User::Root)
        .needs(&[Need::Path("/sys/fs/cgroup/cgroup.controllers")]),
    Test::asserting("landlock_binds_dune_threads", landlock_binds_dune_threads),
    Test::asserting(
        "user_and_pid_namespaces_hold_dune_threads",
        user_and_pid_namespaces_hold_dune_threads,
    ),
    Test::asserting("dead_threads_and_owners_are_told", dead_threads_and_owners_are_told),
    Test::asserting("rseq_tells_the_cpu", rseq_tells_the_cpu).needs(&[Need::Cpus(2)]),
    Test::asserting("uprobe_is_hit_and_leaves_dune_mode", uprobe_is_hit_and_leaves_dune_mode)
        .run_as(User::Root)
        .needs(&[Need::Path("/sys/kernel/tracing/uprobe_events")]),
    Test::asserting("perf_samples_the_module", perf_samples_the_module).run_as(User::Root),
];

/// A ring as io_uring_setup(2) has it.
struct Ring {
    fd: i32,
    submissions: *mut u8,
    completions: *mut u8,
    entries: *mut [u64; 8],
    /// `struct io_uring_params`.
    parameters: [u32; 30],
}

impl Ring {
    const READ: u64 = 22;
    const WRITE: u64 = 23;

    fn new() -> Self {
        Self::with(0)
    }

    /// With these flags; a thread of Linux' that polls does so for a second.
    fn with(flags: u32) -> Self {
        let mut parameters = [0u32; 30];
        parameters[2] = flags;
        parameters[4] = 1000;
        // SAFETY: the structure of the call; maps of what it made.
        unsafe {
            let fd = libc::syscall(libc::SYS_io_uring_setup, 4, parameters.as_mut_ptr()) as i32;
            assert!(fd >= 0, "{}", io::Error::last_os_error());
            let map = |offset: i64| {
                let address = libc::mmap(
                    ptr::null_mut(),
                    4096,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_SHARED | libc::MAP_POPULATE,
                    fd,
                    offset,
                );
                assert_ne!(address, libc::MAP_FAILED);
                address
            };
            Self {
                fd,
                submissions: map(0).cast(),
                completions: map(0x800_0000).cast(),
                entries: map(0x1000_0000).cast(),
                parameters,
            }
        }
    }

    /// A word of the ring, whose offset is in this word of the parameters.
    fn word(&self, ring: *mut u8, parameter: usize) -> &AtomicU32 {
        // SAFETY: Linux' offsets, in the first page of the ring.
        unsafe { AtomicU32::from_ptr(ring.add(self.parameters[parameter] as usize).cast()) }
    }

    /// Puts one request in, without a system call.
    fn queue(&self, opcode: u64, fd: i32, buffer: *mut u8, bytes: u32) {
        self.queue_at(opcode, fd, u64::MAX, buffer, bytes);
    }

    fn queue_at(&self, opcode: u64, fd: i32, offset: u64, buffer: *mut u8, bytes: u32) {
        const SQ_TAIL: usize = 11;
        const SQ_MASK: usize = 12;
        const SQ_ARRAY: usize = 16;
        let tail = self.word(self.submissions, SQ_TAIL).load(Relaxed);
        let index = tail & self.word(self.submissions, SQ_MASK).load(Relaxed);
        let entry = [
            opcode | (fd as u64) << 32,
            offset,
            buffer as u64,
            bytes.into(),
            0x1234_5678,
            0,
            0,
            0,
        ];
        // SAFETY: an entry of the ring; Linux reads it behind the tail's store.
        unsafe {
            self.entries.add(index as usize).write_volatile(entry);
            let array = self.submissions.add(self.parameters[SQ_ARRAY] as usize).cast::<u32>();
            array.add(index as usize).write_volatile(index);
        }
        self.word(self.submissions, SQ_TAIL).store(tail + 1, Release);
    }

    /// Hands one request in; `wait` for so many answers.
    fn submit(&self, opcode: u64, fd: i32, buffer: *mut u8, bytes: u32, wait: u32) {
        const GETEVENTS: u32 = 1;
        self.queue(opcode, fd, buffer, bytes);
        let flags = if wait == 0 { 0 } else { GETEVENTS };
        // SAFETY: no memory is named but the ring's.
        let done = unsafe { libc::syscall(libc::SYS_io_uring_enter, self.fd, 1, wait, flags, 0, 0) };
        assert_eq!(done, 1, "{}", io::Error::last_os_error());
    }

    /// Gets the thread that polls out of its sleep, in which it begins.
    fn wake(&self) {
        const SQ_WAKEUP: u32 = 1 << 1;
        // SAFETY: no memory is named but the ring's.
        let done = unsafe { libc::syscall(libc::SYS_io_uring_enter, self.fd, 0, 0, SQ_WAKEUP, 0, 0) };
        assert!(done >= 0, "{}", io::Error::last_os_error());
    }

    /// The result of a request that is done, without a system call.
    fn take(&self) -> Option<i32> {
        const CQ_HEAD: usize = 20;
        const CQ_TAIL: usize = 21;
        const CQ_MASK: usize = 22;
        const CQ_CQES: usize = 25;
        let head = self.word(self.completions, CQ_HEAD);
        let at = head.load(Relaxed);
        if self.word(self.completions, CQ_TAIL).load(Acquire) == at {
            return None;
        }
        let index = at & self.word(self.completions, CQ_MASK).load(Relaxed);
        // SAFETY: an answer that Linux has written.
        let answer = unsafe {
            let answers = self
                .completions
                .add(self.parameters[CQ_CQES] as usize)
                .cast::<[u64; 2]>();
            answers.add(index as usize).read_volatile()
        };
        head.store(at + 1, Release);
        assert_eq!(answer[0], 0x1234_5678);
        Some(answer[1] as i32)
    }
}

fn pipe() -> [i32; 2] {
    let mut pipe = [0; 2];
    // SAFETY: two fds into an array of two.
    assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
    pipe
}

fn io_uring_reads_and_writes() {
    let dune = enter();
    let ring = Ring::new();
    let pipe = pipe();
    for round in 0..20u8 {
        let mut out = vec![round; 3000];
        let mut back = vec![0xffu8; 3000];
        ring.submit(Ring::WRITE, pipe[1], out.as_mut_ptr(), 3000, 1);
        assert_eq!(ring.take(), Some(3000));
        ring.submit(Ring::READ, pipe[0], back.as_mut_ptr(), 3000, 1);
        assert_eq!(ring.take(), Some(3000));
        assert_eq!(out, back);
    }
    ring.submit(Ring::READ, pipe[0], 16 as *mut u8, 8, 0);
    // SAFETY: one byte, for the read to an address that nobody has.
    assert_eq!(unsafe { libc::write(pipe[1], c"x".as_ptr().cast(), 1) }, 1);
    let start = Instant::now();
    let mut answer = None;
    while answer.is_none() && start.elapsed() < Duration::from_secs(5) {
        answer = ring.take();
    }
    assert_eq!(answer, Some(-libc::EFAULT));
    assert!(Dune::is_active());
    dune.leave();
}

/// A read of the device stands for a request of the thread that calls. io_uring would make it in the middle of another request
/// of that thread, even of the RUN of the vCPU that it destroys, or in a worker of its own.
fn io_uring_makes_no_requests() {
    const ASYNC: u64 = 1 << 4 << 8;
    let device = Device::open().unwrap();
    let create = device.create_vcpu().unwrap();
    let ring = Ring::new();
    let mut info = dune_abi::Info {
        size: size_of::<dune_abi::Info>() as u32,
        ..Default::default()
    };
    let destroy = dune_abi::read_size(dune_abi::DUNE_DESTROY_VCPU) as u32;
    let ask = dune_abi::read_size(dune_abi::DUNE_GET_INFO) as u32;
    for flags in [0, ASYNC] {
        let number = create.vcpu as usize as *mut u8;
        ring.submit(Ring::READ | flags, device.fd, number, destroy, 1);
        assert_eq!(ring.take(), Some(-libc::EINVAL), "flags {flags:#x}");
        ring.submit(Ring::READ | flags, device.fd, (&raw mut info).cast(), ask, 1);
        assert_eq!(ring.take(), Some(-libc::EINVAL), "flags {flags:#x}");
    }
    assert_eq!(info.abi_version, 0);
    // SAFETY: The buffers are what the requests want, or numbers that are no addresses.
    unsafe {
        let number = create.vcpu as usize as *mut libc::c_void;
        // Two pieces are not one argument, and splice reads into the kernel.
        let piece = |bytes| libc::iovec {
            iov_base: number,
            iov_len: bytes,
        };
        let refused = |answer: isize| (answer, io::Error::last_os_error().raw_os_error());
        let nobody = (-1, Some(libc::EINVAL));
        let pieces = [piece(destroy as usize - 1), piece(1)];
        assert_eq!(refused(libc::readv(device.fd, pieces.as_ptr(), 2)), nobody);
        let pipe = pipe();
        let (from, to) = (ptr::null_mut(), ptr::null_mut());
        let spliced = libc::splice(device.fd, from, pipe[1], to, destroy as usize, 0);
        assert_eq!(refused(spliced), nobody);
        // read(2) does, and what is the same.
        assert_eq!(libc::read(device.fd, (&raw mut info).cast(), ask as usize), 0);
        assert_ne!(info.abi_version, 0);
        let destroyed = libc::readv(device.fd, &piece(destroy as usize), 1);
        assert_eq!(destroyed, 0, "the vCPU is gone");
    }
}

/// Work of Linux' that comes while RUN runs closes the device's file, of which the ioctl only has a borrowed reference: RUN ends
/// as if it had been closed behind it. (Mostly a signal's way, which ends RUN before; that RUN itself does it takes luck.)
fn io_uring_may_close_the_device_under_run() {
    const CLOSE: u64 = 19;
    const TIMEOUT: u64 = 11;
    /// The next request begins when this one is over, however it ends.
    const HARDLINK: u64 = 1 << 3 << 8;
    extern "C" fn ignore(_: i32) {}
    let pause = [0i64, 3_000_000];
    // SAFETY: The handler does nothing, but for RUN's EINTR.
    unsafe { libc::signal(libc::SIGALRM, ignore as extern "C" fn(i32) as libc::sighandler_t) };
    let end = libc::itimerval {
        it_interval: libc::timeval { tv_sec: 0, tv_usec: 0 },
        it_value: libc::timeval {
            tv_sec: 0,
            tv_usec: 30_000,
        },
    };
    for round in 0..20 {
        // jmp $
        let mut guest = RawGuest::new(&[0xeb, 0xfe]);
        // The emulator masks interrupts for a guest that does.
        guest.edit(|page| page.rflags |= 0x200);
        guest.forget_run_page();
        let ring = Ring::new();
        ring.queue(TIMEOUT | HARDLINK, 0, pause.as_ptr().cast_mut().cast(), 1);
        ring.queue_at(CLOSE, guest.device.fd, 0, ptr::null_mut(), 0);
        // SAFETY: no memory is named but the ring's and the pause.
        let done = unsafe { libc::syscall(libc::SYS_io_uring_enter, ring.fd, 2, 0, 0, 0, 0) };
        assert_eq!(done, 2, "{}", io::Error::last_os_error());
        // SAFETY: Reads the timer.
        unsafe { libc::setitimer(libc::ITIMER_REAL, &end, ptr::null_mut()) };
        let start = Instant::now();
        let ended = loop {
            match guest.device.run(guest.vcpu) {
                Err(errno) if errno.0 == libc::EINTR => {}
                Err(errno) => break errno.0,
                Ok(_) => {}
            }
            assert!(start.elapsed() < Duration::from_secs(5), "round {round}: it still runs");
        };
        assert_eq!(ended, libc::EBADF, "round {round}");
    }
}

/// The answer to a request that waited is written by the thread itself (task work): Linux has to get a guest that makes no
/// system call out of its loop.
fn io_uring_completes_under_a_spinning_guest() {
    let pipe = pipe();
    let shared = Shared::new();
    let child = spawn(|| {
        let dune = enter();
        let ring = Ring::new();
        for round in 0..5u64 {
            let mut buffer = [0u8; 8];
            ring.submit(Ring::READ, pipe[0], buffer.as_mut_ptr(), 8, 0);
            assert_eq!(ring.take(), None);
            shared.word(0).store(round + 1, SeqCst);
            let calls = dune.counters().exits[crate::support::EXIT_VMCALL];
            let start = Instant::now();
            let answer = loop {
                if let Some(answer) = ring.take() {
                    break answer;
                }
                assert!(
                    start.elapsed() < Duration::from_secs(5),
                    "no answer while the guest spins"
                );
            };
            assert_eq!(
                dune.counters().exits[crate::support::EXIT_VMCALL],
                calls,
                "it did make a call"
            );
            assert_eq!((answer, buffer), (8, (round + 1).to_le_bytes()));
        }
        assert!(Dune::is_active());
    });
    for round in 1..=5u64 {
        if !eventually(|| shared.word(0).load(SeqCst) == round) {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
        // SAFETY: eight bytes.
        unsafe { libc::write(pipe[1], (&raw const round).cast(), 8) };
    }
    child.wait().assert_success();
}

/// Linux' own thread takes the requests and reads and writes the process' memory: the guest makes no system call at all.
fn io_uring_is_polled_for_a_guest() {
    const SQPOLL: u32 = 1 << 1;
    let dune = enter();
    let ring = Ring::with(SQPOLL);
    let pipe = pipe();
    let answer = || {
        let start = Instant::now();
        loop {
            if let Some(answer) = ring.take() {
                return answer;
            }
            assert!(start.elapsed() < Duration::from_secs(5), "no answer");
        }
    };
    let mut pages = vec![0u8; 1 << 20];
    let mut first = [0u8; 8];
    ring.queue(Ring::WRITE, pipe[1], first.as_mut_ptr(), 8);
    ring.wake();
    assert_eq!(answer(), 8);
    ring.queue(Ring::READ, pipe[0], first.as_mut_ptr(), 8);
    assert_eq!(answer(), 8);
    let calls = || dune.counters().exits[crate::support::EXIT_VMCALL];
    let before = calls();
    for round in 0..16usize {
        // Pages that nobody has touched yet.
        let buffer = pages[round << 16..].as_mut_ptr();
        let mut text = *b"polled 0";
        text[7] += round as u8;
        ring.queue(Ring::WRITE, pipe[1], text.as_mut_ptr(), 8);
        assert_eq!(answer(), 8);
        ring.queue(Ring::READ, pipe[0], buffer, 8);
        assert_eq!(answer(), 8);
        assert_eq!(pages[round << 16..][..8], text);
    }
    assert_eq!(calls(), before);
    dune.leave();
}

fn no_new_privs_holds() {
    fn told() -> bool {
        let status = fs::read_to_string("/proc/thread-self/status").unwrap();
        status.contains("NoNewPrivs:\t1")
    }
    spawn(|| {
        let _dune = enter();
        assert!(!told());
        // SAFETY: no memory is named.
        assert_eq!(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, 0);
        assert!(told());
        assert!(Dune::is_active());
        std::thread::spawn(|| assert!(told() && Dune::is_active()))
            .join()
            .unwrap();
        spawn(|| assert!(told() && Dune::is_active())).wait().assert_success();
        let output = Command::new("grep")
            .args(["NoNewPrivs", "/proc/self/status"])
            .output()
            .unwrap();
        assert_eq!(output.stdout, b"NoNewPrivs:\t1\n");
    })
    .wait()
    .assert_success();
}

/// The kernel's audit, with this process as its daemon.
struct Audit(i32);

impl Audit {
    const SET: u16 = 1001;
    const ADD_RULE: u16 = 1011;
    const DELETE_RULE: u16 = 1012;
    const SYSCALL_RECORD: u16 = 1300;

    fn new() -> Self {
        const NETLINK_AUDIT: i32 = 9;
        // SAFETY: a new socket; a plain structure.
        unsafe {
            let socket = libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, NETLINK_AUDIT);
            assert!(socket >= 0, "{}", io::Error::last_os_error());
            let patience = libc::timeval {
                tv_sec: 0,
                tv_usec: 300_000,
            };
            libc::setsockopt(
                socket,
                libc::SOL_SOCKET,
                libc::SO_RCVTIMEO,
                (&raw const patience).cast(),
                size_of_val(&patience) as u32,
            );
            let bytes = 1 << 20;
            libc::setsockopt(
                socket,
                libc::SOL_SOCKET,
                libc::SO_RCVBUFFORCE,
                (&raw const bytes).cast(),
                4,
            );
            Self(socket)
        }
    }

    fn send(&self, kind: u16, body: &[u32]) {
        const REQUEST: u32 = 1;
        let bytes = 16 + body.len() as u32 * 4;
        let mut message = vec![bytes, u32::from(kind) | REQUEST << 16, 1, 0];
        message.extend(body);
        // SAFETY: the message's own bytes.
        let sent = unsafe { libc::send(self.0, message.as_ptr().cast(), bytes as usize, 0) };
        assert_eq!(sent, bytes as isize, "{}", io::Error::last_os_error());
    }

    /// On with us as the daemon, or off.
    fn switch(&self, on: bool) {
        const ENABLED: u32 = 1;
        const PID: u32 = 4;
        let pid = if on { std::process::id() } else { 0 };
        self.send(Self::SET, &[ENABLED | PID, on.into(), 0, pid, 0, 0, 0, 0, 0, 0, 0]);
    }

    /// Each call `number` of the process `pid` makes a record, or does no more.
    fn rule(&self, kind: u16, number: usize, pid: u32) {
        const FILTER_EXIT: u32 = 4;
        const ALWAYS: u32 = 2;
        const PID: u32 = 0;
        const EQUAL: u32 = 0x4000_0000;
        // flags, action, count of fields, mask of calls, fields, values, operators, bytes of strings.
        let mut rule = [0u32; 3 + 64 * 4 + 1];
        rule[0] = FILTER_EXIT;
        rule[1] = ALWAYS;
        rule[2] = 1;
        rule[3 + number / 32] = 1 << (number % 32);
        rule[3 + 64] = PID;
        rule[3 + 128] = pid;
        rule[3 + 192] = EQUAL;
        self.send(kind, &rule);
    }

    /// The next message, its type and text.
    fn receive(&self) -> Option<(u16, String)> {
        let mut buffer = [0u8; 9000];
        // SAFETY: the buffer's own bytes.
        let bytes = unsafe { libc::recv(self.0, buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        let text = buffer.get(16..usize::try_from(bytes).ok()?)?;
        let kind = u16::from_ne_bytes([buffer[4], buffer[5]]);
        Some((kind, String::from_utf8_lossy(text).into_owned()))
    }
}

impl Drop for Audit {
    fn drop(&mut self) {
        self.switch(false);
        // SAFETY: our own.
        unsafe { libc::close(self.0) };
    }
}

/// A rule counts the calls of a Dune thread as it counts those of any.
fn audit_records_each_call() {
    const CALLS: usize = 10;
    let audit = Audit::new();
    audit.switch(true);
    let shared = Shared::new();
    for in_dune_mode in [false, true] {
        shared.word(0).store(0, SeqCst);
        // Made when audit is on already: a task gets what it needs for it at its birth.
        let child = spawn(|| {
            let dune = in_dune_mode.then(enter);
            assert!(eventually(|| shared.word(0).load(SeqCst) == 1));
            for _ in 0..CALLS {
                // SAFETY: a call without arguments.
                unsafe { libc::syscall(libc::SYS_getppid) };
            }
            assert_eq!(Dune::is_active(), in_dune_mode);
            drop(dune);
        });
        let pid = child.pid as u32;
        audit.rule(Audit::ADD_RULE, libc::SYS_getppid as usize, pid);
        std::thread::sleep(Duration::from_millis(50));
        shared.word(0).store(1, SeqCst);
        child.wait().assert_success();
        let mut records = 0;
        while let Some((kind, text)) = audit.receive() {
            let is_ours = kind == Audit::SYSCALL_RECORD && text.contains(&format!(" pid={pid} "));
            records += usize::from(is_ours && text.contains(" syscall=110 "));
        }
        assert_eq!(records, CALLS, "in Dune mode: {in_dune_mode}");
        audit.rule(Audit::DELETE_RULE, libc::SYS_getppid as usize, pid);
    }
}

static WARNINGS: AtomicU64 = AtomicU64::new(0);

fn cpu_limit_is_obeyed() {
    extern "C" fn warned(_: i32) {
        if Dune::is_active() {
            WARNINGS.fetch_add(1, SeqCst);
        }
    }
    let shared = Shared::new();
    let ended = spawn(|| {
        let _dune = enter();
        let limit = libc::rlimit {
            rlim_cur: 1,
            rlim_max: 2,
        };
        // SAFETY: a plain structure; a handler that only counts.
        unsafe {
            libc::signal(libc::SIGXCPU, warned as *const () as libc::sighandler_t);
            assert_eq!(libc::setrlimit(libc::RLIMIT_CPU, &limit), 0);
        }
        loop {
            shared.word(0).store(WARNINGS.load(Relaxed), Relaxed);
            std::hint::spin_loop();
        }
    })
    .wait();
    assert_eq!(ended.signal(), Some(libc::SIGKILL), "{ended:?}");
    assert!(shared.word(0).load(SeqCst) >= 1, "no SIGXCPU came in Dune mode");
}

/// The clocks of thread and process, and what wait4 says afterwards.
fn cpu_clocks_count_the_guest() {
    fn clock(which: libc::clockid_t) -> Duration {
        // SAFETY: a structure that the call fills in.
        unsafe {
            let mut time: libc::timespec = std::mem::zeroed();
            assert_eq!(libc::clock_gettime(which, &mut time), 0);
            Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
        }
    }
    let child = spawn(|| {
        let dune = enter();
        for which in [libc::CLOCK_THREAD_CPUTIME_ID, libc::CLOCK_PROCESS_CPUTIME_ID] {
            let (start, before) = (Instant::now(), clock(which));
            while start.elapsed() < Duration::from_millis(300) {
                std::hint::black_box(compute(1000));
            }
            let (elapsed, counted) = (start.elapsed(), clock(which) - before);
            assert!(
                counted <= elapsed + Duration::from_millis(10),
                "{counted:?} of {elapsed:?}"
            );
            assert!(counted >= elapsed / 2, "{counted:?} of {elapsed:?}");
        }
        dune.leave();
    });
    let pid = child.pid;
    // SAFETY: structures that the calls fill in; the child is ours and reaped by `wait` only.
    let usage = unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let mut usage: libc::rusage = std::mem::zeroed();
        let result = libc::syscall(
            libc::SYS_waitid,
            libc::P_PID,
            pid,
            &raw mut info,
            libc::WEXITED | libc::WNOWAIT,
            &raw mut usage,
        );
        assert_eq!(result, 0);
        usage
    };
    child.wait().assert_success();
    let user = usage.ru_utime.tv_sec * 1_000_000 + usage.ru_utime.tv_usec;
    assert!(user > 300_000, "{user} µs of user time for 600 ms of computing");
}

fn freezer_stops_a_spinning_guest() {
    let shared = Shared::new();
    frozen_and_thawed(&shared);
    killed_while_frozen(&shared);
}

/// The group goes with its only child: nothing is left in it.
fn frozen_and_thawed(shared: &Shared) {
    let cgroup = Cgroup::new("pids", "freezer");
    let is_frozen = || cgroup.stat("cgroup.events", "frozen") == 1;
    let child = spawn(|| {
        cgroup.write("cgroup.procs", "0");
        let dune = enter();
        // A thread that waits in a forwarded call is frozen, too.
        let _waits = std::thread::spawn(|| std::thread::sleep(Duration::from_secs(100)));
        while shared.word(1).load(SeqCst) == 0 {
            shared.word(0).fetch_add(1, SeqCst);
        }
        assert!(Dune::is_active());
        dune.leave();
    });
    let count = || shared.word(0).load(SeqCst);
    assert!(eventually(|| count() > 1000));
    for _ in 0..3 {
        cgroup.write("cgroup.freeze", "1");
        assert!(eventually(is_frozen), "it does not freeze");
        let stopped = count();
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(count(), stopped, "it runs although it is frozen");
        cgroup.write("cgroup.freeze", "0");
        assert!(eventually(|| count() > stopped), "it does not go on");
        assert!(!is_frozen());
    }
    shared.word(1).store(1, SeqCst);
    child.wait().assert_success();
}

fn killed_while_frozen(shared: &Shared) {
    let cgroup = Cgroup::new("pids", "freezer");
    let is_frozen = || cgroup.stat("cgroup.events", "frozen") == 1;
    let child = spawn(|| {
        cgroup.write("cgroup.procs", "0");
        let _dune = enter();
        shared.word(2).store(1, SeqCst);
        loop {
            std::hint::spin_loop();
        }
    });
    assert!(eventually(|| shared.word(2).load(SeqCst) == 1));
    cgroup.write("cgroup.freeze", "1");
    assert!(eventually(is_frozen));
    cgroup.write("cgroup.kill", "1");
    assert_eq!(child.wait().signal(), Some(libc::SIGKILL));
}

/// What a group may use of a CPU binds a guest that never leaves by itself.
fn quota_throttles_a_spinning_guest() {
    const WALL: Duration = Duration::from_millis(600);
    let cgroup = Cgroup::new("cpu", "quota");
    // A fifth of a CPU, in periods that Linux' tick can tell.
    cgroup.write("cpu.max", "20000 100000");
    let shared = Shared::new();
    let child = spawn_spinning(&shared);
    let used = || cgroup.stat("cpu.stat", "usage_usec");
    cgroup.write("cgroup.procs", &child.pid.to_string());
    let (start, before) = (Instant::now(), used());
    std::thread::sleep(WALL);
    let (used, wall) = (used() - before, start.elapsed().as_micros() as u64);
    let throttled = cgroup.stat("cpu.stat", "nr_throttled");
    println!("report: {used} of {wall} µs of a CPU, where a fifth is allowed; throttled in {throttled} periods");
    assert!(throttled >= 3, "throttled {throttled} times");
    assert!(used > wall / 20, "{used} of {wall} µs");
    assert!(used < wall * 2 / 5, "{used} of {wall} µs");
    // Killed while it waits for its next period.
    child.kill(libc::SIGKILL);
    assert_eq!(child.wait().signal(), Some(libc::SIGKILL));
}

/// The rules that a Dune thread lays on itself bind it, its threads, its children and their programs.
fn landlock_binds_dune_threads() {
    const CREATE_RULESET: i64 = 444;
    const ADD_RULE: i64 = 445;
    const RESTRICT_SELF: i64 = 446;
    const PATH_BENEATH: u64 = 1;
    const WRITE_FILE: u64 = 1 << 1;
    const MAKE_REG: u64 = 1 << 8;
    let directory = std::env::temp_dir().join(format!("dune-landlock-{}", std::process::id()));
    let (inside, outside) = (directory.join("inside"), directory.join("outside"));
    fs::create_dir_all(&inside).unwrap();
    fs::create_dir_all(&outside).unwrap();
    let holds = || {
        fs::write(inside.join("file"), "words").unwrap();
        let error = fs::write(outside.join("file"), "words").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EACCES));
    };
    spawn(|| {
        let dune = enter();
        fs::write(outside.join("before"), "words").unwrap();
        /// `struct landlock_path_beneath_attr`.
        #[repr(C, packed)]
        struct PathBeneath {
            allowed: u64,
            parent: i32,
        }
        let handled = WRITE_FILE | MAKE_REG;
        let parent = fs::File::open(&inside).unwrap();
        let rule = PathBeneath {
            allowed: handled,
            parent: parent.as_raw_fd(),
        };
        // SAFETY: The structures of the calls.
        unsafe {
            let rules = libc::syscall(CREATE_RULESET, &raw const handled, 8, 0) as i32;
            assert!(rules >= 0, "{}", io::Error::last_os_error());
            assert_eq!(libc::syscall(ADD_RULE, rules, PATH_BENEATH, &raw const rule, 0), 0);
            assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
            assert_eq!(libc::syscall(RESTRICT_SELF, rules, 0), 0);
        }
        assert!(Dune::is_active());
        holds();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert!(Dune::is_active());
                holds();
            });
        });
        spawn(|| {
            assert!(Dune::is_active());
            holds();
        })
        .wait()
        .assert_success();
        let touch = |path: &std::path::Path| Command::new("touch").arg(path).status().unwrap().success();
        assert!(touch(&inside.join("program")));
        assert!(!touch(&outside.join("program")));
        dune.leave();
        holds();
    })
    .wait()
    .assert_success();
    fs::remove_dir_all(&directory).unwrap();
}

fn user_and_pid_namespaces_hold_dune_threads() {
    for before_entering in [true, false] {
        spawn(|| {
            let unshare = || {
                // SAFETY: no memory is named; this process has one thread.
                let result = unsafe { libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWPID) };
                assert_eq!(result, 0, "{}", io::Error::last_os_error());
            };
            let mut outer = None;
            if before_entering {
                unshare();
            } else {
                outer = Some(enter());
                unshare();
            }
            let inner = || {
                let own = outer.is_none().then(enter);
                assert!(Dune::is_active());
                assert_eq!(std::process::id(), 1);
                // SAFETY: calls without arguments.
                unsafe { assert_eq!((libc::getppid(), libc::syscall(libc::SYS_gettid)), (0, 1)) };
                std::thread::spawn(|| {
                    assert!(Dune::is_active());
                    // SAFETY: calls without arguments.
                    let tid = unsafe { libc::syscall(libc::SYS_gettid) };
                    assert_eq!((std::process::id(), tid), (1, 2));
                })
                .join()
                .unwrap();
                spawn(|| {
                    assert!(Dune::is_active());
                    // SAFETY: calls without arguments.
                    unsafe { assert_eq!((libc::getpid(), libc::getppid()), (3, 1)) };
                })
                .wait()
                .assert_success();
                // The namespace's own root: mapped to nobody here.
                // SAFETY: a call without arguments.
                assert_eq!(unsafe { libc::getuid() }, 65534);
                // abort() by the number that the thread has in here.
                let ended = spawn(|| std::process::abort()).wait();
                assert_eq!(ended.signal(), Some(libc::SIGABRT), "{ended:?}");
                drop(own);
            };
            spawn(inner).wait().assert_success();
        })
        .wait()
        .assert_success();
    }
}

fn dead_threads_and_owners_are_told() {
    let shared = Shared::new();
    let mutex = shared.word(8).as_ptr().cast::<libc::pthread_mutex_t>();
    // SAFETY: room for a mutex in the shared page; used by pthread only.
    unsafe {
        let mut attributes: libc::pthread_mutexattr_t = std::mem::zeroed();
        libc::pthread_mutexattr_init(&mut attributes);
        libc::pthread_mutexattr_setpshared(&mut attributes, libc::PTHREAD_PROCESS_SHARED);
        libc::pthread_mutexattr_setrobust(&mut attributes, libc::PTHREAD_MUTEX_ROBUST);
        assert_eq!(libc::pthread_mutex_init(mutex, &attributes), 0);
    }
    let mutex = mutex as usize;
    // SAFETY: as above.
    let lock = move || unsafe { libc::pthread_mutex_lock(mutex as *mut libc::pthread_mutex_t) };
    // SAFETY: as above; called by who has it.
    let mend = move || unsafe {
        assert_eq!(libc::pthread_mutex_consistent(mutex as *mut libc::pthread_mutex_t), 0);
        assert_eq!(libc::pthread_mutex_unlock(mutex as *mut libc::pthread_mutex_t), 0);
    };
    spawn(|| {
        let dune = enter();
        // The owner is a thread that ends, in and out of Dune mode.
        for _ in 0..3 {
            std::thread::spawn(move || assert_eq!(lock(), 0)).join().unwrap();
            assert_eq!(lock(), libc::EOWNERDEAD);
            mend();
        }
        // A child that is killed in its loop, and one that executes another program.
        for kill in [true, false] {
            shared.word(0).store(0, SeqCst);
            let child = spawn(|| {
                assert!(Dune::is_active());
                assert_eq!(lock(), 0);
                shared.word(0).store(1, SeqCst);
                if !kill {
                    let arguments = [c"true".as_ptr(), ptr::null()];
                    // SAFETY: a list that ends.
                    unsafe { libc::execv(c"/bin/true".as_ptr(), arguments.as_ptr()) };
                }
                loop {
                    std::hint::spin_loop();
                }
            });
            assert!(eventually(|| shared.word(0).load(SeqCst) == 1));
            if kill {
                child.kill(libc::SIGKILL);
            }
            assert_eq!(lock(), libc::EOWNERDEAD);
            mend();
            child.wait();
        }
        // Linux clears the word that set_tid_address names when the thread ends; glibc never learns of that end.
        shared.word(1).store(u64::MAX, SeqCst);
        std::mem::forget(std::thread::spawn({
            let word = shared.word(1).as_ptr() as usize;
            // SAFETY: a word of ours.
            move || unsafe {
                assert!(Dune::is_active());
                let tid = libc::syscall(libc::SYS_gettid);
                assert_eq!(libc::syscall(libc::SYS_set_tid_address, word), tid);
            }
        }));
        assert!(eventually(|| shared.word(1).load(SeqCst) == u64::MAX << 32));
        assert!(Dune::is_active());
        dune.leave();
        // SAFETY: nothing of this process is wanted any more.
        unsafe { libc::_exit(0) };
    })
    .wait()
    .assert_success();
}

/// The number of the CPU in struct rseq follows a guest that is moved while it makes no call.
fn rseq_tells_the_cpu() {
    let dune = enter();
    // SAFETY: struct rseq begins with two numbers of the CPU.
    let cpu_id = unsafe { &*(rseq_area() as *const [AtomicU32; 2]) };
    let cpu_id = &cpu_id[1];
    // SAFETY: calls without arguments.
    let tid = unsafe { libc::syscall(libc::SYS_gettid) } as i32;
    let shared = Shared::new();
    let mover = spawn(|| {
        for round in 0..40u64 {
            set_affinity(tid, (round % 2) as usize);
            shared.word(0).store(round + 1, SeqCst);
            assert!(eventually(|| shared.word(1).load(SeqCst) == round + 1), "round {round}");
        }
    });
    for round in 0..40u64 {
        while shared.word(0).load(SeqCst) != round + 1 {
            std::hint::spin_loop();
        }
        let calls = dune.counters().exits[crate::support::EXIT_VMCALL];
        let start = Instant::now();
        while u64::from(cpu_id.load(Relaxed)) != round % 2 {
            assert!(
                start.elapsed() < Duration::from_millis(900),
                "still {cpu_id:?} in round {round}"
            );
        }
        assert_eq!(dune.counters().exits[crate::support::EXIT_VMCALL], calls);
        shared.word(1).store(round + 1, SeqCst);
    }
    mover.wait().assert_success();
    dune.leave();
}

#[inline(never)]
extern "C" fn probed(value: u64) -> u64 {
    std::hint::black_box(value).wrapping_mul(3)
}

/// The file offset of one of this program's functions.
fn file_offset(address: u64) -> u64 {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines()
        .find_map(|line| {
            let mut words = line.split_whitespace();
            let (start, end) = words.next()?.split_once('-')?;
            let hex = |text: &str| u64::from_str_radix(text, 16).unwrap();
            let offset = hex(words.nth(1)?);
            (hex(start)..hex(end))
                .contains(&address)
                .then(|| address - hex(start) + offset)
        })
        .unwrap()
}

/// A uprobe's int3 is no exception of the program's: the thread leaves Dune mode, and Linux does what it does.
fn uprobe_is_hit_and_leaves_dune_mode() {
    const EVENTS: &str = "/sys/kernel/tracing/uprobe_events";
    struct Event;
    impl Drop for Event {
        fn drop(&mut self) {
            let _ = fs::write("/sys/kernel/tracing/events/dune/probed/enable", "0");
            let _ = fs::write(EVENTS, "-:dune/probed\n");
        }
    }
    let hits = || {
        let profile = fs::read_to_string("/sys/kernel/tracing/uprobe_profile").unwrap();
        let line = profile.lines().find(|line| line.contains("probed")).unwrap_or_default();
        line.split_whitespace().last().and_then(|word| word.parse::<u64>().ok())
    };
    let program = std::env::current_exe().unwrap();
    let dune = enter();
    assert_eq!(probed(5), 15);
    let offset = file_offset(probed as *const () as u64);
    fs::write(EVENTS, format!("p:dune/probed {}:{offset:#x}\n", program.display())).unwrap();
    let event = Event;
    fs::write("/sys/kernel/tracing/events/dune/probed/enable", "1").unwrap();
    assert!(Dune::is_active());
    for value in 0..5 {
        assert_eq!(probed(value), 3 * value);
        assert!(!Dune::is_active());
    }
    assert_eq!(hits(), Some(5));
    drop(event);
    dune.leave();
    // Without it all is as before.
    let dune = enter();
    assert_eq!(probed(6), 18);
    assert!(Dune::is_active());
    dune.leave();
}

/// Samples of a thread by its CPU clock: while the guest runs they show the module's exit, never the guest's RIP.
fn perf_samples_the_module() {
    const SOFTWARE: u64 = 1;
    const SAMPLE_IP: u64 = 1;
    const DATA_HEAD: usize = 1024;
    const SAMPLE: u32 = 9;
    const PAGES: usize = 9;
    let samples = |flags: u64| -> (usize, usize) {
        let event = perf_event(SOFTWARE, [0, 1_000_000, SAMPLE_IP, 0, flags, 0, 0]);
        let fd = event.as_raw_fd();
        // SAFETY: a map of what the call made; records that Linux has written.
        unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let ring = libc::mmap(ptr::null_mut(), PAGES * 4096, protection, libc::MAP_SHARED, fd, 0);
            assert_ne!(ring, libc::MAP_FAILED, "{}", io::Error::last_os_error());
            let start = Instant::now();
            while start.elapsed() < Duration::from_millis(200) {
                std::hint::black_box(compute(1000));
            }
            drop(event);
            let ring = ring.cast::<u8>();
            let head = ring.add(DATA_HEAD).cast::<u64>().read_volatile() as usize;
            let (mut kernel, mut user, mut at) = (0, 0, 0);
            while at < head.min((PAGES - 1) * 4096 - 16) {
                let record = ring.add(4096 + at).cast::<u64>();
                let header = record.read_volatile();
                if header as u32 == SAMPLE {
                    let ip = record.add(1).read_volatile();
                    *(if ip >> 63 != 0 { &mut kernel } else { &mut user }) += 1;
                }
                at += (header >> 48) as usize;
            }
            libc::munmap(ring.cast(), PAGES * 4096);
            (kernel, user)
        }
    };
    const EXCLUDE_KERNEL: u64 = 1 << 5;
    let native = samples(EXCLUDE_KERNEL);
    let dune = enter();
    let all = samples(0);
    let user_only = samples(EXCLUDE_KERNEL);
    assert!(Dune::is_active());
    dune.leave();
    println!(
        "report: (kernel, user) samples: natively {native:?}, in Dune mode {all:?}, of user space only {user_only:?}"
    );
    assert!(native.1 > 20, "{native:?}");
    assert!(all.0 > 20, "{all:?}");
    assert!(
        all.1 * 10 < all.0 && user_only.1 * 10 < native.1,
        "{all:?} {user_only:?}"
    );
}
