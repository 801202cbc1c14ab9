//! Real VMMs in their jails, seen from the host.
//!
//! Needs root, and what `cargo xtask assets` makes and installs.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod guest_image;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use guest_image::{FileSystem, assets, jail_config, jails, root_image};
use holdfast_jail::ids::IdRange;
use holdfast_node::step::unheard;
use holdfast_node::vmm::channel::GuestChannel;
use holdfast_node::vmm::jail::{JailConfig, Jails};
use holdfast_node::vmm::{Vm, VmSpec, Vmm, VmmError, probe, qemu::Qemu};

/// A guard against hanging.
const PATIENCE: Duration = Duration::from_secs(60);

/// Starts of each kind that are measured.
const ROUNDS: usize = 15;

fn qemu(jails: Arc<Jails>) -> Qemu {
    let program = probe::find_qemu().expect("qemu-system-x86_64 must be installed: run `cargo xtask assets`");
    Qemu { program, kvm: false, jails }
}

fn spec(folder: &Path, name: &str) -> VmSpec {
    let assets = assets();
    VmSpec {
        instance_id: name.to_owned(),
        folder: folder.join("vms").join(name),
        kernel: assets.kernel,
        initrd: assets.initrd,
        root_image: Some(folder.join("root.img")),
        memory_mib: 128,
        vcpus: 1,
        cpu_milli: 1_000,
        nic: None,
        volumes: Vec::new(),
    }
}

fn field(vm: &Vm, name: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line[name.len()..].trim().to_owned()
}

/// Every file that can be named in a jail, from the host.
fn files_of(vm: &Vm) -> BTreeSet<String> {
    fn walk(folder: &Path, root: &Path, found: &mut BTreeSet<String>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, root, found);
            } else {
                found.insert(format!("/{}", path.strip_prefix(root).unwrap().display()));
            }
        }
    }
    let (root, mut found) = (format!("/proc/{}/root/", vm.pid()), BTreeSet::new());
    walk(Path::new(&root), Path::new(&root), &mut found);
    found
}

#[tokio::test]
async fn i09_a_vmm_that_runs_is_behind_every_wall() {
    let folder = tempfile::Builder::new().prefix("hf-jail-").tempdir().unwrap();
    root_image(folder.path(), FileSystem::Erofs);
    let vmm = qemu(jails(folder.path()));
    let specs = ["inst_a", "inst_b"].map(|name| spec(folder.path(), name));
    let one = vmm.start(&specs[0]).await.unwrap();
    let other = vmm.start(&specs[1]).await.unwrap();
    let range = IdRange::default();
    for (vm, spec) in [&one, &other].into_iter().zip(&specs) {
        let uid: u32 = field(vm, "Uid:").split_whitespace().next().unwrap().parse().unwrap();
        assert!((range.first..range.first + range.count).contains(&uid), "{uid}");
        assert_eq!(field(vm, "Uid:"), vec![uid.to_string(); 4].join("\t"));
        assert_eq!((field(vm, "Gid:"), field(vm, "Groups:")), (field(vm, "Uid:"), String::new()));
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
            assert_eq!(field(vm, set), "0000000000000000", "{set}");
        }
        assert_eq!((field(vm, "NoNewPrivs:"), field(vm, "Seccomp:")), ("1".to_owned(), "2".to_owned()));
        for name in ["mnt", "pid", "net", "ipc", "uts", "cgroup"] {
            let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap();
            assert_ne!(of(&vm.pid().to_string()), of("self"), "{name}");
        }
        assert_eq!(fs::read(format!("/proc/{}/environ", vm.pid())).unwrap(), b"");
        // What it can name is its program with its libraries and firmware, its kernel and init: nothing of its own
        // folder, nothing of the other's, no image, no device.
        let files = files_of(vm);
        assert!(files.contains(&spec.kernel.display().to_string()), "{files:?}");
        let own = folder.path().display().to_string();
        assert!(!files.iter().any(|file| file.starts_with(&own) || file.starts_with("/dev")), "{files:?}");
        let mounts = fs::read_to_string(format!("/proc/{}/mounts", vm.pid())).unwrap();
        let writable = |line: &&str| !line.split_whitespace().nth(3).unwrap().split(',').any(|o| o == "ro");
        assert_eq!(mounts.lines().filter(writable).count(), 0, "{mounts}");
        let links = fs::read_to_string(format!("/proc/{}/net/dev", vm.pid())).unwrap();
        assert_eq!(links.lines().skip(2).count(), 1, "only its own loopback, which is down: {links}");
    }
    assert_ne!(field(&one, "Uid:"), field(&other, "Uid:"));
    let channel = GuestChannel::connect(&one.channel(), 0, PATIENCE).await;
    assert!(channel.is_ok(), "it boots all the same: {}", one.console_said());
    // What is mounted in a jail is mounted nowhere else, and a folder can be removed as soon as its machine is gone.
    for vm in [one, other] {
        vm.kill().await.unwrap();
        fs::remove_dir_all(vm.folder()).unwrap();
    }
    let ours = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!ours.contains(&folder.path().display().to_string()), "{ours}");
}

