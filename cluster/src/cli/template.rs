//! `farfork template`.

use std::fs::File;
use std::io::{IsTerminal, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::client::segment;
use super::error::CliError;
use super::fork::full_name;
use super::output::{short, table, time};
use super::progress::Progress;
use super::{Context, paths, rootfs, size};
use crate::api::wire::{BuildRequest, RemovedAnswer, Template, TemplatesAnswer};

/// How often somebody who builds is told what the node is at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Build, list, show, move and remove templates: warm Linux machines to fork
///
/// A template is a machine that was booted and warmed up once, and sealed before anything of a child had run in it.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork template build base
  farfork template build py --rootfs python --memory 256MiB --main 'python3 /usr/lib/farfork/main.py json hashlib'
  farfork fork py -n 10")]
pub struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Build(Box<Build>),
    /// List templates, those that are being built too
    #[command(after_help = "Example:\n  farfork template ls --output json")]
    Ls,
    /// Show a template, and how long the stages of building it took
    #[command(after_help = "Example:\n  farfork template show py")]
    Show {
        /// Its name
        #[arg(value_parser = full_name)]
        name: String,
    },
    /// Write a template into a file, for `template import` on another host
    #[command(after_help = "\
Examples:
  farfork template export py py.img
  farfork template export py - | zstd | ssh B 'zstd -d | farfork template import py -'")]
    Export {
        /// Its name
        #[arg(value_parser = full_name)]
        name: String,
        /// The file, which must not exist; - is standard output
        file: PathBuf,
    },
    /// Take in a template that was exported; it is verified, and refused if this host cannot run it
    #[command(after_help = "Example:\n  farfork template import py py.img")]
    Import {
        /// The name that it gets
        #[arg(value_parser = full_name)]
        name: String,
        /// The file; - is standard input
        file: PathBuf,
    },
    /// Remove a template; machines that were forked from it go on
    #[command(after_help = "Example:\n  farfork template rm py")]
    Rm {
        /// Its name
        #[arg(value_parser = full_name)]
        name: String,
    },
}

/// Build a template: boot a kernel and a root file system, warm it up, seal, freeze and save it
///
/// Kernel, agent and the root file systems `base` and `python` come from `make guest`. Where KVM emulates guest kernels a boot
/// takes half a minute; elsewhere, less than a second.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork template build base
  docker save nginx:alpine -o nginx.tar && farfork template build nginx --rootfs nginx.tar
  farfork template build web --rootfs ./web.ext4 --warm 'httpd -p 80' --ready 'wget -qO- localhost'
  farfork template build py --rootfs python --memory 256MiB --main 'python3 /usr/lib/farfork/main.py json'")]
struct Build {
    /// Its name
    #[arg(value_parser = full_name)]
    name: String,
    /// The root file system: an ext4 image, a directory, a tar archive, an OCI layout, what `docker save` wrote, or `base` or
    /// `python` of `make guest`
    #[arg(long, value_name = "PATH|NAME", default_value = "base")]
    rootfs: PathBuf,
    /// A vmlinux or bzImage [default: that of `make guest`]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// The agent's initial RAM disk [default: that of `make guest`]
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// RAM, a multiple of 2MiB
    #[arg(long, value_name = "SIZE", default_value = "128MiB", value_parser = size::parse)]
    memory: u64,
    /// Virtual CPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=8))]
    vcpus: u64,
    /// The disk, a multiple of 2MiB [default: as large as the root file system]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    disk: Option<u64>,
    /// What makes it warm: run to its end, or, with --ready, left running
    #[arg(long, value_name = "COMMAND")]
    warm: Option<String>,
    /// Tried until it succeeds
    #[arg(long, value_name = "COMMAND")]
    ready: Option<String>,
    /// The main process, which answers `farfork eval` in children
    #[arg(long, value_name = "COMMAND")]
    main: Option<String>,
    /// Give it a network card, plugged into the node's network of guests (farfork node --guest-network) while it is warmed up
    #[arg(long)]
    network: bool,
    /// Added to the kernel's command line
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    kernel_arguments: String,
    /// Seal it even with secrets that can be seen in it: every child will have them
    #[arg(long)]
    allow_secrets: bool,
    /// Seal it even with established connections with others: every child will think that it has them
    #[arg(long)]
    allow_connections: bool,
    /// Seconds that each stage in the guest may take
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    deadline: u64,
}

