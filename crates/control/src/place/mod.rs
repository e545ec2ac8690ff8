//! Where tasks go, and why. First to nodes where the image is, or is being read; then to new ones, where it is opened once for all
//! that is placed there. Bulk goes down a tree: each holder is the first source of at most [`DEGREE`] that still read.
//!
//! Every node is looked at and gets a [`Verdict`], so that a placement can be explained and a task that waits says for what.

mod tree;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::time::Duration;

use types::{NodeId, Tenant};

use crate::apply::leads_to_all;
use crate::command::Command;
use crate::state::{Holder, Image, ImageKey, Job, JobId, Life, Resources, Spread, State, Task};
use tree::Tree;

/// The most nodes that read an image from one holder first.
pub const DEGREE: usize = 2;
/// Jobs that are placed at a time: the next ones are when these are agreed on.
const PLACED_AT_ONCE: usize = 64;
/// The most nodes that a holder reads from.
const SOURCES_MAX: usize = 3;
/// How long a task that failed on a node is kept from it while tasks of its job run elsewhere, which may make room there,
pub(crate) const BACK_AFTER: Duration = Duration::from_secs(30);
/// and while none do, but there are others.
const BACK_SOON_AFTER: Duration = Duration::from_secs(1);
/// The label by which nodes are near to one another.
pub const ZONE: &str = "zone";

/// What is to be placed.
#[derive(Clone, Debug)]
pub struct Wanted<'a> {
    /// Of which image.
    pub image: &'a ImageKey,
    /// How many machines.
    pub count: u64,
    /// What each takes.
    pub each: Resources,
    /// How they are spread.
    pub spread: Spread,
    /// Labels that a node has to have.
    pub labels: &'a BTreeMap<String, String>,
    /// Not there, because the last try failed there.
    pub not_on: Option<NodeId>,
}

/// Where it goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// How many on which node.
    pub on: Vec<(NodeId, u64)>,
    /// Nodes that open the image for that, and from whom.
    pub opens: Vec<(NodeId, Vec<NodeId>)>,
    /// How many find no place.
    pub left: u64,
    /// What was thought of each node.
    pub verdicts: BTreeMap<NodeId, Verdict>,
}

/// What was thought of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It gets so many.
    Takes {
        /// How many.
        count: u64,
        /// Why this one.
        because: Tier,
    },
    /// It could take some, but others suited better.
    NotNeeded {
        /// How many it could take.
        room: u64,
        /// How it suits.
        tier: Tier,
    },
    /// It takes nothing new.
    Closed {
        /// What it is.
        life: Life,
    },
    /// Its CPU is not the image's.
    ForeignCpu,
    /// It lacks this label.
    Label(String),
    /// It has no room for one.
    Full {
        /// What is left of it.
        free: Resources,
        /// What one takes, with the image if it is not there.
        needed: Resources,
    },
    /// It is letting go of the image.
    LetsGo,
    /// It is not there, and nobody it could be read from has all of it or gets it.
    NoSource,
    /// The last try failed there, and others may take it.
    FailedLast,
}

/// How well a node suits, the best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tier {
    /// It has all of the image.
    Settled,
    /// It reads it, and has what a child touches first.
    MostOfIt,
    /// It reads it.
    Open,
    /// It does not have it; one in its zone does.
    Near,
    /// It does not have it.
    Far,
}

/// Chooses for each of `wanted.count` machines a node.
#[must_use]
pub fn plan(state: &State, wanted: &Wanted<'_>) -> Plan {
    plan_beside(state, &state.usage(), wanted)
}

/// The same, where so much is taken of each node.
fn plan_beside(state: &State, usage: &BTreeMap<NodeId, Resources>, wanted: &Wanted<'_>) -> Plan {
    let Some(image) = state.images.get(wanted.image) else { return Plan { left: wanted.count, ..Plan::default() } };
    let mut plan = Plan { left: wanted.count, ..Plan::default() };
    let mut rooms: BTreeMap<Tier, Vec<(NodeId, u64)>> = BTreeMap::new();
    let near = Near::to(state, image);
    for id in state.nodes.keys() {
        if wanted.not_on == Some(*id) {
            plan.verdicts.insert(*id, Verdict::FailedLast);
            continue;
        }
        match look_at(state, (image, &near), *id, wanted, state.free(*id, usage)) {
            Ok((tier, room)) => {
                plan.verdicts.insert(*id, Verdict::NotNeeded { room, tier });
                rooms.entry(tier).or_default().push((*id, room));
            }
            Err(verdict) => drop(plan.verdicts.insert(*id, verdict)),
        }
    }
    let mut tree = Tree::of(state, image);
    for (tier, mut nodes) in rooms {
        if tier >= Tier::Near {
            // A new one costs the wire a whole image: no more of them than are needed.
            nodes.sort_by_key(|(id, room)| (std::cmp::Reverse(*room), *id));
            let mut before = 0u64;
            nodes.retain(|(_, room)| {
                let is_needed = before < plan.left;
                before = before.saturating_add(*room);
                is_needed
            });
        }
        for (id, count) in share(plan.left, &nodes, wanted.spread) {
            if tier >= Tier::Near {
                let sources = tree.sources_for(id);
                if sources.is_empty() {
                    plan.verdicts.insert(id, Verdict::NoSource);
                    continue;
                }
                plan.opens.push((id, sources));
            }
            plan.left -= count;
            plan.on.push((id, count));
            plan.verdicts.insert(id, Verdict::Takes { count, because: tier });
        }
    }
    plan
}

