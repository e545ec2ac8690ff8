//! Stand-ins for tests: a store in memory, and lies that a holder can tell.

mod lie;
mod store;

pub use lie::Lie;
pub use store::{Ask, Gate, MemoryImage, MemoryStore, OpenGate};
