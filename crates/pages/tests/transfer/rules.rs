//! One rule each, by example. The books check the general ones meanwhile.

use std::time::Duration;

use pages::transfer::{Arrival, Config, ConfigError, ExtentId, Region, RequestId, SourceId, Transfer, Urgency, Waiter};
use types::ExtentIndex;

use crate::at;
use crate::books::Books;

const GOOD: Arrival = Arrival::Published { wire_bytes: 65_536 };
const A: SourceId = SourceId(0);
const B: SourceId = SourceId(1);
const C: SourceId = SourceId(2);

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// The default, but always the fastest source.
fn config() -> Config {
    Config { explore_one_in: 0, ..Config::default() }
}

/// One region of so many extents, all absent, and some sources.
fn image(extents: u32, sources: &[SourceId]) -> Books {
    let regions = [Region { extents, absent: std::iter::once(0..extents).collect() }];
    let mut books = Books::new(config(), &regions, 7);
    for source in sources {
        books.add_source(*source);
    }
    books
}

/// What is under way: whom, why, what.
fn under_way(books: &Books) -> Vec<(SourceId, Urgency, Vec<u32>)> {
    let plain = |extents: &[ExtentId]| extents.iter().map(|extent| extent.extent.0).collect();
    books.live.values().map(|live| (live.source, live.urgency, plain(&live.awaited))).collect()
}

/// The only request to `source`.
fn request_to(books: &Books, source: SourceId) -> RequestId {
    let of: Vec<RequestId> = books.live.iter().filter(|(_, live)| live.source == source).map(|(id, _)| *id).collect();
    assert_eq!(of.len(), 1, "{:?}", under_way(books));
    of[0]
}

/// Answers a demand for `extent` after `latency`, by `source`.
fn train(books: &mut Books, source: SourceId, extent: u32, latency: Duration) {
    books.demand(at(extent), Waiter(0));
    books.advance(books.now + latency);
    let request = *books.live.iter().find(|(_, live)| live.source == source).expect("it is asked").0;
    books.arrived(request, at(extent), GOOD);
}

fn wait(books: &mut Books, time: Duration) {
    books.advance(books.now + time);
}

#[test]
fn waiters_of_an_extent_share_one_request_and_one_wake() {
    let mut books = image(8, &[A]);
    for waiter in 0..32 {
        books.demand(at(3), Waiter(waiter));
        books.demand(at(3), Waiter(waiter));
    }
    assert_eq!(under_way(&books), [(A, Urgency::Demand, vec![3])]);
    books.arrived(request_to(&books, A), at(3), GOOD);
    assert_eq!((books.woken, books.transfer.stats().demanded), (32, 1));
    // A fault on what is there by now is answered, and so is one on what the image does not have.
    books.demand(at(3), Waiter(0));
    books.demand(at(8), Waiter(0));
    assert_eq!((books.woken, books.given_up), (33, 1));
}

#[test]
fn a_demand_without_answer_goes_to_each_other_source_once_a_round() {
    let mut books = image(8, &[A, B, C]);
    books.demand(at(3), Waiter(0));
    let first = config().hedge_first;
    wait(&mut books, first - millis(1));
    assert_eq!(books.live.len(), 1);
    wait(&mut books, millis(1));
    assert_eq!(under_way(&books), [(A, Urgency::Demand, vec![3]), (B, Urgency::Demand, vec![3])]);
    wait(&mut books, 2 * first);
    assert_eq!(books.live.len(), 3);
    wait(&mut books, 8 * first);
    assert_eq!((books.live.len(), books.transfer.stats().hedged), (3, 2));
    // The first good answer wins; the others are cancelled, and their answers count for nothing.
    let late = request_to(&books, A);
    books.arrived(request_to(&books, B), at(3), GOOD);
    assert!(books.live.is_empty());
    books.arrived(late, at(3), GOOD);
    assert_eq!((books.woken, books.transfer.stats().stale, books.transfer.stats().published), (1, 1, 1));
}

