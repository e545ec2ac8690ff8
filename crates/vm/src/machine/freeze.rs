//! Freeze: an image of one instant of a machine, running or not.
//!
//! ```text
//! first parent     rest ─▶ capture ─▶ map its memfd privately ─▶ seal ─▶ resume          no copy
//! child            rest ─▶ capture ─▶ scan its private pages ─▶ fork the copier ─▶ resume ─▶ copier writes ─▶ seal
//! ```
//!
//! What can fail is done before the point of no return, and the machine goes on as it was. After a freeze the first parent is
//! an ordinary child of its own image.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;
use types::manifest::{WORKING_SET_RUNS_MAX, WorkingSetRun};
use types::{ExtentIndex, ExtentMap, LayerIndex, PAGE_SIZE, PageIndex, Reason, Run, Source};

use super::state::{self, MachineState, StateError};
use super::{Backing, Ended, Machine, PauseError};
use crate::host::Host;
use crate::image::Image;
use crate::image::memfd;
use crate::sys::copier::{self, Copier, CopyJob, Turn};
use crate::sys::pagemap::{scan_private, scan_touched};
use crate::sys::slot::{Content, Piece};

/// An image and what it cost.
#[derive(Debug)]
pub struct Frozen {
    /// Sealed and complete.
    pub image: Arc<Image>,
    /// The costs.
    pub report: FreezeReport,
}

/// The costs of a freeze.
#[derive(Clone, Copy, Debug, Default)]
pub struct FreezeReport {
    /// From the order to rest until the order to run. What a vCPU saw of it, with its way back to its core:
    /// [`Machine::last_stall`].
    pub stall: Duration,
    /// Of the stall: until every vCPU had come to rest.
    pub rest: Duration,
    /// Of the stall: reading registers and devices.
    pub capture: Duration,
    /// Of the stall: finding the touched pages.
    pub scan: Duration,
    /// Of the stall: forking the copier, or changing the first parent's mapping.
    pub instant: Duration,
    /// After the stall: until the copier had written everything.
    pub copy: Duration,
    /// Pages that the machine had written since it was forked; 0 for a first parent, where nobody counts.
    pub dirty_pages: u64,
    /// Extents that were copied into the image's own layer; 0 for a first parent.
    pub copied_extents: u64,
}

/// Why no image was made. The machine goes on as it was, unless it had ended.
#[derive(Debug, Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum FreezeError {
    #[error(transparent)]
    Pause(#[from] PauseError),
    #[error("the machine has ended ({0})")]
    Ended(Ended),
    #[error(transparent)]
    State(#[from] StateError),
    #[error("{step} failed: {source}")]
    Step { step: &'static str, source: io::Error },
}

impl FreezeError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Pause(_) => "look for what keeps its pages away, then fork again from its image",
            Self::Ended(_) => "fork again from its image",
            Self::State(error) => error.remedy(),
            Self::Step { source, .. } => match source.raw_os_error() {
                Some(libc::ENOMEM | libc::ENOSPC) => "end other machines: the host's memory is full",
                Some(libc::EMFILE | libc::ENFILE) => "raise the limit on open files (ulimit -n, fs.file-max)",
                Some(libc::ENOTTY) => "use Linux 6.7 or newer (PAGEMAP_SCAN)",
                _ => "look for its cause in the kernel log",
            },
        }
    }
}

/// What a copier copies of a child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Copied {
    /// Every extent in which it has written, whole, and what the map merges with them.
    Extents,
    /// The pages that it has written, and nothing of the image beneath, which may be absent; in the pause, since a process that
    /// was forked for it would have that memory without the watch over it. The map stays that of the image; the new layer's
    /// data says what was copied.
    Pages,
}

/// A freeze whose instant has been taken: the machine goes on, and the image is being completed.
#[derive(Debug)]
#[must_use = "the image is only there when it is finished"]
pub struct Freezing {
    instant: Taken,
    image: Arc<Image>,
}

/// What was taken at the instant: all of an image but the layers themselves.
#[derive(Debug)]
#[must_use = "the touched extents are only there when the copy is finished"]
pub(crate) struct Taken {
    pub(crate) state: MachineState,
    /// For each region, over the layers of the image that the machine rests on, and the new one.
    pub(crate) maps: Vec<ExtentMap>,
    report: FreezeReport,
    began_copy: Instant,
    /// None where nothing is copied.
    copier: Option<Copier>,
}

impl Taken {
    /// What becomes readable when the copy may be finished: see [`Copier::descriptors`].
    pub(crate) fn copier(&self) -> Option<&Copier> {
        self.copier.as_ref()
    }

