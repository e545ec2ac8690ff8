//! `farfork trust`.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use types::Tenant;

use super::Context;
use super::client::segment;
use super::error::CliError;
use super::fork::id;
use super::output::{Output, table};
use super::size;
use crate::api::wire::{Certificate, TrustAnswer, TrustRequest, TrustedNode};
use crate::node::TrustStore;
use crate::node::trust::Role;

/// Say which other nodes this node trusts
///
/// Two nodes fork to and from one another once each has the other's certificate. It holds at once, without a restart.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork trust show > node-a.pem                      # on node A; bring the file to node B
  farfork trust add node-a.pem                         # on node B; then the other way round
  ssh node-b farfork trust show | farfork trust add -  # both steps of one direction
  farfork trust ls")]
pub struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Print this node's own certificate
    #[command(after_help = "Example:\n  farfork trust show > node-a.pem")]
    Show,
    /// Trust the node of a certificate, from now on
    ///
    /// It may read images of these tenants here, and have them forked here. Added again, it gets these tenants instead of those
    /// before. A node that is trusted with another certificate has to be removed first.
    #[command(after_help = "\
Examples:
  farfork trust add node-a.pem
  farfork trust add node-a.pem --tenant team-7 --tenant default")]
    Add {
        /// What `farfork trust show` printed on that node; - reads it from stdin
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// Whose images it may read here and have forked here
        #[arg(long = "tenant", value_name = "NAME", default_value = "default")]
        tenants: Vec<Tenant>,
    },
    /// List nodes that are trusted
    #[command(after_help = "Example:\n  farfork trust ls --output json")]
    Ls,
    /// Trust a node no longer; its connections are closed
    #[command(after_help = "Example:\n  farfork trust rm a3d9e37c")]
    Rm {
        /// The node's id, or the last 4 and more digits of it
        #[arg(value_name = "NODE", value_parser = id)]
        node: String,
    },
}

pub(crate) async fn run(arguments: Arguments, context: &Context) -> Result<ExitCode, CliError> {
    let Context { client, output } = context;
    match arguments.verb {
        Verb::Show => {
            let answer = client.get::<Certificate>("/v1/trust/own").await?;
            output.answer(&answer.raw, || answer.value.pem.clone())?;
            if *output == Output::Table {
                eprint!("{}", facts(&answer.value));
            }
        }
        Verb::Add { file, tenants } => {
            let tenants = tenants.into_iter().map(String::from).collect();
            let request = TrustRequest { certificate: read(&file)?, tenants };
            let answer = client.post::<TrustedNode>("/v1/trust", &request).await?;
            output.answer(&answer.raw, || list(std::slice::from_ref(&answer.value)))?;
        }
        Verb::Ls => {
            let answer = client.get::<TrustAnswer>("/v1/trust").await?;
            output.answer(&answer.raw, || list(&answer.value.nodes))?;
        }
        Verb::Rm { node } => {
            let answer = client.delete::<TrustedNode>(&format!("/v1/trust/{}", segment(&node))).await?;
            output.answer(&answer.raw, || format!("{}\n", answer.value.certificate.node))?;
        }
    }
    Ok(types::ExitCode::Ok.into())
}

/// A certificate from a file, or from stdin. One byte more than a node takes, so that the node says what is wrong.
fn read(file: &Path) -> Result<String, CliError> {
    let failed = |source| CliError::Input { file: file.to_owned(), source };
    let mut text = String::new();
    let bytes_max = TrustStore::PEM_BYTES_MAX as u64 + 1;
    if file == Path::new("-") {
        std::io::stdin().lock().take(bytes_max).read_to_string(&mut text).map_err(failed)?;
    } else {
        std::fs::File::open(file).map_err(failed)?.take(bytes_max).read_to_string(&mut text).map_err(failed)?;
    }
    Ok(text)
}

fn facts(certificate: &Certificate) -> String {
    let Certificate { node, role, fingerprint, not_after_unix_ms, .. } = certificate;
    let left = size::left(*not_after_unix_ms, pages::clock::wall());
    format!("node {node}, {}, valid for {left}, BLAKE3 {fingerprint}\n", name(*role))
}

fn list(nodes: &[TrustedNode]) -> String {
    let rows = nodes.iter().map(|node| {
        let certificate = &node.certificate;
        [
            certificate.node.to_string(),
            name(certificate.role).to_owned(),
            node.tenants.join(","),
            size::left(certificate.not_after_unix_ms, pages::clock::wall()),
            certificate.fingerprint.chars().take(16).collect(),
        ]
    });
    table(["NODE", "ROLE", "TENANTS", "VALID FOR", "FINGERPRINT"], &[3], rows.collect())
}

fn name(role: Role) -> &'static str {
    match role {
        Role::Voter => "voter",
        Role::Learner => "learner",
    }
}
