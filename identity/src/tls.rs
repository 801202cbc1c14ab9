//! The TLS configurations of every connection in a cluster. TLS 1.3 only, ring only, no session resumption.
//!
//! Resumption is off because a resumed session skips certificate verification, so an expired or revoked certificate
//! (I11) would live on in its tickets. A configuration holds the certificate that it was made with: after a renewal
//! the caller makes a new one and uses it for new connections.

use std::sync::Arc;

use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::server::{NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use crate::authority::CaCertificate;
use crate::certificate::Fingerprint;
use crate::credential::Credential;
use crate::subject::Role;
use crate::verify::{ClientRoleVerifier, MemberVerifier, PinnedVerifier};

/// The protocols of the API port, best first.
const API_PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// Why a TLS configuration could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// rustls refused a certificate, a key or the trust anchor.
    #[error("The TLS configuration was refused; check that key, certificate and authority belong together.")]
    Config(#[from] rustls::Error),
    /// rustls refused the authority as a trust anchor.
    #[error("The cluster authority cannot be used to verify peers; check its certificate file.")]
    Verifier(#[from] VerifierBuilderError),
}

/// For the API port: proves a member, accepts clients without a certificate, and refuses a certificate that is not
/// from this cluster. Who a client is says [`crate::peer_identity`].
///
/// # Errors
/// [`TlsError`] when the parts do not fit together.
pub fn server_config(credential: &Credential, ca: &CaCertificate) -> Result<Arc<ServerConfig>, TlsError> {
    let verifier =
        WebPkiClientVerifier::builder_with_provider(roots(ca)?, provider()).allow_unauthenticated();
    let allowed = &[Role::Member, Role::Node, Role::Edge];
    let verifier = ClientRoleVerifier { inner: verifier.build()?, cluster: ca.cluster().to_owned(), allowed };
    let mut config = server_with(credential, verifier)?;
    config.alpn_protocols = API_PROTOCOLS.iter().map(|protocol| protocol.to_vec()).collect();
    Ok(Arc::new(config))
}

/// For the Raft port: proves a member and accepts members of this cluster only.
///
/// # Errors
/// [`TlsError`] when the parts do not fit together.
pub fn mutual_server_config(
    credential: &Credential,
    ca: &CaCertificate,
) -> Result<Arc<ServerConfig>, TlsError> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(ca)?, provider());
    let allowed = &[Role::Member];
    let verifier = ClientRoleVerifier { inner: verifier.build()?, cluster: ca.cluster().to_owned(), allowed };
    Ok(Arc::new(server_with(credential, verifier)?))
}

/// For dialling a member's Raft port: proves a member and accepts members of this cluster only.
///
/// Dial with [`crate::member_server_name`] so that only the intended member is accepted.
///
/// # Errors
/// [`TlsError`] when the parts do not fit together.
pub fn mutual_client_config(
    credential: &Credential,
    ca: &CaCertificate,
) -> Result<Arc<ClientConfig>, TlsError> {
    Ok(Arc::new(client_with(ca, Some(credential))?))
}

/// For dialling the API: accepts members of this cluster only. Agents give their credential; people give none.
///
/// Dial with [`crate::server_name`] so that addresses may change.
///
/// # Errors
/// [`TlsError`] when the parts do not fit together.
pub fn client_config(
    ca: &CaCertificate,
    credential: Option<&Credential>,
) -> Result<Arc<ClientConfig>, TlsError> {
    let mut config = client_with(ca, credential)?;
    config.alpn_protocols = API_PROTOCOLS.iter().map(|protocol| protocol.to_vec()).collect();
    Ok(Arc::new(config))
}

/// For the very first contact of a joining machine, which knows the authority's fingerprint and nothing else.
///
/// # Errors
/// [`TlsError`] when the TLS version is not available.
pub fn pinned_client_config(pin: Fingerprint) -> Result<Arc<ClientConfig>, TlsError> {
    let provider = provider();
    let verifier = PinnedVerifier { pin, algorithms: provider.signature_verification_algorithms };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    config.alpn_protocols = API_PROTOCOLS.iter().map(|protocol| protocol.to_vec()).collect();
    Ok(Arc::new(config))
}

/// The one source of cryptography for TLS.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn roots(ca: &CaCertificate) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.der().clone())?;
    Ok(Arc::new(roots))
}

fn server_with(credential: &Credential, verifier: ClientRoleVerifier) -> Result<ServerConfig, TlsError> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_single_cert(credential.chain().to_vec(), credential.key().rustls())?;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

fn client_with(ca: &CaCertificate, credential: Option<&Credential>) -> Result<ClientConfig, TlsError> {
    let inner = WebPkiServerVerifier::builder_with_provider(roots(ca)?, provider()).build()?;
    let verifier = MemberVerifier { inner, cluster: ca.cluster().to_owned() };
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match credential {
        Some(credential) => {
            builder.with_client_auth_cert(credential.chain().to_vec(), credential.key().rustls())?
        }
        None => builder.with_no_client_auth(),
    };
    config.resumption = Resumption::disabled();
    Ok(config)
}
