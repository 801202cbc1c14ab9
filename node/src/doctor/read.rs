//! Reads a host below a root folder: `/` in earnest, a prepared tree in tests. Every file is read up to a bound.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use holdfast_jail::cgroup::Hierarchy;

use super::facts::{Asked, Disk, HostFacts, Tap};
use super::vmms;
use crate::network::is_tap_name;
use crate::vmm::probe;

/// The most bytes of one file of the kernel's.
const FILE_BYTES_MAX: u64 = 64 * 1024;

/// The most bytes that a tool may print, and how long it may take.
const TOOL_BYTES_MAX: u64 = 16 << 20;
const TOOL_DEADLINE: Duration = Duration::from_secs(10);
const TOOL_POLL: Duration = Duration::from_millis(10);

/// Entries of a folder that are looked at.
const ENTRIES_MAX: usize = 100_000;

/// Where systems keep a log that nobody may be bounding.
const SYSTEM_LOGS: [&str; 4] =
    ["var/log/syslog", "var/log/messages", "var/log/kern.log", "var/log/daemon.log"];

/// Reads the host below `root`; `data_dir` is the folder of a node agent, if there is one here.
pub fn read(root: &Path, data_dir: Option<&Path>) -> HostFacts {
    let text = |path: &str| read_text(&root.join(path));
    let in_earnest = root == Path::new("/");
    HostFacts {
        root: rustix::process::geteuid().is_root(),
        vmms: vmms::read(root),
        printk: text("proc/sys/kernel/printk"),
        consoles: text("proc/consoles"),
        system_log: largest(root),
        swaps: text("proc/swaps"),
        ksm: text("sys/kernel/mm/ksm/run"),
        smt: text("sys/devices/system/cpu/smt/active"),
        vulnerabilities: folder_of_texts(&root.join("sys/devices/system/cpu/vulnerabilities")),
        cgroups: Some(Hierarchy::find_below(root).map(drop).map_err(|error| error.to_string())),
        kvm: Some(device(&root.join("dev/kvm"))),
        landlock: if in_earnest { Some(holdfast_jail::landlock_version()) } else { None },
        seccomp_actions: text("proc/sys/kernel/seccomp/actions_avail"),
        taps: taps(root),
        filters: if in_earnest { tool("nft", &["-j", "list", "ruleset"]) } else { None },
        queues: if in_earnest { tool("tc", &["-j", "qdisc", "show"]) } else { None },
        forwarding: text("proc/sys/net/ipv6/conf/all/forwarding"),
        files: text("proc/sys/fs/file-nr"),
        descriptors_max: text("proc/self/limits").and_then(|limits| vmms::limit(&limits, "Max open files")),
        clock_source: text("sys/devices/system/clocksource/clocksource0/current_clocksource"),
        clock_synchronised: if in_earnest { clock_synchronised() } else { None },
        disk: disk(data_dir.unwrap_or(root)),
        verdict: data_dir.and_then(probe::last_verdict).map(|v| (v.chosen.is_some(), v.to_string())),
    }
}

pub(super) fn read_text(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(FILE_BYTES_MAX).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).trim_end().to_owned())
}

pub(super) fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().take(ENTRIES_MAX);
    let mut names: Vec<_> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort_unstable();
    names
}

fn folder_of_texts(folder: &Path) -> BTreeMap<String, String> {
    let texts = names(folder).into_iter().map(|name| (read_text(&folder.join(&name)), name));
    texts.filter_map(|(text, name)| Some((name, text?))).collect()
}

fn largest(root: &Path) -> Option<(String, u64)> {
    let sizes = SYSTEM_LOGS.iter().filter_map(|path| {
        let length = fs::metadata(root.join(path)).ok()?.len();
        Some((format!("/{path}"), length))
    });
    sizes.max_by_key(|(_, length)| *length)
}

fn device(path: &Path) -> Asked {
    use rustix::fs::Access;
    match rustix::fs::access(path, Access::READ_OK | Access::WRITE_OK) {
        Ok(()) => Asked::Usable,
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => Asked::Absent,
        Err(_) => Asked::Refused,
    }
}

fn taps(root: &Path) -> Vec<Tap> {
    let links = root.join("sys/class/net");
    let names = names(&links).into_iter();
    names
        .filter(|name| is_tap_name(name) && links.join(name).join("tun_flags").exists())
        .map(|name| Tap { name })
        .collect()
}

fn disk(folder: &Path) -> Option<Disk> {
    let disk = rustix::fs::statvfs(folder).ok()?;
    let bytes = |blocks: u64| blocks.saturating_mul(disk.f_frsize);
    Some(Disk { free_bytes: bytes(disk.f_bavail), total_bytes: bytes(disk.f_blocks) })
}

/// What a tool printed as JSON; nothing where it is absent, refuses, hangs or prints too much.
fn tool(name: &str, arguments: &[&str]) -> Option<serde_json::Value> {
    let program = PathBuf::from(name);
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let output = child.stdout.take()?;
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        output.take(TOOL_BYTES_MAX).read_to_end(&mut text).ok().map(|_| text)
    });
    let begun = Instant::now();
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break Some(status),
            Ok(None) if begun.elapsed() < TOOL_DEADLINE => std::thread::sleep(TOOL_POLL),
            Ok(None) | Err(_) => {
                child.kill().ok();
                child.wait().ok();
                break None;
            }
        }
    };
    let text = reader.join().ok()??;
    status?.success().then(|| serde_json::from_slice(&text).ok())?
}

fn clock_synchronised() -> Option<bool> {
    // SAFETY: all zeros is a valid request that changes nothing; the kernel fills in what it returns.
    let mut clock: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a whole structure that lives through the call.
    let state = unsafe { libc::adjtimex(&raw mut clock) };
    (state >= 0).then_some(state != libc::TIME_ERROR && clock.status & libc::STA_UNSYNC == 0)
}
