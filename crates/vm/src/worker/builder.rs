//! A worker's first thread of two: builds the shell, maps the image into it, and is gone before the guest's first instruction.
//! It may make system calls that the rest of the worker may not.
//!
//! ```text
//! builder         Build ──▶ shell ──▶ Fork ──▶ map ──┬──▶ ends
//! vCPU 0                                             └──▶ restore ──▶ waits for that end ──▶ runs the guest
//! main thread     waits ····················································▶ control
//! ```
//!
//! A first parent keeps its builder until it is frozen, since that maps its memory anew; from its boot on with a filter of its
//! own.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::Sender;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use types::{RegionKind, Source};

use super::channel::{self, Received};
use super::control::{self, Control, Until};
use super::protocol::{Failure, FromWorker, ToWorker, WireClass, WireImage};
use super::{REPORT, Shared, monotonic_ns};
use crate::class::Class;
use crate::host::Host;
use crate::image::Image;
use crate::jail::apply::{have_no_more_processes, limit_address_space};
use crate::jail::syscalls::confine_thread;
use crate::linux;
use crate::machine::Machine;
use crate::machine::frame::Keeping;
use crate::machine::state::{self, MachineState};
use crate::probe;
use crate::shell::{ForkError, Shell};
use crate::sys::process::exit;
use crate::sys::slot::Slot;

const STACK_SIZE: usize = 256 << 10;

/// The life of a worker's main thread.
pub(crate) fn live(host: Host, shared: Arc<Shared>) -> ! {
    let (handover, control) = std::sync::mpsc::channel();
    let builder = Builder { host, shared: Arc::clone(&shared), handover, buffer: Vec::new() };
    {
        // Locked until the handle is in its place, where the first vCPU's thread will look for it.
        let mut slot = shared.builder.lock().unwrap_or_else(PoisonError::into_inner);
        let thread = std::thread::Builder::new().name("builder".into()).stack_size(STACK_SIZE).spawn(move || builder.build());
        match thread {
            Ok(handle) => *slot = Some(handle),
            Err(error) => give_up(&shared, &failure("starting the builder", &error)),
        }
    }
    if let Err(error) = confine_thread(&shared.jail, &shared.filters.control) {
        give_up(&shared, &failure("the filter of system calls", &error));
    }
    match control.recv() {
        Ok(mut control) => control.serve(Until::Closed),
        Err(_) => give_up(&shared, &failure("waiting for the machine", &io::ErrorKind::Other.into())),
    }
    exit(0)
}

/// Tells the node, and ends the worker.
pub(super) fn give_up(shared: &Shared, failure: &Failure) -> ! {
    shared.channel.send(&FromWorker::Failed(failure.clone()), &[]).unwrap_or_default();
    exit(1)
}

pub(super) fn failure(what: &str, error: &io::Error) -> Failure {
    let remedy = "look for its cause in the kernel log".to_owned();
    Failure { message: format!("{what} failed: {error}"), remedy, errno: error.raw_os_error().unwrap_or(0) }
}

/// What to become a child of, and who.
struct ForkOrder {
    id: types::MachineId,
    image: Vec<u8>,
    layers: Vec<OwnedFd>,
    received_ns: u64,
    /// Where some of it is absent.
    watched: Option<Watching>,
}

struct Watching {
    arriving: Vec<(u8, u16)>,
    is_alone: bool,
    keeps_watch: bool,
}

struct Builder {
    host: Host,
    shared: Arc<Shared>,
    /// How the main thread gets the machine.
    handover: Sender<Box<Control>>,
    buffer: Vec<u8>,
}

