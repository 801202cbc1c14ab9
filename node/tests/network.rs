//! TAP devices of microVMs, in a network namespace of the test's own.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod namespace;

use std::net::Ipv6Addr;
use std::process::Command;

use holdfast_model::InstanceId;
use holdfast_node::network::{MTU, Network};
use holdfast_node::step::unheard;

const ADDRESS: Ipv6Addr = Ipv6Addr::new(0xfd00, 1, 2, 3, 0, 0, 0, 5);

fn ip(arguments: &[&str]) -> String {
    let output = Command::new("ip").args(arguments).output().expect("iproute2 must be installed");
    assert!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn setting(tap: &str, name: &str) -> String {
    std::fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{tap}/{name}")).unwrap().trim().to_owned()
}

fn check_complete(tap: &str) {
    let link = ip(&["link", "show", "dev", tap]);
    assert!(link.contains(&format!("mtu {MTU}")) && link.contains("UP"), "{link}");
    let addresses = ip(&["-6", "-brief", "address", "show", "dev", tap]);
    // The gateway's address and no other: none that the kernel made up.
    assert_eq!(addresses.split_whitespace().skip(2).collect::<Vec<_>>(), ["fe80::1/64"], "{addresses}");
    assert!(!ip(&["-6", "address", "show", "dev", tap]).contains("tentative"));
    let route = ip(&["-6", "route", "show", &format!("{ADDRESS}/128")]);
    assert!(route.contains(&format!("dev {tap}")), "{route}");
    assert_eq!((setting(tap, "accept_ra"), setting(tap, "accept_dad")), ("0".to_owned(), "0".to_owned()));
}

#[test]
fn taps_are_completed_kept_apart_and_removed_whole() {
    if !namespace::inside("taps_are_completed_kept_apart_and_removed_whole") {
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let [one, other] = folders.each_ref().map(|folder| Network::open(folder.path()).unwrap());
        let id = InstanceId::from_bits(77);

        let tap = one.ensure(id, ADDRESS, &unheard()).await.unwrap();
        check_complete(&tap);
        // Again, and after it was only half made.
        assert_eq!(one.ensure(id, ADDRESS, &unheard()).await.unwrap(), tap);
        check_complete(&tap);
        ip(&["link", "delete", "dev", &tap]);
        ip(&["tuntap", "add", "dev", &tap, "mode", "tap"]);
        one.ensure(id, ADDRESS, &unheard()).await.unwrap();
        check_complete(&tap);

        // While no machine is behind it, whoever connects is told at once.
        one.silence(id).await.unwrap();
        one.silence(id).await.unwrap();
        let refused = std::net::TcpStream::connect((ADDRESS, 80)).map(drop).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::NetworkUnreachable);
        one.ensure(id, ADDRESS, &unheard()).await.unwrap();
        check_complete(&tap);

        let others = other.ensure(id, Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0, 1), &unheard()).await.unwrap();
        assert_ne!(others, tap);
        assert_eq!(one.list().await.unwrap(), std::slice::from_ref(&tap));
        assert_eq!(other.list().await.unwrap(), std::slice::from_ref(&others));

        for _ in 0..2 {
            one.remove(&tap).await.unwrap();
        }
        other.remove(&others).await.unwrap();
        assert!(one.list().await.unwrap().is_empty() && other.list().await.unwrap().is_empty());
        let left = ip(&["-6", "route", "show", "table", "all"]);
        assert!(!left.contains("fd00:") && !left.contains("hf"), "{left}");
    });
}
