//! What a relay does to datagrams is what it was told, and can be told again.

use std::io::IoSliceMut;
use std::net::{Ipv4Addr, Ipv6Addr, UdpSocket};
use std::time::{Duration, Instant};

use chaos::relay::{Config, Decider, Direction, FLOWS_MAX, Fate, Impairment, Probability, Rate, Relay, RelayError};
use quinn_udp::{EcnCodepoint, RecvMeta, Transmit, UdpSocketState};
use vm::harness::{count, held, seed};

use crate::support::{Line, assert_balanced, is_silent, loopback, numbered, receive, socket, wait_for};

fn chance(chance: f64) -> Probability {
    Probability::new(chance).unwrap()
}

#[test]
fn without_impairment_datagrams_of_any_length_arrive_unchanged_and_answers_come_back_to_who_asked() {
    let line = Line::new(|_| {});
    let other = loopback();
    other.connect(line.relay.address()).unwrap();
    let lengths = [0_usize, 1, 8, 1200, 1452, 9000, 60_000];
    let mut dice = fastrand::Rng::with_seed(seed());
    for length in lengths {
        let asked: [Vec<u8>; 2] = std::array::from_fn(|_| (0..length).map(|_| dice.u8(..)).collect());
        for (client, asked) in [&line.client, &other].into_iter().zip(&asked) {
            client.send(asked).unwrap();
            let (came, from) = receive(&line.server);
            assert_eq!(&came, asked);
            line.server.send_to(&[came, b"!".to_vec()].concat(), from).unwrap();
        }
        for (client, asked) in [&line.client, &other].into_iter().zip(&asked) {
            let (answer, from) = receive(client);
            assert_eq!((&answer[..length], from), (&asked[..], line.relay.address()));
        }
    }
    let counters = line.relay.stop();
    assert_balanced(&counters);
    assert_eq!((counters.flows, counters.flows_evicted, counters.strays), (2, 0, 0));
    assert_eq!((counters.to_upstream.delivered, counters.to_client.delivered), (14, 14));
    assert_eq!(counters.to_upstream.delivered_bytes, 2 * lengths.iter().map(|length| *length as u64).sum::<u64>());
}

/// The kernel hands over several datagrams as one message, and takes them so: each still has its own fate, and keeps its mark.
#[test]
fn datagrams_of_a_batch_suffer_one_by_one() {
    let seed = seed();
    let impairment = Impairment { loss: chance(0.3), corrupt: chance(0.2), ..Impairment::default() };
    let line = Line::new(|config| (config.seed, config.to_upstream) = (seed, impairment));
    let mut decider = Decider::new(seed, 0, Direction::ToUpstream);
    let [client, server] = [&line.client, &line.server].map(|socket| UdpSocketState::new(socket.into()).unwrap());
    let (mut expected, mut came) = (Vec::new(), Vec::new());
    let rounds = count(20, 500);
    for round in 0..rounds {
        let mut batch: Vec<Vec<u8>> = (0..10).map(|index| numbered(round * 10 + index)).collect();
        batch[9].truncate(5);
        let contents = batch.concat();
        let (destination, ecn) = (line.relay.address(), Some(EcnCodepoint::Ect1));
        let transmit = Transmit { destination, ecn, contents: &contents, segment_size: Some(64), src_ip: None };
        client.try_send((&line.client).into(), &transmit).unwrap();
        for mut datagram in batch {
            let Fate::Delivered { flipped_bit, .. } = decider.decide(&impairment, datagram.len()) else { continue };
            if let Some(bit) = flipped_bit {
                datagram[bit / 8] ^= 1 << (bit % 8);
            }
            expected.push(datagram);
        }
        line.settled(Direction::ToUpstream, (round + 1) * 10);
        while came.len() < expected.len() {
            let (mut room, mut meta) = (vec![0; 1 << 16], [RecvMeta::default()]);
            server.recv((&line.server).into(), &mut [IoSliceMut::new(&mut room)], &mut meta).expect("what was delivered");
            assert_eq!(meta[0].ecn, Some(EcnCodepoint::Ect1));
            came.extend(room[..meta[0].len].chunks(meta[0].stride).map(<[u8]>::to_vec));
        }
        assert_eq!(came, expected);
    }
    assert_balanced(&line.relay.stop());
    held("batches of ten", rounds);
}

