//! The zygote: a small process of one thread, from which workers are forked. It has made no VM, holds the one device that they
//! need, has an empty root and no network, and knows of nothing else.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;

use rustix::event::epoll;
use rustix::process::{Signal, WaitId, WaitIdOptions};

use super::channel::{Channel, ReceiveError};
use super::protocol::{Exit, Failure, FromWorker, FromZygote, ToZygote};
use super::{Shared, builder};
use crate::host::{Host, HostFacts};
use crate::jail::Jail;
use crate::jail::apply::{self, Failed};
use crate::jail::syscalls::{Filters, confine_thread};
use crate::sys::process::{self, Child};
use crate::sys::uffd::Device;
use crate::sys::{copier, kvm};

/// The whole program of a zygote: what a node's binary does when it is started for that. Its node is on the other end of
/// standard input.
#[must_use]
pub fn main() -> ExitCode {
    match live() {
        Ok(()) => ExitCode::SUCCESS,
        Err((step, error)) => {
            eprintln!("farfork zygote: {step} failed: {error}");
            ExitCode::FAILURE
        }
    }
}

fn live() -> Result<(), Failed> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(failed("PR_SET_PDEATHSIG"))?;
    process::keep_heap_in_one_piece();
    process::die_of_faults();
    let channel = Channel::over(std::io::stdin().as_fd().try_clone_to_owned().map_err(|error| ("taking its socket", error))?);
    let null = std::fs::File::open("/dev/null").map_err(|error| ("opening /dev/null", error))?;
    rustix::stdio::dup2_stdin(&null).map_err(failed("closing standard input"))?;
    let mut buffer = Vec::new();
    let greeting = channel.receive::<ToZygote>(&mut buffer).map_err(|error| ("receiving", io::Error::other(error)))?;
    let mut devices = greeting.descriptors.into_iter();
    let (ToZygote::Hello { facts, jail }, Some(kvm)) = (greeting.message, devices.next()) else {
        return Err(("receiving", io::Error::other("the node did not say hello")));
    };
    match Zygote::confine(&channel, (kvm, devices.next()), *facts, jail) {
        Ok(mut zygote) => zygote.serve(&mut buffer),
        Err((step, error)) => {
            let message = format!("the zygote cannot be confined: {step} failed: {error}");
            let remedy = "run farfork doctor: it lists what is missing, and what to do".to_owned();
            let failure = Failure { message, remedy, errno: error.raw_os_error().unwrap_or(0) };
            channel.send(&FromZygote::Failed(failure), &[]).map_err(|error| ("sending", error))
        }
    }
}

fn failed(step: &'static str) -> impl Fn(rustix::io::Errno) -> Failed {
    move |error| (step, error.into())
}

struct Zygote<'a> {
    channel: &'a Channel,
    kvm: OwnedFd,
    faults: Option<OwnedFd>,
    proc: OwnedFd,
    facts: HostFacts,
    jail: Jail,
    filters: Filters,
    events: OwnedFd,
    /// Workers that live, by number.
    children: HashMap<u64, Child>,
}

/// What the channel is called among the events; workers have their numbers, which begin at 1.
const CHANNEL: u64 = 0;

