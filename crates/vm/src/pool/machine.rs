//! Machines in their workers: boot, freeze, and what they answer.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use types::MachineId;
use types::manifest::{WORKING_SET_RUNS_MAX, WorkingSetRun};

use super::worker::Worker;
use super::{Inner, PoolError, keeper};
use crate::class::Class;
use crate::image::complete::{CompleteError, complete};
use crate::image::{Image, check_map, memfd};
use crate::jail::cgroup::CgroupError;
use crate::machine::state::MachineState;
use crate::machine::{Ended, FreezeReport, Frozen};
use crate::probe::{Command, Reply};
use crate::worker::protocol::{self, ToWorker, WireFrozen};

/// How long somebody who only looks waits.
const LOOK_PATIENCE: Duration = Duration::from_secs(5);
/// How often a seal is tried that the kernel does not put on while a page is in use elsewhere.
const SEAL_ATTEMPTS: u32 = 20;
/// The most bytes of a run of a map on the wire.
const RUN_SIZE_MAX: usize = 9;

/// A machine in its worker. Dropping it kills it.
#[derive(Debug)]
pub struct Jailed {
    id: MachineId,
    inner: Arc<Inner>,
    pub(super) worker: Arc<Worker>,
    rests_on: Mutex<RestsOn>,
    limit_bytes: u64,
}

/// What a machine's memory rests on.
#[derive(Debug)]
enum RestsOn {
    /// A first parent's own memory, a memfd for each region, until it is frozen.
    Own(Vec<std::fs::File>),
    Image {
        image: Arc<Image>,
        /// Bytes that its branches had copied: the kernel counts them as the worker's.
        branched_bytes: u64,
        /// Its worker had memory mapped that all can see, and has been free to map more: see [`Image::seal_for_mapping`].
        was_first_parent: bool,
    },
}

/// What a machine costs, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Memory {
    /// Its share of what it maps.
    pub pss_bytes: u64,
    /// What it alone maps.
    pub private_bytes: u64,
    /// Its page tables.
    pub page_table_bytes: u64,
    /// CPU time so far.
    pub cpu: Duration,
}

pub(super) fn boot_probe(inner: &Arc<Inner>, class: Class, id: MachineId) -> Result<Jailed, PoolError> {
    let memory = memfd::first_memory(class).map_err(|source| PoolError::Step { step: "memfd_create", source })?;
    boot(inner, class, id, memory, &ToWorker::BootProbe { id })
}

/// A first parent on this memory, a memfd for each region, that starts as `order` says.
pub(super) fn boot(
    inner: &Arc<Inner>,
    class: Class,
    id: MachineId,
    memory: Vec<std::fs::File>,
    order: &ToWorker,
) -> Result<Jailed, PoolError> {
    let limit_bytes = class.region_bytes();
    let copies: std::io::Result<Vec<_>> = memory.iter().map(std::fs::File::try_clone).collect();
    let copies = copies.map_err(|source| PoolError::Step { step: "duplicating a descriptor", source })?;
    let (worker, _) = keeper::Demand::of(inner, class, 1).take()?;
    worker.deliver(|mail| mail.machine = Some(id));
    let jailed = Jailed { id, inner: Arc::clone(inner), worker, rests_on: Mutex::new(RestsOn::Own(memory)), limit_bytes };
    let descriptors: Vec<BorrowedFd<'_>> = copies.iter().map(AsFd::as_fd).collect();
    jailed.worker.send(order, &descriptors)?;
    jailed.worker.wait(|mail| mail.running)?;
    Ok(jailed)
}

impl Jailed {
    /// A child of an image, in a worker that knows nothing of it yet.
    pub(super) fn child(id: MachineId, inner: &Arc<Inner>, worker: Arc<Worker>, image: &Arc<Image>, limit_bytes: u64) -> Self {
        let rests_on = RestsOn::Image { image: Arc::clone(image), branched_bytes: 0, was_first_parent: false };
        Self { id, inner: Arc::clone(inner), worker, rests_on: Mutex::new(rests_on), limit_bytes }
    }

    /// Who it is.
    #[must_use]
    pub fn id(&self) -> MachineId {
        self.id
    }

    /// Its memory size and number of vCPUs.
    #[must_use]
    pub fn class(&self) -> Class {
        self.worker.class
    }