/// What arrives is what the decider says of this seed, each time.
#[test]
fn a_run_is_replayed_by_its_seed() {
    let mut dice = fastrand::Rng::with_seed(seed());
    let rounds = count(5, 200);
    for _ in 0..rounds {
        let seed = dice.u64(..);
        let impairment = Impairment {
            loss: chance(dice.f64() * 0.5),
            duplicate: chance(dice.f64() * 0.5),
            corrupt: chance(dice.f64() * 0.5),
            jitter: Duration::from_micros(dice.u64(..2000)),
            ..Impairment::default()
        };
        let mut expected = Vec::new();
        let mut decider = Decider::new(seed, 0, Direction::ToUpstream);
        for number in 0..300 {
            let datagram = numbered(number);
            let Fate::Delivered { flipped_bit, copy, .. } = decider.decide(&impairment, datagram.len()) else { continue };
            expected.extend(copy.map(|_| datagram.clone()));
            let mut datagram = datagram;
            if let Some(bit) = flipped_bit {
                datagram[bit / 8] ^= 1 << (bit % 8);
            }
            expected.push(datagram);
        }
        expected.sort();
        for _ in 0..2 {
            let line = Line::new(|config| (config.seed, config.to_upstream) = (seed, impairment));
            let (mut came, _) = line.send_numbered(300);
            // Jitter and scheduling say in which order.
            came.sort();
            assert_eq!(came, expected);
            assert_balanced(&line.relay.stop());
        }
    }
    held("runs of 300 datagrams, each twice", rounds);
}

#[test]
fn each_impairment_is_counted_as_what_it_is() {
    let none = Impairment::default();
    let always = Probability::ALWAYS;
    let of = |impairment| {
        let line = Line::new(|config| config.to_upstream = impairment);
        let (came, tally) = line.send_numbered(50);
        assert_balanced(&line.relay.stop());
        (came, tally)
    };
    let intact: Vec<_> = (0..50).map(numbered).collect();

    let (came, tally) = of(Impairment { loss: always, ..none });
    assert_eq!((came.len(), tally.lost), (0, 50));
    let (came, tally) = of(Impairment::blocked());
    assert_eq!((came.len(), tally.blocked), (0, 50));
    let (mut came, tally) = of(Impairment { duplicate: always, ..none });
    came.sort();
    assert!(came.chunks(2).zip(&intact).all(|(twins, one)| twins == [one.clone(), one.clone()]));
    assert_eq!((came.len(), tally.duplicated), (100, 50));
    let (came, tally) = of(Impairment { corrupt: always, ..none });
    let flipped = |came: &[u8], sent: &[u8]| came.iter().zip(sent).map(|(a, b)| (a ^ b).count_ones()).sum::<u32>();
    assert!(came.iter().zip(&intact).all(|(came, sent)| flipped(came, sent) == 1));
    assert_eq!((came.len(), tally.corrupted), (50, 50));
    let (came, tally) = of(Impairment { reorder: always, ..none });
    assert_eq!((came, tally.reordered), (intact, 50));
}

#[test]
fn a_delay_is_kept_and_keeps_the_order() {
    let delay = Duration::from_millis(50);
    let line = Line::new(|config| {
        config.to_upstream.delay = delay;
        config.to_client.delay = delay;
    });
    let begin = Instant::now();
    let (came, _) = line.send_numbered(200);
    assert!(begin.elapsed() >= delay);
    assert_eq!(came, (0..200).map(numbered).collect::<Vec<_>>());
    let begin = Instant::now();
    line.client.send(b"?").unwrap();
    let (_, from) = receive(&line.server);
    line.server.send_to(b"!", from).unwrap();
    assert_eq!(receive(&line.client).0, b"!");
    assert!(begin.elapsed() >= 2 * delay);
}

#[test]
fn those_held_back_are_overtaken_and_the_others_keep_their_order() {
    let seed = seed();
    let impairment = Impairment { reorder: chance(0.3), hold_back: Duration::from_millis(500), ..Impairment::default() };
    let line = Line::new(|config| (config.seed, config.to_upstream) = (seed, impairment));
    let mut decider = Decider::new(seed, 0, Direction::ToUpstream);
    let is_held = |decider: &mut Decider| matches!(decider.decide(&impairment, 64), Fate::Delivered { is_reordered: true, .. });
    let (late, prompt): (Vec<_>, Vec<_>) = (0..100).partition(|_| is_held(&mut decider));
    let (came, tally) = line.send_numbered(100);
    assert_eq!(came, prompt.iter().chain(&late).copied().map(numbered).collect::<Vec<_>>());
    assert_eq!(tally.reordered, late.len() as u64);
}

#[test]
fn a_rate_lets_its_burst_through_at_once_then_holds_and_drops_what_does_not_fit() {
    let rate = Rate { bytes_per_second: 64_000, burst_bytes: 640, queue_bytes: 6400 };
    let line = Line::new(|config| config.to_upstream.rate = Some(rate));
    let begin = Instant::now();
    let (came, tally) = line.send_numbered(1000);
    // All that comes while the queue is full is dropped; while it is sent, some leaves.
    assert!(tally.delivered >= (640 + 6400) / 64 && tally.overflowed > 0, "{tally:?}");
    let least = Duration::from_millis(tally.delivered_bytes - 640) / 64;
    assert!(begin.elapsed() >= least, "{} bytes within {:?}", tally.delivered_bytes, begin.elapsed());
    assert!(came.is_sorted());
    assert_balanced(&line.relay.stop());
}

