//! Registers and devices: captured from a machine at rest, restored into a shell.
//!
//! The order of restoring is Firecracker's (`src/vmm/src/arch/x86_64/vcpu.rs`, the best public reference); why each step stands
//! where it does is said beside it.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, kvm_clock_data, kvm_debugregs, kvm_irqchip,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::frame::Core;
use crate::class::Devices;
use crate::device::{BadDeviceState, SavedDevice};
use crate::host::Host;
use crate::image::first::Translation;
use crate::sys::kvm::set_xsave;

/// The version that [`MachineState::encode`] writes.
const VERSION: u16 = 1;
const MSR_IA32_TSC: u32 = 0x10;
const MSR_IA32_TSC_DEADLINE: u32 = 0x6E0;

/// Everything of a machine but its memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MachineState {
    pub(crate) tsc_khz: u32,
    pub(crate) vcpus: Vec<VcpuState>,
    pit: kvm_pit_state2,
    /// The guest's clock in nanoseconds. It goes on from here in every child, however long the image has slept.
    clock_ns: u64,
    irqchips: Vec<kvm_irqchip>,
    devices: Vec<SavedDevice>,
}

/// One vCPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct VcpuState {
    mp_state: kvm_mp_state,
    pub(crate) regs: kvm_regs,
    sregs: kvm_sregs,
    /// The XSAVE area, less the zeros at its end.
    xsave: Vec<u8>,
    /// Extended control registers: number and value.
    xcrs: Vec<(u32, u64)>,
    debug_regs: kvm_debugregs,
    /// The registers of the local APIC, of which each stands at the start of 16 bytes.
    lapic: Vec<u32>,
    pub(crate) msrs: Vec<(u32, u64)>,
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// How it translates addresses.
    pub(crate) fn translation(&self) -> Translation {
        Translation::of(self.sregs.cr0, self.sregs.cr3, self.sregs.cr4, self.sregs.efer)
    }

    /// The linear addresses of its next instruction, its stack, and the tables that a CPU looks into by itself.
    pub(crate) fn first_addresses(&self) -> [u64; 5] {
        let sregs = &self.sregs;
        [self.regs.rip, self.regs.rsp, sregs.gdt.base, sregs.idt.base, sregs.tr.base]
    }
}

impl VcpuState {
    /// Whether the guest has told KVM where to keep its clock: bit 0 of either MSR for that.
    fn has_kvmclock(&self) -> bool {
        self.msrs.iter().any(|(index, value)| CLOCK_MSRS.contains(index) && value & 1 == 1)
    }
}

/// MSR_KVM_SYSTEM_TIME and its newer number.
const CLOCK_MSRS: [u32; 2] = [0x12, 0x4B56_4D01];

/// The sizes of the kernel's structures. Their serialization pads and truncates silently, so a state from a build with other
/// sizes is refused by this list.
type Sizes = [usize; 10];

const SIZES: Sizes = [
    size_of::<kvm_mp_state>(),
    size_of::<kvm_regs>(),
    size_of::<kvm_sregs>(),
    size_of::<kvm_xcrs>(),
    size_of::<kvm_debugregs>(),
    size_of::<kvm_lapic_state>(),
    size_of::<kvm_vcpu_events>(),
    size_of::<kvm_pit_state2>(),
    size_of::<kvm_irqchip>(),
    size_of::<kvm_xsave>(),
];

