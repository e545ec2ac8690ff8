//! Fork, freeze and branch: what a child's memory holds, and what it costs its image.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use types::{EXTENT_SIZE, GuestAddress, PageIndex};
use vm::harness::{all_memory, child, child_at_rest, class, count, held, host, new_id, parent, seed};
use vm::probe::{self, Command, Probe};
use vm::{Image, Machine, Shell};

const MIB: u64 = 32;

/// Without what is each machine's own: its identity, and the 32 bytes of each vCPU's kvmclock, which KVM itself rewrites (here
/// it raises the version and takes the "TSC stable" flag as soon as the clock of a child is set).
fn shared_by_all(image: &Image, mut memory: Vec<u8>) -> Vec<u8> {
    let identity = image.identity_page().unwrap();
    memory[usize::try_from(identity.0).unwrap()..][..16].fill(0);
    for vcpu in 0..usize::from(image.class().vcpu_count()) {
        memory[usize::try_from(probe::clock_page(vcpu).0).unwrap()..][..32].fill(0);
    }
    memory
}

/// Also when an assertion fails, so that the test ends.
struct StopWhenDropped<'a>(&'a AtomicBool);

impl Drop for StopWhenDropped<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_childs_memory_is_the_image_byte_for_byte_while_parent_and_siblings_write() {
    let host = host();
    let class = class(MIB, 1);
    let mut parent = parent(&host, class);
    let first = probe::first_work_page();
    let pages = probe::work_pages(class.memory());
    Probe::of(&parent).fill(first, pages / 2, 1).unwrap();
    parent.pause().unwrap();
    let at_freeze = all_memory(&parent);
    let image = parent.freeze(&host).unwrap().image;
    let expected = shared_by_all(&image, at_freeze);
    parent.resume();

    let children = count(12, 100);
    // All write all they have, over and over, while others are born and compared.
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let stop_writers = StopWhenDropped(&stop);
        let writers: Vec<_> = (0..3)
            .map(|n| {
                let machine = if n == 0 { None } else { Some(child(&host, &image)) };
                let (parent, stop) = (&parent, &stop);
                scope.spawn(move || {
                    let probe = Probe::of(machine.as_ref().unwrap_or(parent));
                    let mut epoch = 1000 * (n + 1);
                    while !stop.load(Ordering::Relaxed) {
                        epoch += 1;
                        probe.fill(first, pages, epoch).unwrap();
                        assert_eq!(probe.verify(first, pages, epoch).unwrap(), None);
                    }
                })
            })
            .collect();
        for n in 0..children {
            let mut child = child_at_rest(&host, &image);
            let memory = shared_by_all(&image, all_memory(&child));
            let differing: Vec<_> = memory
                .chunks(4096)
                .zip(expected.chunks(4096))
                .enumerate()
                .filter(|(_, (a, b))| a != b)
                .map(|(page, _)| page)
                .collect();
            assert_eq!(differing, Vec::<usize>::new(), "pages of child {n} differ from the image");
            child.resume();
            let probe = Probe::of(&child);
            assert_eq!(probe.verify(first, pages / 2, 1).unwrap(), None, "child {n}");
            assert_eq!(probe.who().unwrap(), child.id());
            probe.fill(first, pages, 2 + n).unwrap();
            assert_eq!(probe.verify(first, pages, 2 + n).unwrap(), None, "child {n}");
        }
        drop(stop_writers);
        for writer in writers {
            writer.join().unwrap();
        }
    });
    held("children equal to their image, byte for byte", children);
}

