//! The command lines of people who run the cluster.

use super::tenant::Wait;
use clap::{Args, Subcommand, ValueEnum};
use holdfast_jail::ids::{COUNT_DEFAULT, FIRST_DEFAULT};
use holdfast_metrics::Listen;
use holdfast_model::resource::EnrolmentKind;
use holdfast_model::{AgentName, Revision};
use holdfast_node::network::guard::Rate;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

/// `holdfast server …`.
#[derive(Debug, Subcommand)]
pub(crate) enum ServerCommand {
    /// Make a new cluster and its CA; prints the operator's token, once.
    #[command(after_help = "\
Example:
  holdfast server init --data-dir /var/lib/holdfast --name alpha --api-addr 10.0.0.1:7443 --raft-addr 10.0.0.1:7444
  holdfast server run --data-dir /var/lib/holdfast")]
    Init(ServerInit),
    /// Join a cluster as a further member, with a one-time secret from `holdfast server invite`.
    Join(ServerJoin),
    /// Run a member that was made by init or join.
    Run(ServerRun),
    /// Make a one-time secret with which a member, node or edge joins.
    #[command(after_help = "\
Example:
  holdfast server invite node --out node.secret
  holdfast node join --data-dir /var/lib/holdfast-node --name n1 --server https://10.0.0.1:7443 --ca-pin … --secret-file node.secret")]
    Invite(Invite),
    /// List the members: who votes, who leads.
    List(ListMembers),
    /// Remove a member for good, running or not; its id is never used again.
    #[command(after_help = "\
Example, for a member whose disk is lost:
  holdfast server remove beta
  holdfast server invite member --out member.secret
  holdfast server join --data-dir /var/lib/holdfast --name beta --api-addr … --raft-addr … --server … --ca-pin … --secret-file member.secret
  holdfast server run --data-dir /var/lib/holdfast")]
    Remove(RemoveMember),
    /// Make a member a voter.
    Promote {
        /// Its name or id.
        member: String,
    },
    /// Make a member one that follows and serves agents, and does not vote.
    Demote {
        /// Its name or id.
        member: String,
    },
    /// Hand the leadership over, such as before maintenance.
    TransferLeader {
        /// To whom, by name or id; to any voter that answers when nothing is said.
        member: Option<String>,
    },
    /// Show to which key members seal, and how much is still sealed to an earlier one.
    Sealing,
    /// Make a new sealing key for the cluster, and seal every env's and org's key anew to it; nothing stops meanwhile.
    #[command(after_help = "\
Every member must be there to take the new key. See docs/ops/secrets.md.

Example:
  holdfast server rotate-sealing
  holdfast events --limit 5")]
    RotateSealing(Wait),
    /// Check every row, the event chain and a replay: on every running member, or in the folder of a stopped one.
    Verify(Verify),
    /// Make the views of a stopped member anew from its events; refuses when they lead elsewhere.
    Rebuild(Rebuild),
    /// Go on with one stopped member alone, after the majority was lost for good: a new incarnation begins.
    #[command(after_help = "\
See docs/ops/runbooks/recover-from-a-lost-majority.md before you use it.")]
    Recover(Recover),
    /// Print the API's OpenAPI document.
    Openapi {
        /// Print who may call what instead.
        #[arg(long)]
        access: bool,
    },
}

/// `holdfast server init`.
#[derive(Debug, Args)]
pub(crate) struct ServerInit {
    /// The member's own folder; made if it is missing.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) data_dir: PathBuf,
    /// The member's name, unique among members.
    #[arg(long, value_name = "NAME")]
    pub(crate) name: AgentName,
    /// Where people and agents reach this member, host:port.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) api_addr: String,
    /// Where other members reach this member, host:port.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) raft_addr: String,
    /// Write the operator's token to this file (0600) instead of printing it.
    #[arg(long, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
}

/// `holdfast server join`.
#[derive(Debug, Args)]
pub(crate) struct ServerJoin {
    /// The member's own folder; made if it is missing.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) data_dir: PathBuf,
    /// The member's name, unique among members.
    #[arg(long, value_name = "NAME")]
    pub(crate) name: AgentName,
    /// Where people and agents reach this member, host:port.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) api_addr: String,
    /// Where other members reach this member, host:port.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) raft_addr: String,
    #[command(flatten)]
    pub(crate) join: Join,
}

