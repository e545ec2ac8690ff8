//! Tokens: claims, and the digest that only their holder can make.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use types::{Digest, Epoch, NodeId, Tenant};

use super::{LeaseKey, TOKEN_SIZE_MAX};

const MAC_SIZE: usize = 32;
/// Tells this use of the key from any other, and this layout from any later.
const LAYOUT: u8 = 1;

/// What a lease says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Claims {
    pub(super) lease: u64,
    pub(super) serial: u32,
    pub(super) tenant: Tenant,
    pub(super) image: Digest,
    pub(super) reader: NodeId,
    pub(super) epoch: Epoch,
    pub(super) expires: Duration,
}

impl Claims {
    /// The token: MAC, layout, claims.
    pub(super) fn sign(&self, key: &LeaseKey) -> Vec<u8> {
        let mut token = vec![0; MAC_SIZE];
        token.push(LAYOUT);
        let mut token = postcard::to_extend(self, token).expect("plain data");
        let (mac, signed) = token.split_at_mut(MAC_SIZE);
        mac.copy_from_slice(blake3::keyed_hash(&key.0, signed).as_bytes());
        debug_assert!(token.len() <= TOKEN_SIZE_MAX);
        token
    }

    /// The claims of a token that `key` has signed; of any that decodes, if there is none.
    pub(super) fn read(token: &[u8], key: Option<&LeaseKey>) -> Option<Self> {
        if token.len() > TOKEN_SIZE_MAX {
            return None;
        }
        let (mac, signed) = token.split_first_chunk::<MAC_SIZE>()?;
        // The comparison of blake3::Hash takes the same time whatever differs.
        if key.is_some_and(|key| blake3::keyed_hash(&key.0, signed) != blake3::Hash::from_bytes(*mac)) {
            return None;
        }
        let (&LAYOUT, claims) = signed.split_first()? else { return None };
        let (claims, rest) = postcard::take_from_bytes(claims).ok()?;
        rest.is_empty().then_some(claims)
    }
}
