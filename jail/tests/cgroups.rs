//! The wall of cgroups, tried from the inside on a host that has it: a guest of our own, translated, with the kernel that
//! microVMs boot from. `jail-host` is its first process and makes the attempts, with the product's own groups and
//! launcher; what must come of each is here. The attempts are made without the wall too, where they must succeed.
//!
//! Needs what `cargo xtask assets` makes and installs.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[path = "../../xtask/src/cpio.rs"]
mod cpio;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cpio::{Entry, archive};
use serde_json::{Value, json};

/// A guard against hanging; it takes half a minute on two idle cores.
const PATIENCE: Duration = Duration::from_secs(400);

/// Memory of the guest in MiB: more than what an attacker eats that nobody stops.
const MEMORY_MIB: u32 = 1_024;

/// Twice the processors that the group may use.
const PROCESSORS: u32 = 4;

const SWAP_BYTES: u64 = 512 << 20;

const KERNEL_COMMAND_LINE: &str = "console=ttyS0 loglevel=4 panic=-1 reboot=t tsc=reliable no_timer_check \
                                   8250.nr_uarts=1 random.trust_cpu=on mitigations=off";

/// What the bandwidth of processors may be exceeded by: a processor is taken away at its next tick.
const CPU_SLACK_PERCENT: u64 = 125;

/// The lines of JSON that the guest said.
struct Said(Vec<Value>);

impl Said {
    fn case(&self, case: &str, wall: bool) -> &Value {
        let of = |line: &&Value| line["case"] == case && line["wall"] == wall;
        self.0.iter().find(of).unwrap_or_else(|| panic!("{case}, {wall}: {:#?}", self.0))
    }

    /// An attack that succeeds without the wall, and what came of it behind the wall.
    fn tried(&self, case: &str) -> &Value {
        let open = self.case(case, false);
        assert_eq!(open["succeeded"], true, "it fails without the wall, so it proves nothing: {open:#}");
        self.stopped(case)
    }

    fn stopped(&self, case: &str) -> &Value {
        let walled = self.case(case, true);
        assert_eq!(walled["succeeded"], false, "{walled:#}");
        assert!(walled["left"].as_array().unwrap().is_empty(), "a group is left: {walled:#}");
        walled
    }

    /// An attack on a group of which one file was written back: it succeeds, so that file is what stops it.
    fn freed(&self, case: &str) -> &Value {
        self.case(case, true)
    }
}

#[test]
fn i09_i14_a_group_bounds_memory_processes_processors_and_disk_and_is_killed_as_one() {
    let folder = tempfile::Builder::new().prefix("hf-cgroups-").tempdir().unwrap();
    let said = boot(folder.path());
    let count = |case: &Value, name: &str| case[name].as_u64().unwrap_or_else(|| panic!("{name}: {case:#}"));

    let settings =
        &said.0.iter().find(|line| line["case"] == "settings").expect("the groups must be made")["settings"];
    let expected = json!({
        "cpu.weight": "100",
        "cpu.max": "200000 100000",
        "memory.high": (120_u64 << 20).to_string(),
        "memory.max": (128_u64 << 20).to_string(),
        "memory.swap.max": "0",
        "memory.oom.group": "1",
        "pids.max": "512",
    });
    assert_eq!(*settings, expected, "the kernel has taken every limit as it was meant");

    // Memory: everything in the group is killed, and it is said of what it died. No page of it goes to the swap.
    let alone = said.tried("memory, alone");
    // The kernel counts the one that it chose a second time with its group.
    assert!(count(alone, "killed") >= 2 && alone["emptied"] == true, "{alone:#}");
    for memory in [alone, said.stopped("memory, all walls")] {
        assert_eq!((memory["out_of_memory"] == true, memory["emptied"] == true), (true, true), "{memory:#}");
        assert_eq!(count(memory, "swapped_bytes"), 0, "{memory:#}");
    }
    let swaps = said.freed("memory, swap allowed");
    assert!(swaps["succeeded"] == true && swaps["out_of_memory"] == false, "{swaps:#}");
    let one = said.freed("memory, one killed");
    assert!(count(one, "killed") == 1 && one["emptied"] == false, "the other one lives: {one:#}");

    // Processes and threads.
    for case in ["processes, alone", "threads, alone"] {
        let bomb = said.tried(case);
        assert!(bomb["refused"] == true && count(bomb, "refused_processes") > 0, "{bomb:#}");
        assert!(count(bomb, "pids") <= count(bomb, "pids_max"), "{bomb:#}");
        assert_eq!(bomb["out_of_memory"], false, "{bomb:#}");
    }
    assert_eq!(said.freed("processes, no bound")["succeeded"], true);

    // Processors, by what the kernel has counted: no clock of ours is in it.
    said.tried("processors, alone");
    for case in ["processors, alone", "processors, all walls"] {
        let burns = said.stopped(case);
        let allowed = count(burns, "periods") * count(burns, "quota_us");
        assert!(burns["refused"] == true && count(burns, "throttled") > 0, "{burns:#}");
        assert!(count(burns, "used_us") * 100 <= allowed * CPU_SLACK_PERCENT, "{burns:#}");
    }
    let free = said.freed("processors, no ceiling");
    assert!(free["succeeded"] == true && count(free, "throttled") == 0, "{free:#}");

    // The disk: read past every cache, at no more than the rate that the group was given.
    let reads = said.tried("disk, alone");
    assert!(reads["refused"] == true, "it was read, slowly: {reads:#}");
    assert_eq!(said.freed("disk, no bound")["succeeded"], true);
    assert_eq!(said.0.last().unwrap()["case"], "end");
}

