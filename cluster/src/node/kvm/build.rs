//! Building templates: the machine's side of [`guest::template`](crate::node::guest::template).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use agent::protocol::PORT;
use types::{MachineId, MemorySize, Tenant};
use uuid::Uuid;
use vm::Class;
use vm::class::Devices;
use vm::image::Image;
use vm::linux::{self, Kernel};
use vm::pool::Jailed;

use super::errors::{of_ended, of_pool};
use super::{KnownImage, KvmEngine};
use crate::node::engine::{EngineError, ErrorKind, ImageFacts};
use crate::node::guest::identity::{self, Fork};
use crate::node::guest::template::{self, BuildOrder, Parent, Stage, StageTime};
use crate::node::guest::{ended_error, guest_error};

/// Bytes that are copied at a time.
const PIECE: usize = 1 << 20;
/// Where ext4 has its magic number (Documentation/filesystems/ext4, super block).
const EXT4_MAGIC_AT: u64 = 1024 + 0x38;
const EXT4_MAGIC: [u8; 2] = [0x53, 0xEF];

impl KvmEngine {
    pub(super) fn build_template(
        &self,
        order: &BuildOrder,
        tenant: &Tenant,
        progress: &mut dyn FnMut(Stage),
    ) -> Result<(ImageFacts, Vec<StageTime>), EngineError> {
        let mut times = Vec::new();
        progress(Stage::Load);
        let began = Instant::now();
        let rootfs = open("root file system", &order.rootfs)?;
        let class = self.class_of(order, &rootfs)?;
        self.check_memory(class, 1)?;
        let memory = linux::memory(class).map_err(|error| of_linux(&order.kernel, &error))?;
        copy_root(&rootfs, memory.last().expect("the disk is the last region"), &order.rootfs)?;
        let (kernel, initrd) = (open("kernel", &order.kernel)?, open("initrd", &order.initrd)?);
        let mut command_line = linux::base_command_line(class, self.pool.host().emulates_ring_0());
        if !order.kernel_arguments.is_empty() {
            command_line.push(' ');
            command_line.push_str(&order.kernel_arguments);
        }
        let mut seed = [0; 32];
        rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| failed("drawing a seed", &error.into()))?;
        let what = Kernel { kernel: &kernel, initrd: Some(&initrd), command_line: &command_line, seed };
        let start = linux::load(class, &memory, &what).map_err(|error| of_linux(&order.kernel, &error))?;
        times.push(StageTime { stage: Stage::Load, took: began.elapsed() });

        // Before half a minute of booting: whether there is a network at all.
        let link = order.network.then(|| self.make_link()).transpose()?;
        progress(Stage::Boot);
        let began = Instant::now();
        let id = MachineId::from_uuid(Uuid::now_v7());
        let parent = self.pool.boot_linux(class, id, memory, start).map_err(of_pool)?;
        template::wait_for_agent(&parent, order.deadline)?;
        if let Some((tap, link)) = &link {
            parent.plug(tap).map_err(of_pool)?;
            template::set_address(&parent, *link, order.deadline)?;
        }
        times.push(StageTime { stage: Stage::Boot, took: began.elapsed() });

        progress(Stage::Warm);
        let began = Instant::now();
        template::warm_up(&parent, order)?;
        times.push(StageTime { stage: Stage::Warm, took: began.elapsed() });

        progress(Stage::Gate);
        let began = Instant::now();
        template::close_gate(&parent, order.rules, order.deadline)?;
        times.push(StageTime { stage: Stage::Gate, took: began.elapsed() });

        progress(Stage::Freeze);
        let began = Instant::now();
        let image = parent.freeze().map_err(of_pool)?.image;
        drop(parent);
        times.push(StageTime { stage: Stage::Freeze, took: began.elapsed() });

