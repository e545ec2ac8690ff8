//! Images that this node is telling the cluster of. Until it has learned that they are the cluster's, what its own, older view of the
//! state says of them is no reason to let go of one: another node may have been told to read it from here by then.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use control::State;
use control::state::{Holder, ImageKey};
use types::NodeId;

/// What was told and not heard of again in this time did not get there, or is over since.
const LASTS: Duration = Duration::from_secs(30);

/// See the module.
#[derive(Default)]
pub(super) struct Claims(Mutex<BTreeMap<ImageKey, Instant>>);

impl Claims {
    /// Before the cluster is told.
    pub(super) fn add(&self, key: ImageKey) {
        self.lock().insert(key, Instant::now());
    }

    /// The cluster has refused it.
    pub(super) fn remove(&self, key: &ImageKey) {
        self.lock().remove(key);
    }

    pub(super) fn contains(&self, key: &ImageKey) -> bool {
        self.lock().contains_key(key)
    }

    /// Those of which this view of the state does not know yet.
    pub(super) fn open(&self, state: &State, node: NodeId) -> BTreeSet<ImageKey> {
        let holder = |key: &ImageKey| state.images.get(key).and_then(|image| image.holders.get(&node));
        let mut claims = self.lock();
        claims.retain(|key, since| since.elapsed() < LASTS && !holder(key).is_some_and(Holder::is_kept));
        claims.keys().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ImageKey, Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use control::state::{Hold, Image, ImageFacts};
    use types::{CpuProfile, Digest, Epoch, Tenant};
    use uuid::Uuid;

    use super::*;

    #[test]
    fn a_claim_is_open_until_the_state_says_that_the_image_is_kept_here() {
        let (claims, node) = (Claims::default(), NodeId::from_uuid(Uuid::from_u128(1)));
        let key = ImageKey { tenant: Tenant::default_tenant(), digest: Digest::of(b"image") };
        let with = |hold| {
            let cpuid = Digest::of(b"cpuid");
            let profile = CpuProfile { vendor: "FakeVendor12".to_owned(), family: 1, model: 1, cpuid, tsc_khz: 1_000_000 };
            let facts = ImageFacts { profile, data_bytes: 1, working_set_bytes: 1, dirty_bytes: 1 };
            let holder = Holder { epoch: Epoch(1), percent: 100, sources: Vec::new(), hold };
            let image = Image { facts, holders: BTreeMap::from([(node, holder)]), stranded: None, unneeded: None };
            State { images: BTreeMap::from([(key.clone(), image)]), ..State::default() }
        };
        claims.add(key.clone());
        for older in [State::default(), with(Hold::LetGo)] {
            assert_eq!(claims.open(&older, node), BTreeSet::from([key.clone()]));
        }
        assert!(claims.contains(&key));
        assert!(claims.open(&with(Hold::Kept), node).is_empty());
        assert!(!claims.contains(&key), "the log decides from here on");
        claims.add(key.clone());
        claims.remove(&key);
        assert!(claims.open(&State::default(), node).is_empty());
    }
}
