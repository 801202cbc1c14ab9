//! What was read of a host: plain data, nothing judged. `None` means that it could not be read.

use std::collections::BTreeMap;

/// What the kernel answered when a device was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// It can be read and written.
    Usable,
    /// It is there, and closed to us.
    Refused,
    /// It is not there.
    Absent,
}

/// One VMM's process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VmmProcess {
    /// Its id.
    pub pid: u32,
    /// Its program's file name.
    pub program: String,
    /// Its user.
    pub uid: Option<u32>,
    /// Its filter: 2 where one is in force.
    pub seccomp: Option<u32>,
    /// The largest file that it can write; `None` is no limit, or not known.
    pub file_bytes_max: Option<u64>,
    /// Its arguments.
    pub arguments: Vec<String>,
}

/// One TAP of an agent's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tap {
    /// Its name.
    pub name: String,
}

/// A disk's space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disk {
    /// What may be used, in bytes.
    pub free_bytes: u64,
    /// All of it.
    pub total_bytes: u64,
}

/// A host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostFacts {
    /// Whether whoever looks is root.
    pub root: bool,
    /// VMMs that run.
    pub vmms: Vec<VmmProcess>,
    /// `/proc/sys/kernel/printk`.
    pub printk: Option<String>,
    /// `/proc/consoles`.
    pub consoles: Option<String>,
    /// The largest file of the system's log, and its size.
    pub system_log: Option<(String, u64)>,
    /// `/proc/swaps`.
    pub swaps: Option<String>,
    /// `/sys/kernel/mm/ksm/run`.
    pub ksm: Option<String>,
    /// `/sys/devices/system/cpu/smt/active`.
    pub smt: Option<String>,
    /// `/sys/devices/system/cpu/vulnerabilities`, by name.
    pub vulnerabilities: BTreeMap<String, String>,
    /// The hierarchy of cgroups: usable, or the sentence that says why it is not.
    pub cgroups: Option<Result<(), String>>,
    /// `/dev/kvm`.
    pub kvm: Option<Asked>,
    /// The version of Landlock; `Some(0)` is none.
    pub landlock: Option<u32>,
    /// `/proc/sys/kernel/seccomp/actions_avail`.
    pub seccomp_actions: Option<String>,
    /// TAPs of agents'.
    pub taps: Vec<Tap>,
    /// What `nft -j list ruleset` printed.
    pub filters: Option<serde_json::Value>,
    /// What `tc -j qdisc show` printed.
    pub queues: Option<serde_json::Value>,
    /// `/proc/sys/net/ipv6/conf/all/forwarding`.
    pub forwarding: Option<String>,
    /// `/proc/sys/fs/file-nr`.
    pub files: Option<String>,
    /// How many descriptors a process may have at most.
    pub descriptors_max: Option<u64>,
    /// `/sys/devices/system/clocksource/clocksource0/current_clocksource`.
    pub clock_source: Option<String>,
    /// Whether the kernel holds its clock to be synchronised.
    pub clock_synchronised: Option<bool>,
    /// The disk of the agent's folder.
    pub disk: Option<Disk>,
    /// What the probe of VMMs found, where the agent's folder is known.
    pub verdict: Option<(bool, String)>,
}
