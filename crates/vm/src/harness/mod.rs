//! What tests of this crate and of those above it lean on: counts and seeds from the environment, and random operations on
//! machines and images against a model.
//!
//! | variable | meaning | default |
//! |---|---|---|
//! | `FARFORK_COUNT` | `quick` or `full`: which of the two counts of [`count`] a test runs | `quick` |
//! | `FARFORK_SEED` | the seed of randomised tests, printed by each | drawn anew |

pub mod attempts;
pub mod guards;

use std::io;
use std::path::Path;
use std::sync::Arc;

use types::{GuestAddress, MachineId, MemorySize, PAGE_SIZE, PageIndex};
use uuid::Uuid;

use crate::Host;
use crate::class::{Class, RamLayout};
use crate::failpoint;
use crate::image::{self, Image};
use crate::machine::Machine;
use crate::probe::{self, Probe};
use crate::shell::Shell;
use crate::sys::kvm::set_read_only_slot;
pub use crate::sys::process::Crash;

/// The number of rounds: `quick` in `make test`, `full` in `make soak`.
///
/// # Panics
/// If `FARFORK_COUNT` is neither word.
#[must_use]
pub fn count(quick: u64, full: u64) -> u64 {
    match std::env::var("FARFORK_COUNT").as_deref() {
        Err(_) | Ok("quick") => quick,
        Ok("full") => full,
        Ok(other) => panic!("FARFORK_COUNT is {other:?}; it is quick or full"),
    }
}

/// The test's seed, printed so that a failure can be run again.
///
/// # Panics
/// If `FARFORK_SEED` is no number.
#[must_use]
pub fn seed() -> u64 {
    let seed = match std::env::var("FARFORK_SEED") {
        Ok(seed) => seed.parse().expect("FARFORK_SEED is a number"),
        Err(_) => u64::from(fastrand::u32(..)),
    };
    println!("FARFORK_SEED={seed}");
    seed
}

/// Says what a test has held, for the record that `make soak` writes.
pub fn held(what: &str, count: u64) {
    println!("held: {count} {what}");
}

/// A new machine id.
#[must_use]
pub fn new_id() -> MachineId {
    MachineId::from_uuid(Uuid::now_v7())
}

/// The host of the tests, or the reason why they cannot run here.
///
/// # Panics
/// If there is no KVM: tests of machines then fail, saying why.
#[must_use]
pub fn host() -> Host {
    Host::open().unwrap_or_else(|error| panic!("machines cannot run here: {error}; {}", error.remedy()))
}

/// A class of so many MiB.
///
/// # Panics
/// If there is no such class.
#[must_use]
pub fn class(mib: u64, vcpus: u8) -> Class {
    Class::new(MemorySize::from_mib(mib).expect("a valid size"), vcpus).expect("a valid number of vCPUs")
}

/// A running parent with the probe.
///
/// # Panics
/// If it cannot be started.
#[must_use]
pub fn parent(host: &Host, class: Class) -> Machine {
    let mut parent = probe::boot(host, class, new_id()).expect("the probe boots");
    parent.resume();
    parent
}

/// A child of `image`, at rest.
///
/// # Panics
/// If it cannot be forked.
#[must_use]
pub fn child_at_rest(host: &Host, image: &Arc<Image>) -> Machine {
    Shell::build(host, image.class()).expect("a shell").fork(image, new_id()).expect("a fork")
}

/// A running child of `image`.
#[must_use]
pub fn child(host: &Host, image: &Arc<Image>) -> Machine {
    let mut child = child_at_rest(host, image);
    child.resume();
    child
}

/// Every byte of a machine's RAM, as the host sees it.
///
/// # Panics
/// If it cannot be read.
#[must_use]
pub fn all_memory(machine: &Machine) -> Vec<u8> {
    let mut all = Vec::new();
    for (start, len) in RamLayout::of(machine.class().memory()).regions() {
        let at = all.len();
        all.resize(at + usize::try_from(len).expect("64-bit"), 0);
        machine.memory().read(start, &mut all[at..]).expect("RAM");
    }
    all
}

impl Machine {
    /// Makes the host fail every access to a page of RAM.
    ///
    /// # Errors
    /// If the kernel does not let us.
    pub fn forbid_page(&self, page: GuestAddress) -> io::Result<()> {
        let (start, slot) = self.memory().low_ram();
        slot.forbid_page(page.0 - start.0)
    }

    /// Makes KVM report writes to the first region of RAM as MMIO.
    ///
    /// # Errors
    /// If the kernel does not let us.
    pub fn forbid_writes(&self) -> io::Result<()> {
        let (start, slot) = self.memory().low_ram();
        set_read_only_slot(&self.frame.core.vm, 0, start, slot)
    }

    /// Captures the state of a machine at rest and compares it with that of an image. Empty if nothing differs that should
    /// be the same: all but clocks, which go on.
    ///
    /// # Errors
    /// As a freeze.
    pub fn state_differences(&self, host: &Host, image: &Image) -> Result<Vec<String>, crate::machine::state::StateError> {
        let now = crate::machine::state::capture(host, &self.frame.core)?;
        Ok(now.differences(image.state()))
    }

