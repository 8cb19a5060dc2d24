// SPDX-License-Identifier: MIT OR Apache-2.0

//! The tree on fake frames: GPAs are indices into a vector, slots are handed out in order of first use.

use std::cell::Cell;
use std::cell::RefCell;
use std::collections::HashMap;

use super::*;

const GIB: u64 = 1 << 30;

pub(super) struct Fake {
    tables: RefCell<HashMap<u64, &'static Table>>,
    slots: RefCell<HashMap<u64, u64>>,
    next: Cell<u64>,
    limit: u64,
    pub live: Cell<u64>,
    /// Users of frames of a pool.
    pub frames: RefCell<HashMap<u64, u32>>,
    slot_limit: u64,
    has_1g: bool,
}

impl Fake {
    pub fn new(has_1g: bool) -> Self {
        Self {
            tables: RefCell::default(),
            slots: RefCell::default(),
            next: Cell::new(0),
            limit: u64::MAX,
            live: Cell::new(0),
            frames: RefCell::default(),
            slot_limit: u64::MAX,
            has_1g,
        }
    }
}

// SAFETY: Every allocation is a fresh leaked page; the map finds it.
unsafe impl Frames for Fake {
    fn allocate(&self) -> Result<Gpa, PagingError> {
        if self.live.get() >= self.limit {
            return Err(PagingError::OutOfMemory(12));
        }
        self.live.set(self.live.get() + 1);
        self.next.set(self.next.get() + 1);
        let gpa = Gpa::new((1 << 46) + self.next.get() * PAGE_BYTES).unwrap();
        let table = Box::leak(Box::new(Table([const { AtomicU64::new(0) }; 512])));
        self.tables.borrow_mut().insert(gpa.as_u64(), table);
        Ok(gpa)
    }

    fn free(&self, table: Gpa) {
        assert!(
            self.tables.borrow_mut().remove(&table.as_u64()).is_some(),
            "freed twice: {table}"
        );
        self.live.set(self.live.get() - 1);
    }

    fn table(&self, gpa: Gpa) -> Option<&Table> {
        self.tables.borrow().get(&gpa.as_u64()).copied()
    }

    fn gpa(&self, hva: Hva) -> Result<Gpa, PagingError> {
        let mut slots = self.slots.borrow_mut();
        let next = slots.len() as u64 + 1;
        if !slots.contains_key(&hva.gib()) && next > self.slot_limit {
            return Err(PagingError::OutOfSlots(hva));
        }
        let slot = *slots.entry(hva.gib()).or_insert(next);
        Ok(Gpa::new(slot * GIB + hva.as_u64() % GIB).unwrap())
    }

    fn has_1g(&self) -> bool {
        self.has_1g
    }

    fn keep(&self, frame: Gpa) -> bool {
        let mut frames = self.frames.borrow_mut();
        frames.get_mut(&frame.as_u64()).map(|users| *users += 1).is_some()
    }

    fn release(&self, frame: Gpa) {
        let mut frames = self.frames.borrow_mut();
        let users = frames.get_mut(&frame.as_u64()).expect("released twice");
        *users -= 1;
        if *users == 0 {
            frames.remove(&frame.as_u64());
        }
    }

    fn retire(&self, frame: Gpa, _: &Retired) {
        self.release(frame);
    }
}

fn gva(address: u64) -> Gva {
    Gva::new(address).unwrap()
}

fn both(test: impl Fn(&Fake)) {
    test(&Fake::new(true));
    test(&Fake::new(false));
}

