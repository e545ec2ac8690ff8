//! Who asks, what that one may ask for, and of whose machines and images.
//!
//! | asks | by | may |
//! |---|---|---|
//! | a user of the host | the Unix socket | everything, if the node was started by it or with `--allow-uid` |
//! | a user of the cluster | HTTPS, with a token or a certificate | what the cluster says: a level, and a tenant |
//! | another node | the nodes' own port | what the one may that it asks for |

use std::fmt;

use axum::extract::{MatchedPath, Request, State as Shared};
use axum::http::{HeaderName, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use control::state::{Level, Rights};
use serde::{Deserialize, Serialize};
use types::{FullName, Name, NodeId, Tenant};

use super::error::ApiError;
use super::routes::App;
use crate::node::{NodeError, Service};

/// Names whom a node asks for, to another node. Of everybody else it is not read.
pub const CALLER: HeaderName = HeaderName::from_static("farfork-caller");

/// Who asks.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Who.
    pub who: Who,
    /// What it may do. `None`: nothing.
    pub rights: Option<Rights>,
    /// Whether it is the node's own user, or root: may have the node read files for it.
    pub is_owner: bool,
}

/// See [`Caller`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Who {
    /// A user of this host, as the kernel says (SO_PEERCRED).
    Uid(u32),
    /// A user of the cluster.
    User(Name),
    /// Another node, for itself.
    Node(NodeId),
    /// Nobody who is known.
    Stranger,
    /// Another node, for somebody that it let in.
    Through(NodeId, Box<Who>),
}

/// What one node tells another of whom it asks for.
#[derive(Serialize, Deserialize)]
struct Passed {
    who: Who,
    rights: Option<Rights>,
}

/// What a route takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    /// At least this, of one's own tenant.
    Level(Level),
    /// To be admin of all tenants.
    Cluster,
    /// To be a user of this host.
    Host,
    /// To be another node, for itself.
    Node,
}

impl Caller {
    /// A user of this host.
    #[must_use]
    pub fn of_host(uid: u32, is_allowed: bool, is_owner: bool) -> Self {
        Self { who: Who::Uid(uid), rights: is_allowed.then_some(Rights::ALL), is_owner }
    }

    /// A user of the cluster.
    #[must_use]
    pub fn of_user(name: &Name, rights: &Rights) -> Self {
        Self { who: Who::User(name.clone()), rights: Some(rights.clone()), is_owner: false }
    }

    /// Nobody who is known.
    #[must_use]
    pub fn stranger() -> Self {
        Self { who: Who::Stranger, rights: None, is_owner: false }
    }

    /// Another node: for itself, or for whom its header names.
    #[must_use]
    pub fn of_node(node: NodeId, header: Option<&HeaderValue>) -> Self {
        let Some(header) = header else { return Self { who: Who::Node(node), rights: Some(Rights::ALL), is_owner: false } };
        match serde_json::from_slice::<Passed>(header.as_bytes()) {
            Ok(Passed { who, rights }) => Self { who: Who::Through(node, Box::new(who)), rights, is_owner: false },
            Err(_) => Self { who: Who::Through(node, Box::new(Who::Stranger)), rights: None, is_owner: false },
        }
    }

    /// What another node is told of this one.
    pub(crate) fn header(&self) -> HeaderValue {
        let passed = Passed { who: self.who.clone(), rights: self.rights.clone() };
        let text = serde_json::to_string(&passed).expect("plain data");
        HeaderValue::from_str(&text).expect("names and tenants are ASCII")
    }

    /// The same one, for whom the cluster has placed something: that may name nodes to read from.
    pub(crate) fn placed(&self) -> Self {
        Self { rights: Some(Rights::ALL), ..self.clone() }
    }

    /// The one tenant that it reaches; `None`: all.
    #[must_use]
    pub fn tenant(&self) -> Option<&Tenant> {
        self.rights.as_ref().and_then(|rights| rights.tenant.as_ref())
    }

    /// The name that it means. Those of other tenants are as unknown as those that nobody has.
    ///
    /// # Errors
    /// [`NodeError`].
    pub fn name(&self, text: &str) -> Result<FullName, NodeError> {
        let own = self.tenant().cloned().unwrap_or_default();
        let name = FullName::parse_of(text, &own)?;
        if self.tenant().is_some_and(|own| *own != name.tenant) {
            return Err(NodeError::UnknownTemplate { name: text.to_owned() });
        }
        Ok(name)
    }

    /// Whose a new thing is, where `asked` may say it.
    ///
    /// # Errors
    /// [`ApiError`] if it is another tenant's.
    pub fn tenant_for(&self, asked: Option<&str>) -> Result<Option<Tenant>, ApiError> {
        let asked = asked.map(str::parse::<Tenant>).transpose().map_err(NodeError::from)?;
        match (self.tenant(), asked) {
            (Some(own), Some(asked)) if *own != asked => Err(ApiError::forbidden(&self.who, "it is of another tenant")),
            (Some(own), _) => Ok(Some(own.clone())),
            (None, asked) => Ok(asked),
        }
    }

