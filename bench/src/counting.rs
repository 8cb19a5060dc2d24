// SPDX-License-Identifier: MIT OR Apache-2.0

//! VM exits and heavy operations of an operation, also those that another thread, a child or a program does for it.
//!
//! The module that counts (`DUNE_COUNT_OPS=y`) has one array for the machine, and gives what is in it to the vCPU that
//! exits next. So what an operation leaves behind its last exit, the end of a child, say, is the next one's. Here each
//! operation ends with one exit more, a getpid, and what a getpid by itself does is taken off again. Who ends meanwhile
//! tells what its vCPU counted up to its last call, and as much as a getpid does for that. Reading a counter of a new vCPU
//! adds an EPT violation or two, the first uses of its pages.
//!
//! All this is done only where heavy operations are counted: a run that times does nothing of it.

use core::ptr::NonNull;
use std::fs;
use std::io::Read;
use std::io::Write;
use std::os::fd::FromRawFd;
use std::time::Duration;

use libdune::abi;
use libdune::abi::Counters;
use libdune::abi::CAP_COUNT_OPS;
use libdune::abi::HEAVY_KINDS;
use libdune::Dune;
use libdune::Thread;

/// Figures of an operation: exits, interrupts among them, heavy operations by kind.
pub const COLUMNS: usize = 2 + HEAVY_KINDS;

/// What an operation did, by column.
pub type Done = [u64; COLUMNS];

pub const NOTHING: Done = [0; COLUMNS];

/// Times that something is done by itself to be taken off.
const TIMES: usize = 9;

/// Whether the module counts heavy operations.
pub fn is_on(dune: &Dune) -> bool {
    dune.info().capabilities & CAP_COUNT_OPS != 0
}

/// What a vCPU did since it was made.
pub fn all(counters: &Counters) -> Done {
    /// Basic exit reason (SDM vol. 3, appendix C).
    const EXTERNAL_INTERRUPT: usize = 1;
    core::array::from_fn(|column| match column {
        0 => counters.exits.iter().sum(),
        1 => counters.exits[EXTERNAL_INTERRUPT],
        _ => counters.heavy[column - 2],
    })
}

/// What is more in the second.
pub fn more(before: &Done, after: &Done) -> Done {
    core::array::from_fn(|column| after[column].saturating_sub(before[column]))
}

pub fn sum(one: &Done, other: &Done) -> Done {
    core::array::from_fn(|column| one[column] + other[column])
}

/// The least of each column: a tick of the clock adds to most, and so does a call that goes back by RUN instead of the shortcut.
/// What an operation does each time is in all of them.
pub fn least(done: &[Done]) -> Done {
    core::array::from_fn(|column| done.iter().map(|done| done[column]).min().unwrap_or(0))
}

/// One exit that the module takes what it counted at.
pub fn exit_once() {
    // SAFETY: Has no effect.
    unsafe { libc::syscall(libc::SYS_getpid) };
}

/// What [`exit_once`] by itself does, without what interrupts and the first use of a page add: the least of many times, of
/// which the first do not count.
pub fn own_share(dune: &Dune) -> Done {
    let mut least = [u64::MAX; COLUMNS];
    for time in 0..2 * TIMES {
        let before = all(&dune.counters());
        exit_once();
        let share = more(&before, &all(&dune.counters()));
        if time >= TIMES {
            least = core::array::from_fn(|column| least[column].min(share[column]));
        }
    }
    least
}

/// What a vCPU does in its whole life, where all that it does from here on is to end by one call more: that costs as much as a
/// getpid up to its exit. What it does here besides is not in it.
pub fn to_the_end(dune: &Dune) -> Done {
    let up_to_here = all(&dune.counters());
    sum(&up_to_here, &own_share(dune))
}

/// Memory that children share, for what they tell.
pub struct Told(NonNull<Done>);

impl Told {
    pub fn new() -> Self {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: A fresh mapping.
        let page = unsafe { libc::mmap(core::ptr::null_mut(), size_of::<Done>(), protection, flags, -1, 0) };
        assert!(page != libc::MAP_FAILED, "mmap");
        Self(NonNull::new(page.cast()).expect("mmap gives no page 0"))
    }

    /// For who gets it.
    pub fn tell(&self, done: Done) {
        // SAFETY: The page, which one process at a time uses.
        unsafe { self.0.write_volatile(done) };
    }

    pub fn get(&self) -> Done {
        // SAFETY: As above.
        unsafe { self.0.read_volatile() }
    }
}

impl Default for Told {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        // SAFETY: Mapped in `new`.
        unsafe { libc::munmap(self.0.as_ptr().cast(), size_of::<Done>()) };
    }
}

