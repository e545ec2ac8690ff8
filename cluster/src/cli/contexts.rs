//! Where verbs ask: a socket on this host, or a cluster over HTTPS. What a user asks again and again has a name, a context, in
//! `config.toml`:
//!
//! ```text
//!  current = "prod"
//!
//!  [contexts.prod]
//!  urls = ["https://192.0.2.1:7118", "https://192.0.2.2:7118"]     the first that answers is asked
//!  authority = "5f…"            by which its nodes are known; or ca = "/path/ca.pem"
//!  token = "ffuser_…"           or certificate = "/path/me.pem" and key = "/path/me.key"
//!
//!  [contexts.lab]
//!  socket = "/run/lab/farfork.sock"
//! ```

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::http::Uri;
use pages::https::{self, Expected, Shown};
use pages::identity::Fingerprint;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio_rustls::rustls;
use types::{Digest, Name, NameError};

use super::client::{Remote, Target, Url};
use super::paths::{self, PathError};

const DEFAULT_PORT: u16 = 7118;

/// All of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Contexts {
    /// What is asked unless a verb says otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub current: Option<String>,
    /// By name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub contexts: BTreeMap<String, Entry>,
}

/// One of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// A node of this host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Nodes of a cluster.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
    /// The digest of its authority.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub authority: Option<String>,
    /// Who vouches for its nodes' names instead (PEM).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    /// Shows who asks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// The same, as a certificate (PEM).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate: Option<PathBuf>,
    /// Its key (PEM).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<PathBuf>,
}

/// What is wrong with contexts.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum ContextError {
    #[error(transparent)]
    Path(#[from] PathError),
    #[error("{} cannot be used: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{} is not as it should be: {why}", path.display())]
    Malformed { path: PathBuf, why: String },
    #[error("there is no context called {name}")]
    Unknown { name: String },
    #[error("there is a context called {name} already")]
    Exists { name: String },
    #[error("context {name}: {why}")]
    Bad { name: String, why: String },
    #[error("no name of a context: {0}")]
    Name(#[from] NameError),
}

impl ContextError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self {
            Self::Path(error) => error.remedy().to_owned(),
            Self::File { .. } => "look whose file that is, and whether it may be read".to_owned(),
            Self::Malformed { .. } => "correct it, or move it away and make contexts anew: farfork context add".to_owned(),
            Self::Unknown { .. } => "`farfork context ls` lists them".to_owned(),
            Self::Exists { .. } => "take another name, or remove that one: farfork context rm".to_owned(),
            Self::Bad { .. } => "`farfork context add --help` says what one needs".to_owned(),
            Self::Name(error) => error.remedy().to_owned(),
        }
    }
}

