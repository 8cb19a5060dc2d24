// SPDX-License-Identifier: GPL-2.0

//! Addresses, EPT entries and the host's page-table entries.

use dune_arch::addr::Gpa;
use dune_arch::addr::Gva;
use dune_arch::addr::Hpa;
use dune_arch::addr::Hva;
use dune_arch::addr::Level;
use dune_arch::ept::eptp;
use dune_arch::ept::EptEntry;
use dune_arch::ept::EptPerms;
use dune_arch::ept::MemType;
use dune_arch::host_pte::pat_mem_type;
use dune_arch::host_pte::HostPte;
use dune_arch::host_pte::LeafMaker;
use dune_arch::host_pte::Step;
use dune_arch::host_pte::Walk;
use proptest::prelude::*;

/// What Linux writes to IA32_PAT: WB WC UC- UC WB WP UC- WT.
const LINUX_PAT: u64 = 0x0407_0506_0007_0106;

const LEAVES: [Level; 3] = [Level::Page4K, Level::Page2M, Level::Page1G];
const MEM_TYPES: [MemType; 5] = [MemType::Uc, MemType::Wc, MemType::Wt, MemType::Wp, MemType::Wb];

#[test]
fn address_kinds_end_where_they_say() {
    assert!(Hva::new((1 << 47) - 1).is_some());
    assert_eq!(Hva::new(1 << 47), None);
    assert!(Gpa::new((1 << 48) - 1).is_some());
    assert_eq!(Gpa::new(1 << 48), None);
    assert!(Hpa::new((1 << 52) - 1).is_some());
    assert_eq!(Hpa::new(1 << 52), None);
    assert!(Gva::new(0x7fff_ffff_ffff).is_some());
    assert_eq!(Gva::new(0x8000_0000_0000), None);
    assert_eq!(Gva::new(0xffff_7fff_ffff_ffff), None);
    assert!(Gva::new(0xffff_8000_0000_0000).is_some());
    assert_eq!(Hpa::from_page_number(1 << 40), None);
    assert_eq!(Hpa::from_page_number((1 << 40) - 1), Hpa::new(0xf_ffff_ffff_f000));
    assert_eq!(Hva::new((1 << 47) - 1).unwrap().checked_add(1), None);
    assert_eq!(Gva::new(!0).unwrap().checked_add(1), None);
    assert_eq!(format!("{:?}", Gpa::new(0x1234).unwrap()), "Gpa(0x1234)");
}

#[test]
fn levels_split_an_address_into_four_indices() {
    let address = (1u64 << 39) | (2 << 30) | (3 << 21) | (4 << 12) | 5;
    let indices: Vec<_> = Level::DOWN.iter().map(|level| level.index(address)).collect();
    assert_eq!(indices, [1, 2, 3, 4]);
    assert_eq!(Level::Page4K.bytes(), 4096);
    assert_eq!(Level::Page2M.bytes(), 2 << 20);
    assert_eq!(Level::Page1G.bytes(), 1 << 30);
    assert_eq!(Level::P512G.bytes(), 512 << 30);
    for pair in Level::DOWN.windows(2) {
        assert_eq!(pair[0].below(), Some(pair[1]));
        assert_eq!(pair[0].bytes(), 512 * pair[1].bytes());
    }
}

#[test]
fn eptp_is_the_sdms() {
    let root = Hpa::new(0x1234_5000).unwrap();
    assert_eq!(eptp(root, false), 0x1234_5000 | 0x1e);
    assert_eq!(eptp(root, true), 0x1234_5000 | 0x5e);
}