    /// Sets an MSR of vCPU 0 while it is at rest.
    ///
    /// # Panics
    /// If KVM does not take it.
    pub fn set_msr(&self, index: u32, data: u64) {
        let entry = kvm_bindings::kvm_msr_entry { index, data, ..Default::default() };
        let msrs = kvm_bindings::Msrs::from_entries(&[entry]).expect("one entry");
        assert_eq!(self.frame.core.vcpu(0).set_msrs(&msrs).expect("KVM_SET_MSRS"), 1, "MSR {index:#x}");
    }
}

/// Everything in which the states of two images differ that should be the same in a child and its image.
#[must_use]
pub fn image_differences(one: &Image, other: &Image) -> Vec<String> {
    one.state().differences(other.state())
}

/// What happened in a run of [`RandomOps`].
#[derive(Clone, Copy, Debug, Default)]
#[expect(missing_docs, reason = "counts of operations")]
pub struct Tally {
    pub operations: u64,
    pub forks: u64,
    pub freezes: u64,
    pub branches_while_writing: u64,
    pub saves: u64,
    pub kills: u64,
    pub injected_failures: u64,
    pub pages_checked: u64,
}

/// Random operations on a growing and shrinking family of machines and images, each checked against a model: the epoch of the
/// pattern that every page must hold, 0 for a page of zeros.
#[derive(Debug)]
pub struct RandomOps<'host> {
    host: &'host Host,
    class: Class,
    directory: &'host Path,
    dice: fastrand::Rng,
    machines: Vec<(Machine, Vec<u64>)>,
    images: Vec<(Arc<Image>, Vec<u64>)>,
    next_epoch: u64,
    failpoints: bool,
    tally: Tally,
}

const MACHINES_MAX: usize = 10;
const IMAGES_MAX: usize = 10;

impl<'host> RandomOps<'host> {
    /// Starts with one parent. With `failpoints`, one hit in 20 of the engine's failpoints fails as a full disk would.
    #[must_use]
    pub fn new(host: &'host Host, class: Class, directory: &'host Path, seed: u64, failpoints: bool) -> Self {
        let pages = usize::try_from(probe::work_pages(class.memory())).expect("64-bit");
        let machines = vec![(parent(host, class), vec![0; pages])];
        let dice = fastrand::Rng::with_seed(seed);
        Self { host, class, directory, dice, machines, images: Vec::new(), next_epoch: 1, failpoints, tally: Tally::default() }
    }

    /// Does `operations`, then checks every page of every machine and of a child of every image.
    ///
    /// # Panics
    /// At the first thing that differs from the model.
    pub fn run(mut self, operations: u64) -> Tally {
        for _ in 0..operations {
            self.step();
            self.tally.operations += 1;
        }
        while let Some((image, model)) = self.images.pop() {
            let child = child(self.host, &image);
            self.check_all(&child, &model);
        }
        while let Some((machine, model)) = self.machines.pop() {
            self.check_all(&machine, &model);
        }
        self.tally
    }

    fn step(&mut self) {
        match self.dice.u32(0..100) {
            0..30 => self.fill(),
            30..45 => self.write_from_host(),
            45..60 => self.check_some(),
            60..72 => self.fork(),
            72..84 => self.freeze(),
            84..88 => self.branch_while_writing(),
            88..92 => self.save_and_load(),
            92..97 => self.kill(),
            _ => self.drop_image(),
        }
    }

    fn some_pages(&mut self, most: u64) -> (u64, u64) {
        let pages = probe::work_pages(self.class.memory());
        let count = self.dice.u64(1..=most.min(pages));
        (self.dice.u64(0..=pages - count), count)
    }

    fn some_machine(&mut self) -> usize {
        if self.machines.is_empty() {
            let pages = usize::try_from(probe::work_pages(self.class.memory())).expect("64-bit");
            self.machines.push((parent(self.host, self.class), vec![0; pages]));
        }
        self.dice.usize(0..self.machines.len())
    }

    fn epoch(&mut self) -> u64 {
        self.next_epoch += 1;
        self.next_epoch
    }

    fn fill(&mut self) {
        let at = self.some_machine();
        let (first, count) = self.some_pages(600);
        let epoch = self.epoch();
        let (machine, model) = &mut self.machines[at];
        Probe::of(machine).fill(work(first), count, epoch).expect("fill");
        model[range(first, count)].fill(epoch);
    }

    fn write_from_host(&mut self) {
        let at = self.some_machine();
        let (page, _) = self.some_pages(1);
        let epoch = self.epoch();
        let (machine, model) = &mut self.machines[at];
        let bytes = probe::fill_page(work(page), epoch);
        machine.memory().write(GuestAddress(work(page).byte_offset()), &bytes).expect("RAM");
        model[range(page, 1)].fill(epoch);
    }

    fn check_some(&mut self) {
        let at = self.some_machine();
        let (first, count) = self.some_pages(400);
        let (machine, model) = &self.machines[at];
        self.tally.pages_checked += check(machine, model, first, count);
    }