#[test]
fn what_is_usual_decides_when_to_hedge() {
    let mut books = image(280, &[A]);
    for extent in 0..150 {
        train(&mut books, A, extent, millis(1));
    }
    assert_eq!(books.transfer.stats().hedge_after, config().hedge_min);
    for extent in 150..280 {
        train(&mut books, A, extent, millis(10));
    }
    assert_eq!(books.transfer.stats().hedge_after, millis(30));
    let patient = Config { hedge_first: Duration::from_secs(60), ..config() };
    let transfer = Transfer::new(patient, &[], 0).unwrap();
    assert_eq!(transfer.stats().hedge_after, config().deadline / 4, "there is time for more than one source");
}

#[test]
fn a_demand_goes_to_the_fastest_and_sometimes_elsewhere() {
    let mut books = image(100, &[A]);
    train(&mut books, A, 0, millis(4));
    books.add_source(B);
    train(&mut books, B, 1, millis(2));
    books.add_source(C);
    train(&mut books, C, 2, millis(3));
    for extent in 3..30 {
        train(&mut books, B, extent, millis(2));
    }
    // It became slow: the next is asked.
    for extent in 30..40 {
        books.demand(at(extent), Waiter(0));
        let Some((request, _)) = books.live.iter().find(|(_, live)| live.source == B) else { return };
        let request = *request;
        wait(&mut books, millis(4));
        books.arrived(request, at(extent), GOOD);
    }
    panic!("the slow one is still asked first");
}

#[test]
fn what_is_queued_in_a_batch_is_demanded_at_once_and_what_is_next_is_waited_for() {
    let mut books = image(8, &[A]);
    books.stream(true);
    assert_eq!(under_way(&books)[0], (A, Urgency::Stream, vec![0, 1, 2, 3]));
    books.demand(at(0), Waiter(0));
    assert!(books.live.values().all(|live| live.urgency != Urgency::Demand));
    books.demand(at(2), Waiter(1));
    assert_eq!(under_way(&books).last(), Some(&(A, Urgency::Demand, vec![2])));
    // It does not come: asked again, of the only source there is.
    wait(&mut books, config().hedge_first);
    assert_eq!(under_way(&books).last(), Some(&(A, Urgency::Demand, vec![0])));
    assert_eq!(books.transfer.stats().promoted, 2);
    // Whichever is first wakes, and the other is not wanted.
    let (batch, demand) = (*books.live.keys().next().unwrap(), *books.live.keys().last().unwrap());
    books.arrived(batch, at(0), GOOD);
    assert!(!books.live.contains_key(&demand) && books.woken == 1);
}

#[test]
fn what_was_next_and_does_not_come_is_demanded_of_another() {
    let mut books = image(4, &[A]);
    books.stream(true);
    books.add_source(B);
    books.demand(at(0), Waiter(0));
    wait(&mut books, config().hedge_first);
    assert_eq!(under_way(&books).last(), Some(&(B, Urgency::Demand, vec![0])));
    // At once if the batch ends without it.
    let mut books = image(4, &[A]);
    books.stream(true);
    books.demand(at(0), Waiter(0));
    books.ended(request_to(&books, A));
    assert_eq!(under_way(&books)[0], (A, Urgency::Demand, vec![0]));
}

#[test]
fn a_replay_that_fails_keeps_its_order() {
    let mut books = image(64, &[A]);
    books.replay([9, 5, 7, 3].map(at).to_vec());
    let request = request_to(&books, A);
    books.arrived(request, at(5), GOOD);
    books.ended(request);
    assert_eq!(under_way(&books), [(A, Urgency::Replay, vec![9, 7, 3])]);
}

