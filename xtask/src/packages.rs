//! The Debian packages that building, testing and the demo need. Installed when missing, and only then.

use crate::step::{Failure, run, step};
use std::process::{Command, Stdio};

/// Package, and what it is for.
const PACKAGES: &[(&str, &str)] = &[
    ("qemu-system-x86", "runs microVMs where Firecracker or KVM cannot"),
    ("docker-registry", "serves the demo's images on loopback"),
    ("erofs-utils", "makes and checks root disks"),
    ("linux-source-6.1", "the guest kernel's source"),
    ("bc", "the kernel's build"),
    ("bison", "the kernel's build"),
    ("flex", "the kernel's build"),
    ("libelf-dev", "the kernel's build"),
    ("make", "the kernel's build"),
    ("xz-utils", "the kernel's source is packed with it"),
    ("gcc", "the kernel, and crates with C in them"),
    ("g++", "libFuzzer"),
    ("libc6-dev", "static programs for the guest"),
    ("e2fsprogs", "volumes' file systems, and root disks of the node's tests"),
    ("xfsprogs", "a file system that clones files, for the tests of snapshots"),
    ("busybox-static", "the programs of guests in tests"),
    ("prometheus", "its promtool checks the metrics in tests"),
    ("curl", "the demo's client, and a client of the edge in tests"),
    ("openssl", "a TLS client of the edge in tests"),
    ("gnutls-bin", "another"),
    ("haproxy", "speaks PROXY v2 with the edge in tests, and is what it is measured against"),
    ("nginx", "the same"),
    ("libnginx-mod-stream", "nginx for TCP"),
    ("iproute2", "network namespaces by hand, TAPs and their queues"),
    ("nftables", "what guests may send"),
    ("binutils", "test programs without what is for debuggers"),
    ("ca-certificates", "fetching crates"),
];

/// Installs what is missing.
pub(crate) fn ensure() -> Result<(), Failure> {
    let missing: Vec<&str> = PACKAGES.iter().map(|(name, _)| *name).filter(|p| !installed(p)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    step(&format!("install {}", missing.join(" ")), || {
        if run(&mut apt(&["install", "-y", "-qq", "--no-install-recommends"], &missing)).is_ok() {
            return Ok(());
        }
        // Package lists are absent or old: fetch them, once.
        run(&mut apt(&["update", "-qq"], &[]))?;
        run(&mut apt(&["install", "-y", "-qq", "--no-install-recommends"], &missing))
    })
}

fn installed(package: &str) -> bool {
    let query = Command::new("dpkg-query")
        .args(["-W", "-f=${db:Status-Status}", package])
        .stderr(Stdio::null())
        .output();
    query.is_ok_and(|o| o.status.success() && o.stdout == b"installed")
}

fn apt(arguments: &[&str], packages: &[&str]) -> Command {
    let root = std::fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0);
    let mut command = if root {
        Command::new("apt-get")
    } else {
        let mut sudo = Command::new("sudo");
        sudo.args(["--preserve-env=DEBIAN_FRONTEND", "apt-get"]);
        sudo
    };
    command.env("DEBIAN_FRONTEND", "noninteractive").args(arguments).args(packages);
    command
}
