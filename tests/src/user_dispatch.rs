// SPDX-License-Identifier: MIT OR Apache-2.0

//! Syscall user dispatch: what a Dune thread sees of it is what the same code sees natively.

use std::fmt::Debug;
use std::fmt::Write;
use std::io;
use std::ptr;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicI64;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::AtomicU8;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;
use std::time::Instant;

use libdune::hook::Hooks;
use libdune::Dune;
use libdune::Error;

use crate::framework::Need;
use crate::framework::Test;
use crate::support::count_signal;
use crate::support::enter;
use crate::support::set_handler;
use crate::support::set_plain_handler;
use crate::support::spawn;
use crate::support::timer;
use crate::support::Map;
use crate::support::Shared;
use crate::support::PAGE;
use crate::support::SIGNALS;
use crate::user::code;

const NEEDS: &[Need] = &[Need::UserDispatch];

pub const TESTS: &[Test] = &[
    Test::asserting(
        "user_dispatch_is_asked_for_as_natively",
        dispatch_is_asked_for_as_natively,
    ),
    Test::asserting("user_dispatch_is_what_it_is_natively", dispatch_is_what_it_is_natively).needs(NEEDS),
    Test::asserting(
        "user_dispatch_ends_who_cannot_take_it",
        dispatch_ends_who_cannot_take_it,
    )
    .needs(NEEDS),
    Test::asserting("user_dispatch_stays_with_its_thread", dispatch_stays_with_its_thread).needs(NEEDS),
    Test::asserting("user_dispatch_lets_signals_interrupt", dispatch_lets_signals_interrupt).needs(NEEDS),
    Test::asserting("user_dispatch_comes_behind_hooks", dispatch_comes_behind_hooks).needs(NEEDS),
    Test::asserting("user_dispatch_of_before_enter_holds", dispatch_of_before_enter_holds).needs(NEEDS),
    Test::asserting(
        "user_dispatch_that_is_unknown_is_told",
        dispatch_that_is_unknown_is_told,
    )
    .needs(NEEDS),
];

const PR_SET_SYSCALL_USER_DISPATCH: i64 = 59;
const OFF: u64 = 0;
const ON: u64 = 1;
/// From Linux 6.17 on: calls from the region are dispatched, not all others.
const INCLUSIVE_ON: u64 = 2;

const ALLOW: u8 = 0;
const BLOCK: u8 = 1;

/// A number that no call has.
const NO_CALL: i64 = 0xf000;

/// What the handler answers in place of Linux.
const ANSWER: i64 = 4242;

static SELECTOR: AtomicU8 = AtomicU8::new(ALLOW);

code! {
    // A call of up to four arguments.
    call: "mov rax, rdi" "mov rdi, rsi" "mov rsi, rdx" "mov rdx, rcx" "mov r10, r8" "syscall" "ret";
    int80: "mov eax, edi" "int 0x80" "ret";
    restorer: "mov eax, 15" "syscall";
}

/// Where the code lies in each page.
const CALL: usize = 0;
const INT80: usize = 0x100;
const RESTORER: usize = 0x200;

/// Two pages with the same code, below all else: calls from the second one are allowed where the test says so.
struct Code(Map);

// SAFETY: It is written before it is shared.
unsafe impl Sync for Code {}

impl Code {
    const BLOCKED: usize = 0;
    const ALLOWED: usize = 1;

    fn new() -> Self {
        let all = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let map = Map::at(0x2000_0000, 2 * PAGE, all, 0);
        for page in [Self::BLOCKED, Self::ALLOWED] {
            for (offset, code) in [(CALL, call()), (INT80, int80()), (RESTORER, restorer())] {
                // SAFETY: a page of our own.
                unsafe { ptr::copy_nonoverlapping(code.as_ptr(), map.start.add(page * PAGE + offset), code.len()) };
            }
        }
        Self(map)
    }

    fn at(&self, page: usize, offset: usize) -> u64 {
        (self.0.page(page) + offset) as u64
    }

