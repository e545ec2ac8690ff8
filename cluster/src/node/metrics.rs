//! What a node counts, and what is timed. Fixed buckets, so that histograms can be added up over nodes; never a label per
//! machine. One recorder per process.

use std::sync::OnceLock;
use std::time::Duration;

use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use types::Reason;

use super::engine::{Forked, FreezeFacts, PoolFacts};
use super::registry::Counts;

const FORK_STAGE: &str = "farfork_fork_stage_seconds";
const FORK_FIRST: &str = "farfork_fork_first_seconds";
const FREEZE_STALL: &str = "farfork_freeze_stall_seconds";
const FORKS: &str = "farfork_forks_total";
const FAILURES: &str = "farfork_failures_total";
const KILLS: &str = "farfork_kills_total";
const ENDS: &str = "farfork_ends_total";
const REQUESTS: &str = "farfork_api_requests_total";
const REFUSED_PEERS: &str = "farfork_api_refused_peers_total";
const CONNECTIONS: &str = "farfork_api_connections";
const MACHINES: &str = "farfork_machines";
const IMAGES: &str = "farfork_images";
const SHELLS: &str = "farfork_shells";

/// Seconds. From a stage of a few microseconds to a shell that was built on the way.
const STAGE_BUCKETS: &[f64] =
    &[5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 7.5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.25, 1.0];

/// Sets the recorder up, once. To be called before anything is counted.
pub fn install() {
    handle();
}

/// All of it as Prometheus text.
#[must_use]
pub fn render(counts: Counts, pool: &[PoolFacts]) -> String {
    gauge!(MACHINES, "state" => "running").set(as_f64(counts.running));
    gauge!(MACHINES, "state" => "ended").set(as_f64(counts.ended));
    gauge!(IMAGES).set(as_f64(counts.images));
    let sum = |of: fn(&PoolFacts) -> u32| f64::from(pool.iter().map(of).sum::<u32>());
    gauge!(SHELLS, "state" => "ready").set(sum(|facts| facts.ready));
    gauge!(SHELLS, "state" => "building").set(sum(|facts| facts.building));
    gauge!(SHELLS, "state" => "wanted").set(sum(|facts| facts.wanted));
    handle().render()
}

/// Moves samples into their buckets. Without it histograms grow between scrapes; to be called every few seconds.
pub fn upkeep() {
    handle().run_upkeep();
}

/// A child runs.
pub(crate) fn forked(forked: &Forked) {
    counter!(FORKS).increment(1);
    let shell = if forked.had_shell { "ready" } else { "built" };
    histogram!(FORK_FIRST, "shell" => shell).record(forked.first);
    let stages = &forked.stages;
    let named =
        [("shell", stages.shell), ("send", stages.send), ("map", stages.map), ("restore", stages.restore), ("run", stages.run)];
    for (stage, spent) in named {
        histogram!(FORK_STAGE, "stage" => stage).record(spent);
    }
}

/// A verb or one child of it failed. Codes are a closed list.
pub(crate) fn failed(code: &'static str) {
    counter!(FAILURES, "code" => code).increment(1);
}

/// A machine was frozen.
pub(crate) fn frozen(facts: &FreezeFacts) {
    histogram!(FREEZE_STALL).record(facts.stall);
}

/// Somebody ended a machine.
pub(crate) fn killed() {
    counter!(KILLS).increment(1);
}

/// A machine ended, for whatever reason.
pub(crate) fn ended(reason: Reason) {
    counter!(ENDS, "reason" => reason.code()).increment(1);
}

/// A request was answered. `route` is the pattern that it matched, never what the client wrote.
pub(crate) fn request(route: String, status: u16) {
    counter!(REQUESTS, "route" => route, "status" => status.to_string()).increment(1);
}

/// A peer was turned away.
pub(crate) fn refused_peer() {
    counter!(REFUSED_PEERS).increment(1);
}

/// A connection was opened or closed.
pub(crate) fn connections(now: usize) {
    gauge!(CONNECTIONS).set(as_f64(now));
}

/// How often [`upkeep`] is due.
pub const UPKEEP_EVERY: Duration = Duration::from_secs(5);

fn handle() -> &'static PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE.get_or_init(|| {
        let handle = [FORK_STAGE, FORK_FIRST, FREEZE_STALL]
            .into_iter()
            .try_fold(PrometheusBuilder::new(), |builder, name| {
                builder.set_buckets_for_metric(Matcher::Full(name.to_owned()), STAGE_BUCKETS)
            })
            .and_then(PrometheusBuilder::install_recorder)
            .expect("the buckets are not empty, and this is the only recorder of the process");
        describe();
        handle
    })
}

fn describe() {
    describe_histogram!(FORK_STAGE, "Time of a fork that one stage took; the stages of a fork add up to its first instruction");
    describe_histogram!(
        FORK_FIRST,
        "From the call until the first instruction of a child; shell: ready ahead, or built for it"
    );
    describe_histogram!(FREEZE_STALL, "How long a machine was kept from running by a freeze");
    describe_counter!(FORKS, "Children that ran");
    describe_counter!(FAILURES, "Refusals and failures by their code; of a fork, one per child");
    describe_counter!(KILLS, "Machines ended because somebody asked; part of farfork_ends_total");
    describe_counter!(ENDS, "Machines that ended, by reason");
    describe_counter!(REQUESTS, "Requests answered, by the route that they matched and the status");
    describe_counter!(REFUSED_PEERS, "Connections of users who may not use this node");
    describe_gauge!(CONNECTIONS, "Connections being served");
    describe_gauge!(MACHINES, "Machines that run, and that ended and are remembered");
    describe_gauge!(IMAGES, "Images in memory");
    describe_gauge!(SHELLS, "Shells of all classes: ready, being built, wanted");
}

#[expect(clippy::cast_precision_loss, reason = "counts of things in memory, far below 2^52")]
fn as_f64(count: usize) -> f64 {
    count as f64
}
