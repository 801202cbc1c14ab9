//! What a token may do: explicit scopes, and the roles that are names for sets of them.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

macro_rules! scopes {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {
        /// One permission. Nothing implies another: what a token may do is the list that it carries.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Scope { $($(#[$doc])* $name,)* }

        impl Scope {
            /// Every scope.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The scope as text, as in `apps:read`.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

scopes! {
    /// See orgs.
    OrgsRead = "orgs:read";
    /// Create and change orgs.
    OrgsWrite = "orgs:write";
    /// Grant access to an org.
    OrgsAdmin = "orgs:admin";
    /// See apps.
    AppsRead = "apps:read";
    /// Create and change apps.
    AppsWrite = "apps:write";
    /// See envs, their deployments and instances.
    EnvsRead = "envs:read";
    /// Create and change envs.
    EnvsWrite = "envs:write";
    /// See releases.
    ReleasesRead = "releases:read";
    /// Create releases.
    ReleasesWrite = "releases:write";
    /// See routes.
    RoutesRead = "routes:read";
    /// Create and delete routes.
    RoutesWrite = "routes:write";
    /// See volumes.
    VolumesRead = "volumes:read";
    /// Create and delete volumes.
    VolumesWrite = "volumes:write";
    /// Deploy and scale.
    DeploysWrite = "deploys:write";
    /// See which secrets exist.
    SecretsReadMetadata = "secrets:read-metadata";
    /// Set secrets.
    SecretsWrite = "secrets:write";
    /// Read secret values.
    SecretsReadMaterial = "secrets:read-material";
    /// Read a workload's output.
    LogsRead = "logs:read";
    /// Open a command inside an instance.
    ExecCreate = "exec:create";
    /// Read the audit log and events.
    AuditRead = "audit:read";
    /// See the cluster: members, nodes, edges.
    ClusterRead = "cluster:read";
    /// Change the cluster: members, enrolments, confirmations.
    ClusterAdmin = "cluster:admin";
    /// Change nodes.
    NodesAdmin = "nodes:admin";
    /// Change edges.
    EdgesAdmin = "edges:admin";
}

/// A text is not a scope.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("«{0}» is not a scope: see `holdfast token create --help` for the list")]
pub struct ScopeError(pub String);

impl FromStr for Scope {
    type Err = ScopeError;

    fn from_str(text: &str) -> Result<Self, ScopeError> {
        let found = Self::ALL.iter().copied().find(|s| s.as_str() == text);
        found.ok_or_else(|| ScopeError(text.chars().take(48).collect()))
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

// Text in every encoding: a stored scope must not change its meaning when the list above grows in the middle.
impl Serialize for Scope {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for Scope {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A named set of scopes within one org.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Everything within the org.
    Owner,
    /// Everything but granting access to the org.
    Admin,
    /// Builds and deploys; no secret material, no exec.
    Developer,
    /// Looks, and changes nothing.
    Viewer,
}

impl Role {
    /// The scopes that the role stands for.
    pub fn scopes(self) -> BTreeSet<Scope> {
        use Scope::*;
        let mut set =
            BTreeSet::from([OrgsRead, AppsRead, EnvsRead, ReleasesRead, RoutesRead, VolumesRead, LogsRead]);
        if self == Self::Viewer {
            return set;
        }
        set.extend([AppsWrite, EnvsWrite, ReleasesWrite, RoutesWrite, DeploysWrite, VolumesWrite]);
        set.extend([SecretsReadMetadata, SecretsWrite]);
        if self == Self::Developer {
            return set;
        }
        set.extend([OrgsWrite, SecretsReadMaterial, ExecCreate, AuditRead]);
        if self == Self::Owner {
            set.insert(OrgsAdmin);
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_only_grow_and_never_reach_the_cluster() {
        let order = [Role::Viewer, Role::Developer, Role::Admin, Role::Owner];
        for pair in order.windows(2) {
            assert!(pair[0].scopes().is_subset(&pair[1].scopes()));
        }
        let owner = Role::Owner.scopes();
        for s in [Scope::ClusterRead, Scope::ClusterAdmin, Scope::NodesAdmin, Scope::EdgesAdmin] {
            assert!(!owner.contains(&s));
        }
        assert!(!Role::Developer.scopes().contains(&Scope::SecretsReadMaterial));
        assert!(!Role::Developer.scopes().contains(&Scope::ExecCreate));
    }

    #[test]
    fn every_scope_round_trips() {
        for s in Scope::ALL {
            assert_eq!(s.as_str().parse(), Ok(*s));
        }
    }
}
