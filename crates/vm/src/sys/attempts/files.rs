//! Attempts at files: by path, by descriptor, and of its own making.

use super::{MARK, NO_EFFECT, Outcome, Scene, at, at_mut, call, does, effect, int, knock, opens, text};

fn open(directory: usize, path: usize, flags: libc::c_int) -> Outcome {
    opens(libc::SYS_openat, [directory, path, int(flags), 0])
}

/// Opens a file for reading, and reads.
fn read_beneath(directory: usize, path: usize) -> Outcome {
    let file = call(libc::SYS_openat, [directory, path, int(libc::O_RDONLY), 0])?;
    let mut byte = 0_u8;
    let count = call(libc::SYS_read, [file, at_mut(&mut byte), 1])?;
    effect(count == 1)
}

pub(crate) fn open_root(_: &Scene) -> Outcome {
    open(int(libc::AT_FDCWD), text(c"/"), libc::O_PATH)
}

pub(crate) fn old_open(_: &Scene) -> Outcome {
    opens(libc::SYS_open, [text(c"/"), int(libc::O_PATH), 0])
}

pub(crate) fn openat2(_: &Scene) -> Outcome {
    let how = [u64::from(libc::O_PATH.cast_unsigned()), 0, 0];
    opens(libc::SYS_openat2, [int(libc::AT_FDCWD), text(c"/"), at(&how), size_of_val(&how)])
}

pub(crate) fn read_host_file(_: &Scene) -> Outcome {
    read_beneath(int(libc::AT_FDCWD), text(c"/etc/passwd"))
}

pub(crate) fn host_proc(_: &Scene) -> Outcome {
    read_beneath(int(libc::AT_FDCWD), text(c"/proc/1/status"))
}

pub(crate) fn list_root(_: &Scene) -> Outcome {
    open(int(libc::AT_FDCWD), text(c"/"), libc::O_RDONLY | libc::O_DIRECTORY)
}

pub(crate) fn create_file(_: &Scene) -> Outcome {
    let flags = int(libc::O_RDWR | libc::O_TMPFILE);
    opens(libc::SYS_openat, [int(libc::AT_FDCWD), text(c"/dev/shm"), flags, 0o600])
}

pub(crate) fn read_in_directory(scene: &Scene) -> Outcome {
    read_beneath(scene.gift(), text(c"file"))
}

pub(crate) fn read_secret_in_directory(scene: &Scene) -> Outcome {
    read_beneath(scene.gift(), text(c"secret"))
}

pub(crate) fn climb_out_of_directory(scene: &Scene) -> Outcome {
    // As far up as a path can go; the top's parent is the top.
    read_beneath(scene.gift(), text(c"../../../../../../../../../../../../etc/passwd"))
}

pub(crate) fn follow_link_out_of_directory(scene: &Scene) -> Outcome {
    read_beneath(scene.gift(), text(c"link"))
}

pub(crate) fn stat_root(_: &Scene) -> Outcome {
    let mut facts = [0_u8; 256];
    does(libc::SYS_newfstatat, [int(libc::AT_FDCWD), text(c"/"), at_mut(&mut facts), 0])
}

pub(crate) fn chdir(_: &Scene) -> Outcome {
    does(libc::SYS_chdir, [text(c"/")])
}

pub(crate) fn fchdir(scene: &Scene) -> Outcome {
    does(libc::SYS_fchdir, [scene.gift()])
}

pub(crate) fn memfd_create(_: &Scene) -> Outcome {
    let file = call(libc::SYS_memfd_create, [text(c"own"), 0])?;
    let written = call(libc::SYS_write, [file, at(&MARK), 1])?;
    effect(written == 1)
}

pub(crate) fn pipe2(_: &Scene) -> Outcome {
    let mut ends = [-1_i32; 2];
    does(libc::SYS_pipe2, [at_mut(&mut ends), 0])?;
    effect(ends[0] >= 0 && ends[1] >= 0)
}

pub(crate) fn dup(scene: &Scene) -> Outcome {
    opens(libc::SYS_dup, [scene.gift()])
}

pub(crate) fn dup3(scene: &Scene) -> Outcome {
    // Over standard output, which then is another file.
    opens(libc::SYS_dup3, [scene.gift(), 1, 0])
}

