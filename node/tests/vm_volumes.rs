//! Volumes in real guests on QEMU: what is written outlives the machine, and no two machines have one disk.
//!
//! Needs root, what `cargo xtask assets` makes and installs, and loop devices. Deadlines are guards against hanging.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "shared with other tests")]
mod guest_image;

use std::path::{Path, PathBuf};
use std::time::Duration;

use guest_image::{FileSystem, assets, jails, root_image};
use holdfast_model::VolumeId;
use holdfast_model::volume::NodeVolume;
use holdfast_node::vmm::channel::{ExitStatus, GuestChannel, GuestConfig, GuestEvent, VolumeMount, Workload};
use holdfast_node::vmm::{Adoption, Vm, VmSpec, Vmm, probe, qemu::Qemu};
use holdfast_node::volumes::{Attached, Owner, VolumeError, Volumes};

/// Nothing here waits longer for anything.
const PATIENCE: Duration = Duration::from_secs(60);
/// The workload's user.
const WEB: Owner = Owner { uid: 33, gid: 33 };

/// A node's folder, with a root for guests; takes the machine along when a test ends, however it ends.
struct Scene {
    folder: tempfile::TempDir,
    image: PathBuf,
    volumes: Volumes,
}

impl Scene {
    fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("hf-vm-").tempdir().unwrap();
        let image = root_image(folder.path(), FileSystem::Erofs);
        let volumes = Volumes::open(&folder.path().join("volumes")).unwrap();
        Self { folder, image, volumes }
    }

    fn machine(&self) -> PathBuf {
        self.folder.path().join("inst_test")
    }

    /// Starts a machine with these disks; whoever attached them lets go.
    async fn start(&self, attached: Vec<Attached>) -> Vm {
        let program =
            probe::find_qemu().expect("qemu-system-x86_64 must be installed: run `cargo xtask assets`");
        let qemu = Qemu { program, kvm: false, jails: jails(self.folder.path()) };
        let spec = VmSpec {
            instance_id: "inst_test".to_owned(),
            folder: self.machine(),
            kernel: assets().kernel,
            initrd: assets().initrd,
            root_image: Some(self.image.clone()),
            memory_mib: 128,
            vcpus: 1,
            cpu_milli: 1_000,
            nic: None,
            volumes: attached.iter().map(Attached::device).collect(),
        };
        qemu.start(&spec).await.unwrap()
    }

    /// Boots a guest with these disks at these places and lets it run a script to its end; answers with its lines.
    async fn run(&self, attached: Vec<Attached>, mounts: &[(&str, bool)], script: &str) -> Vec<String> {
        let vm = self.start(attached).await;
        let (lines, status) = converse(&vm, mounts, script, None).await;
        assert_eq!(status, Some(ExitStatus::Code(0)), "{lines:?}");
        tokio::time::timeout(PATIENCE, vm.ended()).await.expect("the guest did not leave").unwrap();
        lines
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if let Ok(Adoption::Running(vm)) = Vm::adopt(&self.machine()) {
            kill(&vm);
        }
    }
}

