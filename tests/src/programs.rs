// SPDX-License-Identifier: MIT OR Apache-2.0

//! Programs of the distribution, unmodified, under the preload library: the same output and status as without it.
//!
//! Each case runs twice. In Dune mode every dynamic program of its tree must enter (`DUNE_PRELOAD=must`), and the
//! module's own counters say that vCPUs were made and system calls forwarded; without the library, none.

use std::fs;
use std::io::Read;
use std::io::Write;
use std::os::fd::FromRawFd;
use std::process::Command;
use std::process::Stdio;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use libdune::Dune;

use crate::core_dump::die;
use crate::core_dump::Deed;
use crate::framework::Body;
use crate::framework::Suite;
use crate::framework::Test;
use crate::framework::User;
use crate::support::enter;
use crate::support::perf_event;
use crate::support::spawn;
use crate::support::Shared;

const fn program(name: &'static str, suite: Suite, run: fn()) -> Test {
    Test {
        name,
        suite,
        run_as: User::Root,
        timeout_s: 240,
        lasts: None,
        needs: &[],
        body: Body::Asserts(run),
    }
}

pub const TESTS: &[Test] = &[
    program("bash_pipes_jobs_and_traps", Suite::Programs, bash_pipes_jobs_and_traps),
    program(
        "python_threads_subprocess_and_signals",
        Suite::Programs,
        python_threads_subprocess_and_signals,
    ),
    program("gcc_compiles_a_file", Suite::ProgramsLong, gcc_compiles_a_file),
    program("gdb_shows_the_guest", Suite::ProgramsLong, gdb_shows_the_guest),
    program(
        "gdb_names_the_guilty_function",
        Suite::ProgramsLong,
        gdb_names_the_guilty_function,
    ),
    program(
        "sqlite_with_a_large_database",
        Suite::ProgramsLong,
        sqlite_with_a_large_database,
    ),
    program(
        "redis_serves_its_benchmark",
        Suite::ProgramsLong,
        redis_serves_its_benchmark,
    ),
    program("stress_ng_families", Suite::ProgramsLong, stress_ng_families),
    program(
        "cgo_program_with_goroutines",
        Suite::ProgramsLong,
        cgo_program_with_goroutines,
    ),
    program(
        "java_threads_and_collections",
        Suite::ProgramsLong,
        java_threads_and_collections,
    ),
];

#[no_mangle]
#[inline(never)]
extern "C" fn dune_test_gdb_inner(shared: &Shared) -> u64 {
    while shared.word(1).load(SeqCst) == 0 {
        shared.word(0).fetch_add(1, SeqCst);
    }
    shared.word(0).load(SeqCst)
}

#[no_mangle]
#[inline(never)]
extern "C" fn dune_test_gdb_outer(shared: &Shared) -> u64 {
    dune_test_gdb_inner(shared) + 1
}

#[no_mangle]
#[inline(never)]
extern "C" fn dune_test_gdb_waits(file: &mut fs::File) -> u8 {
    let mut byte = [0];
    file.read_exact(&mut byte).unwrap();
    byte[0] + 1
}

/// The shipped script shows what a Dune thread does in its guest, of a spinning one and of one that waits in a call; both go
/// on in Dune mode.
fn gdb_shows_the_guest() {
    let shared = Shared::new();
    let mut pipe = [0; 2];
    // SAFETY: two fds into an array of two, owned by nobody else.
    let (reader, mut writer) = unsafe {
        assert_eq!(libc::pipe(pipe.as_mut_ptr()), 0);
        (fs::File::from_raw_fd(pipe[0]), fs::File::from_raw_fd(pipe[1]))
    };
    let child = spawn(|| {
        let dune = enter();
        let mut reader = reader;
        let waits = std::thread::spawn(move || {
            assert_eq!(dune_test_gdb_waits(&mut reader), 8);
            assert!(Dune::is_active());
        });
        assert!(dune_test_gdb_outer(&shared) > 1);
        waits.join().unwrap();
        assert!(Dune::is_active());
        dune.leave();
    });
    while shared.word(0).load(SeqCst) < 1000 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let output = Command::new("/usr/bin/gdb")
        .args(["-nx", "-batch", "-p", &child.pid.to_string()])
        .args(["-ex", "source /usr/share/dune/gdb/dune.py", "-ex", "dune threads"])
        .args([
            "-ex",
            "dune bt",
            "-ex",
            "dune registers",
            "-ex",
            "thread 2",
            "-ex",
            "dune bt",
            "-ex",
            "bt 3",
        ])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}\n{}", String::from_utf8_lossy(&output.stderr));
    let lines = |words: &[&str]| {
        let mut rest = text.lines();
        words.iter().all(|word| rest.any(|line| line.contains(word)))
    };
    assert!(lines(&["vCPU 0, "]) && lines(&["vCPU 1, "]));
    let outer = [" in dune_", "dune_test_gdb_inner", "dune_test_gdb_outer"];
    assert!(
        lines(&[&outer[..], &[" in dune_", "dune_test_gdb_waits"]].concat()),
        "the guest's frames"
    );
    let count = shared.word(0).load(SeqCst);
    std::thread::sleep(Duration::from_millis(50));
    assert!(shared.word(0).load(SeqCst) > count, "it does not go on");
    shared.word(1).store(1, SeqCst);
    writer.write_all(&[7]).unwrap();
    child.wait().assert_success();
}

