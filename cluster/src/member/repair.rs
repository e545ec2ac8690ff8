//! How a member comes back whose log is damaged or gone. A voter that has forgotten what it promised must not vote again: it gets a
//! new id and a new key, and is let in again under its old name by what its old key signs. The old id is revoked.
//!
//! ```text
//!  damaged ──begin──▶ asking ──ask──▶ admitted ──install──▶ whole: another node
//!               repair.json: new     repair.json: and       repair.json is gone
//!               id and key           what voters gave
//! ```
//!
//! It may be cut off at any time, and is then run again. While it asks, the directory is the old node's, and asks again with the
//! same id and key. Once it is admitted nobody is asked any more: what is left to do is in `repair.json`, each step may be done
//! twice, and the node does not start before the last one. What cannot be read of the log is set aside, and never deleted.

use std::net::SocketAddr;
use std::time::UNIX_EPOCH;

use pages::{Identity, Root};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use types::{Name, NodeId};
use uuid::Uuid;

use super::files::{AUTHORITY, LOG, Member, Place, PlaceError, SEALED, read, write};
use super::join::{self, Admitted, JoinError};
use crate::node::DataDirectory;
use crate::node::quic::{CERTIFICATE, KEY};
use crate::raft::{Disk, DiskError, Machine};

const FORMAT: u32 = 1;
const PLAN: &str = "repair.json";

/// A member that is being repaired.
pub struct Repair {
    data: DataDirectory,
    place: Place,
    root: Root,
    plan: Plan,
    /// Nobody has heard of it.
    is_new: bool,
}

/// What became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repaired {
    /// Its new id.
    pub node: Uuid,
    /// Its name, as before.
    pub name: Name,
    /// Whether it votes.
    pub is_voter: bool,
    /// Where what is left of its log is, in the directory.
    pub set_aside: Option<String>,
}

/// Why a member is not repaired.
#[derive(Debug, Error)]
pub enum RepairError {
    /// Its directory.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The voters.
    #[error(transparent)]
    NotLetIn(#[from] JoinError),
}

/// Who the node will be, as it is on disk.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Plan {
    format: u32,
    node: Uuid,
    key: String,
    /// Signed with that key: it proves it to voters.
    certificate: String,
    given: Option<Given>,
}

/// What it was given, and what is left to do with it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Given {
    name: Name,
    /// What the log is called when it has been set aside. `None`: there was none.
    set_aside: Option<String>,
    admitted: Admitted,
}

type Step = fn(&mut DataDirectory, &Plan, &Given) -> Result<(), PlaceError>;

/// In this order; each may be done again.
const STEPS: [Step; 9] = [
    set_log_aside,
    begin_log,
    |data, _, given| write(data, AUTHORITY, given.admitted.root.as_bytes()),
    |data, _, given| given.admitted.sealed.as_ref().map_or(Ok(()), |sealed| write(data, SEALED, &sealed.to_bytes())),
    |data, plan, _| write(data, KEY, plan.key.as_bytes()),
    |data, _, given| write(data, CERTIFICATE, given.admitted.certificate.as_bytes()),
    |data, plan, _| data.become_node(plan.node).map_err(|source| failed(data, "node.json", source)),
    |data, _, given| Place::of(&given.name, given.admitted.seeds.clone()).write(data),
    // From now on it starts.
    |data, _, _| data.remove(PLAN).map_err(|source| failed(data, PLAN, source)),
];

/// Whether a repair was agreed on, and did not get to its end.
///
/// # Errors
/// [`PlaceError`] if that cannot be told.
pub(super) fn is_unfinished(data: &DataDirectory) -> Result<bool, PlaceError> {
    Ok(Plan::read(data)?.is_some_and(|plan| plan.given.is_some()))
}

impl Repair {
    /// Begins with the directory of a node that does not run, or goes on where it was cut off.
    ///
    /// # Errors
    /// [`PlaceError`], also if there is nothing to repair. The directory is as it was.
    pub fn begin(data: DataDirectory) -> Result<Self, PlaceError> {
        let plan = Plan::read(&data)?;
        let member = Member::read(&data)?.ok_or_else(|| PlaceError::Alone { directory: data.path().to_owned() })?;
        if plan.as_ref().is_none_or(|plan| plan.given.is_none()) {
            check_damaged(&data)?;
        }
        let is_new = plan.is_none();
        let plan = plan.map_or_else(Plan::draw, Ok)?;
        Ok(Self { data, place: member.place, root: member.root, plan, is_new })
    }

    /// Whether voters have agreed already: nobody has to be asked.
    #[must_use]
    pub fn is_admitted(&self) -> bool {
        self.plan.given.is_some()
    }

    /// Where voters were when this node last knew.
    #[must_use]
    pub fn seeds(&self) -> Vec<SocketAddr> {
        self.place.seeds.iter().filter_map(|seed| seed.parse().ok()).collect()
    }

