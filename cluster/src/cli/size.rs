//! Sizes and times as people write and read them. Binary units only: the decimal ones differ by 5 to 10 %, which guest memory
//! must not.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use thiserror::Error;

const UNITS: [(&str, u32); 4] = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40)];

/// Reads `64MiB`.
///
/// # Errors
/// [`SizeError`].
pub fn parse(text: &str) -> Result<u64, SizeError> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err(SizeError::NoNumber { given: shortened(text) });
    }
    let unit = unit.trim_start();
    let Some((_, shift)) = UNITS.into_iter().find(|(name, _)| *name == unit) else {
        let first = unit.chars().next().map(|c| c.to_ascii_uppercase());
        let meant = UNITS.into_iter().find(|(name, _)| name.chars().next() == first);
        return Err(match meant {
            Some((unit, _)) => SizeError::Decimal { given: shortened(text), meant: format!("{}{unit}", shortened(number)) },
            None => SizeError::NoUnit { given: shortened(text) },
        });
    };
    let too_large = || SizeError::TooLarge { given: shortened(text) };
    let number: u64 = number.parse().map_err(|_| too_large())?;
    number.checked_mul(1 << shift).ok_or_else(too_large)
}

/// Writes `64 MiB`, `1.5 GiB`.
#[must_use]
pub fn bytes(bytes: u64) -> String {
    let unit = UNITS.into_iter().rev().find(|(_, shift)| bytes >> shift > 0);
    let Some((name, shift)) = unit else { return format!("{bytes} B") };
    let tenths = (u128::from(bytes) * 10) >> shift;
    if tenths.is_multiple_of(10) {
        format!("{} {name}", tenths / 10)
    } else {
        format!("{}.{} {name}", tenths / 10, tenths % 10)
    }
}

/// Reads `30s`, `500ms`, `2m`. Not nothing, and at most a day.
///
/// # Errors
/// [`DurationError`].
pub fn duration(text: &str) -> Result<Duration, DurationError> {
    const MAX: Duration = Duration::from_secs(86_400);
    let error = || DurationError { given: shortened(text) };
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| error())?;
    let unit_ms = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        _ => return Err(error()),
    };
    let duration = number.checked_mul(unit_ms).map(Duration::from_millis);
    duration.filter(|duration| !duration.is_zero() && *duration <= MAX).ok_or_else(error)
}

/// Reads `12h`, `30d` too, up to ten years.
///
/// # Errors
/// [`DurationError`].
pub fn long_duration(text: &str) -> Result<Duration, DurationError> {
    const HOURS_MAX: u64 = 10 * 365 * 24;
    let hours = match (text.strip_suffix('h'), text.strip_suffix('d')) {
        (Some(hours), _) => hours.parse().ok(),
        (_, Some(days)) => days.parse::<u64>().ok().and_then(|days| days.checked_mul(24)),
        _ => return duration(text),
    };
    let hours = hours.filter(|hours| (1..=HOURS_MAX).contains(hours));
    hours.map(Duration::from_hours).ok_or_else(|| DurationError { given: shortened(text) })
}

/// How long ago that was: `3s`, `12m`, `5h`, `9d`.
#[must_use]
pub fn age(unix_ms: u64, now: SystemTime) -> String {
    in_short(now.duration_since(UNIX_EPOCH + Duration::from_millis(unix_ms)).unwrap_or_default())
}

/// How long it is until then, as [`age`]; `0s` if that is over.
#[must_use]
pub fn left(unix_ms: u64, now: SystemTime) -> String {
    in_short((UNIX_EPOCH + Duration::from_millis(unix_ms)).duration_since(now).unwrap_or_default())
}

/// As [`age`], of a time that has been taken.
#[must_use]
pub fn in_short(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7_200 => format!("{}m", seconds / 60),
        7_200..172_800 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// Why a text is no size.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum SizeError {
    #[error("{given:?} has no number; write 64MiB or 1GiB")]
    NoNumber { given: String },
    #[error("{given:?} has no unit; write KiB, MiB, GiB or TiB after the number")]
    NoUnit { given: String },
    #[error("{given:?} has a decimal or unclear unit; did you mean {meant}?")]
    Decimal { given: String, meant: String },
    #[error("{given:?} is more than any computer has")]
    TooLarge { given: String },
}

/// A text that is no duration.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{given:?} is no time; write 500ms, 30s or 2m, up to a day")]
pub struct DurationError {
    given: String,
}

fn shortened(text: &str) -> String {
    text.chars().take(32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn binary_units_are_read() {
        assert_eq!(parse("64MiB"), Ok(64 << 20));
        assert_eq!(parse("1 GiB"), Ok(1 << 30));
        assert_eq!(parse("0KiB"), Ok(0));
        assert_eq!(parse("3TiB"), Ok(3 << 40));
    }

    #[test]
    fn everything_else_is_refused_with_a_hint() {
        for decimal in ["64M", "64MB", "64mb", "64mib", "64Mi"] {
            let error = parse(decimal).unwrap_err();
            assert!(error.to_string().ends_with("did you mean 64MiB?"), "{error}");
        }
        assert!(matches!(parse("64"), Err(SizeError::NoUnit { .. })));
        assert!(matches!(parse("64 parsecs"), Err(SizeError::NoUnit { .. })));
        assert!(matches!(parse(""), Err(SizeError::NoNumber { .. })));
        assert!(matches!(parse("-1MiB"), Err(SizeError::NoNumber { .. })));
        assert!(matches!(parse("1.5GiB"), Err(SizeError::NoUnit { .. })));
        assert!(matches!(parse("99999999999999999999MiB"), Err(SizeError::TooLarge { .. })));
        assert!(matches!(parse("18446744073709551615KiB"), Err(SizeError::TooLarge { .. })));
        assert!(parse(&"9".repeat(100_000)).unwrap_err().to_string().len() < 200);
    }

    #[test]
    fn durations_have_a_unit_and_an_end() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("1440m"), Ok(Duration::from_secs(86_400)));
        for bad in ["", "s", "30", "0s", "-1s", "1.5s", "30 s", "1441m", "1h", "99999999999999999999s", "18446744073709551615m"]
        {
            assert!(duration(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn long_durations_have_hours_and_days() {
        assert_eq!(long_duration("30d"), Ok(Duration::from_secs(30 * 86_400)));
        assert_eq!(long_duration("12h"), Ok(Duration::from_secs(12 * 3_600)));
        assert_eq!(long_duration("30s"), Ok(Duration::from_secs(30)));
        for bad in ["0d", "h", "-1h", "3651d", "99999999999999999999d", "1w"] {
            assert!(long_duration(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn sizes_and_ages_are_short() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(64 << 20), "64 MiB");
        assert_eq!(bytes(3 << 29), "1.5 GiB");
        assert_eq!(bytes(u64::MAX), "16777215.9 TiB");
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        assert_eq!(age(1_000, at(4)), "3s");
        assert_eq!(age(0, at(600)), "10m");
        assert_eq!(age(0, at(86_400)), "24h");
        assert_eq!(age(0, at(864_000)), "10d");
        assert_eq!(age(10_000, at(1)), "0s", "a clock that went back");
        assert_eq!((left(864_000_000, at(0)), left(0, at(1))), ("10d".to_owned(), "0s".to_owned()));
    }
}
