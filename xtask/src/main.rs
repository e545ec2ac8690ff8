//! `cargo xtask verify`: checks of the repository that no compiler makes. `cargo xtask soak`: the tests with their full counts.
#![forbid(unsafe_code)]

mod dependencies;
mod soak;
mod tidy;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;

const USAGE: &str = "usage:
  cargo xtask verify                          import rules, unsafe islands, file lengths, links, licences, duplicates
  cargo xtask soak [--seeds N] [--only TEXT]  tests with their full counts, one row a test and seed in target/soak/soak.json";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.first().map(String::as_str) {
        Some("verify") if arguments.len() == 1 => verify(),
        Some("soak") => soak::run(&arguments[1..]),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
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
