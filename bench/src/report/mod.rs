//! Tables and JSON, and what is made of them.
//!
//! | file | holds |
//! |---|---|
//! | [`compare`] | what moved between two runs |
//! | [`documents`] | numbers in the documents |
//! | [`figures`] | which samples are drawn |
//! | [`plots`] | how |
//! | [`page`] | one page of all benches |

pub(crate) mod compare;
pub(crate) mod documents;
mod figures;
pub(crate) mod page;
mod plots;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use comfy_table::{CellAlignment, Table, presets};
use serde::{Deserialize, Serialize};
use vm::Host;

/// Of tables of rows.
const HEADER: [&str; 9] = ["row", "what", "n", "p50", "p99", "control p50", "ratio", "to reach", "met"];

/// Everything of one run.
#[derive(Serialize, Deserialize)]
pub(crate) struct Report {
    machine: Machine,
    results: Vec<Row>,
    /// What was not measured, and why.
    notes: Vec<String>,
    /// Rows that were not meant to be measured: nobody misses their samples.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    left_out: BTreeSet<String>,
    /// Every sample behind the rows, in microseconds.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    samples: BTreeMap<String, Vec<f64>>,
}

#[derive(Serialize, Deserialize)]
struct Machine {
    cpu: String,
    cores: usize,
    memory_bytes: u64,
    kernel: String,
    commit: String,
    unix_time: u64,
    quick: bool,
}

/// One figure.
#[derive(Serialize, Deserialize)]
pub(crate) struct Row {
    pub(crate) id: String,
    pub(crate) what: String,
    pub(crate) unit: String,
    pub(crate) n: usize,
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    /// The control of the same run, in the same unit.
    pub(crate) floor_p50: Option<f64>,
    pub(crate) ratio: Option<f64>,
    /// The target, in words.
    pub(crate) reach: String,
    /// Whether it is met; `None` for a row that only informs.
    pub(crate) met: Option<bool>,
}

/// Samples in microseconds, sorted.
#[derive(Clone, Debug)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    pub(crate) fn of(durations: &[Duration]) -> Self {
        Self::from_us(durations.iter().map(|duration| duration.as_secs_f64() * 1e6).collect())
    }

    pub(crate) fn from_us(mut us: Vec<f64>) -> Self {
        us.sort_by(f64::total_cmp);
        Self(us)
    }

    /// The sample below which so many percent lie (nearest rank).
    pub(crate) fn percentile(&self, percent: usize) -> f64 {
        let rank = (self.0.len() * percent).div_ceil(100).max(1);
        self.0[rank - 1]
    }

    pub(crate) fn n(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn p50(&self) -> f64 {
        self.percentile(50)
    }
}

impl Row {
    /// A row of `samples` beside the median of its control. Without a target it informs.
    pub(crate) fn new(id: &str, what: impl Into<String>, samples: &Samples, floor_p50: Option<f64>) -> Self {
        Self {
            id: id.to_owned(),
            what: what.into(),
            unit: "us".to_owned(),
            n: samples.n(),
            p50: samples.p50(),
            p99: samples.percentile(99),
            floor_p50,
            ratio: floor_p50.map(|floor| samples.p50() / floor),
            reach: String::new(),
            met: None,
        }
    }

    /// The samples are not microseconds but MiB.
    pub(crate) fn in_mib(self) -> Self {
        self.in_unit("MiB")
    }

    /// The samples are not microseconds.
    pub(crate) fn in_unit(mut self, unit: &str) -> Self {
        unit.clone_into(&mut self.unit);
        self
    }

    pub(crate) fn reaching(mut self, reach: impl Into<String>, met: bool) -> Self {
        self.reach = reach.into();
        self.met = Some(met);
        self
    }

    /// What stands below each of [`HEADER`].
    fn cells(&self) -> [String; 9] {
        [
            self.id.clone(),
            self.what.clone(),
            self.n.to_string(),
            in_words(self.p50, &self.unit),
            in_words(self.p99, &self.unit),
            self.floor_p50.map(|floor| in_words(floor, &self.unit)).unwrap_or_default(),
            self.ratio.map(|ratio| format!("{ratio:.2}")).unwrap_or_default(),
            self.reach.clone(),
            self.is_met().to_owned(),
        ]
    }

    /// Whether its target is met, in a word; none if it only informs.
    pub(crate) fn is_met(&self) -> &'static str {
        match self.met {
            Some(true) => "yes",
            Some(false) => "NO",
            None => "",
        }
    }

    /// Whether what the target asks for can be measured here. Where it cannot, the row informs of what was measured instead.
    pub(crate) fn measurable(mut self, is_measurable: bool) -> Self {
        if !is_measurable {
            self.reach = format!("not measurable here: {}", self.reach);
            self.met = None;
        }
        self
    }
}

