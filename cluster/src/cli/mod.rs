//! The command line: one file per verb. Answers go to stdout, everything else to stderr; `--output json` prints exactly what
//! the API answers.
//!
//! Exit codes: 0 all was done; 2 the command line is wrong; 3 no node, or another node, can be reached; 4 refused or failed; 5 some of it was
//! done; 130 interrupted. `exec` and `eval` exit with the guest's code, and with 125 where farfork itself failed.

pub mod audit;
pub mod branch;
pub mod client;
pub mod cluster;
pub mod completions;
pub mod context;
pub mod contexts;
pub mod cp;
pub mod doctor;
pub mod error;
pub mod eval;
pub mod exec;
pub mod fork;
#[cfg(feature = "testing")]
pub mod fuzzing;
pub mod guest;
pub mod image;
pub mod job;
pub mod kill;
pub mod logs;
pub mod ls;
mod network;
pub mod node;
pub mod nodes;
pub mod output;
pub mod paths;
pub mod progress;
pub mod repair;
pub mod rootfs;
pub mod run;
pub mod show;
pub mod size;
pub mod template;
pub mod top;
pub mod tree;
pub mod trust;
pub mod up;
pub mod user;
pub mod watch;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::parser::ValueSource;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use client::{Client, Target};
use contexts::{ContextError, Contexts};
use error::CliError;
use output::Output;

/// What a program says when it was interrupted: 128 and the number of SIGINT.
const INTERRUPTED: u8 = 130;

/// fork() for fleets of microVMs
#[derive(Debug, Parser)]
#[command(name = "farfork", version, arg_required_else_help = true, after_help = EXAMPLES)]
pub struct Arguments {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Verb,
}

const EXAMPLES: &str = "\
Examples:
  farfork doctor                            # can this host run machines?
  farfork node &                            # start the node
  farfork fork --guest probe -n 100         # 100 machines from one warm guest
  farfork ls                                # what runs
  farfork kill --all
  farfork template build base && farfork fork base -n 10 && farfork exec a3d9 -- uname -a
  farfork fork a3d9e37c -n 8 --on node-b:7117   # on another node, before its memory is there
  farfork run base -n 300 -- echo {index}   # 300 tasks, each in a child of its own, over all nodes
  farfork up                                # a cluster on this one host, to try it
  farfork cluster init --help               # several hosts that place forks together

Exit codes: 0 done, 2 usage, 3 no node reached, 4 refused, 5 partly done";

/// What every verb takes.
#[derive(Debug, Args)]
pub struct Global {
    /// The node's socket [default: $XDG_RUNTIME_DIR/farfork/farfork.sock; of root: /run/farfork/farfork.sock]
    #[arg(long, global = true, env = "FARFORK_SOCKET", value_name = "PATH", help_heading = "Options of every verb")]
    socket: Option<PathBuf>,
    /// Ask what this name stands for (see `farfork context`) [default: the current context, if there is one]
    #[arg(long, global = true, env = "FARFORK_CONTEXT", value_name = "NAME", help_heading = "Options of every verb")]
    context: Option<String>,
    /// How to print answers
    #[arg(long, global = true, value_enum, default_value_t = Output::Table, help_heading = "Options of every verb")]
    output: Output,
}

#[derive(Debug, Subcommand)]
#[allow(clippy::large_enum_variant, reason = "there is one, for as long as the program runs")]
enum Verb {
    Node(node::Arguments),
    Fork(fork::Arguments),
    Run(run::Arguments),
    Job(job::Arguments),
    Branch(branch::Arguments),
    Exec(exec::Arguments),
    Eval(eval::Arguments),
    Cp(cp::Arguments),
    Logs(logs::Arguments),
    Ls(ls::Arguments),
    Tree(tree::Arguments),
    Top(top::Arguments),
    Show(show::Arguments),
    Watch(watch::Arguments),
    Kill(kill::Arguments),
    Template(template::Arguments),
    Image(image::Arguments),
    Up(up::Arguments),
    Down(up::DownArguments),
    Cluster(cluster::Arguments),
    Explain(nodes::ExplainArguments),
    Trust(trust::Arguments),
    User(user::Arguments),
    Whoami(user::WhoArguments),
    Audit(audit::Arguments),
    Context(context::Arguments),
    Doctor(doctor::Arguments),
    Completions(completions::Arguments),
    /// What a node starts this program as, to fork its workers from
    #[command(hide = true)]
    Zygote,
}

/// What verbs that ask a node need.
pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) output: Output,
}

/// Reads the command line, does what it says, and says how that went.
#[must_use]
pub fn main() -> ExitCode {
    let matches = Arguments::command().get_matches();
    let Arguments { mut global, verb } = Arguments::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    // What was typed counts for more than what is in the environment.
    let is_typed = |id| matches.value_source(id) == Some(ValueSource::CommandLine);
    match (is_typed("socket"), is_typed("context")) {
        (false, true) => global.socket = None,
        (true, false) => global.context = None,
        _ => {}
    }
    let output = global.output;
    let outcome = match verb {
        Verb::Node(arguments) if arguments.verb.is_none() => node::run(&arguments, global.socket),
        Verb::Cluster(cluster::Arguments { verb: cluster::Verb::Init(arguments) }) => cluster::init(&arguments, output),
        Verb::Cluster(cluster::Arguments { verb: cluster::Verb::Join(arguments) }) => cluster::join(&arguments, output),
        Verb::Context(arguments) => context::run(arguments, global.socket, output),
        Verb::Audit(audit::Arguments { verb: audit::Verb::Verify { data } }) => audit::verify(data, output),
        Verb::Up(arguments) => up::up(&arguments, output),
        Verb::Down(arguments) => up::down(&arguments, output),
        Verb::Cluster(cluster::Arguments { verb: cluster::Verb::Repair(arguments) }) => repair::run(&arguments, output),
        Verb::Doctor(arguments) => doctor::run(&arguments, output),
        Verb::Completions(arguments) => completions::run(&arguments),
        Verb::Zygote => return vm::worker::zygote::main(),
        asks_a_node => ask(asks_a_node, global),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => error.report(output),
    }
}

