//! Every command line that the program understands. Nothing here acts; each struct says what was asked.

pub(crate) mod audit;
pub(crate) mod operator;
pub(crate) mod tenant;

use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  holdfast dev                                a whole cluster on this machine
  holdfast login --server https://10.0.0.1:7443 --ca-file ca.pem --token-file token
  holdfast app create shop && holdfast env create --app shop prod
  holdfast deploy --app shop --env prod       deploys what ./holdfast.toml says
  holdfast route add shop.example --process web --port https
  holdfast status --json | jq .cluster.leader

Exit codes:
  0 ok  1 failure  2 usage  3 not allowed  4 not found  5 conflict  6 try again later  7 a defect of ours";

/// Runs apps in microVMs on your own machines, and keeps them running when the control plane is gone.
#[derive(Debug, Parser)]
#[command(name = "holdfast", version, after_help = EXAMPLES, arg_required_else_help = true, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What every command takes.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Everywhere")]
pub(crate) struct Global {
    /// Print JSON for scripts instead of tables.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Say more on standard error: -v what is done, -vv how.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
    /// Never ask; fail instead.
    #[arg(long, global = true)]
    pub(crate) no_input: bool,
    /// Answer every question with yes.
    #[arg(long, short = 'y', global = true)]
    pub(crate) yes: bool,
    /// The org to work in, by name or id.
    #[arg(long, global = true, env = "HOLDFAST_ORG", value_name = "ORG")]
    pub(crate) org: Option<String>,
    /// The app to work on, by name or id.
    #[arg(long, global = true, env = "HOLDFAST_APP", value_name = "APP")]
    pub(crate) app: Option<String>,
    /// The env to work on, by name or id.
    #[arg(long, global = true, env = "HOLDFAST_ENV", value_name = "ENV")]
    pub(crate) env: Option<String>,
    /// The file that `holdfast login` wrote.
    #[arg(long, global = true, env = "HOLDFAST_CONTEXT", value_name = "FILE")]
    pub(crate) context: Option<PathBuf>,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Remember a cluster and a token.
    Login(tenant::Login),
    /// Orgs: who owns apps.
    #[command(subcommand)]
    Org(tenant::OrgCommand),
    /// Apps: what is deployed.
    #[command(subcommand)]
    App(tenant::AppCommand),
    /// Envs: where an app is deployed, as in prod.
    #[command(subcommand)]
    Env(tenant::EnvCommand),
    /// Deploy what holdfast.toml says, and watch until it serves.
    Deploy(tenant::Deploy),
    /// Change how many instances run.
    Scale(tenant::Scale),
    /// Hostnames and ports that lead to processes.
    #[command(subcommand)]
    Route(tenant::RouteCommand),
    /// Disks that outlive the instances which mount them.
    #[command(subcommand)]
    Volume(tenant::VolumeCommand),
    /// Secrets: what workloads need and nobody should see.
    #[command(subcommand)]
    Secrets(tenant::SecretsCommand),
    /// Credentials for private registries.
    #[command(subcommand)]
    Registry(tenant::RegistryCommand),
    /// List instances.
    Instances(tenant::Instances),
    /// List releases.
    Releases(tenant::Listing),
    /// List deployments.
    Deployments(tenant::Listing),
    /// Print what instances wrote.
    Logs(tenant::Logs),
    /// Run a program or a shell in an instance.
    Exec(tenant::Exec),
    /// Print the history of the cluster.
    Events(tenant::Events),
    /// The history as evidence: search it, take it along, verify it without the cluster.
    #[command(subcommand)]
    Audit(audit::AuditCommand),
    /// Show how the cluster stands.
    Status,
    /// Tokens: what people and machines log in with.
    #[command(subcommand)]
    Token(tenant::TokenCommand),
    /// Print a completion script.
    Completions {
        /// For which shell.
        shell: clap_complete::Shell,
    },
    /// Run and manage control-plane members.
    #[command(subcommand)]
    Server(operator::ServerCommand),
    /// Run and manage hosts of microVMs.
    #[command(subcommand)]
    Node(operator::NodeCommand),
    /// Run and manage hosts that route public traffic.
    #[command(subcommand)]
    Edge(operator::EdgeCommand),
    /// Let an agent carry out removals that it holds back.
    Confirm(operator::Confirm),
    /// Explain what is wrong with this host, the cluster or the login.
    Doctor(operator::Doctor),
    /// Run a whole cluster on this machine.
    Dev(operator::Dev),
}
