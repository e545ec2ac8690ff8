//! Which samples are drawn, beside what.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Error, Result, anyhow};

use super::plots::{self, Dot, Line};
use super::{Report, Samples};

/// One picture.
pub(super) struct Figure {
    pub(super) title: &'static str,
    /// What is to be seen, and of what.
    pub(super) caption: String,
    pub(super) svg: String,
}

/// Samples of all benches, by name.
pub(super) struct Measured<'a> {
    samples: BTreeMap<&'a str, Samples>,
    left_out: BTreeSet<&'a str>,
}

/// Samples that nobody misses: of a row that was not meant to be measured.
#[derive(Debug, thiserror::Error)]
#[error("row {0} was left out")]
pub(super) struct LeftOut(String);

impl<'a> Measured<'a> {
    pub(super) fn of(reports: &'a BTreeMap<&'static str, Report>) -> Self {
        let all = reports.values().flat_map(|report| &report.samples);
        Self {
            samples: all.map(|(name, samples)| (name.as_str(), Samples::from_us(samples.clone()))).collect(),
            left_out: reports.values().flat_map(|report| &report.left_out).map(String::as_str).collect(),
        }
    }

    fn get(&self, name: &str) -> Result<&Samples> {
        self.samples.get(name).ok_or_else(|| self.missing(name))
    }

    /// Names of samples begin with their row.
    fn missing(&self, name: &str) -> Error {
        match name.split(' ').next().filter(|row| self.left_out.contains(row)) {
            Some(row) => LeftOut(row.to_owned()).into(),
            None => anyhow!("no samples are called {name}"),
        }
    }

    /// The one that begins and ends so: between is what the machine could do.
    fn named(&self, begins: &str, ends: &str) -> Result<&'a str> {
        let named = self.samples.keys().find(|name| name.starts_with(begins) && name.ends_with(ends));
        named.copied().ok_or_else(|| self.missing(&format!("{begins}...{ends}")))
    }

    fn dot(&self, label: impl Into<String>, name: &str, per: f64, is_control: bool) -> Result<Dot> {
        let samples = self.get(name)?;
        Ok(Dot { label: label.into(), p50: samples.p50() / per, p99: samples.percentile(99) / per, is_control })
    }

    /// Medians of what is called the same but for a number. Of sizes that the host has no memory for there are none.
    fn line(&self, name: &str, is_control: bool, called: &[(f64, String)], per: f64) -> Result<Line> {
        let point = |(x, called): &(f64, String)| Some((*x, self.samples.get(called.as_str())?.p50() / per));
        let points: Vec<(f64, f64)> = called.iter().filter_map(point).collect();
        if points.len() < 2 {
            let called = called.first().map_or("", |(_, called)| called);
            return Err(self.missing(called).context(format!("{name}: fewer than two were measured")));
        }
        Ok(Line { name: name.to_owned(), points, is_control })
    }
}

/// One mechanism, with it and without.
pub(super) struct Ablation {
    pub(super) what: &'static str,
    /// What is timed.
    pub(super) of: &'static str,
    /// Medians, in microseconds.
    pub(super) with: f64,
    pub(super) without: f64,
}

impl Ablation {
    /// Leaving it out is faster by more than runs differ by anyway.
    pub(super) fn wins(&self) -> bool {
        self.without < 0.95 * self.with
    }
}

/// What each mechanism is worth, or costs.
pub(super) fn ablations(of: &Measured<'_>) -> Result<Drawn<Ablation>> {
    let p50 = |name: &str| Ok::<_, Error>(of.get(name)?.p50());
    let replayed = |ends: &str| p50(of.named("R2 ", ends)?);
    let pair =
        |what, timed, with: Result<f64>, without: Result<f64>| Ok(Ablation { what, of: timed, with: with?, without: without? });
    let whole = p50("L1 ablations: whole")?;
    drawn([
        pair(
            "shells kept ready",
            "one fork to first (L1, L2)",
            p50("L1 fork to first, 512 MiB"),
            p50("L2 fork to first, no shell"),
        ),
        pair("jail", "one fork to first (L1)", Ok(whole), p50("L1 ablations: without the jail")),
        pair(
            "no hash on the way of a fork",
            "one fork to first (L1)",
            Ok(whole),
            p50("L1 ablations: hashing the image").map(|hash| whole + hash),
        ),
        pair(
            "one host image for all children",
            "an extent for one more child (R4, raw)",
            p50("R4 an extent for one more child, shared"),
            p50("R4 an extent for one more child, UFFDIO_COPY for each child"),
        ),
        pair(
            "replay of what children touched before",
            "forked there, its work done (R2)",
            replayed(" 1 ms added: remote fork, complete"),
            replayed(" 1 ms added: remote fork, complete, no replay"),
        ),
        pair(
            "64 KiB around what is touched",
            "a working set, fault by fault (R7, reckoned)",
            p50("R7 working set by demands of 64 KiB, reckoned"),
            p50("R7 working set by demands of 4 KiB, reckoned"),
        ),
        pair(
            "a connection of their own for faults",
            "a fault beside a stream (R6)",
            p50("R6 fault beside a stream"),
            p50("R6 fault beside a stream on the same connection"),
        ),
        pair("verification", "a fault (R7)", p50("R7 fault"), p50("R7 fault, verification off")),
    ])
}

