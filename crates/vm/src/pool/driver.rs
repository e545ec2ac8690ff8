//! The thread that starts the zygote, listens to it and to all workers, and sees them end.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use rustix::event::epoll;

use super::worker::Worker;
use super::{Inner, Zygote};
use crate::worker::channel::{Channel, ReceiveError, Received};
use crate::worker::protocol::{Failure, FromWorker, FromZygote, ToZygote};

/// What the zygote's channel is called among the events; workers have their numbers, which begin at 1.
const ZYGOTE: u64 = 0;
/// Before a zygote that ended is started again.
const RESTART_PAUSE: Duration = Duration::from_millis(200);

/// The thread's life. It is also the zygote's parent, which the kernel lets no zygote outlive.
pub(super) fn drive(inner: Arc<Inner>) {
    let mut buffer = Vec::new();
    let mut was_ready = false;
    loop {
        let ended = match start_zygote(&inner) {
            Ok(None) => return,
            Ok(Some((mut child, channel))) => {
                let ended = listen(&inner, &channel, &mut buffer);
                // It has hung up, or will when it finds that the other end has gone.
                channel.shut_down();
                see_out(&mut child);
                epoll::delete(&inner.events, &*channel).unwrap_or_default();
                ended
            }
            Err(error) => Failure {
                message: format!("the zygote could not be started: {error}"),
                remedy: "check that farfork's program file is still there".to_owned(),
                errno: error.raw_os_error().unwrap_or(0),
            },
        };
        let mut state = inner.lock();
        was_ready |= matches!(state.zygote, Zygote::Ready(_));
        // Before its workers are forgotten: whoever asks for one afterwards is refused, so that none is forgotten about.
        state.zygote = Zygote::Failed(ended);
        state.zygote_channel = None;
        // One that never was there will not be there next time; one that was is tried again until the host can have it.
        let is_over = state.is_stopping || !was_ready;
        drop(state);
        forget_all(&inner);
        inner.changed.notify_all();
        if is_over {
            return;
        }
        std::thread::sleep(RESTART_PAUSE);
    }
}

/// `None` if the pool is stopping.
fn start_zygote(inner: &Inner) -> io::Result<Option<(Child, Arc<Channel>)>> {
    let (ours, theirs) = Channel::pair()?;
    let ours = Arc::new(ours);
    {
        let mut state = inner.lock();
        if state.is_stopping {
            return Ok(None);
        }
        // What it is stopped by, whatever it is at.
        state.zygote_channel = Some(Arc::clone(&ours));
    }
    let (program, arguments) = &inner.settings.zygote;
    let stdin = Stdio::from(theirs.into_descriptor());
    let mut child = Command::new(program).args(arguments).stdin(stdin).stdout(Stdio::null()).env_clear().spawn()?;
    let listened = epoll::add(&inner.events, &*ours, epoll::EventData::new_u64(ZYGOTE), epoll::EventFlags::IN);
    let admitted = inner.groups.as_ref().map_or(Ok(()), |groups| groups.admit_zygote(child.id()));
    if let Err(error) = listened.map_err(io::Error::from).and(admitted.map_err(io::Error::other)) {
        ours.shut_down();
        see_out(&mut child);
        return Err(error);
    }
    let hello = ToZygote::Hello { facts: Box::new(inner.host.facts.clone()), jail: inner.settings.jail.clone() };
    // A zygote that is gone already has closed its end; the first receive then says so.
    let mut devices = vec![crate::sys::borrow_fd(inner.host.kvm())];
    devices.extend(inner.host.faults().map(AsFd::as_fd));
    ours.send(&hello, &devices).unwrap_or_default();
    Ok(Some((child, ours)))
}

