//! What a node counts, and what is timed. Fixed buckets, so that histograms can be added up over nodes; never a label per
//! machine. One recorder per process.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use types::Reason;

use super::engine::{Forked, FreezeFacts, PoolFacts};
use super::guest::identity::Readiness;
use super::registry::Counts;
use super::service::HostImages;

const FORK_STAGE: &str = "farfork_fork_stage_seconds";
const FORK_READY: &str = "farfork_fork_ready_seconds";
const FORK_FIRST: &str = "farfork_fork_first_seconds";
const FREEZE_STALL: &str = "farfork_freeze_stall_seconds";
const FORKS: &str = "farfork_forks_total";
const FAILURES: &str = "farfork_failures_total";
const KILLS: &str = "farfork_kills_total";
const ENDS: &str = "farfork_ends_total";
const REQUESTS: &str = "farfork_api_requests_total";
const REFUSED_PEERS: &str = "farfork_api_refused_peers_total";
const CONNECTIONS: &str = "farfork_api_connections";
const USER_CONNECTIONS: &str = "farfork_api_user_connections";
const MACHINES: &str = "farfork_machines";
const IMAGES: &str = "farfork_images";
const SHELLS: &str = "farfork_shells";
const FAULT: &str = "farfork_fault_seconds";
const OPEN: &str = "farfork_open_seconds";
const PAGE_BYTES: &str = "farfork_page_bytes_total";
const READ_LEASES: &str = "farfork_read_leases";
const HOST_IMAGES: &str = "farfork_host_images";
const QUARANTINES: &str = "farfork_quarantines_total";
const POISONED: &str = "farfork_poisoned_images_total";
const HEDGES: &str = "farfork_hedges_total";
const NODES: &str = "farfork_cluster_nodes";
const QUORUM: &str = "farfork_cluster_quorum";
const JOBS: &str = "farfork_cluster_jobs";
const TASKS: &str = "farfork_cluster_tasks";
const TASK_ENDS: &str = "farfork_task_ends_total";
const CERTIFICATE_EXPIRES: &str = "farfork_certificate_expires_seconds";

/// Seconds. From a stage of a few microseconds to a shell that was built on the way.
const STAGE_BUCKETS: &[f64] =
    &[5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 7.5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.25, 1.0];

/// Seconds. From waking a child whose page was there by then to the deadline of a page.
const FAULT_BUCKETS: &[f64] =
    &[5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 7.5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.25, 1.0, 5.0, 30.0];

/// What the recorder does not give back: some of it, for who asks what this node does.
static FORKED: AtomicU64 = AtomicU64::new(0);
static FETCHED_BYTES: AtomicU64 = AtomicU64::new(0);
static SERVED_BYTES: AtomicU64 = AtomicU64::new(0);

/// What this process has done since it started. Two of them and the time between make a rate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Children that ran.
    pub forks: u64,
    /// Bytes of images' memory that came from other nodes.
    pub fetched_bytes: u64,
    /// Bytes of images' memory that were given to other nodes.
    pub served_bytes: u64,
}

impl Totals {
    /// Until now.
    #[must_use]
    pub fn now() -> Self {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Self { forks: read(&FORKED), fetched_bytes: read(&FETCHED_BYTES), served_bytes: read(&SERVED_BYTES) }
    }
}

/// Sets the recorder up, once. To be called before anything is counted.
pub fn install() {
    handle();
}

/// All of it as Prometheus text.
#[must_use]
pub fn render(counts: Counts, host_images: HostImages, pool: &[PoolFacts]) -> String {
    gauge!(MACHINES, "state" => "running").set(as_f64(counts.running));
    gauge!(MACHINES, "state" => "ended").set(as_f64(counts.ended));
    gauge!(IMAGES).set(as_f64(counts.images));
    gauge!(HOST_IMAGES, "state" => "arriving").set(as_f64(host_images.arriving));
    gauge!(HOST_IMAGES, "state" => "settled").set(as_f64(host_images.settled));
    gauge!(HOST_IMAGES, "state" => "failed").set(as_f64(host_images.failed));
    let sum = |of: fn(&PoolFacts) -> u32| f64::from(pool.iter().map(of).sum::<u32>());
    gauge!(SHELLS, "state" => "ready").set(sum(|facts| facts.ready));
    gauge!(SHELLS, "state" => "building").set(sum(|facts| facts.building));
    gauge!(SHELLS, "state" => "wanted").set(sum(|facts| facts.wanted));
    handle().render()
}

