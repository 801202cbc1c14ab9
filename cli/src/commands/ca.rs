//! Fetching the cluster's CA certificate from a member, trusted because its fingerprint was given.

use crate::failure::{Failure, with_sources};
use crate::session::endpoints;
use holdfast_client::Endpoint;
use holdfast_identity::{CaCertificate, Fingerprint, pinned_client_config, server_name};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// How long one member has to show its certificates.
const SHOW_MAX: Duration = Duration::from_secs(5);

/// The CA certificate with this fingerprint, as PEM.
///
/// # Errors
/// When no member of a cluster with that CA answers.
pub(crate) async fn fetch(servers: &[String], pin: &str) -> Result<String, Failure> {
    let pin: Fingerprint =
        pin.parse().map_err(|e: holdfast_identity::CertificateError| Failure::Usage(with_sources(&e)))?;
    let mut last = Failure::Usage("Name a member with --server.".into());
    for endpoint in endpoints(servers)? {
        match tokio::time::timeout(SHOW_MAX, show(&endpoint, pin)).await {
            Ok(Ok(pem)) => return Ok(pem),
            Ok(Err(failure)) => last = failure,
            Err(_) => last = Failure::Host(format!("{endpoint} did not answer in time.")),
        }
    }
    Err(last)
}

async fn show(endpoint: &Endpoint, pin: Fingerprint) -> Result<String, Failure> {
    let host = |what: &str, e: &dyn std::error::Error| {
        Failure::Host(format!("{endpoint} {what}: {}", with_sources(e)))
    };
    let config = pinned_client_config(pin).map_err(|e| host("cannot be checked", &e))?;
    // TLS wants a name; the pin is what is verified.
    let name = server_name("first-contact").map_err(|e| host("cannot be checked", &e))?;
    let stream = TcpStream::connect((endpoint.host(), endpoint.port())).await;
    let stream = stream.map_err(|e| host("cannot be reached", &e))?;
    let stream = TlsConnector::from(config).connect(name, stream).await;
    let stream = stream.map_err(|e| host("does not prove to belong to the cluster", &e))?;
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let found = chain.iter().find(|c| Fingerprint::of(c) == pin);
    let found = found.ok_or_else(|| Failure::Host(format!("{endpoint} showed no such CA.")))?;
    let ca =
        CaCertificate::from_der(found.clone().into_owned()).map_err(|e| host("showed an unusable CA", &e))?;
    Ok(ca.pem())
}
