//! An engine without KVM, for tests of everything above the seam. It keeps machines and images in memory, honours limits, and
//! can be told to be slow, to fail, or to let machines end by themselves. The memory of images that others hold arrives as time
//! passes.

use std::collections::{BTreeMap, HashMap};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use types::{CpuProfile, Digest, FullName, ImageId, MachineId, Reason, Tenant};
use uuid::Uuid;
use vm::Class;

use super::engine::{
    Ended, Engine, EngineError, ErrorKind, ForkOptions, ForkStages, Forked, FreezeFacts, Guest, ImageFacts, OpenOrder,
    PoolFacts, Proof, Residency, SourceFacts, SourceState, Usage,
};
use super::fake_guest::{self, Crash};

/// How it misbehaves. As text: `fork_ms=500,fail_every=3`.
#[derive(Clone, Debug, Default)]
pub struct FakeOptions {
    /// How long each fork takes.
    pub fork: Duration,
    /// Every so manieth child fails as if the host were exhausted. 0: none.
    pub fail_every: u64,
    /// Every so manieth child's proof is wrong. 0: none.
    pub wrong_every: u64,
    /// Every so manieth child ends by itself at once. 0: none.
    pub end_every: u64,
    /// The most machines at a time. 0: no limit.
    pub machines_max: usize,
    /// Whether each kill panics.
    pub kill_panics: bool,
    /// Whether the store has no room.
    pub store_full: bool,
    /// How long it takes until an image that others hold is here.
    pub settle: Duration,
    /// Whether the holders of images are lost half way.
    pub loses_sources: bool,
    /// Whether an image can be opened wherever its holders listen.
    pub opens_all: bool,
}

/// Enough for an agent that only pretends: there are thousands.
const GUEST_STACK: usize = 256 << 10;
/// What an image that was opened has to fetch.
const OPENED_BYTES: u64 = 16 << 20;

/// The engine.
pub struct FakeEngine {
    options: FakeOptions,
    forks: AtomicU64,
    proofs: AtomicU64,
    state: Mutex<State>,
    heard: Mutex<Option<Receiver<(MachineId, Ended)>>>,
}

struct State {
    machines: HashMap<MachineId, (ImageId, Option<Ended>)>,
    images: HashMap<ImageId, ImageFacts>,
    opened: HashMap<ImageId, Opened>,
    store: BTreeMap<FullName, ImageFacts>,
    say: Sender<(MachineId, Ended)>,
    stopped: bool,
}

/// An image that others hold.
struct Opened {
    at: Instant,
    holders: Vec<SocketAddr>,
}

impl FromStr for FakeOptions {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut options = Self::default();
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let (key, value) = part.split_once('=').ok_or_else(|| format!("{part:?} is not key=number"))?;
            let number: u64 = value.parse().map_err(|error| format!("{part:?}: {error}"))?;
            match key {
                "fork_ms" => options.fork = Duration::from_millis(number),
                "fail_every" => options.fail_every = number,
                "wrong_every" => options.wrong_every = number,
                "end_every" => options.end_every = number,
                "machines_max" => options.machines_max = usize::try_from(number).unwrap_or(usize::MAX),
                "kill_panics" => options.kill_panics = number != 0,
                "store_full" => options.store_full = number != 0,
                "settle_ms" => options.settle = Duration::from_millis(number),
                "opens_all" => options.opens_all = number != 0,
                "loses_sources" => options.loses_sources = number != 0,
                _ => return Err(format!("{key:?} is no option")),
            }
        }
        Ok(options)
    }
}

impl FakeEngine {
    /// An engine that behaves so.
    #[must_use]
    pub fn new(options: FakeOptions) -> Self {
        let (say, heard) = channel();
        let state = State {
            machines: HashMap::new(),
            images: HashMap::new(),
            opened: HashMap::new(),
            store: BTreeMap::new(),
            say,
            stopped: false,
        };
        Self {
            options,
            forks: AtomicU64::new(0),
            proofs: AtomicU64::new(0),
            state: Mutex::new(state),
            heard: Mutex::new(Some(heard)),
        }
    }

