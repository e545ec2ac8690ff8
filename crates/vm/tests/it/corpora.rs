//! The corpora of the fuzz targets, replayed and mutated.

use std::path::{Path, PathBuf};

use vm::fuzzing::TARGETS;
use vm::harness::{class, count, held, host, parent, seed};

fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target)
}

fn entries(target: &str) -> Vec<Vec<u8>> {
    let directory = corpus(target);
    let listed = std::fs::read_dir(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let mut paths: Vec<_> = listed.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

#[test]
fn every_entry_of_every_corpus_is_taken_or_refused() {
    let mut replayed = 0;
    for (name, target) in TARGETS {
        let entries = entries(name);
        assert!(!entries.is_empty(), "the corpus of {name} is empty");
        for entry in &entries {
            target(entry);
        }
        replayed += entries.len() as u64;
    }
    held("corpus entries replayed", replayed);
}

#[test]
fn mutated_entries_are_taken_or_refused() {
    let mut dice = fastrand::Rng::with_seed(seed());
    let rounds = count(3000, 1_000_000);
    for (name, target) in TARGETS {
        let entries = entries(name);
        for _ in 0..rounds {
            let mut bytes = entries[dice.usize(0..entries.len())].clone();
            for _ in 0..dice.usize(1..6) {
                let at = dice.usize(0..=bytes.len());
                match dice.u8(0..4) {
                    0 if at < bytes.len() => bytes[at] = dice.u8(..),
                    1 => bytes.insert(at, [0, 1, 0x7F, 0x80, 0xFF][dice.usize(0..5)]),
                    2 if at < bytes.len() => drop(bytes.remove(at)),
                    _ => bytes.truncate(at),
                }
            }
            target(&bytes);
        }
    }
    held("mutated inputs for each of the parsers", rounds);
}

/// Seeds for the corpora, from what this farfork writes: `FARFORK_BLESS=1 cargo nextest run --all-features -E 'test(seeds)'`.
#[test]
fn seeds_of_the_corpora_can_be_written_anew() {
    let host = host();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let mut machine = parent(&host, class(4, 2));
    vm::image::save(&machine.freeze(&host).unwrap().image, &path, |_, _| {}).unwrap();
    let file = std::fs::read(&path).unwrap();
    let head_len = u32::from_le_bytes(file[12..16].try_into().unwrap()) as usize;
    let frame = &file[4096..4096 + head_len];
    let head = types::Head::decode(frame, types::Digest::of(frame)).unwrap();
    let hash_page = [&64u16.to_le_bytes()[..], &file[4096 + (64 << 10)..][..64 * 32]].concat();
    let seeds =
        [("head", frame), ("hash_page", &hash_page), ("image_file", &file[..4096 + head_len]), ("machine_state", &head.state)];
    let seeds = seeds.into_iter().map(|(name, seed)| (name, "seed", seed.to_vec()));
    // A message goes into both: each refuses the other's at its number, or takes it for another.
    let messages = vm::fuzzing::message_seeds(&head.state);
    let messages =
        messages.iter().flat_map(|(name, message)| ["from_worker", "to_worker"].map(|target| (target, *name, message.clone())));
    for (name, file, seed) in seeds.chain(messages) {
        let (_, target) = TARGETS.into_iter().find(|(target, _)| *target == name).unwrap();
        target(&seed);
        if std::env::var_os("FARFORK_BLESS").is_some() {
            std::fs::create_dir_all(corpus(name)).unwrap();
            std::fs::write(corpus(name).join(file), &seed).unwrap();
        }
    }
}
