//! `bench cluster`: rows C3 and C5, of the control plane's own code, C4 ([`failover`]) and C1 ([`jobs`]), of real nodes. Nodes of C3 and C5 are entries
//! of its state: how long choosing takes, what is chosen, and how much is written into the log are measured; how long the chosen
//! would take is reckoned by a model, and said so.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use control::command::{Answer, Command, Entry, Kept};
use control::leader::{Heard, tend};
use control::place::{Plan, Tier, Verdict, Wanted, plan};
use control::reconcile::{Action, Observed, Run, Seen, reconcile};
use control::state::{ImageFacts, ImageKey, JobId, JobSpec, NodeFacts, Outcome, Resources, Spread, State};
use control::{Tick, apply};
use types::{CpuProfile, Digest, Name, NodeId, Tenant};
use uuid::Uuid;

use crate::linux::Given;
use crate::report::{Report, Row, Samples, announce};
use crate::{failover, floor, jobs};

const MIB: u64 = 1 << 20;
pub(crate) const IMAGE_BYTES: u64 = 4096 * MIB;
/// Tasks of a node that run at a time; more wait.
const SLOTS: u64 = 8;
const TASK_SECONDS: f64 = 1.0;
/// 10 Gbit/s, each way.
pub(crate) const LINK_BYTES_A_SECOND: f64 = 1.25e9;

pub(crate) fn run(json: Option<&Path>, quick: bool, farfork: Option<&Path>, given: &Given) -> Result<()> {
    let mut report = Report::new(&floor::open_host()?, quick);
    jobs::run(&mut report, farfork, given, quick)?;
    announce("C3: 10,000 children on 1,000 nodes");
    placement(&mut report, if quick { 20 } else { 200 })?;
    if quick {
        report.leave_out(&["C4"], "--quick, and nodes are given up after 15 s, each time");
    } else {
        announce("C4: nodes that are killed, half a minute each");
        failover::run(&mut report, farfork)?;
    }
    announce("C5: entries and bytes of a job");
    for count in [10, 100, 1000, 10_000, 100_000] {
        log_of_a_job(&mut report, count)?;
    }
    report.finish(json)
}

pub(crate) fn node(index: u32) -> NodeId {
    NodeId::from_uuid(Uuid::from_u128(u128::from(index) + 1))
}

pub(crate) fn key() -> ImageKey {
    ImageKey { tenant: Tenant::default_tenant(), digest: Digest::of(b"of a bench") }
}

pub(crate) fn each() -> Resources {
    Resources { memory_bytes: 64 * MIB, cpu_millis: 100, machines: 1 }
}

/// Nodes with so many places each, of which the first `holders` have all of the image.
pub(crate) fn cluster(nodes: u32, places: u64, holders: u32) -> State {
    let profile =
        CpuProfile { vendor: "GenuineIntel".into(), family: 6, model: 1, cpuid: Digest::of(b"cpuid"), tsc_khz: 2_000_000 };
    let facts =
        ImageFacts { profile: profile.clone(), data_bytes: IMAGE_BYTES, working_set_bytes: 100 * MIB, dirty_bytes: 64 * MIB };
    let mut state = State::default();
    let mut say = |command| drop(apply(&mut state, &Entry { at: Tick(0), key: None, command }));
    for index in 0..nodes {
        let capacity = each().times(places);
        let capacity = Resources { memory_bytes: capacity.memory_bytes + IMAGE_BYTES, ..capacity };
        say(Command::Register {
            node: node(index),
            incarnation: 1,
            facts: NodeFacts {
                name: Name::parse(&format!("node-{index}")).expect("a name"),
                address: ([127, 0, 0, 1], 7117).into(),
                profile: profile.clone(),
                labels: BTreeMap::new(),
                capacity,
            },
            images: Vec::new(),
        });
    }
    for index in 0..holders {
        say(Command::AddImage { key: key(), facts: facts.clone(), node: node(index), incarnation: 1 });
    }
    let name = Name::parse("python").expect("a name");
    say(Command::PutTemplate { tenant: Tenant::default_tenant(), name, digest: key().digest });
    state
}

