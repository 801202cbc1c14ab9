//! TLS clients and servers of rustls, as peers of the edge.

use rcgen::{CertificateParams, KeyPair};
use rustls::client::ClientConnection;
use rustls::crypto::{ActiveKeyExchange, SharedSecret, SupportedKxGroup, ring};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, Error, NamedGroup, RootCertStore, ServerConfig};
use std::sync::Arc;

/// What a client offers.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Offer {
    /// A hybrid post-quantum key share beside the classical one.
    pub(crate) hybrid: bool,
    /// Records of at most so many bytes.
    pub(crate) fragment: Option<usize>,
    /// ALPN names of so many bytes in all.
    pub(crate) alpn_bytes: usize,
}

/// A server for one hostname, and the certificate that its clients trust.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) server: Arc<ServerConfig>,
    pub(crate) certificate: CertificateDer<'static>,
    /// The certificate for programs.
    pub(crate) certificate_pem: String,
    /// Its key for programs.
    pub(crate) key_pem: String,
}

pub(crate) fn identity(hostname: &str) -> Identity {
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec![hostname.to_owned()]).unwrap().self_signed(&key).unwrap();
    let der = certificate.der().clone();
    let private = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let server = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![der.clone()], private)
        .unwrap();
    let (certificate_pem, key_pem) = (certificate.pem(), key.serialize_pem());
    Identity { server: Arc::new(server), certificate: der, certificate_pem, key_pem }
}

pub(crate) fn client(trusted: &[&Identity], offer: Offer) -> Arc<ClientConfig> {
    let mut provider = ring::default_provider();
    if offer.hybrid {
        provider.kx_groups.insert(0, &X25519MlKem768Share);
    }
    let mut roots = RootCertStore::empty();
    for identity in trusted {
        roots.add(identity.certificate.clone()).unwrap();
    }
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.max_fragment_size = offer.fragment;
    config.alpn_protocols = vec![vec![b'x'; 250]; offer.alpn_bytes / 250];
    Arc::new(config)
}

/// The bytes of the hello that a client sends for `hostname`.
pub(crate) fn client_hello(hostname: &str, offer: Offer) -> Vec<u8> {
    let name = ServerName::try_from(hostname.to_owned()).unwrap();
    let mut connection = ClientConnection::new(client(&[], offer), name).unwrap();
    let mut hello = Vec::new();
    while connection.wants_write() {
        connection.write_tls(&mut hello).unwrap();
    }
    hello
}

/// Offers X25519MLKEM768 with a share of its true size, and completes only its classical half: our backends' provider
/// chooses that. The hello is rustls's own; what the ML-KEM bytes say does not matter to whoever carries them.
#[derive(Debug)]
struct X25519MlKem768Share;

struct Started {
    classical: Box<dyn ActiveKeyExchange>,
    share: Vec<u8>,
}

/// An encapsulation key of ML-KEM-768, in bytes (FIPS 203).
const MLKEM768_KEY_BYTES: usize = 1184;

impl SupportedKxGroup for X25519MlKem768Share {
    fn start(&self) -> Result<Box<dyn ActiveKeyExchange>, Error> {
        let classical = ring::kx_group::X25519.start()?;
        let mut share = vec![0; MLKEM768_KEY_BYTES];
        ring::default_provider().secure_random.fill(&mut share)?;
        share.extend_from_slice(classical.pub_key());
        Ok(Box::new(Started { classical, share }))
    }

    fn name(&self) -> NamedGroup {
        NamedGroup::X25519MLKEM768
    }
}

impl ActiveKeyExchange for Started {
    fn complete(self: Box<Self>, _peer: &[u8]) -> Result<SharedSecret, Error> {
        Err(Error::General("no backend of these tests chooses ML-KEM".into()))
    }

    fn hybrid_component(&self) -> Option<(NamedGroup, &[u8])> {
        Some((NamedGroup::X25519, self.classical.pub_key()))
    }

    fn complete_hybrid_component(self: Box<Self>, peer: &[u8]) -> Result<SharedSecret, Error> {
        self.classical.complete(peer)
    }

    fn pub_key(&self) -> &[u8] {
        &self.share
    }

    fn group(&self) -> NamedGroup {
        NamedGroup::X25519MLKEM768
    }
}
