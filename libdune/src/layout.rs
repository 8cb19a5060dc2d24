// SPDX-License-Identifier: MIT OR Apache-2.0

//! Where things are in the memory that libdune keeps for a process in Dune mode.
//!
//! One reservation, aligned to its own size: exactly one slot, which every page table maps from the start.
//!
//! ```text
//! ARENA  +0           Process (process.rs)
//!        +FORWARD     HVA's GiB -> slot, u32 each
//!        +REVERSE     slot -> HVA's GiB + 1, u32 each
//!        +TABLES      a record per page table
//!        +AREAS       one area per Dune thread, AREA_BYTES apart
//!        +POOL        pages for page tables; inaccessible beyond what is in use
//!
//! area   +0           Block (percpu.rs): what assembly and handlers find by masking RSP
//!        +IST         stack of every vector but #DF            (guard page below each stack)
//!        +DOUBLE      stack of #DF
//!        +SEEN        by page table: the generation that this thread flushed its TLB for
//!        +HOOK_STACK  stack of hooks of system calls; the FPU state of who made one at its top
//!        +REPORT      stack on which a fault without a way out is reported
//!        +HOST        HostContext (host_loop/context.rs)
//!        +SNAPSHOT    registers of a child that is being made, as a run page
//!        +FPU         FPU state of the slow path
//!        +HOST_STACK  stack of the host loop, where Linux also delivers signals
//!        +HANDLERS    one stack per nesting level, HANDLER_BYTES apart
//! ```

/// Bytes of the whole reservation, and its alignment. Memory is taken as it is used.
pub const ARENA_BYTES: usize = 1 << 30;

/// Bytes of a thread's area, and its alignment.
pub const AREA_BYTES: usize = 1 << 20;

/// Bytes of a page.
pub const PAGE: usize = dune_abi::PAGE_BYTES;

/// Number of 1 GiB pieces that user space has.
pub const GIBS: usize = 1 << 17;
/// Most slots that libdune can tell apart (GPAs of 48 bits).
pub const SLOTS: usize = 1 << 18;

/// Table from GiB to slot.
pub const FORWARD: usize = 0x1_0000;
/// Table from slot to GiB.
pub const REVERSE: usize = FORWARD + GIBS * 4;

/// Records of page tables.
pub const TABLES: usize = REVERSE + SLOTS * 4;
/// Bytes of a record.
pub const TABLE_BYTES: usize = 64;
/// Most page tables of a process: as many as there are PCIDs.
pub const TABLE_COUNT: usize = 4096;

/// First area.
pub const AREAS: usize = 2 << 20;
/// Number of areas: most Dune threads that a process can have.
pub const AREA_COUNT: usize = (POOL - AREAS) / AREA_BYTES;

/// Areas that keep their memory between two threads.
pub const WARM_AREAS: usize = 16;

/// Page-table pages, up to the end of the arena.
pub const POOL: usize = 512 << 20;
/// Bytes by which the pool grows.
pub const POOL_STEP: usize = 4 << 20;

/// Top of the stack for every vector but #DF (IST 1).
pub const IST_TOP: usize = 0x1_0000;
/// Lowest byte of that stack.
pub const IST: usize = IST_TOP - 0x4000;

/// Top of the stack for #DF (IST 2).
pub const DOUBLE_TOP: usize = IST_TOP + 0x5000;
/// Lowest byte of that stack.
pub const DOUBLE: usize = DOUBLE_TOP - 0x4000;

/// Generations seen, 8 bytes per page table.
pub const SEEN: usize = DOUBLE_TOP;

/// Guard page of the hook stack.
pub const HOOK_GUARD: usize = SEEN + TABLE_COUNT * 8;
/// Lowest byte of that stack.
pub const HOOK_STACK: usize = HOOK_GUARD + PAGE;
/// Its top.
pub const HOOK_TOP: usize = REPORT - PAGE;

/// Top of the stack for reports.
pub const REPORT_TOP: usize = 0x4_0000;
/// Lowest byte of that stack.
pub const REPORT: usize = REPORT_TOP - 0x1_0000;

/// Host context.
pub const HOST: usize = REPORT_TOP;
/// Image of a run page.
pub const SNAPSHOT: usize = HOST + 0x2000;
/// Where the slow path saves the FPU state.
pub const FPU: usize = SNAPSHOT + PAGE;
/// Most bytes that it may have.
pub const FPU_MAX: usize = 0x8000;
/// Guard page of the host stack.
pub const HOST_GUARD: usize = HOST + 0x1_0000;
/// Lowest byte of the host stack.
pub const HOST_STACK: usize = HOST_GUARD + PAGE;
/// Top of the host stack.
pub const HOST_STACK_TOP: usize = HANDLERS;

/// Nesting levels of handlers.
pub const LEVELS: usize = 8;
/// Distance of the handler stacks; the lowest page of each is its guard.
pub const HANDLER_SHIFT: u32 = 16;
/// The same in bytes.
pub const HANDLER_BYTES: usize = 1 << HANDLER_SHIFT;
/// First handler stack; they end where the area ends.
pub const HANDLERS: usize = AREA_BYTES - LEVELS * HANDLER_BYTES;

/// Guard pages, as offsets into an area.
pub const GUARDS: [usize; 5 + LEVELS] = {
    let mut guards = [0; 5 + LEVELS];
    guards[0] = IST - PAGE;
    guards[1] = DOUBLE - PAGE;
    guards[2] = REPORT - PAGE;
    guards[3] = HOST_GUARD;
    guards[4] = HOOK_GUARD;
    let mut level = 0;
    while level < LEVELS {
        guards[5 + level] = HANDLERS + level * HANDLER_BYTES;
        level += 1;
    }
    guards
};

const _: () = {
    assert!(AREA_BYTES.is_power_of_two() && ARENA_BYTES.is_power_of_two());
    assert!(ARENA_BYTES == dune_abi::SLOT_BYTES as usize);
    assert!(TABLES + TABLE_COUNT * TABLE_BYTES <= AREAS && TABLES % TABLE_BYTES == 0);
    assert!(HOOK_GUARD % PAGE == 0 && HOOK_TOP - HOOK_STACK >= FPU_MAX + 0x8000);
    assert!(AREAS % AREA_BYTES == 0 && POOL < ARENA_BYTES);
    assert!(DOUBLE - PAGE >= IST_TOP && REPORT - PAGE >= DOUBLE_TOP && FPU + FPU_MAX <= HOST_GUARD);
    assert!(HOST_STACK_TOP - HOST_STACK >= 0x2_0000);
    assert!(POOL % POOL_STEP == 0 && ARENA_BYTES % POOL_STEP == 0);
    assert!(IST_TOP % 16 == 0 && DOUBLE_TOP % 16 == 0 && REPORT_TOP % 16 == 0 && FPU % 64 == 0);
};
