//! The verbs of a node: check what was asked, let the engine do it, write it down. They block; [`calls`](super::calls) runs
//! them to their end wherever the client is by then.
//!
//! | file | verbs |
//! |---|---|
//! | this one | of machines and images that are there |
//! | [`fork`] | fork, here and on other nodes |
//! | [`remote`] | what other nodes ask for; certificates |
//! | [`template`] | templates, and the agents of Linux guests |

pub mod cluster;
pub mod fork;
pub mod remote;
pub mod template;

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use types::{Digest, FullName, ImageId, MachineId, Name, Reason, Tenant};

pub use cluster::{HeldImage, expected_dirty};
pub(crate) use fork::elsewhere_deadline;
pub use fork::{ForkFrom, ForkOrder, ForkReport};
pub use template::{Building, TemplateView};

use super::engine::{Ended, Engine, EngineError, ErrorKind, ImageFacts, PoolFacts, Residency, Usage};
use super::error::NodeError;
use super::metrics;
use super::network::Network;
use super::registry::{Counts, Image, Machine, MachineState, Origin, Registry};

/// The most children of one call, and the most ids in one.
pub const COUNT_MAX: u64 = 10_000;
/// What is kept of the console of a machine that has ended, in bytes: 10,000 of them are 40 MiB.
const ENDED_CONSOLE_BYTES: usize = 4096;
/// How soon the reaper notices that the node stops.
const REAPER_LOOKS_UP_EVERY: Duration = Duration::from_millis(100);

/// The verbs, over an engine, and over other nodes if there are any.
pub struct Service {
    engine: Arc<dyn Engine>,
    network: Option<Network>,
    registry: Registry,
    reaper: Mutex<Option<JoinHandle<()>>>,
    stopping: AtomicBool,
    /// Templates that are being built, and what they are at.
    builds: Mutex<BTreeMap<FullName, Building>>,
    /// Locked while a template is looked for, and loaded if it is not in memory.
    loading: Mutex<()>,
}

/// A machine with what it costs and prints.
#[derive(Clone, Debug)]
pub struct MachineView {
    /// The machine.
    pub machine: Machine,
    /// What it costs now, if it runs.
    pub usage: Option<Usage>,
    /// The last that it printed.
    pub console: Vec<u8>,
    /// Bytes printed before that.
    pub console_dropped_bytes: u64,
    /// What of its image is here, if it runs.
    pub residency: Option<Residency>,
}

/// An image with what of it is here.
#[derive(Clone, Debug)]
pub struct ImageView {
    /// The image.
    pub image: Image,
    /// What of it is here, if that can be had.
    pub residency: Option<Residency>,
}

/// How many images were opened from other nodes, by where they are in their life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostImages {
    /// Some of their memory is elsewhere.
    pub arriving: usize,
    /// All of it is here.
    pub settled: usize,
    /// Some of it cannot be had any more.
    pub failed: usize,
}

/// What was done of several things, and what was not, with the reason.
pub type Outcome<D, I> = (Vec<D>, Vec<(I, NodeError)>);

/// What [`Service::kill`] has done: machines that are gone, and ids that it could not end.
pub type Killed = Outcome<MachineId, String>;

/// Images in memory, and names in the store with the size of each file in bytes.
pub type Images = (Vec<ImageView>, Vec<(FullName, u64)>);

impl Service {
    /// Takes the engine over and starts to listen to it. Without a network everything that concerns other nodes is refused.
    #[must_use]
    pub fn start(engine: Arc<dyn Engine>, network: Option<Network>) -> Arc<Self> {
        let heard = engine.ended();
        let service = Arc::new(Self {
            engine,
            network,
            registry: Registry::default(),
            reaper: Mutex::new(None),
            stopping: AtomicBool::new(false),
            builds: Mutex::default(),
            loading: Mutex::default(),
        });
        let weak = Arc::downgrade(&service);
        let reaper = std::thread::Builder::new().name("reaper".to_owned()).spawn(move || reap_all(&weak, &heard));
        let reaper = reaper.expect("a process that starts can have a thread");
        *service.reaper.lock().unwrap_or_else(PoisonError::into_inner) = Some(reaper);
        service
    }

