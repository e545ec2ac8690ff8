//! The state that entries make. It is in memory, and on disk as of its last snapshot: after a start openraft applies again what was
//! committed since.

use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use control::{Answer, State, apply};
use futures_util::{Stream, TryStreamExt};
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use openraft::type_config::alias::{LogIdOf, SnapshotMetaOf, SnapshotOf, StoredMembershipOf};
use openraft::{EntryPayload, OptionalSend};
use serde::{Deserialize, Serialize};

use super::{Answered, Disk, DiskError, Types};

const SNAPSHOT: &str = "snapshot";

/// See the module. Clones are the same machine.
#[derive(Clone)]
pub struct Machine {
    disk: Disk,
    applied: Arc<RwLock<Applied>>,
    /// One snapshot is written at a time, and none over a newer one.
    keeping: Arc<tokio::sync::Mutex<()>>,
}

/// A state, and which entry made it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Applied {
    last: Option<LogIdOf<Types>>,
    membership: StoredMembershipOf<Types>,
    state: Arc<State>,
}

impl Machine {
    /// The state as of the last snapshot in this file; an empty one if there is none.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn open(disk: Disk) -> Result<Self, DiskError> {
        let applied: Applied = disk.record(SNAPSHOT)?.unwrap_or_default();
        Ok(Self { disk, applied: Arc::new(RwLock::new(applied)), keeping: Arc::default() })
    }

    /// The state that was applied last. Whoever has it keeps it as it was.
    #[must_use]
    pub fn state(&self) -> Arc<State> {
        Arc::clone(&self.applied().state)
    }

    /// The same, and the index of the entry that made it.
    #[must_use]
    pub fn state_and_index(&self) -> (Arc<State>, Option<u64>) {
        let applied = self.applied();
        (applied.state, applied.last.map(|last| last.index))
    }

    fn applied(&self) -> Applied {
        self.applied.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Writes a snapshot, unless there is one that is as new.
    async fn keep(&self, applied: Applied) -> io::Result<()> {
        let _one_at_a_time = self.keeping.lock().await;
        let write = move |disk: &Disk| {
            let before: Option<Applied> = disk.record(SNAPSHOT)?;
            if before.is_some_and(|before| before.last >= applied.last) {
                return Ok(());
            }
            disk.write(|writing| writing.put_record(SNAPSHOT, &applied))
        };
        self.disk.run(write).await
    }
}

impl Applied {
    fn meta(&self) -> SnapshotMetaOf<Types> {
        SnapshotMetaOf::<Types> { last_log_id: self.last, last_membership: self.membership.clone() }
    }

    fn snapshot(&self) -> SnapshotOf<Types, Vec<u8>> {
        let bytes = postcard::to_stdvec(&*self.state).expect("states are plain data");
        SnapshotOf::<Types, Vec<u8>> { meta: self.meta(), snapshot: bytes }
    }
}

impl RaftStateMachine<Types> for Machine {
    type SnapshotData = Vec<u8>;
    type SnapshotBuilder = Self;

    async fn applied_state(&mut self) -> io::Result<(Option<LogIdOf<Types>>, StoredMembershipOf<Types>)> {
        let applied = self.applied();
        Ok((applied.last, applied.membership))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> io::Result<()>
    where
        Strm: Stream<Item = io::Result<EntryResponder<Types>>> + Unpin + OptionalSend,
    {
        while let Some((entry, responder)) = entries.try_next().await? {
            let answer = {
                let mut applied = self.applied.write().unwrap_or_else(PoisonError::into_inner);
                applied.last = Some(entry.log_id);
                match entry.payload {
                    EntryPayload::Blank => None,
                    EntryPayload::Normal(entry) => Some(apply(Arc::make_mut(&mut applied.state), &entry)),
                    EntryPayload::Membership(membership) => {
                        applied.membership = StoredMembershipOf::<Types>::new(Some(entry.log_id), membership);
                        Some(Answer::Done)
                    }
                }
            };
            if let Some(responder) = responder {
                responder.send(Answered(answer));
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Self {
        self.clone()
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMetaOf<Types>, snapshot: Vec<u8>) -> io::Result<()> {
        let state = match postcard::take_from_bytes(&snapshot) {
            Ok((state, [])) => Arc::new(state),
            Ok(_) => return Err(io::Error::new(io::ErrorKind::InvalidData, "a snapshot with bytes after its end")),
            Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
        };
        let applied = Applied { last: meta.last_log_id, membership: meta.last_membership.clone(), state };
        self.keep(applied.clone()).await?;
        *self.applied.write().unwrap_or_else(PoisonError::into_inner) = applied;
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<SnapshotOf<Types, Vec<u8>>>> {
        let read = self.disk.run(|disk| disk.record::<Applied>(SNAPSHOT)).await?;
        Ok(read.map(|applied| applied.snapshot()))
    }
}

impl RaftSnapshotBuilder<Types> for Machine {
    type SnapshotData = Vec<u8>;

    async fn build_snapshot(&mut self) -> io::Result<SnapshotOf<Types, Vec<u8>>> {
        let applied = self.applied();
        self.keep(applied.clone()).await?;
        Ok(applied.snapshot())
    }
}
