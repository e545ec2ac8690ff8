//! A node that holds an image, as the pager reads it: its link, the lease, and what became of it.

use std::fmt;
use std::rc::Rc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use pages::client::{Link, LinkError};
use pages::transfer::{SourceId, SourceStats};
use pages::wire::{LeaseToken, RefusalCode};
use types::Head;
use vm::HostImage;

use super::super::engine::{EngineError, ErrorKind, SourceFacts, SourceState};
use super::super::metrics::{self, OpenStages};
use super::super::offer::About;
use super::feed::Feed;
use super::fetch::Fetch;
use super::{Key, Shared, list};

/// Before a source is asked again that refused, or could not be reached.
const PAUSE: Duration = Duration::from_millis(100);
/// The most that the pause grows to.
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// Below this rate in bytes a second, what compresses is worth compressing: lz4 takes a core some 400 MB/s, the link less.
const COMPRESS_BELOW: u64 = 40_000_000;

/// See the module.
pub(super) struct Source {
    pub(super) link: Link,
    /// The right to read, while there is one.
    pub(super) lease: Option<LeaseToken>,
    state: SourceState,
    last_error: Option<String>,
}

/// Whether what comes over a link is worth compressing; its rate is known once something has come.
pub(super) fn may_compress(stats: &SourceStats) -> bool {
    stats.link_bytes_per_second.is_some_and(|rate| rate < COMPRESS_BELOW)
}

impl Source {
    /// It lied.
    pub(super) fn quarantine(&mut self) {
        self.state = SourceState::Quarantined;
        self.lease = None;
    }

    pub(super) fn facts(&self, stats: Option<&SourceStats>) -> SourceFacts {
        let stats = stats.copied().unwrap_or_default();
        let is_suspect = self.state == SourceState::Good && stats.is_suspect;
        SourceFacts {
            address: self.link.address(),
            node: self.link.peer().map(|peer| peer.node),
            extents: stats.extents,
            bytes: stats.wire_bytes,
            failures: stats.failures,
            state: if is_suspect { SourceState::Suspect } else { self.state },
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.link.address())?;
        match (self.state, &self.last_error) {
            (SourceState::Quarantined, _) => f.write_str(" (it sent what is not the image's)"),
            (_, Some(error)) => write!(f, " ({error})"),
            _ => Ok(()),
        }
    }
}

impl Fetch {
    /// Asks all holders at once for the image's head. The first good answer opens it; the others become sources too.
    pub(super) async fn open(shared: &Rc<Shared>, key: Key, holders: &[std::net::SocketAddr]) -> Result<Rc<Self>, EngineError> {
        let (tenant, digest) = &key;
        let links: Vec<Link> = holders.iter().take(super::fetch::SOURCES_MAX).map(|address| shared.link(*address)).collect();
        let within = shared.settings.open_deadline;
        let ask = |link: &Link| {
            let link = link.clone();
            async move { (link.open(tenant, *digest, within).await, link) }
        };
        let mut answers: FuturesUnordered<_> = links.iter().map(ask).collect();
        let mut failures = Vec::new();
        let began = shared.now();
        while let Some((answer, link)) = answers.next().await {
            let opened = match answer {
                Ok(opened) => opened,
                Err(error) => {
                    failures.push(of_link(&error));
                    continue;
                }
            };
            let head = match Head::decode(&opened.head, *digest) {
                Ok(head) => head,
                Err(error) => {
                    let message = format!("{} sent no head of image {digest}: {error}", link.address());
                    let remedy = "name another holder with --from".to_owned();
                    failures.push(EngineError { kind: ErrorKind::BadImage, message, remedy });
                    continue;
                }
            };
            shared.admit(&head)?;
            let asked = shared.now();
            let feed = std::sync::Arc::new(Feed { key: key.clone(), orders: shared.orders.clone() });
            let parts = HostImage::open(shared.pool.host(), *digest, head, feed).map_err(|error| EngineError {
                kind: match &error {
                    vm::host_image::OpenError::NoDevice => ErrorKind::Host,
                    vm::host_image::OpenError::Unfit(_) => ErrorKind::BadImage,
                    vm::host_image::OpenError::Step { .. } => ErrorKind::Exhausted,
                },
                message: error.to_string(),
                remedy: error.remedy().to_owned(),
            })?;
            let placed = shared.now();
            let open = std::sync::Arc::downgrade(&parts.0);
            {
                let mut all = shared.open.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                all.retain(|other| other.strong_count() > 0);
                all.push(open);
            }
            let fetch = Self::new(shared, key.clone(), parts, About::decode(&opened.about));
            fetch.take_hash_pages(&opened);
            let hints = opened.hints.clone().into_vec();
            for other in links {
                let is_it = other.address() == link.address();
                fetch.add_source(other, is_it.then(|| (opened.lease.clone(), opened.lease_for)));
            }
            fetch.begin(&hints);
            let stages = OpenStages { ask: asked - began, place: placed - asked, plan: shared.now() - placed };
            metrics::opened(&stages);
            return Ok(fetch);
        }
        // What stands in the way of the nearest to an answer: one that answered with no, before one that did not answer.
        let worst = |error: &EngineError| matches!(error.kind, ErrorKind::Unreachable);
        failures.sort_by_key(worst);
        let none = || EngineError {
            kind: ErrorKind::Unreachable,
            message: format!("nobody was named who holds image {digest} ({})", list(holders)),
            remedy: "name a holder with --from HOST:PORT".to_owned(),
        };
        Err(failures.into_iter().next().unwrap_or_else(none))
    }

