//! A tiny root file system for guests: Debian's static busybox, and an account to run as.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use holdfast_jail::cgroup::{Choice, Hierarchy};
use holdfast_node::step::unheard;
use holdfast_node::vmm::firecracker::Firecracker;
use holdfast_node::vmm::jail::{JailConfig, Jails};
use holdfast_node::vmm::qemu::Qemu;
use holdfast_node::vmm::{Vmm, probe};

/// Every program of busybox that a test uses.
const APPLETS: [&str; 23] = [
    "sh", "cat", "date", "echo", "head", "hostname", "httpd", "id", "ip", "mkdir", "nc", "nproc", "ping",
    "pwd", "seq", "sleep", "stat", "stty", "sync", "timeout", "touch", "tr", "tty",
];

/// What a guest boots from.
pub(crate) struct Assets {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: PathBuf,
}

/// Finds what `cargo xtask assets` made.
pub(crate) fn assets() -> Assets {
    let folder = std::env::var_os("HOLDFAST_ASSETS")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/assets"), PathBuf::from);
    let found = |name: &str| {
        let path = folder.join(name);
        assert!(path.is_file(), "'{}' is missing: run `cargo xtask assets` first.", path.display());
        path.canonicalize().unwrap()
    };
    Assets { kernel: found("vmlinux"), initrd: found("initramfs.cpio") }
}

/// Jails for the machines of a data folder, as around the machines of a node. Every wall that this host has is up; that
/// this one's cgroups may be of the old kind is its operator's affair, and he has said so.
pub(crate) fn jail_config() -> JailConfig {
    let cgroups = if Hierarchy::find().is_ok() { Choice::Required } else { Choice::Without };
    JailConfig {
        walls: true,
        cgroups,
        launcher: env!("CARGO_BIN_EXE_test-launcher").into(),
        ..JailConfig::default()
    }
}

/// The same, ready to be used.
#[allow(dead_code, reason = "not every test starts machines by itself")]
pub(crate) fn jails(data_dir: &Path) -> Arc<Jails> {
    Arc::new(Jails::new(data_dir, jail_config(), unheard()))
}

/// The VMM that guests of the conformance suite run on: QEMU that translates, which every host has; or, where guests boot
/// on it, what `HOLDFAST_SUITE_VMM` names.
#[allow(dead_code, reason = "not every test starts machines by itself")]
pub(crate) fn vmm(jails: Arc<Jails>) -> Box<dyn Vmm> {
    let named = std::env::var("HOLDFAST_SUITE_VMM");
    let qemu = |kvm, jails| {
        let program =
            probe::find_qemu().expect("qemu-system-x86_64 must be installed: run `cargo xtask assets`");
        Box::new(Qemu { program, kvm, jails })
    };
    match named.as_deref().unwrap_or("qemu-tcg") {
        "qemu-tcg" => qemu(false, jails),
        "qemu-kvm" => qemu(true, jails),
        "firecracker" => {
            let program = probe::find_firecracker().expect("HOLDFAST_FIRECRACKER must name the program");
            Box::new(Firecracker { program, jails })
        }
        other => panic!("HOLDFAST_SUITE_VMM is qemu-tcg, qemu-kvm or firecracker, not {other}"),
    }
}

/// What a root image may be.
#[allow(dead_code, reason = "not every test uses both")]
#[derive(Clone, Copy)]
pub(crate) enum FileSystem {
    Ext4,
    Erofs,
}

/// Makes a root image in `folder`.
pub(crate) fn root_image(folder: &Path, file_system: FileSystem) -> PathBuf {
    let root = folder.join("root");
    for name in ["bin", "etc"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    let busybox = Path::new("/bin/busybox");
    assert!(busybox.is_file(), "'/bin/busybox' is missing: run `cargo xtask assets` first.");
    fs::copy(busybox, root.join("bin/busybox")).unwrap();
    for applet in APPLETS {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0::/:/bin/sh\nweb:x:33:33::/:/bin/sh\n").unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\nweb:x:33:\nstaff:x:50:\n").unwrap();
    let image = folder.join("root.img");
    match file_system {
        FileSystem::Ext4 => {
            run(Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(&root).arg(&image).arg("16M"))
        }
        FileSystem::Erofs => run(Command::new("mkfs.erofs").arg("--all-root").arg(&image).arg(&root)),
    }
    image
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| {
        panic!("{:?} could not be started ({error}): run `cargo xtask assets` first.", command.get_program())
    });
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
