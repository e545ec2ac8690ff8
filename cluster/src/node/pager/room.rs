//! Memory for images that have not settled: what was fetched first goes first, and is fetched again when it is touched.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use pages::transfer::ExtentId;
use types::{EXTENT_SIZE, ExtentIndex, Reason};

use super::fetch::Fetch;

/// Before memory is looked for again after it was in vain.
const IN_VAIN: Duration = Duration::from_secs(1);
/// Before another child is ended for lack of memory.
const RELIEF: Duration = Duration::from_millis(500);
/// Extents that are given back at once.
const BATCH: usize = 256;

impl Fetch {
    /// Gives memory back if the image takes more than it may.
    pub(super) fn keep_budget(&self) {
        let Some(most) = self.shared.settings.host_image_bytes else { return };
        let now = self.shared.now();
        // Looking costs a look at every child's memory.
        let was_in_vain = self.found_none.get().is_some_and(|at| now.saturating_sub(at) < IN_VAIN);
        if !was_in_vain && self.shared.resident_bytes() > most {
            let batch = usize::try_from(most / EXTENT_SIZE / 4).unwrap_or(BATCH).clamp(1, BATCH);
            // What has to be fetched again at once is not worth fetching ahead.
            self.state.borrow_mut().transfer.stream(now, false);
            self.has_room.set(false);
            tracing::debug!(image = %self.key.1, "over the budget");
            if self.evict_somewhere(batch) == 0 {
                self.found_none.set(Some(now));
            }
        }
    }

    /// Goes on with what was stopped for lack of memory, when all of it fits. Less would be fetched only to be given back.
    pub(super) fn stream_if_room(self: &Rc<Self>) {
        let Some(most) = self.shared.settings.host_image_bytes else { return };
        if self.has_room.get() {
            return;
        }
        let own = self.host_image.resident();
        if self.shared.resident_bytes() + (own.data_bytes - own.resident_bytes) <= most {
            self.has_room.set(true);
            let now = self.shared.now();
            self.state.borrow_mut().transfer.stream(now, self.shared.settings.streams);
            self.pump();
        }
    }

    /// Makes room for one extent where the host has none left: gives memory back, or ends the child that came last. Says whether
    /// it is worth trying again at once.
    pub(super) fn make_room(&self) -> bool {
        let now = self.shared.now();
        self.short_since.set(Some(now));
        if self.evict_somewhere(BATCH) > 0 {
            return true;
        }
        // What one that was ended had takes a moment to come back.
        if self.relieved.get().is_some_and(|at| now.saturating_sub(at) < RELIEF) {
            return false;
        }
        self.relieved.set(Some(now));
        let newest = self.host_image.children().pop();
        if let Some(child) = &newest {
            let detail = "the host has no memory for the pages that it waits for".to_owned();
            tracing::warn!(machine = %child.machine(), detail, "ended");
            child.end(vm::Ended { reason: Reason::Oom, detail });
        }
        false
    }

    /// Gives back up to so many extents of the largest image that has any to give. Says how many.
    fn evict_somewhere(&self, count: usize) -> usize {
        let largest = self.shared.largest();
        largest.iter().map(|fetch| fetch.evict(count)).find(|evicted| *evicted > 0).unwrap_or(0)
    }

    /// Gives back up to so many extents, oldest first. Says how many.
    fn evict(&self, count: usize) -> usize {
        let oldest: Vec<ExtentId> = {
            let mut state = self.state.borrow_mut();
            let count = count.min(state.published.len());
            state.published.drain(..count).collect()
        };
        let mut by_region: BTreeMap<u8, Vec<u32>> = BTreeMap::new();
        for id in &oldest {
            by_region.entry(id.region).or_default().push(id.extent.0);
        }
        let mut evicted = 0;
        for (region, mut extents) in by_region {
            extents.sort_unstable();
            let gone = match self.host_image.evict(usize::from(region), &extents) {
                Ok(gone) => gone,
                Err(error) => {
                    tracing::warn!(image = %self.key.1, %error, "memory was not given back");
                    continue;
                }
            };
            evicted += gone.len();
            let now = self.shared.now();
            let mut state = self.state.borrow_mut();
            let kept = extents.into_iter().map(ExtentIndex).filter(|extent| !gone.contains(extent));
            let kept: Vec<ExtentId> = kept.map(|extent| ExtentId { region, extent }).collect();
            state.published.extend(kept);
            for extent in gone {
                state.transfer.is_absent_again(now, ExtentId { region, extent });
            }
        }
        evicted
    }
}
