//! The command lines of people who look at who did what.

use clap::{Args, Subcommand};
use std::path::PathBuf;
use std::time::Duration;

/// `holdfast audit …`.
#[derive(Debug, Subcommand)]
pub(crate) enum AuditCommand {
    /// Find events by who, what, about what and when; oldest first.
    #[command(after_help = "\
Examples:
  holdfast audit search --kind secrets_read --since 7d
  holdfast audit search --actor tok_01hf7yat00h16eb70xanz99mfs
  holdfast audit search --about route --source 192.0.2.7 --json")]
    Search(Search),
    /// Write the whole history to a file, with a checkpoint that the cluster's authority signed.
    #[command(after_help = "\
Examples:
  holdfast audit export history.jsonl
  holdfast audit export --after 120000 newer.jsonl     what came since an earlier export")]
    Export(Export),
    /// Check an exported history without the cluster: any change, removal, addition or move is found.
    #[command(after_help = "\
Examples:
  holdfast audit verify history.jsonl --ca-file ca.pem
  holdfast audit verify newer.jsonl --continues history.jsonl --ca-file ca.pem")]
    Verify(Verify),
}

/// `holdfast audit search`.
#[derive(Debug, Args)]
pub(crate) struct Search {
    /// Whose actor, as `holdfast events` prints it, has this in it: a token's id, `node`, `system`.
    #[arg(long, value_name = "TEXT")]
    pub(crate) actor: Option<String>,
    /// Of this kind, as in `token_revoked`; may be given several times.
    #[arg(long, value_name = "KIND")]
    pub(crate) kind: Vec<String>,
    /// About this: an id, or a kind of thing as in `route`.
    #[arg(long, value_name = "WHAT")]
    pub(crate) about: Option<String>,
    /// Asked for from this address.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) source: Option<std::net::IpAddr>,
    /// Caused by this request.
    #[arg(long, value_name = "ID")]
    pub(crate) request: Option<holdfast_model::RequestId>,
    /// Not older than this, as in 90m or 7d.
    #[arg(long, value_name = "AGE", value_parser = humantime::parse_duration)]
    pub(crate) since: Option<Duration>,
    /// At least as old as this.
    #[arg(long, value_name = "AGE", value_parser = humantime::parse_duration)]
    pub(crate) until: Option<Duration>,
    /// Only what came after this revision.
    #[arg(long, value_name = "REVISION", default_value_t = 0)]
    pub(crate) after: u64,
    /// Stop after so many.
    #[arg(long, value_name = "N", default_value_t = 1_000)]
    pub(crate) limit: usize,
}

/// `holdfast audit export`.
#[derive(Debug, Args)]
pub(crate) struct Export {
    /// The file; it must not be there yet.
    pub(crate) file: PathBuf,
    /// Only what came after this revision.
    #[arg(long, value_name = "REVISION", default_value_t = 0)]
    pub(crate) after: u64,
}

/// `holdfast audit verify`.
#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// What `holdfast audit export` wrote.
    pub(crate) file: PathBuf,
    /// The cluster's CA certificate (PEM), from a place that the file did not come from.
    #[arg(long, value_name = "FILE")]
    pub(crate) ca_file: PathBuf,
    /// An earlier export that this one goes on from; it is verified, too.
    #[arg(long, value_name = "FILE")]
    pub(crate) continues: Option<PathBuf>,
}
