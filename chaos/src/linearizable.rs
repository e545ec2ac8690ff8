//! Whether what clients were told can have happened one after the other, each call somewhere between its beginning and its end.
//!
//! A history is of one register: calls that set it, and calls that read it. The search is that of Wing and Gong, with the memory of
//! Lowe: what was tried from the same calls done and the same value is not tried again.

use std::collections::HashSet;
use std::fmt::Debug;
use std::hash::Hash;

/// A call, of which the outcome was heard or not.
#[derive(Clone, Debug)]
pub struct Call<V> {
    /// What was called.
    pub what: What<V>,
    /// When, on a clock that all clients share.
    pub began: u64,
    /// When its outcome was heard. `None`: never; it may have been done, at any time since, or not.
    pub ended: Option<u64>,
}

/// What was called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What<V> {
    /// The register was set to this.
    Write(V),
    /// It was read, and was this.
    Read(V),
}

/// Whether there is an order.
///
/// # Errors
/// The calls, if there is none.
pub fn check<V: Clone + Debug + Eq + Hash>(initial: &V, calls: &[Call<V>]) -> Result<(), String> {
    // A write that nobody heard the end of and nobody saw may as well not have been.
    let is_seen = |value: &V| calls.iter().any(|call| call.what == What::Read(value.clone()));
    let mut calls: Vec<Call<V>> = calls
        .iter()
        .filter(|call| match &call.what {
            What::Write(value) => call.ended.is_some() || is_seen(value),
            What::Read(_) => call.ended.is_some(),
        })
        .cloned()
        .collect();
    calls.sort_by_key(|call| call.began);
    let mut search = Search { calls: &calls, tried: HashSet::new() };
    if search.goes_on(&mut Done(vec![0; calls.len().div_ceil(64)]), initial) {
        return Ok(());
    }
    let lines: Vec<String> = calls.iter().map(|call| format!("  {:?}..{:?} {:?}", call.began, call.ended, call.what)).collect();
    Err(format!("no order explains what was told, beginning with {initial:?}:\n{}", lines.join("\n")))
}

/// Which calls have their place.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Done(Vec<u64>);

impl Done {
    fn has(&self, index: usize) -> bool {
        self.0[index / 64] >> (index % 64) & 1 == 1
    }

    fn flip(&mut self, index: usize) {
        self.0[index / 64] ^= 1 << (index % 64);
    }
}

struct Search<'a, V> {
    calls: &'a [Call<V>],
    tried: HashSet<(Done, V)>,
}

impl<V: Clone + Eq + Hash> Search<'_, V> {
    fn goes_on(&mut self, done: &mut Done, value: &V) -> bool {
        let left: Vec<usize> = (0..self.calls.len()).filter(|index| !done.has(*index)).collect();
        let Some(first_end) = left.iter().filter_map(|index| self.calls[*index].ended).min() else { return true };
        if !self.tried.insert((done.clone(), value.clone())) {
            return false;
        }
        // The next one began before any other ended.
        for index in left.into_iter().filter(|index| self.calls[*index].began < first_end) {
            let next = match &self.calls[index].what {
                What::Write(new) => new.clone(),
                What::Read(seen) if seen == value => value.clone(),
                What::Read(_) => continue,
            };
            done.flip(index);
            if self.goes_on(done, &next) {
                return true;
            }
            done.flip(index);
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(value: u32, began: u64, ended: impl Into<Option<u64>>) -> Call<u32> {
        Call { what: What::Write(value), began, ended: ended.into() }
    }

    fn read(value: u32, began: u64, ended: u64) -> Call<u32> {
        Call { what: What::Read(value), began, ended: Some(ended) }
    }

    #[test]
    fn what_can_have_happened_is_told_from_what_cannot() {
        let good: &[&[Call<u32>]] = &[
            &[],
            &[read(0, 1, 2)],
            &[write(1, 1, 2), read(1, 3, 4)],
            // At the same time: either.
            &[write(1, 1, 10), read(0, 2, 3), read(1, 4, 5)],
            &[write(1, 1, 10), write(2, 2, 9), read(2, 11, 12), read(2, 13, 14)],
            &[write(1, 1, 10), write(2, 2, 9), read(1, 11, 12)],
            // Nobody knows what became of it: it comes late, or never.
            &[write(1, 1, None), read(0, 2, 3), read(1, 4, 5), read(1, 6, 7)],
            &[write(1, 1, None), write(2, 3, 4), read(2, 5, 6), read(1, 7, 8)],
            &[write(1, 1, None), read(0, 9, 10)],
        ];
        let bad: &[&[Call<u32>]] = &[
            &[read(1, 1, 2)],
            &[write(1, 1, 2), read(0, 3, 4)],
            // Seen, and then not.
            &[write(1, 1, 10), read(1, 2, 3), read(0, 4, 5)],
            &[write(1, 1, None), read(1, 2, 3), read(0, 4, 5)],
            // Done twice.
            &[write(1, 1, None), write(2, 3, 4), read(1, 5, 6), write(3, 7, 8), read(1, 9, 10)],
            &[write(1, 1, 2), write(2, 3, 4), read(1, 5, 6)],
        ];
        good.iter().for_each(|calls| assert_eq!(check(&0, calls), Ok(()), "{calls:?}"));
        bad.iter().for_each(|calls| assert!(check(&0, calls).is_err(), "{calls:?}"));
    }

    /// Calls that were made in some order are explained, however they overlap; and that one value is another is seen.
    #[test]
    fn histories_of_a_real_register_are_explained() {
        for seed in 0..200 {
            let mut dice = fastrand::Rng::with_seed(seed);
            let (mut value, mut calls) = (0, Vec::new());
            for step in 0..60u64 {
                let at = step * 100;
                let (began, ended) = (at.saturating_sub(dice.u64(0..300)), at + dice.u64(1..300));
                if dice.bool() {
                    value = u32::try_from(step).unwrap() + 1;
                    calls.push(write(value, began, (dice.u8(0..8) > 0).then_some(ended)));
                } else {
                    calls.push(read(value, began, ended));
                }
            }
            assert_eq!(check(&0, &calls), Ok(()), "seed {seed}");
            let last = calls.iter().filter_map(|call| call.ended).max().unwrap();
            calls.push(read(1_000_000, last + 1, last + 2));
            assert!(check(&0, &calls).is_err(), "seed {seed}");
        }
    }
}
