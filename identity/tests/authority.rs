//! The authority: what it takes from a request, what it refuses, and its file.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::{Duration, SystemTime};

use holdfast_identity::authority::{AUTHORITY_VALIDITY, CLOCK_SKEW_MAX};
use holdfast_identity::{
    Authority, AuthorityError, CERTIFICATE_VALIDITY, CaCertificate, Credential, CredentialError, PrivateKey,
    Role, Subject, facts,
};
use proptest::prelude::*;
use rcgen::{CertificateParams, DnType, IsCa, KeyPair, PKCS_ECDSA_P384_SHA384, SanType};

fn node() -> Subject {
    Subject::Node { id: "node_1".into() }
}

fn authority() -> Authority {
    Authority::create("c1", SystemTime::now()).unwrap()
}

fn pem_of(params: &CertificateParams, pair: &KeyPair) -> String {
    params.serialize_request(pair).unwrap().pem().unwrap()
}

#[test]
fn i14_only_the_public_key_of_a_request_counts() {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "m1");
    params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.subject_alt_names = vec![
        SanType::URI("spiffe://c1/member/m1".try_into().unwrap()),
        SanType::DnsName("c1.holdfast.internal".try_into().unwrap()),
    ];
    let pair = KeyPair::generate().unwrap();
    let authority = authority();
    let issued =
        authority.issue(&pem_of(&params, &pair), &node(), CERTIFICATE_VALIDITY, SystemTime::now()).unwrap();
    assert_eq!(issued.facts.identity.role, Role::Node);
    assert_eq!(issued.facts.identity.id, "node_1");

    let key = PrivateKey::from_der(pair.serialized_der()).unwrap();
    let credential = Credential::new(key, &issued.chain_pem).unwrap();
    let der = credential.chain()[0].clone();
    let (_, parsed) = x509_parser::parse_x509_certificate(&der).unwrap();
    assert!(!parsed.is_ca());
    assert_eq!(parsed.subject_alternative_name().unwrap().unwrap().value.general_names.len(), 1);
    assert!(!parsed.extended_key_usage().unwrap().unwrap().value.server_auth);
    assert!(parsed.subject().to_string().contains("node_1"));
}

#[test]
fn i14_bad_requests_are_refused() {
    let authority = authority();
    let good = PrivateKey::generate().unwrap().signing_request().unwrap();
    let p384 = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap();
    let forged = {
        // The signature belongs to other bytes.
        let mut block = pem::parse(&good).unwrap().into_contents();
        let last = block.len() - 1;
        block[last] ^= 1;
        pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", block))
    };
    for request in [
        String::new(),
        "rubbish".into(),
        good.replace("REQUEST", "OTHER"),
        forged,
        pem_of(&CertificateParams::default(), &p384),
        format!("{good}{}", " ".repeat(10_000)),
    ] {
        let refused = authority.issue(&request, &node(), CERTIFICATE_VALIDITY, SystemTime::now());
        assert!(matches!(refused, Err(AuthorityError::Request)), "{refused:?}");
    }
}

#[test]
fn life_is_bounded_by_thirty_days_and_by_the_authority() {
    let now = SystemTime::now();
    let authority = Authority::create("c1", now).unwrap();
    let request = PrivateKey::generate().unwrap().signing_request().unwrap();
    for validity in [Duration::ZERO, CERTIFICATE_VALIDITY + Duration::from_secs(1)] {
        let refused = authority.issue(&request, &node(), validity, now);
        assert!(matches!(refused, Err(AuthorityError::Validity)));
    }
    let near_end = now + AUTHORITY_VALIDITY - Duration::from_secs(3_600);
    let facts = authority.issue(&request, &node(), CERTIFICATE_VALIDITY, near_end).unwrap().facts;
    assert!(facts.not_after <= now + AUTHORITY_VALIDITY);
    let after_end = now + AUTHORITY_VALIDITY + Duration::from_secs(1);
    assert!(matches!(
        authority.issue(&request, &node(), CERTIFICATE_VALIDITY, after_end),
        Err(AuthorityError::Validity)
    ));
}

