//! What is not there, or not right, is seen by nobody: bytes that do not verify, holes that somebody reads past who watches them,
//! descriptors that close too early, children that die while they wait. Each guard is taken out once, to show what it is for.

use std::sync::Arc;
use std::time::Duration;

use types::{ExtentIndex, Reason};
use vm::harness::class;
use vm::harness::guards::{Guard, take_out};
use vm::host_image::PublishError;
use vm::jail::{Jail, Mechanism};
use vm::pool::{Jailed, Settings};
use vm::probe::{self, Command};
use vm::{HostImage, Pool};

use crate::remote::{MIB, PAGES, PATIENCE, Pager, ended};
use crate::workers::{check, fork, image, pool, settings};

fn pool_without(mechanism: Mechanism) -> Pool {
    let settings = Settings { jail: Jail::without([mechanism]), ..settings() };
    Pool::open(vm::harness::host(), settings).unwrap()
}

#[test]
fn bytes_that_do_not_verify_are_never_mapped() {
    let pool = pool();
    let pager = Pager::of(&image(&pool, class(MIB, 1), PAGES));
    let (_, image) = pager.open(&pool);
    let child = fork(&pool, &image, 1).remove(0);
    pager.state(|state| state.liar = Some(|bytes| bytes[4097] ^= 1));
    child.post(0, Command::Verify { first: probe::first_work_page(), count: 50, epoch: 7 }).unwrap();
    let started = std::time::Instant::now();
    while pager.state(|state| state.refused.len()) < 5 {
        assert!(started.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(1));
    }
    pager.state(|state| state.liar = None);
    assert_eq!(child.answer(0).unwrap()[0], 0);
    assert!(pager.state(|state| state.refused.iter().all(|error| matches!(error, PublishError::Wrong { .. }))));
}

/// The proof that the test above finds what it looks for.
#[test]
fn without_verification_a_wrong_byte_is_seen() {
    take_out(Guard::Verification);
    let pool = pool();
    let pager = Pager::of(&image(&pool, class(MIB, 1), PAGES));
    let (_, image) = pager.open(&pool);
    let child = fork(&pool, &image, 1).remove(0);
    pager.state(|state| state.liar = Some(|bytes| bytes[4097] ^= 1));
    let verify = Command::Verify { first: probe::first_work_page(), count: 50, epoch: 7 };
    assert!(child.call(0, verify).unwrap()[0] > 0);
}

/// A worker that has broken out of its thread's filter maps the host image behind the back of its userfaultfd and reads a hole:
/// a page of zeros is in the file then, which is found out before anybody is shown it.
fn hole_is_read(pool: &Pool) -> (Pager, Vec<Jailed>) {
    let pager = Pager::of(&image(pool, class(MIB, 1), PAGES));
    let (host_image, image) = pager.open(pool);
    let children = fork(pool, &image, 3);
    let last = ExtentIndex(u32::try_from(MIB * 16 / 4).unwrap());
    assert!(!host_image.has(0, last));
    let errno = children[0].read_hole(last.byte_offset() + 8192, false);
    println!("reading a hole: {errno:?}");
    (pager, children)
}

/// A command that touches the extent of [`hole_is_read`].
fn touch_it() -> Command {
    Command::Verify { first: types::PageIndex(MIB * 256 / 4), count: 16, epoch: 7 }
}

#[test]
fn a_hole_that_a_worker_has_read_poisons_the_host_image() {
    let pool = pool_without(Mechanism::Seccomp);
    let (pager, children) = hole_is_read(&pool);
    children[1].post(0, touch_it()).unwrap();
    for child in &children {
        assert_eq!(ended(child).reason, Reason::ImagePoisoned);
    }
    assert!(pager.state(|state| matches!(state.refused[..], [PublishError::Poisoned(_), ..])));
}

#[test]
fn without_the_look_at_what_was_placed_zeros_are_seen() {
    take_out(Guard::PresenceOnExists);
    let pool = pool_without(Mechanism::Seccomp);
    let (_pager, children) = hole_is_read(&pool);
    assert!(children[1].call(0, touch_it()).unwrap()[0] > 0);
}

#[test]
fn a_worker_in_its_jail_cannot_read_a_hole() {
    let pool = pool();
    let (pager, children) = hole_is_read(&pool);
    assert_eq!(ended(&children[0]).reason, Reason::JailViolation);
    assert_eq!(children[1].call(0, touch_it()).unwrap()[0], 0);
    assert!(pager.state(|state| state.refused.is_empty()));
}

/// The very page of [`forked_reader`].
fn touch_that_page() -> Command {
    Command::Verify { first: types::PageIndex(MIB * 256 / 4 + 2), count: 1, epoch: 7 }
}

