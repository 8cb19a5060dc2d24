// SPDX-License-Identifier: MIT OR Apache-2.0

//! Random operations on trees, beside a model that knows of pages only.

use std::collections::BTreeMap;
use std::collections::BTreeSet;

use proptest::prelude::*;

use super::tests::Fake;
use super::*;
use crate::paging::share::Unshared;

const GIB: u64 = 1 << 30;
const LARGE: u64 = 2 << 20;

/// Where the operations are: across the edge of two GiBs, and in the half that is not filled in.
const WINDOWS: [(u64, u64); 2] = [(4 * GIB - 2 * LARGE, 4 * LARGE), (0xffff_9000_0000_0000, 2 * LARGE)];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Page {
    /// GPA, or which page of which copy.
    to: u64,
    permissions: Permissions,
    key: u8,
    shared: bool,
    owned: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nobody said anything about it.
    Fresh,
    Gone,
    Page(Page),
}

#[derive(Clone, Debug)]
enum Op {
    Protect(Permissions),
    /// To the memory that begins so many pages behind a GiB's start.
    Map(u64, Permissions),
    Unmap,
    SetUser(bool),
    SetKey(u8),
    Clear,
    /// What the CPU does when the first page is used.
    Touch(bool),
    TakeUsed(Used, bool),
    Merge,
    Share,
    /// What a write to the first page does.
    Write,
    /// Goes on with a duplicate.
    Duplicate,
    Fill,
    Walk,
}

fn permissions() -> impl Strategy<Value = Permissions> {
    prop::sample::select(vec![
        Permissions::NONE,
        Permissions::READ,
        Permissions::WRITE,
        Permissions::EXECUTE,
        Permissions::ALL,
        Permissions::USER,
        Permissions::WRITE | Permissions::USER,
    ])
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => permissions().prop_map(Op::Protect),
        3 => (0u64..2048, permissions()).prop_map(|(page, permissions)| Op::Map(page, permissions)),
        1 => permissions().prop_map(|permissions| Op::Map(0, permissions)),
        2 => Just(Op::Unmap),
        1 => any::<bool>().prop_map(Op::SetUser),
        1 => (0u8..16).prop_map(Op::SetKey),
        1 => Just(Op::Clear),
        2 => any::<bool>().prop_map(Op::Touch),
        2 => (prop::sample::select(vec![Used::Accessed, Used::Dirty, Used::Both]), any::<bool>())
            .prop_map(|(used, clear)| Op::TakeUsed(used, clear)),
        2 => Just(Op::Merge),
        2 => Just(Op::Share),
        3 => Just(Op::Write),
        1 => Just(Op::Duplicate),
        1 => Just(Op::Fill),
        1 => Just(Op::Walk),
    ]
}

/// Window, first page in it and number of pages: often whole large pages.
fn range() -> impl Strategy<Value = (u64, u64)> {
    let pages = prop_oneof![
        3 => (0u64..1024, 1u64..20),
        1 => (0u64..1024, 1u64..1024),
        2 => (0u64..2, 1u64..3).prop_map(|(start, count)| (start * 512, count * 512)),
    ];
    (0..WINDOWS.len(), pages).prop_map(|(window, (first, count))| {
        let (start, bytes) = WINDOWS[window];
        let first = first % (bytes / PAGE_BYTES);
        let count = count.min(bytes / PAGE_BYTES - first);
        (start + first * PAGE_BYTES, count * PAGE_BYTES)
    })
}

fn gva(address: u64) -> Gva {
    Gva::new(address).unwrap()
}

struct Model<'f> {
    fake: &'f Fake,
    tree: Tree<'f, Fake>,
    pages: BTreeMap<u64, State>,
    /// Pages that the CPU used, or wrote to, and nobody cleared since.
    accessed: BTreeSet<u64>,
    dirty: BTreeSet<u64>,
    next_frame: u64,
    retired: Retired,
}

