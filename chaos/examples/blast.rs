//! How much a relay carries, and what share of a core it takes for it: one sender, paced or as fast as it can, and one sink, in
//! this process, with batches like QUIC's. Prints one line of JSON a case.
//!
//! `cargo run --release -p farfork-chaos --example blast -- [SECONDS] [MBIT_PER_SECOND]`
#![forbid(unsafe_code)]

use std::io::IoSliceMut;
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use chaos::relay::{Config, Impairment, Probability, Relay};
use quinn_udp::{RecvMeta, Transmit, UdpSocketState};

/// What quinn puts into one system call.
const QUIC_BATCH: usize = 10;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let seconds: u64 = arguments.next().map_or(3, |text| text.parse().expect("a number of seconds"));
    let mbit: Option<u32> = arguments.next().map(|text| text.parse().expect("a number of Mbit/s"));
    let none = Impairment::default();
    let delay = Impairment { delay: Duration::from_millis(10), ..none };
    let loss = Impairment { loss: Probability::new(0.01).expect("a chance"), ..none };
    let jitter = Impairment { jitter: Duration::from_millis(1), ..delay };
    for (name, impairment) in [("none", none), ("delay 10 ms", delay), ("loss 1 %", loss), ("jitter 1 ms", jitter)] {
        for (length, batch) in [(1452, QUIC_BATCH), (1200, QUIC_BATCH), (1200, 1)] {
            blast(name, impairment, length, batch, Duration::from_secs(seconds), mbit);
        }
    }
}

fn blast(name: &str, impairment: Impairment, length: usize, batch: usize, duration: Duration, mbit: Option<u32>) {
    let sink = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let config = Config { to_upstream: impairment, ..Config::to(sink.local_addr().expect("an address")) };
    let relay = Relay::start(config).expect("a relay");
    let is_over = Arc::new(AtomicBool::new(false));
    let sinking = thread::spawn({
        let is_over = Arc::clone(&is_over);
        move || swallow(&sink, &is_over)
    });
    let begin = Instant::now();
    let sent = send(&relay, length, batch, duration, mbit);
    let seconds = begin.elapsed().as_secs_f64();
    thread::sleep(Duration::from_millis(200));
    let counters = relay.stop();
    is_over.store(true, Ordering::Relaxed);
    let arrived = sinking.join().expect("the sink");
    let tally = counters.to_upstream;
    println!(
        "{}",
        serde_json::json!({
            "impairment": name,
            "datagram_bytes": length,
            "datagrams_a_call": batch,
            "sent_gbit_per_second": sent * 8.0 / seconds / 1e9,
            "relayed_gbit_per_second": float(tally.delivered_bytes) * 8.0 / seconds / 1e9,
            "share_of_a_core": counters.processor_time.as_secs_f64() / seconds,
            "dropped_before_relay": sent / float(u64::try_from(length).expect("short")) - float(tally.received),
            "dropped_in_relay": tally.overflowed + tally.refused,
            "arrived_of_delivered": arrived / float(tally.delivered_bytes.max(1)),
        })
    );
}

/// The bytes sent.
fn send(relay: &Relay, length: usize, batch: usize, duration: Duration, mbit: Option<u32>) -> f64 {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let state = UdpSocketState::new((&socket).into()).expect("a socket");
    let contents = vec![0x5a; length * batch];
    let size = float(u64::try_from(contents.len()).expect("short"));
    let segment_size = Some(length);
    let transmit = Transmit { destination: relay.address(), ecn: None, contents: &contents, segment_size, src_ip: None };
    let (begin, mut sent) = (Instant::now(), 0.0);
    while begin.elapsed() < duration {
        let allowed = mbit.map_or(f64::MAX, |mbit| f64::from(mbit) * 1e6 / 8.0 * begin.elapsed().as_secs_f64());
        if sent > allowed {
            thread::sleep(Duration::from_micros(100));
        } else if state.try_send((&socket).into(), &transmit).is_ok() {
            sent += size;
        }
    }
    sent
}

/// The bytes that came.
fn swallow(socket: &UdpSocket, is_over: &AtomicBool) -> f64 {
    let state = UdpSocketState::new(socket.into()).expect("a socket");
    // A host may allow less; then more of what is sent does not come.
    let _ = state.set_recv_buffer_size(socket.into(), 4 << 20);
    let mut room = vec![0; 32 << 16];
    let mut metas = [RecvMeta::default(); 32];
    let mut bytes = 0.0;
    while !is_over.load(Ordering::Relaxed) {
        let mut rooms: Vec<_> = room.chunks_exact_mut(1 << 16).map(IoSliceMut::new).collect();
        match state.recv(socket.into(), &mut rooms, &mut metas) {
            Ok(count) => bytes += metas[..count].iter().map(|meta| float(u64::try_from(meta.len).expect("short"))).sum::<f64>(),
            Err(_) => thread::sleep(Duration::from_micros(200)),
        }
    }
    bytes
}

#[expect(clippy::cast_precision_loss, reason = "for a figure")]
fn float(n: u64) -> f64 {
    n as f64
}
