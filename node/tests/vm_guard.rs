//! What a guest may send, tried from inside one: the metadata address of a cloud, another tenant behind a host that
//! forwards, more than its share of the network. Each is tried without the guard as well, where it must succeed.
//!
//! Needs root, and what `cargo xtask assets` makes and installs. The network is a namespace of the test's own.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod guest_image;
mod namespace;

use std::collections::VecDeque;
use std::net::Ipv6Addr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use guest_image::{FileSystem, assets, jails, root_image};
use holdfast_model::InstanceId;
use holdfast_node::network::guard::{Rate, TABLE_PREFIX};
use holdfast_node::network::{GATEWAY, MTU, Network};
use holdfast_node::step::unheard;
use holdfast_node::vmm::channel::{
    ChannelAddress, GuestChannel, GuestConfig, GuestEvent, GuestReceiver, NetworkConfig, Workload,
};
use holdfast_node::vmm::{Nic, VmSpec};
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;

/// A guard against hanging.
const PATIENCE: Duration = Duration::from_secs(240);

const GUEST: Ipv6Addr = Ipv6Addr::new(0xfd48, 1, 2, 3, 0, 0, 0, 7);
/// The IPv4 address that the guest gives itself.
const LINK_LOCAL: &str = "169.254.7.7";
const HOST: Ipv6Addr = Ipv6Addr::new(0xfd48, 1, 2, 3, 0, 0, 0, 1);

/// What the guest sends in each round, and what the host takes at most when it is bounded: less, so that the bound shows.
const SENT_BYTES: usize = 1_000_000;

/// Rounds that were under way when something changed do not count.
const ROUNDS_SKIPPED: usize = 2;

fn script() -> String {
    format!(
        "ip address add {LINK_LOCAL}/16 dev eth0; while :; do \
         if nc -w 1 169.254.169.254 80 </dev/null >/dev/null 2>&1; then echo metadata reached; else echo metadata refused; fi; \
         ping -6 -c 1 -W 1 fd00:99::2 >/dev/null 2>&1; \
         head -c {SENT_BYTES} /dev/zero | timeout 3 nc {HOST} 9000 >/dev/null 2>&1; \
         echo round; done"
    )
}

