//! Guests that break the rules, at each device: what they do is theirs to bear, and bounded.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vm_memory::{Bytes, GuestAddress};

use super::console::VirtioConsole;
use super::net::{self, Net};
use super::rng::Rng;
use super::testing::{DISK_BYTES, Descriptor, Driver, RAM_BYTES, RINGS, SIZE, STRIDE, USED, disk};
use super::transport::status;
use super::vsock::{self, STREAMS_MAX, Vsock};
use super::{Transport, VirtioDevice};
use crate::device::serial::Console;

/// Buffers, from here on.
const BUFFERS: u64 = 0x8000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

impl<D: VirtioDevice> Driver<D> {
    /// A device whose driver is done with its settings.
    fn new(device: D) -> Self {
        let mut driver = Self::reset(device);
        driver.set_up();
        driver
    }

    fn needs_reset(&self) -> bool {
        self.read(0x70) & status::NEEDS_RESET != 0
    }

    /// How many chains the device has given back, and the length that it said of the last.
    fn used(&self, queue: u16) -> (u16, u32) {
        let ring = RINGS + u64::from(queue) * STRIDE + USED;
        let count: u16 = self.ram.read_obj(GuestAddress(ring + 2)).expect("within");
        let last = u64::from(count.wrapping_sub(1) % SIZE);
        (count, self.ram.read_obj(GuestAddress(ring + 4 + last * 8 + 4)).expect("within"))
    }

    /// Offers one chain of these buffers, each written at [`BUFFERS`] and after.
    fn send(&mut self, queue: u16, readable: &[u8], writable: u32) -> u64 {
        let room = BUFFERS + 0x8000;
        self.ram.write_slice(readable, GuestAddress(BUFFERS)).expect("within");
        let len = u32::try_from(readable.len()).expect("short");
        let first = Descriptor { address: BUFFERS, len, flags: if writable > 0 { NEXT } else { 0 }, next: 1 };
        let second = Descriptor { address: room, len: writable, flags: WRITE, next: 0 };
        let queue_number = u64::from(queue);
        if readable.is_empty() {
            self.describe(queue_number, 0, second);
        } else {
            self.describe(queue_number, 0, first);
            self.describe(queue_number, 1, second);
        }
        self.offer(queue, 0);
        room
    }
}

/// Calls `check` with each device, freshly set up, and the number of its queues.
fn each_device(mut check: impl FnMut(&mut dyn Hostile)) {
    check(&mut Driver::new(disk()));
    check(&mut Driver::new(Rng));
    check(&mut Driver::new(VirtioConsole::new(Console::default())));
    check(&mut Driver::new(Net::new()));
    check(&mut Driver::new(Vsock::new()));
}

/// What a hostile guest does to any device.
trait Hostile {
    fn queues(&self) -> u16;
    fn chain(&mut self, queue: u16, descriptors: &[Descriptor]);
    fn jump(&mut self, queue: u16, index: u16);
    fn set(&mut self, register: u64, value: u32);
    fn get(&self, register: u64) -> u32;
    fn is_broken(&self) -> bool;
    fn start_again(&mut self);
    /// Whether it works as at first.
    fn works(&mut self) -> bool;
}

impl<D: VirtioDevice> Hostile for Driver<D> {
    fn queues(&self) -> u16 {
        u16::try_from(D::QUEUES.len()).unwrap()
    }

    fn chain(&mut self, queue: u16, descriptors: &[Descriptor]) {
        for (index, descriptor) in (0..).zip(descriptors) {
            self.describe(u64::from(queue), index, *descriptor);
        }
        self.offer(queue, 0);
    }

    fn jump(&mut self, queue: u16, index: u16) {
        self.set_available(queue, index);
        self.write(0x50, u32::from(queue));
    }

    fn set(&mut self, register: u64, value: u32) {
        self.write(register, value);
    }

    fn get(&self, register: u64) -> u32 {
        self.read(register)
    }

    fn is_broken(&self) -> bool {
        self.needs_reset()
    }

    fn start_again(&mut self) {
        let fresh = Transport::<D>::save;
        self.write(0x70, 0);
        assert_eq!(fresh(&self.transport), fresh(&self.transport));
        self.set_up();
    }

    fn works(&mut self) -> bool {
        self.read(0) == u32::from_le_bytes(*b"virt") && self.read(0x70) & status::DRIVER_OK != 0 && !self.needs_reset()
    }
}

