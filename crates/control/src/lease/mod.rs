//! Read leases: a node's right to read an image's extents from the node that holds it.
//!
//! ```text
//!            grant                renew                   renew
//! (nothing) ───────> serial 0 ───────────> serial 1 ───────────> serial 2 ...     the newest serial is current;
//!                        │     good for 5 s   │                                   the one before it is good for what
//!                        v     more, then     v                                   was under way, for GRACE
//!                        └──── a replay ──────┘
//! current ── 60 s ──> expired          current ── release ──> a replay           current ── revoke ──> revoked
//! ```
//!
//! The holder signs what it grants and keeps a table of it. A token is opaque to everybody else: the claims in postcard, behind
//! their keyed BLAKE3 digest, under a key that is drawn when the node starts, so that nothing of before the start is good.
//! Times are the holder's monotonic clock, passed in as a `Duration` since any fixed start.
//!
//! Each check refuses by itself. They stand in such an order that an abuse is met by its own check before any other could see
//! it, which the tests hold by leaving single ones out.

mod table;
mod token;

use std::ops::Range;
use std::time::Duration;

use thiserror::Error;
use types::{Digest, Epoch, NodeId, Tenant};

use table::Table;
use token::Claims;

/// How long a lease lasts from when it was granted or renewed.
pub const TERM: Duration = Duration::from_secs(60);
/// When its reader renews it.
pub const RENEW_AFTER: Duration = Duration::from_secs(20);
/// How long the token before a renewal stays good, for requests that were under way.
pub const GRACE: Duration = Duration::from_secs(5);
/// The most bytes of a token.
pub const TOKEN_SIZE_MAX: usize = 512;

/// The holder's key: 32 random bytes, drawn anew at each start of the node and kept nowhere.
pub struct LeaseKey([u8; 32]);

impl LeaseKey {
    /// Wraps 32 bytes that the caller has drawn.
    #[must_use]
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

/// The most leases there may be at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Of one reader; 4,096: one for each image that it has open.
    pub per_reader: usize,
    /// Of all; 65,536, some 20 MiB of table.
    pub in_all: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { per_reader: 4096, in_all: 65_536 }
    }
}

/// A lease as its reader gets it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Granted {
    /// At most [`TOKEN_SIZE_MAX`] bytes.
    pub token: Vec<u8>,
    /// How long it lasts from now.
    pub lasts: Duration,
}

/// What is asked for with a lease.
#[derive(Clone, Debug)]
pub struct Ask<'a> {
    /// Who asks, as its certificate has proven.
    pub reader: NodeId,
    /// Of which image.
    pub image: Digest,
    /// Whose image that is here: several tenants may have the same.
    pub tenants: &'a [Tenant],
    /// The number of extents of each of its regions.
    pub regions: &'a [u32],
    /// Which extents of which region, if any.
    pub extents: Option<(u8, Range<u32>)>,
}

/// One check of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Check {
    /// There is a token.
    Present,
    /// This holder signed it since it started.
    Signed,
    /// It is the asking node's.
    Node,
    /// It is for this image.
    Image,
    /// It is for a tenant whose image this is.
    Tenant,
    /// Its term is not over.
    Term,
    /// It was neither renewed nor given back since.
    Serial,
    /// It was not taken back.
    Epoch,
    /// What is asked for is within the image.
    Range,
}

impl Check {
    /// All of them, in the order in which they are made.
    pub const ALL: [Self; 9] = [
        Self::Present,
        Self::Signed,
        Self::Node,
        Self::Image,
        Self::Tenant,
        Self::Term,
        Self::Serial,
        Self::Epoch,
        Self::Range,
    ];

    const fn bit(self) -> u16 {
        1 << self as u16
    }
}

/// The leases that a holder has granted.
pub struct Leases {
    key: LeaseKey,
    limits: Limits,
    epoch: Epoch,
    table: Table,
    left_out: u16,
}

impl Leases {
    /// No lease, with a key that is used nowhere else.
    #[must_use]
    pub fn new(key: LeaseKey, limits: Limits) -> Self {
        Self { key, limits, epoch: Epoch::default(), table: Table::default(), left_out: 0 }
    }

