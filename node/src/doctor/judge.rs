//! From what was read to what it means. Pure: the same facts give the same findings, in the same order.

use super::facts::{Asked, HostFacts, VmmProcess};
use super::{Finding, Severity};
use crate::network::guard::TABLE_PREFIX;
use crate::network::tag_of;
use crate::vmm::process::FILE_BYTES_MAX;

/// Console messages below this level are few.
const CONSOLE_LEVEL_MAX: u32 = 4;

/// A log file of the system's that is larger is bounded by nobody.
const SYSTEM_LOG_BYTES_MAX: u64 = 2 << 30;

/// Landlock that knows files, TCP, devices, signals and abstract sockets.
const LANDLOCK_WANTED: u32 = 6;

/// Descriptors that an agent with some thousand instances needs.
const DESCRIPTORS_WANTED: u64 = 65_536;

/// Of a disk, in hundredths: below the first it is a warning, below the second a failure.
const DISK_FREE_WARN: u64 = 10;
const DISK_FREE_FAIL: u64 = 2;

/// Clock sources that cost a system call and drift.
const SLOW_CLOCKS: [&str; 3] = ["hpet", "acpi_pm", "jiffies"];

/// Judges a host.
pub fn judge(facts: &HostFacts) -> Vec<Finding> {
    let mut findings = vec![kvm(facts), vmm(facts), cgroups(facts), landlock(facts), seccomp(facts)];
    findings.extend([jailed(facts), serial(facts), logs(facts), console(facts)]);
    findings.extend([metadata(facts), network_rate(facts), disk_rate(facts), forwarding(facts)]);
    findings.extend([swap(facts), ksm(facts), smt(facts), processor(facts)]);
    findings.extend([descriptors(facts), clock(facts), disk(facts)]);
    findings
}

fn kvm(facts: &HostFacts) -> Finding {
    let id = "kvm";
    let means = "Without it guests are translated instruction by instruction: good enough for tests, not for tenants.";
    match facts.kvm {
        Some(Asked::Usable) => Finding::ok(id, "/dev/kvm can be used"),
        Some(Asked::Refused) => Finding::new(
            id,
            Severity::Warn,
            "/dev/kvm is there and closed to this user",
            means,
            "Run the node agent, and this command, as root.",
        ),
        Some(Asked::Absent) => Finding::new(
            id,
            Severity::Warn,
            "there is no /dev/kvm",
            means,
            "Use a machine with virtualisation switched on in its firmware, or a cloud's metal or nested instance, and load kvm_intel or kvm_amd.",
        ),
        None => Finding::unknown(id, "/dev/kvm was not looked at", ""),
    }
}

fn vmm(facts: &HostFacts) -> Finding {
    let id = "vmm";
    match &facts.verdict {
        Some((true, verdict)) => Finding::ok(id, verdict.clone()),
        Some((false, verdict)) => Finding::new(
            id,
            Severity::Fail,
            verdict.clone(),
            "No VMM boots a guest here, so the node offers no capacity.",
            "Install qemu-system-x86 or Firecracker, mend what the verdict names, and start the agent again.",
        ),
        None => Finding::unknown(
            id,
            "no agent's verdict about VMMs was read",
            "Name the node's folder with --data-dir; its agent probes when it starts.",
        ),
    }
}

fn cgroups(facts: &HostFacts) -> Finding {
    let id = "cgroups";
    match &facts.cgroups {
        Some(Ok(())) => Finding::ok(id, "cpu, memory and pids are in the hierarchy of version 2"),
        Some(Err(why)) => Finding::new(
            id,
            Severity::Fail,
            why.clone(),
            "No instance is started, because nothing would bound its memory, processors and processes.",
            "Boot the host with systemd.unified_cgroup_hierarchy=1 cgroup_no_v1=all. To share the host without bounds all the same, run the agent with --without-cgroups.",
        ),
        None => Finding::unknown(id, "cgroups were not looked at", ""),
    }
}

