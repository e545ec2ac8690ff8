//! Stand-ins for tests: a store in memory, and lies that a holder can tell.

mod lie;
mod raw;
mod store;

pub use lie::Lie;
pub use raw::raw_connection;
pub use store::{Ask, Gate, MemoryImage, MemoryStore, OpenGate};