/// Where an image can be had.
struct Near<'a> {
    is_anywhere: bool,
    zones: BTreeSet<&'a str>,
}

impl<'a> Near<'a> {
    fn to(state: &'a State, image: &Image) -> Self {
        let zone_of = |node| state.nodes.get(&node).and_then(|node| node.facts.labels.get(ZONE)).map(String::as_str);
        Self { is_anywhere: image.settled().next().is_some(), zones: image.settled().filter_map(zone_of).collect() }
    }
}

fn look_at(
    state: &State,
    (image, near): (&Image, &Near<'_>),
    id: NodeId,
    wanted: &Wanted<'_>,
    free: Resources,
) -> Result<(Tier, u64), Verdict> {
    let node = &state.nodes[&id];
    if !node.is_open() {
        return Err(Verdict::Closed { life: node.life });
    }
    if image.facts.profile.check_resumable_on(&node.facts.profile).is_err() {
        return Err(Verdict::ForeignCpu);
    }
    let lacks = |(label, value): &(&String, &String)| node.facts.labels.get(*label) != Some(*value);
    if let Some((label, value)) = wanted.labels.iter().find(lacks) {
        return Err(Verdict::Label(format!("{label}={value}")));
    }
    let zone = node.facts.labels.get(ZONE);
    let (tier, before) = match image.holders.get(&id) {
        Some(holder) if !holder.is_kept() => return Err(Verdict::LetsGo),
        Some(holder) if holder.is_settled() => (Tier::Settled, 0),
        Some(_) if !leads_to_all(image, id) => return Err(Verdict::NoSource),
        Some(holder) => {
            let here = u128::from(image.facts.data_bytes) * u128::from(holder.percent) / 100;
            let has_most = here >= u128::from(image.facts.working_set_bytes);
            (if has_most { Tier::MostOfIt } else { Tier::Open }, 0)
        }
        None => {
            if !near.is_anywhere {
                return Err(Verdict::NoSource);
            }
            let is_near = zone.is_some_and(|zone| near.zones.contains(zone.as_str()));
            (if is_near { Tier::Near } else { Tier::Far }, image.facts.data_bytes)
        }
    };
    let left = Resources { memory_bytes: free.memory_bytes.saturating_sub(before), ..free };
    let room = if free.memory_bytes < before { 0 } else { left.holds(wanted.each) };
    if room == 0 {
        let needed = Resources { memory_bytes: wanted.each.memory_bytes.saturating_add(before), ..wanted.each };
        return Err(Verdict::Full { free, needed });
    }
    Ok((tier, room))
}

/// Divides `count` among nodes with so much room each.
fn share(count: u64, nodes: &[(NodeId, u64)], spread: Spread) -> Vec<(NodeId, u64)> {
    let mut left = count;
    let mut nodes = nodes.to_vec();
    match spread {
        // The fullest first: what it leaves over, the others take.
        Spread::Spread => nodes.sort_by_key(|(id, room)| (*room, *id)),
        // The fullest of those that have room for all; if there is none, the emptiest ones.
        Spread::Pack => {
            nodes.sort_by_key(|(id, room)| if *room >= count { (0, *room, *id) } else { (1, u64::MAX - room, *id) })
        }
    }
    let mut shares = Vec::new();
    let all = nodes.len();
    for (index, (id, room)) in nodes.into_iter().enumerate() {
        let others = u64::try_from(all - index).expect("not so many");
        let some = match spread {
            Spread::Pack => left,
            Spread::Spread => left.div_ceil(others),
        };
        let some = some.min(room);
        left -= some;
        if some > 0 {
            shares.push((id, some));
        }
    }
    shares
}

/// Places what waits of jobs: room goes to the tenant that has the fewest tasks placed, of its jobs to the one that has, and of
/// those that have as many to the oldest. A large job leaves room to those after it as its tasks end.
///
/// Says also which jobs have tasks that find no place: of those that want the same one.
#[must_use]
pub fn place_all(state: &State) -> (Vec<Command>, Vec<JobId>) {
    let mut running: Vec<(&JobId, &Job)> = state.jobs.iter().filter(|(_, job)| job.ended.is_none()).collect();
    let mut of_tenants: BTreeMap<&Tenant, u64> = BTreeMap::new();
    for (_, job) in &running {
        *of_tenants.entry(&job.spec.image.tenant).or_default() += u64::from(job.tasks.counts().placed);
    }
    running
        .sort_by_cached_key(|(id, job)| (of_tenants[&job.spec.image.tenant], job.tasks.counts().placed, job.submitted, **id));
    let mut look = Look { state, usage: state.usage(), in_vain: BTreeSet::new() };
    let (mut commands, mut left, mut wanting) = (Vec::new(), Vec::new(), BTreeSet::new());
    for (id, job) in running {
        if job.tasks.counts().waiting == 0 || job.may_place() == 0 || look.is_in_vain(job, None) {
            continue;
        }
        match look.place(*id, job) {
            Some(_) if commands.len() == PLACED_AT_ONCE => break,
            Some((command, taken)) => {
                taken.into_iter().for_each(|(node, more)| *look.usage.entry(node).or_default() += more);
                commands.push(command);
            }
            None if wanting.insert(wants(job)) => left.push(*id),
            None => {}
        }
    }
    (commands, left)
}

/// Of all jobs, once.
struct Look<'a> {
    state: &'a State,
    /// What is taken of each node, also by what is placed at this look.
    usage: BTreeMap<NodeId, Resources>,
    /// What finds no place, on any node but the one.
    in_vain: BTreeSet<(Wants<'a>, Option<NodeId>)>,
}

/// What decides whether one task finds a place.
type Wants<'a> = (&'a ImageKey, Resources, &'a BTreeMap<String, String>);

impl<'a> Look<'a> {
    fn is_in_vain(&self, job: &'a Job, not_on: Option<NodeId>) -> bool {
        self.in_vain.contains(&(wants(job), not_on))
    }

    /// Places what waits of a job, and says what that takes of each node. `None` if nothing can be placed.
    fn place(&mut self, id: JobId, job: &'a Job) -> Option<(Command, Vec<(NodeId, Resources)>)> {
        let mut groups: BTreeMap<Option<NodeId>, Vec<Range<u32>>> = BTreeMap::new();
        for (range, task) in job.tasks.iter() {
            if let Task::Waiting { not_on, .. } = task {
                groups.entry(not_on).or_default().push(range);
            }
        }
        // One group at a time: what the next has left depends on it.
        groups.into_iter().find_map(|(not_on, waiting)| {
            let count: u64 = waiting.iter().map(|range| u64::from(range.end - range.start)).sum();
            let count = count.min(u64::from(job.may_place()));
            let plan = match not_on {
                None => self.plan(job, count, None)?,
                // One that fails fast has room at once, and would take all tries. Others may have some later; but nobody may ever
                // have any: after a while one task at a time goes back.
                Some(failed) => match self.plan(job, count, not_on) {
                    Some(plan) => plan,
                    None if !self.has_others(failed) => self.plan(job, count, None)?,
                    None if self.is_kept_from(job, failed) => return None,
                    None => self.plan(job, 1, None)?,
                },
            };
            let on = ranges(&plan.on, waiting);
            let image_bytes = self.state.images.get(&job.spec.image).map_or(0, |image| image.facts.data_bytes);
            let image = Resources { memory_bytes: image_bytes, ..Resources::default() };
            let tasks = plan.on.iter().map(|(node, count)| (*node, job.spec.each.times(*count)));
            let taken = tasks.chain(plan.opens.iter().map(|(node, _)| (*node, image))).collect();
            Some((Command::Place { job: id, opens: plan.opens, on }, taken))
        })
    }

    fn has_others(&self, than: NodeId) -> bool {
        self.state.nodes.iter().any(|(id, node)| *id != than && node.is_open())
    }

    /// Whether tasks of a job that failed on a node do not go back there yet.
    fn is_kept_from(&self, job: &Job, failed: NodeId) -> bool {
        let runs_elsewhere = job.tasks.iter().any(|(_, task)| matches!(task, Task::Placed { node, .. } if node != failed));
        let after = if runs_elsewhere { BACK_AFTER } else { BACK_SOON_AFTER };
        job.failed.is_some_and(|at| self.state.time - at < after)
    }

    /// `None`: not one finds a place.
    fn plan(&mut self, job: &'a Job, count: u64, not_on: Option<NodeId>) -> Option<Plan> {
        if self.is_in_vain(job, None) || self.is_in_vain(job, not_on) {
            return None;
        }
        let plan = plan_beside(self.state, &self.usage, &wanted(job, count, not_on));
        if plan.on.is_empty() {
            self.in_vain.insert((wants(job), not_on));
            return None;
        }
        Some(plan)
    }
}

fn wants(job: &Job) -> Wants<'_> {
    (&job.spec.image, job.spec.each, &job.spec.labels)
}

