//! A tiny TLS web server that tests and the demo deploy as a tenant's app.
//!
//! ```text
//! webapp [CERTIFICATE KEY]     else $TLS_CERTIFICATE and $TLS_KEY; listens on $LISTEN, [::]:8443 by default
//! GET /               hello from release <$RELEASE> instance <hostname>
//! GET /healthz        ok
//! GET /big?bytes=N    N bytes
//! GET /crash          the process aborts
//! GET /run/secrets/…  mode, owner and content of the file
//! ```
//!
//! Plain threads and rustls, so that it links static and starts at once in a microVM without a runtime. Threads,
//! buffers and waits are bounded. SIGTERM ends it without breaking a request: connections that are there are
//! answered, new ones are no longer taken. One line on standard output for each request.

mod drain;
mod http;

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustls::{ServerConfig, ServerConnection, StreamOwned};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::drain::Drain;
use crate::http::Identity;

const LISTEN_DEFAULT: &str = "[::]:8443";
const CERTIFICATE_DEFAULT: &str = "/app/tls/certificate.pem";
const KEY_DEFAULT: &str = "/app/tls/key.pem";
/// Connections served at once, at most; more wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 128;
const STACK_BYTES: usize = 256 * 1024;
/// How long a stop may take before what is left is cut.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(20);

type AnyError = Box<dyn std::error::Error + Send + Sync>;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("webapp: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), AnyError> {
    let setting = |name: &str, default: &str| std::env::var(name).unwrap_or_else(|_| default.to_owned());
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let certificate =
        arguments.next().unwrap_or_else(|| setting("TLS_CERTIFICATE", CERTIFICATE_DEFAULT).into());
    let key = arguments.next().unwrap_or_else(|| setting("TLS_KEY", KEY_DEFAULT).into());
    let identity = Arc::new(Identity {
        release: setting("RELEASE", "unknown"),
        instance: rustix::system::uname().nodename().to_string_lossy().into_owned(),
    });
    let tls = Arc::new(tls_config(&certificate, &key)?);
    let listener = TcpListener::bind(setting("LISTEN", LISTEN_DEFAULT))?;
    let address = listener.local_addr()?;
    let drain = Arc::new(Drain::new(CONNECTIONS_MAX));
    drain_on_signal(Arc::clone(&drain), address)?;
    http::log(format_args!("listening on {address}"));
    accept(&listener, &tls, &identity, &drain)?;
    drop(listener);
    if !drain.wait_until_idle(DRAIN_TIME_MAX) {
        http::log(format_args!("stopped with connections still open"));
    }
    Ok(())
}

fn tls_config(certificate: &Path, key: &Path) -> Result<ServerConfig, AnyError> {
    let named = |path: &Path, error: rustls_pki_types::pem::Error| format!("{}: {error}", path.display());
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| named(certificate, error))?;
    let key = PrivateKeyDer::from_pem_file(key).map_err(|error| named(key, error))?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// On SIGTERM: no more waiting for requests that have not begun, and a connection of our own to wake `accept`.
fn drain_on_signal(drain: Arc<Drain>, address: SocketAddr) -> io::Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([SIGTERM, SIGINT])?;
    thread::Builder::new().name("signals".into()).stack_size(STACK_BYTES).spawn(move || {
        if signals.forever().next().is_some() {
            drain.begin();
            let mut target = address;
            if target.ip().is_unspecified() {
                target.set_ip(std::net::Ipv6Addr::LOCALHOST.into());
            }
            // If it fails the listener's queue is full, so accept is about to wake anyway.
            let _ = TcpStream::connect_timeout(&target, Duration::from_secs(1));
        }
    })?;
    Ok(())
}

/// Takes connections until the drain begins, then those that are already in the kernel's queue.
fn accept(
    listener: &TcpListener,
    tls: &Arc<ServerConfig>,
    identity: &Arc<Identity>,
    drain: &Arc<Drain>,
) -> io::Result<()> {
    loop {
        let slot = drain.acquire();
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && drain.has_begun() => return Ok(()),
            // The peer went away while it waited, or descriptors are short for a moment.
            Err(_) => {
                thread::sleep(Duration::from_millis(10));
                continue;
            }
        };
        if drain.has_begun() {
            listener.set_nonblocking(true)?;
            stream.set_nonblocking(false)?;
        }
        let (tls, identity, drain) = (Arc::clone(tls), Arc::clone(identity), Arc::clone(drain));
        thread::Builder::new().name("connection".into()).stack_size(STACK_BYTES).spawn(move || {
            let _slot = slot;
            // A peer that breaks off or speaks nonsense ends its own connection and nothing else.
            let _ = serve(stream, tls, &identity, &drain);
        })?;
    }
}

fn serve(
    stream: TcpStream,
    tls: Arc<ServerConfig>,
    identity: &Identity,
    drain: &Drain,
) -> Result<(), AnyError> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(http::POLL_TIME))?;
    stream.set_write_timeout(Some(http::WRITE_TIME_MAX))?;
    let mut stream = StreamOwned::new(ServerConnection::new(tls)?, stream);
    http::serve_connection(&mut stream, identity, drain)?;
    stream.conn.send_close_notify();
    Ok(stream.conn.complete_io(&mut stream.sock).map(drop)?)
}
