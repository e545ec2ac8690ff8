//! One image being fetched: carries out what its [`Transfer`] says, and tells it what came of it.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use pages::transfer::{Command, Config, ExtentId, Region, RequestId, SourceId, Transfer, Waiter};
use tokio::sync::{Notify, oneshot};
use tokio::task::AbortHandle;
use types::{EXTENT_SIZE, ExtentIndex, Reason};
use vm::host_image::SettleError;
use vm::image::Image;
use vm::{HostImage, Watched};

use super::super::metrics::{self, FaultStages, PageBytes};
use super::super::offer::About;
use super::learn::Told;
use super::source::Source;
use super::{Key, Opened, Progress, Shared};

/// Before settling is tried again that failed for lack of something.
const SETTLE_PAUSE: Duration = Duration::from_secs(1);
/// The most holders that are read from: whoever may have something forked here may name some.
pub(super) const SOURCES_MAX: usize = 32;
/// How many extents that children touched first are remembered.
const TOUCHED_MAX: usize = 4096;

/// See the module.
pub(super) struct Fetch {
    pub(super) key: Key,
    pub(super) host_image: Arc<HostImage>,
    pub(super) image: Arc<Image>,
    pub(super) shared: Rc<Shared>,
    pub(super) state: RefCell<State>,
    /// Something may be due sooner than before.
    timer: Notify,
    /// A hash page has come.
    pub(super) learned: Notify,
    pub(super) told: Told,
    about: About,
    opened_at: Duration,
    settled_after: Cell<Option<Duration>>,
    was_lost: Cell<bool>,
    /// When the host last had no memory for a page, and when a child was ended for that.
    pub(super) short_since: Cell<Option<Duration>>,
    pub(super) relieved: Cell<Option<Duration>>,
    /// When memory was last looked for in vain.
    pub(super) found_none: Cell<Option<Duration>>,
    /// Nothing was stopped for lack of memory.
    pub(super) has_room: Cell<bool>,
    tasks: RefCell<Vec<AbortHandle>>,
}

pub(super) struct State {
    pub(super) transfer: Transfer,
    pub(super) sources: BTreeMap<SourceId, Source>,
    waiters: HashMap<Waiter, Waiting>,
    next_waiter: u64,
    pub(super) requests: HashMap<RequestId, AbortHandle>,
    /// What children touched that was not here, in that order.
    pub(super) touched: Vec<ExtentId>,
    touched_before: HashSet<ExtentId>,
    /// Extents that are the same as one of an image that is here.
    pub(super) elsewhere: HashMap<ExtentId, (Arc<Image>, usize, ExtentIndex)>,
    /// What was published and may be evicted, oldest first.
    pub(super) published: VecDeque<ExtentId>,
    /// How far the answers to faults have come.
    pub(super) answering: HashMap<ExtentId, Answering>,
    pub(super) wire_bytes: u64,
}

/// A fault that is being answered, with the times of what was done so far.
pub(super) struct Answering {
    pub(super) stages: FaultStages,
    /// When the last of those ended.
    pub(super) since: Duration,
    pub(super) was_sent: bool,
}

/// Who waits for an extent.
enum Waiting {
    Child(Arc<Watched>, AbortHandle),
    /// Another node, through this one's server.
    Pull(oneshot::Sender<()>),
    /// A branch that is being completed looks at the host image itself.
    Nobody,
}

impl Fetch {
    pub(super) fn new(
        shared: &Rc<Shared>,
        key: Key,
        (host_image, image): (Arc<HostImage>, Arc<Image>),
        about: About,
    ) -> Rc<Self> {
        let regions: Vec<Region> = host_image
            .head()
            .regions
            .iter()
            .enumerate()
            .map(|(number, region)| {
                let absent = host_image.data_extents(number).collect();
                Region { extents: region.map.extent_count(), absent }
            })
            .collect();
        let config = Config::with_deadline(shared.settings.deadline);
        let seed = u64::from_le_bytes(key.1.as_bytes()[..8].try_into().expect("a digest has 32 bytes"));
        let transfer = Transfer::new(config, &regions, seed).expect("the default with another deadline is consistent");
        let state = State {
            transfer,
            sources: BTreeMap::new(),
            waiters: HashMap::new(),
            next_waiter: 0,
            requests: HashMap::new(),
            touched: Vec::new(),
            touched_before: HashSet::new(),
            elsewhere: HashMap::new(),
            published: VecDeque::new(),
            answering: HashMap::new(),
            wire_bytes: 0,
        };
        let fetch = Rc::new(Self {
            key,
            host_image,
            image,
            shared: Rc::clone(shared),
            state: RefCell::new(state),
            timer: Notify::new(),
            learned: Notify::new(),
            told: Told::default(),
            about,
            opened_at: shared.now(),
            settled_after: Cell::new(None),
            was_lost: Cell::new(false),
            short_since: Cell::new(None),
            relieved: Cell::new(None),
            found_none: Cell::new(None),
            has_room: Cell::new(true),
            tasks: RefCell::default(),
        });
        shared.all.borrow_mut().push(Rc::downgrade(&fetch));
        let keep_time = Rc::clone(&fetch);
        fetch.spawn(async move { keep_time.keep_time().await });
        fetch
    }

