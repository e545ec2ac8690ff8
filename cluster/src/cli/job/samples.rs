//! Answers for tests.

use uuid::Uuid;

use crate::api::wire::{JobAnswer, JobRow, TaskCounts};

/// Of so many tasks some have ended, well or not.
pub(super) fn job(tasks: u32, succeeded: u32, failed: u32) -> JobAnswer {
    let placed = tasks - succeeded - failed;
    JobAnswer {
        job: JobRow {
            id: Uuid::from_u128(0x0192_0000_0000_7000_8000_0000_dead_beef),
            name: Some("square".to_owned()),
            template: "python".to_owned(),
            image: "a".repeat(64),
            tenant: "default".to_owned(),
            submitted_by: "ann".to_owned(),
            about: "echo {index}".to_owned(),
            age_ms: 0,
            for_ms: 4_210,
            is_ended: placed == 0,
            tasks,
            counts: TaskCounts { waiting: 0, placed, succeeded, failed },
        },
        reasons: [("EXIT".to_owned(), failed)].into_iter().filter(|(_, count)| *count > 0).collect(),
        nodes: Vec::new(),
        why_waiting: Vec::new(),
    }
}