    /// Leaves a check out, for the test that it is needed.
    #[cfg(feature = "testing")]
    #[must_use]
    pub fn without(mut self, check: Check) -> Self {
        self.left_out |= check.bit();
        self
    }

    /// Grants a reader a lease. That it may read this tenant's images, and that this is one of them, is for the caller to know.
    ///
    /// # Errors
    /// [`LeaseRefusal::TooMany`].
    pub fn grant(&mut self, now: Duration, reader: NodeId, tenant: Tenant, image: Digest) -> Result<Granted, LeaseRefusal> {
        if self.room_for(reader).is_err() {
            self.expire(now);
            self.room_for(reader)?;
        }
        let expires = now.saturating_add(TERM);
        let lease = self.table.insert(reader, image, expires, self.epoch);
        let claims = Claims { lease, serial: 0, tenant, image, reader, epoch: self.epoch, expires };
        Ok(Granted { token: claims.sign(&self.key), lasts: TERM })
    }

    /// Lets a lease last for a new term, under a new token. The old one stays good for [`GRACE`].
    ///
    /// # Errors
    /// [`LeaseRefusal`].
    pub fn renew(&mut self, now: Duration, token: &[u8], reader: NodeId) -> Result<Granted, LeaseRefusal> {
        // No lease, and no check that there is one: there is nothing to renew.
        let Some(claims) = self.own(now, token, reader)? else { return Ok(Granted { token: Vec::new(), lasts: TERM }) };
        let expires = now.saturating_add(TERM);
        let serial = self.table.renew(claims.lease, now, expires).ok_or(LeaseRefusal::Replayed)?;
        let claims = Claims { serial, expires, epoch: self.epoch, ..claims };
        Ok(Granted { token: claims.sign(&self.key), lasts: TERM })
    }

    /// Takes a lease back from its reader.
    ///
    /// # Errors
    /// [`LeaseRefusal`].
    pub fn release(&mut self, now: Duration, token: &[u8], reader: NodeId) -> Result<(), LeaseRefusal> {
        if let Some(claims) = self.own(now, token, reader)? {
            self.table.remove(claims.lease);
        }
        Ok(())
    }

    /// Takes every lease of a node back, and begins a new epoch.
    pub fn revoke_node(&mut self, node: NodeId) -> Epoch {
        self.epoch.0 += 1;
        self.table.revoke(self.epoch, |reader, _| reader == node);
        self.epoch
    }

    /// Takes every lease of an image back, and begins a new epoch.
    pub fn revoke_image(&mut self, image: Digest) -> Epoch {
        self.epoch.0 += 1;
        self.table.revoke(self.epoch, |_, of| of == image);
        self.epoch
    }

    /// Whether a token gives what is asked for. Returns for which tenant it was granted; none for no token, where that is let
    /// through.
    ///
    /// # Errors
    /// [`LeaseRefusal`] says by which check it does not.
    pub fn check(&self, now: Duration, token: &[u8], ask: &Ask<'_>) -> Result<Option<Tenant>, LeaseRefusal> {
        let Some(claims) = self.read(token)? else { return Ok(None) };
        self.refuse(Check::Node, claims.reader != ask.reader, LeaseRefusal::OtherNode)?;
        self.refuse(Check::Image, claims.image != ask.image, LeaseRefusal::OtherImage)?;
        self.refuse(Check::Tenant, !ask.tenants.contains(&claims.tenant), LeaseRefusal::OtherTenant)?;
        self.is_live(now, &claims)?;
        self.refuse(Check::Range, !is_within(ask), LeaseRefusal::OutOfRange)?;
        Ok(Some(claims.tenant))
    }

    /// Forgets leases whose term is over. Their tokens stay refused, by their own dates.
    pub fn expire(&mut self, now: Duration) {
        if self.makes(Check::Term) {
            self.table.expire(now);
        }
    }

    /// Whether a lease on an image lives, so that its holder must keep it. Call [`Leases::expire`] before.
    #[must_use]
    pub fn holds_on(&self, image: Digest) -> bool {
        self.table.of_image(image) > 0
    }

