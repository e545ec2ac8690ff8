//! What survives freeze and fork beside memory: registers, vectors, MSRs, timers, interrupts, clocks, devices.

use types::GuestAddress;
use vm::harness::{child, child_at_rest, class, count, held, host, parent, seed};
use vm::machine::Machine;
use vm::probe::{Command, Fault, MESSAGE_VECTOR, PATIENCE, Probe};

fn vector_bytes() -> u64 {
    if std::arch::is_x86_feature_detected!("avx") { 32 } else { 16 }
}

fn wait_until_held(machine: &Machine, vcpu: usize) {
    let started = std::time::Instant::now();
    while !Probe::on(machine, vcpu).is_held().unwrap() {
        assert!(started.elapsed() < PATIENCE, "the guest does not hold its registers");
        std::thread::yield_now();
    }
}

#[test]
fn general_and_vector_registers_survive_in_every_child() {
    let host = host();
    let mut dice = fastrand::Rng::with_seed(seed());
    let vcpus = 2;
    let mut parent = parent(&host, class(4, vcpus));
    let hold = Command::Hold { vector_bytes: vector_bytes() };
    let mut pending = Vec::new();
    for vcpu in 0..usize::from(vcpus) {
        let buffer: Vec<u8> = std::iter::repeat_with(|| dice.u8(..)).take(512).collect();
        Probe::on(&parent, vcpu).set_buffer(&buffer).unwrap();
        pending.push(Probe::on(&parent, vcpu).post(hold).unwrap());
        wait_until_held(&parent, vcpu);
    }
    let image = parent.freeze(&host).unwrap().image;
    let children = count(5, 1000);
    for n in 0..children {
        let child = child(&host, &image);
        for vcpu in 0..usize::from(vcpus) {
            let probe = Probe::on(&child, vcpu);
            let [changed, ..] = probe.stop(probe.inherited(hold).unwrap()).unwrap();
            assert_eq!(changed, 0, "{changed} registers of vCPU {vcpu} of child {n} changed");
        }
    }
    for (vcpu, pending) in pending.into_iter().enumerate() {
        assert_eq!(Probe::on(&parent, vcpu).stop(pending).unwrap()[0], 0, "the parent's own registers changed");
    }
    held("children whose registers are their parent's", children);
}

/// The test above would be worth nothing if the probe did not notice a change.
#[test]
fn a_changed_register_is_noticed() {
    let host = host();
    let mut parent = parent(&host, class(4, 1));
    Probe::of(&parent).set_buffer(&[7; 512]).unwrap();
    let pending = Probe::of(&parent).post(Command::Hold { vector_bytes: vector_bytes() }).unwrap();
    wait_until_held(&parent, 0);
    parent.pause().unwrap();
    // What the registers are compared with, changed in one general and one vector register.
    let mut buffer = [7; 512];
    (buffer[0], buffer[511]) = (8, 8);
    Probe::of(&parent).set_buffer(&buffer).unwrap();
    parent.resume();
    let [changed, ..] = Probe::of(&parent).stop(pending).unwrap();
    // The vector registers are 32 bytes apart in the buffer; with 16-byte ones its last byte is in none.
    assert_eq!(changed, if vector_bytes() == 32 { 3 } else { 2 });
}

#[test]
fn every_register_that_kvm_shows_is_restored() {
    let host = host();
    let mut parent = parent(&host, class(4, 2));
    // Values that no default has: LSTAR, KERNEL_GS_BASE, TSC_AUX, PAT.
    let msrs = [(0xC000_0082, 0x1234_5000), (0xC000_0102, 0x7FFF_1234_5000), (0xC000_0103, 3), (0x277, 0x0007_0406_0007_0406)];
    // An entry of the IOAPIC: its register select and window, written by the guest.
    let fresh = parent.freeze(&host).unwrap().image;
    for at in [0xFEC0_0000, 0xFEC0_0010] {
        Probe::of(&parent).call(Command::Fault(Fault::Write(GuestAddress(at)))).unwrap();
    }
    parent.pause().unwrap();
    for (index, value) in msrs {
        parent.set_msr(index, value);
    }
    let image = parent.freeze(&host).unwrap().image;
    let child = child_at_rest(&host, &image);
    assert_eq!(child.state_differences(&host, &image).unwrap(), Vec::<String>::new());
    let other = child_at_rest(&host, &fresh).state_differences(&host, &image).unwrap();
    assert!(other.iter().any(|what| what == "interrupt controller 2"), "a changed IOAPIC goes unnoticed: {other:?}");
    child.set_msr(0xC000_0102, 0x1000);
    let differences = child.state_differences(&host, &image).unwrap();
    assert!(differences.iter().any(|what| what.contains("0xc0000102")), "a changed MSR goes unnoticed: {differences:?}");
}

