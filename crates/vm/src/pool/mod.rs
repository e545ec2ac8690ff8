//! The pool: a node's workers. Keeps shells ready by class, turns them into machines, sees workers end, and gives back all that
//! they had.
//!
//! ```text
//! wanted ──spawn──▶ worker ──Build──▶ shell, on its shelf ──Fork──▶ machine ──▶ ended(reason) ──▶ reaped
//!                     └── fails ──▶ whoever waits for it is told
//! ```
//!
//! Shells are built, refilled and torn down by threads of the pool, off the path of a fork, which takes a shell, sends it the
//! image's descriptors, and waits. Without a shell of the class a fork waits for one to be built: slower, never a failure.

mod driver;
mod fork;
mod keeper;
mod machine;
mod mail;
#[cfg(feature = "testing")]
mod testing;
mod worker;

use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use thiserror::Error;
use types::MachineId;

use crate::class::Class;
use crate::host::Host;
use crate::host_image::AwaitError;
use crate::image::Image;
use crate::jail::cgroup::{Groups, WorkerGroup};
use crate::jail::{Jail, Mechanism};
use crate::machine::Ended;
use crate::worker::channel::Channel;
use crate::worker::protocol::{Failure, ToWorker};
pub use fork::ForkTimes;
use keeper::Shelf;
pub use keeper::machine_cost_bytes;
pub use machine::{Jailed, Memory};
use worker::Worker;

/// How long a worker may take for what it usually does within milliseconds. Generous: hosts of tests are slow and shared.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// How a pool is run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The program that becomes the zygote, and its arguments: it calls [`zygote::main`](crate::worker::zygote::main).
    pub zygote: (PathBuf, Vec<OsString>),
    /// How workers are confined.
    pub jail: Jail,
    /// The name of the node's control groups; `None` for a pool without any.
    pub groups: Option<String>,
    /// The fewest shells that wait for a class that is in use.
    pub shells_min: u32,
    /// The most shells that wait for a class.
    pub shells_max: u32,
    /// All shells that wait may take one part in so many of the memory that is free.
    pub memory_share: u64,
    /// Threads that build shells.
    pub builders: u32,
    /// How long a branch waits for what is absent of the extents in which its parent has written.
    pub page_patience: Duration,
}

impl Settings {
    /// What is right for most, with this program as its own zygote when it is started with `arguments`.
    #[must_use]
    pub fn new(program: impl Into<PathBuf>, arguments: impl IntoIterator<Item = OsString>) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self {
            zygote: (program.into(), arguments.into_iter().collect()),
            jail: Jail::whole(),
            groups: None,
            shells_min: 4,
            shells_max: 512,
            memory_share: 16,
            builders: u32::try_from(cores.clamp(1, 8)).unwrap_or(1),
            page_patience: Duration::from_secs(30),
        }
    }
}

/// Why the pool did not do what it was asked.
#[derive(Debug, Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum PoolError {
    #[error("the zygote could not be started: {source}")]
    Zygote { source: io::Error },
    #[error("{0}")]
    Failed(Failure),
    #[error("the machine has ended ({0})")]
    Ended(Ended),
    #[error("a worker was killed from outside before its machine ran ({0})")]
    NeverRan(Ended),
    #[error("the worker did not answer within {0:?}, and was killed")]
    Stuck(Duration),
    #[error("{step} failed: {source}")]
    Step { step: &'static str, source: io::Error },
    #[error("the worker said something that cannot be: {what}")]
    Lie { what: String },
    #[error("{0}")]
    Absent(AwaitError),
    #[error("the pool is stopping")]
    Stopping,
    #[error("{asked_bytes} bytes of own pages are too few for a machine; the least is {least_bytes}")]
    Limit { asked_bytes: u64, least_bytes: u64 },
}

impl PoolError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &str {
        match self {
            Self::Failed(failure) => &failure.remedy,
            Self::Step { source, .. } | Self::Zygote { source } => match source.raw_os_error() {
                Some(libc::EMFILE | libc::ENFILE) => "raise the limit on open files (ulimit -n, fs.file-max)",
                Some(libc::ENOMEM | libc::ENOSPC) => "end other machines: the host's memory is full",
                Some(libc::EAGAIN) => "raise the limits on processes and threads (ulimit -u, pids.max)",
                _ => "run farfork doctor: it lists what is missing, and what to do",
            },
            Self::Ended(_) | Self::Lie { .. } => "fork again from its image",
            Self::NeverRan(_) => {
                "look in the kernel log for what kills farfork's processes: most likely the host has too little memory"
            }
            Self::Stuck(_) => "look for what keeps it in the kernel log, then fork again from its image",
            Self::Absent(_) => "look for its holders with farfork show; branch again when one can be reached",
            Self::Stopping => "ask again when the node has started",
            Self::Limit { .. } => "ask for more",
        }
    }

    /// The error number behind it, if there is one.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Failed(failure) => Some(failure.errno).filter(|errno| *errno != 0),
            Self::Step { source, .. } | Self::Zygote { source } => source.raw_os_error(),
            _ => None,
        }
    }
}

