//! Everything that a node has on its host, counted from outside: nothing here asks the agent.
//!
//! In the namespaces of a test nobody else makes links, processes or mounts, so all of them count, whatever they are called.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use holdfast_jail::cgroup::Hierarchy;
use holdfast_jail::ids::CLAIM_FOLDER;

use super::runs;

/// See the module. Two that are equal differ at most in the numbers of processes and users.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Inventory {
    /// Network links.
    links: BTreeSet<String>,
    /// Processes that live, by name: the test's own and the agent's are left out.
    processes: BTreeMap<String, usize>,
    /// User ids that are claimed by machines' folders, and those of processes that have another user than the agent.
    users: (usize, usize),
    /// What is mounted on the host.
    mounts: Vec<String>,
    /// Cgroups.
    groups: BTreeSet<String>,
    /// Every file and folder of the agent's, but what its logs and volumes are made of.
    files: BTreeSet<String>,
    /// Volumes' disks that are a device: nobody lets go of one but whoever has it.
    disks: BTreeSet<String>,
}

impl Inventory {
    /// Looks at everything. `agent` is the process of the agent that runs, if one does.
    pub(crate) fn take(data_dir: &Path, agent: Option<u32>) -> Self {
        let (mut processes, mut users) = (BTreeMap::new(), BTreeSet::new());
        for entry in fs::read_dir("/proc").unwrap().map(Result::unwrap) {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            if pid == std::process::id() || Some(pid) == agent || !runs(pid) {
                continue;
            }
            let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
            let name = line.split(|byte| *byte == 0).next().unwrap_or_default();
            *processes.entry(String::from_utf8_lossy(name).into_owned()).or_default() += 1;
            users.extend(entry.metadata().map(|meta| meta.uid()).ok().filter(|uid| *uid != 0));
        }
        let mut files = BTreeSet::new();
        walk(data_dir, data_dir, &mut files);
        let claims: BTreeSet<u32> = files
            .iter()
            .filter(|file| file.ends_with(&format!("/{CLAIM_FOLDER}")))
            .map(|file| fs::metadata(data_dir.join(file)).map_or(0, |meta| meta.uid()))
            .collect();
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let groups = Hierarchy::find().map(|hierarchy| hierarchy.list("")).unwrap_or_default();
        Self {
            links: links(),
            processes,
            users: (claims.len(), users.len()),
            mounts: mounts.lines().map(str::to_owned).collect(),
            groups: groups.into_iter().collect(),
            files,
            disks: disks(data_dir),
        }
    }

    /// How many processes there are.
    pub(crate) fn processes(&self) -> usize {
        self.processes.values().sum()
    }
}

fn disks(data_dir: &Path) -> BTreeSet<String> {
    let folder = data_dir.join("volumes");
    let mut disks = BTreeSet::new();
    for device in fs::read_dir("/sys/block").unwrap().map(Result::unwrap) {
        let Ok(file) = fs::read_to_string(device.path().join("loop/backing_file")) else { continue };
        disks.extend(file.starts_with(folder.to_str().unwrap()).then(|| file.trim_end().to_owned()));
    }
    disks
}

fn links() -> BTreeSet<String> {
    let output = Command::new("ip").args(["-oneline", "link", "show"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().filter_map(|line| line.split(": ").nth(1)).map(str::to_owned).collect()
}

fn walk(folder: &Path, root: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        found.insert(path.strip_prefix(root).unwrap().display().to_string());
        // Logs of instances that are gone are kept for a while, a bounded number of them.
        // Volumes' disks are data: they stay.
        if path.is_dir() && path != root.join("logs") && path != root.join("volumes") {
            walk(&path, root, found);
        }
    }
}
