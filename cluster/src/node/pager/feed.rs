//! How a host image reaches the pager's thread.

use std::ops::Range;
use std::sync::Arc;

use tokio::sync::mpsc::UnboundedSender;
use vm::{PageSource, Watched};

use super::{Key, Order};

/// See the module.
pub(super) struct Feed {
    pub(super) key: Key,
    pub(super) orders: UnboundedSender<Order>,
}

impl PageSource for Feed {
    fn watch(&self, child: Arc<Watched>) {
        self.orders.send(Order::Watch(child)).unwrap_or_default();
    }

    fn forget(&self, child: &Arc<Watched>) {
        self.orders.send(Order::Forget(Arc::clone(child))).unwrap_or_default();
    }

    fn want(&self, region: usize, extents: Range<u32>) {
        self.orders.send(Order::Want { key: self.key.clone(), region, extents }).unwrap_or_default();
    }
}
