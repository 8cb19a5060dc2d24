// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the program does with its heap: a linked list, a hash map and a tree, each beside a model of std's that says what
//! must be in it.

use std::collections::BTreeMap;
use std::collections::VecDeque;

use crate::heap::GcError;
use crate::heap::Heap;
use crate::heap::Ref;
use crate::heap::REFS;

/// A small generator of numbers, the same each time (xorshift64*).
#[derive(Clone)]
pub struct Numbers(u64);

impl Numbers {
    pub fn new() -> Self {
        Self(0x00d0_0e15)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 32) % end
    }
}

/// Something in the heap that grows, changes and shrinks.
pub trait Work {
    fn name(&self) -> &'static str;
    /// Adds an entry.
    fn grow(&mut self, heap: &mut Heap<'_>, numbers: &mut Numbers) -> Result<(), GcError>;
    /// Changes something; as much goes as comes.
    fn step(&mut self, heap: &mut Heap<'_>, numbers: &mut Numbers) -> Result<(), GcError>;
    /// All entries, as they are found in the heap and as the model has them.
    fn entries(&self, heap: &Heap<'_>) -> Result<(Vec<Entry>, Vec<Entry>), GcError>;
}

/// Key and value.
pub type Entry = (u64, u64);

/// Compares heap and model; a number that stands for the contents (FNV-1a).
pub fn check(work: &dyn Work, heap: &Heap<'_>) -> Result<u64, GcError> {
    let (found, wanted) = work.entries(heap)?;
    if found != wanted {
        let (first, second) = (found.len(), wanted.len());
        let place = found.iter().zip(&wanted).position(|(a, b)| a != b);
        let text = format!("{first} entries, not {second}; the first that differs: {place:?}");
        return Err(GcError::Differs(work.name(), text));
    }
    let words = found.iter().flat_map(|(key, value)| [*key, *value]);
    Ok(words.fold(0xcbf2_9ce4_8422_2325, |hash, word| {
        (hash ^ word).wrapping_mul(0x0100_0000_01b3)
    }))
}

/// A linked list: root 0 its first cell, root 1 its last. New cells come behind the last, and sometimes near the first.
#[derive(Default)]
pub struct List {
    model: VecDeque<Entry>,
    next: u64,
}

/// How far from the first cell a list is changed.
const REACH: u64 = 24;

impl List {
    fn entry(&mut self, numbers: &mut Numbers) -> Entry {
        self.next += 1;
        (self.next, numbers.next())
    }
}

impl Work for List {
    fn name(&self) -> &'static str {
        "linked list"
    }

    fn grow(&mut self, heap: &mut Heap<'_>, numbers: &mut Numbers) -> Result<(), GcError> {
        let entry = self.entry(numbers);
        let cell = heap.allocate(entry.0, entry.1)?;
        match heap.roots[1] {
            Ref::NONE => heap.roots[0] = cell,
            last => heap.set(last, 0, cell)?,
        }
        heap.roots[1] = cell;
        self.model.push_back(entry);
        Ok(())
    }

    fn step(&mut self, heap: &mut Heap<'_>, numbers: &mut Numbers) -> Result<(), GcError> {
        if numbers.below(4) == 0 {
            // Behind a cell near the first one: an old cell refers to a new one.
            let place = numbers.below(REACH.min(self.model.len() as u64 - 1).max(1));
            let mut at = heap.roots[0];
            for _ in 0..place {
                at = heap.get(at, 0)?;
            }
            let entry = self.entry(numbers);
            let cell = heap.allocate(entry.0, entry.1)?;
            let behind = heap.get(at, 0)?;
            heap.set(cell, 0, behind)?;
            heap.set(at, 0, cell)?;
            self.model.insert(place as usize + 1, entry);
        } else {
            self.grow(heap, numbers)?;
        }
        heap.roots[0] = heap.get(heap.roots[0], 0)?;
        self.model.pop_front();
        Ok(())
    }

    fn entries(&self, heap: &Heap<'_>) -> Result<(Vec<Entry>, Vec<Entry>), GcError> {
        let mut found = Vec::with_capacity(self.model.len());
        let mut at = heap.roots[0];
        while !at.is_none() && found.len() <= self.model.len() {
            found.push((heap.key(at)?, heap.value(at)?));
            at = heap.get(at, 0)?;
        }
        Ok((found, self.model.iter().copied().collect()))
    }
}

/// Entries by key, that come, change and go in the same way in a map and in a tree.
pub trait Keyed {
    const NAME: &str;
    fn model(&self) -> &BTreeMap<u64, u64>;
    /// All entries that are found in the heap.
    fn found(&self, heap: &Heap<'_>) -> Result<Vec<Entry>, GcError>;
    /// Puts an entry in, in place of the key's old one.
    fn insert(&mut self, heap: &mut Heap<'_>, key: u64, value: u64) -> Result<(), GcError>;
    /// Takes a key out, if it is there.
    fn remove(&mut self, heap: &mut Heap<'_>, key: u64) -> Result<(), GcError>;
}

impl<T: Keyed> Work for T {
    fn name(&self) -> &'static str {
        T::NAME
    }

    fn grow(&mut self, heap: &mut Heap<'_>, numbers: &mut Numbers) -> Result<(), GcError> {
        let (key, value) = (numbers.next(), numbers.next());
        self.insert(heap, key, value)
    }

    /// Gives a key another value, or puts an entry in another's place.
    fn step(&mut self, heap: &mut Heap<'_>, numbers: &mut Numbers) -> Result<(), GcError> {
        // Near a random place.
        let place = numbers.next();
        let behind = self.model().range(place..).next();
        let Some((&key, _)) = behind.or_else(|| self.model().iter().next()) else {
            return self.grow(heap, numbers);
        };
        if numbers.below(2) == 0 {
            let value = numbers.next();
            return self.insert(heap, key, value);
        }
        self.remove(heap, key)?;
        self.grow(heap, numbers)
    }

    fn entries(&self, heap: &Heap<'_>) -> Result<(Vec<Entry>, Vec<Entry>), GcError> {
        let model = self.model().iter().map(|(key, value)| (*key, *value));
        Ok((self.found(heap)?, model.collect()))
    }
}

/// Levels of the table of buckets, of `REFS` each.
const LEVELS: usize = 3;
const BUCKETS: u64 = (REFS as u64).pow(LEVELS as u32 + 1);

/// A hash map: a table of buckets, which are chains. An entry that changes is replaced, as functional programs do.
#[derive(Default)]
pub struct Map {
    model: BTreeMap<u64, u64>,
}

fn hash(key: u64) -> u64 {
    (key ^ key >> 29).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32
}

impl Map {
    /// The cell of the table, and the place in it, that the chain of a key begins at.
    fn bucket(heap: &mut Heap<'_>, key: u64) -> Result<(Ref, usize), GcError> {
        if heap.roots[0].is_none() {
            heap.roots[0] = heap.allocate(0, 0)?;
        }
        let (mut at, mut bucket) = (heap.roots[0], hash(key) % BUCKETS);
        for _ in 0..LEVELS {
            let place = (bucket % REFS as u64) as usize;
            bucket /= REFS as u64;
            let mut below = heap.get(at, place)?;
            if below.is_none() {
                below = heap.allocate(0, 0)?;
                heap.set(at, place, below)?;
            }
            at = below;
        }
        Ok((at, bucket as usize))
    }
}

impl Keyed for Map {
    const NAME: &str = "hash map";

    fn model(&self) -> &BTreeMap<u64, u64> {
        &self.model
    }

    fn insert(&mut self, heap: &mut Heap<'_>, key: u64, value: u64) -> Result<(), GcError> {
        self.remove(heap, key)?;
        let (table, place) = Self::bucket(heap, key)?;
        let cell = heap.allocate(key, value)?;
        let first = heap.get(table, place)?;
        heap.set(cell, 0, first)?;
        heap.set(table, place, cell)?;
        self.model.insert(key, value);
        Ok(())
    }

    fn remove(&mut self, heap: &mut Heap<'_>, key: u64) -> Result<(), GcError> {
        self.model.remove(&key);
        let (mut before, mut place) = Self::bucket(heap, key)?;
        loop {
            let at = heap.get(before, place)?;
            if at.is_none() {
                return Ok(());
            }
            if heap.key(at)? == key {
                let behind = heap.get(at, 0)?;
                return heap.set(before, place, behind);
            }
            (before, place) = (at, 0);
        }
    }

    fn found(&self, heap: &Heap<'_>) -> Result<Vec<Entry>, GcError> {
        let mut found = Vec::with_capacity(self.model.len());
        let mut tables = vec![(heap.roots[0], 0)];
        while let Some((at, level)) = tables.pop() {
            for place in 0..REFS {
                let mut below = heap.get(at, place)?;
                if below.is_none() {
                } else if level < LEVELS {
                    tables.push((below, level + 1));
                } else {
                    while !below.is_none() && found.len() <= self.model.len() {
                        found.push((heap.key(below)?, heap.value(below)?));
                        below = heap.get(below, 0)?;
                    }
                }
            }
        }
        found.sort_unstable();
        Ok(found)
    }
}

/// A binary search tree: smaller keys by reference 0, larger ones by 1.
#[derive(Default)]
pub struct Tree {
    model: BTreeMap<u64, u64>,
}

/// Where a reference is: in a cell, or root 0.
#[derive(Clone, Copy)]
enum Place {
    Root,
    Cell(Ref, usize),
}

impl Place {
    fn get(self, heap: &Heap<'_>) -> Result<Ref, GcError> {
        match self {
            Self::Root => Ok(heap.roots[0]),
            Self::Cell(at, index) => heap.get(at, index),
        }
    }

    fn set(self, heap: &mut Heap<'_>, to: Ref) -> Result<(), GcError> {
        match self {
            Self::Root => heap.roots[0] = to,
            Self::Cell(at, index) => heap.set(at, index, to)?,
        }
        Ok(())
    }
}

impl Tree {
    /// Where a key is, or belongs.
    fn find(heap: &Heap<'_>, key: u64) -> Result<Place, GcError> {
        let mut place = Place::Root;
        loop {
            let at = place.get(heap)?;
            if at.is_none() || heap.key(at)? == key {
                return Ok(place);
            }
            place = Place::Cell(at, usize::from(heap.key(at)? < key));
        }
    }
}

impl Keyed for Tree {
    const NAME: &str = "tree";

    fn model(&self) -> &BTreeMap<u64, u64> {
        &self.model
    }

    fn insert(&mut self, heap: &mut Heap<'_>, key: u64, value: u64) -> Result<(), GcError> {
        let place = Self::find(heap, key)?;
        let old = place.get(heap)?;
        let cell = heap.allocate(key, value)?;
        if !old.is_none() {
            for index in 0..2 {
                let below = heap.get(old, index)?;
                heap.set(cell, index, below)?;
            }
        }
        place.set(heap, cell)?;
        self.model.insert(key, value);
        Ok(())
    }

    fn remove(&mut self, heap: &mut Heap<'_>, key: u64) -> Result<(), GcError> {
        let place = Self::find(heap, key)?;
        let at = place.get(heap)?;
        if !at.is_none() {
            let (smaller, larger) = (heap.get(at, 0)?, heap.get(at, 1)?);
            if smaller.is_none() || larger.is_none() {
                place.set(heap, if smaller.is_none() { larger } else { smaller })?;
            } else {
                // The next larger one takes its place.
                let mut next = Place::Cell(at, 1);
                while let below @ Place::Cell(..) = Place::Cell(next.get(heap)?, 0) {
                    if below.get(heap)?.is_none() {
                        break;
                    }
                    next = below;
                }
                let other = next.get(heap)?;
                let (key, value) = (heap.key(other)?, heap.value(other)?);
                let behind = heap.get(other, 1)?;
                next.set(heap, behind)?;
                heap.set_entry(at, key, value)?;
            }
        }
        self.model.remove(&key);
        Ok(())
    }

    fn found(&self, heap: &Heap<'_>) -> Result<Vec<Entry>, GcError> {
        let mut found = Vec::with_capacity(self.model.len());
        let mut path = Vec::new();
        let mut at = heap.roots[0];
        while (!at.is_none() || !path.is_empty()) && found.len() + path.len() <= 2 * self.model.len() {
            while !at.is_none() {
                path.push(at);
                at = heap.get(at, 0)?;
            }
            if let Some(last) = path.pop() {
                found.push((heap.key(last)?, heap.value(last)?));
                at = heap.get(last, 1)?;
            }
        }
        Ok(found)
    }
}
