//! The probe's code, assembled into this binary by the Rust compiler, and the numbers it shares with its host side.

use std::arch::global_asm;

/// I/O port of the doorbell.
pub(crate) const DOORBELL_PORT: u16 = 0x600;
/// Written to the doorbell by a guest that has nothing to do.
pub(crate) const EVENT_WAIT: u32 = 1;
/// Written to the doorbell by a guest that took a CPU exception.
pub(crate) const EVENT_FAULT: u32 = 2;

/// Guest address of the page with the machine's identity.
pub(crate) const IDENTITY_PAGE: u64 = 0x5000;
/// Size and alignment of a vCPU's block.
pub(crate) const BLOCK_SIZE: u64 = 0x4000;
/// Offset of the kvmclock page in a block.
pub(crate) const KVMCLOCK: u64 = 0x3000;

// Offsets in the mailbox page.
pub(crate) const MB_SEQ: u64 = 0x00;
pub(crate) const MB_DONE: u64 = 0x08;
pub(crate) const MB_OP: u64 = 0x10;
pub(crate) const MB_ARG0: u64 = 0x18;
pub(crate) const MB_RESULT0: u64 = 0x48;
pub(crate) const MB_STOP: u64 = 0x68;
pub(crate) const MB_HELD: u64 = 0x70;
pub(crate) const MB_VCPU: u64 = 0x78;
pub(crate) const MB_TICKS: u64 = 0x80;
pub(crate) const MB_MESSAGES: u64 = 0x88;
pub(crate) const MB_FAULT: u64 = 0x90;
const MB_SCRATCH: u64 = 0xB0;
pub(crate) const MB_BUFFER: u64 = 0x800;

pub(crate) const OP_COUNT: u64 = 14;

pub(crate) const PATTERN_PAGE: u64 = 0x9E37_79B9_7F4A_7C15;
pub(crate) const PATTERN_EPOCH: u64 = 0xD1B5_4A32_D192_ED03;
pub(crate) const PATTERN_STEP: u64 = 0xA0761D6478BD642F;
pub(crate) const PATTERN_MIX: u64 = 0xE703_7ED1_A0B4_28DB;
pub(crate) const CHECKSUM_START: u64 = 0xCBF2_9CE4_8422_2325;

/// Physical address of the local APIC's registers.
const LAPIC: u64 = 0xFEE0_0000;

global_asm!(
    include_str!("probe.s"),
    PORT = const DOORBELL_PORT,
    EVENT_WAIT = const EVENT_WAIT,
    EVENT_FAULT = const EVENT_FAULT,
    IDENTITY_PAGE = const IDENTITY_PAGE,
    BLOCK_SIZE = const BLOCK_SIZE,
    KVMCLOCK = const KVMCLOCK,
    MB_SEQ = const MB_SEQ,
    MB_DONE = const MB_DONE,
    MB_OP = const MB_OP,
    MB_ARG0 = const MB_ARG0,
    MB_RESULT0 = const MB_RESULT0,
    MB_STOP = const MB_STOP,
    MB_HELD = const MB_HELD,
    MB_VCPU = const MB_VCPU,
    MB_TICKS = const MB_TICKS,
    MB_MESSAGES = const MB_MESSAGES,
    MB_FAULT = const MB_FAULT,
    MB_SCRATCH = const MB_SCRATCH,
    MB_BUFFER = const MB_BUFFER,
    OP_COUNT = const OP_COUNT,
    PATTERN_PAGE = const PATTERN_PAGE,
    PATTERN_EPOCH = const PATTERN_EPOCH,
    PATTERN_STEP = const PATTERN_STEP,
    PATTERN_MIX = const PATTERN_MIX,
    CHECKSUM_START = const CHECKSUM_START,
    LAPIC = const LAPIC,
);

unsafe extern "C" {
    static farfork_probe_start: u8;
    static farfork_probe_entry: u8;
    static farfork_probe_timer: u8;
    static farfork_probe_message: u8;
    static farfork_probe_exceptions: u8;
    static farfork_probe_end: u8;
}

/// The payload's bytes and where in them things are.
pub(crate) struct Payload {
    pub(crate) code: &'static [u8],
    pub(crate) entry: u64,
    pub(crate) timer: u64,
    pub(crate) message: u64,
    /// 32 stubs of 16 bytes.
    pub(crate) exceptions: u64,
}

pub(crate) fn payload() -> Payload {
    let start = &raw const farfork_probe_start;
    let offset = |symbol: *const u8| (symbol as usize - start as usize) as u64;
    let len = offset(&raw const farfork_probe_end);
    // SAFETY: the assembler laid out everything from start to end in one read-only section of this binary (probe.s).
    let code = unsafe { std::slice::from_raw_parts(start, usize::try_from(len).unwrap_or(0)) };
    Payload {
        code,
        entry: offset(&raw const farfork_probe_entry),
        timer: offset(&raw const farfork_probe_timer),
        message: offset(&raw const farfork_probe_message),
        exceptions: offset(&raw const farfork_probe_exceptions),
    }
}
