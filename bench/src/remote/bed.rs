//! Nodes in network namespaces, and what the rows have them do.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use chaos::network::Network;
use chaos::relay::{Config, Impairment, Relay};
use serde_json::{Value, json};

use super::workload::{Images, WorkingSet};
use crate::daemon::Daemon;
use crate::http;

/// How long telling may take.
const TELLING: Duration = Duration::from_secs(1);
/// Where nodes listen.
const PORT: u16 = 7117;
/// Rows that wait for something say that it does not come after so long.
pub(super) const PATIENCE: Duration = Duration::from_secs(600);
/// The pager looks every second for images that nobody needs any more; then it closes them.
const CLOSING: Duration = Duration::from_millis(1300);

/// Hosts in a network, and what nodes are made of.
pub(super) struct Bed {
    pub(super) network: Network,
    pub(super) images: Images,
    program: PathBuf,
}

impl Bed {
    pub(super) fn new(hosts: usize, program: &Path) -> Result<Self> {
        let network = Network::new("bench", hosts).map_err(|error| anyhow::anyhow!("{error}; {}", error.remedy()))?;
        Ok(Self { network, images: Images::new()?, program: program.to_owned() })
    }

    /// A node on a host.
    pub(super) fn site(&self, host: usize, more: &[&str]) -> Result<Site> {
        self.site_of(host, self.command(host)?, more)
    }

    /// One that publishes what comes without looking whether it is the image's.
    pub(super) fn site_that_verifies_nothing(&self, host: usize, more: &[&str]) -> Result<Site> {
        let mut command = self.command(host)?;
        command.env("FARFORK_TEST_WITHOUT", "verification");
        self.site_of(host, command, more)
    }

    fn site_of(&self, host: usize, command: std::process::Command, more: &[&str]) -> Result<Site> {
        let address = SocketAddr::new(self.network.host(host).address(), PORT);
        let daemon = Daemon::start(command, options(address, more))?;
        Site::of(daemon, address)
    }

    /// The node of a site that was killed, again.
    pub(super) fn again(&self, host: usize, site: Site, more: &[&str]) -> Result<Site> {
        let address = site.address;
        Site::of(site.daemon.restart(self.command(host)?, options(address, more))?, address)
    }

    /// Sites on hosts 0 and up that trust one another.
    pub(super) fn sites<const N: usize>(&self, more: [&[&str]; N]) -> Result<[Site; N]> {
        let mut sites: Vec<Site> = more.iter().enumerate().map(|(host, more)| self.site(host, more)).collect::<Result<_>>()?;
        befriend(&mut sites)?;
        sites.try_into().map_err(|_| anyhow::anyhow!("as many sites as options"))
    }

    /// Limits the links of the first hosts.
    pub(super) fn set_rate(&self, hosts: usize, mbit: Option<u64>) -> Result<()> {
        (0..hosts).try_for_each(|host| Ok(self.network.set_rate(host, mbit.map(|mbit| mbit * 1_000_000))?))
    }

    /// A way to a host that takes `delay` longer there and back.
    pub(super) fn relay(&self, host: usize, upstream: SocketAddr, delay: Duration) -> Result<Relay> {
        let each_way = Impairment { delay: delay / 2, ..Impairment::default() };
        self.impaired(host, upstream, each_way)
    }

    /// A way to a host on which both directions are impaired.
    pub(super) fn impaired(&self, host: usize, upstream: SocketAddr, both: Impairment) -> Result<Relay> {
        let listen = SocketAddr::new(self.network.host(host).address(), 0);
        let config = Config { listen, upstream, seed: 7, to_upstream: both, to_client: both };
        Ok(self.network.host(host).run_in(|| Relay::start(config))?)
    }

    /// What is on a host of an image came since its link had received `before` bytes: it was not there already.
    pub(super) fn ensure_new(&self, host: usize, before: u64, here: &Here) -> Result<()> {
        let received = self.received_bytes(host)? - before;
        ensure!(here.wire_bytes <= received, "the image was there before: {received} bytes came, and it says {here:?}");
        Ok(())
    }

    /// Bytes that the host has received on its link, with all headers; those of datagrams that were sent in one go count once.
    pub(super) fn received_bytes(&self, host: usize) -> Result<u64> {
        let output = self.network.host(host).command("cat").arg("/proc/net/dev").output()?;
        let text = String::from_utf8(output.stdout)?;
        let line = text.lines().find_map(|line| line.trim().strip_prefix("eth0:")).context("no interface eth0")?;
        let numbers: Vec<u64> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        Ok(*numbers.first().context("bytes received")?)
    }

