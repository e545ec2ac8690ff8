//! What the tasks of a job do, as the log or the nodes keep it: the command, the inputs, the files.

use std::collections::BTreeMap;
use std::ops::Range;

use agent::protocol::{Exec, FRAME_MAX, MAIN_MESSAGE_MAX, ToAgent, encode};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The format of the encoding.
const VERSION: u8 = 1;
/// What a payload may have in all: it goes between nodes in one piece.
pub const PAYLOAD_BYTES_MAX: usize = 48 << 20;
/// The longest input of a task.
pub const INPUT_BYTES_MAX: usize = 32 << 10;
/// What is kept of a task's output unless its job says otherwise, and what it may say at most.
pub const OUTPUT_BYTES: u64 = 1 << 20;
/// See [`OUTPUT_BYTES`].
pub const OUTPUT_BYTES_MAX: u64 = 16 << 20;
/// Files and directories that are kept of a child, and the longest path of one in bytes.
pub const OUTPUTS_MAX: usize = 64;
const PATH_BYTES_MAX: usize = 4096;
/// The longest name of a field that can be put in.
const NAME_BYTES_MAX: usize = 128;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Payload {
    /// What each task does.
    pub work: Work,
    /// What each is given.
    pub inputs: Inputs,
    /// Added to the environment of each.
    pub env: BTreeMap<String, String>,
    /// Where its program starts.
    pub workdir: Option<String>,
    /// As whom.
    pub user: Option<String>,
    /// A tar archive that is unpacked at the root of each child before; empty if there is none.
    pub files: Vec<u8>,
    /// Files and directories of the child that are kept.
    pub outputs: Vec<String>,
    /// The most that is kept of a task's output, and again of its files, in bytes.
    pub output_limit: u64,
    /// The most memory of its own that each child may have, in bytes.
    pub limit_bytes: Option<u64>,
    /// How long each try may take, in milliseconds.
    pub task_deadline_ms: Option<u64>,
}

/// What each task does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Work {
    /// Runs a program.
    Exec(Vec<String>),
    /// Asks the warm main process to evaluate this.
    Eval(String),
}

/// What each task is given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Inputs {
    /// Its number: so many tasks.
    Count(u32),
    /// A text each.
    List(Vec<String>),
}

