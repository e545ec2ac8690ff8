//! R6, R7: one fault on memory that another host has: beside bulk traffic, and beside the sum of its parts.

use std::time::Duration;

use anyhow::{Result, ensure};
use types::{EXTENT_SIZE, PAGE_SIZE};
use vm::bare;

use super::Run;
use super::bed::{Bed, Site};
use super::path;
use super::workload::WorkingSet;
use crate::floor;
use crate::report::{Report, Row, Samples, announce};

const MIB: u64 = 1024;
/// About what passes between the answer to one fault of R7 and the next.
const BETWEEN_FAULTS: Duration = Duration::from_micros(300);

/// R6: faults while an image streams, and while nothing else goes on.
pub(super) fn beside_bulk(report: &mut Report, bed: &Bed, run: &Run) -> Result<()> {
    let [mut here, mut lazy, mut eager, mut one] =
        bed.sites([&[], &["--no-stream", "--no-replay"], &["--no-replay"], &["--no-replay", "--one-connection"]])?;
    let (_, digest) = here.load(&bed.images, MIB)?;
    let n = run.n(100, 150);
    let holder = here.address;
    let able = path::flat_out(bed.network.host(1), &mut here, holder, &digest, MIB)?.mbit();
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "some thousand Mbit/s")]
    let rate = run.rate_mbit.min((able / 1.3) as u64 / 50 * 50).max(50);
    bed.set_rate(4, Some(rate))?;
    // Faults come from the end of memory, the stream from its start: spread so that they do not meet.
    let streamed = Duration::from_secs_f64(512.0 * 8.388_608 / f64::from(u32::try_from(rate)?));
    let pause = streamed.mul_f64(0.4) / u32::try_from(n)?;
    let mut quiet = Vec::new();
    let mut busy = Vec::new();
    let mut shared = Vec::new();
    for round in 0..run.n(1, 6) {
        announce(&format!("R6: faults at {rate} Mbit/s, round {}", round + 1));
        let set = WorkingSet::singles_from_the_end(MIB, n as u64)?;
        let (took, _) = faults(&mut lazy, &here, &digest, &set, pause)?;
        quiet.extend(took);
        for (site, faulted) in [(&mut eager, &mut busy), (&mut one, &mut shared)] {
            let (took, resident) = faults(site, &here, &digest, &set, pause)?;
            faulted.extend(took);
            ensure!(resident < 0.95, "the stream had ended before the last fault: {resident:.2} of it was there");
            if resident < 0.2 {
                report.note(format!("R6: only {:.0} % had been streamed when the last fault came", resident * 100.0));
            }
        }
    }
    bed.set_rate(4, None)?;
    let [quiet, busy, shared] = [quiet, busy, shared].map(Samples::from_us);
    report.keep("R6 fault, nothing else", &quiet);
    report.keep("R6 fault beside a stream", &busy);
    report.keep("R6 fault beside a stream on the same connection", &shared);
    let [p99, quiet_p99] = [busy.percentile(99), quiet.percentile(99)];
    let what = format!("fault of one extent beside a stream, {rate} Mbit/s, p99; beside the p99 of one with nothing else");
    report.add(Row::new("R6", what, &Samples::from_us(vec![p99]), Some(quiet_p99)).reaching("<= 2x", p99 <= 2.0 * quiet_p99));
    report.add(Row::new("R6", "  all faults beside a stream; beside the median with nothing else", &busy, Some(quiet.p50())));
    report.add(Row::new("R6", "  all faults with nothing else", &quiet, None));
    let what = "  all faults beside a stream on the same connection; beside the median of two connections";
    report.add(Row::new("R6", what, &shared, Some(busy.p50())));
    Ok(())
}

/// How long the touches took that faulted, with a pause before each or one right after the other, less what a touch of a page takes
/// that is there; and how much of the image was there after the last.
fn faults(site: &mut Site, holder: &Site, digest: &str, set: &WorkingSet, pause: Duration) -> Result<(Vec<f64>, f64)> {
    let forked = site.open(digest, &[holder.address], 1)?;
    let child = &forked.ids[0];
    let mut took = Vec::new();
    let before = site.here(&forked.image)?;
    if pause.is_zero() {
        took = site.touch(child, set)?;
    } else {
        for one in set.each() {
            std::thread::sleep(pause);
            took.extend(site.touch(child, &one)?);
        }
    }
    let after = site.here(&forked.image)?;
    let there = site.touch(child, set)?;
    let overhead = Samples::from_us(there).p50();
    ensure!(after.faults - before.faults >= set.extents, "{before:?}, {after:?}: not every touch faulted");
    site.close(&forked.image)?;
    #[expect(clippy::cast_precision_loss, reason = "bytes of an image, far below 2^52")]
    let resident = after.resident_bytes as f64 / after.data_bytes as f64;
    Ok((took.into_iter().map(|us| us - overhead).collect(), resident))
}

