// SPDX-License-Identifier: MIT OR Apache-2.0

//! Where things are in the memory that libdune keeps for a Dune thread.
//!
//! One reservation, aligned to its own size, so that it never lies astride the edge of a 1 GiB slot:
//!
//! ```text
//! ARENA  +0          block, 1 MiB, aligned to 1 MiB: masking RSP on any of its stacks gives its address
//!          +0          Block (percpu.rs): tables that assembly and handlers read
//!          +IST        stack of every vector but #DF            (guard page below each stack)
//!          +DOUBLE     stack of #DF
//!          +REPORT     stack on which a fault without a way out is reported
//!          +HANDLERS   one stack per nesting level, HANDLER_BYTES apart
//!        +FORWARD    HVA's GiB -> slot, u32 each
//!        +REVERSE    slot -> HVA's GiB + 1, u32 each
//!        +HOST       HostContext (host_loop/context.rs), and behind it the FPU state of the slow path
//!        +HOST_STACK stack of the host loop, where Linux also delivers signals
//!        +POOL       pages for page tables; inaccessible beyond what is in use
//! ```

/// Bytes of the whole reservation, and its alignment. Half a slot: the address space is free, memory is taken as the
/// pool grows, and every page-table page lies in a GiB that every page table maps from the start.
pub const ARENA_BYTES: usize = 512 << 20;

/// Bytes of the per-thread block, and its alignment.
pub const BLOCK_BYTES: usize = 1 << 20;

/// Bytes of a page.
pub const PAGE: usize = dune_abi::PAGE_BYTES;

/// Top of the stack for every vector but #DF (IST 1).
pub const IST_TOP: usize = 0x1_0000;
/// Lowest byte of that stack.
pub const IST: usize = IST_TOP - 0x4000;

/// Top of the stack for #DF (IST 2).
pub const DOUBLE_TOP: usize = IST_TOP + 0x5000;
/// Lowest byte of that stack.
pub const DOUBLE: usize = DOUBLE_TOP - 0x4000;

/// Top of the stack for reports.
pub const REPORT_TOP: usize = 0x4_0000;
/// Lowest byte of that stack.
pub const REPORT: usize = REPORT_TOP - 0x1_0000;

/// Nesting levels of handlers.
pub const LEVELS: usize = 8;
/// Distance of the handler stacks; the lowest page of each is its guard.
pub const HANDLER_SHIFT: u32 = 16;
/// The same in bytes.
pub const HANDLER_BYTES: usize = 1 << HANDLER_SHIFT;
/// First handler stack; they end where the block ends.
pub const HANDLERS: usize = BLOCK_BYTES - LEVELS * HANDLER_BYTES;

/// Number of 1 GiB pieces that user space has.
pub const GIBS: usize = 1 << 17;
/// Most slots that libdune can tell apart (GPAs of 48 bits).
pub const SLOTS: usize = 1 << 18;

/// Table from GiB to slot.
pub const FORWARD: usize = BLOCK_BYTES;
/// Table from slot to GiB.
pub const REVERSE: usize = FORWARD + GIBS * 4;
/// Host context.
pub const HOST: usize = REVERSE + SLOTS * 4;
/// Guard page of the host stack.
pub const HOST_GUARD: usize = HOST + 0x1_0000;
/// Host stack: signal frames of the program's own handlers are put here too.
pub const HOST_STACK: usize = HOST_GUARD + PAGE;
/// Top of the host stack.
pub const HOST_STACK_TOP: usize = 4 << 20;
/// Page-table pages, up to the end.
pub const POOL: usize = HOST_STACK_TOP;
/// Bytes by which the pool grows.
pub const POOL_STEP: usize = 4 << 20;

/// Guard pages, as offsets into the arena.
pub const GUARDS: [usize; 4 + LEVELS] = {
    let mut guards = [0; 4 + LEVELS];
    guards[0] = IST - PAGE;
    guards[1] = DOUBLE - PAGE;
    guards[2] = REPORT - PAGE;
    guards[3] = HOST_GUARD;
    let mut level = 0;
    while level < LEVELS {
        guards[4 + level] = HANDLERS + level * HANDLER_BYTES;
        level += 1;
    }
    guards
};

const _: () = {
    assert!(BLOCK_BYTES.is_power_of_two() && ARENA_BYTES.is_power_of_two());
    assert!(DOUBLE - PAGE >= IST_TOP && REPORT - PAGE >= DOUBLE_TOP && HANDLERS >= REPORT_TOP);
    assert!(HOST_STACK_TOP - HOST_STACK >= 0x4_0000 && POOL < ARENA_BYTES);
    assert!(POOL % POOL_STEP == 0 && ARENA_BYTES % POOL_STEP == 0);
    assert!(IST_TOP % 16 == 0 && DOUBLE_TOP % 16 == 0 && REPORT_TOP % 16 == 0);
};
