//! A real guest behind a real TAP device, in a network namespace that the test makes for itself.
//!
//! Needs root, and what `cargo xtask assets` makes and installs.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod guest_image;

use std::{net::Ipv6Addr, path::Path, process::Command, time::Duration};

use guest_image::{FileSystem, assets, jails, root_image};
use holdfast_node::vmm::{
    Nic, VmSpec,
    channel::{GuestChannel, GuestConfig, GuestEvent, HealthCheck, NetworkConfig, Workload},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// A guard against hanging.
const PATIENCE: Duration = Duration::from_secs(60);

const GUEST: Ipv6Addr = Ipv6Addr::new(0xfd48, 1, 2, 3, 0, 0, 0, 7);
const HOST: Ipv6Addr = Ipv6Addr::new(0xfd48, 1, 2, 3, 0, 0, 0, 1);

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().expect("`ip` must be installed");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// One thread, so that everything started here, the VMM too, is in the namespace of this thread.
#[tokio::test(flavor = "current_thread")]
async fn traffic_reaches_a_guest_through_its_tap_device() {
    assert!(rustix::process::geteuid().is_root(), "this test makes a network namespace and must run as root");
    // SAFETY: a plain system call; only this thread's network changes, and no other thread relies on it.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "{}", std::io::Error::last_os_error());
    ip("link set lo up");
    ip(&format!("address add {HOST}/128 dev lo"));
    ip("tuntap add hf0 mode tap");
    ip("address add fe80::1/64 dev hf0 nodad");
    ip("link set hf0 up");
    ip(&format!("-6 route add {GUEST}/128 dev hf0"));

    let folder = tempfile::Builder::new().prefix("hf-vm-").tempdir().unwrap();
    let assets = assets();
    let spec = VmSpec {
        instance_id: "inst_net".to_owned(),
        folder: folder.path().join("inst_net"),
        kernel: assets.kernel,
        initrd: assets.initrd,
        root_image: Some(root_image(folder.path(), FileSystem::Erofs)),
        memory_mib: 128,
        vcpus: 2,
        cpu_milli: 1_000,
        nic: Some(Nic::for_address("hf0", GUEST)),
        volumes: Vec::new(),
    };
    let vm = guest_image::vmm(jails(folder.path())).start(&spec).await.unwrap();
    let outcome = tokio::time::timeout(PATIENCE, talk(&vm.channel(), folder.path())).await;
    vm.kill().await.unwrap();
    outcome.expect("the guest must answer");
}

async fn talk(address: &holdfast_node::vmm::channel::ChannelAddress, folder: &Path) {
    let channel = GuestChannel::connect(address, 0, PATIENCE).await.unwrap();
    let GuestChannel { sender, mut receiver, .. } = channel;
    let script = "mkdir -p /tmp/www; echo 'from the guest' >/tmp/www/page; cat /etc/hosts; \
                  nproc; exec httpd -f -p [::]:8080 -h /tmp/www";
    let config = GuestConfig {
        instance_id: "inst_net".to_owned(),
        hostname: "guest".to_owned(),
        now_unix_ms: 1_900_000_000_000,
        network: Some(NetworkConfig {
            address: GUEST,
            gateway: Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1),
            mtu: 1420,
            nameservers: vec![HOST],
        }),
        root_disk: true,
        workload: Workload {
            argv: ["sh", "-c", script].map(str::to_owned).to_vec(),
            env: vec![("PATH".to_owned(), "/bin".to_owned())],
            workdir: String::new(),
            user: String::new(),
        },
        secrets: None,
        volumes: Vec::new(),
    };
    sender.configure(&config).await.unwrap();
    let mut lines = Vec::new();
    while lines.len() < 4 {
        match receiver.recv().await.unwrap() {
            GuestEvent::Log(line) => lines.push(String::from_utf8(line.bytes).unwrap()),
            GuestEvent::ConfigApplied | GuestEvent::Ready { .. } => {}
            other => panic!("{other:?}, with the folder {}", folder.display()),
        }
    }
    assert_eq!(lines[2..], [format!("{GUEST} guest"), "2".to_owned()]);
    tokio::spawn(async move { receiver.recv().await });
    // Checked on the guest's own address, the one that its traffic arrives at.
    let check = HealthCheck::Http { port: 8080, path: "/page".to_owned() };
    while !sender.health(check.clone(), Duration::from_secs(5)).await.unwrap().healthy {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Through the TAP, from an address that is not on the link, so that the guest's default route is used.
    let mut stream = TcpStream::connect((GUEST, 8080)).await.unwrap();
    assert_eq!(stream.local_addr().unwrap().ip(), HOST);
    stream.write_all(b"GET /page HTTP/1.0\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.ends_with("from the guest\n"), "{answer}");
}
