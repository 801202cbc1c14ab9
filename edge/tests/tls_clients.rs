//! Clients that others wrote, through the edge, by the name that they ask for: OpenSSL, curl and GnuTLS.
//!
//! Each trusts the one backend's certificate alone and says what it heard, so that nobody else can have answered. Each
//! comes as it is, a byte a segment, and with its hello spread over many records; OpenSSL also spreads it itself.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may panic")]

mod support;

use std::net::SocketAddr;
use std::path::PathBuf;
use support::programs::{Between, How, listen_to};
use support::tls::{Identity, identity};
use support::world::{TLS_PORT, World, route, tls_backend};
use tempfile::TempDir;

const NAMES: [(&str, &str); 2] = [("a.example", "I am a"), ("b.example", "I am b")];

const HOW: [How; 3] = [How::AsTheyCome, How::OneByteASegment, How::InRecordsOf(RECORD)];
/// So short that every hello needs many, and that no name fits into the first.
const RECORD: usize = 7;

/// An edge with two names, and what a program needs to trust each.
struct Names {
    world: World,
    /// Keeps the certificates.
    _folder: TempDir,
    trusted: Vec<PathBuf>,
}

impl Names {
    async fn new() -> Self {
        let (mut world, folder) = (World::new().await, TempDir::new().unwrap());
        let (mut routes, mut trusted) = (Vec::new(), Vec::new());
        for (name, greeting) in NAMES {
            let identity: Identity = identity(name);
            let file = folder.path().join(name);
            std::fs::write(&file, &identity.certificate_pem).unwrap();
            trusted.push(file);
            routes.push(route(Some(name), &[tls_backend(&identity, greeting).await]));
        }
        world.publish(routes).await;
        Self { world, _folder: folder, trusted }
    }

    /// Asks for every name in every way by `arguments` of (where, name, trusted file); gives the number of records in which
    /// the edge saw the hellos.
    async fn ask(
        &self,
        program: &str,
        arguments: impl Fn(SocketAddr, &str, &str) -> Vec<String>,
    ) -> Vec<usize> {
        let mut records = Vec::new();
        for how in HOW {
            for ((name, greeting), trusted) in NAMES.into_iter().zip(&self.trusted) {
                let between = Between::start(self.world.address(TLS_PORT), how).await;
                let arguments = arguments(between.address, name, trusted.to_str().unwrap());
                let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
                let output = listen_to(program, &arguments, greeting).await;
                let (heard, complained) =
                    (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
                assert!(heard.contains(greeting), "{program} {arguments:?}: {heard}\n{complained}");
                records.push(between.hello_records());
            }
        }
        records
    }

    async fn closed(self, connections: u64) {
        let metrics = self.world.status().await.metrics;
        assert_eq!((metrics.hello_refused, metrics.no_server_name, metrics.no_route), (0, 0, 0));
        assert_eq!(metrics.accepted, connections);
    }
}

/// As the client sent it, in one record, is what was to be tested too; so is a spread one.
fn came_whole_and_spread(records: &[usize]) {
    let (whole, spread) = records.split_at(records.len() - NAMES.len());
    assert!(whole.iter().all(|records| *records == 1), "{whole:?}");
    assert!(spread.iter().all(|records| *records > 20), "{spread:?}");
}

fn words(line: String, more: &[&str]) -> Vec<String> {
    line.split(' ').map(str::to_owned).chain(more.iter().map(|word| (*word).to_owned())).collect()
}

/// Names of protocols that make a hello longer than the shortest record that a client can be told to write.
fn long_alpn() -> String {
    (0..12).map(|n| format!("{}{n}", "x".repeat(90))).collect::<Vec<_>>().join(",")
}

#[tokio::test]
async fn openssl_is_routed_by_name_also_with_a_hello_that_it_spreads_itself() {
    let names = Names::new().await;
    let line = |to: SocketAddr, name: &str, trusted: &str| {
        format!(
            "s_client -quiet -connect {to} -servername {name} -CAfile {trusted} -verify_return_error -verify_hostname {name}"
        )
    };
    let whole = names.ask("openssl", |to, name, trusted| words(line(to, name, trusted), &[])).await;
    came_whole_and_spread(&whole);
    let alpn = long_alpn();
    let more = ["-alpn", &alpn, "-max_send_frag", "512"];
    let spread = names.ask("openssl", |to, name, trusted| words(line(to, name, trusted), &more)).await;
    assert!(spread.iter().all(|records| *records >= 3), "{spread:?}: this tests one record alone");
    names.closed(12).await;
}

#[tokio::test]
async fn curl_is_routed_by_name() {
    let names = Names::new().await;
    // What the backend says is no HTTP: as HTTP/0.9 it is a body.
    let whole = names
        .ask("curl", |to, name, trusted| {
            let port = to.port();
            let line =
                format!("--silent --show-error --no-buffer --http0.9 --max-time 50 --cacert {trusted}");
            let to = format!("{name}:{port}:127.0.0.1");
            let url = format!("https://{name}:{port}/");
            words(line, &["--resolve", &to, &url])
        })
        .await;
    came_whole_and_spread(&whole);
    names.closed(6).await;
}

#[tokio::test]
async fn gnutls_is_routed_by_name() {
    let names = Names::new().await;
    let line = |to: SocketAddr, name: &str, trusted: &str| {
        let port = to.port();
        format!(
            "--sni-hostname={name} --verify-hostname={name} --x509cafile={trusted} --port={port} 127.0.0.1"
        )
    };
    let whole = names.ask("gnutls-cli", |to, name, trusted| words(line(to, name, trusted), &[])).await;
    came_whole_and_spread(&whole);
    names.closed(6).await;
}