        progress(Stage::Record);
        let began = Instant::now();
        self.record(&image)?;
        let facts = self.keep(KnownImage { image, tenant: tenant.clone(), pattern_pages: None })?;
        times.push(StageTime { stage: Stage::Record, took: began.elapsed() });
        Ok((facts, times))
    }

    /// Forks a first child, which also shows that it can be done.
    fn record(&self, image: &Arc<Image>) -> Result<(), EngineError> {
        let id = MachineId::from_uuid(Uuid::now_v7());
        let forked = self.pool.fork(image, &[id], vm::pool::ForkOptions::default()).pop();
        let (child, _) = forked.expect("an outcome for each id").map_err(of_pool)?;
        let told = identity::tell(Parent::connect(&child)?, id, None, &[], Fork { since: Instant::now(), children: 1 });
        told.map_err(|error| guest_error("the first child", &error, &Parent::console(&child)))?;
        image.record_working_set(child.touched().map_err(of_pool)?);
        Ok(())
    }

    fn class_of(&self, order: &BuildOrder, rootfs: &File) -> Result<Class, EngineError> {
        let unfit = |message: String, remedy: &str| EngineError { kind: ErrorKind::Unfit, message, remedy: remedy.to_owned() };
        let bytes = rootfs.metadata().map_err(|error| failed("reading the root file system", &error))?.len();
        let least = bytes.div_ceil(MemorySize::STEP) * MemorySize::STEP;
        let disk = match order.disk {
            Some(disk) if disk.bytes() < bytes => {
                let message = format!("the root file system has {bytes} bytes; the disk was asked to have {disk}");
                return Err(unfit(message, "ask for a larger disk, or leave it out"));
            }
            Some(disk) => disk,
            None => MemorySize::from_bytes(least)
                .map_err(|error| unfit(format!("the disk: {error}"), "use a root file system of 2 MiB to 32 GiB"))?,
        };
        let devices = Devices::Linux { disk: Some(disk), network: order.network };
        let class = Class::with_devices(order.memory, order.vcpus, devices)
            .map_err(|error| unfit(error.to_string(), error.remedy()))?;
        self.pool.host().check_class(class).map_err(|error| unfit(error.to_string(), error.remedy()))?;
        Ok(class)
    }
}

impl Parent for Jailed {
    fn connect(&self) -> Result<UnixStream, EngineError> {
        Self::connect(self, PORT).map_err(of_pool)
    }

    fn check(&self, step: &str) -> Result<(), EngineError> {
        match self.ended() {
            None => Ok(()),
            Some(ended) => {
                let ended = of_ended(ended);
                Err(ended_error(step, ended.reason, &ended.detail, &Parent::console(self)))
            }
        }
    }

    fn console(&self) -> Vec<u8> {
        Self::console(self).unwrap_or_default().0
    }
}

fn open(what: &str, path: &Path) -> Result<File, EngineError> {
    let refused = |message: String| EngineError {
        kind: ErrorKind::Guest,
        message,
        remedy: "name a file that the node's user may read; `make guest` builds them".to_owned(),
    };
    let file = File::open(path).map_err(|error| refused(format!("the {what} {}: {error}", path.display())))?;
    let is_file = file.metadata().is_ok_and(|metadata| metadata.is_file());
    if is_file { Ok(file) } else { Err(refused(format!("the {what} {} is no file", path.display()))) }
}

/// The file system at the start of the disk, its runs of zeros left as holes.
fn copy_root(from: &File, to: &File, path: &Path) -> Result<(), EngineError> {
    let mut magic = [0; 2];
    if from.read_exact_at(&mut magic, EXT4_MAGIC_AT).is_err() || magic != EXT4_MAGIC {
        return Err(EngineError {
            kind: ErrorKind::Guest,
            message: format!("{} is no ext4 file system", path.display()),
            remedy: "name an ext4 image; `farfork template build --rootfs` also takes directories and tar archives".to_owned(),
        });
    }
    let mut buffer = vec![0; PIECE];
    let mut at = 0;
    loop {
        let count = from.read_at(&mut buffer, at).map_err(|error| failed("reading the root file system", &error))?;
        if count == 0 {
            return Ok(());
        }
        for (page, bytes) in (0u64..).zip(buffer[..count].chunks(4096)) {
            if bytes.iter().any(|byte| *byte != 0) {
                to.write_all_at(bytes, at + page * 4096).map_err(|error| failed("filling the disk", &error))?;
            }
        }
        at += count as u64;
    }
}

fn failed(what: &str, error: &io::Error) -> EngineError {
    let kind = if error.raw_os_error() == Some(rustix::io::Errno::NOMEM.raw_os_error()) {
        ErrorKind::Exhausted
    } else {
        ErrorKind::Internal
    };
    EngineError { kind, message: format!("{what} failed: {error}"), remedy: "look for its cause in the kernel log".to_owned() }
}

fn of_linux(kernel: &Path, error: &linux::LinuxError) -> EngineError {
    EngineError {
        kind: ErrorKind::Guest,
        message: format!("the kernel {}: {error}", kernel.display()),
        remedy: error.remedy().to_owned(),
    }
}
