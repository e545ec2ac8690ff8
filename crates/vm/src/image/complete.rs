//! Completing a branch whose base may be absent in part: the worker has copied the pages that its guest had written, and the
//! node adds what else belongs to their extents, which it may have to wait for.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use thiserror::Error;
use types::extents::Overlay;
use types::{EXTENT_SIZE, ExtentIndex, ExtentMap, PAGE_SIZE, Source};

use super::{Image, ImageRegion, memfd};
use crate::host_image::{AwaitError, EXTENT_LEN};

/// Why a branch could not be completed.
#[derive(Debug, Error)]
pub(crate) enum CompleteError {
    #[error(transparent)]
    Absent(#[from] AwaitError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Completes the extents of which some pages are in `layers`, one for each region, from `base`. Returns the maps over the layers
/// of the base and the new ones, and how many extents the new ones hold.
pub(crate) fn complete(base: &Image, layers: &[File], deadline: Instant) -> Result<(Vec<ExtentMap>, u64), CompleteError> {
    let mut maps = Vec::with_capacity(layers.len());
    let mut copied = 0;
    for (number, (region, layer)) in base.regions().iter().zip(layers).enumerate() {
        let overlay = overlay(region, &memfd::data_extents(layer)?);
        for extent in overlay.copied.iter().cloned().flatten().map(ExtentIndex) {
            complete_extent(base, number, extent, layer, deadline)?;
            copied += 1;
        }
        maps.push(overlay.map);
    }
    Ok((maps, copied))
}

/// With what is merged only where all of it is here, since nobody knows for how long its holder lives; but where the map would
/// have too many runs.
fn overlay(region: &ImageRegion, touched: &[Range<u32>]) -> Overlay {
    let merged = region.map().overlay(touched, region.next_layer());
    let is_here = |extent: u32| match region.map().source_of(ExtentIndex(extent)) {
        Some(Source::Layer(layer)) => region.layers()[usize::from(layer.0)].has_all(extent..extent + 1),
        _ => true,
    };
    if merged.copied.iter().cloned().flatten().all(is_here) {
        return merged;
    }
    region.map().overlay_exactly(touched, region.next_layer()).unwrap_or(merged)
}

fn complete_extent(
    base: &Image,
    number: usize,
    extent: ExtentIndex,
    layer: &File,
    deadline: Instant,
) -> Result<(), CompleteError> {
    let region = &base.regions()[number];
    let bytes = extent.byte_offset()..extent.byte_offset() + EXTENT_SIZE;
    let holes = memfd::holes(layer, bytes.clone())?;
    let mut content = Box::new([0; EXTENT_LEN]);
    if let (Some(Source::Layer(of)), false) = (region.map().source_of(extent), holes.is_empty()) {
        let of = &region.layers()[usize::from(of.0)];
        while !of.read_extent(extent, &mut content)? {
            // Only a host image's own layer can lack anything.
            let host_image = base.unsettled().ok_or_else(|| io::Error::other("an extent of a complete image is absent"))?;
            host_image.wait_for(number, extent, deadline)?;
        }
        for hole in holes {
            let offset = |at: u64| usize::try_from(at - bytes.start).expect("within an extent");
            assert!(hole.start % PAGE_SIZE == 0 && hole.end % PAGE_SIZE == 0, "memory comes in whole pages");
            layer.write_all_at(&content[offset(hole.start)..offset(hole.end)], hole.start)?;
        }
        return Ok(());
    }
    Ok(memfd::fill_holes(layer, bytes)?)
}
