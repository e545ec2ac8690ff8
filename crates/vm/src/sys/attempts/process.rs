//! Attempts at processes: new ones, others, and what this one may be.

use super::{MARK, NO_EFFECT, Outcome, Scene, at, at_mut, call, does, effect, int, knock, opens, text, this_process};

/// Does something in a new process, which is in the same jail. What it must not do is take locks.
pub(super) fn in_child(life: impl FnOnce() -> Outcome) -> Outcome {
    // Else its end would not be told: the kernel reaps a worker's children.
    let default = [0_usize; 4];
    does(libc::SYS_rt_sigaction, [int(libc::SIGCHLD), at(&default), 0, 8])?;
    let child = call(libc::SYS_clone, [int(libc::SIGCHLD), 0, 0, 0, 0])?;
    if child == 0 {
        let status = life().err().unwrap_or(0);
        crate::sys::process::exit(status);
    }
    match exit_status(child)? {
        0 => Ok(()),
        errno => Err(errno),
    }
}

/// Waits for a child. How it ended, as a shell would say it.
fn exit_status(child: usize) -> Result<i32, i32> {
    let mut status: libc::c_int = 0;
    call(libc::SYS_wait4, [child, at_mut(&mut status), int(libc::__WALL), 0])?;
    if libc::WIFEXITED(status) { Ok(libc::WEXITSTATUS(status)) } else { Err(NO_EFFECT) }
}

pub(crate) fn fork_at_once(_: &Scene) -> Outcome {
    let child = call(libc::SYS_clone, [int(libc::SIGCHLD), 0, 0, 0, 0])?;
    if child == 0 {
        crate::sys::process::exit(0);
    }
    effect(child > 0)
}

pub(crate) fn clone3(_: &Scene) -> Outcome {
    // flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls
    let arguments = [0, 0, 0, 0, int(libc::SIGCHLD), 0, 0, 0];
    let child = call(libc::SYS_clone3, [at(&arguments), size_of_val(&arguments)])?;
    if child == 0 {
        crate::sys::process::exit(0);
    }
    effect(child > 0)
}

pub(crate) fn thread(_: &Scene) -> Outcome {
    let started = std::thread::Builder::new().spawn(|| 7);
    let thread = started.map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))?;
    effect(thread.join().is_ok_and(|said| said == 7))
}

/// The clone that a branch makes.
pub(crate) fn copier(_: &Scene) -> Outcome {
    let mut pidfd: libc::c_int = -1;
    let child = call(libc::SYS_clone, [int(libc::CLONE_PIDFD | libc::SIGCHLD), 0, at_mut(&mut pidfd), 0, 0])?;
    if child == 0 {
        crate::sys::process::exit(0);
    }
    effect(pidfd >= 0)
}

