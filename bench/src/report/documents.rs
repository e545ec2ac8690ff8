//! Numbers in documents. They are written there from `docs/figures.json`, which `bench report` makes of one run, between marks that
//! nobody sees in the rendered text; a test finds those that are stale.
//!
//! ```text
//! <!-- figures cluster C1 C2 -->            all rows of a bench with these ids that have a target, as a table
//! <!-- /figures -->
//! <!-- figures cluster all C1 -->           those that only inform, too
//! <!-- /figures -->
//! <!-- value cluster; C1; (wall; p50 -->3.7 %<!-- / -->     of the row whose text begins so
//! ```

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use time::OffsetDateTime;

use super::{HEADER, Report, Row, in_words, page};

/// What is committed of a run: its rows, and a picture.
const FIGURES: &str = "docs/figures.json";
const PICTURE: &str = "docs/forks.svg";
const DOCUMENTS: [&str; 2] = ["README.md", "docs/specification.md"];

/// By bench, without samples.
type Figures = BTreeMap<String, Report>;

fn read(path: &Path) -> Result<Figures> {
    let bytes = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("{} is not what `bench report` writes", path.display()))
}

/// Writes the numbers of a run into the documents of the repository: of the one that `bench report` made a page of in `from`, or of the
/// one that is there.
pub(crate) fn run(root: &Path, from: Option<&Path>) -> Result<()> {
    let read_text = |path: &Path| std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()));
    let mut all = Vec::new();
    let figures = match from {
        None => read(&root.join(FIGURES))?,
        Some(from) => {
            let figures = read(&from.join("figures.json"))?;
            let (picture, described) = (read_text(&from.join("forks.svg"))?, page::description(&page::commits(&figures)));
            ensure!(picture.contains(&described), "forks.svg is not of the run of figures.json: {described}");
            all.extend([(FIGURES, read_text(&from.join("figures.json"))?), (PICTURE, picture)]);
            figures
        }
    };
    for document in DOCUMENTS {
        let text = read_text(&root.join(document))?;
        all.push((document, rewritten(&text, &figures).with_context(|| document.to_owned())?));
    }
    // All or nothing: the numbers of two runs are not to be mixed.
    for (name, text) in all {
        let path = root.join(name);
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        println!("{name}");
    }
    Ok(())
}

/// The text with what is between its marks as the figures are.
fn rewritten(text: &str, figures: &Figures) -> Result<String> {
    let tables = between(text, "<!-- figures ", "<!-- /figures -->", |mark| Ok(format!("\n{}", table(mark, figures)?)))?;
    between(&tables, "<!-- value ", "<!-- / -->", |mark| value(mark, figures))
}

/// Replaces what is between an opening mark, whose own text says by what, and a closing one.
fn between(text: &str, opens: &str, closes: &str, by: impl Fn(&str) -> Result<String>) -> Result<String> {
    let (mut written, mut rest) = (String::new(), text);
    while let Some((before, after)) = rest.split_once(opens) {
        let (mark, after) = after.split_once(" -->").with_context(|| format!("{opens:?} has no end"))?;
        let (old, after) = after.split_once(closes).with_context(|| format!("\"{opens}{mark} -->\" has no {closes:?}"))?;
        ensure!(!old.contains(opens), "\"{opens}{mark} -->\" has no {closes:?} before the next one");
        write!(written, "{before}{opens}{mark} -->{}{closes}", by(mark)?)?;
        rest = after;
    }
    Ok(written + rest)
}

fn of<'a>(figures: &'a Figures, bench: &str) -> Result<&'a Report> {
    figures.get(bench).with_context(|| format!("{FIGURES} has nothing of bench {bench:?}"))
}

