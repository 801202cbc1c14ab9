//! Each microVM's TAP device: persistent, owned by this agent by its name, with `fe80::1/64` as the guest's gateway
//! and a host route to the guest's /128.
//!
//! It goes through the tools `ip` and `tc` of iproute2, which every host that we support has, and `nft`: a few short
//! processes for each start of an instance, no netlink crate to build and keep, and commands that an operator can repeat by
//! hand. The agent never turns forwarding on: what a guest sends to anybody but this host goes no further, so a tenant
//! reaches no other one (I9); the overlay opens what it needs. What a guest may send to the host itself, and how much, is
//! in [`guard`].

pub mod guard;
mod tool;

use std::fs;
use std::io;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};

use holdfast_model::InstanceId;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use crate::step::{AfterStep, Step};
use guard::Rate;
use tool::{COMMAND_DEADLINE, Tool};

/// The guest's next hop on its own link.
pub const GATEWAY: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// The largest packet on a TAP, in bytes: what the overlay carries.
pub const MTU: u32 = 1_420;

/// What the name of every TAP of every agent begins with.
const PREFIX: &str = "hf";

/// Characters of a TAP's name that tell this agent from another on the same host.
const TAG_CHARS: usize = 4;

/// Characters of a TAP's name that tell the instance: with prefix and tag 15, the kernel's limit.
const INSTANCE_CHARS: usize = 9;

/// Where a TAP's settings are.
const SETTINGS: &str = "/proc/sys/net";

/// No router advertisements, no delay of the gateway's address, and IPv6 even where the host's default is off. None of
/// the host's IPv4 addresses is told to a guest that asks for it.
const SETTINGS_VALUES: [(&str, &str, &str); 7] = [
    ("ipv6", "disable_ipv6", "0"),
    ("ipv6", "accept_ra", "0"),
    ("ipv6", "accept_redirects", "0"),
    ("ipv6", "autoconf", "0"),
    ("ipv6", "accept_dad", "0"),
    ("ipv6", "dad_transmits", "0"),
    ("ipv4", "arp_ignore", "8"),
];

