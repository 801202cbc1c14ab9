//! A host that a test has all to itself: the first process of a guest, on a kernel that has cgroups of version 2. It lets
//! the intruder loose on memory, processes and processors, in a group that the product's own code has made and into which
//! the product's own launcher has put it, and without. Each outcome is a line of JSON on the console; what it should be is
//! the business of the test outside (`jail/tests/cgroups.rs`).

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking, and the guest with it"
)]

mod setting;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use holdfast_jail::cgroup::{Disk, DiskRate, Group, Hierarchy, OVERHEAD_BYTES, PIDS_MAX, Shares};
use holdfast_jail::plan::{self, Access, Attack, Filter, Identity, Limits, Namespace, Plan, Profile, Root};
use holdfast_jail::{program, start};
use serde_json::json;

/// The stand-in for a broken VMM, which is its own launcher.
pub(crate) const INTRUDER: &str = "/bin/jail-intruder";

/// Memory of the guest that is bounded; the group has as much again for its VMM.
const GUEST_BYTES: u64 = 64 << 20;

/// What the intruder tries to have: more than the group may.
const EATEN_BYTES: u64 = GUEST_BYTES + OVERHEAD_BYTES + (32 << 20);

/// With one processor a guest's group may use two: one for what the VMM does beside it.
const SHARES: Shares = Shares { cpu_milli: 1_000, vcpus: 1, memory_bytes: GUEST_BYTES };

/// What the group may do to the disk, and what the intruder reads of it: so that he needs three seconds at least.
const DISK_RATE: DiskRate = DiskRate { bytes: 1 << 20, operations: 10_000 };
const READ_BYTES: u64 = 4 << 20;

/// How often and how long it is waited for a group to be empty.
const LOOKS_MAX: u32 = 2_000;
const LOOK_PAUSE: Duration = Duration::from_millis(10);

fn main() {
    assert_eq!(std::process::id(), 1, "this is the first process of a guest: see jail/tests/cgroups.rs");
    setting::make();
    let hierarchy = Hierarchy::find();
    say(
        json!({ "case": "hierarchy", "found": hierarchy.is_ok(), "why": hierarchy.as_ref().err().map(ToString::to_string) }),
    );
    let host = Host {
        hierarchy: hierarchy.unwrap(),
        runtime: tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap(),
    };
    host.settings();
    for (case, attempt, walled) in [
        ("memory, alone", "eat_memory", false),
        ("memory, all walls", "eat_memory", true),
        ("processes, alone", "fork_bomb", false),
        ("threads, alone", "many_threads", false),
        ("processors, alone", "burn_cpu", false),
        ("processors, all walls", "burn_cpu", true),
        ("disk, alone", "read_disk", false),
    ] {
        host.attack(case, attempt, walled, &[]);
    }
    // The same with one file written back: what it is that stops the attack.
    host.attack("memory, swap allowed", "eat_memory", false, &[("memory.swap.max", "max")]);
    host.attack("memory, one killed", "eat_memory", false, &[("memory.oom.group", "0")]);
    host.attack("processes, no bound", "fork_bomb", false, &[("pids.max", "max")]);
    host.attack("disk, no bound", "read_disk", false, &[("io.max", "")]);
    host.attack("processors, no ceiling", "burn_cpu", false, &[("cpu.max", "max 100000")]);
    say(json!({ "case": "end" }));
    setting::leave();
}

fn say(line: serde_json::Value) {
    println!("holdfast {line}");
}

struct Host {
    hierarchy: Hierarchy,
    runtime: tokio::runtime::Runtime,
}

impl Host {
    /// What the kernel says of a new group, file by file.
    fn settings(&self) {
        let group = self.hierarchy.make("settings", &SHARES).unwrap();
        let names = [
            "cpu.weight",
            "cpu.max",
            "memory.high",
            "memory.max",
            "memory.swap.max",
            "memory.oom.group",
            "pids.max",
        ];
        let settings: serde_json::Map<_, _> =
            names.iter().map(|name| ((*name).to_owned(), text(&group, name).into())).collect();
        group.remove().unwrap();
        say(json!({ "case": "settings", "settings": settings, "left": self.hierarchy.list("") }));
    }

