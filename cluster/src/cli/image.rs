//! `farfork image`.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use types::Name;

use super::client::segment;
use super::error::CliError;
use super::fork::{full_name, id};
use super::output::{short, table};
use super::progress::Progress;
use super::{Context, size};
use crate::api::images::NAME_PREFIX;
use crate::api::wire::{ErrorBody, Image, ImagesAnswer, NameRequest, RemovedAnswer, Residency};
use crate::cli::client::ClientError;
use crate::node::ShortId;

/// Digits of a digest in a table. All 64 are in `--output json`, and `image digest` prints them.
const DIGEST_SHOWN: usize = 12;

/// List, hash, save, load and remove images
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork image ls
  farfork image save a3d9e37c python-warm
  farfork image load python-warm")]
pub struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// List images in memory and in the store
    #[command(after_help = "Example:\n  farfork image ls --output json")]
    Ls,
    /// Print an image's digest, its name on every node; hashes it first if need be
    #[command(after_help = "\
Examples:
  farfork image digest a3d9e37c
  farfork fork $(ssh node-b farfork image digest a3d9e37c) --from node-b:7117")]
    Digest {
        /// Its id, or the last 4 and more digits of it
        #[arg(value_parser = id)]
        id: String,
    },
    /// Save an image in memory under a name
    #[command(after_help = "Example:\n  farfork image save a3d9e37c python-warm")]
    Save {
        /// Its id, or the last 4 and more digits of it
        #[arg(value_parser = id)]
        id: String,
        /// 1 to 64 of a-z 0-9 . _ - that begin with a letter or digit
        name: Name,
    },
    /// Load a saved image into memory, verified
    #[command(after_help = "Example:\n  farfork image load python-warm")]
    Load {
        /// Its name
        #[arg(value_parser = full_name)]
        name: String,
    },
    /// Forget an image in memory, or delete a saved one
    #[command(after_help = "\
Machines that were forked from it go on.

Examples:
  farfork image rm a3d9e37c              # in memory
  farfork image rm python-warm           # in the store
  farfork image rm name:deadbeef         # in the store, although it reads like an id")]
    Rm {
        /// The id of one in memory or its last 4 and more digits, or the name of a saved one
        #[arg(value_name = "ID|NAME", value_parser = which)]
        which: String,
    },
}

pub(crate) async fn run(arguments: Arguments, context: &Context) -> Result<ExitCode, CliError> {
    match arguments.verb {
        Verb::Ls => {
            let answer = context.client.get::<ImagesAnswer>("/v1/images").await?;
            context.output.answer(&answer.raw, || list(&answer.value))?;
        }
        Verb::Digest { id } => {
            let progress = Progress::start(format!("hashing {id}"));
            let path = format!("/v1/images/{}/digest", segment(&id));
            let answer = context.client.post::<Image>(&path, &()).await?;
            drop(progress);
            context.output.answer(&answer.raw, || format!("{}\n", answer.value.digest.as_deref().unwrap_or("-")))?;
        }
        Verb::Save { id, name } => {
            let path = format!("/v1/images/{}/save", segment(&id));
            change(&path, format!("saving {name}"), &NameRequest { name: name.into() }, context).await?;
        }
        Verb::Load { name } => {
            change("/v1/images/load", format!("loading {name}"), &NameRequest { name }, context).await?;
        }
        Verb::Rm { which } => {
            let which = id_or_name(&which, context).await?;
            let answer = context.client.delete::<RemovedAnswer>(&format!("/v1/images/{}", segment(&which))).await?;
            context.output.answer(&answer.raw, || format!("{}\n", answer.value.removed))?;
        }
    }
    Ok(types::ExitCode::Ok.into())
}

async fn change(path: &str, doing: String, request: &NameRequest, context: &Context) -> Result<(), CliError> {
    let progress = Progress::start(doing);
    let answer = context.client.post::<Image>(path, request).await?;
    drop(progress);
    let image = &answer.value;
    let name = image.name.as_deref().unwrap_or("-");
    context.output.answer(&answer.raw, || format!("{} {name} {}\n", short(image.id.as_uuid()), size::bytes(image.stored_bytes)))
}

fn which(text: &str) -> Result<String, String> {
    let name = text.strip_prefix(NAME_PREFIX).unwrap_or(text);
    if ShortId::parse(text).is_ok() {
        return Ok(text.to_owned());
    }
    full_name(name).map(|_| text.to_owned()).map_err(|error| error.to_string())
}

/// What only one of them can be is that; what may be both is looked up, and refused if it is.
async fn id_or_name(text: &str, context: &Context) -> Result<String, CliError> {
    let Ok(id) = ShortId::parse(text) else {
        return Ok(format!("{NAME_PREFIX}{}", text.strip_prefix(NAME_PREFIX).unwrap_or(text)));
    };
    let images = context.client.get::<ImagesAnswer>("/v1/images").await?.value;
    let is_id = images.images.iter().any(|image| id.matches(image.id.as_uuid()));
    let is_name = images.stored.iter().any(|stored| stored.name == text);
    match (is_id, is_name) {
        (true, true) => Err(ClientError::Refused {
            status: axum::http::StatusCode::CONFLICT,
            body: Box::new(ErrorBody {
                code: "AMBIGUOUS_ID".to_owned(),
                message: format!("{text} is the end of an id and a name"),
                remedy: format!("give more digits of the id, or {NAME_PREFIX}{text}"),
                reason: None,
            }),
        }
        .into()),
        (false, true) => Ok(format!("{NAME_PREFIX}{text}")),
        (_, false) => Ok(text.to_owned()),
    }
}

fn list(answer: &ImagesAnswer) -> String {
    let now = pages::clock::wall();
    let in_memory = answer.images.iter().map(|image| {
        [
            short(image.id.as_uuid()),
            image.name.clone().unwrap_or_else(|| "-".to_owned()),
            image.digest.as_ref().map_or_else(|| "-".to_owned(), |digest| digest.chars().take(DIGEST_SHOWN).collect()),
            image.origin.clone(),
            image.depth.to_string(),
            size::bytes(image.memory_bytes),
            size::bytes(image.own_bytes),
            image.residency.as_ref().map_or_else(|| "-".to_owned(), Residency::in_short),
            size::age(image.created_unix_ms, now),
        ]
    });
    // A saved image that is in memory has its line already.
    let is_loaded = |name: &str| answer.images.iter().any(|image| image.name.as_deref() == Some(name));
    let on_disk = answer.stored.iter().filter(|stored| !is_loaded(&stored.name)).map(|stored| {
        let none = || "-".to_owned();
        let size = size::bytes(stored.file_bytes);
        [none(), stored.name.clone(), none(), "saved".to_owned(), none(), none(), size, none(), none()]
    });
    let head = ["IMAGE", "NAME", "DIGEST", "ORIGIN", "DEPTH", "MEMORY", "OWN", "SETTLED", "AGE"];
    table(head, &[4, 5, 6, 7, 8], in_memory.chain(on_disk).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_neither_id_nor_name_is_refused_before_a_node_is_asked() {
        for good in ["deadbeef", "python-warm", "name:deadbeef", "DEADBEEF", "team-7/warm"] {
            assert_eq!(which(good).as_deref(), Ok(good));
        }
        for bad in ["", "a/b/c", "name:", "name:../x", "a b", &"x".repeat(300)] {
            assert!(which(bad).is_err(), "{bad:?}");
        }
    }
}
