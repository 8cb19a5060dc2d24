// SPDX-License-Identifier: MIT OR Apache-2.0

fn main() {
    let mut kept = None;
    libdune::Thread::with_current(|token| kept = Some(token));
    kept.unwrap().flush_all();
}
