// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the two fuzzers share: numbers from a seed, batches in a process of their own, and the look at the host after each.
//!
//! `DUNE_FUZZ_SEED` and `DUNE_FUZZ_CASES` change what a run does; the seed of a run is in its report. A batch is
//! [`BATCH`] cases and depends on the seed and its own number alone.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use crate::helpers;
use crate::isolation::host_state;
use crate::isolation::HOST_STATE;
use crate::raw::Ended;
use crate::raw::RawGuest;
use crate::support::spawn;
use crate::support::Shared;

/// Cases after which the host is looked at.
pub const BATCH: u64 = 1000;

/// `mov eax, 0x1234; vmcall`.
const HEALTHY: &[u8] = &[0xb8, 0x34, 0x12, 0, 0, 0x0f, 0x01, 0xc1];

/// Splitmix64.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len() as u64) as usize]
    }

    /// A number that somebody may have forgotten to think of.
    pub fn odd(&mut self) -> u64 {
        const ODD: &[u64] = &[
            0,
            1,
            2,
            7,
            8,
            0xfff,
            0x1000,
            0x7fff_ffff,
            0x8000_0000,
            0xffff_ffff,
            1 << 30,
            1 << 36,
            1 << 40,
            (1 << 47) - 1,
            1 << 47,
            !0 << 47,
            1 << 52,
            1 << 62,
            1 << 63,
            !0 - 7,
            !0,
        ];
        match self.below(4) {
            0 => self.next(),
            1 => 1 << self.below(64),
            2 => self.next() >> self.below(64),
            _ => *self.pick(ODD),
        }
    }
}

/// Where a batch leaves its findings.
pub struct Tally<'a>(&'a Shared);

impl Tally<'_> {
    pub fn word(&self, index: usize) -> &AtomicU64 {
        self.0.word(index)
    }

    pub fn add(&self, index: usize, n: u64) {
        self.word(index).fetch_add(n, Relaxed);
    }
}

/// A number from the environment.
pub fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

fn taint() -> String {
    std::fs::read_to_string("/proc/sys/kernel/tainted").unwrap()
}

/// How many cases a run has that has `cases` by itself.
pub fn cases(cases: u64) -> u64 {
    setting("DUNE_FUZZ_CASES", cases)
}

/// Runs `cases` cases in batches, and judges the host after each. `batch` is given its numbers, its tally and how many
/// cases to do. Gives the tally of all.
pub fn run(cases: u64, batch: fn(&mut Random, &Tally<'_>, u64)) -> Shared {
    let seed = setting("DUNE_FUZZ_SEED", 1);
    let cases = self::cases(cases);
    println!("report: seed {seed}, {cases} cases");
    helpers::pin_to_cpu(0).unwrap();
    let watch = std::path::Path::new(HOST_STATE).exists();
    assert!(
        watch || !helpers::is_emulated(),
        "the module tells nothing of the host's CPU"
    );
    let (state, tainted) = (watch.then(host_state), taint());
    let shared = Shared::new();
    for number in 0..cases.div_ceil(BATCH) {
        let here = BATCH.min(cases - number * BATCH);
        let ended = spawn(|| {
            let mut random = Random::new(seed << 32 ^ number << 8);
            batch(&mut random, &Tally(&shared), here);
        })
        .wait();
        assert!(
            libc::WIFEXITED(ended.status) && libc::WEXITSTATUS(ended.status) == 0,
            "batch {number}: {ended:#x?}"
        );
        assert_eq!(taint(), tainted, "batch {number} tainted the kernel");
        assert_eq!(watch.then(host_state), state, "batch {number} changed the host's CPU");
        assert_eq!(RawGuest::new(HEALTHY).run(), Ended::Call(0x1234), "batch {number}");
        let hello = helpers::run_program("hello", &[]).unwrap();
        assert_eq!(hello.status, 0, "batch {number}: {hello:?}");
    }
    shared
}
