//! The verifiers behind [`crate::tls`]: rustls' own chain verification, then a check of the role and the cluster that
//! the certificate names. They only ever narrow what rustls accepts.

use std::fmt;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::server::ParsedCertificate;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore};
use rustls::{PeerIncompatible, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use crate::authority::CaCertificate;
use crate::certificate::{Fingerprint, peer_identity};
use crate::subject::Role;

/// Why a certificate with a good chain was refused all the same.
#[derive(thiserror::Error)]
enum Refusal {
    #[error("The certificate names {found}, which may not be this peer.")]
    Role { found: String },
    #[error("The certificate is for another cluster.")]
    Cluster,
    #[error("The certificate names no identity of this product.")]
    Identity(#[source] crate::certificate::CertificateError),
    #[error(
        "The server's chain does not hold the authority whose fingerprint was given; check address and fingerprint."
    )]
    Pin,
}

/// As sentences: rustls shows the refusal of a verifier by its `Debug`, and people read it.
impl fmt::Debug for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn refused(refusal: Refusal) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(refusal))))
}

fn check_holder(leaf: &CertificateDer<'_>, cluster: &str, allowed: &[Role]) -> Result<(), Error> {
    let identity =
        peer_identity(std::slice::from_ref(leaf)).map_err(|error| refused(Refusal::Identity(error)))?;
    if identity.cluster != cluster {
        return Err(refused(Refusal::Cluster));
    }
    if !allowed.contains(&identity.role) {
        return Err(refused(Refusal::Role { found: identity.to_string() }));
    }
    Ok(())
}

/// Accepts clients of this cluster in certain roles; whether a client must present anything is `inner`'s choice.
#[derive(Debug)]
pub(crate) struct ClientRoleVerifier {
    pub(crate) inner: Arc<dyn ClientCertVerifier>,
    pub(crate) cluster: String,
    pub(crate) allowed: &'static [Role],
}

impl ClientCertVerifier for ClientRoleVerifier {
    fn offer_client_auth(&self) -> bool {
        self.inner.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.inner.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.inner.verify_client_cert(end_entity, intermediates, now)?;
        check_holder(end_entity, &self.cluster, self.allowed)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOfferedOrEnabled.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// Accepts servers that are members of this cluster and prove the dialled name.
#[derive(Debug)]
pub(crate) struct MemberVerifier {
    pub(crate) inner: Arc<WebPkiServerVerifier>,
    pub(crate) cluster: String,
}

impl ServerCertVerifier for MemberVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified =
            self.inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)?;
        check_holder(end_entity, &self.cluster, &[Role::Member])?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOfferedOrEnabled.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// Accepts members of whichever cluster has the authority with this fingerprint, which the server must send along.
///
/// The dialled name is not looked at: at first contact the caller knows an address and a fingerprint, nothing else.
#[derive(Debug)]
pub(crate) struct PinnedVerifier {
    pub(crate) pin: Fingerprint,
    pub(crate) algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for PinnedVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let authority = intermediates
            .iter()
            .find(|certificate| Fingerprint::of(certificate) == self.pin)
            .and_then(|certificate| CaCertificate::from_der(certificate.clone().into_owned()).ok())
            .ok_or_else(|| refused(Refusal::Pin))?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.der().clone())?;
        let leaf = ParsedCertificate::try_from(end_entity)?;
        rustls::client::verify_server_cert_signed_by_trust_anchor(
            &leaf,
            &roots,
            intermediates,
            now,
            self.algorithms.all,
        )?;
        check_holder(end_entity, authority.cluster(), &[Role::Member])?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOfferedOrEnabled.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