/// A given file of the node's is sealed, so that the node can no longer write to it.
pub(crate) fn seal(scene: &Scene) -> Outcome {
    does(libc::SYS_fcntl, [scene.gift(), int(libc::F_ADD_SEALS), int(libc::F_SEAL_WRITE)])?;
    effect(call(libc::SYS_fcntl, [scene.gift(), int(libc::F_GET_SEALS)])? & int(libc::F_SEAL_WRITE) != 0)
}

pub(crate) fn ftruncate(scene: &Scene) -> Outcome {
    does(libc::SYS_ftruncate, [scene.gift(), 0])
}

pub(crate) fn fallocate(scene: &Scene) -> Outcome {
    let hole = int(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE);
    does(libc::SYS_fallocate, [scene.gift(), hole, 0, 4096])
}

pub(crate) fn pread64(scene: &Scene) -> Outcome {
    let mut byte = 0_u8;
    does(libc::SYS_pread64, [scene.gift(), at_mut(&mut byte), 1, 0])?;
    effect(byte == MARK)
}

pub(crate) fn pwrite64(scene: &Scene) -> Outcome {
    let written = call(libc::SYS_pwrite64, [scene.gift(), at(&[7_u8]), 1, 0])?;
    effect(written == 1)
}

pub(crate) fn lseek(scene: &Scene) -> Outcome {
    does(libc::SYS_lseek, [scene.gift(), 0, int(libc::SEEK_END)])
}

/// A page of a given file goes into a pipe without being copied.
pub(crate) fn splice(scene: &Scene) -> Outcome {
    knock(libc::SYS_splice, [usize::MAX, 0, usize::MAX, 0, 1, 0]);
    let mut ends = [-1_i32; 2];
    does(libc::SYS_pipe2, [at_mut(&mut ends), 0])?;
    let mut offset = 0_u64;
    effect(call(libc::SYS_splice, [scene.gift(), at_mut(&mut offset), int(ends[1]), 0, 1, 0])? == 1)
}

pub(crate) fn sendfile(scene: &Scene) -> Outcome {
    knock(libc::SYS_sendfile, [usize::MAX, usize::MAX, 0, 1]);
    let to = call(libc::SYS_memfd_create, [text(c"to"), 0])?;
    let mut offset = 0_u64;
    effect(call(libc::SYS_sendfile, [to, scene.gift(), at_mut(&mut offset), 1])? == 1)
}

pub(crate) fn name_to_handle_at(scene: &Scene) -> Outcome {
    // Size, type, and the handle.
    let mut handle = [0_u32; 34];
    handle[0] = 128;
    let mut mount: libc::c_int = 0;
    let arguments = [scene.gift(), text(c""), at_mut(&mut handle), at_mut(&mut mount), int(libc::AT_EMPTY_PATH)];
    does(libc::SYS_name_to_handle_at, arguments)
}

pub(crate) fn inotify_init1(_: &Scene) -> Outcome {
    opens(libc::SYS_inotify_init1, [0])
}

pub(crate) fn epoll_create1(_: &Scene) -> Outcome {
    opens(libc::SYS_epoll_create1, [0])
}

pub(crate) fn eventfd2(_: &Scene) -> Outcome {
    call(libc::SYS_eventfd2, [0, 0]).map(drop)
}

pub(crate) fn close(scene: &Scene) -> Outcome {
    // Its own end of a pair, of which the node has the other.
    let Some(copy) = scene.given.get(1) else { return Err(NO_EFFECT) };
    does(libc::SYS_close, [int(std::os::fd::AsRawFd::as_raw_fd(copy))])
}

/// An `ioctl` that has nothing to do with KVM.
pub(crate) fn other_ioctl(scene: &Scene) -> Outcome {
    let on: libc::c_int = 1;
    does(libc::SYS_ioctl, [scene.gift(), usize::try_from(libc::FIONBIO).expect("64-bit"), at(&on)])
}

/// Opens the other end of a terminal by its descriptor.
pub(crate) fn open_terminal(scene: &Scene) -> Outcome {
    const TIOCGPTPEER: usize = 0x5441;
    opens(libc::SYS_ioctl, [scene.gift(), TIOCGPTPEER, int(libc::O_RDWR | libc::O_NOCTTY)])
}
