// SPDX-License-Identifier: MIT OR Apache-2.0

fn main() {
    let dune = libdune::Dune::enter().unwrap();
    let token = dune.thread();
    std::thread::scope(|scope| {
        scope.spawn(|| token.flush_all());
    });
}
