//! The pager: fetches the memory of images that other nodes hold, and answers the faults of children that run before it is here.
//!
//! ```text
//!  engine ──Open──▶ ┌───────────── one thread, one runtime ─────────────┐        other nodes
//!  pool ──Watch───▶ │ fault ─▶ fetch ─▶ transfer ─▶ Send ─▶ link ───────┼──────▶ demand, bulk
//!  server ──Pull──▶ │ wake ◀── publish, verified ◀── answer ◀───────────┼──────── extents
//!                   └───────────────────────────────────────────────────┘
//! ```
//!
//! The thread never touches guest memory, and never waits for anybody who might. It has a socket of its own. Should it panic, the
//! children of every image that has not settled are ended: nobody is left to answer them, and none goes on without an answer.

mod ask;
mod child;
mod feed;
mod fetch;
mod learn;
mod room;
mod source;
#[cfg(feature = "testing")]
pub(crate) mod testing;

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use pages::client::{Client, Link};
use pages::endpoint::Tuning;
use pages::{Identity, Trust};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;
use tokio::task::LocalSet;
use types::{Digest, EXTENT_SIZE, ExtentIndex, Head, Reason, Tenant};
use vm::image::Image;
use vm::{HostImage, Pool, Watched};

use super::engine::{EngineError, ErrorKind, OpenOrder, SourceFacts};
use super::metrics;
use super::offer::About;
use fetch::Fetch;

/// How long somebody waits for the pager's thread, which does nothing that takes long.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often images are looked for that nobody needs any more.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// The most nodes whose links are kept.
const LINKS_MAX: usize = 256;
/// The most images of other nodes at a time.
const FETCHES_MAX: usize = 4096;

/// How a pager works.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    /// How long a child waits for a page before it is ended.
    pub deadline: Duration,
    /// How long opening an image may take.
    pub open_deadline: Duration,
    /// The most bytes of memory for images that have not settled; `None`: what the host has.
    pub host_image_bytes: Option<u64>,
    /// Whether what no child has touched is fetched too, so that images settle.
    pub streams: bool,
    /// Whether what children touched first elsewhere is fetched ahead.
    pub replays: bool,
    /// Whether what is read ahead goes over the connection for demands.
    pub has_one_connection: bool,
}

impl Settings {
    /// What is right for most, with this deadline for pages.
    #[must_use]
    pub(crate) fn new(deadline: Duration) -> Self {
        Self {
            deadline,
            open_deadline: deadline,
            host_image_bytes: None,
            streams: true,
            replays: true,
            has_one_connection: false,
        }
    }
}

/// An image of a tenant. The memory of two tenants is never shared.
pub(crate) type Key = (Tenant, Digest);

/// What is here of a tenant's images already.
pub(crate) trait Library: Send + Sync {
    /// The images of a tenant whose digests are known.
    fn images(&self, tenant: &Tenant) -> Vec<Arc<Image>>;
}

/// What opening an image came to.
pub(crate) struct Opened {
    pub(crate) image: Arc<Image>,
    pub(crate) about: About,
}

/// What the pager knows of an image, besides what its host image does.
#[derive(Clone, Debug, Default)]
pub(crate) struct Progress {
    pub(crate) settled_after: Option<Duration>,
    pub(crate) wire_bytes: u64,
    pub(crate) sources: Vec<SourceFacts>,
}

/// What the thread is asked to do.
enum Order {
    Open {
        order: OpenOrder,
        reply: oneshot::Sender<Result<Opened, EngineError>>,
    },
    Watch(Arc<Watched>),
    Forget(Arc<Watched>),
    Want {
        key: Key,
        region: usize,
        extents: Range<u32>,
    },
    Pull {
        key: Key,
        region: u8,
        extent: ExtentIndex,
        reply: oneshot::Sender<()>,
    },
    Progress {
        key: Key,
        reply: oneshot::Sender<Option<Progress>>,
    },
    /// To panic: a task of each fetch, or the thread itself.
    #[cfg(feature = "testing")]
    Panic {
        of_task: bool,
    },
    Stop,
}

