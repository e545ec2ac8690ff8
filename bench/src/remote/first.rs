//! R1: how soon a child runs on another host that has nothing of its image.

use anyhow::{Result, ensure};
use types::MemorySize;

use super::Run;
use super::bed::{Bed, STAGES, Stages};
use super::path;
use super::workload::WorkingSet;
use crate::floor;
use crate::report::{Report, Row, Samples, announce};

/// Of the host's memory, what images of all sizes may take: they are half full.
const SIZES: [u64; 4] = [64, 512, 1024, 4096];
/// Two that the report draws.
const SIZES_QUICK: [u64; 2] = [64, 512];

/// The size of which the table has the stages.
const STAGES_OF_MIB: u64 = 1024;

pub(super) fn run(report: &mut Report, bed: &Bed, run: &Run) -> Result<()> {
    let host = floor::open_host()?;
    let [mut here, mut there] = bed.sites([&[], &[]])?;
    let mut sizes = Vec::new();
    let all: &[u64] = if run.quick { &SIZES_QUICK } else { &SIZES };
    for &mib in all {
        // The file, the image, and what the other side has of it.
        if host.check_memory(MemorySize::from_mib(mib)?).is_err() || vm::host::available_memory()? < (mib << 20) * 2 {
            report.note(format!("R1 at {mib} MiB: not measurable here: the host has less memory"));
            continue;
        }
        announce(&format!("R1: loading {mib} MiB"));
        sizes.push(Size {
            mib,
            image: here.load(&bed.images, mib)?.0,
            set: WorkingSet::singles_from_the_end(mib, 4)?,
            ..Size::default()
        });
    }
    let trips = path::round_trips(bed.network.host(0), bed.network.host(1), run.n(200, 1000))?;
    let trips = Samples::of(&trips);
    report.keep("R1 round trip of a datagram", &trips);
    report.add(Row::new("R1", "round trip of a datagram between the hosts", &trips, None));
    announce("R1: forks on another host");
    let mut opened_before = Stages::default();
    for round in 0..=run.n(5, 30) {
        if round == 1 {
            opened_before = there.stages("farfork_open_seconds")?;
        }
        for size in &mut sizes {
            here.await_shell_or_fork(&size.image, size.mib)?;
            let local = here.fork(&size.image, 1)?;
            here.touch(&local.ids[0], &size.set)?;
            here.kill_all()?;
            if round > 0 {
                there.await_shell(size.mib)?;
            }
            let before = bed.received_bytes(1)?;
            let remote = here.fork_on(&size.image, there.address)?;
            let image = there.only_image()?;
            bed.ensure_new(1, before, &there.here(&image)?)?;
            there.touch(&remote.ids[0], &size.set)?;
            there.close(&image)?;
            // The first of a size finds no shell there, and no connection.
            if round > 0 {
                ensure!(local.had_shell && remote.had_shell, "a shell that was ready was not used");
                size.local.push(local.took.as_secs_f64() * 1e6);
                size.local_first.extend(local.first_us);
                size.remote.push(remote.took.as_secs_f64() * 1e6);
                size.remote_first.extend(remote.first_us);
                size.stages.push(remote.stages_us);
            }
        }
    }
    let opened = there.stages("farfork_open_seconds")?;
    for stage in ["ask", "place", "plan", "total"] {
        let mean = Samples::from_us(vec![opened.mean_us_since(&opened_before, stage)]);
        report.keep(&format!("R1 mean of opening's stage {stage}"), &mean);
        report.add(Row::new("R1", format!("  opening the image there, all sizes, mean of stage {stage}"), &mean, None));
    }
    let mut medians = Vec::new();
    for size in sizes {
        medians.push((size.mib, size.report(report, trips.p50())));
    }
    if let [(smallest, base), .., (largest, last)] = &medians[..] {
        let is_flat = last.p50() <= 1.15 * base.p50() && last.p50() >= 0.85 * base.p50();
        let what = format!("flatness: {largest} MiB beside {smallest} MiB");
        report.add(Row::new("R1", what, last, Some(base.p50())).reaching("within 15 %", is_flat));
    }
    Ok(())
}

#[derive(Default)]
struct Size {
    mib: u64,
    image: String,
    set: WorkingSet,
    local: Vec<f64>,
    local_first: Vec<f64>,
    remote: Vec<f64>,
    remote_first: Vec<f64>,
    stages: Vec<[f64; 5]>,
}

impl Size {
    fn report(self, report: &mut Report, trip: f64) -> Samples {
        let Self { mib, .. } = self;
        let [local, local_first, remote, remote_first] =
            [self.local, self.local_first, self.remote, self.remote_first].map(Samples::from_us);
        for (what, samples) in [
            ("local, request to answer", &local),
            ("local, call to first", &local_first),
            ("remote, request to answer", &remote),
            ("remote, call there to first", &remote_first),
        ] {
            report.keep(&format!("R1 {mib} MiB: {what}"), samples);
        }
        let reach = 3.0 * local.p50() + 3.0 * trip;
        let what =
            format!("fork on another host, {mib} MiB, nothing open there: request to answer; beside 3 local + 3 round trips");
        report.add(Row::new("R1", what, &remote, Some(reach)).reaching("<= 1x", remote.p50() <= reach));
        let strict = 3.0 * local_first.p50() + 3.0 * trip;
        let what = format!("  {mib} MiB: request to answer; beside 3 local forks to first (L1) + 3 round trips");
        report.add(Row::new("R1", what, &remote, Some(strict)).reaching("<= 1x", remote.p50() <= strict));
        let what = format!("  {mib} MiB: the same fork on this host (L1 by the API): request to answer");
        report.add(Row::new("R1", what, &local, None));
        let what = format!("  {mib} MiB: of the remote one: call of that node's engine to first; beside the local one's");
        report.add(Row::new("R1", what, &remote_first, Some(local_first.p50())));
        for (number, name) in STAGES.iter().enumerate() {
            let stage = Samples::from_us(self.stages.iter().map(|stages| stages[number]).collect());
            report.keep(&format!("R1 {mib} MiB: remote, stage {name}"), &stage);
            if mib == STAGES_OF_MIB {
                report.add(Row::new("R1", format!("    {mib} MiB: stage {name} of that"), &stage, None));
            }
        }
        remote
    }
}
