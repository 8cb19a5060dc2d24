// SPDX-License-Identifier: MIT OR Apache-2.0

//! dune_vm_page_walk.
//!
//! # Safety
//!
//! Calls back with pointers to entries, which stay where they are until a large page takes their table's place, or the table is
//! freed: see docs/c-abi.md.

use core::ffi::c_int;
use core::ffi::c_void;
use core::sync::atomic::Ordering::Acquire;

use libdune::edit::Missing;
use libdune::edit::RawEntry;
use libdune::AddressSpace;
use libdune::Gpa;
use libdune::Gva;
use libdune::PagingError;

use crate::entry::pgroot;
use crate::entry::shared;
use crate::page::dune_page_base;
use crate::page::GIB;
use crate::page::PAGE;
use crate::procmap::Maps;
use crate::vm::ptent_t;
use crate::vm::table;
use crate::vm::PTE_ADDR;
use crate::vm::PTE_P;

/// Entries of which the program hears before the table is looked at again.
const AT_ONCE: usize = 64;

/// Called for each page of a walk; anything but 0 ends it.
pub type page_walk_cb = Option<unsafe extern "C" fn(arg: *const c_void, ptep: *mut ptent_t, va: *mut c_void) -> c_int>;

/// Above so many bytes of a walk only what the process has mapped is taken to pieces of 4 KiB.
const LARGE_WALK: u64 = 1 << 30;

/// Calls `cb` for each page that is mapped to something, from that of `start_va` to that of `end_va`, that included:
/// `end_va` is the last address. Pages are of 4 KiB, large where the program mapped them so. A walk of more than 1 GiB
/// passes over memory of the default page table that is not mapped in the process (VA_START to VA_END: all there is).
///
/// 0, what `cb` returned, -EINVAL, -ENOMEM.
#[no_mangle]
pub unsafe extern "C" fn dune_vm_page_walk(
    root: *mut ptent_t,
    start_va: *mut c_void,
    end_va: *mut c_void,
    cb: page_walk_cb,
    arg: *const c_void,
) -> c_int {
    let (Ok(space), Some(cb)) = (table(root), cb) else {
        return -libc::EINVAL;
    };
    let (Some(first), Some(last)) = (Gva::new(start_va as u64), Gva::new(end_va as u64)) else {
        return -libc::EINVAL;
    };
    if last < first {
        return -libc::EINVAL;
    }
    let mut walk = Walk {
        space,
        // SAFETY: The caller's function and its argument.
        call: &mut |at: Gva, entry: *mut ptent_t| unsafe { cb(arg, entry, at.as_u64() as *mut c_void) },
    };
    let result = if last.as_u64() - first.as_u64() <= LARGE_WALK {
        walk.pages(first, last)
    } else {
        walk.all(first, last)
    };
    result.err().unwrap_or(0)
}

struct Walk<'w> {
    space: AddressSpace<'static>,
    call: &'w mut dyn FnMut(Gva, *mut ptent_t) -> c_int,
}

/// An entry that the program is to hear of.
#[derive(Clone, Copy)]
struct Visited {
    at: Gva,
    /// What it decides about ends here.
    last: Gva,
    entry: *mut ptent_t,
    value: u64,
}

impl Visited {
    fn of(at: Gva, entry: &RawEntry<'_>) -> Self {
        Self {
            at,
            last: Gva::new(at.as_u64() | (entry.bytes() - 1)).unwrap_or(at),
            entry: entry.word.as_ptr(),
            value: entry.word.load(Acquire),
        }
    }
}

/// Calls the program, which may do what it likes: no entry is lent meanwhile.
fn visit(call: &mut dyn FnMut(Gva, *mut ptent_t) -> c_int, visited: &Visited) -> Result<(), c_int> {
    if visited.value & (PTE_ADDR | PTE_P) == 0 {
        return Ok(());
    }
    match call(visited.at, visited.entry) {
        0 => Ok(()),
        other => Err(other),
    }
}

impl Walk<'_> {
    /// Page by page.
    fn pages(&mut self, first: Gva, last: Gva) -> Result<(), c_int> {
        let mut at = first.align_down(PAGE);
        loop {
            let look = |entry: RawEntry<'_>| Visited::of(at.align_down(entry.bytes()), &entry);
            let step = match self.space.with_entry(at, 1, Missing::Tell, look) {
                Ok(visited) => {
                    visit(self.call, &visited)?;
                    visited.last.as_u64() - at.as_u64() + 1
                }
                Err(PagingError::NotMapped(_)) => self.space.gap(at),
                Err(_) => return Err(-libc::ENOMEM),
            };
            match at.checked_add(step) {
                Some(next) if next <= last => at = next,
                _ => return Ok(()),
            }
        }
    }

    /// What the process has, page by page, and the rest as it is in the table, in order.
    fn all(&mut self, first: Gva, last: Gva) -> Result<(), c_int> {
        let maps = Maps::read().ok_or(-libc::ENOMEM)?;
        let own = [pgroot.load(Acquire) as u64 & !(GIB - 1), dune_page_base.load(Acquire)];
        let mut at = first;
        for entry in maps.iter() {
            let (Some(begin), Some(end)) = (Gva::new(entry.begin), Gva::new(entry.end - 1)) else {
                continue;
            };
            if end < at {
                continue;
            }
            if begin > last {
                break;
            }
            if begin > at {
                self.rest(at, Gva::new(entry.begin - 1).unwrap_or(begin))?;
            }
            // Not what is only reserved, nor libdune's, nor the vsyscall page.
            let is_programs = entry.is_accessible() && !own.contains(&(entry.begin & !(GIB - 1)));
            if is_programs && entry.begin >> 47 == 0 {
                self.pages(begin.max(at), end.min(last))?;
            }
            match Gva::new(entry.end) {
                Some(next) if next <= last => at = next,
                _ => return Ok(()),
            }
        }
        self.rest(at, last)
    }

    /// Entries where the process has nothing: what the program mapped there.
    fn rest(&mut self, first: Gva, last: Gva) -> Result<(), c_int> {
        let shared = shared().map_err(|errno| -errno)?;
        let Self { space, call } = self;
        let mut at = first;
        loop {
            let mut found = [const { None }; AT_ONCE];
            let mut count = 0;
            space.for_each_entry(at, last, |at, entry| {
                let visited = Visited::of(at, &entry);
                let page = visited.value & PTE_ADDR & !(entry.bytes() - 1);
                // Memory of the process at its own address is nothing that was mapped there on purpose.
                let is_own = Gpa::new(page)
                    .and_then(|gpa| shared.hva(gpa))
                    .is_some_and(|hva| hva.as_u64() == at.as_u64());
                if !is_own {
                    found[count] = Some(visited);
                    count += 1;
                }
                count < AT_ONCE
            });
            for visited in found.iter().flatten() {
                visit(*call, visited)?;
            }
            // Behind the last of a full list: there may be more.
            let end = found[AT_ONCE - 1].as_ref().map(|visited| visited.last);
            match end.and_then(Gva::successor).filter(|next| *next <= last) {
                Some(next) => at = next,
                None => return Ok(()),
            }
        }
    }
}
