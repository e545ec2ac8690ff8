//! The engine on KVM: a pool of jailed workers, the images in memory, and the store of saved ones.

mod build;
mod errors;
mod links;
mod move_images;
mod remote;

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use types::{CpuProfile, Digest, FullName, ImageId, MachineId, PageIndex, Tenant};
use uuid::Uuid;
use vm::class::Devices;
use vm::image::Image;
use vm::jail::cgroup::Groups;
use vm::pool::{Jailed, PoolError, Settings};
use vm::probe::{self, Command};
use vm::{Class, Host, Pool};

use super::data::DataDirectory;
use super::engine::{
    Ended, Engine, EngineError, ErrorKind, ForkOptions, ForkStages, Forked, FreezeFacts, Guest, ImageFacts, OpenOrder,
    PoolFacts, Proof, Residency, Usage,
};
use super::guest::network::Link;
use super::guest::template::{BuildOrder, Stage, StageTime};
use super::network::NetworkSettings;
use super::offer::Store;
use super::pager::Pager;
use super::quic::Credentials;
use errors::{of_ended, of_load, of_pool, of_save, of_store, unknown_image, unknown_machine, unknown_name, wrong_proof};
use links::Links;
use remote::Hasher;

/// What a saved image's file is called after its name.
const SUFFIX: &str = ".img";
/// The epoch of the pattern that prepared guests write.
const EPOCH: u64 = 1;
/// Memory that forks leave to the rest of the host.
pub(super) const RESERVE_BYTES: u64 = 256 << 20;

/// Opens the engine of this host, with its store in `data`, and what it offers to other nodes. This program is its own zygote.
///
/// # Errors
/// [`EngineError`] of kind [`ErrorKind::Host`] if this host cannot run machines.
pub fn open(
    data: &DataDirectory,
    network: &NetworkSettings,
    credentials: &Credentials,
) -> Result<(Arc<dyn Engine>, Arc<Store>), EngineError> {
    let host_error = |message: String, remedy: &str| EngineError { kind: ErrorKind::Host, message, remedy: remedy.to_owned() };
    let host = Host::open().map_err(|error| host_error(error.to_string(), error.remedy()))?;
    let mut settings = Settings::new("/proc/self/exe", [OsString::from("zygote")]);
    let name = groups_of(data);
    match Groups::open(&name) {
        Ok(_) => settings.groups = Some(name),
        Err(error) => {
            tracing::warn!(%error, remedy = error.remedy(), "no control groups: workers are bounded by rlimits alone");
        }
    }
    if !vm::jail::has_landlock() {
        tracing::warn!(remedy = "add landlock to the kernel's lsm= parameter", "no Landlock: workers do without it");
    }
    let store = data.images().try_clone_to_owned();
    let store = store.map_err(|error| host_error(format!("duplicating a descriptor failed: {error}"), "raise ulimit -n"))?;
    move_images::remove_halves(&store).map_err(|error| of_store("removing half an import", error))?;
    settings.page_patience = network.page_deadline;
    let pool = Pool::open(host, settings).map_err(|error| EngineError { kind: ErrorKind::Host, ..of_pool(error) })?;
    let (pool, state) = (Arc::new(pool), Arc::<Mutex<State>>::default());
    let (pager, offers) = remote::start(network, credentials, &pool, &state)?;
    let hasher = network.listen.map(|_| Hasher::start()).transpose()?;
    let links = network.guests.map(Links::open).transpose()?;
    Ok((Arc::new(KvmEngine { pool, store, saving: Mutex::new(()), state, pager, hasher, links }), offers))
}

/// The name of a node's control groups: the end of its id, since its head is a time.
fn groups_of(data: &DataDirectory) -> String {
    data.node().simple().to_string().split_off(20)
}

/// Removes what a node has left in control groups that was killed and will not start again.
pub(crate) fn remove_groups(data: &DataDirectory) {
    // Where there are none, none were left.
    if let Ok(groups) = Groups::open(&groups_of(data)) {
        groups.close();
    }
}

