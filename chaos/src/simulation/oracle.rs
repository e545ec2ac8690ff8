//! What must hold of every step from one state to the next.

use control::State;
use control::state::{Outcome, Task};

use super::agent::status;
use super::consensus::Consensus;

/// See the module.
#[derive(Default)]
pub(super) struct Oracle {
    looked_at: usize,
    ended: u64,
}

impl Oracle {
    pub(super) fn ended_tasks(&self) -> u64 {
        self.ended
    }

    /// Looks at what is new.
    pub(super) fn look(&mut self, consensus: &Consensus) -> Result<(), String> {
        if let Some(invalid) = &consensus.invalid {
            return Err(invalid.clone());
        }
        while self.looked_at < consensus.len() {
            let (before, after) = (consensus.state_after(self.looked_at), consensus.state_after(self.looked_at + 1));
            let (entry, _) = consensus.entry(self.looked_at);
            self.ended += step(&before, &after).map_err(|what| format!("{what}, by {entry}"))?;
            self.looked_at += 1;
        }
        Ok(())
    }
}

/// Says how many tasks came to their end.
fn step(before: &State, after: &State) -> Result<u64, String> {
    if after.time < before.time || after.epoch < before.epoch {
        return Err("time or epochs went back".to_owned());
    }
    let mut ended = 0;
    for (id, job) in &before.jobs {
        let Some(after) = after.jobs.get(id) else {
            if job.ended.is_none() {
                return Err(format!("job {id} is gone before its end"));
            }
            continue;
        };
        if job.tasks == after.tasks {
            continue;
        }
        let placed = after.tasks.counts().placed;
        if job.spec.max_parallel.is_some_and(|max| placed > max) {
            return Err(format!("{placed} tasks of job {id} are placed, of at most {:?}", job.spec.max_parallel));
        }
        for task in 0..job.spec.count {
            match (job.tasks.get(task), after.tasks.get(task)) {
                (Some(old @ Task::Done { .. }), new) if new != Some(old) => {
                    return Err(format!("task {id}/{task} had ended with {old:?}, and became {new:?}"));
                }
                (Some(Task::Waiting { .. }), Some(Task::Done { outcome: Outcome::Exited(_), .. })) => {
                    return Err(format!("task {id}/{task} was nobody's, and has a result"));
                }
                (Some(Task::Placed { epoch, .. }), Some(Task::Done { outcome: Outcome::Exited(said), output }))
                    if said != status(*id, task, epoch) || output.is_none_or(|output| output.epoch != epoch) =>
                {
                    return Err(format!("task {id}/{task} has the result of another order than {epoch:?}"));
                }
                (Some(Task::Waiting { .. } | Task::Placed { .. }), Some(Task::Done { .. })) => ended += 1,
                _ => {}
            }
        }
    }
    Ok(ended)
}