/// Notes for [`render`] what this node knows of its cluster: how many nodes are up, are suspected and are lost, and whether it
/// reaches a majority. A node that stands alone has none of it.
pub fn cluster(up_suspect_lost: [usize; 3], has_quorum: bool) {
    for (state, count) in ["up", "suspect", "lost"].into_iter().zip(up_suspect_lost) {
        gauge!(NODES, "state" => state).set(as_f64(count));
    }
    gauge!(QUORUM).set(if has_quorum { 1.0 } else { 0.0 });
}

/// Notes for [`render`] what this node knows of jobs that go on: how many there are, and how many of their tasks wait and are placed.
pub fn jobs(running: usize, waiting: usize, placed: usize) {
    gauge!(JOBS).set(as_f64(running));
    gauge!(TASKS, "state" => "waiting").set(as_f64(waiting));
    gauge!(TASKS, "state" => "placed").set(as_f64(placed));
}

/// A try of a task has ended on this node: with `SUCCESS`, with `EXIT` if its program said otherwise, or with a reason.
pub fn task_ended(how: &'static str) {
    counter!(TASK_ENDS, "how" => how).increment(1);
}

/// This node's certificate is good until then.
pub fn certificate_until(until: SystemTime) {
    gauge!(CERTIFICATE_EXPIRES).set(until.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64());
}

/// Moves samples into their buckets. Without it histograms grow between scrapes; to be called every few seconds.
pub fn upkeep() {
    handle().run_upkeep();
}

/// A child knows who it is.
pub(crate) fn ready(readiness: &Readiness) {
    histogram!(FORK_READY).record(readiness.after);
}

/// A child runs.
pub(crate) fn forked(forked: &Forked) {
    counter!(FORKS).increment(1);
    FORKED.fetch_add(1, Ordering::Relaxed);
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

/// A connection to the socket was opened or closed.
pub(crate) fn connections(now: usize) {
    gauge!(CONNECTIONS).set(as_f64(now));
}

/// A connection over HTTPS was opened or closed.
pub(crate) fn user_connections(now: usize) {
    gauge!(USER_CONNECTIONS).set(as_f64(now));
}

/// How the time of one fault on memory that another node has was spent, in this order.
#[derive(Clone, Copy, Debug, Default)]
pub struct FaultStages {
    /// From the touch, as far as it can be told, until the pager had read it.
    pub uffd_read: Duration,
    /// Until its extent was asked for.
    pub queue: Duration,
    /// Until the extent was there.
    pub wire: Duration,
    /// Until its bytes were found to be the image's.
    pub verify: Duration,
    /// Until its pages were in place.
    pub publish: Duration,
    /// Until the child was told.
    pub wake: Duration,
}

/// A fault was answered.
pub fn fault(stages: &FaultStages) {
    let FaultStages { uffd_read, queue, wire, verify, publish, wake } = *stages;
    let total = uffd_read + queue + wire + verify + publish + wake;
    let named = [
        ("uffd_read", uffd_read),
        ("queue", queue),
        ("wire", wire),
        ("verify", verify),
        ("publish", publish),
        ("wake", wake),
        ("total", total),
    ];
    for (stage, spent) in named {
        histogram!(FAULT, "stage" => stage).record(spent);
    }
}

/// How the time until an image of another node could be forked from was spent, in this order.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenStages {
    /// Until a holder had answered.
    pub ask: Duration,
    /// Until there was memory for it, watched.
    pub place: Duration,
    /// Until it was known what is to be fetched, and of whom.
    pub plan: Duration,
}

/// An image was opened.
pub fn opened(stages: &OpenStages) {
    let OpenStages { ask, place, plan } = *stages;
    for (stage, spent) in [("ask", ask), ("place", place), ("plan", plan), ("total", ask + place + plan)] {
        histogram!(OPEN, "stage" => stage).record(spent);
    }
}

/// What became of bytes of memory that an image has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageBytes {
    /// Fetched, since a child waited for them.
    Demand,
    /// Fetched ahead, since children touched them before.
    Replay,
    /// Fetched in the background.
    Stream,
    /// Given to another node.
    Served,
    /// Zero, and so never sent.
    Zero,
    /// Found in another image on this node, and so not fetched.
    Local,
}

