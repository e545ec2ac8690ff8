//! Random operations against a model, with and without failures of the host under them.

use vm::harness::{RandomOps, Tally, class, count, held, host, seed};

fn run(vcpus: u8, failpoints: bool) -> Tally {
    let host = host();
    let directory = tempfile::tempdir().unwrap();
    let operations = count(150, 5000);
    let tally = RandomOps::new(&host, class(16, vcpus), directory.path(), seed(), failpoints).run(operations);
    println!("{tally:?}");
    held("random operations agree with the model", tally.operations);
    tally
}

#[test]
fn random_operations_agree_with_the_model() {
    let tally = run(1, false);
    assert_eq!(tally.injected_failures, 0);
    assert!(tally.forks > 0 && tally.freezes > 0 && tally.pages_checked > 0, "{tally:?}");
}

#[test]
fn random_operations_on_two_vcpus_agree_with_the_model() {
    run(2, false);
}

#[test]
fn random_operations_survive_a_host_that_fails() {
    let tally = run(1, true);
    assert!(tally.injected_failures > 0, "no failure was injected: {tally:?}");
}
