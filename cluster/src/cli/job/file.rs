//! A job in a file, `job.toml`: the flags of `farfork run` under names of their own. Whatever is wrong is said with file, line and
//! field. Reading it reads nothing else: the files that it names are read when the request is made.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::Spanned;

use super::error::JobError;
use super::limits::{self, INPUT_MAX, REQUEST_MAX};
use super::spec::{InputsFrom, SentFile, Spec};
use crate::api::wire::{JobSpread, Work};
use crate::cli::error::CliError;

/// As it is written. What is optional may come from the command line.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
struct Written {
    template: Option<Spanned<String>>,
    name: Option<Spanned<String>>,
    key: Option<Spanned<String>>,
    command: Option<Spanned<Vec<String>>>,
    eval: Option<Spanned<String>>,
    #[serde(default)]
    env: BTreeMap<String, Spanned<String>>,
    workdir: Option<Spanned<String>>,
    user: Option<Spanned<String>>,
    inputs: Option<Spanned<WrittenInputs>>,
    #[serde(default)]
    files: Vec<Spanned<WrittenFile>>,
    #[serde(default)]
    keep: Vec<Spanned<String>>,
    output_limit: Option<Spanned<String>>,
    memory: Option<Spanned<String>>,
    cpus: Option<Spanned<toml::Value>>,
    spread: Option<Spanned<String>>,
    #[serde(default)]
    labels: BTreeMap<String, Spanned<String>>,
    replicas: Option<Spanned<i64>>,
    retries: Option<Spanned<i64>>,
    deadline: Option<Spanned<String>>,
    task_deadline: Option<Spanned<String>>,
    max_parallel: Option<Spanned<i64>>,
}

/// One of them.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table with one of count, list, range, file and jsonl")]
struct WrittenInputs {
    count: Option<Spanned<i64>>,
    list: Option<Spanned<Vec<Spanned<String>>>>,
    range: Option<Spanned<String>>,
    file: Option<Spanned<String>>,
    jsonl: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table with source and target")]
struct WrittenFile {
    source: Spanned<String>,
    target: Spanned<String>,
}

/// Reads a job file.
///
/// # Errors
/// [`CliError`]; [`JobError::File`] if what it says cannot be.
pub fn read(path: &Path) -> Result<Spec, CliError> {
    let input = |source| CliError::Input { file: path.to_owned(), source };
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(REQUEST_MAX as u64 + 1).read_to_end(&mut bytes)).map_err(input)?;
    if bytes.len() > REQUEST_MAX {
        return Err(JobError::InputsTooLarge { from: path.display().to_string() }.into());
    }
    Ok(parse(&bytes, path)?)
}

/// Understands a job file. The paths in it begin where it is.
///
/// # Errors
/// [`JobError::File`].
pub fn parse(bytes: &[u8], path: &Path) -> Result<Spec, JobError> {
    let source = match std::str::from_utf8(bytes) {
        Ok(text) => Source { text, path },
        Err(error) => {
            let text = std::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or_default();
            return Err(Source { text, path }.wrong(text.len(), "the file", "it is no UTF-8".to_owned()));
        }
    };
    let written: Written = toml::from_str(source.text).map_err(|error| source.malformed(error))?;
    source.understood(written)
}

struct Source<'a> {
    text: &'a str,
    path: &'a Path,
}

