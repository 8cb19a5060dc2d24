// SPDX-License-Identifier: MIT OR Apache-2.0

fn main() {
    let dune = libdune::Dune::enter().unwrap();
    let space = dune.address_space();
    std::thread::scope(|scope| {
        scope.spawn(move || space.root());
    });
}