    fn command(&self, host: usize) -> Result<std::process::Command> {
        Ok(self.network.host(host).command(self.program.to_str().context("a path in UTF-8")?))
    }
}

fn options(address: SocketAddr, more: &[&str]) -> Vec<String> {
    let own = ["--listen".to_owned(), address.to_string()];
    own.into_iter().chain(more.iter().map(|option| (*option).to_owned())).collect()
}

/// Lets each of the sites read the others' images.
pub(super) fn befriend(sites: &mut [Site]) -> Result<()> {
    let certificates: Vec<String> = sites.iter().map(|site| site.certificate.clone()).collect();
    for (number, site) in sites.iter_mut().enumerate() {
        for (_, certificate) in certificates.iter().enumerate().filter(|(other, _)| *other != number) {
            site.trust(certificate)?;
        }
    }
    Ok(())
}

/// A node, as the rows use it.
pub(super) struct Site {
    pub(super) daemon: Daemon,
    /// Where other nodes reach it.
    pub(super) address: SocketAddr,
    pub(super) certificate: String,
}

/// The stages of a fork, in order.
pub(super) const STAGES: [&str; 5] = ["shell", "send", "map", "restore", "run"];

/// Children that run.
pub(super) struct Children {
    pub(super) ids: Vec<String>,
    /// Their image, on the node that was asked.
    pub(super) image: String,
    /// From the request until its answer was read, by the clock of who asked.
    pub(super) took: Duration,
    /// What the node that was asked says of that: without the way to its API.
    pub(super) wall: Duration,
    /// What the node that runs them says: from the call of its engine to the first instruction, in microseconds.
    pub(super) first_us: Vec<f64>,
    /// How that time was spent, of the first child: the stages of [`STAGES`], in microseconds.
    pub(super) stages_us: [f64; 5],
    pub(super) had_shell: bool,
}

/// What of an image is on a node.
#[derive(Clone, Copy, Debug)]
pub(super) struct Here {
    pub(super) data_bytes: u64,
    pub(super) resident_bytes: u64,
    pub(super) wire_bytes: u64,
    pub(super) faults: u64,
    pub(super) settled_after: Option<Duration>,
    pub(super) is_settled: bool,
}

impl Site {
    pub(super) fn of(mut daemon: Daemon, address: SocketAddr) -> Result<Self> {
        let own = daemon.ask("GET", "/v1/trust/own", "")?;
        let certificate = text(&own["pem"])?;
        Ok(Self { daemon, address, certificate })
    }

    pub(super) fn trust(&mut self, certificate: &str) -> Result<()> {
        self.daemon.ask("POST", "/v1/trust", &json!({ "certificate": certificate }).to_string())?;
        Ok(())
    }

    /// Loads an image of so many MiB, half of them written: its id here, and its digest.
    pub(super) fn load(&mut self, images: &Images, mib: u64) -> Result<(String, String)> {
        let directory = self.daemon.directory().context("a node of this process")?;
        let name = images.put(mib, &directory.join("data/images"))?;
        let loaded = self.daemon.ask("POST", "/v1/images/load", &json!({ "name": name }).to_string())?;
        let id = text(&loaded["id"])?;
        let hashed = self.daemon.ask("POST", &format!("/v1/images/{id}/digest"), "")?;
        Ok((id, text(&hashed["digest"])?))
    }

    /// Makes an image of so many MiB, half of them written, by a guest of this node: its id here, and its digest.
    pub(super) fn make(&mut self, mib: u64) -> Result<(String, String)> {
        let parent = self.order(&json!({ "from": { "guest": "probe" }, "memory_bytes": mib << 20 }))?;
        self.touch(&parent.ids[0], &WorkingSet::written_by(mib)?)?;
        let id = self.order(&json!({ "from": { "machine": parent.ids[0] } }))?.image;
        let hashed = self.daemon.ask("POST", &format!("/v1/images/{id}/digest"), "")?;
        self.kill_all()?;
        Ok((id, text(&hashed["digest"])?))
    }

    /// Forks an image that is here.
    pub(super) fn fork(&mut self, image: &str, count: u64) -> Result<Children> {
        self.order(&json!({ "from": { "image": image }, "count": count }))
    }

    /// Forks an image of this site on another node.
    pub(super) fn fork_on(&mut self, image: &str, on: SocketAddr) -> Result<Children> {
        self.order(&json!({ "from": { "image": image }, "on": on.to_string() }))
    }

