//! The corpora of the fuzz targets, replayed and mutated.

use chaos::corpus;
use farfork::{cli, jobs, node};
use vm::harness::{count, held, seed};

#[test]
fn every_entry_of_every_corpus_is_taken_or_refused_also_when_mutated() {
    let rounds = count(3000, 1_000_000);
    corpus::replay(&node::fuzzing::TARGETS, seed(), rounds);
    corpus::replay(&cli::fuzzing::TARGETS, seed(), rounds);
    corpus::replay(&jobs::fuzzing::TARGETS, seed(), rounds);
    held("mutated inputs for each of the parsers", rounds);
}

/// Seeds for the corpora, from what this farfork writes; `FARFORK_BLESS=1` writes them.
#[test]
fn seeds_of_the_corpora_can_be_written_anew() {
    for (target, name, bytes) in node::fuzzing::seeds() {
        corpus::seed(&node::fuzzing::TARGETS, target, name, &bytes);
    }
    for (target, name, bytes) in cli::fuzzing::seeds() {
        corpus::seed(&cli::fuzzing::TARGETS, target, name, &bytes);
    }
    for (target, name, bytes) in jobs::fuzzing::seeds() {
        corpus::seed(&jobs::fuzzing::TARGETS, target, name, &bytes);
    }
}