/// All levels, permissions and types: what goes in comes out, and the raw bits are those that the SDM says.
#[test]
fn ept_leaves_round_trip() {
    let page = Hpa::new(0xf_edcb_c000_0000).unwrap();
    for level in LEAVES {
        for mem_type in MEM_TYPES {
            for (write, execute) in [(false, false), (false, true), (true, false), (true, true)] {
                let perms = EptPerms { write, execute };
                let leaf = EptEntry::leaf(page, level, perms, mem_type);
                assert!(leaf.is_present() && leaf.is_leaf(level));
                assert_eq!((leaf.hpa(), leaf.perms()), (page, perms));
                assert_eq!(leaf.mem_type(), Some(mem_type));
                assert_eq!(leaf.is_writable(), write);
                assert!(!leaf.is_accessed() && !leaf.is_dirty());
                let mut raw = page.as_u64() | 1 | (mem_type as u64) << 3 | 1 << 6;
                raw |= (write as u64) << 1 | (execute as u64) << 2;
                raw |= ((level != Level::Page4K) as u64) << 7;
                assert_eq!(leaf.as_u64(), raw);
                assert_eq!(EptEntry::from_raw(raw), leaf);
            }
        }
    }
}

#[test]
fn ept_accessed_and_write_protect_change_one_bit() {
    let page = Hpa::new(0x4000).unwrap();
    let leaf = EptEntry::leaf(page, Level::Page4K, EptPerms::ALL, MemType::Wb);
    let used = EptEntry::from_raw(leaf.as_u64() | EptEntry::ACCESSED | EptEntry::DIRTY);
    assert!(used.is_accessed() && used.is_dirty());
    assert_eq!(used.clear_accessed().as_u64(), leaf.as_u64() | EptEntry::DIRTY);
    assert_eq!(leaf.write_protect().as_u64(), leaf.as_u64() & !2);
}

#[test]
fn ept_covers_is_a_partial_order_of_permissions() {
    let page = Hpa::new(0x4000).unwrap();
    let other_page = Hpa::new(0x5000).unwrap();
    let read = EptEntry::leaf(page, Level::Page4K, EptPerms::READ, MemType::Wb);
    let all = EptEntry::leaf(page, Level::Page4K, EptPerms::ALL, MemType::Wb);
    assert!(all.covers(read) && all.covers(all) && !read.covers(all));
    assert!(!all.covers(EptEntry::leaf(other_page, Level::Page4K, EptPerms::READ, MemType::Wb)));
    assert!(!all.covers(EptEntry::leaf(page, Level::Page4K, EptPerms::READ, MemType::Uc)));
    assert!(!EptEntry::EMPTY.covers(read));
}

#[test]
fn ept_tables_are_no_leaves() {
    let table = EptEntry::table(Hpa::new(0x7000).unwrap());
    assert_eq!(table.as_u64(), 0x7007);
    assert!(!table.is_leaf(Level::P512G) && !table.is_leaf(Level::Page1G) && !table.is_leaf(Level::Page2M));
    assert!(!EptEntry::EMPTY.is_present() && !EptEntry::EMPTY.is_leaf(Level::Page4K));
}

proptest! {
    #[test]
    fn ept_leaf_never_sets_a_reserved_bit(raw in 0u64..1 << 52, level in 0usize..3, write: bool, execute: bool) {
        let level = LEAVES[level];
        let leaf = EptEntry::leaf(Hpa::new(raw).unwrap(), level, EptPerms { write, execute }, MemType::Wb);
        // SDM, "Format of an EPT … Entry that Maps a … Page": between bit 12 and the page's size all 0.
        prop_assert_eq!(leaf.as_u64() & (level.bytes() - 1) & !0xfff, 0);
        prop_assert_eq!(leaf.hpa().as_u64(), raw & !(level.bytes() - 1));
        prop_assert_eq!(leaf.as_u64() >> 52, 0);
    }

    #[test]
    fn align_down_and_offset_make_the_whole(raw in 0u64..1 << 47, level in 0usize..3) {
        let hva = Hva::new(raw).unwrap();
        let level = LEAVES[level];
        let down = hva.align_down(level.bytes());
        prop_assert!(down.is_aligned(level.bytes()));
        prop_assert_eq!(down.as_u64() + hva.offset_in(level), raw);
    }
}