fn landlock(facts: &HostFacts) -> Finding {
    let id = "landlock";
    let means = "The second wall around each VMM's files, network and signals is missing or has gaps.";
    let mend = "Use Linux 6.12 or later with CONFIG_SECURITY_LANDLOCK, and landlock among the names of lsm= on its command line.";
    match facts.landlock {
        Some(0) => Finding::new(id, Severity::Warn, "the kernel has no Landlock", means, mend),
        Some(version) if version < LANDLOCK_WANTED => {
            Finding::new(id, Severity::Warn, format!("version {version} of {LANDLOCK_WANTED}"), means, mend)
        }
        Some(version) => Finding::ok(id, format!("version {version}")),
        None => Finding::unknown(id, "Landlock was not asked for", ""),
    }
}

fn seccomp(facts: &HostFacts) -> Finding {
    let id = "seccomp";
    let Some(actions) = &facts.seccomp_actions else {
        return Finding::new(
            id,
            Severity::Fail,
            "the kernel does not tell what its filters can do",
            "No filter, no start: instances do not run here.",
            "Use a kernel with CONFIG_SECCOMP_FILTER.",
        );
    };
    let missing: Vec<_> = ["kill_process", "errno", "allow"]
        .into_iter()
        .filter(|action| !actions.split_whitespace().any(|one| one == *action))
        .collect();
    if missing.is_empty() {
        return Finding::ok(id, "filters can refuse and kill");
    }
    Finding::new(
        id,
        Severity::Fail,
        format!("filters cannot do: {}", missing.join(", ")),
        "No filter, no start: instances do not run here.",
        "Use Linux 4.14 or later.",
    )
}

/// The finding for what every VMM that runs must have; `breaks` tells what one lacks.
fn of_vmms(
    facts: &HostFacts,
    id: &'static str,
    fine: &str,
    breaks: impl Fn(&VmmProcess) -> Option<String>,
    (severity, means, mend): (Severity, &'static str, &'static str),
) -> Finding {
    if facts.vmms.is_empty() {
        return Finding::unknown(id, "no VMM runs now, so none could be looked at", "");
    }
    let wrong: Vec<String> = facts
        .vmms
        .iter()
        .filter_map(|vmm| breaks(vmm).map(|what| format!("{} {} {what}", vmm.program, vmm.pid)))
        .collect();
    match wrong.first() {
        None => Finding::ok(id, format!("{} of {}: {fine}", facts.vmms.len(), facts.vmms.len())),
        Some(first) => {
            let seen = format!("{} of {} VMMs, as {first}", wrong.len(), facts.vmms.len());
            Finding::new(id, severity, seen, means, mend)
        }
    }
}

fn jailed(facts: &HostFacts) -> Finding {
    let breaks = |vmm: &VmmProcess| match (vmm.uid, vmm.seccomp) {
        (Some(0), _) => Some("runs as root".to_owned()),
        (Some(_), Some(2)) => None,
        (Some(_), Some(_)) => Some("has no system call filter".to_owned()),
        _ => Some("does not show its user and filter".to_owned()),
    };
    let fine = "a user of its own and a system call filter";
    let texts = (
        Severity::Fail,
        "A guest that breaks out of such a VMM has the rights of its user, with the whole kernel before it.",
        "Run the node agent as root, so that it jails its VMMs; end VMMs that others have started here.",
    );
    of_vmms(facts, "jail", fine, breaks, texts)
}

fn serial(facts: &HostFacts) -> Finding {
    let breaks = |vmm: &VmmProcess| match vmm.file_bytes_max {
        Some(bytes) if bytes <= FILE_BYTES_MAX => None,
        Some(bytes) => Some(format!("may write files of {bytes} bytes")),
        None => Some("may write files of any size".to_owned()),
    };
    let texts = (
        Severity::Fail,
        "A guest writes to its serial console as much as it likes, and so fills the host's disk.",
        "Let the node agent start VMMs: it bounds console and error output of each by RLIMIT_FSIZE.",
    );
    of_vmms(facts, "serial_console", "console and error output bounded to 1 MiB each", breaks, texts)
}

fn logs(facts: &HostFacts) -> Finding {
    let id = "log_sinks";
    match &facts.system_log {
        Some((path, bytes)) if *bytes > SYSTEM_LOG_BYTES_MAX => Finding::new(
            id,
            Severity::Warn,
            format!("{path} has {} MiB", bytes >> 20),
            "Nothing seems to bound the system's log, and a guest can make the host log.",
            "Rotate it (logrotate), or keep the journal alone, with SystemMaxUse= in journald.conf.",
        ),
        Some((path, bytes)) => {
            Finding::ok(id, format!("{path} has {} MiB; instances' rings are bounded", bytes >> 20))
        }
        None => Finding::ok(id, "no log file of the system's; instances' rings are bounded"),
    }
}

