//! What is shown, as text of one frame: a function of a snapshot and of where the user is. No I/O.

use ratatui::Frame;
use ratatui::layout::{Alignment, Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Text};
use ratatui::widgets::{Block, Borders, Cell, Paragraph, Row, Table, TableState};

use super::snapshot::{Host, Job, Snapshot, Template};
use crate::cli::output::{self, printable};
use crate::cli::size;

/// Cells of a bar.
const BAR: u64 = 14;
/// From this width on there is room for more.
const WIDE: u16 = 120;

/// A part of the screen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Panel {
    #[default]
    Hosts,
    Templates,
    Jobs,
}

impl Panel {
    const ALL: [Self; 3] = [Self::Hosts, Self::Templates, Self::Jobs];
}

/// Where the user is.
#[derive(Clone, Debug, Default)]
pub(super) struct View {
    /// Of whom it is asked, as the user calls it.
    pub(super) whom: String,
    panel: Panel,
    /// The line of each panel.
    lines: [usize; 3],
}

impl View {
    pub(super) fn of(whom: String) -> Self {
        Self { whom, ..Self::default() }
    }

    /// To another panel, forwards or back.
    pub(super) fn turn(&mut self, is_forwards: bool) {
        let step = if is_forwards { 1 } else { 2 };
        self.panel = Panel::ALL[(self.panel as usize + step) % 3];
    }

    /// Up or down by so many lines of what there is.
    pub(super) fn go(&mut self, by: isize, snapshot: &Snapshot) {
        let last = count(snapshot, self.panel).saturating_sub(1);
        let line = &mut self.lines[self.panel as usize];
        // What was there may have gone.
        *line = (*line).min(last).saturating_add_signed(by).min(last);
    }
}

fn count(snapshot: &Snapshot, panel: Panel) -> usize {
    match panel {
        Panel::Hosts => snapshot.hosts.len(),
        Panel::Templates => snapshot.templates.len(),
        Panel::Jobs => snapshot.jobs.len(),
    }
}

/// One frame.
pub(super) fn draw(frame: &mut Frame<'_>, snapshot: &Snapshot, view: &View) {
    let [head, body, status] =
        Layout::vertical([Constraint::Length(1), Constraint::Min(0), Constraint::Length(1)]).areas(frame.area());
    let running: u64 = snapshot.hosts.iter().filter_map(|host| host.machines).sum();
    let forks: f64 = snapshot.hosts.iter().filter_map(|host| host.forks_per_s).sum();
    let title = format!("farfork top  {}  {running} machines, {forks:.0} forks/s", clean(&view.whom));
    frame.render_widget(Paragraph::new(title).style(Modifier::BOLD), head);
    // Where the user is there is most room.
    let share = |panel| Constraint::Fill(if panel == view.panel { 2 } else { 1 });
    let areas: [Rect; 3] = Layout::vertical(Panel::ALL.map(share)).areas(body);
    for (panel, area) in Panel::ALL.into_iter().zip(areas) {
        draw_panel(frame, area, panel, snapshot, view);
    }
    let (text, style) = if snapshot.troubles.is_empty() {
        ("q leaves, tab and arrows choose".to_owned(), Style::new().fg(Color::DarkGray))
    } else {
        (clean(&snapshot.troubles.join("; ")), Style::new().fg(Color::Yellow))
    };
    frame.render_widget(Paragraph::new(text).style(style), status);
}

