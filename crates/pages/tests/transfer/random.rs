//! Random events in any order, sensible or not, against the books; and from wherever that leads, the way to settled.

use std::time::Duration;

use pages::transfer::{Arrival, Config, ExtentId, Region, RequestId, SourceId, Waiter};
use proptest::prelude::*;
use types::ExtentIndex;

use crate::books::Books;
use crate::cases_and_seed;

const DEADLINE: Duration = Duration::from_secs(2);

#[derive(Clone, Debug)]
enum Event {
    AddSource(u32),
    RemoveSource(u32),
    Demand(ExtentId, u64),
    Forget(u64),
    Replay(Vec<ExtentId>),
    Stream(bool),
    /// The n-th of the requests under way gets an answer for the n-th extent that it awaits.
    Answer(usize, usize, Arrival),
    /// The same, from the request's first to its last.
    AnswerAll(usize),
    Stray(u64, ExtentId, Arrival),
    End(usize),
    Evict(ExtentId),
    Otherwise(ExtentId),
    Wait(u64),
    WaitForTimer,
}

/// Mostly of the image, sometimes not.
fn any_extent() -> impl Strategy<Value = ExtentId> {
    let id = |region, extent| ExtentId { region, extent: ExtentIndex(extent) };
    prop_oneof![
        8 => (0..40u32).prop_map(move |extent| id(0, extent)),
        2 => (0..5u32).prop_map(move |extent| id(1, extent)),
        1 => (0..4u8, 0..200u32).prop_map(move |(region, extent)| id(region, extent)),
    ]
}

fn any_arrival() -> impl Strategy<Value = Arrival> {
    prop_oneof![
        6 => (0..70_000u32).prop_map(|wire_bytes| Arrival::Published { wire_bytes }),
        2 => Just(Arrival::Absent),
        1 => Just(Arrival::Wrong),
    ]
}

fn any_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => (0..5u32).prop_map(Event::AddSource),
        1 => (0..5u32).prop_map(Event::RemoveSource),
        8 => (any_extent(), 0..6u64).prop_map(|(extent, waiter)| Event::Demand(extent, waiter)),
        1 => (0..6u64).prop_map(Event::Forget),
        2 => proptest::collection::vec(any_extent(), 0..20).prop_map(Event::Replay),
        2 => proptest::bool::weighted(0.8).prop_map(Event::Stream),
        10 => (0..20usize, 0..16usize, any_arrival()).prop_map(|(request, extent, arrival)| {
            Event::Answer(request, extent, arrival)
        }),
        3 => (0..20usize).prop_map(Event::AnswerAll),
        1 => (0..60u64, any_extent(), any_arrival()).prop_map(|(request, extent, arrival)| {
            Event::Stray(request, extent, arrival)
        }),
        2 => (0..20usize).prop_map(Event::End),
        2 => any_extent().prop_map(Event::Evict),
        1 => any_extent().prop_map(Event::Otherwise),
        6 => (0..400_000u64).prop_map(Event::Wait),
        4 => Just(Event::WaitForTimer),
    ]
}

fn nth_request(books: &Books, number: usize) -> Option<RequestId> {
    let count = books.live.len().max(1);
    books.live.keys().nth(number % count).copied()
}

fn happen(books: &mut Books, event: Event) {
    match event {
        Event::AddSource(source) => books.add_source(SourceId(source)),
        Event::RemoveSource(source) => books.remove_source(SourceId(source)),
        Event::Demand(extent, waiter) => books.demand(extent, Waiter(waiter)),
        Event::Forget(waiter) => books.forget(Waiter(waiter)),
        Event::Replay(extents) => books.replay(extents),
        Event::Stream(is_on) => books.stream(is_on),
        Event::Answer(number, extent, arrival) => {
            if let Some(request) = nth_request(books, number) {
                let awaited = &books.live[&request].awaited;
                books.arrived(request, awaited[extent % awaited.len()], arrival);
            }
        }
        Event::AnswerAll(number) => {
            if let Some(request) = nth_request(books, number) {
                answer_all(books, request);
            }
        }
        Event::Stray(request, extent, arrival) => books.arrived(RequestId(request), extent, arrival),
        Event::End(number) => {
            if let Some(request) = nth_request(books, number) {
                books.ended(request);
            }
        }
        Event::Evict(extent) => books.evict(extent),
        Event::Otherwise(extent) => books.published_otherwise(extent),
        Event::Wait(micros) => books.advance(books.now + Duration::from_micros(micros)),
        Event::WaitForTimer => {
            if let Some(due) = books.transfer.next_timeout() {
                books.advance(due.max(books.now));
            }
        }
    }
}

fn answer_all(books: &mut Books, request: RequestId) {
    while let Some(extent) = books.live.get(&request).map(|live| live.awaited[0]) {
        books.arrived(request, extent, Arrival::Published { wire_bytes: 65_536 });
    }
}

/// One source that works, and streaming: whatever the others do (here nothing at all), all ends settled.
fn ends_settled(books: &mut Books) {
    let good = SourceId(99);
    books.add_source(good);
    books.stream(true);
    let limit = books.now + Duration::from_secs(60);
    while !books.absent.is_empty() {
        let asked: Vec<RequestId> = books.live.iter().filter(|(_, live)| live.source == good).map(|(id, _)| *id).collect();
        if asked.is_empty() {
            let due = books.transfer.next_timeout().expect("something is absent and nothing is awaited");
            assert!(due < limit, "not settled after 60 s");
            books.advance(due.max(books.now));
        }
        for request in asked {
            books.advance(books.now + Duration::from_micros(700));
            answer_all(books, request);
        }
    }
    assert!(books.waiting.is_empty() && books.live.is_empty());
    assert_eq!(books.transfer.next_timeout(), None, "there is nothing to wait for");
}

fn config() -> ProptestConfig {
    let (cases, seed) = cases_and_seed(500, 20_000);
    ProptestConfig {
        cases,
        failure_persistence: None,
        rng_seed: proptest::test_runner::RngSeed::Fixed(seed),
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn every_rule_holds_whatever_happens(
        events in proptest::collection::vec(any_event(), 0..150),
        seed in any::<u64>(),
    ) {
        let regions = [
            Region { extents: 40, absent: vec![0..17, 20..40] },
            Region { extents: 5, absent: std::iter::once(1..5).collect() },
        ];
        let mut books = Books::new(Config::with_deadline(DEADLINE), &regions, seed);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for event in events {
                books.log.push(format!("{:?} {event:?}", books.now));
                happen(&mut books, event);
            }
            ends_settled(&mut books);
        }));
        if let Err(panic) = outcome {
            println!("{}", books.log.join("\n"));
            std::panic::resume_unwind(panic);
        }
        let stats = books.transfer.stats();
        prop_assert_eq!(stats.waited, stats.woken + stats.given_up + books.forgotten);
    }
}
