//! The cluster's certificate authority: one self-signed ECDSA P-256 certificate that names the cluster, and the key
//! that signs the certificates of members, nodes and edges.
//!
//! Of a signing request only the public key is used, and only after the proof that the sender holds the private one
//! has been checked: names, roles and life are the cluster's decision. The authority keeps no list of what it issued;
//! revocation (I11) is the state machine's, by serial number.

use std::path::Path;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyUsagePurpose, PublicKeyData, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls_pki_types::CertificateDer;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer;
use zeroize::Zeroizing;

use crate::certificate::{self, CertificateError, CertificateFacts, Fingerprint};
use crate::files::{self, FileError};
use crate::key::{KEY_TAG, KeyError, PrivateKey, REQUEST_TAG};
use crate::subject::{self, MEMBER_NAMES_MAX, PeerIdentity, Role, Subject, SubjectError};

/// Life of a member's or agent's certificate, and the most that [`Authority::issue`] grants.
pub const CERTIFICATE_VALIDITY: Duration = Duration::from_secs(30 * DAY_S);
/// Life of the authority's own certificate.
pub const AUTHORITY_VALIDITY: Duration = Duration::from_secs(3653 * DAY_S);
/// How far a certificate's life begins before its issue, so that a peer whose clock is behind accepts it.
pub const CLOCK_SKEW_MAX: Duration = Duration::from_secs(5 * 60);
/// Largest signing request that is looked at, in bytes of PEM.
pub const REQUEST_BYTES_MAX: usize = 8 * 1024;

const DAY_S: u64 = 24 * 60 * 60;
/// Tag of a certificate in a PEM file.
pub(crate) const CERTIFICATE_TAG: &str = "CERTIFICATE";

/// Why the authority could not be made, kept or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuthorityError {
    /// A key could not be made or read.
    #[error("The authority's private key cannot be used.")]
    Key(#[from] KeyError),
    /// A file could not be written or read.
    #[error("The authority's file cannot be used.")]
    File(#[from] FileError),
    /// The file holds something else.
    #[error(
        "The authority's file does not hold one private key and one certificate; restore it from a backup of this cluster."
    )]
    Pem,
    /// The certificate is not that of a cluster's authority.
    #[error(
        "The certificate is not that of a cluster authority; give the file that `holdfast server init` wrote."
    )]
    NotAuthority,
    /// A certificate could not be understood.
    #[error("The certificate cannot be read.")]
    Certificate(#[from] CertificateError),
    /// Key and certificate do not belong together.
    #[error("The authority's key does not match its certificate; restore both from the same backup.")]
    Mismatch,
    /// A name cannot stand in a certificate.
    #[error("The subject cannot be named in a certificate.")]
    Subject(#[from] SubjectError),
    /// The signing request is malformed or its proof of possession is wrong.
    #[error(
        "The signing request is not a PEM certificate request signed by its own ECDSA P-256 or Ed25519 key; make a new one with `holdfast`."
    )]
    Request,
    /// The asked life is empty, too long or outside the authority's own.
    #[error("A certificate cannot be issued for that time: at most {} days are granted, within the authority's own life.", CERTIFICATE_VALIDITY.as_secs() / DAY_S)]
    Validity,
    /// Signing failed.
    #[error("The certificate could not be signed.")]
    Sign(#[source] rcgen::Error),
}

/// The authority's public half: what everybody in the cluster trusts, and nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaCertificate {
    der: CertificateDer<'static>,
    cluster: String,
}

impl CaCertificate {
    /// Reads the authority's certificate from PEM; further blocks are refused.
    ///
    /// # Errors
    /// [`AuthorityError`] when it is not one certificate of a cluster authority.
    pub fn from_pem(text: &str) -> Result<CaCertificate, AuthorityError> {
        let blocks = pem::parse_many(text).map_err(|_| AuthorityError::Pem)?;
        match blocks.as_slice() {
            [block] if block.tag() == CERTIFICATE_TAG => {
                CaCertificate::from_der(block.contents().to_vec().into())
            }
            _ => Err(AuthorityError::Pem),
        }
    }

    /// Reads the authority's certificate from DER.
    ///
    /// # Errors
    /// [`AuthorityError::NotAuthority`] when it is not self-signed, not a CA, or names no cluster.
    pub fn from_der(der: CertificateDer<'static>) -> Result<CaCertificate, AuthorityError> {
        let parsed = certificate::parse(&der)?;
        if !parsed.is_ca() || parsed.verify_signature(None).is_err() {
            return Err(AuthorityError::NotAuthority);
        }
        let uri = certificate::single_uri(&parsed)?;
        let cluster = uri.strip_prefix("spiffe://").ok_or(AuthorityError::NotAuthority)?.to_owned();
        subject::cluster_dns_name(&cluster)?;
        Ok(CaCertificate { der, cluster })
    }

