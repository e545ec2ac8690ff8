//! Whole clusters in virtual time, seed by seed.

use chaos::simulation::{Flaw, run};
use vm::harness::{count, held, seed};

#[test]
fn whatever_fails_the_cluster_keeps_its_promises_and_comes_to_its_end() {
    let first = seed();
    let seeds = count(2000, 20_000);
    let (mut entries, mut tasks, mut answered, mut slowest) = (0, 0, 0, (0, 0));
    let mut faults = std::collections::BTreeMap::new();
    for seed in first..first + seeds {
        let ran = run(seed, None).unwrap_or_else(|violation| panic!("FARFORK_SEED={seed}: {violation}"));
        (entries, tasks, answered) = (entries + ran.entries, tasks + ran.tasks, answered + ran.answered);
        slowest = slowest.max((ran.quiet_ms, seed));
        ran.faults.into_iter().for_each(|(kind, count)| *faults.entry(kind).or_insert(0) += count);
    }
    println!("{seeds} seeds: {entries} entries, {tasks} tasks ended, {answered} answers, {faults:?}");
    println!("the last to come to its end: seed {1}, {0} ms after its last fault", slowest.0, slowest.1);
    assert!(tasks > seeds && answered > seeds && faults.len() > 4, "nothing happened");
    held("simulated clusters without a violation", seeds);
}

#[test]
fn a_seed_is_the_same_run_each_time() {
    let first = seed();
    for seed in first..first + count(20, 200) {
        assert_eq!(run(seed, None), run(seed, None), "seed {seed}");
    }
}

/// Each rule is there for something: without it some run goes wrong.
#[test]
fn every_rule_that_is_left_out_is_missed() {
    const SEEDS_MAX: u64 = 2000;
    let first = seed();
    for flaw in Flaw::ALL {
        let caught =
            (0..SEEDS_MAX).find_map(|number| run(first + number, Some(flaw)).err().map(|violation| (number + 1, violation)));
        let (seeds, violation) = caught.unwrap_or_else(|| panic!("{flaw:?} was not noticed in {SEEDS_MAX} seeds"));
        println!("{flaw:?}: after {seeds} seeds: {}", violation.what);
    }
}
