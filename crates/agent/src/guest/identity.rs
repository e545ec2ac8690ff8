//! What is done after a fork, before any code of users runs: each step is timed and reported, whatever comes of it.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use rustix::net::{AddressFamily, SocketType};
use rustix::process::{Pid, Signal};
use rustix::time::{ClockId, Timespec, clock_settime};

use super::{Guest, boot};
use crate::interface;
use crate::protocol::{Address, Exit, Identity, Outcome, Phase, STEPS_MAX, Step, TEXT_MAX};
use crate::sys;

const HOOKS: &str = "/etc/farfork/fork.d";
const SERVICES: &str = "/etc/farfork/services";
const SEED_FILES: [&str; 2] = ["/var/lib/systemd/random-seed", "/var/lib/urandom/random-seed"];
const INTERFACE: &str = "eth0";
/// How long one hook may take.
const HOOK_SECONDS: u32 = 60;

/// Done, or why there was nothing to do.
type Done = io::Result<Option<String>>;

/// See the module.
pub(super) fn become_somebody(guest: &Guest, who: &Identity) -> Vec<Step> {
    let was_gated = guest.phase() == Phase::Gated;
    let mut steps = Vec::new();
    let mut step = |name: &str, does: &mut dyn FnMut() -> Done| {
        let started = Instant::now();
        let done =
            if who.without.iter().any(|without| without == name) { Ok(Some("left out, as asked".to_owned())) } else { does() };
        let outcome = match done {
            Ok(None) => Outcome::Done,
            Ok(Some(why)) => Outcome::Skipped(shortened(&why)),
            Err(error) => Outcome::Failed(shortened(&error.to_string())),
        };
        let took_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
        if steps.len() < STEPS_MAX {
            steps.push(Step { name: shortened(name), took_us, outcome });
        }
    };
    step("rng", &mut || sys::reseed(&fs::File::options().write(true).open("/dev/urandom")?, &who.seed).map(|()| None));
    step("clock", &mut || set_clock(who.unix_ns));
    step("hostname", &mut || set_hostname(&who.hostname));
    step("machine-id", &mut || set_machine_id(who));
    step("random-seed", &mut || write_seed_files(who));
    step("addresses", &mut || set_addresses(who));
    for (service, signal) in services() {
        step(&format!("service {service}"), &mut || tell_service(&service, signal));
    }
    for hook in hooks() {
        step(&format!("fork.d/{hook}"), &mut || run_hook(guest, &hook, who));
    }
    step("main", &mut || tell_main(guest, who, was_gated));
    let mut phase = guest.lock_phase();
    if *phase == Phase::Gated {
        *phase = Phase::Ready;
    }
    steps
}

fn set_clock(unix_ns: u64) -> Done {
    let (seconds, nanoseconds) = (unix_ns / 1_000_000_000, unix_ns % 1_000_000_000);
    let time = Timespec { tv_sec: i64::try_from(seconds).map_err(io::Error::other)?, tv_nsec: nanoseconds.cast_signed() };
    clock_settime(ClockId::Realtime, time)?;
    Ok(None)
}

fn set_hostname(name: &str) -> Done {
    rustix::system::sethostname(name.as_bytes())?;
    if Path::new("/etc/hostname").exists() {
        replace("/etc/hostname", &format!("{name}\n"))?;
    }
    Ok(None)
}

/// Writes a file, also where the root file system is read-only: then over it, for as long as the machine lives.
fn replace(path: &str, text: &str) -> io::Result<()> {
    match fs::write(path, text) {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            let name = Path::new(path).file_name().and_then(|name| name.to_str()).unwrap_or("file");
            let own = format!("/run/farfork-{name}");
            fs::write(&own, text)?;
            if !Path::new(path).exists() {
                return Err(io::Error::new(io::ErrorKind::NotFound, format!("{path} is missing, and / is read-only")));
            }
            Ok(rustix::mount::mount_bind(&own, path)?)
        }
        written => written,
    }
}

fn set_machine_id(who: &Identity) -> Done {
    replace("/etc/machine-id", &format!("{}\n", who.id.as_uuid().simple()))?;
    Ok(None)
}

/// Not the seed itself: what is stored is mixed in at the next boot, and must not be what this boot began with.
fn write_seed_files(who: &Identity) -> Done {
    let there: Vec<&str> = SEED_FILES.into_iter().filter(|path| Path::new(path).exists()).collect();
    if there.is_empty() {
        return Ok(Some("the image keeps none".to_owned()));
    }
    let mut seed = [0; 512];
    let mut random = fs::File::open("/dev/urandom")?;
    io::Read::read_exact(&mut random, &mut seed)?;
    for (byte, other) in seed.iter_mut().zip(who.id.as_uuid().as_bytes()) {
        *byte ^= other;
    }
    there.into_iter().try_for_each(|path| fs::write(path, seed))?;
    Ok(None)
}

fn set_addresses(who: &Identity) -> Done {
    let Some(address) = &who.address else { return Ok(Some("no network was asked for".to_owned())) };
    set_address(address)?;
    Ok(None)
}

