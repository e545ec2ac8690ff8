//! The probe guest does what it says, and the host's side computes the same.

use types::{GuestAddress, MemorySize, PageIndex};
use vm::harness::{class, host, parent};
use vm::probe::{self, Command, Probe};

#[test]
fn fill_verify_and_checksum_agree_with_the_host() {
    let host = host();
    let parent = parent(&host, class(16, 1));
    let probe = Probe::of(&parent);
    let first = probe::first_work_page();
    probe.fill(first, 100, 7).unwrap();
    let mut bytes = vec![0; 100 * 4096];
    parent.memory().read(GuestAddress(first.byte_offset()), &mut bytes).unwrap();
    let expected: Vec<u8> = (0..100).flat_map(|page| probe::fill_page(PageIndex(first.0 + page), 7)).collect();
    assert!(bytes == expected, "the guest's pattern is not the host's");
    assert_eq!(probe.verify(first, 100, 7).unwrap(), None);
    assert_eq!(probe.verify(first, 100, 8).unwrap(), Some((100, first)));
    let [sum, ..] = probe.call(Command::Checksum { first, count: 100 }).unwrap();
    assert_eq!(sum, probe::checksum(&bytes));
    // One changed bit in one page is found, and where.
    bytes[42 * 4096 + 4095] ^= 1;
    parent.memory().write(GuestAddress(first.byte_offset()), &bytes).unwrap();
    assert_eq!(probe.verify(first, 100, 7).unwrap(), Some((1, PageIndex(first.0 + 42))));
}

#[test]
fn every_work_page_up_to_the_end_of_ram_is_usable() {
    let host = host();
    let class = class(2, 1);
    let parent = parent(&host, class);
    let pages = probe::work_pages(class.memory());
    assert_eq!(pages, 256);
    Probe::of(&parent).fill(probe::first_work_page(), pages, 1).unwrap();
    assert_eq!(Probe::of(&parent).verify(probe::first_work_page(), pages, 1).unwrap(), None);
}

#[test]
fn shuffled_touches_reach_every_page_once() {
    let host = host();
    let parent = parent(&host, class(16, 1));
    let probe = Probe::of(&parent);
    let first = probe::first_work_page();
    for (count, stride) in [(1, 1), (100, 1), (128, 3), (333, 7)] {
        let seed = 0x5EED_0000 + count;
        let [_, touched, ..] = probe.call(Command::TouchWrite { first, count, stride, shuffle: true, value: seed }).unwrap();
        assert_eq!(touched, count);
        for n in 0..count {
            let at = GuestAddress(PageIndex(first.0 + n * stride).byte_offset());
            assert_eq!(parent.memory().load_u64(at).unwrap(), seed, "page {n} of {count}");
        }
        let [sum, touched, ..] = probe.call(Command::TouchRead { first, count, stride, shuffle: Some(99) }).unwrap();
        assert_eq!((sum, touched), (count * (seed & 0xFF), count));
    }
    let [sum, touched, ..] = probe.call(Command::TouchRead { first, count: 333, stride: 7, shuffle: None }).unwrap();
    assert_eq!((sum, touched), (333 * ((0x5EED_0000 + 333) & 0xFF), 333));
}

#[test]
fn each_vcpu_answers_for_itself() {
    let host = host();
    let parent = parent(&host, class(16, 4));
    let first = probe::first_work_page();
    for vcpu in 0..4 {
        let [_, _, index, _] = Probe::on(&parent, vcpu).call(Command::Who).unwrap();
        assert_eq!(index, vcpu as u64);
    }
    let pending: Vec<_> = (0..4)
        .map(|vcpu| {
            let first = PageIndex(first.0 + 500 * vcpu as u64);
            Probe::on(&parent, vcpu).post(Command::Fill { first, count: 500, epoch: vcpu as u64 }).unwrap()
        })
        .collect();
    for (vcpu, pending) in pending.into_iter().enumerate() {
        assert_eq!(Probe::on(&parent, vcpu).wait(pending).unwrap()[0], 500);
    }
    for vcpu in 0..4u64 {
        let other = usize::try_from(3 - vcpu).unwrap();
        assert_eq!(Probe::on(&parent, other).verify(PageIndex(first.0 + 500 * vcpu), 500, vcpu).unwrap(), None);
    }
}

#[test]
fn memory_above_the_gap_is_a_region_of_its_own() {
    let host = host();
    if host.check_memory(MemorySize::from_mib(4096).unwrap()).is_err() {
        println!("skipped: this host has less than 4 GiB");
        return;
    }
    let parent = parent(&host, class(4096, 1));
    let high = PageIndex((4 << 30) / 4096);
    Probe::of(&parent).fill(high, 300, 5).unwrap();
    let mut parent = parent;
    let image = parent.freeze(&host).unwrap().image;
    assert_eq!(image.regions().len(), 2);
    let child = vm::harness::child(&host, &image);
    assert_eq!(Probe::of(&child).verify(high, 300, 5).unwrap(), None);
    let outside = Probe::of(&child).call(Command::Fault(probe::Fault::Read(GuestAddress(0xD000_0000)))).unwrap();
    assert_eq!(outside[0], u64::MAX, "an address without a device reads as ones");
}

#[test]
fn printing_and_typing_reach_the_serial_port() {
    let host = host();
    let parent = parent(&host, class(2, 1));
    let probe = Probe::of(&parent);
    probe.set_buffer(b"hello from ring 3").unwrap();
    probe.call(Command::Print { bytes: 17 }).unwrap();
    assert_eq!(parent.console().contents(), (b"hello from ring 3".to_vec(), 0));
    parent.type_in(b"x").unwrap();
    assert!(parent.type_in(&[0; 1000]).is_err(), "the port's buffer is bounded");
}
