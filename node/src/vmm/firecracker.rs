//! Firecracker, driven over its API socket. Used only where the program exists and the probe booted with it.
//!
//! The bodies below carry the field names of Firecracker's published API; nothing of its code is used.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use holdfast_jail::plan::{Descriptor, Device, Profile};
use hyper::Method;
use serde::Serialize;

use super::{
    BoxFuture, DISK_BYTES_PER_SECOND_MAX, DISK_OPERATIONS_PER_SECOND_MAX, Vm, VmSpec, Vmm, VmmError, VmmKind,
    channel::ChannelAddress,
    http_unix,
    jail::{Jails, Needs, own_folder},
    process,
};

/// How long Firecracker may take until its API socket answers.
const START_DEADLINE: Duration = Duration::from_secs(10);

/// Time between two looks whether the API socket is there.
const START_POLL: Duration = Duration::from_millis(10);

/// The most bytes of a refusal that are reported.
const REFUSAL_BYTES_MAX: usize = 1024;

/// The most processors that it gives a guest.
const VCPUS_MAX: u32 = 32;

/// Each Firecracker process has a vsock of its own, so every guest can have the first free address.
const GUEST_CID: u32 = 3;

const API_SOCKET: &str = "api.sock";
const VSOCK_SOCKET: &str = "vsock.sock";

/// What the guest kernel is told. Firecracker leaves when the guest resets through the keyboard controller.
const KERNEL_COMMAND_LINE: &str =
    "console=ttyS0 loglevel=4 panic=-1 reboot=k pci=off i8042.noaux random.trust_cpu=on";

/// The program, found but not yet believed: see [`super::probe`].
#[derive(Debug, Clone)]
pub struct Firecracker {
    /// The program, `firecracker`.
    pub program: PathBuf,
    /// What its processes run in.
    pub jails: Arc<Jails>,
}

/// `PUT /machine-config`
#[derive(Debug, Serialize)]
struct MachineConfig {
    vcpu_count: u32,
    mem_size_mib: u32,
    smt: bool,
    track_dirty_pages: bool,
}

/// `PUT /boot-source`
#[derive(Debug, Serialize)]
struct BootSource<'a> {
    kernel_image_path: &'a Path,
    initrd_path: &'a Path,
    boot_args: &'a str,
}

/// `PUT /drives/{drive_id}`
#[derive(Debug, Serialize)]
struct Drive<'a> {
    drive_id: &'a str,
    path_on_host: &'a Path,
    is_root_device: bool,
    is_read_only: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    cache_type: Option<&'static str>,
    rate_limiter: RateLimiter,
}

/// How much a disk gives.
#[derive(Debug, Serialize)]
struct RateLimiter {
    bandwidth: TokenBucket,
    ops: TokenBucket,
}

/// So many bytes or operations in so many milliseconds.
#[derive(Debug, Serialize)]
struct TokenBucket {
    size: u64,
    refill_time: u64,
}

impl RateLimiter {
    fn of_disk() -> Self {
        let each_second = |size| TokenBucket { size, refill_time: 1_000 };
        Self {
            bandwidth: each_second(DISK_BYTES_PER_SECOND_MAX),
            ops: each_second(DISK_OPERATIONS_PER_SECOND_MAX),
        }
    }
}

/// `PUT /network-interfaces/{iface_id}`
#[derive(Debug, Serialize)]
struct NetworkInterface<'a> {
    iface_id: &'a str,
    host_dev_name: &'a str,
    guest_mac: String,
}

/// `PUT /vsock`
#[derive(Debug, Serialize)]
struct Vsock<'a> {
    guest_cid: u32,
    uds_path: &'a Path,
}

/// `PUT /entropy`
#[derive(Debug, Serialize)]
struct Entropy {}

/// `PUT /actions`
#[derive(Debug, Serialize)]
struct Action {
    action_type: &'static str,
}

/// A request before it is sent.
#[derive(Debug)]
struct Call {
    uri: String,
    body: serde_json::Value,
}

impl Vmm for Firecracker {
    fn kind(&self) -> VmmKind {
        VmmKind::Firecracker
    }

    fn start<'a>(&'a self, spec: &'a VmSpec) -> BoxFuture<'a, Result<Vm, VmmError>> {
        Box::pin(self.start_machine(spec))
    }
}

impl Firecracker {
    async fn start_machine(&self, spec: &VmSpec) -> Result<Vm, VmmError> {
        check(spec)?;
        let calls =
            calls(spec).map_err(|source| VmmError::Record { path: api_path(&spec.folder), source })?;
        let api = api_path(&spec.folder);
        let vm = self.jails.start(spec, self.needs(spec)).await?;
        match drive(&vm, &api, spec, calls).await {
            Ok(()) => Ok(vm),
            Err(error) => {
                vm.kill().await?;
                Err(error)
            }
        }
    }

    /// What Firecracker is given. It takes no descriptors: it makes its sockets itself, and opens its TAP by name.
    fn needs(&self, spec: &VmSpec) -> Needs {
        let api = api_path(&spec.folder);
        let arguments = [
            "--api-sock".to_owned(),
            api.display().to_string(),
            // Firecracker takes letters, digits and '-' for an id.
            "--id".to_owned(),
            spec.instance_id.replace('_', "-"),
            // Its log goes where the guest's console goes, which is bounded: only what matters.
            "--level".to_owned(),
            "Warning".to_owned(),
        ];
        let mut devices = vec![Device::Kvm, Device::Urandom];
        devices.extend(spec.nic.as_ref().map(|_| Device::Tun));
        devices.extend(spec.volumes.iter().map(|volume| Device::Loop(volume.number)));
        Needs {
            kind: VmmKind::Firecracker,
            program: self.program.clone(),
            arguments: arguments.to_vec(),
            // It opens its volumes by their paths; these keep the devices from becoming another machine's meanwhile.
            descriptors: spec.volumes.iter().map(|volume| Descriptor::Block(volume.path())).collect(),
            modules: Vec::new(),
            files: [&spec.kernel, &spec.initrd].into_iter().chain(&spec.root_image).cloned().collect(),
            devices,
            makes_sockets: true,
            tap: spec.nic.as_ref().map(|nic| nic.tap.clone()),
            profile: Profile::Firecracker,
            stale: vec![api, vsock_path(&spec.folder)],
        }
    }
}

