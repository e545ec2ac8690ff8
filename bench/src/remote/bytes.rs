//! R3, R4, R8: what travels for one child, for one more, and for one whose working set is known.

use std::time::{Duration, Instant};

use anyhow::Result;
use types::{EXTENT_SIZE, PAGE_SIZE};
use vm::bare;

use super::Run;
use super::bed::{Bed, Site, await_told};
use super::workload::{WorkingSet, written};
use crate::floor;
use crate::report::{Report, Row, Samples, announce};

const MIB: u64 = 1024;
/// How many children share what one has fetched.
const MANY: u64 = 32;

pub(super) fn run(report: &mut Report, bed: &Bed, run: &Run) -> Result<()> {
    let set = WorkingSet::of(MIB)?;
    let [mut here, mut lazy, mut eager, mut knowing] =
        bed.sites([&[], &["--no-stream", "--no-replay"], &[], &["--no-stream"]])?;
    let (local, digest) = here.load(&bed.images, MIB)?;
    settled(report, bed, &here, &mut eager, &digest)?;
    let one = touched(report, bed, &here, &mut lazy, &digest, &set)?;
    await_told(one.opened);
    one_more(report, run, (&mut here, &local), &mut lazy, &one, &set)?;
    lazy.close(&one.image)?;
    many(report, bed, (&here, &mut lazy), &digest, &set, &one)?;
    replayed(report, run, &here, &mut knowing, &digest, &set, &one)
}

/// What one child came to.
struct One {
    image: String,
    wire_bytes: u64,
    faults: u64,
    opened: Instant,
}

/// R3: streaming off, so that only what a child touches travels.
fn touched(report: &mut Report, bed: &Bed, here: &Site, lazy: &mut Site, digest: &str, set: &WorkingSet) -> Result<One> {
    announce("R3: bytes for a working set, streaming off");
    let before = bed.received_bytes(1)?;
    let opened = Instant::now();
    let forked = lazy.open(digest, &[here.address], 1)?;
    lazy.touch(&forked.ids[0], set)?;
    let on_the_link = bed.received_bytes(1)? - before;
    let here_now = lazy.here(&forked.image)?;
    let touched_bytes = set.extents * EXTENT_SIZE;
    report.keep("R3 bytes of a working set", &counts(&[touched_bytes]));
    report.keep("R3 bytes received on the link", &counts(&[on_the_link]));
    report.keep("R3 bytes of extents", &counts(&[here_now.wire_bytes]));
    report.note(format!(
        "R3: a child touched {} pages in {} extents; {} bytes of extents came, {on_the_link} bytes on its host's link, all \
         headers, certificates and digests included: {:.0} bytes a page; {:.1} % of the image's {} bytes",
        set.pages,
        set.extents,
        here_now.wire_bytes,
        ratio(on_the_link, set.pages),
        100.0 * ratio(on_the_link, MIB << 20),
        MIB << 20
    ));
    let row = Row::new(
        "R3",
        "bytes on the link for a working set; beside its extents",
        &mib(on_the_link),
        Some(in_mib(touched_bytes)),
    );
    let met = ratio(on_the_link, touched_bytes) <= 1.15;
    report.add(row.in_mib().reaching("<= 1.15x", met));
    Ok(One { image: forked.image, wire_bytes: here_now.wire_bytes, faults: here_now.faults, opened })
}

/// R3: everything, once.
fn settled(report: &mut Report, bed: &Bed, here: &Site, eager: &mut Site, digest: &str) -> Result<()> {
    announce("R3: bytes until settled");
    let before = bed.received_bytes(2)?;
    let opened = eager.open(digest, &[here.address], 1)?;
    eager.settled(&opened.image)?;
    let on_the_link = bed.received_bytes(2)? - before;
    let wire_bytes = eager.here(&opened.image)?.wire_bytes;
    let written_bytes = written(MIB)?.1 * PAGE_SIZE;
    report.keep("R3 bytes that are not zero", &counts(&[written_bytes]));
    report.keep("R3 bytes received on the link until settled", &counts(&[on_the_link]));
    report.keep("R3 bytes of extents until settled", &counts(&[wire_bytes]));
    let what = "bytes of extents until settled; beside the bytes that are not zero";
    let row = Row::new("R3", what, &mib(wire_bytes), Some(in_mib(written_bytes))).in_mib();
    report.add(row.reaching("<= 1.02x", ratio(wire_bytes, written_bytes) <= 1.02));
    let what = "  the same on the link, with headers, those of datagrams sent in one go once";
    report.add(Row::new("R3", what, &mib(on_the_link), Some(in_mib(written_bytes))).in_mib());
    eager.close(&opened.image)
}

