//! What node, zygote and workers say to each other: postcard behind a magic number and a version, one message a packet.
//!
//! Node and zygote are the same program, but a worker that its guest has taken over is not: what comes from a worker is checked
//! like bytes from outside, and refers to nothing of the node's but by numbers within bounds.
//!
//! New variants go to the end; a change of an old one is a new version.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use types::manifest::WorkingSetRun;
use types::{ExtentMap, GuestAddress, MachineId, MemorySize, Reason};

use crate::class::{Class, Devices, VcpuCountError};
use crate::host::HostFacts;
use crate::jail::Jail;
use crate::linux::Start;
use crate::probe::{Command, Reply};

/// The longest message: a machine state, and the maps of two regions with 512 runs each.
pub const MESSAGE_SIZE_MAX: usize = 128 << 10;
/// The most descriptors with a message (the kernel takes 253).
pub const DESCRIPTORS_MAX: usize = 200;

const MAGIC: [u8; 2] = *b"ff";
const VERSION: u16 = 2;
const HEADER_SIZE: usize = 4;

/// A kind of message.
pub trait Message: DeserializeOwned {}

impl Message for ToZygote {}
impl Message for FromZygote {}
impl Message for ToWorker {}
impl Message for FromWorker {}

/// Bytes that are no message.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum BadMessage {
    #[error("a message is longer than {MESSAGE_SIZE_MAX} bytes, or has more than {DESCRIPTORS_MAX} descriptors")]
    TooLong,
    #[error("a message does not begin as one")]
    NoMagic,
    #[error("a message has version {0}; this farfork speaks version {VERSION}")]
    UnknownVersion(u16),
    #[error("a message does not decode: {0}")]
    Malformed(postcard::Error),
    #[error("a message has {0} bytes after its end")]
    TrailingBytes(usize),
}

/// From the node to its zygote.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum ToZygote {
    /// First; with the descriptor of `/dev/kvm`, and that of `/dev/userfaultfd` where there is one.
    Hello { facts: Box<HostFacts>, jail: Jail },
    /// Fork a worker; with its end of the channel, and the files through which it goes into its control groups.
    Spawn { worker: u64, uid: u32 },
}

/// From the zygote to its node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromZygote {
    /// It is confined and waits for orders.
    Ready,
    /// A worker was forked; with its pidfd.
    Spawned {
        /// As in the order.
        worker: u64,
        /// In the node's namespace.
        pid: i32,
    },
    /// A worker was not forked.
    NotSpawned {
        /// As in the order.
        worker: u64,
        /// Why.
        errno: i32,
    },
    /// A worker has ended and was reaped.
    Exited {
        /// As in the order.
        worker: u64,
        /// How.
        how: Exit,
    },
    /// The zygote cannot do its work.
    Failed(Failure),
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// By itself, with this status.
    Status(i32),
    /// By this signal.
    Signal(i32),
}

/// Something that failed.
#[derive(Clone, Debug, PartialEq, Eq, Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct Failure {
    /// What and where.
    pub message: String,
    /// What to do about it.
    pub remedy: String,
    /// The error number behind it, 0 if there is none.
    pub errno: i32,
}

impl Failure {
    /// What an error says of itself.
    pub(crate) fn of(error: &impl std::fmt::Display, remedy: &str) -> Self {
        Self { message: error.to_string(), remedy: remedy.to_owned(), errno: 0 }
    }
}

