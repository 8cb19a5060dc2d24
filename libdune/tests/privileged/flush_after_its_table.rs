// SPDX-License-Identifier: MIT OR Apache-2.0

use libdune::Gva;
use libdune::PageTable;
use libdune::Permissions;

fn late(table: PageTable, page: Gva) {
    let flush = table.protect(page, 4096, Permissions::READ).unwrap();
    drop(table);
    flush.flush();
}

fn main() {}
