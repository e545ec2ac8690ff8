//! The extent index: for each extent of a region, which layer of the image holds it.
//!
//! A layer is one memfd of the region's size, written once. An image made by freezing the first parent has one layer; each
//! branch adds one with the extents that were touched since. The index points **straight at** the layer, whatever the depth of
//! the branch, so a fork of a fork costs the same as a fork.
//!
//! ```text
//! extents   0 1 2 3 4 5 6 7 8 9 ...
//! layer 0   A A A A A A . . . .          . = zero run: no layer holds it, children map anonymous memory
//! layer 1       B B     B
//! runs      [0 x2][1 x2][0 x2][1 x1][zero x3 ...
//! ```
//!
//! Each run is one mapping (5-7 us) of every later fork, and the kernel refuses more than 65,530 or so mappings a process, so a
//! map has at most [`MAX_RUNS`]. [`ExtentMap::overlay`] keeps that bound by copying more than was touched: never wrong, only
//! larger.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::ExtentIndex;

/// The most runs that a region's map may have.
pub const MAX_RUNS: usize = 512;

/// The shortest hole (in extents, 2 MiB) that a freeze turns into a zero run. Shorter ones are stored as zeros, since a run
/// costs every later fork a mapping.
pub const ZERO_RUN_EXTENTS: u32 = 32;

/// An untouched gap of at most this many extents between two touched ones is copied with them: one copy of 64 KiB, once,
/// against two mappings in every later fork.
pub const MERGE_GAP_EXTENTS: u32 = 1;

/// The n-th layer of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LayerIndex(pub u16);

/// Where the bytes of a run are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Source {
    /// Nowhere: they are zero.
    Zero,
    /// In a layer, at the same offset as in the region.
    Layer(LayerIndex),
}

/// A range of extents with one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First extent.
    pub start: ExtentIndex,
    /// Number of extents, at least 1.
    pub count: u32,
    /// Where their bytes are.
    pub source: Source,
}

impl Run {
    /// The extents as a range of indexes.
    #[must_use]
    pub const fn extents(&self) -> Range<u32> {
        self.start.0..self.start.0 + self.count
    }

    /// The bytes as a range of offsets from the region's start.
    #[must_use]
    pub const fn bytes(&self) -> Range<u64> {
        self.start.byte_offset()..ExtentIndex(self.start.0 + self.count).byte_offset()
    }
}

/// The index of a region: runs that cover it without gap or overlap, no two neighbours with the same source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<RunOnTheWire>", into = "Vec<RunOnTheWire>")]
pub struct ExtentMap {
    runs: Vec<Run>,
}

/// What [`ExtentMap::overlay`] decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlay {
    /// The new map.
    pub map: ExtentMap,
    /// Extents that must be copied into the new layer: all that were touched, and whatever was merged with them. Ascending,
    /// disjoint, not adjacent.
    pub copied: Vec<Range<u32>>,
}

impl ExtentMap {
    /// Builds a map from run lengths and sources, in the order of the region.
    ///
    /// # Errors
    /// [`ExtentMapError`] if there is no run, an empty one, too many, two neighbours of one source, or more than 2^32 extents.
    pub fn from_lengths(lengths: impl IntoIterator<Item = (u32, Source)>) -> Result<Self, ExtentMapError> {
        let mut runs: Vec<Run> = Vec::new();
        let mut start = 0u32;
        for (count, source) in lengths {
            if runs.len() == MAX_RUNS {
                return Err(ExtentMapError::TooManyRuns);
            }
            if count == 0 {
                return Err(ExtentMapError::EmptyRun { at: start });
            }
            if runs.last().is_some_and(|last| last.source == source) {
                return Err(ExtentMapError::SplitRun { at: start });
            }
            runs.push(Run { start: ExtentIndex(start), count, source });
            start = start.checked_add(count).ok_or(ExtentMapError::TooLong)?;
        }
        if runs.is_empty() { Err(ExtentMapError::Empty) } else { Ok(Self { runs }) }
    }

