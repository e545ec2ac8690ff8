//! Who reads an image from whom: bulk goes down a tree, each of whose nodes has at most [`DEGREE`] first readers and as few between
//! itself and one that has it all as there can be.

use std::collections::{BTreeMap, BTreeSet};

use types::NodeId;

use super::{DEGREE, SOURCES_MAX, ZONE};
use crate::apply::leads_to_all;
use crate::state::{Image, Life, State};

/// Who reads from whom.
pub(super) struct Tree<'a> {
    state: &'a State,
    /// Those that may be read from, and how many read from each first.
    pub(super) readers: BTreeMap<NodeId, usize>,
    /// Those that have all of it, and may be read from.
    settled: BTreeSet<NodeId>,
    /// How many nodes each is from one that has all of it: what it is asked for, each of them asks the next for.
    depths: BTreeMap<NodeId, usize>,
    /// The best ones first: of all, and of each zone.
    all: BTreeSet<Rank>,
    zones: BTreeMap<&'a str, BTreeSet<Rank>>,
}

/// How well a node can be read from, the best first: with a place left, with all of the image, near one that has it, with few
/// readers. With all places taken the least busy gets one more.
type Rank = (usize, bool, usize, usize, NodeId);

impl<'a> Tree<'a> {
    pub(super) fn of(state: &'a State, image: &Image) -> Self {
        let is_up = |id: &NodeId| state.nodes.get(id).is_some_and(|node| node.life == Life::Up);
        let sources = image.holders.iter().filter(|(id, holder)| holder.is_kept() && is_up(id) && leads_to_all(image, **id));
        let mut readers: BTreeMap<NodeId, usize> = sources.map(|(id, _)| (*id, 0)).collect();
        for first in image.holders.values().filter_map(|holder| holder.sources.first()) {
            readers.entry(*first).and_modify(|readers| *readers += 1);
        }
        let settled = image.settled().filter(|id| readers.contains_key(id)).collect();
        let depths = readers.keys().map(|id| (*id, depth(image, *id))).collect();
        let mut tree = Self { state, readers, settled, depths, all: BTreeSet::new(), zones: BTreeMap::new() };
        let sources: Vec<NodeId> = tree.readers.keys().copied().collect();
        sources.into_iter().for_each(|id| tree.rank(id));
        tree
    }

    fn rank_of(&self, id: NodeId) -> Rank {
        let readers = self.readers[&id];
        (readers.max(DEGREE - 1), !self.settled.contains(&id), self.depths[&id], readers, id)
    }

    fn zone_of(&self, id: NodeId) -> Option<&'a str> {
        self.state.nodes.get(&id)?.facts.labels.get(ZONE).map(String::as_str)
    }

    fn rank(&mut self, id: NodeId) {
        let rank = self.rank_of(id);
        self.all.insert(rank);
        if let Some(zone) = self.zone_of(id) {
            self.zones.entry(zone).or_default().insert(rank);
        }
    }

    fn add_reader(&mut self, id: NodeId) {
        let before = self.rank_of(id);
        self.all.remove(&before);
        if let Some(ranks) = self.zone_of(id).and_then(|zone| self.zones.get_mut(zone)) {
            ranks.remove(&before);
        }
        *self.readers.get_mut(&id).expect("it is ranked") += 1;
        self.rank(id);
    }

    /// From whom a new one reads; from then on others may read from it.
    pub(super) fn sources_for(&mut self, id: NodeId) -> Vec<NodeId> {
        let zone = self.zone_of(id);
        let near = zone.and_then(|zone| self.zones.get(zone)).and_then(BTreeSet::first);
        // Of two that are alike the near one: whether it is near weighs less than whether it has a place and all of the image.
        let weigh = |rank: &Rank| {
            let (places, is_arriving, depth, readers, source) = *rank;
            (places, is_arriving, zone.is_none() || self.zone_of(source) != zone, depth, readers, source)
        };
        let Some(best) = near.into_iter().chain(self.all.first()).min_by_key(|rank| weigh(rank)) else { return Vec::new() };
        let first = best.4;
        self.add_reader(first);
        self.readers.insert(id, 0);
        self.depths.insert(id, self.depths[&first] + 1);
        self.rank(id);
        let fallbacks = self.settled.iter().copied().filter(|source| *source != first);
        std::iter::once(first).chain(fallbacks).take(SOURCES_MAX).collect()
    }
}

/// How many nodes a holder is from one that has all of the image.
fn depth(image: &Image, id: NodeId) -> usize {
    let first = |id: &NodeId| image.holders.get(id).and_then(|holder| holder.sources.first());
    std::iter::successors(first(&id), |id| first(id)).take(image.holders.len()).count()
}