    /// Waits until the touched extents are copied.
    pub(crate) fn finish_copy(&mut self) -> Result<FreezeReport, FreezeError> {
        if let Some(copier) = self.copier.take() {
            copier.finish().map_err(step("copying the touched extents"))?;
            failpoint!("freeze.copy", |source| FreezeError::Step { step: "copying the touched extents", source });
            self.report.copy = self.began_copy.elapsed();
        }
        Ok(self.report)
    }
}

impl Freezing {
    /// Waits until the image is complete, and seals it.
    ///
    /// # Errors
    /// [`FreezeError::Step`]; the machine is not concerned.
    pub fn finish(self) -> Result<Frozen, FreezeError> {
        let Self { mut instant, image } = self;
        let report = instant.finish_copy()?;
        image.seal().map_err(step("sealing the image"))?;
        Ok(Frozen { image, report })
    }
}

impl Machine {
    /// Makes an image of this instant. The machine is paused for it if it runs, and goes on before the image is complete; the
    /// call returns when it is.
    ///
    /// # Errors
    /// [`FreezeError`]; see there.
    pub fn freeze(&mut self, host: &Host) -> Result<Frozen, FreezeError> {
        self.begin_freeze(host)?.finish()
    }

    /// The first part of [`Machine::freeze`], which returns as soon as the machine goes on.
    ///
    /// # Errors
    /// [`FreezeError`]; see there.
    pub fn begin_freeze(&mut self, host: &Host) -> Result<Freezing, FreezeError> {
        let base = self.image().cloned();
        let layers = match &base {
            None => Vec::new(),
            Some(_) => memfd::new_layers(self.class).map_err(step("memfd_create"))?,
        };
        let instant = self.take_instant(host, &layers, Copied::Extents)?;
        let image = match base {
            None => Arc::clone(self.image().expect("a first parent that was frozen rests on its image")),
            Some(base) => {
                let (maps, state) = (instant.maps.clone(), instant.state.clone());
                Arc::new(Image::branched(&base, host.cpu().clone(), state, maps, layers, self.identity_page))
            }
        };
        Ok(Freezing { instant, image })
    }

    /// Takes the instant of an image, into `new_layers` where the machine rests on an image already: one for each region, empty.
    pub(crate) fn take_instant(&mut self, host: &Host, new_layers: &[File], copied: Copied) -> Result<Taken, FreezeError> {
        if let Some(ended) = self.ended() {
            return Err(FreezeError::Ended(ended));
        }
        match &self.backing {
            Backing::Own(memfds) => {
                let layers: io::Result<Vec<File>> = memfds.iter().map(File::try_clone).collect();
                self.freeze_in_place(host, layers.map_err(step("duplicating a descriptor"))?)
            }
            Backing::Image(base) => {
                let base = Arc::clone(base);
                self.freeze_by_copier(host, &base, new_layers, copied)
            }
        }
    }

    fn freeze_in_place(&mut self, host: &Host, layers: Vec<File>) -> Result<Taken, FreezeError> {
        // Short holes become stored zeros, so that no child's access can make the image grow. Most of that is done while the
        // guest still runs; in the pause only what it touched meanwhile changes.
        let filled: io::Result<Vec<ExtentMap>> = layers.iter().map(|layer| fill_short_holes(layer, None)).collect();
        let filled = filled.map_err(step("storing short runs of zeros"))?;
        let mut pause = Pause::begin(self)?;
        let state = pause.capture(host, self)?;
        let maps: io::Result<Vec<ExtentMap>> =
            layers.iter().zip(&filled).map(|(layer, filled)| fill_short_holes(layer, Some(filled))).collect();
        let maps = maps.map_err(step("storing short runs of zeros"))?;
        pause.report.scan = pause.lap();
        if let Err(source) = self.map_privately(&maps, &layers) {
            self.map_shared_again(&layers);
            return Err(FreezeError::Step { step: "mapping the image", source });
        }
        let image = Image::first(host.cpu().clone(), state.clone(), self.class, maps.clone(), layers, self.identity_page);
        let sealed = image.seal();
        // From the new mapping on this is what the machine rests on, sealed or not: nobody else writes to these memfds.
        self.backing = Backing::Image(Arc::new(image));
        sealed.map_err(step("sealing the image"))?;
        pause.report.instant = pause.lap();
        Ok(Taken { state, maps, report: pause.end(), began_copy: Instant::now(), copier: None })
    }

