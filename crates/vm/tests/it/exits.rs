//! Every way in which a guest or its host can end a machine has its reason from the closed list.

use std::time::{Duration, Instant};

use types::{GuestAddress, Reason};
use vm::harness::{child, class, host, parent};
use vm::probe::{self, Command, Fault, Probe, ProbeError};
use vm::{Ended, Machine};

fn break_it(machine: &Machine, fault: Fault) -> ProbeError {
    Probe::of(machine).call(Command::Fault(fault)).unwrap_err()
}

#[test]
fn exceptions_of_the_guest_are_reported_with_their_address() {
    let host = host();
    let unmapped = GuestAddress(1 << 40);
    let cases = [
        (Fault::Undefined, 6, 0),
        (Fault::DivideByZero, 0, 0),
        (Fault::Privileged, 13, 0),
        (Fault::Read(unmapped), 14, unmapped.0),
        (Fault::Write(unmapped), 14, unmapped.0),
    ];
    let mut parent = parent(&host, class(2, 1));
    let image = parent.freeze(&host).unwrap().image;
    for (fault, vector, cr2) in cases {
        let child = child(&host, &image);
        let ProbeError::Exception(exception) = break_it(&child, fault) else { panic!("{fault:?} is no exception") };
        assert_eq!(exception.vector, vector, "{fault:?}: {exception:?}");
        assert!(vector != 14 || exception.cr2 == cr2, "{fault:?}: {exception:?}");
        assert_eq!(child.ended(), None, "an exception that the guest handles ends nothing");
    }
}

#[test]
fn a_triple_fault_ends_the_machine() {
    let host = host();
    let parent = parent(&host, class(2, 1));
    let ProbeError::Ended(ended) = break_it(&parent, Fault::Triple) else { panic!("no end") };
    assert_eq!(ended.reason, Reason::GuestTripleFault, "{ended}");
}

#[test]
fn an_address_without_a_device_reads_as_ones_and_ignores_writes() {
    let host = host();
    let parent = parent(&host, class(2, 1));
    let nowhere = GuestAddress(0xD000_0000);
    assert_eq!(Probe::of(&parent).call(Command::Fault(Fault::Read(nowhere))).unwrap()[0], u64::MAX);
    Probe::of(&parent).call(Command::Fault(Fault::Write(nowhere))).unwrap();
    assert_eq!(Probe::of(&parent).call(Command::Fault(Fault::Read(nowhere))).unwrap()[0], u64::MAX);
}

/// A page that its source has poisoned, or a slot without write access, comes out of KVM as an MMIO exit. Made-up bytes for
/// it would be silent corruption.
#[test]
fn mmio_inside_ram_ends_the_machine() {
    let host = host();
    let mut parent = parent(&host, class(4, 1));
    let at = GuestAddress(probe::first_work_page().byte_offset());
    parent.pause().unwrap();
    parent.forbid_writes().unwrap();
    let pending = Probe::of(&parent).post(Command::Fault(Fault::Write(at))).unwrap();
    parent.resume();
    let ProbeError::Ended(Ended { reason, detail }) = Probe::of(&parent).wait(pending).unwrap_err() else { panic!("no end") };
    assert_eq!(reason, Reason::RamUnavailable, "{detail}");
    assert!(detail.contains("came out as MMIO"), "{detail}");
}

#[test]
fn ram_that_the_host_cannot_give_ends_the_machine() {
    let host = host();
    let mut parent = parent(&host, class(4, 1));
    let image = parent.freeze(&host).unwrap().image;
    let child = child(&host, &image);
    let at = GuestAddress(probe::first_work_page().byte_offset() + 5 * 4096);
    child.forbid_page(at).unwrap();
    let ProbeError::Ended(ended) = break_it(&child, Fault::Read(at)) else { panic!("no end") };
    assert_eq!(ended.reason, Reason::RamUnavailable, "{ended}");
    // Its sibling and its parent notice nothing.
    assert_eq!(Probe::of(&parent).call(Command::Fault(Fault::Read(at))).unwrap()[0], 0);
    assert_eq!(Probe::of(&vm::harness::child(&host, &image)).call(Command::Fault(Fault::Read(at))).unwrap()[0], 0);
}

#[test]
fn one_vcpu_that_ends_brings_the_others_to_rest() {
    let host = host();
    let mut parent = parent(&host, class(4, 3));
    let spinning: Vec<_> = (1..3).map(|vcpu| Probe::on(&parent, vcpu).post(Command::Spin { rounds: None }).unwrap()).collect();
    let ProbeError::Ended(ended) = break_it(&parent, Fault::Triple) else { panic!("no end") };
    assert_eq!(ended.reason, Reason::GuestTripleFault);
    for (vcpu, pending) in (1..3).zip(spinning) {
        assert!(matches!(Probe::on(&parent, vcpu).stop(pending), Err(ProbeError::Ended(_))));
    }
    assert!(matches!(parent.freeze(&host), Err(vm::machine::FreezeError::Ended(_))), "an ended machine has no image");
    parent.resume();
    assert!(parent.ended().is_some(), "an ended machine stays ended");
}

#[test]
fn a_spinning_guest_comes_to_rest_and_goes_on_where_it_was() {
    let host = host();
    let mut parent = parent(&host, class(2, 2));
    let pending = Probe::on(&parent, 1).post(Command::Spin { rounds: None }).unwrap();
    for _ in 0..50 {
        parent.pause().unwrap();
        assert!(!parent.is_running());
        parent.resume();
    }
    let [rounds, ..] = Probe::on(&parent, 1).stop(pending).unwrap();
    assert!(rounds > 0);
}

/// A guest that waits for work uses no CPU time and is told of work that arrives at any moment.
#[test]
fn no_ring_is_slept_through() {
    let host = host();
    let parent = parent(&host, class(2, 1));
    let probe = Probe::of(&parent);
    let started = Instant::now();
    for n in 0..2000u64 {
        let [ticks, ..] = probe.call(Command::Ping).unwrap();
        assert_eq!(ticks, 0, "round {n}");
    }
    assert!(started.elapsed() < Duration::from_secs(60));
}