/// Refuses what Firecracker would refuse when its process runs already.
fn check(spec: &VmSpec) -> Result<(), VmmError> {
    if spec.vcpus > VCPUS_MAX {
        let problem = "Firecracker gives a guest 32 processors at most";
        return Err(VmmError::Spec { instance_id: spec.instance_id.clone(), problem });
    }
    spec.check()
}

async fn drive(vm: &Vm, api: &Path, spec: &VmSpec, calls: Vec<Call>) -> Result<(), VmmError> {
    let started_at = Instant::now();
    while !api.exists() {
        if !vm.is_alive() {
            return Err(ended(spec));
        }
        if started_at.elapsed() > START_DEADLINE {
            return Err(VmmError::ControlDeadline {
                path: api.to_owned(),
                expected: "appear",
                seconds: START_DEADLINE.as_secs(),
            });
        }
        tokio::time::sleep(START_POLL).await;
    }
    send(api, calls).await
}

/// Tells a Firecracker that somebody else has started, and that listens at `api`, everything that one of ours is told, the
/// start of its guest last. The paths in `spec` are those that it sees itself, in whatever root it has.
pub async fn ask(api: &Path, spec: &VmSpec) -> Result<(), VmmError> {
    check(spec)?;
    let calls = calls(spec).map_err(|source| VmmError::Record { path: api.to_owned(), source })?;
    send(api, calls).await
}

async fn send(api: &Path, calls: Vec<Call>) -> Result<(), VmmError> {
    for call in calls {
        let body = call.body.to_string().into_bytes();
        let (status, answer) = http_unix::request(api, Method::PUT, &call.uri, body).await?;
        if !status.is_success() {
            let answer = String::from_utf8_lossy(answer.get(..REFUSAL_BYTES_MAX).unwrap_or(&answer));
            return Err(VmmError::Refused {
                kind: VmmKind::Firecracker,
                request: format!("PUT {}", call.uri),
                answer: format!("{status} {}", answer.trim()),
            });
        }
    }
    Ok(())
}

fn ended(spec: &VmSpec) -> VmmError {
    VmmError::EndedAtOnce {
        kind: VmmKind::Firecracker,
        instance_id: spec.instance_id.clone(),
        said: process::said(spec.folder.join(process::STDERR_FILE)),
    }
}

/// Everything that Firecracker must be told, the start itself last.
fn calls(spec: &VmSpec) -> Result<Vec<Call>, serde_json::Error> {
    fn call(uri: &str, body: impl Serialize) -> Result<Call, serde_json::Error> {
        Ok(Call { uri: uri.to_owned(), body: serde_json::to_value(body)? })
    }
    let mut calls = vec![
        call(
            "/machine-config",
            MachineConfig {
                vcpu_count: spec.vcpus,
                mem_size_mib: spec.memory_mib,
                smt: false,
                track_dirty_pages: false,
            },
        )?,
        call(
            "/boot-source",
            BootSource {
                kernel_image_path: &spec.kernel,
                initrd_path: &spec.initrd,
                boot_args: KERNEL_COMMAND_LINE,
            },
        )?,
    ];
    if let Some(image) = &spec.root_image {
        // Not "the root device": the kernel's root is the initramfs, and init mounts the disk.
        let drive = Drive {
            drive_id: "root",
            path_on_host: image,
            is_root_device: false,
            is_read_only: true,
            cache_type: None,
            rate_limiter: RateLimiter::of_disk(),
        };
        calls.push(call("/drives/root", drive)?);
    }
    for (at, volume) in spec.volumes.iter().enumerate() {
        let (drive_id, path) = (format!("volume{at}"), volume.path());
        let drive = Drive {
            drive_id: &drive_id,
            path_on_host: &path,
            is_root_device: false,
            is_read_only: false,
            // By default a guest's flushes are answered and not carried out.
            cache_type: Some("Writeback"),
            rate_limiter: RateLimiter::of_disk(),
        };
        calls.push(call(&format!("/drives/{drive_id}"), drive)?);
    }
    if let Some(nic) = &spec.nic {
        let interface =
            NetworkInterface { iface_id: "eth0", host_dev_name: &nic.tap, guest_mac: nic.mac_text() };
        calls.push(call("/network-interfaces/eth0", interface)?);
    }
    let vsock = vsock_path(&spec.folder);
    calls.push(call("/vsock", Vsock { guest_cid: GUEST_CID, uds_path: &vsock })?);
    calls.push(call("/entropy", Entropy {})?);
    calls.push(call("/actions", Action { action_type: "InstanceStart" })?);
    Ok(calls)
}

pub(crate) fn api_path(folder: &Path) -> PathBuf {
    own_folder(folder).join(API_SOCKET)
}

pub(crate) fn channel_address(folder: &Path) -> ChannelAddress {
    ChannelAddress::Vsock { path: vsock_path(folder), port: holdfast_guest::VSOCK_PORT }
}

fn vsock_path(folder: &Path) -> PathBuf {
    own_folder(folder).join(VSOCK_SOCKET)
}

#[cfg(test)]
mod shapes;
#[cfg(test)]
mod tests;
