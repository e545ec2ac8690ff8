//! The fate of each datagram, without sockets and clocks.

use std::time::Duration;

use fastrand::Rng;

use super::impairment::{Direction, Impairment};

/// Decides for the datagrams of one flow in one direction, one after another.
///
/// What chance does to the n-th depends on the seed, the flow, the direction and n only. Each takes the same draws whatever
/// comes of them, so that to change one impairment, or to block for a while, does not shift what the others do to later ones.
#[derive(Clone, Debug)]
pub struct Decider {
    dice: Rng,
}

/// What becomes of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The direction is blocked.
    Blocked,
    /// Lost by chance.
    Lost,
    /// Arrives.
    Delivered {
        /// After this long.
        delay: Duration,
        /// Held back so that others overtake it; `delay` says by how much.
        is_reordered: bool,
        /// With this bit flipped: bit `n % 8` of byte `n / 8`.
        flipped_bit: Option<usize>,
        /// And once more, intact, after this long.
        copy: Option<Duration>,
    },
}

impl Decider {
    /// For the flow that was the `flow`-th to appear.
    #[must_use]
    pub fn new(seed: u64, flow: u64, direction: Direction) -> Self {
        let direction = match direction {
            Direction::ToUpstream => 1,
            Direction::ToClient => 2,
        };
        // Neighbouring seeds must not give streams that are shifted copies of one another: hence a draw between the parts.
        let key = [flow, direction].into_iter().fold(seed, |key, part| Rng::with_seed(key).u64(..) ^ part);
        Self { dice: Rng::with_seed(Rng::with_seed(key).u64(..)) }
    }

    /// The fate of the next datagram, which is `length` bytes long.
    pub fn decide(&mut self, impairment: &Impairment, length: usize) -> Fate {
        let draws = Draws::next(&mut self.dice);
        if impairment.is_blocked {
            return Fate::Blocked;
        }
        if impairment.loss.happens(draws.loss) {
            return Fate::Lost;
        }
        let takes = |jitter: f64| impairment.delay.saturating_add(impairment.jitter.mul_f64(jitter));
        let is_reordered = impairment.reorder.happens(draws.reorder);
        let held_back = if is_reordered { impairment.hold_back } else { Duration::ZERO };
        let is_corrupt = length > 0 && impairment.corrupt.happens(draws.corrupt);
        Fate::Delivered {
            delay: takes(draws.jitter).saturating_add(held_back),
            is_reordered,
            flipped_bit: is_corrupt.then(|| bit_of(draws.bit, length)),
            copy: impairment.duplicate.happens(draws.duplicate).then(|| takes(draws.copy_jitter)),
        }
    }
}

/// One datagram's.
struct Draws {
    loss: f64,
    duplicate: f64,
    reorder: f64,
    corrupt: f64,
    bit: u64,
    jitter: f64,
    copy_jitter: f64,
}

impl Draws {
    fn next(dice: &mut Rng) -> Self {
        Self {
            loss: dice.f64(),
            duplicate: dice.f64(),
            reorder: dice.f64(),
            corrupt: dice.f64(),
            bit: dice.u64(..),
            jitter: dice.f64(),
            copy_jitter: dice.f64(),
        }
    }
}