    /// The map of a freshly frozen layer: `data` holds the extents with content (ascending, disjoint), the holes between them
    /// become zero runs where they are long enough; the longest of them, if the bound on runs does not allow all.
    ///
    /// # Panics
    /// If `count` is 0 or `data` reaches beyond it.
    #[must_use]
    pub fn from_data(count: u32, data: &[Range<u32>], layer: LayerIndex) -> Self {
        assert!(count > 0, "a region has at least one extent");
        assert!(data.last().is_none_or(|last| last.end <= count), "data beyond the region");
        let starts = std::iter::once(0).chain(data.iter().map(|range| range.end));
        let ends = data.iter().map(|range| range.start).chain(std::iter::once(count));
        let mut holes: Vec<Range<u32>> =
            starts.zip(ends).map(|(start, end)| start..end).filter(|hole| hole.len() >= ZERO_RUN_EXTENTS as usize).collect();
        // n zero runs make at most 2n + 1 runs in all.
        holes.sort_by_key(|hole| std::cmp::Reverse(hole.len()));
        holes.truncate((MAX_RUNS - 1) / 2);
        holes.sort_by_key(|hole| hole.start);
        let mut runs = Vec::with_capacity(2 * holes.len() + 1);
        let mut done = 0;
        for hole in holes.into_iter().chain(std::iter::once(count..count)) {
            for (range, source) in [(done..hole.start, Source::Layer(layer)), (hole.clone(), Source::Zero)] {
                if !range.is_empty() {
                    runs.push(Run { start: ExtentIndex(range.start), count: range.end - range.start, source });
                }
            }
            done = hole.end;
        }
        Self { runs }
    }

    /// Puts a new layer over this map that holds at least the `touched` extents (ascending, disjoint).
    ///
    /// Gaps of at most [`MERGE_GAP_EXTENTS`] between touched ranges join them. If the map would still have more than
    /// [`MAX_RUNS`] runs, the shortest untouched runs are copied too, as many as it takes; in the limit the whole region is,
    /// which is flattening.
    ///
    /// # Panics
    /// If `touched` reaches beyond the region or is not ascending, or this map uses `layer` already.
    #[must_use]
    pub fn overlay(&self, touched: &[Range<u32>], layer: LayerIndex) -> Overlay {
        assert!(!self.runs.iter().any(|run| run.source == Source::Layer(layer)), "layer {layer:?} is not new");
        let mut segments = self.cut(&join_close(touched), layer);
        while segments.len() > MAX_RUNS {
            // Each that is copied joins its neighbours, which takes away at most two. One whose neighbours are no copies
            // either takes away none yet, so more rounds may be due; each leaves fewer that are not copied.
            let mut untouched: Vec<usize> =
                (0..segments.len()).filter(|at| segments[*at].source != Source::Layer(layer)).collect();
            untouched.sort_by_key(|at| segments[*at].count);
            untouched.truncate((segments.len() - MAX_RUNS).div_ceil(2));
            for at in untouched {
                segments[at].source = Source::Layer(layer);
            }
            segments = coalesce(segments);
        }
        let copied = segments.iter().filter(|run| run.source == Source::Layer(layer)).map(Run::extents).collect();
        Overlay { map: Self { runs: segments }, copied }
    }

    /// [`ExtentMap::overlay`] that copies nothing but what was touched. `None` if the map would have too many runs.
    ///
    /// # Panics
    /// As there.
    #[must_use]
    pub fn overlay_exactly(&self, touched: &[Range<u32>], layer: LayerIndex) -> Option<Overlay> {
        assert!(!self.runs.iter().any(|run| run.source == Source::Layer(layer)), "layer {layer:?} is not new");
        let segments = self.cut(touched, layer);
        let copied = segments.iter().filter(|run| run.source == Source::Layer(layer)).map(Run::extents).collect();
        (segments.len() <= MAX_RUNS).then_some(Overlay { map: Self { runs: segments }, copied })
    }

    /// The runs, in the order of the region.
    #[must_use]
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Number of extents in the region.
    #[must_use]
    pub fn extent_count(&self) -> u32 {
        self.runs.last().map_or(0, |last| last.extents().end)
    }

    /// Number of extents that some layer holds.
    #[must_use]
    pub fn data_extent_count(&self) -> u32 {
        self.data_runs().map(|run| run.count).sum()
    }

    /// The runs that a layer holds.
    pub fn data_runs(&self) -> impl Iterator<Item = &Run> {
        self.runs.iter().filter(|run| run.source != Source::Zero)
    }

    /// Where `extent` is, or `None` beyond the region.
    #[must_use]
    pub fn source_of(&self, extent: ExtentIndex) -> Option<Source> {
        let position = self.runs.partition_point(|run| run.extents().end <= extent.0);
        self.runs.get(position).map(|run| run.source)
    }

