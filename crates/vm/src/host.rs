//! What this host can do: opened once, shared by all machines.

use std::fs::File;
use std::io;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use types::{CpuProfile, Digest, MemorySize};

use crate::class::Class;
use crate::sys::kvm::from_errno;
use crate::sys::uffd::Device;

/// `/dev/kvm` and what was learned from it.
#[derive(Debug)]
pub struct Host {
    kvm: Option<Kvm>,
    /// `/proc/self/pagemap`, for the dirty pages of this process's machines.
    pub(crate) pagemap: File,
    /// `/dev/userfaultfd`, where there is one that this process may use.
    faults: Option<Device>,
    pub(crate) facts: HostFacts,
}

/// What was learned from `/dev/kvm`, once for all processes of a node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct HostFacts {
    pub(crate) cpuid: CpuId,
    pub(crate) msrs: Vec<u32>,
    pub(crate) cpu: CpuProfile,
    memory_bytes: u64,
    emulates_ring_0: bool,
}

/// Why this host cannot run machines.
#[derive(Debug, Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum HostError {
    #[error("there is no {path}")]
    Missing { path: &'static str },
    #[error("{path} may not be opened by this user")]
    Forbidden { path: &'static str },
    #[error("{path} cannot be opened: {source}")]
    Open { path: &'static str, source: io::Error },
    #[error("KVM lacks {capability}")]
    Lacks { capability: &'static str },
    #[error("KVM refused to say what it supports ({call}): {source}")]
    Query { call: &'static str, source: io::Error },
    #[error("this CPU's extended state needs {bytes} bytes; images hold 4096")]
    ExtendedState { bytes: i32 },
    #[error("memory and disk of {} MiB are more than the {host_bytes} bytes of memory that this host has", asked_bytes >> 20)]
    MemoryBeyondHost { asked_bytes: u64, host_bytes: u64 },
}

impl HostError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Missing { path: "/dev/kvm" } => {
                "load kvm_intel or kvm_amd, switch virtualization on in the firmware, or use a host with nested virtualization"
            }
            Self::Missing { .. } => "mount /proc",
            Self::Forbidden { path: "/dev/kvm" } => "join the group that owns it (usually kvm), or run as root",
            Self::Forbidden { .. } | Self::Open { .. } | Self::Query { .. } => "look for its cause in the kernel log",
            Self::Lacks { .. } => "use Linux 6.7 or newer with KVM's in-kernel interrupt controller",
            Self::ExtendedState { .. } => "use a host without AMX, or switch it off in the kernel (clearcpuid)",
            Self::MemoryBeyondHost { .. } => "ask for less, or use a larger host",
        }
    }
}

const REQUIRED: [(Cap, &str); 8] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::PitState2, "KVM_CAP_PIT_STATE2"),
];

/// KVM's paravirtual features of leaf 0x4000_0001 that hand pages to the guest asynchronously: bits 4, 10 and 14. They would
/// tell the guest about host page faults, which must stay invisible to a child whose pages are still on their way.
const ASYNC_PAGE_FAULTS: u32 = 1 << 4 | 1 << 10 | 1 << 14;
const KVM_FEATURES_LEAF: u32 = 0x4000_0001;
const KVM_TIMING_LEAF: u32 = 0x4000_0010;

/// Memory type range registers, which KVM keeps but does not list: variable ranges, fixed ranges, default type.
const MTRRS: [std::ops::RangeInclusive<u32>; 5] = [0x200..=0x20F, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26F, 0x2FF..=0x2FF];

const MSR_IA32_TSC: u32 = 0x10;
const MSR_IA32_TSC_DEADLINE: u32 = 0x6E0;

impl Host {
    /// Opens the devices and asks KVM what it supports. Makes and closes one small VM, to learn which MSRs can be restored.
    ///
    /// # Errors
    /// [`HostError`], each with its [remedy](HostError::remedy).
    pub fn open() -> Result<Self, HostError> {
        Self::open_at("/dev/kvm")
    }

