//! The command lines of people who deploy.

use clap::{Args, Subcommand, ValueEnum};
use holdfast_model::sealed::RegistryHost;
use holdfast_model::{
    AgentName, AppName, EnvName, ExecGrantId, Hostname, OrgName, PortName, ProcessName, Role, Scope,
    SecretKey, SnapshotId, VolumeName,
};
use std::path::PathBuf;
use std::time::Duration;

/// How long a deploy or scale is watched when nothing else is said: longer than a roll-out may take.
const WAIT_DEFAULT: &str = "11m";

/// `holdfast login`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  holdfast login --server https://10.0.0.1:7443 --ca-file ca.pem --token-file token
  pass holdfast | holdfast login --server https://10.0.0.1:7443 --ca-pin 6c1f…
The pin is the SHA-256 of the cluster's CA certificate: `holdfast server init` printed it.")]
pub(crate) struct Login {
    /// A member's address; may be given several times, to fail over to.
    #[arg(long, required = true, value_name = "URL")]
    pub(crate) server: Vec<String>,
    /// Read the token from this file instead of standard input.
    #[arg(long, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// The cluster's CA certificate (PEM).
    #[arg(long, value_name = "FILE", required_unless_present = "ca_pin", conflicts_with = "ca_pin")]
    pub(crate) ca_file: Option<PathBuf>,
    /// The CA certificate's SHA-256; the certificate itself is fetched and checked against it.
    #[arg(long, value_name = "HEX")]
    pub(crate) ca_pin: Option<String>,
}

/// `holdfast org …`.
#[derive(Debug, Subcommand)]
pub(crate) enum OrgCommand {
    /// Make an org.
    Create {
        /// Its name, unique in the cluster.
        name: OrgName,
    },
    /// List orgs.
    List,
}

/// `holdfast app …`.
#[derive(Debug, Subcommand)]
pub(crate) enum AppCommand {
    /// Make an app in the org.
    Create {
        /// Its name, unique in the org.
        name: AppName,
    },
    /// List the org's apps.
    List,
    /// Delete an app with everything in it.
    Delete {
        /// Which, by name or id.
        app: String,
    },
}

/// `holdfast env …`.
#[derive(Debug, Subcommand)]
pub(crate) enum EnvCommand {
    /// Make an env of the app.
    Create {
        /// Its name, unique in the app.
        name: EnvName,
    },
    /// List the app's envs.
    List,
}

/// Whether to watch what was started.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Wait {
    /// Watch until it is done (the default).
    #[arg(long, overrides_with = "no_wait")]
    pub(crate) wait: bool,
    /// Return as soon as it is accepted.
    #[arg(long)]
    pub(crate) no_wait: bool,
    /// Give up watching after this long; what was started goes on.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, default_value = WAIT_DEFAULT)]
    pub(crate) wait_timeout: Duration,
}

/// `holdfast deploy`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  holdfast deploy --app shop --env prod
  holdfast deploy --image registry.example/shop@sha256:… --scale web=3
A tag is resolved to a digest once, here: what is tested is what runs.")]
pub(crate) struct Deploy {
    /// The manifest.
    #[arg(long, short, value_name = "FILE", default_value = "holdfast.toml")]
    pub(crate) file: PathBuf,
    /// The image, instead of the manifest's.
    #[arg(long, value_name = "REFERENCE")]
    pub(crate) image: Option<String>,
    /// How many instances of a process, as in web=3.
    #[arg(long = "scale", value_name = "PROCESS=N", value_parser = count)]
    pub(crate) counts: Vec<(ProcessName, u32)>,
    #[command(flatten)]
    pub(crate) wait: Wait,
}

/// `holdfast scale`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  holdfast scale --app shop --env prod web=3 worker=1")]
pub(crate) struct Scale {
    /// How many instances of a process.
    #[arg(required = true, value_name = "PROCESS=N", value_parser = count)]
    pub(crate) counts: Vec<(ProcessName, u32)>,
    #[command(flatten)]
    pub(crate) wait: Wait,
}

/// Parses `web=3`.
fn count(text: &str) -> Result<(ProcessName, u32), String> {
    let (process, number) = text.split_once('=').ok_or("expected a process and a number, as in web=3")?;
    let process = process.parse::<ProcessName>().map_err(|e| e.to_string())?;
    let number = number.parse().map_err(|_| format!("«{number}» is not a whole number"))?;
    Ok((process, number))
}