#[test]
fn chains_that_loop_wrap_or_lead_outside_end_at_the_device_that_was_given_them() {
    let loops = [
        Descriptor { address: BUFFERS, len: 64, flags: NEXT, next: 1 },
        Descriptor { address: BUFFERS, len: 64, flags: NEXT, next: 0 },
    ];
    let itself = [Descriptor { address: BUFFERS, len: 64, flags: NEXT | WRITE, next: 0 }];
    let outside = [Descriptor { address: RAM_BYTES - 8, len: 64, flags: WRITE, next: 0 }];
    let wraps = [Descriptor { address: u64::MAX - 8, len: 64, flags: WRITE, next: 0 }];
    let giant = [Descriptor { address: 0, len: u32::MAX, flags: 0, next: 0 }];
    let giant_room = [Descriptor { address: 0, len: u32::MAX, flags: WRITE, next: 0 }];
    let empty = [Descriptor { address: BUFFERS, len: 0, flags: WRITE, next: 0 }];
    let no_such_next = [Descriptor { address: BUFFERS, len: 64, flags: NEXT, next: SIZE + 1 }];
    let chains: [&[Descriptor]; 8] = [&loops, &itself, &outside, &wraps, &giant, &giant_room, &empty, &no_such_next];
    each_device(|device| {
        for queue in 0..device.queues() {
            for chain in chains {
                device.chain(queue, chain);
                // Whatever came of it: after a reset all is well.
                device.start_again();
                assert!(device.works());
            }
        }
    });
}

#[test]
fn rings_are_checked_when_the_driver_is_done_and_frozen_from_then_on() {
    each_device(|device| {
        let before = device.get(0x44);
        device.set(0x30, 0);
        for register in [0x38, 0x80, 0x84, 0x90, 0x94, 0xA0, 0xA4, 0x44] {
            device.set(register, 0);
        }
        assert_eq!(device.get(0x44), before, "a queue was changed after DRIVER_OK");
        assert!(device.works());
        // A ring outside of memory is found when the driver says that it is done.
        device.set(0x70, 0);
        for value in [1, 3] {
            device.set(0x70, value);
        }
        device.set(0x24, 1);
        device.set(0x20, 1);
        device.set(0x70, 3 | status::FEATURES_OK);
        device.set(0x30, 0);
        device.set(0x38, 16);
        device.set(0x80, 0x10_0000);
        device.set(0x90, 0x20_0000);
        device.set(0xA0, 0x30_0000);
        device.set(0x44, 1);
        device.set(0x70, 0xB | status::DRIVER_OK);
        assert!(device.is_broken());
        device.start_again();
        assert!(device.works());
    });
}

#[test]
fn an_index_that_jumps_ends_the_device_until_it_is_reset() {
    each_device(|device| {
        for queue in 0..device.queues() {
            device.jump(queue, SIZE + 2);
            // The event queue of vsock is not read while there is no news.
            device.start_again();
            assert!(device.works());
        }
        device.jump(0, 0x8000);
        assert!(device.is_broken(), "more chains than there is room for");
        device.jump(0, 0);
        assert!(device.is_broken(), "it works on what it was told not to believe");
        device.start_again();
        assert!(device.works());
    });
}

#[test]
fn features_that_were_not_offered_are_not_taken() {
    let mut driver = Driver::reset(Rng);
    for value in [0, 1, 3] {
        driver.write(0x70, value);
    }
    driver.write(0x24, 0);
    driver.write(0x20, u32::MAX);
    driver.write(0x70, 3 | status::FEATURES_OK);
    assert_eq!(driver.read(0x70) & status::FEATURES_OK, 0);
    driver.write(0x70, 0xB | status::DRIVER_OK);
    assert_eq!(driver.read(0x70) & status::DRIVER_OK, 0);
}

