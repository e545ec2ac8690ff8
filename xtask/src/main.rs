//! `cargo xtask verify`: checks of the repository that no compiler makes. `cargo xtask soak`: the tests with their full counts.
#![forbid(unsafe_code)]

mod dependencies;
mod soak;
mod tidy;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

/// Checks of the repository itself, and the driver of make soak
#[derive(Parser)]
#[command(name = "cargo xtask", arg_required_else_help = true)]
enum Task {
    /// Check import rules, unsafe islands, file lengths, links, licences and duplicates
    Verify,
    /// Run tests with their full counts: one row a test and seed in target/soak/soak.json, gone on with where it was stopped
    Soak {
        /// How many seeds each test runs with, from 1 on
        #[arg(long, value_name = "N", default_value_t = 1)]
        seeds: u64,
        /// Only tests whose name contains this
        #[arg(long, value_name = "TEXT")]
        only: Option<String>,
    },
}

fn main() -> ExitCode {
    let outcome = match Task::parse() {
        Task::Verify => verify(),
        Task::Soak { seeds, only } => soak::run(seeds, only.as_deref()),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn verify() -> Result<bool> {
    let mut complaints = tidy::complaints(&root())?;
    complaints.extend(dependencies::complaints(&root())?);
    for complaint in &complaints {
        eprintln!("{complaint}");
    }
    println!("verify: {} complaints", complaints.len());
    Ok(complaints.is_empty())
}

/// The top of the repository.
fn root() -> PathBuf {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    here.parent().expect("xtask lies in the repository").to_owned()
}