fn placement(report: &mut Report, n: usize) -> Result<()> {
    const NODES: u32 = 1000;
    const PLACES: u64 = 40;
    const HOLDERS: u32 = 100;
    const COUNT: u64 = 10_000;
    let state = cluster(NODES, PLACES, HOLDERS);
    let wanted =
        Wanted { image: &key(), count: COUNT, each: each(), spread: Spread::Spread, labels: &BTreeMap::new(), not_on: None };
    let mut took = Vec::with_capacity(n);
    let mut chosen = Plan::default();
    for _ in 0..n {
        let began = Instant::now();
        chosen = plan(&state, &wanted);
        took.push(began.elapsed());
    }
    let took = Samples::of(&took);
    report.keep("C3 plan", &took);
    let is_fast = took.p50() <= 50_000.0;
    report.add(
        Row::new("C3", "choosing a node for each of 10,000 children among 1,000", &took, None).reaching("<= 50 ms", is_fast),
    );

    let placed: u64 = chosen.on.iter().map(|(_, count)| count).sum();
    ensure!(placed == COUNT && chosen.left == 0, "{placed} of {COUNT} were placed");
    let at_holders: u64 = chosen
        .verdicts
        .values()
        .map(|verdict| match verdict {
            Verdict::Takes { count, because: Tier::Settled } => *count,
            _ => 0,
        })
        .sum();
    let could = COUNT.min(u64::from(HOLDERS) * PLACES);
    #[expect(clippy::cast_precision_loss, reason = "some thousands")]
    let share = Samples::from_us(vec![at_holders as f64 / could as f64 * 100.0]);
    let is_local = share.p50() >= 95.0;
    let what = "children on nodes that have the image, of those for whom they have room; the others open it on new ones";
    report.add(Row::new("C3", what, &share, None).in_unit("%").reaching(">= 95 %", is_local));
    let unexplained = chosen.verdicts.len() != usize::try_from(NODES).expect("a thousand");
    ensure!(!unexplained, "a node without a verdict");

    // What schedulers do that do not know of images.
    let mut dice = fastrand::Rng::with_seed(1);
    let mut random: BTreeMap<NodeId, u64> = BTreeMap::new();
    for _ in 0..COUNT {
        *random.entry(node(dice.u32(..NODES))).or_default() += 1;
    }
    let even = (0..NODES).map(|index| (node(index), COUNT / u64::from(NODES))).collect();
    let ours = chosen.on.iter().copied().collect();
    let sources = chosen.opens.iter().map(|(id, sources)| (*id, sources[0])).collect();
    let own = Modelled::of(&state, &ours, Some(&sources));
    for (name, on) in [("at random", random), ("on the least loaded", even)] {
        let other = Modelled::of(&state, &on, None);
        let bytes = Samples::from_us(vec![own.mib]);
        let met = own.mib / other.mib <= 1.0 / 3.0;
        let what = format!("image bytes over the wire (control: {name})");
        report.add(Row::new("C3", what, &bytes, Some(other.mib)).in_mib().reaching("<= 1/3", met));
        let seconds = Samples::from_us(vec![own.seconds]);
        let met = own.seconds / other.seconds <= 2.0 / 3.0;
        let what = format!("until the last child has ended, by the model (control: {name}, images from the holders in turn)");
        report.add(Row::new("C3", what, &seconds, Some(other.seconds)).in_unit("s").reaching("<= 2/3", met));
    }
    report.note(format!(
        "C3's makespan is reckoned: tasks of {TASK_SECONDS} s, {SLOTS} at a time, an image of {IMAGE_BYTES} bytes, links of 10 Gbit/s \
         that a holder's readers share; a node begins when all of its image is there (children need not wait for that)"
    ));
    Ok(())
}

/// What a placement costs, by the model.
struct Modelled {
    mib: f64,
    seconds: f64,
}

impl Modelled {
    /// With who reads from whom; `None`: new nodes read from the holders in turn.
    #[expect(clippy::cast_precision_loss, reason = "a model")]
    fn of(state: &State, on: &BTreeMap<NodeId, u64>, sources: Option<&BTreeMap<NodeId, NodeId>>) -> Self {
        let settled: Vec<NodeId> = state.images[&key()].settled().collect();
        let new: Vec<NodeId> = on.keys().filter(|id| !settled.contains(id)).copied().collect();
        let in_turn = || new.iter().zip(settled.iter().cycle()).map(|(id, source)| (*id, *source)).collect();
        let sources = sources.cloned().unwrap_or_else(in_turn);
        let mut readers: BTreeMap<NodeId, u32> = BTreeMap::new();
        sources.values().for_each(|source| *readers.entry(*source).or_default() += 1);
        let rate = |mut id: NodeId| {
            // What comes down the tree is as fast as its narrowest link.
            let mut slowest = LINK_BYTES_A_SECOND;
            while let Some(source) = sources.get(&id) {
                slowest = slowest.min(LINK_BYTES_A_SECOND / f64::from(readers[source]));
                id = *source;
            }
            slowest
        };
        let seconds = |(id, count): (&NodeId, &u64)| {
            let arrival = if sources.contains_key(id) { IMAGE_BYTES as f64 / rate(*id) } else { 0.0 };
            arrival + count.div_ceil(SLOTS) as f64 * TASK_SECONDS
        };
        Self { mib: (new.len() as u64 * (IMAGE_BYTES / MIB)) as f64, seconds: on.iter().map(seconds).fold(0.0, f64::max) }
    }
}

