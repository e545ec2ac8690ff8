//! Names of saved images and templates. A name becomes a file name in a node's store, so what it may hold is decided here and nowhere else.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// 1 to 64 bytes of `a-z 0-9 . _ -` that begin with a letter or digit and have no two dots in a row.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// The most bytes of a name.
    pub const BYTES_MAX: usize = 64;

    /// Checks `text`.
    ///
    /// # Errors
    /// [`NameError`] names the rule that `text` breaks.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let Some(first) = text.chars().next() else { return Err(NameError::Empty) };
        if text.len() > Self::BYTES_MAX {
            return Err(NameError::TooLong { bytes: text.len() });
        }
        for (position, character) in text.chars().enumerate() {
            match character {
                'a'..='z' | '0'..='9' | '.' | '_' | '-' => {}
                '\0' => return Err(NameError::Nul { position }),
                '/' | '\\' => return Err(NameError::Separator { position }),
                other => return Err(NameError::Character { character: other, position }),
            }
        }
        if !first.is_ascii_alphanumeric() {
            return Err(NameError::Start { character: first });
        }
        if text.contains("..") {
            return Err(NameError::DotDot);
        }
        Ok(Self(text.to_owned()))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::parse(text)
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        Self::parse(&text)
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

/// Why a text is no name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum NameError {
    #[error("the name is empty")]
    Empty,
    #[error("the name has {bytes} bytes where 64 are the most")]
    TooLong { bytes: usize },
    #[error("the name has a path separator at position {position}")]
    Separator { position: usize },
    #[error("the name has a NUL at position {position}")]
    Nul { position: usize },
    #[error("the name has {character:?} at position {position}")]
    Character { character: char, position: usize },
    #[error("the name begins with {character:?}")]
    Start { character: char },
    #[error("the name has two dots in a row")]
    DotDot,
}

impl NameError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        "use 1 to 64 of a-z 0-9 . _ - and begin with a letter or digit"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_may_become_files_are_taken() {
        for good in ["a", "0", "python-3.12_warm", &"a".repeat(64)] {
            assert_eq!(Name::parse(good).unwrap().as_str(), good);
        }
    }

    #[test]
    fn each_rule_has_its_error() {
        let errors = [
            ("", NameError::Empty),
            (&"a".repeat(65), NameError::TooLong { bytes: 65 }),
            ("a/b", NameError::Separator { position: 1 }),
            ("a\\b", NameError::Separator { position: 1 }),
            ("../../etc/passwd", NameError::Separator { position: 2 }),
            ("a\0", NameError::Nul { position: 1 }),
            ("Python", NameError::Character { character: 'P', position: 0 }),
            ("ä", NameError::Character { character: 'ä', position: 0 }),
            ("a b", NameError::Character { character: ' ', position: 1 }),
            (".", NameError::Start { character: '.' }),
            ("..", NameError::Start { character: '.' }),
            ("-rf", NameError::Start { character: '-' }),
            ("a..b", NameError::DotDot),
        ];
        for (text, error) in errors {
            assert_eq!(Name::parse(text), Err(error), "{text:?}");
            assert!(!error.remedy().is_empty());
        }
    }

    #[test]
    fn what_is_read_is_checked_too() {
        let read = |text: &str| postcard::from_bytes::<Name>(&postcard::to_stdvec(text).unwrap());
        assert!(read("warm").is_ok());
        assert!(read("a/b").is_err());
    }
}