#[test]
fn pat_of_linux_by_index() {
    use MemType::*;
    let types: Vec<_> = (0..8).map(|index| pat_mem_type(LINUX_PAT, index)).collect();
    assert_eq!(types, [Wb, Wc, Uc, Uc, Wb, Wp, Uc, Wt]);
    // Reserved encodings 2 and 3.
    assert_eq!(pat_mem_type(0x0302, 0), Uc);
    assert_eq!(pat_mem_type(0x0302, 1), Uc);
}

const P: u64 = 1;
const W: u64 = 2;
const U: u64 = 4;
const D: u64 = 1 << 6;
const PSE: u64 = 1 << 7;
const NX: u64 = 1 << 63;

/// Walks `entries` from the root; the last step.
fn walk(entries: &[u64]) -> Step {
    let mut walk = Walk::START;
    let mut last = Step::Absent;
    for (&entry, level) in entries.iter().zip(Level::DOWN) {
        last = walk.step(HostPte::new(entry), level, LINUX_PAT);
        if !matches!(last, Step::Table(_)) {
            break;
        }
    }
    last
}

#[test]
fn walk_ands_write_and_user_and_ignores_upper_nx() {
    let table = 0x1000 | P | W | U;
    let leaf = |entries: [u64; 4]| match walk(&entries) {
        Step::Leaf(leaf) => leaf,
        other => panic!("{other:?}"),
    };
    let page = 0x5000 | P | W | U | D;
    let found = leaf([table | NX, table | NX, table | NX, page]);
    assert!(found.writable && found.writable_and_dirty && found.executable && !found.special);
    assert_eq!((found.hpa, found.level), (Hpa::new(0x5000).unwrap(), Level::Page4K));
    assert_eq!(found.mem_type, MemType::Wb);
    assert_eq!(found.perms(), EptPerms::ALL);

    for read_only in 0..4 {
        let mut entries = [table, table, table, page];
        entries[read_only] &= !W;
        assert!(!leaf(entries).writable, "level {read_only}");
        assert!(!leaf(entries).writable_and_dirty, "level {read_only}");
    }
    for kernel_only in 0..4 {
        let mut entries = [table, table, table, page];
        entries[kernel_only] &= !U;
        assert_eq!(walk(&entries), Step::Absent, "level {kernel_only}");
    }
    for absent in 0..4 {
        let mut entries = [table, table, table, page];
        entries[absent] &= !P;
        assert_eq!(walk(&entries), Step::Absent, "level {absent}");
    }
    let clean = leaf([table, table, table, page & !D]);
    assert!(clean.writable && !clean.writable_and_dirty);
    assert!(!clean.perms().write);
    assert!(!leaf([table, table, table, page | NX]).executable);
    assert!(leaf([table, table, table, page | 1 << 9]).special);
}

#[test]
fn prot_none_and_swap_entries_are_absent() {
    let table = 0x1000 | P | W | U;
    for not_present in [1 << 8 | 0x5000 | U, 1 << 8 | W | D, 0x1234_5678_9abc_def0 & !P, 0] {
        assert_eq!(walk(&[table, table, table, not_present]), Step::Absent);
    }
}

#[test]
fn large_pages_end_the_walk_and_lose_their_pat_bit() {
    let table = 0x1000 | P | W | U;
    let Step::Leaf(page) = walk(&[table, table, 0x20_0000 | PSE | P | W | U | D | 1 << 12]) else {
        panic!();
    };
    assert_eq!((page.hpa, page.level), (Hpa::new(0x20_0000).unwrap(), Level::Page2M));
    // PAT index 4.
    assert_eq!(page.mem_type, MemType::Wb);

    let Step::Leaf(page) = walk(&[table, 0x4000_0000 | PSE | P | U | 1 << 12 | 1 << 3]) else {
        panic!();
    };
    assert_eq!((page.hpa, page.level), (Hpa::new(0x4000_0000).unwrap(), Level::Page1G));
    assert_eq!(page.mem_type, MemType::Wp);
    assert!(!page.writable);

    // Bit 7 is PAT, not PSE, in a 4 KiB entry, and nothing of Linux' in the top level.
    let Step::Leaf(page) = walk(&[table, table, table, 0x5000 | PSE | P | U | 1 << 3 | 1 << 4]) else {
        panic!();
    };
    assert_eq!((page.level, page.mem_type), (Level::Page4K, MemType::Wt));
    assert!(matches!(walk(&[table | PSE]), Step::Table(_)));
}

