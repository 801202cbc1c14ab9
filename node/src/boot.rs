//! What a guest is told to run, from what is desired and from what its image says.
//!
//! A manifest's own choice wins over the image's; a plain variable wins over the image's of the same name.

use std::collections::BTreeMap;

use holdfast_model::agent::NodeInstance;

use crate::image::{RootError, RootImage};
use crate::network::{GATEWAY, MTU};
use crate::vmm::channel::{GuestConfig, NetworkConfig, VolumeMount, Workload};

/// `PATH` for an image that sets none.
const PATH_DEFAULT: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why a guest's configuration could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// There is nothing to run.
    #[error(
        "Neither the manifest nor the image names a command; add `command` to the process in holdfast.toml."
    )]
    NoCommand,
    /// The user does not exist.
    #[error("The user '{user}' of the manifest cannot be used in this image.")]
    User {
        /// As in the manifest.
        user: String,
        /// Why not.
        #[source]
        source: RootError,
    },
}

/// The configuration of an instance's guest. `now_unix_ms` sets the guest's clock.
pub fn guest_config(
    spec: &NodeInstance,
    root: &RootImage,
    now_unix_ms: u64,
) -> Result<GuestConfig, BootError> {
    let argv = match &spec.command {
        Some(command) => command.clone(),
        None => root.config.command(),
    };
    if argv.is_empty() {
        return Err(BootError::NoCommand);
    }
    let user = match &spec.user {
        Some(user) => {
            root.resolve_user(user).map_err(|source| BootError::User { user: user.clone(), source })?
        }
        None => root.config.user.clone(),
    };
    let mut variables: BTreeMap<&str, &str> =
        BTreeMap::from([("PATH", PATH_DEFAULT), ("HOME", user.home.as_str())]);
    variables.extend(root.config.env.iter().map(|(key, value)| (key.as_str(), value.as_str())));
    variables.extend(spec.vars.iter().map(|(key, value)| (key.as_str(), value.as_str())));
    let instance_id = spec.id.to_string();
    Ok(GuestConfig {
        hostname: instance_id.replace('_', "-"),
        instance_id,
        now_unix_ms,
        network: Some(NetworkConfig {
            address: spec.address,
            gateway: GATEWAY,
            mtu: MTU,
            nameservers: Vec::new(),
        }),
        root_disk: true,
        workload: Workload {
            argv,
            env: variables.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
            workdir: spec.workdir.clone().unwrap_or_else(|| root.config.workdir.clone()),
            // By number: the guest need not look it up again.
            user: format!("{}:{}", user.uid, user.gid),
        },
        secrets: None,
        volumes: spec
            .volumes
            .iter()
            .map(|volume| VolumeMount { path: volume.path.clone(), read_only: volume.read_only })
            .collect(),
    })
}