#[test]
fn fill_maps_the_whole_gib_to_its_slot() {
    both(|fake| {
        let tree = Tree::new(fake).unwrap();
        assert_eq!(tree.look_up(gva(0x5555_5555_5555)), None);
        assert_eq!(tree.has_page(gva(0x5555_5555_5555)), None);
        assert_eq!(tree.fill(gva(0x5555_5555_5555)), Ok(true));
        assert_eq!(tree.has_page(gva(0x5555_5555_5555)), Some(true));
        // A second thread that came too late goes on as the first.
        assert_eq!(tree.fill(gva(0x5555_5555_5555)), Ok(true));
        let first = 0x5555_5555_5555 / GIB * GIB;
        for offset in [0, 1, 0x12_3456, GIB - 1] {
            let found = tree.look_up(gva(first + offset)).unwrap();
            assert_eq!(found.gpa, Gpa::new(GIB + offset).unwrap());
            assert_eq!(found.permissions, Permissions::ALL);
            assert_eq!(found.page_bytes, if fake.has_1g { GIB } else { 2 << 20 });
        }
        assert_eq!(tree.look_up(gva(first + GIB)), None);
        assert_eq!(tree.look_up(gva(first - 1)), None);
    });
}

#[test]
fn fill_leaves_the_upper_half_alone() {
    both(|fake| {
        let tree = Tree::new(fake).unwrap();
        assert_eq!(tree.fill(gva(0xffff_8000_0000_0000)), Ok(false));
        assert!(fake.slots.borrow().is_empty());
    });
}

#[test]
fn protect_touches_exactly_the_range() {
    both(|fake| {
        let tree = Tree::new(fake).unwrap();
        let start = 0x7f00_0000_0000 + (2 << 20) - 0x3000;
        let bytes = 0x5000;
        tree.protect(gva(start), bytes, Permissions::NONE).unwrap();
        for offset in (0..4 << 20).step_by(0x1000) {
            let at = 0x7f00_0000_0000 + offset;
            let inside = at >= start && at < start + bytes;
            let found = tree.look_up(gva(at)).unwrap();
            assert_eq!(
                found.permissions,
                if inside { Permissions::NONE } else { Permissions::ALL },
                "{at:#x}"
            );
            assert_eq!(found.gpa.as_u64(), GIB + offset);
        }
        tree.protect(gva(start), bytes, Permissions::WRITE).unwrap();
        assert_eq!(tree.look_up(gva(start)).unwrap().permissions, Permissions::WRITE);
        assert_eq!(tree.look_up(gva(start + bytes)).unwrap().permissions, Permissions::ALL);
    });
}

#[test]
fn a_range_over_two_gibs_keeps_each_in_its_slot() {
    both(|fake| {
        let tree = Tree::new(fake).unwrap();
        // The second GiB is used first: its slot is the lower one.
        tree.fill(gva(GIB * 101)).unwrap();
        tree.protect(gva(GIB * 101 - 0x1000), 0x2000, Permissions::READ)
            .unwrap();
        assert_eq!(tree.look_up(gva(GIB * 101 - 1)).unwrap().gpa.as_u64(), 3 * GIB - 1);
        assert_eq!(tree.look_up(gva(GIB * 101)).unwrap().gpa.as_u64(), GIB);
        assert_eq!(tree.look_up(gva(GIB * 101)).unwrap().permissions, Permissions::READ);
        assert_eq!(
            tree.look_up(gva(GIB * 101 + 0x1000)).unwrap().permissions,
            Permissions::ALL
        );
    });
}

#[test]
fn whole_leaves_are_not_split() {
    let fake = Fake::new(true);
    let tree = Tree::new(&fake).unwrap();
    tree.protect(gva(GIB * 4), GIB * 2, Permissions::READ).unwrap();
    assert_eq!(fake.live.get(), 2);
    assert_eq!(tree.look_up(gva(GIB * 5)).unwrap().page_bytes, GIB);
    tree.protect(gva(GIB * 4 + (2 << 20)), 2 << 20, Permissions::ALL)
        .unwrap();
    assert_eq!(fake.live.get(), 3);
    assert_eq!(tree.look_up(gva(GIB * 4 + (2 << 20))).unwrap().page_bytes, 2 << 20);
}

