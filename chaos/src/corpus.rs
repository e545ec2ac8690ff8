//! The corpora in `fuzz/corpus`, for the tests that replay them, mutated and not, where no fuzzer is.

use std::fs;
use std::path::{Path, PathBuf};

use fastrand::Rng;

/// A fuzz target: its name, which is also the name of its corpus, and its body.
pub type Target = (&'static str, fn(&[u8]));

/// The inputs of a target's corpus, by name.
///
/// # Panics
/// If the corpus is empty or cannot be read.
#[must_use]
pub fn entries(target: &str) -> Vec<Vec<u8>> {
    let directory = directory(target);
    let listed = fs::read_dir(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let mut paths: Vec<_> = listed.map(|entry| entry.expect("an entry of a directory").path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "the corpus of {target} is empty");
    paths.iter().map(|path| fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))).collect()
}

/// A few bytes changed, inserted, removed or cut off.
#[must_use]
pub fn mutated(entry: &[u8], dice: &mut Rng) -> Vec<u8> {
    let mut bytes = entry.to_vec();
    for _ in 0..dice.usize(1..6) {
        let at = dice.usize(0..=bytes.len());
        match dice.u8(0..4) {
            0 if at < bytes.len() => bytes[at] = dice.u8(..),
            1 => bytes.insert(at, [0, 1, 0x7F, 0x80, 0xFF][dice.usize(0..5)]),
            2 if at < bytes.len() => drop(bytes.remove(at)),
            _ => bytes.truncate(at),
        }
    }
    bytes
}

/// Gives each target every input of its corpus, and then so many mutated ones.
///
/// # Panics
/// As [`entries`], and as the targets do.
pub fn replay(targets: &[Target], seed: u64, mutations: u64) {
    let mut dice = Rng::with_seed(seed);
    for (name, target) in targets {
        let entries = entries(name);
        entries.iter().for_each(|entry| target(entry));
        for _ in 0..mutations {
            target(&mutated(&entries[dice.usize(0..entries.len())], &mut dice));
        }
    }
}

/// Gives a target a seed for its corpus, and writes it there if `FARFORK_BLESS` is set.
///
/// # Panics
/// If there is no such target, as that does, and if the seed cannot be written.
pub fn seed(targets: &[Target], name: &str, file: &str, bytes: &[u8]) {
    let (_, target) = targets.iter().find(|(target, _)| *target == name).unwrap_or_else(|| panic!("no target {name}"));
    target(bytes);
    if std::env::var_os("FARFORK_BLESS").is_some() {
        let path = directory(name).join(file);
        let written = fs::create_dir_all(directory(name)).and_then(|()| fs::write(&path, bytes));
        written.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}

fn directory(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target)
}
