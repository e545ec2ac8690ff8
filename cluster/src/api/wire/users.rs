//! What is said of users.

use control::state::Level;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

/// What a user may do: [`Level`], which is of a crate that does not describe APIs, as the description has it.
#[derive(ToSchema)]
#[schema(as = Level, rename_all = "lowercase")]
#[expect(dead_code, reason = "it is only described")]
enum LevelWord {
    /// List and show.
    Read,
    /// Fork, branch, run and kill too.
    Submit,
    /// Save, load and remove images and templates too.
    Admin,
}

/// Somebody who is to ask over HTTPS.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UserRequest {
    /// What it is called.
    pub name: String,
    /// What it may do.
    #[schema(value_type = LevelWord)]
    pub level: Level,
    /// Whose machines and images it reaches; those of `default` unless said.
    pub tenant: Option<String>,
    /// Whether it is admin of everything, the cluster too.
    #[serde(default)]
    pub all_tenants: bool,
    /// A certificate (PEM) that it will show, of which nothing but the key counts. Without one a token is drawn.
    pub certificate: Option<String>,
    /// For how many seconds; until it is removed unless said.
    pub lasts_s: Option<u64>,
}

/// Somebody who may ask over HTTPS from now on.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct UserAnswer {
    /// What it is called.
    pub name: String,
    /// What it shows. Said here and nowhere else; `null` if it shows a certificate.
    pub token: Option<String>,
    /// The digest of the cluster's authority, by which clients know its nodes.
    pub authority: String,
    /// Where this node answers users, if it does.
    pub url: Option<String>,
}

/// Users.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct UsersAnswer {
    /// By name.
    pub users: Vec<UserRow>,
}

/// Somebody who may ask over HTTPS.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct UserRow {
    /// What it is called.
    pub name: String,
    /// What it may do.
    #[schema(value_type = LevelWord)]
    pub level: Level,
    /// Whose machines and images it reaches; `null`: everybody's.
    pub tenant: Option<String>,
    /// For how long, if not until it is removed.
    pub expires_in_s: Option<u64>,
}

/// Who asks.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct WhoAnswer {
    /// In words.
    pub who: String,
    /// What it may do.
    #[schema(value_type = LevelWord)]
    pub level: Level,
    /// Whose machines and images it reaches; `null`: everybody's.
    pub tenant: Option<String>,
    /// The node that answers.
    #[schema(value_type = String, format = "uuid")]
    pub node: Uuid,
}
