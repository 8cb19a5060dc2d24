// SPDX-License-Identifier: MIT OR Apache-2.0

//! A program that does nothing but follow pointers and add: look-ups in a binary tree of 16 MiB, at CPL0, at CPL3 and
//! natively, the same bytes of machine code each time.
//!
//! Its instructions are measured. What nested paging costs beyond them is not seen in instructions, so its table
//! references are computed: misses of a TLB like that of the CPU, for the addresses that the program uses, times the
//! references of one walk (`walk.rs`). Paging-structure caches would spare some of them.

use core::arch::global_asm;
use core::ops::Range;

use libdune::user::UserContext;
use libdune::user::UserExit;
use libdune::Dune;
use libdune::Gva;
use libdune::Permissions;

use crate::measure::timed;
use crate::measure::System;
use crate::pages::Memory;
use crate::pages::PAGE;
use crate::walk;
use crate::walk::Translation;
use crate::walk::Translations;
use crate::walk::REFERENCES;

/// A power of two, so that numbers of nodes can be shuffled by arithmetic.
const NODES: usize = 1 << KEY_BITS;
const KEY_BITS: u32 = 18;
const BYTES: usize = NODES * size_of::<Node>();
/// Of a run: so few that most runs meet no interrupt.
const LOOKUPS: u64 = 20;
const RUNS: usize = 1000;
/// Knuth's generator.
const FACTOR: u64 = 6_364_136_223_846_793_005;
const TERM: u64 = 1_442_695_040_888_963_407;

/// A line of the cache.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Node {
    key: u64,
    left: *mut Node,
    right: *mut Node,
    /// How often it was found.
    found: u64,
    value: u64,
}

/// Makes the look-ups of a seed, and gives the sum of what was found.
type LookUp<'a> = dyn FnMut(u64) -> u64 + 'a;

extern "C" {
    /// Looks `count` pseudo-random keys up, and gives the sum of the values.
    fn dune_bench_compute(root: *mut Node, count: u64, seed: u64) -> u64;
    static dune_bench_compute_start: u8;
    static dune_bench_compute_end: u8;
}

global_asm!(
    ".pushsection .text.dune_bench_compute, \"ax\", @progbits",
    ".globl dune_bench_compute, dune_bench_compute_start, dune_bench_compute_end",
    // Where CPL3 begins, with a stack.
    "dune_bench_compute_start:",
    "call 2f",
    "syscall",
    "dune_bench_compute:",
    "2:",
    "xor eax, eax",
    "movabs r8, {factor}",
    "movabs r9, {term}",
    "3:",
    "imul rdx, r8",
    "add rdx, r9",
    "mov rcx, rdx",
    "shr rcx, {shift}",
    "mov r10, rdi",
    "4:",
    "cmp rcx, [r10 + {key}]",
    "je 6f",
    "jb 5f",
    "mov r10, [r10 + {right}]",
    "jmp 4b",
    "5:",
    "mov r10, [r10 + {left}]",
    "jmp 4b",
    "6:",
    "inc qword ptr [r10 + {found}]",
    "add rax, [r10 + {value}]",
    "dec rsi",
    "jnz 3b",
    "ret",
    "dune_bench_compute_end:",
    ".popsection",
    factor = const FACTOR,
    term = const TERM,
    shift = const 64 - KEY_BITS,
    key = const core::mem::offset_of!(Node, key),
    left = const core::mem::offset_of!(Node, left),
    right = const core::mem::offset_of!(Node, right),
    found = const core::mem::offset_of!(Node, found),
    value = const core::mem::offset_of!(Node, value),
);

pub fn measure(system: &System<'_>, translations: &Translations) {
    for (time, references, is_large) in [
        ("compute", "compute_walks", false),
        ("compute_2m", "compute_2m_walks", true),
    ] {
        if system.wants(&[time, references]) {
            compute(system, translations, [time, references], is_large);
        }
    }
}