    /// Opens an image that others hold, by forking from it.
    pub(super) fn open(&mut self, digest: &str, holders: &[SocketAddr], count: u64) -> Result<Children> {
        let holders: Vec<String> = holders.iter().map(ToString::to_string).collect();
        self.order(&json!({ "from": { "remote": { "image": digest, "holders": holders } }, "count": count }))
    }

    fn order(&mut self, order: &Value) -> Result<Children> {
        let (connection, order) = (self.daemon.connection()?, order.to_string());
        let began = Instant::now();
        let answer = http::request(connection, "POST", "/v1/forks", &order)?;
        let took = began.elapsed();
        let answer = http::json(&answer)?;
        ensure!(answer["failures"].as_array().is_some_and(Vec::is_empty), "not all children run: {answer}");
        let children = answer["children"].as_array().context("children")?;
        Ok(Children {
            ids: children.iter().map(|child| text(&child["id"])).collect::<Result<_>>()?,
            image: text(&answer["image"]["id"])?,
            took,
            wall: Duration::from_micros(answer["wall_us"].as_u64().context("wall_us")?),
            first_us: children.iter().map(|child| child["first_us"].as_f64().context("first_us")).collect::<Result<_>>()?,
            stages_us: STAGES.map(|stage| answer["children"][0]["stages_us"][stage].as_f64().unwrap_or(f64::NAN)),
            had_shell: children.iter().all(|child| child["had_shell"] == true),
        })
    }

    /// Has a child touch a working set, and checks what it read: how long each command took, in microseconds.
    pub(super) fn touch(&mut self, child: &str, set: &WorkingSet) -> Result<Vec<f64>> {
        touch_by(self.daemon.connection()?, child, set)
    }

