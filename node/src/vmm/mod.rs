//! MicroVMs behind one narrow interface: [`Vmm::start`] makes a machine, [`Vm`] is a hold on one that runs, and
//! [`channel::GuestChannel`] speaks with its init. Two back-ends: [`firecracker`] and [`qemu`].
//!
//! A machine outlives the agent that started it: it has its own session, and its folder holds what the next agent
//! needs to adopt it (I5, I7). It runs behind the walls that [`jail`] has put up around it. A process is only ever taken for a machine, and only ever signalled, after its
//! start time was compared, so that a reused process id harms nobody. Configuration and secrets never lie in the
//! folder; they travel over the channel into the guest's memory (I10). Everything that a guest can make grow on
//! the host is bounded: see [`process`] for its console and [`channel`] for its messages.

pub mod channel;
mod error;
pub mod exec;
pub mod firecracker;
mod host_clock;
mod http_unix;
pub mod jail;
pub mod probe;
pub mod process;
pub mod qemu;
mod qmp;
mod vm;

use std::{
    future::Future,
    net::Ipv6Addr,
    path::{Path, PathBuf},
    pin::Pin,
};

pub use error::VmmError;
use holdfast_jail::plan::Device;
use holdfast_model::limits::MOUNTS_MAX;
use serde::{Deserialize, Serialize};
pub use vm::{Adoption, Vm, VmEnd};

/// A boxed future, so that [`Vmm`] can be used as `dyn Vmm`.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// The least memory that a guest can be given, in MiB.
pub const MEMORY_MIB_MIN: u32 = 64;

/// The most processors that a guest can be given.
pub const VCPUS_MAX: u32 = 64;

/// How much one disk of a guest's gives in a second, reading and writing together, so that no guest keeps the host's disk
/// for itself. Well above what a guest needs to start.
pub const DISK_BYTES_PER_SECOND_MAX: u64 = 512 << 20;

/// How many operations it does in a second.
pub const DISK_OPERATIONS_PER_SECOND_MAX: u64 = 50_000;

/// A program that runs microVMs.
pub trait Vmm: Send + Sync {
    /// Which one it is.
    fn kind(&self) -> VmmKind;

    /// Creates the folder, starts the machine detached from this process, and returns once its process is known
    /// and recorded in the folder. The guest may still be booting: wait for its hello on the channel.
    ///
    /// Fails, and leaves no process behind, if the specification is out of bounds, if a machine already runs from
    /// that folder, or if the program ends at once.
    fn start<'a>(&'a self, spec: &'a VmSpec) -> BoxFuture<'a, Result<Vm, VmmError>>;
}

/// The two back-ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmmKind {
    /// Firecracker, on KVM.
    Firecracker,
    /// QEMU's `microvm` machine on KVM.
    QemuKvm,
    /// QEMU's `microvm` machine, translating instructions: slower, but works everywhere.
    QemuTcg,
}

impl VmmKind {
    /// The name that people read.
    pub fn as_str(self) -> &'static str {
        match self {
            VmmKind::Firecracker => "firecracker",
            VmmKind::QemuKvm => "qemu-kvm",
            VmmKind::QemuTcg => "qemu-tcg",
        }
    }
}

impl std::fmt::Display for VmmKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A machine to start. What its workload is, the guest learns over the channel
/// ([`channel::GuestSender::configure`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmSpec {
    /// The instance's id, 64 letters, digits, `-` and `_` at most; it names the process.
    pub instance_id: String,
    /// The machine's own folder, made with mode 0700; absolute, and short enough that a socket in it can be
    /// named (90 bytes).
    pub folder: PathBuf,
    /// The guest kernel, an ELF `vmlinux`.
    pub kernel: PathBuf,
    /// The archive that holds the guest's init.
    pub initrd: PathBuf,
    /// Image of the root file system (erofs or ext4), attached read-only; `None` only for a probe.
    pub root_image: Option<PathBuf>,
    /// Guest memory in MiB, given exactly.
    pub memory_mib: u32,
    /// Number of processors, from 1 to [`VCPUS_MAX`].
    pub vcpus: u32,
    /// Its share of the host's processors, in thousandths of one.
    pub cpu_milli: u64,
    /// The guest's network card; `None` leaves it without one.
    pub nic: Option<Nic>,
    /// Block devices that become the guest's disks behind the root, in this order.
    pub volumes: Vec<VolumeDevice>,
}

/// A loop device that stands for a volume's disk. Whoever starts a machine with it holds it until the machine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VolumeDevice {
    /// Its number, as in `/dev/loop7`.
    pub number: u32,
}

impl VolumeDevice {
    /// Its path on the host.
    pub fn path(self) -> PathBuf {
        Path::new("/dev").join(&*Device::Loop(self.number).name())
    }
}

/// A network card on a TAP device that already exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// Name of the TAP device.
    pub tap: String,
    /// The guest's hardware address.
    pub mac: [u8; 6],
}

impl Nic {
    /// A card whose locally administered hardware address follows from the guest's address, so that a machine
    /// that is started again keeps it.
    pub fn for_address(tap: impl Into<String>, address: Ipv6Addr) -> Self {
        let [.., a, b, c, d] = address.octets();
        Self { tap: tap.into(), mac: [0x02, 0x48, a, b, c, d] }
    }

    pub(crate) fn mac_text(&self) -> String {
        let [a, b, c, d, e, f] = self.mac;
        format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

impl VmSpec {
    /// Refuses what no back-end could start.
    pub(crate) fn check(&self) -> Result<(), VmmError> {
        let name_ok = |text: &str, most: usize| {
            !text.is_empty()
                && text.len() <= most
                && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        };
        let problem = if !name_ok(&self.instance_id, 64) {
            Some("the instance id must be 1 to 64 letters, digits, '-' and '_'")
        } else if self.memory_mib < MEMORY_MIB_MIN {
            Some("the memory must be at least 64 MiB")
        } else if self.vcpus == 0 || self.vcpus > VCPUS_MAX {
            Some("the number of processors must be from 1 to 64")
        } else if self.nic.as_ref().is_some_and(|nic| !name_ok(&nic.tap, 15)) {
            Some("the TAP device's name must be 1 to 15 letters, digits, '-' and '_'")
        } else if self.volumes.len() > MOUNTS_MAX {
            Some("it has more volumes than a machine has room for")
        } else {
            [&self.kernel, &self.initrd]
                .into_iter()
                .chain(&self.root_image)
                .find_map(|path| path_problem(path))
        };
        match problem {
            Some(problem) => Err(VmmError::Spec { instance_id: self.instance_id.clone(), problem }),
            None => process::check_folder_path(&self.folder),
        }
    }
}

/// QEMU splits its options at commas and the kernel its command line at spaces: no such path is passed on.
fn path_problem(path: &Path) -> Option<&'static str> {
    let plain = path.to_str().is_some_and(|text| !text.contains([',', '\n']));
    (!path.is_absolute() || !plain).then_some("each path must be absolute, UTF-8 and without commas")
}