    /// Makes an attempt without a group, and then in one in which these files are written back.
    fn attack(&self, case: &str, attempt: &str, walled: bool, changed: &[(&str, &str)]) {
        if changed.is_empty() && !walled {
            let said = self.run(attempt, None, false);
            setting::end_all_others();
            say(
                json!({ "case": case, "wall": false, "succeeded": said.contains(&format!("succeeded {attempt} ")), "said": said }),
            );
        }
        let group = self.hierarchy.make("attacked", &SHARES).unwrap();
        let disk = Disk::parse(&fs::read_to_string("/sys/class/block/vda/dev").unwrap()).unwrap();
        if attempt == "read_disk" && changed.is_empty() {
            assert!(group.bound_disk(disk, DISK_RATE).unwrap(), "this kernel throttles disks");
        }
        for (name, value) in changed.iter().filter(|(_, value)| !value.is_empty()) {
            fs::write(group.folder().join(name), value).unwrap();
        }
        let said = self.run(attempt, Some(&group), walled);
        // A killed group is empty a little later; another still holds the attacker's children.
        let killed = number(&group, "memory.events", "oom_kill") > 0;
        let emptied = (0..LOOKS_MAX).any(|_| {
            let empty = number(&group, "cgroup.events", "populated") == 0;
            if !empty && killed {
                std::thread::sleep(LOOK_PAUSE);
            }
            empty || !killed
        }) && number(&group, "cgroup.events", "populated") == 0;
        let report = json!({
            "case": case,
            "wall": true,
            "succeeded": said.contains(&format!("succeeded {attempt} ")),
            "refused": said.contains(&format!("failed {attempt} ")),
            "said": said,
            "out_of_memory": group.was_out_of_memory(),
            "killed": number(&group, "memory.events", "oom_kill"),
            "emptied": emptied,
            "swapped_bytes": text(&group, "memory.swap.current").parse::<u64>().unwrap(),
            "refused_processes": number(&group, "pids.events", "max"),
            "pids": text(&group, "pids.current").parse::<u64>().unwrap(),
            "pids_max": PIDS_MAX,
            "used_us": number(&group, "cpu.stat", "usage_usec"),
            "periods": number(&group, "cpu.stat", "nr_periods"),
            "throttled": number(&group, "cpu.stat", "nr_throttled"),
            "quota_us": text(&group, "cpu.max").split_whitespace().next().unwrap().parse::<u64>().ok(),
        });
        // Also with processes of the attacker's in it.
        group.remove().unwrap();
        setting::end_all_others();
        let mut report = report;
        report["left"] = self.hierarchy.list("").into();
        say(report);
    }

    /// Lets the intruder make one attempt; answers with what he said.
    fn run(&self, attempt: &str, group: Option<&Group>, walled: bool) -> String {
        let plan = Plan { cgroup: group.map(|group| group.folder().to_owned()), ..plan(attempt, walled) };
        let (out, err) = (Path::new("/tmp/out"), Path::new("/tmp/err"));
        self.runtime.block_on(async {
            let (out, err) = (File::create(out).unwrap(), File::create(err).unwrap());
            let launch = start::launch(Path::new(INTRUDER), &plan, out, err).await.unwrap();
            let pid = launch.pid();
            launch.go().await.unwrap();
            // The task that waits for the process runs here.
            while fs::exists(format!("/proc/{pid}")).unwrap() {
                tokio::time::sleep(LOOK_PAUSE).await;
            }
        });
        let said = |path| fs::read_to_string(path).unwrap().replace('\n', "; ");
        format!("{}{}", said(out), said(err))
    }
}

/// A process with every wall but the group, or with none.
fn plan(attempt: &str, walled: bool) -> Plan {
    let none = Limits { file_bytes: None, descriptors: None, threads: None, data_bytes: None };
    let bare = Plan {
        version: plan::VERSION,
        name: "intruder".to_owned(),
        program: INTRUDER.into(),
        arguments: vec![
            attempt.to_owned(),
            format!("eat_bytes={EATEN_BYTES}"),
            format!("processes={}", 2 * PIDS_MAX),
            "threads=4".to_owned(),
            format!("read_bytes={READ_BYTES}"),
            "burn_ms=4000".to_owned(),
        ],
        descriptors: Vec::new(),
        tap: None,
        cgroup: None,
        namespaces: Vec::new(),
        root: None,
        identity: None,
        no_capabilities: false,
        access: None,
        filter: None,
        limits: none,
    };
    if !walled {
        return bare;
    }
    let needs = program::needs(Path::new(INTRUDER), &[]).unwrap();
    let code: Vec<PathBuf> =
        std::iter::once(PathBuf::from(INTRUDER)).chain(needs.interpreter).chain(needs.libraries).collect();
    let file = |path: &PathBuf| plan::File { path: path.clone(), executable: true };
    let root = Root {
        mount_point: "/jail".into(),
        files: code.iter().map(file).collect(),
        writable: None,
        devices: Vec::new(),
    };
    Plan {
        namespaces: Namespace::ALL.to_vec(),
        root: Some(root),
        identity: Some(Identity { uid: 1_900_000_777, gid: 1_900_000_777 }),
        no_capabilities: true,
        access: Some(Access { execute: code, ..Access::default() }),
        filter: Some(Filter { profile: Profile::Qemu, attack: Attack::Refuse }),
        ..bare
    }
}

fn text(group: &Group, name: &str) -> String {
    let path = group.folder().join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).trim().to_owned()
}

/// A number from a file of names and numbers; one that is absent there is none.
fn number(group: &Group, file: &str, name: &str) -> u64 {
    let text = text(group, file);
    let of = |line: &str| {
        let (named, number) = line.split_once(' ')?;
        (named == name).then(|| number.trim().parse().ok())?
    };
    text.lines().find_map(of).unwrap_or(0)
}