/// gdb's backtrace of a core: the function that died in Dune mode, and its callers.
fn gdb_names_the_guilty_function() {
    let shared = Shared::new();
    let core = die(Deed::Store, true, &shared);
    let output = Command::new("/usr/bin/gdb")
        .args(["-nx", "-batch", "-ex", "bt", "-ex", "info registers rax rip"])
        .arg(std::env::current_exe().unwrap())
        .arg(&core.0)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}\n{}", String::from_utf8_lossy(&output.stderr));
    let frame = |number: u32, name: &str| {
        let start = format!("#{number} ");
        let found = text.lines().find(|line| line.starts_with(&start));
        assert!(
            found.is_some_and(|line| line.contains(&format!(" {name} ("))),
            "frame {number}: {found:?}"
        );
    };
    assert!(text.contains("SIGSEGV"));
    frame(0, "in dune_test_guilty");
    frame(1, "in dune_test_guilty_caller");
    frame(2, "in dune_test_commits");
    assert!(text.contains("0x1122334455667788"), "RAX");
}

const PRELOAD: &str = "/usr/lib/libdune_preload.so";

/// Output and status of a shell script, what the module counted meanwhile, and what Linux did.
struct Seen {
    output: String,
    errors: String,
    status: Option<i32>,
    vcpus: u64,
    forwarded: u64,
    calls: u64,
    /// Processes and threads that were made, and programs that were executed.
    made: u64,
    executed: u64,
}

/// A counter of the module since it was loaded.
pub fn total(name: &str) -> u64 {
    let text = fs::read_to_string(format!("/sys/kernel/debug/dune/since_load/{name}")).unwrap();
    text.trim().parse().unwrap()
}

/// Linux' own count of what a program that this thread starts, and all that descends from it, comes to at a tracepoint.
struct Count(fs::File);

impl Count {
    fn of_the_next_program(tracepoint: &str) -> Count {
        const TRACEPOINT: u64 = 2;
        const DISABLED: u64 = 1 << 0;
        const INHERIT: u64 = 1 << 1;
        const ENABLE_ON_EXEC: u64 = 1 << 12;
        let id = fs::read_to_string(format!("/sys/kernel/tracing/events/{tracepoint}/id")).unwrap();
        let flags = DISABLED | INHERIT | ENABLE_ON_EXEC;
        Count(perf_event(
            TRACEPOINT,
            [id.trim().parse().unwrap(), 0, 0, 0, flags, 0, 0],
        ))
    }

    /// When all of them have ended.
    fn end(mut self) -> u64 {
        let mut count = [0; 8];
        self.0.read_exact(&mut count).unwrap();
        u64::from_ne_bytes(count)
    }
}

fn run(script: &str, in_dune_mode: bool) -> Seen {
    let before = (total("vcpus"), total("syscalls"));
    let directory = format!("/tmp/programs-{}", std::process::id());
    fs::create_dir_all(&directory).unwrap();
    let mut command = Command::new("/bin/bash");
    command
        .args(["-c", script])
        .current_dir(&directory)
        .env("HOME", &directory)
        .stdin(Stdio::null());
    if in_dune_mode {
        command.env("LD_PRELOAD", PRELOAD).env("DUNE_PRELOAD", "must");
    }
    let counts = [
        "raw_syscalls/sys_enter",
        "sched/sched_process_fork",
        "sched/sched_process_exec",
    ]
    .map(Count::of_the_next_program);
    let output = command.output().unwrap();
    let [calls, made, executed] = counts.map(Count::end);
    fs::remove_dir_all(&directory).unwrap();
    Seen {
        output: String::from_utf8_lossy(&output.stdout).into_owned(),
        errors: String::from_utf8_lossy(&output.stderr).into_owned(),
        status: output.status.code(),
        vcpus: total("vcpus") - before.0,
        forwarded: total("syscalls") - before.1,
        calls,
        made,
        executed,
    }
}

/// What is not the same in Dune mode, and why.
const DIFFERENCES: &str = include_str!("../programs/differences.txt");

