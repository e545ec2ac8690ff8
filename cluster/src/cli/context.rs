//! `farfork context`: names for where verbs ask.

use std::io::Read;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde::Serialize;

use super::contexts::{ContextError, Contexts, Entry};
use super::error::CliError;
use super::output::{Output, table};

/// Names for where verbs ask: clusters over HTTPS, and sockets
///
/// They are kept in ~/.config/farfork/config.toml, or where FARFORK_CONFIG says. Verbs ask the current one, unless they are given
/// --context or --socket.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork context add prod --url https://192.0.2.1:7118 --authority 5f2c... --token-file -   # the token from stdin
  farfork context add lab --socket /run/lab/farfork.sock
  farfork context ls
  farfork --context lab ls
  farfork context use prod")]
pub struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Add a context, which is the current one from now on
    ///
    /// `farfork user add` on a node of the cluster prints what it takes.
    #[command(after_help = "\
Examples:
  farfork context add prod --url https://192.0.2.1:7118 --authority 5f2c... --token-file token
  farfork context add ci --url https://farfork.example.org --ca ca.pem --certificate ci.pem --key ci.key")]
    Add(Add),
    /// List contexts
    #[command(after_help = "Example:\n  farfork context ls")]
    Ls,
    /// Ask there from now on
    #[command(after_help = "Example:\n  farfork context use prod")]
    Use {
        /// Its name
        name: String,
    },
    /// Forget a context
    #[command(after_help = "Example:\n  farfork context rm prod")]
    Rm {
        /// Its name
        name: String,
    },
}

#[derive(Debug, Args)]
struct Add {
    /// What to call it
    name: String,
    /// A node of the cluster; several, and the first that answers is asked
    #[arg(long = "url", value_name = "https://HOST:PORT", required_unless_present = "socket")]
    urls: Vec<String>,
    /// The digest of the cluster's authority, by which its nodes are known
    #[arg(long, value_name = "DIGEST")]
    authority: Option<String>,
    /// Who vouches for the names of its nodes instead (PEM)
    #[arg(long, value_name = "PATH", conflicts_with = "authority")]
    ca: Option<PathBuf>,
    /// A file with the token that shows who asks; - for stdin
    #[arg(long, value_name = "PATH")]
    token_file: Option<PathBuf>,
    /// A certificate that shows who asks instead (PEM)
    #[arg(long, value_name = "PATH", requires = "key", conflicts_with = "token_file")]
    certificate: Option<PathBuf>,
    /// Its key (PEM)
    #[arg(long, value_name = "PATH", requires = "certificate")]
    key: Option<PathBuf>,
}

/// A context, without what is secret in it.
#[derive(Serialize)]
struct Listed<'a> {
    name: &'a str,
    is_current: bool,
    at: Vec<String>,
    shows: &'static str,
}

pub(crate) fn run(arguments: Arguments, socket: Option<PathBuf>, output: Output) -> Result<ExitCode, CliError> {
    let mut contexts = Contexts::read()?;
    let unknown = |name: &str| ContextError::Unknown { name: name.to_owned() };
    match arguments.verb {
        Verb::Ls => {}
        Verb::Add(add) => {
            let token = add.token_file.as_deref().map(read_token).transpose()?;
            let socket = if add.urls.is_empty() { socket } else { None };
            let Add { name, urls, authority, ca, certificate, key, .. } = add;
            let absolute = |path: Option<PathBuf>| path.map(std::path::absolute).transpose().map_err(CliError::Runtime);
            let (ca, certificate, key, socket) = (absolute(ca)?, absolute(certificate)?, absolute(key)?, absolute(socket)?);
            contexts.add(&name, Entry { socket, urls, authority, ca, token, certificate, key })?;
            contexts.write()?;
        }
        Verb::Use { name } => {
            if !contexts.contexts.contains_key(&name) {
                return Err(unknown(&name).into());
            }
            contexts.current = Some(name);
            contexts.write()?;
        }
        Verb::Rm { name } => {
            contexts.contexts.remove(&name).ok_or_else(|| unknown(&name))?;
            contexts.current = contexts.current.filter(|current| *current != name);
            contexts.write()?;
        }
    }
    let listed: Vec<Listed<'_>> = contexts.contexts.iter().map(|(name, entry)| listed(name, entry, &contexts)).collect();
    let raw = serde_json::to_vec(&listed).expect("plain data");
    output.answer(&raw, || {
        let rows = listed.iter().map(|listed| {
            let mark = if listed.is_current { "*" } else { "" };
            [mark.to_owned(), listed.name.to_owned(), listed.at.join(" "), listed.shows.to_owned()]
        });
        table(["", "CONTEXT", "AT", "SHOWS"], &[], rows.collect())
    })?;
    Ok(types::ExitCode::Ok.into())
}

fn listed<'a>(name: &'a str, entry: &Entry, contexts: &Contexts) -> Listed<'a> {
    let at = match &entry.socket {
        Some(socket) => vec![socket.display().to_string()],
        None => entry.urls.clone(),
    };
    let shows = match (&entry.token, &entry.certificate) {
        (Some(_), _) => "a token",
        (None, Some(_)) => "a certificate",
        (None, None) => "its user",
    };
    Listed { name, is_current: contexts.current.as_deref() == Some(name), at, shows }
}

/// Not on the command line: others see that.
fn read_token(file: &std::path::Path) -> Result<String, CliError> {
    const TOKEN_BYTES_MAX: u64 = 4096;
    let failed = |source| CliError::Input { file: file.to_owned(), source };
    let mut text = String::new();
    if file == std::path::Path::new("-") {
        std::io::stdin().lock().take(TOKEN_BYTES_MAX).read_to_string(&mut text).map_err(failed)?;
    } else {
        std::fs::File::open(file).map_err(failed)?.take(TOKEN_BYTES_MAX).read_to_string(&mut text).map_err(failed)?;
    }
    Ok(text.trim().to_owned())
}
