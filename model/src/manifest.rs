//! `holdfast.toml`: what a release runs. Parsed once, strictly; an unknown key is an error with its line.
//!
//! [`Manifest`] is the normalised form, with every default filled in: it is what is stored, hashed and sent to nodes.

mod parse;
mod quantity;

pub use parse::{ManifestError, parse};

use crate::{AppName, Digest, PortName, ProcessName, VolumeName};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A whole manifest, checked and normalised.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Manifest {
    /// The app that it is for.
    pub app: AppName,
    /// The image as the manifest names it, if it does; a deployment may name another.
    pub image: Option<String>,
    /// Process types by name.
    pub processes: BTreeMap<ProcessName, Process>,
    /// Volumes, by name.
    pub volumes: BTreeMap<VolumeName, Volume>,
}

/// One process type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Process {
    /// Program and arguments; `None` runs the image's own.
    pub command: Option<Vec<String>>,
    /// Working folder; `None` is the image's own.
    pub workdir: Option<String>,
    /// `name`, `uid` or `user:group`; `None` is the image's own.
    pub user: Option<String>,
    /// Plain variables: the manifest's, overlaid with the process's.
    pub vars: BTreeMap<String, String>,
    /// What happens when the workload ends.
    pub restart: Restart,
    /// What it may use.
    pub resources: Resources,
    /// How many instances.
    pub scaling: Scaling,
    /// Ports that routes may lead to.
    pub ports: Vec<Port>,
    /// How to tell that it serves; `None` means that running is ready.
    pub health: Option<Health>,
    /// Volumes and where they appear.
    pub mounts: Vec<Mount>,
    /// Secrets without which it must not start.
    pub secrets_required: Vec<String>,
}

/// What happens when a workload ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Restart {
    /// When to restart.
    pub policy: RestartPolicy,
    /// Restarts in a row, without a ready period between them, before the instance fails.
    pub max_retries: u32,
    /// The first pause before a restart, in milliseconds; doubled each time.
    pub backoff_ms: u64,
}

/// When to restart a workload that ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// Whatever its exit status.
    Always,
    /// When it ended with a status other than 0.
    OnFailure,
    /// Not at all.
    Never,
}

/// What an instance may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Resources {
    /// Guest memory in MiB, exactly.
    pub memory_mib: u64,
    /// Virtual CPU in thousandths.
    pub cpu_milli: u64,
    /// Scratch disk in MiB.
    pub disk_mib: u64,
}

/// How many instances.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Scaling {
    /// The number that a first deployment starts.
    pub min: u32,
    /// The most that may be asked for.
    pub max: u32,
}

/// A port that a process listens on inside its guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Port {
    /// What routes call it.
    pub name: PortName,
    /// The TCP port in the guest.
    pub internal: u16,
}

/// A health check, run by the guest's init inside the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Health {
    /// What is tried.
    pub check: HealthCheck,
    /// Between two checks, in milliseconds.
    pub interval_ms: u64,
    /// For one check, in milliseconds.
    pub timeout_ms: u64,
    /// After start, in which failures do not count, in milliseconds.
    pub grace_ms: u64,
    /// Successes in a row that make it ready.
    pub success: u32,
    /// Failures in a row that make it not ready.
    pub failure: u32,
}

/// What a health check tries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum HealthCheck {
    /// A TCP connection to this port opens.
    Tcp {
        /// The port in the guest.
        port: u16,
    },
    /// A plain HTTP GET answers 200–399.
    Http {
        /// The port in the guest.
        port: u16,
        /// The path, beginning with «/».
        path: String,
    },
    /// A command exits with 0.
    Command {
        /// Program and arguments.
        argv: Vec<String>,
    },
}

/// Where a volume appears in a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Mount {
    /// Which volume.
    pub volume: VolumeName,
    /// Absolute path in the guest.
    pub path: String,
    /// Not writable.
    pub read_only: bool,
}

/// A volume that the app needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Volume {
    /// Its size in MiB.
    pub size_mib: u64,
    /// Whether it is backed up daily.
    pub backup: bool,
}

impl Manifest {
    /// The digest of the normalised manifest: two texts that mean the same have the same one.
    ///
    /// # Errors
    /// When the manifest cannot be encoded, which no parsed manifest does.
    pub fn digest(&self) -> Result<Digest, postcard::Error> {
        Ok(Digest::keyed("holdfast 2026 manifest v1", &postcard::to_stdvec(self)?))
    }
}
