//! HTTP/1.1 with JSON: over a Unix socket for users of the host, over TLS for users of the cluster.
//!
//! ```text
//!  server ──▶ count ──▶ audit ──▶ caller ───▶ routes ──▶ handlers ──▶ node::calls ──▶ node::service
//!  slots,     metrics             401, 403    404, 405   extract: 400, 408, 413
//!  deadlines                                             error: everything else
//! ```
//!
//! | file | holds |
//! |---|---|
//! | [`socket`] | where the node listens, and that it alone does |
//! | [`server`] | connections: who is let in, how many, for how long; stopping |
//! | [`caller`] | who asks, and what that one may |
//! | [`audit`] | writes down who asked for what |
//! | [`routes`] | every path, with what each route shares |
//! | [`description`] | all of them, described |
//! | [`cluster`], [`machines`], [`kill`], [`images`], [`templates`], [`archive`], [`trust`], [`users`], [`facts`], [`jobs`], [`job_tasks`], [`node`] | handlers |
//! | [`between`] | what nodes ask one another for jobs |
//! | [`wire`] | what goes over the wire; its description is `docs/openapi.json` |
//! | [`error`] | refusals and failures as status and body |
//! | [`extract`] | what a request holds, read within limits |

pub mod archive;
pub mod audit;
pub mod between;
pub mod caller;
pub mod cluster;
mod description;
pub mod error;
pub mod extract;
pub mod facts;
pub mod images;
pub mod job_tasks;
pub mod jobs;
pub mod kill;
pub mod machines;
pub mod node;
pub mod routes;
pub mod server;
pub mod socket;
pub mod templates;
pub mod trust;
pub mod users;
pub mod wire;
mod write_deadline;

pub use caller::Caller;
pub use description::openapi_json;
pub use error::ApiError;
pub use routes::{App, Limits, router};
pub use server::{Access, Https, serve};
pub use socket::{Socket, SocketError};