/// What is listed of a test: the word behind its name and `what`.
fn listed<'a>(test: &str, what: &str) -> Option<&'a str> {
    DIFFERENCES.lines().find_map(|line| {
        let mut words = line.split(' ');
        (words.next() == Some(test) && words.next() == Some(what)).then(|| words.next().unwrap())
    })
}

/// Whether what must hold unless it is listed does so; and does not, if it is.
#[track_caller]
fn assert_unless_listed(test: &str, what: &str, holds: bool, message: &str) {
    let is_listed = listed(test, what).is_some();
    assert!(holds || is_listed, "{what}: {message}");
    assert!(!holds || !is_listed, "{test}'s {what} is no difference any more");
}

/// Runs the script both ways; it must end as given. The tree of its processes is counted in Dune mode: natively a script that
/// waits for something may need another number of programs.
#[track_caller]
fn same_in_and_out(test: &str, script: &str, status: i32) {
    let outside = run(script, false);
    assert_eq!((outside.vcpus, outside.forwarded), (0, 0), "without the library");
    println!(
        "outside: {} system calls\n{}\n{}",
        outside.calls, outside.output, outside.errors
    );
    assert_eq!(outside.status, Some(status), "outside");
    let inside = run(script, true);
    assert_eq!(inside.output, outside.output);
    let errors = format!("inside:\n{}\noutside:\n{}", inside.errors, outside.errors);
    assert_unless_listed(test, "stderr", inside.errors == outside.errors, &errors);
    assert_eq!(inside.status, outside.status);
    let share = inside.forwarded * 100 / outside.calls;
    let report = format!(
        "{} vCPUs for {} programs and {} forks, {} and {} outside; {} system calls forwarded, {share} % of the {} outside",
        inside.vcpus, inside.executed, inside.made, outside.executed, outside.made, inside.forwarded, outside.calls
    );
    println!("report: {report}");
    assert!(inside.executed > 0 && outside.executed > 0, "{report}");
    // The first process, and whatever was made; what is linked statically does not enter, and makes none here.
    assert!(inside.vcpus > inside.made, "{report}");
    // 90 per cent unless listed.
    let expected = listed(test, "forwarded").map_or(90, |share| share.parse().unwrap());
    assert!(share >= expected, "{report}");
    assert_unless_listed(test, "forwarded", share >= 90, &report);
}

/// The loops outweigh what twenty programs call before they enter: without the second one the share was 90 per cent or just below.
fn bash_pipes_jobs_and_traps() {
    same_in_and_out(
        "bash_pipes_jobs_and_traps",
        r#"
        echo hello $((6 * 7))
        for i in 1 2 3; do echo $i; done | tail -n 1
        (exit 3); echo $?
        x=$(echo sub | tr a-z A-Z); echo "$x"
        sleep 0.05 & wait; echo waited
        trap 'echo trapped' USR1; kill -USR1 $$; echo after
        trap 'echo child' CHLD; (exit 1); trap - CHLD
        set -m; sleep 0.1 & jobs | sed 's/Running *//'; fg >/dev/null; echo $?
        { sleep 10 & kill -STOP $!; kill -CONT $!; kill -TERM $!; wait $!; echo $?; } 2>/dev/null
        cat <(echo one; echo two) | sort -r
        for ((i = 1; i <= 2000; i++)); do echo $i; done | while read -r n; do echo $((n * 2)); done | tail -n 1
        exec 3>file; echo written >&3; exec 3>&-; cat file
        for ((i = 0; i < 600; i++)); do : <file; done
        ulimit -n; umask; type cd
        exit 7
        "#,
        7,
    );
}

fn python_threads_subprocess_and_signals() {
    same_in_and_out(
        "python_threads_subprocess_and_signals",
        r#"python3 - <<'END'
import os, signal, subprocess, sys, threading, time, mmap, select
r = []
ts = [threading.Thread(target=lambda i=i: r.append(sum(range(i * 1000)))) for i in range(20)]
[t.start() for t in ts]; [t.join() for t in ts]
print(sorted(r)[-1], len(r))
print(subprocess.run(["echo", "sub"], capture_output=True).stdout)
print(subprocess.check_output("echo $((1 + 1)) | cat", shell=True, executable="/bin/bash"))
got = []
signal.signal(signal.SIGUSR1, lambda s, f: got.append(s))
for _ in range(5): os.kill(os.getpid(), signal.SIGUSR1)
print(got)
signal.signal(signal.SIGALRM, lambda s, f: got.append(s))
signal.setitimer(signal.ITIMER_REAL, 0.02)
time.sleep(0.1)
print(got[-1] == signal.SIGALRM)
pid = os.fork()
if pid == 0: os._exit(5)
print(os.waitpid(pid, 0)[1] >> 8)
a, b = os.pipe()
if os.fork() == 0:
    os.write(b, b"x" * 100000); os._exit(0)
os.close(b)
n = 0
while True:
    d = os.read(a, 65536)
    if not d: break
    n += len(d)
print(n)
m = mmap.mmap(-1, 1 << 20); m[:5] = b"hello"; print(m[:5])
with open("lines", "w", buffering=1) as f:
    for i in range(9000): print(i, file=f)
print(sum(int(l) for l in open("lines", buffering=64)))
d = {i: str(i) for i in range(100000)}
print(len(d), sum(len(v) for v in d.values()))
try:
    os.kill(os.getpid(), signal.SIGINT); time.sleep(1)
except KeyboardInterrupt:
    print("interrupted")
sys.exit(4)
END
"#,
        4,
    );
}

