//! How an entry changes the state. The same entries in the same order make the same state on every node. What cannot be done is
//! refused, and changes nothing but the time, the epoch, and what was answered to its key.

mod images;
mod jobs;
mod nodes;
mod users;

use std::time::Duration;

use types::{Digest, Reason};

pub(crate) use images::leads_to_all;
pub use jobs::{JOBS_MAX, TASKS_IN_ALL_MAX, TASKS_MAX};
pub use nodes::check_replace;

use crate::clock::Tick;
use crate::command::{Answer, Command, Entry, Refusal};
use crate::state::{Hold, Outcome, Remembered, State, Task};

/// How long answers are remembered, and jobs that have ended.
pub const REMEMBERED: Duration = Duration::from_secs(24 * 60 * 60);
/// How long an image may be without anybody who has all of it before what needs it is ended: the term of a read lease.
pub const STRANDED_MAX: Duration = crate::lease::TERM;

/// How long a token lets a node in.
pub const TOKEN_TERM: Duration = Duration::from_secs(15 * 60);

/// Rules that are left out, for the tests that see what each is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flaws {
    /// A result counts whoever reports it.
    pub ignores_fences: bool,
    /// A request that comes again is carried out again.
    pub forgets_keys: bool,
    /// An image may be let go of while others read it.
    pub drops_holds: bool,
    /// Tasks are placed on nodes that are full.
    pub counts_no_capacity: bool,
    /// A node gets the right to start machines for what is taken already.
    pub leases_what_is_taken: bool,
}

/// What a rule says: done, or why not.
type Outcomes = Result<Answer, Refusal>;

/// Carries an entry out.
///
/// # Panics
/// In debug builds, if the state is then not [valid](crate::validate::validate): that is a bug here.
pub fn apply(state: &mut State, entry: &Entry) -> Answer {
    let answer = apply_with(state, entry, Flaws::default());
    debug_assert_eq!(crate::validate::validate(state), Ok(()), "after {entry}");
    answer
}

/// The same, with rules left out.
pub fn apply_with(state: &mut State, entry: &Entry, flaws: Flaws) -> Answer {
    advance(state, entry.at);
    let before = entry.key.and_then(|key| Some((key, state.keys.get(&key)?))).filter(|_| !flaws.forgets_keys);
    let answer = match before {
        Some((_, remembered)) if remembered.request == request_of(&entry.command) => remembered.answer.clone(),
        Some((key, _)) => Answer::Refused(Refusal::KeyReused(key)),
        None => {
            let answer = carry_out(state, &entry.command, flaws).unwrap_or_else(Answer::Refused);
            if let Some(key) = entry.key {
                let request = request_of(&entry.command);
                state.keys.insert(key, Remembered { at: state.time, request, answer: answer.clone() });
            }
            answer
        }
    };
    settle_up(state);
    answer
}

