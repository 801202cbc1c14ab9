//! Who is who in a cluster: its certificate authority, the certificates of members and agents, the TLS
//! configurations made from them, and the bearer tokens of people.
//!
//! Everything here is synchronous and touches nothing outside the process but key files. The crate knows no
//! network, no store and no clock beyond the one that TLS verification itself reads; callers pass the time of issue.
//!
//! It must never: let a private key or a token reach a log or an error (I10; secret types redact their `Debug` and are
//! wiped on drop), copy anything but the public key out of a signing request, speak a TLS version below 1.3, or resume
//! a TLS session (a resumed session would skip the checks that make I11 hold). Bytes from a peer are parsed, never
//! trusted and never fatal (I14).

pub mod authority;
pub mod certificate;
pub mod credential;
pub mod files;
pub mod key;
pub mod key_ring;
pub mod sealing;
mod statement;
pub mod subject;
pub mod tls;
pub mod token;
mod verify;

pub use authority::{Authority, AuthorityError, CERTIFICATE_VALIDITY, CaCertificate, IssuedCertificate};
pub use certificate::{CertificateError, CertificateFacts, Fingerprint, facts, peer_identity};
pub use credential::{Credential, CredentialError};
pub use key::{KeyError, PrivateKey};
pub use key_ring::{KeyRing, KeyRingError};
pub use sealing::{SealError, SealKey, SealTo};
pub use subject::{PeerIdentity, Role, Subject, SubjectError, member_server_name, server_name};
pub use tls::{
    TlsError, client_config, mutual_client_config, mutual_server_config, pinned_client_config, server_config,
};
pub use token::{Token, TokenDigest, TokenError, TokenKind};
