//! The corpora of the fuzz targets, replayed and mutated.

use std::path::{Path, PathBuf};

use pages::fuzzing::TARGETS;
use pages::wire::samples;

use crate::common::{count, identity, seed};

fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target)
}

pub(crate) fn entries(target: &str) -> Vec<Vec<u8>> {
    let directory = corpus(target);
    let listed = std::fs::read_dir(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let mut paths: Vec<_> = listed.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "the corpus of {target} is empty");
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

/// A few bytes changed, inserted, removed or cut off.
pub(crate) fn mutated(entry: &[u8], dice: &mut fastrand::Rng) -> Vec<u8> {
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

#[test]
fn every_entry_of_every_corpus_is_taken_or_refused_also_when_mutated() {
    let mut dice = fastrand::Rng::with_seed(seed());
    let rounds = count(3000, 1_000_000);
    for (name, target) in TARGETS {
        let entries = entries(name);
        for entry in &entries {
            target(entry);
        }
        for _ in 0..rounds {
            target(&mutated(&entries[dice.usize(0..entries.len())], &mut dice));
        }
    }
    println!("held: {rounds} mutated inputs for each of the parsers");
}

/// Seeds for the corpora, from what this farfork writes; `FARFORK_BLESS=1` writes them.
#[test]
fn seeds_of_the_corpora_can_be_written_anew() {
    let identity = identity();
    let certificates =
        [("der", identity.certificate().der().to_vec()), ("pem", identity.certificate_pem().as_bytes().to_vec())];
    let requests = samples::requests().into_iter().map(|(name, frame)| ("page_request", name, frame.to_vec()));
    let answers = samples::answers().into_iter().map(|(name, frame)| ("page_answer", name, frame.to_vec()));
    let certificates = certificates.into_iter().map(|(name, bytes)| ("certificate", name, bytes));
    for (name, file, seed) in requests.chain(answers).chain(certificates) {
        let (_, target) = TARGETS.into_iter().find(|(target, _)| *target == name).unwrap();
        target(&seed);
        if std::env::var_os("FARFORK_BLESS").is_some() {
            std::fs::create_dir_all(corpus(name)).unwrap();
            std::fs::write(corpus(name).join(file), &seed).unwrap();
        }
    }
}