/// A worker that was taken over keeps to its filter, and has its copier read a hole: what the copier inherits is not watched.
fn forked_reader(pool: &Pool) -> (Pager, Vec<Jailed>, Result<i32, vm::pool::PoolError>) {
    let pager = Pager::of(&image(pool, class(MIB, 1), PAGES));
    let (host_image, image) = pager.open(pool);
    let children = fork(pool, &image, 2);
    let at = MIB * 256 / 4 * 4096 + 8192;
    assert!(!host_image.has(0, ExtentIndex(u32::try_from(at / types::EXTENT_SIZE).unwrap())));
    let read = children[0].read_hole(at, true);
    println!("reading a hole in a process of its own: {read:?}");
    (pager, children, read)
}

#[test]
fn a_worker_whose_memory_is_arriving_makes_no_process_that_could_read_a_hole() {
    for settings in [settings(), Settings { groups: None, ..settings() }] {
        let pool = Pool::open(vm::harness::host(), settings).unwrap();
        let (_pager, children, read) = forked_reader(&pool);
        assert_eq!(read.unwrap(), rustix::io::Errno::AGAIN.raw_os_error());
        assert_eq!(children[1].call(0, touch_that_page()).unwrap()[0], 0);
        // It can be branched all the same.
        check(&fork(&pool, &children[0].freeze().unwrap().image, 1)[0], PAGES, 7);
    }
}

#[test]
fn without_that_a_sibling_reads_zeros_until_somebody_looks() {
    take_out(Guard::NoProcesses);
    let pool = pool();
    let (_pager, children, read) = forked_reader(&pool);
    assert_eq!(read.unwrap(), 0);
    assert_eq!(children[1].call(0, touch_that_page()).unwrap()[0], 1);
    let image = children[1].image().unwrap();
    image.unsettled().unwrap().check_pages();
    assert!(children.iter().all(|child| ended(child).reason == Reason::ImagePoisoned));
}

/// A child is killed while it waits for a page. KVM may still wait for it on the child's behalf, in a thread of the kernel's. Says
/// how many bytes that has put into the host image, and whether another child then sees what it should.
fn one_is_killed_while_it_waits() -> (u64, bool) {
    let pool = pool();
    let pager = Pager::of(&image(&pool, class(MIB, 1), PAGES));
    let (host_image, image) = pager.open(&pool);
    let children = fork(&pool, &image, 2);
    pager.is_dead(true);
    let before = image.own_bytes().unwrap();
    children[0].post(0, touch_it()).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    children[0].kill();
    assert_eq!(ended(&children[0]).reason, Reason::Killed);
    let started = std::time::Instant::now();
    while host_image.resident().children > 1 {
        assert!(started.elapsed() < PATIENCE, "the other is gone");
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(Duration::from_millis(200));
    let bytes = image.own_bytes().unwrap() - before;
    pager.is_dead(false);
    (bytes, children[1].call(0, touch_it()).is_ok_and(|[differ, ..]| differ == 0))
}

#[test]
fn a_child_that_is_killed_while_it_waits_leaves_no_zeros_to_the_others() {
    assert_eq!(one_is_killed_while_it_waits(), (0, true));
}

#[test]
fn without_refusing_what_the_dead_wait_for_zeros_appear() {
    take_out(Guard::RefusalOfTheDead);
    let (bytes, is_right) = one_is_killed_while_it_waits();
    assert!(bytes > 0 && !is_right, "{bytes} bytes");
}

/// The node's descriptors close when its pager goes; those of the workers keep absent memory absent until they are dead.
fn node_lets_go(pool: &Pool) -> (Arc<HostImage>, u64) {
    // As the kernel closes them, with no word before.
    take_out(Guard::RefusalOfTheDead);
    let pager = Pager::of(&image(pool, class(MIB, 1), PAGES));
    let (host_image, image) = pager.open(pool);
    let child = fork(pool, &image, 1).remove(0);
    pager.is_dead(true);
    let before = image.own_bytes().unwrap();
    child.post(0, touch_it()).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    child.let_go_of_host_image();
    pager.state(|state| state.children.clear());
    std::thread::sleep(Duration::from_millis(200));
    let after = image.own_bytes().unwrap();
    child.kill();
    assert!(child.wait_for_end(PATIENCE).is_some());
    (host_image, after - before)
}

#[test]
fn a_node_that_lets_go_shows_no_child_a_page_of_zeros() {
    let (_, bytes) = node_lets_go(&pool());
    assert_eq!(bytes, 0);
}

#[test]
fn without_a_workers_own_watch_zeros_appear() {
    take_out(Guard::WorkersWatch);
    let (_, bytes) = node_lets_go(&pool());
    assert!(bytes > 0);
}
