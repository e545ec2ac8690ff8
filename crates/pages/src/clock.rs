//! The host's wall clock, for dates of certificates and for people. What must only go forward counts on monotonic clocks instead.

use std::time::SystemTime;

/// What time it is, as this host has it.
#[cfg(not(feature = "testing"))]
#[must_use]
pub fn wall() -> SystemTime {
    SystemTime::now()
}

/// What time it is, as this host has it: with `FARFORK_TEST_CLOCK_SECONDS` so many seconds off.
///
/// # Panics
/// If that is no number of seconds.
#[cfg(feature = "testing")]
#[must_use]
pub fn wall() -> SystemTime {
    use std::sync::OnceLock;
    use std::time::Duration;

    static OFF: OnceLock<i64> = OnceLock::new();
    let off = *OFF.get_or_init(|| match std::env::var("FARFORK_TEST_CLOCK_SECONDS") {
        Ok(text) => text.parse().expect("FARFORK_TEST_CLOCK_SECONDS is a number of seconds"),
        Err(_) => 0,
    });
    let by = Duration::from_secs(off.unsigned_abs());
    if off < 0 { SystemTime::now() - by } else { SystemTime::now() + by }
}
