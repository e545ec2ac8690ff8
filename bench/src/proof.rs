//! The proof of work: before anything is timed, children show that they are what they are said to be. A stub that is fast and
//! wrong ends here.

use std::sync::Arc;

use anyhow::{Result, ensure};
use types::MachineId;
use uuid::Uuid;
use vm::probe::{self, Command, Probe};
use vm::{Class, Host, Image, Machine, Shell};

const PAGES: u64 = 300;

/// Freezes a parent, forks three children, and has each compute a checksum over its own memory, before and after all have
/// written over it.
pub(crate) fn check(host: &Host, class: Class) -> Result<()> {
    let first = probe::first_work_page();
    let mut parent = boot(host, class)?;
    Probe::of(&parent).fill(first, PAGES, 7)?;
    let image = parent.freeze(host)?.image;
    let expected = |epoch| {
        let bytes: Vec<u8> = (0..PAGES).flat_map(|page| probe::fill_page(types::PageIndex(first.0 + page), epoch)).collect();
        probe::checksum(&bytes)
    };
    let checksum =
        |machine: &Machine| -> Result<u64> { Ok(Probe::of(machine).call(Command::Checksum { first, count: PAGES })?[0]) };
    Probe::of(&parent).fill(first, PAGES, 8)?;
    let children: Vec<Machine> = (0..3).map(|_| fork(host, &image)).collect::<Result<_>>()?;
    for (epoch, child) in (9..).zip(&children) {
        ensure!(checksum(child)? == expected(7), "proof of work: a child's memory is not its image");
        Probe::of(child).fill(first, PAGES, epoch)?;
        ensure!(Probe::of(child).who()? == child.id(), "proof of work: a child does not know who it is");
    }
    for (epoch, child) in (9..).zip(&children) {
        ensure!(checksum(child)? == expected(epoch), "proof of work: a child's writes are not its own");
    }
    ensure!(checksum(&parent)? == expected(8), "proof of work: the parent's writes are not its own");
    Ok(())
}

pub(crate) fn boot(host: &Host, class: Class) -> Result<Machine> {
    let mut parent = probe::boot(host, class, new_id())?;
    parent.resume();
    Ok(parent)
}

pub(crate) fn fork(host: &Host, image: &Arc<Image>) -> Result<Machine> {
    let mut child = Shell::build(host, image.class())?.fork(image, new_id())?;
    child.resume();
    Ok(child)
}

pub(crate) fn new_id() -> MachineId {
    MachineId::from_uuid(Uuid::now_v7())
}
