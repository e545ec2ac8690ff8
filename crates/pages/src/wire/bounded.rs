//! Bytes and lists with a bound in their type: longer ones do not decode, and nothing beyond the bound is allocated on the way.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;

use bytes::Bytes;
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

/// At most `MAX` bytes.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Blob<const MAX: usize>(Bytes);

/// At most `MAX` elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct List<T, const MAX: usize>(Vec<T>);

/// Too many bytes or elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{count} where {most} is the most")]
pub struct TooMany {
    /// How many there are.
    pub count: usize,
    /// How many there may be.
    pub most: usize,
}

fn within(count: usize, most: usize) -> Result<(), TooMany> {
    if count <= most { Ok(()) } else { Err(TooMany { count, most }) }
}

impl<const MAX: usize> Blob<MAX> {
    /// Checks the length.
    ///
    /// # Errors
    /// [`TooMany`] bytes.
    pub fn new(bytes: impl Into<Bytes>) -> Result<Self, TooMany> {
        let bytes = bytes.into();
        within(bytes.len(), MAX).map(|()| Self(bytes))
    }

    /// The bytes, without a copy.
    #[must_use]
    pub fn into_bytes(self) -> Bytes {
        self.0
    }
}

impl<const MAX: usize> Deref for Blob<MAX> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

/// The length only: some of these are secret, most are long.
impl<const MAX: usize> fmt::Debug for Blob<MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Blob({} bytes)", self.0.len())
    }
}

impl<const MAX: usize> Serialize for Blob<MAX> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de, const MAX: usize> Deserialize<'de> for Blob<MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bounded<const MAX: usize>;
        impl<const MAX: usize> Visitor<'_> for Bounded<MAX> {
            type Value = Blob<MAX>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {MAX} bytes")
            }

            fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<Self::Value, E> {
                within(bytes.len(), MAX).map_err(E::custom)?;
                Ok(Blob(Bytes::copy_from_slice(bytes)))
            }
        }
        deserializer.deserialize_bytes(Bounded)
    }
}

impl<T, const MAX: usize> List<T, MAX> {
    /// Checks the length.
    ///
    /// # Errors
    /// [`TooMany`] elements.
    pub fn new(elements: Vec<T>) -> Result<Self, TooMany> {
        within(elements.len(), MAX).map(|()| Self(elements))
    }

    /// The first `MAX` elements.
    pub fn first_of(elements: impl IntoIterator<Item = T>) -> Self {
        Self(elements.into_iter().take(MAX).collect())
    }

    /// The elements.
    #[must_use]
    pub fn into_vec(self) -> Vec<T> {
        self.0
    }
}

impl<T, const MAX: usize> Deref for List<T, MAX> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T, const MAX: usize> Default for List<T, MAX> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Serialize, const MAX: usize> Serialize for List<T, MAX> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de, T: Deserialize<'de>, const MAX: usize> Deserialize<'de> for List<T, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bounded<T, const MAX: usize>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for Bounded<T, MAX> {
            type Value = List<T, MAX>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {MAX} elements")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Self::Value, A::Error> {
                // The announced number is the sender's word: refused if too large, and not allocated by.
                if let Some(announced) = sequence.size_hint() {
                    within(announced, MAX).map_err(A::Error::custom)?;
                }
                let mut elements = Vec::new();
                while let Some(element) = sequence.next_element()? {
                    within(elements.len() + 1, MAX).map_err(A::Error::custom)?;
                    elements.push(element);
                }
                Ok(List(elements))
            }
        }
        deserializer.deserialize_seq(Bounded(PhantomData))
    }
}
