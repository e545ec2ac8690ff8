//! Names of namespaces: which are ours, and whose.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

use super::NetworkError;
use super::iproute::Tool;

/// Where `ip` keeps them.
const DIRECTORY: &str = "/run/netns";
/// What every name of ours begins with; the id of the process follows.
const PREFIX: &str = "farfork-chaos-";

/// `farfork-chaos-<process>-<how many networks it made before>-<name>`, and then which namespace of that network.
#[derive(Clone, Debug)]
pub(super) struct Name(String);

impl Name {
    /// The beginning of the names of a new network.
    pub(super) fn new(name: &str) -> Result<Self, NetworkError> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if !(1..=32).contains(&name.len()) || !name.bytes().all(is_plain) {
            return Err(NetworkError::Name(name.to_owned()));
        }
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        Ok(Self(format!("{PREFIX}{}-{number}-{name}", process::id())))
    }

    pub(super) fn of_switch(&self) -> Self {
        Self(format!("{self}-switch"))
    }

    pub(super) fn of_host(&self, index: usize) -> Self {
        Self(format!("{self}-host{index}"))
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    pub(super) fn path(&self) -> PathBuf {
        Path::new(DIRECTORY).join(&self.0)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// Takes a namespace's name away; the namespace itself goes with the last process and socket in it.
pub(super) fn remove(name: &str) {
    // Someone else may have been faster. Anything else that could go wrong is for the next sweep.
    let _ = Tool::netns().run(&["del", name]);
}

/// Removes what processes that are gone have left; once in the life of this one, before it makes a network.
pub(super) fn sweep() {
    static SWEPT: Once = Once::new();
    // What has the id of this process is of an earlier one: it has made none yet.
    SWEPT.call_once(|| remove_those(|process| process == process::id() || !is_alive(process)));
}

/// Removes the namespaces of such processes.
fn remove_those(is_gone: impl Fn(u32) -> bool) {
    // Without the directory nobody has left anything.
    for entry in fs::read_dir(DIRECTORY).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if let Some(name) = name.to_str()
            && process_of(name).is_some_and(&is_gone)
        {
            remove(name);
        }
    }
}

/// Whose it is, if it is one of ours.
fn process_of(name: &str) -> Option<u32> {
    let (process, _) = name.strip_prefix(PREFIX)?.split_once('-')?;
    process.parse().ok()
}

fn is_alive(process: u32) -> bool {
    Path::new("/proc").join(process.to_string()).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_whose_it_is_and_names_of_others_do_not() {
        let name = Name::new("pages-2").unwrap();
        assert_eq!(process_of(name.of_switch().as_str()), Some(process::id()));
        assert_eq!(process_of(name.of_host(249).as_str()), Some(process::id()));
        assert_ne!(name.as_str(), Name::new("pages-2").unwrap().as_str());
        for other in
            ["lab", "farfork-1-0-x", "farfork-chaos-", "farfork-chaos-x-0-y", "farfork-chaos-12", "my-farfork-chaos-1-0-x"]
        {
            assert_eq!(process_of(other), None, "{other}");
        }
    }

    #[test]
    fn a_sweep_takes_what_dead_processes_left_and_nothing_else() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: only root may make network namespaces");
            return;
        }
        let mut child = process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        let left = Name(format!("{PREFIX}{}-0-left-switch", child.id()));
        let foreign = Name(format!("lab-{}", child.id()));
        let living = Name::new("living").unwrap().of_switch();
        for name in [&left, &foreign, &living] {
            Tool::netns().run(&["add", name.as_str()]).unwrap();
        }
        remove_those(|process| !is_alive(process));
        let is_there = [&left, &foreign, &living].map(|name| name.path().exists());
        remove(foreign.as_str());
        remove(living.as_str());
        assert_eq!(is_there, [false, true, true]);
    }

    #[test]
    fn names_that_could_be_read_as_something_else_are_refused() {
        for bad in ["", "../x", "a b", "A", "a/b", "-\n", &"x".repeat(33)] {
            assert!(matches!(Name::new(bad), Err(NetworkError::Name(_))), "{bad:?}");
        }
    }
}
