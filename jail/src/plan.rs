//! What a jail consists of, as one document: the agent writes it, the launcher reads it from a descriptor.
//!
//! Bounded and parsed strictly, although the agent is trusted: a field that one side does not know would be a wall that
//! is not there. Every wall is a value here, so that a test can put up one alone and try it.

use std::borrow::Cow;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The largest plan, in bytes.
pub const PLAN_BYTES_MAX: usize = 256 * 1024;

/// The version of this document's form. Launcher and agent are the same binary, so they always agree.
pub const VERSION: u32 = 1;

/// The most files that a jail holds: a VMM with its libraries has about sixty.
pub const FILES_MAX: usize = 512;

/// The most descriptors that a VMM is started with, beside its three standard ones.
pub const DESCRIPTORS_MAX: usize = 32;

/// The number of the first descriptor of [`Plan::descriptors`]; the others follow in order.
pub const FIRST_DESCRIPTOR: i32 = 3;

/// A jail, and the program that is to run in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// [`VERSION`].
    pub version: u32,
    /// What the process calls itself (`argv[0]`): the machine's folder, by which an operator tells it in `ps`, and an
    /// agent finds it.
    pub name: String,
    /// The program, an absolute path on the host.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// What the launcher opens for it, while it still can; they become descriptors from [`FIRST_DESCRIPTOR`] on.
    pub descriptors: Vec<Descriptor>,
    /// A TAP device that the program opens by its name: its user is let to.
    pub tap: Option<String>,
    /// The cgroup's folder; `None` where the operator chose to run without.
    pub cgroup: Option<PathBuf>,
    /// The namespaces of its own.
    pub namespaces: Vec<Namespace>,
    /// Its own root, in which there is nothing but what is named here.
    pub root: Option<Root>,
    /// Its own user and group, and those of the files that it may write.
    pub identity: Option<Identity>,
    /// Whether every capability is dropped, from the bounding set too, and none can come back.
    pub no_capabilities: bool,
    /// What it may do with files and sockets, by Landlock.
    pub access: Option<Access>,
    /// What it may ask of the kernel.
    pub filter: Option<Filter>,
    /// What it may use.
    pub limits: Limits,
}

/// Something that is opened for a VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Descriptor {
    /// A file, to read.
    Read(PathBuf),
    /// A file, to append to; made if it is not there.
    Append(PathBuf),
    /// A socket that listens at a path; what was there is removed.
    Listen(PathBuf),
    /// A TAP device that exists.
    Tap(String),
    /// A block device, to read and write.
    Block(PathBuf),
}

/// A kind of namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Namespace {
    /// Mounts. Needed for a root of its own.
    Mount,
    /// Processes: it sees, and can signal, only its own.
    Pid,
    /// Network: no interface, no address, no abstract socket of the host's.
    Network,
    /// System V and POSIX message queues and shared memory.
    Ipc,
    /// Host name.
    Uts,
    /// The view of cgroups.
    Cgroup,
}

impl Namespace {
    /// All of them.
    pub const ALL: [Namespace; 6] = [
        Namespace::Mount,
        Namespace::Pid,
        Namespace::Network,
        Namespace::Ipc,
        Namespace::Uts,
        Namespace::Cgroup,
    ];
}

/// The file system of a jail.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Root {
    /// An empty folder of the host's on which it is put together; there it is only seen by the process.
    pub mount_point: PathBuf,
    /// Files, read-only, each at the path that it has on the host.
    pub files: Vec<File>,
    /// A folder in which the process may make things, at the path that it has on the host: `nosuid`, `nodev`, `noexec`.
    pub writable: Option<PathBuf>,
    /// Devices.
    pub devices: Vec<Device>,
}

/// A file of the host's that a jail holds.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// Where it is, on the host and in the jail.
    pub path: PathBuf,
    /// Whether it is code.
    pub executable: bool,
}

/// A device that a jail may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Device {
    /// `/dev/kvm`.
    Kvm,
    /// `/dev/net/tun`.
    Tun,
    /// `/dev/urandom`.
    Urandom,
    /// `/dev/loopN`: a volume of the machine's.
    Loop(u32),
}

