//! Which extents a child touches before anything else: what its first instructions need, as far as registers and page tables of
//! the image tell. A reader that fetches these ahead spares its first child a fault for each, one after the other. Advice: what
//! is left out is fetched when it is touched.

use types::{ExtentIndex, PAGE_SIZE, PageIndex, RegionKind};

use super::{Image, ImageRegion};

/// Page table entries: present, and a page of more than 4 KiB.
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
/// The bits of an entry, and of CR3, that are an address.
const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;
const CR0_PAGING: u64 = 1 << 31;
const CR4_FIVE_LEVELS: u64 = 1 << 12;
const EFER_LONG_MODE: u64 = 1 << 10;
/// MSRs that name a page which KVM writes when they are restored: both clocks, old and new, and the steal time.
const PAGES_OF_KVM: [u32; 5] = [0x11, 0x12, 0x4B56_4D00, 0x4B56_4D01, 0x4B56_4D03];

impl Image {
    /// See the module. In the order in which they are touched; region and extent.
    #[must_use]
    pub fn first_touches(&self) -> Vec<(usize, ExtentIndex)> {
        let mut touched = Touched { image: self, extents: Vec::new() };
        if let Some(page) = self.identity_page {
            touched.physical(page.0);
        }
        for vcpu in &self.state.vcpus {
            for (_, value) in vcpu.msrs.iter().filter(|(index, value)| PAGES_OF_KVM.contains(index) && value & 1 == 1) {
                touched.physical(value & !(PAGE_SIZE - 1));
            }
            for address in vcpu.first_addresses() {
                touched.translated(vcpu.translation(), address);
            }
        }
        touched.extents
    }
}

/// How a vCPU translates addresses.
#[derive(Clone, Copy)]
pub(crate) enum Translation {
    /// Not at all.
    None,
    /// By four levels of tables, from this one on.
    FourLevels(u64),
    /// In another way, which is not followed here.
    Other,
}

impl Translation {
    pub(crate) fn of(cr0: u64, cr3: u64, cr4: u64, efer: u64) -> Self {
        match (cr0 & CR0_PAGING != 0, efer & EFER_LONG_MODE != 0, cr4 & CR4_FIVE_LEVELS != 0) {
            (false, ..) => Self::None,
            (true, true, false) => Self::FourLevels(cr3 & ADDRESS),
            _ => Self::Other,
        }
    }
}

struct Touched<'a> {
    image: &'a Image,
    extents: Vec<(usize, ExtentIndex)>,
}

impl Touched<'_> {
    fn physical(&mut self, address: u64) {
        if let Some((region, offset, _)) = self.place(address) {
            let extent = PageIndex(offset / PAGE_SIZE).extent();
            if !self.extents.contains(&(region, extent)) {
                self.extents.push((region, extent));
            }
        }
    }

    fn translated(&mut self, translation: Translation, address: u64) {
        let mut table = match translation {
            Translation::None => return self.physical(address),
            Translation::FourLevels(table) => table,
            Translation::Other => return,
        };
        for shift in [39, 30, 21, 12] {
            let entry_at = table + (address >> shift & 511) * 8;
            self.physical(entry_at);
            let Some(entry) = self.read(entry_at).filter(|entry| entry & PRESENT != 0) else { return };
            let is_leaf = shift == 12 || (entry & LARGE != 0 && shift < 39);
            if is_leaf {
                let within = (1 << shift) - 1;
                return self.physical((entry & ADDRESS & !within) | (address & within));
            }
            table = entry & ADDRESS;
        }
    }

    /// A word of the image, if it is here.
    fn read(&self, address: u64) -> Option<u64> {
        let (_, offset, region) = self.place(address)?;
        let mut bytes = [0; 8];
        region.read_at(offset, &mut bytes).then(|| u64::from_le_bytes(bytes))
    }

    fn place(&self, address: u64) -> Option<(usize, u64, &ImageRegion)> {
        self.image.regions.iter().enumerate().find_map(|(number, region)| {
            let RegionKind::Ram(start) = region.kind else { return None };
            let bytes = u64::from(region.map.extent_count()) * types::EXTENT_SIZE;
            let offset = address.checked_sub(start.0).filter(|offset| *offset < bytes)?;
            Some((number, offset, region))
        })
    }
}
