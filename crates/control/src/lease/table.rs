//! The leases that live, findable by number, and counted by reader and image.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use types::{Digest, Epoch, NodeId};

use super::GRACE;

/// See the module.
#[derive(Default)]
pub(super) struct Table {
    next: u64,
    rows: BTreeMap<u64, Row>,
    by_expiry: BTreeSet<(Duration, u64)>,
    by_reader: BTreeMap<NodeId, usize>,
    /// Without revoked ones: those hold nothing.
    by_image: BTreeMap<Digest, usize>,
}

pub(super) struct Row {
    reader: NodeId,
    image: Digest,
    expires: Duration,
    serial: u32,
    /// When the serial was renewed last.
    renewed: Option<Duration>,
    /// The least epoch that its tokens may have: more than any has, once it is revoked.
    pub(super) least_epoch: Epoch,
    is_revoked: bool,
}

impl Row {
    /// Whether a token with this serial is the newest, or the one before within its grace.
    pub(super) fn takes(&self, serial: u32, now: Duration) -> bool {
        let is_in_grace = self.renewed.is_some_and(|renewed| now < renewed.saturating_add(GRACE));
        serial == self.serial || (is_in_grace && serial.checked_add(1) == Some(self.serial))
    }
}

impl Table {
    pub(super) fn insert(&mut self, reader: NodeId, image: Digest, expires: Duration, epoch: Epoch) -> u64 {
        let lease = self.next;
        self.next += 1;
        let row = Row { reader, image, expires, serial: 0, renewed: None, least_epoch: epoch, is_revoked: false };
        self.rows.insert(lease, row);
        self.by_expiry.insert((expires, lease));
        *self.by_reader.entry(reader).or_default() += 1;
        *self.by_image.entry(image).or_default() += 1;
        lease
    }

    pub(super) fn get(&self, lease: u64) -> Option<&Row> {
        self.rows.get(&lease)
    }

    /// The new serial, if there is such a lease and it has one.
    pub(super) fn renew(&mut self, lease: u64, now: Duration, expires: Duration) -> Option<u32> {
        let row = self.rows.get_mut(&lease)?;
        row.serial = row.serial.checked_add(1)?;
        row.renewed = Some(now);
        self.by_expiry.remove(&(row.expires, lease));
        self.by_expiry.insert((expires, lease));
        row.expires = expires;
        Some(row.serial)
    }

    pub(super) fn remove(&mut self, lease: u64) {
        let Some(row) = self.rows.remove(&lease) else { return };
        self.by_expiry.remove(&(row.expires, lease));
        one_less(&mut self.by_reader, row.reader);
        if !row.is_revoked {
            one_less(&mut self.by_image, row.image);
        }
    }

    /// Revokes those of which `concerns` says so: tokens of before `epoch` are refused from now on.
    pub(super) fn revoke(&mut self, epoch: Epoch, concerns: impl Fn(NodeId, Digest) -> bool) {
        for row in self.rows.values_mut().filter(|row| !row.is_revoked && concerns(row.reader, row.image)) {
            row.least_epoch = epoch;
            row.is_revoked = true;
            one_less(&mut self.by_image, row.image);
        }
    }

    pub(super) fn expire(&mut self, now: Duration) {
        while let Some((expires, lease)) = self.by_expiry.first().copied().filter(|(expires, _)| *expires <= now) {
            debug_assert!(self.rows.get(&lease).is_some_and(|row| row.expires == expires));
            self.remove(lease);
        }
    }

    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    pub(super) fn of_reader(&self, reader: NodeId) -> usize {
        self.by_reader.get(&reader).copied().unwrap_or_default()
    }

    pub(super) fn of_image(&self, image: Digest) -> usize {
        self.by_image.get(&image).copied().unwrap_or_default()
    }
}

fn one_less<K: Ord>(counts: &mut BTreeMap<K, usize>, key: K) {
    if let Some(count) = counts.get_mut(&key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(&key);
        }
    }
}
