//! How far a job is, on stderr while it goes on if that is a terminal, and how it went at its end.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::tally::{OnNode, Tally};
use crate::api::wire::JobAnswer;
use crate::cli::output::{printable, time};
use crate::cli::size;

/// More nodes than this do not fit on a terminal.
const NODES_SHOWN: usize = 8;

/// Bars, gone when dropped.
pub(super) struct Display {
    began: Instant,
    tally: Tally,
    bars: Option<Bars>,
}

struct Bars {
    all: MultiProgress,
    job: ProgressBar,
    nodes: Vec<ProgressBar>,
}

impl Display {
    pub(super) fn start(is_quiet: bool) -> Self {
        let bars = (!is_quiet && std::io::stderr().is_terminal()).then(|| {
            let all = MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(8));
            let style = ProgressStyle::with_template("{bar:20} {pos} of {len}  {elapsed}  {wide_msg}");
            let job = all.add(ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())));
            job.enable_steady_tick(Duration::from_millis(250));
            Bars { all, job, nodes: Vec::new() }
        });
        Self { began: Instant::now(), tally: Tally::default(), bars }
    }

    pub(super) fn show(&mut self, answer: &JobAnswer) {
        self.tally.take(answer, self.began.elapsed());
        let Some(bars) = &mut self.bars else { return };
        let counts = self.tally.counts();
        bars.job.set_length(u64::from(answer.job.tasks));
        bars.job.set_position(u64::from(counts.succeeded) + u64::from(counts.failed));
        bars.job.set_message(printable(&line(&self.tally, answer)));
        let mut lines: Vec<String> = self.tally.nodes().take(NODES_SHOWN).map(node_line).collect();
        let left = self.tally.nodes().count().saturating_sub(NODES_SHOWN);
        if left > 0 {
            lines.push(format!("and {left} nodes more"));
        }
        for (at, line) in lines.into_iter().enumerate() {
            if bars.nodes.len() <= at {
                let style = ProgressStyle::with_template("  {wide_msg}").unwrap_or_else(|_| ProgressStyle::default_bar());
                bars.nodes.push(bars.all.add(ProgressBar::new(0).with_style(style)));
            }
            bars.nodes[at].set_message(printable(&line));
        }
    }

    /// Does what writes to stdout, without the bars in its way if that is the terminal too.
    pub(super) fn aside<R>(&self, does: impl FnOnce() -> R) -> R {
        match &self.bars {
            Some(bars) if std::io::stdout().is_terminal() => bars.all.suspend(does),
            _ => does(),
        }
    }

    /// How it went, from the last answer and those before it.
    pub(super) fn summary(&mut self, answer: &JobAnswer) -> String {
        self.tally.take(answer, self.began.elapsed());
        summary(&self.tally, answer)
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        let Some(bars) = &self.bars else { return };
        bars.nodes.iter().chain([&bars.job]).for_each(ProgressBar::finish_and_clear);
    }
}

fn line(tally: &Tally, answer: &JobAnswer) -> String {
    let (counts, all) = (tally.counts(), tally.all());
    let rate = tally.forks_a_second();
    let streamed = size::bytes(all.wire_bytes);
    let why = match answer.why_waiting.first().filter(|_| counts.placed == 0) {
        Some(why) => format!("  waits: {why}"),
        None => String::new(),
    };
    let (placed, running, failed) = (counts.placed, all.running, counts.failed);
    format!("{placed} placed, {running} running, {failed} failed, {rate} forks/s, {streamed} streamed{why}")
}

fn node_line(node: &OnNode) -> String {
    let here = node.here();
    let done = node.succeeded.saturating_add(node.failed);
    let (name, placed, streamed) = (&node.name, node.placed, size::bytes(here.wire_bytes));
    format!("{name}: {placed} placed, {} running, {done} done, {} failed, {streamed} streamed", here.running, node.failed)
}

/// Of a job, whether it has ended or not.
fn summary(tally: &Tally, answer: &JobAnswer) -> String {
    let (job, all) = (&answer.job, tally.all());
    let counts = job.counts;
    let took = time(job.for_ms.saturating_mul(1_000));
    let mut text = format!("{} tasks in {took}: {} succeeded, {} failed", job.tasks, counts.succeeded, counts.failed);
    let reasons: Vec<String> = answer.reasons.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
    if !reasons.is_empty() {
        text.push_str(&format!(" ({})", reasons.join(", ")));
    }
    if !job.is_ended {
        text.push_str(&format!(", {} waiting, {} placed", counts.waiting, counts.placed));
    }
    text.push('\n');
    if all.forked > 0 {
        let (forked, local, remote, settled) = (all.forked, all.local, all.remote, all.settled);
        text.push_str(&format!("{forked} children: {local} local, {remote} remote, {settled} settled"));
        let each = tally.nodes().filter(|node| node.here().forked > 0);
        let each: Vec<String> = each.take(NODES_SHOWN).map(|node| format!("{} {}", node.name, node.here().forked)).collect();
        text.push_str(&format!("; {}\n", each.join(", ")));
    }
    let (copies, bytes) = tally.whole_copies();
    if copies > 0 {
        let (streamed, whole) = (size::bytes(all.wire_bytes), size::bytes(bytes));
        let percent = match all.wire_bytes.saturating_mul(100).checked_div(bytes) {
            Some(percent) => format!(" ({percent} %)"),
            None => String::new(),
        };
        let nodes = if copies == 1 { "1 node".to_owned() } else { format!("{copies} nodes") };
        text.push_str(&format!("streamed {streamed}{percent}; whole copies for {nodes} would have been {whole}\n"));
    }
    printable(&text)
}

#[cfg(test)]
mod tests {
    use types::NodeId;
    use uuid::Uuid;

    use super::*;
    use crate::api::wire::{JobHere, JobOnNode};
    use crate::cli::job::samples;

    #[test]
    fn the_summary_says_what_became_of_tasks_and_where_children_ran() {
        let on = |id, name: &str, here| JobOnNode {
            node: NodeId::from_uuid(Uuid::from_u128(id)),
            name: name.to_owned(),
            placed: 0,
            succeeded: 5,
            failed: 1,
            here: Some(here),
        };
        let (local, image_bytes) = (JobHere { forked: 6, local: 6, image_bytes: 64 << 20, ..JobHere::default() }, 64 << 20);
        let remote = JobHere { forked: 6, remote: 2, settled: 4, wire_bytes: 16 << 20, image_bytes, ..JobHere::default() };
        let nodes = vec![on(1, "node-a", local), on(2, "node-b", remote)];
        let text = Display::start(true).summary(&JobAnswer { nodes, ..samples::job(12, 10, 2) });
        let expected = "12 tasks in 4.21 s: 10 succeeded, 2 failed (EXIT 2)\n\
            12 children: 6 local, 2 remote, 4 settled; node-a 6, node-b 6\n\
            streamed 16 MiB (25 %); whole copies for 1 node would have been 64 MiB\n";
        assert_eq!(text, expected);
        let going = Display::start(true).summary(&samples::job(12, 1, 0));
        assert_eq!(going, "12 tasks in 4.21 s: 1 succeeded, 0 failed, 0 waiting, 11 placed\n");
    }
}
