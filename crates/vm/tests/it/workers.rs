//! Machines in their workers.

use std::time::Duration;

use types::MachineId;
use vm::Pool;
use vm::harness::{class, host, new_id};
use vm::pool::{ForkOptions, Settings};
use vm::probe::{self, Command};

/// The machine's id, as its guest says it.
fn id_of(reply: vm::probe::Reply) -> MachineId {
    let bytes = [reply[0].to_le_bytes(), reply[1].to_le_bytes()].concat();
    MachineId::from_uuid(uuid::Uuid::from_slice(&bytes).unwrap())
}

#[test]
fn a_child_is_its_image_and_knows_who_it_is() {
    let settings = Settings::new(env!("CARGO_BIN_EXE_zygote"), []);
    let pool = Pool::open(host(), settings).unwrap();
    let parent = pool.boot_probe(class(64, 1), new_id()).unwrap();
    let fill = Command::Fill { first: probe::first_work_page(), count: 1000, epoch: 7 };
    assert_eq!(parent.call(0, fill).unwrap()[0], 1000);
    let image = parent.freeze().unwrap().image;
    for round in 0..5 {
        let ids = [new_id(), new_id(), new_id()];
        for (forked, id) in pool.fork(&image, &ids, ForkOptions::default()).into_iter().zip(ids) {
            let (child, times) = forked.unwrap();
            println!("{round} {times:?}");
            assert_eq!(id_of(child.call(0, Command::Who).unwrap()), id);
            let verify = Command::Verify { first: probe::first_work_page(), count: 1000, epoch: 7 };
            assert_eq!(child.call(0, verify).unwrap()[0], 0);
            println!("{:?}", child.memory());
            child.kill();
            assert!(child.wait_for_end(Duration::from_secs(30)).is_some());
        }
    }
}