impl Builder {
    fn build(mut self) {
        let (class, is_awaited) = match self.receive().message {
            ToWorker::Build { class, is_awaited } => (class, is_awaited),
            other => self.give_up_over(&other),
        };
        let (shell, fresh) = self.shell(class, is_awaited);
        let mut layers = Vec::new();
        loop {
            let received_ns;
            let Received { message, descriptors } = {
                let received = self.receive();
                received_ns = monotonic_ns();
                received
            };
            layers.extend(descriptors);
            match message {
                ToWorker::Layers => {}
                ToWorker::Fork { id, image } => {
                    let order = ForkOrder { id, image, layers, received_ns, watched: None };
                    return self.fork((shell, fresh), order);
                }
                ToWorker::ForkWatched { id, image, arriving, is_alone, keeps_watch } => {
                    let watched = Some(Watching { arriving, is_alone, keeps_watch });
                    let order = ForkOrder { id, image, layers, received_ns, watched };
                    return self.fork((shell, fresh), order);
                }
                ToWorker::BootProbe { id } => {
                    let boot = move |shell, memory| {
                        probe::boot_in(shell, memory, id).map_err(|error| Failure::of(&error, error.remedy()))
                    };
                    return self.boot(shell, layers, boot);
                }
                ToWorker::BootLinux { id, start } => {
                    let boot = move |shell, memory| {
                        linux::boot_in(shell, memory, id, start).map_err(|error| Failure::of(&error, error.remedy()))
                    };
                    return self.boot(shell, layers, boot);
                }
                other => self.give_up_over(&other),
            }
        }
    }

    fn receive(&mut self) -> Received<ToWorker> {
        match self.shared.channel.receive(&mut self.buffer) {
            Ok(received) => received,
            // The node is gone, or wants no shell any more.
            Err(channel::ReceiveError::Gone) => exit(0),
            Err(error) => give_up(&self.shared, &failure("receiving an order", &io::Error::other(error))),
        }
    }

    fn give_up_over(&self, order: &ToWorker) -> ! {
        let what = format!("the order {order:?} of a shell");
        give_up(&self.shared, &failure(&what, &io::ErrorKind::InvalidInput.into()))
    }

    fn shell(&mut self, class: WireClass, is_awaited: bool) -> (Shell, Option<MachineState>) {
        let started = Instant::now();
        let class = match Class::try_from(class) {
            Ok(class) => class,
            Err(error) => give_up(&self.shared, &failure("reading the class", &io::Error::other(error))),
        };
        let keeping = Keeping { confine: Some(confine_vcpu), witness: Some(Arc::clone(&self.shared) as _) };
        let shell = match Shell::build_kept(&self.host, class, keeping) {
            Ok(shell) => shell,
            Err(error) => give_up(&self.shared, &Failure::of(&error, error.remedy())),
        };
        self.host.close_device();
        let fresh = (!is_awaited).then(|| self.rehearse(&shell));
        if let Err(error) = limit_address_space(&self.shared.jail, class) {
            give_up(&self.shared, &failure("limiting the address space", &error));
        }
        let took_ns = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        if self.shared.channel.send(&FromWorker::Built { took_ns }, &[]).is_err() {
            exit(0);
        }
        (shell, fresh)
    }

    /// Has the shell's threads do once what a fork will have them do: what they touch for the first time costs more than all the
    /// system calls in between. What is restored here is what a new machine has anyway; returns it.
    fn rehearse(&self, shell: &Shell) -> MachineState {
        let core = shell.frame.core.clone();
        let captured = state::capture(&self.host, &core).map(|state| state.encode());
        let state = captured.and_then(|bytes| MachineState::decode(&bytes));
        let (sender, done) = std::sync::mpsc::channel();
        let restore = move || {
            let restored = state.and_then(|state| state::restore(&core, &state, None).map(|()| state));
            sender.send(restored).unwrap_or_default();
        };
        shell.frame.monitor.give_task(Box::new(restore));
        match done.recv() {
            Ok(Ok(state)) => state,
            Ok(Err(error)) => give_up(&self.shared, &Failure::of(&error, error.remedy())),
            Err(_) => give_up(&self.shared, &failure("the rehearsal of a vCPU's thread", &io::ErrorKind::Other.into())),
        }
    }