/// Why state could not be captured, read or restored.
#[derive(Debug, Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum StateError {
    #[error("{call} failed: {source}")]
    Kvm { call: &'static str, source: kvm_ioctls::Error },
    #[error("{call} took {done} of {asked} MSRs; the one it stopped at is {stopped_at:#x}")]
    Msrs { call: &'static str, done: usize, asked: usize, stopped_at: u32 },
    #[error("the state has {state} vCPUs; the machine has {machine}")]
    VcpuCount { state: usize, machine: usize },
    #[error("the machine state has version {version}; this farfork reads version 1")]
    UnknownVersion { version: u16 },
    #[error("the machine state was written by a build with other kernel structures")]
    ForeignLayout,
    #[error("the machine state does not decode ({source})")]
    Malformed { source: postcard::Error },
    #[error("the machine state has {bytes} bytes after its end")]
    TrailingBytes { bytes: usize },
    #[error("the machine state's {what} is out of range")]
    OutOfRange { what: &'static str },
    #[error(transparent)]
    Device(#[from] BadDeviceState),
}

impl StateError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Kvm { .. } | Self::Msrs { .. } => {
                "run on the kernel and CPU that the image was made on, or make it again here"
            }
            Self::VcpuCount { .. } => "build the shell for the class of the image (Image::class)",
            Self::UnknownVersion { .. } | Self::ForeignLayout => {
                "use the farfork that made the image, or make it again with this one"
            }
            Self::Malformed { .. } | Self::TrailingBytes { .. } | Self::OutOfRange { .. } | Self::Device(_) => {
                "make the image again"
            }
        }
    }
}

impl MachineState {
    /// For a manifest.
    pub(crate) fn encode(&self) -> Vec<u8> {
        postcard::to_stdvec(&(VERSION, SIZES, self)).expect("plain data")
    }

    /// From a manifest. Nothing is trusted but that the bytes are those that somebody wrote.
    ///
    /// # Errors
    /// [`StateError`] before anything is made of it.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let malformed = |source| StateError::Malformed { source };
        let (version, rest) = postcard::take_from_bytes::<u16>(bytes).map_err(malformed)?;
        if version != VERSION {
            return Err(StateError::UnknownVersion { version });
        }
        let (sizes, rest) = postcard::take_from_bytes::<Sizes>(rest).map_err(malformed)?;
        if sizes != SIZES {
            return Err(StateError::ForeignLayout);
        }
        let (state, rest) = postcard::take_from_bytes::<Self>(rest).map_err(malformed)?;
        if !rest.is_empty() {
            return Err(StateError::TrailingBytes { bytes: rest.len() });
        }
        state.check()?;
        Ok(state)
    }

    /// The devices that a machine in this state has, with a disk of this size.
    pub(crate) fn devices(&self, disk: Option<types::MemorySize>) -> Devices {
        crate::device::devices_of(&self.devices, disk)
    }

    /// Number of vCPUs.
    #[must_use]
    pub fn vcpu_count(&self) -> usize {
        self.vcpus.len()
    }

    /// Everything in which two states differ, of what a fork keeps: all but time stamps and counters that run.
    #[cfg(feature = "testing")]
    pub(crate) fn differences(&self, other: &Self) -> Vec<String> {
        let mut found = Vec::new();
        if self.vcpus.len() != other.vcpus.len() || self.irqchips.len() != other.irqchips.len() {
            found.push("number of vCPUs or interrupt controllers".to_owned());
        }
        for (index, (a, b)) in self.vcpus.iter().zip(&other.vcpus).enumerate() {
            let same = [
                ("MP_STATE", a.mp_state == b.mp_state),
                ("REGS", a.regs == b.regs),
                ("SREGS", a.sregs == b.sregs),
                ("XSAVE", a.xsave == b.xsave),
                ("XCRS", a.xcrs == b.xcrs),
                ("DEBUGREGS", a.debug_regs == b.debug_regs),
                ("LAPIC", lapic_but_timer(&a.lapic) == lapic_but_timer(&b.lapic)),
                ("VCPU_EVENTS", a.events == b.events),
                ("number of MSRs", a.msrs.len() == b.msrs.len()),
            ];
            found.extend(same.iter().filter(|(_, same)| !same).map(|(what, _)| format!("vCPU {index}: {what}")));
            let msrs = a.msrs.iter().zip(&b.msrs).filter(|(a, b)| a != b && !RUNNING_MSRS.contains(&a.0));
            found.extend(msrs.map(|(a, b)| format!("vCPU {index}: MSR {:#x} is {:#x}, was {:#x}", a.0, a.1, b.1)));
        }
        let bytes = |chip: &kvm_irqchip| postcard::to_stdvec(chip).expect("plain data");
        let chips = self.irqchips.iter().zip(&other.irqchips).filter(|(a, b)| bytes(a) != bytes(b));
        found.extend(chips.map(|(chip, _)| format!("interrupt controller {}", chip.chip_id)));
        // Less the times at which its channels were loaded.
        let pit = |state: &Self| state.pit.channels.map(|channel| (channel.count, channel.mode, channel.gate, channel.bcd));
        if pit(self) != pit(other) {
            found.push("PIT".to_owned());
        }
        if self.devices != other.devices {
            found.push("devices".to_owned());
        }
        found
    }

    fn check(&self) -> Result<(), StateError> {
        let chips: Vec<u32> = self.irqchips.iter().map(|chip| chip.chip_id).collect();
        if chips != IRQCHIPS {
            return Err(StateError::OutOfRange { what: "list of interrupt controllers" });
        }
        let is_too_long = |device: &SavedDevice| device.name.len() + device.state.len() > DEVICE_SIZE_MAX;
        if self.devices.len() > DEVICES_MAX || self.devices.iter().any(is_too_long) {
            return Err(StateError::OutOfRange { what: "list of devices" });
        }
        for vcpu in &self.vcpus {
            if vcpu.xsave.len() > XSAVE_SIZE {
                return Err(StateError::OutOfRange { what: "XSAVE area" });
            }
            if vcpu.xcrs.len() > XCRS_MAX {
                return Err(StateError::OutOfRange { what: "number of extended control registers" });
            }
            if vcpu.lapic.len() != LAPIC_REGISTERS {
                return Err(StateError::OutOfRange { what: "number of APIC registers" });
            }
            if vcpu.msrs.len() > MSRS_MAX {
                return Err(StateError::OutOfRange { what: "number of MSRs" });
            }
        }
        Ok(())
    }
}

