//! Whatever stands in for a good input is refused with a typed error of one line, and what to do about it in another.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use types::manifest::{HeadError, ManifestError};
use types::profile::Difference;
use types::unit::MemorySizeError;
use types::{Digest, GuestAddress, Head, MemorySize, RegionKind};
use vm::class::VcpuCountError;
use vm::harness::{class, count, held, host, parent, seed};
use vm::host::HostError;
use vm::image::load::LoadErrorKind;
use vm::image::{LoadError, load, save};
use vm::machine::state::StateError;
use vm::probe::{self, Probe};
use vm::shell::BuildError;
use vm::{Class, Host, Image, Shell};

const HEAD_AT: usize = 4096;

fn quiet(_: u64, _: u64) {}

/// A saved image of 4 MiB with 40 pages of data.
struct Saved {
    directory: tempfile::TempDir,
    path: PathBuf,
    bytes: Vec<u8>,
    digest: Digest,
}

impl Saved {
    fn new(host: &Host) -> Self {
        let mut parent = parent(host, class(4, 1));
        Probe::of(&parent).fill(probe::first_work_page(), 40, 1).unwrap();
        let image = parent.freeze(host).unwrap().image;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let digest = save(&image, &path, quiet).unwrap().digest;
        let bytes = fs::read(&path).unwrap();
        Self { directory, path, bytes, digest }
    }

    /// Loads these bytes in its place.
    fn load(&self, host: &Host, bytes: &[u8]) -> Result<Arc<Image>, LoadError> {
        let path = self.directory.path().join("changed");
        fs::write(&path, bytes).unwrap();
        load(host, &path, quiet)
    }

    fn head(&self) -> Head {
        let len = u32::from_le_bytes(self.bytes[12..16].try_into().unwrap()) as usize;
        Head::decode(&self.bytes[HEAD_AT..HEAD_AT + len], self.digest).unwrap()
    }

    /// The file with another head, as somebody would write it who can compute digests.
    fn with_head_bytes(&self, frame: &[u8]) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes[12..16].copy_from_slice(&u32::try_from(frame.len()).unwrap().to_le_bytes());
        bytes[16..48].copy_from_slice(Digest::of(frame).as_bytes());
        bytes[HEAD_AT..HEAD_AT + (64 << 10)].fill(0);
        bytes[HEAD_AT..HEAD_AT + frame.len()].copy_from_slice(frame);
        bytes
    }

    fn with_head(&self, change: impl FnOnce(&mut Head)) -> Vec<u8> {
        let mut head = self.head();
        change(&mut head);
        self.with_head_bytes(&head.encode().unwrap())
    }
}

fn kind(result: Result<Arc<Image>, LoadError>) -> LoadErrorKind {
    let error = result.unwrap_err();
    assert!(!error.to_string().contains('\n'), "one line of cause: {error}");
    assert!(!error.remedy().is_empty() && !error.remedy().contains('\n'), "one line of remedy: {error}");
    *error.kind
}

#[test]
fn an_image_cut_short_at_any_offset_is_refused() {
    let host = host();
    let saved = Saved::new(&host);
    let path = saved.directory.path().join("cut");
    let file = File::create(&path).unwrap();
    file.write_all_at(&saved.bytes, 0).unwrap();
    let mut dice = fastrand::Rng::with_seed(seed());
    // From the end down, since a shorter file is made from a longer one. In `quick`, some of the offsets.
    let step = |len: u64| if count(0, 1) == 1 || len < 5000 { 1 } else { dice_step(&mut dice) };
    let lengths = lengths_down_from(saved.bytes.len() as u64, step);
    for len in &lengths {
        file.set_len(*len).unwrap();
        let error = kind(load(&host, &path, quiet));
        match len {
            0..4096 => assert!(matches!(error, LoadErrorKind::NotAnImage), "{len}: {error}"),
            _ => assert!(matches!(error, LoadErrorKind::Shrank | LoadErrorKind::Length { .. }), "{len}: {error}"),
        }
    }
    held("lengths at which a cut image is refused", lengths.len() as u64);
}

fn dice_step(dice: &mut fastrand::Rng) -> u64 {
    dice.u64(1..3000)
}

fn lengths_down_from(end: u64, mut step: impl FnMut(u64) -> u64) -> Vec<u64> {
    let mut lengths = Vec::new();
    let mut len = end;
    while len > 0 {
        len -= step(len).min(len);
        lengths.push(len);
    }
    lengths
}

