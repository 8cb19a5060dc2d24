// SPDX-License-Identifier: MIT OR Apache-2.0

//! The tree under several threads that come to the same entries at once.

use std::panic::catch_unwind;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicUsize;
use std::sync::Barrier;

use super::*;

const THREADS: u64 = 4;
const GIB: u64 = 1 << 30;
/// Where the pages of the pool lie.
const POOL: u64 = 1 << 46;
/// The first GiB of a 512 GiB, so that the threads need the same tables.
const START: u64 = 0x1000_0000_0000;

/// Pages that are handed out one by one.
struct Pool {
    pages: Vec<Table>,
    next: AtomicUsize,
    freed: AtomicUsize,
    has_1g: bool,
}

impl Pool {
    fn new(has_1g: bool) -> Self {
        Self {
            pages: (0..256).map(|_| Table([const { AtomicU64::new(0) }; 512])).collect(),
            next: AtomicUsize::new(0),
            freed: AtomicUsize::new(0),
            has_1g,
        }
    }

    /// As new.
    fn clear(&self) {
        let used = self.next.swap(0, Relaxed);
        for entry in self.pages[..used].iter().flat_map(|page| &page.0) {
            entry.store(0, Relaxed);
        }
        self.freed.store(0, Relaxed);
    }

    fn slot(hva: Hva) -> Gpa {
        Gpa::new((hva.as_u64() - START) + GIB).unwrap()
    }
}

// SAFETY: A page is handed out once, and found by its number.
unsafe impl Frames for Pool {
    fn allocate(&self) -> Result<Gpa, PagingError> {
        let number = self.next.fetch_add(1, Relaxed);
        Ok(Gpa::new(POOL + number as u64 * PAGE_BYTES).unwrap())
    }

    fn free(&self, _: Gpa) {
        self.freed.fetch_add(1, Relaxed);
    }

    fn table(&self, gpa: Gpa) -> Option<&Table> {
        let offset = gpa.as_u64().checked_sub(POOL)?;
        self.pages.get((offset / PAGE_BYTES) as usize)
    }

    fn gpa(&self, hva: Hva) -> Result<Gpa, PagingError> {
        Ok(Self::slot(hva))
    }

    fn has_1g(&self) -> bool {
        self.has_1g
    }

    fn keep(&self, _: Gpa) -> bool {
        unreachable!("no frame is owned")
    }

    fn release(&self, _: Gpa) {
        unreachable!("no frame is owned")
    }

    fn retire(&self, _: Gpa, _: &Retired) {
        unreachable!("no frame is owned")
    }
}

/// Calls `act` in `THREADS` threads at once, on an empty tree, again and again; then `check`.
fn race(rounds: usize, act: impl Fn(&Tree<'_, Pool>, u64) + Sync, check: impl Fn(&Tree<'_, Pool>) + Sync) {
    for has_1g in [true, false] {
        let pool = Pool::new(has_1g);
        let barrier = Barrier::new(THREADS as usize);
        // A thread that panicked would not come to the barrier.
        let failed = AtomicBool::new(false);
        let attempt = |body: &dyn Fn()| {
            if catch_unwind(AssertUnwindSafe(body)).is_err() {
                failed.store(true, Relaxed);
            }
        };
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (pool, barrier, failed) = (&pool, &barrier, &failed);
                let (attempt, act, check) = (&attempt, &act, &check);
                scope.spawn(move || {
                    for _ in 0..rounds {
                        if barrier.wait().is_leader() {
                            pool.clear();
                            Tree::new(pool).unwrap();
                        }
                        barrier.wait();
                        let tree = Tree {
                            frames: pool,
                            root: Gpa::new(POOL).unwrap(),
                        };
                        attempt(&|| act(&tree, thread));
                        if barrier.wait().is_leader() {
                            attempt(&|| check(&tree));
                        }
                        barrier.wait();
                        if failed.load(Relaxed) {
                            return;
                        }
                    }
                });
            }
        });
        assert!(!failed.load(Relaxed), "see above");
    }
}

fn at(address: u64) -> Gva {
    Gva::new(address).unwrap()
}

/// What the tree maps `address` to is the memory of the same address.
fn assert_identity(tree: &Tree<'_, Pool>, address: u64) -> Mapping {
    let found = tree
        .look_up(at(address))
        .unwrap_or_else(|| panic!("{address:#x} is gone"));
    assert_eq!(found.gpa, Pool::slot(Hva::new(address).unwrap()), "{address:#x}");
    found
}

#[test]
fn threads_fill_gibs_of_one_table_at_once() {
    race(
        20_000,
        |tree, thread| {
            for gib in 0..3 {
                let address = START + (gib * THREADS + thread) * GIB + thread * PAGE_BYTES;
                assert_eq!(tree.fill(at(address)), Ok(true));
                assert_identity(tree, address);
            }
        },
        |tree| {
            for gib in 0..3 * THREADS {
                assert_identity(tree, START + gib * GIB);
            }
            // The root, the table of 512 GiB, and for each GiB what it needs; the rest was given back.
            let each = u64::from(!tree.frames.has_1g) * 3 * THREADS;
            let used = tree.frames.next.load(Relaxed) - tree.frames.freed.load(Relaxed);
            assert_eq!(used as u64, 2 + each);
        },
    );
}

#[test]
fn threads_protect_pages_of_one_large_leaf_at_once() {
    const PAGES: u64 = 4;
    let page = |thread, number| START + 5 * GIB + (number * THREADS + thread) * PAGE_BYTES;
    race(
        20_000,
        |tree, thread| {
            for number in 0..PAGES {
                let address = page(thread, number);
                assert_eq!(
                    tree.protect(at(address), PAGE_BYTES, Permissions::READ),
                    Ok(()),
                    "{address:#x}"
                );
                assert_eq!(assert_identity(tree, address).permissions, Permissions::READ);
            }
        },
        |tree| {
            for number in 0..PAGES {
                for thread in 0..THREADS {
                    assert_eq!(
                        assert_identity(tree, page(thread, number)).permissions,
                        Permissions::READ
                    );
                }
            }
            let behind = assert_identity(tree, page(0, PAGES));
            assert_eq!(behind.permissions, Permissions::ALL);
            assert_eq!(behind.page_bytes, PAGE_BYTES);
        },
    );
}