/// The time stamp counter, its deadline, and the performance clocks IA32_MPERF, IA32_APERF.
#[cfg(feature = "testing")]
const RUNNING_MSRS: [u32; 4] = [MSR_IA32_TSC, MSR_IA32_TSC_DEADLINE, 0xE7, 0xE8];

/// The registers of a local APIC, less the current count of its timer (offset 0x390).
#[cfg(feature = "testing")]
fn lapic_but_timer(words: &[u32]) -> Vec<u32> {
    let mut words = words.to_vec();
    words[0x39] = 0;
    words
}

/// In the order in which they are restored: an IOAPIC that delivers a pending interrupt must find the PICs as they were.
const IRQCHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];
const XSAVE_SIZE: usize = 4096;
const DEVICES_MAX: usize = 32;
const DEVICE_SIZE_MAX: usize = 2048;
const MSRS_MAX: usize = 1024;
const XCRS_MAX: usize = 16;
const LAPIC_REGISTERS: usize = 64;

/// Reads the state of a machine at rest.
pub(crate) fn capture(host: &Host, core: &Core) -> Result<MachineState, StateError> {
    let vcpus: Result<Vec<_>, _> = (0..core.vcpus.len()).map(|index| capture_vcpu(host, &core.vcpu(index))).collect();
    let irqchips: Result<Vec<_>, StateError> = IRQCHIPS
        .iter()
        .map(|chip_id| {
            let mut chip = kvm_irqchip { chip_id: *chip_id, ..Default::default() };
            core.vm.get_irqchip(&mut chip).map_err(kvm("KVM_GET_IRQCHIP"))?;
            Ok(chip)
        })
        .collect();
    Ok(MachineState {
        tsc_khz: host.cpu().tsc_khz,
        vcpus: vcpus?,
        pit: core.vm.get_pit2().map_err(kvm("KVM_GET_PIT2"))?,
        clock_ns: core.vm.get_clock().map_err(kvm("KVM_GET_CLOCK"))?.clock,
        irqchips: irqchips?,
        devices: core.bus.lock().unwrap_or_else(std::sync::PoisonError::into_inner).save(),
    })
}

