//! Samples of every message, for golden files and corpora.

use types::manifest::WorkingSetRun;
use types::{ExtentIndex, ExtentMap, GuestAddress, LayerIndex, MachineId, MemorySize, PageIndex, Reason, Source};
use uuid::Uuid;

use super::protocol::{Exit, Failure, FromWorker, FromZygote, ToWorker, ToZygote, WireClass, WireFrozen, WireImage, encode};
use crate::class::Class;
use crate::linux::Start;
use crate::probe::Command;

fn id() -> MachineId {
    MachineId::from_uuid(Uuid::from_u128(0x0192_0000_0000_7000_8000_0000_0000_0001))
}

fn failure() -> Failure {
    Failure { message: "what".into(), remedy: "do".into(), errno: 12 }
}

fn map() -> ExtentMap {
    ExtentMap::from_lengths([(1, Source::Layer(LayerIndex(0))), (31, Source::Zero)]).expect("valid")
}

/// One of each, by name.
pub(crate) fn all(state: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let class = WireClass::from(Class::new(MemorySize::from_mib(2).expect("2 MiB"), 1).expect("one vCPU"));
    let image =
        WireImage { class, state: state.to_vec(), identity_page: Some(GuestAddress(0x5000)), regions: vec![(map(), 1)] };
    let frozen = WireFrozen {
        state: state.to_vec(),
        identity_page: Some(GuestAddress(0x5000)),
        maps: vec![map()],
        took_ns: [1, 2, 3, 4, 5, 6],
        dirty_pages: 7,
        copied_extents: 8,
    };
    let verify = Command::Verify { first: PageIndex(256), count: 3, epoch: 4 };
    vec![
        ("zygote-spawn", encode(&ToZygote::Spawn { worker: 1, uid: 2 })),
        ("zygote-ready", encode(&FromZygote::Ready)),
        ("zygote-spawned", encode(&FromZygote::Spawned { worker: 1, pid: 3 })),
        ("zygote-not-spawned", encode(&FromZygote::NotSpawned { worker: 1, errno: 11 })),
        ("zygote-exited", encode(&FromZygote::Exited { worker: 1, how: Exit::Signal(9) })),
        ("zygote-failed", encode(&FromZygote::Failed(failure()))),
        ("build", encode(&ToWorker::Build { class, is_awaited: true })),
        ("layers", encode(&ToWorker::Layers)),
        ("fork", encode(&ToWorker::Fork { id: id(), image: postcard::to_stdvec(&image).expect("valid") })),
        ("boot-probe", encode(&ToWorker::BootProbe { id: id() })),
        ("freeze", encode(&ToWorker::Freeze)),
        ("pause", encode(&ToWorker::Pause)),
        ("resume", encode(&ToWorker::Resume)),
        ("probe", encode(&ToWorker::Probe { vcpu: 1, command: verify })),
        ("stop-probe", encode(&ToWorker::StopProbe { vcpu: 1 })),
        ("console", encode(&ToWorker::Console)),
        (
            "fork-watched",
            encode(&ToWorker::ForkWatched {
                id: id(),
                image: vec![1, 2],
                arriving: vec![(0, 0), (1, 2)],
                is_alone: false,
                keeps_watch: true,
            }),
        ),
        ("freeze-pages", encode(&ToWorker::FreezePages)),
        ("let-go", encode(&ToWorker::LetGo)),
        ("touched", encode(&ToWorker::Touched)),
        ("connect", encode(&ToWorker::Connect { port: 1024 })),
        ("plug", encode(&ToWorker::Plug)),
        (
            "boot-linux",
            encode(&ToWorker::BootLinux {
                id: id(),
                start: Start { entry: GuestAddress(1 << 24), boot_params: GuestAddress(0x7000) },
            }),
        ),
        ("touches", encode(&FromWorker::Touched(vec![WorkingSetRun { region: 1, start: ExtentIndex(2), count: 3 }]))),
        ("has-let-go", encode(&FromWorker::HasLetGo)),
        ("watched", encode(&FromWorker::Watched { starts: vec![1 << 45] })),
        ("built", encode(&FromWorker::Built { took_ns: 1 })),
        ("running", encode(&FromWorker::Running { received_ns: 1, first_ns: 2, map_ns: 3, restore_ns: 4 })),
        ("failed", encode(&FromWorker::Failed(failure()))),
        ("frozen", encode(&FromWorker::Frozen(Box::new(frozen)))),
        ("not-frozen", encode(&FromWorker::NotFrozen(failure()))),
        ("done", encode(&FromWorker::Done)),
        ("answer", encode(&FromWorker::Answer { vcpu: 0, answer: Ok([1, 2, 3, 4]) })),
        ("no-answer", encode(&FromWorker::Answer { vcpu: 0, answer: Err(failure()) })),
        ("printed", encode(&FromWorker::Console { bytes: b"hello".to_vec(), dropped: 1 })),
        ("ended", encode(&FromWorker::Ended { reason: Reason::Oom, detail: "numbers".into(), console: b"last".to_vec() })),
    ]
}
