//! Clusters of real nodes: how they come to be, where forks run, what becomes of them when nodes die, stand still, or are cut off,
//! and what is not let in. Each fault says how long it took. And the clusters that `farfork up` brings up on one host.

mod capacity;
mod clocks;
mod doors;
mod execs;
mod faults;
mod forks;
mod histories;
mod jobs;
mod local;
mod repair;
mod stage;
mod users;
mod versions;
mod watch;
