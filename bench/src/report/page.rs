//! `bench report`: one page of all benches, as HTML that stands for itself and as Markdown beside its pictures.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result};
use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::figures::{self, Ablation, Drawn, Figure, Measured};
use super::{HEADER, Machine, Report, Row, in_words};

/// What `make bench` leaves, in the order of the page.
const BENCHES: [(&str, &str); 7] = [
    ("floor", "The floor: bare system calls"),
    ("workers", "Local forks, jailed (L1 to L5, L7)"),
    ("local", "Local forks in one process (L6 to L8)"),
    ("node", "The API (C2)"),
    ("cluster", "The cluster (C1 to C5)"),
    ("linux", "Linux guests (G1 to G4)"),
    ("remote", "Forks on another host (R1 to R9)"),
];

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1f2937}\
    table{border-collapse:collapse;font-size:14px;width:100%}th,td{padding:.25rem .5rem;border-bottom:1px solid #e5e7eb;text-align:left}\
    td.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}td.no{color:#b91c1c;font-weight:600}\
    figure{margin:2rem 0}figure svg{max-width:100%;height:auto}figcaption{color:#4b5563}summary{cursor:pointer;font-size:1.2rem;margin:1rem 0}";

/// Reads what `make bench` has written there, and writes the report beside it, and its rows alone as `figures.json`.
pub(crate) fn run(directory: &Path) -> Result<()> {
    let mut reports = BTreeMap::new();
    for (bench, _) in BENCHES {
        let file = directory.join(format!("{bench}.json"));
        let report = Report::read(&file)
            .with_context(|| format!("the report is of all benches; `bench {bench} --json {}` makes it", file.display()))?;
        reports.insert(bench, report);
    }
    let measured = Measured::of(&reports);
    let (figures, ablations) = (figures::all(&measured)?, figures::ablations(&measured)?);
    // Those of a run before, which may have had more.
    for (name, _) in figures::ALL {
        let old = directory.join(picture(name));
        match std::fs::remove_file(&old) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("removing {}", old.display()));
            }
            _ => {}
        }
    }
    for (name, figure) in &figures.whole {
        write(&directory.join(picture(name)), &described(&figure.svg, &commits(&reports)))?;
    }
    write(&directory.join("report.html"), &page(&reports, &figures, &ablations).into_string())?;
    write(&directory.join("report.md"), &markdown(&reports, &figures, &ablations)?)?;
    println!("{}", directory.join("report.html").display());
    // What is committed of it: rows, which documents take their numbers from.
    reports.values_mut().for_each(|report| report.samples.clear());
    write(&directory.join("figures.json"), &(serde_json::to_string_pretty(&reports)? + "\n"))
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

fn picture(name: &str) -> String {
    format!("{name}.svg")
}

/// Of which code all this is.
pub(super) fn commits<'a, B: Ord>(reports: &'a BTreeMap<B, Report>) -> String {
    let commits: BTreeSet<&'a str> = reports.values().map(|report| report.machine.commit.as_str()).collect();
    commits.into_iter().collect::<Vec<_>>().join("; ")
}

/// A picture that says of which code it is, wherever it goes.
fn described(svg: &str, commits: &str) -> String {
    svg.replacen('>', &format!("><desc>{}</desc>", description(commits)), 1)
}

pub(super) fn description(commits: &str) -> String {
    format!("farfork at {commits}")
}

/// What is true of all of it, or that it is not of one piece.
fn circumstances(reports: &BTreeMap<&str, Report>) -> Vec<String> {
    let machines = || reports.values().map(|report| &report.machine);
    let hosts: BTreeSet<String> = machines().map(Machine::in_words).collect();
    let commits = commits(reports);
    let hosts: Vec<String> = hosts.into_iter().collect();
    let mut lines = vec![format!("{}.", hosts.join("; ")), format!("Commit {commits}.")];
    if hosts.len() > 1 || commits.contains(';') {
        lines.push("Not of one run: figures of different benches are not to be compared.".to_owned());
    }
    if machines().any(|machine| machine.quick) {
        lines.push("Some of it was measured with --quick: fewer samples than the specification asks for.".to_owned());
    }
    let rows = || reports.values().flat_map(|report| &report.results).filter_map(|row| row.met);
    lines.push(format!("{} of {} targets are met.", rows().filter(|met| *met).count(), rows().count()));
    lines
}

