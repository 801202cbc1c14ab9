//! QEMU's `microvm` machine: the back-end that works on every host.
//!
//! No device that the guest does not need, no configuration that this file does not name, QEMU's own seccomp
//! sandbox, and guest memory exactly as asked.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use super::{
    Adoption, BoxFuture, Vm, VmSpec, Vmm, VmmError, VmmKind, channel::ChannelAddress, host_clock, process,
    qmp,
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

/// QEMU, with or without KVM.
#[derive(Debug, Clone)]
pub struct Qemu {
    /// The program, `qemu-system-x86_64`.
    pub program: PathBuf,
    /// Whether guests run on `/dev/kvm`; only set where the probe booted on it.
    pub kvm: bool,
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
        if let Adoption::Running(vm) = Vm::adopt(&spec.folder)? {
            return Err(VmmError::AlreadyRunning { folder: spec.folder.clone(), pid: vm.pid() });
        }
        process::prepare_folder(&spec.folder, &[CHANNEL_SOCKET, QMP_SOCKET])?;
        let mut child = process::spawn_detached(&self.program, &self.arguments(spec).await, &spec.folder)?;
        let ended = || VmmError::EndedAtOnce {
            kind: self.kind(),
            instance_id: spec.instance_id.clone(),
            said: process::said(spec.folder.join(process::STDERR_FILE)),
        };
        let recorded = match child.id() {
            Some(pid) => Vm::record(&spec.folder, &spec.instance_id, self.kind(), pid),
            None => Ok(None),
        };
        let vm = match recorded {
            Ok(Some(vm)) => vm,
            Ok(None) => return Err(ended()),
            Err(error) => {
                // Without its record no later agent would find it.
                if let Err(source) = child.kill().await {
                    tracing::error!(%source, "a microVM that could not be recorded could not be killed either");
                }
                return Err(error);
            }
        };
        // The child is ours to reap for as long as this agent lives.
        tokio::spawn(async move { child.wait().await });
        let started_at = Instant::now();
        loop {
            if !vm.is_alive() {
                return Err(ended());
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
    async fn arguments(&self, spec: &VmSpec) -> Vec<String> {
        let command_line = self.command_line().await;
        let path = |name: &str| spec.folder.join(name).display().to_string();
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
        add("-machine", "microvm,acpi=off,rtc=on,pit=on,pic=on,isa-serial=on".to_owned());
        add("-accel", accelerator);
        add("-cpu", processor.to_owned());
        add("-m", format!("{}M", spec.memory_mib));
        add("-smp", spec.vcpus.to_string());
        add("-kernel", spec.kernel.display().to_string());
        add("-initrd", spec.initrd.display().to_string());
        add("-append", command_line);
        add("-chardev", format!("file,id=console,path={},append=on", path(process::CONSOLE_FILE)));
        add("-serial", "chardev:console".to_owned());
        add("-qmp", format!("unix:{},server=on,wait=off", qmp_path(&spec.folder).display()));
        add("-object", "rng-random,id=entropy,filename=/dev/urandom".to_owned());
        add("-device", "virtio-rng-device,rng=entropy".to_owned());
        add("-device", "virtio-serial-device".to_owned());
        add("-chardev", format!("socket,id=channel,path={},server=on,wait=off", path(CHANNEL_SOCKET)));
        add("-device", format!("virtserialport,chardev=channel,name={}", holdfast_guest::SERIAL_PORT_NAME));
        if let Some(image) = &spec.root_image {
            add("-drive", format!("id=root,file={},format=raw,if=none,readonly=on", image.display()));
            add("-device", "virtio-blk-device,drive=root".to_owned());
        }
        if let Some(nic) = &spec.nic {
            add("-netdev", format!("tap,id=eth0,ifname={},script=no,downscript=no,vhost=off", nic.tap));
            add("-device", format!("virtio-net-device,netdev=eth0,mac={}", nic.mac_text()));
        }
        arguments
    }
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