fn tool(program: &str, arguments: &str) -> String {
    let output = Command::new(program)
        .args(arguments.split(' '))
        .output()
        .expect("iproute2 and nftables must be installed");
    assert!(output.status.success(), "{program} {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Packets that the rules of a table's chain have counted, one number for each rule that counts.
fn counted(table: &str, chain: &str) -> Vec<u64> {
    let list: serde_json::Value =
        serde_json::from_str(&tool("nft", &format!("-j list chain inet {table} {chain}"))).unwrap();
    let rules = list["nftables"].as_array().unwrap().iter().filter_map(|item| item.get("rule"));
    let parts = rules.flat_map(|rule| rule["expr"].as_array().unwrap());
    parts.filter_map(|part| part.pointer("/counter/packets")?.as_u64()).collect()
}

/// A host with something at the metadata address, with a neighbour behind it, and which forwards.
fn host() {
    for arguments in [
        "address add 169.254.169.254/32 dev lo",
        "address add fd48:1:2:3::1/128 dev lo",
        "tuntap add dev far0 mode tap",
        "link set dev far0 up",
        "-6 address add fd00:99::1/64 dev far0 nodad",
    ] {
        tool("ip", arguments);
    }
    std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
    for arguments in [
        "add table inet far",
        "add chain inet far away { type filter hook postrouting priority 0 ; }",
        "add rule inet far away oifname far0 ip6 daddr fd00:99::2 counter",
    ] {
        tool("nft", arguments);
    }
}

/// The guest's lines.
struct Rounds(GuestReceiver);

impl Rounds {
    /// The next rounds, each `true` if the metadata address was reached.
    async fn next(&mut self, count: usize) -> VecDeque<bool> {
        let (mut rounds, mut reached) = (VecDeque::new(), false);
        while rounds.len() < count {
            match self.0.recv().await.unwrap() {
                // What a test that hangs is looked for with.
                GuestEvent::Log(line) => match heard(&line.bytes) {
                    "metadata reached" => reached = true,
                    "metadata refused" => reached = false,
                    "round" => rounds.push_back(reached),
                    // The shell says that it ended a program.
                    "Terminated" => {}
                    other => panic!("{other}"),
                },
                GuestEvent::ConfigApplied | GuestEvent::Ready { .. } => {}
                other => panic!("{other:?}"),
            }
        }
        rounds
    }
}

fn heard(line: &[u8]) -> &str {
    let line = std::str::from_utf8(line).unwrap().trim();
    eprintln!("guest: {line}");
    line
}

#[test]
fn i09_i14_a_guest_reaches_no_metadata_no_neighbour_and_sends_no_more_than_its_share() {
    if !namespace::inside("i09_i14_a_guest_reaches_no_metadata_no_neighbour_and_sends_no_more_than_its_share")
    {
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(PATIENCE, tries()).await.expect("the guest must answer") });
}

async fn tries() {
    host();
    let folder = tempfile::Builder::new().prefix("hf-vm-").tempdir().unwrap();
    let id = InstanceId::from_bits(7);
    let network = Network::open(folder.path()).unwrap().with_rate(Rate::megabits(1).unwrap());
    let tap = network.ensure(id, GUEST, &unheard()).await.unwrap();
    let table = format!("{TABLE_PREFIX}{}", &tap[2..6]);
    // As on a host that would answer: only the guard is between it and the guest.
    tool("ip", &format!("route add {LINK_LOCAL}/32 dev {tap}"));
    let metadata = TcpListener::bind("169.254.169.254:80").await.unwrap();
    tokio::spawn(async move { while metadata.accept().await.is_ok() {} });
    let sink = TcpListener::bind((HOST, 9_000)).await.unwrap();
    let (told, mut taken) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = sink.accept().await {
            let told = told.clone();
            tokio::spawn(async move {
                let (mut bytes, mut buffer) = (0, vec![0; 65_536]);
                while let Ok(read) = stream.read(&mut buffer).await
                    && read > 0
                {
                    bytes += read;
                }
                told.send(bytes).ok();
            });
        }
    });
    let vm = start(folder.path(), &tap).await;
    let mut rounds = Rounds(configure(&vm.channel()).await);

    // Behind the guard, from the first packet on.
    let walled = rounds.next(2).await;
    assert!(!walled.contains(&true), "{walled:?}");
    let counts = counted(&table, "guests");
    let [_, _, flood] = counts[..] else { panic!("{counts:?}") };
    assert!(flood > 0, "what was too much is dropped");
    let onward = counted(&table, "onward");
    assert!(onward[0] > 0, "what was to be forwarded is dropped");
    assert_eq!(counted("far", "away"), [0], "nothing has gone on");

    // Without it.
    tool("nft", &format!("delete table inet {table}"));
    std::fs::write(format!("/proc/sys/net/ipv4/conf/{tap}/arp_ignore"), "0").unwrap();
    tool("tc", &format!("qdisc delete dev {tap} root"));
    while !rounds.next(1).await[0] {}
    rounds.next(1).await;
    assert!(counted("far", "away")[0] > 0, "the neighbour is reached");
    let mut most = 0;
    while let Ok(bytes) = taken.try_recv() {
        most = most.max(bytes);
    }
    assert_eq!(most, SENT_BYTES, "all that was sent has come");

    // And behind it again, with everything that the guest has learnt meanwhile.
    network.ensure(id, GUEST, &unheard()).await.unwrap();
    rounds.next(ROUNDS_SKIPPED).await;
    let gone_on = counted("far", "away");
    let dropped = counted(&table, "guests");
    let walled = rounds.next(2).await;
    assert!(!walled.contains(&true), "{walled:?}");
    assert_eq!(counted("far", "away"), gone_on);
    let now = counted(&table, "guests");
    assert!(now[0] > dropped[0], "IPv4 is dropped by the filter: {dropped:?} {now:?}");
    vm.kill().await.unwrap();
    // A host that is a node no more keeps none of it.
    network.unguard().await.unwrap();
    network.unguard().await.unwrap();
    assert!(!tool("nft", "list tables").contains(&table));
}

async fn start(folder: &Path, tap: &str) -> holdfast_node::vmm::Vm {
    let assets = assets();
    let spec = VmSpec {
        instance_id: "inst_guard".to_owned(),
        folder: folder.join("inst_guard"),
        kernel: assets.kernel,
        initrd: assets.initrd,
        root_image: Some(root_image(folder, FileSystem::Erofs)),
        memory_mib: 128,
        vcpus: 1,
        cpu_milli: 1_000,
        nic: Some(Nic::for_address(tap, GUEST)),
        volumes: Vec::new(),
    };
    guest_image::vmm(jails(folder)).start(&spec).await.unwrap()
}

async fn configure(address: &ChannelAddress) -> GuestReceiver {
    let GuestChannel { sender, receiver, .. } = GuestChannel::connect(address, 0, PATIENCE).await.unwrap();
    let config = GuestConfig {
        instance_id: "inst_guard".to_owned(),
        hostname: "guest".to_owned(),
        now_unix_ms: 1_900_000_000_000,
        network: Some(NetworkConfig { address: GUEST, gateway: GATEWAY, mtu: MTU, nameservers: vec![HOST] }),
        root_disk: true,
        workload: Workload {
            argv: ["sh".to_owned(), "-c".to_owned(), script()].to_vec(),
            env: vec![("PATH".to_owned(), "/bin".to_owned())],
            workdir: String::new(),
            user: String::new(),
        },
        secrets: None,
        volumes: Vec::new(),
    };
    sender.configure(&config).await.unwrap();
    // The channel lives as long as the test.
    Box::leak(Box::new(sender));
    receiver
}
