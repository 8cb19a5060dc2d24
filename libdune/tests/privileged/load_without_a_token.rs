// SPDX-License-Identifier: MIT OR Apache-2.0

fn load(table: &libdune::PageTable) {
    unsafe { table.load() };
}

fn main() {}