/// The thread, from outside. Dropping it ends the thread; what has not settled then fails.
pub(crate) struct Pager {
    orders: UnboundedSender<Order>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// The way to the thread. Clones are cheap.
#[derive(Clone)]
pub(crate) struct Handle {
    orders: UnboundedSender<Order>,
}

/// What every fetch of the thread knows.
struct Shared {
    settings: Settings,
    client: Client,
    pool: Arc<Pool>,
    library: Arc<dyn Library>,
    orders: UnboundedSender<Order>,
    /// For who fails them when the thread panics.
    open: Arc<Mutex<Vec<Weak<HostImage>>>>,
    began: tokio::time::Instant,
    /// The way to each node, kept: a new one costs handshakes.
    links: RefCell<HashMap<SocketAddr, Link>>,
    /// Every fetch, for who needs memory.
    all: RefCell<Vec<std::rc::Weak<Fetch>>>,
}

impl Shared {
    /// The way to a node: the same for all images.
    fn link(&self, address: SocketAddr) -> Link {
        let mut links = self.links.borrow_mut();
        if links.len() >= LINKS_MAX {
            // Who uses one keeps it.
            links.clear();
        }
        links.entry(address).or_insert_with(|| self.client.link(address, None)).clone()
    }

    /// The fetches that have memory to give back, the largest first.
    fn largest(&self) -> Vec<Rc<Fetch>> {
        let mut all = self.all.borrow_mut();
        all.retain(|fetch| fetch.strong_count() > 0);
        let mut open: Vec<Rc<Fetch>> = all.iter().filter_map(std::rc::Weak::upgrade).collect();
        open.retain(|fetch| fetch.is_good() && !fetch.host_image.is_settled());
        open.sort_by_key(|fetch| std::cmp::Reverse(fetch.host_image.resident_bytes()));
        open
    }

    /// Time since the pager began.
    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Refuses an image whose memory this host does not have, unless it is told how much to take.
    fn admit(&self, head: &Head) -> Result<(), EngineError> {
        let extents: u64 = head.regions.iter().map(|region| u64::from(region.map.data_extent_count())).sum();
        let needed = extents * EXTENT_SIZE + super::kvm::RESERVE_BYTES;
        let available = vm::host::available_memory().unwrap_or(u64::MAX);
        if self.settings.host_image_bytes.is_some() || needed <= available {
            return Ok(());
        }
        Err(EngineError {
            kind: ErrorKind::Exhausted,
            message: format!("the image and what the host keeps free take {needed} bytes of memory, and {available} are free"),
            remedy: "fork it elsewhere, or let the node hold less of it (--host-image-memory)".to_owned(),
        })
    }

    /// Memory of all images that have not settled.
    fn resident_bytes(&self) -> u64 {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let open = open.iter().filter_map(Weak::upgrade);
        let unsettled = open.filter(|host_image| !host_image.is_settled() && host_image.failed().is_none());
        unsettled.map(|host_image| host_image.resident_bytes()).sum()
    }
}

impl Pager {
    /// Starts the thread.
    ///
    /// # Errors
    /// [`EngineError`] of kind [`ErrorKind::Host`] if it cannot have a socket.
    pub(crate) fn start(
        settings: Settings,
        identity: &Identity,
        trust: &Trust,
        pool: Arc<Pool>,
        library: Arc<dyn Library>,
    ) -> Result<Self, EngineError> {
        // The thread has its own of what it may need again.
        let certificate = (identity.certificate_pem().to_owned(), identity.key_pem().to_owned());
        let identity = Identity::from_pem(certificate.0.as_bytes(), certificate.1.as_bytes());
        let identity = identity.map_err(|error| host_error(error.to_string()))?;
        let trust = trust.clone();
        let (orders, mut received) = unbounded_channel();
        let (started, has_started) = std::sync::mpsc::channel();
        let own = orders.clone();
        let life = move || {
            let open: Arc<Mutex<Vec<Weak<HostImage>>>> = Arc::default();
            loop {
                let once = || run(settings, &identity, &trust, &pool, &library, &own, &open, &mut received, &started);
                let Err(panic) = std::panic::catch_unwind(AssertUnwindSafe(once)) else { return };
                let left = std::mem::take(&mut *open.lock().unwrap_or_else(PoisonError::into_inner));
                for host_image in left.iter().filter_map(Weak::upgrade).filter(|host_image| !host_image.is_settled()) {
                    fail_after_panic(&host_image, &*panic);
                }
            }
        };
        let thread = std::thread::Builder::new().name("pager".to_owned()).spawn(life);
        let thread = thread.map_err(|error| host_error(format!("the pager's thread cannot be started: {error}")))?;
        match has_started.recv_timeout(PATIENCE) {
            Ok(Ok(())) => {
                #[cfg(feature = "testing")]
                testing::FIRST.get_or_init(|| orders.clone());
                Ok(Self { orders, thread: Mutex::new(Some(thread)) })
            }
            Ok(Err(error)) => Err(error),
            Err(_) => Err(host_error("the pager's thread did not start".to_owned())),
        }
    }