/// Why a payload is not one.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum PayloadError {
    #[error("{what} of {bytes} bytes, where at most {max} are allowed")]
    TooLong { what: String, bytes: usize, max: usize },
    #[error("{what} is empty")]
    Empty { what: &'static str },
    #[error("{what} has a zero byte")]
    ZeroByte { what: String },
    #[error("{name:?} cannot be the name of a variable")]
    BadName { name: String },
    #[error("what task {task} is told, with its input put in, has more than {max} bytes")]
    TooMuch { task: u32, max: usize },
    #[error("{what} is of a program's, and code that is evaluated has none")]
    NotOfCode { what: &'static str },
    #[error("{what} is {number}, where {least} to {most} are allowed")]
    Range { what: &'static str, number: u64, least: u64, most: u64 },
    #[error("the payload of a job does not decode: {0}")]
    Malformed(String),
}

/// What is left of a message.
struct Room {
    left: usize,
    all: usize,
    task: u32,
}

impl Room {
    fn take(&mut self, bytes: usize) -> Result<(), PayloadError> {
        let too_much = PayloadError::TooMuch { task: self.task, max: self.all };
        self.left = self.left.checked_sub(bytes).ok_or(too_much)?;
        Ok(())
    }
}

/// Which task is to be told what it does.
#[derive(Clone, Copy, Debug)]
pub struct Told<'a> {
    /// Its job, as text.
    pub job: &'a str,
    /// Its number.
    pub task: u32,
    /// How often it was tried before.
    pub attempt: u32,
}

impl Inputs {
    /// How many tasks there are.
    #[must_use]
    pub fn count(&self) -> usize {
        match self {
            Self::Count(count) => *count as usize,
            Self::List(list) => list.len(),
        }
    }

    /// What a task is given, if that is a text.
    #[must_use]
    pub fn of(&self, task: u32) -> Option<&str> {
        match self {
            Self::Count(_) => None,
            Self::List(list) => list.get(task as usize).map(String::as_str),
        }
    }
}

impl Payload {
    /// As it is kept.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let body = postcard::to_stdvec(self).expect("plain data");
        [&[VERSION], &body[..]].concat()
    }

    /// Reads one, which may come from another node.
    ///
    /// # Errors
    /// [`PayloadError`]: also if it breaks a limit.
    pub fn decode(bytes: &[u8]) -> Result<Self, PayloadError> {
        let malformed = |what: &str| PayloadError::Malformed(what.to_owned());
        let payload: Self = match bytes.split_first() {
            Some((&VERSION, body)) => match postcard::take_from_bytes(body) {
                Ok((payload, [])) => payload,
                Ok(_) => return Err(malformed("it has bytes after its end")),
                Err(error) => return Err(PayloadError::Malformed(error.to_string())),
            },
            Some((version, _)) => return Err(PayloadError::Malformed(format!("it is of version {version}"))),
            None => return Err(malformed("it is empty")),
        };
        payload.check()?;
        Ok(payload)
    }

    /// Whether every task of it can be told what it does.
    ///
    /// # Errors
    /// [`PayloadError`] of the first that cannot.
    pub fn check(&self) -> Result<(), PayloadError> {
        let in_range = |what, number: u64, range: Range<u64>| {
            let (least, most) = (range.start, range.end - 1);
            if range.contains(&number) { Ok(()) } else { Err(PayloadError::Range { what, number, least, most }) }
        };
        in_range("the number of tasks", self.inputs.count() as u64, 1..u64::from(control::apply::TASKS_MAX) + 1)?;
        in_range("the limit of a task's output in bytes", self.output_limit, 0..OUTPUT_BYTES_MAX + 1)?;
        in_range("the number of files to keep", self.outputs.len() as u64, 0..OUTPUTS_MAX as u64 + 1)?;
        if let Some(limit) = self.limit_bytes {
            in_range("the memory of a child in bytes", limit, 1..u64::MAX)?;
        }
        if let Some(ms) = self.task_deadline_ms {
            in_range("the deadline of a task in milliseconds", ms, 1..u64::MAX)?;
        }
        match &self.work {
            Work::Exec(arguments) if arguments.first().is_none_or(String::is_empty) => {
                return Err(PayloadError::Empty { what: "the command" });
            }
            Work::Eval(code) if code.is_empty() => return Err(PayloadError::Empty { what: "the code" }),
            Work::Eval(_) if !self.env.is_empty() => return Err(PayloadError::NotOfCode { what: "env" }),
            Work::Eval(_) if self.workdir.is_some() => return Err(PayloadError::NotOfCode { what: "workdir" }),
            Work::Eval(_) if self.user.is_some() => return Err(PayloadError::NotOfCode { what: "user" }),
            _ => {}
        }
        if let Some(name) = self.env.keys().find(|name| name.is_empty() || name.contains(['=', '\0'])) {
            return Err(PayloadError::BadName { name: name.chars().take(64).collect() });
        }
        let texts = self.outputs.iter().chain(&self.workdir).chain(&self.user).chain(self.env.values());
        let arguments = if let Work::Exec(arguments) = &self.work { &arguments[..] } else { &[] };
        if let Some(text) = texts.chain(arguments).find(|text| text.contains('\0')) {
            return Err(PayloadError::ZeroByte { what: format!("{:?}", text.chars().take(64).collect::<String>()) });
        }
        if let Some(path) = self.outputs.iter().find(|path| path.len() > PATH_BYTES_MAX) {
            let (what, bytes) = ("the path of a file to keep".to_owned(), path.len());
            return Err(PayloadError::TooLong { what, bytes, max: PATH_BYTES_MAX });
        }
        if let Inputs::List(list) = &self.inputs {
            for (task, input) in list.iter().enumerate() {
                if input.len() > INPUT_BYTES_MAX {
                    let (what, bytes) = (format!("input {task}"), input.len());
                    return Err(PayloadError::TooLong { what, bytes, max: INPUT_BYTES_MAX });
                }
                if input.contains('\0') && matches!(self.work, Work::Exec(_)) {
                    return Err(PayloadError::ZeroByte { what: format!("input {task}") });
                }
            }
        }
        self.check_longest()
    }

    /// The task with the longest input says whether all fit.
    fn check_longest(&self) -> Result<(), PayloadError> {
        let longest = match &self.inputs {
            Inputs::Count(count) => *count - 1,
            Inputs::List(list) => {
                let by_length = list.iter().enumerate().max_by_key(|(_, input)| input.len());
                by_length.and_then(|(task, _)| u32::try_from(task).ok()).unwrap_or(0)
            }
        };
        let told = Told { job: "00000000-0000-0000-0000-000000000000", task: longest, attempt: u32::MAX };
        match &self.work {
            Work::Exec(_) => self.exec(told).map(drop),
            Work::Eval(_) => self.eval(told).map(drop),
        }
    }

    /// The program that a task runs.
    ///
    /// # Errors
    /// [`PayloadError::TooMuch`] if it does not fit into a message.
    pub fn exec(&self, told: Told<'_>) -> Result<Exec, PayloadError> {
        let fields = self.fields(told.task);
        let mut room = Room { left: FRAME_MAX, all: FRAME_MAX, task: told.task };
        let arguments = if let Work::Exec(arguments) = &self.work { &arguments[..] } else { &[] };
        let arguments: Result<Vec<String>, PayloadError> =
            arguments.iter().map(|argument| self.said(argument, told, fields.as_ref(), &mut room)).collect();
        let mut environment = Vec::with_capacity(self.env.len() + 3);
        for (name, value) in &self.env {
            room.take(name.len())?;
            environment.push((name.clone(), self.said(value, told, fields.as_ref(), &mut room)?));
        }
        environment.push(("FARFORK_JOB".to_owned(), told.job.to_owned()));
        environment.push(("FARFORK_TASK".to_owned(), told.task.to_string()));
        environment.push(("FARFORK_ATTEMPT".to_owned(), told.attempt.to_string()));
        let exec = Exec {
            arguments: arguments?,
            environment,
            directory: self.workdir.clone(),
            user: self.user.clone(),
            terminal: None,
            has_input: false,
            is_detached: false,
        };
        // Lengths and the rest take some room, too.
        match encode(&ToAgent::Exec(exec.clone())) {
            Ok(_) => Ok(exec),
            Err(_) => Err(PayloadError::TooMuch { task: told.task, max: FRAME_MAX }),
        }
    }

    /// The code that a task has evaluated.
    ///
    /// # Errors
    /// [`PayloadError::TooMuch`] if it does not fit into a message.
    pub fn eval(&self, told: Told<'_>) -> Result<String, PayloadError> {
        let Work::Eval(code) = &self.work else { return Ok(String::new()) };
        let mut room = Room { left: MAIN_MESSAGE_MAX, all: MAIN_MESSAGE_MAX, task: told.task };
        self.said(code, told, self.fields(told.task).as_ref(), &mut room)
    }

    fn fields(&self, task: u32) -> Option<serde_json::Map<String, serde_json::Value>> {
        serde_json::from_str(self.inputs.of(task)?).ok()
    }

    /// `text` with what stands for a task's own things put in, as far as there is room. What stands for nothing stays.
    fn said(
        &self,
        text: &str,
        told: Told<'_>,
        fields: Option<&serde_json::Map<String, serde_json::Value>>,
        room: &mut Room,
    ) -> Result<String, PayloadError> {
        let mut said = String::new();
        let mut add = |said: &mut String, more: &str| -> Result<(), PayloadError> {
            room.take(more.len())?;
            said.push_str(more);
            Ok(())
        };
        let mut rest = text;
        while let Some(at) = rest.find('{') {
            add(&mut said, &rest[..at])?;
            rest = &rest[at..];
            // No further than a name can reach: a text of nothing but brackets is looked at once.
            let near = rest.as_bytes().iter().take(NAME_BYTES_MAX).position(|byte| *byte == b'}');
            let value = near.and_then(|end| {
                let value = match &rest[1..end] {
                    "index" => Some(told.task.to_string()),
                    "input" => self.inputs.of(told.task).map(str::to_owned),
                    other => other.strip_prefix("input.").and_then(|name| fields?.get(name)).map(|value| match value {
                        serde_json::Value::String(text) => text.clone(),
                        other => other.to_string(),
                    }),
                };
                value.map(|value| (value, end + 1))
            });
            match value {
                Some((value, end)) => {
                    add(&mut said, &value)?;
                    rest = &rest[end..];
                }
                None => {
                    add(&mut said, "{")?;
                    rest = &rest[1..];
                }
            }
        }
        add(&mut said, rest)?;
        Ok(said)
    }

    /// What its tasks do, in short, for people.
    #[must_use]
    pub fn in_short(&self) -> String {
        const SHOWN: usize = 100;
        let text = match &self.work {
            Work::Exec(arguments) => arguments.join(" "),
            Work::Eval(code) => format!("eval {code}"),
        };
        let mut short: String = text.chars().filter(|c| !c.is_control()).take(SHOWN).collect();
        if short.len() < text.len() {
            short.push_str("...");
        }
        short
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn payload(work: Work, inputs: Inputs) -> Payload {
        Payload {
            work,
            inputs,
            env: BTreeMap::from([("SHARD".to_owned(), "{index} of {input}".to_owned())]),
            workdir: None,
            user: None,
            files: Vec::new(),
            outputs: Vec::new(),
            output_limit: OUTPUT_BYTES,
            limit_bytes: None,
            task_deadline_ms: None,
        }
    }

    fn exec(arguments: &[&str], inputs: Inputs) -> Payload {
        payload(Work::Exec(arguments.iter().map(|text| (*text).to_owned()).collect()), inputs)
    }

    #[test]
    fn what_stands_for_a_tasks_own_things_is_put_in_and_everything_else_stays() {
        let inputs = Inputs::List(vec!["plain".to_owned(), r#"{"a":"x y","n":7,"l":[1]}"#.to_owned()]);
        let payload =
            exec(&["cmd", "{index}", "{input}", "{input.a}-{input.n}{input.l}", "${x} {} {index", "{{index}}"], inputs);
        let told = |task| payload.exec(Told { job: "j", task, attempt: 0 }).unwrap();
        assert_eq!(told(0).arguments, ["cmd", "0", "plain", "{input.a}-{input.n}{input.l}", "${x} {} {index", "{0}"]);
        assert_eq!(told(1).arguments[2..5], [r#"{"a":"x y","n":7,"l":[1]}"#, "x y-7[1]", "${x} {} {index"]);
        assert_eq!(told(0).environment[0], ("SHARD".to_owned(), "0 of plain".to_owned()));
        // What is put in is not looked at again.
        let tricky = exec(&["cmd", "{input}"], Inputs::List(vec!["{index}".to_owned()]));
        assert_eq!(tricky.exec(Told { job: "j", task: 0, attempt: 0 }).unwrap().arguments[1], "{index}");
    }

    #[test]
    fn what_cannot_be_run_is_refused_with_its_task() {
        let count = |count| Inputs::Count(count);
        assert_eq!(exec(&["true"], count(3)).check(), Ok(()));
        assert!(matches!(exec(&["true"], count(0)).check(), Err(PayloadError::Range { number: 0, .. })));
        assert!(matches!(exec(&["true"], count(1_000_001)).check(), Err(PayloadError::Range { .. })));
        assert!(matches!(exec(&[], count(1)).check(), Err(PayloadError::Empty { .. })));
        assert!(matches!(payload(Work::Eval(String::new()), count(1)).check(), Err(PayloadError::Empty { .. })));
        assert!(matches!(exec(&["a\0b"], count(1)).check(), Err(PayloadError::ZeroByte { .. })));
        let long = vec!["x".to_owned(), "y".repeat(INPUT_BYTES_MAX + 1)];
        let refused = exec(&["true"], Inputs::List(long)).check();
        assert_eq!(refused.unwrap_err().to_string(), "input 1 of 32769 bytes, where at most 32768 are allowed");
        // Twice the longest input is more than a frame.
        let inputs = Inputs::List(vec!["x".to_owned(), "y".repeat(INPUT_BYTES_MAX)]);
        assert!(matches!(
            exec(&["echo", "{input}", "{input}"], inputs.clone()).check(),
            Err(PayloadError::TooMuch { task: 1, .. })
        ));
        assert_eq!(exec(&["echo", "{index}"], inputs).check(), Ok(()), "once, in its environment, it fits");
        // A little text that says it a million times, and a long one that says nothing: neither is written out, or gone over twice.
        let much = exec(&["echo", &"{input}".repeat(1 << 20)], Inputs::List(vec!["y".repeat(INPUT_BYTES_MAX)]));
        assert!(matches!(much.check(), Err(PayloadError::TooMuch { .. })));
        let brackets = payload(Work::Eval("{".repeat(1 << 20)), count(1));
        assert_eq!(Payload { env: BTreeMap::new(), ..brackets }.check(), Ok(()));
        assert!(matches!(payload(Work::Eval("1".to_owned()), count(1)).check(), Err(PayloadError::NotOfCode { what: "env" })));
        let mut bad = exec(&["true"], count(1));
        bad.env.insert("A=B".to_owned(), String::new());
        assert!(matches!(bad.check(), Err(PayloadError::BadName { .. })));
        let greedy = Payload { output_limit: OUTPUT_BYTES_MAX + 1, ..exec(&["true"], count(1)) };
        assert!(matches!(greedy.check(), Err(PayloadError::Range { .. })));
    }

    #[test]
    fn what_is_kept_is_read_again_and_nothing_else() {
        let payload = exec(&["true"], Inputs::Count(7));
        let bytes = payload.encode();
        assert_eq!(Payload::decode(&bytes), Ok(payload));
        assert!((0..bytes.len()).all(|len| Payload::decode(&bytes[..len]).is_err()));
        assert!(Payload::decode(&[&bytes[..], &[0]].concat()).is_err());
        assert!(Payload::decode(&[&[9], &bytes[1..]].concat()).is_err());
    }
}