impl PageBytes {
    const ALL: [Self; 6] = [Self::Demand, Self::Replay, Self::Stream, Self::Served, Self::Zero, Self::Local];

    fn name(self) -> &'static str {
        match self {
            Self::Demand => "demand",
            Self::Replay => "replay",
            Self::Stream => "stream",
            Self::Served => "served",
            Self::Zero => "zero",
            Self::Local => "local",
        }
    }
}

/// So many bytes; of those that were sent, as they were sent.
pub fn page_bytes(kind: PageBytes, bytes: u64) {
    counter!(PAGE_BYTES, "kind" => kind.name()).increment(bytes);
    let total = match kind {
        PageBytes::Demand | PageBytes::Replay | PageBytes::Stream => &FETCHED_BYTES,
        PageBytes::Served => &SERVED_BYTES,
        PageBytes::Zero | PageBytes::Local => return,
    };
    total.fetch_add(bytes, Ordering::Relaxed);
}

/// How many read leases other nodes have from this one.
pub fn read_leases_granted(count: usize) {
    gauge!(READ_LEASES, "state" => "granted").set(as_f64(count));
}

/// How many read leases this node has from others.
pub fn read_leases_held(count: usize) {
    gauge!(READ_LEASES, "state" => "held").set(as_f64(count));
}

/// A source sent bytes that did not verify, and is not asked again.
pub fn quarantined() {
    counter!(QUARANTINES).increment(1);
}

/// Bytes of unknown origin were found in a host image.
pub fn poisoned() {
    counter!(POISONED).increment(1);
}

/// An extent was asked for a second time, elsewhere, since the first answer took too long.
pub fn hedged() {
    counter!(HEDGES).increment(1);
}

/// How often [`upkeep`] is due.
pub const UPKEEP_EVERY: Duration = Duration::from_secs(5);

fn handle() -> &'static PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE.get_or_init(|| {
        let buckets = [
            (FORK_STAGE, STAGE_BUCKETS),
            (FORK_FIRST, STAGE_BUCKETS),
            (FORK_READY, FAULT_BUCKETS),
            (FREEZE_STALL, STAGE_BUCKETS),
            (FAULT, FAULT_BUCKETS),
            (OPEN, FAULT_BUCKETS),
        ];
        let handle = buckets
            .into_iter()
            .try_fold(PrometheusBuilder::new(), |builder, (name, buckets)| {
                builder.set_buckets_for_metric(Matcher::Full(name.to_owned()), buckets)
            })
            .and_then(PrometheusBuilder::install_recorder)
            .expect("the buckets are not empty, and this is the only recorder of the process");
        describe();
        start_at_zero();
        handle
    })
}

fn describe() {
    describe_histogram!(FORK_STAGE, "Time of a fork that one stage took; the stages of a fork add up to its first instruction");
    describe_histogram!(
        FORK_FIRST,
        "From the call until the first instruction of a child; shell: ready ahead, or built for it"
    );
    describe_histogram!(FORK_READY, "From the call of a fork until the child, a Linux guest, knew who it is");
    describe_histogram!(FREEZE_STALL, "How long a machine was kept from running by a freeze");
    describe_counter!(FORKS, "Children that ran");
    describe_counter!(FAILURES, "Refusals and failures by their code; of a fork, one per child");
    describe_counter!(KILLS, "Machines ended because somebody asked; part of farfork_ends_total");
    describe_counter!(ENDS, "Machines that ended, by reason");
    describe_counter!(REQUESTS, "Requests answered, by the route that they matched and the status");
    describe_counter!(REFUSED_PEERS, "Connections of users who may not use this node");
    describe_gauge!(CONNECTIONS, "Connections to the socket being served");
    describe_gauge!(USER_CONNECTIONS, "Connections over HTTPS being served");
    describe_gauge!(MACHINES, "Machines that run, and that ended and are remembered");
    describe_gauge!(IMAGES, "Images in memory");
    describe_gauge!(SHELLS, "Shells of all classes: ready, being built, wanted");
    describe_histogram!(
        FAULT,
        "Time of a fault on memory of another node that one stage took, and in total; a fault that was given up is not in it"
    );
    describe_counter!(
        PAGE_BYTES,
        "Bytes of images' memory: fetched (demand, replay, stream), served, zero, found here (local)"
    );
    describe_gauge!(READ_LEASES, "Read leases: granted to other nodes, held from other nodes");
    describe_gauge!(HOST_IMAGES, "Images that were opened from other nodes: arriving, settled, failed");
    describe_counter!(QUARANTINES, "Sources that sent bytes that did not verify");
    describe_counter!(POISONED, "Host images in which bytes of unknown origin were found");
    describe_gauge!(NODES, "Nodes of the cluster, as this one knows: up, suspect, lost");
    describe_gauge!(QUORUM, "Whether this node reaches a majority of its cluster's voters: 1, or 0");
    describe_gauge!(JOBS, "Jobs of the cluster that go on, as this node knows");
    describe_gauge!(TASKS, "Tasks of jobs that go on: waiting, placed");
    describe_counter!(TASK_ENDS, "Tries of tasks that ended on this node: SUCCESS, EXIT with another status, or the reason");
    describe_gauge!(
        CERTIFICATE_EXPIRES,
        "When the certificate that the cluster gave this node runs out, in seconds since 1970"
    );
    describe_counter!(HEDGES, "Extents that were asked for elsewhere too, since the first answer took too long");
}

