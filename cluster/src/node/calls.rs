//! At most so many calls of the engine at once. They block, so they run on threads of their own; those that come too many wait
//! in line, and those beyond the line are refused.
//!
//! A call that has begun goes on to its end even if nobody waits for it any more: a client that leaves midway of a fork finds
//! its machines with `farfork ls`, and none is ever running unregistered.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::Semaphore;

use super::error::NodeError;

/// The line in front of the engine.
#[derive(Debug)]
pub struct Calls {
    permits: Arc<Semaphore>,
    at_once: u32,
    queued: AtomicUsize,
    queued_max: usize,
}

impl Calls {
    /// A line of `queued_max` calls in front of `at_once` that run.
    #[must_use]
    pub fn new(at_once: u32, queued_max: usize) -> Self {
        Self { permits: Arc::new(Semaphore::new(at_once as usize)), at_once, queued: AtomicUsize::new(0), queued_max }
    }

    /// Runs `work`, when it is its turn, to its end.
    ///
    /// # Errors
    /// [`NodeError::Busy`], [`NodeError::Stopping`]: it was not begun. [`NodeError::Panicked`]: it panicked. Otherwise its own.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, NodeError> + Send + 'static,
    ) -> Result<T, NodeError> {
        let waiting = Waiting::enter(&self.queued, self.queued_max)?;
        let permit = Arc::clone(&self.permits).acquire_owned().await.map_err(|_| NodeError::Stopping)?;
        drop(waiting);
        let span = tracing::Span::current();
        let task = tokio::task::spawn_blocking(move || {
            let outcome = span.in_scope(work);
            drop(permit);
            outcome
        });
        task.await.unwrap_or_else(|error| {
            tracing::error!(%error, "a call panicked");
            Err(NodeError::Panicked)
        })
    }

    /// Refuses calls from now on, and waits at most so long for those that have begun. Whether all have ended.
    pub async fn stop(&self, deadline: Duration) -> bool {
        // Taking every permit waits for the calls that have begun; closing first refuses those in line.
        self.permits.close();
        let all_ended = async {
            while self.permits.available_permits() < self.at_once as usize {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(deadline, all_ended).await.is_ok()
    }
}

/// A place in line, given back when dropped: also when the client is gone before its turn.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn enter(queued: &'a AtomicUsize, max: usize) -> Result<Self, NodeError> {
        let before = queued.fetch_add(1, Ordering::Relaxed);
        let place = Self(queued);
        if before < max { Ok(place) } else { Err(NodeError::Busy { queued: before }) }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn those_beyond_the_line_are_refused_and_the_others_get_their_turn() {
        let calls = Arc::new(Calls::new(1, 2));
        let (release, released) = mpsc::channel::<()>();
        let first = tokio::spawn({
            let calls = Arc::clone(&calls);
            async move { calls.run(move || Ok(released.recv().is_ok())).await }
        });
        while calls.permits.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        let waiting: Vec<_> = (0..2)
            .map(|number| {
                let calls = Arc::clone(&calls);
                tokio::spawn(async move { calls.run(move || Ok(number)).await })
            })
            .collect();
        while calls.queued.load(Ordering::Relaxed) < 2 {
            tokio::task::yield_now().await;
        }
        assert_eq!(calls.run(|| Ok(())).await, Err(NodeError::Busy { queued: 2 }));
        assert_eq!(calls.queued.load(Ordering::Relaxed), 2, "the refused one left the line");
        release.send(()).unwrap();
        assert_eq!(first.await.unwrap(), Ok(true));
        for (number, call) in waiting.into_iter().enumerate() {
            assert_eq!(call.await.unwrap(), Ok(number));
        }
        assert!(calls.stop(Duration::from_secs(30)).await);
        assert_eq!(calls.run(|| Ok(())).await, Err(NodeError::Stopping));
    }

    #[tokio::test]
    async fn a_panic_is_an_error_and_gives_its_place_back() {
        let calls = Calls::new(1, 1);
        for _ in 0..3 {
            let outcome: Result<(), _> = calls.run(|| panic!("of a test")).await;
            assert_eq!(outcome, Err(NodeError::Panicked));
        }
        assert_eq!(calls.run(|| Ok(7)).await, Ok(7));
    }
}
