//! The bytes of a [`NodeInstance`], on streams and in replicas: without volumes they are those of every earlier release.
//! With volumes, what is desired is of a kind that earlier agents do not know; members do not send it to them.

use super::{Desired, NodeInstance};
use crate::manifest::{Health, Port, Resources, Restart};
use crate::resource::Image;
use crate::volume::NodeVolume;
use crate::{AppName, EnvName, InstanceId, OrgName, ProcessName};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::Ipv6Addr;

/// A [`NodeInstance`], field by field.
#[derive(Serialize, Deserialize)]
pub(super) struct Instance {
    id: InstanceId,
    org: OrgName,
    app: AppName,
    env: EnvName,
    process: ProcessName,
    image: Image,
    command: Option<Vec<String>>,
    workdir: Option<String>,
    user: Option<String>,
    vars: BTreeMap<String, String>,
    resources: Resources,
    ports: Vec<Port>,
    health: Option<Health>,
    restart: Restart,
    address: Ipv6Addr,
    desired: DesiredWith,
}

/// What is desired, and the volumes for it.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum DesiredWith {
    Run,
    Drain { grace_ms: u64 },
    RunWith { volumes: Vec<NodeVolume> },
    DrainWith { grace_ms: u64, volumes: Vec<NodeVolume> },
}

impl From<NodeInstance> for Instance {
    fn from(instance: NodeInstance) -> Self {
        let volumes = instance.volumes;
        let desired = match (instance.desired, volumes.is_empty()) {
            (Desired::Run, true) => DesiredWith::Run,
            (Desired::Run, false) => DesiredWith::RunWith { volumes },
            (Desired::Drain { grace_ms }, true) => DesiredWith::Drain { grace_ms },
            (Desired::Drain { grace_ms }, false) => DesiredWith::DrainWith { grace_ms, volumes },
        };
        Self {
            id: instance.id,
            org: instance.org,
            app: instance.app,
            env: instance.env,
            process: instance.process,
            image: instance.image,
            command: instance.command,
            workdir: instance.workdir,
            user: instance.user,
            vars: instance.vars,
            resources: instance.resources,
            ports: instance.ports,
            health: instance.health,
            restart: instance.restart,
            address: instance.address,
            desired,
        }
    }
}

impl From<Instance> for NodeInstance {
    fn from(wire: Instance) -> Self {
        let (desired, volumes) = match wire.desired {
            DesiredWith::Run => (Desired::Run, Vec::new()),
            DesiredWith::Drain { grace_ms } => (Desired::Drain { grace_ms }, Vec::new()),
            DesiredWith::RunWith { volumes } => (Desired::Run, volumes),
            DesiredWith::DrainWith { grace_ms, volumes } => (Desired::Drain { grace_ms }, volumes),
        };
        Self {
            id: wire.id,
            org: wire.org,
            app: wire.app,
            env: wire.env,
            process: wire.process,
            image: wire.image,
            command: wire.command,
            workdir: wire.workdir,
            user: wire.user,
            vars: wire.vars,
            resources: wire.resources,
            ports: wire.ports,
            health: wire.health,
            restart: wire.restart,
            address: wire.address,
            desired,
            volumes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::VolumeId;
    use crate::manifest::RestartPolicy;
    use crate::resource::ImageDigest;

    /// What the release before volumes knew.
    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    enum DesiredBefore {
        Run,
        Drain { grace_ms: u64 },
    }

    fn instance(desired: Desired, volumes: Vec<NodeVolume>) -> NodeInstance {
        NodeInstance {
            id: InstanceId::from_bits(7),
            org: "acme".parse().unwrap(),
            app: "shop".parse().unwrap(),
            env: "prod".parse().unwrap(),
            process: "web".parse().unwrap(),
            image: Image { repository: "r.test/shop".into(), digest: ImageDigest::from_bytes([7; 32]) },
            command: None,
            workdir: None,
            user: Some("web".into()),
            vars: BTreeMap::new(),
            resources: Resources { memory_mib: 64, cpu_milli: 1_000, disk_mib: 1_024 },
            ports: Vec::new(),
            health: None,
            restart: Restart { policy: RestartPolicy::Always, max_retries: 3, backoff_ms: 2_000 },
            address: Ipv6Addr::LOCALHOST,
            desired,
            volumes,
        }
    }

    #[test]
    fn without_volumes_the_bytes_end_as_they_always_did() {
        for (desired, before) in [
            (Desired::Run, DesiredBefore::Run),
            (Desired::Drain { grace_ms: 300 }, DesiredBefore::Drain { grace_ms: 300 }),
        ] {
            let bytes = postcard::to_stdvec(&instance(desired, Vec::new())).unwrap();
            let end = postcard::to_stdvec(&before).unwrap();
            assert!(bytes.ends_with(&end), "{before:?}");
            // The address is 16 bytes behind its kind, and what is desired follows it at once.
            let rest = &bytes[..bytes.len() - end.len()];
            assert!(rest.ends_with(&Ipv6Addr::LOCALHOST.octets()), "{before:?}");
            assert_eq!(postcard::from_bytes::<NodeInstance>(&bytes).unwrap(), instance(desired, Vec::new()));
        }
    }

    #[test]
    fn volumes_travel_with_what_is_desired() {
        let volume = NodeVolume {
            id: VolumeId::from_bits(3),
            generation: 9,
            size_mib: 64,
            fresh: true,
            path: "/data".into(),
            read_only: false,
        };
        for desired in [Desired::Run, Desired::Drain { grace_ms: 5 }] {
            let sent = instance(desired, vec![volume.clone()]);
            let bytes = postcard::to_stdvec(&sent).unwrap();
            assert_eq!(postcard::from_bytes::<NodeInstance>(&bytes).unwrap(), sent);
        }
    }
}