/// Every byte that matters is covered by a digest; a change in what does not (padding, holes) changes nothing that is loaded.
#[test]
fn a_damaged_image_is_refused_or_loads_as_it_was() {
    let host = host();
    let saved = Saved::new(&host);
    let mut dice = fastrand::Rng::with_seed(seed());
    let path = saved.directory.path().join("damaged");
    fs::write(&path, &saved.bytes).unwrap();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    let head_end = HEAD_AT + u32::from_le_bytes(saved.bytes[12..16].try_into().unwrap()) as usize;
    let rounds = count(400, 5000);
    let (mut refused, mut same) = (0, 0);
    for round in 0..rounds {
        let at = match round % 4 {
            0 => dice.usize(0..48),
            1 => dice.usize(HEAD_AT..head_end),
            _ => dice.usize(0..saved.bytes.len()),
        };
        let damaged = saved.bytes[at] ^ 1 << dice.u32(0..8);
        file.write_all_at(&[damaged], at as u64).unwrap();
        match load(&host, &path, quiet) {
            Ok(image) => {
                assert!(at >= head_end, "a changed byte {at} of the head goes unnoticed");
                assert_eq!(image.digest(), Some(saved.digest));
                let child = vm::harness::child(&host, &image);
                assert_eq!(Probe::of(&child).verify(probe::first_work_page(), 40, 1).unwrap(), None);
                same += 1;
            }
            Err(_) => refused += 1,
        }
        file.write_all_at(&[saved.bytes[at]], at as u64).unwrap();
    }
    assert!(refused > rounds / 2 && same > 0, "{refused} refused, {same} the same");
    held("damaged images refused", refused);
}

#[test]
fn a_changed_extent_is_found_in_the_copy() {
    let host = host();
    let saved = Saved::new(&host);
    let mut bytes = saved.bytes.clone();
    let at = bytes.len() - (4 << 20) + usize::try_from(probe::first_work_page().byte_offset()).unwrap() + 17;
    bytes[at] ^= 0x80;
    assert!(matches!(kind(saved.load(&host, &bytes)), LoadErrorKind::Extent { region: 0, extent, .. } if extent.0 == 16));
}

#[test]
fn foreign_and_future_images_are_refused_before_anything_is_allocated() {
    let host = host();
    let saved = Saved::new(&host);
    let refused = |bytes: &[u8]| kind(saved.load(&host, bytes));

    let mut future = saved.bytes.clone();
    future[8] = 9;
    assert!(matches!(refused(&future), LoadErrorKind::UnknownVersion { version: 9 }));
    let len = u32::from_le_bytes(saved.bytes[12..16].try_into().unwrap()) as usize;
    let mut frame = saved.bytes[HEAD_AT..HEAD_AT + len].to_vec();
    frame[8] = 9;
    let error = refused(&saved.with_head_bytes(&frame));
    assert!(matches!(error, LoadErrorKind::Head(HeadError::UnknownVersion { version: 9 })), "{error}");

    let foreign = |change: fn(&mut types::CpuProfile)| match refused(&saved.with_head(|head| change(&mut head.cpu))) {
        LoadErrorKind::ForeignCpu(foreign) => foreign.difference,
        other => panic!("{other}"),
    };
    assert_eq!(foreign(|cpu| cpu.vendor = "AuthenticAMD".to_owned() + &cpu.vendor), Difference::Model);
    assert_eq!(foreign(|cpu| cpu.cpuid = Digest::of(b"other")), Difference::Features);
    assert_eq!(foreign(|cpu| cpu.tsc_khz *= 2), Difference::TscRate);

    let error = refused(&saved.with_head(|head| head.vcpu_count = 2));
    assert!(matches!(error, LoadErrorKind::VcpuCount { state: 1, head: 2 }), "{error}");
    let error = refused(&saved.with_head(|head| head.vcpu_count = 9));
    assert!(matches!(error, LoadErrorKind::Class(VcpuCountError { asked: 9 })), "{error}");
    let error = refused(&saved.with_head(|head| {
        head.regions[0].kind = RegionKind::Ram(GuestAddress(4 << 30));
        head.identity_page = None;
    }));
    assert!(matches!(error, LoadErrorKind::Layout(_)), "{error}");
}