/// What a fork may be told besides its image.
#[derive(Clone, Copy, Debug, Default)]
pub struct ForkOptions {
    /// The most bytes of pages that the machine may write; `None` for all of its RAM. What runs it is not counted.
    pub limit_bytes: Option<u64>,
}

/// The shells of one class.
#[derive(Clone, Copy, Debug)]
pub struct ShelfFacts {
    /// Which.
    pub class: Class,
    /// How many wait.
    pub ready: u32,
    /// How many are being built.
    pub building: u32,
    /// How many the pool wants to have waiting.
    pub wanted: u32,
}

/// See the module.
#[derive(Debug)]
pub struct Pool {
    inner: Arc<Inner>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    /// Which of this process's pools it is.
    number: u32,
    pub(crate) host: Host,
    settings: Settings,
    groups: Option<Groups>,
    state: Mutex<State>,
    changed: Condvar,
    next_worker: AtomicU64,
    events: std::os::fd::OwnedFd,
}

#[derive(Debug)]
struct State {
    zygote: Zygote,
    /// The channel to the zygote, ready or not.
    zygote_channel: Option<Arc<Channel>>,
    workers: HashMap<u64, Arc<Worker>>,
    shelves: HashMap<Class, Shelf>,
    /// Forks under way, and since when there have been any: shells are refilled when there are none, or have been for long.
    forks: u32,
    forks_since: Instant,
    /// When the last one ended.
    fork_ended: Instant,
    is_stopping: bool,
    /// Control groups of workers that are gone, which the kernel has not let go of yet.
    groups_left: Vec<WorkerGroup>,
    ends: Vec<Sender<(MachineId, Ended)>>,
}

/// The zygote, as the pool sees it.
#[derive(Debug)]
enum Zygote {
    Starting,
    Ready(Arc<Channel>),
    Failed(Failure),
}

