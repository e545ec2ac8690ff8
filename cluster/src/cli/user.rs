//! `farfork user`: who may ask over HTTPS; `farfork whoami`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use control::state::Level;
use types::{Name, Tenant};

use super::client::segment;
use super::error::CliError;
use super::output::table;
use super::{Context, size};
use crate::api::wire::{RemovedAnswer, UserAnswer, UserRequest, UsersAnswer, WhoAnswer};

/// Who may ask the cluster over HTTPS
///
/// Nodes answer users where --https of `farfork node` says. The cluster keeps digests of tokens, not tokens.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork user add ann --level submit --tenant team-7      # prints her token, once
  farfork user add ci --level submit --certificate ci.pem  # known by its key, which stays where it is
  farfork user add root --level admin --all-tenants
  farfork user ls
  farfork user rm ann")]
pub struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Add(Add),
    /// List users
    #[command(after_help = "Example:\n  farfork user ls")]
    Ls,
    /// Let somebody ask no more; what it has started goes on
    #[command(after_help = "Example:\n  farfork user rm ann")]
    Rm {
        /// Its name
        #[arg(value_parser = Name::parse)]
        name: Name,
    },
}

/// Let somebody ask, with a token that is printed once, or with a certificate of its own
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork user add ann --level submit
  farfork user add ben --level read --tenant team-7 --for 30d")]
struct Add {
    /// What to call it
    #[arg(value_parser = Name::parse)]
    name: Name,
    /// What it may do
    #[arg(long, value_enum)]
    level: LevelArgument,
    /// Whose machines and images it reaches [default: default]
    #[arg(long, value_name = "NAME", value_parser = str::parse::<Tenant>)]
    tenant: Option<Tenant>,
    /// All tenants', and the cluster itself; only with --level admin
    #[arg(long, conflicts_with = "tenant")]
    all_tenants: bool,
    /// A certificate that it shows, of which nothing but the key counts (PEM)
    #[arg(long, value_name = "PATH")]
    certificate: Option<PathBuf>,
    /// For how long [default: until it is removed]
    #[arg(long = "for", value_name = "TIME", value_parser = size::long_duration)]
    lasts: Option<Duration>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LevelArgument {
    /// Look
    Read,
    /// Fork, run and end machines too
    Submit,
    /// Save and remove templates and images too
    Admin,
}

/// Says who asks, where, and what that one may do
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  farfork whoami")]
pub struct WhoArguments {}

pub(crate) async fn run(arguments: Arguments, context: &Context) -> Result<ExitCode, CliError> {
    let Context { client, output } = context;
    match arguments.verb {
        Verb::Add(add) => {
            let certificate =
                add.certificate.map(|file| std::fs::read_to_string(&file).map_err(|source| CliError::Input { file, source }));
            let level = match add.level {
                LevelArgument::Read => Level::Read,
                LevelArgument::Submit => Level::Submit,
                LevelArgument::Admin => Level::Admin,
            };
            let request = UserRequest {
                name: add.name.to_string(),
                level,
                tenant: add.tenant.map(String::from),
                all_tenants: add.all_tenants,
                certificate: certificate.transpose()?,
                lasts_s: add.lasts.map(|lasts| lasts.as_secs()),
            };
            let answer = client.post::<UserAnswer>("/v1/users", &request).await?;
            output.answer(&answer.raw, || answer.value.token.as_ref().map_or(String::new(), |token| format!("{token}\n")))?;
            if *output == super::output::Output::Table {
                eprint!("{}", how_to_ask(&answer.value));
            }
        }
        Verb::Ls => {
            let answer = client.get::<UsersAnswer>("/v1/users").await?;
            let rows = answer.value.users.iter().map(|user| {
                let lasts = user.expires_in_s.map_or_else(|| "-".to_owned(), |seconds| format!("{seconds} s"));
                [user.name.clone(), word(user.level), user.tenant.clone().unwrap_or_else(|| "all".to_owned()), lasts]
            });
            output.answer(&answer.raw, || table(["USER", "LEVEL", "TENANT", "ENDS IN"], &[3], rows.collect()))?;
        }
        Verb::Rm { name } => {
            let answer = client.delete::<RemovedAnswer>(&format!("/v1/users/{}", segment(name.as_str()))).await?;
            output.answer(&answer.raw, || format!("{}\n", answer.value.removed))?;
        }
    }
    Ok(types::ExitCode::Ok.into())
}

pub(crate) async fn whoami(context: &Context) -> Result<ExitCode, CliError> {
    let answer = context.client.get::<WhoAnswer>("/v1/whoami").await?;
    let WhoAnswer { who, level, tenant, node } = &answer.value;
    let reach = tenant.as_deref().map_or_else(|| "all tenants".to_owned(), |tenant| format!("tenant {tenant}"));
    context.output.answer(&answer.raw, || format!("{who}: {} of {reach}, on node {node}\n", word(*level)))?;
    Ok(types::ExitCode::Ok.into())
}

fn how_to_ask(of: &UserAnswer) -> String {
    let hint = "this node does not answer users: start it, or others, with --https ADDRESS:PORT\n";
    let (url, hint) = of.url.as_deref().map_or(("https://HOST:PORT", hint), |url| (url, ""));
    let shows = if of.token.is_some() { "--token-file -" } else { "--certificate PATH --key PATH" };
    let name = &of.name;
    format!("{hint}{name} asks with: farfork context add NAME --url {url} --authority {} {shows}\n", of.authority)
}

fn word(level: Level) -> String {
    format!("{level:?}").to_lowercase()
}
