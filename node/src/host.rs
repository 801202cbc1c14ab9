//! What this host offers: which VMM boots a guest on it, and how much memory and CPU there is for instances.
//!
//! The probe runs beside everything else: an agent that adopts what runs never waits for it. A node on which no VMM
//! boots offers nothing.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use holdfast_model::agent::Disk;
use holdfast_model::resource::Capacity;
use rustix::fs::StatVfs;
use serde::{Deserialize, Serialize};
use tokio::sync::OnceCell;

use crate::logs::chain;
use crate::vmm::jail::Jails;
use crate::vmm::probe::{self, ProbeConfig};
use crate::vmm::{Vmm, VmmError};

/// Memory that is kept for the host by default: this much at least, in MiB…
pub const MEMORY_RESERVE_MIB_MIN: u64 = 512;
/// …and this share of it, as a divisor.
pub const MEMORY_RESERVE_DIVISOR: u64 = 16;
/// CPU that is kept for the host by default, in thousandths.
pub const CPU_RESERVE_MILLI: u64 = 100;

/// The first pause after a probe that found nothing; doubled up to [`PROBE_PAUSE_MAX`].
const PROBE_PAUSE: Duration = Duration::from_secs(15);
/// The longest pause after a probe that found nothing.
const PROBE_PAUSE_MAX: Duration = Duration::from_secs(600);

/// The guest kernel's file in the assets folder.
pub const KERNEL_FILE: &str = "vmlinux";
/// The file of the archive with the guest's init.
pub const INITRD_FILE: &str = "initramfs.cpio";

/// Which VMM to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmmChoice {
    /// The best one that boots a guest.
    #[default]
    Auto,
    /// QEMU, with KVM where it boots.
    Qemu,
    /// Firecracker.
    Firecracker,
}

/// The VMM of this host, probed once.
pub struct VmmHost {
    probe: ProbeConfig,
    chosen: OnceCell<(Arc<dyn Vmm>, String)>,
}

impl VmmHost {
    /// With the guest's parts in this folder; the probe's verdict is kept in the data folder.
    pub fn new(assets_dir: &Path, data_dir: &Path, choice: VmmChoice, jails: Arc<Jails>) -> Self {
        let wanted = |one: VmmChoice| choice == VmmChoice::Auto || choice == one;
        let probe = ProbeConfig {
            kernel: assets_dir.join(KERNEL_FILE),
            initrd: assets_dir.join(INITRD_FILE),
            folder: data_dir.to_owned(),
            firecracker: probe::find_firecracker().filter(|_| wanted(VmmChoice::Firecracker)),
            qemu: probe::find_qemu().filter(|_| wanted(VmmChoice::Qemu)),
            jails,
        };
        Self { probe, chosen: OnceCell::new() }
    }

    /// The VMM. The first call may take minutes, where one hangs; a failure is tried again by the next.
    pub async fn vmm(&self) -> Result<Arc<dyn Vmm>, VmmError> {
        let probe = || async {
            let (vmm, verdict) = probe::choose(&self.probe).await?;
            tracing::info!(vmm = %vmm.kind(), %verdict, "chose a VMM");
            let text = format!("{} ({}): {verdict}", vmm.kind(), self.probe.jails.describe());
            Ok((Arc::from(vmm), text))
        };
        self.chosen.get_or_try_init(probe).await.map(|(vmm, _)| Arc::clone(vmm))
    }

    /// What machines run in.
    pub fn jails(&self) -> &Jails {
        &self.probe.jails
    }

    /// Whether a VMM is known to boot a guest: by the probe of this agent, or until then of an earlier one.
    pub fn boots(&self) -> bool {
        self.chosen.get().is_some()
            || probe::last_verdict(&self.probe.folder).is_some_and(|verdict| verdict.chosen.is_some())
    }

    /// Probes until a VMM boots a guest, so that the node is known to be of use before anything is placed on it.
    /// `tried` is called after each attempt.
    pub async fn settle(&self, tried: impl Fn()) {
        let mut pause = PROBE_PAUSE;
        loop {
            let chosen = self.vmm().await;
            tried();
            let Err(error) = chosen else { return };
            tracing::error!(error = %chain(&error), pause_s = pause.as_secs(), "no instance can be started here");
            tokio::time::sleep(pause.mul_f64(rand::random_range(0.8..1.0))).await;
            pause = (pause * 2).min(PROBE_PAUSE_MAX);
        }
    }

