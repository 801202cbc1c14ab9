//! What a token may do: explicit scopes, and the roles that are names for sets of them.

use serde::ser::SerializeSeq;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
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

            fn from_text(text: &str) -> Option<Self> {
                match text { $($text => Some(Self::$name),)* _ => None }
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
        Self::from_text(text).ok_or_else(|| ScopeError(text.chars().take(48).collect()))
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
        struct Text;

        impl de::Visitor<'_> for Text {
            type Value = Scope;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a scope")
            }

            // Borrowed: a token's scopes are read with every request.
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Scope, E> {
                text.parse().map_err(E::custom)
            }
        }

        d.deserialize_str(Text)
    }
}

/// Scopes, each at most once. A word of bits in memory, and a list in the order of [`Scope::ALL`] everywhere else.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct ScopeSet(u32);

const _: () = assert!(Scope::ALL.len() <= u32::BITS as usize);

impl ScopeSet {
    const fn bit(scope: Scope) -> u32 {
        1 << scope as u32
    }

    /// Whether there is none.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether the scope is in it.
    pub const fn contains(self, scope: Scope) -> bool {
        self.0 & Self::bit(scope) != 0
    }

    /// Adds a scope.
    pub const fn insert(&mut self, scope: Scope) {
        self.0 |= Self::bit(scope);
    }

    /// What is in it and not in `other`.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Its scopes, in the order of [`Scope::ALL`].
    pub fn iter(self) -> impl Iterator<Item = Scope> {
        Scope::ALL.iter().copied().filter(move |scope| self.contains(*scope))
    }
}

impl fmt::Debug for ScopeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

impl Extend<Scope> for ScopeSet {
    fn extend<I: IntoIterator<Item = Scope>>(&mut self, scopes: I) {
        scopes.into_iter().for_each(|scope| self.insert(scope));
    }
}

impl FromIterator<Scope> for ScopeSet {
    fn from_iter<I: IntoIterator<Item = Scope>>(scopes: I) -> Self {
        let mut set = Self::default();
        set.extend(scopes);
        set
    }
}

impl Serialize for ScopeSet {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut list = s.serialize_seq(Some(self.0.count_ones() as usize))?;
        for scope in self.iter() {
            list.serialize_element(&scope)?;
        }
        list.end()
    }
}

impl<'de> Deserialize<'de> for ScopeSet {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct List;

        impl<'de> de::Visitor<'de> for List {
            type Value = ScopeSet;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of scopes")
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut list: A) -> Result<ScopeSet, A::Error> {
                let mut set = ScopeSet::default();
                while let Some(scope) = list.next_element()? {
                    set.insert(scope);
                }
                Ok(set)
            }
        }

        d.deserialize_seq(List)
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
    pub fn scopes(self) -> ScopeSet {
        use Scope::*;
        let mut set = ScopeSet::from_iter([
            OrgsRead,
            AppsRead,
            EnvsRead,
            ReleasesRead,
            RoutesRead,
            VolumesRead,
            LogsRead,
        ]);
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
    use std::collections::BTreeSet;

    #[test]
    fn roles_only_grow_and_never_reach_the_cluster() {
        let order = [Role::Viewer, Role::Developer, Role::Admin, Role::Owner];
        for pair in order.windows(2) {
            assert!(pair[0].scopes().without(pair[1].scopes()).is_empty());
        }
        let owner = Role::Owner.scopes();
        for s in [Scope::ClusterRead, Scope::ClusterAdmin, Scope::NodesAdmin, Scope::EdgesAdmin] {
            assert!(!owner.contains(s));
        }
        assert!(!Role::Developer.scopes().contains(Scope::SecretsReadMaterial));
        assert!(!Role::Developer.scopes().contains(Scope::ExecCreate));
    }

    #[test]
    fn every_scope_round_trips() {
        for s in Scope::ALL {
            assert_eq!(s.as_str().parse(), Ok(*s));
        }
    }

    #[test]
    fn a_set_is_written_and_read_as_the_list_that_a_tree_was() {
        let mut seed = 1u64;
        for _ in 0..200 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let drawn: Vec<Scope> =
                Scope::ALL.iter().copied().filter(|s| seed >> 33 & 1 << *s as u32 != 0).collect();
            let tree: BTreeSet<Scope> = drawn.iter().copied().collect();
            let set: ScopeSet = drawn.iter().rev().copied().collect();
            assert_eq!(set.iter().collect::<Vec<_>>(), drawn);
            let bytes = postcard::to_stdvec(&tree).unwrap();
            assert_eq!(postcard::to_stdvec(&set).unwrap(), bytes);
            assert_eq!(postcard::from_bytes::<ScopeSet>(&bytes).unwrap(), set);
            let json = serde_json::to_string(&tree).unwrap();
            assert_eq!(serde_json::to_string(&set).unwrap(), json);
            assert_eq!(serde_json::from_str::<ScopeSet>(&json).unwrap(), set);
        }
        assert!(serde_json::from_str::<ScopeSet>(r#"["apps:fly"]"#).is_err());
    }
}