    fn fork(mut self, (shell, fresh): (Shell, Option<MachineState>), order: ForkOrder) {
        let ForkOrder { id, image, layers, received_ns, watched } = order;
        let is_watched = watched.is_some();
        let image = match receive_image(&self.host, &image, layers) {
            Ok(image) => Arc::new(image),
            Err(failed) => give_up(&self.shared, &failed),
        };
        let watch = |slots: &[(RegionKind, Slot)]| match &watched {
            None => Ok(()),
            Some(watching) => self.watch(&image, watching, slots).map_err(|source| ForkError::Watch { source }),
        };
        let machine = match shell.map(&image, id, watch) {
            Ok(machine) => machine,
            Err(error) => give_up(&self.shared, &Failure::of(&error, error.remedy())),
        };
        self.host.close_faults();
        let map_ns = u64::try_from(machine.stages().map.as_nanos()).unwrap_or(u64::MAX);
        let Self { host, shared, handover, buffer } = self;
        let core = machine.frame.core.clone();
        let monitor = Arc::clone(&machine.frame.monitor);
        let mut control = Box::new(Control::over(machine, host, Arc::clone(&shared), buffer));
        let runner = Arc::clone(&monitor);
        // By the vCPU's own thread, which has to be woken anyway.
        monitor.give_task(Box::new(move || {
            let started = monotonic_ns();
            if let Err(error) = state::restore(&core, image.state(), fresh.as_ref()) {
                give_up(&shared, &Failure::of(&error, error.remedy()));
            }
            let restore_ns = monotonic_ns() - started;
            // No thread that can map memory is left when the guest runs.
            if let Some(builder) = shared.builder.lock().unwrap_or_else(PoisonError::into_inner).take() {
                builder.join().unwrap_or_default();
            }
            runner.run();
            control.is_forked(control::ForkTimes { received_ns, map_ns, restore_ns }, is_watched);
            // The main thread waits for it for as long as the worker lives.
            handover.send(control).unwrap_or_default();
        }));
    }

    /// Has touches of absent memory reported to the node from now on.
    fn watch(&self, image: &Image, watching: &Watching, slots: &[(RegionKind, Slot)]) -> io::Result<()> {
        if watching.is_alone {
            have_no_more_processes()?;
        }
        let watch = self.host.faults().ok_or(io::ErrorKind::Unsupported)?.watch()?;
        for ((number, region), (_, slot)) in (0u8..).zip(image.regions()).zip(slots) {
            for run in region.map().data_runs() {
                let is_arriving = |layer: types::LayerIndex| watching.arriving.contains(&(number, layer.0));
                if matches!(run.source, Source::Layer(layer) if is_arriving(layer)) {
                    watch.register(slot, &run.bytes())?;
                }
            }
        }
        let starts = slots.iter().map(|(_, slot)| slot.start().0 as u64).collect();
        self.shared.channel.send(&FromWorker::Watched { starts }, &[watch.as_fd()])?;
        if watching.keeps_watch {
            *self.shared.watch.lock().unwrap_or_else(PoisonError::into_inner) = Some(watch);
        }
        Ok(())
    }

    fn boot(mut self, shell: Shell, memory: Vec<OwnedFd>, boot: impl FnOnce(Shell, Vec<File>) -> Result<Machine, Failure>) {
        self.host.close_faults();
        let memory = memory.into_iter().map(File::from).collect();
        let machine = match boot(shell, memory) {
            Ok(machine) => machine,
            Err(failed) => give_up(&self.shared, &failed),
        };
        if let Err(error) = confine_thread(&self.shared.jail, &self.shared.filters.first_parent) {
            give_up(&self.shared, &failure("the filter of system calls", &error));
        }
        let Self { host, shared, handover, buffer } = self;
        let mut control = Box::new(Control::over(machine, host, Arc::clone(&shared), buffer));
        control.is_forked(control::ForkTimes { received_ns: monotonic_ns(), map_ns: 0, restore_ns: 0 }, false);
        control.resume();
        control.serve(Until::Frozen);
        handover.send(control).unwrap_or_default();
    }
}

/// What a vCPU's thread does first.
fn confine_vcpu() -> io::Result<()> {
    let shared = REPORT.get().expect("a worker has told where to report");
    confine_thread(&shared.jail, &shared.filters.vcpu)
}

/// The image, as far as a child needs it.
fn receive_image(host: &Host, bytes: &[u8], layers: Vec<OwnedFd>) -> Result<Image, Failure> {
    let bad =
        |error: &dyn std::fmt::Display| failure(&format!("reading the image ({error})"), &io::ErrorKind::InvalidData.into());
    let wire: WireImage = postcard::from_bytes(bytes).map_err(|error| bad(&error))?;
    Image::received(host.cpu().clone(), wire, layers).map_err(|error| bad(&error))
}