    /// A task that ends with the fetch. If it panics, faults may go without an answer: then the image has failed, and its children
    /// end.
    pub(super) fn spawn(self: &Rc<Self>, task: impl Future<Output = ()> + 'static) -> AbortHandle {
        // No more than that, or its image would be needed as long as it has tasks.
        let host_image = Arc::downgrade(&self.host_image);
        let task = async move {
            if let Err(panic) = AssertUnwindSafe(task).catch_unwind().await
                && let Some(host_image) = host_image.upgrade()
            {
                super::fail_after_panic(&host_image, &*panic);
            }
        };
        let handle = tokio::task::spawn_local(task).abort_handle();
        let mut tasks = self.tasks.borrow_mut();
        tasks.retain(|task| !task.is_finished());
        tasks.push(handle.clone());
        handle
    }

    pub(super) fn opened(&self) -> Opened {
        Opened { image: Arc::clone(&self.image), about: self.about.clone() }
    }

    /// Whether children can still be forked from it.
    pub(super) fn is_good(&self) -> bool {
        self.host_image.failed().is_none()
    }

    pub(super) fn add_holders(self: &Rc<Self>, holders: &[SocketAddr]) {
        for address in holders {
            let is_known = self.state.borrow().sources.values().any(|source| source.link.address() == *address);
            let count = self.state.borrow().sources.len();
            if !is_known && count < SOURCES_MAX && !self.host_image.is_settled() {
                self.add_source(self.shared.link(*address), None);
            }
        }
    }

    /// Reads and answers the faults of a child from now on.
    pub(super) fn watch(self: &Rc<Self>, child: Arc<Watched>) {
        let waiter = self.next_waiter();
        let task = self.spawn(super::child::serve(Rc::clone(self), Arc::clone(&child), waiter));
        self.state.borrow_mut().waiters.insert(waiter, Waiting::Child(child, task));
    }

    pub(super) fn forget(self: &Rc<Self>, child: &Arc<Watched>) {
        let mut state = self.state.borrow_mut();
        let is_it = |waiting: &Waiting| matches!(waiting, Waiting::Child(other, _) if Arc::ptr_eq(other, child));
        let waiter = state.waiters.iter().find(|(_, waiting)| is_it(waiting)).map(|(waiter, _)| *waiter);
        if let Some(waiter) = waiter {
            if let Some(Waiting::Child(_, task)) = state.waiters.remove(&waiter) {
                task.abort();
            }
            let now = self.shared.now();
            state.transfer.forget_waiter(now, waiter);
            drop(state);
            self.pump();
        }
    }

    /// A child has touched what may not be here.
    pub(super) fn fault(
        self: &Rc<Self>,
        waiter: Waiter,
        child: &Watched,
        id: ExtentId,
        (ready_at, read_at): (Duration, Duration),
    ) {
        let region = usize::from(id.region);
        if self.host_image.has(region, id.extent) || self.supply(id) {
            child.wake(region, id.extent);
            return;
        }
        {
            let mut state = self.state.borrow_mut();
            if state.touched.len() < TOUCHED_MAX && state.touched_before.insert(id) {
                state.touched.push(id);
            }
            let stages = FaultStages { uffd_read: read_at.saturating_sub(ready_at), ..FaultStages::default() };
            state.answering.entry(id).or_insert(Answering { stages, since: read_at, was_sent: false });
            state.transfer.demand(read_at, id, waiter);
        }
    }

    /// These are needed soon, though no child waits.
    pub(super) fn want(self: &Rc<Self>, region: u8, extents: Range<u32>) {
        for extent in extents.map(ExtentIndex) {
            self.demand(ExtentId { region, extent }, Waiting::Nobody);
        }
    }

    /// Another node needs this one.
    pub(super) fn pull(self: &Rc<Self>, region: u8, extent: ExtentIndex, reply: oneshot::Sender<()>) {
        self.demand(ExtentId { region, extent }, Waiting::Pull(reply));
    }