/// How a joiner finds and checks the cluster.
#[derive(Debug, Args)]
pub(crate) struct Join {
    /// A member's address, as in https://10.0.0.1:7443; may be given several times.
    #[arg(long, required = true, value_name = "URL")]
    pub(crate) server: Vec<String>,
    /// SHA-256 of the cluster's CA certificate, in hexadecimal: `holdfast server invite` printed it.
    #[arg(long, value_name = "HEX")]
    pub(crate) ca_pin: String,
    /// Read the one-time secret from this file instead of standard input.
    #[arg(long, value_name = "FILE")]
    pub(crate) secret_file: Option<PathBuf>,
}

/// `holdfast server run`.
#[derive(Debug, Args)]
pub(crate) struct ServerRun {
    /// The member's own folder.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) data_dir: PathBuf,
    /// Serve metrics for Prometheus here: an address and port, or unix:/path/of/a/socket.
    #[arg(long, value_name = "PLACE")]
    pub(crate) metrics: Option<Listen>,
    /// Ask registries on this machine's loopback, too, which images tags name: for a cluster on one machine.
    #[arg(long)]
    pub(crate) loopback_registries: bool,
}

/// `holdfast server list`.
#[derive(Debug, Args)]
pub(crate) struct ListMembers {
    /// Also those that were removed.
    #[arg(long)]
    pub(crate) all: bool,
}

/// `holdfast server remove`.
#[derive(Debug, Args)]
pub(crate) struct RemoveMember {
    /// Its name or id.
    pub(crate) member: String,
    /// Also when the members that stay have no majority that answers now.
    #[arg(long)]
    pub(crate) force: bool,
}

/// `holdfast server verify`.
#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// The folder of a stopped member; without it every running member checks itself.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) data_dir: Option<PathBuf>,
}

/// `holdfast server rebuild`.
#[derive(Debug, Args)]
pub(crate) struct Rebuild {
    /// The folder of a stopped member; without it every running member replays its own history, and --to is needed.
    #[arg(long, value_name = "FOLDER", required_unless_present = "to")]
    pub(crate) data_dir: Option<PathBuf>,
    /// Change nothing; tell what the views were at this revision.
    #[arg(long, value_name = "REVISION")]
    pub(crate) to: Option<Revision>,
}

/// `holdfast server recover`.
#[derive(Debug, Args)]
pub(crate) struct Recover {
    /// The folder of the stopped member that goes on.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) data_dir: PathBuf,
    /// Say that you know: what only the lost members had is lost, and they must never run again.
    #[arg(long)]
    pub(crate) i_understand_that_writes_may_be_lost: bool,
}

/// `holdfast server invite`.
#[derive(Debug, Args)]
pub(crate) struct Invite {
    /// As what.
    #[arg(value_enum)]
    pub(crate) kind: InviteKind,
    /// For a member that follows and serves agents, and does not vote.
    #[arg(long)]
    pub(crate) learner: bool,
    /// How long the secret is valid; a day at most.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) ttl: Option<Duration>,
    /// Write the secret to this file (0600) instead of printing it.
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
}

/// What an invitation lets somebody join as.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum InviteKind {
    /// A control-plane member.
    Member,
    /// A host of microVMs.
    Node,
    /// A host that routes public traffic.
    Edge,
}

impl From<InviteKind> for EnrolmentKind {
    fn from(kind: InviteKind) -> Self {
        match kind {
            InviteKind::Member => Self::Member,
            InviteKind::Node => Self::Node,
            InviteKind::Edge => Self::Edge,
        }
    }
}

/// `holdfast node …`.
#[derive(Debug, Subcommand)]
pub(crate) enum NodeCommand {
    /// Join the cluster, with a one-time secret.
    Join(NodeJoin),
    /// Run the agent.
    Run(NodeRun),
    /// Show what the agent on this host runs, from its own disk.
    Status(AgentFolder),
    /// End every microVM of this host and remove its network devices; the agent must not run.
    Wipe(AgentFolder),
    /// List the cluster's nodes.
    List,
    /// Move a node's instances away and place none on it.
    Drain {
        /// Its name or id.
        node: String,
    },
    /// Place nothing more on a node, and leave what runs there.
    Cordon {
        /// Its name or id.
        node: String,
    },
    /// Cut a node off for good, and replace its instances elsewhere.
    #[command(after_help = "\
For a host that may be in foreign hands. Its certificate is refused from now on and its streams are cut; routes leave its
instances at once. The agent, if it still obeys, takes its instances' network down and keeps their memory, disks and
logs as they are, for whoever looks into it. There is no way back: wipe the host and join it under another name.