    /// The certificate's DER.
    pub fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }

    /// The certificate in PEM.
    pub fn pem(&self) -> String {
        pem::encode(&pem::Pem::new(CERTIFICATE_TAG, self.der.as_ref()))
    }

    /// The id of the cluster that this authority speaks for.
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// What an operator hands to a joining machine so that it knows this cluster at first contact.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.der)
    }
}

/// A certificate fresh from the authority.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuedCertificate {
    /// The new certificate and the authority's, in PEM, in the order in which TLS presents them.
    pub chain_pem: String,
    /// What the new certificate says.
    pub facts: CertificateFacts,
}

/// The authority with its key.
#[derive(Debug, Clone)]
pub struct Authority {
    certificate: CaCertificate,
    key: PrivateKey,
}

impl Authority {
    /// Makes the authority of a new cluster.
    ///
    /// # Errors
    /// [`AuthorityError`] when `cluster` is no id, or without randomness.
    pub fn create(cluster: &str, now: SystemTime) -> Result<Authority, AuthorityError> {
        subject::cluster_dns_name(cluster)?;
        let key = PrivateKey::generate()?;
        let mut params =
            base_params(now, now.checked_add(AUTHORITY_VALIDITY).ok_or(AuthorityError::Validity)?)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name.push(DnType::OrganizationName, "Holdfast cluster authority");
        params.distinguished_name.push(DnType::CommonName, cluster);
        params.subject_alt_names = vec![uri_name(format!("spiffe://{cluster}"))?];
        let signed = params.self_signed(&*key.pair()?).map_err(AuthorityError::Sign)?;
        Ok(Authority { certificate: CaCertificate::from_der(signed.der().clone())?, key })
    }

    /// The key, for what else the authority signs.
    pub(crate) fn key(&self) -> &PrivateKey {
        &self.key
    }

    /// The public half.
    pub fn certificate(&self) -> &CaCertificate {
        &self.certificate
    }

    /// Key and certificate in PEM: for the file, and for handing the authority to a joining member.
    pub fn to_pem(&self) -> Zeroizing<String> {
        key_and_chain_pem(&self.key, std::slice::from_ref(&self.certificate.der))
    }

    /// Reads what [`Authority::to_pem`] wrote.
    ///
    /// # Errors
    /// [`AuthorityError`] when it is anything else, or key and certificate do not match.
    pub fn from_pem(text: &[u8]) -> Result<Authority, AuthorityError> {
        let (key, chain) = key_and_chain(text).map_err(|error| match error {
            PemError::Shape => AuthorityError::Pem,
            PemError::Key(key) => AuthorityError::Key(key),
        })?;
        let [der] = <[_; 1]>::try_from(chain).map_err(|_| AuthorityError::Pem)?;
        let certificate = CaCertificate::from_der(der)?;
        let parsed = certificate::parse(&certificate.der)?;
        if parsed.public_key().subject_public_key.data.as_ref() != key.pair()?.der_bytes() {
            return Err(AuthorityError::Mismatch);
        }
        Ok(Authority { certificate, key })
    }

    /// Writes key and certificate to `path`, atomically and for this user only.
    ///
    /// # Errors
    /// [`AuthorityError::File`].
    pub fn save(&self, path: &Path) -> Result<(), AuthorityError> {
        Ok(files::write_secret(path, self.to_pem().as_bytes())?)
    }

    /// Reads the file that [`Authority::save`] wrote.
    ///
    /// # Errors
    /// [`AuthorityError`] when it is missing, readable by others, or not an authority's.
    pub fn load(path: &Path) -> Result<Authority, AuthorityError> {
        Authority::from_pem(&files::read_secret(path)?)
    }

    /// Issues a certificate for `subject` to whoever holds the key of `request_pem`.
    ///
    /// `validity` is at most [`CERTIFICATE_VALIDITY`] and is cut at the end of the authority's own life.
    ///
    /// # Errors
    /// [`AuthorityError`] when the request, the subject or the life is refused.
    pub fn issue(
        &self,
        request_pem: &str,
        subject: &Subject,
        validity: Duration,
        now: SystemTime,
    ) -> Result<IssuedCertificate, AuthorityError> {
        if validity.is_zero() || validity > CERTIFICATE_VALIDITY {
            return Err(AuthorityError::Validity);
        }
        let public_key = requested_key(request_pem)?;
        let own = certificate::parse(&self.certificate.der)?;
        let own_end = certificate::system_time(own.validity().not_after);
        let end = now.checked_add(validity).ok_or(AuthorityError::Validity)?.min(own_end);
        if end <= now {
            return Err(AuthorityError::Validity);
        }
        let params = self.subject_params(subject, now, end)?;
        let pair = self.key.pair()?;
        let issuer = Issuer::from_ca_cert_der(&self.certificate.der, &*pair).map_err(AuthorityError::Sign)?;
        let signed = params.signed_by(&public_key, &issuer).map_err(AuthorityError::Sign)?;
        let chain = [signed.der().clone(), self.certificate.der.clone()];
        Ok(IssuedCertificate { facts: certificate::facts(signed.der())?, chain_pem: chain_pem(&chain) })
    }

