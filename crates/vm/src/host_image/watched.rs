//! A child whose touches of absent memory are reported.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use types::{EXTENT_SIZE, ExtentIndex, HostAddress, MachineId};

use super::HostImage;
use crate::machine::Ended;
use crate::sys::uffd::Watch;

/// Whose process the child is.
pub(crate) trait Keeper: Send + Sync {
    /// Ends it.
    fn end(&self, ended: Ended);

    /// Nothing of its memory is absent, nor ever will be: has it close its descriptor, after which this one's is the last. That
    /// close lets go on whoever waits, and finds every page there.
    fn let_go(&self);
}

/// A child of a host image that is not settled. Its descriptor becomes readable when it touches what is absent.
///
/// The pager holds it until the child is gone, or all of its memory is there: closing the descriptor too early would let the child
/// see zeros.
pub struct Watched {
    machine: MachineId,
    watch: Watch,
    /// Where each region begins in the child, and its length.
    regions: Vec<(HostAddress, u64)>,
    host_image: Arc<HostImage>,
    faults: AtomicU64,
    keeper: Box<dyn Keeper>,
    was_let_go: AtomicBool,
    pagemap: Option<std::fs::File>,
}

impl Watched {
    /// A child that has registered its memory, at these addresses.
    pub(crate) fn new(
        machine: MachineId,
        watch: Watch,
        starts: &[HostAddress],
        host_image: Arc<HostImage>,
        pagemap: Option<std::fs::File>,
        keeper: Box<dyn Keeper>,
    ) -> Option<Self> {
        if starts.len() != host_image.head().regions.len() {
            return None;
        }
        let regions = starts.iter().copied().zip(host_image.head().regions.iter().map(types::RegionHead::size_bytes)).collect();
        Some(Self {
            machine,
            watch,
            regions,
            host_image,
            faults: AtomicU64::new(0),
            keeper,
            was_let_go: AtomicBool::new(false),
            pagemap,
        })
    }

    /// Who it is.
    #[must_use]
    pub fn machine(&self) -> MachineId {
        self.machine
    }

    /// What its memory rests on.
    #[must_use]
    pub fn host_image(&self) -> &Arc<HostImage> {
        &self.host_image
    }

    /// How often it has touched what was absent.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.faults.load(Ordering::Relaxed)
    }

    /// Calls `each` with region and extent of every touch that was not read yet, and says how many there were; the same extent
    /// may come several times. Does not wait. The child waits until [`Watched::wake`].
    ///
    /// # Errors
    /// If the kernel does not answer: the child cannot be served any more.
    pub fn read_faults(&self, mut each: impl FnMut(usize, ExtentIndex)) -> io::Result<usize> {
        let count = self.watch.read(|address| {
            for (number, (start, len)) in self.regions.iter().enumerate() {
                if let Some(offset) = address.0.checked_sub(start.0).map(|offset| offset as u64).filter(|offset| offset < len) {
                    each(number, ExtentIndex(u32::try_from(offset / EXTENT_SIZE).expect("at most 32 GiB")));
                    return;
                }
            }
        })?;
        self.faults.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }

    /// Lets go on whatever of it waits for a page of this extent; what is still absent is touched, and reported, again.
    pub fn wake(&self, region: usize, extent: ExtentIndex) {
        let start = self.regions[region].0;
        let at = HostAddress(start.0 + usize::try_from(extent.byte_offset()).expect("64-bit host"));
        // ESRCH: it is gone. Nothing else can be wrong with a range of its own.
        self.watch.wake(at, usize::try_from(EXTENT_SIZE).expect("64-bit host")).unwrap_or_default();
    }

    /// Ends it. It never runs again.
    pub fn end(&self, ended: Ended) {
        self.keeper.end(ended);
    }

    /// All of it is here: it is released soon.
    pub(super) fn let_go(&self) {
        // Once, though it may be born and settle in the same moment.
        if !self.was_let_go.swap(true, Ordering::AcqRel) {
            self.keeper.let_go();
        }
    }

    /// Its process is gone, but KVM may still be in a fault on its behalf, in a thread of the kernel's own that keeps its memory
    /// alive. Once the last descriptor is closed that fault would make a page of zeros for all to see; so it is refused first,
    /// and every other. Costs nothing where the memory has gone with the process.
    pub(super) fn refuse_absent(&self) -> io::Result<()> {
        let usize_of = |bytes| usize::try_from(bytes).expect("64-bit host");
        for (region, (start, _)) in self.regions.iter().enumerate() {
            for run in self.host_image.data_extents(region) {
                let [from, to] = [run.start, run.end].map(|extent| usize_of(ExtentIndex(extent).byte_offset()));
                if !self.watch.refuse(HostAddress(start.0 + from), to - from)? {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// The extents of each region in which it has pages of its own; `None` if the kernel does not say.
    pub(super) fn private_extents(&self) -> Option<Vec<Vec<std::ops::Range<u32>>>> {
        let pagemap = self.pagemap.as_ref()?;
        let of_region = |(start, len): &(HostAddress, u64)| {
            let mut extents = Vec::new();
            let each = |pages: std::ops::Range<u64>| {
                let extent = |page| types::PageIndex(page).extent().0;
                extents.push(extent(pages.start)..extent(pages.end - 1) + 1);
            };
            crate::sys::pagemap::scan_private(pagemap, *start, *len, each).ok()?;
            Some(extents)
        };
        self.regions.iter().map(of_region).collect()
    }
}

impl AsFd for Watched {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.watch.as_fd()
    }
}

impl fmt::Debug for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watched").field("machine", &self.machine).field("faults", &self.faults()).finish_non_exhaustive()
    }
}