fn page(reports: &BTreeMap<&str, Report>, figures: &Drawn<(&str, Figure)>, ablations: &Drawn<Ablation>) -> Markup {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width";
                title { "farfork: figures" }
                style { (PreEscaped(STYLE)) }
            }
            body {
                h1 { "farfork: figures" }
                p { (circumstances(reports).join(" ")) }
                p { "Every figure beside its control of the same run; raw samples are in the JSON files beside this page." }
                @for (_, figure) in &figures.whole {
                    figure {
                        h2 { (figure.title) }
                        (PreEscaped(&figure.svg))
                        figcaption { (figure.caption) }
                    }
                }
                @for missing in &figures.left_out { p { (missing) } }
                h2 { "Ablations" }
                p { (ABLATIONS) }
                table {
                    tr { @for title in ABLATION_HEADER { th { (title) } } }
                    @for ablation in &ablations.whole {
                        @let [what, of, with, without, ratio, verdict] = ablation_cells(ablation);
                        tr {
                            td { (what) }
                            td { (of) }
                            @for number in [with, without, ratio] { td.n { (number) } }
                            td.no[ablation.wins()] { (verdict) }
                        }
                    }
                }
                @for missing in &ablations.left_out { p { (missing) } }
                @for (bench, title) in BENCHES {
                    details open {
                        summary { (title) }
                        (rows(&reports[bench].results))
                        @for note in &reports[bench].notes { p { (note) } }
                    }
                }
            }
        }
    }
}

fn rows(rows: &[Row]) -> Markup {
    html! {
        table {
            tr { @for title in HEADER { th { (title) } } }
            @for row in rows {
                @let [id, what, n, p50, p99, control, ratio, reach, met] = row.cells();
                tr {
                    td { (id) }
                    td { (what) }
                    @for number in [n, p50, p99, control, ratio] { td.n { (number) } }
                    td { (reach) }
                    td.no[met == "NO"] { (met) }
                }
            }
        }
    }
}

const ABLATIONS: &str = "What each mechanism is worth: the same measured without it. Where leaving it out is faster, it has to have another reason.";
const ABLATION_HEADER: [&str; 6] = ["mechanism", "what is timed", "with it", "without", "without / with", ""];

fn ablation_cells(ablation: &Ablation) -> [String; 6] {
    let us = |value| in_words(value, "us");
    let verdict = if ablation.wins() { "faster without" } else { "" };
    [
        ablation.what.to_owned(),
        ablation.of.to_owned(),
        us(ablation.with),
        us(ablation.without),
        format!("{:.2}", ablation.without / ablation.with),
        verdict.to_owned(),
    ]
}

fn markdown(reports: &BTreeMap<&str, Report>, figures: &Drawn<(&str, Figure)>, ablations: &Drawn<Ablation>) -> Result<String> {
    let mut text = format!("# farfork: figures\n\n{}\n", circumstances(reports).join(" "));
    for (name, figure) in &figures.whole {
        write!(text, "\n## {}\n\n![{}]({})\n\n{}\n", figure.title, figure.title, picture(name), figure.caption)?;
    }
    figures.left_out.iter().try_for_each(|missing| write!(text, "\n{missing}\n"))?;
    let head = ABLATION_HEADER.join(" | ");
    write!(text, "\n## Ablations\n\n{ABLATIONS}\n\n| {head} |\n|{}\n", "---|".repeat(ABLATION_HEADER.len()))?;
    for ablation in &ablations.whole {
        writeln!(text, "| {} |", ablation_cells(ablation).join(" | "))?;
    }
    ablations.left_out.iter().try_for_each(|missing| write!(text, "\n{missing}\n"))?;
    for (bench, title) in BENCHES {
        write!(text, "\n## {title}\n\n| {} |\n|{}\n", HEADER.join(" | "), "---|".repeat(HEADER.len()))?;
        for row in &reports[bench].results {
            writeln!(text, "| {} |", row.cells().map(|cell| cell.replace('|', "\\|")).join(" | "))?;
        }
        for note in &reports[bench].notes {
            write!(text, "\n{note}\n")?;
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::super::Samples;
    use super::*;

    #[test]
    fn a_table_keeps_its_columns_whatever_is_in_it() {
        let row = Row::new("L1", "a|b <i>", &Samples::from_us(vec![1500.0]), Some(1000.0)).reaching("<= 1x", false);
        let html = rows(&[row]).into_string();
        assert!(
            html.contains("a|b &lt;i&gt;") && html.contains("<td class=\"no\">NO</td>") && html.contains("1.50 ms"),
            "{html}"
        );
    }
}