    /// Asks these voters, one after the other.
    ///
    /// # Errors
    /// [`RepairError`]; the directory is the old node's. If no voter has heard of it, it is as it was.
    pub async fn ask(&mut self, voters: &[SocketAddr]) -> Result<(), RepairError> {
        let old = old_identity(&self.data)?;
        let (certificate, key) = (self.plan.certificate.as_bytes(), self.plan.key.as_bytes());
        let new = Identity::from_pem(certificate, key).map_err(PlaceError::from)?;
        // Voters let in one id with one key: whatever becomes of this process, those are asked for again.
        self.plan.write(&self.data)?;
        match join::replace(&new, &old, voters, self.root.fingerprint()).await {
            Ok(admitted) => Ok(self.note(admitted)?),
            Err(error) => {
                if self.is_new && matches!(error, JoinError::Unreached(_) | JoinError::Key(_)) {
                    self.data.remove(PLAN).map_err(|source| failed(&self.data, PLAN, source))?;
                }
                Err(error.into())
            }
        }
    }

    /// Notes what voters gave: from now on the directory is no longer the old node's.
    fn note(&mut self, admitted: Admitted) -> Result<(), PlaceError> {
        let given = Identity::from_pem(admitted.certificate.as_bytes(), self.plan.key.as_bytes())?;
        if *given.node().as_uuid() != self.plan.node {
            let detail = format!("its certificate is of node {}", given.node());
            return Err(PlaceError::Damaged { directory: self.data.path().to_owned(), file: PLAN, detail });
        }
        let has_log = self.data.has(LOG).map_err(|source| failed(&self.data, LOG, source))?;
        let set_aside = if has_log { Some(self.free_name()?) } else { None };
        self.plan.given = Some(Given { name: self.place.name.clone(), set_aside, admitted });
        self.plan.write(&self.data)
    }

    /// What the damaged log is to be called: nothing is ever written over.
    fn free_name(&self) -> Result<String, PlaceError> {
        let now = pages::clock::wall().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        for seconds in now.. {
            let name = format!("{LOG}.damaged-{seconds}");
            if !self.data.has(&name).map_err(|source| failed(&self.data, LOG, source))? {
                return Ok(name);
            }
        }
        unreachable!("the seconds do not end")
    }

    /// Makes the directory the new node's.
    ///
    /// # Errors
    /// [`PlaceError`]: it is gone on from here when this is run again.
    ///
    /// # Panics
    /// If voters have not agreed, see [`Repair::is_admitted`].
    pub fn install(mut self) -> Result<Repaired, PlaceError> {
        self.take_steps(STEPS.len())?;
        let Given { name, set_aside, admitted } = self.plan.given.expect("voters have agreed");
        Ok(Repaired { node: self.plan.node, name, is_voter: admitted.sealed.is_some(), set_aside })
    }

    fn take_steps(&mut self, count: usize) -> Result<(), PlaceError> {
        let given = self.plan.given.as_ref().expect("voters have agreed");
        STEPS[..count].iter().try_for_each(|step| step(&mut self.data, &self.plan, given))
    }
}

impl Plan {
    fn draw() -> Result<Self, PlaceError> {
        let node = Uuid::now_v7();
        let identity = Identity::generate(NodeId::from_uuid(node), pages::Role::Learner)?;
        let (key, certificate) = (identity.key_pem().to_owned(), identity.certificate_pem().to_owned());
        Ok(Self { format: FORMAT, node, key, certificate, given: None })
    }

    fn read(data: &DataDirectory) -> Result<Option<Self>, PlaceError> {
        let Some(bytes) = read(data, PLAN)? else { return Ok(None) };
        let plan = serde_json::from_slice::<Self>(&bytes).ok().filter(|plan| plan.format == FORMAT);
        let damaged = || PlaceError::Damaged {
            directory: data.path().to_owned(),
            file: PLAN,
            detail: "it is not what this farfork writes".to_owned(),
        };
        plan.ok_or_else(damaged).map(Some)
    }

    fn write(&self, data: &DataDirectory) -> Result<(), PlaceError> {
        write(data, PLAN, &serde_json::to_vec_pretty(self).expect("plain data"))
    }
}

/// Only what cannot be gone on from is repaired: a disk that fails is not damage, and a good log is no reason to take an id away.
fn check_damaged(data: &DataDirectory) -> Result<(), PlaceError> {
    let opened = Member::log(data).and_then(|disk| Ok(Machine::open(disk)?));
    match opened {
        Ok(_) => Err(PlaceError::Whole { directory: data.path().to_owned() }),
        Err(PlaceError::Log(DiskError::Damaged { what })) => {
            tracing::info!(what, "the log is damaged");
            Ok(())
        }
        Err(error) => Err(error),
    }
}

/// Who the node was. Nothing is made that is missing: a new key would prove nothing.
fn old_identity(data: &DataDirectory) -> Result<Identity, PlaceError> {
    let missing = |file| PlaceError::Missing { directory: data.path().to_owned(), file };
    let certificate = read(data, CERTIFICATE)?.ok_or_else(|| missing(CERTIFICATE))?;
    let key = read(data, KEY)?.ok_or_else(|| missing(KEY))?;
    Ok(Identity::from_pem(&certificate, &key)?)
}

