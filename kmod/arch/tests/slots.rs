// SPDX-License-Identifier: GPL-2.0

//! The slot table against a model, over whole lives.

use dune_arch::addr::Gpa;
use dune_arch::addr::Hva;
use dune_arch::slots::words_for;
use dune_arch::slots::AssignError;
use dune_arch::slots::SlotTable;
use dune_arch::slots::MAX_SLOTS;
use proptest::prelude::*;
use std::collections::HashMap;
use std::collections::HashSet;

type Table = SlotTable<Vec<u32>>;

const GIB: u64 = 1 << 30;

fn table(gpa_bits: u32) -> Table {
    // Rubbish in the storage: `new` zeroes it.
    SlotTable::new(vec![0xdead_beef; words_for(1)], gpa_bits).unwrap()
}

fn hva(gib: u64, offset: u64) -> Hva {
    Hva::new(gib * GIB + offset).unwrap()
}

/// Assigns with storage growing as the module does it.
fn assign(table: &mut Table, hva: Hva) -> Result<Gpa, AssignError> {
    loop {
        match table.assign(hva) {
            Err(AssignError::NeedStorage { words }) => drop(table.grow(vec![7; words]).unwrap()),
            other => return other,
        }
    }
}

#[test]
fn thirty_six_bits_give_sixty_three_slots() {
    let mut table = table(36);
    assert_eq!(table.free(), 63);
    let mut gpas = HashSet::new();
    for gib in 0..63 {
        let gpa = table.assign(hva(gib * 1000, 0x123)).unwrap();
        assert_eq!(gpa.as_u64() % GIB, 0x123);
        assert!((1..64).contains(&(gpa.as_u64() / GIB)), "{gpa:?}");
        assert!(gpas.insert(gpa));
        assert_eq!(table.free(), 62 - gib as u32);
    }
    assert_eq!(table.assign(hva(70000, 0)), Err(AssignError::OutOfSlots));
    // What is there is still answered.
    assert_eq!(table.assign(hva(0, 5)).unwrap().as_u64() % GIB, 5);
    assert_eq!(table.in_use(), 63);
}

#[test]
fn a_wanted_slot_is_given_or_refused() {
    let mut table = table(40);
    let gpa = |slot: u64| Gpa::new(slot * GIB).unwrap();
    assert_eq!(table.assign_at(hva(7, 0x123), gpa(5)), Ok(()));
    assert_eq!(table.lookup(hva(7, 0x123)), Gpa::new(5 * GIB + 0x123));
    // The same again is no change.
    assert_eq!(table.assign_at(hva(7, 0), gpa(5)), Ok(()));
    assert_eq!(table.in_use(), 1);
    assert_eq!(table.assign_at(hva(7, 0), gpa(6)), Err(AssignError::Taken));
    assert_eq!(table.assign_at(hva(8, 0), gpa(5)), Err(AssignError::Taken));
    for wrong in [gpa(0), gpa(1 << 10), Gpa::new(5 * GIB + 4096).unwrap()] {
        assert_eq!(
            table.assign_at(hva(9, 0), wrong),
            Err(AssignError::NoSuchSlot),
            "{wrong:?}"
        );
    }
    // Beyond the storage: it grows, and others go around it.
    let Err(AssignError::NeedStorage { words }) = table.assign_at(hva(9, 0), gpa(700)) else {
        panic!("the storage has no room for slot 700");
    };
    drop(table.grow(vec![7; words]).unwrap());
    assert_eq!(table.assign_at(hva(9, 0), gpa(700)), Ok(()));
    for gib in 100..140 {
        let given = assign(&mut table, hva(gib, 0)).unwrap();
        assert!(given != gpa(5) && given != gpa(700));
    }
    assert_eq!(table.hva_of(gpa(700)), Some(hva(9, 0)));
}

#[test]
fn narrowest_space_and_bad_storage() {
    assert!(SlotTable::new(vec![0u32; words_for(1)], 30).is_none());
    assert!(SlotTable::new(vec![0u32; words_for(1) - 1], 40).is_none());
    assert!(SlotTable::new(Vec::new(), 40).is_none());
    let mut table = table(31);
    assert_eq!(table.free(), 1);
    assert_eq!(table.assign(hva(9, 0)).unwrap().as_u64(), GIB);
    assert_eq!(table.assign(hva(8, 0)), Err(AssignError::OutOfSlots));
}

#[test]
fn storage_is_as_large_as_it_says() {
    assert_eq!(words_for(0), 192);
    assert_eq!(words_for(64), 192);
    assert_eq!(words_for(65), 384);
    assert_eq!(words_for(MAX_SLOTS), 3 << 14);
    assert_eq!(words_for(u32::MAX), 3 << 14);
}

#[test]
fn forty_bits_and_the_largest_space_fill_up() {
    for (gpa_bits, slots) in [
        (40, 1023),
        (44, MAX_SLOTS - 1),
        (48, MAX_SLOTS - 1),
        (52, MAX_SLOTS - 1),
    ] {
        let mut table = table(gpa_bits);
        let mut gpas = HashSet::new();
        for n in 0..u64::from(slots) {
            // A stride that visits each of the 2^17 GiBs once.
            let gpa = assign(&mut table, hva(n * 40503 % (1 << 17), 0)).unwrap();
            assert!(gpa.as_u64() >= GIB && gpas.insert(gpa));
        }
        assert_eq!(table.free(), 0);
        assert_eq!(
            assign(&mut table, hva(slots as u64 * 40503 % (1 << 17), 0)),
            Err(AssignError::OutOfSlots)
        );
        assert_eq!(table.iter().count(), slots as usize);
        for (hva, gpa) in table.iter() {
            assert_eq!((table.lookup(hva), table.hva_of(gpa)), (Some(gpa), Some(hva)));
        }
    }
}

