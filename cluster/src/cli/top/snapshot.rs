//! What is to be seen at one moment, made of what nodes said then and a moment before. No I/O.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use types::NodeId;

use crate::api::wire::{ClusterAnswer, JobRow, JobsAnswer, NodeAnswer, NodeFactsAnswer, NodeRow, TemplatesAnswer};

/// What nodes said when they were asked once. What did not come is not there, and `troubles` says why.
#[derive(Clone, Debug, Default)]
pub(super) struct Heard {
    /// The cluster, if the node that was asked is of one and this user may see it.
    pub(super) cluster: Option<ClusterAnswer>,
    /// That node, otherwise.
    pub(super) node: Option<NodeAnswer>,
    /// What each node said of itself.
    pub(super) facts: BTreeMap<NodeId, NodeFactsAnswer>,
    pub(super) templates: Option<TemplatesAnswer>,
    pub(super) jobs: Option<JobsAnswer>,
    pub(super) troubles: Vec<String>,
}

/// All that is shown.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct Snapshot {
    pub(super) hosts: Vec<Host>,
    pub(super) templates: Vec<Template>,
    pub(super) jobs: Vec<Job>,
    /// What could not be had, and why.
    pub(super) troubles: Vec<String>,
}

/// A node. What it did not say is `null`; rates are over the time since it was asked before.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Host {
    pub(super) id: NodeId,
    pub(super) name: String,
    /// `up`, `suspect` or `lost`, as the cluster has it.
    pub(super) life: String,
    pub(super) is_leader: bool,
    pub(super) is_cordoned: bool,
    pub(super) is_draining: bool,
    pub(super) machines: Option<u64>,
    pub(super) machines_max: Option<u64>,
    /// Of machines and images, as placement counts; of a node alone: what of its host's memory is in use.
    pub(super) taken_bytes: Option<u64>,
    pub(super) capacity_bytes: Option<u64>,
    pub(super) forks_per_s: Option<f64>,
    pub(super) in_bytes_per_s: Option<u64>,
    pub(super) out_bytes_per_s: Option<u64>,
    pub(super) arriving: Option<u64>,
    pub(super) settled: Option<u64>,
}

/// A name that points at an image.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct Template {
    pub(super) name: String,
    /// Its digest, or its id on its node while it has none; `null` while it is in memory nowhere.
    pub(super) image: Option<String>,
    /// Nodes that have all of it, and those that have all or some.
    pub(super) complete: u64,
    pub(super) holders: u64,
    /// Machines of it that run.
    pub(super) children: u64,
    /// What it is at, if it is being built on the node that was asked.
    pub(super) building: Option<String>,
}

/// A job.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct Job {
    pub(super) id: String,
    pub(super) name: Option<String>,
    pub(super) template: String,
    pub(super) tasks: u32,
    pub(super) waiting: u32,
    pub(super) placed: u32,
    pub(super) succeeded: u32,
    pub(super) failed: u32,
    pub(super) is_ended: bool,
    /// Tasks that came to their end.
    pub(super) tasks_per_s: Option<f64>,
}

impl Snapshot {
    /// Of what was heard now, and what was heard before.
    pub(super) fn of(now: &Heard, before: Option<&Heard>) -> Self {
        let rated = |id: &NodeId| now.facts.get(id).map(|facts| (facts, before.and_then(|before| before.facts.get(id))));
        let mut hosts: Vec<Host> = match (&now.cluster, &now.node) {
            (Some(cluster), _) => cluster.nodes.iter().map(|row| Host::of(row, cluster.leader)).collect(),
            (None, Some(node)) => vec![Host::alone(node, now.facts.get(&NodeId::from_uuid(node.node)))],
            (None, None) => Vec::new(),
        };
        for host in &mut hosts {
            if let Some((facts, before)) = rated(&host.id) {
                host.add(facts, before);
            }
        }
        let job = |row: &JobRow| {
            let jobs = before.and_then(|before| before.jobs.as_ref());
            Job::of(row, jobs.and_then(|jobs| jobs.jobs.iter().find(|known| known.id == row.id)))
        };
        let jobs = now.jobs.iter().flat_map(|answer| &answer.jobs).map(job).collect();
        Self { hosts, templates: templates(now), jobs, troubles: now.troubles.clone() }
    }
}

impl Host {
    fn new(id: NodeId, name: &str, life: &str) -> Self {
        Self {
            id,
            name: name.to_owned(),
            life: life.to_owned(),
            is_leader: false,
            is_cordoned: false,
            is_draining: false,
            machines: None,
            machines_max: None,
            taken_bytes: None,
            capacity_bytes: None,
            forks_per_s: None,
            in_bytes_per_s: None,
            out_bytes_per_s: None,
            arriving: None,
            settled: None,
        }
    }

