//! Clusters of real nodes: how they come to be, where forks run, what becomes of them when nodes die, stand still, or are cut off,
//! and what is not let in. Each fault says how long it took.

mod doors;
mod faults;
mod forks;
mod stage;
mod users;