    /// Whether it was stopped, and how many machines it has.
    #[must_use]
    pub fn stopped_and_machines(&self) -> (bool, usize) {
        let state = self.lock();
        (state.stopped, state.machines.len())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is here of an image that was opened: more as time passes.
    fn arriving(&self, opened: &Opened, all: Residency) -> Residency {
        let settle_us = self.options.settle.as_micros().max(1);
        let us = opened.at.elapsed().as_micros().min(settle_us);
        let due = u64::try_from(u128::from(all.data_bytes) * us / settle_us).unwrap_or(all.data_bytes);
        let is_lost = self.options.loses_sources && due >= all.data_bytes / 2;
        let resident_bytes = if is_lost { all.data_bytes / 2 } else { due };
        let is_settled = resident_bytes == all.data_bytes;
        let sources = opened.holders.iter().map(|holder| SourceFacts {
            address: *holder,
            node: None,
            extents: resident_bytes / types::EXTENT_SIZE,
            bytes: resident_bytes,
            failures: u64::from(is_lost),
            state: if is_lost { SourceState::Gone } else { SourceState::Good },
        });
        let lost = Ended { reason: Reason::PageSourceLost, detail: "all holders are gone".to_owned() };
        Residency {
            resident_bytes,
            is_settled,
            settled_after: is_settled.then_some(self.options.settle),
            faults: resident_bytes / types::EXTENT_SIZE,
            wire_bytes: resident_bytes,
            sources: sources.collect(),
            failed: is_lost.then_some(lost),
            ..all
        }
    }

    fn fork_one(&self, image: ImageId, id: MachineId) -> Result<Forked, EngineError> {
        let number = self.forks.fetch_add(1, Ordering::Relaxed) + 1;
        let every = |every: u64| every > 0 && number.is_multiple_of(every);
        let mut state = self.lock();
        let full = self.options.machines_max > 0 && state.machines.len() >= self.options.machines_max;
        if state.stopped {
            return Err(error(ErrorKind::Stopping, "the engine is stopped"));
        }
        if full || every(self.options.fail_every) {
            return Err(error(ErrorKind::Exhausted, "no memory for another machine"));
        }
        let ended = every(self.options.end_every)
            .then(|| Ended { reason: Reason::GuestShutdown, detail: format!("child number {number}") });
        state.machines.insert(id, (image, ended.clone()));
        if let Some(ended) = ended {
            // Nobody listens any more when the node stops.
            let _ = state.say.send((id, ended));
        }
        let stages = ForkStages {
            shell: Duration::from_micros(10),
            send: Duration::from_micros(20),
            map: Duration::from_micros(30),
            restore: Duration::from_micros(40),
            run: Duration::from_micros(50),
        };
        Ok(Forked { id, first: Duration::from_micros(150), stages, had_shell: !number.is_multiple_of(2) })
    }
}

impl Engine for FakeEngine {
    fn prepare(&self, _guest: Guest, class: Class, tenant: &Tenant) -> Result<ImageFacts, EngineError> {
        let facts = ImageFacts {
            id: ImageId::from_uuid(Uuid::now_v7()),
            digest: None,
            tenant: tenant.clone(),
            class,
            depth: 0,
            own_bytes: class.memory().bytes() / 4,
            stored_bytes: class.memory().bytes() / 4,
            verifiable: true,
        };
        self.lock().images.insert(facts.id, facts.clone());
        Ok(facts)
    }

    fn open(&self, order: &OpenOrder) -> Result<ImageFacts, EngineError> {
        let mut state = self.lock();
        let is_it = |facts: &&ImageFacts| facts.digest == Some(order.image) && facts.tenant == order.tenant;
        if let Some(known) = state.images.values().find(is_it) {
            return Ok(known.clone());
        }
        // A holder that can be reached is one that listens.
        let connect = |holder: &SocketAddr| TcpStream::connect_timeout(holder, Duration::from_secs(5));
        let reached = order.holders.iter().map(|holder| (*holder, connect(holder)));
        let is_open = |stream: bool| stream || self.options.opens_all;
        let holders: Vec<SocketAddr> =
            reached.filter_map(|(holder, stream)| is_open(stream.is_ok()).then_some(holder)).collect();
        if holders.is_empty() {
            return Err(error(ErrorKind::Unreachable, "no holder of the image can be reached"));
        }
        let memory = types::MemorySize::from_bytes(4 * OPENED_BYTES).expect("64 MiB");
        let facts = ImageFacts {
            id: ImageId::from_uuid(Uuid::now_v7()),
            digest: Some(order.image),
            tenant: order.tenant.clone(),
            class: Class::new(memory, 1).expect("one CPU"),
            depth: 0,
            own_bytes: OPENED_BYTES,
            stored_bytes: OPENED_BYTES,
            verifiable: true,
        };
        state.images.insert(facts.id, facts.clone());
        state.opened.insert(facts.id, Opened { at: Instant::now(), holders });
        Ok(facts)
    }

