// SPDX-License-Identifier: MIT OR Apache-2.0

//! CR3, and what the TLB keeps.
//!
//! # Safety
//!
//! CR3 is read and written at CPL0 only.

use core::arch::asm;
use core::arch::x86_64::__cpuid;
use core::arch::x86_64::__cpuid_count;
use core::ffi::c_int;
use core::ffi::c_ulong;
use core::ffi::c_void;
use core::sync::atomic::AtomicU8;
use core::sync::atomic::Ordering::Relaxed;

use libdune::Dune;
use libdune::Gva;
use libdune::Hva;

use crate::entry::shared;

const CR3_NOFLUSH: u64 = 1 << 63;

/// Makes the calling thread use a page table: its top table by address (pgroot, dune_vm_clone) or by physical address.
/// The low 12 bits are ignored, the PCID is the table's own. Without CR3_NOFLUSH the TLB forgets what it has of the table.
#[no_mangle]
pub unsafe extern "C" fn load_cr3(cr3: c_ulong) {
    let Ok(shared) = shared() else { return };
    // SAFETY: Not kept.
    let Some(thread) = (unsafe { shared.thread() }) else {
        return;
    };
    let root = cr3 & !CR3_NOFLUSH & !0xfff;
    match shared.table_at(root) {
        Some(table) => {
            let is_own_before = shared.table_at(read_cr3() & !CR3_NOFLUSH & !0xfff).is_some();
            // SAFETY: The program says that the table maps what it needs.
            unsafe { thread.load(&table) };
            if cr3 & CR3_NOFLUSH == 0 || !is_own_before {
                thread.flush_all();
            }
        }
        // A table that the program made by itself, of pages of the pool.
        // SAFETY: At CPL0. As above.
        None => unsafe { asm!("mov cr3, {}", in(reg) root, options(nostack)) },
    }
}

/// The callers are at CPL0.
fn read_cr3() -> u64 {
    let cr3: u64;
    // SAFETY: At CPL0.
    unsafe { asm!("mov {}, cr3", out(reg) cr3, options(nomem, nostack, preserves_flags)) };
    cr3
}

/// Forgets one page of the loaded table, in every Dune thread that has it loaded.
#[no_mangle]
pub extern "C" fn dune_flush_tlb_one(addr: c_ulong) {
    flush(addr, 1);
}

/// Forgets the loaded table, in every Dune thread that has it loaded.
#[no_mangle]
pub extern "C" fn dune_flush_tlb() {
    flush(0, u64::MAX);
}

fn flush(addr: u64, bytes: u64) {
    let Ok(shared) = shared() else { return };
    // SAFETY: Not kept.
    let (Some(thread), Some(start)) = (unsafe { shared.thread() }, Gva::new(addr & !0xfff)) else {
        return;
    };
    // SAFETY: Nothing loads another table meanwhile.
    unsafe { thread.loaded_space() }.flush(start, bytes);
}

/// INVPCID of the loaded table's PCID: mode 0 forgets one page, 1 the table, 2 and 3 all tables. A CPU without that
/// instruction forgets the loaded table.
#[no_mangle]
pub unsafe extern "C" fn __invpcid(mode: c_int, addr: c_ulong) {
    if !Dune::is_active() {
        return;
    }
    let cr3 = read_cr3();
    let descriptor = [cr3 & 0xfff, addr];
    // SAFETY: At CPL0, with a PCID that CR3 has.
    unsafe {
        if has_invpcid() {
            asm!("invpcid {}, [{}]", in(reg) mode as u64, in(reg) &raw const descriptor, options(nostack));
        } else {
            asm!("mov cr3, {}", in(reg) cr3, options(nostack, preserves_flags));
        }
    }
}

/// Asked once: in Dune mode CPUID is an exit.
#[allow(unused_unsafe)] // CPUID became safe after Rust 1.85.
fn has_invpcid() -> bool {
    const INVPCID: u32 = 1 << 10;
    static KNOWN: AtomicU8 = AtomicU8::new(0);
    if KNOWN.load(Relaxed) == 0 {
        // SAFETY: Every 64-bit CPU has CPUID.
        let has = unsafe { __cpuid(0).eax >= 7 && __cpuid_count(7, 0).ebx & INVPCID != 0 };
        KNOWN.store(1 + u8::from(has), Relaxed);
    }
    KNOWN.load(Relaxed) == 2
}

/// Where memory of the process is in physical memory: what an entry of a page table holds for it. 0 where that cannot be.
#[no_mangle]
pub extern "C" fn dune_va_to_pa(ptr: *mut c_void) -> usize {
    let gpa = shared().ok().and_then(|shared| shared.gpa(Hva::new(ptr as u64)?).ok());
    gpa.map_or(0, |gpa| gpa.as_u64() as usize)
}

/// The same, for memory that mmap gave.
#[no_mangle]
pub extern "C" fn dune_mmap_addr_to_pa(ptr: *mut c_void) -> usize {
    dune_va_to_pa(ptr)
}

/// The same, for the stack.
#[no_mangle]
pub extern "C" fn dune_stack_addr_to_pa(ptr: *mut c_void) -> usize {
    dune_va_to_pa(ptr)
}
