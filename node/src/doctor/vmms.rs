//! The VMMs that run on a host, as `/proc` shows them.

use std::path::Path;

use super::facts::VmmProcess;
use super::read::{names, read_text};

/// Programs that are VMMs, by the beginnings of their names.
const PROGRAMS: [&str; 2] = ["qemu-system-", "firecracker"];

/// Processes that are described.
const VMMS_MAX: usize = 10_000;

pub(super) fn read(root: &Path) -> Vec<VmmProcess> {
    let processes = root.join("proc");
    let ids = names(&processes).into_iter().filter_map(|name| name.parse::<u32>().ok());
    ids.filter_map(|pid| vmm(&processes.join(pid.to_string()), pid)).take(VMMS_MAX).collect()
}

fn vmm(folder: &Path, pid: u32) -> Option<VmmProcess> {
    // Not what it calls itself: that is its machine's folder.
    let program = std::fs::read_link(folder.join("exe")).ok()?.file_name()?.to_str()?.to_owned();
    if !PROGRAMS.iter().any(|one| program.starts_with(one)) {
        return None;
    }
    let status = read_text(&folder.join("status")).unwrap_or_default();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse().ok()
    };
    let limits = read_text(&folder.join("limits")).unwrap_or_default();
    let arguments = read_text(&folder.join("cmdline")).unwrap_or_default();
    Some(VmmProcess {
        pid,
        program,
        uid: field("Uid:"),
        seccomp: field("Seccomp:"),
        file_bytes_max: limit(&limits, "Max file size"),
        arguments: arguments.split('\0').map(str::to_owned).collect(),
    })
}

/// The hard limit of this name; none where it is unlimited.
pub(super) fn limit(limits: &str, name: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().nth(1)?.parse().ok()
}
