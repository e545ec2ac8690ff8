//! Rows between two nodes that run already, on hosts that are really apart: those that take neither links of one's own nor nodes
//! that are started anew.
//!
//! The image is made by a guest of the first node, since its disk may be another host's. Nodes have to be built with `--features
//! farfork/bench`, trust one another, and have no other work.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use types::PAGE_SIZE;

use super::bed::Site;
use super::bytes::{counts, in_mib, mib, ratio};
use super::workload::{WorkingSet, written};
use crate::daemon::Daemon;
use crate::report::{Report, Row, Samples, announce};

/// Where a node listens, and the socket of its API.
#[derive(Clone, Debug)]
pub(super) struct Given {
    address: SocketAddr,
    socket: PathBuf,
}

pub(super) fn given(text: &str) -> Result<Given, String> {
    let (address, socket) = text.split_once('=').ok_or("HOST:PORT=SOCKET, the socket being that of its API")?;
    let found = address.to_socket_addrs().map_err(|error| format!("{address}: {error}"))?.next();
    Ok(Given { address: found.ok_or_else(|| format!("{address} has no address"))?, socket: socket.into() })
}

pub(super) fn run(report: &mut Report, holder: &Given, runner: &Given, quick: bool) -> Result<()> {
    let [mut here, mut there] = [site(holder)?, site(runner)?];
    let outcome = measure(report, (holder, &mut here), (runner, &mut there), quick);
    // Somebody else's nodes: nothing is left on them, whatever happened.
    for site in [&mut here, &mut there] {
        site.kill_all()?;
    }
    outcome
}

fn measure(
    report: &mut Report,
    (holder, here): (&Given, &mut Site),
    (runner, there): (&Given, &mut Site),
    quick: bool,
) -> Result<()> {
    let size = if quick { 256 } else { 1024 };
    report.note(format!("between {} and {}, which ran already; {size} MiB", holder.address, runner.address));
    announce(&format!("making an image of {size} MiB"));
    let (image, digest) = here.make(size)?;
    let set = WorkingSet::of(size)?;
    let n = if quick { 3 } else { 20 };
    let before = there.stages("farfork_fault_seconds")?;
    announce("R8: faults with and without a record");
    let cold = counts(&[faults(there, here, &digest, &set)?]);
    forget(there, &digest)?;
    let recorded: Vec<u64> = (0..n)
        .map(|_| {
            let faults = faults(there, here, &digest, &set)?;
            forget(there, &digest)?;
            Ok(faults)
        })
        .collect::<Result<_>>()?;
    let recorded = counts(&recorded);

    announce("R1, R2, R3: remote forks until they run, are done, and are settled");
    let mut took = Took::default();
    for _ in 0..n {
        here.await_shell_or_fork(&image, size)?;
        let local = here.fork(&image, 1)?;
        here.kill_all()?;
        there.await_shell(size)?;
        let began = Instant::now();
        let forked = here.fork_on(&image, there.address)?;
        there.touch(&forked.ids[0], &set)?;
        took.complete.push(began.elapsed());
        ensure!(local.had_shell && forked.had_shell, "a shell that was ready was not used");
        took.local.push(local.wall);
        took.local_first.extend(local.first_us);
        took.first.push(forked.wall);
        forget(there, &digest)?;
        // The copy: its first child touches nothing until all is there.
        there.await_shell(size)?;
        let opened = there.open(&digest, &[here.address], 1)?.image;
        took.settled.push(there.settled(&opened)?);
        took.bytes.push(there.here(&opened)?.wire_bytes);
        there.await_shell(size)?;
        let one_more = there.fork(&opened, 1)?;
        took.one_more.push(one_more.wall);
        took.one_more_first.extend(one_more.first_us);
        let began = Instant::now();
        there.touch(&one_more.ids[0], &set)?;
        took.work.push(began.elapsed());
        forget(there, &digest)?;
    }

    let stages = there.stages("farfork_fault_seconds")?;
    here.daemon.ask("DELETE", &format!("/v1/images/{image}"), "")?;

    took.report(report, size)?;
    report.keep("R8 faults, cold", &cold);
    let met = recorded.p50() <= 0.1 * cold.p50();
    let what = "faults until the working set is done, recorded, work begun at once; beside the first, beside its stream";
    report.add(Row::new("R8", what, &recorded, Some(cold.p50())).in_unit("faults").reaching("<= 0.1x", met));
    for stage in ["uffd_read", "queue", "wire", "verify", "publish", "wake", "total"] {
        let mean = Samples::from_us(vec![stages.mean_us_since(&before, stage)]);
        report.add(Row::new(
            "R7",
            format!("faults of all that, beside replay and stream: mean of the pager's stage {stage}"),
            &mean,
            None,
        ));
    }
    Ok(())
}

