//! Giving memory back before a host image has settled.

use std::io;

use types::{EXTENT_SIZE, ExtentIndex};

use super::HostImage;
use crate::image::memfd;

impl HostImage {
    /// Gives the memory of extents back that can be fetched again, and in which no child has a page of its own. Says which: they
    /// are absent again.
    ///
    /// # Errors
    /// If the kernel does not take back even the first of them.
    pub fn evict(&self, region: usize, extents: &[u32]) -> io::Result<Vec<ExtentIndex>> {
        let aliases = self.lock_aliases();
        if aliases.is_none() || self.failed.get().is_some() {
            return Ok(Vec::new());
        }
        let mut private = Vec::new();
        for child in self.children() {
            match child.private_extents() {
                Some(mut regions) => private.append(&mut regions[region]),
                // Nobody knows.
                None => return Ok(Vec::new()),
            }
        }
        let of = &self.regions[region];
        let mut evicted = Vec::new();
        for extent in extents.iter().copied().map(ExtentIndex) {
            if !of.presence.has(extent) || private.iter().any(|range| range.contains(&extent.0)) {
                continue;
            }
            // In this order: a touch that comes in between finds the page, or is reported and finds it absent.
            of.presence.remove(extent);
            if let Err(error) = memfd::punch(of.layer.memfd(), extent.byte_offset(), EXTENT_SIZE) {
                // It is as it was.
                of.presence.add(extent, u16::MAX);
                return if evicted.is_empty() { Err(error) } else { Ok(evicted) };
            }
            evicted.push(extent);
        }
        drop(aliases);
        Ok(evicted)
    }
}
