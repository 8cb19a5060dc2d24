// SPDX-License-Identifier: MIT OR Apache-2.0

fn main() {
    let dune = libdune::Dune::enter().unwrap();
    let space = dune.address_space();
    dune.leave();
    space.root();
}
