//! How a host image becomes an ordinary one.

use std::fs::File;
use std::io;
use std::time::Duration;

use types::manifest::{HASH_PAGE_DIGESTS, encode_hash_page};
use types::{Digest, ExtentIndex};

use super::{EXTENT_LEN, HostImage, Region, SettleError, digest_of_extent};
use crate::image::memfd;

/// How often a seal is tried that the kernel does not put on while a page is in use elsewhere.
const SEAL_ATTEMPTS: u32 = 200;

impl HostImage {
    /// Makes it an ordinary image, when everything is here: checks the root over what is in memory, and seals it. Takes time in
    /// proportion to the image; not for the pager's thread.
    ///
    /// # Errors
    /// [`SettleError`]; it goes on as it was, unless it was found poisoned.
    pub fn settle(&self) -> Result<(), SettleError> {
        for (number, region) in self.regions.iter().enumerate() {
            let digests = self.check_region(number, region)?;
            for (page, (digests, expected)) in
                digests.chunks(HASH_PAGE_DIGESTS as usize).zip(&self.head.regions[number].hash_pages).enumerate()
            {
                if Digest::of(&encode_hash_page(digests)) != *expected {
                    let detail = format!("hash page {page} of region {number} is not that of the image");
                    self.poison(detail.clone());
                    return Err(SettleError::Poisoned(detail));
                }
            }
        }
        let mut aliases = self.lock_aliases();
        if let Some(ended) = self.failed.get() {
            return Err(SettleError::Poisoned(ended.detail.clone()));
        }
        if let Some((region, extent)) = self.first_absent() {
            // Evicted meanwhile.
            return Err(SettleError::Absent { region, extent });
        }
        // Unmapped, or it could not be sealed.
        *aliases = None;
        drop(aliases);
        for region in &self.regions {
            seal_at_last(region.layer.memfd()).map_err(|source| SettleError::Step { step: "sealing the image", source })?;
        }
        self.regions.iter().for_each(|region| region.presence.settle());
        self.children().iter().for_each(|child| child.let_go());
        self.ring();
        Ok(())
    }

    /// Looks whether every page that is there was placed. To be called by whoever places them, now and then: what nobody has placed
    /// may be read by a child without any fault.
    pub fn check_pages(&self) {
        let aliases = self.lock_aliases();
        let is_wrong = |region: &&Region| {
            let placed = region.presence.page_count() * types::PAGE_SIZE;
            memfd::stored_bytes(region.layer.memfd()).is_ok_and(|there| there > placed)
        };
        let wrong = aliases.is_some() && self.regions.iter().any(|region| is_wrong(&region));
        drop(aliases);
        if wrong && self.failed.get().is_none() {
            self.poison("there are pages that were not placed".to_owned());
        }
    }

    fn check_region(&self, number: usize, region: &Region) -> Result<Vec<Digest>, SettleError> {
        let mut digests = vec![Digest::ZERO_CONTENT; region.extent_count()];
        let mut buffer = Box::new([0; EXTENT_LEN]);
        for extent in self.data_extents(number).flatten().map(ExtentIndex) {
            let read = region.layer.read_extent(extent, &mut buffer);
            if !read.map_err(|source| SettleError::Step { step: "reading the image", source })? {
                return Err(SettleError::Absent { region: number, extent });
            }
            let expected = self.digest_of(number, extent).ok_or(SettleError::Absent { region: number, extent })?;
            digests[extent.0 as usize] = digest_of_extent(&buffer[..], expected);
        }
        Ok(digests)
    }

    fn first_absent(&self) -> Option<(usize, ExtentIndex)> {
        let absent = |(number, region): (usize, &Region)| {
            let extent = self.data_extents(number).flatten().map(ExtentIndex).find(|extent| !region.presence.has(*extent));
            extent.map(|extent| (number, extent))
        };
        self.regions.iter().enumerate().find_map(absent)
    }
}

/// A page that was just in use elsewhere keeps the kernel from it for a moment.
fn seal_at_last(memfd: &File) -> io::Result<()> {
    let mut sealed = memfd::seal_for_mapping(memfd);
    for _ in 0..SEAL_ATTEMPTS {
        if sealed.is_ok() {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
        sealed = memfd::seal_for_mapping(memfd);
    }
    sealed
}