/// What has not happened yet is 0: a rate over something that appears out of nothing would miss the first.
fn start_at_zero() {
    [QUARANTINES, POISONED, HEDGES].into_iter().for_each(|name| counter!(name).increment(0));
    PageBytes::ALL.into_iter().for_each(|kind| page_bytes(kind, 0));
    Reason::ALL.into_iter().for_each(|reason| counter!(ENDS, "reason" => reason.code()).increment(0));
    // Of failures those that the disk is full or broken for: all codes there are would be many.
    ["STORE", "STORE_FULL", "AUDIT_FAILED", "LOG_FAILED"]
        .into_iter()
        .for_each(|code| counter!(FAILURES, "code" => code).increment(0));
    ["SUCCESS", "EXIT"].into_iter().for_each(|how| counter!(TASK_ENDS, "how" => how).increment(0));
    read_leases_granted(0);
    read_leases_held(0);
}

#[expect(clippy::cast_precision_loss, reason = "counts of things in memory, far below 2^52")]
fn as_f64(count: usize) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stages_of_a_fault_add_up_to_its_total() {
        let ms = Duration::from_millis;
        install();
        let before = Totals::now();
        fault(&FaultStages { uffd_read: ms(1), queue: ms(2), wire: ms(4), verify: ms(8), publish: ms(16), wake: ms(32) });
        assert!((sum("total") - 0.063).abs() < 1e-9 && (sum("wake") - 0.032).abs() < 1e-9);
        page_bytes(PageBytes::Served, 7);
        read_leases_granted(3);
        read_leases_held(2);
        page_bytes(PageBytes::Zero, 9);
        page_bytes(PageBytes::Stream, 5);
        let now = Totals::now();
        assert_eq!((now.served_bytes - before.served_bytes, now.fetched_bytes - before.fetched_bytes), (7, 5));
        let text = handle().render();
        for expected in [
            "farfork_page_bytes_total{kind=\"served\"} 7",
            "farfork_page_bytes_total{kind=\"zero\"} 9",
            "farfork_read_leases{state=\"granted\"} 3",
            "farfork_quarantines_total 0",
            "farfork_fault_seconds_bucket{stage=\"wire\",le=\"0.005\"} 1",
        ] {
            assert!(text.contains(expected), "{expected} is not in\n{text}");
        }
    }

    #[test]
    fn each_metric_and_each_reason_is_in_the_handbook_and_nothing_else_is() {
        let handbook = include_str!("../../../docs/operations.md");
        let names = |text: &'static str| {
            let words = text.split(|c: char| !(c.is_ascii_lowercase() || c == '_')).filter(|word| word.starts_with("farfork_"));
            words.map(|word| word.trim_end_matches("_bucket")).collect::<std::collections::BTreeSet<_>>()
        };
        let (code, _) = include_str!("metrics.rs").split_once("mod tests").unwrap();
        assert_eq!(names(handbook), names(code));
        for reason in Reason::ALL {
            assert!(handbook.contains(&format!("| `{}` |", reason.code())), "{reason}");
        }
    }

    fn sum(stage: &str) -> f64 {
        let text = handle().render();
        let line = format!("{FAULT}_sum{{stage=\"{stage}\"}} ");
        text.lines().find_map(|text| text.strip_prefix(&line)).map_or(0.0, |sum| sum.parse().unwrap())
    }
}
