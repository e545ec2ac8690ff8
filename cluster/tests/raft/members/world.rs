//! Members, each on a host of turmoil's, and what befalls them.

use std::net::IpAddr;
use std::ops::Add;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use control::command::Command;
use control::state::{Life, NodeFacts, Resources};
use farfork::raft::{Carrier, CarryError, Consensus, Disk, Executor, Lane, Member, Peer};
use futures_util::future::BoxFuture;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use turmoil::net::{TcpListener, TcpStream};
use types::NodeId;
use uuid::Uuid;

use super::clients::{self, Flaw, History};
use crate::fickle::Fickle;

const PORT: u16 = 7117;
/// Clients call until then; afterwards nothing fails any more.
const CALLS_UNTIL: Duration = Duration::from_secs(60);
const END: Duration = Duration::from_secs(100);

/// What happened.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Outcome {
    pub(super) calls: u64,
    pub(super) unanswered: u64,
    pub(super) crashes: u64,
    pub(super) cuts: u64,
    pub(super) leaders: u64,
}

impl Add for Outcome {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            calls: self.calls + other.calls,
            unanswered: self.unanswered + other.unanswered,
            crashes: self.crashes + other.crashes,
            cuts: self.cuts + other.cuts,
            leaders: self.leaders + other.leaders,
        }
    }
}

/// One member, over all its starts.
pub(super) struct Seat {
    pub(super) number: usize,
    pub(super) disk: Mutex<Fickle>,
    starts: Mutex<u64>,
    /// As of its last look: how much was applied, and the state's hash.
    pub(super) seen: Mutex<Option<(u64, types::Digest)>>,
}

impl Seat {
    pub(super) fn node(&self) -> NodeId {
        Member::from(self.number as u64 + 1).0
    }

    /// Of its node, by now.
    pub(super) fn incarnation(&self) -> u64 {
        *self.starts.lock().unwrap()
    }
}

fn name_of(number: usize) -> String {
    format!("member-{number}")
}

/// Messages over a connection each.
struct Tcp {
    own: NodeId,
}

impl Carrier for Tcp {
    fn ask(
        &self,
        _to: Option<Member>,
        address: &str,
        _lane: Lane,
        request: Vec<u8>,
        within: Duration,
    ) -> BoxFuture<'static, Result<Vec<u8>, CarryError>> {
        let (own, address) = (self.own, address.to_owned());
        Box::pin(async move {
            let unreachable = |detail: String| CarryError::Unreachable { address: address.clone(), detail };
            let no_answer = |detail: String| CarryError::NoAnswer { address: address.clone(), detail };
            let connecting = tokio::time::timeout(within, TcpStream::connect(&*address)).await;
            let mut stream = connecting
                .map_err(|_| unreachable("nobody answered".to_owned()))?
                .map_err(|error| unreachable(error.to_string()))?;
            let exchange = async {
                stream.write_all(own.as_uuid().as_bytes()).await?;
                stream.write_u32(u32::try_from(request.len()).unwrap()).await?;
                stream.write_all(&request).await?;
                let mut answer = vec![0; stream.read_u32().await? as usize];
                stream.read_exact(&mut answer).await?;
                Ok::<_, std::io::Error>(answer)
            };
            let exchanged = tokio::time::timeout(within, exchange).await;
            exchanged.map_err(|_| no_answer("none in time".to_owned()))?.map_err(|error| no_answer(error.to_string()))
        })
    }
}