fn set_log_aside(data: &mut DataDirectory, _: &Plan, given: &Given) -> Result<(), PlaceError> {
    let Some(name) = &given.set_aside else { return Ok(()) };
    // The name was free: if it is there, this was done before, and a log that is there is the new one.
    let of = |source| failed(data, LOG, source);
    if data.has(name).map_err(of)? { Ok(()) } else { data.rename(LOG, name).map_err(of) }
}

fn begin_log(data: &mut DataDirectory, _: &Plan, _: &Given) -> Result<(), PlaceError> {
    if !data.has(LOG).map_err(|source| failed(data, LOG, source))? {
        drop(Disk::create(&data.path().join(LOG))?);
    }
    Ok(())
}

fn failed(data: &DataDirectory, file: &'static str, source: std::io::Error) -> PlaceError {
    PlaceError::File { directory: data.path().to_owned(), file, source }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use pages::Certificate;

    use super::*;
    use crate::member::seal::Passphrase;
    use crate::node::quic::Credentials;

    /// A member that has begun a cluster, with this as its log; and what voters would give to it.
    fn damaged(path: &Path, log: Option<&[u8]>) -> (Repair, Admitted) {
        let data = DataDirectory::open(&path.join("data")).unwrap();
        let credentials = Credentials::open(&data, None).unwrap();
        let (passphrase, _) = Passphrase::read_or_draw(&path.join("passphrase")).unwrap();
        let name = Name::parse("node-1").unwrap();
        let member = Member::begin(&data, &credentials.identity, &name, "192.0.2.1:7117", &passphrase).unwrap();
        fs::write(path.join("data/images/kept"), "an image").unwrap();
        match log {
            Some(log) => fs::write(data.path().join(LOG), log).unwrap(),
            None => fs::remove_file(data.path().join(LOG)).unwrap(),
        }
        let authority = member.authority(&data, &passphrase).unwrap();
        let repair = Repair::begin(data).unwrap();
        let shown = Certificate::from_pem(repair.plan.certificate.as_bytes()).unwrap();
        let admitted = Admitted {
            certificate: authority.issue(&shown, &name, pages::Role::Voter).unwrap(),
            root: authority.root_pem().to_owned(),
            sealed: member.sealed,
            seeds: vec!["192.0.2.2:7117".to_owned()],
        };
        (repair, admitted)
    }

    fn open(path: &Path) -> DataDirectory {
        DataDirectory::open(&path.join("data")).unwrap()
    }

    #[test]
    fn a_repair_that_is_cut_off_after_any_step_is_gone_on_from() {
        for (taken, log) in (0..=STEPS.len()).flat_map(|taken| [(taken, Some(&b"not a log"[..])), (taken, None)]) {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path();
            let (mut repair, admitted) = damaged(path, log);
            let (old, new) = (repair.data.node(), repair.plan.node);
            repair.note(admitted).unwrap();
            repair.take_steps(taken).unwrap();
            drop(repair);
            if taken < STEPS.len() {
                // No node starts with what is half the old one's, and nobody has to be asked again.
                assert!(matches!(Member::open(&open(path)), Err(PlaceError::Unfinished { .. })), "after {taken} steps");
                let repair = Repair::begin(open(path)).unwrap();
                assert!(repair.is_admitted());
                let repaired = repair.install().unwrap();
                assert_eq!((repaired.node, repaired.name.as_str(), repaired.is_voter), (new, "node-1", true));
                let left = repaired.set_aside.map(|name| fs::read(path.join("data").join(name)).unwrap());
                assert_eq!(left.as_deref(), log, "what is left of the log is kept");
            }
            let data = open(path);
            assert!(data.node() == new && new != old);
            let member = Member::open(&data).unwrap().unwrap();
            assert_eq!(member.place, Place::of(&Name::parse("node-1").unwrap(), vec!["192.0.2.2:7117".to_owned()]));
            let credentials = Credentials::open(&data, Some(&member.root)).unwrap();
            assert_eq!(*credentials.identity.node().as_uuid(), new);
            assert!(Member::log(&data).is_ok() && !data.has(PLAN).unwrap());
            assert_eq!(fs::read_to_string(path.join("data/images/kept")).unwrap(), "an image");
            assert!(matches!(Repair::begin(data), Err(PlaceError::Whole { .. })), "once");
        }
    }

    #[test]
    fn what_is_not_agreed_on_leaves_the_old_node_in_its_place_and_asks_for_the_same_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let (repair, _) = damaged(path, None);
        let drawn = repair.plan.node;
        repair.plan.write(&repair.data).unwrap();
        drop(repair);
        assert!(Member::open(&open(path)).unwrap().is_some(), "its log decides whether it starts");
        let again = Repair::begin(open(path)).unwrap();
        assert!(again.plan.node == drawn && !again.is_new && !again.is_admitted());
        drop(again);
        fs::write(path.join("data").join(PLAN), "{}").unwrap();
        assert!(matches!(Repair::begin(open(path)), Err(PlaceError::Damaged { file: PLAN, .. })));
        fs::remove_file(path.join("data").join(PLAN)).unwrap();
        fs::remove_file(path.join("data/cluster.json")).unwrap();
        assert!(matches!(Repair::begin(open(path)), Err(PlaceError::Alone { .. })));
    }
}