    /// Makes a call from a page.
    fn call(&self, page: usize, number: i64, arguments: [u64; 4]) -> i64 {
        type Call = extern "C" fn(i64, u64, u64, u64, u64) -> i64;
        let [a, b, c, d] = arguments;
        // SAFETY: the code has this type.
        let call = unsafe { std::mem::transmute::<u64, Call>(self.at(page, CALL)) };
        call(number, a, b, c, d)
    }

    /// Behind its SYSCALL.
    fn behind_call(&self, page: usize) -> u64 {
        const RET_BYTES: usize = 1;
        self.at(page, CALL + call().len() - RET_BYTES)
    }

    fn int80(&self, page: usize, number: i32) -> i64 {
        // SAFETY: the code has this type.
        let call = unsafe { std::mem::transmute::<u64, extern "C" fn(i32) -> i64>(self.at(page, INT80)) };
        call(number)
    }

    /// Lets calls of the second page through, and asks the selector about others.
    fn dispatch(&self) {
        set(ON, self.at(Self::ALLOWED, 0), PAGE as u64, selector()).unwrap();
    }

    /// Lets calls of the second page and all above through, and no others.
    fn dispatch_the_first_page(&self) {
        let start = self.at(Self::ALLOWED, 0);
        set(ON, start, u64::MAX - start, 0).unwrap();
    }

    /// The same as `call` from the first page, with the selector at BLOCK meanwhile, if nobody else changes it.
    fn blocked(&self, number: i64) -> i64 {
        SELECTOR.store(BLOCK, SeqCst);
        let result = self.call(Self::BLOCKED, number, [0; 4]);
        SELECTOR.store(ALLOW, SeqCst);
        result
    }
}

fn selector() -> u64 {
    SELECTOR.as_ptr() as u64
}

/// The prctl, or its errno.
fn set(mode: u64, offset: u64, bytes: u64, selector: u64) -> Result<(), Option<i32>> {
    // SAFETY: a setting of this thread; the tests know what they set.
    let result = unsafe {
        libc::syscall(
            libc::SYS_prctl,
            PR_SET_SYSCALL_USER_DISPATCH,
            mode,
            offset,
            bytes,
            selector,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error().raw_os_error())
    }
}

/// What the handler saw.
struct Seen {
    count: AtomicU64,
    /// si_signo, si_errno, si_code, si_call_addr, si_syscall, si_arch; RAX, RIP, RCX of the ucontext.
    words: [AtomicI64; 9],
    in_dune_mode: AtomicBool,
}

static SEEN: Seen = Seen {
    count: AtomicU64::new(0),
    words: [const { AtomicI64::new(0) }; 9],
    in_dune_mode: AtomicBool::new(false),
};

/// Whether the handler leaves the selector at BLOCK.
static STAYS_BLOCKED: AtomicBool = AtomicBool::new(false);

extern "C" fn on_sigsys(_: i32, info: *mut libc::siginfo_t, context: *mut libc::ucontext_t) {
    // SAFETY: Linux' arguments, or libdune's; the words of struct siginfo for SIGSYS.
    unsafe {
        let registers = &mut (*context).uc_mcontext.gregs;
        let words = [
            i64::from((*info).si_signo),
            i64::from((*info).si_errno),
            i64::from((*info).si_code),
            (*info).si_addr() as i64,
            i64::from(info.cast::<i32>().add(6).read()),
            i64::from(info.cast::<u32>().add(7).read()),
            registers[libc::REG_RAX as usize],
            registers[libc::REG_RIP as usize],
            registers[libc::REG_RCX as usize],
        ];
        for (to, word) in SEEN.words.iter().zip(words) {
            to.store(word, SeqCst);
        }
        registers[libc::REG_RAX as usize] = ANSWER;
    }
    SEEN.in_dune_mode.store(Dune::is_active(), SeqCst);
    SEEN.count.fetch_add(1, SeqCst);
    if !STAYS_BLOCKED.load(SeqCst) {
        SELECTOR.store(ALLOW, SeqCst);
    }
}

fn seen() -> u64 {
    SEEN.count.load(SeqCst)
}

/// A table of what happened, line by line.
#[derive(Default)]
struct Lines(String);