    pub(crate) fn handle(&self) -> Handle {
        Handle { orders: self.orders.clone() }
    }

    /// Ends the thread and waits for that.
    pub(crate) fn stop(&self) {
        self.orders.send(Order::Stop).unwrap_or_default();
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take()
            && thread.join().is_err()
        {
            tracing::error!("the pager panicked at its end");
        }
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Handle {
    /// Opens an image. Blocks for as long as the nodes that hold it take to answer.
    ///
    /// # Errors
    /// [`EngineError`].
    pub(crate) fn open(&self, order: OpenOrder) -> Result<Opened, EngineError> {
        self.ask(|reply| Order::Open { order, reply }).unwrap_or_else(|| Err(stopping()))
    }

    /// What is known of an image that was opened.
    pub(crate) fn progress(&self, key: Key) -> Option<Progress> {
        self.ask(|reply| Order::Progress { key, reply }).flatten()
    }

    /// Fetches an extent for somebody else. Completes when it is here, or cannot be.
    pub(crate) async fn pull(&self, key: Key, region: u8, extent: ExtentIndex) {
        let (reply, answered) = oneshot::channel();
        if self.orders.send(Order::Pull { key, region, extent, reply }).is_ok() {
            // An error: it could not be had.
            answered.await.unwrap_or_default();
        }
    }

    fn ask<T>(&self, order: impl FnOnce(oneshot::Sender<T>) -> Order) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.orders.send(order(reply)).ok()?;
        answer.blocking_recv().ok()
    }
}

/// The thread's life, until it is told to stop.
#[expect(clippy::too_many_arguments, reason = "all that a thread takes over, in one place")]
fn run(
    settings: Settings,
    identity: &Identity,
    trust: &Trust,
    pool: &Arc<Pool>,
    library: &Arc<dyn Library>,
    orders: &UnboundedSender<Order>,
    open: &Arc<Mutex<Vec<Weak<HostImage>>>>,
    received: &mut UnboundedReceiver<Order>,
    started: &std::sync::mpsc::Sender<Result<(), EngineError>>,
) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            let error = host_error(format!("the pager cannot have a runtime: {error}"));
            return started.send(Err(error)).unwrap_or_default();
        }
    };
    LocalSet::new().block_on(&runtime, async {
        let tuning = Tuning { has_one_connection: settings.has_one_connection, ..Tuning::default() };
        let client = match Client::new(identity, trust, &tuning) {
            Ok(client) => client,
            Err(error) => return started.send(Err(host_error(error.to_string()))).unwrap_or_default(),
        };
        started.send(Ok(())).unwrap_or_default();
        let shared = Rc::new(Shared {
            settings,
            client,
            pool: Arc::clone(pool),
            library: Arc::clone(library),
            orders: orders.clone(),
            open: Arc::clone(open),
            began: tokio::time::Instant::now(),
            links: RefCell::default(),
            all: RefCell::default(),
        });
        serve(&shared, received).await;
        shared.client.close();
    });
}

