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
    let size = if quick { 256 } else { 1024 };
    report.note(format!("between {} and {}, which ran already; {size} MiB", holder.address, runner.address));
    announce(&format!("making an image of {size} MiB"));
    let (image, digest) = here.make(size)?;
    let set = WorkingSet::of(size)?;
    let n = if quick { 3 } else { 20 };
    announce("R8: faults with and without a record");
    let cold = counts(&[faults(&mut there, &here, &digest, &set)?]);
    forget(&mut there, &digest)?;
    let recorded: Vec<u64> = (0..n)
        .map(|_| {
            let faults = faults(&mut there, &here, &digest, &set)?;
            forget(&mut there, &digest)?;
            Ok(faults)
        })
        .collect::<Result<_>>()?;
    let recorded = counts(&recorded);

    announce("R1, R2, R3: remote forks until they run, are done, and are settled");
    let mut took = Took::default();
    for _ in 0..n {
        here.await_shell_or_fork(&image, size)?;
        took.local.push(here.fork(&image, 1)?.took);
        here.kill_all()?;
        there.await_shell(size)?;
        let began = Instant::now();
        let forked = here.fork_on(&image, there.address)?;
        took.first.push(forked.took);
        there.touch(&forked.ids[0], &set)?;
        took.complete.push(began.elapsed());
        let opened = there.only_image_of(&digest)?;
        took.settled.push(there.settled(&opened)?);
        took.bytes.push(there.here(&opened)?.wire_bytes);
        there.await_shell(size)?;
        let one_more = there.fork(&opened, 1)?;
        took.one_more.push(one_more.took);
        let began = Instant::now();
        there.touch(&one_more.ids[0], &set)?;
        took.work.push(began.elapsed());
        forget(&mut there, &digest)?;
    }

    announce("R7: faults and their stages");
    let singles = WorkingSet::singles_from_the_end(size, if quick { 50 } else { 200 })?;
    let before = there.stages("farfork_fault_seconds")?;
    let forked = there.open(&digest, &[here.address], 1)?;
    let touches = Samples::from_us(there.touch(&forked.ids[0], &singles)?);
    let stages = there.stages("farfork_fault_seconds")?;
    forget(&mut there, &digest)?;
    here.kill_all()?;

    took.report(report, size)?;
    report.keep("R8 faults, cold", &cold);
    let met = recorded.p50() <= 0.1 * cold.p50();
    let what = "faults until the working set is done, recorded, work begun at once; beside the first, beside its stream";
    report.add(Row::new("R8", what, &recorded, Some(cold.p50())).in_unit("faults").reaching("<= 0.1x", met));
    report.keep("R7 touch", &touches);
    report.add(Row::new("R7", "touch of one remote extent each, beside the stream", &touches, None));
    for stage in ["uffd_read", "queue", "wire", "verify", "publish", "wake", "total"] {
        let mean = Samples::from_us(vec![stages.mean_us_since(&before, stage)]);
        report.add(Row::new("R7", format!("  mean of the pager's stage {stage}"), &mean, None));
    }
    Ok(())
}

#[derive(Default)]
struct Took {
    local: Vec<Duration>,
    first: Vec<Duration>,
    complete: Vec<Duration>,
    /// The full copy, and what follows it.
    settled: Vec<Duration>,
    one_more: Vec<Duration>,
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
        let [local, first, complete, one_more] =
            [&self.local, &self.first, &self.complete, &self.one_more].map(|took| Samples::of(took));
        for (what, samples) in [
            ("local fork", &local),
            ("remote fork, first", &first),
            ("remote fork, complete", &complete),
            ("full copy, then first", &copy_first),
            ("full copy, then complete", &copy_complete),
            ("one more child", &one_more),
            ("bytes until settled", &counts(&self.bytes)),
        ] {
            report.keep(what, samples);
        }
        let what = "fork on the other node, nothing open there: request to answer; beside 3 local forks, round trips left out";
        let met = first.p50() <= 3.0 * local.p50();
        report.add(Row::new("R1", what, &first, Some(3.0 * local.p50())).reaching("<= 1x", met));
        let to_first = copy_first.p50() / first.p50();
        let row = Row::new("R2", "the same; beside a full copy by the node until settled", &first, Some(copy_first.p50()));
        report.add(row.reaching(format!("copy >= 20x ({to_first:.1}x)"), to_first >= 20.0));
        let to_complete = copy_complete.p50() / complete.p50();
        let row = Row::new("R2", "working set done; beside the full copy", &complete, Some(copy_complete.p50()));
        report.add(row.reaching(format!("copy >= 3x ({to_complete:.2}x)"), to_complete >= 3.0));
        let (data, wire) = (written(size)?.1 * PAGE_SIZE, self.bytes.iter().copied().max().context("a settled image")?);
        let row = Row::new("R3", "bytes of extents until settled; beside those not zero", &mib(wire), Some(in_mib(data)));
        report.add(row.in_mib().reaching("<= 1.02x", ratio(wire, data) <= 1.02));
        let row = Row::new(
            "R4",
            "one more child where all has arrived; beside one of the image's own node",
            &one_more,
            Some(local.p50()),
        );
        report.add(row.reaching("<= 1.2x", one_more.p50() <= 1.2 * local.p50()));
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
