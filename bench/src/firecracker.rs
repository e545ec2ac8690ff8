//! The control that people know: Firecracker's `snapshot/load`, on this machine, in this run.
//!
//! Guest: 512 MiB, one vCPU that halts. A sample is one new Firecracker process: from before its start until it has answered
//! that the snapshot is loaded and its guest resumed. (It has no cheaper way to fork; there is nothing to keep warm.)

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::http;
use crate::report::Samples;

const PATIENCE: Duration = Duration::from_secs(60);
const LOAD_ADDRESS: u64 = 0x10_0000;
/// hlt; jmp back
const CODE: [u8; 3] = [0xF4, 0xEB, 0xFD];

/// Takes `n` samples with the Firecracker at `binary`.
pub(crate) fn snapshot_loads(binary: &Path, n: usize) -> Result<Samples> {
    let directory = Directory::new()?;
    make_snapshot(binary, &directory).context("making the snapshot for the Firecracker control")?;
    let load = format!(
        r#"{{"snapshot_path":"{}","mem_backend":{{"backend_path":"{}","backend_type":"File"}},"resume_vm":true}}"#,
        directory.path("state").display(),
        directory.path("memory").display()
    );
    let mut samples = Vec::with_capacity(n);
    for _ in 0..n {
        let started = Instant::now();
        let mut process = Process::start(binary, &directory)?;
        process.request("PUT", "/snapshot/load", &load)?;
        samples.push(started.elapsed());
        let state = process.request("GET", "/", "")?;
        ensure!(state.contains(r#""state":"Running""#), "Firecracker loaded a snapshot that does not run: {state}");
    }
    Ok(Samples::of(&samples))
}

fn make_snapshot(binary: &Path, directory: &Directory) -> Result<()> {
    fs::write(directory.path("kernel"), kernel())?;
    let mut process = Process::start(binary, directory)?;
    process.request("PUT", "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":512}"#)?;
    let kernel = format!(r#"{{"kernel_image_path":"{}"}}"#, directory.path("kernel").display());
    process.request("PUT", "/boot-source", &kernel)?;
    process.request("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#)?;
    process.request("PATCH", "/vm", r#"{"state":"Paused"}"#)?;
    let create = format!(
        r#"{{"snapshot_type":"Full","snapshot_path":"{}","mem_file_path":"{}"}}"#,
        directory.path("state").display(),
        directory.path("memory").display()
    );
    process.request("PUT", "/snapshot/create", &create)?;
    Ok(())
}

/// The smallest kernel that Firecracker loads: an ELF file with one segment.
fn kernel() -> Vec<u8> {
    const HEADER: u64 = 64;
    const PROGRAM_HEADER: u64 = 56;
    let code_at = HEADER + PROGRAM_HEADER;
    let mut elf = vec![0x7F, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    elf.extend(2u16.to_le_bytes()); // executable
    elf.extend(62u16.to_le_bytes()); // x86-64
    elf.extend(1u32.to_le_bytes());
    elf.extend(LOAD_ADDRESS.to_le_bytes()); // entry
    elf.extend(HEADER.to_le_bytes()); // program headers
    elf.extend(0u64.to_le_bytes()); // no sections
    elf.extend(0u32.to_le_bytes());
    for field in [64u16, 56, 1, 64, 0, 0] {
        elf.extend(field.to_le_bytes());
    }
    elf.extend(1u32.to_le_bytes()); // PT_LOAD
    elf.extend(7u32.to_le_bytes()); // read, write, execute
    for field in [code_at, LOAD_ADDRESS, LOAD_ADDRESS, CODE.len() as u64, CODE.len() as u64, 0x1000] {
        elf.extend(field.to_le_bytes());
    }
    elf.extend(CODE);
    elf
}

/// A directory that goes with the run.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("farfork-bench-{}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("creating {}", path.display()))?;
        Ok(Self(path))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap_or_default();
    }
}

/// A Firecracker process and its API.
struct Process {
    child: Child,
    api: UnixStream,
}

impl Process {
    fn start(binary: &Path, directory: &Directory) -> Result<Self> {
        let socket = directory.path("api");
        fs::remove_file(&socket).unwrap_or_default();
        let mut child = Command::new(binary)
            .arg("--api-sock")
            .arg(&socket)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("starting {}", binary.display()))?;
        let started = Instant::now();
        loop {
            if let Ok(api) = UnixStream::connect(&socket) {
                api.set_read_timeout(Some(PATIENCE))?;
                return Ok(Self { child, api });
            }
            if let Some(status) = child.try_wait()? {
                bail!("{} ended with {status}", binary.display());
            }
            ensure!(started.elapsed() < PATIENCE, "{} does not open its API", binary.display());
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    fn request(&mut self, verb: &str, path: &str, body: &str) -> Result<String> {
        http::request(&mut self.api, verb, path, body)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().unwrap_or_default();
        self.child.wait().map(drop).unwrap_or_default();
    }
}