/// `holdfast route …`.
#[derive(Debug, Subcommand)]
pub(crate) enum RouteCommand {
    /// Lead a hostname or a port to a process.
    #[command(after_help = "\
Examples:
  holdfast route add shop.example --process web --port https
  holdfast route add --tcp --listen 5432 --process db --port postgres
TLS is passed through by its server name and never terminated: the process holds the certificate.")]
    Add(RouteAdd),
    /// List the env's routes.
    List,
    /// Remove a route.
    Remove {
        /// Its hostname or its id.
        route: String,
    },
}

/// `holdfast route add`.
#[derive(Debug, Args)]
pub(crate) struct RouteAdd {
    /// The name that clients ask for.
    #[arg(required_unless_present = "tcp", conflicts_with = "tcp")]
    pub(crate) hostname: Option<Hostname>,
    /// Take every TCP connection to the port, whatever it speaks.
    #[arg(long, requires = "listen")]
    pub(crate) tcp: bool,
    /// The edge's port (443 for TLS when nothing is said).
    #[arg(long, value_name = "PORT")]
    pub(crate) listen: Option<u16>,
    /// The process that it leads to.
    #[arg(long, value_name = "PROCESS", default_value = "web")]
    pub(crate) process: ProcessName,
    /// The process's port, by the name in the manifest.
    #[arg(long, value_name = "NAME")]
    pub(crate) port: PortName,
    /// Tell the process each client's address by a PROXY v2 header, which it must expect.
    #[arg(long)]
    pub(crate) proxy_protocol_v2: bool,
}

/// `holdfast volume …`.
#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// List the env's volumes.
    #[command(after_help = "\
A volume is made by the first deployment whose manifest declares it. Its disk lies on one node, its home, and one instance
has it at a time.

Examples:
  holdfast volume list --app shop --env prod
  holdfast volume list --json | jq -r '.[].name'")]
    List,
    /// Show a volume.
    #[command(after_help = "Example:\n  holdfast volume show data --app shop --env prod")]
    Show {
        /// Its name or id.
        volume: String,
    },
    /// Take a snapshot of a volume, and keep it in the operator's store of backups.
    #[command(after_help = "\
The process that has the volume stands still for two seconds at most; what is kept is what its disk would have after a loss
of power. A volume with `backup = true` in the manifest has a snapshot every day without this.

Examples:
  holdfast volume snapshot data --app shop --env prod
  holdfast volume snapshot data --no-wait --json | jq -r .id")]
    Snapshot {
        /// The volume's name or id.
        volume: String,
        #[command(flatten)]
        wait: Wait,
    },
    /// List the snapshots of the env's volumes, also of those that are deleted.
    #[command(after_help = "Example:\n  holdfast volume snapshots data --app shop --env prod")]
    Snapshots {
        /// Only those of this volume, by its name or id.
        volume: Option<String>,
    },
    /// Make a new volume from a snapshot. No volume that is there is touched.
    #[command(after_help = "\
Each part is verified before the volume can be mounted. Then either deploy a manifest that names the new volume, or
restore under the old name after the old volume was deleted.

Examples:
  holdfast volume restore snap_01jz8k5v3qd9y2m4n6p8r0s2t4 --as data2
  holdfast volume delete data --yes && holdfast volume restore snap_01jz8k5v3qd9y2m4n6p8r0s2t4 --as data")]
    Restore {
        /// The snapshot.
        snapshot: SnapshotId,
        /// What the new volume is called.
        #[arg(long = "as", value_name = "NAME")]
        name: VolumeName,
        #[command(flatten)]
        wait: Wait,
    },
    /// Delete a snapshot and the only key to it.
    #[command(
        after_help = "Example:\n  holdfast volume delete-snapshot snap_01jz8k5v3qd9y2m4n6p8r0s2t4 --yes"
    )]
    DeleteSnapshot {
        /// The snapshot.
        snapshot: SnapshotId,
    },
    /// Delete a volume that no instance has, and all that is on it.
    #[command(after_help = "\
Examples:
  holdfast scale --app shop --env prod db=0
  holdfast volume delete data --app shop --env prod --yes")]
    Delete {
        /// Its name or id.
        volume: String,
    },
}
/// Whether what runs gets a new version of secrets at once.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Roll {
    /// Leave what runs as it is; the next deployment gets the new version.
    #[arg(long)]
    pub(crate) no_roll: bool,
}

impl Roll {
    pub(crate) const fn rolls(self) -> bool {
        !self.no_roll
    }
}