/// The sum of the regions and where they start are right; how large each is, is not.
#[test]
fn regions_of_the_right_sum_and_the_wrong_sizes_are_refused() {
    let host = host();
    if host.check_memory(MemorySize::from_mib(4096).unwrap()).is_err() {
        println!("skipped: this host has less than 4 GiB");
        return;
    }
    let saved = Saved::new(&host);
    let region = |start: u64, gib: u32| {
        let map = types::ExtentMap::from_data(gib << 14, &[], types::LayerIndex(0));
        let digests = vec![Digest::ZERO_CONTENT; (gib << 14) as usize];
        let hash_pages = types::manifest::hash_page_digests(&digests);
        types::RegionHead { kind: RegionKind::Ram(GuestAddress(start)), map, hash_pages }
    };
    let error = kind(saved.load(&host, &saved.with_head(|head| head.regions = vec![region(0, 1), region(4 << 30, 3)])));
    assert!(matches!(error, LoadErrorKind::Layout(_)), "{error}");
}

#[test]
fn a_machine_state_that_lies_is_refused() {
    let host = host();
    let saved = Saved::new(&host);
    let state = |change: &dyn Fn(&mut Vec<u8>)| match kind(saved.load(&host, &saved.with_head(|head| change(&mut head.state))))
    {
        LoadErrorKind::State(error) => error,
        other => panic!("{other}"),
    };
    assert!(matches!(state(&|state| state[0] = 9), StateError::UnknownVersion { version: 9 }));
    assert!(matches!(state(&|state| state[1] += 1), StateError::ForeignLayout));
    assert!(matches!(state(&|state| state.push(0)), StateError::TrailingBytes { bytes: 1 }));
    assert!(matches!(state(&Vec::clear), StateError::Malformed { .. }));
    assert!(matches!(state(&|state| state.truncate(state.len() / 2)), StateError::Malformed { .. }));
    // Whatever bytes it has: a typed refusal, or a state with which KVM is asked and may refuse.
    let mut dice = fastrand::Rng::with_seed(seed());
    for _ in 0..count(200, 3000) {
        let bytes = saved.with_head(|head| {
            let at = dice.usize(0..head.state.len());
            head.state[at] = dice.u8(..);
        });
        if let Ok(image) = saved.load(&host, &bytes) {
            let forked = Shell::build(&host, image.class()).unwrap().fork(&image, vm::harness::new_id());
            if let Err(error) = forked {
                assert!(!error.remedy().is_empty(), "{error}");
            }
        }
    }
}

#[test]
fn zeros_that_are_none_are_refused() {
    let host = host();
    let saved = Saved::new(&host);
    // The last 2 MiB are a zero run; a hash page that gives its last extent a digest is consistent with its head.
    let hash_page_at = HEAD_AT + (64 << 10);
    let extents = 64;
    let mut bytes = saved.bytes.clone();
    bytes[hash_page_at + (extents - 1) * 32] = 1;
    let digest = Digest::of(&bytes[hash_page_at..hash_page_at + extents * 32]);
    let mut head = saved.head();
    head.regions[0].hash_pages[0] = digest;
    let frame = head.encode().unwrap();
    let patched = Saved { bytes, directory: tempfile::tempdir().unwrap(), path: saved.path.clone(), digest: saved.digest };
    let error = kind(patched.load(&host, &patched.with_head_bytes(&frame)));
    assert!(
        matches!(error, LoadErrorKind::Manifest(ManifestError::NotZero { region: 0, extent }) if extent.0 == 63),
        "{error}"
    );
    // Without the head's consent it is a damaged hash page.
    let error = kind(patched.load(&host, &patched.bytes.clone()));
    assert!(matches!(error, LoadErrorKind::HashPage { region: 0, page: 0, .. }), "{error}");
}

