//! The state machine of fetching an image: by rule, by random events against naive books, and over a simulated network.

mod books;
mod network;
mod random;
mod rules;

use types::ExtentIndex;

use pages::transfer::ExtentId;

/// An extent of the first region.
fn at(extent: u32) -> ExtentId {
    ExtentId { region: 0, extent: ExtentIndex(extent) }
}

/// The number of cases and the seed, as `vm::harness`: FARFORK_COUNT chooses the first, FARFORK_SEED is the second.
fn cases_and_seed(quick: u32, full: u32) -> (u32, u64) {
    let cases = if std::env::var("FARFORK_COUNT").is_ok_and(|count| count == "full") { full } else { quick };
    let seed =
        std::env::var("FARFORK_SEED").map_or_else(|_| u64::from(fastrand::u32(..)), |seed| seed.parse().expect("a number"));
    println!("FARFORK_SEED={seed}\nheld: {cases} cases");
    (cases, seed)
}
