//! Names inside certificates: the role and id of a holder as a SPIFFE-style URI, and the DNS names of members.
//!
//! Parsing is strict and total: a name that this module did not write is refused, so that nothing further in can be
//! confused about who a peer is.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use rustls_pki_types::ServerName;

/// Longest cluster, member or agent id, in bytes; also the longest label that DNS allows.
pub const ID_BYTES_MAX: usize = 63;
/// Most extra host names or addresses in one member certificate.
pub const MEMBER_NAMES_MAX: usize = 32;
/// Domain under which every member of every cluster has its certificate name. It is never resolved.
pub const SERVER_DOMAIN: &str = "holdfast.internal";

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SubjectError {
    /// An id has a character, or a length, that no id has.
    #[error(
        "The id {id:?} cannot stand in a certificate; ids are 1 to {ID_BYTES_MAX} characters from A–Z, a–z, 0–9, `-` and `_`."
    )]
    Id {
        /// The offending id, cut to a printable length.
        id: String,
    },
    /// A host name of a member is not a DNS name.
    #[error("The host name {name:?} is not a valid DNS name; give a name such as `server-1.example.com`.")]
    HostName {
        /// The offending name.
        name: String,
    },
    /// A member asked for more names than fit.
    #[error("A member certificate holds at most {MEMBER_NAMES_MAX} host names and addresses together.")]
    TooManyNames,
    /// A URI is not one of ours.
    #[error(
        "The certificate's URI is not of the form `spiffe://<cluster>/<role>/<id>`; it was not issued by this product."
    )]
    Uri,
    /// A role that does not exist.
    #[error("There is no role {role:?}; a certificate is for a `member`, a `node` or an `edge`.")]
    Role {
        /// The offending role.
        role: String,
    },
}

/// What a certificate entitles its holder to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// A control-plane server: may speak Raft and serve the API.
    Member,
    /// A node agent: may follow its own desired state and report.
    Node,
    /// An edge agent: may follow its own routes and report.
    Edge,
}

impl Role {
    /// The role as it is spelled in a certificate.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Member => "member",
            Role::Node => "node",
            Role::Edge => "edge",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = SubjectError;

    fn from_str(role: &str) -> Result<Role, SubjectError> {
        match role {
            "member" => Ok(Role::Member),
            "node" => Ok(Role::Node),
            "edge" => Ok(Role::Edge),
            other => Err(SubjectError::Role { role: printable(other) }),
        }
    }
}

/// For whom a certificate is issued. Decided by the cluster, never by the signing request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subject {
    /// A control-plane server.
    Member {
        /// The member's id.
        id: String,
        /// Further DNS names by which people reach this member.
        host_names: Vec<String>,
        /// Addresses by which people reach this member.
        addresses: Vec<IpAddr>,
    },
    /// A node agent.
    Node {
        /// The node's id.
        id: String,
    },
    /// An edge agent.
    Edge {
        /// The edge's id.
        id: String,
    },
}

impl Subject {
    /// The role that the certificate will carry.
    pub fn role(&self) -> Role {
        match self {
            Subject::Member { .. } => Role::Member,
            Subject::Node { .. } => Role::Node,
            Subject::Edge { .. } => Role::Edge,
        }
    }

    /// The id that the certificate will carry.
    pub fn id(&self) -> &str {
        match self {
            Subject::Member { id, .. } | Subject::Node { id } | Subject::Edge { id } => id,
        }
    }
}

/// Who a peer is, as its certificate says. Only meaningful once TLS has verified the chain.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PeerIdentity {
    /// The cluster whose authority issued the certificate.
    pub cluster: String,
    /// What the peer may be.
    pub role: Role,
    /// The member's, node's or edge's id.
    pub id: String,
}

impl PeerIdentity {
    /// Builds the identity for `subject` in `cluster`.
    ///
    /// # Errors
    /// [`SubjectError::Id`] when either id cannot stand in a certificate.
    pub fn new(cluster: &str, role: Role, id: &str) -> Result<PeerIdentity, SubjectError> {
        Ok(PeerIdentity { cluster: checked_id(cluster)?, role, id: checked_id(id)? })
    }

    /// The URI that stands for this identity in a certificate.
    pub fn uri(&self) -> String {
        format!("spiffe://{}/{}/{}", self.cluster, self.role, self.id)
    }