fn sqlite_with_a_large_database() {
    same_in_and_out(
        "sqlite_with_a_large_database",
        r#"sqlite3 test.db <<'END'
pragma journal_mode = wal;
create table t(id integer primary key, a text, b blob);
with recursive c(x) as (select 1 union all select x + 1 from c where x < 25000)
    insert into t select x, 'text ' || x, zeroblob(2000) from c;
create index i on t(a);
select count(*), sum(id), sum(length(b)) from t;
begin; update t set a = a || '!' where id % 10 = 0; rollback;
select count(*) from t where a like '%!';
delete from t where id % 2 = 0; vacuum;
select count(*) from t;
pragma integrity_check;
END
stat -c %s test.db"#,
        0,
    );
}

/// The headers outweigh what gcc, cc1 and as call before they enter.
fn gcc_compiles_a_file() {
    same_in_and_out(
        "gcc_compiles_a_file",
        r#"{ for ((i = 1; i <= 320; i++)); do echo "int f$i(int);" >f$i.h; printf '#include "%s"\n' f$i.h; done
echo 'int f0(int x) { return x; }'
for ((i = 1; i <= 60; i++)); do echo "int f$i(int x) { return x * $i + f$((i - 1))(x - 1); }"; done; } >a.c
gcc -O2 -S a.c -o a.s || exit; md5sum a.s
gcc -O1 -c a.c -o a.o || exit; md5sum a.o
echo 'int f( {' >bad.c; gcc -c bad.c; [ $? = 1 ]"#,
        0,
    );
}

fn redis_serves_its_benchmark() {
    same_in_and_out(
        "redis_serves_its_benchmark",
        r#"ip link set lo up 2>/dev/null || ifconfig lo up
redis-server --port 7777 --save '' --daemonize no --io-threads 2 --dir . >log 2>&1 &
server=$!
for i in $(seq 1 100); do redis-cli -p 7777 ping 2>/dev/null | grep -q PONG && break; sleep 0.05; done
redis-cli -p 7777 set key value; redis-cli -p 7777 get key
redis-benchmark -p 7777 -n 1000 -c 8 -t set,get,lpush -q --csv | cut -d, -f1
for i in 1 2 3; do redis-cli -p 7777 incr counter; done
redis-cli -p 7777 bgsave; sleep 0.3; redis-cli -p 7777 dbsize
redis-cli -p 7777 shutdown nosave; wait $server; echo $?"#,
        0,
    );
}

/// All come to a good end, but for madvise, which does not outside either where the file system is in memory. The many switches
/// outweigh what 22 programs with many libraries call before they enter.
fn stress_ng_families() {
    same_in_and_out(
        "stress_ng_families",
        r#"for family in fork:20 vfork:20 clone:20 mmap:2 brk:200 signal:200 sigsegv:30 futex:200 pthread:10 \
    switch:20000 timer:50 sigq:50 mremap:3 madvise:3 msync:3 stack:2 sigfpe:30 sigsuspend:50 nanosleep:50 vm:2 malloc:50 \
    memcpy:5; do
    stressor=${family%:*}; ops=${family#*:}
    stress-ng --quiet --$stressor 1 --$stressor-ops $ops --vm-bytes 4m --mmap-bytes 4m >/dev/null 2>&1
    result="$stressor $?"; echo "$result"
    case $result in *" 0" | "madvise 2") ;; *) failed=1 ;; esac
done
exit ${failed:-0}"#,
        0,
    );
}

/// 100 goroutines, collections that preempt them by SIGURG, faults that become panics, signals, children.
fn cgo_program_with_goroutines() {
    same_in_and_out("cgo_program_with_goroutines", "/usr/bin/goroutines", 9);
}

/// Threads, G1's collections and safepoints, null pointers and stack overflows by SIGSEGV, compiled code, a child.
fn java_threads_and_collections() {
    same_in_and_out(
        "java_threads_and_collections",
        "/usr/lib/java/bin/java -XX:+UseG1GC -Xmx32m -cp /usr/lib/java/classes Collected",
        9,
    );
}
