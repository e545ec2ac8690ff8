//! Which machines and images this node has, and which machines it had.
//!
//! ```text
//!  starting ──▶ running ──▶ ending ──▶ ended(reason)      the newest 10,000 ended ones are remembered
//!     └──────────────────▶ forgotten (the fork failed)
//! ```
//!
//! *Starting* holds back what the engine says about a machine before the fork that made it has returned. *Ending* belongs to
//! whoever kills: a machine is killed, or reaped, once.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use types::{Digest, FullName, ImageId, MachineId, Reason, Tenant};
use uuid::Uuid;

use super::engine::{Ended, Forked, Guest, ImageFacts};
use super::error::NodeError;
use super::guest::identity::Readiness;
use super::guest::template::StageTime;
use super::short_id::ShortId;

/// The most ended machines that are remembered.
pub const ENDED_MAX: usize = 10_000;

/// All of it, behind one lock that is never held across a call of the engine.
#[derive(Debug, Default)]
pub struct Registry {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    // By id, which is by age: ids begin with the time.
    machines: BTreeMap<MachineId, Machine>,
    images: BTreeMap<ImageId, Image>,
    starting: HashMap<MachineId, Option<Ended>>,
    ended: VecDeque<MachineId>,
    running: usize,
    /// What those are counted as together, in bytes.
    claimed_bytes: u64,
    /// How many of those that run are tasks of jobs.
    tasks: usize,
}

/// A machine that runs or ran here.
#[derive(Clone, Debug)]
pub struct Machine {
    /// What the engine said when it was forked.
    pub forked: Forked,
    /// What it was forked from.
    pub image: ImageId,
    /// Whose it is: its image's.
    pub tenant: Tenant,
    /// The machine that the image was frozen from, if it was one of this node's.
    pub parent: Option<MachineId>,
    /// When it was forked.
    pub created: SystemTime,
    /// The most memory of its own in bytes.
    pub limit_bytes: Option<u64>,
    /// How much of its own it is counted as, in bytes.
    pub claim_bytes: u64,
    /// Whether it runs a task of a job: the cluster counts those itself.
    pub is_task: bool,
    /// Which, once that is known.
    pub task: Option<(Uuid, u32)>,
    /// Pages that it has proved to be its image's.
    pub verified_pages: Option<u64>,
    /// What it reported when it was told who it is: a Linux guest.
    pub readiness: Option<Arc<Readiness>>,
    /// Where it is in its life.
    pub state: MachineState,
}

/// Where a machine is in its life.
#[derive(Clone, Debug)]
pub enum MachineState {
    /// It has run, and as far as is known it still does.
    Running,
    /// Somebody ends it at this moment.
    Ending,
    /// It is gone.
    Ended {
        /// Why, from the closed list, with the numbers.
        ended: Ended,
        /// When.
        at: SystemTime,
        /// The last that it printed.
        console: Arc<[u8]>,
    },
}

/// An image in this node's memory.
#[derive(Clone, Debug)]
pub struct Image {
    /// What the engine says about it.
    pub facts: ImageFacts,
    /// Where it comes from.
    pub origin: Origin,
    /// Its name in the store, if it was saved or loaded.
    pub name: Option<FullName>,
    /// When it was made or loaded.
    pub created: SystemTime,
    /// How long the stages of building it took, if it was built here as a template.
    pub built: Arc<[StageTime]>,
}

/// Where an image comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A guest of ours was started and frozen.
    Guest(Guest),
    /// A machine was branched.
    Machine(MachineId),
    /// It was built as a template.
    Template,
    /// It was loaded from the store.
    Store,
    /// Other nodes hold it, or did when it was opened.
    Remote,
}

/// How many there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Machines that run.
    pub running: usize,
    /// Machines that ended and are remembered.
    pub ended: usize,
    /// Images in memory.
    pub images: usize,
}

impl Registry {
    /// These machines are about to be forked.
    pub fn starting(&self, ids: &[MachineId]) {
        self.lock().starting.extend(ids.iter().map(|id| (*id, None)));
    }

    /// The fork of these has returned: those that did not start by now are forgotten.
    pub fn not_starting(&self, ids: &[MachineId]) {
        let mut inner = self.lock();
        ids.iter().for_each(|id| drop(inner.starting.remove(id)));
    }

    /// A machine runs. Returns what the engine has said about its end meanwhile.
    #[must_use]
    pub fn started(&self, machine: Machine) -> Option<Ended> {
        let mut inner = self.lock();
        let id = machine.forked.id;
        if machine.is_task {
            inner.tasks += 1;
        } else {
            inner.claimed_bytes += machine.claim_bytes;
        }
        inner.machines.insert(id, machine);
        inner.running += 1;
        inner.starting.remove(&id).flatten()
    }

    /// The engine says that `id` ended by itself. Whether the caller is to reap it now: not if it is just starting (then
    /// [`Registry::started`] says so) or being killed.
    #[must_use]
    pub fn says_ended(&self, id: MachineId, ended: &Ended) -> bool {
        let mut inner = self.lock();
        if let Some(early) = inner.starting.get_mut(&id) {
            *early = Some(ended.clone());
            return false;
        }
        inner.claim(id).is_some()
    }