/// Each vCPU writes epoch after epoch into its own pages, in order: at any instant the words never rise from one page to the
/// next, and the first is at most one ahead of the last.
#[test]
fn a_branch_of_a_machine_that_writes_with_all_its_might_is_one_instant() {
    let host = host();
    let vcpus = 2;
    let class = class(MIB, vcpus);
    let mut parent = parent(&host, class);
    let first_work = probe::first_work_page().0;
    // Far apart: in different extents, and (with the last) different runs.
    let sets: Vec<PageIndex> = (0..u64::from(vcpus)).map(|vcpu| PageIndex(first_work + 3000 * vcpu)).collect();
    let pages = 200;
    parent.freeze(&host).unwrap();
    let pending: Vec<_> = sets
        .iter()
        .enumerate()
        .map(|(vcpu, first)| Probe::on(&parent, vcpu).post(Command::Epochs { first: *first, count: pages }).unwrap())
        .collect();
    let branches = count(20, 1000);
    let mut last = vec![0; sets.len()];
    for n in 0..branches {
        let image = parent.freeze(&host).unwrap().image;
        let mut child = child_at_rest(&host, &image);
        for (vcpu, first) in sets.iter().enumerate() {
            let words: Vec<u64> = (0..pages)
                .map(|page| child.memory().load_u64(GuestAddress(PageIndex(first.0 + page).byte_offset())).unwrap())
                .collect();
            assert!(words.is_sorted_by(|a, b| a >= b), "branch {n} mixes instants: {words:?}");
            assert!(words[0] - words[words.len() - 1] <= 1, "branch {n} mixes instants: {words:?}");
            assert!(words[0] >= last[vcpu], "branch {n} is older than the one before");
            last[vcpu] = words[0];
        }
        // The child goes on in the middle of its parent's command, and comes to its own end of it.
        if n % 10 == 0 {
            child.resume();
            for (vcpu, first) in sets.iter().enumerate() {
                let probe = Probe::on(&child, vcpu);
                let inherited = probe.inherited(Command::Epochs { first: *first, count: pages }).unwrap();
                let started = Instant::now();
                while child.memory().load_u64(GuestAddress(first.byte_offset())).unwrap() <= last[vcpu] {
                    assert!(started.elapsed() < probe::PATIENCE, "the child of branch {n} stands still");
                    std::thread::yield_now();
                }
                let [epoch, ..] = probe.stop(inherited).unwrap();
                assert!(epoch > last[vcpu], "the child of branch {n} stood still");
            }
        }
    }
    for (vcpu, pending) in pending.into_iter().enumerate() {
        let [epoch, ..] = Probe::on(&parent, vcpu).stop(pending).unwrap();
        assert!(epoch >= last[vcpu] && epoch > 1, "the parent of vCPU {vcpu} stood still at {epoch}");
    }
    held("branches of a writing machine, each one instant", branches);
}

/// The same for the freeze in place, of first parents that have not been frozen before.
#[test]
fn a_first_freeze_of_a_machine_that_writes_with_all_its_might_is_one_instant() {
    let host = host();
    let (first, pages) = (probe::first_work_page(), 200);
    let parents = count(10, 500);
    for n in 0..parents {
        let mut parent = parent(&host, class(8, 1));
        let epochs = Command::Epochs { first, count: pages };
        let pending = Probe::of(&parent).post(epochs).unwrap();
        let word = |machine: &Machine, page: u64| {
            machine.memory().load_u64(GuestAddress(PageIndex(first.0 + page).byte_offset())).unwrap()
        };
        let started = Instant::now();
        while word(&parent, pages - 1) < 3 {
            assert!(started.elapsed() < probe::PATIENCE, "the parent stands still");
            std::thread::yield_now();
        }
        let image = parent.freeze(&host).unwrap().image;
        let mut child = child_at_rest(&host, &image);
        let words: Vec<u64> = (0..pages).map(|page| word(&child, page)).collect();
        assert!(words.is_sorted_by(|a, b| a >= b), "freeze {n} mixes instants: {words:?}");
        assert!(words[0] - words[words.len() - 1] <= 1, "freeze {n} mixes instants: {words:?}");
        // Registers and memory are of one instant, too: the child's next write is the one that is due.
        child.resume();
        let [epoch, ..] = Probe::of(&child).stop(Probe::of(&child).inherited(epochs).unwrap()).unwrap();
        let after: Vec<u64> = (0..pages).map(|page| word(&child, page)).collect();
        assert!(epoch >= words[0] && after[0] == epoch, "freeze {n}: registers and memory disagree");
        assert!(after.is_sorted_by(|a, b| a >= b) && after[0] - after[after.len() - 1] <= 1, "child {n}: {after:?}");
        assert!(Probe::of(&parent).stop(pending).unwrap()[0] >= words[0]);
    }
    held("first freezes of writing machines, each one instant", parents);
}

