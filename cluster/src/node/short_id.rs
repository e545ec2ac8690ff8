//! Ids as people type them. Ids are uuids of version 7, whose head is a time that all children of a fork share, so the short
//! form is the **end**: the last 8 hex digits in tables, and any end of at least 4 digits where an id is asked for.

use thiserror::Error;
use uuid::Uuid;

/// The end of an id, or all of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShortId {
    /// 4 to 32.
    digits: usize,
    /// What they say, in the lowest bits.
    value: u128,
}

impl ShortId {
    /// Hex digits of an id in tables.
    pub const SHOWN: usize = 8;
    /// The fewest hex digits that name something.
    pub const MIN: usize = 4;
    const FULL: usize = 32;

    /// Reads an id or its end, with or without dashes, in upper or lower case.
    ///
    /// # Errors
    /// [`ShortIdError`] if it cannot be one.
    pub fn parse(text: &str) -> Result<Self, ShortIdError> {
        let given = || text.chars().take(64).collect::<String>();
        let digits: String = text.chars().filter(|c| *c != '-').map(|c| c.to_ascii_lowercase()).collect();
        if digits.is_empty() || text.starts_with('-') || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(ShortIdError::NotHex { given: given() });
        }
        match digits.len() {
            Self::MIN..=Self::FULL => {
                let value = u128::from_str_radix(&digits, 16).map_err(|_| ShortIdError::NotHex { given: given() })?;
                Ok(Self { digits: digits.len(), value })
            }
            digits => Err(ShortIdError::Length { given: given(), digits }),
        }
    }

    /// Whether `id` ends so.
    #[must_use]
    pub fn matches(&self, id: &Uuid) -> bool {
        let mask = u128::MAX >> ((Self::FULL - self.digits) * 4);
        id.as_u128() & mask == self.value
    }

    /// The id itself, if all of it was given.
    #[must_use]
    pub fn full(&self) -> Option<Uuid> {
        (self.digits == Self::FULL).then(|| Uuid::from_u128(self.value))
    }

    /// The form for tables.
    #[must_use]
    pub fn of(id: &Uuid) -> String {
        let text = id.simple().to_string();
        text[Self::FULL - Self::SHOWN..].to_owned()
    }
}

/// Why a text is no id.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum ShortIdError {
    #[error("{given:?} is no id")]
    NotHex { given: String },
    #[error("{given:?} has {digits} hex digits; an id has 32, its end at least 4")]
    Length { given: String, digits: usize },
}

impl ShortIdError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        "give an id, or at least its last 4 hex digits; `farfork ls` and `farfork image ls` show the last 8"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_names_an_id() {
        let id = Uuid::try_parse("01a1fc33-17d1-75d3-91ee-7033a3d9e37c").unwrap();
        assert_eq!(ShortId::of(&id), "a3d9e37c");
        for end in ["e37c", "E37C", "a3d9e37c", "91ee-7033a3d9e37c", "01a1fc33-17d1-75d3-91ee-7033a3d9e37c"] {
            assert!(ShortId::parse(end).unwrap().matches(&id), "{end}");
        }
        assert!(!ShortId::parse("01a1fc33").unwrap().matches(&id), "the head is a time, not a name");
        assert_eq!(ShortId::parse(&id.to_string()).unwrap().full(), Some(id));
        assert_eq!(ShortId::parse("a3d9e37c").unwrap().full(), None);
    }

    #[test]
    fn what_cannot_be_an_id_is_refused() {
        for bad in ["", "-", "----", "zzzz", "e37c\0", "../e37c", "-e37c", "ä"] {
            assert!(matches!(ShortId::parse(bad), Err(ShortIdError::NotHex { .. })), "{bad:?}");
        }
        for (bad, digits) in [("e37", 3), (&"0".repeat(33), 33), (&"0".repeat(10_000), 10_000)] {
            let error = ShortId::parse(bad).unwrap_err();
            assert!(matches!(error, ShortIdError::Length { digits: found, .. } if found == digits), "{error}");
            assert!(error.to_string().len() < 200);
        }
    }
}
