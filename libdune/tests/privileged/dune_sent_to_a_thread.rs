// SPDX-License-Identifier: MIT OR Apache-2.0

fn main() {
    let dune = libdune::Dune::enter().unwrap();
    std::thread::spawn(move || dune.leave());
}
