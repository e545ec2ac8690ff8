//! Memory for images that have not settled: what was fetched first goes first, and is fetched again when it is touched.

use std::collections::BTreeMap;

use pages::transfer::ExtentId;
use types::{EXTENT_SIZE, ExtentIndex, Reason};

use super::fetch::Fetch;

/// Extents that are given back at once.
const BATCH: usize = 256;

impl Fetch {
    /// Gives memory back if the image takes more than it may.
    pub(super) fn keep_budget(&self) {
        let Some(most) = self.shared.settings.host_image_bytes else { return };
        if self.shared.resident_bytes() > most {
            let batch = usize::try_from(most / EXTENT_SIZE / 4).unwrap_or(BATCH).clamp(1, BATCH);
            // What has to be fetched again at once is not worth fetching ahead.
            let now = self.shared.now();
            self.state.borrow_mut().transfer.stream(now, false);
            self.evict(batch);
        }
    }

    /// Makes room for one extent where the host has none left: gives memory back, or ends the child that came last. Says whether
    /// it is worth trying again.
    pub(super) fn make_room(&self) -> bool {
        if self.evict(BATCH) > 0 {
            return true;
        }
        let newest = self.host_image.children().pop();
        if let Some(child) = &newest {
            let detail = "the host has no memory for the pages that it waits for".to_owned();
            tracing::warn!(machine = %child.machine(), detail, "ended");
            child.end(vm::Ended { reason: Reason::Oom, detail });
        }
        newest.is_some()
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