impl Lines {
    fn add(&mut self, name: &str, value: impl Debug) {
        let words: Vec<i64> = SEEN.words.iter().map(|word| word.load(SeqCst)).collect();
        writeln!(self.0, "{name}: {value:x?}, {} seen, {words:x?}", seen()).unwrap();
    }
}

/// Runs `body` in a child, natively and in Dune mode; what the children wrote.
fn both(body: fn()) -> [String; 2] {
    [false, true].map(|inside| {
        let ended = spawn(|| {
            let dune = inside.then(enter);
            body();
            assert_eq!(Dune::is_active(), inside);
            assert!(seen() == 0 || SEEN.in_dune_mode.load(SeqCst) == inside);
            drop(dune);
        })
        .wait();
        ended.assert_success();
        ended.output
    })
}

/// Whether Linux has it: it looks at the selector last, and at none where it has nothing of the kind.
pub fn is_there() -> bool {
    set(ON, 0, 0, 1 << 63) == Err(Some(libc::EFAULT))
}

/// Answers are Linux' own, whatever it has; and with a handler for SIGSYS, a sign of it, threads enter.
fn dispatch_is_asked_for_as_natively() {
    let answers = |inside: bool| {
        spawn(|| {
            set_handler(libc::SIGSYS, on_sigsys, 0, &[]);
            let dune = inside.then(enter);
            let kernels = 1 << 63;
            for (mode, offset, bytes, selector) in [
                (OFF, 0, 0, 0),
                (OFF, 1, 0, 0),
                (OFF, 0, 1, 0),
                (OFF, 0, 0, selector()),
                (ON, 0x1000, 0, selector()),
                (ON, 0x1000, u64::MAX, selector()),
                (ON, 0, 0, kernels),
                (ON, 0x1000, 0, kernels),
                (INCLUSIVE_ON, 0, 0, selector()),
                (INCLUSIVE_ON, 0x1000, u64::MAX, selector()),
                (INCLUSIVE_ON, 0x1000, 0x1000, kernels),
                (77, 0, 0, 0),
                (u64::MAX, 0, 0, kernels),
            ] {
                println!(
                    "{mode:x} {offset:x} {bytes:x} {}: {:?}",
                    selector == 0,
                    set(mode, offset, bytes, selector)
                );
            }
            let is_on = set(ON, 0, 0, selector());
            println!("on: {is_on:?}");
            set(OFF, 0, 0, 0).unwrap_or_else(|_| assert!(is_on.is_err()));
            drop(dune);
        })
        .wait()
    };
    let [outside, inside] = [false, true].map(|inside| {
        let ended = answers(inside);
        ended.assert_success();
        ended.output
    });
    assert_eq!(inside, outside);
    assert!(outside.lines().count() == 14, "{outside}");
}

fn dispatch_is_what_it_is_natively() {
    let [outside, inside] = both(make_calls);
    assert_eq!(inside, outside);
    // The same of nothing would be the same, too.
    assert!(outside.lines().count() > 15, "{outside}");
}

