// SPDX-License-Identifier: MIT OR Apache-2.0

#![deny(unused_must_use)]

use libdune::Gva;
use libdune::PageTable;
use libdune::Permissions;

fn forget(table: &PageTable, page: Gva) {
    table.protect(page, 4096, Permissions::READ).unwrap();
}

fn main() {}
