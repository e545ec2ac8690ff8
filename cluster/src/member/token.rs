//! Join tokens: what an administrator gives to a node that is to be let in. They are short texts, shown once, good once.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use pages::identity::Fingerprint;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use types::{Digest, Name};

const PREFIX: &str = "ffjoin1-";
/// The most characters of a token.
const TEXT_MAX: usize = 2048;
/// The most voters that it names.
pub const ADDRESSES_MAX: usize = 8;

/// See the module.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinToken {
    /// Where voters are.
    pub addresses: Vec<SocketAddr>,
    /// The digest of the cluster's authority.
    pub authority: Digest,
    /// What the node is to be called.
    pub name: Name,
    /// What only who has the token knows.
    pub secret: [u8; 32],
}

/// Why a text is no token.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("this is no join token: {0}")]
pub struct TokenError(&'static str);

impl TokenError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        "give the whole line that `farfork cluster token` printed on a voter"
    }
}

impl JoinToken {
    /// What the cluster knows of its secret.
    #[must_use]
    pub fn digest(secret: &[u8; 32]) -> Digest {
        Digest::of(&[b"farfork join token".as_slice(), secret].concat())
    }

    /// The digest of the authority, as certificates have it.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint(self.authority)
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = postcard::to_stdvec(self).expect("plain data");
        // A character that was lost or changed is told from a token that is out of date.
        let sum = blake3::hash(&bytes);
        bytes.extend(&sum.as_bytes()[..4]);
        write!(f, "{PREFIX}{}", hex(&bytes))
    }
}

/// Without the secret.
impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken").field("addresses", &self.addresses).field("name", &self.name).finish_non_exhaustive()
    }
}

impl FromStr for JoinToken {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let text = text.trim().strip_prefix(PREFIX).ok_or(TokenError("it does not begin with ffjoin1-"))?;
        if text.len() > TEXT_MAX {
            return Err(TokenError("it is too long"));
        }
        let bytes = unhex(text).ok_or(TokenError("it has a character that tokens do not have, or lacks one"))?;
        let (body, sum) = bytes.split_last_chunk::<4>().ok_or(TokenError("it is too short"))?;
        if blake3::hash(body).as_bytes()[..4] != sum[..] {
            return Err(TokenError("some of it was changed or lost"));
        }
        match postcard::take_from_bytes::<Self>(body) {
            Ok((token, [])) if (1..=ADDRESSES_MAX).contains(&token.addresses.len()) => Ok(token),
            _ => Err(TokenError("another version of farfork made it")),
        }
    }
}

/// As text.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |character: char| character.to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let digits: Vec<u8> = text.chars().map(digit).collect::<Option<_>>()?;
    let (pairs, rest) = digits.as_chunks::<2>();
    rest.is_empty().then(|| pairs.iter().map(|[high, low]| high << 4 | low).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_being_copied_and_nothing_else_does() {
        let token = JoinToken {
            addresses: vec!["192.0.2.7:7117".parse().unwrap(), "[2001:db8::1]:7117".parse().unwrap()],
            authority: Digest::of(b"authority"),
            name: Name::parse("node-2").unwrap(),
            secret: [7; 32],
        };
        let text = token.to_string();
        assert_eq!(format!(" {text}\n").parse(), Ok(token.clone()));
        assert!(!format!("{token:?}").contains("7, 7"), "secrets are not printed");
        for bad in [
            &text[1..],
            &text[..text.len() - 1],
            &text[..text.len() - 2],
            &text.replacen('7', "8", 1),
            "ffjoin1-",
            "",
            "ffjoin1-zz",
        ] {
            assert!(bad.parse::<JoinToken>().is_err(), "{bad}");
        }
        assert!(format!("{PREFIX}{}", "00".repeat(5000)).parse::<JoinToken>().is_err());
        let mut dice = fastrand::Rng::with_seed(7);
        for _ in 0..2000 {
            let mut bytes = text.clone().into_bytes();
            let at = dice.usize(8..bytes.len());
            bytes[at] = *dice.choice(b"0123456789abcdefg").unwrap();
            let changed = String::from_utf8(bytes).unwrap();
            assert!(changed == text || changed.parse::<JoinToken>().is_err(), "{changed}");
        }
    }
}