    fn of(row: &NodeRow, leader: Option<NodeId>) -> Self {
        Self {
            is_leader: leader == Some(row.id),
            is_cordoned: row.is_cordoned,
            is_draining: row.is_draining,
            machines: Some(row.taken.machines),
            machines_max: Some(row.capacity.machines),
            taken_bytes: Some(row.taken.memory_bytes),
            capacity_bytes: Some(row.capacity.memory_bytes),
            ..Self::new(row.id, &row.name, &row.life)
        }
    }

    fn alone(node: &NodeAnswer, facts: Option<&NodeFactsAnswer>) -> Self {
        let memory = &node.memory;
        // It may be of a cluster that this user does not see.
        let name = facts.and_then(|facts| facts.name.as_deref()).unwrap_or("this node");
        Self {
            machines: Some(node.counts.running),
            taken_bytes: memory.available_bytes.map(|available| memory.total_bytes.saturating_sub(available)),
            capacity_bytes: Some(memory.total_bytes),
            ..Self::new(NodeId::from_uuid(node.node), name, "up")
        }
    }

    fn add(&mut self, facts: &NodeFactsAnswer, before: Option<&NodeFactsAnswer>) {
        // It knows better than the cluster, which hears of it a little later.
        self.machines = Some(facts.running);
        self.arriving = Some(facts.host_images.arriving);
        self.settled = Some(facts.host_images.settled);
        let Some(before) = before else { return };
        // By the node's own clock. One that was started anew counts from nothing.
        let Some(passed) = facts.uptime_ms.checked_sub(before.uptime_ms).map(Duration::from_millis) else { return };
        let bytes = |now, before| rate(now, before, passed).map(whole);
        self.forks_per_s = rate(facts.forks, before.forks, passed);
        self.in_bytes_per_s = bytes(facts.wire_bytes, before.wire_bytes);
        self.out_bytes_per_s = bytes(facts.served_bytes, before.served_bytes);
    }
}

impl Job {
    fn of(row: &JobRow, before: Option<&JobRow>) -> Self {
        let done = |row: &JobRow| u64::from(row.counts.succeeded) + u64::from(row.counts.failed);
        let before = before.filter(|_| !row.is_ended);
        let tasks_per_s = before.and_then(|before| {
            let passed = Duration::from_millis(row.for_ms.checked_sub(before.for_ms)?);
            rate(done(row), done(before), passed)
        });
        Self {
            id: row.id.to_string(),
            name: row.name.clone(),
            template: row.template.clone(),
            tasks: row.tasks,
            waiting: row.counts.waiting,
            placed: row.counts.placed,
            succeeded: row.counts.succeeded,
            failed: row.counts.failed,
            is_ended: row.is_ended,
            tasks_per_s,
        }
    }
}

/// Names that some node knows, with what all nodes have of their images.
fn templates(now: &Heard) -> Vec<Template> {
    let mut templates: BTreeMap<&str, Template> = BTreeMap::new();
    for template in now.templates.iter().flat_map(|answer| &answer.templates) {
        let image = template.image.as_ref().map(|image| image.digest.clone().unwrap_or_else(|| image.id.to_string()));
        let building = template.building.as_ref().map(|building| format!("{:?}", building.stage).to_lowercase());
        let name = template.name.clone();
        templates.insert(&template.name, Template { name, image, building, ..Template::default() });
    }
    let here = || now.facts.values().flat_map(|facts| &facts.images);
    for image in here() {
        let Some(name) = &image.name else { continue };
        let template = templates.entry(name).or_insert_with(|| Template { name: name.clone(), ..Template::default() });
        template.image.get_or_insert_with(|| image.image.clone());
    }
    let mut templates: Vec<Template> = templates.into_values().collect();
    for template in &mut templates {
        for image in here().filter(|image| Some(&image.image) == template.image.as_ref()) {
            template.holders += 1;
            template.complete += u64::from(image.settled_percent == Some(100));
            template.children += image.running;
        }
    }
    templates
}