struct KvmEngine {
    pool: Arc<Pool>,
    store: OwnedFd,
    /// One save at a time: a name that is free stays free until it is taken.
    saving: Mutex<()>,
    state: Arc<Mutex<State>>,
    pager: Pager,
    /// Where others may ask for images: they do so by their digests.
    hasher: Option<Hasher>,
    links: Option<Links>,
}

#[derive(Default)]
struct State {
    machines: HashMap<MachineId, Machine>,
    images: HashMap<ImageId, KnownImage>,
}

enum Machine {
    Running(Running),
    /// It has ended by itself; this is what it printed last.
    Gone {
        ended: Ended,
        console: (Vec<u8>, u64),
    },
}

#[derive(Clone)]
struct Running {
    jailed: Arc<Jailed>,
    /// What it was forked from, which may have been forgotten since.
    image: ImageId,
    tenant: Tenant,
    pattern_pages: Option<u64>,
}

#[derive(Clone)]
struct KnownImage {
    image: Arc<Image>,
    tenant: Tenant,
    /// How many pages from the first page of work hold the pattern, if a guest of ours wrote it.
    pattern_pages: Option<u64>,
}

impl KvmEngine {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self, image: ImageId) -> Result<KnownImage, EngineError> {
        self.lock().images.get(&image).cloned().ok_or_else(|| unknown_image(image))
    }

    fn running(&self, machine: MachineId) -> Result<Running, EngineError> {
        match self.lock().machines.get(&machine) {
            Some(Machine::Running(running)) => Ok(running.clone()),
            Some(Machine::Gone { ended, .. }) => Err(EngineError {
                kind: ErrorKind::Ended(ended.reason),
                message: format!("machine {machine} has ended ({}: {})", ended.reason, ended.detail),
                remedy: "fork again from its image".to_owned(),
            }),
            None => Err(unknown_machine(machine)),
        }
    }

    fn keep(&self, known: KnownImage) -> Result<ImageFacts, EngineError> {
        let facts = facts(&known)?;
        if let Some(hasher) = &self.hasher {
            hasher.hash(&known.image);
        }
        self.lock().images.insert(facts.id, known);
        Ok(facts)
    }

    /// Whether the store has room for a name. `saving` is locked.
    fn check_free(&self, name: &FullName) -> Result<(), EngineError> {
        match rustix::fs::statat(&self.store, file_name(name), AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => Ok(()),
            Ok(_) => Err(EngineError {
                kind: ErrorKind::NameTaken,
                message: format!("the store has an image called {name}"),
                remedy: "take another name, or remove that one (farfork image rm)".to_owned(),
            }),
            Err(error) => Err(of_store("looking for the name", error)),
        }
    }

    /// Refuses forks that the host's memory does not allow even if they write nothing.
    fn check_memory(&self, class: Class, count: usize) -> Result<(), EngineError> {
        let available = vm::host::available_memory().unwrap_or(u64::MAX);
        let needed = RESERVE_BYTES + vm::pool::machine_cost_bytes(class) * u64::try_from(count).unwrap_or(u64::MAX);
        if needed <= available {
            return Ok(());
        }
        Err(EngineError {
            kind: ErrorKind::Exhausted,
            message: format!("{count} machines take at least {needed} bytes of memory, and {available} are free"),
            remedy: "end other machines, or fork fewer".to_owned(),
        })
    }
}

impl Engine for KvmEngine {
    fn prepare(&self, guest: Guest, class: Class, tenant: &Tenant) -> Result<ImageFacts, EngineError> {
        let Guest::Probe = guest;
        self.pool.host().check_class(class).map_err(|error| EngineError {
            kind: ErrorKind::Unfit,
            message: error.to_string(),
            remedy: error.remedy().to_owned(),
        })?;
        self.check_memory(class, 1)?;
        let count = probe::work_pages(class.memory()).min(class.memory().bytes() / types::PAGE_SIZE / 4);
        let parent = self.pool.boot_probe(class, MachineId::from_uuid(Uuid::now_v7())).map_err(of_pool)?;
        let fill = Command::Fill { first: probe::first_work_page(), count, epoch: EPOCH };
        let [filled, ..] = parent.call(0, fill).map_err(of_pool)?;
        if filled != count {
            return Err(wrong_proof(format!("the parent wrote {filled} of {count} pages")));
        }
        let image = parent.freeze().map_err(of_pool)?.image;
        self.keep(KnownImage { image, tenant: tenant.clone(), pattern_pages: Some(count) })
    }

