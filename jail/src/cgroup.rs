//! A cgroup of its own for every VM, in the unified hierarchy (version 2): shares of the processors, memory with the
//! whole group killed at once when it is used up, processes, the disk's time.
//!
//! The kernel's interface is a folder and a line of text in each of a few files, and that is how it is used here. A host
//! whose controllers sit in the old hierarchy has no such wall; the agent then starts nothing, unless its operator has
//! said to run without (never silently).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What a VM's cgroup needs. `io` may be missing where the disk's scheduler offers none.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// The folder below the hierarchy's mount in which all of ours are.
const PARENT: &str = "holdfast";

/// What a VMM needs beside its guest's memory.
pub const OVERHEAD_BYTES: u64 = 64 << 20;

/// Processes and threads of a VMM.
pub const PIDS_MAX: u64 = 512;

/// How often, and with which pause, a cgroup whose last process is just going is tried to be removed.
const REMOVALS_MAX: u32 = 50;
const REMOVAL_PAUSE: Duration = Duration::from_millis(20);

/// How the operator wants VMs to be bounded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Choice {
    /// By a cgroup each; without one, nothing is started.
    #[default]
    Required,
    /// By rlimits only: what VMs take of processors, memory and disk is not divided among them.
    Without,
}

/// Why a cgroup could not be made, read or removed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// There is no unified hierarchy.
    #[error(
        "No cgroup hierarchy of version 2 is mounted, so VMs cannot be bounded. Boot the host with \
         'systemd.unified_cgroup_hierarchy=1 cgroup_no_v1=all', or let the node run without (--without-cgroups)."
    )]
    NotMounted,
    /// Its controllers are elsewhere.
    #[error(
        "The cgroup controllers {missing} are not in the hierarchy of version 2 at '{}'; they sit in the one of version 1, or \
         the kernel lacks them. Boot the host with 'systemd.unified_cgroup_hierarchy=1 cgroup_no_v1=all' to move \
         them, or let the node run without (--without-cgroups).",
        .mount.display()
    )]
    Controllers {
        /// Which ones, in words.
        missing: String,
        /// Where the hierarchy is mounted.
        mount: PathBuf,
    },
    /// A file or folder.
    #[error("'{}' could not be {action}.", .path.display())]
    File {
        /// Which one.
        path: PathBuf,
        /// What was tried, as a past participle.
        action: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// What a VM may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shares {
    /// Thousandths of a processor.
    pub cpu_milli: u64,
    /// Whole processors that the guest has, at most what it may use at any time.
    pub vcpus: u32,
    /// The guest's memory, in bytes.
    pub memory_bytes: u64,
}

impl Shares {
    /// File names and what is written to them.
    fn settings(&self) -> [(&'static str, String); 7] {
        let memory_max = self.memory_bytes + OVERHEAD_BYTES;
        let weight = (self.cpu_milli / 10).clamp(1, 10_000);
        // Of each 100 ms; one processor more than the guest has, for what the VMM does beside it.
        let quota = (u64::from(self.vcpus) + 1) * 100_000;
        [
            ("cpu.weight", weight.to_string()),
            ("cpu.max", format!("{quota} 100000")),
            // Reclaim begins a little before the end.
            ("memory.high", (memory_max - OVERHEAD_BYTES / 8).to_string()),
            ("memory.max", memory_max.to_string()),
            ("memory.swap.max", "0".to_owned()),
            ("memory.oom.group", "1".to_owned()),
            ("pids.max", PIDS_MAX.to_string()),
        ]
    }
}

/// What the processes of a group may do to one disk in each second, there and back together each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskRate {
    /// Bytes read, and bytes written.
    pub bytes: u64,
    /// Reads, and writes.
    pub operations: u64,
}

/// A whole disk, by the kernel's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Disk {
    major: u32,
    minor: u32,
}

/// The major number of loop devices (the kernel's `Documentation/admin-guide/devices.txt`).
const LOOP_MAJOR: u32 = 7;

impl Disk {
    /// The loop device with this number.
    pub const fn of_loop(number: u32) -> Self {
        Self { major: LOOP_MAJOR, minor: number }
    }

