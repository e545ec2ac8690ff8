//! Children whose memory arrives while they run: what they read is the image, whatever comes when; and who reads what is not
//! there, or is given what is not right, ends.

use std::collections::{BTreeSet, VecDeque};
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use types::manifest::encode_hash_page;
use types::{Digest, ExtentIndex, Manifest};
use vm::harness::{class, count, held, seed};
use vm::host_image::{EXTENT_LEN, PublishError};
use vm::image::Image;
use vm::image::manifest::Content;
use vm::machine::Ended;
use vm::pool::Jailed;
use vm::probe::{self, Command};
use vm::{HostImage, PageSource, Pool, Watched};

use crate::workers::{check, fork, image, pool, who};

pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
pub(crate) const MIB: u64 = 16;
pub(crate) const PAGES: u64 = 2000;

/// The least that a pager can be: one thread that serves every fault from an image of this process.
pub(crate) struct Pager {
    pub(crate) inner: Arc<Inner>,
    thread: Option<std::thread::JoinHandle<()>>,
}

pub(crate) struct Inner {
    pub(crate) source: Arc<Image>,
    manifest: Arc<Manifest>,
    state: Mutex<State>,
    changed: Condvar,
    /// Held while faults are read and answered.
    round: Mutex<()>,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) children: Vec<Arc<Watched>>,
    wanted: VecDeque<(usize, u32)>,
    /// Faults are read and not answered.
    is_dead: bool,
    is_stopping: bool,
    /// Of every extent that was published, how often.
    published: Vec<(usize, ExtentIndex)>,
    pub(crate) refused: Vec<PublishError>,
    /// Changes what is served.
    pub(crate) liar: Option<fn(&mut [u8; EXTENT_LEN])>,
}

impl Pager {
    pub(crate) fn of(source: &Arc<Image>) -> Self {
        let manifest = source.manifest(|_, _| {}).unwrap();
        let inner = Inner {
            source: Arc::clone(source),
            manifest,
            state: Mutex::default(),
            changed: Condvar::new(),
            round: Mutex::default(),
        };
        let inner = Arc::new(inner);
        let life = Arc::clone(&inner);
        Self { inner, thread: Some(std::thread::spawn(move || life.serve())) }
    }

    pub(crate) fn open(&self, pool: &Pool) -> (Arc<HostImage>, Arc<Image>) {
        let head = self.inner.manifest.head().clone();
        let digest = Digest::of(&head.encode().unwrap());
        let source = Arc::clone(&self.inner) as Arc<dyn PageSource>;
        let (host_image, image) = HostImage::open(pool.host(), digest, head, source).unwrap();
        let missing: Vec<_> = host_image.missing_hash_pages().collect();
        for (region, page, _) in missing {
            let digests = self.inner.manifest.extent_digests(region).chunks(1024).nth(page).unwrap();
            host_image.add_hash_page(region, page, &encode_hash_page(digests)).unwrap();
        }
        (host_image, image)
    }

    pub(crate) fn state<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        let looked = look(&mut self.inner.state.lock().unwrap());
        self.inner.changed.notify_all();
        looked
    }

    /// From now on, faults are neither read nor answered; or again they are.
    pub(crate) fn is_dead(&self, is_dead: bool) {
        let _between_rounds = self.inner.round.lock().unwrap();
        self.state(|state| state.is_dead = is_dead);
    }

    fn published(&self) -> usize {
        self.state(|state| state.published.len())
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.state(|state| state.is_stopping = true);
        self.thread.take().unwrap().join().unwrap();
    }
}

impl PageSource for Inner {
    fn watch(&self, child: Arc<Watched>) {
        self.state.lock().unwrap().children.push(child);
        self.changed.notify_all();
    }

    fn forget(&self, child: &Arc<Watched>) {
        self.state.lock().unwrap().children.retain(|other| !Arc::ptr_eq(other, child));
    }

    fn want(&self, region: usize, extents: std::ops::Range<u32>) {
        self.state.lock().unwrap().wanted.extend(extents.map(|extent| (region, extent)));
        self.changed.notify_all();
    }
}

impl Inner {
    fn serve(&self) {
        loop {
            let (children, wanted) = {
                let idle = |state: &mut State| {
                    !state.is_stopping && (state.is_dead || state.children.is_empty()) && state.wanted.is_empty()
                };
                let mut state = self.changed.wait_while(self.state.lock().unwrap(), idle).unwrap();
                if state.is_stopping {
                    return;
                }
                if state.is_dead {
                    state.wanted.clear();
                    continue;
                }
                (state.children.clone(), std::mem::take(&mut state.wanted))
            };
            if let Some(child) = children.first() {
                for (region, extent) in wanted {
                    self.answer(child.host_image(), region, ExtentIndex(extent));
                }
            }
            let mut fds: Vec<_> = children.iter().map(|child| PollFd::from_borrowed_fd(child.as_fd(), PollFlags::IN)).collect();
            let patience = rustix::time::Timespec { tv_sec: 0, tv_nsec: 2_000_000 };
            poll(&mut fds, Some(&patience)).unwrap();
            let _round = self.round.lock().unwrap();
            if self.state.lock().unwrap().is_dead {
                continue;
            }
            for child in &children {
                let mut touched = BTreeSet::new();
                let note = |region, extent| {
                    touched.insert((region, extent));
                };
                child.read_faults(note).unwrap();
                for (region, extent) in touched {
                    self.answer(child.host_image(), region, extent);
                    child.wake(region, extent);
                }
            }
        }
    }

