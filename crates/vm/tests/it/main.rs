//! Stories about machines and images on KVM, named by what must hold.

mod bad_input;
mod corpora;
mod escape;
mod exits;
mod fleet;
mod fork;
mod holes;
mod leaks;
mod probe;
mod random_operations;
mod remote;
mod save;
mod state;
mod workers;