fn compute(system: &System<'_>, translations: &Translations, [time, references]: [&'static str; 2], is_large: bool) {
    let (memory, range) = walk::aligned(BYTES, is_large);
    let translation = translations.of_fresh(system, &memory, range.clone());
    let tree = Tree::grow(&memory, range.clone());
    let expected: Vec<u64> = (0..RUNS).map(|run| tree.expected_sum(run)).collect();
    let mut runs = 0;
    let mut run = |system: &System<'_>, look_up: &mut LookUp<'_>| {
        let mut once = |run| {
            runs += 1;
            let mut sum = 0;
            let ticks = timed(|| sum = look_up(seed(run)));
            assert_eq!(sum, expected[run], "the values that were found");
            ticks
        };
        (0..RUNS).for_each(|run| _ = once(run));
        system.once(time, RUNS, once);
    };
    // SAFETY: The tree is whole, each key in it.
    run(system, &mut |seed| unsafe {
        dune_bench_compute(tree.root, LOOKUPS, seed)
    });
    tree.tell_walks(system, references, translation);
    if let Some(dune) = system.dune {
        let inside = system.named("dune, CPL3");
        let now = at_cpl3(dune, &memory, range.clone(), translation, tree.root, &mut |look_up| {
            run(&inside, look_up);
        });
        tree.tell_walks(&inside, references, now);
    }
    assert_eq!(tree.found(), runs * LOOKUPS, "each look-up has left its mark");
}