    /// Gives the caller the right and duty to end this machine.
    ///
    /// # Errors
    /// [`NodeError`] if there is no such machine, several, or it has ended or is being ended.
    pub fn claim(&self, given: &str) -> Result<MachineId, NodeError> {
        let mut inner = self.lock();
        let id = inner.machine_id(given)?;
        inner.claim(id).ok_or_else(|| inner.has_ended(id))
    }

    /// As [`Registry::claim`], of all machines that run: of one tenant, or of all.
    #[must_use]
    pub fn claim_all(&self, tenant: Option<&Tenant>) -> Vec<MachineId> {
        let mut inner = self.lock();
        let of = inner.machines.values().filter(|machine| tenant.is_none_or(|tenant| machine.tenant == *tenant));
        let ids: Vec<MachineId> = of.map(|machine| machine.forked.id).collect();
        ids.into_iter().filter_map(|id| inner.claim(id)).collect()
    }

    /// A claimed machine was not ended after all. Of one that was it does nothing.
    pub fn give_back(&self, id: MachineId) {
        if let Some(machine) = self.lock().machines.get_mut(&id)
            && matches!(machine.state, MachineState::Ending)
        {
            machine.state = MachineState::Running;
        }
    }

    /// A claimed machine has ended.
    pub fn ended(&self, id: MachineId, ended: Ended, console: Arc<[u8]>) {
        let mut inner = self.lock();
        let Some(machine) = inner.machines.get_mut(&id) else { return };
        debug_assert!(matches!(machine.state, MachineState::Ending), "{id} was not claimed");
        machine.state = MachineState::Ended { ended, at: pages::clock::wall(), console };
        let (claim_bytes, is_task) = (machine.claim_bytes, machine.is_task);
        inner.running -= 1;
        if is_task {
            inner.tasks -= 1;
        } else {
            inner.claimed_bytes -= claim_bytes;
        }
        inner.ended.push_back(id);
        if inner.ended.len() > ENDED_MAX
            && let Some(oldest) = inner.ended.pop_front()
        {
            inner.machines.remove(&oldest);
        }
    }

    /// A machine knows who it is.
    pub fn ready(&self, id: MachineId, readiness: Readiness) {
        if let Some(machine) = self.lock().machines.get_mut(&id) {
            machine.readiness = Some(Arc::new(readiness));
        }
    }

    /// A machine runs this task of a job.
    pub fn runs_task(&self, id: MachineId, job: Uuid, task: u32) {
        if let Some(machine) = self.lock().machines.get_mut(&id) {
            machine.task = Some((job, task));
        }
    }

    /// Notes what a machine has proved.
    pub fn verified(&self, id: MachineId, pages: u64) {
        if let Some(machine) = self.lock().machines.get_mut(&id) {
            machine.verified_pages = Some(pages);
        }
    }

    /// Which machine is meant: of one tenant's, or of all.
    ///
    /// # Errors
    /// [`NodeError`] if there is none or several.
    pub fn machine_id(&self, given: &str, tenant: Option<&Tenant>) -> Result<MachineId, NodeError> {
        self.lock().machine_of(given, tenant)
    }

    /// One machine by its id or the end of it.
    ///
    /// # Errors
    /// [`NodeError`] if there is none or several.
    pub fn machine(&self, given: &str) -> Result<Machine, NodeError> {
        let inner = self.lock();
        let id = inner.machine_id(given)?;
        Ok(inner.machines[&id].clone())
    }

    /// As [`Registry::machine`], if it runs.
    ///
    /// # Errors
    /// [`NodeError`] if there is none or several, or it has ended.
    pub fn running_machine(&self, given: &str) -> Result<MachineId, NodeError> {
        let inner = self.lock();
        let id = inner.machine_id(given)?;
        match inner.machines[&id].state {
            MachineState::Running => Ok(id),
            MachineState::Ending | MachineState::Ended { .. } => Err(inner.has_ended(id)),
        }
    }

    /// All machines, oldest first.
    #[must_use]
    pub fn machines(&self) -> Vec<Machine> {
        self.lock().machines.values().cloned().collect()
    }

    /// An image is there. Returns what is known of it: of one that was there before, that.
    pub fn add_image(&self, image: Image) -> Image {
        self.lock().images.entry(image.facts.id).or_insert(image).clone()
    }

    /// An image has been hashed.
    pub fn hashed_image(&self, id: ImageId, digest: Digest) {
        if let Some(image) = self.lock().images.get_mut(&id) {
            image.facts.digest = Some(digest);
        }
    }

    /// An image has been saved.
    pub fn saved_image(&self, facts: ImageFacts, name: FullName) {
        if let Some(image) = self.lock().images.get_mut(&facts.id) {
            image.facts = facts;
            image.name = Some(name);
        }
    }

    /// An image is gone.
    pub fn remove_image(&self, id: ImageId) {
        self.lock().images.remove(&id);
    }

    /// A name is gone from the store.
    pub fn remove_name(&self, name: &FullName) {
        for image in self.lock().images.values_mut().filter(|image| image.name.as_ref() == Some(name)) {
            image.name = None;
        }
    }

