// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tests of the harness: each makes a run red in its own way, and `make test`
//! demands that it does. Two ordinary ones check what the runner promises.

use std::fs;
use std::time::Duration;

use crate::check;
use crate::check_eq;
use crate::check_ok;
use crate::framework::Outcome;
use crate::framework::Suite;
use crate::framework::Test;
use crate::framework::User;
use crate::helpers;

pub const TESTS: &[Test] = &[
    Test::new("tester_is_unprivileged_and_in_the_group", tester_is_unprivileged),
    Test::new("outsider_is_not_in_the_group", outsider_is_outside).run_as(User::Outsider),
    Test::new("harness_passes", || Outcome::Pass).suite(Suite::Harness),
    Test::new("harness_fails", || Outcome::Fail("on purpose".into())).suite(Suite::Harness),
    Test::new("harness_panics", || panic!("on purpose")).suite(Suite::Harness),
    Test::new("harness_exits_early", || std::process::exit(0)).suite(Suite::Harness),
    Test::new("harness_hangs", hangs).suite(Suite::Harness).timeout_s(2),
    Test::new("harness_hangs_the_machine", hangs)
        .suite(Suite::Harness)
        .timeout_s(100_000),
    Test::new("harness_skips", || Outcome::Skip("on purpose".into())).suite(Suite::Harness),
    Test::new("harness_writes_out_of_bounds", writes_out_of_bounds)
        .suite(Suite::Harness)
        .run_as(User::Root),
    Test::new("harness_oopses_the_kernel", oopses)
        .suite(Suite::Harness)
        .run_as(User::Root),
    Test::new("harness_warns_in_the_kernel", warns)
        .suite(Suite::Harness)
        .run_as(User::Root),
    Test::new("harness_leaks_memory_of_the_kernel", leaks)
        .suite(Suite::Harness)
        .run_as(User::Root),
];

fn groups() -> Vec<u32> {
    let mut groups = [0u32; 64];
    // SAFETY: the array has as many places as the call is told.
    let count = unsafe { libc::getgroups(groups.len() as i32, groups.as_mut_ptr()) };
    groups[..usize::try_from(count).unwrap_or(0)].to_vec()
}

fn dune_group() -> Option<u32> {
    let text = fs::read_to_string("/etc/group").ok()?;
    let line = text.lines().find(|line| line.starts_with("dune:"))?;
    line.split(':').nth(2)?.parse().ok()
}

fn tester_is_unprivileged() -> Outcome {
    check!(!helpers::is_root());
    let Some(group) = dune_group() else {
        return Outcome::Fail("there is no group dune".into());
    };
    check!(groups().contains(&group), "{:?} without {group}", groups());
    let status = check_ok!(fs::read_to_string("/proc/self/status"));
    let effective = status.lines().find(|line| line.starts_with("CapEff:"));
    check_eq!(
        effective.map(|line| line.trim_start_matches("CapEff:").trim()),
        Some("0000000000000000")
    );
    Outcome::Pass
}

fn outsider_is_outside() -> Outcome {
    check!(!helpers::is_root());
    let Some(group) = dune_group() else {
        return Outcome::Fail("there is no group dune".into());
    };
    check!(!groups().contains(&group), "{:?} with {group}", groups());
    Outcome::Pass
}

fn hangs() -> Outcome {
    std::thread::sleep(Duration::from_secs(100_000));
    Outcome::Pass
}

/// The module's knob for mistakes, of the test and debug kernels only.
fn mistake(which: &str) -> Outcome {
    check_ok!(fs::write("/sys/module/dune/parameters/mistake", which));
    Outcome::Pass
}

/// Whatever survives it has not been noticed.
fn fatal(which: &str) -> Outcome {
    match mistake(which) {
        Outcome::Pass => Outcome::Fail("nobody noticed".into()),
        other => other,
    }
}

fn oopses() -> Outcome {
    fatal("null")
}

fn warns() -> Outcome {
    fatal("warning")
}

/// KASAN must see it, and that ends the machine.
fn writes_out_of_bounds() -> Outcome {
    fatal("out_of_bounds")
}

/// kmemleak must see it, at the end of the machine.
fn leaks() -> Outcome {
    mistake("leak")
}