/// From the node to a worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ToWorker {
    /// First: be a shell.
    Build {
        /// Of this class.
        class: WireClass,
        /// Whether a fork waits for it: then what only saves time later is left out.
        is_awaited: bool,
    },
    /// Descriptors of an image's layers, more than fit with [`ToWorker::Fork`].
    Layers,
    /// Become a child of this image ([`WireImage`], encoded); with the (last) descriptors of its layers, in the order of its
    /// regions.
    Fork {
        /// Who it is.
        id: MachineId,
        /// The image.
        image: Vec<u8>,
    },
    /// Become a first parent that runs the probe; with a memfd for each region.
    BootProbe {
        /// Who it is.
        id: MachineId,
    },
    /// Make an image; of a child with a memfd for each region.
    Freeze,
    /// Bring the guest to rest.
    Pause,
    /// Let it run.
    Resume,
    /// Give the probe a command. The answer comes when it has one.
    Probe {
        /// Which of its vCPUs.
        vcpu: u8,
        /// What.
        command: Command,
    },
    /// Tell a probe's command that runs until told to, to stop; also one that was inherited from the machine that was frozen.
    StopProbe {
        /// On which vCPU.
        vcpu: u8,
    },
    /// Send what the guest printed.
    Console,
    /// Become a child of an image of which some is still absent; as [`ToWorker::Fork`]. It answers with
    /// [`FromWorker::Watched`] before it touches any of it.
    ForkWatched {
        /// Who it is.
        id: MachineId,
        /// The image.
        image: Vec<u8>,
        /// The layers that are not all there: region, and number within it.
        arriving: Vec<(u8, u16)>,
        /// Whether it has to see to it itself that it makes no process any more, whose memory would not be watched: where it has
        /// no control group in which the node does.
        is_alone: bool,
        /// Whether it keeps a descriptor of its own, without which the death of the node would show it zeros: always, but in
        /// the test of that.
        keeps_watch: bool,
    },
    /// Make an image of a child some of whose memory may be absent: copy the pages that it has written and nothing else; with a
    /// memfd for each region. The node completes their extents.
    FreezePages,
    /// All of its memory has arrived: close the descriptor that reports touches of what is absent.
    LetGo,
    /// Become a first parent that starts a kernel; with a memfd for each region, in which it lies already.
    BootLinux {
        /// Who it is.
        id: MachineId,
        /// Where it starts.
        start: Start,
    },
    /// Say which extents the machine has touched so far.
    Touched,
    /// Connect the socket that comes along, which does not block, with a vsock port of the guest.
    Connect {
        /// The port.
        port: u32,
    },
    /// Plug the network card into the tap that comes along, which does not block.
    Plug,
    /// Try to break out, for the tests of the jail.
    #[cfg(feature = "testing")]
    Attempt(crate::harness::attempts::Order),
    /// Map the file that comes along, privately, and read the byte at this offset.
    #[cfg(feature = "testing")]
    ReadHole {
        /// The offset.
        at: u64,
        /// By a process that it forks, from its own mapping of the first region.
        is_forked: bool,
    },
    /// End, for the tests of ends.
    #[cfg(feature = "testing")]
    Crash(crate::harness::Crash),
}

/// From a worker to the node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromWorker {
    /// It is a shell.
    Built {
        /// Nanoseconds that this took.
        took_ns: u64,
    },
    /// It is a child, and its first instruction was observed.
    Running {
        /// When the order was received; this and the next on the monotonic clock.
        received_ns: u64,
        /// When the first exit was.
        first_ns: u64,
        /// How long mapping took.
        map_ns: u64,
        /// How long restoring took.
        restore_ns: u64,
    },
    /// What was asked for was not done, and the worker is of no further use unless it was a running machine.
    Failed(Failure),
    /// An image was made.
    Frozen(Box<WireFrozen>),
    /// No image was made; the machine goes on as it was.
    NotFrozen(Failure),
    /// It is paused, or runs again.
    Done,
    /// A probe has an answer.
    Answer {
        /// Which of its vCPUs.
        vcpu: u8,
        /// What.
        answer: Result<Reply, Failure>,
    },
    /// What the guest printed: the newest, oldest first, and how many older bytes made room for it.
    Console {
        /// The bytes.
        bytes: Vec<u8>,
        /// The number.
        dropped: u64,
    },
    /// The machine has ended by itself.
    Ended {
        /// Why.
        reason: Reason,
        /// The numbers.
        detail: String,
        /// The last that it printed.
        console: Vec<u8>,
    },
    /// Touches of what is absent are reported from now on; with the descriptor that says so.
    Watched {
        /// The address at which each region begins.
        starts: Vec<u64>,
    },
    /// It has closed that descriptor.
    HasLetGo,
    /// The extents that the machine has touched.
    Touched(Vec<WorkingSetRun>),
    /// What came of an attempt to break out: 0, or the error number.
    #[cfg(feature = "testing")]
    Attempted(i32),
}

/// A [`Class`] on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireClass {
    memory: MemorySize,
    vcpu_count: u8,
    devices: Devices,
}

