use std::path::Path;

use super::*;
use crate::doctor::facts::{Disk, Tap};
use crate::doctor::read;

const TAP: &str = "hfabcd123456789";

/// A host on which nothing is wrong.
fn sound() -> HostFacts {
    let vmm = VmmProcess {
        pid: 7,
        program: "qemu-system-x86_64".to_owned(),
        uid: Some(1_900_000_000),
        seccomp: Some(2),
        file_bytes_max: Some(FILE_BYTES_MAX),
        arguments: vec!["-drive".into(), "id=root,format=raw,if=none,throttling.bps-total=1".into()],
    };
    HostFacts {
        root: true,
        vmms: vec![vmm],
        printk: Some("1\t4\t1\t7".into()),
        consoles: Some("ttyS0 -W- (EC p a) 4:64".into()),
        system_log: Some(("/var/log/syslog".into(), 1 << 20)),
        swaps: Some("Filename Type Size Used Priority".into()),
        ksm: Some("0".into()),
        smt: Some("0".into()),
        vulnerabilities: [("meltdown", "Not affected"), ("spectre_v2", "Mitigation: Retpolines")]
            .map(|(name, text)| (name.to_owned(), text.to_owned()))
            .into(),
        cgroups: Some(Ok(())),
        kvm: Some(Asked::Usable),
        landlock: Some(LANDLOCK_WANTED),
        seccomp_actions: Some("kill_process kill_thread trap errno user_notif trace log allow".into()),
        taps: vec![Tap { name: TAP.into() }],
        filters: Some(filters("ipv6")),
        queues: Some(serde_json::json!([{"kind": "tbf", "dev": TAP}])),
        forwarding: Some("0".into()),
        files: Some("9000\t0\t1000000".into()),
        descriptors_max: Some(1 << 20),
        clock_source: Some("tsc".into()),
        clock_synchronised: Some(true),
        disk: Some(Disk { free_bytes: 50 << 30, total_bytes: 100 << 30 }),
        verdict: Some((true, "firecracker boots in 120 ms".into())),
    }
}

/// As `nft -j list ruleset` shows an agent's table.
fn filters(kept: &str) -> serde_json::Value {
    let left = serde_json::json!({"meta": {"key": "nfproto"}});
    let set = serde_json::json!({"set": {"op": "update", "set": "@flood"}});
    serde_json::json!({"nftables": [
        {"metainfo": {"version": "1.0.6"}},
        {"table": {"family": "inet", "name": "holdfast_abcd"}},
        {"rule": {"table": "holdfast_abcd", "chain": "guests", "expr": [
            {"match": {"op": "!=", "left": left, "right": kept}}, {"counter": {}}, {"drop": null}]}},
        {"rule": {"table": "holdfast_abcd", "chain": "guests", "expr": [set, {"counter": {}}, {"drop": null}]}},
    ]})
}

fn severity_of(facts: &HostFacts, id: &str) -> Severity {
    let findings = judge(facts);
    findings.iter().find(|finding| finding.id == id).unwrap_or_else(|| panic!("{id}")).severity
}

#[test]
fn a_sound_host_has_nothing_but_what_is_well() {
    let findings = judge(&sound());
    let wrong: Vec<_> = findings.iter().filter(|finding| finding.severity != Severity::Ok).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    let mut ids: Vec<_> = findings.iter().map(|finding| finding.id).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), findings.len(), "each has a name of its own");
}

