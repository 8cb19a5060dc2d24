// SPDX-License-Identifier: MIT OR Apache-2.0

use libdune::trap::Handler;
use libdune::Outcome;

// It could interrupt the allocator. A plain handler holds nothing, so there is no Vec for it to push to.
fn main() {
    let mut addresses = Vec::new();
    let _handler: Handler = |frame, _| {
        addresses.push(frame.cr2);
        Outcome::Resume
    };
}