    /// The number of leases that live, revoked ones included until their term is over.
    #[must_use]
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn room_for(&self, reader: NodeId) -> Result<(), LeaseRefusal> {
        let Limits { per_reader, in_all } = self.limits;
        if self.table.of_reader(reader) >= per_reader {
            Err(LeaseRefusal::TooMany { most: per_reader })
        } else if self.table.len() >= in_all {
            Err(LeaseRefusal::TooMany { most: in_all })
        } else {
            Ok(())
        }
    }

    /// The checks for what is asked about a lease itself.
    fn own(&self, now: Duration, token: &[u8], reader: NodeId) -> Result<Option<Claims>, LeaseRefusal> {
        let Some(claims) = self.read(token)? else { return Ok(None) };
        self.refuse(Check::Node, claims.reader != reader, LeaseRefusal::OtherNode)?;
        self.is_live(now, &claims)?;
        Ok(Some(claims))
    }

    /// The claims of a token, or `None` for no token where that is let through.
    fn read(&self, token: &[u8]) -> Result<Option<Claims>, LeaseRefusal> {
        if token.is_empty() {
            return self.refuse(Check::Present, true, LeaseRefusal::NoLease).map(|()| None);
        }
        Claims::read(token, self.makes(Check::Signed).then_some(&self.key)).map(Some).ok_or(LeaseRefusal::Forged)
    }

    fn is_live(&self, now: Duration, claims: &Claims) -> Result<(), LeaseRefusal> {
        self.refuse(Check::Term, now >= claims.expires, LeaseRefusal::Expired)?;
        let row = self.table.get(claims.lease);
        let is_newest = row.is_some_and(|row| row.takes(claims.serial, now));
        self.refuse(Check::Serial, !is_newest, LeaseRefusal::Replayed)?;
        let is_revoked = row.is_some_and(|row| claims.epoch < row.least_epoch);
        self.refuse(Check::Epoch, is_revoked, LeaseRefusal::Revoked)
    }

    fn makes(&self, check: Check) -> bool {
        self.left_out & check.bit() == 0
    }

    fn refuse(&self, check: Check, is_wrong: bool, refusal: LeaseRefusal) -> Result<(), LeaseRefusal> {
        if is_wrong && self.makes(check) { Err(refusal) } else { Ok(()) }
    }
}

fn is_within(ask: &Ask<'_>) -> bool {
    let Some((region, extents)) = &ask.extents else { return true };
    let count = ask.regions.get(usize::from(*region)).copied().unwrap_or_default();
    extents.start < extents.end && extents.end <= count
}

/// Why a lease does not give what is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum LeaseRefusal {
    /// No token.
    #[error("a read lease is missing")]
    NoLease,
    /// A token that this holder has not signed since it started.
    #[error("the read lease was not signed by this node since it started")]
    Forged,
    /// The term is over.
    #[error("the read lease has expired")]
    Expired,
    /// Of another node.
    #[error("the read lease is another node's")]
    OtherNode,
    /// Of another tenant.
    #[error("the read lease is for another tenant's image")]
    OtherTenant,
    /// Of another image.
    #[error("the read lease is for another image")]
    OtherImage,
    /// Renewed or given back since.
    #[error("the read lease was renewed or given back since")]
    Replayed,
    /// Taken back.
    #[error("the read lease was taken back")]
    Revoked,
    /// Beyond the image.
    #[error("what is asked for lies beyond the image")]
    OutOfRange,
    /// No further lease.
    #[error("there are {most} read leases already, which is the most")]
    TooMany {
        /// Of this reader or in all.
        most: usize,
    },
}

impl LeaseRefusal {
    /// What to do about it, in one line.
    #[must_use]
    pub const fn remedy(self) -> &'static str {
        match self {
            Self::NoLease | Self::Forged | Self::Expired | Self::OtherNode | Self::OtherImage | Self::Replayed => {
                "open the image anew"
            }
            Self::OtherTenant => "ask as the tenant whose image it is",
            Self::Revoked => "ask whoever revoked it",
            Self::OutOfRange => "update farfork on both nodes to one version",
            Self::TooMany { .. } => "give leases back, or wait a minute for old ones to expire",
        }
    }
}