impl Pool {
    /// Starts the zygote and the pool's threads.
    ///
    /// # Errors
    /// [`PoolError`] if the zygote cannot be started or confined.
    pub fn open(host: Host, settings: Settings) -> Result<Self, PoolError> {
        let groups = settings.groups.as_deref().filter(|_| settings.jail.has(Mechanism::ControlGroup));
        let groups = groups.map(|name| {
            Groups::open(name)
                .and_then(|groups| groups.admit_node(std::process::id()).map(|()| groups))
                .map_err(|error| PoolError::Failed(Failure::of(&error, error.remedy())))
        });
        let groups = groups.transpose()?;
        let events = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC);
        let events = events.map_err(|error| PoolError::Step { step: "epoll_create", source: error.into() })?;
        let state = State {
            zygote: Zygote::Starting,
            zygote_channel: None,
            workers: HashMap::new(),
            shelves: HashMap::new(),
            forks: 0,
            forks_since: Instant::now(),
            fork_ended: Instant::now(),
            is_stopping: false,
            groups_left: Vec::new(),
            ends: Vec::new(),
        };
        let next_worker = AtomicU64::new(1);
        static NEXT_POOL: AtomicU32 = AtomicU32::new(0);
        let number = NEXT_POOL.fetch_add(1, Ordering::Relaxed);
        let inner = Arc::new(Inner {
            number,
            host,
            settings,
            groups,
            state: Mutex::new(state),
            changed: Condvar::new(),
            next_worker,
            events,
        });
        let pool = Self { inner: Arc::clone(&inner), threads: Mutex::new(Vec::new()) };
        pool.start("pool", driver::drive)?;
        {
            let starting = |state: &mut State| matches!(state.zygote, Zygote::Starting);
            let waited = inner.changed.wait_timeout_while(inner.lock(), PATIENCE, starting);
            match &waited.unwrap_or_else(PoisonError::into_inner).0.zygote {
                Zygote::Ready(_) => {}
                Zygote::Failed(failure) => return Err(PoolError::Failed(failure.clone())),
                Zygote::Starting => return Err(PoolError::Stuck(PATIENCE)),
            }
        }
        for _ in 0..inner.settings.builders {
            pool.start("builder", keeper::build_shells)?;
        }
        Ok(pool)
    }

    fn start(&self, name: &str, life: fn(Arc<Inner>)) -> Result<(), PoolError> {
        let inner = Arc::clone(&self.inner);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || life(inner));
        let thread = thread.map_err(|source| PoolError::Step { step: "starting a thread", source })?;
        self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        Ok(())
    }

    /// The host that its machines run on.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.inner.host
    }

    /// Forks a child of `image` for each id, all at once; outcomes in the order of the ids. Each child runs when this returns.
    #[must_use]
    pub fn fork(
        &self,
        image: &Arc<Image>,
        ids: &[MachineId],
        options: ForkOptions,
    ) -> Vec<Result<(Jailed, ForkTimes), PoolError>> {
        fork::fork_all(&self.inner, image, ids, options)
    }

    /// Boots a first parent that runs the probe.
    ///
    /// # Errors
    /// [`PoolError`].
    pub fn boot_probe(&self, class: Class, id: MachineId) -> Result<Jailed, PoolError> {
        machine::boot_probe(&self.inner, class, id)
    }

    /// Boots a first parent that starts a kernel, on memory that [`crate::linux::load`] has filled.
    ///
    /// # Errors
    /// [`PoolError`].
    pub fn boot_linux(
        &self,
        class: Class,
        id: MachineId,
        memory: Vec<std::fs::File>,
        start: crate::linux::Start,
    ) -> Result<Jailed, PoolError> {
        machine::boot(&self.inner, class, id, memory, &ToWorker::BootLinux { id, start })
    }

    /// Says that machines of this class are about to be forked, so many at once.
    pub fn expect(&self, class: Class, count: u32) {
        let mut state = self.inner.lock();
        state.shelves.entry(class).or_default().note_demand(Instant::now(), count);
        drop(state);
        self.inner.changed.notify_all();
    }

    /// Waits until so many shells of a class are ready. Says whether they are.
    #[must_use]
    pub fn wait_for_shells(&self, class: Class, count: u32, patience: Duration) -> bool {
        let too_few = |state: &mut State| state.shelves.get(&class).is_none_or(|shelf| shelf.ready_count() < count);
        let waited = self.inner.changed.wait_timeout_while(self.inner.lock(), patience, too_few);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// The shells that there are.
    #[must_use]
    pub fn shelves(&self) -> Vec<ShelfFacts> {
        let now = Instant::now();
        let state = self.inner.lock();
        let wanted = keeper::wanted(&self.inner, &state, now);
        let facts = |(class, shelf): (&Class, &Shelf)| ShelfFacts {
            class: *class,
            ready: shelf.ready_count(),
            building: shelf.building,
            wanted: wanted.get(class).copied().unwrap_or(0),
        };
        let mut shelves: Vec<ShelfFacts> = state.shelves.iter().map(facts).collect();
        shelves.sort_by_key(|facts| (facts.class.memory(), facts.class.vcpu_count()));
        shelves
    }

    /// Machines that end by themselves from now on.
    #[must_use]
    pub fn ends(&self) -> Receiver<(MachineId, Ended)> {
        let (sender, receiver) = std::sync::mpsc::channel();
        self.inner.lock().ends.push(sender);
        receiver
    }

    /// How many workers there are: machines, shells, and those that are being built or are on their way out.
    #[must_use]
    pub fn worker_count(&self) -> usize {
        self.inner.lock().workers.len()
    }

    /// Waits until no more than so many workers are left. Says whether that is so.
    #[must_use]
    pub fn wait_for_workers(&self, most: usize, patience: Duration) -> bool {
        let too_many = |state: &mut State| state.workers.len() > most;
        let waited = self.inner.changed.wait_timeout_while(self.inner.lock(), patience, too_many);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Ends every machine and shell, and waits until they are gone. What is asked of the pool afterwards is refused.
    pub fn stop(&self) {
        let workers: Vec<Arc<Worker>> = {
            let mut state = self.inner.lock();
            state.is_stopping = true;
            state.shelves.values_mut().for_each(Shelf::take_all);
            state.workers.values().cloned().collect()
        };
        self.inner.changed.notify_all();
        workers.iter().for_each(|worker| worker.kill());
        let _all_gone = self.wait_for_workers(0, PATIENCE);
        // Its zygote ends when its channel is closed, and with it the thread that listens to it.
        if let Some(channel) = self.inner.lock().zygote_channel.take() {
            channel.shut_down();
        }
        for thread in std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner)) {
            thread.join().unwrap_or_default();
        }
        if let Some(groups) = &self.inner.groups {
            let started = Instant::now();
            while !keeper::remove_groups(&self.inner) && started.elapsed() < PATIENCE {
                std::thread::sleep(keeper::GROUPS_ROUND);
            }
            groups.close();
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next_worker(&self) -> u64 {
        self.next_worker.fetch_add(1, Ordering::Relaxed)
    }
}
