//! What the verbs that speak with a guest share: the way to its agent.

use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;

use super::Context;
use super::error::CliError;
pub use crate::node::guest::words::GuestError;
pub(super) use crate::node::guest::words::OWN_FAILURE;
use crate::node::guest::words::{self};

pub(super) type Guest = words::Guest<TokioIo<Upgraded>>;
pub(super) type Hears = words::Hears<TokioIo<Upgraded>>;

/// Connects with the agent of a machine.
pub(super) async fn connect(id: &str, context: &Context) -> Result<Guest, CliError> {
    Ok(Guest::greet(context.client.agent(id).await?).await?)
}