fn console(facts: &HostFacts) -> Finding {
    let id = "host_console";
    let level = facts.printk.as_deref().and_then(|text| text.split_whitespace().next()?.parse::<u32>().ok());
    let Some(level) = level else { return Finding::unknown(id, "the console's level could not be read", "") };
    let serial = facts
        .consoles
        .as_deref()
        .is_some_and(|text| text.lines().any(|l| l.starts_with("ttyS") || l.starts_with("ttyAMA")));
    if level <= CONSOLE_LEVEL_MAX || !serial {
        return Finding::ok(id, format!("level {level}, {} serial console", if serial { "a" } else { "no" }));
    }
    Finding::new(
        id,
        Severity::Warn,
        format!("kernel messages up to level {level} go to a serial console"),
        "Each new TAP writes some, slowly: starts of instances wait for them.",
        "Add quiet loglevel=1 to the kernel's command line, or: sysctl kernel.printk='1 4 1 7'.",
    )
}

/// The rules of an agent's table, as `nft` shows them.
fn rules<'a>(filters: &'a serde_json::Value, table: &str) -> Vec<&'a serde_json::Value> {
    let items = filters.get("nftables").and_then(|list| list.as_array()).into_iter().flatten();
    items
        .filter_map(|item| item.get("rule"))
        .filter(|rule| rule.get("table").and_then(|t| t.as_str()) == Some(table))
        .filter_map(|rule| rule.get("expr"))
        .collect()
}

fn drops(rule: &serde_json::Value) -> bool {
    rule.as_array().is_some_and(|parts| parts.iter().any(|part| part.get("drop").is_some()))
}

/// Whether a rule drops all that is not IPv6.
fn drops_ipv4(rule: &serde_json::Value) -> bool {
    let matches = |part: &serde_json::Value| {
        let Some(test) = part.get("match") else { return false };
        test.pointer("/left/meta/key").and_then(|k| k.as_str()) == Some("nfproto")
            && test.get("op").and_then(|op| op.as_str()) == Some("!=")
            && test.get("right").and_then(|r| r.as_str()) == Some("ipv6")
    };
    drops(rule) && rule.as_array().is_some_and(|parts| parts.iter().any(matches))
}

/// Whether a rule drops what is beyond a rate of each link.
fn drops_floods(rule: &serde_json::Value) -> bool {
    drops(rule) && rule.as_array().is_some_and(|parts| parts.iter().any(|part| part.get("set").is_some()))
}

/// The TAPs whose agent's table has no rule of this kind; `None` where filters could not be read.
fn without_rule(facts: &HostFacts, kind: fn(&serde_json::Value) -> bool) -> Option<Vec<&str>> {
    let filters = facts.filters.as_ref()?;
    let guarded = |name: &str| {
        let table = format!("{TABLE_PREFIX}{}", tag_of(name).unwrap_or_default());
        rules(filters, &table).into_iter().any(kind)
    };
    Some(facts.taps.iter().map(|tap| tap.name.as_str()).filter(|name| !guarded(name)).collect())
}

const NO_FILTERS: &str = "Run this as root, with the package nftables installed.";

fn metadata(facts: &HostFacts) -> Finding {
    let id = "metadata_address";
    if facts.taps.is_empty() {
        return Finding::ok(id, "there is no TAP; each is guarded before it comes up");
    }
    match without_rule(facts, drops_ipv4).as_deref() {
        None => Finding::unknown(id, "the packet filters could not be read", NO_FILTERS),
        Some([]) => {
            Finding::ok(id, format!("{} TAPs drop all IPv4, and 169.254.169.254 with it", facts.taps.len()))
        }
        Some([first, ..]) => Finding::new(
            id,
            Severity::Fail,
            format!("TAP {first} lets IPv4 through"),
            "A guest may reach 169.254.169.254, where a cloud keeps the host's own credentials.",
            "Something has flushed the filters: keep `flush ruleset` out of what reloads your firewall. Starting any instance puts the node's table up again.",
        ),
    }
}

