//! Reading certificates: who a peer is, how long its certificate holds, and its fingerprint.
//!
//! Nothing here decides trust; TLS has verified the chain before any of these answers means something. Every function
//! is total over arbitrary bytes (I14).

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls_pki_types::CertificateDer;
use sha2::{Digest, Sha256};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;
use x509_parser::time::ASN1Time;

use crate::subject::{PeerIdentity, SubjectError};

/// Text before the hexadecimal digits of a written fingerprint.
const FINGERPRINT_PREFIX: &str = "sha256:";

/// Why a certificate could not be understood.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CertificateError {
    /// The peer presented nothing.
    #[error("The peer presented no certificate; connect with the credential that enrolment wrote.")]
    Missing,
    /// The bytes are no X.509 certificate.
    #[error("The certificate is not valid X.509 DER; restore the file, or enrol again.")]
    Parse,
    /// The certificate does not name exactly one identity.
    #[error(
        "The certificate carries {uris} URI names where exactly one says who its holder is; it was not issued by this product."
    )]
    UriCount {
        /// How many it carries.
        uris: usize,
    },
    /// The identity in the certificate is malformed.
    #[error("The certificate's URI name cannot be read as an identity.")]
    Identity(#[from] SubjectError),
    /// A written fingerprint is malformed.
    #[error(
        "A fingerprint is `sha256:` and 64 hexadecimal digits; copy the whole line that `holdfast server init` printed."
    )]
    Fingerprint,
}

/// The SHA-256 of a certificate's DER: what people compare and what first contact is pinned to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// The fingerprint of `certificate`.
    pub fn of(certificate: &CertificateDer<'_>) -> Fingerprint {
        Fingerprint(Sha256::digest(certificate.as_ref()).into())
    }

    /// The raw digest.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{FINGERPRINT_PREFIX}{}", data_encoding::HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Fingerprint {
    type Err = CertificateError;

    fn from_str(text: &str) -> Result<Fingerprint, CertificateError> {
        let digits = text.strip_prefix(FINGERPRINT_PREFIX).unwrap_or(text);
        let bytes = data_encoding::HEXLOWER_PERMISSIVE
            .decode(digits.as_bytes())
            .map_err(|_| CertificateError::Fingerprint)?;
        Ok(Fingerprint(bytes.try_into().map_err(|_| CertificateError::Fingerprint)?))
    }
}

/// What a certificate says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateFacts {
    /// Its holder.
    pub identity: PeerIdentity,
    /// The serial number in lower-case hexadecimal: what a revocation names.
    pub serial: String,
    /// Not accepted before this time.
    pub not_before: SystemTime,
    /// Not accepted after this time.
    pub not_after: SystemTime,
    /// SHA-256 of the certificate.
    pub fingerprint: Fingerprint,
}

impl CertificateFacts {
    /// When the holder should renew: after two thirds of the certificate's life.
    pub fn renew_at(&self) -> SystemTime {
        let life = self.not_after.duration_since(self.not_before).unwrap_or(Duration::ZERO);
        self.not_before.checked_add(life / 3 * 2).unwrap_or(self.not_after)
    }
}

/// Reads a certificate of a member or agent.
///
/// # Errors
/// [`CertificateError`] when it is malformed or names no holder.
pub fn facts(certificate: &CertificateDer<'_>) -> Result<CertificateFacts, CertificateError> {
    let parsed = parse(certificate)?;
    Ok(CertificateFacts {
        identity: PeerIdentity::from_uri(single_uri(&parsed)?)?,
        serial: data_encoding::HEXLOWER.encode(parsed.raw_serial()),
        not_before: system_time(parsed.validity().not_before),
        not_after: system_time(parsed.validity().not_after),
        fingerprint: Fingerprint::of(certificate),
    })
}

/// Who the peer is that presented `chain` (leaf first), as rustls' `peer_certificates` returns it.
///
/// # Errors
/// [`CertificateError`] when there is no certificate or it names no holder.
pub fn peer_identity(chain: &[CertificateDer<'_>]) -> Result<PeerIdentity, CertificateError> {
    let leaf = chain.first().ok_or(CertificateError::Missing)?;
    Ok(PeerIdentity::from_uri(single_uri(&parse(leaf)?)?)?)
}

pub(crate) fn parse<'a>(
    certificate: &'a CertificateDer<'_>,
) -> Result<X509Certificate<'a>, CertificateError> {
    match X509Certificate::from_der(certificate.as_ref()) {
        Ok(([], parsed)) => Ok(parsed),
        _ => Err(CertificateError::Parse),
    }
}

pub(crate) fn single_uri<'a>(parsed: &X509Certificate<'a>) -> Result<&'a str, CertificateError> {
    let names = parsed.subject_alternative_name().map_err(|_| CertificateError::Parse)?;
    let mut found = None;
    let mut uris = 0;
    for name in names.iter().flat_map(|extension| &extension.value.general_names) {
        if let GeneralName::URI(uri) = name {
            uris += 1;
            found = Some(*uri);
        }
    }
    match found {
        Some(uri) if uris == 1 => Ok(uri),
        _ => Err(CertificateError::UriCount { uris }),
    }
}

/// A certificate's time; one before 1970 is no time that this product has written and counts as 1970.
pub(crate) fn system_time(time: ASN1Time) -> SystemTime {
    let seconds = u64::try_from(time.timestamp()).unwrap_or(0);
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).unwrap_or(UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn i14_any_bytes_as_certificate_are_answered(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            prop_assert!(facts(&CertificateDer::from(bytes)).is_err());
        }
    }

    #[test]
    fn fingerprint_round_trips_and_is_strict() {
        let fingerprint = Fingerprint::of(&CertificateDer::from(vec![1, 2, 3]));
        assert_eq!(fingerprint.to_string().parse::<Fingerprint>().unwrap(), fingerprint);
        assert_eq!(fingerprint.to_string()[7..].parse::<Fingerprint>().unwrap(), fingerprint);
        for text in ["", "sha256:", "sha256:00", "md5:00", &fingerprint.to_string()[..70]] {
            assert!(text.parse::<Fingerprint>().is_err(), "{text}");
        }
    }

    #[test]
    fn no_certificate_is_an_answer() {
        assert!(matches!(peer_identity(&[]), Err(CertificateError::Missing)));
    }
}
