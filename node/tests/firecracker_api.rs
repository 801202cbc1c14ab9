//! The real Firecracker accepts every request of ours, `InstanceStart` included; in our jail, and in its own jailer's.
//!
//! Not run by default: Firecracker is in no package registry. Where it is installed, with its `jailer` beside it:
//! `HOLDFAST_FIRECRACKER=/path/to/firecracker cargo xtask test`, or `cargo test -p holdfast-node --test firecracker_api
//! -- --ignored`, as root, on a host whose `/dev/kvm` opens. Whether the guest then boots is the probe's business: on a host
//! whose KVM only pretends to work it does not, and this test has nothing to say about it. Where it does, the whole suite
//! runs on it with `HOLDFAST_SUITE_VMM=firecracker`.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod guest_image;

use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use guest_image::{FileSystem, assets, jails, root_image};
use holdfast_node::vmm::{
    Adoption, Nic, Vm, VmSpec, Vmm, VmmError, VmmKind,
    firecracker::{self, Firecracker},
    probe::{self, Outcome, ProbeConfig},
};

fn back_end(folder: &tempfile::TempDir) -> Firecracker {
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
    let vm = back_end(&folder).start(&spec).await.unwrap();
    println!("started as process {}", vm.pid());
    let Adoption::Running(adopted) = Vm::adopt(vm.folder()).unwrap() else { panic!("it must be found") };
    assert_eq!((adopted.pid(), adopted.kind()), (vm.pid(), VmmKind::Firecracker));
    std::fs::remove_file(vm.folder().join("vm.json")).unwrap();
    let refused = back_end(&folder).start(&spec).await.unwrap_err();
    assert!(matches!(refused, VmmError::AlreadyRunning { pid, .. } if pid == vm.pid()), "{refused}");
    adopted.kill().await.unwrap();
    assert!(!vm.is_alive());
}

#[tokio::test]
#[ignore = "needs the firecracker program and /dev/kvm"]
async fn firecracker_says_why_it_refuses_a_request() {
    let folder = tempfile::Builder::new().prefix("hf-fc-").tempdir().unwrap();
    // One that is not there would be missed by the jail. This one is there, and not for the jail's user.
    let kernel = folder.path().join("unreadable");
    std::fs::write(&kernel, "a kernel").unwrap();
    std::fs::set_permissions(&kernel, std::fs::Permissions::from_mode(0o600)).unwrap();
    let no_kernel = VmSpec { kernel, nic: None, ..spec(&folder) };
    let error = back_end(&folder).start(&no_kernel).await.unwrap_err();
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

/// Firecracker's own jailer, which is started as root, as the alternative to our launcher. It knows neither Landlock nor a
/// network of its own, and nobody has recorded the process before it runs: so it is exercised here, and not used (ADR 14).
#[tokio::test(flavor = "current_thread")]
#[ignore = "needs the firecracker and jailer programs, both static, /dev/kvm and root"]
async fn the_jailers_firecracker_accepts_every_request() {
    // SAFETY: a plain system call; only this thread's network changes, and no other thread relies on it.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "{}", std::io::Error::last_os_error());
    const USER: u32 = 1_900_000_321;
    let user = USER.to_string();
    let tap = Command::new("ip")
        .args(["tuntap", "add", "hf0", "mode", "tap", "user", &user, "group", &user])
        .status();
    assert!(tap.unwrap().success());

    let folder = tempfile::Builder::new().prefix("hf-fc-").tempdir().unwrap();
    let outside = spec(&folder);
    let program = probe::find_firecracker().expect("set HOLDFAST_FIRECRACKER to the program");
    let jailer = program.with_file_name("jailer");
    assert!(jailer.is_file(), "{} must be there", jailer.display());
    let root = folder.path().join("jail").join(program.file_name().unwrap()).join("inst-fc/root");
    // The jailer fills its folder with the program and devices; what the guest boots from is ours to put there.
    let made = root.join("vmm");
    std::fs::create_dir_all(&made).unwrap();
    std::os::unix::fs::chown(&made, Some(USER), Some(USER)).unwrap();
    let image = outside.root_image.clone().unwrap();
    for (name, file) in [("kernel", &outside.kernel), ("initrd", &outside.initrd), ("root.img", &image)] {
        std::fs::copy(file, root.join(name)).unwrap();
    }
    let said = std::fs::File::create(folder.path().join("said")).unwrap();
    let mut child = Command::new(&jailer)
        .args(["--id", "inst-fc", "--uid", &user, "--gid", &user, "--cgroup-version", "2"])
        .args(["--resource-limit", "fsize=1048576", "--resource-limit", "no-file=1024"])
        .arg("--exec-file")
        .arg(&program)
        .arg("--chroot-base-dir")
        .arg(folder.path().join("jail"))
        .args(["--", "--api-sock", "/vmm/api.sock"])
        .stdin(std::process::Stdio::null())
        .stdout(said.try_clone().unwrap())
        .stderr(said)
        .spawn()
        .unwrap();
    let api = made.join("api.sock");
    let said = || std::fs::read_to_string(folder.path().join("said")).unwrap();
    while !api.exists() {
        assert!(child.try_wait().unwrap().is_none(), "it has ended: {}", said());
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let inside = VmSpec {
        folder: "/".into(),
        kernel: "/kernel".into(),
        initrd: "/initrd".into(),
        root_image: Some("/root.img".into()),
        ..outside
    };
    let asked = firecracker::ask(&api, &inside).await;
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", child.id())).unwrap_or_default();
    child.kill().unwrap();
    child.wait().unwrap();
    asked.unwrap_or_else(|error| panic!("{error}; it said: {}", said()));
    let line = |name: &str| status.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned();
    assert!(line("Uid:").split_whitespace().skip(1).all(|uid| uid == user), "{status}");
    let files = limits.lines().find(|line| line.starts_with("Max file size")).unwrap_or_default();
    assert!(files.contains("1048576"), "{limits}");
    println!("in its jailer: {}, {}, {}, {files}", line("Uid:"), line("CapEff:"), line("NoNewPrivs:"));
}