/// Half-way through changing the first parent's mapping is the worst place to run out of memory.
#[test]
fn a_first_freeze_that_fails_leaves_the_parent_as_it_was() {
    let host = host();
    let (first, pages) = (probe::first_work_page(), 300);
    for point in ["memfd.allocate", "freeze.map", "memfd.seal"] {
        let mut parent = parent(&host, class(8, 1));
        Probe::of(&parent).fill(first, pages, 1).unwrap();
        let armed = vm::failpoint::arm(point, 0, 12);
        let error = parent.freeze(&host).unwrap_err();
        drop(armed);
        assert!(error.remedy().contains("memory is full"), "{point}: {error}");
        assert!(parent.is_running() && parent.ended().is_none(), "{point}");
        Probe::of(&parent).fill(PageIndex(first.0 + 100), 50, 2).unwrap();
        let image = parent.freeze(&host).unwrap().image;
        Probe::of(&parent).fill(first, pages, 3).unwrap();
        let child = child(&host, &image);
        for (at, count, epoch) in [(0, 100, 1), (100, 50, 2), (150, 150, 1)] {
            assert_eq!(Probe::of(&child).verify(PageIndex(first.0 + at), count, epoch).unwrap(), None, "{point}");
        }
        assert_eq!(Probe::of(&parent).verify(first, pages, 3).unwrap(), None, "{point}");
    }
}

#[test]
fn a_stall_is_what_the_vcpus_see_of_a_pause() {
    let host = host();
    let mut parent = parent(&host, class(8, 2));
    parent.freeze(&host).unwrap();
    let spinning: Vec<_> = (0..2).map(|vcpu| Probe::on(&parent, vcpu).post(Command::Spin { rounds: None }).unwrap()).collect();
    std::thread::sleep(Duration::from_millis(20));
    let report = parent.freeze(&host).unwrap().report;
    let stall = parent.last_stall(probe::PATIENCE).unwrap();
    assert!(stall >= report.stall - report.rest, "{stall:?} is less than the pause of {report:?}");
    parent.pause().unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(parent.last_stall(Duration::from_millis(1)), None, "nobody runs yet");
    parent.resume();
    assert!(parent.last_stall(probe::PATIENCE).unwrap() >= Duration::from_millis(50));
    for (vcpu, pending) in spinning.into_iter().enumerate() {
        Probe::on(&parent, vcpu).stop(pending).unwrap();
    }
}

#[test]
fn forks_of_forks_to_depth_32_keep_a_flat_index() {
    let host = host();
    let class = class(MIB, 1);
    let first = probe::first_work_page().0;
    let mut machine = parent(&host, class);
    let generations = 32u64;
    // Each generation writes pages that the next ones overwrite in part.
    let written = |generation: u64| (PageIndex(first + generation * 40), 200u64);
    let mut expected: std::collections::BTreeMap<u64, u64> = std::collections::BTreeMap::new();
    for generation in 0..=generations {
        let (from, pages) = written(generation);
        Probe::of(&machine).fill(from, pages, 100 + generation).unwrap();
        expected.extend((0..pages).map(|page| (from.0 + page, 100 + generation)));
        let image = machine.freeze(&host).unwrap().image;
        assert_eq!(u64::from(image.depth()), generation);
        for region in image.regions() {
            assert!(region.map().runs().len() <= types::extents::MAX_RUNS);
            assert!(region.layers().len() as u64 <= generation + 1, "layers that nobody uses are kept");
        }
        machine = child(&host, &image);
        let probe = Probe::of(&machine);
        for (epoch, pages) in by_epoch(&expected) {
            assert_eq!(
                probe.verify(PageIndex(pages.start), pages.end - pages.start, epoch).unwrap(),
                None,
                "at depth {generation}"
            );
        }
    }
    held("generations of forks of forks", generations);
}

fn by_epoch(expected: &std::collections::BTreeMap<u64, u64>) -> Vec<(u64, std::ops::Range<u64>)> {
    let mut ranges: Vec<(u64, std::ops::Range<u64>)> = Vec::new();
    for (page, epoch) in expected {
        match ranges.last_mut() {
            Some((last, range)) if last == epoch && range.end == *page => range.end += 1,
            _ => ranges.push((*epoch, *page..page + 1)),
        }
    }
    ranges
}