    fn build(
        &self,
        order: &BuildOrder,
        tenant: &Tenant,
        progress: &mut dyn FnMut(Stage),
    ) -> Result<(ImageFacts, Vec<StageTime>), EngineError> {
        self.build_template(order, tenant, progress)
    }

    fn connect(&self, machine: MachineId) -> Result<UnixStream, EngineError> {
        let jailed = self.running(machine)?.jailed;
        if jailed.class().devices() == Devices::None {
            let message = format!("machine {machine} runs no Linux guest");
            let remedy = "fork one from a template (farfork template ls)".to_owned();
            return Err(EngineError { kind: ErrorKind::Guest, message, remedy });
        }
        jailed.connect(agent::protocol::PORT).map_err(of_pool)
    }

    fn check_guest_network(&self) -> Result<(), EngineError> {
        self.links().map(drop)
    }

    fn plug(&self, machine: MachineId) -> Result<Link, EngineError> {
        self.plug_in(machine)
    }

    fn open(&self, order: &OpenOrder) -> Result<ImageFacts, EngineError> {
        self.open_remote(order)
    }

    fn digest(&self, image: ImageId) -> Result<Digest, EngineError> {
        let image = self.known(image)?.image;
        remote::hash(&image).map_err(|error| of_save(&error))?;
        Ok(image.digest().expect("an image with a manifest has a digest"))
    }

    fn residency(&self, image: ImageId) -> Result<Residency, EngineError> {
        self.residency_of(image)
    }

    fn data_bytes(&self, image: ImageId) -> Result<u64, EngineError> {
        self.data_bytes_of(image)
    }

    fn fork(&self, image: ImageId, ids: &[MachineId], options: ForkOptions) -> Vec<Result<Forked, EngineError>> {
        let known = self.known(image).and_then(|known| self.check_memory(known.image.class(), ids.len()).map(|()| known));
        let known = match known {
            Ok(known) => known,
            Err(error) => return ids.iter().map(|_| Err(error.clone())).collect(),
        };
        let options = vm::pool::ForkOptions { limit_bytes: options.limit_bytes };
        let outcomes = self.pool.fork(&known.image, ids, options);
        let mut state = self.lock();
        let keep = |(outcome, id): (Result<_, PoolError>, &MachineId)| {
            let (jailed, times): (Jailed, vm::pool::ForkTimes) = outcome.map_err(of_pool)?;
            let machine = match jailed.ended() {
                // Before anybody could know of it.
                Some(ended) => Machine::Gone { ended: of_ended(ended), console: jailed.console().unwrap_or_default() },
                None => {
                    let (tenant, pattern_pages) = (known.tenant.clone(), known.pattern_pages);
                    Machine::Running(Running { jailed: Arc::new(jailed), image, tenant, pattern_pages })
                }
            };
            state.machines.insert(*id, machine);
            let stages =
                ForkStages { shell: times.shell, send: times.send, map: times.map, restore: times.restore, run: times.run };
            Ok(Forked { id: *id, first: times.first, stages, had_shell: times.had_shell })
        };
        outcomes.into_iter().zip(ids).map(keep).collect()
    }

    fn freeze(&self, machine: MachineId) -> Result<(ImageFacts, FreezeFacts), EngineError> {
        let Running { jailed, tenant, pattern_pages, .. } = self.running(machine)?;
        let frozen = jailed.freeze().map_err(of_pool)?;
        let facts = self.keep(KnownImage { image: frozen.image, tenant, pattern_pages })?;
        let report = frozen.report;
        let freeze = FreezeFacts {
            stall: report.stall,
            copy: report.copy,
            dirty_pages: report.dirty_pages,
            copied_extents: report.copied_extents,
        };
        Ok((facts, freeze))
    }

