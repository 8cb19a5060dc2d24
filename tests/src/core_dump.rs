// SPDX-License-Identifier: MIT OR Apache-2.0

//! Core dumps: what stands in them of a thread that died in Dune mode.

use std::arch::global_asm;
use std::fs;
use std::ops::Range;
use std::sync::atomic::Ordering::SeqCst;

use crate::framework::Test;
use crate::framework::User;
use crate::support::enter;
use crate::support::spawn;
use crate::support::Shared;

pub const TESTS: &[Test] = &[Test::asserting(
    "core_dump_names_the_guilty_function",
    core_dump_names_the_guilty_function,
)
.run_as(User::Root)];

/// What RAX holds when it happens.
const MARK: u64 = 0x1122_3344_5566_7788;
/// Where nothing is mapped.
const NOWHERE: u64 = 0x1000;

macro_rules! push_frame_pointer {
    () => {
        "push rbp
        .cfi_def_cfa_offset 16
        .cfi_offset rbp, -16
        mov rbp, rsp
        .cfi_def_cfa_register rbp"
    };
}

// A function that does what kills, as its first argument says, and one that calls it; both with a frame pointer.
global_asm!(
    ".pushsection .text.dune_test_guilty, \"ax\", @progbits",
    ".globl dune_test_guilty, dune_test_guilty_end, dune_test_guilty_caller, dune_test_guilty_caller_end",
    ".type dune_test_guilty, @function",
    "dune_test_guilty:",
    ".cfi_startproc",
    push_frame_pointer!(),
    "mov rax, {mark}",
    "cmp edi, {undefined}",
    "je 2f",
    "mov dword ptr [{nowhere}], eax",
    "2: ud2",
    "dune_test_guilty_end:",
    ".cfi_endproc",
    ".size dune_test_guilty, . - dune_test_guilty",
    ".type dune_test_guilty_caller, @function",
    "dune_test_guilty_caller:",
    ".cfi_startproc",
    push_frame_pointer!(),
    "call dune_test_guilty",
    "pop rbp",
    ".cfi_def_cfa rsp, 8",
    "ret",
    "dune_test_guilty_caller_end:",
    ".cfi_endproc",
    ".size dune_test_guilty_caller, . - dune_test_guilty_caller",
    ".popsection",
    mark = const MARK,
    undefined = const Deed::Undefined as i32,
    nowhere = const NOWHERE,
);

extern "C" {
    static dune_test_guilty: u8;
    static dune_test_guilty_end: u8;
    static dune_test_guilty_caller_end: u8;
    fn dune_test_guilty_caller(deed: i32);
}

/// What kills.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    Store = 1,
    Undefined,
}

impl Deed {
    fn signal(self) -> i32 {
        match self {
            Deed::Store => libc::SIGSEGV,
            Deed::Undefined => libc::SIGILL,
        }
    }
}

/// Has Linux write cores to /tmp while it lives.
struct CorePattern(String);

const CORE_PATTERN: &str = "/proc/sys/kernel/core_pattern";

impl CorePattern {
    fn set() -> Self {
        let before = fs::read_to_string(CORE_PATTERN).unwrap();
        fs::write(CORE_PATTERN, "/tmp/dune-core.%p").unwrap();
        Self(before)
    }
}

impl Drop for CorePattern {
    fn drop(&mut self) {
        let _ = fs::write(CORE_PATTERN, &self.0);
    }
}

/// The file of a core; removed when dropped.
pub struct CoreFile(pub String);

impl Drop for CoreFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[no_mangle]
#[inline(never)]
extern "C" fn dune_test_commits(deed: i32, shared: &Shared) {
    let here = 0u64;
    shared.word(0).store(&raw const here as u64, SeqCst);
    // SAFETY: a call without arguments.
    shared
        .word(1)
        .store(unsafe { libc::syscall(libc::SYS_gettid) } as u64, SeqCst);
    // SAFETY: ends this process.
    unsafe { dune_test_guilty_caller(deed) };
    std::hint::black_box(here);
}

/// A child that enters Dune mode and dies of it, by a thread of its own or not; its core. The words of `shared`: 0 an address on
/// the stack of the thread that did it, 1 its number.
pub fn die(deed: Deed, by_thread: bool, shared: &Shared) -> CoreFile {
    let _pattern = CorePattern::set();
    let child = spawn(|| {
        let unlimited = libc::rlimit {
            rlim_cur: libc::RLIM_INFINITY,
            rlim_max: libc::RLIM_INFINITY,
        };
        // SAFETY: reads the structure.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_CORE, &unlimited) }, 0);
        let _dune = enter();
        if by_thread {
            std::thread::scope(|scope| {
                scope.spawn(|| dune_test_commits(deed as i32, shared));
            });
        } else {
            dune_test_commits(deed as i32, shared);
        }
    });
    let file = CoreFile(format!("/tmp/dune-core.{}", child.pid));
    let ended = child.wait();
    assert_eq!(ended.signal(), Some(deed.signal()), "{deed:?}: {ended:?}");
    assert!(libc::WCOREDUMP(ended.status), "{deed:?}: no core");
    file
}

/// An ELF core of 64 bits.
struct Core(Vec<u8>);

/// NT_PRSTATUS of a thread: its number and registers, as `struct user_regs_struct` has them.
struct Status {
    thread: u32,
    registers: libc::user_regs_struct,
}