/// A node of C5: its tasks take a second each, all at once.
struct Agent {
    id: NodeId,
    observed: Observed,
    ends: BTreeMap<(JobId, u32), Tick>,
}

/// C5: what one job writes into the log, on 100 nodes with room for all of it.
fn log_of_a_job(report: &mut Report, count: u32) -> Result<()> {
    const NODES: u32 = 100;
    let mut state = cluster(NODES, 1000, NODES);
    let seen = Seen { percent: 100, sources: Vec::new() };
    let observed = Observed { incarnation: 1, images: BTreeMap::from([(key(), seen)]), ..Observed::default() };
    let mut agents: Vec<Agent> =
        (0..NODES).map(|index| Agent { id: node(index), observed: observed.clone(), ends: BTreeMap::new() }).collect();
    let mut dice = fastrand::Rng::with_seed(u64::from(count));
    let mut now = Tick(1000);
    let job = JobId(Uuid::from_u128(1));
    let spec = JobSpec::new(key(), count, each());
    let mut written = Written::default();
    written.apply(&mut state, now, Command::Submit { job, spec })?;
    let began = now;
    while state.jobs[&job].ended.is_none() {
        now = now + Duration::from_millis(250);
        ensure!(now - began < Duration::from_secs(600), "the job does not end");
        for command in tend(&state, &Heard::since(now), now) {
            written.apply(&mut state, now, command)?;
        }
        for agent in &mut agents {
            for (task, _) in agent.ends.iter().filter(|(_, end)| **end <= now) {
                agent.observed.tasks.get_mut(task).expect("it runs").ended =
                    Some((Outcome::Exited(0), Kept::HereAnd(agent.id)));
            }
            for action in reconcile(&state, agent.id, &agent.observed) {
                match action {
                    Action::Start { job, task, epoch } => {
                        agent.observed.tasks.insert((job, task), Run { epoch, ended: None });
                        agent.ends.insert((job, task), now + Duration::from_millis(dice.u64(500..1500)));
                    }
                    Action::Forget { job, task } => {
                        agent.observed.tasks.remove(&(job, task));
                        agent.ends.remove(&(job, task));
                    }
                    Action::Report(report) => written.apply(&mut state, now, *report)?,
                    other => anyhow::bail!("nothing else is to be done: {other:?}"),
                }
            }
        }
    }
    let seconds = (now - began).as_secs_f64();
    let entries = Samples::from_us(vec![f64::from(written.entries)]);
    let most = f64::from(NODES) * seconds * 4.0;
    let what = format!("entries of a job of {count} on {NODES} nodes, {seconds:.1} s of it");
    let met = f64::from(written.entries) <= most;
    report.add(Row::new("C5", what, &entries, None).in_unit("").reaching(format!("<= {most:.0}"), met));
    let bytes = Samples::from_us(vec![f64::from(written.bytes) / f64::from(count)]);
    let what = format!("bytes of them for each of the {count} tasks");
    let row = Row::new("C5", what, &bytes, None).in_unit("B");
    // From here on what each node writes once does not count for much.
    report.add(if count < 10_000 { row } else { row.reaching("<= 10 B", bytes.p50() <= 10.0) });
    Ok(())
}

/// What went into the log.
#[derive(Default)]
pub(crate) struct Written {
    pub(crate) entries: u32,
    pub(crate) bytes: u32,
}

impl Written {
    pub(crate) fn apply(&mut self, state: &mut State, at: Tick, command: Command) -> Result<()> {
        let entry = Entry { at, key: None, command };
        self.entries += 1;
        self.bytes += u32::try_from(postcard::to_stdvec(&entry)?.len())?;
        match apply(state, &entry) {
            Answer::Refused(refusal) => anyhow::bail!("{entry}: {refusal}"),
            _ => Ok(()),
        }
    }
}