    fn verify(&self, machine: MachineId) -> Result<Proof, EngineError> {
        let Running { jailed, pattern_pages, .. } = self.running(machine)?;
        let Some(pages) = pattern_pages else {
            return Err(EngineError {
                kind: ErrorKind::WrongProof,
                message: format!("machine {machine} runs no guest that can prove what its memory holds"),
                remedy: "verify children of images that farfork fork --guest probe made".to_owned(),
            });
        };
        let [low, high, ..] = jailed.call(0, Command::Who).map_err(of_pool)?;
        let said = [low.to_le_bytes(), high.to_le_bytes()].concat();
        if said != machine.as_uuid().as_bytes() {
            return Err(wrong_proof(format!("machine {machine} takes itself for another")));
        }
        let verify = Command::Verify { first: probe::first_work_page(), count: pages, epoch: EPOCH };
        let [differ, first, compared, _] = jailed.call(0, verify).map_err(of_pool)?;
        if differ > 0 || compared != pages {
            let first = PageIndex(first).0;
            return Err(wrong_proof(format!("{differ} of {compared} pages of machine {machine} differ, page {first} first")));
        }
        Ok(Proof { pages })
    }

    #[cfg(feature = "bench")]
    fn probe(&self, machine: MachineId, commands: &[Command]) -> Result<Vec<super::engine::Probed>, EngineError> {
        let jailed = self.running(machine)?.jailed;
        let each = |command: &Command| {
            let began = std::time::Instant::now();
            let reply = jailed.call(0, *command).map_err(of_pool)?;
            Ok(super::engine::Probed { reply, took: began.elapsed() })
        };
        commands.iter().map(each).collect()
    }

    fn kill(&self, machine: MachineId) -> Result<(), EngineError> {
        let removed = self.lock().machines.remove(&machine);
        if let Some(Machine::Running(running)) = &removed {
            // Others may be at it, and keep it for as long as they wait.
            running.jailed.kill();
        }
        removed.map(drop).ok_or_else(|| unknown_machine(machine))
    }

    fn usage(&self, machine: MachineId) -> Result<Usage, EngineError> {
        let jailed = self.running(machine)?.jailed;
        let memory = jailed.memory().map_err(|error| EngineError {
            kind: ErrorKind::Internal,
            message: format!("the memory of machine {machine} cannot be read: {error}"),
            remedy: "ask again: it may just have ended".to_owned(),
        })?;
        let vm::pool::Memory { pss_bytes, private_bytes, page_table_bytes, cpu } = memory;
        Ok(Usage { pss_bytes, private_bytes, page_table_bytes, cpu, faults: jailed.faults() })
    }

    fn console(&self, machine: MachineId) -> Result<(Vec<u8>, u64), EngineError> {
        if let Some(Machine::Gone { console, .. }) = self.lock().machines.get(&machine) {
            return Ok(console.clone());
        }
        self.running(machine)?.jailed.console().map_err(of_pool)
    }

    fn cpu(&self) -> CpuProfile {
        self.pool.host().cpu().clone()
    }

    fn image(&self, image: ImageId) -> Result<ImageFacts, EngineError> {
        facts(&self.known(image)?)
    }

    fn save(&self, image: ImageId, name: &FullName, progress: &mut dyn FnMut(u64, u64)) -> Result<ImageFacts, EngineError> {
        let known = self.known(image)?;
        let _one_at_a_time = self.saving.lock().unwrap_or_else(PoisonError::into_inner);
        let file = file_name(name);
        self.check_free(name)?;
        vm::image::save_in(&known.image, self.store.as_fd(), &file, progress_in_bytes(progress))
            .map_err(|error| of_save(&error))?;
        facts(&known)
    }

