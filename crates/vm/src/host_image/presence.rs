//! Which pages of a region are in its memfd because the pager put them there. Everybody reads it; only the pager writes.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering};

use types::ExtentIndex;

/// All pages of an extent.
const WHOLE: u16 = u16::MAX;

/// The pages of a region.
#[derive(Debug)]
pub(crate) struct Presence {
    /// A bit for each page of each extent.
    extents: Box<[AtomicU16]>,
    whole: AtomicU32,
    pages: AtomicU64,
    /// How many extents have gone again.
    evictions: AtomicU64,
    is_settled: AtomicBool,
}

impl Presence {
    /// Nothing is there.
    pub(crate) fn none(extents: u32) -> Self {
        let extents = (0..extents).map(|_| AtomicU16::new(0)).collect();
        Self {
            extents,
            whole: AtomicU32::new(0),
            pages: AtomicU64::new(0),
            evictions: AtomicU64::new(0),
            is_settled: AtomicBool::new(false),
        }
    }

    /// The pages of an extent that are there, a bit each.
    pub(crate) fn pages(&self, extent: ExtentIndex) -> u16 {
        self.extents[extent.0 as usize].load(Ordering::Acquire)
    }

    /// Whether all of an extent is there.
    pub(crate) fn has(&self, extent: ExtentIndex) -> bool {
        self.pages(extent) == WHOLE
    }

    /// Whether all of these extents are there.
    pub(crate) fn has_all(&self, extents: Range<u32>) -> bool {
        extents.map(ExtentIndex).all(|extent| self.has(extent))
    }

    /// Changes when an extent goes: what was read between two equal values was there all the time.
    pub(crate) fn evictions(&self) -> u64 {
        self.evictions.load(Ordering::Acquire)
    }

    /// How many extents are there, whole.
    pub(crate) fn whole_count(&self) -> u32 {
        self.whole.load(Ordering::Relaxed)
    }

    /// How many pages are there.
    pub(crate) fn page_count(&self) -> u64 {
        self.pages.load(Ordering::Acquire)
    }

    /// Nothing will be absent again.
    pub(crate) fn is_settled(&self) -> bool {
        self.is_settled.load(Ordering::Acquire)
    }

    /// These pages are there now.
    pub(super) fn add(&self, extent: ExtentIndex, pages: u16) {
        let before = self.extents[extent.0 as usize].fetch_or(pages, Ordering::AcqRel);
        self.pages.fetch_add(u64::from((pages & !before).count_ones()), Ordering::AcqRel);
        if before != WHOLE && before | pages == WHOLE {
            self.whole.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// An extent is about to be gone.
    pub(super) fn remove(&self, extent: ExtentIndex) {
        self.evictions.fetch_add(1, Ordering::AcqRel);
        let before = self.extents[extent.0 as usize].swap(0, Ordering::AcqRel);
        self.pages.fetch_sub(u64::from(before.count_ones()), Ordering::AcqRel);
        if before == WHOLE {
            self.whole.fetch_sub(1, Ordering::Relaxed);
        }
    }

    pub(super) fn settle(&self) {
        self.is_settled.store(true, Ordering::Release);
    }
}
