//! R2: a fork on another host beside a full copy done well, until a child runs and until it has done its work.
//!
//! The full copy: all extents that are not zero, pipelined, by the same QUIC, then a local fork. It is taken twice, and the faster
//! one is the control: as the product does it (opened, streamed until settled, verified) and by the bare client of pages, which
//! neither verifies nor places anything.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::Run;
use super::bed::{Bed, Site, await_told};
use super::path;
use super::workload::WorkingSet;
use crate::report::{Report, Row, Samples, announce};

const MIB: u64 = 1024;
pub(super) fn run(report: &mut Report, bed: &Bed, run: &Run) -> Result<()> {
    let set = WorkingSet::of(MIB)?;
    let [mut here, mut there, mut cold] = bed.sites([&[], &[], &["--no-replay"]])?;
    let (_, digest) = here.load(&bed.images, MIB)?;
    announce("R2: recording what children touch");
    let began = Instant::now();
    let forked = cold.open(&digest, &[here.address], 1)?;
    cold.touch(&forked.ids[0], &set)?;
    await_told(began);
    cold.close(&forked.image)?;
    let without_delay = !run.quick || run.delay.is_zero();
    if !without_delay {
        report.note("R2 without added delay: left out: --quick");
    }
    for delay in [Duration::ZERO, run.delay].into_iter().skip(usize::from(!without_delay)) {
        let relay = (!delay.is_zero()).then(|| bed.relay(0, here.address, delay)).transpose()?;
        let holder = relay.as_ref().map_or(here.address, |relay| relay.address());
        bed.set_rate(3, None)?;
        announce(&format!("R2: what the path carries, {delay:?} added"));
        let open = path::flat_out(bed.network.host(1), &mut here, holder, &digest, MIB)?;
        let able = open.mbit();
        let wanted = run.rate_mbit;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "some thousand Mbit/s")]
        let rate = wanted.min((able / 1.3) as u64 / 50 * 50).max(50);
        let place = format!("{rate} Mbit/s, {} ms added", delay.as_secs_f64() * 1e3);
        if rate < wanted {
            report.note(format!(
                "R2 at {wanted} Mbit/s, {} ms added: not measurable here: the path carries {able:.0} Mbit/s flat out, less than \
                 1.3x; measured at {rate} Mbit/s instead",
                delay.as_secs_f64() * 1e3
            ));
        }
        bed.set_rate(3, Some(rate))?;
        let mut took = Took::default();
        for round in 0..run.n(1, 5) {
            announce(&format!("R2 at {place}, round {}", round + 1));
            took.flat.push(path::flat_out(bed.network.host(1), &mut here, holder, &digest, MIB)?.took);
            took.full_copy(&mut there, &digest, holder, &set)?;
            let (first, complete) = remote_fork(&mut there, &digest, holder, &set)?;
            took.first.push(first);
            took.complete.push(complete);
            took.cold.push(remote_fork(&mut cold, &digest, holder, &set)?.1);
        }
        took.report(report, &place, rate == wanted);
    }
    bed.set_rate(3, None)
}

/// Until a child runs, and until its work is done.
fn remote_fork(there: &mut Site, digest: &str, holder: SocketAddr, set: &WorkingSet) -> Result<(Duration, Duration)> {
    there.await_shell(MIB)?;
    let began = Instant::now();
    let forked = there.open(digest, &[holder], 1)?;
    there.touch(&forked.ids[0], set)?;
    let complete = began.elapsed();
    ensure!(forked.had_shell, "a shell that was ready was not used");
    there.close(&forked.image)?;
    Ok((forked.took, complete))
}

#[derive(Default)]
struct Took {
    /// The bare client reads it all.
    flat: Vec<Duration>,
    settled: Vec<Duration>,
    /// A fork where all of it is here, and its work.
    local_first: Vec<Duration>,
    local_work: Vec<Duration>,
    first: Vec<Duration>,
    complete: Vec<Duration>,
    /// The same without replay.
    cold: Vec<Duration>,
}

impl Took {
    /// The copy's first child waits, without touching anything, until all is there.
    fn full_copy(&mut self, there: &mut Site, digest: &str, holder: SocketAddr, set: &WorkingSet) -> Result<()> {
        let opened = there.open(digest, &[holder], 1)?;
        self.settled.push(there.settled(&opened.image)?);
        there.await_shell(MIB)?;
        let local = there.fork(&opened.image, 1)?;
        self.local_first.push(local.took);
        let began = Instant::now();
        there.touch(&local.ids[0], set)?;
        self.local_work.push(began.elapsed());
        there.close(&opened.image)
    }

    fn report(self, report: &mut Report, place: &str, is_wanted: bool) {
        let of = |parts: &[&[Duration]]| {
            let sums = (0..parts[0].len()).map(|number| parts.iter().map(|part| part[number]).sum()).collect::<Vec<Duration>>();
            Samples::of(&sums)
        };
        let (flat, settled) = (Samples::of(&self.flat), Samples::of(&self.settled));
        let copied = if flat.p50() <= settled.p50() { &self.flat } else { &self.settled };
        let (copy_first, first) = (of(&[copied, &self.local_first]), Samples::of(&self.first));
        let copy_complete = of(&[copied, &self.local_first, &self.local_work]);
        let (complete, cold) = (Samples::of(&self.complete), Samples::of(&self.cold));
        for (what, samples) in [
            ("full copy, bare client", &flat),
            ("full copy, until settled", &settled),
            ("full copy, then first", &copy_first),
            ("full copy, then complete", &copy_complete),
            ("remote fork, first", &first),
            ("remote fork, complete", &complete),
            ("remote fork, complete, no replay", &cold),
        ] {
            report.keep(&format!("R2 {place}: {what}"), samples);
        }
        let [to_first, to_complete] = [copy_first.p50() / first.p50(), copy_complete.p50() / complete.p50()];
        let row =
            Row::new("R2", format!("remote fork to first, {place}; beside the full copy"), &first, Some(copy_first.p50()));
        report.add(row.reaching(format!("copy >= 20x ({to_first:.1}x)"), to_first >= 20.0).measurable(is_wanted));
        let what = format!("remote fork to working set done, {place}; beside the full copy");
        let row = Row::new("R2", what, &complete, Some(copy_complete.p50()));
        report.add(row.reaching(format!("copy >= 3x ({to_complete:.2}x)"), to_complete >= 3.0).measurable(is_wanted));
        let to_cold = copy_complete.p50() / cold.p50();
        let row = Row::new("R2", format!("  the same, {place}, without replay"), &cold, Some(copy_complete.p50()));
        report.add(row.reaching(format!("copy >= 0.95x ({to_cold:.2}x)"), to_cold >= 0.95));
        report.add(Row::new(
            "R2",
            format!("  full copy by the node until settled, {place}; beside the bare client"),
            &settled,
            Some(flat.p50()),
        ));
    }
}