impl<'f> Model<'f> {
    fn new(fake: &'f Fake) -> Self {
        let pages = WINDOWS
            .iter()
            .flat_map(|(start, bytes)| (*start..start + bytes).step_by(PAGE_BYTES as usize))
            .map(|page| (page, State::Fresh))
            .collect();
        Self {
            fake,
            tree: Tree::new(fake).unwrap(),
            pages,
            accessed: BTreeSet::new(),
            dirty: BTreeSet::new(),
            next_frame: 0,
            retired: Retired::default(),
        }
    }

    fn gpa(&self, hva: u64) -> u64 {
        self.fake.gpa(Hva::new(hva).unwrap()).unwrap().as_u64()
    }

    /// What is there once somebody used the page; `None` where using it does not help.
    fn filled(&self, page: u64) -> Option<Page> {
        match self.pages[&page] {
            State::Page(found) => Some(found),
            State::Fresh if page < USER_END => Some(Page {
                to: self.gpa(page),
                permissions: Permissions::ALL,
                key: 0,
                shared: false,
                owned: false,
            }),
            State::Fresh | State::Gone => None,
        }
    }

    /// As `Tree::change`: up to the first page that cannot be changed.
    fn change(&mut self, start: u64, bytes: u64, change: impl Fn(Page) -> State) -> Result<(), PagingError> {
        for page in (start..start + bytes).step_by(PAGE_BYTES as usize) {
            let old = self.filled(page).ok_or(PagingError::NotMapped(gva(page)))?;
            self.pages.insert(page, change(old));
        }
        Ok(())
    }

    fn apply(&mut self, op: &Op, start: u64, bytes: u64) {
        let tree = Tree {
            frames: self.fake,
            root: self.tree.root,
        };
        let at = gva(start);
        match *op {
            Op::Protect(permissions) => {
                let expected = self.change(start, bytes, |page| State::Page(Page { permissions, ..page }));
                assert_eq!(tree.protect(at, bytes, permissions), expected);
            }
            Op::Map(page, permissions) => {
                let to = 9 * GIB + page * PAGE_BYTES;
                for offset in (0..bytes).step_by(PAGE_BYTES as usize) {
                    let page = Page {
                        to: self.gpa(to + offset),
                        permissions,
                        key: 0,
                        shared: false,
                        owned: false,
                    };
                    self.pages.insert(start + offset, State::Page(page));
                }
                let mapped = tree.map(at, bytes, Hva::new(to).unwrap(), permissions, &self.retired);
                assert_eq!(mapped, Ok(()));
            }
            Op::Unmap => {
                let mut expected = Ok(());
                for page in (start..start + bytes).step_by(PAGE_BYTES as usize) {
                    if self.pages[&page] != State::Gone && self.filled(page).is_none() {
                        expected = Err(PagingError::NotMapped(gva(page)));
                        break;
                    }
                    self.pages.insert(page, State::Gone);
                }
                assert_eq!(tree.unmap(at, bytes, &self.retired), expected);
            }
            Op::SetUser(user) => {
                let expected = self.change(start, bytes, |page| {
                    let bits = Entry::leaf(Gpa::default(), 1, page.permissions).with_user(user);
                    State::Page(Page {
                        permissions: bits.permissions(),
                        ..page
                    })
                });
                assert_eq!(tree.set_user(at, bytes, user), expected);
            }
            Op::SetKey(key) => {
                let expected = self.change(start, bytes, |page| State::Page(Page { key, ..page }));
                assert_eq!(tree.set_key(at, bytes, key), expected);
            }
            Op::Clear => {
                let expected = self.change(start, bytes, State::Page);
                assert_eq!(tree.clear_accessed_dirty(at, bytes), expected);
                let end = match expected {
                    Err(PagingError::NotMapped(page)) => page.as_u64(),
                    _ => start + (bytes - 1),
                };
                for page in (start..=end)
                    .step_by(PAGE_BYTES as usize)
                    .filter(|page| expected.is_ok() || *page < end)
                {
                    self.accessed.remove(&page);
                    self.dirty.remove(&page);
                    let found = tree.look_up(gva(page)).unwrap();
                    assert!(!found.accessed && !found.dirty && found.page_bytes == PAGE_BYTES);
                }
            }
            Op::Touch(write) => self.touch(start, write),
            Op::TakeUsed(used, clear) => self.take_used(start, bytes, used, clear),
            Op::Merge => {
                for level in 1..=2 {
                    let size = leaf_bytes(level + 1);
                    for at in (start.next_multiple_of(size)..start + (bytes - 1)).step_by(size as usize) {
                        if at + (size - 1) <= start + (bytes - 1) {
                            if let Some(merged) = tree.merge(gva(at), level).unwrap() {
                                tree.finish_merge(&merged);
                                assert_eq!(tree.look_up(gva(at)).unwrap().page_bytes, size);
                            }
                        }
                    }
                }
            }
            Op::Share => {
                let expected = self.change(start, bytes, |page| State::Page(Page { shared: true, ..page }));
                assert_eq!(tree.share(at, bytes), expected);
            }
            Op::Write => self.write(start),
            Op::Duplicate => {
                self.tree = tree.duplicate(&self.retired).unwrap();
                self.check();
                tree.free();
            }
            Op::Fill => {
                tree.fill(at).unwrap();
            }
            Op::Walk => self.walk(start, bytes),
        }
        self.check_page(start);
        self.check_page(start + bytes - PAGE_BYTES);
    }