impl Device {
    /// Its path below `/dev`.
    pub fn name(self) -> Cow<'static, str> {
        match self {
            Device::Kvm => "kvm".into(),
            Device::Tun => "net/tun".into(),
            Device::Urandom => "urandom".into(),
            Device::Loop(number) => format!("loop{number}").into(),
        }
    }
}

/// A user and a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// The user; not 0.
    pub uid: u32,
    /// The group; not 0.
    pub gid: u32,
}

/// What Landlock lets through; everything else that it knows of is refused: files, TCP, signals and abstract sockets
/// of others.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Access {
    /// Files that may be read.
    pub read: Vec<PathBuf>,
    /// Files that may be executed, and read.
    pub execute: Vec<PathBuf>,
    /// Devices that may be read, written and controlled.
    pub devices: Vec<PathBuf>,
    /// Folders in which sockets may be made and removed, and nothing else.
    pub sockets: Vec<PathBuf>,
}

/// Which system calls go through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Filter {
    /// Whose list.
    pub profile: Profile,
    /// What becomes of a process that asks for what only an attacker asks for. Anything else that is not on the list
    /// is refused with `EPERM` either way, because libraries probe.
    pub attack: Attack,
}

/// Whose system calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Profile {
    /// QEMU's: a list of what it needs.
    Qemu,
    /// Firecracker's: it puts a list of its own on each of its threads; ours bars what no thread needs until then.
    Firecracker,
}

/// What becomes of an attacker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Attack {
    /// The process is killed.
    Kill,
    /// The call is refused.
    Refuse,
}

/// Limits of the process. Each becomes both the soft and the hard one, so it cannot be raised again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Bytes of any file that it writes. Beyond it writes fail, and the process lives on.
    pub file_bytes: Option<u64>,
    /// Descriptors.
    pub descriptors: Option<u64>,
    /// Threads of its user.
    pub threads: Option<u64>,
    /// Bytes of writable private memory.
    pub data_bytes: Option<u64>,
}

/// Why a plan is not carried out.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// Too long.
    #[error(
        "A jail's plan of {bytes} bytes is longer than the {PLAN_BYTES_MAX} bytes that the launcher takes."
    )]
    Long {
        /// How long it is.
        bytes: usize,
    },
    /// Not a plan.
    #[error("A jail's plan could not be encoded or understood; launcher and agent must be the same release.")]
    Form(#[source] serde_json::Error),
    /// Not one that is carried out.
    #[error("A jail's plan is refused: {problem}.")]
    Refused {
        /// Which rule is broken.
        problem: &'static str,
    },
}

impl Plan {
    /// The document.
    pub fn encode(&self) -> Result<Vec<u8>, PlanError> {
        self.check()?;
        let bytes = serde_json::to_vec(self).map_err(PlanError::Form)?;
        if bytes.len() > PLAN_BYTES_MAX {
            return Err(PlanError::Long { bytes: bytes.len() });
        }
        Ok(bytes)
    }

    /// The plan that a document holds.
    pub fn decode(bytes: &[u8]) -> Result<Self, PlanError> {
        if bytes.len() > PLAN_BYTES_MAX {
            return Err(PlanError::Long { bytes: bytes.len() });
        }
        let plan: Self = serde_json::from_slice(bytes).map_err(PlanError::Form)?;
        plan.check()?;
        Ok(plan)
    }

    fn check(&self) -> Result<(), PlanError> {
        let has = |namespace| self.namespaces.contains(&namespace);
        let problem = if self.version != VERSION {
            "it is of another version"
        } else if !self.program.is_absolute() {
            "the program's path is not absolute"
        } else if self.descriptors.len() > DESCRIPTORS_MAX {
            "it names more than 32 descriptors"
        } else if self.identity.is_some_and(|identity| identity.uid == 0 || identity.gid == 0) {
            "the process would be root"
        } else if self.root.is_some() && !has(Namespace::Mount) {
            "a root of its own needs a mount namespace of its own"
        } else if self.root.as_ref().is_some_and(|root| root.files.len() > FILES_MAX) {
            "it names more than 512 files"
        } else if self.paths().any(|path| !is_plain(path)) {
            "each path must be absolute and without '..'"
        } else {
            return Ok(());
        };
        Err(PlanError::Refused { problem })
    }

    fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        let root = self.root.iter().flat_map(|root| {
            root.files.iter().map(|file| &file.path).chain(&root.writable).chain([&root.mount_point])
        });
        let opened = self.descriptors.iter().filter_map(|descriptor| match descriptor {
            Descriptor::Read(path)
            | Descriptor::Append(path)
            | Descriptor::Listen(path)
            | Descriptor::Block(path) => Some(path),
            Descriptor::Tap(_) => None,
        });
        root.chain(opened).chain(&self.cgroup)
    }
}

fn is_plain(path: &std::path::Path) -> bool {
    use std::path::Component::{Normal, RootDir};
    path.is_absolute() && path.components().all(|part| matches!(part, Normal(_) | RootDir))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Plan {
        Plan {
            version: VERSION,
            name: "/vms/inst_1".to_owned(),
            program: "/usr/bin/vmm".into(),
            arguments: vec!["--quiet".to_owned()],
            descriptors: vec![
                Descriptor::Listen("/vms/inst_1/qmp.sock".into()),
                Descriptor::Tap("hf0".to_owned()),
            ],
            tap: None,
            cgroup: None,
            namespaces: Namespace::ALL.to_vec(),
            root: Some(Root {
                mount_point: "/vms/inst_1/root".into(),
                files: vec![File { path: "/usr/bin/vmm".into(), executable: true }],
                writable: None,
                devices: vec![Device::Kvm],
            }),
            identity: Some(Identity { uid: 7, gid: 7 }),
            no_capabilities: true,
            access: Some(Access::default()),
            filter: Some(Filter { profile: Profile::Qemu, attack: Attack::Kill }),
            limits: Limits { file_bytes: Some(1), descriptors: None, threads: None, data_bytes: None },
        }
    }

    #[test]
    fn a_plan_is_read_as_it_was_written() {
        assert_eq!(Plan::decode(&plan().encode().unwrap()).unwrap(), plan());
    }

    #[test]
    fn i14_a_plan_with_anything_unknown_missing_or_too_much_is_refused() {
        let whole: serde_json::Value = serde_json::from_slice(&plan().encode().unwrap()).unwrap();
        let decode = |value: &serde_json::Value| Plan::decode(value.to_string().as_bytes());
        for key in whole.as_object().unwrap().keys() {
            let mut less = whole.clone();
            less.as_object_mut().unwrap().remove(key);
            // What is optional may be absent: the wall is then absent as well, which the plan's writer must have meant.
            let optional = ["tap", "cgroup", "root", "identity", "access", "filter"].contains(&key.as_str());
            assert_eq!(decode(&less).is_ok(), optional, "without {key}");
        }
        let mut more = whole.clone();
        more["fence"] = true.into();
        assert!(matches!(decode(&more), Err(PlanError::Form(_))));
        more = whole.clone();
        more["root"]["fence"] = true.into();
        assert!(matches!(decode(&more), Err(PlanError::Form(_))));
        assert!(matches!(Plan::decode(&vec![b' '; PLAN_BYTES_MAX + 1]), Err(PlanError::Long { .. })));
    }

    #[test]
    fn a_plan_that_makes_no_jail_is_refused() {
        let broken: [fn(&mut Plan); 6] = [
            |plan| plan.version = 2,
            |plan| plan.program = "vmm".into(),
            |plan| plan.identity = Some(Identity { uid: 0, gid: 7 }),
            |plan| plan.namespaces.clear(),
            |plan| plan.cgroup = Some("/sys/fs/cgroup/../x".into()),
            |plan| plan.descriptors = vec![Descriptor::Tap(String::new()); DESCRIPTORS_MAX + 1],
        ];
        for breaks in broken {
            let mut plan = plan();
            breaks(&mut plan);
            assert!(matches!(plan.encode(), Err(PlanError::Refused { .. })), "{plan:?}");
        }
    }
}
