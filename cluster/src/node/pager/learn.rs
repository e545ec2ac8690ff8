//! What a fetch learns of its image before it can settle: the digests of all extents, which of them are zero or here already as
//! part of other images, and what children touch first, which it tells the holders.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use pages::client::Link;
use pages::transfer::{ExtentId, SourceId};
use pages::wire::{Hints, LeaseToken, Opened};
use types::manifest::{HASH_PAGE_DIGESTS, WorkingSetRun};
use types::{Digest, ExtentIndex};
use vm::image::Image;

use super::fetch::Fetch;

/// Hash pages that are asked for at once.
const AT_ONCE: usize = 8;
/// Before the next source is asked for a hash page that has not come.
const HEDGE: Duration = Duration::from_millis(50);
/// Before a hash page is asked for again.
const PAUSE: Duration = Duration::from_millis(50);
/// How long nothing is streamed after an image was opened, and nothing supplied that nobody has touched: whoever opened it is about
/// to fork from it, and both take processor time on both hosts.
const CHILDREN_FIRST: Duration = Duration::from_millis(50);
/// How many extents are replayed at once, the first of what any child needs for its first instruction; and how much later the others,
/// hash pages, and the search for what is here already: a child that has not run yet needs the processor more.
const REPLAYED_AT_ONCE: usize = 4;
const FORK_FIRST: Duration = Duration::from_millis(3);
/// When holders are told what children have touched, after the image was opened.
const TELL_AFTER: [Duration; 3] = [Duration::from_secs(2), Duration::from_secs(10), Duration::from_secs(60)];

impl Fetch {
    /// Begins what goes on beside the faults of children.
    pub(super) fn begin(self: &Rc<Self>, hints: &[WorkingSetRun]) {
        if self.shared.settings.replays {
            let regions = &self.host_image.head().regions;
            // Holders name first what the first instruction needs; what a head has is in the order of addresses.
            let recorded = hints.iter().chain(&self.host_image.head().working_set);
            // Another node's word: within the image, and not more than all of it.
            let extents = recorded.flat_map(|run| {
                let most = regions.get(usize::from(run.region)).map_or(0, |region| region.map.extent_count());
                let extents = run.start.0.min(most)..run.start.0.saturating_add(run.count).min(most);
                extents.map(|extent| ExtentId { region: run.region, extent: ExtentIndex(extent) })
            });
            let most = regions.iter().map(|region| region.map.extent_count() as usize).sum();
            let mut extents = extents.take(most);
            let now = self.shared.now();
            self.state.borrow_mut().transfer.replay(now, extents.by_ref().take(REPLAYED_AT_ONCE));
            let (rest, replaying): (Vec<_>, _) = (extents.collect(), Rc::clone(self));
            self.spawn(async move {
                tokio::time::sleep(FORK_FIRST).await;
                let now = replaying.shared.now();
                replaying.state.borrow_mut().transfer.replay(now, rest);
                replaying.pump();
            });
        }
        let (learning, telling) = (Rc::clone(self), Rc::clone(self));
        self.spawn(async move { learning.learn().await });
        *self.told.before.borrow_mut() = hints.to_vec();
        self.spawn(async move { telling.tell().await });
        self.pump();
    }

    /// Takes the hash pages that came with a head; what is not right is asked for again.
    pub(super) fn take_hash_pages(&self, opened: &Opened) {
        let missing: Vec<_> = self.host_image.missing_hash_pages().collect();
        let given = opened.hash_pages.clone().into_vec();
        let by_digest: HashMap<Digest, _> = given.iter().map(|page| (Digest::of(page), page)).collect();
        for (region, page, expected) in missing {
            // Pages that are equal came once, or several times.
            if let Some(bytes) = by_digest.get(&expected) {
                self.host_image.add_hash_page(region, page, bytes).unwrap_or_else(|error| {
                    tracing::debug!(%error, "a hash page that came with a head");
                });
            }
        }
        self.learned.notify_waiters();
    }

