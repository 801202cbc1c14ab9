//! QEMU's `microvm` machine: the back-end that works on every host.
//!
//! No device that the guest does not need, no configuration that this file does not name, QEMU's own seccomp
//! sandbox, and guest memory exactly as asked. Its sockets, its console, the root image and the TAP are descriptors that
//! it is given, so its jail holds no file that it could write, and no network.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use holdfast_jail::plan::{Descriptor, Device, FIRST_DESCRIPTOR, Profile};

use super::{
    BoxFuture, DISK_BYTES_PER_SECOND_MAX, DISK_OPERATIONS_PER_SECOND_MAX, Vm, VmSpec, Vmm, VmmError, VmmKind,
    channel::ChannelAddress,
    host_clock,
    jail::{Jails, Needs},
    process, qmp,
};

/// How long QEMU may take until its control socket answers.
const START_DEADLINE: Duration = Duration::from_secs(30);

/// Time between two looks whether QEMU's control socket is there.
const START_POLL: Duration = Duration::from_millis(20);

/// Translated code that QEMU keeps, in MiB. It counts towards the overhead that the scheduler allows for.
const TRANSLATION_MIB: u32 = 32;

const CHANNEL_SOCKET: &str = "channel.sock";
const QMP_SOCKET: &str = "qmp.sock";

/// What the guest kernel is told. It leaves by a triple fault, which `-no-reboot` turns into QEMU's exit: a
/// `microvm` has no other way to switch itself off.
const KERNEL_COMMAND_LINE: &str = "console=ttyS0 loglevel=4 panic=-1 reboot=t tsc=reliable no_timer_check \
                                   8250.nr_uarts=1 random.trust_cpu=on";

/// Added where instructions are translated: such a guest speculates about nothing, and each guard costs dearly.
const TRANSLATED_COMMAND_LINE: &str = " mitigations=off";

/// The firmware that a `microvm` loads, as far as a release of QEMU has it.
const FIRMWARE: [&str; 5] = ["qboot.rom", "bios-microvm.bin", "pvh.bin", "linuxboot_dma.bin", "kvmvapic.bin"];

/// Where it may be: beside the program, or where distributions put it.
const FIRMWARE_FOLDERS: [&str; 4] =
    ["../share/qemu", "../share/qemu-kvm", "../share/seabios", "../share/qemu-firmware"];

/// Code that some distributions keep apart from the program.
const MODULES: [&str; 1] = ["accel-tcg-x86_64.so"];

/// Where it may be.
const MODULE_FOLDERS: [&str; 4] =
    ["../lib/x86_64-linux-gnu/qemu", "../lib64/qemu", "../lib64/qemu-kvm", "../lib/qemu"];

/// QEMU, with or without KVM.
#[derive(Debug, Clone)]
pub struct Qemu {
    /// The program, `qemu-system-x86_64`.
    pub program: PathBuf,
    /// Whether guests run on `/dev/kvm`; only set where the probe booted on it.
    pub kvm: bool,
    /// What its processes run in.
    pub jails: Arc<Jails>,
}

/// The numbers of the descriptors that a QEMU is given.
struct Numbers {
    channel: i32,
    control: i32,
    console: i32,
    root: Option<i32>,
    tap: Option<i32>,
    volumes: Vec<i32>,
}

impl Vmm for Qemu {
    fn kind(&self) -> VmmKind {
        if self.kvm { VmmKind::QemuKvm } else { VmmKind::QemuTcg }
    }

    fn start<'a>(&'a self, spec: &'a VmSpec) -> BoxFuture<'a, Result<Vm, VmmError>> {
        Box::pin(self.start_machine(spec))
    }
}

impl Qemu {
    async fn start_machine(&self, spec: &VmSpec) -> Result<Vm, VmmError> {
        spec.check()?;
        let vm = self.jails.start(spec, self.needs(spec).await).await?;
        let started_at = Instant::now();
        loop {
            if !vm.is_alive() {
                return Err(VmmError::EndedAtOnce {
                    kind: self.kind(),
                    instance_id: spec.instance_id.clone(),
                    said: process::said(spec.folder.join(process::STDERR_FILE)),
                });
            }
            match qmp::query_status(&qmp_path(&spec.folder)).await {
                Ok(status) if is_running(&status) => return Ok(vm),
                Ok(_) | Err(_) if started_at.elapsed() < START_DEADLINE => {
                    tokio::time::sleep(START_POLL).await;
                }
                Ok(_) | Err(_) => {
                    vm.kill().await?;
                    return Err(VmmError::ControlDeadline {
                        path: qmp_path(&spec.folder),
                        expected: "report a running guest",
                        seconds: START_DEADLINE.as_secs(),
                    });
                }
            }
        }
    }

    /// What QEMU is given: as descriptors what changes, as files what it reads.
    async fn needs(&self, spec: &VmSpec) -> Needs {
        let at = |name: &str| spec.folder.join(name);
        let mut descriptors = Vec::with_capacity(5);
        let mut number = |descriptor: Descriptor| {
            descriptors.push(descriptor);
            FIRST_DESCRIPTOR + i32::try_from(descriptors.len()).unwrap_or(i32::MAX) - 1
        };
        let numbers = Numbers {
            channel: number(Descriptor::Listen(at(CHANNEL_SOCKET))),
            control: number(Descriptor::Listen(at(QMP_SOCKET))),
            console: number(Descriptor::Append(at(process::CONSOLE_FILE))),
            root: spec.root_image.clone().map(|image| number(Descriptor::Read(image))),
            tap: spec.nic.as_ref().map(|nic| number(Descriptor::Tap(nic.tap.clone()))),
            volumes: spec.volumes.iter().map(|volume| number(Descriptor::Block(volume.path()))).collect(),
        };
        let mut files = vec![spec.kernel.clone(), spec.initrd.clone()];
        files.extend(found(&self.program, &FIRMWARE_FOLDERS, &FIRMWARE));
        Needs {
            kind: self.kind(),
            program: self.program.clone(),
            arguments: self.arguments(spec, &numbers).await,
            descriptors,
            modules: found(&self.program, &MODULE_FOLDERS, &MODULES),
            files,
            devices: if self.kvm { vec![Device::Kvm] } else { Vec::new() },
            makes_sockets: false,
            tap: None,
            profile: Profile::Qemu,
            stale: Vec::new(),
        }
    }