    fn fork(&mut self) {
        if self.images.is_empty() {
            return self.freeze();
        }
        if self.machines.len() == MACHINES_MAX {
            self.kill();
        }
        let (image, model) = &self.images[self.dice.usize(0..self.images.len())];
        self.machines.push((child(self.host, image), model.clone()));
        self.tally.forks += 1;
    }

    /// Freezes a machine, with failures where they are asked for: then there is no image, and the machine is as it was.
    fn freeze(&mut self) {
        let at = self.some_machine();
        if self.images.len() == IMAGES_MAX {
            self.drop_image();
        }
        let seed = self.dice.u64(..);
        let (machine, model) = &mut self.machines[at];
        let injected = self.failpoints.then(|| failpoint::arm_all(seed, 20, libc::ENOSPC));
        let frozen = machine.freeze(self.host);
        drop(injected);
        match frozen {
            Ok(frozen) => {
                self.images.push((frozen.image, model.clone()));
                self.tally.freezes += 1;
            }
            Err(error) => {
                assert!(self.failpoints, "freeze failed: {error}");
                assert!(!error.remedy().is_empty());
                assert!(machine.ended().is_none(), "a failed freeze ended the machine: {error}");
                self.tally.injected_failures += 1;
            }
        }
    }

    /// Freezes a machine in the middle of a command, and lets child and parent each finish it.
    fn branch_while_writing(&mut self) {
        let at = self.some_machine();
        if self.images.len() == IMAGES_MAX {
            self.drop_image();
        }
        let epoch = self.epoch();
        let (first, count) = self.some_pages(2000);
        let command = probe::Command::Fill { first: work(first), count, epoch };
        let (machine, model) = &mut self.machines[at];
        let pending = Probe::of(machine).post(command).expect("post");
        let image = machine.freeze(self.host).expect("freeze").image;
        let child = child(self.host, &image);
        model[range(first, count)].fill(epoch);
        let inherited = Probe::of(&child).inherited(command).expect("inherit");
        Probe::of(&child).wait(inherited).expect("the child finishes its parent's command");
        Probe::of(machine).wait(pending).expect("fill");
        self.tally.pages_checked += check(&child, model, first, count) + check(machine, model, first, count);
        self.tally.branches_while_writing += 1;
    }

    /// Saves an image and goes on with what was loaded instead.
    fn save_and_load(&mut self) {
        if self.images.is_empty() {
            return self.freeze();
        }
        let at = self.dice.usize(0..self.images.len());
        let path = self.directory.join("image");
        let seed = self.dice.u64(..);
        let injected = self.failpoints.then(|| failpoint::arm_all(seed, 20, libc::ENOSPC));
        let saved = image::save(&self.images[at].0, &path, |_, _| {});
        let loaded = saved
            .map_err(|error| error.to_string())
            .and_then(|_| image::load(self.host, &path, |_, _| {}).map_err(|error| error.to_string()));
        drop(injected);
        match loaded {
            Ok(image) => {
                assert_eq!(image.digest(), self.images[at].0.digest(), "the loaded image has another digest");
                self.images[at].0 = image;
                self.tally.saves += 1;
            }
            Err(error) => {
                assert!(self.failpoints, "save and load failed: {error}");
                self.tally.injected_failures += 1;
            }
        }
        let names: Vec<_> =
            std::fs::read_dir(self.directory).expect("directory").map(|entry| entry.expect("entry").file_name()).collect();
        assert!(names.iter().all(|name| name == "image"), "a save left {names:?} behind");
    }

    fn kill(&mut self) {
        let at = self.some_machine();
        drop(self.machines.swap_remove(at));
        self.tally.kills += 1;
    }

    fn drop_image(&mut self) {
        if !self.images.is_empty() {
            let at = self.dice.usize(0..self.images.len());
            self.images.swap_remove(at);
        }
    }

    fn check_all(&mut self, machine: &Machine, model: &[u64]) {
        self.tally.pages_checked += check(machine, model, 0, model.len() as u64);
    }
}

/// Compares pages with the model: pattern pages by the guest, pages of zeros by the host. Returns their number.
fn check(machine: &Machine, model: &[u64], first: u64, count: u64) -> u64 {
    let mut page = first;
    for same in model[range(first, count)].chunk_by(|a, b| a == b) {
        let pages = same.len() as u64;
        if same[0] == 0 {
            let mut bytes = vec![1; usize::try_from(pages * PAGE_SIZE).expect("64-bit")];
            machine.memory().read(GuestAddress(work(page).byte_offset()), &mut bytes).expect("RAM");
            assert!(bytes.iter().all(|byte| *byte == 0), "pages of zeros from {page} on are not zero");
        } else {
            let differ = Probe::of(machine).verify(work(page), pages, same[0]).expect("verify");
            assert_eq!(differ, None, "pages {page} to {} are not those of epoch {}", page + pages, same[0]);
        }
        page += pages;
    }
    count
}

fn work(page: u64) -> PageIndex {
    PageIndex(probe::first_work_page().0 + page)
}

fn range(first: u64, count: u64) -> std::ops::Range<usize> {
    let first = usize::try_from(first).expect("64-bit");
    first..first + usize::try_from(count).expect("64-bit")
}