#[test]
fn a_freeze_of_the_first_parent_copies_nothing() {
    let host = host();
    let class = class(64, 1);
    let mut parent = parent(&host, class);
    let first = probe::first_work_page().0;
    // From the start of RAM to here without a hole, then nothing.
    Probe::of(&parent).fill(PageIndex(first), 2048 - first, 1).unwrap();
    let frozen = parent.freeze(&host).unwrap();
    assert_eq!(frozen.report.copied_extents, 0);
    let stored = frozen.image.stored_bytes().unwrap();
    let short_holes = first * 4096;
    assert!(stored <= (2048 - first) * 4096 + short_holes, "{stored} bytes stored for {} written", (2048 - first) * 4096);
    // The parent runs on, and what it writes now is its own.
    Probe::of(&parent).fill(PageIndex(first), 2048 - first, 2).unwrap();
    assert_eq!(Probe::of(&child(&host, &frozen.image)).verify(PageIndex(first), 2048 - first, 1).unwrap(), None);
    assert_eq!(frozen.image.stored_bytes().unwrap(), stored);
}

#[test]
fn a_branch_is_as_large_as_what_was_touched() {
    let host = host();
    let class = class(256, 1);
    let mut parent = parent(&host, class);
    let first = probe::first_work_page().0;
    let pages = probe::work_pages(class.memory());
    Probe::of(&parent).fill(PageIndex(first), pages / 2, 1).unwrap();
    let base = parent.freeze(&host).unwrap().image;
    let mut child = child(&host, &base);
    let probe = Probe::of(&child);
    // Ten pages in ten extents far apart, and 64 pages in a row.
    probe.call(Command::TouchWrite { first: PageIndex(first), count: 10, stride: 160, shuffle: false, value: 9 }).unwrap();
    probe.fill(PageIndex(first + 16 * 1000), 64, 3).unwrap();
    // Reading dirties nothing, neither data nor zeros.
    probe.call(Command::Checksum { first: PageIndex(first), count: pages }).unwrap();
    let frozen = child.freeze(&host).unwrap();
    let own = frozen.image.own_bytes().unwrap();
    // Mailbox, stacks, identity and clock of the one vCPU lie in three extents more.
    assert!(frozen.report.dirty_pages <= 10 + 64 + 8, "{:?}", frozen.report);
    assert_eq!(own, frozen.report.copied_extents * EXTENT_SIZE);
    assert!(frozen.report.copied_extents <= 10 + 4 + 3, "{:?}", frozen.report);
    assert!(frozen.report.copied_extents >= 10 + 4, "{:?}", frozen.report);
    // Its size on disk: `save::a_branch_saved_upon_its_base_is_as_large_as_what_was_touched`.
    let untouched = class_image_bytes(&host);
    assert!(untouched < 8 << 20, "an image of a machine that did nothing takes {untouched} bytes");
}

fn class_image_bytes(host: &vm::Host) -> u64 {
    let mut idle = parent(host, class(256, 1));
    idle.freeze(host).unwrap().image.stored_bytes().unwrap()
}

#[test]
fn a_sealed_image_never_grows_whatever_children_write() {
    let host = host();
    let class = class(MIB, 1);
    let mut parent = parent(&host, class);
    let first = probe::first_work_page().0;
    let pages = probe::work_pages(class.memory());
    // Data, short holes, a long hole, data.
    Probe::of(&parent)
        .call(Command::TouchWrite { first: PageIndex(first), count: 20, stride: 40, shuffle: false, value: 1 })
        .unwrap();
    Probe::of(&parent).fill(PageIndex(first + pages - 10), 10, 1).unwrap();
    let base = parent.freeze(&host).unwrap().image;
    let mut branch_parent = child(&host, &base);
    Probe::of(&branch_parent)
        .call(Command::TouchWrite { first: PageIndex(first), count: 30, stride: 100, shuffle: true, value: 7 })
        .unwrap();
    let branch = branch_parent.freeze(&host).unwrap().image;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    vm::image::save(&branch, &path, |_, _| {}).unwrap();
    let loaded = vm::image::load(&host, &path, |_, _| {}).unwrap();
    for image in [&base, &branch, &loaded] {
        let before = image.stored_bytes().unwrap();
        for epoch in 1..4 {
            let child = child(&host, image);
            let probe = Probe::of(&child);
            // Every page is read, then every page is written, by guest and by host.
            probe.call(Command::Checksum { first: PageIndex(first), count: pages }).unwrap();
            assert_eq!(all_memory(&child).len() as u64, class.memory().bytes());
            probe.fill(PageIndex(first), pages, epoch).unwrap();
            assert_eq!(probe.verify(PageIndex(first), pages, epoch).unwrap(), None);
        }
        assert_eq!(image.stored_bytes().unwrap(), before, "the image grew");
    }
}

