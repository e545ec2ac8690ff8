//! What children are forked from, and what they touch.
//!
//! An image: the probe guest, the first half of its memory written with the probe's pattern, which no compressor makes smaller. A
//! working set: a tenth of the written pages in 64 runs, and one in a hundred as single pages in random order. The seed of both
//! is fixed, so that all hosts and all runs have the same.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Result, anyhow, ensure};
use types::{EXTENT_PAGES, MemorySize, PAGE_SIZE, PageIndex};
use vm::pool::Settings;
use vm::probe::{self, Command};
use vm::{Class, Pool};

use crate::{floor, proof};

const SEED: u64 = 0xFA4F;
const RUNS: u64 = 64;
const EPOCH: u64 = 1;

/// Images, by size; each is made once.
pub(super) struct Images {
    directory: tempfile::TempDir,
    made: RefCell<BTreeMap<u64, String>>,
}

impl Images {
    pub(super) fn new() -> Result<Self> {
        Ok(Self { directory: tempfile::tempdir()?, made: RefCell::default() })
    }

    /// Puts the image of so many MiB into a node's store: its name there.
    pub(super) fn put(&self, mib: u64, store: &Path) -> Result<String> {
        let name = format!("half-full-{mib}");
        let file = format!("{name}.img");
        if !self.made.borrow().contains_key(&mib) {
            crate::report::announce(&format!("an image of {mib} MiB"));
            save(mib, self.directory.path(), &file)?;
            self.made.borrow_mut().insert(mib, file.clone());
        }
        std::fs::copy(self.directory.path().join(&file), store.join(&file))?;
        Ok(name)
    }
}

fn save(mib: u64, directory: &Path, file: &str) -> Result<()> {
    let settings = Settings { shells_max: 0, ..Settings::new(std::env::current_exe()?, [OsString::from("zygote")]) };
    let failed = |error: vm::pool::PoolError| anyhow!("{error}; {}", error.remedy());
    let pool = Pool::open(floor::open_host()?, settings).map_err(failed)?;
    let parent = pool.boot_probe(Class::new(MemorySize::from_mib(mib)?, 1)?, proof::new_id()).map_err(failed)?;
    let (first, count) = written(mib)?;
    let [filled, ..] = parent.call(0, Command::Fill { first, count, epoch: EPOCH }).map_err(failed)?;
    ensure!(filled == count, "the parent filled {filled} of {count} pages");
    let image = parent.freeze().map_err(failed)?.image;
    let directory = File::open(directory)?;
    vm::image::save_in(&image, directory.as_fd(), file.as_ref(), |_, _| {})?;
    Ok(())
}

/// The pages that hold the pattern.
pub(super) fn written(mib: u64) -> Result<(PageIndex, u64)> {
    let memory = MemorySize::from_mib(mib)?;
    Ok((probe::first_work_page(), probe::work_pages(memory).min(memory.bytes() / PAGE_SIZE / 2)))
}

/// What a child is told to touch, and what it has to answer.
#[derive(Clone, Default)]
pub(super) struct WorkingSet {
    pub(super) commands: Vec<Command>,
    /// Sum of the bytes read, and pages.
    pub(super) expected: Vec<(u64, u64)>,
    /// Distinct pages.
    pub(super) pages: u64,
    /// Distinct extents.
    pub(super) extents: u64,
}

impl WorkingSet {
    /// That of the rows.
    pub(super) fn of(mib: u64) -> Result<Self> {
        let (first, count) = written(mib)?;
        let mut dice = fastrand::Rng::with_seed(SEED);
        let stripe = count / RUNS;
        let length = count / 10 / RUNS;
        let mut runs: Vec<Touch> =
            (0..RUNS).map(|run| Touch::run(first.0 + run * stripe + dice.u64(0..=stripe - length), length)).collect();
        dice.shuffle(&mut runs);
        let singles = count / 100;
        // A stride that is no multiple of an extent's pages, so that they lie anywhere in their extents.
        let stride = (count / singles - 1) | 1;
        let offset = dice.u64(0..count - stride * (singles - 1));
        runs.push(Touch { first: first.0 + offset, count: singles, stride, shuffle: Some(SEED) });
        Ok(Self::touching(&runs))
    }

    /// Not touched but written: what makes an image.
    pub(super) fn written_by(mib: u64) -> Result<Self> {
        let (first, count) = written(mib)?;
        let commands = vec![Command::Fill { first, count, epoch: EPOCH }];
        Ok(Self { commands, expected: vec![(count, 0)], pages: count, extents: count.div_ceil(EXTENT_PAGES) })
    }

    /// Single pages, each of another extent and by a command of its own, from the last written one down.
    pub(super) fn singles_from_the_end(mib: u64, count: u64) -> Result<Self> {
        let (first, written) = written(mib)?;
        let last = (first.0 + written - 1) / EXTENT_PAGES;
        let mut dice = fastrand::Rng::with_seed(SEED);
        let touches: Vec<Touch> =
            (0..count).map(|back| Touch::run((last - 2 * back) * EXTENT_PAGES + dice.u64(0..EXTENT_PAGES), 1)).collect();
        ensure!((last - 2 * count) * EXTENT_PAGES > first.0, "the image is too small for {count} faults");
        Ok(Self::touching(&touches))
    }

    fn touching(touches: &[Touch]) -> Self {
        let touched: BTreeSet<u64> = touches.iter().flat_map(Touch::pages).collect();
        let extents: BTreeSet<u64> = touched.iter().map(|page| page / EXTENT_PAGES).collect();
        Self {
            commands: touches.iter().map(Touch::command).collect(),
            expected: touches.iter().map(Touch::expected).collect(),
            pages: touched.len() as u64,
            extents: extents.len() as u64,
        }
    }

    /// One command at a time.
    pub(super) fn each(&self) -> impl Iterator<Item = Self> {
        let one = |(command, expected): (&Command, &(u64, u64))| Self {
            commands: vec![*command],
            expected: vec![*expected],
            pages: 1,
            extents: 1,
        };
        self.commands.iter().zip(&self.expected).map(one)
    }
}

struct Touch {
    first: u64,
    count: u64,
    stride: u64,
    shuffle: Option<u64>,
}

impl Touch {
    fn run(first: u64, count: u64) -> Self {
        Self { first, count, stride: 1, shuffle: None }
    }

    fn pages(&self) -> impl Iterator<Item = u64> + use<> {
        let (first, stride) = (self.first, self.stride);
        (0..self.count).map(move |number| first + number * stride)
    }

    fn command(&self) -> Command {
        let Self { first, count, stride, shuffle } = *self;
        Command::TouchRead { first: PageIndex(first), count, stride, shuffle }
    }

    /// The guest adds up the first byte of each page.
    fn expected(&self) -> (u64, u64) {
        let sum = self.pages().map(|page| probe::page_word(PageIndex(page), EPOCH, 0) & 0xFF).sum();
        (sum, self.count)
    }
}
