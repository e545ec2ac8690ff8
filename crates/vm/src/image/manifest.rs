//! The manifest of an image in memory: hashed once, when somebody first asks for the image by its name everywhere.

use std::io;
use std::sync::{Arc, PoisonError};

use types::manifest::hash_page_digests;
use types::{Digest, ExtentIndex, ExtentMap, Head, LayerIndex, Manifest, RegionHead, Source};

use super::save::{SaveError, each_extent, is_zero};
use super::{Image, ImageRegion};
use crate::host_image::EXTENT_LEN;

/// What is known of an extent's content here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// All zeros.
    Zero,
    /// It was read.
    Data,
    /// It has not arrived yet.
    Absent,
}

impl Image {
    /// Its manifest, which gives it its digest. The first call takes time in proportion to the image's data, later ones none.
    ///
    /// # Errors
    /// [`SaveError`]; [`SaveError::Unsettled`] if the digests of what is absent have not arrived yet.
    pub fn manifest(&self, mut progress: impl FnMut(u64, u64)) -> Result<Arc<Manifest>, SaveError> {
        let mut manifest = self.manifest.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(manifest) = &*manifest {
            return Ok(Arc::clone(manifest));
        }
        let made = match &self.host_image {
            // It has one already, and not all of it need be here.
            Some(host_image) if self.digest() == Some(host_image.digest()) => self.arrived_manifest(host_image.head())?,
            _ => self.hash(&mut progress)?,
        };
        let digest = Digest::of(&made.head().encode()?);
        let known = *self.digest.get_or_init(|| digest);
        assert_eq!(known, digest, "an image has one digest");
        Ok(Arc::clone(manifest.insert(Arc::new(made))))
    }

    /// The manifest, if it has been made. Does not wait for who makes it.
    #[must_use]
    pub fn made_manifest(&self) -> Option<Arc<Manifest>> {
        self.manifest.try_lock().ok()?.clone()
    }

    /// Reads an extent of a region, if it is here.
    ///
    /// # Errors
    /// If its memory cannot be read.
    ///
    /// # Panics
    /// If there is no such region.
    pub fn read_extent(&self, region: usize, extent: ExtentIndex, buffer: &mut [u8; EXTENT_LEN]) -> io::Result<Content> {
        let region = &self.regions[region];
        match region.map.source_of(extent) {
            None | Some(Source::Zero) => Ok(Content::Zero),
            Some(Source::Layer(layer)) => match region.layers[usize::from(layer.0)].read_extent(extent, buffer)? {
                true if is_zero(&buffer[..]) => Ok(Content::Zero),
                true => Ok(Content::Data),
                false => Ok(Content::Absent),
            },
        }
    }

    fn arrived_manifest(&self, head: &Head) -> Result<Manifest, SaveError> {
        let all = |(number, region): (usize, &RegionHead)| {
            let extents = (0..region.map.extent_count()).map(ExtentIndex);
            extents.map(|extent| self.arrived_digest(number, extent)).collect::<Result<Vec<_>, _>>()
        };
        let digests: Result<Vec<_>, _> = head.regions.iter().enumerate().map(all).collect();
        Ok(Manifest::new(head.clone(), digests?)?)
    }

    /// The digest of an extent that has arrived, or will.
    fn arrived_digest(&self, region: usize, extent: ExtentIndex) -> Result<Digest, SaveError> {
        let host_image = self.host_image.as_ref().ok_or(SaveError::Unsettled)?;
        host_image.digest_of(region, extent).ok_or(SaveError::Unsettled)
    }

    fn hash(&self, progress: &mut impl FnMut(u64, u64)) -> Result<Manifest, SaveError> {
        let total: u64 = self.regions.iter().map(|region| u64::from(region.map.data_extent_count())).sum();
        let mut done = 0;
        let mut extent_digests = Vec::with_capacity(self.regions.len());
        let mut regions = Vec::with_capacity(self.regions.len());
        for (number, region) in self.regions.iter().enumerate() {
            let mut digests = vec![Digest::ZERO_CONTENT; region.map.extent_count() as usize];
            // Asked first: what arrives meanwhile is hashed too, to the same end.
            let arriving: Vec<_> = region.arriving_runs().flatten().collect();
            let hashed = each_extent(region, |extent, bytes| {
                if !is_zero(bytes) {
                    digests[extent.0 as usize] = Digest::of(bytes);
                }
                done += 1;
                progress(done, total);
                Ok(())
            });
            hashed.map_err(|source| SaveError::Memory { source })?;
            for extent in arriving {
                digests[extent as usize] = self.arrived_digest(number, ExtentIndex(extent))?;
            }
            let map = flat(region);
            regions.push(RegionHead { kind: region.kind, map, hash_pages: hash_page_digests(&digests) });
            extent_digests.push(digests);
        }
        let head = Head {
            cpu: self.cpu.clone(),
            vcpu_count: self.class.vcpu_count(),
            state: self.state.encode(),
            regions,
            identity_page: self.identity_page,
            working_set: self.working_set().to_vec(),
            parents: self.parents.clone(),
        };
        Ok(Manifest::new(head, extent_digests)?)
    }
}

/// In a manifest the layers are one.
fn flat(region: &ImageRegion) -> ExtentMap {
    let mut joined: Vec<(u32, Source)> = Vec::new();
    for run in region.map.runs() {
        let source = if run.source == Source::Zero { Source::Zero } else { Source::Layer(LayerIndex(0)) };
        match joined.last_mut() {
            Some(last) if last.1 == source => last.0 += run.count,
            _ => joined.push((run.count, source)),
        }
    }
    ExtentMap::from_lengths(joined).expect("fewer runs than a valid map had")
}