    /// The same by many children at once.
    pub(super) fn touch_all(&self, children: &[String], set: &WorkingSet) -> Result<()> {
        let one = |child: &String| -> Result<()> {
            let mut connection = self.daemon.connect()?;
            touch_by(&mut connection, child, set).map(drop)
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = children.iter().map(|child| scope.spawn(move || one(child))).collect();
            threads.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
        })
    }

    /// What of an image is here.
    pub(super) fn here(&mut self, image: &str) -> Result<Here> {
        let answer = self.daemon.ask("GET", &format!("/v1/images/{image}"), "")?;
        let here = &answer["residency"];
        let number = |name: &str| here[name].as_u64().with_context(|| format!("no {name}: {answer}"));
        ensure!(here["failed"].is_null(), "the image failed: {answer}");
        Ok(Here {
            data_bytes: number("data_bytes")?,
            resident_bytes: number("resident_bytes")?,
            wire_bytes: number("wire_bytes")?,
            faults: number("faults")?,
            settled_after: here["settled_after_us"].as_u64().map(Duration::from_micros),
            is_settled: here["is_settled"] == true,
        })
    }

    /// Waits until all of an image is here: how long that took since it was opened.
    pub(super) fn settled(&mut self, image: &str) -> Result<Duration> {
        let began = Instant::now();
        loop {
            let here = self.here(image)?;
            if let (true, Some(after)) = (here.is_settled, here.settled_after) {
                return Ok(after);
            }
            if began.elapsed() > PATIENCE {
                bail!("the image does not settle: {here:?}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for a shell of a class.
    pub(super) fn await_shell(&mut self, mib: u64) -> Result<()> {
        let began = Instant::now();
        loop {
            let node = self.daemon.ask("GET", "/v1/node", "")?;
            let is_ready = |pool: &Value| pool["memory_bytes"].as_u64() == Some(mib << 20) && pool["ready"].as_u64() > Some(0);
            if node["pool"].as_array().is_some_and(|pools| pools.iter().any(is_ready)) {
                // The builder goes to sleep before the clock starts, as in a node that is not just refilling.
                std::thread::sleep(Duration::from_millis(5));
                return Ok(());
            }
            ensure!(began.elapsed() < PATIENCE, "no shell of {mib} MiB is built: {node}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for a shell of an image's class; forks once, so that the pool knows of the class, if it does not.
    pub(super) fn await_shell_or_fork(&mut self, image: &str, mib: u64) -> Result<()> {
        let node = self.daemon.ask("GET", "/v1/node", "")?;
        let is_of_class = |pool: &Value| pool["memory_bytes"].as_u64() == Some(mib << 20);
        if !node["pool"].as_array().is_some_and(|pools| pools.iter().any(is_of_class)) {
            self.fork(image, 1)?;
            self.kill_all()?;
        }
        self.await_shell(mib)
    }

    /// The only image that this node has.
    pub(super) fn only_image(&mut self) -> Result<String> {
        let answer = self.daemon.ask("GET", "/v1/images", "")?;
        match answer["images"].as_array().map(Vec::as_slice) {
            Some([image]) => text(&image["id"]),
            _ => bail!("not one image: {answer}"),
        }
    }

    /// The image of that name that this node has.
    pub(super) fn only_image_of(&mut self, digest: &str) -> Result<String> {
        let answer = self.daemon.ask("GET", "/v1/images", "")?;
        let images = answer["images"].as_array().context("images")?;
        let found: Vec<&Value> = images.iter().filter(|image| image["digest"] == digest).collect();
        match found[..] {
            [image] => text(&image["id"]),
            _ => bail!("not one image {digest}: {answer}"),
        }
    }

    pub(super) fn kill_all(&mut self) -> Result<()> {
        self.daemon.ask("POST", "/v1/machines/kill", r#"{"all":true}"#)?;
        Ok(())
    }

    /// Forgets an image that others hold, so that it has to be opened again.
    pub(super) fn close(&mut self, image: &str) -> Result<()> {
        self.kill_all()?;
        self.daemon.ask("DELETE", &format!("/v1/images/{image}"), "")?;
        std::thread::sleep(CLOSING);
        Ok(())
    }

    /// Bytes of extents that were given to other nodes so far.
    pub(super) fn served_bytes(&mut self) -> Result<u64> {
        let text = http::request(self.daemon.connection()?, "GET", "/metrics", "")?;
        let served = text.lines().find_map(|line| line.strip_prefix("farfork_page_bytes_total{kind=\"served\"} "));
        Ok(served.context("no counter of bytes served")?.trim().parse()?)
    }

    /// Seconds and number of what a histogram of the node has counted so far, by stage.
    pub(super) fn stages(&mut self, histogram: &str) -> Result<Stages> {
        let text = http::request(self.daemon.connection()?, "GET", "/metrics", "")?;
        let mut stages = Stages::default();
        for line in text.lines() {
            let Some((name, rest)) = line.split_once("{stage=\"") else { continue };
            let Some((stage, value)) = rest.split_once("\"} ") else { continue };
            let value: f64 = value.trim().parse().unwrap_or(0.0);
            match name.strip_prefix(histogram) {
                Some("_sum") => stages.0.entry(stage.to_owned()).or_default().0 = value,
                Some("_count") => stages.0.entry(stage.to_owned()).or_default().1 = value,
                _ => {}
            }
        }
        Ok(stages)
    }
}

/// Seconds and number, by stage.
#[derive(Default)]
pub(super) struct Stages(BTreeMap<String, (f64, f64)>);

impl Stages {
    /// The mean of a stage in microseconds, over what was counted after `before`.
    pub(super) fn mean_us_since(&self, before: &Self, stage: &str) -> f64 {
        let of = |stages: &Self| stages.0.get(stage).copied().unwrap_or_default();
        let ((sum, count), (sum_before, count_before)) = (of(self), of(before));
        (sum - sum_before) * 1e6 / (count - count_before).max(1.0)
    }
}

/// Waits until the holders of an image that was opened then know what children have touched so far: they are told after 2, 12 and 72
/// seconds.
pub(super) fn await_told(opened: Instant) {
    let touched = opened.elapsed();
    let told = [2, 12, 72].into_iter().map(Duration::from_secs).find(|told| touched < *told);
    std::thread::sleep(told.map_or(Duration::ZERO, |told| told + TELLING - touched));
}

/// Has a child touch a working set, and checks what it read.
pub(super) fn touch_by(connection: &mut UnixStream, child: &str, set: &WorkingSet) -> Result<Vec<f64>> {
    let body = serde_json::to_string(&set.commands)?;
    let answer = http::request(connection, "POST", &format!("/v1/machines/{child}/probe"), &body)
        .context("if there is no such route: build the program with --features farfork/bench")?;
    let answer = http::json(&answer)?;
    let answers = answer.as_array().context("an answer a command")?;
    ensure!(answers.len() == set.commands.len(), "{} answers to {} commands", answers.len(), set.commands.len());
    let check = |(answer, expected): (&Value, &(u64, u64))| -> Result<f64> {
        let found = (answer["reply"][0].as_u64(), answer["reply"][1].as_u64());
        ensure!(found == (Some(expected.0), Some(expected.1)), "a child's memory is not its image: {answer}, not {expected:?}");
        answer["took_us"].as_f64().context("took_us")
    };
    answers.iter().zip(&set.expected).map(check).collect()
}

fn text(value: &Value) -> Result<String> {
    Ok(value.as_str().with_context(|| format!("no text: {value}"))?.to_owned())
}