impl Core {
    fn number<const BYTES: usize>(&self, at: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes[..BYTES].copy_from_slice(&self.0[at..at + BYTES]);
        u64::from_le_bytes(bytes)
    }

    /// Type, offset in the file, address and bytes in the file of each segment.
    fn segments(&self) -> impl Iterator<Item = (u64, usize, u64, usize)> + '_ {
        assert_eq!(&self.0[..5], b"\x7fELF\x02");
        let (first, size, count) = (self.number::<8>(32), self.number::<2>(54), self.number::<2>(56));
        (0..count).map(move |index| {
            let at = (first + index * size) as usize;
            (
                self.number::<4>(at),
                self.number::<8>(at + 8) as usize,
                self.number::<8>(at + 16),
                self.number::<8>(at + 32) as usize,
            )
        })
    }

    /// Type and place of each note's contents.
    fn notes(&self) -> Vec<(u64, Range<usize>)> {
        const PT_NOTE: u64 = 4;
        let mut notes = Vec::new();
        for (_, start, _, bytes) in self.segments().filter(|segment| segment.0 == PT_NOTE) {
            let mut at = start;
            while at < start + bytes {
                let (name, contents) = (self.number::<4>(at) as usize, self.number::<4>(at + 4) as usize);
                let from = at + 12 + name.next_multiple_of(4);
                notes.push((self.number::<4>(at + 8), from..from + contents));
                at = from + contents.next_multiple_of(4);
            }
        }
        notes
    }

    /// Of each thread; the one that died first.
    fn statuses(&self) -> Vec<Status> {
        const NT_PRSTATUS: u64 = 1;
        // Of `struct elf_prstatus`.
        const PID: usize = 32;
        const REGISTERS: usize = 112;
        self.notes()
            .into_iter()
            .filter(|note| note.0 == NT_PRSTATUS)
            .map(|(_, at)| {
                let bytes = &self.0[at.start + REGISTERS..][..size_of::<libc::user_regs_struct>()];
                Status {
                    thread: self.number::<4>(at.start + PID) as u32,
                    // SAFETY: so many bytes, of which each value is good.
                    registers: unsafe { bytes.as_ptr().cast::<libc::user_regs_struct>().read_unaligned() },
                }
            })
            .collect()
    }

    /// Signal, code and address of its siginfo.
    fn siginfo(&self) -> (i32, i32, u64) {
        const NT_SIGINFO: u64 = 0x5349_4749;
        let notes = self.notes();
        let at = notes
            .iter()
            .find(|note| note.0 == NT_SIGINFO)
            .expect("no siginfo")
            .1
            .start;
        (
            self.number::<4>(at) as i32,
            self.number::<4>(at + 8) as i32,
            self.number::<8>(at + 16),
        )
    }

    /// A word of the dead process' memory.
    fn word(&self, address: u64) -> u64 {
        const PT_LOAD: u64 = 1;
        let (_, offset, start, _) = self
            .segments()
            .find(|(kind, _, start, bytes)| *kind == PT_LOAD && (*start..*start + *bytes as u64).contains(&address))
            .unwrap_or_else(|| panic!("{address:#x} is not in the core"));
        self.number::<8>(offset + (address - start) as usize)
    }
}

fn core_dump_names_the_guilty_function() {
    let guilty = &raw const dune_test_guilty as u64..&raw const dune_test_guilty_end as u64;
    let caller = dune_test_guilty_caller as *const () as u64..&raw const dune_test_guilty_caller_end as u64;
    let shared = Shared::new();
    for (deed, by_thread) in [(Deed::Store, true), (Deed::Undefined, false)] {
        let what = format!("{deed:?}, by a thread: {by_thread}");
        let file = die(deed, by_thread, &shared);
        let core = Core(fs::read(&file.0).unwrap());
        let statuses = core.statuses();
        assert_eq!(statuses.len(), if by_thread { 2 } else { 1 }, "{what}");
        let Status { thread, registers } = &statuses[0];
        assert_eq!(u64::from(*thread), shared.word(1).load(SeqCst), "{what}");
        // The function, its registers, its stack.
        assert!(
            guilty.contains(&registers.rip),
            "{what}: RIP {:#x} of {guilty:#x?}",
            registers.rip
        );
        assert_eq!(registers.rax, MARK, "{what}");
        let stack = shared.word(0).load(SeqCst);
        assert!(
            registers.rsp < stack && stack - registers.rsp < 4096,
            "{what}: RSP {:#x}, a local was at {stack:#x}",
            registers.rsp
        );
        assert_eq!((registers.cs, registers.ss), (0x33, 0x2b), "{what}");
        // Who called it, and who that one, by their frames.
        assert_eq!(registers.rbp, registers.rsp, "{what}");
        let returns_to = core.word(registers.rbp + 8);
        assert!(
            caller.contains(&returns_to),
            "{what}: returns to {returns_to:#x} of {caller:#x?}"
        );
        let outer = core.word(core.word(registers.rbp) + 8);
        let commits = dune_test_commits as *const () as u64;
        assert!(
            outer > commits && outer - commits < 4096,
            "{what}: {outer:#x} of {commits:#x}"
        );
        let (signal, code, address) = core.siginfo();
        assert_eq!(signal, deed.signal(), "{what}");
        match deed {
            Deed::Store => assert_eq!((code, address), (1, NOWHERE), "{what}: SEGV_MAPERR there"),
            Deed::Undefined => assert_eq!(address, registers.rip, "{what}"),
        }
    }
}