fn capture_vcpu(host: &Host, vcpu: &VcpuFd) -> Result<VcpuState, StateError> {
    // MP_STATE first: reading it makes KVM accept pending INIT and SIPI, which changes what the rest reads.
    let mp_state = vcpu.get_mp_state().map_err(kvm("KVM_GET_MP_STATE"))?;
    let xsave = vcpu.get_xsave().map_err(kvm("KVM_GET_XSAVE"))?;
    let mut msrs = get_msrs(vcpu, &host.facts.msrs)?;
    let tsc = msrs.iter().find(|(index, _)| *index == MSR_IA32_TSC).map_or(0, |(_, value)| *value);
    for (index, value) in &mut msrs {
        // KVM clears the deadline when its timer has fired and the interrupt is not delivered yet. Restoring zero would disarm
        // the timer and lose that interrupt; a deadline of now fires it at once. Without a deadline timer KVM ignores it.
        if *index == MSR_IA32_TSC_DEADLINE && *value == 0 {
            *value = tsc;
        }
    }
    Ok(VcpuState {
        mp_state,
        regs: vcpu.get_regs().map_err(kvm("KVM_GET_REGS"))?,
        sregs: vcpu.get_sregs().map_err(kvm("KVM_GET_SREGS"))?,
        xsave: xsave_as_bytes(&xsave),
        xcrs: xcrs_as_list(&vcpu.get_xcrs().map_err(kvm("KVM_GET_XCRS"))?),
        debug_regs: vcpu.get_debug_regs().map_err(kvm("KVM_GET_DEBUGREGS"))?,
        lapic: lapic_as_words(&vcpu.get_lapic().map_err(kvm("KVM_GET_LAPIC"))?)?,
        msrs,
        // Last: reading the events is what moves an interrupt under way into a state that can be restored.
        events: vcpu.get_vcpu_events().map_err(kvm("KVM_GET_VCPU_EVENTS"))?,
    })
}

/// Puts a shell into a captured state. Its memory is mapped, since restoring registers may read it (page-table pointers, the
/// clock's page).
///
/// `fresh` is what the shell's own state is, where that is known: parts that nothing else changes and that are the same need
/// not be restored. Each call to KVM about a vCPU costs 5-10 us.
pub(crate) fn restore(core: &Core, state: &MachineState, fresh: Option<&MachineState>) -> Result<(), StateError> {
    if state.vcpus.len() != core.vcpus.len() {
        return Err(StateError::VcpuCount { state: state.vcpus.len(), machine: core.vcpus.len() });
    }
    for (index, saved) in state.vcpus.iter().enumerate() {
        let fresh = fresh.filter(|fresh| fresh.tsc_khz == state.tsc_khz).and_then(|fresh| fresh.vcpus.get(index));
        restore_vcpu(&core.vcpu(index), saved, state.tsc_khz, fresh)?;
    }
    core.vm.set_pit2(&state.pit).map_err(kvm("KVM_SET_PIT2"))?;
    let clock = kvm_clock_data { clock: state.clock_ns, ..Default::default() };
    core.vm.set_clock(&clock).map_err(kvm("KVM_SET_CLOCK"))?;
    for chip in &state.irqchips {
        core.vm.set_irqchip(chip).map_err(kvm("KVM_SET_IRQCHIP"))?;
    }
    // Devices last: theirs may raise interrupts.
    core.bus.lock().unwrap_or_else(std::sync::PoisonError::into_inner).restore(&state.devices)?;
    Ok(())
}

