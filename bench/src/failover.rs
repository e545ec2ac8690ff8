//! Row C4: three real nodes on loopback, of which the one that leads is killed. How long until another one leads and answers a
//! linearizable read, and until the dead one is given up, which is when its tasks are placed anew.

use std::net::UdpSocket;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::report::{Report, Row, Samples};
use crate::{daemon, http};

pub(crate) const NODES: usize = 3;
/// Nothing here takes so long.
const PATIENCE: Duration = Duration::from_secs(240);
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// How many are killed.
const LEADERS: usize = 20;
const FOLLOWERS: usize = 5;

pub(crate) struct Nodes {
    program: PathBuf,
    directory: tempfile::TempDir,
    addresses: Vec<String>,
    running: Vec<Option<Child>>,
}

impl Drop for Nodes {
    fn drop(&mut self) {
        for child in self.running.iter_mut().flatten() {
            // They are this bench's own, and have nothing to lose.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Nodes {
    pub(crate) fn start(program: PathBuf) -> Result<Self> {
        let free = || Ok(UdpSocket::bind("127.0.0.1:0")?.local_addr()?.to_string());
        let addresses: Vec<String> = (0..NODES).map(|_| free()).collect::<Result<_>>()?;
        let mut nodes =
            Self { program, directory: tempfile::tempdir()?, addresses, running: (0..NODES).map(|_| None).collect() };
        let address = nodes.addresses[0].clone();
        nodes.offline(0, &["cluster", "init", "--name", "node-0", "--advertise", &address])?;
        nodes.run(0)?;
        for index in 1..NODES {
            let name = format!("node-{index}");
            let token = eventually("a token", || {
                let body = format!(r#"{{"name":"{name}","role":"voter"}}"#);
                Ok(nodes.ask(0, "POST", "/v1/cluster/tokens", &body).ok())
            })?;
            let token = token["token"].as_str().context("no token")?.to_owned();
            nodes.offline(index, &["cluster", "join", &token])?;
            nodes.run(index)?;
        }
        nodes.settle()?;
        Ok(nodes)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.env("FARFORK_CA_PASSPHRASE_FILE", self.directory.path().join("passphrase"));
        command.env("FARFORK_LOG", "error").stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    fn data(&self, index: usize) -> PathBuf {
        self.directory.path().join(format!("data-{index}"))
    }

    pub(crate) fn socket(&self, index: usize) -> PathBuf {
        self.directory.path().join(format!("{index}.sock"))
    }

    fn offline(&self, index: usize, arguments: &[&str]) -> Result<()> {
        let status = self.command().args(arguments).arg("--data").arg(self.data(index)).status()?;
        ensure!(status.success(), "{arguments:?} ended with {status}");
        Ok(())
    }

    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Of those that run.
    pub(crate) fn pids(&self) -> impl Iterator<Item = u32> {
        self.running.iter().flatten().map(Child::id)
    }

    pub(crate) fn run(&mut self, index: usize) -> Result<()> {
        let mut command = self.command();
        command.arg("node").arg("--data").arg(self.data(index)).arg("--socket").arg(self.socket(index));
        self.running[index] = Some(command.arg("--listen").arg(&self.addresses[index]).spawn()?);
        Ok(())
    }

    pub(crate) fn kill(&mut self, index: usize) -> Result<()> {
        let mut child = self.running[index].take().context("it does not run")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    pub(crate) fn ask(&self, index: usize, verb: &str, path: &str, body: &str) -> Result<Value> {
        let mut connection = UnixStream::connect(self.socket(index))?;
        connection.set_read_timeout(Some(PATIENCE))?;
        http::json(&http::request(&mut connection, verb, path, body)?)
    }

    /// Waits until all are up, and vote.
    pub(crate) fn settle(&self) -> Result<()> {
        let all = |node: &Value| node["life"] == "up" && node["votes"] == true;
        let is_whole =
            |list: &Value| list["nodes"].as_array().is_some_and(|nodes| nodes.len() == NODES && nodes.iter().all(all));
        eventually("all nodes are up and vote", || {
            let at = self.running.iter().position(Option::is_some).context("none runs")?;
            Ok(self.ask(at, "GET", "/v1/cluster", "").ok().filter(is_whole).map(drop))
        })
    }

    pub(crate) fn leader(&self, at: usize) -> Result<usize> {
        let list = self.ask(at, "GET", "/v1/cluster", "")?;
        let leader = list["nodes"].as_array().and_then(|nodes| nodes.iter().find(|node| node["id"] == list["leader"]));
        let name = leader.and_then(|node| node["name"].as_str()).context("no leader")?;
        Ok(name.strip_prefix("node-").context("a name")?.parse()?)
    }
}

pub(crate) fn eventually<T>(what: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let began = Instant::now();
    loop {
        if let Some(seen) = look()? {
            return Ok(seen);
        }
        if began.elapsed() > PATIENCE {
            bail!("not within {PATIENCE:?}: {what}");
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

pub(crate) fn run(report: &mut Report, program: Option<&Path>) -> Result<()> {
    let mut nodes = Nodes::start(daemon::program(program)?)?;
    let (mut answered, mut given_up, mut follower) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..LEADERS {
        let leader = nodes.leader(0)?;
        let at = (leader + 1) % NODES;
        let name = format!("node-{leader}");
        let killed = Instant::now();
        nodes.kill(leader)?;
        let list = eventually("another one leads", || Ok(nodes.ask(at, "GET", "/v1/cluster", "").ok()))?;
        answered.push(killed.elapsed());
        ensure!(list["nodes"].as_array().is_some_and(|nodes| nodes.len() == NODES), "a node is missing: {list}");
        given_up.push(nodes.time_to_give_up(at, &name, killed)?);
        nodes.run(leader)?;
        nodes.settle()?;
    }
    for _ in 0..FOLLOWERS {
        let leader = nodes.leader(0)?;
        let (at, other) = (leader, (leader + 1) % NODES);
        let killed = Instant::now();
        nodes.kill(other)?;
        follower.push(nodes.time_to_give_up(at, &format!("node-{other}"), killed)?);
        nodes.run(other)?;
        nodes.settle()?;
    }
    let (answered, given_up, follower) = (Samples::of(&answered), Samples::of(&given_up), Samples::of(&follower));
    report.keep("C4 new leader", &answered);
    report.keep("C4 given up, of a leader", &given_up);
    report.keep("C4 given up, of a follower", &follower);
    let within = |samples: &Samples, seconds: f64| samples.percentile(99) <= seconds * 1e6;
    let is_met = within(&answered, 4.0);
    report.add(
        Row::new("C4", "leader killed, until a linearizable read is answered", &answered, None).reaching("p99 <= 4 s", is_met),
    );
    let is_met = within(&given_up, 23.0);
    report.add(
        Row::new("C4", "leader killed, until it is given up and its tasks can be placed", &given_up, None)
            .reaching("<= 23 s", is_met),
    );
    let is_met = within(&follower, 18.0);
    report.add(Row::new("C4", "the same of a node that does not lead", &follower, None).reaching("<= 18 s", is_met));
    report.note("C4: no control: what others take is said by them (about 20 s, some 6 min).");
    Ok(())
}

impl Nodes {
    fn time_to_give_up(&self, at: usize, name: &str, since: Instant) -> Result<Duration> {
        eventually("it is given up", || {
            let list = self.ask(at, "GET", "/v1/cluster?stale=true", "")?;
            let nodes = list["nodes"].as_array().context("no nodes")?;
            let is_lost = nodes.iter().any(|node| node["name"] == *name && node["life"] == "lost");
            Ok(is_lost.then(|| since.elapsed()))
        })
    }
}