    fn demand(self: &Rc<Self>, id: ExtentId, waiting: Waiting) {
        if self.host_image.has(usize::from(id.region), id.extent) || self.supply(id) {
            return answer(waiting);
        }
        if !self.is_good() || self.host_image.is_settled() {
            // Nobody fetches any more: whoever waits looks for itself.
            return answer(waiting);
        }
        let waiter = self.next_waiter();
        let mut state = self.state.borrow_mut();
        state.waiters.insert(waiter, waiting);
        let now = self.shared.now();
        state.transfer.demand(now, id, waiter);
        drop(state);
        self.pump();
    }

    /// Publishes what is zero, or is here as part of another image. Says whether it was.
    pub(super) fn supply(self: &Rc<Self>, id: ExtentId) -> bool {
        let region = usize::from(id.region);
        let (published, kind) = if self.host_image.digest_of(region, id.extent) == Some(types::Digest::ZERO_CONTENT) {
            (self.host_image.publish_zeros(region, id.extent), PageBytes::Zero)
        } else {
            let found = self.state.borrow().elsewhere.get(&id).cloned();
            let Some((image, there, extent)) = found else { return false };
            let mut bytes = Box::new([0; vm::host_image::EXTENT_LEN]);
            match image.read_extent(there, extent, &mut bytes) {
                Ok(vm::image::manifest::Content::Data) => {}
                // Evicted there, or worse: it is fetched then.
                _ => return false,
            }
            (self.host_image.publish(region, id.extent, &bytes[..]), PageBytes::Local)
        };
        match &published {
            Ok(_) => {}
            Err(error @ vm::host_image::PublishError::Poisoned(_)) => {
                self.is_lost(error);
                return false;
            }
            Err(error) => {
                tracing::debug!(%error, "not supplied from this host");
                return false;
            }
        }
        metrics::page_bytes(kind, EXTENT_SIZE);
        let mut state = self.state.borrow_mut();
        state.published.push_back(id);
        let now = self.shared.now();
        state.transfer.published_otherwise(now, id);
        true
    }

    /// Does what the transfer says, until it has nothing to say.
    pub(super) fn pump(self: &Rc<Self>) {
        loop {
            let command = self.state.borrow_mut().transfer.poll();
            let Some(command) = command else { break };
            tracing::trace!(image = %self.key.1, %command);
            match command {
                Command::Send { request, source, extents, urgency } => self.send(request, source, extents, urgency),
                Command::Cancel { request } => {
                    if let Some(task) = self.state.borrow_mut().requests.remove(&request) {
                        task.abort();
                    }
                }
                Command::Wake { extent, waiters } => self.wake(extent, &waiters),
                Command::GiveUp { extent, waiters, waited } => self.give_up(extent, &waiters, waited),
                Command::Quarantine { source, extent } => self.quarantine(source, extent),
                Command::Settled => self.settle(),
            }
        }
        self.timer.notify_one();
    }