fn restore_vcpu(vcpu: &VcpuFd, saved: &VcpuState, tsc_khz: u32, fresh: Option<&VcpuState>) -> Result<(), StateError> {
    // CPUID was set when the shell was built. The TSC's rate before any MSR that counts in it; a fresh vCPU has the host's.
    if fresh.is_none() && vcpu.get_tsc_khz().map_err(kvm("KVM_GET_TSC_KHZ"))? != tsc_khz {
        vcpu.set_tsc_khz(tsc_khz).map_err(kvm("KVM_SET_TSC_KHZ"))?;
    }
    if fresh.is_none_or(|fresh| fresh.mp_state != saved.mp_state) {
        vcpu.set_mp_state(saved.mp_state).map_err(kvm("KVM_SET_MP_STATE"))?;
    }
    vcpu.set_regs(&saved.regs).map_err(kvm("KVM_SET_REGS"))?;
    vcpu.set_sregs(&saved.sregs).map_err(kvm("KVM_SET_SREGS"))?;
    set_xsave(vcpu, &xsave_of_bytes(&saved.xsave)).map_err(|error| StateError::Kvm {
        call: "KVM_SET_XSAVE",
        source: kvm_ioctls::Error::new(error.raw_os_error().unwrap_or(libc::EIO)),
    })?;
    if fresh.is_none_or(|fresh| fresh.xcrs != saved.xcrs) {
        vcpu.set_xcrs(&xcrs_of_list(&saved.xcrs)).map_err(kvm("KVM_SET_XCRS"))?;
    }
    if fresh.is_none_or(|fresh| fresh.debug_regs != saved.debug_regs) {
        vcpu.set_debug_regs(&saved.debug_regs).map_err(kvm("KVM_SET_DEBUGREGS"))?;
    }
    // After SREGS, which hold the APIC's base address and mode.
    vcpu.set_lapic(&lapic_of_words(&saved.lapic)).map_err(kvm("KVM_SET_LAPIC"))?;
    // After the LAPIC, whose timer mode decides whether KVM takes a TSC deadline. The list is in `Host::msrs` order.
    set_msrs(vcpu, &saved.msrs)?;
    vcpu.set_vcpu_events(&saved.events).map_err(kvm("KVM_SET_VCPU_EVENTS"))?;
    // Tells a guest kernel that it was paused, so that its watchdogs stay calm. EINVAL: it does not use this clock.
    if fresh.is_some() && !saved.has_kvmclock() {
        return Ok(());
    }
    match vcpu.kvmclock_ctrl() {
        Err(error) if error.errno() != libc::EINVAL => Err(kvm("KVM_KVMCLOCK_CTRL")(error)),
        _ => Ok(()),
    }
}

fn xsave_as_bytes(xsave: &kvm_xsave) -> Vec<u8> {
    let mut bytes: Vec<u8> = xsave.region.iter().flat_map(|word| word.to_le_bytes()).collect();
    let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    bytes.truncate(used);
    bytes
}

fn xsave_of_bytes(bytes: &[u8]) -> kvm_xsave {
    let mut xsave = kvm_xsave::default();
    for (word, chunk) in xsave.region.iter_mut().zip(bytes.chunks(4)) {
        let mut le = [0; 4];
        le[..chunk.len()].copy_from_slice(chunk);
        *word = u32::from_le_bytes(le);
    }
    xsave
}

fn xcrs_as_list(xcrs: &kvm_xcrs) -> Vec<(u32, u64)> {
    xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).map(|xcr| (xcr.xcr, xcr.value)).collect()
}

fn xcrs_of_list(list: &[(u32, u64)]) -> kvm_xcrs {
    let mut xcrs = kvm_xcrs { nr_xcrs: u32::try_from(list.len()).expect("at most 16"), ..Default::default() };
    for (xcr, (number, value)) in xcrs.xcrs.iter_mut().zip(list) {
        (xcr.xcr, xcr.value) = (*number, *value);
    }
    xcrs
}

fn lapic_as_words(lapic: &kvm_lapic_state) -> Result<Vec<u32>, StateError> {
    let bytes = lapic.regs.map(std::ffi::c_char::cast_unsigned);
    let (rows, _) = bytes.as_chunks::<16>();
    if rows.iter().any(|row| row[4..] != [0; 12]) {
        return Err(StateError::OutOfRange { what: "APIC page, which has bytes between its registers," });
    }
    Ok(rows.iter().map(|row| u32::from_le_bytes([row[0], row[1], row[2], row[3]])).collect())
}

fn lapic_of_words(words: &[u32]) -> kvm_lapic_state {
    let mut lapic = kvm_lapic_state::default();
    for (row, word) in lapic.regs.as_chunks_mut::<16>().0.iter_mut().zip(words) {
        for (byte, value) in row.iter_mut().zip(word.to_le_bytes()) {
            *byte = value.cast_signed();
        }
    }
    lapic
}