fn make_calls() {
    let code = Code::new();
    let mut lines = Lines::default();
    let blocked = Code::BLOCKED;
    // SAFETY: a call without arguments.
    let parent = i64::from(unsafe { libc::getppid() });
    set_handler(libc::SIGSYS, on_sigsys, 0, &[]);

    set(ON, 0, 0, selector()).unwrap();
    lines.add("allowed", code.call(blocked, libc::SYS_getppid, [0; 4]) == parent);
    lines.add("no call at all", code.blocked(NO_CALL));
    lines.add("a call", code.blocked(libc::SYS_getppid));
    lines.add("a call that comes back twice", code.blocked(libc::SYS_fork));
    lines.add("exit", code.blocked(libc::SYS_exit_group));
    lines.add("a number of 64 bits", code.blocked(-1));
    if std::path::Path::new("/proc/sys/abi/vsyscall32").exists() {
        SELECTOR.store(BLOCK, SeqCst);
        const GETPPID: i32 = 64;
        lines.add("an i386 call", code.int80(blocked, GETPPID));
        SELECTOR.store(ALLOW, SeqCst);
        lines.add("an i386 call that is allowed", code.int80(blocked, GETPPID) == parent);
    }

    // RIP behind the call is what counts, and the end is not in the region.
    let behind = code.behind_call(blocked);
    for (name, start, bytes) in [
        ("the whole page", code.at(blocked, 0), PAGE as u64),
        ("the byte behind the call", behind, 1),
        (
            "up to the byte behind the call",
            code.at(blocked, 0),
            behind - code.at(blocked, 0),
        ),
        ("from behind that", behind + 1, 100),
    ] {
        set(ON, start, bytes, selector()).unwrap();
        let result = code.blocked(libc::SYS_getppid);
        lines.add(name, if result == parent { 0 } else { result });
    }

    // The other way round, where Linux has that.
    for (name, page) in [
        ("calls of the page alone", blocked),
        ("of another page alone", Code::ALLOWED),
    ] {
        let answer = set(INCLUSIVE_ON, code.at(page, 0), PAGE as u64, selector());
        lines.add(name, answer);
        if answer.is_ok() {
            let result = code.blocked(libc::SYS_getppid);
            lines.add(name, if result == parent { 0 } else { result });
        }
    }

    // As Linux' selftest: the selector stays, and the handler returns from the region.
    code.dispatch();
    let action = [
        on_sigsys as *const () as u64,
        SA_SIGINFO | SA_RESTORER,
        code.at(Code::ALLOWED, RESTORER),
        0,
    ];
    let set_action = [libc::SIGSYS as u64, action.as_ptr() as u64, 0, 8];
    assert_eq!(code.call(Code::ALLOWED, libc::SYS_rt_sigaction, set_action), 0);
    STAYS_BLOCKED.store(true, SeqCst);
    SELECTOR.store(BLOCK, SeqCst);
    let results: [i64; 3] =
        [NO_CALL, libc::SYS_getppid, libc::SYS_exit].map(|number| code.call(blocked, number, [0; 4]));
    let direct = code.call(Code::ALLOWED, libc::SYS_getppid, [0; 4]);
    SELECTOR.store(ALLOW, SeqCst);
    lines.add("return with the selector at BLOCK", (results, direct == parent));

    code.dispatch_the_first_page();
    lines.add("no selector", code.call(blocked, libc::SYS_getppid, [0; 4]));
    set(OFF, 0, 0, 0).unwrap();
    lines.add("off", code.blocked(libc::SYS_getppid) == parent);
    print!("{}", lines.0);
    let _ = io::Write::flush(&mut io::stdout());
}

const SA_SIGINFO: u64 = libc::SA_SIGINFO as u64;
const SA_RESTORER: u64 = 0x0400_0000;

/// Where nobody takes the SIGSYS the process ends, by the signal that Linux has for it.
fn dispatch_ends_who_cannot_take_it() {
    let handle = || {
        set_handler(libc::SIGSYS, on_sigsys, 0, &[]);
    };
    let bodies: [(&str, i32, &dyn Fn()); 7] = [
        ("the default", libc::SIGSYS, &|| {}),
        ("ignored", libc::SIGSYS, &|| {
            // SAFETY: no handler.
            unsafe { libc::signal(libc::SIGSYS, libc::SIG_IGN) };
        }),
        ("blocked", libc::SIGSYS, &|| {
            handle();
            // SAFETY: sets of our own.
            unsafe {
                let mut mask = std::mem::zeroed();
                libc::sigaddset(&mut mask, libc::SIGSYS);
                libc::sigprocmask(libc::SIG_BLOCK, &mask, ptr::null_mut());
            }
        }),
        ("another value of the selector", libc::SIGSYS, &|| {
            handle();
            SELECTOR.store(2, SeqCst);
        }),
        ("no memory at the selector", libc::SIGSEGV, &|| {
            handle();
            let code = Code::new();
            set(ON, code.at(Code::ALLOWED, 0), PAGE as u64, 8).unwrap();
            code.call(Code::ALLOWED, libc::SYS_getppid, [0; 4]);
        }),
        ("a handler that cannot return", libc::SIGSYS, &|| {
            handle();
            STAYS_BLOCKED.store(true, SeqCst);
        }),
        // To see that the others would not end otherwise.
        ("a handler", 0, &handle),
    ];
    for inside in [false, true] {
        for (name, signal, body) in bodies {
            let shared = Shared::new();
            let ended = spawn(|| {
                let code = Code::new();
                let _dune = inside.then(enter);
                code.dispatch();
                drop(code);
                body();
                let code = Code::new();
                if SELECTOR.load(SeqCst) == ALLOW {
                    SELECTOR.store(BLOCK, SeqCst);
                }
                code.call(Code::BLOCKED, libc::SYS_getppid, [0; 4]);
                // Behind `leave` Linux would end it, too.
                shared.word(0).store(1, SeqCst);
            })
            .wait();
            assert_eq!(
                shared.word(0).load(SeqCst) == 0,
                signal != 0,
                "{name}, in Dune mode: {inside}"
            );
            assert_eq!(
                ended.signal().unwrap_or(0),
                signal,
                "{name}, in Dune mode: {inside}: {ended:?}"
            );
        }
    }
}