/// `holdfast secrets …`.
#[derive(Debug, Subcommand)]
pub(crate) enum SecretsCommand {
    /// Set a secret, from a file or standard input.
    #[command(after_help = "\
Examples:
  holdfast secrets set DATABASE_URL --app shop --env prod < url.txt
  holdfast secrets set TLS_KEY --file key.pem
The bytes are taken as they are; of what is typed, the line's end is not part. A value is never an argument: others on
the machine would see it.")]
    Set {
        /// Its key.
        key: SecretKey,
        /// Where its value stands; standard input when nothing is said.
        #[arg(long, short, value_name = "FILE")]
        file: Option<PathBuf>,
        #[command(flatten)]
        roll: Roll,
    },
    /// List the env's secrets, not what they say.
    List {
        /// Of this version instead of the newest.
        #[arg(long, value_name = "N")]
        version: Option<u32>,
    },
    /// List the versions that are kept.
    Versions,
    /// Make an earlier version the newest again.
    Rollback {
        /// Which version.
        version: u32,
        #[command(flatten)]
        roll: Roll,
    },
    /// Replace all secrets by those of a file.
    #[command(after_help = "\
Examples:
  holdfast secrets import --file prod.env
  holdfast secrets import --keep < more.env
Lines are KEY=VALUE, taken as they stand: no quotes, no trimming. A value that begins with «base64:» is decoded.")]
    Import {
        /// The file; standard input when nothing is said.
        #[arg(long, short, value_name = "FILE")]
        file: Option<PathBuf>,
        /// Keep secrets that the file does not name.
        #[arg(long)]
        keep: bool,
        #[command(flatten)]
        roll: Roll,
    },
    /// Remove secrets.
    Delete {
        /// Their keys.
        #[arg(required = true)]
        keys: Vec<SecretKey>,
        #[command(flatten)]
        roll: Roll,
    },
    /// Print secrets in clear; that becomes part of the history.
    Show(SecretsShow),
}

/// `holdfast secrets show`.
#[derive(Debug, Args)]
pub(crate) struct SecretsShow {
    /// Which; all when nothing is said.
    pub(crate) keys: Vec<SecretKey>,
    /// Of this version instead of the newest.
    #[arg(long, value_name = "N")]
    pub(crate) version: Option<u32>,
}

/// `holdfast registry …`.
#[derive(Debug, Subcommand)]
pub(crate) enum RegistryCommand {
    /// Keep a credential for a registry: the app's, if one is named, else its org's.
    #[command(after_help = "\
Examples:
  holdfast registry set registry.example --user robot --password-file token --org acme
  holdfast registry set registry.example:5000 --user robot --app shop < token")]
    Set {
        /// The registry, as an image's reference begins.
        host: RegistryHost,
        /// The user.
        #[arg(long)]
        user: String,
        /// Where the password or token stands; standard input when nothing is said.
        #[arg(long, value_name = "FILE")]
        password_file: Option<PathBuf>,
    },
    /// List the registries for which there are credentials.
    List,
    /// Forget a credential.
    Delete {
        /// The registry.
        host: RegistryHost,
    },
}

/// `holdfast instances`.
#[derive(Debug, Args)]
pub(crate) struct Instances {
    /// Include those that have ended.
    #[arg(long)]
    pub(crate) all: bool,
}

/// A plain list.
#[derive(Debug, Args)]
pub(crate) struct Listing {
    /// The newest so many.
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub(crate) limit: usize,
}

/// `holdfast logs`.
#[derive(Debug, Args)]
#[command(after_help = "\
Lines come with the process and the end of the instance's id in front. What a terminal would obey is shown escaped;
--json prints one object a line, with the bytes as they were written. `* ` marks remarks of the platform.

Examples:
  holdfast logs --app shop --env prod --follow
  holdfast logs --process web --since 10m --timestamps
  holdfast logs --instance inst_01k… --tail 20
  holdfast logs --all --json | jq -r .text")]
pub(crate) struct Logs {
    /// Go on printing what is written, by instances that come later too.
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Only lines younger than this.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) since: Option<Duration>,
    /// Only of this instance.
    #[arg(long, value_name = "INSTANCE", conflicts_with = "process")]
    pub(crate) instance: Option<String>,
    /// Only of this process's instances.
    #[arg(long, value_name = "PROCESS")]
    pub(crate) process: Option<ProcessName>,
    /// The last so many lines of each instance; 200 when neither this nor --since is given.
    #[arg(long, short = 'n', alias = "lines", value_name = "N")]
    pub(crate) tail: Option<u64>,
    /// Print when the node got each line, in UTC.
    #[arg(long, short)]
    pub(crate) timestamps: bool,
    /// Also of instances that have ended, as long as their node keeps their lines.
    #[arg(long)]
    pub(crate) all: bool,
}

