//! Faults injected while children's memory is on its way. Whatever happens, each child has proved every page of its memory, or
//! has ended for a reason of the closed list, and nobody waits for longer than the deadlines allow. Needs KVM, and root for the
//! control groups. `cargo xtask soak --only faults` runs them with their full counts.

mod chains;
mod destination;
mod liar;
mod lies;
mod sharing;
mod sources;
mod stage;

use fastrand::Rng;
use stage::{Stage, Tally};
use vm::harness::held;

/// Children of each injection.
const CHILDREN: u64 = 3;
/// Stages that are used side by side: most of an injection is waiting.
const STAGES: u64 = 3;

/// Injects so many faults, in turn of `faults`, and prints what came of them.
fn inject_all<F: Copy + std::fmt::Debug + Sync>(
    what: &str,
    (seed, injections): (u64, u64),
    faults: &[F],
    inject: impl Fn(&mut Stage, &mut Rng, F) -> Vec<String> + Sync,
    start: impl Fn(u64) -> Stage + Sync,
) {
    let (inject, start) = (&inject, &start);
    let tally = std::sync::Mutex::new(Tally::default());
    std::thread::scope(|scope| {
        for of in 0..STAGES.min(injections) {
            let tally = &tally;
            scope.spawn(move || {
                let mut dice = Rng::with_seed(seed.wrapping_mul(STAGES).wrapping_add(of));
                let mut stage = start(dice.u64(..));
                for number in (of..injections).step_by(usize::try_from(STAGES).unwrap()) {
                    let fault = faults[usize::try_from(number).unwrap() % faults.len()];
                    println!("injection {number}: {fault:?}");
                    let outcomes = inject(&mut stage, &mut dice, fault);
                    tally.lock().unwrap().note(fault, outcomes);
                    stage.clear();
                }
                stage.end();
            });
        }
    });
    let tally = tally.into_inner().unwrap();
    tally.print();
    held(what, tally.injections());
}

/// That nothing came of it but what may.
fn only(outcomes: &[String], allowed: &[&str]) {
    assert!(outcomes.iter().all(|outcome| allowed.contains(&outcome.as_str())), "{outcomes:?}, where only {allowed:?} may be");
}