impl Machine {
    /// What it is; not when and what was measured there.
    fn in_words(&self) -> String {
        let Self { cpu, cores, memory_bytes, kernel, .. } = self;
        format!("{cores} cores of {cpu}, {} GiB of memory, Linux {kernel}", memory_bytes >> 30)
    }
}

impl Report {
    pub(crate) fn new(host: &Host, quick: bool) -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let git = std::process::Command::new("git").args(["describe", "--always", "--dirty"]).output();
        let machine = Machine {
            cpu: host.cpu().to_string(),
            cores: std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
            memory_bytes: host.memory_bytes(),
            kernel: read("/proc/sys/kernel/osrelease"),
            commit: git.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default(),
            unix_time: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs(),
            quick,
        };
        Self { machine, results: Vec::new(), notes: Vec::new(), left_out: BTreeSet::new(), samples: BTreeMap::new() }
    }

    /// Of a file that [`Self::finish`] has written.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        let report: Self = serde_json::from_slice(&bytes)
            .with_context(|| format!("{} is not what a bench of this version writes", path.display()))?;
        ensure!(report.samples.values().all(|samples| !samples.is_empty()), "{}: a set of samples is empty", path.display());
        Ok(report)
    }

    /// Keeps samples under a name of their own.
    pub(crate) fn keep(&mut self, name: &str, samples: &Samples) {
        let before = self.samples.insert(name.to_owned(), samples.0.clone());
        assert!(before.is_none(), "two sets of samples are called {name}");
    }

    pub(crate) fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// Says of rows that they are not measured: this host has not what they need, or nobody has the time.
    pub(crate) fn leave_out(&mut self, ids: &[&str], why: &str) {
        self.note(format!("{}: left out: {why}", ids.join(", ")));
        self.left_out.extend(ids.iter().map(|id| (*id).to_owned()));
    }

    pub(crate) fn add(&mut self, row: Row) {
        self.results.push(row);
    }

    /// Prints the table, and writes the JSON if it was asked for.
    pub(crate) fn finish(&self, json: Option<&Path>) -> Result<()> {
        let has_rows = !self.results.is_empty() || !self.left_out.is_empty();
        ensure!(has_rows && self.results.iter().all(|row| row.n > 0), "a row has no samples");
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header(HEADER);
        for row in &self.results {
            table.add_row(row.cells());
        }
        for column in 2..7 {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        println!("{}; commit {}", self.machine.in_words(), self.machine.commit);
        println!("{table}");
        self.notes.iter().for_each(|note| println!("{note}"));
        if let Some(path) = json {
            let bytes = serde_json::to_vec_pretty(self)?;
            std::fs::write(path, bytes).with_context(|| format!("writing {}", path.display()))?;
            println!("table and raw samples: {}", path.display());
        }
        Ok(())
    }
}

/// Three digits of it, and times in the unit that suits them.
pub(crate) fn in_words(value: f64, unit: &str) -> String {
    let (value, unit) = match unit {
        "us" if value >= 1e6 => (value / 1e6, "s"),
        "us" if value >= 1e3 => (value / 1e3, "ms"),
        unit => (value, unit),
    };
    if unit.is_empty() {
        return format!("{value:.0}");
    }
    let number = match value {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    };
    format!("{number} {unit}")
}

/// Says on stderr what is being measured.
pub(crate) fn announce(what: &str) {
    eprintln!("measuring {what}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples() {
        let samples = Samples::from_us((1..=100).rev().map(f64::from).collect());
        assert_eq!(samples.p50().to_bits(), 50f64.to_bits());
        assert_eq!(samples.percentile(99).to_bits(), 99f64.to_bits());
        assert_eq!(Samples::from_us(vec![7.0]).percentile(99).to_bits(), 7f64.to_bits());
    }

    #[test]
    fn numbers_have_three_digits_and_a_unit_that_suits_them() {
        let said = [0.8, 12.345, 692.4, 1_400.0, 42_650.0, 3_010_000.0].map(|us| in_words(us, "us"));
        assert_eq!(said, ["0.80 us", "12.3 us", "692 us", "1.40 ms", "42.6 ms", "3.01 s"]);
        assert_eq!((in_words(3600.0, "MiB"), in_words(12.0, "")), ("3600 MiB".to_owned(), "12".to_owned()));
    }
}