#[test]
fn what_is_no_image_file_is_refused_without_hanging() {
    let host = host();
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let refused = |path: &Path| kind(load(&host, path, quiet));
    assert!(matches!(refused(&path("missing")), LoadErrorKind::Open(_)));
    assert!(matches!(refused(directory.path()), LoadErrorKind::NotAFile));
    assert!(matches!(refused(Path::new("/dev/zero")), LoadErrorKind::NotAFile));
    rustix::fs::mknodat(rustix::fs::CWD, path("fifo"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    assert!(matches!(refused(&path("fifo")), LoadErrorKind::NotAFile));
    fs::write(path("empty"), b"").unwrap();
    assert!(matches!(refused(&path("empty")), LoadErrorKind::NotAnImage));
    fs::write(path("text"), vec![b'x'; 100_000]).unwrap();
    assert!(matches!(refused(&path("text")), LoadErrorKind::NotAnImage));
    fs::write(path("\u{1F980} name"), b"").unwrap();
    assert!(matches!(refused(&path("\u{1F980} name")), LoadErrorKind::NotAnImage));
}

#[test]
fn a_file_that_changes_while_it_is_loaded_is_noticed() {
    let host = host();
    let saved = Saved::new(&host);
    let path = saved.directory.path().join("changing");
    let while_loading = |change: &dyn Fn(&File)| {
        fs::write(&path, &saved.bytes).unwrap();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        kind(load(&host, &path, |done, _| {
            if done == 2 {
                change(&file);
            }
        }))
    };
    assert!(matches!(while_loading(&|file| file.set_len(100_000).unwrap()), LoadErrorKind::Shrank));
    let last_data = saved.bytes.len() as u64 - (4 << 20) + probe::first_work_page().byte_offset();
    let error = while_loading(&|file| file.write_all_at(&[0; 4096], last_data).unwrap());
    assert!(matches!(error, LoadErrorKind::Extent { .. }), "{error}");
}

#[test]
fn a_load_without_memory_leaves_nothing() {
    let host = host();
    let saved = Saved::new(&host);
    for point in ["memfd.create", "memfd.allocate", "memfd.seal"] {
        let armed = vm::failpoint::arm(point, 0, 12);
        let error = kind(load(&host, &saved.path, quiet));
        drop(armed);
        assert!(matches!(error, LoadErrorKind::Memory(_)), "{point}: {error}");
    }
    let armed = vm::failpoint::arm("load.read", 3, 5);
    assert!(matches!(kind(load(&host, &saved.path, quiet)), LoadErrorKind::Read(_)));
    drop(armed);
    assert!(load(&host, &saved.path, quiet).is_ok());
}

/// Runs only as the child process of the test below, as a user who may not open the device.
#[test]
fn stranger_who_opens_the_host() {
    if std::env::var_os("FARFORK_TEST_STRANGER").is_some() {
        let error = Host::open().unwrap_err();
        assert!(matches!(error, HostError::Forbidden { path: "/dev/kvm" }), "{error}");
        assert_eq!(error.to_string(), "/dev/kvm may not be opened by this user");
        assert!(error.remedy().contains("group that owns it"));
        println!("was refused");
    }
}

#[test]
fn a_user_without_permission_is_told_what_to_do() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    let mode = fs::metadata("/dev/kvm").unwrap().permissions().mode();
    if !rustix::process::geteuid().is_root() || mode & 0o006 != 0 {
        println!("skipped: becoming a user who may not open /dev/kvm needs root, and a device that is not for all");
        return;
    }
    // A copy that the stranger can reach, wherever the build directory is.
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let binary = directory.path().join("tests");
    fs::copy(std::env::current_exe().unwrap(), &binary).unwrap();
    let output = std::process::Command::new(&binary)
        .args(["--exact", "bad_input::stranger_who_opens_the_host", "--nocapture"])
        .env("FARFORK_TEST_STRANGER", "1")
        .current_dir("/")
        .gid(65534)
        .uid(65534)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("was refused"), "{text}");
}

#[test]
fn sizes_that_no_machine_has_are_refused() {
    assert_eq!(MemorySize::from_mib(0).unwrap_err(), MemorySizeError::Zero);
    assert!(matches!(MemorySize::from_bytes((3 << 20) + 4096).unwrap_err(), MemorySizeError::Odd { .. }));
    let host = host();
    let largest = MemorySize::from_bytes(MemorySize::MAX).unwrap();
    if host.check_memory(largest).is_ok() {
        println!("skipped: this host has more than 32 GiB");
    } else {
        let error = Shell::build(&host, Class::new(largest, 1).unwrap()).unwrap_err();
        assert!(matches!(error, BuildError::Host(HostError::MemoryBeyondHost { .. })), "{error}");
        assert_eq!(error.remedy(), "ask for less, or use a larger host");
    }
    let smallest = MemorySize::from_mib(2).unwrap();
    for vcpus in [0, 9, 255] {
        let error = Class::new(smallest, vcpus).unwrap_err();
        assert_eq!((error.asked, error.remedy()), (vcpus, "ask for 1 to 8"));
    }
}
