//! Which pages of a slot are the machine's own: `PAGEMAP_SCAN` (Linux 6.7, Documentation/admin-guide/mm/pagemap.rst).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use types::{HostAddress, PAGE_SIZE};

const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;
/// `_IOWR('f', 16, struct pm_scan_arg)`
pub(crate) const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const REGIONS_PER_CALL: usize = 512;

/// `struct pm_scan_arg`
#[repr(C)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// Calls `each` with every range of pages (counted from `start`, ascending) of `bytes` from `start` on that the machine has
/// written: not FILE, PRESENT or SWAPPED, and not the shared zero page. Costs time in proportion to what is mapped, not to the
/// range's size. The pagemap is that of the process whose addresses these are.
pub(crate) fn scan_private(pagemap: &File, start: HostAddress, bytes: u64, each: impl FnMut(Range<u64>)) -> io::Result<()> {
    scan(pagemap, start, bytes, PAGE_IS_FILE | PAGE_IS_PFNZERO, each)
}

/// The same of every page that the machine has touched in any way, or that the kernel mapped beside one.
pub(crate) fn scan_touched(pagemap: &File, start: HostAddress, bytes: u64, each: impl FnMut(Range<u64>)) -> io::Result<()> {
    scan(pagemap, start, bytes, PAGE_IS_PFNZERO, each)
}

/// Pages that are PRESENT or SWAPPED, and none of `without`.
fn scan(pagemap: &File, start: HostAddress, bytes: u64, without: u64, mut each: impl FnMut(Range<u64>)) -> io::Result<()> {
    let start = start.0 as u64;
    let end = start + bytes;
    let mut regions = [PageRegion::default(); REGIONS_PER_CALL];
    let mut from = start;
    while from < end {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags: 0,
            start: from,
            end,
            walk_end: 0,
            vec: regions.as_mut_ptr() as u64,
            vec_len: REGIONS_PER_CALL as u64,
            max_pages: 0,
            category_inverted: without,
            category_mask: without,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask: PAGE_IS_PRESENT,
        };
        // SAFETY: the kernel reads `arg`, writes `walk_end` and at most `vec_len` entries of `regions`, all of which live here.
        let found = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
        let Ok(found) = usize::try_from(found) else {
            return Err(io::Error::last_os_error());
        };
        for region in &regions[..found] {
            each((region.start - start) / PAGE_SIZE..(region.end - start) / PAGE_SIZE);
        }
        assert!(arg.walk_end > from, "PAGEMAP_SCAN goes forward");
        from = arg.walk_end;
    }
    Ok(())
}
