// SPDX-License-Identifier: MIT OR Apache-2.0
//! `make bench-lib`: what libdune is there for, each thing beside Linux' own ways to it, from one run.

use super::chart::distinct;
use super::results::Results;

/// Where a figure is: bench, system.
type Place = (&'static str, &'static str);

/// Something that programs want done.
struct Job {
    what: &'static str,
    /// How libdune does it.
    own: Place,
    /// Others, with what they are.
    others: &'static [(Place, &'static str)],
}

const fn job(what: &'static str, own: Place, others: &'static [(Place, &'static str)]) -> Job {
    Job { what, own, others }
}

const GC_OTHERS: [&str; 3] = ["Linux: mprotect + SIGSEGV", "Linux: userfaultfd", "Linux: PAGEMAP_SCAN"];

/// A row of the collectors: its libdune has two barriers.
macro_rules! gc {
    ($what:literal, $bench:literal) => {
        job(
            $what,
            ($bench, "Dune: dirty bits"),
            &[
                (($bench, "Dune: protect + #PF"), "libdune: protect, #PF"),
                (($bench, GC_OTHERS[0]), "mprotect, SIGSEGV"),
                (($bench, GC_OTHERS[1]), "userfaultfd"),
                (($bench, GC_OTHERS[2]), "PAGEMAP_SCAN"),
            ],
        )
    };
}

/// Programs among the examples that print rows, too.
const PROGRAMS: [&str; 2] = [
    "sthread --requests 12 --rows",
    "gc --live 6000 --heap 1024 --operations 1500 --rows",
];

/// A thing more to compare is a row of dune-bench, or of one of `PROGRAMS`, and an entry here.
const JOBS: &[Job] = &[
    job(
        "trap: store to a protected page until the handler",
        ("trap", "dune"),
        &[(("trap", "linux"), "SIGSEGV")],
    ),
    job(
        "trap, handler makes the page writable, store is done",
        ("trap_fix", "dune"),
        &[
            (("trap_fix", "linux"), "SIGSEGV, mprotect"),
            (("trap_fix", "userfaultfd"), "userfaultfd, another thread"),
        ],
    ),
    job(
        "protect 1,000 pages",
        ("protect_1000", "dune"),
        &[(("protect_1000", "linux"), "mprotect")],
    ),
    job(
        "CPL0, CPL3, its system call, CPL0",
        ("intercept_cpl3", "dune"),
        &[
            (("ptrace_getpid", "ptrace SYSEMU"), "ptrace SYSEMU"),
            (("ptrace_getpid", "ptrace SYSCALL"), "ptrace SYSCALL"),
        ],
    ),
    job(
        "getpid of CPL3, passed on by CPL0",
        ("ptrace_getpid", "dune"),
        &[(("ptrace_getpid", "ptrace SYSCALL"), "ptrace SYSCALL")],
    ),
    job(
        "system call intercepted, answered in place",
        ("intercept", "dune"),
        &[
            (("intercept", "user dispatch"), "user dispatch"),
            (("intercept", "seccomp notification"), "seccomp notification"),
            (("ptrace_getpid", "ptrace SYSEMU"), "ptrace SYSEMU"),
        ],
    ),
    job(
        "first write to a page whose writes are noted",
        ("dirty_write", "dune"),
        &[
            (("dirty_write", "userfaultfd WP_ASYNC"), "userfaultfd WP_ASYNC"),
            (("dirty_write", "soft-dirty"), "soft-dirty"),
        ],
    ),
    job(
        "which of 1,000 pages were written, and anew",
        ("dirty_scan", "dune"),
        &[
            (("dirty_scan", "userfaultfd WP_ASYNC"), "PAGEMAP_SCAN"),
            (("dirty_scan", "soft-dirty"), "soft-dirty"),
        ],
    ),
    job(
        "another page table and back",
        ("table_switch_and_back", "dune"),
        &[(
            ("table_switch_and_back", "two processes, pipes"),
            "two processes, pipes",
        )],
    ),
    job(
        "sthread: make, wait for its end",
        ("sthread_make", "sthread"),
        &[
            (("sthread_make", "compartment"), "libdune: no thread of its own"),
            (("sthread_make", "process (fork)"), "fork, waitpid"),
            (("sthread_make", "thread"), "pthread_create, pthread_join"),
        ],
    ),
    job(
        "compartment for a request: make, answer, give back",
        ("sthread", "compartment"),
        &[
            (("sthread", "compartment, used again"), "libdune: used again, wiped"),
            (("sthread", "compartment in a new thread"), "libdune: in a new thread"),
            (("sthread", "process (fork)"), "fork"),
        ],
    ),
    job(
        "the client's whole request",
        ("sthread_request", "compartment"),
        &[
            (
                ("sthread_request", "compartment, used again"),
                "libdune: used again, wiped",
            ),
            (
                ("sthread_request", "compartment in a new thread"),
                "libdune: in a new thread",
            ),
            (("sthread_request", "process (fork)"), "fork"),
        ],
    ),
    gc!("collector, linked list: pause", "gc_pause linked list"),
    gc!("collector, linked list: asking the barrier", "gc_asking linked list"),
    gc!("collector, linked list: a change, all in all", "gc_change linked list"),
    gc!("collector, hash map: pause", "gc_pause hash map"),
    gc!("collector, hash map: asking the barrier", "gc_asking hash map"),
    gc!("collector, hash map: a change, all in all", "gc_change hash map"),
    gc!("collector, tree: pause", "gc_pause tree"),
    gc!("collector, tree: asking the barrier", "gc_asking tree"),
    gc!("collector, tree: a change, all in all", "gc_change tree"),
];

/// What prints the rows that the table needs, after dune-bench with these arguments.
pub fn command(arguments: &str) -> String {
    let rows = rows();
    let programs = PROGRAMS.join(" && ");
    format!("dune-bench{arguments} --system linux,dune --rows '{rows}' && {programs}")
}

/// The rows that dune-bench has to measure.
fn rows() -> String {
    let of_programs = |bench: &&str| bench.starts_with("gc_") || bench.starts_with("sthread");
    let rows = JOBS.iter().flat_map(|job| {
        let others = job.others.iter().map(|((bench, _), _)| *bench);
        [job.own.0].into_iter().chain(others)
    });
    distinct(rows.filter(|bench| !of_programs(bench))).join(",")
}

/// Prints the table. The rows that are missing, libdune's and others'.
pub fn print(results: &Results) -> Vec<String> {
    println!("\n{:<54} {:<30} {:>10} {:>8}", "", "", "median", "x");
    let mut missing = Vec::new();
    for job in JOBS {
        let Some(own) = results.find(job.own.0, job.own.1).map(|row| row.value) else {
            println!("{:<54} {:<30} {:>10}", job.what, "libdune", "missing");
            missing.push(named(job.own));
            continue;
        };
        println!("{:<54} {:<30} {own:>10}", job.what, "libdune");
        for ((bench, system), name) in job.others {
            match results.find(bench, system) {
                Some(row) => println!(
                    "{:<54} {name:<30} {:>10} {:>8.1}",
                    "",
                    row.value,
                    row.value as f64 / own.max(1) as f64
                ),
                None => {
                    println!("{:<54} {name:<30} {:>10}", "", "missing");
                    missing.push(named((bench, system)));
                }
            }
        }
    }
    missing
}

/// A row, as who looks for it would call it.
fn named((bench, system): Place) -> String {
    format!("{bench} of \"{system}\"")
}

#[cfg(test)]
mod tests {
    use super::super::results::Environment;
    use super::*;

    /// A run that has every row but one.
    fn without(left_out: Place) -> Results {
        let environment = Environment {
            kernel: String::new(),
            kernel_arguments: String::new(),
            cpu_model: String::new(),
            rustc: String::new(),
            kernel_rustc: String::new(),
            gcc: String::new(),
        };
        let mut results = Results::new(environment);
        let places = JOBS
            .iter()
            .flat_map(|job| [job.own].into_iter().chain(job.others.iter().map(|other| other.0)));
        for (bench, system) in places.filter(|place| *place != left_out) {
            let line = format!(
                r#"{{"bench":"{bench}","system":"{system}","value":5,"mean":5,"max":5,"n":1,"vm_exits":null}}"#
            );
            results.push(serde_json::from_str(&line).unwrap(), "");
        }
        results
    }

    #[test]
    fn missing_rows_are_named() {
        assert!(print(&without(("none", "none"))).is_empty());
        for job in JOBS {
            for place in [job.own].into_iter().chain(job.others.iter().map(|other| other.0)) {
                let missing = print(&without(place));
                assert!(missing.contains(&named(place)), "{place:?}: {missing:?}");
                assert!(missing.iter().all(|name| *name == named(place)), "{missing:?}");
            }
        }
    }

    #[test]
    fn each_row_is_asked_for_once() {
        let rows = rows();
        let names: Vec<&str> = rows.split(',').collect();
        let mut once = names.clone();
        once.sort_unstable();
        once.dedup();
        assert_eq!(once.len(), names.len());
        assert!(names.contains(&"table_switch_and_back"));
    }
}
