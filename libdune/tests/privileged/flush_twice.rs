// SPDX-License-Identifier: MIT OR Apache-2.0

use libdune::Gva;
use libdune::PageTable;
use libdune::Permissions;

fn twice(table: &PageTable, page: Gva) {
    let flush = table.protect(page, 4096, Permissions::READ).unwrap();
    flush.ignore();
    flush.flush();
}

fn main() {}
