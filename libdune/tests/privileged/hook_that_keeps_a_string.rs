// SPDX-License-Identifier: MIT OR Apache-2.0

use libdune::hook::Before;
use libdune::hook::Verdict;

// It could run in the middle of the allocator's own system calls.
fn main() {
    let mut log = String::new();
    let _hook: Before = |call, _| {
        log.push_str(if call.number() == 0 { "read" } else { "other" });
        Verdict::Allow
    };
}
