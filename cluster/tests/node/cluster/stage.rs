//! Hosts of a cluster: each in a network namespace of its own when root, otherwise all on loopback.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use chaos::network::Network;
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::support::{Node, PROGRAM, Said, eventually};

/// See the module.
pub(super) struct Cluster {
    network: Network,
    ports: Vec<u16>,
    nodes: Vec<Option<Node>>,
    /// Of nodes that do not run.
    directories: Vec<Option<TempDir>>,
    passphrase: TempDir,
    /// By how many seconds each host's clock is off, when a program is started there.
    clocks: Vec<i64>,
    /// What is on the command line of every node.
    pub(super) always: Vec<String>,
}

/// A disk that is unmounted with the test.
pub(super) struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    /// Takes all of its room.
    pub(super) fn fill(&self) {
        let mut file = std::fs::File::create(self.0.join("fill")).unwrap();
        while std::io::Write::write_all(&mut file, &[1; 4096]).is_ok() {}
    }

    pub(super) fn make_room(&self) {
        std::fs::remove_file(self.0.join("fill")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a node that was just killed may still have it open.
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

impl Cluster {
    /// Nodes that have all joined: `node-0` and so on, of which the first so many vote.
    pub(super) fn new(name: &str, nodes: usize, voters: usize) -> Self {
        let mut cluster = Self::apart(name, nodes);
        cluster.begin(0);
        for index in 1..nodes {
            cluster.admit(index, index < voters);
        }
        cluster.settles(nodes, voters);
        cluster
    }

    /// The same, of which only the engines are fakes.
    pub(super) fn of_fakes(name: &str, nodes: usize, voters: usize) -> Self {
        let mut cluster = Self::apart(name, nodes);
        cluster.always = vec!["--fake-engine".to_owned(), "opens_all=1".to_owned()];
        cluster.begin(0);
        for index in 1..nodes {
            cluster.admit(index, index < voters);
        }
        cluster.settles(nodes, voters);
        cluster
    }

    /// Hosts without nodes.
    pub(super) fn apart(name: &str, hosts: usize) -> Self {
        let network = Network::new(name, hosts).unwrap();
        if let Some(why) = network.why_shared() {
            println!("all hosts are on loopback: {why}");
        }
        let port = |host: usize| {
            let address = (network.host(host).address(), 0);
            network.host(host).run_in(|| std::net::UdpSocket::bind(address).unwrap().local_addr().unwrap().port())
        };
        let ports = (0..hosts).map(port).collect();
        let directories = (0..hosts).map(|_| Some(tempfile::tempdir().unwrap())).collect();
        let nodes = (0..hosts).map(|_| None).collect();
        Self {
            network,
            ports,
            nodes,
            directories,
            passphrase: tempfile::tempdir().unwrap(),
            clocks: vec![0; hosts],
            always: Vec::new(),
        }
    }

    pub(super) fn is_isolated(&self) -> bool {
        self.network.is_isolated()
    }

    pub(super) fn address(&self, host: usize) -> String {
        format!("{}:{}", self.network.host(host).address(), self.ports[host])
    }

    pub(super) fn node(&self, host: usize) -> &Node {
        self.nodes[host].as_ref().unwrap_or_else(|| panic!("node {host} does not run"))
    }

    /// The command line on a host whose node does not run, about its data directory.
    pub(super) fn offline(&self, host: usize, arguments: &[&str]) -> Said {
        let directory = self.directories[host].as_ref().unwrap_or_else(|| panic!("node {host} runs"));
        Said::of(self.command(host).args(arguments).arg("--data").arg(directory.path().join("data")).output().unwrap())
    }

    fn command(&self, host: usize) -> Command {
        let mut command = self.network.host(host).command(PROGRAM);
        command.env("FARFORK_CA_PASSPHRASE_FILE", self.passphrase.path().join("passphrase")).stdin(Stdio::null());
        command.env("FARFORK_TEST_CLOCK_SECONDS", self.clocks[host].to_string());
        command
    }

    /// Does something from a host.
    pub(super) fn run_on<T: Send>(&self, host: usize, what: impl FnOnce() -> T + Send) -> T {
        self.network.host(host).run_in(what)
    }

    /// Some program, on a host.
    pub(super) fn program(&self, host: usize, program: &str) -> Command {
        self.network.host(host).command(program)
    }

    pub(super) fn host_address(&self, host: usize) -> std::net::IpAddr {
        self.network.host(host).address()
    }

    /// What is started on a host from now on has a clock that is so many seconds off.
    pub(super) fn set_clock(&mut self, host: usize, seconds: i64) {
        self.clocks[host] = seconds;
    }

    pub(super) fn directory(&self, host: usize) -> &std::path::Path {
        self.directories[host].as_ref().unwrap_or_else(|| panic!("node {host} runs")).path()
    }

    pub(super) fn begin(&mut self, host: usize) {
        let name = format!("node-{host}");
        let said = self.offline(host, &["cluster", "init", "--name", &name, "--advertise", &self.address(host)]);
        assert_eq!(said.code, Some(0), "{said:?}");
        self.start(host);
        eventually("it leads", || self.node(host).cli(&["node", "ls"]).code == Some(0));
    }

    /// Lets a host's node in, and starts it.
    pub(super) fn admit(&mut self, host: usize, votes: bool) {
        let token = self.token(0, &format!("node-{host}"), votes);
        let said = self.offline(host, &["cluster", "join", &token]);
        assert_eq!(said.code, Some(0), "{said:?}");
        self.start(host);
    }

    pub(super) fn token(&self, at: usize, name: &str, votes: bool) -> String {
        let mut arguments = vec!["cluster", "token", name];
        arguments.extend(votes.then_some("--voter"));
        let said = self.node(at).cli(&arguments);
        assert_eq!(said.code, Some(0), "{said:?}");
        said.out.trim().to_owned()
    }

    pub(super) fn start(&mut self, host: usize) {
        self.start_with(host, &[]);
    }

    /// Starts a host's node with more on its command line.
    pub(super) fn start_with(&mut self, host: usize, more: &[&str]) {
        let directory = self.directories[host].take().unwrap_or_else(|| panic!("node {host} runs"));
        let address = self.address(host);
        let always: Vec<&str> = self.always.iter().map(String::as_str).collect();
        let arguments = [&["--listen", &address], &always[..], more].concat();
        self.nodes[host] = Some(Node::start_by(self.command(host), directory, &arguments));
    }

    /// Does something where a host's node is reached from.
    pub(super) fn run_in<T: Send>(&self, host: usize, work: impl FnOnce() -> T + Send) -> T {
        self.network.host(host).run_in(work)
    }

    /// Waits until a node that was told to has ended.
    pub(super) fn wait(&mut self, host: usize) {
        let mut node = self.nodes[host].take().unwrap_or_else(|| panic!("node {host} does not run"));
        node.wait();
        self.directories[host] = Some(node.crash());
    }

    /// Ends a node as a crash would.
    pub(super) fn crash(&mut self, host: usize) {
        let node = self.nodes[host].take().unwrap_or_else(|| panic!("node {host} does not run"));
        self.directories[host] = Some(node.crash());
    }

    pub(super) fn signal(&self, host: usize, signal: Signal) {
        self.node(host).signal(signal);
    }

    /// Whether a host reaches the others.
    pub(super) fn set_link(&mut self, host: usize, is_up: bool) {
        self.network.set_link(host, is_up).unwrap();
    }

    /// From now on nothing that a host sends to another arrives, or again everything; what comes the other way does.
    pub(super) fn set_one_way(&self, from: usize, to: usize, arrives: bool) {
        let verb = if arrives { "del" } else { "add" };
        let to = self.network.host(to).address().to_string();
        let said = self.network.host(from).command("ip").args(["route", verb, "blackhole", &to]).output().unwrap();
        assert!(said.status.success(), "{said:?}");
    }

    /// Puts a host's data directory on a disk of its own with so many bytes, before it is used.
    pub(super) fn on_small_disk(&self, host: usize, size: &str) -> SmallDisk {
        let path = self.directory(host).join("data");
        std::fs::create_dir(&path).unwrap();
        let said = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size},mode=700"), "farfork-test"])
            .arg(&path)
            .output();
        let said = said.unwrap();
        assert!(said.status.success(), "{said:?}");
        SmallDisk(path)
    }

    pub(super) fn list(&self, at: usize, stale: bool) -> Option<Value> {
        let arguments = ["node", "ls", "--output=json", "--stale"];
        let said = self.node(at).cli(if stale { &arguments } else { &arguments[..3] });
        (said.code == Some(0)).then(|| serde_json::from_str(&said.out).unwrap())
    }

    /// Which host leads, as this one knows.
    pub(super) fn leader(&self, at: usize) -> Option<usize> {
        let list = self.list(at, false)?;
        let leader = list["leader"].as_str()?;
        let nodes = list["nodes"].as_array()?;
        let name = nodes.iter().find(|node| node["id"] == leader)?["name"].as_str()?;
        name.strip_prefix("node-")?.parse().ok()
    }

    /// Waits until so many nodes are up, and so many votes count.
    pub(super) fn settles(&self, up: usize, votes: usize) {
        let at = self.nodes.iter().position(Option::is_some).unwrap();
        eventually(&format!("{up} nodes are up, and {votes} vote"), || {
            let Some(list) = self.list(at, false) else { return false };
            let nodes = list["nodes"].as_array().unwrap();
            let count = |key: &str, value: Value| nodes.iter().filter(|node| node[key] == value).count();
            count("life", "up".into()) == up && count("votes", true.into()) == votes
        });
    }

    /// What a node is, as another one knows.
    pub(super) fn row(&self, at: usize, host: usize) -> Value {
        let list = self.list(at, false).unwrap_or_default();
        let name = format!("node-{host}");
        let rows = list["nodes"].as_array().cloned().unwrap_or_default();
        rows.into_iter().find(|row| row["name"] == *name).unwrap_or_default()
    }

    /// Starts a guest on a host, and makes its image a template.
    pub(super) fn template(&self, host: usize, name: &str) {
        let node = self.node(host);
        let forked = node.json(&["fork", "--guest", "probe", "--memory", "16MiB"]);
        let image = forked["image"]["id"].as_str().unwrap().to_owned();
        node.json(&["image", "save", &image, name]);
        node.json(&["kill", forked["children"][0]["id"].as_str().unwrap()]);
    }

    /// How long it takes until a node answers with a majority's word, counted from `since`.
    pub(super) fn time_to_answer(&self, at: usize, since: Instant) -> Duration {
        eventually("a majority is there", || self.node(at).cli(&["node", "ls"]).code == Some(0));
        since.elapsed()
    }
}