#[test]
fn the_stream_rests_while_a_demand_is_under_way_and_the_replay_does_not() {
    let mut books = image(200, &[A]);
    books.stream(true);
    let batches: Vec<RequestId> = books.live.keys().copied().collect();
    books.demand(at(100), Waiter(0));
    for batch in batches {
        while let Some(extent) = books.live.get(&batch).map(|live| live.awaited[0]) {
            books.arrived(batch, extent, GOOD);
        }
    }
    assert_eq!(under_way(&books), [(A, Urgency::Demand, vec![100])]);
    books.replay(vec![at(150), at(50)]);
    assert_eq!(under_way(&books), [(A, Urgency::Demand, vec![100]), (A, Urgency::Replay, vec![150, 50])]);
    let demand = books.live.iter().find(|(_, live)| live.urgency == Urgency::Demand).map(|(id, _)| *id);
    books.arrived(demand.unwrap(), at(100), GOOD);
    assert_eq!(under_way(&books).len(), 1, "its child may fault again at once");
    wait(&mut books, config().quiet);
    // The working set first, in its order; then the stream, from behind what was demanded.
    assert_eq!(under_way(&books)[0], (A, Urgency::Replay, vec![150, 50]));
    assert_eq!(under_way(&books)[1].1, Urgency::Stream);
    assert_eq!(under_way(&books)[1].2[0], 101);
}

#[test]
fn a_demand_that_nobody_can_be_asked_for_stops_nothing() {
    let mut books = image(4, &[A]);
    books.demand(at(0), Waiter(0));
    books.arrived(request_to(&books, A), at(0), Arrival::Absent);
    assert!(books.live.is_empty());
    books.stream(true);
    wait(&mut books, config().quiet);
    assert_eq!(under_way(&books), [(A, Urgency::Stream, vec![1, 2, 3])]);
    // After a while it is asked again: it may have it by now.
    wait(&mut books, config().absent_pause);
    assert_eq!(under_way(&books).last(), Some(&(A, Urgency::Demand, vec![0])));
}

#[test]
fn who_does_not_have_it_is_asked_again_after_the_others() {
    let mut books = image(4, &[A, B]);
    books.demand(at(0), Waiter(0));
    books.arrived(request_to(&books, A), at(0), Arrival::Absent);
    books.arrived(request_to(&books, B), at(0), Arrival::Absent);
    assert!(books.live.is_empty());
    wait(&mut books, config().absent_pause - millis(1));
    assert!(books.live.is_empty());
    wait(&mut books, millis(1));
    books.arrived(request_to(&books, A), at(0), GOOD);
    assert_eq!(books.woken, 1);
    // The same for the stream.
    let mut books = image(2, &[A]);
    books.stream(true);
    let request = request_to(&books, A);
    books.arrived(request, at(0), Arrival::Absent);
    books.arrived(request, at(1), GOOD);
    assert!(books.live.is_empty());
    wait(&mut books, config().absent_pause);
    assert_eq!(under_way(&books), [(A, Urgency::Stream, vec![0])]);
}

/// A holder that is itself still fetching does so in turn for those who wait, and not for a stream.
#[test]
fn who_does_not_have_it_for_the_stream_is_asked_at_once_when_somebody_waits() {
    let mut books = image(4, &[A]);
    books.stream(true);
    let request = request_to(&books, A);
    (0..4).for_each(|extent| books.arrived(request, at(extent), Arrival::Absent));
    assert!(books.live.is_empty());
    books.demand(at(2), Waiter(0));
    assert_eq!(under_way(&books), [(A, Urgency::Demand, vec![2])]);
    // Not even for them.
    books.arrived(request_to(&books, A), at(2), Arrival::Absent);
    assert!(books.live.is_empty());
}

#[test]
fn a_liar_is_set_aside_for_good() {
    let mut books = image(64, &[A, B]);
    books.stream(true);
    books.demand(at(60), Waiter(0));
    let demand = *books.live.iter().find(|(_, live)| live.urgency == Urgency::Demand).unwrap().0;
    books.arrived(demand, at(60), Arrival::Wrong);
    assert!(books.quarantined.contains(&A) && books.live.values().all(|live| live.source == B));
    // Its requests went elsewhere; neither time nor a new connection brings it back.
    assert!(under_way(&books).contains(&(B, Urgency::Demand, vec![60])));
    books.remove_source(A);
    books.add_source(A);
    wait(&mut books, Duration::from_secs(5));
    assert!(books.live.values().all(|live| live.source == B));
    assert_eq!(books.transfer.stats().quarantined, 1);
}