#[test]
fn gpa_outside_every_slot_has_no_hva() {
    let mut table = table(40);
    let gpa = table.assign(hva(5, 0)).unwrap();
    for outside in [
        0,
        1,
        GIB - 1,
        gpa.as_u64() + GIB,
        63 * GIB,
        64 * GIB,
        (1 << 40) - 1,
        (1 << 48) - 1,
    ] {
        assert_eq!(table.hva_of(Gpa::new(outside).unwrap()), None, "{outside:#x}");
    }
    assert_eq!(
        table.hva_of(Gpa::new(gpa.as_u64() + GIB - 1).unwrap()),
        Some(hva(5, GIB - 1))
    );
}

#[test]
fn grow_refuses_storage_that_is_not_larger() {
    let mut table = table(40);
    let gpa = table.assign(hva(5, 0)).unwrap();
    assert!(table.grow(vec![0; words_for(64)]).is_err());
    assert!(table.grow(vec![0; words_for(128) - 1]).is_err());
    let old = table.grow(vec![0; words_for(128)]).unwrap();
    assert_eq!(old.len(), words_for(64));
    assert_eq!(table.lookup(hva(5, 0)), Some(gpa));
}

#[test]
fn released_slot_rests_before_it_is_used_again() {
    let mut table = table(36);
    let first = table.assign(hva(1, 0)).unwrap();
    assert_eq!(table.release(hva(1, 77)), Some(first));
    assert_eq!(table.lookup(hva(1, 0)), None);
    assert_eq!(table.release(hva(1, 0)), None);
    for gib in 0..62 {
        assert_ne!(table.assign(hva(100 + gib, 0)).unwrap(), first);
    }
    assert_eq!(table.assign(hva(99, 0)).unwrap(), first);
}

#[derive(Clone, Debug)]
enum Op {
    Assign(u64),
    Release(u64),
    Lookup(u64),
}

fn op(gibs: u64) -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (0..gibs).prop_map(Op::Assign),
        2 => (0..gibs).prop_map(Op::Release),
        1 => (0..gibs).prop_map(Op::Lookup),
    ]
}

/// Runs `ops` on a table and on a map; both must agree after each step.
fn agree(gpa_bits: u32, ops: Vec<Op>) -> Result<(), TestCaseError> {
    let mut table = table(gpa_bits);
    let limit = 1usize << (gpa_bits - 30);
    let mut model: HashMap<u64, Gpa> = HashMap::new();
    for op in ops {
        match op {
            Op::Assign(gib) => match assign(&mut table, hva(gib, 0)) {
                Ok(gpa) => {
                    let new = !model.values().any(|other| *other == gpa);
                    let known = model.insert(gib, gpa);
                    prop_assert!(known == Some(gpa) || (known.is_none() && new));
                    prop_assert!((1..limit as u64).contains(&(gpa.as_u64() / GIB)));
                }
                Err(error) => {
                    prop_assert_eq!(error, AssignError::OutOfSlots);
                    prop_assert!(model.len() == limit - 1 && !model.contains_key(&gib));
                }
            },
            Op::Release(gib) => prop_assert_eq!(table.release(hva(gib, 0)), model.remove(&gib)),
            Op::Lookup(gib) => prop_assert_eq!(table.lookup(hva(gib, 0)), model.get(&gib).copied()),
        }
        prop_assert_eq!(table.in_use() as usize, model.len());
        prop_assert_eq!(table.free() as usize, limit - 1 - model.len());
    }
    for (&gib, &gpa) in &model {
        prop_assert_eq!(table.lookup(hva(gib, 9)).map(Gpa::as_u64), Some(gpa.as_u64() + 9));
        prop_assert_eq!(table.hva_of(gpa), Some(hva(gib, 0)));
    }
    prop_assert_eq!(table.iter().count(), model.len());
    Ok(())
}

proptest! {
    #[test]
    fn crowded_table_agrees_with_a_map(ops in prop::collection::vec(op(90), 1..400)) {
        agree(36, ops)?;
    }

    #[test]
    fn sparse_table_agrees_with_a_map(ops in prop::collection::vec(op(1 << 17), 1..400)) {
        agree(40, ops)?;
    }

    #[test]
    fn tiny_table_agrees_with_a_map(ops in prop::collection::vec(op(8), 1..200)) {
        agree(32, ops)?;
    }
}

#[test]
fn end_is_behind_every_slot_that_ever_was() {
    let mut table = table(40);
    assert_eq!(table.end(), 1);
    let first = assign(&mut table, hva(3, 0)).unwrap();
    assert_eq!(u64::from(table.end()), first.as_u64() / GIB + 1);
    table.assign_at(hva(7, 0), Gpa::new(40 * GIB).unwrap()).unwrap();
    assert_eq!(table.end(), 41);
    table.release(hva(7, 0)).unwrap();
    assert_eq!(table.end(), 41);
}