    /// Waits until the digest of an extent is known.
    pub(super) async fn learn_digest(self: &Rc<Self>, region: u8, extent: ExtentIndex) {
        let region = usize::from(region);
        let page = (extent.0 / HASH_PAGE_DIGESTS) as usize;
        while self.host_image.digest_of(region, extent).is_none() {
            let learned = self.learned.notified();
            // Not in its turn: somebody waits.
            tokio::select! { () = self.ask_for_hash_page(region, page) => {}, () = learned => {} }
        }
    }

    async fn learn(self: Rc<Self>) {
        // What a child needs of it sooner is asked for when it is needed.
        tokio::time::sleep(FORK_FIRST).await;
        loop {
            let missing: Vec<_> = self.host_image.missing_hash_pages().take(AT_ONCE).collect();
            if missing.is_empty() {
                break;
            }
            let asked = missing.into_iter().map(|(region, page, _)| self.ask_for_hash_page(region, page));
            futures_util::future::join_all(asked).await;
        }
        self.find_elsewhere().await;
        tokio::time::sleep(CHILDREN_FIRST).await;
        self.supply_all().await;
        let now = self.shared.now();
        self.state.borrow_mut().transfer.stream(now, self.shared.settings.streams);
        self.pump();
    }

    /// What children have touched first, and how much that is, if holders do not know all of it.
    pub(super) fn news(&self) -> Option<(Hints, usize)> {
        let state = self.state.borrow();
        let count = state.touched.len();
        let hints = || Hints::first_of(self.told.before.borrow().iter().copied().chain(runs(&state.touched)));
        (count != self.told.count.get()).then(|| (hints(), count))
    }

    /// Asks the sources for a hash page, each a little later than the one before it: one that is silent keeps nobody waiting.
    async fn ask_for_hash_page(self: &Rc<Self>, region: usize, page: usize) {
        let sources: Vec<_> = {
            let state = self.state.borrow();
            let good = state.sources.iter().filter_map(|(id, source)| Some((*id, source.link.clone(), source.lease.clone()?)));
            good.collect()
        };
        let (Ok(number), Ok(index)) = (u8::try_from(region), u32::try_from(page)) else { return };
        let within = self.shared.settings.deadline;
        let ask = |(turn, (id, link, lease)): (u32, (SourceId, Link, LeaseToken))| async move {
            tokio::time::sleep(HEDGE * turn).await;
            (link.hash_page(&lease, self.key.1, number, index, within).await, id, link)
        };
        let mut asked: FuturesUnordered<_> = (0..).zip(sources).map(ask).collect();
        while let Some((answer, id, link)) = asked.next().await {
            match answer.map(|bytes| self.host_image.add_hash_page(region, page, &bytes)) {
                Ok(Ok(())) => return self.learned.notify_waiters(),
                Ok(Err(error)) => {
                    tracing::warn!(image = %self.key.1, source = %link.address(), %error, "a holder sent what is not the image's");
                    self.distrust(id);
                }
                Err(error) => tracing::debug!(image = %self.key.1, source = %link.address(), %error, "no hash page"),
            }
        }
        tokio::time::sleep(PAUSE).await;
    }

    /// A source lied about a digest.
    fn distrust(self: &Rc<Self>, id: SourceId) {
        super::super::metrics::quarantined();
        let now = self.shared.now();
        let mut state = self.state.borrow_mut();
        state.transfer.remove_source(now, id);
        if let Some(source) = state.sources.get_mut(&id) {
            source.quarantine();
        }
        drop(state);
        self.pump();
    }