    fn digest(&self, image: ImageId) -> Result<Digest, EngineError> {
        let mut state = self.lock();
        let facts = state.images.get_mut(&image).ok_or_else(|| unknown_image(&image))?;
        Ok(*facts.digest.get_or_insert_with(|| Digest::of(image.as_uuid().as_bytes())))
    }

    fn residency(&self, image: ImageId) -> Result<Residency, EngineError> {
        let state = self.lock();
        let facts = state.images.get(&image).ok_or_else(|| unknown_image(&image))?;
        let children = state.machines.values().filter(|(of, ended)| *of == image && ended.is_none()).count();
        let children = u32::try_from(children).unwrap_or(u32::MAX);
        let here = Residency { data_bytes: facts.stored_bytes, resident_bytes: facts.stored_bytes, ..Residency::default() };
        Ok(match state.opened.get(&image) {
            None => Residency { is_settled: true, children, ..here },
            Some(opened) => Residency { children, ..self.arriving(opened, here) },
        })
    }

    fn data_bytes(&self, image: ImageId) -> Result<u64, EngineError> {
        Ok(self.residency(image)?.data_bytes)
    }

    fn fork(&self, image: ImageId, ids: &[MachineId], _options: ForkOptions) -> Vec<Result<Forked, EngineError>> {
        std::thread::sleep(self.options.fork);
        if !self.lock().images.contains_key(&image) {
            return ids.iter().map(|_| Err(unknown_image(&image))).collect();
        }
        ids.iter().map(|id| self.fork_one(image, *id)).collect()
    }

    fn freeze(&self, machine: MachineId) -> Result<(ImageFacts, FreezeFacts), EngineError> {
        let mut state = self.lock();
        let (image, ended) = state.machines.get(&machine).ok_or_else(|| unknown_machine(&machine))?;
        if let Some(ended) = ended {
            return Err(error(ErrorKind::Ended(ended.reason), &ended.detail));
        }
        let base = state.images.get(image).cloned().ok_or_else(|| unknown_image(image))?;
        let facts = ImageFacts {
            id: ImageId::from_uuid(Uuid::now_v7()),
            depth: base.depth + 1,
            own_bytes: 1 << 20,
            stored_bytes: base.stored_bytes + (1 << 20),
            verifiable: false,
            ..base
        };
        state.images.insert(facts.id, facts.clone());
        let freeze = FreezeFacts {
            stall: Duration::from_micros(900),
            copy: Duration::from_micros(1_500),
            dirty_pages: 100,
            copied_extents: 16,
        };
        Ok((facts, freeze))
    }

    fn connect(&self, machine: MachineId) -> Result<UnixStream, EngineError> {
        let state = self.lock();
        let (_, ended) = state.machines.get(&machine).ok_or_else(|| unknown_machine(&machine))?;
        if let Some(ended) = ended {
            return Err(error(ErrorKind::Ended(ended.reason), &ended.detail));
        }
        let (ours, its) = UnixStream::pair().map_err(|source| error(ErrorKind::Exhausted, &source.to_string()))?;
        let say = state.say.clone();
        let crash: Crash = Box::new(move |reason| {
            // Nobody listens any more when the node stops.
            let _ = say.send((machine, Ended { reason, detail: "told to".to_owned() }));
        });
        let spawned = std::thread::Builder::new().stack_size(GUEST_STACK).spawn(move || fake_guest::serve(its, &crash));
        spawned.map_err(|source| error(ErrorKind::Exhausted, &source.to_string()))?;
        Ok(ours)
    }

    fn verify(&self, machine: MachineId) -> Result<Proof, EngineError> {
        let number = self.proofs.fetch_add(1, Ordering::Relaxed) + 1;
        let wrong = self.options.wrong_every > 0 && number.is_multiple_of(self.options.wrong_every);
        match self.lock().machines.get(&machine) {
            None => Err(unknown_machine(&machine)),
            Some(_) if wrong => Err(error(ErrorKind::WrongProof, "page 7 is not the image's")),
            Some(_) => Ok(Proof { pages: 16_128 }),
        }
    }

