// SPDX-License-Identifier: MIT OR Apache-2.0

//! Page tables of the program's own: other memory behind an address, and which pages were written.

use std::error::Error;

use libdune::paging::Used;
use libdune::Dune;
use libdune::Gva;
use libdune::Hva;
use libdune::Permissions;

const PAGE: u64 = 4096;

/// One page, alone.
#[repr(C, align(4096))]
struct Page([u8; 4096]);

/// Reads the first byte now: the compiler does not know that the memory behind an address can change.
fn first(page: &Page) -> char {
    // SAFETY: Reads the page.
    unsafe { (&raw const page.0[0]).read_volatile() }.into()
}

// ANCHOR: elsewhere
/// Two tables, in which the same address means different memory.
fn same_address_twice(dune: &Dune) -> Result<[char; 3], Box<dyn Error>> {
    let page = Box::new(Page([b'a'; 4096]));
    let other = Box::new(Page([b'b'; 4096]));
    let gva = Gva::of(&raw const *page).ok_or("not canonical")?;
    let hva = Hva::new(&raw const *other as u64).ok_or("not of this process")?;

    let table = dune.new_page_table()?;
    // No TLB has anything of a table that was never loaded.
    table.map(gva, PAGE, hva, Permissions::READ)?.ignore();

    let before = first(&page);
    // SAFETY: But for the one page the table maps what the default one does.
    unsafe { dune.load(&table) };
    let elsewhere = first(&page);
    // SAFETY: The default table.
    unsafe { dune.load(&dune.address_space()) };
    Ok([before, elsewhere, first(&page)])
}
// ANCHOR_END: elsewhere

// ANCHOR: dirty
/// Numbers of the pages that were written, as the CPU noted them.
fn written_pages(dune: &Dune) -> Result<Vec<u64>, Box<dyn Error>> {
    let mut pages: Vec<Page> = (0..16).map(|_| Page([0; 4096])).collect();
    let start = Gva::of(pages.as_ptr()).ok_or("not canonical")?;
    let bytes = pages.len() as u64 * PAGE;
    let space = dune.address_space();
    // From here on a page is 4 KiB, and clean.
    space.clear_accessed_dirty(start, bytes)?.flush();

    pages[3].0[17] = 1;
    pages[7].0[0] = 1;

    let mut written = Vec::new();
    space
        .take_used(start, bytes, Used::Dirty, |page| {
            written.push((page.start.as_u64() - start.as_u64()) / PAGE);
        })?
        .flush();
    Ok(written)
}
// ANCHOR_END: dirty

fn main() -> Result<(), Box<dyn Error>> {
    let dune = Dune::enter()?;
    let seen = same_address_twice(&dune)?;
    println!("the same address: {seen:?}");
    let written = written_pages(&dune)?;
    println!("pages written: {written:?}");
    dune.leave();
    if seen != ['a', 'b', 'a'] || written != [3, 7] {
        return Err("not what was expected".into());
    }
    Ok(())
}