#[test]
fn unmapped_is_not_filled_again() {
    both(|fake| {
        let tree = Tree::new(fake).unwrap();
        tree.unmap(gva(GIB * 7), GIB, &Retired::default()).unwrap();
        assert_eq!(tree.look_up(gva(GIB * 7)), None);
        assert_eq!(tree.fill(gva(GIB * 7)), Ok(false));
        assert_eq!(
            tree.protect(gva(GIB * 7), 0x1000, Permissions::ALL),
            Err(PagingError::NotMapped(gva(GIB * 7)))
        );
        // Mapping one page of it brings back that page only.
        tree.map(
            gva(GIB * 7 + 0x1000),
            0x1000,
            Hva::new(GIB * 9).unwrap(),
            Permissions::READ,
            &Retired::default(),
        )
        .unwrap();
        assert_eq!(tree.look_up(gva(GIB * 7)), None);
        assert_eq!(
            tree.look_up(gva(GIB * 7 + 0x1000)).unwrap().permissions,
            Permissions::READ
        );
        assert_eq!(tree.look_up(gva(GIB * 7 + 0x2000)), None);
    });
}

#[test]
fn map_in_the_upper_half_and_alias() {
    both(|fake| {
        let tree = Tree::new(fake).unwrap();
        let high = gva(0xffff_ffff_ff60_0000);
        tree.map(
            high,
            0x2000,
            Hva::new(GIB * 3 + 0x5000).unwrap(),
            Permissions::WRITE,
            &Retired::default(),
        )
        .unwrap();
        assert_eq!(tree.look_up(high).unwrap().gpa.as_u64(), GIB + 0x5000);
        assert_eq!(
            tree.look_up(gva(0xffff_ffff_ff60_1fff)).unwrap().gpa.as_u64(),
            GIB + 0x6fff
        );
        assert_eq!(tree.look_up(gva(0xffff_ffff_ff60_2000)), None);
    });
}

#[test]
fn map_keeps_the_rest_of_an_unused_gib() {
    both(|fake| {
        let tree = Tree::new(fake).unwrap();
        tree.map(
            gva(GIB * 3),
            0x1000,
            Hva::new(GIB * 8).unwrap(),
            Permissions::READ,
            &Retired::default(),
        )
        .unwrap();
        assert_eq!(
            tree.look_up(gva(GIB * 3 + 0x1000)).unwrap().permissions,
            Permissions::ALL
        );
    });
}

#[test]
fn a_duplicate_is_independent_and_all_tables_come_back() {
    both(|fake| {
        let tree = Tree::new(fake).unwrap();
        tree.protect(gva(GIB * 3), 0x1000, Permissions::READ).unwrap();
        let before = fake.live.get();
        let copy = tree.duplicate(&Retired::default()).unwrap();
        assert_eq!(copy.look_up(gva(GIB * 3)), tree.look_up(gva(GIB * 3)));
        assert_eq!(fake.live.get(), 2 * before);
        copy.protect(gva(GIB * 3), 0x1000, Permissions::NONE).unwrap();
        copy.unmap(gva(GIB * 3 + 0x1000), 0x1000, &Retired::default()).unwrap();
        assert_eq!(tree.look_up(gva(GIB * 3)).unwrap().permissions, Permissions::READ);
        assert_eq!(
            tree.look_up(gva(GIB * 3 + 0x1000)).unwrap().permissions,
            Permissions::ALL
        );
        copy.free();
        assert_eq!(fake.live.get(), before);
        tree.free();
        assert_eq!(fake.live.get(), 0);
    });
}

