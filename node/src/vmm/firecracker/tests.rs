//! Firecracker itself is not run here: these tests hold the requests against the published API only. With the
//! real program: `node/tests/firecracker_api.rs`, where there is one.

use proptest::prelude::*;
use serde_json::json;

use super::shapes;
use super::*;
use crate::vmm::{Nic, VolumeDevice};

fn spec() -> VmSpec {
    VmSpec {
        instance_id: "inst_01".to_owned(),
        folder: "/vms/inst_01".into(),
        kernel: "/assets/vmlinux".into(),
        initrd: "/assets/initramfs.cpio".into(),
        root_image: Some("/images/root.erofs".into()),
        memory_mib: 128,
        vcpus: 2,
        cpu_milli: 2_000,
        nic: Some(Nic { tap: "hf0".to_owned(), mac: [2, 0x48, 0, 0, 0, 0x0a] }),
        volumes: vec![VolumeDevice { number: 7 }],
    }
}

#[test]
fn requests_carry_the_published_field_names_and_start_last() {
    let calls: Vec<(String, serde_json::Value)> =
        calls(&spec()).unwrap().into_iter().map(|call| (call.uri, call.body)).collect();
    let expected = [
        (
            "/machine-config",
            json!({"vcpu_count": 2, "mem_size_mib": 128, "smt": false, "track_dirty_pages": false}),
        ),
        (
            "/boot-source",
            json!({
                "kernel_image_path": "/assets/vmlinux",
                "initrd_path": "/assets/initramfs.cpio",
                "boot_args": KERNEL_COMMAND_LINE,
            }),
        ),
        (
            "/drives/root",
            json!({
                "drive_id": "root",
                "path_on_host": "/images/root.erofs",
                "is_root_device": false,
                "is_read_only": true,
                "rate_limiter": {
                    "bandwidth": {"size": DISK_BYTES_PER_SECOND_MAX, "refill_time": 1_000},
                    "ops": {"size": DISK_OPERATIONS_PER_SECOND_MAX, "refill_time": 1_000},
                },
            }),
        ),
        (
            "/drives/volume0",
            json!({
                "drive_id": "volume0",
                "path_on_host": "/dev/loop7",
                "is_root_device": false,
                "is_read_only": false,
                "cache_type": "Writeback",
                "rate_limiter": {
                    "bandwidth": {"size": DISK_BYTES_PER_SECOND_MAX, "refill_time": 1_000},
                    "ops": {"size": DISK_OPERATIONS_PER_SECOND_MAX, "refill_time": 1_000},
                },
            }),
        ),
        (
            "/network-interfaces/eth0",
            json!({"iface_id": "eth0", "host_dev_name": "hf0", "guest_mac": "02:48:00:00:00:0a"}),
        ),
        ("/vsock", json!({"guest_cid": 3, "uds_path": "/vms/inst_01/vmm/vsock.sock"})),
        ("/entropy", json!({})),
        ("/actions", json!({"action_type": "InstanceStart"})),
    ];
    let expected: Vec<_> = expected.into_iter().map(|(uri, body)| (uri.to_owned(), body)).collect();
    assert_eq!(calls, expected);
}

#[test]
fn a_machine_without_disk_and_card_asks_for_neither() {
    let bare = VmSpec { root_image: None, nic: None, volumes: Vec::new(), ..spec() };
    let uris: Vec<String> = calls(&bare).unwrap().into_iter().map(|call| call.uri).collect();
    assert_eq!(uris, ["/machine-config", "/boot-source", "/vsock", "/entropy", "/actions"]);
}

/// Any machine that the interface lets through.
fn any_spec() -> impl Strategy<Value = VmSpec> {
    let (memory, disk, nic) =
        (crate::vmm::MEMORY_MIB_MIN..=u32::MAX, any::<bool>(), any::<Option<[u8; 6]>>());
    ("[A-Za-z0-9_-]{1,64}", memory, 1..=VCPUS_MAX, disk, nic).prop_map(
        |(id, memory_mib, vcpus, disk, mac)| VmSpec {
            instance_id: id,
            memory_mib,
            vcpus,
            root_image: disk.then(|| "/images/root.erofs".into()),
            nic: mac.map(|mac| Nic { tap: "hf0".to_owned(), mac }),
            ..spec()
        },
    )
}

proptest! {
    #[test]
    fn i14_every_request_has_a_shape_that_is_published(spec in any_spec()) {
        prop_assert!(check(&spec).is_ok());
        for call in calls(&spec).unwrap() {
            let judged = shapes::check(&call.uri, &call.body);
            prop_assert!(judged.is_ok(), "PUT {}: {}", call.uri, judged.unwrap_err());
        }
    }
}

#[test]
fn what_has_another_shape_is_noticed() {
    let wrong = [
        ("/machine-config", json!({"vcpu_count": 33, "mem_size_mib": 128})),
        ("/machine-config", json!({"vcpu_count": 0, "mem_size_mib": 128})),
        ("/machine-config", json!({"vcpu_count": "2", "mem_size_mib": 128})),
        ("/machine-config", json!({"mem_size_mib": 128})),
        ("/machine-config", json!({"vcpu_count": 2, "mem_size_mib": 128, "cpus": 1})),
        ("/machine-config", json!([])),
        ("/drives/root", json!({"drive_id": "other", "is_root_device": false})),
        (
            "/drives/root",
            json!({"drive_id": "root", "is_root_device": false, "rate_limiter": {"bandwidth": {"size": 1}}}),
        ),
        ("/vsock", json!({"guest_cid": 2, "uds_path": "/x"})),
        ("/actions", json!({"action_type": "Start"})),
        ("/drives", json!({})),
        ("/nothing", json!({})),
    ];
    for (uri, body) in wrong {
        assert!(shapes::check(uri, &body).is_err(), "PUT {uri} {body}");
    }
}

#[test]
fn a_machine_that_firecracker_does_not_make_is_refused_before_anything_is_made() {
    let large = VmSpec { vcpus: VCPUS_MAX + 1, ..spec() };
    assert!(large.check().is_ok(), "other back-ends make it");
    assert!(matches!(check(&large), Err(VmmError::Spec { .. })));
}