    /// Ends machines, named or all, of one tenant's or of everybody's.
    ///
    /// # Errors
    /// Of the first id if none could be ended.
    pub fn kill(&self, ids: &[String], all: bool, tenant: Option<&Tenant>) -> Result<Killed, NodeError> {
        let (mut claimed, mut failures) = (Vec::new(), Vec::new());
        match (ids, all) {
            ([], true) => claimed = self.registry.claim_all(tenant),
            ([], false) => return Err(NodeError::NothingNamed),
            (_, true) => return Err(NodeError::IdsAndAll),
            (ids, false) => {
                check_count(ids.len() as u64)?;
                for given in ids {
                    let named = self.registry.machine_id(given, tenant);
                    match named.and_then(|id| self.registry.claim(&id.to_string())) {
                        Ok(id) => claimed.push(id),
                        Err(error) => failures.push((given.clone(), error)),
                    }
                }
            }
        }
        let mut killed = Vec::with_capacity(claimed.len());
        for (id, outcome) in claimed.iter().zip(in_parallel(&claimed, |id| self.end_claimed(*id))) {
            match outcome {
                Ok(()) => killed.push(*id),
                Err(error) => failures.push((id.to_string(), error)),
            }
        }
        tracing::info!(killed = killed.len(), failures = failures.len(), "kill");
        first_if_none(killed, failures)
    }

    /// All machines, oldest first; those that ended too.
    #[must_use]
    pub fn machines(&self) -> Vec<Machine> {
        self.registry.machines()
    }

    /// Which machine is meant: of one tenant's, or of all.
    ///
    /// # Errors
    /// [`NodeError`] if there is none or several.
    pub fn machine_id(&self, given: &str, tenant: Option<&Tenant>) -> Result<MachineId, NodeError> {
        self.registry.machine_id(given, tenant)
    }

    /// Which image in memory is meant: of one tenant's, or of all.
    ///
    /// # Errors
    /// [`NodeError`] if there is none or several.
    pub fn image_id(&self, given: &str, tenant: Option<&Tenant>) -> Result<ImageId, NodeError> {
        self.registry.image_id(given, tenant)
    }

    /// One machine, with what it costs and prints.
    ///
    /// # Errors
    /// [`NodeError`] if there is none or several.
    pub fn machine(&self, given: &str) -> Result<MachineView, NodeError> {
        let machine = self.registry.machine(given)?;
        let id = machine.forked.id;
        if let MachineState::Ended { console, .. } = &machine.state {
            let console = console.to_vec();
            return Ok(MachineView { machine, usage: None, console, console_dropped_bytes: 0, residency: None });
        }
        // It may end between two of these calls: then what is known is shown.
        let usage = self.engine.usage(id);
        let usage = usage.inspect_err(|error| tracing::debug!(machine = %id, %error, "usage is not known")).ok();
        let (console, console_dropped_bytes) = self.engine.console(id).unwrap_or_default();
        let residency = self.residency(machine.image);
        let machine = self.registry.machine(&id.to_string())?;
        Ok(MachineView { machine, usage, console, console_dropped_bytes, residency })
    }

    /// Has the probe of a running machine carry out commands.
    ///
    /// # Errors
    /// [`NodeError`] if there is no such machine, or a command has no reply.
    #[cfg(feature = "bench")]
    pub fn probe(&self, given: &str, commands: &[vm::probe::Command]) -> Result<Vec<crate::node::engine::Probed>, NodeError> {
        Ok(self.engine.probe(self.registry.running_machine(given)?, commands)?)
    }

    /// Images in memory and in the store.
    ///
    /// # Errors
    /// [`NodeError::Engine`] if the store cannot be read.
    pub fn images(&self) -> Result<Images, NodeError> {
        let images = self.registry.images().into_iter().map(|image| self.view(image)).collect();
        Ok((images, self.engine.stored()?))
    }

    /// What images in memory are called everywhere, as far as they have been hashed.
    #[must_use]
    pub fn digests(&self) -> HashMap<ImageId, Digest> {
        let images = self.registry.images().into_iter();
        images.filter_map(|image| Some((image.facts.id, image.facts.digest?))).collect()
    }

    /// One image in memory, by its id, the end of it, or its digest.
    ///
    /// # Errors
    /// [`NodeError`] if there is none or several.
    pub fn image(&self, given: &str) -> Result<ImageView, NodeError> {
        Ok(self.view(self.registry.image(given)?))
    }