#[tokio::test]
async fn a_jail_that_cannot_be_built_is_a_failed_start_and_leaves_no_process() {
    let folder = tempfile::Builder::new().prefix("hf-jail-").tempdir().unwrap();
    let vmm = qemu(jails(folder.path()));
    // The root image is not there.
    let error = vmm.start(&spec(folder.path(), "inst_a")).await.unwrap_err();
    assert!(matches!(error, VmmError::Launch(_)) && error.to_string().contains("root.img"), "{error}");
    let config = JailConfig { launcher: "/absent".into(), ..jail_config() };
    let vmm = qemu(Arc::new(Jails::new(folder.path(), config, unheard())));
    let error = vmm.start(&spec(folder.path(), "inst_a")).await.unwrap_err();
    assert!(matches!(error, VmmError::Launch(_)) && error.to_string().contains("/absent"), "{error}");
    let found = Vm::adopt(&folder.path().join("vms/inst_a")).unwrap();
    assert!(matches!(found, holdfast_node::vmm::Adoption::Gone), "{found:?}");
}

/// `cargo test -p holdfast-node --test vm_jail -- --ignored --nocapture`, on a machine that does nothing else.
#[tokio::test]
#[ignore = "measures"]
async fn what_the_jail_costs_a_start() {
    let folder = tempfile::Builder::new().prefix("hf-jail-").tempdir().unwrap();
    root_image(folder.path(), FileSystem::Erofs);
    let kinds = [true, false].map(|walls| {
        let config = JailConfig { walls, ..jail_config() };
        qemu(Arc::new(Jails::new(folder.path(), config, unheard())))
    });
    let mut times = [const { (Vec::new(), Vec::new()) }; 2];
    for round in 0..=ROUNDS {
        for (vmm, (runs, hello)) in kinds.iter().zip(&mut times) {
            let spec = spec(folder.path(), "inst_m");
            let began = Instant::now();
            let vm = vmm.start(&spec).await.unwrap();
            let ran = began.elapsed();
            GuestChannel::connect(&vm.channel(), 0, PATIENCE).await.unwrap();
            // The first of each kind finds out what the program needs.
            if round > 0 {
                runs.push(ran);
                hello.push(began.elapsed());
            }
            vm.kill().await.unwrap();
            fs::remove_dir_all(vm.folder()).unwrap();
        }
    }
    for (name, (runs, hello)) in ["jailed", "not jailed"].iter().zip(&mut times) {
        runs.sort_unstable();
        hello.sort_unstable();
        println!(
            "{name}: start to a VMM that runs {:?} median, {:?} most; to the guest's hello {:?} median, {:?} most",
            runs[ROUNDS / 2],
            runs[ROUNDS - 1],
            hello[ROUNDS / 2],
            hello[ROUNDS - 1]
        );
    }
}
