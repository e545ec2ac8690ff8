//! The raw system calls with which the escape harness tries to break out of a jail.
//!
//! What an attempt does to its process is nobody's concern: it runs in a worker that is asked for nothing afterwards but what
//! came of it, and that is killed then. Its machine is at rest, so that nobody else reads what an attempt overwrites. This
//! holds for every [`call`] and is the reason why that function, private to this module, is not an unsafe one.

pub(crate) mod files;
pub(crate) mod kernel;
pub(crate) mod kvm;
pub(crate) mod limits;
pub(crate) mod memory;
pub(crate) mod node;
pub(crate) mod privileges;
pub(crate) mod process;
pub(crate) mod sockets;

use std::ffi::CStr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// What an attempt may use.
#[derive(Debug)]
pub(crate) struct Scene {
    /// What the node has sent along.
    pub(crate) given: Vec<OwnedFd>,
    /// And a number: a process, a port, a key.
    pub(crate) number: u64,
    /// Where a page of guest RAM is in this process; it holds [`MARK`] and nothing that the guest needs.
    pub(crate) page: usize,
    /// The machine's VM.
    pub(crate) vm: RawFd,
    /// Its first vCPU.
    pub(crate) vcpu: RawFd,
}

/// What an attempt came to: nothing, or the error number.
pub(crate) type Outcome = Result<(), i32>;

/// The calls were taken, but what they should have done was not done.
pub(crate) const NO_EFFECT: i32 = 255;
/// What the page of a [`Scene`] is full of.
pub(crate) const MARK: u8 = 0xA5;
const PAGE_SIZE: usize = 4096;

impl Scene {
    /// The first descriptor that was sent along.
    fn gift(&self) -> usize {
        int(self.given.first().map_or(-1, AsRawFd::as_raw_fd))
    }

    /// The number, as a process.
    fn process(&self) -> usize {
        usize::try_from(self.number).expect("64-bit")
    }
}

/// Makes a system call (see the module).
fn call<const N: usize>(number: libc::c_long, arguments: [usize; N]) -> Result<usize, i32> {
    let mut all = [0; 6];
    all[..N].copy_from_slice(&arguments);
    let [a, b, c, d, e, f] = all;
    // SAFETY: pointers among the arguments are to live values of the caller or to the pages that an attempt is about. What
    // else the call does to this process is nobody's concern, as the module says.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if result == -1 { Err(last_error()) } else { Ok(result.cast_unsigned().try_into().expect("64-bit")) }
}

/// A call that only has to be taken.
fn does<const N: usize>(number: libc::c_long, arguments: [usize; N]) -> Outcome {
    call(number, arguments).map(drop)
}

/// A call that cannot succeed, so that a filter that refuses it refuses this one, and not what prepares the real one.
fn knock<const N: usize>(number: libc::c_long, arguments: [usize; N]) {
    call(number, arguments).map(drop).unwrap_or_default();
}

/// A call that makes a descriptor: succeeds if it is one.
fn opens<const N: usize>(number: libc::c_long, arguments: [usize; N]) -> Outcome {
    let descriptor = call(number, arguments)?;
    does(libc::SYS_fcntl, [descriptor, int(libc::F_GETFD)])
}

fn last_error() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

/// A signed number as an argument.
fn int(value: libc::c_int) -> usize {
    (value as isize).cast_unsigned()
}

fn text(value: &CStr) -> usize {
    value.as_ptr() as usize
}

/// Where the kernel may read.
fn at<T: ?Sized>(value: &T) -> usize {
    std::ptr::from_ref(value).cast::<()>() as usize
}

/// Where the kernel may write.
fn at_mut<T: ?Sized>(value: &mut T) -> usize {
    std::ptr::from_mut(value).cast::<()>() as usize
}

/// Whether what should have been done was.
fn effect(is_there: bool) -> Outcome {
    if is_there { Ok(()) } else { Err(NO_EFFECT) }
}

/// The process itself, by the name it has in its own namespace.
fn this_process() -> Result<usize, i32> {
    call(libc::SYS_getpid, [])
}

/// The first byte of a page of this process, by way of the kernel: an error where nothing is mapped.
fn peek(address: usize) -> Result<u8, i32> {
    let mut byte = 0_u8;
    let (to, from) = ([at_mut(&mut byte), 1], [address, 1]);
    call(libc::SYS_process_vm_readv, [this_process()?, at(&to), 1, at(&from), 1, 0])?;
    Ok(byte)
}

/// Writes to this process's memory by way of the kernel.
fn poke(address: usize, bytes: &[u8]) -> Outcome {
    let (from, to) = ([at(bytes), bytes.len()], [address, bytes.len()]);
    does(libc::SYS_process_vm_writev, [this_process()?, at(&from), 1, at(&to), 1, 0])
}