/// What a job wants for `count` of its tasks.
#[must_use]
pub fn wanted(job: &Job, count: u64, not_on: Option<NodeId>) -> Wanted<'_> {
    let spec = &job.spec;
    Wanted { image: &spec.image, count, each: spec.each, spread: spec.spread, labels: &spec.labels, not_on }
}

/// Gives each node its number of the tasks that wait.
fn ranges(on: &[(NodeId, u64)], waiting: Vec<Range<u32>>) -> Vec<(NodeId, Range<u32>)> {
    let mut waiting = waiting.into_iter();
    let mut current = waiting.next();
    let mut placed = Vec::new();
    for (node, count) in on {
        let mut count = u32::try_from(*count).unwrap_or(u32::MAX);
        while let (Some(range), true) = (current.clone(), count > 0) {
            let some = count.min(range.end - range.start);
            placed.push((*node, range.start..range.start + some));
            count -= some;
            current = if range.start + some < range.end { Some(range.start + some..range.end) } else { waiting.next() };
        }
    }
    placed
}

/// From whom a node whose sources are gone is to read; `None` if nobody has all of it.
#[must_use]
pub fn rescue(state: &State, image: &Image, id: NodeId) -> Option<Vec<NodeId>> {
    let is_up = |source: &NodeId| *source != id && state.nodes.get(source).is_some_and(|node| node.life == Life::Up);
    let tree = Tree::of(state, image);
    let mut settled: Vec<NodeId> = image.settled().filter(is_up).collect();
    settled.sort_by_key(|source| (tree.readers.get(source).copied().unwrap_or(usize::MAX), *source));
    settled.truncate(SOURCES_MAX);
    (!settled.is_empty()).then_some(settled)
}

