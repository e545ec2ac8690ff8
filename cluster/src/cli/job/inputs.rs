//! What the tasks of a job are given: read, and counted, before a node is asked.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde::de::IgnoredAny;

use super::error::JobError;
use super::limits::{INPUT_MAX, REQUEST_MAX, TASKS_MAX};
use super::spec::InputsFrom;
use crate::api::wire::Inputs;
use crate::cli::error::CliError;

pub(super) fn read(from: InputsFrom) -> Result<Inputs, CliError> {
    let list = match from {
        InputsFrom::Count(count) => return Ok(Inputs::Count(count)),
        InputsFrom::List(list) => list,
        InputsFrom::Range(range) => range.map(|number| number.to_string()).collect(),
        InputsFrom::Lines(path) => {
            let (name, bytes) = contents(&path)?;
            lines(&name, bytes)?
        }
        InputsFrom::Json(path) => {
            let (name, bytes) = contents(&path)?;
            let list = lines(&name, bytes)?;
            json(&name, &list)?;
            list
        }
    };
    if list.is_empty() {
        return Err(JobError::NoInputs { from: "the command line".to_owned() }.into());
    }
    if let Some(at) = list.iter().position(|input| input.len() > INPUT_MAX) {
        return Err(JobError::InputTooLong { number: at, bytes: list[at].len() }.into());
    }
    counted(list.len())?;
    Ok(Inputs::List(list))
}

fn counted(count: usize) -> Result<(), JobError> {
    match u32::try_from(count) {
        Ok(tasks) if tasks <= TASKS_MAX => Ok(()),
        _ => Err(JobError::TooManyInputs { count: count as u64 }),
    }
}

/// All of a file, or of standard input, and what to call it. More than a request may have is not read.
fn contents(path: &Path) -> Result<(String, Vec<u8>), CliError> {
    let is_stdin = path == Path::new("-");
    let name = if is_stdin { "standard input".to_owned() } else { path.display().to_string() };
    let most = REQUEST_MAX as u64 + 1;
    let mut bytes = Vec::new();
    let read = if is_stdin {
        io::stdin().lock().take(most).read_to_end(&mut bytes)
    } else {
        File::open(path).and_then(|file| file.take(most).read_to_end(&mut bytes))
    };
    read.map_err(|source| CliError::Input { file: path.to_owned(), source })?;
    if bytes.len() > REQUEST_MAX {
        return Err(JobError::InputsTooLarge { from: name }.into());
    }
    Ok((name, bytes))
}

/// One input a line, without its end. An empty line is an empty input.
fn lines(from: &str, bytes: Vec<u8>) -> Result<Vec<String>, JobError> {
    let at_line = |line, why: String| JobError::Line { from: from.to_owned(), line, why };
    let text = String::from_utf8(bytes).map_err(|error| {
        let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        at_line(1 + before.iter().filter(|byte| **byte == b'\n').count(), "it is no UTF-8".to_owned())
    })?;
    if text.is_empty() {
        return Err(JobError::NoInputs { from: from.to_owned() });
    }
    counted(text.lines().count())?;
    let each = text.lines().enumerate().map(|(at, line)| match line.len() {
        bytes if bytes > INPUT_MAX => Err(at_line(at + 1, format!("{bytes} bytes; an input has at most {INPUT_MAX}"))),
        _ => Ok(line.to_owned()),
    });
    each.collect()
}

fn json(from: &str, list: &[String]) -> Result<(), JobError> {
    for (at, line) in list.iter().enumerate() {
        serde_json::from_str::<IgnoredAny>(line).map_err(|error| JobError::Line {
            from: from.to_owned(),
            line: at + 1,
            why: format!("it is no JSON: {}", without_place(&error)),
        })?;
    }
    Ok(())
}

/// The line within a line would only confuse.
fn without_place(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let cut = text.rfind(" at line ").unwrap_or(text.len());
    format!("{}, column {}", &text[..cut], error.column())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn lines_of(bytes: &[u8]) -> Result<Inputs, CliError> {
        read(InputsFrom::Lines(file(bytes).path().to_owned()))
    }

    fn jsonl_of(bytes: &[u8]) -> Result<Inputs, CliError> {
        read(InputsFrom::Json(file(bytes).path().to_owned()))
    }

    fn list(items: &[&str]) -> Inputs {
        Inputs::List(items.iter().map(|item| (*item).to_owned()).collect())
    }

    #[test]
    fn an_input_is_a_line_without_its_end() {
        assert_eq!(lines_of(b"a\n\n c \nd").unwrap(), list(&["a", "", " c ", "d"]));
        assert_eq!(lines_of(b"a\r\nb\r\n").unwrap(), list(&["a", "b"]));
        assert_eq!(lines_of(b"{index}\n").unwrap(), list(&["{index}"]));
        assert_eq!(read(InputsFrom::Range(-1..2)).unwrap(), list(&["-1", "0", "1"]));
        assert_eq!(jsonl_of(b"{\"a\": 1}\n[2]\n").unwrap(), list(&["{\"a\": 1}", "[2]"]));
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said_with_the_line() {
        let long = ["a\n".to_owned(), "x".repeat(INPUT_MAX + 1), "\n".to_owned()].concat();
        for (error, line, why) in [
            (lines_of(b"a\nb\n\xFFc\n").unwrap_err(), 3, "UTF-8"),
            (lines_of(long.as_bytes()).unwrap_err(), 2, "32769 bytes"),
            (jsonl_of(b"1\n{\"a\": }\n").unwrap_err(), 2, "expected value, column 7"),
            (jsonl_of(b"1\n\n2\n").unwrap_err(), 2, "JSON"),
        ] {
            assert!(error.to_string().contains(&format!(", line {line}: ")), "{error}");
            assert!(error.to_string().contains(why), "{error}");
            assert_eq!(error.code(), types::ExitCode::Usage);
        }
    }

    #[test]
    fn no_inputs_and_too_many_are_refused() {
        for error in [
            lines_of(b"").unwrap_err(),
            read(InputsFrom::List(Vec::new())).unwrap_err(),
            lines_of(&b"x\n".repeat(1_000_001)).unwrap_err(),
            read(InputsFrom::List(vec!["x".repeat(INPUT_MAX + 1)])).unwrap_err(),
            read(InputsFrom::Lines("/nowhere/at/all".into())).unwrap_err(),
        ] {
            assert_eq!(error.code(), types::ExitCode::Usage, "{error}");
        }
    }
}