    /// The disk on which a file lies; `None` where its file system is on none, or on several.
    pub fn under(path: &Path) -> io::Result<Option<Self>> {
        let device = std::os::unix::fs::MetadataExt::dev(&fs::metadata(path)?);
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        let known = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
        if !known.exists() {
            return Ok(None);
        }
        if !known.join("partition").exists() {
            return Ok(Some(Self { major, minor }));
        }
        // Disks are bounded whole: the one above its partition in the kernel's tree.
        let whole = fs::canonicalize(known)?.parent().map(|disk| disk.join("dev"));
        Self::parse(&fs::read_to_string(whole.unwrap_or_default())?).map(Some)
    }

    /// As the kernel writes it: `254:0`.
    pub fn parse(text: &str) -> io::Result<Self> {
        let numbers = text
            .trim()
            .split_once(':')
            .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
        let (major, minor) = numbers.ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { major, minor })
    }
}

/// The unified hierarchy of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    mount: PathBuf,
}

impl Hierarchy {
    /// Finds it, and whether it has what is needed.
    pub fn find() -> Result<Self, CgroupError> {
        Self::find_below(Path::new("/"))
    }

    /// The same for a host whose files are below another folder.
    pub fn find_below(root: &Path) -> Result<Self, CgroupError> {
        let path = root.join("proc/self/mounts");
        let mounts = fs::read_to_string(&path).map_err(|source| file(&path, "read", source))?;
        let mount = mount_point(&mounts).ok_or(CgroupError::NotMounted)?;
        let mount = root.join(mount.strip_prefix("/").unwrap_or(&mount));
        let offered = fs::read_to_string(mount.join("cgroup.controllers")).unwrap_or_default();
        let missing: Vec<_> = CONTROLLERS
            .into_iter()
            .filter(|one| !offered.split_whitespace().any(|name| name == *one))
            .collect();
        if missing.is_empty() {
            Ok(Self { mount })
        } else {
            Err(CgroupError::Controllers { missing: missing.join(", "), mount })
        }
    }

    /// The cgroup of a machine. `name` is unique on the host.
    pub fn group(&self, name: &str) -> Group {
        Group { folder: self.mount.join(PARENT).join(name) }
    }

    /// The names of all cgroups of ours that begin like this.
    pub fn list(&self, prefix: &str) -> Vec<String> {
        let entries = fs::read_dir(self.mount.join(PARENT)).into_iter().flatten().flatten();
        entries
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| name.starts_with(prefix))
            .collect()
    }

    /// Makes a cgroup with these limits, or gives an old one these limits.
    pub fn make(&self, name: &str, shares: &Shares) -> Result<Group, CgroupError> {
        let group = self.group(name);
        let parent = self.mount.join(PARENT);
        make_folder(&parent)?;
        for folder in [&self.mount, &parent] {
            for controller in CONTROLLERS {
                write(&folder.join("cgroup.subtree_control"), &format!("+{controller}"))?;
            }
            // Where the disk can be shared out.
            write(&folder.join("cgroup.subtree_control"), "+io").ok();
        }
        make_folder(&group.folder)?;
        for (name, value) in shares.settings() {
            match write(&group.folder.join(name), &value) {
                // A kernel without swap has none to give.
                Err(CgroupError::File { source, .. })
                    if name == "memory.swap.max" && source.kind() == io::ErrorKind::NotFound => {}
                written => written?,
            }
        }
        Ok(group)
    }
}

/// One VM's cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    folder: PathBuf,
}