#[test]
fn renewal_is_due_after_two_thirds_and_has_a_new_serial() {
    let authority = authority();
    let now = SystemTime::now();
    let request = PrivateKey::generate().unwrap().signing_request().unwrap();
    let first = authority.issue(&request, &node(), CERTIFICATE_VALIDITY, now).unwrap().facts;
    let second = authority.issue(&request, &node(), CERTIFICATE_VALIDITY, now).unwrap().facts;
    assert_ne!(first.serial, second.serial);
    let life = CERTIFICATE_VALIDITY + CLOCK_SKEW_MAX;
    let expected = now - CLOCK_SKEW_MAX + life / 3 * 2;
    let renew_at = first.renew_at();
    let off = renew_at.duration_since(expected).or_else(|_| expected.duration_since(renew_at)).unwrap();
    assert!(off < Duration::from_secs(3));
}

#[test]
fn authority_and_credential_survive_their_files() {
    let folder = tempfile::tempdir().unwrap();
    let authority = authority();
    let path = folder.path().join("ca.pem");
    authority.save(&path).unwrap();
    let again = Authority::load(&path).unwrap();
    assert_eq!(again.certificate(), authority.certificate());
    assert_eq!(CaCertificate::from_pem(&authority.certificate().pem()).unwrap(), *authority.certificate());
    assert_eq!(again.certificate().cluster(), "c1");

    let key = PrivateKey::generate().unwrap();
    let request = key.signing_request().unwrap();
    let issued = again.issue(&request, &node(), CERTIFICATE_VALIDITY, SystemTime::now()).unwrap();
    let credential = Credential::new(key, &issued.chain_pem).unwrap();
    let path = folder.path().join("node.pem");
    credential.save(&path).unwrap();
    let again = Credential::load(&path).unwrap();
    assert_eq!(again.chain(), credential.chain());
    assert_eq!(again.facts(), &facts(&credential.chain()[0]).unwrap());
}

#[test]
fn mixed_up_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (authority(), authority());
    let mixed = format!("{}{}", one.to_pem().split_inclusive("-----END PRIVATE KEY-----").next().unwrap(), {
        format!("\n{}", two.certificate().pem())
    });
    assert!(matches!(Authority::from_pem(mixed.as_bytes()), Err(AuthorityError::Mismatch)));

    let issued = one
        .issue(
            &PrivateKey::generate().unwrap().signing_request().unwrap(),
            &node(),
            CERTIFICATE_VALIDITY,
            SystemTime::now(),
        )
        .unwrap();
    let other = Credential::new(PrivateKey::generate().unwrap(), &issued.chain_pem);
    assert!(matches!(other, Err(CredentialError::Mismatch(_))));

    let path = folder.path().join("half.pem");
    let whole = one.to_pem();
    holdfast_identity::files::write_secret(&path, &whole.as_bytes()[..whole.len() / 2]).unwrap();
    assert!(Authority::load(&path).is_err());
    assert!(Credential::load(&path).is_err());

    // A leaf is no authority, whatever file it stands in.
    let leaf = issued.chain_pem.split_inclusive("-----END CERTIFICATE-----").next().unwrap();
    assert!(matches!(CaCertificate::from_pem(leaf), Err(AuthorityError::NotAuthority)));
}

#[test]
fn i10_nothing_secret_is_shown() {
    let authority = authority();
    let pem = authority.to_pem();
    let secret_line = pem.lines().nth(2).unwrap();
    assert!(!format!("{authority:?}").contains(secret_line));
    assert!(format!("{authority:?}").contains("PrivateKey(redacted)"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn i14_odd_subjects_are_answered(id in "\\PC{0,80}", host in "\\PC{0,40}") {
        let authority = authority();
        let request = PrivateKey::generate().unwrap().signing_request().unwrap();
        let subject = Subject::Member { id: id.clone(), host_names: vec![host], addresses: vec![] };
        if let Ok(issued) = authority.issue(&request, &subject, CERTIFICATE_VALIDITY, SystemTime::now()) {
            prop_assert_eq!(issued.facts.identity.id, id);
        }
    }
}
