//! Who may come in, and how much may wait for those who are in.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use types::NodeId;

use crate::endpoint::Limits;

/// What is shared by all connections of a server.
pub(crate) struct Admission {
    handshakes: Arc<Semaphore>,
    handshakes_most: usize,
    /// From so few free handshakes on, addresses must be proven.
    handshakes_scarce: usize,
    connections: Arc<Connections>,
    held_bytes: Arc<AtomicU64>,
}

struct Connections {
    most: usize,
    most_per_peer: usize,
    by_peer: Mutex<BTreeMap<NodeId, usize>>,
}

/// What becomes of a first packet.
pub(crate) enum Handshake {
    /// It goes on; the permit is held until it is done.
    Go(OwnedSemaphorePermit),
    /// The client proves its address first.
    Prove,
    /// It is not answered.
    Drop,
}

impl Admission {
    pub(crate) fn new(limits: &Limits) -> Self {
        let most = limits.handshakes as usize;
        Self {
            handshakes: Arc::new(Semaphore::new(most)),
            handshakes_most: most,
            handshakes_scarce: most.saturating_sub(limits.handshakes_unproven as usize),
            connections: Arc::new(Connections {
                most: limits.connections as usize,
                most_per_peer: limits.connections_per_peer as usize,
                by_peer: Mutex::default(),
            }),
            held_bytes: Arc::default(),
        }
    }

    pub(crate) fn handshake(&self, is_proven: bool) -> Handshake {
        let free = self.handshakes.available_permits();
        if !is_proven && free <= self.handshakes_scarce && free < self.handshakes_most {
            return Handshake::Prove;
        }
        Arc::clone(&self.handshakes).try_acquire_owned().map_or(Handshake::Drop, Handshake::Go)
    }

    /// A place for one more connection of this peer, unless there is none.
    pub(crate) fn connection(&self, peer: NodeId) -> Option<Place> {
        let mut by_peer = self.connections.by_peer.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = by_peer.values().sum();
        let of_peer = by_peer.get(&peer).copied().unwrap_or_default();
        if all >= self.connections.most || of_peer >= self.connections.most_per_peer {
            return None;
        }
        by_peer.insert(peer, of_peer + 1);
        Some(Place { connections: Arc::clone(&self.connections), peer })
    }

    pub(crate) fn connections(&self) -> u64 {
        self.connections.by_peer.lock().unwrap_or_else(PoisonError::into_inner).values().sum::<usize>() as u64
    }

    pub(crate) fn held_bytes(&self) -> u64 {
        self.held_bytes.load(Ordering::Relaxed)
    }

    /// A connection's budget for answers.
    pub(crate) fn budget(&self, limits: &Limits) -> Budget {
        let most = limits.answer_bytes_per_connection;
        Budget { free: Arc::new(Semaphore::new(most as usize)), most, held_bytes: Arc::clone(&self.held_bytes) }
    }
}

/// A connection's place among those that stand. Dropping it gives it to another.
pub(crate) struct Place {
    connections: Arc<Connections>,
    peer: NodeId,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut by_peer = self.connections.by_peer.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = by_peer.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                by_peer.remove(&self.peer);
            }
        }
    }
}

/// Bytes of answers that may stand in memory for one connection.
#[derive(Clone)]
pub(crate) struct Budget {
    free: Arc<Semaphore>,
    most: u32,
    held_bytes: Arc<AtomicU64>,
}

impl Budget {
    /// Waits until so many bytes may be fetched. More than the whole budget waits for all of it.
    pub(crate) async fn hold(&self, bytes: usize) -> Held {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(self.most);
        let permit = Arc::clone(&self.free).acquire_many_owned(bytes).await.expect("the semaphore is never closed");
        self.held_bytes.fetch_add(u64::from(bytes), Ordering::Relaxed);
        Held { _permit: permit, bytes, held_bytes: Arc::clone(&self.held_bytes) }
    }
}

/// Bytes of an answer until the peer has acknowledged them.
pub(crate) struct Held {
    _permit: OwnedSemaphorePermit,
    bytes: u32,
    held_bytes: Arc<AtomicU64>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.held_bytes.fetch_sub(u64::from(self.bytes), Ordering::Relaxed);
    }
}
