//! What a dev cluster consists of and how far its making got, in `plan.json` of its folder.

use crate::args::operator::Dev;
use crate::failure::{Failure, with_sources};
use holdfast_identity::files::{read_secret, write_secret};
use serde::{Deserialize, Serialize};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

/// Ports that each member uses: its API's and its Raft transport's.
const PORTS_PER_MEMBER: u16 = 2;

/// `plan.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Plan {
    /// The members.
    pub(crate) members: Vec<Member>,
    /// SHA-256 of the CA certificate, once there is one.
    pub(crate) ca_pin: Option<String>,
    /// Whether the edge has joined.
    pub(crate) edge_joined: bool,
    /// Whether the node has joined.
    pub(crate) node_joined: bool,
}

/// A member of the plan.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Member {
    /// Its name.
    pub(crate) name: String,
    /// Where its API listens.
    pub(crate) api: SocketAddr,
    /// Where its Raft transport listens.
    pub(crate) raft: SocketAddr,
    /// Whether it is part of the cluster.
    pub(crate) joined: bool,
}

/// The cluster's folder and what is where in it.
#[derive(Clone, Debug)]
pub(crate) struct Folder {
    root: PathBuf,
}

impl Folder {
    /// Makes the folder if it is missing. Its path becomes absolute: processes are started elsewhere too.
    pub(crate) fn open(path: &Path) -> Result<Self, Failure> {
        std::fs::create_dir_all(path).map_err(Failure::file("make", path))?;
        let root = path.canonicalize().map_err(Failure::file("find", path))?;
        std::fs::create_dir_all(root.join("logs")).map_err(Failure::file("make", root.join("logs")))?;
        Ok(Self { root })
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The folder of one process.
    pub(crate) fn of(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Where a process's output goes.
    pub(crate) fn log(&self, name: &str) -> PathBuf {
        self.root.join("logs").join(format!("{name}.log"))
    }

    pub(crate) fn token(&self) -> PathBuf {
        self.root.join("operator.token")
    }

    pub(crate) fn ca(&self) -> PathBuf {
        self.root.join("ca.pem")
    }

    pub(crate) fn context(&self) -> PathBuf {
        self.root.join("context.json")
    }

    pub(crate) fn record(&self) -> PathBuf {
        self.root.join("dev.json")
    }

    fn plan(&self) -> PathBuf {
        self.root.join("plan.json")
    }
}

impl Plan {
    /// Reads the plan of an existing cluster, or makes one as the arguments say.
    pub(crate) fn load_or_make(folder: &Folder, arguments: &Dev) -> Result<Self, Failure> {
        let path = folder.plan();
        if path.exists() {
            let text = read_secret(&path).map_err(|e| Failure::Host(with_sources(&e)))?;
            return serde_json::from_slice(&text).map_err(|e| {
                Failure::Host(format!(
                    "{} cannot be understood ({e}); remove the folder to start anew.",
                    path.display()
                ))
            });
        }
        let plan =
            Self { members: members(arguments)?, ca_pin: None, edge_joined: false, node_joined: false };
        plan.save(folder)?;
        Ok(plan)
    }

    /// Writes the plan, whole or not at all.
    pub(crate) fn save(&self, folder: &Folder) -> Result<(), Failure> {
        let text = serde_json::to_vec_pretty(self).map_err(|e| Failure::Host(with_sources(&e)))?;
        write_secret(&folder.plan(), &text).map_err(|e| Failure::Host(with_sources(&e)))
    }

    /// Members' API addresses, as a login has them.
    pub(crate) fn servers(&self) -> Vec<String> {
        self.members.iter().map(|m| format!("https://{}", m.api)).collect()
    }
}

fn members(arguments: &Dev) -> Result<Vec<Member>, Failure> {
    let wanted = u16::from(arguments.servers) * PORTS_PER_MEMBER;
    let ports: Vec<u16> = match arguments.base_port {
        Some(base) => (base..=u16::MAX).take(usize::from(wanted)).collect(),
        None => free_ports(wanted)?,
    };
    if ports.len() < usize::from(wanted) {
        return Err(Failure::Usage(format!("{wanted} ports do not fit above --base-port.")));
    }
    let address = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let pairs = ports.chunks_exact(usize::from(PORTS_PER_MEMBER)).enumerate();
    Ok(pairs
        .map(|(i, pair)| Member {
            name: format!("server-{}", i + 1),
            api: address(pair[0]),
            raft: address(pair[1]),
            joined: false,
        })
        .collect())
}

/// The lowest port that members get.
const PORT_FIRST: u16 = 10_000;

/// The first port that the system gives to connections. A member's lies below: while the member is down a connection of
/// somebody else's could take it, and the member could not come back.
fn first_ephemeral_port() -> u16 {
    const USUAL: u16 = 32_768;
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    range.split_whitespace().next().and_then(|first| first.parse().ok()).unwrap_or(USUAL)
}

/// Ports that nobody listens on now. All are held until all are known, so that they differ.
fn free_ports(number: u16) -> Result<Vec<u16>, Failure> {
    let end = first_ephemeral_port().max(PORT_FIRST.saturating_add(1));
    let span = u32::from(end - PORT_FIRST);
    // Where to begin differs between clusters that are made at the same time.
    let begin = std::process::id().wrapping_mul(31) % span;
    let candidates = (0..span).filter_map(|n| u16::try_from((begin + n) % span).ok());
    let mut held = Vec::new();
    for port in candidates.map(|offset| PORT_FIRST + offset) {
        if held.len() == usize::from(number) {
            break;
        }
        held.extend(TcpListener::bind((Ipv4Addr::LOCALHOST, port)));
    }
    let ports: Result<Vec<u16>, _> = held.iter().map(|l| Ok(l.local_addr()?.port())).collect();
    let ports = ports
        .map_err(|e: std::io::Error| Failure::Host(format!("Cannot find free ports on loopback: {e}.")))?;
    if ports.len() < usize::from(number) {
        return Err(Failure::Host(format!(
            "Fewer than {number} ports from {PORT_FIRST} to {end} are free: name some with --base-port."
        )));
    }
    Ok(ports)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_connection_takes_the_port_of_a_member_that_is_down() {
        let ports = free_ports(6).unwrap();
        assert!(ports.iter().all(|port| (PORT_FIRST..first_ephemeral_port()).contains(port)), "{ports:?}");
        let distinct: std::collections::BTreeSet<_> = ports.iter().collect();
        assert_eq!(distinct.len(), 6);
    }

    fn arguments(base_port: Option<u16>) -> Dev {
        Dev {
            data_dir: PathBuf::new(),
            assets: None,
            servers: 3,
            base_port,
            no_node: false,
            no_edge: false,
            listen: Vec::new(),
        }
    }

    #[test]
    fn a_plan_keeps_its_ports() {
        let folder = tempfile::tempdir().unwrap();
        let folder = Folder::open(folder.path()).unwrap();
        let first = Plan::load_or_make(&folder, &arguments(None)).unwrap();
        let again = Plan::load_or_make(&folder, &arguments(Some(1))).unwrap();
        assert_eq!(first.servers(), again.servers());
        let ports: std::collections::BTreeSet<_> =
            first.members.iter().flat_map(|m| [m.api.port(), m.raft.port()]).collect();
        assert_eq!(ports.len(), 6);
    }

    #[test]
    fn ports_from_a_base_follow_one_another_or_are_refused() {
        let members = members(&arguments(Some(7000))).unwrap();
        assert_eq!(members[2].raft.port(), 7005);
        assert!(super::members(&arguments(Some(65_533))).is_err());
    }
}
