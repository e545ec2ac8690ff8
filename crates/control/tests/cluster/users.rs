//! Who may ask over HTTPS.

use std::time::Duration;

use control::command::{Command, Refusal};
use control::leader::{Heard, tend};
use control::state::{Level, Rights};
use types::{Digest, Name, Tenant};

use super::{Cluster, node};

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn add(user: &str, credential: u8, level: Level, tenant: Option<&str>, lasts_ms: Option<u64>) -> Command {
    let tenant = tenant.map(|tenant| tenant.parse::<Tenant>().unwrap());
    let credential = Digest::of(&[credential]);
    Command::AddUser { name: name(user), credential, rights: Rights { level, tenant }, lasts_ms }
}

#[test]
fn a_user_is_there_until_it_is_removed_or_its_time_has_passed() {
    let mut cluster = Cluster::new(1, 10);
    cluster.run(add("ann", 1, Level::Submit, Some("team-7"), None)).unwrap();
    cluster.run(add("ben", 2, Level::Admin, None, Some(1000))).unwrap();
    // A name or a credential has one user; who may only look is of some tenant.
    assert_eq!(cluster.run(add("ann", 3, Level::Read, Some("team-7"), None)), Err(Refusal::UserExists(name("ann"))));
    assert_eq!(cluster.run(add("eve", 1, Level::Admin, None, None)), Err(Refusal::UserExists(name("ann"))));
    assert_eq!(cluster.run(add("eve", 4, Level::Submit, None, None)), Err(Refusal::NoTenant));
    assert_eq!(cluster.state.users.len(), 2);
    cluster.wait(Duration::from_millis(999));
    assert_eq!(cluster.state.users.len(), 2);
    cluster.wait(Duration::from_millis(2));
    assert_eq!(cluster.state.users.keys().collect::<Vec<_>>(), [&name("ann")]);
    let remove = Command::RemoveUser { name: name("ann") };
    cluster.run(remove.clone()).unwrap();
    assert_eq!(cluster.run(remove), Err(Refusal::UnknownUser(name("ann"))));
}

/// Nothing else may happen in a cluster until then.
#[test]
fn a_leader_notes_the_time_at_which_a_user_is_over() {
    let mut cluster = Cluster::new(1, 10);
    cluster.run(add("ben", 2, Level::Read, Some("team-7"), Some(1000))).unwrap();
    let mut heard = Heard::since(cluster.state.time);
    let until = cluster.state.time + Duration::from_millis(1000);
    heard.hear(node(1), until);
    assert_eq!(tend(&cluster.state, &heard, cluster.state.time + Duration::from_millis(999)), []);
    assert_eq!(tend(&cluster.state, &heard, until), [Command::Note]);
    cluster.wait(Duration::from_millis(1000));
    assert!(cluster.state.users.is_empty());
    assert_eq!(tend(&cluster.state, &heard, until), []);
}

#[test]
fn users_come_and_go_by_word_of_voters_and_reach_their_own_tenant() {
    for command in [add("ann", 1, Level::Admin, None, None), Command::RemoveUser { name: name("ann") }] {
        assert!(command.may_be_proposed_by(node(1), true) && !command.may_be_proposed_by(node(1), false), "{command}");
    }
    let of = |tenant: Option<&str>| Rights { level: Level::Read, tenant: tenant.map(|tenant| tenant.parse().unwrap()) };
    let team: Tenant = "team-7".parse().unwrap();
    assert!(of(Some("team-7")).covers(&team) && Rights::ALL.covers(&team) && !of(Some("team-8")).covers(&team));
    assert!(Level::Read < Level::Submit && Level::Submit < Level::Admin);
}