    /// The process that it is, in this one's namespace.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        self.worker.mail().pid
    }

    /// Why it ended, if it has.
    #[must_use]
    pub fn ended(&self) -> Option<Ended> {
        self.worker.mail().ended.clone()
    }

    /// Waits for its end. `None` if it has not ended within `patience`.
    #[must_use]
    pub fn wait_for_end(&self, patience: Duration) -> Option<Ended> {
        self.worker.wait_for_end(patience)
    }

    /// Ends it. It is gone, with all that it had, a little later.
    pub fn kill(&self) {
        self.worker.kill();
    }

    /// Makes an image of this instant. It is paused for that, and goes on before the image is complete.
    ///
    /// # Errors
    /// [`PoolError`]; it goes on as it was, unless it has ended.
    pub fn freeze(&self) -> Result<Frozen, PoolError> {
        // One at a time, as in the worker.
        let mut rests_on = self.rests_on.lock().unwrap_or_else(PoisonError::into_inner);
        self.worker.mail().await_frozen();
        match &mut *rests_on {
            RestsOn::Own(memory) => {
                let memory = std::mem::take(memory);
                let frozen = self.worker.send(&ToWorker::Freeze, &[]).and_then(|()| self.wait_for_frozen());
                let frozen = match frozen.and_then(|wire| self.check(*wire, &[1; 3])) {
                    Ok(frozen) => frozen,
                    Err(error) => {
                        *rests_on = RestsOn::Own(memory);
                        return Err(error);
                    }
                };
                let (state, maps, identity_page, report) = frozen;
                let cpu = self.inner.host.cpu().clone();
                let image = Image::first(cpu, state, self.class(), maps, memory, identity_page);
                let image = Arc::new(image);
                // The kernel counts it as the worker's.
                let branched_bytes = image.own_bytes().unwrap_or(0);
                *rests_on = RestsOn::Image { image: Arc::clone(&image), branched_bytes, was_first_parent: true };
                self.limit_memory(branched_bytes).unwrap_or_default();
                self.seal_against_worker(&image)?;
                Ok(Frozen { image, report })
            }
            RestsOn::Image { image: base, branched_bytes, was_first_parent } => {
                let layers = memfd::new_layers(self.class());
                let layers = layers.map_err(|source| PoolError::Step { step: "memfd_create", source })?;
                // What the copier writes counts as the worker's, for as long as the image lives; and while it copies, so does
                // what the guest writes a second time.
                self.limit_memory(*branched_bytes + self.class().region_bytes() + self.limit_bytes)?;
                let descriptors: Vec<BorrowedFd<'_>> = layers.iter().map(AsFd::as_fd).collect();
                // Where some of it may be absent the worker copies what its guest has written, and the rest is done here. It makes
                // no copier for that, which it may not.
                let is_settled = base.unsettled().is_none() && self.worker.may_have_processes();
                let order = if is_settled { ToWorker::Freeze } else { ToWorker::FreezePages };
                let frozen = self.worker.send(&order, &descriptors).and_then(|()| self.wait_for_frozen());
                let counts: Vec<usize> = base.regions().iter().map(|region| region.layers().len() + 1).collect();
                let checked = frozen.and_then(|wire| self.check(*wire, &counts));
                let checked = checked.and_then(|(state, maps, identity_page, mut report)| {
                    if is_settled {
                        return Ok((state, maps, identity_page, report));
                    }
                    let began = std::time::Instant::now();
                    let (maps, copied) =
                        complete(base, &layers, began + self.inner.settings.page_patience).map_err(incomplete)?;
                    report.copied_extents = copied;
                    report.copy += began.elapsed();
                    Ok((state, maps, identity_page, report))
                });
                let (state, maps, identity_page, report) = match checked {
                    Ok(checked) => checked,
                    Err(error) => {
                        // A worker that wrote and then said that it has not keeps nothing of it.
                        layers.iter().for_each(|layer| memfd::empty(layer).unwrap_or_default());
                        if self.limit_memory(*branched_bytes).is_err() {
                            self.worker.condemn("its memory could not be limited again after a failed freeze".to_owned());
                        }
                        return Err(error);
                    }
                };
                let cpu = self.inner.host.cpu().clone();
                let image = Image::branched(base, cpu, state, maps, layers, identity_page);
                if *was_first_parent {
                    self.seal_against_worker(&image)?;
                } else {
                    image.seal().map_err(|source| PoolError::Step { step: "sealing the image", source })?;
                }
                *branched_bytes += image.own_bytes().unwrap_or(0);
                self.limit_memory(*branched_bytes).unwrap_or_default();
                Ok(Frozen { image: Arc::new(image), report })
            }
        }
    }

    /// Makes sure that not even a worker that has mapped it to write can change an image any more; ends one that has.
    fn seal_against_worker(&self, image: &Image) -> Result<(), PoolError> {
        let mut sealed = image.seal_for_mapping();
        for _ in 0..SEAL_ATTEMPTS {
            if sealed.is_ok() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(5));
            sealed = image.seal_for_mapping();
        }
        self.worker.condemn("its memory could not be sealed: somebody has it mapped to write".to_owned());
        sealed.map_err(|source| PoolError::Step { step: "sealing the image", source })
    }

    fn wait_for_frozen(&self) -> Result<Box<WireFrozen>, PoolError> {
        self.worker.wait(|mail| mail.frozen.take())?.map_err(PoolError::Failed)
    }

    /// A worker's word for what it froze: not believed without a look at every number.
    fn check(
        &self,
        wire: WireFrozen,
        layer_counts: &[usize],
    ) -> Result<(MachineState, Vec<types::ExtentMap>, Option<types::GuestAddress>, FreezeReport), PoolError> {
        let lie = |what: String| PoolError::Lie { what };
        let state = MachineState::decode(&wire.state).map_err(|error| lie(error.to_string()))?;
        if state.vcpu_count() != usize::from(self.class().vcpu_count()) {
            return Err(lie(format!("a state with {} vCPUs", state.vcpu_count())));
        }
        let regions = self.class().regions();
        if wire.maps.len() != regions.len() {
            return Err(lie(format!("{} regions", wire.maps.len())));
        }
        for ((map, (_, bytes)), count) in wire.maps.iter().zip(&regions).zip(layer_counts) {
            check_map(map, *bytes, *count).map_err(|error| lie(error.to_string()))?;
        }
        let is_ram = |at: types::GuestAddress| crate::class::RamLayout::of(self.class().memory()).contains(at);
        if let Some(page) = wire.identity_page.filter(|page| !is_ram(*page) || page.0 % types::PAGE_SIZE != 0) {
            return Err(lie(format!("an identity page at {page}")));
        }
        let runs: usize = wire.maps.iter().map(|map| map.runs().len()).sum();
        if wire.state.len() + runs * RUN_SIZE_MAX + 1024 > protocol::MESSAGE_SIZE_MAX {
            return Err(lie("an image that no worker could be told of".to_owned()));
        }
        let [stall, rest, capture, scan, instant, copy] = wire.took_ns.map(Duration::from_nanos);
        let (dirty_pages, copied_extents) = (wire.dirty_pages, wire.copied_extents);
        let report = FreezeReport { stall, rest, capture, scan, instant, copy, dirty_pages, copied_extents };
        Ok((state, wire.maps, wire.identity_page, report))
    }

    /// Lets the worker have its own pages, what runs it, and so many bytes more.
    pub(super) fn limit_memory(&self, more_bytes: u64) -> Result<(), PoolError> {
        let bytes = self.limit_bytes + keeper::overhead_bytes(self.class()) + more_bytes;
        match &*self.worker.group.lock().unwrap_or_else(PoisonError::into_inner) {
            None => Ok(()),
            Some(group) => group.limit_memory(bytes).map_err(|error| PoolError::Step {
                step: "limiting the worker's memory",
                source: std::io::Error::other(error),
            }),
        }
    }

    /// Gives the probe on a vCPU a command and waits for its reply.
    ///
    /// # Errors
    /// [`PoolError`].
    pub fn call(&self, vcpu: u8, command: Command) -> Result<Reply, PoolError> {
        let _one_at_a_time = self.worker.ask();
        self.post(vcpu, command)?;
        self.answer(vcpu)
    }

    /// Gives the probe on a vCPU a command.
    ///
    /// # Errors
    /// [`PoolError`].
    pub fn post(&self, vcpu: u8, command: Command) -> Result<(), PoolError> {
        self.worker.mail().await_answer(vcpu);
        self.worker.send(&ToWorker::Probe { vcpu, command }, &[])
    }

    /// Waits for the reply to a command that was posted.
    ///
    /// # Errors
    /// [`PoolError`].
    pub fn answer(&self, vcpu: u8) -> Result<Reply, PoolError> {
        let answer = self.worker.wait(|mail| mail.answers.get_mut(usize::from(vcpu)).and_then(Option::take))?;
        answer.map_err(PoolError::Failed)
    }

    /// Tells a command that runs until told to stop, to stop, and waits for its reply.
    ///
    /// # Errors
    /// [`PoolError`].
    pub fn stop(&self, vcpu: u8) -> Result<Reply, PoolError> {
        {
            // Of a command that was posted, or inherited.
            let mut mail = self.worker.mail();
            if !mail.awaits_answer(vcpu) {
                mail.await_answer(vcpu);
            }
        }
        self.worker.send(&ToWorker::StopProbe { vcpu }, &[])?;
        self.answer(vcpu)
    }

    /// The extents of its image that it has touched so far; what is none of the image's is left out, whatever its worker says.
    ///
    /// # Errors
    /// [`PoolError`].
    pub fn touched(&self) -> Result<Vec<WorkingSetRun>, PoolError> {
        let _one_at_a_time = self.worker.ask();
        self.worker.mail().await_touched();
        self.worker.send(&ToWorker::Touched, &[])?;
        let mut runs = self.worker.wait(|mail| mail.touched.take())?;
        let regions = self.class().regions();
        runs.truncate(WORKING_SET_RUNS_MAX);
        runs.retain(|run| {
            let extents = regions.get(usize::from(run.region)).map_or(0, |(_, bytes)| bytes / types::EXTENT_SIZE);
            run.start.0.checked_add(run.count).is_some_and(|end| u64::from(end) <= extents)
        });
        Ok(runs)
    }

    /// A stream to a vsock port of the guest. Whether somebody listens there shows when it is used: it ends at once if not.
    ///
    /// # Errors
    /// [`PoolError`].
    pub fn connect(&self, port: u32) -> Result<std::os::unix::net::UnixStream, PoolError> {
        let step = |source| PoolError::Step { step: "making a socket", source };
        let (ours, its) = std::os::unix::net::UnixStream::pair().map_err(step)?;
        its.set_nonblocking(true).map_err(step)?;
        self.worker.send(&ToWorker::Connect { port }, &[its.as_fd()])?;
        Ok(ours)
    }

    /// Plugs its network card in.
    ///
    /// # Errors
    /// [`PoolError`].
    pub fn plug(&self, tap: &crate::Tap) -> Result<(), PoolError> {
        let _one_at_a_time = self.worker.ask();
        self.worker.mail().await_done();
        self.worker.send(&ToWorker::Plug, &[tap.as_fd()])?;
        self.worker.wait(|mail| mail.is_done.then_some(()))
    }

    /// Brings it to rest, or lets it run again.
    ///
    /// # Errors
    /// [`PoolError`].
    pub fn set_running(&self, is_to_run: bool) -> Result<(), PoolError> {
        let _one_at_a_time = self.worker.ask();
        self.worker.mail().await_done();
        self.worker.send(if is_to_run { &ToWorker::Resume } else { &ToWorker::Pause }, &[])?;
        self.worker.wait(|mail| mail.is_done.then_some(()))
    }

    /// What it printed: the newest 64 KiB, oldest first, and how many older bytes made room for it.
    ///
    /// # Errors
    /// [`PoolError`].
    pub fn console(&self) -> Result<(Vec<u8>, u64), PoolError> {
        if self.ended().is_some() {
            return Ok(self.worker.mail().console.clone().unwrap_or_default());
        }
        let _one_at_a_time = self.worker.ask();
        self.worker.mail().await_console();
        self.worker.send(&ToWorker::Console, &[])?;
        self.worker.look_for(LOOK_PATIENCE, &mut |mail| mail.console.take())
    }

    /// What it costs now, as the kernel counts it.
    ///
    /// # Errors
    /// If it has ended, or this process may not know.
    pub fn memory(&self) -> std::io::Result<Memory> {
        let pid = self.pid().filter(|_| self.ended().is_none()).ok_or(std::io::ErrorKind::NotFound)?;
        Memory::of_process(pid)
    }

    /// What its memory rests on; `None` for a first parent that was not frozen.
    #[must_use]
    pub fn image(&self) -> Option<Arc<Image>> {
        match &*self.rests_on.lock().unwrap_or_else(PoisonError::into_inner) {
            RestsOn::Own(_) => None,
            RestsOn::Image { image, .. } => Some(Arc::clone(image)),
        }
    }

    /// How often it has touched memory that had not arrived.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.worker.faults()
    }
}