impl Source<'_> {
    fn wrong(&self, at: usize, field: &str, why: String) -> JobError {
        let before = &self.text.as_bytes()[..at.min(self.text.len())];
        let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
        JobError::File { file: self.path.to_owned(), line, field: field.to_owned(), why }
    }

    /// What the reader of TOML says, in words of this file.
    fn malformed(&self, mut error: toml::de::Error) -> JobError {
        let span = error.span().unwrap_or_default();
        // Without the text it names the field, and does not draw the line.
        error.set_input(None);
        let (message, shown) = (error.message().to_owned(), error.to_string());
        let within = shown.rsplit_once("\nin `").map(|(_, keys)| keys.trim_end().trim_end_matches('`').to_owned());
        if let Some(unknown) = message.strip_prefix("unknown field `") {
            let (name, known) = unknown.split_once("`, ").unwrap_or((unknown, ""));
            let parent = within.map(|within| within.strip_suffix(name).unwrap_or(&within).trim_end_matches('.').to_owned());
            let field = parent.filter(|parent| !parent.is_empty()).map_or(name.to_owned(), |parent| format!("{parent}.{name}"));
            let why = format!("there is no such field; {}", known.replace("expected one of", "there are"));
            return self.wrong(span.start, &field, why);
        }
        let field = within.filter(|within| !within.is_empty()).unwrap_or_else(|| self.field_on_line_of(span.start));
        self.wrong(span.start, &field, plain(&message))
    }

    /// What is written before `=` there: of a file that is no TOML nothing else is known.
    fn field_on_line_of(&self, at: usize) -> String {
        let at = (0..=at.min(self.text.len())).rev().find(|at| self.text.is_char_boundary(*at)).unwrap_or(0);
        let start = self.text[..at].rfind('\n').map_or(0, |newline| newline + 1);
        let line = self.text[start..].lines().next().unwrap_or_default();
        let name: String = line.split('=').next().unwrap_or_default().trim().chars().take(64).collect();
        if name.is_empty() { "the file".to_owned() } else { name }
    }

    fn checked<T, U>(
        &self,
        field: &str,
        value: Option<Spanned<T>>,
        read: impl FnOnce(T) -> Result<U, String>,
    ) -> Result<Option<U>, JobError> {
        let Some(value) = value else { return Ok(None) };
        let at = value.span().start;
        read(value.into_inner()).map(Some).map_err(|why| self.wrong(at, field, why))
    }

    fn text<U>(
        &self,
        field: &str,
        value: Option<Spanned<String>>,
        read: fn(&str) -> Result<U, String>,
    ) -> Result<Option<U>, JobError> {
        self.checked(field, value, |text| read(&text))
    }

    fn understood(&self, written: Written) -> Result<Spec, JobError> {
        Ok(Spec {
            template: self.text("template", written.template, limits::template)?,
            inputs: written.inputs.map(|inputs| self.inputs(inputs)).transpose()?,
            work: self.work(written.command, written.eval)?,
            key: self.text("key", written.key, limits::key)?,
            name: self.text("name", written.name, limits::name)?,
            env: self.map("env", written.env)?,
            workdir: self.text("workdir", written.workdir, filled)?,
            user: self.text("user", written.user, filled)?,
            files: written.files.into_iter().map(|file| self.file(file.into_inner())).collect::<Result<_, _>>()?,
            keep: self.keep(written.keep)?,
            output_limit_bytes: self.text("output_limit", written.output_limit, limits::output_limit)?,
            memory_bytes: self.text("memory", written.memory, limits::memory)?,
            cpu_millis: self.checked("cpus", written.cpus, |value| match value {
                toml::Value::Integer(number) => limits::cpus(&number.to_string()),
                toml::Value::Float(number) => limits::cpus(&number.to_string()),
                toml::Value::String(text) => limits::cpus(&text),
                other => Err(format!("it is {}, and should be a number", kind(&other))),
            })?,
            spread: self.text("spread", written.spread, |text| match text {
                "pack" => Ok(JobSpread::Pack),
                "spread" => Ok(JobSpread::Spread),
                other => Err(format!("{other:?} is neither \"pack\" nor \"spread\"")),
            })?,
            labels: self.map("labels", written.labels)?,
            replicas: self.checked("replicas", written.replicas, limits::replicas)?,
            retries: self.checked("retries", written.retries, limits::retries)?,
            deadline: self.text("deadline", written.deadline, limits::deadline)?,
            task_deadline: self.text("task_deadline", written.task_deadline, limits::deadline)?,
            max_parallel: self.checked("max_parallel", written.max_parallel, limits::max_parallel)?,
        })
    }

    fn work(&self, command: Option<Spanned<Vec<String>>>, eval: Option<Spanned<String>>) -> Result<Option<Work>, JobError> {
        if let (Some(_), Some(eval)) = (&command, &eval) {
            return Err(self.wrong(eval.span().start, "eval", "there is a command too; one of them is enough".to_owned()));
        }
        let command = self.checked("command", command, |words| match words.first() {
            Some(program) if !program.is_empty() => Ok(Work::Exec(words)),
            _ => Err("it names no program".to_owned()),
        })?;
        Ok(command.or(self.text("eval", eval, |code| filled(code).map(Work::Eval))?))
    }

    fn inputs(&self, inputs: Spanned<WrittenInputs>) -> Result<InputsFrom, JobError> {
        let Range { start, .. } = inputs.span();
        let WrittenInputs { count, list, range, file, jsonl } = inputs.into_inner();
        let list = match list {
            Some(list) => Some(InputsFrom::List(self.list(list)?)),
            None => None,
        };
        let path = |text: &str| filled(text).map(|text| self.beside(&text));
        let given = [
            self.checked("inputs.count", count, limits::count)?.map(InputsFrom::Count),
            list,
            self.text("inputs.range", range, limits::range)?.map(InputsFrom::Range),
            self.checked("inputs.file", file, |text| path(&text))?.map(InputsFrom::Lines),
            self.checked("inputs.jsonl", jsonl, |text| path(&text))?.map(InputsFrom::Json),
        ];
        let mut given = given.into_iter().flatten();
        match (given.next(), given.next()) {
            (Some(inputs), None) => Ok(inputs),
            _ => {
                let why = "give one of count, list, range, file and jsonl, and only one".to_owned();
                Err(self.wrong(start, "inputs", why))
            }
        }
    }

    fn list(&self, list: Spanned<Vec<Spanned<String>>>) -> Result<Vec<String>, JobError> {
        let Range { start, .. } = list.span();
        let count = i64::try_from(list.get_ref().len()).unwrap_or(i64::MAX);
        limits::count(count).map_err(|why| self.wrong(start, "inputs.list", why))?;
        let each = list.into_inner().into_iter().enumerate().map(|(index, item)| {
            let (at, bytes) = (item.span().start, item.get_ref().len());
            let why = || format!("{bytes} bytes; an input has at most {INPUT_MAX}");
            if bytes > INPUT_MAX {
                return Err(self.wrong(at, &format!("inputs.list[{index}]"), why()));
            }
            Ok(item.into_inner())
        });
        each.collect()
    }

    fn file(&self, file: WrittenFile) -> Result<SentFile, JobError> {
        let source = self.text("files.source", Some(file.source), filled)?.unwrap_or_default();
        let target = self.text("files.target", Some(file.target), limits::guest_path)?.unwrap_or_default();
        Ok(SentFile { source: self.beside(&source), target })
    }

    fn keep(&self, keep: Vec<Spanned<String>>) -> Result<Vec<String>, JobError> {
        let paths = keep.into_iter().map(|path| self.text("keep", Some(path), limits::guest_path).transpose());
        paths.flatten().collect()
    }

    fn map(&self, field: &str, map: BTreeMap<String, Spanned<String>>) -> Result<BTreeMap<String, String>, JobError> {
        let each = map.into_iter().map(|(name, value)| {
            let at = value.span().start;
            limits::named(&name).map_err(|why| self.wrong(at, field, why))?;
            Ok((name, value.into_inner()))
        });
        each.collect()
    }

    /// A path in the file begins where the file is.
    fn beside(&self, path: &str) -> PathBuf {
        self.path.parent().unwrap_or(Path::new("")).join(path)
    }
}

