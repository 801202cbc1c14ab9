//! What a member or an agent proves itself with: its private key and its certificate chain, kept in one file so that a
//! renewal replaces both at once.

use std::path::Path;

use rustls::sign::CertifiedKey;
use rustls_pki_types::CertificateDer;
use zeroize::Zeroizing;

use crate::authority::{self, CERTIFICATE_TAG, PemError};
use crate::certificate::{self, CertificateError, CertificateFacts};
use crate::files::{self, FileError};
use crate::key::{KeyError, PrivateKey};
use crate::tls::provider;

/// Longest certificate chain that is read: a leaf and its authority, with room for one in between.
pub const CHAIN_MAX: usize = 3;

/// Why a credential could not be made, kept or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CredentialError {
    /// A file could not be written or read.
    #[error("The credential's file cannot be used.")]
    File(#[from] FileError),
    /// The file or chain holds something else.
    #[error(
        "The credential is not a private key and 1 to {CHAIN_MAX} certificates in PEM; restore its file, or enrol again."
    )]
    Pem,
    /// The key could not be read.
    #[error("The credential's private key cannot be used.")]
    Key(#[from] KeyError),
    /// The certificate could not be understood.
    #[error("The credential's certificate cannot be read.")]
    Certificate(#[from] CertificateError),
    /// Key and certificate do not belong together.
    #[error("The credential's key does not match its certificate; enrol again.")]
    Mismatch(#[source] rustls::Error),
}

/// A private key with the chain that certifies it, leaf first.
#[derive(Debug, Clone)]
pub struct Credential {
    key: PrivateKey,
    chain: Vec<CertificateDer<'static>>,
    facts: CertificateFacts,
}

impl Credential {
    /// Joins a key with the chain that the authority issued for it ([`crate::IssuedCertificate::chain_pem`]).
    ///
    /// # Errors
    /// [`CredentialError`] when the chain is malformed or certifies another key.
    pub fn new(key: PrivateKey, chain_pem: &str) -> Result<Credential, CredentialError> {
        let blocks = pem::parse_many(chain_pem).map_err(|_| CredentialError::Pem)?;
        if blocks.iter().any(|block| block.tag() != CERTIFICATE_TAG) {
            return Err(CredentialError::Pem);
        }
        Credential::checked(key, blocks.into_iter().map(|block| block.into_contents().into()).collect())
    }

    /// Reads the file that [`Credential::save`] wrote.
    ///
    /// # Errors
    /// [`CredentialError`] when it is missing, readable by others, or no credential.
    pub fn load(path: &Path) -> Result<Credential, CredentialError> {
        let (key, chain) =
            authority::key_and_chain(&files::read_secret(path)?).map_err(|error| match error {
                PemError::Shape => CredentialError::Pem,
                PemError::Key(key) => CredentialError::Key(key),
            })?;
        Credential::checked(key, chain)
    }

    /// Writes key and chain to `path`, atomically and for this user only.
    ///
    /// # Errors
    /// [`CredentialError::File`].
    pub fn save(&self, path: &Path) -> Result<(), CredentialError> {
        let text: Zeroizing<String> = authority::key_and_chain_pem(&self.key, &self.chain);
        Ok(files::write_secret(path, text.as_bytes())?)
    }

    /// What the certificate says: the holder, its life, its serial number.
    pub fn facts(&self) -> &CertificateFacts {
        &self.facts
    }

    /// The chain as TLS presents it, leaf first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    pub(crate) fn key(&self) -> &PrivateKey {
        &self.key
    }

    fn checked(key: PrivateKey, chain: Vec<CertificateDer<'static>>) -> Result<Credential, CredentialError> {
        if chain.is_empty() || chain.len() > CHAIN_MAX {
            return Err(CredentialError::Pem);
        }
        let facts = certificate::facts(&chain[0])?;
        CertifiedKey::from_der(chain.clone(), key.rustls(), &provider())
            .map_err(CredentialError::Mismatch)?;
        Ok(Credential { key, chain, facts })
    }
}