fn request(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

#[test]
fn a_disk_reads_and_writes_its_sectors_and_nothing_else() {
    let mut driver = Driver::new(disk());
    let room = driver.send(0, &request(0, 7), 512 + 1);
    assert_eq!(driver.used(0), (1, 513));
    assert_eq!(driver.ram.read_obj::<u64>(GuestAddress(room)).unwrap(), 7);
    assert_eq!(driver.ram.read_obj::<u8>(GuestAddress(room + 512)).unwrap(), 0);

    let last = DISK_BYTES / 512 - 1;
    driver.send(0, &[request(1, last), vec![0xAB; 512]].concat(), 1);
    let room = driver.send(0, &request(0, last), 513);
    assert_eq!(driver.ram.read_obj::<u64>(GuestAddress(room)).unwrap(), u64::from_le_bytes([0xAB; 8]));

    // Beyond its end, at an address that overflows, half a sector, zeros over its end, and what there is not.
    let segment = |sector: u64, count: u32| [&sector.to_le_bytes()[..], &count.to_le_bytes(), &[0; 4]].concat();
    let refused = [
        (request(0, last + 1), 513, 1),
        (request(0, u64::MAX / 512), 513, 1),
        (request(0, u64::MAX), 513, 1),
        (request(0, 0), 101, 1),
        ([request(1, last), vec![0; 1024]].concat(), 1, 1),
        ([request(13, 0), segment(last, 2)].concat(), 1, 1),
        ([request(13, 0), segment(u64::MAX, 1)].concat(), 1, 1),
        ([request(13, 0), vec![0; 8]].concat(), 1, 1),
        (request(77, 0), 1, 2),
        (vec![0; 3], 1, 1),
    ];
    for (bytes, room_len, expected) in refused {
        let room = driver.send(0, &bytes, room_len);
        let (_, used) = driver.used(0);
        let at = room + u64::from(room_len) - 1;
        assert_eq!((used, driver.ram.read_obj::<u8>(GuestAddress(at)).unwrap()), (1, expected), "{bytes:?}");
    }
    driver.send(0, &[request(13, 0), segment(last, 1)].concat(), 1);
    let room = driver.send(0, &request(0, last), 513);
    assert_eq!(driver.ram.read_obj::<u64>(GuestAddress(room)).unwrap(), 0);
    assert!(!driver.needs_reset());
}

#[test]
fn random_numbers_differ_and_a_console_prints() {
    let mut driver = Driver::new(Rng);
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..8 {
        let room = driver.send(0, &[], 64);
        assert_eq!(driver.used(0).1, 64);
        let mut bytes = [0; 64];
        driver.ram.read_slice(&mut bytes, GuestAddress(room)).unwrap();
        assert!(seen.insert(bytes));
    }
    let console = Console::default();
    let mut driver = Driver::new(VirtioConsole::new(console.clone()));
    driver.send(1, b"hello", 0);
    assert_eq!(console.contents().0, b"hello");
}

#[test]
fn a_network_card_carries_frames_and_looks_at_its_tap_only_while_there_is_room() {
    // As a tap: one frame a call, and none to wait for.
    let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None);
    let (ours, its) = pair.unwrap();
    let mut driver = Driver::new(Net::new());
    driver.transport.device.plug(its);
    driver.transport.config_has_changed();
    assert_eq!((driver.read(0x106), driver.read(0x60)), (1, 2), "the driver is told that there is a link");
    let frame = [7; 60];
    driver.send(1, &[&[0xFF; net::HEADER][..], &frame].concat(), 0);
    let mut buffer = [0; 72];
    assert!(rustix::io::read(&ours, &mut buffer).is_err(), "a vCPU's thread has written to the tap");
    driver.transport.device.serve_tap();
    let count = rustix::io::read(&ours, &mut buffer).unwrap();
    assert_eq!(buffer[..count], frame, "nothing is asked of the host");
    let mut sent = 0;
    while driver.transport.device.interest().is_some() {
        rustix::io::write(&ours, &frame).unwrap();
        assert!(driver.transport.device.serve_tap());
        sent += 1;
    }
    assert_eq!(sent, 64, "as many wait as there is room for");
    let room = driver.send(net::RECEIVE, &[], 512);
    assert_eq!(driver.used(net::RECEIVE), (1, 72));
    driver.ram.read_slice(&mut buffer, GuestAddress(room)).unwrap();
    assert_eq!(buffer[12..], frame);
    driver.send(net::RECEIVE, &[], 20);
    assert_eq!(driver.used(net::RECEIVE), (2, 0), "longer than its buffer, and lost");
    drop(ours);
    assert!(!driver.transport.device.serve_tap() && driver.transport.device.interest().is_none());
    assert_eq!(driver.read(0x106), 0, "a tap that is gone is no link, and is not looked at");
}

/// A packet from the guest.
fn packet(op: u16, (guest_port, host_port): (u32, u32), data: &[u8], credit: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(3u64.to_le_bytes());
    bytes.extend(2u64.to_le_bytes());
    bytes.extend(guest_port.to_le_bytes());
    bytes.extend(host_port.to_le_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap().to_le_bytes());
    bytes.extend(1u16.to_le_bytes());
    bytes.extend(op.to_le_bytes());
    bytes.extend(0u32.to_le_bytes());
    bytes.extend(credit.to_le_bytes());
    bytes.extend(0u32.to_le_bytes());
    bytes.extend(data);
    bytes
}