    /// Only an admin of all tenants may name addresses that the node then speaks to.
    ///
    /// # Errors
    /// [`ApiError`].
    pub fn may_name_nodes(&self) -> Result<(), ApiError> {
        match self.tenant() {
            Some(_) => Err(ApiError::forbidden(&self.who, "naming other nodes is for admins of all tenants")),
            None => Ok(()),
        }
    }

    /// Only the node's own user has it read files, and fill its disk.
    ///
    /// # Errors
    /// [`NodeError::NotOwner`].
    pub fn check_owner(&self) -> Result<(), NodeError> {
        if self.is_owner { Ok(()) } else { Err(NodeError::NotOwner { who: self.who.to_string() }) }
    }

    fn check(&self, need: Need) -> Result<(), ApiError> {
        let Some(rights) = &self.rights else {
            return Err(match self.who {
                Who::Uid(_) => ApiError::forbidden_uid(&self.who),
                _ => ApiError::unknown_user(),
            });
        };
        match need {
            Need::Host if !matches!(self.who, Who::Uid(_)) => {
                Err(ApiError::forbidden(&self.who, "this is for users of the node's host, by its socket"))
            }
            Need::Node if !matches!(self.who, Who::Node(_)) => {
                Err(ApiError::forbidden(&self.who, "this is what nodes ask one another"))
            }
            Need::Cluster | Need::Host if *rights != Rights::ALL => {
                Err(ApiError::forbidden(&self.who, "this is for admins of all tenants"))
            }
            Need::Level(level) if rights.level < level => {
                let may = format!("{:?}", rights.level).to_lowercase();
                Err(ApiError::forbidden(&self.who, &format!("its level is {may}")))
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uid(uid) => write!(f, "uid {uid}"),
            Self::User(name) => write!(f, "user {name}"),
            Self::Node(node) => write!(f, "node {node}"),
            Self::Stranger => write!(f, "a stranger"),
            Self::Through(node, who) => write!(f, "{who} through node {node}"),
        }
    }
}

/// What a route takes. One that is not named here takes all: a new one cannot be forgotten.
fn need(method: &Method, route: &str) -> Need {
    let changes = *method != Method::GET;
    match route {
        "/v1/trust" | "/v1/trust/own" | "/v1/trust/{id}" | "/v1/audit" => Need::Host,
        "/v1/between/outputs"
        | "/v1/between/outputs/read"
        | "/v1/between/payloads/{digest}"
        | "/v1/between/jobs/{job}"
        | "/v1/between/jobs/{job}/tasks/{task}" => Need::Node,
        "/v1/jobs" | "/v1/jobs/{id}" | "/v1/jobs/{id}/cancel" if changes => Need::Level(Level::Submit),
        "/v1/forks"
        | "/v1/machines/kill"
        | "/v1/machines/{id}/branch"
        | "/v1/machines/{id}/agent"
        | "/v1/images/{id}/digest" => Need::Level(Level::Submit),
        "/v1/machines/{id}" if changes => Need::Level(Level::Submit),
        "/v1/templates/{name}/archive" => Need::Level(Level::Admin),
        "/v1/templates" | "/v1/templates/{name}" | "/v1/images/load" | "/v1/images/{id}" | "/v1/images/{id}/save"
            if changes =>
        {
            Need::Level(Level::Admin)
        }
        "/v1/machines"
        | "/v1/machines/{id}"
        | "/v1/templates"
        | "/v1/templates/{name}"
        | "/v1/images"
        | "/v1/images/{id}"
        | "/v1/explain/{name}"
        | "/v1/jobs"
        | "/v1/jobs/{id}"
        | "/v1/jobs/{id}/events"
        | "/v1/jobs/{id}/results"
        | "/v1/jobs/{id}/tasks/{task}"
        | "/v1/jobs/{id}/tasks/{task}/log"
        | "/v1/jobs/{id}/tasks/{task}/files"
        | "/v1/nodes/{id}"
        | "/v1/node"
        | "/v1/whoami"
        | "/v1/openapi.json"
            if !changes =>
        {
            Need::Level(Level::Read)
        }
        _ => Need::Cluster,
    }
}

/// Lets a request in if its caller may ask for it.
pub(super) async fn admit(request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().map_or("unmatched", MatchedPath::as_str);
    // Nothing is there to be kept from anybody who may look.
    let need = if route == "unmatched" { Need::Level(Level::Read) } else { need(request.method(), route) };
    let caller = request.extensions().get::<Caller>().expect("each connection adds it");
    match caller.check(need) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

/// In a cluster: what is asked of a machine of another node, that node answers.
pub(super) async fn elsewhere(Shared(app): Shared<App>, request: Request, next: Next) -> Response {
    use crate::member::forward::Forwarded;
    let machine = request.uri().path().strip_prefix("/v1/machines/").and_then(|rest| rest.split('/').next());
    let machine = machine.filter(|id| *id != "kill" && request.extensions().get::<Forwarded>().is_none());
    let (Some(machine), Ok(member)) = (machine.map(str::to_owned), app.member()) else { return next.run(request).await };
    let caller = request.extensions().get::<Caller>().expect("each connection adds it").clone();
    let (looked_for, tenant) = (machine.clone(), caller.tenant().cloned());
    let is_here = app.look(move |service: &Service| {
        Ok(!matches!(service.machine_id(&looked_for, tenant.as_ref()), Err(NodeError::UnknownMachine { .. })))
    });
    if is_here.await.unwrap_or(true) {
        return next.run(request).await;
    }
    match member.locate(&machine, &caller).await {
        Ok(Some(node)) => {
            member.pass_on(node, &caller, request).await.unwrap_or_else(|error| ApiError::from(error).into_response())
        }
        Ok(None) => next.run(request).await,
        Err(error) => ApiError::from(error).into_response(),
    }
}

impl App {
    /// The machine that a caller means, by its full id.
    pub(crate) async fn machine_of(&self, caller: &Caller, given: String) -> Result<String, ApiError> {
        let Some(tenant) = caller.tenant().cloned() else { return Ok(given) };
        self.look(move |service| Ok(service.machine_id(&given, Some(&tenant))?.to_string())).await
    }

    /// The image that a caller means, by its full id.
    pub(crate) async fn image_of(&self, caller: &Caller, given: String) -> Result<String, ApiError> {
        let Some(tenant) = caller.tenant().cloned() else { return Ok(given) };
        self.look(move |service| Ok(service.image_id(&given, Some(&tenant))?.to_string())).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(level: Level, tenant: Option<&str>) -> Caller {
        let rights = Rights { level, tenant: tenant.map(|tenant| tenant.parse().unwrap()) };
        Caller { who: Who::User(Name::parse("ann").unwrap()), rights: Some(rights), is_owner: false }
    }

    #[test]
    fn each_level_may_do_what_it_is_for() {
        let (get, post, delete) = (Method::GET, Method::POST, Method::DELETE);
        // Read, submit, admin of a tenant, admin of all.
        let callers = [
            user(Level::Read, Some("team-7")),
            user(Level::Submit, Some("team-7")),
            user(Level::Admin, Some("team-7")),
            user(Level::Admin, None),
        ];
        let table = [
            (&get, "/v1/machines", [true; 4]),
            (&post, "/v1/forks", [false, true, true, true]),
            (&delete, "/v1/machines/{id}", [false, true, true, true]),
            (&get, "/v1/machines/{id}", [true; 4]),
            (&post, "/v1/templates", [false, false, true, true]),
            (&delete, "/v1/templates/{name}", [false, false, true, true]),
            (&get, "/v1/templates/{name}/archive", [false, false, true, true]),
            (&get, "/v1/cluster", [false, false, false, true]),
            (&get, "/v1/nodes/{id}", [true; 4]),
            (&delete, "/v1/nodes/{id}", [false, false, false, true]),
            (&post, "/v1/users", [false, false, false, true]),
            (&post, "/v1/what/comes/next", [false, false, false, true]),
            (&get, "/v1/trust", [false; 4]),
            (&post, "/v1/jobs", [false, true, true, true]),
            (&delete, "/v1/jobs/{id}", [false, true, true, true]),
            (&get, "/v1/jobs/{id}/results", [true; 4]),
        ];
        for (method, route, may) in table {
            assert_eq!(callers.each_ref().map(|caller| caller.check(need(method, route)).is_ok()), may, "{method} {route}");
            assert!(Caller::of_host(0, true, true).check(need(method, route)).is_ok());
            assert!(Caller::of_host(7, false, false).check(need(method, route)).is_err());
        }
    }

    #[test]
    fn a_caller_keeps_its_rights_through_another_node_and_none_come_of_nonsense() {
        let node = NodeId::from_uuid(uuid::Uuid::from_u128(7));
        let ann = user(Level::Submit, Some("team-7"));
        let passed = Caller::of_node(node, Some(&ann.header()));
        assert_eq!(passed.rights, ann.rights);
        assert_eq!(passed.who, Who::Through(node, Box::new(ann.who.clone())));
        assert_eq!(Caller::of_node(node, None).rights, Some(Rights::ALL));
        for bad in ["", "{}", "root", "{\"who\":\"stranger\",\"rights\":7}"] {
            assert_eq!(Caller::of_node(node, Some(&HeaderValue::from_static(bad))).rights, None, "{bad}");
        }
    }

    #[test]
    fn names_are_of_the_callers_tenant() {
        let ann = user(Level::Submit, Some("team-7"));
        assert_eq!(ann.name("warm").unwrap().to_string(), "team-7/warm");
        assert_eq!(ann.name("team-7/warm").unwrap().to_string(), "team-7/warm");
        for other in ["default/warm", "team-8/warm"] {
            assert!(matches!(ann.name(other), Err(NodeError::UnknownTemplate { .. })), "{other}");
        }
        assert!(ann.tenant_for(Some("team-8")).is_err() && ann.may_name_nodes().is_err());
        let root = user(Level::Admin, None);
        assert_eq!(root.name("warm").unwrap().to_string(), "warm");
        assert_eq!(root.name("team-8/warm").unwrap().to_string(), "team-8/warm");
        assert!(root.may_name_nodes().is_ok());
    }
}
