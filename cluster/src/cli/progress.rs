//! What people see while they wait, and where the time went. On stderr, and only when that is a terminal.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::api::wire::{Child, Stages};

/// A sign of life, gone when dropped.
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Says what is waited for.
    pub(crate) fn start(what: String) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style =
                ProgressStyle::with_template("{spinner} {msg} {elapsed}").unwrap_or_else(|_| ProgressStyle::default_spinner());
            let bar = ProgressBar::new_spinner().with_style(style).with_message(what);
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        Self { bar }
    }
}

impl Progress {
    /// Says what is waited for now.
    pub(crate) fn say(&self, what: String) {
        if let Some(bar) = &self.bar {
            bar.set_message(what);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Says where the time of a fork went.
pub(crate) fn stages(children: &[Child]) {
    if !children.is_empty() && std::io::stderr().is_terminal() {
        eprint!("{}", stage_lines(children));
    }
}

fn stage_lines(children: &[Child]) -> String {
    type Stage = (&'static str, fn(&Child) -> u64);
    let stages: [Stage; 6] = [
        ("shell", |child| child.stages_us.shell),
        ("send", |child| child.stages_us.send),
        ("map", |child| child.stages_us.map),
        ("restore", |child| child.stages_us.restore),
        ("run", |child| child.stages_us.run),
        ("first", |child| child.first_us),
    ];
    let mut lines = format!("{:<8} {:>8} {:>8}  of {}\n", "stage", "p50 us", "p99 us", children.len());
    for (name, of) in stages {
        let mut samples: Vec<u64> = children.iter().map(of).collect();
        samples.sort_unstable();
        lines.push_str(&format!("{name:<8} {:>8} {:>8}\n", percentile(&samples, 50), percentile(&samples, 99)));
    }
    lines
}

/// The sample below which so many percent lie (nearest rank).
fn percentile(sorted: &[u64], percent: usize) -> u64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or_default()
}

/// All stages in one cell.
pub(crate) fn stage_cell(stages: &Stages) -> String {
    let Stages { shell, send, map, restore, run } = stages;
    format!("{shell}+{send}+{map}+{restore}+{run}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples() {
        let samples: Vec<u64> = (1..=100).collect();
        assert_eq!((percentile(&samples, 50), percentile(&samples, 99)), (50, 99));
        assert_eq!((percentile(&[7], 50), percentile(&[7], 99)), (7, 7));
        assert_eq!(percentile(&[], 50), 0);
    }
}