    async fn keep_time(self: Rc<Self>) {
        loop {
            let due = self.state.borrow().transfer.next_timeout();
            let due = due.map(|due| self.shared.began + due);
            let timer = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = timer => {
                    let now = self.shared.now();
                    self.state.borrow_mut().transfer.tick(now);
                    self.pump();
                }
                () = self.timer.notified() => {}
            }
        }
    }

    fn wake(&self, id: ExtentId, waiters: &[Waiter]) {
        let mut state = self.state.borrow_mut();
        let answering = state.answering.remove(&id);
        for waiter in waiters {
            if let Some(Waiting::Child(child, _)) = state.waiters.get(waiter) {
                child.wake(usize::from(id.region), id.extent);
            } else if let Some(waiting) = state.waiters.remove(waiter) {
                answer(waiting);
            }
        }
        if let Some(Answering { mut stages, since, was_sent: true }) = answering {
            stages.wake = self.shared.now().saturating_sub(since);
            metrics::fault(&stages);
        }
    }

    fn give_up(&self, id: ExtentId, waiters: &[Waiter], waited: Duration) {
        let mut state = self.state.borrow_mut();
        state.answering.remove(&id);
        let sources: Vec<String> = state.sources.values().map(ToString::to_string).collect();
        let detail = format!(
            "extent {} of region {} of image {} did not come within {waited:.1?}; asked: {}",
            id.extent,
            id.region,
            self.key.1,
            sources.join(", ")
        );
        // What the host had no memory for is no fault of those who have it.
        let was_short = self.short_since.get().is_some_and(|since| self.shared.now().saturating_sub(since) < waited);
        let reason = if was_short { Reason::Oom } else { Reason::PageSourceLost };
        for waiter in waiters {
            match state.waiters.get(waiter) {
                Some(Waiting::Child(child, _)) => {
                    tracing::warn!(machine = %child.machine(), detail, "a page could not be had");
                    child.end(vm::Ended { reason, detail: detail.clone() });
                }
                // Whoever waits finds out that it has not come.
                Some(_) => drop(state.waiters.remove(waiter)),
                None => {}
            }
        }
    }

    fn quarantine(&self, source: SourceId, id: ExtentId) {
        metrics::quarantined();
        if let Some(source) = self.state.borrow_mut().sources.get_mut(&source) {
            tracing::error!(image = %self.key.1, %source, extent = %id, "quarantined");
            source.quarantine();
        }
    }

    /// Everything is here.
    fn settle(self: &Rc<Self>) {
        let this = Rc::clone(self);
        self.spawn(async move {
            let host_image = Arc::clone(&this.host_image);
            // It reads all of it.
            let settled = tokio::task::spawn_blocking(move || host_image.settle()).await;
            match settled {
                Ok(Ok(())) => this.has_settled(),
                Err(panic) => this.is_lost(&panic),
                Ok(Err(SettleError::Absent { .. })) => {
                    let now = this.shared.now();
                    this.state.borrow_mut().transfer.stream(now, this.shared.settings.streams);
                    this.pump();
                }
                Ok(Err(error @ SettleError::Poisoned(_))) => this.is_lost(&error),
                Ok(Err(error @ SettleError::Step { .. })) => {
                    tracing::warn!(image = %this.key.1, %error, "an image cannot settle yet");
                    tokio::time::sleep(SETTLE_PAUSE).await;
                    this.settle();
                }
            }
        });
    }

    fn has_settled(&self) {
        let after = self.shared.now().saturating_sub(self.opened_at);
        self.settled_after.set(Some(after));
        tracing::info!(image = %self.key.1, seconds = after.as_secs_f64(), "settled");
        self.release_sources();
        self.end_tasks();
    }

    /// It was found poisoned: nothing of it is fetched any more.
    pub(super) fn is_lost(&self, error: &dyn std::fmt::Display) {
        if self.was_lost.replace(true) {
            return;
        }
        tracing::error!(image = %self.key.1, %error, "an image is poisoned");
        metrics::poisoned();
        self.release_sources();
        self.end_tasks();
    }

    /// Whether there are pages that the pager has not placed.
    pub(super) fn look_for_strangers(&self) {
        if !self.host_image.is_settled() && self.is_good() {
            self.host_image.check_pages();
            if let Some(ended) = self.host_image.failed() {
                self.is_lost(ended);
            }
        }
    }

    /// Whether anybody has the image, a branch of it, or a child.
    pub(super) fn is_needed(&self) -> bool {
        // The fetch has one of each, and the image one of the host image.
        Arc::strong_count(&self.image) > 1 || Arc::strong_count(&self.host_image) > 2
    }

    /// Ends what is under way. Says `false`: it is over.
    pub(super) fn close(&self) -> bool {
        self.release_sources();
        self.end_tasks();
        if !self.host_image.is_settled() {
            let detail = "its image was closed before all of it was here".to_owned();
            self.host_image.fail(vm::Ended { reason: Reason::PageSourceLost, detail });
        }
        false
    }

    fn end_tasks(&self) {
        self.tasks.borrow_mut().drain(..).for_each(|task| task.abort());
        let mut state = self.state.borrow_mut();
        state.waiters.drain().for_each(|(_, waiting)| answer(waiting));
        state.requests.clear();
        state.published = VecDeque::new();
        state.elsewhere = HashMap::new();
    }

    pub(super) fn progress(&self) -> Progress {
        let state = self.state.borrow();
        let stats: BTreeMap<_, _> = state.transfer.sources().collect();
        let sources = state.sources.iter().map(|(id, source)| source.facts(stats.get(id))).collect();
        Progress { settled_after: self.settled_after.get(), wire_bytes: state.wire_bytes, sources }
    }

    fn next_waiter(&self) -> Waiter {
        let mut state = self.state.borrow_mut();
        state.next_waiter += 1;
        Waiter(state.next_waiter)
    }
}

fn answer(waiting: Waiting) {
    if let Waiting::Pull(reply) = waiting {
        // Whoever asked may be gone.
        reply.send(()).unwrap_or_default();
    }
}
