//! The corpora of the fuzz targets, replayed and mutated.

use chaos::corpus;
use vm::fuzzing::TARGETS;
use vm::harness::{class, count, held, host, parent, seed};

#[test]
fn every_entry_of_every_corpus_is_taken_or_refused_also_when_mutated() {
    let rounds = count(3000, 1_000_000);
    corpus::replay(&TARGETS, seed(), rounds);
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
    for (name, file, seed) in vm::fuzzing::guest_seeds() {
        corpus::seed(&TARGETS, name, file, &seed);
    }
    // A message goes into both: each refuses the other's at its number, or takes it for another.
    let messages = vm::fuzzing::message_seeds(&head.state);
    let messages =
        messages.iter().flat_map(|(name, message)| ["from_worker", "to_worker"].map(|target| (target, *name, message.clone())));
    for (name, file, seed) in seeds.chain(messages) {
        corpus::seed(&TARGETS, name, file, &seed);
    }
}