    /// What the probe found, for people.
    pub fn verdict(&self) -> String {
        match self.chosen.get() {
            Some((_, text)) => text.clone(),
            None => match probe::last_verdict(&self.probe.folder) {
                Some(verdict) => verdict.to_string(),
                None => "not probed yet".to_owned(),
            },
        }
    }

    /// The guest kernel.
    pub fn kernel(&self) -> &Path {
        &self.probe.kernel
    }

    /// The archive with the guest's init.
    pub fn initrd(&self) -> &Path {
        &self.probe.initrd
    }
}

/// What an operator sets instead of what was measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CapacityOverride {
    /// Memory for instances, in MiB.
    pub memory_mib: Option<u64>,
    /// CPU for instances, in thousandths.
    pub cpu_milli: Option<u64>,
}

/// Why the host's capacity is not known.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The memory could not be read.
    #[error("'{}' could not be read, so the host's memory is not known; set the capacity by hand.", .path.display())]
    Memory {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The file does not tell the memory.
    #[error("/proc/meminfo does not tell the host's memory; set the capacity by hand.")]
    MemoryForm,
}

/// What this host has for instances: what it has, less a reserve, or what the operator says.
pub fn capacity(set: CapacityOverride) -> Result<Capacity, HostError> {
    let memory_mib = match set.memory_mib {
        Some(memory_mib) => memory_mib,
        None => {
            let path = Path::new("/proc/meminfo");
            let text = std::fs::read_to_string(path)
                .map_err(|source| HostError::Memory { path: path.to_owned(), source })?;
            let total_mib = memory_total_mib(&text).ok_or(HostError::MemoryForm)?;
            total_mib.saturating_sub(MEMORY_RESERVE_MIB_MIN.max(total_mib / MEMORY_RESERVE_DIVISOR))
        }
    };
    let cpu_milli = set.cpu_milli.unwrap_or_else(|| {
        let processors = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
        (processors * 1_000).saturating_sub(CPU_RESERVE_MILLI)
    });
    Ok(Capacity { memory_mib, cpu_milli })
}

/// The disk of a folder. Free is what an agent may use, without what is kept for the system.
pub(crate) fn disk(folder: &Path) -> Option<Disk> {
    Some(disk_of(&rustix::fs::statvfs(folder).ok()?))
}

/// What a file system says of its room.
pub(crate) fn disk_of(said: &StatVfs) -> Disk {
    let mib =
        |blocks: u64| ((u128::from(blocks) * u128::from(said.f_frsize)) >> 20).try_into().unwrap_or(u64::MAX);
    Disk { total_mib: mib(said.f_blocks), free_mib: mib(said.f_bavail) }
}

fn memory_total_mib(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1_024)
}

/// The identity of this boot of the host; the same for all of its namespaces.
pub(crate) fn boot_id() -> std::io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capacity_is_what_there_is_less_a_reserve() {
        assert_eq!(memory_total_mib("MemTotal:       24576000 kB\nMemFree: 1 kB\n"), Some(24_000));
        assert_eq!(memory_total_mib("MemFree: 1 kB\n"), None);
        let measured = capacity(CapacityOverride::default()).unwrap();
        let text = std::fs::read_to_string("/proc/meminfo").unwrap();
        assert!(measured.memory_mib < memory_total_mib(&text).unwrap());
        assert!(measured.cpu_milli >= 900);
        let disk_of_root = disk(Path::new("/")).unwrap();
        assert!(disk_of_root.free_mib > 0 && disk_of_root.free_mib <= disk_of_root.total_mib);
        assert_eq!(disk(Path::new("/no-such-folder")), None);
        let set = capacity(CapacityOverride { memory_mib: Some(7), cpu_milli: Some(9) }).unwrap();
        assert_eq!(set, Capacity { memory_mib: 7, cpu_milli: 9 });
    }
}
