//! Has this node become what the state says: it looks at what is here, asks [`control::reconcile`] what is to be done, and does
//! that. It makes no choices of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use control::State;
use control::command::{Answer, Command};
use control::reconcile::{Action, Observed, Seen, reconcile};
use control::state::{ImageFacts, ImageKey, Life, Resources};
use types::{CpuProfile, Epoch, FullName, NodeId};

use super::files::Place;
use super::{ClusterError, EACH_CPU_MILLIS, Membership, join};
use crate::api::App;
use crate::jobs::tasks::Tasks;
use crate::node::quic::CERTIFICATE;
use crate::node::service::{HeldImage, expected_dirty};
use crate::node::{DataDirectory, metrics};
use crate::raft::{DiskError, Standing};

/// How often a node looks, if nothing happens.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Between two looks, however much happens.
const LOOK_AT_MOST_EVERY: Duration = Duration::from_millis(50);
/// Between two reports: each is an entry of the log.
const REPORT_AT_MOST_EVERY: Duration = Duration::from_millis(250);
const PROPOSE_WITHIN: Duration = Duration::from_secs(3);
const ALIVE_WITHIN: Duration = Duration::from_secs(1);
/// What is left of a certificate when the next one is asked for.
const RENEW_BEFORE: Duration = Duration::from_hours(30 * 24);
const RENEW_TRY_EVERY: Duration = Duration::from_mins(10);
/// The record of the last start.
const INCARNATION: &str = "incarnation";

/// What a node knows besides what the state says.
pub struct Agent {
    member: Arc<Membership>,
    app: App,
    profile: CpuProfile,
    capacity: Resources,
    tasks: Arc<Tasks>,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    incarnation: u64,
    /// Images that the cluster has ordered, and from whom.
    ordered: BTreeMap<ImageKey, Vec<NodeId>>,
    /// Orders that are being carried out.
    opening: BTreeSet<ImageKey>,
    failed: BTreeSet<(ImageKey, Epoch)>,
    is_out: bool,
    has_said_that_it_stopped: bool,
    last_report: Option<Instant>,
    revoked: BTreeSet<NodeId>,
}

/// What the cluster is told of an image.
#[must_use]
pub fn facts_of(image: &HeldImage, profile: &CpuProfile) -> ImageFacts {
    ImageFacts {
        profile: profile.clone(),
        data_bytes: image.data_bytes,
        working_set_bytes: expected_dirty(image.data_bytes),
        dirty_bytes: expected_dirty(image.data_bytes),
    }
}

impl Agent {
    /// Of a start of this node.
    ///
    /// # Errors
    /// [`DiskError`] if the start cannot be noted: its reports could be taken for those of an earlier one.
    pub fn begin(
        member: Arc<Membership>,
        app: App,
        profile: CpuProfile,
        capacity: Resources,
        tasks: Arc<Tasks>,
    ) -> Result<Arc<Self>, DiskError> {
        let agent = Self { member, app, profile, capacity, tasks, inner: Mutex::default() };
        let last: Option<u64> = agent.member.disk.record(INCARNATION)?;
        agent.take_number(last.unwrap_or(0) + 1)?;
        Ok(Arc::new(agent))
    }

