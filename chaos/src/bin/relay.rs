//! `farfork-relay`: stands between UDP clients and a server, and impairs what it carries.
#![forbid(unsafe_code)]

use std::error::Error;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use chaos::relay::{Config, Impairment, Probability, Rate, Relay};
use clap::{Parser, ValueEnum};

/// Stands between UDP clients and a server, and delays, loses, doubles, reorders, corrupts or slows what it carries.
///
/// It runs until its standard input ends (Ctrl-D) or for --seconds, and then prints as JSON what it has done. What chance does
/// to the n-th datagram of a client depends on --seed, on how many clients came before, on the direction and on n only: run it
/// again with the same seed, and the same datagrams are hit.
#[derive(Parser)]
#[command(version, after_help = EXAMPLES)]
struct Arguments {
    /// Where clients send to; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: SocketAddr,
    /// The server
    #[arg(long, value_name = "ADDRESS:PORT")]
    upstream: SocketAddr,
    /// What all chance is drawn from
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Which way to impair; the other one only carries
    #[arg(long, value_enum, default_value_t = Way::Both)]
    way: Way,
    /// How long each datagram takes, one way
    #[arg(long, value_name = "MS", default_value_t = 0.0, value_parser = milliseconds)]
    delay_ms: f64,
    /// At most how much longer, drawn uniformly; datagrams nearer to each other than this overtake one another
    #[arg(long, value_name = "MS", default_value_t = 0.0, value_parser = milliseconds)]
    jitter_ms: f64,
    /// How many are lost: 0.01 is one in a hundred
    #[arg(long, value_name = "CHANCE", default_value_t = Probability::NEVER)]
    loss: Probability,
    /// How many come twice
    #[arg(long, value_name = "CHANCE", default_value_t = Probability::NEVER)]
    duplicate: Probability,
    /// How many are held back, so that later ones overtake them
    #[arg(long, value_name = "CHANCE", default_value_t = Probability::NEVER)]
    reorder: Probability,
    /// For how long they are held back
    #[arg(long, value_name = "MS", default_value_t = 1.0, value_parser = milliseconds)]
    hold_back_ms: f64,
    /// How many come with one bit flipped
    #[arg(long, value_name = "CHANCE", default_value_t = Probability::NEVER)]
    corrupt: Probability,
    /// Bytes a second of each way, UDP payload, all clients together; 12500000 is 100 Mbit/s [default: no limit]
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u64).range(1..))]
    rate: Option<u64>,
    /// How many bytes wait before the rate; more is dropped [default: 50 ms of the rate, at least 64 KiB]
    #[arg(long, value_name = "BYTES", requires = "rate")]
    queue: Option<u64>,
    /// Let nothing through
    #[arg(long)]
    block: bool,
    /// End after so long [default: when standard input ends]
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<u32>,
}

const EXAMPLES: &str = "\
Examples:
  A link of 20 ms there and 20 ms back that loses one datagram in a hundred, before a node:
    farfork-relay --listen 127.0.0.1:7000 --upstream 127.0.0.1:7443 --seed 7 --delay-ms 20 --loss 0.01
  The server's answers are lost, what it is asked comes through:
    farfork-relay --listen 127.0.0.1:7000 --upstream 127.0.0.1:7443 --way to-client --block
  1 Mbit/s for ten seconds:
    farfork-relay --listen 127.0.0.1:7000 --upstream 127.0.0.1:7443 --rate 125000 --seconds 10";

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Way {
    Both,
    ToUpstream,
    ToClient,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    let of =
        |way| if arguments.way == Way::Both || arguments.way == way { impairment(arguments) } else { Impairment::default() };
    let relay = Relay::start(Config {
        listen: arguments.listen,
        upstream: arguments.upstream,
        seed: arguments.seed,
        to_upstream: of(Way::ToUpstream),
        to_client: of(Way::ToClient),
    })
    .map_err(|error| {
        let source = error.source().map(ToString::to_string).unwrap_or_default();
        format!("{error}: {source}; {}", error.remedy())
    })?;
    eprintln!("relay on {} to {}", relay.address(), arguments.upstream);
    match arguments.seconds {
        Some(seconds) => thread::sleep(Duration::from_secs(seconds.into())),
        None => {
            let mut ignored = [0; 4096];
            while io::stdin().read(&mut ignored)? > 0 {}
        }
    }
    println!("{}", serde_json::to_string_pretty(&relay.stop())?);
    Ok(())
}

fn impairment(arguments: &Arguments) -> Impairment {
    let duration = |milliseconds: f64| Duration::from_secs_f64(milliseconds / 1000.0);
    let rate = arguments.rate.map(Rate::new);
    Impairment {
        delay: duration(arguments.delay_ms),
        jitter: duration(arguments.jitter_ms),
        loss: arguments.loss,
        duplicate: arguments.duplicate,
        reorder: arguments.reorder,
        hold_back: duration(arguments.hold_back_ms),
        corrupt: arguments.corrupt,
        rate: rate.map(|rate| Rate { queue_bytes: arguments.queue.unwrap_or(rate.queue_bytes), ..rate }),
        is_blocked: arguments.block,
    }
}

/// From 0 to an hour.
fn milliseconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(milliseconds) if (0.0..=3_600_000.0).contains(&milliseconds) => Ok(milliseconds),
        _ => Err("a number of milliseconds from 0 to 3600000 (an hour)".into()),
    }
}
