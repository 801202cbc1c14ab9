//! An instance for unit tests.

use std::collections::BTreeMap;
use std::net::Ipv6Addr;

use holdfast_model::InstanceId;
use holdfast_model::agent::{Desired, NodeInstance};
use holdfast_model::manifest::{Resources, Restart, RestartPolicy};
use holdfast_model::resource::{Image, ImageDigest};

/// The n-th instance, wanted.
pub(crate) fn instance(n: u128) -> NodeInstance {
    NodeInstance {
        id: InstanceId::from_bits(n),
        org: "acme".parse().unwrap(),
        app: "shop".parse().unwrap(),
        env: "production".parse().unwrap(),
        process: "web".parse().unwrap(),
        image: Image {
            repository: "127.0.0.1:5000/shop".to_owned(),
            digest: ImageDigest::from_bytes([7; 32]),
        },
        command: None,
        workdir: None,
        user: None,
        vars: BTreeMap::new(),
        resources: Resources { memory_mib: 64, cpu_milli: 1_000, disk_mib: 1_024 },
        ports: Vec::new(),
        health: None,
        restart: Restart { policy: RestartPolicy::Always, max_retries: 3, backoff_ms: 2_000 },
        address: Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, u16::try_from(n).unwrap_or(u16::MAX)),
        desired: Desired::Run,
        volumes: Vec::new(),
    }
}