fn table(mark: &str, figures: &Figures) -> Result<String> {
    let (bench, ids) = mark.split_once(' ').with_context(|| format!("\"figures {mark}\" names no rows"))?;
    let (all, ids) = ids.strip_prefix("all ").map_or((false, ids), |ids| (true, ids));
    let ids: Vec<&str> = ids.split(' ').collect();
    let report = of(figures, bench)?;
    let machine = &report.machine;
    let date = OffsetDateTime::from_unix_timestamp(i64::try_from(machine.unix_time)?)?.date();
    let quick = if machine.quick { ", --quick" } else { "" };
    let mut text = format!("\n`bench {bench}{quick}` at commit {}, {date}, {}:\n\n", machine.commit, machine.in_words());
    write!(text, "| {} |\n|{}\n", HEADER.join(" | "), "---|".repeat(HEADER.len()))?;
    let wanted = |row: &&Row| ids.contains(&row.id.as_str()) && (all || row.met.is_some() || !row.reach.is_empty());
    let rows: Vec<&Row> = report.results.iter().filter(wanted).collect();
    for id in &ids {
        let is_left_out = report.left_out.contains(*id);
        ensure!(is_left_out || rows.iter().any(|row| row.id == *id), "bench {bench} has no row {id} with a target");
    }
    for row in rows {
        writeln!(text, "| {} |", row.cells().map(|cell| cell.replace('|', "\\|")).join(" | "))?;
    }
    for note in report.notes.iter().filter(|note| ids.iter().any(|id| note.split([' ', ',', ':']).any(|word| word == *id))) {
        write!(text, "\n{note}\n")?;
    }
    text.push('\n');
    Ok(text)
}

fn value(mark: &str, figures: &Figures) -> Result<String> {
    let [bench, id, what, field] = mark.split("; ").collect::<Vec<_>>()[..] else {
        bail!("\"value {mark}\" is not: bench; row; how its text begins; field");
    };
    let rows = of(figures, bench)?.results.iter();
    let mut rows = rows.filter(|row| row.id == id && row.what.trim_start().starts_with(what));
    let row = rows.next().with_context(|| format!("bench {bench} has no row {id} that begins with {what:?}"))?;
    ensure!(rows.next().is_none(), "several rows {id} of bench {bench} begin with {what:?}");
    Ok(match field {
        "p50" => in_words(row.p50, &row.unit),
        "p99" => in_words(row.p99, &row.unit),
        "n" => row.n.to_string(),
        "ratio" => format!("{:.2}", row.ratio.with_context(|| format!("row {id} {what:?} has no control"))?),
        _ => bail!("{field:?} is none of p50, p99, n, ratio"),
    })
}

#[cfg(test)]
mod tests {

    use super::*;

    fn root() -> &'static Path {
        Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
    }

    #[test]
    fn numbers_in_documents_are_those_of_the_run() {
        let figures = read(&root().join(FIGURES)).unwrap();
        for document in DOCUMENTS {
            let text = std::fs::read_to_string(root().join(document)).unwrap();
            let written = rewritten(&text, &figures).unwrap();
            assert!(written == text, "numbers in {document} are not those of {FIGURES}: `bench documents` writes them");
        }
        let picture = std::fs::read_to_string(root().join(PICTURE)).unwrap();
        let described = page::description(&page::commits(&figures));
        assert!(picture.contains(&described), "{PICTURE} is not of the run of {FIGURES}: {described}");
    }

    #[test]
    fn what_is_between_marks_is_replaced_and_marks_that_mean_nothing_are_refused() {
        let figures = read(&root().join(FIGURES)).unwrap();
        let stale = "C1 takes <!-- value cluster; C1; (wall; p50 -->old<!-- / --> more.\n";
        let written = rewritten(stale, &figures).unwrap();
        assert!(!written.contains("old") && written.ends_with("<!-- / --> more.\n"), "{written}");
        assert_eq!(rewritten(&written, &figures).unwrap(), written);
        let table = rewritten("<!-- figures cluster C1 -->\nold\n<!-- /figures -->\n", &figures).unwrap();
        assert!(table.contains("| C1 |") && !table.contains("old") && !table.contains("| C2 |"), "{table}");
        for bad in [
            "<!-- value cluster; C1; (wall; p51 -->x<!-- / -->",
            "<!-- value cluster; C1; nothing; p50 -->x<!-- / -->",
            "<!-- value nowhere; C1; (wall; p50 -->x<!-- / -->",
            "<!-- value cluster; C1; (wall; p50 -->x",
            "<!-- figures cluster C99 -->x<!-- /figures -->",
            "<!-- figures cluster -->x<!-- /figures -->",
        ] {
            assert!(rewritten(bad, &figures).is_err(), "{bad}");
        }
    }
}