#[test]
fn a_write_pattern_of_many_runs_is_merged_within_the_bound() {
    let host = host();
    let class = class(256, 1);
    let mut parent = parent(&host, class);
    let first = probe::first_work_page().0;
    Probe::of(&parent).fill(PageIndex(first), 16, 1).unwrap();
    let base = parent.freeze(&host).unwrap().image;
    let mut child_of_base = child(&host, &base);
    // One page in each third extent: 1,333 runs if each were its own.
    let touch = Command::TouchWrite { first: PageIndex(first), count: 1300, stride: 48, shuffle: false, value: 5 };
    Probe::of(&child_of_base).call(touch).unwrap();
    let image = child_of_base.freeze(&host).unwrap().image;
    assert!(image.regions()[0].map().runs().len() <= types::extents::MAX_RUNS);
    let grandchild = child_at_rest(&host, &image);
    for n in 0..1300 {
        let at = GuestAddress(PageIndex(first + n * 48).byte_offset());
        assert_eq!(grandchild.memory().load_u64(at).unwrap(), 5, "page {n}");
        assert_eq!(
            grandchild.memory().load_u64(GuestAddress(at.0 + 4096)).unwrap(),
            if n == 0 { probe::page_word(PageIndex(first + 1), 1, 0) } else { 0 }
        );
    }
}

#[test]
fn many_children_live_at_once() {
    let host = host();
    let class = class(MIB, 1);
    let mut parent = parent(&host, class);
    let first = probe::first_work_page();
    Probe::of(&parent).fill(first, 500, 1).unwrap();
    let image = parent.freeze(&host).unwrap().image;
    let children: Vec<_> = (0..count(40, 300)).map(|_| child(&host, &image)).collect();
    for (n, child) in (0u64..).zip(&children) {
        Probe::of(child).fill(first, 20, 100 + n).unwrap();
    }
    for (n, child) in (0u64..).zip(&children) {
        assert_eq!(Probe::of(child).verify(first, 20, 100 + n).unwrap(), None);
        assert_eq!(Probe::of(child).verify(PageIndex(first.0 + 20), 480, 1).unwrap(), None);
        assert_eq!(Probe::of(child).who().unwrap(), child.id());
    }
    held("children alive at once", children.len() as u64);
}

#[test]
fn a_shell_takes_only_images_of_its_class() {
    let host = host();
    let mut parent = parent(&host, class(4, 1));
    let image = parent.freeze(&host).unwrap().image;
    for other in [class(6, 1), class(4, 2)] {
        let error = Shell::build(&host, other).unwrap().fork(&image, new_id()).unwrap_err();
        assert!(matches!(error, vm::shell::ForkError::OtherClass { .. }), "{error}");
        assert!(!error.remedy().is_empty());
    }
}

#[test]
fn the_first_instruction_of_a_child_is_observed() {
    let host = host();
    let mut parent = parent(&host, class(4, 1));
    let image = parent.freeze(&host).unwrap().image;
    let mut child = child_at_rest(&host, &image);
    assert_eq!(child.wait_for_first_exit(Duration::from_millis(20)), None);
    child.resume();
    assert!(child.wait_for_first_exit(Duration::from_secs(30)).is_some());
}

#[test]
fn machines_and_images_may_go_in_any_order() {
    let host = host();
    let mut dice = fastrand::Rng::with_seed(seed());
    let mut parent_machine = Some(parent(&host, class(8, 1)));
    let first = probe::first_work_page();
    Probe::of(parent_machine.as_ref().unwrap()).fill(first, 100, 1).unwrap();
    let mut image = Some(parent_machine.as_mut().unwrap().freeze(&host).unwrap().image);
    let survivor = child(&host, image.as_ref().unwrap());
    let weak = Arc::downgrade(image.as_ref().unwrap());
    if dice.bool() {
        drop(parent_machine.take());
        drop(image.take());
    } else {
        drop(image.take());
        drop(parent_machine.take());
    }
    assert_eq!(Probe::of(&survivor).verify(first, 100, 1).unwrap(), None);
    assert!(weak.upgrade().is_some(), "a living child keeps its image");
    drop(survivor);
    assert!(weak.upgrade().is_none(), "an image that nobody uses is gone");
}
