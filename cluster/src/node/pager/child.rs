//! A child's faults, as they come.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;

use pages::transfer::{ExtentId, Waiter};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use types::Reason;
use vm::Watched;

use super::fetch::Fetch;

/// What tokio waits for.
struct Faults(Arc<Watched>);

impl AsRawFd for Faults {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// Reads the faults of a child and has them answered, until the task is ended with the child.
pub(super) async fn serve(fetch: Rc<Fetch>, child: Arc<Watched>, waiter: Waiter) {
    let end = |error: std::io::Error| {
        let detail = format!("its faults cannot be read: {error}");
        child.end(vm::Ended { reason: Reason::PageSourceLost, detail });
    };
    #[expect(
        deprecated,
        reason = "its successors are unsafe, for those who close what they hand over: this one is open while it lives"
    )]
    let faults = AsyncFd::with_interest(Faults(Arc::clone(&child)), Interest::READABLE);
    let faults = match faults {
        Ok(faults) => faults,
        Err(error) => return end(error),
    };
    loop {
        let mut ready = match faults.readable().await {
            Ok(ready) => ready,
            Err(error) => return end(error),
        };
        let ready_at = fetch.shared.now();
        // Several vCPUs, or one that was woken for nothing, touch the same extent.
        let mut touched = BTreeSet::new();
        let read = child.read_faults(|region, extent| {
            let region = u8::try_from(region).expect("a head has at most 8 regions");
            touched.insert(ExtentId { region, extent });
        });
        match read {
            // Those that did not fit into one read are found at the next.
            Ok(0) => ready.clear_ready(),
            Ok(_) => {}
            Err(error) => return end(error),
        }
        drop(ready);
        let read_at = fetch.shared.now();
        for id in &touched {
            fetch.fault(waiter, &child, *id, (ready_at, read_at));
        }
        if !touched.is_empty() {
            fetch.pump();
        }
        // Others are to be served too, between two reads of a child that faults without end.
        tokio::task::yield_now().await;
    }
}