/// Runs a verb that asks a node, until it is done or interrupted. What the node has begun by then it finishes.
fn ask(verb: Verb, global: Global) -> Result<ExitCode, CliError> {
    let context = Context { client: Client::new(target(&global)?), output: global.output };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(CliError::Runtime)?;
    let verb = match verb {
        // Its signals are for the program in the guest, and its exit code is that program's.
        Verb::Exec(arguments) => {
            let ran = runtime.block_on(exec::run(arguments, &context));
            // A read of the terminal may still be waiting.
            runtime.shutdown_background();
            return Ok(ran.unwrap_or_else(|error| error.report_beside_guests(global.output)));
        }
        // Interrupted, they say how to come back to their job.
        Verb::Run(arguments) => return runtime.block_on(run::run(arguments, &context)),
        Verb::Job(arguments) => return runtime.block_on(job::run(arguments, &context)),
        verb => verb,
    };
    runtime.block_on(async {
        tokio::select! {
            outcome = dispatch(verb, &context) => outcome,
            _ = tokio::signal::ctrl_c() => Ok(ExitCode::from(INTERRUPTED)),
        }
    })
}

/// Whom a verb asks: what the command line names, the current context, the node of this host.
fn target(global: &Global) -> Result<Target, CliError> {
    if let (Some(_), Some(_)) = (&global.socket, &global.context) {
        return Err(CliError::Usage {
            message: "a socket and a context".to_owned(),
            remedy: "give one of --socket and --context, or unset FARFORK_SOCKET or FARFORK_CONTEXT".to_owned(),
        });
    }
    if let Some(socket) = &global.socket {
        return Ok(Target::Socket(socket.clone()));
    }
    let named = match &global.context {
        Some(name) => Some((Contexts::read()?, name.clone())),
        // Without a place for configuration there is none.
        None => match Contexts::read() {
            Ok(contexts) => contexts.current.clone().map(|name| (contexts, name)),
            Err(ContextError::Path(_)) => None,
            Err(error) => return Err(error.into()),
        },
    };
    match named {
        Some((contexts, name)) => Ok(contexts.target(&name)?),
        None => Ok(Target::Socket(paths::socket()?)),
    }
}

async fn dispatch(verb: Verb, context: &Context) -> Result<ExitCode, CliError> {
    match verb {
        Verb::Fork(arguments) => fork::run(arguments, context).await,
        Verb::Branch(arguments) => branch::run(arguments, context).await,
        Verb::Ls(arguments) => ls::run(&arguments, context).await,
        Verb::Tree(arguments) => tree::run(&arguments, context).await,
        Verb::Top(arguments) => top::run(&arguments, context).await,
        Verb::Show(arguments) => show::run(&arguments, context).await,
        Verb::Watch(arguments) => watch::run(arguments, context).await,
        Verb::Kill(arguments) => kill::run(arguments, context).await,
        Verb::Eval(arguments) => {
            Ok(eval::run(arguments, context).await.unwrap_or_else(|error| error.report_beside_guests(context.output)))
        }
        Verb::Cp(arguments) => cp::run(arguments, context).await,
        Verb::Logs(arguments) => logs::run(&arguments, context).await,
        Verb::Template(arguments) => template::run(arguments, context).await,
        Verb::Image(arguments) => image::run(arguments, context).await,
        Verb::Trust(arguments) => trust::run(arguments, context).await,
        Verb::Node(node::Arguments { verb: Some(verb), .. }) => nodes::run(verb, context).await,
        Verb::User(arguments) => user::run(arguments, context).await,
        Verb::Whoami(_) => user::whoami(context).await,
        Verb::Audit(audit::Arguments { verb: audit::Verb::Ls { count } }) => audit::list(count, context).await,
        Verb::Explain(arguments) => nodes::explain(&arguments, context).await,
        Verb::Cluster(cluster::Arguments { verb: cluster::Verb::Token(arguments) }) => {
            cluster::token(&arguments, context).await
        }
        Verb::Node(_) | Verb::Cluster(_) | Verb::Up(_) | Verb::Down(_) | Verb::Audit(_) | Verb::Context(_) => {
            unreachable!("these ask no node")
        }
        Verb::Exec(_) | Verb::Run(_) | Verb::Job(_) => unreachable!("these see to their signals"),
        Verb::Doctor(_) | Verb::Completions(_) | Verb::Zygote => unreachable!("these ask no node"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn the_help_of_each_verb_has_an_example() {
        fn check(command: &clap::Command) {
            let name = command.get_name();
            assert!(command.get_about().is_some(), "{name} says what it does");
            let after = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(after.contains("farfork"), "{name} has an example");
            command.get_subcommands().filter(|verb| !verb.is_hide_set()).for_each(check);
        }
        check(&Arguments::command());
    }
}
