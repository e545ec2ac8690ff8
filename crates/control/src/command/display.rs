//! Commands for people who read logs.

use std::fmt;

use types::NodeId;

use super::{Command, Entry, Key};

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.at, self.command)?;
        self.key.map_or(Ok(()), |key| write!(f, " key {key}"))
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Note => write!(f, "time passes"),
            Self::Register { node, incarnation, images, .. } => {
                write!(f, "node {node} registers, start {incarnation}, with {} images", images.len())
            }
            Self::Heard { node, .. } => write!(f, "node {node} is heard"),
            Self::Suspect { node, .. } => write!(f, "node {node} is suspected"),
            Self::GiveUp { node, .. } => write!(f, "node {node} is given up"),
            Self::SetRole { node, role } => write!(f, "node {node} becomes {role:?}"),
            Self::Cordon { node, is_cordoned } => write!(f, "node {node} is {}cordoned", if *is_cordoned { "" } else { "un" }),
            Self::Drain { node, is_draining } => {
                write!(f, "node {node} {} drained", if *is_draining { "is" } else { "is no longer" })
            }
            Self::AddToken { name, role, .. } => write!(f, "a token lets node {name} in as {role:?}"),
            Self::UseToken { node, name, .. } => write!(f, "node {node} shows a token for {name}"),
            Self::AddUser { name, rights, .. } => {
                let tenant = rights.tenant.as_ref().map_or("all tenants", |tenant| tenant.as_str());
                write!(f, "user {name} may {:?} of {tenant}", rights.level)
            }
            Self::RemoveUser { name } => write!(f, "user {name} is removed"),
            Self::Revoke { node } => write!(f, "node {node} is revoked"),
            Self::Remove { node } => write!(f, "node {node} is forgotten"),
            Self::Replace { old, new, .. } => write!(f, "node {new} takes the place of node {old}"),
            Self::AddImage { key, node, .. } => write!(f, "node {node} has made image {key}"),
            Self::PutTemplate { tenant, name, digest } => write!(f, "template {tenant}/{name} is {digest}"),
            Self::RemoveTemplate { tenant, name } => write!(f, "template {tenant}/{name} is removed"),
            Self::Open { key, node, sources } => write!(f, "node {node} opens image {key} from {}", list(sources)),
            Self::LetGo { key, node } => write!(f, "node {node} may let go of image {key}"),
            Self::GrantCapacity { node, resources, lasts_ms, .. } => {
                write!(f, "node {node} may run {} machines of its own for {lasts_ms} ms", resources.machines)
            }
            Self::ReturnCapacity { node, epoch } => write!(f, "node {node} returns its lease {}", epoch.0),
            Self::Submit { job, spec } => write!(f, "job {job}: {} of image {}", spec.count, spec.image),
            Self::Place { job, opens, on } => {
                write!(f, "job {job} is placed:")?;
                on.iter().try_for_each(|(node, range)| write!(f, " {}..{} on {node}", range.start, range.end))?;
                opens.iter().try_for_each(|(node, sources)| write!(f, "; {node} opens from {}", list(sources)))
            }
            Self::Cancel { job } => write!(f, "job {job} is cancelled"),
            Self::Forget { job } => write!(f, "job {job} is forgotten"),
            Self::Report { node, progress, gone, ended, .. } => {
                write!(f, "node {node} reports:")?;
                progress.iter().try_for_each(|(key, _, percent)| write!(f, " image {key} at {percent} %"))?;
                gone.iter().try_for_each(|(key, _)| write!(f, " image {key} gone"))?;
                ended.iter().try_for_each(|ended| write!(f, " {} tasks of job {}", ended.tasks.len(), ended.job))
            }
        }
    }
}

fn list(nodes: &[NodeId]) -> String {
    let nodes: Vec<String> = nodes.iter().map(NodeId::to_string).collect();
    nodes.join(", ")
}
