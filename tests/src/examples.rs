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
];

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