    /// Reads from a node too, from now on.
    pub(super) fn add_source(self: &Rc<Self>, link: Link, lease: Option<(LeaseToken, Duration)>) {
        let id = {
            let mut state = self.state.borrow_mut();
            let id = SourceId(u32::try_from(state.sources.len()).expect("as many as there are nodes"));
            let source = Source { link, lease: None, state: SourceState::Gone, last_error: None };
            state.sources.insert(id, source);
            id
        };
        if let Some((lease, _)) = &lease {
            self.has_lease(id, lease.clone());
        }
        let this = Rc::clone(self);
        self.spawn(async move { this.keep_source(id, lease.map(|(_, lasts)| lasts)).await });
    }

    /// Keeps a lease at a source, and gets a new one when it is lost, until the source has lied or the fetch ends.
    async fn keep_source(self: Rc<Self>, id: SourceId, mut lasts: Option<Duration>) {
        let (tenant, digest) = &self.key;
        let mut pause = PAUSE;
        loop {
            let (link, lease) = {
                let state = self.state.borrow();
                let source = &state.sources[&id];
                if source.state == SourceState::Quarantined {
                    return;
                }
                (source.link.clone(), source.lease.clone())
            };
            let within = self.shared.settings.open_deadline;
            match (lease, lasts) {
                (Some(lease), Some(lasts_for)) => {
                    // After a third of its term; sooner if it is refused meanwhile.
                    let lost = async {
                        while self.state.borrow().sources[&id].lease.is_some() {
                            tokio::time::sleep(PAUSE).await;
                        }
                    };
                    tokio::select! { () = tokio::time::sleep(lasts_for / 3) => {}, () = lost => continue }
                    match link.renew(&lease, lasts_for / 3).await {
                        Ok(renewed) => {
                            lasts = Some(renewed.lease_for);
                            self.has_lease(id, renewed.lease);
                        }
                        // It may last a while yet: requests find out.
                        Err(error) => self.source_failed(id, &error),
                    }
                }
                _ => match link.open(tenant, *digest, within).await {
                    Ok(opened) => {
                        pause = PAUSE;
                        lasts = Some(opened.lease_for);
                        self.take_hash_pages(&opened);
                        self.has_lease(id, opened.lease);
                    }
                    Err(error) => {
                        self.source_failed(id, &error);
                        tokio::time::sleep(pause).await;
                        pause = (pause * 2).min(PAUSE_MAX);
                    }
                },
            }
        }
    }

    fn has_lease(self: &Rc<Self>, id: SourceId, lease: LeaseToken) {
        let now = self.shared.now();
        let mut state = self.state.borrow_mut();
        let Some(source) = state.sources.get_mut(&id) else { return };
        if source.state == SourceState::Quarantined {
            return;
        }
        source.lease = Some(lease);
        source.last_error = None;
        if source.state == SourceState::Gone {
            source.state = SourceState::Good;
            state.transfer.add_source(now, id);
        }
        drop(state);
        self.learned.notify_waiters();
        self.pump();
    }

    /// What a failed request says about its source: one that refuses the lease has to be asked for another.
    pub(super) fn source_failed(self: &Rc<Self>, id: SourceId, error: &LinkError) {
        let mut state = self.state.borrow_mut();
        let Some(source) = state.sources.get_mut(&id) else { return };
        source.last_error = Some(error.to_string());
        let is_lost = match error {
            LinkError::Refused(refusal) => !matches!(refusal.code, RefusalCode::Busy | RefusalCode::Failed),
            LinkError::NotTrusted { .. } | LinkError::OtherProtocol { .. } => true,
            _ => false,
        };
        if is_lost && source.state == SourceState::Good {
            source.lease = None;
            source.state = SourceState::Gone;
            let now = self.shared.now();
            state.transfer.remove_source(now, id);
            drop(state);
            self.pump();
        }
    }

    /// How many leases it has.
    pub(super) fn leases(&self) -> usize {
        self.state.borrow().sources.values().filter(|source| source.lease.is_some()).count()
    }

    /// Gives every lease back, with a last word on what was touched: images that arrive quickly have not told it before.
    pub(super) fn release_sources(&self) {
        let news = self.news();
        for source in self.state.borrow_mut().sources.values_mut() {
            source.state = SourceState::Gone;
            if let Some(lease) = source.lease.take() {
                let (link, news, image) = (source.link.clone(), news.clone(), self.key.1);
                // Not a task of the fetch, which ends now; a node that is gone forgets it by itself.
                tokio::task::spawn_local(async move {
                    if let Some((news, _)) = news {
                        link.hints(&lease, image, news, PAUSE_MAX).await.unwrap_or_default();
                    }
                    link.release(&lease, PAUSE_MAX).await.unwrap_or_default();
                });
            }
        }
    }
}

/// What the failure of a link is to whoever opens an image.
pub(super) fn of_link(error: &LinkError) -> EngineError {
    let kind = match error {
        LinkError::Unreachable { .. } | LinkError::TimedOut { .. } => ErrorKind::Unreachable,
        LinkError::NotTrusted { .. } => ErrorKind::NotTrusted,
        LinkError::Refused(_) | LinkError::OtherProtocol { .. } => ErrorKind::Refused,
        _ => ErrorKind::SourceLost,
    };
    EngineError { kind, message: error.to_string(), remedy: error.remedy().to_owned() }
}