pub(crate) async fn run(arguments: Arguments, context: &Context) -> Result<ExitCode, CliError> {
    match arguments.verb {
        Verb::Build(build) => self::build(*build, context).await?,
        Verb::Ls => {
            let answer = context.client.get::<TemplatesAnswer>("/v1/templates").await?;
            context.output.answer(&answer.raw, || list(&answer.value))?;
        }
        Verb::Show { name } => {
            let answer = context.client.get::<Template>(&path_of(&name)).await?;
            context.output.answer(&answer.raw, || describe(&answer.value))?;
        }
        Verb::Export { name, file } => export(&name, file, context).await?,
        Verb::Import { name, file } => import(&name, file, context).await?,
        Verb::Rm { name } => {
            let answer = context.client.delete::<RemovedAnswer>(&path_of(&name)).await?;
            context.output.answer(&answer.raw, || format!("removed {}\n", answer.value.removed))?;
        }
    }
    Ok(types::ExitCode::Ok.into())
}

async fn build(build: Build, context: &Context) -> Result<(), CliError> {
    let name = build.name.to_string();
    let text = |path: PathBuf| -> Result<String, CliError> {
        let whole = path.canonicalize().map_err(|source| CliError::Input { file: path.clone(), source })?;
        whole.into_os_string().into_string().map_err(|_| CliError::Usage {
            message: format!("the path {} is no UTF-8", path.display()),
            remedy: "rename it".to_owned(),
        })
    };
    let progress = Progress::start(format!("building {name}: root file system"));
    let (named, disk) = (rootfs_named(build.rootfs)?, build.disk);
    // A path is wrong before anything is made of it.
    named.metadata().map_err(|source| CliError::Input { file: named.clone(), source })?;
    let made = tokio::task::spawn_blocking(move || rootfs::prepare(&named, disk)).await;
    let made = made.map_err(|error| CliError::Runtime(std::io::Error::other(error)))??;
    drop(progress);
    let request = BuildRequest {
        name: name.clone(),
        kernel: text(or_of_guests(build.kernel, "vmlinux")?)?,
        initrd: text(or_of_guests(build.initrd, "initrd")?)?,
        rootfs: text(made.path.clone())?,
        memory_bytes: build.memory,
        vcpus: build.vcpus,
        disk_bytes: build.disk,
        network: build.network,
        kernel_arguments: build.kernel_arguments,
        warm: build.warm,
        ready: build.ready,
        main: build.main,
        allow_secrets: build.allow_secrets,
        allow_connections: build.allow_connections,
        deadline_ms: Some(build.deadline.saturating_mul(1000)),
        tenant: None,
    };
    let progress = Progress::start(format!("building {name}: load"));
    let answer = {
        let post = context.client.post::<Template>("/v1/templates", &request);
        tokio::pin!(post);
        let mut looks = tokio::time::interval(LOOK_EVERY);
        looks.tick().await;
        loop {
            tokio::select! {
                answer = &mut post => break answer?,
                _ = looks.tick(), if std::io::stderr().is_terminal() => {
                    // What it is at is only of interest as long as it is that.
                    let now = context.client.get::<Template>(&path_of(&build.name)).await.ok();
                    if let Some(now) = now.and_then(|answer| answer.value.building) {
                        progress.say(format!("building {name}: {}", stage_name(now.stage)));
                    }
                }
            }
        }
    };
    drop(progress);
    context.output.answer(&answer.raw, || describe(&answer.value))
}

async fn export(name: &str, file: PathBuf, context: &Context) -> Result<(), CliError> {
    let path = format!("{}/archive", path_of(name));
    if file == Path::new("-") {
        return context.client.download(&path, super::output::print).await;
    }
    let failed = |source| CliError::Input { file: file.clone(), source };
    let out = File::options().write(true).create_new(true).open(&file).map_err(failed)?;
    let progress = Progress::start(format!("exporting {name}"));
    let mut at = 0u64;
    let written = context
        .client
        .download(&path, |bytes| {
            // Runs of zeros become holes.
            if bytes.iter().any(|byte| *byte != 0) {
                out.write_all_at(bytes, at).map_err(failed)?;
            }
            at += bytes.len() as u64;
            Ok::<_, CliError>(())
        })
        .await;
    drop(progress);
    let whole = written.and_then(|()| out.set_len(at).and_then(|()| out.sync_all()).map_err(failed));
    if whole.is_err() {
        // Half an archive is none.
        std::fs::remove_file(&file).unwrap_or_default();
    }
    whole
}

