//! Images that this node is telling the cluster of. Until it has learned that they are the cluster's, what its own, older view of the
//! state says of them is no reason to let go of one: another node may have been told to read it from here by then.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use control::State;
use control::state::{Holder, ImageKey};
use types::{Epoch, NodeId};

/// What was told and not heard of again in this time did not get there, or is over since.
const LASTS: Duration = Duration::from_secs(30);

/// See the module.
#[derive(Default)]
pub(super) struct Claims(Mutex<BTreeMap<ImageKey, Claim>>);

struct Claim {
    since: Instant,
    /// Of the state as this node knew it then: what it says later is said of the claim.
    epoch: Epoch,
}

impl Claims {
    /// Before the cluster is told.
    pub(super) fn add(&self, key: ImageKey, epoch: Epoch) {
        self.lock().insert(key, Claim { since: Instant::now(), epoch });
    }

    /// The cluster has refused it.
    pub(super) fn remove(&self, key: &ImageKey) {
        self.lock().remove(key);
    }

    pub(super) fn contains(&self, key: &ImageKey) -> bool {
        self.lock().contains_key(key)
    }

    /// Those of which this view of the state does not know yet. One that it has this node read from others is none of them, and not
    /// settled either: an order to let go of that may stand before the claim in the log.
    pub(super) fn open(&self, state: &State, node: NodeId) -> BTreeSet<ImageKey> {
        let holder = |key: &ImageKey| state.images.get(key).and_then(|image| image.holders.get(&node));
        let mut claims = self.lock();
        let is_older = |holder: &Holder, claim: &Claim| match holder.is_kept() {
            true => !holder.is_settled(),
            false => holder.epoch <= claim.epoch,
        };
        claims.retain(|key, claim| claim.since.elapsed() < LASTS && holder(key).is_none_or(|holder| is_older(holder, claim)));
        claims.keys().filter(|key| !holder(key).is_some_and(Holder::is_kept)).cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ImageKey, Claim>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use control::state::{Hold, Image, ImageFacts};
    use types::{CpuProfile, Digest, Tenant};
    use uuid::Uuid;

    use super::*;

    #[test]
    fn a_claim_is_open_until_the_state_says_that_the_image_is_kept_here() {
        let (claims, node) = (Claims::default(), NodeId::from_uuid(Uuid::from_u128(1)));
        let key = ImageKey { tenant: Tenant::default_tenant(), digest: Digest::of(b"image") };
        let with_percent = |percent, hold, epoch| {
            let cpuid = Digest::of(b"cpuid");
            let profile = CpuProfile { vendor: "FakeVendor12".to_owned(), family: 1, model: 1, cpuid, tsc_khz: 1_000_000 };
            let facts = ImageFacts { profile, data_bytes: 1, working_set_bytes: 1, dirty_bytes: 1 };
            let holder = Holder { epoch: Epoch(epoch), percent, sources: Vec::new(), hold };
            let image = Image { facts, holders: BTreeMap::from([(node, holder)]), stranded: None, unneeded: None };
            State { images: BTreeMap::from([(key.clone(), image)]), ..State::default() }
        };
        let with = |hold, epoch| with_percent(100, hold, epoch);
        claims.add(key.clone(), Epoch(7));
        assert!(claims.open(&with_percent(50, Hold::Kept, 7), node).is_empty(), "known, as one that is being read");
        assert!(claims.contains(&key), "it may be let go of as that before the cluster hears that all of it is here");
        for older in [State::default(), with(Hold::LetGo, 7)] {
            assert_eq!(claims.open(&older, node), BTreeSet::from([key.clone()]));
        }
        assert!(claims.contains(&key));
        assert!(claims.open(&with(Hold::Kept, 8), node).is_empty());
        assert!(!claims.contains(&key), "the log decides from here on");
        claims.add(key.clone(), Epoch(7));
        assert!(claims.open(&with(Hold::LetGo, 9), node).is_empty(), "it was known, and is let go of since");
        claims.add(key.clone(), Epoch(9));
        claims.remove(&key);
        assert!(claims.open(&State::default(), node).is_empty());
    }
}