fn draw_panel(frame: &mut Frame<'_>, area: Rect, panel: Panel, snapshot: &Snapshot, view: &View) {
    let is_chosen = panel == view.panel;
    let count = count(snapshot, panel);
    let (what, columns) = match panel {
        Panel::Hosts => ("hosts", host_columns(area.width >= WIDE)),
        Panel::Templates => ("templates", template_columns()),
        Panel::Jobs => ("jobs", job_columns()),
    };
    let style = if is_chosen { Style::new().fg(Color::Cyan) } else { Style::new().fg(Color::DarkGray) };
    let block = Block::new().borders(Borders::TOP).border_style(style).title(format!(" {what} {count} "));
    let rows: Vec<Row<'_>> = match panel {
        Panel::Hosts => snapshot.hosts.iter().map(|of| row(&columns, &host(of), color(of))).collect(),
        Panel::Templates => snapshot.templates.iter().map(|of| row(&columns, &template(of), None)).collect(),
        Panel::Jobs => {
            snapshot.jobs.iter().map(|of| row(&columns, &job(of), (of.failed > 0).then_some(Color::Yellow))).collect()
        }
    };
    let head = Row::new(columns.iter().map(|column| cell(column.head, column))).style(Modifier::DIM);
    let mut table = Table::new(rows, columns.iter().map(|column| column.width)).header(head).block(block);
    if is_chosen {
        table = table.row_highlight_style(Modifier::REVERSED);
    }
    let line = view.lines[panel as usize].min(count.saturating_sub(1));
    let mut state = TableState::new().with_selected((count > 0).then_some(line));
    frame.render_stateful_widget(table, area, &mut state);
}

/// A column: which of a row's texts it shows, and how.
struct Column {
    head: &'static str,
    of: usize,
    width: Constraint,
    is_number: bool,
}

fn text(head: &'static str, of: usize, width: Constraint) -> Column {
    Column { head, of, width, is_number: false }
}

fn number(head: &'static str, of: usize, width: u16) -> Column {
    Column { head, of, width: Constraint::Length(width), is_number: true }
}

fn host_columns(is_wide: bool) -> Vec<Column> {
    let mut columns = vec![
        text("HOST", 0, Constraint::Min(8)),
        text("STATE", 1, Constraint::Length(8)),
        number("MACHINES", 2, 11),
        number("MEMORY", 3, 15),
        number("FORKS/s", 4, 7),
        number("IN/s", 5, 9),
        number("SETTLED", 7, 8),
    ];
    if is_wide {
        columns.insert(6, number("OUT/s", 6, 9));
    }
    columns
}

fn template_columns() -> Vec<Column> {
    let image = text("IMAGE", 1, Constraint::Length(12));
    vec![text("TEMPLATE", 0, Constraint::Min(16)), image, number("HOLDERS", 2, 12), number("CHILDREN", 3, 9)]
}

fn job_columns() -> Vec<Column> {
    let bar = text("", 2, Constraint::Length(14));
    let (name, template) = (text("JOB", 0, Constraint::Min(10)), text("TEMPLATE", 1, Constraint::Max(12)));
    vec![name, template, bar, number("DONE", 3, 15), number("FAILED", 4, 7), number("PLACED", 5, 7), number("TASKS/s", 6, 7)]
}

fn host(of: &Host) -> [String; 8] {
    let state = match (of.is_draining, of.is_cordoned, &*of.life) {
        (true, _, "up") => "draining",
        (_, true, "up") => "cordoned",
        (.., life) => life,
    };
    let name = if of.is_leader { format!("{} *", of.name) } else { of.name.clone() };
    let machines = match (of.machines, of.machines_max) {
        (Some(now), Some(max)) => format!("{now}/{max}"),
        (now, _) => or_dash(now),
    };
    let memory = match (of.taken_bytes, of.capacity_bytes) {
        (Some(taken), Some(capacity)) => share(taken, capacity),
        _ => "-".to_owned(),
    };
    let bytes = |rate: Option<u64>| rate.map_or_else(|| "-".to_owned(), size::bytes);
    let forks = of.forks_per_s.map(|rate| format!("{rate:.0}"));
    let (bytes_in, bytes_out) = (bytes(of.in_bytes_per_s), bytes(of.out_bytes_per_s));
    let settled = of.settled.map(|settled| and_arriving(settled, of.arriving.unwrap_or_default()));
    [name, state.to_owned(), machines, memory, or_dash(forks), bytes_in, bytes_out, or_dash(settled)]
}