#[derive(Default)]
struct Took {
    local: Vec<Duration>,
    local_first: Vec<f64>,
    first: Vec<Duration>,
    complete: Vec<Duration>,
    /// The full copy, and what follows it.
    settled: Vec<Duration>,
    one_more: Vec<Duration>,
    one_more_first: Vec<f64>,
    work: Vec<Duration>,
    bytes: Vec<u64>,
}

impl Took {
    fn report(self, report: &mut Report, size: u64) -> Result<()> {
        let copies: Vec<[Duration; 2]> = (0..self.settled.len())
            .map(|number| {
                let first = self.settled[number] + self.one_more[number];
                [first, first + self.work[number]]
            })
            .collect();
        let of = |which: usize| Samples::of(&copies.iter().map(|copy| copy[which]).collect::<Vec<_>>());
        let (copy_first, copy_complete) = (of(0), of(1));
        let [local, first, complete] = [&self.local, &self.first, &self.complete].map(|took| Samples::of(took));
        let [local_first, one_more] = [self.local_first, self.one_more_first].map(Samples::from_us);
        for (what, samples) in [
            ("local fork", &local),
            ("remote fork, first", &first),
            ("remote fork, complete", &complete),
            ("full copy, then first", &copy_first),
            ("full copy, then complete", &copy_complete),
            ("one more child, to first", &one_more),
            ("local fork, to first", &local_first),
            ("bytes until settled", &counts(&self.bytes)),
        ] {
            report.keep(what, samples);
        }
        let what =
            "fork on the other node, nothing open there: as its own node timed it; beside 3 local forks, no round trips added";
        let met = first.p50() <= 3.0 * local.p50();
        report.add(Row::new("R1", what, &first, Some(3.0 * local.p50())).reaching("<= 1x", met));
        let to_first = copy_first.p50() / first.p50();
        let row = Row::new(
            "R2",
            "the same; beside a full copy by the node (nothing else going on), and a fork",
            &first,
            Some(copy_first.p50()),
        );
        report.add(row.reaching(format!("copy >= 20x ({to_first:.1}x)"), to_first >= 20.0));
        let to_complete = copy_complete.p50() / complete.p50();
        let row =
            Row::new("R2", "working set done, as recorded before; beside the full copy", &complete, Some(copy_complete.p50()));
        report.add(row.reaching(format!("copy >= 3x ({to_complete:.2}x)"), to_complete >= 3.0));
        let (data, wire) = (written(size)?.1 * PAGE_SIZE, self.bytes.iter().copied().max().context("a settled image")?);
        let row = Row::new("R3", "bytes of extents until settled; beside those not zero", &mib(wire), Some(in_mib(data)));
        report.add(row.in_mib().reaching("<= 1.02x", ratio(wire, data) <= 1.02));
        let what = "one more child where all has arrived, to first; beside one of the image's own node";
        let row = Row::new("R4", what, &one_more, Some(local_first.p50()));
        report.add(row.reaching("<= 1.2x", one_more.p50() <= 1.2 * local_first.p50()));
        Ok(())
    }
}

fn site(given: &Given) -> Result<Site> {
    let daemon = Daemon::attach(&given.socket)?;
    let mut site = Site::of(daemon, given.address)?;
    let machines = site.daemon.ask("GET", "/v1/machines", "")?;
    let is_idle = machines["machines"].as_array().is_some_and(Vec::is_empty);
    ensure!(is_idle, "{} runs machines: it has to be idle, since all are killed", given.address);
    Ok(site)
}

/// A child that works at once: how often it has waited for memory.
fn faults(there: &mut Site, here: &Site, digest: &str, set: &WorkingSet) -> Result<u64> {
    let forked = there.open(digest, &[here.address], 1)?;
    there.touch(&forked.ids[0], set)?;
    Ok(there.here(&forked.image)?.faults)
}

fn forget(there: &mut Site, digest: &str) -> Result<()> {
    let image = there.only_image_of(digest)?;
    there.close(&image)
}
