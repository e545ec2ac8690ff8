//! A token bucket, without a clock.

use std::time::Duration;

use super::impairment::Rate;

/// When the bytes of one direction leave, given its rate. Times are counted from any one instant.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Bucket {
    /// When the link has sent all that it has taken.
    idle_at: Duration,
}

impl Bucket {
    /// When `length` bytes that come `now` have left, which is `now` at the earliest; `None` if they do not fit into the queue.
    pub(super) fn pass(&mut self, rate: Option<Rate>, now: Duration, length: usize) -> Option<Duration> {
        let Some(rate) = rate else { return Some(now) };
        let length = u64::try_from(length).unwrap_or(u64::MAX);
        // An idle link saves up one burst and no more.
        let begin = self.idle_at.max(now.saturating_sub(rate.takes(rate.burst_bytes)));
        let leaves_at = begin.saturating_add(rate.takes(length));
        if leaves_at.saturating_sub(now) > rate.takes(rate.queue_bytes) {
            return None;
        }
        self.idle_at = leaves_at;
        Some(self.idle_at.max(now))
    }
}

impl Rate {
    fn takes(self, bytes: u64) -> Duration {
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second.max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm::harness::{count, held, seed};

    #[test]
    fn without_a_rate_everything_leaves_at_once() {
        let now = Duration::from_secs(7);
        assert_eq!(Bucket::default().pass(None, now, usize::MAX), Some(now));
    }

    #[test]
    fn a_burst_leaves_at_once_then_the_rate_holds_and_then_the_queue_is_full() {
        let rate = Rate { bytes_per_second: 1000, burst_bytes: 2000, queue_bytes: 3000 };
        let now = Duration::from_secs(100);
        let mut bucket = Bucket::default();
        let leave: Vec<_> = (0..7).map(|_| bucket.pass(Some(rate), now, 1000).map(|at| (at - now).as_secs())).collect();
        assert_eq!(leave, [Some(0), Some(0), Some(1), Some(2), Some(3), None, None]);
        assert_eq!(bucket.pass(Some(rate), now + Duration::from_secs(1), 1000), Some(now + Duration::from_secs(4)));
    }

    /// In any window, no more than the burst, the window's share and one datagram leave, in order; and a queue that is not full
    /// takes what comes.
    #[test]
    fn no_window_lets_through_more_than_its_share() {
        let mut dice = fastrand::Rng::with_seed(seed());
        let rounds = count(100, 10_000);
        for _ in 0..rounds {
            let rate =
                Rate { bytes_per_second: dice.u64(1000..10_000_000), burst_bytes: dice.u64(..50_000), queue_bytes: 100_000 };
            let (mut bucket, mut now, mut last) = (Bucket::default(), Duration::from_secs(1000), Duration::ZERO);
            let mut left: Vec<(Duration, u64)> = Vec::new();
            for _ in 0..200 {
                now += rate.takes(dice.u64(..3000));
                let length = dice.u64(1..1500);
                let Some(at) = bucket.pass(Some(rate), now, usize::try_from(length).unwrap()) else {
                    assert!(last - now + rate.takes(length) > rate.takes(rate.queue_bytes), "dropped from a queue with room");
                    continue;
                };
                assert!(at - now <= rate.takes(rate.queue_bytes), "the queue is longer than it may be");
                assert!(at >= now && at >= last);
                last = at;
                left.push((at, length));
            }
            for first in 0..left.len() {
                let (begin, _) = left[first];
                let mut bytes = 0;
                for (at, length) in &left[first..] {
                    bytes += length;
                    // Rounding takes off less than one nanosecond a datagram.
                    let share = rate.takes(bytes).saturating_sub(rate.takes(rate.burst_bytes + 1500));
                    assert!(*at - begin + Duration::from_nanos(400) >= share, "{bytes} bytes within {:?}", *at - begin);
                }
            }
        }
        held("loads on a bucket", rounds);
    }
}