/// Threads and children have it off, and so has what is executed; the maker keeps it.
fn dispatch_stays_with_its_thread() {
    let [outside, inside] = both(make_children);
    assert_eq!(inside, outside);
    assert_eq!(outside.matches("true").count(), 4, "{outside}");
}

fn make_children() {
    let code = Code::new();
    set_handler(libc::SIGSYS, on_sigsys, 0, &[]);
    code.dispatch_the_first_page();
    let mut lines = Lines::default();
    let is_off = |parent: u32| code.call(Code::BLOCKED, libc::SYS_getppid, [0; 4]) == i64::from(parent);
    let keeps = || code.call(Code::BLOCKED, libc::SYS_getppid, [0; 4]) == ANSWER;
    let parent = std::os::unix::process::parent_id();
    let in_thread = std::thread::scope(|scope| scope.spawn(|| is_off(parent)).join().unwrap());
    lines.add("thread", in_thread && keeps());
    let me = std::process::id();
    spawn(|| {
        assert!(is_off(me));
        // The child may have its own.
        code.dispatch_the_first_page();
        assert_eq!(code.call(Code::BLOCKED, libc::SYS_getppid, [0; 4]), ANSWER);
    })
    .wait()
    .assert_success();
    lines.add("fork", keeps());
    lines.add(
        "vfork",
        std::process::Command::new("/bin/true").status().unwrap().success() && keeps(),
    );
    let path = c"/bin/true";
    let ended = spawn(|| {
        let arguments = [path.as_ptr(), ptr::null()];
        code.dispatch();
        SELECTOR.store(BLOCK, SeqCst);
        let arguments = [path.as_ptr() as u64, arguments.as_ptr() as u64, 0, 0];
        code.call(Code::ALLOWED, libc::SYS_execve, arguments);
    })
    .wait();
    lines.add("exec", ended.signal().is_none() && ended.status == 0 && keeps());
    set(OFF, 0, 0, 0).unwrap();
    print!("{}", lines.0);
    let _ = io::Write::flush(&mut io::stdout());
}

/// A signal that comes while the host loop decides about a call interrupts the call.
fn dispatch_lets_signals_interrupt() {
    const CALLS: u64 = 400;
    const INTERVAL_US: i64 = 1_000;
    let dune = enter();
    set_plain_handler(libc::SIGALRM, count_signal, 0);
    set(ON, 0, 0, selector()).unwrap();
    timer(libc::ITIMER_REAL, INTERVAL_US);
    for turn in 0..CALLS {
        // The calls come at all times between two signals.
        for _ in 0..turn * 61 % 10_000 {
            std::hint::spin_loop();
        }
        let start = Instant::now();
        // SAFETY: waits for a signal, or a time that is far too long.
        let result = unsafe { libc::poll(ptr::null_mut(), 0, 2_000) };
        assert_eq!(result, -1, "no signal for {:?}, call {turn}", start.elapsed());
        assert!(start.elapsed() < Duration::from_secs(1), "call {turn}");
    }
    timer(libc::ITIMER_REAL, 0);
    assert!(SIGNALS.load(SeqCst) >= CALLS);
    set(OFF, 0, 0, 0).unwrap();
    dune.leave();
}