impl From<Class> for WireClass {
    fn from(class: Class) -> Self {
        Self { memory: class.memory(), vcpu_count: class.vcpu_count(), devices: class.devices() }
    }
}

impl TryFrom<WireClass> for Class {
    type Error = VcpuCountError;

    fn try_from(wire: WireClass) -> Result<Self, Self::Error> {
        Self::with_devices(wire.memory, wire.vcpu_count, wire.devices)
    }
}

/// What a worker must know of an image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WireImage {
    /// What kind of shell it needs.
    pub class: WireClass,
    /// The machine state, encoded.
    pub state: Vec<u8>,
    /// Where a child finds out who it is.
    pub identity_page: Option<GuestAddress>,
    /// For each region, its map and how many layers it has.
    pub regions: Vec<(ExtentMap, u16)>,
}

/// What a worker says of an image that it made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WireFrozen {
    /// The machine state, encoded.
    pub state: Vec<u8>,
    /// Where a child finds out who it is.
    pub identity_page: Option<GuestAddress>,
    /// For each region, its map over the layers of the image that the machine was forked from, and the new one.
    pub maps: Vec<ExtentMap>,
    /// Costs, in nanoseconds: stall, rest, capture, scan, instant, copy.
    pub took_ns: [u64; 6],
    /// Pages that the machine had written.
    pub dirty_pages: u64,
    /// Extents that were copied.
    pub copied_extents: u64,
}

/// Writes a message.
pub(crate) fn encode<M: Serialize>(message: &M) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(256);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    postcard::to_extend(message, bytes).expect("plain data")
}

/// Reads a message.
///
/// # Errors
/// [`BadMessage`].
pub fn decode<M: Message>(bytes: &[u8]) -> Result<M, BadMessage> {
    if bytes.len() > MESSAGE_SIZE_MAX {
        return Err(BadMessage::TooLong);
    }
    let (header, body) = bytes.split_at_checked(HEADER_SIZE).ok_or(BadMessage::NoMagic)?;
    if header[..2] != MAGIC {
        return Err(BadMessage::NoMagic);
    }
    let version = u16::from_le_bytes([header[2], header[3]]);
    if version != VERSION {
        return Err(BadMessage::UnknownVersion(version));
    }
    match postcard::take_from_bytes(body) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(BadMessage::TrailingBytes(rest.len())),
        Err(error) => Err(BadMessage::Malformed(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::samples;

    /// `FARFORK_BLESS=1` writes the golden file of a new version.
    #[test]
    fn messages_are_those_of_the_golden_file() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/protocol-v{VERSION}.txt"));
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let written: String = samples::all(&[1, 2]).iter().map(|(name, bytes)| format!("{name} {}\n", hex(bytes))).collect();
        if std::env::var_os("FARFORK_BLESS").is_some() && !path.exists() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, &written).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), written);
    }

    #[test]
    fn what_is_sent_is_what_is_received() {
        for (name, bytes) in samples::all(&[1, 2]) {
            let again = [
                decode::<FromWorker>(&bytes).map(|message| encode(&message)),
                decode::<ToWorker>(&bytes).map(|message| encode(&message)),
                decode::<FromZygote>(&bytes).map(|message| encode(&message)),
                decode::<ToZygote>(&bytes).map(|message| encode(&message)),
            ];
            assert!(again.contains(&Ok(bytes)), "{name}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        let good = encode(&FromWorker::Built { took_ns: 300 });
        let with = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            decode::<FromWorker>(&bytes)
        };
        assert_eq!(with(0, b'F'), Err(BadMessage::NoMagic));
        assert_eq!(with(2, 9), Err(BadMessage::UnknownVersion(9)));
        assert!(matches!(with(4, 200), Err(BadMessage::Malformed(_))));
        for len in 0..good.len() {
            decode::<FromWorker>(&good[..len]).unwrap_err();
        }
        assert_eq!(decode::<FromWorker>(&[&good[..], &[0]].concat()), Err(BadMessage::TrailingBytes(1)));
        assert_eq!(decode::<FromWorker>(&vec![0; MESSAGE_SIZE_MAX + 1]), Err(BadMessage::TooLong));
    }
}
