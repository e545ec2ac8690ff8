//! Attempts at what else the kernel offers: large interfaces, and what it tells about the host.

use super::{Outcome, Scene, at, at_mut, call, does, effect, int, opens, text};

pub(crate) fn io_uring_setup(_: &Scene) -> Outcome {
    let mut parameters = [0_u8; 120];
    opens(libc::SYS_io_uring_setup, [4, at_mut(&mut parameters)])
}

pub(crate) fn add_key(_: &Scene) -> Outcome {
    let payload = [1_u8; 4];
    let arguments = [text(c"user"), text(c"farfork"), at(&payload), payload.len(), int(libc::KEY_SPEC_PROCESS_KEYRING)];
    does(libc::SYS_add_key, arguments)
}

pub(crate) fn keyctl(_: &Scene) -> Outcome {
    // KEYCTL_JOIN_SESSION_KEYRING, of no name: a new one
    effect(call(libc::SYS_keyctl, [1, 0, 0, 0, 0])? > 0)
}

pub(crate) fn perf_event_open(_: &Scene) -> Outcome {
    #[repr(C)]
    struct Attributes {
        kind: u32,
        size: u32,
        config: u64,
        period: u64,
        sample_type: u64,
        read_format: u64,
        flags: u64,
        rest: [u64; 2],
    }
    const SOFTWARE: u32 = 1;
    const DISABLED_AND_USER_ONLY: u64 = 1 | 1 << 5 | 1 << 6;
    let attributes = Attributes {
        kind: SOFTWARE,
        size: 64,
        config: 0,
        period: 0,
        sample_type: 0,
        read_format: 0,
        flags: DISABLED_AND_USER_ONLY,
        rest: [0; 2],
    };
    opens(libc::SYS_perf_event_open, [at(&attributes), 0, usize::MAX, usize::MAX, 0])
}

pub(crate) fn modify_ldt(_: &Scene) -> Outcome {
    // Number, base, limit, flags: a 32-bit data segment.
    let entry = [0_u32, 0, 0xFFFFF, 0b101_0001];
    does(libc::SYS_modify_ldt, [1, at(&entry), size_of_val(&entry)])
}

pub(crate) fn timer_create(_: &Scene) -> Outcome {
    let mut id: libc::c_int = -1;
    does(libc::SYS_timer_create, [0, 0, at_mut(&mut id)])?;
    effect(id >= 0)
}

pub(crate) fn timerfd_create(_: &Scene) -> Outcome {
    opens(libc::SYS_timerfd_create, [int(libc::CLOCK_MONOTONIC), 0])
}

pub(crate) fn signalfd4(_: &Scene) -> Outcome {
    let mask = 1_u64;
    opens(libc::SYS_signalfd4, [usize::MAX, at(&mask), 8, 0])
}

pub(crate) fn uname(_: &Scene) -> Outcome {
    let mut names = [0_u8; 390];
    does(libc::SYS_uname, [at_mut(&mut names)])?;
    effect(names.starts_with(b"Linux"))
}

pub(crate) fn sysinfo(_: &Scene) -> Outcome {
    let mut facts = [0_u64; 14];
    does(libc::SYS_sysinfo, [at_mut(&mut facts)])?;
    // The host's memory.
    effect(facts[4] > 0)
}

pub(crate) fn landlock_create_ruleset(_: &Scene) -> Outcome {
    let handled = [1_u64];
    opens(libc::SYS_landlock_create_ruleset, [at(&handled), 8, 0])
}

pub(crate) fn seccomp(_: &Scene) -> Outcome {
    // A filter of one instruction that allows everything, with a descriptor to listen at.
    const SET_MODE_FILTER: usize = 1;
    const NEW_LISTENER: usize = 1 << 3;
    #[repr(C)]
    struct Program {
        len: u16,
        instructions: usize,
    }
    let allow = [6_u64 | 0x7FFF_0000 << 32];
    let program = Program { len: 1, instructions: at(&allow) };
    opens(libc::SYS_seccomp, [SET_MODE_FILTER, NEW_LISTENER, at(&program)])
}

pub(crate) fn membarrier(_: &Scene) -> Outcome {
    effect(call(libc::SYS_membarrier, [0, 0, 0])? > 0)
}

pub(crate) fn semget(_: &Scene) -> Outcome {
    let id = call(libc::SYS_semget, [int(libc::IPC_PRIVATE), 1, 0o600])?;
    does(libc::SYS_semctl, [id, 0, int(libc::IPC_RMID)])
}

pub(crate) fn msgget(_: &Scene) -> Outcome {
    let id = call(libc::SYS_msgget, [int(libc::IPC_PRIVATE), 0o600])?;
    does(libc::SYS_msgctl, [id, int(libc::IPC_RMID), 0])
}

pub(crate) fn kcmp(_: &Scene) -> Outcome {
    let this = super::this_process()?;
    // Whether two descriptors of it are the same file: 0, 1 or 2.
    effect(call(libc::SYS_kcmp, [this, this, 0, 0, 0])? == 0)
}

pub(crate) fn getrandom(_: &Scene) -> Outcome {
    let mut bytes = [0_u8; 32];
    effect(call(libc::SYS_getrandom, [at_mut(&mut bytes), bytes.len(), 0])? == bytes.len())
}

/// `getpid` by the entry for 32-bit programs, where it has a number that means `writev` at the other.
pub(crate) fn call_of_32_bits(_: &Scene) -> Outcome {
    let mut result: u64 = 20;
    // SAFETY: this call takes no argument and touches no memory; old kernels leave zeros in the registers that are named.
    unsafe {
        std::arch::asm!("int 0x80", inlateout("rax") result, out("r8") _, out("r9") _, out("r10") _, out("r11") _);
    }
    effect(result == super::this_process()? as u64)
}
