// SPDX-License-Identifier: MIT OR Apache-2.0

use std::sync::atomic::Ordering::Relaxed;

use libdune::edit::Missing;
use libdune::Dune;
use libdune::Gva;

// Its page table may be gone after the closure.
fn main() {
    let dune = Dune::enter().unwrap();
    let table = dune.new_page_table().unwrap();
    let mut kept = None;
    table.with_entry(Gva::new(0x1000).unwrap(), 1, Missing::Make, |entry| kept = Some(entry)).unwrap();
    kept.unwrap().word.store(0, Relaxed);
}