impl<'a> Zygote<'a> {
    fn confine(
        channel: &'a Channel,
        (kvm, faults): (OwnedFd, Option<OwnedFd>),
        facts: HostFacts,
        jail: Jail,
    ) -> Result<Self, Failed> {
        let filters = Filters::compile().map_err(|error| ("compiling the filters of system calls", error))?;
        let events = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed("epoll_create"))?;
        epoll::add(&events, channel, epoll::EventData::new_u64(CHANNEL), epoll::EventFlags::IN).map_err(failed("epoll_ctl"))?;
        let proc = apply::confine_zygote(&jail)?;
        confine_thread(&jail, &filters.zygote).map_err(|error| ("the filter of system calls", error))?;
        channel.send(&FromZygote::Ready, &[]).map_err(|error| ("sending", error))?;
        Ok(Self { channel, kvm, faults, proc, facts, jail, filters, events, children: HashMap::new() })
    }

    fn serve(&mut self, buffer: &mut Vec<u8>) -> Result<(), Failed> {
        let mut happened = Vec::with_capacity(64);
        loop {
            happened.clear();
            let waited =
                rustix::io::retry_on_intr(|| epoll::wait(&self.events, rustix::buffer::spare_capacity(&mut happened), None));
            waited.map_err(failed("epoll_wait"))?;
            for event in happened.drain(..) {
                match event.data.u64() {
                    CHANNEL => match self.obey(buffer) {
                        Ok(()) => {}
                        // The node has gone, or wants no more workers. Those that live go with their zygote.
                        Err(ReceiveError::Gone) => return Ok(()),
                        Err(error) => return Err(("receiving", io::Error::other(error))),
                    },
                    worker => self.reap(worker)?,
                }
            }
        }
    }

    fn obey(&mut self, buffer: &mut Vec<u8>) -> Result<(), ReceiveError> {
        let received = self.channel.receive::<ToZygote>(buffer)?;
        let ToZygote::Spawn { worker, uid } = received.message else {
            return Err(io::Error::other("an order that is not for a zygote").into());
        };
        let mut descriptors = received.descriptors.into_iter();
        let Some(socket) = descriptors.next() else {
            // There was no room for it here.
            return Ok(self.channel.send(&FromZygote::NotSpawned { worker, errno: libc::EMFILE }, &[])?);
        };
        let groups: Vec<OwnedFd> = descriptors.collect();
        let namespaces = apply::namespaces_of_worker(&self.jail);
        match process::fork_into(namespaces, || self.be_worker(socket, &groups, uid)) {
            Ok(child) => {
                let flags = epoll::EventFlags::IN;
                if let Err(error) = epoll::add(&self.events, &child.pidfd, epoll::EventData::new_u64(worker), flags) {
                    // Nobody would see it end.
                    rustix::process::pidfd_send_signal(&child.pidfd, Signal::KILL).unwrap_or_default();
                    let reaped = rustix::process::waitid(WaitId::PidFd(child.pidfd.as_fd()), WaitIdOptions::EXITED);
                    reaped.map(drop).unwrap_or_default();
                    return Ok(self.channel.send(&FromZygote::NotSpawned { worker, errno: error.raw_os_error() }, &[])?);
                }
                self.channel.send(&FromZygote::Spawned { worker, pid: child.pid }, &[child.pidfd.as_fd()])?;
                self.children.insert(worker, child);
            }
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(libc::EIO);
                self.channel.send(&FromZygote::NotSpawned { worker, errno }, &[])?;
            }
        }
        Ok(())
    }

    fn reap(&mut self, worker: u64) -> Result<(), Failed> {
        let Some(child) = self.children.get(&worker) else { return Ok(()) };
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        let status = rustix::process::waitid(WaitId::PidFd(child.pidfd.as_fd()), options).map_err(failed("waitid"))?;
        let Some(status) = status else { return Ok(()) };
        let signal = status.terminating_signal().map(Exit::Signal);
        let how = signal.or(status.exit_status().map(Exit::Status)).unwrap_or(Exit::Status(-1));
        // Closing it takes it off the events.
        self.children.remove(&worker);
        self.channel.send(&FromZygote::Exited { worker, how }, &[]).map_err(|error| ("sending", error))
    }

    /// The life of a worker. Runs in the new process.
    fn be_worker(&self, socket: OwnedFd, groups: &[OwnedFd], uid: u32) -> Infallible {
        // First, so that all it allocates counts.
        let entered = groups.iter().try_for_each(|group| rustix::io::write(group, b"0").map(drop));
        let mut kept = vec![self.kvm.as_fd(), self.proc.as_fd(), socket.as_fd()];
        kept.extend(self.faults.as_ref().map(AsFd::as_fd));
        process::close_all_but(&kept);
        process::ignore_children();
        copier::leave_reaping_to_the_kernel();
        let channel = Channel::over(socket);
        let inherit = |fd: &OwnedFd| fd.try_clone().map_err(|error| ("duplicating a descriptor", error));
        let confined = entered.map_err(failed("entering its control groups"));
        let host = confined
            .and_then(|()| inherit(&self.proc))
            .and_then(|proc| apply::confine_worker(&self.jail, proc, uid))
            .and_then(|pagemap| {
                let kvm = kvm::from_descriptor(inherit(&self.kvm)?);
                let faults = self.faults.as_ref().map(inherit).transpose()?.map(Device::over);
                let mut kept = vec![channel.as_fd(), pagemap.as_fd(), crate::sys::borrow_fd(&kvm)];
                kept.extend(faults.as_ref().map(AsFd::as_fd));
                process::close_all_but(&kept);
                Ok(Host::handed_down(kvm, pagemap, faults, self.facts.clone()))
            });
        let host = match host {
            Ok(host) => host,
            Err((step, error)) => {
                let message = format!("the worker cannot be confined: {step} failed: {error}");
                let remedy = "run farfork doctor: it lists what is missing, and what to do".to_owned();
                let failure = Failure { message, remedy, errno: error.raw_os_error().unwrap_or(0) };
                channel.send(&FromWorker::Failed(failure), &[]).unwrap_or_default();
                process::exit(1)
            }
        };
        match Shared::new(channel, self.filters.clone(), self.jail.clone()) {
            Ok(shared) => {
                super::report_panics(&shared);
                builder::live(host, Arc::clone(&shared))
            }
            Err(_) => process::exit(1),
        }
    }
}