static AFTER: AtomicU64 = AtomicU64::new(0);

/// The call that a hook watches is the program's; one that a hook makes is not.
fn dispatch_comes_behind_hooks() {
    let code = Code::new();
    let dune = enter();
    set_handler(libc::SIGSYS, on_sigsys, 0, &[]);
    let before = |_: &mut libdune::hook::SystemCall, _: &libdune::Thread<'_>| {
        // SAFETY: a call without arguments.
        let pid = unsafe { libc::syscall(libc::SYS_getpid) };
        assert_ne!(pid, ANSWER);
        libdune::hook::Verdict::Allow
    };
    for after in [None, Some(count_after as libdune::hook::After)] {
        SEEN.count.store(0, SeqCst);
        AFTER.store(0, SeqCst);
        dune.thread().set_hooks(Hooks {
            before: Some(before),
            after,
        });
        set(ON, 0, 0, selector()).unwrap();
        for turn in 1..=3 {
            assert_eq!(code.blocked(NO_CALL), ANSWER);
            assert_eq!(seen(), turn);
            let behind = code.behind_call(Code::BLOCKED) as i64;
            let words = [3, 4, 6, 7, 8].map(|word: usize| SEEN.words[word].load(SeqCst));
            assert_eq!(words, [behind, NO_CALL, NO_CALL, behind, behind]);
        }
        let told = AFTER.load(SeqCst);
        assert_eq!(
            code.call(Code::BLOCKED, libc::SYS_getpid, [0; 4]),
            i64::from(std::process::id())
        );
        assert_eq!(seen(), 3);
        assert_eq!(AFTER.load(SeqCst) > told, after.is_some());
        set(OFF, 0, 0, 0).unwrap();
        dune.thread().set_hooks(Hooks::default());
    }
    dune.leave();
}

fn count_after(_: &libdune::hook::SystemCall, result: i64, _: &libdune::Thread<'_>) -> i64 {
    AFTER.fetch_add(1, SeqCst);
    result
}

/// What a thread switched on natively holds in Dune mode, and again behind it.
fn dispatch_of_before_enter_holds() {
    let code = Code::new();
    set_handler(libc::SIGSYS, on_sigsys, 0, &[]);
    code.dispatch();
    for round in 0..3 {
        let dune = enter();
        assert_eq!(code.blocked(NO_CALL), ANSWER);
        assert!(SEEN.in_dune_mode.load(SeqCst));
        // The host loop's own calls are not the program's.
        SELECTOR.store(BLOCK, SeqCst);
        let parent = code.call(Code::ALLOWED, libc::SYS_getppid, [0; 4]);
        SELECTOR.store(ALLOW, SeqCst);
        assert_eq!(parent, i64::from(std::os::unix::process::parent_id()));
        dune.leave();
        assert_eq!(code.blocked(NO_CALL), ANSWER);
        assert!(!SEEN.in_dune_mode.load(SeqCst));
        assert_eq!(seen(), 2 * (round + 1));
    }
    set(OFF, 0, 0, 0).unwrap();
    let dune = enter();
    assert_eq!(code.blocked(NO_CALL), -i64::from(libc::ENOSYS));
    dune.leave();
    // SAFETY: no children are left to wait for: who asked Linux has been waited for.
    assert_eq!(unsafe { libc::waitpid(-1, ptr::null_mut(), libc::__WALL) }, -1);
}

/// A thread that is traced already cannot be asked; one without a handler for SIGSYS need not be.
fn dispatch_that_is_unknown_is_told() {
    for handled in [false, true] {
        spawn(|| {
            if handled {
                set_handler(libc::SIGSYS, on_sigsys, 0, &[]);
            }
            // SAFETY: the parent does not look.
            assert_eq!(unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) }, 0);
            match Dune::enter() {
                Err(Error::UnknownDispatch { errno }) => assert!(handled && errno == libc::EPERM),
                Ok(dune) => {
                    assert!(!handled);
                    dune.leave();
                }
                Err(error) => panic!("{error}"),
            }
        })
        .wait()
        .assert_success();
    }
}
