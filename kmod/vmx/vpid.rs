// SPDX-License-Identifier: GPL-2.0

//! Virtual-processor identifiers: 16 bits, one per vCPU of the machine, 0 for none.

use crate::sys::lock::Class;
use crate::sys::lock::SpinLock;

const WORDS: usize = 65536 / 64;

// Bit 0, VPID 0, is the host's.
static IN_USE: SpinLock<[u64; WORDS]> = SpinLock::new({
    let mut words = [0; WORDS];
    words[0] = 1;
    words
});

/// To be called once, before any VPID is taken.
pub(crate) fn init() {
    // SAFETY: A static, and nobody uses it yet.
    unsafe { IN_USE.init(Class::Global) };
}

/// A VPID, given back when dropped. A CPU may still have translations of an earlier owner: a vCPU flushes its VPID when
/// it comes to a CPU.
pub(crate) struct Vpid(u16);

impl Vpid {
    /// One that nobody has; 0 if there is none.
    pub(crate) fn new() -> Self {
        let mut words = IN_USE.lock();
        for (i, word) in words.iter_mut().enumerate() {
            if *word != !0 {
                let bit = word.trailing_ones();
                *word |= 1 << bit;
                return Self((i * 64) as u16 + bit as u16);
            }
        }
        Self(0)
    }

    /// No VPID.
    pub(crate) const fn none() -> Self {
        Self(0)
    }

    pub(crate) fn number(&self) -> u16 {
        self.0
    }
}

impl Drop for Vpid {
    fn drop(&mut self) {
        if self.0 != 0 {
            IN_USE.lock()[usize::from(self.0) / 64] &= !(1 << (self.0 % 64));
        }
    }
}
