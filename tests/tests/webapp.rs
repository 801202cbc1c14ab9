//! The demo's app, as a tenant's image: built static, pushed, pulled, unpacked, run from its own root alone.
//!
//! Needs Debian's `docker-registry` and `erofs-utils`, and root for the change of root.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on shall panic")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use holdfast_node::image::{ImageCache, RegistryClient};
use holdfast_tests::oci::Registry;
use holdfast_tests::oci::webapp::{WebappTls, push};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

const HOSTNAME: &str = "app.example";
/// Keeps a test from hanging for ever; no test depends on it.
const HANG_GUARD: Duration = Duration::from_secs(120);

/// The app, run as its image says, in its image's root.
struct App {
    child: Child,
    log: BufReader<ChildStdout>,
    address: String,
}

impl App {
    fn start(root: &Path, command: &[String], env: &[(String, String)]) -> App {
        let mut child = Command::new("chroot")
            .arg("--userspec=1000:1000")
            .arg(root)
            .args(command)
            .env_clear()
            .envs(env.iter().cloned())
            .env("PATH", "/usr/sbin:/usr/bin")
            .env("LISTEN", "127.0.0.1:0")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let log = BufReader::new(child.stdout.take().unwrap());
        let mut app = App { child, log, address: String::new() };
        app.address = app.log_line().strip_prefix("listening on ").expect("it listens").to_owned();
        app
    }

    fn log_line(&mut self) -> String {
        let mut line = String::new();
        self.log.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn connect(&self, ca_pem: &str) -> StreamOwned<ClientConnection, TcpStream> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(ca_pem.as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from(HOSTNAME).unwrap();
        let tcp = TcpStream::connect(&self.address).unwrap();
        tcp.set_read_timeout(Some(HANG_GUARD)).unwrap();
        StreamOwned::new(ClientConnection::new(Arc::new(config), name).unwrap(), tcp)
    }

    fn signal(&self) {
        let status = Command::new("kill").arg(self.child.id().to_string()).status().unwrap();
        assert!(status.success());
    }
}

impl Drop for App {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_to_close(stream: &mut impl Read) -> String {
    let mut text = Vec::new();
    stream.read_to_end(&mut text).unwrap();
    String::from_utf8(text).unwrap()
}

#[tokio::test]
async fn the_app_runs_from_its_image_alone() {
    let registry = Registry::start().await.unwrap();
    let tls = WebappTls::generate(HOSTNAME).unwrap();
    let first = push(registry.host(), "demo/webapp", "1", &tls).await.unwrap();
    let second = push(registry.host(), "demo/webapp", "2", &tls).await.unwrap();
    assert_ne!(first.digest, second.digest);

    let folder = tempfile::tempdir().unwrap();
    let client = RegistryClient::new(Default::default()).unwrap();
    let resolved = client.resolve(&first.reference.parse().unwrap()).await.unwrap();
    let cache = ImageCache::open(&folder.path().join("cache")).unwrap();
    let root = cache.ensure(&resolved.reference, &|_| {}).await.unwrap();
    assert_eq!((root.config.user.uid, root.config.user.gid), (1000, 1000));
    let extracted = folder.path().join("root");
    let unpacked =
        Command::new("fsck.erofs").arg(format!("--extract={}", extracted.display())).arg(&root.path).status();
    assert!(unpacked.unwrap().success());
    // The app's user must be able to reach it there.
    std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();

    let mut app = App::start(&extracted, &root.config.command(), &root.config.env);
    let mut stream = app.connect(&tls.ca_pem);
    stream.write_all(b"GET / HTTP/1.1\r\nHost: app.example\r\n\r\n").unwrap();
    let mut begun = [0; 15];
    stream.read_exact(&mut begun).unwrap();
    assert_eq!(&begun, b"HTTP/1.1 200 OK");
    stream.write_all(b"GET /healthz HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
    let rest = read_to_close(&mut stream);
    let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    assert!(rest.contains(&format!("hello from release 1 instance {}\n", hostname.trim())), "{rest}");
    assert!(rest.ends_with("ok\n"), "{rest}");
    assert_eq!(
        (app.log_line(), app.log_line().as_str()),
        (format!("GET / 200 {}", 33 - 2 + hostname.trim().len()), "GET /healthz 200 3")
    );

    // Stopped in the middle of an answer, it finishes the answer and then itself.
    let mut slow = app.connect(&tls.ca_pem);
    slow.write_all(b"GET /big?bytes=20000000 HTTP/1.1\r\n\r\n").unwrap();
    slow.read_exact(&mut begun).unwrap();
    app.signal();
    let rest = read_to_close(&mut slow);
    assert_eq!(rest.split_once("\r\n\r\n").unwrap().1.len(), 20_000_000);
    assert!(app.child.wait().unwrap().success());

    let mut app = App::start(&extracted, &root.config.command(), &root.config.env);
    let mut stream = app.connect(&tls.ca_pem);
    stream.write_all(b"GET /crash HTTP/1.1\r\n\r\n").unwrap();
    let aborted = app.child.wait().unwrap();
    assert_eq!(aborted.signal(), Some(6), "{aborted}");
}