    /// The layers that some run uses, ascending.
    #[must_use]
    pub fn used_layers(&self) -> Vec<LayerIndex> {
        let mut used: Vec<_> = self
            .runs
            .iter()
            .filter_map(|run| match run.source {
                Source::Layer(layer) => Some(layer),
                Source::Zero => None,
            })
            .collect();
        used.sort_unstable();
        used.dedup();
        used
    }

    /// The same map with every layer's number replaced by what `renumber` says. Distinct layers must stay distinct.
    #[must_use]
    pub fn renumbered(&self, renumber: impl Fn(LayerIndex) -> LayerIndex) -> Self {
        let runs = self.runs.iter().map(|run| match run.source {
            Source::Layer(layer) => Run { source: Source::Layer(renumber(layer)), ..*run },
            Source::Zero => *run,
        });
        Self { runs: runs.collect() }
    }

    /// This map's runs with `touched` cut out of them and given to `layer`.
    fn cut(&self, touched: &[Range<u32>], layer: LayerIndex) -> Vec<Run> {
        let end = self.extent_count();
        let mut segments = Vec::with_capacity(self.runs.len() + 2 * touched.len());
        let mut base = self.runs.iter().copied().peekable();
        let mut done = 0;
        for range in touched.iter().cloned().chain(std::iter::once(end..end)) {
            assert!(range.start >= done && range.end <= end, "touched extents are not ascending within the region");
            // What of the base lies before this range.
            while let Some(run) = base.peek().copied().filter(|run| run.start.0 < range.start) {
                let from = run.start.0.max(done);
                let to = run.extents().end.min(range.start);
                if from < to {
                    segments.push(Run { start: ExtentIndex(from), count: to - from, source: run.source });
                }
                if run.extents().end > range.start {
                    break;
                }
                base.next();
            }
            if !range.is_empty() {
                let count = range.end - range.start;
                segments.push(Run { start: ExtentIndex(range.start), count, source: Source::Layer(layer) });
            }
            done = range.end;
        }
        coalesce(segments)
    }
}

/// Joins ranges whose gap is not worth a run of its own, and drops empty ones.
fn join_close(ranges: &[Range<u32>]) -> Vec<Range<u32>> {
    let mut joined: Vec<Range<u32>> = Vec::with_capacity(ranges.len());
    for range in ranges.iter().filter(|range| !range.is_empty()) {
        match joined.last_mut() {
            Some(last) if range.start - last.end <= MERGE_GAP_EXTENTS => last.end = range.end,
            _ => joined.push(range.clone()),
        }
    }
    joined
}

/// Joins neighbours with the same source.
fn coalesce(segments: Vec<Run>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::with_capacity(segments.len());
    for segment in segments {
        match runs.last_mut() {
            Some(last) if last.source == segment.source => last.count += segment.count,
            _ => runs.push(segment),
        }
    }
    runs
}

/// A run without its start, which the lengths before it give.
#[derive(Serialize, Deserialize)]
struct RunOnTheWire(u32, Source);

impl From<ExtentMap> for Vec<RunOnTheWire> {
    fn from(map: ExtentMap) -> Self {
        map.runs.iter().map(|run| RunOnTheWire(run.count, run.source)).collect()
    }
}

impl TryFrom<Vec<RunOnTheWire>> for ExtentMap {
    type Error = ExtentMapError;

    fn try_from(wire: Vec<RunOnTheWire>) -> Result<Self, Self::Error> {
        Self::from_lengths(wire.into_iter().map(|RunOnTheWire(count, source)| (count, source)))
    }
}

/// Why a list of runs is no extent map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ExtentMapError {
    /// No run at all.
    #[error("the extent map has no run")]
    Empty,
    /// A run of no extents.
    #[error("the extent map has an empty run at extent {at}")]
    EmptyRun {
        /// Where it would start.
        at: u32,
    },
    /// Two neighbours that should be one.
    #[error("the extent map has one run in two pieces at extent {at}")]
    SplitRun {
        /// Where the second piece starts.
        at: u32,
    },
    /// More than [`MAX_RUNS`].
    #[error("the extent map has more than 512 runs")]
    TooManyRuns,
    /// Extents beyond 2^32.
    #[error("the extent map covers more than 2^32 extents")]
    TooLong,
}
