//! Asks nodes for what is shown. What one of them does not answer is left out, and said.

use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream;
use serde::de::DeserializeOwned;
use types::NodeId;

use super::snapshot::Heard;
use crate::api::wire::{ClusterAnswer, JobsAnswer, NodeAnswer, NodeFactsAnswer, TemplatesAnswer};
use crate::cli::client::{Client, ClientError, segment};

/// How long any answer may take.
const WITHIN: Duration = Duration::from_secs(5);
/// Nodes that are asked at a time.
const AT_ONCE: usize = 16;

/// All of it, once.
///
/// # Errors
/// [`ClientError`] if nobody answers at all.
pub(super) async fn ask(client: &Client) -> Result<Heard, ClientError> {
    let mut heard = Heard::default();
    // Also where no majority can be reached: then there is most to be watched.
    match get::<ClusterAnswer>(client, "/v1/cluster?stale=true").await {
        Ok(cluster) => {
            if cluster.leader.is_none() {
                heard.troubles.push("no leader is known: what is shown may be old".to_owned());
            }
            heard.cluster = Some(cluster);
        }
        // A node alone has no others, and users of one tenant do not see them.
        Err(Trouble::Said(error)) if is(&error, &["NO_CLUSTER", "FORBIDDEN"]) => {
            let node = get::<NodeAnswer>(client, "/v1/node").await;
            heard.note("the node", node, |heard, node| heard.node = Some(node));
        }
        Err(Trouble::Said(error @ (ClientError::NoNode { .. } | ClientError::NoCluster { .. }))) => return Err(error),
        Err(trouble) => heard.troubles.push(format!("the cluster: {trouble}")),
    }
    let (templates, jobs, facts) = tokio::join!(
        get::<TemplatesAnswer>(client, "/v1/templates"),
        get::<JobsAnswer>(client, "/v1/jobs"),
        facts(client, nodes(&heard)),
    );
    heard.note("templates", templates, |heard, templates| heard.templates = Some(templates));
    match jobs {
        // Nodes of a version without, and nodes alone.
        Err(Trouble::Said(error)) if is(&error, &["UNKNOWN_ROUTE", "NO_CLUSTER"]) => {}
        jobs => heard.note("jobs", jobs, |heard, jobs| heard.jobs = Some(jobs)),
    }
    for (name, facts) in facts {
        heard.note(&name, facts, |heard, facts: NodeFactsAnswer| {
            heard.facts.insert(facts.node, facts);
        });
    }
    Ok(heard)
}

/// Why something is missing.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error(transparent)]
    Said(ClientError),
    #[error("no answer within {} s", WITHIN.as_secs())]
    Late,
}

impl Heard {
    fn note<T>(&mut self, what: &str, answer: Result<T, Trouble>, keep: impl FnOnce(&mut Self, T)) {
        match answer {
            Ok(value) => keep(self, value),
            Err(trouble) => self.troubles.push(format!("{what}: {trouble}")),
        }
    }
}

/// Nodes that may answer, by id and name. Those that are lost are not asked: each would take its time.
fn nodes(heard: &Heard) -> Vec<(NodeId, String)> {
    let of_cluster = heard.cluster.iter().flat_map(|cluster| &cluster.nodes).filter(|node| node.life != "lost");
    let alone = heard.node.iter().map(|node| (NodeId::from_uuid(node.node), "the node".to_owned()));
    of_cluster.map(|node| (node.id, node.name.clone())).chain(alone).collect()
}

async fn facts(client: &Client, nodes: Vec<(NodeId, String)>) -> Vec<(String, Result<NodeFactsAnswer, Trouble>)> {
    let asked = nodes.into_iter().map(|(id, name)| async move {
        let path = format!("/v1/nodes/{}", segment(&id.to_string()));
        (name, get::<NodeFactsAnswer>(client, &path).await)
    });
    stream::iter(asked).buffer_unordered(AT_ONCE).collect().await
}

async fn get<T: DeserializeOwned>(client: &Client, path: &str) -> Result<T, Trouble> {
    match tokio::time::timeout(WITHIN, client.get::<T>(path)).await {
        Ok(answer) => answer.map(|answer| answer.value).map_err(Trouble::Said),
        Err(_) => Err(Trouble::Late),
    }
}

fn is(error: &ClientError, codes: &[&str]) -> bool {
    matches!(error, ClientError::Refused { body, .. } if codes.contains(&body.code.as_str()))
}
