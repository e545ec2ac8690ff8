//! Attempts at privileges: namespaces, mounts, names, and what needs a capability.

use super::process::in_child;
use super::{Outcome, Scene, at, call, does, effect, int, knock, opens, text};

/// The host's name, for a worker that can change it.
pub(crate) const HOSTNAME: &std::ffi::CStr = c"farfork-escaped";

/// No namespace that there is.
const NO_NAMESPACE: usize = usize::MAX;

pub(crate) fn user_namespace(_: &Scene) -> Outcome {
    knock(libc::SYS_unshare, [NO_NAMESPACE]);
    in_child(|| does(libc::SYS_unshare, [int(libc::CLONE_NEWUSER)]))
}

pub(crate) fn net_namespace(_: &Scene) -> Outcome {
    knock(libc::SYS_unshare, [NO_NAMESPACE]);
    in_child(|| does(libc::SYS_unshare, [int(libc::CLONE_NEWNET)]))
}

pub(crate) fn mount(_: &Scene) -> Outcome {
    knock(libc::SYS_mount, [0, 0, 0, 0, 0]);
    in_child(|| {
        does(libc::SYS_unshare, [int(libc::CLONE_NEWNS)])?;
        does(libc::SYS_mount, [text(c"none"), text(c"/"), text(c"tmpfs"), 0, 0])
    })
}

pub(crate) fn chroot(_: &Scene) -> Outcome {
    knock(libc::SYS_chroot, [text(c"")]);
    in_child(|| does(libc::SYS_chroot, [text(c"/")]))
}

pub(crate) fn own_hostname(_: &Scene) -> Outcome {
    knock(libc::SYS_unshare, [NO_NAMESPACE]);
    in_child(|| {
        does(libc::SYS_unshare, [int(libc::CLONE_NEWUTS)])?;
        set_hostname()
    })
}

/// Of the namespace that it is in. The node looks whether that is the host's.
pub(crate) fn host_hostname(_: &Scene) -> Outcome {
    set_hostname()
}

fn set_hostname() -> Outcome {
    does(libc::SYS_sethostname, [text(HOSTNAME), HOSTNAME.count_bytes()])
}

pub(crate) fn bpf(_: &Scene) -> Outcome {
    // BPF_MAP_CREATE: an array of one entry.
    let attributes = [2_u32, 4, 8, 1, 0, 0, 0, 0, 0, 0, 0, 0];
    opens(libc::SYS_bpf, [0, at(&attributes), size_of_val(&attributes)])
}

pub(crate) fn raise_priority(_: &Scene) -> Outcome {
    does(libc::SYS_setpriority, [0, 0, int(-5)])?;
    effect(call(libc::SYS_getpriority, [0, 0])? == 25)
}

/// Opens by its handle a directory that is given. Handles can be guessed: who may do this may open any file.
pub(crate) fn open_by_handle(scene: &Scene) -> Outcome {
    let mut handle = [0_u32; 34];
    handle[0] = 128;
    let mut mount: libc::c_int = 0;
    let (directory, handle_at) = (scene.gift(), super::at_mut(&mut handle));
    let arguments = [directory, text(c""), handle_at, super::at_mut(&mut mount), int(libc::AT_EMPTY_PATH)];
    does(libc::SYS_name_to_handle_at, arguments)?;
    opens(libc::SYS_open_by_handle_at, [directory, handle_at, int(libc::O_PATH)])
}
