//! What tests order a machine's worker to do.

use std::os::fd::{AsFd, BorrowedFd};

use super::{Jailed, Pool, PoolError};
use crate::harness::Crash;
use crate::harness::attempts::Order;
use crate::worker::protocol::ToWorker;

impl Pool {
    /// The processes of the shells that wait.
    #[must_use]
    pub fn shell_pids(&self) -> Vec<i32> {
        self.inner.lock().shelves.values().flat_map(|shelf| &shelf.ready).filter_map(|shell| shell.mail().pid).collect()
    }
}

impl Jailed {
    /// Ends its worker in some way, for the tests of ends.
    ///
    /// # Errors
    /// If it has ended already.
    pub fn crash(&self, crash: Crash) -> Result<(), PoolError> {
        self.worker.send(&ToWorker::Crash(crash), &[])
    }

    /// Tries to break out, for the tests of the jail. The error number, 0 for success.
    ///
    /// # Errors
    /// [`PoolError`]; the end of the worker among them.
    pub fn attempt(&self, order: Order, descriptors: &[BorrowedFd<'_>]) -> Result<i32, PoolError> {
        self.worker.mail().await_attempted();
        self.worker.send(&ToWorker::Attempt(order), descriptors)?;
        self.worker.wait(|mail| mail.attempted.take())
    }

    /// Has its worker read a byte of its first layer behind the back of who watches its memory: through a mapping of its own, or by
    /// a process that it forks. The error number, 0 for success.
    ///
    /// # Errors
    /// [`PoolError`]; the end of the worker among them.
    pub fn read_hole(&self, at: u64, is_forked: bool) -> Result<i32, PoolError> {
        let image = self.image().expect("a child");
        let layer = image.regions()[0].layers()[0].read_only().expect("a descriptor to read");
        self.worker.mail().await_attempted();
        self.worker.send(&ToWorker::ReadHole { at, is_forked }, &[layer.as_fd()])?;
        self.worker.wait(|mail| mail.attempted.take())
    }

    /// Closes what this process holds of the watch over its memory, too early.
    pub fn let_go_of_host_image(&self) {
        self.worker.release_host_image();
    }
}