#[test]
fn who_fails_again_and_again_is_asked_last_until_it_answers() {
    let mut books = image(64, &[A]);
    train(&mut books, A, 0, millis(1));
    for _ in 0..3 {
        books.demand(at(1), Waiter(0));
        wait(&mut books, millis(15));
        books.ended(request_to(&books, A));
    }
    assert!(books.transfer.sources().all(|(_, source)| source.is_suspect && source.failures == 3));
    // Nobody else is there: after a pause, it is.
    wait(&mut books, millis(50));
    books.arrived(request_to(&books, A), at(1), GOOD);
    assert!(books.transfer.sources().all(|(_, source)| !source.is_suspect));
    // All that was under way when a connection broke is one failure.
    for extent in 10..20 {
        books.demand(at(extent), Waiter(0));
    }
    wait(&mut books, millis(1));
    for request in books.live.keys().copied().collect::<Vec<_>>() {
        books.ended(request);
    }
    assert!(books.transfer.sources().all(|(_, source)| !source.is_suspect && source.failures == 13));
}

#[test]
fn a_suspect_is_not_asked_while_another_can_be() {
    let mut books = image(64, &[A]);
    for _ in 0..3 {
        books.demand(at(1), Waiter(0));
        wait(&mut books, millis(15));
        books.ended(request_to(&books, A));
    }
    books.add_source(B);
    books.stream(true);
    books.arrived(request_to(&books, B), at(1), GOOD);
    assert!(books.live.values().all(|live| live.source == B));
    // Its pause is over, and of the two it is the one of the lower number.
    wait(&mut books, millis(100));
    books.demand(at(60), Waiter(0));
    assert!(books.live.values().all(|live| live.source == B));
    // The last resort is one nevertheless: a hedge.
    wait(&mut books, config().hedge_first);
    assert!(books.live.values().any(|live| live.source == A));
}

#[test]
fn silence_ends_a_request_and_progress_prolongs_it() {
    let mut books = image(8, &[A]);
    books.stream(true);
    let silent = *books.live.keys().next().unwrap();
    books.add_source(B);
    books.stream(false);
    wait(&mut books, config().stall - millis(1));
    assert!(books.live.contains_key(&silent));
    wait(&mut books, millis(1));
    assert!(books.live.is_empty(), "{:?}", under_way(&books));
    // Another one, whose source is at it elsewhere, may take longer; but not for ever.
    let mut books = image(64, &[A]);
    books.demand(at(0), Waiter(0));
    let silent = request_to(&books, A);
    for extent in 1..=12 {
        books.demand(at(extent), Waiter(1));
        wait(&mut books, millis(900));
        let request = *books.live.keys().last().unwrap();
        books.arrived(request, at(extent), GOOD);
        assert_eq!(books.live.contains_key(&silent), millis(900) * extent < config().patience, "{extent}");
    }
}

#[test]
fn without_any_source_a_demand_waits_for_one_until_its_deadline() {
    let mut books = image(8, &[]);
    books.demand(at(0), Waiter(0));
    wait(&mut books, Duration::from_secs(20));
    books.demand(at(0), Waiter(1));
    wait(&mut books, Duration::from_secs(10));
    assert_eq!((books.given_up, books.waiting.len()), (1, 1));
    books.add_source(A);
    books.arrived(request_to(&books, A), at(0), GOOD);
    assert_eq!((books.woken, books.given_up), (1, 1));
    books.demand(at(1), Waiter(0));
    books.remove_source(A);
    wait(&mut books, Duration::from_secs(30));
    assert_eq!(books.given_up, 2);
    assert_eq!(books.transfer.next_timeout(), None);
    // A child that is gone is neither woken nor given up.
    books.demand(at(1), Waiter(3));
    books.forget(Waiter(3));
    assert_eq!(books.transfer.next_timeout(), None);
}

