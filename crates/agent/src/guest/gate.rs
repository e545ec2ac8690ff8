//! The gate: every process but this one is stopped, from before the machine is frozen until its child knows who it is.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use rustix::process::Signal;

use super::{Guest, warm};
use crate::protocol::{GateRules, Phase, TEXT_MAX};

/// How long processes may take to end when they are asked to.
const END_PATIENCE: Duration = Duration::from_secs(10);
/// The most of what is found that is told.
const FOUND_MAX: usize = 32;
/// `ESTABLISHED` in /proc/net/tcp.
const ESTABLISHED: &str = "01";
/// Words in the name of an environment variable whose value is a secret.
const SECRET_WORDS: [&str; 6] = ["PASSWORD", "PASSWD", "SECRET", "TOKEN", "API_KEY", "PRIVATE_KEY"];
/// Files that are one.
const SECRET_FILES: [&str; 8] = [
    "/root/.aws/credentials",
    "/root/.netrc",
    "/root/.docker/config.json",
    "/root/.kube/config",
    "/root/.git-credentials",
    "/root/.config/gcloud/application_default_credentials.json",
    "/root/.pypirc",
    "/root/.npmrc",
];

/// Stops everything, if the rules allow what there is; otherwise says what was found.
pub(super) fn close(guest: &Guest, rules: GateRules) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    if !rules.allow_connections {
        found.extend(connections());
    }
    if !rules.allow_secrets {
        found.extend(secrets());
    }
    if found.is_empty() {
        let mut phase = guest.lock_phase();
        rustix::fs::sync();
        warm::signal_all(Signal::STOP)?;
        *phase = Phase::Gated;
    }
    found.truncate(FOUND_MAX);
    Ok(found)
}

/// Lets everything go on.
pub(super) fn open(guest: &Guest) -> io::Result<()> {
    let mut phase = guest.lock_phase();
    warm::signal_all(Signal::CONT)?;
    *phase = Phase::Running;
    Ok(())
}

/// Ends every process, and writes everything to the disk.
pub(super) fn shut_down() -> io::Result<()> {
    warm::signal_all(Signal::CONT)?;
    warm::signal_all(Signal::TERM)?;
    let started = std::time::Instant::now();
    while started.elapsed() < END_PATIENCE && processes().next().is_some() {
        std::thread::sleep(Duration::from_millis(20));
    }
    warm::signal_all(Signal::KILL)?;
    rustix::fs::sync();
    Ok(())
}

/// The processes that are programs (the kernel's threads have no command line), besides this one.
fn processes() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok()).filter(|pid| *pid != 1);
    pids.filter(|pid| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty()))
}

/// Connections with somebody else than this machine.
fn connections() -> Vec<String> {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|path| fs::read_to_string(path).unwrap_or_default());
    tables.iter().flat_map(|table| connections_in(table)).collect()
}

fn connections_in(table: &str) -> Vec<String> {
    let mut found = Vec::new();
    for line in table.lines().skip(1) {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (Some(remote), Some(&ESTABLISHED)) = (fields.get(2), fields.get(3)) else { continue };
        let address = remote.split_once(':').and_then(|(address, port)| {
            // Words of the host's byte order: one of IPv4, four of IPv6.
            let words = address.as_bytes().chunks(8).map(|word| std::str::from_utf8(word).ok());
            let words: Option<Vec<u32>> = words.map(|word| u32::from_str_radix(word?, 16).ok()).collect();
            let bytes: Vec<u8> = words?.into_iter().flat_map(u32::to_le_bytes).collect();
            let address = match bytes.len() {
                4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
                _ => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?).to_canonical(),
            };
            Some((address, u16::from_str_radix(port, 16).ok()?))
        });
        if let Some((address, port)) = address.filter(|(address, _)| !address.is_loopback()) {
            found.push(format!("an established connection with {address}, port {port}"));
        }
    }
    found
}

/// Secrets that can be seen. Their values are not told.
fn secrets() -> Vec<String> {
    let mut found = Vec::new();
    for pid in processes() {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        for name in secret_names(&environment) {
            found.push(format!("process {pid} has {name} in its environment"));
        }
    }
    let keys = |directory: &str, prefix: &str, but: &str| {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        names
            .filter(|name| name.starts_with(prefix) && !name.ends_with(but))
            .map(|name| format!("{directory}/{name}"))
            .collect::<Vec<_>>()
    };
    let files = SECRET_FILES.iter().filter(|path| fs::metadata(path).is_ok()).map(|path| (*path).to_owned());
    let files = files.chain(keys("/root/.ssh", "id_", ".pub")).chain(keys("/etc/ssh", "ssh_host_", ".pub"));
    found.extend(files.map(|path| format!("the file {path}")));
    found
}

fn secret_names(environment: &[u8]) -> Vec<String> {
    let variables = environment.split(|byte| *byte == 0).filter_map(|variable| std::str::from_utf8(variable).ok());
    let with_value = variables.filter_map(|variable| variable.split_once('=')).filter(|(_, value)| !value.is_empty());
    let is_secret = |name: &str| {
        let name = name.to_ascii_uppercase();
        SECRET_WORDS.iter().any(|word| name.contains(word))
    };
    with_value.filter(|(name, _)| is_secret(name)).map(|(name, _)| name.chars().take(TEXT_MAX / 4).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_with_others_are_found() {
        let table = "  sl  local_address rem_address   st tx_queue\n\
                     0: 0100007F:1F90 00000000:0000 0A 0\n\
                     1: 0100007F:1F90 0100007F:C350 01 0\n\
                     2: 0201A8C0:C350 0101A8C0:01BB 01 0\n\
                     3: 0201A8C0:C351 0101A8C0:01BB 06 0\n\
                     broken\n\
                     4: 0000000000000000FFFF00000201A8C0:C350 0000000000000000FFFF00000301A8C0:01BB 01 0\n\
                     5: 00000000000000000000000001000000:C350 00000000000000000000000001000000:01BB 01 0\n";
        let found = ["192.168.1.1", "192.168.1.3"].map(|host| format!("an established connection with {host}, port 443"));
        assert_eq!(connections_in(table), found);
    }

    #[test]
    fn secrets_are_named_without_their_values() {
        let environment = b"PATH=/bin\0AWS_SECRET_ACCESS_KEY=abc\0github_token=x\0EMPTY_TOKEN=\0\xff=1\0";
        assert_eq!(secret_names(environment), ["AWS_SECRET_ACCESS_KEY", "github_token"]);
    }
}