fn kill(vm: &Vm) {
    let pid = rustix::process::Pid::from_raw(vm.pid().cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok();
}

/// Configures a guest and listens until its workload ends, or until it has said `until`.
async fn converse(
    vm: &Vm,
    mounts: &[(&str, bool)],
    script: &str,
    until: Option<&str>,
) -> (Vec<String>, Option<ExitStatus>) {
    let GuestChannel { sender, mut receiver, .. } =
        match GuestChannel::connect(&vm.channel(), 0, PATIENCE).await {
            Ok(channel) => channel,
            Err(error) => panic!("{error}; console: {}", vm.console_said()),
        };
    let mount =
        |(path, read_only): &(&str, bool)| VolumeMount { path: (*path).to_owned(), read_only: *read_only };
    let config = GuestConfig {
        instance_id: "inst_test".to_owned(),
        hostname: "guest".to_owned(),
        now_unix_ms: 1_900_000_000_000,
        network: None,
        root_disk: true,
        workload: Workload {
            argv: ["sh", "-c", script].map(str::to_owned).to_vec(),
            env: vec![("PATH".to_owned(), "/bin".to_owned())],
            workdir: String::new(),
            user: format!("{}:{}", WEB.uid, WEB.gid),
        },
        secrets: None,
        volumes: mounts.iter().map(mount).collect(),
    };
    sender.configure(&config).await.unwrap();
    let mut lines = Vec::new();
    loop {
        match tokio::time::timeout(PATIENCE, receiver.recv()).await.expect("the guest fell silent").unwrap() {
            GuestEvent::Log(line) => {
                let line = String::from_utf8(line.bytes).unwrap();
                let last = until.is_some_and(|until| line == until);
                lines.push(line);
                if last {
                    return (lines, None);
                }
            }
            GuestEvent::Exited(status) => {
                sender.dismiss().await.unwrap();
                return (lines, Some(status));
            }
            GuestEvent::Failed { reason } => {
                lines.push(reason);
                return (lines, None);
            }
            _ => {}
        }
    }
}

fn volume(n: u128, generation: u64) -> NodeVolume {
    let id = VolumeId::from_bits(n);
    NodeVolume {
        id,
        generation,
        size_mib: 16 * n as u64,
        fresh: generation == 1,
        path: String::new(),
        read_only: false,
    }
}

async fn attach(volumes: &Volumes, n: u128, generation: u64) -> Attached {
    volumes.attach(&volume(n, generation), WEB).await.unwrap()
}

#[tokio::test]
async fn what_a_guest_wrote_is_there_for_the_next_one_at_its_place_in_the_order() {
    let scene = Scene::new();
    let (one, two) = (attach(&scene.volumes, 1, 1).await, attach(&scene.volumes, 2, 1).await);
    let script = "cat /sys/class/block/vdb/size /sys/class/block/vdc/size; cat /proc/mounts | head -99; \
                  stat -c '%u:%g %a' /data /deep/er; echo first > /data/it && echo second > /deep/er/it; echo done";
    let lines = scene.run(vec![one, two], &[("/data", false), ("/deep/er", false)], script).await;
    assert_eq!(lines[..2], ["32768", "65536"], "16 and 32 MiB: disks are in the order of the volumes");
    for (device, path) in [("vdb", "/data"), ("vdc", "/deep/er")] {
        let begin = format!("/dev/{device} {path} ext4 rw,nosuid,nodev");
        assert!(lines.iter().any(|line| line.starts_with(&begin)), "{lines:?}");
    }
    assert_eq!(
        lines.iter().filter(|line| *line == "33:33 755").count(),
        2,
        "they are the workload's: {lines:?}"
    );
    assert_eq!(lines.last().unwrap(), "done");

    let (one, two) = (attach(&scene.volumes, 1, 2).await, attach(&scene.volumes, 2, 2).await);
    let script = "cat /data/it /deep/er/it; touch /data/it 2>/dev/null || echo refused; touch /deep/er/more";
    let lines = scene.run(vec![one, two], &[("/data", true), ("/deep/er", false)], script).await;
    assert_eq!(lines, ["first", "second", "refused"]);
}

#[tokio::test]
async fn i11_two_machines_never_have_one_disk_and_a_killed_one_leaves_no_lock() {
    let scene = Scene::new();
    let attached = attach(&scene.volumes, 1, 1).await;
    let device = attached.device();
    let vm = scene.start(vec![attached]).await;
    // The agent has let go by now; the machine has it.
    let script = "echo kept > /data/it; sync; echo synced; while sleep 1; do echo more >> /data/it; done";
    let (lines, _) = converse(&vm, &[("/data", false)], script, Some("synced")).await;
    assert_eq!(lines, ["synced"]);
    for generation in [1, 2] {
        let error = scene.volumes.attach(&volume(1, generation), WEB).await.unwrap_err();
        assert!(matches!(error, VolumeError::InUse { .. }), "{error}");
    }
    assert!(bound(device.number), "its disk is a device while it runs");
    kill(&vm);
    tokio::time::timeout(PATIENCE, vm.ended()).await.expect("it was killed").unwrap();
    let attached = attach(&scene.volumes, 1, 2).await;
    let lines = scene.run(vec![attached], &[("/data", false)], "head -n 1 /data/it").await;
    assert_eq!(lines, ["kept"], "what was flushed is there, by the journal");
    // And whoever is late is refused, whatever it believes.
    let error = scene.volumes.attach(&volume(1, 1), WEB).await.unwrap_err();
    assert!(matches!(error, VolumeError::Fenced { asked: 1, seen: 2, .. }), "{error}");
    let folder = scene.folder.path().join("volumes");
    let leaked: Vec<_> = (0..64).filter(|number| is_of(*number, &folder)).collect();
    assert_eq!(leaked, [0; 0], "no device is left");
}

/// Whether a loop device has a file.
fn bound(number: u32) -> bool {
    Path::new(&format!("/sys/block/loop{number}/loop/backing_file")).exists()
}

fn is_of(number: u32, folder: &Path) -> bool {
    let file = std::fs::read_to_string(format!("/sys/block/loop{number}/loop/backing_file"));
    file.is_ok_and(|file| Path::new(file.trim_end()).starts_with(folder))
}

#[tokio::test]
async fn a_place_that_the_guest_needs_itself_is_refused() {
    let scene = Scene::new();
    for place in ["/run/here", "/proc", "/tmp"] {
        let attached = attach(&scene.volumes, 1, 1).await;
        let vm = scene.start(vec![attached]).await;
        let (lines, status) = converse(&vm, &[(place, false)], "echo ran", None).await;
        assert_eq!(status, None, "{place}: {lines:?}");
        assert!(lines[0].contains("which the guest needs itself"), "{place}: {lines:?}");
        kill(&vm);
        tokio::time::timeout(PATIENCE, vm.ended()).await.expect("it was killed").unwrap();
    }
}
