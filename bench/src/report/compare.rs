//! `bench compare`: what moved between two runs of the same bench, beyond what chance moves.
//!
//! Medians are compared. How far a median would move if the same machine were measured again is found by drawing from the samples
//! themselves (the bootstrap): a change counts if it is outside of what 95 of 100 such draws give; of many rows that have not changed one
//! in twenty is still said to have. What is counted and not timed has one sample or a few, and no chance: there any change counts.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use comfy_table::{CellAlignment, Table, presets};

use super::{Machine, Report, Samples};

/// Draws from the samples of each row.
const DRAWS: usize = 2000;
/// Of the draws: what lies between is what chance does.
const CHANCE: [usize; 2] = [50, 1949];
/// Fewer say nothing of chance.
const SAMPLES_MIN: usize = 5;
/// The same draws each time: two people see the same verdict.
const SEED: u64 = 0x000F_A8F0_8C00;

/// What became of a set of samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Same,
    Less,
    More,
}

struct Change {
    name: String,
    before: f64,
    after: f64,
    /// 95 of 100 draws are within.
    between: [f64; 2],
    verdict: Verdict,
}

impl Change {
    fn of(name: &str, before: &Samples, after: &Samples) -> Self {
        let (p50, then) = (before.p50(), after.p50());
        let mut dice = fastrand::Rng::with_seed(SEED);
        let mut ratios: Vec<f64> = (0..DRAWS).map(|_| ratio(drawn(before, &mut dice), drawn(after, &mut dice))).collect();
        ratios.sort_by(f64::total_cmp);
        let is_counted = before.n().min(after.n()) < SAMPLES_MIN;
        let between = if is_counted { [ratio(p50, then); 2] } else { CHANCE.map(|rank| ratios[rank]) };
        let verdict = match between {
            [low, _] if low > 1.0 => Verdict::More,
            [_, high] if high < 1.0 => Verdict::Less,
            _ => Verdict::Same,
        };
        Self { name: name.to_owned(), before: p50, after: then, between, verdict }
    }

    fn ratio(&self) -> f64 {
        ratio(self.before, self.after)
    }
}

/// What is nothing and stays so has not moved.
fn ratio(before: f64, after: f64) -> f64 {
    if before == after { 1.0 } else { after / before.max(f64::MIN_POSITIVE) }
}

/// The median of as many samples, each drawn from all.
fn drawn(samples: &Samples, dice: &mut fastrand::Rng) -> f64 {
    let drawn = (0..samples.n()).map(|_| samples.0[dice.usize(..samples.n())]).collect();
    Samples::from_us(drawn).p50()
}

/// Prints what moved. Fails if something lost more than `fail_over` percent, beyond chance.
pub(crate) fn run(before: &Path, after: &Path, fail_over: f64, all: bool) -> Result<ExitCode> {
    let (old, new) = (Report::read(before)?, Report::read(after)?);
    let of = |report: &Report, name: &String| Samples::from_us(report.samples[name].clone());
    let both = old.samples.keys().filter(|name| new.samples.contains_key(*name));
    let changes: Vec<Change> = both.map(|name| Change::of(name, &of(&old, name), &of(&new, name))).collect();
    ensure!(!changes.is_empty(), "the two files have no samples of the same name: are they of the same bench?");
    new.samples.keys().filter(|name| !old.samples.contains_key(*name)).for_each(|name| println!("new: {name}"));
    let missing: Vec<&String> = old.samples.keys().filter(|name| !new.samples.contains_key(*name)).collect();
    missing.iter().for_each(|name| println!("not measured any more: {name}"));
    let circumstances = |report: &Report| {
        let Machine { cpu, cores, kernel, quick, .. } = &report.machine;
        format!("{cores} cores of {cpu}, Linux {kernel}{}", if *quick { ", --quick" } else { "" })
    };
    let [before, after] = [&old, &new].map(circumstances);
    if before != after {
        println!("measured in different ways, so that only ratios to a control of the same run compare: {before}; {after}");
    }
    print(&changes, all);
    let lost: Vec<&Change> =
        changes.iter().filter(|change| change.verdict == Verdict::More && change.ratio() > 1.0 + fail_over / 100.0).collect();
    for change in &lost {
        println!("lost more than {fail_over} %: {} ({:+.1} %)", change.name, (change.ratio() - 1.0) * 100.0);
    }
    Ok(if lost.is_empty() && missing.is_empty() { types::ExitCode::Ok } else { types::ExitCode::Partial }.into())
}

fn print(changes: &[Change], all: bool) {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["samples", "p50 before", "after", "change", "chance", ""]);
    let moved = |change: &&Change| all || matches!(change.verdict, Verdict::Less | Verdict::More);
    for change in changes.iter().filter(moved) {
        let percent = |ratio: f64| format!("{:+.1} %", (ratio - 1.0) * 100.0);
        let [low, high] = change.between.map(percent);
        let verdict = match change.verdict {
            Verdict::Same => "same",
            Verdict::Less => "less",
            Verdict::More => "MORE",
        };
        let number = |value: f64| format!("{value:.2}");
        table.add_row([
            change.name.clone(),
            number(change.before),
            number(change.after),
            percent(change.ratio()),
            format!("{low} to {high}"),
            verdict.to_owned(),
        ]);
    }
    for column in 1..5 {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    if table.row_count() > 0 {
        println!("{table}");
    }
    let count = |verdict| changes.iter().filter(|change| change.verdict == verdict).count();
    println!(
        "{} sets of samples: {} are less, {} are more, {} the same as far as one can tell",
        changes.len(),
        count(Verdict::Less),
        count(Verdict::More),
        count(Verdict::Same)
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noisy(seed: u64, middle: f64) -> Samples {
        let mut dice = fastrand::Rng::with_seed(seed);
        Samples::from_us((0..100).map(|_| middle * (0.8 + 0.4 * dice.f64())).collect())
    }

    #[test]
    fn a_change_counts_beyond_chance_alone() {
        let verdict = |before: &Samples, after: &Samples| Change::of("row", before, after).verdict;
        assert_eq!(verdict(&noisy(1, 100.0), &noisy(2, 100.0)), Verdict::Same);
        assert_eq!(verdict(&noisy(1, 100.0), &noisy(2, 120.0)), Verdict::More);
        assert_eq!(verdict(&noisy(1, 100.0), &noisy(2, 80.0)), Verdict::Less);
        let one = |value| Samples::from_us(vec![value]);
        assert_eq!(verdict(&one(9.0), &one(455.0)), Verdict::More, "what is counted has no chance");
        let none = Samples::from_us(vec![0.0; 20]);
        assert_eq!(verdict(&none, &none), Verdict::Same);
        assert_eq!((verdict(&one(9.0), &one(9.0)), verdict(&one(0.0), &one(3.0))), (Verdict::Same, Verdict::More));
    }
}