/// Ends with 200, or 201 if it is root: `exit(200 + (geteuid() == 0))`, in a file that the kernel can run.
pub(crate) fn program() -> Vec<u8> {
    const CODE: [u8; 29] = [
        0xB8, 107, 0, 0, 0, 0x0F, 0x05, // geteuid()
        0x31, 0xFF, 0x85, 0xC0, 0x40, 0x0F, 0x94, 0xC7, // edi = eax == 0
        0x81, 0xC7, 200, 0, 0, 0, // + 200
        0xB8, 60, 0, 0, 0, 0x0F, 0x05, // exit(edi)
        0xF4,
    ];
    const BASE: u64 = 0x40_0000;
    const HEADERS: u16 = 64 + 56;
    let mut file = Vec::from(*b"\x7FELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    let total = u64::from(HEADERS) + CODE.len() as u64;
    file.extend([2_u16, 62].iter().flat_map(|half| half.to_le_bytes())); // an executable, for x86-64
    file.extend(1_u32.to_le_bytes());
    file.extend([BASE + u64::from(HEADERS), 64, 0].iter().flat_map(|word| word.to_le_bytes())); // entry, program headers
    file.extend(0_u32.to_le_bytes());
    file.extend([64_u16, 56, 1, 0, 0, 0].iter().flat_map(|half| half.to_le_bytes()));
    file.extend([1_u32, 5].iter().flat_map(|word| word.to_le_bytes())); // loaded, readable and executable
    file.extend([0, BASE, BASE, total, total, 4096].iter().flat_map(|word| word.to_le_bytes()));
    file.extend(CODE);
    file
}

/// Runs the program behind a descriptor, or beneath one. Its exit status.
fn run(directory: usize, path: usize, flags: libc::c_int) -> Result<i32, i32> {
    knock(libc::SYS_execveat, [usize::MAX, text(c""), 0, 0, int(libc::AT_EMPTY_PATH)]);
    let default = [0_usize; 4];
    does(libc::SYS_rt_sigaction, [int(libc::SIGCHLD), at(&default), 0, 8])?;
    let child = call(libc::SYS_clone, [int(libc::SIGCHLD), 0, 0, 0, 0])?;
    if child == 0 {
        let (arguments, environment) = ([text(c"program"), 0], [0_usize]);
        let run = call(libc::SYS_execveat, [directory, path, at(&arguments), at(&environment), int(flags)]);
        crate::sys::process::exit(run.err().unwrap_or(NO_EFFECT));
    }
    match exit_status(child)? {
        status @ (200 | 201) => Ok(status),
        errno => Err(errno),
    }
}

/// Runs a program that is in no file system.
pub(crate) fn execveat_memfd(scene: &Scene) -> Outcome {
    run(scene.gift(), text(c""), libc::AT_EMPTY_PATH).map(drop)
}

pub(crate) fn execve(_: &Scene) -> Outcome {
    let (path, arguments, environment) = (c"/bin/true", [text(c"true"), 0], [0_usize]);
    knock(libc::SYS_execve, [text(c""), at(&arguments), at(&environment)]);
    // The program ends with 0, as a child does that has succeeded.
    in_child(|| {
        call(libc::SYS_execve, [text(path), at(&arguments), at(&environment)])?;
        Err(NO_EFFECT)
    })
}

pub(crate) fn execveat_directory(scene: &Scene) -> Outcome {
    run(scene.gift(), text(c"program"), 0).map(drop)
}

pub(crate) fn execveat_setuid(scene: &Scene) -> Outcome {
    effect(run(scene.gift(), text(c"setuid"), 0)? == 201)
}

pub(crate) fn ptrace_me(_: &Scene) -> Outcome {
    does(libc::SYS_ptrace, [usize::try_from(libc::PTRACE_TRACEME).expect("64-bit"), 0, 0, 0])
}

/// Attaches, from a process that it starts, to the worker.
pub(crate) fn ptrace_worker(_: &Scene) -> Outcome {
    let worker = this_process()?;
    knock(libc::SYS_ptrace, [usize::try_from(libc::PTRACE_SEIZE).expect("64-bit"), 0, 0, 0]);
    in_child(|| does(libc::SYS_ptrace, [usize::try_from(libc::PTRACE_SEIZE).expect("64-bit"), worker, 0, 0]))
}

pub(crate) fn kill_itself(_: &Scene) -> Outcome {
    does(libc::SYS_kill, [this_process()?, 0])
}

pub(crate) fn kill_process(scene: &Scene) -> Outcome {
    does(libc::SYS_kill, [scene.process(), int(libc::SIGKILL)])
}

pub(crate) fn tkill(_: &Scene) -> Outcome {
    // Its main thread has the process's number.
    does(libc::SYS_tkill, [this_process()?, 0])
}

/// Only the signal that brings a vCPU out of the guest may be sent.
pub(crate) fn tgkill_other_signal(_: &Scene) -> Outcome {
    let process = this_process()?;
    does(libc::SYS_tgkill, [process, process, int(libc::SIGWINCH)])
}

pub(crate) fn rt_sigqueueinfo(_: &Scene) -> Outcome {
    // signo, errno, code (SI_QUEUE)
    let mut info = [0_i32; 32];
    info[..3].copy_from_slice(&[libc::SIGWINCH, 0, -1]);
    does(libc::SYS_rt_sigqueueinfo, [this_process()?, int(libc::SIGWINCH), at(&info)])
}

pub(crate) fn rt_sigaction(_: &Scene) -> Outcome {
    let (ignore, mut now) = ([libc::SIG_IGN, 0, 0, 0], [0_usize; 4]);
    does(libc::SYS_rt_sigaction, [int(libc::SIGUSR1), at(&ignore), 0, 8])?;
    does(libc::SYS_rt_sigaction, [int(libc::SIGUSR1), 0, at_mut(&mut now), 8])?;
    effect(now[0] == libc::SIG_IGN)
}

pub(crate) fn pidfd_open(_: &Scene) -> Outcome {
    opens(libc::SYS_pidfd_open, [this_process()?, 0])
}

pub(crate) fn pidfd_open_process(scene: &Scene) -> Outcome {
    opens(libc::SYS_pidfd_open, [scene.process(), 0])
}

pub(crate) fn outlive_zygote(_: &Scene) -> Outcome {
    let mut signal: libc::c_int = -1;
    does(libc::SYS_prctl, [int(libc::PR_SET_PDEATHSIG), 0, 0, 0, 0])?;
    does(libc::SYS_prctl, [int(libc::PR_GET_PDEATHSIG), at_mut(&mut signal), 0, 0, 0])?;
    effect(signal == 0)
}

pub(crate) fn become_dumpable(_: &Scene) -> Outcome {
    does(libc::SYS_prctl, [int(libc::PR_SET_DUMPABLE), 1, 0, 0, 0])?;
    effect(call(libc::SYS_prctl, [int(libc::PR_GET_DUMPABLE), 0, 0, 0, 0])? == 1)
}

pub(crate) fn prlimit(_: &Scene) -> Outcome {
    let (lower, mut now) = ([0_u64, 0], [1_u64, 1]);
    let core = usize::try_from(libc::RLIMIT_CORE).expect("64-bit");
    does(libc::SYS_prlimit64, [0, core, at(&lower), 0])?;
    does(libc::SYS_prlimit64, [0, core, 0, at_mut(&mut now)])?;
    effect(now == lower)
}

pub(crate) fn setsid(_: &Scene) -> Outcome {
    let session = call(libc::SYS_setsid, [])?;
    effect(session == call(libc::SYS_getsid, [0])?)
}

pub(crate) fn setpriority(_: &Scene) -> Outcome {
    does(libc::SYS_setpriority, [0, 0, 5])?;
    // The kernel says 20 less the nice value.
    effect(call(libc::SYS_getpriority, [0, 0])? == 15)
}

pub(crate) fn sched_setaffinity(_: &Scene) -> Outcome {
    let mask = [1_u64, 0, 0, 0];
    does(libc::SYS_sched_setaffinity, [0, size_of_val(&mask), at(&mask)])
}

pub(crate) fn sched_setscheduler(_: &Scene) -> Outcome {
    let priority: libc::c_int = 0;
    does(libc::SYS_sched_setscheduler, [0, int(libc::SCHED_BATCH), at(&priority)])?;
    effect(call(libc::SYS_sched_getscheduler, [0])? == int(libc::SCHED_BATCH))
}

pub(crate) fn personality(_: &Scene) -> Outcome {
    let no_randomness = int(libc::ADDR_NO_RANDOMIZE);
    does(libc::SYS_personality, [no_randomness])?;
    effect(call(libc::SYS_personality, [0xFFFF_FFFF])? == no_randomness)
}

/// Moves to namespaces that need no privilege: descriptors and working directory of its own.
pub(crate) fn unshare(_: &Scene) -> Outcome {
    does(libc::SYS_unshare, [int(libc::CLONE_FILES | libc::CLONE_FS)])
}

/// Reads the environment of another process, beneath a descriptor of `/proc`; the number is the process.
pub(crate) fn others_environment(scene: &Scene) -> Outcome {
    others_proc(scene, b"environ")
}

/// What anybody may know of a process.
pub(crate) fn others_status(scene: &Scene) -> Outcome {
    others_proc(scene, b"status")
}

fn others_proc(scene: &Scene, file: &[u8]) -> Outcome {
    let mut path = scene.number.to_string().into_bytes();
    path.push(b'/');
    path.extend(file);
    path.push(0);
    let file = call(libc::SYS_openat, [scene.gift(), at(path.as_slice()), int(libc::O_RDONLY), 0])?;
    let mut byte = MARK;
    does(libc::SYS_read, [file, at_mut(&mut byte), 1])
}