    fn subject_params(
        &self,
        subject: &Subject,
        now: SystemTime,
        end: SystemTime,
    ) -> Result<CertificateParams, AuthorityError> {
        let cluster = self.certificate.cluster();
        let identity = PeerIdentity::new(cluster, subject.role(), subject.id())?;
        let mut params = base_params(now, end)?;
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = match subject.role() {
            Role::Member => vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
            Role::Node | Role::Edge => vec![ExtendedKeyUsagePurpose::ClientAuth],
        };
        params.distinguished_name.push(DnType::CommonName, subject.id());
        params.subject_alt_names = vec![uri_name(identity.uri())?];
        if let Subject::Member { id, host_names, addresses } = subject {
            if host_names.len().saturating_add(addresses.len()) > MEMBER_NAMES_MAX {
                return Err(SubjectError::TooManyNames.into());
            }
            let mut names = vec![subject::cluster_dns_name(cluster)?, subject::member_dns_name(cluster, id)?];
            for name in host_names {
                names.push(subject::checked_host_name(name)?);
            }
            for name in names {
                let name = name.try_into().map_err(AuthorityError::Sign)?;
                params.subject_alt_names.push(SanType::DnsName(name));
            }
            params.subject_alt_names.extend(addresses.iter().copied().map(SanType::IpAddress));
        }
        Ok(params)
    }
}

fn base_params(now: SystemTime, end: SystemTime) -> Result<CertificateParams, AuthorityError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.not_before = now.checked_sub(CLOCK_SKEW_MAX).ok_or(AuthorityError::Validity)?.into();
    params.not_after = end.into();
    // 127 random bits: positive, and never the same for two certificates of one key.
    let mut serial = rand::random::<u128>().to_be_bytes();
    serial[0] &= 0x7f;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    Ok(params)
}

fn uri_name(uri: String) -> Result<SanType, AuthorityError> {
    Ok(SanType::URI(uri.try_into().map_err(AuthorityError::Sign)?))
}

/// The public key of a request whose proof of possession holds.
fn requested_key(request_pem: &str) -> Result<SubjectPublicKeyInfo, AuthorityError> {
    if request_pem.len() > REQUEST_BYTES_MAX {
        return Err(AuthorityError::Request);
    }
    let block = pem::parse(request_pem).map_err(|_| AuthorityError::Request)?;
    if block.tag() != REQUEST_TAG {
        return Err(AuthorityError::Request);
    }
    let Ok(([], request)) = X509CertificationRequest::from_der(block.contents()) else {
        return Err(AuthorityError::Request);
    };
    request.verify_signature().map_err(|_| AuthorityError::Request)?;
    let key = SubjectPublicKeyInfo::from_der(request.certification_request_info.subject_pki.raw)
        .map_err(|_| AuthorityError::Request)?;
    if key.algorithm() == &rcgen::PKCS_ECDSA_P256_SHA256 || key.algorithm() == &rcgen::PKCS_ED25519 {
        Ok(key)
    } else {
        Err(AuthorityError::Request)
    }
}

pub(crate) fn chain_pem(chain: &[CertificateDer<'_>]) -> String {
    chain.iter().map(|der| pem::encode(&pem::Pem::new(CERTIFICATE_TAG, der.as_ref()))).collect()
}

pub(crate) fn key_and_chain_pem(key: &PrivateKey, chain: &[CertificateDer<'_>]) -> Zeroizing<String> {
    let key = Zeroizing::new(pem::encode(&pem::Pem::new(KEY_TAG, key.der())));
    let chain = chain_pem(chain);
    // Sized at once: a string that grew would leave copies of the key behind.
    let mut text = Zeroizing::new(String::with_capacity(key.len() + chain.len()));
    text.push_str(&key);
    text.push_str(&chain);
    text
}

pub(crate) enum PemError {
    Shape,
    Key(KeyError),
}

/// Reads one key and the certificates that follow it.
pub(crate) fn key_and_chain(text: &[u8]) -> Result<(PrivateKey, Vec<CertificateDer<'static>>), PemError> {
    let mut blocks = pem::parse_many(text).map_err(|_| PemError::Shape)?.into_iter();
    let key = blocks.next().filter(|block| block.tag() == KEY_TAG).ok_or(PemError::Shape)?;
    let key = Zeroizing::new(key.into_contents());
    let mut chain = Vec::new();
    for block in blocks {
        if block.tag() != CERTIFICATE_TAG {
            return Err(PemError::Shape);
        }
        chain.push(block.into_contents().into());
    }
    Ok((PrivateKey::from_der(&key).map_err(PemError::Key)?, chain))
}