/// The file descriptor of the device, which libdune has open in this process.
pub fn device() -> i32 {
    let found = fs::read_dir("/proc/self/fd")
        .expect("/proc")
        .flatten()
        .find_map(|entry| {
            let is_it = fs::read_link(entry.path()).is_ok_and(|file| file.ends_with("dune"));
            is_it.then(|| entry.file_name().to_str()?.parse().ok())?
        });
    found.expect("a process with a Dune thread has the device open")
}

/// A second mapping of a vCPU's run page: it stays when the vCPU goes, and then has all that it counted.
pub struct RunPage {
    page: NonNull<abi::RunPage>,
    /// What making this has added.
    own: Done,
}

// SAFETY: Read once the vCPU is gone.
unsafe impl Send for RunPage {}

impl RunPage {
    /// Of the calling thread.
    pub fn map(device: i32) -> Self {
        let counted = || Thread::with_current(|thread| all(&thread.counters())).expect("a Dune thread");
        let first = counted();
        let second = counted();
        let vcpu = Thread::with_current(|thread| thread.vcpu()).expect("a Dune thread");
        let page = Self::mapped(device, vcpu);
        let third = counted();
        // From the first reading, which cost as much as the second, to the third.
        let own = sum(&more(&first, &second), &more(&first, &third));
        Self { page, own }
    }

    /// Of a thread that is told by what it entered with.
    pub fn of(dune: &Dune, device: i32) -> Self {
        let before = all(&dune.counters());
        let page = Self::mapped(device, dune.vcpu());
        let own = more(&before, &all(&dune.counters()));
        Self { page, own }
    }

    fn mapped(device: i32, vcpu: u32) -> NonNull<abi::RunPage> {
        let offset = i64::from(vcpu) * abi::RUN_PAGE_BYTES as i64;
        let bytes = abi::RUN_PAGE_BYTES;
        // SAFETY: A fresh mapping of a file of ours.
        let page = unsafe {
            libc::mmap(
                core::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                device,
                offset,
            )
        };
        assert!(
            page != libc::MAP_FAILED,
            "run page: {}",
            std::io::Error::last_os_error()
        );
        NonNull::new(page.cast()).expect("mmap gives no page 0")
    }

    /// All that the vCPU did but for making this.
    pub fn done(&self) -> Done {
        // SAFETY: Mapped, plain numbers.
        let counters = unsafe { (&raw const (*self.page.as_ptr()).counters).read_volatile() };
        more(&self.own, &all(&counters))
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: Mapped in `mapped`.
        unsafe { libc::munmap(self.page.as_ptr().cast(), abi::RUN_PAGE_BYTES) };
    }
}

/// Another process in Dune mode, that takes what no vCPU of ours did yet, and tells it.
pub struct Taker {
    told: Told,
    asks: fs::File,
    answers: fs::File,
    pid: libc::pid_t,
    /// What being asked does by itself.
    own: Done,
}

impl Taker {
    /// Called outside Dune mode.
    pub fn start() -> Self {
        let told = Told::new();
        let (mut ask, mut answer) = ([0; 2], [0; 2]);
        // SAFETY: Fresh fds, each of which gets one owner in each process; the child ends in here.
        let (asks, answers, pid) = unsafe {
            assert_eq!((libc::pipe(ask.as_mut_ptr()), libc::pipe(answer.as_mut_ptr())), (0, 0));
            let pid = libc::fork();
            assert!(pid >= 0, "fork");
            let file = |fd| fs::File::from_raw_fd(fd);
            if pid == 0 {
                libc::close(ask[1]);
                libc::close(answer[0]);
                Self::serve(&told, file(ask[0]), file(answer[1]));
                libc::_exit(0);
            }
            libc::close(ask[0]);
            libc::close(answer[1]);
            (file(ask[1]), file(answer[0]), pid)
        };
        let mut taker = Self {
            told,
            asks,
            answers,
            pid,
            own: NOTHING,
        };
        taker.take();
        let own: Vec<Done> = (0..TIMES).map(|_| taker.take()).collect();
        taker.own = least(&own);
        taker
    }

    fn serve(told: &Told, mut asks: fs::File, mut answers: fs::File) {
        let Ok(dune) = Dune::enter() else { return };
        let mut byte = [0];
        while asks.read_exact(&mut byte).is_ok() {
            exit_once();
            told.tell(all(&dune.counters()));
            if answers.write_all(&byte).is_err() {
                break;
            }
        }
    }

    /// What was done since the last time, as far as no other vCPU told of it.
    pub fn take(&mut self) -> Done {
        let before = self.told.get();
        self.asks.write_all(&[1]).expect("the other process reads");
        self.answers.read_exact(&mut [0]).expect("the other process answers");
        // Until it waits again.
        std::thread::sleep(Duration::from_millis(5));
        more(&self.own, &more(&before, &self.told.get()))
    }
}

impl Drop for Taker {
    fn drop(&mut self) {
        // SAFETY: A child of ours, which is waited for.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, core::ptr::null_mut(), 0);
        }
    }
}
