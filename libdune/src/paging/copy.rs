// SPDX-License-Identifier: MIT OR Apache-2.0

//! Writes to pages that are copied on write.
//!
//! # Safety
//!
//! Called by trap entry on the calling thread, whose loaded table the page is of: what that table lets CPL0 read can be
//! copied from there. Frames of a pool are nobody's until they are mapped.

use core::arch::asm;

use super::memory::recycle::with_slots;
use super::protocol::Here;
use super::share::Unshared;
use super::tables::Name;
use super::tlb::flush_page;
use super::tlb::loaded_root;
use super::tlb::shoot_down;
use super::tree::Frames;
use super::tree::Tree;
use super::PagingError;
use super::Permissions;
use crate::addr::Gva;
use crate::addr::Hva;
use crate::addr::PAGE_BYTES;
use crate::process::Process;

/// Whether the calling thread's table has pages that are copied on write.
pub(crate) fn has_copies(process: &Process, here: &Here) -> bool {
    here.number()
        .is_some_and(|number| process.tables().get(number).pool().is_some())
}

/// Settles a write that the loaded table forbids to the CPU, not to the program: the page gets a copy, or another thread
/// was quicker. False where it is none of that.
#[cold]
#[inline(never)]
pub(crate) fn settle_write(process: &Process, here: &Here, gva: Gva, from_user: bool) -> Result<bool, PagingError> {
    let Some(number) = here.number() else {
        return Ok(false);
    };
    let record = process.tables().get(number);
    let root = record.root();
    let Some(pool) = record.pool() else {
        return Ok(false);
    };
    if loaded_root() != root.as_u64() {
        return Ok(false);
    }
    let frames = &process.memory;
    let tree = Tree { frames, root };
    let page = gva.align_down(PAGE_BYTES);
    let is_last = |frame| frames.hva(frame).is_some_and(|frame| pool.is_last(frame));
    let copy = || {
        let frame = pool.take()?;
        // SAFETY: The loaded table lets CPL0 read the page, and maps the pool; nobody else has the frame.
        unsafe { copy_page(page, frame) };
        frames.gpa(frame).inspect_err(|_| pool.release(frame))
    };
    match with_slots(frames, || tree.unshare(page, is_last, copy))? {
        Unshared::NotShared => {
            let allows = tree.look_up(page).is_some_and(|mapping| {
                mapping.permissions.contains(Permissions::WRITE)
                    && mapping.permissions.contains(Permissions::USER) == from_user
            });
            if allows {
                flush_page(page);
            }
            Ok(allows)
        }
        Unshared::Alone => {
            flush_page(page);
            Ok(true)
        }
        Unshared::Copied { released } => {
            shoot_down(process, Name::of(number), page, 1);
            if let Some(frame) = released.and_then(|frame| frames.hva(frame)) {
                pool.release(frame);
            }
            Ok(true)
        }
    }
}

/// Copies a page, also where CPL3 may use it and SMAP keeps CPL0 off.
///
/// # Safety
///
/// `from` must be readable at CPL0, and `to` writable and nobody else's.
unsafe fn copy_page(from: Gva, to: Hva) {
    const SMAP: u64 = 1 << 21;
    let cr4: u64;
    // SAFETY: At CPL0, in a trap handler; the rest is the caller's. AC goes back with the frame.
    unsafe {
        asm!("mov {}, cr4", out(reg) cr4, options(nomem, nostack, preserves_flags));
        if cr4 & SMAP != 0 {
            asm!("stac", options(nomem, nostack));
        }
        asm!(
            "rep movsq",
            inout("rcx") PAGE_BYTES / 8 => _,
            inout("rsi") from.as_u64() => _,
            inout("rdi") to.as_u64() => _,
            options(nostack, preserves_flags),
        );
        if cr4 & SMAP != 0 {
            asm!("clac", options(nomem, nostack));
        }
    }
}
