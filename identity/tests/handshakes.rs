//! Real TLS handshakes, in memory, between configurations of this crate: who is accepted, and above all who is not.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use holdfast_identity::{
    Authority, CERTIFICATE_VALIDITY, Credential, Fingerprint, PeerIdentity, PrivateKey, Role, Subject,
    client_config, member_server_name, mutual_client_config, mutual_server_config, peer_identity,
    pinned_client_config, server_config, server_name,
};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection};

const CLUSTER: &str = "cluster_01J000000000000000000000AA";
/// Flights that a TLS 1.3 handshake may take before the test calls it stuck.
const FLIGHTS_MAX: usize = 16;

fn member(id: &str) -> Subject {
    Subject::Member {
        id: id.into(),
        host_names: vec!["s1.example.com".into()],
        addresses: vec!["127.0.0.1".parse().unwrap()],
    }
}

fn node() -> Subject {
    Subject::Node { id: "node_1".into() }
}

fn credential_at(
    authority: &Authority,
    subject: &Subject,
    validity: Duration,
    now: SystemTime,
) -> Credential {
    let key = PrivateKey::generate().unwrap();
    let issued = authority.issue(&key.signing_request().unwrap(), subject, validity, now).unwrap();
    Credential::new(key, &issued.chain_pem).unwrap()
}

fn credential(authority: &Authority, subject: &Subject) -> Credential {
    credential_at(authority, subject, CERTIFICATE_VALIDITY, SystemTime::now())
}

fn authority() -> Authority {
    Authority::create(CLUSTER, SystemTime::now()).unwrap()
}

fn authority_long_ago() -> Authority {
    Authority::create(CLUSTER, SystemTime::now() - Duration::from_secs(300 * 86_400)).unwrap()
}

/// Shakes hands to the end; the error is that of whichever side refused.
fn shake(
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    name: ServerName<'static>,
) -> Result<(ClientConnection, ServerConnection), rustls::Error> {
    let mut client = ClientConnection::new(client, name)?;
    let mut server = ServerConnection::new(server)?;
    for _ in 0..FLIGHTS_MAX {
        let mut bytes = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut bytes).unwrap();
        }
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            server.read_tls(&mut rest).unwrap();
            server.process_new_packets()?;
        }
        let mut bytes = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut bytes).unwrap();
        }
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            client.read_tls(&mut rest).unwrap();
            client.process_new_packets()?;
        }
        if !client.is_handshaking()
            && !server.is_handshaking()
            && !client.wants_write()
            && !server.wants_write()
        {
            return Ok((client, server));
        }
    }
    panic!("handshake did not end within {FLIGHTS_MAX} flights");
}

fn refusal(result: Result<(ClientConnection, ServerConnection), rustls::Error>) -> String {
    match result {
        Ok(_) => panic!("the handshake must be refused"),
        Err(error) => format!("{error:?} {error}"),
    }
}