#[test]
fn what_was_evicted_is_streamed_only_when_that_is_asked_for_again() {
    let mut books = image(4, &[A]);
    books.stream(true);
    while let Some((request, live)) = books.live.iter().next().map(|(id, live)| (*id, live.clone())) {
        books.arrived(request, live.awaited[0], GOOD);
    }
    assert!(books.absent.is_empty());
    for extent in 0..4 {
        books.evict(at(extent));
    }
    assert!(books.live.is_empty());
    books.demand(at(3), Waiter(0));
    books.forget(Waiter(0));
    assert!(books.live.is_empty(), "whoever wanted it is gone");
    books.replay(vec![at(2)]);
    assert_eq!(under_way(&books), [(A, Urgency::Replay, vec![2])]);
    books.demand(at(1), Waiter(0));
    assert_eq!(under_way(&books)[1], (A, Urgency::Demand, vec![1]));
    books.arrived(*books.live.keys().last().unwrap(), at(1), GOOD);
    books.stream(true);
    wait(&mut books, config().quiet);
    assert_eq!(under_way(&books)[1], (A, Urgency::Stream, vec![3]));
    books.published_otherwise(at(0));
    while let Some((request, live)) = books.live.iter().next().map(|(id, live)| (*id, live.clone())) {
        books.arrived(request, live.awaited[0], GOOD);
    }
    assert_eq!(books.log.iter().filter(|line| line.ends_with("settled")).count(), 2);
}

#[test]
fn an_image_with_nothing_to_fetch_is_settled_at_once() {
    assert_eq!(image(0, &[]).log, ["0ns settled"]);
}

#[test]
fn what_a_source_may_owe_is_bounded() {
    let mut books = image(10_000, &[A]);
    books.stream(true);
    let mut most = 0;
    for _ in 0..4_000 {
        wait(&mut books, Duration::from_micros(100));
        let oldest = books.live.iter().next().map(|(id, live)| (*id, live.awaited[0]));
        if let Some((request, extent)) = oldest {
            books.arrived(request, extent, GOOD);
        }
        most = most.max(books.live.values().map(|live| live.awaited.len()).sum());
    }
    // The books hold it against the bound; here it is that there was something to bound, and that it went on.
    assert!(most > 8 && books.absent.len() < 8_000, "{most} at once, {} left", books.absent.len());
}

#[test]
fn a_log_reads_as_the_protocol() {
    let mut books = image(64, &[A, B]);
    books.demand(at(5), Waiter(9));
    books.arrived(request_to(&books, A), at(5), Arrival::Wrong);
    books.arrived(request_to(&books, B), at(5), GOOD);
    books.replay(vec![at(7), at(6)]);
    books.remove_source(B);
    books.demand(at(6), Waiter(2));
    wait(&mut books, Duration::from_secs(30));
    let said: Vec<&str> = books.log.iter().map(String::as_str).collect();
    assert_eq!(
        said,
        [
            "0ns w9 demands 0:5",
            "0ns send r0 to s0: demand 0:5",
            "0ns r0 0:5 Wrong",
            "0ns quarantine s0: 0:5 did not verify",
            "0ns send r1 to s1: demand 0:5",
            "0ns r1 0:5 Published { wire_bytes: 65536 }",
            "0ns wake at 0:5: w9",
            "0ns send r2 to s1: replay 0:7 0:6",
            "0ns cancel r2",
            "0ns w2 demands 0:6",
            "30s give up 0:6 after 30s: w2",
        ]
    );
}

#[test]
fn knobs_that_cannot_be_are_refused() {
    let new = |config| Transfer::new(config, &[], 0).map(|_| ());
    assert_eq!(new(Config::default()), Ok(()));
    assert_eq!(new(Config { stall: Duration::ZERO, ..config() }), Err(ConfigError::Zero { knob: "stall" }));
    assert_eq!(new(Config::with_deadline(Duration::ZERO)), Err(ConfigError::Zero { knob: "deadline" }));
    let beyond = Region { extents: 4, absent: std::iter::once(2..9).collect() };
    let transfer = Transfer::new(config(), &[beyond], 0).unwrap();
    assert_eq!(transfer.stats().absent, 2, "what is no extent of the region is none that could be fetched");
    assert!(transfer.is_present(at(1)) && !transfer.is_present(ExtentId { region: 0, extent: ExtentIndex(2) }));
}
