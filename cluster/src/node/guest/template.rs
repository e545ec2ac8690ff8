//! Building a template: a machine is booted, warmed up, sealed in its agent's gate, and frozen.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use agent::protocol::{Exec, Exit, FromAgent, GateRules, ToAgent};
use serde::{Deserialize, Serialize};
use types::MemorySize;

use super::network::Link;
use super::talk::{Talk, TalkError, nonsense};
use super::{guest_error, identity};
use crate::node::engine::{EngineError, ErrorKind};

/// What a template is built from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuildOrder {
    /// `vmlinux` or `bzImage`.
    pub kernel: PathBuf,
    /// The initial RAM disk with the agent.
    pub initrd: PathBuf,
    /// An ext4 file system, which the disk begins with.
    pub rootfs: PathBuf,
    /// RAM.
    pub memory: MemorySize,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// The disk; `None`: as large as the file system.
    pub disk: Option<MemorySize>,
    /// Whether it has a network card, which is plugged in while it is warmed up.
    pub network: bool,
    /// Added to the kernel's command line.
    pub kernel_arguments: String,
    /// What makes it warm.
    pub warm: WarmUp,
    /// What it may have when it is sealed.
    pub rules: GateRules,
    /// How long each stage in the guest may take.
    pub deadline: Duration,
}

/// What makes a template warm. Commands are for the guest's shell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WarmUp {
    /// Run to its end, or, with `ready`, left running.
    pub command: Option<String>,
    /// Tried until it succeeds.
    pub ready: Option<String>,
    /// The main process, which answers requests in children.
    pub main: Option<String>,
}

/// A part of building a template.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Kernel and root file system are read into memory.
    Load,
    /// The guest boots, until its agent answers.
    Boot,
    /// What makes it warm runs.
    Warm,
    /// It is looked through, and stopped in its gate.
    Gate,
    /// It is frozen.
    Freeze,
    /// A first child is forked, and what it touches until it is ready is recorded: the next host fetches that ahead.
    Record,
    /// The image is hashed and written to the store.
    Save,
}

/// How long a stage took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageTime {
    /// Which.
    pub stage: Stage,
    /// How long.
    pub took: Duration,
}

/// How often an agent that does not listen yet is tried again.
const BOOT_ROUND: Duration = Duration::from_millis(250);
/// How often a template is asked whether it is ready.
const READY_ROUND: Duration = Duration::from_secs(1);
/// How long the agent may take to greet: far more than it does, far less than booting.
const GREETING: Duration = Duration::from_secs(20);
/// How much output of a warm-up that failed stands in the error.
const OUTPUT_TAIL: usize = 2048;

/// A machine that is being made a template, as the engine gives it.
pub trait Parent {
    /// A stream to the agent's port.
    ///
    /// # Errors
    /// [`EngineError`] if the machine has ended.
    fn connect(&self) -> Result<UnixStream, EngineError>;
    /// Whether it has ended, as an error that says how.
    ///
    /// # Errors
    /// [`EngineError`] if it has.
    fn check(&self, step: &str) -> Result<(), EngineError>;
    /// What it printed.
    fn console(&self) -> Vec<u8>;
}

/// Waits until the agent answers.
///
/// # Errors
/// [`EngineError`] if the machine ends, or does not get there in time.
pub fn wait_for_agent(parent: &dyn Parent, deadline: Duration) -> Result<(), EngineError> {
    let started = Instant::now();
    loop {
        parent.check("booting")?;
        match Talk::begin(connect(parent, "booting")?, GREETING) {
            Ok(_) => return Ok(()),
            Err(error @ TalkError::OtherVersion { .. }) => return Err(guest_error("booting", &error, &parent.console())),
            Err(_) if started.elapsed() < deadline => std::thread::sleep(BOOT_ROUND),
            Err(_) => {
                parent.check("booting")?;
                let error = TalkError::Late { deadline };
                return Err(guest_error("booting", &error, &parent.console()));
            }
        }
    }
}

/// A machine that has ended meanwhile says so with what it printed.
fn connect(parent: &dyn Parent, step: &str) -> Result<UnixStream, EngineError> {
    parent.connect().or_else(|error| {
        parent.check(step)?;
        Err(error)
    })
}

