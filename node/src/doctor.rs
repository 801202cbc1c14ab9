//! `holdfast doctor`: what of this host is not as a multi-tenant node should have it, what that means, how to mend it.
//!
//! Reading ([`mod@read`]) and judging ([`mod@judge`]) are apart: the one knows files below a root folder and two tools, the other
//! is a function of what was read, so that every finding can be tested on any machine. It changes nothing, needs no agent
//! and no control plane, and says «unknown» where it could not look instead of guessing.
//!
//! The list follows Firecracker's recommendations for production hosts
//! (<https://github.com/firecracker-microvm/firecracker/blob/v1.16.1/docs/prod-host-setup.md>); what is ours is added:
//! cgroups of version 2, Landlock, the filters of our own TAPs.

mod facts;
mod judge;
mod read;
mod vmms;

pub use facts::{Asked, Disk, HostFacts, Tap, VmmProcess};
pub use judge::judge;
pub use read::read;

use serde::Serialize;

/// How bad something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// As it should be.
    Ok,
    /// It could not be looked at.
    Unknown,
    /// Something is weaker than it could be.
    Warn,
    /// Instances do not run here, or are not kept apart.
    Fail,
}

impl Severity {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Severity::Ok => "ok",
            Severity::Unknown => "unknown",
            Severity::Warn => "warn",
            Severity::Fail => "fail",
        }
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Its stable name.
    pub id: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What was seen.
    pub seen: String,
    /// What that means; empty where all is well.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub means: &'static str,
    /// How to mend it; empty where there is nothing to mend.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub mend: &'static str,
}

impl Finding {
    /// All is well.
    pub fn ok(id: &'static str, seen: impl Into<String>) -> Self {
        Self { id, severity: Severity::Ok, seen: seen.into(), means: "", mend: "" }
    }

    /// Something is not.
    pub fn new(
        id: &'static str,
        severity: Severity,
        seen: impl Into<String>,
        means: &'static str,
        mend: &'static str,
    ) -> Self {
        Self { id, severity, seen: seen.into(), means, mend }
    }

    /// It could not be looked at.
    pub fn unknown(id: &'static str, seen: impl Into<String>, mend: &'static str) -> Self {
        Self { id, severity: Severity::Unknown, seen: seen.into(), means: "", mend }
    }
}