fn filled(text: &str) -> Result<String, String> {
    if text.is_empty() { Err("it is empty".to_owned()) } else { Ok(text.to_owned()) }
}

fn kind(value: &toml::Value) -> &'static str {
    match value {
        toml::Value::String(_) => "a text",
        toml::Value::Integer(_) | toml::Value::Float(_) => "a number",
        toml::Value::Boolean(_) => "true or false",
        toml::Value::Datetime(_) => "a time of the calendar",
        toml::Value::Array(_) => "a list",
        toml::Value::Table(_) => "a table",
    }
}

/// Words of TOML and Rust, as people say them.
fn plain(message: &str) -> String {
    let Some((found, expected)) = message.strip_prefix("invalid type: ").and_then(|rest| rest.rsplit_once(", expected "))
    else {
        return message.replace("missing field", "there is no");
    };
    let found: String = match found.split_once(' ') {
        Some(("string", text)) => format!("the text {text}"),
        Some(("integer", number)) => format!("the number {}", number.trim_matches('`')),
        Some(("floating", rest)) => format!("the number {}", rest.trim_start_matches("point ").trim_matches('`')),
        Some(("boolean", is)) => is.trim_matches('`').to_owned(),
        _ if found == "sequence" => "a list".to_owned(),
        _ if found == "map" => "a table".to_owned(),
        _ => found.to_owned(),
    };
    let expected = match expected {
        "i64" => "a whole number",
        "a string" => "a text",
        "a sequence" => "a list",
        "a map" => "a table",
        other => other,
    };
    format!("it is {found}, and should be {expected}")
}

#[cfg(test)]
mod tests;