/// R7: one fault, and what it is made of.
pub(super) fn parts(report: &mut Report, bed: &Bed, run: &Run) -> Result<()> {
    let only_faults: &[&str] = &["--no-stream", "--no-replay"];
    let mut sites = [bed.site(0, &[])?, bed.site(1, only_faults)?, bed.site_that_verifies_nothing(2, only_faults)?];
    super::bed::befriend(&mut sites)?;
    let [mut here, mut lazy, mut credulous] = sites;
    let (_, digest) = here.load(&bed.images, MIB)?;
    let n = run.n(200, 1000);
    let host = floor::open_host()?;
    announce("R7: the raw parts");
    let (from, to) = (bed.network.host(1), bed.network.host(0));
    let quic = Samples::of(&path::quic_reads(from, to, EXTENT_SIZE, n, Duration::ZERO)?);
    let rested = Samples::of(&path::quic_reads(from, to, EXTENT_SIZE, n, BETWEEN_FAULTS)?);
    let page = Samples::of(&path::quic_reads(from, to, PAGE_SIZE, n, Duration::ZERO)?);
    let raw: Vec<bare::BareFault> = (0..run.n(10, 50)).map(|_| bare::fault(&host, 100)).collect::<Result<_, _>>()?;
    let fault = Samples::of(&raw.iter().map(|raw| raw.fault).collect::<Vec<_>>());
    let publication = Samples::of(&raw.iter().map(|raw| raw.publication).collect::<Vec<_>>());
    announce("R7: faults");
    let before = lazy.stages("farfork_fault_seconds")?;
    let (mut took, mut unverified) = (Vec::new(), Vec::new());
    for _ in 0..n.div_ceil(200) {
        let set = WorkingSet::singles_from_the_end(MIB, 200)?;
        took.extend(faults(&mut lazy, &here, &digest, &set, Duration::ZERO)?.0);
        unverified.extend(faults(&mut credulous, &here, &digest, &set, Duration::ZERO)?.0);
    }
    let after = lazy.stages("farfork_fault_seconds")?;
    let (took, unverified) = (Samples::from_us(took), Samples::from_us(unverified));
    for (what, samples) in [
        ("fault", &took),
        ("fault, verification off", &unverified),
        ("raw QUIC 64 KiB", &quic),
        ("raw QUIC 64 KiB after a pause", &rested),
        ("raw QUIC 4 KiB", &page),
        ("raw uffd fault", &fault),
        ("publication of 16 pages", &publication),
    ] {
        report.keep(&format!("R7 {what}"), samples);
    }
    let sum = quic.p50() + fault.p50() + publication.p50();
    let what = "fault of one remote extent, as its child feels it; beside the sum of its raw parts";
    report.add(Row::new("R7", what, &took, Some(sum)).reaching("<= 1.3x", took.p50() <= 1.3 * sum));
    report.add(Row::new("R7", "  the same with verification off; beside the one with it", &unverified, Some(took.p50())));
    let set = WorkingSet::of(MIB)?;
    let by_pages = total(set.pages, page.p50() + fault.p50());
    let by_extents = total(set.extents, sum);
    report.keep("R7 working set by demands of 64 KiB, reckoned", &Samples::from_us(vec![by_extents]));
    report.keep("R7 working set by demands of 4 KiB, reckoned", &Samples::from_us(vec![by_pages]));
    let what = "  working set by demands of 4 KiB, sum of raw parts; beside the same by demands of 64 KiB";
    report.add(Row::new("R7", what, &Samples::from_us(vec![by_pages]), Some(by_extents)));
    report.add(Row::new("R7", "  raw: 64 KiB by QUIC", &quic, None));
    report.add(Row::new("R7", "  raw: 4 KiB by QUIC", &page, None));
    let what = format!("  raw: 64 KiB by QUIC, {BETWEEN_FAULTS:?} after the one before, which is how they come");
    report.add(Row::new("R7", what, &rested, None));
    report.add(Row::new("R7", "  raw: fault answered by another thread, nothing placed but its page", &fault, None));
    report.add(Row::new("R7", "  raw: placing 16 pages", &publication, None));
    for stage in ["uffd_read", "queue", "wire", "verify", "publish", "wake", "total"] {
        let mean = Samples::from_us(vec![after.mean_us_since(&before, stage)]);
        report.keep(&format!("R7 mean of stage {stage}"), &mean);
        report.add(Row::new("R7", format!("  mean of the pager's stage {stage}"), &mean, None));
    }
    Ok(())
}

/// So many of what takes `us` each.
#[expect(clippy::cast_precision_loss, reason = "pages of a working set")]
fn total(count: u64, us: f64) -> f64 {
    count as f64 * us
}
