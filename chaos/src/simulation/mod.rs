//! A whole cluster in virtual time: the control plane's own code (`apply`, `tend`, `reconcile`), a model of what consensus promises,
//! nodes with an engine that only pretends, clients, and faults. A seed decides everything: the same seed is the same run to the
//! last entry.
//!
//! ```text
//! clients ──request──▶ Consensus ──entries──▶ State of each node, as far as it has applied
//!                        ▲    ▲                   │ reconcile
//!        leader's tend ──┘    └───── reports ◀── Agent: images that arrive, tasks that run
//! ```
//!
//! First a time of faults, then a quiet one in which all that was begun must come to its end. What must hold is looked at after
//! each entry ([`Oracle`](oracle::Oracle)) and at the end. That consensus itself keeps its promises is not shown here but by the
//! tests of the real one.

mod agent;
mod clients;
mod consensus;
mod faults;
mod oracle;

use std::collections::BTreeMap;
use std::fmt;

use control::apply::Flaws;
use control::state::{ImageFacts, ImageKey, NodeFacts, Resources};
use control::{State, Tick};
use types::{CpuProfile, Digest, Name, NodeId, Tenant};
use uuid::Uuid;

use agent::Agent;
use clients::Clients;
use consensus::Consensus;
use faults::Faults;
use oracle::Oracle;

/// How much time passes at a time, in milliseconds.
const STEP_MS: u64 = 50;
/// How long there are faults.
const FAULTS_MS: u64 = 60_000;
/// How long all may take to come to its end: more than a lease, an image that nothing needs, and several elections.
const QUIET_MS: u64 = 600_000;
/// How far a wall clock is ahead of the others.
const WALL_CLOCK_OFF_MS: u64 = 2 * 60 * 60 * 1000;
const MIB: u64 = 1 << 20;

/// A rule that is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// A result counts whoever reports it.
    FenceIgnored,
    /// A request that comes again is carried out again.
    KeyForgotten,
    /// An image may be let go of while others read it.
    HoldDroppedEarly,
    /// Tasks are placed on nodes that are full.
    CapacityUncounted,
    /// A leader answers before a majority has what it answers for.
    AnsweredBeforeCommit,
    /// A read is answered from what a node happens to have applied.
    StaleRead,
    /// A node gets the right to start machines for what is taken already.
    LeaseUnchecked,
    /// Time is what the wall clock of whoever leads says, and one node's is hours off.
    WallClock,
}

impl Flaw {
    /// Each of them.
    pub const ALL: [Self; 8] = [
        Self::FenceIgnored,
        Self::KeyForgotten,
        Self::HoldDroppedEarly,
        Self::CapacityUncounted,
        Self::AnsweredBeforeCommit,
        Self::StaleRead,
        Self::LeaseUnchecked,
        Self::WallClock,
    ];

    fn of_apply(flaw: Option<Self>) -> Flaws {
        Flaws {
            ignores_fences: flaw == Some(Self::FenceIgnored),
            forgets_keys: flaw == Some(Self::KeyForgotten),
            drops_holds: flaw == Some(Self::HoldDroppedEarly),
            counts_no_capacity: flaw == Some(Self::CapacityUncounted),
            leases_what_is_taken: flaw == Some(Self::LeaseUnchecked),
        }
    }
}

/// What a run came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ran {
    /// Of the last state.
    pub hash: Digest,
    /// Entries of the log.
    pub entries: usize,
    /// Faults, by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// Tasks that came to an end.
    pub tasks: u64,
    /// Requests of clients that were answered.
    pub answered: u64,
    /// How long after the last fault all was at its end, in virtual milliseconds.
    pub quiet_ms: u64,
}

/// Something that must not be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// What.
    pub what: String,
    /// The last entries before it, as text.
    pub log: Vec<String>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.what)?;
        self.log.iter().try_for_each(|line| writeln!(f, "  {line}"))
    }
}

/// The hosts, and which of them reach which.
struct World {
    now: Tick,
    dice: fastrand::Rng,
    agents: Vec<Agent>,
    /// From, to: what does not get through.
    cut: Vec<Vec<bool>>,
    flaw: Option<Flaw>,
}

impl World {
    fn reaches(&self, from: usize, to: usize) -> bool {
        from == to || !self.cut[from][to]
    }

    fn reach_each_other(&self, one: usize, other: usize) -> bool {
        self.reaches(one, other) && self.reaches(other, one)
    }

    fn runs(&self, node: usize) -> bool {
        self.agents[node].runs(self.now)
    }

    /// What a node takes the time for, when it leads: the cluster's, counted on.
    fn time_of(&self, node: usize) -> Tick {
        let is_off = node == 0 && self.flaw == Some(Flaw::WallClock);
        Tick(self.now.0 + if is_off { WALL_CLOCK_OFF_MS } else { 0 })
    }

    fn index_of(&self, id: NodeId) -> Option<usize> {
        self.agents.iter().position(|agent| agent.id == id)
    }
}

