//! R5: one image to many hosts over slow links: down a tree, and all from one.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use types::EXTENT_SIZE;

use super::Run;
use super::bed::{Bed, Site, befriend};
use super::bytes::{in_mib, mib};
use super::workload::WorkingSet;
use crate::report::{Report, Row, Samples, announce};

const DEGREE: usize = 2;
const RATE_MBIT: u64 = 100;

/// Who is asked for pages by a host.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// The first host alone.
    Star,
    /// Its parent in a tree, which asks its own.
    Tree,
    /// Its parent, and the first host too.
    TreeAndRoot,
}

impl Shape {
    fn name(self) -> &'static str {
        match self {
            Self::Star => "star",
            Self::Tree => "tree",
            Self::TreeAndRoot => "tree, with the root as a second holder",
        }
    }

    /// Host 0 has the image; hosts 1 and up want it.
    fn holders(self, host: usize, sites: &[SocketAddr]) -> Vec<SocketAddr> {
        let parent = sites[(host - 1) / DEGREE];
        match self {
            Self::Star => vec![sites[0]],
            Self::TreeAndRoot if parent != sites[0] => vec![parent, sites[0]],
            Self::Tree | Self::TreeAndRoot => vec![parent],
        }
    }
}

pub(super) fn run(report: &mut Report, bed: &Bed, run: &Run) -> Result<()> {
    let mib_of_image = if run.quick { 128 } else { 256 };
    let set = WorkingSet::of(mib_of_image)?;
    let set_bytes = set.extents * EXTENT_SIZE;
    let mut makespans = Vec::new();
    for shape in [Shape::Star, Shape::Tree, Shape::TreeAndRoot] {
        let mut took = Vec::new();
        let mut given = Vec::new();
        for round in 0..run.n(1, 3) {
            announce(&format!("R5: {} over {} hosts, round {}", shape.name(), run.hosts, round + 1));
            let (makespan, egress) = fan_out(bed, run.hosts, mib_of_image, shape, &set)?;
            took.push(makespan);
            given.push(in_mib(egress));
        }
        let (took, given) = (Samples::of(&took), Samples::from_us(given));
        let hosts = run.hosts;
        report.keep(&makespan_of(shape, run.hosts), &took);
        report.keep(&format!("R5 bytes of extents that the first host gave, MiB, {}", shape.name()), &given);
        let what = format!("working set done on {hosts} hosts, {RATE_MBIT} Mbit/s links, {}; beside the star", shape.name());
        let star: f64 = makespans.first().copied().unwrap_or_else(|| took.p50());
        let row = Row::new("R5", what, &took, Some(star));
        let speed = star / took.p50();
        report.add(if shape == Shape::Star { row } else { row.reaching(format!("star >= 2.5x ({speed:.2}x)"), speed >= 2.5) });
        let most = in_mib(set_bytes) * 2.0;
        let what = format!("  bytes of extents that the first host gave, {}; beside {DEGREE} working sets", shape.name());
        let row = Row::new("R5", what, &given, Some(most)).in_mib();
        // Each child touches a few extents more than its working set: those that the guest itself runs on.
        report.add(if shape == Shape::Star { row } else { row.reaching("<= 1.01x", given.p50() <= 1.01 * most) });
        makespans.push(took.p50());
    }
    report.add(Row::new("R5", "  a working set's extents", &mib(set_bytes), None).in_mib());
    // How it grows.
    for hosts in std::iter::successors(Some(2), |hosts| Some(hosts * 2)).take_while(|hosts| *hosts < run.hosts) {
        for shape in [Shape::Star, Shape::Tree] {
            announce(&format!("R5: {} over {hosts} hosts", shape.name()));
            let took = Samples::of(&[fan_out(bed, hosts, mib_of_image, shape, &set)?.0]);
            report.keep(&makespan_of(shape, hosts), &took);
            report.add(Row::new("R5", format!("  working set done on {hosts} hosts, {}", shape.name()), &took, None));
        }
    }
    Ok(())
}

fn makespan_of(shape: Shape, hosts: usize) -> String {
    format!("R5 makespan, {}, hosts: {hosts}", shape.name())
}

/// From the first request until the last host's child has done its work; and what the first host has given.
fn fan_out(bed: &Bed, hosts: usize, mib_of_image: u64, shape: Shape, set: &WorkingSet) -> Result<(Duration, u64)> {
    // What children do not touch does not travel.
    let mut sites: Vec<Site> = (0..=hosts).map(|host| bed.site(host, &["--no-stream"])).collect::<Result<_>>()?;
    befriend(&mut sites)?;
    let (_, digest) = sites[0].load(&bed.images, mib_of_image)?;
    let addresses: Vec<SocketAddr> = sites.iter().map(|site| site.address).collect();
    bed.set_rate(hosts + 1, Some(RATE_MBIT))?;
    let before = sites[0].served_bytes()?;
    let began = Instant::now();
    // A parent has to know of the image before it is asked for it.
    let mut children = Vec::new();
    for (host, site) in sites.iter_mut().enumerate().skip(1) {
        children.push(site.open(&digest, &shape.holders(host, &addresses), 1)?.ids.remove(0));
    }
    std::thread::scope(|scope| {
        let work = |(site, child): (&mut Site, &String)| site.touch(child, set).map(drop);
        let threads: Vec<_> = sites[1..].iter_mut().zip(&children).map(|pair| scope.spawn(move || work(pair))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("it does not panic"))
    })?;
    let makespan = began.elapsed();
    let given = sites[0].served_bytes()? - before;
    bed.set_rate(hosts + 1, None)?;
    ensure!(given >= set.extents * EXTENT_SIZE, "the first host gave {given} bytes: less than a working set");
    Ok((makespan, given))
}