    fn answer(&self, host_image: &HostImage, region: usize, extent: ExtentIndex) {
        if host_image.has(region, extent) {
            return;
        }
        let mut bytes = Box::new([0; EXTENT_LEN]);
        assert_ne!(self.source.read_extent(region, extent, &mut bytes).unwrap(), Content::Absent);
        let liar = self.state.lock().unwrap().liar;
        if let Some(liar) = liar {
            liar(&mut bytes);
        }
        let published = host_image.publish(region, extent, &bytes[..]);
        let mut state = self.state.lock().unwrap();
        match published {
            Ok(_) => state.published.push((region, extent)),
            Err(error) => state.refused.push(error),
        }
    }
}

pub(crate) fn ended(child: &Jailed) -> Ended {
    child.wait_for_end(PATIENCE).unwrap_or_else(|| panic!("{} has not ended", child.id()))
}

#[test]
fn a_child_runs_before_its_memory_is_here_and_the_next_one_finds_it_here() {
    let pool = pool();
    let pager = Pager::of(&image(&pool, class(MIB, 1), PAGES));
    let (host_image, image) = pager.open(&pool);
    let foreseen = pager.inner.source.first_touches();
    let first = fork(&pool, &image, 1).remove(0);
    let unforeseen = pager.state(|state| state.published.iter().filter(|at| !foreseen.contains(at)).count());
    assert!(foreseen.len() < 12 && unforeseen <= 1, "{foreseen:?}, and {unforeseen} others");
    let at_first = pager.published();
    assert!(at_first < 10, "{at_first} extents before the first instruction");
    assert_eq!(who(&first), first.id());
    check(&first, PAGES, 7);
    let all = pager.published();
    assert!(first.faults() >= all as u64 / 2 && all > 100, "{} faults, {all} extents", first.faults());
    for child in fork(&pool, &image, 3) {
        assert_eq!(who(&child), child.id());
        check(&child, PAGES, 7);
        assert_eq!(child.faults(), 0, "what the first has touched is here for all");
        // What it writes is its own.
        let fill = Command::Fill { first: probe::first_work_page(), count: 100, epoch: 9 };
        child.call(0, fill).unwrap();
    }
    check(&first, PAGES, 7);
    assert_eq!(pager.published(), all);
    let started = std::time::Instant::now();
    while host_image.resident().children > 1 {
        assert!(started.elapsed() < PATIENCE, "the others are gone");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(pager.state(|state| state.refused.is_empty()));
}

/// The oracle: 32 children at once, any order of touches, writers, branches and evictions among them.
#[test]
fn memory_is_the_image_in_any_order_while_it_streams_is_evicted_and_branched() {
    let mut dice = fastrand::Rng::with_seed(seed());
    let pool = pool();
    let mut pages_checked = 0;
    for _ in 0..count(1, 10) {
        let pager = Pager::of(&image(&pool, class(MIB, 1), PAGES));
        let (host_image, image) = pager.open(&pool);
        let mut images = vec![image];
        let mut children: Vec<Jailed> = fork(&pool, &images[0], 32);
        for _ in 0..count(60, 400) {
            let at = dice.usize(..children.len());
            match dice.u32(..10) {
                0..6 => {
                    let child = &children[at];
                    let touch = dice.u64(1..200);
                    let from = dice.u64(..PAGES - touch);
                    let first = types::PageIndex(probe::first_work_page().0 + from);
                    let [differ, _, compared, _] = child.call(0, Command::Verify { first, count: touch, epoch: 7 }).unwrap();
                    assert_eq!((differ, compared), (0, touch));
                    pages_checked += touch;
                }
                6 => {
                    let first = types::PageIndex(probe::first_work_page().0 + dice.u64(..PAGES));
                    // Written over with the same.
                    children[at].call(0, Command::Fill { first, count: 1, epoch: 7 }).unwrap();
                }
                7 => {
                    host_image.check_pages();
                    let from = dice.u32(16..100);
                    let extents: Vec<u32> = (from..from + dice.u32(1..100)).collect();
                    host_image.evict(0, &extents).unwrap();
                }
                8 if images.len() < 6 => images.push(children[at].freeze().unwrap().image),
                _ => {
                    drop(children.swap_remove(at));
                    let image = &images[dice.usize(..images.len())];
                    children.extend(fork(&pool, image, 1));
                }
            }
        }
        for child in &children {
            assert_eq!(who(child), child.id());
            check(child, PAGES, 7);
            pages_checked += PAGES;
        }
        assert!(pager.state(|state| state.refused.is_empty()));
    }
    held("pages compared by 32 children while they arrived", pages_checked);
}

#[test]
fn a_settled_host_image_is_an_ordinary_image() {
    let pool = pool();
    let pager = Pager::of(&image(&pool, class(MIB, 1), PAGES));
    let (host_image, image) = pager.open(&pool);
    let before = fork(&pool, &image, 1).remove(0);
    assert!(host_image.settle().is_err(), "most of it is absent");
    // It waits in a fault that nobody has read, while everything comes.
    pager.is_dead(true);
    before.post(0, Command::Verify { first: probe::first_work_page(), count: 100, epoch: 7 }).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    for extent in host_image.data_extents(0).flatten().map(ExtentIndex) {
        pager.inner.answer(&host_image, 0, extent);
    }
    host_image.settle().unwrap();
    assert_eq!(before.answer(0).unwrap()[0], 0, "it goes on when its host image has settled");
    let resident = host_image.resident();
    assert!(resident.is_settled && resident.resident_bytes == resident.data_bytes, "{resident:?}");
    assert!(image.unsettled().is_none());
    drop(pager);
    let after = fork(&pool, &image, 3);
    for child in after.iter().chain([&before]) {
        check(child, PAGES, 7);
    }
    assert!(after.iter().all(|child| child.faults() == 0));
    // Nobody watches any more, and the fault that was is not forgotten.
    let started = std::time::Instant::now();
    while host_image.resident().children > 0 {
        assert!(started.elapsed() < PATIENCE, "the child is let go");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(before.faults() > 0 && host_image.resident().faults >= before.faults());
    // It can be branched, and saved under the name that it came with.
    let branch = before.freeze().unwrap().image;
    check(&fork(&pool, &branch, 1)[0], PAGES, 7);
    // By a copier again, which it may have now.
    let fill = Command::Fill { first: probe::first_work_page(), count: 1, epoch: 7 };
    before.call(0, fill).unwrap();
    let frozen = before.freeze().unwrap();
    assert!(frozen.report.copied_extents >= 1 && frozen.report.copy > Duration::ZERO, "{:?}", frozen.report);
    let directory = tempfile::tempdir().unwrap();
    let saved = vm::image::save(&image, &directory.path().join("image"), |_, _| {}).unwrap();
    assert_eq!(saved.digest, host_image.digest());
    assert!(host_image.evict(0, &[0, 1, 63]).unwrap().is_empty(), "it goes only whole");
}

#[test]
fn a_child_is_paused_branched_and_killed_while_its_source_is_dead() {
    let pool = pool();
    let pager = Pager::of(&image(&pool, class(MIB, 2), PAGES));
    let (host_image, image) = pager.open(&pool);
    let child = fork(&pool, &image, 1).remove(0);
    let fill =
        |first: u64, count| Command::Fill { first: types::PageIndex(probe::first_work_page().0 + first), count, epoch: 7 };
    child.call(0, fill(0, 400)).unwrap();
    // Every other page, so that extents are completed from what is beneath.
    for page in (400..600).step_by(2) {
        child.call(0, fill(page, 1)).unwrap();
    }
    pager.is_dead(true);
    let resident = host_image.resident();
    assert!(resident.resident_bytes < resident.data_bytes);
    // One vCPU waits for a page that does not come.
    child.post(1, Command::Verify { first: types::PageIndex(probe::first_work_page().0 + 1500), count: 10, epoch: 7 }).unwrap();
    let frozen = child.freeze().unwrap();
    assert!(frozen.report.dirty_pages >= 400 && frozen.report.copied_extents >= 18, "{:?}", frozen.report);
    // Not one page more of it is here, and the branch is unsettled too.
    assert_eq!(host_image.resident().resident_bytes, resident.resident_bytes);
    assert!(frozen.image.unsettled().is_some());
    let branches = fork(&pool, &frozen.image, 2);
    let written = |child: &Jailed| {
        let [differ, _, compared, _] =
            child.call(0, Command::Verify { first: probe::first_work_page(), count: 600, epoch: 7 }).unwrap();
        assert_eq!((differ, compared), (0, 600));
    };
    branches.iter().for_each(written);
    child.set_running(false).unwrap();
    drop(child);
    // The rest comes when the source is back.
    pager.is_dead(false);
    branches.iter().for_each(|branch| check(branch, PAGES, 7));
    assert_eq!(branches[0].stop(1).unwrap()[0], 0, "the branch goes on with what its parent waited for");
    // Digest and all, as if it had never been absent.
    let manifest = frozen.image.manifest(|_, _| {}).unwrap();
    assert_eq!(frozen.image.digest(), Some(Digest::of(&manifest.head().encode().unwrap())));
}