/// `None`: too little time has passed to tell, or it counts anew.
#[expect(clippy::cast_precision_loss, reason = "it is read by people")]
fn rate(now: u64, before: u64, passed: Duration) -> Option<f64> {
    const LEAST: Duration = Duration::from_millis(100);
    let more = now.checked_sub(before)?;
    (passed >= LEAST).then(|| more as f64 / passed.as_secs_f64())
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "rates are neither negative nor beyond 2^63")]
fn whole(rate: f64) -> u64 {
    rate as u64
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::{Value, json};
    use uuid::Uuid;

    use super::*;

    pub(in super::super) fn id(number: u128) -> String {
        Uuid::from_u128(number).to_string()
    }

    fn row(number: u128, name: &str, life: &str) -> Value {
        let room = |memory: u64, machines| json!({"memory_bytes": memory, "cpu_millis": 0, "machines": machines});
        json!({
            "id": id(number), "name": name, "address": "192.0.2.1:7117", "life": life, "role": "voter", "votes": true,
            "is_cordoned": false, "is_draining": number == 2, "capacity": room(20 << 30, 10_000), "taken": room(5 << 30, 7), "images": 1,
        })
    }

    fn facts(number: u128, uptime_ms: u64, done: u64, images: &Value) -> (NodeId, NodeFactsAnswer) {
        let facts: NodeFactsAnswer = serde_json::from_value(json!({
            "node": id(number), "name": "n", "version": "0", "uptime_ms": uptime_ms, "running": 12, "forks": done,
            "wire_bytes": done << 20, "served_bytes": 0, "host_images": {"arriving": 1, "settled": 2, "failed": 0},
            "memory": {"total_bytes": 1, "available_bytes": 1}, "images": images,
        }))
        .unwrap();
        (facts.node, facts)
    }

    fn job(number: u128, name: Option<&str>, for_ms: u64, succeeded: u32) -> Value {
        json!({
            "id": id(number), "name": name, "template": "py", "image": "a", "tenant": "default", "submitted_by": "uid 0",
            "about": "exec", "age_ms": 0, "for_ms": for_ms, "is_ended": false, "tasks": 300,
            "counts": {"waiting": 240 - succeeded, "placed": 50, "succeeded": succeeded, "failed": 10},
        })
    }

    /// Three nodes of which one is lost, a template, a job.
    pub(in super::super) fn heard(uptime_ms: u64, done: u64) -> Heard {
        let cluster = json!({
            "node": id(1), "leader": id(1), "applied": 7, "time_ms": 0, "is_stale": true,
            "nodes": [row(1, "node-1", "up"), row(2, "node-2", "up"), row(3, "node-3", "lost")],
        });
        let image = |name: Option<&str>, percent| json!([{"image": "a".repeat(64), "tenant": "default", "name": name, "settled_percent": percent, "running": 6}]);
        let jobs = json!({"jobs": [job(70, Some("sweep"), uptime_ms, u32::try_from(done).unwrap())]});
        Heard {
            cluster: Some(serde_json::from_value(cluster).unwrap()),
            node: None,
            facts: [facts(1, uptime_ms, done, &image(Some("py"), 100)), facts(2, uptime_ms, done, &image(None, 40))].into(),
            templates: Some(serde_json::from_value(json!({"templates": []})).unwrap()),
            jobs: Some(serde_json::from_value(jobs).unwrap()),
            troubles: Vec::new(),
        }
    }

    #[test]
    fn rates_are_over_the_nodes_own_time_and_begin_anew_with_it() {
        let shown = Snapshot::of(&heard(4_000, 90), Some(&heard(2_000, 10)));
        let host = &shown.hosts[0];
        assert_eq!((host.forks_per_s, host.in_bytes_per_s, host.machines), (Some(40.0), Some(40 << 20), Some(12)));
        assert_eq!((host.arriving, host.settled, host.is_leader), (Some(1), Some(2), true));
        assert_eq!(shown.jobs[0].tasks_per_s, Some(40.0));
        // The first time, at once again, and of a node that was started anew.
        for (now, before) in
            [(heard(9, 0), None), (heard(2_000, 9), Some(heard(2_000, 9))), (heard(5, 0), Some(heard(2_000, 9)))]
        {
            let shown = Snapshot::of(&now, before.as_ref());
            assert_eq!((shown.hosts[0].forks_per_s, shown.jobs[0].tasks_per_s), (None, None));
        }
    }

    #[test]
    fn a_lost_node_shows_what_the_cluster_knows_and_no_rates() {
        let shown = Snapshot::of(&heard(4_000, 90), Some(&heard(2_000, 10)));
        let lost = &shown.hosts[2];
        assert_eq!((&*lost.life, lost.machines, lost.forks_per_s, lost.settled), ("lost", Some(7), None, None));
    }

    #[test]
    fn a_template_is_counted_over_all_nodes_also_where_it_has_no_name() {
        let shown = Snapshot::of(&heard(0, 0), None);
        let template = &shown.templates[0];
        assert_eq!((&*template.name, template.complete, template.holders, template.children), ("py", 1, 2, 12));
    }

    #[test]
    fn nothing_heard_is_nothing_shown() {
        assert_eq!(Snapshot::of(&Heard::default(), None), Snapshot::default());
    }
}