impl Group {
    /// The cgroup with this folder.
    pub fn at(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// Where it is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Bounds what it does to a disk. Says whether the kernel can: one that throttles no disks has no such file.
    pub fn bound_disk(&self, disk: Disk, rate: DiskRate) -> Result<bool, CgroupError> {
        let DiskRate { bytes, operations } = rate;
        let line = format!(
            "{}:{} rbps={bytes} wbps={bytes} riops={operations} wiops={operations}",
            disk.major, disk.minor
        );
        let path = self.folder.join("io.max");
        if !path.exists() {
            return Ok(false);
        }
        write(&path, &line).map(|()| true)
    }

    /// Whether the kernel has killed in it because its memory was used up.
    pub fn was_out_of_memory(&self) -> bool {
        fs::read_to_string(self.folder.join("memory.events")).is_ok_and(|events| kills(&events) > 0)
    }

    /// Removes it; whatever still runs in it is killed. One that is not there is no error. Blocks for a second at most.
    pub fn remove(&self) -> Result<(), CgroupError> {
        for _ in 0..REMOVALS_MAX {
            match fs::remove_dir(&self.folder) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                // Its last process has been killed but has not gone yet, or another one is there.
                Err(_) => {
                    write(&self.folder.join("cgroup.kill"), "1").ok();
                    std::thread::sleep(REMOVAL_PAUSE);
                }
            }
        }
        fs::remove_dir(&self.folder).map_err(|source| file(&self.folder, "removed", source))
    }
}

/// Moves this process into a cgroup.
pub(crate) fn enter(folder: &Path) -> io::Result<()> {
    fs::write(folder.join("cgroup.procs"), "0")
}

fn make_folder(path: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(file(path, "made", error)),
        _ => Ok(()),
    }
}

fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    fs::write(path, value).map_err(|source| file(path, "written", source))
}

fn file(path: &Path, action: &'static str, source: io::Error) -> CgroupError {
    CgroupError::File { path: path.to_owned(), action, source }
}

/// Where the unified hierarchy is mounted, from the list of mounts.
fn mount_point(mounts: &str) -> Option<PathBuf> {
    let of_line = |line: &str| {
        let mut fields = line.split_whitespace().skip(1);
        let (path, kind) = (fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(path))
    };
    mounts.lines().find_map(of_line)
}

/// How many processes were killed for want of memory.
fn kills(events: &str) -> u64 {
    let of_line = |line: &str| line.strip_prefix("oom_kill ")?.trim().parse::<u64>().ok();
    events.lines().filter_map(of_line).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_follow_from_what_the_instance_was_given() {
        let shares = Shares { cpu_milli: 1_500, vcpus: 2, memory_bytes: 256 << 20 };
        let settings: Vec<_> = shares.settings().into_iter().collect();
        let of = |name: &str| settings.iter().find(|(n, _)| *n == name).unwrap().1.clone();
        assert_eq!(of("cpu.weight"), "150");
        assert_eq!(of("cpu.max"), "300000 100000");
        assert_eq!(of("memory.max"), (320 << 20).to_string());
        assert_eq!(of("memory.high"), (312 << 20).to_string());
        assert_eq!(
            (of("memory.swap.max"), of("memory.oom.group"), of("pids.max")),
            ("0".into(), "1".into(), "512".into())
        );
        let weight = |cpu_milli| Shares { cpu_milli, ..shares }.settings()[0].1.clone();
        assert_eq!((weight(1), weight(u64::MAX)), ("1".to_owned(), "10000".to_owned()));
    }

    #[test]
    fn the_kernels_texts_are_understood() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(mount_point(mounts), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(mount_point("cgroup /c cgroup rw 0 0"), None);
        assert_eq!(kills("low 0\nhigh 9\nmax 4\noom 1\noom_kill 3\noom_group_kill 1\n"), 3);
        assert_eq!(kills("oom 1\noom_kill 0\n"), 0);
    }

    #[test]
    fn disks_are_named_as_the_kernel_names_them() {
        assert_eq!(Disk::parse("254:16\n").unwrap(), Disk { major: 254, minor: 16 });
        assert!(Disk::parse("254").is_err() && Disk::parse("a:b").is_err());
        assert_eq!(Disk::of_loop(3), Disk { major: 7, minor: 3 });
        // What is in memory lies on no disk.
        assert_eq!(Disk::under(Path::new("/proc/self/stat")).unwrap(), None);
    }

    /// Whatever this host has, the answer is one of two: a hierarchy that can be used, or a sentence that says how to
    /// get one.
    #[test]
    fn a_host_without_the_wall_is_told_how_to_get_it() {
        match Hierarchy::find() {
            Ok(hierarchy) => assert!(hierarchy.mount.join("cgroup.controllers").is_file()),
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains("cgroup_no_v1=all") && text.contains("--without-cgroups"), "{text}");
            }
        }
    }
}
