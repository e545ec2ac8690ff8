//! `bench`: how long things take, each beside its control of the same run. The rows are those of docs/specification.md.
#![forbid(unsafe_code)]

mod cluster;
mod daemon;
mod failover;
mod firecracker;
mod floor;
mod http;
mod jobs;
mod linux;
mod local;
mod node;
mod proof;
mod remote;
mod report;
mod scale;
mod workers;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

/// Measures farfork. Every figure names what is timed, its number of samples, p50, p99 and the control of the same run.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// The bare system calls of a fork and the raw cost of page faults, without the engine
    Floor {
        #[command(flatten)]
        run: Run,
    },
    /// Local fork (rows L6, L7, L8): page touches, flatness in memory size, branch of a writing machine
    Local {
        #[command(flatten)]
        run: Run,
        #[command(flatten)]
        control: Control,
    },
    /// Forks into jailed workers (rows L1 to L5, L7): with and without shells, one, 100 and 1,000 children, memory
    Workers {
        #[command(flatten)]
        run: Run,
        #[command(flatten)]
        control: Control,
        /// Leave these mechanisms out of the jail, to see what they cost (as in docs/security.md; several with commas; `all`)
        #[arg(long, value_name = "MECHANISM", value_delimiter = ',')]
        without: Vec<String>,
    },
    /// The daemon (row C2): API round trip of a fork, and the API beside an allocation storm
    Node {
        #[command(flatten)]
        run: Run,
        /// The farfork program [default: the one beside this program]
        #[arg(long, value_name = "PATH")]
        farfork: Option<PathBuf>,
    },
    /// The cluster (rows C1 to C5): jobs, forks through it, placement, nodes that are killed, and what a job writes into the log
    Cluster {
        #[command(flatten)]
        run: Run,
        /// The farfork program [default: the one beside this program]
        #[arg(long, value_name = "PATH")]
        farfork: Option<PathBuf>,
        /// The directory that `make guest` printed [default: in the user's cache]
        #[arg(long, value_name = "PATH")]
        guests: Option<PathBuf>,
        /// Take the warm Python template that `bench linux` has left here, if it has, in place of building one
        #[arg(long, value_name = "FILE")]
        template: Option<PathBuf>,
    },
    /// Linux guests (rows G1 to G4), and templates by stage of building them
    Linux {
        #[command(flatten)]
        run: Run,
        /// The farfork program [default: the one beside this program]
        #[arg(long, value_name = "PATH")]
        farfork: Option<PathBuf>,
        /// The directory that `make guest` printed [default: in the user's cache]
        #[arg(long, value_name = "PATH")]
        guests: Option<PathBuf>,
        /// Leave the warm Python template here
        #[arg(long, value_name = "FILE")]
        template: Option<PathBuf>,
    },
    /// Remote fork (rows R1 to R9): real nodes in network namespaces, or given ones
    Remote {
        #[command(flatten)]
        run: Run,
        #[command(flatten)]
        remote: remote::Arguments,
    },
    /// One job on 10 to 10,000 nodes: the control plane as it is, links and tasks by a model (docs/scaling.md)
    Scale {
        #[command(flatten)]
        run: Run,
    },
    /// One page of what `make bench` has left in a directory: HTML and Markdown with pictures
    Report {
        /// Where the JSON files of all benches are
        #[arg(default_value = "target/bench", value_name = "DIRECTORY")]
        directory: PathBuf,
    },
    /// Write the numbers of docs/figures.json (a `figures.json` of `bench report`) into README.md and docs/specification.md
    Documents {
        /// The repository
        #[arg(default_value = ".", value_name = "DIRECTORY")]
        root: PathBuf,
        /// Take the run that `bench report` has made a page of there, in place of the one in docs/figures.json
        #[arg(long, value_name = "DIRECTORY")]
        from: Option<PathBuf>,
    },
    /// What moved between two files of the same bench beyond what chance moves within a run; exit code 5 if something lost too much
    ///
    /// Machines drift between runs, too: see whether the floor or a control has moved as well before you believe a change.
    Compare {
        /// What `--json` wrote before
        before: PathBuf,
        /// And after
        after: PathBuf,
        /// Fail if a median has grown by more than so many percent, beyond chance
        #[arg(long, value_name = "PERCENT", default_value_t = 10.0)]
        fail_over: f64,
        /// Also what has not moved
        #[arg(long)]
        all: bool,
    },
    /// The process that workers are forked from; what `workers` starts
    #[command(hide = true)]
    Zygote,
    /// One bare fork in this process, as nanoseconds of its stages; what `floor` starts for each sample
    #[command(hide = true)]
    FloorSample {
        /// Guest memory in MiB
        mib: u64,
        /// Microseconds to sleep between the shell and its fork
        idle_us: u64,
    },
}

/// What every bench takes.
#[derive(Args)]
struct Run {
    /// Write table and raw samples here as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Fewer samples, to see how things are: what docs/specification.md asks for takes more
    #[arg(long)]
    quick: bool,
}

/// The control that people know.
#[derive(Args)]
struct Control {
    /// Also measure the snapshot/load of this Firecracker binary, as a control
    #[arg(long, value_name = "PATH")]
    firecracker: Option<PathBuf>,
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().verb {
        Verb::Floor { run } => floor::run(run.json.as_deref(), run.quick),
        Verb::Local { run, control } => local::run(run.json.as_deref(), run.quick, control.firecracker.as_deref()),
        Verb::Workers { run, control, without } => {
            workers::run(run.json.as_deref(), run.quick, control.firecracker.as_deref(), &without)
        }
        Verb::Node { run, farfork } => node::run(run.json.as_deref(), run.quick, farfork.as_deref()),
        Verb::Cluster { run, farfork, guests, template } => {
            let given = linux::Given { guests, template };
            cluster::run(run.json.as_deref(), run.quick, farfork.as_deref(), &given)
        }
        Verb::Linux { run, farfork, guests, template } => {
            let given = linux::Given { guests, template };
            linux::run(run.json.as_deref(), run.quick, farfork.as_deref(), &given)
        }
        Verb::Remote { run, remote } => remote::run(run.json.as_deref(), run.quick, &remote),
        Verb::Scale { run } => scale::run(run.json.as_deref(), run.quick),
        Verb::Report { directory } => report::page::run(&directory),
        Verb::Documents { root, from } => report::documents::run(&root, from.as_deref()),
        Verb::Compare { before, after, fail_over, all } => match report::compare::run(&before, &after, fail_over, all) {
            Ok(code) => return code,
            Err(error) => Err(error),
        },
        Verb::Zygote => return vm::worker::zygote::main(),
        Verb::FloorSample { mib, idle_us } => floor::print_sample(mib, Duration::from_micros(idle_us)),
    };
    finish(outcome)
}

/// A figure that misses its target is in the table, not in the exit code; work that was not done is.
fn finish(outcome: Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => types::ExitCode::Ok.into(),
        Err(error) => {
            eprintln!("error: {error:#}");
            types::ExitCode::Refused.into()
        }
    }
}
