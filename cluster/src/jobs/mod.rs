//! Jobs, as a node runs their tasks and keeps their outputs.
//!
//! ```text
//! the state ──▶ agent ──start, end──▶ Tasks ──fork──▶ Service          Results ──▶ who asks
//!     ▲                                 │ perform: the guest's agent      ▲
//!     └──── Report: ended, kept ◀── Keeper ──▶ Store, here and on another node
//! ```
//!
//! | file | holds |
//! |---|---|
//! | [`payload`] | what the tasks of a job do |
//! | [`tasks`] | those that are this node's: forks, performs, ends |
//! | [`perform`] | what is said to the child of one |
//! | [`record`] | what is kept of one that has run |
//! | [`keeper`] | puts that on this node's disk and on another's, in batches |
//! | [`store`] | the disk |
//! | [`results`] | finds it again, wherever it is |

#[cfg(feature = "testing")]
pub mod fuzzing;
pub mod keeper;
pub mod payload;
pub mod perform;
pub mod record;
pub mod results;
pub mod store;
pub mod tasks;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use control::state::Work;

use crate::api::App;
use crate::member::Membership;
use keeper::Keeper;
use results::{Payloads, Results, blocking};
use store::{Store, StoreError};
use tasks::Tasks;

/// How often it is looked for what is of no job any more.
const CLEAR_EVERY: Duration = Duration::from_mins(1);

/// What a node of a cluster has for jobs.
#[derive(Clone)]
pub struct Jobs {
    /// Tasks that are this node's.
    pub tasks: Arc<Tasks>,
    /// Outputs and payloads on its disk.
    pub store: Arc<Store>,
    /// What tasks do, wherever that is kept.
    pub payloads: Payloads,
    /// Outputs, wherever they are kept.
    pub results: Results,
}

impl Jobs {
    /// With what is in this directory. Within a runtime.
    ///
    /// # Errors
    /// [`StoreError`] if nothing can be kept there.
    pub fn begin(directory: &Path, app: &App, member: &Arc<Membership>) -> Result<Self, StoreError> {
        let store = Arc::new(Store::open(directory)?);
        let payloads = Payloads::new(Arc::clone(&store), Arc::clone(member));
        let keeper = Keeper::start(Arc::clone(&store), Arc::clone(member));
        let tasks = Tasks::new(app.clone(), member.node(), payloads.clone(), keeper.clone());
        keeper.tells(&tasks);
        let results = Results::new(Arc::clone(&store), Arc::clone(member));
        tokio::spawn(clear(Arc::clone(&store), Arc::clone(member)));
        Ok(Self { tasks, store, payloads, results })
    }
}

/// Removes what is of no job any more, until the runtime ends.
async fn clear(store: Arc<Store>, member: Arc<Membership>) {
    loop {
        tokio::time::sleep(CLEAR_EVERY).await;
        let state = member.consensus.stale();
        let jobs: BTreeSet<_> = state.jobs.keys().copied().collect();
        let payloads: BTreeSet<_> = state
            .jobs
            .values()
            .filter_map(|job| match job.spec.work {
                Work::Kept(digest) => Some(digest),
                Work::Here(_) => None,
            })
            .collect();
        let store = Arc::clone(&store);
        match blocking(move || store.clear(&jobs, &payloads, Instant::now())).await {
            Ok(0) => {}
            Ok(gone) => tracing::info!(gone, "outputs and payloads of jobs that are forgotten are removed"),
            Err(error) => tracing::warn!(%error, remedy = error.remedy(), "outputs of forgotten jobs stay"),
        }
    }
}