/// Runs one seed.
///
/// # Errors
/// [`Violation`]: the first thing that must not be.
pub fn run(seed: u64, flaw: Option<Flaw>) -> Result<Ran, Violation> {
    let mut dice = fastrand::Rng::with_seed(seed);
    let nodes = dice.usize(3..=5);
    let agents = (0..nodes).map(|index| Agent::new(index, node_facts(index, &mut dice))).collect();
    let mut world = World { now: Tick(0), dice, agents, cut: vec![vec![false; nodes]; nodes], flaw };
    let mut consensus = Consensus::new(nodes, Flaw::of_apply(flaw), flaw == Some(Flaw::AnsweredBeforeCommit));
    let mut clients = Clients::default();
    let mut faults = Faults::default();
    let mut oracle = Oracle::default();
    let fail = |what: String, consensus: &Consensus| Violation { what, log: consensus.last_entries(40) };
    let mut step = |world: &mut World, consensus: &mut Consensus, clients: &mut Clients, has_faults: bool| {
        world.now = Tick(world.now.0 + STEP_MS);
        consensus.step(world);
        for node in 0..nodes {
            agent::step(world, node, consensus).map_err(|what| fail(what, consensus))?;
        }
        clients.step(world, consensus, has_faults).map_err(|what| fail(what, consensus))?;
        oracle.look(consensus).map_err(|what| fail(what, consensus))
    };
    while world.now.0 < FAULTS_MS {
        step(&mut world, &mut consensus, &mut clients, true)?;
        faults.step(&mut world, &mut clients);
    }
    faults.end(&mut world, &mut clients);
    while !is_at_its_end(&world, &consensus, &clients) {
        if world.now.0 > FAULTS_MS + QUIET_MS {
            let what =
                format!("not at its end after {QUIET_MS} ms without faults: {}", what_is_left(&world, &consensus, &clients));
            return Err(fail(what, &consensus));
        }
        step(&mut world, &mut consensus, &mut clients, false)?;
    }
    clients.check(&consensus).map_err(|what| fail(what, &consensus))?;
    consensus.check_replay().map_err(|what| fail(what, &consensus))?;
    Ok(Ran {
        hash: consensus.state().hash(),
        entries: consensus.len(),
        faults: faults.counts,
        tasks: oracle.ended_tasks(),
        answered: clients.answered(),
        quiet_ms: world.now.0 - FAULTS_MS,
    })
}

fn is_at_its_end(world: &World, consensus: &Consensus, clients: &Clients) -> bool {
    what_is_left(world, consensus, clients).is_empty()
}

/// What has not come to its end, in words.
fn what_is_left(world: &World, consensus: &Consensus, clients: &Clients) -> String {
    let state: &State = consensus.state();
    let mut left = Vec::new();
    left.extend(state.jobs.iter().filter(|(_, job)| job.ended.is_none()).map(|(id, _)| format!("job {id}")));
    let needed = state.needed();
    for (key, image) in &state.images {
        if !needed.contains(key) {
            left.push(format!("image {key}, which nothing needs"));
        }
        // A branch of a tree that has lost its root waits for who has the image.
        let arriving = image.holders.values().filter(|holder| !holder.is_settled() || !holder.is_kept()).count();
        if arriving > 0 {
            left.push(format!("image {key} on {arriving} nodes"));
        }
    }
    let is_out = |agent: &&Agent| state.revoked.contains(&agent.id) || state.removed.contains_key(&agent.id);
    for agent in world.agents.iter().filter(|agent| !is_out(agent)) {
        left.extend(agent.differs_from(state));
        if !agent.is_idle() {
            left.push(format!("what node {} runs", agent.id));
        }
        if !state.nodes.get(&agent.id).is_some_and(|node| node.life == control::state::Life::Up) {
            left.push(format!("node {}", agent.id));
        }
    }
    if clients.waiting() > 0 {
        left.push(format!("{} requests", clients.waiting()));
    }
    left.join(", ")
}

fn node_id(index: usize) -> NodeId {
    NodeId::from_uuid(Uuid::from_u128(index as u128 + 1))
}

fn profile() -> CpuProfile {
    CpuProfile { vendor: "GenuineIntel".into(), family: 6, model: 1, cpuid: Digest::of(b"cpuid"), tsc_khz: 2_000_000 }
}

fn node_facts(index: usize, dice: &mut fastrand::Rng) -> NodeFacts {
    let machines = dice.u64(4..12);
    NodeFacts {
        name: Name::parse(&format!("node-{index}")).expect("a name"),
        address: ([127, 0, 0, 1], 7000 + u16::try_from(index).expect("a handful")).into(),
        profile: profile(),
        labels: BTreeMap::from([("zone".to_owned(), ["a", "b"][index % 2].to_owned())]),
        capacity: Resources {
            memory_bytes: dice.u64(2..=4) * 100 * MIB + machines * 10 * MIB,
            cpu_millis: machines * 100,
            machines,
        },
    }
}

fn image(number: u8) -> (ImageKey, ImageFacts) {
    let key = ImageKey { tenant: Tenant::default_tenant(), digest: Digest::of(&[number]) };
    (key, ImageFacts { profile: profile(), data_bytes: 100 * MIB, working_set_bytes: 10 * MIB, dirty_bytes: 10 * MIB })
}