    /// Finds extents that are the same as one of an image of the same tenant that is here.
    async fn find_elsewhere(&self) {
        let others: Vec<Arc<Image>> = self.shared.library.images(&self.key.0);
        let (own, host_image) = (self.image.id(), Arc::clone(&self.host_image));
        let found = tokio::task::spawn_blocking(move || {
            let mut wanted: HashMap<Digest, Vec<ExtentId>> = HashMap::new();
            for region in 0..host_image.head().regions.len() {
                for extent in host_image.data_extents(region).flatten().map(ExtentIndex) {
                    if let Some(digest) = host_image.digest_of(region, extent).filter(|digest| *digest != Digest::ZERO_CONTENT)
                    {
                        let region = u8::try_from(region).expect("a head has at most 8 regions");
                        wanted.entry(digest).or_default().push(ExtentId { region, extent });
                    }
                }
            }
            let mut found = HashMap::new();
            for image in others.into_iter().filter(|image| image.id() != own) {
                // Its digests are known, so this takes no time.
                let Ok(manifest) = image.manifest(|_, _| {}) else { continue };
                for region in 0..manifest.head().regions.len() {
                    for (extent, digest) in (0u32..).zip(manifest.extent_digests(region)) {
                        for id in wanted.remove(digest).into_iter().flatten() {
                            found.insert(id, (Arc::clone(&image), region, ExtentIndex(extent)));
                        }
                    }
                }
            }
            found
        });
        if let Ok(found) = found.await {
            self.state.borrow_mut().elsewhere = found;
        }
    }

    /// Publishes all that need not be fetched, while no child waits for what must be.
    async fn supply_all(self: &Rc<Self>) {
        for region in 0..self.host_image.head().regions.len() {
            let Ok(number) = u8::try_from(region) else { return };
            let extents: Vec<u32> = self.host_image.data_extents(region).flatten().collect();
            for extent in extents.into_iter().map(ExtentIndex) {
                if !self.host_image.has(region, extent) && self.supply(ExtentId { region: number, extent }) {
                    self.keep_budget();
                    self.pump();
                    tokio::task::yield_now().await;
                }
            }
        }
        // What was found elsewhere is here now; what could not be read is fetched.
        self.state.borrow_mut().elsewhere = HashMap::new();
    }

    /// Tells the holders now and then what children have touched first, so that the next host fetches that ahead.
    async fn tell(self: Rc<Self>) {
        for after in TELL_AFTER {
            tokio::time::sleep(after).await;
            let Some((runs, count)) = self.news() else { continue };
            let mut is_heard = true;
            let readers: Vec<_> = {
                let state = self.state.borrow();
                let readers = state.sources.values().filter_map(|source| Some((source.link.clone(), source.lease.clone()?)));
                readers.collect()
            };
            for (link, lease) in readers {
                let within = self.shared.settings.deadline;
                if let Err(error) = link.hints(&lease, self.key.1, runs.clone(), within).await {
                    is_heard = false;
                    tracing::debug!(image = %self.key.1, source = %link.address(), %error, "not told what was touched");
                }
            }
            if is_heard {
                self.told.count.set(count);
            }
        }
    }
}

/// What holders know of what children touched here.
#[derive(Default)]
pub(super) struct Told {
    /// What they had said themselves when the image was opened.
    before: RefCell<Vec<WorkingSetRun>>,
    /// How many of those that were touched all of them have been told.
    count: Cell<usize>,
}

/// Extents in their order as runs: neighbours that came one after the other are one.
fn runs(extents: &[ExtentId]) -> Vec<WorkingSetRun> {
    let mut runs: Vec<WorkingSetRun> = Vec::new();
    for id in extents {
        match runs.last_mut() {
            Some(run) if run.region == id.region && run.start.0 + run.count == id.extent.0 => run.count += 1,
            _ => runs.push(WorkingSetRun { region: id.region, start: id.extent, count: 1 }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_touched_is_told_in_its_order() {
        let id = |extent| ExtentId { region: 0, extent: ExtentIndex(extent) };
        let run = |start, count| WorkingSetRun { region: 0, start: ExtentIndex(start), count };
        assert_eq!(runs(&[id(7), id(8), id(3), id(9), id(10)]), [run(7, 2), run(3, 1), run(9, 2)]);
        assert_eq!(runs(&[]), []);
    }
}
