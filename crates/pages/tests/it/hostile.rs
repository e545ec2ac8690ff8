//! Peers that attack a holder, which runs in a process of its own: its memory stays within bounds, and a good reader is served
//! all the while. What the attack costs that reader is printed, not asserted.

use std::io::{BufRead, BufReader, Lines, Write};
use std::net::{SocketAddr, UdpSocket};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use pages::fakes::raw_connection;
use pages::wire::{LeaseToken, Request, samples};
use pages::{Certificate, Identity, Trust};
use types::{Digest, Tenant};

use crate::common::{PATIENCE, Reader, count, fetch, identity, request, seed};
use chaos::corpus::{entries, mutated};

const MIB: u64 = 1 << 20;

/// A holder in its own process, one good reader, and one node that is trusted and should not be.
struct Scene {
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
    address: SocketAddr,
    image: Digest,
    good: Reader,
    enemy: Identity,
    enemys_trust: Trust,
    _files: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        let files = tempfile::tempdir().unwrap();
        let (good, enemy) = (Reader::of(identity()), identity());
        let paths = [(&good.identity, "good"), (&enemy, "enemy")].map(|(identity, name)| {
            std::fs::write(files.path().join(name), identity.certificate_pem()).unwrap();
            files.path().join(name)
        });
        let mut command = Command::new(env!("CARGO_BIN_EXE_holder"));
        let mut child = command.args(paths).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let input = child.stdin.take().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut line = || output.next().unwrap().unwrap();
        let (address, image) = (line().parse().unwrap(), line().parse().unwrap());
        let mut pem = String::new();
        loop {
            match line() {
                end if end == "ready" => break,
                line => pem = pem + &line + "\n",
            }
        }
        let certificate = Certificate::from_pem(pem.as_bytes()).unwrap();
        let enemys_trust = Trust::new();
        for trust in [&good.trust, &enemys_trust] {
            trust.add(&certificate, []).unwrap();
        }
        Self { child, input, output, address, image, good, enemy, enemys_trust, _files: files }
    }

    /// The most bytes that were ever resident in it, and its counters.
    fn report(&mut self) -> (u64, String) {
        self.input.write_all(b"\n").unwrap();
        let line = self.output.next().unwrap().unwrap();
        let (resident, counters) = line.split_once(' ').unwrap();
        (resident.parse().unwrap(), counters.to_owned())
    }

    fn counter(&mut self, name: &str) -> u64 {
        let (_, counters) = self.report();
        let (_, rest) = counters.split_once(&format!("{name}: ")).unwrap();
        rest.split([',', ' ']).next().unwrap().parse().unwrap()
    }

    /// Waits until a counter is as it should be.
    fn until(&mut self, name: &str, is_right: impl Fn(u64) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !is_right(self.counter(name)) {
            assert!(Instant::now() < deadline, "{name}: {:?}", self.report());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Runs an attack in a thread of its own while the good reader reads.
    fn under(&mut self, attack: &str, grows_by_at_most: u64, enemy: impl FnOnce(Enemy) + Send + 'static) {
        let runtime = tokio::runtime::Handle::current();
        let link = self.good.client.link(self.address, None);
        let opened = runtime.block_on(link.open(&Tenant::default_tenant(), self.image, PATIENCE)).unwrap();
        let image = self.image;
        let reading = |is_over: &dyn Fn() -> bool| {
            let start = Instant::now();
            let mut took = Vec::new();
            while !is_over() || took.len() < 20 || start.elapsed() < Duration::from_millis(300) {
                let extent = u32::try_from(took.len()).unwrap() * 7 % 1024;
                let asked = Instant::now();
                let (answers, end) = runtime.block_on(fetch(&link, &request(&opened.lease, image, [extent])));
                end.unwrap_or_else(|error| panic!("{attack}: the good reader is not served: {error:?}"));
                assert_eq!(answers.len(), 1);
                took.push(asked.elapsed());
            }
            took
        };
        let quiet = reading(&|| true);
        let (peak_before, _) = self.report();
        let enemys = Enemy {
            address: self.address,
            image: self.image,
            trust: self.enemys_trust.clone(),
            identity: Identity::from_pem(self.enemy.certificate_pem().as_bytes(), self.enemy.key_pem().as_bytes()).unwrap(),
        };
        let thread = std::thread::spawn(move || enemy(enemys));
        let disturbed = reading(&|| thread.is_finished());
        let (before, after) = (percentiles(quiet), percentiles(disturbed));
        thread.join().unwrap();
        let (peak, counters) = self.report();
        println!("{attack}: a fault took {before} before, {after} meanwhile; at most {} MiB resident; {counters}", peak / MIB);
        let grown = peak - peak_before;
        assert!(grown < grows_by_at_most, "{attack}: grown by {grown} bytes, {grows_by_at_most} is the most");
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        // It is this test's own child, and it may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Enemy {
    address: SocketAddr,
    image: Digest,
    trust: Trust,
    identity: Identity,
}

impl Enemy {
    /// Promises room for everything.
    async fn connect(&self) -> Result<(quinn::Endpoint, quinn::Connection), quinn::ConnectionError> {
        raw_connection(&self.identity, &self.trust, self.address, 1 << 30).await
    }

    /// 16 extents, a megabyte.
    fn request(&self) -> bytes::Bytes {
        let lease = LeaseToken::new(&b"open"[..]).unwrap();
        Request::Extents(request(&lease, self.image, 0..16)).encode()
    }
}

fn percentiles(mut took: Vec<Duration>) -> String {
    took.sort_unstable();
    let at = |share: usize| took[(took.len() - 1) * share / 100];
    format!("p50 {:?}, p99 {:?} (n = {})", at(50), at(99), took.len())
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn scene(test: impl FnOnce(&mut Scene)) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let _inside = runtime.enter();
    test(&mut Scene::new());
}

/// Initials that real clients have sent, each of a connection of its own.
fn initials(count: usize) -> Vec<Vec<u8>> {
    let (identity, trust) = (identity(), Trust::new());
    block_on(async {
        let mut initials = Vec::new();
        while initials.len() < count {
            // A new one each time: the client that is given up sends a farewell.
            let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let address = socket.local_addr().unwrap();
            let mut buffer = vec![0; 2048];
            tokio::select! {
                len = socket.recv(&mut buffer) => buffer.truncate(len.unwrap()),
                _ = raw_connection(&identity, &trust, address, 1 << 20) => panic!("nobody answers there"),
            }
            initials.push(buffer);
        }
        initials
    })
}

#[test]
fn ten_thousand_initials_a_second_are_dropped_and_cost_little_memory() {
    scene(|scene| {
        let initials = initials(200);
        let seconds = count(2, 20);
        scene.under("10^4 Initials a second", 32 * MIB, move |enemy| {
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            let start = Instant::now();
            for number in 0..seconds * 10_000 {
                let due = Duration::from_micros(100 * number);
                if let Some(early) = due.checked_sub(start.elapsed()) {
                    std::thread::sleep(early);
                }
                // A full buffer is the holder's to have: the datagram is lost like any other.
                let at = usize::try_from(number).unwrap() % initials.len();
                let _ = socket.send_to(&initials[at], enemy.address);
            }
        });
        assert!(scene.counter("handshakes_retried") + scene.counter("handshakes_dropped") > 1000);
    });
}

#[test]
fn datagrams_of_garbage_do_nothing() {
    scene(|scene| {
        let mut dice = fastrand::Rng::with_seed(seed());
        let rounds = count(20_000, 500_000);
        scene.under("garbage datagrams", 16 * MIB, move |enemy| {
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            let mut bytes = [0; 1400];
            for _ in 0..rounds {
                dice.fill(&mut bytes);
                let len = dice.usize(1..bytes.len());
                let _ = socket.send_to(&bytes[..len], enemy.address);
            }
        });
        assert_eq!(scene.counter("accepted"), 1);
    });
}

#[test]
fn malformed_frames_are_refused_one_by_one() {
    scene(|scene| {
        let mut dice = fastrand::Rng::with_seed(seed());
        let rounds = count(2_000, 100_000);
        let corpus = entries("page_request");
        scene.under("malformed frames", 16 * MIB, move |enemy| {
            block_on(async {
                let (_endpoint, connection) = enemy.connect().await.unwrap();
                for _ in 0..rounds {
                    let frame = mutated(&corpus[dice.usize(0..corpus.len())], &mut dice);
                    let (mut send, mut receive) = connection.open_bi().await.unwrap();
                    // The holder may have stopped reading: it has seen enough.
                    let _ = send.write_all(&frame).await;
                    let _ = send.finish();
                    // An answer, a refusal or a reset: anything but silence.
                    let end = tokio::time::timeout(PATIENCE, receive.read_to_end(64 << 20)).await;
                    assert!(end.is_ok(), "no end to {frame:02x?}");
                }
            });
        });
        assert!(scene.counter("requests_bad") > 0);
    });
}

#[test]
fn ten_thousand_streams_wait_at_their_own_end() {
    scene(|scene| {
        scene.under("10,000 streams", 32 * MIB, |enemy| {
            block_on(async {
                let mut connections = Vec::new();
                while let Ok(connection) = enemy.connect().await {
                    connections.push(connection);
                    if connections.len() == 40 {
                        break;
                    }
                }
                let opened = connections.iter().map(|(_, connection)| async {
                    let mut streams = Vec::new();
                    for _ in 0..10_000 / 40 {
                        let Ok(Ok(mut stream)) = tokio::time::timeout(Duration::from_secs(1), connection.open_bi()).await
                        else {
                            break;
                        };
                        if stream.0.write_all(b"f").await.is_err() {
                            break;
                        }
                        streams.push(stream);
                    }
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    streams.len()
                });
                let opened: usize = futures_util::future::join_all(opened).await.into_iter().sum();
                println!("{opened} streams of {} connections", connections.len());
            });
        });
        // 32 of a peer are kept: the rest was closed at once.
        assert!(scene.counter("connections_refused") >= 8);
    });
}

#[test]
fn a_connection_has_no_more_streams_than_its_limit() {
    scene(|scene| {
        scene.under("streams without end", 32 * MIB, |enemy| {
            block_on(async {
                let (_endpoint, connection) = enemy.connect().await.unwrap();
                let mut streams = Vec::new();
                while let Ok(stream) = tokio::time::timeout(Duration::from_millis(300), connection.open_bi()).await {
                    let (mut send, receive) = stream.unwrap();
                    send.write_all(b"f").await.unwrap();
                    streams.push((send, receive));
                }
                assert_eq!(streams.len(), 256);
            });
        });
    });
}

#[test]
fn one_byte_a_second_is_too_slow() {
    scene(|scene| {
        scene.under("one byte a second", 16 * MIB, |enemy| {
            block_on(async {
                let (_endpoint, connection) = enemy.connect().await.unwrap();
                let (mut send, mut receive) = connection.open_bi().await.unwrap();
                let dribble = async {
                    for byte in samples::requests()[0].1.iter() {
                        send.write_all(std::slice::from_ref(byte)).await?;
                        tokio::time::sleep(Duration::from_secs(1)).await;
                    }
                    Ok::<_, quinn::WriteError>(())
                };
                let answer = tokio::time::timeout(PATIENCE, receive.read_to_end(1 << 20));
                tokio::select! {
                    answer = answer => assert!(matches!(answer, Ok(Err(quinn::ReadToEndError::Read(quinn::ReadError::Reset(_)))))),
                    written = dribble => panic!("it was read to the end: {written:?}"),
                }
            });
        });
        assert!(scene.counter("requests_bad") >= 1);
    });
}

#[test]
fn answers_that_nobody_reads_are_held_up_to_the_budget_and_then_dropped_with_their_connection() {
    scene(|scene| {
        scene.under("answers that are not read", 40 * MIB, |enemy| {
            block_on(async {
                let (_endpoint, connection) =
                    raw_connection(&enemy.identity, &enemy.trust, enemy.address, 1 << 20).await.unwrap();
                let mut streams = Vec::new();
                for _ in 0..256 {
                    let (mut send, receive) = connection.open_bi().await.unwrap();
                    send.write_all(&enemy.request()).await.unwrap();
                    send.finish().unwrap();
                    streams.push(receive);
                }
                let closed = tokio::time::timeout(PATIENCE, connection.closed()).await.expect("it is closed");
                assert!(matches!(closed, quinn::ConnectionError::ApplicationClosed(_)), "{closed}");
            });
        });
        assert!(scene.counter("answers_not_taken") >= 1);
        scene.until("held_bytes", |bytes| bytes == 0);
    });
}

#[test]
fn answers_that_are_never_acknowledged_are_held_up_to_the_budget_and_then_dropped() {
    scene(|scene| {
        scene.under("answers that are never acknowledged", 40 * MIB, |enemy| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let _all = runtime.block_on(async {
                let (endpoint, connection) = enemy.connect().await.unwrap();
                for _ in 0..256 {
                    let (mut send, receive) = connection.open_bi().await.unwrap();
                    send.write_all(&enemy.request()).await.unwrap();
                    send.finish().unwrap();
                    std::mem::forget(receive);
                }
                // The requests leave; then nothing runs here, and so nothing is acknowledged.
                tokio::time::sleep(Duration::from_millis(1)).await;
                (endpoint, connection)
            });
            std::thread::sleep(Duration::from_secs(3));
        });
        scene.until("answers_not_taken", |count| count >= 1);
        scene.until("held_bytes", |bytes| bytes == 0);
    });
}
