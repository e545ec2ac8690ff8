//! What a job may have at most, and how its parts are read: the same for flags and for job files, and before a node is asked.

use std::ops::Range;
use std::time::Duration;

use crate::cli::fork::full_name;
use crate::cli::size;

/// The most tasks of a job.
pub const TASKS_MAX: u32 = 1_000_000;
/// The most bytes of an input.
pub const INPUT_MAX: usize = 32 << 10;
/// The most bytes of all files that are sent along.
pub const FILES_MAX: u64 = 24 << 20;
/// The most bytes of a request.
pub const REQUEST_MAX: usize = 64 << 20;
/// The most bytes that are kept of a task's output.
pub const OUTPUT_MAX: u64 = 16 << 20;

pub(in crate::cli) fn template(text: &str) -> Result<String, String> {
    full_name(text).map_err(|error| error.to_string())
}

pub(in crate::cli) fn name(text: &str) -> Result<String, String> {
    at_most(text, 64)
}

pub(in crate::cli) fn key(text: &str) -> Result<String, String> {
    at_most(text, 128)
}

fn at_most(text: &str, most: usize) -> Result<String, String> {
    match text.len() {
        0 => Err("it is empty".to_owned()),
        bytes if bytes > most => Err(format!("{bytes} bytes; at most {most}")),
        _ => Ok(text.to_owned()),
    }
}

/// `NAME=VALUE`.
pub(in crate::cli) fn pair(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or_else(|| format!("{text:?} is no NAME=VALUE"))?;
    named(name)?;
    Ok((name.to_owned(), value.to_owned()))
}

/// What may stand before the `=`.
pub(super) fn named(name: &str) -> Result<(), String> {
    match name {
        "" => Err("a name is empty".to_owned()),
        name if name.contains(['=', '\0']) => Err(format!("{name:?} has a character that no name has")),
        _ => Ok(()),
    }
}

pub(in crate::cli) fn count(count: i64) -> Result<u32, String> {
    let found = u32::try_from(count).ok().filter(|count| (1..=TASKS_MAX).contains(count));
    found.ok_or_else(|| format!("{count} tasks; a job has 1 to {TASKS_MAX}"))
}

/// `A..B`, without B.
pub(in crate::cli) fn range(text: &str) -> Result<Range<i64>, String> {
    let malformed = || format!("{text:?} is no range; write 0..300, which ends with 299");
    let (first, end) = text.split_once("..").ok_or_else(malformed)?;
    let number = |text: &str| text.parse::<i64>().map_err(|_| malformed());
    let range = number(first)?..number(end)?;
    match range.end.checked_sub(range.start) {
        Some(count) => self::count(count).map(|_| range),
        None => Err(malformed()),
    }
}

/// An absolute path in a child, without a way out of it.
pub(in crate::cli) fn guest_path(text: &str) -> Result<String, String> {
    if !text.starts_with('/') {
        return Err(format!("{text:?} is no absolute path in the machine"));
    }
    if text.contains('\0') || text.split('/').any(|part| part == "..") {
        return Err(format!("{text:?} has parts that such a path may not have"));
    }
    Ok(text.to_owned())
}

pub(in crate::cli) fn output_limit(text: &str) -> Result<u64, String> {
    let bytes = size::parse(text).map_err(|error| error.to_string())?;
    if bytes > OUTPUT_MAX { Err(format!("{text} is more than {}", size::bytes(OUTPUT_MAX))) } else { Ok(bytes) }
}

pub(in crate::cli) fn memory(text: &str) -> Result<u64, String> {
    let bytes = size::parse(text).map_err(|error| error.to_string())?;
    if bytes == 0 { Err("a child needs some".to_owned()) } else { Ok(bytes) }
}

/// `0.5`, in thousandths.
pub(in crate::cli) fn cpus(text: &str) -> Result<u64, String> {
    const MOST: u64 = 1_024;
    let malformed = || format!("{text:?} is no number of processors; write 0.5 or 2, from 0.001 to {MOST}");
    let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
    let is_number = |text: &str, most| (1..=most).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number(whole, 4) || !is_number(part, 3) {
        return Err(malformed());
    }
    let number = |text: &str| text.parse::<u64>().map_err(|_| malformed());
    let millis = number(whole)? * 1_000 + number(&format!("{part:0<3}"))?;
    if (1..=MOST * 1_000).contains(&millis) { Ok(millis) } else { Err(malformed()) }
}

pub(in crate::cli) fn replicas(number: i64) -> Result<u8, String> {
    u8::try_from(number)
        .ok()
        .filter(|number| (1..=16).contains(number))
        .ok_or_else(|| format!("{number} is not within 1 to 16"))
}

pub(in crate::cli) fn retries(number: i64) -> Result<u32, String> {
    u32::try_from(number).ok().filter(|number| *number <= 100).ok_or_else(|| format!("{number} is not within 0 to 100"))
}

pub(in crate::cli) fn max_parallel(number: i64) -> Result<u32, String> {
    let found = u32::try_from(number).ok().filter(|number| *number > 0);
    found.ok_or_else(|| format!("{number} is not within 1 to {}", u32::MAX))
}

pub(in crate::cli) fn deadline(text: &str) -> Result<Duration, String> {
    size::long_duration(text).map_err(|error| error.to_string())
}

/// A whole number of the command line, by the same bounds as one of a job file.
pub(in crate::cli) fn whole<T>(text: &str, read: impl FnOnce(i64) -> Result<T, String>) -> Result<T, String> {
    read(text.parse::<i64>().map_err(|_| format!("{text:?} is no whole number"))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_counted_in_thousandths() {
        for (text, millis) in [("0.5", 500), ("2", 2_000), ("0.001", 1), ("1.25", 1_250), ("1024", 1_024_000)] {
            assert_eq!(cpus(text), Ok(millis), "{text}");
        }
        for bad in ["", ".", "0", "0.0", "1.", ".5", "-1", "0.0001", "1025", "1024.001", "1e3", "99999999999", "NaN", "inf"] {
            assert!(cpus(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_range_ends_before_its_end() {
        assert_eq!(range("0..300"), Ok(0..300));
        assert_eq!(range("-2..1"), Ok(-2..1));
        assert_eq!(range("0..1000000"), Ok(0..1_000_000));
        for bad in ["", "..", "0..", "..3", "3", "3..3", "3..2", "0..=3", "0..1000001", "a..b", "0...3"] {
            assert!(range(bad).is_err(), "{bad:?}");
        }
        assert!(range(&format!("{}..{}", i64::MIN, i64::MAX)).is_err());
    }

    #[test]
    fn paths_in_a_child_stay_there() {
        assert_eq!(guest_path("/srv/in"), Ok("/srv/in".to_owned()));
        for bad in ["", "srv", "/srv/../etc", "/..", "/a\0b"] {
            assert!(guest_path(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn numbers_have_bounds() {
        assert_eq!((count(1), count(1_000_000)), (Ok(1), Ok(1_000_000)));
        assert!(count(0).is_err() && count(1_000_001).is_err() && count(i64::MIN).is_err());
        assert!(replicas(0).is_err() && replicas(17).is_err() && retries(101).is_err() && retries(-1).is_err());
        assert!(max_parallel(0).is_err() && output_limit("17MiB").is_err() && memory("0KiB").is_err());
        assert!(name("").is_err() && name(&"n".repeat(65)).is_err() && key(&"k".repeat(129)).is_err());
        assert!(pair("A=b=c").is_ok() && pair("=b").is_err() && pair("A").is_err());
    }
}