/// Why a TAP could not be made, listed or removed.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The agent's tag could not be read or stored.
    #[error("'{}', which holds the agent's mark on its TAP devices, could not be {action}.", .path.display())]
    Tag {
        /// The file.
        path: PathBuf,
        /// What was tried, as a past participle.
        action: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The file does not hold a tag.
    #[error(
        "'{}' does not hold the agent's mark on its TAP devices; remove it once no TAP named hf… is left.",
        .path.display()
    )]
    TagForm {
        /// The file.
        path: PathBuf,
    },
    /// A tool could not be started.
    #[error("The program '{program}' could not be started; install the package {package}.")]
    Spawn {
        /// Which one.
        program: &'static str,
        /// Where it is from.
        package: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A tool did not end.
    #[error("'{command}' took longer than {} s; the kernel's network settings may be blocked.", COMMAND_DEADLINE.as_secs())]
    Deadline {
        /// Program and arguments.
        command: String,
    },
    /// A tool refused.
    #[error("'{command}' failed: {said}")]
    Refused {
        /// Program and arguments, or the commands that it read.
        command: String,
        /// The beginning of its error output.
        said: String,
    },
    /// `ip` printed what is not JSON.
    #[error("'ip {command}' printed something else than a list of links; install iproute2 5.10 or later.")]
    Output {
        /// Its arguments.
        command: String,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// A setting of a TAP could not be written.
    #[error("'{}' could not be written; run the node agent as root on a host with IPv6.", .path.display())]
    Setting {
        /// The setting.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// This agent's TAP devices.
#[derive(Clone, Debug)]
pub struct Network {
    /// [`TAG_CHARS`] lower-case letters and digits.
    tag: String,
    /// What each TAP carries.
    rate: Rate,
}

#[derive(Deserialize)]
struct Link {
    ifname: String,
}

impl Network {
    /// The network of the agent whose data folder this is. Its tag is drawn once and kept there.
    pub fn open(data_dir: &Path) -> Result<Self, NetworkError> {
        let path = data_dir.join("network-tag");
        match fs::read_to_string(&path) {
            Ok(tag) if is_tag(&tag) => Ok(Self { tag, rate: Rate::default() }),
            Ok(_) => Err(NetworkError::TagForm { path }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let tag = short_name(&rand::random::<[u8; 16]>(), TAG_CHARS);
                let fresh = data_dir.join("network-tag.new");
                let written = fs::write(&fresh, &tag)
                    .and_then(|()| fs::File::open(&fresh)?.sync_all())
                    .and_then(|()| fs::rename(&fresh, &path))
                    .and_then(|()| fs::File::open(data_dir)?.sync_all());
                written.map_err(|source| NetworkError::Tag { path, action: "written", source })?;
                Ok(Self { tag, rate: Rate::default() })
            }
            Err(source) => Err(NetworkError::Tag { path, action: "read", source }),
        }
    }

    /// With another rate than the default.
    #[must_use]
    pub fn with_rate(self, rate: Rate) -> Self {
        Self { rate, ..self }
    }

    /// The name of an instance's TAP, always the same.
    pub fn tap_name(&self, instance: InstanceId) -> String {
        format!("{}{}", self.own_prefix(), short_name(&instance.to_key(), INSTANCE_CHARS))
    }

    /// Makes the TAP of an instance, or completes it, and the route to the guest. Its guards are up before it is.
    pub async fn ensure(
        &self,
        instance: InstanceId,
        address: Ipv6Addr,
        after_step: &AfterStep,
    ) -> Result<String, NetworkError> {
        let tap = self.tap_name(instance);
        // Two processes at once: neither needs the other, and both come before the TAP is up.
        let prefix = self.own_prefix();
        let guard = guard::put_up(&self.tag, &prefix, self.rate);
        let ((), exists) = tokio::try_join!(guard, self.exists(&tap))?;
        after_step(Step::Guarded);
        if !exists {
            ip(&["tuntap", "add", "dev", &tap, "mode", "tap"], None).await?;
            after_step(Step::TapMade);
        }
        guard::bound(&tap, self.rate).await?;
        for (family, setting, value) in SETTINGS_VALUES {
            let path = Path::new(SETTINGS).join(family).join("conf").join(&tap).join(setting);
            fs::write(&path, value).map_err(|source| NetworkError::Setting { path, source })?;
        }
        after_step(Step::TapSet);
        // Link, then address, then route: each may be there already.
        let batch = format!(
            "link set dev {tap} mtu {MTU} addrgenmode none up\n\
             address replace {GATEWAY}/64 dev {tap} nodad\n\
             route replace {address}/128 dev {tap}\n"
        );
        ip(&["-6", "-batch", "-"], Some(batch)).await?;
        after_step(Step::TapUp);
        Ok(tap)
    }

    /// Takes the TAP of an instance down while no machine is behind it: its route goes, and whoever connects is told at
    /// once instead of waiting for an answer. [`Network::ensure`] brings all of it back. No TAP is no error.
    pub async fn silence(&self, instance: InstanceId) -> Result<(), NetworkError> {
        let tap = self.tap_name(instance);
        if self.exists(&tap).await? {
            ip(&["link", "set", "dev", &tap, "down"], None).await?;
        }
        Ok(())
    }

    /// Takes every TAP of this agent down: nothing gets in or out of any instance.
    pub async fn silence_all(&self) -> Result<(), NetworkError> {
        let batch: String =
            self.list().await?.iter().map(|tap| format!("link set dev {tap} down\n")).collect();
        if !batch.is_empty() {
            ip(&["-batch", "-"], Some(batch)).await?;
        }
        Ok(())
    }

    /// Removes a TAP, and with it its addresses and routes. One that is not there is no error.
    pub async fn remove(&self, tap: &str) -> Result<(), NetworkError> {
        if !self.exists(tap).await? {
            return Ok(());
        }
        match ip(&["link", "delete", "dev", tap], None).await {
            Ok(_) => Ok(()),
            // Somebody else was faster.
            Err(error) => {
                if self.exists(tap).await? {
                    Err(error)
                } else {
                    Ok(())
                }
            }
        }
    }

    /// Removes what is there whether or not an instance is: for a host that is a node no more.
    pub async fn unguard(&self) -> Result<(), NetworkError> {
        guard::take_down(&self.tag).await
    }

    /// Every TAP of this agent.
    pub async fn list(&self) -> Result<Vec<String>, NetworkError> {
        let arguments = ["-json", "link", "show"];
        let output = ip(&arguments, None).await?;
        let links: Vec<Link> = serde_json::from_slice(&output)
            .map_err(|source| NetworkError::Output { command: arguments.join(" "), source })?;
        let prefix = self.own_prefix();
        Ok(links.into_iter().map(|link| link.ifname).filter(|name| name.starts_with(&prefix)).collect())
    }

    async fn exists(&self, tap: &str) -> Result<bool, NetworkError> {
        Ok(self.list().await?.iter().any(|name| name == tap))
    }

    fn own_prefix(&self) -> String {
        format!("{PREFIX}{}", self.tag)
    }
}

async fn ip(arguments: &[&str], input: Option<String>) -> Result<Vec<u8>, NetworkError> {
    Tool::Ip.run(arguments, input).await
}

/// Lower-case letters and digits that follow from the bytes.
fn short_name(bytes: &[u8], chars: usize) -> String {
    let hash = Sha256::digest(bytes);
    let mut name = data_encoding::BASE32_DNSSEC.encode(&hash);
    name.truncate(chars);
    name
}

/// Whether a link has a name as the TAPs of agents have.
pub(crate) fn is_tap_name(name: &str) -> bool {
    name.len() == PREFIX.len() + TAG_CHARS + INSTANCE_CHARS && tag_of(name).is_some_and(is_tag)
}

/// The tag in a TAP's name.
pub(crate) fn tag_of(name: &str) -> Option<&str> {
    name.strip_prefix(PREFIX)?.get(..TAG_CHARS)
}

fn is_tag(text: &str) -> bool {
    text.len() == TAG_CHARS && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_fit_the_kernel_and_tell_agents_and_instances_apart() {
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let mut names = BTreeSet::new();
        for folder in &folders {
            let network = Network::open(folder.path()).unwrap();
            let again = Network::open(folder.path()).unwrap();
            for bits in 0..500 {
                let id = InstanceId::from_bits(bits);
                let name = network.tap_name(id);
                assert_eq!(name, again.tap_name(id));
                assert!(name.len() == 15 && name.starts_with("hf"), "{name}");
                assert!(name.bytes().all(|b| b.is_ascii_alphanumeric()), "{name}");
                names.insert(name);
            }
        }
        assert_eq!(names.len(), 1_000);
    }

    #[test]
    fn a_damaged_tag_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("network-tag"), "../x").unwrap();
        assert!(matches!(Network::open(folder.path()), Err(NetworkError::TagForm { .. })));
    }
}