pub(super) fn of_groups(error: CgroupError) -> PoolError {
    PoolError::Step { step: "limiting the worker's processes", source: std::io::Error::other(error) }
}

fn incomplete(error: CompleteError) -> PoolError {
    match error {
        CompleteError::Absent(source) => PoolError::Absent(source),
        CompleteError::Io(source) => PoolError::Step { step: "completing the image", source },
    }
}

impl Drop for Jailed {
    fn drop(&mut self) {
        self.worker.kill();
    }
}

impl Memory {
    /// Of any process, from `/proc/PID/smaps_rollup`, `status` and `stat`.
    ///
    /// # Errors
    /// If there is no such process, or this one may not know.
    pub fn of_process(pid: i32) -> std::io::Result<Self> {
        let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let kib = |text: &str, name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()).unwrap_or(0) << 10
        };
        // After the name, which may hold anything: state is the first field, user and system time the 12th and 13th.
        let ticks: u64 = stat.rsplit_once(')').map_or(0, |(_, fields)| {
            fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum()
        });
        Ok(Self {
            pss_bytes: kib(&rollup, "Pss"),
            private_bytes: kib(&rollup, "Private_Clean") + kib(&rollup, "Private_Dirty"),
            page_table_bytes: kib(&status, "VmPTE"),
            cpu: Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second().max(1)),
        })
    }
}