    fn touch(&mut self, page: u64, write: bool) {
        let Some(found) = self.filled(page) else { return };
        if found.permissions == Permissions::NONE {
            return;
        }
        let write = write && found.permissions.contains(Permissions::WRITE) && !found.shared;
        self.tree.fill(gva(page)).unwrap();
        let leaf = self.tree.find(gva(page)).unwrap();
        assert_eq!(leaf.kind(), Kind::Leaf);
        leaf.slot.fetch_or(Entry::used_mask(true, write), Relaxed);
        self.accessed.insert(page);
        if write {
            self.dirty.insert(page);
        }
    }

    fn take_used(&mut self, start: u64, bytes: u64, used: Used, clear: bool) {
        let mut seen = BTreeSet::new();
        let mut seen_dirty = BTreeSet::new();
        let mut done = 0;
        while let Some(batch) = self.tree.take_used(gva(start), bytes, done, used, clear).unwrap() {
            assert!(batch.done > done);
            done = batch.done;
            for index in 0..512u64 {
                let (word, bit) = (index as usize / 64, index % 64);
                if batch.used[word] >> bit & 1 == 0 {
                    assert_eq!(batch.dirty[word] >> bit & 1, 0);
                    continue;
                }
                let first = batch.start.as_u64() + index * batch.page_bytes;
                assert!(
                    first < start + bytes && first + (batch.page_bytes - 1) >= start,
                    "outside of the range"
                );
                for page in (first..=first + (batch.page_bytes - 1)).step_by(PAGE_BYTES as usize) {
                    assert!(seen.insert(page), "named twice");
                    if batch.dirty[word] >> bit & 1 != 0 {
                        seen_dirty.insert(page);
                    }
                }
            }
        }
        for page in (start..start + bytes).step_by(PAGE_BYTES as usize) {
            let was_used = match used {
                Used::Accessed => self.accessed.contains(&page),
                Used::Dirty => self.dirty.contains(&page),
                Used::Both => self.accessed.contains(&page) || self.dirty.contains(&page),
            };
            let is_mapped = matches!(self.pages[&page], State::Page(_));
            assert!(!is_mapped || !was_used || seen.contains(&page), "{page:#x} was used");
            if is_mapped && self.dirty.contains(&page) && used != Used::Accessed {
                assert!(seen_dirty.contains(&page), "{page:#x} was written");
            }
        }
        if clear {
            for page in &seen {
                if used != Used::Dirty {
                    self.accessed.remove(page);
                }
                if used != Used::Accessed {
                    self.dirty.remove(page);
                }
            }
        }
    }

