//! `farfork completions`.

use std::process::ExitCode;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::error::CliError;
use super::output::print;

/// Print completions for a shell
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork completions bash > /etc/bash_completion.d/farfork
  farfork completions zsh > \"${fpath[1]}/_farfork\"")]
pub struct Arguments {
    /// Which shell
    #[arg(value_enum)]
    shell: Shell,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode, CliError> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut super::Arguments::command(), "farfork", &mut script);
    print(&script)?;
    Ok(types::ExitCode::Ok.into())
}