fn get_msrs(vcpu: &VcpuFd, indexes: &[u32]) -> Result<Vec<(u32, u64)>, StateError> {
    let entries: Vec<_> = indexes.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
    let mut msrs = Msrs::from_entries(&entries).map_err(|_| StateError::OutOfRange { what: "number of MSRs" })?;
    let done = vcpu.get_msrs(&mut msrs).map_err(kvm("KVM_GET_MSRS"))?;
    all_msrs("KVM_GET_MSRS", done, &entries)?;
    Ok(msrs.as_slice().iter().map(|entry| (entry.index, entry.data)).collect())
}

fn set_msrs(vcpu: &VcpuFd, msrs: &[(u32, u64)]) -> Result<(), StateError> {
    let entries: Vec<_> =
        msrs.iter().map(|(index, data)| kvm_msr_entry { index: *index, data: *data, ..Default::default() }).collect();
    let msrs = Msrs::from_entries(&entries).map_err(|_| StateError::OutOfRange { what: "number of MSRs" })?;
    let done = vcpu.set_msrs(&msrs).map_err(kvm("KVM_SET_MSRS"))?;
    all_msrs("KVM_SET_MSRS", done, &entries)
}

/// KVM stops at the first MSR that it does not take, and says how far it came instead of failing.
fn all_msrs(call: &'static str, done: usize, entries: &[kvm_msr_entry]) -> Result<(), StateError> {
    match entries.get(done) {
        None => Ok(()),
        Some(entry) => Err(StateError::Msrs { call, done, asked: entries.len(), stopped_at: entry.index }),
    }
}

fn kvm(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> StateError {
    move |source| StateError::Kvm { call, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use types::manifest::HEAD_SIZE_MAX;

    #[test]
    fn long_structures_survive_their_short_forms() {
        let bytes: Vec<u8> = (0..2687).map(|n| u8::try_from(n % 255 + 1).unwrap()).collect();
        assert_eq!(xsave_as_bytes(&xsave_of_bytes(&bytes)), bytes);
        assert_eq!(xsave_as_bytes(&kvm_xsave::default()), []);
        let words: Vec<u32> = (0..64).map(|n| n * 0x0101_0101).collect();
        assert_eq!(lapic_as_words(&lapic_of_words(&words)).unwrap(), words);
        let mut odd = lapic_of_words(&words);
        odd.regs[5] = 1;
        assert!(matches!(lapic_as_words(&odd), Err(StateError::OutOfRange { .. })));
        let list = vec![(0, 0xE7), (1, 3)];
        assert_eq!(xcrs_as_list(&xcrs_of_list(&list)), list);
    }

    /// Eight vCPUs with every vector register of AVX-512 and 64 MSRs in use, beside the digests of 32 GiB and two regions of
    /// 512 runs, fit the 64 KiB of a manifest head.
    #[test]
    fn the_largest_state_fits_a_manifest_head() {
        let vcpu = VcpuState {
            mp_state: kvm_mp_state::default(),
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            xsave: vec![u8::MAX; 2688],
            xcrs: vec![(0, u64::MAX); 2],
            debug_regs: kvm_debugregs::default(),
            lapic: vec![u32::MAX; LAPIC_REGISTERS],
            msrs: vec![(u32::MAX, u64::MAX); 64],
            events: kvm_vcpu_events::default(),
        };
        let state = MachineState {
            tsc_khz: u32::MAX,
            vcpus: vec![vcpu; usize::from(crate::class::Class::VCPUS_MAX)],
            pit: kvm_pit_state2::default(),
            clock_ns: u64::MAX,
            irqchips: IRQCHIPS.map(|chip_id| kvm_irqchip { chip_id, ..Default::default() }).to_vec(),
            devices: vec![SavedDevice { name: "serial".into(), state: vec![0; 256] }],
        };
        let encoded = state.encode();
        MachineState::decode(&encoded).unwrap();
        let digests = 512 * 32;
        let runs = 2 * 512 * 5;
        let rest = 64 * 32 + 512;
        assert!(encoded.len() + digests + runs + rest <= HEAD_SIZE_MAX, "{} bytes of state", encoded.len());
    }
}
