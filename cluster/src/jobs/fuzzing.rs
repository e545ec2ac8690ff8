//! As [`crate::node::fuzzing`], for what comes of jobs from other nodes and from guests.

use std::collections::BTreeMap;

use agent::protocol::FRAME_MAX;
use control::state::{JobId, Outcome};
use types::{Epoch, NodeId};
use uuid::Uuid;

use super::keeper::Copies;
use super::payload::{Inputs, OUTPUT_BYTES, Payload, Told, Work};
use super::perform::add_all;
use super::record::{Record, Try};
use crate::node::fuzzing::Target;

/// All of them.
pub const TARGETS: [Target; 3] = [("job_payload", payload), ("job_outputs", outputs), ("kept_files", files)];

/// What tasks do, as another node keeps it: what is taken keeps to the limits, and can be told to any task.
pub fn payload(bytes: &[u8]) {
    let Ok(payload) = Payload::decode(bytes) else { return };
    assert_eq!(Payload::decode(&payload.encode()).as_ref(), Ok(&payload));
    let last = u32::try_from(payload.inputs.count()).expect("within the limit") - 1;
    for task in [0, last] {
        let told = Told { job: "", task, attempt: 0 };
        if let Ok(exec) = payload.exec(told) {
            let bytes: usize = exec.arguments.iter().map(String::len).sum();
            assert!(bytes <= FRAME_MAX);
        }
        let _ = payload.eval(told);
    }
}

/// What another node has this one keep.
pub fn outputs(bytes: &[u8]) {
    if let Ok(copies) = Copies::decode(bytes, node()) {
        assert!(copies.records.iter().all(|(of, _)| of.node == node()));
        let again = postcard::to_stdvec(&copies).expect("plain data");
        assert_eq!(Copies::decode(&again, node()).expect("it was read before").records, copies.records);
    }
}

/// An archive that a guest gives: what is kept of it is no larger than it may be, and leads nowhere.
pub fn files(bytes: &[u8]) {
    const LIMIT: u64 = 4096;
    let mut kept = tar::Builder::new(Vec::new());
    if add_all(&mut kept, bytes, "/a/b", LIMIT).is_err() {
        return;
    }
    let kept = kept.into_inner().expect("memory");
    for entry in tar::Archive::new(&kept[..]).entries().expect("it begins") {
        let entry = entry.expect("what was written can be read");
        let path = entry.path().expect("a path").into_owned();
        assert!(path.components().all(|part| matches!(part, std::path::Component::Normal(_))), "{}", path.display());
        assert!(entry.size() <= LIMIT);
    }
}

fn node() -> NodeId {
    NodeId::from_uuid(Uuid::max())
}

/// For the corpora: a target, a name, and bytes that it accepts.
///
/// # Panics
/// Never: all of it is a constant.
#[must_use]
pub fn seeds() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let of = |work, inputs, env: &[(&str, &str)]| Payload {
        work,
        inputs,
        env: env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect::<BTreeMap<_, _>>(),
        workdir: None,
        user: None,
        files: Vec::new(),
        outputs: vec!["/tmp/out".to_owned()],
        output_limit: OUTPUT_BYTES,
        limit_bytes: Some(64 << 20),
        task_deadline_ms: Some(1000),
    };
    let exec = Work::Exec(vec!["cmd".to_owned(), "{index}".to_owned(), "{input.a}".to_owned()]);
    let list = Inputs::List(vec!["x".to_owned(), r#"{"a":1}"#.to_owned()]);
    let outcome = Outcome::Exited(0);
    let of_try = Try { job: JobId(Uuid::max()), task: 7, epoch: Epoch(9), node: node() };
    let copies = Copies { records: vec![(of_try, Record::ended(outcome, Some("what".to_owned()), 1, 7))] };
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(2);
    header.set_mode(0o644);
    archive.append_data(&mut header, "result", &b"hi"[..]).expect("memory");
    vec![
        ("job_payload", "exec", of(exec, list, &[("A", "{input}")]).encode()),
        ("job_payload", "eval", of(Work::Eval("6 * {index}".to_owned()), Inputs::Count(300), &[]).encode()),
        ("job_outputs", "one", postcard::to_stdvec(&copies).expect("plain data")),
        ("kept_files", "file", archive.into_inner().expect("memory")),
    ]
}