#[test]
fn running_out_of_pages_leaks_nothing_and_changes_nothing_visible() {
    for has_1g in [true, false] {
        for limit in 1..12 {
            let mut fake = Fake::new(has_1g);
            fake.limit = limit;
            let tree = Tree::new(&fake).unwrap();
            let result = tree.protect(gva(GIB * 3), 0x1000, Permissions::READ);
            match result {
                Ok(()) => assert_eq!(tree.look_up(gva(GIB * 3)).unwrap().permissions, Permissions::READ),
                Err(error) => {
                    assert_eq!(error, PagingError::OutOfMemory(12));
                    let found = tree.look_up(gva(GIB * 3)).map(|found| found.permissions);
                    assert!(found.is_none() || found == Some(Permissions::ALL));
                }
            }
            let before = fake.live.get();
            if tree.duplicate(&Retired::default()).is_err() {
                assert_eq!(fake.live.get(), before);
            }
        }
    }
}

#[test]
fn running_out_of_slots_is_said() {
    let mut fake = Fake::new(true);
    fake.slot_limit = 2;
    let tree = Tree::new(&fake).unwrap();
    tree.fill(gva(GIB)).unwrap();
    tree.fill(gva(GIB * 2)).unwrap();
    assert_eq!(
        tree.fill(gva(GIB * 3)),
        Err(PagingError::OutOfSlots(Hva::new(GIB * 3).unwrap()))
    );
}

#[test]
fn bad_ranges_are_refused() {
    let fake = Fake::new(true);
    let tree = Tree::new(&fake).unwrap();
    let unaligned = |start, bytes| {
        Err(PagingError::Unaligned {
            start: gva(start),
            bytes,
        })
    };
    assert_eq!(tree.protect(gva(1), 0x1000, Permissions::READ), unaligned(1, 0x1000));
    assert_eq!(tree.protect(gva(0x1000), 1, Permissions::READ), unaligned(0x1000, 1));
    let end = 0x7fff_ffff_f000;
    let outside = Err(PagingError::OutOfRange {
        start: gva(end),
        bytes: 0x2000,
    });
    assert_eq!(tree.protect(gva(end), 0x2000, Permissions::READ), outside);
    assert_eq!(tree.protect(gva(end), 0x1000, Permissions::READ), Ok(()));
    assert_eq!(tree.protect(gva(0x1000), 0, Permissions::READ), Ok(()));
}

#[test]
fn accessed_and_dirty_are_cleared_page_by_page() {
    both(|fake| {
        let tree = Tree::new(fake).unwrap();
        tree.clear_accessed_dirty(gva(GIB * 2), 0x2000).unwrap();
        let cleared = tree.look_up(gva(GIB * 2 + 0x1000)).unwrap();
        assert!(!cleared.accessed && !cleared.dirty && cleared.page_bytes == 0x1000);
        assert!(tree.look_up(gva(GIB * 2 + 0x2000)).unwrap().dirty);
    });
}

/// Large pages before, behind and around a split one: each is named once.
#[test]
fn a_scan_goes_into_tables_between_large_pages() {
    use crate::paging::used::Used;
    let fake = Fake::new(true);
    let tree = Tree::new(&fake).unwrap();
    let start = GIB * 3;
    tree.protect(gva(start + (3 << 20)), 0x1000, Permissions::READ).unwrap();
    for used in [Used::Accessed, Used::Dirty, Used::Both] {
        for clear in [false, true] {
            tree.protect(gva(start), 8 << 20, Permissions::ALL).unwrap();
            tree.change(gva(start), 8 << 20, &Retired::default(), |entry| {
                Entry(entry.with_permissions(Permissions::ALL).0 | Used::Both.mask())
            })
            .unwrap();
            let (mut done, mut bytes, mut pages) = (0, 0, 0);
            while let Some(batch) = tree.take_used(gva(start), 8 << 20, done, used, clear).unwrap() {
                let count: u32 = batch.used.iter().map(|word| word.count_ones()).sum();
                pages += count;
                bytes += u64::from(count) * batch.page_bytes;
                done = batch.done;
            }
            assert_eq!((bytes, pages), (8 << 20, 3 + 512));
        }
    }
}