#[test]
fn people_and_agents_reach_the_api() {
    let authority = authority();
    let ca = authority.certificate();
    let server = server_config(&credential(&authority, &member("m1")), ca).unwrap();

    let (client, on_server) =
        shake(client_config(ca, None).unwrap(), server.clone(), server_name(CLUSTER).unwrap()).unwrap();
    assert_eq!(client.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    assert_eq!(client.alpn_protocol(), Some(&b"h2"[..]));
    assert!(on_server.peer_certificates().is_none());

    let agent = client_config(ca, Some(&credential(&authority, &node()))).unwrap();
    let (client, on_server) = shake(agent, server.clone(), server_name(CLUSTER).unwrap()).unwrap();
    let peer = peer_identity(on_server.peer_certificates().unwrap()).unwrap();
    assert_eq!(peer, PeerIdentity::new(CLUSTER, Role::Node, "node_1").unwrap());
    assert_eq!(peer_identity(client.peer_certificates().unwrap()).unwrap().id, "m1");

    for name in ["127.0.0.1", "s1.example.com"] {
        let name = ServerName::try_from(name.to_owned()).unwrap();
        shake(client_config(ca, None).unwrap(), server.clone(), name).unwrap();
    }
}

#[test]
fn members_shake_hands_on_the_raft_port() {
    let authority = authority();
    let ca = authority.certificate();
    let server = mutual_server_config(&credential(&authority, &member("m1")), ca).unwrap();
    let client = mutual_client_config(&credential(&authority, &member("m2")), ca).unwrap();
    let (_, on_server) = shake(client, server, member_server_name(CLUSTER, "m1").unwrap()).unwrap();
    assert_eq!(peer_identity(on_server.peer_certificates().unwrap()).unwrap().id, "m2");
}

#[test]
fn foreign_authority_is_refused_both_ways() {
    let (ours, foreign) = (authority(), authority());
    let server = server_config(&credential(&ours, &member("m1")), ours.certificate()).unwrap();
    let pinned_elsewhere = client_config(foreign.certificate(), None).unwrap();
    let reason = refusal(shake(pinned_elsewhere, server.clone(), server_name(CLUSTER).unwrap()));
    assert!(reason.contains("UnknownIssuer") || reason.contains("BadSignature"), "{reason}");

    let stranger = client_config(ours.certificate(), Some(&credential(&foreign, &node()))).unwrap();
    let reason = refusal(shake(stranger, server, server_name(CLUSTER).unwrap()));
    assert!(reason.contains("UnknownIssuer") || reason.contains("BadSignature"), "{reason}");
}

#[test]
fn expired_and_not_yet_valid_are_refused_both_ways() {
    let authority = authority_long_ago();
    let ca = authority.certificate();
    let day = Duration::from_secs(86_400);
    let good_server = server_config(&credential(&authority, &member("m1")), ca).unwrap();
    for (now, expected) in
        [(SystemTime::now() - 40 * day, "Expired"), (SystemTime::now() + 2 * day, "NotValidYet")]
    {
        let bad_member = credential_at(&authority, &member("m1"), CERTIFICATE_VALIDITY, now);
        let bad_node = credential_at(&authority, &node(), CERTIFICATE_VALIDITY, now);
        let server = server_config(&bad_member, ca).unwrap();
        let reason = refusal(shake(client_config(ca, None).unwrap(), server, server_name(CLUSTER).unwrap()));
        assert!(reason.contains(expected), "{reason}");

        let client = client_config(ca, Some(&bad_node)).unwrap();
        let reason = refusal(shake(client, good_server.clone(), server_name(CLUSTER).unwrap()));
        assert!(reason.contains(expected), "{reason}");
    }
}

#[test]
fn wrong_server_name_is_refused() {
    let authority = authority();
    let ca = authority.certificate();
    let server = mutual_server_config(&credential(&authority, &member("m1")), ca).unwrap();
    let client = mutual_client_config(&credential(&authority, &member("m2")), ca).unwrap();
    for name in [member_server_name(CLUSTER, "m3").unwrap(), server_name("othercluster").unwrap()] {
        let reason = refusal(shake(client.clone(), server.clone(), name));
        assert!(reason.contains("NotValidForName"), "{reason}");
    }
}

#[test]
fn agents_are_refused_on_the_raft_port() {
    let authority = authority();
    let ca = authority.certificate();
    let server = mutual_server_config(&credential(&authority, &member("m1")), ca).unwrap();
    for subject in [node(), Subject::Edge { id: "edge_1".into() }] {
        let client = mutual_client_config(&credential(&authority, &subject), ca).unwrap();
        let reason = refusal(shake(client, server.clone(), server_name(CLUSTER).unwrap()));
        assert!(reason.contains("may not be this peer"), "{reason}");
    }
    let nobody = client_config(ca, None).unwrap();
    let reason = refusal(shake(nobody, server, server_name(CLUSTER).unwrap()));
    assert!(reason.contains("NoCertificatesPresented"), "{reason}");
}

#[test]
fn agents_cannot_pose_as_a_member() {
    let authority = authority();
    let ca = authority.certificate();
    // The node serves with its own, genuine certificate.
    let server = server_config(&credential(&authority, &node()), ca).unwrap();
    for client in [client_config(ca, None).unwrap(), pinned_client_config(ca.fingerprint()).unwrap()] {
        refusal(shake(client, server.clone(), server_name(CLUSTER).unwrap()));
    }
}

#[test]
fn another_cluster_of_the_same_authority_key_is_no_peer() {
    // Same cluster id spelled in the certificate is what counts, not only the chain.
    let authority = authority();
    let other = Authority::create("othercluster", SystemTime::now()).unwrap();
    let server = server_config(&credential(&other, &member("m1")), other.certificate()).unwrap();
    let client = client_config(authority.certificate(), None).unwrap();
    refusal(shake(client, server, server_name("othercluster").unwrap()));
}

#[test]
fn first_contact_accepts_the_pinned_authority_and_no_other() {
    let (ours, foreign) = (authority(), authority());
    let server = server_config(&credential(&ours, &member("m1")), ours.certificate()).unwrap();
    let anywhere = ServerName::try_from("192.0.2.7").unwrap();
    let pinned = pinned_client_config(ours.certificate().fingerprint()).unwrap();
    shake(pinned, server.clone(), anywhere.clone()).unwrap();

    let pinned = pinned_client_config(foreign.certificate().fingerprint()).unwrap();
    let reason = refusal(shake(pinned, server, anywhere.clone()));
    assert!(reason.contains("fingerprint"), "{reason}");

    // The pin of a leaf is no pin of an authority.
    let leaf = credential(&ours, &member("m1"));
    let server = server_config(&leaf, ours.certificate()).unwrap();
    let pinned = pinned_client_config(Fingerprint::of(&leaf.chain()[0])).unwrap();
    refusal(shake(pinned, server, anywhere.clone()));

    // An impostor that sends our authority's certificate after its own leaf is still refused.
    let key = PrivateKey::generate().unwrap();
    let issued = foreign
        .issue(&key.signing_request().unwrap(), &member("m1"), CERTIFICATE_VALIDITY, SystemTime::now())
        .unwrap();
    let leaf_pem = issued.chain_pem.split_inclusive("-----END CERTIFICATE-----").next().unwrap().to_owned();
    let chain = format!("{leaf_pem}\n{}", ours.certificate().pem());
    let impostor = Credential::new(key, &chain).unwrap();
    let server = server_config(&impostor, foreign.certificate()).unwrap();
    let pinned = pinned_client_config(ours.certificate().fingerprint()).unwrap();
    let reason = refusal(shake(pinned, server, anywhere));
    assert!(reason.contains("UnknownIssuer") || reason.contains("BadSignature"), "{reason}");
}