/// What is broken, and the only finding that may notice it, with how bad it is.
type Broken = (&'static str, Severity, fn(&mut HostFacts));

const BROKEN: &[Broken] = &[
    ("kvm", Severity::Warn, |f| f.kvm = Some(Asked::Absent)),
    ("kvm", Severity::Warn, |f| f.kvm = Some(Asked::Refused)),
    ("vmm", Severity::Fail, |f| f.verdict = Some((false, "qemu-tcg fails".into()))),
    ("vmm", Severity::Unknown, |f| f.verdict = None),
    ("cgroups", Severity::Fail, |f| f.cgroups = Some(Err("they sit in version 1".into()))),
    ("landlock", Severity::Warn, |f| f.landlock = Some(0)),
    ("landlock", Severity::Warn, |f| f.landlock = Some(LANDLOCK_WANTED - 1)),
    ("seccomp", Severity::Fail, |f| f.seccomp_actions = None),
    ("seccomp", Severity::Fail, |f| f.seccomp_actions = Some("trap errno allow".into())),
    ("jail", Severity::Fail, |f| f.vmms[0].uid = Some(0)),
    ("jail", Severity::Fail, |f| f.vmms[0].seccomp = Some(0)),
    ("jail", Severity::Fail, |f| f.vmms[0].seccomp = None),
    ("serial_console", Severity::Fail, |f| f.vmms[0].file_bytes_max = None),
    ("serial_console", Severity::Fail, |f| f.vmms[0].file_bytes_max = Some(FILE_BYTES_MAX + 1)),
    ("log_sinks", Severity::Warn, |f| {
        f.system_log = Some(("/var/log/syslog".into(), SYSTEM_LOG_BYTES_MAX + 1))
    }),
    ("host_console", Severity::Warn, |f| f.printk = Some("7 4 1 7".into())),
    ("metadata_address", Severity::Fail, |f| f.filters = Some(filters("ipv4"))),
    ("network_rate", Severity::Warn, |f| {
        f.queues = Some(serde_json::json!([{"kind": "fq_codel", "dev": TAP}]))
    }),
    ("disk_rate", Severity::Warn, |f| f.vmms[0].arguments = vec!["id=root,format=raw,if=none".into()]),
    ("forwarding", Severity::Warn, |f| f.forwarding = Some("1".into())),
    ("swap", Severity::Warn, |f| f.swaps = Some("Filename\n/dev/vdb partition 1 0 -2".into())),
    ("ksm", Severity::Fail, |f| f.ksm = Some("1".into())),
    ("smt", Severity::Warn, |f| f.smt = Some("1".into())),
    ("smt", Severity::Unknown, |f| f.smt = None),
    ("cpu_mitigations", Severity::Fail, |f| {
        _ = f.vulnerabilities.insert("mds".into(), "Vulnerable: no microcode".into())
    }),
    ("cpu_mitigations", Severity::Warn, |f| {
        _ = f.vulnerabilities.insert("mds".into(), "Mitigation: Clear CPU buffers; SMT vulnerable".into());
    }),
    ("cpu_mitigations", Severity::Unknown, |f| f.vulnerabilities.clear()),
    ("descriptors", Severity::Warn, |f| f.descriptors_max = Some(1_024)),
    ("descriptors", Severity::Warn, |f| f.files = Some("900000 0 1000000".into())),
    ("clock", Severity::Warn, |f| f.clock_source = Some("hpet".into())),
    ("clock", Severity::Warn, |f| f.clock_synchronised = Some(false)),
    ("disk_space", Severity::Warn, |f| f.disk = Some(Disk { free_bytes: 5, total_bytes: 100 })),
    ("disk_space", Severity::Fail, |f| f.disk = Some(Disk { free_bytes: 1, total_bytes: 100 })),
];

#[test]
fn each_fault_is_found_by_its_own_finding_and_told_how_to_mend() {
    for (id, severity, breaks) in BROKEN {
        let mut facts = sound();
        breaks(&mut facts);
        for finding in judge(&facts) {
            let expected = if finding.id == *id { *severity } else { Severity::Ok };
            assert_eq!(finding.severity, expected, "{id}: {finding:?}");
            if finding.severity >= Severity::Warn {
                assert!(!finding.means.is_empty() && !finding.mend.is_empty(), "{finding:?}");
            }
        }
    }
    // Every finding but those for what is unknown has a fault that brings it about.
    let tried: Vec<_> = BROKEN.iter().map(|(id, _, _)| *id).collect();
    assert!(judge(&sound()).iter().all(|finding| tried.contains(&finding.id)));
}

#[test]
fn what_could_not_be_read_is_unknown_and_no_fault() {
    let mut facts = sound();
    (facts.filters, facts.queues) = (None, None);
    assert_eq!(severity_of(&facts, "metadata_address"), Severity::Unknown);
    assert_eq!(severity_of(&facts, "network_rate"), Severity::Unknown);
    facts.vmms.clear();
    for id in ["jail", "serial_console", "disk_rate"] {
        assert_eq!(severity_of(&facts, id), Severity::Unknown, "{id}");
    }
    // Another agent's table guards nobody else's TAPs.
    let other = "hfzzzz123456789";
    facts = HostFacts { taps: vec![Tap { name: other.into() }], ..sound() };
    assert_eq!(severity_of(&facts, "metadata_address"), Severity::Fail);
}

/// A prepared host: files as a kernel shows them.
fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = root.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    root
}