#[test]
fn a_block_holds_one_way_until_it_is_lifted() {
    let line = Line::new(|config| config.to_client = Impairment::blocked());
    line.client.send(b"one").unwrap();
    let (came, from) = receive(&line.server);
    assert_eq!(came, b"one");
    line.server.send_to(b"lost", from).unwrap();
    assert!(is_silent(&line.client));
    line.relay.set(Direction::ToClient, Impairment::default());
    line.relay.set(Direction::ToUpstream, Impairment::blocked());
    line.server.send_to(b"two", from).unwrap();
    assert_eq!(receive(&line.client).0, b"two");
    line.client.send(b"lost").unwrap();
    assert!(is_silent(&line.server));
    let counters = line.relay.stop();
    assert_balanced(&counters);
    assert_eq!((counters.to_client.blocked, counters.to_upstream.blocked), (1, 1));
}

#[test]
fn past_the_limit_the_quietest_client_makes_room_and_may_come_back() {
    let line = Line::new(|_| {});
    let clients: Vec<UdpSocket> = (0..=FLOWS_MAX).map(|_| loopback()).collect();
    let mut addresses = Vec::new();
    for client in &clients {
        client.send_to(b"hello", line.relay.address()).unwrap();
        addresses.push(receive(&line.server).1);
    }
    let counters = line.relay.counters();
    assert_eq!((counters.flows, counters.flows_evicted), (FLOWS_MAX as u64 + 1, 1));
    // The second still has its flow; the first has lost it, and gets another.
    line.server.send_to(b"you", addresses[1]).unwrap();
    assert_eq!(receive(&clients[1]).0, b"you");
    line.server.send_to(b"nobody", addresses[0]).unwrap();
    assert!(is_silent(&clients[0]));
    clients[0].send_to(b"again", line.relay.address()).unwrap();
    assert_eq!(receive(&line.server).0, b"again");
    assert_eq!(line.relay.counters().flows, FLOWS_MAX as u64 + 2);
}

#[test]
fn what_does_not_come_from_the_server_does_not_reach_a_client() {
    let line = Line::new(|_| {});
    line.client.send(b"hello").unwrap();
    let (_, flow) = receive(&line.server);
    loopback().send_to(b"forged", (Ipv4Addr::LOCALHOST, flow.port())).unwrap();
    assert!(is_silent(&line.client));
    assert_eq!(line.relay.stop().strays, 1);
}

#[test]
fn a_relay_outlives_its_server_and_does_not_keep_its_port() {
    let server = loopback();
    let upstream = server.local_addr().unwrap();
    drop(server);
    let relay = Relay::start(Config::to(upstream)).unwrap();
    let (client, address) = (loopback(), relay.address());
    for _ in 0..10 {
        client.send_to(b"nobody", address).unwrap();
    }
    wait_for(|| (relay.counters().to_upstream.delivered == 10).then_some(()));
    let server = socket(upstream);
    client.send_to(b"somebody", address).unwrap();
    let (came, from) = receive(&server);
    assert_eq!(came, b"somebody");
    server.send_to(b"yes", from).unwrap();
    assert_eq!(receive(&client).0, b"yes");
    assert!(matches!(Relay::start(Config { listen: address, ..Config::to(upstream) }), Err(RelayError::Listen { .. })));
    drop(relay);
    socket(address);
}

/// A client talks to the address that it knows, and would not take answers from another.
#[test]
fn a_relay_on_every_address_answers_from_the_one_that_was_asked() {
    let line = Line::new(|config| config.listen = (Ipv4Addr::UNSPECIFIED, 0).into());
    let client = loopback();
    client.connect((Ipv4Addr::new(127, 0, 0, 9), line.relay.address().port())).unwrap();
    client.send(b"?").unwrap();
    let (_, from) = receive(&line.server);
    line.server.send_to(b"!", from).unwrap();
    assert_eq!(receive(&client).0, b"!");
}

#[test]
fn it_works_for_ipv6_too() {
    let server = socket((Ipv6Addr::LOCALHOST, 0));
    let relay = Relay::start(Config::to(server.local_addr().unwrap())).unwrap();
    let client = socket((Ipv6Addr::LOCALHOST, 0));
    client.send_to(b"?", relay.address()).unwrap();
    let (_, from) = receive(&server);
    server.send_to(b"!", from).unwrap();
    assert_eq!(receive(&client).0, b"!");
}
