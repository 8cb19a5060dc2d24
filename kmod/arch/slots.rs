// SPDX-License-Identifier: GPL-2.0

//! The table of GPA slots: which GiB of the process lies at which GiB of guest-physical space.
//!
//! ```text
//!   HVA  | GiB number: 17 bits | offset: 30 bits |
//!                 |                     |
//!            SlotTable             unchanged
//!                 v                     v
//!   GPA  | slot: gpa_bits - 30 | offset: 30 bits |
//! ```
//!
//! Slots are handed out on first use, one to one, and recycled by [`SlotTable::release`]. Slot 0 is never handed out,
//! so that a GPA near 0, the likeliest wrong one, always lies in no slot.
//!
//! The table lives in storage of the caller's that it never allocates: an array of `u32` all zero, of
//! [`words_for`]`(n)` words for n slots. It starts small; when it is full, [`SlotTable::assign`] says how much it needs
//! and [`SlotTable::grow`] moves it. Every operation but `grow` takes constant expected time.

use super::addr::Gpa;
use super::addr::Hva;
use super::addr::GIB_BYTES;

/// Most slots of a table, slot 0 included: 16 TiB of guest-physical space.
pub const MAX_SLOTS: u32 = 1 << 14;
/// Slots for which the smallest storage has room.
pub const MIN_CAPACITY: u32 = 64;
/// log2 of the bytes of a slot.
pub const SLOT_SHIFT: u32 = 30;

/// Words of storage for slots `0 .. slots`, rounded up to what a table can use.
///
/// 3 words per slot: the reverse table and a hash table of twice its length.
pub const fn words_for(slots: u32) -> usize {
    let slots = if slots > MAX_SLOTS { MAX_SLOTS } else { slots };
    let slots = if slots < MIN_CAPACITY { MIN_CAPACITY } else { slots };
    3 * slots.next_power_of_two() as usize
}

/// Why no slot could be handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AssignError {
    /// All slots of the guest-physical space are in use.
    OutOfSlots,
    /// The storage is full: [`SlotTable::grow`] into zeroed storage of this many words and ask again.
    NeedStorage { words: usize },
    /// The wanted slot belongs to another GiB, or the GiB has another slot.
    Taken,
    /// The wanted GPA is not the first of a slot of this guest-physical space.
    NoSuchSlot,
}

/// A one-to-one table between GiBs of the process and GPA slots.
///
/// `S` is the storage: `&mut [u32]`, `Box<[u32]>`, a kernel vector.
///
/// # Invariants
///
/// - `reverse[slot]` is 0 where the slot is free, else the GiB's number + 1; `reverse[0]` is 0.
/// - `hash` holds each slot in use once, reachable from its GiB's home by linear probing, and 0 elsewhere. It is at
///   most half full, so a probe ends.
#[derive(Debug)]
pub struct SlotTable<S> {
    storage: S,
    /// Slots that the storage has room for, a power of two.
    capacity: u32,
    /// Slots of the guest-physical space, slot 0 included.
    limit: u32,
    in_use: u32,
    /// Behind the highest slot that was ever handed out.
    end: u32,
    /// Where the search for a free slot starts.
    next: u32,
}

impl<S: AsRef<[u32]> + AsMut<[u32]>> SlotTable<S> {
    /// An empty table for a guest-physical space of `gpa_bits` bits.
    ///
    /// None where the storage has fewer words than `words_for(1)` or `gpa_bits` leaves no slot besides slot 0. The
    /// storage is zeroed; words that no power-of-two table can use stay unused.
    pub fn new(mut storage: S, gpa_bits: u32) -> Option<Self> {
        let limit = match gpa_bits {
            0..=30 => return None,
            31..=43 => 1 << (gpa_bits - SLOT_SHIFT),
            _ => MAX_SLOTS,
        };
        let capacity = capacity_of(storage.as_ref().len())?;
        storage.as_mut().fill(0);
        Some(Self {
            storage,
            capacity,
            limit,
            in_use: 0,
            end: 1,
            next: 1,
        })
    }

    /// Where `hva` lies in guest-physical space; none if its GiB has no slot.
    pub fn lookup(&self, hva: Hva) -> Option<Gpa> {
        let (slot, _) = self.find(gib_of(hva))?;
        Some(join(slot, hva))
    }