/// R4: another child where one has been, beside one where the image is from the start.
fn one_more(
    report: &mut Report,
    run: &Run,
    (here, local): (&mut Site, &str),
    lazy: &mut Site,
    one: &One,
    set: &WorkingSet,
) -> Result<()> {
    announce("R4: one more child");
    let (mut firsts, mut locals) = (Vec::new(), Vec::new());
    for _ in 0..run.n(5, 50) {
        firsts.extend(worked(lazy, &one.image, set)?);
        locals.extend(worked(here, local, set)?);
    }
    let more = lazy.here(&one.image)?.wire_bytes - one.wire_bytes;
    let (firsts, locals) = (Samples::from_us(firsts), Samples::from_us(locals));
    report.keep("R4 one more child to first", &firsts);
    report.keep("R4 child of a local image to first", &locals);
    report.keep("R4 bytes for more children", &counts(&[more]));
    let what = "one more child to first, image arrived in part; beside one of a local image";
    let met = firsts.p50() <= 1.2 * locals.p50();
    report.add(Row::new("R4", what, &firsts, Some(locals.p50())).reaching("<= 1.2x", met));
    copied_for_each(report, run)?;
    let what = format!("bytes that {} more children with the same working set took", firsts.n());
    report.add(Row::new("R4", what, &mib(more), None).in_mib().reaching("0", more == 0));
    Ok(())
}

/// What one more child pays where each has a copy of its own, by `UFFDIO_COPY`, and where they share a host image.
fn copied_for_each(report: &mut Report, run: &Run) -> Result<()> {
    let host = floor::open_host()?;
    let n = run.n(10, 50);
    let copied: Vec<Duration> = (0..n).map(|_| bare::copied(&host, 100)).collect::<Result<_, _>>()?;
    let copied = Samples::of(&copied);
    let shared = floor::raw_touches(&host, bare::Touch::Read, n)?.p50() * 16.0;
    report.keep("R4 an extent for one more child, UFFDIO_COPY for each child", &copied);
    report.keep("R4 an extent for one more child, shared", &Samples::from_us(vec![shared]));
    let what = "  raw: all pages of one extent for one more child, UFFDIO_COPY for each child (and 64 KiB); beside shared (0)";
    report.add(Row::new("R4", what, &copied, Some(shared)));
    Ok(())
}

/// A child that does its work, and ends: its time to first.
fn worked(site: &mut Site, image: &str, set: &WorkingSet) -> Result<Vec<f64>> {
    site.await_shell_or_fork(image, MIB)?;
    let forked = site.fork(image, 1)?;
    site.touch(&forked.ids[0], set)?;
    site.kill_all()?;
    Ok(forked.first_us)
}

/// R4: many at once.
fn many(
    report: &mut Report,
    bed: &Bed,
    (here, lazy): (&Site, &mut Site),
    digest: &str,
    set: &WorkingSet,
    one: &One,
) -> Result<()> {
    announce("R4: many children at once");
    let before = bed.received_bytes(1)?;
    let forked = lazy.open(digest, &[here.address], MANY)?;
    bed.ensure_new(1, before, &lazy.here(&forked.image)?)?;
    lazy.touch_all(&forked.ids, set)?;
    let bytes = lazy.here(&forked.image)?.wire_bytes;
    report.keep("R4 bytes of extents for many", &counts(&[bytes]));
    let what = format!("bytes for {MANY} children at once, each with the working set; beside one child");
    let row = Row::new("R4", what, &mib(bytes), Some(in_mib(one.wire_bytes))).in_mib();
    report.add(row.reaching("<= 1.05x", ratio(bytes, one.wire_bytes) <= 1.05));
    lazy.close(&forked.image)
}

/// R8: a child where the working set is known, on a host of its own.
fn replayed(
    report: &mut Report,
    run: &Run,
    here: &Site,
    knowing: &mut Site,
    digest: &str,
    set: &WorkingSet,
    one: &One,
) -> Result<()> {
    announce("R8: faults with a recorded working set");
    for (when, pause) in [("at once", Duration::ZERO), ("a second later", Duration::from_secs(1))] {
        let mut faults = Vec::new();
        for _ in 0..run.n(1, 5) {
            let forked = knowing.open(digest, &[here.address], 1)?;
            std::thread::sleep(pause);
            knowing.touch(&forked.ids[0], set)?;
            faults.push(knowing.here(&forked.image)?.faults);
            knowing.close(&forked.image)?;
        }
        let faults = counts(&faults);
        report.keep(&format!("R8 faults, working set recorded, work begun {when}"), &faults);
        let cold = counts(&[one.faults]).p50();
        let what = format!("faults until the working set is done, recorded, work begun {when}; beside a cold one");
        let row = Row::new("R8", what, &faults, Some(cold)).in_unit("faults");
        report.add(if pause.is_zero() { row.reaching("<= 0.1x", faults.p50() <= 0.1 * cold) } else { row });
    }
    Ok(())
}

pub(super) fn counts(values: &[u64]) -> Samples {
    #[expect(clippy::cast_precision_loss, reason = "counts of bytes, far below 2^52")]
    Samples::from_us(values.iter().map(|value| *value as f64).collect())
}

pub(super) fn mib(bytes: u64) -> Samples {
    Samples::from_us(vec![in_mib(bytes)])
}

#[expect(clippy::cast_precision_loss, reason = "counts of bytes, far below 2^52")]
pub(super) fn in_mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

#[expect(clippy::cast_precision_loss, reason = "counts of bytes, far below 2^52")]
pub(super) fn ratio(this: u64, that: u64) -> f64 {
    this as f64 / that as f64
}
