//! What a cluster has this node do, and asks of it.

use std::collections::HashMap;
use std::net::SocketAddr;

use control::state::ImageKey;
use types::{CpuProfile, Digest, FullName, ImageId, MachineId, Tenant};
use uuid::Uuid;

use super::{ForkFrom, ForkOrder, ImageView, Service};
use crate::node::engine::OpenOrder;
use crate::node::error::NodeError;
use crate::node::registry::{Image, Origin};

/// A machine without a limit is expected to write so much of its image's size, and no less than the least.
const DIRTY_SHARE: u64 = 4;
const DIRTY_LEAST: u64 = 1 << 20;

/// How much memory of its own a child of an image of this size is expected to need, in bytes.
#[must_use]
pub fn expected_dirty(image_bytes: u64) -> u64 {
    (image_bytes / DIRTY_SHARE).max(DIRTY_LEAST)
}

/// An image in this node's memory, as a cluster knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldImage {
    /// On this node.
    pub id: ImageId,
    /// Everywhere.
    pub key: ImageKey,
    /// How much of it is here.
    pub percent: u8,
    /// Its memory in bytes that is not zero.
    pub data_bytes: u64,
}

impl Service {
    /// Images in memory that have been hashed.
    ///
    /// # Errors
    /// [`NodeError`] if what of one is here cannot be told.
    pub fn held_images(&self) -> Result<Vec<HeldImage>, NodeError> {
        let images = self.registry.images().into_iter();
        let hashed = images.filter_map(|image| Some((image.facts.id, image.facts.tenant, image.facts.digest?)));
        let held = hashed.map(|(id, tenant, digest)| self.held(id, &tenant, digest));
        Ok(held.collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect())
    }

    /// `None`: it has failed, and is as good as not there.
    fn held(&self, id: ImageId, tenant: &Tenant, digest: Digest) -> Result<Option<HeldImage>, NodeError> {
        let residency = self.engine.residency(id)?;
        let key = ImageKey { tenant: tenant.clone(), digest };
        let is_good = residency.failed.is_none();
        Ok(is_good.then(|| HeldImage { id, key, percent: residency.settled_percent(), data_bytes: residency.data_bytes }))
    }

    /// The image that a cluster knows by this.
    ///
    /// # Errors
    /// [`NodeError::UnknownImage`].
    pub fn image_of_key(&self, key: &ImageKey) -> Result<ImageView, NodeError> {
        let is_it = |image: &Image| image.facts.tenant == key.tenant && image.facts.digest == Some(key.digest);
        let image = self.registry.images().into_iter().find(is_it);
        image.map(|image| self.view(image)).ok_or_else(|| NodeError::UnknownImage { id: key.digest.to_string() })
    }

    /// A machine runs this task of a job.
    pub fn runs_task(&self, machine: MachineId, job: Uuid, task: u32) {
        self.registry.runs_task(machine, job, task);
    }

    /// An image in memory by its id, digest or name, with its digest.
    ///
    /// # Errors
    /// [`NodeError`] if there is none, or it cannot be hashed.
    pub fn hashed_image(&self, given: &str) -> Result<HeldImage, NodeError> {
        let facts = self.hashed(given)?.image.facts;
        let digest = facts.digest.ok_or_else(|| NodeError::UnknownImage { id: given.to_owned() })?;
        self.held(facts.id, &facts.tenant, digest)?.ok_or_else(|| NodeError::UnknownImage { id: given.to_owned() })
    }

    /// The image that a template points at, with its digest.
    ///
    /// # Errors
    /// [`NodeError`] if there is none, or it cannot be hashed.
    pub fn template_held(&self, name: &FullName) -> Result<HeldImage, NodeError> {
        self.hashed_image(&self.template_image(name)?.facts.id.to_string())
    }

    /// The image of this name in the store, if it is that one: it is loaded if need be.
    ///
    /// # Errors
    /// [`NodeError`] if the store cannot be read.
    pub fn stored_image(&self, name: &FullName, key: &ImageKey) -> Result<Option<HeldImage>, NodeError> {
        if !self.engine.stored()?.iter().any(|(stored, _)| stored == name) {
            return Ok(None);
        }
        let held = self.template_held(name)?;
        Ok((held.key == *key).then_some(held))
    }

    /// Opens an image that others hold.
    ///
    /// # Errors
    /// [`NodeError`]; nothing is left behind.
    pub fn open_image(&self, tenant: &Tenant, image: Digest, holders: Vec<SocketAddr>) -> Result<ImageId, NodeError> {
        let open = OpenOrder { image, tenant: tenant.clone(), holders };
        Ok(self.note_image(self.engine.open(&open)?, Origin::Remote, None).facts.id)
    }

    /// Forgets an image. Its children go on, and a file of it stays.
    ///
    /// # Errors
    /// [`NodeError`]; it is still there.
    pub fn let_go(&self, id: ImageId) -> Result<(), NodeError> {
        self.forget_image(id)
    }

    /// Images in memory, and how many machines of each run.
    #[must_use]
    pub fn images_and_running(&self) -> (Vec<ImageView>, HashMap<ImageId, u64>) {
        let images = self.registry.images().into_iter().map(|image| self.view(image)).collect();
        (images, self.registry.running_by_image())
    }

    /// How many machines run, and how much memory of their own they are counted as.
    #[must_use]
    pub fn taken(&self) -> (u64, u64) {
        self.registry.taken()
    }

    /// How much memory of its own, in bytes, each child of a fork is counted as.
    #[must_use]
    pub fn claim_of(&self, order: &ForkOrder) -> u64 {
        let tenant = order.tenant.as_ref();
        let of_image = |given: &str| self.image_of(given, tenant).map_or(0, |image| self.image_bytes(&image));
        let image_bytes = match &order.from {
            ForkFrom::Guest(_, class) => class.memory().bytes(),
            ForkFrom::Image(given) => of_image(given),
            ForkFrom::Machine(given) => self.registry.machine(given).map_or(0, |machine| of_image(&machine.image.to_string())),
            ForkFrom::Template(name) => self.named_image(name).map_or(0, |image| self.image_bytes(&image)),
            ForkFrom::Remote { image, .. } => of_image(&image.to_string()),
        };
        order.limit_bytes.unwrap_or_else(|| expected_dirty(image_bytes))
    }

    /// Memory of an image in bytes that is not zero, wherever it is.
    pub(super) fn image_bytes(&self, image: &Image) -> u64 {
        match image.origin {
            Origin::Remote => self.engine.data_bytes(image.facts.id).unwrap_or(0),
            _ => image.facts.stored_bytes,
        }
    }

    /// Ends every machine.
    ///
    /// # Errors
    /// [`NodeError`] of the first one that could not be ended, if none could.
    pub fn kill_all(&self) -> Result<(), NodeError> {
        self.kill(&[], true, None).map(drop)
    }

    /// The CPU that guests see here.
    #[must_use]
    pub fn cpu(&self) -> CpuProfile {
        self.engine.cpu()
    }
}