/// Boots the host and waits until it has left.
fn boot(folder: &Path) -> Said {
    let (initrd, swap, console) = (folder.join("host.cpio"), folder.join("swap"), folder.join("console"));
    fs::write(&initrd, initramfs(folder)).unwrap();
    File::create(&swap).unwrap().set_len(SWAP_BYTES).unwrap();
    let program = std::env::var_os("HOLDFAST_QEMU").unwrap_or_else(|| "qemu-system-x86_64".into());
    let mut qemu = Command::new(program)
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"])
        .args(["-machine", "microvm,acpi=off,rtc=on,pit=on,pic=on,isa-serial=on", "-cpu", "max"])
        .args(["-accel", "tcg,thread=multi,tb-size=128", "-serial", "stdio"])
        .args(["-m", &format!("{MEMORY_MIB}M"), "-smp", &PROCESSORS.to_string()])
        .arg("-kernel")
        .arg(kernel())
        .arg("-initrd")
        .arg(&initrd)
        .args(["-append", KERNEL_COMMAND_LINE])
        .args(["-drive", &format!("id=swap,file={},format=raw,if=none", swap.display())])
        .args(["-device", "virtio-blk-device,drive=swap"])
        .stdin(Stdio::null())
        .stdout(File::create(&console).unwrap())
        .spawn()
        .expect("qemu-system-x86_64 must be installed: run `cargo xtask assets`");
    let begun = Instant::now();
    let said = || String::from_utf8_lossy(&fs::read(&console).unwrap()).into_owned();
    let status = loop {
        if let Some(status) = qemu.try_wait().unwrap() {
            break status;
        }
        if begun.elapsed() > PATIENCE {
            qemu.kill().unwrap();
            qemu.wait().unwrap();
            panic!("the guest does not leave; it said: {}", said());
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let text = said();
    println!("{text}");
    assert!(status.success(), "{status}; the guest said: {text}");
    let lines = text.lines().filter_map(|line| line.trim().strip_prefix("holdfast "));
    Said(lines.map(|line| serde_json::from_str(line).unwrap()).collect())
}

fn kernel() -> PathBuf {
    let assets = std::env::var_os("HOLDFAST_ASSETS")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/assets"), PathBuf::from);
    let kernel = assets.join("vmlinux");
    assert!(kernel.is_file(), "'{}' is missing: run `cargo xtask assets` first.", kernel.display());
    kernel
}

/// The host's first process, the intruder, and what both are loaded with, each where it is here.
fn initramfs(folder: &Path) -> Vec<u8> {
    let programs = [
        ("init", env!("CARGO_BIN_EXE_jail-host")),
        ("bin/jail-intruder", env!("CARGO_BIN_EXE_jail-intruder")),
    ];
    let mut files = Vec::new();
    for (name, path) in programs {
        // What is for debuggers is most of it.
        let bare = folder.join(Path::new(name).file_name().unwrap());
        let strip = Command::new("strip").arg("-o").arg(&bare).arg(path).status();
        assert!(strip.expect("binutils must be installed: run `cargo xtask packages`").success());
        files.push((name.to_owned(), fs::read(&bare).unwrap()));
    }
    let mut loaded = BTreeSet::new();
    for (_, path) in programs {
        let needs = holdfast_jail::program::needs(Path::new(path), &[]).unwrap();
        loaded.extend(needs.interpreter.into_iter().chain(needs.libraries));
    }
    for path in loaded {
        let name = path.to_str().unwrap().trim_start_matches('/').to_owned();
        files.push((name, fs::read(&path).unwrap()));
    }
    let mut folders = BTreeSet::from(["dev".to_owned()]);
    for (name, _) in &files {
        let parents = Path::new(name).ancestors().skip(1).filter(|parent| *parent != Path::new(""));
        folders.extend(parents.map(|parent| parent.to_str().unwrap().to_owned()));
    }
    let mut entries: Vec<Entry<'_>> = folders.iter().map(|name| Entry::Folder { name }).collect();
    entries.push(Entry::Device { name: "dev/console", major: 5, minor: 1 });
    entries.extend(files.iter().map(|(name, content)| Entry::Program { name, content }));
    archive(&entries)
}