    /// As [`Service::image`], of which the digest is known from now on.
    ///
    /// # Errors
    /// [`NodeError`] if there is none or several, or it cannot be hashed.
    pub fn hashed(&self, given: &str) -> Result<ImageView, NodeError> {
        let id = self.registry.image(given)?.facts.id;
        self.digest_of(id)?;
        self.image(&id.to_string())
    }

    /// What of an image is here, also of one that was forgotten and still has children. `None` if that cannot be had.
    #[must_use]
    pub fn residency(&self, image: ImageId) -> Option<Residency> {
        let residency = self.engine.residency(image);
        residency.inspect_err(|error| tracing::debug!(%image, %error, "residency is not known")).ok()
    }

    /// Saves an image in memory under a name of its tenant's.
    ///
    /// # Errors
    /// [`NodeError`]; the store is as it was.
    pub fn save(&self, given: &str, name: &Name) -> Result<ImageView, NodeError> {
        let facts = self.registry.image(given)?.facts;
        let (id, name) = (facts.id, FullName { tenant: facts.tenant, name: name.clone() });
        let facts = self.engine.save(id, &name, &mut log_progress("save", &name))?;
        self.registry.saved_image(facts, name);
        self.image(&id.to_string())
    }

    /// Loads a saved image.
    ///
    /// # Errors
    /// [`NodeError`]; nothing is loaded.
    pub fn load(&self, name: &FullName) -> Result<ImageView, NodeError> {
        let facts = self.engine.load(name, &mut log_progress("load", name))?;
        Ok(self.view(self.note_image(facts, Origin::Store, Some(name.clone()))))
    }

    /// Forgets an image in memory.
    ///
    /// # Errors
    /// [`NodeError`] if there is none or several.
    pub fn forget(&self, given: &str) -> Result<ImageId, NodeError> {
        let id = self.registry.image(given)?.facts.id;
        self.forget_image(id)?;
        Ok(id)
    }

    /// Deletes a saved image.
    ///
    /// # Errors
    /// [`NodeError::Engine`].
    pub fn delete(&self, name: &FullName) -> Result<(), NodeError> {
        self.engine.delete(name)?;
        self.registry.remove_name(name);
        Ok(())
    }

    /// The shells that wait.
    #[must_use]
    pub fn pool(&self) -> Vec<PoolFacts> {
        self.engine.pool()
    }

    /// How many machines and images there are.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.registry.counts()
    }

    /// How many images were opened from other nodes.
    #[must_use]
    pub fn host_images(&self) -> HostImages {
        let mut counts = HostImages::default();
        let opened = self.registry.images().into_iter().filter(|image| image.origin == Origin::Remote);
        for residency in opened.filter_map(|image| self.residency(image.facts.id)) {
            match (residency.failed.is_some(), residency.is_settled) {
                (true, _) => counts.failed += 1,
                (false, true) => counts.settled += 1,
                (false, false) => counts.arriving += 1,
            }
        }
        counts
    }

    /// Ends every machine. To be called once, when no other verb runs any more.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        let reaper = self.reaper.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(reaper) = reaper
            && reaper.join().is_err()
        {
            tracing::error!("the reaper panicked");
        }
        self.engine.stop();
    }

    /// An image as it is now.
    #[must_use]
    pub fn view(&self, mut image: Image) -> ImageView {
        // It grows while it arrives, and is hashed in the background; of one that was just forgotten, what was known is shown.
        image.facts = self.engine.image(image.facts.id).unwrap_or(image.facts);
        ImageView { residency: self.residency(image.facts.id), image }
    }

    /// The image that a tenant means: of two with the same digest its own.
    fn image_of(&self, given: &str, tenant: Option<&Tenant>) -> Result<Image, NodeError> {
        let own = tenant.and_then(|tenant| self.registry.image_id(given, Some(tenant)).ok());
        own.map_or_else(|| self.registry.image(given), |id| self.registry.image(&id.to_string()))
    }

    /// Hashes an image if need be.
    fn digest_of(&self, image: ImageId) -> Result<Digest, NodeError> {
        let digest = self.engine.digest(image)?;
        self.registry.hashed_image(image, digest);
        Ok(digest)
    }

    fn note_image(&self, facts: ImageFacts, origin: Origin, name: Option<FullName>) -> Image {
        let image = Image { facts, origin, name, created: pages::clock::wall(), built: Arc::from([]) };
        tracing::info!(image = %image.facts.id, origin = ?image.origin, "image");
        self.registry.add_image(image)
    }

    fn forget_image(&self, id: ImageId) -> Result<(), NodeError> {
        self.engine.forget(id)?;
        self.registry.remove_image(id);
        Ok(())
    }

    /// Ends a machine that this caller has claimed, because somebody asked.
    fn end_claimed(&self, id: MachineId) -> Result<(), NodeError> {
        // Also if the engine panics: a machine that is being ended by nobody could never be ended.
        let _claim = OnDrop(|| self.registry.give_back(id));
        let reason = match self.engine.kill(id) {
            Ok(()) | Err(EngineError { kind: ErrorKind::UnknownMachine, .. }) => Reason::Killed,
            Err(EngineError { kind: ErrorKind::Ended(reason), .. }) => reason,
            Err(error) => return Err(error.into()),
        };
        tracing::debug!(machine = %id, %reason, "killed");
        metrics::killed();
        metrics::ended(reason);
        self.registry.ended(id, Ended { reason, detail: "asked for".to_owned() }, Arc::from([]));
        Ok(())
    }

    /// Clears up after a machine that ended by itself, which this caller has claimed.
    fn reap_claimed(&self, id: MachineId, ended: Ended) {
        tracing::info!(machine = %id, reason = %ended.reason, detail = ended.detail, "ended");
        metrics::ended(ended.reason);
        let (console, _) = self.engine.console(id).unwrap_or_default();
        let tail = &console[console.len().saturating_sub(ENDED_CONSOLE_BYTES)..];
        // Written down first: whoever finds that the engine does not know it any more looks here for the reason.
        self.registry.ended(id, ended, Arc::from(tail));
        if let Err(error) = self.engine.kill(id) {
            tracing::debug!(machine = %id, %error, "nothing to clear up");
        }
    }
}