    fn freeze_by_copier(
        &mut self,
        host: &Host,
        base: &Arc<Image>,
        new_layers: &[File],
        copied: Copied,
    ) -> Result<Taken, FreezeError> {
        assert_eq!(new_layers.len(), base.regions().len(), "a new layer for each region");
        let turn = Turn::wait();
        let mut pause = Pause::begin(self)?;
        let state = pause.capture(host, self)?;
        let mut maps = Vec::with_capacity(new_layers.len());
        let (mut jobs, mut inherited) = (Vec::new(), Vec::new());
        for (number, (region, layer)) in base.regions().iter().zip(new_layers).enumerate() {
            let mut pages = Vec::new();
            let (touched, dirty_pages) = self.touched_extents(host, number, &mut pages).map_err(step("PAGEMAP_SCAN"))?;
            pause.report.dirty_pages += dirty_pages;
            let overlay = region.map().overlay(&touched, region.next_layer());
            let job = |at: u64, bytes: u64| {
                let len = usize::try_from(bytes).expect("64-bit host");
                CopyJob { from: self.memory.slot_address(number, at), len, to: layer.as_fd(), at }
            };
            let of_extents = |extents: &Range<u32>| {
                job(u64::from(extents.start) * types::EXTENT_SIZE, extents.len() as u64 * types::EXTENT_SIZE)
            };
            // By extents in any case: as many pieces of a mapping as there are ranges.
            inherited.extend(overlay.copied.iter().map(of_extents).map(|job| (job.from, job.len)));
            match copied {
                Copied::Extents => {
                    pause.report.copied_extents += overlay.copied.iter().map(|extents| extents.len() as u64).sum::<u64>();
                    jobs.extend(overlay.copied.iter().map(of_extents));
                    maps.push(overlay.map);
                }
                Copied::Pages => {
                    let of_pages = |pages: &Range<u64>| job(pages.start * PAGE_SIZE, (pages.end - pages.start) * PAGE_SIZE);
                    jobs.extend(pages.iter().map(of_pages));
                    maps.push(region.map().clone());
                }
            }
        }
        pause.report.scan = pause.lap();
        failpoint!("freeze.copier", |source| FreezeError::Step { step: "forking the copier", source });
        let copier = match copied {
            Copied::Extents => Some(turn.start(&self.memory, &inherited, &jobs).map_err(step("forking the copier"))?),
            Copied::Pages => {
                copier::copy_in_place(&self.memory, &jobs).map_err(step("copying the touched pages"))?;
                None
            }
        };
        pause.report.instant = pause.lap();
        Ok(Taken { state, maps, report: pause.end(), began_copy: Instant::now(), copier })
    }

    /// The extents of a region in which the machine has private pages, ascending and disjoint, and the number of those pages,
    /// which are added to `private`.
    fn touched_extents(&self, host: &Host, region: usize, private: &mut Vec<Range<u64>>) -> io::Result<(Vec<Range<u32>>, u64)> {
        let mut touched: Vec<Range<u32>> = Vec::new();
        let mut dirty_pages = 0;
        let slot = &self.memory.slots()[region].1;
        scan_private(&host.pagemap, slot.start(), slot.len() as u64, |pages| {
            dirty_pages += pages.end - pages.start;
            let extents = PageIndex(pages.start).extent().0..PageIndex(pages.end - 1).extent().0 + 1;
            match touched.last_mut() {
                Some(last) if extents.start <= last.end => last.end = last.end.max(extents.end),
                _ => touched.push(extents),
            }
            private.push(pages);
        })?;
        Ok((touched, dirty_pages))
    }

    /// The extents that the machine has touched so far, by reading or writing, in at most as many runs as a head may have: the
    /// nearest are joined.
    pub(crate) fn touched(&self, host: &Host) -> io::Result<Vec<WorkingSetRun>> {
        let mut runs: Vec<WorkingSetRun> = Vec::new();
        for (region, (_, slot)) in (0u8..).zip(self.memory.slots()) {
            scan_touched(&host.pagemap, slot.start(), slot.len() as u64, |pages| {
                let (start, end) = (PageIndex(pages.start).extent(), PageIndex(pages.end - 1).extent().0 + 1);
                match runs.last_mut() {
                    Some(last) if last.region == region && start.0 <= last.start.0 + last.count => {
                        last.count = last.count.max(end - last.start.0);
                    }
                    _ => runs.push(WorkingSetRun { region, start, count: end - start.0 }),
                }
            })?;
        }
        let mut gap = 1;
        while runs.len() > WORKING_SET_RUNS_MAX {
            let mut joined: Vec<WorkingSetRun> = Vec::with_capacity(runs.len());
            for run in runs {
                match joined.last_mut() {
                    Some(last) if last.region == run.region && run.start.0 <= last.start.0 + last.count + gap => {
                        last.count = run.start.0 + run.count - last.start.0;
                    }
                    _ => joined.push(run),
                }
            }
            (runs, gap) = (joined, gap * 2);
        }
        Ok(runs)
    }