impl Contexts {
    /// Those of this user; none if there is no file.
    ///
    /// # Errors
    /// [`ContextError`].
    pub fn read() -> Result<Self, ContextError> {
        let path = paths::contexts()?;
        match std::fs::read_to_string(&path) {
            Ok(text) => toml::from_str(&text).map_err(|error| ContextError::Malformed { path, why: error.to_string() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(source) => Err(ContextError::File { path, source }),
        }
    }

    /// Writes them, for this user alone: tokens are in there.
    ///
    /// # Errors
    /// [`ContextError`]; the file is as it was.
    pub fn write(&self) -> Result<(), ContextError> {
        let path = paths::contexts()?;
        let directory = path.parent().map_or_else(PathBuf::new, Path::to_owned);
        let failed = |source| ContextError::File { path: path.clone(), source };
        std::fs::create_dir_all(&directory).map_err(failed)?;
        let text = toml::to_string_pretty(self).expect("text and lists of text");
        // A temporary file is for its user alone.
        let mut file = tempfile::NamedTempFile::new_in(&directory).map_err(failed)?;
        io::Write::write_all(&mut file, text.as_bytes()).and_then(|()| file.as_file().sync_all()).map_err(failed)?;
        file.persist(&path).map_err(|error| failed(error.error))?;
        Ok(())
    }

    /// Adds one, which is the current one from now on.
    ///
    /// # Errors
    /// [`ContextError`]; nothing was added.
    pub fn add(&mut self, name: &str, entry: Entry) -> Result<(), ContextError> {
        Name::parse(name)?;
        if self.contexts.contains_key(name) {
            return Err(ContextError::Exists { name: name.to_owned() });
        }
        entry.target(name)?;
        self.contexts.insert(name.to_owned(), entry);
        self.current = Some(name.to_owned());
        Ok(())
    }

    /// Where the context of this name asks.
    ///
    /// # Errors
    /// [`ContextError`].
    pub fn target(&self, name: &str) -> Result<Target, ContextError> {
        let entry = self.contexts.get(name).ok_or_else(|| ContextError::Unknown { name: name.to_owned() })?;
        entry.target(name)
    }
}

impl Entry {
    fn target(&self, name: &str) -> Result<Target, ContextError> {
        let bad = |why: String| ContextError::Bad { name: name.to_owned(), why };
        if let Some(socket) = &self.socket {
            let others = Self { socket: None, ..self.clone() };
            return if others == Self::default() {
                Ok(Target::Socket(socket.clone()))
            } else {
                Err(bad("a socket, and something else".to_owned()))
            };
        }
        if self.urls.is_empty() {
            return Err(bad("neither a socket nor urls".to_owned()));
        }
        let urls = self.urls.iter().map(|text| url(text).map_err(&bad)).collect::<Result<Vec<_>, _>>()?;
        let expected = match (&self.authority, &self.ca) {
            (Some(digest), None) => {
                let digest: Digest = digest.parse().map_err(|_| bad("authority is 64 hex digits".to_owned()))?;
                Expected::Authority(Fingerprint(digest))
            }
            (None, Some(ca)) => Expected::Roots(pem(ca)?),
            _ => return Err(bad("either authority or ca says whom to take for its nodes".to_owned())),
        };
        let shown = match (&self.certificate, &self.key) {
            (Some(certificate), Some(key)) => Some(shown(certificate, key)?),
            (None, None) => None,
            _ => return Err(bad("a certificate and a key go together".to_owned())),
        };
        if self.token.is_some() == shown.is_some() {
            return Err(bad("either a token or a certificate says who asks".to_owned()));
        }
        let tls: rustls::ClientConfig = https::client(&expected, shown.as_ref()).map_err(|error| bad(error.to_string()))?;
        Ok(Target::Users(Arc::new(Remote { name: name.to_owned(), urls, tls: Arc::new(tls), token: self.token.clone() })))
    }
}

/// A certificate and its key from files.
///
/// # Errors
/// [`ContextError`].
pub fn shown(certificate: &Path, key: &Path) -> Result<Shown, ContextError> {
    Ok(Shown { certificates: pem(certificate)?, key: pem(key)? })
}

fn pem(path: &Path) -> Result<Vec<u8>, ContextError> {
    std::fs::read(path).map_err(|source| ContextError::File { path: path.to_owned(), source })
}

fn url(text: &str) -> Result<Url, String> {
    let uri: Uri = text.parse().map_err(|_| format!("{text} is no URL"))?;
    let host =
        uri.host().filter(|_| uri.scheme_str() == Some("https") && matches!(uri.path(), "" | "/") && uri.query().is_none());
    let host = host.ok_or_else(|| format!("{text} is not like https://HOST:PORT"))?;
    let bare = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    Ok(Url { host: bare, port: uri.port_u16().unwrap_or(DEFAULT_PORT) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<Target, String> {
        let contexts: Contexts = toml::from_str(text).map_err(|error| error.to_string())?;
        contexts.target("x").map_err(|error| format!("{error}"))
    }

    #[test]
    fn a_context_says_where_and_who() {
        let digest = Digest::of(b"authority");
        let whole = format!(
            "[contexts.x]\nurls = ['https://192.0.2.1:7118', 'https://[2001:db8::1]']\nauthority = '{digest}'\ntoken = 'ffuser_1'\n"
        );
        let Ok(Target::Users(remote)) = of(&whole) else { panic!("{:?}", of(&whole).err()) };
        let urls: Vec<(&str, u16)> = remote.urls.iter().map(|url| (url.host.as_str(), url.port)).collect();
        assert_eq!(urls, [("192.0.2.1", 7118), ("2001:db8::1", 7118)]);
        assert!(matches!(of("[contexts.x]\nsocket = '/run/x'\n"), Ok(Target::Socket(_))));
        for (bad, why) in [
            (whole.replace("https", "http"), "https://HOST:PORT"),
            (whole.replace("7118", "7118/v1"), "https://HOST:PORT"),
            (whole.replace("token = 'ffuser_1'", ""), "who asks"),
            (whole.replace("authority", "# "), "whom to take"),
            (whole.replace(&digest.to_string(), "5f"), "64 hex"),
            (whole.clone() + "key = '/k'\n", "go together"),
            (whole.clone() + "ca = '/k'\n", "whom to take"),
            (whole.clone() + "socket = '/k'\n", "something else"),
            (whole.clone() + "tokn = 'x'\n", "tokn"),
            (whole.replace("contexts.x", "contexts.y"), "no context called x"),
            ("[contexts.x]\n".to_owned(), "neither"),
        ] {
            let error = of(&bad).err().unwrap_or_else(|| panic!("taken: {bad}"));
            assert!(error.contains(why), "{bad}: {error}");
        }
    }
}
