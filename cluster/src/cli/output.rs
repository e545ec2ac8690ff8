//! What verbs print: tables for people, or exactly what the API answered.

use std::io::{self, Write};

use clap::ValueEnum;
use comfy_table::{CellAlignment, Table, presets};
use uuid::Uuid;

use super::error::CliError;
use crate::node::ShortId;

/// How to print answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people
    Table,
    /// For programs: what the API answers
    Json,
}

impl Output {
    /// Prints an answer.
    ///
    /// # Errors
    /// [`CliError::Closed`], [`CliError::Print`].
    pub fn answer(self, raw: &[u8], for_people: impl FnOnce() -> String) -> Result<(), CliError> {
        match self {
            Self::Json => {
                print(raw)?;
                print(b"\n")
            }
            Self::Table => print(printable(&for_people()).as_bytes()),
        }
    }
}

/// Prints to stdout.
///
/// # Errors
/// [`CliError::Closed`] if nobody reads it any more, which is no failure; [`CliError::Print`].
pub fn print(bytes: &[u8]) -> Result<(), CliError> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => CliError::Closed,
        _ => CliError::Print(error),
    })
}

/// What guests print and other nodes say must not command the terminal of whoever looks at it.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{FFFD}' } else { c }).collect()
}

/// A table without lines; the columns of `numbers` are aligned to the right.
pub(crate) fn table<const N: usize>(head: [&str; N], numbers: &[usize], rows: Vec<[String; N]>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(head);
    for row in rows {
        table.add_row(row);
    }
    for (position, column) in table.column_iter_mut().enumerate() {
        // No space before the first column, two between columns.
        column.set_padding((0, 2));
        if numbers.contains(&position) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let mut text = table.trim_fmt();
    text.push('\n');
    text
}

/// A duration for people, from microseconds.
pub(crate) fn time(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} us"),
        1_000..1_000_000 => format!("{}.{} ms", us / 1_000, us % 1_000 / 100),
        _ => format!("{}.{:02} s", us / 1_000_000, us % 1_000_000 / 10_000),
    }
}

/// The short form of an id for a table.
pub(crate) fn short(id: &Uuid) -> String {
    ShortId::of(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_commands_the_terminal() {
        assert_eq!(printable("ok\n\u{1b}[2Jgone\r\u{9b}K\n"), "ok\n\u{FFFD}[2Jgone\u{FFFD}\u{FFFD}K\n");
    }
}