/// A start of a member: it serves, registers, says that it is alive, and its clients call.
async fn start(seat: Rc<Seat>, members: usize, flaw: Option<Flaw>, history: Arc<History>, seed: u64) -> turmoil::Result {
    *seat.starts.lock().unwrap() += 1;
    let disk = Disk::open_on(seat.disk.lock().unwrap().clone())?.on(Executor::Caller);
    let consensus = Consensus::start(seat.node(), disk, Arc::new(Tcp { own: seat.node() })).await?;
    let address = |number: usize| format!("{}:{PORT}", turmoil::lookup(name_of(number)));
    if seat.number == 0 {
        consensus.begin(&address(0)).await?;
    }
    consensus.seed((0..members).filter(|number| *number != seat.number).map(address).collect());
    let listener = TcpListener::bind((IpAddr::from([0, 0, 0, 0]), PORT)).await?;
    let served = consensus.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let served = served.clone();
            tokio::spawn(async move {
                let mut id = [0; 16];
                stream.read_exact(&mut id).await?;
                let mut request = vec![0; stream.read_u32().await? as usize];
                stream.read_exact(&mut request).await?;
                let peer = Peer { node: NodeId::from_uuid(Uuid::from_bytes(id)), is_voter: true, name: None };
                let answer = served.answer(peer, &request).await;
                stream.write_u32(u32::try_from(answer.len()).unwrap()).await?;
                stream.write_all(&answer).await
            });
        }
    });
    let facts = NodeFacts {
        name: types::Name::parse(&name_of(seat.number)).unwrap(),
        address: address(seat.number).parse()?,
        profile: clients::cpu(),
        labels: std::collections::BTreeMap::new(),
        capacity: Resources { memory_bytes: 1 << 40, cpu_millis: 1 << 20, machines: 1 << 40 },
    };
    let node = seat.node();
    let registers = consensus.clone();
    let current = Rc::clone(&seat);
    tokio::task::spawn_local(async move {
        loop {
            let state = registers.stale();
            let known = state.nodes.get(&node);
            if known.is_some_and(|node| node.life == Life::Lost) {
                *current.starts.lock().unwrap() += 1;
            }
            let incarnation = current.incarnation();
            if known.is_none_or(|node| node.incarnation != incarnation) {
                let command = Command::Register { node, incarnation, facts: facts.clone(), images: Vec::new() };
                let _ = registers.propose(None, command, Duration::from_secs(3)).await;
            } else {
                let _ = registers.alive(incarnation, Duration::from_secs(1)).await;
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    });
    let caller = clients::Caller::new(consensus.clone(), Rc::clone(&seat), flaw, history, seed ^ seat.incarnation() << 32);
    while turmoil::sim_elapsed().unwrap() < CALLS_UNTIL {
        caller.call().await;
    }
    // Until the end: what it has come to.
    loop {
        if caller.see_all().await {
            let (state, index) = consensus.stale_and_index();
            *seat.seen.lock().unwrap() = Some((index.unwrap_or(0), state.hash()));
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
}

/// A run from its seed. An error says what was promised and did not hold.
pub(super) fn live(seed: u64, flaw: Option<Flaw>) -> Result<Outcome, String> {
    let mut dice = fastrand::Rng::with_seed(seed);
    let members = if dice.u8(..) < 200 { 3 } else { 5 };
    let mut sim = turmoil::Builder::new()
        .rng_seed(seed)
        .tick_duration(Duration::from_millis(5))
        .simulation_duration(END + Duration::from_secs(1))
        .min_message_latency(Duration::from_millis(1))
        .max_message_latency(Duration::from_millis(dice.u64(10..60)))
        .tcp_capacity(1024)
        .build();
    let history = Arc::new(History::default());
    let seats: Vec<Rc<Seat>> = (0..members)
        .map(|number| {
            let disk = Fickle::default();
            disk.forget_to_sync(flaw == Some(Flaw::LostFsync));
            Rc::new(Seat { number, disk: Mutex::new(disk), starts: Mutex::default(), seen: Mutex::default() })
        })
        .collect();
    for seat in &seats {
        let (seat, history) = (Rc::clone(seat), Arc::clone(&history));
        sim.host(name_of(seat.number), move || {
            let (seat, history) = (Rc::clone(&seat), Arc::clone(&history));
            async move {
                let ended = start(Rc::clone(&seat), members, flaw, history, seed ^ (seat.number as u64) << 48).await;
                // Without its disk it waits for somebody who looks after it.
                if seat.disk.lock().unwrap().is_cut() { std::future::pending().await } else { ended }
            }
        });
    }
    let mut outcome = Outcome::default();
    let mut down: Vec<(usize, Duration)> = Vec::new();
    let (mut cut, mut cut_until) = (false, Duration::ZERO);
    let mut next_fault = Duration::from_millis(dice.u64(8_000..15_000));
    while sim.elapsed() < END {
        sim.step().map_err(|error| format!("a member failed: {error}"))?;
        let now = sim.elapsed();
        let is_quiet = now >= CALLS_UNTIL;
        down.retain(|(number, until)| {
            if now < *until && !is_quiet {
                return true;
            }
            sim.bounce(name_of(*number));
            false
        });
        if cut && (now >= cut_until || is_quiet) {
            cut = false;
            for (one, other) in pairs(members) {
                sim.repair(name_of(one), name_of(other));
            }
        }
        // A member whose disk has failed is started again when somebody looks after it.
        let is_looked_after = is_quiet || dice.u16(..) < 20;
        let has_failed =
            |seat: &&Rc<Seat>| seat.disk.lock().unwrap().is_cut() && !down.iter().any(|(at, _)| *at == seat.number);
        if is_looked_after && let Some(seat) = seats.iter().find(has_failed) {
            crash(&mut sim, seat, &mut dice, flaw);
            down.push((seat.number, now + Duration::from_millis(200)));
        }
        if is_quiet || now < next_fault {
            continue;
        }
        next_fault = now + Duration::from_millis(dice.u64(500..8_000));
        match dice.u8(0..10) {
            // Power is cut, of one or of all, now or at one of the next writes.
            0..=4 => {
                let who: Vec<usize> = if dice.u8(..) < 25 { (0..members).collect() } else { vec![dice.usize(..members)] };
                for number in who {
                    if down.iter().any(|(is_down, _)| *is_down == number) {
                        continue;
                    }
                    crash(&mut sim, &seats[number], &mut dice, flaw);
                    down.push((number, now + Duration::from_millis(dice.u64(100..6_000))));
                    outcome.crashes += 1;
                }
            }
            5 => seats[dice.usize(..members)].disk.lock().unwrap().cut_after(dice.u64(0..60)),
            // The network falls apart, in one direction or both.
            _ if !cut => {
                (cut, cut_until) = (true, now + Duration::from_millis(dice.u64(500..10_000)));
                outcome.cuts += 1;
                let side: Vec<bool> = (0..members).map(|_| dice.bool()).collect();
                let one_way = dice.u8(..) < 60;
                for (one, other) in pairs(members).filter(|(one, other)| side[*one] != side[*other]) {
                    if one_way && side[one] {
                        sim.partition_oneway(name_of(one), name_of(other));
                    } else if one_way {
                        sim.partition_oneway(name_of(other), name_of(one));
                    } else {
                        sim.partition(name_of(one), name_of(other));
                    }
                }
            }
            _ => {}
        }
    }
    history.judge()?;
    let seen: Vec<_> = seats.iter().map(|seat| *seat.seen.lock().unwrap()).collect();
    let newest = seen.iter().flatten().map(|(applied, _)| *applied).max().ok_or("nobody could read in the quiet")?;
    for (number, own) in seen.iter().enumerate() {
        let (applied, hash) = own.ok_or_else(|| format!("member {number} could not read in the quiet"))?;
        let same = seen.iter().flatten().all(|(at, other)| *at != applied || *other == hash);
        if !same || newest - applied > 20 {
            return Err(format!("member {number} has applied {applied} of {newest} with hash {hash}, among {seen:?}"));
        }
    }
    (outcome.calls, outcome.unanswered, outcome.leaders) = history.sums();
    Ok(outcome)
}

fn pairs(members: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..members).flat_map(move |one| (one + 1..members).map(move |other| (one, other)))
}

/// Its power is cut: what it had not synced may be there or not.
fn crash(sim: &mut turmoil::Sim<'_>, seat: &Seat, dice: &mut fastrand::Rng, flaw: Option<Flaw>) {
    let mut disk = seat.disk.lock().unwrap();
    disk.cut_after(0);
    let after = disk.after_power(dice);
    after.forget_to_sync(flaw == Some(Flaw::LostFsync));
    *disk = after;
    drop(disk);
    sim.crash(name_of(seat.number));
}
