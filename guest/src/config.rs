//! What a guest is told to run: network, workload, secrets. Sent once, after the guest's hello.
//!
//! Secret values live only here and in the guest's memory-backed files; `Debug` shows their count and sizes (I10).

use std::{fmt, net::Ipv6Addr};

use serde::{Deserialize, Serialize};
use zeroize::Zeroize;

/// Everything that a guest needs to start its workload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestConfig {
    /// The instance's id, for the guest's own messages.
    pub instance_id: String,
    /// The guest's host name, 64 bytes at most.
    pub hostname: String,
    /// The host's clock when the configuration was sent, in milliseconds since 1970.
    pub now_unix_ms: u64,
    /// `None` leaves the guest with its loopback interface only.
    pub network: Option<NetworkConfig>,
    /// Whether a root disk is mounted; only a probe guest goes without.
    pub root_disk: bool,
    /// The program to run.
    pub workload: Workload,
    /// Written to `/run/secrets` before the workload starts; `None` makes no such folder.
    pub secrets: Option<Secrets>,
    /// Volumes, in the order of the disks behind the root's.
    pub volumes: Vec<VolumeMount>,
}

/// Where a volume appears.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeMount {
    /// An absolute path in the workload's root.
    pub path: String,
    /// Not writable there.
    pub read_only: bool,
}

/// The static address of `eth0`. There is no DHCP, no router advertisement, no duplicate address detection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkConfig {
    /// The instance's own address, a /128.
    pub address: Ipv6Addr,
    /// Next hop for everything else, on the link (`fe80::1`).
    pub gateway: Ipv6Addr,
    /// Largest packet, in bytes (1420 on the overlay).
    pub mtu: u32,
    /// Name servers for `/etc/resolv.conf`; empty leaves the image's file alone.
    pub nameservers: Vec<Ipv6Addr>,
}

/// The program that the guest is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    /// Program and arguments; a program without a slash is looked up in the workload's `PATH`.
    pub argv: Vec<String>,
    /// Environment, and nothing else: the guest adds no variable of its own.
    pub env: Vec<(String, String)>,
    /// Working folder inside the root; empty means `/`.
    pub workdir: String,
    /// `user[:group]` as in an OCI image, by name or number; empty means root.
    pub user: String,
}

/// A bundle of secrets in clear, on its way into the guest's memory.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secrets {
    /// The canonical file, written as `/run/secrets/platform.env`.
    pub platform_env: Vec<u8>,
    /// One file per key, written under `/run/secrets/keys/`.
    pub keys: Vec<(String, Vec<u8>)>,
}

impl Drop for Secrets {
    fn drop(&mut self) {
        self.platform_env.zeroize();
        self.keys.iter_mut().for_each(|(_, value)| value.zeroize());
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secrets({} keys, {} bytes, redacted)", self.keys.len(), self.platform_env.len())
    }
}