    /// As [`Self::lookup`], handing out a slot if there is none.
    ///
    /// # Errors
    ///
    /// [`AssignError`]; the table is unchanged.
    pub fn assign(&mut self, hva: Hva) -> Result<Gpa, AssignError> {
        let gib = gib_of(hva);
        if let Some((slot, _)) = self.find(gib) {
            return Ok(join(slot, hva));
        }
        if self.free() == 0 {
            return Err(AssignError::OutOfSlots);
        }
        let end = self.limit.min(self.capacity);
        if self.in_use + 1 >= end {
            return Err(AssignError::NeedStorage {
                words: words_for(self.capacity * 2),
            });
        }
        let slot = self.take_free(end);
        let (reverse, hash) = split(self.storage.as_mut(), self.capacity);
        reverse[slot as usize] = gib + 1;
        insert(hash, gib, slot);
        self.in_use += 1;
        self.end = self.end.max(slot + 1);
        Ok(join(slot, hva))
    }

    /// As [`Self::assign`], with the slot that the caller wants: the one that starts at `gpa`.
    ///
    /// # Errors
    ///
    /// [`AssignError`]; the table is unchanged.
    pub fn assign_at(&mut self, hva: Hva, gpa: Gpa) -> Result<(), AssignError> {
        let gib = gib_of(hva);
        let wanted = match u32::try_from(gpa.as_u64() >> SLOT_SHIFT) {
            Ok(wanted) if gpa.as_u64() % GIB_BYTES == 0 && (1..self.limit).contains(&wanted) => wanted,
            _ => return Err(AssignError::NoSuchSlot),
        };
        if let Some((slot, _)) = self.find(gib) {
            return if slot == wanted {
                Ok(())
            } else {
                Err(AssignError::Taken)
            };
        }
        if wanted >= self.capacity {
            return Err(AssignError::NeedStorage {
                words: words_for(wanted + 1),
            });
        }
        let (reverse, hash) = split(self.storage.as_mut(), self.capacity);
        if reverse[wanted as usize] != 0 {
            return Err(AssignError::Taken);
        }
        reverse[wanted as usize] = gib + 1;
        insert(hash, gib, wanted);
        self.in_use += 1;
        self.end = self.end.max(wanted + 1);
        Ok(())
    }

    /// Where `gpa` lies in the process; none if its slot is free or beyond the space.
    pub fn hva_of(&self, gpa: Gpa) -> Option<Hva> {
        let slot = u32::try_from(gpa.as_u64() >> SLOT_SHIFT).ok()?;
        if slot >= self.capacity {
            return None;
        }
        // The guest chose it and what stands there is followed: 0 also where the CPU speculates past the comparison. Both are
        // below 2^31; the compiler must not see what the mask is.
        let mask = (core::hint::black_box(slot.wrapping_sub(self.capacity)) as i32 >> 31) as u32;
        // The first `capacity` words.
        let gib = self.storage.as_ref().get((slot & mask) as usize)?.checked_sub(1)?;
        Hva::new((u64::from(gib) << SLOT_SHIFT) | (gpa.as_u64() & (GIB_BYTES - 1)))
    }

    /// Frees the slot of `hva`'s GiB and gives the GPA at which it started; none if it had none.
    ///
    /// The caller has removed the slot's EPT entries and flushed them, else a later owner's GiB would be reached by
    /// old translations.
    pub fn release(&mut self, hva: Hva) -> Option<Gpa> {
        let gib = gib_of(hva);
        let (slot, mut hole) = self.find(gib)?;
        let (reverse, hash) = split(self.storage.as_mut(), self.capacity);
        reverse[slot as usize] = 0;

        // Close the hole in the probe sequence: move back each later entry whose home is not behind the hole.
        let mask = hash.len() - 1;
        let mut at = hole;
        loop {
            at = (at + 1) & mask;
            let moved = hash[at];
            if moved == 0 {
                break;
            }
            let home = home_of(reverse[moved as usize] - 1, mask);
            if (at.wrapping_sub(home) & mask) >= (at.wrapping_sub(hole) & mask) {
                hash[hole] = moved;
                hole = at;
            }
        }
        hash[hole] = 0;
        self.in_use -= 1;
        Gpa::new(u64::from(slot) << SLOT_SHIFT)
    }