  holdfast node quarantine n3 --yes")]
    Quarantine {
        /// Its name or id.
        node: String,
    },
    /// Take a drained or cordoned node back into use.
    #[command(visible_alias = "uncordon")]
    Activate {
        /// Its name or id.
        node: String,
    },
}

/// `holdfast node join`.
#[derive(Debug, Args)]
pub(crate) struct NodeJoin {
    /// The agent's own folder; made if it is missing.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) data_dir: PathBuf,
    /// The node's name, unique among nodes.
    #[arg(long, value_name = "NAME")]
    pub(crate) name: AgentName,
    /// Memory for instances in MiB, instead of what this host has to spare.
    #[arg(long, value_name = "MIB")]
    pub(crate) memory_mib: Option<u64>,
    /// CPU for instances in thousandths, instead of what this host has.
    #[arg(long, value_name = "N")]
    pub(crate) cpu_milli: Option<u64>,
    #[command(flatten)]
    pub(crate) join: Join,
}

/// `holdfast node run`.
#[derive(Debug, Args)]
#[command(after_help = "\
Each microVM's VMM runs in a jail: its own user, root, namespaces and cgroup, a system call filter, Landlock.
Cgroups need the unified hierarchy; a host that has its controllers in the old one can be run --without-cgroups:
then VMs are jailed all the same, but share memory and processors without limits between them.")]
pub(crate) struct NodeRun {
    /// The agent's own folder.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) data_dir: PathBuf,
    /// The folder with the guest's kernel and init.
    #[arg(long, value_name = "FOLDER", env = "HOLDFAST_ASSETS")]
    pub(crate) assets: Option<PathBuf>,
    /// Memory for instances in MiB, instead of what this host has to spare.
    #[arg(long, value_name = "MIB")]
    pub(crate) memory_mib: Option<u64>,
    /// CPU for instances in thousandths, instead of what this host has.
    #[arg(long, value_name = "N")]
    pub(crate) cpu_milli: Option<u64>,
    /// The folder of volumes' disks, best on a file system of its own; without it they lie in the agent's folder.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) volumes_dir: Option<PathBuf>,
    /// Where snapshots of volumes are kept: a folder that all nodes share, or s3://BUCKET/FOLDER with credentials in the
    /// environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT).
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) backups: Option<String>,
    /// Start microVMs although this host cannot bound them by cgroups.
    #[arg(long)]
    pub(crate) without_cgroups: bool,
    /// The first of the user ids that VMMs run as; agents on one host need ranges of their own.
    #[arg(long, value_name = "UID", default_value_t = FIRST_DEFAULT)]
    pub(crate) vmm_uid_first: u32,
    /// How many user ids there are.
    #[arg(long, value_name = "N", default_value_t = COUNT_DEFAULT)]
    pub(crate) vmm_uids: u32,
    /// What images may take on the disk, in MiB. The least recently used go; those that an instance here needs stay.
    #[arg(long, value_name = "MIB", default_value_t = 20_480)]
    pub(crate) images_mib: u64,
    /// What goes through one instance's network card in each direction, in megabits per second.
    #[arg(long, value_name = "N", default_value_t = Rate::MEGABITS_DEFAULT)]
    pub(crate) instance_mbit: u64,
    /// Serve metrics for Prometheus here: an address and port, or unix:/path/of/a/socket.
    #[arg(long, value_name = "PLACE")]
    pub(crate) metrics: Option<Listen>,
    #[command(flatten)]
    pub(crate) logs: LogBounds,
}

/// How much of what instances write a node keeps.
#[derive(Debug, Args)]
#[command(next_help_heading = "Logs of instances")]
pub(crate) struct LogBounds {
    /// Of one instance, in MiB.
    #[arg(long = "log-mib", value_name = "MIB", default_value_t = 8)]
    pub(crate) instance_mib: u64,
    /// Of all instances together, in MiB.
    #[arg(long = "log-total-mib", value_name = "MIB", default_value_t = 2_048)]
    pub(crate) node_mib: u64,
    /// No lines older than this.
    #[arg(long = "log-age", value_name = "TIME", value_parser = humantime::parse_duration, default_value = "7d")]
    pub(crate) age: Duration,
    /// For how long after an instance has ended.
    #[arg(long = "log-ended-age", value_name = "TIME", value_parser = humantime::parse_duration, default_value = "72h")]
    pub(crate) ended: Duration,
}

