//! The corpora of the fuzz targets, replayed and mutated.

use chaos::corpus;
use pages::fuzzing::TARGETS;
use pages::wire::samples;

use crate::common::{count, identity, seed};

#[test]
fn every_entry_of_every_corpus_is_taken_or_refused_also_when_mutated() {
    let rounds = count(3000, 1_000_000);
    corpus::replay(&TARGETS, seed(), rounds);
    println!("held: {rounds} mutated inputs for each of the parsers");
}

/// Seeds for the corpora, from what this farfork writes; `FARFORK_BLESS=1` writes them.
#[test]
fn seeds_of_the_corpora_can_be_written_anew() {
    for (name, frame) in samples::requests() {
        corpus::seed(&TARGETS, "page_request", name, &frame);
    }
    for (name, frame) in samples::answers() {
        corpus::seed(&TARGETS, "page_answer", name, &frame);
    }
    let identity = identity();
    corpus::seed(&TARGETS, "certificate", "der", identity.certificate().der());
    corpus::seed(&TARGETS, "certificate", "pem", identity.certificate_pem().as_bytes());
}