async fn import(name: &str, file: PathBuf, context: &Context) -> Result<(), CliError> {
    let mut input: Box<dyn Read + Send> = if file == Path::new("-") {
        Box::new(std::io::stdin())
    } else {
        Box::new(File::open(&file).map_err(|source| CliError::Input { file: file.clone(), source })?)
    };
    let progress = Progress::start(format!("importing {name}"));
    let (sender, pieces) = tokio::sync::mpsc::channel(4);
    tokio::task::spawn_blocking(move || {
        loop {
            let mut piece = vec![0; 256 << 10];
            let read = input.read(&mut piece).map(|count| {
                piece.truncate(count);
                hyper::body::Bytes::from(piece)
            });
            let is_last = read.as_ref().map_or(true, |piece| piece.is_empty());
            if read.as_ref().is_ok_and(|piece| piece.is_empty()) || sender.blocking_send(read).is_err() || is_last {
                return;
            }
        }
    });
    let answer = context.client.upload::<Template>(&format!("{}/archive", path_of(name)), pieces).await?;
    drop(progress);
    context.output.answer(&answer.raw, || describe(&answer.value))
}

/// What was named, or the file of this name among those that `make guest` has built.
fn or_of_guests(named: Option<PathBuf>, file: &str) -> Result<PathBuf, CliError> {
    match named {
        Some(path) => Ok(path),
        None => guest_file(file),
    }
}

/// A file, or one of ours by its name.
fn rootfs_named(named: PathBuf) -> Result<PathBuf, CliError> {
    let is_name = named.parent() == Some(Path::new("")) && named.extension().is_none();
    match named.to_str().filter(|_| is_name && !named.exists()) {
        Some(name) => guest_file(&format!("{name}.ext4")),
        None => Ok(named),
    }
}

fn guest_file(file: &str) -> Result<PathBuf, CliError> {
    let directory = paths::guests()?;
    let path = directory.join(file);
    if path.exists() {
        return Ok(path);
    }
    Err(CliError::Usage {
        message: format!("there is no {}", path.display()),
        remedy: "build it with `make guest`, or name a file; FARFORK_GUESTS names another directory".to_owned(),
    })
}

fn path_of(name: &str) -> String {
    format!("/v1/templates/{}", segment(name))
}

fn stage_name(stage: crate::node::guest::template::Stage) -> &'static str {
    use crate::node::guest::template::Stage;
    match stage {
        Stage::Load => "load",
        Stage::Boot => "boot",
        Stage::Warm => "warm",
        Stage::Gate => "gate",
        Stage::Freeze => "freeze",
        Stage::Record => "record",
        Stage::Save => "save",
    }
}

fn list(answer: &TemplatesAnswer) -> String {
    let rows = answer.templates.iter().map(|template| {
        let image = template.image.as_ref();
        let state = match (&template.building, image) {
            (Some(now), _) => format!("building: {} for {}", stage_name(now.stage), time(now.for_us)),
            (None, Some(_)) => "in memory".to_owned(),
            (None, None) => "saved".to_owned(),
        };
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        [
            template.name.clone(),
            state,
            or_dash(image.map(|image| short(image.id.as_uuid()))),
            or_dash(image.map(|image| size::bytes(image.memory_bytes))),
            or_dash(image.and_then(|image| image.disk_bytes).map(size::bytes)),
            or_dash(template.file_bytes.map(size::bytes)),
        ]
    });
    table(["TEMPLATE", "STATE", "IMAGE", "MEMORY", "DISK", "FILE"], &[3, 4, 5], rows.collect())
}

fn describe(template: &Template) -> String {
    let mut text = format!("template  {}\n", template.name);
    if let Some(image) = &template.image {
        text.push_str(&format!("image     {}\n", image.id));
        text.push_str(&format!("memory    {}\n", size::bytes(image.memory_bytes)));
        if let Some(disk) = image.disk_bytes {
            text.push_str(&format!("disk      {}\n", size::bytes(disk)));
        }
        text.push_str(&format!("stored    {}\n", size::bytes(image.stored_bytes)));
    }
    if let Some(bytes) = template.file_bytes {
        text.push_str(&format!("file      {}\n", size::bytes(bytes)));
    }
    if let Some(now) = &template.building {
        text.push_str(&format!("building  {} for {}\n", stage_name(now.stage), time(now.for_us)));
    }
    for stage in &template.built {
        text.push_str(&format!("{:<9} {}\n", stage_name(stage.stage), time(stage.took_us)));
    }
    text
}
