// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the documents say, done: the examples of libdune's documentation (`build.rs` collects them) and the programs of
//! docs/guide.md. `make check-docs` compares listings and output.

use std::fmt::Debug;

use libdune::Dune;

use crate::check;
use crate::check_ok;
use crate::framework::Outcome;
use crate::framework::Test;
use crate::helpers;
use crate::support::spawn;

pub const TESTS: &[Test] = &[
    Test::asserting("documentation_examples_run", documentation_examples_run),
    Test::new("guide_programs_run", guide_programs_run),
];

#[allow(warnings, clippy::all)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/documentation.rs"));
}

/// What an example may return.
trait End {
    fn check(self);
}

impl End for () {
    fn check(self) {}
}

impl<E: Debug> End for Result<(), E> {
    fn check(self) {
        self.unwrap();
    }
}

fn ended(end: impl End) {
    end.check();
}

/// Each in a process of its own, which it must leave outside Dune mode.
fn documentation_examples_run() {
    println!("report: {} examples", generated::EXAMPLES.len());
    assert!(!generated::EXAMPLES.is_empty());
    for (place, example) in generated::EXAMPLES {
        let ended = spawn(|| {
            example();
            assert!(!Dune::is_active(), "it is still in Dune mode");
        })
        .wait();
        assert_eq!(ended.status, 0, "libdune/src/{place}: {}", ended.output);
    }
}

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
