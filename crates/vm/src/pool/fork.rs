//! From an image to children that run.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use types::MachineId;

use super::machine::{Jailed, of_groups};
use super::mail::Running;
use super::{ForkOptions, Inner, PoolError, keeper};
use crate::image::Image;
use crate::worker::monotonic_ns;
use crate::worker::protocol::{self, DESCRIPTORS_MAX, ToWorker};

/// The fewest bytes of pages that a machine must be allowed to write: what its first instructions write.
const LIMIT_MIN: u64 = 1 << 20;

/// How many more shells are taken for a child whose shell is killed under it.
const SHELL_ATTEMPTS: u32 = 2;

/// A machine that was told to run, whether a shell was ready for it, and when it was taken.
type Sent = (Jailed, bool, u64);

/// How a fork spent its time. In this order; the sum of the stages is `first`.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "see `cluster` and docs/specification.md, L1")]
pub struct ForkTimes {
    /// From the call until the first instruction was observed. Up to the last stage where none was: a guest that computes
    /// without an exit.
    pub first: Duration,
    pub shell: Duration,
    pub send: Duration,
    pub map: Duration,
    pub restore: Duration,
    pub run: Duration,
    /// Whether a shell was ready.
    pub had_shell: bool,
}

pub(super) fn fork_all(
    inner: &Arc<Inner>,
    image: &Arc<Image>,
    ids: &[MachineId],
    options: ForkOptions,
) -> Vec<Result<(Jailed, ForkTimes), PoolError>> {
    let started = monotonic_ns();
    let mut demand = keeper::Demand::of(inner, image.class(), ids.len());
    // All are sent before any is waited for.
    let sent: Vec<_> = ids.iter().map(|id| send_fork(inner, &mut demand, image, *id, options)).collect();
    let when_running = |sent: Result<Sent, PoolError>| {
        let (jailed, had_shell, shell_ns) = sent?;
        let running = jailed.worker.wait(|mail| mail.running)?;
        Ok((jailed, times(started, shell_ns, running, had_shell)))
    };
    let again = |id| send_fork(inner, &mut keeper::Demand::of(inner, image.class(), 1), image, id, options);
    let forked = ids.iter().zip(sent).map(|(id, sent)| {
        let mut forked = when_running(sent);
        for _ in 0..SHELL_ATTEMPTS {
            // A shell may be dying when it is taken. Whatever of the child has been run, nobody has seen anything of it.
            if !matches!(forked, Err(PoolError::NeverRan(_))) {
                break;
            }
            forked = when_running(again(*id));
        }
        forked
    });
    let forked = forked.collect();
    drop(demand);
    forked
}

fn times(started: u64, shell_ns: u64, running: Running, had_shell: bool) -> ForkTimes {
    let Running { received_ns, first_ns, map_ns, restore_ns } = running;
    let ns = Duration::from_nanos;
    // Another process's numbers: they are not trusted to be in order.
    let first = if first_ns == 0 { received_ns.saturating_add(map_ns).saturating_add(restore_ns) } else { first_ns };
    let after = |later: u64, earlier: u64| ns(later.saturating_sub(earlier));
    ForkTimes {
        first: after(first, started),
        shell: after(shell_ns, started),
        send: after(received_ns, shell_ns),
        map: ns(map_ns),
        restore: ns(restore_ns),
        run: after(first, received_ns.saturating_add(map_ns).saturating_add(restore_ns)),
        had_shell,
    }
}

fn send_fork(
    inner: &Arc<Inner>,
    demand: &mut keeper::Demand<'_>,
    image: &Arc<Image>,
    id: MachineId,
    options: ForkOptions,
) -> Result<Sent, PoolError> {
    let class = image.class();
    let limit_bytes = options.limit_bytes.unwrap_or(class.region_bytes()).min(class.region_bytes());
    if limit_bytes < LIMIT_MIN.min(class.memory().bytes()) {
        return Err(PoolError::Limit { asked_bytes: limit_bytes, least_bytes: LIMIT_MIN });
    }
    let layers = image.read_only_layers().map_err(|source| PoolError::Step { step: "opening the image to read", source })?;
    let (worker, had_shell) = demand.take()?;
    let shell_ns = monotonic_ns();
    worker.deliver(|mail| mail.machine = Some(id));
    // From here on dropping it kills the worker.
    let jailed = Jailed::child(id, inner, worker, image, limit_bytes);
    if options.limit_bytes.is_some() {
        jailed.limit_memory(0)?;
    }
    let bytes = image.wire().to_vec();
    let fork = match image.unsettled() {
        None => ToWorker::Fork { id, image: bytes },
        Some(host_image) => {
            jailed.worker.await_watched(host_image);
            // A process that it forks has its memory and no watch over it: what that reads of absent memory would be zeros, in the
            // image, for all to see.
            let is_alone = !jailed.worker.lock_processes(true).map_err(of_groups)?;
            let keeps_watch = true;
            #[cfg(feature = "testing")]
            let keeps_watch = keeps_watch && !crate::harness::guards::is_off(crate::harness::guards::Guard::WorkersWatch);
            ToWorker::ForkWatched { id, image: bytes, arriving: image.arriving_layers(), is_alone, keeps_watch }
        }
    };
    let fork = protocol::encode(&fork);
    let descriptors: Vec<BorrowedFd<'_>> = layers.iter().map(AsFd::as_fd).collect();
    let (first, last) = descriptors.split_at((descriptors.len().max(1) - 1) / DESCRIPTORS_MAX * DESCRIPTORS_MAX);
    for some in first.chunks(DESCRIPTORS_MAX) {
        jailed.worker.send(&ToWorker::Layers, some)?;
    }
    jailed.worker.sent(jailed.worker.channel.send_bytes(&fork, last))?;
    Ok((jailed, had_shell, shell_ns))
}
