//! `dev.json`: what runs, for people, tests and the demo: enough to end any one process and start it again.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// The version of `dev.json`'s form.
pub(crate) const RECORD_VERSION: u32 = 1;

/// `dev.json`. Holds no secret, only where one is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    /// [`RECORD_VERSION`].
    pub(crate) version: u32,
    /// The process of `holdfast dev` itself.
    pub(crate) pid: u32,
    /// The cluster's folder.
    pub(crate) data_dir: PathBuf,
    /// For `--context` and HOLDFAST_CONTEXT.
    pub(crate) context_file: PathBuf,
    /// The operator's token (0600).
    pub(crate) token_file: PathBuf,
    /// The CA certificate.
    pub(crate) ca_file: PathBuf,
    /// Every member's API.
    pub(crate) servers: Vec<String>,
    /// The processes.
    pub(crate) processes: Vec<ProcessRecord>,
}

/// One process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ProcessRecord {
    /// As in `server-1`.
    pub(crate) name: String,
    /// `server`, `edge` or `node`.
    pub(crate) role: String,
    /// Program and arguments.
    pub(crate) argv: Vec<String>,
    /// Variables beside the inherited ones.
    pub(crate) env: BTreeMap<String, String>,
    /// The process that `holdfast dev` started.
    pub(crate) pid: u32,
    /// Its own folder.
    pub(crate) data_dir: PathBuf,
    /// Where its output goes.
    pub(crate) log_file: PathBuf,
    /// What it listens on, by purpose.
    pub(crate) addresses: BTreeMap<String, String>,
}