/// Has `run` look up at CPL3; how the tree's memory was translated meanwhile.
fn at_cpl3(
    dune: &Dune,
    memory: &Memory,
    range: Range<usize>,
    known: Option<Translation>,
    root: *mut Node,
    run: &mut dyn FnMut(&mut LookUp<'_>),
) -> Option<Translation> {
    let program = Memory::new(2 * PAGE).small().populated();
    // SAFETY: Labels of one section, of less than a page; the memory is the program's.
    unsafe {
        let code = &raw const dune_bench_compute_start;
        let bytes = &raw const dune_bench_compute_end as usize - code as usize;
        assert!(bytes <= PAGE);
        program.at(0).copy_from_nonoverlapping(code, bytes);
    }
    program.protect(0, PAGE, libc::PROT_READ | libc::PROT_EXEC);
    let gva = |memory: &Memory, offset| Gva::of(memory.at(offset)).expect("a program's address is canonical");
    let space = dune.address_space();
    let (code, stack, tree) = (gva(&program, 0), gva(&program, PAGE), gva(memory, range.start));
    let parts = [
        (code, PAGE, Permissions::USER | Permissions::EXECUTE),
        (stack, PAGE, Permissions::USER | Permissions::WRITE),
        (tree, range.len(), Permissions::USER | Permissions::WRITE),
    ];
    let give = |start, bytes: usize, permissions| {
        let given = space.protect(start, bytes as u64, permissions);
        given.expect("the pages are the program's").flush();
    };
    for (start, bytes, permissions) in parts {
        give(start, bytes, permissions);
    }
    let thread = dune.thread();
    let mut context = UserContext::new(&thread);
    run(&mut |seed| {
        let registers = context.registers_mut();
        registers.rip = code.as_u64();
        registers.rsp = stack.as_u64() + PAGE as u64;
        (registers.rdi, registers.rsi, registers.rdx) = (root as u64, LOOKUPS, seed);
        assert_eq!(context.run(&thread), UserExit::Syscall);
        context.registers().rax
    });
    let now = known.map(|known| walk::again(dune, memory, range, known));
    for (start, bytes, _) in parts {
        give(start, bytes, Permissions::ALL);
    }
    walk::undo(dune, tree, BYTES);
    now?.map_err(|why| println!("no row that counts table references: {why}"))
        .ok()
}

/// The first pseudo-random number of a run.
fn seed(run: usize) -> u64 {
    (run as u64 + 1).wrapping_mul(TERM)
}

/// A balanced binary tree of all keys below [`NODES`], its nodes in an order of no order.
struct Tree {
    nodes: *mut Node,
    root: *mut Node,
}

impl Tree {
    fn grow(memory: &Memory, range: Range<usize>) -> Self {
        let mut tree = Self {
            nodes: memory.at(range.start).cast(),
            root: core::ptr::null_mut(),
        };
        tree.root = tree.branch(0, NODES as u64);
        tree
    }

    /// Where the node of a key is.
    fn node(&self, key: u64) -> *mut Node {
        // Odd, and the number of nodes a power of two: each place is one key's.
        let place = key.wrapping_mul(FACTOR).wrapping_add(TERM) as usize % NODES;
        // SAFETY: In the memory.
        unsafe { self.nodes.add(place) }
    }

    /// The subtree of the keys from `first` to before `end`.
    fn branch(&self, first: u64, end: u64) -> *mut Node {
        if first == end {
            return core::ptr::null_mut();
        }
        let key = first + (end - first) / 2;
        let node = Node {
            key,
            left: self.branch(first, key),
            right: self.branch(key + 1, end),
            found: 0,
            value: key ^ 0xff,
        };
        let place = self.node(key);
        // SAFETY: In the memory, aligned.
        unsafe { place.write(node) };
        place
    }

    /// Calls `visit` for each node that the look-ups of a run go through, and `found` for each that they find.
    fn replay(&self, run: usize, mut visit: impl FnMut(*mut Node), mut found: impl FnMut(u64)) {
        let mut random = seed(run);
        for _ in 0..LOOKUPS {
            random = random.wrapping_mul(FACTOR).wrapping_add(TERM);
            let wanted = random >> (64 - KEY_BITS);
            let (mut first, mut end) = (0, NODES as u64);
            loop {
                let key = first + (end - first) / 2;
                visit(self.node(key));
                match wanted.cmp(&key) {
                    core::cmp::Ordering::Equal => break,
                    core::cmp::Ordering::Less => end = key,
                    core::cmp::Ordering::Greater => first = key + 1,
                }
            }
            found(wanted);
        }
    }

    /// The sum that a run gives; computed without the pointers.
    fn expected_sum(&self, run: usize) -> u64 {
        let mut sum = 0u64;
        self.replay(run, |_| {}, |key| sum = sum.wrapping_add(key ^ 0xff));
        sum
    }

    /// How often nodes were found.
    fn found(&self) -> u64 {
        // SAFETY: In the memory.
        (0..NODES as u64).map(|key| unsafe { (*self.node(key)).found }).sum()
    }

    /// Table references of a run, on average over all of them, which follow each other.
    fn tell_walks(&self, system: &System<'_>, bench: &'static str, translation: Option<Translation>) {
        let Some(translation) = translation.filter(|_| system.wants(&[bench])) else {
            return;
        };
        let mut tlb = Tlb::new(translation.reach());
        for _ in 0..2 {
            tlb.misses = 0;
            (0..RUNS).for_each(|run| self.replay(run, |node| tlb.use_address(node as u64), |_| {}));
        }
        let references = tlb.misses * translation.references() / RUNS as u64;
        system.tell(bench, REFERENCES, references, RUNS);
    }
}

/// A TLB as Skylake's of the second level: entries of 4 KiB and 2 MiB alike.
struct Tlb {
    /// Pages of each set, the one used last first.
    sets: Vec<[u64; Self::WAYS]>,
    page_bytes: u64,
    misses: u64,
}

impl Tlb {
    const WAYS: usize = 12;
    const SETS: usize = 128;

    fn new(page_bytes: u64) -> Self {
        Self {
            sets: vec![[u64::MAX; Self::WAYS]; Self::SETS],
            page_bytes,
            misses: 0,
        }
    }

    fn use_address(&mut self, address: u64) {
        let page = address / self.page_bytes;
        let set = &mut self.sets[page as usize % Self::SETS];
        let place = set.iter().position(|known| *known == page).unwrap_or_else(|| {
            self.misses += 1;
            Self::WAYS - 1
        });
        set[place] = page;
        set[..=place].rotate_right(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_code_looks_up_what_the_model_does() {
        let (memory, range) = walk::aligned(BYTES, false);
        let tree = Tree::grow(&memory, range);
        // SAFETY: The tree is whole.
        let sum = unsafe { dune_bench_compute(tree.root, LOOKUPS, seed(1)) };
        assert_eq!(sum, tree.expected_sum(1));
        assert_eq!(tree.found(), LOOKUPS);
    }

    #[test]
    fn tlb_forgets_what_was_used_longest_ago() {
        let mut tlb = Tlb::new(4096);
        let page = |i: u64| i * 4096 * Tlb::SETS as u64;
        let ways = Tlb::WAYS as u64;
        (0..ways).for_each(|i| tlb.use_address(page(i)));
        (0..ways).for_each(|i| tlb.use_address(page(i) + 5));
        assert_eq!(tlb.misses, ways);
        tlb.use_address(page(ways));
        tlb.use_address(page(1));
        assert_eq!(tlb.misses, ways + 1);
        tlb.use_address(page(0));
        assert_eq!(tlb.misses, ways + 2);
    }
}