/// One of the bits of a datagram; uniform but for what a remainder by a length this short leaves.
fn bit_of(draw: u64, length: usize) -> usize {
    let bits = u64::try_from(length).map_or(u64::MAX, |length| length.saturating_mul(8));
    usize::try_from(draw % bits).expect("within a datagram")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::{Probability, Rate};
    use vm::harness::{count, held, seed};

    const LENGTH: usize = 1200;

    fn fates(seed: u64, flow: u64, direction: Direction, impairment: &Impairment, n: u64) -> Vec<Fate> {
        let mut decider = Decider::new(seed, flow, direction);
        (0..n).map(|_| decider.decide(impairment, LENGTH)).collect()
    }

    fn chance(dice: &mut Rng) -> Probability {
        Probability::new(dice.f64()).unwrap()
    }

    fn any_impairment(dice: &mut Rng) -> Impairment {
        Impairment {
            delay: Duration::from_micros(dice.u64(..100_000)),
            jitter: Duration::from_micros(dice.u64(..100_000)),
            loss: chance(dice),
            duplicate: chance(dice),
            reorder: chance(dice),
            hold_back: Duration::from_micros(dice.u64(..100_000)),
            corrupt: chance(dice),
            rate: dice.bool().then(|| Rate::new(dice.u64(1..))),
            is_blocked: dice.u8(..10) == 0,
        }
    }

    #[test]
    fn the_same_seed_flow_and_direction_give_the_same_fates_and_others_give_others() {
        let mut dice = Rng::with_seed(seed());
        let rounds = count(50, 5000);
        for _ in 0..rounds {
            let impairment =
                Impairment { is_blocked: false, loss: Probability::new(0.5).unwrap(), ..any_impairment(&mut dice) };
            let (seed, flow) = (dice.u64(..), dice.u64(..1000));
            let of = |seed, flow, direction| fates(seed, flow, direction, &impairment, 200);
            let fates = of(seed, flow, Direction::ToUpstream);
            assert_eq!(fates, of(seed, flow, Direction::ToUpstream));
            assert_ne!(fates, of(seed, flow, Direction::ToClient));
            assert_ne!(fates, of(seed, flow + 1, Direction::ToUpstream));
            assert_ne!(fates, of(seed.wrapping_add(1), flow, Direction::ToUpstream));
        }
        held("replays of 200 fates", rounds);
    }

    #[test]
    fn no_two_of_neighbouring_seeds_and_flows_share_their_fates() {
        let impairment = Impairment { loss: Probability::new(0.5).unwrap(), ..Impairment::default() };
        let base = seed();
        let mut seen = std::collections::HashSet::new();
        for seed in 0..16 {
            for flow in 0..16 {
                for direction in [Direction::ToUpstream, Direction::ToClient] {
                    let fates = fates(base.wrapping_add(seed), flow, direction, &impairment, 128);
                    let lost: Vec<bool> = fates.iter().map(|fate| *fate == Fate::Lost).collect();
                    assert!(seen.insert(lost), "seed {seed} more, flow {flow}, {direction:?}");
                }
            }
        }
    }

    /// Two runs that differ in one impairment differ in what it does, and in nothing else, for good.
    #[test]
    fn one_impairment_does_not_shift_the_others() {
        let mut dice = Rng::with_seed(seed());
        let rounds = count(50, 5000);
        for _ in 0..rounds {
            let one = Impairment { is_blocked: false, loss: Probability::NEVER, ..any_impairment(&mut dice) };
            let other = Impairment { loss: chance(&mut dice), ..one };
            let cut = Impairment { is_blocked: true, ..any_impairment(&mut dice) };
            let seed = dice.u64(..);
            let whole = fates(seed, 3, Direction::ToClient, &one, 300);
            let mut decider = Decider::new(seed, 3, Direction::ToClient);
            for (n, whole) in whole.into_iter().enumerate() {
                let impairment = [&one, &other, &cut][n / 100];
                let fate = decider.decide(impairment, LENGTH);
                match n / 100 {
                    0 => assert_eq!(fate, whole),
                    1 => assert!(fate == whole || fate == Fate::Lost, "{n}: {fate:?}, and {whole:?} without loss"),
                    _ => assert_eq!(fate, Fate::Blocked),
                }
            }
            // After all that, it is where it would be without.
            let mut straight = Decider::new(seed, 3, Direction::ToClient);
            for _ in 0..300 {
                straight.decide(&Impairment::default(), 0);
            }
            assert_eq!(decider.decide(&one, LENGTH), straight.decide(&one, LENGTH));
        }
        held("runs with one impairment changed", rounds);
    }

    #[test]
    fn things_happen_as_often_as_asked() {
        let mut dice = Rng::with_seed(seed());
        let rounds = count(20, 500);
        for _ in 0..rounds {
            let impairment = Impairment { is_blocked: false, ..any_impairment(&mut dice) };
            let n = 20_000;
            let fates = fates(dice.u64(..), 0, Direction::ToUpstream, &impairment, n);
            let (mut arrived, mut reordered, mut corrupt, mut duplicated, mut jitter) = (0, 0, 0, 0, 0.0);
            for fate in fates {
                let Fate::Delivered { delay, is_reordered, flipped_bit, copy } = fate else { continue };
                let hold_back = if is_reordered { impairment.hold_back } else { Duration::ZERO };
                let extra = delay - impairment.delay - hold_back;
                assert!(extra <= impairment.jitter);
                assert!(flipped_bit.is_none_or(|bit| bit < LENGTH * 8));
                assert!(copy.is_none_or(|copy| copy >= impairment.delay && copy <= impairment.delay + impairment.jitter));
                arrived += 1;
                reordered += u64::from(is_reordered);
                corrupt += u64::from(flipped_bit.is_some());
                duplicated += u64::from(copy.is_some());
                jitter += extra.as_secs_f64();
            }
            assert_near("lost", n - arrived, n, impairment.loss.get());
            assert_near("reordered", reordered, arrived, impairment.reorder.get());
            assert_near("corrupt", corrupt, arrived, impairment.corrupt.get());
            assert_near("duplicated", duplicated, arrived, impairment.duplicate.get());
            if arrived > 1000 && impairment.jitter > Duration::from_millis(1) {
                // A uniform draw has a deviation of 0.29; six of the mean's.
                let mean = jitter / float(arrived) / impairment.jitter.as_secs_f64();
                assert!((mean - 0.5).abs() < 6.0 * 0.29 / float(arrived).sqrt() + 0.001, "mean jitter is {mean} of the most");
            }
        }
        held("runs of 20,000 datagrams", rounds);
    }

    /// Within six standard deviations, and one datagram.
    fn assert_near(what: &str, happened: u64, of: u64, chance: f64) {
        let deviation = (float(of) * chance * (1.0 - chance)).sqrt();
        let distance = (float(happened) - float(of) * chance).abs();
        assert!(distance <= 6.0 * deviation + 1.0, "{happened} of {of} {what}, with a chance of {chance}");
    }

    fn float(n: u64) -> f64 {
        f64::from(u32::try_from(n).unwrap())
    }

    #[test]
    fn never_is_never_and_always_is_always() {
        let mut dice = Rng::with_seed(seed());
        let none = fates(dice.u64(..), 0, Direction::ToClient, &Impairment::default(), 10_000);
        let intact = Fate::Delivered { delay: Duration::ZERO, is_reordered: false, flipped_bit: None, copy: None };
        assert!(none.iter().all(|fate| *fate == intact));
        let always = Impairment { loss: Probability::ALWAYS, ..Impairment::default() };
        let all = fates(dice.u64(..), 0, Direction::ToClient, &always, 10_000);
        assert!(all.iter().all(|fate| *fate == Fate::Lost));
    }

    #[test]
    fn every_bit_can_be_flipped_and_an_empty_datagram_has_none() {
        let corrupt = Impairment { corrupt: Probability::ALWAYS, ..Impairment::default() };
        let mut decider = Decider::new(seed(), 0, Direction::ToUpstream);
        let mut seen = [false; 16];
        for _ in 0..2000 {
            let Fate::Delivered { flipped_bit: Some(bit), .. } = decider.decide(&corrupt, 2) else { panic!("not corrupt") };
            seen[bit] = true;
        }
        assert_eq!(seen, [true; 16]);
        assert!(matches!(decider.decide(&corrupt, 0), Fate::Delivered { flipped_bit: None, .. }));
    }

    #[test]
    fn extreme_delays_do_not_overflow() {
        let long = Impairment {
            delay: Duration::MAX,
            jitter: Duration::MAX,
            reorder: Probability::ALWAYS,
            hold_back: Duration::MAX,
            duplicate: Probability::ALWAYS,
            ..Impairment::default()
        };
        for fate in fates(seed(), 0, Direction::ToClient, &long, 1000) {
            assert!(matches!(fate, Fate::Delivered { delay: Duration::MAX, copy: Some(_), .. }));
        }
    }

    #[test]
    fn no_probability_is_refused() {
        for bad in ["1.01", "-0.1", "NaN", "inf", "", "half"] {
            assert!(bad.parse::<Probability>().is_err(), "{bad}");
        }
        assert_eq!("0".parse(), Ok(Probability::NEVER));
        assert_eq!("1".parse(), Ok(Probability::ALWAYS));
    }
}