/// Gives the network card its address.
pub(super) fn set_address(address: &Address) -> io::Result<()> {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    interface::set_address(&socket, INTERFACE, address.address, address.prefix)?;
    interface::set_up(&socket, INTERFACE)?;
    if let Some(gateway) = address.gateway {
        interface::set_default_route(&socket, gateway)?;
    }
    Ok(())
}

/// `/etc/farfork/services`: a process id file on each line, and what is done with that service in each child: `hup`, `term`, `usr1` or
/// `usr2`, the signal that it is sent, or `keep`. A service that is stopped in the gate gets it when it goes on.
fn services() -> Vec<(String, Option<Signal>)> {
    services_in(&fs::read_to_string(SERVICES).unwrap_or_default())
}

fn services_in(text: &str) -> Vec<(String, Option<Signal>)> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .filter_map(|line| line.split_once(char::is_whitespace))
        .filter_map(|(file, policy)| {
            let signal = match policy.trim() {
                "keep" => None,
                "hup" => Some(Signal::HUP),
                "term" => Some(Signal::TERM),
                "usr1" => Some(Signal::USR1),
                "usr2" => Some(Signal::USR2),
                _ => return None,
            };
            Some((file.to_owned(), signal))
        })
        .collect()
}

fn tell_service(file: &str, signal: Option<Signal>) -> Done {
    let Some(signal) = signal else { return Ok(Some("it is kept as it is".to_owned())) };
    let pid = match fs::read_to_string(file) {
        Ok(text) => text.trim().parse().ok().and_then(Pid::from_raw),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Some("it does not run".to_owned())),
        Err(error) => return Err(error),
    };
    // The first process is this one.
    let pid = pid.filter(|pid| pid.as_raw_pid() > 1).ok_or_else(|| io::Error::other(format!("{file} names no process")))?;
    match rustix::process::kill_process(pid, signal) {
        Err(rustix::io::Errno::SRCH) => Ok(Some("it does not run".to_owned())),
        told => Ok(told.map(|()| None)?),
    }
}

/// The image's own hooks: programs, by name.
fn hooks() -> Vec<String> {
    let entries = fs::read_dir(HOOKS).into_iter().flatten().flatten();
    let is_program = |entry: &fs::DirEntry| {
        entry.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
    };
    let mut names: Vec<String> = entries.filter(is_program).filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort_unstable();
    names
}

fn run_hook(guest: &Guest, hook: &str, who: &Identity) -> Done {
    let mut command = Command::new(format!("{HOOKS}/{hook}"));
    command.env_clear().envs(boot::ENVIRONMENT).current_dir("/").stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(Stdio::null());
    command.env("FARFORK_MACHINE_ID", who.id.as_uuid().to_string()).env("FARFORK_HOSTNAME", &who.hostname);
    let (child, end) = guest.reaper.spawn(&mut command)?;
    let pid = Pid::from_child(&child);
    let mut fds = [rustix::event::PollFd::new(&end, rustix::event::PollFlags::IN)];
    let patience = Timespec { tv_sec: i64::from(HOOK_SECONDS), tv_nsec: 0 };
    let is_late = rustix::event::poll(&mut fds, Some(&patience))? == 0;
    if is_late {
        rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
    }
    match guest.reaper.wait(pid.as_raw_pid()) {
        _ if is_late => Err(io::Error::other(format!("it took more than {HOOK_SECONDS} s, and was killed"))),
        Exit::Status(0) => Ok(None),
        Exit::Status(status) => Err(io::Error::other(format!("it ended with status {status}"))),
        Exit::Signal(signal) => Err(io::Error::other(format!("it was ended by signal {signal}"))),
    }
}

fn tell_main(guest: &Guest, who: &Identity, was_gated: bool) -> Done {
    // A main process that is at work for somebody (a branch of what runs) cannot be told; its answer would be that of the work.
    let Ok(mut warm) = guest.warm.try_lock() else { return Ok(Some("it is at work".to_owned())) };
    let Some(warm) = warm.as_mut() else { return Ok(Some("there is none".to_owned())) };
    let answer = warm.forked(&who.seed, &who.id.as_uuid().to_string(), was_gated)?;
    if answer.starts_with(b"{\"ok\":true") || answer.starts_with(b"{\"ok\": true") {
        return Ok(None);
    }
    Err(io::Error::other(format!("it answered {}", String::from_utf8_lossy(&answer))))
}

fn shortened(text: &str) -> String {
    text.chars().take(TEXT_MAX / 4).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_image_declares_of_its_services_is_read() {
        let text = "# ours\n/run/nginx.pid hup\n/run/cron.pid   term\n/run/db.pid keep\n/run/odd.pid explode\n/run/none\n\n";
        let declared = services_in(text);
        let expected = [("/run/nginx.pid", Some(Signal::HUP)), ("/run/cron.pid", Some(Signal::TERM)), ("/run/db.pid", None)];
        assert!(declared.iter().map(|(file, signal)| (file.as_str(), *signal)).eq(expected), "{declared:?}");
        assert_eq!(tell_service("/nonexistent.pid", Some(Signal::HUP)).unwrap().as_deref(), Some("it does not run"));
    }
}
