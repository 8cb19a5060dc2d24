// SPDX-License-Identifier: MIT OR Apache-2.0

//! Which thread of the process is in Dune mode: there can be one.

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::AcqRel;
use core::sync::atomic::Ordering::Acquire;

use crate::sys;

/// The Dune thread: process in the upper half, thread in the lower; 0 if there is none.
static OWNER: AtomicU64 = AtomicU64::new(0);

/// The claim of one thread to be the Dune thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Owner(u64);

/// Why a thread cannot have Dune mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// It has it.
    ByCaller,
    /// Thread of this number has it.
    ByThread(u32),
}

impl Owner {
    /// The calling thread.
    pub fn caller() -> Self {
        Self(u64::from(sys::getpid()) << 32 | u64::from(sys::gettid()))
    }

    /// Claims Dune mode for the calling thread.
    pub fn claim() -> Result<Self, Taken> {
        let me = Self::caller();
        let mut found = 0;
        loop {
            match OWNER.compare_exchange(found, me.0, AcqRel, Acquire) {
                Ok(_) => return Ok(me),
                // Left over from the parent of this process.
                Err(other) if other >> 32 != me.0 >> 32 => found = other,
                Err(other) if other == me.0 => return Err(Taken::ByCaller),
                Err(other) => return Err(Taken::ByThread(other as u32)),
            }
        }
    }

    /// Gives the claim back, if it still stands.
    pub fn release(self) {
        let _ = OWNER.compare_exchange(self.0, 0, AcqRel, Acquire);
    }

    /// Whether this is the caller's claim and stands: not so in a child that has a copy of it, or shares it.
    pub fn is_callers(self) -> bool {
        OWNER.load(Acquire) == self.0 && Self::caller() == self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_thread_at_a_time() {
        let owner = Owner::claim().unwrap();
        assert!(owner.is_callers());
        assert_eq!(Owner::claim(), Err(Taken::ByCaller));
        let me = sys::gettid();
        std::thread::spawn(move || {
            assert_eq!(Owner::claim(), Err(Taken::ByThread(me)));
            assert!(!owner.is_callers());
        })
        .join()
        .unwrap();
        owner.release();
        let next = std::thread::spawn(|| Owner::claim().unwrap()).join().unwrap();
        assert!(!next.is_callers());
        next.release();
    }
}