async fn serve(shared: &Rc<Shared>, received: &mut UnboundedReceiver<Order>) {
    let fetches: Rc<RefCell<HashMap<Key, Rc<Fetch>>>> = Rc::default();
    // Those who open an image that is being opened wait for the first of them.
    let opening: Rc<RefCell<HashMap<Key, Rc<tokio::sync::Mutex<()>>>>> = Rc::default();
    let of = |key: &Key| fetches.borrow().get(key).cloned();
    let of_child = |child: &Watched| {
        let is_it = |fetch: &&Rc<Fetch>| Arc::ptr_eq(&fetch.host_image, child.host_image());
        fetches.borrow().values().find(is_it).cloned()
    };
    let mut sweep = tokio::time::interval(SWEEP_EVERY);
    loop {
        let order = tokio::select! {
            order = received.recv() => order,
            _ = sweep.tick() => {
                fetches.borrow_mut().retain(|_, fetch| fetch.is_needed() || fetch.close());
                let all: Vec<_> = fetches.borrow().values().cloned().collect();
                all.iter().for_each(Fetch::stream_if_room);
                all.iter().for_each(|fetch| fetch.look_for_strangers());
                metrics::read_leases_held(fetches.borrow().values().map(|fetch| fetch.leases()).sum());
                continue;
            }
        };
        let Some(order) = order else { break };
        match order {
            Order::Open { order, reply } => {
                let (shared, fetches, opening) = (Rc::clone(shared), Rc::clone(&fetches), Rc::clone(&opening));
                tokio::task::spawn_local(async move {
                    let key = (order.tenant.clone(), order.image);
                    let turn_of = Rc::clone(opening.borrow_mut().entry(key.clone()).or_default());
                    let _turn = turn_of.lock().await;
                    let known = fetches.borrow().get(&key).filter(|fetch| fetch.is_good()).cloned();
                    let opened = match known {
                        Some(fetch) => {
                            fetch.add_holders(&order.holders);
                            Ok(fetch)
                        }
                        None if fetches.borrow().len() >= FETCHES_MAX => Err(too_many()),
                        None => Fetch::open(&shared, key.clone(), &order.holders).await,
                    };
                    let opened = opened.map(|fetch| {
                        let before = fetches.borrow_mut().insert(key.clone(), Rc::clone(&fetch));
                        if let Some(failed) = before.filter(|before| !Rc::ptr_eq(before, &fetch)) {
                            failed.close();
                        }
                        fetch.opened()
                    });
                    // The one in the table, and this: nobody else waits for a turn.
                    if Rc::strong_count(&turn_of) <= 2 {
                        opening.borrow_mut().remove(&key);
                    }
                    // Nobody waits any more: the image stays open until it is closed.
                    drop(reply.send(opened));
                });
            }
            Order::Watch(child) => match of_child(&child) {
                Some(fetch) => fetch.watch(child),
                // Its image was closed in the same moment.
                None => child.end(vm::Ended { reason: Reason::PageSourceLost, detail: "its image was closed".to_owned() }),
            },
            Order::Forget(child) => {
                if let Some(fetch) = of_child(&child) {
                    fetch.forget(&child);
                }
            }
            Order::Want { key, region, extents } => {
                if let (Some(fetch), Ok(region)) = (of(&key), u8::try_from(region)) {
                    fetch.want(region, extents);
                }
            }
            Order::Pull { key, region, extent, reply } => {
                if let Some(fetch) = of(&key) {
                    fetch.pull(region, extent, reply);
                }
            }
            Order::Progress { key, reply } => drop(reply.send(of(&key).map(|fetch| fetch.progress()))),
            #[cfg(feature = "testing")]
            Order::Panic { of_task } => {
                assert!(of_task, "a test asked for it");
                for fetch in fetches.borrow().values() {
                    fetch.spawn(async { panic!("a test asked for it") });
                }
            }
            Order::Stop => break,
        }
    }
    for fetch in fetches.borrow().values() {
        fetch.close();
    }
}

/// What was to answer the faults on an image has panicked.
fn fail_after_panic(host_image: &HostImage, panic: &(dyn std::any::Any + Send)) {
    let said = panic.downcast_ref::<&str>().map(|said| (*said).to_owned());
    let said = said.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
    tracing::error!(image = %host_image.digest(), said, "the pager panicked; the children that it answered are ended");
    let detail = "the pager that fetched its memory ended by itself".to_owned();
    host_image.fail(vm::Ended { reason: Reason::PageSourceLost, detail });
}

fn host_error(message: String) -> EngineError {
    let remedy = "raise the limits on threads and open files (ulimit -u, ulimit -n)".to_owned();
    EngineError { kind: ErrorKind::Host, message, remedy }
}

fn too_many() -> EngineError {
    EngineError {
        kind: ErrorKind::Exhausted,
        message: format!("{FETCHES_MAX} images of other nodes are open, which is the most"),
        remedy: "forget some (farfork image rm)".to_owned(),
    }
}

fn stopping() -> EngineError {
    let message = "the pager is stopping".to_owned();
    EngineError { kind: ErrorKind::Stopping, message, remedy: "ask again when the node is back".to_owned() }
}

/// Where the nodes of an order are, for messages.
fn list(holders: &[SocketAddr]) -> String {
    holders.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
