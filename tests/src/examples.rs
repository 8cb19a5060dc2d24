// SPDX-License-Identifier: MIT OR Apache-2.0

//! The larger examples, run as programs: they judge themselves, and what they print is looked at.

use crate::framework::Test;
use crate::helpers::run_program;

pub const TESTS: &[Test] = &[
    Test::asserting(
        "hostile_requests_stay_in_compartments",
        hostile_requests_stay_in_compartments,
    ),
    Test::asserting("collectors_come_to_the_same", collectors_come_to_the_same),
    Test::asserting(
        "collector_without_a_barrier_is_noticed",
        collector_without_a_barrier_is_noticed,
    ),
    Test::asserting("hostile_plugin_gets_errors_only", hostile_plugin_gets_errors_only),
    Test::asserting("words_are_the_same_in_and_out", words_are_the_same_in_and_out),
    Test::asserting("forwarded_call_costs_one_exit", forwarded_call_costs_one_exit),
];

fn hostile_plugin_gets_errors_only() {
    let ended = run_program("plugin", &[]).unwrap();
    assert_eq!(ended.status, 0, "{ended:?}");
    assert!(ended.stdout.contains("good plugin: Exit("), "{ended:?}");
    for (attempt, got) in [
        ("read the secret", "PageFault(read"),
        ("write the host's memory", "PageFault(write"),
        ("VMCALL past the host", "Exception(#UD"),
        ("open a file", "denied"),
        ("have the host read its secret", "denied"),
        ("have the host read too far", "denied"),
        ("flags DF NT AC IOPL at a call", "denied"),
        ("stack in the host's memory", "denied"),
        ("jump into the host's memory", "PageFault(execute"),
        ("turn interrupts off", "Exception(#GP"),
        ("loop for ever", "Timeout"),
    ] {
        let line = ended.stdout.lines().find(|line| line.trim_start().starts_with(attempt));
        assert!(line.is_some_and(|line| line.contains(got)), "{attempt}: {line:?}");
    }
    assert!(ended.stdout.contains("the host goes on"), "{ended:?}");
}

fn words_are_the_same_in_and_out() {
    let text = format!("/tmp/words-{}", std::process::id());
    let inside = run_program("wordcount", &["--generate", "16", &text]).unwrap();
    let outside = run_program("wordcount", &["--native", &text]).unwrap();
    std::fs::remove_file(&text).unwrap();
    assert_eq!((inside.status, outside.status), (0, 0), "{inside:?} {outside:?}");
    assert!(inside.stdout.lines().count() > 5, "{inside:?}");
    assert_eq!(inside.stdout, outside.stdout);
    assert!(inside.stderr.contains("at CPL 0"), "{inside:?}");
    assert!(outside.stderr.contains("at CPL 3"), "{outside:?}");
}

fn forwarded_call_costs_one_exit() {
    let ended = run_program("getpid", &["--calls", "200"]).unwrap();
    assert_eq!(ended.status, 0, "{ended:?}");
    let line = ended.stdout.lines().find(|line| line.contains("Dune mode, SYSCALL"));
    let exits = line.and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
    // One, and now and then the clock's.
    assert!(exits.is_some_and(|exits| (1.0..1.5).contains(&exits)), "{ended:?}");
}

fn hostile_requests_stay_in_compartments() {
    let ended = run_program("sthread", &["--requests", "2"]).unwrap();
    assert_eq!(ended.status, 0, "{ended:?}");
    assert_eq!(ended.stderr, "");
    // A forked child has a copy of the key, and hands it out; compartments do not.
    let line = |start: &str| {
        let line = ended.stdout.lines().find(|line| line.starts_with(start));
        line.unwrap_or_else(|| panic!("no line {start}: {ended:?}"))
            .trim_start_matches(start)
            .split("  ")
            .map(str::trim)
            .filter(|word| !word.is_empty())
            .collect::<Vec<_>>()
    };
    assert_eq!(line("read the server's key"), ["got it", "500", "500", "500"]);
    assert_eq!(line("read another request"), ["got it", "500", "500", "500"]);
    assert_eq!(line("write the server's key"), ["done", "500", "500", "500"]);
    assert_eq!(line("use up the stack"), ["500", "500", "500", "500"]);
    assert_eq!(line("divide by zero"), ["500", "500", "500", "500"]);
    assert_eq!(line("open a file"), ["done", "403", "403", "403"]);
    for made in ["process (fork)", "thread ", "sthread ", "compartment "] {
        let is_made = |line: &&str| {
            line.starts_with(made) && line.split_whitespace().count() == made.split_whitespace().count() + 2
        };
        assert!(ended.stdout.lines().any(|line| is_made(&line)), "{made}: {ended:?}");
    }
}

/// A heap that is small enough for a test, and full collections too.
const SMALL: [&str; 8] = [
    "--heap",
    "48",
    "--live",
    "200",
    "--operations",
    "300",
    "--nursery",
    "32",
];

fn collectors_come_to_the_same() {
    let ended = run_program("gc", &SMALL).unwrap();
    assert_eq!(ended.status, 0, "{ended:?}");
    assert_eq!(ended.stderr, "");
    for work in ["linked list", "hash map", "tree"] {
        let lines: Vec<&str> = ended.stdout.lines().filter(|line| line.starts_with(work)).collect();
        assert_eq!(lines.len(), 5, "barriers of the {work}: {ended:?}");
        let contents = |line: &&str| line.rsplit(' ').next().map(str::to_owned);
        assert!(
            lines.iter().all(|line| contents(line) == contents(&lines[0])),
            "{ended:?}"
        );
    }
}

fn collector_without_a_barrier_is_noticed() {
    let mut arguments = SMALL.to_vec();
    arguments.extend(["--barrier", "none"]);
    let ended = run_program("gc", &arguments).unwrap();
    assert_eq!(ended.status, 1, "{ended:?}");
    assert!(
        ended.stderr.contains("freed") || ended.stderr.contains("differs"),
        "{ended:?}"
    );
}