    /// Maps each region of a first parent as its children will see it.
    fn map_privately(&mut self, maps: &[ExtentMap], layers: &[File]) -> io::Result<()> {
        for (((_, slot), map), layer) in self.memory.slots_mut().iter_mut().zip(maps).zip(layers) {
            slot.map(map.runs().iter().map(|run| Piece {
                bytes: run.bytes(),
                content: match run.source {
                    Source::Zero => Content::Zero,
                    Source::Layer(_) => Content::Private(layer.as_fd()),
                },
            }))?;
            failpoint!("freeze.map", |source| source);
        }
        Ok(())
    }

    /// Takes back a [`Machine::map_privately`] that failed half-way: nothing has been written since, so nothing is lost. A
    /// machine whose memory cannot be mapped either way has ended.
    fn map_shared_again(&mut self, layers: &[File]) {
        for ((_, slot), layer) in self.memory.slots_mut().iter_mut().zip(layers) {
            let bytes = 0..slot.len() as u64;
            if let Err(error) = slot.map([Piece { bytes, content: Content::Shared(layer.as_fd()) }]) {
                let detail = format!("its memory could not be mapped again after a failed freeze ({error})");
                self.frame.monitor.end(Ended { reason: Reason::Oom, detail });
                return;
            }
        }
    }
}

/// A machine at rest for a freeze. Dropping it lets the guest go on, so that no error path forgets to.
struct Pause {
    monitor: Option<Arc<super::monitor::Monitor>>,
    began: Instant,
    lap: Instant,
    report: FreezeReport,
}

impl Pause {
    fn begin(machine: &Machine) -> Result<Self, FreezeError> {
        let began = Instant::now();
        machine.rest()?;
        let monitor = machine.running.then(|| Arc::clone(&machine.frame.monitor));
        let mut pause = Self { monitor, began, lap: began, report: FreezeReport::default() };
        pause.report.rest = pause.lap();
        match machine.ended() {
            Some(ended) => Err(FreezeError::Ended(ended)),
            None => Ok(pause),
        }
    }

    fn capture(&mut self, host: &Host, machine: &Machine) -> Result<MachineState, StateError> {
        let state = state::capture(host, &machine.frame.core)?;
        self.report.capture = self.lap();
        Ok(state)
    }

    /// Time since the last lap.
    fn lap(&mut self) -> Duration {
        let now = Instant::now();
        now - std::mem::replace(&mut self.lap, now)
    }

    fn end(mut self) -> FreezeReport {
        self.report.stall = self.began.elapsed();
        self.report
    }
}

impl Drop for Pause {
    fn drop(&mut self) {
        if let Some(monitor) = &self.monitor {
            monitor.run();
        }
    }
}

/// Makes sure that only runs of [`types::extents::ZERO_RUN_EXTENTS`] and more are holes, and returns the map that says so. What
/// an earlier call has filled, by the map that it returned, is not gone through again.
fn fill_short_holes(memfd: &File, filled: Option<&ExtentMap>) -> io::Result<ExtentMap> {
    let extents = memfd::data_extents(memfd)?;
    let count = u32::try_from(memfd::size(memfd)? / types::EXTENT_SIZE).expect("at most 32 GiB");
    let map = ExtentMap::from_data(count, &extents, LayerIndex(0));
    let new: Vec<Range<u32>> = match filled {
        None => map.data_runs().map(Run::extents).collect(),
        Some(filled) => {
            let holes = || filled.runs().iter().filter(|run| run.source == Source::Zero);
            let overlap = |run: &Run, hole: &Run| run.start.max(hole.start).0..run.extents().end.min(hole.extents().end);
            map.data_runs().flat_map(|run| holes().map(|hole| overlap(run, hole))).filter(|range| !range.is_empty()).collect()
        }
    };
    for extents in new {
        memfd::fill_holes(memfd, ExtentIndex(extents.start).byte_offset()..ExtentIndex(extents.end).byte_offset())?;
    }
    Ok(map)
}

fn step(step: &'static str) -> impl Fn(io::Error) -> FreezeError {
    move |source| FreezeError::Step { step, source }
}