#[test]
fn uncached_pages_keep_their_type() {
    let table = 0x1000 | P | W | U;
    for (bits, mem_type) in [
        (0, MemType::Wb),
        (1 << 3, MemType::Wc),
        (1 << 4, MemType::Uc),
        (3 << 3, MemType::Uc),
    ] {
        let Step::Leaf(page) = walk(&[table, table, table, 0x5000 | P | U | bits]) else {
            panic!();
        };
        assert_eq!(page.mem_type, mem_type);
    }
}

proptest! {
    /// A piece of a large page maps each address to where the page maps it.
    #[test]
    fn pieces_agree_with_their_page(hva in 0u64..1 << 47, gib in 0u64..1 << 20, from in 0usize..3, to in 0usize..3) {
        let (hva, page_level, piece_level) = (Hva::new(hva).unwrap(), LEAVES[from], LEAVES[to]);
        let entry = gib << 30 | P | W | U | D | if page_level == Level::Page4K { 0 } else { PSE };
        let mut walk = Walk::START;
        let Step::Leaf(page) = walk.step(HostPte::new(entry), page_level, LINUX_PAT) else { panic!() };
        let piece = page.piece(hva, piece_level);
        prop_assert_eq!(piece.level, page_level.min(piece_level));
        prop_assert!(piece.hpa.is_aligned(piece.level.bytes()));
        prop_assert_eq!(
            piece.hpa.as_u64() + hva.offset_in(piece.level),
            page.hpa.as_u64() + hva.offset_in(page_level)
        );
    }
}

proptest! {
    /// The quick way makes of each entry what the walk and the EPT make of it.
    #[test]
    fn leaf_maker_agrees_with_the_walk(
        upper in prop::collection::vec(prop::sample::select(vec![0x67u64, 0x65, 0x63, 0x8000_0000_0000_0067]), 3),
        address in 0u64..1 << 40,
        flags in 0u64..1 << 12,
        no_execute: bool,
    ) {
        let pte = HostPte::new(address << 12 | flags | u64::from(no_execute) << 63);
        let mut walk = Walk::START;
        let mut reached = true;
        for (entry, level) in upper.iter().zip(Level::DOWN) {
            reached &= matches!(walk.step(HostPte::new(*entry), level, LINUX_PAT), Step::Table(_));
        }
        let expected = match { walk }.step(pte, Level::Page4K, LINUX_PAT) {
            Step::Leaf(leaf) if reached => {
                EptEntry::leaf(leaf.hpa, Level::Page4K, leaf.perms(), leaf.mem_type).as_u64()
            }
            _ => 0,
        };
        prop_assert_eq!(LeafMaker::new(walk, LINUX_PAT).make(pte), expected);
    }
}

proptest! {
    /// Entries like one get the leaf that they would get alone.
    #[test]
    fn leaves_like_one_are_those_of_the_maker(
        one in any::<u64>(),
        other in any::<u64>(),
        flips in any::<u64>(),
        writable: bool,
    ) {
        let mut walk = Walk::START;
        walk.step(HostPte::new(0x1000 | P | U | if writable { W } else { 0 }), Level::P512G, LINUX_PAT);
        let maker = LeafMaker::new(walk, LINUX_PAT);
        let one = HostPte::new(one | P | U);
        let like = maker.like(one, EptEntry::from_raw(maker.make(one)));
        for other in [other, one.as_u64() ^ flips, one.as_u64() ^ (flips & 0x000f_ffff_ffff_f000), one.as_u64() ^ 1 << 5] {
            let other = HostPte::new(other);
            if let Some(leaf) = like.make(other) {
                prop_assert_eq!(leaf, maker.make(other));
            }
        }
        prop_assert_eq!(like.make(one), Some(maker.make(one)));
    }
}