fn network_rate(facts: &HostFacts) -> Finding {
    let id = "network_rate";
    if facts.taps.is_empty() {
        return Finding::ok(id, "there is no TAP; each is bounded before it comes up");
    }
    let (Some(floods), Some(queues)) = (without_rule(facts, drops_floods), facts.queues.as_ref()) else {
        return Finding::unknown(id, "the packet filters and queues could not be read", NO_FILTERS);
    };
    let bounded = |name: &str| {
        queues.as_array().into_iter().flatten().any(|queue| {
            queue.get("dev").and_then(|d| d.as_str()) == Some(name)
                && queue.get("kind").and_then(|k| k.as_str()) == Some("tbf")
        })
    };
    let taps = facts.taps.iter().map(|tap| tap.name.as_str());
    match taps.clone().find(|name| floods.contains(name) || !bounded(name)) {
        None => Finding::ok(id, format!("{} TAPs are bounded in both directions", facts.taps.len())),
        Some(first) => Finding::new(
            id,
            Severity::Warn,
            format!("TAP {first} is not bounded in both directions"),
            "One guest can fill the host's queues and slow down the network of all others.",
            "Something has flushed the filters or replaced the queue. Starting the instance again bounds it; --instance-mbit sets how much.",
        ),
    }
}

fn disk_rate(facts: &HostFacts) -> Finding {
    let breaks = |vmm: &VmmProcess| {
        // What Firecracker was told is not in its arguments; the agent tells it the same.
        let free = vmm.arguments.iter().filter(|a| a.starts_with("id=") && a.contains(",if=none"));
        let free = free.filter(|a| !a.contains("throttling.bps-total=")).count();
        (free > 0).then(|| format!("has {free} disks without a bound"))
    };
    let texts = (
        Severity::Warn,
        "One guest can keep the host's disk busy for itself.",
        "Start such instances again with this release of the node agent.",
    );
    of_vmms(facts, "disk_rate", "every disk has a bound", breaks, texts)
}

fn forwarding(facts: &HostFacts) -> Finding {
    let id = "forwarding";
    match facts.forwarding.as_deref() {
        Some("0") => Finding::ok(id, "this host forwards no IPv6"),
        Some(_) => Finding::new(
            id,
            Severity::Warn,
            "this host forwards IPv6",
            "What keeps a guest from everything behind this host is then the node's packet filter alone.",
            "Set net.ipv6.conf.all.forwarding=0 where nothing else on this host needs it.",
        ),
        None => Finding::unknown(id, "net.ipv6.conf.all.forwarding could not be read", ""),
    }
}

fn swap(facts: &HostFacts) -> Finding {
    let id = "swap";
    let Some(swaps) = &facts.swaps else { return Finding::unknown(id, "/proc/swaps could not be read", "") };
    let disks = swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next());
    let disks: Vec<&str> = disks.filter(|path| !path.starts_with("/dev/zram")).collect();
    match disks.first() {
        None => Finding::ok(id, "no swap on a disk"),
        Some(first) => Finding::new(
            id,
            Severity::Warn,
            format!("swap on {first}"),
            "Memory of guests, their secrets in it, may come to lie on the disk and stay there. (Where cgroups bound VMs they have none.)",
            "swapoff -a, and take it out of /etc/fstab; or use an encrypted swap with a key that is lost at shutdown.",
        ),
    }
}

fn ksm(facts: &HostFacts) -> Finding {
    let id = "ksm";
    match facts.ksm.as_deref() {
        Some("0" | "2") => Finding::ok(id, "pages are not merged"),
        None => Finding::ok(id, "the kernel has no page merging"),
        Some(_) => Finding::new(
            id,
            Severity::Fail,
            "the kernel merges equal pages",
            "Who shares a page can tell by its timing what another tenant has in memory.",
            "echo 2 > /sys/kernel/mm/ksm/run, and disable ksmtuned or ksm.service.",
        ),
    }
}

fn smt(facts: &HostFacts) -> Finding {
    let id = "smt";
    match facts.smt.as_deref() {
        Some("0") => Finding::ok(id, "one thread to a core"),
        Some(_) => Finding::new(
            id,
            Severity::Warn,
            "cores run two threads at a time",
            "Two tenants on one core can observe each other through what the core shares.",
            "echo off > /sys/devices/system/cpu/smt/control, or nosmt on the kernel's command line.",
        ),
        None => Finding::unknown(id, "the kernel does not tell whether cores share threads", ""),
    }
}