/// What the guest gets next: the operation, the host's port, and the data.
fn received(driver: &mut Driver<Vsock>) -> Option<(u16, u32, Vec<u8>)> {
    let before = driver.used(0).0;
    driver.transport.device.serve_sockets();
    let room = driver.send(0, &[], 4096);
    let (count, len) = driver.used(0);
    if count == before {
        return None;
    }
    let mut bytes = vec![0; len as usize];
    driver.ram.read_slice(&mut bytes, GuestAddress(room)).unwrap();
    let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let port = u32::from_le_bytes(bytes[16..20].try_into().unwrap());
    Some((half(30), port, bytes[44..].to_vec()))
}

fn stream(driver: &mut Driver<Vsock>) -> UnixStream {
    let (ours, its) = UnixStream::pair().unwrap();
    its.set_nonblocking(true).unwrap();
    ours.set_nonblocking(true).unwrap();
    assert!(driver.transport.device.connect(1024, its.into()));
    ours
}

const DATA: u16 = 5;

#[test]
fn a_stream_carries_bytes_both_ways_within_the_credit_of_both() {
    let mut driver = Driver::new(Vsock::new());
    let mut socket = stream(&mut driver);
    let (request, port, _) = received(&mut driver).unwrap();
    assert_eq!(request, 1);
    driver.send(1, &packet(2, (1024, port), b"", 100), 0);
    socket.write_all(&[7; 150]).unwrap();
    let (op, _, data) = received(&mut driver).unwrap();
    assert_eq!((op, data), (DATA, vec![7; 100]), "as much as the guest has room for");
    driver.send(1, &packet(DATA, (1024, port), b"from the guest", 100), 0);
    driver.transport.device.serve_sockets();
    let mut buffer = [0; 64];
    assert_eq!(socket.read(&mut buffer).unwrap(), 14);
    // The host's end is closed: the guest is told, and what it still sends ends the stream.
    drop(socket);
    driver.transport.device.serve_sockets();
    driver.send(1, &packet(DATA, (1024, port), b"nobody reads this", 1000), 0);
    driver.transport.device.serve_sockets();
    driver.write(0x50, u32::from(vsock::RECEIVE));
    assert_eq!(driver.transport.device.sockets().count(), 0);
}

#[test]
fn a_guest_that_breaks_the_rules_of_streams_loses_that_stream_and_no_other() {
    let mut driver = Driver::new(Vsock::new());
    let (mut first, _second) = (stream(&mut driver), stream(&mut driver));
    let (_, port, _) = received(&mut driver).unwrap();
    driver.send(1, &packet(2, (1024, port), b"", 1 << 20), 0);
    // More than the host said that it has room for: nobody reads, so it piles up.
    for _ in 0..40 {
        driver.send(1, &packet(DATA, (1024, port), &[1; 4000], 1 << 20), 0);
    }
    assert!(driver.transport.device.sockets().count() <= 1);
    driver.transport.device.serve_sockets();
    let mut all = Vec::new();
    first.read_to_end(&mut all).unwrap_or_default();
    assert!(all.len() <= 64 << 10, "more than the credit was kept: {}", all.len());

    // A length that is not there, ports that nobody has, kinds and addresses that there are not, too short to be a packet.
    let lies = packet(DATA, (1024, port), b"", 0).into_iter().enumerate().map(|(at, byte)| if at == 24 { 200 } else { byte });
    driver.send(1, &lies.collect::<Vec<_>>(), 0);
    for op in 0..9 {
        driver.send(1, &packet(op, (9, 9), b"x", 0), 0);
    }
    let elsewhere: Vec<u8> =
        packet(1, (1024, port), b"", 0).into_iter().enumerate().map(|(at, byte)| if at == 8 { 77 } else { byte }).collect();
    driver.send(1, &elsewhere, 0);
    driver.send(1, &[0; 43], 0);
    assert!(!driver.needs_reset());
    assert!(received(&mut driver).is_some());
}

