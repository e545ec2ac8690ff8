//! A connection without the manners of [`crate::client`], for those who attack.

use std::net::SocketAddr;
use std::time::Duration;

use crate::endpoint::{self, Tuning};
use crate::identity::Identity;
use crate::trust::Trust;
use crate::wire::ALPN_PAGES;

/// Connects with a certificate as a reader would, and promises room for so many bytes; what is then sent and read is up to the
/// caller. Must be called inside a tokio runtime.
///
/// # Errors
/// What the transport says.
///
/// # Panics
/// If there is no socket to be had.
pub async fn raw_connection(
    identity: &Identity,
    trust: &Trust,
    address: SocketAddr,
    receive_window_bytes: u32,
) -> Result<(quinn::Endpoint, quinn::Connection), quinn::ConnectionError> {
    let tuning = Tuning { idle_timeout: Duration::from_secs(30), receive_window_bytes, ..Tuning::default() };
    let config = endpoint::client_config(identity, trust, ALPN_PAGES, &tuning).expect("a configuration");
    let endpoint = endpoint::client(&tuning, false).expect("a socket");
    let connection = endpoint.connect_with(config, address, "farfork").expect("an address").await?;
    Ok((endpoint, connection))
}