    fn open_at(path: &'static str) -> Result<Self, HostError> {
        let kvm = Kvm::new_with_path(
            std::ffi::CString::new(path).map_err(|error| HostError::Open { path, source: io::Error::other(error) })?,
        )
        .map_err(|error| classify(path, from_errno(error)))?;
        for (capability, name) in REQUIRED {
            if !kvm.check_extension(capability) {
                return Err(HostError::Lacks { capability: name });
            }
        }
        let extended_state = kvm.check_extension_int(Cap::Xsave2);
        if extended_state > 4096 {
            return Err(HostError::ExtendedState { bytes: extended_state });
        }
        let query = |call| move |error| HostError::Query { call, source: from_errno(error) };
        let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(query("KVM_GET_SUPPORTED_CPUID"))?;
        for entry in cpuid.as_mut_slice().iter_mut().filter(|entry| entry.function == KVM_FEATURES_LEAF) {
            entry.eax &= !ASYNC_PAGE_FAULTS;
        }
        let scratch_vm = kvm.create_vm().map_err(query("KVM_CREATE_VM"))?;
        scratch_vm.create_irq_chip().map_err(query("KVM_CREATE_IRQCHIP"))?;
        let scratch = scratch_vm.create_vcpu(0).map_err(query("KVM_CREATE_VCPU"))?;
        scratch.set_cpuid2(&cpuid).map_err(query("KVM_SET_CPUID2"))?;
        let listed = kvm.get_msr_index_list().map_err(query("KVM_GET_MSR_INDEX_LIST"))?;
        let indexes: Vec<u32> = listed.as_slice().iter().copied().chain(MTRRS.into_iter().flatten()).collect();
        let msrs = restorable(&scratch, &indexes);
        let tsc_khz = scratch.get_tsc_khz().map_err(query("KVM_GET_TSC_KHZ"))?;
        // PVM runs guest kernels instruction by instruction; other KVMs run them.
        let emulates_ring_0 = std::path::Path::new("/sys/module/kvm_pvm").exists();
        let cpu = profile(&cpuid, tsc_khz, emulates_ring_0);
        let pagemap = File::open("/proc/self/pagemap").map_err(|error| classify("/proc/self/pagemap", error))?;
        let memory_bytes = total_memory();
        let faults = Device::open().ok();
        Ok(Self { kvm: Some(kvm), pagemap, faults, facts: HostFacts { cpuid, msrs, cpu, memory_bytes, emulates_ring_0 } })
    }

    /// A worker's: the node has opened the device and learned the facts, the worker's zygote has opened this pagemap.
    pub(crate) fn handed_down(kvm: Kvm, pagemap: File, faults: Option<Device>, facts: HostFacts) -> Self {
        Self { kvm: Some(kvm), pagemap, faults, facts }
    }

    /// The device. A worker closes it once it has its VM, and builds no other.
    pub(crate) fn kvm(&self) -> &Kvm {
        self.kvm.as_ref().expect("a worker builds one shell, before it closes the device")
    }

    /// Closes the device: no further VM can be made.
    pub(crate) fn close_device(&mut self) {
        self.kvm = None;
    }

    /// What watches memory that is still to come.
    pub(crate) fn faults(&self) -> Option<&Device> {
        self.faults.as_ref()
    }

    /// Whether children can run here before their memory has arrived.
    #[must_use]
    pub fn can_watch_memory(&self) -> bool {
        self.faults.is_some()
    }

    /// Closes that device: no further memory can be watched.
    pub(crate) fn close_faults(&mut self) {
        self.faults = None;
    }

    /// The CPU as guests of this host see it.
    #[must_use]
    pub fn cpu(&self) -> &CpuProfile {
        &self.facts.cpu
    }

    /// Whether its KVM emulates guest kernels, so that they need what [`crate::linux::base_command_line`] says for that.
    #[must_use]
    pub fn emulates_ring_0(&self) -> bool {
        self.facts.emulates_ring_0
    }

    /// All memory that the host has.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.facts.memory_bytes
    }

    /// Refuses more memory than the host has at all. (How much is free is the scheduler's question, not the engine's.)
    ///
    /// # Errors
    /// [`HostError::MemoryBeyondHost`].
    pub fn check_memory(&self, asked: MemorySize) -> Result<(), HostError> {
        self.check_bytes(asked.bytes())
    }

    /// The same for all that a machine of a class may write.
    ///
    /// # Errors
    /// [`HostError::MemoryBeyondHost`].
    pub fn check_class(&self, class: Class) -> Result<(), HostError> {
        self.check_bytes(class.region_bytes())
    }

    fn check_bytes(&self, asked_bytes: u64) -> Result<(), HostError> {
        let host_bytes = self.facts.memory_bytes;
        if asked_bytes <= host_bytes { Ok(()) } else { Err(HostError::MemoryBeyondHost { asked_bytes, host_bytes }) }
    }
}

fn classify(path: &'static str, source: io::Error) -> HostError {
    match source.kind() {
        io::ErrorKind::NotFound => HostError::Missing { path },
        io::ErrorKind::PermissionDenied => HostError::Forbidden { path },
        _ => HostError::Open { path, source },
    }
}

/// Memory that the host can give without swapping, by the kernel's own estimate.
///
/// # Errors
/// If the kernel does not say.
pub fn available_memory() -> io::Result<u64> {
    let info = std::fs::read_to_string("/proc/meminfo")?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")).and_then(|kib| kib.trim().parse::<u64>().ok());
    kib.map(|kib| kib << 10).ok_or_else(|| io::Error::other("/proc/meminfo does not say MemAvailable"))
}