#[test]
fn streams_and_refusals_are_bounded() {
    let mut driver = Driver::new(Vsock::new());
    let streams: Vec<UnixStream> = (0..STREAMS_MAX).map(|_| stream(&mut driver)).collect();
    let (_ours, its) = UnixStream::pair().unwrap();
    assert!(!driver.transport.device.connect(1024, its.into()));
    drop(streams);
    for _ in 0..1000 {
        driver.send(1, &packet(1, (5, 6), b"", 0), 0);
    }
    driver.write(0x70, 0);
    assert_eq!(driver.transport.device.sockets().count(), 0, "a reset ends every stream");
}

/// A vCPU's thread may make no system calls: what a guest ends there is closed by the control thread, which is told of it.
#[test]
fn sockets_of_streams_that_the_guest_ends_are_left_to_the_control_thread() {
    let ends: [fn(&mut Driver<Vsock>, u32) -> bool; 3] = [
        // The driver starts anew.
        |driver, _| driver.transport.write(0x70, &0u32.to_le_bytes(), Some(&driver.ram)),
        // Data before the stream was accepted.
        |driver, port| {
            driver.send(1, &packet(DATA, (1024, port), b"too early", 0), 0);
            true
        },
        // The guest ends it, and then has room for a packet.
        |driver, port| {
            driver.send(1, &packet(3, (1024, port), b"", 0), 0);
            driver.send(vsock::RECEIVE, &[], 4096);
            true
        },
    ];
    for (index, end) in ends.into_iter().enumerate() {
        let mut driver = Driver::new(Vsock::new());
        let mut socket = stream(&mut driver);
        let (_, port, _) = received(&mut driver).unwrap();
        assert!(end(&mut driver, port), "way {index}: the control thread is not told");
        let still_open = socket.read(&mut [0]).map_err(|error| error.kind());
        assert_eq!(still_open, Err(std::io::ErrorKind::WouldBlock), "way {index}: closed by the vCPU's thread");
        driver.transport.device.serve_sockets();
        assert_eq!(socket.read(&mut [0]).unwrap(), 0, "way {index}: never closed");
    }
}

/// A child's driver ends all streams when it learns of the reset, new ones too: none is begun before it has.
#[test]
fn a_child_is_told_of_the_reset_before_any_new_stream() {
    let mut driver = Driver::new(Vsock::new());
    let (event, room) = (vsock::EVENT, BUFFERS + 0x4000);
    driver.describe(u64::from(event), 0, Descriptor { address: room, len: 4, flags: WRITE, next: 0 });
    driver.offer(event, 0);
    let state = driver.transport.save();
    driver.ram.write_obj(u32::MAX, GuestAddress(room)).unwrap();
    driver.transport.restore(&state).unwrap();
    let _socket = stream(&mut driver);
    driver.transport.kick(event, &driver.ram.clone());
    assert_eq!(driver.ram.read_obj::<u32>(GuestAddress(room)).unwrap(), 0, "the transport was reset");
    assert!(received(&mut driver).is_none(), "a stream was begun too early");
    driver.offer(event, 0);
    // The buffer that was offered above is used now.
    driver.write(0x50, u32::from(vsock::RECEIVE));
    assert_eq!(driver.used(vsock::RECEIVE).0, 1);
}

/// A driver may still keep a stream of its parent's, and would answer for it.
#[test]
fn a_child_takes_no_port_that_its_parent_has_had() {
    let mut driver = Driver::new(Vsock::new());
    let _first = stream(&mut driver);
    let (_, port, _) = received(&mut driver).unwrap();
    let state = driver.transport.save();
    let mut child = Driver::new(Vsock::new());
    child.transport.restore(&state).unwrap();
    // What is new for its driver is not what this is about.
    child.set_up();
    let _second = stream(&mut child);
    let (_, next, _) = received(&mut child).unwrap();
    assert!(next > port, "{next} after {port}");
}

#[test]
fn states_that_no_device_can_be_in_are_refused() {
    let good = Driver::new(Rng).transport.save();
    let bytes = postcard::to_stdvec(&good).unwrap();
    let mut refused = 0;
    for at in 0..bytes.len() {
        for value in [0, 1, 3, 0x7F, 0xFF] {
            let mut changed = bytes.clone();
            changed[at] = value;
            let Ok((state, [])) = postcard::take_from_bytes(&changed) else { continue };
            refused += u32::from(Transport::new(Rng, None).restore(&state).is_err());
        }
    }
    assert!(refused > 0);
    let of_another = Driver::new(Vsock::new()).transport.save();
    assert!(Transport::new(Rng, None).restore(&of_another).is_err());
}
