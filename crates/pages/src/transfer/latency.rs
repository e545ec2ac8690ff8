//! How long demands take.

use std::time::Duration;

/// Recent latencies, and their 99th percentile.
#[derive(Clone, Debug)]
pub(super) struct Latencies {
    recent: [Duration; Self::KEPT],
    seen: usize,
    p99: Duration,
}

impl Latencies {
    const KEPT: usize = 128;
    /// Before so many, no percentile is known; and it is worked out anew after each so many, which is often enough.
    const STEP: usize = 8;

    pub(super) fn new() -> Self {
        Self { recent: [Duration::ZERO; Self::KEPT], seen: 0, p99: Duration::ZERO }
    }

    pub(super) fn add(&mut self, latency: Duration) {
        self.recent[self.seen % Self::KEPT] = latency;
        self.seen += 1;
        if self.seen.is_multiple_of(Self::STEP) {
            let mut sorted = self.recent;
            let kept = &mut sorted[..self.seen.min(Self::KEPT)];
            kept.sort_unstable();
            self.p99 = kept[(kept.len() * 99).div_ceil(100) - 1];
        }
    }

    /// The 99th percentile, once it is known.
    pub(super) fn p99(&self) -> Option<Duration> {
        (self.seen >= Self::STEP).then_some(self.p99)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_percentile_is_of_recent_ones() {
        let mut latencies = Latencies::new();
        for _ in 0..7 {
            latencies.add(Duration::from_secs(1));
            assert_eq!(latencies.p99(), None);
        }
        latencies.add(Duration::from_secs(9));
        assert_eq!(latencies.p99(), Some(Duration::from_secs(9)));
        for millis in 1..=128 {
            latencies.add(Duration::from_millis(millis));
        }
        assert_eq!(latencies.p99(), Some(Duration::from_millis(127)));
    }
}
