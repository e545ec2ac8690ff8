//! The key of a cluster's authority is on disk only as this: encrypted under a passphrase that is kept elsewhere.
//!
//! PBKDF2-HMAC-SHA256 makes a key of the passphrase, ChaCha20-Poly1305 encrypts with it; both are ring's.

use std::fmt;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::{fs, io};

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use ring::pbkdf2;
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// As OWASP recommends for PBKDF2 with SHA-256 (2023).
const ROUNDS: u32 = 600_000;
/// What a file may ask for: it is read before anything is proven.
const ROUNDS_MAX: u32 = 10_000_000;
const PASSPHRASE_BYTES_MAX: u64 = 1024;
const DRAWN_BYTES: usize = 32;

/// What opens a seal.
pub struct Passphrase(Vec<u8>);

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealed {
    rounds: u32,
    salt: [u8; 16],
    nonce: [u8; 12],
    bytes: Vec<u8>,
}

/// Why something cannot be sealed, or opened.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum SealError {
    #[error("the passphrase file {} cannot be used: {source}", path.display())]
    Passphrase { path: PathBuf, source: io::Error },
    #[error("the passphrase in {} is shorter than 16 bytes", path.display())]
    Short { path: PathBuf },
    #[error("the authority's key does not open with this passphrase")]
    Wrong,
    #[error("the authority's sealed key is damaged")]
    Damaged,
    #[error("the system gives no randomness")]
    NoRandomness,
}

impl SealError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Passphrase { .. } => "name the file with --ca-passphrase-file, readable by the node's user alone",
            Self::Short { .. } => "use what `farfork cluster init` wrote, or at least 16 bytes of your own",
            Self::Wrong => "copy the passphrase file of the node on which the cluster was begun",
            Self::Damaged => "restore ca.sealed from another voter's data directory",
            Self::NoRandomness => "look whether the system gives randomness (getrandom), then try again",
        }
    }
}

impl Passphrase {
    /// Reads it from a file.
    ///
    /// # Errors
    /// [`SealError`].
    pub fn read(path: &Path) -> Result<Self, SealError> {
        let failed = |source| SealError::Passphrase { path: path.to_owned(), source };
        let mut text = String::new();
        io::Read::read_to_string(&mut io::Read::take(fs::File::open(path).map_err(failed)?, PASSPHRASE_BYTES_MAX), &mut text)
            .map_err(failed)?;
        let text = text.trim();
        if text.len() < 16 {
            return Err(SealError::Short { path: path.to_owned() });
        }
        Ok(Self(text.as_bytes().to_vec()))
    }

    /// The same, or draws one and writes it there, for its owner alone. Whether it was drawn.
    ///
    /// # Errors
    /// [`SealError`].
    pub fn read_or_draw(path: &Path) -> Result<(Self, bool), SealError> {
        if path.exists() {
            return Ok((Self::read(path)?, false));
        }
        let failed = |source| SealError::Passphrase { path: path.to_owned(), source };
        let mut drawn = [0; DRAWN_BYTES];
        SystemRandom::new().fill(&mut drawn).map_err(|_| SealError::NoRandomness)?;
        let text = super::token::hex(&drawn);
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).map_err(failed)?;
        }
        let mut options = fs::File::options();
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut file = options.write(true).create_new(true).open(path).map_err(failed)?;
        io::Write::write_all(&mut file, format!("{text}\n").as_bytes()).and_then(|()| file.sync_all()).map_err(failed)?;
        Ok((Self(text.into_bytes()), true))
    }

    fn key(&self, salt: &[u8], rounds: u32) -> Result<LessSafeKey, SealError> {
        let rounds = NonZeroU32::new(rounds).filter(|rounds| rounds.get() <= ROUNDS_MAX).ok_or(SealError::Damaged)?;
        let mut key = [0; 32];
        pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, rounds, salt, &self.0, &mut key);
        Ok(LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, &key).expect("32 bytes")))
    }
}

impl fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Passphrase(..)")
    }
}

impl Sealed {
    /// Encrypts.
    ///
    /// # Errors
    /// [`SealError::NoRandomness`].
    pub fn seal(secret: &[u8], passphrase: &Passphrase) -> Result<Self, SealError> {
        let (mut salt, mut nonce, mut bytes) = ([0; 16], [0; 12], secret.to_vec());
        let random = SystemRandom::new();
        random.fill(&mut salt).and_then(|()| random.fill(&mut nonce)).map_err(|_| SealError::NoRandomness)?;
        let key = passphrase.key(&salt, ROUNDS)?;
        let nonce_of = Nonce::assume_unique_for_key(nonce);
        key.seal_in_place_append_tag(nonce_of, Aad::empty(), &mut bytes).map_err(|_| SealError::NoRandomness)?;
        Ok(Self { rounds: ROUNDS, salt, nonce, bytes })
    }

    /// Decrypts.
    ///
    /// # Errors
    /// [`SealError::Wrong`] if the passphrase is another one, or a byte was changed.
    pub fn open(&self, passphrase: &Passphrase) -> Result<Vec<u8>, SealError> {
        let key = passphrase.key(&self.salt, self.rounds)?;
        let mut bytes = self.bytes.clone();
        let nonce = Nonce::assume_unique_for_key(self.nonce);
        let opened = key.open_in_place(nonce, Aad::empty(), &mut bytes).map_err(|_| SealError::Wrong)?;
        Ok(opened.to_vec())
    }

    /// For a file.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("plain data")
    }

    /// From one.
    ///
    /// # Errors
    /// [`SealError::Damaged`].
    pub fn from_bytes(bytes: impl AsRef<[u8]>) -> Result<Self, SealError> {
        match postcard::take_from_bytes(bytes.as_ref()) {
            Ok((sealed, [])) => Ok(sealed),
            _ => Err(SealError::Damaged),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seal_opens_with_its_passphrase_and_with_no_other() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("etc/passphrase");
        let (passphrase, is_new) = Passphrase::read_or_draw(&path).unwrap();
        assert!(is_new && !Passphrase::read_or_draw(&path).unwrap().1);
        let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&path).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
        let sealed = Sealed::seal(b"the key", &passphrase).unwrap();
        assert!(!sealed.to_bytes().windows(7).any(|window| window == b"the key"));
        let read = Sealed::from_bytes(sealed.to_bytes()).unwrap();
        assert_eq!(read.open(&Passphrase::read(&path).unwrap()).unwrap(), b"the key");
        assert!(matches!(read.open(&Passphrase(b"another passphrase".to_vec())), Err(SealError::Wrong)));
        let changed = Sealed { bytes: read.bytes.iter().map(|byte| byte ^ 1).collect(), ..read.clone() };
        assert!(matches!(changed.open(&passphrase), Err(SealError::Wrong)));
        assert!(matches!(Sealed { rounds: u32::MAX, ..read }.open(&passphrase), Err(SealError::Damaged)));
        assert!(matches!(Sealed::from_bytes(b"x"), Err(SealError::Damaged)));
        fs::write(&path, "short").unwrap();
        assert!(matches!(Passphrase::read(&path), Err(SealError::Short { .. })));
    }
}