fn processor(facts: &HostFacts) -> Finding {
    let id = "cpu_mitigations";
    if facts.vulnerabilities.is_empty() {
        return Finding::unknown(
            id,
            "the kernel does not tell what its processor is open to",
            "Use a kernel that has /sys/devices/system/cpu/vulnerabilities.",
        );
    }
    let with = |test: fn(&str) -> bool| {
        let of = facts.vulnerabilities.iter().filter(|(_, text)| test(text));
        of.map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ")
    };
    let open = with(|text| text.starts_with("Vulnerable"));
    let halves = with(|text| !text.starts_with("Vulnerable") && text.contains("vulnerable"));
    if !open.is_empty() {
        return Finding::new(
            id,
            Severity::Fail,
            format!("open to {open}"),
            "A guest can read memory that is not its own through the processor.",
            "Update kernel and microcode, and take mitigations=off out of the kernel's command line.",
        );
    }
    if !halves.is_empty() {
        return Finding::new(
            id,
            Severity::Warn,
            format!("mitigated in part: {halves}"),
            "A guest may read memory that is not its own in some cases, mostly through a core's second thread.",
            "Switch SMT off, and update microcode.",
        );
    }
    Finding::ok(id, format!("{} known faults, each mitigated or absent", facts.vulnerabilities.len()))
}

fn descriptors(facts: &HostFacts) -> Finding {
    let id = "descriptors";
    let numbers: Option<Vec<u64>> =
        facts.files.as_ref().and_then(|text| text.split_whitespace().map(|n| n.parse().ok()).collect());
    let mend = "LimitNOFILE=1048576 in the agent's unit; fs.file-max with sysctl.";
    if let Some([used, _, most]) = numbers.as_deref()
        && *used > most / 10 * 8
    {
        let means = "When none is left nothing can be started, and running agents cannot take connections.";
        return Finding::new(id, Severity::Warn, format!("{used} of {most} are in use"), means, mend);
    }
    match facts.descriptors_max {
        Some(most) if most < DESCRIPTORS_WANTED => Finding::new(
            id,
            Severity::Warn,
            format!("a process may have {most}"),
            "An agent with many instances runs out of descriptors.",
            mend,
        ),
        Some(most) => Finding::ok(id, format!("a process may have {most}")),
        None => Finding::ok(id, "a process may have any number"),
    }
}

fn clock(facts: &HostFacts) -> Finding {
    let id = "clock";
    if let Some(source) = facts.clock_source.as_deref().filter(|source| SLOW_CLOCKS.contains(source)) {
        return Finding::new(
            id,
            Severity::Warn,
            format!("the kernel reads its clock from {source}"),
            "Each look at the time is slow, for guests even more so.",
            "Use tsc or kvm-clock; `dmesg | grep -i tsc` says why the kernel gave it up.",
        );
    }
    let source = facts.clock_source.as_deref().unwrap_or("an unknown source");
    match facts.clock_synchronised {
        Some(true) => Finding::ok(id, format!("synchronised, from {source}")),
        Some(false) => Finding::new(
            id,
            Severity::Warn,
            format!("not synchronised, from {source}"),
            "Certificates and tokens are held against the clock; guests get theirs from here.",
            "Run chrony or systemd-timesyncd.",
        ),
        None => Finding::unknown(id, "whether the clock is synchronised could not be read", ""),
    }
}

fn disk(facts: &HostFacts) -> Finding {
    let id = "disk_space";
    let Some(disk) = facts.disk else {
        return Finding::unknown(id, "the disk's space could not be read", "");
    };
    let share = disk.free_bytes.saturating_mul(100).checked_div(disk.total_bytes).unwrap_or(0);
    let seen = format!("{} MiB free, {share} % of the disk", disk.free_bytes >> 20);
    let severity = match share {
        0..DISK_FREE_FAIL => Severity::Fail,
        DISK_FREE_FAIL..DISK_FREE_WARN => Severity::Warn,
        _ => return Finding::ok(id, seen),
    };
    Finding::new(
        id,
        severity,
        seen,
        "An agent whose disk is full leaves everything running and starts nothing.",
        "Free space, or give the agent's folder a disk of its own.",
    )
}

#[cfg(test)]
mod tests;
