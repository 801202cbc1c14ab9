//! The real Firecracker accepts every request of ours, `InstanceStart` included.
//!
//! Not run by default: Firecracker is in no package registry. Where it is installed:
//! `HOLDFAST_FIRECRACKER=/path/to/firecracker cargo test -p holdfast-node --test firecracker_api -- --ignored`,
//! as root, on a host whose `/dev/kvm` opens. Whether the guest then boots is the probe's business: on a host whose
//! KVM only pretends to work it does not, and this test has nothing to say about it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod guest_image;

use std::process::Command;

use guest_image::{FileSystem, assets, jails, root_image};
use holdfast_node::vmm::{
    Adoption, Nic, Vm, VmSpec, Vmm, VmmError, VmmKind,
    firecracker::Firecracker,
    probe::{self, Outcome, ProbeConfig},
};

fn firecracker(folder: &tempfile::TempDir) -> Firecracker {
    let program = probe::find_firecracker().expect("set HOLDFAST_FIRECRACKER to the program");
    Firecracker { program, jails: jails(folder.path()) }
}

fn spec(folder: &tempfile::TempDir) -> VmSpec {
    let assets = assets();
    VmSpec {
        instance_id: "inst_fc".to_owned(),
        folder: folder.path().join("inst_fc"),
        kernel: assets.kernel,
        initrd: assets.initrd,
        root_image: Some(root_image(folder.path(), FileSystem::Erofs)),
        memory_mib: 128,
        vcpus: 2,
        cpu_milli: 1_000,
        nic: Some(Nic { tap: "hf0".to_owned(), mac: [2, 0x48, 0, 0, 0, 1] }),
        volumes: Vec::new(),
    }
}

/// One thread, so that everything started here, the VMM too, is in the namespace of this thread.
#[tokio::test(flavor = "current_thread")]
#[ignore = "needs the firecracker program, /dev/kvm and root"]
async fn firecracker_accepts_every_request_and_is_adopted() {
    // SAFETY: a plain system call; only this thread's network changes, and no other thread relies on it.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "{}", std::io::Error::last_os_error());
    let tap = Command::new("ip").args(["tuntap", "add", "hf0", "mode", "tap"]).status().unwrap();
    assert!(tap.success());

    let folder = tempfile::Builder::new().prefix("hf-fc-").tempdir().unwrap();
    let spec = spec(&folder);
    let vm = firecracker(&folder).start(&spec).await.unwrap();
    println!("started as process {}", vm.pid());
    let Adoption::Running(adopted) = Vm::adopt(vm.folder()).unwrap() else { panic!("it must be found") };
    assert_eq!((adopted.pid(), adopted.kind()), (vm.pid(), VmmKind::Firecracker));
    std::fs::remove_file(vm.folder().join("vm.json")).unwrap();
    let refused = firecracker(&folder).start(&spec).await.unwrap_err();
    assert!(matches!(refused, VmmError::AlreadyRunning { pid, .. } if pid == vm.pid()), "{refused}");
    adopted.kill().await.unwrap();
    assert!(!vm.is_alive());
}

#[tokio::test]
#[ignore = "needs the firecracker program and /dev/kvm"]
async fn firecracker_says_why_it_refuses_a_request() {
    let folder = tempfile::Builder::new().prefix("hf-fc-").tempdir().unwrap();
    let no_kernel = VmSpec { kernel: folder.path().join("absent"), nic: None, ..spec(&folder) };
    let error = firecracker(&folder).start(&no_kernel).await.unwrap_err();
    let VmmError::Refused { request, answer, .. } = &error else { panic!("{error}") };
    assert_eq!(request, "PUT /boot-source");
    assert!(answer.starts_with("400 Bad Request"), "{answer}");
    println!("{error}");
    assert!(matches!(Vm::adopt(&no_kernel.folder).unwrap(), Adoption::Gone), "it must not be left behind");
}

#[tokio::test]
#[ignore = "needs the firecracker program and /dev/kvm"]
async fn the_probe_judges_firecracker_within_its_deadline() {
    let folder = tempfile::Builder::new().prefix("hf-fc-").tempdir().unwrap();
    let assets = assets();
    let config = ProbeConfig {
        kernel: assets.kernel,
        initrd: assets.initrd,
        folder: folder.path().to_owned(),
        firecracker: probe::find_firecracker(),
        qemu: probe::find_qemu(),
        jails: jails(folder.path()),
    };
    let (_, verdict) = probe::choose(&config).await.unwrap();
    println!("{verdict}");
    let first = &verdict.findings[0];
    assert_eq!(first.kind, VmmKind::Firecracker);
    assert!(!matches!(first.outcome, Outcome::NotTried { .. }), "{verdict}");
    assert!(!folder.path().join("probe").exists(), "a probe leaves no machine behind");
}