fn total_memory() -> u64 {
    let info = rustix::system::sysinfo();
    // Both fields are u64 on this architecture and u32 on others.
    info.totalram * u64::from(info.mem_unit)
}

/// The MSRs that KVM both reads and takes back, in the order in which they are restored: the time stamp counter first, since
/// the deadline of its timer is measured against it, and that deadline last.
fn restorable(scratch: &VcpuFd, listed: &[u32]) -> Vec<u32> {
    let takes_back = |index: u32| {
        let Ok(mut one) = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }]) else {
            return false;
        };
        matches!(scratch.get_msrs(&mut one), Ok(1)) && matches!(scratch.set_msrs(&one), Ok(1))
    };
    let mut msrs: Vec<u32> = listed.iter().copied().filter(|index| takes_back(*index)).collect();
    msrs.sort_by_key(|index| match *index {
        MSR_IA32_TSC => (0, *index),
        MSR_IA32_TSC_DEADLINE => (2, *index),
        _ => (1, *index),
    });
    msrs.dedup();
    msrs
}

/// What differs between vCPUs (APIC ids), with the guest's own settings (the size of the enabled extended state) or from boot
/// to boot (measured rates) is left out of the digest.
fn profile(cpuid: &CpuId, tsc_khz: u32, emulates_ring_0: bool) -> CpuProfile {
    let mut hasher = Vec::with_capacity(cpuid.as_slice().len() * 28);
    for entry in cpuid.as_slice() {
        let (mut eax, mut ebx, ecx, mut edx) = (entry.eax, entry.ebx, entry.ecx, entry.edx);
        match entry.function {
            1 => ebx &= 0x0000_FFFF,
            0xB | 0x1F => (ebx, edx) = (0, 0),
            0xD => ebx = 0,
            0x15 | 0x16 | KVM_TIMING_LEAF => (eax, ebx, edx) = (0, 0, 0),
            _ => {}
        }
        for word in [entry.function, entry.index, entry.flags, eax, ebx, ecx, edx] {
            hasher.extend_from_slice(&word.to_le_bytes());
        }
    }
    if emulates_ring_0 {
        // A guest that was started for one kind of KVM has another command line, and sees other features, than for the other.
        hasher.extend_from_slice(b"ring 0 is emulated");
    }
    let leaf = |function| cpuid.as_slice().iter().find(|entry| entry.function == function && entry.index == 0);
    let vendor = leaf(0).map_or_else(String::new, |entry| {
        let bytes: Vec<u8> = [entry.ebx, entry.edx, entry.ecx].iter().flat_map(|word| word.to_le_bytes()).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    });
    let (family, model) = leaf(1).map_or((0, 0), |entry| display_family_and_model(entry.eax));
    CpuProfile { vendor, family, model, cpuid: Digest::of(&hasher), tsc_khz }
}

/// Intel SDM volume 2, CPUID leaf 1; AMD APM volume 3 says the same for families from 15 on.
fn display_family_and_model(signature: u32) -> (u16, u16) {
    let field = |shift: u32, mask: u32| u16::try_from(signature >> shift & mask).unwrap_or(u16::MAX);
    let (base_family, base_model) = (field(8, 0xF), field(4, 0xF));
    let family = if base_family == 0xF { base_family + field(20, 0xFF) } else { base_family };
    let extended = base_family == 0xF || base_family == 6;
    let model = if extended { field(16, 0xF) << 4 | base_model } else { base_model };
    (family, model)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_says_what_to_do() {
        let error = Host::open_at("/nonexistent/kvm").unwrap_err();
        assert!(matches!(error, HostError::Missing { .. }), "{error}");
        let error = HostError::Missing { path: "/dev/kvm" };
        assert_eq!(error.to_string(), "there is no /dev/kvm");
        assert!(error.remedy().contains("kvm_intel"));
    }

    #[test]
    fn a_device_that_is_not_kvm_is_refused() {
        let error = Host::open_at("/dev/null").unwrap_err();
        assert!(matches!(error, HostError::Lacks { .. }), "{error}");
        assert!(error.remedy().contains("Linux"));
    }

    #[test]
    fn errno_decides_between_missing_and_forbidden() {
        let forbidden = classify("/dev/kvm", io::Error::from_raw_os_error(libc::EACCES));
        assert!(matches!(forbidden, HostError::Forbidden { .. }));
        assert!(forbidden.remedy().contains("group"));
        let busy = classify("/dev/kvm", io::Error::from_raw_os_error(libc::EBUSY));
        assert!(matches!(busy, HostError::Open { .. }));
    }

    #[test]
    fn cpu_signatures_of_known_parts() {
        assert_eq!(display_family_and_model(0x000806F8), (6, 143)); // Sapphire Rapids
        assert_eq!(display_family_and_model(0x00A20F10), (25, 33)); // Zen 3
    }
}