    /// Moves the table into larger storage and gives the old one back.
    ///
    /// # Errors
    ///
    /// `storage` itself, where it is not larger than what the table has.
    pub fn grow(&mut self, mut storage: S) -> Result<S, S> {
        let capacity = match capacity_of(storage.as_ref().len()) {
            Some(capacity) if capacity > self.capacity => capacity,
            _ => return Err(storage),
        };
        storage.as_mut().fill(0);
        let (reverse, hash) = split(storage.as_mut(), capacity);
        let (old, _) = split_ref(self.storage.as_ref(), self.capacity);
        for (slot, &entry) in old.iter().enumerate() {
            if let Some(gib) = entry.checked_sub(1) {
                reverse[slot] = entry;
                insert(hash, gib, slot as u32);
            }
        }
        self.capacity = capacity;
        Ok(core::mem::replace(&mut self.storage, storage))
    }

    /// Slots that can still be handed out, with storage growing as needed.
    pub fn free(&self) -> u32 {
        self.limit - 1 - self.in_use
    }

    /// Slots handed out.
    pub fn in_use(&self) -> u32 {
        self.in_use
    }

    /// Every GiB that has a slot: its first HVA and GPA, by ascending slot.
    pub fn iter(&self) -> impl Iterator<Item = (Hva, Gpa)> + '_ {
        let (reverse, _) = split_ref(self.storage.as_ref(), self.capacity);
        reverse.iter().enumerate().filter_map(|(slot, entry)| {
            let gib = entry.checked_sub(1)?;
            let hva = Hva::new(u64::from(gib) << SLOT_SHIFT)?;
            Some((hva, Gpa::new((slot as u64) << SLOT_SHIFT)?))
        })
    }

    /// Every slot that was ever handed out is below this one.
    pub fn end(&self) -> u32 {
        self.end
    }

    /// Slot of a GiB and its place in the hash table.
    fn find(&self, gib: u32) -> Option<(u32, usize)> {
        let (reverse, hash) = split_ref(self.storage.as_ref(), self.capacity);
        let mask = hash.len() - 1;
        let mut at = home_of(gib, mask);
        loop {
            let slot = hash[at];
            if slot == 0 {
                return None;
            }
            if reverse[slot as usize] == gib + 1 {
                return Some((slot, at));
            }
            at = (at + 1) & mask;
        }
    }

    /// A free slot in `1 .. end`, of which there is one. Takes them in turn: a released slot rests as long as possible.
    fn take_free(&mut self, end: u32) -> u32 {
        let (reverse, _) = split_ref(self.storage.as_ref(), self.capacity);
        let mut slot = self.next;
        loop {
            if slot >= end {
                slot = 1;
            }
            if reverse[slot as usize] == 0 {
                break;
            }
            slot += 1;
        }
        self.next = slot + 1;
        slot
    }
}

/// Largest capacity that fits in `words`.
fn capacity_of(words: usize) -> Option<u32> {
    let slots = u32::try_from(words / 3).unwrap_or(MAX_SLOTS).min(MAX_SLOTS);
    if slots < MIN_CAPACITY {
        return None;
    }
    Some(1 << slots.ilog2())
}

fn split(words: &mut [u32], capacity: u32) -> (&mut [u32], &mut [u32]) {
    let capacity = capacity as usize;
    let (reverse, rest) = words.split_at_mut(capacity);
    (reverse, &mut rest[..2 * capacity])
}

fn split_ref(words: &[u32], capacity: u32) -> (&[u32], &[u32]) {
    let capacity = capacity as usize;
    let (reverse, rest) = words.split_at(capacity);
    (reverse, &rest[..2 * capacity])
}

/// Puts a slot into the hash table, which has room.
fn insert(hash: &mut [u32], gib: u32, slot: u32) {
    let mask = hash.len() - 1;
    let mut at = home_of(gib, mask);
    while hash[at] != 0 {
        at = (at + 1) & mask;
    }
    hash[at] = slot;
}

/// Where the probe for a GiB starts: Fibonacci hashing spreads the neighbours that a process has.
fn home_of(gib: u32, mask: usize) -> usize {
    (gib.wrapping_mul(0x9e37_79b1) >> 15) as usize & mask
}

/// Number of an address' GiB, below 2^17.
fn gib_of(hva: Hva) -> u32 {
    (hva.as_u64() >> SLOT_SHIFT) as u32
}

fn join(slot: u32, hva: Hva) -> Gpa {
    let address = (u64::from(slot) << SLOT_SHIFT) | (hva.as_u64() & (GIB_BYTES - 1));
    // A slot is below MAX_SLOTS, so the address is below 2^44.
    Gpa::new(address).unwrap_or(GPA_ZERO)
}

const GPA_ZERO: Gpa = match Gpa::new(0) {
    Some(gpa) => gpa,
    None => panic!(),
};