#[test]
fn the_timer_ticks_on_in_each_child_and_no_tick_repeats() {
    let host = host();
    let mut parent = parent(&host, class(4, 1));
    // About 1 ms: the APIC's timer counts nanoseconds, divided by 1.
    Probe::of(&parent).call(Command::Ticks { initial_count: 1_000_000, divide: 0xB }).unwrap();
    let [_, at_least, ..] = Probe::of(&parent).call(Command::WaitTicks { count: 10 }).unwrap();
    assert!(at_least >= 10);
    let children = count(10, 1000);
    let mut last = at_least;
    for n in 0..children {
        let mut machine = child(&host, &parent.freeze(&host).unwrap().image);
        let [before, after, ..] = Probe::of(&machine).call(Command::WaitTicks { count: 10 }).unwrap();
        assert!(before >= last, "child {n} counts from {before}, after {last}");
        assert!(after >= before + 10, "child {n}: {before} to {after}");
        // A child of the child goes on from there.
        if n % 10 == 0 {
            let grandchild = child(&host, &machine.freeze(&host).unwrap().image);
            let [before, after_again, ..] = Probe::of(&grandchild).call(Command::WaitTicks { count: 10 }).unwrap();
            assert!(before >= after && after_again >= before + 10, "grandchild {n}: {before} to {after_again}");
        }
        let [before, after, ..] = Probe::of(&parent).call(Command::WaitTicks { count: 1 }).unwrap();
        assert!(before >= last && after > before, "the parent's ticks went from {last} to {before}, {after}");
        last = after;
    }
    held("children whose timer ticks on", children);
}

#[test]
fn an_interrupt_that_was_pending_is_delivered_once_in_each_child() {
    let host = host();
    let mut parent = parent(&host, class(4, 1));
    parent.pause().unwrap();
    parent.interrupt(MESSAGE_VECTOR).unwrap();
    assert_eq!(Probe::of(&parent).messages().unwrap(), 0);
    let image = parent.freeze(&host).unwrap().image;
    let children = count(5, 1000);
    for n in 0..children {
        let child = child(&host, &image);
        Probe::of(&child).call(Command::Spin { rounds: Some(1000) }).unwrap();
        assert_eq!(Probe::of(&child).messages().unwrap(), 1, "child {n}");
    }
    parent.resume();
    Probe::of(&parent).call(Command::Spin { rounds: Some(1000) }).unwrap();
    assert_eq!(Probe::of(&parent).messages().unwrap(), 1, "the parent");
    held("children with the interrupt that was pending", children);
}

#[test]
fn clocks_never_run_backwards() {
    let host = host();
    let mut parent = parent(&host, class(4, 1));
    let clock = |machine: &Machine| {
        let [tsc, nanoseconds, version, _] = Probe::of(machine).call(Command::Clock).unwrap();
        assert!(version >= 2, "the guest has no kvmclock");
        (tsc, nanoseconds)
    };
    let children = count(20, 1000);
    let mut last = clock(&parent);
    for n in 0..children {
        let before = clock(&parent);
        assert!(before.0 > last.0 && before.1 > last.1, "the parent's clock went from {last:?} to {before:?}");
        let image = parent.freeze(&host).unwrap().image;
        // The image sleeps for a while; the guest's clock does not show it.
        std::thread::sleep(std::time::Duration::from_millis(n % 3 * 5));
        let child = child(&host, &image);
        let after = clock(&child);
        assert!(after.0 > before.0, "TSC of child {n}: {before:?} to {after:?}");
        assert!(after.1 > before.1, "kvmclock of child {n}: {before:?} to {after:?}");
        let later = clock(&child);
        assert!(later.0 > after.0 && later.1 >= after.1, "child {n}: {after:?} to {later:?}");
        last = clock(&parent);
    }
    held("children whose clocks did not run backwards", children);
}

#[test]
fn the_serial_port_keeps_its_input_and_starts_with_an_empty_console() {
    let host = host();
    let mut parent = parent(&host, class(4, 1));
    Probe::of(&parent).set_buffer(b"before").unwrap();
    Probe::of(&parent).call(Command::Print { bytes: 6 }).unwrap();
    parent.type_in(b"typed").unwrap();
    let image = parent.freeze(&host).unwrap().image;
    let child = child(&host, &image);
    assert_eq!(child.console().contents(), (vec![], 0), "a child's console is its own");
    assert!(child.type_in(&[0; 64]).is_err(), "the parent's input is there, so less room is");
    Probe::of(&child).set_buffer(b"after").unwrap();
    Probe::of(&child).call(Command::Print { bytes: 5 }).unwrap();
    assert_eq!(child.console().contents().0, b"after");
    assert_eq!(parent.console().contents().0, b"before");
}