    fn load(&self, name: &FullName, progress: &mut dyn FnMut(u64, u64)) -> Result<ImageFacts, EngineError> {
        let loaded = vm::image::load_in(self.pool.host(), self.store.as_fd(), &file_name(name), progress_in_bytes(progress));
        let image = loaded.map_err(|error| of_load(&error, name))?;
        self.keep(KnownImage { image, tenant: name.tenant.clone(), pattern_pages: None })
    }

    fn export(&self, name: &FullName) -> Result<File, EngineError> {
        self.export_image(name)
    }

    fn import(&self, name: &FullName, archive: &mut dyn Read) -> Result<ImageFacts, EngineError> {
        self.import_image(name, archive)
    }

    fn stored(&self) -> Result<Vec<(FullName, u64)>, EngineError> {
        self.stored_images()
    }

    fn forget(&self, image: ImageId) -> Result<(), EngineError> {
        let removed = self.lock().images.remove(&image);
        removed.map(drop).ok_or_else(|| unknown_image(image))
    }

    fn delete(&self, name: &FullName) -> Result<(), EngineError> {
        match rustix::fs::unlinkat(&self.store, file_name(name), AtFlags::empty()) {
            Ok(()) => Ok(()),
            Err(Errno::NOENT) => Err(unknown_name(name)),
            Err(error) => Err(of_store("deleting", error)),
        }
    }

    fn pool(&self) -> Vec<PoolFacts> {
        let facts = |shelf: vm::pool::ShelfFacts| PoolFacts {
            class: shelf.class,
            ready: shelf.ready,
            building: shelf.building,
            wanted: shelf.wanted,
        };
        self.pool.shelves().into_iter().map(facts).collect()
    }

    fn ended(&self) -> Receiver<(MachineId, Ended)> {
        let ends = self.pool.ends();
        let (sender, receiver) = channel();
        let state = Arc::clone(&self.state);
        let relay = move || {
            for (id, ended) in ends {
                let ended = of_ended(ended);
                let gone = {
                    let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
                    match state.machines.get_mut(&id) {
                        Some(machine) => match machine {
                            Machine::Running(running) => {
                                let console = running.jailed.console().unwrap_or_default();
                                let gone = Machine::Gone { ended: ended.clone(), console };
                                Some(std::mem::replace(machine, gone))
                            }
                            Machine::Gone { .. } => None,
                        },
                        None => None,
                    }
                };
                drop(gone);
                if sender.send((id, ended)).is_err() {
                    return;
                }
            }
        };
        if let Err(error) = std::thread::Builder::new().name("ends".into()).spawn(relay) {
            tracing::error!(%error, "the ends of machines will not be noticed");
        }
        receiver
    }

    fn stop(&self) {
        self.lock().machines.clear();
        self.pool.stop();
        self.pager.stop();
        self.lock().images.clear();
    }
}

fn facts(known: &KnownImage) -> Result<ImageFacts, EngineError> {
    let image = &known.image;
    let bytes = |bytes: std::io::Result<u64>| {
        bytes.map_err(|error| EngineError {
            kind: ErrorKind::Internal,
            message: format!("the size of image {} cannot be had: {error}", image.id()),
            remedy: "look for its cause in the kernel log".to_owned(),
        })
    };
    Ok(ImageFacts {
        id: image.id(),
        digest: image.digest(),
        tenant: known.tenant.clone(),
        class: image.class(),
        depth: image.depth(),
        own_bytes: bytes(image.own_bytes())?,
        stored_bytes: bytes(image.stored_bytes())?,
        verifiable: known.pattern_pages.is_some(),
    })
}

fn file_name(name: &FullName) -> OsString {
    OsString::from(format!("{}{SUFFIX}", name.file_stem()))
}

fn open_stored(store: &OwnedFd, name: &FullName) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    rustix::fs::openat2(store, OsStr::new(&file_name(name)), OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)
}

/// The engine below counts extents.
fn progress_in_bytes(progress: &mut dyn FnMut(u64, u64)) -> impl FnMut(u64, u64) {
    |done, total| progress(done * types::EXTENT_SIZE, total * types::EXTENT_SIZE)
}