/// What was done and what was not; if nothing was, the first reason why not.
fn first_if_none<D, I>(done: Vec<D>, failures: Vec<(I, NodeError)>) -> Result<Outcome<D, I>, NodeError> {
    match failures.first() {
        Some((_, first)) if done.is_empty() => Err(first.clone()),
        _ => {
            failures.iter().for_each(|(_, error)| metrics::failed(error.code()));
            Ok((done, failures))
        }
    }
}

/// Does something when it goes out of scope, on the way of a panic too.
struct OnDrop<F: Fn()>(F);

impl<F: Fn()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

pub(crate) fn check_count(asked: u64) -> Result<(), NodeError> {
    if (1..=COUNT_MAX).contains(&asked) { Ok(()) } else { Err(NodeError::Count { asked, max: COUNT_MAX }) }
}

/// Hears which machines ended by themselves until the node stops.
fn reap_all(service: &Weak<Service>, heard: &Receiver<(MachineId, Ended)>) {
    loop {
        let message = heard.recv_timeout(REAPER_LOOKS_UP_EVERY);
        let Some(service) = service.upgrade() else { return };
        if service.stopping.load(Ordering::Acquire) {
            return;
        }
        match message {
            Ok((id, ended)) => {
                if service.registry.says_ended(id, &ended) {
                    service.reap_claimed(id, ended);
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// `work` on each item, on as many threads as there are processors; the results are in the order of the items.
fn in_parallel<I: Sync, T: Send>(items: &[I], work: impl Fn(&I) -> T + Sync) -> Vec<T> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(items.len()).max(1);
    let share = items.len().div_ceil(threads).max(1);
    let work = &work;
    std::thread::scope(|scope| {
        let shares: Vec<_> =
            items.chunks(share).map(|share| scope.spawn(move || share.iter().map(work).collect::<Vec<T>>())).collect();
        shares.into_iter().flat_map(|share| share.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}

/// Says at each tenth of the way how far it is.
fn log_progress(verb: &'static str, name: &FullName) -> impl FnMut(u64, u64) + use<> {
    let name = name.clone();
    let mut said_tenths = 0;
    move |done_bytes, all_bytes| {
        let tenths = done_bytes.saturating_mul(10).checked_div(all_bytes).unwrap_or(10);
        if tenths > said_tenths {
            said_tenths = tenths;
            tracing::debug!(verb, %name, done_bytes, all_bytes, "progress");
        }
    }
}
