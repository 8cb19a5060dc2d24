// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the documents say, done: the programs of docs/guide.md. `make check-docs` compares listings and output.

use crate::check;
use crate::check_ok;
use crate::framework::Outcome;
use crate::framework::Test;
use crate::helpers;

pub const TESTS: &[Test] = &[Test::new("guide_programs_run", guide_programs_run)];

/// Each checks itself.
fn guide_programs_run() -> Outcome {
    let programs: [(&str, &[&str]); 5] = [
        ("hello", &[]),
        ("pagefault", &["--faults", "10"]),
        ("guide_page_table", &[]),
        ("guide_ring3", &[]),
        ("guide_hooks", &[]),
    ];
    for (program, arguments) in programs {
        let ended = check_ok!(helpers::run_program(program, arguments));
        check!(ended.status == 0, "{program}: {ended:?}");
    }
    Outcome::Pass
}
