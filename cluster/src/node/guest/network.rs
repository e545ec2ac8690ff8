//! The network of guests: a range of IPv4 addresses, of which each machine has a network of four to itself.
//!
//! ```text
//! 10.90.0.4/30   10.90.0.4  the network
//!                10.90.0.5  the host's end, which is the guest's gateway
//!                10.90.0.6  the guest
//!                10.90.0.7  broadcast
//! ```

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Addresses of a machine's own network.
const ADDRESSES: u32 = 4;
/// The length of its prefix.
pub const PREFIX: u8 = 30;

/// Both ends of a machine's cable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// The host's: the guest's gateway.
    pub host: Ipv4Addr,
    /// The guest's.
    pub guest: Ipv4Addr,
}

/// The addresses that a node gives to guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestNetwork {
    first: u32,
    prefix: u8,
}

/// Text that is no range of addresses for guests.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum GuestNetworkError {
    #[error("{0:?} is no range of IPv4 addresses")]
    Malformed(String),
    #[error("a prefix of {0} bits, where 8 to {PREFIX} are possible")]
    Prefix(u8),
    #[error("{given} does not begin its range, which begins at {first}")]
    NotFirst { given: Ipv4Addr, first: Ipv4Addr },
}

impl GuestNetworkError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        "name a range that nothing else here uses, as 10.90.0.0/16: each machine takes four of its addresses"
    }
}

impl GuestNetwork {
    /// How many machines have a place in it.
    #[must_use]
    pub fn places(self) -> u32 {
        (1 << (32 - self.prefix)) / ADDRESSES
    }

    /// The ends of the cable of one of them, counted from zero.
    #[must_use]
    pub fn link(self, place: u32) -> Link {
        let network = self.first + place % self.places() * ADDRESSES;
        Link { host: Ipv4Addr::from(network + 1), guest: Ipv4Addr::from(network + 2) }
    }
}

impl FromStr for GuestNetwork {
    type Err = GuestNetworkError;

    fn from_str(text: &str) -> Result<Self, GuestNetworkError> {
        let malformed = || GuestNetworkError::Malformed(text.chars().take(64).collect());
        let (address, prefix) = text.split_once('/').ok_or_else(malformed)?;
        let given: Ipv4Addr = address.parse().map_err(|_| malformed())?;
        let prefix: u8 = prefix.parse().map_err(|_| malformed())?;
        if !(8..=PREFIX).contains(&prefix) {
            return Err(GuestNetworkError::Prefix(prefix));
        }
        let first = u32::from(given) & (u32::MAX << (32 - prefix));
        if first != u32::from(given) {
            return Err(GuestNetworkError::NotFirst { given, first: Ipv4Addr::from(first) });
        }
        Ok(Self { first, prefix })
    }
}

impl fmt::Display for GuestNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", Ipv4Addr::from(self.first), self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_have_networks_that_do_not_meet() {
        let network: GuestNetwork = "10.90.0.0/24".parse().unwrap();
        assert_eq!((network.places(), network.to_string().as_str()), (64, "10.90.0.0/24"));
        let mut seen = std::collections::BTreeSet::new();
        for place in 0..network.places() {
            let Link { host, guest } = network.link(place);
            assert!(seen.insert(u32::from(host) / ADDRESSES));
            assert_eq!((u32::from(host) % ADDRESSES, u32::from(guest) % ADDRESSES), (1, 2));
            assert_eq!(guest.octets()[..3], [10, 90, 0]);
        }
        assert_eq!(network.link(64), network.link(0));
        assert_eq!("255.255.255.252/30".parse::<GuestNetwork>().unwrap().places(), 1);
    }

    #[test]
    fn anything_else_is_refused() {
        for text in
            ["", "10.90.0.0", "10.90.0.0/", "/16", "10.90.0/16", "::/16", "10.90.0.0/16/1", "10.90.0.0/x", "10.0.0.0/300"]
        {
            assert!(matches!(text.parse::<GuestNetwork>(), Err(GuestNetworkError::Malformed(_))), "{text}");
        }
        for prefix in [0, 7, 31, 32, 33] {
            assert_eq!(format!("10.0.0.0/{prefix}").parse::<GuestNetwork>(), Err(GuestNetworkError::Prefix(prefix)));
        }
        let not_first = "10.90.0.4/16".parse::<GuestNetwork>().unwrap_err();
        assert!(not_first.to_string().contains("10.90.0.0"), "{not_first}");
    }
}