    fn take_number(&self, number: u64) -> Result<(), DiskError> {
        self.member.disk.write(|writing| writing.put_record(INCARNATION, &number))?;
        self.lock().incarnation = number;
        self.member.purse.empty(number);
        // What ran was ordered from the start before this one.
        self.tasks.end_all();
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks and acts, until the runtime ends.
    pub async fn run(self: Arc<Self>) {
        let says = Arc::clone(&self);
        tokio::spawn(async move {
            loop {
                says.say_alive().await;
                tokio::time::sleep(LOOK_EVERY).await;
            }
        });
        let loads = Arc::clone(&self);
        tokio::spawn(async move { loads.load_stored().await });
        loop {
            self.look().await;
            tokio::time::sleep(LOOK_AT_MOST_EVERY).await;
            let news = async {
                tokio::select! {
                    () = self.member.consensus.changed() => {}
                    () = self.tasks.news.notified() => {}
                }
            };
            let _ = tokio::time::timeout(self.until_next_look(), news).await;
        }
    }

    /// A report that was put off is made when it may be.
    fn until_next_look(&self) -> Duration {
        match self.lock().last_report {
            Some(last) if last.elapsed() < REPORT_AT_MOST_EVERY => REPORT_AT_MOST_EVERY - last.elapsed(),
            _ => LOOK_EVERY,
        }
    }

    /// Renews this node's certificate before it runs out, until the runtime ends.
    pub async fn renew(self: Arc<Self>, data: Arc<DataDirectory>) {
        let mut until = self.member.identity.certificate().peer().not_after;
        loop {
            metrics::certificate_until(until);
            let left = until.duration_since(pages::clock::wall()).unwrap_or_default();
            tokio::time::sleep(left.saturating_sub(RENEW_BEFORE).min(RENEW_TRY_EVERY * 6)).await;
            let left = until.duration_since(pages::clock::wall()).unwrap_or_default();
            if left > RENEW_BEFORE {
                continue;
            }
            match self.renew_now(&data).await {
                Ok(later) => until = later,
                Err(error) => {
                    tracing::warn!(error, days = left.as_secs() / 86_400, "the node's certificate is not renewed yet");
                    tokio::time::sleep(RENEW_TRY_EVERY).await;
                }
            }
        }
    }

    /// Notes on disk where the voters are whenever that has changed, until the runtime ends.
    pub async fn note_voters(self: Arc<Self>, data: Arc<DataDirectory>) {
        let (own, mut noted) = (self.member.address.to_string(), Vec::new());
        loop {
            let mut voters = self.member.voter_addresses();
            voters.retain(|address| *address != own);
            if !voters.is_empty() && voters != noted {
                match Place::note_seeds(&data, &voters) {
                    Ok(()) => noted = voters,
                    Err(error) => tracing::debug!(%error, "where the voters are is not noted yet"),
                }
            }
            tokio::time::sleep(LOOK_EVERY * 4).await;
        }
    }

    async fn renew_now(&self, data: &DataDirectory) -> Result<SystemTime, String> {
        let voters: Vec<SocketAddr> = self.member.voter_addresses().iter().filter_map(|text| text.parse().ok()).collect();
        let (identity, root) = (&self.member.identity, &self.member.root);
        let admitted = join::renew(identity, &voters, root.fingerprint()).await.map_err(|error| error.to_string())?;
        data.replace(CERTIFICATE, admitted.certificate.as_bytes()).map_err(|error| error.to_string())?;
        identity.renew(admitted.certificate.as_bytes()).map_err(|error| error.to_string())?;
        let new = pages::Certificate::from_pem(admitted.certificate.as_bytes()).map_err(|error| error.to_string())?;
        tracing::info!("the node's certificate is renewed");
        Ok(new.peer().not_after)
    }

    /// Once: what a node does that cannot write its log any more.
    fn say_stopped(&self) {
        if let Some(why) = self.member.consensus.stopped()
            && !std::mem::replace(&mut self.lock().has_said_that_it_stopped, true)
        {
            tracing::error!(
                why,
                remedy = "make room on the disk of its data directory, look at that disk, and start the node again",
                "this node takes no part in its cluster any more; its machines run on"
            );
        }
    }

    async fn say_alive(&self) {
        self.say_stopped();
        let incarnation = self.lock().incarnation;
        match self.member.consensus.alive(incarnation, ALIVE_WITHIN).await {
            Ok(Standing::Known) => {}
            Ok(Standing::Unknown { above }) => self.register(above).await,
            Ok(Standing::Out) => self.leave().await,
            Err(error) => tracing::debug!(%error, "nobody who leads hears this node"),
        }
    }

    async fn register(&self, above: u64) {
        if self.lock().incarnation <= above
            && let Err(error) = self.take_number(above + 1)
        {
            tracing::error!(%error, remedy = error.remedy(), "this node cannot come back");
            return;
        }
        let incarnation = self.lock().incarnation;
        let state = self.member.consensus.stale();
        let Some(held) = self.held().await else { return };
        let is_known = |image: &&HeldImage| image.percent == 100 && state.images.contains_key(&image.key);
        let images = held.iter().filter(is_known).map(|image| (image.key.clone(), state.images[&image.key].facts.clone()));
        let facts = self.member.facts(self.profile.clone(), self.capacity);
        let command = Command::Register { node: self.member.node, incarnation, facts, images: images.collect() };
        match self.member.consensus.propose(None, command, PROPOSE_WITHIN).await {
            Ok(Answer::Refused(refusal)) => {
                tracing::warn!(%refusal, remedy = refusal.remedy(), "the cluster does not take this node");
            }
            Ok(_) => tracing::info!(incarnation, "registered"),
            Err(error) => tracing::debug!(%error, "not registered yet"),
        }
    }

    /// The cluster has removed or revoked this node: what it ran for it ends.
    async fn leave(&self) {
        if self.lock().is_out {
            return;
        }
        tracing::error!(
            remedy = "start it again if it was removed; let it join anew, with an empty data directory, if it was revoked",
            "this node is out of its cluster: its machines are ended"
        );
        self.tasks.end_all();
        match self.app.act(|service| service.kill_all()).await {
            Ok(()) => self.lock().is_out = true,
            Err(error) => tracing::warn!(?error, "some machines stay, and are tried again"),
        }
    }

    /// `None`: what is here cannot be told now, which is not that nothing is.
    async fn held(&self) -> Option<Vec<HeldImage>> {
        self.app.look(|service| service.held_images()).await.ok()
    }

    async fn look(self: &Arc<Self>) {
        let state = self.member.consensus.stale();
        self.heed_revoked(&state);
        let known = state.nodes.get(&self.member.node);
        let incarnation = self.lock().incarnation;
        // Until the log has come here that says so, what it says is of an earlier start, or of nobody.
        if known.is_none_or(|node| node.incarnation != incarnation || node.life == Life::Lost) {
            return;
        }
        let (Some(held), Ok(local)) = (self.held().await, self.app.look(|service| Ok(service.taken())).await) else {
            return;
        };
        let (machines, memory_bytes) = local;
        let local = Resources { memory_bytes, cpu_millis: machines * EACH_CPU_MILLIS, machines };
        self.member.tend_lease(&state, local).await;
        let observed = self.observed(&state, &held, local);
        let (mut orders, mut others) = (Vec::new(), Vec::new());
        for action in reconcile(&state, self.member.node, &observed) {
            match action {
                Action::Start { job, task, epoch } => orders.push((job, task, epoch)),
                other => others.push(other),
            }
        }
        self.tasks.start(&orders, &state);
        for action in others {
            self.carry_out(action, &state, &held).await;
        }
        self.tasks.tidy(&state);
    }

    /// A revoked node is not talked to any more, once it has lost its vote: taking that away may need its own word.
    fn heed_revoked(&self, state: &State) {
        let members = self.member.consensus.members();
        let revoked: BTreeSet<NodeId> = state.revoked.iter().filter(|node| !members.contains(node)).copied().collect();
        let mut inner = self.lock();
        if inner.revoked != revoked {
            inner.revoked.clone_from(&revoked);
            self.member.trust.set_revoked(revoked);
        }
    }

    fn observed(&self, state: &State, held: &[HeldImage], local: Resources) -> Observed {
        let mut inner = self.lock();
        let is_ours = |key: &ImageKey| state.images.get(key).is_some_and(|image| image.holders.contains_key(&self.member.node));
        let is_in_force = |(key, epoch): &(ImageKey, Epoch)| {
            let holder = state.images.get(key).and_then(|image| image.holders.get(&self.member.node));
            holder.is_some_and(|holder| holder.epoch == *epoch)
        };
        inner.failed.retain(is_in_force);
        // One that is being opened this moment is ours, and not among those yet.
        inner.ordered.retain(|key, _| is_ours(key) || held.iter().any(|image| image.key == *key));
        // What was made here is the cluster's once it has learned of it.
        let claims = self.member.claims.open(state, self.member.node);
        let is_told = |image: &&HeldImage| is_ours(&image.key) || inner.ordered.contains_key(&image.key);
        let seen = held.iter().filter(is_told).filter(|image| !claims.contains(&image.key));
        let images = seen.map(|image| {
            let sources = inner.ordered.get(&image.key).cloned().unwrap_or_default();
            (image.key.clone(), Seen { percent: image.percent, sources })
        });
        Observed {
            incarnation: inner.incarnation,
            images: images.collect(),
            failed: inner.failed.clone(),
            tasks: self.tasks.observed(),
            local,
        }
    }

    async fn carry_out(self: &Arc<Self>, action: Action, state: &State, held: &[HeldImage]) {
        match action {
            Action::Register { above } => self.register(above).await,
            Action::Leave => self.leave().await,
            Action::Open { key, epoch, sources } => self.open(key, epoch, sources, state),
            // It may have begun after this node looked.
            Action::Drop { key } if self.member.claims.contains(&key) => {}
            Action::Drop { key } => {
                let Some(image) = held.iter().find(|image| image.key == key).map(|image| image.id) else { return };
                // Its file stays: that goes by a user's word alone.
                let dropped = self.app.act(move |service| service.let_go(image)).await;
                tracing::info!(image = %key, is_done = dropped.is_ok(), "let go, as the cluster says");
            }
            Action::Report(report) => {
                let last = self.lock().last_report.replace(Instant::now());
                if last.is_some_and(|last| last.elapsed() < REPORT_AT_MOST_EVERY) {
                    self.lock().last_report = last;
                    return;
                }
                if let Err(error) = self.member.consensus.propose(None, *report, PROPOSE_WITHIN).await {
                    tracing::debug!(%error, "not reported yet");
                }
            }
            Action::End { job, task } => self.tasks.end(job, task),
            Action::Forget { job, task } => self.tasks.forget(job, task),
            // They are begun together.
            Action::Start { job, task, epoch } => self.tasks.start(&[(job, task, epoch)], state),
        }
    }

    /// Opening takes a while: it is done beside everything else.
    fn open(self: &Arc<Self>, key: ImageKey, epoch: Epoch, sources: Vec<NodeId>, state: &State) {
        if !self.lock().opening.insert(key.clone()) {
            return;
        }
        let address_of = |source: &NodeId| Some(state.nodes.get(source)?.facts.address);
        let holders: Vec<SocketAddr> = sources.iter().filter_map(address_of).collect();
        tracing::info!(image = %key, ?holders, "opens, as the cluster says");
        let agent = Arc::clone(self);
        tokio::spawn(async move {
            let wanted = key.clone();
            let opened = agent.app.act(move |service| service.open_image(&wanted.tenant, wanted.digest, holders)).await;
            let mut inner = agent.lock();
            inner.opening.remove(&key);
            match opened {
                Ok(_) => drop(inner.ordered.insert(key, sources)),
                Err(error) => {
                    tracing::warn!(image = %key, ?error, "not opened");
                    inner.failed.insert((key, epoch));
                }
            }
        });
    }

    /// Templates of the cluster that are in this node's store are loaded, and told of: after a start they are nowhere else, perhaps.
    async fn load_stored(&self) {
        let mut tried = BTreeSet::new();
        loop {
            tokio::time::sleep(LOOK_EVERY * 4).await;
            let state = self.member.consensus.stale();
            let incarnation = self.lock().incarnation;
            if state.nodes.get(&self.member.node).is_none_or(|node| node.incarnation != incarnation || !node.is_open()) {
                continue;
            }
            for ((tenant, name), digest) in &state.templates {
                let key = ImageKey { tenant: tenant.clone(), digest: *digest };
                let is_there = state.images.get(&key).is_some_and(|image| image.settled().next().is_some());
                if is_there || !tried.insert((key.clone(), incarnation)) {
                    continue;
                }
                let (wanted, named) = (key.clone(), FullName { tenant: tenant.clone(), name: name.clone() });
                let image = match self.app.act(move |service| service.stored_image(&named, &wanted)).await {
                    Ok(Some(image)) => image,
                    // It is not in this store, or the name is another image's here.
                    Ok(None) => continue,
                    Err(error) => {
                        tracing::warn!(%name, ?error, "a template of the cluster cannot be loaded yet");
                        tried.remove(&(key, incarnation));
                        continue;
                    }
                };
                let facts = state.images.get(&key).map_or_else(|| facts_of(&image, &self.profile), |image| image.facts.clone());
                match self.member.claim(key, facts, incarnation).await {
                    Err(ClusterError::Refused(refusal)) => {
                        tracing::warn!(%refusal, %name, remedy = refusal.remedy(), "the cluster does not take a template that is here");
                    }
                    Ok(()) => tracing::info!(%name, "a template of the cluster is here"),
                    Err(error) => {
                        tracing::debug!(%error, %name, "the cluster does not know yet that this template is here");
                        tried.clear();
                    }
                }
            }
        }
    }
}
