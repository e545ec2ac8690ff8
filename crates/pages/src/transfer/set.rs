//! Sets of extents: a bit each, with summaries above, so that the next member is found in a step per level.
//!
//! ```text
//! level 2   1 word        a bit says: that word of level 1 has a bit
//! level 1   n / 4,096     a bit says: that word of level 0 has a bit
//! level 0   n / 64        a bit is an extent
//! ```

use types::ExtentIndex;

use super::ExtentId;

/// Extents of all regions of an image.
#[derive(Clone, Debug)]
pub(super) struct Extents {
    regions: Vec<Region>,
    len: u64,
}

impl Extents {
    /// No extent of regions that have so many each.
    pub(super) fn new(counts: &[u32]) -> Self {
        Self { regions: counts.iter().map(|count| Region::new(*count)).collect(), len: 0 }
    }

    /// No extent of the same regions.
    pub(super) fn none_of(&self) -> Self {
        Self { regions: self.regions.iter().map(|region| Region::new(region.count)).collect(), len: 0 }
    }

    /// Whether there is such an extent at all, in the set or not.
    pub(super) fn is_within(&self, id: ExtentId) -> bool {
        self.regions.get(usize::from(id.region)).is_some_and(|region| id.extent.0 < region.count)
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn contains(&self, id: ExtentId) -> bool {
        let region = self.regions.get(usize::from(id.region));
        region.is_some_and(|region| id.extent.0 < region.count && region.word(id.extent.0 / 64) & bit(id.extent.0) != 0)
    }

    /// Returns whether it is new. Nothing happens to what is not [within](Self::is_within).
    pub(super) fn insert(&mut self, id: ExtentId) -> bool {
        let is_new = self.is_within(id) && !self.contains(id);
        if is_new {
            self.regions[usize::from(id.region)].insert(id.extent.0);
            self.len += 1;
        }
        is_new
    }

    /// Returns whether it was there.
    pub(super) fn remove(&mut self, id: ExtentId) -> bool {
        let was_there = self.contains(id);
        if was_there {
            self.regions[usize::from(id.region)].remove(id.extent.0);
            self.len -= 1;
        }
        was_there
    }

    /// The first member at or after `from` that is not in `except`, in address order, and from the start again after the end.
    ///
    /// What is in both costs a step per 64 of them: 8,192 steps, some microseconds, for a region of 32 GiB that is in both as
    /// a whole.
    pub(super) fn next_around(&self, from: ExtentId, except: Option<&Self>) -> Option<ExtentId> {
        let count = self.regions.len();
        let first = usize::from(from.region).min(count);
        let start = |number: usize| if number == first { from.extent.0 } else { 0 };
        let ahead = (first..count).map(|number| (number, start(number)));
        let again = (0..=first.min(count.saturating_sub(1))).map(|number| (number, 0));
        ahead.chain(again).find_map(|(number, at)| {
            let others = except.and_then(|except| except.regions.get(number));
            let found = self.regions.get(number)?.next_except(at, others)?;
            Some(ExtentId { region: u8::try_from(number).ok()?, extent: ExtentIndex(found) })
        })
    }

    /// Takes out the first member, in address order.
    pub(super) fn pop(&mut self) -> Option<ExtentId> {
        let first = self.next_around(ExtentId { region: 0, extent: ExtentIndex(0) }, None)?;
        self.remove(first);
        Some(first)
    }
}

/// Extents of one region.
#[derive(Clone, Debug)]
struct Region {
    count: u32,
    /// The last has one word.
    levels: Vec<Vec<u64>>,
}

impl Region {
    fn new(count: u32) -> Self {
        let mut levels = Vec::new();
        let mut bits = count;
        loop {
            let words = bits.div_ceil(64).max(1);
            levels.push(vec![0; words as usize]);
            if words == 1 {
                return Self { count, levels };
            }
            bits = words;
        }
    }

    fn word(&self, number: u32) -> u64 {
        self.levels[0][number as usize]
    }

    fn insert(&mut self, extent: u32) {
        let mut index = extent;
        for level in &mut self.levels {
            let word = &mut level[(index / 64) as usize];
            let had_none = *word == 0;
            *word |= bit(index);
            if !had_none {
                return;
            }
            index /= 64;
        }
    }