    fn kill(&self, machine: MachineId) -> Result<(), EngineError> {
        assert!(!self.options.kill_panics, "told to panic");
        self.lock().machines.remove(&machine).map(|_| ()).ok_or_else(|| unknown_machine(&machine))
    }

    fn usage(&self, machine: MachineId) -> Result<Usage, EngineError> {
        let cost = Usage {
            pss_bytes: 2 << 20,
            private_bytes: 1 << 20,
            page_table_bytes: 40 << 10,
            cpu: Duration::from_millis(3),
            faults: 5,
        };
        self.lock().machines.get(&machine).map(|_| cost).ok_or_else(|| unknown_machine(&machine))
    }

    fn console(&self, machine: MachineId) -> Result<(Vec<u8>, u64), EngineError> {
        let state = self.lock();
        state.machines.get(&machine).map(|_| (b"hello from a fake\n".to_vec(), 0)).ok_or_else(|| unknown_machine(&machine))
    }

    fn cpu(&self) -> CpuProfile {
        CpuProfile { vendor: "FakeVendor12".to_owned(), family: 1, model: 1, cpuid: Digest::of(b"fake"), tsc_khz: 1_000_000 }
    }

    fn image(&self, image: ImageId) -> Result<ImageFacts, EngineError> {
        self.lock().images.get(&image).cloned().ok_or_else(|| unknown_image(&image))
    }

    fn save(&self, image: ImageId, name: &FullName, progress: &mut dyn FnMut(u64, u64)) -> Result<ImageFacts, EngineError> {
        let mut state = self.lock();
        if self.options.store_full {
            return Err(error(ErrorKind::StoreFull, "the store has no room"));
        }
        if state.store.contains_key(name) {
            return Err(error(ErrorKind::NameTaken, &format!("{name} is taken")));
        }
        let facts = state.images.get_mut(&image).ok_or_else(|| unknown_image(&image))?;
        facts.digest.get_or_insert_with(|| Digest::of(image.as_uuid().as_bytes()));
        let facts = facts.clone();
        progress(facts.stored_bytes, facts.stored_bytes);
        state.store.insert(name.clone(), facts.clone());
        Ok(facts)
    }

    fn load(&self, name: &FullName, progress: &mut dyn FnMut(u64, u64)) -> Result<ImageFacts, EngineError> {
        let mut state = self.lock();
        let saved = state.store.get(name).cloned().ok_or_else(|| unknown_image(name))?;
        progress(saved.stored_bytes, saved.stored_bytes);
        let facts = ImageFacts { id: ImageId::from_uuid(Uuid::now_v7()), ..saved };
        state.images.insert(facts.id, facts.clone());
        Ok(facts)
    }

    fn stored(&self) -> Result<Vec<(FullName, u64)>, EngineError> {
        Ok(self.lock().store.iter().map(|(name, facts)| (name.clone(), facts.stored_bytes)).collect())
    }

    fn forget(&self, image: ImageId) -> Result<(), EngineError> {
        self.lock().images.remove(&image).map(|_| ()).ok_or_else(|| unknown_image(&image))
    }

    fn delete(&self, name: &FullName) -> Result<(), EngineError> {
        self.lock().store.remove(name).map(|_| ()).ok_or_else(|| unknown_image(name))
    }

    fn pool(&self) -> Vec<PoolFacts> {
        let mut classes: HashMap<Class, PoolFacts> = HashMap::new();
        for facts in self.lock().images.values() {
            let facts = PoolFacts { class: facts.class, ready: 4, building: 1, wanted: 8 };
            classes.insert(facts.class, facts);
        }
        classes.into_values().collect()
    }

    fn ended(&self) -> Receiver<(MachineId, Ended)> {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner).take();
        heard.expect("asked once")
    }

    fn stop(&self) {
        let mut state = self.lock();
        state.machines.clear();
        state.stopped = true;
    }
}

fn unknown_machine(id: &MachineId) -> EngineError {
    error(ErrorKind::UnknownMachine, &format!("no machine {id}"))
}

fn unknown_image(id: &dyn std::fmt::Display) -> EngineError {
    error(ErrorKind::UnknownImage, &format!("no image {id}"))
}

fn error(kind: ErrorKind, message: &str) -> EngineError {
    EngineError { kind, message: message.to_owned(), remedy: "this is a fake: start it with other options".to_owned() }
}
