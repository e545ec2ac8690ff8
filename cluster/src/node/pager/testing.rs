//! What tests do to a node's pager.

use std::sync::OnceLock;

use tokio::sync::mpsc::UnboundedSender;

use super::Order;

pub(super) static FIRST: OnceLock<UnboundedSender<Order>> = OnceLock::new();

/// Has this process's pager panic, or a task of each fetch.
pub(crate) fn panic(of_task: bool) {
    if let Some(pager) = FIRST.get() {
        pager.send(Order::Panic { of_task }).unwrap_or_default();
    }
}
