//! `bench remote`: rows R1 to R9 of docs/specification.md: forks on another host, by real nodes.
//!
//! ```text
//!  this process ──HTTP over Unix sockets──▶ farfork node ◀──QUIC, mTLS──▶ farfork node
//!                                           host 0: holds the image       host 1: runs the children
//! ```
//!
//! Hosts are network namespaces of this machine, which share its cores: what takes CPU on both sides takes longer than on two
//! machines. Children touch memory by commands that the node passes on to them, which takes a build with `--features
//! farfork/bench`, with which guards can be taken out as well; all else is the product as it is.

mod apart;
mod bed;
mod broken;
mod bytes;
mod copy;
mod fanout;
mod fault;
mod first;
mod path;
mod workload;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use clap::Args;

use crate::report::Report;
use crate::{daemon, floor};
use bed::Bed;

/// Which rows, and over what.
#[derive(Args)]
pub(crate) struct Arguments {
    /// The farfork program, built with --features farfork/bench [default: the one beside this program]
    #[arg(long, value_name = "PATH")]
    farfork: Option<PathBuf>,
    /// Hosts that an image is fanned out to (row R5)
    #[arg(long, value_name = "N", default_value_t = 8)]
    hosts: usize,
    /// Round trip that is added where a row asks for delay, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 1.0)]
    delay: f64,
    /// Rate of the links where a row asks for one, in Mbit/s
    #[arg(long, value_name = "MBIT", default_value_t = 1000)]
    rate: u64,
    /// Measure between these two nodes instead, which run already: the first holds the image, the second runs the children. Each
    /// is where it listens and the socket of its API, which ssh -L carries from another host: HOST:PORT=SOCKET,HOST:PORT=SOCKET
    #[arg(long, value_name = "NODES", value_delimiter = ',', value_parser = apart::given, conflicts_with_all = ["farfork", "hosts", "delay", "rate", "rows"])]
    nodes: Vec<apart::Given>,
    /// Only these rows, with commas
    #[arg(long, value_name = "ROW", value_delimiter = ',')]
    rows: Vec<String>,
}

/// What every row gets.
struct Run {
    quick: bool,
    hosts: usize,
    delay: Duration,
    rate_mbit: u64,
}

impl Run {
    /// A number of samples: few, or as many as are meant.
    fn n(&self, quick: usize, full: usize) -> usize {
        if self.quick { quick } else { full }
    }
}

type Rows = fn(&mut Report, &Bed, &Run) -> Result<()>;

/// The rows of one function are measured beside one another.
const ROWS: [(&[&str], Rows); 7] = [
    (&["R1"], first::run),
    (&["R2"], copy::run),
    (&["R3", "R4", "R8"], bytes::run),
    (&["R6"], fault::beside_bulk),
    (&["R7"], fault::parts),
    (&["R5"], fanout::run),
    (&["R9"], broken::run),
];
/// All others count bytes on a link, or change it.
const WITHOUT_LINKS: &str = "R7";
/// With `--quick` only if they are asked for.
const SLOW: [&str; 3] = ["R5", "R6", "R9"];

pub(crate) fn run(json: Option<&Path>, quick: bool, arguments: &Arguments) -> Result<()> {
    ensure!((3..=64).contains(&arguments.hosts), "3 to 64 hosts");
    ensure!((0.0..=1000.0).contains(&arguments.delay), "a delay of at most a second");
    let known = |row: &String| ROWS.iter().any(|(ids, _)| ids.contains(&row.as_str()));
    ensure!(arguments.rows.iter().all(known), "rows are R1 to R9");
    let host = floor::open_host()?;
    let mut report = Report::new(&host, quick);
    match &arguments.nodes[..] {
        [] => {}
        [holder, runner] => {
            apart::run(&mut report, holder, runner, quick)?;
            return report.finish(json);
        }
        nodes => bail!("two nodes, not {}", nodes.len()),
    }
    let bed = Bed::new(arguments.hosts + 1, &daemon::program(arguments.farfork.as_deref())?)?;
    crate::local::warm_host_memory();
    let delay = Duration::from_secs_f64(arguments.delay / 1000.0);
    let run = Run { quick, hosts: arguments.hosts, delay, rate_mbit: arguments.rate };
    let is_asked = |ids: &[&str]| arguments.rows.is_empty() || ids.iter().any(|id| arguments.rows.iter().any(|row| row == id));
    let mut failed = Vec::new();
    for (ids, rows) in ROWS.into_iter().filter(|(ids, _)| is_asked(ids)) {
        if let Some(reason) = bed.network.why_shared().filter(|_| !ids.contains(&WITHOUT_LINKS)) {
            report.leave_out(ids, &format!("they take links of their own, and hosts share the loopback: {reason}"));
            continue;
        }
        if quick && arguments.rows.is_empty() && ids.iter().any(|id| SLOW.contains(id)) {
            report.leave_out(ids, "--quick, and they take long");
            continue;
        }
        // The others are worth having all the same.
        if let Err(error) = rows(&mut report, &bed, &run) {
            report.note(format!("{}: not measured: {error:#}", ids.join(", ")));
            failed.push(format!("{}: {error:#}", ids.join(", ")));
        }
    }
    let finished = report.finish(json);
    ensure!(failed.is_empty(), "not all was measured: {}", failed.join("; "));
    finished
}