    /// One image by its id, the end of it, or its digest. If several have the digest it is the oldest.
    ///
    /// # Errors
    /// [`NodeError`] if there is none or several.
    pub fn image(&self, given: &str) -> Result<Image, NodeError> {
        let inner = self.lock();
        if let Ok(digest) = given.parse::<Digest>() {
            let image = inner.images.values().find(|image| image.facts.digest == Some(digest));
            return image.cloned().ok_or_else(|| NodeError::UnknownImage { id: given.to_owned() });
        }
        let id = resolve(given, &inner.images, |_| true, ImageId::as_uuid, ImageId::from_uuid)?;
        let image = id.and_then(|id| inner.images.get(&id));
        image.cloned().ok_or_else(|| NodeError::UnknownImage { id: given.to_owned() })
    }

    /// Which image is meant: of one tenant's, or of all.
    ///
    /// # Errors
    /// [`NodeError`] if there is none or several.
    pub fn image_id(&self, given: &str, tenant: Option<&Tenant>) -> Result<ImageId, NodeError> {
        let inner = self.lock();
        let is_of = |image: &Image| tenant.is_none_or(|tenant| image.facts.tenant == *tenant);
        let id = match given.parse::<Digest>() {
            Ok(digest) => {
                let mut images = inner.images.values().filter(|image| is_of(image));
                images.find(|image| image.facts.digest == Some(digest)).map(|image| image.facts.id)
            }
            Err(_) => resolve(given, &inner.images, is_of, ImageId::as_uuid, ImageId::from_uuid)?,
        };
        id.ok_or_else(|| NodeError::UnknownImage { id: given.to_owned() })
    }

    /// All images, oldest first.
    #[must_use]
    pub fn images(&self) -> Vec<Image> {
        self.lock().images.values().cloned().collect()
    }

    /// How many machines run that are no tasks of jobs, and what they are counted as together, in bytes.
    #[must_use]
    pub fn taken(&self) -> (u64, u64) {
        let inner = self.lock();
        ((inner.running - inner.tasks) as u64, inner.claimed_bytes)
    }

    /// How many machines run of each image that any run of.
    #[must_use]
    pub fn running_by_image(&self) -> HashMap<ImageId, u64> {
        let mut counts = HashMap::new();
        for machine in self.lock().machines.values().filter(|machine| matches!(machine.state, MachineState::Running)) {
            *counts.entry(machine.image).or_default() += 1;
        }
        counts
    }

    /// How many there are.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let inner = self.lock();
        Counts { running: inner.running, ended: inner.ended.len(), images: inner.images.len() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing here panics halfway through a change, so what a panicking thread leaves behind is whole.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn machine_id(&self, given: &str) -> Result<MachineId, NodeError> {
        self.machine_of(given, None)
    }

    fn machine_of(&self, given: &str, tenant: Option<&Tenant>) -> Result<MachineId, NodeError> {
        let is_of = |machine: &Machine| tenant.is_none_or(|tenant| machine.tenant == *tenant);
        let id = resolve(given, &self.machines, is_of, MachineId::as_uuid, MachineId::from_uuid)?;
        id.ok_or_else(|| NodeError::UnknownMachine { id: given.to_owned() })
    }

    fn claim(&mut self, id: MachineId) -> Option<MachineId> {
        let machine = self.machines.get_mut(&id)?;
        let runs = matches!(machine.state, MachineState::Running);
        if runs {
            machine.state = MachineState::Ending;
        }
        runs.then_some(id)
    }

    fn has_ended(&self, id: MachineId) -> NodeError {
        let (reason, detail) = match self.machines.get(&id).map(|machine| &machine.state) {
            Some(MachineState::Ended { ended, .. }) => (ended.reason, ended.detail.clone()),
            _ => (Reason::Killed, "at this moment".to_owned()),
        };
        NodeError::Ended { id: id.to_string(), reason, detail }
    }
}

/// Which key of `map` is meant, if there is one among those that are the caller's. An id that is given in full is looked up, an end is searched for.
fn resolve<K: Copy + Ord, V>(
    given: &str,
    map: &BTreeMap<K, V>,
    is_callers: impl Fn(&V) -> bool,
    uuid: fn(&K) -> &Uuid,
    key: fn(Uuid) -> K,
) -> Result<Option<K>, NodeError> {
    /// More would not help anybody to choose.
    const LISTED_MAX: usize = 8;
    let short = ShortId::parse(given)?;
    if let Some(full) = short.full() {
        return Ok(Some(key(full)).filter(|key| map.get(key).is_some_and(&is_callers)));
    }
    let callers = map.iter().filter(|(key, value)| short.matches(uuid(key)) && is_callers(value));
    let candidates: Vec<K> = callers.map(|(key, _)| *key).take(LISTED_MAX).collect();
    match candidates.as_slice() {
        [] => Ok(None),
        [key] => Ok(Some(*key)),
        several => Err(NodeError::Ambiguous {
            given: given.to_owned(),
            candidates: several.iter().map(|key| uuid(key).to_string()).collect(),
        }),
    }
}

#[cfg(test)]
mod tests;
