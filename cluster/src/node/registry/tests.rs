//! What the registry keeps, and forgets.

use super::*;

fn id(number: u128) -> MachineId {
    MachineId::from_uuid(Uuid::from_u128(number))
}

fn machine(id: MachineId) -> Machine {
    Machine {
        forked: Forked { id, first: Default::default(), stages: Default::default(), had_shell: true },
        image: ImageId::from_uuid(Uuid::nil()),
        tenant: Tenant::default_tenant(),
        parent: None,
        created: pages::clock::wall(),
        limit_bytes: None,
        claim_bytes: 1 << 20,
        is_task: false,
        task: None,
        verified_pages: None,
        readiness: None,
        state: MachineState::Running,
    }
}

fn by_itself() -> Ended {
    Ended { reason: Reason::GuestShutdown, detail: "of a test".to_owned() }
}

#[test]
fn an_end_that_comes_before_the_start_is_not_lost() {
    let registry = Registry::default();
    registry.starting(&[id(1), id(2)]);
    assert!(!registry.says_ended(id(1), &by_itself()));
    assert_eq!(registry.started(machine(id(1))), Some(by_itself()));
    assert_eq!(registry.started(machine(id(2))), None);
    assert!(registry.says_ended(id(2), &by_itself()));
    assert!(!registry.says_ended(id(3), &by_itself()), "nobody's");
}

#[test]
fn a_machine_is_ended_once() {
    let registry = Registry::default();
    let full = id(0xABCD_1234).to_string();
    assert_eq!(registry.started(machine(id(0xABCD_1234))), None);
    assert_eq!(registry.taken(), (1, 1 << 20));
    assert_eq!(registry.claim("1234").unwrap(), id(0xABCD_1234));
    assert!(matches!(registry.claim(&full), Err(NodeError::Ended { reason: Reason::Killed, .. })));
    assert!(!registry.says_ended(id(0xABCD_1234), &by_itself()));
    registry.give_back(id(0xABCD_1234));
    assert_eq!(registry.claim_all(None), [id(0xABCD_1234)]);
    registry.ended(id(0xABCD_1234), by_itself(), Arc::from([]));
    assert!(matches!(registry.running_machine(&full), Err(NodeError::Ended { reason: Reason::GuestShutdown, .. })));
    assert_eq!(registry.counts(), Counts { running: 0, ended: 1, images: 0 });
    assert_eq!(registry.taken(), (0, 0));
}

#[test]
fn ends_that_name_several_are_refused_with_the_candidates() {
    let registry = Registry::default();
    for number in [0x1_5555, 0x2_5555] {
        assert_eq!(registry.started(machine(id(number))), None);
    }
    let Err(NodeError::Ambiguous { candidates, .. }) = registry.machine("5555") else { panic!("not ambiguous") };
    assert_eq!(candidates, [id(0x1_5555).to_string(), id(0x2_5555).to_string()]);
    assert_eq!(registry.machine("15555").unwrap().forked.id, id(0x1_5555));
    assert!(matches!(registry.machine("35555"), Err(NodeError::UnknownMachine { .. })));
}

#[test]
fn the_newest_ended_are_remembered() {
    let registry = Registry::default();
    for number in 0..=ENDED_MAX as u128 {
        assert_eq!(registry.started(machine(id(number))), None);
        assert!(registry.says_ended(id(number), &by_itself()));
        registry.ended(id(number), by_itself(), Arc::from([]));
    }
    assert_eq!(registry.counts(), Counts { running: 0, ended: ENDED_MAX, images: 0 });
    assert!(registry.machine(&id(0).to_string()).is_err());
    assert!(registry.machine(&id(1).to_string()).is_ok());
}