fn carry_out(state: &mut State, command: &Command, flaws: Flaws) -> Outcomes {
    match command {
        Command::Note => Ok(Answer::Done),
        Command::Register { node, incarnation, facts, images } => nodes::register(state, *node, *incarnation, facts, images),
        Command::Heard { node, incarnation } => nodes::heard(state, *node, *incarnation),
        Command::Suspect { node, incarnation } => nodes::suspect(state, *node, *incarnation),
        Command::GiveUp { node, incarnation } => nodes::give_up(state, *node, *incarnation),
        Command::SetRole { node, role } => nodes::change(state, *node, |node| node.role = *role),
        Command::Cordon { node, is_cordoned } => nodes::change(state, *node, |node| node.is_cordoned = *is_cordoned),
        Command::Drain { node, is_draining } => nodes::change(state, *node, |node| node.is_draining = *is_draining),
        Command::AddToken { token, name, role } => nodes::add_token(state, *token, name, *role),
        Command::UseToken { token, node, proven, name } => nodes::use_token(state, *token, (*node, *proven), name),
        Command::AddUser { name, credential, rights, lasts_ms } => users::add(state, name, *credential, rights, *lasts_ms),
        Command::RemoveUser { name } => users::remove(state, name),
        Command::Revoke { node } => nodes::revoke(state, *node),
        Command::Remove { node } => nodes::remove(state, *node),
        Command::Replace { old, new, proven } => nodes::replace(state, *old, (*new, *proven)),
        Command::GrantCapacity { node, incarnation, resources, lasts_ms } => {
            nodes::grant(state, *node, *incarnation, *resources, *lasts_ms, flaws)
        }
        Command::ReturnCapacity { node, epoch } => nodes::give_back(state, *node, *epoch),
        Command::AddImage { key, facts, node, incarnation } => images::add(state, key, facts, *node, *incarnation),
        Command::PutTemplate { tenant, name, digest } => images::put_template(state, tenant, name, *digest),
        Command::RemoveTemplate { tenant, name } => images::remove_template(state, tenant, name),
        Command::Open { key, node, sources } => {
            let mut usage = state.usage();
            images::open(state, &mut usage, key, *node, sources, flaws)
        }
        Command::LetGo { key, node } => images::let_go(state, key, *node, flaws),
        Command::Submit { job, spec } => jobs::submit(state, *job, spec),
        Command::Place { job, opens, on } => jobs::place(state, *job, opens, on, flaws),
        Command::Cancel { job } => jobs::cancel(state, *job),
        Command::Forget { job } => jobs::forget(state, *job),
        Command::Report { node, incarnation, progress, gone, ended, local } => {
            let reporter = nodes::check_start(state, *node, *incarnation)?;
            reporter.local = local.unwrap_or(reporter.local);
            progress.iter().for_each(|(key, epoch, percent)| images::progress(state, *node, key, *epoch, *percent));
            // Results first: what ended before its image went has ended.
            ended.iter().for_each(|ended| jobs::ended(state, *node, ended, flaws));
            gone.iter().for_each(|(key, epoch)| images::gone(state, *node, key, *epoch));
            Ok(Answer::Done)
        }
    }
}

/// What the passing of time does.
fn advance(state: &mut State, at: Tick) {
    state.time = state.time.max(at);
    let now = state.time;
    for node in state.nodes.values_mut() {
        node.lease = node.lease.filter(|lease| lease.until > now);
    }
    let is_stranded = |since: Tick| now - since >= STRANDED_MAX;
    let stranded = state.images.iter().filter(|(_, image)| image.stranded.is_some_and(is_stranded));
    let stranded: Vec<_> = stranded.map(|(key, _)| key.clone()).collect();
    for job in state.jobs.values_mut().filter(|job| job.ended.is_none()) {
        let all = 0..job.spec.count;
        if job.deadline.is_some_and(|deadline| deadline <= now) {
            job.tasks.change(all, |task| jobs::ended_by(task, Reason::DeadlineExceeded));
        } else if stranded.contains(&job.spec.image) {
            job.tasks.change(all, |task| match task {
                Task::Waiting { .. } => Task::ended(Outcome::Failed(Reason::PageSourceLost)),
                other => other,
            });
        }
    }
    for key in stranded {
        // Nobody can complete what they have begun.
        let image = state.images.get_mut(&key).expect("just seen");
        for holder in image.holders.values_mut().filter(|holder| holder.is_kept()) {
            state.epoch.0 += 1;
            (holder.epoch, holder.hold) = (state.epoch, Hold::LetGo);
            holder.sources.clear();
        }
    }
    state.tokens.retain(|_, token| token.until > now);
    state.users.retain(|_, user| user.until.is_none_or(|until| until > now));
    state.keys.retain(|_, remembered| now - remembered.at < REMEMBERED);
    state.jobs.retain(|_, job| job.ended.is_none_or(|ended| now - ended < REMEMBERED));
}

/// What follows from what has just been done.
fn settle_up(state: &mut State) {
    let now = state.time;
    for job in state.jobs.values_mut() {
        if job.ended.is_none() && job.tasks.are_done() {
            job.ended = Some(now);
        }
    }
    let needed = state.needed();
    state.images.retain(|key, image| {
        let is_needed = needed.contains(key);
        image.unneeded = if is_needed { None } else { image.unneeded.or(Some(now)) };
        image.stranded = if image.settled().next().is_some() { None } else { image.stranded.or(Some(now)) };
        is_needed || !image.holders.is_empty()
    });
}

fn request_of(command: &Command) -> Digest {
    Digest::of(&postcard::to_stdvec(command).expect("commands are plain data"))
}