    fn remove(&mut self, extent: u32) {
        let mut index = extent;
        for level in &mut self.levels {
            let word = &mut level[(index / 64) as usize];
            *word &= !bit(index);
            if *word != 0 {
                return;
            }
            index /= 64;
        }
    }

    /// The first member at or after `from`: up until a word has one, then down to it.
    fn next(&self, from: u32) -> Option<u32> {
        let mut index = from;
        for (number, level) in self.levels.iter().enumerate() {
            let bits = level.get((index / 64) as usize)? & (u64::MAX << (index % 64));
            if bits != 0 {
                let found = index / 64 * 64 + bits.trailing_zeros();
                let below = self.levels[..number].iter().rev();
                return Some(below.fold(found, |found, level| found * 64 + level[found as usize].trailing_zeros()));
            }
            index = index / 64 + 1;
        }
        None
    }

    fn next_except(&self, from: u32, except: Option<&Self>) -> Option<u32> {
        let mut found = self.next(from)?;
        let Some(except) = except else { return Some(found) };
        loop {
            let number = found / 64;
            let left = self.word(number) & !except.word(number) & (u64::MAX << (found % 64));
            if left != 0 {
                return Some(number * 64 + left.trailing_zeros());
            }
            found = self.next((number + 1) * 64)?;
        }
    }
}

const fn bit(index: u32) -> u64 {
    1 << (index % 64)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn id(region: u8, extent: u32) -> ExtentId {
        ExtentId { region, extent: ExtentIndex(extent) }
    }

    /// Two regions: one of three levels, one that ends within its first word.
    const COUNTS: [u32; 2] = [5000, 50];

    fn any_extent() -> impl Strategy<Value = ExtentId> {
        prop_oneof![(0..5000u32).prop_map(|extent| id(0, extent)), (0..50u32).prop_map(|extent| id(1, extent))]
    }

    /// As `vm::harness`: FARFORK_COUNT chooses the number of cases, FARFORK_SEED the seed.
    fn config() -> ProptestConfig {
        let cases = if std::env::var("FARFORK_COUNT").is_ok_and(|count| count == "full") { 20_000 } else { 300 };
        let seed = std::env::var("FARFORK_SEED").map_or_else(|_| fastrand::u64(..), |seed| seed.parse().expect("a number"));
        println!("FARFORK_SEED={seed}\nheld: {cases} cases");
        ProptestConfig {
            cases,
            failure_persistence: None,
            rng_seed: proptest::test_runner::RngSeed::Fixed(seed),
            ..ProptestConfig::default()
        }
    }

    proptest! {
        #![proptest_config(config())]

        #[test]
        fn agrees_with_a_tree(
            changes in proptest::collection::vec((any_extent(), any::<bool>()), 0..200),
            others in proptest::collection::vec(any_extent(), 0..200),
            from in any_extent(),
        ) {
            let (mut set, mut tree) = (Extents::new(&COUNTS), BTreeSet::new());
            let mut except = set.none_of();
            for (extent, is_in) in changes {
                if is_in {
                    prop_assert_eq!(set.insert(extent), tree.insert(extent));
                } else {
                    prop_assert_eq!(set.remove(extent), tree.remove(&extent));
                }
            }
            for extent in others {
                except.insert(extent);
            }
            prop_assert_eq!(set.len(), tree.len() as u64);
            let around = || tree.range(from..).chain(tree.range(..from)).copied();
            prop_assert_eq!(set.next_around(from, None), around().next());
            prop_assert_eq!(set.next_around(from, Some(&except)), around().find(|extent| !except.contains(*extent)));
            for extent in tree {
                prop_assert_eq!(set.pop(), Some(extent));
            }
            prop_assert!(set.is_empty());
        }
    }

    #[test]
    fn what_is_no_extent_is_never_in() {
        let mut set = Extents::new(&COUNTS);
        for outside in [id(0, 5000), id(1, 50), id(1, u32::MAX), id(2, 0)] {
            assert!(!set.insert(outside) && !set.contains(outside) && !set.remove(outside), "{outside}");
            assert_eq!(set.next_around(outside, None), None);
        }
        assert_eq!(Extents::new(&[]).next_around(id(0, 0), None), None);
        let mut whole = Extents::new(&[524_288]);
        assert!(whole.insert(id(0, 524_287)));
        assert_eq!(whole.next_around(id(0, 0), None), Some(id(0, 524_287)));
    }
}