/// Gives its network card an address.
///
/// # Errors
/// [`EngineError`].
pub fn set_address(parent: &dyn Parent, link: Link, deadline: Duration) -> Result<(), EngineError> {
    let address = ToAgent::Address(identity::address(link));
    talk(parent, "setting its address", deadline, |talk| talk.ask_done(&address))
}

/// Makes it warm.
///
/// # Errors
/// [`EngineError`].
pub fn warm_up(parent: &dyn Parent, order: &BuildOrder) -> Result<(), EngineError> {
    let WarmUp { command, ready, main } = &order.warm;
    if let Some(command) = command {
        let is_left_running = ready.is_some();
        run(parent, "warming up", command, is_left_running, order.deadline)?;
    }
    if let Some(main) = main {
        let program = shell(main, false);
        talk(parent, "starting the main process", order.deadline, |talk| talk.ask_done(&ToAgent::StartMain(program.clone())))?;
    }
    if let Some(ready) = ready {
        let started = Instant::now();
        while let Err(error) = run(parent, "waiting until it is ready", ready, false, order.deadline) {
            parent.check("waiting until it is ready")?;
            if started.elapsed() > order.deadline {
                return Err(error);
            }
            std::thread::sleep(READY_ROUND);
        }
    }
    Ok(())
}

/// Stops it in its gate.
///
/// # Errors
/// [`EngineError`] of kind [`ErrorKind::Guest`] that says what must not be sealed.
pub fn close_gate(parent: &dyn Parent, rules: GateRules, deadline: Duration) -> Result<(), EngineError> {
    let found = talk(parent, "sealing", deadline, |talk| match talk.exchange(&ToAgent::Gate(rules))? {
        FromAgent::Gated { found } => Ok(found),
        other => Err(nonsense(&other)),
    })?;
    if found.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = found.iter().take(32).map(|line| line.chars().take(256).collect()).collect();
    Err(EngineError {
        kind: ErrorKind::Guest,
        message: format!("every child would have what must not be shared:\n  {}", list.join("\n  ")),
        remedy: "take it out of the image or the warm-up; or say --allow-secrets or --allow-connections".to_owned(),
    })
}

fn shell(command: &str, is_detached: bool) -> Exec {
    let arguments = ["/bin/sh", "-c", command].map(str::to_owned).to_vec();
    Exec { arguments, is_detached, ..Exec::default() }
}

fn run(parent: &dyn Parent, step: &str, command: &str, is_detached: bool, deadline: Duration) -> Result<(), EngineError> {
    let mut output = Vec::new();
    let exit = talk(parent, step, deadline, |talk| {
        let mut said = talk.exchange(&ToAgent::Exec(shell(command, is_detached)))?;
        loop {
            match said {
                FromAgent::Stdout(bytes) | FromAgent::Stderr(bytes) => {
                    output.extend(bytes);
                    let excess = output.len().saturating_sub(OUTPUT_TAIL);
                    output.drain(..excess);
                }
                FromAgent::Exited(exit) => return Ok(exit),
                FromAgent::Started { .. } => return Ok(Exit::Status(0)),
                other => return Err(nonsense(&other)),
            }
            said = talk.hear()?;
        }
    })?;
    if exit == Exit::Status(0) {
        return Ok(());
    }
    let how = match exit {
        Exit::Status(status) => format!("ended with status {status}"),
        Exit::Signal(signal) => format!("was ended by signal {signal}"),
    };
    let said = String::from_utf8_lossy(&output);
    let message = format!("{step}: `{command}` {how}; it said:\n  {}", said.trim_end().replace('\n', "\n  "));
    Err(EngineError { kind: ErrorKind::Guest, message, remedy: "correct the command, and build again".to_owned() })
}

/// A conversation whose failure says what the guest printed.
fn talk<T>(
    parent: &dyn Parent,
    step: &str,
    deadline: Duration,
    converse: impl FnOnce(&mut Talk) -> Result<T, TalkError>,
) -> Result<T, EngineError> {
    let outcome = Talk::begin(connect(parent, step)?, deadline).and_then(|mut talk| converse(&mut talk));
    outcome.or_else(|error| {
        parent.check(step)?;
        Err(guest_error(step, &error, &parent.console()))
    })
}