/// Where another copy of an image is best kept, and from whom it is read; `None` if nowhere.
#[must_use]
pub fn home(state: &State, key: &ImageKey) -> Option<(NodeId, Vec<NodeId>)> {
    let each = Resources { memory_bytes: 0, cpu_millis: 0, machines: 0 };
    let wanted = Wanted { image: key, count: 1, each, spread: Spread::Spread, labels: &BTreeMap::new(), not_on: None };
    let image = state.images.get(key)?;
    let (usage, near) = (state.usage(), Near::to(state, image));
    let suits = |id: &NodeId| {
        let (tier, _) = look_at(state, (image, &near), *id, &wanted, state.free(*id, &usage)).ok()?;
        (tier >= Tier::Near).then_some((tier, std::cmp::Reverse(state.free(*id, &usage).memory_bytes), *id))
    };
    let (_, _, id) = state.nodes.keys().filter_map(suits).min()?;
    let sources = Tree::of(state, image).sources_for(id);
    (!sources.is_empty()).then_some((id, sources))
}

/// Whether a holder still reads and has nobody to read from.
#[must_use]
pub fn is_cut_off(holder: &Holder) -> bool {
    holder.is_kept() && !holder.is_settled() && holder.sources.is_empty()
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Takes { count, because } => write!(f, "takes {count}: {because}"),
            Self::NotNeeded { room, tier } => write!(f, "has room for {room}, but others suit better: {tier}"),
            Self::Closed { life: Life::Up } => write!(f, "is cordoned or drained"),
            Self::Closed { life } => write!(f, "is {life:?}"),
            Self::ForeignCpu => write!(f, "has another CPU than the image was made on"),
            Self::Label(label) => write!(f, "does not have the label {label}"),
            Self::Full { free, needed } => write!(
                f,
                "is full: {} bytes, {} thousandths of a CPU and {} machines are left, and one takes {}, {} and {}",
                free.memory_bytes, free.cpu_millis, free.machines, needed.memory_bytes, needed.cpu_millis, needed.machines
            ),
            Self::LetsGo => write!(f, "is letting go of the image"),
            Self::NoSource => write!(f, "cannot get the image: nobody has all of it"),
            Self::FailedLast => write!(f, "is where the last try failed, and is tried again after a while"),
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Settled => "the image is all there",
            Self::MostOfIt => "the image is coming, and what a child touches first is there",
            Self::Open => "the image is coming",
            Self::Near => "the image is in its zone",
            Self::Far => "the image is elsewhere",
        })
    }
}