    /// Reads an identity back from its URI.
    ///
    /// # Errors
    /// [`SubjectError`] when the URI is not exactly one that [`PeerIdentity::uri`] writes.
    pub fn from_uri(uri: &str) -> Result<PeerIdentity, SubjectError> {
        let rest = uri.strip_prefix("spiffe://").ok_or(SubjectError::Uri)?;
        let mut parts = rest.split('/');
        let (Some(cluster), Some(role), Some(id), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(SubjectError::Uri);
        };
        PeerIdentity::new(cluster, role.parse()?, id)
    }
}

impl fmt::Display for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.role, self.id)
    }
}

/// The name that every member of `cluster` proves to its clients, whatever its addresses are.
///
/// # Errors
/// [`SubjectError::Id`] when the id cannot be a DNS label.
pub fn server_name(cluster: &str) -> Result<ServerName<'static>, SubjectError> {
    as_server_name(cluster_dns_name(cluster)?)
}

/// The name that only member `member` of `cluster` can prove: for dialling one member in particular.
///
/// # Errors
/// [`SubjectError::Id`] when either id cannot be a DNS label.
pub fn member_server_name(cluster: &str, member: &str) -> Result<ServerName<'static>, SubjectError> {
    as_server_name(member_dns_name(cluster, member)?)
}

pub(crate) fn cluster_dns_name(cluster: &str) -> Result<String, SubjectError> {
    Ok(format!("{}.{SERVER_DOMAIN}", dns_label(cluster)?))
}

pub(crate) fn member_dns_name(cluster: &str, member: &str) -> Result<String, SubjectError> {
    Ok(format!("{}.{}.{SERVER_DOMAIN}", dns_label(member)?, dns_label(cluster)?))
}

/// Checks a host name that an operator gave for a member.
pub(crate) fn checked_host_name(name: &str) -> Result<String, SubjectError> {
    let refused = || SubjectError::HostName { name: printable(name) };
    match ServerName::try_from(name.to_owned()).map_err(|_| refused())? {
        // A host name below our own domain would let one member, or another cluster, be taken for this one.
        ServerName::DnsName(dns) if !dns.as_ref().to_ascii_lowercase().ends_with(SERVER_DOMAIN) => {
            Ok(dns.as_ref().to_ascii_lowercase())
        }
        _ => Err(refused()),
    }
}

fn as_server_name(name: String) -> Result<ServerName<'static>, SubjectError> {
    ServerName::try_from(name.clone()).map_err(|_| SubjectError::Id { id: name })
}

fn dns_label(id: &str) -> Result<String, SubjectError> {
    let label = checked_id(id)?.to_ascii_lowercase().replace('_', "-");
    if label.starts_with('-') || label.ends_with('-') {
        return Err(SubjectError::Id { id: printable(id) });
    }
    Ok(label)
}

fn checked_id(id: &str) -> Result<String, SubjectError> {
    let fits = (1..=ID_BYTES_MAX).contains(&id.len());
    if fits && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_') {
        Ok(id.to_owned())
    } else {
        Err(SubjectError::Id { id: printable(id) })
    }
}

/// What of a refused name is repeated in an error: enough to recognise it, never pages of it.
fn printable(name: &str) -> String {
    name.chars().take(ID_BYTES_MAX + 1).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn uri_round_trips(cluster in "[A-Za-z0-9_-]{1,63}", id in "[A-Za-z0-9_-]{1,63}", role in 0..3u8) {
            let role = [Role::Member, Role::Node, Role::Edge][usize::from(role)];
            let identity = PeerIdentity::new(&cluster, role, &id).unwrap();
            prop_assert_eq!(PeerIdentity::from_uri(&identity.uri()).unwrap(), identity);
        }

        #[test]
        fn i14_any_uri_is_answered(uri in ".{0,200}") {
            if let Ok(identity) = PeerIdentity::from_uri(&uri) {
                prop_assert_eq!(identity.uri(), uri);
            }
        }
    }

    #[test]
    fn i14_crafted_uris_are_refused() {
        for uri in [
            "spiffe://c/member/a/b",
            "spiffe://c/member/",
            "spiffe:///member/a",
            "spiffe://c/admin/a",
            "spiffe://c/Member/a",
            "SPIFFE://c/member/a",
            "spiffe://c/member/a?x",
            "spiffe://c/member/%61",
            "https://c/member/a",
        ] {
            assert!(PeerIdentity::from_uri(uri).is_err(), "{uri}");
        }
    }

    #[test]
    fn members_cannot_claim_internal_or_odd_host_names() {
        for name in ["x.holdfast.internal", "HOLDFAST.internal", "127.0.0.1", "a b", "", "*.example.com"] {
            assert!(checked_host_name(name).is_err(), "{name}");
        }
        assert_eq!(checked_host_name("Server-1.Example.com").unwrap(), "server-1.example.com");
    }
}
