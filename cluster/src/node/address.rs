//! Where other nodes listen, as people write it: `host:port`, `192.0.2.7:7117`, `[2001:db8::7]:7117`.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A host and a port. The host is looked up each time that it is asked for, by the node and not by its client.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeAddress {
    host: String,
    port: u16,
}

impl NodeAddress {
    /// Of a name in the DNS.
    const HOST_BYTES_MAX: usize = 253;

    /// Looks the host up. At least one address.
    ///
    /// # Errors
    /// [`AddressError::Unknown`] if the name has none.
    pub fn resolve(&self) -> Result<Vec<SocketAddr>, AddressError> {
        let unknown = |detail: String| AddressError::Unknown { host: self.host.clone(), detail };
        let found = (self.host.as_str(), self.port).to_socket_addrs().map_err(|error| unknown(error.to_string()))?;
        let found: Vec<SocketAddr> = found.collect();
        if found.is_empty() { Err(unknown("the name has no address".to_owned())) } else { Ok(found) }
    }
}

impl FromStr for NodeAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let malformed = || AddressError::Malformed { given: text.chars().take(64).collect() };
        let (host, port) = text.rsplit_once(':').ok_or_else(malformed)?;
        let is_digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
        let port: u16 = port.parse().ok().filter(|port| is_digits && *port > 0).ok_or_else(malformed)?;
        let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            Some(inner) => inner.parse::<Ipv6Addr>().map_err(|_| malformed())?.to_string(),
            None => host.to_owned(),
        };
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
        let is_address = host.parse::<IpAddr>().is_ok() && (!host.contains(':') || text.starts_with('['));
        let has_name = !host.is_empty() && host.len() <= Self::HOST_BYTES_MAX && host.bytes().all(is_name);
        if is_address || has_name { Ok(Self { host, port }) } else { Err(malformed()) }
    }
}

impl From<SocketAddr> for NodeAddress {
    fn from(address: SocketAddr) -> Self {
        Self { host: address.ip().to_string(), port: address.port() }
    }
}

impl TryFrom<String> for NodeAddress {
    type Error = AddressError;

    fn try_from(text: String) -> Result<Self, AddressError> {
        text.parse()
    }
}

impl From<NodeAddress> for String {
    fn from(address: NodeAddress) -> Self {
        address.to_string()
    }
}

impl fmt::Display for NodeAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port } = self;
        if host.contains(':') { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
    }
}

/// Why a text is no address, or an address leads nowhere.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum AddressError {
    #[error("{given:?} is no HOST:PORT")]
    Malformed { given: String },
    #[error("the host {host} cannot be looked up: {detail}")]
    Unknown { host: String, detail: String },
}

impl AddressError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Malformed { .. } => "write node-7:7117, 192.0.2.7:7117 or [2001:db8::7]:7117",
            Self::Unknown { .. } => "give an address that this node can look up, or the IP address itself",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_addresses_with_a_port_are_read_and_written_alike() {
        for good in ["node-7:7117", "192.0.2.7:1", "[2001:db8::7]:65535", "a.b.example:80", "[::1]:7117"] {
            assert_eq!(good.parse::<NodeAddress>().unwrap().to_string(), good);
        }
        assert_eq!("127.0.0.1:7".parse::<NodeAddress>().unwrap().resolve(), Ok(vec!["127.0.0.1:7".parse().unwrap()]));
        assert_eq!("[::1]:7".parse::<NodeAddress>().unwrap().resolve(), Ok(vec!["[::1]:7".parse().unwrap()]));
    }

    #[test]
    fn everything_else_is_refused() {
        let long = format!("{}:7117", "x".repeat(300));
        for bad in ["", ":", "host", "host:", ":7117", "host:0", "host:65536", "host:+7", "host:-1", "host:7a", "::1:7117"] {
            assert!(matches!(bad.parse::<NodeAddress>(), Err(AddressError::Malformed { .. })), "{bad}");
        }
        for bad in ["[::1:7117", "::1]:7117", "[host]:7117", "a/b:7", "a b:7", "ä:7", "a\0:7", "user@host:7", &long] {
            let error = bad.parse::<NodeAddress>().unwrap_err();
            assert!(error.to_string().len() < 400, "{error}");
        }
    }
}
