//! Names of saved images and templates. A name becomes a file name in a node's store, so what it may hold is decided here and nowhere else.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::id::Tenant;

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

/// Between tenant and name of a file: neither has it.
const IN_FILES: char = '@';

/// A name of a tenant's. Written as the name alone if the tenant is the default one, and as `tenant/name` otherwise.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FullName {
    /// Whose.
    pub tenant: Tenant,
    /// The name.
    pub name: Name,
}

impl FullName {
    /// Of the default tenant, unless `text` names another one.
    ///
    /// # Errors
    /// [`NameError`] names the rule that `text` breaks.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        Self::parse_of(text, &Tenant::default_tenant())
    }

    /// Of this tenant, unless `text` names another one.
    ///
    /// # Errors
    /// [`NameError`] names the rule that `text` breaks.
    pub fn parse_of(text: &str, tenant: &Tenant) -> Result<Self, NameError> {
        let (tenant, name) = match text.split_once('/') {
            Some((tenant, name)) => (tenant.parse().map_err(|_| NameError::Tenant)?, name),
            None => (tenant.clone(), text),
        };
        Ok(Self { tenant, name: Name::parse(name)? })
    }
}

impl FullName {
    /// What its file is called, without its ending.
    #[must_use]
    pub fn file_stem(&self) -> String {
        let Self { tenant, name } = self;
        if *tenant == Tenant::default_tenant() { name.to_string() } else { format!("{tenant}{IN_FILES}{name}") }
    }

    /// The name whose file is called so.
    #[must_use]
    pub fn of_file_stem(stem: &str) -> Option<Self> {
        let full = match stem.split_once(IN_FILES) {
            Some((tenant, name)) => Self { tenant: tenant.parse().ok()?, name: Name::parse(name).ok()? },
            None => Self::from(Name::parse(stem).ok()?),
        };
        // Each name has one file.
        (full.file_stem() == stem).then_some(full)
    }
}

impl From<Name> for FullName {
    fn from(name: Name) -> Self {
        Self { tenant: Tenant::default_tenant(), name }
    }
}

impl fmt::Display for FullName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.tenant != Tenant::default_tenant() {
            write!(f, "{}/", self.tenant)?;
        }
        self.name.fmt(f)
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
    #[error("what is before the slash is no tenant")]
    Tenant,
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
    fn names_of_tenants_have_files_of_their_own() {
        for (text, stem) in [("warm", "warm"), ("team-7/warm", "team-7@warm")] {
            let name = FullName::parse(text).unwrap();
            assert_eq!((name.to_string().as_str(), name.file_stem().as_str()), (text, stem));
            assert_eq!(FullName::of_file_stem(stem), Some(name));
        }
        assert_eq!(FullName::parse("default/warm").unwrap().to_string(), "warm");
        let team: Tenant = "team-7".parse().unwrap();
        assert_eq!(FullName::parse_of("warm", &team).unwrap().to_string(), "team-7/warm");
        for bad in ["default@warm", "@warm", "a@b@c", "a@", "../x@warm"] {
            assert_eq!(FullName::of_file_stem(bad), None, "{bad}");
        }
        assert_eq!(FullName::parse("Team/warm"), Err(NameError::Tenant));
        assert_eq!(FullName::parse("a/b/c"), Err(NameError::Separator { position: 1 }));
    }

    #[test]
    fn what_is_read_is_checked_too() {
        let read = |text: &str| postcard::from_bytes::<Name>(&postcard::to_stdvec(text).unwrap());
        assert!(read("warm").is_ok());
        assert!(read("a/b").is_err());
    }
}
