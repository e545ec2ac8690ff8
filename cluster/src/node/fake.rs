//! An engine without KVM, for tests of everything above the seam. It keeps machines and images in memory, honours limits, and
//! can be told to be slow, to fail, or to let machines end by themselves.

use std::collections::{BTreeMap, HashMap};
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use types::{Digest, ImageId, MachineId, Reason};
use uuid::Uuid;
use vm::Class;

use super::engine::{
    Ended, Engine, EngineError, ErrorKind, ForkOptions, ForkStages, Forked, FreezeFacts, Guest, ImageFacts, PoolFacts, Proof,
    Usage,
};
use super::name::ImageName;

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
}

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
    store: BTreeMap<ImageName, ImageFacts>,
    say: Sender<(MachineId, Ended)>,
    stopped: bool,
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
        let state = State { machines: HashMap::new(), images: HashMap::new(), store: BTreeMap::new(), say, stopped: false };
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
    fn prepare(&self, _guest: Guest, class: Class) -> Result<ImageFacts, EngineError> {
        let facts = ImageFacts {
            id: ImageId::from_uuid(Uuid::now_v7()),
            digest: None,
            class,
            depth: 0,
            own_bytes: class.memory().bytes() / 4,
            stored_bytes: class.memory().bytes() / 4,
            verifiable: true,
        };
        self.lock().images.insert(facts.id, facts.clone());
        Ok(facts)
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
        let cost =
            Usage { pss_bytes: 2 << 20, private_bytes: 1 << 20, page_table_bytes: 40 << 10, cpu: Duration::from_millis(3) };
        self.lock().machines.get(&machine).map(|_| cost).ok_or_else(|| unknown_machine(&machine))
    }

    fn console(&self, machine: MachineId) -> Result<(Vec<u8>, u64), EngineError> {
        let state = self.lock();
        state.machines.get(&machine).map(|_| (b"hello from a fake\n".to_vec(), 0)).ok_or_else(|| unknown_machine(&machine))
    }

    fn image(&self, image: ImageId) -> Result<ImageFacts, EngineError> {
        self.lock().images.get(&image).cloned().ok_or_else(|| unknown_image(&image))
    }

    fn save(&self, image: ImageId, name: &ImageName, progress: &mut dyn FnMut(u64, u64)) -> Result<ImageFacts, EngineError> {
        let mut state = self.lock();
        if self.options.store_full {
            return Err(error(ErrorKind::StoreFull, "the store has no room"));
        }
        if state.store.contains_key(name) {
            return Err(error(ErrorKind::NameTaken, &format!("{name} is taken")));
        }
        let facts = state.images.get_mut(&image).ok_or_else(|| unknown_image(&image))?;
        facts.digest = Some(Digest::of(image.as_uuid().as_bytes()));
        let facts = facts.clone();
        progress(facts.stored_bytes, facts.stored_bytes);
        state.store.insert(name.clone(), facts.clone());
        Ok(facts)
    }

    fn load(&self, name: &ImageName, progress: &mut dyn FnMut(u64, u64)) -> Result<ImageFacts, EngineError> {
        let mut state = self.lock();
        let saved = state.store.get(name).cloned().ok_or_else(|| unknown_image(name))?;
        progress(saved.stored_bytes, saved.stored_bytes);
        let facts = ImageFacts { id: ImageId::from_uuid(Uuid::now_v7()), ..saved };
        state.images.insert(facts.id, facts.clone());
        Ok(facts)
    }

    fn stored(&self) -> Result<Vec<(ImageName, u64)>, EngineError> {
        Ok(self.lock().store.iter().map(|(name, facts)| (name.clone(), facts.stored_bytes)).collect())
    }

    fn forget(&self, image: ImageId) -> Result<(), EngineError> {
        self.lock().images.remove(&image).map(|_| ()).ok_or_else(|| unknown_image(&image))
    }

    fn delete(&self, name: &ImageName) -> Result<(), EngineError> {
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