    /// What the guest kernel is told. QEMU adds where the guest's devices are.
    async fn command_line(&self) -> String {
        let mut line = KERNEL_COMMAND_LINE.to_owned();
        if !self.kvm {
            line.push_str(TRANSLATED_COMMAND_LINE);
            if let Some(khz) = host_clock::counter_khz().await {
                line.push_str(&format!(" tsc_early_khz={khz}"));
            }
        }
        line
    }

    /// QEMU's whole command line.
    async fn arguments(&self, spec: &VmSpec, numbers: &Numbers) -> Vec<String> {
        let command_line = self.command_line().await;
        let listens = |id: &str, number: i32| format!("socket,id={id},fd={number},server=on,wait=off");
        // Where QEMU wants a path to a file, a set with a descriptor in it has one.
        let set = |number: i32| format!("/dev/fdset/{number}");
        let (accelerator, processor) = if self.kvm {
            ("kvm".to_owned(), "host")
        } else {
            (format!("tcg,thread=multi,tb-size={TRANSLATION_MIB}"), "max")
        };
        let mut arguments: Vec<String> = Vec::with_capacity(64);
        let mut add = |option: &str, value: String| {
            arguments.push(option.to_owned());
            if !value.is_empty() {
                arguments.push(value);
            }
        };
        add("-name", spec.instance_id.clone());
        for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
            add(flag, String::new());
        }
        add("-display", "none".to_owned());
        add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".to_owned());
        // Equal pages of two tenants are not merged, whatever the host does with others'.
        add("-machine", "microvm,acpi=off,rtc=on,pit=on,pic=on,isa-serial=on,mem-merge=off".to_owned());
        add("-accel", accelerator);
        add("-cpu", processor.to_owned());
        add("-m", format!("{}M", spec.memory_mib));
        add("-smp", spec.vcpus.to_string());
        add("-kernel", spec.kernel.display().to_string());
        add("-initrd", spec.initrd.display().to_string());
        add("-append", command_line);
        let files = std::iter::once(numbers.console).chain(numbers.root);
        for number in files.chain(numbers.volumes.iter().copied()) {
            add("-add-fd", format!("fd={number},set={number}"));
        }
        add("-chardev", format!("file,id=console,path={},append=on", set(numbers.console)));
        add("-serial", "chardev:console".to_owned());
        add("-chardev", listens("control", numbers.control));
        add("-mon", "chardev=control,mode=control".to_owned());
        // From the kernel by a system call: no device is needed.
        add("-object", "rng-builtin,id=entropy".to_owned());
        add("-device", "virtio-rng-device,rng=entropy".to_owned());
        add("-device", "virtio-serial-device".to_owned());
        add("-chardev", listens("channel", numbers.channel));
        add("-device", format!("virtserialport,chardev=channel,name={}", holdfast_guest::SERIAL_PORT_NAME));
        if let Some(number) = numbers.root {
            add(
                "-drive",
                format!("id=root,file={},format=raw,if=none,readonly=on,{}", set(number), throttle()),
            );
            add("-device", "virtio-blk-device,drive=root".to_owned());
        }
        for (at, number) in numbers.volumes.iter().enumerate() {
            // What the guest has flushed is on the host's disk; what it discards becomes a hole again. The lock is the file's.
            let node = format!("driver=host_device,node-name=volume{at},filename={}", set(*number));
            add("-blockdev", format!("{node},locking=off,discard=unmap"));
            add("-device", format!("virtio-blk-device,drive=volume{at}"));
        }
        if let (Some(nic), Some(number)) = (&spec.nic, numbers.tap) {
            add("-netdev", format!("tap,id=eth0,fd={number},vhost=off"));
            add("-device", format!("virtio-net-device,netdev=eth0,mac={}", nic.mac_text()));
        }
        arguments
    }
}

/// The files of these names in the folders beside a program, as far as they are there.
fn found(program: &Path, folders: &[&str], names: &[&str]) -> Vec<PathBuf> {
    let beside = program.canonicalize().ok();
    let beside = beside.as_deref().and_then(Path::parent).and_then(Path::parent);
    let folders = folders.iter().filter_map(|folder| Some(beside?.join(folder.trim_start_matches("../"))));
    let files = folders.flat_map(|folder| names.iter().map(move |name| folder.join(name)));
    files.filter(|file| file.is_file()).collect()
}

/// How much a disk gives, in a form that a `-drive` takes.
fn throttle() -> String {
    format!(
        "throttling.bps-total={DISK_BYTES_PER_SECOND_MAX},throttling.iops-total={DISK_OPERATIONS_PER_SECOND_MAX}"
    )
}

/// Whether a run state of QEMU's means that the guest makes progress, or is about to.
pub(crate) fn is_running(status: &str) -> bool {
    matches!(status, "running" | "prelaunch")
}

pub(crate) fn qmp_path(folder: &Path) -> PathBuf {
    folder.join(QMP_SOCKET)
}

pub(crate) fn channel_address(folder: &Path) -> ChannelAddress {
    ChannelAddress::Stream(folder.join(CHANNEL_SOCKET))
}