/// `holdfast exec`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  holdfast exec --app shop --env prod                 a shell in the only process's oldest instance
  holdfast exec web -- ls -l /srv                     in an instance of a process
  holdfast exec inst_01k… -- sh -c 'cat > /tmp/x' < file
  holdfast exec --list                                who is in
Runs as the image's user, with its variables and folder, inside the microVM and never on its host.
The exit code is the program's, 128 and the signal if one ended it; failures of our own have the usual codes.
On a terminal, ~. at the beginning of a line leaves. The token needs the scope exec:create.")]
pub(crate) struct Exec {
    /// A process, whose oldest ready instance is taken, or an instance.
    #[arg(value_name = "PROCESS|INSTANCE")]
    pub(crate) target: Option<String>,
    /// The program and its arguments, after `--`; without one, the shell of the image's user.
    #[arg(last = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
    /// Give the program a terminal, also where there is none here.
    #[arg(short = 't', long = "terminal", overrides_with = "no_terminal")]
    pub(crate) terminal: bool,
    /// Give the program no terminal.
    #[arg(short = 'T', long = "no-terminal", overrides_with = "terminal")]
    pub(crate) no_terminal: bool,
    /// Cut the session off after this long, a day at most.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) time: Option<Duration>,
    /// List the env's grants and sessions.
    #[arg(long, conflicts_with_all = ["target", "command", "end"])]
    pub(crate) list: bool,
    /// End somebody's session, or take a grant away.
    #[arg(long, value_name = "GRANT", conflicts_with_all = ["target", "command"])]
    pub(crate) end: Option<ExecGrantId>,
}

/// `holdfast events`.
#[derive(Debug, Args)]
pub(crate) struct Events {
    /// Go on printing what happens.
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Only what came after this revision; the last `limit` when nothing is said.
    #[arg(long, value_name = "REVISION")]
    pub(crate) after: Option<u64>,
    /// The last so many.
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub(crate) limit: usize,
}

/// `holdfast token …`.
#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Make a token; it is shown once.
    #[command(after_help = token_help())]
    Create(TokenCreate),
    /// List tokens.
    List,
    /// End a token at once.
    Revoke {
        /// Its id.
        token: holdfast_model::TokenId,
    },
}

fn token_help() -> String {
    let scopes: Vec<_> = Scope::ALL.iter().map(|s| s.as_str()).collect();
    format!(
        "Examples:\n  holdfast token create ci --role developer --ttl 30d\n  holdfast token create watch --scope cluster:read --operator\n\nScopes:\n  {}",
        scopes.join("\n  ")
    )
}

/// `holdfast token create`.
#[derive(Debug, Args)]
pub(crate) struct TokenCreate {
    /// What people call it.
    pub(crate) name: AgentName,
    /// What it may do within the org.
    #[arg(long, value_enum)]
    pub(crate) role: Option<RoleArg>,
    /// A scope beside the role's; may be given several times.
    #[arg(long = "scope", value_name = "SCOPE")]
    pub(crate) scopes: Vec<Scope>,
    /// Bind it to no org: for those who run the cluster.
    #[arg(long)]
    pub(crate) operator: bool,
    /// How long it is valid.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, default_value = "30d")]
    pub(crate) ttl: Duration,
    /// Write the token to this file (0600) instead of printing it.
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
}

/// A role, on a command line.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum RoleArg {
    /// Everything within the org.
    Owner,
    /// Everything but granting access.
    Admin,
    /// Builds and deploys; no secret material, no exec.
    Developer,
    /// Looks, and changes nothing.
    Viewer,
}

impl From<RoleArg> for Role {
    fn from(role: RoleArg) -> Self {
        match role {
            RoleArg::Owner => Self::Owner,
            RoleArg::Admin => Self::Admin,
            RoleArg::Developer => Self::Developer,
            RoleArg::Viewer => Self::Viewer,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_parsed_or_answered() {
        assert_eq!(count("web=3").unwrap(), ("web".parse().unwrap(), 3));
        for bad in ["web", "web=", "web=-1", "=3", "Web=3", "web=3.5"] {
            assert!(count(bad).is_err(), "{bad}");
        }
    }
}