/// What could be had, and why some could not.
pub(super) struct Drawn<T> {
    pub(super) whole: Vec<T>,
    pub(super) left_out: Vec<String>,
}

/// What is drawn here has been measured, or was not meant to be; otherwise the report is not whole.
fn drawn<T>(all: impl IntoIterator<Item = Result<T>>) -> Result<Drawn<T>> {
    let mut drawn = Drawn { whole: Vec::new(), left_out: Vec::new() };
    for one in all {
        match one {
            Ok(one) => drawn.whole.push(one),
            Err(error) if error.is::<LeftOut>() => drawn.left_out.push(format!("{error:#}")),
            Err(error) => return Err(error),
        }
    }
    Ok(drawn)
}

const MS: f64 = 1000.0;
const SIZES: [u32; 3] = [64, 512, 4096];

type Draw = fn(&Measured<'_>) -> Result<Figure>;

/// By the names of their files.
pub(super) const ALL: [(&str, Draw); 7] = [
    ("forks", stages),
    ("children", many),
    ("sizes", sizes),
    ("bytes", bytes),
    ("fan-out", fan_out),
    ("faults", faults),
    ("memory", memory),
];

/// All of them, with their names.
pub(super) fn all(measured: &Measured<'_>) -> Result<Drawn<(&'static str, Figure)>> {
    drawn(ALL.map(|(name, figure)| Ok((name, figure(measured)?))))
}

fn stages(of: &Measured<'_>) -> Result<Figure> {
    let dots = [
        of.dot("floor: the bare system calls, to first", "floor fork 512 MiB: all", MS, true)?,
        of.dot("object: all but the run", "L1 512 MiB: object", MS, false)?,
        of.dot("first: jailed, in a worker", "L1 fork to first, 512 MiB", MS, false)?,
        of.dot("first, no shell ready", "L2 fork to first, no shell", MS, false)?,
        of.dot("first, asked for by the API", "C2 round trip", MS, false)?,
        of.dot("control: the steps again in a ready child", "G1 control", MS, true)?,
        of.dot("ready: a Linux child knows who it is", "G1 ready", MS, false)?,
        of.dot("control: `true` again in that child", "G2 control", MS, true)?,
        of.dot("exec: `true` has run in it", "G2 fork to exec", MS, false)?,
        of.dot(
            "control: copied there whole, its work done",
            of.named("R2 ", " 1 ms added: full copy, then complete")?,
            MS,
            true,
        )?,
        of.dot("complete: forked there, its work done", of.named("R2 ", " 1 ms added: remote fork, complete")?, MS, false)?,
    ];
    Ok(Figure {
        title: "A fork by stage",
        caption: "Each stage from the request on, beside its control (grey): what the kernel alone takes, or the same work where nothing \
                  had to be forked. Probe guests of 512 MiB up to first, Linux guests from ready on."
            .to_owned(),
        svg: plots::dots("ms", &dots)?,
    })
}

fn many(of: &Measured<'_>) -> Result<Figure> {
    let called = |names: [(f64, &str); 3]| names.map(|(count, name)| (count, name.to_owned()));
    let with =
        called([(1.0, "L1 fork to first, 512 MiB"), (100.0, "L3 100 children, all answered, shells ready"), (1000.0, "")]);
    let without = called([
        (1.0, "L2 fork to first, no shell"),
        (100.0, "L3 100 children, all answered, without shells"),
        (1000.0, "L4 1000 children, all answered, all alive, without shells"),
    ]);
    let lines = [of.line("shells ready", false, &with, MS)?, of.line("without shells", false, &without, MS)?];
    Ok(Figure {
        title: "Wall time against number of children",
        caption: "From the call until every child has answered with a checksum of its memory (one child: until its first instruction). \
                  512 MiB each, all alive."
            .to_owned(),
        svg: plots::lines(("children", "ms"), &lines)?,
    })
}

fn sizes(of: &Measured<'_>) -> Result<Figure> {
    let called = |name: fn(u32) -> String| SIZES.map(|mib| (f64::from(mib), name(mib)));
    let lines = [
        of.line("floor: bare system calls", true, &called(|mib| format!("floor fork {mib} MiB: all")), MS)?,
        of.line("here", false, &called(|mib| format!("L1 fork to first, {mib} MiB")), MS)?,
        of.line(
            "on another host, asked and answered",
            false,
            &called(|mib| format!("R1 {mib} MiB: remote, request to answer")),
            MS,
        )?,
    ];
    Ok(Figure {
        title: "First instruction against size of the image",
        caption: "Half of the memory written. What is flat here costs nothing more for more memory. There: two hosts, nothing open on the \
                  other one; the answer comes after the first instruction."
            .to_owned(),
        svg: plots::lines(("MiB of guest memory", "ms"), &lines)?,
    })
}

fn bytes(of: &Measured<'_>) -> Result<Figure> {
    let mib = 1024.0 * 1024.0;
    let dots = [
        of.dot("touched: the extents of a working set", "R3 bytes of a working set", mib, true)?,
        of.dot("on the wire for it, headers and all", "R3 bytes received on the link", mib, false)?,
        of.dot("written: bytes of the image that are not zero", "R3 bytes that are not zero", mib, true)?,
        of.dot("on the wire until nothing is needed any more", "R3 bytes received on the link until settled", mib, false)?,
    ];
    Ok(Figure {
        title: "Bytes on the wire against bytes touched",
        caption: "One child on another host, streaming off, and then all of the image; counted on the host's link.".to_owned(),
        svg: plots::dots("MiB", &dots)?,
    })
}

fn fan_out(of: &Measured<'_>) -> Result<Figure> {
    let shape = |name: &str, is_control| {
        let prefix = format!("R5 makespan, {name}, hosts: ");
        let hosts = of.samples.keys().filter_map(|called| called.strip_prefix(prefix.as_str())?.parse::<u32>().ok());
        let mut hosts: Vec<u32> = hosts.collect();
        hosts.sort_unstable();
        if hosts.is_empty() {
            return Err(of.missing(&prefix));
        }
        let called: Vec<_> = hosts.into_iter().map(|hosts| (f64::from(hosts), format!("{prefix}{hosts}"))).collect();
        of.line(name, is_control, &called, MS)
    };
    let lines = [shape("star", true)?, shape("tree", false)?];
    Ok(Figure {
        title: "Fan-out makespan against hosts",
        caption: "Until the working set is done on all of them, each behind a link of its own. In the star all read from one host, in the \
                  tree from at most two readers each."
            .to_owned(),
        svg: plots::lines(("hosts", "ms"), &lines)?,
    })
}

fn faults(of: &Measured<'_>) -> Result<Figure> {
    let stage = |name: &str| of.dot(format!("of it, mean: {name}"), &format!("R7 mean of stage {name}"), 1.0, false);
    let dots = [
        of.dot("raw: 64 KiB by QUIC", "R7 raw QUIC 64 KiB", 1.0, true)?,
        of.dot("raw: the same, as far apart as faults come", "R7 raw QUIC 64 KiB after a pause", 1.0, true)?,
        of.dot("raw: a fault that another thread answers", "R7 raw uffd fault", 1.0, true)?,
        of.dot("a child waits for an extent", "R7 fault", 1.0, false)?,
        stage("uffd_read")?,
        stage("queue")?,
        stage("wire")?,
        stage("verify")?,
        stage("publish")?,
        stage("wake")?,
    ];
    Ok(Figure {
        title: "A fault by stage",
        caption: "What a child waits for that touches memory which is on another host, as it feels it, beside its raw parts."
            .to_owned(),
        svg: plots::dots("us", &dots)?,
    })
}

fn memory(of: &Measured<'_>) -> Result<Figure> {
    let dots = [
        of.dot("probe child: what it has itself (PSS)", "L5 PSS, MiB", 1.0, false)?,
        of.dot("probe child: its page tables", "L5 page tables, MiB", 1.0, false)?,
        of.dot("probe child: all that the host has less", "L5 all, MiB", 1.0, false)?,
        of.dot("Linux child: memory of its own, after ready", "G4 private", 1.0, false)?,
    ];
    Ok(Figure {
        title: "Memory of one more idle child",
        caption: "At 100 probe children of 512 MiB, and some Linux children of 64 MiB, all alive while it is measured."
            .to_owned(),
        svg: plots::dots("MiB", &dots)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_is_left_out_only_if_its_row_is() {
        let nothing = Measured { samples: BTreeMap::new(), left_out: BTreeSet::from(["R5"]) };
        assert!(fan_out(&nothing).is_err_and(|error| error.is::<LeftOut>()));
        assert!(faults(&nothing).is_err_and(|error| !error.is::<LeftOut>()));
        let left_out = drawn([fan_out(&nothing)]).unwrap();
        assert!(left_out.whole.is_empty() && left_out.left_out == ["row R5 was left out"]);
        assert!(drawn([fan_out(&nothing), faults(&nothing)]).is_err(), "samples are missing");
        let one = Measured {
            samples: BTreeMap::from([("R1 64 MiB: x", Samples::from_us(vec![1.0]))]),
            left_out: BTreeSet::from(["R1"]),
        };
        let line = one.line("there", false, &[(64.0, "R1 64 MiB: x".to_owned()), (512.0, "R1 512 MiB: x".to_owned())], 1.0);
        assert!(line.is_err_and(|error| error.is::<LeftOut>()), "one point is no line");
    }
}