#[test]
fn a_host_is_read_below_its_root() {
    let root = tree(&[
        ("proc/sys/kernel/printk", "7\t4\t1\t7\n"),
        ("proc/swaps", "Filename Type Size Used Priority\n/dev/zram0 partition 1 0 100\n"),
        ("proc/self/mounts", "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n"),
        ("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory pids\n"),
        ("proc/self/limits", "Limit  Soft Limit  Hard Limit  Units\nMax open files  1024  524288  files\n"),
        ("sys/kernel/mm/ksm/run", "1\n"),
        ("sys/devices/system/cpu/smt/active", "1\n"),
        ("sys/devices/system/cpu/vulnerabilities/mds", "Vulnerable\n"),
        ("dev/kvm", ""),
        ("sys/class/net/hfabcd123456789/tun_flags", "0x1002\n"),
        ("sys/class/net/hfabcd12345678/tun_flags", "0x1002\n"),
        ("sys/class/net/eth0/mtu", "1500\n"),
        ("proc/4711/status", "Name:\tx\nUid:\t7\t7\t7\t7\nSeccomp:\t2\n"),
        ("proc/4711/limits", "Max file size             1048576              1048576              bytes\n"),
        ("proc/4711/cmdline", "/vms/inst\0-drive\0id=root,if=none\0"),
        ("proc/4712/status", "Name:\tother\n"),
    ]);
    std::os::unix::fs::symlink("/usr/bin/qemu-system-x86_64", root.path().join("proc/4711/exe")).unwrap();
    std::os::unix::fs::symlink("/usr/bin/other", root.path().join("proc/4712/exe")).unwrap();
    let facts = read(root.path(), None);
    assert_eq!(facts.cgroups, Some(Ok(())));
    assert_eq!(facts.kvm, Some(Asked::Usable));
    assert_eq!(facts.taps, [Tap { name: TAP.into() }]);
    assert_eq!(facts.descriptors_max, Some(524_288));
    let [vmm] = &facts.vmms[..] else { panic!("{:?}", facts.vmms) };
    assert_eq!((vmm.pid, vmm.uid, vmm.seccomp, vmm.file_bytes_max), (4_711, Some(7), Some(2), Some(1 << 20)));
    let of = |id| severity_of(&facts, id);
    assert_eq!((of("swap"), of("ksm"), of("smt")), (Severity::Ok, Severity::Fail, Severity::Warn));
    assert_eq!(
        (of("cpu_mitigations"), of("jail"), of("disk_rate")),
        (Severity::Fail, Severity::Ok, Severity::Warn)
    );

    // Controllers of version 1, and nothing at all.
    std::fs::write(root.path().join("sys/fs/cgroup/cgroup.controllers"), "\n").unwrap();
    assert_eq!(severity_of(&read(root.path(), None), "cgroups"), Severity::Fail);
    let nothing = tempfile::tempdir().unwrap();
    let facts = read(nothing.path(), None);
    assert_eq!(facts.kvm, Some(Asked::Absent));
    assert!(judge(&facts).iter().all(|finding| !finding.seen.is_empty()));
}

#[test]
fn this_host_can_be_read_and_judged() {
    let facts = read(Path::new("/"), None);
    assert!(facts.seccomp_actions.is_some() && facts.disk.is_some() && facts.landlock.is_some());
    assert!(judge(&facts).len() >= 20);
}