/// Waits for a zygote whose channel is closed; not for ever.
fn see_out(child: &mut Child) {
    for _ in 0..200 {
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    child.kill().unwrap_or_default();
    child.wait().map(drop).unwrap_or_default();
}

/// Until the zygote is gone; says why.
fn listen(inner: &Arc<Inner>, zygote: &Arc<Channel>, buffer: &mut Vec<u8>) -> Failure {
    let mut happened = Vec::with_capacity(256);
    loop {
        happened.clear();
        let waited =
            rustix::io::retry_on_intr(|| epoll::wait(&inner.events, rustix::buffer::spare_capacity(&mut happened), None));
        if let Err(error) = waited {
            return Failure { message: format!("epoll_wait failed: {error}"), remedy: "restart the node".into(), errno: 0 };
        }
        for event in happened.drain(..) {
            match event.data.u64() {
                ZYGOTE => {
                    if let Err(failure) = hear_zygote(inner, zygote, buffer) {
                        return failure;
                    }
                }
                number => {
                    let worker = inner.lock().workers.get(&number).cloned();
                    if let Some(worker) = worker {
                        hear_worker(inner, &worker, buffer);
                    }
                }
            }
        }
    }
}

fn hear_zygote(inner: &Inner, zygote: &Arc<Channel>, buffer: &mut Vec<u8>) -> Result<(), Failure> {
    let Received { message, descriptors } = zygote.receive::<FromZygote>(buffer).map_err(|error| {
        let remedy = "look for its last words in the node's log".to_owned();
        Failure { message: format!("the zygote ended: {error}"), remedy, errno: 0 }
    })?;
    let worker_of = |number| inner.lock().workers.get(&number).cloned();
    match message {
        FromZygote::Ready => {
            inner.lock().zygote = Zygote::Ready(Arc::clone(zygote));
            inner.changed.notify_all();
        }
        FromZygote::Failed(failure) => return Err(failure),
        FromZygote::Spawned { worker, pid } => {
            let pidfd: Option<OwnedFd> = descriptors.into_iter().next();
            if let Some(worker) = worker_of(worker) {
                if pidfd.is_none() {
                    // It finds nobody at the other end, and ends.
                    worker.channel.shut_down();
                }
                worker.deliver(|mail| match pidfd {
                    Some(pidfd) => (mail.pid, mail.pidfd) = (Some(pid), Some(pidfd)),
                    None => mail.failed = Some(no_descriptor()),
                });
            }
        }
        FromZygote::NotSpawned { worker, errno } => {
            if let Some(worker) = worker_of(worker) {
                let error = io::Error::from_raw_os_error(errno);
                let message = format!("a worker could not be forked: {error}");
                let remedy = "raise the limits on processes and threads (ulimit -u, pids.max, kernel.pid_max)".to_owned();
                worker.deliver(|mail| mail.failed = Some(Failure { message, remedy, errno }));
                forget(inner, &worker);
            }
        }
        FromZygote::Exited { worker, how } => {
            if let Some(worker) = worker_of(worker) {
                // What it said before it ended is still in its channel.
                while drain(&worker, buffer) == Said::Something {}
                see_off(inner, &worker, Some(how));
            }
        }
    }
    Ok(())
}

fn no_descriptor() -> Failure {
    Failure {
        message: "this process has no room for the descriptor of a worker".to_owned(),
        remedy: "raise the limit on open files (ulimit -n), or end other machines".to_owned(),
        errno: libc::EMFILE,
    }
}

fn hear_worker(inner: &Inner, worker: &Arc<Worker>, buffer: &mut Vec<u8>) {
    if drain(worker, buffer) == Said::NoMore {
        // It has hung up. Most likely it is on its way out, and its zygote will say how; if not, this ends it.
        epoll::delete(&inner.events, worker).unwrap_or_default();
        worker.end_process();
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Said {
    Something,
    Nothing,
    /// And will not say anything again.
    NoMore,
}

/// Takes one message if there is one.
fn drain(worker: &Arc<Worker>, buffer: &mut Vec<u8>) -> Said {
    match worker.channel.try_receive::<FromWorker>(buffer) {
        Ok(Some(received)) => {
            worker.take(received);
            Said::Something
        }
        Ok(None) => Said::Nothing,
        Err(ReceiveError::Gone) => Said::NoMore,
        Err(error) => {
            // Not one of ours any more, whatever it is.
            worker.condemn(format!("its worker said something that cannot be: {error}"));
            Said::NoMore
        }
    }
}

/// A worker is gone.
fn see_off(inner: &Inner, worker: &Arc<Worker>, how: Option<crate::worker::protocol::Exit>) {
    let (machine, ended) = worker.has_exited(how);
    if let Some(machine) = machine {
        inner.lock().ends.retain(|subscriber| subscriber.send((machine, ended.clone())).is_ok());
    }
    forget(inner, worker);
}

/// Gives back what the pool had for a worker that is gone.
fn forget(inner: &Inner, worker: &Arc<Worker>) {
    epoll::delete(&inner.events, worker.as_fd()).unwrap_or_default();
    worker.release_host_image();
    let group = worker.group.lock().unwrap_or_else(PoisonError::into_inner).take();
    // The kernel may take a moment to see that it is empty; others wait for that, everybody waits for this thread.
    let left = group.and_then(|mut group| (!group.remove()).then_some(group));
    let mut state = inner.lock();
    state.groups_left.extend(left);
    state.workers.remove(&worker.number);
    if let Some(shelf) = state.shelves.get_mut(&worker.class) {
        shelf.forget(worker);
    }
    drop(state);
    inner.changed.notify_all();
}

/// The zygote is gone, and the kernel has killed its workers.
fn forget_all(inner: &Inner) {
    let workers: Vec<Arc<Worker>> = inner.lock().workers.values().cloned().collect();
    for worker in workers {
        worker.channel.shut_down();
        see_off(inner, &worker, None);
    }
}
