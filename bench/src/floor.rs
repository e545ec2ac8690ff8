//! `bench floor`: what the kernel alone takes.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vm::bare::{self, BareFork, Touch};
use vm::{Host, HostError};

use crate::report::{Report, Row, Samples, announce};

/// Pages that one sample of the fault cost touches.
pub(crate) const TOUCHED_PAGES: u32 = 2000;

pub(crate) fn run(json: Option<&Path>, quick: bool) -> Result<()> {
    let host = open_host()?;
    let mut report = Report::new(&host, quick);
    let n = if quick { 20 } else { 100 };
    for mib in [64, 512, 4096] {
        if host.check_memory(types::MemorySize::from_mib(mib)?).is_err() {
            report.note(format!("{mib} MiB: not measurable here: the host has less memory"));
            continue;
        }
        announce(&format!("bare forks of {mib} MiB"));
        let samples: Vec<BareFork> = (0..n).map(|_| sample(mib, Duration::ZERO)).collect::<Result<_>>()?;
        for (stage, of) in STAGES {
            let durations: Vec<Duration> = samples.iter().map(of).collect();
            let samples = Samples::of(&durations);
            let name = format!("floor fork {mib} MiB: {stage}");
            report.keep(&name, &samples);
            report.add(Row::new("floor", name, &samples, None));
        }
    }
    for (name, touch) in [("read", Touch::Read), ("write", Touch::Write)] {
        announce(&format!("raw page {name}s"));
        let samples = raw_touches(&host, touch, n.min(30))?;
        let what = format!("floor page {name}, private mapping, page present");
        report.keep(&what, &samples);
        report.add(Row::new("floor", what, &samples, None));
    }
    report.finish(json)
}

type Stage = (&'static str, fn(&BareFork) -> Duration);
const STAGES: [Stage; 4] = [
    ("map", |sample| sample.map),
    ("restore", |sample| sample.restore),
    ("run to first port write", |sample| sample.run),
    ("all", BareFork::total),
];

/// The raw cost of one touch, in microseconds a page.
pub(crate) fn raw_touches(host: &Host, touch: Touch, n: usize) -> Result<Samples> {
    let each = |_| -> Result<f64> {
        let took = bare::touch(host, 64 << 20, TOUCHED_PAGES, touch).context("the raw page touch")?;
        Ok(took.as_secs_f64() * 1e6 / f64::from(TOUCHED_PAGES))
    };
    Ok(Samples::from_us((0..n).map(each).collect::<Result<_>>()?))
}

/// One bare fork in a process of its own, which is how one VM a process behaves.
pub(crate) fn sample(mib: u64, idle: Duration) -> Result<BareFork> {
    let idle_us = idle.as_micros().to_string();
    let output = Command::new(std::env::current_exe()?).args(["floor-sample", &mib.to_string(), &idle_us]).output()?;
    ensure!(output.status.success(), "floor-sample: {}", String::from_utf8_lossy(&output.stderr).trim());
    let text = String::from_utf8(output.stdout)?;
    let numbers: Vec<u64> = text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    let [map, restore, run] = numbers[..] else { anyhow::bail!("floor-sample printed {text:?}") };
    let ns = Duration::from_nanos;
    Ok(BareFork { map: ns(map), restore: ns(restore), run: ns(run) })
}

pub(crate) fn print_sample(mib: u64, idle: Duration) -> Result<()> {
    let sample = bare::fork(&open_host()?, mib << 20, idle).context("the bare fork")?;
    println!("{} {} {}", sample.map.as_nanos(), sample.restore.as_nanos(), sample.run.as_nanos());
    Ok(())
}

pub(crate) fn open_host() -> Result<Host> {
    Host::open().map_err(|error: HostError| anyhow::anyhow!("{error}; {}", error.remedy()))
}
