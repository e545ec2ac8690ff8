//! What a node's key has signed beside connections: whoever reads it knows that the node said so, also when it is somebody else
//! by now.

use rustls::SignatureScheme;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::identity::{Certificate, Identity, IdentityError, provider};

/// What nodes' keys are: ECDSA over P-256, of a SHA-256 digest, in ASN.1.
const SCHEME: SignatureScheme = SignatureScheme::ECDSA_NISTP256_SHA256;
/// Of a key that nodes do not have.
pub(crate) const OTHER_KIND: &str = "it is not of the kind that nodes have (ECDSA P-256)";

impl Identity {
    /// Signs a message. TLS signs with the same key: the message has to begin with what it is for, as TLS's do.
    ///
    /// # Errors
    /// [`IdentityError`] if the key is of another kind than nodes have.
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, IdentityError> {
        let bad = |why: String| IdentityError::Key { why };
        let signer = self.shown().now().key.choose_scheme(&[SCHEME]).ok_or_else(|| bad(OTHER_KIND.to_owned()))?;
        signer.sign(message).map_err(|error| bad(error.to_string()))
    }
}

impl Certificate {
    /// Whether who has its key has signed this message.
    #[must_use]
    pub fn has_signed(&self, message: &[u8], signature: &[u8]) -> bool {
        let known = provider().signature_verification_algorithms.mapping;
        let algorithm = known.iter().find(|(scheme, _)| *scheme == SCHEME).and_then(|(_, algorithms)| algorithms.first());
        let (Some(algorithm), Some(point)) = (algorithm, self.point()) else { return false };
        algorithm.verify_signature(&point, message, signature).is_ok()
    }

    /// Its key, if that is of the kind that nodes draw: an uncompressed point of P-256.
    pub(crate) fn point(&self) -> Option<Vec<u8>> {
        let (_, parsed) = X509Certificate::from_der(self.der()).ok()?;
        let key = parsed.public_key().subject_public_key.data.to_vec();
        (key.len() == 65 && key[0] == 4).then_some(key)
    }
}

#[cfg(test)]
mod tests {
    use types::NodeId;
    use uuid::Uuid;

    use super::*;
    use crate::Role;

    #[test]
    fn a_signature_is_of_one_key_and_one_message() {
        let [one, other] = [(); 2].map(|()| Identity::generate(NodeId::from_uuid(Uuid::now_v7()), Role::Voter).unwrap());
        let signature = one.sign(b"a message").unwrap();
        assert!(one.certificate().has_signed(b"a message", &signature));
        assert!(!one.certificate().has_signed(b"a massage", &signature));
        assert!(!other.certificate().has_signed(b"a message", &signature));
        for at in 0..signature.len() {
            let mut changed = signature.clone();
            changed[at] ^= 1;
            assert!(!one.certificate().has_signed(b"a message", &changed), "byte {at}");
            assert!(!one.certificate().has_signed(b"a message", &signature[..at]), "cut at {at}");
        }
    }
}
