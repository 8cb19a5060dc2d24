// SPDX-License-Identifier: MIT OR Apache-2.0

use std::sync::atomic::Ordering::Relaxed;

use libdune::edit::Missing;
use libdune::Dune;
use libdune::Gva;

fn main() {
    let dune = Dune::enter().unwrap();
    let table = dune.new_page_table().unwrap();
    let entry = table.entry(Gva::new(0x1000).unwrap(), 1, Missing::Make).unwrap();
    drop(table);
    entry.word.store(0, Relaxed);
}