    fn write(&mut self, page: u64) {
        let is_last = |frame: Gpa| self.fake.frames.borrow()[&frame.as_u64()] == 1;
        let next = self.next_frame;
        let copy = || {
            let frame = (1 << 45) + next * PAGE_BYTES;
            assert_eq!(self.fake.frames.borrow_mut().insert(frame, 1), None);
            Ok(Gpa::new(frame).unwrap())
        };
        let result = self.tree.unshare(gva(page), is_last, copy).unwrap();
        let State::Page(found) = self.pages[&page] else {
            assert_eq!(result, Unshared::NotShared);
            return;
        };
        if !found.shared || !found.permissions.contains(Permissions::WRITE) {
            assert_eq!(result, Unshared::NotShared);
            return;
        }
        let new = match result {
            Unshared::NotShared => panic!("{page:#x} is shared"),
            Unshared::Alone => {
                assert!(found.owned);
                Page { shared: false, ..found }
            }
            Unshared::Copied { released } => {
                assert_eq!(released.map(Gpa::as_u64), found.owned.then_some(found.to));
                if let Some(frame) = released {
                    self.fake.release(frame);
                }
                self.next_frame += 1;
                Page {
                    to: (1 << 45) + next * PAGE_BYTES,
                    shared: false,
                    owned: true,
                    ..found
                }
            }
        };
        self.pages.insert(page, State::Page(new));
        self.accessed.insert(page);
        self.dirty.insert(page);
        // The CPU does the write now.
        let leaf = self.tree.find(gva(page)).unwrap();
        leaf.slot.fetch_or(Entry::used_mask(true, true), Relaxed);
    }

    fn walk(&self, start: u64, bytes: u64) {
        let mut done = 0;
        let mut seen = BTreeSet::new();
        while let Some((at, mapping)) = self.tree.next(gva(start + done), bytes - done) {
            let end = at.align_down(mapping.page_bytes).as_u64() + (mapping.page_bytes - 1);
            for page in (at.as_u64()..=end).step_by(PAGE_BYTES as usize) {
                seen.insert(page);
            }
            done = end - start + 1;
            if done >= bytes {
                break;
            }
        }
        for page in (start..start + bytes).step_by(PAGE_BYTES as usize) {
            assert_eq!(
                seen.contains(&page),
                self.tree.look_up(gva(page)).is_some(),
                "{page:#x}"
            );
        }
    }

    fn check_page(&self, page: u64) {
        let found = self.tree.look_up(gva(page));
        let expected = match self.pages[&page] {
            State::Gone => None,
            // Filled in or not.
            State::Fresh if found.is_none() => None,
            State::Fresh | State::Page(_) => self.filled(page),
        };
        let got = found.map(|found| {
            let Found { level, entry, .. } = self.tree.find(gva(page)).unwrap();
            assert_eq!(found.page_bytes, leaf_bytes(level));
            Page {
                to: found.gpa.as_u64(),
                permissions: found.permissions,
                key: found.key,
                shared: entry.with_permissions(Permissions::WRITE).is_copied_on_write(),
                owned: entry.is_owner(),
            }
        });
        assert_eq!(got, expected, "at {page:#x}");
    }

    fn check(&self) {
        for page in self.pages.keys() {
            self.check_page(*page);
        }
        let owned = self
            .pages
            .values()
            .filter(|state| matches!(state, State::Page(page) if page.owned))
            .count();
        assert!(self.fake.frames.borrow().len() >= owned);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn tree_is_what_its_pages_are(
        has_1g in any::<bool>(),
        ops in prop::collection::vec((op(), range()), 1..40),
    ) {
        let fake = Fake::new(has_1g);
        let mut model = Model::new(&fake);
        for (op, (start, bytes)) in &ops {
            model.apply(op, *start, *bytes);
        }
        model.check();
        let owned = model.pages.values().filter(|state| matches!(state, State::Page(page) if page.owned)).count();
        prop_assert_eq!(fake.frames.borrow().len(), owned);
        model.tree.free();
        prop_assert_eq!(fake.live.get(), 0);
        prop_assert_eq!(fake.frames.borrow().len(), 0);
    }
}