/// An agent's folder.
#[derive(Debug, Args)]
pub(crate) struct AgentFolder {
    /// The agent's own folder.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) data_dir: PathBuf,
}

/// `holdfast edge …`.
#[derive(Debug, Subcommand)]
pub(crate) enum EdgeCommand {
    /// Join the cluster, with a one-time secret.
    Join(EdgeJoin),
    /// Run the agent.
    Run(EdgeRun),
    /// Show what the agent on this host routes.
    Status(AgentFolder),
    /// List the cluster's edges.
    List,
}

/// `holdfast edge join`.
#[derive(Debug, Args)]
pub(crate) struct EdgeJoin {
    /// The agent's own folder; made if it is missing.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) data_dir: PathBuf,
    /// The edge's name, unique among edges.
    #[arg(long, value_name = "NAME")]
    pub(crate) name: AgentName,
    #[command(flatten)]
    pub(crate) join: Join,
}

/// `holdfast edge run`.
#[derive(Debug, Args)]
pub(crate) struct EdgeRun {
    /// The agent's own folder.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) data_dir: PathBuf,
    /// An address to listen on; every address when nothing is said.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) listen: Vec<IpAddr>,
    /// Serve metrics for Prometheus here: an address and port, or unix:/path/of/a/socket.
    #[arg(long, value_name = "PLACE")]
    pub(crate) metrics: Option<Listen>,
}

/// `holdfast confirm`.
#[derive(Debug, Args)]
#[command(after_help = "\
An agent holds back an update that would remove more than half of what it has, until somebody confirms it.
`holdfast status` shows what is held, and at which revision.

Example:
  holdfast confirm node n1 --through 4211")]
pub(crate) struct Confirm {
    /// What kind of agent.
    #[arg(value_enum)]
    pub(crate) kind: AgentKind,
    /// Its name or id.
    pub(crate) agent: String,
    /// Confirm updates up to this revision; the held one's when nothing is said.
    #[arg(long, value_name = "REVISION")]
    pub(crate) through: Option<Revision>,
}

/// A kind of agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum AgentKind {
    /// A host of microVMs.
    Node,
    /// A host that routes public traffic.
    Edge,
}

/// `holdfast doctor`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Each check is ok, warn, fail or unknown (it could not be looked at), with what that means and how to mend it. Nothing is
changed. The host is held against Firecracker's recommendations for production hosts. Run it as root on a node: others
do not see processes and packet filters.

Examples:
  holdfast doctor --data-dir /var/lib/holdfast-node
  holdfast doctor --host
  holdfast doctor --json | jq '.findings[] | select(.severity == \"fail\")'

It ends with 1 if any check fails.")]
pub(crate) struct Doctor {
    /// The folder of the node agent on this host, for its certificate, its disk and its probe of VMMs.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) data_dir: Option<PathBuf>,
    /// Look at this host only.
    #[arg(long, conflicts_with = "cluster")]
    pub(crate) host: bool,
    /// Look at login and cluster only.
    #[arg(long)]
    pub(crate) cluster: bool,
}

/// `holdfast dev`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
The first run makes the cluster; later runs start it again from the same folder. Ctrl-C stops everything.
What runs is written to FOLDER/dev.json. In another terminal:
  export HOLDFAST_CONTEXT=.holdfast-dev/context.json
  holdfast status")]
pub(crate) struct Dev {
    /// Where the cluster lives.
    #[arg(long, value_name = "FOLDER", default_value = ".holdfast-dev")]
    pub(crate) data_dir: PathBuf,
    /// The folder with the guest's kernel and init.
    #[arg(long, value_name = "FOLDER", env = "HOLDFAST_ASSETS")]
    pub(crate) assets: Option<PathBuf>,
    /// How many control-plane members, when the cluster is made.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=5))]
    pub(crate) servers: u8,
    /// First of the ports that members use, when the cluster is made; free ones when nothing is said.
    #[arg(long, value_name = "PORT")]
    pub(crate) base_port: Option<u16>,
    /// Run no node: nothing can be deployed.
    #[arg(long)]
    pub(crate) no_node: bool,
    /// Run no edge: nothing can be reached.
    #[arg(long)]
    pub(crate) no_edge: bool,
    /// An address that the edge listens on; loopback when nothing is said.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) listen: Vec<IpAddr>,
}
