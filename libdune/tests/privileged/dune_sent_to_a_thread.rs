// SPDX-License-Identifier: MIT OR Apache-2.0

fn main() {
    let dune = libdune::Dune::enter().unwrap();
    spawn(move || dune.leave());
}

/// Wants what std's function wants; of that one a message shows the source, on machines that have it.
fn spawn<T>(_: impl FnOnce() -> T + Send) {}