fn template(of: &Template) -> [String; 4] {
    let image = match (&of.building, &of.image) {
        (Some(stage), _) => format!("{stage}..."),
        (None, Some(image)) => image.chars().take(12).collect(),
        (None, None) => "-".to_owned(),
    };
    let holders = and_arriving(of.complete, of.holders.saturating_sub(of.complete));
    [of.name.clone(), image, holders, of.children.to_string()]
}

fn job(of: &Job) -> [String; 7] {
    let done = of.succeeded.saturating_add(of.failed);
    let name = of.name.clone().unwrap_or_else(|| of.id.chars().skip(28).collect());
    let rate = if of.is_ended { "ended".to_owned() } else { or_dash(of.tasks_per_s.map(|rate| format!("{rate:.1}"))) };
    let filled = (u64::from(done) * BAR).checked_div(u64::from(of.tasks)).unwrap_or(BAR).min(BAR);
    let bar = (0..BAR).map(|at| if at < filled { '█' } else { '·' }).collect();
    let counts = (format!("{done}/{}", of.tasks), of.failed.to_string(), of.placed.to_string());
    [name, of.template.clone(), bar, counts.0, counts.1, counts.2, rate]
}

/// `3 + 1`: what is all there, and what only some of is.
fn and_arriving(complete: u64, arriving: u64) -> String {
    if arriving == 0 { complete.to_string() } else { format!("{complete} + {arriving}") }
}

fn color(of: &Host) -> Option<Color> {
    match &*of.life {
        "up" => None,
        "suspect" => Some(Color::Yellow),
        _ => Some(Color::Red),
    }
}

fn row<const N: usize>(columns: &[Column], texts: &[String; N], color: Option<Color>) -> Row<'static> {
    let row = Row::new(columns.iter().map(|column| cell(&clean(&texts[column.of]), column)));
    row.style(color.map_or_else(Style::new, |color| Style::new().fg(color)))
}

fn cell(text: &str, column: &Column) -> Cell<'static> {
    let alignment = if column.is_number { Alignment::Right } else { Alignment::Left };
    Cell::new(Text::from(Line::from(text.to_owned()).alignment(alignment)))
}

/// All of it without a screen.
pub(super) fn tables(snapshot: &Snapshot) -> String {
    let hosts = snapshot.hosts.iter().map(|of| host(of).map(|text| clean(&text))).collect();
    let templates = snapshot.templates.iter().map(|of| template(of).map(|text| clean(&text))).collect();
    let jobs = snapshot.jobs.iter().map(|of| job(of).map(|text| clean(&text))).collect();
    let heads = ["HOST", "STATE", "MACHINES", "MEMORY", "FORKS/s", "IN/s", "OUT/s", "SETTLED"];
    [
        output::table(heads, &[2, 3, 4, 5, 6, 7], hosts),
        output::table(["TEMPLATE", "IMAGE", "HOLDERS", "CHILDREN"], &[2, 3], templates),
        output::table(["JOB", "TEMPLATE", "", "DONE", "FAILED", "PLACED", "TASKS/s"], &[3, 4, 5, 6], jobs),
    ]
    .join("\n")
}

/// One line, which does not command the terminal.
fn clean(text: &str) -> String {
    printable(text).replace('\n', "\u{FFFD}")
}

/// `1.2/21.2 GiB`, both in the larger one's unit.
fn share(part: u64, of: u64) -> String {
    let unit = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)].into_iter().find(|(_, shift)| of >> shift > 0);
    let (name, shift) = unit.unwrap_or(("B", 0));
    let in_unit = |bytes: u64| {
        let tenths = (u128::from(bytes) * 10) >> shift;
        format!("{}.{}", tenths / 10, tenths % 10)
    };
    format!("{}/{} {name}", in_unit(part), in_unit(of))
}

fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

#[cfg(test)]
mod tests;
