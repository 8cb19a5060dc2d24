// SPDX-License-Identifier: MIT OR Apache-2.0

//! Where code and constants of the program and its libraries are.
//!
//! # Safety
//!
//! The dynamic linker's own list is read, under its lock.

use core::ffi::c_int;
use core::ffi::c_void;

use crate::addr::Gva;
use crate::addr::PAGE_BYTES;
use crate::cpl3;
use crate::paging::AddressSpace;
use crate::paging::PagingError;
use crate::paging::Permissions;

/// Whole pages, and what code may do with them.
struct Range {
    start: u64,
    end: u64,
    permissions: Permissions,
}

/// Objects as they come: the program is the first.
#[derive(Default)]
struct Seen {
    objects: usize,
    ranges: Vec<Range>,
}

/// Maps what every code needs: code and constants, static data of libraries to be read, and what SYSCALL looks at.
pub(super) fn map(table: &AddressSpace<'_>) -> Result<(), PagingError> {
    let mut seen = Seen::default();
    // SAFETY: The function below takes what it is called with.
    unsafe { libc::dl_iterate_phdr(Some(note), (&raw mut seen).cast()) };
    let (start, bytes) = cpl3::slots();
    seen.ranges.push(Range {
        start,
        end: start + bytes,
        permissions: Permissions::WRITE,
    });
    for Range {
        start,
        end,
        permissions,
    } in seen.ranges
    {
        if let Some((gva, hva)) = Gva::new(start).and_then(|gva| Some((gva, gva.identity()?))) {
            // Nobody has the table yet.
            table.map(gva, end - start, hva, permissions)?.ignore();
        }
    }
    Ok(())
}

/// Notes what is to be mapped of one object; of two ranges that overlap the later one counts.
unsafe extern "C" fn note(object: *mut libc::dl_phdr_info, _: usize, seen: *mut c_void) -> c_int {
    // SAFETY: The dynamic linker's, alive during the call; `seen` is the caller's.
    let (object, seen, headers) = unsafe {
        let object = &*object;
        let headers = core::slice::from_raw_parts(object.dlpi_phdr, object.dlpi_phnum.into());
        (object, &mut *seen.cast::<Seen>(), headers)
    };
    let is_program = seen.objects == 0;
    seen.objects += 1;
    let mut add = |header: &libc::Elf64_Phdr, permissions| {
        let start = object.dlpi_addr.wrapping_add(header.p_vaddr);
        seen.ranges.push(Range {
            start: start & !(PAGE_BYTES - 1),
            end: start.wrapping_add(header.p_memsz).next_multiple_of(PAGE_BYTES),
            permissions,
        });
    };
    for header in headers.iter().filter(|header| header.p_type == libc::PT_LOAD) {
        if header.p_flags & libc::PF_X != 0 {
            add(header, Permissions::EXECUTE);
        } else if header.p_flags & libc::PF_W == 0 || !is_program {
            add(header, Permissions::READ);
        }
    }
    // Written once, by the dynamic linker: addresses of functions and constants. Its last page is data again if it ends within.
    for header in headers.iter().filter(|header| header.p_type == libc::PT_GNU_RELRO) {
        let whole = libc::Elf64_Phdr {
            p_memsz: ((header.p_vaddr + header.p_memsz) & !(PAGE_BYTES - 1)).saturating_sub(header.p_vaddr),
            ..*header
        };
        if whole.p_memsz != 0 {
            add(&whole, Permissions::READ);
        }
    }
    0
}
